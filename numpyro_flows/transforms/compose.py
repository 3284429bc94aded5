"""Composition: a chain of parts, a scan over layers of one structure, independent copies."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions.constraints import Constraint

from ..checks import check_size
from ..transform import FlowTransform, Wrapper, in_columns

Step: TypeAlias = Callable[[Array, Array | None], tuple[Array, Array]]


class Chain(FlowTransform):
    r"""Composition :math:`y = T_n(\dots T_1(x))`, log-determinants added up.

    The context goes to the parts that take one. Cost: the sum of the parts' costs; compile time
    grows with their number, for equal parts use :class:`Scan`.

    :param parts: transforms in the order they are applied; each ``out_shape`` must be the next
        ``event_shape``, and all that take a context must take the same width.
    :raises ValueError: for no parts, or parts that do not fit together.
    :raises TypeError: for a part that is not a ``FlowTransform``.

    >>> import jax, numpyro_flows as nf
    >>> t = nf.realnvp(jax.random.key(0), 2).transform
    >>> nf.transforms.Chain([t, t.inv])
    Chain(8 x Coupling(Affine) -> Inverse(8 x Coupling(Affine)), event_shape=(2,), parameters=70688)
    """

    parts: tuple[FlowTransform, ...]

    def __init__(self, parts: Sequence[FlowTransform]):
        self.parts = tuple(parts)
        if not self.parts:
            raise ValueError("Chain: expected at least one transform, got none.")
        for part in self.parts:
            if not isinstance(part, FlowTransform):
                raise TypeError(
                    f"Chain: expected FlowTransforms, got {type(part).__name__}. "
                    "Wrap a NumPyro transform as "
                    "`nf.transforms.NumPyroTransform(transform, event_shape)`."
                )
        for first, second in zip(self.parts, self.parts[1:], strict=False):
            if first.out_shape != second.event_shape:
                raise ValueError(
                    f"Chain: {type(first).__name__} returns events of shape {first.out_shape}, "
                    f"but {type(second).__name__} after it expects {second.event_shape}."
                )
        widths = {part.context_dim for part in self.parts} - {0}
        if len(widths) > 1:
            raise ValueError(
                f"Chain: the parts expect contexts of different widths {sorted(widths)}."
            )

    @property
    def outline(self) -> str:
        return self._inside()

    def _inside(self) -> str:
        return " -> ".join(part.outline for part in self.parts)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.parts[0].event_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.parts[-1].out_shape

    @property
    def context_dim(self) -> int:
        return max(part.context_dim for part in self.parts)

    @property
    def domain(self) -> Constraint:
        return self.parts[0].domain

    @property
    def codomain(self) -> Constraint:
        return self.parts[-1].codomain

    def _through(
        self,
        parts: Iterable[FlowTransform],
        step_of: Callable[[FlowTransform], Step],
        value: Array,
        context: Array | None,
    ) -> tuple[Array, Array]:
        """The parts in turn, each by one of its methods."""
        total: Array | float = 0.0
        for part in parts:
            value, log_det = step_of(part)(value, context if part.context_dim else None)
            total = total + log_det
        return value, jnp.asarray(total)

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._through(self.parts, lambda part: part.forward_and_log_det, x, context)

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._through(self.parts[::-1], lambda part: part.inverse_and_log_det, y, context)

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._through(self.parts, lambda part: part.forward_columns, x, context)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._through(self.parts[::-1], lambda part: part.inverse_columns, y, context)

    def initialized(
        self, value: Array, context: Array | None, forward: bool
    ) -> tuple[FlowTransform, Array]:
        order = 1 if forward else -1
        parts = []
        for part in self.parts[::order]:
            part, value = part.initialized(value, context if part.context_dim else None, forward)
            parts.append(part)
        return Chain(parts[::order]), value


def _permuted(value: Array, orders: Any, axis: int) -> Array:
    """``value`` reordered along its axis 0 or -1; ``orders`` are a permutation and its inverse.

    The transpose of indexing is a scatter, one row after the other; that of a permutation is
    indexing by its inverse. JAX is told so through a linear system whose solution is the result.
    """
    if orders is None:
        return value

    def indexed(order: Array) -> Callable[[Array], Array]:
        index = order if axis == 0 else (..., order)
        return lambda v: v.at[index].get(mode="promise_in_bounds", unique_indices=True)

    there, back = (indexed(order) for order in orders)
    return jax.lax.custom_linear_solve(
        back, value, lambda _, b: there(b), transpose_solve=lambda _, b: back(b)
    )


#: Layers of at least ``LARGE`` numbers each, if they are at most ``FEW``, run unrolled.
LARGE, FEW = 2**16, 8


class Scan(FlowTransform):
    r"""Equal layers, each followed by a permutation: :math:`y = P_n T_n \dots P_1 T_1(x)`.

    The layers are one transform whose leaves carry a leading layer axis, and run under
    ``jax.lax.scan``: compile time and program size do not grow with their number. A few large
    layers are unrolled in the forward direction. Permutations differ between layers but are no
    parameters; they are scanned as constants.

    :param layers: a transform whose events keep their shape, its leaves stacked along a leading
        axis, as ``jax.vmap`` of a constructor returns it.
    :param permutations: one permutation of ``range(dim)`` per layer, dim the size of the events'
        last axis (a vector's coordinates, an image's channels): entry ``i`` after the layer is
        entry ``permutation[i]`` before it. None for layers that mix by themselves:
        :math:`y = T_n \dots T_1(x)`.
    :raises ValueError: if a permutation is not one of ``range(dim)``, the numbers of layers and
        permutations differ, or there are neither permutations nor leaves to count layers by.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> layers = jax.vmap(lambda key: nf.transforms.Radial(key, 2))(keys)
    >>> nf.transforms.Scan(layers, None).forward_and_log_det(jnp.zeros((4, 2)))[1].shape
    (4,)
    """

    layers: FlowTransform
    permutations: tuple[tuple[int, ...], ...] | None = eqx.field(static=True)

    def __init__(self, layers: FlowTransform, permutations: Sequence[Sequence[int]] | None = None):
        self.layers = layers
        if layers.out_shape != layers.event_shape:
            raise ValueError(
                "Scan: expected layers that map events to events of the same shape, got "
                f"{layers.event_shape} to {layers.out_shape}."
            )
        leading = [jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(layers)]
        if permutations is None:
            self.permutations = None
            if not any(leading):
                raise ValueError(
                    "Scan: expected leaves with a leading axis, whose size is the number of "
                    f"layers, got {len(leading)} leaves without one. Build the layers under "
                    "`jax.vmap`, or pass one permutation per layer."
                )
            num_layers = check_size("Scan: number of layers", *max(leading))
        else:
            self.permutations = tuple(tuple(int(i) for i in p) for p in permutations)
            num_layers = check_size("Scan: number of permutations", len(self.permutations))
        for permutation in self.permutations or ():
            if sorted(permutation) != list(range(layers.event_shape[-1])):
                raise ValueError(
                    f"Scan: expected permutations of range({layers.event_shape[-1]}), "
                    f"got {permutation}."
                )
        for leaf in jax.tree.leaves(layers):
            if jnp.shape(leaf)[:1] != (num_layers,):
                raise ValueError(
                    f"Scan: every leaf needs a leading axis of {num_layers} layers, "
                    f"got a leaf of shape {jnp.shape(leaf)}. Build the layers under `jax.vmap`."
                )

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        if self.permutations is not None:
            return len(self.permutations)
        return max(len(leaf) for leaf in jax.tree.leaves(self.layers))

    @property
    def outline(self) -> str:
        return self._inside()

    def _inside(self) -> str:
        layer = self.layers.outline
        return f"{self.num_layers} x {f'({layer})' if ' -> ' in layer else layer}"

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.layers.event_shape

    @property
    def context_dim(self) -> int:
        return self.layers.context_dim

    def _steps(self, forward: bool) -> tuple[FlowTransform, Any]:
        """The layers and what orders the coordinates before each, as the scan slices them."""
        if self.permutations is None:
            return self.layers, None
        orders = np.array(self.permutations)
        if forward:
            # Before the next layer, not after this one: a layer's arithmetic, fused into an
            # indexing, is not vectorised.
            orders = np.concatenate([np.arange(orders.shape[1])[None], orders[:-1]])
        inverse = np.argsort(orders, axis=-1)
        return self.layers, (orders, inverse) if forward else (inverse, orders)

    def _unroll(self, forward: bool) -> bool:
        """Whether to spare the copies of weights and residuals that a loop makes, at the price of
        compiling every layer; an inverse may be a loop itself, long to compile."""
        leaves = jax.tree.leaves(self.layers)
        num_layers = max((len(leaf) for leaf in leaves), default=0)
        size = sum(jnp.size(leaf) for leaf in leaves)
        return forward and 0 < num_layers <= FEW and size >= LARGE * num_layers

    def _ordered(self, value: Array, forward: bool, axis: int) -> Array:
        """``value`` after the scan: the last permutation follows the last layer."""
        if self.permutations is None or not forward:
            return value
        last = np.array(self.permutations[-1])
        return _permuted(value, (last, np.argsort(last)), axis)

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return in_columns(self.forward_columns, x, context, len(self.event_shape))

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return in_columns(self.inverse_columns, y, context, len(self.event_shape))

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._through(x, context, True)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._through(y, context, False)

    def _through(self, value: Array, context: Array | None, forward: bool) -> tuple[Array, Array]:
        def step(carry: Any, scanned: Any) -> Any:
            value, total = carry
            layer, orders = scanned
            through = layer.forward_columns if forward else layer.inverse_columns
            value, log_det = through(_permuted(value, orders, 0), context)
            return (value, total + log_det), None

        start = (value, jnp.zeros(value.shape[-1:], value.dtype))
        (value, total), _ = jax.lax.scan(
            step, start, self._steps(forward), reverse=not forward, unroll=self._unroll(forward)
        )
        return self._ordered(value, forward, 0), total

    def initialized(
        self, value: Array, context: Array | None, forward: bool
    ) -> tuple[FlowTransform, Array]:
        def step(value: Any, scanned: Any) -> Any:
            layer, orders = scanned
            layer, value = layer.initialized(_permuted(value, orders, -1), context, forward)
            return value, layer

        value, layers = jax.lax.scan(step, value, self._steps(forward), reverse=not forward)
        return Scan(layers, self.permutations), self._ordered(value, forward, -1)


class Stacked(Wrapper):
    """Independent copies of one transform along a batch axis, one per entry of that axis.

    What ``jax.vmap`` or a scan makes of a transform it returns: every leaf has a leading axis of
    ``n`` copies. Values have shape ``(*sample, n, *batch, *event_shape)`` with ``batch_ndim`` axes
    in ``batch``. Cost: n passes, vectorised.

    :param transform: a transform without context whose leaves are stacked.
    :param batch_ndim: number of batch axes that the copies share, right of their axis.
    :raises ValueError: for a transform that still waits for a context.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> copies = jax.vmap(lambda key: nf.transforms.Radial(key, 2))(keys)
    >>> nf.transforms.Stacked(copies, 0).forward_and_log_det(jnp.zeros((4, 3, 2)))[1].shape
    (4, 3)
    """

    batch_ndim: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        if self.transform.context_dim:
            raise ValueError("Stacked: bind the context before stacking (`Conditioned`).")

    def _map(
        self, step: Callable, value: Array, in_ndim: int, out_ndim: int
    ) -> tuple[Array, Array]:
        axis = -1 - self.batch_ndim
        return jax.vmap(step, in_axes=(0, axis - in_ndim), out_axes=(axis - out_ndim, axis))(
            self.transform, value
        )

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        ndims = len(self.event_shape), len(self.out_shape)
        return self._map(lambda t, v: t.forward_and_log_det(v), x, *ndims)

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        ndims = len(self.out_shape), len(self.event_shape)
        return self._map(lambda t, v: t.inverse_and_log_det(v), y, *ndims)
