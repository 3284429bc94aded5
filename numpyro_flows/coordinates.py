"""Vectors with a support for each coordinate: the constraint, its bijection, the base distribution.

An angle stays on the circle through the whole flow: its base is uniform on [-pi, pi), its
elementwise maps are circular, and conditioners read its cosine and sine
(:class:`~numpyro_flows.elementwise.Angles`).
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions import Distribution, biject_to, constraints
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import IdentityTransform, Transform

from .checks import check_key


class PerCoordinate(Constraint):
    """A constraint for each coordinate of a vector.

    :param parts: scalar constraints, one per coordinate.
    """

    def __init__(self, parts: Sequence[Constraint]):
        self.parts = tuple(parts)

    def __repr__(self) -> str:
        return f"PerCoordinate({', '.join(map(repr, self.parts))})"

    @property
    def event_dim(self) -> int:
        return 1

    def __call__(self, x: Array) -> Array:
        return jnp.stack([part(x[..., i]) for i, part in enumerate(self.parts)], -1).all(-1)

    def feasible_like(self, prototype: Array) -> Array:
        pieces = [part.feasible_like(prototype[..., i]) for i, part in enumerate(self.parts)]
        return jnp.stack(pieces, -1)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.parts,), (("parts",), {})

    def eq(self, other: object, static: bool = False) -> bool | Array:
        return isinstance(other, PerCoordinate) and _equal(self.parts, other.parts, static)


class PerCoordinateTransform(Transform):
    """A scalar NumPyro transform for each coordinate of a vector.

    :param parts: the transforms.
    :param constraint: the constraint that they map onto.
    """

    domain = constraints.real_vector

    def __init__(self, parts: Sequence[Transform], constraint: Constraint):
        self.parts = tuple(parts)
        self.constraint = constraint

    @property
    def codomain(self) -> Constraint:
        return self.constraint

    def __call__(self, x: Array) -> Array:
        return jnp.stack([part(x[..., i]) for i, part in enumerate(self.parts)], -1)

    def _inverse(self, y: Array) -> Array:
        return jnp.stack([part.inv(y[..., i]) for i, part in enumerate(self.parts)], -1)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: None = None) -> Array:
        terms = [
            jnp.broadcast_to(part.log_abs_det_jacobian(x[..., i], y[..., i]), x.shape[:-1])
            for i, part in enumerate(self.parts)
        ]
        return jnp.stack(terms, -1).sum(-1)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.parts, self.constraint), (("parts", "constraint"), {})

    def eq(self, other: object, static: bool = False) -> bool | Array:
        if not isinstance(other, PerCoordinateTransform):
            return False
        equal = self.codomain.eq(other.codomain, static=static)
        return equal & _equal(self.parts, other.parts, static)


def _equal(a: Sequence[Any], b: Sequence[Any], static: bool) -> bool | Array:
    """Whether constraints or transforms are equal, pair by pair."""
    if len(a) != len(b):
        return False
    equal: bool | Array = True
    for x, y in zip(a, b, strict=True):
        equal = equal & x.eq(y, static=static)
    return equal


@biject_to.register(PerCoordinate)
def _biject_to(constraint: PerCoordinate) -> PerCoordinateTransform:
    # As NumPyro does for circular sites, this cuts the circle: it is for HMC over such a vector.
    return PerCoordinateTransform([biject_to(part) for part in constraint.parts], constraint)


def from_coordinates(parts: Sequence[Constraint]) -> PerCoordinateTransform:
    """The last transform of a flow whose coordinates have these supports; angles pass unchanged."""
    transforms = [
        IdentityTransform() if part is constraints.circular else biject_to(part) for part in parts
    ]
    return PerCoordinateTransform(transforms, coordinates(parts))


def angles(support: Constraint, dim: int) -> tuple[bool, ...]:
    """Which coordinates of a vector with this support are on the circle."""
    base = getattr(support, "base_constraint", support)
    parts = support.parts if isinstance(support, PerCoordinate) else (base,) * dim
    return tuple(part is constraints.circular for part in parts)


class StandardBase(Distribution):
    r"""Independent coordinates, N(0, 1) where real and uniform on [-pi, pi) where circular.

    :param circular: for each coordinate whether it is an angle.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    reparametrized_params: ClassVar[list[str]] = []
    pytree_aux_fields = ("circular",)

    def __init__(self, circular: Sequence[bool], *, validate_args: bool | None = None):
        self.circular = tuple(bool(flag) for flag in circular)
        super().__init__((), (len(self.circular),), validate_args=validate_args)

    @property
    def support(self) -> Constraint:
        return coordinates(
            [constraints.circular if flag else constraints.real for flag in self.circular]
        )

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = sample_shape + self.shape()
        first, second = jax.random.split(check_key(key))
        # The upper end is open, so a draw is inside the circle whatever the rounding.
        angle = jax.random.uniform(second, shape, minval=-math.pi, maxval=math.pi)
        return jnp.where(jnp.array(self.circular), angle, jax.random.normal(first, shape))

    def log_prob(self, value: Array) -> Array:
        normal = -0.5 * (value**2 + math.log(2 * math.pi))
        terms = jnp.where(jnp.array(self.circular), -math.log(2 * math.pi), normal)
        return terms.sum(-1)


def coordinates(parts: Sequence[Constraint]) -> Constraint:
    """The constraint of a vector whose coordinates satisfy ``parts``."""
    if all(part is parts[0] for part in parts):
        return constraints.independent(parts[0], 1)
    return PerCoordinate(parts)
