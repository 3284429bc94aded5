r"""Elementwise maps: scalar bijections whose parameters come from a conditioner.

A map is data, not a layer: ``Coupling``, ``Elementwise`` and the autoregressive structures take
any of them, so NICE is coupling x :class:`Shift`, RealNVP is coupling x :class:`Affine`, and a
neural spline flow is coupling x :class:`RationalQuadraticSpline`. A new map needs ``num_params``
and the two methods of :class:`ElementwiseMap`, nothing else. How a conditioner reads coordinates
is its :class:`Encoding`: real ones as they are, :class:`Angles` by cosine and sine,
:class:`Cells` one-hot.

Parameters have shape ``(num_params, *shape)`` for values of any ``shape``, so each parameter is one
contiguous slice of the conditioner's output. **All-zero parameters are the identity map.**

================================  ==================================  ====================
map                               for                                 smoothness
================================  ==================================  ====================
:class:`Shift`                    volume-preserving layers            analytic
:class:`Affine`                   the default                         analytic
:class:`RationalQuadraticSpline`  detail within a bounded interval    once differentiable
:class:`CircularSpline`           angles                              once differentiable
:class:`SinhArcsinh`              skewness and tail weight            analytic
:class:`DeepSigmoid`              several modes                       analytic
:class:`HeavyTail`                power-law tails, as the last layer  twice differentiable
:class:`Masses`                   discrete coordinates                linear on cells
================================  ==================================  ====================
"""

from .affine import Affine as Affine
from .affine import Shift as Shift
from .base import ElementwiseMap as ElementwiseMap
from .base import check_map as check_map
from .by_kind import ByKind as ByKind
from .deep_sigmoid import DeepSigmoid as DeepSigmoid
from .encoding import Angles as Angles
from .encoding import Cells as Cells
from .encoding import Conditioner as Conditioner
from .encoding import Encoding as Encoding
from .heavy_tail import HeavyTail as HeavyTail
from .masses import Masses as Masses
from .masses import check_cells as check_cells
from .sinh_arcsinh import SinhArcsinh as SinhArcsinh
from .spline import CircularSpline as CircularSpline
from .spline import RationalQuadraticSpline as RationalQuadraticSpline
