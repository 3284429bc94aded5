"""Flow matching: a continuous flow trained by regression, without solving its equation."""

import functools
import os
from typing import Final

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import Distribution

from .distribution import FlowDistribution
from .training import FitResult, fit_by
from .transforms import Chain, Continuous, Embedded, NumPyroTransform, Standardized

_GOLDEN: Final = (5**0.5 - 1) / 2


def fit_flow_matching(
    key: Array,
    flow: FlowDistribution,
    x: ArrayLike,
    context: ArrayLike | None = None,
    *,
    coupling: str = "independent",
    weights: ArrayLike | None = None,
    optimizer: optax.GradientTransformation | None = None,
    learning_rate: float | optax.Schedule = 1e-3,
    clip_norm: float = 5.0,
    batch_size: int = 256,
    max_epochs: int = 100,
    patience: int = 50,
    val_fraction: float = 0.1,
    standardize: bool = True,
    progress_bar: bool = True,
    checkpoint: str | os.PathLike | None = None,
) -> FitResult:
    r"""Fit the vector field of a continuous flow by conditional flow matching.

    .. math:: \min_f \; E \, | T f(t T, (1 - t) z + t x, c) - (x - z) |^2, \quad t \sim U(0, 1)

    with z from the base and x a row of the data: the minimiser is a field whose flow carries the
    base to the data. A step costs one evaluation of the field where maximum likelihood solves an
    equation, and the result is an ordinary ``cnf`` with its exact ``log_prob``; but it does not
    maximise the likelihood, and ends a little below :func:`fit`.

    Batches, validation, standardisation, skipped steps and checkpoints are those of :func:`fit`.

    Sources: Lipman et al. (2023), arXiv:2210.02747, eq. 23 with :math:`\sigma_{\min} = 0`; Tong et
    al. (2024), arXiv:2302.00482, algorithm 3 (the coupling by optimal transport).

    :param key: ``jax.random.key``.
    :param flow: a flow of ``nf.cnf``, conditional or not, with batch shape ``()``.
    :param x: data of shape ``(n, dim)`` as for :func:`fit`.
    :param context: as for :func:`fit`.
    :param coupling: how base draws and rows of a batch are paired: ``"independent"``, or
        ``"optimal_transport"`` for the pairing of least squared distance, which makes the paths
        straighter at O(batch_size^3) per step. It ignores the context: leave it for unconditional
        flows.
    :param weights: as for :func:`fit`, and so are all that follow.
    :param optimizer: optax optimiser.
    :param learning_rate: initial step size, or an optax schedule.
    :param clip_norm: largest global norm of a gradient.
    :param batch_size: rows per step.
    :param max_epochs: upper bound on the passes over the data.
    :param patience: epochs without improvement before training stops; the loss is mostly the
        spread of its own targets, and gains show late.
    :param val_fraction: share of the rows held out, in [0, 1).
    :param standardize: whether to standardise.
    :param progress_bar: whether to show one.
    :param checkpoint: file that is rewritten after each epoch.
    :return: the fitted flow, and losses in squared whitened units, not nats.
    :raises ValueError: for a flow that is not continuous, an unknown coupling, optimal transport
        with a context, or what :func:`fit` refuses.
    :raises TypeError: as :func:`fit`.
    :raises FloatingPointError: as :func:`fit`.

    >>> import jax, numpyro_flows as nf
    >>> x = 5 + 0.1 * jax.random.normal(jax.random.key(0), (200, 2))
    >>> flow = nf.cnf(jax.random.key(2), 2, hidden=(8,))
    >>> fitted = nf.fit_flow_matching(jax.random.key(1), flow, x, max_epochs=2, progress_bar=False)
    >>> fitted.flow.sample(jax.random.key(3), (4,)).shape
    (4, 2)
    """
    if coupling not in _OBJECTIVES:
        raise ValueError(f"coupling: expected one of {sorted(_OBJECTIVES)}, got {coupling!r}.")
    if coupling != "independent" and context is not None:
        raise ValueError(
            "coupling: optimal transport would pair base draws with rows of other contexts, and "
            "the conditional densities would be wrong. Use 'independent'."
        )
    if isinstance(flow, Distribution) and not (
        isinstance(flow, FlowDistribution) and _is_continuous(flow.transform)
    ):
        raise ValueError(
            f"flow: expected a continuous flow, got {flow}, which has no vector field. Build it "
            "with `nf.cnf`, or train it by `nf.fit`."
        )
    return fit_by(
        _OBJECTIVES[coupling],
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


def _is_continuous(transform: object) -> bool:
    """Whether there is one `Continuous`, behind nothing but what `fit` takes off."""
    if isinstance(transform, Embedded | Standardized):
        return _is_continuous(transform.transform)
    if isinstance(transform, Chain):
        first, *others = transform.parts
        return _is_continuous(first) and all(isinstance(p, NumPyroTransform) for p in others)
    return isinstance(transform, Continuous)


def _loss(
    flow: FlowDistribution, rows: dict[str, Array], key: Array | None, *, pair: bool
) -> Array:
    """Squared error of the velocity at each row."""
    x, n = rows["x"], len(rows["x"])
    transform = flow.transform
    if isinstance(transform, Embedded):
        context = transform.read_context(rows["context"])
        transform = transform.transform
    else:
        context = rows.get("context")
    base_key, time_key = jax.random.split(jax.random.key(0) if key is None else key)
    z = flow.base_dist.sample(base_key, (n,))
    if pair:
        distances = ((x[:, None] - z[None]) ** 2).sum(-1)
        i, j = optax.assignment.hungarian_algorithm(distances)
        z = z.at[i].set(z[j])
    # Each uniform, and together spread evenly, also the first few of a batch that ends in padding.
    t = (jax.random.uniform(time_key) + _GOLDEN * jnp.arange(n)) % 1
    along = t[:, None] * x + (1 - t[:, None]) * z
    end = transform.end_time
    return ((end * transform.velocity(end * t, along, context) - (x - z)) ** 2).sum(-1)


_OBJECTIVES = {
    "independent": functools.partial(_loss, pair=False),
    "optimal_transport": functools.partial(_loss, pair=True),
}
