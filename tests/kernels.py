"""A model for tests of FlowNUTS, and kernels with maps that were not learned."""

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer import MCMC, init_to_uniform

import numpyro_flows as nf
from numpyro_flows.infer import learning

SMALL = partial(nf.realnvp, depth=3, hidden=(8,), activation="gelu")
Y = jnp.array([1.0, 2.0, 0.0, 4.0])
KEY = jax.random.key(0)


def hierarchical(y):
    """The first latent site in a plate, one of a larger event, one scaled, one masked."""
    with numpyro.plate("rows", len(y)):
        theta = numpyro.sample("theta", dist.Normal(1.0, 2.0))
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)
    numpyro.deterministic("total", theta.sum())
    numpyro.sample("pair", dist.Normal(jnp.zeros((2, 2)), 3.0).to_event(2))
    with handlers.scale(scale=4.0):
        numpyro.sample("narrow", dist.Normal(-1.0, 2.0))
    with handlers.mask(mask=jnp.array([True, False])):
        flat = numpyro.sample("flat", dist.Normal(jnp.zeros(2), 1.0))
    numpyro.factor("bound", -0.5 * (flat[1] - 2.0) ** 2)


def shaken(k, *args, scale=0.1, affine=None):
    """A kernel whose map is far from the posterior, and not too crooked for NUTS."""
    guide = nf.AutoFlow(k.model, SMALL, init="location")
    begun = guide.set_up(KEY, args, {})
    params = guide.initial_flow(KEY)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    leaves = [a + scale * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    affine = affine or nf.transforms.FixedAffine(begun.starts[0], 2.0)
    flow = guide.flow(jax.tree.unflatten(structure, leaves), affine)
    model = learning.Model(
        k.model, {}, init_to_uniform, guide.space, frozenset(guide.prototype_trace)
    )
    chosen = learning.Chosen(flow, guide.windings(affine))
    k._learned = learning.Learned(model, chosen, (), True, 0.0, 0.0, 0, 0)
    k._arguments = jax.tree.flatten((args, {}))
    return k


def run(k, *args, num_chains=2, num_samples=1000, method="vectorized", **settings):
    mcmc = MCMC(
        k,
        num_warmup=300,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method=method,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(1), *args, **settings)
    return mcmc
