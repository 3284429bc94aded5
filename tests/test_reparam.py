"""Neural transport: what NumPyro's gets wrong and ours does not, and what both get right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import (
    AutoBNAFNormal,
    AutoContinuous,
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
)
from numpyro.infer.reparam import NeuTraReparam as NumPyroNeuTraReparam
from numpyro.infer.util import potential_energy
from programs import count_loops

import numpyro_flows as nf

SMALL = partial(nf.realnvp, depth=3, hidden=(8,))
AutoFlow = partial(nf.AutoFlow, init="location")


class Sinh(nf.FlowTransform):
    """x = sinh(z), known to the last digit."""

    dim: int = nf.transform.eqx.field(static=True)

    @property
    def event_shape(self):
        return (self.dim,)

    def _forward_and_log_det(self, x, context=None):
        return jnp.sinh(x), jnp.log(jnp.cosh(x)).sum(-1)

    def _inverse_and_log_det(self, y, context=None):
        x = jnp.arcsinh(y)
        return x, -jnp.log(jnp.cosh(x)).sum(-1)


class SinhGuide(AutoContinuous):
    """A guide without parameters whose transform is far from the posterior."""

    def _get_posterior(self):
        return nf.FlowDistribution(self.get_base_dist(), Sinh(self.latent_dim))

    def get_base_dist(self):
        return dist.Normal(jnp.zeros(self.latent_dim), 1.0).to_event(1)


def set_up(guide, *args):
    svi = SVI(guide.model, guide, optax.adam(5e-2), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), *args))
    if params:  # off the initial values, so that the transform is not trivial
        params = svi.run(jax.random.key(0), 10, *args, progress_bar=False).params
    return guide, params


def density_in_x(reparam, guide, params, model, args=(), seed=0):
    """log density of the reparameterised model at z, minus the plain model's at x = T(z).

    It must be log|det dT/dz|; both potentials are NumPyro's, the Jacobian is autodiff's.
    """
    neutra = reparam(guide, params)

    @jax.jit
    def judged(z):
        latent = {f"{guide.prefix}_shared_latent": z}
        warped = -potential_energy(neutra.reparam(model), args, {}, latent)
        x = neutra.transform(z)
        plain = -potential_energy(model, args, {}, guide._unpack_latent(x))
        return warped - plain, jnp.linalg.slogdet(jax.jacfwd(neutra.transform)(z))[1]

    ours, log_det = judged(jax.random.normal(jax.random.key(seed), (guide.latent_dim,)))
    return float(ours), float(log_det)


def plated():
    with numpyro.plate("rows", 4):
        numpyro.sample("x", dist.Normal(0, 1))


def batched():
    numpyro.sample("x", dist.Normal(jnp.zeros(4), 1.0))


def event():
    numpyro.sample("x", dist.Normal(jnp.zeros(4), 1.0).to_event(1))


def scaled():
    with handlers.scale(scale=0.25):
        numpyro.sample("x", dist.Normal(jnp.zeros(4), 1.0).to_event(1))


def masked():
    with handlers.mask(mask=False):
        numpyro.sample("x", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(jnp.zeros(4), 1.0).to_event(1), obs=jnp.zeros(4))


def half_masked():
    with numpyro.plate("rows", 4), handlers.mask(mask=jnp.array([True, False, True, False])):
        x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=0.5)


def constrained():
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("rows", 2), handlers.scale(scale=3.0):
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
        numpyro.sample("u", dist.Uniform(-1.0, 2.0))
    numpyro.sample("L", dist.LKJCholesky(2, 1.0))
    numpyro.sample("y", dist.Normal(p.sum(), tau), obs=0.5)


@pytest.mark.parametrize("model", [plated, batched, scaled, masked, half_masked])
def test_numpyros_density_is_wrong_and_ours_is_right(model):
    guide, params = set_up(SinhGuide(model))
    theirs, log_det = density_in_x(NumPyroNeuTraReparam, guide, params, model)
    assert abs(theirs - log_det) > 0.1, "NumPyro mended this; say so in the docs and drop the case"
    ours, log_det = density_in_x(nf.NeuTraReparam, guide, params, model)
    np.testing.assert_allclose(ours, log_det, atol=1e-4)


@pytest.mark.parametrize("model", [event, constrained])
@pytest.mark.parametrize(
    "make",
    [
        partial(AutoFlow, flow=SMALL),
        pytest.param(AutoDiagonalNormal, marks=pytest.mark.slow),
        pytest.param(AutoMultivariateNormal, marks=pytest.mark.slow),
        pytest.param(AutoLowRankMultivariateNormal, marks=pytest.mark.slow),
        pytest.param(AutoIAFNormal, marks=pytest.mark.slow),
        pytest.param(AutoBNAFNormal, marks=pytest.mark.slow),
        pytest.param(AutoLaplaceApproximation, marks=pytest.mark.slow),
    ],
    ids=lambda make: getattr(make, "__name__", "AutoFlow"),
)
def test_the_density_is_right_for_every_guide(make, model):
    guide, params = set_up(make(model))
    ours, log_det = density_in_x(nf.NeuTraReparam, guide, params, model)
    np.testing.assert_allclose(ours, log_det, atol=2e-3, rtol=1e-4)


def run(model, *args, num_samples=2000, **kwargs):
    mcmc = MCMC(NUTS(model), num_warmup=500, num_samples=num_samples, progress_bar=False, **kwargs)
    mcmc.run(jax.random.key(0), *args)
    return mcmc


@pytest.mark.slow
def test_plated_posterior_has_its_own_standard_deviation():
    """x = sinh(z) over N(0, 1)^4 in a plate: NumPyro's draws have sd 1.67 instead of 1."""
    guide, params = set_up(SinhGuide(plated))
    theirs = run(NumPyroNeuTraReparam(guide, params).reparam(plated)).get_samples()["x"]
    assert abs(theirs.std() - 1.67) < 0.1
    ours = run(nf.NeuTraReparam(guide, params).reparam(plated))
    assert abs(ours.get_samples()["x"].std() - 1.0) < 0.05
    samples = ours.get_samples()
    assert samples["auto_shared_latent"].shape == (2000, 4)
    assert samples["x"].shape == (2000, 4)
    again = nf.NeuTraReparam(guide, params).transform_sample(samples["auto_shared_latent"])
    np.testing.assert_allclose(again["x"], samples["x"], rtol=1e-5, atol=1e-5)


def test_an_exception_leaves_nothing_behind():
    def fragile(fail):
        numpyro.sample("x", dist.Normal(0, 1))
        if fail:
            raise RuntimeError("model failed")
        numpyro.sample("w", dist.Normal(0, 1))

    guide, params = set_up(SinhGuide(fragile), False)
    model = NumPyroNeuTraReparam(guide, params).reparam(fragile)
    with pytest.raises(RuntimeError, match="model failed"):
        handlers.seed(model, 0)(True)
    with pytest.raises(KeyError, match="x"):
        handlers.seed(model, 0)(False)

    model = nf.NeuTraReparam(guide, params).reparam(fragile)
    with pytest.raises(RuntimeError, match="model failed"):
        handlers.seed(model, 0)(True)
    sites = handlers.trace(handlers.seed(model, 0)).get_trace(False)
    assert {"auto_shared_latent", "x", "w"} <= sites.keys()


def test_trained_model_parameters_are_used():
    def with_param():
        loc = numpyro.param("loc", 0.0)
        positive = numpyro.param("scale", 1.0, constraint=constraints.positive)
        numpyro.sample("x", dist.Normal(loc, positive))

    guide, params = set_up(SinhGuide(with_param))
    params |= {"loc": jnp.array(5.0), "scale": jnp.array(2.0)}
    theirs = run(NumPyroNeuTraReparam(guide, params).reparam(with_param)).get_samples()["x"]
    assert abs(theirs.mean()) < 0.3
    ours = run(nf.NeuTraReparam(guide, params).reparam(with_param)).get_samples()["x"]
    assert abs(ours.mean() - 5.0) < 0.3
    assert abs(ours.std() - 2.0) < 0.2


@pytest.mark.slow
def test_posterior_of_a_constrained_model_matches_nuts():
    def model(y):
        tau = numpyro.sample("tau", dist.HalfNormal(2.0))
        with numpyro.plate("rows", 3):
            x = numpyro.sample("x", dist.Normal(0, tau))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y = jnp.array([1.0, 2.0, -1.5])
    guide = AutoFlow(model, SMALL)
    svi = SVI(model, guide, optax.adam(1e-2), nf.STL_ELBO(num_particles=16))
    params = svi.run(jax.random.key(0), 500, y, progress_bar=False).params
    plain = run(model, y, num_samples=4000).get_samples()
    warped = run(nf.NeuTraReparam(guide, params).reparam(model), y, num_samples=4000).get_samples()
    for name in ("tau", "x"):
        np.testing.assert_allclose(warped[name].mean(0), plain[name].mean(0), atol=0.12)
        np.testing.assert_allclose(warped[name].std(0), plain[name].std(0), rtol=0.12)


def hierarchical(y):
    """Plated sites, so that NumPyro's factor goes through a plate as in a user's model."""
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    with numpyro.plate("rows", 16):
        x = numpyro.sample("x", dist.Normal(mu, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def potential_program(reparam, guide, params, y, gradient):
    neutra = reparam(guide, params)

    def potential(z):
        return potential_energy(neutra.reparam(hierarchical), (y,), {}, {"auto_shared_latent": z})

    function = jax.grad(potential) if gradient else potential
    return jax.jit(function).lower(jnp.zeros(guide.latent_dim)).compile()


@pytest.mark.slow
def test_the_potential_is_one_pass():
    y = jnp.zeros(16)
    guide, params = set_up(AutoFlow(hierarchical, partial(nf.realnvp, depth=5)), y)
    assert count_loops(potential_program(nf.NeuTraReparam, guide, params, y, False)) == 1
    assert count_loops(potential_program(NumPyroNeuTraReparam, guide, params, y, False)) == 2


@pytest.mark.parametrize(
    ("make", "ratio"),
    [
        pytest.param(AutoIAFNormal, 0.6, marks=pytest.mark.slow),  # three layers by default
        # A coupling costs as much backward as forward, and XLA merges NumPyro's two forward
        # passes here: one of each against one forward and two backward is two thirds; the rest
        # is the two affine maps around the flow.
        (partial(AutoFlow, flow=partial(nf.realnvp, depth=3)), 0.7),
    ],
    ids=["AutoIAFNormal", "AutoFlow"],
)
def test_flops_of_the_gradient_beside_numpyros(make, ratio):
    y = jnp.zeros(16)
    guide, params = set_up(make(hierarchical), y)
    flops = [
        potential_program(reparam, guide, params, y, True).cost_analysis()["flops"]
        for reparam in (nf.NeuTraReparam, NumPyroNeuTraReparam)
    ]
    assert flops[0] <= ratio * flops[1]


def test_predictive_and_decorator():
    guide, params = set_up(SinhGuide(plated))

    @nf.NeuTraReparam(guide, params).reparam
    def model():
        return plated()

    draws = Predictive(model, num_samples=5)(jax.random.key(0))
    assert draws["x"].shape == (5, 4)
    assert model.__name__ == "model"


def test_bad_input():
    guide, params = set_up(SinhGuide(plated))
    neutra = nf.NeuTraReparam(guide, params)
    with pytest.raises(TypeError, match="expected an AutoContinuous guide, got AutoDelta"):
        nf.NeuTraReparam(AutoDelta(plated), {})
    with pytest.raises(ValueError, match="never set up"):
        nf.NeuTraReparam(AutoFlow(plated), {})
    flow_guide, flow_params = set_up(AutoFlow(plated, SMALL))
    with pytest.raises(ValueError, match="expected the trained parameters"):
        nf.NeuTraReparam(flow_guide, {})
    bad = flow_params | {
        "auto_preconditioner": nf.transforms.FixedAffine(jnp.full(4, jnp.nan), 1.0)
    }
    with pytest.raises(ValueError, match=r"'auto_preconditioner' .* not finite"):
        nf.NeuTraReparam(flow_guide, bad)
    with pytest.raises(TypeError, match=r"use `neutra.reparam\(model\)`"):
        handlers.seed(handlers.reparam(plated, config={"x": neutra}), 0)()
    conditioned = neutra.reparam(handlers.condition(plated, {"x": jnp.zeros(4)}))
    with pytest.raises(
        ValueError, match="'x' is latent in the guide but has a value.*fit the guide"
    ):
        handlers.seed(conditioned, 0)()
    with pytest.raises(ValueError, match=r"did not reach the latent sites \['x'\]"):
        handlers.seed(neutra.reparam(lambda: None), 0)()

    def in_scan():
        scan(lambda c, _: (numpyro.sample("x", dist.Normal(c, 1)), None), 0.0, None, length=4)

    scan_guide, scan_params = set_up(SinhGuide(in_scan))
    with pytest.raises(ValueError, match="control_flow` cannot be reparameterised"):
        handlers.seed(nf.NeuTraReparam(scan_guide, scan_params).reparam(in_scan), 0)()
