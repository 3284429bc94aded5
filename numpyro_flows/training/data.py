"""Data of ``nf.fit``: checks of the arguments."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ..augmented import AugmentedFlow
from ..checks import as_numpy, check_context, check_floating, check_integers, check_unmasked
from ..dequantization import Dequantized
from ..distribution import FlowDistribution
from ..transforms import Conditioned, Embedded


class Table(NamedTuple):
    """Checked data as NumPy arrays of n rows each; weights have mean 1 where they are not 0."""

    x: np.ndarray
    context: Any
    weights: np.ndarray

    def take(self, rows: np.ndarray) -> "Table":
        return jax.tree.map(lambda array: array[rows], self)

    def as_trained(self) -> dict[str, Any]:
        """Arrays by name, without a context if there is none, in the precision of the training."""
        arrays = {"x": self.x, "weights": self.weights}
        if self.context is not None:
            arrays["context"] = self.context
        return jax.tree.map(_as_trained, arrays)


def _as_trained(array: np.ndarray) -> np.ndarray:
    return in_precision(array) if np.issubdtype(array.dtype, np.floating) else array


def in_precision(value: np.ndarray) -> np.ndarray:
    """An array in the precision of the flow: float32, unless JAX is in 64-bit mode."""
    with np.errstate(over="ignore"):
        return value.astype(jnp.result_type(float))


def say_rows(mask: np.ndarray) -> str:
    """Which rows: '2 of 100 rows (rows 4, 17)'."""
    rows = np.flatnonzero(mask)
    listed = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
    return f"{len(rows)} of {len(mask)} rows ({'row' if len(rows) == 1 else 'rows'} {listed})"


def check_data(
    flow: FlowDistribution | AugmentedFlow,
    x: ArrayLike,
    context: Any,
    weights: ArrayLike | None,
    *,
    whole: bool = True,
) -> Table:
    """Checked data of a flow of real numbers; its support is checked later, by ``unconstrain``.

    :param whole: whether these are all rows; else it may be one, and weights stay what they are.
    """
    _check_unbound(flow)
    if flow.support.is_discrete and not jnp.issubdtype((given := as_numpy(x)).dtype, jnp.floating):
        check_unmasked("x", x)
        x = given.astype(float)  # integers, which mixed rows hold as floating numbers
    x = _as_float("x", x)
    _check_rows(flow, x, 2 if whole else 1)
    _check_finite("x", in_precision(x))
    return _table(flow, x, context, weights, whole)


def check_levels(
    model: Dequantized,
    x: ArrayLike,
    context: Any,
    weights: ArrayLike | None,
    *,
    whole: bool = True,
) -> Table:
    """Checked data of a model of integers."""
    _check_unbound(model.flow)
    check_unmasked("x", x)
    x = as_numpy(x)
    check_integers("x", x, model.levels, model.event_shape, model.start)
    _check_rows(model.flow, x, 2 if whole else 1)
    return _table(model.flow, x, context, weights, whole)


def _as_float(name: str, value: ArrayLike) -> np.ndarray:
    check_unmasked(name, value)
    array = as_numpy(value)
    check_floating(name, array.dtype)
    return array


def _check_finite(name: str, value: np.ndarray) -> None:
    bad = ~np.isfinite(value.reshape(len(value), -1)).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{name}: {say_rows(bad)} hold NaN or values that are infinite in {value.dtype}; drop "
            "or impute them."
        )


def _check_unbound(flow: Any) -> None:
    if not isinstance(flow, FlowDistribution | AugmentedFlow):
        raise TypeError(f"flow: expected a FlowDistribution, got {type(flow).__name__}.")
    if flow.batch_shape or isinstance(flow.transform, Conditioned):
        raise ValueError(
            f"flow: expected batch shape () and no bound context, got {flow}. Pass the conditional "
            "flow itself and `context=`, not `flow.condition(context)`."
        )


def _check_rows(flow: FlowDistribution | AugmentedFlow, x: np.ndarray, least: int) -> None:
    if x.ndim == 0 or x.shape[1:] != flow.event_shape:
        shape = str(("n", *flow.event_shape)).replace("'", "")
        hint = " Scalar data needs a last axis: x[:, None]." if flow.event_shape == (1,) else ""
        raise ValueError(f"x: expected shape {shape}, one draw per row, got {x.shape}.{hint}")
    if len(x) < least:
        raise ValueError(f"x: expected at least {least} rows, got {len(x)}.")


def _table(
    flow: FlowDistribution | AugmentedFlow,
    x: np.ndarray,
    context: Any,
    weights: ArrayLike | None,
    whole: bool,
) -> Table:
    """Rows together with their checked contexts and weights."""
    n = len(x)
    if flow.context_dim and context is None:
        raise ValueError(
            "context: expected one, as this flow is conditional; pass `context=` of shape "
            f"({n}, {flow.context_dim})."
        )
    if context is not None and not flow.context_dim:
        check_context("This flow", context, 0)
    if context is not None and isinstance(flow.transform, Embedded):
        for leaf in jax.tree.leaves(context):
            check_unmasked("context", leaf)
        context = jax.tree.map(np.asarray, context)
        for leaf in jax.tree.leaves(context):
            if leaf.shape[:1] != (n,):
                raise ValueError(
                    f"context: expected arrays with {n} rows, one per row of x, got one of shape "
                    f"{leaf.shape}."
                )
            _check_finite("context", leaf)
    elif context is not None:
        context = _as_float("context", context)
        if context.shape != (n, flow.context_dim):
            hint = " A scalar covariate needs a last axis: context[:, None]."
            raise ValueError(
                f"context: expected shape ({n}, {flow.context_dim}), one row per row of x, "
                f"got {context.shape}.{hint if context.ndim == 1 else ''}"
            )
        _check_finite("context", in_precision(context))
    mass = _checked_masses(n, weights)
    return Table(x, context, _masses(mass) if whole else mass)


def _checked_masses(n: int, weights: ArrayLike | None) -> np.ndarray:
    check_unmasked("weights", weights)
    mass = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    if mass.shape != (n,):
        raise ValueError(
            f"weights: expected shape ({n},), one number per row of x, got {mass.shape}."
        )
    _check_finite("weights", mass)
    if (mass < 0).any():
        raise ValueError(
            f"weights: expected non-negative numbers, got {say_rows(mass < 0)} below 0; "
            "0 leaves a row out."
        )
    return mass


def _masses(mass: np.ndarray) -> np.ndarray:
    mass = in_precision(mass / np.maximum(np.max(mass), np.finfo(float).tiny))
    positive = mass[mass > 0]
    if len(positive) < 2:
        raise ValueError(f"weights: expected at least 2 positive ones, got {len(positive)}.")
    return mass / positive.mean(dtype=float)
