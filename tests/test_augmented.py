"""Augmented flows: their bound judged by quadrature of the joint density, guides by a conjugate."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from compiled import forward, log_prob, new, sample
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoContinuous
from small import points, shake

import numpyro_flows as nf
from numpyro_flows.parts import for_training, inexactness

KEY = jax.random.key(0)


def small(dim=2, augment_dim=1, scale=0.6, **config):
    config = {"hidden": (8,), "num_steps": 6, "num_samples": 4, **config}
    return shake(
        new(nf.augmented_cnf, dim, augment_dim=augment_dim, **config), jax.random.key(1), scale
    )


def by_layers(dim=2, augment_dim=1, context_dim=0, num_samples=4, **config):
    """Quicker to compile: any exact flows do for both parts."""
    size = {"depth": 2, "hidden": (8,)}
    joint = new(nf.realnvp, dim + augment_dim, context_dim=context_dim, activation="tanh", **size)
    encoder = new(nf.realnvp, augment_dim, context_dim=dim + context_dim, **size)
    flow = nf.AugmentedFlow(KEY, joint, encoder, num_samples=num_samples, **config)
    return shake(flow, jax.random.key(1), 0.6)


MAKE = {"cnf": small, "layers": by_layers}


def marginal(flow, x):
    """log p(x) by the trapezoidal rule over e; both of one coordinate, x of shape (n, 1)."""
    e = np.linspace(-12, 12, 1201)
    both = np.stack(np.broadcast_arrays(np.asarray(x), e), axis=-1)
    log_p = np.asarray(jax.jit(flow.joint.log_prob)(jnp.asarray(both)), float)
    return np.log(np.trapezoid(np.exp(log_p), e, axis=1))


@pytest.mark.parametrize("name", [pytest.param("cnf", marks=pytest.mark.slow), "layers"])
def test_the_bound_and_the_integral(name, x64):
    """Below it in the mean, unbiased before the logarithm, nearer with more draws."""
    flow = MAKE[name](dim=1)
    # In the bulk: far out the weights of a random flow need not have a variance.
    x = jnp.linspace(-0.6, 0.4, 6)[:, None]
    exact = marginal(flow, x)

    def values(num_samples, num_probes):
        keys = jax.random.split(jax.random.key(7), num_probes)
        bound = jax.jit(lambda key: flow.with_probe(key, num_samples=num_samples).log_prob(x))
        return np.array([bound(key) for key in keys])

    one, many = values(1, 400), values(64, 100)
    gaps = exact - one.mean(0), exact - many.mean(0)
    assert (gaps[0] > 5e-3).all()
    assert (gaps[1] > -3 * many.std(0) / 10).all()
    assert gaps[1].mean() < 0.2 * gaps[0].mean()
    ratio = np.exp(one - exact)
    assert (np.abs(ratio.mean(0) - 1) < 4 * ratio.std(0) / 20).all()
    best = log_prob(flow.with_probe(KEY, num_samples=20_000), x)
    np.testing.assert_allclose(best, exact, atol=0.03)


def test_draws_have_the_integral_as_their_density():
    flow = by_layers(dim=1)
    grid = np.linspace(-12, 12, 481)
    density = np.exp(marginal(flow, grid[:, None]))
    draws = np.asarray(sample(flow, jax.random.key(3), (20_000,)))[:, 0]
    cdf = np.cumsum(density) * (grid[1] - grid[0])
    assert abs(cdf[-1] - 1) < 1e-3
    empirical = np.searchsorted(np.sort(draws), grid + (grid[1] - grid[0]) / 2) / len(draws)
    assert np.abs(empirical - cdf).max() < 1.95 / len(draws) ** 0.5  # Kolmogorov, 0.1 %


def test_a_numpyro_distribution():
    flow = by_layers()
    assert (flow.batch_shape, flow.event_shape) == ((), (2,))
    assert flow.support is constraints.real_vector
    assert flow.has_rsample
    assert (flow.augment_dim, flow.num_samples, flow.joint.event_shape) == (1, 4, (3,))
    x = points(2)
    values = log_prob(flow, x)
    assert values.shape == (6,)
    np.testing.assert_allclose(values, log_prob(flow, x.reshape(3, 2, 2)).reshape(6), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(flow.log_prob))(x), values, rtol=1e-4)
    assert sample(flow, KEY).shape == (2,)
    wide = flow.expand((3, 1)).expand((3, 2))
    assert isinstance(wide, nf.AugmentedFlow)
    assert sample(wide, KEY, (5,)).shape == (5, 3, 2, 2)
    assert log_prob(wide, x[:2]).shape == (3, 2)
    assert wide.joint.batch_shape == (3, 2)
    np.testing.assert_allclose(log_prob(wide.to_event(2), x[:2]), 3 * values[:2].sum(), rtol=1e-5)
    with pytest.raises(ValueError, match="Cannot expand"):
        wide.expand((1, 2))


def test_the_noise_is_the_flows_own():
    """The same for every row and call."""
    flow, x = by_layers(), points(2)
    value_and_grad = jax.jit(jax.value_and_grad(lambda f, x: f.log_prob(x).sum()))
    total, grads = value_and_grad(flow, x)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    rows = [value_and_grad(flow, row[None])[0] for row in x]
    np.testing.assert_allclose(sum(rows), total, rtol=1e-5)
    assert abs(value_and_grad(flow.with_probe(jax.random.key(9)), x)[0] - total) > 1e-3


@pytest.mark.slow
def test_rows_in_a_plate():
    flow = by_layers(context_dim=1)
    x, context = points(2), points(1, seed=3)

    def model(x=None):
        with numpyro.plate("rows", 6):
            return numpyro.sample("x", flow.condition(context), obs=x)

    log_density, _ = numpyro.infer.util.log_density(model, (x,), {}, {})
    np.testing.assert_allclose(log_density, log_prob(flow.condition(context), x).sum(), rtol=1e-5)
    draws = numpyro.infer.Predictive(model, num_samples=3)(KEY)["x"]
    assert draws.shape == (3, 6, 2)


def test_context():
    flow = by_layers(context_dim=1)
    x, context = points(2), points(1, seed=3)
    assert flow.context_dim == 1
    given = flow.condition(context)
    assert (given.batch_shape, given.context_dim) == ((6,), 0)
    rows = [log_prob(flow.condition(c), row) for c, row in zip(context, x, strict=True)]
    np.testing.assert_allclose(log_prob(given, x), rows, rtol=1e-5)
    assert sample(given, KEY, (4,)).shape == (4, 6, 2)
    assert log_prob(given, x[0]).shape == (6,)
    both = given.joint
    assert (both.batch_shape, both.event_shape) == ((6,), (3,))
    assert sample(given.encode(x), KEY).shape == (6, 1)
    with pytest.raises(ValueError, match=r"call flow.condition\(context\)"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match=r"call flow.condition\(context\)"):
        flow.sample(KEY)


@pytest.mark.slow
@pytest.mark.parametrize(
    "support", [constraints.positive, (constraints.positive, constraints.interval(-1, 3))]
)
def test_supports(support):
    flow = small(support=support, scale=0.0)
    parts = support if isinstance(support, tuple) else (support, support)
    u = points(2)
    to_support = [dist.biject_to(part) for part in parts]

    @jax.jit
    def by_hand(u):
        x = jnp.stack([t(u[:, i]) for i, t in enumerate(to_support)], -1)
        return x, sum(
            dist.Normal().log_prob(u[:, i]) - t.log_abs_det_jacobian(u[:, i], x[:, i])
            for i, t in enumerate(to_support)
        )

    x, expected = by_hand(u)
    # Untrained, the joint is the standard normal and the encoder its conditional: no gap.
    np.testing.assert_allclose(log_prob(flow, x), expected, rtol=1e-4)
    assert flow.support(x).all()
    draws = sample(flow, KEY, (100,))
    assert flow.support(draws).all()
    both = jnp.concatenate([draws, jnp.zeros((100, 1))], axis=-1)
    assert flow.joint.support(both).all()
    assert jnp.isfinite(log_prob(flow.joint, both)).all()


@pytest.mark.slow
def test_parameters_and_fixed_numbers():
    flow = small()
    params, rest = nf.partition(flow)
    assert jax.tree.leaves(params.transform)
    assert jax.tree.leaves(params.encoder_transform)
    assert not jax.tree.leaves((params.base_dist, params.encoder_base, params.probe))
    x = points(2)
    log_prob = jax.jit(lambda flow: flow.log_prob(x))
    np.testing.assert_array_equal(log_prob(nf.combine(params, rest)), log_prob(flow))
    keys = jax.random.split(KEY, 3)
    flows = jax.jit(jax.vmap(lambda key: nf.augmented_cnf(key, 2, hidden=(4,), num_steps=2)))(keys)
    assert jax.jit(jax.vmap(lambda flow: flow.sample(KEY)))(flows).shape == (3, 2)


def test_files_keep_it(tmp_path):
    x = jnp.abs(points(2)) + 0.1
    flow = small(support=constraints.positive)
    nf.save(tmp_path / "flow", flow)
    loaded = nf.load(tmp_path / "flow")
    assert repr(loaded) == repr(flow)
    np.testing.assert_array_equal(log_prob(loaded, x), log_prob(flow, x))


def test_it_says_what_it_is():
    assert "log_prob=lower bound of 4 draws" in repr(small())
    stochastic = small(trace="hutchinson")
    assert "log_prob=estimate of a lower bound of 4 draws" in repr(stochastic)
    assert inexactness(small())
    assert not inexactness(small().joint)
    assert "lower bound" in repr(nf.FlowDistribution(small(), nf.transforms.TriangularAffine(2)))


def test_a_step_of_training_draws_new_noise_for_each_row():
    flow, x = by_layers(), jnp.broadcast_to(points(2)[:1], (6, 2))
    values = [log_prob(for_training(flow, key, 6), x) for key in jax.random.split(KEY)]
    assert np.ptp(values[0]) > 1e-4
    assert np.abs(values[0] - values[1]).min() > 0
    # They are bounds of one draw each, by hand.
    trained = for_training(flow, KEY, 6)
    noise = trained.probe.value[0]
    e, log_det = forward(flow.encoder_transform, noise, x)
    expected = log_prob(flow.joint, jnp.concatenate([x, e], -1))
    expected = expected - log_prob(flow.encoder_base, noise) + log_det
    np.testing.assert_allclose(log_prob(trained, x), expected, rtol=1e-5)
    # For validation, the fixed noise.
    np.testing.assert_array_equal(log_prob(for_training(flow, None, 6), x), log_prob(flow, x))


def clusters(n, seed=0):
    """Two distant normals, in units of their own, and their log density."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 1)) + 4 * np.sign(rng.normal(size=(n, 1)))
    return (100 + 10 * z).astype(np.float32)


def log_density_of_clusters(x):
    z = (np.asarray(x, float)[:, 0] - 100) / 10
    terms = [-0.5 * (z - m) ** 2 for m in (-4, 4)]
    return np.logaddexp(*terms) - np.log(2 * np.sqrt(2 * np.pi) * 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers", "cnf"])
def test_fit(name):
    config = {"hidden": (16, 16)} if name == "cnf" else {}
    flow = new(nf.augmented_cnf, 1, num_steps=6, num_samples=8, **config)
    if name == "layers":
        joint = new(nf.nsf, 2, depth=4, hidden=(16,))
        encoder = new(nf.realnvp, 1, depth=2, hidden=(16,), context_dim=1)
        flow = nf.AugmentedFlow(KEY, joint, encoder, num_samples=8)
    settings = {"max_epochs": 30, "learning_rate": 1e-2, "progress_bar": False}
    fitted = nf.fit(KEY, flow, clusters(2000), **settings)
    assert fitted.num_skipped == 0
    test = clusters(2000, seed=1)
    truth = log_density_of_clusters(test).mean()
    bound = float(log_prob(fitted.flow.with_probe(KEY, num_samples=64), test).mean())
    assert truth - 0.1 < bound < truth + 0.01
    np.testing.assert_allclose(fitted.val_losses.min(), -truth, atol=0.3)
    draws = np.asarray(sample(fitted.flow, jax.random.key(2), (4000,)))
    np.testing.assert_allclose([draws.mean(), draws.std()], [100, 10 * 17**0.5], rtol=0.06)
    # Again, in other units: one standardisation, with the numbers of the new data.
    again = nf.fit(KEY, fitted.flow, clusters(500) / 1000, max_epochs=1, progress_bar=False).flow
    assert not isinstance(again.transform.transform, nf.transforms.Standardized)
    np.testing.assert_allclose(again.transform.loc.value, [0.1, 0.0], atol=0.005)
    kept = nf.fit(
        KEY, fitted.flow, clusters(500), standardize=False, max_epochs=1, progress_bar=False
    ).flow
    np.testing.assert_array_equal(kept.transform.scale.value, fitted.flow.transform.scale.value)


@pytest.mark.slow
def test_fit_with_context_and_support():
    """log x is normal around the context."""
    rng = np.random.default_rng(0)
    context = rng.uniform(40, 60, size=(2000, 1)).astype(np.float32)
    x = np.exp(context / 10 - 5 + 0.3 * rng.normal(size=(2000, 1))).astype(np.float32)
    joint = new(nf.realnvp, 2, context_dim=1, depth=4, hidden=(16,))
    encoder = new(nf.realnvp, 1, context_dim=2, depth=2, hidden=(8,))
    flow = nf.AugmentedFlow(KEY, joint, encoder, support=(constraints.positive,))
    fitted = nf.fit(KEY, flow, x, context, max_epochs=30, learning_rate=5e-3, progress_bar=False)
    for value in (42.0, 58.0):
        draws = np.log(sample(fitted.flow.condition(jnp.array([value])), KEY, (4000,)))
        np.testing.assert_allclose([draws.mean(), draws.std()], [value / 10 - 5, 0.3], atol=0.08)
    assert log_prob(fitted.flow.condition(context), x).shape == (2000,)


def test_a_likelihood_that_is_learned():
    """In a model, each step with fresh noise."""
    flow, x = by_layers(dim=1, num_samples=1), jnp.asarray(clusters(256) / 100)

    def model(x):
        flow_here = nf.flow_module("flow", flow).with_probe(numpyro.prng_key())
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", flow_here, obs=x)

    svi = SVI(model, lambda x: None, numpyro.optim.Adam(1e-2), Trace_ELBO())
    result = svi.run(KEY, 200, x, progress_bar=False)
    assert list(result.params) == ["flow$params"]
    assert result.losses[-20:].mean() < result.losses[:20].mean() - 50
    with pytest.raises(TypeError, match="expected a FlowDistribution"):
        numpyro.handlers.seed(lambda: nf.flow_module("flow", flow, train_base=True), rng_seed=0)()


def normal_model(y):
    mu = numpyro.sample("mu", dist.Normal(0, 2).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


class Inexact(AutoContinuous):
    """A guide of one's own that does not ask what its density is."""

    def _flow(self):
        return nf.cnf(KEY, self.latent_dim, hidden=(4,), trace="hutchinson")

    def _get_posterior(self):
        return self._flow()

    def get_transform(self, params):
        return self._flow().transform

    def get_base_dist(self):
        return self._flow().base_dist


@pytest.mark.slow
def test_a_solve_that_fails():
    x = points(2)
    with pytest.raises(RuntimeError, match="needed more than `max_steps`"):
        nf.augmented_cnf(KEY, 2, hidden=(4,), max_steps=1).log_prob(x)
    flow = new(nf.augmented_cnf, 2, hidden=(4,), max_steps=1, throw=False)
    np.testing.assert_array_equal(log_prob(flow, x), -jnp.inf)


def test_what_needs_a_density_refuses_it():
    y = jnp.zeros(2)
    for recipe, kind in (
        (partial(nf.augmented_cnf, hidden=(4,)), "lower bound of 16 draws"),
        (partial(nf.cnf, hidden=(4,), trace="hutchinson"), "estimate"),
    ):
        guide = nf.AutoFlow(normal_model, recipe)
        with pytest.raises(ValueError, match=f"expected an exact log density, got .* {kind}"):
            nf.fit_guide(KEY, guide, y, progress_bar=False)
    guide = Inexact(normal_model)
    params = SVI(normal_model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO()).init(KEY, y)
    with pytest.raises(ValueError, match="the estimate, with which .* nor importance weights"):
        nf.importance_log_weights(KEY, guide, {}, y, num_samples=4)
    with pytest.raises(ValueError, match="the estimate, with which"):
        nf.importance_resample(KEY, guide, {}, y, num_samples=4)
    with pytest.raises(ValueError, match="the estimate, with which .* nor neural transport"):
        nf.NeuTraReparam(guide, {})
    assert params is not None
    with pytest.raises(ValueError, match="expected a continuous flow"):
        nf.fit(KEY, small(), points(2, 20), objective=nf.FlowMatching())


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [partial(nf.realnvp, depth=4, hidden=(16,)), partial(nf.cnf, hidden=(8,))],
    ids=["realnvp", "cnf"],
)
def test_a_guide_over_auxiliary_coordinates(recipe):
    """ELBO at most the log evidence and close, weights exact, the posterior right."""
    y = jnp.array([1.0, -2.0])
    evidence = float(dist.Normal(0, 5**0.5).log_prob(y).sum())
    guide = nf.AutoFlow(nf.augmented_model(normal_model, 1), recipe, init="location")
    config = {"num_steps": 600, "num_particles": 32, "num_draws": 4000, "progress_bar": False}
    result = nf.fit_guide(KEY, guide, y, learning_rate=1e-2, **config)
    assert "augmentation$params" in result.params
    log_weights = nf.importance_log_weights(
        jax.random.key(1), guide, result.params, y, num_samples=4000
    )
    elbo, error = float(log_weights.mean()), float(log_weights.std()) / 4000**0.5
    assert evidence - 0.05 < elbo < evidence + 3 * error
    np.testing.assert_allclose(nf.diagnostics.log_evidence(log_weights)[0], evidence, atol=0.02)
    draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(10_000,))
    assert draws["augmentation"].shape == (10_000, 1)
    np.testing.assert_allclose(draws["mu"].mean(0), 0.8 * y, atol=0.1)
    np.testing.assert_allclose(draws["mu"].std(0), 0.8**0.5, atol=0.1)


def test_an_encoder_that_is_wrong_costs_its_divergence():
    """E KL(q(e | theta) || r(e | theta)) below the evidence, in closed form."""
    y = jnp.array([1.0, -2.0])
    evidence = float(dist.Normal(0, 5**0.5).log_prob(y).sum())

    def shifted(key, dim, *, context_dim):
        flow = nf.realnvp(key, dim, context_dim=context_dim, depth=1)
        return nf.FlowDistribution(dist.Normal(jnp.full(1, 0.7), 1.0), flow.transform)

    model = nf.augmented_model(normal_model, 1, encoder=shifted)

    def guide(y):  # the posterior of mu, and e ~ N(0, 1)
        numpyro.sample("mu", dist.Normal(0.8 * y, 0.8**0.5).to_event(1))
        numpyro.sample("augmentation", dist.Normal(jnp.zeros(1), 1.0).to_event(1))

    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(num_particles=20_000))
    state = jax.jit(svi.init)(KEY, y)
    np.testing.assert_allclose(-jax.jit(svi.evaluate)(state, y), evidence - 0.7**2 / 2, atol=0.03)


def test_sites_in_their_unconstrained_spaces():
    """The context of r: every continuous latent site, in order."""
    seen = []

    def spy(key, dim, *, context_dim):
        seen.append(context_dim)
        return nf.realnvp(key, dim, context_dim=context_dim, depth=1, hidden=(4,))

    def model():
        numpyro.sample("a", dist.Dirichlet(jnp.ones(3)))
        numpyro.sample("k", dist.Bernoulli(0.5))
        with numpyro.plate("rows", 4):
            numpyro.sample("b", dist.HalfNormal())
        numpyro.sample("seen", dist.Normal(), obs=0.0)

    with numpyro.handlers.seed(rng_seed=0):
        nf.augmented_model(model, 2, encoder=spy)()
    assert seen == [6]
    with (
        numpyro.handlers.seed(rng_seed=0),
        pytest.raises(ValueError, match="no continuous latent sites"),
    ):
        nf.augmented_model(lambda: numpyro.sample("k", dist.Bernoulli(0.5)))()


JOINT = new(nf.realnvp, 3, depth=1, hidden=(4,))
ENCODER = new(nf.realnvp, 1, context_dim=2, depth=1, hidden=(4,))
BUILD = partial(nf.augmented_cnf, KEY, 2, hidden=(4,))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nf.augmented_cnf(0, 2), TypeError, "jax.random.key"),
        (lambda: BUILD(augment_dim=0), ValueError, "augment_dim: expected at least 1, got 0"),
        (lambda: BUILD(augment_dim=1.5), TypeError, "augment_dim: expected an int"),
        (lambda: BUILD(num_samples=0), ValueError, "num_samples: expected at least 1, got 0"),
        (lambda: BUILD(rtol=0.0), ValueError, "rtol: expected a positive number"),
        (lambda: BUILD(support=constraints.simplex), ValueError, "constraint of each coordinate"),
        (lambda: BUILD(support=constraints.circular), ValueError, "angles, which Continuous"),
        (
            lambda: BUILD(encoder=partial(nf.cnf, hidden=(4,), trace="hutchinson")),
            ValueError,
            "encoder: expected an exact log density",
        ),
        (
            lambda: BUILD(encoder=lambda key, dim, context_dim: dist.Normal()),
            TypeError,
            "encoder: expected a FlowDistribution, got Normal",
        ),
        (
            lambda: nf.AugmentedFlow(KEY, JOINT, nf.realnvp(KEY, 1, context_dim=1, depth=1)),
            ValueError,
            "encoder: expected a flow over fewer coordinates than the 3 of joint",
        ),
        (
            lambda: nf.AugmentedFlow(KEY, JOINT.expand((2,)), ENCODER),
            ValueError,
            r"joint: expected a flow over real vectors of batch shape \(\)",
        ),
        (
            lambda: nf.AugmentedFlow(KEY, JOINT, ENCODER, support=(constraints.positive,)),
            ValueError,
            "support: expected 2 constraints, got 1",
        ),
        (
            lambda: nf.AugmentedFlow(KEY, JOINT, ENCODER).log_prob(jnp.ones(3)),
            ValueError,
            r"expected shape \(\*batch, 2\), got \(3,\)",
        ),
        (
            lambda: nf.AugmentedFlow(KEY, JOINT, ENCODER).condition(jnp.ones(1)),
            ValueError,
            "takes no context",
        ),
        (lambda: nf.fit(KEY, small(), points(3, 20)), ValueError, "x: expected shape"),
        (lambda: nf.augmented_model(normal_model, 0), ValueError, "augment_dim: expected at least"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_site_inside_a_scan_is_refused():
    from numpyro.contrib.control_flow import scan

    flow = by_layers()

    def model():
        def step(carry, _):
            return carry, numpyro.sample("x", flow)

        scan(step, 0.0, None, length=3)

    with pytest.raises(NotImplementedError, match="inside `numpyro.contrib.control_flow` loops"):
        numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
