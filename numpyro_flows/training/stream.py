"""Batches that are read anew in each pass over the data: files, loaders, anything with a length."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array

from ..dequantization import Dequantized
from .batches import Batches
from .columns import LOOK_AT, without_bound
from .data import Table, check_data, check_levels, in_precision
from .standardize import Moments, Numbers, is_discrete, numbers_of, unconstrain, whiten
from .tasks import Settings, Task, is_embedded, parts_of, parts_of_levels, standardized, with_noise

#: Steps of one compiled call, and batches that rows are shuffled among.
PIECE: Final = 64

_Item = TypeVar("_Item")


def is_batches(x: Any, event_shape: tuple[int, ...]) -> bool:
    """Whether data are batches to read, and not an array or what NumPy makes one of."""
    if hasattr(x, "__array__") or not (isinstance(x, Iterable) or hasattr(x, "__getitem__")):
        return False
    if not isinstance(x, list | tuple):
        return not isinstance(x, str | bytes)
    first: Any = x[0] if x else None
    is_pair = isinstance(first, tuple) and len(first) == 2 and np.ndim(first[0]) > len(event_shape)
    return isinstance(first, dict) or is_pair or np.ndim(first) == len(event_shape) + 1


def check_batches(name: str, batches: Any) -> None:
    """Check that batches can be read again.

    :raises TypeError: for an iterator, or if there is no length.
    :raises ValueError: if there are none.
    """
    if isinstance(batches, Iterator) or not hasattr(batches, "__len__"):
        raise TypeError(
            f"{name}: expected batches that can be read again in each epoch, with a length, got "
            f"{type(batches).__name__}. Pass a list, or an object whose `__iter__` begins anew and "
            "whose `__len__` is the number of batches."
        )
    if not len(batches):
        raise ValueError(f"{name}: expected batches, got none.")


class Rows(NamedTuple):
    """Rows of one batch, those of weight 0 left out.

    :ivar table: in unconstrained coordinates.
    :ivar log_det: of the map to these at each row.
    :ivar x: the same rows in their units.
    """

    table: Table
    log_det: np.ndarray
    x: np.ndarray


def ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The same items, of which a thread makes the next while one is used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


class _Reader:
    """Batches as checked rows."""

    def __init__(self, name: str, batches: Any, flow: Any, parts: Any):
        check_batches(name, batches)
        self._name, self._batches, self._flow, self._parts = name, batches, flow, parts

    def __len__(self) -> int:
        return len(self._batches)

    def read(self, wanted: np.ndarray | None = None) -> Iterator[tuple[int, Rows]]:
        """Batches and their numbers, those wanted or all; in this order if they have indices."""
        wanted = np.arange(len(self)) if wanted is None else wanted
        items: Iterator[tuple[int, Any]]
        if hasattr(self._batches, "__getitem__"):
            items = ((int(i), self._batches[int(i)]) for i in wanted)
        else:
            chosen = set(wanted.tolist())
            items = ((i, item) for i, item in enumerate(self._batches) if i in chosen)
        for i, item in items:
            try:
                rows = self._rows(item)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{self._name}: batch {i}: {error}") from error
            if len(rows.x):
                yield i, rows

    def _rows(self, item: Any) -> Rows:
        x, context, weights = item, None, None
        if isinstance(item, dict):
            if unknown := sorted(item.keys() - {"x", "context", "weights"}) or "x" not in item:
                raise ValueError(
                    "expected a dict with 'x' and perhaps 'context' and 'weights', got "
                    f"{sorted(item) if unknown is True else unknown}."
                )
            x, context, weights = item["x"], item.get("context"), item.get("weights")
        elif isinstance(item, tuple | list):
            if len(item) != 2:
                raise ValueError(
                    f"expected an array, a pair (x, context) or a dict, got {len(item)} parts."
                )
            x, context = item
        if isinstance(self._flow, Dequantized):
            table = check_levels(self._flow, x, context, weights, whole=False)
            in_units, log_det = table.x, np.zeros(len(table.x))
        else:
            table = check_data(self._flow, x, context, weights, whole=False)
            in_units = table.x
            table, log_det = unconstrain(self._flow, self._parts, table)
        keep = table.weights > 0
        return Rows(table.take(keep), log_det[keep], in_units[keep])


#: Rows of a table to those that the flow trains on, and constants of their log densities.
_Prepare = Callable[[Rows], tuple[dict[str, Any], np.ndarray]]


class Stream:
    """Batches that are read in each pass, shuffled in memory and cut to the size of a step.

    With ``__getitem__`` they are read in a new order in each pass, else as they come; rows are
    shuffled among some 64 steps. The next piece is read while one is trained on.
    """

    train = monitored = None

    def __init__(
        self,
        reader: _Reader,
        trained: np.ndarray,
        scored: tuple[_Reader, np.ndarray],
        prepare: _Prepare,
        constants: tuple[float, float, float],
        num_rows: int,
        settings: Settings,
    ):
        self._reader, self._trained, self._scored = reader, trained, scored
        self._prepare, self._settings, self._num_rows = prepare, settings, num_rows
        self.train_constant, self.monitored_constant, self.monitored_weight = constants

    @property
    def num_steps(self) -> int:
        return -(-self._num_rows // self._settings.batch_size)

    def epoch(self, number: int) -> Iterator[Batches]:
        rng = np.random.default_rng([*self._settings.seed, number])
        size = self._settings.batch_size
        data = self._read(self._reader, rng.permutation(self._trained))
        pieces = ahead(map(self._placed, _pieces(data, size, rng)))
        num_pieces = -(-self.num_steps // PIECE)
        seen = 0
        for i, (batches, num_rows, weights) in enumerate(pieces, 1):
            seen += int(num_rows.sum())
            if seen > self._num_rows or (i == num_pieces and seen < self._num_rows):
                raise ValueError(
                    f"x: expected as many rows in each pass, got {self._num_rows} in the first "
                    f"and {'more' if seen > self._num_rows else seen} in another."
                )
            yield Batches(batches, num_rows, weights, last=i == num_pieces)

    def monitored_batches(self) -> Iterator[Any]:
        size = max(self._settings.batch_size, 1024)
        split = self._settings.split
        data = self._read(*self._scored)
        pieces = _pieces(data, size if split is None else split.multiple(size), None)
        return (batches for batches, _, _ in ahead(map(self._placed, pieces)))

    def _read(self, reader: _Reader, wanted: np.ndarray) -> Iterator[dict[str, Any]]:
        return (self._prepare(rows)[0] for _, rows in reader.read(wanted))

    def _placed(
        self, piece: tuple[dict[str, Any], np.ndarray]
    ) -> tuple[Any, np.ndarray, np.ndarray]:
        """A piece on the devices, with the numbers of rows and the weights of its steps."""
        rows, is_row = piece
        split = self._settings.split
        put = jax.device_put if split is None else split.placed
        weights = np.where(is_row, rows["weights"], 0).sum(1, dtype=float)
        return (jax.tree.map(put, rows), put(is_row)), is_row.sum(1), weights

    @staticmethod
    def select(data: Any, batch: tuple[Any, Array]) -> tuple[dict[str, Any], Array]:
        return batch


def _pieces(
    tables: Iterator[dict[str, Any]], size: int, rng: np.random.Generator | None
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Rows as ``(steps, size, ...)`` and which are no padding; the last piece may be shorter."""
    held: list[dict[str, Any]] = []
    num, whole = 0, PIECE * size

    def joined() -> dict[str, Any]:
        rows = jax.tree.map(lambda *parts: np.concatenate(parts), *held)
        if rng is None:
            return rows
        order = rng.permutation(num)
        return jax.tree.map(lambda array: array[order], rows)

    for table in tables:
        held.append(table)
        num += len(table["weights"])
        if num < whole:
            continue
        rows, start = joined(), 0
        for start in range(0, num - whole + 1, whole):
            yield _in_steps(rows, slice(start, start + whole), size)
        # A copy, so that the rows before it can be forgotten.
        held = [jax.tree.map(lambda array, at=start + whole: array[at:].copy(), rows)]
        num -= start + whole
    if num:
        yield _in_steps(joined(), slice(None), size)


def _in_steps(rows: dict[str, Any], some: slice, size: int) -> tuple[dict[str, Any], np.ndarray]:
    num = len(rows["weights"][some])
    steps = -(-num // size)

    def cut(array: np.ndarray) -> np.ndarray:
        part = array[some]
        padding = [(0, steps * size - num), *[(0, 0)] * (part.ndim - 1)]
        return np.pad(part, padding, mode="edge").reshape(steps, size, *part.shape[1:])

    return jax.tree.map(cut, rows), (np.arange(steps * size) < num).reshape(steps, size)


class _Sums:
    """What a pass over some batches tells of them: rows, weights, constants, and a few rows.

    :param moments: what their rows are added to.
    :param view: of a batch with this number, the rows that are standardised.
    """

    def __init__(
        self,
        reader: _Reader,
        moments: Moments | None = None,
        view: Callable[[int, Table], Table] = lambda _, table: table,
    ):
        num = len(reader)
        self.rows, self.weights, self.constants = (np.zeros(num) for _ in range(3))
        self._samples: list[Rows] = []
        share = -(-LOOK_AT // num)
        for i, rows in ahead(reader.read()):
            rows = rows._replace(table=view(i, rows.table))
            weights, n = rows.table.weights, len(rows.x)
            self.rows[i], self.weights[i] = n, weights.sum(dtype=float)
            self.constants[i] = (weights * rows.log_det).sum(dtype=float)
            if moments is not None:
                moments.add(rows.table)
            self._samples.append(jax.tree.map(lambda a, n=n: a[:: -(-n // share)], rows))
        if self.rows.sum() < 2:
            raise ValueError(
                f"x: expected at least 2 rows of positive weight, got {int(self.rows.sum())}."
            )

    def sample(self) -> Rows:
        return jax.tree.map(lambda *parts: np.concatenate(parts), *self._samples)


def task_of_batches(flow: Any, batches: Any, val_batches: Any, settings: Settings) -> Task:
    """Batches checked in one pass, which gives the standardisation too.

    :raises ValueError: for rows that cannot be fitted, named by batch and row.
    """
    quantized = isinstance(flow, Dequantized)
    parts: Any = (parts_of_levels if quantized else parts_of)(flow, settings.standardize)
    moments = None
    if settings.standardize and parts is not None:
        moments = Moments(parts.core.transform)
    reader = _Reader("x", batches, flow, parts)
    numbers: Numbers | None = None
    notes: list[str] = []
    if quantized and moments is not None:
        sums = _Sums(reader, moments, lambda i, table: with_noise(flow, parts, table, i))
        model, notes = standardized(flow, parts, sums.sample().table, moments)
    elif quantized:
        sums, model = _Sums(reader), flow
    else:
        sums, model = _Sums(reader, moments), parts.core
        sample, embedded, cells = sums.sample(), is_embedded(flow), is_discrete(flow)
        numbers = parts.numbers
        if moments is not None:
            numbers, notes = numbers_of(sample.table, parts, embedded, cells, moments)
        seen = sample.table if numbers is None else whiten(sample.table, numbers, embedded)[0]
        notes = notes + without_bound(sample.x, seen, embedded, cells)
    unit = sums.weights.sum() / sums.rows.sum()

    def prepare(rows: Rows) -> tuple[dict[str, Any], np.ndarray]:
        table, log_det = rows.table, rows.log_det
        table = table._replace(weights=in_precision(table.weights / unit))
        if numbers is not None:
            table, constant = whiten(table, numbers, embedded)
            log_det = log_det + constant
        return table.as_trained(), log_det

    num = len(reader)
    num_val = 0
    if val_batches is None and settings.val_fraction and num > 1:
        num_val = min(max(1, int(num * settings.val_fraction)), num - 1)
    elif val_batches is None and settings.val_fraction:
        notes.append("fit: one batch is too few to hold some out; early stopping uses its loss.")
    order = np.random.default_rng([*settings.seed, 0]).permutation(num)
    held_out, trained = np.split(order, [num_val])
    scored, of_scored, chosen = (reader, trained), sums, trained
    if num_val:
        scored, chosen = (reader, np.sort(held_out)), held_out
    if val_batches is not None:
        val_reader = _Reader("val_batches", val_batches, flow, parts)
        of_scored, chosen = _Sums(val_reader), np.arange(len(val_reader))
        scored = val_reader, chosen
    whitening = 0.0 if numbers is None else -math.fsum(np.log(numbers.scale.astype(float)).ravel())

    def constant(of: _Sums, which: np.ndarray) -> float:
        mean = of.constants[which].sum() / of.weights[which].sum() + whitening
        return mean if settings.in_nats else 0.0

    constants = (
        constant(sums, trained),
        constant(of_scored, chosen),
        of_scored.weights[chosen].sum() / unit,
    )
    num_rows = int(sums.rows[trained].sum())
    source = Stream(reader, trained, scored, prepare, constants, num_rows, settings)
    identity = (numbers, sums.rows, sums.weights, sums.constants)
    holds_out = bool(num_val) or val_batches is not None

    def finish(trained: Any) -> Any:
        return trained if quantized else parts.put_together(trained, numbers)

    core = model.flow if isinstance(model, Dequantized) else model
    return Task(model, core.transform, finish, source, holds_out, identity, notes)
