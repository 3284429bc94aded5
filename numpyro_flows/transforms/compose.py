"""Composition: a chain of parts, a scan over layers of one structure, independent copies."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions.constraints import Constraint

from ..checks import check_size
from ..transform import FlowTransform


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
    >>> nf.Chain([t, t.inv]).event_shape
    (2,)
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
                    "Wrap a NumPyro transform as `nf.NumPyroTransform(transform, event_shape)`."
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

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        total: Array | float = 0.0
        for part in self.parts:
            x, log_det = part.forward_and_log_det(x, context if part.context_dim else None)
            total = total + log_det
        return x, jnp.asarray(total)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        total: Array | float = 0.0
        for part in reversed(self.parts):
            y, log_det = part.inverse_and_log_det(y, context if part.context_dim else None)
            total = total + log_det
        return y, jnp.asarray(total)


class Scan(FlowTransform):
    r"""Equal layers, each followed by a permutation: :math:`y = P_n T_n \dots P_1 T_1(x)`.

    The layers are one transform whose leaves carry a leading layer axis, and run under
    ``jax.lax.scan``: compile time and program size do not grow with their number. Permutations
    differ between layers but are no parameters; they are scanned as constants.

    :param layers: a transform of event shape ``(dim,)``, its leaves stacked along a leading axis,
        as ``jax.vmap`` of a constructor returns it.
    :param permutations: one permutation of ``range(dim)`` per layer: coordinate ``i`` after the
        layer is coordinate ``permutation[i]`` before it.
    :raises ValueError: if a permutation is not one of ``range(dim)``, or the numbers of layers and
        permutations differ.
    """

    layers: FlowTransform
    permutations: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    def __init__(self, layers: FlowTransform, permutations: Sequence[Sequence[int]]):
        self.layers = layers
        self.permutations = tuple(tuple(int(i) for i in p) for p in permutations)
        check_size("Scan: number of permutations", len(self.permutations))
        if len(layers.event_shape) != 1 or layers.out_shape != layers.event_shape:
            raise ValueError(
                "Scan: expected layers that map vectors to vectors of the same size, got "
                f"{layers.event_shape} to {layers.out_shape}."
            )
        for permutation in self.permutations:
            if sorted(permutation) != list(range(layers.event_shape[0])):
                raise ValueError(
                    f"Scan: expected permutations of range({layers.event_shape[0]}), "
                    f"got {permutation}."
                )
        for leaf in jax.tree.leaves(layers):
            if jnp.shape(leaf)[:1] != (len(self.permutations),):
                raise ValueError(
                    f"Scan: every leaf needs a leading axis of {len(self.permutations)} layers, "
                    f"got a leaf of shape {jnp.shape(leaf)}. Build the layers under `jax.vmap`."
                )

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.layers.event_shape

    @property
    def context_dim(self) -> int:
        return self.layers.context_dim

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        def step(carry, scanned):
            x, total = carry
            layer, permutation = scanned
            y, log_det = layer.forward_and_log_det(x, context)
            return (y[..., permutation], total + log_det), None

        start = (x, jnp.zeros(x.shape[:-1], x.dtype))
        return jax.lax.scan(step, start, (self.layers, np.array(self.permutations)))[0]

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        def step(carry, scanned):
            y, total = carry
            layer, permutation = scanned
            x, log_det = layer.inverse_and_log_det(y[..., permutation], context)
            return (x, total + log_det), None

        start = (y, jnp.zeros(y.shape[:-1], y.dtype))
        inverses = np.argsort(np.array(self.permutations), axis=-1)
        return jax.lax.scan(step, start, (self.layers, inverses), reverse=True)[0]


class Stacked(FlowTransform):
    """Independent copies of one transform along a batch axis, one per entry of that axis.

    What ``jax.vmap`` or a scan makes of a transform it returns: every leaf has a leading axis of
    ``n`` copies. Values have shape ``(*sample, n, *batch, *event_shape)`` with ``batch_ndim`` axes
    in ``batch``. Cost: n passes, vectorised.

    :param transform: a transform without context whose leaves are stacked.
    :param batch_ndim: number of batch axes that the copies share, right of their axis.
    :raises ValueError: for a transform that still waits for a context.
    """

    transform: FlowTransform
    batch_ndim: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if self.transform.context_dim:
            raise ValueError("Stacked: bind the context before stacking (`Conditioned`).")

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.transform.event_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.transform.out_shape

    @property
    def codomain(self) -> Constraint:
        return self.transform.codomain

    def _map(self, step, value: Array, in_ndim: int, out_ndim: int) -> tuple[Array, Array]:
        axis = -1 - self.batch_ndim
        return jax.vmap(step, in_axes=(0, axis - in_ndim), out_axes=(axis - out_ndim, axis))(
            self.transform, value
        )

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        ndims = len(self.event_shape), len(self.out_shape)
        return self._map(lambda t, v: t.forward_and_log_det(v), x, *ndims)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        ndims = len(self.out_shape), len(self.event_shape)
        return self._map(lambda t, v: t.inverse_and_log_det(v), y, *ndims)
