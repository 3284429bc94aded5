"""Data-dependent initialisation, a pure function from a flow and data to a flow."""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .checks import as_numpy, check_float, check_integers, check_unmasked
from .compilation import is_traced, jit
from .dequantization import Dequantized
from .distribution import FlowDistribution
from .transform import FlowTransform

_Flow = TypeVar("_Flow", FlowDistribution, FlowTransform, Dequantized)


def initialize(flow: _Flow, batch: ArrayLike, context: Any = None) -> _Flow:
    r"""The flow with every :class:`~numpyro_flows.transforms.ActNorm` in it set from data.

    The data go through the flow once, towards the base. Each ``ActNorm`` they meet is set so that
    what it passes on has mean 0 and variance 1 in each channel over the batch; everything else,
    base distribution included, stays as it is. The result follows from the arguments alone: a
    second call with the same batch returns the same flow, and ``jax.jit(nf.initialize)`` works.

    ``nf.fit`` standardises the data before a new flow sees them: initialise from rows of mean 0 and
    scale 1, or call ``fit`` with ``standardize=False``.

    Source: Kingma & Dhariwal (2018), arXiv:1807.03039, section 3.1.

    :param flow: a ``FlowDistribution``, ``FlowTransform`` or ``Dequantized``.
    :param batch: rows of data, shape ``(n, *event_shape)`` with n at least 2; some hundred serve.
        Integers for a ``Dequantized``, which get uniform noise.
    :param context: shape ``(n, context_dim)`` or ``(context_dim,)``, for a conditional flow whose
        context is not bound; for one with an embedding, the pytree that its network reads.
    :return: a flow of the same structure.
    :raises ValueError: for fewer than 2 rows, a wrong shape, a missing or surplus context, and,
        outside of ``jit``, rows that are not finite or outside the support.
    :raises TypeError: for something else than a flow, or data that are not floating.

    >>> import jax.numpy as jnp, numpyro_flows as nf
    >>> t = nf.initialize(nf.transforms.ActNorm(1), jnp.array([[1.0], [3.0]]))
    >>> t.inv(jnp.array([[1.0], [3.0]]))
    Array([[-1.],
           [ 1.]], dtype=float32)
    """
    if isinstance(flow, Dequantized):
        check_unmasked("batch", batch)
        rows = jnp.asarray(batch if is_traced(batch) else as_numpy(batch))
        check_integers("batch", rows, flow.levels, flow.event_shape, flow.start)
        # One and the same uniform noise, so that the result follows from the arguments.
        noisy = rows + jax.random.uniform(jax.random.key(0), rows.shape)
        return eqx.tree_at(lambda model: model.flow, flow, initialize(flow.flow, noisy, context))
    if isinstance(flow, FlowDistribution):
        transform = initialize(flow.transform, batch, context)
        return flow.with_parts(flow.base_dist, transform)
    if not isinstance(flow, FlowTransform):
        raise TypeError(
            f"flow: expected a FlowDistribution or a FlowTransform, got {type(flow).__name__}."
        )
    rows = check_float("batch", batch)
    if rows.ndim == 0 or rows.shape[1:] != flow.out_shape:
        shape = ", ".join(("n", *map(str, flow.out_shape)))
        raise ValueError(f"batch: expected shape ({shape}), got {rows.shape}.")
    n = len(rows)
    if n < 2:
        raise ValueError(f"batch: expected at least 2 rows, which have a variance, got {n}.")
    context = jax.tree.map(jnp.asarray, context)
    seen = jax.eval_shape(lambda context: flow.read_context(context), context)
    if seen is not None and seen.shape[:-1] not in ((), (n,)):
        raise ValueError(
            f"context: expected {n} rows, one per row of the batch, or a single one, got "
            f"batch axes {seen.shape[:-1]}."
        )
    bound = flow.inverse_shape(flow.out_shape)
    bound = bound[: len(bound) - len(flow.event_shape)]
    if bound not in ((), (1,), (n,)):
        raise ValueError(
            f"batch: expected one row per bound context, got {n} rows for contexts of batch shape "
            f"{bound}."
        )
    transform, *checked = _initialized(flow, rows, context)
    if not is_traced(checked):  # under `jit` no values are known
        not_finite, outside = "hold NaN or infinite values", "lie outside the flow's support"
        whats = not_finite, not_finite, f"{outside} {flow.codomain}"
        for name, what, good in zip(("batch", "context", "batch"), whats, checked, strict=True):
            num_bad = int((~np.asarray(good)).sum())
            if num_bad:
                raise ValueError(
                    f"{name}: {num_bad} of {len(good)} rows {what}; drop or mend them."
                )
    return transform


@jit
def _initialized(
    flow: FlowTransform, rows: Array, context: Any
) -> tuple[FlowTransform, Array, Array, Array]:
    """The flow, and for each row: whether it is finite, its context is, and it is inside."""
    rows = rows.astype(jnp.result_type(float))
    context = jax.tree.map(
        lambda a: a.astype(rows.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, context
    )
    seen = flow.read_context(context)
    is_finite = _by_row(jnp.isfinite(rows))
    seen_is_finite = is_finite if seen is None else _by_row(jnp.isfinite(jnp.atleast_2d(seen)))
    transform, _ = flow.initialized(rows, context, False)
    return transform, is_finite, seen_is_finite, _by_row(flow.codomain(rows))


def _by_row(good: Array) -> Array:
    return good.reshape(len(good), -1).all(-1)
