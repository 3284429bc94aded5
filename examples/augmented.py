"""What a continuous flow cannot do, and one with a coordinate more can.

Paths of one differential equation never cross. On the line no flow can therefore exchange left and
right: the best that it can do with the reflection x -> -x is to bring everything to 0. With one
coordinate more the paths pass each other by a turn in the plane (Dupont et al., 2019,
arXiv:1904.01681). The same holds for densities: the flow of a disc inside of a ring has to tear its
normal base along a circle, which a smooth field cannot do, and leaves matter in the gap; an
augmented flow lifts the ring off the plane first.

    python examples/augmented.py [--epochs 60] [--picture augmented.png]
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import numpyro_flows as nf

RADIUS, DISC, RING = 2.0, 0.3, 0.1


def learn_reflection(dim, num_steps=600):
    """A flow of ``dim`` coordinates, the first of which shall go from x to -x; and its error."""
    x = jnp.linspace(-1.0, 1.0, 64)
    start = jnp.zeros((64, dim)).at[:, 0].set(x)
    field = nf.nn.ConcatSquash(jax.random.key(1), dim, hidden=(32, 32))
    params, rest = nf.partition(nf.Continuous(jax.random.key(0), dim, field, num_steps=10))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))

    def error(params):
        return ((nf.combine(params, rest)(start)[:, 0] + x) ** 2).mean()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(error)(params), state)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, optimizer.init(params))
    (params, _), _ = jax.lax.scan(step, carry, None, length=num_steps)
    flow = nf.combine(params, rest)
    return flow, start, float(error(params))


def ring_and_disc(rng, n):
    """Half of the points normal around 0, half at a normal distance from it."""
    disc = DISC * rng.normal(size=(n, 2))
    angle = rng.uniform(0, 2 * np.pi, size=n)
    radius = RADIUS + RING * rng.normal(size=n)
    ring = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return np.where(rng.random((n, 1)) < 0.5, disc, ring).astype(np.float32)


def log_density(x):
    r = np.linalg.norm(x, axis=-1)
    disc = -0.5 * (r / DISC) ** 2 - np.log(2 * np.pi * DISC**2)
    ring = -0.5 * ((r - RADIUS) / RING) ** 2 - np.log((2 * np.pi) ** 1.5 * RING * r)
    return np.logaddexp(disc, ring) - np.log(2)


def in_the_gap(x):
    """Share of points where there should be none."""
    r = np.linalg.norm(x, axis=-1)
    return np.mean((r > 5 * DISC) & (r < RADIUS - 4 * RING))


def learn_density(recipe, x, epochs):
    start = time.perf_counter()
    flow = recipe(jax.random.key(1), 2, hidden=(64, 64), rtol=1e-4, atol=1e-4)
    fitted = nf.fit(
        jax.random.key(0),
        flow,
        x,
        learning_rate=5e-3,
        max_epochs=epochs,
        patience=epochs,
        progress_bar=False,
    )
    return fitted.flow, time.perf_counter() - start


def draw_picture(path, reflections, flows, data):
    plt.switch_backend("agg")
    figure, axes = plt.subplots(2, 3, figsize=(12, 8), layout="constrained")
    times = jnp.linspace(0.0, 1.0, 50)
    for axis, (label, (flow, start, _)) in zip(axes[0], reflections.items(), strict=False):
        paths = np.asarray(flow.trajectories(start[::4], times))
        for i in range(paths.shape[1]):
            color = plt.cm.coolwarm(i / (paths.shape[1] - 1))
            axis.plot(times, paths[:, i, 0], color=color, linewidth=1)
        axis.set(title=f"reflection, {label}", xlabel="time", ylabel="x", ylim=(-1.3, 1.3))
    paths = np.asarray(reflections["augmented"][0].trajectories(start[::4], times))
    for i in range(paths.shape[1]):
        color = plt.cm.coolwarm(i / (paths.shape[1] - 1))
        axes[0, 2].plot(*paths[:, i].T, color=color, linewidth=1)
    axes[0, 2].set(title="the same paths in the plane", xlabel="x", ylabel="e")
    key = jax.random.key(5)
    draws = {"data": data} | {name: flow.sample(key, (4000,)) for name, flow in flows.items()}
    for axis, (label, points) in zip(axes[1], draws.items(), strict=True):
        axis.scatter(*np.asarray(points)[:4000].T, s=2, linewidths=0)
        axis.set(title=label, xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal")
    figure.savefig(path, dpi=75)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--picture", default="augmented.png", help="where the picture goes")
    options = parser.parse_args()

    reflections = {"plain": learn_reflection(1), "augmented": learn_reflection(2)}
    for name, (_, start, error) in reflections.items():
        still = float((start[:, 0] ** 2).mean())
        print(f"reflection, {name}: mean squared error {error:.5f} (all at 0: {still:.5f})")

    rng = np.random.default_rng(0)
    data, test = ring_and_disc(rng, options.points), ring_and_disc(rng, 4096)
    print(f"ring and disc: {log_density(test).mean():.3f} nats, {in_the_gap(test):.2%} in the gap")
    flows = {}
    for name, recipe in (
        ("plain", nf.cnf),
        ("augmented", partial(nf.augmented_cnf, augment_dim=1)),
    ):
        flow, seconds = learn_density(recipe, data, options.epochs)
        judged, kind = flow, "log density"
        if isinstance(flow, nf.AugmentedFlow):
            judged = flow.with_probe(jax.random.key(3), num_samples=64)
            kind = "lower bound"
        score = float(jax.jit(lambda f, x: f.log_prob(x).mean())(judged, test))
        gap = in_the_gap(np.asarray(flow.sample(jax.random.key(4), (20_000,))))
        print(f"{name}: {kind} {score:.3f} nats, {gap:.2%} in the gap, {seconds:.0f} s", flush=True)
        flows[name] = flow
    draw_picture(options.picture, reflections, flows, data)
    print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
