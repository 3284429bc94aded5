"""Continuous flows: traces, training by likelihood and by flow matching, and penalties.

    python benchmarks/continuous.py trace                  # training step at D=64, both traces
    python benchmarks/continuous.py toy --epochs 40        # beside nsf on three densities
    python benchmarks/continuous.py penalties --plot pictures  # what they do to the paths

``trace`` times value and gradient of the mean negative log-likelihood and an Adam update, compile
time apart, median over interleaved rounds, batch 128. ``toy`` fits 27,000 of 30,000 points (3,000
validate) with ``nf.nsf``, with ``nf.cnf`` by maximum likelihood, and by flow matching for four
times as many epochs, and reports mean log densities of 20,000 fresh points in nats, beside the true
ones, and seconds with compilation. ``penalties`` reports, on the same densities, what the penalties
of RNODE do: nats lost, evaluations of the field for one solve of 4,096 test points, data to base at
the tolerance 1e-5, how many times fewer they are than without, and the time of a training step.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from densities import DENSITIES
from density import scorer
from libraries import Program, shake

import numpyro_flows as nf

NAMES = ("two moons", "8 Gaussians", "checkerboard")
OPTIMIZER = optax.adam(1e-3)
WEIGHTS = (0.0, 0.01, 0.02, 0.03, 0.05)


def trace(options) -> None:
    x = jax.random.normal(jax.random.key(1), (128, options.dim))
    programs = {}
    for kind in ("exact", "hutchinson"):
        flow = nf.cnf(jax.random.key(0), options.dim, hidden=(64, 64), trace=kind)
        params, rest = nf.partition(flow)
        params = shake(params)

        def step(params, state, x, rest=rest):
            def loss(params):
                return -nf.combine(params, rest).log_prob(x).mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = OPTIMIZER.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        programs[kind] = Program(jax.jit(step), params, OPTIMIZER.init(params), x)
        evaluations = nf.combine(params, rest).transform.statistics(x)["num_evaluations"]
        print(f"{kind}: compile {programs[kind].compile():.1f} s, {int(evaluations)} evaluations")
    times: dict[str, list[float]] = {kind: [] for kind in programs}
    for program in programs.values():
        program.run(1)
    for _ in range(options.rounds):
        for kind, program in programs.items():
            times[kind].append(program.run(1))
    exact, hutchinson = (float(np.median(times[kind])) for kind in ("exact", "hutchinson"))
    print("| D | exact, ms | hutchinson, ms | exact / hutchinson |\n|---|---|---|---|")
    ratio = exact / hutchinson
    print(f"| {options.dim} | {1e3 * exact:.1f} | {1e3 * hutchinson:.1f} | {ratio:.1f} |")


def fits(options):
    steps = options.epochs * (27_000 // 256)
    schedule = optax.cosine_decay_schedule(5e-3, steps)
    settings = {
        "max_epochs": options.epochs,
        "patience": options.epochs,
        "optimizer": optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule)),
        "progress_bar": False,
    }
    more = {**settings, "max_epochs": 4 * options.epochs, "patience": 4 * options.epochs}
    schedule = optax.cosine_decay_schedule(5e-3, 4 * steps)
    more["optimizer"] = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule))
    cnf = partial(nf.cnf, hidden=(64, 64))
    return {
        "nsf": (nf.nsf, nf.fit, settings),
        "cnf": (cnf, nf.fit, settings),
        "flow matching": (cnf, partial(nf.fit, objective=nf.FlowMatching()), more),
    }


def data(name: str, options):
    seed = [options.seed, list(DENSITIES).index(name)]
    density = DENSITIES[name]
    x = density.sample(np.random.default_rng([*seed, 0]), 30_000)
    test = density.sample(np.random.default_rng([*seed, 1]), 20_000)
    return x, test, density.log_prob(test).mean()


def score(flow, test) -> float:
    values = scorer(lambda flow, x: flow.log_prob(x))(flow, jnp.asarray(test))
    return float(np.asarray(values, float).mean())


def fitted(recipe, fit, settings, x, options):
    start = time.perf_counter()
    result = fit(jax.random.key(options.seed), recipe(jax.random.key(1), 2), x, **settings)
    return result.flow, time.perf_counter() - start


def toy(options) -> None:
    print("| density | flow | test nats | truth | to nsf | seconds |\n|---|---|---|---|---|---|")
    for name in NAMES:
        x, test, truth = data(name, options)
        best = None
        for label, (recipe, fit, settings) in fits(options).items():
            flow, seconds = fitted(recipe, fit, settings, x, options)
            value = score(flow, test)
            best = value if best is None else best
            cells = f"{value:.4f} | {truth:.4f} | {value - best:+.4f} | {seconds:.0f}"
            print(f"| {name} | {label} | {cells} |", flush=True)


def picture(flows, name: str, folder: Path) -> None:
    """Fields half way, and paths from base to data, in standardised coordinates."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(flows), figsize=(5 * len(flows), 5), sharex=True, sharey=True
    )
    z = jax.random.normal(jax.random.key(3), (60, 2))
    many = jax.random.normal(jax.random.key(4), (3000, 2))
    axis = jnp.linspace(-2.5, 2.5, 17)
    grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1)
    for ax, (label, transform) in zip(axes, flows.items(), strict=True):
        paths = np.asarray(transform.trajectories(z, jnp.linspace(0, transform.end_time, 60)))
        arrows = np.asarray(transform.velocity(jnp.asarray(transform.end_time / 2), grid))
        ax.scatter(*np.asarray(transform(many)).T, s=2, color="0.75", linewidths=0)
        ax.quiver(*np.moveaxis(np.asarray(grid), -1, 0), *np.moveaxis(arrows, -1, 0), alpha=0.35)
        ax.plot(paths[..., 0], paths[..., 1], color="tab:blue", linewidth=0.7)
        ax.scatter(*paths[0].T, s=10, color="tab:green", label="base", zorder=3)
        ax.scatter(*paths[-1].T, s=10, color="tab:red", label="data", zorder=3)
        ax.set(title=label, xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    axes[0].legend(loc="upper left")
    figure.savefig(folder / f"cnf_{name.replace(' ', '_')}.png", dpi=80, bbox_inches="tight")


def penalties(options) -> None:
    columns = ("density", "penalties", "test nats", "lost", "evaluations", "fewer", "ms per step")
    print(f"| {' | '.join(columns)} |\n|{len(columns) * '---|'}")
    _, fit, settings = fits(options)["cnf"]
    steps = options.epochs * -(-27_000 // 256)
    for name in options.densities or NAMES:
        x, test, _ = data(name, options)
        flows: dict[str, nf.transforms.Continuous] = {}
        first = None
        for weight in WEIGHTS:
            recipe = partial(nf.cnf, kinetic_penalty=weight, jacobian_penalty=weight)
            flow, seconds = fitted(recipe, fit, settings, x, options)
            whole = flow.transform
            white = (jnp.asarray(test[:4096]) - whole.loc.value) / whole.scale.value
            nats = score(flow, test)
            count = int(whole.transform.statistics(white)["num_evaluations"])
            first = first or (nats, count)
            flows[f"penalties {weight}, {count} evaluations"] = whole.transform
            cells = f"{nats:.4f} | {first[0] - nats:.4f} | {count} | {first[1] / count:.2f}"
            print(f"| {name} | {weight} | {cells} | {1e3 * seconds / steps:.1f} |", flush=True)
        if options.plot:
            picture(flows, name, options.plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("trace", "toy", "penalties"))
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--densities", nargs="*", choices=NAMES)
    parser.add_argument("--plot", type=Path, help="folder for pictures of fields and paths")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    {"trace": trace, "toy": toy, "penalties": penalties}[options.what](options)


if __name__ == "__main__":
    main()
