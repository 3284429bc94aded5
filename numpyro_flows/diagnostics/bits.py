"""Bits per dimension: how well a model of integers compresses data."""

import math
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ..checks import as_numpy, check_integers, check_key, check_size, check_unmasked


@runtime_checkable
class DiscreteModel(Protocol):
    """A model of the integers from ``start`` on, as ``nf.dequantize`` makes it."""

    levels: int | tuple[int, ...]
    start: int | tuple[int, ...]

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    def condition(self, context: Any) -> "DiscreteModel": ...

    def log_prob_bound(self, key: Array, x: ArrayLike, *, num_samples: int = 1) -> Array: ...


def bits_per_dim(
    key: Array,
    model: DiscreteModel,
    x: ArrayLike,
    context: ArrayLike | None = None,
    *,
    num_samples: int = 1,
    batch_size: int = 256,
) -> np.ndarray:
    r"""Bits per dimension of each row, :math:`-\log P(x) / (D \log 2)`: an upper bound.

    :param key: ``jax.random.key`` for the noise.
    :param model: what ``nf.dequantize`` returns.
    :param x: integers, shape ``(n, *event_shape)``; D is the number of integers in a row.
    :param context: shape ``(n, context_dim)``, for a conditional model.
    :param num_samples: draws of the noise per row; more make the bound tighter.
    :param batch_size: rows per pass.
    :return: shape ``(n,)``; its mean is the usual figure.
    :raises TypeError: for data that are not integers, or a flow that was not dequantised.
    :raises ValueError: for wrong shapes or values outside of the range.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> key = jax.random.key(0)
    >>> flow = nf.realnvp(key, 3, depth=2, hidden=(4,))
    >>> bits_per_dim(key, nf.dequantize(flow, 4), jnp.zeros((5, 3), int)).shape
    (5,)
    """
    if not isinstance(model, DiscreteModel):
        raise TypeError(
            f"model: expected the result of `nf.dequantize`, got {type(model).__name__}. A density "
            "of real numbers has no bits: call `nf.dequantize(flow, levels)`."
        )
    check_unmasked("x", x)
    x = as_numpy(x)
    check_integers("x", x, model.levels, model.event_shape, model.start)
    check_size("batch_size", batch_size)
    if x.ndim != 1 + len(model.event_shape):
        raise ValueError(
            f"x: expected shape (n, *{model.event_shape}), one row per event, got {x.shape}."
        )
    check_key(key)
    if context is not None:
        check_unmasked("context", context)
        context = np.asarray(context)
    bounds = []
    for i, start in enumerate(range(0, len(x), batch_size)):
        rows = slice(start, start + batch_size)
        seen = None if context is None else context[rows]
        bounds.append(
            _bounds(model, jax.random.fold_in(key, i), x[rows], seen, num_samples=num_samples)
        )
    return -np.concatenate(bounds) / (math.prod(model.event_shape) * math.log(2))


@eqx.filter_jit
def _bounds(
    model: DiscreteModel, key: Array, x: ArrayLike, context: ArrayLike | None, *, num_samples: int
) -> Array:
    model = model if context is None else model.condition(context)
    return model.log_prob_bound(key, x, num_samples=num_samples)
