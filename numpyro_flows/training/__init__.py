"""Training on data: ``nf.fit`` and its objectives, on the one optimisation loop."""

from .ensemble import Ensemble, FlowMixture
from .fit import FitResult, fit
from .many import fit_many
from .objectives import FlowMatching, Objective

__all__ = [
    "Ensemble",
    "FitResult",
    "FlowMatching",
    "FlowMixture",
    "Objective",
    "fit",
    "fit_many",
]
