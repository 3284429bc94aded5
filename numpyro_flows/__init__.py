"""Normalizing flows as native NumPyro transforms and distributions.

The names that most programs type, by section. The rest is in modules: layers in ``nf.transforms``,
scalar maps in ``nf.elementwise``, networks in ``nf.nn``, pictures in ``nf.plot``, checks in
``nf.diagnostics``; classes of results, and what few need, in ``nf.training``, ``nf.infer``,
``nf.recipes``, ``nf.dequantization`` and ``nf.io``.

Two files hold the design: ``transform.py`` (the contract of a transform) and ``distribution.py``
(the flow).
"""

from . import dequantization as dequantization
from . import diagnostics as diagnostics
from . import elementwise as elementwise
from . import infer as infer
from . import io as io
from . import nn as nn
from . import plot as plot
from . import recipes as recipes
from . import training as training
from . import transforms as transforms
from .augmented import AugmentedFlow
from .dequantization import dequantize, equalize
from .diagnostics import check_transform
from .distribution import FlowDistribution, combine, partition
from .forecasting import forecast
from .infer import (
    STL_ELBO,
    AmortizedFlow,
    AutoFlow,
    FlowNUTS,
    NeuTraReparam,
    augmented_model,
    fit_guide,
    fit_guides,
    fit_pymc,
    flow_module,
    importance_log_weights,
    importance_resample,
    learn_map,
    log_density_model,
    log_evidence,
    model_informed,
    random_flow_module,
    sample_pymc,
    to_arviz,
)
from .initialization import initialize
from .io import load, save
from .parts import Fixed
from .recipes import (
    augmented_cnf,
    autoregressive_flow,
    bnaf,
    cnf,
    coupling_flow,
    glow,
    iaf,
    maf,
    markov,
    nice,
    nsf,
    nsf_ar,
    planar,
    radial,
    realnvp,
    residual_flow,
    sylvester,
)
from .training import FlowMatching, fit, fit_many
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
    "markov",
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
    "fit_many",
    "FlowMatching",
    # discrete data
    "dequantize",
    "equalize",
    # sequences
    "forecast",
    # inside NumPyro
    "flow_module",
    "random_flow_module",
    "AutoFlow",
    "AmortizedFlow",
    "model_informed",
    "augmented_model",
    "STL_ELBO",
    "fit_guide",
    "fit_guides",
    "importance_log_weights",
    "importance_resample",
    "log_evidence",
    "to_arviz",
    "NeuTraReparam",
    "learn_map",
    "FlowNUTS",
    "log_density_model",
    "fit_pymc",
    "sample_pymc",
    # trust and tools
    "check_transform",
    "save",
    "load",
    # modules
    "diagnostics",
    "elementwise",
    "nn",
    "plot",
    "transforms",
]
