"""Each continuous prior of NumPyro once: a guide's evidence is 0, and its means are the prior's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_flows as nf

KEY = jax.random.key(0)
SMALL = partial(nf.realnvp, depth=4, hidden=(16,))
PRECISION = jnp.array([[2.0, 0.6], [0.6, 1.0]])

PRIORS = {
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(0.0, 1.0, 1.5),
    "AsymmetricLaplaceQuantile": lambda: dist.AsymmetricLaplaceQuantile(0.0, 1.0, 0.4),
    "Beta": lambda: dist.Beta(2.0, 3.0),
    "BetaProportion": lambda: dist.BetaProportion(0.4, 5.0),
    "CAR": lambda: dist.CAR(0.0, 0.5, 1.0, jnp.array([[0.0, 1.0], [1.0, 0.0]]), is_sparse=False),
    "Cauchy": lambda: dist.Cauchy(1.0, 0.5),
    "Chi2": lambda: dist.Chi2(4.0),
    "Dirichlet": lambda: dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])),
    "EulerMaruyama": lambda: dist.EulerMaruyama(
        jnp.linspace(0.0, 1.0, 3), lambda x, t: (-x, 0.5), dist.Normal(0.0, 1.0)
    ),
    "Exponential": lambda: dist.Exponential(2.0),
    "Gamma": lambda: dist.Gamma(2.0, 3.0),
    "GaussianRandomWalk": lambda: dist.GaussianRandomWalk(1.0, num_steps=3),
    "Gompertz": lambda: dist.Gompertz(0.5, 1.0),
    "Gumbel": lambda: dist.Gumbel(1.0, 2.0),
    "HalfCauchy": lambda: dist.HalfCauchy(1.0),
    "HalfNormal": lambda: dist.HalfNormal(2.0),
    "InverseGamma": lambda: dist.InverseGamma(4.0, 3.0),
    "Kumaraswamy": lambda: dist.Kumaraswamy(2.0, 3.0),
    "LKJ": lambda: dist.LKJ(3, 2.0),
    "LKJCholesky": lambda: dist.LKJCholesky(3, 2.0),
    "Laplace": lambda: dist.Laplace(1.0, 2.0),
    "LogNormal": lambda: dist.LogNormal(0.0, 0.5),
    "LogUniform": lambda: dist.LogUniform(0.5, 4.0),
    "Logistic": lambda: dist.Logistic(1.0, 0.5),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(
        jnp.zeros(2), jnp.array([[1.0], [0.5]]), jnp.ones(2)
    ),
    "MatrixNormal": lambda: dist.MatrixNormal(jnp.zeros((2, 2)), jnp.eye(2), jnp.eye(2)),
    "MultivariateNormal": lambda: dist.MultivariateNormal(jnp.ones(2), precision_matrix=PRECISION),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(5.0, jnp.ones(2), jnp.eye(2)),
    "Normal": lambda: dist.Normal(1.0, 2.0),
    "Pareto": lambda: dist.Pareto(1.0, 4.0),
    "RelaxedBernoulli": lambda: dist.RelaxedBernoulli(1.0, probs=0.4),
    "SineSkewed": lambda: dist.SineSkewed(
        dist.SineBivariateVonMises(0.0, 0.0, 2.0, 2.0, 0.5), jnp.array([0.2, -0.2])
    ),
    "SoftLaplace": lambda: dist.SoftLaplace(1.0, 1.0),
    "StudentT": lambda: dist.StudentT(5.0, 1.0, 2.0),
    "TruncatedCauchy": lambda: dist.TruncatedCauchy(0.0, 1.0, low=-1.0, high=3.0),
    "TruncatedNormal": lambda: dist.TruncatedNormal(0.0, 1.0, low=-0.5, high=2.0),
    "Uniform": lambda: dist.Uniform(-1.0, 3.0),
    "VonMises": lambda: dist.VonMises(0.5, 2.0),
    "Weibull": lambda: dist.Weibull(1.0, 1.5),
    "Wishart": lambda: dist.Wishart(4.0, jnp.eye(2)),
    "WishartCholesky": lambda: dist.WishartCholesky(4.0, scale_tril=jnp.eye(2)),
    "ZeroSumNormal": lambda: dist.ZeroSumNormal(1.0, (3,)),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.array([-1.0, 1.0]), 1.0)
    ),
    "censored": lambda: dist.LeftTruncatedDistribution(dist.Normal(0.0, 1.0), low=0.5),
}
#: Where draws of the prior have no finite variance, means say nothing.
WITHOUT_MEAN = {"Cauchy", "HalfCauchy"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_is_its_own_posterior(name):
    prior = PRIORS[name]()

    def model():
        numpyro.sample("x", prior)

    guide = nf.AutoFlow(model, SMALL)
    fitted = nf.fit_guide(KEY, guide, num_steps=1000, num_draws=4000, progress_bar=False)
    assert fitted.improper == ()
    evidence, _ = nf.diagnostics.log_evidence(
        nf.importance_log_weights(KEY, guide, fitted.params, num_samples=4000)
    )
    assert evidence == pytest.approx(0.0, abs=0.1)
    assert fitted.elbo == pytest.approx(0.0, abs=0.3)
    if name in WITHOUT_MEAN:
        return
    ours = np.asarray(fitted.resample(KEY, 8000).draws["x"], float)
    theirs = np.asarray(prior.sample(KEY, (40_000,)), float)
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.15 * theirs.std())
