"""The normal distribution whose scores are given, on the host in float64."""

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Matrix: TypeAlias = NDArray[np.floating]

#: Largest dimension in which covariances are full.
FULL: Final = 128


def matched(w: Matrix, score: Matrix, ridge: float = 1e-9) -> tuple[Matrix, Matrix]:
    r"""Mean and lower triangular factor of the normal whose scores are those given.

    The symmetric :math:`\Sigma` with :math:`\Sigma \, C_s \, \Sigma = C_w`, C the covariances
    of scores and of points, minimises the Fisher divergence among normals. Where the scores are of
    a normal it is exact, wherever the points come from, if there are more of them than coordinates.
    With fewer than twice as many, or beyond 128 coordinates, it is diagonal, :math:`\sigma_i^2 =
    (\mathrm{var}(w_i) / \mathrm{var}(s_i))^{1/2}`, and the factor a vector of :math:`\sigma_i`.

    Source: Seyboldt, Carlson & Carpenter (2026), arXiv:2603.18845.

    :param w: points, ``(n, dim)``.
    :param score: gradients of the log density there, ``(n, dim)``.
    :param ridge: added to correlations before they are inverted; larger for points that are few and
        of another density than a normal.
    """
    num, dim = w.shape
    scale = np.sqrt(w.std(0) / score.std(0))
    mean, slope = w.mean(0), score.mean(0)
    if num < 2 * dim or dim > FULL:
        return mean + scale**2 * slope, scale

    def covariance(a: Matrix) -> Matrix:
        return np.cov(a.T).reshape(dim, dim) + ridge * np.eye(dim)

    of_points, of_scores = covariance((w - mean) / scale), covariance((score - slope) * scale)
    root = _power(of_points, 0.5)
    middle = root @ _power(root @ of_scores @ root, -0.5) @ root
    factor = scale[:, None] * np.linalg.cholesky(middle)
    return mean + factor @ (factor.T @ slope), factor


def _power(matrix: Matrix, power: float) -> Matrix:
    """A power of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    least = np.finfo(float).eps * values[-1]
    return (vectors * np.maximum(values, least) ** power) @ vectors.T
