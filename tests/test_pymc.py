"""PyMC models, where PyMC is installed: closed forms, PyMC's own NUTS, bad input.

The slow ones are run with XLA as users have it, ``XLA_FLAGS= pytest -m slow tests/test_pymc.py``:
the gradient of the mixture is NaN at some points with what the suite sets (docs/testing.md).
"""

import sys
import warnings

import jax
import numpy as np
import pytest

import numpyro_flows as nf

KEY = jax.random.key(0)
Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def test_without_pymc(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymc", None)
    with pytest.raises(ImportError, match=r"nf.sample_pymc needs PyMC: `pip install"):
        nf.sample_pymc(object())
    with pytest.raises(ImportError, match=r"nf.fit_pymc needs PyMC: `pip install"):
        nf.fit_pymc(object())


@pytest.fixture
def pm():
    with warnings.catch_warnings(action="ignore"):
        return pytest.importorskip("pymc")


def conjugate(pm):
    """A mean with a normal prior, its exponential, and a simplex with a Dirichlet posterior."""
    with pm.Model(coords={"group": ["a", "b"], "kind": ["x", "y", "z"]}) as model:
        mean = pm.Normal("mean", 0.0, 2.0, dims="group")
        pm.Deterministic("scale", pm.math.exp(mean), dims="group")
        pm.Normal("y", mean, 1.0, observed=np.array([1.0, -1.0]), dims="group")
        share = pm.Dirichlet("share", np.array([1.0, 2.0, 3.0]), dims="kind")
        pm.Multinomial("counts", 14, share, observed=np.array([3, 10, 1]))
    return model


@pytest.mark.parametrize("how", ["fit_pymc", "sample_pymc"])
def test_names_dims_and_closed_forms(pm, how):
    data = getattr(nf, how)(conjugate(pm), key=KEY, progress_bar=False)
    posterior = data.posterior
    assert set(posterior.data_vars) == {"mean", "scale", "share"}
    assert posterior["mean"].dims == ("chain", "draw", "group")
    assert list(posterior["share"].coords["kind"].values) == ["x", "y", "z"]
    mean = posterior["mean"].mean(("chain", "draw"))
    np.testing.assert_allclose(mean, [0.8, -0.8], atol=0.06)
    np.testing.assert_allclose(posterior["mean"].std(("chain", "draw")), 0.8**0.5, rtol=0.06)
    np.testing.assert_allclose(posterior["scale"], np.exp(posterior["mean"]), rtol=1e-4)
    share = posterior["share"].mean(("chain", "draw"))
    np.testing.assert_allclose(share, np.array([4.0, 12.0, 4.0]) / 20, atol=0.01)
    assert posterior.attrs["verdict"].startswith("reliable")
    np.testing.assert_array_equal(data.observed_data["counts"], [3, 10, 1])
    if how == "sample_pymc":
        assert data.sample_stats["diverging"].shape == (4, 1000)


def discrete(pm):
    with pm.Model() as model:
        k = pm.Bernoulli("k", 0.3)
        pm.Normal("y", k, 1.0, observed=0.3)
    return model


def empty(pm):
    with pm.Model() as model:
        pm.Normal("y", 0.0, 1.0, observed=0.3)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda pm: 3, TypeError, "expected a `pymc.Model`, got int"),
        (discrete, ValueError, "'k' is discrete"),
        (empty, ValueError, "no free variables"),
    ],
)
def test_bad_models(pm, make, error, message):
    with pytest.raises(error, match=message):
        nf.sample_pymc(make(pm))


def eight_schools(pm):
    with pm.Model(coords={"school": list("ABCDEFGH")}) as model:
        mu = pm.Normal("mu", 0.0, 5.0)
        tau = pm.HalfCauchy("tau", 5.0)
        theta = pm.Normal("theta", mu, tau, dims="school")
        pm.Normal("y", theta, SIGMA, observed=Y, dims="school")
    return model


def gaussian_process(pm):
    x = np.linspace(0, 1, 12)[:, None]
    y = np.sin(6 * x[:, 0]) + 0.2 * np.random.default_rng(0).normal(size=12)
    with pm.Model() as model:
        length = pm.Gamma("length", 4.0, 10.0)
        scale = pm.HalfNormal("scale", 1.5)
        noise = pm.HalfNormal("noise", 0.5)
        gp = pm.gp.Marginal(cov_func=scale**2 * pm.gp.cov.ExpQuad(1, length))
        gp.marginal_likelihood("y", X=x, y=y, sigma=noise)
    return model


def ordered_pair(pm, name, scale):
    ordered = pm.distributions.transforms.ordered
    return pm.Normal(name, 0.0, scale, shape=2, transform=ordered, initval=np.array([-1.0, 1.0]))


def ordered_logistic(pm):
    rng = np.random.default_rng(1)
    x = rng.normal(size=80)
    y = np.digitize(1.2 * x + rng.logistic(size=80), [-1.0, 1.0])
    with pm.Model() as model:
        slope = pm.Normal("slope", 0.0, 2.0)
        cut = ordered_pair(pm, "cut", 3.0)
        pm.OrderedLogistic("y", slope * x, cut, observed=y)
    return model


def mixture(pm):
    rng = np.random.default_rng(2)
    y = np.concatenate([rng.normal(-2, 0.7, 40), rng.normal(2, 1.0, 80)])
    with pm.Model() as model:
        weight = pm.Dirichlet("weight", np.array([2.0, 2.0]))
        loc = ordered_pair(pm, "loc", 4.0)
        scale = pm.HalfNormal("scale", 2.0, shape=2)
        pm.NormalMixture("y", weight, loc, scale, observed=y)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [eight_schools, gaussian_process, ordered_logistic, mixture])
def test_against_nuts_of_pymc(pm, make):
    model = make(pm)
    ours = nf.sample_pymc(model, key=KEY, progress_bar=False)
    with model:
        theirs = pm.sample(
            2000,
            tune=2000,
            chains=2,
            cores=2,
            target_accept=0.99,
            progressbar=False,
            random_seed=1,
            compute_convergence_checks=False,
        )
    import arviz

    for name in theirs.posterior.data_vars:
        mean, sd = (f(theirs.posterior[name], axis=(0, 1)) for f in (np.mean, np.std))
        error = sd / np.sqrt(np.asarray(arviz.ess(theirs, var_names=[name])[name]))
        off = np.abs(np.mean(ours.posterior[name], axis=(0, 1)) - mean)
        assert (off < 5 * error + 0.03 * sd).all(), name
        ratio = np.log(np.std(ours.posterior[name], axis=(0, 1)) / sd)
        assert (np.abs(ratio) < 0.15).all(), name
