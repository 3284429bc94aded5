"""Flows in NumPyro's inference: parameters in models, guides, neural transport."""

from .elbo import STL_ELBO
from .guide import AutoFlow
from .importance import importance_log_weights
from .params import flow_module, random_flow_module
from .reparam import NeuTraReparam

__all__ = [
    "STL_ELBO",
    "AutoFlow",
    "NeuTraReparam",
    "flow_module",
    "importance_log_weights",
    "random_flow_module",
]
