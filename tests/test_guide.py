"""AutoFlow and the path-gradient ELBO."""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from compiled import inverse, log_prob, new
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    init_to_median,
    init_to_value,
)
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal
from numpyro.infer.util import potential_energy
from programs import count_loops
from small import points, shake

import numpyro_flows as nf
from numpyro_flows.infer.importance import weighted_draws

SMALL = partial(nf.realnvp, depth=4, hidden=(8,))
# The search for a preconditioner has tests of its own.
AutoFlow = partial(nf.AutoFlow, init="location")
Y = jnp.array([1.2, -0.3, 0.7])


def model(y=Y):
    """A positive site, a plated one, a deterministic one and a trained parameter."""
    scale = numpyro.sample("scale", dist.Gamma(4.0, 4.0))
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("rows", 3):
        x = numpyro.sample("x", dist.Normal(loc, scale))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
    numpyro.deterministic("total", x.sum())


def regression(y):
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(beta[0] + 0.9 * beta[1], 0.5), obs=y)


def train(model, guide, *args, steps=100, elbo=None, learning_rate=1e-2, **kwargs):
    svi = SVI(model, guide, optax.adam(learning_rate), elbo or Trace_ELBO(num_particles=8))
    return svi.run(jax.random.key(0), steps, *args, progress_bar=False, **kwargs)


@pytest.fixture(scope="module")
def trained():
    guide = AutoFlow(model, SMALL)
    return guide, train(model, guide, steps=200).params


@pytest.mark.slow
def test_starts_where_the_diagonal_normal_starts():
    """init_loc_fn and init_scale are honoured, unlike by AutoIAFNormal."""

    def far(y):
        mu = numpyro.sample("mu", dist.Normal(0, 100).expand((2,)).to_event(1))
        numpyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)

    y = jnp.array([100.0, -70.0])
    init = init_to_value(values={"mu": y})
    losses = {}
    for name, make in {
        "diagonal": partial(AutoDiagonalNormal, init_loc_fn=init, init_scale=0.2),
        "iaf": partial(AutoIAFNormal, init_loc_fn=init),
        "flow": partial(AutoFlow, flow=SMALL, init_loc_fn=init, init_scale=0.2),
    }.items():
        svi = SVI(far, make(far), optax.adam(1e-3), Trace_ELBO(num_particles=2000))
        state = svi.init(jax.random.key(0), y)
        losses[name] = float(jax.jit(svi.evaluate)(state, y))
    assert abs(losses["flow"] - losses["diagonal"]) < 0.2
    assert losses["iaf"] > 1000

    guide = AutoFlow(far, SMALL, init_loc_fn=init, init_scale=0.2)
    svi = SVI(far, guide, optax.adam(1e-3), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), y))
    draws = guide.get_posterior(params).sample(jax.random.key(1), (20_000,))
    np.testing.assert_allclose(draws.mean(0), y, atol=0.01)
    np.testing.assert_allclose(draws.std(0), 0.2, rtol=0.03)


def test_finds_a_conjugate_posterior():
    precision = np.eye(2) + 4 * np.array([[1.0, 0.9], [0.9, 0.81]])
    covariance = np.linalg.inv(precision)
    mean = covariance @ (4 * 1.5 * np.array([1.0, 0.9]))
    guide = AutoFlow(regression, SMALL)
    result = train(
        regression,
        guide,
        1.5,
        steps=3000,
        elbo=nf.STL_ELBO(num_particles=16),
        learning_rate=optax.cosine_decay_schedule(1e-2, 3000),
    )
    draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(50_000,))["beta"]
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.03)
    log_weights = nf.importance_log_weights(jax.random.key(2), guide, result.params, 1.5)
    evidence = dist.Normal(0.0, (0.25 + 1 + 0.81) ** 0.5).log_prob(1.5)
    assert abs(float(jax.nn.logsumexp(log_weights)) - np.log(len(log_weights)) - evidence) < 0.01
    assert nf.diagnostics.importance_ess(log_weights) > 0.95
    quantiles = guide.quantiles(result.params, [0.1, 0.5, 0.9])["beta"]
    exact = dist.Normal(mean, np.sqrt(np.diag(covariance))).icdf(
        jnp.array([0.1, 0.5, 0.9])[:, None]
    )
    np.testing.assert_allclose(quantiles, exact, atol=0.05)
    np.testing.assert_allclose(guide.median(result.params)["beta"], exact[1], atol=0.05)


def test_shapes_and_sites(trained):
    guide, params = trained
    draws = guide.sample_posterior(jax.random.key(0), params, sample_shape=(5, 2))
    shapes = {name: value.shape for name, value in draws.items() if name != "y"}
    assert shapes == {"scale": (5, 2), "x": (5, 2, 3), "total": (5, 2)}
    assert (draws["scale"] > 0).all()
    np.testing.assert_allclose(draws["total"], draws["x"].sum(-1), rtol=1e-4, atol=1e-5)
    assert guide.sample_posterior(jax.random.key(0), params)["x"].shape == (3,)
    assert guide.median(params)["x"].shape == (3,)
    assert guide.quantiles(params, [0.1, 0.9])["x"].shape == (2, 3)
    assert guide.get_base_dist().event_shape == (4,)
    assert params["loc"] != 0
    draws = Predictive(model, guide=guide, params=params, num_samples=4)(jax.random.key(0), None)
    assert draws["y"].shape == (4, 3)
    assert Predictive(guide, params=params, num_samples=4)(jax.random.key(0))["x"].shape == (4, 3)


@pytest.mark.parametrize("init", ["auto", "location"])
def test_starts_may_be_python_numbers(init):
    def pair():
        numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("scale", dist.HalfNormal(1.0))

    starts = [{"x": 1, "scale": 2.0}, {"x": jnp.array(1.0), "scale": jnp.array(2.0)}]
    a, b = (
        nf.AutoFlow(pair, nf.realnvp, init=init, init_loc_fn=init_to_value(values=values))
        for values in starts
    )
    for guide in (a, b):
        handlers.seed(guide, 0)()
    np.testing.assert_array_equal(a._init_latent, b._init_latent)


def test_posterior_density_at_any_point(trained):
    guide, params = trained
    posterior = guide.get_posterior(params)
    anywhere = 3 * jax.random.normal(jax.random.key(0), (50, 4))
    stock = dist.TransformedDistribution(guide.get_base_dist(), guide.get_transform(params))
    np.testing.assert_allclose(log_prob(posterior, anywhere), log_prob(stock, anywhere), rtol=1e-3)
    assert count_loops(jax.jit(posterior.log_prob).lower(anywhere).compile()) == 1


def test_importance_weights_are_density_ratios(trained):
    """The same in the constrained space of the sites as in the guide's own."""
    guide, params = trained
    draws, log_p, log_q = weighted_draws(jax.random.key(0), guide, params, (), {}, 7)
    supports = {"scale": dist.constraints.positive, "x": dist.constraints.real}
    z = jnp.concatenate(
        [
            dist.biject_to(supports[name]).inv(draws[name]).reshape(7, -1)
            for name, _ in guide.space.shapes
        ],
        axis=-1,
    )
    substituted = handlers.substitute(model, {"loc": params["loc"]})

    @jax.jit
    @jax.vmap
    def log_joint(z):
        return -potential_energy(substituted, (), {}, guide._unpack_latent(z))

    expected = log_joint(z) - log_prob(guide.get_posterior(params), z)
    np.testing.assert_allclose(log_p - log_q, expected, atol=1e-3)
    weights = nf.importance_log_weights(jax.random.key(0), guide, params, num_samples=7)
    np.testing.assert_allclose(weights, expected, atol=1e-3)


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=2, vectorize_particles=False),
        pytest.param(TraceMeanField_ELBO(num_particles=2), marks=pytest.mark.slow),
        pytest.param(TraceGraph_ELBO(num_particles=2), marks=pytest.mark.slow),
        RenyiELBO(alpha=0.5, num_particles=2),
        nf.STL_ELBO(num_particles=2),
    ],
    ids=lambda elbo: type(elbo).__name__,
)
def test_every_elbo_accepts_it(elbo):
    result = train(model, AutoFlow(model, SMALL), steps=3, elbo=elbo)
    assert np.isfinite(result.losses).all()


def test_enumeration_beside_a_flow():
    def mixture(y):
        mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        with numpyro.plate("rows", len(y)):
            k = numpyro.sample(
                "k", dist.Categorical(jnp.ones(2) / 2), infer={"enumerate": "parallel"}
            )
            numpyro.sample("y", dist.Normal(mu[k], 1.0), obs=y)

    guide = AutoFlow(handlers.block(mixture, hide=["k"]), SMALL)
    assert np.isfinite(train(mixture, guide, Y, steps=3, elbo=TraceEnum_ELBO()).losses).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "base",
    [
        dist.StudentT(5.0),
        dist.LowRankMultivariateNormal(jnp.zeros(2), jnp.array([[1.0], [0.8]]), jnp.ones(2)),
    ],
    ids=lambda base: type(base).__name__,
)
def test_bases_other_than_the_normal(base):
    """The guide's density is that of its base, moved."""
    guide = AutoFlow(regression, partial(SMALL, base=base))
    result = train(regression, guide, 1.5, steps=3, elbo=nf.STL_ELBO(num_particles=4))
    assert np.isfinite(result.losses).all()
    posterior = guide.get_posterior(result.params)
    x = points(2)
    z, log_det = inverse(posterior.transform, x)
    own = base.log_prob(z) if base.event_shape else base.log_prob(z).sum(-1)
    np.testing.assert_allclose(log_prob(posterior, x), own + log_det, rtol=1e-5)


def test_one_dimensional_latent():
    def one():
        numpyro.sample("x", dist.Normal(2.0, 3.0))

    guide = AutoFlow(one, SMALL)
    schedule = optax.cosine_decay_schedule(5e-2, 800)
    result = train(one, guide, steps=800, learning_rate=schedule)
    draws = guide.sample_posterior(jax.random.key(0), result.params, sample_shape=(20_000,))["x"]
    assert abs(draws.mean() - 2) < 0.25
    assert abs(draws.std() - 3) < 0.3


def test_pickles_and_params_restore_it(trained):
    guide, params = trained
    copy, copied = pickle.loads(pickle.dumps((guide, params)))
    z = jax.random.normal(jax.random.key(0), (5, 4))
    expected = log_prob(guide.get_posterior(params), z)
    np.testing.assert_array_equal(log_prob(copy.get_posterior(copied), z), expected)
    fresh = AutoFlow(model, SMALL)
    handlers.seed(fresh, 7)()
    np.testing.assert_array_equal(log_prob(fresh.get_posterior(params), z), expected)
    draws = copy.sample_posterior(jax.random.key(0), copied, sample_shape=(3,))
    assert draws["x"].shape == (3, 3)


def followed(y, follow):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    if follow:
        numpyro.deterministic("sum", x.sum() + y.mean())
    numpyro.sample("y", dist.Normal(x, s).to_event(1), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["auto", "location"])
def test_set_up_and_trained_under_jit(init):
    y = jnp.array([0.3, 1.2])
    guide = nf.AutoFlow(followed, SMALL, init=init)
    svi = SVI(followed, guide, optax.adam(1e-2), Trace_ELBO(), follow=False)
    state = jax.jit(svi.init)(jax.random.key(0), y)
    for value in vars(guide).values():
        assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))
    state, loss = jax.jit(svi.update)(state, y)
    assert np.isfinite(loss)
    params = svi.get_params(state)
    draws = guide.sample_posterior(jax.random.key(0), params, sample_shape=(3,))
    assert draws["x"].shape == (3, 2)
    assert (draws["s"] > 0).all()
    copy = pickle.loads(pickle.dumps(guide))
    again = copy.sample_posterior(jax.random.key(0), params, sample_shape=(3,))
    np.testing.assert_array_equal(draws["x"], again["x"])

    guide = nf.AutoFlow(followed, SMALL, init=init)
    svi = SVI(followed, guide, optax.adam(1e-2), Trace_ELBO(), follow=True)
    params = svi.get_params(jax.jit(svi.init)(jax.random.key(0), y))
    with pytest.raises(ValueError, match="set up under `jax.jit`.*outside `jit`"):
        guide.sample_posterior(jax.random.key(0), params)
    params = svi.get_params(svi.init(jax.random.key(0), y))
    draws = guide.sample_posterior(jax.random.key(0), params)
    np.testing.assert_allclose(draws["sum"], draws["x"].sum() + y.mean(), rtol=1e-6)


def test_models_that_no_guide_can_follow():
    def branches():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        if x > 0:
            numpyro.sample("y", dist.Normal(0.0, 1.0))

    def grows():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(0.0, 1.0).expand([int(jnp.abs(x)) + 1]).to_event(1))

    def discrete():
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(z, 1.0))

    for broken in (branches, grows):
        with pytest.raises(ValueError, match="structure or shapes depend .* masks"):
            handlers.seed(nf.AutoFlow(broken, SMALL), 0)()
    with pytest.raises(ValueError, match="'z' is discrete .*block.*config_enumerate"):
        handlers.seed(nf.AutoFlow(discrete, SMALL), 0)()


def test_supports_that_come_with_the_arguments_are_refused_under_jit():
    def model(high):
        numpyro.sample("x", dist.Uniform(0.0, high))

    svi = SVI(model, AutoFlow(model, SMALL), optax.adam(1e-2), Trace_ELBO())
    with pytest.raises(ValueError, match="'x': its support depends on the model's arguments"):
        jax.jit(svi.init)(jax.random.key(0), 2.0)


@pytest.mark.slow
def test_init_to_median_and_float64(x64):
    guide = AutoFlow(model, SMALL, init_loc_fn=init_to_median)
    result = train(model, guide, steps=3)
    assert guide.get_posterior(result.params).sample(jax.random.key(0)).dtype == jnp.float64
    assert all(
        leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(result.params["auto_flow$params"])
    )


def gaussian():
    numpyro.sample("x", dist.Normal(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0])).to_event(1))


def gradient(elbo, guide):
    """Of the loss, as one program of parameters and key."""
    return jax.jit(jax.grad(lambda params, key: elbo.loss(key, params, gaussian, guide)))


def test_path_gradient_is_exactly_zero_at_the_optimum():
    """Where the guide is the posterior every single draw has a zero gradient."""
    guide = AutoFlow(gaussian, SMALL)
    svi = SVI(gaussian, guide, optax.adam(1e-2), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0)))
    params["auto_preconditioner"] = nf.transforms.FixedAffine(
        jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0])
    )
    path, score = (gradient(elbo(num_particles=4), guide) for elbo in (nf.STL_ELBO, Trace_ELBO))
    for seed in range(3):
        key = jax.random.key(seed)
        assert np.abs(ravel_pytree(path(params, key))[0]).max() == 0.0
        assert np.abs(ravel_pytree(score(params, key))[0]).max() > 0.1


@pytest.mark.slow
def test_path_gradient_has_the_same_mean(x64):
    """Away from the optimum the two estimators differ in variance alone."""
    guide = AutoFlow(gaussian, partial(nf.realnvp, depth=2, hidden=(4,), activation="tanh"))
    svi = SVI(gaussian, guide, optax.adam(1e-2), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0)))
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    n = 5_000
    key = jax.random.key(1)
    path, full = (
        gradient(elbo(num_particles=n), guide)(params, key) for elbo in (nf.STL_ELBO, Trace_ELBO)
    )
    for a, b in zip(jax.tree.leaves(path), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(a, b, atol=0.3, rtol=0.05)
    np.testing.assert_allclose(
        nf.STL_ELBO(num_particles=8).loss(key, params, gaussian, guide),
        Trace_ELBO(num_particles=8).loss(key, params, gaussian, guide),
        rtol=1e-6,
    )


@pytest.mark.parametrize("conditional", [pytest.param(False, marks=pytest.mark.slow), True])
def test_particles_together_are_particles_one_by_one(conditional):
    """``vmap`` makes one batch of them; a flow that depends on a latent has a context for each."""
    recipe = new(nf.realnvp, 2, depth=2, hidden=(4,), context_dim=int(conditional))
    params, rest = nf.partition(shake(recipe, jax.random.key(1)))

    def model():
        scale = numpyro.sample("scale", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(scale, jnp.array([0.5, 2.0])).to_event(1))

    def guide():
        flow = nf.combine(numpyro.param("flow$params", params), rest)
        scale = numpyro.sample("scale", dist.Normal(numpyro.param("loc", 0.3), 0.5))
        numpyro.sample("x", flow.condition(scale[None]) if conditional else flow)

    @jax.jit
    def together_and_apart(given):
        return [
            jax.value_and_grad(lambda p, e=elbo: e.loss(jax.random.key(2), p, model, guide))(given)
            for elbo in (
                nf.STL_ELBO(num_particles=3),
                nf.STL_ELBO(num_particles=3, vectorize_particles=False),
            )
        ]

    together, apart = together_and_apart({"flow$params": params, "loc": jnp.asarray(0.3)})
    assert np.abs(ravel_pytree(apart)[0]).max() > 0.1
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_path_gradient_leaves_other_guides_alone():
    def guide():
        loc = numpyro.param("loc", jnp.zeros(2))
        numpyro.sample("x", dist.Normal(loc, 1.0).to_event(1))

    params, key = {"loc": jnp.ones(2)}, jax.random.key(0)
    np.testing.assert_array_equal(
        gradient(nf.STL_ELBO(num_particles=4), guide)(params, key)["loc"],
        gradient(Trace_ELBO(num_particles=4), guide)(params, key)["loc"],
    )


def test_bad_input(trained):
    guide, params = trained
    fresh = AutoFlow(model, SMALL)
    with pytest.raises(ValueError, match=r"call `svi.init\(key, \*args\)`"):
        fresh.get_posterior(params)
    with pytest.raises(ValueError, match="does not know its model's shapes"):
        fresh.sample_posterior(jax.random.key(0), params)
    with pytest.raises(ValueError, match="does not know its model's shapes"):
        fresh.get_base_dist()
    with pytest.raises(ValueError, match=r"expected the trained parameters .* got \['loc'\]"):
        guide.get_posterior({"loc": 0.0})
    with pytest.raises(ValueError, match="init_scale: expected a positive number, got 0"):
        AutoFlow(model, init_scale=0)
    with pytest.raises(TypeError, match="expected a function of a key and a dimension"):
        AutoFlow(model, nf.realnvp(jax.random.key(0), 4))
    with pytest.raises(TypeError, match="expected a function of a key and a dimension"):
        AutoFlow(model, "realnvp")
    with pytest.raises(TypeError, match="returns Normal"):
        handlers.seed(AutoFlow(model, lambda key, dim: dist.Normal(0, 1)), 0)()
    for config in ({"support": dist.constraints.positive}, {"context_dim": 1}):
        with pytest.raises(ValueError, match="expected an unconditional flow over real vectors"):
            handlers.seed(AutoFlow(model, partial(nf.realnvp, **config)), 0)()
    with pytest.raises(ValueError, match="no latent sites.*observed"):
        handlers.seed(AutoFlow(lambda: numpyro.sample("y", dist.Normal(0, 1), obs=0.0)), 0)()
    with pytest.raises(TypeError, match="write `jax.random.key"):
        nf.importance_log_weights(0, guide, params)
