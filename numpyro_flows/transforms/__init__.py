"""The transforms, one idea per file."""

from .autoregressive import MaskedAutoregressive
from .bnaf import BlockAutoregressive
from .compose import Chain, Scan, Stacked
from .continuous import Continuous, for_training, inexactness, penalized
from .coupling import Coupling
from .elementwise import Elementwise
from .fixed import FixedAffine, NumPyroTransform, Standardized
from .linear import (
    DiagonalScale,
    Householder,
    LULinear,
    Orthogonal,
    Permutation,
    TriangularAffine,
)
from .normalization import ActNorm
from .planar import Planar, Ridge, Sylvester
from .radial import Radial

__all__ = [
    "ActNorm",
    "BlockAutoregressive",
    "Chain",
    "Continuous",
    "Coupling",
    "DiagonalScale",
    "Elementwise",
    "FixedAffine",
    "Householder",
    "LULinear",
    "MaskedAutoregressive",
    "NumPyroTransform",
    "Orthogonal",
    "Permutation",
    "Planar",
    "Radial",
    "Ridge",
    "Scan",
    "Stacked",
    "Standardized",
    "Sylvester",
    "TriangularAffine",
    "for_training",
    "inexactness",
    "penalized",
]
