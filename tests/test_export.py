"""Guides for ArviZ: the groups, dimensions and labels of ``arviz.from_numpyro``."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, Predictive, log_likelihood
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList
from programs import compiled_programs
from scipy import stats

import numpyro_flows as nf

with warnings.catch_warnings(action="ignore", category=FutureWarning):
    import arviz

KEY = jax.random.key(0)
Y = jnp.array([28.0, 8.0, -3.0, 7.0])
SIGMA = jnp.array([15.0, 10.0, 16.0, 11.0])
NAMES = ["A", "B", "C", "D"]


def schools(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
    infer = {"event_dims": ["feature"]}
    numpyro.sample("w", dist.Normal(jnp.zeros(3), 1.0).to_event(1), infer=infer)
    numpyro.sample("free", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    numpyro.factor("extra", -0.1 * mu**2)
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.deterministic("effect", theta - mu)
        numpyro.deterministic("table", jnp.stack([theta, 2 * theta], axis=-1))
        with numpyro.plate("year", 2):
            numpyro.sample("pupil", dist.Normal(jnp.zeros(5), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def normal_guide(model, *args, scale=0.5):
    """A guide with parameters that nothing was trained for."""
    guide = AutoDiagonalNormal(model)
    handlers.seed(guide, 0)(*args)
    dim = guide.latent_dim
    return guide, {"auto_loc": np.zeros(dim), "auto_scale": np.full(dim, scale)}


def group_names(data):
    names = data.groups() if callable(data.groups) else data.groups
    return {name.strip("/") for name in names} - {""}


def dims_of(data, group):
    return {name: array.dims for name, array in data[group].data_vars.items()}


def without_numbers(dims):
    """ArviZ 0 numbers axes without a name by their place, ArviZ 1 among themselves."""
    return {k: tuple(re.sub(r"_dim_\d+", "_dim", dim) for dim in own) for k, own in dims.items()}


@pytest.fixture(scope="module")
def exported():
    guide, params = normal_guide(schools, SIGMA, Y)
    options = {"coords": {"school": NAMES}, "dims": {"sigma": ["school"]}}
    with compiled_programs() as programs:
        data = nf.to_arviz(
            guide,
            params,
            SIGMA,
            Y,
            key=jax.random.key(1),
            num_samples=4000,
            constant_data={"sigma": SIGMA},
            **options,
        )
    return data, programs


def test_it_has_what_from_numpyro_has(exported):
    mcmc = MCMC(NUTS(schools), num_warmup=10, num_samples=20, progress_bar=False)
    mcmc.run(KEY, SIGMA, Y)
    free = handlers.uncondition(schools)
    predicted = Predictive(free, mcmc.get_samples(), return_sites=["y"])(KEY, SIGMA, Y)
    sites = [*mcmc.get_samples(), "y"]
    prior = Predictive(free, num_samples=20, return_sites=sites)(KEY, SIGMA, Y)
    if not arviz.__version__.startswith("0."):  # which wants an axis of chains
        prior, predicted = jax.tree.map(lambda x: x[None], (prior, predicted))
    expected = arviz.from_numpyro(
        mcmc,
        prior=prior,
        posterior_predictive=predicted,
        constant_data={"sigma": SIGMA},
        coords={"school": NAMES},
        log_likelihood=True,
    )
    data, _ = exported
    assert group_names(data) == group_names(expected)
    for group in group_names(data) - {"sample_stats", "constant_data"}:
        ours, theirs = data[group], expected[group]
        own = dims_of(expected, group)
        for name in {"extra"} & own.keys():  # the factor, which is no datum
            del own[name]
        assert without_numbers(dims_of(data, group)) == without_numbers(own)
        for name in own:
            assert ours[name].shape[-1:] == theirs[name].shape[-1:] or own[name][-1] == "draw"
            for dim in {"chain", "school", "year", "feature"} & set(own[name]):
                np.testing.assert_array_equal(ours[dim], theirs[dim])
    assert dims_of(data, "posterior") == {
        "mu": ("chain", "draw"),
        "tau": ("chain", "draw"),
        "w": ("chain", "draw", "feature"),
        "free": ("chain", "draw", "free_dim_0"),
        "theta": ("chain", "draw", "school"),
        "effect": ("chain", "draw", "school"),
        "table": ("chain", "draw", "school", "table_dim_1"),
        "pupil": ("chain", "draw", "year", "school", "pupil_dim_2"),
    }
    assert data["constant_data"]["sigma"].dims == ("school",)
    assert list(data["observed_data"]["school"].values) == NAMES


@pytest.mark.smoke
def test_the_figures(exported):
    data, programs = exported
    assert len(programs) <= 5
    posterior = {name: x.values[0] for name, x in data["posterior"].data_vars.items()}
    expected = log_likelihood(schools, posterior, SIGMA, Y)["y"]
    np.testing.assert_allclose(data["log_likelihood"]["y"][0], expected, rtol=1e-4)
    figures = data["sample_stats"]
    np.testing.assert_allclose(
        figures["log_weight"], figures["lp"] - figures["log_q"], rtol=1e-5, atol=1e-5
    )
    residual = (data["posterior_predictive"]["y"] - data["posterior"]["theta"]).values[0]
    np.testing.assert_allclose(residual.std(0), SIGMA, rtol=0.05)
    np.testing.assert_allclose(residual.mean(0), 0.0, atol=5 * 16 / 4000**0.5)
    prior = data["prior"]
    assert stats.kstest(prior["mu"].values[0], stats.norm(0, 5).cdf).pvalue > 1e-3
    assert stats.kstest(np.log(prior["tau"].values[0]), stats.norm().cdf).pvalue > 1e-3
    residual = (data["prior_predictive"]["y"] - prior["theta"]).values[0]
    np.testing.assert_allclose(residual.std(0), SIGMA, rtol=0.05)
    np.testing.assert_array_equal(data["observed_data"]["y"], Y)
    assert list(arviz.summary(data, var_names=["theta"], kind="stats").index)[1] == "theta[B]"


def test_entries_that_the_model_fills_are_missing_data():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("gap", 2):
            filled = numpyro.sample("filled", dist.Normal(mu, 1.0).mask(False))
        with numpyro.plate("row", len(y)):
            whole = y.at[jnp.array([1, 3])].set(filled)
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=whole)

    y = jnp.array([1.0, jnp.nan, 2.0, jnp.nan])
    guide, params = normal_guide(model, y)
    data = nf.to_arviz(guide, params, y, num_samples=20)
    np.testing.assert_array_equal(data["observed_data"]["y"], y)
    likelihood, posterior = data["log_likelihood"]["y"].values[0], data["posterior"]
    draws = np.column_stack([y[0] + np.zeros(20), posterior["filled"][0, :, 0]])
    expected = stats.norm.logpdf(draws, posterior["mu"].values[0][:, None])
    np.testing.assert_allclose(likelihood[:, :2], expected, rtol=1e-4, atol=1e-5)


N, SOME = 12, 3


def rows(x, size=SOME):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", N, subsample_size=size) as index:
        batch = x[index] if len(x) == N else x
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=batch)


@pytest.mark.parametrize("size", [pytest.param(N, marks=pytest.mark.slow), SOME])
def test_subsampled_rows_are_those_of_the_arguments(size):
    """All rows where the arguments have them; the same rows in each draw where they have some."""
    x = jnp.linspace(-1.0, 1.0, N)[:size]
    guide = AutoGuideList(rows)
    guide.append(AutoDiagonalNormal(handlers.block(rows, hide=["z"])))
    local = handlers.block(rows, expose=["z"])
    guide.append(nf.AmortizedFlow(local, lambda x: x[:, None], 1, prefix="local"))
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(x)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    data = nf.to_arviz(guide, params, x, num_samples=7)
    assert data["posterior"]["z"].shape == data["log_likelihood"]["x"].shape == (1, 7, size)
    assert data["posterior"]["z"].dims[-1] == data["observed_data"]["x"].dims[0] == "row"
    np.testing.assert_array_equal(data["observed_data"]["x"], x)
    z = data["posterior"]["z"].values
    expected = stats.norm.logpdf(x, z, 0.5)
    np.testing.assert_allclose(data["log_likelihood"]["x"], expected, rtol=1e-4, atol=1e-4)
    # The plate scales its rows: those of a batch stand for all.
    mu = data["posterior"]["mu"].values
    local = stats.norm.logpdf(z, mu[..., None], 1.0) + expected
    lp = stats.norm.logpdf(mu) + N / size * local.sum(-1)
    np.testing.assert_allclose(data["sample_stats"]["lp"], lp, rtol=1e-4)


@pytest.mark.parametrize("kind", [nf.AutoFlow, AutoDiagonalNormal])
def test_sites_that_the_guide_does_not_draw(kind):
    """A mixture whose component is summed out: of all rows, though each draw sees some."""

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", N, subsample_size=SOME) as index:
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(mu + 5 * z, 1.0), obs=y[index])

    y = jnp.linspace(-2.0, 6.0, N)
    options = {"init": "location"} if kind is nf.AutoFlow else {}
    guide = kind(handlers.block(model, hide=["z"]), **options)
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(y)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    data = nf.to_arviz(guide, params, y, num_samples=2000)
    assert group_names(data) == {
        *("posterior", "sample_stats", "posterior_predictive"),
        *("prior", "prior_predictive", "observed_data"),
    }
    mu = data["posterior"]["mu"].values
    parts = [np.log(p) + stats.norm.logpdf(y, mu[..., None] + s) for p, s in ((0.7, 0), (0.3, 5))]
    expected = stats.norm.logpdf(mu) + np.logaddexp(*parts).sum(-1)
    np.testing.assert_allclose(data["sample_stats"]["lp"], expected, rtol=1e-4)
    shift = (data["posterior_predictive"]["y"] - data["posterior"]["mu"]).values
    np.testing.assert_allclose(shift.mean(), 1.5, atol=0.1)


def test_an_improper_prior_has_no_draws_and_axes_get_names():
    def model(x):
        mu = numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (2,), ()))
        with numpyro.plate("outer", 2, dim=-2), numpyro.plate("inner", 3, dim=-1):
            numpyro.deterministic("both", jnp.zeros((2, 3)))
            numpyro.deterministic("outer_only", jnp.zeros((2, 1)))
            numpyro.deterministic("inner_only", jnp.zeros(3))
            numpyro.deterministic("neither", jnp.zeros(()))
        with numpyro.plate("column", 3, dim=-1):
            numpyro.sample("x", dist.Normal(jnp.zeros((2, 3)) + mu[:, None], 1.0), obs=x)

    x = jnp.zeros((2, 3))
    guide, params = normal_guide(model, x)
    data = nf.to_arviz(guide, params, x, num_samples=3, dims={"mu": ["side"], "x": ["side", None]})
    assert not {"prior", "prior_predictive"} & group_names(data)
    names = {name: dims[2:] for name, dims in dims_of(data, "posterior").items()}
    assert names == {
        "mu": ("side",),
        "both": ("outer", "inner"),
        "outer_only": ("outer", "outer_only_dim_1"),
        "inner_only": ("inner",),
        "neither": (),
    }
    assert data["observed_data"]["x"].dims == ("side", "column")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coords": {"school": ["A"]}}, r"expected 4 labels for 'school', a dimension of 'theta'"),
        ({"coords": {"pupil": NAMES}}, r"dimensions among \['school'\], got 'pupil'"),
        ({"dims": {"beta": ["school"]}}, r"dims: expected names among .*'theta'.*\['beta'\]"),
        ({"dims": {"theta": []}}, r"a list of 1 names for 'theta', one for each axis of \(4,\)"),
        ({"dims": {"theta": "s"}}, r"a list of 1 names for 'theta'.*got 's'"),
        ({"dims": {"theta": ["draw"]}}, r"'draw' of 'theta' has the name of another one or of a"),
        ({"dims": {"theta": ["y"]}}, r"'y' of 'theta' has the name of another one or of a site"),
        ({"constant_data": {"y": Y}}, r"constant_data: 'y' is a site"),
        (
            {"constant_data": {"s": Y[:2]}, "dims": {"s": ["school"]}},
            r"'school' has 4 entries in 'theta' and 2 in 's'",
        ),
        ({"num_samples": 0}, r"num_samples: expected at least 1"),
    ],
)
def test_bad_labels_are_named(options, message):
    def model(y):
        with numpyro.plate("school", 4):
            theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    guide, params = normal_guide(model, Y)
    with pytest.raises(ValueError, match=message):
        nf.to_arviz(guide, params, Y, **({"num_samples": 2} | options))
