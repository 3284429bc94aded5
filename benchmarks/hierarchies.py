"""Hierarchies in which data say much of some groups and little of others.

    python benchmarks/hierarchies.py [names] [--seeds 0 1 2] [--samplers]

For each model the guide with the default flow in the latent space itself (``plain``), and with
degrees of centring (``informed``): ELBO, importance ESS, k-hat, steps, and the error of the means
and log standard deviations of the unconstrained top-level sites against a long NUTS run of the
non-centred form. With ``--samplers`` also ``FlowNUTS``, NUTS in both forms, and NUTS with
NumPyro's ``LocScaleReparam(centered=None)`` in degrees that SVI learned: bulk ESS of the worst
top-level site per 1,000 gradients, R-hat and divergences.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer import NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDiagonalNormal
from numpyro.infer.reparam import LocScaleReparam

import numpyro_flows as nf
from numpyro_flows.infer.guide_flow import guide_flow

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from sampling import print_table, run


class Hierarchy(NamedTuple):
    """A model in the centred form, its arguments, and the sites that are centred in it."""

    model: Callable
    args: tuple
    centred: tuple[str, ...]


def schools(sigma, y):
    """Eight schools with standard errors from 0.1 to 30."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(5.0))
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def radon(county, floor, y):
    """Measurements in houses of counties, 3 to 300 each."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("county", 20):
        level = numpyro.sample("level", dist.Normal(mu, tau))
    numpyro.sample("y", dist.Normal(level[county] + slope * floor, sigma), obs=y)


def crossed(row, column, y):
    """Two crossed effects, of which one is seen often and the other hardly."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    scales = {
        name: numpyro.sample(name, dist.HalfNormal(2.0)) for name in ("tau_row", "tau_column")
    }
    with numpyro.plate("rows", 5):
        of_row = numpyro.sample("row", dist.Normal(0.0, scales["tau_row"]))
    with numpyro.plate("columns", 30):
        of_column = numpyro.sample("column", dist.Normal(0.0, scales["tau_column"]))
    numpyro.sample("y", dist.Normal(mu + of_row[row] + of_column[column], 1.0), obs=y)


def horseshoe(x, y):
    """A regression of which most coefficients are zero."""
    tau = numpyro.sample("tau", dist.HalfCauchy(0.3))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("columns", x.shape[1]):
        scale = numpyro.sample("scale", dist.HalfCauchy(1.0))
        beta = numpyro.sample("beta", dist.Normal(0.0, tau * scale))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def volatility(y):
    """Log volatilities that follow a random walk."""
    step = numpyro.sample("step", dist.HalfNormal(0.5))
    start = numpyro.sample("start", dist.Normal(-1.0, 1.0))
    walk = numpyro.sample("walk", dist.GaussianRandomWalk(step, len(y)))
    numpyro.sample("y", dist.Normal(0.0, jnp.exp((start + walk) / 2)), obs=y)


def responses(person, item, y):
    """Item responses with two parameters an item."""
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    with numpyro.plate("persons", 40):
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
    with numpyro.plate("items", 15):
        difficulty = numpyro.sample("difficulty", dist.Normal(0.0, 2 * spread))
        slope = numpyro.sample("slope", dist.LogNormal(0.0, spread))
    logits = slope[item] * (ability[person] - difficulty[item])
    numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def all_hierarchies() -> dict[str, Hierarchy]:
    rng = np.random.default_rng(0)
    sigma = np.geomspace(0.1, 30.0, 8)
    y = 4 + 3 * rng.normal(size=8) + sigma * rng.normal(size=8)
    found = {"schools": Hierarchy(schools, (sigma, y), ("theta",))}
    county = np.repeat(np.arange(20), np.geomspace(3, 300, 20).astype(int))
    floor = rng.integers(0, 2, len(county)).astype(float)
    level = 1.5 + 0.4 * rng.normal(size=20)
    y = level[county] - 0.6 * floor + 0.8 * rng.normal(size=len(county))
    found["radon"] = Hierarchy(radon, (county, floor, y), ("level",))
    row, column = rng.integers(0, 5, 90), np.sort(rng.integers(0, 30, 90) ** 2 // 30)
    y = 1 + 2 * rng.normal(size=5)[row] + 0.3 * rng.normal(size=30)[column] + rng.normal(size=90)
    found["crossed"] = Hierarchy(crossed, (row, column, y), ("row", "column"))
    x = rng.normal(size=(100, 30))
    y = x[:, :4] @ np.array([2.0, -1.5, 1.0, 0.5]) + rng.normal(size=100)
    found["horseshoe"] = Hierarchy(horseshoe, (x, y), ("beta",))
    y = np.exp((-1 + np.cumsum(0.2 * rng.normal(size=100))) / 2) * rng.normal(size=100)
    found["volatility"] = Hierarchy(volatility, (y,), ("walk",))
    person, item = (a.ravel() for a in np.meshgrid(np.arange(40), np.arange(15), indexing="ij"))
    ability, difficulty = rng.normal(size=40), rng.normal(size=15)
    slope = np.exp(0.5 * rng.normal(size=15))
    logits = slope[item] * (ability[person] - difficulty[item])
    y = (rng.random(600) < 1 / (1 + np.exp(-logits))).astype(float)
    found["responses"] = Hierarchy(responses, (person, item, y), ("difficulty", "slope"))
    # Indices stay integers; everything else is in the precision of the moment.
    return {name: h._replace(args=tuple(map(jnp.asarray, h.args))) for name, h in found.items()}


class _NonCentred(handlers.reparam):
    """Each centred site as location + scale * (a site of its own, which knows neither)."""

    def __init__(self, hierarchy: Hierarchy):
        super().__init__(hierarchy.model, config=self.of)
        self.names = hierarchy.centred

    def of(self, site):
        return LocScaleReparam(centered=0.0) if site["name"] in self.names else None


def non_centred(hierarchy: Hierarchy) -> Callable:
    """The model in the non-centred form; a walk and a lognormal are written out."""
    if "walk" in hierarchy.centred:

        def walk(y):
            step = numpyro.sample("step", dist.HalfNormal(0.5))
            start = numpyro.sample("start", dist.Normal(-1.0, 1.0))
            steps = numpyro.sample("steps", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
            x = numpyro.deterministic("walk", step * jnp.cumsum(steps))
            numpyro.sample("y", dist.Normal(0.0, jnp.exp((start + x) / 2)), obs=y)

        return walk
    if "slope" in hierarchy.centred:

        def written_out(person, item, y):
            spread = numpyro.sample("spread", dist.HalfNormal(1.0))
            with numpyro.plate("persons", 40):
                ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
            with numpyro.plate("items", 15):
                one, two = (numpyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("one", "two"))
                difficulty = numpyro.deterministic("difficulty", 2 * spread * one)
                slope = numpyro.deterministic("slope", jnp.exp(spread * two))
            logits = slope[item] * (ability[person] - difficulty[item])
            numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

        return written_out
    return _NonCentred(hierarchy)


def learned_centring(hierarchy: Hierarchy) -> Callable | None:
    """The model with ``LocScaleReparam(centered=None)``, in degrees that SVI learned."""
    if {"walk", "slope"} & set(hierarchy.centred):
        return None
    config = {name: LocScaleReparam(centered=None) for name in hierarchy.centred}
    model = handlers.reparam(hierarchy.model, config=config)
    svi = SVI(model, AutoDiagonalNormal(model), numpyro.optim.Adam(0.01), Trace_ELBO(8))
    found = svi.run(jax.random.key(0), 5000, *hierarchy.args, progress_bar=False)
    return handlers.substitute(model, data=found.params)


def scalar_names(hierarchy: Hierarchy) -> list[str]:
    seeded = handlers.trace(handlers.seed(hierarchy.model, 0)).get_trace(*hierarchy.args)
    return [
        name
        for name, site in seeded.items()
        if site["type"] == "sample" and not site["is_observed"] and np.ndim(site["value"]) == 0
    ]


def on_the_line(draws: dict[str, Any], names: list[str]) -> dict[str, np.ndarray]:
    """Draws of scalar sites, those that are positive by their logarithms."""
    found = {name: np.asarray(draws[name], float) for name in names}
    return {name: np.log(x) if (x > 0).all() else x for name, x in found.items()}


def errors(draws: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> tuple[float, float]:
    """Largest error of a mean in standard deviations, and of a log standard deviation."""
    return (
        max(abs(draws[n].mean() - truth[n].mean()) / truth[n].std() for n in truth),
        max(abs(np.log(draws[n].std() / truth[n].std())) for n in truth),
    )


def guide_rows(name: str, hierarchy: Hierarchy, truth: dict, seed: int) -> list[list[str]]:
    rows = []
    flows = {"plain": partial(lambda key, dim: guide_flow(key, dim)), "informed": guide_flow}
    for label, flow in flows.items():
        guide = nf.AutoFlow(hierarchy.model, flow)
        fitted = nf.fit_guide(jax.random.key(seed), guide, *hierarchy.args, progress_bar=False)
        draws = fitted.sample(jax.random.key(seed + 100), (40_000,))
        mean, log_sd = errors(on_the_line(draws, list(truth)), truth)
        figures = f"{fitted.elbo:.3f}", f"{fitted.ess:.0%}", f"{fitted.khat:.2f}"
        said = fitted.verdict.partition(":")[0].partition(",")[0]
        steps = f"{len(fitted.losses)}"
        rows.append([name, label, str(seed), *figures, steps, f"{mean:.3f}", f"{log_sd:.3f}", said])
        print("  ".join(rows[-1]), flush=True)
    return rows


def sampler_rows(name: str, hierarchy: Hierarchy, names: list[str]) -> list[list[str]]:
    kernels = {
        "FlowNUTS": nf.FlowNUTS(hierarchy.model, progress_bar=False),
        "NUTS, centred": NUTS(hierarchy.model),
        "NUTS, non-centred": NUTS(non_centred(hierarchy)),
    }
    if (model := learned_centring(hierarchy)) is not None:
        kernels["NUTS, LocScaleReparam(None)"] = NUTS(model)
    rows = []
    for label, kernel in kernels.items():
        result = run(kernel, *hierarchy.args)
        draws = on_the_line(result.draws, names)
        ess = min(float(arviz.ess(x, method="bulk")) for x in draws.values())
        r_hat = max(float(arviz.rhat(x)) for x in draws.values())
        per = 1000 * ess / result.gradients
        rows.append(
            [name, label, f"{ess:.0f}", f"{per:.1f}", f"{r_hat:.3f}", str(result.divergences)]
        )
        print("  ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    hierarchies = all_hierarchies()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(hierarchies)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samplers", action="store_true", help="also the samplers")
    options = parser.parse_args()
    of_guides, of_samplers = [], []
    for name in options.names or hierarchies:
        if name not in hierarchies:
            parser.error(f"no hierarchy {name!r}; there are {', '.join(hierarchies)}.")
        hierarchy = hierarchies[name]
        names = scalar_names(hierarchy)
        long = run(
            NUTS(non_centred(hierarchy), target_accept_prob=0.95), *hierarchy.args, num_samples=5000
        )
        truth = on_the_line(long.draws, names)
        for seed in options.seeds:
            of_guides += guide_rows(name, hierarchy, truth, seed)
        if options.samplers:
            of_samplers += sampler_rows(name, hierarchy, names)
    print()
    header = [
        "model",
        "guide",
        "seed",
        "ELBO",
        "ESS",
        "k-hat",
        "steps",
        "mean",
        "log sd",
        "verdict",
    ]
    print_table(header, of_guides)
    if of_samplers:
        print()
        print_table(["model", "sampler", "ESS", "/ 1000 grad", "R-hat", "divergences"], of_samplers)


if __name__ == "__main__":
    main()
