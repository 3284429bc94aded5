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

    @property
    def is_discrete(self) -> bool:
        """Whether some coordinates are."""
        return any(part.is_discrete for part in self.parts)

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
    """The last transform of a flow whose coordinates have these supports.

    Angles and integers pass unchanged.
    """
    transforms = [
        IdentityTransform() if part is constraints.circular or part.is_discrete else biject_to(part)
        for part in parts
    ]
    return PerCoordinateTransform(transforms, coordinates(parts))


def _each(support: Constraint, dim: int) -> tuple[Constraint, ...]:
    base = getattr(support, "base_constraint", support)
    return support.parts if isinstance(support, PerCoordinate) else (base,) * dim


def angles(support: Constraint, dim: int) -> tuple[bool, ...]:
    """Which coordinates of a vector with this support are on the circle."""
    return tuple(part is constraints.circular for part in _each(support, dim))


def discrete(support: Constraint, dim: int) -> tuple[bool, ...]:
    """Which coordinates of a vector with this support are integers."""
    return tuple(bool(part.is_discrete) for part in _each(support, dim))


def integers(part: Constraint) -> tuple[int, int]:
    """The lowest integer that satisfies a constraint, and how many do.

    :raises ValueError: if there is no such range.
    """
    if part is constraints.boolean:
        return 0, 2
    if not isinstance(part, type(constraints.integer_interval(0, 1))):
        raise ValueError(
            f"support: expected `constraints.integer_interval(lowest, highest)` or "
            f"`constraints.boolean` for a discrete coordinate, got {part}. Counts without a bound "
            "need one that no row exceeds."
        )
    lowest, highest = int(part.lower_bound), int(part.upper_bound)
    return lowest, highest - lowest + 1


class StandardBase(Distribution):
    r"""Independent coordinates: N(0, 1), uniform on [-pi, pi) or uniform on [0, 1).

    :param circular: for each coordinate whether it is an angle.
    :param discrete: for each coordinate whether it becomes an integer; by default none does.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    reparametrized_params: ClassVar[list[str]] = []
    pytree_aux_fields = ("circular", "discrete")

    def __init__(
        self,
        circular: Sequence[bool],
        discrete: Sequence[bool] | None = None,
        *,
        validate_args: bool | None = None,
    ):
        self.circular = tuple(bool(flag) for flag in circular)
        none = (False,) * len(self.circular)
        self.discrete = none if discrete is None else tuple(bool(flag) for flag in discrete)
        super().__init__((), (len(self.circular),), validate_args=validate_args)

    @property
    def support(self) -> Constraint:
        kinds = {
            (False, False): constraints.real,
            (True, False): constraints.circular,
            (False, True): constraints.unit_interval,
        }
        pairs = zip(self.circular, self.discrete, strict=True)
        return coordinates([kinds[pair] for pair in pairs])

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = sample_shape + self.shape()
        first, second = jax.random.split(check_key(key))
        # The upper end is open, so a draw is inside the circle whatever the rounding.
        angle = jax.random.uniform(second, shape, minval=-math.pi, maxval=math.pi)
        draws = jnp.where(jnp.array(self.circular), angle, jax.random.normal(first, shape))
        if not any(self.discrete):
            return draws
        unit = jax.random.uniform(jax.random.fold_in(second, 1), shape)
        return jnp.where(jnp.array(self.discrete), unit, draws)

    def log_prob(self, value: Array) -> Array:
        normal = -0.5 * (value**2 + math.log(2 * math.pi))
        terms = jnp.where(jnp.array(self.circular), -math.log(2 * math.pi), normal)
        return jnp.where(jnp.array(self.discrete), 0.0, terms).sum(-1)


def coordinates(parts: Sequence[Constraint]) -> Constraint:
    """The constraint of a vector whose coordinates satisfy ``parts``."""
    if all(part is parts[0] for part in parts):
        return constraints.independent(parts[0], 1)
    return PerCoordinate(parts)
