"""Checks of arguments, each in one place: keys, sizes, values, shapes and contexts.

Every message says what was expected, what came, and how to mend it. Shapes and dtypes are known
while tracing, so under ``jit`` these checks cost nothing at run time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint


def is_real(support: Constraint) -> bool:
    """Whether a constraint is the real numbers or real arrays, where every value is inside."""
    return getattr(support, "base_constraint", support) is constraints.real


def check_key(key: object) -> Array:
    """Return ``key`` if it is one PRNG key, new style or legacy.

    :raises TypeError: for anything else, an int in particular.
    """
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return key
        if key.dtype == jnp.uint32 and key.shape == (2,):
            return key
    got = f"{type(key).__name__} of shape {jnp.shape(key)}" if hasattr(key, "shape") else repr(key)
    hint = (
        f"write `jax.random.key({key})`."
        if isinstance(key, int)
        else "make one with `jax.random.key(seed)`; inside a NumPyro model, run the model "
        "under `numpyro.handlers.seed`."
    )
    raise TypeError(f"Expected a single JAX random key, got {got}: {hint}")


def check_size(name: str, value: object, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``.

    :raises TypeError: if it is not an integer.
    :raises ValueError: if it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r} ({type(value).__name__}).")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}.")
    return value


def check_image_shape(shape: object) -> tuple[int, int, int]:
    """Return ``shape`` as ``(H, W, C)``.

    :raises ValueError: if it has not three axes, or sizes below 1.
    :raises TypeError: for sizes that are no integers.
    """
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if len(sizes) != 3:
        raise ValueError(
            f"shape: expected the shape (H, W, C) of an image, got {shape}. Grey images have one "
            "channel: x[..., None]."
        )
    height, width, channels = (check_size("shape", size) for size in sizes)
    return height, width, channels


def check_float(name: str, value: ArrayLike) -> Array:
    """Return ``value`` as a floating array.

    :raises TypeError: if its dtype is not floating.
    """
    check_unmasked(name, value)
    if hasattr(value, "dtypes"):  # a table
        value = as_numpy(value)
        check_floating(name, value.dtype)
    array = jnp.asarray(value)
    check_floating(name, array.dtype)
    return array


def check_unmasked(name: str, value: Any) -> None:
    """Check that no entry is marked as missing, since the number stored there means nothing.

    Missing are masked entries of NumPy arrays, NA of pandas, and what an xarray's attributes say
    (``_FillValue`` and ``missing_value`` of the CF conventions).

    :raises ValueError: if one is.
    """
    mask = _missing(value)
    if mask is not None and np.any(mask):
        rows = mask.reshape(len(mask), -1).any(axis=1) if mask.ndim else mask
        raise ValueError(
            f"{name}: {rows.sum()} of {rows.size} rows have masked entries, which are missing "
            "values; drop or impute them."
        )


def _missing(value: Any) -> np.ndarray | None:
    """Which entries are missing; None for containers that cannot mark any."""
    if isinstance(value, np.ma.MaskedArray):
        return np.ma.getmaskarray(value)
    if callable(isna := getattr(value, "isna", None)):  # pandas and what follows it
        return np.asarray(isna())
    attributes = getattr(value, "attrs", None)
    if isinstance(attributes, Mapping):  # xarray and what follows it
        said = [attributes[key] for key in ("_FillValue", "missing_value") if key in attributes]
        array, fills = np.asarray(value), np.concatenate([[], *map(np.ravel, said)])
        return np.isin(array, fills[np.isfinite(fills)].astype(array.dtype))
    return None


def as_numpy(value: Any) -> np.ndarray:
    """A container as one array; in tables, nullable numbers beside others are numbers too."""
    array = np.asarray(value)
    dtypes = getattr(value, "dtypes", None)
    if array.dtype != object or dtypes is None:
        return array
    kinds = {getattr(dtype, "kind", "O") for dtype in np.ravel(np.asarray(dtypes, object))}
    if not kinds <= set("fiu"):
        return array
    return value.to_numpy(dtype=float if "f" in kinds else int)


def check_floating(name: str, dtype: np.dtype) -> None:
    """Check that ``dtype`` is floating.

    :raises TypeError: if it is not.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name}: expected floating-point numbers, got dtype {dtype}. "
            "Convert measurements with `.astype(float)`. Counts and grey levels have no density "
            "under a flow: `nf.dequantize(flow, levels)` models them."
        )


def check_event_shape(name: str, shape: tuple[int, ...], event_shape: tuple[int, ...]) -> None:
    """Check that ``shape`` ends in ``event_shape``.

    :raises ValueError: if it does not.
    """
    n = len(event_shape)
    if len(shape) < n or shape[len(shape) - n :] != event_shape:
        batch = "(*batch, " + ", ".join(map(str, event_shape)) + ")" if n else "(*batch,)"
        raise ValueError(
            f"{name}: expected shape {batch}, got {shape}. "
            f"The trailing axes must be the event shape {event_shape}."
        )


def check_integers(
    name: str,
    value: Array | np.ndarray,
    levels: int | tuple[int, ...],
    event_shape: tuple[int, ...],
    start: int | tuple[int, ...] = 0,
) -> None:
    """Check data of a discrete model; the values only where they are known.

    :param levels: and ``start``: of all, or one for each column.
    :raises TypeError: for another dtype.
    :raises ValueError: for a wrong event shape or values outside of start to start + levels - 1.
    """
    lowest = np.array(start)
    highest = lowest + np.array(levels) - 1
    expected = f"integers from {lowest.tolist()} to {highest.tolist()}"
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{name}: expected {expected}, got dtype {value.dtype}. Real numbers "
            "have a density as they are: use the flow without `nf.dequantize`."
        )
    check_event_shape(name, value.shape, event_shape)
    if isinstance(value, jax.core.Tracer) or not value.size:
        return
    rows = tuple(range(value.ndim - highest.ndim))
    smallest, largest = np.asarray(value.min(rows)), np.asarray(value.max(rows))
    if (smallest < lowest).any() or (largest > highest).any():
        raise ValueError(
            f"{name}: expected {expected}, got {smallest.tolist()} to {largest.tolist()}. Pass "
            "`levels=` and `start=` to `nf.dequantize`, or rescale the data."
        )


def broadcast_batches(
    name: str, shape: tuple[int, ...], other_name: str, other: tuple[int, ...]
) -> tuple[int, ...]:
    """The batch shape of two values together.

    :raises ValueError: if the shapes do not broadcast.
    """
    try:
        return jnp.broadcast_shapes(shape, other)
    except ValueError:
        raise ValueError(
            f"{name} of batch shape {shape} and {other_name} of batch shape {other} do not "
            "broadcast: expected one row of the one for each row of the other, or a single row."
        ) from None


def check_context(owner: str, context: ArrayLike | None, context_dim: int) -> Array | None:
    """Return ``context`` as a floating array of shape ``(*batch, context_dim)``, or None.

    :raises ValueError: if it is missing, surplus, or of the wrong width.
    :raises TypeError: if its dtype is not floating.
    """
    if context_dim == 0:
        if context is not None:
            raise ValueError(
                f"{owner} takes no context, got one of shape {jnp.shape(context)}. "
                "Build it with `context_dim=...` to condition on covariates."
            )
        return None
    if context is None:
        raise ValueError(
            f"{owner} is conditional (context_dim={context_dim}) and got no context: "
            "call flow.condition(context), or pass `context=` to the transform."
        )
    array = check_float("context", context)
    if array.shape[-1:] != (context_dim,):
        raise ValueError(
            f"context: expected shape (*batch, {context_dim}), got {array.shape}."
            + (
                " A scalar covariate needs a last axis: context[..., None]."
                if context_dim == 1
                else ""
            )
        )
    return array
