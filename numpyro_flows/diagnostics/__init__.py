"""Diagnostics: of transforms, of importance weights, and of data out of distribution.

:func:`check_transform` checks a transform against its contract; :func:`psis_khat`,
:func:`importance_ess`, :func:`log_evidence` and :func:`moment_shifts` judge importance weights;
:func:`bits_per_dim` measures models of integers; :func:`typicality`, :func:`latent_chi_square` and
:func:`likelihood_ratio` test whether data are what a flow was trained on.
"""

from .bits import bits_per_dim
from .contract import Check, Report, TransformError, check_transform
from .moments import Shift, Shifts, moment_shifts
from .outliers import (
    Typicality,
    auroc,
    latent_chi_square,
    likelihood_ratio,
    perturb_levels,
    typicality,
)
from .psis import NEARLY_EQUAL, importance_ess, log_evidence, psis, psis_khat

__all__ = [
    "NEARLY_EQUAL",
    "Check",
    "Report",
    "Shift",
    "Shifts",
    "TransformError",
    "Typicality",
    "auroc",
    "bits_per_dim",
    "check_transform",
    "importance_ess",
    "latent_chi_square",
    "likelihood_ratio",
    "log_evidence",
    "moment_shifts",
    "perturb_levels",
    "psis",
    "psis_khat",
    "typicality",
]
