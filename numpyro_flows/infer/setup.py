"""What may go wrong when a guide first runs its model, said so that it can be mended."""

import contextlib
import re
import warnings
from collections.abc import Iterator

import jax

from .density import not_enumerable


@contextlib.contextmanager
def explained(guide: str) -> Iterator[None]:
    """NumPyro's set-up of a guide, its errors explained.

    :param guide: name of the guide's class.
    :raises ValueError: for a model with discrete latent sites, without latent sites, or whose
        structure or shapes depend on values.
    """
    try:
        with warnings.catch_warnings():
            # NumPyro warns that its own map cuts the circle; ours does not.
            warnings.filterwarnings("ignore", ".*poorly handles circular", UserWarning)
            yield
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerIntegerConversionError,
        jax.errors.NonConcreteBooleanIndexError,
    ) as error:
        raise ValueError(
            f"{guide}: the model's structure or shapes depend on the value of a latent site or of "
            "an array argument, and a guide needs them fixed. Replace `if` by `jnp.where` or "
            "`jax.lax.cond` and selections by masks (`dist.mask`), and pass sizes as Python ints. "
            f"JAX says: {str(error).splitlines()[0]}"
        ) from error
    except ValueError as error:
        found = re.search(r"cannot handle discrete sample site (\S+?)\.?$", str(error), re.M)
        if found is None:
            raise
        raise ValueError(
            f"{guide}: site {found[1]} is discrete and latent, and flows are continuous. Hide it "
            f"and sum it out: `{guide}(numpyro.handlers.block(model, hide=[{found[1]}]))` with "
            "`nf.fit_guide`, or in `SVI` with "
            "`TraceEnum_ELBO` and `numpyro.contrib.funsor.config_enumerate(model)`."
        ) from error
    except RuntimeError as error:
        endless = re.search(r"But the (\w+) distribution at site (\S+) does", str(error))
        if endless is not None:
            raise ValueError(f"{guide}: {not_enumerable(endless[2], endless[1])}") from error
        if "found no latent variables" not in str(error):
            raise
        raise ValueError(
            f"{guide}: the model has no latent sites, so there is nothing to infer. Are all its "
            "sites observed (`obs=`, `numpyro.handlers.condition`) or hidden (`handlers.block`)?"
        ) from error
