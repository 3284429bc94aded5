"""The bounds of the dependencies, and the interpreters that are named."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent


def test_lower_bounds_are_the_versions_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {req.name: req.specifier for req in map(Requirement, project["dependencies"])}
    lines = (ROOT / "lowest.txt").read_text().splitlines()
    pins = {
        req.name: str(req.specifier).removeprefix("==")
        for req in (Requirement(line) for line in lines if not line.startswith("#"))
    }
    assert bounds.keys() == pins.keys()
    for name, pin in pins.items():
        assert bounds[name] == SpecifierSet(f">={pin}"), name
