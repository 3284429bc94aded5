"""The README's examples run, in their order, as one program."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_there_is_an_example_for_each_use():
    assert len(blocks()) == 4


@pytest.mark.slow
def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks():
        exec(block, names)
    assert (tmp_path / "crescent.flow").exists()
    assert names["mcmc"].get_samples()["theta"].shape == (1000, 4)
    import numpyro

    with numpyro.handlers.seed(rng_seed=0):
        names["next_study"](names["y"])
