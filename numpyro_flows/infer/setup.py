"""Errors for models that a guide cannot follow, each with a remedy."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Delta

from .density import not_enumerable


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
