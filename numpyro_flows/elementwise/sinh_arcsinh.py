"""The sinh-arcsinh map: skewness and tail weight, infinitely smooth."""

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from .base import ElementwiseMap, bounded, check_bound


class SinhArcsinh(ElementwiseMap):
    r"""Sinh-arcsinh map :math:`y = t + e^s \sinh((\operatorname{arcsinh} x + \epsilon) e^d)`.

    :math:`\epsilon` skews (positive: to the right), d weighs both tails: y grows like
    :math:`|x|^{e^d}`, so tails are those of a power of a normal variable, heavier than normal for
    d > 0 and lighter for d < 0. Infinitely differentiable and strictly increasing, with an inverse
    of the same form: for HMC, where the density of a spline has kinks in its gradient. For the
    power-law tails of a Student distribution see :class:`HeavyTail`.

    All but the shift are bounded as in :class:`Affine`, which keeps the inverse accurate: in
    float32 to :math:`10^{-5} (1 + |x|)` for the default bounds, shifts of some units and
    :math:`|x| \le 10^4`. Beyond :math:`|y| = 10^{19}` float32 overflows.

    Source: Jones & Pewsey (2009), Biometrika 96(4), 761-780; here :math:`e^d = 1 / \delta`.

    :param log_scale_bound: bound of s.
    :param skewness_bound: bound of :math:`\epsilon`.
    :param tail_bound: bound of d; the default lets y grow between :math:`|x|^{1/2}` and
        :math:`|x|^2`.
    :raises ValueError: for a bound that is not positive.

    Parameters: t, s, :math:`\epsilon`, d, the last three before their bounds.

    >>> import jax.numpy as jnp
    >>> skewed = jnp.array([0.0, 0.0, 1.0, 0.0])[:, None]
    >>> SinhArcsinh().forward_and_log_det(jnp.array([-2.0, 0.0, 2.0]), skewed)[0].round()
    Array([-1.,  1.,  5.], dtype=float32)
    """

    log_scale_bound: float = eqx.field(static=True)
    skewness_bound: float = eqx.field(static=True)
    tail_bound: float = eqx.field(static=True)

    def __init__(
        self,
        log_scale_bound: float = 1.0,
        skewness_bound: float = 2.0,
        tail_bound: float = 0.7,
    ):
        self.log_scale_bound = check_bound("log_scale_bound", log_scale_bound)
        self.skewness_bound = check_bound("skewness_bound", skewness_bound)
        self.tail_bound = check_bound("tail_bound", tail_bound)

    @property
    def num_params(self) -> int:
        return 4

    def _params(self, params: Array) -> tuple[Array, Array, Array, Array]:
        bounds = (self.log_scale_bound, self.skewness_bound, self.tail_bound)
        log_scale, skewness, tail = map(bounded, params[1:], bounds)
        return params[0], log_scale, skewness, tail

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        shift, log_scale, skewness, tail = self._params(params)
        z = jnp.sinh((jnp.arcsinh(x) + skewness) * jnp.exp(tail))
        return shift + jnp.exp(log_scale) * z, log_scale + tail + _log_ratio(z, x)

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        shift, log_scale, skewness, tail = self._params(params)
        z = (y - shift) * jnp.exp(-log_scale)
        x = jnp.sinh(jnp.arcsinh(z) * jnp.exp(-tail) - skewness)
        return x, -log_scale - tail - _log_ratio(z, x)


def _log_ratio(z: Array, x: Array) -> Array:
    """log(cosh(arcsinh z) / cosh(arcsinh x))."""
    return 0.5 * (jnp.log1p(z * z) - jnp.log1p(x * x))
