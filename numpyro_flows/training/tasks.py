"""What ``nf.fit`` trains and on what: a flow without its standardisation, and rows that fit it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from ..checks import is_real
from ..dequantization import Dequantized
from ..transform import FlowTransform
from ..transforms import Embedded
from .batches import Arrays, Source, SplitArrays
from .columns import without_bound
from .data import Table, check_data, check_levels
from .mesh import Split
from .standardize import (
    Moments,
    Numbers,
    Parts,
    is_discrete,
    leave_out,
    numbers_of,
    take_apart,
    unconstrain,
    whiten,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How rows become batches.

    :ivar in_nats: whether losses are negative log densities, which change with the data's units.
    :ivar seed: numbers for NumPy's generator.
    """

    standardize: bool
    in_nats: bool
    seed: list[int]
    batch_size: int
    val_fraction: float
    split: Split | None
    kind: type[Arrays] = Arrays


class Task(NamedTuple):
    """What one call of ``fit`` trains, and on what."""

    model: Any
    core: FlowTransform  # the transform in it that trains
    finish: Callable[[Any], Any]  # the trained model to what the caller gets
    source: Source
    holds_out: bool
    numbers: Any  # what the result depends on beside the model, for checkpoints
    notes: list[str]  # to warn of


def task_of_arrays(
    flow: Any, x: Any, context: Any, weights: ArrayLike | None, settings: Settings
) -> Task:
    """Rows in memory, checked and standardised."""
    numbers: Numbers | None = None
    notes: list[str] = []
    if isinstance(flow, Dequantized):
        table = check_levels(flow, x, context, weights)
        table = table.take(table.weights > 0)
        log_det = np.zeros(len(table.x))
        if (parts := parts_of_levels(flow, settings.standardize)) is not None:
            flow, notes = standardized(flow, parts, with_noise(flow, parts, table))
        model, core, finish = flow, flow.flow.transform, lambda trained: trained
    else:
        table = check_data(flow, x, context, weights)
        in_units, parts = table.x, parts_of(flow, settings.standardize)
        model, core, embedded = parts.core, parts.core.transform, is_embedded(flow)
        cells = is_discrete(flow)
        table, log_det = unconstrain(flow, parts, table)
        if settings.standardize:
            table, notes = leave_out(table, embedded, cells)
        # Without rows of weight 0 no split or batch has weight 0; their density may be anything.
        keep = table.weights > 0
        table, log_det, in_units = table.take(keep), log_det[keep], in_units[keep]
        numbers = parts.numbers
        if settings.standardize:
            numbers, more = numbers_of(table, parts, embedded, cells)
            notes += more
        if numbers is not None:
            table, constant = whiten(table, numbers, embedded)
            log_det = log_det + constant
        notes += without_bound(in_units, table, embedded, cells)

        def finish(trained: Any) -> Any:
            return parts.put_together(trained, numbers)

    data, n, val_fraction = table.as_trained(), len(log_det), settings.val_fraction
    num_val = min(max(1, int(n * val_fraction)), n - 1) if val_fraction and n >= 10 else 0
    if n < 10 and val_fraction:
        notes.append(
            f"fit: {n} rows are too few to hold some out; early stopping uses the training loss."
        )
    # Whitened rows are scored; these constants give nats in the data's units.
    constants = log_det if settings.in_nats else np.zeros(n)
    rows = (data, constants, settings.seed, settings.batch_size, num_val)
    split = settings.split
    source = settings.kind(*rows) if split is None else SplitArrays(split, *rows)
    return Task(model, core, finish, source, num_val > 0, (data, numbers, log_det), notes)


def is_embedded(flow: Any) -> bool:
    """Whether a network reads the context, which is then not standardised."""
    return isinstance(flow.transform, Embedded)


def parts_of(flow: Any, standardize: bool) -> Parts:
    """A flow taken apart.

    :raises ValueError: if it is to be standardised and cannot be.
    """
    parts = take_apart(flow)
    core = parts.core
    if standardize and not is_real(core.support):
        raise ValueError(
            f"flow: expected a {type(core.transform).__name__} onto the real numbers, got one onto "
            f"{core.support}, which cannot be standardised. Pass `standardize=False`, or end the "
            "flow with `nf.transforms.NumPyroTransform(biject_to(support), event_shape)`."
        )
    return parts


def parts_of_levels(model: Dequantized, standardize: bool) -> Parts | None:
    """The flow of a model of integers taken apart, if it is to be standardised.

    Images are not: they have numbers of their own, those of ``equalize`` and ActNorm, which see all
    pixels alike.
    """
    if not standardize or len(model.event_shape) != 1:
        return None
    parts = take_apart(model.flow)
    return parts if is_real(parts.core.support) else None


def with_noise(model: Dequantized, parts: Parts, table: Table, seed: int = 0) -> Table:
    """Rows of integers in unconstrained coordinates, with one draw of uniform noise."""
    # Nearer to the ends of a cell, rounding could reach the boundary of the support.
    noise = np.random.default_rng(seed).uniform(0.01, 0.99, table.x.shape)
    return unconstrain(model.flow, parts, table._replace(x=table.x + noise))[0]


def standardized(
    model: Dequantized, parts: Parts, table: Table, known: Moments | None = None
) -> tuple[Dequantized, list[str]]:
    """A model of integers whose flow is standardised, by rows with noise; and warnings.

    Noise is drawn in training, so that the standardisation is inside of what trains.
    """
    none = np.array(False)
    numbers, notes = numbers_of(table, parts, is_embedded(model.flow), none, known)
    return model.with_flow(parts.put_together(parts.core, numbers)), notes
