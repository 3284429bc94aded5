"""A fitted guide as ArviZ inference data."""

from typing import Any

import jax
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions import Unit
from numpyro.infer import Predictive, log_likelihood
from numpyro.infer.autoguide import AutoGuide

from ..checks import check_key, check_size
from .density import unblocked
from .importance import weighted_draws


def to_arviz(
    guide: AutoGuide,
    params: dict[str, Any],
    *args: Any,
    key: Array | None = None,
    num_samples: int = 1000,
    **kwargs: Any,
) -> Any:
    r"""Draws of a guide for ArviZ, with all that its tables, plots and comparisons read.

    Groups: ``posterior`` (latent and deterministic sites), ``posterior_predictive`` and
    ``log_likelihood`` (observed sites), ``observed_data``, and ``sample_stats`` with ``lp``, the
    log joint density, ``log_q``, that of the guide, and ``log_weight``, their difference, each in
    constrained space. There is one chain.

    :param guide: an automatic guide that has been set up.
    :param params: its trained parameters.
    :param args: arguments of the model, with the observations; so are the other keyword arguments.
    :param key: ``jax.random.key``; that of seed 0 by default.
    :param num_samples: number of draws.
    :return: ``InferenceData`` with ArviZ 0.x, a ``DataTree`` with ArviZ 1.
    :raises ValueError: for a guide that was not set up.

    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide, y = nf.AutoFlow(model, init="location"), jnp.array([0.3, 1.2])
    >>> fit = nf.fit_guide(jax.random.key(0), guide, y, num_steps=100, progress_bar=False)
    >>> nf.to_arviz(guide, fit.params, y).posterior["mu"].shape
    (1, 1000)
    """
    import arviz

    key = jax.random.key(0) if key is None else check_key(key)
    check_size("num_samples", num_samples)
    draw_key, predict_key = jax.random.split(key)
    draws, log_p, log_q = weighted_draws(draw_key, guide, params, args, kwargs, num_samples)
    model = handlers.substitute(unblocked(guide.model), data=params)
    observed = {
        name: site["value"]
        for name, site in handlers.trace(handlers.seed(model, 0)).get_trace(*args, **kwargs).items()
        if site["type"] == "sample" and site["is_observed"] and not isinstance(site["fn"], Unit)
    }
    predictive = Predictive(
        handlers.uncondition(model), posterior_samples=draws, return_sites=list(observed)
    )
    groups: dict[str, dict[str, Any]] = {
        "posterior": draws,
        "posterior_predictive": predictive(predict_key, *args, **kwargs) if observed else {},
        "log_likelihood": {
            name: value
            for name, value in log_likelihood(model, draws, *args, **kwargs).items()
            if name in observed
        },
        "sample_stats": {"lp": log_p, "log_q": log_q, "log_weight": log_p - log_q},
    }
    chained: dict[str, Any] = {
        group: {name: np.asarray(value)[None] for name, value in sites.items()}
        for group, sites in groups.items()
        if sites
    }
    if observed:
        chained["observed_data"] = {name: np.asarray(value) for name, value in observed.items()}
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.from_dict(**chained)
    return arviz.from_dict(chained)
