"""Discrete models against closed forms; their training, files and refusals; outlier tests."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from compiled import inverse, new, sample, sample_and_log_prob
from numpyro.distributions.transforms import AffineTransform
from scipy import stats
from sklearn.metrics import roc_auc_score

import numpyro_flows as nf
from numpyro_flows import diagnostics
from numpyro_flows.training.objectives import DequantizedBound

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
LEVELS = 4


def normal(dim=1, loc=1.7, scale=0.9):
    """A flow that is a normal distribution: each integer's mass has a closed form."""
    base = dist.Normal(jnp.zeros(dim), 1.0)
    return nf.FlowDistribution(
        base, nf.transforms.NumPyroTransform(AffineTransform(loc, scale), (dim,))
    )


def masses(x, loc=1.7, scale=0.9):
    cdf = stats.norm(loc, scale).cdf
    return np.log(cdf(x + 1.0) - cdf(x)).sum(-1)


@functools.cache
def small_model(noise=False, **config):
    config = {
        "levels": 1,
        "depth": 2,
        "hidden": (4,),
        "support": nf.recipes.grey_levels(LEVELS),
        **config,
    }
    small = {"depth": 2, "hidden": (4,), "features": 2}
    return nf.dequantize(
        new(nf.glow, SHAPE, **config),
        LEVELS,
        new(nf.dequantization.noise_flow, SHAPE, **small) if noise else None,
    )


def small_data(n=64):
    rng = np.random.default_rng(0)
    return rng.binomial(LEVELS - 1, rng.uniform(size=(n, 1, 1, 1)), (n, *SHAPE)).astype(np.uint8)


def test_bounds_approach_the_closed_form():
    model = nf.dequantize(normal(2), LEVELS)
    x = jnp.array([[0, 3], [1, 2], [2, 2]])
    keys = jax.random.split(KEY, 400)
    one = jax.vmap(lambda key: model.log_prob_bound(key, x))(keys)
    many = model.log_prob_bound(KEY, x, num_samples=20_000)
    exact = masses(np.asarray(x))
    assert np.allclose(many, exact, atol=0.02)
    assert (one.mean(0) < exact - 0.01).all()
    assert np.allclose(jax.nn.logsumexp(one, 0) - np.log(400), exact, atol=0.1)


def test_the_best_noise_closes_the_gap():
    """With q(u | x) proportional to p(x + u), every draw gives the mass itself."""

    class Exact(nf.FlowTransform):
        loc: jax.Array

        @property
        def event_shape(self):
            return (1,)

        @property
        def context_dim(self):
            return 1

        @property
        def codomain(self):
            return dist.constraints.independent(dist.constraints.unit_interval, 1)

        def _forward_and_log_det(self, x, context=None):
            # x is uniform on (0, 1); the context is (2 x + 1) / L - 1.
            start = ((context + 1) * LEVELS - 1) / 2
            low, high = (dist.Normal(1.7, 0.9).cdf(start + i) for i in (0, 1))
            y = dist.Normal(1.7, 0.9).icdf(low + x * (high - low))
            log_det = jnp.log(high - low) - dist.Normal(1.7, 0.9).log_prob(y)
            return y - start, log_det[..., 0]

        def _inverse_and_log_det(self, y, context=None):
            raise NotImplementedError

    noise = nf.FlowDistribution(dist.Uniform(jnp.zeros(1), 1.0), Exact(jnp.zeros(())))
    model = nf.dequantize(normal(), LEVELS, noise)
    x = jnp.arange(LEVELS)[:, None]
    for seed in range(3):
        value = model.log_prob_bound(jax.random.key(seed), x)
        assert np.allclose(value, masses(np.asarray(x)), atol=1e-4)


def test_bits_per_dim():
    model = nf.dequantize(normal(2), LEVELS)
    x = np.array([[0, 3], [1, 2], [2, 2]])
    bits = nf.diagnostics.bits_per_dim(KEY, model, x, num_samples=20_000, batch_size=2)
    assert np.allclose(bits, -masses(x) / (2 * np.log(2)), atol=0.02)


def test_new_noise_is_uniform():
    noise = new(nf.dequantization.noise_flow, (6, 4, 1), depth=2, hidden=(4,), features=2)
    u, log_q = sample_and_log_prob(noise.condition(jnp.ones((500, 6, 4, 1))), KEY)
    assert np.allclose(log_q, 0, atol=1e-3)
    assert stats.kstest(np.asarray(u).ravel(), "uniform").pvalue > 0.01


def test_noise_sees_the_image():
    model = small_model(noise=True)
    params, rest = nf.partition(model.noise)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype(a.dtype), params)
    noise = nf.combine(params, rest)
    x = jnp.zeros((2, *SHAPE)).at[1, 0, 0].set(1.0)
    u = sample(noise.condition(x), KEY)
    again = sample(noise.condition(x.at[0].set(x[1])), KEY)
    assert np.array_equal(u[1], again[1])
    assert not np.allclose(u[0], again[0])


def test_samples_are_levels():
    draws = sample(small_model(), KEY, (200,))
    assert draws.shape == (200, *SHAPE)
    assert jnp.issubdtype(draws.dtype, jnp.integer)
    assert set(np.unique(draws)) == set(range(LEVELS))
    cold = small_model().sample(KEY, (200,), temperature=0.01)
    assert np.ptp(cold) <= 1


@pytest.mark.parametrize(
    "noise",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["uniform", "variational"],
)
def test_fit(noise):
    x = small_data(200)
    model = nf.initialize(small_model(noise), x)
    fitted = nf.fit(
        KEY, model, x, max_epochs=20, batch_size=50, learning_rate=1e-2, progress_bar=False
    )
    before, after = (nf.diagnostics.bits_per_dim(KEY, m, x).mean() for m in (model, fitted.flow))
    assert after < before - 0.05
    assert isinstance(fitted.flow, nf.dequantization.Dequantized)
    if noise:
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), fitted.flow.noise, model.noise)
        assert moved.transform.network.net.weights[0]


@pytest.mark.slow
def test_fit_conditional():
    x, context = small_data(40), np.repeat(np.eye(2, dtype=np.float32), 20, 0)
    model = small_model(context_dim=2)
    fitted = nf.fit(KEY, model, x, context, max_epochs=1, progress_bar=False)
    assert fitted.flow.condition(context).log_prob_bound(KEY, x).shape == (40,)
    assert nf.diagnostics.bits_per_dim(KEY, fitted.flow, x, context).shape == (40,)


def test_noise_is_fresh_in_training_and_fixed_in_validation():
    bound, model, rows = DequantizedBound(), small_model(), {"x": jnp.asarray(small_data(5))}
    assert (bound(model, rows, jax.random.key(1)) != bound(model, rows, jax.random.key(2))).all()
    assert np.array_equal(bound(model, rows, None), bound(model, rows, None))
    same = bound(model, {"x": jnp.zeros((2, *SHAPE), jnp.uint8)}, KEY)
    assert same[0] != same[1]


def test_interrupted_fit_continues(tmp_path):
    x, path = small_data(), tmp_path / "fit"
    config = {"max_epochs": 3, "progress_bar": False, "optimizer": _optimizer()}
    whole = nf.fit(KEY, small_model(), x, **config)
    nf.fit(KEY, small_model(), x, checkpoint=path, **config)
    again = nf.fit(KEY, small_model(), x, checkpoint=path, **config)
    assert np.array_equal(whole.train_losses, again.train_losses)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or foreign"):
        nf.fit(KEY, small_model(), x, checkpoint=path, **config)


def _optimizer():
    import optax

    return optax.adam(1e-3)


def test_parameters_and_files(tmp_path):
    model = small_model(noise=True)
    flow = nf.equalize(new(nf.glow, SHAPE, levels=1, depth=1, hidden=(4,)), small_data(), LEVELS)
    model = nf.dequantize(flow, LEVELS, model.noise)
    params, _ = nf.partition(model)
    assert len(jax.tree.leaves(params.flow)) == len(jax.tree.leaves(nf.partition(flow)[0])) > 0
    assert len(jax.tree.leaves(params.noise)) == len(jax.tree.leaves(nf.partition(model.noise)[0]))
    nf.save(tmp_path / "model", model)
    loaded = nf.load(tmp_path / "model")
    x = small_data(4)
    bound = jax.jit(lambda model: model.log_prob_bound(KEY, x))
    assert np.array_equal(bound(loaded), bound(model))


def test_columns_have_levels_of_their_own():
    """Those of 16-bit sound keep their digits near 0, where they would be lost near 32768."""
    loc = jnp.array([0.0, 102.5])
    model = nf.dequantize(normal(2, loc, 0.2), (65536, 5), start=(-32768, 100))
    x = jnp.array([[0, 102], [-1, 102]])
    expected = masses(np.array(x), np.array(loc), 0.2)
    found = model.log_prob_bound(KEY, x, num_samples=20_000)
    np.testing.assert_allclose(found, expected, atol=0.05)
    draws = sample(nf.dequantize(normal(2, loc, 9.0), (65536, 5), start=(-32768, 100)), KEY, (99,))
    assert set(np.unique(draws[:, 1])) == set(range(100, 105))
    assert draws[:, 0].min() < 0
    with pytest.raises(ValueError, match=r"\[-32768, 100\] to \[32767, 104\], got \[0, 1\]"):
        model.log_prob_bound(KEY, jnp.array([[0, 1]]))


def test_fit_standardises_columns():
    """Counts near 1000 beside a column of small numbers, far from where a new flow is."""
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(1000, 50, 2000), rng.normal(-20, 4, 2000)], 1).round().astype(int)
    support = (dist.constraints.positive, dist.constraints.real)
    model = nf.dequantize(
        new(nf.realnvp, 2, support=support, depth=2, hidden=(4,)), (2000, 100), start=(1, -50)
    )
    fitted = nf.fit(KEY, model, x, max_epochs=2, progress_bar=False)
    entropy = math.log(50 * 4) + math.log(2 * math.pi * math.e)
    assert abs(fitted.val_losses[-1] - entropy) < 0.3
    bound = fitted.flow.log_prob_bound(KEY, x).mean()
    np.testing.assert_allclose(-bound, entropy, atol=0.15)
    raw = nf.fit(KEY, model, x, max_epochs=1, standardize=False, progress_bar=False)
    assert raw.val_losses[-1] > 2 * entropy


def test_equalized_pixels_are_normal():
    x = small_data(300)
    flow = nf.equalize(new(nf.glow, SHAPE, levels=1, depth=1, hidden=(4,)), x, LEVELS)
    z = inverse(flow.transform, x + jax.random.uniform(KEY, x.shape))[0]
    assert stats.kstest(np.asarray(z).ravel(), "norm").statistic < 0.02


X = small_data(8)
BAD = {
    "integers in a flow": (
        lambda: nf.fit(KEY, small_model().flow, X),
        TypeError,
        "x: expected floating-point numbers, got dtype uint8.*nf.dequantize",
    ),
    "integers in log_prob": (
        lambda: small_model().flow.log_prob(X),
        TypeError,
        "nf.dequantize",
    ),
    "numbers in a model": (
        lambda: nf.fit(KEY, small_model(), X.astype(float)),
        TypeError,
        "expected integers from 0 to 3, got dtype float64",
    ),
    "too large": (
        lambda: small_model().log_prob_bound(KEY, X + np.uint8(4)),
        ValueError,
        "expected integers from 0 to 3, got 4 to 7",
    ),
    "levels of other columns": (
        lambda: nf.dequantize(normal(3), (4, 5)),
        ValueError,
        r"levels: expected one integer, or one for each column .*, got 2",
    ),
    "levels that are none": (
        lambda: nf.dequantize(normal(2), (4, 5.0)),
        TypeError,
        r"levels\[1\]: expected an int",
    ),
    "negative": (
        lambda: nf.fit(KEY, small_model(), X.astype(int) - 1),
        ValueError,
        "expected integers from 0 to 3, got -1 to 2",
    ),
    "rank": (
        lambda: nf.fit(KEY, small_model(), X[..., 0]),
        ValueError,
        r"x: expected shape \(\*batch, 4, 4, 1\), got \(8, 4, 4\)",
    ),
    "one image": (
        lambda: nf.fit(KEY, small_model(), X[0]),
        ValueError,
        r"x: expected shape \(n, 4, 4, 1\), one draw per row",
    ),
    "bits of a flow": (
        lambda: nf.diagnostics.bits_per_dim(KEY, small_model().flow, X),
        TypeError,
        "call `nf.dequantize",
    ),
    "support": (
        lambda: nf.dequantize(small_model().flow, 256),
        ValueError,
        "support that holds 0 to 256",
    ),
    "noise of another shape": (
        lambda: nf.dequantize(
            small_model().flow, LEVELS, nf.dequantization.noise_flow(KEY, (8, 8, 1))
        ),
        ValueError,
        r"conditional flow over events of shape \(4, 4, 1\)",
    ),
    "noise on the line": (
        lambda: nf.dequantize(normal(), LEVELS, nf.realnvp(KEY, 1, context_dim=1)),
        ValueError,
        "unit interval",
    ),
    "not a flow": (lambda: nf.dequantize("glow"), TypeError, "expected a FlowDistribution"),
    "initialize": (
        lambda: nf.initialize(small_model(), X.astype(float)),
        TypeError,
        "expected integers",
    ),
    "equalize": (
        lambda: nf.equalize(nf.realnvp(KEY, 2), np.array([[0, 4]]), 4),
        ValueError,
        "got 0 to 4",
    ),
    "no samples": (
        lambda: small_model().log_prob_bound(KEY, X, num_samples=0),
        ValueError,
        "num_samples: expected at least 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call()


def test_typicality_keeps_its_level():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=4000)
    inside = diagnostics.typicality(rng.normal(size=(3000, 20)), reference, level=0.9)
    assert 0.87 < inside.typical.mean() < 0.93
    assert stats.kstest(inside.p_value, "uniform").statistic < 0.05
    for shift in (-1.0, 1.0):  # unlikely and too likely
        outside = diagnostics.typicality(rng.normal(shift, 1, (100, 20)), reference)
        assert outside.typical.mean() < 0.1


def test_latent_chi_square():
    z = np.random.default_rng(0).normal(size=(4000, 50))
    p = diagnostics.latent_chi_square(z)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert (diagnostics.latent_chi_square(1.5 * z) < 0.05).mean() > 0.9
    assert diagnostics.latent_chi_square(0.5 * z).max() < 0.05


def test_auroc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 9, 50), rng.integers(2, 12, 70)
    expected = roc_auc_score(np.repeat([1, 0], [50, 70]), np.concatenate([inside, outside]))
    assert diagnostics.auroc(inside, outside) == pytest.approx(expected)


def test_likelihood_ratio():
    model, background = (nf.dequantize(normal(2, loc), LEVELS) for loc in (1.0, 2.5))
    x = np.array([[0, 1], [3, 2]])
    ratio = diagnostics.likelihood_ratio(KEY, model, background, x)
    exact = masses(x, 1.0) - masses(x, 2.5)
    assert np.allclose(ratio, exact, atol=1.0)
    assert ratio[0] > 0 > ratio[1]


def test_perturbed_levels():
    x = jnp.zeros((100, 100), jnp.uint8)
    y = diagnostics.perturb_levels(KEY, x, 4, rate=0.2)
    assert y.dtype == x.dtype
    assert np.allclose(np.bincount(y.ravel()) / y.size, [0.85, 0.05, 0.05, 0.05], atol=0.01)
    assert not diagnostics.perturb_levels(KEY, x, 4, rate=0.0).any()


def test_bad_arguments_of_outlier_tests():
    with pytest.raises(ValueError, match=r"reference: expected shape \(n,\)"):
        diagnostics.typicality([1.0], [1.0])
    with pytest.raises(ValueError, match="log_probs: expected finite numbers, got 1 others"):
        diagnostics.typicality([1.0, np.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match="A batch|One event is a batch of 1"):
        diagnostics.typicality(1.0, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"level: expected a number in \(0, 1\)"):
        diagnostics.typicality([1.0], [1.0, 2.0], level=1.0)
    with pytest.raises(ValueError, match=r"rate: expected a number in \[0, 1\]"):
        diagnostics.perturb_levels(KEY, X, 4, rate=2.0)
    with pytest.raises(ValueError, match="without NaN"):
        diagnostics.auroc([], [1.0])
