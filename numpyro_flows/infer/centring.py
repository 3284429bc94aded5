r"""Degrees of centring: coordinates between the centred and the non-centred form of each site.

Where a site's location m and scale s depend on other sites, neither its value x nor
:math:`(x - m) / s` serves everywhere: the first is a funnel where the data say little of x, the
second where they say much. In between lie

.. math:: x = (1 - a) \, m + s^{1 - b} u, \qquad a, b \in [0, 1],

for each element: the centred form with a = b = 1, the non-centred one with 0, NumPyro's
``LocScaleReparam`` but for a shift with a = b. The map from all u to all x is exact, triangular in
the order of the model, with the log-determinant :math:`\sum (1 - b) \log s`. Here x is the site's
unconstrained value, so that for a positive site whose scale depends on others the logarithm of the
scale is a location. The scale of a vector with a covariance is a triangular matrix.

Sources: Papaspiliopoulos, Roberts & Sköld (2007), doi:10.1214/088342307000000014; Gorinova, Moore &
Hoffman (2020), arXiv:1906.03028; Ko & Domke (2025), arXiv:2505.24243.
"""

import functools
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions.transforms import AffineTransform, ExpTransform

from ..parts import Fixed
from ..transforms import FixedAffine

#: a and b of every coordinate of a latent space, each ``(dim,)``.
Degrees: TypeAlias = tuple[Array, Array]
#: Location and scale of unconstrained values; None for what they do not have.
LocScale: TypeAlias = tuple[Any, Any]

#: Evaluations of the sites' locations and scales that one pass may take; more are not worth it.
MOST_LEVELS: Final = 6


class Site(NamedTuple):
    """A site whose location or scale depends on other sites, and which of the two are used."""

    name: str
    has_loc: bool
    has_scale: bool


class Hierarchy(NamedTuple):
    """The sites that can be centred, and how many of them depend on each other in a row."""

    sites: tuple[Site, ...] = ()
    num_levels: int = 0


class Triangular(NamedTuple):
    """A scale of vectors: the lower triangular root of their covariance, ``(*batch, n, n)``."""

    root: Any


@functools.singledispatch
def loc_scale(fn: Any) -> LocScale | None:
    """Location and scale of a distribution's unconstrained values; None for other families.

    A distribution of another library joins by ``loc_scale.register``.
    """
    return None


def _of_the_line(fn: Any) -> LocScale:
    return fn.loc, fn.scale


for _family in (
    dist.AsymmetricLaplace,
    dist.Cauchy,
    dist.Gumbel,
    dist.Laplace,
    dist.LogNormal,  # its unconstrained value is the logarithm, which is normal
    dist.Logistic,
    dist.Normal,
    dist.SoftLaplace,
    dist.StudentT,
):
    loc_scale.register(_family, _of_the_line)


for _family in (dist.HalfCauchy, dist.HalfNormal):
    loc_scale.register(_family, lambda fn: (jnp.log(fn.scale), None))


for _family in (dist.Exponential, dist.Gamma):
    loc_scale.register(_family, lambda fn: (-jnp.log(fn.rate), None))


@loc_scale.register
def _(fn: dist.InverseGamma) -> LocScale:
    return jnp.log(fn.rate), None


@loc_scale.register
def _(fn: dist.Weibull) -> LocScale:
    return jnp.log(fn.scale), 1 / fn.concentration


@loc_scale.register
def _(fn: dist.GaussianRandomWalk) -> LocScale:
    return None, jnp.expand_dims(fn.scale, -1)


@loc_scale.register
def _(fn: dist.MultivariateNormal) -> LocScale:
    return fn.loc, Triangular(fn.scale_tril)


@loc_scale.register
def _(fn: dist.MultivariateStudentT) -> LocScale:
    return fn.loc, Triangular(fn.scale_tril)


@loc_scale.register(dist.Independent)
@loc_scale.register(dist.ExpandedDistribution)
@loc_scale.register(dist.MaskedDistribution)
def _(fn: Any) -> LocScale | None:
    return loc_scale(fn.base_dist)


@loc_scale.register
def _(fn: dist.TransformedDistribution) -> LocScale | None:
    """Affine maps of a family on the line, and the exponential of the result."""
    *inner, last = fn.transforms
    affine = inner if isinstance(last, ExpTransform) else fn.transforms
    found = loc_scale(fn.base_dist)
    if found is None or fn.base_dist.support is not dist.constraints.real:
        return None
    if not all(isinstance(transform, AffineTransform) for transform in affine):
        return None
    loc, scale = found
    for transform in affine:
        loc = transform.loc + transform.scale * loc
        scale = jnp.abs(transform.scale) * scale
    return loc, scale


def of_sites(
    latent: Mapping[str, dict[str, Any]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LocScale]:
    """Locations and scales of the latent sites that have them, in the sites' unconstrained shapes.

    :param latent: the latent sites of a trace.
    :param shapes: unconstrained shapes of the sites in question.
    """
    found = {}
    for name, shape in shapes.items():
        parts = loc_scale(latent[name]["fn"])
        if parts is None:
            continue
        loc, scale = parts
        found[name] = (_broadcast(loc, shape), _broadcast(scale, shape))
    return found


def _broadcast(part: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(part, Triangular):
        return Triangular(jnp.broadcast_to(part.root, (*shape, shape[-1])))
    return None if part is None else jnp.broadcast_to(part, shape)


def hierarchy_of(reads: Mapping[str, tuple[set[str], set[str]]]) -> Hierarchy:
    """The sites whose locations or scales depend on others.

    A location or a scale that depends on its own site, as in a time series inside ``scan``, is left
    out; and so are all locations where too many sites depend on each other in a row.

    :param reads: by site, in the model's order, what its location and its scale depend on.
    """
    for with_locs in (True, False):
        sites, needed = [], {}
        for name, (of_loc, of_scale) in reads.items():
            has_loc = with_locs and bool(of_loc) and name not in of_loc
            has_scale = bool(of_scale) and name not in of_scale
            if has_loc or has_scale:
                sites.append(Site(name, has_loc, has_scale))
                needed[name] = (of_loc if has_loc else set()) | (of_scale if has_scale else set())
        num_levels = _longest_path(needed)
        if num_levels <= min(MOST_LEVELS, len(sites)):
            return Hierarchy(tuple(sites), num_levels)
    return Hierarchy()


def _longest_path(needed: Mapping[str, set[str]]) -> int:
    """How many sites depend on each other in a row; one more than there are if it never ends."""
    level = dict.fromkeys(needed, 0)
    for _ in range(len(needed) + 1):
        before = level
        level = {
            name: 1 + max((before[other] for other in names if other in before), default=0)
            for name, names in needed.items()
        }
        if level == before:
            break
    return max(level.values(), default=0)


def moved(
    hierarchy: Hierarchy,
    parts: Mapping[str, LocScale],
    degrees: tuple[Mapping[str, Array], Mapping[str, Array]],
    values: Mapping[str, Array],
    *,
    inverse: bool = False,
) -> tuple[dict[str, Array], Array | float]:
    """Values x of the sites from u, or with ``inverse`` u from x, and the map's log-determinant.

    :param parts: locations and scales, as :func:`of_sites` found them.
    :param degrees: a and b by site.
    :param values: u or x of all sites.
    """
    of_loc, of_scale = degrees
    result = dict(values)
    log_det: Array | float = 0.0
    for name, has_loc, has_scale in hierarchy.sites:
        loc, scale = parts[name]
        shift = (1 - of_loc[name]) * loc if has_loc else jnp.zeros_like(values[name])
        value = values[name] - shift if inverse else values[name]
        power = 1 - of_scale[name]
        if not has_scale:
            scaled = value
        elif isinstance(scale, Triangular):
            root, log_scale = _between(scale.root, power)
            log_det = log_det + log_scale.sum()
            if inverse:
                scaled = jax.lax.linalg.triangular_solve(
                    root, value[..., None], left_side=True, lower=True
                )[..., 0]
            else:
                scaled = (root @ value[..., None])[..., 0]
        else:
            log_scale = power * jnp.log(scale)
            log_det = log_det + log_scale.sum()
            scaled = value * jnp.exp(-log_scale if inverse else log_scale)
        result[name] = scaled if inverse else shift + scaled
    return result, -log_det if inverse else log_det


def _between(root: Array, power: Array) -> tuple[Array, Array]:
    """A triangular matrix between the identity and a root, and the logarithm of its diagonal.

    With :math:`L = D C`, D diagonal and C of unit diagonal, row i is that of
    :math:`D^p (I + p (C - I))` at :math:`p = p_i`.
    """
    diagonal = jnp.diagonal(root, axis1=-2, axis2=-1)
    log_scale, identity = power * jnp.log(diagonal), jnp.eye(root.shape[-1], dtype=root.dtype)
    unit = root / diagonal[..., None]
    return jnp.exp(log_scale)[..., None] * (
        identity + power[..., None] * (unit - identity)
    ), log_scale


class CentredAffine(FixedAffine):
    """A preconditioner whose coordinates are those of some degrees of centring.

    :param affine: the map onto these coordinates.
    :param degrees: a and b, each ``(dim,)``.
    """

    degrees: Fixed

    def __init__(self, affine: FixedAffine, degrees: Degrees):
        super().__init__(
            affine.loc.value, affine.scale.value, affine.frame.value, affine.core.value
        )
        self.degrees = Fixed(degrees)


def degrees_of(affine: FixedAffine) -> Degrees | None:
    """The degrees of centring of a preconditioner's coordinates; None for the latent space's."""
    if isinstance(affine, CentredAffine):
        return jax.lax.stop_gradient(affine.degrees.value)
    return None
