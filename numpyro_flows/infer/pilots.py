"""Short NUTS chains in the base space of a map, and where they start."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer.hmc import hmc

from ..compilation import jit
from .fisher import Scored, through
from .maps import LearnedMap


class Pilots(NamedTuple):
    """Draws of pilot chains, ``(chains, draws, dim)``, and what they took.

    :ivar draws: draws and scores in the latent space.
    :ivar num_gradients: gradients that the chains took, warm-up included.
    :ivar num_steps: gradients that the kept draws took.
    :ivar num_divergences: divergent trajectories among the kept draws.
    """

    draws: Scored
    num_gradients: Array
    num_steps: Array
    num_divergences: Array


@jit(static_argnums=2, once=True)
def base_starts(learned: LearnedMap, key: Array, num: int) -> Array:
    """Draws of a map's base at which the density is finite, ``(num, dim)``."""
    return jax.vmap(learned.sample_start)(jax.random.split(key, num))


@jit(static_argnums=3, once=True)
def run_pilots(learned: LearnedMap, starts: Array, key: Array, num_draws: int) -> Pilots:
    """NUTS in a map's base space; draws and scores in the latent space."""
    init, sample = hmc(lambda u: -learned.log_density(u), algo="NUTS")

    def chain(start: Array, key: Array) -> Any:
        state = init(start, num_warmup=num_draws, max_tree_depth=8, rng_key=key)

        def step(state: Any, _: None) -> Any:
            state = sample(state)
            return state, (state.z, -state.z_grad, state.num_steps, state.diverging)

        _, (u, score, steps, diverging) = jax.lax.scan(step, state, length=2 * num_draws)
        kept = (values[num_draws:] for values in (u, score, steps, diverging))
        return steps.sum(), *kept

    spent, u, score, steps, diverging = jax.vmap(chain)(starts, jax.random.split(key, len(starts)))
    draws = through(learned.transform.inv, Scored(u, score))
    return Pilots(draws, spent.sum(), steps.sum(), diverging.sum())


@dataclasses.dataclass(frozen=True)
class Pace:
    """How NUTS moves in the coordinates of a map, by its pilot chains.

    :ivar per_effective: gradients per effective draw of the slowest coordinate.
    :ivar r_hat: split R-hat of the worst coordinate.
    :ivar divergences: the share of draws whose trajectory diverged.
    """

    per_effective: float
    r_hat: float
    divergences: float

    def __str__(self) -> str:
        return (
            f"{self.per_effective:.0f} gradients per effective draw, R-hat {self.r_hat:.2f}, "
            f"{self.divergences:.1%} divergent"
        )


def pace_of(pilots: Pilots) -> Pace:
    """The pace of pilot chains."""
    x = np.asarray(pilots.draws.x, float)
    with np.errstate(all="ignore"):  # of a coordinate that never moved: no draw is effective
        effective = np.nan_to_num(effective_sample_size(x)).min()
        r_hat = np.nan_to_num(split_gelman_rubin(x), nan=np.inf).max()
    num = x.shape[0] * x.shape[1]
    steps = float(pilots.num_steps)
    return Pace(
        steps / effective if effective > 0 else np.inf,
        float(r_hat),
        float(pilots.num_divergences) / num,
    )


def divide(draws: Scored) -> tuple[Scored, Scored]:
    """Draws for training and, from other chains, for judging; those that are finite."""
    num_held = max(1, len(draws.x) // 4)

    def flat(part: Scored) -> Scored:
        x, score = (np.asarray(a).reshape(-1, a.shape[-1]) for a in part)
        good = np.isfinite(x).all(-1) & np.isfinite(score).all(-1)
        return Scored(jnp.asarray(x[good]), jnp.asarray(score[good]))

    return (
        flat(Scored(draws.x[num_held:], draws.score[num_held:])),
        flat(Scored(draws.x[:num_held], draws.score[:num_held])),
    )
