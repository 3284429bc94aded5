"""Flow matching: judged by known entropies and SciPy's assignment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import new
from numpyro.distributions import constraints
from scipy.optimize import linear_sum_assignment

import numpyro_flows as nf

KEY = jax.random.key(0)
COUPLINGS = ("independent", "optimal_transport")
QUICK = {"max_epochs": 40, "learning_rate": 1e-2, "batch_size": 200, "progress_bar": False}


def match(flow, x, context=None, *, coupling="independent", **settings):
    return nf.fit(KEY, flow, x, context, objective=nf.FlowMatching(coupling), **settings)


def pairs(n, seed=0):
    """A normal and a noisy parabola over it, whose entropy is known."""
    z = np.random.default_rng(seed).normal(size=(n, 2))
    x = np.stack([5 + 2 * z[:, 0], 0.5 * z[:, 1] + 0.4 * z[:, 0] ** 2], axis=1)
    return x.astype(np.float32), 1 + np.log(2 * np.pi) + np.log(2 * 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["independent", "optimal_transport"])
def test_the_density_that_it_finds(coupling):
    x, entropy = pairs(5000)
    flow = new(nf.cnf, 2, hidden=(32, 32))
    settings = {**QUICK, "max_epochs": 100}
    fitted = match(flow, x, coupling=coupling, **settings)
    assert fitted.val_losses[-1] < fitted.val_losses[0]
    loss = -float(fitted.flow.log_prob(pairs(3000, seed=1)[0]).mean())
    assert entropy - 0.05 < loss < entropy + 0.1
    draws = np.asarray(fitted.flow.sample(jax.random.key(1), (5000,)))
    np.testing.assert_array_less(np.abs(draws.mean(0) - [5, 0.4]), 0.15 * x.std(0))
    # There and back through a trained flow, at the default tolerance in float32.
    back = fitted.flow.transform(fitted.flow.transform.inv(x[:1000]))
    np.testing.assert_array_less(np.abs(np.asarray(back) - x[:1000]) / x.std(0), 1e-3)


def test_a_conditional_density_on_a_support():
    """Log of x is normal around the context."""
    rng = np.random.default_rng(0)
    context = rng.uniform(-1, 1, size=(3000, 1)).astype(np.float32)
    x = np.exp(context + 0.3 * rng.normal(size=(3000, 1))).astype(np.float32)
    flow = new(nf.cnf, 1, context_dim=1, support=constraints.positive, hidden=(32, 32))
    fitted = match(flow, x, context, **QUICK)
    for value in (-0.8, 0.0, 0.8):
        draws = np.log(fitted.flow.condition(jnp.array([value])).sample(KEY, (4000,)))
        np.testing.assert_allclose(draws.mean(), value, atol=0.06)
        np.testing.assert_allclose(draws.std(), 0.3, atol=0.06)


@pytest.mark.slow
def test_optimal_transport_pairs_as_scipy_does():
    """The loss of a field that stands still is the mean squared distance of the pairs."""
    x = jnp.asarray(pairs(64)[0]) - jnp.array([5.0, 0.0])
    flow = new(nf.cnf, 2, hidden=(4,))
    key = jax.random.key(3)
    z = flow.base_dist.sample(jax.random.split(key)[0], (64,))
    distances = ((np.asarray(x)[:, None] - np.asarray(z)[None]) ** 2).sum(-1)
    losses = {name: nf.FlowMatching(name)(flow, {"x": x}, key) for name in COUPLINGS}
    np.testing.assert_allclose(losses["independent"], np.diag(distances), rtol=1e-4)
    best = distances[linear_sum_assignment(distances)]
    np.testing.assert_allclose(losses["optimal_transport"], best, rtol=1e-4, atol=1e-5)


def test_another_end_time_is_another_clock():
    """A field on [0, T] that is slower by T has the same loss."""
    x = jnp.asarray(pairs(32)[0])

    def field(speed):
        return lambda t, z, context: (jnp.sin(t * speed) - z) * speed

    losses = [
        nf.FlowMatching()(new(nf.cnf, 2, field=field(1 / end), end_time=end), {"x": x}, None)
        for end in (1.0, 4.0)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_context_that_a_network_reads():
    x, context = jnp.asarray(pairs(32)[0]), {"a": jnp.linspace(-1, 1, 32)}
    network = nf.nn.Embedding(KEY, {"a": jnp.zeros(())}, 3, hidden=(4,))

    def field(t, z, c):
        return jnp.tanh(z * c[:2] + c[2] * t)

    plain = new(nf.cnf, 2, context_dim=3, field=field)
    losses = [
        nf.FlowMatching()(flow, {"x": x, "context": rows}, None)
        for flow, rows in ((plain, network(context)), (plain.embed(network), context))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_bad_input():
    x, _ = pairs(50)
    with pytest.raises(ValueError, match=r"expected a continuous flow.*nf\.cnf"):
        match(nf.realnvp(KEY, 2), x)
    flow = new(nf.cnf, 2, hidden=(4,))
    with pytest.raises(ValueError, match="coupling: expected one of"):
        nf.FlowMatching("sinkhorn")
    conditional = new(nf.cnf, 2, context_dim=1, hidden=(4,))
    with pytest.raises(ValueError, match="rows of other contexts"):
        match(conditional, x, x[:, :1], coupling="optimal_transport")
    counts = np.zeros((50, 2), int)
    with pytest.raises(ValueError, match="expected a continuous flow"):
        match(nf.dequantize(nf.realnvp(KEY, 2), 4), counts)
    with pytest.raises(TypeError, match=r"objective: expected one such as `nf\.FlowMatching\(\)`"):
        nf.fit(KEY, flow, x, objective="flow matching")
    with pytest.raises(TypeError, match="FlowDistribution"):
        match(flow.transform, x)
