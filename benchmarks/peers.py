"""Speed of numpyro_flows beside other libraries: the same flow, the same programs, one run.

    pip install -e ".[peers]"
    python benchmarks/peers.py                       # all rows, on JAX's default device
    python benchmarks/peers.py --filter sample --rounds 100 --json peers.json

``CASES`` lists flows that several libraries offer, at the same sizes and otherwise at each
library's defaults; options on the command line replace the sizes of a case. Each library builds
three programs, in float32 and (in JAX) jitted, with the flow's parameters as arguments:

- ``train step``: value and gradient of the mean negative log-likelihood of a batch and an update
  by ``optax.adam(1e-3)``; parameters and optimiser state go in and come out;
- ``log_prob``: log density of a batch; ``sample``: as many draws.

A peer may offer variants of a program: flowjax flows built with ``invert=True`` or ``False``, and
its own training step beside a plain jitted one. All are timed, and the row takes the one of the
lowest median, marked ``*``. Weights are shaken, so no layer is trivial; results must be finite.
PyTorch's flows (zuko, normflows) run eagerly, as their users run them, with as many threads as
cores; a peer that is not installed is left out with a line that says so.

Compile time: trace, lower and compile with JAX's caches cleared, median of 3. Run time: in each
round every competitor makes the same number of calls, waiting for each result, in an order that
rotates, so that a disturbance of the machine hits all of them. The table gives medians over
rounds; ``ratio`` is ours / peer of these (below 1: ours is faster), and ``q25`` and ``q75`` are
quartiles of the ratios of single rounds: how far to trust it.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from libraries import (
    Program,
    Programs,
    flowjax_bnaf,
    flowjax_coupling,
    flowjax_maf,
    normflows_nsf,
    numpyro_bnaf,
    numpyro_maf,
    our_cnf,
    our_programs,
    ours,
    tfp_cnf,
    zuko_cnf,
    zuko_maf,
    zuko_nsf,
)

import numpyro_flows as nf

PACKAGES = ("numpyro_flows", "jax", "jaxlib", "numpyro", "equinox", "optax")
PEERS = ("flowjax", "zuko", "normflows", "tfp-nightly", "torch")
BLOCK_S = 0.02  # shortest time that one competitor's calls in a round should take
COLUMNS = ("ours ms", "peer ms", "ratio", "q25", "q75", "ours compile s", "peer compile s")
COLUMNS += ("peer variants, ms",)
PROGRAMS = ("train step", "log_prob", "sample")
SIZES = {"dim": 16, "depth": 8, "batch": 512, "num_bins": 8, "hidden": (64, 64)}
SIZES |= {"hidden_factors": (8, 8)}
IMPOSSIBLE = {("bnaf", "sample", "numpyro")}  # NumPyro's transform has no inverse


class Case(NamedTuple):
    """One flow: its sizes, and builders from these for ours and for each peer."""

    name: str
    sizes: dict[str, Any]
    ours: Callable[[argparse.Namespace], Programs]
    peers: dict[str, Callable[[argparse.Namespace], Programs]]
    only: str = ""  # the programs whose name contains this


MAF = {"dim": 64, "depth": 5, "hidden": (256, 256)}
MAF_PEERS = {
    "flowjax": flowjax_maf,
    "numpyro": numpyro_maf,
    "zuko": zuko_maf,  # normflows' layer is the other direction: it samples in parallel
}
CASES = (
    Case(
        "realnvp",
        {},
        ours(nf.realnvp, "depth", "hidden"),
        {"flowjax": flowjax_coupling},
    ),
    Case(
        "nsf",
        {},
        ours(nf.nsf, "depth", "hidden", "num_bins"),
        {
            "flowjax": partial(flowjax_coupling, spline=True),
            "zuko": zuko_nsf,
            "normflows": normflows_nsf,
        },
    ),
    Case("maf", MAF, ours(nf.maf, "depth", "hidden"), MAF_PEERS),
    Case(
        "maf D=256",
        {**MAF, "dim": 256},
        ours(nf.maf, "depth", "hidden"),
        {"flowjax": flowjax_maf, "numpyro": numpyro_maf},
        only="sample",
    ),
    Case(
        "bnaf",
        {"depth": 1},
        ours(nf.bnaf, "depth", "hidden_factors"),
        {"flowjax": flowjax_bnaf, "numpyro": numpyro_bnaf},
    ),
    Case(
        "cnf",
        {"dim": 2, "batch": 256},
        lambda options: our_programs(our_cnf(options), options),
        {"tfp": tfp_cnf, "zuko": zuko_cnf},
    ),
)


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
    for name in SIZES:
        many = isinstance(SIZES[name], tuple)
        parser.add_argument(f"--{name}", type=int, nargs="+" if many else None)
    parser.add_argument("--rounds", type=int, default=40, help="default 40")
    parser.add_argument("--filter", default="", help="only rows whose name contains this")
    parser.add_argument("--json", type=Path, help="file for the same results")
    options = parser.parse_args()
    given = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    for name in ("hidden", "hidden_factors"):
        if len(set(given.get(name, (1,)))) != 1:
            parser.error(f"--{name}: expected equal widths; flowjax has one for all layers.")

    jax.config.update("jax_enable_compilation_cache", False)
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    try:
        versions = {name: metadata.version(name) for name in PACKAGES}
    except metadata.PackageNotFoundError as error:
        sys.exit(f'{error.name} is missing; install the extra: pip install -e ".[peers]"')
    for name in PEERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    print(f"{device}, load {os.getloadavg()[0]:.1f};", *map(" ".join, versions.items()))
    rows = []
    for case in CASES:
        sizes = argparse.Namespace(**{**SIZES, **case.sizes, **given})
        built: dict[str, Programs] = {}
        for peer, build in case.peers.items():
            labels = {name: f"{case.name} {name} / {peer}" for name in PROGRAMS}
            wanted = [n for n in PROGRAMS if options.filter in labels[n] and case.only in n]
            if not wanted:
                continue
            try:
                theirs = build(sizes)
            except ImportError as error:
                print(f"{case.name} / {peer}: left out, {error}")
                continue
            built = built or case.ours(sizes)
            for name in wanted:
                if (case.name, name, peer) in IMPOSSIBLE:
                    continue
                try:
                    compared = compare(built[name], theirs[name], options.rounds)
                except FloatingPointError as error:  # an eager program checks each result
                    print(f"{labels[name]}: left out, {error}")
                    continue
                rows.append({"row": labels[name], **compared})
                print(
                    " ".join(f"{v:.3f}" if isinstance(v, float) else v for v in rows[-1].values())
                )
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
