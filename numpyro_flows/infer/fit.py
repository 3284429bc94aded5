"""A guide fitted in one call, with defaults that need no tuning, and a verdict on the result."""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpyro import handlers
from numpyro.infer import SVI, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVIState
from tqdm.auto import trange

from ..checks import check_key, check_size
from ..compilation import jit
from ..diagnostics import NEARLY_EQUAL, importance_ess, psis_khat
from .arguments import Static, join_arguments, split_arguments
from .density import check_summable, hidden_discrete, hidden_sites, unblocked
from .elbo import STL_ELBO, with_penalties
from .importance import importance_log_weights
from .nonfinite import blame

#: Steps in which the learning rate rises.
WARM_UP = 200
#: Two windows of at least so many steps are compared; a loss that gains less has ceased to fall.
WINDOW, SMALLEST_GAIN = 300, 3e-4
#: Steps per compiled call.
CHUNK = 100


@dataclasses.dataclass(frozen=True)
class GuideFit:
    """What :func:`fit_guide` returns; ``print`` it for the verdict.

    :ivar params: the trained parameters, for ``SVI``, ``Predictive`` and ``nf.NeuTraReparam``.
    :ivar losses: negative ELBO estimate of each step, NaN where a step was skipped.
    :ivar elbo: the ELBO of the result, from fresh draws.
    :ivar elbo_error: its standard error.
    :ivar khat: Pareto shape of the importance weights; see ``nf.diagnostics.psis_khat``.
    :ivar ess: effective sample size of importance sampling, as a fraction of the draws.
    :ivar num_skipped: steps left out because a value or a gradient was not finite.
    :ivar verdict: one line.
    """

    params: dict[str, Any]
    losses: np.ndarray
    elbo: float
    elbo_error: float
    khat: float
    ess: float
    num_skipped: int

    @property
    def trusted(self) -> bool:
        """Whether the guide covers the posterior: k-hat below 0.7, or weights nearly equal."""
        return self.khat < 0.7 or self.ess >= NEARLY_EQUAL

    @property
    def verdict(self) -> str:
        figures = (
            f"ELBO {self.elbo:.3f} +- {self.elbo_error:.3f}, importance ESS {self.ess:.0%}, "
            f"k-hat {self.khat:.2f}"
        )
        skipped = f"; {self.num_skipped} steps skipped" if self.num_skipped else ""
        if self.trusted:
            return f"reliable: {figures}{skipped}."
        return (
            f"not reliable: {figures}{skipped}. The guide misses mass: train longer, take a "
            "richer flow, or sample with `nf.NeuTraReparam`."
        )

    def __str__(self) -> str:
        return self.verdict


def default_num_particles(dim: int) -> int:
    """Draws per step: 128 up to 200 dimensions, then fewer, at least 16."""
    return int(np.clip(25_600 // dim, 16, 128))


def fit_guide(
    key: Array,
    guide: AutoGuide,
    *args: Any,
    num_steps: int | None = None,
    num_particles: int | None = None,
    learning_rate: float | None = None,
    elbo: ELBO | None = None,
    annealing_steps: int = 0,
    init_params: dict[str, Any] | None = None,
    target_ess: float = 0.99,
    num_draws: int = 10_000,
    progress_bar: bool = True,
    **kwargs: Any,
) -> GuideFit:
    r"""Train a guide and say whether to trust it.

    ``SVI`` underneath, with Adam, gradients clipped by their global norm, a learning rate that
    rises over the first 200 steps and falls over the last half as a cosine, and steps left out
    whose value or gradient is not finite. The fall begins earlier, and training ends earlier, once
    the loss has ceased to fall. If the result of an early end cannot be trusted, training goes on
    for as many steps again. What is returned is the better of the last parameters and the best seen
    before, judged by fresh draws. Arrays among the model's arguments are arguments of the
    compiled program, not baked into it. The losses of continuous flows contain their penalties.

    :param key: ``jax.random.key``.
    :param guide: an automatic guide, ``nf.AutoFlow`` or NumPyro's; it need not be set up.
    :param args: arguments of the model and the guide, as are the other keyword arguments.
    :param num_steps: largest number of steps, 8,000 by default; simple posteriors end far earlier.
    :param num_particles: draws per step; by default 128 up to 200 dimensions, then fewer.
    :param learning_rate: the largest, 3e-3 by default.
    :param elbo: the objective, ``nf.STL_ELBO`` by default, or ``TraceEnum_ELBO`` for a guide whose
        model hides discrete sites by ``handlers.block``; with one given, ``num_particles`` is its
        own.
    :param annealing_steps: over so many first steps the model's log density is multiplied by a
        factor that rises linearly from 0.01 to 1, so that the guide meets separate modes before it
        settles in one (Rezende & Mohamed, 2015, arXiv:1505.05770, eq. 20); 0 for none.
    :param init_params: parameters to start from, as an earlier fit returned them; those it lacks
        start as without it.
    :param target_ess: importance ESS, in (0, 1), at which training may come to its end; read off
        the spread of the losses.
    :param num_draws: draws from which ELBO, k-hat and ESS are computed.
    :param progress_bar: whether to show one.
    :raises TypeError: for a guide that is no ``AutoGuide``, an objective that is no ELBO, or a key
        that is not one.
    :raises ValueError: if both an objective and a number of particles are given, for numbers that
        are not positive, if the model hides a discrete site that cannot be summed out, or if the
        loss was never finite.

    >>> import jax, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model():
    ...     numpyro.sample("x", dist.Normal(1.0, 2.0))
    >>> guide = nf.AutoFlow(model, nf.realnvp)
    >>> fitted = nf.fit_guide(jax.random.key(0), guide, num_steps=100, progress_bar=False)
    >>> fitted.trusted
    True
    """
    check_key(key)
    if not isinstance(guide, AutoGuide):
        raise TypeError(
            f"guide: expected an automatic guide such as `nf.AutoFlow(model)`, got "
            f"{type(guide).__name__}. A guide of your own trains with `numpyro.infer.SVI`."
        )
    if elbo is not None and num_particles is not None:
        raise ValueError(
            "num_particles: an objective was given, and has its own number of particles."
        )
    if not isinstance(elbo, ELBO | None):
        raise TypeError(
            f"elbo: expected an objective such as `Trace_ELBO(num_particles=16)`, got {elbo!r}."
        )
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate: expected a positive number, got {learning_rate}.")
    if num_particles is not None:
        check_size("num_particles", num_particles)
    num_steps = 8000 if num_steps is None else check_size("num_steps", num_steps)
    check_size("num_draws", num_draws)
    check_size("annealing_steps", annealing_steps, minimum=0)
    if not 0 < target_ess < 1:
        raise ValueError(f"target_ess: expected a number in (0, 1), got {target_ess}.")
    init_key, judge_key = jax.random.split(key)

    # The learning rate is a number of the optimiser's state, so that a plateau can change it.
    optimizer = optax.inject_hyperparams(
        lambda learning_rate: optax.chain(
            optax.clip_by_global_norm(10.0), optax.adam(learning_rate)
        )
    )(learning_rate=0.0)
    check_summable(hidden_sites(guide.model, args, kwargs))
    hidden = hidden_discrete(guide.model, args, kwargs)
    objective, model = STL_ELBO, unblocked(guide.model)
    if hidden:
        from numpyro.contrib.funsor import config_enumerate  # needs the package funsor

        objective, model = TraceEnum_ELBO, config_enumerate(model)
    svi = SVI(model, with_penalties(guide), optimizer, elbo or objective())
    state = svi.init(init_key, *args, init_params=init_params, **kwargs)
    if elbo is None:
        # Only now is the dimension known.
        dim = getattr(guide, "latent_dim", 1)
        svi.loss = objective(num_particles=num_particles or default_num_particles(dim))
    peak = 3e-3 if learning_rate is None else learning_rate

    arguments = split_arguments(args, kwargs)
    schedule = _Schedule(
        num_steps, getattr(svi.loss, "num_particles", 1), annealing_steps, target_ess
    )
    losses: list[np.ndarray] = []
    best_loss, best, best_step = np.inf, svi.get_params(state), 0
    run = _program(svi)
    with trange(num_steps, disable=not progress_bar) as bar:
        while True:
            rates = peak * schedule.rates(min(CHUNK, schedule.stop - schedule.step))
            controls = (rates, schedule.temper(len(rates)) if annealing_steps else None)
            state, made = run(
                state,
                jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float)), controls),
                *arguments,
            )
            chunk = np.asarray(made)
            losses.append(chunk)
            finite = chunk[np.isfinite(chunk)]
            annealed = schedule.step < annealing_steps  # its losses are those of another target
            is_best = not annealed and len(finite) > len(chunk) / 2 and finite.mean() < best_loss
            schedule.advance(chunk)
            if is_best:
                best_loss, best, best_step = finite.mean(), svi.get_params(state), schedule.step
            bar.total = schedule.stop
            bar.update(len(chunk))
            if len(finite):
                bar.set_postfix_str(f"loss {finite.mean():.4g}", refresh=False)
            if schedule.step < schedule.stop:
                continue

            all_losses = np.concatenate(losses)
            if not np.isfinite(all_losses).any():
                found = blame(judge_key, guide, svi.get_params(state), args, kwargs)
                raise ValueError(
                    "The loss was never finite, nor its gradient. "
                    f"{found or 'The model and the guide are finite at the start, site by site.'} "
                    "If the model is right, start elsewhere with `init_loc_fn`."
                )
            candidates = [best] if best_step == schedule.step else [svi.get_params(state), best]
            judged = [
                _judged(
                    params,
                    all_losses,
                    importance_log_weights(
                        judge_key, guide, params, *args, num_samples=num_draws, **kwargs
                    ),
                )
                for params in candidates
            ]
            fitted = max(judged, key=lambda fit: np.nan_to_num(fit.elbo, nan=-np.inf))
            if fitted.trusted or not schedule.resume():
                return fitted


def _judged(params: dict[str, Any], losses: np.ndarray, drawn: Array) -> GuideFit:
    """What log importance weights of fresh draws say of these parameters."""
    log_weights = np.asarray(drawn, float)
    return GuideFit(
        params=params,
        losses=losses,
        elbo=float(log_weights.mean()),
        elbo_error=float(log_weights.std() / len(log_weights) ** 0.5),
        khat=psis_khat(log_weights),
        ess=importance_ess(log_weights),
        num_skipped=int((~np.isfinite(losses)).sum()),
    )


class _Schedule:
    """Learning rates as fractions of the largest, and when to stop.

    The rate rises, holds, and falls as a cosine. The fall begins when half of the steps are left;
    or earlier, when the loss has ceased to fall, and then takes as long as all before it; or when
    the spread of the losses says that the importance weights are nearly equal, and then takes half
    as long. What ended early can be resumed once.

    :param num_steps: largest number of steps.
    :param num_particles: draws of which each loss is the mean.
    :param annealing_steps: first steps, whose losses say nothing.
    :param target_ess: importance ESS above which weights are nearly equal.
    """

    def __init__(
        self, num_steps: int, num_particles: int, annealing_steps: int = 0, target_ess: float = 0.99
    ):
        self.begin = self.step = 0
        self.stop = self.num_steps = num_steps
        self.warm_up = min(WARM_UP, max(1, num_steps // 10))
        self.annealing = annealing_steps
        self.fall = num_steps // 2
        self.num_particles = num_particles
        self.equal = (1 / target_ess - 1) ** 0.5
        self.losses = np.empty(0)

    def rates(self, num: int) -> np.ndarray:
        steps = np.arange(self.step, self.step + num)
        rise = np.minimum(1.0, (steps - self.begin + 1) / self.warm_up)
        share = np.clip((steps - self.fall) / max(1, self.stop - self.fall), 0.0, 1.0)
        return rise * 0.5 * (1 + np.cos(np.pi * share))

    def temper(self, num: int) -> np.ndarray:
        """Factors of the model's log density."""
        return np.clip((self.step + np.arange(num)) / max(1, self.annealing), 0.01, 1.0)

    def advance(self, losses: np.ndarray) -> None:
        self.step += len(losses)
        self.losses = np.append(self.losses, losses)
        started = max(self.warm_up, self.annealing)
        if self.begin or self.step >= self.fall or self.step < started + 2 * WINDOW:
            return
        # Longer windows later on: what falls slowly needs more steps to be seen beside its noise.
        window = max(WINDOW, self.step // 3)
        latest = np.split(self.losses[-2 * window :], 2)
        before, after = (part[np.isfinite(part)] for part in latest)
        if min(len(before), len(after)) < WINDOW / 2:
            return
        error = np.hypot(before.std() / len(before) ** 0.5, after.std() / len(after) ** 0.5)
        # A loss is the mean of log weights, whose variance v makes their ESS 1 / (1 + v).
        if after.std() * self.num_particles**0.5 < self.equal:
            # A last chunk of another length would be another program to compile.
            end = -(-self.step * 3 // (2 * CHUNK)) * CHUNK
            self.fall, self.stop = self.step, min(self.stop, end)
        elif before.mean() - after.mean() < max(error, SMALLEST_GAIN):
            self.fall, self.stop = self.step, min(self.stop, 2 * self.step)

    def resume(self) -> bool:
        """Allow as many steps again as were made, if some are left and this is the first time."""
        if self.begin or self.step >= self.num_steps:
            return False
        self.begin, self.stop = self.step, min(self.num_steps, 2 * self.step)
        self.fall = (self.begin + self.stop) // 2
        return True


def _program(svi: SVI) -> Any:
    """A program that makes one step for each learning rate."""

    @jit(static_argnums=3)
    def run(
        state: SVIState, controls: tuple[Array, Array | None], traced: Any, static: Static
    ) -> tuple[SVIState, Array]:
        args, kwargs = join_arguments(traced, static)

        def step(state: SVIState, control: tuple[Array, Array | None]) -> tuple[SVIState, Array]:
            rate, factor = control
            here = svi
            if factor is not None:
                here = copy.copy(svi)
                here.model = handlers.scale(svi.model, scale=factor)
            count, (params, opt_state) = state.optim_state
            hyperparams = opt_state.hyperparams | {"learning_rate": rate}
            opt_state = opt_state._replace(hyperparams=hyperparams)
            state = state._replace(optim_state=(count, (params, opt_state)))
            return here.stable_update(state, *args, **kwargs)

        return jax.lax.scan(step, state, controls)

    return run
