r"""Inverses that have no formula: scalar monotone equations and triangular systems.

Both solvers have implicit gradients by ``custom_jvp``: with :math:`f(x, a) = y`,

.. math:: \dot x = (\partial_x f)^{-1} (\dot y - \partial_a f \, \dot a),

so forward mode, reverse mode and higher orders work, and no iteration is ever differentiated.
The functions take all arrays as arguments; they must not close over any that is differentiated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

_MAX_ITERATIONS = 200


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def monotone_root(
    function: Callable[[Array, Any], Array], y: Array, args: Any, lower: Array, upper: Array
) -> Array:
    r"""Solve :math:`f(x, a) = y` for each element, f strictly increasing in x, to rounding error.

    Newton's method inside a shrinking bracket: a step that would leave the bracket or is not half
    as long as the one before is replaced by bisection, so it converges for any increasing f and
    quadratically for a smooth one.

    :param function: ``(x, args) -> values``, elementwise in x, all of the shape of ``y``.
    :param y: right-hand sides, any shape.
    :param args: pytree of arrays that the function reads; gradients flow to it.
    :param lower: lower bounds of the roots, of the shape of ``y``; not differentiated.
    :param upper: upper bounds.
    :return: x; ``nan`` where y is.

    Cost: one evaluation of f and its derivative per iteration, typically 4 to 8, until every
    element has converged. The error is that of evaluating f, divided by its slope.

    >>> import jax, jax.numpy as jnp
    >>> def cube(x, a): return a * x**3 + x
    >>> y = jnp.array([0.0, 10.0])
    >>> monotone_root(cube, y, 1.0, -abs(y) - 1, abs(y) + 1)
    Array([0., 2.], dtype=float32)
    >>> jax.grad(lambda a: monotone_root(cube, y, a, -y - 1, y + 1).sum())(1.0)  # -8 / 13
    Array(-0.61538464, dtype=float32, weak_type=True)
    """
    y = jnp.asarray(y)  # a number as it came, in JAX before 0.8
    eps = jnp.finfo(y.dtype).eps

    def active(state: Any) -> Array:
        return (state[0] < _MAX_ITERATIONS) & jnp.any(state[-1] > 0)

    def step(state: Any) -> Any:
        i, x, lower, upper, last, _ = state
        value, slope = jax.jvp(lambda x: function(x, args), (x,), (jnp.ones_like(x),))
        error = value - y
        lower = jnp.where(error < 0, x, lower)
        upper = jnp.where(error > 0, x, upper)
        newton = x - error / slope
        good = (newton >= lower) & (newton <= upper) & (2 * jnp.abs(newton - x) <= last)
        good &= jnp.isfinite(slope)  # an infinite one would make a step of 0 look like the end
        new = jnp.where(good, newton, 0.5 * (lower + upper))
        new = jnp.where(error == 0, x, new)
        moved = jnp.abs(new - x)
        # A last step this short has already brought a quadratic method to rounding error.
        small = moved <= 2 * eps * jnp.maximum(jnp.abs(new), 1e-3)
        going = ~small & (upper - lower > 2 * eps * jnp.abs(new)) & ~jnp.isnan(error)
        return i + 1, new, lower, upper, moved, going.astype(y.dtype)

    lower, upper = jnp.minimum(lower, upper), jnp.maximum(lower, upper)
    start = jnp.clip(y, lower, upper)
    state = (jnp.array(0), start, lower, upper, upper - lower, jnp.ones_like(y))
    return jax.lax.while_loop(active, step, state)[1]


@monotone_root.defjvp
def _monotone_root_jvp(function: Callable, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (_, args, _, _), (y_dot, args_dot, _, _) = primals, tangents
    x = monotone_root(function, *primals)
    _, slope = jax.jvp(lambda x: function(x, args), (x,), (jnp.ones_like(x),))
    _, shift = jax.jvp(lambda args: function(x, args), (args,), (args_dot,))
    return x, (y_dot - shift) / slope


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def triangular_root(
    solve: Callable[[Array, Any], Array],
    function: Callable[[Array, Any], tuple[Array, Array]],
    y: Array,
    args: Any,
) -> Array:
    r"""``solve(y, args)``, with the gradients of the solution x of :math:`F(x, a) = y`.

    F maps columns of x to columns of y, and its Jacobian is triangular in the order of the first
    axis. The linear systems of the gradients are solved by sweeps of
    :math:`v \leftarrow v + D^{-1} (b - J v)` with D the diagonal of J. The strictly triangular
    part is nilpotent: after k sweeps the first k coordinates are exact, as in forward
    substitution, and usually all of them are after far fewer than dim sweeps.

    :param solve: ``(y, args) -> x``; never differentiated.
    :param function: ``(x, args) -> (y, log of the Jacobian's diagonal)``, both ``(dim, rows)``.
    :param y: right-hand sides, ``(dim, rows)``.
    :param args: pytree of arrays that both functions read; gradients flow to it.
    :return: x, of the shape of ``y``.

    Cost of the gradient: one linearised pass of F per sweep, at most ``dim + 2``.
    """
    return solve(y, args)


@triangular_root.defjvp
def _triangular_root_jvp(
    solve: Callable, function: Callable, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    (_, args), (y_dot, args_dot) = primals, tangents
    x = triangular_root(solve, function, *primals)
    (_, log_diagonal), jacobian = jax.linearize(lambda x: function(x, args), x)
    _, (shift, _) = jax.jvp(lambda args: function(x, args), (args,), (args_dot,))
    inverse_diagonal = jax.lax.stop_gradient(jnp.exp(-log_diagonal))
    substitute = partial(_substitute, inverse_diagonal)
    x_dot = jax.lax.custom_linear_solve(
        lambda v: jacobian(v)[0], y_dot - shift, substitute, transpose_solve=substitute
    )
    return x, x_dot


def _substitute(inverse_diagonal: Array, matvec: Callable[[Array], Array], b: Array) -> Array:
    eps = jnp.finfo(b.dtype).eps
    # Coordinates that wait for earlier ones may grow meanwhile, but must not overflow: a zero of
    # the triangular structure times infinity is not zero.
    limit = jnp.finfo(b.dtype).max ** 0.5

    def sweep(state: Any) -> Any:
        i, v, _ = state
        change = inverse_diagonal * (b - matvec(v))
        new = jnp.clip(v + change, -limit, limit)
        moved = jnp.max(jnp.abs(new - v), axis=0)
        return i + 1, new, jnp.any(moved > 8 * eps * jnp.max(jnp.abs(new), axis=0))

    def active(state: Any) -> Array:
        return (state[0] < b.shape[0] + 2) & state[2]

    start = (jnp.array(0), jnp.clip(inverse_diagonal * b, -limit, limit), jnp.array(True))
    return jax.lax.while_loop(active, sweep, start)[1]
