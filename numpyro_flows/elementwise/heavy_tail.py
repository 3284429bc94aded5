"""The heavy-tail map: power-law tails from a normal base, or lighter ones."""

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from .base import ElementwiseMap, bounded, check_bound

# Largest exponent, with room in float32 for what is computed from its exponential.
_MAX_EXPONENT = 80.0


class HeavyTail(ElementwiseMap):
    r"""Tails of a Student distribution from those of a normal one: for each side, with its own
    :math:`\lambda`,

    .. math:: y = x \sqrt{\frac{e^{\lambda x^2} - 1}{\lambda x^2}} \quad (\lambda > 0), \qquad
        x = y \sqrt{\frac{\log(1 + \lambda y^2)}{\lambda y^2}} .

    For x normal, :math:`P(|Y| > y)` falls like the power :math:`y^{-1/\lambda}`, up to the square
    root of a logarithm: :math:`1 / \lambda` are the degrees of freedom, and the map is close to
    the one that makes x a Student variable, for which Wallace (1959) devised its inverse. It is
    chosen before Tukey's :math:`x e^{h x^2 / 2}` (Goerg, 2015), which has the same tails, since
    its inverse has a closed form; and before the tail transform of Hickling & Prangle (2024),
    since :math:`\lambda = 0` is the identity.

    For :math:`\lambda < 0` the map is the inverse of that for :math:`-\lambda`, with tails lighter
    than normal. In :math:`\lambda` it is once continuously differentiable at 0, where its
    derivative is :math:`x^3 / 4`, and analytic elsewhere; so it can be learned from the identity
    either way. In x it is twice continuously differentiable.

    It belongs at the data's end of a flow, whose other layers keep the normal tails of the base
    (Jaini et al., 2020, arXiv:1907.04481)::

        nf.transforms.Chain([flow.transform, nf.transforms.Elementwise(key, dim, HeavyTail())])

    Beyond :math:`|x| = \sqrt{80 / c}`, 8.9 by default and 18 standard deviations at c = 1/4, the
    map goes on linearly, so that nothing overflows in float32: there y is :math:`10^{17}`. The
    inverse is accurate to :math:`2 \cdot 10^{-5} (1 + |x|)` in float32, for :math:`|x| \le 10^4`.

    Source: Wallace (1959), Annals of Mathematical Statistics 30(4), 1121-1130; Goerg (2015),
    arXiv:1010.2265; Hickling & Prangle (2024), arXiv:2406.16971.

    :param bound: the bound c of :math:`|\lambda|`, as in :class:`Affine`; by default 1, the tails
        of a Cauchy distribution.
    :raises ValueError: if the bound is not positive.

    Parameters: :math:`\lambda` of the right side and of the left, before the bound.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([-3.0, 1.0, 3.0])
    >>> HeavyTail().forward_and_log_det(x, jnp.array([[0.5], [0.0]]))[0].round()
    Array([-3.,  1., 12.], dtype=float32)
    """

    bound: float = eqx.field(static=True)

    def __init__(self, bound: float = 1.0):
        self.bound = check_bound("bound", bound)

    @property
    def num_params(self) -> int:
        return 2

    def _bend(self, value: Array, weight: Array) -> tuple[Array, Array]:
        """The map for weight lambda; that for -lambda is its inverse."""
        heavy = weight >= 0
        weight = jnp.where(heavy, weight, -weight)  # |weight|, with a derivative at 0
        end = (_MAX_EXPONENT / self.bound) ** 0.5
        light_end = end * jnp.exp(0.5 * _log_mean_exp(weight * end * end))
        end = jnp.where(heavy, end, light_end)
        inner = jnp.clip(value, -end, end)
        square = weight * inner * inner
        exponent = jnp.where(heavy, square, jnp.log1p(square))  # lambda x^2
        half = 0.5 * _log_mean_exp(exponent)
        log_ratio = jnp.where(heavy, half, -half)
        log_slope = jnp.where(heavy, exponent - half, half - exponent)
        # The second term is the linear part, exactly 0 further in.
        return inner * jnp.exp(log_ratio) + jnp.exp(log_slope) * (value - inner), log_slope

    def _weight(self, value: Array, params: Array) -> Array:
        return bounded(jnp.where(value >= 0, params[0], params[1]), self.bound)

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        return self._bend(x, self._weight(x, params))

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        return self._bend(y, -self._weight(y, params))


def _log_mean_exp(u: Array) -> Array:
    r"""log((e^u - 1) / u) for u >= 0: the logarithm of the mean of e^s over s in [0, u]."""
    small = u < 0.1
    safe = jnp.where(small, 1.0, u)
    u2 = u * u
    series = 0.5 * u + u2 * (1 / 24 - u2 * (1 / 2880 - u2 / 181440))
    # The formula's derivative is a difference of 1/u and nearly the same, hence the series.
    return jnp.where(small, series, safe + jnp.log(-jnp.expm1(-safe) / safe))
