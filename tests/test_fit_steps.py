"""The mechanics of `fit`: batches, splits, stopping, skipping, programs, keys and dtypes."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from compiled import new
from fitting import (
    SMALL,
    STILL,
    Linear,
    assert_same,
    fit,
    leaves,
    linear,
    log_prob,
    normals,
    numpy_normal_nll,
)
from numpyro.distributions import constraints
from programs import compiled_programs
from scipy import stats

import numpyro_flows as nf


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


FITS = {
    "plain": ({}, {}, lambda n: (normals(n), None), 3),
    "conditional on a support": (
        {"support": constraints.positive, "context_dim": 1},
        {"learning_rate": 0.01},
        lambda n: (np.exp(normals(n)), normals(n, 1, seed=1)),
        4,  # the way out of the support
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_programs(name):
    """The start, the steps and the score; other data, rates and lengths compile nothing."""
    recipe, settings, data, most = FITS[name]
    x, context = data(90)
    flow = new(nf.realnvp, 2, **SMALL, **recipe)
    settings = {"batch_size": 16, "max_epochs": 2} | settings
    with compiled_programs() as programs:
        fit(flow, x, context, **settings)
    assert len(programs) <= most, programs
    others, key = None if context is None else 3 * context + 1, jax.random.key(1)
    with compiled_programs() as programs:
        settings |= {"learning_rate": 0.02, "max_epochs": 3, "patience": 5}
        fit(flow, 2 * x + 1, others, key=key, **settings)
    assert programs == []


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
    flow = new(nf.realnvp, 2, context_dim=1, **SMALL)
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
        with pytest.raises(
            ValueError, match=r"columns \(0, 2\), \(1, 2\) are const|column \(\) is constant"
        ):
            fit(flow, rows, **settings)
