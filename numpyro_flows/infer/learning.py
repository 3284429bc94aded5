"""How FlowNUTS learns its map: candidates, each accepted only if it is better than the last.

The first candidate is the guide's preconditioner, an affine map found by optimisation. A flow
trained by its ELBO follows where that is not enough, then maps trained on the draws of short pilot
chains and their scores. What is accepted only makes the sampler faster: any map leaves the
posterior what it is.
"""

import copy
import dataclasses
import functools
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

from ..diagnostics import importance_ess, psis_khat
from ..distribution import FlowDistribution
from ..transforms import FixedAffine
from .arguments import Static, join_arguments, split_arguments
from .fisher import Scored, affine_of_scores, divergence_of, fit_fisher, through
from .fit import default_num_particles, fit_guide
from .guide import AutoFlow, build, is_traced
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
    :ivar measure: ``"ELBO"``, larger is better, or ``"Fisher divergence"`` on held-out draws,
        smaller is better; both comparable only within a trial.
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
        if self.measure == "ELBO":
            return self.after > self.before
        return self.after < self.before

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


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _pilot(
    guide: AutoFlow,
    params: dict[str, Any],
    key: Array,
    traced: Any,
    static: Static,
    num_chains: int,
    num_draws: int,
) -> _Pilot:
    """Short NUTS chains in a guide's base space; draws ``(chains, draws, dim)`` in the model's."""
    args, kwargs = join_arguments(traced, static)
    potential = warped_potential(guide, params, args, kwargs)
    init, sample = hmc(potential, algo="NUTS")

    def chain(key: Array) -> Any:
        start_key, key = jax.random.split(key)
        start = finite_start(potential, guide.get_base_dist(), start_key)
        state = init(start, num_warmup=num_draws, max_tree_depth=8, rng_key=key)

        def step(state: Any, _: None) -> Any:
            state = sample(state)
            return state, (state.z, -state.z_grad, state.num_steps, state.diverging)

        _, (u, score, steps, diverging) = jax.lax.scan(step, state, length=2 * num_draws)
        return u[num_draws:], score[num_draws:], steps.sum(), diverging[num_draws:].sum()

    u, score, steps, diverging = jax.vmap(chain)(jax.random.split(key, num_chains))
    draws = through(guide.get_transform(params).inv, Scored(u, score))
    return _Pilot(draws, steps.sum(), diverging.sum())


def finite_start(potential: Callable[[Array], Array], base: Any, key: Array, num: int = 20) -> Any:
    """A draw of the base where the potential is finite; the last of ``num`` if none is."""
    draws = base.sample(key, (num,))
    finite = jnp.isfinite(jax.lax.map(potential, draws))
    return draws[jnp.where(finite.any(), jnp.argmax(finite), -1)]


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
    annealing_steps: int,
    progress_bar: bool,
) -> Learned:
    """Learn a map for a model and its arguments; see :class:`~numpyro_flows.FlowNUTS`."""
    if is_traced((args, kwargs)):
        raise ValueError(
            "FlowNUTS: the model's arguments are being traced, and a flow is learned from numbers. "
            "Call `mcmc.run` outside `jax.jit` and `jax.vmap`."
        )
    setup_key, locate_key, flow_key, fit_key, weight_key, key = jax.random.split(key, 6)
    with handlers.seed(rng_seed=setup_key):
        guide._setup_prototype(*args, **kwargs)
    located = guide._locate(locate_key, args, kwargs)
    spent = int(located.num_gradients)
    names = f"{guide.prefix}_flow$params", f"{guide.prefix}_preconditioner"

    def fresh(recipe: Callable[..., FlowDistribution], affine: FixedAffine) -> dict[str, Any]:
        return dict(zip(names, (build(recipe, guide.latent_dim, flow_key)[0], affine), strict=True))

    def judge(guide: AutoFlow, params: dict[str, Any]) -> tuple[float, float, float]:
        """ELBO, importance ESS and k-hat."""
        drawn = importance_log_weights(
            weight_key, guide, params, *args, num_samples=NUM_DRAWS, **kwargs
        )
        weights = np.asarray(drawn, float)
        return float(weights.mean()), importance_ess(weights), psis_khat(weights)

    current = simple = with_flow(guide, affine_only)
    params = fresh(affine_only, located.affine)
    elbo, ess, khat = judge(current, params)
    trials: list[Trial] = []
    if train == "auto" and ess >= GOOD_ENOUGH:
        return Learned(current, params, (), khat, ess, spent, 0)

    if train != "fisher":
        particles = num_particles or default_num_particles(guide.latent_dim)
        try:
            fitted = fit_guide(
                fit_key,
                guide,
                *args,
                num_steps=num_steps,
                num_particles=particles,
                annealing_steps=annealing_steps,
                init_params=fresh(guide._recipe, located.affine),
                target_ess=GOOD_ENOUGH,
                num_draws=NUM_DRAWS,
                progress_bar=progress_bar,
                **kwargs,
            )
        except ValueError as error:
            if "never finite" not in str(error):
                raise
            trials.append(Trial("flow by ELBO", "ELBO", elbo, -np.inf))
            spent += num_steps * particles
        else:
            spent += len(fitted.losses) * particles
            found = np.nan_to_num(fitted.elbo, nan=-np.inf)
            trials.append(Trial("flow by ELBO", "ELBO", elbo, found))
            if trials[-1].accepted:
                current, params, ess, khat = guide, fitted.params, fitted.ess, fitted.khat
    num_windows = {"vi": 0, "auto": int(ess < TRUSTED), "fisher": WINDOWS}[train]

    num_diverging = 0
    for window in range(num_windows):
        pilot_key, train_key, key = jax.random.split(key, 3)
        arguments = split_arguments(args, kwargs)
        pilot = _pilot(current, params, pilot_key, *arguments, num_pilots, num_pilot_draws)
        spent += int(pilot.num_gradients)
        num_diverging += int(pilot.num_divergences)
        draws, held_out = _divide(pilot.draws)
        if len(draws.x) == 0 or len(held_out.x) == 0:
            break
        before = float(divergence_of(current, params, held_out))

        label = f"{window + 1} of {num_windows}"
        affine = _affine_of_scores(params[names[1]], draws)
        found = fresh(affine_only, affine)
        after = _number(divergence_of(simple, found, held_out))
        trials.append(Trial(f"affine by scores, {label}", "Fisher divergence", before, after))
        if trials[-1].accepted:
            current, params, before = simple, found, after
        start = params if current is guide else fresh(guide._recipe, params[names[1]])
        found, losses = fit_fisher(guide, start, draws, held_out, train_key)
        after = _number(jnp.nanmin(losses))
        trials.append(Trial(f"flow by scores, {label}", "Fisher divergence", before, after))
        if trials[-1].accepted:
            current, params = guide, found
    if any(trial.accepted for trial in trials[-2 * num_windows :] if num_windows):
        ess, khat = judge(current, params)[1:]
    return Learned(current, params, tuple(trials), khat, ess, spent, num_diverging)


_affine_of_scores = jax.jit(affine_of_scores)


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
