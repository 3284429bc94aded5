"""Guides for local latent sites, and what guides hand on: AutoGuideList, ArviZ."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuideList

import numpyro_flows as nf

N = 40
X = 2 + 1.5 * jax.random.normal(jax.random.key(5), (N,))


def factor_model(x, batch_size=None):
    """m ~ N(0, 10), z_i ~ N(m, 1), x_i ~ N(z_i, 0.5): all posteriors are normal."""
    m = numpyro.sample("m", dist.Normal(0.0, 10.0))
    with numpyro.plate("rows", N, subsample_size=batch_size) as index:
        z = numpyro.sample("z", dist.Normal(m, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def exact(x):
    """Mean and sd of m, and of each z."""
    precision = 1 / 100 + N / 1.25
    m, m_var = float(x.sum() / 1.25 / precision), 1 / precision
    weight = 0.25 / 1.25
    z = weight * m + (1 - weight) * np.asarray(x)
    return m, m_var**0.5, z, (0.2 + weight**2 * m_var) ** 0.5


def guide_list(**settings):
    guide = AutoGuideList(factor_model)
    guide.append(nf.AutoFlow(handlers.block(factor_model, hide=["z"]), init="location"))
    guide.append(
        nf.AmortizedFlow(
            handlers.block(factor_model, expose=["z"]),
            lambda x, batch_size=None: x[:, None],
            1,
            **settings,
        )
    )
    return guide


def small(key, dim, context_dim):
    return nf.realnvp(key, dim, context_dim=context_dim, depth=2, hidden=(16,), activation="tanh")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 10])
def test_local_and_global_latents(batch_size):
    """Mean-field between m and z is exact in the means; subsampling does not change them."""
    guide = guide_list(flow=small)
    schedule = optax.cosine_decay_schedule(2e-2, 2000)
    svi = SVI(factor_model, guide, optax.adam(schedule), nf.STL_ELBO(num_particles=8))
    result = svi.run(jax.random.key(0), 2000, X, batch_size, progress_bar=False)
    draws = guide.sample_posterior(jax.random.key(1), result.params, X, sample_shape=(4000,))
    m, _, z, _ = exact(X)
    assert draws["z"].shape == (4000, N)
    assert abs(draws["m"].mean() - m) < 0.1
    np.testing.assert_allclose(draws["z"].mean(0), z, atol=0.15)
    # Given m, as mean-field sees it: precision 1 + 4.
    np.testing.assert_allclose(draws["z"].std(0), 5**-0.5, rtol=0.1)


def test_new_rows_need_no_training():
    guide = nf.AmortizedFlow(handlers.block(factor_model, expose=["z"]), lambda x: x[:, None], 1)
    params = handlers.trace(handlers.seed(guide, 0)).get_trace(X)
    params = {name: site["value"] for name, site in params.items() if site["type"] == "param"}
    draws = guide.sample_posterior(jax.random.key(0), params, X + 1, sample_shape=(3, 2))
    assert draws["z"].shape == (3, 2, N)


@pytest.mark.slow
def test_constrained_sites_and_trained_encoders():
    def model(x):
        with numpyro.plate("rows", len(x)):
            rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
            share = numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
            numpyro.sample("x", dist.Normal(rate[:, None] * share, 0.1).to_event(1), obs=x)

    x = jax.random.uniform(jax.random.key(0), (6, 3))
    encoder = nf.nn.Embedding(jax.random.key(1), x[0], 4, hidden=(8,))
    guide = nf.AmortizedFlow(model, encoder, 4, small)
    svi = SVI(model, guide, optax.adam(1e-2), nf.STL_ELBO(num_particles=4))
    state = svi.init(jax.random.key(0), x)
    before = svi.get_params(state)
    first = svi.evaluate(state, x)
    result = svi.run(jax.random.key(0), 300, x, progress_bar=False)
    assert result.losses[-50:].mean() < first - 1
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()),
        before["auto_local_encoder$params"],
        result.params["auto_local_encoder$params"],
    )
    assert all(jax.tree.leaves(moved))
    draws = guide.sample_posterior(jax.random.key(1), result.params, x, sample_shape=(5,))
    assert draws["share"].shape == (5, 6, 3)
    np.testing.assert_allclose(draws["share"].sum(-1), 1, atol=1e-5)
    assert (draws["rate"] > 0).all()


@pytest.mark.slow
def test_weights_of_a_composed_guide_are_density_ratios():
    guide = guide_list(flow=small)
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(X)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    log_weights = nf.importance_log_weights(jax.random.key(0), guide, params, X, num_samples=2000)
    draws, khat = nf.importance_resample(
        jax.random.key(0), guide, params, X, num_samples=10, num_proposals=500
    )
    assert np.isfinite(log_weights).all()
    assert np.isfinite(khat)
    assert draws["z"].shape == (10, N)
    loss = nf.STL_ELBO(num_particles=2000).loss(jax.random.key(3), params, factor_model, guide, X)
    error = 5 * float(log_weights.std()) / 2000**0.5
    assert abs(float(log_weights.mean()) + loss) < error


def test_guides_of_a_list_have_keys_of_their_own():
    def model():
        numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("b", dist.Normal(0, 1))

    guide = AutoGuideList(model)
    for name, prefix in (("a", "one"), ("b", "two")):
        part = handlers.block(model, expose=[name])
        guide.append(nf.AutoFlow(part, prefix=prefix, init="location"))
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    draws = guide.sample_posterior(jax.random.key(0), params, sample_shape=(500,))
    assert abs(np.corrcoef(draws["a"], draws["b"])[0, 1]) < 0.2


def test_bad_input():
    def two_plates(x):
        with numpyro.plate("a", 3):
            numpyro.sample("u", dist.Normal(0, 1))
        with numpyro.plate("b", 4):
            numpyro.sample("v", dist.Normal(0, 1))

    def encoder(x):
        return x[:, None]

    with pytest.raises(ValueError, match=r"all in one and the same plate, got .*'u': \['a'\]"):
        handlers.seed(nf.AmortizedFlow(two_plates, encoder, 1), 0)(X)
    local = handlers.block(factor_model, expose=["z"])
    with pytest.raises(ValueError, match=r"expected a context of shape \(rows, 2\)"):
        handlers.seed(nf.AmortizedFlow(local, encoder, 2), 0)(X)
    with pytest.raises(ValueError, match="expected 40 rows"):
        handlers.seed(nf.AmortizedFlow(local, lambda x: x[:3, None], 1), 0)(X)
    with pytest.raises(TypeError, match="encoder: expected something to call"):
        nf.AmortizedFlow(local, X, 1)
    with pytest.raises(ValueError, match="never set up"):
        nf.AmortizedFlow(local, encoder, 1).sample_posterior(jax.random.key(0), {}, X)


def test_guides_refuse_what_they_cannot_follow():
    def moving():
        low = numpyro.sample("low", dist.Normal(0, 1))
        numpyro.sample("u", dist.Uniform(low, low + 1))

    with pytest.raises(ValueError, match="Site 'u': its support depends on other latent sites"):
        handlers.seed(nf.AutoFlow(moving, init="location"), 0)()

    def broken(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ValueError, match="at every start: look at site 'y'"):
        handlers.seed(nf.AutoFlow(broken), 0)(jnp.array([1.0, jnp.nan]))

    def bounds_from_data(high):
        numpyro.sample("u", dist.Uniform(0.0, high))

    handlers.seed(nf.AutoFlow(bounds_from_data, init="location"), 0)(jnp.array(3.0))


@pytest.mark.slow
def test_supports_may_be_simplices_beside_reals():
    def model():
        numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
        numpyro.sample("t", dist.ImproperUniform(constraints.interval(0.0, 2.0), (), ()))

    trace = handlers.trace(handlers.seed(nf.AutoFlow(model, init="location"), 0)).get_trace()
    np.testing.assert_allclose(trace["p"]["value"].sum(), 1, rtol=1e-5)
