"""A map of discrete coordinates, whose slope is a mass.

An integer x stands for the cell [x, x + 1) of the line. A map that is linear on each cell, and
depends on other coordinates by their cells alone, gives every point of a cell one density: the
mass of the integer, exactly.
"""

from collections.abc import Sequence
from typing import ClassVar, Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from .base import ElementwiseMap

#: Levels of a discrete coordinate that have a mass of their own.
MOST: Final = 256
#: Size of the largest integers.
FARTHEST: Final = 2**18


class Masses(ElementwiseMap):
    r"""From cells to the unit interval, linear on each: the distribution function of a category.

    .. math:: y = F(k) + (x - a - k) \, p_k, \quad k = \lfloor x - a \rfloor, \quad
              p = \mathrm{softmax}(\theta), \quad F(k) = \sum_{j < k} p_j

    The log-derivative on cell k is the log mass :math:`\log p_k`, :math:`-\infty` outside of all
    cells. Two more rows of parameters, which :meth:`Cells.mark` adds, are the lowest level a and
    the number of levels. Parameters that are all zero are the uniform distribution.

    The inverse finds the cell exactly, but within it loses what F is rounded by:
    :math:`10^{-7} / p_k` in float32.

    :param num_levels: the most levels of any coordinate, as many parameters.

    >>> import jax.numpy as jnp
    >>> params = jnp.array([0.0, 0.0, 10.0, 2.0])[:, None]  # masses 1/2 of the integers 10 and 11
    >>> Masses(2).forward_and_log_det(jnp.array([11.5]), params)
    (Array([0.75], dtype=float32), Array([-0.6931472], dtype=float32))
    """

    num_levels: int = eqx.field(static=True)
    reads_kinds: ClassVar[bool] = True

    @property
    def num_params(self) -> int:
        return self.num_levels

    def _split(self, params: Array) -> tuple[Array, Array, Array, Array]:
        """Levels, their log masses, the lowest level, and how many there are."""
        start, count = params[self.num_levels], params[self.num_levels + 1]
        levels = jnp.arange(self.num_levels, dtype=params.dtype)
        levels = levels.reshape(-1, *[1] * (params.ndim - 1))
        logits = jnp.where(levels < count, params[: self.num_levels], -jnp.inf)
        return levels, jax.nn.log_softmax(logits, axis=0), start, count

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        levels, log_masses, start, count = self._split(params)
        cell = jnp.floor(x - start)
        log_mass = jnp.where(levels == cell, log_masses, 0.0).sum(0)
        log_mass = jnp.where((cell >= 0) & (cell < count), log_mass, -jnp.inf)
        before = jnp.where(levels < cell, jnp.exp(log_masses), 0.0).sum(0)
        return before + (x - start - cell) * jnp.exp(log_mass), log_mass

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        levels, log_masses, start, count = self._split(params)
        masses = jnp.exp(log_masses)
        before = jnp.cumsum(masses, axis=0) - masses
        cell = ((before <= y) & (levels > 0) & (levels < count)).sum(0).astype(y.dtype)
        chosen = levels == cell
        log_mass = jnp.where(chosen, log_masses, 0.0).sum(0)
        within = (y - jnp.where(chosen, before, 0.0).sum(0)) / jnp.exp(log_mass)
        # Rounded up, a value would be in the next cell.
        most = 1 - 4 * jnp.finfo(y.dtype).eps * (jnp.abs(start) + count)
        return start + cell + jnp.clip(within, 0.0, most), -log_mass


def check_cells(starts: Sequence[int], counts: Sequence[int]) -> None:
    """Check ranges of integers, one for each coordinate.

    :param starts: lowest levels.
    :param counts: numbers of levels.
    :raises ValueError: for more than ``MOST`` levels, or integers that float32 cannot hold.

    >>> check_cells([0], [1000])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: support: expected 1 to 256 levels of a discrete coordinate, got 1000 of ...
    """
    for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if not 1 <= count <= MOST:
            raise ValueError(
                f"support: expected 1 to {MOST} levels of a discrete coordinate, got {count} of "
                f"coordinate {i}. `nf.dequantize(flow, levels=...)` models more, by a bound."
            )
        if abs(start) + count > FARTHEST:
            raise ValueError(
                f"support: expected integers up to {FARTHEST} in size, which float32 tells from "
                f"their neighbours, got a range from {start} of coordinate {i}. Subtract "
                "its lowest level."
            )
