"""The masked autoregressive layer: each coordinate's map depends on those before it."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..elementwise import Conditioner, ElementwiseMap, Encoding, check_map
from ..nn import ACTIVATIONS
from ..solve import triangular_root
from ..transform import ColumnTransform

#: Coordinates that the inverse computes between two products of whole matrices.
BLOCK = 32

Parents = tuple[tuple[int, ...], ...]
Graph: TypeAlias = Sequence[Sequence[int]] | np.ndarray | Array


class _Plan(NamedTuple):
    """Which weights of a masked network are not zero, and when its units can be computed.

    ``masks``: one 0/1 array per layer. ``starts[l][i]``: first unit of hidden layer l that waits
    for coordinate i - 1; units are sorted by that. ``counts[l]``: the most that become ready at
    once. ``direct``: mask of the direct connections from inputs to outputs, where they are needed.
    """

    masks: tuple[np.ndarray, ...]
    starts: tuple[np.ndarray, ...]
    counts: tuple[int, ...]
    direct: np.ndarray | None


@functools.lru_cache(maxsize=16)
def _plan(
    dim: int, widths: tuple[int, ...], parents: Parents | None, context: bool, features: int
) -> _Plan:
    """The plan for coordinates in topological order: i reads ``parents[i]``, all below i.

    Each hidden unit may read the parents of one coordinate; it may pass on to any unit that may
    read at least as much. For the complete order this is MADE with degrees in equal steps.
    """
    sees = np.tri(dim, k=-1, dtype=bool)
    if parents is not None:
        sees = np.array([[j in above for j in range(dim)] for above in parents], bool)
    # Units that see no coordinate are constants unless they see a context.
    distinct = {row.tobytes(): row for row in sees if context or row.any()}
    candidates = np.array(list(distinct.values()), bool).reshape(-1, dim)
    ready = np.array([1 + np.flatnonzero(row).max(initial=-1) for row in candidates], int)
    order = np.argsort(ready, kind="stable")
    candidates, ready = candidates[order], ready[order]
    if not len(candidates):
        candidates, ready = np.zeros((1, dim), bool), np.zeros(1, int)

    def within(inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
        """Entry (v, u): whether unit v may read every coordinate that unit u reads."""
        return (~outer).astype(np.float32) @ inner.T.astype(np.float32) == 0

    picks = [np.arange(width) * len(candidates) // width for width in widths]
    seen = [candidates[pick] for pick in picks]
    masks = [within(a, b) for a, b in itertools.pairwise(seen)]
    if seen:
        inputs, outputs = np.tile(seen[0], (1, features)), within(seen[-1], sees)
    else:
        inputs, outputs = None, np.tile(sees, (1, features))
    masks = ([] if inputs is None else [inputs]) + masks + [outputs]
    starts = [np.searchsorted(ready[pick], np.arange(dim)) for pick in picks]
    counts = [max(1, int(np.bincount(ready[pick], minlength=1).max(initial=1))) for pick in picks]
    # With fewer units than sets of parents, some coordinates would not reach each other.
    narrow = bool(widths) and min(widths) < len(candidates)
    direct = np.tile(sees, (1, features)) if narrow else None
    return _Plan(
        tuple(mask.astype(np.float32) for mask in masks),
        tuple(starts),
        tuple(counts),
        None if direct is None else direct.astype(np.float32),
    )


def _topological_order(parents: Parents) -> list[int]:
    order: list[int] = []
    waiting = [set(above) for above in parents]
    while len(order) < len(parents):
        free = [i for i, above in enumerate(waiting) if not above and i not in order]
        if not free:
            stuck = sorted(i for i in range(len(parents)) if i not in order)
            raise ValueError(
                f"parents: expected an acyclic graph, got a cycle among coordinates {stuck}."
            )
        order += free
        for above in waiting:
            above.difference_update(free)
    return order


def _check_parents(parents: Graph, dim: int) -> Parents:
    if isinstance(parents, np.ndarray | Array):
        if parents.dtype != bool or parents.shape != (dim, dim):
            raise ValueError(
                f"parents: expected a boolean mask of shape ({dim}, {dim}), whose row i marks what "
                f"coordinate i depends on, got an array of {parents.dtype} of shape "
                f"{parents.shape}. Write `mask.astype(bool)`, or a sequence of coordinates for "
                "each coordinate."
            )
        parents = [[int(j) for j in np.flatnonzero(row)] for row in parents]
    if len(parents) != dim or not all(isinstance(above, Iterable) for above in parents):
        raise ValueError(
            f"parents: expected one sequence for each of {dim} coordinates, those that it depends "
            f"on, got {parents!r}."
        )
    checked = tuple(tuple(sorted({int(j) for j in above})) for above in parents)
    for i, above in enumerate(checked):
        if any(not 0 <= j < dim for j in above):
            raise ValueError(
                f"parents: expected coordinates in range({dim}), got {above} for coordinate {i}."
            )
    return checked


class MaskedAutoregressive(ColumnTransform):
    r"""Masked autoregressive layer: :math:`y_i = g(x_i; \theta_i(x_{<i}, c))`.

    g is an elementwise map and :math:`\theta` one masked network (MADE) that returns the
    parameters of all coordinates at once. The Jacobian is triangular. With an affine map this is
    IAF read forward and MAF read backward (``layer.inv``), the fast direction being the forward
    one: one pass of the network.

    The inverse is computed one coordinate at a time, but not with one pass each: the hidden units
    are sorted by the coordinates they wait for, and each step computes only those that became
    ready. All steps together cost about one pass, exactly, however strongly the coordinates are
    coupled. Its gradients are implicit (:func:`numpyro_flows.solve.triangular_root`).

    Hidden layers may be narrower than ``dim``: direct connections from the inputs to the
    parameters are then added, so that every coordinate still sees all that come before it.

    A new layer is the identity. With ``dim = 1`` it is the elementwise map with learned
    parameters.

    Source: Germain et al. (2015), arXiv:1502.03509; Kingma et al. (2016), arXiv:1606.04934;
    Papamakarios, Pavlakou & Murray (2017), arXiv:1705.07057, eq. 3-5.

    :param key: ``jax.random.key`` for the network.
    :param dim: number of coordinates; x and y have shape ``(*batch, dim)``.
    :param map: the elementwise map g.
    :param hidden: widths of the network's hidden layers.
    :param residual: whether these are residual blocks (of equal widths).
    :param context_dim: width of the context, 0 for none.
    :param activation: name of the network's activation.
    :param order: permutation of ``range(dim)``: the coordinates in the order of their dependence,
        each on those before it; the natural order by default.
    :param parents: a directed acyclic graph in place of the complete order: for each coordinate
        those that it depends on, or a boolean mask of shape ``(dim, dim)`` whose row i marks them.
    :param encoding: how the network reads the coordinates, such as
        :class:`~numpyro_flows.elementwise.Angles`; as real numbers by default.
    :raises ValueError: for sizes below 1, an order that is no permutation, a graph with a cycle,
        or both an order and a graph.

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_flows.elementwise import Affine
    >>> layer = MaskedAutoregressive(jax.random.key(0), 3, Affine(), hidden=(8,))
    >>> y, log_det = layer.forward_and_log_det(jnp.ones((5, 3)))
    >>> y.shape, log_det.shape
    ((5, 3), (5,))
    """

    map: ElementwiseMap
    conditioner: Conditioner
    direct: Array | None
    order: tuple[int, ...] | None = eqx.field(static=True)
    parents: Parents | None = eqx.field(static=True)

    def __init__(
        self,
        key: Array,
        dim: int,
        map: ElementwiseMap,
        *,
        hidden: Sequence[int] = (64, 64),
        residual: bool = False,
        context_dim: int = 0,
        activation: str = "relu",
        order: Sequence[int] | None = None,
        parents: Graph | None = None,
        encoding: Encoding | None = None,
    ):
        self._set_sizes(dim, context_dim)
        self.map = check_map(map)
        if order is not None and parents is not None:
            raise ValueError("Expected an order or parents, got both: a graph has its own order.")
        self.parents = None
        if parents is not None:
            graph = _check_parents(parents, dim)
            order = _topological_order(graph)
            place = {coordinate: i for i, coordinate in enumerate(order)}
            self.parents = tuple(tuple(sorted(place[j] for j in graph[i])) for i in order)
        if order is not None and sorted(order) != list(range(dim)):
            raise ValueError(f"order: expected a permutation of range({dim}), got {order!r}.")
        self.order = None if order is None else tuple(int(i) for i in order)
        if encoding is not None and self.order is not None:
            encoding = encoding[np.array(self.order)]
        net = Conditioner(
            key,
            dim,
            map.num_params * dim,
            encoding=encoding,
            hidden=hidden,
            context_size=context_dim,
            activation=activation,
            residual=residual,
        )
        self.conditioner = net
        plan = self._plan()
        # Scales at the start are for the inputs that a unit really has.
        shares = [(mask.sum(1).clip(1) / mask.shape[1]) ** 0.5 for mask in plan.masks[:-1]]
        weights = [w / s[:, None] for w, s in zip(net.weights, shares, strict=False)]
        biases = [b / s for b, s in zip(net.biases, shares, strict=False)]
        self.conditioner = eqx.tree_at(
            lambda net: (net.weights, net.biases),
            net,
            ((*weights, net.weights[-1]), (*biases, net.biases[-1])),
        )
        self.direct = None if plan.direct is None else jnp.zeros(plan.direct.shape)

    def _inside(self) -> str:
        return type(self.map).__name__

    def _plan(self) -> _Plan:
        net = self.conditioner
        widths = tuple(bias.shape[-1] for bias in net.biases[:-1])
        features = net.encoding.num_features
        plan = _plan(self.dim, widths, self.parents, self.context_size > 0, features)
        # The parameters of one coordinate are neighbours among the outputs.
        per_param = functools.partial(np.repeat, repeats=self.map.num_params, axis=0)
        masks = (*plan.masks[:-1], per_param(plan.masks[-1]))
        return plan._replace(
            masks=masks, direct=None if plan.direct is None else per_param(plan.direct)
        )

    def _ordered(self, value: Array) -> Array:
        return value if self.order is None else value[np.array(self.order)]

    def _restored(self, value: Array) -> Array:
        return value if self.order is None else value[np.argsort(self.order)]

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        y, log_diagonal = _forward(self._ordered(x), (self, context))
        return self._restored(y), log_diagonal.sum(0)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        args = self, context
        x = triangular_root(_solve, _forward, self._ordered(y), args)
        _, log_diagonal = _forward(x, args)
        return self._restored(x), -log_diagonal.sum(0)


def _forward(x: Array, args: tuple[MaskedAutoregressive, Any]) -> tuple[Array, Array]:
    layer, context = args
    plan, net = layer._plan(), layer.conditioner
    inputs = net.encoding.read(x)
    params = net(inputs, context, plan.masks)
    if layer.direct is not None and plan.direct is not None:
        params = params + (layer.direct * plan.direct) @ inputs
    params = params.reshape(layer.dim, layer.map.num_params, -1).swapaxes(0, 1)
    return layer.map.forward_and_log_det(x, net.encoding.mark(layer.map, params))


def _windows(
    starts: np.ndarray, width: int, firsts: np.ndarray, size: int
) -> tuple[np.ndarray, int]:
    """Which hidden units become ready within each block of ``size`` coordinates.

    :return: the first unit for each block, and one number of units for all blocks, a few of which
        may have been ready before or not be ready yet.
    """
    ends = np.append(starts, width)[firsts + size]
    count = max(1, int((ends - starts[firsts]).max()))
    return np.minimum(starts[firsts], width - count), count


def _solve(y: Array, args: tuple[MaskedAutoregressive, Any]) -> Array:
    """Coordinate by coordinate, each step computing the hidden units that became ready.

    Coordinates come in blocks. What the units of a block read of earlier blocks is one matrix
    product, made when the block begins, so that a step reads no more than its own block.
    """
    layer, context = args
    net, plan = layer.conditioner, layer._plan()
    act, n, dtype = ACTIVATIONS[net.activation], layer.map.num_params, y.dtype
    *weights, last = (w * m.astype(dtype) for w, m in zip(net.weights, plan.masks, strict=True))
    outputs = [last]
    if layer.direct is not None and plan.direct is not None:
        outputs.append(layer.direct * plan.direct)
    offsets = [bias[:, None] for bias in net.biases]
    if net.context_weight is not None and context is not None:
        offsets[0] = offsets[0] + net.context_weight @ context
    *widths, _ = (len(offset) for offset in offsets)
    dim, num_rows = layer.dim, y.shape[1]
    size = min(BLOCK, dim)
    # The last block may overlap the one before it; what it computes again comes out the same.
    firsts = np.minimum(np.arange(0, dim, size), dim - size)
    windows = [_windows(s, w, firsts, size) for s, w in zip(plan.starts, widths, strict=True)]
    starts = [jnp.asarray(start) for start in plan.starts]

    def pick(array: Array, start: Array, size: int, axis: int = 0) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, start, size, axis)

    def put(array: Array, piece: Array, start: Array, axis: int = 0) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(array, piece, start, axis)

    def split(
        weight: Array, units: tuple[Array, int], source: Array, seen: tuple[Array, int]
    ) -> tuple[Array, Array]:
        """What a window of units reads before the block, and its weights within the block."""
        strip, (start, width) = pick(weight, *units), seen
        if len(firsts) == 1:
            return jnp.zeros((1, 1), dtype), strip
        before = jnp.arange(source.shape[1])[:, None] < start
        read = strip @ jnp.where(before, source, 0).reshape(-1, num_rows)
        within = pick(strip.reshape(len(strip), *source.shape[:2]), start, width, 2)
        return read, within.reshape(len(strip), -1)

    # Values have the axes (feature, unit, row); only the inputs have more than one feature. What
    # they hold of units that are not ready is never read: the weights there are masked.
    def block(b: Array, state: Any) -> Any:
        x, inputs, sums, hidden = state
        first = jnp.asarray(firsts)[b]
        units = [(jnp.asarray(start)[b], count) for start, count in windows]
        own, params_of = (first, size), (first * n, size * n)
        sources, seen = [inputs, *hidden], [own, *units]
        parts = [
            split(w, at, source, window)
            for w, at, source, window in zip(weights, units, sources, seen, strict=False)
        ]
        ends = [
            split(w, params_of, source, window)
            for w, source, window in zip(
                outputs, (sources[-1], inputs), (seen[-1], own), strict=False
            )
        ]
        before = [
            read + pick(o, *at) for (read, _), o, at in zip(parts, offsets, units, strict=False)
        ]
        last_before = sum((read for read, _ in ends), pick(offsets[-1], *params_of))

        def step(j: Array, state: Any) -> Any:
            x, inputs, sums, hidden = state
            i, sums, hidden = first + j, list(sums), list(hidden)
            for k, (_, weight) in enumerate(parts):
                (begin, width), count = units[k], plan.counts[k]
                start = jnp.clip(starts[k][i] - begin, 0, width - count)
                source = (hidden[k - 1] if k else inputs).reshape(-1, num_rows)
                h = pick(before[k], start, count) + pick(weight, start, count) @ source
                if net.skips(k):
                    h = h + pick(sums[k - 2], start, count)
                if net.residual:
                    sums[k] = put(sums[k], h, start)
                hidden[k] = put(hidden[k], act(h)[None], start, 1)
            params = pick(last_before, j * n, n)
            for (_, weight), source in zip(ends, ([inputs, *hidden][-1], inputs), strict=False):
                params = params + pick(weight, j * n, n) @ source.reshape(-1, num_rows)
            encoding = net.encoding.at(i)
            x_i, _ = layer.map.inverse_and_log_det(
                pick(y, i, 1), encoding.mark(layer.map, params[:, None])
            )
            inputs = put(inputs, encoding.read(x_i)[:, None], j, 1)
            return put(x, x_i, i), inputs, sums, hidden

        parts_of_block = (
            pick(inputs, *own, 1),
            [pick(h, *at) for h, at in zip(sums, units, strict=False)],
            [pick(h, *at, 1) for h, at in zip(hidden, units, strict=True)],
        )
        x, new, new_sums, new_hidden = jax.lax.fori_loop(0, size, step, (x, *parts_of_block))
        return (
            x,
            put(inputs, new, first, 1),
            [put(h, p, at[0]) for h, p, at in zip(sums, new_sums, units, strict=False)],
            [put(h, p, at[0], 1) for h, p, at in zip(hidden, new_hidden, units, strict=True)],
        )

    inputs = jnp.zeros((net.encoding.num_features, dim, num_rows), dtype)
    sums = [jnp.zeros((width, num_rows), dtype) for width in widths] if net.residual else []
    hidden = [jnp.zeros((1, width, num_rows), dtype) for width in widths]
    state = jnp.zeros_like(y), inputs, sums, hidden
    return jax.lax.fori_loop(0, len(firsts), block, state)[0]
