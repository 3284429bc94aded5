"""One run of a model at a start, and errors for models that a guide cannot follow."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions import Delta, biject_to

from ..compilation import is_traced, jit, split
from . import _numpyro
from .density import enumerable, latent_of, not_enumerable
from .latent_space import LatentSpace, LogDensity, Sites, advised, evaluate, rows_value_and_grad
from .supports import is_circular
from .traced import Traced, traced_at

#: Starts that are drawn at once, and how often, until one has a finite density.
NUM_STARTS, NUM_TRIES = 32, 4


@contextlib.contextmanager
def explained(guide: str) -> Iterator[None]:
    """A run of a model whose structure must not depend on values.

    :param guide: name of the guide's class.
    :raises ValueError: for a model whose structure or shapes depend on values.
    """
    try:
        yield
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerIntegerConversionError,
        jax.errors.NonConcreteBooleanIndexError,
        jax.errors.TracerArrayConversionError,
    ) as error:
        raise ValueError(
            f"{guide}: the model's structure or shapes depend on the value of a latent site or of "
            "an array that is traced, and a guide needs them fixed. Replace `if` by `jnp.where` or "
            "`jax.lax.cond` and selections by masks (`dist.mask`), pass sizes as Python ints, and "
            "index NumPy arrays that are no arguments as `jnp.asarray(y)[i]`. "
            f"JAX says: {str(error).splitlines()[0]}"
        ) from error


def with_shapes(strategy: Callable) -> Callable:
    """An initialisation strategy whose values are checked to have the shapes of their sites.

    :raises ValueError: while the model runs, for a value of another shape.
    """

    def checked(site: dict[str, Any]) -> Any:
        value = strategy(site)
        if site["type"] == "sample" and value is not None:
            expected = site["fn"].shape(site["kwargs"].get("sample_shape", ()))
            if jnp.shape(value) != expected:
                raise ValueError(
                    f"init_loc_fn: site {site['name']!r} has values of shape {expected}, and the "
                    f"start that was given for it is of shape {jnp.shape(value)}."
                )
        return value

    return checked


def check_latent(guide: str, latent: dict[str, dict[str, Any]]) -> None:
    """Check that a guide can follow these latent sites.

    :raises ValueError: if there are none, or one is discrete or a point mass.
    """
    if not latent:
        raise ValueError(
            f"{guide}: the model has no latent sites, so there is nothing to infer. Are all its "
            "sites observed (`obs=`, `numpyro.handlers.condition`) or hidden (`handlers.block`)?"
        )
    for name, site in latent.items():
        fn = site["fn"]
        if isinstance(fn, Delta):
            raise ValueError(
                f"{guide}: site {name!r} is latent and a point mass (`dist.Delta`), which has no "
                f"density to infer. Record the value by `numpyro.deterministic({name!r}, ...)`."
            )
        if not fn.support.is_discrete:
            continue
        if not fn.has_enumerate_support:
            raise ValueError(f"{guide}: {not_enumerable(name, type(fn).__name__)}")
        raise ValueError(
            f"{guide}: site {name!r} is discrete and latent, and flows are continuous. Hide it "
            f"and sum it out: `{guide}(numpyro.handlers.block(model, hide=[{name!r}]))` with "
            "`nf.fit_guide`, or in `SVI` with "
            "`TraceEnum_ELBO` and `numpyro.contrib.funsor.config_enumerate(model)`."
        )


def check_plates(
    guide: str, trace: dict[str, dict[str, Any]], latent: dict[str, dict[str, Any]]
) -> None:
    """Check the plates of latent sites for a guide over all their rows.

    :raises ValueError: if one has two sizes, or is subsampled.
    """
    sizes = {name: site["args"][0] for name, site in trace.items() if site["type"] == "plate"}
    frames: dict[str, Any] = {}
    around = [(name, frame) for name, site in latent.items() for frame in site["cond_indep_stack"]]
    for name, frame in around:
        if (first := frames.setdefault(frame.name, frame)) != frame:
            raise ValueError(
                f"{guide}: the plate {frame.name!r} around site {name!r} has size {frame.size} "
                f"at dim {frame.dim}, and elsewhere size {first.size} at dim {first.dim}. Give "
                "each its own name."
            )
    for name, frame in around:
        if frame.size != sizes.get(frame.name, frame.size):
            raise ValueError(
                f"{guide}: site {name!r} is latent in the subsampled plate {frame.name!r} "
                f"({frame.size} of {sizes[frame.name]} rows), and this guide needs all rows at "
                "once. Give the local sites an `nf.AmortizedFlow`, which reads the rows' data, "
                "beside a guide for the others; or do not subsample the plate."
            )


def check_repeats(
    guide: str, first: dict[str, dict[str, Any]], again: dict[str, dict[str, Any]]
) -> None:
    """Check that two runs of a model with the same key did the same.

    :raises ValueError: if sites or their numbers differ.
    """
    cause = (
        "Random numbers of NumPy, counters and clocks inside a model do that. Draw with "
        "`numpyro.sample` or `numpyro.prng_key()`, or compute outside and pass as an argument."
    )
    if differing := first.keys() ^ again.keys():
        raise ValueError(
            f"{guide}: the model has other sites when it runs again: {sorted(differing)}. {cause}"
        )
    for name, site in first.items():
        leaves, others = (jax.tree.leaves((s.get("fn"), s["value"])) for s in (site, again[name]))
        if len(leaves) != len(others) or not all(map(_equal, leaves, others)):
            raise ValueError(
                f"{guide}: site {name!r} has other numbers when the model runs again with the same "
                f"key. {cause}"
            )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float | int):
        return bool(one == other or one != one)
    if not (hasattr(one, "dtype") and hasattr(other, "dtype")):
        return True  # functions and names, which may be made anew in each run
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        return True
    if one is other:
        return True
    if isinstance(one, jax.Array) and not one.is_fully_addressable:
        return all(
            _equal(mine.data, its.data)
            for mine, its in zip(one.addressable_shards, other.addressable_shards, strict=True)
        )
    one, other = np.asarray(one), np.asarray(other)
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


@jit(once=True)
def _starts(traced: Traced, key: Array) -> Array:
    return jax.vmap(lambda key: traced(key)[1])(jax.random.split(key, NUM_STARTS))


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
    :param sums_out: whether discrete sites of finitely many values are hidden, so that they are
        summed out.
    :ivar model: the model, with these sites hidden.
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
        *,
        sums_out: bool = False,
    ):
        self.model, self._init_loc_fn = model, init_loc_fn
        kept: list[Any] = []

        def run(arguments: Any, key: Array) -> tuple[list[Array], Array]:
            self._args, self._kwargs = arguments
            trace = self._trace(key)
            if sums_out and (discrete := enumerable(latent_of(trace))):
                self.model = handlers.block(self.model, hide=discrete)
                trace = self._trace(key)
            latent = latent_of(trace)
            check_latent(guide, latent)
            space, start = _space_of(latent)
            kept[:] = jax.tree.flatten((space, trace))
            return [x for x in kept[0] if is_traced(x)], space.pack(start)

        with explained(guide):
            self.traced = traced_at(run, (args, kwargs), key)
        with advised():
            found, self.start = jax.block_until_ready(evaluate(self.traced, key))
        numbers = iter(found)
        leaves = [next(numbers) if is_traced(x) else x for x in kept[0]]
        self.space, self.trace = jax.tree.unflatten(kept[1], leaves)
        self._keys = split(key, NUM_TRIES)

    def _trace(self, key: Array) -> dict[str, dict[str, Any]]:
        started = handlers.substitute(
            handlers.seed(self.model, key), substitute_fn=with_shapes(self._init_loc_fn)
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
            with advised():  # raised where results are first waited for
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
