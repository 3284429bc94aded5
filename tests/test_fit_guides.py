"""Guides on many data sets."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from programs import compiled_programs

import numpyro_flows as nf

KEY = jax.random.key(0)


def model(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x, 1.0).expand([3]).to_event(1), obs=y)


def test_each_data_set_has_its_posterior():
    """In closed form: mean sum(y) / 4, variance 1 / 4."""
    guide, ys = nf.AutoFlow(model), np.random.default_rng(0).normal(size=(3, 3))
    given = {"num_steps": 100, "num_draws": 1000, "progress_bar": False}
    with compiled_programs() as first:
        nf.fit_guides(KEY, guide, [(ys[0],)], **given)
    assert first
    with compiled_programs() as others:
        fits = nf.fit_guides(KEY, guide, [(y,) for y in ys], **given)
    assert not others
    assert guide.prototype_trace is None
    for y, fitted in zip(ys, fits, strict=True):
        draws = np.asarray(fitted.sample(KEY, (4000,))["x"])
        assert draws.mean() == pytest.approx(y.sum() / 4, abs=0.05)
        assert draws.var() == pytest.approx(0.25, abs=0.04)


def test_arguments_are_tuples():
    with pytest.raises(TypeError, match=r"list_of_args: expected a tuple .* got a float"):
        nf.fit_guides(KEY, nf.AutoFlow(model), [1.0, 2.0])
