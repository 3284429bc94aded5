"""Parts that recipes are built from: supports, permutations, stacks of layers, and the flow."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution, Normal, biject_to, constraints
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform

from ..checks import check_key, check_size, is_real
from ..coordinates import (
    PerCoordinate,
    StandardBase,
    angles,
    coordinates,
    discrete,
    from_coordinates,
)
from ..distribution import FlowDistribution
from ..elementwise import Affine, ByKind, ElementwiseMap
from ..transform import FlowTransform
from ..transforms import Chain, NumPyroTransform, Scan
from ._options import Support


def permutations(kind: str | Sequence[int], dim: int, depth: int, seed: int) -> list[list[int]]:
    """One permutation after each of ``depth`` layers; together they are the identity.

    :raises ValueError: for an unknown name or a list that is no permutation.
    """
    rng = np.random.default_rng(seed)
    swap = np.roll(np.arange(dim), dim // 2)
    kinds: dict[str, Callable[[int], np.ndarray]] = {
        # Two layers with the swap between them move every coordinate; chance alone might leave
        # some out, in two dimensions even for several layers. The pairs are shuffled.
        "random": lambda layer: rng.permutation(dim) if layer % 2 and dim > 2 else swap,
        "reverse": lambda layer: np.arange(dim)[::-1],
        "swap": lambda layer: swap,
    }
    if isinstance(kind, str):
        if kind not in kinds:
            raise ValueError(
                f"permutation: expected one of {sorted(kinds)} or a permutation of "
                f"range({dim}), got {kind!r}."
            )
        between = [kinds[kind](layer) for layer in range(depth - 1)]
    else:
        if sorted(kind) != list(range(dim)):
            raise ValueError(f"permutation: expected one of range({dim}), got {kind!r}.")
        between = [np.array(kind)] * (depth - 1)
    total = np.arange(dim)
    for permutation in between:
        total = total[permutation]
    return [p.tolist() for p in (*between, np.argsort(total))]


def channel_permutations(channels: int, depth: int, seed: int) -> list[list[int]]:
    """The default permutations of ``coupling_flow``, for the channels of images.

    :param channels: number of channels.
    :param depth: number of layers.
    :param seed: seed of the permutations between pairs of layers.
    :return: ``depth`` permutations of ``range(channels)``.
    :raises ValueError: for sizes below 1.

    >>> [sorted(each) for each in channel_permutations(4, 2, 0)]
    [[0, 1, 2, 3], [0, 1, 2, 3]]
    """
    return permutations("random", channels, depth, seed)


def stack(
    build: Callable[..., FlowTransform],
    key: Array,
    dim: int,
    depth: int,
    between: list[list[int]] | None,
    flags: tuple[bool, ...] = (),
) -> Scan:
    """``depth`` layers ``build(key, dim)``, each followed by its permutation.

    With angles, ``build(key, dim, circular=...)`` gets the flags in the order of that layer.
    """
    keys = jax.random.split(check_key(key), depth)
    if not any(flags):
        return Scan(jax.vmap(lambda key: build(key, dim))(keys), between)
    current, each = np.array(flags, float), []
    for permutation in between or [list(range(dim))] * depth:
        each.append(current)
        current = current[permutation]
    stacked = jnp.array(np.stack(each), jnp.result_type(float))
    return Scan(
        jax.vmap(lambda key, flags: build(key, dim, circular=flags))(keys, stacked), between
    )


def bounded_affine(log_scale_bound: float | None, depth: int) -> Affine:
    """The affine map of a flow with ``depth`` layers, with its default bound if None is given."""
    tightest = min(2.0, 16 / check_size("depth", depth))
    return Affine(tightest if log_scale_bound is None else log_scale_bound)


def map_for(
    map: ElementwiseMap, circular_map: ElementwiseMap | None, flags: tuple[bool, ...]
) -> ElementwiseMap:
    """The map of layers some of whose coordinates are angles.

    :raises ValueError: for angles without a circular map.
    """
    if not any(flags):
        return map
    if circular_map is None:
        raise _refuse_angles(type(map).__name__)
    return circular_map if all(flags) else ByKind(map, circular_map)


def check_support(support: Support, dim: int) -> Constraint:
    """The support as one constraint.

    :raises TypeError: for what is no constraint.
    :raises ValueError: for a tuple that is not of one scalar constraint per coordinate.
    """
    if isinstance(support, Sequence):
        if len(support) != dim or not all(isinstance(part, Constraint) for part in support):
            raise ValueError(
                f"support: expected one NumPyro constraint for each of {dim} coordinates, got "
                f"{support!r}."
            )
        if any(part.event_dim for part in support):
            raise ValueError(
                f"support: expected scalar constraints for the coordinates, got {support!r}."
            )
        return coordinates(support)
    if not isinstance(support, Constraint):
        raise TypeError(
            f"support: expected a NumPyro constraint, got {type(support).__name__}; "
            "for example `numpyro.distributions.constraints.positive`."
        )
    return support


def check_no_angles(what: str, support: Support, dim: int) -> Constraint:
    """The support as one constraint, for flows that cannot stay on a circle.

    :raises ValueError: for angles.
    """
    constraint = check_support(support, dim)
    if any(angles(constraint, dim)):
        raise _refuse_angles(what)
    return constraint


def _refuse_angles(what: str) -> ValueError:
    return ValueError(
        f"support: expected real or constrained coordinates, got angles, which {what} would tear "
        "at +-pi. Use `nf.nsf` or `nf.nsf_ar`."
    )


def flow_on(
    support: Constraint, transform: FlowTransform, base: Distribution | None
) -> FlowDistribution:
    """The flow base -> transform -> support, with the default base if None is given.

    :raises ValueError: for a base on the line where coordinates are angles.
    """
    (dim,) = transform.event_shape
    if any(discrete(support, dim)):
        raise ValueError(
            "support: expected real or constrained coordinates, got discrete coordinates, which "
            "have masses and no density here. Use `nf.nsf_ar`, `nf.nsf` or another recipe of "
            "autoregressive or coupling layers, or `nf.dequantize`."
        )
    flags = angles(support, dim)
    if base is None:
        base = StandardBase(flags) if any(flags) else Normal(jnp.zeros(dim), jnp.ones(dim))
    elif isinstance(base, Distribution):
        if any(flags) and is_real(base.support):
            raise ValueError(
                f"base: expected a distribution on the circle for angles, got "
                f"{type(base).__name__} on the line, whose mass beyond +-pi would be lost. Take "
                "the default (uniform), or one such as `VonMises` if all coordinates are angles."
            )
        if base.shape() == ():
            base = base.expand((dim,))
    onto = _from_real_numbers(support, flags)
    if onto is not None:
        transform = Chain([transform, NumPyroTransform(onto, transform.out_shape)])
    return FlowDistribution(base, transform)


def _from_real_numbers(support: Constraint, flags: tuple[bool, ...]) -> Transform | None:
    """The map onto the support that ends a flow, None for the identity; angles pass unchanged."""
    if isinstance(support, PerCoordinate):
        return from_coordinates(support.parts)
    if any(flags):
        return from_coordinates((constraints.circular,) * len(flags))
    return None if is_real(support) else biject_to(support)


def each_coordinate(support: Constraint, dim: int) -> tuple[Constraint, ...]:
    """The scalar constraint of each coordinate.

    :raises ValueError: for a constraint of several coordinates together.
    """
    if isinstance(support, PerCoordinate):
        return support.parts
    part = getattr(support, "base_constraint", support)
    if part.event_dim:
        raise ValueError(
            f"support: expected a constraint of each coordinate, got {support}, which binds them "
            "together. Augmented flows take scalar constraints or a tuple of them."
        )
    return (part,) * dim
