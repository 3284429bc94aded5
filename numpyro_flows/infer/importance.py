"""How far a guide is from the posterior, by importance weights."""

from typing import Any

import jax
from jax import Array
from numpyro import handlers
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.util import potential_energy

from ..checks import check_key, check_size
from .params import model_params


def importance_log_weights(
    key: Array,
    guide: AutoContinuous,
    params: dict[str, Any],
    *args: Any,
    num_samples: int = 10_000,
    **kwargs: Any,
) -> Array:
    r"""Log importance weights :math:`\log p(\theta_i, y) - \log q(\theta_i)` of draws from a guide.

    Their mean estimates the ELBO, their log-mean-exp the log evidence, and
    ``nf.diagnostics.psis_khat`` reads off them how far the guide can be trusted.

    :param key: ``jax.random.key``.
    :param guide: an ``AutoContinuous`` guide that has been set up.
    :param params: its trained parameters.
    :param args: arguments of the model, as are the other keyword arguments.
    :param num_samples: number of draws.
    :return: shape ``(num_samples,)``.
    """
    check_key(key)
    check_size("num_samples", num_samples)
    posterior = guide.get_posterior(params)
    latent, intermediates = posterior.sample_with_intermediates(key, (num_samples,))
    log_q = (
        posterior.log_prob(latent, intermediates) if intermediates else posterior.log_prob(latent)
    )
    # A diagonal normal guide has its coordinates as batch axes.
    log_q = log_q.reshape(num_samples, -1).sum(-1)
    given = model_params(guide, params)
    model = handlers.substitute(handlers.seed(guide.model, 0), data=given)

    def log_joint(latent: Array) -> Array:
        return -potential_energy(model, args, kwargs, guide._unpack_latent(latent))

    return jax.vmap(log_joint)(latent) - log_q
