"""The conditioner networks: small, batched, and a plain pytree of arrays.

:class:`MLP` differs from ``equinox.nn.MLP`` where flows need it: every leaf is an array (the
activation is a name), it acts on a batch without ``vmap``, it takes a context whose contribution
is computed once however many rows share it, and its last layer starts at zero.

Inside a layer, coordinates come first and the batch last, ``(coordinates, rows)``: the gradient
of a weight is then a product of two contiguous matrices, which made training steps on CPU a
quarter faster than the batch-first layout, and splitting coordinates costs nothing.
:func:`columns` and :func:`rows` go to that layout and back.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .checks import check_event_shape

ACTIVATIONS: Final[dict[str, Callable[[Array], Array]]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
}


def drawn(
    sample: Callable[[Array, tuple[int, ...]], Array], key: Array, shapes: Sequence[tuple[int, ...]]
) -> list[Array]:
    """Random arrays of the given shapes, by one call of ``sample(key, shape)``.

    A generator takes longer to compile than what is done with its numbers; a network with one for
    each of its arrays takes seconds.
    """
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(sample(key, (ends[-1],)), ends[:-1]) if shapes else []
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


class MLP(eqx.Module):
    r"""Multilayer perceptron :math:`h_{i+1} = \phi(W_i h_i + b_i)`, linear in its last layer.

    A context :math:`c` enters the first layer, :math:`h_1 = \phi(W_0 x + V c + b_0)`. With
    ``residual``, each hidden width is a block of two layers beside a stream that the first layer
    opens, :math:`s_{i+1} = s_i + W'_i \phi(W_i \phi(s_i) + b_i) + b'_i` (He et al., 2016,
    arXiv:1603.05027, fig. 4e).

    Hidden weights start at :math:`N(0, 2 / \text{fan-in})` (He et al., 2015, arXiv:1502.01852,
    eq. 10), hidden biases uniform on :math:`\pm 1 / \sqrt{\text{fan-in}}` (else a network of one
    input has all its kinks at 0), and the whole last layer at zero, so a new network returns zeros.

    :param key: ``jax.random.key`` for the initial weights.
    :param in_size: width of ``x``; 0 is allowed (the output then depends on the context alone).
    :param out_size: width of the result.
    :param hidden: widths of the hidden layers; with ``residual`` of the blocks, all equal.
    :param context_size: width of the context, 0 for none.
    :param activation: one of ``ACTIVATIONS``.
    :param residual: whether the hidden layers are residual blocks.

    Calling it: ``x`` of shape ``(in_size, rows)`` and ``context`` of shape
    ``(context_size, rows)`` or ``(context_size, 1)`` to ``(out_size, rows)``; ``masks``, if any,
    multiply the weights, one of each weight's shape. Cost: one matrix product per layer.

    :raises ValueError: for an unknown activation or a negative size.

    >>> import jax, jax.numpy as jnp
    >>> net = MLP(jax.random.key(0), 3, 2, hidden=(8,))
    >>> net(jnp.ones((3, 5))).shape
    (2, 5)
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    context_weight: Array | None
    activation: str = eqx.field(static=True)
    residual: bool = eqx.field(static=True, default=False)

    def __init__(
        self,
        key: Array,
        in_size: int,
        out_size: int,
        *,
        hidden: Sequence[int] = (64, 64),
        context_size: int = 0,
        activation: str = "relu",
        residual: bool = False,
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Unknown activation {activation!r}. Expected one of {sorted(ACTIVATIONS)}."
            )
        if any(not isinstance(width, int) or width < 1 for width in hidden):
            raise ValueError(
                f"hidden: expected positive integers, one width per hidden layer, got {hidden!r}."
            )
        if residual and len(set(hidden)) != 1:
            raise ValueError(
                f"hidden: expected one or more equal widths for residual blocks, got {hidden!r}."
            )
        self.residual = residual
        widths = (hidden[0],) * (1 + 2 * len(hidden)) if residual else tuple(hidden)
        sizes = (in_size, *widths, out_size)
        weight_key, bias_key = jax.random.split(key)
        # x and the context are two blocks of one input, so they share its fan-in.
        fan_ins = (in_size + context_size, *widths)
        scales = [(2.0 / max(fan_in, 1)) ** 0.5 for fan_in in fan_ins[:-1]] + [0.0]
        bounds = [max(fan_in, 1) ** -0.5 for fan_in in fan_ins[:-1]]
        shapes = list(zip(sizes[1:], sizes, strict=False))
        *weights, context_weight = drawn(
            jax.random.normal, weight_key, [*shapes[:-1], (sizes[1], context_size)]
        )
        biases = drawn(
            partial(jax.random.uniform, minval=-1.0), bias_key, [(width,) for width in widths]
        )
        self.weights = (
            *(scale * weight for scale, weight in zip(scales, weights, strict=False)),
            jnp.zeros(shapes[-1]),
        )
        self.biases = (
            *(bound * bias for bound, bias in zip(bounds, biases, strict=True)),
            jnp.zeros(out_size),
        )
        self.context_weight = scales[0] * context_weight if context_size else None
        self.activation = activation

    def skips(self, layer: int) -> bool:
        """Whether a layer's result is added to that of two layers before: the end of a block."""
        return self.residual and layer % 2 == 0 and 0 < layer < len(self.weights) - 1

    def __call__(
        self, x: Array, context: Array | None = None, masks: Sequence[np.ndarray] | None = None
    ) -> Array:
        act = ACTIVATIONS[self.activation]

        def linear(layer: int, h: Array) -> Array:
            weight, bias = self.weights[layer], self.biases[layer][:, None]
            if masks is None:
                return weight @ h + bias
            return masked_product(weight, masks[layer], h) + bias

        h = linear(0, x)
        if self.context_weight is not None and context is not None:
            h = h + self.context_weight @ context
        stream = h
        for layer in range(1, len(self.weights)):
            h = linear(layer, act(h))
            if self.skips(layer):
                stream = h = stream + h
        return h


def masked_product(weight: Array, mask: np.ndarray, h: Array) -> Array:
    """``(weight * mask) @ h`` for a 0/1 mask, with less work than a dense product.

    Units of a masked network are sorted by what they see, so its masks are block triangular: the
    first rows need the first columns alone. Large products are made of four blocks of rows, which
    leaves out three eighths of a triangular one; the products of the gradient, whose pieces have to
    be added up again, of two.

    :param weight: shape ``(out, in)``.
    :param mask: NumPy array of the same shape, known when a program is made.
    :param h: shape ``(in, rows)``.
    :return: shape ``(out, rows)``.

    >>> import jax.numpy as jnp, numpy as np
    >>> masked_product(jnp.ones((2, 2)), np.tril(np.ones((2, 2))), jnp.ones((2, 1)))
    Array([[1.],
           [2.]], dtype=float32)
    """
    many = 4 if mask.size >= LARGE_MASK else 1
    blocks = _blocks(mask, many), _blocks(mask, 2)
    return _masked_product(blocks, weight, jnp.asarray(mask, weight.dtype), h)


#: Size of a mask from which on several products are faster than one.
LARGE_MASK = 2**14

Blocks = tuple[tuple[int, int, int], ...]


def _blocks(mask: np.ndarray, num: int) -> Blocks:
    """First row, last row and number of columns of each block of rows."""
    edges = [len(mask) * i // num for i in range(num + 1)]
    widths = [1 + int(np.flatnonzero(mask[:stop].any(0)).max(initial=0)) for stop in edges[1:]]
    return tuple(
        (start, stop, width)
        for start, stop, width in zip(edges, edges[1:], widths, strict=False)
        if start < stop
    )


def _product(blocks: Blocks, weight: Array, h: Array) -> Array:
    pieces = [weight[start:stop, :width] @ h[:width] for start, stop, width in blocks]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _masked_product(blocks: tuple[Blocks, Blocks], weight: Array, mask: Array, h: Array) -> Array:
    return _product(blocks[0], weight * mask, h)


@_masked_product.defjvp
def _masked_product_jvp(blocks: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (weight, mask, h), (weight_dot, _, h_dot) = primals, tangents
    _, halves = blocks
    out_dot = _product(halves, weight_dot * mask, h) + _product(halves, weight * mask, h_dot)
    return _masked_product(blocks, *primals), out_dot


def full_product(matrix: Array, value: Array) -> Array:
    """A matrix product in full precision, for maps whose inverse uses the same matrix.

    An accelerator's reduced default would leave their round trip with the few digits it keeps.
    """
    return jnp.matmul(matrix, value, precision="highest")


class ConcatSquash(eqx.Module):
    r"""The vector field of a continuous flow: an MLP whose layers time and context gate and shift.

    .. math:: h_{i+1} = \phi\left((W_i h_i + b_i) \odot \sigma(G_i s + g_i) + H_i s\right),
              \quad s = (t, c)

    The last layer has no :math:`\phi` and starts at zero, :math:`H` included: a new field stands
    still. Initial weights are those of :class:`MLP`.

    Source: Grathwohl et al. (2019), arXiv:1810.01367, the layer ``concatsquash`` of its code.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: width of ``z`` and of the result.
    :param hidden: widths of the hidden layers.
    :param context_size: width of the context, 0 for none.
    :param activation: one of ``ACTIVATIONS``; a field must be smooth for its equation to be solved
        to high order, so not ``"relu"`` or ``"elu"``.

    Calling it, for one row: ``t`` a scalar, ``z`` of shape ``(dim,)``, ``context``
    ``(context_size,)`` or None, to ``(dim,)``. Cost: one product with each weight.

    :raises ValueError: for an unknown activation or a negative size.

    >>> import jax, jax.numpy as jnp
    >>> ConcatSquash(jax.random.key(0), 2, hidden=(8,))(jnp.zeros(()), jnp.ones(2))
    Array([0., 0.], dtype=float32)
    """

    net: MLP
    gates: tuple[Array, ...]
    gate_biases: tuple[Array, ...]
    shifts: tuple[Array, ...]

    def __init__(
        self,
        key: Array,
        dim: int,
        *,
        hidden: Sequence[int] = (64, 64),
        context_size: int = 0,
        activation: str = "tanh",
    ):
        net_key, key = jax.random.split(key)
        self.net = MLP(net_key, dim, dim, hidden=hidden, activation=activation)
        sizes = [*hidden, dim]
        scale = (1 + context_size) ** -0.5
        shapes = [(size, 1 + context_size) for size in sizes]
        draws = [scale * draw for draw in drawn(jax.random.normal, key, shapes * 2)]
        self.gates, shifts = tuple(draws[: len(sizes)]), draws[len(sizes) :]
        self.gate_biases = tuple(jnp.zeros(size) for size in sizes)
        self.shifts = (*shifts[:-1], jnp.zeros(shapes[-1]))

    def __call__(self, t: Array, z: Array, context: Array | None = None) -> Array:
        act = ACTIVATIONS[self.net.activation]
        s = t[None] if context is None else jnp.concatenate([t[None], context])
        h = z
        for i, (weight, bias) in enumerate(zip(self.net.weights, self.net.biases, strict=True)):
            gate = jax.nn.sigmoid(self.gates[i] @ s + self.gate_biases[i])
            h = (weight @ (act(h) if i else h) + bias) * gate + self.shifts[i] @ s
        return h


class Parameters(eqx.Module):
    """The numbers of a layer: learned ones, to which a network adds what the context asks for.

    :param key: ``jax.random.key`` for the network.
    :param value: initial numbers, shape ``(n,)``.
    :param context_size: width of the context; 0 for none, and then there is no network.
    :param hidden: widths of the network's hidden layers.
    :param activation: name of its activation.

    Calling it with a context ``(context_size, rows)`` gives ``(n, rows)``, without one ``(n, 1)``.

    >>> import jax, jax.numpy as jnp
    >>> Parameters(jax.random.key(0), jnp.zeros(2), context_size=3)(jnp.ones((3, 5))).shape
    (2, 5)
    """

    value: Array
    net: MLP | None

    def __init__(
        self,
        key: Array,
        value: Array,
        *,
        context_size: int = 0,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
    ):
        self.value = value
        self.net = (
            MLP(key, context_size, len(value), hidden=hidden, activation=activation)
            if context_size
            else None
        )

    def __call__(self, context: Array | None = None) -> Array:
        value = self.value[:, None]
        return value if self.net is None or context is None else value + self.net(context)


class Embedding(eqx.Module):
    """A network from a pytree of arrays to a vector: all leaves, concatenated, through an MLP.

    :param key: ``jax.random.key`` for the initial weights.
    :param example: one context: a pytree of arrays (or of their shapes, ``jax.ShapeDtypeStruct``)
        without batch axes.
    :param out_size: width of the vector.
    :param hidden: widths of the hidden layers.
    :param activation: name of the activation.

    Calling it: leaves of shapes ``(*batch, *shape)`` to ``(*batch, out_size)``.

    :raises ValueError: for a context of another structure or of shapes that do not end in the
        example's.

    >>> import jax, jax.numpy as jnp
    >>> example = {"dose": jnp.zeros(()), "curve": jnp.zeros(5)}
    >>> network = Embedding(jax.random.key(0), example, 3, hidden=(8,))
    >>> network({"dose": jnp.ones(4), "curve": jnp.ones((4, 5))}).shape
    (4, 3)
    """

    net: MLP
    names: tuple[str, ...] = eqx.field(static=True)
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    def __init__(
        self,
        key: Array,
        example: Any,
        out_size: int,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
    ):
        leaves, self.names = _named_leaves(example)
        self.shapes = tuple(tuple(jnp.shape(leaf)) for leaf in leaves)
        width = sum(math.prod(shape) for shape in self.shapes)
        first, last = jax.random.split(key)
        net = MLP(first, width, out_size, hidden=hidden, activation=activation)
        # An MLP starts at zero; an embedding that did would pass no gradient on.
        shape = net.weights[-1].shape
        weight = jax.random.normal(last, shape) / shape[1] ** 0.5
        self.net = eqx.tree_at(lambda net: net.weights[-1], net, weight)

    def __call__(self, context: Any) -> Array:
        leaves, names = _named_leaves(context)
        if names != self.names:
            raise ValueError(f"context: expected the arrays {self.names}, got {names}.")
        batches = []
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            check_event_shape("context", jnp.shape(leaf), shape)
            batches.append(jnp.shape(leaf)[: jnp.ndim(leaf) - len(shape)])
        batch = jnp.broadcast_shapes(*batches)
        x = jnp.concatenate(
            [
                jnp.broadcast_to(leaf, batch + shape).reshape(*batch, math.prod(shape))
                for leaf, shape in zip(leaves, self.shapes, strict=True)
            ],
            axis=-1,
        )
        return rows(self.net(columns(x, batch)), batch)


def _named_leaves(tree: Any) -> tuple[list[Any], tuple[str, ...]]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [leaf for _, leaf in paths], tuple(jax.tree_util.keystr(path) for path, _ in paths)


def above_minus_one(raw: Array) -> Array:
    r"""Smooth increasing map of the reals onto :math:`(-1 + \delta, \infty)`, 0 to exactly 0.

    :math:`m(a) = \mathrm{softplus}(a + c) - \mathrm{softplus}(c)` with
    :math:`\mathrm{softplus}(c) = 1 - \delta`: what keeps :math:`1 + m h'` positive for
    :math:`0 \le h' \le 1`. With :math:`\delta = 0.01` a layer can contract a direction by no more
    than 100, and float32 keeps its inverse.
    """
    c = math.log(math.expm1(1 - 0.01))
    share = 1 / (1 + math.exp(-c))
    # log((1 + e^(a + c)) / (1 + e^c)), written so that neither end overflows nor cancels.
    above = raw > 0
    decay = jnp.expm1(jnp.where(above, -raw, raw))
    return jnp.where(above, raw, 0) + jnp.log1p(jnp.where(above, 1 - share, share) * decay)


def columns(value: Array, batch: tuple[int, ...]) -> Array:
    """``(*any, n)`` to ``(n, rows)``; a value without batch axes becomes the one column ``(n, 1)``.

    A single context thus stays a single column, and its share of the network is computed once.
    """
    if value.ndim > 1:
        value = jnp.broadcast_to(value, batch + value.shape[-1:])
    return value.reshape(math.prod(value.shape[:-1]), value.shape[-1]).T


def rows(value: Array, batch: tuple[int, ...]) -> Array:
    """``(n, rows)`` back to ``(*batch, n)``."""
    return value.T.reshape(batch + value.shape[:1])
