"""Flows in NumPyro's inference: guides, their fit and its verdict, samplers, learnable priors."""

from .elbo import STL_ELBO
from .evidence import Evidence, log_evidence
from .export import to_arviz
from .fit import GuideFit, fit_guide, fit_guides
from .guide_flow import model_informed
from .guides import AmortizedFlow, AutoFlow, augmented_model
from .importance import importance_log_weights, importance_resample
from .kernels import FlowNUTS, FlowNUTSReport
from .learning import learn_map
from .log_density_model import log_density_model
from .params import flow_module, random_flow_module
from .pymc_models import fit_pymc, sample_pymc
from .reparam import NeuTraReparam

__all__ = [
    "STL_ELBO",
    "AmortizedFlow",
    "AutoFlow",
    "Evidence",
    "FlowNUTS",
    "FlowNUTSReport",
    "GuideFit",
    "NeuTraReparam",
    "augmented_model",
    "fit_guide",
    "fit_guides",
    "fit_pymc",
    "flow_module",
    "importance_log_weights",
    "importance_resample",
    "learn_map",
    "log_density_model",
    "log_evidence",
    "model_informed",
    "random_flow_module",
    "sample_pymc",
    "to_arviz",
]
