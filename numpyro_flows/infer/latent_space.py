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

from ..compilation import is_traced, jit, split
from . import _numpyro
from .density import latent_of, log_joint, whole_plates
from .normals import Matrix
from .preconditioner import Rows
from .setup import check_latent, explained, with_shapes
from .supports import Winding, constrain, is_circular, with_idle, wrapped
from .traced import Traced, traced_at

Sites = dict[str, Array]

#: Starts that are drawn at once, and how often, until one has a finite density.
NUM_STARTS, NUM_TRIES = 32, 4


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

    def windings(self, loc: Array, scale: Callable[[], Array] | None = None) -> dict[str, Winding]:
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


class LogDensity(eqx.Module):
    r"""Log density of a model over its latent space, traced at the current arguments.

    :math:`\log p(\theta(u), y) + \log |\det \theta'(u)|` for u in the latent space; angles count
    as themselves there. It is a pytree: the arrays that the model read are leaves, and programs
    that take it are compiled once for all models that do the same with other numbers.

    :ivar space: the latent space.
    :ivar key: what the model's own draws depend on (rows of subsampled plates).

    :param params: values of the model's own ``param`` sites.
    :param as_nuts: whether a site's scale and mask hold for its log-determinant as well, as
        NumPyro's HMC has it, and not as its guides have it.
    :param whole: whether subsampled plates have all their rows.
    """

    space: LatentSpace
    traced: Traced
    key: Array

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
    ):
        params = dict(params or {})
        dtype = jnp.result_type(float)

        def value(arguments: Any, u: Array, key: Array) -> tuple[Array, Any]:
            args, kwargs = arguments
            sites, log_dets = {}, {}
            event_dims = dict(space.event_dims)
            for name, x in space.unpack(u).items():
                if name in space.circular:
                    sites[name] = wrapped(x)
                    continue
                transform = biject_to(space.supports[name])
                sites[name] = transform(x)
                log_det = transform.log_abs_det_jacobian(x, sites[name])
                extra = log_det.ndim - sites[name].ndim + event_dims[name]
                log_dets[name] = sum_rightmost(log_det, extra)
            with handlers.block(), whole_plates() if whole else contextlib.nullcontext():
                joint = log_joint(model, key, args, kwargs, params | sites)
            if as_nuts:
                log_dets = {name: joint.within(name, x) for name, x in log_dets.items()}
            for name, where in space.idle.items():
                log_dets[name] = with_idle(log_dets[name], space.unpack(u)[name], where)
            total = sum((x.sum() for x in log_dets.values()), jnp.zeros((), u.dtype))
            supports = {name: joint.latent[name]["fn"].support for name, _ in space.shapes}
            return (joint.log_density + total).astype(u.dtype), (joint.sites, supports)

        self.space, self.key = space, key
        self.traced = traced_at(
            jax.value_and_grad(value, argnums=1, has_aux=True),
            (args, kwargs),
            jax.ShapeDtypeStruct((space.dim,), dtype),
            key,
        )
        (_, (_, supports)), _ = self.traced.outputs
        for name, support in supports.items():
            if any(self.traced.reads(0, output) for output in jax.tree.leaves(support)):
                raise ValueError(
                    f"Site {name!r}: its support depends on other latent sites, which a guide "
                    "over one unconstrained space cannot follow. Draw from a fixed support and "
                    "transform: u ~ Uniform(0, 1), then "
                    f"`numpyro.deterministic({name!r}, low + u * (high - low))`."
                )

    @property
    def is_random(self) -> bool:
        """Whether the density depends on draws of the model's own."""
        return self.traced.reads(argument=1, output=0)

    def value_and_grad(self, u: Array, key: Array | None = None) -> tuple[Array, Array]:
        """Log density and its gradient at u, shape ``(dim,)``."""
        (value, _), grad = self.traced(u, self.key if key is None else key)
        return value, grad

    def __call__(self, u: Array, key: Array | None = None) -> Array:
        """Log density at u, shape ``(dim,)``; it can be differentiated once."""
        return _density(self, u, self.key if key is None else key)

    def unwound(self, u: Array, windings: Mapping[str, Winding], key: Array | None = None) -> Array:
        """Log density at u, shape ``(dim,)``, and of the winding numbers of its angles there."""
        value = self(u, key)
        return value + self.space.log_winding(u, windings) if windings else value

    def sites(self, u: Array) -> Sites:
        """Values of the latent and deterministic sites at u, shape ``(dim,)``."""
        (_, (sites, _)), _ = self.traced(u, self.key)
        return sites


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


@jit(once=True)
def _starts(traced: Traced, key: Array) -> Array:
    return jax.vmap(lambda key: traced(key)[1])(jax.random.split(key, NUM_STARTS))


@contextlib.contextmanager
def _advised() -> Iterator[None]:
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
        with _advised():
            values, grads = rows_value_and_grad(density, windings, np.asarray(u, dtype))
            return np.asarray(values, float), np.asarray(grads, float)

    return rows


def _space_of(latent: dict[str, dict[str, Any]]) -> tuple[LatentSpace, Sites]:
    """The space of these sites, and their unconstrained values; angles as they are."""
    supports = {name: site["fn"].support for name, site in latent.items()}
    circular = tuple(name for name in latent if is_circular(supports[name]))
    values = {
        name: jnp.asarray(site["value"], jnp.result_type(float))
        if name in circular
        else biject_to(supports[name]).inv(site["value"])
        for name, site in latent.items()
    }
    # A mask of an angle leaves it the uniform density that it has anyway.
    masks = {name: _numpyro.mask_of(site["fn"]) for name, site in latent.items()}
    idle = {
        name: ~jnp.broadcast_to(mask, latent[name]["fn"].batch_shape)
        for name, mask in masks.items()
        if mask is not True and name not in circular
    }
    space = LatentSpace(
        supports,
        idle,
        tuple((name, jnp.shape(x)) for name, x in values.items()),
        tuple((name, site["fn"].event_dim) for name, site in latent.items()),
        circular,
    )
    return space, values


class SetUp:
    """One run of a model at the start of an initialisation strategy: its sites, space and start.

    The model's Python runs once, under a trace, so that nothing of it runs outside a program.

    :param guide: name of the guide that asks, for errors.
    :param model: a NumPyro model.
    :param init_loc_fn: NumPyro's initialisation strategy.
    :param key: ``jax.random.key``.
    :param args: arguments of the model.
    :param kwargs: keyword arguments of the model.
    :ivar space: the model's latent space.
    :ivar trace: the run, with numbers.
    :ivar start: the unconstrained start, ``(dim,)``.
    :raises ValueError: for a model without latent sites, with discrete ones, or whose structure or
        shapes depend on values.
    """

    def __init__(
        self,
        guide: str,
        model: Callable,
        init_loc_fn: Callable,
        key: Array,
        args: tuple,
        kwargs: dict[str, Any],
    ):
        self._model, self._init_loc_fn = model, init_loc_fn
        kept: list[Any] = []

        def run(arguments: Any, key: Array) -> tuple[list[Array], Array]:
            self._args, self._kwargs = arguments
            trace = self._trace(key)
            latent = latent_of(trace)
            check_latent(guide, latent)
            space, start = _space_of(latent)
            kept[:] = jax.tree.flatten((space, trace))
            return [x for x in kept[0] if is_traced(x)], space.pack(start)

        with explained(guide):
            self.traced = traced_at(run, (args, kwargs), key)
        with _advised():
            found, self.start = jax.block_until_ready(evaluate(self.traced, key))
        numbers = iter(found)
        leaves = [next(numbers) if is_traced(x) else x for x in kept[0]]
        self.space, self.trace = jax.tree.unflatten(kept[1], leaves)
        self._keys = split(key, NUM_TRIES)

    def _trace(self, key: Array) -> dict[str, dict[str, Any]]:
        started = handlers.substitute(
            handlers.seed(self._model, key), substitute_fn=with_shapes(self._init_loc_fn)
        )
        with handlers.block():
            return handlers.trace(started).get_trace(*self._args, **self._kwargs)

    def without_tracers(self) -> tuple[LatentSpace, dict[str, dict[str, Any]]]:
        """Space and trace without what a set-up under ``jit`` cannot keep.

        :raises ValueError: if a support depends on the arguments.
        """
        for name, support in self.space.supports.items():
            if is_traced(support):
                raise ValueError(
                    f"Site {name!r}: its support depends on the model's arguments, which a set-up "
                    "under `jax.jit` cannot keep. Call `svi.init(key, *args)` outside `jit`."
                )

        def stand_in(leaf: Any) -> Any:
            if not is_traced(leaf):
                return leaf
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return None
            return np.zeros(leaf.shape, leaf.dtype)

        return self.space, jax.tree.map(stand_in, self.trace)

    def finite_starts(self, density: LogDensity) -> tuple[Any, Any]:
        """Unconstrained starts, ``(n, dim)``, where the density and its gradient are finite; both.

        :raises ValueError: if there are none.
        """
        for key in self._keys:
            with _advised():  # raised where results are first waited for
                starts = _starts(self.traced, key)
                values, grads = rows_value_and_grad(density, {}, starts)
                jax.block_until_ready((values, grads))
            if is_traced(values):
                finite = jnp.isfinite(values) & jnp.isfinite(grads).all(axis=1)
                first = jnp.argmax(finite)
                return starts[first][None], grads[first][None]
            finite = np.isfinite(values) & np.isfinite(grads).all(axis=1)
            if finite.any():
                return np.asarray(starts)[finite], np.asarray(grads)[finite]
        raise ValueError(self._no_start())

    def _no_start(self) -> str:
        """The error text where no start has a finite density."""

        def finite_sites(key: Array) -> dict[str, Array]:
            return {
                name: jnp.isfinite(site["fn"].log_prob(site["value"])).all()
                for name, site in self._trace(key).items()
                if site["type"] == "sample"
            }

        finite = evaluate(Traced(finite_sites, self._keys[0]), self._keys[0])
        bad = [name for name, holds in finite.items() if not bool(holds)]
        where = f"site {', '.join(map(repr, bad))}" if bad else "a factor or a gradient"
        return (
            f"The model's log density or its gradient is NaN or infinite at every start: look at "
            f"{where}. Check the data there, or start elsewhere with `init_loc_fn`, for example "
            "`numpyro.infer.init_to_median`."
        )
