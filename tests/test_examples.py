"""The examples run and show what they claim."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def printed(name, *options):
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run_example(name, folder):
    """What an example prints; it must also draw its picture."""
    pytest.importorskip("matplotlib")
    picture = folder / "picture.png"
    text = printed(name, "--picture", str(picture))
    assert picture.stat().st_size > 10_000
    return text


@pytest.mark.slow
def test_eight_schools(tmp_path):
    text = run_example("eight_schools", tmp_path)
    assert float(re.search(r"k-hat (\d+\.\d+)", text)[1]) < 0.7
    assert int(re.search(r"NeuTra: (\d+) times", text)[1]) >= 20
    assert int(re.search(r"NUTS after NeuTra +(\d+)", text)[1]) < 5


@pytest.mark.slow
def test_two_moons(tmp_path):
    text = run_example("two_moons", tmp_path)
    score = re.search(r"mean C2ST ([\d.]+)", text)
    if score is None:
        assert "No reference draws found" in text
        pytest.skip("the reference draws of sbibm are not here: set NUMPYRO_FLOWS_DATA")
    assert float(score[1]) <= 0.58


@pytest.mark.slow
def test_posterior_as_prior(tmp_path):
    text = run_example("posterior_as_prior", tmp_path)
    assert float(re.search(r"largest difference of a mean ([\d.]+) sd", text)[1]) < 0.3
    ratios = re.search(r"ratios of sds (.*)", text)[1].split(", ")
    assert all(0.8 < float(ratio) < 1.25 for ratio in ratios)


@pytest.mark.slow
def test_funnel(tmp_path):
    text = run_example("funnel", tmp_path)
    plain, flow = (
        [float(cell) for cell in re.search(rf"^{name} +(.*)", text, re.M)[1].split()]
        for name in ("NUTS", "FlowNUTS")
    )
    assert flow[2] > 50 * plain[2]
    assert 2.8 < flow[5] < 3.2


@pytest.mark.slow
def test_german_credit(tmp_path):
    folder = Path(os.environ.get("NUMPYRO_FLOWS_DATA") or EXAMPLES.parent.parent / "shared/data")
    if not (folder / "german_credit").is_dir():
        pytest.skip("the data is not here: set NUMPYRO_FLOWS_DATA")
    text = run_example("german_credit", tmp_path)
    plain, flow = (
        [float(cell) for cell in re.search(rf"^{name} +(.*)", text, re.M)[1].split()]
        for name in ("NUTS", "FlowNUTS")
    )
    assert flow[2] > 3 * plain[2]


@pytest.mark.slow
def test_calibration(tmp_path):
    text = run_example("calibration", tmp_path)
    assert re.search(r"99 more: .* 0 programs compiled", text)
    assert int(re.search(r"(\d+) of 100 are called reliable", text)[1]) >= 95
    assert all(float(p) > 0.001 for p in re.findall(r"uniform: p = ([\d.]+)", text))


@pytest.mark.slow
def test_augmented(tmp_path):
    text = run_example("augmented", tmp_path)
    errors = dict(re.findall(r"reflection, (\w+): largest error ([\d.]+)", text))
    assert float(errors["plain"]) > 0.9  # of 1: no flow of the line turns it round
    assert float(errors["augmented"]) < 0.1
    lost = dict(re.findall(r"disc, (\w+): .*points and ([\d.]+)% of the ring", text))
    assert float(lost["plain"]) > 0
    assert float(lost["augmented"]) == 0


@pytest.mark.slow
def test_molecules(tmp_path):
    picture = tmp_path / "molecules.png"
    quick = ("--epochs", "1", "--hidden", "32", "--num-samples", "1000", "--picture", str(picture))
    text = printed("molecules", *quick)
    found = re.search(r"held out at random ([\d.]+)", text)
    if found is None:
        assert "No QM9 graphs found" in text
        pytest.skip("the graphs of QM9 are not here: set NUMPYRO_FLOWS_DATA")
    assert float(found[1]) < 30  # 64.4 of the new flow
    valid = re.search(r"valid ([\d.]+)%", text)
    assert valid or "No RDKit" in text
    assert not valid or picture.stat().st_size > 10_000


@pytest.mark.slow
def test_mixed_table():
    text = printed("mixed_table", "--folds", "2")
    if "No German credit data found" in text:
        pytest.skip("the data is not here: set NUMPYRO_FLOWS_DATA")
    independent, _, flow = map(float, re.findall(r"log likelihood +(-[\d.]+)", text))
    assert flow > independent + 0.5
    assert float(re.search(r"conditional of the flow +area .* ([\d.]+)", text)[1]) > 0.7
    assert "keep the levels of all discrete columns: True" in text


@pytest.mark.slow
def test_mclmc():
    pytest.importorskip("blackjax", reason="a sampler of BlackJAX: the extra `samplers`")
    text = printed("mclmc")
    found = re.search(r"mean ([\d.]+) sd, ratios of sds ([\d.]+) to ([\d.]+)", text)
    if found is None:
        assert "No reference draws found" in text
        pytest.skip("the reference draws of posteriordb are not here: set NUMPYRO_FLOWS_DATA")
    off, low, high = map(float, found.groups())
    assert off < 0.1
    assert 0.92 < low < high < 1.08
