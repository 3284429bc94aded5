"""Any flow as an automatic guide."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import Array
from numpyro import handlers
from numpyro.distributions import Distribution, constraints
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_uniform

from ..checks import is_real
from ..distribution import FlowDistribution, combine, partition
from ..recipes import realnvp
from ..transform import FlowTransform
from ..transforms import Standardized


def _sampling_side(recipe: Callable[..., FlowDistribution]) -> Callable[..., FlowDistribution]:
    """The recipe with the direction in which sampling is fast, where that was left open."""
    try:
        has_choice = "inverse" in inspect.signature(recipe).parameters
    except (TypeError, ValueError):  # some callables tell no signature
        return recipe
    said = isinstance(recipe, functools.partial) and "inverse" in recipe.keywords
    return functools.partial(recipe, inverse=False) if has_choice and not said else recipe


class AutoFlow(AutoContinuous):
    r"""Automatic guide with a flow over the unconstrained latent space.

    .. math:: \theta = m + s \odot T(z), \qquad z \sim \text{base}

    T is the recipe's flow, the identity at first, so the guide starts as the normal
    ``AutoDiagonalNormal`` starts as: located by ``init_loc_fn``, of standard deviation
    ``init_scale``. The location m, the scale s and T are all learned. Use it wherever NumPyro
    takes a guide: ``SVI`` with any ELBO, ``Predictive``, ``nf.NeuTraReparam``.

    :param model: a NumPyro model with continuous latent sites.
    :param flow: a recipe, or any ``key, dim -> FlowDistribution`` onto the real vectors; settings
        enter by ``functools.partial(nf.realnvp, depth=4)``. The guide samples from it, so a
        recipe with a choice of direction (``inverse``) is asked for fast sampling, unless the
        settings say otherwise, and ``nf.iaf`` serves better than ``nf.maf``.
    :param prefix: prefix of the guide's parameter sites ``prefix_flow$params``, ``prefix_loc``
        and ``prefix_scale``.
    :param init_loc_fn: NumPyro's initialisation strategy for m.
    :param init_scale: initial s, in units of the unconstrained space; positive.
    :raises ValueError: if ``init_scale`` is not positive; if a guide is used before it was set
        up, or with parameters that are not its own.
    :raises TypeError: if ``flow`` is not callable or does not return a ``FlowDistribution``.

    >>> import jax, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> from numpyro.infer import SVI, Trace_ELBO
    >>> def model():
    ...     numpyro.sample("x", dist.Normal(1.0, 2.0))
    >>> guide = nf.AutoFlow(model)
    >>> svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(num_particles=4))
    >>> result = svi.run(jax.random.key(0), 10, progress_bar=False)
    >>> guide.get_posterior(result.params)
    FlowDistribution(Independent -> Standardized, batch_shape=(), event_shape=(1,))
    """

    scale_constraint = constraints.softplus_positive
    #: Draws from which ``median`` and ``quantiles`` are computed, with a fixed key.
    num_quantile_samples = 10_000

    def __init__(
        self,
        model: Callable,
        flow: Callable[..., FlowDistribution] = realnvp,
        *,
        prefix: str = "auto",
        init_loc_fn: Callable = init_to_uniform,
        init_scale: float = 0.1,
    ):
        if not callable(flow) or isinstance(flow, FlowDistribution | FlowTransform):
            raise TypeError(
                "flow: expected a function of a key and a dimension such as `nf.realnvp`, got "
                f"{flow!r}. The guide finds the dimension itself: for settings write "
                "`functools.partial(nf.realnvp, depth=4)`."
            )
        if not init_scale > 0:
            raise ValueError(f"init_scale: expected a positive number, got {init_scale}.")
        self._recipe = _sampling_side(flow)
        self._init_scale = init_scale
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)

    def _build(self, key: Array) -> tuple[Any, Any]:
        flow = self._recipe(key, self.latent_dim)
        if not isinstance(flow, FlowDistribution):
            raise TypeError(
                f"flow: expected a recipe that returns a FlowDistribution, got one that returns "
                f"{type(flow).__name__}."
            )
        if (
            flow.event_shape != (self.latent_dim,)
            or flow.batch_shape
            or flow.context_dim
            or not is_real(flow.support)
        ):
            raise ValueError(
                f"flow: expected an unconditional flow over real vectors of size "
                f"{self.latent_dim}, got {flow} with support {flow.support}. The guide works in "
                "the unconstrained space and applies the sites' supports itself."
            )
        return partition(flow)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        # Set-up may happen under `jit`; what the guide keeps must not be a tracer.
        with jax.ensure_compile_time_eval():
            _, self._rest = self._build(jax.random.key(0))

    def _get_posterior(self) -> FlowDistribution:
        params = numpyro.param(f"{self.prefix}_flow$params", lambda key: self._build(key)[0])
        flow = combine(params, self._rest)
        loc = numpyro.param(f"{self.prefix}_loc", self._init_latent)
        scale = numpyro.param(
            f"{self.prefix}_scale",
            jnp.full(self.latent_dim, self._init_scale),
            constraint=self.scale_constraint,
        )
        return FlowDistribution(flow.base_dist, Standardized(flow.transform, loc, scale))

    def _check_ready(self, params: dict[str, Any] | None = None) -> None:
        if self.prototype_trace is None:
            raise ValueError(
                "This guide does not know its model's shapes yet: call `svi.init(key, *args)` or "
                "`svi.run(key, num_steps, *args)` first."
            )
        names = {f"{self.prefix}_{part}" for part in ("flow$params", "loc", "scale")}
        if params is not None and not names <= params.keys():
            raise ValueError(
                f"params: expected the trained parameters {sorted(names)}, got {sorted(params)}. "
                "Take them from `svi.get_params(state)` or `svi.run(...).params`."
            )

    def get_base_dist(self) -> Distribution:
        """Base distribution of the flow, of event shape ``(latent_dim,)``."""
        self._check_ready()
        return self._rest.base_dist

    def get_posterior(self, params: dict[str, Any]) -> FlowDistribution:
        """The posterior approximation over the unconstrained latent vector.

        :param params: trained parameters, as from ``svi.get_params``.
        """
        self._check_ready(params)
        return handlers.substitute(self._get_posterior, params)()

    def get_transform(self, params: dict[str, Any]) -> FlowTransform:
        """The bijection from base to the unconstrained latent space."""
        return self.get_posterior(params).transform

    def sample_posterior(
        self,
        rng_key: Array,
        params: dict[str, Any],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Draws of the model's latent and deterministic sites, vectorised over ``sample_shape``."""
        self._check_ready(params)
        return super().sample_posterior(rng_key, params, *args, sample_shape=sample_shape, **kwargs)

    def _unpack_and_constrain(
        self, latent_sample: Array, params: dict[str, Any]
    ) -> dict[str, Array]:
        # NumPyro's version runs the model once per draw, one after the other.
        batch = latent_sample.shape[:-1]
        unpack = super()._unpack_and_constrain
        flat = latent_sample.reshape(-1, self.latent_dim)
        sites = jax.vmap(lambda latent: unpack(latent, params))(flat)
        return jax.tree.map(lambda site: site.reshape(batch + site.shape[1:]), sites)

    def quantiles(self, params: dict[str, Any], quantiles: Any) -> dict[str, Array]:
        """Posterior quantiles of each site, from ``num_quantile_samples`` draws with a fixed key.

        :param params: trained parameters.
        :param quantiles: a number or a list of numbers in [0, 1].
        :return: dict from site name to shape ``(*quantiles.shape, *site_shape)``.
        """
        draws = self.sample_posterior(
            jax.random.key(0), params, sample_shape=(self.num_quantile_samples,)
        )
        levels = jnp.asarray(quantiles)
        return {name: jnp.quantile(draw, levels, axis=0) for name, draw in draws.items()}

    def median(self, params: dict[str, Any]) -> dict[str, Array]:
        """Posterior median of each site, computed as ``quantiles`` computes it."""
        return self.quantiles(params, 0.5)
