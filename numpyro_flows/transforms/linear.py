"""Linear transforms: the diagonal scaling that ends NICE."""

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from ..checks import check_size
from ..transform import FlowTransform


class DiagonalScale(FlowTransform):
    r"""Diagonal scaling :math:`y_i = x_i e^{s_i}`, log-determinant :math:`\sum_i s_i`.

    What makes a volume-preserving NICE flow able to weigh coordinates. Starts as the identity.

    Source: Dinh, Krueger & Bengio (2015), arXiv:1410.8516, section 3.3.

    :param dim: number of coordinates; x and y have shape ``(*batch, dim)``.
    :raises ValueError: for ``dim`` below 1.

    >>> import jax.numpy as jnp
    >>> DiagonalScale(2).forward_and_log_det(jnp.ones(2))[1].shape
    ()
    """

    log_scale: Array
    dim: int = eqx.field(static=True)

    def __init__(self, dim: int):
        self.dim = check_size("dim", dim)
        self.log_scale = jnp.zeros(dim)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.dim,)

    def _log_det(self, value: Array) -> Array:
        return jnp.broadcast_to(self.log_scale.sum(), value.shape[:-1])

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return x * jnp.exp(self.log_scale), self._log_det(x)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return y * jnp.exp(-self.log_scale), -self._log_det(y)
