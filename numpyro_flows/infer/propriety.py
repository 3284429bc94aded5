"""Whether a posterior can be improper: in which directions its density does not fall."""

import math
from typing import Any, Final

import numpy as np

from ..transforms import FixedAffine
from .latent_space import LogDensity, search_rows
from .normals import Matrix
from .preconditioner import Affine, in_batches

#: How far out the density is looked at, in standard deviations of the preconditioner.
FAR: Final = 100.0
#: Step of the differences that make curvatures.
NEAR: Final = 0.5
#: Curvature below which a direction is looked at; that of a normal is 1.
FLAT: Final = 0.1
#: Coordinates that are looked at, four gradients each.
MOST: Final = 1000


def improper_sites(density: LogDensity, affine: FixedAffine) -> tuple[str, ...]:
    r"""Names of the sites along which a log density does not fall far enough to be integrable.

    A density that can be integrated along a line falls faster than :math:`1 / |t|`. Here t runs
    along the coordinates of the preconditioner's base space, and along the directions in which the
    density is least curved there: 100 to either side, where a normal density has fallen by 5,000
    and a Cauchy density by :math:`2 \log 100`. So are found flat priors that the data do not bound,
    one by one or together, as those of a and b where only a + b was seen. A curved ridge is not.

    :param density: the model's log density.
    :param affine: a preconditioner for it.
    """
    map, dim = Affine.of(affine), density.space.dim
    steps = np.eye(dim)[:MOST]
    rows = search_rows(density, map.loc)

    def at(steps: Matrix) -> tuple[Matrix, Matrix]:
        return in_batches(rows, map(steps))

    (centre,), _ = at(np.zeros((1, dim)))

    def falls(steps: Matrix) -> Any:
        values, _ = at(np.concatenate([steps, -steps]) * FAR)
        # An infinite density so far out is an overflow.
        flat = np.isfinite(values) & (values > centre - np.log(FAR))
        return ~flat.reshape(2, -1).any(0)

    _, grads = at(np.concatenate([steps, -steps]) * NEAR)
    before, after = np.split(map.transposed(grads) @ steps.T, 2)
    curvatures = (after - before) / (2 * NEAR)
    if np.isfinite(curvatures).all():
        values, vectors = np.linalg.eigh((curvatures + curvatures.T) / 2)
        steps = np.concatenate([steps, vectors.T[values < FLAT] @ steps])
    moved = np.abs(map.linear(steps[~falls(steps)]))
    names, shapes = zip(*density.space.shapes, strict=True)
    owners = np.repeat(names, [math.prod(shape) for shape in shapes])
    found = [owners[row > row.max() / 2].tolist() for row in moved]
    return tuple(dict.fromkeys(name for names in found for name in names))
