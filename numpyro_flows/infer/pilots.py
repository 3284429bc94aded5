"""Short NUTS chains in the base space of a map, and where they start."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer.hmc import hmc

from ..compilation import jit
from .fisher import Scored, through
from .maps import LearnedMap


class Pilots(NamedTuple):
    """Draws of pilot chains, ``(chains, draws, dim)``, and what they took."""

    draws: Scored
    num_gradients: Array
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
        return u[num_draws:], score[num_draws:], steps.sum(), diverging[num_draws:].sum()

    u, score, steps, diverging = jax.vmap(chain)(starts, jax.random.split(key, len(starts)))
    draws = through(learned.transform.inv, Scored(u, score))
    return Pilots(draws, steps.sum(), diverging.sum())


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
