"""The radial layer: contraction or expansion around a point, with an inverse in closed form."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..nn import Parameters, above_minus_one
from ..transform import ColumnTransform


class Radial(ColumnTransform):
    r"""Radial layer: :math:`y = x + \frac{\beta}{\alpha + r} (x - x_0)`, :math:`r = |x - x_0|`.

    .. math:: \log |\det| = (d - 1) \log\left(1 + \frac{\beta}{\alpha + r}\right)
              + \log\left(1 + \frac{\alpha \beta}{(\alpha + r)^2}\right)

    :math:`\alpha > 0` and :math:`\beta > -\alpha` make it invertible; :math:`\beta = 0` at the
    start is the identity. The distance of the inverse solves a quadratic equation,
    :math:`r^2 + r (\alpha + \beta - \rho) - \alpha \rho = 0` with :math:`\rho = |y - x_0|`, taken
    in the form that does not cancel. With a context, :math:`x_0, \alpha, \beta` depend on it.

    Both directions cost O(dim). Volumes shrink by at most 100 per dimension.

    Source: Rezende & Mohamed (2015), arXiv:1505.05770, eq. 14 and appendix A.2.

    :param key: ``jax.random.key`` for the centre.
    :param dim: number of coordinates; x and y have shape ``(*batch, dim)``.
    :param context_dim: width of the context, 0 for none.
    :param hidden: widths of the network that reads the context.
    :raises ValueError: for sizes below 1.

    >>> import jax, jax.numpy as jnp
    >>> Radial(jax.random.key(0), 2)(jnp.ones(2))
    Array([1., 1.], dtype=float32)
    """

    params: Parameters

    def __init__(
        self, key: Array, dim: int, *, context_dim: int = 0, hidden: Sequence[int] = (64, 64)
    ):
        self._set_sizes(dim, context_dim)
        first, second = jax.random.split(key)
        value = jnp.concatenate([jax.random.normal(first, (dim,)), jnp.zeros(2)])
        self.params = Parameters(second, value, context_size=context_dim, hidden=hidden)

    def _parts(self, context: Array | None) -> tuple[Array, Array, Array]:
        params = self.params(context)
        centre, (a, b) = params[: self.dim], params[self.dim :]
        # alpha = 1 at zero, and beta in units of alpha.
        return centre, 1e-3 + jax.nn.softplus(a + np.log(np.expm1(0.999))), above_minus_one(b)

    def _log_det(self, alpha: Array, strength: Array, r: Array) -> Array:
        share = alpha / (alpha + r)
        return (self.dim - 1) * jnp.log1p(strength * share) + jnp.log1p(strength * share**2)

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        centre, alpha, strength = self._parts(context)
        away = x - centre
        r = _length(away)
        y = centre + away * (1 + strength * alpha / (alpha + r))
        return y, self._log_det(alpha, strength, r)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        centre, alpha, strength = self._parts(context)
        away = y - centre
        rho = _length(away)
        b = alpha * (1 + strength) - rho
        root = jnp.sqrt(b**2 + 4 * alpha * rho)
        r = jnp.where(b > 0, 2 * alpha * rho / (jnp.abs(b) + root), 0.5 * (root - b))
        x = centre + away / (1 + strength * alpha / (alpha + r))
        return x, -self._log_det(alpha, strength, r)


def _length(v: Array) -> Array:
    """Euclidean length of columns, with gradient 0 rather than nan at 0."""
    square = (v * v).sum(0)
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
