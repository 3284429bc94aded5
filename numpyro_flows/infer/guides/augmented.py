"""Auxiliary latent coordinates for a model, so that a guide may have more coordinates than it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.distributions import biject_to

from ...checks import check_size
from ...distribution import FlowDistribution
from ...recipes import conditional_gaussian
from ..density import latent_of
from ..params import flow_module


def augmented_model(
    model: Callable,
    augment_dim: int = 1,
    *,
    encoder: Callable[..., FlowDistribution] = conditional_gaussian,
    name: str = "augmentation",
) -> Callable:
    r"""The model with an auxiliary latent vector e beside its own :math:`\theta`.

    .. math:: E_{q(\theta, e)} \log \frac{p(\theta, y) \, r(e \mid \theta)}{q(\theta, e)}
              \le \log p(y)

    Whatever r is, :math:`\theta` keeps its posterior and the model its evidence. A guide for this
    model is a flow over both, and its draws of :math:`\theta`, which forget e, are not bound to
    the topology of the base: this is how an augmented flow becomes a guide. All densities are
    exact, so importance weights and neural transport hold as for any other model::

        guide = nf.AutoFlow(nf.augmented_model(model, 1), nf.cnf)
        fitted = nf.fit_guide(key, guide, y)

    The price is :math:`E \, \mathrm{KL}(q(e \mid \theta) \| r(e \mid \theta))`, by which the ELBO
    falls short even of that of a guide with the right :math:`q(\theta)`; r trains with the guide.

    Sources: Agakov & Barber (2004), "An auxiliary variational method", eq. 4; Ranganath et al.
    (2016), arXiv:1511.02386, eq. 7.

    :param model: a NumPyro model with continuous latent sites.
    :param augment_dim: size of e.
    :param encoder: recipe of r(e | theta), ``key, augment_dim, context_dim=... ->
        FlowDistribution``; its context are the latent sites in their unconstrained spaces.
    :param name: name of the site of e; r's parameters are at ``name$params``.
    :return: a model of the same arguments and result.
    :raises TypeError: for a size that is no integer.
    :raises ValueError: for a size below 1; when it runs, for a model without continuous latent
        sites.

    >>> import jax, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model():
    ...     numpyro.sample("x", dist.Normal(1.0, 2.0))
    >>> with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace() as sites:
    ...     augmented_model(model, 2)()
    >>> sites["augmentation"]["value"].shape
    (2,)
    """
    check_size("augment_dim", augment_dim)

    @functools.wraps(model)
    def augmented(*args: Any, **kwargs: Any) -> Any:
        with handlers.trace() as sites:
            result = model(*args, **kwargs)
        values = [
            biject_to(site["fn"].support).inv(site["value"]).reshape(-1)
            for site in latent_of(sites).values()
            if not site["fn"].support.is_discrete
        ]
        if not values:
            raise ValueError("augmented_model: the model has no continuous latent sites.")
        theta = jnp.concatenate(values)
        flow = encoder(jax.random.key(0), augment_dim, context_dim=len(theta))
        numpyro.sample(name, flow_module(name, flow).condition(theta))
        return result

    return augmented
