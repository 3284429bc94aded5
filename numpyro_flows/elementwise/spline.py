r"""Monotone rational-quadratic splines, on an interval and on the circle.

Both maps share one spline of the unit interval onto itself, :func:`_spline`. Widths and heights of
its bins are shares of 1: a softmax, of which each bin keeps a minimum. With t the position in the
bin, s its slope (height / width) and :math:`a, b` the slopes at its two ends relative to s,

.. math:: f(t) = \frac{t^2 + a t (1 - t)}{1 + (a + b - 2) t (1 - t)}, \qquad
    f'(t) = \frac{b t^2 + 2 t (1 - t) + a (1 - t)^2}{(1 + (a + b - 2) t (1 - t))^2}

is the position in the height of the bin (Durkan et al., 2019, eq. 4-5). The inverse is a root of a
quadratic (their eq. 6-8) whose discriminant is a sum of two squares,

.. math:: D^2 + 4 f (1 - f), \qquad D = a (1 - f) - b f,

so it is neither negative nor the difference of large numbers, whatever the parameters.

How it is computed matters more than what: on CPU, compilers store what is expensive (here the
exponentials and the quotients) and repeat all else in each place that needs it. So all parameters
are exponentiated at once, the bin is found by comparisons with running sums, its numbers are
picked by selects (no gather), and the derivative is written by hand: it sums over bins, so its
transpose writes the gradient of all parameters in one pass, from few numbers kept per value.
"""

import math
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from ..checks import check_size
from .base import ElementwiseMap, check_bound

# Beyond this a softmax is saturated; it replaces a pass over all bins for their maximum.
_MAX_LOGIT = 40.0


class _Config(NamedTuple):
    num_bins: int
    minima: tuple[float, float]  # of a width and a height, as shares of the interval
    min_derivative: float
    periodic: bool
    inverse: bool


class _Bin(NamedTuple):
    """The bin of each value: what the spline and its derivative need of the parameters."""

    exps: Array  # of all parameters
    totals: list[Array]  # of the exponentials of widths, of heights
    number: Array  # which bin; a float, whose tangent is a float too
    chosen: list[Array]  # share of widths before the bin, of its width, the same of heights,
    # exponentials of its left and right slope


def _ends(config: _Config, index: Array) -> tuple[Array, Array]:
    """Which slope parameters belong to the ends of a bin; -1 and num_bins - 1 may be none."""
    if config.periodic:
        return index, jnp.where(index == config.num_bins - 1, 0.0, index + 1)
    return index - 1, index


def _find_bin(config: _Config, value: Array, params: Array) -> _Bin:
    n = config.num_bins
    exps = jnp.exp(jnp.clip(params, -_MAX_LOGIT, _MAX_LOGIT))
    totals = [reduce(add, [exps[first + i] for i in range(n)]) for first in (0, n)]
    own = int(config.inverse)  # the value lies between widths forward, between heights backward
    minimum = config.minima[own]
    share = (1 - n * minimum) / totals[own]
    before = jnp.zeros_like(value)
    index = jnp.zeros_like(value)
    for i in range(1, n):
        before = before + exps[own * n + i - 1]
        index = index + jnp.where(value >= i * minimum + share * before, 1.0, 0.0)
    chosen = []
    for first, total in zip((0, n), totals, strict=True):
        before, size = jnp.zeros_like(value), exps[first]
        for i in range(1, n):
            before = before + jnp.where(i <= index, exps[first + i - 1], 0.0)
            size = jnp.where(i == index, exps[first + i], size)
        chosen += [before / total, size / total]
    for end in _ends(config, index):
        slope = jnp.ones_like(value)
        for i in range(len(params) - 2 * n):
            slope = jnp.where(i == end, exps[2 * n + i], slope)
        chosen.append(slope)
    return _Bin(exps, totals, index, chosen)


def _into_unit(value: Array) -> Array:
    """Take off what rounding put beyond [0, 1], without an effect on derivatives."""
    return value + jax.lax.stop_gradient(jnp.clip(value, 0.0, 1.0) - value)


def _evaluate(config: _Config, index: Array, value: Array, *chosen: Array) -> tuple[Array, Array]:
    """The spline or its inverse within the chosen bin, and the log-derivative."""
    (x, w, y, h), slopes = chosen[:4], chosen[4:]
    min_width, min_height = config.minima
    x, y = (
        index * minimum + (1 - config.num_bins * minimum) * share
        for minimum, share in ((min_width, x), (min_height, y))
    )
    w, h = (
        minimum + (1 - config.num_bins * minimum) * share
        for minimum, share in ((min_width, w), (min_height, h))
    )
    # softplus(raw + c) = log(1 + e^c e^raw), with c such that raw = 0 gives the slope 1
    scale = math.expm1(1 - config.min_derivative)
    a, b = ((config.min_derivative + jnp.log1p(scale * exp)) * (w / h) for exp in slopes)
    if config.inverse:
        f = _into_unit((value - y) / h)
        d = a * (1 - f) - b * f
        e = jnp.abs(d) + jnp.sqrt(d * d + 4 * f * (1 - f))
        left = jnp.where(d > 0, 2 * f, e)
        t = left / (left + jnp.where(d > 0, e, 2 * (1 - f)))
    else:
        t = _into_unit((value - x) / w)
    both = t * (1 - t)
    denominator = 1 + (a + b - 2) * both
    numerator = b * t * t + 2 * both + a * (1 - t) ** 2
    log_slope = jnp.log(numerator / (denominator * denominator) * (h / w))
    if config.inverse:
        return x + w * t, -log_slope
    return y + h * ((t * t + a * both) / denominator), log_slope


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _spline(config: _Config, value: Array, params: Array) -> tuple[Array, Array]:
    """The spline of the unit interval, or its inverse: values in [0, 1], parameters in rows."""
    found = _find_bin(config, value, params)
    return _evaluate(config, found.number, value, *found.chosen)


@_spline.defjvp
def _spline_jvp(config: _Config, primals: Any, tangents: Any) -> tuple[Any, Any]:
    value, params = primals
    found = _find_bin(config, value, params)
    out, pull = jax.vjp(partial(_evaluate, config, found.number), value, *found.chosen)
    one, zero = jnp.ones_like(value), jnp.zeros_like(value)
    jacobian = pull((one, zero)), pull((zero, one))
    return out, _tangents(config, jacobian, found, *tangents)


# Checkpointed, so that a gradient keeps the bin's index and not a mask for each bin.
@partial(jax.checkpoint, static_argnums=(0,))
def _tangents(
    config: _Config, jacobian: Any, found: _Bin, value_dot: Array, params_dot: Array
) -> tuple[Array, ...]:
    """Tangents of the outputs, linear in those of the value and the parameters."""
    n, index, totals, shares = config.num_bins, found.number, found.totals, found.chosen
    bins = jnp.arange(n, dtype=index.dtype).reshape(n, *[1] * index.ndim)

    def pick(mask: Array, terms: Array) -> Array:
        return jnp.where(mask, terms, 0.0).sum(0)

    # A split, since its transpose is one concatenation, where that of slices adds padded arrays.
    parts = jax.lax.split(found.exps * params_dot, (n, n, len(params_dot) - 2 * n))
    chosen_dot = []
    for i, terms in enumerate(parts[:2]):
        mean = terms.sum(0) / totals[i]
        chosen_dot.append(pick(bins < index, terms) / totals[i] - shares[2 * i] * mean)
        chosen_dot.append(pick(bins == index, terms) / totals[i] - shares[2 * i + 1] * mean)
    for end in _ends(config, index):
        chosen_dot.append(pick(bins[: len(parts[2])] == end, parts[2]))
    dots = [value_dot, *chosen_dot]
    return tuple(reduce(add, map(jnp.multiply, row, dots)) for row in jacobian)


def _check(num_bins: int, min_width: float, min_height: float, min_derivative: float) -> None:
    check_size("num_bins", num_bins, minimum=2)
    for name, minimum in (("min_bin_width", min_width), ("min_bin_height", min_height)):
        if not 0 < num_bins * minimum < 1:
            raise ValueError(
                f"{name}: expected a positive share of the interval, below 1 / num_bins = "
                f"{1 / num_bins:.3g}, got {minimum}."
            )
    if not 0 < min_derivative < 1:
        raise ValueError(f"min_derivative: expected a number between 0 and 1, got {min_derivative}")


class RationalQuadraticSpline(ElementwiseMap):
    r"""Rational-quadratic spline on :math:`[-B, B]`, the identity outside.

    Monotone pieces :math:`(\alpha t^2 + \beta t + \gamma) / (\ldots)` between ``num_bins + 1``
    knots whose places and slopes are parameters: K widths, K heights, K - 1 inner slopes. The
    slope at both ends is 1, so the map is once continuously differentiable everywhere; but its
    density has kinks in its gradient at the knots, for which HMC pays with smaller steps
    (:class:`SinhArcsinh` and :class:`DeepSigmoid` have none).

    Slopes at knots lie between ``min_derivative`` and 41, bins never vanish, and the inverse is
    exact up to rounding: in float32 :math:`|x' - x| \le 2 \cdot 10^{-6} B / \min(1, dy/dx)`. With
    wild parameters :math:`dy/dx` can come down to about ``min_bin_height`` squared.

    Source: Durkan, Bekasov, Murray & Papamakarios (2019), arXiv:1906.04032, eq. 4-8.

    :param num_bins: number of bins K, at least 2; ``3 K - 1`` parameters.
    :param bound: half of the interval, B.
    :param min_bin_width: smallest width of a bin, as a share of the interval.
    :param min_bin_height: smallest height of a bin, as a share of the interval.
    :param min_derivative: smallest slope at a knot.
    :raises ValueError: for fewer than 2 bins, a bound that is not positive, or minima that leave
        no room.
    :raises TypeError: if the number of bins is no integer.

    >>> import jax.numpy as jnp
    >>> spline = RationalQuadraticSpline(num_bins=2)
    >>> raised = jnp.array([0.0, 0, 9, 0, 0])[:, None]  # widths, heights, slope
    >>> spline.forward_and_log_det(jnp.array([-5.0, 0.0, 5.0]), raised)[0].round()
    Array([-5.,  4.,  5.], dtype=float32)
    """

    num_bins: int = eqx.field(static=True)
    bound: float = eqx.field(static=True)
    min_bin_width: float = eqx.field(static=True)
    min_bin_height: float = eqx.field(static=True)
    min_derivative: float = eqx.field(static=True)

    def __init__(
        self,
        num_bins: int = 8,
        bound: float = 4.0,
        min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3,
        min_derivative: float = 1e-3,
    ):
        _check(num_bins, min_bin_width, min_bin_height, min_derivative)
        self.num_bins = num_bins
        self.bound = check_bound("bound", bound)
        self.min_bin_width = min_bin_width
        self.min_bin_height = min_bin_height
        self.min_derivative = min_derivative

    @property
    def num_params(self) -> int:
        return 3 * self.num_bins - 1

    def _apply(self, value: Array, params: Array, inverse: bool) -> tuple[Array, Array]:
        minima = (self.min_bin_width, self.min_bin_height)
        config = _Config(self.num_bins, minima, self.min_derivative, False, inverse)
        # Values outside are clamped first: what is not selected must not spoil gradients.
        unit = (jnp.clip(value, -self.bound, self.bound) + self.bound) / (2 * self.bound)
        out, log_det = _spline(config, unit, params)
        inside = jnp.abs(value) < self.bound
        return (
            jnp.where(inside, 2 * self.bound * out - self.bound, value),
            jnp.where(inside, log_det, 0.0),
        )

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        return self._apply(x, params, inverse=False)

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        return self._apply(y, params, inverse=True)


class CircularSpline(ElementwiseMap):
    r"""Rational-quadratic spline of the circle onto itself: :math:`y = S(x) + \phi`, an angle.

    S is a spline of :math:`[-\pi, \pi]` with the same slope at both ends, :math:`\phi` a rotation.
    Angles are taken modulo :math:`2 \pi` and returned in :math:`[-\pi, \pi)`; a density is
    continuous across :math:`\pm \pi`. It is a bijection of the circle, not of the real line: the
    base distribution must live on the circle too (uniform, say). ``nf.nsf`` with
    ``support=constraints.circular`` sees to it.

    Numerical limits as for :class:`RationalQuadraticSpline`.

    Source: Rezende et al. (2020), arXiv:2002.02428, section 2.1.2.

    :param num_bins: number of bins K, at least 2; ``3 K + 1`` parameters: widths, heights,
        slopes, rotation.
    :param min_bin_width: smallest width of a bin, as a share of the circle.
    :param min_bin_height: smallest height of a bin, as a share of the circle.
    :param min_derivative: smallest slope at a knot.
    :raises ValueError: for fewer than 2 bins or minima that leave no room.
    :raises TypeError: if the number of bins is no integer.

    >>> import jax.numpy as jnp
    >>> turned = jnp.zeros(25).at[24].set(1.0)
    >>> CircularSpline().forward_and_log_det(jnp.array(3.0), turned)[0].round()  # 4 - 2 pi
    Array(-2., dtype=float32)
    """

    num_bins: int = eqx.field(static=True)
    min_bin_width: float = eqx.field(static=True)
    min_bin_height: float = eqx.field(static=True)
    min_derivative: float = eqx.field(static=True)

    def __init__(
        self,
        num_bins: int = 8,
        min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3,
        min_derivative: float = 1e-3,
    ):
        _check(num_bins, min_bin_width, min_bin_height, min_derivative)
        self.num_bins = num_bins
        self.min_bin_width = min_bin_width
        self.min_bin_height = min_bin_height
        self.min_derivative = min_derivative

    @property
    def num_params(self) -> int:
        return 3 * self.num_bins + 1

    def _apply(
        self, turns: Array, params: Array, inverse: bool, rotation: Array | float
    ) -> tuple[Array, Array]:
        """The spline from angles to angles in turns, each between 0 and 1, then a rotation."""
        minima = (self.min_bin_width, self.min_bin_height)
        config = _Config(self.num_bins, minima, self.min_derivative, True, inverse)
        out, log_det = _spline(config, turns - jnp.floor(turns), params)
        out = out + rotation
        out = out - jnp.floor(out)
        out = jnp.where(out < 1, out, 0.0)  # 1 - 1e-9 has been rounded to 1
        return 2 * math.pi * out - math.pi, log_det

    def _split(self, params: Array) -> tuple[Array, Array]:
        params, rotation = jax.lax.split(params, (self.num_params - 1, 1))
        return params, rotation[0] / (2 * math.pi)

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        params, rotation = self._split(params)
        return self._apply(x / (2 * math.pi) + 0.5, params, False, rotation)

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        params, rotation = self._split(params)
        return self._apply(y / (2 * math.pi) + 0.5 - rotation, params, True, 0.0)
