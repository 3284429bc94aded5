"""fit_guide, its verdict, and importance resampling."""

import gc
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal

import numpyro_flows as nf
from numpyro_flows.infer.schedule import Schedule
from numpyro_flows.infer.train import Trained

SMALL = partial(nf.realnvp, depth=2, hidden=(8,))
Y = jnp.array([1.2, -0.3, 0.7, 2.0])


def conjugate(y, num_copies=1):
    """mu ~ N(0, 1), y_i ~ N(mu, 1): posterior N(sum y / (n + 1), 1 / (n + 1))."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.deterministic("twice", 2 * mu)
    for i in range(num_copies):
        numpyro.sample(f"y{i}", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)


def evidence(y):
    n = len(y)
    covariance = np.eye(n) + np.ones((n, n))
    return dist.MultivariateNormal(jnp.zeros(n), covariance).log_prob(y)


@pytest.fixture(scope="module")
def fitted():
    guide = nf.AutoFlow(conjugate, SMALL)
    return guide, nf.fit_guide(
        jax.random.key(0), guide, Y, num_steps=200, num_particles=32, progress_bar=False
    )


@pytest.mark.smoke
def test_a_conjugate_posterior(fitted):
    guide, fit = fitted
    assert fit.trusted
    assert fit.verdict.startswith("reliable: ELBO")
    assert str(fit) == fit.verdict
    assert fit.ess > 0.99
    assert abs(fit.elbo - evidence(Y)) < 0.01
    assert fit.elbo_error < 0.01
    assert fit.num_skipped == 0
    draws = guide.sample_posterior(jax.random.key(1), fit.params, sample_shape=(20_000,))
    assert abs(draws["mu"].mean() - Y.sum() / 5) < 0.02
    assert abs(draws["mu"].std() - 5**-0.5) < 0.01


def test_the_parameters_are_plain_numpyro(fitted):
    guide, fit = fitted
    draws = Predictive(conjugate, guide=guide, params=fit.params, num_samples=3)(
        jax.random.key(0), Y
    )
    assert draws["twice"].shape == (3,)
    loss = Trace_ELBO(num_particles=1000).loss(jax.random.key(0), fit.params, conjugate, guide, Y)
    assert abs(loss + fit.elbo) < 0.05
    assert nf.NeuTraReparam(guide, fit.params).transform.event_shape == (1,)


def test_resampling_corrects_a_guide_that_is_off():
    guide = AutoDiagonalNormal(conjugate)
    handlers.seed(guide, 0)(Y)
    params = {"auto_loc": jnp.array([0.5]), "auto_scale": jnp.array([0.7])}
    plain = guide.sample_posterior(jax.random.key(1), params, sample_shape=(20_000,))["mu"]
    assert abs(plain.mean() - Y.sum() / 5) > 0.15
    draws, khat = nf.importance_resample(
        jax.random.key(0), guide, params, Y, num_samples=20_000, num_proposals=100_000
    )
    assert khat < 0.7
    assert abs(draws["mu"].mean() - Y.sum() / 5) < 0.02
    assert abs(draws["mu"].std() - 5**-0.5) < 0.02
    np.testing.assert_allclose(draws["twice"], 2 * draws["mu"], rtol=1e-6)
    log_weights = nf.importance_log_weights(jax.random.key(0), guide, params, Y)
    value, error = nf.diagnostics.log_evidence(log_weights)
    assert 0 < error < 0.02
    assert abs(value - evidence(Y)) < 4 * error


def test_weights_say_when_a_guide_misses_mass():
    guide = AutoDiagonalNormal(conjugate)
    handlers.seed(guide, 0)(Y)
    params = {"auto_loc": jnp.array([3.0]), "auto_scale": jnp.array([0.1])}
    log_weights = nf.importance_log_weights(jax.random.key(0), guide, params, Y)
    assert nf.diagnostics.psis_khat(log_weights) > 0.7
    assert nf.diagnostics.importance_ess(log_weights) < 0.1


def test_a_gradient_that_is_nan_is_told_from_a_density():
    def root(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        half = jnp.where(x > 0, jnp.sqrt(x), 0.0)  # its gradient is NaN below 0
        numpyro.sample("y", dist.Normal(half, 1.0), obs=y)

    def logarithm(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("bound", jnp.log(x + 0.5) + y)

    def fail(model):
        start = init_to_value(values={"x": 0.5})
        guide = nf.AutoFlow(model, SMALL, init="location", init_loc_fn=start, init_scale=1.0)
        nf.fit_guide(
            jax.random.key(0), guide, 0.3, num_steps=20, num_particles=64, progress_bar=False
        )

    with pytest.raises(ValueError, match=r"gradient of that of site 'y' with respect to 'x' is"):
        fail(root)
    with pytest.raises(ValueError, match=r"The log density of site 'bound' is NaN or infinite at"):
        fail(logarithm)


def exact_guide(model, *args):
    guide = AutoDiagonalNormal(model)
    handlers.seed(guide, 0)(*args)
    return guide, {"auto_loc": jnp.zeros(1), "auto_scale": jnp.ones(1)}


@pytest.mark.parametrize("constant", [0.0, -3e6])
def test_a_guide_that_is_the_posterior_has_weights_without_a_tail(constant):
    """Equal weights, or so large that float32 rounds them to few values."""

    def model():
        numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("rest_of_the_likelihood", constant)

    guide, params = exact_guide(model)
    draws, khat = nf.importance_resample(jax.random.key(0), guide, params, num_samples=4000)
    assert khat < 0.2
    assert abs(draws["x"].mean()) < 0.06
    assert abs(draws["x"].std() - 1) < 0.06


def test_khat_where_no_tail_can_be_fitted():
    khat = nf.diagnostics.psis_khat
    assert khat(np.zeros(1000)) == -np.inf
    assert khat(np.r_[np.zeros(900), np.full(100, 0.25)]) == -np.inf
    assert khat(np.r_[np.zeros(997), np.full(3, 0.25)]) == -np.inf
    assert khat(np.r_[np.zeros(998), 10.0, 11.0]) == np.inf  # two draws hold all mass
    assert khat(np.arange(6.0)) == np.inf  # too few draws
    assert np.isnan(khat(np.r_[np.zeros(99), np.inf]))


def test_weights_keep_no_guide_alive():
    class Data:
        def __init__(self, y):
            self.y = y

    def weighted():
        data = Data(Y)

        def model():
            numpyro.sample("x", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(0.0, 1.0), obs=data.y)

        guide, params = exact_guide(model)
        nf.importance_log_weights(jax.random.key(0), guide, params, num_samples=10)
        return weakref.ref(data)

    alive = weighted()
    gc.collect()
    assert alive() is None


def test_numpyros_guides_and_objectives(fitted):
    guide = AutoMultivariateNormal(conjugate)
    fit = nf.fit_guide(
        jax.random.key(0),
        guide,
        Y,
        num_steps=300,
        learning_rate=0.05,
        elbo=Trace_ELBO(num_particles=8),
        progress_bar=False,
        num_copies=1,
    )
    assert fit.ess > 0.9
    with pytest.raises(ValueError, match="has its own number of particles"):
        nf.fit_guide(jax.random.key(0), guide, Y, num_particles=4, elbo=Trace_ELBO())


def test_non_finite_steps_are_skipped_and_counted():
    def fragile():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("hole", jnp.where(x > 2.5, jnp.nan, 0.0))

    guide = nf.AutoFlow(fragile, SMALL, init="location")
    fit = nf.fit_guide(
        jax.random.key(0),
        guide,
        num_steps=200,
        num_particles=16,
        learning_rate=0.05,
        progress_bar=False,
    )
    assert fit.num_skipped > 0
    assert np.isnan(fit.losses).sum() == fit.num_skipped
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fit.params))
    assert "steps skipped" in fit.verdict


def rates_for(num_steps, losses):
    schedule = Schedule(num_steps, 4)
    rates = []
    while schedule.step < schedule.stop:
        rates.append(schedule.rates(min(100, schedule.stop - schedule.step)))
        steps = np.arange(schedule.step, schedule.step + len(rates[-1]))
        schedule.advance(losses(steps))
    return np.concatenate(rates)


def test_discrete_sites_are_summed_out():
    """Two well separated components: the guide, its start and its weights enumerate."""
    y = jnp.concatenate([jnp.linspace(-0.4, 0.4, 8) - 3, jnp.linspace(-0.4, 0.4, 8) + 2])

    def mixture(y):
        mu = numpyro.sample("mu", dist.Normal(jnp.array([-1.0, 1.0]), 3.0).to_event(1))
        with numpyro.plate("rows", len(y)):
            k = numpyro.sample("k", dist.Categorical(jnp.ones(2) / 2))
            numpyro.sample("y", dist.Normal(mu[k], 0.5), obs=y)

    guide = nf.AutoFlow(handlers.block(mixture, hide=["k"]), SMALL)
    fit = nf.fit_guide(
        jax.random.key(0), guide, y, num_steps=300, num_particles=8, progress_bar=False
    )
    draws = guide.sample_posterior(jax.random.key(1), fit.params, sample_shape=(4000,))["mu"]
    precision = 8 / 0.25 + 1 / 9
    mean = (np.array([-24.0, 16.0]) / 0.25 + np.array([-1.0, 1.0]) / 9) / precision
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(draws.std(0), precision**-0.5, rtol=0.1)
    # Up to overlap each row is of its component, of prior probability one half.
    exact = 16 * np.log(0.5) + sum(
        dist.MultivariateNormal(jnp.full(8, loc), 0.25 * np.eye(8) + 9 * np.ones((8, 8))).log_prob(
            rows
        )
        for loc, rows in ((-1.0, y[:8]), (1.0, y[8:]))
    )
    assert fit.ess > 0.9
    assert abs(fit.elbo - exact) < 0.1


def test_schedule_rises_holds_and_falls():
    noise = np.random.default_rng(0).normal
    rates = rates_for(2000, lambda steps: -steps + noise(size=len(steps)))
    assert len(rates) == 2000
    assert rates[0] == pytest.approx(1 / 200)
    assert (rates[200:1000] == 1).all()
    assert (np.diff(rates[1000:]) <= 0).all()
    assert rates[-1] < 1e-3
    assert len(rates_for(7, lambda steps: -steps)) == 7


def test_schedule_stops_early():
    """On a plateau, and sooner where the importance weights are already nearly equal."""
    noise = np.random.default_rng(0).normal
    plateau = rates_for(10_000, lambda steps: 5 + noise(size=len(steps)))
    assert 1000 < len(plateau) < 6000
    assert plateau[-1] < 1e-3
    equal = rates_for(10_000, lambda steps: 5 + 0.01 * noise(size=len(steps)))
    assert len(equal) == 300
    assert equal[-1] < 1e-3
    # A tenth of the divergence that nearly equal weights leave, in a window of 300 to 400 steps.
    slow = rates_for(10_000, lambda steps: 5 - 2e-5 * steps + 0.2 * noise(size=len(steps)))
    assert len(slow) < 3000
    holes = rates_for(
        2000, lambda steps: np.where(noise(size=len(steps)) > -1, np.nan, -1.0 * steps)
    )
    assert len(holes) == 2000  # too few finite losses to judge by


def test_schedule_resumes_once():
    schedule = Schedule(10_000, 4)
    while schedule.step < schedule.stop:
        schedule.advance(np.full(100, 5.0))
    assert schedule.step == 300
    assert schedule.expected_ess == 0.99
    # The expectation of nearly equal weights failed: the ordinary rules hold for what follows.
    assert schedule.resume()
    assert schedule.stop == 10_000
    assert schedule.rates(1)[0] == pytest.approx(1 / 200)
    while schedule.step < schedule.stop:
        schedule.advance(np.full(100, 5.0))
    assert schedule.step == 1500
    assert schedule.resume()
    assert schedule.stop == 3000
    rates = []
    while schedule.step < schedule.stop:
        rates.append(schedule.rates(100))
        schedule.advance(np.full(100, 5.0))
    rates = np.concatenate(rates)
    assert rates[0] == pytest.approx(1 / 200)
    assert (rates[200:600] == 1).all()
    assert rates[-1] < 1e-3
    assert not schedule.resume()
    whole = Schedule(200, 4)
    whole.advance(np.ones(200))
    assert not whole.resume()


def test_training_goes_on_where_the_result_cannot_be_trusted(monkeypatch):
    def normal():
        numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    def steps_if(trusted):
        monkeypatch.setattr(Trained, "trusted", trusted)
        guide = nf.AutoFlow(normal, SMALL, init="location")
        fit = nf.fit_guide(
            jax.random.key(0),
            guide,
            num_steps=20_000,
            num_particles=64,
            progress_bar=False,
        )
        return len(fit.losses)

    enough = steps_if(True)
    assert enough < 10_000
    assert steps_if(False) == 2 * enough


def test_data_are_not_baked_in():
    """The same program serves other data of the same shape: arrays are its arguments."""
    from numpyro_flows.infer.arguments import join_arguments, split_arguments

    flag = np.int64(2)
    traced, static = split_arguments((Y, 3, "mode", None), {"n": flag, "w": jnp.ones(2)})
    assert len(jax.tree.leaves(traced)) == 2
    hash(static)
    args, kwargs = join_arguments(traced, static)
    assert args[1:] == (3, "mode", None)
    assert kwargs["n"] == 2
    other, static_again = split_arguments((Y + 1, 3, "mode", None), {"n": flag, "w": jnp.ones(2)})
    assert static_again == static
    np.testing.assert_array_equal(jax.tree.leaves(other)[0], Y + 1)


def test_bad_input(fitted):
    guide, fit = fitted
    with pytest.raises(TypeError, match="expected an automatic guide"):
        nf.fit_guide(jax.random.key(0), conjugate, Y)
    with pytest.raises(TypeError, match="write `jax.random.key"):
        nf.fit_guide(0, guide, Y)
    for settings, error, message in (
        ({"num_particles": 0}, ValueError, "num_particles: expected at least 1, got 0"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate: expected a positive number"),
        ({"elbo": Trace_ELBO}, TypeError, "elbo: expected an objective such as"),
    ):
        with pytest.raises(error, match=message):
            nf.fit_guide(jax.random.key(0), guide, Y, **settings)

    def counts():
        n = numpyro.sample("n", dist.Poisson(3.0))
        numpyro.sample("x", dist.Normal(n, 1.0))

    for wrong in (counts, handlers.block(counts, hide=["n"])):
        with pytest.raises(ValueError, match="'n' is discrete .* Poisson has no finite list"):
            nf.fit_guide(jax.random.key(0), nf.AutoFlow(wrong, SMALL, init="location"))
    with pytest.raises(ValueError, match="num_steps: expected at least 1"):
        nf.fit_guide(jax.random.key(0), guide, Y, num_steps=0)
    with pytest.raises(ValueError, match="never set up"):
        nf.importance_log_weights(jax.random.key(0), nf.AutoFlow(conjugate), fit.params, Y)
    with pytest.raises(TypeError, match="write `jax.random.key"):
        nf.importance_resample(0, guide, fit.params, Y)


def test_svi_and_fit_guide_agree_on_sites(fitted):
    guide, fit = fitted
    svi = SVI(conjugate, guide, numpyro.optim.Adam(1e-3), nf.STL_ELBO())
    state = svi.init(jax.random.key(0), Y, init_params=fit.params)
    assert abs(svi.evaluate(state, Y) + fit.elbo) < 1.0
