"""Importance weights of a guide's draws, and draws of the posterior resampled by them."""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import log_density

from ..checks import check_key, check_size
from ..compilation import jit
from ..diagnostics import psis
from .density import check_set_up, log_joint, whole_plates
from .guide_flow import check_exact
from .guides import AutoFlow
from .maps import BATCH, Weighted, draw
from .traced import Traced, traced_at


def weighted_draws(
    key: Array,
    guide: AutoGuide,
    params: dict[str, Any],
    args: tuple,
    kwargs: dict[str, Any],
    num_draws: int,
    *,
    whole: bool = False,
) -> Weighted:
    """Draws of a guide with log densities of model and guide, the model at these arguments.

    :param whole: whether subsampled plates have all their rows.
    """
    check_key(key)
    check_size("number of draws", num_draws)
    check_set_up(guide)
    if isinstance(guide, AutoFlow):
        density = guide.log_density(params, args, kwargs, whole=whole)
        return draw(guide.learned(params, args, kwargs, density), key, num_draws)

    def one(arguments: Any, key: Array, params: dict[str, Any]) -> Weighted:
        args, kwargs = arguments
        guide_key, model_key = jax.random.split(key)
        with whole_plates() if whole else contextlib.nullcontext():
            log_q, trace = log_density(handlers.seed(guide, guide_key), args, kwargs, params)
            check_exact([site.get("fn") for site in trace.values()])
            latent = {
                name: site["value"]
                for name, site in trace.items()
                if site["type"] == "sample" and not site["infer"].get("is_auxiliary")
            }
            plates = {
                name: site["value"] for name, site in trace.items() if site["type"] == "plate"
            }
            joint = log_joint(guide.model, model_key, args, kwargs, params | plates | latent)
        return Weighted(joint.sites, joint.log_density, jnp.asarray(log_q))

    return _each(
        traced_at(one, (args, kwargs), key, params), jax.random.split(key, num_draws), params
    )


@jit(once=True)
def _each(traced: Traced, keys: Array, params: dict[str, Any]) -> Weighted:
    size = min(len(keys), BATCH)
    return jax.lax.map(lambda key: traced(key, params), keys, batch_size=size)


def importance_log_weights(
    key: Array,
    guide: AutoGuide,
    params: dict[str, Any],
    *args: Any,
    num_samples: int = 10_000,
    **kwargs: Any,
) -> Array:
    r"""Log importance weights :math:`\log p(\theta_i, y) - \log q(\theta_i)` of draws from a guide.

    Their mean estimates the ELBO, their log-mean-exp the log evidence
    (``nf.diagnostics.log_evidence``), and ``nf.diagnostics.psis_khat`` reads off them how far the
    guide can be trusted. With subsampled plates both densities are estimates, and so are the
    weights: give the model all rows.

    :param key: ``jax.random.key``.
    :param guide: an automatic guide that has been set up.
    :param params: its trained parameters.
    :param args: arguments of the model, as are the other keyword arguments.
    :param num_samples: number of draws.
    :return: shape ``(num_samples,)``.
    :raises TypeError: for a key that is not one.
    :raises ValueError: if a density of the guide is an estimate or a bound.

    >>> import jax, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model():
    ...     numpyro.sample("x", dist.Normal(1.0, 2.0))
    >>> fitted = nf.fit_guide(jax.random.key(0), nf.AutoFlow(model), progress_bar=False)
    >>> importance_log_weights(jax.random.key(1), fitted.guide, fitted.params).shape
    (10000,)
    """
    _, log_p, log_q = weighted_draws(key, guide, params, args, kwargs, num_samples)
    return log_p - log_q


class Resampled(NamedTuple):
    """Draws corrected by importance weights: ``draws, khat = nf.importance_resample(...)``."""

    draws: dict[str, Array]
    khat: float


def importance_resample(
    key: Array,
    guide: AutoGuide,
    params: dict[str, Any],
    *args: Any,
    num_samples: int = 1000,
    num_proposals: int | None = None,
    **kwargs: Any,
) -> Resampled:
    r"""Draws of the posterior from a guide's draws, by Pareto-smoothed importance resampling.

    Proposals from the guide are weighted by :math:`p(\theta, y) / q(\theta)`, the largest weights
    smoothed, and resampled with replacement. With a k-hat below 0.7 what the guide missed in
    shape is corrected; above, the guide misses mass that no weight can bring back.

    :param key: ``jax.random.key``.
    :param guide: an automatic guide that has been set up.
    :param params: its trained parameters.
    :param args: arguments of the model, as are the other keyword arguments.
    :param num_samples: number of draws returned.
    :param num_proposals: number of draws from the guide; by default 10 per draw returned, at
        least 10,000.
    :return: a dict of draws of the latent and deterministic sites, each with a first axis of
        ``num_samples``, and the weights' k-hat: ``-inf`` where they have no tail, as those of a
        guide that is the posterior.
    :raises TypeError: for a key that is not one.
    :raises ValueError: if weights are not finite, or a density of the guide is an estimate or a
        bound.

    Source: Vehtari et al. (2024), arXiv:1507.02646.

    >>> import jax, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model():
    ...     numpyro.sample("x", dist.Normal(1.0, 2.0))
    >>> fitted = nf.fit_guide(jax.random.key(0), nf.AutoFlow(model), progress_bar=False)
    >>> draws, khat = importance_resample(jax.random.key(1), fitted.guide, fitted.params)
    >>> draws["x"].shape
    (1000,)
    """
    check_key(key)
    check_size("num_samples", num_samples)
    n = max(10_000, 10 * num_samples) if num_proposals is None else num_proposals
    draw_key, pick_key = jax.random.split(key)
    sites, log_p, log_q = weighted_draws(draw_key, guide, params, args, kwargs, n)
    log_weights = log_p - log_q
    smoothed, khat = psis(log_weights)
    if np.isnan(khat):
        bad = int((~np.isfinite(np.asarray(log_weights))).sum())
        raise ValueError(
            f"{bad} of {n} importance weights are not finite: the guide draws points at which the "
            "model's density is zero or NaN."
        )
    shares = jnp.asarray(np.exp(smoothed - smoothed.max()))
    picked = jax.random.choice(pick_key, n, (num_samples,), p=shares / shares.sum())
    return Resampled({name: value[picked] for name, value in sites.items()}, khat)
