r"""The Fisher divergence: maps judged and trained by draws and their scores, without the model.

A density p is seen through a map T as :math:`\tilde p(u) = p(T(u)) |\det T'(u)|`, whose score
:math:`\nabla \log \tilde p` follows from that of p at the same draw. HMC in u is easy where
:math:`\tilde p` is the base distribution, and how far it is from that is the Fisher divergence
:math:`E_p |\nabla \log \tilde p(u) - \nabla \log p_Z(u)|^2`: it needs no normalising constant, and
a few hundred draws with their scores hold as much as many times as many without.
"""

import dataclasses
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ..compilation import jit
from ..distribution import FlowDistribution, partition
from ..training import fit
from ..training.loop import adam, run_steps, start
from ..transform import FlowTransform
from ..transforms import FixedAffine
from .guide_flow import assemble, flow_of
from .normals import FULL
from .preconditioner import Affine

#: Steps from one look at the held-out draws to the next.
EVERY: Final = 50


class Scored(NamedTuple):
    """Draws of a density and the gradients of its logarithm there, both ``(n, dim)``."""

    x: Array
    score: Array


def through(transform: FlowTransform, draws: Scored) -> Scored:
    """Draws and scores as they are in the base space of a transform.

    The gradient at u of :math:`s^\\top T(u) + \\log |\\det T'(u)|`, s the score at T(u), is the
    score there.
    """
    u, _ = transform.inverse_and_log_det(draws.x)

    def log_density(u: Array) -> Array:
        y, log_det = transform.forward_and_log_det(u)
        return (draws.score * y).sum() + log_det.sum()

    return Scored(u, jax.grad(log_density)(u))


def fisher_divergence(flow: FlowDistribution, draws: Scored) -> Array:
    r"""Fisher divergence per coordinate from the base, of draws seen through a flow.

    0 if the flow is the density of the draws; 1 for a base that is standard normal where the
    density is flat.

    Source: Seyboldt, Carlson & Carpenter (2026), arXiv:2603.18845, for affine maps.

    :param flow: a flow over vectors of size dim.
    :param draws: draws and scores, each of shape ``(n, dim)``.
    :return: scalar.
    """
    u, score = through(flow.transform, draws)
    wanted = jax.grad(lambda u: flow.base_dist.log_prob(u).sum())(u)
    return ((score - wanted) ** 2).mean()


def affine_of_scores(affine: FixedAffine, draws: Scored) -> FixedAffine:
    r"""An affine map from draws and scores, with ``affine`` as the rough one to start in.

    That of the normal with the least Fisher divergence (``normals.py``). On the host, in float64.
    """
    rough = Affine.of(affine)
    w = rough.inverse(np.asarray(draws.x, float))
    score = rough.transposed(np.asarray(draws.score, float))
    return rough.matched(w, score, ridge=1e-4).transform()


def affine_of_moments(affine: FixedAffine, x: ArrayLike) -> FixedAffine:
    """An affine map with mean and covariance of draws, with ``affine`` as the rough one.

    :param x: shape ``(n, dim)``; with fewer than twice as many rows as coordinates, or beyond 128
        coordinates, the covariance is diagonal there.
    """
    rough = Affine.of(affine)
    w = rough.inverse(np.asarray(x, float))
    num, dim = w.shape
    mean, scale = w.mean(0), w.std(0)
    if dim > FULL:
        return rough.scaled(mean, scale).transform()
    if num < 2 * dim:
        return rough.after(mean, np.diag(scale)).transform()
    return rough.after(mean, np.linalg.cholesky(np.cov(w.T).reshape(dim, dim))).transform()


def fit_likelihood(
    key: Array, params: Any, rest: Any, affine: FixedAffine, x: Array, progress_bar: bool
) -> Any:
    """Train a guide's flow on draws by maximum likelihood; the affine map behind it stays.

    :param params: initial parameters of the flow.
    :param rest: the part of the flow that is not trained.
    :param x: draws, shape ``(n, dim)``.
    :return: the best parameters on the draws held out.
    """
    fitted = fit(
        key,
        flow_of(params, rest),
        affine.inv(x),
        standardize=False,
        patience=20,
        progress_bar=progress_bar,
    )
    return partition(fitted.flow.transform)[0]


@jit(once=True)
def mean_log_density(flow: FlowDistribution, x: Array) -> Array:
    """Mean log density of draws under a flow."""
    return flow.log_prob(x).mean()


@jit(once=True)
def divergence_of(flow: FlowDistribution, draws: Scored) -> Array:
    """:func:`fisher_divergence` as one program."""
    return fisher_divergence(flow, draws)


@dataclasses.dataclass(frozen=True)
class _LogDivergence:
    """Logarithm of the Fisher divergence of some draws: far off, a few would drown the others."""

    batch_size: int

    def __call__(self, params: Any, fixed: Any, batch: None, key: Array) -> Array:
        rest, affine, draws = fixed
        num = len(draws.x)
        rows = jax.random.choice(key, num, (min(self.batch_size, num),))
        some = jax.tree.map(lambda a: a[rows], draws)
        return jnp.log(fisher_divergence(assemble(params, rest, affine), some))


@jit(static_argnums=(6, 7))
def fit_fisher(
    params: Any,
    rest: Any,
    affine: FixedAffine,
    draws: Scored,
    held_out: Scored,
    key: Array,
    num_steps: int = 800,
    batch_size: int = 256,
) -> tuple[Any, Array]:
    """Train a guide's flow on draws and scores; the preconditioner stays.

    :param params: initial parameters of the flow.
    :param rest: the part of the flow that is not trained.
    :param affine: the preconditioner.
    :param draws: draws and scores to train on.
    :param held_out: draws and scores by which the best parameters are chosen, start included.
    :return: the best parameters and the held-out Fisher divergences, ``(num_steps // EVERY + 1,)``.
    """
    loss, optimizer, fixed = _LogDivergence(batch_size), adam(), (rest, affine, draws)

    def held_out_divergence(params: Any) -> Array:
        return fisher_divergence(assemble(params, rest, affine), held_out)

    def chunk(carry: Any, now: tuple[Array, Array]) -> tuple[Any, Array]:
        state, best, least = carry
        rates, number = now
        state, _ = run_steps(key, state, fixed, rates, None, number, loss=loss, optimizer=optimizer)
        found = held_out_divergence(state.params)
        better = found < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.params, best)
        return (state, best, jnp.where(better, found, least)), found

    first = held_out_divergence(params)
    rates = 5e-4 * (1 + jnp.cos(jnp.pi * jnp.arange(num_steps) / num_steps))
    numbers = jnp.arange(num_steps // EVERY)
    carry: Any = start(params, optimizer=optimizer), params, first
    (_, best, _), losses = jax.lax.scan(chunk, carry, (rates.reshape(-1, EVERY), numbers))
    return best, jnp.append(first, losses)
