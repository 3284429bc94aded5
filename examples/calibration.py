"""Simulation-based calibration: a hundred posteriors of one model, fitted one after another.

Parameters are drawn from the prior and data from the model; if posteriors are right, the rank of
the truth among 99 posterior draws is uniform. All data sets have the same shape, so the first fit
compiles and the others cost their arithmetic alone. A bootstrap or a cross-validation is the same
loop.

    python examples/calibration.py --picture picture.png
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Predictive
from scipy import stats

import numpyro_flows as nf

NUM_FITS, NUM_DRAWS = 100, 99
NAMES = ("intercept", "slope", "noise")
X = jnp.linspace(-1.0, 1.0, 30)


def model(y=None):
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
    noise = numpyro.sample("noise", dist.LogNormal(-1.0, 0.7))
    with numpyro.plate("rows", len(X)):
        numpyro.sample("y", dist.StudentT(4.0, intercept + slope * X, noise), obs=y)


class Programs:
    """How many programs XLA compiled so far."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, *_, **__) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", help="file for a picture of the ranks")
    options = parser.parse_args()
    programs = Programs()

    simulated = Predictive(model, num_samples=NUM_FITS)(jax.random.key(0))
    simulated = {name: np.asarray(values) for name, values in simulated.items()}
    ranks, seconds, compiled = [], [], []
    trusted = 0
    for i in range(NUM_FITS):
        begun, before = time.perf_counter(), programs.count
        guide = nf.AutoFlow(model)
        fitted = nf.fit_guide(
            jax.random.key(i), guide, simulated["y"][i], num_particles=16, progress_bar=False
        )
        draws = fitted.sample(jax.random.key(NUM_FITS + i), (NUM_DRAWS,))
        ranks.append([(np.asarray(draws[n]) < simulated[n][i]).sum() for n in NAMES])
        seconds.append(time.perf_counter() - begun)
        compiled.append(programs.count - before)
        trusted += fitted.trusted

    late = seconds[1:]
    print(f"first fit: {seconds[0]:.1f} s, {compiled[0]} programs compiled")
    print(
        f"{NUM_FITS - 1} more: {sum(late):.0f} s, median {np.median(late):.2f} s, "
        f"{sum(compiled[1:])} programs compiled"
    )
    print(f"{trusted} of {NUM_FITS} are called reliable")
    for name, column in zip(NAMES, np.transpose(ranks), strict=True):
        # A number in (rank, rank + 1) is uniform where the rank is.
        noise = np.random.default_rng(0).uniform(size=NUM_FITS)
        p = stats.kstest((column + noise) / (NUM_DRAWS + 1), "uniform").pvalue
        print(f"{name:10} ranks are uniform: p = {p:.2f}")

    if options.picture:
        axes = nf.plot.ranks(np.array(ranks), NUM_DRAWS, num_bins=10, names=NAMES)
        axes[0].figure.savefig(options.picture, dpi=120)


if __name__ == "__main__":
    main()
