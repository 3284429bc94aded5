"""Simulation-based inference: the posterior of a simulator, learned from its simulations.

The simulator "two moons" of sbibm (Lueckmann et al., 2021, arXiv:2101.04653): two parameters, two
data, and posteriors that are two crescents. A conditional spline flow is fitted to 10,000 pairs of
parameters and simulated data, which is all of neural posterior estimation; it then gives the
posterior of any observation at once.

    python examples/two_moons.py [--simulations 10000] [--picture two_moons.png]

Prints the classifier two-sample test (C2ST) against sbibm's reference draws where these are found,
in the folder that NUMPYRO_FLOWS_DATA names or in ../shared/data: 0.5 means that a classifier cannot
tell the draws apart.
"""

import argparse
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist

import numpyro_flows as nf

PRIOR = dist.Uniform(-1.0, 1.0).expand((2,)).to_event(1)


def simulate(key, theta):
    """Data for parameters of shape (n, 2): a point on a crescent, moved by the parameters."""
    angle_key, radius_key = jax.random.split(key)
    angle = jax.random.uniform(angle_key, theta.shape[:1], minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    radius = 0.1 + 0.01 * jax.random.normal(radius_key, theta.shape[:1])
    crescent = jnp.stack([radius * jnp.cos(angle) + 0.25, radius * jnp.sin(angle)], axis=-1)
    first, second = theta[:, 0], theta[:, 1]
    moved = jnp.stack([-jnp.abs(first + second), second - first], axis=-1) / jnp.sqrt(2.0)
    return crescent + moved


def learn_posterior(num_simulations, seed=0):
    """A conditional flow q(theta | x), and the seconds it took."""
    prior_key, data_key, init_key, fit_key = jax.random.split(jax.random.key(seed), 4)
    theta = PRIOR.sample(prior_key, (num_simulations,))
    x = simulate(data_key, theta)
    start = time.perf_counter()
    flow = nf.nsf(init_key, 2, context_dim=2, support=PRIOR.support, num_bins=10, activation="silu")
    fitted = nf.fit(fit_key, flow, theta, x, max_epochs=300, patience=30, progress_bar=False)
    return fitted.flow, time.perf_counter() - start


def c2st(reference, draws, seed=1):
    """sbibm's test: accuracy of a small network in 5-fold cross-validation."""
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    loc, scale = reference.mean(0), reference.std(0)
    both = np.concatenate([(reference - loc) / scale, (draws - loc) / scale])
    labels = np.repeat([0, 1], [len(reference), len(draws)])
    width = 10 * reference.shape[1]
    classifier = MLPClassifier((width, width), max_iter=10_000, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    return cross_val_score(classifier, both, labels, cv=folds, n_jobs=-1).mean()


def references():
    """Observation and reference draws of each stored problem."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("NUMPYRO_FLOWS_DATA") or beside) / "sbibm" / "two_moons"
    for path in sorted(folder.glob("*/observation.csv")):
        observed = np.loadtxt(path, delimiter=",", skiprows=1)
        draws = np.loadtxt(
            path.with_name("reference_posterior_samples.csv.bz2"), delimiter=",", skiprows=1
        )
        yield path.parent.name, observed, draws


def draw_picture(path, problems):
    plt.switch_backend("agg")
    figure, axes = plt.subplots(
        1, len(problems), figsize=(4.2 * len(problems), 4.2), layout="constrained", squeeze=False
    )
    for axis, (name, reference, draws) in zip(axes[0], problems, strict=True):
        names = (r"$\theta_1$", r"$\theta_2$")
        nf.plot.scatter(draws, reference, labels=("flow", "reference"), names=names, ax=axis)
        limits = (-1.05, 1.05)  # the prior's
        axis.set(title=name, xlim=limits, ylim=limits, aspect="equal")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--picture", default="two_moons.png", help="where the picture goes")
    options = parser.parse_args()
    flow, seconds = learn_posterior(options.simulations)
    print(f"{options.simulations:,} simulations, trained in {seconds:.0f} s")
    problems, scores = [], []
    for number, observed, reference in references():
        posterior = flow.condition(jnp.asarray(observed, jnp.float32))
        draws = np.asarray(posterior.sample(jax.random.key(int(number)), (len(reference),)))
        scores.append(c2st(reference, draws))
        print(f"observation {number}: C2ST {scores[-1]:.3f}", flush=True)
        problems.append((f"observation {number}", reference, draws))
    if scores:
        print(f"mean C2ST {np.mean(scores):.3f}")
    else:
        print("No reference draws found: set NUMPYRO_FLOWS_DATA for the test against them.")
        posterior = flow.condition(jnp.zeros(2))
        draws = np.asarray(posterior.sample(jax.random.key(0), (3000,)))
        problems.append(("observation (0, 0)", None, draws))
    draw_picture(options.picture, problems)
    print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
