"""Guides on posteriors with known answers: ``nf.fit_guide`` with its defaults, beside peers.

    python benchmarks/posteriors.py                                  # ours, all posteriors
    python benchmarks/posteriors.py eight_schools --guides all --seeds 0 1 2

One line per posterior, guide and seed: the largest standardised error of a mean, the largest log
ratio of a standard deviation (both against gold-standard draws, from 40,000 draws of the guide),
how many of these are lost (the model has no value there, as where a Cholesky factor fails in
float32), ELBO, PSIS k-hat, importance ESS, gradient evaluations of the log density, and seconds
with compilation. No guide is tuned to a posterior. The peers run twice: for 5,000 steps of 16
particles, and, where ours ran before them, for as many steps and particles as ours took; Adam with
3e-3.
``many_schools``, in 5,000 dimensions, runs only when named: there some peers do not fit in memory.

``nuts`` as a guide validates a port: a long run of NUTS against the same draws.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial

import jax
import models
import numpy as np
import optax
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import (
    AutoBNAFNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
)
from unconstrained import unconstrained

import numpyro_flows as nf

PEERS = {
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": AutoIAFNormal,
    "AutoBNAFNormal": AutoBNAFNormal,
}
NUM_DRAWS = 40_000
#: Share of draws at which the model may have no value; beyond, the errors are infinite.
MOST_LOST = 1e-3
FUNNELS = {"funnel_10": (models.funnel, 10), "funnel_101": (models.wide_funnel, 101)}


def target(name: str) -> models.Posterior:
    if name == "german_credit":
        return models.german_credit()
    if name == "many_schools":
        return models.many_schools()
    if name in FUNNELS:
        model, dim = FUNNELS[name]

        def top(draws):
            return np.asarray(draws[next(iter(draws))], float)[:, None]

        sd = 3.0 if name == "funnel_10" else 1.0
        return models.Posterior(partial(model, dim), (), top, np.zeros(1), np.full(1, sd))
    return models.posterior(name)


def errors(posterior: models.Posterior, draws) -> dict[str, float]:
    flat = posterior.flat(draws)
    finite = np.isfinite(flat).all(axis=1)
    lost = int((~finite).sum())
    if lost > MOST_LOST * len(flat):
        return {"mean": np.inf, "log_sd": np.inf, "lost": lost}
    kept = flat[finite]
    return {
        "mean": float(np.abs((kept.mean(0) - posterior.mean) / posterior.sd).max()),
        "log_sd": float(np.abs(np.log(kept.std(0) / posterior.sd)).max()),
        "lost": lost,
    }


def weights(posterior, guide, params, seed: int) -> dict[str, float]:
    log_weights = np.asarray(
        nf.importance_log_weights(jax.random.key(seed), guide, params, *posterior.args), float
    )
    return {
        "elbo": float(log_weights.mean()),
        "khat": nf.diagnostics.psis_khat(log_weights),
        "ess": nf.diagnostics.importance_ess(log_weights),
    }


def ours(posterior: models.Posterior, seed: int) -> dict[str, float]:
    guide = nf.AutoFlow(posterior.model)
    start = time.perf_counter()
    fitted = nf.fit_guide(jax.random.key(seed), guide, *posterior.args, progress_bar=False)
    seconds = time.perf_counter() - start
    draws = guide.sample_posterior(
        jax.random.key(seed + 100), fitted.params, sample_shape=(NUM_DRAWS,)
    )
    particles = nf.infer.trainers.default_num_particles(guide.latent_dim)
    return errors(posterior, draws) | {
        "elbo": fitted.elbo,
        "khat": fitted.khat,
        "ess": fitted.ess,
        "steps": len(fitted.losses),
        "particles": particles,
        "seconds": seconds,
        "skipped": fitted.num_skipped,
    }


def numpyros(make, posterior, seed: int, steps: int, particles: int) -> dict[str, float]:
    guide = make(posterior.model)
    svi = SVI(posterior.model, guide, optax.adam(3e-3), Trace_ELBO(num_particles=particles))
    start = time.perf_counter()
    result = svi.run(jax.random.key(seed), steps, *posterior.args, progress_bar=False)
    jax.block_until_ready(result.losses)
    seconds = time.perf_counter() - start
    draws = guide.sample_posterior(
        jax.random.key(seed + 100), result.params, sample_shape=(NUM_DRAWS,)
    )
    try:
        judged = weights(posterior, guide, result.params, seed)
    except (ValueError, NotImplementedError):
        judged = {"elbo": np.nan, "khat": np.nan, "ess": np.nan}
    return (
        errors(posterior, draws)
        | judged
        | {"steps": steps, "particles": particles, "seconds": seconds}
    )


def flowjaxs(posterior, seed: int, steps: int, particles: int) -> dict[str, float]:
    """Its masked autoregressive flow in the sampling direction and its own ELBO, path gradient."""
    import flowjax.distributions
    import flowjax.flows
    from flowjax.train import fit_to_key_based_loss
    from flowjax.train.losses import ElboLoss

    target = unconstrained(posterior, seed)
    log_density = target.log_density
    key, train_key, draw_key = jax.random.split(jax.random.key(seed), 3)
    base = flowjax.distributions.StandardNormal((target.dim,))
    flow = flowjax.flows.masked_autoregressive_flow(key, base_dist=base, invert=False)
    start = time.perf_counter()
    flow, _ = fit_to_key_based_loss(
        train_key,
        flow,
        loss_fn=ElboLoss(log_density, num_samples=particles, stick_the_landing=True),
        learning_rate=3e-3,
        steps=steps,
        show_progress=False,
    )
    seconds = time.perf_counter() - start
    z, log_q = flow.sample_and_log_prob(draw_key, (NUM_DRAWS,))
    log_weights = np.asarray(jax.lax.map(log_density, z, batch_size=500) - log_q, float)[:10_000]
    sites = jax.vmap(target.sites)(z)
    return errors(posterior, sites) | {
        "elbo": float(log_weights.mean()),
        "khat": nf.diagnostics.psis_khat(log_weights),
        "ess": nf.diagnostics.importance_ess(log_weights),
        "steps": steps,
        "particles": particles,
        "seconds": seconds,
    }


def nuts(posterior, seed: int) -> dict[str, float]:
    mcmc = MCMC(
        NUTS(posterior.model),
        num_warmup=2000,
        num_samples=5000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    start = time.perf_counter()
    mcmc.run(jax.random.key(seed), *posterior.args)
    draws = jax.block_until_ready(mcmc.get_samples())
    return errors(posterior, draws) | {"seconds": time.perf_counter() - start}


def compute(
    guide: str, posterior: models.Posterior, seed: int, budgets: list[tuple[int, int]]
) -> Iterator[dict[str, float]]:
    """The rows of one guide: one for each budget of a peer."""
    if guide in ("ours", "nuts"):
        yield {"ours": ours, "nuts": nuts}[guide](posterior, seed)
        return
    run = flowjaxs if guide == "flowjax" else partial(numpyros, PEERS[guide])
    for steps, particles in budgets:
        yield run(posterior, seed, steps, particles)


def line(name: str, guide: str, seed: int, row: dict[str, float]) -> str:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    budget = f"{row['steps']} x {row['particles']}" if "steps" in row else ""
    cells = [
        name,
        guide,
        str(seed),
        number("mean", ".3f"),
        number("log_sd", ".3f"),
        number("lost", "d"),
        number("elbo", ".3f"),
        number("khat", ".2f"),
        number("ess", ".1%"),
        budget,
        number("seconds", ".1f"),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = (*models.POSTERIORDB, "eight_schools_centered", "german_credit", *FUNNELS)
    parser.add_argument("names", nargs="*", default=everything, metavar="posterior")
    parser.add_argument("--guides", nargs="*", default=["ours"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--json", help="file to which every row is appended")
    options = parser.parse_args()
    chosen = ["ours", *PEERS, "flowjax"] if options.guides == ["all"] else options.guides
    header = [
        "posterior",
        "guide",
        "seed",
        "mean",
        "log-sd",
        "lost",
        "ELBO",
        "k-hat",
        "ESS",
        "budget",
        "seconds",
    ]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    for name in options.names:
        posterior = target(name)
        for seed in options.seeds:
            budgets = [(5000, 16)]
            for guide in chosen:
                for row in compute(guide, posterior, seed, budgets):
                    print(line(name, guide, seed, row), flush=True)
                    if options.json:
                        with open(options.json, "a") as file:
                            record = {"posterior": name, "guide": guide, "seed": seed} | row
                            file.write(json.dumps(record) + "\n")
                    if guide == "ours":  # the peers that follow get as many gradients
                        budgets.append((row["steps"], row["particles"]))


if __name__ == "__main__":
    main()
