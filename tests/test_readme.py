"""The README's examples run, in their order, as one program."""

import re
from pathlib import Path

import pytest
from numpyro import handlers

README = Path(__file__).parent.parent / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_there_is_an_example_for_each_use():
    assert len(blocks()) == 7


@pytest.mark.slow
def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks():
        exec(block, names)
    assert (tmp_path / "crescent.flow").exists()
    assert names["fitted"].trusted
    assert names["corrected"]["theta"].shape == (1000, 4)
    assert handlers.seed(names["guide_of_rows"], 0)(names["y"])["theta"].shape == (4,)
    assert names["density_fit"].trusted
    assert names["evidence"].trusted
    assert names["mcmc"].get_samples()["theta"].shape == (1000, 4)
    with handlers.seed(rng_seed=0):
        names["next_study"](names["y"])
