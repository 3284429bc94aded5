"""Flows in files: configuration and parameters in one zip archive, without pickle.

``config.json`` holds the tree of the flow: classes by name, their fields, numbers and strings.
Each array is a ``.npy`` file of its own, named after its place in the flow, so that
``numpy.load(path)["base_dist.base_dist.loc"]`` reads one without this package.

A file is data, never code. The names in it are looked up among this package's modules, those
given to :func:`register`, and NumPyro's distributions, transforms and constraints, and objects
are made from their fields without ``__init__``: loading a stranger's file runs nothing of theirs.
"""

import dataclasses
import io
import json
import math
import os
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions
from numpyro.distributions import Distribution, TransformedDistribution, constraints, transforms
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform

_FORMAT: Final = "numpyro_flows"
_VERSION: Final = 1

_Class = TypeVar("_Class", bound=type)
_registered: dict[str, type] = {}

# A flow transform is also a NumPyro transform: modules come first.
_KINDS: Final[dict[str, tuple[type, dict[str, Any]]]] = {
    "module": (eqx.Module, _registered),
    "distribution": (Distribution, vars(distributions)),
    "transform": (Transform, vars(transforms)),
    "constraint": (Constraint, vars(constraints)),
}
# NumPyro tells these apart by identity, so they are saved by name.
_CONSTANTS: Final = {k: v for k, v in vars(constraints).items() if isinstance(v, Constraint)}
_SEQUENCES: Final[dict[str, Any]] = {"list": list, "tuple": tuple, "frozenset": frozenset}
_MAPPINGS: Final[dict[str, Any]] = {"dict": dict, "OrderedDict": OrderedDict}


def register(cls: _Class) -> _Class:
    """Let :func:`save` and :func:`load` handle a module class of your own; usable as a decorator.

    Files name the class by ``cls.__name__``; it must be registered before they are loaded.

    :param cls: a subclass of ``equinox.Module``, such as a ``FlowTransform``.
    :return: the class.
    :raises TypeError: if it is not one.
    :raises ValueError: if its name already belongs to another class.

    >>> @register
    ... class Temperature(eqx.Module):
    ...     value: float = eqx.field(static=True)
    """
    if not (isinstance(cls, type) and issubclass(cls, eqx.Module)):
        raise TypeError(f"register: expected a subclass of equinox.Module, got {cls!r}.")
    owner = _find("module", cls.__name__) or cls
    taken = f"{owner.__module__}.{owner.__qualname__}"
    # A notebook cell that runs again defines its class anew, under the same full name.
    anew = taken == f"{cls.__module__}.{cls.__qualname__}" and "<locals>" not in taken
    if owner is not cls and not anew:
        raise ValueError(
            f"register: expected an unused class name, got {cls.__name__!r}, which belongs to "
            f"{taken}. Rename the class."
        )
    _registered[cls.__name__] = cls
    return cls


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh file name beside ``path`` that takes its place when the block ends well.

    Whoever is killed or fails while writing leaves the previous file as it was.
    """
    target = Path(os.fsdecode(path)).resolve()
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | os.PathLike[str], flow: Any) -> None:
    """Write a flow or a transform to a file, its configuration and its parameters.

    An existing file is replaced only once the new one is complete.

    :param path: name of the file, used as it is; there is no customary suffix.
    :param flow: a ``FlowDistribution``, ``AugmentedFlow``, ``FlowTransform`` or ``Dequantized``,
        made of this package's classes, NumPyro's, and those given to :func:`register`.
    :raises TypeError: for anything else, or if the flow holds something that is not data
        (a function, an instance of an unregistered class, a tracer).

    >>> import tempfile, os, jax, numpyro_flows as nf
    >>> flow = nf.realnvp(jax.random.key(0), 2)
    >>> path = os.path.join(tempfile.mkdtemp(), "flow")
    >>> save(path, flow)
    >>> bool(load(path).transform.eq(flow.transform))
    True
    """
    if not (_is_own(type(flow)) or isinstance(flow, eqx.Module)):
        raise TypeError(f"save: expected a flow or a transform, got {type(flow).__name__}.")
    arrays: dict[str, np.ndarray] = {}
    tree = _encode(flow, "", arrays)
    config = {"format": _FORMAT, "version": _VERSION, "flow": tree}
    with written_whole(path) as temporary, zipfile.ZipFile(temporary, "x") as archive:
        archive.writestr("config.json", json.dumps(config, indent=1, allow_nan=False))
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def load(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save` wrote. Runs nothing from the file.

    :param path: name of the file.
    :return: the flow or transform, equal to the one saved, its arrays on the default device.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if the file is damaged, foreign or of a newer version, names a class that
        is not registered, or holds 64-bit numbers while JAX is in 32-bit mode.

    >>> import tempfile, os, jax, numpyro_flows as nf
    >>> path = os.path.join(tempfile.mkdtemp(), "flow")
    >>> save(path, nf.nice(jax.random.key(0), 2))
    >>> load(path)
    FlowDistribution(Normal -> 8 x Coupling(Shift) -> DiagonalScale, batch_shape=(),
                     event_shape=(2,), parameters=34826)
    """
    name = os.fsdecode(path)
    with open(name, "rb") as file:
        data = file.read()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _read(archive)
    except Exception as error:  # A damaged file can fail anywhere, in any way.
        reason = str(error)
        if type(error) is not ValueError:
            reason = (
                "expected a whole file written by `nf.save`, got a damaged or foreign one "
                f"({type(error).__name__}: {error})."
            )
        raise ValueError(f"Cannot load {name!r}: {reason}") from error


def _subclasses(cls: Any) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _find(kind: str, name: str) -> type | None:
    """The one class of this kind that a file may mean by this name."""
    base, namespace = _KINDS[kind]
    cls = namespace.get(name)
    if isinstance(cls, type) and issubclass(cls, base):
        return cls
    return next((c for c in _subclasses(base) if c.__name__ == name and _is_own(c)), None)


def _is_own(cls: type) -> bool:
    """Whether a class is this package's or registered: what may be the root of a file."""
    package = cls.__module__.partition(".")[0]
    return package == __package__ or _registered.get(cls.__name__) is cls


def _has_one_transform(cls: type) -> bool:
    """Whether NumPyro keeps the transform of this distribution in a list."""
    return _is_own(cls) and issubclass(cls, TransformedDistribution)


def _fields(value: Any, kind: str) -> dict[str, Any]:
    """What makes up an object of one of the kinds, by name."""
    cls: Any = type(value)
    if kind == "module":
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(cls)}
    if kind == "distribution":
        # NumPyro collects the names in sets, whose order differs between processes.
        names = {*cls.gather_pytree_data_fields(), *cls.gather_pytree_aux_fields()}
        fields = {name: vars(value).get(name) for name in sorted(names)}
        if _has_one_transform(cls):
            (fields["transform"],) = fields.pop("transforms")
        return fields
    children, (names, aux) = cls.tree_flatten(value)
    return dict(zip(names, children, strict=True)) | aux


def _build(kind: str, cls: Any, fields: dict[str, Any]) -> Any:
    """Undo :func:`_fields`."""
    value = object.__new__(cls)
    state = dict(fields)
    if _has_one_transform(cls):
        state["transforms"] = [state.pop("transform")]
    if kind == "distribution":
        # None stands for an attribute that was never set; the class has its own default for it.
        state = {k: v for k, v in state.items() if v is not None or not hasattr(cls, k)}
    vars(value).update(state)
    expected = _fields(value, kind).keys()
    if expected != fields.keys():
        raise ValueError(
            f"{cls.__name__}: expected the fields {sorted(expected)}, got {sorted(fields)}. "
            "Was the file saved with another version of numpyro_flows, NumPyro or your class?"
        )
    return value


def _portable(dtype: Any) -> bool:
    """Whether .npy files keep this dtype; bfloat16 and random keys come back as something else."""
    return isinstance(dtype, np.dtype) and dtype.isbuiltin == 1 and dtype.kind in "biufc"


def _refuse(value: Any, path: str) -> TypeError:
    if isinstance(value, jax.core.Tracer):
        hint = "Save outside of `jit`, `grad` and `vmap`, where its numbers are known."
    elif isinstance(value, jax.Array | np.ndarray) and not _portable(value.dtype):
        hint = f"Files keep NumPy's own dtypes, not {value.dtype}; convert it to float32."
    else:
        hint = (
            "Files hold data only. Mark a module class of your own with `@nf.io.register`; for a "
            "function, use a named activation (`numpyro_flows.nn.ACTIVATIONS`); take "
            "distributions, NumPyro transforms and constraints from `numpyro.distributions`."
        )
    got = f"{' '.join(repr(value).split()):.80} ({type(value).__name__})"
    return TypeError(f"save: {path or 'the transform'} holds {got}. {hint}")


def _encode(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """``value`` as JSON; its arrays go to ``arrays`` under their paths."""
    cls = type(value)
    if value is None or cls in (bool, int, str):
        return value
    if cls is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if cls in _SEQUENCES.values():
        return {cls.__name__: [_encode(v, f"{path}[{i}]", arrays) for i, v in enumerate(value)]}
    if cls in _MAPPINGS.values() and all(type(key) in (str, int) for key in value):
        return {cls.__name__: [[k, _encode(v, f"{path}[{k!r}]", arrays)] for k, v in value.items()]}
    is_numpy = cls is np.ndarray or isinstance(value, np.generic)
    is_jax = isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
    if (is_numpy or is_jax) and _portable(value.dtype):
        arrays[path] = np.asarray(value)
        return {"numpy" if is_numpy else "jax": path}
    for name, constant in _CONSTANTS.items():
        if constant is value:
            return {"constant": name}
    for kind, (base, _) in _KINDS.items():
        if isinstance(value, base) and _find(kind, cls.__name__) is cls:
            prefix = f"{path}." if path else ""
            fields = _fields(value, kind).items()
            return {kind: [cls.__name__, {k: _encode(v, prefix + k, arrays) for k, v in fields}]}
    raise _refuse(value, path)


def _read(archive: zipfile.ZipFile) -> Any:
    config = json.loads(archive.read("config.json"))
    if config["format"] != _FORMAT:
        raise ValueError(f"expected the format {_FORMAT!r}, got {config['format']!r}.")
    if config["version"] not in range(1, _VERSION + 1):
        raise ValueError(
            f"expected a format version up to {_VERSION}, got {config['version']!r}. "
            "Upgrade numpyro_flows to read it."
        )
    flow = _decode(config["flow"], archive)
    if not _is_own(type(flow)):
        raise ValueError(f"expected a flow or a transform, got {type(flow).__name__}.")
    return flow


def _decode(node: Any, archive: zipfile.ZipFile) -> Any:
    """Undo :func:`_encode`."""
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "float":
        return float(content)
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](_decode(item, archive) for item in content)
    if kind in _MAPPINGS:
        return _MAPPINGS[kind]((key, _decode(item, archive)) for key, item in content)
    if kind in ("jax", "numpy"):
        return _read_array(content, kind == "jax", archive)
    if kind == "constant":
        return _CONSTANTS[content]
    name, fields = content
    cls = _find(kind, name)
    if cls is None:
        hint = " Register it with `nf.io.register` before loading." if kind == "module" else ""
        raise ValueError(f"expected the name of a known {kind} class, got {name!r}.{hint}")
    return _build(kind, cls, {key: _decode(item, archive) for key, item in fields.items()})


def _read_array(name: str, is_jax: bool, archive: zipfile.ZipFile) -> Any:
    data = io.BytesIO(archive.read(f"{name}.npy"))
    array = np.lib.format.read_array(data, allow_pickle=False)
    if not _portable(array.dtype):
        raise ValueError(f"{name}: expected an array of numbers, got dtype {array.dtype}.")
    if not is_jax:
        return array[()]
    value = jnp.asarray(array)
    if value.dtype != array.dtype:
        raise ValueError(
            f"{name}: expected numbers that fit JAX's 32-bit mode, got {array.dtype}. Enable "
            '64 bits before loading: `jax.config.update("jax_enable_x64", True)`.'
        )
    return value
