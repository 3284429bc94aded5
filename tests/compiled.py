"""New flows, and methods of transforms and flows, each as one program.

Array by array they would be dozens.
"""

from functools import cache, partial

import jax

import numpyro_flows as nf


def built(build):
    """What ``build(key)`` returns, by one program."""
    return jax.jit(build)(jax.random.key(0))


@cache
def _new(recipe, dim, config, x64):
    return built(lambda key: recipe(key, dim, **dict(config)))


def new(recipe, dim, **config):
    """An untrained flow; the same one for the same call."""
    try:
        hash(tuple(config.items()))
    except TypeError:  # of a distribution, say
        return built(lambda key: recipe(key, dim, **config))
    return _new(recipe, dim, tuple(config.items()), jax.config.jax_enable_x64)


def network(dim, context_dim=0, **config):
    """A continuous transform as it starts."""

    def build(key):
        field = nf.nn.ConcatSquash(key, dim, hidden=(8,), context_size=context_dim)
        return nf.transforms.Continuous(key, dim, field, context_dim=context_dim, **config)

    return built(build)


@jax.jit
def forward(transform, x, context=None):
    return transform.forward_and_log_det(x, context)


@jax.jit
def inverse(transform, y, context=None):
    return transform.inverse_and_log_det(y, context)


@jax.jit
def there_and_back(transform, x, context=None):
    """The forward direction at x, and the inverse of that."""
    y, log_det = transform.forward_and_log_det(x, context)
    return y, log_det, *transform.inverse_and_log_det(y, context)


@jax.jit
def log_prob(flow, x):
    return flow.log_prob(x)


@partial(jax.jit, static_argnums=2)
def sample(flow, key, shape=()):
    return flow.sample(key, shape)


@partial(jax.jit, static_argnums=2)
def sample_and_log_prob(flow, key, shape=()):
    return flow.sample_and_log_prob(key, shape)
