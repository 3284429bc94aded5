"""Sequences of frames, each drawn given those before it: a Markov chain as one transform."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import check_size
from ..transform import FlowTransform


class Markov(FlowTransform):
    r"""A transform of frames, repeated along time: :math:`x_t = T(z_t; h(x_{t-k}, ..., x_{t-1}))`.

    The Jacobian is block triangular, so the log-determinant is the sum of those of the frames. From
    data to base all frames are one batch of T, in one pass; the other direction is a scan of
    ``length`` steps. Before the first frame the past is 0, and a learned number is added to what
    the network makes of it, so that the start may differ from what follows.

    :param step: T, a conditional transform of one frame.
    :param network: h, a pytree of arrays that is called with the past, ``(*batch, order, *frame)``,
        latest last, and returns ``(*batch, step.context_dim)``; with covariates it is called with
        the pair of the past and ``(*batch, num_covariates)``.
    :param length: number of frames; events have shape ``(length, *frame)``.
    :param order: k, the number of frames that are seen.
    :param num_covariates: numbers beside each frame. The context holds them frame by frame: its
        width is ``length * num_covariates``.
    :raises TypeError: for sizes that are no integers, or a network that cannot be called.
    :raises ValueError: for sizes below 1, a step without a context, or a network that returns
        another width.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> network = nf.nn.Embedding(jax.random.key(0), jnp.zeros((2, 1)), 3, hidden=(8,))
    >>> step = nf.realnvp(jax.random.key(1), 1, context_dim=3, depth=1).transform
    >>> y, log_det = Markov(step, network, 5, 2).forward_and_log_det(jnp.ones((7, 5, 1)))
    >>> y.shape, log_det.shape
    ((7, 5, 1), (7,))
    """

    step: FlowTransform
    network: Callable[[Any], Array]
    start: Array
    length: int = eqx.field(static=True)
    order: int = eqx.field(static=True)
    num_covariates: int = eqx.field(static=True)

    def __init__(
        self,
        step: FlowTransform,
        network: Callable[[Any], Array],
        length: int,
        order: int = 1,
        num_covariates: int = 0,
    ):
        self.step, self.network = step, network
        self.length = check_size("length", length)
        self.order = check_size("order", order)
        self.num_covariates = check_size("num_covariates", num_covariates, minimum=0)
        width = step.context_dim
        if not width:
            raise ValueError(
                f"Markov: expected a conditional transform of a frame, got {step}. Build it with "
                "`context_dim=...`, the width of what the network returns."
            )
        if not callable(network):
            raise TypeError(f"network: expected something to call, got {type(network).__name__}.")
        self.start = jnp.zeros((order, width))
        past = jax.ShapeDtypeStruct((1, order, *step.out_shape), jnp.result_type(float))
        covariates = jax.ShapeDtypeStruct((1, num_covariates), past.dtype)
        made = jax.eval_shape(network, (past, covariates) if num_covariates else past)
        if made.shape != (1, width):
            raise ValueError(
                f"network: expected it to return the shape (*batch, {width}), the context of the "
                f"frame's transform, of a past of shape (*batch, {order}, *{step.out_shape}), got "
                f"{made.shape} of a batch of 1."
            )

    def _inside(self) -> str:
        return f"{self.step.outline}, order {self.order}"

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.length, *self.step.event_shape)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.length, *self.step.out_shape)

    @property
    def context_dim(self) -> int:
        return self.length * self.num_covariates

    @property
    def repeated_axes(self) -> int:
        return 1

    def _seen(self, past: Array, covariates: Array | None, start: Array) -> Array:
        """The context of frames, given their pasts."""
        made = self.network(past if covariates is None else (past, covariates))
        return made + start

    def _starts(self) -> Array:
        """What is added to the context of each frame, ``(length, width)``."""
        late = jnp.zeros((max(self.length - self.order, 0), self.step.context_dim))
        return jnp.concatenate([self.start, late])[: self.length]

    def _by_frame(self, context: Array | None) -> Array | None:
        if context is None:
            return None
        return context.reshape(*context.shape[:-1], self.length, self.num_covariates)

    def _contexts(self, y: Array, context: Array | None) -> Array:
        """What each frame is conditioned on, given all of them, ``(*batch, length, width)``."""
        frame = self.step.out_shape
        batch = y.shape[: y.ndim - 1 - len(frame)]
        before = jnp.zeros((*batch, self.order, *frame), y.dtype)
        padded = jnp.concatenate([before, y], axis=len(batch))
        windows = np.arange(self.length)[:, None] + np.arange(self.order)
        past = jnp.take(padded, windows, axis=len(batch))
        covariates = self._by_frame(context)
        if covariates is not None:
            covariates = jnp.broadcast_to(covariates, batch + covariates.shape[-2:])
        return self._seen(past, covariates, self._starts())

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        x, log_det = self.step.inverse_and_log_det(y, self._contexts(y, context))
        return x, log_det.sum(-1)

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        axis = x.ndim - len(self.event_shape)
        batch = x.shape[:axis]
        covariates = self._by_frame(context)
        if covariates is not None:
            covariates = jnp.broadcast_to(covariates, batch + covariates.shape[-2:])
            covariates = jnp.moveaxis(covariates, -2, 0)

        def step(past: Array, frame: Any) -> tuple[Array, Any]:
            z, beside, start = frame
            y, log_det = self.step.forward_and_log_det(z, self._seen(past, beside, start))
            y = y.astype(past.dtype)
            past = jnp.concatenate([past, jnp.expand_dims(y, axis)], axis=axis)
            return jax.lax.slice_in_dim(past, 1, None, axis=axis), (y, log_det)

        past = jnp.zeros((*batch, self.order, *self.step.out_shape), x.dtype)
        frames = jnp.moveaxis(x, axis, 0), covariates, self._starts()
        _, (y, log_det) = jax.lax.scan(step, past, frames)
        return jnp.moveaxis(y, 0, axis), log_det.sum(0)

    def initialized(
        self, value: Array, context: Array | None, forward: bool
    ) -> tuple[FlowTransform, Array]:
        if forward:
            return super().initialized(value, context, forward)
        seen = self._contexts(value, context)
        rows = value.reshape(-1, *self.step.out_shape)
        step, rows = self.step.initialized(rows, seen.reshape(len(rows), -1), forward)
        new = eqx.tree_at(lambda chain: chain.step, self, step)
        return new, rows.reshape(len(value), *self.event_shape)
