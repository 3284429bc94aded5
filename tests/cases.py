"""One entry per concrete transform: small instances, shaken off the identity.

``tests/test_contract.py`` finds every concrete class of the package by itself and asks for its
entry here.
"""

import jax
import jax.numpy as jnp
from numpyro.distributions import Normal, StudentT, biject_to, constraints

import numpyro_flows as nf
from numpyro_flows.elementwise import Affine, Shift

SMALL = {"depth": 3, "hidden": (8, 8)}


def shake(tree, key, scale=0.3):
    """Add N(0, scale^2 / fan-in) to the parameters; a vector's fan-in is 1."""
    params, rest = nf.partition(tree)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    shaken = [
        leaf
        + scale * jax.random.normal(k, leaf.shape) / max(1, leaf.shape[-1] * (leaf.ndim > 1)) ** 0.5
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return nf.combine(jax.tree.unflatten(structure, shaken), rest)


def flow(recipe, dim, **config):
    return shake(recipe(jax.random.key(0), dim, **{**SMALL, **config}), jax.random.key(1))


def transform(recipe, dim, **config):
    return flow(recipe, dim, **config).transform


def coupling(dim, map, **config):
    return shake(nf.Coupling(jax.random.key(0), dim, map, hidden=(8,), **config), jax.random.key(1))


def points(dim, n=6, seed=2):
    return jax.random.normal(jax.random.key(seed), (n, dim))


# class -> {label: () -> (transform, x, context)}
CASES = {
    nf.Coupling: {
        "affine": lambda: (coupling(3, Affine()), points(3), None),
        "shift": lambda: (coupling(2, Shift()), points(2), None),
        "dim=1": lambda: (coupling(1, Affine()), points(1), None),
        "context": lambda: (coupling(3, Affine(), context_dim=2), points(3), points(2, seed=3)),
        "dim=1, context": lambda: (
            coupling(1, Affine(), context_dim=2),
            points(1),
            points(2, seed=3),
        ),
    },
    nf.Scan: {
        "realnvp": lambda: (transform(nf.realnvp, 5), points(5), None),
        "realnvp, dim=1": lambda: (transform(nf.realnvp, 1), points(1), None),
        "realnvp, context": lambda: (
            transform(nf.realnvp, 2, context_dim=1, permutation="swap"),
            points(2),
            points(1, seed=3),
        ),
        "nice": lambda: (transform(nf.nice, 3, rescale=False), points(3), None),
    },
    nf.Chain: {
        "nice, rescaled": lambda: (transform(nf.nice, 4, permutation="reverse"), points(4), None),
        "context in one part": lambda: (
            transform(nf.nice, 3, context_dim=2),
            points(3),
            points(2, seed=3),
        ),
        "simplex": lambda: (transform(nf.realnvp, 3, support=constraints.simplex), points(3), None),
    },
    nf.DiagonalScale: {
        "": lambda: (shake(nf.DiagonalScale(3), jax.random.key(1)), points(3), None),
    },
    nf.Inverse: {
        "": lambda: (transform(nf.realnvp, 3).inv, points(3), None),
        "context": lambda: (
            transform(nf.realnvp, 3, context_dim=2).inv,
            points(3),
            points(2, seed=3),
        ),
    },
    nf.Conditioned: {
        "": lambda: (
            nf.Conditioned(transform(nf.realnvp, 3, context_dim=2), jnp.array([0.5, -1.0])),
            points(3),
            None,
        ),
    },
    nf.Standardized: {
        "": lambda: (
            nf.Standardized(
                transform(nf.realnvp, 2), jnp.array([3.0, -1.0]), jnp.array([2.0, 0.5])
            ),
            points(2),
            None,
        ),
        "context": lambda: (
            nf.Standardized(
                transform(nf.realnvp, 2, context_dim=1),
                jnp.array([3.0, -1.0]),
                jnp.array([2.0, 0.5]),
                jnp.array([10.0]),
                jnp.array([5.0]),
            ),
            points(2),
            10 + 5 * points(1, seed=3),
        ),
    },
    nf.NumPyroTransform: {
        "positive": lambda: (
            nf.NumPyroTransform(biject_to(constraints.positive), (3,)),
            points(3),
            None,
        ),
        "interval": lambda: (
            nf.NumPyroTransform(biject_to(constraints.interval(-1, 3)), (2,)),
            points(2),
            None,
        ),
        "ordered": lambda: (
            nf.NumPyroTransform(biject_to(constraints.ordered_vector), (3,)),
            points(3),
            None,
        ),
        "corr_cholesky": lambda: (
            nf.NumPyroTransform(biject_to(constraints.corr_cholesky), (3,)),
            0.5 * points(3),
            None,
        ),
    },
}

# Classes whose values carry a batch axis of their own and so cannot be tried on one row.
ELSEWHERE = {nf.Stacked: "tests/test_params.py::test_flow_inside_scan"}

BASES = {
    "scalar": lambda: Normal(0, 1),
    "batch": lambda: Normal(jnp.zeros(3), 2.0),
    "student": lambda: StudentT(5),
}
