"""The package as it is distributed: one version, one list of requirements, equal builds."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import numpyro_flows as nf

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == nf.__version__
    named = [path.name for path in ROOT.rglob("*.cff") if nf.__version__ in path.read_text()]
    assert not named


def test_the_conda_recipe_has_the_same_requirements():
    recipe = (ROOT / "conda" / "meta.yaml").read_text()
    run = re.search(r"  run:\n((?:    - .*\n)+)", recipe)[1]
    ours = dict(line.removeprefix("    - ").split() for line in run.splitlines())
    assert ours.pop("python") == PROJECT["requires-python"]
    theirs = {req.name: str(req.specifier) for req in map(Requirement, PROJECT["dependencies"])}
    assert ours == theirs


@pytest.mark.slow
def test_a_release_builds_and_runs_in_an_empty_environment(tmp_path):
    """Two builds are equal, and the wheel runs the README's examples by itself."""
    pytest.importorskip("build")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / ".ci" / "release.py"), "--folder", str(tmp_path / "dist")]
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is ready" in done.stdout
    assert {path.suffix for path in (tmp_path / "dist").iterdir()} == {".whl", ".gz"}
