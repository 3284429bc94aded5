"""Quality of fit: the same flow here and in flowjax, on the same data with the same budget.

    pip install -e ".[peers,examples]"
    python benchmarks/density.py toy --plot pictures --json toy.json
    python benchmarks/density.py toy --filter "pinwheel nsf" --epochs 200
    python benchmarks/density.py power --minutes 10 --json power.json
    python benchmarks/density.py power --minutes 25 --preset full       # for an accelerator

``toy`` fits five densities of the plane, known in closed form or by quadrature, with 20,000 points
(2,000 of them for validation). ``nf.fit`` and ``flowjax.train.fit_to_data`` get the same
standardised data, sizes of the flow, optax optimiser (Adam with a cosine decay to 0 behind
clipping), batch size and number of epochs, and keep their best parameters on validation; what is
not named here is at each library's defaults. Reported are mean log densities in nats on 20,000
fresh points: the true one, which is the upper bound, ours and flowjax's, their difference with the
standard error over points (that of another training run is not in it), and seconds with
compilation.

``power`` fits UCI household power: 6 columns, the published preparation and split. Both libraries
go through one loop, :func:`train`, for the same wall-clock time, compilation and validation
included: 200 steps per call on batches that are drawn on the device, Adam behind clipping with a
cosine decay over the time. The step size follows the share of the budget that is spent, so its
number of steps is the machine's, and a disturbance shortens a run without spoiling its end. The
best parameters on validation are scored on the whole test set. The data is searched where the
environment variable ``NUMPYRO_FLOWS_DATA`` says, else in ``../shared/data`` beside the project;
power_int.npz holds the integer-coded columns.

flowjax trains location and scale of its base distribution too; ours is fixed.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from densities import DENSITIES, gaussian, load_power

import numpyro_flows as nf

PACKAGES = ("numpyro_flows", "flowjax", "jax", "jaxlib", "numpyro", "equinox", "optax")
CLIP_NORM = 5.0
STEPS_PER_CALL = 200  # of the time-budgeted loop
VALIDATIONS = 20  # of one time-budgeted run
# Of full training: Papamakarios et al. (2017), arXiv:1705.07057, and Durkan et al. (2019),
# arXiv:1906.04032.
PUBLISHED = {"RealNVP": 0.17, "MAF": 0.24, "NSF (C)": 0.64}


class Recipe(NamedTuple):
    """One flow: builders from a key, ours and flowjax's."""

    name: str
    ours: Callable[[jax.Array], nf.FlowDistribution]
    flowjax: Callable[[jax.Array], Any]


def flowjax_flow(name: str, dim: int, *, bins: int = 0, bound: float = 0.0, **config):
    """Builder of a flowjax flow over a standard normal, with splines if ``bins`` is positive."""

    def build(key):
        from flowjax import flows
        from flowjax.bijections import RationalQuadraticSpline
        from flowjax.distributions import Normal

        if bins:  # it counts inner knots
            config["transformer"] = RationalQuadraticSpline(knots=bins - 1, interval=bound)
        return getattr(flows, name)(key, base_dist=Normal(jnp.zeros(dim)), **config)

    return build


NETWORK = {"flow_layers": 8, "nn_width": 64, "nn_depth": 2}  # flowjax's words for our sizes

TOY = (
    Recipe(
        "nsf",
        lambda key: nf.nsf(key, 2, depth=8, hidden=(64, 64), num_bins=8, bound=4.0),
        flowjax_flow("coupling_flow", 2, bins=8, bound=4.0, **NETWORK),
    ),
    Recipe(
        "realnvp",
        lambda key: nf.realnvp(key, 2, depth=8, hidden=(64, 64)),
        flowjax_flow("coupling_flow", 2, **NETWORK),
    ),
    Recipe(
        "maf",
        lambda key: nf.maf(key, 2, depth=8, hidden=(64, 64)),
        flowjax_flow("masked_autoregressive_flow", 2, **NETWORK),
    ),
    Recipe(
        "planar",
        lambda key: nf.planar(key, 2, depth=32),
        flowjax_flow("planar_flow", 2, flow_layers=32),
    ),
    Recipe(
        "bnaf",
        lambda key: nf.bnaf(key, 2, depth=2, hidden_factors=(32, 32)),
        flowjax_flow(
            "block_neural_autoregressive_flow", 2, flow_layers=2, nn_depth=2, nn_block_dim=32
        ),
    ),
)

POWER = {
    "cpu": Recipe(
        "nsf",
        lambda key: nf.nsf(key, 6, depth=8, hidden=(64, 64), mixing="lu", num_bins=8, bound=3.0),
        flowjax_flow("coupling_flow", 6, bins=8, bound=3.0, **NETWORK),
    ),
    # As Durkan et al. (2019), appendix B; two residual blocks are five hidden layers. flowjax has
    # neither blocks nor LU mixing in its recipe: a plain network of that depth, permutations.
    "full": Recipe(
        "nsf",
        lambda key: nf.nsf(
            key,
            6,
            depth=10,
            hidden=(256, 256),
            residual=True,
            mixing="lu",
            num_bins=8,
            bound=3.0,
        ),
        flowjax_flow(
            "coupling_flow", 6, bins=8, bound=3.0, flow_layers=10, nn_width=256, nn_depth=5
        ),
    ),
    "realnvp": Recipe(
        "realnvp",
        lambda key: nf.realnvp(key, 6, depth=8, hidden=(64, 64)),
        flowjax_flow("coupling_flow", 6, **NETWORK),
    ),
}


def split(flow) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
    """The parameters of either library's flow, and its log density given parameters and rows."""
    if isinstance(flow, nf.FlowDistribution):
        params, rest = nf.partition(flow)
    else:
        import paramax

        params, rest = eqx.partition(  # as flowjax.train.fit_to_data does
            flow,
            eqx.is_inexact_array,
            is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
        )
    return params, lambda params, x: eqx.combine(params, rest).log_prob(x)


def count(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def scorer(log_prob, rows: int = 4096):
    """Jitted log densities of all rows of an array, ``rows`` at a time."""

    @jax.jit
    def score(params, x):
        padded = jnp.pad(x, ((0, -len(x) % rows), (0, 0)), mode="edge")
        blocks = padded.reshape(-1, rows, x.shape[1])
        return jax.lax.map(lambda block: log_prob(params, block), blocks).reshape(-1)[: len(x)]

    return score


def fit_ours(recipe: Recipe, x, optimizer, options):
    """Log density of the fitted flow in the units of x, its number of parameters, seconds."""
    key, fit_key = jax.random.split(jax.random.key(options.seed))
    start = time.perf_counter()
    flow = nf.fit(
        fit_key,
        recipe.ours(key),
        x,
        optimizer=optimizer,
        batch_size=options.batch,
        max_epochs=options.epochs,
        patience=options.epochs,
        val_fraction=0.1,
        progress_bar=False,
    ).flow
    seconds = time.perf_counter() - start
    params, log_prob = split(flow)
    score = scorer(log_prob)
    return lambda x: np.asarray(score(params, jnp.asarray(x, float)), float), count(params), seconds


def fit_flowjax(recipe: Recipe, x, optimizer, options):
    """As :func:`fit_ours`; data standardised here, as ``nf.fit`` does itself."""
    from flowjax.train import fit_to_data

    loc, scale = x.mean(0), x.std(0)
    key, fit_key = jax.random.split(jax.random.key(options.seed))
    start = time.perf_counter()
    flow, _ = fit_to_data(
        fit_key,
        recipe.flowjax(key),
        jnp.asarray((x - loc) / scale, float),
        optimizer=optimizer,
        batch_size=options.batch,
        max_epochs=options.epochs,
        max_patience=options.epochs,
        val_prop=0.1,
        show_progress=False,
    )
    seconds = time.perf_counter() - start
    params, log_prob = split(flow)
    score, shift = scorer(log_prob), np.log(scale).sum()

    def log_probs(x):
        return np.asarray(score(params, jnp.asarray((x - loc) / scale, float)), float) - shift

    return log_probs, count(params), seconds


def toy(options) -> None:
    steps = options.epochs * (18_000 // options.batch)
    names = list(DENSITIES)
    rows: list[dict[str, Any]] = []
    panels: dict[str, dict[str, Any]] = {}
    for name, density in DENSITIES.items():
        seed = [options.seed, names.index(name)]
        x = density.sample(np.random.default_rng([*seed, 0]), 20_000)
        test = density.sample(np.random.default_rng([*seed, 1]), 20_000)
        truth = density.log_prob(test).mean()
        for recipe in TOY:
            if options.filter not in f"{name} {recipe.name}":
                continue
            results = []
            for fit in (fit_ours, fit_flowjax):
                jax.clear_caches()  # both compile anew, whatever came before
                rate = optax.cosine_decay_schedule(options.rate, steps)
                optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adam(rate))
                results.append(fit(recipe, x, optimizer, options))
            (ours, size, seconds), (theirs, their_size, their_seconds) = results
            values, their_values = ours(test), theirs(test)
            gap = values - their_values
            row = {
                "density": name,
                "recipe": recipe.name,
                "truth": truth,
                "ours": values.mean(),
                "flowjax": their_values.mean(),
                "ours - flowjax": gap.mean(),
                "s.e.": gap.std() / math.sqrt(len(gap)),
                "ours s": seconds,
                "flowjax s": their_seconds,
                "ours parameters": size,
                "flowjax parameters": their_size,
            }
            rows.append(row)
            report(rows, options)
            if options.plot:
                entry = panels.setdefault(name, {"x": x, "truth": density.log_prob, "flows": {}})
                entry["flows"][recipe.name] = ours, row["ours"]
        if options.plot and name in panels:
            picture(panels, {row["density"]: row["truth"] for row in rows}, options.plot)
    finish(rows, options)


def picture(panels: dict[str, dict[str, Any]], truth: dict[str, float], folder: Path) -> None:
    """One row per density: data, the true density, and each of our flows."""
    import io

    import matplotlib.pyplot as plt
    from PIL import Image

    recipes = [r.name for r in TOY if any(r.name in entry["flows"] for entry in panels.values())]
    columns = ["data", "true density", *recipes]
    size = (2.0 * len(columns) + 0.3, 2.2 * len(panels) + 0.25)
    figure, axes = plt.subplots(
        len(panels), len(columns), figsize=size, squeeze=False, layout="constrained"
    )
    for line, (name, entry) in zip(axes, panels.items(), strict=True):
        low, high = np.quantile(entry["x"], (0.001, 0.999), axis=0)
        centre, half = (low + high) / 2, 0.58 * (high - low).max()
        extent = np.stack([centre - half, centre + half], axis=-1).ravel()
        # Densities at the middles of 240 x 240 pixels.
        ticks = (np.arange(240) + 0.5) / 120 - 1
        grid = (centre + half * np.stack(np.meshgrid(ticks, ticks), axis=-1)).reshape(-1, 2)
        shown = {"true density": (entry["truth"], truth[name]), **entry["flows"]}
        images = {k: np.exp(f(grid)).reshape(240, 240) for k, (f, _) in shown.items()}
        top = 1.2 * images["true density"].max()
        for axis, column in zip(line, columns, strict=True):
            axis.set(xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:], aspect="equal")
            if column == "data":
                axis.plot(*entry["x"][:4000].T, ",", color="black", alpha=0.6)
                axis.set_ylabel(name, fontsize=11)
            elif column in images:
                axis.imshow(
                    images[column], origin="lower", extent=extent, cmap="magma", vmin=0, vmax=top
                )
                axis.set_xlabel(f"{shown[column][1]:.3f} nats".replace("-", "\N{MINUS SIGN}"))
            else:
                axis.set_axis_off()
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=11)
    if len(columns) > 3:
        note = "under each density: its mean logarithm on 20,000 fresh points; one scale per row"
        figure.supxlabel(note, fontsize=9, color="dimgray")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    # A palette makes a file for the docs of one five times as large.
    small = Image.open(drawn).convert("RGB").quantize(32, dither=Image.Dither.NONE)
    small.save(folder / "toy_densities.png", optimize=True)
    plt.close(figure)


def train(params, log_prob, data: dict[str, jax.Array], options) -> tuple[Any, dict[str, Any]]:
    r"""Maximum likelihood for ``options.minutes`` of wall-clock time, for any flow.

    The step size at step i of a call is :math:`r (1 + \cos \pi s) / 2`, where s is the share of
    the budget spent before the call plus i times the share of one step of the call before. Steps
    with a loss or gradient that is not finite change nothing.

    :return: the parameters of the best validation score, and the record of the run.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.scale_by_adam())
    budget = 60 * options.minutes
    start = time.perf_counter()

    @jax.jit
    def run(params, state, key, spent, pace, rows):
        def step(carry, scanned):
            params, state, skipped = carry
            i, key = scanned
            batch = rows[jax.random.randint(key, (options.batch,), 0, len(rows))]
            loss, grads = jax.value_and_grad(lambda p: -log_prob(p, batch).mean())(params)
            updates, new_state = optimizer.update(grads, state, params)
            share = jnp.minimum(spent + i * pace, 1.0)
            rate = options.rate * 0.5 * (1 + jnp.cos(jnp.pi * share))
            new_params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            ok = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
            params, state = jax.tree.map(
                lambda new, old: jnp.where(ok, new, old), (new_params, new_state), (params, state)
            )
            return (params, state, skipped + ~ok), jnp.where(ok, loss, 0.0)

        scanned = jnp.arange(STEPS_PER_CALL), jax.random.split(key, STEPS_PER_CALL)
        carry, losses = jax.lax.scan(step, (params, state, jnp.zeros((), int)), scanned)
        return *carry, losses.mean()

    state, score = optimizer.init(params), scorer(log_prob)
    compiled = run.lower(params, state, jax.random.key(0), 0.0, 0.0, data["train"]).compile()
    best, best_val = params, float(score(params, data["val"]).mean())
    compile_s = time.perf_counter() - start

    key, loss = jax.random.key(options.seed + 1), math.nan
    steps, skipped, checks, calls = 0, 0, 0, []
    while (spent := (time.perf_counter() - start) / budget) < 1:
        if calls and spent * VALIDATIONS >= checks + 1:
            checks, val = int(spent * VALIDATIONS), float(score(params, data["val"]).mean())
            print(f"    {spent:4.0%}  step {steps:7d}  training {-loss:.4f}  validation {val:.4f}")
            if val > best_val:
                best, best_val = params, val
        before = time.perf_counter()
        key, call_key = jax.random.split(key)
        pace = min(calls[-1] / budget / STEPS_PER_CALL, 1.0) if calls else 0.0
        outputs = compiled(params, state, call_key, spent, pace, data["train"])
        params, state, bad, loss = jax.block_until_ready(outputs)
        steps, skipped = steps + STEPS_PER_CALL, skipped + int(bad)
        calls.append(time.perf_counter() - before)
    seconds = time.perf_counter() - start
    val = float(score(params, data["val"]).mean())
    if val > best_val:
        best, best_val = params, val
    # What the first calls after a warm one promise; less came if the machine was disturbed.
    planned = STEPS_PER_CALL * (budget - compile_s) / np.median(calls[1:6] or calls)
    return best, {
        "steps": steps,
        "steps planned": int(planned),
        "train s": seconds,
        "compile s": compile_s,
        "ms per step": 1e3 * np.median(calls) / STEPS_PER_CALL,
        "skipped": skipped,
        "validation": best_val,
    }


def power(options) -> None:
    data = load_power()
    print({name: rows.shape for name, rows in data.items()})
    baseline = gaussian(data)
    rows = [{"flow": "Gaussian", **score_of(baseline)}]
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in data.items()}
    recipe = POWER[options.preset]
    scores = {}
    for library in ("ours", "flowjax"):
        label = f"{recipe.name}, {library}"
        if options.filter not in label:
            continue
        print(label)
        jax.clear_caches()
        build = recipe.ours if library == "ours" else recipe.flowjax
        params, log_prob = split(build(jax.random.key(options.seed)))
        best, record = train(params, log_prob, arrays, options)
        scores[library] = np.asarray(scorer(log_prob)(best, arrays["test"]), float)
        rows.append(
            {"flow": label, **score_of(scores[library]), **record, "parameters": count(params)}
        )
        report(rows, options)
    if len(scores) == 2:
        gap = scores["ours"] - scores["flowjax"]
        rows.append({"flow": "ours - flowjax", **score_of(gap)})
        report(rows, options)
    published = ", ".join(f"{name} {nats}" for name, nats in PUBLISHED.items())
    finish(rows, options, f"Published, of full training: {published}.")


def score_of(values: np.ndarray) -> dict[str, float]:
    return {"test nats": values.mean(), "s.e.": values.std() / math.sqrt(len(values))}


def cell(name: str, value: Any) -> str:
    if value is None or isinstance(value, str | int):
        return "" if value is None else str(value)
    return f"{value:.{1 if name.endswith(' s') else 4}f}"


def markdown(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[cell(name, row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(rows: list[dict[str, Any]], options) -> None:
    """Print the last row and write all of them so far."""
    print("  ".join(f"{name} {cell(name, value)}" for name, value in rows[-1].items()), flush=True)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "run"}
        record = {"machine": machine(), "versions": versions(), "options": settings}
        options.json.write_text(json.dumps({**record, "rows": rows}, indent=2, default=str))
        options.json.with_suffix(".md").write_text(markdown(rows) + "\n")


def finish(rows: list[dict[str, Any]], options, remark: str = "") -> None:
    if not rows:
        sys.exit(f"No row contains {options.filter!r}.")
    print("\n" + markdown(rows) + "\n" + remark)


def machine() -> str:
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--seed", type=int, default=0, help="of data, weights and batches, default 0")
    both.add_argument("--filter", default="", help="only rows whose name contains this")
    both.add_argument("--json", type=Path, help="file for the results; markdown goes beside it")
    for name, run, help in (
        ("toy", toy, "five densities of the plane"),
        ("power", power, "UCI household power, for a given time"),
    ):
        command = commands.add_parser(name, help=help, parents=[both])
        command.set_defaults(run=run)
        if name == "toy":
            command.add_argument("--epochs", type=int, default=100, help="default 100")
            command.add_argument("--batch", type=int, default=500, help="rows, default 500")
            command.add_argument("--rate", type=float, default=2e-3, help="step size, default 2e-3")
            command.add_argument("--plot", type=Path, help="folder for a picture of our flows")
        else:
            command.add_argument("--minutes", type=float, default=10, help="each, default 10")
            command.add_argument("--batch", type=int, default=512, help="rows, default 512")
            command.add_argument("--rate", type=float, help="step size; default by preset")
            command.add_argument("--preset", choices=POWER, default="cpu", help="default cpu")
    options = parser.parse_args()
    if options.command == "toy" and (18_000 % options.batch or 2_000 % options.batch):
        parser.error("--batch: expected a divisor of 2,000; flowjax drops a last partial batch.")
    if options.command == "power" and options.rate is None:
        options.rate = 3e-4 if options.preset == "full" else 1e-3
    try:
        print(f"{machine()}, load {os.getloadavg()[0]:.1f};", *map(" ".join, versions().items()))
    except metadata.PackageNotFoundError as error:
        sys.exit(f'{error.name} is missing; install the extra: pip install -e ".[peers]"')
    jax.config.update("jax_enable_compilation_cache", False)
    options.run(options)


if __name__ == "__main__":
    main()
