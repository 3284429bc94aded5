"""Several processes of one program (``jax.distributed``): what one has, all get."""

import json
from typing import Any, Final

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..checks import as_numpy, check_unmasked

#: Bytes that a device holds at a time while rows are exchanged.
PIECE: Final = 1 << 26


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return jax.process_index() == 0


def shared(content: bytes) -> bytes:
    """What the first process has."""
    if jax.process_count() == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.frombuffer(content if is_first() else bytes(size), np.uint8)
    return multihost_utils.broadcast_one_to_all(padded).tobytes()


def rows_of_all(tree: Any) -> Any:
    """Arrays whose rows are split among the processes, whole; with one process, as they are.

    The rows of the first process come first. Of a ``jax.Array`` that spans the processes, all rows
    are taken from where they lie.

    :raises ValueError: if the processes' arrays have different shapes or kinds.
    """
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        check_unmasked("x", leaf)
    spans = [isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves]
    arrays = [
        np.asarray(multihost_utils.process_allgather(leaf, tiled=True)) if over else as_numpy(leaf)
        for leaf, over in zip(leaves, spans, strict=True)
    ]
    _check_alike([str(structure), *(f"{a.dtype} {a.shape}" for a in arrays)])
    arrays = [a if over else _gathered(a) for a, over in zip(arrays, spans, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def _check_alike(kinds: list[str]) -> None:
    mine = json.dumps(kinds).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.frombuffer(mine.ljust(int(lengths.max())), np.uint8)
    texts = [bytes(row).decode().strip() for row in multihost_utils.process_allgather(padded)]
    if len(set(texts)) > 1:
        each = "; ".join(
            f"process {i} has {', '.join(json.loads(t)[1:])}" for i, t in enumerate(texts)
        )
        raise ValueError(
            "x: expected as many rows on each process, and the same arguments, got different ones: "
            f"{each}. Drop rows, or pad with rows of weight 0."
        )


def _gathered(array: np.ndarray) -> np.ndarray:
    """Rows of all processes, as bytes: JAX would round float64 in 32-bit mode."""
    if array.ndim == 0 or array.dtype == object:
        return array  # refused later on, with a reason
    rows = np.ascontiguousarray(array)
    flat = rows.reshape(len(rows), -1).view(np.uint8)
    num = jax.process_count()
    whole = np.empty((num, *flat.shape), np.uint8)
    step = max(1, PIECE // max(1, num * flat.shape[1]))
    for start in range(0, len(flat), step):
        some = slice(start, start + step)
        whole[:, some] = multihost_utils.process_allgather(flat[some])
    return whole.reshape(-1, flat.shape[1]).view(rows.dtype).reshape(-1, *rows.shape[1:])
