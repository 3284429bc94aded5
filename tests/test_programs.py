"""How many programs inference compiles, and how often it traces the model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from programs import compiled_programs

import numpyro_flows as nf

KEY = jax.random.key(0)
SMALL = partial(nf.realnvp, depth=2, hidden=(8,))


class Counted:
    """A model that counts how often its Python runs."""

    def __init__(self):
        self.traces = 0

    def __call__(self, y, hi):
        self.traces += 1
        x = numpyro.sample("x", dist.Uniform(0.0, hi))
        with numpyro.plate("groups", 3):
            z = numpyro.sample("z", dist.Normal(x**2, 1.0))
        numpyro.sample("y", dist.StudentT(3.0, z[:, None], 0.5).to_event(2), obs=y)


def data(seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(1.0, 1.0, (3, 4)), jnp.float32), jnp.array([2.0 + seed])[0]


def fit(model, seed, **settings):
    guide = nf.AutoFlow(model, SMALL)
    settings = {"num_steps": 200, "num_particles": 8, "target_ess": 0.9999} | settings
    return nf.fit_guide(KEY, guide, *data(seed), progress_bar=False, **settings)


def test_a_fit_compiles_few_programs_and_another_of_the_same_shapes_none():
    model = Counted()
    with compiled_programs() as names:
        first = fit(model, 0)
    assert len(first.losses) == 200
    assert len(names) <= 25, names
    assert model.traces <= 4
    again = Counted()
    with compiled_programs() as names:
        second = fit(again, 0)
    assert names == []
    assert again.traces <= 4
    np.testing.assert_array_equal(first.losses, second.losses)


def test_nothing_is_trained_where_nothing_is_left_to_gain():
    with compiled_programs() as names:
        fitted = nf.fit_guide(
            KEY, nf.AutoFlow(lambda: numpyro.sample("x", dist.Normal(3.0, 2.0))), progress_bar=False
        )
    assert len(fitted.losses) == 0
    assert fitted.trusted
    assert not any("_steps" in name for name in names)


def test_other_numbers_are_those_of_the_answer():
    """A second fit shares the programs of the first, and nothing else."""

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)

    for y in (jnp.array([1.0, 2.0, 3.0]), jnp.array([-4.0, 0.0, 1.0])):
        guide = nf.AutoFlow(model, SMALL)
        fitted = nf.fit_guide(KEY, guide, y, progress_bar=False)
        exact = dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3) + 1.0).log_prob(y)
        assert abs(fitted.elbo - exact) < 0.01
        draws = fitted.sample(jax.random.key(1), (20_000,))["mu"]
        np.testing.assert_allclose(draws.mean(), y.sum() / 4, atol=0.02)


@pytest.mark.parametrize("kind", ["closure", "global", "object"])
def test_a_model_that_reads_what_changes_gives_the_answer_of_now(kind):
    held = {"y": None}

    class Data:
        y = None

    def model():
        y = {"closure": held["y"], "global": _GLOBAL["y"], "object": Data.y}[kind]
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)

    guide = nf.AutoFlow(model, SMALL)
    for y in (jnp.array([1.0, 2.0, 3.0]), jnp.array([-4.0, 0.0, 1.0])):
        held["y"] = _GLOBAL["y"] = Data.y = y
        fitted = nf.fit_guide(KEY, guide, progress_bar=False)
        assert fitted.ess > 0.98
        draws, khat = fitted.resample(jax.random.key(1), 10_000)
        assert khat < 0.7
        np.testing.assert_allclose(draws["mu"].mean(), y.sum() / 4, atol=0.03)


_GLOBAL = {"y": None}


def interval(hi, y):
    x = numpyro.sample("x", dist.Uniform(0.0, hi))
    numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


@pytest.mark.slow
def test_supports_are_those_of_the_current_arguments():
    """x is nearly N(y, 0.5) within (0, hi): a support of an earlier call would cut it."""
    guide = nf.AutoFlow(interval, SMALL)
    fits = [
        nf.fit_guide(KEY, guide, *args, progress_bar=False)
        for args in ((jnp.array(10.0), 5.0), (jnp.array(20.0), 15.0))
    ]
    for fitted, mean in zip(fits, (5.0, 15.0), strict=True):  # the first one again, too
        draws = fitted.sample(jax.random.key(1), (5000,))["x"]
        np.testing.assert_allclose(draws.mean(), mean, atol=0.04)
        np.testing.assert_allclose(draws.std(), 0.5, rtol=0.05)
        assert fitted.ess > 0.9
        resampled, _ = fitted.resample(jax.random.key(1), 5000)
        np.testing.assert_allclose(resampled["x"].mean(), mean, atol=0.05)
        exported = fitted.to_arviz(num_samples=500).posterior["x"]
        np.testing.assert_allclose(exported.mean(), mean, atol=0.15)
        kernel = NUTS(fitted.neutra().reparam(interval))
        mcmc = MCMC(kernel, num_warmup=200, num_samples=1000, progress_bar=False)
        mcmc.run(KEY, *fitted.args)
        np.testing.assert_allclose(mcmc.get_samples()["x"].mean(), mean, atol=0.1)


@pytest.mark.parametrize("compiled_arguments", [True, False])
def test_flow_nuts_with_other_arguments_than_it_was_set_up_with(compiled_arguments):
    kernel = nf.FlowNUTS(interval, SMALL, progress_bar=False)
    mcmc = MCMC(
        kernel,
        num_warmup=200,
        num_samples=1000,
        progress_bar=False,
        jit_model_args=compiled_arguments,
    )
    if compiled_arguments:
        mcmc.run(KEY, 10.0, 5.0)
    else:
        mcmc.warmup(KEY, 10.0, 5.0)
    mcmc.run(KEY, 20.0, 15.0)
    np.testing.assert_allclose(mcmc.get_samples()["x"].mean(), 15.0, atol=0.1)
    np.testing.assert_allclose(mcmc.get_samples()["x"].std(), 0.5, rtol=0.15)


def test_flow_nuts_compiles_few_programs():
    with compiled_programs() as names:
        kernel = nf.FlowNUTS(Counted(), SMALL, num_steps=100, progress_bar=False)
        MCMC(kernel, num_warmup=50, num_samples=50, progress_bar=False).run(KEY, *data(0))
    assert len(names) <= 60, names
