"""Models as users write them: the default guide beside long chains of NUTS or the exact answer."""

import concurrent.futures
import multiprocessing

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from kernels import KEY, run
from numpyro.distributions.transforms import OrderedTransform
from numpyro.infer import NUTS

import numpyro_flows as nf

X = np.random.default_rng(0).normal(size=80)


def gaussian_process(y):
    length = numpyro.sample("length", dist.LogNormal(0.0, 0.5))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(0.5))
    t = jnp.linspace(0.0, 4.0, len(y))
    square = ((t[:, None] - t) / length) ** 2
    covariance = scale**2 * jnp.exp(-0.5 * square) + (noise**2 + 1e-4) * jnp.eye(len(y))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(y)), covariance), obs=y)


def ordinal(y):
    slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
    cuts = numpyro.sample(
        "cuts",
        dist.TransformedDistribution(
            dist.Normal(jnp.array([-1.0, 0.0, 1.0]), 2.0).to_event(1), OrderedTransform()
        ),
    )
    numpyro.sample("y", dist.OrderedLogistic(slope * X, cuts), obs=y)


def truncated(y):
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    numpyro.sample("y", dist.TruncatedNormal(m, s, low=0.0), obs=y)


def log_linear():
    """A mean for each row, on a logarithmic scale linear in X."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    return jnp.exp(numpyro.sample("level", dist.Normal(0.0, 2.0)) + slope * X)


def weibull(y):
    shape = numpyro.sample("shape", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Weibull(log_linear(), shape), obs=y)


def zero_inflated(y):
    gate = numpyro.sample("gate", dist.Beta(1.0, 1.0))
    numpyro.sample("y", dist.ZeroInflatedPoisson(gate, log_linear()), obs=y)


def negative_binomial(y):
    concentration = numpyro.sample("concentration", dist.Gamma(2.0, 0.5))
    numpyro.sample("y", dist.NegativeBinomial2(log_linear(), concentration), obs=y)


def simulated(model):
    """Observations of the model at one draw of its prior."""
    free = numpyro.handlers.uncondition(model)
    trace = numpyro.handlers.trace(numpyro.handlers.seed(free, 3)).get_trace(None)
    return np.asarray(trace["y"]["value"])


MODELS = {
    gaussian_process: lambda rng: np.sin(np.linspace(0, 4, 30)) + 0.2 * rng.normal(size=30),
    ordinal: lambda rng: simulated(ordinal),
    truncated: lambda rng: np.abs(rng.normal(0.5, 1.0, size=60)),
    weibull: lambda rng: simulated(weibull),
    zero_inflated: lambda rng: rng.poisson(np.exp(1 + 0.5 * X)) * (rng.random(80) > 0.3),
    negative_binomial: lambda rng: rng.negative_binomial(3, 3 / (3 + np.exp(1 + 0.5 * X))),
}


def flat(draws, names):
    return np.concatenate(
        [np.asarray(draws[name], float).reshape(len(draws[name]), -1) for name in names], axis=1
    )


def errors(draws, truth):
    """Largest error of a mean, in standard deviations, and of a log standard deviation."""
    spread = truth.std(0)
    mean = np.abs(draws.mean(0) - truth.mean(0)) / spread
    return mean.max(), np.abs(np.log(draws.std(0) / spread)).max()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_model_beside_nuts(model):
    """Within 0.1 in both, and 0.05 for the chains' own noise, or not called reliable."""
    y = MODELS[model](np.random.default_rng(1))
    mcmc = run(NUTS(model, target_accept_prob=0.95), y, num_chains=4, num_samples=1500)
    fitted = nf.fit_guide(KEY, nf.AutoFlow(model), y, progress_bar=False)
    draws = fitted.sample(jax.random.key(1), (20_000,))
    names = sorted(mcmc.get_samples())
    found = errors(flat(draws, names), flat(mcmc.get_samples(), names))
    print(model.__name__, *np.round(found, 3), str(fitted))
    assert max(found) < 0.15 or not fitted.trusted
    assert max(found) < 0.5


@pytest.mark.slow
def test_labels_that_switch():
    """A mixture whose two means may change places: two equal modes, each a right answer."""
    y = np.random.default_rng(0).normal(np.repeat([-2.0, 2.0], 40))

    def model():
        m = numpyro.sample("m", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
        parts = dist.Normal(m, 1.0)
        numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), parts), obs=y)

    fitted = nf.fit_guide(KEY, nf.AutoFlow(model), progress_bar=False)
    m = np.sort(fitted.sample(jax.random.key(1), (5000,))["m"], axis=-1)
    np.testing.assert_allclose(m.mean(0), [-2.0, 2.0], atol=0.5)
    np.testing.assert_allclose(m.std(0), 1 / 40**0.5, rtol=0.25)


def conjugate(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def mean_of(y):
    """The mean that a guide finds; of this module, so that another process finds it."""
    fitted = nf.fit_guide(KEY, nf.AutoFlow(conjugate), y, progress_bar=False)
    return float(fitted.sample(jax.random.key(1), (4000,))["mu"].mean())


@pytest.mark.slow
def test_precision_may_change_between_fits():
    y = np.array([1.0, 2.0, 3.0])
    before = mean_of(y)
    with jax.enable_x64(True):
        within = mean_of(y)
    after = mean_of(y)
    np.testing.assert_allclose([before, within, after], 1.5, atol=0.05)
    assert before == after


@pytest.mark.slow
def test_processes_fit_side_by_side():
    data = [np.array([1.0, 2.0, 3.0]), np.array([-1.0, -2.0, -3.0])]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        np.testing.assert_allclose(list(pool.map(mean_of, data)), [1.5, -1.5], atol=0.05)


def epidemic(times, infected):
    """An SIR model, by a solver for stiff equations whose linear solves may fail far out."""
    import diffrax  # where its checks are read from the environment of a new process

    beta = numpyro.sample("beta", dist.LogNormal(0.5, 0.7))
    gamma = numpyro.sample("gamma", dist.LogNormal(-0.5, 0.7))
    first = numpyro.sample("first", dist.Beta(1.0, 20.0))

    def field(_, state, rates):
        new, gone = rates[0] * state[0] * state[1], rates[1] * state[1]
        return -new, new - gone

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Kvaerno3(),
        0.0,
        times[-1],
        0.1,
        (1 - first, first),
        args=(beta, gamma),
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-6),
        max_steps=1000,
        throw=False,
    )
    numpyro.sample("infected", dist.Normal(solution.ys[1], 0.02), obs=infected)


def epidemic_beside_nuts():
    """Errors of the guide beside NUTS, and whether it is trusted."""
    times = jnp.linspace(1.0, 14.0, 10)
    infected = np.array([0.02, 0.05, 0.12, 0.2, 0.24, 0.22, 0.17, 0.12, 0.08, 0.05])
    mcmc = run(NUTS(epidemic), times, infected)
    guide = nf.AutoFlow(epidemic)
    fitted = nf.fit_guide(KEY, guide, times, infected, num_particles=16, progress_bar=False)
    names = ["beta", "gamma", "first"]
    draws = fitted.sample(jax.random.key(1), (20_000,))
    return errors(flat(draws, names), flat(mcmc.get_samples(), names)), fitted.trusted


@pytest.mark.slow
def test_a_stiff_model_whose_solver_fails_far_out(monkeypatch):
    monkeypatch.setenv("EQX_ON_ERROR", "nan")  # read where equinox is imported
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        found, trusted = pool.submit(epidemic_beside_nuts).result()
    assert max(found) < 0.2  # of which the chain's own noise is the half
    assert trusted


@pytest.mark.slow
def test_a_continuous_flow_of_a_narrow_normal():
    """N(6, 0.7): its entropy."""
    x, fresh = np.random.default_rng(0).normal(6.0, 0.7, size=(2, 4000, 1)).astype(np.float32)
    entropy = 0.5 * np.log(2 * np.pi * np.e * 0.49)
    fitted = nf.fit(KEY, nf.cnf(KEY, 1, hidden=(16,)), x[:2000], max_epochs=20, progress_bar=False)
    np.testing.assert_allclose(-fitted.flow.log_prob(fresh).mean(), entropy, atol=0.05)
