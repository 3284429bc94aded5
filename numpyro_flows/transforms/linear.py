r"""Linear transforms :math:`y = W x + b`, each a factorisation of W with a cheap determinant.

All rows share one product with the matrix. Both directions use the same W, so products are
computed in full precision.
"""

import abc
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import expm, solve_triangular

from ..checks import check_key, check_size
from ..nn import full_product
from ..transform import ColumnTransform


def _lower(below: Array, diagonal: Array) -> Array:
    """The lower triangular matrix with these numbers, row by row, and this diagonal."""
    return jnp.diag(diagonal).at[np.tril_indices(diagonal.size, -1)].set(below)


def _num_below(dim: int) -> int:
    return dim * (dim - 1) // 2


class _Linear(ColumnTransform):
    """What the linear transforms share: a constant log-determinant."""

    @property
    def log_det(self) -> Array | float:
        """The constant log-determinant, a scalar; 0 unless a class says otherwise."""
        return 0.0

    @abc.abstractmethod
    def _apply(self, x: Array) -> Array:
        """Forward, columns ``(dim, rows)`` to columns."""

    @abc.abstractmethod
    def _undo(self, y: Array) -> Array:
        """Inverse, columns ``(dim, rows)`` to columns."""

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._apply(x), jnp.zeros(x.shape[1:], x.dtype) + self.log_det

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._undo(y), jnp.zeros(y.shape[1:], y.dtype) - self.log_det


class Permutation(_Linear):
    r"""Permutation :math:`y_i = x_{p_i}`, fixed, log-determinant 0.

    It has no parameters and is static: transforms with different permutations are different
    programs. ``nf.transforms.Scan`` permutes between its layers by itself.

    :param permutation: the indices p, a permutation of ``range(dim)``; the reversal is
        ``Permutation(range(dim)[::-1])``. x and y have shape ``(*batch, dim)``.
    :raises ValueError: if it is none.

    >>> import jax.numpy as jnp
    >>> Permutation(range(3)[::-1])(jnp.array([1.0, 2.0, 3.0]))
    Array([3., 2., 1.], dtype=float32)
    """

    permutation: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, permutation: Sequence[int]):
        got = tuple(permutation)
        if not got or sorted(got) != list(range(len(got))):
            raise ValueError(
                f"Permutation: expected a permutation of range({len(got)}), got {got}."
            )
        self.permutation = tuple(int(i) for i in got)
        self._set_sizes(len(got))

    def _apply(self, x: Array) -> Array:
        return x[np.array(self.permutation)]

    def _undo(self, y: Array) -> Array:
        return y[np.argsort(self.permutation)]


class DiagonalScale(_Linear):
    r"""Diagonal scaling :math:`y_i = x_i e^{s_i}`, log-determinant :math:`\sum_i s_i`.

    What makes a volume-preserving NICE flow able to weigh coordinates. Starts as the identity.

    Source: Dinh, Krueger & Bengio (2015), arXiv:1410.8516, section 3.3.

    :param dim: number of coordinates; x and y have shape ``(*batch, dim)``.
    :raises ValueError: for ``dim`` below 1.

    >>> import jax.numpy as jnp
    >>> DiagonalScale(2).forward_and_log_det(jnp.ones(2))[1].shape
    ()
    """

    log_scale: Array

    def __init__(self, dim: int):
        self._set_sizes(dim)
        self.log_scale = jnp.zeros(dim)

    @property
    def log_det(self) -> Array:
        return self.log_scale.sum()

    def _apply(self, x: Array) -> Array:
        return x * jnp.exp(self.log_scale)[:, None]

    def _undo(self, y: Array) -> Array:
        return y * jnp.exp(-self.log_scale)[:, None]


class TriangularAffine(_Linear):
    r"""Triangular map :math:`y = L x + b`, :math:`L_{ii} = e^{s_i}`, log-determinant
    :math:`\sum_i s_i`.

    On a standard normal base it is the full-rank Gaussian, L the Cholesky factor of its
    covariance. Starts as the identity. Forward costs one matrix product, the inverse one
    triangular solve, whose relative error grows with the condition number of L.

    :param dim: number of coordinates; x and y have shape ``(*batch, dim)``.
    :raises ValueError: for ``dim`` below 1.

    >>> import jax.numpy as jnp
    >>> TriangularAffine(2).inv(jnp.ones((5, 2))).shape
    (5, 2)
    """

    below: Array
    log_diag: Array
    bias: Array

    def __init__(self, dim: int):
        self._set_sizes(dim)
        self.below = jnp.zeros(_num_below(dim))
        self.log_diag = jnp.zeros(dim)
        self.bias = jnp.zeros(dim)

    @property
    def log_det(self) -> Array:
        return self.log_diag.sum()

    def _matrix(self) -> Array:
        return _lower(self.below, jnp.exp(self.log_diag))

    def _apply(self, x: Array) -> Array:
        return full_product(self._matrix(), x) + self.bias[:, None]

    def _undo(self, y: Array) -> Array:
        return solve_triangular(self._matrix(), y - self.bias[:, None], lower=True)


class LULinear(_Linear):
    r"""General linear map :math:`y = L U x + b`, log-determinant :math:`\sum_i s_i`.

    L is lower triangular with ones on its diagonal, U upper triangular with
    :math:`U_{ii} = e^{s_i}`: every matrix whose leading minors are positive. For the others put a
    :class:`Permutation` before it. Starts as the identity. Forward costs the product L U,
    :math:`O(d^3)`, once for all rows, and one matrix product; the inverse two triangular solves.
    The relative error of a round trip grows with the condition numbers of L and U, which nothing
    bounds.

    Source: Kingma & Dhariwal (2018), arXiv:1807.03039, eq. 10-11; Durkan, Bekasov, Murray &
    Papamakarios (2019), arXiv:1906.04032.

    :param dim: number of coordinates d; x and y have shape ``(*batch, dim)``.
    :param bias: whether there is a b.
    :raises ValueError: for ``dim`` below 1.

    >>> import jax.numpy as jnp
    >>> LULinear(3).forward_and_log_det(jnp.ones((5, 3)))[1].shape
    (5,)
    """

    lower: Array
    upper: Array
    log_diag: Array
    bias: Array | None

    def __init__(self, dim: int, *, bias: bool = True):
        self._set_sizes(dim)
        self.lower = jnp.zeros(_num_below(dim))
        self.upper = jnp.zeros(_num_below(dim))
        self.log_diag = jnp.zeros(dim)
        self.bias = jnp.zeros(dim) if bias else None

    @property
    def log_det(self) -> Array:
        return self.log_diag.sum()

    def _factors(self) -> tuple[Array, Array]:
        lower = _lower(self.lower, jnp.ones_like(self.log_diag))
        return lower, _lower(self.upper, jnp.exp(self.log_diag)).T

    def _apply(self, x: Array) -> Array:
        lower, upper = self._factors()
        y = full_product(full_product(lower, upper), x)
        return y if self.bias is None else y + self.bias[:, None]

    def _undo(self, y: Array) -> Array:
        lower, upper = self._factors()
        x = y if self.bias is None else y - self.bias[:, None]
        return solve_triangular(upper, solve_triangular(lower, x, lower=True))


class DenseLinear(_Linear):
    r"""General linear map :math:`y = W x` by its plain matrix, log-determinant
    :math:`\log |\det W|`.

    Nothing keeps W away from singular matrices but the log-determinant in the loss. Starts as the
    identity. Both directions cost one LU decomposition, :math:`O(d^3)`, once for all rows; forward
    adds a matrix product, the inverse two triangular solves.

    Source: Kingma & Dhariwal (2018), arXiv:1807.03039, eq. 9.

    :param dim: number of coordinates d; x and y have shape ``(*batch, dim)``.
    :raises ValueError: for ``dim`` below 1.

    >>> import jax.numpy as jnp
    >>> DenseLinear(3).inv(jnp.ones((5, 3))).shape
    (5, 3)
    """

    matrix: Array

    def __init__(self, dim: int):
        self._set_sizes(dim)
        self.matrix = jnp.eye(dim)

    @property
    def log_det(self) -> Array:
        return jnp.linalg.slogdet(self.matrix)[1]

    def _apply(self, x: Array) -> Array:
        return full_product(self.matrix, x)

    def _undo(self, y: Array) -> Array:
        return jnp.linalg.solve(self.matrix, y)


class Householder(_Linear):
    r"""Product of reflections :math:`y = H_1 \dots H_k x`, log-determinant 0.

    :math:`H_i = I - 2 u_i u_i^T` with :math:`u_i = v_i / |v_i|`; a :math:`v_i` that is exactly 0
    stands for no reflection. k is even and the vectors start equal in pairs, so a new product is
    the identity to rounding error; :math:`k \ge d - 1` reaches every rotation. It is formed at
    once, :math:`Q = I - U^T T U` with :math:`T^{-1} = \text{striu}(U U^T) + I / 2`, instead of one
    reflection after another. Cost: :math:`O(k^2 d)` once for all rows, and two products with
    (k, d) matrices in both directions; the inverse is the transpose.

    Source: Tomczak & Welling (2016), arXiv:1611.09630; the closed form is the compact WY form of
    Schreiber & Van Loan (1989), SIAM J. Sci. Stat. Comput. 10(1), with T after Joffrain et al.
    (2006), ACM Trans. Math. Softw. 32(2).

    :param key: ``jax.random.key`` for the vectors, each pair a draw from N(0, I).
    :param dim: number of coordinates d; x and y have shape ``(*batch, dim)``.
    :param num_reflections: k; by default the largest even number up to ``dim``, at least 2.
    :raises ValueError: for ``dim`` below 1, or a number of reflections that is odd or below 2.
    :raises TypeError: for a key that is not one.

    >>> import jax, jax.numpy as jnp
    >>> layer = Householder(jax.random.key(0), 4, num_reflections=2)
    >>> bool(jnp.allclose(layer(jnp.ones(4)), jnp.ones(4), atol=1e-6))
    True
    """

    vectors: Array

    def __init__(self, key: Array, dim: int, *, num_reflections: int | None = None):
        self._set_sizes(dim)
        if num_reflections is None:
            num_reflections = max(2, dim - dim % 2)
        if check_size("num_reflections", num_reflections, 2) % 2:
            raise ValueError(
                f"num_reflections: expected an even number, got {num_reflections}. A product of an "
                "odd number has determinant -1, so it could never start as the identity."
            )
        pairs = jax.random.normal(check_key(key), (num_reflections // 2, dim))
        self.vectors = jnp.repeat(pairs, 2, axis=0)

    def _factors(self) -> tuple[Array, Array]:
        """U and T U, both of shape (k, d)."""
        # By the largest entry first: squares of small numbers underflow. As u does not depend on
        # the length of v, its gradient needs no derivative of that entry.
        largest = jax.lax.stop_gradient(jnp.abs(self.vectors).max(-1, keepdims=True))
        vectors = self.vectors / jnp.where(largest > 0, largest, 1.0)
        square = (vectors**2).sum(-1, keepdims=True)
        unit = vectors / jnp.sqrt(jnp.where(square > 0, square, 1.0))
        gram = jnp.triu(full_product(unit, unit.T), 1)
        return unit, solve_triangular(gram + 0.5 * jnp.eye(len(gram), dtype=gram.dtype), unit)

    def _apply(self, x: Array) -> Array:
        unit, scaled = self._factors()
        return x - full_product(unit.T, full_product(scaled, x))

    def _undo(self, y: Array) -> Array:
        unit, scaled = self._factors()
        return y - full_product(scaled.T, full_product(unit, y))


class Orthogonal(_Linear):
    r"""Rotation :math:`y = Q(A) x` by a skew-symmetric A, log-determinant 0.

    A holds :math:`d (d - 1) / 2` free numbers. ``"cayley"`` is
    :math:`Q = (I - A / 2)^{-1} (I + A / 2)`, one linear solve; turns of a plane by exactly
    :math:`\pi` would need infinite numbers and are out of its reach. ``"expm"`` is
    :math:`Q = e^A`, some ten matrix products; it reaches every rotation. Near the identity both
    are :math:`I + A`. Starts as the identity. Cost: :math:`O(d^3)` once for all rows and one
    matrix product in both directions; the inverse is the transpose.

    Source: Helfrich, Willmott & Ye (2018), arXiv:1707.09520 (Cayley); Lezcano-Casado &
    Martinez-Rubio (2019), arXiv:1901.08428 (exponential).

    :param dim: number of coordinates d; x and y have shape ``(*batch, dim)``.
    :param method: ``"cayley"`` or ``"expm"``.
    :raises ValueError: for ``dim`` below 1 or another method.

    >>> import jax.numpy as jnp
    >>> Orthogonal(3, method="expm")(jnp.ones(3))
    Array([1., 1., 1.], dtype=float32)
    """

    skew: Array
    method: str = eqx.field(static=True)

    def __init__(self, dim: int, *, method: str = "cayley"):
        self._set_sizes(dim)
        if method not in ("cayley", "expm"):
            raise ValueError(f"method: expected 'cayley' or 'expm', got {method!r}.")
        self.method = method
        self.skew = jnp.zeros(_num_below(dim))

    def _matrix(self) -> Array:
        lower = _lower(self.skew, jnp.zeros(self.dim, self.skew.dtype))
        skew = lower - lower.T
        if self.method == "expm":
            return expm(skew)
        eye = jnp.eye(self.dim, dtype=skew.dtype)
        return jnp.linalg.solve(eye - skew / 2, eye + skew / 2)

    def _apply(self, x: Array) -> Array:
        return full_product(self._matrix(), x)

    def _undo(self, y: Array) -> Array:
        return full_product(self._matrix().T, y)
