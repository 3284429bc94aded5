"""Rows split over a mesh of devices: where arrays lie, and gradients summed in one go."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

#: ``(params, fixed, rows) -> (sum, number)``: of the losses of some rows, and how many they are.
Total = Callable[[Any, Any, Any], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Split:
    """How arrays lie on a mesh: rows split over its first axis, all else the same on each device.

    :param mesh: a mesh whose axes are all automatic.
    """

    mesh: Mesh

    @property
    def axis(self) -> str:
        return self.mesh.axis_names[0]

    @property
    def size(self) -> int:
        """Parts of the rows."""
        return self.mesh.shape[self.axis]

    def sharding(self, rows_at: int | None = None) -> NamedSharding:
        """Of arrays whose axis ``rows_at`` goes over the rows; None for what all devices have."""
        axes = () if rows_at is None else (*(None,) * rows_at, self.axis)
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def multiple(self, number: int) -> int:
        """The next number of rows that can be split evenly."""
        return -(-number // self.size) * self.size

    def replicated(self, tree: Any) -> Any:
        """A pytree on all devices; arrays that are split over several stay where they are."""
        return jax.tree.map(lambda leaf: leaf if _is_split(leaf) else self._replicated(leaf), tree)

    def _replicated(self, leaf: Any) -> Array:
        sharding = self.sharding()
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = self._replicated(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])

    @staticmethod
    def holds(tree: Any) -> bool:
        """Whether an array of a pytree is split over several devices."""
        return any(map(_is_split, jax.tree.leaves(tree)))

    @staticmethod
    def local(tree: Any) -> Any:
        """What all devices have, as arrays of the default device of this process."""
        return jax.device_put(jax.tree.map(np.asarray, tree))

    def placed(self, array: np.ndarray, index: np.ndarray | None = None) -> Array:
        """A host array ``(steps, batch, ...)`` on the devices that its rows belong to.

        :param index: in place of the array itself, its rows at these indices, ``(steps, batch)``;
            only those of this process's devices are read.
        """
        shape = array.shape if index is None else (*index.shape, *array.shape[1:])

        def part(at: Any) -> np.ndarray:
            return array[at] if index is None else array[index[at[:2]]]

        return jax.make_array_from_callback(shape, self.sharding(rows_at=1), part)

    def mean(self, total: Total, params: Any, fixed: Any, rows: Any) -> Array:
        """Mean loss of rows that lie on several devices; only ``params`` have a gradient.

        Each device differentiates the loss of its own rows, and one all-reduce sums losses, numbers
        and gradients. Left to itself the compiler reduces the gradients of scanned layers layer by
        layer.
        """

        def local(params: Any, fixed: Any, rows: Any) -> Array:
            (value, count), grads = jax.value_and_grad(total, has_aux=True)(params, fixed, rows)
            flat, _ = ravel_pytree((value, count.astype(value.dtype), grads))
            return jax.lax.psum(flat, self.axis)

        whole, split = PartitionSpec(), PartitionSpec(self.axis)
        summed = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(whole, whole, split),
            out_specs=whole,
            check_vma=False,
        )
        scalar = jnp.zeros(())
        _, unravel = ravel_pytree((scalar, scalar, params))

        def mean_and_grads(params: Any, fixed: Any, rows: Any) -> tuple[Array, Any]:
            value, count, grads = unravel(summed(params, fixed, rows))
            return value / count, jax.tree.map(lambda grad: grad / count.astype(grad.dtype), grads)

        @jax.custom_vjp
        def mean(params: Any, fixed: Any, rows: Any) -> Array:
            return mean_and_grads(params, fixed, rows)[0]

        def backward(grads: Any, by: Array) -> tuple[Any, None, None]:
            return jax.tree.map(lambda grad: grad * by.astype(grad.dtype), grads), None, None

        mean.defvjp(mean_and_grads, backward)
        return mean(params, fixed, rows)


def automatic(tree: Any) -> Any:
    """A pytree whose arrays leave it to the compiler how they are split from here on.

    On a mesh with explicit axes, a model that contracts rows would have to say how its result lies.
    """
    return jax.tree.map(_automatic, tree)


def _automatic(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.core.Tracer) or not isinstance(sharding, NamedSharding):
        return leaf
    mesh = sharding.mesh
    if not isinstance(mesh, Mesh):
        return leaf
    return jax.device_put(leaf, NamedSharding(_automatic_mesh(mesh), sharding.spec))


def _automatic_mesh(mesh: Mesh) -> Mesh:
    axis_types = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types)


def _is_split(leaf: Any) -> bool:
    return isinstance(leaf, Array) and not leaf.is_fully_replicated


def split_over(mesh: Any, name: str, number: int | None) -> Split:
    """The split of ``number`` rows over a mesh, checked.

    :param name: argument that gave the number, if one did.
    :raises TypeError: if it is no ``Mesh``.
    :raises ValueError: if its first axis does not divide the number, or devices of a process that
        takes part are missing.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh: expected a `jax.sharding.Mesh` such as `jax.make_mesh((8,), ('rows',))`, got "
            f"{type(mesh).__name__}."
        )
    missing = set(range(jax.process_count())) - {d.process_index for d in mesh.devices.flat}
    if missing:
        raise ValueError(
            f"mesh: expected devices of all {jax.process_count()} processes, got none of process "
            f"{', '.join(map(str, sorted(missing)))}. Make it of `jax.devices()`."
        )
    split = Split(_automatic_mesh(mesh))
    if number and number % split.size:
        raise ValueError(
            f"{name}: {number} cannot be split evenly over the {split.size} devices of the mesh's "
            f"first axis {split.axis!r}. Take a multiple, such as "
            f"{split.multiple(number)}."
        )
    return split
