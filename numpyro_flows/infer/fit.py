"""A guide fitted in one call, with defaults that need no tuning, and a verdict on the result."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVIState
from tqdm.auto import trange

from ..checks import check_key, check_size
from ..diagnostics import importance_ess, psis_khat
from .arguments import Static, join_arguments, split_arguments
from .elbo import STL_ELBO
from .importance import importance_log_weights

#: Share of the steps in which the learning rate rises, and share in which it falls.
WARM_UP, DECAY = 0.05, 0.5
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
        return self.khat < 0.7 or self.ess >= 0.95

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
    """Draws per step: 128 up to 32 dimensions, then fewer, at least 16."""
    return int(np.clip(4096 // dim, 16, 128))


def default_learning_rate(dim: int) -> float:
    """3e-3 up to 32 dimensions, then falling with the root of the dimension."""
    return 3e-3 * min(1.0, (32 / dim) ** 0.5)


def fit_guide(
    key: Array,
    guide: AutoGuide,
    *args: Any,
    num_steps: int | None = None,
    num_particles: int | None = None,
    learning_rate: float | None = None,
    elbo: ELBO | None = None,
    num_draws: int = 10_000,
    progress_bar: bool = True,
    **kwargs: Any,
) -> GuideFit:
    r"""Train a guide and say whether to trust it.

    ``SVI`` underneath, with Adam, gradients clipped by their global norm, a learning rate that
    rises over the first 5 % of the steps and falls over the last half as a cosine, and steps left
    out whose value or gradient is not finite. Training stops early once the loss has ceased to
    fall. What is returned is the better of the last parameters and the best seen before, judged by
    fresh draws. Arrays among the model's arguments are arguments of the compiled program, not
    baked into it.

    :param key: ``jax.random.key``.
    :param guide: an automatic guide, ``nf.AutoFlow`` or NumPyro's; it need not be set up.
    :param args: arguments of the model and the guide, as are the other keyword arguments.
    :param num_steps: largest number of steps, 4,000 by default.
    :param num_particles: draws per step; by default 128 up to 32 dimensions, then fewer.
    :param learning_rate: the largest; by default 3e-3 up to 32 dimensions, then less.
    :param elbo: the objective, ``nf.STL_ELBO`` by default; with one given, ``num_particles`` is
        its own.
    :param num_draws: draws from which ELBO, k-hat and ESS are computed.
    :param progress_bar: whether to show one.
    :raises TypeError: for a guide that is no ``AutoGuide``, or a key that is not one.
    :raises ValueError: if both an objective and a number of particles are given, or the loss was
        never finite.

    >>> import jax, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model():
    ...     numpyro.sample("x", dist.Normal(1.0, 2.0))
    >>> fitted = nf.fit_guide(
    ...     jax.random.key(0), nf.AutoFlow(model), num_steps=100, progress_bar=False
    ... )
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
    num_steps = 4000 if num_steps is None else check_size("num_steps", num_steps)
    check_size("num_draws", num_draws)
    init_key, judge_key = jax.random.split(key)

    # The learning rate is a number of the optimiser's state, so that a plateau can change it.
    optimizer = optax.inject_hyperparams(
        lambda learning_rate: optax.chain(
            optax.clip_by_global_norm(10.0), optax.adam(learning_rate)
        )
    )(learning_rate=0.0)
    svi = SVI(guide.model, guide, optimizer, elbo or STL_ELBO())
    state = svi.init(init_key, *args, **kwargs)
    dim = getattr(guide, "latent_dim", 1)
    if elbo is None:
        svi.loss = STL_ELBO(num_particles=num_particles or default_num_particles(dim))
    peak = default_learning_rate(dim) if learning_rate is None else learning_rate

    arguments = split_arguments(args, kwargs)
    schedule = _Schedule(num_steps)
    losses: list[np.ndarray] = []
    best_loss, best = np.inf, svi.get_params(state)
    with trange(num_steps, disable=not progress_bar) as bar:
        while schedule.step < schedule.stop:
            rates = peak * schedule.rates(min(CHUNK, schedule.stop - schedule.step))
            state, made = _compiled(svi)(
                state, jnp.asarray(rates, jnp.result_type(float)), *arguments
            )
            chunk = np.asarray(made)
            losses.append(chunk)
            finite = chunk[np.isfinite(chunk)]
            if len(finite) > len(chunk) / 2 and finite.mean() < best_loss:
                best_loss, best = finite.mean(), svi.get_params(state)
            schedule.advance(chunk)
            bar.total = schedule.stop
            bar.update(len(chunk))
            if len(finite):
                bar.set_postfix_str(f"loss {finite.mean():.4g}", refresh=False)
    all_losses = np.concatenate(losses)
    if not np.isfinite(all_losses).any():
        raise ValueError(
            "The loss was never finite: the model's log density is NaN or infinite at the guide's "
            "draws. Look for the site with `numpyro.validation_enabled()`, or start elsewhere "
            "with `init_loc_fn`."
        )

    candidates = [svi.get_params(state), best]
    weights = [
        np.asarray(
            importance_log_weights(
                judge_key, guide, params, *args, num_samples=num_draws, **kwargs
            ),
            float,
        )
        for params in candidates
    ]
    chosen = int(np.argmax([np.nan_to_num(w.mean(), nan=-np.inf) for w in weights]))
    log_weights = weights[chosen]
    return GuideFit(
        params=candidates[chosen],
        losses=all_losses,
        elbo=float(log_weights.mean()),
        elbo_error=float(log_weights.std() / num_draws**0.5),
        khat=psis_khat(log_weights),
        ess=importance_ess(log_weights),
        num_skipped=int((~np.isfinite(all_losses)).sum()),
    )


class _Schedule:
    """Learning rates as fractions of the largest, and when to stop.

    The rate rises, holds, and falls. The fall begins when half of the steps are left, or before
    that when the loss has ceased to fall; it then takes as many steps as were made before it.
    """

    def __init__(self, num_steps: int):
        self.step = 0
        self.stop = num_steps
        self.warm_up = max(1, round(WARM_UP * num_steps))
        self.fall = num_steps - round(DECAY * num_steps)
        self.losses: list[float] = []

    def rates(self, num: int) -> np.ndarray:
        steps = np.arange(self.step, self.step + num)
        rise = np.minimum(1.0, (steps + 1) / self.warm_up)
        share = np.clip((steps - self.fall) / max(1, self.stop - self.fall), 0.0, 1.0)
        return rise * 0.5 * (1 + np.cos(np.pi * share))

    def advance(self, losses: np.ndarray) -> None:
        self.step += len(losses)
        self.losses += losses.tolist()
        window = max(2 * CHUNK, self.warm_up)
        if self.step < self.fall and len(self.losses) >= 3 * window + self.warm_up:
            before, after = (
                np.array(part)[np.isfinite(part)]
                for part in (self.losses[-2 * window : -window], self.losses[-window:])
            )
            if len(before) < window / 2 or len(after) < window / 2:
                return
            error = np.hypot(before.std() / len(before) ** 0.5, after.std() / len(after) ** 0.5)
            if before.mean() - after.mean() < max(2 * error, 1e-3):
                self.fall = self.step
                self.stop = min(self.stop, 2 * self.step)


@functools.lru_cache(maxsize=8)
def _compiled(svi: SVI) -> Any:
    """A program that makes one step for each learning rate."""

    @functools.partial(jax.jit, static_argnums=3)
    def run(state: SVIState, rates: Array, traced: Any, static: Static) -> tuple[SVIState, Array]:
        args, kwargs = join_arguments(traced, static)

        def step(state: SVIState, rate: Array) -> tuple[SVIState, Array]:
            count, (params, opt_state) = state.optim_state
            hyperparams = opt_state.hyperparams | {"learning_rate": rate}
            opt_state = opt_state._replace(hyperparams=hyperparams)
            state = state._replace(optim_state=(count, (params, opt_state)))
            return svi.stable_update(state, *args, **kwargs)

        return jax.lax.scan(step, state, rates)

    return run
