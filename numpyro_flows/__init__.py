"""Normalizing flows as native NumPyro transforms and distributions.

The public names, by section; layers live in ``nf.transforms`` and scalar maps in
``nf.elementwise``. Two files hold the design: ``transform.py`` (the contract of a transform) and
``distribution.py`` (the flow).
"""

from . import diagnostics, elementwise, nn, plot, transforms
from .augmented import AugmentedFlow
from .dequantization import Dequantized, dequantization_noise, dequantize, equalize
from .diagnostics import bits_per_dim, check_transform
from .distribution import FlowDistribution, combine, partition
from .infer import (
    STL_ELBO,
    AmortizedFlow,
    AutoFlow,
    FlowNUTS,
    FlowNUTSReport,
    GuideFit,
    NeuTraReparam,
    augmented_model,
    fit_guide,
    flow_module,
    importance_log_weights,
    importance_resample,
    learn_map,
    random_flow_module,
    to_arviz,
)
from .initialization import initialize
from .io import load, register, save
from .parts import Fixed
from .recipes import (
    augmented_cnf,
    autoregressive_flow,
    bnaf,
    cnf,
    coupling_flow,
    glow,
    grey_levels,
    iaf,
    maf,
    nice,
    nsf,
    nsf_ar,
    planar,
    radial,
    realnvp,
    residual_flow,
    sylvester,
)
from .training import FitResult, FlowMatching, fit
from .transform import FlowTransform

__version__ = "0.1.0"

# ruff: noqa: RUF022 (by section, not by letter)
__all__ = [
    # recipes
    "planar",
    "radial",
    "sylvester",
    "nice",
    "realnvp",
    "nsf",
    "maf",
    "iaf",
    "nsf_ar",
    "bnaf",
    "cnf",
    "augmented_cnf",
    "glow",
    "grey_levels",
    "coupling_flow",
    "autoregressive_flow",
    "residual_flow",
    # the flow and its parts
    "FlowDistribution",
    "AugmentedFlow",
    "FlowTransform",
    "initialize",
    # parameters
    "Fixed",
    "partition",
    "combine",
    # training on data
    "fit",
    "FlowMatching",
    "FitResult",
    # discrete data
    "dequantize",
    "equalize",
    "dequantization_noise",
    "Dequantized",
    "bits_per_dim",
    # inside NumPyro
    "flow_module",
    "random_flow_module",
    "AutoFlow",
    "AmortizedFlow",
    "augmented_model",
    "STL_ELBO",
    "fit_guide",
    "GuideFit",
    "importance_resample",
    "importance_log_weights",
    "to_arviz",
    "NeuTraReparam",
    "learn_map",
    "FlowNUTS",
    "FlowNUTSReport",
    # trust and tools
    "check_transform",
    "save",
    "load",
    "register",
    # modules
    "diagnostics",
    "elementwise",
    "nn",
    "plot",
    "transforms",
]
