"""``compilation.jit`` is ``jax.jit``, outside and inside of other programs."""

import jax
import jax.numpy as jnp
import pytest

from numpyro_flows import compilation
from numpyro_flows.compilation import jit


@pytest.fixture(autouse=True)
def own_level(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the suite's level would be kept


@jit(static_argnames="power")
def program(x, power=2):
    """A docstring."""
    return {"y": jnp.sin(x) ** power}


def test_it_works_wherever_jax_jit_does():
    x, expected = jnp.arange(3.0), jnp.sin(jnp.arange(3.0)) ** 2
    slope = 2 * jnp.sin(0.5) * jnp.cos(0.5)
    results = [
        program(x)["y"],
        jax.vmap(program)(x)["y"],
        jax.jit(program)(x)["y"],
        jax.jit(lambda: program(jnp.arange(3.0)))()["y"],
        jax.jit(lambda: program(x))()["y"],
        jax.lax.scan(lambda c, x: (c, program(x)), None, x)[1]["y"],
    ]
    for result in results:
        assert jnp.allclose(result, expected)
    assert jnp.allclose(jax.grad(lambda x: program(x)["y"])(0.5), slope)
    assert jnp.allclose(program(x, power=3)["y"], jnp.sin(x) ** 3)
    assert program.__doc__ == "A docstring."


def test_it_compiles_once():
    traced = []

    @jit
    def count(x):
        traced.append(x)
        return x + 1

    count(jnp.ones(2))
    count(jnp.zeros(2))
    assert len(traced) == 1


def test_options_that_this_version_does_not_have_are_left_out(monkeypatch):
    assert compilation._is_known("xla_backend_optimization_level", 2)
    monkeypatch.setattr(compilation, "_FUSION", "xla_no_such_option")
    double = jit(lambda x: 2 * x, once=True)
    assert double(jnp.ones(())) == 2
