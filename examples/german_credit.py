"""Sparse logistic regression of the German credit data: NUTS, and FlowNUTS.

25 coefficients, each the product of a weight, a local and a global scale, both with a gamma prior
that has its mass at 0: 51 parameters, whose posterior has a funnel for each coefficient.

    python examples/german_credit.py [--data german.data-numeric] [--picture german_credit.png]

The data (UCI Statlog, the numeric form) are looked for where ``--data`` says, then in the folder
german_credit of NUMPYRO_FLOWS_DATA or ../shared/data. Prints a table and what was learned; writes
one picture. Takes about two minutes on two cores.
"""

import argparse
import os
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import NUTS
from sampling import FIGURES, figures, print_table, run

import numpyro_flows as nf


def model(x, y):
    with numpyro.plate("coefficients", x.shape[1]):
        local = numpyro.sample("local", dist.Gamma(0.5, 0.5))
        unit = numpyro.sample("unit", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("global", dist.Gamma(0.5, 0.5))
    beta = numpyro.deterministic("beta", unit * local * tau)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def read(path):
    """Standardised features with a column of ones, and whether the credit was bad."""
    raw = np.loadtxt(path)
    x = raw[:, :24]
    x = np.c_[(x - x.mean(0)) / x.std(0), np.ones(len(x))]
    return jnp.asarray(x, jnp.float32), jnp.asarray(raw[:, 24] == 2, jnp.float32)


def draw_picture(path, plain, warped):
    """The scale of a coefficient that is nearly zero against its weight: a funnel, and without."""
    plt.switch_backend("agg")
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    beta = np.asarray(warped.draws["beta"]).reshape(-1, 25)
    which = int(np.abs(beta).mean(0).argmin())
    for axes, result, name in zip(panels, (plain, warped), ("NUTS", "FlowNUTS"), strict=False):
        scale = np.asarray(result.draws["local"][..., which] * result.draws["global"]).ravel()
        value = np.asarray(result.draws["beta"])[..., which].ravel()
        draws = np.stack([value, np.log(scale)], axis=-1)
        names = (rf"$\beta_{{{which}}}$", "log of its scale")
        nf.plot.scatter(draws, names=names, num_points=4000, ax=axes)
        axes.set(title=f"{name}: draws", xlim=(-0.5, 0.5), ylim=(-16, 3))
    sites = warped.mcmc.sampler.sites
    place = [int(sites["unit"][which]), int(sites["local"][which])]
    nf.plot.base(
        warped.mcmc.get_extra_fields()["warped.z"][:, place],
        np.log(np.asarray(warped.mcmc.get_samples()["local"][:, which])),
        label="log of the local scale",
        names=("base coordinate of its weight", "base coordinate of its local scale"),
        ax=panels[2],
    )
    panels[2].set(title="FlowNUTS: the same draws in the base space")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("NUMPYRO_FLOWS_DATA") or beside)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=folder / "german_credit" / "german.data-numeric")
    parser.add_argument("--picture", default="german_credit.png", help="where the picture goes")
    options = parser.parse_args()
    if not Path(options.data).is_file():
        raise SystemExit(f"No data at {options.data}: pass --data, or set NUMPYRO_FLOWS_DATA.")

    x, y = read(options.data)
    print("German credit, 4 chains of 1,000 draws after 1,000 of warm-up.\n", flush=True)
    plain = run(NUTS(model), x, y)
    kernel = nf.FlowNUTS(model, progress_bar=False)
    warped = run(kernel, x, y)
    print_table(
        ["", *FIGURES],
        [["NUTS", *figures(plain)], ["FlowNUTS", *figures(warped)]],
    )
    print(f"\n{kernel.report(warped.mcmc)}")
    draw_picture(options.picture, plain, warped)
    print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
