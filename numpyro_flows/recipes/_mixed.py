"""Discrete coordinates of any recipe: masses of them, then the recipe's flow of the others."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.constraints import Constraint

from ..checks import check_key
from ..coordinates import StandardBase, from_coordinates, integers
from ..distribution import FlowDistribution
from ..elementwise import Cells, Masses, check_cells
from ..mixed import MixedFlow
from ..transforms import Chain, MaskedAutoregressive, Mixed, NumPyroTransform


def mixed_flow(
    key: Array,
    parts: Sequence[Constraint],
    build: Callable[..., FlowDistribution],
    *,
    context_dim: int,
    hidden: Sequence[int],
    activation: str,
    residual: bool,
    base: Distribution | None,
) -> MixedFlow:
    """The flow of coordinates with these constraints, some of them of integers.

    :param build: ``build(key, dim, context_dim=..., support=...)``, the flow of the others.
    :param hidden: and ``activation``, ``residual``: of the masses' network.
    :raises ValueError: for a base of the user's own, or integers without bounds or too many.
    """
    if base is not None:
        raise ValueError(
            "base: expected the default for a support with discrete coordinates, uniform where "
            f"these are, got {type(base).__name__}."
        )
    levels = [integers(part) if part.is_discrete else None for part in parts]
    discrete = tuple(of_one is not None for of_one in levels)
    starts, counts = zip(*filter(None, levels), strict=True)
    check_cells(starts, counts)
    key, rest_key = jax.random.split(check_key(key))
    dtype = jnp.result_type(float)
    cells = Cells(jnp.array(starts, dtype), jnp.array(counts, dtype), max(counts))
    masses = MaskedAutoregressive(
        key,
        len(starts),
        Masses(max(counts)),
        hidden=hidden,
        residual=residual,
        context_dim=context_dim,
        activation=activation,
        encoding=cells,
    )
    angles = [part is constraints.circular for part in parts]
    others = [
        part if angle else constraints.real
        for part, angle, flag in zip(parts, angles, discrete, strict=True)
        if not flag
    ]
    rest = None
    if others:
        width = context_dim + len(starts) * max(counts)
        rest = build(rest_key, len(others), context_dim=width, support=others).transform
    onto = NumPyroTransform(from_coordinates(parts), (len(parts),))
    transform = Chain([Mixed(discrete, cells, masses, rest), onto])
    return MixedFlow(StandardBase(angles, discrete), transform, levels)
