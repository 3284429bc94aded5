r"""Planar flows and their generalisation to several ridges, Sylvester flows, with exact inverses.

Both add smooth monotone ridges :math:`h` to the identity. Along each ridge the inverse is one
scalar equation,

.. math:: t + c \, h(t + b) = s, \qquad c h' > -1,

which is strictly increasing in t and solved to rounding error with implicit gradients.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import check_size
from ..nn import Parameters, above_minus_one, drawn
from ..solve import monotone_root, triangular_root
from ..transform import ColumnTransform


class Ridge(NamedTuple):
    r"""A ridge function h for planar and Sylvester flows, with :math:`0 \le h' \le` ``max_slope``.

    :param function: h, elementwise on arrays of any shape.
    :param derivative: h'.
    :param max_slope: the largest slope of h, positive; the invertibility constraint rests on it.

    >>> import jax.numpy as jnp
    >>> Ridge(jnp.arctan, lambda x: 1 / (1 + x**2), 1.0).max_slope
    1.0
    """

    function: Callable[[Array], Array]
    derivative: Callable[[Array], Array]
    max_slope: float = 1.0


def _step(x: Array, below: Array | float) -> Array:
    return jnp.where(x > 0, 1.0, below).astype(x.dtype)


RIDGES: Final[dict[str, Ridge]] = {
    "tanh": Ridge(jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2),
    "leaky_relu": Ridge(jax.nn.leaky_relu, lambda x: _step(x, 0.01)),
    "elu": Ridge(jax.nn.elu, lambda x: _step(x, jnp.exp(jnp.minimum(x, 0)))),
    "softplus": Ridge(jax.nn.softplus, jax.nn.sigmoid),
}


def _ridge(activation: str | Ridge) -> Ridge:
    return RIDGES[activation] if isinstance(activation, str) else activation


def _check_ridge(activation: str | Ridge) -> str | Ridge:
    """The activation, if its ridge keeps the constraint where a flow will ever look."""
    if isinstance(activation, str):
        if activation not in RIDGES:
            raise ValueError(
                f"Unknown activation {activation!r}. Expected one of {sorted(RIDGES)}, or a "
                "`Ridge(function, derivative, max_slope)` of your own."
            )
        return activation
    if not isinstance(activation, Ridge):
        raise TypeError(
            f"activation: expected a name or a Ridge, got {type(activation).__name__}. Write "
            "`Ridge(function, derivative, max_slope)`."
        )
    if not 0 < activation.max_slope < float("inf"):
        raise ValueError(
            f"max_slope: expected a positive finite number, got {activation.max_slope}."
        )
    with jax.ensure_compile_time_eval():
        grid = jnp.linspace(-20.0, 20.0, 4001)
        slope = np.asarray(activation.derivative(grid))
        true = np.asarray(jax.vmap(jax.grad(lambda x: activation.function(x)))(grid))
    if np.abs(slope - true).max() > 1e-3 * max(1, activation.max_slope):
        worst = int(np.abs(slope - true).argmax())
        raise ValueError(
            f"activation: expected the derivative of the function, got {slope[worst]:.4g} at "
            f"{grid[worst]:.4g} where the function's slope is {true[worst]:.4g}."
        )
    if slope.min() < -1e-6 or slope.max() > activation.max_slope * (1 + 1e-4):
        raise ValueError(
            "activation: expected a monotone function with slopes between 0 and max_slope="
            f"{activation.max_slope}, got slopes from {slope.min():.4g} to {slope.max():.4g}. The "
            "planar constraint, and with it the inverse, rests on these bounds."
        )
    return activation


def _solve_along(ridge: Ridge, strength: Array, shift: Array, s: Array) -> Array:
    """t with t + strength h(t + shift) = s, where strength is above -1 / max_slope."""
    strength, shift = (jnp.broadcast_to(a, s.shape) for a in (strength, shift))
    # The slope is between the slopes at h' = 0 and at h' = max_slope, so one residual brackets t.
    residual = strength * ridge.function(s + shift)
    ends = s - residual, s - residual / (1 + strength * ridge.max_slope)
    return monotone_root(
        lambda t, args: t + args[0] * ridge.function(t + args[1]), s, (strength, shift), *ends
    )


class Planar(ColumnTransform):
    r"""Planar layer: :math:`y = x + \hat u \, h(w \cdot x + b)`.

    .. math:: \hat u = u + (m(w \cdot u) - w \cdot u) \frac{w}{|w|^2}, \qquad
              \log |\det| = \log(1 + m(w \cdot u) \, h'(w \cdot x + b))

    The constraint :math:`w \cdot \hat u = m > -1 / \max h'` makes it invertible, with m chosen so
    that :math:`u = 0` is the identity (:func:`numpyro_flows.nn.above_minus_one`). With a context,
    w, u and b depend on it.

    Forward costs O(dim). The inverse projects y on w, solves one scalar equation per row to
    rounding error (some 6 evaluations of h) and subtracts the ridge; gradients are implicit. A
    layer contracts by at most 100.

    Source: Rezende & Mohamed (2015), arXiv:1505.05770, eq. 10-12 and appendix A.1.

    :param key: ``jax.random.key`` for w and b.
    :param dim: number of coordinates; x and y have shape ``(*batch, dim)``.
    :param activation: h: one of ``RIDGES`` or a :class:`Ridge` of your own.
    :param context_dim: width of the context, 0 for none.
    :param hidden: widths of the network that reads the context.
    :raises ValueError: for sizes below 1, an unknown activation, or one whose slopes leave
        [0, max_slope].
    :raises TypeError: for an activation that is neither a name nor a ``Ridge``.

    >>> import jax, jax.numpy as jnp
    >>> layer = Planar(jax.random.key(0), 2)
    >>> layer(layer.inv(jnp.array([1.0, -3.0])))
    Array([ 1., -3.], dtype=float32)
    """

    params: Parameters
    activation: str | Ridge = eqx.field(static=True)

    def __init__(
        self,
        key: Array,
        dim: int,
        *,
        activation: str | Ridge = "tanh",
        context_dim: int = 0,
        hidden: Sequence[int] = (64, 64),
    ):
        self._set_sizes(dim, context_dim)
        self.activation = _check_ridge(activation)
        draws_key, params_key = jax.random.split(key)
        w, b = drawn(jax.random.normal, draws_key, [(dim,), (1,)])
        value = jnp.concatenate([w / dim**0.5, jnp.zeros(dim), b])
        self.params = Parameters(params_key, value, context_size=context_dim, hidden=hidden)

    def _parts(self, context: Array | None) -> tuple[Array, ...]:
        params = self.params(context)
        w, u, b = jnp.split(params, [self.dim, 2 * self.dim])
        slope = _ridge(self.activation).max_slope
        square, along = (w * w).sum(0), (w * u).sum(0)
        strength = above_minus_one(slope * along) / slope
        zero = square == 0
        u_hat = u + jnp.where(zero, 0, (strength - along) / jnp.where(zero, 1, square)) * w
        return w, u_hat, b[0], strength

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        ridge, (w, u_hat, b, strength) = _ridge(self.activation), self._parts(context)
        t = (w * x).sum(0) + b
        return x + u_hat * ridge.function(t), jnp.log1p(strength * ridge.derivative(t))

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        ridge, (w, u_hat, b, strength) = _ridge(self.activation), self._parts(context)
        t = _solve_along(ridge, strength, b, (w * y).sum(0)) + b
        return y - u_hat * ridge.function(t), -jnp.log1p(strength * ridge.derivative(t))


class Sylvester(ColumnTransform):
    r"""Sylvester layer: :math:`y = x + Q R \, h(\tilde R Q^\top x + b)`, M ridges at once.

    Q has M orthonormal columns (a product of M Householder reflections), R and :math:`\tilde R`
    are upper triangular, and with :math:`p = \tilde R Q^\top x + b`

    .. math:: \log |\det| = \sum_i \log(1 + R_{ii} \tilde R_{ii} \, h'(p_i)),
              \qquad R_{ii} \tilde R_{ii} = m_i > -1 / \max h'.

    :math:`\tilde R_{ii} > 0` without loss of generality for odd h. R starts at zero: the layer is
    then the identity. With a context, R, :math:`\tilde R` and b depend on it, Q does not.

    Forward costs O(dim M). The inverse solves the triangular system for :math:`Q^\top x`, M scalar
    equations one after the other, each to rounding error; gradients are implicit. A direction is
    contracted by at most 100.

    Source: van den Berg, Hasenclever, Tomczak & Welling (2018), arXiv:1803.05649, eq. 9-13.

    :param key: ``jax.random.key`` for Q and b.
    :param dim: number of coordinates; x and y have shape ``(*batch, dim)``.
    :param num_ridges: M, at most ``dim``; by default ``min(dim, 8)``.
    :param activation: h: one of ``RIDGES`` or a :class:`Ridge`.
    :param context_dim: width of the context, 0 for none.
    :param hidden: widths of the network that reads the context.
    :raises ValueError: for sizes below 1, ``num_ridges`` above ``dim``, or an activation that
        breaks the constraint.
    :raises TypeError: for an activation that is neither a name nor a ``Ridge``.

    >>> import jax, jax.numpy as jnp
    >>> Sylvester(jax.random.key(0), 3, num_ridges=2)(jnp.ones(3))
    Array([1., 1., 1.], dtype=float32)
    """

    reflections: Array
    params: Parameters
    num_ridges: int = eqx.field(static=True)
    activation: str | Ridge = eqx.field(static=True)

    def __init__(
        self,
        key: Array,
        dim: int,
        *,
        num_ridges: int | None = None,
        activation: str | Ridge = "tanh",
        context_dim: int = 0,
        hidden: Sequence[int] = (64, 64),
    ):
        self._set_sizes(dim, context_dim)
        m = min(dim, 8) if num_ridges is None else check_size("num_ridges", num_ridges)
        if m > dim:
            raise ValueError(f"num_ridges: expected at most dim={dim} orthogonal ridges, got {m}.")
        self.num_ridges = m
        self.activation = _check_ridge(activation)
        draws_key, params_key = jax.random.split(key)
        self.reflections, b = drawn(jax.random.normal, draws_key, [(m, dim), (m,)])
        value = jnp.concatenate([jnp.zeros(2 * m * m), b])
        self.params = Parameters(params_key, value, context_size=context_dim, hidden=hidden)

    def _frame(self) -> Array:
        """Q, of shape ``(dim, num_ridges)``."""
        frame = jnp.eye(self.dim, self.num_ridges, dtype=self.reflections.dtype)
        for v in self.reflections:
            square = v @ v
            frame = frame - 2 * jnp.outer(v, v @ frame) / jnp.where(square == 0, 1, square)
        return frame

    def _parts(self, context: Array | None) -> "_Ridges":
        m = self.num_ridges
        r, r_tilde, b = jnp.split(self.params(context), [m * m, 2 * m * m])
        r, r_tilde = r.reshape(m, m, -1), r_tilde.reshape(m, m, -1)
        slope = _ridge(self.activation).max_slope
        strict = np.triu(np.ones((m, m)), 1)[:, :, None].astype(r.dtype)
        diagonal = np.arange(m)
        strength = above_minus_one(r[diagonal, diagonal]) / slope
        # softplus, shifted to be 1 at 0.
        scale = jax.nn.softplus(r_tilde[diagonal, diagonal] + np.log(np.expm1(1.0)))
        return _Ridges(strength, scale, r * strict, r_tilde * strict, b)

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        ridge, frame, parts = _ridge(self.activation), self._frame(), self._parts(context)
        added, slopes = _ridges(frame.T @ x, parts, ridge)
        return x + frame @ added, jnp.log1p(parts.strength * slopes).sum(0)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        ridge, frame, parts = _ridge(self.activation), self._frame(), self._parts(context)

        def forward(s: Array, parts: _Ridges) -> tuple[Array, Array]:
            added, slopes = _ridges(s, parts, ridge)
            return s + added, jnp.log1p(parts.strength * slopes)

        def solve(v: Array, parts: _Ridges) -> Array:
            return _solve_ridges(v, parts, ridge)

        s = triangular_root(solve, forward, frame.T @ y, parts)
        added, slopes = _ridges(s, parts, ridge)
        return y - frame @ added, -jnp.log1p(parts.strength * slopes).sum(0)


class _Ridges(NamedTuple):
    """M ridges, each array with the rows last (or one column for all rows).

    ``strength`` and ``scale``: the products and the diagonal of R-tilde, ``(M, rows)``; ``r`` and
    ``r_tilde``: the strict upper triangles, ``(M, M, rows)``; ``b``: ``(M, rows)``.
    """

    strength: Array
    scale: Array
    r: Array
    r_tilde: Array
    b: Array


def _ridges(s: Array, parts: _Ridges, ridge: Ridge) -> tuple[Array, Array]:
    """What the ridges add to the coordinates ``s`` along the frame, and the slopes of h."""
    p = parts.scale * s + (parts.r_tilde * s).sum(1) + parts.b
    h = ridge.function(p)
    return parts.strength / parts.scale * h + (parts.r * h).sum(1), ridge.derivative(p)


def _solve_ridges(v: Array, parts: _Ridges, ridge: Ridge) -> Array:
    """Coordinates along the frame, from the last ridge, which sees itself alone, to the first."""
    m = len(v)
    strength, scale, b = (
        jnp.broadcast_to(a, v.shape) for a in (parts.strength, parts.scale, parts.b)
    )

    def step(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        s, h = state
        i = m - 1 - k
        shift = b[i] + (parts.r_tilde[i] * s).sum(0)
        right = scale[i] * (v[i] - (parts.r[i] * h).sum(0))
        t = _solve_along(ridge, strength[i], shift, right)
        return s.at[i].set(t / scale[i]), h.at[i].set(ridge.function(t + shift))

    return jax.lax.fori_loop(0, m, step, (jnp.zeros_like(v), jnp.zeros_like(v)))[0]
