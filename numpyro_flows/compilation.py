"""How the library compiles its own programs: ``jax.jit`` with cheaper options on CPUs."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
from jax import Array

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # JAX 0.7
    from jax.core import get_opaque_trace_state

_LEVEL: Final = "xla_backend_optimization_level"
_FUSION: Final = "xla_cpu_use_fusion_emitters"
#: What JAX says of its state where nothing is traced.
_OUTSIDE: Final = get_opaque_trace_state()


def is_traced(tree: Any) -> bool:
    """Whether a pytree holds values that are not known while a program is traced."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def is_outside() -> bool:
    """Whether nothing is being traced."""
    return bool(get_opaque_trace_state() == _OUTSIDE)


@functools.cache
def _is_known(option: str, value: Any) -> bool:
    """Whether this XLA has the option: a version may drop one, and then refuses to compile."""
    try:
        jax.jit(lambda: (), compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def jit(
    fun: Callable | None = None,
    *,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    once: bool = False,
) -> Any:
    """``jax.jit``, on CPUs with XLA options that make compilation cheaper.

    LLVM's optimisation level 2 in place of XLA's default of 3: level 3 compiles code of random
    numbers two to four times as long, and training steps are as fast without it
    (``benchmarks/limits.py levels``). Options in the environment's ``XLA_FLAGS`` stay;
    those that this version of XLA does not have are left out.

    :param once: for a program that runs a few times: without the newer emitters of fused loops,
        which take half of the compilation and save a fifth of the time of a training step.
    """
    if fun is None:
        return functools.partial(
            jit, static_argnums=static_argnums, static_argnames=static_argnames, once=once
        )
    statics: dict[str, Any] = {"static_argnums": static_argnums, "static_argnames": static_argnames}
    plain = jax.jit(fun, **statics)
    flags = os.environ.get("XLA_FLAGS", "")
    wanted: dict[str, Any] = {} if _LEVEL in flags else {_LEVEL: 2}
    if once and _FUSION not in flags:
        wanted[_FUSION] = False

    @functools.cache
    def lighter() -> Callable:
        options = {name: value for name, value in wanted.items() if _is_known(name, value)}
        return jax.jit(fun, compiler_options=options, **statics) if options else plain

    @functools.wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        # JAX takes no options inside another program, and other devices do not know these.
        alone = is_outside() and jax.default_backend() == "cpu"
        return (lighter() if alone else plain)(*args, **kwargs)

    return call


@jit(static_argnums=1, once=True)
def split(key: Array, num: int) -> tuple[Array, ...]:
    """``jax.random.split`` into a tuple, as one program."""
    return tuple(jax.random.split(key, num))
