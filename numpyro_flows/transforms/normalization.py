"""Activation normalisation: a scale and a shift per channel, set from data by ``nf.initialize``."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from ..checks import check_size
from ..transform import FlowTransform


class ActNorm(FlowTransform):
    r"""Scale and shift per channel, :math:`y = x e^s + t`, set from data by ``nf.initialize``.

    A channel is an index of the event's last axis: a coordinate of a vector, a colour of an image
    of shape (H, W, C). Log-determinant :math:`H W \sum_c s_c`. Starts as the identity; after
    ``nf.initialize`` its output towards the base has mean 0 and variance 1 in each channel, and
    from then on both numbers train as any others.

    A channel that is constant in the data has no spread to normalise. Taking rounding error for
    it would blow later differences up a millionfold, so such a channel is shifted to 0 and keeps
    scale 1; constant means a spread below 16 units in the last place of its largest number.

    Source: Kingma & Dhariwal (2018), arXiv:1807.03039, section 3.1.

    :param shape: event shape, an int for vectors; x and y have shape ``(*batch, *shape)``.
    :raises ValueError: for an empty shape or sizes below 1.
    :raises TypeError: for sizes that are no integers.

    >>> import jax.numpy as jnp
    >>> ActNorm((4, 4, 3)).forward_and_log_det(jnp.ones((5, 4, 4, 3)))[1].shape
    (5,)
    """

    log_scale: Array
    shift: Array
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, shape: int | Sequence[int]):
        sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
        self.shape = tuple(check_size("shape", size) for size in sizes)
        if not self.shape:
            raise ValueError("shape: expected at least one axis, got (). Scalars are vectors of 1.")
        self.log_scale = jnp.zeros(self.shape[-1])
        self.shift = jnp.zeros(self.shape[-1])

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.shape

    def _log_det(self, value: Array) -> Array:
        log_det = math.prod(self.shape[:-1]) * self.log_scale.sum()
        return jnp.broadcast_to(log_det, value.shape[: value.ndim - len(self.shape)])

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return x * jnp.exp(self.log_scale) + self.shift, self._log_det(x)

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return (y - self.shift) * jnp.exp(-self.log_scale), -self._log_det(y)

    # The same in columns, where the channels are the first axis.
    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        scale, shift = self._as_columns(jnp.exp(self.log_scale)), self._as_columns(self.shift)
        return x * scale + shift, self._log_det(x.T)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        scale, shift = self._as_columns(jnp.exp(-self.log_scale)), self._as_columns(self.shift)
        return (y - shift) * scale, -self._log_det(y.T)

    def _as_columns(self, numbers: Array) -> Array:
        return numbers.reshape(-1, *(1,) * len(self.shape))

    def initialized(
        self, value: Array, context: Array | None, forward: bool
    ) -> tuple[FlowTransform, Array]:
        axes = tuple(range(value.ndim - 1))
        loc = value.mean(axes)
        centred = value - loc
        largest = jnp.abs(centred).max(axes)
        constant = largest <= 16 * jnp.finfo(value.dtype).eps * jnp.abs(value).max(axes)
        # Relative to the largest, so that no unit is too large or small to be squared.
        largest = jnp.where(constant, 1.0, largest)
        scale = jnp.where(constant, 1.0, largest * jnp.sqrt(((centred / largest) ** 2).mean(axes)))
        numbers = (-jnp.log(scale), -loc / scale) if forward else (jnp.log(scale), loc)
        dtype = self.log_scale.dtype
        set_ = eqx.tree_at(
            lambda t: (t.log_scale, t.shift), self, tuple(n.astype(dtype) for n in numbers)
        )
        return FlowTransform.initialized(set_, value, context, forward)
