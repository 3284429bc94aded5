"""How FlowNUTS learns its map: candidates, each accepted only if it is better than the last.

The first candidate is the guide's preconditioner, an affine map found by optimisation. A flow
trained by its ELBO follows where that is not enough, then maps trained on the draws of short pilot
chains and their scores. What is accepted only makes the sampler faster: any map leaves the
posterior what it is.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.infer.hmc import hmc
from numpyro.infer.util import potential_energy

from ..compilation import is_traced, jit
from ..diagnostics import importance_ess, psis_khat
from ..distribution import FlowDistribution, combine, partition
from ..training import fit
from ..transforms import FixedAffine
from .arguments import Static, join_arguments, split_arguments
from .fisher import (
    Scored,
    affine_of_moments,
    affine_of_scores,
    divergence_of,
    fit_fisher,
    log_density_of,
    through,
)
from .fit import default_num_particles, fit_guide
from .guide import AutoFlow, build
from .importance import importance_log_weights
from .reparam import NeuTraReparam

TRAIN: Final = ("auto", "vi", "fisher")
#: Importance ESS above which a map leaves nothing worth learning.
GOOD_ENOUGH: Final = 0.95
#: Importance ESS above which draws of pilot chains hold nothing that the guide's own do not.
TRUSTED: Final = 0.9
#: Draws by which an ELBO is judged.
NUM_DRAWS: Final = 2000
#: Windows of pilot chains for `train="fisher"`.
WINDOWS: Final = 3


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate map.

    :ivar name: what it is and how it was trained.
    :ivar measure: ``"ELBO"`` or the mean ``"log density"`` of held-out draws, where larger is
        better, or their ``"Fisher divergence"``, where smaller is; comparable within a trial.
    :ivar before: that of the map accepted so far.
    :ivar after: that of this one.
    :ivar accepted: whether it is better.
    """

    name: str
    measure: str
    before: float
    after: float

    @property
    def accepted(self) -> bool:
        if self.measure == "Fisher divergence":
            return self.after < self.before
        return self.after > self.before

    def __str__(self) -> str:
        verb = "accepted" if self.accepted else "rejected"
        return f"{self.name}: {verb}, {self.measure} {self.before:.4g} to {self.after:.4g}"


class Learned(NamedTuple):
    """A map, how it was found, and the model gradients that it took."""

    guide: AutoFlow
    params: dict[str, Any]
    trials: tuple[Trial, ...]
    khat: float
    ess: float
    num_gradients: int
    pilot_divergences: int

    @property
    def uses_flow(self) -> bool:
        """Whether the map is more than affine."""
        return self.guide._recipe is not affine_only


def warped_potential(
    guide: AutoFlow, params: dict[str, Any], args: tuple, kwargs: dict[str, Any]
) -> Callable[[Array], Array]:
    """Negative log density of the model in the base space of a guide, up to a constant."""
    model = handlers.seed(NeuTraReparam(guide, params).reparam(guide.model), 0)
    name = f"{guide.prefix}_shared_latent"
    return lambda u: potential_energy(model, args, kwargs, {name: u})


def affine_only(key: Array, dim: int) -> FlowDistribution:
    """The recipe of a guide that is its preconditioner and nothing else."""
    zero = jnp.zeros(dim)
    return FlowDistribution(dist.Normal(zero, 1.0), FixedAffine(zero, 1.0))


def with_flow(guide: AutoFlow, recipe: Callable[..., FlowDistribution]) -> AutoFlow:
    """A guide that is set up, with another recipe."""
    other = copy.copy(guide)
    other._recipe = recipe
    other._rest = build(recipe, guide.latent_dim, jax.random.key(0))[1]
    return other


class _Pilot(NamedTuple):
    draws: Scored
    num_gradients: Array
    num_divergences: Array


@jit(static_argnums=(0, 4, 5))
def _base_starts(
    guide: AutoFlow, params: Any, key: Array, traced: Any, static: Static, num: int
) -> Array:
    """Draws of a guide's base at which the density is finite, ``(num, dim)``."""
    args, kwargs = join_arguments(traced, static)
    potential = warped_potential(guide, params, args, kwargs)
    keys = jax.random.split(key, num)
    return jax.vmap(lambda key: finite_start(potential, guide.get_base_dist(), key))(keys)


@jit(static_argnums=(0, 4, 5))
def _model_starts(
    guide: AutoFlow, params: Any, key: Array, traced: Any, static: Static, num: int
) -> Array:
    """Starts of the initialisation strategy, in a guide's base space, ``(num, dim)``."""
    args, kwargs = join_arguments(traced, static)
    keys = jax.random.split(key, num)
    latent = jax.vmap(lambda key: guide._start_latent(key, args, kwargs))(keys)
    return guide.get_transform(params).inv(latent)


@jit(static_argnums=(0, 5, 6))
def _pilot(
    guide: AutoFlow,
    params: dict[str, Any],
    starts: Array,
    key: Array,
    traced: Any,
    static: Static,
    num_draws: int,
) -> _Pilot:
    """Short NUTS chains in a guide's base space; draws ``(chains, draws, dim)`` in the model's."""
    args, kwargs = join_arguments(traced, static)
    potential = warped_potential(guide, params, args, kwargs)
    init, sample = hmc(potential, algo="NUTS")

    def chain(start: Array, key: Array) -> Any:
        state = init(start, num_warmup=num_draws, max_tree_depth=8, rng_key=key)

        def step(state: Any, _: None) -> Any:
            state = sample(state)
            return state, (state.z, -state.z_grad, state.num_steps, state.diverging)

        _, (u, score, steps, diverging) = jax.lax.scan(step, state, length=2 * num_draws)
        return u[num_draws:], score[num_draws:], steps.sum(), diverging[num_draws:].sum()

    u, score, steps, diverging = jax.vmap(chain)(starts, jax.random.split(key, len(starts)))
    draws = through(guide.get_transform(params).inv, Scored(u, score))
    return _Pilot(draws, steps.sum(), diverging.sum())


def finite_start(potential: Callable[[Array], Array], base: Any, key: Array, num: int = 20) -> Any:
    """A draw of the base where the potential is finite; the last of ``num`` if none is."""
    draws = base.sample(key, (num,))
    finite = jnp.isfinite(jax.lax.map(potential, draws))
    return draws[jnp.where(finite.any(), jnp.argmax(finite), -1)]


class _Learner:
    """The map accepted so far, and the stages that propose others."""

    def __init__(self, key: Array, guide: AutoFlow, args: tuple, kwargs: dict[str, Any]):
        setup_key, locate_key, self._flow_key, self._weight_key, self._key = jax.random.split(
            key, 5
        )
        self._args, self._kwargs = args, kwargs
        self._arguments = split_arguments(args, kwargs)
        with handlers.seed(rng_seed=setup_key):
            guide._setup_prototype(*args, **kwargs)
        located = guide._locate(locate_key, args, kwargs)
        self._names = f"{guide.prefix}_flow$params", f"{guide.prefix}_preconditioner"
        self._rich, self._simple = guide, with_flow(guide, affine_only)
        self._located = located.affine
        self.guide, self.params = self._simple, self._fresh(affine_only, located.affine)
        self.num_gradients, self.pilot_divergences = int(located.num_gradients), 0
        self.trials: list[Trial] = []
        self.judge()

    def _next_key(self) -> Array:
        self._key, key = jax.random.split(self._key)
        return key

    def _fresh(
        self, recipe: Callable[..., FlowDistribution], affine: FixedAffine
    ) -> dict[str, Any]:
        """Parameters of a guide whose flow is still the identity."""
        flow, _ = build(recipe, self._rich.latent_dim, self._flow_key)
        return dict(zip(self._names, (flow, affine), strict=True))

    @property
    def _affine(self) -> FixedAffine:
        return self.params[self._names[1]]

    def judge(self) -> None:
        """Weigh draws of the accepted map."""
        drawn = importance_log_weights(
            self._weight_key,
            self.guide,
            self.params,
            *self._args,
            num_samples=NUM_DRAWS,
            **self._kwargs,
        )
        weights = np.asarray(drawn, float)
        self.elbo = float(weights.mean())
        self.ess, self.khat = importance_ess(weights), psis_khat(weights)

    def _consider(
        self,
        name: str,
        measure: str,
        figures: tuple[float, float],
        guide: AutoFlow,
        params: dict[str, Any] | None,
    ) -> None:
        """Take a candidate if it is better."""
        self.trials.append(Trial(name, measure, *figures))
        if self.trials[-1].accepted and params is not None:
            self.guide, self.params = guide, params

    def by_elbo(self, num_steps: int, num_particles: int | None, progress_bar: bool) -> None:
        """The flow as ``fit_guide`` trains it."""
        particles = num_particles or default_num_particles(self._rich.latent_dim)
        name, params, elbo, steps = "flow by ELBO", None, -np.inf, num_steps
        try:
            fitted = fit_guide(
                self._next_key(),
                self._rich,
                *self._args,
                num_steps=num_steps,
                num_particles=particles,
                init_params=self._fresh(self._rich._recipe, self._located),
                target_ess=GOOD_ENOUGH,
                num_draws=NUM_DRAWS,
                progress_bar=progress_bar,
                **self._kwargs,
            )
        except ValueError as error:
            if "never finite" not in str(error):
                raise
        else:
            params, elbo, steps = fitted.params, fitted.elbo, len(fitted.losses)
            elbo = float(np.nan_to_num(elbo, nan=-np.inf))
        self.num_gradients += steps * particles
        self._consider(name, "ELBO", (self.elbo, elbo), self._rich, params)
        if self.guide is self._rich:
            self.elbo, self.ess, self.khat = fitted.elbo, fitted.ess, fitted.khat

    def _run_pilots(
        self, guide: AutoFlow, params: dict[str, Any], starts: Array, num_draws: int
    ) -> tuple[Scored, Scored]:
        pilot = _pilot(guide, params, starts, self._next_key(), *self._arguments, num_draws)
        self.num_gradients += int(pilot.num_gradients)
        self.pilot_divergences += int(pilot.num_divergences)
        return _divide(pilot.draws)

    def by_scores(self, label: str, num_pilots: int, num_draws: int) -> None:
        """Affine map and flow from draws and scores of chains in the accepted map's space."""
        starts = _base_starts(
            self.guide, self.params, self._next_key(), *self._arguments, num_pilots
        )
        draws, held_out = self._run_pilots(self.guide, self.params, starts, num_draws)
        if not len(draws.x) or not len(held_out.x):
            return
        measure = "Fisher divergence"
        before = _number(divergence_of(self.guide, self.params, held_out))
        found = self._fresh(affine_only, affine_of_scores(self._affine, draws))
        after = _number(divergence_of(self._simple, found, held_out))
        self._consider(f"affine by scores, {label}", measure, (before, after), self._simple, found)
        start = self.params
        if self.guide is self._simple:
            start = self._fresh(self._rich._recipe, self._affine)
        found, losses = fit_fisher(self._rich, start, draws, held_out, self._next_key())
        figures = min(before, after), _number(jnp.nanmin(losses))
        self._consider(f"flow by scores, {label}", measure, figures, self._rich, found)

    def by_draws(self, num_pilots: int, num_draws: int, progress_bar: bool) -> None:
        """A flow over all modes that chains from scattered starts find, by likelihood."""
        wide = self._fresh(affine_only, self._located)
        starts = _model_starts(self._simple, wide, self._next_key(), *self._arguments, num_pilots)
        draws, held_out = self._run_pilots(self._simple, wide, starts, num_draws)
        if not len(draws.x) or not len(held_out.x):
            return
        affine = affine_of_moments(self._located, draws.x)
        fresh = self._fresh(self._rich._recipe, affine)
        fitted = fit(
            self._next_key(),
            combine(fresh[self._names[0]], self._rich._rest),
            affine.inv(draws.x),
            standardize=False,
            patience=20,
            progress_bar=progress_bar,
        )
        found = fresh | {self._names[0]: partition(fitted.flow)[0]}
        figures = (
            float(log_density_of(self.guide, self.params, held_out.x)),
            float(log_density_of(self._rich, found, held_out.x)),
        )
        name = "flow by draws from scattered starts"
        self._consider(name, "log density", figures, self._rich, found)


def learn(
    key: Array,
    guide: AutoFlow,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    train: str,
    num_steps: int,
    num_particles: int | None,
    num_pilots: int,
    num_pilot_draws: int,
    several_modes: bool,
    progress_bar: bool,
) -> Learned:
    """Learn a map for a model and its arguments; see :class:`~numpyro_flows.FlowNUTS`."""
    if is_traced((args, kwargs)):
        raise ValueError(
            "FlowNUTS: the model's arguments are being traced, and a flow is learned from numbers. "
            "Call `mcmc.run` outside `jax.jit` and `jax.vmap`."
        )
    learner = _Learner(key, guide, args, kwargs)
    if train == "vi" or (train == "auto" and learner.ess < GOOD_ENOUGH):
        learner.by_elbo(num_steps, num_particles, progress_bar)
    windows = {"vi": 0, "auto": int(learner.ess < TRUSTED), "fisher": WINDOWS}[train]
    for window in range(windows):
        learner.by_scores(f"{window + 1} of {windows}", num_pilots, num_pilot_draws)
    if several_modes:
        learner.by_draws(2 * num_pilots, 2 * num_pilot_draws, progress_bar)
    if any(trial.accepted and trial.measure != "ELBO" for trial in learner.trials):
        learner.judge()
    return Learned(
        learner.guide,
        learner.params,
        tuple(learner.trials),
        learner.khat,
        learner.ess,
        learner.num_gradients,
        learner.pilot_divergences,
    )


def _number(loss: Array) -> float:
    return float(jnp.nan_to_num(loss, nan=jnp.inf))


def _divide(draws: Scored) -> tuple[Scored, Scored]:
    """Draws for training and, from other chains, for judging; those that are finite."""
    num_chains = len(draws.x)
    num_held = max(1, num_chains // 4)

    def flat(part: Scored) -> Scored:
        x, score = (np.asarray(a).reshape(-1, a.shape[-1]) for a in part)
        good = np.isfinite(x).all(-1) & np.isfinite(score).all(-1)
        return Scored(jnp.asarray(x[good]), jnp.asarray(score[good]))

    return (
        flat(Scored(draws.x[num_held:], draws.score[num_held:])),
        flat(Scored(draws.x[:num_held], draws.score[:num_held])),
    )
