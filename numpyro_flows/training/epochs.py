"""The plan of ``nf.fit``: passes over the data, and when to stop."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..checks import check_size
from .batches import Batches, Source
from .loop import Best, Chunk, State
from .objectives import BatchLoss, Objective, score


def check_settings(
    objective: Any,
    batch_size: int,
    max_epochs: int,
    patience: int | None,
    val_fraction: float,
    clip_norm: float,
) -> int:
    """Check the numbers that a fit takes; the patience, which an objective has a default for.

    :raises TypeError: for an objective that is none, or sizes that are no integers.
    :raises ValueError: for numbers out of range.
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective: expected one such as `nf.FlowMatching()`, got {objective!r}. Leave it out "
            "for maximum likelihood."
        )
    patience = objective.patience if patience is None else patience
    for name, size in (
        ("batch_size", batch_size),
        ("max_epochs", max_epochs),
        ("patience", patience),
    ):
        check_size(name, size)
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction: expected a number in [0, 1), got {val_fraction}.")
    if not clip_norm > 0:
        raise ValueError(f"clip_norm: expected a positive number, got {clip_norm}.")
    return patience


class Cosine(NamedTuple):
    """A learning rate that falls to 0 over a number of steps."""

    rate: float
    steps: int

    def __call__(self, step: np.ndarray) -> np.ndarray:
        return self.rate * 0.5 * (1 + np.cos(np.pi * np.minimum(step / self.steps, 1)))


class Epochs:
    """The plan of :func:`fit`: passes over the data until the monitored loss ceases to fall."""

    def __init__(
        self,
        source: Source,
        loss: BatchLoss,
        params: Any,
        rest: Any,
        schedule: Cosine | None,
        max_epochs: int,
        patience: int,
        holds_out: bool,
    ):
        self.total = max_epochs
        self.train_losses: list[float] = []
        self.val_losses: list[float] = []
        self.num_skipped = 0
        self.best = Best(params, math.nan)
        self._source, self._loss, self._rest, self._schedule = source, loss, rest, schedule
        self._patience, self._holds_out = patience, holds_out
        self._num_chunks = self._num_steps = 0
        self._pieces: Iterator[Batches] = iter(())
        self._total = self._weight = 0.0

    @property
    def done(self) -> int:
        """Epochs so far."""
        return len(self.train_losses)

    def monitor(self, params: Any) -> float:
        """The loss that early stopping looks at."""
        source = self._source
        fixed = self._rest, source.monitored
        totals = [
            float(score(params, fixed, batches, loss=self._loss))
            for batches in source.monitored_batches()
        ]
        return math.fsum(totals) / source.monitored_weight - source.monitored_constant

    def next(self) -> Chunk | None:
        piece = next(self._pieces, None)
        if piece is None:
            if self.done >= self.total or self.done - self.best.when >= self._patience:
                return None
            self._pieces = self._source.epoch(self.done + 1)
            piece = next(self._pieces)
            self._total = self._weight = 0.0
        self._piece = piece
        self._num_chunks += 1
        rates = np.ones(len(piece.num_rows))
        if self._schedule is not None:
            rates = self._schedule(self._num_steps + np.arange(len(rates)))
        return Chunk(rates, piece.batches, self._num_chunks)

    def record(self, state: State, losses: np.ndarray) -> str:
        piece, made = self._piece, np.isfinite(losses)
        self._num_steps += len(losses)
        self.num_skipped += int((~made).sum())
        self._total += float((losses * piece.num_rows)[made].sum(dtype=float))
        self._weight += float(piece.weights[made].sum())
        if piece.last:
            self._end_epoch(state.params)
        return f"train={self.train_losses[-1]:.4f}, best={self.best.loss:.4f}" if self.done else ""

    def _end_epoch(self, params: Any) -> None:
        epoch = self.done + 1
        if not self._weight:
            raise FloatingPointError(
                f"fit: no step of epoch {epoch} had a finite loss, gradient and update. Lower "
                "`learning_rate` or `clip_norm`, or look for extreme values in the data."
            )
        self.train_losses.append(self._total / self._weight - self._source.train_constant)
        loss = self.monitor(params)
        if self._holds_out:
            self.val_losses.append(loss)
        self.best.offer(params, loss, epoch)

    def to_restore(self) -> dict[str, Any]:
        """What :meth:`restore` needs, as JSON can hold it."""
        return {
            "train_losses": self.train_losses,
            "val_losses": self.val_losses,
            "num_skipped": self.num_skipped,
            "num_chunks": self._num_chunks,
            "num_steps": self._num_steps,
            "best_loss": self.best.loss,
            "best_epoch": self.best.when,
        }

    def restore(self, record: dict[str, Any], best: Any) -> None:
        """Go on where another plan of the same call was, with the best parameters that it had."""
        self.train_losses, self.val_losses = record["train_losses"], record["val_losses"]
        self.num_skipped = record["num_skipped"]
        self._num_chunks, self._num_steps = record["num_chunks"], record["num_steps"]
        self.best = Best(best, record["best_loss"], record["best_epoch"])
