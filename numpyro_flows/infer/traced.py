"""Traced functions as pytrees: the equations are static, the arrays that they read are leaves.

A model reads data from its arguments, from closures and from globals. Tracing it anew in each call
is cheap and gives the answer of now; compiling what was traced is not. So a :class:`Traced` is a
pytree. The arrays are its leaves, arguments of any compiled program that it enters, and its static
part compares by what was traced, equation by equation: to ``jax.jit`` the same model with other
numbers of the same shapes is the same program.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

#: What calls a function with a derivative of its own. Nothing here is differentiated again, so that
#: the function alone counts, not the rules, which are new objects in every trace.
_WITH_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


class _Same:
    """An object that cannot be compared, equal to itself alone, and kept alive by who compares."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _numbers(array: Any) -> Any:
    """An array by content; one that is itself traced by identity."""
    if isinstance(array, jax.core.Tracer):
        return _Same(array)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    host = np.asarray(array)
    return host.shape, str(host.dtype), host.tobytes()


def _comparable(value: Any) -> Any:
    """A parameter of an equation as something that can be compared and hashed."""
    if isinstance(value, ClosedJaxpr):
        # A compiled function that reads arrays of its own: these stay in the program.
        return _equations(value.jaxpr), tuple(map(_numbers, value.consts))
    if isinstance(value, Jaxpr):
        return _equations(value)
    if isinstance(value, np.ndarray | jax.Array):
        return _numbers(value)
    if isinstance(value, tuple | list):
        return type(value).__name__, tuple(map(_comparable, value))
    if isinstance(value, dict):
        return tuple((name, _comparable(each)) for name, each in sorted(value.items()))
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return value


def _equations(jaxpr: Jaxpr) -> Any:
    """What a jaxpr computes, with its variables numbered in their order."""
    numbers: dict[Any, int] = {}

    def number(variable: Any) -> Any:
        if isinstance(variable, Literal):
            return _numbers(np.asarray(variable.val)), variable.aval
        return numbers.setdefault(variable, len(numbers))

    inputs = tuple((number(v), v.aval) for v in (*jaxpr.constvars, *jaxpr.invars))
    equations = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        params = {
            key: value
            for key, value in equation.params.items()
            if name not in _WITH_RULES or isinstance(value, Jaxpr | ClosedJaxpr)
        }
        equations.append(
            (
                equation.primitive,
                _comparable(params),
                tuple(map(number, equation.invars)),
                tuple((number(v), v.aval) for v in equation.outvars),
            )
        )
    return inputs, tuple(equations), tuple(map(number, jaxpr.outvars))


#: Calls of one function with the arguments of the equation.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", *_WITH_RULES)


def _sources(jaxpr: Jaxpr, consts: list[set[int]], inputs: list[set[int]]) -> list[set[int]]:
    """What each output may depend on, given that for constants and inputs."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def of(variable: Any) -> set[int]:
        return set() if isinstance(variable, Literal) else known[variable]

    for equation in jaxpr.eqns:
        read = [of(variable) for variable in equation.invars]
        known |= zip(equation.outvars, _sources_of(equation, read), strict=True)
    return [of(variable) for variable in jaxpr.outvars]


def _sources_of(equation: Any, read: list[set[int]]) -> list[set[int]]:
    """The same for the outputs of an equation, inside of calls and loops of known length too."""
    params, name = equation.params, equation.primitive.name
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if isinstance(inner, ClosedJaxpr):
        inner = inner.jaxpr
    if name in _CALLS and isinstance(inner, Jaxpr) and len(inner.invars) == len(read):
        return _sources(inner, [set()] * len(inner.constvars), read)
    if name == "scan" and isinstance(inner, Jaxpr):
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        carry, found = read[first:last], None
        while carry != found:
            found = carry
            each = _sources(
                inner, [set()] * len(inner.constvars), [*read[:first], *carry, *read[last:]]
            )
            carry = [before | after for before, after in zip(carry, each, strict=False)]
        return [*carry, *each[last - first :]]
    return [set().union(*read)] * len(equation.outvars)


def _needed(jaxpr: Jaxpr, outputs: list[int]) -> tuple[list[Any], set[Any]]:
    """The equations on which outputs may depend, and the variables that they read."""
    needed = {v for v in (jaxpr.outvars[n] for n in outputs) if not isinstance(v, Literal)}
    equations = []
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed.update(v for v in equation.invars if not isinstance(v, Literal))
            equations.append(equation)
    return equations[::-1], needed


class _Program:
    """The static part: a jaxpr, equal to others that compute the same."""

    def __init__(self, jaxpr: Jaxpr, in_tree: Any, out_tree: Any):
        self.jaxpr, self.in_tree, self.out_tree = jaxpr, in_tree, out_tree
        self._key = _equations(jaxpr), in_tree, out_tree
        self._hash = hash(self._key)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, _Program) and self._hash == other._hash and self._key == other._key
        )

    def __hash__(self) -> int:
        return self._hash


def traced_at(function: Callable[..., Any], arguments: Any, *examples: Any) -> "Traced":
    """Trace ``function(arguments, *examples)`` with the arguments closed over.

    NumPy arrays stay what they are, so that a model may compute shapes from them; where it indexes
    one by what is traced, as rows of a subsample, they become JAX arrays.
    """
    try:
        return Traced(functools.partial(function, arguments), *examples)
    except jax.errors.TracerArrayConversionError:
        arrays = jax.tree.map(_as_jax, arguments)
        return Traced(functools.partial(function, arrays), *examples)


def _as_jax(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf" else leaf


@jax.tree_util.register_pytree_node_class
class Traced:
    """A function of arrays that was traced, with the arrays that it read as leaves.

    Its derivatives are not those of the function: differentiate before tracing.

    :param function: called once, with tracers of the shapes of ``examples``.
    :param examples: pytrees of arrays.

    >>> import jax.numpy as jnp
    >>> def scaled(y):
    ...     return Traced(lambda x: y * x, jnp.ones(2))
    >>> one, other = scaled(jnp.array([1.0, 2.0])), scaled(jnp.array([3.0, 4.0]))
    >>> jax.tree.structure(one) == jax.tree.structure(other)
    True
    >>> other(jnp.ones(2))
    Array([3., 4.], dtype=float32)
    """

    def __init__(self, function: Callable[..., Any], *examples: Any):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*examples)
        # Those on devices stay where they are, which may be devices of other processes.
        self._arrays = [c if isinstance(c, Array) else jax.device_put(c) for c in closed.consts]
        self._program = _Program(
            closed.jaxpr, jax.tree.structure(examples), jax.tree.structure(shapes)
        )

    def __call__(self, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        if structure != self._program.in_tree:
            raise TypeError(f"expected arguments {self._program.in_tree}, got {structure}.")
        outputs = jaxpr_as_fun(ClosedJaxpr(self._program.jaxpr, self._arrays))(*leaves)
        return jax.tree.unflatten(self._program.out_tree, outputs)

    @property
    def outputs(self) -> Any:
        """The result's structure, with the numbers of its leaves in place of these."""
        tree = self._program.out_tree
        return jax.tree.unflatten(tree, range(tree.num_leaves))

    def read_by_each(self) -> list[set[int]]:
        """By output, which arguments it may depend on, all counted in leaves."""
        jaxpr = self._program.jaxpr
        return _sources(
            jaxpr, [set()] * len(jaxpr.constvars), [{n} for n in range(len(jaxpr.invars))]
        )

    def only(self, outputs: Any) -> "Traced":
        """The function without what these results do not need.

        :param outputs: a pytree of their numbers, as in :attr:`outputs`.
        """
        jaxpr, numbers = self._program.jaxpr, jax.tree.leaves(outputs)
        equations, needed = _needed(jaxpr, numbers)
        kept = [n for n, variable in enumerate(jaxpr.constvars) if variable in needed]
        smaller = jaxpr.replace(
            constvars=[jaxpr.constvars[n] for n in kept],
            eqns=equations,
            outvars=[jaxpr.outvars[n] for n in numbers],
            debug_info=jaxpr.debug_info._replace(result_paths=None),
        )
        structure = jax.tree.structure(outputs)
        program = _Program(smaller, self._program.in_tree, structure)
        return self.tree_unflatten(program, ([self._arrays[n] for n in kept],))

    def tree_flatten(self) -> tuple[tuple[list[Array]], _Program]:
        return (self._arrays,), self._program

    @classmethod
    def tree_unflatten(cls, program: _Program, children: tuple[list[Array]]) -> "Traced":
        traced = object.__new__(cls)
        (traced._arrays,), traced._program = children, program
        return traced
