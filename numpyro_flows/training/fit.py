"""``nf.fit``: train a flow on data, by maximum likelihood or another objective."""

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from ..augmented import AugmentedFlow
from ..checks import check_key, check_size, is_real
from ..dequantization import Dequantized
from ..distribution import FlowDistribution, combine, partition
from ..transform import FlowTransform
from ..transforms import Embedded
from .checkpoint import Checkpoint, to_numpy
from .columns import without_bound
from .data import Arrays, Batches, Table, check_data, check_levels
from .loop import Best, Chunk, State, adam, optimize, start
from .objectives import BatchLoss, Objective, default_objective, score
from .standardize import (
    Numbers,
    is_discrete,
    leave_out,
    numbers_of,
    take_apart,
    unconstrain,
    whiten,
)


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns.

    :ivar flow: the fitted flow, in the units of the data, of the kind that was given.
    :ivar train_losses: mean loss per row of each epoch, averaged over its steps, shape
        ``(epochs,)``; negative log-likelihoods in nats unless another objective was given.
    :ivar val_losses: the same on the validation rows after each epoch; empty without a split.
    :ivar best_epoch: epoch whose parameters are returned, from 1; 0 are the initial ones.
    :ivar num_skipped: steps skipped because their loss, gradient or update was not finite.
    """

    flow: Any
    train_losses: np.ndarray
    val_losses: np.ndarray
    best_epoch: int
    num_skipped: int


def fit(
    key: Array,
    flow: FlowDistribution | AugmentedFlow | Dequantized,
    x: ArrayLike,
    context: ArrayLike | None = None,
    *,
    objective: Objective | None = None,
    weights: ArrayLike | None = None,
    optimizer: optax.GradientTransformation | None = None,
    learning_rate: float | optax.Schedule = 1e-3,
    clip_norm: float = 5.0,
    batch_size: int = 256,
    max_epochs: int = 100,
    patience: int | None = None,
    val_fraction: float = 0.1,
    standardize: bool = True,
    progress_bar: bool = True,
    checkpoint: str | os.PathLike | None = None,
) -> FitResult:
    r"""Fit a flow to data, by maximum likelihood unless another objective is given.

    Minimises :math:`-\sum_i w_i \log p(x_i \mid c_i) / \sum_i w_i` in shuffled minibatches (the
    last partial one included), one compiled scan per epoch. After each epoch the validation rows
    are scored; training stops when ``patience`` epochs brought no improvement, and the best
    parameters are returned. Steps with a non-finite loss, gradient or update change nothing and
    are counted. Continuous flows train with probes drawn anew for each row and step, and with their
    penalties, which the losses of the steps contain and those of the validation rows do not;
    augmented flows with noise drawn anew, and their losses are bounds. A second call with other
    data of the same shapes, the same settings and the same ``optimizer`` object compiles nothing.

    Data and context are standardised (mean 0, scale 1 per coordinate, in the unconstrained space
    if the flow has a support; angles are left alone) and the standardisation becomes part of the
    returned flow, exactly. Three cases are treated apart, each with a warning that names columns
    and rows: at most 1 % of the rows that lie ten times as far out as all others are left out;
    columns whose tails rule their standard deviation are standardised by quantiles; and such
    columns of the context are compressed (``nf.transforms.CompressedContext``).

    Warnings also name data that have no density, which would rise in the fit without limit: values
    that are repeated, columns that depend linearly on others, and copies of rows.

    Integers are fitted by flows of a discrete support, whose columns keep their units, or by
    ``nf.dequantize(flow, levels)`` in the place of a flow. Losses are then those of the bound, with
    noise drawn anew for each row and step (the same in each epoch for the validation rows); vectors
    are standardised, images are left to ``nf.equalize`` and ``nf.initialize``.

    Below 10 rows nothing is held out: a warning says so and the training loss takes the place of
    the validation loss.

    :param key: ``jax.random.key``; splits, shuffles.
    :param flow: flow with batch shape ``()``, conditional or not, augmented or not; for integers a
        ``Dequantized``.
    :param x: data of shape ``(n, *event_shape)``, an array or a table of numbers, floating, finite,
        inside the flow's support; or integers inside the range of the ``Dequantized``.
    :param context: shape ``(n, context_dim)`` for a conditional flow; for one with an embedding
        network the pytree that it reads, n rows in each array, which is not standardised.
    :param objective: ``nf.FlowMatching()`` for continuous flows; by default the likelihood, or the
        bound of a ``Dequantized``.
    :param weights: non-negative weights of shape ``(n,)``; their scale does not matter, and rows
        of weight 0 might as well not be there.
    :param optimizer: optax optimiser, used as it is; by default Adam with a cosine decay of
        ``learning_rate`` to 0 over ``max_epochs`` behind clipping to global norm ``clip_norm``.
    :param learning_rate: initial step size, or an optax schedule to follow instead.
    :param clip_norm: largest global norm of a gradient.
    :param batch_size: rows per step.
    :param max_epochs: upper bound on the passes over the data.
    :param patience: epochs without improvement before training stops; by default 10, or what the
        objective says.
    :param val_fraction: share of the rows held out, in [0, 1).
    :param standardize: whether to standardise, and to leave out rows far from all others; a flow
        that was fitted before keeps one standardisation, with the numbers of the new data (of the
        old if False).
    :param progress_bar: whether to show one.
    :param checkpoint: file that is rewritten after each epoch. If it is there, training continues
        from it, with the result the uninterrupted call would have had. Functions cannot be
        compared: pass the same ``optimizer`` or schedule as before.
    :return: the fitted flow and its losses.
    :raises ValueError: for fewer than 2 rows, wrong shapes, NaN or infinite rows or rows outside
        the support (counted and named), constant columns, a flow that the objective cannot train,
        or a checkpoint of another call.
    :raises TypeError: for non-floating data, an objective that is none, or a key that is not one.
    :raises FloatingPointError: if no step of an epoch has a finite loss, gradient and update.

    >>> import jax, numpyro_flows as nf
    >>> x = 5 + 0.1 * jax.random.normal(jax.random.key(0), (200, 2))
    >>> fitted = nf.fit(jax.random.key(1), nf.realnvp(jax.random.key(2), 2, depth=2), x,
    ...                 max_epochs=2, progress_bar=False)
    >>> fitted.flow.sample(jax.random.key(3), (4,)).shape
    (4, 2)
    """
    check_key(key)
    objective = objective or default_objective(flow)
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
    objective.check(flow, context)
    task = (
        _discrete(flow, x, context, weights, standardize)
        if isinstance(flow, Dequantized)
        else _continuous(flow, x, context, weights, standardize)
    )
    for note in task.notes:
        warnings.warn(note, stacklevel=2)
    params, rest = partition(task.model)
    if not jax.tree.leaves(params):
        raise ValueError(
            "flow: it has no parameters to train (everything in it is fixed). Build one with a "
            "recipe such as `nf.realnvp`."
        )

    n = len(task.log_det)
    num_val = min(max(1, int(n * val_fraction)), n - 1) if val_fraction and n >= 10 else 0
    if n < 10 and val_fraction:
        warnings.warn(
            f"fit: {n} rows are too few to hold some out; early stopping uses the training loss.",
            stacklevel=2,
        )
    # Whitened rows are scored; these constants give nats in the data's units.
    constants = task.log_det if objective.in_nats else np.zeros(n)
    source = Arrays(task.data, constants, to_numpy(key).tolist(), batch_size, num_val)
    schedule = None
    if optimizer is None and callable(learning_rate):
        optimizer = adam(clip_norm, learning_rate)
    elif optimizer is None:
        optimizer = adam(clip_norm)
        schedule = _Cosine(float(learning_rate), max_epochs * source.num_steps)
    loss = BatchLoss(objective, source.select)
    plan = _Epochs(source, loss, params, rest, schedule, max_epochs, patience, num_val > 0)
    state = start(params, optimizer=optimizer)

    store = restored = None
    if checkpoint is not None:
        settings = [
            repr(objective),
            batch_size,
            max_epochs,
            patience,
            val_fraction,
            standardize,
            clip_norm,
            None if callable(learning_rate) else float(learning_rate),
            str(jax.tree.structure(task.core)),
            # NumPyro orders what is in a distribution anew in each process.
            sorted(re.findall(r"\w+", str(jax.tree.structure((task.model, state.opt_state))))),
        ]
        pieces = (*state, rest, task.data, task.numbers, task.log_det)
        store = Checkpoint(checkpoint, settings, key, pieces)
        restored = store.load((*state, params))
    if restored is not None:
        (*trees, best), record = restored
        state = State(*trees)
        plan.restore(record, best)
    else:
        plan.best.loss = plan.monitor(params)

    def save(state: State) -> None:
        if store is not None:
            store.save((*state, plan.best.params), plan.to_restore())

    optimize(
        key,
        loss,
        optimizer,
        state,
        (rest, source.train),
        plan,
        name="fit",
        progress_bar=progress_bar,
        save=save,
    )
    if plan.num_skipped:
        warnings.warn(
            f"fit: {plan.num_skipped} steps with a non-finite loss, gradient or update were "
            "skipped.",
            RuntimeWarning,
            stacklevel=2,
        )
    if not np.isfinite(plan.best.loss):
        warnings.warn(
            "fit: the loss that early stopping looks at was never finite; the last parameters are "
            "returned.",
            RuntimeWarning,
            stacklevel=2,
        )
    return FitResult(
        task.finish(combine(plan.best.params, rest)),
        np.array(plan.train_losses),
        np.array(plan.val_losses),
        plan.best.when,
        plan.num_skipped,
    )


class _Task(NamedTuple):
    """What one call of :func:`fit` trains, and on what."""

    model: Any
    core: FlowTransform  # the transform in it that trains
    data: dict[str, Any]
    numbers: Numbers | None
    log_det: np.ndarray  # of what comes after the core, for each row
    finish: Callable[[Any], Any]  # the trained model to what the caller gets
    notes: list[str]  # to warn of


def _continuous(
    flow: FlowDistribution | AugmentedFlow,
    x: ArrayLike,
    context: Any,
    weights: ArrayLike | None,
    standardize: bool,
) -> _Task:
    table = check_data(flow, x, context, weights)
    parts = take_apart(flow)
    core, embedded = parts.core, isinstance(flow.transform, Embedded)
    cells = is_discrete(flow)
    if standardize and not is_real(core.support):
        raise ValueError(
            f"flow: expected a {type(core.transform).__name__} onto the real numbers, got one onto "
            f"{core.support}, which cannot be standardised. Pass `standardize=False`, or end the "
            "flow with `nf.transforms.NumPyroTransform(biject_to(support), event_shape)`."
        )
    in_units = table.x
    table, log_det = unconstrain(flow, parts, table)
    notes: list[str] = []
    if standardize:
        table, notes = leave_out(table, embedded, cells)
    # Without rows of weight 0 no split or batch has weight 0, and their density may be anything.
    keep = table.weights > 0
    table, log_det, in_units = table.take(keep), log_det[keep], in_units[keep]
    numbers = parts.numbers
    if standardize:
        numbers, more = numbers_of(table, parts, embedded, cells)
        notes += more
    if numbers is not None:
        table, constant = whiten(table, numbers, embedded)
        log_det = log_det + constant
    notes += without_bound(in_units, table, embedded, cells)
    return _Task(
        core,
        core.transform,
        table.as_trained(),
        numbers,
        log_det,
        lambda trained: parts.put_together(trained, numbers),
        notes,
    )


def _discrete(
    model: Dequantized,
    x: ArrayLike,
    context: Any,
    weights: ArrayLike | None,
    standardize: bool,
) -> _Task:
    table = check_levels(model, x, context, weights)
    table = table.take(table.weights > 0)
    notes: list[str] = []
    # Noise is drawn in training, so that the standardisation is inside of what trains. Images have
    # numbers of their own, those of `equalize` and ActNorm, which see all pixels alike.
    if standardize and len(model.event_shape) == 1:
        model, notes = _standardized(model, table)
    zeros = np.zeros(len(table.x))
    data = table.as_trained()
    return _Task(model, model.flow.transform, data, None, zeros, lambda trained: trained, notes)


def _standardized(model: Dequantized, table: Table) -> tuple[Dequantized, list[str]]:
    """The model with its flow standardised by the data and one draw of uniform noise."""
    flow = model.flow
    parts, embedded = take_apart(flow), isinstance(flow.transform, Embedded)
    if not is_real(parts.core.support):
        return model, []
    noisy = table.x + np.random.default_rng(0).random(table.x.shape)
    noisy_table, _ = unconstrain(flow, parts, table._replace(x=noisy))
    numbers, notes = numbers_of(noisy_table, parts, embedded, np.zeros(table.x.shape[1:], bool))
    return model.with_flow(parts.put_together(parts.core, numbers)), notes


class _Cosine(NamedTuple):
    """A learning rate that falls to 0 over a number of steps."""

    rate: float
    steps: int

    def __call__(self, step: np.ndarray) -> np.ndarray:
        return self.rate * 0.5 * (1 + np.cos(np.pi * np.minimum(step / self.steps, 1)))


class _Epochs:
    """The plan of :func:`fit`: passes over the data until the monitored loss ceases to fall."""

    def __init__(
        self,
        source: Arrays,
        loss: BatchLoss,
        params: Any,
        rest: Any,
        schedule: _Cosine | None,
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
        total = score(params, fixed, source.monitored_batches, loss=self._loss)
        return float(total) / source.monitored_weight - source.monitored_constant

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
