"""Errors for models that a guide cannot follow, each with a remedy."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

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


def check_latent(guide: str, latent: dict[str, dict[str, Any]]) -> None:
    """Check that a guide can follow these latent sites.

    :raises ValueError: if there are none, or one is discrete.
    """
    if not latent:
        raise ValueError(
            f"{guide}: the model has no latent sites, so there is nothing to infer. Are all its "
            "sites observed (`obs=`, `numpyro.handlers.condition`) or hidden (`handlers.block`)?"
        )
    for name, site in latent.items():
        fn = site["fn"]
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
