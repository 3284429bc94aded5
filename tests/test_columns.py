"""Columns that would ruin a fit: rows far from all others, heavy tails, and no density at all."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from compiled import new
from fitting import KEY, STILL, fit, linear, log_prob, normals
from numpyro.distributions import constraints
from scipy import stats

import numpyro_flows as nf

QUICK = {"max_epochs": 60, "learning_rate": 5e-3}


def banana(n, seed=0):
    z = normals(n, seed=seed)
    return np.stack([3 + 2 * z[:, 0], z[:, 0] ** 2 + 0.3 * z[:, 1]], axis=1)


def messages(*args, **settings):
    """What one epoch that moves nothing warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(*args, optimizer=STILL, max_epochs=1, **settings)
    return [str(warning.message) for warning in caught]


# Rows far from all others.


@pytest.mark.parametrize(
    ("recipe", "value"),
    [
        pytest.param(nf.nsf, 1e6, marks=pytest.mark.slow),
        (nf.realnvp, -9999.0),
        *(pytest.param(nf.realnvp, x, marks=pytest.mark.slow) for x in (1e3, 1e6, 1e30)),
    ],
)
def test_outliers_do_not_ruin_the_fit(recipe, value):
    x = banana(1500)
    rows = [7, 99]
    good = np.delete(np.arange(1500), rows)
    x[7], x[99, 1] = [value, -value], value
    flow = recipe(KEY, 2, depth=4, hidden=(32,))
    clean = fit(flow, x[good], **QUICK)
    message = r"x: 2 of 1500 rows \(rows 7, 99\) lie more than 10 times .* in columns 0, 1,"
    with pytest.warns(UserWarning, match=message):
        found = fit(flow, x, **QUICK)
    expected, figure = (log_prob(fitted.flow, x[good]).mean() for fitted in (clean, found))
    assert abs(figure - expected) < 0.1
    if recipe is nf.nsf:
        return
    # And that of the truth, in which the second coordinate is normal given the first.
    truth = stats.norm(3, 2).logpdf(x[good, 0])
    truth += stats.norm(((x[good, 0] - 3) / 2) ** 2, 0.3).logpdf(x[good, 1])
    assert abs(figure - truth.mean()) < 0.1


def test_an_outlier_of_the_context():
    x, context = normals(400), normals(400, 1, seed=1)
    context[3] = 1e8
    flow = new(nf.realnvp, 2, context_dim=1, depth=2, hidden=(8,))
    with pytest.warns(UserWarning, match=r"context: 1 of 400 rows \(row 3\) .* in column 0, and"):
        found = fit(flow, x, context, max_epochs=1)
    without = np.delete(np.arange(400), 3)
    np.testing.assert_allclose(
        found.flow.transform.context_scale.value, context[without].std(0), rtol=1e-5
    )


def test_rows_keep_their_numbers_and_weights_their_meaning():
    """Rows of weight 0 are not looked at, and still counted."""
    x, weights = normals(200), np.random.default_rng(1).uniform(0.5, 2, 200)
    x[0], x[150], weights[0] = 1e7, 1e5, 0.0
    settings = {"optimizer": STILL, "max_epochs": 1, "val_fraction": 0.0}
    with pytest.warns(UserWarning, match=r"1 of 200 rows \(row 150\)"):
        found = fit(linear(), x, weights=weights, **settings)
    keep = np.delete(np.arange(200), [0, 150])
    plain = fit(linear(), x[keep], weights=weights[keep], **settings)
    np.testing.assert_allclose(found.train_losses, plain.train_losses, rtol=1e-6)
    kept = fit(linear(), x, weights=weights, standardize=False, **settings)
    expected = -np.average(stats.norm.logpdf(x).sum(1), weights=weights)
    np.testing.assert_allclose(kept.train_losses, [expected], rtol=1e-5)


# Tails.


def test_a_cauchy_column_is_standardised_by_quantiles():
    x = stats.cauchy(5, 2).rvs((4000, 1), random_state=0)
    with pytest.warns(UserWarning, match="x: tails rule the standard deviation of column 0;"):
        fitted = fit(linear(1), x, optimizer=STILL, max_epochs=1)
    parts = fitted.flow.transform
    np.testing.assert_allclose(parts.loc.value, 5, atol=0.2)
    expected = stats.cauchy(scale=2).ppf(0.9) / stats.norm.ppf(0.9)
    np.testing.assert_allclose(parts.scale.value, expected, rtol=0.1)
    assert not any("left out" in text for text in messages(linear(1), x))


def test_weighted_quantiles():
    x = stats.cauchy.rvs(size=(300, 1), random_state=1)
    counts = np.where(x[:, 0] > 0, 3, 1)
    weighted, repeated = (
        fit(linear(1), rows, weights=weights, optimizer=STILL, max_epochs=1).flow.transform
        for rows, weights in ((x, counts), (np.repeat(x, counts, axis=0), None))
    )
    np.testing.assert_allclose(weighted.loc.value, repeated.loc.value, atol=0.02)
    np.testing.assert_allclose(weighted.scale.value, repeated.scale.value, rtol=0.02)
    assert weighted.loc.value > 0.2  # where without weights it is about 0


def lognormal_context(sigma, n=4000, sd=0.073):
    """theta ~ N(0, 1) and a context whose logarithm says theta but for a spread of ``sd``."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(n, 1))
    noise = sigma * sd / np.sqrt(1 - sd**2) * rng.normal(size=(n, 1))
    return theta, np.exp(sigma * theta + noise), -np.log(sd) - stats.norm.entropy()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("sigma", [2.0, 4.0])
def test_a_lognormal_context(sigma, sign):
    theta, context, best = lognormal_context(sigma)
    context *= sign
    flow = nf.realnvp(jax.random.key(1), 1, context_dim=1, depth=2, hidden=(32, 32))
    with pytest.warns(UserWarning, match="context: column 0 spans orders of magnitude"):
        fitted = fit(flow, theta, context, **(QUICK | {"max_epochs": 30}))
    figure = log_prob(fitted.flow.condition(context), theta).mean()
    assert best - 0.1 < figure < best + 0.05
    assert abs(fitted.train_losses[fitted.best_epoch - 1] + figure) < 0.05
    again = fit(fitted.flow, theta, context, standardize=False, optimizer=STILL, max_epochs=1)
    np.testing.assert_allclose(
        log_prob(again.flow.condition(context), theta).mean(), figure, rtol=1e-5
    )
    # Refitted on tame contexts it is compressed no more.
    tame = fit(fitted.flow, theta, np.log(np.abs(context)), optimizer=STILL, max_epochs=1)
    assert isinstance(tame.flow.transform, nf.transforms.Standardized)


def test_tails_on_both_sides_and_columns_that_stay():
    """The columns that are left alone are standardised as ever."""
    rng = np.random.default_rng(0)
    context = np.stack([rng.normal(5, 2, 1000), stats.cauchy.rvs(size=1000, random_state=1)], 1)
    x = normals(1000)
    flow = new(nf.realnvp, 2, context_dim=2, depth=2, hidden=(8,))
    with pytest.warns(UserWarning, match="context: column 1 spans"):
        fitted = fit(flow, x, context, max_epochs=1)
    transform = fitted.flow.transform
    assert isinstance(transform, nf.transforms.CompressedContext)
    np.testing.assert_array_equal(np.isinf(transform.width.value), [True, False])
    seen = transform.transform.standardize_context(transform.compress(jnp.asarray(context)))
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(seen.std(0), 1, rtol=1e-4)
    assert np.abs(seen).max() < 10


@pytest.mark.parametrize("recipe", ["augmented", pytest.param("cnf", marks=pytest.mark.slow)])
def test_compressed_contexts_of_other_flows(recipe):
    theta, context, _ = lognormal_context(3.0, n=1000)
    settings = {}
    if recipe == "augmented":
        encoder = new(nf.realnvp, 1, context_dim=2, depth=2, hidden=(8,))
        joint = new(nf.realnvp, 2, context_dim=1, depth=2, hidden=(8,))
        flow = nf.AugmentedFlow(KEY, joint, encoder, num_samples=2)
    else:
        flow, settings = (
            new(nf.cnf, 1, context_dim=1, hidden=(16,)),
            {"objective": nf.FlowMatching()},
        )
    with pytest.warns(UserWarning, match="context: column 0"):
        first = fit(flow, theta, context, max_epochs=3, **settings)
    with pytest.warns(UserWarning, match="context: column 0"):
        again = fit(first.flow, theta, context, max_epochs=3, learning_rate=1e-2, **settings)
    assert again.train_losses[-1] < first.train_losses[0]
    assert np.isfinite(log_prob(again.flow.condition(context), theta)).all()


# No density at all.


def three_values(n=300):
    x = normals(n, 3)
    x[:, 1] = np.random.default_rng(1).choice([0.5, 1.5, 2.5], n)
    return x


def collinear(n=300):
    x = normals(n, 3)
    x[:, 2] = 3 * x[:, 0] - 2 * x[:, 1] + 7
    return 1e3 * x + 5e3


def copies(n=300):
    return np.repeat(normals(100), 3, axis=0)[:n]


def zero_inflated(n=300):
    x = normals(n)
    x[: n // 3, 0] = 0.0
    return x


DEGENERATE = {
    "three values": (three_values, r"x: column 1 repeats a value .*discrete support.*dequantize"),
    "zeros": (zero_inflated, r"x: column 0 repeats a value \(0 in 33% of the rows\)"),
    "rounded": (lambda: np.round(normals(300), 0), r"x: columns 0, 1 repeat a value"),
    "collinear": (collinear, "x: columns 0, 1, 2 depend linearly on each other"),
    "copies": (copies, "x: only 100 of 300 rows are different.*weights="),
}


@pytest.mark.parametrize("precision", [np.float32, np.float64])
@pytest.mark.parametrize("name", DEGENERATE)
def test_data_without_a_density(name, precision):
    build, message = DEGENERATE[name]
    x = build().astype(precision)
    for standardize in (True, False):
        with pytest.warns(UserWarning, match=message):
            fit(linear(x.shape[1]), x, optimizer=STILL, max_epochs=1, standardize=standardize)


def test_collinear_with_the_context():
    x = normals(300)
    flow = new(nf.realnvp, 2, context_dim=2, depth=2, hidden=(4,))
    context = np.stack([normals(300, seed=1)[:, 0], 2 * x[:, 1] - 1], axis=1)
    message = "x: column 1 and column 1 of the context depend linearly"
    with pytest.warns(UserWarning, match=message):
        fit(flow, x, context, max_epochs=1)
    # Contexts may depend on each other.
    assert messages(flow, x, np.repeat(context[:, :1], 2, axis=1)) == []


def correlated(n=300):
    x = normals(n)
    x[:, 1] = x[:, 0] + 1e-3 * x[:, 1]
    return x


SOUND = {
    "normal": (normals, linear),
    "correlated": (correlated, linear),
    "rounded measurements": (lambda n: np.round(normals(n), 2), linear),
    "a few rows": (lambda n: np.round(normals(15)), linear),
    "bootstrap": (lambda n: normals(n)[np.random.default_rng(0).integers(0, n, n)], linear),
    "exponential": (lambda n: np.random.default_rng(0).exponential(size=(n, 2)), linear),
    "two clusters": (lambda n: normals(n) + 100 * (np.arange(n) % 5 == 0)[:, None], linear),
    "lognormal on its support": (
        lambda n: np.exp(3 * normals(n)),
        lambda: linear(support=constraints.positive),
    ),
    "shares": (
        lambda n: np.random.default_rng(0).dirichlet([2.0, 3.0, 4.0], n),
        lambda: linear(support=constraints.simplex),
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_data_warn_of_nothing(name):
    build, flow = SOUND[name]
    assert messages(flow(), build(1000), val_fraction=0.0) == []


def test_the_same_parameter_under_many_contexts_is_no_copy():
    x = np.repeat(normals(100), 10, axis=0)
    flow = new(nf.realnvp, 2, context_dim=1, depth=2, hidden=(4,))
    assert messages(flow, x, normals(1000, 1, seed=3)) == []


def test_scalar_events():
    base = dist.Normal()
    flow = nf.FlowDistribution(base, nf.transforms.Standardized(linear_scalar(), 0.0, 1.0))
    x = normals(200, 1)[:, 0]
    x[11] = 1e6
    with pytest.warns(UserWarning, match=r"\(row 11\) lie .* column \(\)"):
        fit(flow, x, optimizer=STILL, max_epochs=1)


def linear_scalar():
    class Shift(nf.FlowTransform):
        shift: jnp.ndarray

        @property
        def event_shape(self):
            return ()

        def _forward_and_log_det(self, x, context=None):
            return x + self.shift, jnp.zeros_like(x)

        def _inverse_and_log_det(self, y, context=None):
            return y - self.shift, jnp.zeros_like(y)

    return Shift(jnp.zeros(()))
