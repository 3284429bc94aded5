"""Neural transport: HMC in the base space of a guide, with the model's exact posterior."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import Array
from numpyro import handlers
from numpyro.distributions import Distribution, biject_to
from numpyro.distributions.util import sum_rightmost
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.reparam import Reparam

from ..compilation import is_traced
from . import _numpyro
from .guide_flow import check_exact
from .guides import AutoFlow
from .params import model_params
from .supports import Winding, with_idle


class _Sites(Reparam):
    """Hands the latent sites of one run of the model their values, each once."""

    def __init__(
        self, unconstrained: dict[str, Array], windings: dict[str, Winding], idle: Collection[str]
    ):
        self.waiting = dict(unconstrained)
        self.windings = windings
        self.idle = idle
        #: Log densities of idle elements, which the masks and scales around a site must not reach.
        self.unmasked: list[Array] = []

    def config(self, site: dict[str, Any]) -> Reparam | None:
        return self if site["name"] in self.waiting else None

    def __call__(self, name: str, fn: Distribution, obs: Any) -> tuple[None, Array]:
        if obs is not None:
            raise ValueError(
                f"Site {name!r} is latent in the guide but has a value in the model. If it is "
                "observed now, fit the guide to the model as it is conditioned. A site inside a "
                "loop of `numpyro.contrib.control_flow` cannot be reparameterised: sample such a "
                "model with `nf.FlowNUTS`, which can."
            )
        unconstrained = self.waiting.pop(name)
        transform = self.windings[name] if name in self.windings else biject_to(fn.support)
        value = transform(unconstrained)
        if numpyro.get_mask() is not False:
            log_det = transform.log_abs_det_jacobian(unconstrained, value)
            log_det = sum_rightmost(log_det, jnp.ndim(log_det) - jnp.ndim(value) + fn.event_dim)
            if name in self.idle:
                nowhere = jnp.logical_not(_numpyro.mask_of(fn))
                none = jnp.zeros_like(log_det)
                self.unmasked.append(with_idle(none, unconstrained, nowhere).sum())
            # Within the site's own plates, scale and mask, as NUTS treats the plain model.
            numpyro.factor(f"_{name}_log_prob", fn.log_prob(value) + log_det)
        return None, value


class NeuTraReparam(Reparam):
    r"""Neural transport: HMC in the base space of a trained guide.

    With the guide's bijection T from base to the unconstrained latent space, the model is run in
    z with density :math:`p(T(z)) \, |\det \partial T / \partial z|`. Its posterior, mapped
    back, is the model's own whatever T is; a good T makes it close to a standard normal in z.

    A drop-in for ``numpyro.infer.reparam.NeuTraReparam`` that also holds where NumPyro's does
    not: when the first latent site is in a plate or has a batch shape, when that site is scaled or
    masked, after an exception in the model, and for models with trained parameters. The flow's
    log-determinant is one factor outside every plate, computed in the same pass as the transform.

    :param guide: any ``AutoContinuous`` guide, set up; NumPyro's own too.
    :param params: its trained parameters; those of the model itself are used as well.
    :raises TypeError: if ``guide`` is not ``AutoContinuous``.
    :raises ValueError: if the guide was not set up or has no transform that stands alone, if its
        log-determinant is an estimate, or if a parameter is not finite.

    Source: Hoffman et al. (2019), arXiv:1903.03704.

    Draws of the base are at the site ``prefix_shared_latent``; the model's own sites appear beside
    it as deterministic ones.

    >>> import jax, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> from numpyro.infer import MCMC, NUTS
    >>> def model():
    ...     numpyro.sample("theta", dist.Normal(1.0, 2.0))
    >>> fitted = nf.fit_guide(jax.random.key(0), nf.AutoFlow(model), progress_bar=False)
    >>> neutra = nf.NeuTraReparam(fitted.guide, fitted.params)
    >>> mcmc = MCMC(
    ...     NUTS(neutra.reparam(model)), num_warmup=50, num_samples=100, progress_bar=False
    ... )
    >>> mcmc.run(jax.random.key(1))
    >>> mcmc.get_samples()["theta"].shape
    (100,)
    """

    def __init__(self, guide: AutoContinuous, params: dict[str, Any]):
        if not isinstance(guide, AutoContinuous):
            raise TypeError(
                f"NeuTraReparam: expected an AutoContinuous guide, got {type(guide).__name__}."
            )
        if guide.prototype_trace is None:
            raise ValueError(
                "NeuTraReparam: this guide was never set up. Train it first, for example with "
                "`svi.run(key, num_steps, *args)`."
            )
        for name, value in params.items():
            leaves = [leaf for leaf in jax.tree.leaves(value) if not is_traced(leaf)]
            if not all(bool(jnp.isfinite(leaf).all()) for leaf in leaves):
                raise ValueError(
                    f"NeuTraReparam: parameter {name!r} is not finite, so training diverged. "
                    "Train again with `svi.run(..., stable_update=True)` or a lower step size."
                )
        self.guide = guide
        self.params = params
        try:
            self.transform = guide.get_transform(params)
        except (NotImplementedError, TypeError) as error:
            raise ValueError(
                f"NeuTraReparam: {type(guide).__name__} has no transform that is independent of "
                "the model's arguments, so it cannot reparameterise a model."
            ) from error
        check_exact(self.transform)
        # Other guides cut the circle, as NUTS does; the map must be the guide's.
        is_flow = isinstance(guide, AutoFlow)
        self._windings = guide.get_windings(params) if is_flow else {}
        self._idle = tuple(guide.space.idle) if is_flow else ()
        self._model_params = model_params(guide, params)

    def reparam(self, fn: Callable) -> Callable:
        """The model in the guide's base space.

        :param fn: the model the guide was made for. Sites inside ``control_flow.scan`` are out
            of reach.
        :return: a model with the same arguments.
        :raises ValueError: while it runs, if the model observes a site that is latent in the
            guide, or does not reach one.
        """

        @functools.wraps(fn)
        def model(*args: Any, **kwargs: Any) -> Any:
            prefix = self.guide.prefix
            z = numpyro.sample(f"{prefix}_shared_latent", self.guide.get_base_dist().mask(False))
            x, intermediates = self.transform.call_with_intermediates(z)
            if numpyro.get_mask() is not False:
                log_det = self.transform.log_abs_det_jacobian(z, x, intermediates)
                numpyro.factor(f"_{prefix}_log_det", log_det)
            # State of this run alone, so that an exception in the model leaves nothing behind.
            sites = _Sites(_numpyro.unpack(self.guide, x), self._windings, self._idle)
            with (
                handlers.substitute(data=self._model_params),
                handlers.reparam(config=sites.config),
            ):
                result = fn(*args, **kwargs)
            if sites.waiting:
                raise ValueError(
                    f"NeuTraReparam: the model did not reach the latent sites "
                    f"{sorted(sites.waiting)} of its guide. Sites inside "
                    "`numpyro.contrib.control_flow` loops cannot be reparameterised."
                )
            if sites.unmasked:
                numpyro.factor(f"_{prefix}_idle", sum(sites.unmasked))
            return result

        return model

    def __call__(self, name: str, fn: Distribution, obs: Any) -> tuple[None, Array]:
        raise TypeError(
            "NeuTraReparam moves all sites together; use `neutra.reparam(model)` instead of "
            "`handlers.reparam(model, config=...)`."
        )

    def transform_sample(self, latent: Array) -> dict[str, Array]:
        """Sites of the model from draws of the base.

        :param latent: shape ``(*batch, latent_dim)``.
        :return: dict from site name to shape ``(*batch, *site_shape)``.
        """
        return _numpyro.sites_of(self.guide, self.transform(latent), self.params)
