"""Continuous flows: judged by matrix exponentials, quadrature and finite differences."""

import functools
import itertools

import compiled
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from compiled import forward, inverse, log_prob, new, sample, sample_and_log_prob, there_and_back
from jax.scipy.linalg import expm
from small import points, shake

import numpyro_flows as nf
from numpyro_flows.infer.elbo import with_penalties
from numpyro_flows.parts import for_training, inexactness

KEY = jax.random.key(0)
A = np.array([[0.3, -1.0], [0.5, -0.2]])


class Linear(eqx.Module):
    """A field whose flow is a matrix exponential."""

    matrix: jax.Array

    def __call__(self, t, z, context):
        return self.matrix @ z


def linear(**config):
    return nf.transforms.Continuous(KEY, 2, Linear(jnp.array(A)), **config)


def network(dim, context_dim=0, **config):
    return shake(compiled.network(dim, context_dim, **config), jax.random.key(1), 0.5)


@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param({"per_row": True}, marks=pytest.mark.slow),
        pytest.param({"num_steps": 200, "rtol": 1.0}, marks=pytest.mark.slow),
        # The contract is checked with two of these, gradients with the third.
        pytest.param({"adjoint": "backsolve"}, marks=pytest.mark.slow),
        pytest.param({"solver": "Dopri8"}, marks=pytest.mark.slow),
        pytest.param({"adjoint": "direct", "max_steps": 64}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_linear_field_is_a_matrix_exponential(config, x64):
    t = linear(**{"rtol": 1e-9, "atol": 1e-9, "end_time": 1.5, **config})
    x, matrix = points(2), np.asarray(expm(1.5 * A))
    y, log_det = forward(t, x)
    np.testing.assert_allclose(y, x @ matrix.T, rtol=0, atol=1e-6)
    np.testing.assert_allclose(log_det, 1.5 * np.trace(A), rtol=0, atol=1e-6)
    back, log_det = inverse(t, x @ matrix.T)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-6)
    np.testing.assert_allclose(log_det, -1.5 * np.trace(A), rtol=0, atol=1e-6)


def test_a_field_that_depends_on_time_and_context(x64):
    """dz/dt = c cos(t) z has z(T) = x exp(c sin T)."""

    def field(t, z, context):
        return context[0] * jnp.cos(t) * z

    t = nf.transforms.Continuous(KEY, 3, field, context_dim=1, end_time=2.0, rtol=1e-9, atol=1e-9)
    x, context = points(3), points(1, seed=3)
    y, log_det = forward(t, x, context)
    np.testing.assert_allclose(y, x * np.exp(context * np.sin(2.0)), atol=1e-6)
    np.testing.assert_allclose(log_det, 3 * context[:, 0] * np.sin(2.0), atol=1e-6)
    back, _ = inverse(t, y, context)
    np.testing.assert_allclose(back, x, atol=1e-6)


@pytest.mark.slow
def test_trajectories_pass_through_matrix_exponentials(x64):
    t = linear(rtol=1e-9, atol=1e-9)
    x, times = points(2), jnp.array([0.0, 0.3, 1.0])
    paths = t.trajectories(x, times)
    for time, path in zip(times, paths, strict=True):
        np.testing.assert_allclose(path, x @ np.asarray(expm(time * A)).T, atol=1e-6)
    np.testing.assert_allclose(paths[-1], t(x), atol=1e-7)
    conditional, context = network(2, context_dim=1), points(1, seed=3)
    paths = conditional.trajectories(x, times, context)
    np.testing.assert_allclose(paths[-1], forward(conditional, x, context)[0], atol=1e-4)


def test_default_tolerances_in_float32():
    t = network(3)
    x = points(3, 500)
    y, log_det = forward(t, x)
    back, inverse_log_det = inverse(t, y)
    np.testing.assert_allclose(back, x, atol=1e-3)
    np.testing.assert_allclose(log_det, -inverse_log_det, atol=1e-3)


def test_rows_do_not_depend_on_their_batch(x64):
    x = points(2) * jnp.array([0.1, 0.3, 1.0, 3.0, 10.0, 30.0])[:, None]
    t = network(2, context_dim=1, per_row=True)
    context = points(1, seed=3)
    y, log_det = forward(t, x, context)
    one, one_log_det = forward(t, x[2], context[2])
    np.testing.assert_allclose(y[2], one, rtol=1e-6)
    np.testing.assert_allclose(log_det[2], one_log_det, rtol=1e-5, atol=1e-6)
    # With common steps they do, to the tolerance.
    common, _ = forward(network(2, context_dim=1), x, context)
    np.testing.assert_allclose(common, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "adjoint",
    [
        "checkpoint",
        pytest.param("backsolve", marks=pytest.mark.slow),
        pytest.param("direct", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_each_adjoint(adjoint, x64):
    """Of value, context and every parameter, against central differences."""
    tight = {"rtol": 1e-9, "atol": 1e-9, "max_steps": 256}
    params, rest = nf.partition(network(2, context_dim=1, adjoint=adjoint, **tight))

    @jax.jit
    def loss(args):
        params, y, context = args
        x, log_det = nf.combine(params, rest).inverse_and_log_det(y, context)
        return (x * jnp.array([1.0, -2.0])).sum() + (log_det**2).sum()

    args = (params, points(2, 3), points(1, 3, seed=4))
    grads = jax.jit(jax.grad(loss))(args)
    rng = np.random.default_rng(0)
    step = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), args)
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(step), strict=True)
    expected = sum((grad * d).sum() for grad, d in pairs)

    def moved(h):
        return loss(jax.tree.map(lambda a, d: a + h * d, args, step))

    h = 1e-5
    np.testing.assert_allclose((moved(h) - moved(-h)) / (2 * h), expected, rtol=1e-4)


@pytest.fixture(scope="module")
def estimates():
    """4,096 estimates with each kind of noise, and the exact log-determinant beside them."""
    made = {}
    for noise in ("rademacher", "gaussian"):
        # The same steps for all, so that nothing but the trace differs.
        t = network(4, noise=noise, trace="hutchinson", num_steps=8)

        def one(key, t=t):
            return t.with_probe(key).forward_and_log_det(points(4, 1))[1][0]

        keys = jax.random.split(jax.random.key(5), 4096)
        made[noise] = np.asarray(jax.jit(jax.vmap(one))(keys), float)
    return made, float(forward(t.with_trace("exact"), points(4, 1))[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(estimates, noise):
    draws, exact = estimates[0][noise], estimates[1]
    assert draws.std() > 1e-3
    assert abs(draws.mean() - exact) < 3 * draws.std() / 64


def test_rademacher_has_the_smaller_variance(estimates):
    assert estimates[0]["rademacher"].var() <= estimates[0]["gaussian"].var()


def test_the_probe_is_the_transforms_own():
    t = network(4, trace="hutchinson", num_probes=3)
    x = points(4)
    assert t.probes.value.shape == (3, 4)
    log_det = forward(t, x)[1]
    np.testing.assert_array_equal(log_det, forward(t, x)[1])
    np.testing.assert_allclose(log_det[:2], forward(t, x[:2])[1], atol=1e-4)
    other = t.with_probe(jax.random.key(9))
    assert jnp.abs(log_det - forward(other, x)[1]).max() > 1e-4
    # It is no parameter.
    params, _ = nf.partition(t)
    assert params.probes is None or not jax.tree.leaves(params.probes)
    np.testing.assert_array_equal(t.probes.value, network(4, num_probes=3).probes.value)


def test_an_estimate_says_so():
    assert nf.transforms.Continuous(KEY, 16, lambda t, z, c: -z).trace == "exact"
    assert nf.transforms.Continuous(KEY, 17, lambda t, z, c: -z).trace == "hutchinson"
    flow = new(nf.cnf, 2, hidden=(4,), trace="hutchinson")
    assert "estimate" in repr(flow)
    assert "estimate" in repr(flow.transform)
    assert inexactness(flow) == "estimate"
    assert not inexactness(new(nf.cnf, 2, hidden=(4,)))
    exact = flow.transform.with_trace("exact")
    assert "estimate" not in repr(exact)
    assert not inexactness(nf.transforms.Chain([exact]))


@pytest.mark.slow
def test_evaluations_are_counted():
    """Against a field that notes its own calls; those at the start count once."""
    calls = []

    def field(t, z, context):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return -z + jnp.sin(3 * z)

    rejected = 0
    for scale, config in itertools.product(
        (1.0, 3.0, 10.0),
        ({}, {"num_steps": 5}, {"solver": "Bosh3"}, {"rtol": 1e-3, "solver": "Dopri5"}),
    ):
        t = nf.transforms.Continuous(KEY, 2, field, **config)
        calls.clear()
        stats = jax.block_until_ready(t.statistics(scale * points(2, 1), inverse=False))
        jax.effects_barrier()
        assert stats["num_evaluations"] == len(calls) - calls.count(0.0) + 1, config
        rejected += int(stats["num_rejected_steps"])
        assert stats["num_steps"] == stats["num_accepted_steps"] + stats["num_rejected_steps"]
    assert rejected


def test_statistics_of_each_row():
    stats = network(2, per_row=True).statistics(points(2, 5))
    assert stats["num_evaluations"].shape == (5,)


@pytest.mark.parametrize("forward", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_penalties_of_training(forward, x64):
    """For a linear field their integrals are known: quadrature of matrix exponentials."""
    config = {"rtol": 1e-9, "atol": 1e-9, "kinetic_penalty": 0.3, "jacobian_penalty": 0.2}
    t = linear(**config, trace="exact")
    trained = for_training(t, jax.random.key(7), 6)
    x = points(2)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    kinetic = np.zeros(len(x))
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        time = node if forward else -node
        velocity = x @ np.asarray(expm(time * A)).T @ A.T
        kinetic += weight * (velocity**2).sum(1)
    expected = 0.3 * kinetic + 0.2 * (A**2).sum()
    step = "forward_and_log_det" if forward else "inverse_and_log_det"
    value, log_det = getattr(t, step)(x)
    trained_value, with_penalty = getattr(trained, step)(x)
    np.testing.assert_allclose(trained_value, value, atol=1e-7)
    np.testing.assert_allclose(log_det - with_penalty, expected, atol=1e-6)


@pytest.mark.slow
def test_penalties_of_a_guide(x64):
    """The field a z has kinetic energy a z(0)^2 (e^(2a) - 1) / 2 and a squared Jacobian a^2."""
    a = 0.7
    config = {"rtol": 1e-9, "atol": 1e-9, "kinetic_penalty": 0.3, "jacobian_penalty": 0.2}
    flow = new(nf.cnf, 1, field=lambda t, z, context: a * z, **config)

    def guide(flow):
        with numpyro.plate("rows", 5):
            return numpyro.sample("x", flow)

    def trace(flow):
        seeded = numpyro.handlers.seed(with_penalties(guide), 0)
        return numpyro.handlers.trace(seeded).get_trace(flow)

    sites = trace(flow)
    z = sites["x"]["value"][:, 0] * np.exp(-a)
    expected = 0.3 * a * z**2 * np.expm1(2 * a) / 2 + 0.2 * a**2
    factor = sites["x_penalty"]
    np.testing.assert_allclose(log_prob(factor["fn"], factor["value"]), expected, atol=1e-6)
    without = new(nf.cnf, 1, hidden=(4,), kinetic_penalty=0.0, jacobian_penalty=0.0)
    assert list(trace(without)) == ["rows", "x"]


@pytest.mark.slow
def test_fit_guide_counts_the_penalties():
    """A penalty that outweighs the data leaves the flow where it starts."""
    y = jnp.array([4.0, -4.0])

    def energy(weight):
        recipe = functools.partial(nf.cnf, hidden=(8,), num_steps=4, kinetic_penalty=weight)
        guide = nf.AutoFlow(model, recipe, init="location")
        config = {"num_steps": 100, "num_particles": 16, "num_draws": 500, "progress_bar": False}
        result = nf.fit_guide(KEY, guide, y, learning_rate=1e-2, **config)
        continuous = guide.get_transform(result.params).parts[0]
        return float((continuous.velocity(jnp.zeros(()), points(2)) ** 2).mean())

    assert energy(1000.0) < 0.1 * energy(0.0)


def test_a_step_of_training_has_a_probe_for_each_row_and_another_end():
    t = network(3, trace="hutchinson", num_probes=2, steer=0.5)
    trained = for_training(nf.transforms.Chain([t]), jax.random.key(7), 6).parts[0]
    assert trained.probes.value.shape == (2, 3, 6)
    same = jnp.broadcast_to(points(3)[:1], (6, 3))
    values, log_dets = inverse(trained, same)
    np.testing.assert_allclose(values, jnp.broadcast_to(values[:1], (6, 3)), atol=1e-5)
    assert np.ptp(np.asarray(log_dets)) > 1e-4
    again = for_training(nf.transforms.Chain([t]), jax.random.key(8), 6).parts[0]
    assert 0 < jnp.abs(trained.shift.value - again.shift.value) <= 1
    assert jnp.abs(inverse(again, same)[0] - values).max() > 1e-4


def test_solves_that_fail():
    x = points(2)
    with pytest.raises(RuntimeError, match="needed more than `max_steps`"):
        jax.block_until_ready(linear(max_steps=2)(x))
    for step in ("forward_and_log_det", "inverse_and_log_det"):
        value, log_det = getattr(linear(max_steps=2, throw=False), step)(x)
        assert jnp.isnan(value).all()
        assert (log_det == -jnp.inf).all()
    # A density of -inf, never of NaN, whichever way it was asked.
    flow = new(nf.cnf, 2, hidden=(4,), max_steps=1, throw=False)
    np.testing.assert_array_equal(log_prob(flow, x), -jnp.inf)
    np.testing.assert_array_equal(sample_and_log_prob(flow, KEY, (3,))[1], -jnp.inf)
    blows_up = nf.transforms.Continuous(KEY, 1, lambda t, z, c: z**2, num_steps=50)
    with pytest.raises(RuntimeError, match="not finite"):
        jax.block_until_ready(blows_up(jnp.array([50.0])))


@pytest.mark.slow
def test_training_survives_solves_that_fail():
    """Steps are skipped and counted, epochs have an infinite loss; nothing is raised."""
    x = points(2, 40)
    stiff = shake(new(nf.cnf, 2, hidden=(8,), max_steps=2), jax.random.key(1), 3.0)
    with pytest.raises(FloatingPointError, match="no step of epoch 1"):
        nf.fit(KEY, stiff, x, max_epochs=1, progress_bar=False)


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_fit_learns_a_density(trace, x64):
    """A correlated, skewed pair, whose entropy is known, by exact and by stochastic trace."""
    z = np.random.default_rng(0).normal(size=(2000, 2))
    x = np.stack([z[:, 0], 0.5 * z[:, 1] + 0.4 * z[:, 0] ** 2], axis=1)
    entropy = 1 + np.log(2 * np.pi) + np.log(0.5)
    flow = new(nf.cnf, 2, hidden=(16, 16), trace=trace, rtol=1e-3, atol=1e-3)
    fitted = nf.fit(
        KEY, flow, x, max_epochs=30, learning_rate=1e-2, batch_size=200, progress_bar=False
    )
    assert fitted.num_skipped == 0
    standardized = fitted.flow.transform
    exact = nf.FlowDistribution(
        fitted.flow.base_dist,
        eqx.tree_at(
            lambda t: t.transform, standardized, standardized.transform.with_trace("exact")
        ),
    )
    assert -float(log_prob(exact, jnp.asarray(x)).mean()) < entropy + 0.1


def model(y):
    mu = numpyro.sample("mu", dist.Normal(0, 2).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


@pytest.fixture(scope="module")
def guided():
    y = jnp.array([1.0, -2.0])
    guide = nf.AutoFlow(model, functools.partial(nf.cnf, hidden=(8,), num_steps=8))
    result = nf.fit_guide(KEY, guide, y, num_steps=100, num_particles=32, progress_bar=False)
    return y, guide, result


@pytest.mark.slow
def test_a_guide_finds_a_conjugate_posterior(guided):
    y, guide, result = guided
    draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(20_000,))["mu"]
    np.testing.assert_allclose(draws.mean(0), 0.8 * y, atol=0.04)
    np.testing.assert_allclose(draws.std(0), 0.8**0.5, atol=0.04)
    assert result.ess > 0.95


@pytest.mark.slow
def test_neutra_has_the_density_of_the_model(guided):
    y, guide, result = guided
    reparam = nf.NeuTraReparam(guide, result.params)
    flow = guide.get_posterior(result.params)
    for row in points(2, 3):
        draw, log_det = forward(flow.transform, row)
        warped, _ = numpyro.infer.util.log_density(
            reparam.reparam(model), (y,), {}, {"auto_shared_latent": row}
        )
        plain, _ = numpyro.infer.util.log_density(model, (y,), {}, {"mu": draw})
        np.testing.assert_allclose(warped, plain + log_det, rtol=1e-3)


def test_guides_refuse_estimates():
    guide = nf.AutoFlow(model, lambda key, dim: nf.cnf(key, dim, trace="hutchinson"))
    with pytest.raises(ValueError, match="exact log density, got the estimate"):
        nf.fit_guide(KEY, guide, jnp.zeros(2), progress_bar=False)


def test_guides_ask_for_the_exact_trace_in_every_dimension():
    from numpyro_flows.infer.guide_flow import for_guide

    flow = for_guide(nf.cnf)(KEY, 20, hidden=(4,))
    assert flow.transform.trace == "exact"
    assert not flow.transform.throw


@pytest.mark.slow
def test_a_prior_for_nuts():
    """Draws of a model are those of the flow that is its prior."""
    flow = network(2, num_steps=4)
    prior = nf.FlowDistribution(dist.Normal(jnp.zeros(2), 1.0), flow)
    kernel = numpyro.infer.NUTS(lambda: numpyro.sample("x", prior), max_tree_depth=5)
    mcmc = numpyro.infer.MCMC(kernel, num_warmup=200, num_samples=1000, progress_bar=False)
    mcmc.run(KEY)
    draws, truth = mcmc.get_samples()["x"], sample(prior, jax.random.key(1), (4000,))
    np.testing.assert_allclose(draws.mean(0), truth.mean(0), atol=0.25)
    np.testing.assert_allclose(draws.std(0), truth.std(0), rtol=0.2)


def test_files_keep_a_flow(tmp_path):
    flow = shake(new(nf.cnf, 2, hidden=(4,), trace="hutchinson"), jax.random.key(1))
    nf.save(tmp_path / "flow", flow)
    x = points(2)
    np.testing.assert_array_equal(log_prob(nf.load(tmp_path / "flow"), x), log_prob(flow, x))


@pytest.mark.slow
def test_a_field_of_ones_own():
    module = eqx.nn.MLP(2, 2, 4, 1, activation=jnp.tanh, key=KEY)
    t = new(nf.cnf, 2, field=lambda t, z, context: jnp.tanh(z)).transform
    assert not jax.tree.leaves(nf.partition(t)[0].field)

    class Field(eqx.Module):
        net: eqx.nn.MLP

        def __call__(self, t, z, context):
            return self.net(z)

    t = new(nf.cnf, 2, field=Field(module)).transform
    x = points(2)
    np.testing.assert_allclose(there_and_back(t, x)[2], x, atol=1e-4)
    grads = jax.jit(jax.grad(lambda t: t(x).sum()))(t)
    weights = [leaf for leaf in jax.tree.leaves(grads.field) if leaf.ndim == 2]
    assert len(weights) == 2
    assert all(jnp.abs(weight).max() > 0 for weight in weights)


@pytest.mark.slow
def test_ensembles_and_supports():
    from numpyro.distributions import constraints

    keys = jax.random.split(KEY, 3)
    flows = jax.jit(jax.vmap(lambda key: nf.cnf(key, 2, hidden=(4,), num_steps=4)))(keys)
    values = jax.jit(jax.vmap(lambda flow: flow.log_prob(points(2))))(flows)
    assert values.shape == (3, 6)
    flow = new(nf.cnf, 2, hidden=(4,), support=constraints.positive)
    expected = dist.LogNormal(0, 1).log_prob(jnp.array([0.5, 2.0])).sum()
    np.testing.assert_allclose(log_prob(flow, jnp.array([0.5, 2.0])), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: linear(end_time=0.0), ValueError, "end_time: expected a positive number, got 0"),
        (lambda: linear(end_time=-1.0), ValueError, "end_time: expected a positive number"),
        (lambda: linear(rtol=0), ValueError, "rtol: expected a positive number, got 0"),
        (lambda: linear(rtol=-1e-5), ValueError, "rtol: expected a positive number, got -1e-05"),
        (lambda: linear(atol=float("nan")), ValueError, "atol: expected a positive number"),
        (lambda: linear(num_probes=0), ValueError, "num_probes: expected at least 1, got 0"),
        (lambda: linear(max_steps=0), ValueError, "max_steps: expected at least 1"),
        (lambda: linear(num_steps=2.5), TypeError, "num_steps: expected an int"),
        (lambda: linear(trace="diagonal"), ValueError, "trace: expected one of"),
        (lambda: linear(noise="uniform"), ValueError, "noise: expected one of"),
        (lambda: linear(adjoint="forward"), ValueError, "adjoint: expected one of"),
        (lambda: linear(solver="Kvaerno5"), ValueError, "explicit Runge-Kutta"),
        (lambda: linear(steer=1.0), ValueError, "steer: expected less than end_time"),
        (lambda: linear(kinetic_penalty=-1.0), ValueError, "kinetic_penalty: expected 0 or"),
        (lambda: nf.cnf(KEY, 2, field=3), TypeError, "field: expected something to call"),
        (
            lambda: nf.cnf(KEY, 2, field=lambda t, z, context: z[:1]),
            ValueError,
            r"field: expected a result of the shape of z, \(2,\), got \(1,\)",
        ),
        (
            lambda: nf.cnf(KEY, 2, support=dist.constraints.circular),
            ValueError,
            "angles, which Continuous would tear",
        ),
        (lambda: nf.cnf(0, 2), TypeError, "jax.random.key"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
