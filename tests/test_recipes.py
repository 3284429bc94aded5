"""The recipes, NICE and RealNVP above all, and the distributions that they return."""

import inspect
from functools import partial

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cases import BASES
from compiled import forward, inverse, log_prob, new, sample, sample_and_log_prob, there_and_back
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpyro.distributions import constraints
from small import flow, points

import numpyro_flows as nf
from numpyro_flows.recipes._building import permutations

RECIPES = {"nice": nf.nice, "realnvp": nf.realnvp}
SMALL = {"depth": 3, "hidden": (8,)}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_new_flow_is_the_identity(name, dim):
    new = RECIPES[name](jax.random.key(0), dim, **SMALL)
    y, log_det = forward(new.transform, points(dim))
    np.testing.assert_array_equal(y, points(dim))
    np.testing.assert_array_equal(log_det, 0)


@pytest.mark.parametrize("permutation", ["random", "reverse", "swap"])
def test_permutations(permutation):
    """Together the identity, the same for every key, and two layers move every coordinate."""
    for dim, depth in ((1, 1), (2, 5), (3, 2), (8, 8)):
        total = np.arange(dim)
        for p in permutations(permutation, dim, depth, seed=0):
            total = total[p]
        np.testing.assert_array_equal(total, np.arange(dim))
    x = points(3)
    make = jax.jit(lambda key: nf.realnvp(key, 3, depth=2, permutation=permutation).transform)
    first, second = map(make, jax.random.split(jax.random.key(0)))
    assert first.permutations == second.permutations
    biased = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) + 1), first)
    assert (np.abs(forward(biased, x)[0] - x) > 1e-3).all()
    assert permutations("random", 8, 4, seed=0) != permutations("random", 8, 4, seed=1)


def test_nice_preserves_volume_exactly(dtype):
    t = flow(nf.nice, 5, rescale=False, depth=6).transform
    y, log_det = forward(t, points(5))
    assert (np.asarray(y) != np.asarray(points(5))).any()
    np.testing.assert_array_equal(log_det, 0.0)
    np.testing.assert_array_equal(inverse(t, y)[1], 0.0)
    rescaled = flow(nf.nice, 5, depth=6).transform
    assert isinstance(rescaled.parts[-1], nf.transforms.DiagonalScale)
    np.testing.assert_allclose(
        forward(rescaled, points(5))[1], rescaled.parts[-1].log_scale.sum(), rtol=1e-6
    )


def test_log_scale_bound_tightens_with_depth():
    def bound(**config):
        made = jax.eval_shape(lambda key: nf.realnvp(key, 2, **config), jax.random.key(0))
        return made.transform.layers.map.log_scale_bound

    assert bound(depth=5) == bound(depth=8) == 2.0
    assert bound(depth=16) == 1.0
    assert bound(depth=32) == 0.5
    assert bound(depth=32, log_scale_bound=3.0) == 3.0
    # One layer multiplies a coordinate by at most e^bound, whatever its network returns.
    wild = flow(nf.realnvp, 2, depth=1, log_scale_bound=0.7)
    wild = jax.tree.map(lambda leaf: leaf * 100, wild.transform)
    _, log_det = forward(wild, 100 * points(2))
    assert np.abs(log_det).max() <= 0.7 + 1e-6


def test_a_deep_float32_flow_keeps_its_inverse():
    """32 layers at D = 64 with random weights: the default bound keeps what large scales lose."""
    x = points(64, 256)

    def round_trip(bound):
        untrained = new(nf.realnvp, 64, depth=32, log_scale_bound=bound).transform
        last = lambda t: t.layers.conditioner.weights[-1]  # noqa: E731
        random = 0.2 / 8 * jax.random.normal(jax.random.key(1), last(untrained).shape)
        _, log_det, again, _ = there_and_back(eqx.tree_at(last, untrained, random), x)
        assert bound or np.abs(log_det).mean() > 5  # far from the identity
        return np.abs(again - x).max()

    assert round_trip(None) < 1e-3
    assert not round_trip(50.0) < 1.0


def test_one_thousand_dimensions():
    f = flow(nf.realnvp, 1000, depth=4, hidden=(32,))
    x, own = sample_and_log_prob(f, jax.random.key(0), (8,))
    assert x.shape == (8, 1000)
    np.testing.assert_allclose(log_prob(f, x), own, rtol=1e-4)


@pytest.mark.parametrize(
    ("support", "edges"),
    [
        (constraints.positive, np.geomspace(1e-6, 1e6, 20_001)),
        (constraints.interval(-1, 3), np.linspace(-1, 3, 20_001)),
        (constraints.unit_interval, np.linspace(0, 1, 20_001)),
    ],
    ids=["positive", "interval", "unit_interval"],
)
def test_densities_on_a_support_integrate_to_one(support, edges):
    f = flow(nf.realnvp, 1, support=support)
    middle = (edges[1:] + edges[:-1]) / 2
    density = np.exp(np.asarray(log_prob(f, jnp.asarray(middle)[:, None]), float))
    mass = (density * np.diff(edges)).sum()
    assert abs(mass - 1) < 2e-3
    x = sample(f, jax.random.key(0), (100,))
    assert f.support(x).all()
    assert f.event_shape == (1,)


def test_supports_match_numpyros_own_composition():
    """One pass, and the same number as NumPyro's transforms one after the other."""
    plain = flow(nf.realnvp, 3)
    for support in (constraints.positive, constraints.simplex, constraints.corr_cholesky):
        constrained = flow(nf.realnvp, 3, support=support)
        to_support = dist.biject_to(support)
        if to_support.domain.event_dim == 0:
            to_support = dist.transforms.IndependentTransform(to_support, 1)
        stock = dist.TransformedDistribution(plain.base_dist, [plain.transform, to_support])
        x = sample(stock, jax.random.key(0), (4,))
        assert constrained.event_shape == stock.event_shape
        np.testing.assert_allclose(
            log_prob(constrained, x), log_prob(stock, x), rtol=1e-4, atol=1e-4
        )
        assert constrained.support(x).all()


@pytest.mark.slow
def test_a_constrained_flow_is_a_prior_numpyro_understands():
    f = flow(nf.realnvp, 2, support=constraints.positive, activation="tanh")

    def model():
        numpyro.sample("x", f)

    mcmc = numpyro.infer.MCMC(
        numpyro.infer.NUTS(model), num_warmup=500, num_samples=5000, progress_bar=False
    )
    mcmc.run(jax.random.key(0))
    draws = np.log(mcmc.get_samples()["x"])
    truth = np.log(sample(f, jax.random.key(1), (20_000,)))
    np.testing.assert_allclose(draws.mean(0), truth.mean(0), atol=0.15)
    np.testing.assert_allclose(draws.std(0), truth.std(0), rtol=0.15)


def test_log_prob_outside_the_support_is_minus_infinity():
    f = flow(nf.realnvp, 2, support=constraints.positive)
    with pytest.warns(UserWarning, match="Out-of-support"):
        values = f.log_prob(jnp.array([[1.0, 1.0], [1.0, -1.0]]))
    assert np.isfinite(values[0])
    assert values[1] == -np.inf


@pytest.mark.parametrize("name", BASES)
def test_bases(name):
    base = BASES[name]()
    f = new(nf.realnvp, 3, base=base, **SMALL)
    x = points(3)
    expected = dist.Independent(base.expand((3,)), 1).log_prob(x)
    np.testing.assert_allclose(log_prob(f, x), expected, rtol=1e-5)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(f))
    assert jax.tree.leaves(jax.jit(jax.grad(lambda f: f.log_prob(x).sum()))(f))


def test_joint_base():
    scale_tril = jnp.array([[1.0, 0.0], [0.5, 2.0]])
    base = dist.MultivariateNormal(jnp.ones(2), scale_tril=scale_tril)
    f = new(nf.realnvp, 2, base=base, **SMALL)
    np.testing.assert_allclose(log_prob(f, points(2)), log_prob(base, points(2)), rtol=1e-5)
    transformed = dist.TransformedDistribution(
        dist.Normal(jnp.zeros(2), 1.0), dist.transforms.AffineTransform(1.0, 2.0)
    )
    f = new(nf.realnvp, 2, base=transformed, **SMALL)
    expected = dist.Normal(1.0, 2.0).log_prob(points(2)).sum(-1)
    np.testing.assert_allclose(log_prob(f, points(2)), expected, rtol=1e-5)


def test_a_flow_can_be_the_base_of_a_flow():
    inner, outer = flow(nf.realnvp, 2), flow(nf.realnvp, 2, depth=2).transform
    nested = nf.FlowDistribution(inner, outer)
    z, log_det = inverse(outer, points(2))
    np.testing.assert_allclose(log_prob(nested, points(2)), log_prob(inner, z) + log_det, rtol=1e-5)


def test_shapes_of_a_conditional_flow():
    f = flow(nf.realnvp, 2, context_dim=3)
    assert f.context_dim == 3
    assert "context_dim=3" in repr(f)
    given = f.condition(jnp.ones((4, 3)))
    assert (given.batch_shape, given.event_shape) == ((4,), (2,))
    assert sample(given, jax.random.key(0), (5,)).shape == (5, 4, 2)
    assert log_prob(given, points(2, 4)).shape == (4,)
    assert log_prob(given, points(2, 1)).shape == (4,)
    assert f.condition(jnp.ones(3)).batch_shape == ()
    assert log_prob(f.condition(jnp.ones((7, 4, 3))), points(2, 4)).shape == (7, 4)
    # One context for many rows is the same as repeating it.
    np.testing.assert_allclose(
        log_prob(f.condition(jnp.ones(3)), points(2)),
        log_prob(f.condition(jnp.ones((6, 3))), points(2)),
        rtol=1e-5,
    )
    to_event = given.to_event(1)
    assert to_event.event_shape == (4, 2)
    np.testing.assert_allclose(
        log_prob(to_event, points(2, 4)), log_prob(given, points(2, 4)).sum(), rtol=1e-5
    )


def test_empty_batches():
    f = flow(nf.realnvp, 2)
    assert sample(f, jax.random.key(0), (0,)).shape == (0, 2)
    # NumPyro's own `Independent.log_prob` fails on an empty batch, so the transform is asked.
    assert inverse(f.transform, jnp.zeros((3, 0, 2)))[1].shape == (3, 0)


def test_expand_and_sample_and_log_prob():
    f = flow(nf.realnvp, 2)
    wide = f.expand((3,)).expand((4, 3))
    assert isinstance(wide, nf.FlowDistribution)
    x, own = sample_and_log_prob(wide, jax.random.key(0), (2,))
    assert (x.shape, own.shape) == ((2, 4, 3, 2), (2, 4, 3))
    np.testing.assert_allclose(log_prob(f, x), own, rtol=1e-4, atol=1e-5)
    assert len(np.unique(x)) == x.size
    given = flow(nf.realnvp, 2, context_dim=1).condition(points(1, 3)).expand((5, 3))
    assert sample(given, jax.random.key(0)).shape == (5, 3, 2)


def test_recipes_under_jit_and_legacy_keys():
    def build(key):
        return nf.realnvp(key, 3, **SMALL)

    eager, jitted = build(jax.random.key(0)), jax.jit(build)(jax.random.key(0))
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    np.testing.assert_allclose(
        eager.transform.layers.conditioner.weights[0],
        jitted.transform.layers.conditioner.weights[0],
        rtol=1e-6,
    )
    legacy = build(jax.random.PRNGKey(0))
    assert sample(legacy, jax.random.PRNGKey(1)).shape == (3,)


def test_importing_changes_no_global_state():
    assert not jax.config.jax_enable_x64
    assert jax.config.jax_default_prng_impl == "threefry2x32"


BUILD = partial(nf.realnvp, jax.random.key(0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nf.realnvp(0, 2), TypeError, r"got 0: write `jax.random.key\(0\)`"),
        (lambda: nf.nice(None, 2), TypeError, "numpyro.handlers.seed"),
        (lambda: nf.realnvp(jax.random.split(jax.random.key(0)), 2), TypeError, r"shape \(2,\)"),
        (lambda: BUILD(0), ValueError, "dim: expected at least 1, got 0"),
        (lambda: BUILD(-3), ValueError, "dim: expected at least 1, got -3"),
        (lambda: BUILD(2.0), TypeError, r"dim: expected an int, got 2.0 \(float\)"),
        (lambda: BUILD(2, depth=0), ValueError, "depth: expected at least 1, got 0"),
        (lambda: BUILD(2, depth=True), TypeError, "depth: expected an int"),
        (lambda: BUILD(2, hidden=(8, -1)), ValueError, "hidden: expected positive"),
        (lambda: BUILD(2, context_dim=-1), ValueError, "context_dim: expected at least 0"),
        (lambda: BUILD(2, activation="sine"), ValueError, "Unknown activation 'sine'"),
        (
            lambda: BUILD(2, permutation="shuffle"),
            ValueError,
            r"one of \['random', 'reverse', 'swap'\]",
        ),
        (
            lambda: BUILD(2, log_scale_bound=-1.0),
            ValueError,
            "log_scale_bound: expected a positive",
        ),
        (
            lambda: BUILD(2, support=jnp.ones(2)),
            TypeError,
            "support: expected a NumPyro constraint",
        ),
        (
            lambda: BUILD(2, base=jnp.ones(2)),
            TypeError,
            "base_dist: expected a NumPyro distribution",
        ),
        (
            lambda: BUILD(2, base=dist.Normal(jnp.zeros(3), 1)),
            ValueError,
            r"expected shape \(\*batch, 2\), got \(3,\)",
        ),
        (
            lambda: BUILD(2, base=dist.Poisson(jnp.ones(2))),
            ValueError,
            "expected a continuous distribution",
        ),
        (
            lambda: BUILD(2, base=dist.Normal(jnp.zeros((3, 2)), 1).to_event(2)),
            ValueError,
            "more axes",
        ),
        (
            lambda: BUILD(2).log_prob(jnp.ones(3)),
            ValueError,
            r"expected shape \(\*batch, 2\), got \(3,\)",
        ),
        (lambda: BUILD(2).log_prob(np.ones((4, 2), int)), TypeError, "dtype int"),
        (lambda: BUILD(2).sample(7), TypeError, r"write `jax.random.key\(7\)`"),
        (lambda: BUILD(2).condition(jnp.ones(1)), ValueError, "takes no context"),
        (
            lambda: BUILD(2, context_dim=1).sample(jax.random.key(0)),
            ValueError,
            r"call flow.condition\(context\)",
        ),
        (
            lambda: BUILD(2, context_dim=1).log_prob(jnp.ones(2)),
            ValueError,
            r"call flow.condition\(context\)",
        ),
        (
            lambda: BUILD(2, context_dim=1).condition(jnp.ones(4)),
            ValueError,
            r"a last axis: context\[..., None\]",
        ),
        (
            lambda: BUILD(2, context_dim=1).condition(jnp.ones(1, int)),
            TypeError,
            "context: expected floating",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Each example compiles anew, so there are few, and no search for the smallest failing one.
@given(
    dim=st.integers(1, 7),
    depth=st.integers(1, 5),
    context_dim=st.integers(0, 2),
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    recipe=st.sampled_from(
        ["nice", "realnvp", "nsf", "maf", "iaf", "nsf_ar", "planar", "radial", "sylvester", "bnaf"]
    ),
    permutation=st.sampled_from(["random", "reverse", "swap"]),
    seed=st.integers(0, 100),
)
def any_shape_round_trips(dim, depth, context_dim, batch, recipe, permutation, seed):
    config = {"depth": depth, "hidden": (5,)}
    if "permutation" in inspect.signature(getattr(nf, recipe)).parameters:
        config["permutation"] = permutation
    if recipe == "bnaf":
        config["hidden_factors"] = (3,)

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 4)
        f = getattr(nf, recipe)(keys[0], dim, context_dim=context_dim, **config)
        params, rest = nf.partition(f)
        values, restore = jax.flatten_util.ravel_pytree(params)
        f = nf.combine(restore(values + 0.1 * jax.random.normal(keys[1], values.shape)), rest)
        if context_dim:
            f = f.condition(jax.random.normal(keys[2], (*batch, context_dim)))
        f = f.expand(batch)
        x, log_prob = f.sample_and_log_prob(keys[3], (2,))
        return x, log_prob, f.log_prob(x)

    x, log_prob, again = run(jax.random.key(seed))
    assert x.shape == (2, *batch, dim)
    assert log_prob.shape == (2, *batch)
    np.testing.assert_allclose(again, log_prob, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_any_shape_round_trips():
    """Each shape is a program of its own."""
    phases = [Phase.explicit, Phase.generate]
    settings(max_examples=25, deadline=None, derandomize=True, phases=phases)(
        any_shape_round_trips
    )()
