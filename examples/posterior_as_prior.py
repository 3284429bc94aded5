"""An old posterior as the prior of the next study.

A first laboratory measured an enzyme's speed at low concentrations only, which tells little about
Vmax and Km apart: their posterior is a long curved ridge that no normal prior can carry over. A
flow learns it from the draws, goes into a file, and is the prior when a second laboratory measures
at high concentrations, without the first one's data. The result is compared with the posterior
from both data sets at once, which is what it has to be.

    python examples/posterior_as_prior.py --picture picture.png
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

import numpyro_flows as nf

NAMES = ("Vmax", "Km", "sigma")


def measure(key, low: float, high: float, num_points: int):
    """Simulated speeds at concentrations between ``low`` and ``high``: Vmax 2, Km 3, sigma 0.05."""
    concentration = jnp.linspace(low, high, num_points)
    speed = 2 * concentration / (3 + concentration)
    return concentration, speed + 0.05 * jax.random.normal(key, (num_points,))


def likelihood(vmax, km, sigma, concentration, speed):
    mean = vmax * concentration / (km + concentration)
    with numpyro.plate("measurements", len(speed)):
        numpyro.sample("speed", dist.Normal(mean, sigma), obs=speed)


def first_study(concentration, speed):
    vmax = numpyro.sample("Vmax", dist.LogNormal(0.5, 1.0))
    km = numpyro.sample("Km", dist.LogNormal(1.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.2))
    likelihood(vmax, km, sigma, concentration, speed)


def next_study(prior, concentration, speed):
    vmax, km, sigma = numpyro.sample("theta", prior)
    likelihood(vmax, km, sigma, concentration, speed)


def draws(key, model, *args):
    mcmc = MCMC(
        NUTS(model, target_accept_prob=0.95),
        num_warmup=1000,
        num_samples=5000,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key, *args)
    samples = mcmc.get_samples()
    if "theta" in samples:
        return np.asarray(samples["theta"])
    return np.stack([samples[name] for name in NAMES], axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", help="file for a picture of the posteriors")
    options = parser.parse_args()
    data_key, first_key, fit_key, next_key, both_key = jax.random.split(jax.random.key(1), 5)

    low = measure(data_key, 0.1, 2.0, 15)
    high = measure(jax.random.fold_in(data_key, 1), 2.0, 20.0, 10)
    old = draws(first_key, first_study, *low)

    flow = nf.realnvp(fit_key, 3, activation="gelu", support=constraints.positive)
    fitted = nf.fit(fit_key, flow, jnp.asarray(old), progress_bar=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "first_study.flow"
        nf.save(path, fitted.flow)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")
        prior = nf.load(path)

    new = draws(next_key, next_study, prior, *high)
    pooled = tuple(jnp.concatenate(pair) for pair in zip(low, high, strict=True))
    both = draws(both_key, first_study, *pooled)

    print(f"{'':8}{'first study':>18}{'flow, then second':>20}{'both at once':>18}")
    for i, name in enumerate(NAMES):
        cells = [f"{x[:, i].mean():.3f} +- {x[:, i].std():.3f}" for x in (old, new, both)]
        print(f"{name:8}{cells[0]:>18}{cells[1]:>20}{cells[2]:>18}")
    off = np.abs(new.mean(0) - both.mean(0)) / both.std(0)
    ratio = new.std(0) / both.std(0)
    print(f"largest difference of a mean {off.max():.2f} sd, ratios of sds ", end="")
    print(", ".join(f"{value:.2f}" for value in ratio))

    if options.picture:
        draw(options.picture, old, np.asarray(prior.sample(fit_key, (5000,))), new, both)


def draw(path: str, old, prior, new, both) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    stages = {
        "after the first study": (prior, old, ("the flow", "NUTS")),
        "after the second": (new, both, ("the flow as prior", "both data sets at once")),
    }
    for ax, (title, (ours, known, labels)) in zip(axes, stages.items(), strict=True):
        nf.plot.scatter(ours[:, :2], known[:, :2], labels=labels, names=NAMES[:2], ax=ax)
        bounds = np.quantile(known[:, :2], [0.001, 0.99], axis=0)
        ax.set(title=title, xlim=bounds[:, 0], ylim=bounds[:, 1])
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
