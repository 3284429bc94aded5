"""Moves of moments under importance weights, and what a verdict makes of them."""

from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.autoguide import AutoDiagonalNormal
from scipy import stats

import numpyro_flows as nf
from numpyro_flows.diagnostics import moment_shifts

KEY = jax.random.key(0)
SMALL = partial(nf.realnvp, depth=2, hidden=(8,))


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 0.9), (0.3, 0.8), (-0.2, 0.7)])
def test_the_moves_are_those_of_the_target(loc, scale):
    z = np.random.default_rng(0).normal(size=(100_000, 2))
    log_weights = stats.norm.logpdf(z[:, 1], loc, scale) - stats.norm.logpdf(z[:, 1])
    shifts = moment_shifts({"z": z, "constant": np.ones(len(z))}, log_weights)
    assert shifts.mean.value == pytest.approx(loc / scale, abs=4 * shifts.mean.error + 1e-6)
    assert shifts.log_sd.value == pytest.approx(np.log(scale), abs=4 * shifts.log_sd.error)
    assert shifts.log_sd.name == "z[1]"
    assert shifts.bound == max(shifts.mean.bound, shifts.log_sd.bound)


def test_the_errors_are_the_spread_over_repetitions():
    def once(seed):
        z = np.random.default_rng(seed).normal(size=2000)
        return moment_shifts({"z": z}, 0.5 * z)

    found = [once(seed) for seed in range(200)]
    for which in ("mean", "log_sd"):
        moves = [getattr(shifts, which) for shifts in found]
        spread = np.std([move.value for move in moves])
        assert np.mean([move.error for move in moves]) == pytest.approx(spread, rel=0.15)


def test_equal_weights_move_nothing_and_bad_ones_say_so():
    z = np.random.default_rng(0).normal(size=100)
    assert moment_shifts({"z": z}, np.zeros(100)).bound < 1e-12
    assert np.isnan(moment_shifts({"z": z}, np.full(100, np.nan)).bound)
    assert moment_shifts({"z": np.ones(100)}, np.zeros(100)).bound == 0
    with pytest.raises(ValueError, match="z: expected 100 draws, got 99"):
        moment_shifts({"z": z[1:]}, np.zeros(100))


def correlated():
    covariance = np.array([[1.0, 0.6], [0.6, 1.0]])
    numpyro.sample("x", dist.MultivariateNormal(np.zeros(2), covariance))


def test_a_guide_whose_moments_are_off_is_reliable_when_reweighted_alone():
    """Independent normals for correlated ones: k-hat is fine, sds are four fifths of the right."""
    guide = AutoDiagonalNormal(correlated, init_scale=0.5)
    fitted = nf.fit_guide(KEY, guide, num_steps=1500, progress_bar=False)
    assert fitted.khat < 0.7
    assert fitted.is_covered
    assert not fitted.trusted
    assert fitted.shifts.log_sd.name in ("x[0]", "x[1]")
    # The independent normal with the least divergence has the sds of the conditionals.
    assert fitted.shifts.log_sd.value == pytest.approx(-0.5 * np.log(1 - 0.6**2), abs=0.1)
    assert fitted.verdict.startswith("reliable when reweighted, not as drawn: ELBO")
    x = fitted.resample(KEY, 4000).draws["x"]
    np.testing.assert_allclose(x.std(0), 1.0, atol=0.1)


def test_a_guide_that_fits_is_reliable():
    fitted = nf.fit_guide(KEY, nf.AutoFlow(correlated, SMALL), progress_bar=False)
    assert fitted.trusted
    assert fitted.shifts.bound < 0.05
    assert fitted.verdict.startswith("reliable: ELBO")
