"""A sampler of another library on a learned map: BlackJAX's adjusted MCLMC, centred eight schools.

Microcanonical Langevin Monte Carlo moves with constant speed, and a Metropolis step makes it exact
(Robnik, De Luca, Silverstein & Seljak, 2023, arXiv:2212.08549). It has one step size, like any such
sampler, so the centred eight schools are a funnel to it. `nf.learn_map` finds coordinates in which
they are close to a standard normal; a kernel over `learned.log_density` and `learned.to_sites` is
all that joins the two.

    pip install 'numpyro_flows[samplers]'
    python examples/mclmc.py

Prints means and standard deviations beside those of posteriordb's reference draws, where these are
found in the folder that NUMPYRO_FLOWS_DATA names or in ../shared/data.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from blackjax.mcmc import adjusted_mclmc_dynamic as mclmc
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel
from sampling import bulk_ess, print_table

import numpyro_flows as nf

Y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


class State(NamedTuple):
    """A chain in the base space, and how it moves."""

    u: jax.Array
    chain: mclmc.DynamicHMCState
    tuned: NamedTuple
    rng_key: jax.Array
    acceptance: jax.Array


class AdjustedMCLMC(MCMCKernel):
    """BlackJAX's adjusted MCLMC in the base space of a learned map; vectorised chains."""

    sample_field = "u"
    _move = staticmethod(mclmc.build_kernel(mclmc.make_random_trajectory_length_fn(True)))

    def __init__(self, model, target_acceptance=0.9):
        self.model, self.target = model, target_acceptance

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        """Learn the map; then start each chain at a draw of the base and tune its steps."""
        learned = nf.learn_map(
            jax.random.key(0), self.model, *model_args, progress_bar=False, **model_kwargs
        )
        self.learned = learned

        def start(key):
            start_key, length_key, tune_key, key = jax.random.split(key, 4)
            chain = mclmc.init(learned.sample_start(start_key), learned.log_density, length_key)
            chain, tuned, _ = blackjax.adjusted_mclmc_find_L_and_step_size(
                self._move,
                learned.log_density,
                num_warmup,
                chain,
                tune_key,
                self.target,
                frac_tune1=0.5,
                frac_tune2=0.5,
                diagonal_preconditioning=False,
            )
            return State(chain.position, chain, tuned, key, jnp.ones(()))

        return jax.jit(jax.vmap(start))(rng_key)

    def sample(self, state, model_args, model_kwargs):
        """One trajectory of each chain, accepted or not."""

        def step(state):
            move_key, key = jax.random.split(state.rng_key)
            chain, info = self._move(
                move_key,
                state.chain,
                self.learned.log_density,
                state.tuned.step_size,
                integration_steps_params=(state.tuned.L / state.tuned.step_size,),
            )
            return State(chain.position, chain, state.tuned, key, info.acceptance_rate)

        return jax.vmap(step)(state)

    def postprocess_fn(self, model_args, model_kwargs):
        """From the base space to the model's sites."""
        return self.learned.to_sites


def reference():
    """posteriordb's draws of mu, tau and theta, ``(draws, 10)``; None where they are not found."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("NUMPYRO_FLOWS_DATA") or beside) / "posteriordb"
    path = folder / "eight_schools.draws.json.zip"
    if not path.is_file():
        return None
    with zipfile.ZipFile(path) as file:
        chains = json.loads(file.read(file.namelist()[0]))
    names = ["mu", "tau", *(f"theta[{i + 1}]" for i in range(8))]
    return np.concatenate([np.stack([chain[name] for name in names], -1) for chain in chains])


def main():
    mcmc = MCMC(
        AdjustedMCLMC(model),
        num_warmup=500,
        num_samples=2000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(1), SIGMA, Y, extra_fields=["acceptance"])
    sites = mcmc.get_samples(group_by_chain=True)
    draws = np.concatenate([sites["mu"][..., None], sites["tau"][..., None], sites["theta"]], -1)
    ess = bulk_ess({"all": draws})["all"]
    draws, known = draws.reshape(-1, 10), reference()

    def moments(draws, i):
        return "" if draws is None else f"{draws[:, i].mean():.2f} +- {draws[:, i].std():.2f}"

    names = ["mu", "tau", *(f"theta[{j}]" for j in range(8))]
    rows = [
        [name, moments(draws, i), moments(known, i), f"{ess[i]:.0f}"]
        for i, name in enumerate(names)
    ]
    print_table(["", "adjusted MCLMC", "reference", "bulk ESS"], rows)
    print(f"mean acceptance {mcmc.get_extra_fields()['acceptance'].mean():.2f}")
    if known is None:
        print("No reference draws found: set NUMPYRO_FLOWS_DATA for the comparison with them.")
    else:
        off = np.abs(draws.mean(0) - known.mean(0)) / known.std(0)
        ratio = draws.std(0) / known.std(0)
        print(
            f"largest difference of a mean {off.max():.3f} sd, ratios of sds {ratio.min():.3f} to "
            f"{ratio.max():.3f}"
        )


if __name__ == "__main__":
    main()
