"""Data of ``nf.fit``: checks of the arguments, the rows that are held out, and batches."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
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


# Checks.


def check_data(
    flow: FlowDistribution | AugmentedFlow,
    x: ArrayLike,
    context: Any,
    weights: ArrayLike | None,
) -> Table:
    """Checked data of a flow of real numbers; its support is checked later, by ``unconstrain``."""
    _check_unbound(flow)
    if flow.support.is_discrete and not jnp.issubdtype((whole := as_numpy(x)).dtype, jnp.floating):
        check_unmasked("x", x)
        x = whole.astype(float)  # integers, which mixed rows hold as floating numbers
    x = _as_float("x", x)
    _check_rows(flow, x)
    _check_finite("x", in_precision(x))
    return _table(flow, x, context, weights)


def check_levels(
    model: Dequantized, x: ArrayLike, context: Any, weights: ArrayLike | None
) -> Table:
    """Checked data of a model of integers."""
    _check_unbound(model.flow)
    check_unmasked("x", x)
    x = as_numpy(x)
    check_integers("x", x, model.levels, model.event_shape, model.start)
    _check_rows(model.flow, x)
    return _table(model.flow, x, context, weights)


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


def _check_rows(flow: FlowDistribution | AugmentedFlow, x: np.ndarray) -> None:
    if x.ndim == 0 or x.shape[1:] != flow.event_shape:
        shape = str(("n", *flow.event_shape)).replace("'", "")
        hint = " Scalar data needs a last axis: x[:, None]." if flow.event_shape == (1,) else ""
        raise ValueError(f"x: expected shape {shape}, one draw per row, got {x.shape}.{hint}")
    if len(x) < 2:
        raise ValueError(f"x: expected at least 2 rows, got {len(x)}.")


def _table(
    flow: FlowDistribution | AugmentedFlow, x: np.ndarray, context: Any, weights: ArrayLike | None
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
    return Table(x, context, _masses(n, weights))


def _masses(n: int, weights: ArrayLike | None) -> np.ndarray:
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
    mass = in_precision(mass / np.maximum(np.max(mass), np.finfo(float).tiny))
    positive = mass[mass > 0]
    if len(positive) < 2:
        raise ValueError(f"weights: expected at least 2 positive ones, got {len(positive)}.")
    return mass / positive.mean(dtype=float)


# Batches.


class Batches(NamedTuple):
    """Some batches of a pass over the data, stacked along a first axis of ``steps``.

    :ivar batches: what :attr:`Arrays.select` reads.
    :ivar num_rows: rows in each, shape ``(steps,)``.
    :ivar weights: their weights' sum, shape ``(steps,)``.
    :ivar last: whether the pass ends with them.
    """

    batches: Any
    num_rows: np.ndarray
    weights: np.ndarray
    last: bool = True


class Arrays:
    """Rows in memory, some of them held out, as a source of batches.

    A source of another kind has the same public members; one that reads rows from elsewhere holds
    nothing in :attr:`train`, hands out the rows themselves in several :class:`Batches` per epoch,
    and has a ``select`` that returns them.

    :param data: arrays of n rows each.
    :param constants: of each row, shape ``(n,)``: what its log density has beside the loss's.
    :param seed: numbers for NumPy's generator.
    :param batch_size: rows per step.
    :param num_held_out: rows that no step sees.
    :ivar train: the rows for training, on the device.
    :ivar monitored: the rows that are scored after each epoch: those held out, or else the same.
    :ivar monitored_batches: batches of all of these.
    :ivar monitored_weight: the sum of their weights.
    :ivar train_constant: weighted mean of the constants of ``train``.
    :ivar monitored_constant: and of ``monitored``.
    """

    def __init__(
        self,
        data: dict[str, Any],
        constants: np.ndarray,
        seed: list[int],
        batch_size: int,
        num_held_out: int,
    ):
        # NumPy shuffles, 30 times faster than XLA's sort on a CPU, and with nothing to compile.
        order = np.random.default_rng([*seed, 0]).permutation(len(constants))
        held_out, train = np.split(order, [num_held_out])
        monitored = held_out if num_held_out else train
        self.train = jax.device_put(jax.tree.map(lambda array: array[train], data))
        self.monitored = self.train
        if num_held_out:
            self.monitored = jax.device_put(jax.tree.map(lambda array: array[held_out], data))
        weights = data["weights"]
        self.train_constant = np.average(constants[train], weights=weights[train])
        self.monitored_constant = np.average(constants[monitored], weights=weights[monitored])
        self.monitored_batches = in_batches(np.arange(len(monitored)), max(batch_size, 1024))
        self.monitored_weight = weights[monitored].sum(dtype=float)
        self._weights, self._seed, self._batch_size = weights[train], seed, batch_size

    @property
    def num_steps(self) -> int:
        """Steps of an epoch."""
        return -(-len(self._weights) // self._batch_size)

    def epoch(self, number: int) -> Iterator[Batches]:
        """One pass over the rows for training, in an order of its own; here in one piece."""
        n = len(self._weights)
        order = np.random.default_rng([*self._seed, number]).permutation(n)
        index, is_row = in_batches(order, self._batch_size)
        weights = np.where(is_row, self._weights[index], 0.0)
        yield Batches((index, is_row), is_row.sum(1), weights.sum(1, dtype=float))

    @staticmethod
    def select(data: Any, batch: tuple[Array, Array]) -> tuple[dict[str, Any], Array]:
        """The rows of a batch, and which of them are no padding."""
        index, is_row = batch
        return jax.tree.map(lambda array: array[index], data), is_row


def in_batches(order: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices of each batch and whether an entry is a row or padding, ``(steps, size)``."""
    n = len(order)
    size = min(batch_size, n)
    num = -(-n // size)
    is_row = np.arange(num * size) < n
    # Padding repeats a row of its own batch: no other one can spoil the gradient.
    order = np.pad(order, (0, num * size - n), mode="edge")
    return order.reshape(num, size), is_row.reshape(num, size)
