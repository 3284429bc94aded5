"""Pareto-smoothed importance weights, judged by ArviZ."""

import arviz
import numpy as np
import pytest

from numpyro_flows.diagnostics.psis import psis


def by_arviz(log_weights):
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.psislw(log_weights)
    from arviz_stats.base import array_stats

    return array_stats.psislw(-log_weights)  # it takes log likelihoods


# ArviZ 0.x rounds the length of the tail up and 1.x down: these sizes need no rounding.
@pytest.mark.parametrize("num", [60, 200, 10_000])
@pytest.mark.parametrize("kind", ["narrow", "normal", "heavy", "bounded", "shifted"])
def test_smoothed_weights_and_shape(kind, num):
    rng = np.random.default_rng(0)
    log_weights = {
        "narrow": lambda: rng.normal(0, 0.01, num),
        "normal": lambda: rng.normal(0, 1, num),
        "heavy": lambda: 2 * rng.standard_t(5, num),
        "bounded": lambda: -rng.exponential(size=num),
        "shifted": lambda: rng.normal(-1e4, 0.5, num),
    }[kind]()
    before = log_weights.copy()
    (smoothed, khat), (expected, expected_khat) = psis(log_weights), by_arviz(before.copy())
    np.testing.assert_allclose(khat, expected_khat, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(smoothed, expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_array_equal(log_weights, before)


def test_weights_that_overflow_have_no_moments():
    log_weights = 300 * np.random.default_rng(0).standard_cauchy(1000)
    smoothed, khat = psis(log_weights)
    assert khat == np.inf
    assert np.isfinite(smoothed).all()
