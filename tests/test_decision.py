"""Whether FlowNUTS trains a flow: the pace of pilot chains, and what it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from kernels import SMALL
from numpyro.infer import MCMC

import numpyro_flows as nf
from numpyro_flows.infer.fisher import Scored
from numpyro_flows.infer.learning import decide
from numpyro_flows.infer.pilots import Pace, Pilots, pace_of


def pilots(x, steps=7, divergent=0):
    num = x.shape[0] * x.shape[1]
    draws = Scored(jnp.asarray(x), jnp.zeros_like(x))
    return Pilots(draws, jnp.array(2 * num * steps), jnp.array(num * steps), jnp.array(divergent))


def test_independent_draws_cost_their_own_steps():
    x = np.random.default_rng(0).normal(size=(8, 500, 3))
    pace = pace_of(pilots(x, divergent=40))
    np.testing.assert_allclose(pace.per_effective, 7, rtol=0.15)
    assert pace.r_hat < 1.01
    assert pace.divergences == 0.01


def test_the_slowest_coordinate_sets_the_pace():
    """An autoregression of order one has (1 + r) / (1 - r) draws for one effective draw."""
    rng, r = np.random.default_rng(0), 0.9
    x = rng.normal(size=(8, 4000, 2))
    for t in range(1, x.shape[1]):
        x[:, t, 1] = r * x[:, t - 1, 1] + (1 - r**2) ** 0.5 * x[:, t, 1]
    np.testing.assert_allclose(pace_of(pilots(x)).per_effective, 7 * 19, rtol=0.15)


def test_chains_that_disagree_or_stand_still():
    x = np.random.default_rng(0).normal(size=(8, 100, 2))
    apart = x + np.arange(8)[:, None, None]
    assert pace_of(pilots(apart)).r_hat > 1.5
    still = np.concatenate([x, np.ones((8, 100, 1))], axis=-1)
    assert pace_of(pilots(still)).per_effective == np.inf


@pytest.mark.parametrize(
    ("pace", "num_wanted", "pays"),
    [
        (Pace(30.0, 1.0, 0.0), 4000, False),  # 88,000 gradients
        (Pace(30.0, 1.0, 0.0), 40_000, True),
        (Pace(500.0, 1.0, 0.0), 4000, True),
        (Pace(6.0, 1.0, 0.0), 10**9, False),  # as fast as NUTS is on a normal
        (Pace(6.0, 1.2, 0.0), 100, True),
        (Pace(6.0, np.inf, 0.0), 100, True),
        (Pace(6.0, 1.0, 0.02), 100, True),
        (Pace(np.inf, 1.0, 0.0), 100, True),
    ],
)
def test_what_is_saved_is_weighed_against_what_it_takes(pace, num_wanted, pays):
    found, why = decide(pace, num_wanted, 512_000)
    assert found is pays
    assert why.startswith("a flow" if pays else "no flow")


def kernel_after(model, **settings):
    kernel = nf.FlowNUTS(model, SMALL, num_steps=100, progress_bar=False, **settings)
    MCMC(kernel, num_warmup=50, num_samples=10, progress_bar=False).run(jax.random.key(0))
    return kernel.report()


def banana():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(0.5 * x**2, 1.0))


def funnel():
    v = numpyro.sample("v", dist.Normal(0.0, 3.0))
    numpyro.sample("x", dist.Normal(jnp.zeros(9), jnp.exp(v / 2)).to_event(1))


def test_a_bend_that_nuts_follows_needs_no_flow():
    report = kernel_after(banana)
    assert 0.3 < report.ess < 0.95
    assert not report.uses_flow
    assert report.trials == ()
    assert "Decided: NUTS moves well behind the affine map." in str(report)


@pytest.mark.slow
def test_a_funnel_needs_one_however_short_the_run():
    report = kernel_after(funnel)
    assert "they do not follow the posterior" in report.decision
    assert any(trial.is_flow for trial in report.trials)


@pytest.mark.slow
def test_a_flow_that_was_asked_for_is_trained():
    report = kernel_after(banana, train="vi")
    assert [trial.name for trial in report.trials] == ["flow by ELBO"]
    assert report.decision == ""
