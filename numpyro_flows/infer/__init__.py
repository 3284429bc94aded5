"""Flows in NumPyro's inference: guides, their fit and its verdict, samplers, learnable priors."""

from .amortized import AmortizedFlow
from .augmented import augmented_model
from .elbo import STL_ELBO
from .export import to_arviz
from .fit import GuideFit, fit_guide
from .guide import AutoFlow
from .importance import importance_log_weights, importance_resample
from .kernel import FlowNUTS
from .learning import learn_map
from .params import flow_module, random_flow_module
from .reparam import NeuTraReparam
from .report import FlowNUTSReport

__all__ = [
    "STL_ELBO",
    "AmortizedFlow",
    "AutoFlow",
    "FlowNUTS",
    "FlowNUTSReport",
    "GuideFit",
    "NeuTraReparam",
    "augmented_model",
    "fit_guide",
    "flow_module",
    "importance_log_weights",
    "importance_resample",
    "learn_map",
    "random_flow_module",
    "to_arviz",
]
