"""All benchmarks in one go on one machine, and one page of what they printed.

    python benchmarks/run.py                     # or `make benchmarks`: hours
    python benchmarks/run.py speed start-up      # some of the sections
    python benchmarks/run.py --page              # render the page again from what is there
    python benchmarks/run.py --guard             # minutes: has a ratio to a peer worsened?

Each script runs as a process of its own, one after the other. What it printed, its command, date,
load and seconds go into ``build/benchmarks/results.json`` after each one, so that an interrupted
run goes on where it ended (``--again`` forgets it); ``build/benchmarks/index.md`` is the page. A
script that fails, or whose data or peers are not here, is on the page with what it said.

``--guard`` times training step, density and draws beside flowjax, and fails where a ratio is more
than 25 % above that of ``ratios.json``, which are the figures of README.md.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESULTS = HERE.parent / "build" / "benchmarks"
PACKAGES = ("numpyro_flows", "jax", "numpyro", "equinox", "optax", "diffrax", "numpy", "scipy")
PEERS = ("flowjax", "zuko", "normflows", "tfp-nightly", "nutpie", "blackjax", "pymc")
#: How much a ratio of times may grow: what a busy machine changes is below that.
TOLERANCE = 1.25


class Job(NamedTuple):
    """A script with its arguments, in a section of the page."""

    section: str
    command: str


JOBS = (
    Job("speed", "peers.py"),
    Job("densities", "density.py toy"),
    Job("densities", "density.py power"),
    Job("posteriors", "posteriors.py --guides all"),
    Job("posteriors", "potentials.py"),
    Job("posteriors", "hierarchies.py --samplers"),
    Job("posteriors", "dimensions.py"),
    Job("hmc", "mcmc.py --samplers ours nuts blackjax-lowrank nutpie-lowrank"),
    Job("hmc", "mcmc.py funnel_101 --samplers ours nuts nutpie"),
    Job("hmc", "mcmc.py two_modes --samplers jumps ours"),
    Job("images", "images.py peers"),
    Job("images", "images.py compile"),
    Job("continuous", "continuous.py trace"),
    Job("continuous", "continuous.py toy"),
    Job("continuous", "continuous.py penalties"),
    Job("start-up", "startup.py"),
    Job("start-up", "startup.py --memory"),
    Job("start-up", "startup.py --imports"),
    Job("scale", "posteriors.py many_schools"),
    Job("scale", "scale.py mesh"),
    Job("scale", "scale.py many"),
    Job("scale", "scale.py disk"),
    Job("limits", "limits.py stress"),
    Job("limits", "limits.py deep"),
    Job("limits", "limits.py compile"),
)
SECTIONS = tuple(dict.fromkeys(job.section for job in JOBS))


def versions() -> dict[str, str]:
    """Of the packages and the peers; of a peer that is not here, that it is not."""
    found = {"python": platform.python_version()}
    for name in PACKAGES + PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> str:
    import jax

    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}"


def run(command: str) -> dict[str, Any]:
    """Run a script of this folder; what it printed, and when and how long."""
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "load": os.getloadavg()[0],
    }
    start = time.perf_counter()
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], capture_output=True, text=True
    )
    said = done.stdout if done.returncode == 0 else done.stdout + done.stderr[-2000:]
    record |= {"seconds": time.perf_counter() - start, "rc": done.returncode, "output": said}
    return record


def page(results: dict[str, Any]) -> str:
    """The page: the machine, then each section with its commands and what they printed."""
    lines = ["# Benchmarks", "", results["machine"], "", "| package | version |", "|---|---|"]
    lines += [f"| {name} | {version} |" for name, version in results["versions"].items()]
    for section in SECTIONS:
        commands = [job.command for job in JOBS if job.section == section]
        if not any(command in results["runs"] for command in commands):
            continue
        lines += ["", f"## {section.capitalize()}"]
        for command in commands:
            if (one := results["runs"].get(command)) is None:
                continue
            ended = "" if one["rc"] == 0 else f" It failed with code {one['rc']}."
            lines += [
                "",
                f"`python benchmarks/{command}`: {one['date']}, load {one['load']:.1f} at its "
                f"start, {one['seconds']:.0f} s.{ended}",
                "",
                "```text",
                one["output"].rstrip().replace("```", "'''"),
                "```",
            ]
    return "\n".join(lines) + "\n"


def worsened(rows: list[dict[str, Any]], before: dict[str, float]) -> list[str]:
    """Rows whose ratio to a peer is above what it was by more than the tolerance."""
    return [
        f"{row['row']}: ratio {row['ratio']:.3f}, was {before[row['row']]:.3f}"
        for row in rows
        if row["row"] in before and row["ratio"] > TOLERANCE * before[row["row"]]
    ]


def guard() -> None:
    """Time the rows of ``ratios.json``, and fail if one has worsened."""
    before = json.loads((HERE / "ratios.json").read_text())
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "guard.json"
    one = run(f"peers.py --rounds 12 --filter flowjax --json {file}")
    print(one["output"])
    if one["rc"]:
        sys.exit(one["rc"])
    rows = json.loads(file.read_text())["rows"]
    if missing := before.keys() - {row["row"] for row in rows}:
        sys.exit(f'Not timed: {sorted(missing)}. Install the peers: pip install -e ".[peers]"')
    if found := worsened(rows, before):
        sys.exit("Slower beside flowjax than before:\n" + "\n".join(found))
    print(f"{len(before)} ratios, none above {TOLERANCE} times what it was.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--again", action="store_true", help="forget what ran before")
    parser.add_argument("--page", action="store_true", help="only render the page")
    parser.add_argument("--guard", action="store_true", help="only look for ratios that worsened")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"sections: {sorted(unknown)} are none of {', '.join(SECTIONS)}.")
    if options.guard:
        return guard()
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "results.json"
    results = {"machine": machine(), "versions": versions(), "runs": {}}
    if file.exists() and not options.again:
        results["runs"] = json.loads(file.read_text())["runs"]
    for job in JOBS:
        wanted = not options.sections or job.section in options.sections
        if options.page or not wanted or job.command in results["runs"]:
            continue
        print(f"{job.command} ...", flush=True)
        results["runs"][job.command] = run(job.command)
        file.write_text(json.dumps(results, indent=1))
    (RESULTS / "index.md").write_text(page(results))
    print(RESULTS / "index.md")


if __name__ == "__main__":
    main()
