"""Speed of numpyro_flows beside other libraries: the same flow, the same programs, one run.

    pip install -e ".[peers]"
    python benchmarks/peers.py                       # all rows, on JAX's default device
    python benchmarks/peers.py --filter sample --rounds 100 --json peers.json

``CASES`` lists flows that several libraries offer, at the same sizes and otherwise at each
library's defaults. Each library builds three programs, in float32 and jitted, with the flow's
parameters as arguments:

- ``train step``: value and gradient of the mean negative log-likelihood of a batch and an update
  by ``optax.adam(1e-3)``; parameters and optimiser state go in and come out;
- ``log_prob``: log density of a batch; ``sample``: as many draws.

A peer may offer variants of a program: flowjax flows built with ``invert=True`` or ``False``, and
its own training step beside a plain jitted one. All are timed, and the row takes the one of the
lowest median, marked ``*``. Weights are shaken, so no layer is trivial; results must be finite.

Compile time: trace, lower and compile with JAX's caches cleared, median of 3. Run time: in each
round every competitor makes the same number of calls, waiting for each result, in an order that
rotates, so that a disturbance of the machine hits all of them. The table gives medians over
rounds; ``ratio`` is ours / peer of these (below 1: ours is faster), and ``q25`` and ``q75`` are
quartiles of the ratios of single rounds: how far to trust it.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import numpyro_flows as nf

PACKAGES = ("numpyro_flows", "flowjax", "jax", "jaxlib", "numpyro", "equinox", "optax")
BLOCK_S = 0.02  # shortest time that one competitor's calls in a round should take
COLUMNS = ("ours ms", "peer ms", "ratio", "q25", "q75", "ours compile s", "peer compile s")
COLUMNS += ("peer variants, ms",)
OPTIMIZER = optax.adam(1e-3)


class Program:
    """A jitted function of ``args``; the first ``carried`` outputs are the next call's first."""

    def __init__(self, function, *args, carried: int = 0, lower=None):
        self.function, self.args, self.carried = function, list(args), carried
        self.lower = lower or function.lower

    def compile(self) -> float:
        """Seconds to trace, lower and compile."""
        jax.clear_caches()
        start = time.perf_counter()
        self.lower(*self.args).compile()
        return time.perf_counter() - start

    def run(self, calls: int) -> float:
        """Seconds per call."""
        start = time.perf_counter()
        for _ in range(calls):
            output = jax.block_until_ready(self.function(*self.args))
            if self.carried:
                self.args[: self.carried] = output[: self.carried]
        seconds = (time.perf_counter() - start) / calls
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output)):
            raise FloatingPointError("A program returned values that are not finite.")
        return seconds


Programs = dict[str, dict[str, Program]]  # by name and variant


class Case(NamedTuple):
    """One flow: builders, from the command's options, for ours and for each peer."""

    name: str
    ours: Callable[[argparse.Namespace], Programs]
    peers: dict[str, Callable[[argparse.Namespace], Programs]]


def shake(params):
    flat, unravel = ravel_pytree(params)
    return unravel(flat + 0.05 * jax.random.normal(jax.random.key(2), flat.shape))


def flow_programs(params, rest, options) -> dict[str, Program]:
    """The three programs of any JAX flow with ``log_prob`` and ``sample``, split in two."""
    params, x = shake(params), jax.random.normal(jax.random.key(1), (options.batch, options.dim))

    def log_prob(params, x):
        return eqx.combine(params, rest).log_prob(x)

    def sample(params, key):
        return eqx.combine(params, rest).sample(key, (options.batch,))

    def step(params, state, x):
        loss, grads = jax.value_and_grad(lambda params: -log_prob(params, x).mean())(params)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return {
        "train step": Program(jax.jit(step), params, OPTIMIZER.init(params), x, carried=2),
        "log_prob": Program(jax.jit(log_prob), params, x),
        "sample": Program(jax.jit(sample), params, jax.random.key(3)),
    }


def our_programs(flow: nf.FlowDistribution, options) -> Programs:
    return {name: {"": p} for name, p in flow_programs(*nf.partition(flow), options).items()}


def flowjax_programs(build: Callable[..., Any], options) -> Programs:
    """Programs of the flow that ``build(invert=...)`` makes."""
    import paramax
    from flowjax.train.losses import MaximumLikelihoodLoss
    from flowjax.train.train_utils import step

    loss = MaximumLikelihoodLoss()

    def own(step, static, params, state, x):
        return step(params, static, x, optimizer=OPTIMIZER, opt_state=state, loss_fn=loss)

    programs: Programs = {"train step": {}, "log_prob": {}, "sample": {}}
    for invert in (True, False):
        params, static = eqx.partition(  # as flowjax.train.fit_to_data does
            build(invert=invert),
            eqx.is_inexact_array,
            is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
        )
        for name, program in flow_programs(params, static, options).items():
            programs[name][f"invert={invert}"] = program
        args = programs["train step"][f"invert={invert}"].args
        programs["train step"][f"invert={invert} own step"] = Program(
            partial(own, step, static), *args, carried=2, lower=partial(own, step.lower, static)
        )
    return programs


def our_realnvp(options) -> Programs:
    key, sizes = jax.random.key(0), {"depth": options.depth, "hidden": options.hidden}
    return our_programs(nf.realnvp(key, options.dim, **sizes), options)


def flowjax_realnvp(options) -> Programs:
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    build = partial(
        coupling_flow,
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(options.dim)),
        flow_layers=options.depth,
        nn_width=options.hidden[0],
        nn_depth=len(options.hidden),
    )
    return flowjax_programs(build, options)


CASES = (Case("realnvp", our_realnvp, {"flowjax": flowjax_realnvp}),)


def compare(ours: dict[str, Program], theirs: dict[str, Program], rounds: int) -> dict[str, Any]:
    """One row of the table."""
    programs = [*ours.values(), *theirs.values()]
    compiles = [np.median([program.compile() for _ in range(3)]) for program in programs]
    warm = [program.run(3) for _ in range(2) for program in programs]
    calls = max(3, math.ceil(BLOCK_S / min(warm)))
    times = np.zeros((rounds, len(programs)))
    for i in range(rounds):
        for j in np.roll(np.arange(len(programs)), i):
            times[i, j] = programs[j].run(calls)
    our_ms, *peer_ms = 1e3 * np.median(times, axis=0)
    best = int(np.argmin(peer_ms))
    variants = [f"{name} {ms:.3f}" for name, ms in zip(theirs, peer_ms, strict=True)]
    variants[best] = "*" + variants[best]
    ratios = [our_ms / peer_ms[best], *np.quantile(times[:, 0] / times[:, 1 + best], (0.25, 0.75))]
    values = our_ms, peer_ms[best], *ratios, compiles[0], compiles[1 + best], ", ".join(variants)
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"dim": 16, "depth": 8, "batch": 512, "rounds": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64], help="default 64 64")
    parser.add_argument("--filter", default="", help="only rows whose name contains this")
    parser.add_argument("--json", type=Path, help="file for the same results")
    options = parser.parse_args()
    if len(set(options.hidden)) != 1:
        parser.error("--hidden: expected equal widths; flowjax has one for all layers.")

    jax.config.update("jax_enable_compilation_cache", False)
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    try:
        versions = {name: metadata.version(name) for name in PACKAGES}
    except metadata.PackageNotFoundError as error:
        sys.exit(f'{error.name} is missing; install the extra: pip install -e ".[peers]"')
    print(f"{device}, load {os.getloadavg()[0]:.1f};", *map(" ".join, versions.items()))
    print(options)
    rows = []
    for case in CASES:
        ours = case.ours(options)
        for peer, build in case.peers.items():
            for name, theirs in build(options).items():
                label = f"{case.name} {name} / {peer}"
                if options.filter in label:
                    rows.append({"row": label, **compare(ours[name], theirs, options.rounds)})
    cells = [[f"{v:.3f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    cells.insert(0, ["row", *COLUMNS])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    if options.json:
        record = {"device": device, "versions": versions, "options": vars(options), "rows": rows}
        options.json.write_text(json.dumps(record, indent=2, default=str))


if __name__ == "__main__":
    main()
