"""Log densities and potential energies of pytrees, as models and in FlowNUTS."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from kernels import run
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

import numpyro_flows as nf

KEY = jax.random.key(0)
SMALL = functools.partial(nf.realnvp, depth=4, hidden=(16,), activation="gelu")
EXAMPLE = {"rate": 1.0, "pair": (jnp.zeros(2), jnp.array([0.2, 0.3, 0.5]))}
SUPPORT = {"rate": constraints.positive, "pair": (constraints.real, constraints.simplex)}


def gamma_normal_dirichlet(p, shape=3.0):
    loc, share = p["pair"]
    return (
        dist.Gamma(shape, 2.0).log_prob(p["rate"])
        + dist.Normal(1.0, 2.0).log_prob(loc).sum()
        + dist.Dirichlet(jnp.array([4.0, 2.0, 2.0])).log_prob(share)
    )


def test_a_log_density_is_a_model():
    """Moments of closed forms, the evidence, and the arguments of the model handed on."""
    model = nf.log_density_model(gamma_normal_dirichlet, EXAMPLE, SUPPORT)
    assert model.names == ("pair.0", "pair.1", "rate")
    fitted = nf.fit_guide(KEY, nf.AutoFlow(model, SMALL), 5.0, progress_bar=False)
    assert fitted.trusted
    assert abs(fitted.elbo) < 0.02  # it is normalised
    draws = model.tree(fitted.resample(KEY, 10_000).draws)
    np.testing.assert_allclose(draws["rate"].mean(), 2.5, atol=0.08)
    np.testing.assert_allclose(draws["pair"][0].std(0), 2.0, atol=0.1)
    np.testing.assert_allclose(draws["pair"][1].mean(0), [0.5, 0.25, 0.25], atol=0.02)
    np.testing.assert_array_equal(model.sites(draws)["rate"], draws["rate"])


def test_nuts_takes_the_same_model():
    """NumPyro's own potential energy of the model, against one with ordinary priors."""

    def ordinary():
        numpyro.sample("rate", dist.Gamma(3.0, 2.0))
        numpyro.sample("pair.0", dist.Normal(1.0, 2.0).expand((2,)).to_event(1))
        numpyro.sample("pair.1", dist.Dirichlet(jnp.array([4.0, 2.0, 2.0])))

    from numpyro.infer.util import initialize_model

    model = nf.log_density_model(gamma_normal_dirichlet, EXAMPLE, SUPPORT)
    ours, theirs = (initialize_model(KEY, m).potential_fn for m in (model, ordinary))
    z = {"rate": 0.3, "pair.0": jnp.array([0.1, -2.0]), "pair.1": jnp.array([0.4, -0.7])}
    np.testing.assert_allclose(ours(z), theirs(z), rtol=1e-5)


def test_a_bare_array():
    model = nf.log_density_model(lambda x: -0.5 * (x**2).sum(), jnp.zeros((2, 3)))
    assert model.names == ("x",)
    fitted = nf.fit_guide(KEY, nf.AutoFlow(model, SMALL), progress_bar=False)
    np.testing.assert_allclose(fitted.elbo, 3 * np.log(2 * np.pi), atol=0.01)
    assert model.tree(fitted.sample(KEY, (5,))).shape == (5, 2, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda f: nf.log_density_model(3, 1.0), TypeError, "expected a function of a pytree"),
        (lambda f: nf.log_density_model(f, {"n": 3}), TypeError, "leaf 'n' is of dtype int"),
        (lambda f: nf.log_density_model(f, {}), ValueError, "without leaves"),
        (lambda f: nf.log_density_model(f, {"a": jnp.nan}), ValueError, "leaf 'a' is not finite"),
        (
            lambda f: nf.log_density_model(f, {"a": -1.0}, constraints.positive),
            ValueError,
            "leaf 'a' of the example is outside",
        ),
        (
            lambda f: nf.log_density_model(f, {"a": 1.0}, constraints.simplex),
            ValueError,
            "arrays of 1 axes, and leaf 'a' has 1 fewer",
        ),
        (
            lambda f: nf.log_density_model(f, {"a": 1.0}, {"b": constraints.real}),
            ValueError,
            "a pytree of them like the example",
        ),
        (lambda f: nf.log_density_model(f, {"a": 1.0}, "real"), TypeError, "NumPyro constraints"),
        (
            lambda f: nf.log_density_model(f, {"a": 1.0}, constraints.boolean),
            ValueError,
            "of leaf 'a' is discrete",
        ),
        (lambda f: nf.log_density_model(f, {"a.b": 1.0, "a": {"b": 1.0}}), ValueError, "one name"),
    ],
)
def test_bad_examples_and_supports(make, error, message):
    with pytest.raises(error, match=message):
        make(lambda p: 0.0)


def test_a_log_density_that_is_no_scalar():
    model = nf.log_density_model(lambda x: -0.5 * x**2, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"expected a scalar, got a value of shape \(3,\)"):
        nf.fit_guide(KEY, nf.AutoFlow(model, SMALL), progress_bar=False)


def test_an_improper_log_density_is_called_so():
    model = nf.log_density_model(lambda p: -0.5 * p["a"] ** 2, {"a": 0.0, "b": 0.0})
    fitted = nf.fit_guide(KEY, nf.AutoFlow(model, SMALL), progress_bar=False)
    assert fitted.improper == ("b",)


def correlated(z):
    """Two normals of correlation 0.99, far from the origin, and a third."""
    u, v = z["u"] - 30.0, z["v"][0]
    return 0.5 * (u**2 + v**2 - 1.98 * u * v) / (1 - 0.99**2) + 0.5 * (z["v"][1] / 3.0) ** 2


def test_flow_nuts_takes_a_potential_energy():
    """As NUTS does: pytrees in, pytrees out, the same extra fields; moments in closed form."""
    starts = {"u": 29.0 + jnp.arange(4.0), "v": jnp.zeros((4, 2))}
    fields = ("num_steps", "potential_energy", "energy", "accept_prob", "adapt_state.step_size")
    found = {}
    for name, kernel in (
        ("nuts", NUTS(potential_fn=correlated)),
        ("ours", nf.FlowNUTS(potential_fn=correlated, progress_bar=False)),
    ):
        mcmc = run(kernel, num_chains=4, init_params=starts, extra_fields=fields)
        found[name] = mcmc.get_samples(), mcmc.get_extra_fields()
    (draws, extra), (theirs, their_extra) = found["ours"], found["nuts"]
    assert jax.tree.map(jnp.shape, draws) == jax.tree.map(jnp.shape, theirs)
    assert set(fields) <= set(extra) & set(their_extra)
    np.testing.assert_allclose(draws["u"].mean(), 30.0, atol=0.1)
    np.testing.assert_allclose(draws["v"].std(0), [1.0, 3.0], rtol=0.08)
    assert np.corrcoef(draws["u"], draws["v"][:, 0])[0, 1] == pytest.approx(0.99, abs=0.002)
    assert extra["num_steps"].mean() < 0.5 * their_extra["num_steps"].mean()
    report = kernel.report(mcmc)
    assert report.run.trusted
    assert report.run.r_hat[0].startswith(("u", "v"))
    assert kernel.model is None
    pickle.loads(pickle.dumps(kernel))


def test_a_potential_energy_of_one_chain_and_a_bare_array():
    kernel = nf.FlowNUTS(potential_fn=lambda x: 0.5 * ((x - 3.0) ** 2).sum(), progress_bar=False)
    mcmc = MCMC(kernel, num_warmup=100, num_samples=500, progress_bar=False)
    mcmc.run(KEY, init_params=jnp.zeros(2))
    assert mcmc.get_samples().shape == (500, 2)
    np.testing.assert_allclose(mcmc.get_samples().mean(0), 3.0, atol=0.2)
    assert kernel.sites.shape == (2,)
    mcmc.run(KEY, "of no model", init_params=jnp.zeros(2))  # ignored, as by NUTS
    np.testing.assert_allclose(mcmc.get_samples().mean(0), 3.0, atol=0.2)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (None, "a potential energy has no starts of its own"),
        ({"u": jnp.nan, "v": jnp.zeros(2)}, "leaf 'u' is not finite"),
    ],
)
def test_bad_starts_of_a_potential_energy(starts, message):
    kernel = nf.FlowNUTS(potential_fn=correlated, progress_bar=False)
    with pytest.raises(ValueError, match=message):
        kernel.init(KEY, 100, starts)


def test_a_model_or_a_potential_energy():
    with pytest.raises(ValueError, match="one of `model` and `potential_fn`"):
        nf.FlowNUTS()
    with pytest.raises(ValueError, match="one of `model` and `potential_fn`"):
        nf.FlowNUTS(lambda: None, potential_fn=correlated)
    with pytest.raises(TypeError, match="potential_fn: expected a function, got int"):
        nf.FlowNUTS(potential_fn=3)
