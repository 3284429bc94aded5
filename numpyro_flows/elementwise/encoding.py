"""How a conditioner reads coordinates: real ones as they are, angles and cells by features."""

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from ..nn import MLP
from ..parts import Fixed
from .base import ElementwiseMap


class Encoding(eqx.Module):
    """Coordinates as a conditioner reads them; this one is of real coordinates, as they are.

    A conditioner owns one for all coordinates of its layer. Layers pick coordinates from it and
    pass them on, without knowing of what kind they are.
    """

    #: Inputs of the network per coordinate.
    num_features: ClassVar[int] = 1

    def __getitem__(self, index: Any) -> "Encoding":
        """The encoding of some of the coordinates, ``index`` being a slice or an array of them."""
        return self

    def at(self, i: Array) -> "Encoding":
        """The encoding of coordinate ``i`` alone, which may be traced."""
        return self

    def read(self, x: Array) -> Array:
        """Coordinates ``(n, rows)`` as inputs of the network, ``(num_features * n, rows)``."""
        return x

    def mark(self, map: ElementwiseMap, params: Array) -> Array:
        """Parameters ``(num_params, n, rows)`` of these coordinates as ``map`` reads them."""
        return params


class Angles(Encoding):
    """The encoding of vectors some of whose coordinates are angles.

    Which ones is an array, and not part of the structure, so that layers that differ in it, as
    those of a permuted ``Scan`` do, have one structure.

    :param flags: 1 for an angle, 0 for a real coordinate, floating, shape ``(n,)``.

    >>> import jax.numpy as jnp
    >>> Angles(jnp.array([0.0, 1.0])).read(jnp.array([[2.0], [0.0]]))  # (x, cos, 0, sin)
    Array([[2.],
           [1.],
           [0.],
           [0.]], dtype=float32)
    """

    flags: Fixed
    num_features: ClassVar[int] = 2

    def __init__(self, flags: Array):
        self.flags = Fixed(flags)

    def __getitem__(self, index: Any) -> "Angles":
        return Angles(self.flags.value[index])

    def at(self, i: Array) -> "Angles":
        return Angles(jax.lax.dynamic_slice_in_dim(self.flags.value, i, 1))

    def read(self, x: Array) -> Array:
        angle = self.flags.value[:, None] > 0
        return jnp.concatenate(
            [jnp.where(angle, jnp.cos(x), x), jnp.where(angle, jnp.sin(x), jnp.zeros_like(x))]
        )

    def mark(self, map: ElementwiseMap, params: Array) -> Array:
        if not map.reads_kinds:
            return params
        row = jnp.broadcast_to(self.flags.value[None, :, None], (1, *params.shape[1:]))
        return jnp.concatenate([params, row.astype(params.dtype)])


class Cells(Encoding):
    """The encoding of discrete coordinates: which cell a value is in, one-hot.

    The first weights of a network are then an embedding of the levels.

    :param starts: lowest integer of each coordinate, floating, shape ``(n,)``.
    :param counts: number of levels of each, floating, shape ``(n,)``.
    :param num_features: the most levels of any.

    >>> import jax.numpy as jnp
    >>> Cells(jnp.array([3.0]), jnp.array([2.0]), 2).read(jnp.array([[4.7]]))
    Array([[0.],
           [1.]], dtype=float32)
    """

    starts: Fixed
    counts: Fixed
    num_features: int = eqx.field(static=True)  # type: ignore[misc]  # one for all elsewhere

    def __init__(self, starts: Array, counts: Array, num_features: int):
        self.starts, self.counts = Fixed(starts), Fixed(counts)
        self.num_features = num_features

    def __getitem__(self, index: Any) -> "Cells":
        return Cells(self.starts.value[index], self.counts.value[index], self.num_features)

    def at(self, i: Array) -> "Cells":
        starts, counts = (
            jax.lax.dynamic_slice_in_dim(numbers.value, i, 1)
            for numbers in (self.starts, self.counts)
        )
        return Cells(starts, counts, self.num_features)

    def read(self, x: Array) -> Array:
        cell = jnp.floor(x - self.starts.value[:, None].astype(x.dtype))
        levels = jnp.arange(self.num_features, dtype=x.dtype)[:, None, None]
        return (cell == levels).astype(x.dtype).reshape(-1, x.shape[-1])

    def mark(self, map: ElementwiseMap, params: Array) -> Array:
        rows = jnp.stack([self.starts.value, self.counts.value])[:, :, None].astype(params.dtype)
        return jnp.concatenate([params, jnp.broadcast_to(rows, (2, *params.shape[1:]))])


class Conditioner(MLP):
    """An :class:`~numpyro_flows.nn.MLP` that returns parameters and owns an encoding.

    :param key: ``jax.random.key`` for the initial weights.
    :param num_inputs: number of coordinates that it reads.
    :param out_size: number of parameters that it returns.
    :param encoding: how all coordinates of its layer are read; real ones by default.

    :param hidden: as the following, an argument of the MLP: widths of the hidden layers.
    :param context_size: width of the context, 0 for none.
    :param activation: one of ``numpyro_flows.nn.ACTIVATIONS``.
    :param residual: whether the hidden layers are residual blocks.

    Calling it, on what ``encoding.read`` returns, is calling the MLP.

    >>> import jax, jax.numpy as jnp
    >>> Conditioner(jax.random.key(0), 3, 4)(jnp.zeros((3, 5))).shape
    (4, 5)
    """

    encoding: Encoding = eqx.field(kw_only=True)

    def __init__(
        self,
        key: Array,
        num_inputs: int,
        out_size: int,
        *,
        encoding: Encoding | None = None,
        hidden: Sequence[int] = (64, 64),
        context_size: int = 0,
        activation: str = "relu",
        residual: bool = False,
    ):
        self.encoding = Encoding() if encoding is None else encoding
        super().__init__(
            key,
            num_inputs * self.encoding.num_features,
            out_size,
            hidden=hidden,
            context_size=context_size,
            activation=activation,
            residual=residual,
        )
