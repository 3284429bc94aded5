"""By how much importance weights move the moments of draws."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike


class Shift(NamedTuple):
    """The largest move of a moment.

    :ivar name: of the site's element whose moment moves most.
    :ivar value: by how much.
    :ivar error: the standard error of that.
    """

    name: str
    value: float
    error: float

    @property
    def bound(self) -> float:
        """The move with one standard error."""
        return abs(self.value) + self.error


class Shifts(NamedTuple):
    """What :func:`moment_shifts` returns.

    :ivar mean: the largest move of a mean, in standard deviations.
    :ivar log_sd: the largest move of a log standard deviation.
    """

    mean: Shift
    log_sd: Shift

    @property
    def bound(self) -> float:
        """The larger of both, each with its standard error."""
        return max(self.mean.bound, self.log_sd.bound)


def moment_shifts(draws: Mapping[str, ArrayLike], log_weights: ArrayLike) -> Shifts:
    r"""The largest moves of means and standard deviations under importance weights.

    Let z be the draws in units of their weighted mean and standard deviation, w the weights with
    mean 1, and m and v the plain mean and variance of z. A mean moves by :math:`-m`, a log standard
    deviation by :math:`-\frac12 \log v`. The standard errors are those of the delta method, the
    standard deviation over :math:`\sqrt n` of

    .. math::
        w z - (z - m) + \tfrac m2 \, w (z^2 - 1) \qquad \text{and} \qquad
        \tfrac12 w (z^2 - 1) - \tfrac12 ((z - m)^2 / v - 1),

    near zero where the weights are equal. The weights have to cover the target (``psis_khat``).

    Cost: O(n) per coordinate, on the host in float64.

    :param draws: dict from names to draws, ``(n, *shape)``.
    :param log_weights: log importance weights, ``(n,)``, up to a constant.
    :return: the coordinates whose moves are largest, their standard errors included; coordinates
        without spread are left out, and without any the moves are 0; ``nan`` if a weight is not
        finite.
    :raises ValueError: if numbers of draws and weights differ.

    >>> import numpy as np
    >>> z = np.random.default_rng(0).normal(size=10_000)
    >>> shifts = moment_shifts({"z": z}, 0.5 * z)  # the weights of N(0.5, 1)
    >>> shifts.mean.name, round(shifts.mean.value, 1), abs(round(shifts.log_sd.value, 1))
    ('z', 0.5, 0.0)
    """
    log_weights = np.asarray(log_weights, float)
    if not np.isfinite(log_weights).all():
        return Shifts(Shift("", np.nan, np.nan), Shift("", np.nan, np.nan))
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.mean()
    w, root = weights[:, None], len(weights) ** 0.5
    means, log_sds = [Shift("", 0.0, 0.0)], [Shift("", 0.0, 0.0)]
    for name, values in draws.items():
        x = np.asarray(values, float)
        if len(x) != len(weights):
            raise ValueError(f"{name}: expected {len(weights)} draws, got {len(x)}.")
        shape, x = x.shape[1:], x.reshape(len(x), -1)
        mean = (w * x).mean(0)
        variance = (w * (x - mean) ** 2).mean(0)
        spread = np.ptp(x, axis=0) > 0
        z = (x[:, spread] - mean[spread]) / np.sqrt(variance[spread])
        if not z.size:
            continue
        index = [*np.ndindex(*shape)]
        labels = [f"{name}{list(index[i])}" if shape else name for i in np.flatnonzero(spread)]
        m, v = z.mean(0), z.var(0)
        of_log_sd = 0.5 * w * (z**2 - 1)
        of_mean = w * z - (z - m) + m * of_log_sd
        by_mean = -m, of_mean.std(0) / root
        of_log_sd -= 0.5 * ((z - m) ** 2 / v - 1)
        by_log_sd = -0.5 * np.log(v), of_log_sd.std(0) / root
        for found, (value, error) in ((means, by_mean), (log_sds, by_log_sd)):
            worst = int(np.argmax(np.abs(value) + error))
            found.append(Shift(labels[worst], float(value[worst]), float(error[worst])))
    largest = (max(found, key=lambda shift: shift.bound) for found in (means, log_sds))
    return Shifts(*largest)
