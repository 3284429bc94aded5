"""``jax.jit`` for the library's own programs."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_LEVEL = "xla_backend_optimization_level"


def is_traced(tree: Any) -> bool:
    """Whether a pytree holds values that are not known while a program is traced."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def jit(
    fun: Callable | None = None,
    *,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
) -> Any:
    """``jax.jit``, on CPUs at LLVM's optimisation level 2 in place of XLA's default of 3.

    Level 3 compiles code of random numbers two to four times as long, and training steps are as
    fast without it (``benchmarks/limits.py levels``). A level in the environment's ``XLA_FLAGS``
    stays.
    """
    if fun is None:
        return functools.partial(
            jit, static_argnums=static_argnums, static_argnames=static_argnames
        )
    statics: dict[str, Any] = {"static_argnums": static_argnums, "static_argnames": static_argnames}
    plain = jax.jit(fun, **statics)
    lighter = jax.jit(fun, compiler_options={_LEVEL: 2}, **statics)

    @functools.wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        # JAX takes no options inside another program; there an array made anew is a tracer.
        inside = is_traced((args, kwargs)) or is_traced(jnp.zeros(()))
        elsewhere = jax.default_backend() != "cpu" or _LEVEL in os.environ.get("XLA_FLAGS", "")
        return (plain if inside or elsewhere else lighter)(*args, **kwargs)

    return call
