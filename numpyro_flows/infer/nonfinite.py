"""Find the site of a model whose log density, or its gradient, is NaN or infinite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide

from .importance import weighted_draws

NUM_DRAWS = 200


def blame(
    key: Array, guide: AutoGuide, params: dict[str, Any], args: tuple, kwargs: dict[str, Any]
) -> str:
    """A sentence on the first site whose log density, or else its gradient, is not finite.

    Densities and gradients are computed site by site at draws of the guide. Empty if all are finite
    there, or for a model whose discrete sites would have to be summed out.

    :param key: ``jax.random.key``.
    :param guide: a guide that was set up.
    :param params: its parameters.
    :param args: arguments of the model.
    :param kwargs: keyword arguments of the model.
    """
    draws, _, _ = weighted_draws(key, guide, params, args, kwargs, NUM_DRAWS)
    latent = {
        name: site["value"].dtype
        for name, site in guide.prototype_trace.items()
        if site["type"] == "sample" and not site["is_observed"] and name in draws
    }
    values = {name: draws[name] for name in latent}
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in latent.values()):
        return ""

    def log_densities(values: dict[str, Array]) -> dict[str, Array]:
        model = handlers.substitute(guide.model, data=params | values)
        trace = handlers.trace(handlers.seed(model, 0)).get_trace(*args, **kwargs)
        return {
            name: jnp.sum(site["fn"].log_prob(site["value"]))
            for name, site in trace.items()
            if site["type"] == "sample"
        }

    @jax.jit
    @jax.vmap
    def at(values: dict[str, Array]) -> Any:
        densities = log_densities(values)
        # One by one: in a Jacobian, zeros would meet the infinities of other sites.
        slopes = {
            name: jax.grad(lambda v, name=name: log_densities(v)[name])(values)
            for name in densities
        }
        return densities, slopes

    densities, slopes = at(values)
    for name, density in densities.items():
        if bad := _share(density):
            return (
                f"The log density of site {name!r} is NaN or infinite at {bad:.0%} of the guide's "
                "draws."
            )
    for name, by_latent in slopes.items():
        for other, slope in by_latent.items():
            if bad := _share(slope):
                return (
                    f"The log densities are finite, but the gradient of that of site {name!r} with "
                    f"respect to {other!r} is NaN or infinite at {bad:.0%} of the guide's draws. "
                    "The usual cause is a function outside its domain in the branch that "
                    "`jnp.where` does not take, as in `jnp.where(x > 0, jnp.sqrt(x), 0)`: replace "
                    "its argument too, `jnp.sqrt(jnp.where(x > 0, x, 1))`; or a norm, a root or a "
                    "power at zero."
                )
    return ""


def _share(values: Array) -> float:
    """The share of rows with a value that is not finite."""
    rows = np.asarray(values).reshape(NUM_DRAWS, -1)
    return float((~np.isfinite(rows).all(axis=1)).mean())
