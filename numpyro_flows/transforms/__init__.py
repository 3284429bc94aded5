"""The transforms, one idea per file."""

from .compose import Chain, Scan, Stacked
from .coupling import Coupling
from .fixed import NumPyroTransform, Standardized
from .linear import DiagonalScale

__all__ = [
    "Chain",
    "Coupling",
    "DiagonalScale",
    "NumPyroTransform",
    "Scan",
    "Stacked",
    "Standardized",
]
