"""Angles in guides: unwound, never cut."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import i0e, i1e
from jax.scipy.stats import norm
from numpyro import handlers
from numpyro.infer.util import log_density

import numpyro_flows as nf
from numpyro_flows.infer.supports import TURNS, Winding

TURN = 2 * np.pi
SMALL = partial(nf.realnvp, depth=4, hidden=(16,), activation="gelu")


@pytest.mark.parametrize("scale", [0.3, 1.0, np.pi])
def test_shares_of_the_turns_sum_to_one(scale, x64):
    winding = Winding(jnp.asarray(1.0), scale)
    u = jnp.linspace(-4.0, 5.0, 91)
    turns = TURN * jnp.arange(-6, 7)
    every = u[:, None] + turns
    shares = jnp.exp(winding.log_abs_det_jacobian(every, winding(every)))
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-10)
    assert TURNS >= 4


def test_a_wrapped_normal_unwinds_to_the_normal(x64):
    centre, scale = 2.5, 1.3
    winding = Winding(jnp.asarray(centre), scale)
    u = jnp.linspace(-2.0, 7.0, 50)
    angle = winding(u)
    every = angle[:, None] + TURN * jnp.arange(-8, 9)
    wrapped = jnp.log(norm.pdf(every, centre, scale).sum(-1))
    unwound = wrapped + winding.log_abs_det_jacobian(u, angle)
    np.testing.assert_allclose(unwound, norm.logpdf(u, centre, scale), atol=1e-9)


def test_angles_stay_in_their_support_and_come_back():
    winding = Winding(jnp.zeros(()), 1.0)
    u = jnp.array([np.pi, -np.pi, 3 * np.pi, 1e4, 0.0, -9.0], jnp.float32)
    angle = winding(u)
    assert (jnp.abs(angle) <= np.float32(np.pi)).all()
    np.testing.assert_allclose(jnp.cos(angle), jnp.cos(u), atol=1e-3)
    np.testing.assert_allclose(winding.inv(angle), angle)


def at_the_cut():
    angle = numpyro.sample("angle", dist.VonMises(3.1, 4.0))
    speed = numpyro.sample("speed", dist.LogNormal(jnp.cos(angle), 0.5))
    numpyro.deterministic("north", speed * jnp.sin(angle))


@pytest.fixture(scope="module")
def fitted():
    guide = nf.AutoFlow(at_the_cut, SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = nf.fit_guide(
            jax.random.key(0), guide, num_steps=500, num_particles=64, progress_bar=False
        )
    return guide, fit


@pytest.mark.slow
def test_the_guide_covers_both_sides_of_the_cut(fitted):
    guide, fit = fitted
    assert fit.elbo > -0.02  # the model is normalised: log evidence 0
    assert fit.ess > 0.95
    draws = guide.sample_posterior(jax.random.key(1), fit.params, sample_shape=(20_000,))
    angle = draws["angle"]
    assert 0.4 < (angle > 0).mean() < 0.6
    length = i1e(4.0) / i0e(4.0)
    np.testing.assert_allclose(jnp.cos(angle).mean(), length * np.cos(3.1), atol=0.02)
    np.testing.assert_allclose(jnp.sin(angle).mean(), length * np.sin(3.1), atol=0.02)
    np.testing.assert_allclose(
        draws["north"], draws["speed"] * jnp.sin(angle), rtol=1e-4, atol=1e-5
    )


def test_density_of_the_guide_is_one_on_the_circle(fitted):
    guide, fit = fitted
    log_q, trace = log_density(handlers.seed(guide, 3), (), {}, fit.params)
    u = trace["_auto_latent"]["value"]
    # Written out: the flow's density, less what log r and the support of the speed take.
    affine = fit.params["auto_preconditioner"]
    draws = affine(jax.random.normal(jax.random.key(0), (200_000, 2)))
    sd = np.clip(float(draws[:, 0].std()), 1, np.pi)
    centre = float(affine.loc.value[0])
    shares = norm.pdf(u[0] + TURN * np.arange(-6, 7), centre, sd)
    log_r = jnp.log(shares[6] / shares.sum())
    expected = guide.get_posterior(fit.params).log_prob(u) - log_r - u[1]
    np.testing.assert_allclose(log_q, expected, rtol=1e-3, atol=1e-3)


def test_neural_transport_has_the_same_density(fitted):
    guide, fit = fitted
    neutra = nf.NeuTraReparam(guide, fit.params)
    transform = guide.get_transform(fit.params)
    winding = guide.get_windings(fit.params)["angle"]
    for z in jax.random.normal(jax.random.key(2), (3, 2)):
        total, trace = log_density(
            handlers.seed(neutra.reparam(at_the_cut), 0), (), {}, {"auto_shared_latent": z}
        )
        u, log_det = transform.forward_and_log_det(z)
        values = {"angle": winding(u[0]), "speed": jnp.exp(u[1])}
        plain, _ = log_density(handlers.seed(at_the_cut, 0), (), {}, values)
        log_r = winding.log_abs_det_jacobian(u[0], values["angle"])
        np.testing.assert_allclose(total, plain + log_det + log_r + u[1], rtol=1e-4)
        np.testing.assert_allclose(trace["angle"]["value"], values["angle"], rtol=1e-5)


@pytest.mark.slow
def test_local_angles_are_not_cut():
    true = jnp.linspace(-np.pi, np.pi, 41)[:-1]

    def model(x):
        with numpyro.plate("rows", len(x)):
            angle = numpyro.sample("angle", dist.VonMises(0.0, 0.01))
            at = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
            numpyro.sample("x", dist.Normal(at, 0.2).to_event(1), obs=x)

    x = jnp.stack([jnp.cos(true), jnp.sin(true)], -1)
    guide = nf.AmortizedFlow(model, lambda x: x, 2, partial(nf.realnvp, depth=2, hidden=(16,)))
    fit = nf.fit_guide(jax.random.key(0), guide, x, num_steps=50, progress_bar=False)
    draws = guide.sample_posterior(jax.random.key(1), fit.params, x, sample_shape=(5,))["angle"]
    assert draws.shape == (5, 40)
    assert (jnp.abs(draws) <= np.float32(np.pi)).all()
    log_q, trace = log_density(handlers.seed(guide, 3), (x,), {}, fit.params)
    assert np.isfinite(log_q)
    assert trace["angle"]["fn"].log_density.shape == (40,)
