"""Observed elements of ``obs_mask=``, and others that a mask leaves without a density."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from numpyro.infer.autoguide import AutoNormal

import numpyro_flows as nf

KEY = jax.random.key(0)
SMALL = partial(nf.realnvp, depth=2, hidden=(8,))
Y = np.array([1.0, 2.0, 0.5, 1.5, 3.0, 0.1], np.float32)
MASK = np.array([1, 1, 0, 1, 0, 1], bool)


def normal(y, mask):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=mask)


def positive(y, mask):
    rate = numpyro.sample("mu", dist.Gamma(3.0, 2.0))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Exponential(rate), obs=y, obs_mask=mask)


def vectors(y, mask):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    rows = jnp.stack([y, y], -1)
    with numpyro.plate("n", len(y)):
        fn = dist.Normal(mu * jnp.ones(2), 1.0).to_event(1)
        numpyro.sample("y", fn, obs=rows, obs_mask=mask)


def subsampled(y, mask):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("n", 2 * len(y), subsample_size=len(y)), numpyro.handlers.mask(mask=mask):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def masked_rows(y, mask):
    """A latent value for each row, and the rows masked whole."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("n", len(y)), numpyro.handlers.mask(mask=mask):
        z = numpyro.sample("z", dist.Normal(mu, 0.6))
        numpyro.sample("y", dist.Normal(z, 0.8), obs=y)


def of_normals(y, mask, copies=1):
    """Posterior mean and sd of mu, and log evidence, of rows that are N(mu, 1)."""
    y = np.repeat(y[mask], copies)
    variance = 1 / (1 / 4 + len(y))
    evidence = dist.MultivariateNormal(jnp.zeros(len(y)), jnp.eye(len(y)) + 4.0).log_prob(y)
    return float(variance * y.sum()), variance**0.5, float(evidence)


def of_gamma(y, mask):
    y = y[mask]
    shape, rate = 3 + len(y), 2 + y.sum()
    lgamma = jax.scipy.special.gammaln
    evidence = 3 * np.log(2) - lgamma(3.0) + lgamma(float(shape)) - shape * np.log(rate)
    return float(shape / rate), float(shape**0.5 / rate), float(evidence)


EXACT = {
    normal: of_normals,
    positive: of_gamma,
    vectors: partial(of_normals, copies=2),
    masked_rows: of_normals,
}


SLOW = {vectors: pytest.mark.slow, positive: pytest.mark.slow}


@pytest.mark.parametrize("model", [pytest.param(m, marks=SLOW.get(m, ())) for m in EXACT])
def test_guides_have_the_conjugate_answer(model):
    guide = nf.AutoFlow(model, SMALL)
    fitted = nf.fit_guide(KEY, guide, Y, MASK, num_steps=2000, progress_bar=False)
    mean, sd, evidence = EXACT[model](Y, MASK)
    assert fitted.trusted
    assert fitted.elbo == pytest.approx(evidence, abs=0.05)
    mu = np.asarray(fitted.sample(KEY, (10_000,))["mu"], float)
    assert mu.mean() == pytest.approx(mean, abs=0.1 * sd)
    assert mu.std() == pytest.approx(sd, rel=0.1)


def test_the_mask_is_that_of_the_call():
    guide = nf.AutoFlow(normal, SMALL)
    fitted = nf.fit_guide(KEY, guide, Y, MASK, num_draws=500, progress_bar=False)
    other = MASK.copy()
    other[:2] = [False, True]
    weights = nf.importance_log_weights(KEY, guide, fitted.params, Y, other, num_samples=20_000)
    evidence, _ = nf.diagnostics.log_evidence(weights)
    assert evidence == pytest.approx(of_normals(Y, other)[2], abs=0.1)


@pytest.mark.slow
def test_samplers_have_the_conjugate_answer():
    mean, sd, _ = of_normals(Y, MASK)
    fitted = nf.fit_guide(KEY, nf.AutoFlow(normal, SMALL), Y, MASK, progress_bar=False)
    for kernel in (
        nf.FlowNUTS(normal, SMALL, progress_bar=False),
        NUTS(fitted.neutra().reparam(normal)),
    ):
        mcmc = MCMC(kernel, num_warmup=200, num_samples=1500, progress_bar=False)
        mcmc.run(KEY, Y, MASK)
        draws = mcmc.get_samples()
        assert draws["mu"].mean() == pytest.approx(mean, abs=0.15 * sd)
        assert draws["mu"].std() == pytest.approx(sd, rel=0.15)
        assert np.abs(draws["y_unobserved"]).max() < 8


def test_under_a_subsampled_plate():
    guide = nf.AutoFlow(subsampled, SMALL)
    fitted = nf.fit_guide(KEY, guide, Y, MASK, num_draws=500, progress_bar=False)
    assert guide.latent_dim == 1
    mean, sd, _ = of_normals(Y, MASK, copies=2)  # each row stands for two
    mu = np.asarray(fitted.sample(KEY, (10_000,))["mu"], float)
    assert mu.mean() == pytest.approx(mean, abs=0.1 * sd)
    assert mu.std() == pytest.approx(sd, rel=0.1)


def test_a_masked_prior_of_what_the_model_reads_is_flat():
    def model():
        with numpyro.handlers.mask(mask=False):
            m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(m, 1.0), obs=3.0)

    guide = nf.AutoFlow(model, SMALL)
    fitted = nf.fit_guide(KEY, guide, num_draws=500, progress_bar=False)
    assert not guide.space.idle
    m = np.asarray(fitted.sample(KEY, (10_000,))["m"], float)
    assert m.mean() == pytest.approx(3.0, abs=0.1)
    assert m.std() == pytest.approx(1.0, rel=0.1)
    assert fitted.elbo == pytest.approx(0.0, abs=0.02)  # the integral of a normal density over m


@pytest.mark.slow
def test_numpyros_guides_stay_as_they_are():
    guide = AutoNormal(normal)
    fitted = nf.fit_guide(KEY, guide, Y, MASK, num_steps=100, progress_bar=False)
    assert fitted.losses.shape == (100,)
