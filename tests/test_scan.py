"""Models with ``numpyro.contrib.control_flow.scan``, judged by exact normal answers."""

from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from scipy import stats

import numpyro_flows as nf

KEY = jax.random.key(0)
SMALL = partial(nf.realnvp, depth=2, hidden=(8,))
Y = np.array([0.9, 0.4, -0.2, 0.3, 1.1], np.float32)


def walk(y):
    """A random walk with an unknown drift, seen with noise."""
    drift = numpyro.sample("drift", dist.Normal(0.0, 1.0))

    def step(before, seen):
        x = numpyro.sample("x", dist.Normal(before + drift, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=seen)
        return x, 2 * x

    _, twice = scan(step, 0.0, y)
    numpyro.deterministic("twice", twice)


def observed(y):
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))

    def step(carry, seen):
        numpyro.sample("y", dist.Normal(level, 0.5), obs=seen)
        return carry, None

    scan(step, 0.0, y)


def exact(y):
    """Means, sds and log evidence: all is jointly normal. drift first, then x."""
    n = len(y)
    sums = np.tril(np.ones((n, n)))  # x = drift * (1, ..., n) + sums of innovations
    root = np.block([[np.ones((1, 1)), np.zeros((1, n))], [np.arange(1, n + 1)[:, None], sums]])
    prior = root @ root.T
    seen = prior[1:, 1:] + 0.25 * np.eye(n)
    gain = prior[:, 1:] @ np.linalg.inv(seen)
    posterior = prior - gain @ prior[1:]
    evidence = stats.multivariate_normal(np.zeros(n), seen).logpdf(y)
    return gain @ y, np.sqrt(np.diag(posterior)), float(evidence)


def assert_right(draws, tolerance=0.1):
    mean, sd, _ = exact(Y)
    flat = np.column_stack([np.asarray(draws["drift"])[:, None], np.asarray(draws["x"])])
    np.testing.assert_allclose((flat.mean(0) - mean) / sd, 0.0, atol=tolerance)
    np.testing.assert_allclose(np.log(flat.std(0) / sd), 0.0, atol=tolerance)
    np.testing.assert_allclose(draws["twice"], 2 * draws["x"], rtol=1e-5)


def test_latent_sites_inside():
    fitted = nf.fit_guide(KEY, nf.AutoFlow(walk, SMALL), Y, progress_bar=False)
    assert fitted.trusted
    assert fitted.elbo == pytest.approx(exact(Y)[2], abs=0.05)
    assert_right(fitted.sample(KEY, (10_000,)))


@pytest.mark.parametrize("elbo", [pytest.param(Trace_ELBO, marks=pytest.mark.slow), nf.STL_ELBO])
def test_under_svi(elbo):
    """The preconditioner fits already; steps must not lose it."""
    guide = nf.AutoFlow(walk, SMALL)
    svi = SVI(walk, guide, numpyro.optim.Adam(1e-4), elbo(num_particles=4))
    result = svi.run(KEY, 50, Y, progress_bar=False)
    assert np.mean(result.losses) == pytest.approx(-exact(Y)[2], abs=0.3)
    assert_right(guide.sample_posterior(KEY, result.params, Y, sample_shape=(5000,)), 0.15)


def test_observations_alone_inside():
    fitted = nf.fit_guide(KEY, nf.AutoFlow(observed, SMALL), Y, progress_bar=False)
    covariance = np.ones((len(Y), len(Y))) + 0.25 * np.eye(len(Y))
    evidence = stats.multivariate_normal(np.zeros(len(Y)), covariance).logpdf(Y)
    assert fitted.trusted
    assert fitted.elbo == pytest.approx(evidence, abs=0.02)


@pytest.mark.slow
def test_under_a_sampler():
    kernel = nf.FlowNUTS(walk, SMALL, progress_bar=False)
    mcmc = MCMC(kernel, num_warmup=300, num_samples=3000, progress_bar=False)
    mcmc.run(KEY, Y)
    assert_right(mcmc.get_samples(), 0.15)


def test_neutra_says_what_serves_instead():
    fitted = nf.fit_guide(KEY, nf.AutoFlow(walk, SMALL), Y, num_draws=500, progress_bar=False)
    mcmc = MCMC(NUTS(fitted.neutra().reparam(walk)), num_warmup=2, num_samples=2)
    with pytest.raises(ValueError, match=r"'x'.*`numpyro.contrib.control_flow`.*`nf.FlowNUTS"):
        mcmc.run(KEY, Y)
