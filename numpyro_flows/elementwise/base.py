"""The base class of elementwise maps, and the smooth bound on their parameters."""

import abc
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import Array


class ElementwiseMap(eqx.Module):
    """A strictly increasing scalar map with parameters; see the package's text for shapes."""

    #: Whether one more row of parameters says which coordinates are angles; see ``Angles.mark``.
    reads_kinds: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def num_params(self) -> int:
        """Parameters per coordinate."""

    @abc.abstractmethod
    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        """``x`` of shape ``(*shape)`` to ``(y, log dy/dx)`` of the same shape."""

    @abc.abstractmethod
    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        """``y`` of shape ``(*shape)`` to ``(x, log dx/dy)`` of the same shape."""


def check_map(map: object) -> ElementwiseMap:
    """Return ``map`` if it is an elementwise map.

    :param map: what was given as one.
    :raises TypeError: if it is not.

    >>> from numpyro_flows.elementwise import Affine
    >>> check_map(Affine()).num_params
    2
    """
    if not isinstance(map, ElementwiseMap):
        raise TypeError(
            f"map: expected an ElementwiseMap, got {map!r}; "
            "for example `numpyro_flows.elementwise.Affine()`."
        )
    return map


def check_bound(name: str, value: float, hint: str = "") -> float:
    """Return ``value`` as a float if it is positive and finite.

    :raises ValueError: if it is not.
    """
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {value}. {hint}".rstrip())
    return float(value)


def bounded(raw: Array, bound: float) -> Array:
    r"""The smooth bound :math:`c \tanh(h / c)`: slope 1 at zero, within :math:`\pm c`."""
    return bound * jnp.tanh(raw / bound)
