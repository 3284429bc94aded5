"""Small transforms and flows, shaken off the identity, and points to put into them."""

import jax
import jax.numpy as jnp
import numpy as np
from compiled import built, network, new
from numpyro.distributions import constraints

import numpyro_flows as nf
from numpyro_flows.elementwise import (
    Affine,
)

SMALL = {"depth": 3, "hidden": (8, 8)}


def shake(tree, key, scale=0.3):
    """Add N(0, scale^2 / fan-in) to the parameters; a vector's fan-in is 1.

    By NumPy: JAX would compile a program for every shape.
    """

    def fan_in(leaf):
        return max(1, leaf.shape[-1] * (leaf.ndim > 1))

    params, rest = nf.partition(tree)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    shaken = [
        jnp.asarray(
            leaf + scale * rng.normal(size=leaf.shape) / fan_in(leaf) ** 0.5,
            leaf.dtype,
        )
        for leaf in map(np.asarray, leaves)
    ]
    return nf.combine(jax.tree.unflatten(structure, shaken), rest)


def flow(recipe, dim, **config):
    return shake(new(recipe, dim, **{**SMALL, **config}), jax.random.key(1))


def transform(recipe, dim, **config):
    return flow(recipe, dim, **config).transform


def layer(cls, dim, *args, **config):
    if cls is not nf.transforms.BlockAutoregressive:
        config = {"hidden": (8,), **config}
    return shake(built(lambda key: cls(key, dim, *args, **config)), jax.random.key(1))


def coupling(dim, map, **config):
    return layer(nf.transforms.Coupling, dim, map, **config)


def conv_coupling(shape, map, **config):
    config = {"hidden": (6, 6), **config}
    made = built(lambda key: nf.transforms.ConvCoupling(key, shape, map, **config))
    return shake(made, jax.random.key(1))


def points(dim, n=6, seed=2):
    return normal(n, dim, seed=seed)


def normal(*shape, seed=2):
    """By NumPy, too."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def assert_same(loaded, flow):
    assert type(loaded) is type(flow)
    assert jax.tree.structure(loaded) == jax.tree.structure(flow)
    for got, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(flow), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def stacked(build, depth=3):
    return jax.jit(jax.vmap(build))(jax.random.split(jax.random.key(0), depth))


def glow_like(dim):
    def step(key):
        return nf.transforms.Chain(
            [
                nf.transforms.ActNorm(dim),
                nf.transforms.LULinear(dim),
                nf.transforms.Coupling(key, dim, Affine(), hidden=(8,)),
            ]
        )

    layers = stacked(step)
    return shake(nf.transforms.Scan(layers, [range(dim)[::-1]] * 3), jax.random.key(1))


def continuous(dim, context_dim=0, **config):
    exact = 1e-10 if jax.config.jax_enable_x64 else 1e-6
    made = network(dim, context_dim, **{"rtol": exact, "atol": exact, **config})
    return shake(made, jax.random.key(1))


def image(*shape, n=4, seed=2):
    return normal(n, *shape, seed=seed)


def small_glow(shape=(4, 4, 1), **config):
    config = {"levels": 2, "depth": 2, "hidden": (6, 6), **config}
    made = built(lambda key: nf.glow(key, shape, **config))
    return shake(made, jax.random.key(1), 0.1).transform


def mixed(**config):
    """Of a real column between discrete ones, without the map onto the support."""
    parts = (constraints.integer_interval(-1, 1), constraints.real, constraints.boolean)
    made = new(nf.nsf_ar, 3, support=parts, **{**SMALL, "num_bins": 3, **config})
    return shake(made.transform.parts[0], jax.random.key(1))


def unit_where_discrete(transform):
    """Points of the base, inside of cells."""
    unit = np.random.default_rng(2).uniform(0.05, 0.95, (6, 3))
    return jnp.where(jnp.array(transform.discrete), unit, points(3))


def chain(num_covariates=0):
    """A Markov chain of five frames of two numbers that sees the last two."""
    past = jnp.zeros((2, 2))
    example = (past, jnp.zeros(num_covariates)) if num_covariates else past

    def build(key):
        network = nf.nn.Embedding(key, example, 3, hidden=(8,))
        frame = nf.realnvp(key, 2, context_dim=3, depth=2, hidden=(8,))
        return nf.transforms.Markov(frame.transform, network, 5, 2, num_covariates)

    return shake(built(build), jax.random.key(1))
