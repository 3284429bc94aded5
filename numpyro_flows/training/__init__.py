"""Training on data: ``nf.fit`` and its objectives, on the one optimisation loop."""

from .fit import FitResult, fit
from .objectives import FlowMatching, Objective

__all__ = ["FitResult", "FlowMatching", "Objective", "fit"]
