"""The transforms, one idea per file."""

from .autoregressive import MaskedAutoregressive
from .bnaf import BlockAutoregressive
from .compose import Chain, Scan, Stacked
from .compressed import CompressedContext
from .continuous import Continuous, penalized
from .coupling import Coupling
from .elementwise import Elementwise
from .fixed import FixedAffine, NumPyroTransform, Standardized
from .histogram import Equalization
from .image import ConvCoupling, Pixelwise, Squeeze
from .linear import (
    DenseLinear,
    DiagonalScale,
    Householder,
    LULinear,
    Orthogonal,
    Permutation,
    TriangularAffine,
)
from .multiscale import MultiScale
from .normalization import ActNorm
from .planar import Planar, Ridge, Sylvester
from .radial import Radial

__all__ = [
    "ActNorm",
    "BlockAutoregressive",
    "Chain",
    "CompressedContext",
    "Continuous",
    "ConvCoupling",
    "Coupling",
    "DenseLinear",
    "DiagonalScale",
    "Elementwise",
    "Equalization",
    "FixedAffine",
    "Householder",
    "LULinear",
    "MaskedAutoregressive",
    "MultiScale",
    "NumPyroTransform",
    "Orthogonal",
    "Permutation",
    "Pixelwise",
    "Planar",
    "Radial",
    "Ridge",
    "Scan",
    "Squeeze",
    "Stacked",
    "Standardized",
    "Sylvester",
    "TriangularAffine",
    "penalized",
]
