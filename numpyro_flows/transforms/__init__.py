"""The layers of flows and their composition, one idea per file.

=============  =================================================================================
composition    :class:`Chain`, :class:`Scan`, :class:`Stacked`, :class:`MultiScale`,
               :class:`Inverse`
contexts       :class:`Conditioned`, :class:`Embedded`
structures     :class:`Coupling`, :class:`MaskedAutoregressive`, :class:`Elementwise`, each with
               any map of ``numpyro_flows.elementwise``
residual       :class:`Planar`, :class:`Sylvester`, :class:`Radial`, :class:`BlockAutoregressive`
continuous     :class:`Continuous`
linear         :class:`Permutation`, :class:`DiagonalScale`, :class:`TriangularAffine`,
               :class:`LULinear`, :class:`DenseLinear`, :class:`Householder`, :class:`Orthogonal`,
               :class:`ActNorm`
images         :class:`Squeeze`, :class:`Pixelwise`, :class:`ConvCoupling`
fixed numbers  :class:`NumPyroTransform`, :class:`Standardized`, :class:`FixedAffine`,
               :class:`Equalization`
=============  =================================================================================
"""

from ..transform import Inverse
from .autoregressive import MaskedAutoregressive
from .bnaf import BlockAutoregressive
from .compose import Chain, Scan, Stacked
from .compressed import CompressedContext
from .context import Conditioned, Embedded
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
    "Conditioned",
    "Continuous",
    "ConvCoupling",
    "Coupling",
    "DenseLinear",
    "DiagonalScale",
    "Elementwise",
    "Embedded",
    "Equalization",
    "FixedAffine",
    "Householder",
    "Inverse",
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
