"""Objectives of ``nf.fit``: the loss of each row."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax
from jax import Array
from numpyro.distributions import Distribution

from ..compilation import jit
from ..dequantization import Dequantized
from ..distribution import FlowDistribution, combine
from ..parts import for_training, is_rowwise
from ..transforms import (
    Chain,
    CompressedContext,
    Continuous,
    Embedded,
    NumPyroTransform,
    Standardized,
)
from .mesh import Split

_GOLDEN: Final = (5**0.5 - 1) / 2

#: ``(data, batch) -> (rows, is_row)``: the rows of a batch, and which are no padding.
Select = Callable[[Any, Any], tuple[dict[str, Any], Array]]


class Objective(abc.ABC):
    """A loss of each row. Subclasses are frozen dataclasses: equal ones share their programs.

    :cvar in_nats: whether losses are negative log densities, which change with the data's units.
    :cvar patience: default of ``nf.fit``.
    """

    in_nats: bool = False
    patience: int = 10

    def check(self, flow: Any, context: Any) -> None:  # noqa: B027
        """Raise a ``ValueError`` if the objective cannot train this flow."""

    def is_rowwise(self, flow: Any) -> bool:
        """Whether the loss of a row depends on this row alone, and not on the key."""
        return False

    @abc.abstractmethod
    def __call__(self, flow: Any, rows: dict[str, Any], key: Array | None) -> Array:
        """Losses of n rows, shape ``(n,)``.

        :param flow: the flow of the standardised coordinates.
        :param rows: ``"x"``, of shape ``(n, *event_shape)``, perhaps ``"context"``, and
            ``"weights"``, which the caller multiplies with.
        :param key: random key of this step; None for validation, which must be deterministic.
        """


@dataclasses.dataclass(frozen=True)
class MaximumLikelihood(Objective):
    """Negative log-likelihood, in nats."""

    in_nats = True

    def is_rowwise(self, flow: Any) -> bool:
        return is_rowwise(flow)

    def __call__(self, flow: Any, rows: dict[str, Any], key: Array | None) -> Array:
        flow = for_training(flow, key, len(rows["x"]))
        if "context" in rows:
            flow = flow.condition(rows["context"])
        return -flow.log_prob(rows["x"])


@dataclasses.dataclass(frozen=True)
class DequantizedBound(Objective):
    """Minus the bound of a ``Dequantized``, in nats."""

    def __call__(self, flow: Dequantized, rows: dict[str, Any], key: Array | None) -> Array:
        # Validation repeats its noise, so that epochs can be compared.
        key, noise_key = (None, jax.random.key(0)) if key is None else jax.random.split(key)
        flow = for_training(flow, key, len(rows["x"]))
        if "context" in rows:
            flow = flow.condition(rows["context"])
        return -flow.log_prob_bound(noise_key, rows["x"])


@dataclasses.dataclass(frozen=True)
class FlowMatching(Objective):
    r"""Conditional flow matching, for continuous flows: regression of the vector field.

    .. math:: \min_f \; E \, | T f(t T, (1 - t) z + t x, c) - (x - z) |^2, \quad t \sim U(0, 1)

    with z from the base and x a row of the data: the minimiser is a field whose flow carries the
    base to the data. A step costs one evaluation of the field where maximum likelihood solves an
    equation, and the result is an ordinary ``cnf`` with its exact ``log_prob``; but it does not
    maximise the likelihood, and ends a little below it. Losses are in squared standardised units,
    not nats. They are mostly the spread of their own targets, and gains show late: the default
    ``patience`` is 50.

    Sources: Lipman et al. (2023), arXiv:2210.02747, eq. 23 with :math:`\sigma_{\min} = 0`; Tong et
    al. (2024), arXiv:2302.00482, algorithm 3 (the coupling by optimal transport).

    :param coupling: how base draws and rows of a batch are paired: ``"independent"``, or
        ``"optimal_transport"`` for the pairing of least squared distance, which makes the paths
        straighter at O(batch_size^3) per step. It ignores the context: leave it for unconditional
        flows.
    :raises ValueError: for an unknown coupling; from ``nf.fit``, for a flow that is not of
        ``nf.cnf``, or optimal transport with a context.

    >>> import jax, numpyro_flows as nf
    >>> x = 5 + 0.1 * jax.random.normal(jax.random.key(0), (200, 2))
    >>> flow = nf.cnf(jax.random.key(2), 2, hidden=(8,))
    >>> fitted = nf.fit(jax.random.key(1), flow, x, objective=nf.FlowMatching(), max_epochs=2,
    ...                 progress_bar=False)
    >>> fitted.flow.sample(jax.random.key(3), (4,)).shape
    (4, 2)
    """

    coupling: str = "independent"

    patience = 50

    def __post_init__(self) -> None:
        known = ("independent", "optimal_transport")
        if self.coupling not in known:
            raise ValueError(f"coupling: expected one of {known}, got {self.coupling!r}.")

    def check(self, flow: Any, context: Any) -> None:
        if self.coupling != "independent" and context is not None:
            raise ValueError(
                "coupling: optimal transport would pair base draws with rows of other contexts, "
                "and the conditional densities would be wrong. Use 'independent'."
            )
        known = isinstance(flow, Distribution | Dequantized)
        if known and not (isinstance(flow, FlowDistribution) and _is_continuous(flow.transform)):
            raise ValueError(
                f"flow: expected a continuous flow, got {flow}, which has no vector field. Build "
                "it with `nf.cnf`, or leave out `objective=`."
            )

    def __call__(self, flow: FlowDistribution, rows: dict[str, Any], key: Array | None) -> Array:
        x, n = rows["x"], len(rows["x"])
        transform = flow.transform
        if isinstance(transform, Embedded):
            context = transform.read_context(rows["context"])
            transform = transform.transform
        else:
            context = rows.get("context")
        base_key, time_key = jax.random.split(jax.random.key(0) if key is None else key)
        z = flow.base_dist.sample(base_key, (n,))
        if self.coupling == "optimal_transport":
            distances = ((x[:, None] - z[None]) ** 2).sum(-1)
            i, j = optax.assignment.hungarian_algorithm(distances)
            z = z.at[i].set(z[j])
        # Each uniform, and together spread evenly, also the first of a batch that ends in padding.
        t = (jax.random.uniform(time_key) + _GOLDEN * jnp.arange(n)) % 1
        along = t[:, None] * x + (1 - t[:, None]) * z
        end = transform.end_time
        return ((end * transform.velocity(end * t, along, context) - (x - z)) ** 2).sum(-1)


def _is_continuous(transform: object) -> bool:
    """Whether there is one `Continuous`, behind nothing but what `fit` takes off."""
    if isinstance(transform, Embedded | CompressedContext | Standardized):
        return _is_continuous(transform.transform)
    if isinstance(transform, Chain):
        first, *others = transform.parts
        return _is_continuous(first) and all(isinstance(p, NumPyroTransform) for p in others)
    return isinstance(transform, Continuous)


def default_objective(flow: Any) -> Objective:
    """The objective of a flow where none is given."""
    return DequantizedBound() if isinstance(flow, Dequantized) else MaximumLikelihood()


@dataclasses.dataclass(frozen=True)
class BatchLoss:
    """The loss of a step, as ``loop.optimize`` wants it: the weighted mean over a batch's rows.

    Its ``fixed`` are what does not train of the flow, and the data of which ``select`` takes rows.
    With a ``split`` each device differentiates its own rows, which an objective must allow; without
    one the compiler splits the work by where the rows lie.
    """

    objective: Objective
    select: Select
    split: Split | None = None

    def total(self, params: Any, fixed: Any, batch: Any, key: Array | None) -> tuple[Array, Array]:
        """Weighted sum of the rows' losses, and the number of rows."""
        rest, data = fixed
        rows, is_row = self.select(data, batch)
        losses = rows["weights"] * self.objective(combine(params, rest), rows, key)
        return jnp.where(is_row, losses, 0.0).sum(), is_row.sum()

    def __call__(self, params: Any, fixed: Any, batch: Any, key: Array) -> Array:
        if self.split is not None:
            total = functools.partial(self.total, key=None)
            return self.split.mean(total, params, fixed, batch)
        value, num_rows = self.total(params, fixed, batch, key)
        return value / num_rows


@jit(static_argnames="loss")
def score(params: Any, fixed: Any, batches: Any, *, loss: BatchLoss) -> Array:
    """Weighted sum of the losses of all rows of some batches, without keys."""

    def step(total: Array, batch: Any) -> tuple[Array, None]:
        return total + loss.total(params, fixed, batch, None)[0], None

    return jax.lax.scan(step, jnp.zeros(()), batches)[0]


@jit(static_argnames="loss")
def score_many(params: Any, rests: Any, data: Any, batches: Any, *, loss: BatchLoss) -> Array:
    """The same for members: parameters, fixed parts and batches have a first axis over them."""

    def one(params: Any, rest: Any, batches: Any) -> Array:
        return score(params, (rest, data), batches, loss=loss)

    return jax.vmap(one)(params, rests, batches)
