"""Improper posteriors are told from proper ones, whatever the ELBO."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

import numpyro_flows as nf

KEY = jax.random.key(0)
SMALL = partial(nf.realnvp, depth=2, hidden=(8,))
X = np.linspace(-1, 1, 20).astype(np.float32)


def flat(name, support=dist.constraints.real):
    return numpyro.sample(name, dist.ImproperUniform(support, (), ()))


def unused():
    flat("a")
    numpyro.sample("m", dist.Normal(0.0, 1.0))


def unused_positive():
    flat("a", dist.constraints.positive)


def only_the_sum():
    total = flat("a") + flat("b")
    numpyro.sample("y", dist.Normal(total, 1.0), obs=1.0)


def separated():
    logits = flat("a") * X
    numpyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=(X > 0).astype(int))


def one_row_for_two():
    m, s = flat("a"), flat("b", dist.constraints.positive)
    numpyro.sample("y", dist.Normal(m, s), obs=1.0)


IMPROPER = {
    unused: {"a"},
    unused_positive: {"a"},
    only_the_sum: {"a", "b"},
    separated: {"a"},
    one_row_for_two: {"a"},
}


@pytest.mark.parametrize("model", IMPROPER)
def test_improper_posteriors_are_called_so(model):
    fitted = nf.fit_guide(KEY, nf.AutoFlow(model, SMALL), num_draws=500, progress_bar=False)
    assert set(fitted.improper) == IMPROPER[model]
    assert not fitted.trusted
    assert fitted.verdict.startswith("not reliable")
    assert "improper" in fitted.verdict
    assert "'a'" in fitted.verdict


def bounded_by_data():
    m, s = flat("m"), flat("s", dist.constraints.positive)
    numpyro.sample("y", dist.Normal(m, s).expand([20]).to_event(1), obs=X)


def heavy_tails():
    numpyro.sample("x", dist.Cauchy(0.0, 1.0))
    numpyro.sample("s", dist.HalfCauchy(1.0))


def all_supports():
    numpyro.sample("u", dist.Uniform(0.0, 1.0))
    numpyro.sample("d", dist.Dirichlet(jnp.ones(3)))
    numpyro.sample("v", dist.VonMises(0.0, 0.1))
    numpyro.sample("g", dist.Gamma(0.1, 1.0))


def overflow():
    """In float32 the density of 1 / x is +inf far out."""
    numpyro.sample("x", dist.InverseGamma(4.0, 3.0))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(bounded_by_data, marks=pytest.mark.slow),
        heavy_tails,
        pytest.param(all_supports, marks=pytest.mark.slow),
        overflow,
    ],
)
def test_proper_posteriors_are_not(model):
    fitted = nf.fit_guide(
        KEY, nf.AutoFlow(model, SMALL), num_steps=1, num_draws=500, progress_bar=False
    )
    assert fitted.improper == ()


def test_a_guess_of_the_scale_judges_nothing():
    def wide():
        numpyro.sample("x", dist.Normal(0.0, 1000.0))

    guide = nf.AutoFlow(wide, SMALL, init="location")
    fitted = nf.fit_guide(KEY, guide, num_steps=20, num_draws=500, progress_bar=False)
    assert fitted.improper == ()
    assert len(fitted.losses) == 20


@pytest.mark.slow
def test_a_sampler_warns():
    kernel = nf.FlowNUTS(only_the_sum, SMALL, progress_bar=False)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=20, progress_bar=False)
    with pytest.warns(UserWarning, match="improper: far out along 'a', 'b'"):
        mcmc.run(KEY)
    assert "Improper along 'a', 'b'" in str(kernel.report())
