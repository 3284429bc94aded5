r"""The contract of a flow transform, and all of NumPyro's protocol derived from it once.

A transform is a bijection :math:`y = T(x)` from base to data, NumPyro's direction. One object
speaks three protocols: an Equinox module (named leaves), a NumPyro ``Transform`` (usable in
``TransformedDistribution``, guides, reparameterisations), and plain JAX data (a pytree whose
leaves are all floating arrays, so ``jit``, ``grad``, ``vmap``, optax and pickle need no filters).

To write one, subclass :class:`FlowTransform`, say its ``event_shape``, and implement two methods::

    _forward_and_log_det(x, context=None) -> (y, log|det dy/dx|)
    _inverse_and_log_det(y, context=None) -> (x, log|det dx/dy|)

Callers use ``forward_and_log_det`` and ``inverse_and_log_det``, which are final and check their
arguments. Each makes one pass and acts on ``(*batch, *event_shape)`` without ``vmap``; the
log-determinant is that of the map just applied, of shape ``(*batch,)``. The two methods receive
checked arguments: floating, of the right event shape, with the context of the right width and
``x`` broadcast against its batch.
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, cast, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import array_equiv

from .checks import (
    broadcast_batches,
    check_context,
    check_event_shape,
    check_float,
    check_image_shape,
    check_size,
)
from .nn import columns
from .parts import Exactness, num_parameters


class _Contract:
    """First base of :class:`FlowTransform`: what happens when one is subclassed.

    NumPyro's ``Transform.__init_subclass__`` registers each subclass as a pytree, and so does
    Equinox's metaclass; doing both is an error. This hook goes on behind NumPyro's, which leaves
    the registration to Equinox and calls the hooks of a subclass's other bases.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super(Transform, cls).__init_subclass__(**kwargs)


class FlowTransform(_Contract, Exactness, eqx.Module, Transform):
    """A bijection with parameters; see the module's text for the contract.

    ``event_shape`` and ``out_shape`` are the shapes of one ``x`` and one ``y``; ``context_dim`` is
    the width of the context, 0 for an unconditional transform. ``repr`` names the parts, these
    sizes, the number of trainable parameters, and an inexact log-determinant.

    >>> import jax, numpyro_flows as nf
    >>> nf.realnvp(jax.random.key(0), 3, depth=4, hidden=(8,), context_dim=2).transform
    Scan(4 x Coupling(Affine), event_shape=(3,), context_dim=2, parameters=272)
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

    @property
    def repeated_axes(self) -> int:
        """Leading axes of an event that are of one kind, as time: all along them shares units."""
        return 0

    @property
    def outline(self) -> str:
        """The layers in a few words, those next to the base first."""
        inside = self._inside()
        return f"{type(self).__name__}({inside})" if inside else type(self).__name__

    def _inside(self) -> str:
        """What the outline has in brackets: a layer's elementwise map, or the parts."""
        return ""

    def __repr__(self) -> str:
        texts = [self._inside(), f"event_shape={self.event_shape}"]
        texts += [f"out_shape={self.out_shape}"] * (self.out_shape != self.event_shape)
        texts += [f"context_dim={self.context_dim}"] * (self.context_dim > 0)
        texts += [f"log_det={self.inexact}"] * bool(self.inexact)
        texts += [f"parameters={num_parameters(self)}"]
        return f"{type(self).__name__}({', '.join(filter(None, texts))})"

    def read_context(self, context: Any) -> Array | None:
        """The context as the contract's methods receive it, ``(*batch, context_dim)``, checked."""
        return check_context(type(self).__name__, context, self.context_dim)

    @final
    def forward_and_log_det(
        self, x: ArrayLike, context: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """Map x to y.

        :param x: floating, of shape ``(*batch, *event_shape)``.
        :param context: floating, of shape ``(*batch, context_dim)`` or one that broadcasts with
            it, for a conditional transform; None otherwise.
        :return: y, of shape ``(*batch, *out_shape)``, and log|det dy/dx|, of shape ``(*batch,)``.
        :raises ValueError: for a wrong event shape, or a missing, surplus or wrong context.
        :raises TypeError: for values that are not floating.
        """
        return self._forward_and_log_det(*self._read(x, context, self.event_shape))

    @final
    def inverse_and_log_det(
        self, y: ArrayLike, context: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """Map y to x.

        :param y: floating, of shape ``(*batch, *out_shape)``.
        :param context: as for ``forward_and_log_det``.
        :return: x, of shape ``(*batch, *event_shape)``, and log|det dx/dy|, of shape ``(*batch,)``.
        :raises ValueError: for a wrong event shape, or a missing, surplus or wrong context.
        :raises TypeError: for values that are not floating.
        """
        return self._inverse_and_log_det(*self._read(y, context, self.out_shape))

    def _read(
        self, value: ArrayLike, context: ArrayLike | None, shape: tuple[int, ...]
    ) -> tuple[Array, Array | None]:
        """Arguments of a public method as the private one receives them, checked."""
        name = f"{type(self).__name__} input"
        array = check_float(name, value)
        check_event_shape(name, array.shape, shape)
        read = self.read_context(context)
        if read is not None:
            batch = array.shape[: array.ndim - len(shape)]
            batch = broadcast_batches(name, batch, "context", read.shape[:-1])
            array = jnp.broadcast_to(array, batch + shape)
        return array, read

    @abc.abstractmethod
    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """``x`` of shape ``(*batch, *event_shape)`` to ``(y, log|det dy/dx|)``."""

    @abc.abstractmethod
    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """``y`` of shape ``(*batch, *out_shape)`` to ``(x, log|det dx/dy|)``."""

    # The same for vectors as columns, ``(dim, rows)``, with the context ``(context_dim, rows or
    # 1)``; events of more axes have all of them reversed, images ``(C, W, H, rows)``. Layers are
    # written in this layout and compositions stay in it from layer to layer.

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """``x`` of shape ``(dim, rows)`` to ``y`` and the log-determinants, ``(rows,)``."""
        y, log_det = self.forward_and_log_det(x.T, None if context is None else context.T)
        return y.T, log_det

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """``y`` of shape ``(dim, rows)`` to ``x`` and the log-determinants, ``(rows,)``."""
        x, log_det = self.inverse_and_log_det(y.T, None if context is None else context.T)
        return x.T, log_det

    def initialized(
        self, value: Array, context: Array | None, forward: bool
    ) -> tuple["FlowTransform", Array]:
        """Part of ``nf.initialize``: the transform set from data, and the data mapped by it.

        A transform that nothing sets from data is returned as it is; one that holds others
        overrides this to pass the data through them.

        :param value: rows, ``(n, *event_shape)`` if ``forward``, else ``(n, *out_shape)``.
        :param context: as for the two methods above.
        :param forward: the direction in which the data go.
        """
        step = self.forward_and_log_det if forward else self.inverse_and_log_det
        return self, step(value, context)[0]

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


class ColumnTransform(FlowTransform):
    """A transform of vectors, written for columns as in ``FlowTransform.forward_columns``.

    Coordinates first and rows last is the layout in which the gradient of a weight is a product of
    contiguous matrices (see ``nn.py``). A subclass implements ``forward_columns`` and
    ``inverse_columns`` in place of the two methods of the contract, and calls ``_set_sizes`` in
    its constructor.
    """

    dim: int = eqx.field(static=True)
    context_size: int = eqx.field(static=True)

    def _set_sizes(self, dim: int, context_dim: int = 0) -> None:
        self.dim = check_size("dim", dim)
        self.context_size = check_size("context_dim", context_dim, minimum=0)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.dim,)

    @property
    def context_dim(self) -> int:
        return self.context_size

    @abc.abstractmethod
    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """``x`` of shape ``(dim, rows)`` to ``y`` and the log-determinants, ``(rows,)``."""

    @abc.abstractmethod
    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """``y`` of shape ``(dim, rows)`` to ``x`` and the log-determinants, ``(rows,)``."""

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return in_columns(self.forward_columns, x, context)

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return in_columns(self.inverse_columns, y, context)


class ImageTransform(FlowTransform):
    """A transform of images (H, W, C), written for columns ``(C, W, H, rows)``.

    Channels first and rows last is to images what columns are to vectors: a convolution is a
    matrix product over everything behind the first axis, and its shifts move whole blocks. A
    subclass implements ``forward_columns`` and ``inverse_columns`` and calls ``_set_shape`` in its
    constructor.
    """

    shape: tuple[int, int, int] = eqx.field(static=True)
    context_size: int = eqx.field(static=True)

    def _set_shape(self, shape: Sequence[int], context_dim: int = 0) -> None:
        self.shape = check_image_shape(shape)
        self.context_size = check_size("context_dim", context_dim, minimum=0)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def context_dim(self) -> int:
        return self.context_size

    @abc.abstractmethod
    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """``x`` of shape ``(C, W, H, rows)`` to ``y`` and the log-determinants, ``(rows,)``."""

    @abc.abstractmethod
    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """``y`` of shape ``(C, W, H, rows)`` to ``x`` and the log-determinants, ``(rows,)``."""

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return in_columns(self.forward_columns, x, context, len(self.event_shape))

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return in_columns(self.inverse_columns, y, context, len(self.out_shape))


def in_columns(
    step: Callable[[Array, Array | None], tuple[Array, Array]],
    value: Array,
    context: Array | None,
    event_ndim: int = 1,
) -> tuple[Array, Array]:
    """Apply ``step``, written for columns, to ``(*batch, *event)``, with its axes reversed."""
    batch, event = (
        value.shape[: value.ndim - event_ndim],
        value.shape[value.ndim - event_ndim :],
    )
    context = None if context is None else columns(context, batch)
    result, log_det = step(value.reshape(math.prod(batch), *event).T, context)
    return result.T.reshape(batch + result.shape[-2::-1]), log_det.reshape(batch)


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

    def _inside(self) -> str:
        return self.transform.outline

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.transform.out_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.transform.event_shape

    @property
    def context_dim(self) -> int:
        return self.transform.context_dim

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.inverse_and_log_det(x, context)

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.forward_and_log_det(y, context)

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.inverse_columns(x, context)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.forward_columns(y, context)

    def initialized(
        self, value: Array, context: Array | None, forward: bool
    ) -> tuple[FlowTransform, Array]:
        transform, value = self.transform.initialized(value, context, not forward)
        return Inverse(transform), value

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

    # A conditioned transform broadcasts its batch, so it computes shapes itself.
    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.transform.forward_shape(shape)


class Wrapper(FlowTransform):
    """A transform around another one, whose shapes, spaces and context it takes over."""

    transform: FlowTransform

    def _inside(self) -> str:
        return self.transform.outline

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.transform.event_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.transform.out_shape

    @property
    def context_dim(self) -> int:
        return self.transform.context_dim

    @property
    def repeated_axes(self) -> int:
        return self.transform.repeated_axes

    @property
    def domain(self) -> Constraint:
        return self.transform.domain

    @property
    def codomain(self) -> Constraint:
        return self.transform.codomain
