r"""The contract of a flow transform, and all of NumPyro's protocol derived from it once.

A transform is a bijection :math:`y = T(x)` from base to data, NumPyro's direction. One object
speaks three protocols: an Equinox module (named leaves), a NumPyro ``Transform`` (usable in
``TransformedDistribution``, guides, reparameterisations), and plain JAX data (a pytree whose
leaves are all floating arrays, so ``jit``, ``grad``, ``vmap``, optax and pickle need no filters).

To write one, subclass :class:`FlowTransform`, say its ``event_shape``, and implement two methods::

    forward_and_log_det(x, context=None) -> (y, log|det dy/dx|)
    inverse_and_log_det(y, context=None) -> (x, log|det dx/dy|)

Each makes one pass and acts on ``(*batch, *event_shape)`` without ``vmap``; the log-determinant
is that of the map just applied, of shape ``(*batch,)``. Arguments arrive checked: floating, of the
right event shape, with the context of the right width and ``x`` broadcast against its batch.
"""

import abc
import functools
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import array_equiv

from .checks import check_context, check_event_shape, check_float

_CONTRACT = ("forward_and_log_det", "inverse_and_log_det")


class Fixed(eqx.Module):
    """Numbers that never train: a standardisation, support bounds, a bound context.

    ``nf.partition`` keeps whatever is wrapped here out of the parameters, so that optimisers,
    weight decay, priors and NUTS over weights leave it alone. Gradients still flow through it.

    :param value: any pytree of arrays.
    """

    value: Any


def _checked(method: Any, forward: bool) -> Any:
    """Give a transform's contract method checked arguments, once, at its entry."""

    @functools.wraps(method)
    def wrapper(self: "FlowTransform", value: ArrayLike, context: ArrayLike | None = None) -> Any:
        owner = type(self).__name__
        shape = self.event_shape if forward else self.out_shape
        array = check_float(f"{owner} input", value)
        check_event_shape(f"{owner} input", array.shape, shape)
        context = check_context(owner, context, self.context_dim)
        if context is not None:
            batch = jnp.broadcast_shapes(array.shape[: array.ndim - len(shape)], context.shape[:-1])
            array = jnp.broadcast_to(array, batch + shape)
        return method(self, array, context)

    return wrapper


class _Contract:
    """First base of :class:`FlowTransform`: what happens when one is subclassed.

    NumPyro's ``Transform.__init_subclass__`` registers each subclass as a pytree, and so does
    Equinox's metaclass; doing both is an error. This hook does not call ``super()``, which leaves
    the registration to Equinox. It also attaches the argument checks, so that no transform
    repeats them and no user's transform lacks them.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for name in _CONTRACT:
            method = cls.__dict__.get(name)
            if method is not None and not getattr(method, "__isabstractmethod__", False):
                # Equinox has already replaced the function by a descriptor that holds it.
                function = getattr(method, "__wrapped__", None) or method
                setattr(cls, name, _checked(function, forward=name.startswith("forward")))


class FlowTransform(_Contract, eqx.Module, Transform):
    """A bijection with parameters; see the module's text for the contract.

    ``event_shape`` and ``out_shape`` are the shapes of one ``x`` and one ``y``; ``context_dim`` is
    the width of the context, 0 for an unconditional transform.
    """

    # Arrays are not hashable, and `jax.jit(transform)` needs a hash: identity serves.
    __hash__ = object.__hash__
    __eq__ = Transform.__eq__

    @property
    @abc.abstractmethod
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one x."""

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of one y."""
        return self.event_shape

    @property
    def context_dim(self) -> int:
        """Width of the context, 0 for none."""
        return 0

    @abc.abstractmethod
    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """``x`` of shape ``(*batch, *event_shape)`` to ``(y, log|det dy/dx|)``."""

    @abc.abstractmethod
    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """``y`` of shape ``(*batch, *out_shape)`` to ``(x, log|det dx/dy|)``."""

    # NumPyro's protocol.

    @property
    def domain(self) -> Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def codomain(self) -> Constraint:
        return constraints.independent(constraints.real, len(self.out_shape))

    @property
    def inv(self) -> "FlowTransform":
        """The inverse as a transform. A new view each time; ``t.inv.inv is t``."""
        return Inverse(self)

    def __call__(self, x: ArrayLike) -> Array:
        return self.forward_and_log_det(cast(Array, x))[0]

    def _inverse(self, y: ArrayLike) -> Array:
        return self.inverse_and_log_det(cast(Array, y))[0]

    def call_with_intermediates(self, x: ArrayLike) -> tuple[Array, Array]:
        return self.forward_and_log_det(cast(Array, x))

    def log_abs_det_jacobian(
        self, x: ArrayLike, y: ArrayLike, intermediates: Array | None = None
    ) -> Array:
        if intermediates is not None:
            return intermediates
        return self.forward_and_log_det(cast(Array, x))[1]

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        check_event_shape(f"{type(self).__name__}.forward_shape", shape, self.event_shape)
        return shape[: len(shape) - len(self.event_shape)] + self.out_shape

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        check_event_shape(f"{type(self).__name__}.inverse_shape", shape, self.out_shape)
        return shape[: len(shape) - len(self.out_shape)] + self.event_shape

    def eq(self, other: object, static: bool = False) -> ArrayLike:
        if type(self) is not type(other):
            return False
        structures: list[Any] = [jax.tree.structure(tree) for tree in (self, other)]
        if structures[0] != structures[1]:
            return False
        equal: Any = True
        for a, b in zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True):
            equal = equal & array_equiv(a, b, static=static)
        return equal


class Inverse(FlowTransform):
    """The inverse of a transform: data to base where the original goes base to data.

    Same cost as the original with the directions exchanged.

    :param transform: the transform to invert.

    >>> import jax, numpyro_flows as nf
    >>> t = nf.realnvp(jax.random.key(0), 2).transform
    >>> t.inv.inv is t
    True
    """

    transform: FlowTransform

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.transform.out_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.transform.event_shape

    @property
    def context_dim(self) -> int:
        return self.transform.context_dim

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.inverse_and_log_det(x, context)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.forward_and_log_det(y, context)

    @property
    def domain(self) -> Constraint:
        return self.transform.codomain

    @property
    def codomain(self) -> Constraint:
        return self.transform.domain

    @property
    def inv(self) -> FlowTransform:
        return self.transform

    def log_abs_det_jacobian(
        self, x: ArrayLike, y: ArrayLike, intermediates: Array | None = None
    ) -> Array:
        if intermediates is not None:
            return intermediates
        # Both ends are given, so the original's own forward pass serves, whichever side is slow.
        return -self.transform.log_abs_det_jacobian(y, x)

    # A conditioned transform broadcasts its batch, so shapes are its own affair.
    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.transform.forward_shape(shape)


class Conditioned(FlowTransform):
    """A conditional transform with its context bound: an unconditional one.

    The context's batch shape joins that of the values (``forward_shape`` and ``inverse_shape``
    broadcast it), so a distribution built on it has one independent row per context.

    :param transform: a transform with ``context_dim > 0``.
    :param context: floating array of shape ``(*batch, context_dim)``; gradients flow to it.
    :raises ValueError: if the transform takes no context or the width is wrong.
    :raises TypeError: if the context is not floating.
    """

    transform: FlowTransform
    context: Fixed

    def __init__(self, transform: FlowTransform, context: ArrayLike):
        self.transform = transform
        self.context = Fixed(
            check_context(type(transform).__name__, context, transform.context_dim)
        )

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.transform.event_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.transform.out_shape

    @property
    def codomain(self) -> Constraint:
        return self.transform.codomain

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.forward_and_log_det(x, self.context.value)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.inverse_and_log_det(y, self.context.value)

    def _broadcast(self, shape: tuple[int, ...], event: tuple[int, ...]) -> tuple[int, ...]:
        batch = shape[: len(shape) - len(event)]
        return jnp.broadcast_shapes(batch, self.context.value.shape[:-1]) + event

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._broadcast(super().forward_shape(shape), self.out_shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._broadcast(super().inverse_shape(shape), self.event_shape)
