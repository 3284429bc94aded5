"""Centred eight schools, three ways: NUTS, a flow guide, and NUTS in the flow's base space.

Eight coaching programmes, estimated effects y with standard errors sigma (Rubin, 1981):
mu ~ N(0, 5), tau ~ HalfCauchy(5), theta_j ~ N(mu, tau), y_j ~ N(theta_j, sigma_j). In this centred
form the posterior is a funnel: where tau is small, theta is squeezed to a point, and one step size
cannot serve both ends. A flow learns the funnel's shape; in its base space the posterior is close
to a standard normal, and NUTS walks it with long, safe steps. The answer is exact in any case.

    python examples/eight_schools.py [--steps 2000] [--picture eight_schools.png]

Prints one table and writes one picture. Takes about half a minute on two cores.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import NUTS
from sampling import bulk_ess, print_table, run

import numpyro_flows as nf

Y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
# Long runs of the non-centred model: mean and standard deviation.
KNOWN = {"mu": (4.4, 3.3), "tau": (3.6, 3.2)}


def model(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def run_nuts(model, seed):
    return run(NUTS(model, target_accept_prob=0.9), SIGMA, Y, seed=seed)  # careful steps, for both


def fit_guide(num_steps):
    guide, start = nf.AutoFlow(model), time.perf_counter()
    fitted = nf.fit_guide(
        jax.random.key(0), guide, SIGMA, Y, num_steps=num_steps, progress_bar=False
    )
    return fitted, time.perf_counter() - start


def row(name, draws, divergences="", ess="", per_gradient="", seconds=0.0):
    moments = [f"{draws[site].mean():.1f} +- {draws[site].std():.1f}" for site in KNOWN]
    return [name, divergences, ess, per_gradient, f"{seconds:.1f}", *moments]


def sampler_row(name, result):
    ess = bulk_ess({site: result.draws[site] for site in ("mu", "tau", "theta")})
    tau_per_gradient = 1000 * ess["tau"][0] / result.gradients
    lowest = min(min(values) for values in ess.values())
    cells = str(result.divergences), f"{lowest:.0f}", f"{tau_per_gradient:.2f}"
    return row(name, result.draws, *cells, result.seconds), tau_per_gradient


def print_results(rows):
    header = [
        "",
        "divergences",
        "min bulk ESS",
        "ESS(tau) / 1000 grad",
        "seconds",
        *KNOWN,
    ]
    known = ["known posterior", "", "", "", "", *(f"{m} +- {s}" for m, s in KNOWN.values())]
    print_table(header, [*rows, known])


def draw_picture(path, plain, warped, guide):
    """tau against theta_1, in the model's space and in the flow's base space."""
    plt.switch_backend("agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    nuts, neutra = (
        np.stack([draws["theta"][..., 0].ravel(), np.log(draws["tau"]).ravel()], axis=-1)
        for draws in (plain, warped)
    )
    names = (r"$\theta_1$", r"$\log\tau$")
    labels = ("NUTS", "NUTS after NeuTra")
    nf.plot.scatter(nuts, neutra, labels=labels, names=names, num_points=4000, ax=left)
    left.set(title="The model's space: a funnel", xlim=(-20, 40), ylim=(-4.5, 4))
    # Colours carry the place in the funnel over to the base space.
    latent = warped[f"{guide.prefix}_shared_latent"].reshape(-1, guide.latent_dim)
    index = guide.space.unpack(jnp.arange(guide.latent_dim))
    nf.plot.base(
        latent[:, [int(index["theta"][0]), int(index["tau"])]],
        neutra[:, 1],
        label=r"$\log\tau$ of the draw",
        names=[f"base coordinate of {name}" for name in names],
        ax=right,
        vmin=-3,
        vmax=3,
    )
    right.set(title="The flow's base space: close to a standard normal")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="largest number of training steps")
    parser.add_argument("--picture", default="eight_schools.png", help="where the picture goes")
    options = parser.parse_args()

    print("Centred eight schools, 4 chains of 1,000 draws after 1,000 of warm-up.", flush=True)
    print("NUTS ...", flush=True)
    plain = run_nuts(model, seed=1)
    print("AutoFlow ...", flush=True)
    fitted, train_seconds = fit_guide(options.steps)
    draws = fitted.sample(jax.random.key(2), (4, 1000))
    print("NUTS after NeuTra ...\n", flush=True)
    warped = run_nuts(fitted.neutra().reparam(model), seed=1)

    nuts_row, nuts_rate = sampler_row("NUTS", plain)
    neutra_row, neutra_rate = sampler_row("NUTS after NeuTra", warped)
    print_results([nuts_row, row("AutoFlow alone", draws, seconds=train_seconds), neutra_row])
    print(f"\nAutoFlow, {len(fitted.losses):,} steps of 128 particles: {fitted.verdict}")
    print(
        f"NeuTra: {neutra_rate / nuts_rate:.0f} times NUTS's effective draws of tau per gradient. "
        f"Its {warped.seconds:.1f} s come after the guide's {train_seconds:.1f} s (with compiling)."
    )
    draw_picture(options.picture, plain.draws, warped.draws, fitted.guide)
    print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
