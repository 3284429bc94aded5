"""What docs/extending.md adds, added.

A new map, transform or recipe is one file, one export line and one case; a preconditioner is one
function and a sampler one class, in a file of the user's own.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"```python\n# (\S+?)(?:, in (\w+))?\n(.*?)```", re.DOTALL)

FILES = ("tests/test_contract.py", "tests/test_elementwise.py", "tests/test_zoo.py")
ADDED = ("Hyperbola", "PlaneRotations", "bent", "laplace")
FOUND = (
    "test_every_map_has_a_case[Hyperbola]",
    "test_derivatives[hyperbola]",
    "test_every_transform_has_a_case[PlaneRotations]",
    "test_contract[PlaneRotations--full-float64]",
    "test_every_recipe_has_a_case[bent]",
    "test_a_recipe_from_identity_to_density[bent]",
    "numpyro_flows.elementwise.hyperbola.Hyperbola",
    "numpyro_flows.transforms.rotations.PlaneRotations",
    "numpyro_flows.recipes.bent.bent",
    "laplace.laplace",
)


SAMPLER = "examples/mclmc.py"


@pytest.fixture(scope="module")
def all_blocks():
    found = BLOCK.findall(GUIDE.read_text())
    assert len(found) == GUIDE.read_text().count("```python")
    return found


@pytest.fixture(scope="module")
def blocks(all_blocks):
    """Those that are files, or are added to one."""
    return [block for block in all_blocks if block[0] != SAMPLER]


def test_the_sampler_is_that_of_the_example(all_blocks):
    (text,) = [text for path, _, text in all_blocks if path == SAMPLER]
    assert text in (ROOT / SAMPLER).read_text()
    assert len(text.splitlines()) < 80


def test_each_addition_is_a_file_an_export_line_and_a_case(blocks):
    kinds = []
    for path, place, text in blocks:
        if path.endswith("__init__.py"):
            assert text.count("\n") == 1
            kinds.append("export")
        elif place:
            (ROOT / path).read_text().index(f"\n{place} = {{\n")
            assert re.fullmatch(r"    \S.*\n(?:        .*\n    },\n)?", text)  # one entry
            kinds.append("case")
        else:
            assert not (ROOT / path).exists()
            kinds.append("file")
    assert kinds == [*3 * ["file", "export", "case"], "file"]


def test_the_tests_find_what_was_added_and_pass(blocks, tmp_path):
    for name in ("numpyro_flows", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, place, text in blocks:
        file = tmp_path / path
        old = file.read_text() if file.exists() else ""
        head = f"\n{place} = {{\n"
        file.write_text(old.replace(head, head + text) if place else old + text)
    new = [path for path, place, _ in blocks if not (ROOT / path).exists()]
    options = ("-v", "-p", "no:cacheprovider", "-k", " or ".join(ADDED))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *FILES, *new],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    passed = re.findall(r"::(\S+) PASSED", run.stdout)
    assert set(FOUND) <= set(passed)


def test_the_linters_pass_on_what_was_added(blocks, tmp_path):
    files = [(path, text) for path, place, text in blocks if not place and "__init__" not in path]
    for path, text in files:
        (tmp_path / Path(path).name).write_text(text)
    config = ("--config", str(ROOT / "pyproject.toml"), "--no-cache", str(tmp_path))
    for command in (("check",), ("format", "--check")):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *config], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout
