"""The unconstrained space of a model's latent sites, and the model's density there."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.util import sum_rightmost

from ..compilation import jit
from ..parts import Fixed
from ..transform import FlowTransform
from .centring import Hierarchy, hierarchy_of, moved, of_sites
from .density import log_joint, whole_plates
from .normals import Matrix
from .preconditioner import Rows
from .supports import Winding, constrain, with_idle, wrapped
from .traced import Traced, traced_at

Sites = dict[str, Array]


class LatentSpace(eqx.Module):
    """Sites, shapes and supports of a model: from a real vector to the sites' values and back.

    :ivar supports: of each latent site, with the numbers that the current arguments give them.
    :ivar shapes: unconstrained shape of each site, in the order of the vector.
    :ivar event_dims: number of event axes of each site.
    :ivar circular: names of the sites that are angles, which are unwound (``supports.py``).
    :ivar idle: by site, which elements of its batch shape have no density (``supports.py``).
    """

    supports: dict[str, Constraint]
    idle: dict[str, Array]
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    event_dims: tuple[tuple[str, int], ...] = eqx.field(static=True)
    circular: tuple[str, ...] = eqx.field(static=True)

    @property
    def depends_on_arguments(self) -> bool:
        """Whether a support or a mask holds numbers, which other arguments may change."""
        return bool(jax.tree.leaves((self.supports, self.idle)))

    @property
    def dim(self) -> int:
        """Size of the vector."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    def unpack(self, u: Any) -> Sites:
        """Unconstrained values of the sites, ``(*batch, *shape)``, from ``(*batch, dim)``."""
        sites, begin = {}, 0
        for name, shape in self.shapes:
            end = begin + math.prod(shape)
            sites[name] = u[..., begin:end].reshape(u.shape[:-1] + shape)
            begin = end
        return sites

    def pack(self, sites: Mapping[str, Array]) -> Array:
        """The vector, ``(*batch, dim)``, of unconstrained values ``(*batch, *shape)``."""
        flat = []
        for name, shape in self.shapes:
            value = jnp.asarray(sites[name])
            flat.append(value.reshape(*value.shape[: value.ndim - len(shape)], -1))
        return jnp.concatenate(flat, axis=-1)

    def constrain(
        self, u: Array, windings: Mapping[str, Winding]
    ) -> Iterator[tuple[str, Array, Array]]:
        """Name, value and log-determinant, ``(*batch,)`` of the site, of each site."""
        event_dims = dict(self.event_dims)
        return constrain(self.unpack(u), self.supports, event_dims, windings, self.idle)

    def with_idle(self, names: Collection[str]) -> "LatentSpace":
        """This space with the idle elements of these sites alone."""
        idle = {name: where for name, where in self.idle.items() if name in names}
        return dataclasses.replace(self, idle=idle)

    def unread(self, starts: Matrix, grads: Matrix) -> list[str]:
        """The sites with idle elements that the model does not use elsewhere.

        There the gradient is that of the density which idle elements are given, ``-u``, exactly. A
        masked prior of what the model does use is a flat one.

        :param starts: points of the space, ``(n, dim)``.
        :param grads: gradients of the log density there.
        """
        u, slope = self.unpack(starts), self.unpack(grads)
        return [
            name
            for name, where in self.idle.items()
            if (np.asarray(slope[name] + u[name])[:, np.asarray(where)] == 0).all()
        ]

    def windings(self, loc: Any, scale: Callable[[], Array] | None = None) -> dict[str, Winding]:
        """What unwinds the angles, around a point; as wide as the circle without a scale.

        :param loc: shape ``(dim,)``.
        :param scale: returns standard deviations, shape ``(dim,)``.
        """
        if not self.circular:
            return {}
        # Below 1 a narrower window gains nothing: the next turn has a share of exp(-20).
        width = jnp.full_like(loc, jnp.pi) if scale is None else jnp.clip(scale(), 1.0, jnp.pi)
        locs, scales = self.unpack(loc), self.unpack(width)
        return {name: Winding(locs[name], scales[name]) for name in self.circular}

    def wind(self, u: Array, windings: Mapping[str, Winding]) -> Array:
        """The vector with its angles at their place on the line."""
        if not windings:
            return u
        sites = self.unpack(u)
        return self.pack(sites | {name: w.inv(sites[name]) for name, w in windings.items()})

    def log_winding(self, u: Array, windings: Mapping[str, Winding]) -> Array:
        """Log probability of the angles' winding numbers at u; a scalar."""
        sites = self.unpack(u)
        terms = [w.log_abs_det_jacobian(sites[name], None).sum() for name, w in windings.items()]
        return sum(terms, jnp.zeros((), u.dtype))


def _value_and_grad(value: Callable) -> Callable:
    return jax.value_and_grad(value, argnums=1, has_aux=True)


def _forward_value_and_grad(value: Callable) -> Callable:
    """The same in forward mode: as many passes as there are coordinates."""

    def value_and_grad(arguments: Any, x: Sites, key: Array) -> Any:
        def twice(x: Sites) -> Any:
            found = value(arguments, x, key)
            return found[0], found

        grad, found = jax.jacfwd(twice, has_aux=True)(x)
        return found, grad

    return value_and_grad


class LogDensity(eqx.Module):
    r"""Log density of a model over its latent space, traced at the current arguments.

    :math:`\log p(\theta(x), y) + \log |\det \theta'(x)|` for x in the latent space; angles count
    as themselves there. It is a pytree: the arrays that the model read are leaves, and programs
    that take it are compiled once for all models that do the same with other numbers.

    Its coordinates u are the latent space's own, or with :meth:`centred` those in which sites have
    some degree of centring (``centring.py``).

    :ivar space: the latent space.
    :ivar key: what the model's own draws depend on (rows of subsampled plates).
    :ivar hierarchy: the sites whose location or scale depends on other sites.
    :ivar degrees: their degrees of centring, two vectors of ``(dim,)``; None for x itself.

    :param params: values of the model's own ``param`` sites.
    :param as_nuts: whether a site's scale and mask hold for its log-determinant as well, as
        NumPyro's HMC has it, and not as its guides have it.
    :param whole: whether subsampled plates have all their rows.
    :param forward_mode: whether the gradient is taken in forward mode, as models with a ``while``
        loop need it; their sites are not centred.
    """

    space: LatentSpace
    key: Array
    degrees: tuple[Array, Array] | None
    hierarchy: Hierarchy = eqx.field(static=True)
    _traced: Traced
    _parts: Traced

    def __init__(
        self,
        model: Callable,
        space: LatentSpace,
        args: tuple,
        kwargs: dict[str, Any],
        key: Array,
        params: Mapping[str, Any] | None = None,
        *,
        as_nuts: bool = False,
        whole: bool = False,
        forward_mode: bool = False,
    ):
        params, shapes = dict(params or {}), dict(space.shapes)
        dtype = jnp.result_type(float)

        def value(arguments: Any, x: Sites, key: Array) -> tuple[Array, Any]:
            args, kwargs = arguments
            sites, log_dets = {}, {}
            event_dims = dict(space.event_dims)
            for name in shapes:
                if name in space.circular:
                    sites[name] = wrapped(x[name])
                    continue
                transform = biject_to(space.supports[name])
                sites[name] = transform(x[name])
                log_det = transform.log_abs_det_jacobian(x[name], sites[name])
                extra = log_det.ndim - sites[name].ndim + event_dims[name]
                log_dets[name] = sum_rightmost(log_det, extra)
            with handlers.block(), whole_plates() if whole else contextlib.nullcontext():
                joint = log_joint(model, key, args, kwargs, params | sites)
            if as_nuts:
                log_dets = {name: joint.within(name, term) for name, term in log_dets.items()}
            for name, where in space.idle.items():
                log_dets[name] = with_idle(log_dets[name], x[name], where)
            total = sum((term.sum() for term in log_dets.values()), jnp.zeros((), dtype))
            supports = {name: joint.latent[name]["fn"].support for name in shapes}
            parts = of_sites(joint.latent, {n: s for n, s in shapes.items() if n not in space.idle})
            return (joint.log_density + total).astype(dtype), (joint.sites, supports, parts)

        self.space, self.key, self.degrees = space, key, None
        self._traced = traced_at(
            _forward_value_and_grad(value) if forward_mode else _value_and_grad(value),
            (args, kwargs),
            {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()},
            key,
        )
        (_, (_, supports, parts)), _ = self._traced.outputs
        # Leaves of a dictionary are in the order of its names.
        names, each = sorted(shapes), self._traced.read_by_each()

        def read_by(outputs: Any) -> set[str]:
            """The sites on which outputs may depend."""
            found = set().union(*(each[output] for output in jax.tree.leaves(outputs)))
            return {name for number, name in enumerate(names) if number in found}

        for name in shapes:
            if read_by(supports[name]):
                raise ValueError(
                    f"Site {name!r}: its support depends on other latent sites, which a guide "
                    "over one unconstrained space cannot follow. Draw from a fixed support and "
                    "transform: u ~ Uniform(0, 1), then "
                    f"`numpyro.deterministic({name!r}, low + u * (high - low))`."
                )
        reads = {}
        for name in (name for name in shapes if name in parts):
            loc, scale = parts[name]
            reads[name] = read_by(loc), read_by(scale)
        self.hierarchy = Hierarchy() if forward_mode else hierarchy_of(reads)
        needed = {site.name: parts[site.name] for site in self.hierarchy.sites}
        self._parts = self._traced.only(needed)

    @property
    def is_random(self) -> bool:
        """Whether the density depends on draws of the model's own."""
        return len(self.space.shapes) in self._traced.read_by_each()[0]

    def centred(self, degrees: tuple[Array, Array] | None) -> "LogDensity":
        """The same density in the coordinates of these degrees of centring."""
        return eqx.tree_at(lambda d: d.degrees, self, degrees, is_leaf=lambda leaf: leaf is None)

    def to_latent(self, u: Array) -> tuple[Array, Array | float]:
        """The point x of the latent space at u, shape ``(dim,)``, and the log-determinant."""
        if self.degrees is None:
            return u, 0.0
        a, b = map(self.space.unpack, self.degrees)
        values = x = self.space.unpack(u)
        log_det: Array | float = 0.0
        for _ in range(self.hierarchy.num_levels):  # each makes the sites of one more level right
            parts = self._parts(x, self.key)
            x, log_det = moved(self.hierarchy, parts, (a, b), values)
        return self.space.pack(x), log_det

    def from_latent(self, x: Array) -> tuple[Array, Array | float]:
        """The point u at x of the latent space, shape ``(dim,)``, and the log-determinant."""
        if self.degrees is None:
            return x, 0.0
        a, b = map(self.space.unpack, self.degrees)
        values = self.space.unpack(x)
        parts = self._parts(values, self.key)
        u, log_det = moved(self.hierarchy, parts, (a, b), values, inverse=True)
        return self.space.pack(u), log_det

    def points(self, move: Callable[[Array], tuple[Array, Any]], rows: Array) -> Array:
        """Where one of the two maps above takes ``(*batch, dim)``."""
        if self.degrees is None:
            return rows
        return jnp.vectorize(lambda row: move(row)[0], signature="(d)->(d)")(rows)

    def at_latent(self, x: Array, key: Array | None = None) -> tuple[Array, Sites]:
        """Log density over the latent space at x, and the latent and deterministic sites there."""
        (value, (sites, _, _)), _ = self._traced(self.space.unpack(x), self._or_own(key))
        return value, sites

    def _or_own(self, key: Array | None) -> Array:
        return self.key if key is None else key

    def value_and_grad(self, u: Array, key: Array | None = None) -> tuple[Array, Array]:
        """Log density and its gradient at u, shape ``(dim,)``."""
        if self.degrees is None:
            (value, _), grads = self._traced(self.space.unpack(u), self._or_own(key))
            return value, self.space.pack(grads)
        (x, log_det), back = jax.vjp(self.to_latent, u)
        value, grad = self.centred(None).value_and_grad(x, key)
        return value + log_det, back((grad, jnp.ones_like(log_det)))[0]

    def __call__(self, u: Array, key: Array | None = None) -> Array:
        """Log density at u, shape ``(dim,)``; it can be differentiated once."""
        return _density(self, u, self._or_own(key))

    def unwound(self, u: Array, windings: Mapping[str, Winding], key: Array | None = None) -> Array:
        """Log density at u, shape ``(dim,)``, and of the winding numbers of its angles there."""
        value = self(u, key)
        return value + self.space.log_winding(u, windings) if windings else value

    def sites(self, u: Array) -> Sites:
        """Values of the latent and deterministic sites at u, shape ``(dim,)``."""
        return self.at_latent(self.to_latent(u)[0])[1]


class Centring(FlowTransform):
    """From the coordinates of a log density to the latent space, as a transform.

    Cost: locations and scales of the model's sites, once for each that depend on each other in a
    row, and once in the inverse direction.

    :param density: the model's log density with its degrees of centring.
    """

    density: Fixed

    def __init__(self, density: LogDensity):
        self.density = Fixed(density)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.density.value.space.dim,)

    def _rows(self, move: Callable, rows: Array) -> tuple[Array, Array]:
        flat = rows.reshape(-1, rows.shape[-1])
        moved, log_det = jax.vmap(move, out_axes=(0, 0))(flat)
        return moved.reshape(rows.shape), log_det.reshape(rows.shape[:-1])

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._rows(self.density.value.to_latent, x)

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._rows(self.density.value.from_latent, y)


@jax.custom_jvp
def _density(density: LogDensity, u: Array, key: Array) -> Array:
    return density.value_and_grad(u, key)[0]


@_density.defjvp
def _derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
    density, u, key = primals
    value, grad = density.value_and_grad(u, key)
    return value, jnp.vdot(grad, tangents[1])


@jit(once=True)
def evaluate(traced: Traced, *args: Any) -> Any:
    """A traced function as one program."""
    return traced(*args)


@jit(once=True)
def rows_value_and_grad(
    density: LogDensity, windings: dict[str, Winding], u: Array
) -> tuple[Array, Array]:
    """Log densities and gradients at ``(n, dim)``, windings of angles included."""
    return jax.vmap(jax.value_and_grad(lambda u: density.unwound(u, windings)))(u)


@jit(once=True)
def rows_sites(density: LogDensity, u: Array) -> Sites:
    """Latent and deterministic sites at ``(n, dim)``."""
    return jax.vmap(density.sites)(u)


@jit(once=True)
def sites_of(density: LogDensity, unconstrained: Sites) -> Sites:
    """Latent and deterministic sites from the sites' unconstrained values."""
    return density.sites(density.space.pack(unconstrained))


@jit(once=True)
def constrained(space: LatentSpace, u: Array) -> Sites:
    """Values of the latent sites at ``(n, dim)``."""
    windings = space.windings(jnp.zeros(space.dim, u.dtype))

    def one(u: Array) -> Sites:
        return {name: value for name, value, _ in space.constrain(u, windings)}

    return jax.vmap(one)(u)


@contextlib.contextmanager
def advised() -> Iterator[None]:
    """Programs of the model inside, at points of which some may be far from all reason."""
    try:
        yield
    except Exception as error:
        error.add_note(
            "The model raised while it ran at points of its latent space, some of them extreme. "
            "Let its log density be NaN or -inf where it has no value, a failed solve for "
            "example, and such points are passed over: `throw=False` in diffrax, and for the "
            "checks inside equinox, lineax and optimistix the environment variable "
            "EQX_ON_ERROR=nan."
        )
        raise


def search_rows(density: LogDensity, centre: Any) -> Rows:
    """Values and gradients for a search on the host, which unwinds angles around a point."""
    dtype = jnp.result_type(float)
    windings = density.space.windings(centre)

    def rows(u: Matrix) -> tuple[Matrix, Matrix]:
        with advised():
            values, grads = rows_value_and_grad(density, windings, np.asarray(u, dtype))
            return np.asarray(values, float), np.asarray(grads, float)

    return rows
