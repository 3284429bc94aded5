"""The examples of the README and the short ones of the site run, in order, as one program."""

import re
from pathlib import Path

import pytest
from numpyro import handlers

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": 3, "docs/howto/short.md": 4}


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_there_is_an_example_for_each_use():
    assert {page: len(blocks(page)) for page in PAGES} == PAGES


@pytest.mark.slow
def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("README.md"):
        exec(block, names)
    assert (tmp_path / "banana.flow").exists()
    assert names["fitted"].trusted
    assert names["corrected"]["theta"].shape == (1000, 4)
    assert names["mcmc"].get_samples()["theta"].shape == (4000, 4)
    for block in blocks("docs/howto/short.md"):
        exec(block, names)
    assert handlers.seed(names["guide_of_rows"], 0)(names["y"])["theta"].shape == (4,)
    assert names["density_fit"].trusted
    assert names["evidence"].trusted
    assert names["mcmc"].get_samples()["theta"].shape == (1000, 4)
    with handlers.seed(rng_seed=0):
        names["next_study"](names["y"])
