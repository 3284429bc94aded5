"""Functions traced once: same programs for other numbers, answers of now."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density
from programs import compiled_programs

from numpyro_flows.infer.traced import Traced


@jax.jit
def apply(traced, x):
    return traced(x)


def structure(function, *examples):
    return jax.tree.structure(Traced(function, *examples))


def test_numbers_are_arguments_and_structure_is_the_key():
    x = jnp.ones(3)

    def scaled(y):
        return lambda x: (x * y).sum()

    assert structure(scaled(np.arange(3.0)), x) == structure(scaled(np.ones(3)), x)
    assert structure(scaled(np.arange(3.0)), x) != structure(scaled(np.arange(1.0)), x)
    assert structure(scaled(2.0), x) == structure(scaled(2.0), x)
    assert structure(scaled(2.0), x) != structure(scaled(3.0), x)  # a number of the program
    assert structure(lambda x: x + 1, x) != structure(lambda x: x - 1, x)
    assert structure(lambda x: x[:2], x) != structure(lambda x: x[1:], x)


def test_a_compiled_function_inside_that_reads_arrays_gives_the_answer_of_now():
    def reading(y):
        inner = jax.jit(lambda x: (x * y).sum())
        return Traced(lambda x: inner(x) + 1, jnp.ones(2))

    one, same, other = reading(jnp.ones(2)), reading(jnp.ones(2)), reading(jnp.arange(2.0))
    assert jax.tree.structure(one) == jax.tree.structure(same)
    assert apply(one, jnp.ones(2)) == 3
    assert apply(other, jnp.ones(2)) == 2


@pytest.mark.parametrize("rule", [jax.nn.softplus, jax.nn.relu, jax.scipy.special.logsumexp])
def test_rules_of_derivatives_are_no_part_of_the_key(rule):
    """JAX makes them anew in every trace."""
    x = jnp.ones(3)
    for function in (rule, jax.value_and_grad(lambda x: jnp.sum(rule(x)))):
        assert structure(function, x) == structure(function, x)


def model(y, rate):
    x = numpyro.sample("x", dist.Gamma(2.0, rate).to_event(1))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.NegativeBinomial2(jax.nn.softplus(x.sum()), 2.0), obs=y)
    numpyro.sample("o", dist.OrderedLogistic(x[0], jnp.array([0.0, 1.0])), obs=1)


def density(y, rate):
    def value(u):
        return log_density(model, (y, rate), {}, {"x": jnp.exp(u)})[0]

    return jax.value_and_grad(value)


def test_a_model_with_other_data_compiles_nothing():
    u = jnp.array([0.1, -0.3])
    rows = [np.array([1, 2, 3]), np.array([4, 0, 9])]
    rates = [jnp.ones(2), jnp.array([0.5, 3.0])]
    expected = [density(y, rate)(u) for y, rate in zip(rows, rates, strict=True)]
    apply(Traced(density(rows[0], rates[0]), u), u)
    with compiled_programs() as names:
        got = [apply(Traced(density(y, rate), u), u) for y, rate in zip(rows, rates, strict=True)]
    assert names == []
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
        np.testing.assert_allclose(one[1], other[1], rtol=1e-5)


def test_what_an_output_reads():
    traced = Traced(lambda x, y: {"a": x + 1, "b": x * y, "c": 3.0}, 1.0, 2.0)
    each = traced.read_by_each()
    assert {name: each[i] for name, i in traced.outputs.items()} == {
        "a": {0},
        "b": {0, 1},
        "c": set(),
    }


def test_what_the_outputs_of_calls_and_loops_read():
    def loop(x, y, z):
        def step(carry, seen):
            one, other = carry
            return (other, other + x), (jax.nn.softplus(seen), one, x)

        (one, other), each = jax.lax.scan(step, (z, 0.0), jnp.ones(3) * y)
        return {
            "one": one,
            "other": other,
            "each": each,
            "branch": jax.lax.cond(x > 0, lambda: y, lambda: z),
        }

    traced = Traced(loop, 1.0, 2.0, 3.0)
    each = traced.read_by_each()
    found = jax.tree.map(lambda i: each[i], traced.outputs)
    assert found == {"one": {0, 2}, "other": {0}, "each": ({1}, {0, 2}, {0}), "branch": {0, 1, 2}}


def test_a_part_of_the_outputs():
    data, other = jnp.arange(3.0), jnp.ones(5)
    traced = Traced(lambda x: {"a": x * data, "b": x + other}, 2.0)
    part = traced.only({"found": traced.outputs["a"]})
    np.testing.assert_array_equal(part(3.0)["found"], 3.0 * data)
    assert [leaf.shape for leaf in jax.tree.leaves(part)] == [(3,)]


def test_other_arguments_than_it_was_traced_for():
    with pytest.raises(TypeError, match="expected arguments"):
        Traced(lambda x: x, 1.0)({"x": 1.0})
