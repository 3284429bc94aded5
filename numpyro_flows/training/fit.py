"""``nf.fit``: train a flow on data, by maximum likelihood or another objective."""

import dataclasses
import os
import re
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from ..augmented import AugmentedFlow
from ..checks import check_key
from ..dequantization import Dequantized
from ..distribution import FlowDistribution, combine, partition
from .checkpoint import Checkpoint, to_numpy
from .epochs import Cosine, Epochs, check_settings
from .loop import State, adam, optimize, start
from .mesh import split_over
from .objectives import BatchLoss, Objective, default_objective
from .processes import is_first, rows_of_all
from .stream import is_batches, task_of_batches
from .tasks import Settings, task_of_arrays


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
    x: ArrayLike | Iterable,
    context: ArrayLike | None = None,
    *,
    val_batches: Iterable | None = None,
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
    mesh: Mesh | None = None,
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
        inside the flow's support; or integers inside the range of the ``Dequantized``. Or batches
        to be read anew in each epoch, for data that do not fit in memory: a list, or any iterable
        with a length, of arrays, pairs ``(x, context)`` or dicts of ``x``, ``context`` and
        ``weights``. Rows are shuffled among batches that follow each other and cut to
        ``batch_size``; one pass more gives the standardisation, and leaves no rows out.
    :param context: shape ``(n, context_dim)`` for a conditional flow; for one with an embedding
        network the pytree that it reads, n rows in each array, which is not standardised.
    :param val_batches: for batches: others to validate on, in place of a share of them.
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
    :param mesh: ``jax.sharding.Mesh`` whose first axis splits the rows of each batch, with the
        result that one device gives. Under ``jax.distributed`` each process passes rows of its
        own, as many as the others; the fit is that of all rows, those of the first process first,
        which all hosts then hold, and a device holds its share.
    :param progress_bar: whether to show one.
    :param checkpoint: file that is rewritten after each epoch. If it is there, training continues
        from it, with the result the uninterrupted call would have had. Functions cannot be
        compared: pass the same ``optimizer`` or schedule as before.
    :return: the fitted flow and its losses.
    :raises ValueError: for fewer than 2 rows, wrong shapes, NaN or infinite rows or rows outside
        the support (counted and named), constant columns, a flow that the objective cannot train,
        a checkpoint of another call, a batch that a mesh cannot split evenly, or processes with
        different numbers of rows.
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
    patience = check_settings(objective, batch_size, max_epochs, patience, val_fraction, clip_norm)
    streams = is_batches(x, getattr(flow, "event_shape", ()))
    if streams and not (context is None and weights is None):
        raise ValueError(
            "context, weights: with batches they are parts of these: pairs (x, context), or dicts "
            "with 'x', 'context' and 'weights'."
        )
    if val_batches is not None and not streams:
        raise ValueError("val_batches: expected none, as x is an array; use `val_fraction`.")
    objective.check(flow, getattr(flow, "context_dim", 0) or None if streams else context)
    split = None
    if mesh is not None:
        split = split_over(mesh, "batch_size", batch_size)
        if streams and jax.process_count() > 1:
            raise ValueError(
                "x: batches are read in one process, on all of its devices; several processes take "
                "arrays, each its own rows."
            )
        x, context, weights = (
            (x, context, weights) if streams else rows_of_all((x, context, weights))
        )
    settings = Settings(
        standardize, objective.in_nats, to_numpy(key).tolist(), batch_size, val_fraction, split
    )
    if streams:
        task = task_of_batches(flow, x, val_batches, settings)
    else:
        task = task_of_arrays(flow, x, context, weights, settings)
    for note in task.notes:
        warnings.warn(note, stacklevel=2)
    params, rest = partition(task.model)
    if not jax.tree.leaves(params):
        raise ValueError(
            "flow: it has no parameters to train (everything in it is fixed). Build one with a "
            "recipe such as `nf.realnvp`."
        )

    source = task.source
    schedule = None
    if optimizer is None and callable(learning_rate):
        optimizer = adam(clip_norm, learning_rate)
    elif optimizer is None:
        optimizer = adam(clip_norm)
        schedule = Cosine(float(learning_rate), max_epochs * source.num_steps)
    loss = BatchLoss(objective, source.select, split if objective.is_rowwise(task.model) else None)
    state, fixed = start(params, optimizer=optimizer), rest
    if split is not None:
        key, state, fixed = split.replicated((key, state, fixed))
    plan = Epochs(source, loss, state.params, fixed, schedule, max_epochs, patience, task.holds_out)

    store = restored = None
    if checkpoint is not None:
        known = [
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
        pieces = (*state, rest, *task.numbers)
        store = Checkpoint(checkpoint, known, key, pieces, shared=split is not None)
        restored = store.load((*state, params))
    if restored is not None:
        (*trees, best), record = restored
        state = State(*trees)
        if split is not None:
            state, best = split.replicated((state, best))
        plan.restore(record, best)
    else:
        plan.best.loss = plan.monitor(state.params)

    def save(state: State) -> None:
        if store is not None:
            store.save((*state, plan.best.params), plan.to_restore())

    optimize(
        key,
        loss,
        optimizer,
        state,
        (fixed, source.train),
        plan,
        name="fit",
        progress_bar=progress_bar and (split is None or is_first()),
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
    best = plan.best.params
    if split is not None:
        best = split.local(best)
    return FitResult(
        task.finish(combine(best, rest)),
        np.array(plan.train_losses),
        np.array(plan.val_losses),
        plan.best.when,
        plan.num_skipped,
    )
