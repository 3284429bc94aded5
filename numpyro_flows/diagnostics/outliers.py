"""Tests for data out of distribution: whether data are like those a flow was trained on.

A high likelihood alone says little: a flow trained on clothes gives digits, and one trained on
digits gives a blank page, a higher likelihood than its own data. Typical data have likelihoods
*around* the mean, not above it. What :func:`auroc` measures for each of these tests on digits is
in ``docs/images.md``, with the cases where they fail.

Source of the observation: Nalisnick et al. (2019), arXiv:1810.09136.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from scipy import special

from ..checks import check_integers, check_key, check_size
from .bits import DiscreteModel, bits_per_dim


@dataclasses.dataclass(frozen=True)
class Typicality:
    """What :func:`typicality` returns, an entry for each batch.

    :ivar statistic: distance of the batch's mean negative log-likelihood from the entropy.
    :ivar threshold: what the statistic of a batch of the reference exceeds with probability
        ``1 - level``.
    :ivar p_value: share of the reference's batches with a statistic as large.
    :ivar typical: whether the statistic is below the threshold.
    """

    statistic: np.ndarray
    threshold: float
    p_value: np.ndarray
    typical: np.ndarray


def typicality(
    log_probs: ArrayLike,
    reference: ArrayLike,
    *,
    level: float = 0.99,
    num_bootstrap: int = 10_000,
    seed: int = 0,
) -> Typicality:
    r"""Typicality test of batches: is their mean likelihood that of the training data?

    .. math:: \hat\epsilon = \left| -\frac1M \sum_{m=1}^M \log p(x_m) - \hat H \right|

    with the entropy :math:`\hat H` estimated by the mean over ``reference``, against the quantile
    of the same statistic over batches drawn from the reference with replacement. Its power grows
    with M. It cannot see a batch of other data with the same mean likelihood, nor can any test
    of likelihoods alone.

    Source: Nalisnick et al. (2019), arXiv:1906.02994, section 3.

    :param log_probs: log-likelihoods of the batches, shape ``(*batches, M)``; M = 1 for single
        events.
    :param reference: log-likelihoods of data known to be inside, held out from training, shape
        ``(n,)``: held-out data are a little less likely than what was trained on.
    :param level: probability with which a batch of the reference passes, in (0, 1).
    :param num_bootstrap: batches drawn from the reference.
    :param seed: seed of these draws.
    :raises ValueError: for a reference of fewer than 2 numbers or of another shape, log-likelihoods
        that are not finite, or a level outside of (0, 1).

    >>> import numpy as np
    >>> inside, outside = np.random.default_rng(0).normal([[0], [1]], 1.0, (2, 1000))
    >>> typicality([inside[:50], outside[:50]], inside).typical
    array([ True, False])
    """
    batches, inside = np.asarray(log_probs, float), np.asarray(reference, float)
    if inside.ndim != 1 or len(inside) < 2:
        raise ValueError(f"reference: expected shape (n,) with n at least 2, got {inside.shape}.")
    if batches.ndim == 0 or not batches.shape[-1]:
        raise ValueError(
            f"log_probs: expected shape (*batches, M), got {batches.shape}. One event is a batch "
            "of 1: log_probs[:, None]."
        )
    for name, values in (("log_probs", batches), ("reference", inside)):
        if not np.isfinite(values).all():
            raise ValueError(
                f"{name}: expected finite numbers, got {(~np.isfinite(values)).sum()} others."
            )
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}.")
    check_size("num_bootstrap", num_bootstrap)
    rng = np.random.default_rng(seed)
    mean = inside.mean()
    size = batches.shape[-1]
    drawn = np.empty(num_bootstrap)
    for start in range(0, num_bootstrap, 1000):  # in parts, as large batches fill the memory
        part = drawn[start : start + 1000]
        part[:] = inside[rng.integers(len(inside), size=(len(part), size))].mean(1)
    null = np.sort(np.abs(drawn - mean))
    statistic = np.abs(batches.mean(-1) - mean)
    threshold = float(np.quantile(null, level))
    p_value = 1 - np.searchsorted(null, statistic, side="left") / num_bootstrap
    return Typicality(statistic, threshold, p_value, statistic <= threshold)


def latent_chi_square(z: ArrayLike) -> np.ndarray:
    r"""Two-sided p-value of :math:`|z|^2`, which is :math:`\chi^2_D` for standard normal z.

    Data that a flow knows have latent vectors as long as those it draws. Under an imperfect flow
    even its own test data deviate, so compare with their p-values, as :func:`auroc` does.

    :param z: latent vectors, shape ``(*batch, D)``: ``flow.transform.inv(x)``, for a flow on a
        standard normal base.
    :return: shape ``(*batch,)``.

    >>> latent_chi_square([[1.0, 0.0, 1.2], [9.0, 0.0, 0.0]]).round(2)
    array([0.97, 0.  ])
    """
    z = np.asarray(z, float)
    square = (z**2).sum(-1)
    half = z.shape[-1] / 2
    return 2 * np.minimum(special.gammainc(half, square / 2), special.gammaincc(half, square / 2))


def likelihood_ratio(
    key: Array, model: DiscreteModel, background: DiscreteModel, x: ArrayLike, context: Any = None
) -> np.ndarray:
    r"""How much likelier x is under a model than under one of its background, nats per event.

    :math:`\log P(x) - \log P_0(x)`, the background trained on the same data with random pixels in
    them (:func:`perturb_levels`): what both models know, such as how much of a page is blank,
    cancels.

    Source: Ren et al. (2019), arXiv:1906.02845, section 3.

    :param key: ``jax.random.key`` for the noise, the same in both models.
    :param model: the model.
    :param background: a model of the same events without context.
    :param x: integers, shape ``(n, *event_shape)``.
    :param context: shape ``(n, context_dim)``, for a conditional model.
    :return: shape ``(n,)``; small outside of the distribution.
    :raises TypeError: for data that are not integers, or a key that is not one.

    >>> import jax, numpy as np, numpyro_flows as nf
    >>> x = np.random.default_rng(0).integers(0, 4, (20, 2))
    >>> model = nf.dequantize(nf.realnvp(jax.random.key(0), 2, depth=2), 4)
    >>> likelihood_ratio(jax.random.key(1), model, model, x).max()
    np.float64(0.0)
    """
    size = np.prod(model.event_shape) * np.log(2)
    ours = bits_per_dim(key, model, x, context)
    return (bits_per_dim(key, background, x) - ours) * size


def perturb_levels(key: Array, x: ArrayLike, levels: int = 256, *, rate: float = 0.2) -> Array:
    """Integers of which a share ``rate``, chosen at random, is drawn anew from 0 to ``levels - 1``.

    :param key: ``jax.random.key``.
    :param x: integers of any shape.
    :param levels: number of levels.
    :param rate: probability of each number to be drawn anew, in [0, 1].
    :raises TypeError: for data that are not integers, or a key that is not one.
    :raises ValueError: for a rate outside of [0, 1] or values outside of the range.

    >>> import jax, jax.numpy as jnp
    >>> perturb_levels(jax.random.key(0), jnp.zeros((2, 3), int), 4, rate=0.0).sum()
    Array(0, dtype=int32)
    """
    x = jnp.asarray(x)
    check_integers("x", x, levels, ())
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a number in [0, 1], got {rate}.")
    which, what = jax.random.split(check_key(key))
    drawn = jax.random.randint(what, x.shape, 0, levels, x.dtype)
    return jnp.where(jax.random.bernoulli(which, rate, x.shape), drawn, x)


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """Probability that a score is higher inside than outside, ties counted half: area under ROC.

    :param inside: scores of data inside of the distribution, shape ``(n,)``; high is inside.
    :param outside: scores of others, shape ``(m,)``.
    :raises ValueError: if either is empty or holds NaN.

    >>> auroc([1.0, 2.0, 3.0], [0.0, 1.0])
    0.9166666666666666
    """
    from scipy.stats import rankdata  # slow to import

    a, b = np.asarray(inside, float).ravel(), np.asarray(outside, float).ravel()
    if not a.size or not b.size or np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("auroc: expected scores without NaN on both sides.")
    ranks = rankdata(np.concatenate([a, b]))[: a.size]
    return float((ranks.sum() - a.size * (a.size + 1) / 2) / (a.size * b.size))
