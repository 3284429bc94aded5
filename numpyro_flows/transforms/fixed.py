"""Transforms whose numbers never train: NumPyro's own transforms, and standardisation."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import sum_rightmost

from ..nn import full_product
from ..parts import Fixed
from ..transform import ColumnTransform, FlowTransform, Wrapper


def _widen(constraint: Constraint, ndim: int) -> Constraint:
    extra = ndim - constraint.event_dim
    return constraints.independent(constraint, extra) if extra else constraint


class NumPyroTransform(FlowTransform):
    """A NumPyro transform as a flow transform, its numbers fixed.

    This is how supports enter a flow: ``NumPyroTransform(biject_to(constraint), (dim,))``. A
    transform of smaller event dimension applies to each coordinate, log-determinants summed.

    :param transform: any NumPyro bijection; Python numbers in it become arrays.
    :param shape: event shape of its input.
    :raises TypeError: if ``transform`` is not a NumPyro ``Transform`` or holds integer arrays.
    :raises ValueError: if it needs more event axes than ``shape`` has.

    >>> from numpyro.distributions import biject_to, constraints
    >>> NumPyroTransform(biject_to(constraints.simplex), (3,)).out_shape
    (4,)
    """

    transform: Fixed
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, transform: Transform, shape: tuple[int, ...]):
        if not isinstance(transform, Transform):
            raise TypeError(
                f"Expected a NumPyro Transform, got {type(transform).__name__}. "
                "For a constraint use `numpyro.distributions.biject_to(constraint)`."
            )
        self.shape = tuple(shape)
        if transform.domain.event_dim > len(self.shape):
            raise ValueError(
                f"{type(transform).__name__} acts on events with {transform.domain.event_dim} "
                f"axes, but shape {self.shape} has {len(self.shape)}."
            )
        for leaf in jax.tree.leaves(transform):
            if jnp.ndim(leaf) and not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(
                    f"{type(transform).__name__}: expected floating arrays in it, got one of dtype "
                    f"{jnp.result_type(leaf)}. Write bounds as floats; permutations go into "
                    "`nf.transforms.Scan`."
                )
        self.transform = Fixed(jax.tree.map(lambda leaf: jnp.asarray(leaf, float), transform))

    def _inside(self) -> str:
        return type(self.transform.value).__name__

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(self.transform.value.forward_shape(self.shape))

    @property
    def domain(self) -> Constraint:
        return _widen(self.transform.value.domain, len(self.event_shape))

    @property
    def codomain(self) -> Constraint:
        return _widen(self.transform.value.codomain, len(self.out_shape))

    def _cast(self, dtype: Any) -> Transform:
        # In float64 mode a float32 value must not be promoted by a bound of the support.
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self.transform.value)

    def _sum(self, transform: Transform, log_det: ArrayLike) -> Array:
        return sum_rightmost(log_det, len(self.shape) - transform.domain.event_dim)

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        transform = self._cast(x.dtype)
        y, intermediates = transform.call_with_intermediates(x)
        return y, self._sum(transform, transform.log_abs_det_jacobian(x, y, intermediates))

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        transform = self._cast(y.dtype)
        x = transform.inv(y)
        return x, -self._sum(transform, transform.log_abs_det_jacobian(x, y))


def _numbers(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Fixed:
    array = jnp.asarray(value, jnp.result_type(float, value))
    try:
        return Fixed(jnp.broadcast_to(array, shape))
    except ValueError as error:
        raise ValueError(f"{name}: expected shape {shape}, got {jnp.shape(value)}.") from error


class Standardized(Wrapper):
    r"""A transform in standardised coordinates: :math:`y = m + s \, T(x; (c - m_c) / s_c)`.

    The numbers :math:`m, s, m_c, s_c` are fixed; T trains on data and contexts of mean 0 and
    scale 1 whatever their units, and the log-determinant :math:`\sum_i \log s_i` makes densities
    those of the original units. ``nf.fit`` puts it in and, on a fitted flow, replaces its numbers.

    :param transform: the transform T, onto an unconstrained space.
    :param loc: m, broadcast to ``transform.out_shape``.
    :param scale: s, positive, broadcast to the same shape.
    :param context_loc: m_c, broadcast to ``(context_dim,)``; 0 by default.
    :param context_scale: s_c, positive, broadcast to the same shape; 1 by default.
    :raises ValueError: for numbers of a shape that does not broadcast.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> core = nf.realnvp(jax.random.key(0), 2).transform
    >>> Standardized(core, 5.0, jnp.array([1.0, 2.0]))(jnp.ones(2))
    Array([6., 7.], dtype=float32)
    """

    loc: Fixed
    scale: Fixed
    context_loc: Fixed
    context_scale: Fixed

    def __init__(
        self,
        transform: FlowTransform,
        loc: ArrayLike,
        scale: ArrayLike,
        context_loc: ArrayLike | None = None,
        context_scale: ArrayLike | None = None,
    ):
        self.transform = transform
        shape, width = transform.out_shape, (transform.context_dim,)
        self.loc = _numbers("loc", loc, shape)
        self.scale = _numbers("scale", scale, shape)
        self.context_loc = _numbers(
            "context_loc", 0.0 if context_loc is None else context_loc, width
        )
        self.context_scale = _numbers(
            "context_scale", 1.0 if context_scale is None else context_scale, width
        )

    def standardize_context(self, context: Array | None) -> Array | None:
        """The context as T sees it."""
        if context is None:
            return None
        return (context - self.context_loc.value) / self.context_scale.value

    @property
    def log_det(self) -> Array:
        """The constant log-determinant of the affine part, a scalar."""
        return jnp.log(self.scale.value).sum()

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        y, log_det = self.transform.forward_and_log_det(x, self.standardize_context(context))
        return self.loc.value + self.scale.value * y, log_det + self.log_det

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        y = (y - self.loc.value) / self.scale.value
        x, log_det = self.transform.inverse_and_log_det(y, self.standardize_context(context))
        return x, log_det - self.log_det

    def initialized(
        self, value: Array, context: Array | None, forward: bool
    ) -> tuple[FlowTransform, Array]:
        context = self.standardize_context(context)
        if forward:
            transform, value = self.transform.initialized(value, context, True)
            value = self.loc.value + self.scale.value * value
        else:
            value = (value - self.loc.value) / self.scale.value
            transform, value = self.transform.initialized(value, context, False)
        return eqx.tree_at(lambda t: t.transform, self, transform), value


class FixedAffine(ColumnTransform):
    r"""Affine map with fixed numbers: :math:`y = m + s \odot (I + Q (L - I) Q^\top) x`.

    Q has r orthonormal columns and L is lower triangular. With r = 0 the map is diagonal; with
    Q = I it is any lower-triangular one, as a Cholesky factor of a covariance; in between, its
    covariance is diagonal plus rank r. Log-determinant :math:`\sum_i \log s_i + \sum_j \log
    L_{jj}`. Cost O(dim r) in both directions, O(dim^2) with Q = I. It is the frozen preconditioner
    of ``nf.AutoFlow``.

    :param loc: m, shape ``(dim,)``.
    :param scale: s, positive, broadcast to ``(dim,)``.
    :param frame: Q, shape ``(dim, r)``; by default I where there is a core.
    :param core: L with a positive diagonal, shape ``(r, r)``; by default there is none, and r = 0.
    :raises ValueError: for shapes that do not fit together.

    >>> import jax.numpy as jnp
    >>> FixedAffine(jnp.array([1.0, 2.0]), 3.0)(jnp.ones(2))
    Array([4., 5.], dtype=float32)
    """

    loc: Fixed
    scale: Fixed
    frame: Fixed
    core: Fixed

    def __init__(
        self,
        loc: ArrayLike,
        scale: ArrayLike,
        frame: ArrayLike | None = None,
        core: ArrayLike | None = None,
    ):
        if jnp.ndim(loc) != 1 or (frame is not None and core is None):
            raise ValueError(
                f"FixedAffine: expected loc of shape (dim,), got {jnp.shape(loc)}, and frame and "
                "core together, a core alone, or none of them."
            )
        (dim,) = jnp.shape(loc)
        # A frame without columns beside a core is the identity.
        columns = 0 if frame is None else jnp.shape(frame)[-1]
        rank = 0 if core is None else columns or dim
        self._set_sizes(dim)
        self.loc = _numbers("loc", loc, (dim,))
        self.scale = _numbers("scale", scale, (dim,))
        dtype = self.loc.value.dtype
        self.frame = _numbers(
            "frame", jnp.zeros((dim, 0), dtype) if frame is None else frame, (dim, columns)
        )
        self.core = _numbers(
            "core", jnp.zeros((0, 0), dtype) if core is None else core, (rank, rank)
        )

    @property
    def standard_deviation(self) -> Array:
        """Of each coordinate, if x is standard normal; shape ``(dim,)``."""
        frame, core = self.frame.value, self.core.value
        if self._is_full:
            return self.scale.value * jnp.sqrt((core**2).sum(-1))
        # The covariance between the scales is I + Q (L L^T - I) Q^T.
        added = ((frame @ core) ** 2 - frame**2).sum(-1)
        return self.scale.value * jnp.sqrt(1 + added)

    @property
    def _is_full(self) -> bool:
        return self.frame.value.shape[1] == 0 and len(self.core.value) > 0

    def _within_frame(self, x: Array, core: Callable[[Array], Array]) -> Array:
        """A function of the coordinates in the frame, and the identity on the others."""
        if self._is_full:
            return core(x)
        frame = self.frame.value
        along = full_product(frame.T, x)
        return x + full_product(frame, core(along) - along)

    def _log_det(self, value: Array) -> Array:
        total = jnp.log(self.scale.value).sum() + jnp.log(jnp.diagonal(self.core.value)).sum()
        return jnp.broadcast_to(total, value.shape[1:])

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        core = self.core.value
        x = self._within_frame(x, lambda along: full_product(core, along))
        return self.loc.value[:, None] + self.scale.value[:, None] * x, self._log_det(x)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        core = self.core.value
        y = (y - self.loc.value[:, None]) / self.scale.value[:, None]
        y = self._within_frame(y, lambda along: solve_triangular(core, along, lower=True))
        return y, -self._log_det(y)
