"""`fit` against closed forms, quadrature and hand-made changes of variables."""

import os
import pathlib
import subprocess
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import biject_to, constraints
from scipy import stats

import numpyro_flows as nf
from numpyro_flows import training

KEY = jax.random.key(0)
STILL = optax.sgd(0.0)  # moves nothing: losses are those of the initial flow, exactly
SMALL = {"depth": 2, "hidden": (8,)}


def fit(flow, x, context=None, *, key=KEY, **settings):
    return nf.fit(key, flow, x, context, **({"progress_bar": False} | settings))


_log_prob = jax.jit(lambda flow, x: flow.log_prob(x))
_sample = jax.jit(lambda flow, n: flow.sample(KEY, (n,)), static_argnums=1)


def log_prob(flow, x):
    return np.asarray(_log_prob(flow, x), float)


def sample(flow, n):
    return np.asarray(_sample(flow, n), float)


class Linear(nf.FlowTransform):
    """x = W (y - b): its fit is the sample mean and covariance. Rows at the marker score NaN."""

    shift: jax.Array
    log_diagonal: jax.Array
    lower: jax.Array
    marker: nf.Fixed
    label: str = eqx.field(static=True)

    def __init__(self, dim, marker=np.inf, label=""):
        self.shift, self.log_diagonal = jnp.zeros(dim), jnp.zeros(dim)
        self.lower = jnp.zeros((dim, dim))
        self.marker = nf.Fixed(jnp.asarray(marker, float))
        self.label = label

    @property
    def event_shape(self):
        return self.shift.shape

    def matrix(self):
        return jnp.tril(self.lower, -1) + jnp.diag(jnp.exp(self.log_diagonal))

    def _forward_and_log_det(self, x, context=None):
        y = x @ jnp.linalg.inv(self.matrix()).T + self.shift
        return y, jnp.broadcast_to(-self.log_diagonal.sum(), x.shape[:-1])

    def _inverse_and_log_det(self, y, context=None):
        spoil = jnp.where(jnp.abs(y[..., 0] - self.marker.value) < 1e-6, jnp.nan, 1.0)
        x = (y - self.shift) @ self.matrix().T
        return x * spoil[..., None], self.log_diagonal.sum() * spoil


def linear(dim=2, support=None, base=None, **fields):
    transform = Linear(dim, **fields)
    if support is not None:
        transform = nf.transforms.Chain(
            [transform, nf.transforms.NumPyroTransform(biject_to(support), (dim,))]
        )
    return nf.FlowDistribution(base or dist.Normal(jnp.zeros(dim), 1.0), transform)


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


def normals(n, dim=2, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim))


def leaves(fitted):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(fitted.flow.transform)]


def assert_same(a, b):
    """Bitwise the same result."""
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.train_losses, b.train_losses)
    np.testing.assert_array_equal(a.val_losses, b.val_losses)
    assert (a.best_epoch, a.num_skipped) == (b.best_epoch, b.num_skipped)


def numpy_normal_nll(x, weights=None):
    """Mean -log p(x) under independent normals of the sample's own mean and spread."""
    loc = np.average(x, axis=0, weights=weights)
    scale = np.sqrt(np.average((x - loc) ** 2, axis=0, weights=weights))
    return -np.average(stats.norm.logpdf(x, loc, scale).sum(1), weights=weights)


def mass_on_grid(flow, edges):
    """Integral of the density over a box, by the midpoint rule."""
    axes = [(e[1:] + e[:-1]) / 2 for e in edges]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    volumes = np.ones(())
    for e in edges:
        volumes = np.multiply.outer(volumes, np.diff(e))
    return float((np.exp(log_prob(flow, points)) * volumes).sum())


# What is learned.


@pytest.fixture(scope="module")
def badly_scaled():
    """A correlated Gaussian at 1e3 with standard deviations 1e2 and 1e-2, and a flow fitted."""
    sds, correlation = np.array([1e2, 1e-2]), 0.8
    cov = np.outer(sds, sds) * [[1, correlation], [correlation, 1]]
    truth = stats.multivariate_normal([1e3, 1e3], cov)
    x = truth.rvs(4000, random_state=1)
    flow = nf.realnvp(KEY, 2, **SMALL)
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
    flow = nf.realnvp(KEY, 2, support=constraints.simplex, **SMALL)
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
    flow = nf.realnvp(KEY, 1, context_dim=1, activation="tanh", **SMALL)
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
    flow = nf.realnvp(KEY, 2, context_dim=1, support=constraints.positive, **SMALL)
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


# The mechanics: batches, splits, stopping, skipping.


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "batch_size"), [(300, 256), (257, 256), (7, 1)])
def test_every_row_counts_once(n, batch_size, weighted):
    """A new flow is the identity, so the loss is that of independent normals, over all rows."""
    x = 10 + normals(n) * [1.0, 1e-3]
    x[-1] += [20.0, 0.02]
    weights = np.random.default_rng(1).uniform(0, 2, n) if weighted else None
    fitted = fit(
        linear(),
        x,
        weights=weights,
        optimizer=STILL,
        batch_size=batch_size,
        max_epochs=2,
        val_fraction=0.0,
    )
    np.testing.assert_allclose(fitted.train_losses, numpy_normal_nll(x, weights), rtol=2e-5)
    assert fitted.val_losses.shape == (0,)
    assert fitted.best_epoch == 0


@pytest.mark.parametrize("val_fraction", [0.01, 0.5, 0.99])
def test_split_is_a_partition(val_fraction):
    n = 50
    x = normals(n) * [1.0, 30.0]
    fitted = fit(linear(), x, optimizer=STILL, max_epochs=1, val_fraction=val_fraction)
    held_out = max(1, int(n * val_fraction))
    total = (n - held_out) * fitted.train_losses[0] + held_out * fitted.val_losses[0]
    np.testing.assert_allclose(total / n, numpy_normal_nll(x), rtol=1e-5)


def test_losses_with_support_are_in_units_of_the_data():
    """The identity in log space is a lognormal: rows differ in their log-determinants."""
    y = normals(10) * [1.0, 0.1] + [3.0, -2.0]
    nlls = y.sum(1) - stats.norm.logpdf(y, y.mean(0), y.std(0)).sum(1)
    fitted = fit(linear(support=constraints.positive), np.exp(y), optimizer=STILL, max_epochs=1)
    (held_out,) = np.flatnonzero(np.isclose(nlls, fitted.val_losses, rtol=1e-5))
    others = np.delete(nlls, held_out).mean()
    np.testing.assert_allclose(fitted.train_losses, [others], rtol=1e-5)
    np.testing.assert_allclose(-log_prob(fitted.flow, np.exp(y)), nlls, rtol=1e-5)


def test_standardisation_is_folded_in_as_float32_has_it():
    """Means that float32 cannot hold: training must see the numbers that the flow returns."""
    z = normals(200, 1)
    x = 1000 + 3e-5 + 3e-3 * (z - z.mean())
    fitted = fit(linear(1), x, optimizer=STILL, max_epochs=1, val_fraction=0.0)
    parts = fitted.flow.transform
    assert parts.loc.value.dtype == jnp.float32
    loc, scale = float(parts.loc.value[0]), float(parts.scale.value[0])
    np.testing.assert_allclose(
        fitted.train_losses, [-stats.norm.logpdf(x, loc, scale).mean()], atol=2e-6
    )


def test_returns_the_best_parameters():
    """Eight good epochs, then steps of size 3: what is returned is the best epoch."""
    x = 3 + normals(64) @ np.array([[1.0, 0.9], [0.0, 0.2]])

    def schedule(step):
        return jnp.where(step < 8 * 4, 0.05, 3.0)

    optimizer = optax.adam(schedule)
    settings = {"batch_size": 16, "optimizer": optimizer, "val_fraction": 0.2, "patience": 3}
    fitted = fit(linear(), x, max_epochs=50, **settings)
    best = fitted.best_epoch
    assert 1 <= best <= 9
    assert fitted.val_losses[best - 1] == fitted.val_losses.min()
    assert len(fitted.val_losses) == best + 3
    assert fitted.val_losses[-1] > fitted.val_losses.min() + 1
    short = fit(linear(), x, max_epochs=best, **settings)
    for a, b in zip(leaves(fitted), leaves(short), strict=True):
        np.testing.assert_array_equal(a, b)


def test_returns_the_initial_parameters_if_nothing_is_better():
    x = normals(40)
    fitted = fit(linear(), x, optimizer=optax.sgd(-0.5), patience=2, val_fraction=0.0)
    assert fitted.best_epoch == 0
    assert len(fitted.train_losses) == 2
    assert not np.any(fitted.flow.transform.transform.shift)
    np.testing.assert_allclose(-np.mean(log_prob(fitted.flow, x)), numpy_normal_nll(x), rtol=1e-5)


@pytest.mark.parametrize("n", [2, 9])
def test_few_rows(n):
    with pytest.warns(UserWarning, match=f"{n} rows are too few to hold some out"):
        fitted = fit(linear(), normals(n), max_epochs=2)
    assert fitted.val_losses.shape == (0,)
    assert fitted.train_losses.shape == (2,)
    assert np.isfinite(log_prob(fitted.flow, normals(n))).all()


@pytest.mark.parametrize(("n", "val_fraction", "held_out"), [(10, 0.1, 2), (5, 0.0, 0)])
def test_no_warning_without_need(n, val_fraction, held_out):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = fit(linear(), normals(n), max_epochs=2, val_fraction=val_fraction)
    assert len(fitted.val_losses) == held_out


def test_bad_steps_are_skipped_and_counted():
    """One row scores NaN; its own step is skipped, once in each epoch, and no other."""
    n, epochs = 23, 4
    x = normals(n)
    settings = {"batch_size": 5, "max_epochs": epochs, "patience": epochs, "standardize": False}
    counts = []
    for row in range(n):
        with pytest.warns(RuntimeWarning, match=f"{epochs} steps with a non-finite loss|never fin"):
            fitted = fit(linear(marker=x[row, 0]), x, **settings)
        counts.append(fitted.num_skipped)
        assert np.isfinite(fitted.train_losses).all()
        assert np.isfinite(fitted.val_losses).all() == (fitted.num_skipped > 0)
        assert all(np.isfinite(leaf).all() for leaf in leaves(fitted)[:3])
    assert sorted(counts) == [0, 0] + 21 * [epochs]


def test_a_loss_that_is_never_finite_is_reported():
    x, weights = normals(40), np.arange(1.0, 41.0)
    settings = {"batch_size": 1, "max_epochs": 3, "standardize": False, "val_fraction": 0.0}
    with (
        pytest.warns(RuntimeWarning, match="3 steps"),
        pytest.warns(RuntimeWarning, match="never finite; the last parameters"),
    ):
        fitted = fit(linear(marker=x[3, 0]), x, weights=weights, optimizer=STILL, **settings)
    assert fitted.best_epoch == 3
    assert fitted.num_skipped == 3
    others = np.arange(40) != 3
    expected = -np.average(stats.norm.logpdf(x).sum(1)[others], weights=weights[others])
    np.testing.assert_allclose(fitted.train_losses, expected, rtol=1e-5)


def test_no_good_step_is_an_error():
    x = normals(40)
    x[:, 0] = 1.0
    with pytest.raises(FloatingPointError, match=r"no step of epoch 1 .* Lower `learning_rate`"):
        fit(linear(marker=1.0), x, standardize=False)


def test_non_finite_updates_do_not_enter():
    with pytest.raises(FloatingPointError, match="no step of epoch 1 "):
        fit(linear(), normals(40), learning_rate=lambda step: jnp.nan)


def test_compiles_once():
    """Neither each epoch nor each call compiles anew."""
    traces = []

    class Counting(Linear):
        def _inverse_and_log_det(self, y, context=None):
            traces.append(y.shape)
            return super()._inverse_and_log_det(y)

    flow = nf.FlowDistribution(dist.Normal(jnp.zeros(2), 1.0), Counting(2))
    fit(flow, normals(40), max_epochs=4, batch_size=8)
    assert len(traces) == 2  # the loss with and without its gradient
    fit(flow, normals(40, seed=1), max_epochs=4, batch_size=8)
    assert len(traces) == 2


def test_many_rows():
    rng = np.random.default_rng(0)
    x = rng.normal(5.0, 2.0, size=(200_000, 2))
    fitted = fit(linear(), x, max_epochs=1, batch_size=2048)
    assert abs(fitted.val_losses[0] - numpy_normal_nll(x)) < 0.05


def test_progress_bar(capfd):
    x, settings = normals(40), {"max_epochs": 2, "optimizer": STILL}
    fit(linear(), x, **settings)
    assert capfd.readouterr() == ("", "")
    fit(linear(), x, progress_bar=True, **settings)
    assert "fit: 100%" in capfd.readouterr().err


# Fitting again.


def count_standardized(flow):
    return str(jax.tree.structure(flow.transform)).count("Standardized")


@pytest.mark.parametrize("support", [None, constraints.positive])
def test_refit(support):
    old, new = np.exp(0.1 * normals(40)), 7 * np.exp(0.5 * normals(40, seed=1))
    settings = {"optimizer": optax.sgd(0.1), "max_epochs": 1, "val_fraction": 0.0}
    first = fit(linear(support=support), old, **settings)
    assert count_standardized(first.flow) == 1

    def parts(fitted):
        transform = fitted.flow.transform
        return transform if support is None else transform.parts[0]

    def log(x):
        return x if support is None else np.log(x)

    settings |= {"optimizer": STILL}
    again = fit(first.flow, new, **settings)
    assert count_standardized(again.flow) == 1
    np.testing.assert_allclose(parts(again).loc.value, log(new).mean(0), rtol=1e-4)
    np.testing.assert_allclose(parts(again).scale.value, log(new).std(0), rtol=1e-4)
    np.testing.assert_array_equal(
        parts(again).transform.log_diagonal, parts(first).transform.log_diagonal
    )

    kept = fit(first.flow, new, standardize=False, **settings)
    assert count_standardized(kept.flow) == 1
    for a, b in zip(leaves(kept), leaves(first), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(kept.train_losses, [-np.mean(log_prob(first.flow, new))], rtol=1e-4)


def test_refit_conditional():
    context, flow = 1e3 * normals(40, 1, seed=1), nf.realnvp(KEY, 2, context_dim=1, **SMALL)
    settings = {"optimizer": STILL, "max_epochs": 1}
    first = fit(flow, 3 * normals(40), context, **settings)
    again = fit(first.flow, normals(40), context + 500, **settings)
    assert count_standardized(again.flow) == 1
    parts = again.flow.transform
    np.testing.assert_allclose(parts.context_loc.value, context.mean(0) + 500, rtol=1e-5)
    kept = fit(first.flow, normals(40), context + 500, standardize=False, **settings)
    for a, b in zip(leaves(kept), leaves(first), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_standardisation():
    x = normals(40)
    fitted = fit(linear(), x, standardize=False, optimizer=STILL, max_epochs=1, val_fraction=0.0)
    assert count_standardized(fitted.flow) == 0
    expected = -stats.norm.logpdf(x).sum(1).mean()
    np.testing.assert_allclose(fitted.train_losses, [expected], rtol=1e-5)


def test_support_in_a_nested_chain():
    exp = nf.transforms.NumPyroTransform(biject_to(constraints.positive), (2,))
    shift = nf.transforms.NumPyroTransform(dist.transforms.AffineTransform(5.0, 2.0), (2,))
    transform = nf.transforms.Chain([nf.transforms.Chain([Linear(2), exp]), shift])
    flow = nf.FlowDistribution(dist.Normal(jnp.zeros(2), 1.0), transform)
    y = normals(40)
    fitted = fit(flow, 5 + 2 * np.exp(y), optimizer=STILL, max_epochs=1, val_fraction=0.0)
    expected = numpy_normal_nll(y) + y.sum(1).mean() + 2 * np.log(2)
    np.testing.assert_allclose(fitted.train_losses, [expected], rtol=1e-4)


# Checkpoints.


def interrupt(monkeypatch, after):
    """Writing the checkpoint of the epoch after ``after`` dies in the middle of the file."""
    savez, calls = np.savez, []

    def dying(file, *args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            file.write(b"half a file")
            raise KeyboardInterrupt
        savez(file, *args, **kwargs)

    monkeypatch.setattr(training.np, "savez", dying)


CHECKPOINT = {"max_epochs": 6, "batch_size": 16, "learning_rate": 0.01}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fit.npz"


OPTIMIZERS = {
    "default": lambda: None,
    # Its state holds a random key and bfloat16 numbers.
    "noisy": lambda: optax.chain(
        optax.add_noise(0.1, 0.5, 0), optax.adam(0.01, mu_dtype=jnp.bfloat16)
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_interrupted_run_continues(optimizer, path, monkeypatch):
    def build():
        return nf.realnvp(KEY, 2, **SMALL) if optimizer == "default" else linear()

    x, flow = normals(70), build()
    settings = CHECKPOINT | {"optimizer": OPTIMIZERS[optimizer]()}
    whole = fit(flow, x, **settings)
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            fit(flow, x, checkpoint=path, **settings)
    assert os.listdir(path.parent) == [path.name]
    # From another flow of the same initial weights, as another process would have it.
    flow = build()
    assert_same(fit(flow, x, checkpoint=str(path), **settings), whole)
    assert os.listdir(path.parent) == [path.name]

    def trains(*_, **__):
        pytest.fail("a finished run trains again")

    monkeypatch.setattr(training, "_run_epoch", trains)
    assert_same(fit(flow, x, checkpoint=path, **settings), whole)


def test_skipped_steps_and_patience_survive(path, monkeypatch):
    x = normals(70)
    settings = CHECKPOINT | {"standardize": False, "patience": 3, "optimizer": STILL}
    for row in range(10):
        flow = linear(marker=x[row, 0])
        with pytest.warns(RuntimeWarning):
            whole = fit(flow, x, **settings)
        if whole.num_skipped:  # else the row was held out
            break
    assert (len(whole.train_losses), whole.best_epoch, whole.num_skipped) == (3, 0, 3)
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        with pytest.raises(KeyboardInterrupt):
            fit(flow, x, checkpoint=path, **settings)
    with pytest.warns(RuntimeWarning, match="3 steps"):
        assert_same(fit(flow, x, checkpoint=path, **settings), whole)


def awkward_flow(name):
    """NumPyro orders the numbers of such a base and the parts of an augmented flow by hash."""
    if name == "base":
        base = dist.StudentT(np.array([5.0, 6.0]), np.zeros(2), np.ones(2))
        return linear(base=base, support=constraints.interval(-9.0, 9.0))
    encoder = nf.realnvp(KEY, 1, context_dim=2, **SMALL)
    return nf.AugmentedFlow(KEY, nf.realnvp(KEY, 3, **SMALL), encoder, num_samples=2)


def fit_awkward(name, checkpoint, stop=None):
    """Returns in the middle if asked to."""
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None:
            interrupt(patch, stop)
        return fit(awkward_flow(name), normals(70), checkpoint=checkpoint, **CHECKPOINT)


@pytest.mark.parametrize("name", ["base", "augmented"])
def test_another_process_continues(name, path):
    """The order of sets, and so of NumPyro's numbers, differs between processes."""
    script = f"import test_fit; test_fit.fit_awkward({name!r}, {str(path)!r}, 2)"
    here = pathlib.Path(__file__).parent
    search = os.pathsep.join(map(str, (here, here.parent)))
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": search}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr
    assert path.exists()
    assert_same(fit_awkward(name, path), fit_awkward(name, None))


def test_checkpoint_of_another_call(path):
    x = normals(40)
    settings = CHECKPOINT | {"max_epochs": 1, "checkpoint": path}
    fit(linear(), x, **settings)
    before = path.read_bytes()
    activations = [nf.realnvp(KEY, 2, activation=a, **SMALL) for a in ("relu", "tanh")]
    others = {
        "data": lambda: fit(linear(), x + 1e-3, **settings),
        "data in other units": lambda: fit(linear(), 2 * x, **settings),
        "fewer rows": lambda: fit(linear(), x[:-1], **settings),
        "weights": lambda: fit(linear(), x, weights=np.arange(1.0, 41.0), **settings),
        "key": lambda: fit(linear(), x, key=jax.random.key(1), **settings),
        "epochs": lambda: fit(linear(), x, **settings | {"max_epochs": 2}),
        "batch size": lambda: fit(linear(), x, **settings | {"batch_size": 8}),
        "rate": lambda: fit(linear(), x, **settings | {"learning_rate": 0.02}),
        "optimiser": lambda: fit(linear(), x, optimizer=optax.rmsprop(0.01), **settings),
        "standardisation": lambda: fit(linear(), x, standardize=False, **settings),
        "static field": lambda: fit(linear(label="other"), x, **settings),
        "base": lambda: fit(linear(base=dist.Laplace(jnp.zeros(2), 1.0)), x, **settings),
        "flow": lambda: fit(activations[0], x, **settings),
    }
    for name, call in others.items():
        with pytest.raises(ValueError, match="other data, settings, key or flow. Delete it"):
            pytest.fail(f"accepted: {name}, {call()}")
    assert path.read_bytes() == before
    path.unlink()
    fit(activations[0], x, optimizer=STILL, **settings)
    with pytest.raises(ValueError, match="other data, settings, key or flow"):
        fit(activations[1], x, optimizer=STILL, **settings)


def foreign_files(whole, path):
    yield b""
    yield b"notes of somebody"
    yield whole[: len(whole) // 2]
    yield whole[:-1]
    yield b"\x80\x04]\x94."  # a pickle
    np.save(path.with_suffix(".npy"), np.ones(3))
    yield path.with_suffix(".npy").read_bytes()
    for meta in (np.ones(3), np.array("[]"), np.array("{}"), np.array("{")):
        np.savez(path.with_suffix(".other.npz"), meta=meta)
        yield path.with_suffix(".other.npz").read_bytes()


def test_damaged_and_foreign_files(path, tmp_path):
    x = normals(40)
    settings = {"max_epochs": 1, "optimizer": optax.adam(0.01), "checkpoint": path}
    fit(linear(), x, **settings)
    for content in foreign_files(path.read_bytes(), tmp_path / "foreign"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected a whole file .* damaged or foreign"):
            fit(linear(), x, **settings)
        assert path.read_bytes() == content  # it may be dear to somebody
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="damaged or foreign"):
        fit(linear(), x, **settings)


def test_flipped_bits_are_refused_or_harmless(path):
    x = normals(40)
    settings = {"max_epochs": 1, "optimizer": optax.adam(0.01), "checkpoint": path}
    whole_result = fit(linear(), x, **settings)
    whole = path.read_bytes()
    refused = 0
    for i in range(0, len(whole), 37):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        try:
            result = fit(linear(), x, **settings)
        except ValueError:
            refused += 1
        else:
            assert_same(result, whole_result)
    assert refused > 60


def test_checkpoint_in_no_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*; create it first"):
        fit(linear(), normals(40), checkpoint=tmp_path / "missing" / "fit.npz")


# Keys, dtypes, containers.


def test_same_key_same_result():
    x, settings = normals(40), {"max_epochs": 2, "batch_size": 16}
    flow = linear()
    first = fit(flow, x, **settings)
    assert_same(fit(flow, x, **settings), first)
    legacy = fit(flow, jnp.asarray(x), key=jax.random.PRNGKey(0), **settings)
    np.testing.assert_allclose(legacy.train_losses, first.train_losses, rtol=1e-5)
    other = fit(flow, x.tolist(), key=jax.random.key(1), **settings)
    assert not np.array_equal(other.train_losses, first.train_losses)


def test_arguments_are_left_alone():
    x, context, weights = normals(40), normals(40, 1), np.arange(40.0)
    copies = [a.copy() for a in (x, context, weights)]
    flow = nf.realnvp(KEY, 2, context_dim=1, **SMALL)
    before = [np.array(leaf) for leaf in jax.tree.leaves(flow.transform)]
    fit(flow, x, context, weights=weights, max_epochs=1, optimizer=STILL)
    for a, b in zip((x, context, weights), copies, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(flow.transform), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("given", [np.float32, np.float64, np.float16])
def test_float32(given):
    x = normals(40).astype(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = fit(linear(support=constraints.positive), np.exp(x), max_epochs=1)
    assert {leaf.dtype for leaf in leaves(fitted)} == {np.dtype(np.float32)}
    assert fitted.train_losses.dtype == fitted.val_losses.dtype == np.float64


@pytest.mark.parametrize("given", [np.float32, np.float64])
def test_float64(x64, given):
    x = (1e3 + 1e-3 * normals(100)).astype(given)
    settings = {"optimizer": STILL, "max_epochs": 1, "val_fraction": 0.0}
    fitted = fit(linear(), x, **settings)
    assert {leaf.dtype for leaf in leaves(fitted)} == {np.dtype(np.float64)}
    expected = numpy_normal_nll(x.astype(float))
    np.testing.assert_allclose(fitted.train_losses, [expected], rtol=1e-11)
    log_probs = log_prob(fitted.flow, jnp.asarray(x, float))
    np.testing.assert_allclose(-np.mean(log_probs), expected, rtol=1e-11)


def test_float64_with_support(x64):
    x = np.exp(normals(100))
    settings = {"optimizer": STILL, "max_epochs": 1, "val_fraction": 0.0}
    fitted = fit(linear(support=constraints.positive), x, **settings)
    expected = numpy_normal_nll(np.log(x)) + np.log(x).sum(1).mean()
    np.testing.assert_allclose(fitted.train_losses, [expected], rtol=1e-10)


def test_events_with_other_axes():
    """Events of shape () and of two axes are standardised like vectors."""

    class Shift(nf.FlowTransform):
        shift: jax.Array

        @property
        def event_shape(self):
            return self.shift.shape

        def _forward_and_log_det(self, x, context=None):
            batch = x.shape[: x.ndim - self.shift.ndim]
            return x + self.shift, jnp.zeros(batch)

        def _inverse_and_log_det(self, y, context=None):
            batch = y.shape[: y.ndim - self.shift.ndim]
            return y - self.shift, jnp.zeros(batch)

    settings = {"optimizer": STILL, "max_epochs": 1, "val_fraction": 0.0}
    x = 5 + 2 * normals(30, 6)
    for shape in ((), (2, 3)):
        flow = nf.FlowDistribution(dist.Normal(jnp.zeros(shape), 1.0), Shift(jnp.zeros(shape)))
        rows = x[:, 0] if shape == () else x.reshape(30, *shape)
        fitted = fit(flow, rows, **settings)
        expected = numpy_normal_nll(rows.reshape(30, -1))
        np.testing.assert_allclose(fitted.train_losses, [expected], rtol=1e-5)
        rows = rows.copy()
        rows[(..., -1) if shape else ...] = 3.0
        with pytest.raises(ValueError, match=r"column (\(0, 2\), \(1, 2\)|\(\)) is constant"):
            fit(flow, rows, **settings)


# What users get wrong.


def conditional():
    return nf.realnvp(KEY, 2, context_dim=1, **SMALL)


def positive():
    return linear(support=constraints.positive)


def interval():
    return linear(support=constraints.interval(0.0, 2.0))


def simplex():
    return linear(support=constraints.simplex)


def changed(values, dim=2, n=30):
    """Rows in (0.1, 1.9), with some replaced."""
    x = np.random.default_rng(0).uniform(0.1, 1.9, (n, dim))
    for row, value in values.items():
        x[row] = value
    return x


GOOD = changed({})
SHARES = changed({}, dim=3) / changed({}, dim=3).sum(1, keepdims=True)


def weights(values):
    result = np.ones(30)
    for row, value in values.items():
        result[row] = value
    return {"weights": result}


BAD = {
    "integers": (linear, lambda: GOOD.astype(int), {}, TypeError, r"x: .*dtype int.*astype"),
    "objects": (linear, lambda: GOOD.astype(object), {}, TypeError, "got dtype object"),
    "nan": (
        linear,
        lambda: changed({4: np.nan, 17: np.inf}),
        {},
        ValueError,
        r"x: 2 of 30 rows \(rows 4, 17\) hold NaN .*; drop or impute",
    ),
    "one nan": (linear, lambda: changed({4: np.nan}), {}, ValueError, r"1 of 30 rows \(row 4\)"),
    "many nan": (
        linear,
        lambda: changed(dict.fromkeys(range(15), np.nan)),
        {},
        ValueError,
        r"15 of 30 rows \(rows 0, .*, 9, \.\.\.\)",
    ),
    "beyond float32": (
        linear,
        lambda: changed({4: 1e39}),
        {},
        ValueError,
        r"\(row 4\) hold NaN or values that are infinite in float32",
    ),
    "width": (
        linear,
        lambda: changed({}, dim=3),
        {},
        ValueError,
        r"x: expected shape \(n, 2\), .*got \(30, 3\)",
    ),
    "one axis": (linear, lambda: GOOD[:, 0], {}, ValueError, r"shape \(n, 2\).*got \(30,\)"),
    "one row as a vector": (linear, lambda: GOOD[0], {}, ValueError, r"\(n, 2\).*got \(2,\)"),
    "three axes": (linear, lambda: GOOD[None], {}, ValueError, r"\(n, 2\).*got \(1, 30, 2\)"),
    "scalar data": (
        lambda: linear(1),
        lambda: GOOD[:, 0],
        {},
        ValueError,
        r"expected shape \(n, 1\), .*got \(30,\)\. .*x\[:, None\]",
    ),
    "a number": (linear, lambda: 1.5, {}, ValueError, r"\(n, 2\).*got \(\)"),
    "empty": (linear, lambda: GOOD[:0], {}, ValueError, "at least 2 rows, got 0"),
    "one row": (linear, lambda: GOOD[:1], {}, ValueError, "at least 2 rows, got 1"),
    "no context": (
        conditional,
        lambda: GOOD,
        {},
        ValueError,
        r"this flow is conditional; pass `context=` of shape \(30, 1\)",
    ),
    "surplus context": (
        linear,
        lambda: GOOD,
        {"context": GOOD},
        ValueError,
        r"takes no context, got one of shape \(30, 2\).*context_dim",
    ),
    "context rows": (
        conditional,
        lambda: GOOD,
        {"context": GOOD[:20, :1]},
        ValueError,
        r"context: expected shape \(30, 1\), one row per row of x, got \(20, 1\)",
    ),
    "context width": (
        conditional,
        lambda: GOOD,
        {"context": GOOD},
        ValueError,
        r"context: expected shape \(30, 1\), .*got \(30, 2\)",
    ),
    "context axis": (
        conditional,
        lambda: GOOD,
        {"context": GOOD[:, 0]},
        ValueError,
        r"expected shape \(30, 1\), .*got \(30,\)\. .*context\[:, None\]",
    ),
    "context number": (conditional, lambda: GOOD, {"context": 1.0}, ValueError, r"got \(\)"),
    "context nan": (
        conditional,
        lambda: GOOD,
        {"context": changed({5: np.nan})[:, :1]},
        ValueError,
        r"context: 1 of 30 rows \(row 5\) hold NaN",
    ),
    "context integers": (
        conditional,
        lambda: GOOD,
        {"context": np.arange(30)[:, None]},
        TypeError,
        "context: expected floating-point",
    ),
    "constant context": (
        conditional,
        lambda: GOOD,
        {"context": np.full((30, 1), 2000.1)},
        ValueError,
        "context: column 0 is constant .*nothing can be learned from it; drop it",
    ),
    "negative weights": (
        linear,
        lambda: GOOD,
        weights({3: -1.0}),
        ValueError,
        r"weights: expected non-negative numbers, got 1 of 30 rows \(row 3\) below 0; 0 leaves",
    ),
    "nan weights": (
        linear,
        lambda: GOOD,
        weights({3: np.nan}),
        ValueError,
        r"weights: .*\(row 3\) hold NaN",
    ),
    "infinite weights": (linear, lambda: GOOD, weights({3: np.inf}), ValueError, "infinite"),
    "number of weights": (
        linear,
        lambda: GOOD,
        {"weights": np.ones(29)},
        ValueError,
        r"weights: expected shape \(30,\), one number per row of x, got \(29,\)",
    ),
    "column of weights": (
        linear,
        lambda: GOOD,
        {"weights": np.ones((30, 1))},
        ValueError,
        r"weights: expected shape \(30,\), .*got \(30, 1\)",
    ),
    "zero weights": (
        linear,
        lambda: GOOD,
        {"weights": np.zeros(30)},
        ValueError,
        "weights: expected at least 2 positive ones, got 0",
    ),
    "one weight": (
        linear,
        lambda: GOOD,
        {"weights": np.eye(30)[0]},
        ValueError,
        "at least 2 positive ones, got 1",
    ),
    "outside": (
        positive,
        lambda: changed({2: -1.0, 8: -0.1}),
        {},
        ValueError,
        r"2 of 30 rows \(rows 2, 8\) lie outside .*Positive.*; drop them or .*support=",
    ),
    "outside the interval": (interval, lambda: changed({2: 2.5}), {}, ValueError, "row 2.*outside"),
    "shares that do not add up": (
        simplex,
        lambda: changed({}, dim=3),
        {},
        ValueError,
        "30 of 30 rows .* lie outside .*Simplex",
    ),
    "boundary": (
        interval,
        lambda: changed({2: 0.0, 8: 2.0}),
        weights({0: 0.0}),
        ValueError,
        r"2 of 30 rows \(rows 2, 8\) lie on the boundary of the support.*move them inside",
    ),
    "first share 0": (
        simplex,
        lambda: np.concatenate([SHARES, [[0.0, 0.5, 0.5]]]),
        {},
        ValueError,
        r"\(row 30\) lie on the boundary",
    ),
    "last share 0": (
        simplex,
        lambda: np.concatenate([SHARES, [[0.5, 0.5, 0.0]]]),
        {},
        ValueError,
        r"\(row 30\) lie on the boundary",
    ),
    "constant column": (
        linear,
        lambda: changed({}) * [1, 0] + [0, 0.1],
        {},
        ValueError,
        "x: column 1 is constant .*density is not bounded there; drop it or add noise",
    ),
    "constant but for rounding": (
        linear,
        lambda: 1e6 + 1e-3 * GOOD,
        {},
        ValueError,
        "columns? 0, 1 is constant to the precision of float32",
    ),
    "constant where the weight is": (
        linear,
        lambda: np.where(np.arange(30)[:, None] < 10, GOOD, [[1.0, 0.0]] * GOOD + [[0.0, 1.0]]),
        {"weights": (np.arange(30) >= 10).astype(float)},
        ValueError,
        "column 1 is constant",
    ),
    "constant in the support": (
        positive,
        lambda: changed({}) * [1, 0] + [0, 0.1],
        {},
        ValueError,
        "column 1 is constant",
    ),
    "val_fraction 1": (
        linear,
        lambda: GOOD,
        {"val_fraction": 1.0},
        ValueError,
        r"val_fraction: expected a number in \[0, 1\), got 1.0",
    ),
    "negative val_fraction": (linear, lambda: GOOD, {"val_fraction": -0.1}, ValueError, "-0.1"),
    "nan val_fraction": (linear, lambda: GOOD, {"val_fraction": np.nan}, ValueError, "got nan"),
    "clip_norm": (linear, lambda: GOOD, {"clip_norm": 0.0}, ValueError, "clip_norm: .*got 0"),
    **{
        f"{name} {value}": (linear, lambda: GOOD, {name: value}, error, f"{name}: .*got {value}")
        for name in ("batch_size", "max_epochs", "patience")
        for value, error in ((0, ValueError), (2.5, TypeError))
    },
    "int key": (linear, lambda: GOOD, {"key": 0}, TypeError, r"jax\.random\.key\(0\)"),
    "several keys": (linear, lambda: GOOD, {"key": jax.random.split(KEY)}, TypeError, "single"),
    "conditioned": (
        lambda: conditional().condition(GOOD[:, :1]),
        lambda: GOOD,
        {},
        ValueError,
        r"flow: .*batch_shape=\(30,\).*Pass the conditional flow itself and `context=`",
    ),
    "conditioned on one": (
        lambda: conditional().condition(GOOD[0, :1]),
        lambda: GOOD,
        {},
        ValueError,
        "no bound context, .*Pass the conditional flow itself and `context=`",
    ),
    "a transform": (lambda: Linear(2), lambda: GOOD, {}, TypeError, "FlowDistribution, got Linear"),
    "a recipe": (lambda: nf.realnvp, lambda: GOOD, {}, TypeError, "FlowDistribution, got function"),
    "only a support": (
        lambda: nf.FlowDistribution(dist.Normal(), biject_to(constraints.positive)),
        lambda: GOOD[:, 0],
        {},
        ValueError,
        "flow: it has no parameters to train .*recipe",
    ),
    "nothing to train": (
        lambda: nf.FlowDistribution(
            dist.Normal(jnp.zeros(2), 1.0),
            nf.transforms.Standardized(
                nf.transforms.NumPyroTransform(biject_to(constraints.real), (2,)), 0.0, 1.0
            ),
        ),
        lambda: GOOD,
        {},
        ValueError,
        "flow: it has no parameters to train .*recipe",
    ),
    "support that cannot be standardised": (
        lambda: nf.FlowDistribution(dist.Normal(jnp.zeros(2), 1.0), OntoPositive(2)),
        lambda: GOOD,
        {},
        ValueError,
        "OntoPositive onto the real numbers, .*standardize=False",
    ),
}


class OntoPositive(Linear):
    @property
    def codomain(self):
        return constraints.independent(constraints.positive, 1)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    flow, x, settings, error, message = BAD[name]
    flow, x = flow(), x()
    with pytest.raises(error, match=message):
        fit(flow, x, **settings)


def test_constant_column_of_many_rows(x64):
    """The mean of many equal numbers is not that number, by more than a few units of rounding."""
    x = np.stack([np.random.default_rng(0).normal(size=500_000), np.full(500_000, 0.1)], -1)
    with pytest.raises(ValueError, match="column 1 is constant"):
        fit(linear(), x)
