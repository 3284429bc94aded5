"""``AutoFlow``: an automatic guide with any flow over the latent space."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from numpyro.distributions import Delta, Distribution
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_uniform

from ...compilation import is_traced, jit
from ...distribution import FlowDistribution
from ...transform import FlowTransform
from ...transforms import Chain, FixedAffine
from .. import _numpyro
from ..centring import CentredAffine, degrees_of
from ..density import latent_of, own_params
from ..elbo import LatentELBO
from ..guide_flow import Recipe, assemble, build, for_guide, guide_flow, site_key, with_arrays
from ..latent_space import (
    Centring,
    LatentSpace,
    LogDensity,
    Sites,
    constrained,
    rows_sites,
    search_rows,
)
from ..maps import LearnedMap
from ..params import model_params
from ..preconditioner import locate
from ..recentre import recentre
from ..setup import SetUp, check_plates, check_repeats
from ..supports import Winding

#: From a model's log density, a key and starts ``(n, dim)`` to where the posterior roughly is.
Preconditioner: TypeAlias = Callable[[LogDensity, Array, Array], FixedAffine]


class Begun(NamedTuple):
    """A guide at the arguments of one call: the model's log density, and starts where it is finite.

    The search for the preconditioner takes the first of them.
    """

    density: LogDensity
    starts: Array
    args: tuple
    kwargs: dict[str, Any]


class Located(NamedTuple):
    """A preconditioner, and how many gradients of the model the search for it took.

    Without a search its scales are a guess, by which nothing can be judged.
    """

    affine: FixedAffine
    num_gradients: int = 0
    is_searched: bool = False


class AutoFlow(AutoContinuous):
    r"""Automatic guide with a flow over the unconstrained latent space.

    .. math:: \theta = P(B(T(z))), \qquad z \sim \text{base}

    P is a fixed affine map, the preconditioner, that locates and scales the posterior roughly
    before training; T, the recipe's flow, and B, an affine map, both the identity at first, learn
    the rest in its whitened coordinates. Use the guide wherever NumPyro takes one: ``SVI`` with
    any ELBO, ``Predictive``, ``nf.NeuTraReparam``.

    By default P is chosen by its ELBO among the start of ``init_loc_fn``, points along L-BFGS
    paths and short Gaussian fits, which takes some seconds when the guide's parameters are
    initialised; only first derivatives of the model are taken, in reverse mode. It travels with the
    parameters and is never trained: its gradient is zero. (Weight decay would still shrink it:
    mask it out of an optimiser that has any.)

    Sites on the circle (``VonMises``) are not cut at :math:`\pm\pi`: the line is wound around it,
    with the winding number as an auxiliary variable (``infer/supports.py``).

    :param model: a NumPyro model with continuous latent sites.
    :param flow: a recipe, or any ``key, dim -> FlowDistribution`` onto the real vectors that runs
        under ``jit``; settings enter by ``functools.partial(nf.realnvp, depth=4)``. The guide
        samples from it, so recipes declare arguments for guides (fast sampling, an exact trace),
        which hold unless the settings say otherwise; ``numpyro_flows.recipes.in_guides`` does the
        same for a recipe of your own. ``nf.iaf`` serves better than ``nf.maf``.
    :param prefix: prefix of the guide's parameter sites ``prefix_flow$params`` and
        ``prefix_preconditioner``.
    :param init: ``"auto"``, or ``"location"`` for the plain start of ``AutoDiagonalNormal``: P
        then is located by ``init_loc_fn`` with standard deviation ``init_scale``. Or a function of
        the model's log density (of ``(dim,)``, with a method ``value_and_grad``), a key and starts
        ``(n, dim)`` at which it is finite, which returns P, a ``nf.transforms.FixedAffine``.
    :param init_loc_fn: NumPyro's initialisation strategy.
    :param init_scale: standard deviation of the start, in units of the unconstrained space;
        positive.
    :raises ValueError: if ``init_scale`` is not positive or ``init`` unknown; if a guide is used
        before it was set up, or with parameters that are not its own; if the model's density is
        not finite anywhere near the starts.
    :raises TypeError: if ``flow`` is not callable or does not return a ``FlowDistribution``.

    >>> import jax, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> from numpyro.infer import SVI, Trace_ELBO
    >>> def model():
    ...     numpyro.sample("x", dist.Normal(1.0, 2.0))
    >>> guide = nf.AutoFlow(model, nf.realnvp)
    >>> svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(num_particles=4))
    >>> result = svi.run(jax.random.key(0), 10, progress_bar=False)
    >>> guide.get_posterior(result.params).event_shape
    (1,)
    """

    model: Any
    # What NumPyro's set-up leaves.
    prototype_trace: Any
    latent_dim: int
    #: Sites, shapes and supports; None before the set-up.
    space: Any
    _init_latent: Any

    #: What errors call it.
    title = "AutoFlow"
    #: Whether discrete sites of finitely many values are summed out unasked.
    sums_out = False
    #: Whether the model's gradient is taken in forward mode.
    forward_mode = False
    #: Starts of the search for the preconditioner.
    num_starts = 4
    #: Draws from which ``median`` and ``quantiles`` are computed, with a fixed key.
    num_quantile_samples = 10_000

    def __init__(
        self,
        model: Callable,
        flow: Callable[..., FlowDistribution] = guide_flow,
        *,
        prefix: str = "auto",
        init: str | Preconditioner = "auto",
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
        if not callable(init) and init not in ("auto", "location"):
            raise ValueError(f"init: expected 'auto', 'location' or a function, got {init!r}.")
        self._recipe = Recipe(for_guide(flow))
        self._init = init
        self._init_scale = init_scale
        super().__init__(model, prefix=prefix, init_loc_fn=with_arrays(init_loc_fn))

    def set_up(
        self, key: Array, args: tuple, kwargs: dict[str, Any], *, as_nuts: bool = False
    ) -> Begun:
        """Learn the sites, their supports and where to start from the model at these arguments.

        :param key: ``jax.random.key``.
        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :param as_nuts: what the density is; see :class:`LogDensity`.
        :raises ValueError: for a model that a guide cannot follow, or whose density is not finite
            at any start.
        """
        found = SetUp(
            self.title, self.model, self.init_loc_fn, key, args, kwargs, sums_out=self.sums_out
        )
        self.model = found.model
        check_plates(self.title, found.trace, latent_of(found.trace))
        _numpyro.warn_of_missing_plates(found.trace)
        if not is_traced((found.start, args, kwargs)):
            again = SetUp(self.title, self.model, self.init_loc_fn, key, args, kwargs)
            check_repeats(self.title, found.trace, again.trace)
        own, seed = own_params(found.trace), jax.random.key(0)

        def density_over(space: LatentSpace) -> LogDensity:
            options = {"as_nuts": as_nuts, "forward_mode": self.forward_mode}
            return LogDensity(self.model, space, args, kwargs, seed, own, **options)

        density = density_over(found.space)
        starts, grads = found.finite_starts(density)
        traced = is_traced((starts, args, kwargs))
        if found.space.idle:
            found.space = found.space.with_idle(() if traced else found.space.unread(starts, grads))
            density = density_over(found.space)
        # Set-up may happen under `jit`; what the guide keeps must not be a tracer.
        self.space, trace = found.without_tracers() if traced else (found.space, found.trace)
        self.latent_dim = self.space.dim
        self._arguments = None if traced else (args, kwargs)
        self._init_latent = None if traced else starts[0]
        _numpyro.adopt(self, trace)
        # Outside, `build` would be compiled for evaluation at compile time and then again.
        with jax.ensure_compile_time_eval() if traced else contextlib.nullcontext():
            _, self.rest = build(self._recipe, self.latent_dim, jax.random.key(0))
        return Begun(density, starts, args, kwargs)

    def _unpack_latent(self, latent: Array) -> Sites:
        # For NumPyro's NeuTraReparam.
        return self.space.unpack(latent)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.set_up(numpyro.prng_key(), args, kwargs)

    def locate(self, key: Array, begun: Begun) -> Located:
        """Search for the preconditioner.

        :param key: ``jax.random.key``.
        :param begun: what :meth:`set_up` returned.
        :raises ValueError: if the density is not finite around any start, or the numbers of a map
            that ``init`` returned are not.
        :raises TypeError: if ``init`` returned another thing.
        """
        density, starts = begun.density, begun.starts
        if callable(self._init):
            return Located(self._checked(self._init(density, key, starts)))
        is_under_jit = is_traced((density, starts))
        if self._init != "location" and is_under_jit:
            warnings.warn(
                f"{self.title}: set up under `jax.jit`, where the search for a "
                "preconditioner cannot run; the guide begins at its start, with standard deviation "
                "`init_scale`. Call `svi.init(key, *args)` outside `jit`.",
                stacklevel=2,
            )
        if self._init == "location" or is_under_jit:
            scale = np.full(self.latent_dim, self._init_scale, starts.dtype)
            return Located(FixedAffine(starts[0], scale))
        seed = np.asarray(jax.random.key_data(key)).tolist()
        distinct = np.unique(starts[: self.num_starts], axis=0)
        found = locate(search_rows(density, starts[0]), seed, distinct, self._init_scale)
        recentred = None
        if (
            self._recipe.centres
            and density.hierarchy.sites
            and not own_params(self.prototype_trace)
        ):
            recentred = recentre(density, seed, distinct, self._init_scale, found)
        if recentred is not None:
            found, degrees = recentred
            affine = CentredAffine(found.affine.transform(), degrees)
            return Located(affine, found.num_gradients, is_searched=True)
        if not np.isfinite(found.elbo):
            raise ValueError(
                "The model's log density is NaN or infinite around every start that was tried. "
                "Start elsewhere with `init_loc_fn`, with a smaller `init_scale`, or with "
                "`init='location'`."
            )
        return Located(found.affine.transform(), found.num_gradients, is_searched=True)

    def _checked(self, affine: Any) -> FixedAffine:
        """The map that a function given as ``init`` returned."""
        if not isinstance(affine, FixedAffine) or affine.event_shape != (self.latent_dim,):
            raise TypeError(
                "init: expected a function that returns `nf.transforms.FixedAffine(loc, scale)` of "
                f"{self.latent_dim} coordinates, got {affine!r}."
            )
        numbers = [np.asarray(x) for x in jax.tree.leaves(affine) if not is_traced(x)]
        if not all(np.isfinite(x).all() for x in numbers):
            raise ValueError("init: the function returned a map whose numbers are not all finite.")
        return affine

    def _space_at(self, args: tuple, kwargs: dict[str, Any]) -> LatentSpace:
        """The latent space with the supports that these arguments give it."""
        if not self.space.depends_on_arguments or not (args or kwargs):
            return self.space
        key = jax.random.key(0)
        space = SetUp(self.title, self.model, self.init_loc_fn, key, args, kwargs).space
        return space.with_idle(self.space.idle)

    def log_density(
        self, params: dict[str, Any], args: tuple, kwargs: dict[str, Any], *, whole: bool = False
    ) -> LogDensity:
        """The model's log density over the latent space at these arguments.

        :param params: trained parameters; those of the model itself are used.
        :param whole: whether subsampled plates have all their rows.
        """
        space, own = self._space_at(args, kwargs), model_params(self, params)
        return LogDensity(self.model, space, args, kwargs, jax.random.key(0), own, whole=whole)

    def flow(self, params: Any, affine: FixedAffine) -> FlowDistribution:
        """The flow with these parameters, onto the coordinates of a preconditioner."""
        return assemble(params, self.rest, affine)

    def latent_flow(
        self, params: dict[str, Any], args: tuple = (), kwargs: Any = None
    ) -> FlowDistribution:
        """The flow over the latent space.

        :param params: trained parameters.
        :param args: arguments of the model, on which the centring of sites may depend; by default
            those that the guide was set up with.
        """
        flow_params, affine = (params[name] for name in self.names)
        flow, degrees = self.flow(flow_params, affine), degrees_of(affine)
        if degrees is None:
            return flow
        if not (args or kwargs):
            args, kwargs = self._arguments or ((), {})
        centring = Centring(self.log_density(params, args, kwargs or {}).centred(degrees))
        return FlowDistribution(flow.base_dist, Chain([*flow.transform.parts, centring]))

    def windings(self, affine: FixedAffine) -> dict[str, Winding]:
        """What unwinds the sites that are angles, around where the preconditioner found them."""
        return self.space.windings(affine.loc.value, lambda: affine.standard_deviation)

    @property
    def names(self) -> tuple[str, str]:
        """Names of the parameter sites: the flow's and the preconditioner's."""
        return f"{self.prefix}_flow$params", f"{self.prefix}_preconditioner"

    def initial_flow(self, key: Array) -> Any:
        """The flow's parameters before training: the identity."""
        return build(self._recipe, self.latent_dim, key)[0]

    def learned(
        self,
        params: dict[str, Any],
        args: tuple,
        kwargs: dict[str, Any],
        density: LogDensity | None = None,
    ) -> LearnedMap:
        """The guide as a map from its base space, with the model at these arguments.

        :param params: trained parameters.
        :param density: the model's log density, if it is at hand.
        """
        self._check_ready(params)
        flow, affine = (params[name] for name in self.names)
        if density is None:
            density = self.log_density(params, args, kwargs)
        centred = density.centred(degrees_of(affine))
        return LearnedMap(centred, self.flow(flow, affine), self.windings(affine))

    def elbo(self, density: LogDensity, affine: FixedAffine, num_particles: int) -> LatentELBO:
        """The objective of this guide's flow, behind a preconditioner."""
        density = density.centred(degrees_of(affine))
        return LatentELBO(density, self.windings(affine), self.rest, affine, num_particles)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        begun = None
        if self.prototype_trace is None:
            begun = self.set_up(numpyro.prng_key(), args, kwargs)

        def preconditioner(key: Array) -> FixedAffine:
            return self.locate(key, begun or self.set_up(key, args, kwargs)).affine

        flow_name, affine_name = self.names
        params = numpyro.param(flow_name, self.initial_flow)
        affine = numpyro.param(affine_name, preconditioner)
        flow = self.latent_flow(dict(zip(self.names, (params, affine), strict=True)), args, kwargs)
        latent = numpyro.sample(f"_{self.prefix}_latent", flow, infer={"is_auxiliary": True})
        space = begun.density.space if begun else self._space_at(args, kwargs)
        event_dims = dict(space.event_dims)
        result = {}
        for name, value, log_det in space.constrain(latent, self.windings(affine)):
            delta = Delta(value, log_density=-log_det, event_dim=event_dims[name])
            result[name] = numpyro.sample(name, delta)
        return result

    def _check_ready(self, params: dict[str, Any] | None = None) -> None:
        if self.prototype_trace is None:
            raise ValueError(
                "This guide was never set up and does not know its model's shapes yet: train it "
                "with `nf.fit_guide`, or call `svi.init(key, *args)`."
            )
        if params is not None and not set(self.names) <= params.keys():
            raise ValueError(
                f"params: expected the trained parameters {sorted(self.names)}, got "
                f"{sorted(params)}. Take them from `svi.get_params(state)` or "
                "`svi.run(...).params`."
            )

    def _get_posterior(self) -> Any:
        raise NotImplementedError("AutoFlow draws from `get_posterior(params)`.")

    def get_base_dist(self) -> Distribution:
        """Base distribution of the flow, of event shape ``(latent_dim,)``."""
        self._check_ready()
        return self.rest.base_dist

    def get_posterior(self, params: dict[str, Any]) -> FlowDistribution:
        """The posterior approximation over the unconstrained latent vector.

        :param params: trained parameters, as from ``svi.get_params``.
        """
        self._check_ready(params)
        return self.latent_flow(params)

    def get_transform(self, params: dict[str, Any]) -> FlowTransform:
        """The bijection from base to the unconstrained latent space."""
        return self.get_posterior(params).transform

    def get_windings(self, params: dict[str, Any]) -> dict[str, Winding]:
        """What turns points of the line into angles, by site; empty without circular sites.

        :param params: trained parameters.
        """
        self._check_ready(params)
        return self.windings(params[self.names[1]])

    def sample_posterior(
        self,
        rng_key: Array,
        params: dict[str, Any],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> Sites:
        """Draws of the model's latent and deterministic sites.

        :param rng_key: ``jax.random.key``.
        :param params: trained parameters.
        :param args: arguments of the model, as are the other keyword arguments; by default those
            that the guide was set up with.
        :param sample_shape: leading shape of the draws.
        :return: dict from site name to shape ``(*sample_shape, *site_shape)``.
        """
        self._check_ready(params)
        posterior = self.latent_flow(params, args, kwargs)
        latent = _draws(posterior, site_key(rng_key, self.prefix), tuple(sample_shape))
        return self.to_sites(latent, params, args, kwargs)

    def to_sites(
        self, latent: Array, params: dict[str, Any], args: tuple = (), kwargs: Any = None
    ) -> Sites:
        """Latent and deterministic sites at points of the latent space.

        :param latent: shape ``(*batch, latent_dim)``.
        :param params: trained parameters.
        :param args: arguments of the model; by default those that the guide was set up with.
        :param kwargs: keyword arguments of the model.
        :raises ValueError: for a model with deterministic sites, set up under ``jax.jit``.
        """
        kwargs = kwargs or {}
        flat = latent.reshape(-1, self.latent_dim)
        if not any(site["type"] == "deterministic" for site in self.prototype_trace.values()):
            sites = constrained(self._space_at(args, kwargs), flat)
        else:
            if not (args or kwargs):
                if self._arguments is None:
                    raise ValueError(
                        "This guide was set up under `jax.jit`, where it cannot keep the arguments "
                        "that the model's deterministic sites may need. Call `svi.init(key, *args)`"
                        " once outside `jit`, or give them here."
                    )
                args, kwargs = self._arguments
            sites = rows_sites(self.log_density(params, args, kwargs), flat)
        return jax.tree.map(lambda site: site.reshape(latent.shape[:-1] + site.shape[1:]), sites)

    def _unpack_and_constrain(self, latent_sample: Array, params: dict[str, Any]) -> Sites:
        # For NumPyro's NeuTraReparam. Its own version runs the model once per draw.
        return self.to_sites(latent_sample, params)

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


@jit(static_argnums=2, once=True)
def _draws(posterior: FlowDistribution, key: Array, shape: tuple[int, ...]) -> Array:
    return posterior.sample(key, shape)
