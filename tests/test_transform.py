"""One object, three protocols: Equinox module, NumPyro transform, plain JAX data."""

import functools
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import numpyro.distributions.transforms as numpyro_transforms
import optax
import pytest
from compiled import forward, log_prob, sample
from numpyro import handlers
from numpyro.contrib.module import eqx_module, random_eqx_module
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from programs import count_loops
from small import flow, points, transform

import numpyro_flows as nf
from numpyro_flows.infer.guide_flow import check_exact
from numpyro_flows.parts import for_training

LINEAR = transform(nf.realnvp, 2, depth=2, hidden=(4,))


def test_numpyro_still_only_registers_subclasses():
    """FlowTransform keeps NumPyro's ``__init_subclass__`` out, so it must do nothing else."""
    registered = []
    original = numpyro_transforms.register_pytree_node
    numpyro_transforms.register_pytree_node = lambda *args: registered.append(args)
    try:

        class Probe(numpyro_transforms.Transform):
            pass
    finally:
        numpyro_transforms.register_pytree_node = original
    added = set(vars(Probe)) - {"__module__", "__doc__", "__parameters__", "__qualname__"}
    added -= {"__firstlineno__", "__static_attributes__"}
    assert registered == [(Probe, Probe.tree_flatten, Probe.tree_unflatten)], (
        "NumPyro's Transform.__init_subclass__ does more than register a pytree; "
        "numpyro_flows.transform._Contract skips it and must now do that too."
    )
    assert not added, (
        f"NumPyro's Transform.__init_subclass__ adds {added}; numpyro_flows.transform._Contract "
        "skips it and must now add them too."
    )


class Doubled(nf.FlowTransform):
    """y = 2 x."""

    @property
    def event_shape(self):
        return (2,)

    def _forward_and_log_det(self, x, context=None):
        return 2 * x, jnp.full(x.shape[:-1], 2 * np.log(2.0))

    def _inverse_and_log_det(self, y, context=None):
        return y / 2, jnp.full(y.shape[:-1], -2 * np.log(2.0))


@pytest.mark.parametrize("decorator", [eqx.filter_jit, jax.jit], ids=["filter_jit", "jit"])
def test_decorators_of_methods_are_kept(decorator):
    traces = []

    class Decorated(Doubled):
        @decorator
        def _forward_and_log_det(self, x, context=None):
            traces.append(x)
            return Doubled._forward_and_log_det(self, x, context)

    for _ in range(3):
        assert Decorated()(jnp.ones(2)).tolist() == [2.0, 2.0]
    assert len(traces) == 1


def test_a_wrapping_decorator_is_called():
    calls = []

    def counted(method):
        @functools.wraps(method)
        def wrapper(*args):
            calls.append(args)
            return method(*args)

        return wrapper

    class Counted(Doubled):
        @counted
        def _inverse_and_log_det(self, y, context=None):
            return Doubled._inverse_and_log_det(self, y, context)

    Counted().inv(jnp.ones(2))
    assert len(calls) == 1


class Seen:
    def __init_subclass__(cls, tag="", **kwargs):
        super().__init_subclass__(**kwargs)
        cls.tag = tag


def test_hooks_of_other_bases_are_called():
    class First(Seen, Doubled, tag="first"):
        pass

    class Last(Doubled, Seen, tag="last"):
        pass

    assert (First.tag, Last.tag) == ("first", "last")
    assert Last()(jnp.ones(2)).tolist() == [2.0, 2.0]


def test_methods_under_the_public_names_are_no_transform():
    class Old(nf.FlowTransform):
        event_shape = (2,)

        def forward_and_log_det(self, x, context=None):
            return x, 0.0

        inverse_and_log_det = forward_and_log_det

    with pytest.raises(TypeError, match="_forward_and_log_det"):
        Old()


class Estimated(Doubled):
    inexact = "guess"


def test_what_says_that_it_is_inexact_is_refused():
    """No other method is needed, and it may be any part of a flow."""
    for t in (Estimated(), nf.transforms.Chain([Doubled(), Estimated()]), Estimated().inv):
        flow = nf.FlowDistribution(dist.Normal(jnp.zeros(2), 1.0), t)
        assert t.inexact == "guess"
        assert "log_prob=guess" in repr(flow)
        with pytest.raises(ValueError, match="got the guess"):
            check_exact(flow)
    assert not nf.transforms.Chain([Doubled(), Doubled()]).inexact


def test_only_transforms_and_flows_train_differently():
    class Foreign(eqx.Module):
        weight: jax.Array

        def for_training(self, key, rows):
            raise AssertionError("not ours")

    class Holder(Doubled):
        network: Foreign

    holder = Holder(Foreign(jnp.ones(2)))
    trained = for_training(nf.transforms.Chain([holder]), jax.random.key(0), 4)
    assert trained.parts[0].eq(holder)


def test_jit_hash_and_equality():
    x = points(2)
    y, log_det = forward(LINEAR, x)
    np.testing.assert_allclose(jax.jit(LINEAR)(x), y, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(LINEAR.forward_and_log_det)(x)[1], log_det, atol=1e-6)
    np.testing.assert_allclose(jax.jit(LINEAR.inv)(y), x, atol=1e-5)
    assert isinstance(hash(LINEAR), int)
    other = jax.tree.map(lambda leaf: leaf + 0, LINEAR)
    assert LINEAR == LINEAR
    assert other != LINEAR  # NumPyro's static equality does not look into arrays
    assert LINEAR.eq(other)
    assert not LINEAR.eq(jax.tree.map(lambda leaf: leaf + 1, LINEAR))
    assert not LINEAR.eq(LINEAR.inv)
    assert not LINEAR.eq(transform(nf.realnvp, 3))
    assert jax.jit(lambda a, b: a.eq(b))(LINEAR, other)


def test_inverse_is_a_view():
    assert LINEAR.inv.inv is LINEAR
    assert LINEAR.domain is not None
    assert LINEAR.domain == LINEAR.inv.codomain
    structure = jax.tree.structure(LINEAR)
    _ = LINEAR.inv
    assert jax.tree.structure(LINEAR) == structure


def test_pickle_and_tree_at():
    copy = pickle.loads(pickle.dumps(LINEAR))
    assert copy.eq(LINEAR)
    edited = eqx.tree_at(
        lambda t: t.layers.conditioner.biases[-1], LINEAR, replace_fn=jnp.ones_like
    )
    assert not edited.eq(LINEAR)
    both = pickle.loads(pickle.dumps(flow(nf.realnvp, 2)))
    np.testing.assert_array_equal(
        log_prob(both, points(2)), log_prob(flow(nf.realnvp, 2), points(2))
    )


def test_vmap_over_transforms():
    @jax.jit
    def values(keys):
        ensemble = jax.vmap(lambda key: nf.realnvp(key, 2, depth=2, hidden=(4,)))(keys)
        return jax.vmap(lambda flow, x: flow.log_prob(x), in_axes=(0, None))(ensemble, points(2))

    assert values(jax.random.split(jax.random.key(0), 3)).shape == (3, 6)


def test_optax_and_scan_need_no_filters():
    optimizer = optax.adam(1e-2)
    x = points(2, 64) * 2 + 1
    start = flow(nf.realnvp, 2, depth=2, hidden=(4,))

    def step(carry, _):
        flow, state = carry
        loss, grads = jax.value_and_grad(lambda f: -f.log_prob(x).mean())(flow)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(flow, updates), state), loss

    run = jax.jit(lambda f: jax.lax.scan(step, (f, optimizer.init(f)), length=50))
    _, losses = run(start)
    assert losses[-1] < losses[0] - 0.1


def test_stock_transformed_distribution_accepts_it():
    base = dist.Normal(jnp.zeros(2), jnp.ones(2)).to_event(1)
    stock = dist.TransformedDistribution(base, LINEAR)
    ours = nf.FlowDistribution(base, LINEAR)
    x = sample(ours, jax.random.key(0), (5,))
    np.testing.assert_allclose(log_prob(stock, x), log_prob(ours, x), rtol=1e-5)
    np.testing.assert_array_equal(sample(stock, jax.random.key(0), (5,)), x)
    assert sample(stock.expand((3,)), jax.random.key(0)).shape == (3, 2)
    composed = dist.TransformedDistribution(base, [LINEAR, LINEAR.inv])
    np.testing.assert_allclose(log_prob(composed, x), log_prob(base, x), atol=1e-4)


@pytest.mark.slow
def test_numpyros_own_modules_accept_it():
    x = points(2, 32)
    base = dist.Normal(jnp.zeros(2), jnp.ones(2)).to_event(1)

    def model():
        t = eqx_module("t", LINEAR)
        numpyro.sample("x", nf.FlowDistribution(base, t).expand((32,)), obs=x)

    svi = SVI(model, lambda: None, numpyro.optim.Adam(1e-2), Trace_ELBO())
    result = svi.run(jax.random.key(0), 30, progress_bar=False)
    assert result.losses[-1] < result.losses[0]

    def bayesian():
        t = random_eqx_module("t", LINEAR, dist.Normal(0.0, 0.1))
        numpyro.sample("x", nf.FlowDistribution(base, t).expand((32,)), obs=x)

    mcmc = MCMC(NUTS(bayesian, max_tree_depth=3), num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(jax.random.key(0))
    samples = mcmc.get_samples()
    assert all(np.isfinite(value).all() for value in samples.values())
    assert samples["t/layers.conditioner.weights[0]"].shape == (5, 2, 4, 1)


def test_partition_keeps_fixed_numbers_out():
    inner = flow(nf.realnvp, 2).transform
    whole = nf.FlowDistribution(
        dist.Normal(jnp.zeros(2), 1.0),
        nf.transforms.Standardized(inner, jnp.ones(2), jnp.full(2, 3.0)),
    )
    params, rest = nf.partition(whole)
    assert len(jax.tree.leaves(params)) == len(jax.tree.leaves(inner))
    moved = nf.combine(jax.tree.map(lambda leaf: leaf + 1.0, params), rest)
    np.testing.assert_array_equal(moved.transform.scale.value, jnp.full(2, 3.0))
    np.testing.assert_array_equal(moved.base_dist.base_dist.loc, jnp.zeros(2))
    again = nf.combine(params, rest)
    assert again.transform.eq(whole.transform)
    with_base, _ = nf.partition(whole, train_base=True)
    assert len(jax.tree.leaves(with_base)) == len(jax.tree.leaves(params)) + 2


def loops_of(function, *args):
    return count_loops(jax.jit(function).lower(*args).compile())


def test_log_prob_is_one_loop():
    scanned = flow(nf.realnvp, 3, depth=5)
    x = points(3)
    stock = dist.TransformedDistribution(scanned.base_dist, scanned.transform)
    assert loops_of(lambda d, x: stock.log_prob(x), scanned, x) == 2
    assert loops_of(lambda d, x: d.log_prob(x), scanned, x) == 1
    with_support = flow(nf.realnvp, 3, depth=5, support=dist.constraints.positive)
    assert loops_of(lambda d, x: d.log_prob(x), with_support, jnp.exp(x)) == 1


def test_sample_and_log_prob_is_one_loop_beside_the_generators():
    scanned = flow(nf.realnvp, 3, depth=5)
    key = jax.random.key(0)
    generator = loops_of(lambda key: scanned.base_dist.sample(key, (4,)), key)
    assert loops_of(lambda key: scanned.sample_and_log_prob(key, (4,)), key) == generator + 1


def test_traced_twice_is_one_loop():
    """What the guide does: sample with intermediates, then log_prob with them."""
    scanned = flow(nf.realnvp, 3, depth=5)

    def density(key):
        tr = handlers.trace(handlers.seed(lambda: numpyro.sample("x", scanned), key)).get_trace()
        site = tr["x"]
        return site["fn"].log_prob(site["value"], site["intermediates"])

    key = jax.random.key(0)
    generator = loops_of(lambda key: scanned.base_dist.sample(jax.random.split(key)[1]), key)
    assert loops_of(density, key) <= generator + 1


def test_compile_size_does_not_grow_with_depth():
    x = points(3)

    def size(depth):
        scanned = flow(nf.realnvp, 3, depth=depth)
        return len(jax.jit(lambda f, x: f.log_prob(x)).lower(scanned, x).as_text().splitlines())

    assert size(32) == size(4)


def test_bad_input():
    t = transform(nf.realnvp, 3, context_dim=2)
    x, c = points(3), points(2)
    with pytest.raises(ValueError, match=r"expected shape \(\*batch, 3\), got \(6, 2\)"):
        t.forward_and_log_det(c, c)
    with pytest.raises(ValueError, match=r"got no context: call flow.condition\(context\)"):
        t(x)
    with pytest.raises(ValueError, match=r"expected shape \(\*batch, 2\), got \(6, 3\)"):
        t.forward_and_log_det(x, x)
    with pytest.raises(TypeError, match="dtype int32"):
        t.forward_and_log_det(jnp.ones((6, 3), int), c)
    with pytest.raises(TypeError, match="context: expected floating-point"):
        t.forward_and_log_det(x, jnp.ones((6, 2), int))
    with pytest.raises(ValueError, match=r"Scan takes no context, got one of shape \(6, 2\)"):
        transform(nf.realnvp, 3).forward_and_log_det(x, c)
    with pytest.raises(ValueError, match="takes no context"):
        nf.transforms.Conditioned(transform(nf.realnvp, 3), c)
    with pytest.raises(ValueError, match="at least one transform"):
        nf.transforms.Chain([])
    with pytest.raises(TypeError, match="expected FlowTransforms, got ExpTransform"):
        nf.transforms.Chain([numpyro_transforms.ExpTransform()])
    with pytest.raises(ValueError, match=r"returns events of shape \(2,\)"):
        nf.transforms.Chain([transform(nf.realnvp, 2), transform(nf.realnvp, 3)])
    with pytest.raises(ValueError, match=r"different widths \[1, 2\]"):
        nf.transforms.Chain([t, transform(nf.realnvp, 3, context_dim=1)])
    with pytest.raises(ValueError, match=r"permutations of range\(3\)"):
        nf.transforms.Scan(transform(nf.realnvp, 3).layers, [[0, 0, 1]] * 3)
    with pytest.raises(ValueError, match="leading axis of 2 layers"):
        nf.transforms.Scan(transform(nf.realnvp, 3).layers, [[0, 1, 2]] * 2)
    with pytest.raises(TypeError, match="expected|Expected a NumPyro Transform"):
        nf.transforms.NumPyroTransform(dist.constraints.positive, (2,))
    with pytest.raises(TypeError, match="floating arrays in it, got one of dtype int32"):
        nf.transforms.NumPyroTransform(numpyro_transforms.PermuteTransform(jnp.array([1, 0])), (2,))
    with pytest.raises(ValueError, match="acts on events with 1 axes"):
        nf.transforms.NumPyroTransform(dist.biject_to(dist.constraints.simplex), ())
    with pytest.raises(ValueError, match="dim: expected at least 1, got 0"):
        nf.transforms.DiagonalScale(0)
    with pytest.raises(ValueError, match="log_scale_bound: expected a positive"):
        nf.elementwise.Affine(0.0)
    with pytest.raises(ValueError, match="Unknown activation 'sine'"):
        nf.nn.MLP(jax.random.key(0), 1, 1, activation="sine")
    with pytest.raises(ValueError, match="hidden: expected positive integers"):
        nf.nn.MLP(jax.random.key(0), 1, 1, hidden=(8, 0))
