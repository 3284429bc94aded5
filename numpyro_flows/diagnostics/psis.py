"""Diagnostics of importance weights: Pareto smoothing, effective sample size, log evidence."""

from typing import Final

import numpy as np
from jax.typing import ArrayLike

#: Importance ESS from which weights are nearly equal, and their tail is noise.
NEARLY_EQUAL: Final = 0.95


def psis(log_weights: ArrayLike) -> tuple[np.ndarray, float]:
    r"""Pareto-smoothed log importance weights and their Pareto shape :math:`\hat k`.

    The largest weights are replaced by quantiles of a generalised Pareto distribution fitted to
    them.

    :param log_weights: log importance weights, shape ``(num_samples,)``, up to a constant.
    :return: the smoothed weights, normalised, same shape, and :math:`\hat k`: both ``nan`` where a
        weight is not finite; ``-inf`` where the weights are nearly equal and tied, so that there is
        no tail to fit, and ``inf`` where there is one that is too short.

    Source: Vehtari et al. (2024), arXiv:1507.02646; computed by ArviZ.
    """
    log_weights = np.asarray(log_weights, dtype=float)
    if not np.isfinite(log_weights).all():
        return np.full_like(log_weights, np.nan), float("nan")
    try:
        # ArviZ 1: arrays are served by arviz-stats, which it is built on.
        from arviz_stats.base import array_stats
    except ImportError:
        import arviz

        smoothed, khat = arviz.psislw(log_weights)
    else:
        try:
            smoothed, khat = array_stats.psislw(log_weights)
        except ValueError:  # its answer to a tail of ties, where ArviZ 0 says inf
            smoothed = log_weights - np.logaddexp.reduce(log_weights)
            khat = np.inf
    # ArviZ says inf where fewer than five weights lie above the tail's beginning.
    if np.isposinf(khat) and importance_ess(log_weights) >= NEARLY_EQUAL:
        khat = -np.inf
    return np.asarray(smoothed), float(khat)


def psis_khat(log_weights: ArrayLike) -> float:
    r"""Pareto shape :math:`\hat k` of importance weights, by Pareto-smoothed importance sampling.

    Below 0.7 the weighted draws are reliable; above, the guide misses mass that matters. When all
    weights are nearly equal the tail is noise and :math:`\hat k` with it: see
    :func:`importance_ess`.

    :param log_weights: log importance weights, shape ``(num_samples,)``, up to a constant.
    :return: the shape; ``-inf`` where the weights are nearly equal and tied, ``nan`` where one is
        not finite.

    Source: Vehtari et al. (2024), arXiv:1507.02646; computed by ArviZ.

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
