"""The normal distribution whose scores are given, on the host in float64."""

from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Matrix: TypeAlias = NDArray[np.floating]

#: Largest dimension in which covariances are full, where there are draws enough.
FULL: Final = 1024
#: Largest dimension in which every covariance is trained by gradient steps.
TRAINED: Final = 128


#: Rounds in which scales and a span are found by turns.
ROUNDS: Final = 3


class LowRank(NamedTuple):
    r"""Mean and root :math:`s \odot (I + Q (L - I) Q^\top)` of a normal, as in ``FixedAffine``."""

    mean: Matrix
    scale: Matrix
    frame: Matrix
    core: Matrix


def matched(w: Matrix, score: Matrix, ridge: float = 1e-9) -> tuple[Matrix, Matrix]:
    r"""Mean and lower triangular factor of the normal whose scores are those given.

    The symmetric :math:`\Sigma` with :math:`\Sigma \, C_s \, \Sigma = C_w`, C the covariances
    of scores and of points, minimises the Fisher divergence among normals. Where the scores are of
    a normal it is exact, wherever the points come from, if there are more of them than coordinates.
    With fewer than twice as many it is diagonal, :math:`\sigma_i^2 = (\mathrm{var}(w_i) /
    \mathrm{var}(s_i))^{1/2}`, and the factor a vector of :math:`\sigma_i`.

    Source: Seyboldt, Carlson & Carpenter (2026), arXiv:2603.18845.

    :param w: points, ``(n, dim)``.
    :param score: gradients of the log density there, ``(n, dim)``.
    :param ridge: added to correlations before they are inverted; larger for points that are few and
        of another density than a normal.
    """
    num, dim = w.shape
    scale = np.sqrt(w.std(0) / score.std(0))
    mean, slope = w.mean(0), score.mean(0)
    if num < 2 * dim:
        return mean + scale**2 * slope, scale

    def covariance(a: Matrix) -> Matrix:
        return np.cov(a.T).reshape(dim, dim) + ridge * np.eye(dim)

    of_points, of_scores = covariance((w - mean) / scale), covariance((score - slope) * scale)
    root = _power(of_points, 0.5)
    middle = root @ _power(root @ of_scores @ root, -0.5) @ root
    factor = scale[:, None] * np.linalg.cholesky(middle)
    return mean + factor @ (factor.T @ slope), factor


def matched_low_rank(w: Matrix, score: Matrix, rank: int, ridge: float = 1e-9) -> LowRank:
    r"""The normal of :func:`matched` whose covariance is diagonal plus low-rank.

    Seen in the right scales, the directions in which the points spread most are those that are
    wider than the rest, and the scores spread most along those that are narrower. In the span of
    both, a few times smaller than the number of points, the full normal is matched, and of its axes
    the ``rank`` are kept whose lengths are farthest from 1. The scales are those of what is outside
    of the span: within, one narrow direction may spread the scores of all coordinates.

    Source: Seyboldt, Carlson & Carpenter (2026), arXiv:2603.18845, who take scales and the span of
    all that there is.

    :param w: points, ``(n, dim)``.
    :param score: gradients of the log density there, ``(n, dim)``.
    :param rank: columns of the frame; those that the points do not determine are zero.
    """
    num, dim = w.shape
    mean, slope = w.mean(0), score.mean(0)
    kept = max(1, min(rank, num // 4, dim // 4))
    scale, basis = np.sqrt(w.std(0) / score.std(0)), np.zeros((dim, 0))
    for _ in range(ROUNDS):
        x, s = (w - mean) / scale, (score - slope) * scale
        spans = [np.linalg.svd(a, full_matrices=False)[2][:kept] for a in (x, s)]
        basis = np.linalg.qr(np.concatenate(spans).T)[0]
        outside = [(a - a @ basis @ basis.T).std(0) for a in (x, s)]
        scale = scale * np.sqrt(outside[0] / outside[1])
    x, s = (w - mean) / scale, (score - slope) * scale
    _, factor = matched(x @ basis, s @ basis, ridge)
    axes, lengths, _ = np.linalg.svd(factor if factor.ndim > 1 else np.diag(factor))
    farthest = np.argsort(-np.abs(np.log(lengths)))[:rank]
    frame, core = np.zeros((dim, rank)), np.ones(rank)
    frame[:, : len(farthest)] = basis @ axes[:, farthest]
    core[: len(farthest)] = lengths[farthest]
    step = scale * slope
    step += ((step @ frame) * (core**2 - 1)) @ frame.T
    return LowRank(mean + scale * step, scale, frame, np.diag(core))


def _power(matrix: Matrix, power: float) -> Matrix:
    """A power of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    least = np.finfo(float).eps * values[-1]
    return (vectors * np.maximum(values, least) ** power) @ vectors.T
