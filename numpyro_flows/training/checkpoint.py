"""Checkpoints: a file with the state of a training, which only the call that wrote it continues."""

import hashlib
import io
import json
import operator
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..distribution import leaf_names
from ..io import written_whole
from .processes import is_first, shared


class Checkpoint:
    """A file that is rewritten whole, recognised by a fingerprint of the call.

    :param path: the file.
    :param settings: what the result depends on beside numbers; their ``repr`` is compared.
    :param key: the call's random key.
    :param pieces: pytree of the numbers that the result depends on: initial parameters, data.
    :param shared: whether all processes of the program make one call together: then the first
        writes and reads for all.
    :raises ValueError: if its folder does not exist.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        settings: list[Any],
        key: Array,
        pieces: Any,
        *,
        shared: bool = False,
    ):
        self._shared = shared
        self.path = Path(path).resolve()
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: there is no folder {self.path.parent}; create it first.")
        # Functions and objects show their address, which differs between processes.
        digest = hashlib.sha256(re.sub(r"0x\w+", "", repr(settings)).encode())
        for name, leaf in [("key", key), *_by_name(pieces)]:
            array = to_numpy(leaf)
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()

    def save(self, trees: Any, record: dict[str, Any]) -> None:
        """Write the arrays of a pytree, and what JSON can hold."""
        if self._shared and not is_first():
            return
        arrays: dict[str, Any] = {name: to_numpy(leaf) for name, leaf in _by_name(trees)}
        arrays["meta"] = np.array(json.dumps({"fingerprint": self.fingerprint, **record}))
        with written_whole(self.path) as temporary, open(temporary, "xb") as file:
            np.savez(file, **arrays)

    def load(self, trees: Any) -> tuple[Any, dict[str, Any]] | None:
        """What was saved last, as a pytree like ``trees``; None if the file is not there.

        :raises ValueError: for a damaged or foreign file, or one of another call.
        """
        content = self._content()
        if not content:
            return None
        leaves, structure = jax.tree.flatten(trees)
        try:
            with np.load(io.BytesIO(content[1:]), allow_pickle=False) as file:
                record = json.loads(str(file["meta"]))
                matches = record.pop("fingerprint") == self.fingerprint
                arrays = [file[name] for name in leaf_names(trees)] if matches else []
        except Exception as error:  # A damaged or foreign file can fail anywhere, in any way.
            raise ValueError(
                f"checkpoint: expected a whole file that this call wrote, got {self.path}, which "
                "is damaged or foreign. Delete it, or choose another path."
            ) from error
        if not matches:
            raise ValueError(
                f"checkpoint: {self.path} belongs to a call with other data, settings, key or "
                "flow. Delete it, or repeat the call that wrote it."
            )
        return jax.tree.unflatten(structure, map(_to_jax, arrays, leaves)), record

    def _content(self) -> bytes:
        """A byte and the file's own; nothing if there is no file."""
        content = b""
        if self.path.exists():  # a folder in its place is no whole file
            content = b"1" + (self.path.read_bytes() if self.path.is_file() else b"")
        return shared(content) if self._shared else content


def to_numpy(leaf: Any) -> np.ndarray:
    """A leaf as NumPy has it; random keys as their data."""
    is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _to_jax(array: np.ndarray, like: Any) -> Array:
    """Undo :func:`to_numpy`, given an array of the same kind."""
    if jnp.issubdtype(jnp.result_type(like), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    # NumPy writes what it does not know, such as bfloat16, as raw bytes.
    return jnp.asarray(array.view(jnp.result_type(like)))


def _by_name(tree: Any) -> list[tuple[str, Any]]:
    """Named leaves, sorted: those of NumPyro distributions come in any order."""
    leaves = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return sorted(leaves, key=operator.itemgetter(0))
