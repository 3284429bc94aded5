"""Mixed vectors: masses of the discrete coordinates, and a flow of the others given them."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..elementwise import Encoding
from ..transform import ColumnTransform, FlowTransform


class Mixed(ColumnTransform):
    r"""From base space to vectors some of whose coordinates stand for integers.

    .. math:: p(x) = \prod_i P(d_i \mid d_{<i}, c) \; p(r \mid d, c)

    with d the cells of the discrete coordinates and r the others. An integer is a cell [k, k + 1),
    and networks see cells one-hot, not the number in them: the density is constant on each cell,
    and there the exact mass. The base is uniform on [0, 1) where coordinates are discrete.

    The log-determinant is exact; as numbers, places within a cell of mass p are lost below
    :math:`10^{-7} / p` in float32. From data to base costs one pass of both networks, the other
    direction that and one step per discrete coordinate.

    :param discrete: for each coordinate whether it is.
    :param cells: how the discrete coordinates are read.
    :param masses: from them to the unit interval: an autoregressive layer of
        :class:`~numpyro_flows.elementwise.Masses` that reads these cells.
    :param rest: from base to the other coordinates, with a context of the given one and then the
        one-hot cells; None if there are no others.
    :raises ValueError: if the sizes do not fit together.

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_flows.elementwise import Cells, Masses
    >>> from numpyro_flows.transforms import MaskedAutoregressive
    >>> cells = Cells(jnp.zeros(2), jnp.array([2.0, 3.0]), 3)
    >>> net = MaskedAutoregressive(jax.random.key(0), 2, Masses(3), encoding=cells)
    >>> t = Mixed((True, True), cells, net)
    >>> t.inverse_and_log_det(jnp.array([1.5, 0.5]))[1]  # log(1 / 2) + log(1 / 3)
    Array(-1.7917595, dtype=float32)
    """

    cells: Encoding
    masses: FlowTransform
    rest: FlowTransform | None
    discrete: tuple[bool, ...] = eqx.field(static=True)

    def __init__(
        self,
        discrete: Sequence[bool],
        cells: Encoding,
        masses: FlowTransform,
        rest: FlowTransform | None = None,
    ):
        self.discrete, self.cells, self.masses, self.rest = tuple(discrete), cells, masses, rest
        self._set_sizes(len(self.discrete), masses.context_dim)
        num_cells = sum(self.discrete) * cells.num_features
        num_rest = self.dim - sum(self.discrete)
        shape = (num_rest,) if num_rest else None
        width = masses.context_dim + num_cells if num_rest else None
        found = (None, None) if rest is None else (rest.event_shape, rest.context_dim)
        if masses.event_shape != (sum(self.discrete),) or found != (shape, width):
            raise ValueError(
                f"Mixed: expected masses of {sum(self.discrete)} coordinates and a transform of "
                f"{num_rest} others with a context of width {width}, got {masses} and {rest}."
            )

    def _inside(self) -> str:
        inside = f"{sum(self.discrete)} x Masses"
        return inside if self.rest is None else f"{inside}, {self.rest.outline}"

    def _split(self, value: Array) -> tuple[Array, Array]:
        is_discrete = np.array(self.discrete)
        return value[np.flatnonzero(is_discrete)], value[np.flatnonzero(~is_discrete)]

    def _merged(self, cells: Array, others: Array) -> Array:
        order = np.argsort(np.argsort(~np.array(self.discrete), kind="stable"))
        return jnp.concatenate([cells, others])[order]

    def _seen(self, cells: Array, context: Array | None) -> Array:
        """What the other coordinates are conditioned on."""
        read = self.cells.read(cells)
        if context is None:
            return read
        context = jnp.broadcast_to(context, (len(context), read.shape[1]))
        return jnp.concatenate([context, read])

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        cells, others = self._split(x)
        cells, log_det = self.masses.inverse_columns(cells, context)
        if self.rest is not None:
            others, more = self.rest.forward_columns(others, self._seen(cells, context))
            log_det = log_det + more
        return self._merged(cells, others), log_det

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        cells, others = self._split(y)
        seen = None if self.rest is None else self._seen(cells, context)
        cells, log_det = self.masses.forward_columns(cells, context)
        if self.rest is not None:
            others, more = self.rest.inverse_columns(others, seen)
            log_det = log_det + more
        return self._merged(cells, others), log_det
