"""Batches of rows in memory: which rows are held out, and the order of each pass."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array

from .mesh import Split


class Batches(NamedTuple):
    """Some batches of a pass over the data, stacked along a first axis of ``steps``.

    :ivar batches: what the source's ``select`` reads.
    :ivar num_rows: rows in each, shape ``(steps,)``.
    :ivar weights: their weights' sum, shape ``(steps,)``.
    :ivar last: whether the pass ends with them.
    """

    batches: Any
    num_rows: np.ndarray
    weights: np.ndarray
    last: bool = True


class Source(Protocol):
    """Where batches come from.

    :ivar train: what ``select`` takes rows from in training.
    :ivar monitored: the same for the rows that are scored after each epoch: those held out, or else
        those of the training.
    :ivar monitored_weight: the sum of their weights.
    :ivar train_constant: weighted mean, over the rows for training, of what their log density has
        beside the loss's.
    :ivar monitored_constant: and over those that are scored.
    """

    train: Any
    monitored: Any
    monitored_weight: float
    train_constant: float
    monitored_constant: float

    @property
    def num_steps(self) -> int:
        """Steps of an epoch."""

    def epoch(self, number: int) -> Iterator[Batches]:
        """One pass over the rows for training, in an order of its own."""

    def monitored_batches(self) -> Iterator[Any]:
        """Batches, stacked along a first axis, of all rows that are scored."""

    @staticmethod
    def select(data: Any, batch: Any) -> tuple[dict[str, Any], Array]:
        """The rows of a batch, and which of them are no padding."""


class Arrays:
    """Rows in memory, some of them held out.

    :param data: arrays of n rows each.
    :param constants: of each row, shape ``(n,)``: what its log density has beside the loss's.
    :param seed: numbers for NumPy's generator.
    :param batch_size: rows per step.
    :param num_held_out: rows that no step sees.
    """

    train: Any
    monitored: Any
    _monitored: Any

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
        weights = data["weights"]
        self.train_constant = np.average(constants[train], weights=weights[train])
        self.monitored_constant = np.average(constants[monitored], weights=weights[monitored])
        self.monitored_weight = weights[monitored].sum(dtype=float)
        self._weights, self._seed, self._batch_size = weights[train], seed, batch_size
        self._place(data, train, monitored)

    def _place(self, data: dict[str, Any], train: np.ndarray, monitored: np.ndarray) -> None:
        """Put rows on the device."""

        def rows(index: np.ndarray) -> Any:
            return jax.device_put(jax.tree.map(lambda array: array[index], data))

        self.train = rows(train)
        self.monitored = self.train if monitored is train else rows(monitored)
        self._monitored = self._in_batches(np.arange(len(monitored)), for_training=False)

    def _in_batches(
        self, order: np.ndarray, for_training: bool = True, multiple: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Row indices of each batch and whether an entry is a row or padding, ``(steps, size)``."""
        n = len(order)
        # Up to eight devices get the batches of one: a solver's steps depend on the padding too.
        size = min(
            self._batch_size if for_training else max(self._batch_size, 1024), -(-n // 8) * 8
        )
        size = -(-size // multiple) * multiple
        num = -(-n // size)
        is_row = np.arange(num * size) < n
        # Padding repeats a row of its own batch: no other one can spoil the gradient.
        order = np.pad(order, (0, num * size - n), mode="edge")
        return order.reshape(num, size), is_row.reshape(num, size)

    def monitored_batches(self) -> Iterator[Any]:
        yield self._monitored

    @property
    def num_steps(self) -> int:
        return -(-len(self._weights) // self._batch_size)

    def _pass(self, number: int) -> np.ndarray:
        """The order of a pass over the rows for training, from 1."""
        return np.random.default_rng([*self._seed, number]).permutation(len(self._weights))

    def _epoch(self, index: np.ndarray, is_row: np.ndarray, batches: Any) -> Batches:
        weights = np.where(is_row, self._weights[index], 0.0)
        return Batches(batches, is_row.sum(1), weights.sum(1, dtype=float))

    def epoch(self, number: int) -> Iterator[Batches]:
        index, is_row = self._in_batches(self._pass(number))
        yield self._epoch(index, is_row, (index, is_row))

    @staticmethod
    def select(data: Any, batch: tuple[Array, Array]) -> tuple[dict[str, Any], Array]:
        index, is_row = batch
        return jax.tree.map(lambda array: array[index], data), is_row


class SharedArrays(Arrays):
    """The same for one of several fits that share rows on the device: batches are indices of all.

    Neither ``train`` nor ``monitored`` is there: the caller has the rows.
    """

    def _place(self, data: dict[str, Any], train: np.ndarray, monitored: np.ndarray) -> None:
        self._train = train
        index, is_row = self._in_batches(np.arange(len(monitored)), for_training=False)
        self._monitored = monitored[index], is_row

    def epoch(self, number: int) -> Iterator[Batches]:
        index, is_row = self._in_batches(self._pass(number))
        yield self._epoch(index, is_row, (self._train[index], is_row))


class SplitArrays(Arrays):
    """The same rows in the same batches, of which each device of a mesh gets its own share.

    Rows stay in the memory of the hosts; a pass puts them onto the devices in the order of its
    batches, so that no program moves rows between devices.
    """

    def __init__(self, split: Split, *args: Any):
        self._split = split
        super().__init__(*args)

    def _place(self, data: dict[str, Any], train: np.ndarray, monitored: np.ndarray) -> None:
        self.train = self.monitored = None
        self._data, self._train = data, train
        order = np.arange(len(monitored))
        index, is_row = self._in_batches(order, for_training=False, multiple=self._split.size)
        self._monitored = self._placed(monitored[index], is_row)

    def _placed(self, rows: np.ndarray, is_row: np.ndarray) -> Any:
        """The rows of each batch, and which of them are no padding."""
        placed = self._split.placed
        return jax.tree.map(lambda array: placed(array, rows), self._data), placed(is_row)

    def epoch(self, number: int) -> Iterator[Batches]:
        index, is_row = self._in_batches(self._pass(number), multiple=self._split.size)
        yield self._epoch(index, is_row, self._placed(self._train[index], is_row))

    @staticmethod
    def select(data: Any, batch: tuple[Any, Array]) -> tuple[dict[str, Any], Array]:
        return batch
