"""The runner of the benchmarks: what it runs is there, its page and its guard say what happened."""

import importlib.util
import json
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def runner():
    spec = importlib.util.spec_from_file_location("run", BENCHMARKS / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_is_run():
    """Those that take no argument of a model that was trained before."""
    scripts = {path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()}
    run = {job.command.split()[0] for job in runner().JOBS}
    assert scripts - run == {"run.py", "outliers.py"}


def test_the_page_has_what_was_printed_and_what_failed():
    once = {"date": "2026-01-01T00:00+00:00", "load": 0.5, "seconds": 12.0}
    runs = {
        "peers.py": once | {"rc": 0, "output": "realnvp 0.75\n"},
        "limits.py deep": once | {"rc": 1, "output": "No data."},
    }
    text = runner().page({"machine": "cpu", "versions": {"zuko": "not installed"}, "runs": runs})
    assert "| zuko | not installed |" in text
    assert "## Speed" in text
    assert "## Hmc" not in text
    assert "```text\nrealnvp 0.75\n```" in text
    assert "It failed with code 1." in text


def test_the_guard_sees_a_ratio_that_worsened():
    before = json.loads((BENCHMARKS / "ratios.json").read_text())
    same = [{"row": name, "ratio": 1.2 * ratio} for name, ratio in before.items()]
    assert runner().worsened(same, before) == []
    slower = [{"row": name, "ratio": 1.3 * ratio} for name, ratio in before.items()]
    assert len(runner().worsened(slower, before)) == len(before)
