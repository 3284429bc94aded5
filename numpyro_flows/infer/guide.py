"""Any flow as an automatic guide."""

import contextlib
import functools
import inspect
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from numpyro import handlers
from numpyro.distributions import Delta, Distribution, biject_to
from numpyro.distributions.constraints import Constraint
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_uniform, init_to_value

from ..checks import is_real
from ..compilation import is_traced, jit
from ..distribution import FlowDistribution, combine, partition
from ..elementwise import DeepSigmoid
from ..parts import inexactness
from ..recipes import coupling_flow, realnvp
from ..transform import FlowTransform
from ..transforms import ActNorm, Chain, FixedAffine, TriangularAffine
from .arguments import Static, join_arguments, split_arguments
from .density import log_joint
from .preconditioner import FULL, Located, locate
from .setup import explained
from .supports import Winding, constrain, is_circular


def for_guide(recipe: Callable[..., FlowDistribution]) -> Callable[..., FlowDistribution]:
    """The recipe with the ``guide_settings`` that it declares, where they were left open."""
    inner, given = recipe, {}
    if isinstance(recipe, functools.partial):
        inner, given = recipe.func, recipe.keywords
    settings = getattr(inner, "guide_settings", {})
    return functools.partial(recipe, **(settings | given)) if settings else recipe


def with_arrays(strategy: Callable) -> Callable:
    """``init_to_value`` with floating arrays for Python numbers and integers, others as they are.

    NumPyro hands values on as they came, to code that differentiates and reshapes them.
    """
    if not isinstance(strategy, functools.partial) or strategy.func is not init_to_value:
        return strategy
    values = strategy.keywords.get("values", {})
    return init_to_value(
        values={name: np.asarray(x, jnp.result_type(float, x)) for name, x in values.items()}
    )


def check_exact(flow: Any) -> None:
    """Refuse a flow or transform whose log density or log-determinant is not exact.

    :raises ValueError: for one that is an estimate or a bound.
    """
    if kind := inexactness(flow):
        raise ValueError(
            f"flow: expected an exact log density, got the {kind}, with which neither ELBO nor "
            "importance weights nor neural transport would be right. Build a continuous flow with "
            "`trace='exact'` in place of a stochastic trace; for an augmented guide, fit an exact "
            "flow to `nf.augmented_model(model)`."
        )


def site_key(key: Array, prefix: str) -> Array:
    """A key of this guide's own: ``AutoGuideList`` hands all its guides the same one."""
    return jax.random.fold_in(key, zlib.crc32(prefix.encode()))


def guide_flow(key: Array, dim: int, *, context_dim: int = 0) -> FlowDistribution:
    """The flow of a guide for which none was chosen: smooth, deep and narrow.

    Sixteen affine couplings with networks of two layers of 32 units; in one dimension, where
    affine maps are all alike, monotone networks instead.

    :param key: ``jax.random.key``.
    :param dim: number of coordinates.
    :param context_dim: width of the context.
    """
    if dim == 1:
        return coupling_flow(
            key, 1, DeepSigmoid(), depth=2, hidden=(32, 32), context_dim=context_dim
        )
    # Each coordinate moves in half of the layers, and another passes in half of those: a scale that
    # grows with it to the end of its tail, as a funnel's does, needs more than the default bound.
    return realnvp(
        key,
        dim,
        depth=16,
        hidden=(32, 32),
        activation="gelu",
        log_scale_bound=3.0,
        context_dim=context_dim,
    )


# Compiled as one: run bit by bit, a recipe's many small programs take seconds.
@jit(static_argnums=(0, 1))
def build(recipe: Callable[..., FlowDistribution], dim: int, key: Array) -> tuple[Any, Any]:
    """The recipe's flow with a trainable affine map behind it, parted for training."""
    flow = recipe(key, dim)
    check_exact(flow)
    if not isinstance(flow, FlowDistribution):
        raise TypeError(
            f"flow: expected a recipe that returns a FlowDistribution, got one that returns "
            f"{type(flow).__name__}."
        )
    shape_fits = flow.event_shape == (dim,) and not flow.batch_shape
    if not shape_fits or flow.context_dim or not is_real(flow.support):
        raise ValueError(
            f"flow: expected an unconditional flow over real vectors of size {dim}, got {flow} "
            f"with support {flow.support}. The guide works in the unconstrained space and applies "
            "the sites' supports itself."
        )
    affine = TriangularAffine(dim) if dim <= FULL else ActNorm(dim)
    return partition(FlowDistribution(flow.base_dist, Chain([flow.transform, affine])))


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
        then is located by ``init_loc_fn`` with standard deviation ``init_scale``.
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

    # What NumPyro's set-up leaves.
    prototype_trace: Any
    _init_locs: dict[str, Array]
    _init_latent: Array
    _postprocess_fn: Any

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
        init: str = "auto",
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
        if init not in ("auto", "location"):
            raise ValueError(f"init: expected 'auto' or 'location', got {init!r}.")
        recipe = for_guide(flow)
        # `build` is compiled for a recipe, and a partial can be hashed whatever it holds.
        self._recipe: Callable[..., FlowDistribution] = (
            recipe if inspect.isfunction(recipe) else functools.partial(recipe)
        )
        self._init = init
        self._init_scale = init_scale
        super().__init__(model, prefix=prefix, init_loc_fn=with_arrays(init_loc_fn))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            with explained(type(self).__name__):
                super()._setup_prototype(*args, **kwargs)
        except RuntimeError as error:
            if "valid initial parameters" not in str(error):
                raise
            raise ValueError(self._no_start(args, kwargs)) from error
        self.circular = [
            name
            for name in self._init_locs
            if is_circular(self.prototype_trace[name]["fn"].support)
        ]
        for name in self.circular:  # NumPyro's point on the line, as an angle
            support = self.prototype_trace[name]["fn"].support
            self._init_locs[name] = biject_to(support)(self._init_locs[name])
        self._init_latent = jnp.concatenate([loc.reshape(-1) for loc in self._init_locs.values()])
        self._check_supports(args, kwargs)
        self._traced = is_traced((self._init_latent, args, kwargs))
        # Set-up may happen under `jit`; what the guide keeps must not be a tracer. Outside, `build`
        # would be compiled for evaluation at compile time and then again for the parameters.
        with jax.ensure_compile_time_eval() if self._traced else contextlib.nullcontext():
            _, self._rest = build(self._recipe, self.latent_dim, jax.random.key(0))

    def _forget_tracers(self) -> None:
        """Keep of a set-up under ``jit`` what outlives its trace: names, shapes and supports."""

        def stand_in(leaf: Any) -> Any:
            if not isinstance(leaf, jax.core.Tracer):
                return leaf
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                with jax.ensure_compile_time_eval():
                    return jax.random.key(0)
            return np.zeros(leaf.shape, leaf.dtype)

        for name in self._init_locs:
            if is_traced(self.prototype_trace[name]["fn"].support):
                raise ValueError(
                    f"Site {name!r}: its support depends on the model's arguments, which a set-up "
                    "under `jax.jit` cannot keep. Call `svi.init(key, *args)` outside `jit`."
                )
        self.prototype_trace = jax.tree.map(stand_in, self.prototype_trace)
        self._init_locs = jax.tree.map(stand_in, self._init_locs)
        self._init_latent = stand_in(self._init_latent)
        self._potential_fn = self._potential_fn_gen = self._postprocess_fn = None
        self._traced = False

    def _start(self, key: Array, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A trace of the model at a start of the initialisation strategy."""
        started = handlers.substitute(
            handlers.seed(self.model, key), substitute_fn=self.init_loc_fn
        )
        return handlers.trace(started).get_trace(*args, **kwargs)

    def _no_start(self, args: tuple, kwargs: dict[str, Any]) -> str:
        with handlers.block():
            trace = self._start(jax.random.key(0), args, kwargs)
        bad = [
            name
            for name, site in trace.items()
            if site["type"] == "sample"
            and not bool(jnp.isfinite(site["fn"].log_prob(site["value"])).all())
        ]
        where = f"site {', '.join(map(repr, bad))}" if bad else "a factor or a gradient"
        return (
            f"The model's log density or its gradient is NaN or infinite at every start: look at "
            f"{where}. Check the data there, or start elsewhere with `init_loc_fn`, for example "
            "`numpyro.infer.init_to_median`."
        )

    def _check_supports(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuse sites whose support depends on other latent sites."""
        supports = {name: self.prototype_trace[name]["fn"].support for name in self._init_locs}

        def bounds(support: Constraint) -> list[Any]:
            return [leaf for leaf in jax.tree.leaves(support) if isinstance(leaf, jax.Array)]

        suspects = [name for name, support in supports.items() if bounds(support)]
        if not suspects:
            return
        moved, _ = self._constrained(self._init_latent + 0.5, self._windings(None))
        with handlers.block():
            model = handlers.substitute(handlers.seed(self.model, 0), data=moved)
            trace = handlers.trace(model).get_trace(*args, **kwargs)
        for name in suspects:
            pairs = zip(bounds(supports[name]), bounds(trace[name]["fn"].support), strict=True)
            for before, after in pairs:
                if isinstance(after, jax.core.Tracer):
                    continue
                if not np.array_equal(before, after):
                    raise ValueError(
                        f"Site {name!r}: its support depends on other latent sites, which a guide "
                        "over one unconstrained space cannot follow. Draw from a fixed support and "
                        "transform: u ~ Uniform(0, 1), then "
                        f"`numpyro.deterministic({name!r}, low + u * (high - low))`."
                    )

    def _windings(self, affine: FixedAffine | None) -> dict[str, Winding]:
        """What unwinds the sites that are angles, around where the preconditioner found them."""
        if affine is None:
            loc, scale = self._init_latent, jnp.full_like(self._init_latent, jnp.pi)
        else:
            # Below 1 a narrower window gains nothing: the next turn has a share of exp(-20).
            loc, scale = affine.loc.value, jnp.clip(affine.standard_deviation, 1.0, jnp.pi)
        locs, scales = self._unpack_latent(loc), self._unpack_latent(scale)
        return {name: Winding(locs[name], scales[name]) for name in self.circular}

    def _constrained(
        self, latent: Array, windings: dict[str, Winding]
    ) -> tuple[dict[str, Array], Array]:
        """The sites' values, and the log-determinant of what constrains them."""
        values, total = {}, jnp.zeros(())
        sites = self._unpack_latent(latent)
        for name, value, log_det in constrain(sites, self.prototype_trace, windings):
            values[name] = value
            total = total + log_det.sum()
        return values, total

    def _start_latent(self, key: Array, args: tuple, kwargs: dict[str, Any]) -> Array:
        """A start of the initialisation strategy as an unconstrained vector, ``(latent_dim,)``."""
        trace = self._start(key, args, kwargs)
        values = {name: trace[name]["value"] for name in self._init_locs}
        return self._pack(values, lambda name: trace[name]["fn"].support)

    def _pack(self, values: dict[str, Array], support: Callable[[str], Constraint]) -> Array:
        """The sites' values as an unconstrained vector; angles as they are, not unwound."""
        sites = [
            values[name] if name in self.circular else biject_to(support(name)).inv(values[name])
            for name in self._init_locs
        ]
        return jnp.concatenate([site.reshape(-1) for site in sites])

    def _locate(self, key: Array, args: tuple, kwargs: dict[str, Any]) -> Located:
        """Search for the preconditioner.

        :raises ValueError: if the density is not finite around any start.
        """
        if self._postprocess_fn is None:  # set up under `jit`: its start is gone
            self._setup_prototype(*args, **kwargs)
        start = self._init_latent
        if self._init == "location":
            zero = jnp.zeros((), int)
            return Located(FixedAffine(start, self._init_scale), jnp.nan * start[0], zero)
        start_key, model_key, key = jax.random.split(key, 3)

        @jit(static_argnums=2)
        def search(start: Array, traced: Any, static: Static) -> Located:
            args, kwargs = join_arguments(traced, static)

            def log_density(latent: Array) -> Array:
                values, log_det = self._constrained(latent, self._windings(None))
                return log_joint(self.model, model_key, args, kwargs, values).log_density + log_det

            keys = jax.random.split(start_key, self.num_starts - 1)
            others = jax.vmap(lambda key: self._start_latent(key, args, kwargs))(keys)
            starts = jnp.concatenate([start[None], others.astype(start.dtype)])
            return locate(log_density, key, starts, self._init_scale)

        with handlers.block(), explained(type(self).__name__):
            found = search(start, *split_arguments(args, kwargs))
        if not isinstance(found.elbo, jax.core.Tracer) and not jnp.isfinite(found.elbo):
            raise ValueError(
                "The model's log density is NaN or infinite around every start that was tried. "
                "Start elsewhere with `init_loc_fn`, with a smaller `init_scale`, or with "
                "`init='location'`."
            )
        return found

    def _get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        params = numpyro.param(
            f"{self.prefix}_flow$params", lambda key: build(self._recipe, self.latent_dim, key)[0]
        )
        flow = combine(params, self._rest)
        affine = numpyro.param(
            f"{self.prefix}_preconditioner", lambda key: self._locate(key, args, kwargs).affine
        )
        affine = jax.lax.stop_gradient(affine)
        return FlowDistribution(flow.base_dist, Chain([*flow.transform.parts, affine]))

    def _sample_latent(self, *args: Any, **kwargs: Any) -> Array:
        sample_shape = kwargs.pop("sample_shape", ())
        posterior = self._get_posterior(*args, **kwargs)
        return self._draw(posterior.expand_by(sample_shape))

    def _draw(self, posterior: Distribution) -> Array:
        name = f"_{self.prefix}_latent"
        return numpyro.sample(name, posterior, infer={"is_auxiliary": True})

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        posterior = self._get_posterior(*args, **kwargs)
        sites = self._unpack_latent(self._draw(posterior))
        windings = self._windings(posterior.transform.parts[-1])
        result = {}
        for name, value, log_det in constrain(sites, self.prototype_trace, windings):
            event_dim = self.prototype_trace[name]["fn"].event_dim
            delta = Delta(value, log_density=-log_det, event_dim=event_dim)
            result[name] = numpyro.sample(name, delta)
        if self._traced:
            self._forget_tracers()
        return result

    def _check_ready(self, params: dict[str, Any] | None = None) -> None:
        if self.prototype_trace is None:
            raise ValueError(
                "This guide does not know its model's shapes yet: call `svi.init(key, *args)` or "
                "`svi.run(key, num_steps, *args)` first."
            )
        names = {f"{self.prefix}_{part}" for part in ("flow$params", "preconditioner")}
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

    def get_windings(self, params: dict[str, Any]) -> dict[str, Winding]:
        """What turns points of the line into angles, by site; empty without circular sites.

        :param params: trained parameters.
        """
        self._check_ready(params)
        return self._windings(params[f"{self.prefix}_preconditioner"])

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
        key = site_key(rng_key, self.prefix)
        return super().sample_posterior(key, params, *args, sample_shape=sample_shape, **kwargs)

    def _unpack_and_constrain(
        self, latent_sample: Array, params: dict[str, Any]
    ) -> dict[str, Array]:
        # NumPyro's version runs the model once per draw, one after the other.
        batch = latent_sample.shape[:-1]
        unpack = super()._unpack_and_constrain
        windings = self.get_windings(params)
        follow = any(site["type"] == "deterministic" for site in self.prototype_trace.values())
        if follow and self._postprocess_fn is None:
            raise ValueError(
                "This guide was set up under `jax.jit`, where it cannot keep the arguments that "
                "the model's deterministic sites may need. Call `svi.init(key, *args)` once "
                "outside `jit`."
            )

        def one(latent: Array) -> dict[str, Array]:
            if not follow:
                return self._constrained(latent, windings)[0]
            if windings:  # NumPyro expects its own point on the line for an angle
                points = self._unpack_latent(latent)
                for name, winding in windings.items():
                    support = self.prototype_trace[name]["fn"].support
                    points[name] = biject_to(support).inv(winding(points[name]))
                latent = jnp.concatenate([point.reshape(-1) for point in points.values()])
            return unpack(latent, params)

        sites = jax.vmap(one)(latent_sample.reshape(-1, self.latent_dim))
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
