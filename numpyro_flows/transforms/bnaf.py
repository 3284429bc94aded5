"""Block neural autoregressive layer: a network that is itself the bijection."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import check_size
from ..nn import Parameters, above_minus_one, drawn
from ..solve import monotone_root, triangular_root
from ..transform import ColumnTransform

LOG_SCALE_BOUND = 4.0
#: The slope of f is far below its bound nearly everywhere, so g bends little before it is in the
#: tens: a parameter stands for so many of it, else it takes training long to get there.
GAIN = 100.0


class BlockAutoregressive(ColumnTransform):
    r"""Block neural autoregressive layer, bijective on all of :math:`\mathbb{R}^d`.

    .. math:: y_i = e^{s_i} \left(x_i + g_i \frac{f_i(x_{\le i})}{\max f_i'}\right) + t_i(x_{<i})

    f and t are the outputs of one tanh network with block-triangular weights: every coordinate has
    units of its own; weights between units of one coordinate are positive (:math:`e^w`), so that
    :math:`f_i` increases in :math:`x_i`, and units see those of earlier coordinates through
    unconstrained weights. De Cao's layer is the sum's second part alone. Bounded as tanh makes
    it, that part does not reach all of the reals; with :math:`x_i` beside it the layer does, and
    :math:`g_i > -1`, zero at first, makes it the identity at the start. :math:`\max f_i'` is the
    bound that the weights imply.

    The Jacobian is triangular with diagonal :math:`e^{s_i} (1 + g_i f_i' / \max f_i')`. Forward
    costs one pass of the network. The inverse goes coordinate by coordinate and computes each
    unit once, about one pass for all, plus one scalar equation per coordinate through that
    coordinate's own units, to rounding error; gradients are implicit. :math:`s_i` is bounded by 4,
    and a layer contracts by at most 100 beside it.

    Source: De Cao, Titov & Aziz (2019), arXiv:1904.04676, eq. 8-12; identity part, gate and
    inverse are ours.

    :param key: ``jax.random.key`` for the network.
    :param dim: number of coordinates; x and y have shape ``(*batch, dim)``.
    :param hidden_factors: units per coordinate of each hidden layer.
    :param context_dim: width of the context, 0 for none; it enters the first layer, and a
        network of widths ``hidden`` lets s, g and t depend on it.
    :param hidden: widths of that network.
    :raises ValueError: for sizes below 1 or no hidden layer.

    >>> import jax, jax.numpy as jnp
    >>> layer = BlockAutoregressive(jax.random.key(0), 2)
    >>> layer.inv(layer(jnp.array([1.0, -3.0])))
    Array([ 1., -3.], dtype=float32)
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    last: Array
    context_weight: Array | None
    params: Parameters

    def __init__(
        self,
        key: Array,
        dim: int,
        *,
        hidden_factors: Sequence[int] = (8, 8),
        context_dim: int = 0,
        hidden: Sequence[int] = (64, 64),
    ):
        self._set_sizes(dim, context_dim)
        if not hidden_factors:
            raise ValueError("hidden_factors: expected at least one hidden layer, got none.")
        factors = (1, *(check_size("hidden_factors", f) for f in hidden_factors))
        draws_key, params_key = jax.random.split(key)
        pairs = [*itertools.pairwise(factors), (factors[-1], 1)]
        own_masks = [_masks(dim, before, after)[0] for before, after in pairs]
        width = dim * factors[1]
        shapes = [own.shape for own in own_masks] + [(dim * after,) for after in factors[1:]]
        *draws, context_weight = drawn(
            jax.random.normal, draws_key, [*shapes, (width, context_dim)]
        )
        weights = []
        for (before, after), own, noise in zip(pairs[:-1], own_masks, draws, strict=False):
            # Unit i sees `before * i` earlier units; its own weights start near 1 / before.
            earlier = before * np.repeat(np.arange(dim), after)[:, None]
            weights.append(
                jnp.where(own > 0, 0.5 * noise - np.log(before), noise / np.sqrt(earlier.clip(1)))
            )
        self.weights, self.biases = tuple(weights), tuple(draws[len(pairs) :])
        self.last = jnp.asarray(own_masks[-1]) * 0.5 * draws[len(weights)]
        self.context_weight = context_weight / context_dim**0.5 if context_dim else None
        self.params = Parameters(
            params_key, jnp.zeros(3 * dim), context_size=context_dim, hidden=hidden
        )

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        y, log_diagonal = _forward(x, (self, context))
        return y, log_diagonal.sum(0)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        x = triangular_root(_solve, _forward, y, (self, context))
        _, log_diagonal = _forward(x, (self, context))
        return x, -log_diagonal.sum(0)

    def _own(self) -> list[Array]:
        """The positive weights of each coordinate, ``(dim, after, before)`` per layer."""
        blocks = []
        for w in (*self.weights, self.last):
            after, before = w.shape[0] // self.dim, w.shape[1] // self.dim
            cube = w.reshape(self.dim, after, self.dim, before)
            i = np.arange(self.dim)
            blocks.append(jnp.exp(cube[i, :, i]))
        return blocks

    def _effective(self) -> list[Array]:
        """All weights as they act, but the own ones of the last layer, which f alone has."""
        effective = []
        for w in self.weights:
            own, lower = _masks(self.dim, w.shape[1] // self.dim, w.shape[0] // self.dim)
            own, lower = own.astype(w.dtype), lower.astype(w.dtype)
            # The exponent is masked too: an unused one must not overflow.
            effective.append(own * jnp.exp(w * own) + lower * w)
        return effective

    def _lower_last(self) -> Array:
        _, lower = _masks(self.dim, self.last.shape[1] // self.dim, 1)
        return self.last * lower.astype(self.last.dtype)

    def _gates(self, context: Array | None, own: list[Array]) -> tuple[Array, Array, Array]:
        """g over the largest slope, s, and the constant part of t, each ``(dim, rows or 1)``."""
        raw_gain, raw_scale, shift = jnp.split(self.params(context), 3)
        slope = own[0]
        for block in own[1:]:
            slope = block @ slope
        log_scale = LOG_SCALE_BOUND * jnp.tanh(raw_scale / LOG_SCALE_BOUND)
        return above_minus_one(GAIN * raw_gain) / slope[:, 0], log_scale, shift

    def _context_shift(self, context: Array | None) -> Array | float:
        if self.context_weight is None or context is None:
            return 0.0
        return self.context_weight @ context


def _masks(dim: int, before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a weight is between units of one coordinate, and where from an earlier coordinate."""
    ones = np.ones((after, before), np.float32)
    return np.kron(np.eye(dim, dtype=np.float32), ones), np.kron(
        np.tri(dim, k=-1, dtype=np.float32), ones
    )


def _forward(x: Array, args: tuple[BlockAutoregressive, Array | None]) -> tuple[Array, Array]:
    layer, context = args
    own = layer._own()
    gain, log_scale, shift = layer._gates(context, own)
    h, slope = x, jnp.ones_like(x)[:, None]
    for k, (w, bias) in enumerate(zip(layer._effective(), layer.biases, strict=True)):
        h = w @ h + bias[:, None]
        if k == 0:
            h = h + layer._context_shift(context)
        h = jnp.tanh(h)
        slope = (own[k] @ slope) * (1 - h**2).reshape(layer.dim, -1, x.shape[1])
    f = (own[-1] @ h.reshape(slope.shape))[:, 0]
    slope = (own[-1] @ slope)[:, 0]
    y = jnp.exp(log_scale) * (x + gain * f) + shift + layer._lower_last() @ h
    return y, log_scale + jnp.log1p(gain * slope)


def _along(t: Array, args: tuple[Array, list[tuple[Array, Array]], Array]) -> Array:
    """t + gain f(t) for one coordinate, its other inputs given as shifts of its units."""
    gain, hidden, last = args
    h = t[None]
    for w, shift in hidden:
        h = jnp.tanh(w @ h + shift)
    return t + gain * (last @ h)[0]


def _solve(y: Array, args: tuple[BlockAutoregressive, Array | None]) -> Array:
    """Coordinate by coordinate: what earlier ones contribute, a scalar equation, the new units."""
    layer, context = args
    dim, own, weights, last = layer.dim, layer._own(), layer._effective(), layer._lower_last()
    gain, log_scale, shift = (jnp.broadcast_to(a, y.shape) for a in layer._gates(context, own))
    factors = [len(bias) // dim for bias in layer.biases]
    first = layer._context_shift(context) + jnp.zeros((len(layer.biases[0]), 1), y.dtype)

    def pick(array: Array, i: Array, size: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, i * size, size)

    def step(i: Array, state: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        x, units = state
        shifts = []
        # The units of coordinate i are still zero, so their own weights add nothing here.
        for k, before in enumerate([x, *units[:-1]]):
            c = pick(weights[k], i, factors[k]) @ before
            c = c + pick(layer.biases[k], i, factors[k])[:, None]
            shifts.append(c + pick(first, i, factors[k]) if k == 0 else c)
        blocks = [block[i] for block in own]
        right = (y[i] - shift[i] - (pick(last, i, 1) @ units[-1])[0]) * jnp.exp(-log_scale[i])
        # tanh is bounded, and so is f.
        reach = jnp.abs(gain[i]) * blocks[-1].sum()
        hidden = list(zip(blocks, shifts, strict=False))
        t = monotone_root(
            _along, right, (gain[i], hidden, blocks[-1]), right - reach, right + reach
        )
        h = t[None]
        new = []
        for k, (w, c) in enumerate(hidden):
            h = jnp.tanh(w @ h + c)
            new.append(jax.lax.dynamic_update_slice_in_dim(units[k], h, i * factors[k], 0))
        return x.at[i].set(t), new

    units = [jnp.zeros((len(bias), y.shape[1]), y.dtype) for bias in layer.biases]
    return jax.lax.fori_loop(0, dim, step, (jnp.zeros_like(y), units))[0]
