"""Forecasts: draws of the frames that follow a past, from a flow of sequences."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .checks import check_float, check_key, check_size
from .compilation import jit
from .distribution import FlowDistribution
from .transforms import Markov


def forecast(
    key: Array,
    flow: FlowDistribution,
    past: ArrayLike,
    steps: int,
    num_samples: int = 1,
    *,
    covariates: ArrayLike | None = None,
) -> Array:
    """Draws of the next frames, given a past: exact ones of the flow's conditional distribution.

    The last ``order`` frames of the past are brought to base space, fresh noise is put behind them,
    and all go back: windows of ``flow``'s length, one after the other until there are enough steps.
    Each window costs ``length`` steps of the frame's transform, one program for all of them.

    :param key: ``jax.random.key``.
    :param flow: what ``nf.markov`` returned, fitted or not, without bound covariates.
    :param past: frames, shape ``(*batch, n, *frame)``, n at least ``order``, latest last.
    :param steps: number of frames to draw.
    :param num_samples: number of futures.
    :param covariates: of the last ``order`` frames and those to come, shape ``(*batch, order +
        steps, num_covariates)``, for a flow that has any.
    :return: shape ``(num_samples, *batch, steps, *frame)``.
    :raises TypeError: for a flow that is not of ``nf.markov``, or a past that is not floating.
    :raises ValueError: for too short a past, another shape, values outside the flow's support, or
        covariates that are missing, surplus or of another shape.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> network = nf.nn.Embedding(jax.random.key(0), jnp.zeros((1, 1)), 4, hidden=(8,))
    >>> flow = nf.markov(nf.realnvp(jax.random.key(1), 1, context_dim=4, depth=1), network, 8)
    >>> forecast(jax.random.key(2), flow, jnp.zeros((3, 1)), steps=20, num_samples=5).shape
    (5, 20, 1)
    """
    check_key(key)
    chain = _chain(flow)
    order, frame = chain.order, flow.event_shape[1:]
    check_size("steps", steps)
    check_size("num_samples", num_samples)
    past = check_float("past", past)
    axis = past.ndim - len(flow.event_shape)
    if axis < 0 or past.shape[axis + 1 :] != frame or past.shape[axis] < order:
        raise ValueError(
            f"past: expected shape (*batch, n, {', '.join(map(str, frame))}) with at least {order} "
            f"frames, which the flow sees, got {past.shape}."
        )
    batch = past.shape[:axis]
    seen = _checked(covariates, chain, batch, steps)
    window = jax.lax.slice_in_dim(past, past.shape[axis] - order, None, axis=axis)
    inside = flow.support(_whole(window, chain.length, axis))
    if not isinstance(inside, jax.core.Tracer) and not inside.all():
        raise ValueError(f"past: expected values in the flow's support {flow.support}.")
    window = jnp.broadcast_to(window, (num_samples, *window.shape))
    pieces: list[Array] = []
    made = 0
    while made < steps:
        key, noise_key = jax.random.split(key)
        at = None if seen is None else seen[..., made : made + chain.length, :]
        piece = _extended(flow, noise_key, window, at, order=order)
        pieces.append(piece)
        # Of a window shorter than twice the order, some frames of the past are still seen.
        window = jnp.concatenate([window, piece], axis + 1)
        window = jax.lax.slice_in_dim(window, chain.length - order, None, axis=axis + 1)
        made += chain.length - order
    return jax.lax.slice_in_dim(jnp.concatenate(pieces, axis + 1), 0, steps, axis=axis + 1)


def _chain(flow: Any) -> Markov:
    """The transform of sequences in a flow."""

    def is_chain(node: Any) -> bool:
        return isinstance(node, Markov)

    found = [node for node in jax.tree.leaves(flow, is_leaf=is_chain) if is_chain(node)]
    if not isinstance(flow, FlowDistribution) or len(found) != 1:
        raise TypeError(f"flow: expected one that `nf.markov` returned, got {flow}.")
    return found[0]


def _checked(
    covariates: ArrayLike | None, chain: Markov, batch: Sequence[int], steps: int
) -> Array | None:
    """Covariates for whole windows: the last ones are repeated behind the end."""
    num = chain.num_covariates
    if (covariates is None) == bool(num):
        expected = f"{num} for each frame" if num else "none, as the flow takes none"
        got = None if covariates is None else f"shape {jnp.shape(covariates)}"
        raise ValueError(f"covariates: expected {expected}, got {got}.")
    if covariates is None:
        return None
    array = check_float("covariates", covariates)
    shape = (chain.order + steps, num)
    if array.shape[-2:] != shape:
        raise ValueError(
            f"covariates: expected shape (*batch, order + steps = {shape[0]}, {num}), got "
            f"{array.shape}."
        )
    last = jnp.repeat(array[..., -1:, :], chain.length, axis=-2)
    array = jnp.concatenate([array, last], axis=-2)
    return jnp.broadcast_to(array, (*batch, *array.shape[-2:]))


def _whole(window: Array, length: int, axis: int) -> Array:
    """A past with its last frame repeated up to ``length``; what follows it is not looked at."""
    last = jax.lax.slice_in_dim(window, window.shape[axis] - 1, None, axis=axis)
    behind = jnp.repeat(last, length - window.shape[axis], axis=axis)
    return jnp.concatenate([window, behind], axis=axis)


@jit(static_argnames="order")
def _extended(
    flow: FlowDistribution, key: Array, window: Array, covariates: Array | None, *, order: int
) -> Array:
    """The frames behind a window of ``order`` frames, ``length - order`` of them."""
    if covariates is not None:
        flow = flow.condition(covariates)
    axis = window.ndim - len(flow.event_shape)
    length = flow.event_shape[0]
    z, _ = flow.transform.inverse_and_log_det(_whole(window, length, axis))
    fresh = flow.base_dist.sample(key, window.shape[: axis - len(flow.batch_shape)])
    is_past = jnp.arange(length) < order
    is_past = is_past.reshape(length, *[1] * (len(flow.base_dist.event_shape) - 1))
    x, _ = flow.transform.forward_and_log_det(jnp.where(is_past, z, fresh))
    return jax.lax.slice_in_dim(x, order, None, axis=axis)
