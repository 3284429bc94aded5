"""Learnable and Bayesian flows inside NumPyro models."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from compiled import new
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.util import log_density
from small import flow, points

import numpyro_flows as nf

SMALL = {"depth": 4, "hidden": (8,)}
SHIFTED = 1.0 + 0.5 * jax.random.normal(jax.random.key(5), (64, 2))


def train(model, *args, steps=300, guide=lambda *args: None):
    svi = SVI(model, guide, optax.adam(2e-2), Trace_ELBO())
    return svi.run(jax.random.key(0), steps, *args, progress_bar=False)


def test_likelihood_under_a_plate_learns():
    learned = new(nf.realnvp, 2, **SMALL)

    def model(x):
        f = nf.flow_module("flow", learned)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", f, obs=x)

    result = train(model, SHIFTED)
    # The entropy of N(1, 0.5^2)^2 is 1.45 nats; standing still costs 3.1.
    assert result.losses[0] / 64 > 2.8
    assert result.losses[-20:].mean() / 64 < 1.6
    assert set(result.params) == {"flow$params"}
    _, rest = nf.partition(learned)
    trained = nf.combine(result.params["flow$params"], rest)
    total, _ = log_density(model, (SHIFTED,), {}, result.params)
    np.testing.assert_allclose(trained.log_prob(SHIFTED).sum(), total, rtol=1e-5)
    x = handlers.substitute(lambda: nf.flow_module("flow", learned), result.params)().sample(
        jax.random.key(1), (2000,)
    )
    assert abs(x.mean() - SHIFTED.mean()) < 0.1


def test_plate_log_density_is_the_sum_over_rows():
    f = flow(nf.realnvp, 2)
    x = points(2)

    def model():
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", f, obs=x)

    total, _ = log_density(model, (), {}, {})
    np.testing.assert_allclose(total, f.log_prob(x).sum(), rtol=1e-5)
    with handlers.seed(rng_seed=0), numpyro.plate("a", 3), numpyro.plate("b", 4, dim=-2):
        assert numpyro.sample("x", f).shape == (4, 3, 2)


def test_covariates_under_a_plate_get_the_right_gradient(x64):
    f = flow(nf.realnvp, 2, context_dim=3, activation="tanh")
    x, c = points(2), points(3, seed=4)

    def model(c):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", f.condition(c), obs=x)

    def total(c):
        return log_density(model, (c,), {}, {})[0]

    gradient = jax.grad(total)(c)
    assert gradient.shape == c.shape
    step = 1e-5
    for i, j in ((0, 0), (5, 2)):
        bump = jnp.zeros_like(c).at[i, j].set(step)
        numeric = (total(c + bump) - total(c - bump)) / (2 * step)
        np.testing.assert_allclose(gradient[i, j], numeric, rtol=1e-6)
    # Each row sees its own covariate only.
    one_row = jax.grad(lambda c: f.condition(c).log_prob(x)[2])(c)
    assert np.abs(one_row[2]).max() > 0
    np.testing.assert_array_equal(np.delete(one_row, 2, axis=0), 0)


def test_rows_of_a_conditional_flow_have_their_own_noise():
    f = flow(nf.realnvp, 2, context_dim=1).condition(jnp.zeros((1000, 1)))
    x = f.sample(jax.random.key(0))
    assert x.shape == (1000, 2)
    assert x.std(axis=0).min() > 0.3
    assert f.expand((3, 1000)).sample(jax.random.key(0)).shape == (3, 1000, 2)


def test_flow_as_prior_under_nuts():
    """A flow that is exactly N(1, 2^2) as the prior of a conjugate model."""
    prior = nf.FlowDistribution(
        dist.Normal(jnp.zeros(1), 1.0),
        nf.transforms.Standardized(new(nf.realnvp, 1, **SMALL).transform, 1.0, 2.0),
    )

    def model(y):
        theta = numpyro.sample("theta", prior)
        numpyro.sample("y", dist.Normal(theta[0], 1.0), obs=y)

    mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(jax.random.key(0), 3.0)
    theta = mcmc.get_samples()["theta"]
    assert theta.shape == (2000, 1)
    # Posterior of the conjugate pair: precision 1/4 + 1, mean (1/4 + 3) / (5/4).
    assert abs(theta.mean() - 2.6) < 0.1
    assert abs(theta.std() - 0.8**0.5) < 0.08


def test_train_base_respects_constraints():
    learned = nf.FlowDistribution(
        dist.Normal(jnp.zeros(2), jnp.ones(2)), new(nf.realnvp, 2, **SMALL).transform
    )

    def model(x, train_base):
        f = nf.flow_module("flow", learned, train_base=train_base)
        numpyro.sample("x", f.expand((len(x),)), obs=x)

    fixed = train(model, SHIFTED, False, steps=5)
    assert set(fixed.params) == {"flow$params"}
    result = train(model, SHIFTED, True)
    assert set(result.params) == {"flow$params", "flow$base.loc", "flow$base.scale"}
    assert (result.params["flow$base.scale"] > 0).all()
    assert (result.params["flow$base.loc"] != 0).all()
    assert result.losses[-1] / 64 < 1.6


def test_random_flow_module_sites_and_prior():
    learned = new(nf.realnvp, 2, **SMALL)

    def sites(prior):
        tr = handlers.trace(
            handlers.seed(lambda: nf.random_flow_module("f", learned, prior), 0)
        ).get_trace()
        return {name: site for name, site in tr.items() if site["type"] in ("sample", "param")}

    everywhere = sites(dist.Normal(0.0, 1e-3))
    assert len(everywhere) == len(jax.tree.leaves(nf.partition(learned)[0]))
    assert "f/layers.conditioner.weights.0" in everywhere
    for site in everywhere.values():
        assert site["type"] == "sample"
        assert site["fn"].event_shape == site["value"].shape
        assert np.abs(site["value"]).max() < 0.01
    some = sites({"layers.conditioner.biases.1": dist.Normal(0, 1)})
    assert some["f/layers.conditioner.biases.1"]["type"] == "sample"
    assert some["f/layers.conditioner.weights.0"]["type"] == "param"
    by_shape = sites(lambda name, shape: dist.Normal(0, 1 / shape[-1] if "weight" in name else 1.0))
    assert by_shape.keys() == everywhere.keys()
    with pytest.raises(ValueError, match=r"no parameters named \['weights'\]; this flow has"):
        sites({"weights": dist.Normal(0, 1)})


@pytest.mark.slow
def test_bayesian_flow_under_nuts():
    learned = new(nf.realnvp, 1, depth=1, hidden=(2,))
    x = 1.0 + jax.random.normal(jax.random.key(1), (40, 1))

    def model():
        f = nf.random_flow_module("f", learned, dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", f, obs=x)

    mcmc = MCMC(NUTS(model, max_tree_depth=6), num_warmup=100, num_samples=100, progress_bar=False)
    mcmc.run(jax.random.key(0))
    shift = mcmc.get_samples()["f/layers.conditioner.biases.1"][:, 0, 0]
    # With an empty conditioner this bias is the flow's location: near the mean of the data.
    assert abs(shift.mean() - x.mean()) < 0.6


@pytest.mark.slow
def test_flow_inside_scan():
    """A flow as the transition density of a state-space model."""
    f = flow(nf.realnvp, 2, context_dim=2)
    xs = points(2, 7)

    def model(xs):
        def step(previous, x):
            x = numpyro.sample("x", f.condition(previous), obs=x)
            return x, None

        scan(step, jnp.zeros(2), xs)

    previous = jnp.concatenate([jnp.zeros((1, 2)), xs[:-1]])
    expected = f.condition(previous).log_prob(xs).sum()
    total, tr = log_density(model, (xs,), {}, {})
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert tr["x"]["fn"].batch_shape == (7,)

    def with_plate(xs):
        def step(previous, x):
            with numpyro.plate("series", 3):
                x = numpyro.sample("x", f.condition(previous), obs=x)
            return x, None

        scan(step, jnp.zeros((3, 2)), xs)

    series = points(2, 21).reshape(7, 3, 2)
    previous = jnp.concatenate([jnp.zeros((1, 3, 2)), series[:-1]])
    expected = f.condition(previous).log_prob(series).sum()
    total, _ = log_density(with_plate, (series,), {}, {})
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.slow
def test_learnable_latent_flow_inside_scan():
    learned = new(nf.realnvp, 2, context_dim=2, **SMALL)
    ys = points(2, 5)

    def model(ys):
        f = nf.flow_module("flow", learned)

        def step(previous, y):
            x = numpyro.sample("x", f.condition(previous))
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
            return x, None

        scan(step, jnp.zeros(2), ys)

    draws = Predictive(model, num_samples=3)(jax.random.key(0), ys)
    assert draws["x"].shape == (3, 5, 2)
    guide = numpyro.infer.autoguide.AutoDiagonalNormal(model)
    result = train(model, ys, steps=100, guide=guide)
    assert np.isfinite(result.losses).all()
    assert result.losses[-20:].mean() < result.losses[:20].mean()
    moved = jax.tree.leaves(result.params["flow$params"])
    start = jax.tree.leaves(nf.partition(learned)[0])
    assert any((a != b).any() for a, b in zip(moved, start, strict=True))


def test_bad_input():
    with pytest.raises(TypeError, match="expected a FlowDistribution, got Normal"):
        nf.flow_module("flow", dist.Normal(0, 1))
    with pytest.raises(TypeError, match="expected a FlowDistribution, got Scan"):
        nf.random_flow_module("flow", flow(nf.realnvp, 2).transform, dist.Normal(0, 1))
    conditional = flow(nf.realnvp, 2, context_dim=1)
    with (
        pytest.raises(ValueError, match=r"call flow.condition\(context\)"),
        handlers.seed(rng_seed=0),
    ):
        numpyro.sample("x", conditional)
