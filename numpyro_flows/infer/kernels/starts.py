"""Where the chains of a kernel start."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import biject_to, constraints

from ...compilation import is_traced
from ..learning import Model
from ..maps import LearnedMap
from ..traced import Traced


def checked_start(
    model: Model, init_params: dict[str, Any], chains: tuple[int, ...]
) -> dict[str, Array]:
    """Values of the latent sites alone, of the shapes that the chains need.

    :param chains: their number, or nothing for a single one.
    :raises ValueError: for sites that the model does not have, that are missing, or whose values
        have another shape or are not finite.
    """
    example = dict(model.space.shapes)
    if unknown := [name for name in init_params if name not in model.names]:
        raise ValueError(
            f"init_params: the model has no site {unknown[0]!r}; its latent sites are "
            f"{sorted(example)}."
        )
    if missing := [name for name in example if name not in init_params]:
        raise ValueError(
            f"init_params: no value for site {missing[0]!r}. Give all latent sites, "
            "unconstrained, or start some by `FlowNUTS(..., init_strategy=init_to_value(...))`."
        )
    start = {name: jnp.asarray(init_params[name]) for name in example}
    for name, value in start.items():
        if value.shape != (expected := chains + example[name]):
            raise ValueError(
                f"init_params: expected shape {expected} for site {name!r}, the number of "
                f"chains first if there are several, got {value.shape}."
            )
        if not is_traced(value) and not np.isfinite(value).all():
            raise ValueError(f"init_params: the start of site {name!r} is not finite.")
    return start


def start_of(key: Array, init_params: Any, strategy: Traced | None, learned: LearnedMap) -> Array:
    """Where a chain starts in the base space."""
    space = learned.space
    if init_params is not None:
        # NumPyro's unconstrained values are ours, but for angles, which it cuts.
        latent = space.pack(
            {
                name: biject_to(constraints.circular)(x) if name in space.circular else x
                for name, x in init_params.items()
            }
        )
    elif strategy is not None:
        _, latent = strategy(key)
    else:
        return learned.sample_start(key)
    return learned.from_latent(latent)


def init_to_one_of(starts: dict[str, Array]) -> Callable:
    """An initialisation strategy: each site at its value in one of some chains, drawn at random.

    :param starts: by site, ``(chains, *shape)``.
    """
    return functools.partial(_one_of, starts)


def _one_of(starts: dict[str, Array], site: dict[str, Any]) -> Array | None:
    if site["type"] != "sample" or site["is_observed"] or site["name"] not in starts:
        return None
    values = starts[site["name"]]
    return values[jax.random.randint(site["kwargs"]["rng_key"], (), 0, len(values))]
