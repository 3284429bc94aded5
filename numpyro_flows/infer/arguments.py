"""A model's arguments, split into what a compiled program takes and what shapes it."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Static:
    """Arguments that are no arrays of numbers: sizes, flags, None; hashable."""

    leaves: tuple[Any, ...]
    structure: Any


def split_arguments(args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Static]:
    """Arrays, which become arguments of a compiled program, and the rest, which it is built for.

    Integers without axes stay with the rest: they may be sizes.
    """
    traced, rest = eqx.partition((args, kwargs), _is_traced)
    leaves, structure = jax.tree.flatten(rest)
    return traced, Static(tuple(map(_hashable, leaves)), structure)


def join_arguments(traced: Any, static: Static) -> tuple[tuple, dict[str, Any]]:
    """What :func:`split_arguments` split."""
    return eqx.combine(traced, jax.tree.unflatten(static.structure, static.leaves))


def _is_traced(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array | np.ndarray):
        return False
    return leaf.ndim > 0 or isinstance(leaf, jax.core.Tracer) or _inexact(leaf)


def _inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _hashable(leaf: Any) -> Any:
    return leaf.item() if isinstance(leaf, jax.Array | np.ndarray) else leaf
