"""What `fit` learns, against closed forms, quadrature and hand-made changes of variables."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from compiled import new
from fitting import (
    KEY,
    SMALL,
    STILL,
    assert_same,
    fit,
    linear,
    log_prob,
    normals,
    numpy_normal_nll,
    sample,
)
from numpyro.distributions import constraints
from scipy import stats

import numpyro_flows as nf


class Mixture(nf.FlowTransform):
    """The distribution function of two narrow normals at -1 and 1; only their masses train."""

    logit: jax.Array

    @property
    def event_shape(self):
        return (1,)

    def _forward_and_log_det(self, x, context=None):
        raise NotImplementedError

    def _inverse_and_log_det(self, y, context=None):
        mass = jnp.stack([jax.nn.sigmoid(-self.logit), jax.nn.sigmoid(self.logit)])
        normal = dist.Normal(jnp.array([-1.0, 1.0]), 0.1)
        log_density = jax.nn.logsumexp(jnp.log(mass) + normal.log_prob(y), axis=-1)
        return (mass * normal.cdf(y)).sum(-1, keepdims=True), log_density


def mass_on_grid(flow, edges):
    """Integral of the density over a box, by the midpoint rule."""
    axes = [(e[1:] + e[:-1]) / 2 for e in edges]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    volumes = np.ones(())
    for e in edges:
        volumes = np.multiply.outer(volumes, np.diff(e))
    return float((np.exp(log_prob(flow, points)) * volumes).sum())


@pytest.fixture(scope="module")
def badly_scaled():
    """A correlated Gaussian at 1e3 with standard deviations 1e2 and 1e-2, and a flow fitted."""
    sds, correlation = np.array([1e2, 1e-2]), 0.8
    cov = np.outer(sds, sds) * [[1, correlation], [correlation, 1]]
    truth = stats.multivariate_normal([1e3, 1e3], cov)
    x = truth.rvs(4000, random_state=1)
    flow = new(nf.realnvp, 2, **SMALL)
    return truth, x, fit(flow, x, learning_rate=1e-2, max_epochs=40)


def test_recovers_a_badly_scaled_gaussian(badly_scaled):
    truth, x, fitted = badly_scaled
    held_out = truth.rvs(20_000, random_state=2)
    excess = np.mean(truth.logpdf(held_out) - log_prob(fitted.flow, held_out))
    assert abs(excess) < 0.02
    draws = sample(fitted.flow, 20_000)
    np.testing.assert_allclose((draws.mean(0) - 1e3) / [1e2, 1e-2], 0, atol=0.05)
    np.testing.assert_allclose(draws.std(0), x.std(0), rtol=0.05)
    assert abs(np.corrcoef(draws.T)[0, 1] - 0.8) < 0.03


def test_losses_are_nats_of_the_data(badly_scaled):
    truth, x, fitted = badly_scaled
    assert fitted.train_losses.shape == fitted.val_losses.shape
    entropy = truth.entropy()
    # A mean of n such losses has standard deviation 1 / sqrt(n): 0.05 for the 400 held out.
    assert abs(fitted.train_losses[-1] - entropy) < 0.06
    assert abs(fitted.val_losses[-1] - entropy) < 0.2
    assert fitted.best_epoch == np.argmin(fitted.val_losses) + 1
    nll = -np.mean(log_prob(fitted.flow, x))
    mixed = 0.9 * fitted.train_losses[-1] + 0.1 * fitted.val_losses.min()
    assert abs(nll - mixed) < 0.005


def test_density_is_a_change_of_variables(badly_scaled):
    _, x, fitted = badly_scaled
    parts = fitted.flow.transform
    assert isinstance(parts, nf.transforms.Standardized)
    x = x[:200].astype(np.float32)
    loc, scale = (np.asarray(p.value, float) for p in (parts.loc, parts.scale))
    np.testing.assert_allclose(loc, 1e3, rtol=1e-2)
    y = (x.astype(float) - loc) / scale
    z = parts.transform.inv(jnp.asarray(y, jnp.float32))
    jacobians = jax.vmap(jax.jacfwd(parts.transform))(z)
    log_det = np.linalg.slogdet(np.asarray(jacobians, float))[1] + np.log(scale).sum()
    expected = stats.norm.logpdf(np.asarray(z, float)).sum(-1) - log_det
    np.testing.assert_allclose(log_prob(fitted.flow, x), expected, atol=2e-4)


@pytest.mark.smoke
def test_density_integrates_to_one(badly_scaled):
    _, _, fitted = badly_scaled
    edges = [1e3 + sd * np.linspace(-7, 7, 301) for sd in (1e2, 1e-2)]
    assert abs(mass_on_grid(fitted.flow, edges) - 1) < 2e-3


def test_linear_flow_becomes_mean_and_covariance():
    x = normals(400) @ np.array([[2.0, 1.0], [0.0, 1.0]]) + [5.0, -3.0]
    settings = {"val_fraction": 0.0, "batch_size": 400, "max_epochs": 400, "patience": 400}
    fitted = fit(linear(), x, learning_rate=0.05, **settings)
    best = -stats.multivariate_normal(x.mean(0), np.cov(x.T, ddof=0)).logpdf(x).mean()
    assert abs(fitted.train_losses[-1] - best) < 1e-3
    parts = fitted.flow.transform
    matrix = np.diag(parts.scale.value) @ np.linalg.inv(parts.transform.matrix())
    np.testing.assert_allclose(matrix @ matrix.T, np.cov(x.T, ddof=0), rtol=5e-3)


def test_three_dimensions():
    x = 7 + 0.2 * normals(500, 3)
    fitted = fit(linear(3), x, max_epochs=5)
    assert sample(fitted.flow, 3).shape == (3, 3)
    assert abs(-np.mean(log_prob(fitted.flow, x)) - numpy_normal_nll(x)) < 0.05


SUPPORTS = {
    "positive": (
        constraints.positive,
        lambda support: linear(support=support),
        stats.lognorm(0.5, scale=1e3),
        lambda: [np.geomspace(20, 5e4, 301)] * 2,
    ),
    "interval": (
        constraints.interval(0.0, 2.0),
        lambda support: nf.realnvp(KEY, 2, support=support, **SMALL),
        stats.beta(2, 4, scale=2.0),
        lambda: [np.linspace(0, 2, 301)] * 2,
    ),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_support(name):
    support, build, truth, edges = SUPPORTS[name]
    x = truth.rvs((1500, 2), random_state=0)
    held_out = truth.rvs((10_000, 2), random_state=1)
    flow = build(support)
    fitted = fit(flow, x, learning_rate=1e-2, max_epochs=15, batch_size=128)
    excess = np.mean(truth.logpdf(held_out).sum(1) - log_prob(fitted.flow, held_out))
    # A normal in the unconstrained space is exact for the lognormal, close for the beta.
    assert abs(excess) < 0.05
    assert abs(fitted.train_losses[-1] + np.mean(truth.logpdf(x).sum(1))) < 0.05
    assert abs(mass_on_grid(fitted.flow, edges()) - 1) < 3e-3
    draws = sample(fitted.flow, 1000)
    assert bool(jnp.all(support(draws)))
    assert str(fitted.flow.support) == str(flow.support)


def test_simplex():
    truth = stats.dirichlet([2.0, 3.0, 4.0])
    x = truth.rvs(2000, random_state=0)
    flow = new(nf.realnvp, 2, support=constraints.simplex, **SMALL)
    fitted = fit(flow, x, learning_rate=1e-2, max_epochs=15, batch_size=128)
    held_out = truth.rvs(10_000, random_state=1)
    excess = np.mean(truth.logpdf(held_out.T) - log_prob(fitted.flow, held_out))
    assert abs(excess) < 0.05
    # First share and the second's part of the rest cover the triangle, with Jacobian 1 - a.
    a, b = np.meshgrid(*[(np.arange(300) + 0.5) / 300] * 2, indexing="ij")
    points = np.stack([a, (1 - a) * b, (1 - a) * (1 - b)], -1)
    density = np.exp(log_prob(fitted.flow, points))
    assert abs((density * (1 - a)).sum() / 300**2 - 1) < 3e-3


def test_conditional():
    rng = np.random.default_rng(0)
    context = rng.uniform(1e3, 5e3, (10_000, 1))
    y = 3 * context + 1e3 * rng.normal(size=(10_000, 1))
    flow = new(nf.realnvp, 1, context_dim=1, activation="tanh", **SMALL)
    fitted = fit(flow, y, context, learning_rate=1e-2, max_epochs=25)
    parts = fitted.flow.transform
    np.testing.assert_allclose(parts.context_loc.value, context.mean(0), rtol=1e-5)
    np.testing.assert_allclose(parts.context_scale.value, context.std(0), rtol=1e-5)
    for c in (1.5e3, 3e3, 4.5e3):
        draws = sample(fitted.flow.condition(jnp.array([c])), 20_000)
        assert abs(draws.mean() - 3 * c) < 200
        assert abs(draws.std() - 1e3) < 150
    entropy = stats.norm(scale=1e3).entropy()
    assert abs(fitted.train_losses[-1] - entropy) < 0.05


# Weights.


def test_weights_are_masses():
    x = np.concatenate([-1 + 0.1 * normals(30, 1), 1 + 0.1 * normals(30, 1, seed=1)])
    weights = np.repeat([1.0, 3.0], 30)
    flow = nf.FlowDistribution(dist.Uniform(jnp.zeros(1), 1.0), Mixture(jnp.zeros(())))
    settings = {"val_fraction": 0.0, "batch_size": 120, "learning_rate": 0.05, "standardize": False}
    weighted = fit(flow, x, weights=weights, **settings)
    replicated = fit(flow, np.repeat(x, weights.astype(int), axis=0), **settings)
    for fitted in (weighted, replicated):
        assert abs(jax.nn.sigmoid(fitted.flow.transform.logit) - 0.75) < 1e-3
    np.testing.assert_allclose(weighted.train_losses, replicated.train_losses, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-300, 1.0, 1e306])
def test_scale_of_weights_does_not_matter(factor):
    x = normals(300) * [1.0, 5.0]
    weights = np.random.default_rng(1).uniform(0.5, 150.0, 300)
    flow = linear()
    fitted = fit(flow, x, weights=weights * factor, optimizer=STILL, max_epochs=1, val_fraction=0.0)
    np.testing.assert_allclose(fitted.train_losses, [numpy_normal_nll(x, weights)], rtol=1e-5)
    np.testing.assert_allclose(
        fitted.flow.transform.loc.value, np.average(x, axis=0, weights=weights), rtol=1e-5
    )


def test_rows_of_weight_zero_have_no_influence():
    x = np.exp(normals(60))
    context = normals(60, 1, seed=1)
    weights = np.ones(60)
    weights[::3] = 0.0
    keep = weights > 0
    wild, wild_context = x.copy(), context.copy()
    wild[~keep], wild_context[~keep] = 1e6, -1e6
    flow = new(nf.realnvp, 2, context_dim=1, support=constraints.positive, **SMALL)
    settings = {"max_epochs": 2, "batch_size": 16}
    without = fit(flow, x[keep], context[keep], **settings)
    assert_same(fit(flow, wild, wild_context, weights=weights, **settings), without)


def test_weight_zero_on_most_rows():
    """Neither a split nor a batch may end up without weight."""
    weights = np.zeros(200)
    weights[:12] = 1.0
    fitted = fit(linear(), normals(200), weights=weights, max_epochs=3, batch_size=4)
    assert np.isfinite([fitted.train_losses, fitted.val_losses]).all()
    assert fitted.num_skipped == 0
