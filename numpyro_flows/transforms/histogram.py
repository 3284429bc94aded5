"""Histogram equalisation: a fixed map from normal numbers to grey levels, by their quantiles."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import ndtri
from jax.scipy.stats import norm
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint

from ..parts import Fixed
from ..transform import FlowTransform


class Equalization(FlowTransform):
    r"""Quantiles of a histogram, :math:`y_i = F^{-1}(\Phi(x_i))`, the same at every pixel.

    F is the cumulative distribution of integers plus uniform noise: linear between integers, with
    the slope :math:`p_b` in the cell b. A standard normal x gives y with this distribution, and
    the other way round pixels become standard normal one by one, whatever their histogram; flows
    then start from there. Log-determinant :math:`\sum_i \log \phi(x_i) - \log p_{b_i}`. Nothing of
    it trains. Cost: a table look-up, and a search in the table on the way to the data.

    In tails beyond half a unit in the last place of 1, x is cut off (5.3 in float32), so that no
    noise of exactly 0 gives an infinite x.

    :param counts: how often each of L integers occurs, positive, shape ``(L,)``, or ``(C, L)``
        with a histogram for each channel (index of the last axis).
    :param shape: event shape; x and y have shape ``(*batch, *shape)``, y in (0, L).
    :raises ValueError: for counts that are not positive or do not fit the shape.

    >>> import jax.numpy as jnp
    >>> Equalization(jnp.array([3.0, 1.0]), (2,))(jnp.array([0.0, 2.0]))
    Array([0.6666666, 1.9089994], dtype=float32)
    """

    shares: Fixed
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, counts: ArrayLike, shape: Sequence[int]):
        self.shape = tuple(shape)
        table = np.atleast_2d(np.asarray(counts, float))
        if table.ndim != 2 or not self.shape or len(table) not in (1, self.shape[-1]):
            raise ValueError(
                f"counts: expected shape (L,), or (C, L) with C the last size of {self.shape}, got "
                f"{jnp.shape(counts)}."
            )
        if not (table > 0).all() or not np.isfinite(table).all():
            raise ValueError("counts: expected positive numbers; add 1 to each.")
        table = table / table.sum(1, keepdims=True)
        self.shares = Fixed(jnp.asarray(table, jnp.result_type(float)))

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def levels(self) -> int:
        """L."""
        return self.shares.value.shape[1]

    @property
    def codomain(self) -> Constraint:
        interval = constraints.interval(0.0, float(self.levels))
        return constraints.independent(interval, len(self.shape))

    def _tables(self, dtype: Any) -> tuple[Array, Array, Array]:
        """Shares, what lies below each level and what lies above, ``(C, L)`` each."""
        shares = self.shares.value.astype(dtype)
        none = jnp.zeros_like(shares[:, :1])
        below = jnp.concatenate([none, jnp.cumsum(shares, 1)[:, :-1]], 1)
        above = jnp.concatenate([jnp.cumsum(shares[:, :0:-1], 1)[:, ::-1], none], 1)
        return shares, below, above

    def _sum(self, log_det: Array) -> Array:
        return log_det.sum(tuple(range(-len(self.shape), 0)))

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        shares, below, above = self._tables(x.dtype)
        channels = self.shape[-1]

        def search(shares: Array, below: Array, above: Array, x: Array) -> tuple[Array, Array]:
            # From the nearer end, where the numbers keep their digits.
            low, high = norm.cdf(x), norm.cdf(-x)
            cell = jnp.where(
                x < 0,
                jnp.searchsorted(below, low, side="right") - 1,
                jnp.searchsorted(-above, -high, side="left"),
            )
            cell = jnp.clip(cell, 0, self.levels - 1)
            share = shares[cell]
            part = jnp.where(x < 0, (low - below[cell]) / share, 1 - (high - above[cell]) / share)
            return cell + jnp.clip(part, 0, 1), norm.logpdf(x) - jnp.log(share)

        shares, below, above = (
            jnp.broadcast_to(table, (channels, self.levels)) for table in (shares, below, above)
        )
        each = jax.vmap(search, (0, 0, 0, 1), 1)
        y, log_det = each(shares, below, above, x.reshape(-1, channels))
        return y.reshape(x.shape), self._sum(log_det.reshape(x.shape))

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        shares, below, above = self._tables(y.dtype)
        cell = jnp.clip(jnp.floor(jax.lax.stop_gradient(y)), 0, self.levels - 1).astype(int)
        channel = np.arange(self.shape[-1]) % len(shares)
        share = shares[channel, cell]
        part = jnp.clip(y - cell, 0, 1)
        low = below[channel, cell] + part * share
        high = above[channel, cell] + (1 - part) * share
        is_low = low < high
        least = jnp.finfo(y.dtype).eps / 2
        tail = ndtri(jnp.maximum(jnp.where(is_low, low, high), least))
        x = jnp.where(is_low, tail, -tail)
        return x, self._sum(jnp.log(share) - norm.logpdf(x))
