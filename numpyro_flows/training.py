"""Maximum likelihood: :func:`fit` trains a flow on draws of what it shall describe."""

import dataclasses
import functools
import hashlib
import json
import operator
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import Distribution, constraints
from tqdm.auto import tqdm

from .augmented import AugmentedFlow
from .checks import (
    check_context,
    check_floating,
    check_integers,
    check_key,
    check_size,
    check_unmasked,
    is_real,
)
from .compilation import jit
from .coordinates import angles
from .dequantization import Dequantized
from .distribution import FlowDistribution, combine, leaf_names, partition
from .io import written_whole
from .parts import for_training
from .transform import FlowTransform
from .transforms import Chain, Conditioned, Embedded, NumPyroTransform, Standardized


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns.

    :ivar flow: the fitted flow, in the units of the data, of the kind that was given.
    :ivar train_losses: mean negative log-likelihood per row (nats) of each epoch, averaged over
        its steps, shape ``(epochs,)``.
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
    weights: ArrayLike | None = None,
    optimizer: optax.GradientTransformation | None = None,
    learning_rate: float | optax.Schedule = 1e-3,
    clip_norm: float = 5.0,
    batch_size: int = 256,
    max_epochs: int = 100,
    patience: int = 10,
    val_fraction: float = 0.1,
    standardize: bool = True,
    progress_bar: bool = True,
    checkpoint: str | os.PathLike | None = None,
) -> FitResult:
    r"""Fit a flow to data by maximum likelihood.

    Minimises :math:`-\sum_i w_i \log p(x_i \mid c_i) / \sum_i w_i` in shuffled minibatches (the
    last partial one included), one jitted scan per epoch. After each epoch the validation rows
    are scored; training stops when ``patience`` epochs brought no improvement, and the best
    parameters are returned. Steps with a non-finite loss, gradient or update change nothing and
    are counted. Continuous flows train with probes drawn anew for each row and step, and with their
    penalties, which the losses of the steps contain and those of the validation rows do not;
    augmented flows with noise drawn anew, and their losses are bounds.

    Data and context are standardised (mean 0, scale 1 per coordinate, in the unconstrained space
    if the flow has a support; angles are left alone) and the standardisation becomes part of the
    returned flow, exactly.

    Integers are fitted by ``nf.dequantize(flow, levels)`` in the place of a flow. Losses are then
    those of the bound, with noise drawn anew for each row and step (the same in each epoch for the
    validation rows), and neither data nor context are standardised.

    Below 10 rows nothing is held out: a warning says so and the training loss takes the place of
    the validation loss.

    :param key: ``jax.random.key``; splits, shuffles.
    :param flow: flow with batch shape ``()``, conditional or not, augmented or not; for integers a
        ``Dequantized``.
    :param x: data of shape ``(n, *event_shape)``, floating, finite, inside the flow's support; or
        integers inside the range of the ``Dequantized``.
    :param context: shape ``(n, context_dim)`` for a conditional flow; for one with an embedding
        network the pytree that it reads, n rows in each array, which is not standardised.
    :param weights: non-negative weights of shape ``(n,)``; their scale does not matter, and rows
        of weight 0 might as well not be there.
    :param optimizer: optax optimiser, used as it is; by default Adam with a cosine decay of
        ``learning_rate`` to 0 over ``max_epochs`` behind clipping to global norm ``clip_norm``.
    :param learning_rate: initial step size, or an optax schedule to follow instead.
    :param clip_norm: largest global norm of a gradient.
    :param batch_size: rows per step.
    :param max_epochs: upper bound on the passes over the data.
    :param patience: epochs without improvement before training stops.
    :param val_fraction: share of the rows held out, in [0, 1).
    :param standardize: whether to standardise; a flow that was fitted before keeps one
        standardisation, with the numbers of the new data (of the old if False).
    :param progress_bar: whether to show one.
    :param checkpoint: file that is rewritten after each epoch. If it is there, training continues
        from it, with the result the uninterrupted call would have had. Functions cannot be
        compared: pass the same ``optimizer`` or schedule as before.
    :return: the fitted flow and its losses.
    :raises ValueError: for fewer than 2 rows, wrong shapes, NaN or infinite rows or rows outside
        the support (counted and named), constant columns, or a checkpoint of another call.
    :raises TypeError: for non-floating data, or a key that is not one.
    :raises FloatingPointError: if no step of an epoch has a finite loss, gradient and update.

    >>> import jax, numpyro_flows as nf
    >>> x = 5 + 0.1 * jax.random.normal(jax.random.key(0), (200, 2))
    >>> fitted = nf.fit(jax.random.key(1), nf.realnvp(jax.random.key(2), 2, depth=2), x,
    ...                 max_epochs=2, progress_bar=False)
    >>> fitted.flow.sample(jax.random.key(3), (4,)).shape
    (4, 2)
    """
    return fit_by(
        bound if isinstance(flow, Dequantized) else log_likelihood,
        key,
        flow,
        x,
        context,
        weights=weights,
        optimizer=optimizer,
        learning_rate=learning_rate,
        clip_norm=clip_norm,
        batch_size=batch_size,
        max_epochs=max_epochs,
        patience=patience,
        val_fraction=val_fraction,
        standardize=standardize,
        progress_bar=progress_bar,
        checkpoint=checkpoint,
    )


def log_likelihood(flow: Any, rows: dict[str, Array], key: Array | None) -> Array:
    """The objective of :func:`fit`: negative log-likelihood of each row, in nats."""
    flow = for_training(flow, key, len(rows["x"]))
    if "context" in rows:
        flow = flow.condition(rows["context"])
    return -flow.log_prob(rows["x"])


def bound(model: Dequantized, rows: dict[str, Array], key: Array | None) -> Array:
    """The objective of :func:`fit` for integers: minus the bound of each row, in nats."""
    # Validation repeats its noise, so that epochs can be compared.
    key, noise_key = (None, jax.random.key(0)) if key is None else jax.random.split(key)
    model = for_training(model, key, len(rows["x"]))
    if "context" in rows:
        model = model.condition(rows["context"])
    return -model.log_prob_bound(noise_key, rows["x"])


def fit_by(
    objective: Callable[[Any, dict[str, Array], Array | None], Array],
    key: Array,
    flow: FlowDistribution | AugmentedFlow | Dequantized,
    x: ArrayLike,
    context: ArrayLike | None,
    *,
    weights: ArrayLike | None,
    optimizer: optax.GradientTransformation | None,
    learning_rate: float | optax.Schedule,
    clip_norm: float,
    batch_size: int,
    max_epochs: int,
    patience: int,
    val_fraction: float,
    standardize: bool,
    progress_bar: bool,
    checkpoint: str | os.PathLike | None,
) -> FitResult:
    """:func:`fit` by any objective, a loss of each row.

    :param objective: ``(flow, rows, key) -> losses`` of shape ``(n,)`` in the whitened coordinates,
        ``rows`` holding ``"x"`` and perhaps ``"context"``; without a key, for validation, it must
        be deterministic.
    """
    check_key(key)
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
    if isinstance(flow, Dequantized):
        task = _discrete(flow, x, context, weights)
    else:
        task = _continuous(flow, x, context, weights, standardize)
    data, numbers, log_det = task.data, task.numbers, task.log_det
    n = len(log_det)
    num_val = min(max(1, int(n * val_fraction)), n - 1) if val_fraction and n >= 10 else 0
    if n < 10 and val_fraction:
        warnings.warn(
            f"fit: {n} rows are too few to hold some out; early stopping uses the training loss.",
            stacklevel=2,
        )
    # NumPy shuffles, 30 times faster than XLA's sort on a CPU, and with nothing to compile.
    seed = _to_numpy(key).tolist()
    val_rows, train_rows = np.split(np.random.default_rng([*seed, 0]).permutation(n), [num_val])
    val, train = (
        jax.tree.map(lambda array, rows=rows: jnp.asarray(array[rows]), data)
        for rows in (val_rows, train_rows)
    )
    # The core is scored in whitened coordinates; these constants give nats in the data's units.
    in_nats = objective is log_likelihood
    val_shift, train_shift = (
        np.average(log_det[rows], weights=data["weights"][rows]) if len(rows) and in_nats else 0.0
        for rows in (val_rows, train_rows)
    )
    num_train = n - num_val
    if optimizer is None and callable(learning_rate):
        optimizer = _adam(learning_rate, clip_norm)
    elif optimizer is None:
        steps = max_epochs * -(-num_train // batch_size)
        optimizer = _decaying_adam(float(learning_rate), steps, clip_norm)

    params, rest = partition(task.model)
    if not jax.tree.leaves(params):
        raise ValueError(
            "flow: it has no parameters to train (everything in it is fixed). Build one with a "
            "recipe such as `nf.realnvp`."
        )
    opt_state = optimizer.init(params)
    score = functools.partial(_score, objective=objective, batch_size=max(batch_size, 1024))
    run_epoch = functools.partial(
        _run_epoch, objective=objective, optimizer=optimizer, batch_size=batch_size
    )
    monitored, shift = (val, val_shift) if num_val else (train, train_shift)
    best, best_loss, best_epoch = params, np.nan, 0
    train_losses: list[float] = []
    val_losses: list[float] = []
    num_skipped = 0

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
            sorted(re.findall(r"\w+", str(jax.tree.structure((task.model, opt_state))))),
        ]
        pieces = (params, opt_state, rest, data, numbers, log_det)
        store = _Checkpoint(checkpoint, settings, key, pieces)
        restored = store.load((params, opt_state, best))
        if restored is not None:
            (params, opt_state, best), state = restored
            train_losses, val_losses = state["train_losses"], state["val_losses"]
            best_loss, best_epoch = state["best_loss"], state["best_epoch"]
            num_skipped = state["num_skipped"]
    if restored is None:
        best_loss = float(score(params, rest, monitored)) - shift

    bar = tqdm(total=max_epochs, initial=len(train_losses), disable=not progress_bar, desc="fit")
    with bar:
        while (epoch := len(train_losses) + 1) <= max_epochs and epoch - 1 - best_epoch < patience:
            order = np.random.default_rng([*seed, epoch]).permutation(num_train)
            params, opt_state, loss, skipped, steps_taken = run_epoch(
                params, rest, opt_state, train, order, jax.random.fold_in(key, epoch)
            )
            num_skipped += int(skipped)
            if int(skipped) == int(steps_taken):
                raise FloatingPointError(
                    f"fit: no step of epoch {epoch} had a finite loss, gradient and update. Lower "
                    "`learning_rate` or `clip_norm`, or look for extreme values in the data."
                )
            train_losses.append(float(loss) - train_shift)
            monitor = float(score(params, rest, monitored)) - shift
            if num_val:
                val_losses.append(monitor)
            if monitor < best_loss or not np.isfinite(best_loss):
                best, best_loss, best_epoch = params, monitor, epoch
            bar.set_postfix(train=f"{train_losses[-1]:.4f}", best=f"{best_loss:.4f}", refresh=False)
            bar.update()
            if store is not None:
                store.save(
                    (params, opt_state, best),
                    {
                        "train_losses": train_losses,
                        "val_losses": val_losses,
                        "best_loss": best_loss,
                        "best_epoch": best_epoch,
                        "num_skipped": num_skipped,
                    },
                )
    if num_skipped:
        warnings.warn(
            f"fit: {num_skipped} steps with a non-finite loss, gradient or update were skipped.",
            RuntimeWarning,
            stacklevel=2,
        )
    if not np.isfinite(best_loss):
        warnings.warn(
            "fit: the loss that early stopping looks at was never finite; the last parameters are "
            "returned.",
            RuntimeWarning,
            stacklevel=2,
        )
    return FitResult(
        task.finish(combine(best, rest)),
        np.array(train_losses),
        np.array(val_losses),
        best_epoch,
        num_skipped,
    )


class _Task(NamedTuple):
    """What one call of :func:`fit_by` trains, and on what."""

    model: Any
    core: FlowTransform  # the transform in it that trains
    data: dict[str, Any]
    numbers: tuple[Any, ...] | None  # of the standardisation
    log_det: np.ndarray  # of what comes after the core, for each row
    finish: Callable[[Any], Any]  # the trained model to what the caller gets


def _continuous(
    flow: FlowDistribution | AugmentedFlow,
    x: ArrayLike,
    context: Any,
    weights: ArrayLike | None,
    standardize: bool,
) -> _Task:
    x, context, weights = _check_data(flow, x, context, weights)
    parts = _take_apart(flow)
    core, embedded = parts.core, isinstance(flow.transform, Embedded)
    if standardize and not is_real(core.support):
        raise ValueError(
            f"flow: expected a {type(core.transform).__name__} onto the real numbers, got one onto "
            f"{core.support}, which cannot be standardised. Pass `standardize=False`, or end the "
            "flow with `nf.transforms.NumPyroTransform(biject_to(support), event_shape)`."
        )
    data, numbers, log_det = _whiten(x, context, weights, parts, standardize, embedded)
    return _Task(
        core,
        core.transform,
        data,
        numbers,
        log_det,
        lambda trained: parts.put_together(trained, numbers),
    )


def _discrete(model: Dequantized, x: ArrayLike, context: Any, weights: ArrayLike | None) -> _Task:
    _check_unbound(model.flow)
    check_unmasked("x", x)
    x = np.asarray(x)
    check_integers("x", x, model.levels, model.event_shape)
    _check_rows(model.flow, x)
    context, weights = _check_others(model.flow, len(x), context, weights)
    keep = weights > 0
    arrays = {"x": x, "weights": weights} | ({} if context is None else {"context": context})
    data = jax.tree.map(lambda array: _as_trained(array[keep]), arrays)
    return _Task(
        model, model.flow.transform, data, None, np.zeros(keep.sum()), lambda trained: trained
    )


def _adam(schedule: optax.Schedule, clip_norm: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adam(schedule))


@functools.lru_cache
def _decaying_adam(rate: float, steps: int, clip_norm: float) -> optax.GradientTransformation:
    # `jit` tells optimisers apart by identity: fits of one kind share one, and compile once.
    return _adam(optax.cosine_decay_schedule(rate, steps), clip_norm)


def _rows(mask: np.ndarray) -> str:
    """Which rows: '2 of 100 rows (4, 17)'."""
    rows = np.flatnonzero(mask)
    listed = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
    return (
        f"{len(rows)} of {len(mask)} rows (row {listed})"
        if len(rows) == 1
        else (f"{len(rows)} of {len(mask)} rows (rows {listed})")
    )


def _as_float(name: str, value: ArrayLike) -> np.ndarray:
    check_unmasked(name, value)
    array = np.asarray(value)
    check_floating(name, array.dtype)
    return array


def _check_finite(name: str, value: np.ndarray) -> None:
    bad = ~np.isfinite(value.reshape(len(value), -1)).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{name}: {_rows(bad)} hold NaN or values that are infinite in {value.dtype}; drop or "
            "impute them."
        )


def _in_precision(value: np.ndarray) -> np.ndarray:
    """As the flow will see it: in float32, unless JAX is in 64-bit mode."""
    with np.errstate(over="ignore"):
        return value.astype(jnp.result_type(float))


def _check_unbound(flow: Any) -> None:
    if not isinstance(flow, FlowDistribution | AugmentedFlow):
        raise TypeError(f"flow: expected a FlowDistribution, got {type(flow).__name__}.")
    if flow.batch_shape or isinstance(flow.transform, Conditioned):
        raise ValueError(
            f"flow: expected batch shape () and no bound context, got {flow}. Pass the conditional "
            "flow itself and `context=`, not `flow.condition(context)`."
        )


def _check_rows(flow: FlowDistribution, x: np.ndarray) -> None:
    if x.ndim == 0 or x.shape[1:] != flow.event_shape:
        shape = str(("n", *flow.event_shape)).replace("'", "")
        hint = " Scalar data needs a last axis: x[:, None]." if flow.event_shape == (1,) else ""
        raise ValueError(f"x: expected shape {shape}, one draw per row, got {x.shape}.{hint}")
    if len(x) < 2:
        raise ValueError(f"x: expected at least 2 rows, got {len(x)}.")


def _check_others(
    flow: FlowDistribution, n: int, context: Any, weights: ArrayLike | None
) -> tuple[Any, np.ndarray]:
    """Context and weights of n rows as arrays, the weights of mean 1 where they are not 0."""
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
        _check_finite("context", _in_precision(context))
    check_unmasked("weights", weights)
    mass = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    if mass.shape != (n,):
        raise ValueError(
            f"weights: expected shape ({n},), one number per row of x, got {mass.shape}."
        )
    _check_finite("weights", mass)
    if (mass < 0).any():
        raise ValueError(
            f"weights: expected non-negative numbers, got {_rows(mass < 0)} below 0; "
            "0 leaves a row out."
        )
    mass = _in_precision(mass / np.maximum(np.max(mass), np.finfo(float).tiny))
    positive = mass[mass > 0]
    if len(positive) < 2:
        raise ValueError(f"weights: expected at least 2 positive ones, got {len(positive)}.")
    return context, mass / positive.mean(dtype=float)


def _check_data(
    flow: FlowDistribution, x: ArrayLike, context: ArrayLike | None, weights: ArrayLike | None
) -> tuple[np.ndarray, Any, np.ndarray]:
    """The arguments as arrays."""
    _check_unbound(flow)
    x = _as_float("x", x)
    _check_rows(flow, x)
    _check_finite("x", _in_precision(x))
    context, mass = _check_others(flow, len(x), context, weights)
    # Out-of-support values of a constraint are a property of single rows.
    outside = ~np.asarray(flow.support(jnp.asarray(x)))
    if outside.any():
        raise ValueError(
            f"x: {_rows(outside)} lie outside the flow's support {flow.support}; drop them or "
            "build the flow with another `support=`."
        )
    return x, context, mass


class _Parts(NamedTuple):
    """A flow as ``fit`` sees it.

    ``core`` is the flow of the whitened coordinates, which trains; ``numbers`` are those of the
    standardisation that it had, ``support`` the transforms behind it. ``put_together`` undoes it,
    with the numbers of a standardisation or None.
    """

    core: Any
    numbers: tuple[np.ndarray, ...] | None
    support: list[NumPyroTransform]
    put_together: Callable[[Any, tuple[Any, ...] | None], Distribution]


@functools.singledispatch
def _take_apart(flow: Any) -> _Parts:
    raise NotImplementedError


@_take_apart.register
def _(flow: FlowDistribution) -> _Parts:
    transform = flow.transform
    network = transform.network if isinstance(transform, Embedded) else None
    parts = [transform.transform if isinstance(transform, Embedded) else transform]
    support: list[NumPyroTransform] = []
    while parts and isinstance(last := parts[-1], Chain | NumPyroTransform):
        if isinstance(last, Chain):
            parts[-1:] = last.parts
        else:
            support.insert(0, last)
            parts.pop()
    if not parts:
        raise ValueError(
            "flow: it has no parameters to train (it is only a support). Build one with a recipe "
            "such as `nf.realnvp`."
        )
    core, numbers = _unstandardized(parts[0] if len(parts) == 1 else Chain(parts))

    def put_together(trained: FlowDistribution, numbers: tuple | None) -> FlowDistribution:
        transform, network = trained.transform, None
        if isinstance(transform, Embedded):
            network, transform = transform.network, transform.transform
        if numbers is not None:
            transform = Standardized(transform, *numbers)
        whole = Chain([transform, *support]) if support else transform
        return _embedded(flow.base_dist, whole, network)

    return _Parts(_embedded(flow.base_dist, core, network), numbers, support, put_together)


def _embedded(base: Distribution, transform: FlowTransform, network: Any) -> FlowDistribution:
    """The flow, with its context read by the network if there is one."""
    return FlowDistribution(base, transform if network is None else Embedded(transform, network))


@_take_apart.register
def _(flow: AugmentedFlow) -> _Parts:
    (dim,) = flow.event_shape
    transform, numbers = _unstandardized(flow.transform)
    encoder, _ = _unstandardized(flow.encoder_transform)

    def put_together(trained: AugmentedFlow, numbers: tuple | None) -> AugmentedFlow:
        transform, encoder = trained.transform, trained.encoder_transform
        if numbers is not None:
            # The coordinates beside the data keep their units; q reads x and context.
            ones = np.ones(flow.augment_dim, numbers[1].dtype)
            loc, scale = (np.append(*pair) for pair in zip(numbers, (0 * ones, ones), strict=False))
            transform = Standardized(transform, loc, scale, *numbers[2:])
            x_and_context = (np.concatenate(numbers[i::2]) for i in (0, 1))
            encoder = Standardized(encoder, 0 * ones, ones, *x_and_context)
        return flow.with_transforms(transform, encoder, flow.outer)

    if numbers is not None:
        numbers = (numbers[0][:dim], numbers[1][:dim], *numbers[2:])
    support = [] if flow.outer is None else [flow.outer]
    core = flow.with_transforms(transform, encoder, None)
    return _Parts(core, numbers, support, put_together)


def _unstandardized(
    transform: FlowTransform,
) -> tuple[FlowTransform, tuple[np.ndarray, ...] | None]:
    """What is inside of a standardisation, and its numbers."""
    if not isinstance(transform, Standardized):
        return transform, None
    fixed = (transform.loc, transform.scale, transform.context_loc, transform.context_scale)
    return transform.transform, tuple(np.asarray(number.value) for number in fixed)


def _moments(name: str, value: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, as the flow will hold them."""
    value = value.astype(float)
    loc = np.average(value, axis=0, weights=weights)
    scale = np.sqrt(np.average((value - loc) ** 2, axis=0, weights=weights))
    loc, scale = _in_precision(loc), _in_precision(scale)
    info = np.finfo(scale.dtype)
    # A spread of a few units in the last place is rounding, here or in the flow.
    ulps = 16 * float(info.eps) * np.abs(value).max(axis=0)
    constant = (np.ptp(value, axis=0) <= ulps) | (scale < info.tiny)
    if constant.any():
        columns = [int(i[0]) if len(i) == 1 else tuple(i.tolist()) for i in np.argwhere(constant)]
        reason = {
            "x": "so the density is not bounded there; drop it or add noise",
            "context": "so nothing can be learned from it; drop it",
        }
        raise ValueError(
            f"{name}: column {', '.join(map(str, columns))} is constant to the precision of "
            f"{scale.dtype}, {reason[name]}."
        )
    return loc, scale


def _whiten(
    x: np.ndarray,
    context: Any,
    weights: np.ndarray,
    parts: _Parts,
    standardize: bool,
    embedded: bool,
) -> tuple[dict[str, Any], tuple[Any, ...] | None, np.ndarray]:
    """Rows as the core sees them, the standardisation's numbers, and log|det| of each row."""
    dtype, support = jnp.result_type(float), parts.support
    log_det = np.zeros(len(x))
    if support:
        inverse = Chain(support).inv
        value, log_dets = inverse.forward_and_log_det(jnp.asarray(x, dtype))
        x, log_det = np.asarray(value), np.asarray(log_dets, dtype=float)
        bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1) | ~np.isfinite(log_det)
        if isinstance(support[-1].codomain, type(constraints.simplex)):
            # NumPyro clips a last share of 0 to the smallest number, far from any other row.
            bad |= (np.abs(x) > -0.9 * np.log(np.finfo(dtype).tiny)).any(axis=-1)
        if bad.any():
            raise ValueError(
                f"x: {_rows(bad)} lie on the boundary of the support, where the density is not "
                "finite; move them inside or drop them."
            )
    # Rows of weight 0 go: no split or batch is then of weight 0, and their density is no matter.
    keep = weights > 0
    x, weights, log_det = x[keep], weights[keep], log_det[keep]
    context = jax.tree.map(lambda array: array[keep], context)
    numbers: tuple[Any, ...] | None
    if standardize:
        context_numbers = (
            () if embedded or context is None else _moments("context", context, weights)
        )
        loc, scale = _moments("x", x, weights)
        if x.ndim == 2 and support:
            # The circle has its own units and no place to start from.
            circular = np.array(angles(support[-1].codomain, x.shape[1]))
            loc, scale = np.where(circular, 0, loc), np.where(circular, 1, scale)
        numbers = (loc, scale, *context_numbers)
    else:
        numbers = parts.numbers
    if numbers is not None:
        x = (x.astype(float) - numbers[0]) / numbers[1]
        log_det = log_det - np.log(numbers[1].astype(float)).sum()
        if not embedded and context is not None:
            context = (context.astype(float) - numbers[2]) / numbers[3]
    arrays = {"x": x, "weights": weights} | ({} if context is None else {"context": context})
    return jax.tree.map(_as_trained, arrays), numbers, log_det


def _as_trained(array: np.ndarray) -> np.ndarray:
    """Floating numbers in the precision of the training; others as they are."""
    is_float = np.issubdtype(array.dtype, np.floating)
    return array.astype(jnp.result_type(float)) if is_float else array


def _batches(order: Array, batch_size: int) -> tuple[Array, Array]:
    """Row indices of each batch and whether an entry is a row or padding."""
    n = len(order)
    num = -(-n // batch_size)
    is_row = jnp.arange(num * batch_size) < n
    # Padding repeats a row of its own batch: no other one can spoil the gradient.
    order = jnp.pad(order, (0, num * batch_size - n), mode="edge")
    return order.reshape(num, batch_size), is_row.reshape(num, batch_size)


@jit(static_argnames=("objective", "batch_size"))
def _score(
    params: Any, rest: Any, data: dict[str, Array], *, objective: Any, batch_size: int
) -> Array:
    """Mean weighted loss."""

    def step(total, batch):
        index, is_row = batch
        rows = jax.tree.map(lambda a: a[index], data)
        losses = rows["weights"] * objective(combine(params, rest), rows, None)
        return total + jnp.where(is_row, losses, 0.0).sum(), None

    n = len(data["x"])
    total, _ = jax.lax.scan(step, jnp.zeros(()), _batches(jnp.arange(n), min(batch_size, n)))
    return total / data["weights"].sum()


@jit(static_argnames=("objective", "optimizer", "batch_size"))
def _run_epoch(
    params: Any,
    rest: Any,
    opt_state: Any,
    data: dict[str, Array],
    order: Array,
    key: Array,
    *,
    objective: Any,
    optimizer: optax.GradientTransformation,
    batch_size: int,
) -> tuple[Any, Any, Array, Array, Array]:
    """One pass over the data in this order: parameters, state, mean loss, skipped and all steps."""

    def step(carry, batch):
        params, opt_state, total, weight, skipped = carry
        (index, is_row), step_key = batch
        rows = jax.tree.map(lambda a: a[index], data)

        def mean_loss(params):
            losses = rows["weights"] * objective(combine(params, rest), rows, step_key)
            return jnp.where(is_row, losses, 0.0).sum() / is_row.sum()

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        ok = jnp.isfinite(jnp.stack([loss, optax.tree.norm(grads), optax.tree.norm(updates)])).all()
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old),
            (new_params, new_opt_state),
            (params, opt_state),
        )
        total = total + jnp.where(ok, loss * is_row.sum(), 0.0)
        weight = weight + jnp.where(ok, jnp.where(is_row, rows["weights"], 0.0).sum(), 0.0)
        return (params, opt_state, total, weight, skipped + ~ok), None

    batches = _batches(order, min(batch_size, len(order)))
    zero = jnp.zeros(())
    start = (params, opt_state, zero, zero, jnp.zeros((), int))
    steps = len(batches[0])
    state, _ = jax.lax.scan(step, start, (batches, jax.random.split(key, steps)))
    params, opt_state, total, weight, skipped = state
    return params, opt_state, total / weight, skipped, jnp.asarray(steps)


def _to_numpy(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _to_jax(array: np.ndarray, like: Any) -> Array:
    """Undo :func:`_to_numpy`, given an array of the same kind."""
    if jnp.issubdtype(jnp.result_type(like), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    # NumPy writes what it does not know, such as bfloat16, as raw bytes.
    return jnp.asarray(array.view(jnp.result_type(like)))


def _by_name(tree: Any) -> list[tuple[str, Any]]:
    """Named leaves, sorted: those of NumPyro distributions come in any order."""
    leaves = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return sorted(leaves, key=operator.itemgetter(0))


class _Checkpoint:
    """A file with the state of one call of :func:`fit`, recognised by a fingerprint of the call."""

    def __init__(self, path: str | os.PathLike, settings: list[Any], key: Array, pieces: Any):
        self.path = Path(path).resolve()
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: there is no folder {self.path.parent}; create it first.")
        # Functions and objects show their address, which differs between processes.
        digest = hashlib.sha256(re.sub(r"0x\w+", "", repr(settings)).encode())
        for name, leaf in [("key", key), *_by_name(pieces)]:
            array = _to_numpy(leaf)
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()

    def save(self, trees: Any, state: dict[str, Any]) -> None:
        arrays = {name: _to_numpy(leaf) for name, leaf in _by_name(trees)}
        arrays["meta"] = np.array(json.dumps({"fingerprint": self.fingerprint, **state}))
        with written_whole(self.path) as temporary, open(temporary, "xb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def load(self, trees: Any) -> tuple[Any, dict[str, Any]] | None:
        if not self.path.exists():
            return None
        leaves, structure = jax.tree.flatten(trees)
        try:
            with np.load(self.path, allow_pickle=False) as file:
                state = json.loads(str(file["meta"]))
                matches = state.pop("fingerprint") == self.fingerprint
                arrays = [file[name] for name in leaf_names(trees)] if matches else []
        except Exception as error:  # A damaged or foreign file can fail anywhere, in any way.
            raise ValueError(
                f"checkpoint: expected a whole file written by `nf.fit`, got {self.path}, which is "
                "damaged or foreign. Delete it, or choose another path."
            ) from error
        if not matches:
            raise ValueError(
                f"checkpoint: {self.path} belongs to a call with other data, settings, key or "
                "flow. Delete it, or repeat the call that wrote it."
            )
        return jax.tree.unflatten(structure, map(_to_jax, arrays, leaves)), state
