"""Elementwise maps as the tests call them."""

from functools import partial

import jax
import numpy as np


def raw(map, *shape, scale=1.0, seed=0):
    """Parameters of the map for values of this shape, N(0, scale^2)."""
    return scale * np.random.default_rng(seed).normal(size=(map.num_params, *shape))


@partial(jax.jit, static_argnums=0)
def forward(map, x, params):
    return map.forward_and_log_det(x, params)


@partial(jax.jit, static_argnums=0)
def inverse(map, y, params):
    return map.inverse_and_log_det(y, params)


def wrap(angle):
    return (angle + np.pi) % (2 * np.pi) - np.pi
