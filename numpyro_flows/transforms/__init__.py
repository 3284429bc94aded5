"""The layers of flows and their composition, one idea per file.

=============  =================================================================================
composition    :class:`Chain`, :class:`Scan`, :class:`Stacked`, :class:`MultiScale`,
               :class:`Inverse`
contexts       :class:`Conditioned`, :class:`Embedded`
structures     :class:`Coupling`, :class:`MaskedAutoregressive`, :class:`Elementwise`, each with
               any map of ``numpyro_flows.elementwise``; :class:`Mixed`, of integers and others
sequences      :class:`Markov`, any conditional transform repeated along time
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

from ..transform import Inverse as Inverse
from .autoregressive import MaskedAutoregressive as MaskedAutoregressive
from .bnaf import BlockAutoregressive as BlockAutoregressive
from .compose import Chain as Chain
from .compose import Scan as Scan
from .compose import Stacked as Stacked
from .compressed import CompressedContext as CompressedContext
from .context import Conditioned as Conditioned
from .context import Embedded as Embedded
from .continuous import Continuous as Continuous
from .continuous import penalized as penalized
from .coupling import Coupling as Coupling
from .elementwise import Elementwise as Elementwise
from .fixed import FixedAffine as FixedAffine
from .fixed import NumPyroTransform as NumPyroTransform
from .fixed import Standardized as Standardized
from .histogram import Equalization as Equalization
from .image import ConvCoupling as ConvCoupling
from .image import Pixelwise as Pixelwise
from .image import Squeeze as Squeeze
from .linear import DenseLinear as DenseLinear
from .linear import DiagonalScale as DiagonalScale
from .linear import Householder as Householder
from .linear import LULinear as LULinear
from .linear import Orthogonal as Orthogonal
from .linear import Permutation as Permutation
from .linear import TriangularAffine as TriangularAffine
from .markov import Markov as Markov
from .mixed import Mixed as Mixed
from .multiscale import MultiScale as MultiScale
from .normalization import ActNorm as ActNorm
from .planar import Planar as Planar
from .planar import Ridge as Ridge
from .planar import Sylvester as Sylvester
from .radial import Radial as Radial
