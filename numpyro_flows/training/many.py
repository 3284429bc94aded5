"""``nf.fit_many``: members of an ensemble, in one program or on the workers of an engine."""

import functools
import os
import pickle
import re
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from ..checks import check_key
from ..compilation import split
from ..distribution import combine, partition
from .batches import SharedArrays
from .checkpoint import Checkpoint, to_numpy
from .ensemble import Ensemble, ensemble_of, stacked
from .epochs import Cosine, Epochs, check_settings
from .fit import FitResult, fit
from .loop import Chunk, State, adam, optimize, run_many_steps, start
from .objectives import BatchLoss, Objective, default_objective, score_many
from .tasks import Settings, task_of_arrays

#: Times that a member is given to an engine again after its worker died.
RETRIES = 2


def fit_many(
    keys: Array,
    build: Callable[[Array], Any],
    x: ArrayLike,
    context: ArrayLike | None = None,
    *,
    executor: Executor | None = None,
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
) -> Ensemble:
    r"""Fit an ensemble of flows to the same data: as many calls of ``nf.fit``, in one program.

    Member i is what ``nf.fit(fit_key, build(build_key), x, ...)`` gives, up to rounding, with
    ``build_key, fit_key = jax.random.split(keys[i])``: initial weights, rows held out, shuffles and
    early stopping are its own; members that have stopped wait for the others. By itself it trains
    all members under one ``vmap``, which is faster than one after the other where flows and batches
    are too small to keep the device busy. With an ``executor`` each member is a task of its own.

    :param keys: ``jax.random.key``, shape ``(members,)``.
    :param build: key to flow; the structure must not depend on the key.
    :param x: as for ``nf.fit``, arrays of shape ``(n, *event_shape)``.
    :param context: as for ``nf.fit``, ``(n, context_dim)``.
    :param executor: any ``concurrent.futures.Executor``: processes, Dask's
        ``client.get_executor()``, Ray's, submitit's. It must be able to pickle ``build`` and the
        settings. A member whose worker died is given to it again.
    :param objective: what is minimised, and as all that follow but the last as for ``nf.fit``.
    :param weights: of the rows, ``(n,)``.
    :param optimizer: any of optax.
    :param learning_rate: of the default optimiser.
    :param clip_norm: largest norm of a gradient.
    :param batch_size: rows per step.
    :param max_epochs: most passes over the rows.
    :param patience: epochs without a better validation loss after which a member stops.
    :param val_fraction: share of the rows that each member holds out.
    :param standardize: whether data and context are standardised.
    :param progress_bar: whether to show one.
    :param checkpoint: file that is rewritten after each epoch; with an executor, a folder with one
        file for each member.
    :raises ValueError: as ``nf.fit``; or for flows of different structures.
    :raises TypeError: as ``nf.fit``; for keys that are none, or a ``build`` that cannot be pickled.

    >>> import jax, numpyro_flows as nf
    >>> x = 5 + 0.1 * jax.random.normal(jax.random.key(0), (200, 2))
    >>> keys = jax.random.split(jax.random.key(1), 3)
    >>> flows = nf.fit_many(keys, lambda key: nf.realnvp(key, 2, depth=2), x, max_epochs=2,
    ...                     progress_bar=False)
    >>> flows.mixture().log_prob(x).shape
    (200,)
    """
    if (
        not isinstance(keys, Array)
        or keys.ndim != 1
        or not jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key)
    ):
        raise TypeError(
            f"keys: expected an array of keys, as `jax.random.split(key, 8)` gives, got {keys!r}."
        )
    settings: dict[str, Any] = {
        "objective": objective,
        "weights": weights,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "clip_norm": clip_norm,
        "batch_size": batch_size,
        "max_epochs": max_epochs,
        "patience": patience,
        "val_fraction": val_fraction,
        "standardize": standardize,
    }
    pairs = [split(check_key(key), 2) for key in keys]
    if executor is not None:
        return _on_workers(executor, pairs, build, x, context, settings, checkpoint)
    return _Together(pairs, build, x, context, **settings).fit(progress_bar, checkpoint)


class _Member(Epochs):
    """One member's plan, which is told the loss that early stopping looks at."""

    told = np.nan

    def monitor(self, params: Any) -> float:
        return self.told


class _Together:
    """All members under one ``vmap``, and their plan."""

    def __init__(
        self,
        pairs: list[tuple[Array, ...]],
        build: Callable[[Array], Any],
        x: ArrayLike,
        context: Any,
        *,
        objective: Objective | None,
        weights: ArrayLike | None,
        optimizer: optax.GradientTransformation | None,
        learning_rate: float | optax.Schedule,
        clip_norm: float,
        batch_size: int,
        max_epochs: int,
        patience: int | None,
        val_fraction: float,
        standardize: bool,
    ):
        flows = [build(build_key) for build_key, _ in pairs]
        stacked(flows)  # raises for different structures
        self._keys = jax.numpy.stack([fit_key for _, fit_key in pairs])
        objective = objective or default_objective(flows[0])
        patience = check_settings(
            objective, batch_size, max_epochs, patience, val_fraction, clip_norm
        )
        objective.check(flows[0], context)
        seeds = [to_numpy(fit_key).tolist() for _, fit_key in pairs]
        tasks = [
            task_of_arrays(
                flow,
                x,
                context,
                weights,
                Settings(
                    standardize,
                    objective.in_nats,
                    seed,
                    batch_size,
                    val_fraction,
                    None,
                    SharedArrays,
                ),
            )
            for flow, seed in zip(flows, seeds, strict=True)
        ]
        first = tasks[0]
        for note in first.notes:
            warnings.warn(note, stacklevel=4)
        self._tasks = tasks
        self._rows = first.numbers
        self._data = jax.device_put(first.numbers[0])
        self._rests = [partition(task.model)[1] for task in tasks]
        self._params = [partition(task.model)[0] for task in tasks]
        self._fixed = stacked(self._rests), self._data
        schedule = None
        if optimizer is None and callable(learning_rate):
            optimizer = adam(clip_norm, learning_rate)
        elif optimizer is None:
            optimizer = adam(clip_norm)
            schedule = Cosine(float(learning_rate), max_epochs * first.source.num_steps)
        self._optimizer = optimizer
        self._loss = BatchLoss(objective, first.source.select)
        self._members = [
            _Member(
                task.source,
                self._loss,
                params,
                rest,
                schedule,
                max_epochs,
                patience,
                task.holds_out,
            )
            for task, params, rest in zip(tasks, self._params, self._rests, strict=True)
        ]
        self._monitored = stacked([next(task.source.monitored_batches()) for task in tasks])
        self.total = max_epochs
        self._active: list[int] = []
        self._settings = [
            repr(objective),
            batch_size,
            max_epochs,
            patience,
            val_fraction,
            standardize,
            clip_norm,
            None if callable(learning_rate) else float(learning_rate),
            str(jax.tree.structure(first.core)),
        ]

    @property
    def done(self) -> int:
        return max(member.done for member in self._members)

    def _tell(self, params: Any) -> None:
        totals = score_many(params, *self._fixed, self._monitored, loss=self._loss)
        for member, task, total in zip(
            self._members, self._tasks, np.asarray(totals, float), strict=True
        ):
            member.told = float(total) / task.source.monitored_weight
            member.told -= task.source.monitored_constant

    def next(self) -> Chunk | None:
        chunks = [member.next() for member in self._members]
        self._active = [i for i, chunk in enumerate(chunks) if chunk is not None]
        if not self._active:
            return None
        some = chunks[self._active[0]]
        assert some is not None
        # Members that have stopped step on with the batches of another; nobody looks at them.
        batches = [(some if chunk is None else chunk).batches for chunk in chunks]
        return some._replace(batches=jax.tree.map(lambda *leaves: np.stack(leaves), *batches))

    def record(self, state: State, losses: np.ndarray) -> str:
        self._tell(state.params)
        params = jax.device_get(state.params)
        for i in self._active:
            own = jax.tree.map(lambda leaf, i=i: leaf[i], params)
            self._members[i].record(State(own, None), losses[i])
        return f"{len(self._active)} of {len(self._members)} members"

    def fit(self, progress_bar: bool, checkpoint: str | os.PathLike | None) -> Ensemble:
        begin = jax.vmap(functools.partial(start, optimizer=self._optimizer))
        state = jax.jit(begin)(stacked(self._params))
        store = restored = None
        if checkpoint is not None:
            words = re.findall(r"\w+", str(jax.tree.structure((self._rests, state.opt_state))))
            pieces = (*state, self._fixed[0], *self._rows)
            store = Checkpoint(checkpoint, [*self._settings, sorted(words)], self._keys, pieces)
            restored = store.load((*state, state.params))
        if restored is None:
            self._tell(state.params)
            for member in self._members:
                member.best.loss = member.told
        else:
            (*trees, best), record = restored
            state = State(*trees)
            for i, member in enumerate(self._members):
                own = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), best)
                member.restore(record["members"][i], own)

        def save(state: State) -> None:
            if store is not None:
                best = stacked([member.best.params for member in self._members])
                record = {"members": [member.to_restore() for member in self._members]}
                store.save((*state, best), record)

        optimize(
            self._keys,
            self._loss,
            self._optimizer,
            state,
            self._fixed,
            self,
            name="fit_many",
            progress_bar=progress_bar,
            save=save,
            run=run_many_steps,
        )
        return ensemble_of(
            [
                FitResult(
                    task.finish(combine(member.best.params, rest)),
                    np.array(member.train_losses),
                    np.array(member.val_losses),
                    member.best.when,
                    member.num_skipped,
                )
                for task, member, rest in zip(self._tasks, self._members, self._rests, strict=True)
            ]
        )


def _member(
    keys: tuple[Any, ...],
    impl: str,
    build: Callable[[Array], Any],
    x: ArrayLike,
    context: Any,
    settings: dict[str, Any],
) -> FitResult:
    """One member on a worker."""
    build_key, fit_key = (jax.random.wrap_key_data(data, impl=impl) for data in keys)
    return fit(fit_key, build(build_key), x, context, progress_bar=False, **settings)


def _on_workers(
    executor: Executor,
    pairs: list[tuple[Array, ...]],
    build: Callable[[Array], Any],
    x: ArrayLike,
    context: Any,
    settings: dict[str, Any],
    checkpoint: str | os.PathLike | None,
) -> Ensemble:
    refusal = TypeError(
        f"build: expected what the executor can send to its workers, got {build!r}. Define it at "
        "the top of a module, or use `functools.partial(nf.realnvp, dim=2)`."
    )
    if isinstance(executor, ProcessPoolExecutor):
        try:
            pickle.dumps((build, settings))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise refusal from error
    impl = str(jax.random.key_impl(pairs[0][0]))
    x, context = jax.tree.map(np.asarray, (x, context))

    def submit(i: int) -> Any:
        data = tuple(np.asarray(jax.random.key_data(key)) for key in pairs[i])
        own = dict(settings)
        if checkpoint is not None:
            os.makedirs(checkpoint, exist_ok=True)
            own["checkpoint"] = os.path.join(checkpoint, f"member-{i}.npz")
        return executor.submit(_member, data, impl, build, x, context, own)

    futures = [submit(i) for i in range(len(pairs))]
    results = []
    for i, future in enumerate(futures):
        for left in reversed(range(RETRIES + 1)):
            try:
                results.append(future.result())
                break
            except pickle.PicklingError as error:
                raise refusal from error
            except (TypeError, ValueError, FloatingPointError):
                raise  # it would fail again
            except Exception:
                if not left:
                    raise
                future = submit(i)
    return ensemble_of(results)
