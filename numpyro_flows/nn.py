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
from typing import Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

ACTIVATIONS: Final[dict[str, Callable[[Array], Array]]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
}


class MLP(eqx.Module):
    r"""Multilayer perceptron :math:`h_{i+1} = \phi(W_i h_i + b_i)`, linear in its last layer.

    A context :math:`c` enters the first layer, :math:`h_1 = \phi(W_0 x + V c + b_0)`.
    Hidden weights start at :math:`N(0, 2 / \text{fan-in})` (He et al., 2015, arXiv:1502.01852,
    eq. 10), biases and the whole last layer at zero, so a new network returns zeros.

    :param key: ``jax.random.key`` for the initial weights.
    :param in_size: width of ``x``; 0 is allowed (the output then depends on the context alone).
    :param out_size: width of the result.
    :param hidden: widths of the hidden layers.
    :param context_size: width of the context, 0 for none.
    :param activation: one of ``ACTIVATIONS``.

    Calling it: ``x`` of shape ``(in_size, rows)`` and ``context`` of shape
    ``(context_size, rows)`` or ``(context_size, 1)`` to ``(out_size, rows)``.
    Cost: one matrix product per layer.

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

    def __init__(
        self,
        key: Array,
        in_size: int,
        out_size: int,
        *,
        hidden: Sequence[int] = (64, 64),
        context_size: int = 0,
        activation: str = "relu",
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Unknown activation {activation!r}. Expected one of {sorted(ACTIVATIONS)}."
            )
        if any(not isinstance(width, int) or width < 1 for width in hidden):
            raise ValueError(
                f"hidden: expected positive integers, one width per hidden layer, got {hidden!r}."
            )
        sizes = (in_size, *hidden, out_size)
        keys = jax.random.split(key, len(sizes))
        # x and the context are two blocks of one input, so they share its fan-in.
        fan_ins = (in_size + context_size, *hidden)
        scales = [(2.0 / max(fan_in, 1)) ** 0.5 for fan_in in fan_ins]
        scales[-1] = 0.0
        self.weights = tuple(
            scale * jax.random.normal(k, (fan_out, fan_in))
            for k, scale, fan_in, fan_out in zip(keys, scales, sizes, sizes[1:], strict=False)
        )
        self.biases = tuple(jnp.zeros(size) for size in sizes[1:])
        self.context_weight = (
            scales[0] * jax.random.normal(keys[-1], (sizes[1], context_size))
            if context_size
            else None
        )
        self.activation = activation

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        act = ACTIVATIONS[self.activation]
        h = self.weights[0] @ x + self.biases[0][:, None]
        if self.context_weight is not None and context is not None:
            h = h + self.context_weight @ context
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            h = weight @ act(h) + bias[:, None]
        return h


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
