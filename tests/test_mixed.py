"""Flows of mixed and discrete columns: exact masses, draws, training, models, refusals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from compiled import log_prob, new, sample, sample_and_log_prob
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from scipy import stats
from small import assert_same, shake

import numpyro_flows as nf

KEY = jax.random.key(0)
LEVELS = constraints.integer_interval(-1, 2)
DISCRETE = (LEVELS, constraints.boolean, constraints.integer_interval(5, 7))
SMALL = {"depth": 1, "hidden": (8,)}


def flow_on(*support, recipe=nf.nsf_ar, scale=1.5, **config):
    """A small flow, shaken so that its columns depend on each other."""
    made = new(recipe, len(support), support=support, **{**SMALL, **config})
    return shake(made, jax.random.key(1), scale)


def cells(*support):
    """All values of discrete columns with these supports, a row each."""
    ranges = [
        range(2) if part is constraints.boolean else range(part.lower_bound, part.upper_bound + 1)
        for part in support
    ]
    return np.array(list(itertools.product(*ranges)))


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)], indirect=True
)
def test_masses_of_all_cells_are_one_and_those_of_draws(dtype):
    flow = flow_on(*DISCRETE, context_dim=1).condition(jnp.array([0.4], dtype))
    table = cells(*DISCRETE)
    masses = np.exp(np.asarray(log_prob(flow, jnp.asarray(table)), float))
    assert log_prob(flow, table).dtype == dtype
    np.testing.assert_allclose(masses.sum(), 1, rtol=1e-6)
    assert masses.max() > 3 * masses.min()  # columns have not stayed uniform
    draws = np.asarray(sample(flow, KEY, (4000,)))
    assert draws.dtype == jnp.asarray(1).dtype
    counts = (draws[:, None] == table).all(-1).sum(0)
    assert counts.sum() == len(draws)
    assert stats.chisquare(counts, len(draws) * masses / masses.sum()).pvalue > 1e-3


@pytest.mark.parametrize("recipe", [nf.nsf_ar, pytest.param(nf.nsf, marks=pytest.mark.slow)])
def test_a_mixed_density_by_quadrature(recipe):
    """Positive and circular columns beside discrete ones, in any order."""
    support = (constraints.positive, LEVELS, constraints.circular, constraints.boolean)
    flow = flow_on(*support, recipe=recipe, scale=0.6)
    u, width = np.linspace(-10, 10, 300, endpoint=False, retstep=True)
    angle, step = np.linspace(-np.pi, np.pi, 150, endpoint=False, retstep=True)
    table = cells(LEVELS, constraints.boolean)
    grid = np.array([(np.exp(a), b) for a in u for b in angle])
    rows = np.concatenate([np.repeat(grid, len(table), 0), np.tile(table, (len(grid), 1))], axis=1)[
        :, [0, 2, 1, 3]
    ]
    density = np.exp(np.asarray(log_prob(flow, jnp.asarray(rows)), float)) * rows[:, 0]
    masses = density.reshape(len(grid), len(table)).sum(0) * width * step
    np.testing.assert_allclose(masses.sum(), 1, rtol=2e-3)
    x, own = sample_and_log_prob(flow, KEY, (4000,))
    counts = (np.asarray(x)[:, None, [1, 3]] == table).all(-1).sum(0)
    assert stats.chisquare(counts, len(x) * masses / masses.sum()).pvalue > 1e-3
    np.testing.assert_allclose(log_prob(flow, x), own, rtol=1e-3, atol=1e-3)
    below = (np.asarray(x)[:, 0] < 1).mean()  # the median of a column, by the same quadrature
    inside = density.reshape(len(u), -1)[u < 0].sum() * width * step
    assert abs(below - inside) < 4 / len(x) ** 0.5


def test_a_conditional_of_one_column_is_bayes_rule():
    flow = flow_on(*DISCRETE)
    table = cells(*DISCRETE)
    joint = np.exp(np.asarray(log_prob(flow, table), float)).reshape(4, 2, 3)
    found = np.exp(flow.conditional_log_masses(jnp.array([[9, 1, 6], [9, 0, 7]]), 0))
    expected = joint[:, [1, 0], [1, 2]].T
    np.testing.assert_allclose(found, expected / expected.sum(-1, keepdims=True), rtol=1e-4)


def rows_of(n, seed):
    """A rare level, a constant column, and a real one whose mean and scale depend on the others."""
    rng = np.random.default_rng(seed)
    first = rng.choice(3, n, p=[0.6, 0.385, 0.015])
    second = rng.random(n) < np.array([0.2, 0.7, 0.5])[first]
    loc, scale = 1000 * np.array([5.0, -3.0, 0.0])[first], 1000 * np.where(second, 2.0, 0.5)
    real = rng.normal(loc, scale)
    log_mass = np.log(np.array([0.6, 0.385, 0.015])[first])
    log_mass += np.log(np.where(second, *(lambda p: (p, 1 - p))(np.array([0.2, 0.7, 0.5])[first])))
    return (
        np.stack([first, real, second, np.zeros(n)], axis=1),
        log_mass + stats.norm(loc, scale).logpdf(real),
    )


def test_fit_finds_the_joint_distribution(tmp_path, recwarn):
    support = (
        constraints.integer_interval(0, 2),
        constraints.real,
        constraints.boolean,
        constraints.integer_interval(0, 3),
    )
    flow = new(nf.nsf_ar, 4, support=support, hidden=(32,), depth=1)
    x, _ = rows_of(4000, 0)
    fitted = nf.fit(KEY, flow, x, learning_rate=1e-2, max_epochs=40, progress_bar=False)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    held_out, truth = rows_of(4000, 1)
    assert truth.mean() - log_prob(fitted.flow, jnp.asarray(held_out)).mean() < 0.04
    assert type(fitted.flow) is type(flow)
    nf.save(tmp_path / "mixed", fitted.flow)
    assert_same(nf.load(tmp_path / "mixed"), fitted.flow)


@pytest.mark.slow
def test_integers_are_fitted_as_they_are():
    x = cells(*DISCRETE).astype(np.int8)[[0, 0, 0, 5, 23]].repeat(200, 0)
    flow = new(nf.nsf_ar, 3, support=DISCRETE, **SMALL)
    fitted = nf.fit(KEY, flow, x, learning_rate=3e-2, max_epochs=40, progress_bar=False)
    assert fitted.val_losses[-1] < 1.2  # the entropy is 0.95, that of the new flow log(24)
    assert (sample(fitted.flow, KEY, (200,)) == jnp.asarray(x[0])).all(-1).mean() > 0.45


@pytest.mark.slow
def test_a_model_with_observed_rows_and_a_missing_entry():
    """A latent context and an entry that is missing, beside quadrature over both."""
    flow = flow_on(constraints.real, LEVELS, constraints.boolean, context_dim=1, scale=0.3)
    x = jnp.array([[0.3, 2, 1], [-1.0, 0, 0], [0.0, 1, 1]])

    def model():
        a = numpyro.sample("a", dist.Normal(0, 1))
        missing = numpyro.sample("missing", dist.Normal(0, 1).mask(False))
        rows = x.at[2, 0].set(missing)
        with numpyro.plate("rows", 3):
            numpyro.sample("x", flow.condition(a[None]), obs=rows)

    mcmc = MCMC(NUTS(model), num_warmup=500, num_samples=3000, progress_bar=False)
    mcmc.run(KEY)
    axis = np.linspace(-5, 5, 101)

    @jax.jit
    @jax.vmap
    def joint(a, missing):
        at = flow.condition(a[None]).log_prob(x.at[2, 0].set(missing)).sum()
        return at - a**2 / 2

    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis, indexing="ij")).reshape(2, -1))
    weights = np.exp(np.asarray(joint(*grid), float))
    weights /= weights.sum()
    for name, values in zip(("a", "missing"), np.asarray(grid), strict=True):
        mean = weights @ values
        sd = (weights @ (values - mean) ** 2) ** 0.5
        draws = mcmc.get_samples()[name]
        assert abs(draws.mean() - mean) < 0.2 * sd
        assert 0.8 < draws.std() / sd < 1.25


def test_outside_of_the_levels_there_is_no_mass():
    flow = flow_on(constraints.real, LEVELS, constraints.boolean)
    with numpyro.validation_enabled(False):
        outside = jnp.array([[0.0, -2, 0], [0.0, 3, 0], [0.0, 0, 2], [0.0, 0, -1]])
        assert (log_prob(flow, outside) == -jnp.inf).all()
        gradient = jax.grad(lambda x: flow.log_prob(x).sum())(jnp.array([[0.0, 2, 1]]))
    assert jnp.isfinite(gradient).all()
    assert (gradient[:, 1:] == 0).all()


def build(support, **config):
    return lambda: nf.nsf_ar(KEY, len(support), support=support, **config)


MIXED = (constraints.real, constraints.boolean)

REFUSED = {
    "more levels than masses": (
        build((constraints.integer_interval(0, 256),)),
        "1 to 256 levels of a discrete coordinate, got 257 of coordinate 0. `nf.dequantize",
    ),
    "no levels": (build((constraints.integer_interval(3, 2),)), "1 to 256 levels .*, got 0"),
    "far from 0": (build((constraints.integer_interval(10**7, 10**7),)), "Subtract its lowest"),
    "counts without a bound": (
        build((constraints.real, constraints.nonnegative_integer)),
        "integer_interval.lowest, highest.* Counts without a bound need one",
    ),
    "a base": (build(MIXED, base=dist.Normal()), "base: expected the default .* got Normal"),
    "a graph": (build(MIXED, parents=((), (0,))), "parents: expected the complete order"),
    "a recipe without": (
        lambda: nf.planar(KEY, 2, support=MIXED),
        "support: expected .* got discrete coordinates, .* `nf.nsf_ar`",
    ),
    "not a discrete column": (
        lambda: flow_on(*MIXED).conditional_log_masses(jnp.zeros(2), 0),
        r"column: expected one of the discrete columns \[1\], got 0",
    ),
    "rows beyond the levels": (
        lambda: nf.fit(KEY, flow_on(*MIXED), jnp.array([[0.1, 0], [0.2, 2], [0.3, 1]])),
        r"1 of 3 rows \(row 1\) lie outside the flow's support",
    ),
    "rows between the levels": (
        lambda: nf.fit(KEY, flow_on(*MIXED), jnp.array([[0.1, 0], [0.2, 0.5], [0.3, 1]])),
        r"1 of 3 rows \(row 1\) lie outside the flow's support",
    ),
    "sizes that do not fit": (
        lambda: nf.transforms.Mixed((True, False), *masses_of_one()),
        "Mixed: expected masses of 1 coordinates and a transform of 1 others",
    ),
}


def masses_of_one():
    inner = flow_on(*MIXED).transform.parts[0]
    return inner.cells, inner.masses


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
