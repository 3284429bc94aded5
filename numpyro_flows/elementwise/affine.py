"""The affine maps: shift, and shift with scale."""

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from .base import ElementwiseMap, bounded, check_bound


class Shift(ElementwiseMap):
    r"""Shift :math:`y = x + t`, volume preserving: its log-determinant is exactly 0.

    Source: Dinh, Krueger & Bengio (2015), arXiv:1410.8516, section 3.2.

    >>> import jax.numpy as jnp
    >>> Shift().forward_and_log_det(jnp.array([1.0]), jnp.array([[2.0]]))
    (Array([3.], dtype=float32), Array([0.], dtype=float32))
    """

    @property
    def num_params(self) -> int:
        return 1

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        y = x + params[0]
        return y, jnp.zeros_like(y)

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        x = y - params[0]
        return x, jnp.zeros_like(x)


class Affine(ElementwiseMap):
    r"""Affine map :math:`y = x e^s + t` with a bounded log-scale :math:`s = c \tanh(h / c)`.

    The bound is smooth, so gradients never vanish abruptly, and it is what keeps deep float32
    flows invertible: with L layers the stretching of one coordinate stays below
    :math:`e^{cL}`. The price is paid far outside the data, where a bounded scale cannot follow a
    density whose spread grows without limit.

    Source: Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803, eq. 4; the bound is ours.

    :param log_scale_bound: the bound c, positive.
    :raises ValueError: if the bound is not positive.

    >>> import jax.numpy as jnp
    >>> Affine(1.0).forward_and_log_det(jnp.array([1.0]), jnp.array([[2.0], [0.0]]))
    (Array([3.], dtype=float32), Array([0.], dtype=float32))
    """

    log_scale_bound: float = eqx.field(static=True)

    def __init__(self, log_scale_bound: float = 1.0):
        self.log_scale_bound = check_bound(
            "log_scale_bound", log_scale_bound, "A volume-preserving layer is `Shift`."
        )

    @property
    def num_params(self) -> int:
        return 2

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        log_scale = bounded(params[1], self.log_scale_bound)
        return x * jnp.exp(log_scale) + params[0], log_scale

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        log_scale = bounded(params[1], self.log_scale_bound)
        return (y - params[0]) * jnp.exp(-log_scale), -log_scale
