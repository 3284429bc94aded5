"""The log density of a guide's model, with the sites that ``handlers.block`` hides from it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import log_density
from numpyro.primitives import Messenger

from . import _numpyro


def unblocked(model: Callable) -> Callable:
    """The model without ``handlers.block``, by which guides are given a part of its sites."""
    while isinstance(model, handlers.block):
        model = model.fn
    return model


def check_set_up(guide: AutoGuide) -> None:
    """Check that a guide knows its model's shapes.

    :raises ValueError: if it does not.
    """
    if guide.prototype_trace is None:
        raise ValueError("This guide was never set up. Train it first with `nf.fit_guide`.")


def latent_of(trace: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The latent sites of a trace."""
    return {
        name: site
        for name, site in trace.items()
        if site["type"] == "sample" and not site["is_observed"]
    }


def own_params(trace: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Values of a model's ``param`` sites in a trace."""
    return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}


def latent_sites(model: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The latent sites of one run of the model, by name."""
    with handlers.block():
        return latent_of(handlers.trace(handlers.seed(model, 0)).get_trace(*args, **kwargs))


def enumerable(latent: dict[str, dict[str, Any]]) -> list[str]:
    """Names of discrete sites with finitely many values."""
    discrete = {name: site["fn"] for name, site in latent.items() if site["fn"].support.is_discrete}
    return [name for name, fn in discrete.items() if fn.has_enumerate_support]


def not_enumerable(name: str, fn: str) -> str:
    """The error text for a discrete site with infinitely many values."""
    return (
        f"Site {name!r} is discrete and latent, and {fn} has no finite list of values to sum over. "
        "Sum it out by hand (a Poisson with a gamma rate is a `NegativeBinomial2`), or give it a "
        "distribution with finitely many values, such as `Categorical`."
    )


def hidden_sites(model: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Latent sites that a blocked model hides."""
    inner = unblocked(model)
    if inner is model:
        return {}
    own = latent_sites(model, args, kwargs)
    return {k: v for k, v in latent_sites(inner, args, kwargs).items() if k not in own}


def check_summable(hidden: dict[str, Any]) -> None:
    """Check that no hidden site is discrete with infinitely many values.

    :raises ValueError: if one is.
    """
    for name, site in hidden.items():
        if site["fn"].support.is_discrete and not site["fn"].has_enumerate_support:
            raise ValueError(not_enumerable(name, type(site["fn"]).__name__))


def hidden_discrete(model: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Latent sites that a blocked model hides, if all are discrete and can be enumerated."""
    hidden = hidden_sites(model, args, kwargs)
    enumerable = all(site["fn"].has_enumerate_support for site in hidden.values())
    return hidden if enumerable else {}


class whole_plates(Messenger):
    """A model whose subsampled plates have all their rows."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            size, _ = msg["args"]
            msg["args"], msg["value"] = (size, size), jnp.arange(size)


def is_subsampled(trace: dict[str, dict[str, Any]]) -> bool:
    """Whether a trace has a plate of which it saw some rows alone."""
    plates = [site["args"] for site in trace.values() if site["type"] == "plate"]
    return any(some is not None and some != size for size, some in plates)


class Joint(NamedTuple):
    """A log joint density, values of latent and deterministic sites, and the latent sites."""

    log_density: Array
    sites: dict[str, Array]
    latent: dict[str, dict[str, Any]]

    def within(self, name: str, log_density: Array) -> Array:
        """A term with the scale and the mask of a site."""
        site = self.latent[name]
        if (mask := _numpyro.mask_of(site["fn"])) is not True:
            log_density = jnp.where(mask, log_density, 0.0)
        return log_density if site["scale"] is None else site["scale"] * log_density


def log_joint(
    model: Callable,
    key: Array,
    args: tuple,
    kwargs: dict[str, Any],
    values: dict[str, Any],
) -> Joint:
    """Log density of the model at ``values``, with discrete sites that it hides summed out.

    :param model: a guide's model, blocked or not; other sites are drawn from their priors.
    :param key: ``jax.random.key`` for these.
    :param values: values of latent and ``param`` sites, in their constrained spaces.
    """
    if hidden_discrete(model, args, kwargs):
        from numpyro.contrib.funsor import config_enumerate, enum
        from numpyro.contrib.funsor import log_density as enumerated_log_density

        inner = unblocked(model)
        frames = [
            frame
            for site in latent_sites(inner, args, kwargs).values()
            for frame in site["cond_indep_stack"]
        ]
        nesting = max((-frame.dim for frame in frames), default=0)
        enumerated = enum(config_enumerate(handlers.seed(inner, key)), -nesting - 1)
        value, trace = enumerated_log_density(enumerated, args, kwargs, values)
        # That trace has no deterministic sites; those of a discrete site have its values' axis.
        run = handlers.trace(handlers.substitute(enumerated, data=values))
        for name, site in run.get_trace(*args, **kwargs).items():
            if site["type"] == "deterministic":
                trace[name] = site
    else:
        value, trace = log_density(handlers.seed(unblocked(model), key), args, kwargs, values)
    sites = {
        name: site["value"]
        for name, site in trace.items()
        if (site["type"] == "sample" and not site["is_observed"] and name in values)
        or site["type"] == "deterministic"
    }
    latent = {name: site for name, site in latent_of(trace).items() if name in values}
    return Joint(jnp.asarray(value), sites, latent)
