"""Automatic guides: a flow over all latent sites, over each row of a plate, or beside the model."""

from .amortized import AmortizedFlow
from .augmented import augmented_model
from .auto import AutoFlow

__all__ = ["AmortizedFlow", "AutoFlow", "augmented_model"]
