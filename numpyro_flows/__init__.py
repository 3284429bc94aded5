"""Normalizing flows as native NumPyro transforms and distributions.

The public names, by section. Two files hold the design: ``transform.py`` (the contract of a
transform) and ``distribution.py`` (the flow).
"""

from . import diagnostics, elementwise, nn, transforms
from .diagnostics import check_transform
from .distribution import FlowDistribution, combine, partition
from .infer import (
    STL_ELBO,
    AutoFlow,
    NeuTraReparam,
    flow_module,
    importance_log_weights,
    random_flow_module,
)
from .recipes import nice, realnvp
from .serialization import load, register, save
from .training import FitResult, fit
from .transform import Conditioned, Fixed, FlowTransform, Inverse
from .transforms import (
    Chain,
    Coupling,
    DiagonalScale,
    NumPyroTransform,
    Scan,
    Stacked,
    Standardized,
)

__version__ = "0.1.0"

# ruff: noqa: RUF022 (by section, not by letter)
__all__ = [
    # recipes
    "nice",
    "realnvp",
    # the flow and its parts
    "FlowDistribution",
    "FlowTransform",
    "Inverse",
    "Conditioned",
    "Chain",
    "Coupling",
    "DiagonalScale",
    "NumPyroTransform",
    "Scan",
    "Stacked",
    "Standardized",
    # parameters
    "Fixed",
    "partition",
    "combine",
    # training by maximum likelihood
    "fit",
    "FitResult",
    # inside NumPyro
    "flow_module",
    "random_flow_module",
    "AutoFlow",
    "STL_ELBO",
    "NeuTraReparam",
    "importance_log_weights",
    # trust and tools
    "check_transform",
    "save",
    "load",
    "register",
    # modules
    "diagnostics",
    "elementwise",
    "nn",
    "transforms",
]
