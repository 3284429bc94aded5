"""What a continuous flow cannot do, and one with a coordinate more can.

Paths of one differential equation never cross, so its flow is a homeomorphism. On the line none can
exchange left and right: the best that a flow can do with the reflection x -> -x is to bring
everything to 0. In the plane none can pull a disc out of the ring around it: wherever a line is
drawn, the ring is on both sides. With one coordinate more both are easy, by a turn and by a lift
(Dupont et al., 2019, arXiv:1904.01681).

Densities ask for less: a flow may leave a little mass where there should be none, and that costs
little. The last part fits the disc in its ring by `nf.cnf` and by `nf.augmented_cnf`, whose
`log_prob` is a lower bound, and prints both beside the truth. The base is connected, and so are its
images, with or without more coordinates: both leave some mass in the gap.

    python examples/augmented.py [--epochs 30] [--picture augmented.png]
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


def learn_map(x, target, extra, num_steps=800):
    """A flow of x with ``extra`` zeros beside it, whose first coordinate shall end at ``target``.

    The flow, its start, and where the first coordinate ends, for x of shape (n, d).
    """
    start = jnp.pad(x, ((0, 0), (0, extra)))
    dim = start.shape[1]
    field = nf.nn.ConcatSquash(jax.random.key(1), dim, hidden=(32, 32))
    params, rest = nf.partition(
        nf.transforms.Continuous(jax.random.key(0), dim, field, num_steps=10)
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))

    def loss(params):
        return ((nf.combine(params, rest)(start)[:, 0] - target) ** 2).mean()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, optimizer.init(params))
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=num_steps))(carry)
    flow = nf.combine(params, rest)
    return flow, start, flow(start)[:, 0]


def ring_and_disc(rng, n):
    """Half of the points normal around 0, half at a normal distance from it; and which is which."""
    disc = DISC * rng.normal(size=(n, 2))
    angle = rng.uniform(0, 2 * np.pi, size=n)
    radius = RADIUS + RING * rng.normal(size=n)
    ring = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    in_ring = rng.random(n) < 0.5
    return np.where(in_ring[:, None], ring, disc).astype(np.float32), in_ring


def log_density(x):
    r = np.linalg.norm(x, axis=-1)
    disc = -0.5 * (r / DISC) ** 2 - np.log(2 * np.pi * DISC**2)
    ring = -0.5 * ((r - RADIUS) / RING) ** 2 - np.log((2 * np.pi) ** 1.5 * RING * r)
    return np.logaddexp(disc, ring) - np.log(2)


def in_the_gap(x):
    """Share of points where there should be none."""
    r = np.linalg.norm(x, axis=-1)
    return np.mean((r > 5 * DISC - 0.2) & (r < RADIUS - 4 * RING))


def learn_density(recipe, x, epochs):
    start = time.perf_counter()
    flow = recipe(jax.random.key(1), 2, hidden=(64, 64), num_steps=10)
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


def draw_picture(path, reflections, pulls, in_ring, draws):
    plt.switch_backend("agg")
    figure, axes = plt.subplots(3, 3, figsize=(10, 10), layout="constrained")
    times = jnp.linspace(0.0, 1.0, 50)
    for column, (label, (flow, start, _)) in enumerate(reflections.items()):
        paths = np.asarray(flow.trajectories(start[::4], times))
        for i, color in enumerate(plt.cm.coolwarm(np.linspace(0, 1, paths.shape[1]))):
            axes[0, column].plot(times, paths[:, i, 0], color=color, linewidth=1)
            if label == "augmented":
                axes[0, 2].plot(*paths[:, i].T, color=color, linewidth=1)
        axes[0, column].set(title=f"x to -x, {label}", xlabel="time", ylabel="x")
    axes[0, 2].set(title="the same paths", xlabel="x", ylabel="e")
    colors = np.where(in_ring, "tab:orange", "tab:blue")
    _, start, _ = pulls["plain"]
    axes[1, 0].scatter(*start.T, c=colors, s=4)
    axes[1, 0].set(title="disc to the left, ring to the right: before", aspect="equal")
    for axis, (label, (flow, start, _)) in zip(axes[1, 1:], pulls.items(), strict=True):
        ends = np.asarray(flow(start))
        axis.scatter(ends[:, 0], ends[:, -1], c=colors, s=4)
        axis.axvline(0.0, color="0.7", linewidth=1)
        axis.set(title=f"after, {label}", xlabel="first coordinate", ylabel="last")
    for axis, (label, points) in zip(axes[2], draws.items(), strict=True):
        nf.plot.scatter(points[:3000], num_points=3000, ax=axis)
        axis.set(title=label, xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal")
    figure.savefig(path, dpi=75)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--picture", default="augmented.png", help="where the picture goes")
    options = parser.parse_args()

    x = jnp.linspace(-1.0, 1.0, 64)[:, None]
    kinds = {"plain": 0, "augmented": 1}
    reflections = {name: learn_map(x, -x[:, 0], extra) for name, extra in kinds.items()}
    for name, (_, _, end) in reflections.items():
        print(f"reflection, {name}: largest error {float(jnp.abs(end + x[:, 0]).max()):.3f}")

    rng = np.random.default_rng(0)
    points, in_ring = ring_and_disc(rng, 512)
    side = np.where(in_ring, 1.0, -1.0)
    pulls = {name: learn_map(jnp.asarray(points), side, extra) for name, extra in kinds.items()}
    for name, (flow, _, end) in pulls.items():
        error = float(((end - side) ** 2).mean())
        wrong = float(((end > 0) != in_ring).mean())
        # The ring itself, finely: a homeomorphism of the plane has it on both sides.
        angle = jnp.linspace(0, 2 * jnp.pi, 20_000)
        circle = RADIUS * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        lost = float((flow(jnp.pad(circle, ((0, 0), (0, kinds[name]))))[:, 0] < 0).mean())
        print(
            f"ring around a disc, {name}: squared error {error:.4f}, "
            f"{wrong:.2%} of the points and {lost:.2%} of the ring on the wrong side"
        )

    (data, _), (test, _) = ring_and_disc(rng, 10_000), ring_and_disc(rng, 4096)
    truth = log_density(test).mean()
    print(f"density: {truth:.3f} nats, {in_the_gap(test):.2%} in the gap")
    draws = {"data": data}
    recipes = {"plain": nf.cnf, "augmented": partial(nf.augmented_cnf, augment_dim=1)}
    for name, recipe in recipes.items():
        flow, seconds = learn_density(recipe, data, options.epochs)
        judged, kind = flow, "log density"
        if isinstance(flow, nf.AugmentedFlow):
            judged, kind = flow.with_probe(jax.random.key(3), num_samples=64), "lower bound"
        score = float(jax.jit(lambda f, x: f.log_prob(x).mean())(judged, test))
        draws[name] = np.asarray(flow.sample(jax.random.key(4), (20_000,)))
        gap = in_the_gap(draws[name])
        print(f"{name}: {kind} {score:.3f} nats, {gap:.2%} in the gap, {seconds:.0f} s", flush=True)
    draw_picture(options.picture, reflections, pulls, in_ring, draws)
    print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
