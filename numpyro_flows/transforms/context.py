"""Transforms with a context that is bound, or computed by a network."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import check_context, check_unmasked
from ..parts import Fixed
from ..transform import FlowTransform, Wrapper


class Conditioned(Wrapper):
    """A conditional transform with its context bound: an unconditional one.

    The context's batch shape joins that of the values (``forward_shape`` and ``inverse_shape``
    broadcast it), so a distribution built on it has one independent row per context.

    :param transform: a transform with ``context_dim > 0``.
    :param context: floating array of shape ``(*batch, context_dim)``, or the pytree that an
        :class:`Embedded` transform reads; gradients flow to it.
    :raises ValueError: if the transform takes no context or the width is wrong.
    :raises TypeError: if the context is not floating.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> conditional = nf.realnvp(jax.random.key(0), 2, context_dim=3).transform
    >>> nf.transforms.Conditioned(conditional, jnp.zeros((4, 3)))(jnp.zeros(2)).shape
    (4, 2)
    """

    context: Fixed

    def __init__(self, transform: FlowTransform, context: Any):
        self.transform = transform
        for leaf in jax.tree.leaves(context):
            check_unmasked("context", leaf)
        context = jax.tree.map(jnp.asarray, context)
        self.context = Fixed(context)
        self._context_shape()  # raises where the context does not fit

    @property
    def context_dim(self) -> int:
        return 0

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.forward_and_log_det(x, self.context.value)

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.inverse_and_log_det(y, self.context.value)

    def initialized(
        self, value: Array, context: Array | None, forward: bool
    ) -> tuple[FlowTransform, Array]:
        transform, value = self.transform.initialized(value, self.context.value, forward)
        return Conditioned(transform, self.context.value), value

    def _context_shape(self) -> tuple[int, ...]:
        read = self.transform.read_context
        return jax.eval_shape(lambda context: read(context), self.context.value).shape

    def _broadcast(self, shape: tuple[int, ...], event: tuple[int, ...]) -> tuple[int, ...]:
        batch = shape[: len(shape) - len(event)]
        return jnp.broadcast_shapes(batch, self._context_shape()[:-1]) + event

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._broadcast(super().forward_shape(shape), self.out_shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._broadcast(super().inverse_shape(shape), self.event_shape)


class Embedded(Wrapper):
    """A transform whose context is computed from any pytree by a network.

    Images, sets, several arrays: the network turns them into the vector that the transform reads,
    and trains with it. It must be the outermost part of a flow (``flow.embed(network)``).

    :param transform: a transform with ``context_dim > 0``.
    :param network: a pytree of arrays that is called with the context, whose leaves have the batch
        axes first, and returns ``(*batch, context_dim)``; :class:`numpyro_flows.nn.Embedding` is
        one for arrays of known shapes.
    :raises ValueError: if the transform takes no context, or the network returns another width.
    :raises TypeError: for a network that cannot be called.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> example = {"dose": jnp.zeros(()), "curve": jnp.zeros(5)}
    >>> network = nf.nn.Embedding(jax.random.key(0), example, 3, hidden=(8,))
    >>> flow = nf.realnvp(jax.random.key(1), 2, context_dim=3).embed(network)
    >>> flow.condition({"dose": jnp.ones(4), "curve": jnp.ones((4, 5))}).batch_shape
    (4,)
    """

    network: Callable[[Any], Array]

    def __check_init__(self) -> None:
        if not self.transform.context_dim:
            raise ValueError(
                f"Embedded: expected a conditional transform, got {type(self.transform).__name__} "
                "without a context. Build it with `context_dim=...`."
            )
        if not callable(self.network):
            raise TypeError(
                f"network: expected something to call, got {type(self.network).__name__}."
            )

    def read_context(self, context: Any) -> Array | None:
        if context is None:
            return super().read_context(None)
        return check_context("The network's result", self.network(context), self.context_dim)

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.forward_and_log_det(x, context)

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.inverse_and_log_det(y, context)

    def initialized(
        self, value: Array, context: Array | None, forward: bool
    ) -> tuple[FlowTransform, Array]:
        transform, value = self.transform.initialized(value, self.read_context(context), forward)
        return Embedded(transform, self.network), value
