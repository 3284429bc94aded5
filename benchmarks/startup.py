"""What is waited for before the first draw: programs, traces and seconds of whole processes.

    python benchmarks/startup.py                               # ten posteriors, all runners
    python benchmarks/startup.py arK --runners fit_guide nuts --repeats 3
    python benchmarks/startup.py --memory                      # ten fits in one process
    python benchmarks/startup.py --imports                     # beyond `import numpyro`

Each runner has a fresh process, without a compilation cache, and default settings; runners of a
posterior take turns. A line per posterior, runner and stage: programs that XLA compiled, runs of
the model's Python, seconds of tracing, lowering, compiling, the rest, and all. The second stage is
the same on other numbers of the same shapes, with a new guide, kernel and ``MCMC``. Then the
medians over posteriors, and the ratios of whole first stages to those of NUTS and of AutoIAFNormal.

- ``fit_guide``: ``nf.fit_guide(key, nf.AutoFlow(model), ...)``;
- ``flow_nuts``, ``nuts``: 4 vectorised chains of 1,000 draws after 1,000 iterations of warm-up;
- ``iaf``: NumPyro's ``AutoIAFNormal``, 5,000 steps of Adam, one particle, and 1,000 draws.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

RUNNERS = ("fit_guide", "flow_nuts", "nuts", "iaf")
CHAINS, WARMUP, DRAWS, STEPS = 4, 1000, 1000, 5000
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
#: Settings that would hide what a user waits for, or add to it.
DROPPED = ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE")
COLUMNS = ("programs", "traces", "trace", "lower", "compile", "run", "wall")


class Counter:
    """Programs, and seconds by JAX's own events, since the last :meth:`take`."""

    def __init__(self):
        import jax

        self.counts = dict.fromkeys(("programs", "traces"), 0)
        self.seconds = dict.fromkeys(EVENTS.values(), 0.0)
        self.begun = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event, duration, **_):
        if (name := EVENTS.get(event)) is not None:
            self.seconds[name] += duration
            self.counts["programs"] += name == "compile"

    def counted(self, model):
        def run(*args, **kwargs):
            self.counts["traces"] += 1
            return model(*args, **kwargs)

        return run

    def take(self) -> dict[str, float]:
        wall = time.perf_counter() - self.begun
        found = {**self.counts, **self.seconds, "run": wall - sum(self.seconds.values())}
        self.counts = dict.fromkeys(self.counts, 0)
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.begun = time.perf_counter()
        return {**found, "wall": wall}


def other_numbers(args):
    """The same kinds of arguments: floating arrays off by a thousandth, counts rotated."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)

    def moved(x):
        is_array = isinstance(x, np.ndarray | jax.Array) and x.ndim > 0
        if not (is_array and np.issubdtype(x.dtype, np.floating)):
            return x
        kind = jnp if isinstance(x, jax.Array) else np
        if (x == np.round(x)).all():
            return kind.roll(x, 1, axis=0)
        return kind.asarray(x * (1 + 1e-3 * rng.normal(size=x.shape)), x.dtype)

    return jax.tree.map(moved, args)


def run(runner: str, model, args, seed: int) -> None:
    import jax
    import numpyro
    from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
    from numpyro.infer.autoguide import AutoIAFNormal

    import numpyro_flows as nf

    key = jax.random.key(seed)
    if runner == "fit_guide":
        nf.fit_guide(key, nf.AutoFlow(model), *args, progress_bar=False)
    elif runner == "iaf":
        guide = AutoIAFNormal(model)
        svi = SVI(model, guide, numpyro.optim.Adam(3e-3), Trace_ELBO())
        params = svi.run(key, STEPS, *args, progress_bar=False).params
        jax.block_until_ready(Predictive(guide, params=params, num_samples=DRAWS)(key, *args))
    else:
        kernel = NUTS(model) if runner == "nuts" else nf.FlowNUTS(model, progress_bar=False)
        mcmc = MCMC(
            kernel,
            num_warmup=WARMUP,
            num_samples=DRAWS,
            num_chains=CHAINS,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(key, *args)
        jax.block_until_ready(mcmc.get_samples())


def child(runner: str, name: str, seed: int) -> None:
    """Both stages in this process, as JSON."""
    import posteriors

    target = posteriors.target(name)
    counter = Counter()
    model = counter.counted(target.model)
    run(runner, model, target.args, seed)
    first = counter.take()
    run(runner, model, other_numbers(target.args), seed)
    print(json.dumps({"first": first, "second": counter.take()}))


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in DROPPED}


def python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, check=True
    ).stdout


def line(cells) -> str:
    return "  ".join(
        f"{cell:<22}" if isinstance(cell, str) else f"{cell:>8.2f}".replace(".00", "   ")
        for cell in cells
    )


def compare(names: list[str], runners: list[str], repeats: int, path: str | None) -> None:
    found: dict[str, dict[str, list[dict]]] = {name: {r: [] for r in runners} for name in names}
    print(line(["posterior", "runner, stage"]), *(f"{c:>8}" for c in COLUMNS), sep="  ")
    for name in names:
        for repeat in range(repeats):
            for runner in runners:
                text = python(__file__, "--child", runner, name, str(repeat))
                result = json.loads(text.splitlines()[-1])
                found[name][runner].append(result)
                for stage, row in result.items():
                    cells = [name, f"{runner}, {stage}", *(row[column] for column in COLUMNS)]
                    print(line(cells), flush=True)
    print("\nMedians over posteriors:")

    def middle(name: str, runner: str, stage: str, column: str) -> float:
        return statistics.median(row[stage][column] for row in found[name][runner])

    for runner in runners:
        for stage in ("first", "second"):
            cells = [statistics.median(middle(n, runner, stage, c) for n in names) for c in COLUMNS]
            print(line(["", f"{runner}, {stage}", *cells]))
    for peer in ("nuts", "iaf"):
        for runner in ("fit_guide", "flow_nuts"):
            if {peer, runner} <= set(runners):
                ratios = [
                    middle(n, runner, "first", "wall") / middle(n, peer, "first", "wall")
                    for n in names
                ]
                print(f"{runner} / {peer}: median of ratios {statistics.median(ratios):.2f}")
    if path:
        with open(path, "w") as file:
            json.dump(found, file, indent=1)


def memory(names: list[str]) -> None:
    """Resident memory after each of some fits in this process."""
    import posteriors

    for name in names:
        target = posteriors.target(name)
        run("fit_guide", target.model, target.args, 0)
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * resource.getpagesize()
        print(f"{name:<24}{resident / 2**30:6.2f} GiB", flush=True)


def imports(repeats: int) -> None:
    """Seconds of imports, each in a process of its own, taking turns."""
    code = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    modules = ("numpyro", "numpyro, numpyro_flows")
    seconds = {module: [] for module in modules}
    for _ in range(repeats):
        for module in modules:
            seconds[module].append(float(python("-c", code.format(module))))
    plain, ours = (statistics.median(seconds[module]) for module in modules)
    print(f"import numpyro {plain:.2f} s, numpyro_flows {ours - plain:+.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("posteriors", nargs="*")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        runner, name, seed = options.child
        return child(runner, name, int(seed))
    if options.imports:
        return imports(max(5, options.repeats))
    import models

    names = options.posteriors or list(models.POSTERIORDB)
    if options.memory:
        return memory(names)
    return compare(names, options.runners, options.repeats, options.json)


if __name__ == "__main__":
    main()
