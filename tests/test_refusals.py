"""Models that a guide over one unconstrained space cannot follow are refused by name."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, init_to_uniform, init_to_value

import numpyro_flows as nf

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def local():
    with numpyro.plate("rows", 6, subsample_size=2):
        numpyro.sample("z", dist.Normal(0.0, 1.0))


def two_sizes():
    with numpyro.plate("rows", 2):
        numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 3):
        numpyro.sample("b", dist.Normal(0.0, 1.0))


def point_mass():
    numpyro.sample("a", dist.Delta(1.0))
    numpyro.sample("b", dist.Normal(0.0, 1.0))


def on_the_sphere():
    numpyro.sample("a", dist.ProjectedNormal(jnp.ones(2)))


def pair():
    with numpyro.plate("rows", 2):
        numpyro.sample("a", dist.Normal(0.0, 1.0))


REFUSED = {
    "local": (local, None, r"'z' is latent in the subsampled plate 'rows' \(2 of 6 rows\)"),
    "two sizes": (
        two_sizes,
        None,
        "'rows' around site 'b' has size 3 at dim -1, and elsewhere size 2",
    ),
    "sphere": (on_the_sphere, None, "spherical sample site 'a'.*ProjectedNormalReparam"),
    "point mass": (point_mass, None, "'a' is latent and a point mass"),
    "start": (pair, {"a": np.zeros(3)}, r"'a' has values of shape \(2,\).* of shape \(3,\)"),
    "start of all rows": (local, {"z": np.zeros(6)}, r"'z' has values of shape \(2,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_guide_cannot_follow_is_named(case):
    model, values, message = REFUSED[case]
    strategy = init_to_uniform if values is None else init_to_value(values=values)
    guide = nf.AutoFlow(model, init_loc_fn=strategy)
    with pytest.raises(ValueError, match=message):
        nf.fit_guide(KEY, guide, progress_bar=False)
    kernel = nf.FlowNUTS(model, init_strategy=strategy, progress_bar=False)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=2, progress_bar=False)
    with pytest.raises(ValueError, match=message):
        mcmc.run(KEY)


def test_a_missing_plate_is_warned_of():
    def model():
        with numpyro.plate("rows", 3, dim=-2):
            numpyro.sample("z", dist.Normal(jnp.zeros((3, 2)), 1.0))

    with pytest.warns(UserWarning, match="Missing a plate statement"):
        nf.AutoFlow(model).set_up(KEY, (), {})


def counting(counter):
    counter.append(0)
    numpyro.sample(f"x{len(counter)}", dist.Normal(0.0, 1.0))


def noisy(_):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=RNG.normal())


def noisy_scale(_):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x, RNG.uniform(1.0, 2.0)), obs=0.3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (counting, r"other sites when it runs again: \['x1', 'x2'\]"),
        (noisy, "'y' has other numbers when the model runs again"),
        (noisy_scale, "'y' has other numbers when the model runs again"),
    ],
)
def test_a_model_that_differs_from_run_to_run_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        nf.fit_guide(KEY, nf.AutoFlow(model), [], progress_bar=False)


def test_subsamples_are_the_same_for_the_same_key():
    def model(y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.deterministic("twice", 2 * m)
        with numpyro.plate("rows", len(y), subsample_size=3):
            numpyro.sample("y", dist.Normal(m, 1.0), obs=numpyro.subsample(y, event_dim=0))

    nf.AutoFlow(model).set_up(KEY, (jnp.arange(9.0),), {})


def curve(t):
    """No solution where rate > 1, as of an equation that blows up."""
    rate = numpyro.sample("rate", dist.Normal(0.0, 1.0))
    loc = jnp.where(rate > 1.0, jnp.nan, rate * t)
    numpyro.sample("y", dist.Normal(loc, 0.5, validate_args=True), obs=0.2 * t)


def test_starts_that_fail_are_passed_over():
    t = jnp.arange(1.0, 4.0)
    guide = nf.AutoFlow(curve, partial(nf.realnvp, depth=2, hidden=(8,)))
    fitted = nf.fit_guide(KEY, guide, t, num_draws=500, progress_bar=False)
    rate = fitted.sample(KEY, (2000,))["rate"]
    variance = 1 / (1 + float((t**2).sum()) / 0.25)
    assert float(rate.mean()) == pytest.approx(0.8 * 14 * variance, abs=0.3 * variance**0.5)


def test_the_site_is_named_where_all_starts_fail():
    def model():
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(jnp.log(-rate), 0.5, validate_args=True), obs=0.2)

    with pytest.raises(ValueError, match="infinite at every start: look at site 'y'"):
        nf.fit_guide(KEY, nf.AutoFlow(model), progress_bar=False)


def test_what_to_do_is_said_where_a_model_raises_as_it_runs():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("solve", eqx.error_if(-(x**2), jnp.abs(x) > 0.1, "the solve failed"))

    with pytest.raises(Exception, match="the solve failed") as error:
        nf.fit_guide(KEY, nf.AutoFlow(model), progress_bar=False)
    assert any("EQX_ON_ERROR=nan" in note for note in error.value.__notes__)
