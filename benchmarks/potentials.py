"""Rezende & Mohamed's potentials U1 to U4, by planar flows of 32 layers: the divergence left.

    python benchmarks/potentials.py [U1 U2 U3 U4] [--seeds 0 1 2 3 4]

Densities exp(-U(z)) of the plane (Rezende & Mohamed, 2015, arXiv:1505.05770, table 1), U2 to U4
with the wall (1/2) (relu(|z1| - 4) / 0.4)^2, without which they do not integrate. The planar flow
is read in its fast-sampling direction and trained by ``nf.fit_guide`` with annealing; the
divergence KL(q || p) is log Z minus the ELBO of 100,000 fresh draws, with log Z by quadrature.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

import numpyro_flows as nf


def w1(x):
    return jnp.sin(2 * jnp.pi * x / 4)


def w2(x):
    return 3 * jnp.exp(-0.5 * ((x - 1) / 0.6) ** 2)


def w3(x):
    return 3 * jax.nn.sigmoid((x - 1) / 0.3)


def wall(x):
    return 0.5 * (jax.nn.relu(jnp.abs(x) - 4) / 0.4) ** 2


def u1(z):
    # The norm with a gradient at 0.
    ring = 0.5 * ((jnp.sqrt((z**2).sum(-1) + 1e-12) - 2) / 0.4) ** 2
    x = z[..., 0]
    pair = jnp.logaddexp(-0.5 * ((x - 2) / 0.6) ** 2, -0.5 * ((x + 2) / 0.6) ** 2)
    return ring - pair


def u2(z):
    x, y = z[..., 0], z[..., 1]
    return 0.5 * ((y - w1(x)) / 0.4) ** 2 + wall(x)


def u3(z):
    x, y = z[..., 0], z[..., 1]
    first = -0.5 * ((y - w1(x)) / 0.35) ** 2
    second = -0.5 * ((y - w1(x) + w2(x)) / 0.35) ** 2
    return -jnp.logaddexp(first, second) + wall(x)


def u4(z):
    x, y = z[..., 0], z[..., 1]
    first = -0.5 * ((y - w1(x)) / 0.4) ** 2
    second = -0.5 * ((y - w1(x) + w3(x)) / 0.35) ** 2
    return -jnp.logaddexp(first, second) + wall(x)


POTENTIALS = {"U1": u1, "U2": u2, "U3": u3, "U4": u4}


def log_z(potential) -> float:
    axis = jnp.linspace(-8, 8, 4001)
    step = float(axis[1] - axis[0])
    columns = jax.lax.map(
        lambda x: jax.nn.logsumexp(-potential(jnp.stack([jnp.full_like(axis, x), axis], -1))), axis
    )
    return float(jax.nn.logsumexp(columns) + 2 * np.log(step))


def divergence(potential, seed: int, steps: int) -> tuple[float, float]:
    def model():
        z = numpyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        numpyro.factor("density", -potential(z))

    planar = partial(nf.planar, depth=32, inverse=False)
    guide = nf.AutoFlow(model, planar, init="location", init_scale=1.0)
    start = time.perf_counter()
    fitted = nf.fit_guide(
        jax.random.key(seed),
        guide,
        num_steps=steps,
        annealing_steps=steps // 4,
        num_draws=100_000,
        progress_bar=False,
    )
    return log_z(potential) - fitted.elbo, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(POTENTIALS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=8000)
    options = parser.parse_args()
    print("| potential | log Z | KL, median | KL of each seed | seconds |\n|---|---|---|---|---|")
    for name in options.names:
        potential = POTENTIALS[name]
        rows = [divergence(potential, seed, options.steps) for seed in options.seeds]
        kls = [kl for kl, _ in rows]
        each = " ".join(f"{kl:.3f}" for kl in kls)
        seconds = np.median([s for _, s in rows])
        print(
            f"| {name} | {log_z(potential):.4f} | {np.median(kls):.3f} | {each} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
