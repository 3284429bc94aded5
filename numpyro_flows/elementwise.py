r"""Elementwise maps: scalar bijections whose parameters come from a conditioner.

A map is data, not a layer: ``Coupling`` and the autoregressive structures take any of them, so
NICE is coupling x :class:`Shift` and RealNVP is coupling x :class:`Affine`. A new map needs
``num_params`` and the two methods of :class:`ElementwiseMap`, nothing else.

Parameters have shape ``(num_params, *shape)`` for values of any ``shape``, so each parameter is one
contiguous slice of the conditioner's output. **All-zero parameters are the identity map.**
"""

import abc

import equinox as eqx
import jax.numpy as jnp
from jax import Array


class ElementwiseMap(eqx.Module):
    """A strictly increasing scalar map with parameters; see the module's text for shapes."""

    @property
    @abc.abstractmethod
    def num_params(self) -> int:
        """Parameters per coordinate."""

    @abc.abstractmethod
    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        """``x`` of shape ``(*shape)`` to ``(y, log dy/dx)`` of the same shape."""

    @abc.abstractmethod
    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        """``y`` of shape ``(*shape)`` to ``(x, log dx/dy)`` of the same shape."""


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
        if not log_scale_bound > 0:
            raise ValueError(
                f"log_scale_bound: expected a positive number, got {log_scale_bound}. "
                "A volume-preserving layer is `Shift`."
            )
        self.log_scale_bound = float(log_scale_bound)

    @property
    def num_params(self) -> int:
        return 2

    def _log_scale(self, params: Array) -> Array:
        return self.log_scale_bound * jnp.tanh(params[1] / self.log_scale_bound)

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        log_scale = self._log_scale(params)
        return x * jnp.exp(log_scale) + params[0], log_scale

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        log_scale = self._log_scale(params)
        return (y - params[0]) * jnp.exp(-log_scale), -log_scale
