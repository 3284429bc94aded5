"""Samplers over a learned map, as NumPyro kernels, and reports of their runs."""

from .nuts import FlowNUTS
from .report import FlowNUTSReport

__all__ = ["FlowNUTS", "FlowNUTSReport"]
