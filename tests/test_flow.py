"""``FlowDistribution`` beside its density: what copies keep, subclasses, moments, ``repr``."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from compiled import log_prob, new
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from small import flow, points, transform

import numpyro_flows as nf

KEY = jax.random.key(0)
SMALL = {"depth": 2, "hidden": (4,)}
POSITIVE = {"support": dist.constraints.positive, **SMALL}


class Counted(nf.FlowDistribution):
    """A flow with an attribute of its own."""

    pytree_aux_fields = ("label",)

    def __init__(self, base_dist, transform, label="mine"):
        super().__init__(base_dist, transform)
        self.label = label


class Shifted(Counted):
    """One that draws and evaluates in its own way: everything moved by 1."""

    def sample_with_intermediates(self, key, sample_shape=()):
        x, intermediates = super().sample_with_intermediates(key, sample_shape)
        return x + 1, intermediates

    def sample(self, key, sample_shape=()):
        return self.sample_with_intermediates(key, sample_shape)[0]

    def log_prob(self, value, intermediates=None):
        return super().log_prob(value - 1, intermediates)


def of_class(cls, plain):
    return cls(plain.base_dist, plain.transform)


@pytest.mark.parametrize("validate_args", [False, True])
def test_copies_keep_validate_args(validate_args):
    plain = flow(nf.realnvp, 2, context_dim=2, **POSITIVE)
    mine = nf.FlowDistribution(plain.base_dist, plain.transform, validate_args=validate_args)
    bound = mine.condition(jnp.ones((3, 2)))
    copies = {
        "condition": bound,
        "expand": bound.expand((5, 3)),
        "embed": mine.embed(nf.nn.Embedding(KEY, jnp.zeros(1), 2)).condition(jnp.ones((3, 1))),
        "initialize": nf.initialize(mine, jnp.ones((4, 2)), jnp.ones(2)).condition(jnp.ones(2)),
    }
    outside = -jnp.ones(2)
    for copy in copies.values():
        if validate_args:
            with pytest.warns(UserWarning, match="Out-of-support"):
                copy.log_prob(outside)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                log_prob(copy, outside)


def test_an_augmented_flow_passes_validate_args_on():
    made = new(nf.augmented_cnf, 2, hidden=(4,))
    joint, encoder = (
        nf.FlowDistribution(made.base_dist, made.transform),
        nf.FlowDistribution(made.encoder_base, made.encoder_transform),
    )
    for validate_args in (False, True):
        augmented = nf.AugmentedFlow(KEY, joint, encoder, validate_args=validate_args)
        parts = (augmented.joint, augmented.encode(jnp.zeros(2)), augmented.expand((3,)).joint)
        assert [part._validate_args for part in parts] == [validate_args] * 3


def test_a_subclass_stays_one():
    mine = Counted(*_parts(flow(nf.realnvp, 2, context_dim=2, **SMALL)), label="first")
    for copy in (mine.condition(jnp.ones((3, 2))), mine.condition(jnp.ones(2)).expand((3,))):
        assert type(copy) is Counted
        assert copy.label == "first"
        assert copy.batch_shape == (3,)
        assert log_prob(copy, points(2)[:3]).shape == (3,)


def test_what_rebuilds_a_flow_keeps_its_class_and_validate_args():
    """The fit, ``equalize`` and the modules: none of them knows the subclasses that users write."""
    plain = flow(nf.realnvp, 2, **SMALL)
    mine = Counted(*_parts(plain), label="first").with_parts()
    mine._validate_args = True
    x = np.random.default_rng(0).normal(size=(64, 2))
    with handlers.seed(rng_seed=0):
        rebuilt = {
            "fit": nf.fit(KEY, mine, x, max_epochs=1, progress_bar=False).flow,
            "equalize": nf.equalize(mine, np.zeros((4, 2), int), 4),
            "flow_module": nf.flow_module("a", mine),
            "flow_module, base": nf.flow_module("b", mine, train_base=True),
            "random_flow_module": nf.random_flow_module("c", mine, dist.Normal(0.0, 0.1)),
        }
    found = {name: (type(f), f.label, f._validate_args) for name, f in rebuilt.items()}
    assert found == dict.fromkeys(rebuilt, (Counted, "first", True))


def _parts(plain):
    return plain.base_dist, plain.transform


@pytest.mark.parametrize("cls", [nf.FlowDistribution, Counted, Shifted])
@pytest.mark.parametrize("num_particles", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_every_flow_has_the_path_gradient(cls, num_particles):
    """Where the guide is the posterior it is zero for every draw; the plain gradient is not."""
    plain = flow(nf.realnvp, 2, **SMALL)
    target = of_class(cls, plain)

    def model():
        numpyro.sample("x", target)

    def guide():
        t = numpyro.param("t", plain.transform)
        numpyro.sample("x", cls(plain.base_dist, t))

    def largest_gradient(elbo):
        def loss(t):
            return elbo.loss(KEY, {"t": t}, model, guide)

        value, gradient = jax.jit(jax.value_and_grad(loss))(plain.transform)
        assert value == pytest.approx(0.0, abs=1e-4)
        return max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient))

    assert largest_gradient(nf.STL_ELBO(num_particles)) < 1e-4
    assert largest_gradient(Trace_ELBO(num_particles)) > 1e-2


@pytest.mark.parametrize("build", [nf.realnvp, nf.augmented_cnf])
def test_what_has_no_formula_names_the_draws_that_serve(build):
    made = build(KEY, 2)
    calls = {
        "sample(key, (n,)).mean(0)": lambda: made.mean,
        "sample(key, (n,)).var(0)": lambda: made.variance,
        "<= value).all(-1).mean(0)": lambda: made.cdf(jnp.zeros(2)),
        "jnp.quantile(flow.sample(key, (n,)), q, axis=0)": lambda: made.icdf(0.5),
        "-flow.log_prob(flow.sample(key, (n,))).mean(0)": made.entropy,
        "Draw some: `flow.sample(key, (n,))`": made.enumerate_support,
    }
    for text, call in calls.items():
        with pytest.raises(NotImplementedError) as error:
            call()
        assert text in str(error.value)
        assert type(made).__name__ in str(error.value)


def test_the_calls_that_serve_do():
    """Those of the messages, for a flow whose moments are known."""
    affine = nf.transforms.FixedAffine(jnp.array([1.0, -2.0]), jnp.array([2.0, 0.5]))
    made = nf.FlowDistribution(dist.Normal(jnp.zeros(2), 1.0), affine)
    names = {
        "flow": made,
        "key": KEY,
        "n": 40_000,
        "jnp": jnp,
        "q": 0.5,
        "value": made.transform.loc.value,
    }
    expected = {
        "mean": ([1.0, -2.0], lambda: made.mean),
        "variance": ([4.0, 0.25], lambda: made.variance),
        "cdf": (0.25, lambda: made.cdf(0)),
        "icdf": ([1.0, -2.0], lambda: made.icdf(0.5)),
        "entropy": (np.log(2 * np.pi * np.e), made.entropy),
    }
    for value, call in expected.values():
        with pytest.raises(NotImplementedError) as error:
            call()
        estimate = eval(str(error.value).split("`")[1], names)
        np.testing.assert_allclose(estimate, value, atol=0.05)


def test_repr_says_sizes_parameters_and_state():
    made = new(nf.nsf, 3, context_dim=2, support=dist.constraints.positive, **SMALL)
    params, _ = nf.partition(made)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    layers = "2 x Coupling(RationalQuadraticSpline) -> NumPyroTransform(ExpTransform)"
    assert repr(made) == (
        f"FlowDistribution(Normal -> {layers}, batch_shape=(), event_shape=(3,), context_dim=2, "
        f"parameters={size})"
    )
    bound = made.condition(jnp.ones((7, 2)))
    assert repr(bound) == (
        f"FlowDistribution(Normal -> Conditioned({layers}), batch_shape=(7,), event_shape=(3,), "
        f"parameters={size})"
    )
    inner = made.transform.parts[0]
    count = f"context_dim=2, parameters={size}"
    assert repr(inner) == (
        f"Scan(2 x Coupling(RationalQuadraticSpline), event_shape=(3,), {count})"
    )
    assert repr(inner.layers) == f"Coupling(RationalQuadraticSpline, event_shape=(3,), {count})"
    assert repr(inner.inv) == (
        f"Inverse(2 x Coupling(RationalQuadraticSpline), event_shape=(3,), {count})"
    )
    simplex = nf.transforms.NumPyroTransform(dist.biject_to(dist.constraints.simplex), (3,))
    assert repr(simplex) == (
        "NumPyroTransform(StickBreakingTransform, event_shape=(3,), out_shape=(4,), parameters=0)"
    )
    estimate = new(nf.cnf, 2, trace="hutchinson")
    assert "log_prob=estimate" in repr(estimate)
    assert "log_det=estimate" in repr(estimate.transform)
    assert repr(of_class(Counted, flow(nf.realnvp, 2, **SMALL))).startswith("Counted(Normal -> 2 x")


def test_repr_survives_what_jax_puts_into_trees():
    made = flow(nf.realnvp, 2, **SMALL)
    for leaf in (None, "a name", jax.ShapeDtypeStruct((2,), "float32")):
        hollow = jax.tree.map(lambda _, leaf=leaf: leaf, made)
        assert "Coupling" in repr(hollow.transform)
    jax.jit(lambda t: repr(t) and t)(transform(nf.realnvp, 2, **SMALL))
    with handlers.seed(rng_seed=0):
        assert "parameters=" in repr(jax.vmap(lambda k: nf.realnvp(k, 2))(jax.random.split(KEY, 3)))
