"""The deep sigmoidal map: the logit of a mixture of logistic distribution functions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import check_size
from ..solve import monotone_root
from .base import ElementwiseMap, bounded, check_bound

# Far out, where they keep exponents of absurd parameters from overflowing and nothing else.
_WEIGHT_BOUND = 20.0
_BIAS_BOUND = 100.0

Units = tuple[Array, Array, Array]  # log-weights, log-slopes and biases, (num_units, *shape) each


class DeepSigmoid(ElementwiseMap):
    r"""Deep sigmoidal map :math:`y = \operatorname{logit} \sum_k w_k \sigma(a_k x + b_k)`.

    Positive weights w that sum to 1 and positive slopes a: with a logistic base, a mixture of
    logistic distributions, and universal as the number of units grows. Infinitely differentiable,
    so its density suits HMC, and asymptotically linear: both tails have the smallest slope of all
    units. ``num_layers`` of it are composed.

    Everything is computed in logarithms, so values to :math:`10^4` and beyond keep their relative
    precision. The inverse is numerical, by :func:`~numpyro_flows.solve.monotone_root` between the
    smallest and the largest root of the single units, with implicit gradients; its error is that
    of rounding y, :math:`10^{-6} (1 + |y|) / (dy/dx)` in float32. Between units far apart
    :math:`dy/dx` is about :math:`e^{-g/2}`, with g the gap between their :math:`a_k x + b_k`.
    Raw weights are bounded by 20 and biases by 100, smoothly.

    Source: Huang, Krueger, Lacoste & Courville (2018), arXiv:1804.00779, eq. 8; the mixture of
    logistics of Ho et al. (2019), arXiv:1902.00275, section 3.2, is the case of one layer.

    :param num_units: number of units in a layer; ``3 num_units`` parameters each.
    :param num_layers: number of layers.
    :param log_slope_bound: bound of :math:`\log a`, as in :class:`Affine`.
    :raises ValueError: for sizes below 1 or a bound that is not positive.
    :raises TypeError: for sizes that are no integers.

    Cost: num_units sigmoids per layer forward, about 6 times as much backward.

    >>> import jax.numpy as jnp
    >>> deep = DeepSigmoid(num_units=2)
    >>> params = jnp.array([0.0, 0, 0, 0, -2, 3])  # weights, slopes and biases before their gains
    >>> y, _ = deep.forward_and_log_det(jnp.array(2.0), params)
    >>> deep.inverse_and_log_det(y, params)[0].round(4)
    Array(2., dtype=float32)
    """

    num_units: int = eqx.field(static=True)
    num_layers: int = eqx.field(static=True)
    log_slope_bound: float = eqx.field(static=True)

    def __init__(self, num_units: int = 8, num_layers: int = 1, log_slope_bound: float = 2.0):
        self.num_units = check_size("num_units", num_units)
        self.num_layers = check_size("num_layers", num_layers)
        self.log_slope_bound = check_bound("log_slope_bound", log_slope_bound)

    @property
    def num_params(self) -> int:
        return 3 * self.num_units * self.num_layers

    def _layers(self, params: Array) -> list[Units]:
        shape = params.shape[1:]
        params = params.reshape(self.num_layers, 3, self.num_units, *shape)
        gains = _gains(self.num_units).reshape(3, self.num_units, *[1] * len(shape))
        params = params * gains.astype(params.dtype)
        return [
            (
                jax.nn.log_softmax(bounded(weight, _WEIGHT_BOUND), axis=0),
                bounded(slope, self.log_slope_bound),
                bounded(bias, _BIAS_BOUND),
            )
            for weight, slope, bias in params
        ]

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        log_det = jnp.zeros_like(x)
        for units in self._layers(params):
            log_det = log_det + _log_slope(x, units)
            x = _logit_mixture(x, units)
        return x, log_det

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        log_det = jnp.zeros_like(y)
        for units in reversed(self._layers(params)):
            _, log_slope, bias = units
            # Where every unit is below y so is the mixture, and likewise above.
            roots = jax.lax.stop_gradient((y - bias) * jnp.exp(-log_slope))
            y = monotone_root(_logit_mixture, y, units, roots.min(0), roots.max(0))
            log_det = log_det - _log_slope(y, units)
        return y, log_det


def _gains(num_units: int) -> np.ndarray:
    """Fixed factors of the raw weights, slopes and biases, from 1/4 to 4, shape ``(3, num_units)``.

    Zero parameters make all units equal, which the identity needs; but equal units get equal
    gradients and would never part. Gains that differ from unit to unit part them, and gains that
    differ between the three parameters of a unit let them part in more than one direction: with
    the same gain for all three, training often stopped with half of the modes merged.
    """
    # The Kronecker sequence whose three coordinates cover the cube evenly (Roberts, 2018): its
    # generator is the root of g^4 = g + 1.
    steps = 1.2207440846057596 ** -np.arange(1.0, 4.0)
    return 4 ** (2 * ((0.5 + np.outer(steps, np.arange(1, num_units + 1))) % 1) - 1)


def _log_sigmoids(x: Array, units: Units) -> tuple[Array, Array]:
    """Logarithms of the weighted sigmoids and of the weighted 1 - sigmoids."""
    log_weight, log_slope, bias = units
    z = jnp.exp(log_slope) * x + bias
    return log_weight + jax.nn.log_sigmoid(z), log_weight + jax.nn.log_sigmoid(-z)


def _logit_mixture(x: Array, units: Units) -> Array:
    below, above = _log_sigmoids(x, units)
    return jax.nn.logsumexp(below, axis=0) - jax.nn.logsumexp(above, axis=0)


def _log_slope(x: Array, units: Units) -> Array:
    r"""log dy/dx, from :math:`dy/dx = d \log P/dx - d \log (1 - P)/dx`.

    Both terms are averages over units, so far out nothing large is subtracted.
    """
    log_weight, log_slope, _ = units
    below, above = _log_sigmoids(x, units)
    terms = (
        jax.nn.log_softmax(below, axis=0) + (above - log_weight),
        jax.nn.log_softmax(above, axis=0) + (below - log_weight),
    )
    return jax.nn.logsumexp(jnp.concatenate([log_slope + term for term in terms]), axis=0)
