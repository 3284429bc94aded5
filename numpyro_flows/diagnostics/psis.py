"""Diagnostics of importance weights: Pareto smoothing, effective sample size, log evidence."""

from typing import Final

import numpy as np
from jax.typing import ArrayLike
from scipy.special import logsumexp, softmax

#: Importance ESS from which weights are nearly equal, and their tail is noise.
NEARLY_EQUAL: Final = 0.95
#: Number of weights from which a tail is fitted.
SHORTEST_TAIL: Final = 5


def psis(log_weights: ArrayLike) -> tuple[np.ndarray, float]:
    r"""Pareto-smoothed log importance weights and their Pareto shape :math:`\hat k`.

    The largest weights are replaced by quantiles of a generalised Pareto distribution fitted to
    them.

    :param log_weights: log importance weights, shape ``(num_samples,)``, up to a constant.
    :return: the smoothed weights, normalised, same shape, and :math:`\hat k`: both ``nan`` where a
        weight is not finite; ``-inf`` where the weights are nearly equal and tied, so that there is
        no tail to fit, and ``inf`` where there is one that is too short.

    Source: Vehtari et al. (2024), arXiv:1507.02646. Written here, since versions of ArviZ disagree
    on the sign of the weights and on tails that cannot be fitted.

    >>> import numpy as np
    >>> smoothed, khat = psis(np.random.default_rng(0).normal(0, 0.1, 1000))
    >>> bool(np.isclose(np.exp(smoothed).sum(), 1)), khat < 0.7
    (True, True)
    """
    log_weights = np.asarray(log_weights, dtype=float)
    if not np.isfinite(log_weights).all():
        return np.full_like(log_weights, np.nan), float("nan")
    x = log_weights - log_weights.max()
    order = np.argsort(x)
    size = int(np.ceil(min(len(x) / 5, 3 * len(x) ** 0.5)))
    cutoff = max(x[order[max(len(x) - size - 1, 0)]], np.log(np.finfo(float).tiny))
    tail = order[x[order] > cutoff]
    khat = np.inf
    if len(tail) >= SHORTEST_TAIL:
        start = np.exp(cutoff)
        khat, scale = _fit_pareto(np.exp(x[tail]) - start)
        if np.isfinite(khat) and scale > 0:
            log_survival = np.log1p(-(np.arange(len(tail)) + 0.5) / len(tail))
            quantiles = scale * (np.expm1(-khat * log_survival) / khat if khat else -log_survival)
            x[tail] = np.minimum(np.log(start + quantiles), 0.0)
        elif np.isnan(khat):  # weights so uneven that the fit overflows
            khat = np.inf
    elif importance_ess(log_weights) >= NEARLY_EQUAL:
        khat = -np.inf
    return x - logsumexp(x), float(khat)


def _fit_pareto(excess: np.ndarray) -> tuple[float, float]:
    r"""Shape and scale of a generalised Pareto distribution, from what lies above its start.

    The posterior mean of :math:`b = -k / \sigma` on a grid, whose likelihood is profiled over k,
    and from it k, drawn to 0.5 as if by ten more draws.

    :param excess: positive numbers in increasing order.

    Source: Zhang and Stephens (2009), Technometrics 51; the prior of k is that of Vehtari et al.
    """
    n = len(excess)
    num = 30 + int(n**0.5)
    grid = 1 / excess[-1] + (1 - np.sqrt(num / (np.arange(num) + 0.5))) / (
        3 * excess[int(n / 4 + 0.5) - 1]
    )
    shapes = np.log1p(-grid[:, None] * excess).mean(1)
    log_likelihood = n * (np.log(-grid / shapes) - shapes - 1)
    b = float(softmax(log_likelihood) @ grid)
    shape = float(np.log1p(-b * excess).mean())
    return (n * shape + 5) / (n + 10), -shape / b


def psis_khat(log_weights: ArrayLike) -> float:
    r"""Pareto shape :math:`\hat k` of importance weights, by Pareto-smoothed importance sampling.

    Below 0.7 the weighted draws are reliable; above, the guide misses mass that matters. When all
    weights are nearly equal the tail is noise and :math:`\hat k` with it: see
    :func:`importance_ess`.

    :param log_weights: log importance weights, shape ``(num_samples,)``, up to a constant.
    :return: the shape; ``-inf`` where the weights are nearly equal and tied, ``nan`` where one is
        not finite.

    Source: Vehtari et al. (2024), arXiv:1507.02646.

    >>> import numpy as np
    >>> bool(psis_khat(np.random.default_rng(0).normal(0, 0.1, 1000)) < 0.7)
    True
    """
    return psis(log_weights)[1]


def log_evidence(log_weights: ArrayLike) -> tuple[float, float]:
    r"""Log evidence :math:`\log \frac1n \sum_i w_i` and its standard error.

    The error is that of the delta method, :math:`\mathrm{sd}(w) / (\sqrt n \, \bar w)`; it can be
    believed where :func:`psis_khat` is below 0.5, where the weights have a variance.

    :param log_weights: log importance weights, shape ``(num_samples,)``, with their constant.

    >>> log_evidence([1.0, 1.0])
    (1.0, 0.0)
    """
    log_weights = np.asarray(log_weights, dtype=float)
    largest = log_weights.max()
    weights = np.exp(log_weights - largest)
    error = weights.std() / weights.mean() / len(weights) ** 0.5
    return float(largest + np.log(weights.mean())), float(error)


def importance_ess(log_weights: ArrayLike) -> float:
    r"""Effective sample size :math:`(\sum w)^2 / (n \sum w^2)` of importance weights, in (0, 1].

    :param log_weights: log importance weights, shape ``(num_samples,)``, up to a constant.

    Source: Kong (1992); 1 means that the guide is the posterior.

    >>> importance_ess([0.0, 0.0])
    1.0
    """
    log_weights = np.asarray(log_weights, dtype=float)
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (weights**2).sum() / len(weights))
