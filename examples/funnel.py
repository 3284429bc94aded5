"""Neal's funnel: NUTS, and FlowNUTS, which learns coordinates in which it is none.

v ~ N(0, 3), x_i ~ N(0, exp(v / 2)), i = 1 to 9 (Neal, 2003). The width of x varies by orders of
magnitude with v: steps that are short enough for the neck take forever in the mouth, and NUTS
misses the neck. The flow straightens it, and NUTS walks a density close to a standard normal.

    python examples/funnel.py [--picture funnel.png]

Prints a table, what was learned, and the quantiles of v beside the known ones; writes one picture.
Takes about a minute on two cores.
"""

import argparse

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import NUTS
from sampling import FIGURES, figures, print_table, run
from scipy.stats import norm

import numpyro_flows as nf


def funnel():
    v = numpyro.sample("v", dist.Normal(0.0, 3.0))
    numpyro.sample("x", dist.Normal(jnp.zeros(9), jnp.exp(v / 2)).to_event(1))


def quantiles(draws):
    v = np.asarray(draws["v"])
    return [f"{v.std():.2f}", *(f"{np.quantile(v, p):.2f}" for p in (0.01, 0.99))]


def draw_picture(path, plain, warped):
    plt.switch_backend("agg")
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    v = np.linspace(-9, 9, 200)
    for axes, result, name in zip(panels, (plain, warped), ("NUTS", "FlowNUTS"), strict=False):
        x, y = (np.asarray(result.draws[site]) for site in ("x", "v"))
        draws = np.stack([x[..., 0].ravel(), y.ravel()], axis=-1)
        nf.plot.scatter(draws, names=("$x_1$", "$v$"), num_points=4000, ax=axes)
        for side in (-2, 2):
            axes.plot(side * np.exp(v / 2), v, color="0.5", linewidth=0.8)
        axes.set(title=f"{name}: draws", xlim=(-25, 25), ylim=(-9, 9))
    nf.plot.base(
        warped.mcmc.get_extra_fields()["warped.z"][:, [1, 0]],
        warped.mcmc.get_samples()["v"],
        label="$v$ of the draw",
        names=("base coordinate of $x_1$", "base coordinate of $v$"),
        ax=panels[2],
        vmin=-6,
        vmax=6,
    )
    panels[2].set(title="FlowNUTS: the same draws in the base space")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--picture", default="funnel.png", help="where the picture goes")
    options = parser.parse_args()

    print("Funnel in 10 dimensions, 4 chains of 1,000 draws after 1,000 of warm-up.\n", flush=True)
    plain = run(NUTS(funnel))
    kernel = nf.FlowNUTS(funnel, progress_bar=False)
    warped = run(kernel)
    known = [f"{x:.2f}" for x in (3.0, *norm(0, 3).ppf((0.01, 0.99)))]
    print_table(
        ["", *FIGURES, "sd(v)", "1 %", "99 %"],
        [
            ["NUTS", *figures(plain), *quantiles(plain.draws)],
            ["FlowNUTS", *figures(warped), *quantiles(warped.draws)],
            ["known", *[""] * len(FIGURES), *known],
        ],
    )
    print(f"\n{kernel.report(warped.mcmc)}")
    draw_picture(options.picture, plain, warped)
    print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
