"""Normalizing flows as native NumPyro transforms and distributions."""

from .distribution import FlowDistribution, combine, partition
from .recipes import nice, realnvp
from .transform import Conditioned, Fixed, FlowTransform, Inverse
from .transforms import *
