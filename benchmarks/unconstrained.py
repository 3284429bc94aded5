"""A model's density over one unconstrained vector, by NumPyro's own means: what peers are given."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer.util import constrain_fn, initialize_model, potential_energy


class Unconstrained(NamedTuple):
    """Size of the vector, its log density, and the model's sites at it."""

    dim: int
    log_density: Callable
    sites: Callable


def unconstrained(posterior, seed: int) -> Unconstrained:
    """NumPyro's potential energy of a ``models.Posterior``, flattened."""
    model, args = handlers.seed(posterior.model, 0), posterior.args
    start = initialize_model(jax.random.key(seed), posterior.model, model_args=args).param_info.z
    flat, unravel = ravel_pytree(start)
    constrain = partial(constrain_fn, model, args, {}, return_deterministic=True)
    return Unconstrained(
        len(flat),
        lambda z: -potential_energy(model, args, {}, unravel(z)),
        lambda z: constrain(unravel(z)),
    )
