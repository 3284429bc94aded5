"""Posteriors in hundreds of dimensions: the default guide beside NumPyro's normal ones.

    python benchmarks/dimensions.py [names] [--steps 500] [--peer-steps 5000]

ELBO from 2,000 fresh draws, importance ESS, steps and seconds, compilation included, of
``nf.AutoFlow`` after few steps (0 where its preconditioner leaves nothing to gain), of
``AutoMultivariateNormal`` and of ``AutoLowRankMultivariateNormal``.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO, autoguide

import numpyro_flows as nf

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from sampling import print_table


def rotated(precision):
    """A normal whose scales, from 0.02 to 50, lie along no axis."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([len(precision)]).to_event(1).mask(False))
    numpyro.factor("density", -0.5 * x @ precision @ x)


def chained(size):
    """An autoregression of order one without data: neighbours correlate by 0.95."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([size]).to_event(1).mask(False))
    numpyro.factor("start", dist.Normal(0.0, 1.0).log_prob(x[0]))
    steps = dist.Normal(0.95 * x[:-1], (1 - 0.95**2) ** 0.5).log_prob(x[1:])
    numpyro.factor("steps", steps.sum())


def logistic(x, y):
    """A logistic regression with half as many columns, all correlated, as rows."""
    beta = numpyro.sample("beta", dist.Normal(0.0, 0.5).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def responses(y):
    """Item responses with two parameters an item."""
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    people, items = y.shape
    with numpyro.plate("persons", people):
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
    with numpyro.plate("items", items):
        difficulty = numpyro.sample("difficulty", dist.Normal(0.0, 2 * spread))
        slope = numpyro.sample("slope", dist.LogNormal(0.0, spread))
    numpyro.sample("y", dist.Bernoulli(logits=slope * (ability[:, None] - difficulty)), obs=y)


def volatility(y):
    """Log volatilities that follow a random walk."""
    step = numpyro.sample("step", dist.HalfNormal(0.5))
    start = numpyro.sample("start", dist.Normal(-1.0, 1.0))
    walk = numpyro.sample("walk", dist.GaussianRandomWalk(step, len(y)))
    numpyro.sample("y", dist.Normal(0.0, jnp.exp((start + walk) / 2)), obs=y)


def all_posteriors() -> dict[str, tuple[Callable, tuple]]:
    rng = np.random.default_rng(0)
    frame = np.linalg.qr(rng.normal(size=(200, 200)))[0]
    precision = (frame / np.geomspace(0.02, 50.0, 200) ** 2) @ frame.T
    found = {"rotated normal, 200": (rotated, (jnp.asarray(precision),))}
    found["autoregression, 500"] = (chained, (500,))
    common = rng.normal(size=(600, 5)) @ rng.normal(size=(5, 300))
    x = (common + 0.5 * rng.normal(size=(600, 300))) / 2
    y = rng.random(600) < 1 / (1 + np.exp(-x @ (0.2 * rng.normal(size=300))))
    found["logistic regression, 300"] = (logistic, (jnp.asarray(x), jnp.asarray(y, float)))
    ability, difficulty = rng.normal(size=400), rng.normal(size=50)
    logits = np.exp(0.5 * rng.normal(size=50)) * (ability[:, None] - difficulty)
    y = rng.random((400, 50)) < 1 / (1 + np.exp(-logits))
    found["item responses, 501"] = (responses, (jnp.asarray(y, float),))
    walk = -1 + np.cumsum(0.1 * rng.normal(size=1000))
    found["volatility, 1,002"] = (
        volatility,
        (jnp.asarray(np.exp(walk / 2) * rng.normal(size=1000)),),
    )
    return found


def of_ours(model: Callable, args: tuple, num_steps: int) -> tuple[float, str, int, float]:
    began = time.perf_counter()
    fitted = nf.fit_guide(
        jax.random.key(0), nf.AutoFlow(model), *args, num_steps=num_steps, progress_bar=False
    )
    seconds = time.perf_counter() - began
    return fitted.elbo, f"{fitted.ess:.1%}", len(fitted.losses), seconds


def of_peer(guide, model: Callable, args: tuple, num_steps: int) -> tuple[float, str, int, float]:
    began = time.perf_counter()
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=8))
    found = svi.run(jax.random.key(0), num_steps, *args, progress_bar=False)
    jax.block_until_ready(found.params)
    seconds = time.perf_counter() - began
    weights = nf.importance_log_weights(
        jax.random.key(1), guide, found.params, *args, num_samples=2000
    )
    ess = float(nf.diagnostics.importance_ess(weights))
    return float(weights.mean()), f"{ess:.1%}", num_steps, seconds


def main() -> None:
    posteriors = all_posteriors()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of names; all by default")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--peer-steps", type=int, default=5000)
    options = parser.parse_args()
    peers = (autoguide.AutoMultivariateNormal, autoguide.AutoLowRankMultivariateNormal)
    rows = []
    for name, (model, args) in posteriors.items():
        if options.names and not name.startswith(tuple(options.names)):
            continue
        results = {"AutoFlow": of_ours(model, args, options.steps)}
        for peer in peers:
            results[peer.__name__] = of_peer(peer(model), model, args, options.peer_steps)
        for label, (elbo, ess, steps, seconds) in results.items():
            rows.append([name, label, f"{elbo:.1f}", ess, f"{steps:,}", f"{seconds:.0f}"])
            print("  ".join(rows[-1]), flush=True)
    print()
    print_table(["posterior", "guide", "ELBO", "ESS", "steps", "seconds"], rows)


if __name__ == "__main__":
    main()
