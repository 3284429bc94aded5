"""Learning a map: candidates in stages, each accepted only if it is better than the last.

The first candidate is an affine map found by optimisation. A flow trained by its ELBO follows where
that is not enough, then maps trained on the draws of short pilot chains and their scores. What is
accepted only makes a sampler faster: any map leaves the posterior what it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.infer.initialization import init_to_uniform

from ..compilation import is_traced, split
from ..diagnostics import importance_ess, psis_khat
from ..distribution import FlowDistribution
from ..transforms import FixedAffine
from .centring import Degrees, degrees_of
from .density import own_params
from .fisher import (
    Scored,
    affine_of_moments,
    affine_of_scores,
    divergence_of,
    fit_fisher,
    fit_likelihood,
    mean_log_density,
)
from .guide_flow import guide_flow
from .guides import AutoFlow
from .latent_space import LatentSpace, LogDensity
from .maps import LearnedMap, draw
from .pilots import Pace, Pilots, base_starts, divide, pace_of, run_pilots
from .propriety import improper_sites
from .setup import SetUp
from .supports import Winding
from .train import NeverFinite
from .train import train as train_guide
from .trainers import LatentTrainer, default_num_particles

TRAIN: Final = ("auto", "vi", "fisher")
#: Importance ESS above which a map leaves nothing worth learning.
GOOD_ENOUGH: Final = 0.95
#: Importance ESS above which draws of pilot chains hold nothing that the guide's own do not.
TRUSTED: Final = 0.9
#: Importance ESS above which NUTS moves well in the coordinates of an affine map; the second if the
#: k-hat is below the third, above which there may be a narrow place that the ESS does not see.
EASY, PERHAPS, NARROW = 0.5, 0.3, 0.5
#: Gradients per effective draw of NUTS on a normal in its own coordinates.
LEAST_GRADIENTS: Final = 8
#: Split R-hat above which short pilot chains do not follow the posterior.
PILOT_R_HAT: Final = 1.1
#: Share of draws whose trajectories may diverge before the draws are in doubt.
DIVERGENT: Final = 0.001
#: Draws by which an ELBO is judged.
NUM_DRAWS: Final = 2000
#: Windows of pilot chains for `train="fisher"`.
WINDOWS: Final = 3


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate map.

    :ivar name: what it is and how it was trained.
    :ivar measure: a name: ``"ELBO"`` or the mean ``"log density"`` of held-out draws, where larger
        is better, or their ``"Fisher divergence"``, where smaller is; comparable within a trial.
    :ivar before: that of the map accepted so far.
    :ivar after: that of this one.
    :ivar is_flow: whether it is a flow, not an affine map.
    :ivar is_loss: whether a smaller figure is the better one.
    :ivar accepted: whether it is better.
    """

    name: str
    measure: str
    before: float
    after: float
    is_flow: bool = True
    is_loss: bool = False

    @property
    def accepted(self) -> bool:
        return self.after < self.before if self.is_loss else self.after > self.before

    def __str__(self) -> str:
        verb = "accepted" if self.accepted else "rejected"
        return f"{self.name}: {verb}, {self.measure} {self.before:.4g} to {self.after:.4g}"


class Model(NamedTuple):
    """A model as a sampler sees it: its ``param`` sites held, and where its chains may start.

    :ivar function: the NumPyro model.
    :ivar held: values of its ``param`` sites.
    :ivar init_strategy: NumPyro's initialisation strategy.
    :ivar space: its latent space at the arguments of the learning.
    :ivar names: names of all its sites.
    :ivar forward_mode: whether its gradient is taken in forward mode.
    """

    function: Callable
    held: dict[str, Array]
    init_strategy: Callable
    space: LatentSpace
    names: frozenset[str]
    forward_mode: bool = False

    def set_up(self, key: Array, args: tuple, kwargs: dict[str, Any]) -> SetUp:
        """A run of the model at a start."""
        return SetUp("FlowNUTS", self.function, self.init_strategy, key, args, kwargs)

    def log_density(self, args: tuple, kwargs: dict[str, Any]) -> LogDensity:
        """Its log density at these arguments, their supports included."""
        key, space = jax.random.key(0), self.space
        if space.depends_on_arguments:
            space = self.set_up(key, args, kwargs).space.with_idle(space.idle)
        options = {"as_nuts": True, "forward_mode": self.forward_mode}
        return LogDensity(self.function, space, args, kwargs, key, self.held, **options)


class Chosen(NamedTuple):
    """A map without the model: what a chain carries.

    :ivar flow: the flow, over the coordinates of ``degrees``.
    :ivar windings: what unwinds angles, by site.
    :ivar degrees: degrees of centring of the sites; None for the latent space itself.
    """

    flow: FlowDistribution
    windings: dict[str, Winding]
    degrees: Degrees | None = None

    def at(self, density: LogDensity) -> LearnedMap:
        """The map with the model."""
        return LearnedMap(density.centred(self.degrees), self.flow, self.windings)


class Learned(NamedTuple):
    """A map, how it was found, and the model gradients that it took.

    It holds no data: the model is joined to it at the arguments of each call.
    """

    model: Model
    chosen: Chosen
    trials: tuple[Trial, ...]
    uses_flow: bool
    khat: float
    ess: float
    num_gradients: int
    pilot_divergences: int
    decision: str = ""
    improper: tuple[str, ...] = ()


def decide(pace: Pace, num_wanted: int, cost: int) -> tuple[bool, str]:
    """Whether a flow is worth its training, and why.

    It is where chains in the affine coordinates are wrong, and where it saves more gradients than
    it takes.

    :param pace: pace of pilot chains behind the affine map.
    :param num_wanted: effective draws that are wanted.
    :param cost: gradients of the training.
    """
    saving = num_wanted * max(pace.per_effective - LEAST_GRADIENTS, 0.0)
    astray = pace.r_hat > PILOT_R_HAT or pace.divergences > DIVERGENT
    pays = astray or saving > cost
    reason = (
        "they do not follow the posterior"
        if astray
        else f"a flow would save {saving:,.0f} gradients in {num_wanted:,} effective draws and "
        f"takes {cost:,}"
    )
    return pays, f"{'a flow' if pays else 'no flow'}: pilot chains take {pace}; {reason}"


class _Guide(AutoFlow):
    """The guide inside a sampler; errors name the sampler, and what NUTS does is done."""

    title = "FlowNUTS"
    sums_out = True


class _Candidate(NamedTuple):
    """An affine map, and the parameters of a flow in front of it; None where it is affine."""

    affine: FixedAffine
    params: Any = None


class _Learner:
    """The map accepted so far, and the stages that propose others."""

    def __init__(self, key: Array, guide: AutoFlow, args: tuple, kwargs: dict[str, Any]):
        set_up_key, locate_key, self._flow_key, self._key = split(key, 4)
        begun = guide.set_up(set_up_key, args, kwargs, as_nuts=True)
        trace = guide.prototype_trace
        self.model = Model(
            guide.model,
            own_params(trace),
            guide.init_loc_fn,
            guide.space,
            frozenset(trace),
            guide.forward_mode,
        )
        self._located, self.num_gradients, _ = guide.locate(locate_key, begun)
        # From here on the coordinates are those of the sites' degrees of centring.
        density = begun.density.centred(degrees_of(self._located))
        self._guide, self._begun = guide, begun._replace(density=density)
        self.improper = improper_sites(density, self._located)
        self.accepted, self.pilot_divergences = _Candidate(self._located), 0
        self.decision = ""
        self.trials: list[Trial] = []
        self._judged: _Candidate | None = None
        self.judge()

    def _next_keys(self) -> tuple[Array, Array]:
        self._key, one, two, _ = split(self._key, 4)
        return one, two

    def flow(self, candidate: _Candidate) -> FlowDistribution:
        """A candidate over the latent space."""
        if candidate.params is not None:
            return self._guide.flow(candidate.params, candidate.affine)
        zero = np.zeros(self._guide.latent_dim, jnp.result_type(float))
        return FlowDistribution(dist.Normal(zero, np.ones_like(zero)), candidate.affine)

    def map(self, candidate: _Candidate | None = None) -> LearnedMap:
        """A candidate, by default the accepted one, with the model."""
        candidate = self.accepted if candidate is None else candidate
        windings = self._guide.windings(candidate.affine)
        return LearnedMap(self._begun.density, self.flow(candidate), windings)

    def result(self) -> Learned:
        """What was learned."""
        learned = self.map()
        return Learned(
            self.model,
            Chosen(learned.flow, learned.windings, learned.density.degrees),
            tuple(self.trials),
            self.accepted.params is not None,
            self.khat,
            self.ess,
            self.num_gradients,
            self.pilot_divergences,
            self.decision,
            self.improper,
        )

    def judge(self) -> None:
        """ELBO, ESS and k-hat of the accepted map, from fresh draws, if they are not known."""
        if self._judged is self.accepted:
            return
        self._judged = self.accepted
        drawn = draw(self.map(), self._flow_key, NUM_DRAWS)
        weights = np.asarray(drawn.log_p, float) - np.asarray(drawn.log_q, float)
        self.elbo = float(weights.mean())
        self.ess, self.khat = importance_ess(weights), psis_khat(weights)

    def _consider(self, trial: Trial, candidate: _Candidate | None) -> None:
        """Take a candidate if it is better."""
        self.trials.append(trial)
        if trial.accepted and candidate is not None:
            self.accepted = candidate

    def by_elbo(self, num_steps: int, num_particles: int, progress_bar: bool) -> None:
        """The flow as ``fit_guide`` trains it."""
        start = {self._guide.names[1]: self._located}
        train_key, judge_key = self._next_keys()
        trainer = LatentTrainer(train_key, self._guide, self._begun, num_particles, start)
        candidate, elbo, steps = None, -np.inf, num_steps
        try:
            fitted = train_guide(
                trainer,
                judge_key,
                num_steps=num_steps,
                target_ess=GOOD_ENOUGH,
                num_draws=NUM_DRAWS,
                progress_bar=progress_bar,
            )
        except NeverFinite:
            pass
        else:
            steps, elbo = len(fitted.losses), float(np.nan_to_num(fitted.elbo, nan=-np.inf))
            candidate = _Candidate(self._located, fitted.params[self._guide.names[0]])
        self.num_gradients += steps * trainer.num_particles
        self._consider(Trial("flow by ELBO", "ELBO", self.elbo, elbo), candidate)
        if candidate is not None and self.accepted is candidate:
            self._judged = candidate
            self.elbo, self.ess, self.khat = fitted.elbo, fitted.ess, fitted.khat

    def _run_pilots(
        self, learned: LearnedMap, starts: Array, key: Array, num_draws: int
    ) -> tuple[Pilots, Scored, Scored]:
        pilots = run_pilots(learned, starts, key, num_draws)
        self.num_gradients += int(pilots.num_gradients)
        self.pilot_divergences += int(pilots.num_divergences)
        return pilots, *divide(pilots.draws)

    def _run_own_pilots(self, num_pilots: int, num_draws: int) -> tuple[Pilots, Scored, Scored]:
        """Chains in the accepted map's space, from draws of it."""
        learned, (start_key, pilot_key) = self.map(), self._next_keys()
        starts = base_starts(learned, start_key, num_pilots)
        return self._run_pilots(learned, starts, pilot_key, num_draws)

    def pace(self, num_pilots: int, num_draws: int) -> Pace:
        """How NUTS moves in the accepted map's space; an affine map by its chains' scores."""
        pilots, draws, held_out = self._run_own_pilots(num_pilots, num_draws)
        if len(draws.x) and len(held_out.x):
            self._affine_by_scores("pilot chains", draws, held_out)
        return pace_of(pilots)

    def _affine_by_scores(self, label: str, draws: Scored, held_out: Scored) -> float:
        """An affine map from draws and scores; the smaller Fisher divergence of the two."""
        before = _number(divergence_of(self.flow(self.accepted), held_out))
        found = _Candidate(affine_of_scores(self.accepted.affine, draws))
        after = _number(divergence_of(self.flow(found), held_out))
        name = f"affine by scores, {label}"
        trial = Trial(name, "Fisher divergence", before, after, is_flow=False, is_loss=True)
        self._consider(trial, found)
        return min(before, after)

    def by_scores(self, label: str, num_pilots: int, num_draws: int) -> None:
        """Affine map and flow from draws and scores of chains in the accepted map's space."""
        _, draws, held_out = self._run_own_pilots(num_pilots, num_draws)
        if not len(draws.x) or not len(held_out.x):
            return
        before = self._affine_by_scores(label, draws, held_out)
        affine, params = self.accepted
        if params is None:
            params = self._guide.initial_flow(self._flow_key)
        params, losses = fit_fisher(
            params, self._guide.rest, affine, draws, held_out, self._next_keys()[0]
        )
        after, name = _number(np.nanmin(losses)), f"flow by scores, {label}"
        trial = Trial(name, "Fisher divergence", before, after, is_loss=True)
        self._consider(trial, _Candidate(affine, params))

    def by_draws(self, num_pilots: int, num_draws: int, progress_bar: bool) -> None:
        """A flow over all modes that chains from scattered starts find, by likelihood."""
        wide, (pilot_key, fit_key) = self.map(_Candidate(self._located)), self._next_keys()
        starts = wide.from_latent(jnp.asarray(self._begun.starts[:num_pilots]))
        _, draws, held_out = self._run_pilots(wide, starts, pilot_key, num_draws)
        if not len(draws.x) or not len(held_out.x):
            return
        affine = affine_of_moments(self._located, draws.x)
        fresh, rest = self._guide.initial_flow(self._flow_key), self._guide.rest
        params = fit_likelihood(fit_key, fresh, rest, affine, draws.x, progress_bar)
        found = _Candidate(affine, params)
        trial = Trial(
            "flow by draws from scattered starts",
            "log density",
            float(mean_log_density(self.map().flow, held_out.x)),
            float(mean_log_density(self.flow(found), held_out.x)),
        )
        self._consider(trial, found)


def learn(
    key: Array,
    model: Callable,
    flow: Callable[..., FlowDistribution],
    init_strategy: Callable | None,
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
    num_wanted: int,
    forward_mode: bool = False,
) -> Learned:
    """Learn a map for a model and its arguments; see :class:`~numpyro_flows.FlowNUTS`.

    :param num_wanted: draws that are to be made through the map.
    """
    if is_traced((args, kwargs)):
        raise ValueError(
            "FlowNUTS: the model's arguments are being traced, and a flow is learned from numbers. "
            "Call `mcmc.run` outside `jax.jit` and `jax.vmap`."
        )
    guide = _Guide(model, flow, prefix="flow", init_loc_fn=init_strategy or init_to_uniform)
    guide.forward_mode = forward_mode
    learner = _Learner(key, guide, args, kwargs)
    if learner.improper:
        return learner.result()  # nothing to learn: what is there has no shape
    particles = num_particles or default_num_particles(guide.latent_dim)
    by_elbo = train == "vi"
    if train == "auto":
        if learner.ess >= GOOD_ENOUGH:
            learner.decision = "the affine map leaves nothing to learn"
        elif several_modes:  # jumps propose draws of the flow
            by_elbo = True
        elif learner.ess >= (EASY if learner.khat > NARROW else PERHAPS):
            learner.decision = "NUTS moves well behind the affine map"
        else:
            pace = learner.pace(num_pilots, num_pilot_draws)
            by_elbo, learner.decision = decide(pace, num_wanted, num_steps * particles)
            learner.judge()
    if by_elbo:
        learner.by_elbo(num_steps, particles, progress_bar)
    retrain = by_elbo and learner.ess < TRUSTED
    windows = {"vi": 0, "auto": int(retrain), "fisher": WINDOWS}[train]
    for window in range(windows):
        learner.by_scores(f"{window + 1} of {windows}", num_pilots, num_pilot_draws)
    if several_modes:
        learner.by_draws(2 * num_pilots, 2 * num_pilot_draws, progress_bar)
    learner.judge()
    return learner.result()


def learn_map(
    key: Array,
    model: Callable,
    *args: Any,
    flow: Callable[..., FlowDistribution] = guide_flow,
    train: str = "auto",
    num_steps: int = 4000,
    num_wanted: int = 4000,
    progress_bar: bool = True,
    **kwargs: Any,
) -> LearnedMap:
    r"""Learn a map from a base space, in which a model's posterior is nearly the base distribution.

    What :class:`~numpyro_flows.FlowNUTS` samples through, for samplers of any other library:
    ``learned.log_density(u)`` is the model's log density in the base space,
    ``learned.sample_start(key)`` a start for a chain there, and ``learned.to_sites(u)`` the model's
    sites at a draw. The posterior is the model's own, whatever the map is.

    :param key: ``jax.random.key``.
    :param model: a NumPyro model with continuous latent sites.
    :param args: its arguments, as are the other keyword arguments.
    :param flow: a recipe, as for ``nf.AutoFlow``.
    :param train: as for ``nf.FlowNUTS``.
    :param num_steps: largest number of training steps by ELBO.
    :param num_wanted: draws that are to be made through the map, which training must pay for.
    :param progress_bar: whether training shows one.
    :raises ValueError: for an unknown ``train``; for a model with discrete latent sites or none.

    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model():
    ...     numpyro.sample("scale", dist.LogNormal(1.0, 2.0))
    >>> learned = nf.learn_map(jax.random.key(0), model, progress_bar=False)
    >>> jnp.round(jnp.log(learned.to_sites(jnp.zeros(1))["scale"]), 1)
    Array(1., dtype=float32)
    """
    if train not in TRAIN:
        raise ValueError(f"train: expected one of {sorted(TRAIN)}, got {train!r}.")
    learned = learn(
        key,
        model,
        flow,
        None,
        args,
        kwargs,
        train=train,
        num_steps=num_steps,
        num_particles=None,
        num_pilots=8,
        num_pilot_draws=100,
        several_modes=False,
        progress_bar=progress_bar,
        num_wanted=num_wanted,
    )
    return learned.chosen.at(learned.model.log_density(args, kwargs))


def _number(loss: Any) -> float:
    return float(np.nan_to_num(np.asarray(loss), nan=np.inf))
