"""Guides for local latent sites: one conditional flow, steered by each row's data."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from numpyro import handlers
from numpyro.distributions import Delta, biject_to
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.initialization import init_to_median

from ...checks import check_key, check_size, is_real
from ...distribution import FlowDistribution, combine, partition
from .. import _numpyro
from ..density import check_set_up, latent_of, unblocked
from ..guide_flow import check_exact, for_guide, guide_flow, site_key, with_arrays
from ..setup import SetUp
from ..supports import Winding, constrain


class AmortizedFlow(AutoGuide):
    r"""Automatic guide for the latent sites of one plate: :math:`q(z_i \mid c_i)` for each row i.

    One conditional flow over the unconstrained local latent vector serves all rows; its context
    :math:`c_i` is what ``encoder`` makes of the model's arguments. The number of parameters does
    not grow with the number of rows, new rows need no training, and under subsampling each row
    counts as the plate says. NumPyro's continuous guides have no local latent sites.

    Beside global latent sites, compose: ``guide = AutoGuideList(model)``, then
    ``guide.append(nf.AutoFlow(handlers.block(model, hide=["z"])))`` and
    ``guide.append(nf.AmortizedFlow(handlers.block(model, expose=["z"]), encoder, 3))``.

    :param model: a NumPyro model whose latent sites are all in one plate.
    :param encoder: called with the model's arguments; returns the context of each row, shape
        ``(rows, context_dim)``, for the rows of the subsample or for all rows of the plate. A
        pytree of arrays that is called (an Equinox module, ``nf.nn.Embedding``) trains with the
        flow.
    :param context_dim: width of the context.
    :param flow: a recipe, or any ``key, dim, context_dim=... -> FlowDistribution`` onto the real
        vectors.
    :param prefix: prefix of the parameter sites ``prefix_flow$params`` and
        ``prefix_encoder$params``.
    :param init_loc_fn: NumPyro's initialisation strategy, used to find the sites' shapes.
    :param create_plates: as for NumPyro's guides.
    :raises ValueError: if the latent sites are not all in one plate, or the encoder returns
        something of another shape.
    :raises TypeError: if ``encoder`` or ``flow`` cannot be called.

    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model(x):
    ...     with numpyro.plate("rows", len(x)):
    ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
    >>> guide = nf.AmortizedFlow(model, lambda x: x[:, None], 1)
    >>> numpyro.handlers.seed(guide, 0)(jnp.ones(5))["z"].shape
    (5,)
    """

    def __init__(
        self,
        model: Callable,
        encoder: Callable,
        context_dim: int,
        flow: Callable[..., FlowDistribution] = guide_flow,
        *,
        prefix: str = "auto_local",
        init_loc_fn: Callable = init_to_median,
        create_plates: Callable | None = None,
    ):
        for name, value in (("encoder", encoder), ("flow", flow)):
            if not callable(value) or isinstance(value, FlowDistribution):
                raise TypeError(f"{name}: expected something to call, got {value!r}.")
        self._encoder = encoder
        self._context_dim = check_size("context_dim", context_dim)
        self._recipe = for_guide(flow)
        super().__init__(
            model,
            prefix=prefix,
            init_loc_fn=with_arrays(init_loc_fn),
            create_plates=create_plates,
        )

    def _build(self, key: Array) -> tuple[Any, Any]:
        flow = self._recipe(key, self._local_dim, context_dim=self._context_dim)
        check_exact(flow)
        if flow.event_shape != (self._local_dim,) or not is_real(flow.support):
            raise ValueError(
                f"flow: expected a flow over real vectors of size {self._local_dim}, got {flow}."
            )
        return partition(flow)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        found = self._set_up(numpyro.prng_key(), args, kwargs)
        self.space = found.space.with_idle(())
        _numpyro.adopt(self, found.trace)
        latent = latent_of(self.prototype_trace)
        frames = {frame for site in latent.values() for frame in site["cond_indep_stack"]}
        if len(frames) != 1 or any(not site["cond_indep_stack"] for site in latent.values()):
            described = {
                name: [frame.name for frame in site["cond_indep_stack"]]
                for name, site in latent.items()
            }
            raise ValueError(
                "AmortizedFlow: expected latent sites that are all in one and the same plate, got "
                f"{described} (site: plates). Give other sites a guide of their own with "
                "`AutoGuideList` and `numpyro.handlers.block`."
            )
        (self._frame,) = frames
        if self._frame.name not in self._prototype_frame_full_sizes:
            # `handlers.block` hides the plate too; the model inside it knows the plate's size.
            with handlers.block():
                inner = handlers.seed(unblocked(self.model), 0)
                trace = handlers.trace(inner).get_trace(*args, **kwargs)
            self._prototype_frame_full_sizes[self._frame.name] = trace[self._frame.name]["args"][0]
        if self._frame.dim != -1:
            raise ValueError(
                f"AmortizedFlow: expected the plate {self._frame.name!r} at dim=-1, got "
                f"{self._frame.dim}."
            )
        self._shapes = {}
        for name, site in latent.items():
            support = site["fn"].support
            event = jnp.shape(site["value"])[jnp.ndim(site["value"]) - site["fn"].event_dim :]
            self._shapes[name] = tuple(biject_to(support).inverse_shape(event))
        self._local_dim = sum(math.prod(shape) for shape in self._shapes.values())
        with jax.ensure_compile_time_eval():
            _, self._rest = self._build(jax.random.key(0))

    def _set_up(self, key: Array, args: tuple, kwargs: dict[str, Any]) -> SetUp:
        return SetUp(type(self).__name__, self.model, self.init_loc_fn, key, args, kwargs)

    def _flow(self) -> FlowDistribution:
        params = numpyro.param(f"{self.prefix}_flow$params", lambda key: self._build(key)[0])
        return combine(params, self._rest)

    def _encode(self, args: tuple, kwargs: dict[str, Any]) -> Array:
        """The context of the rows in the arguments."""
        encoder = self._encoder
        if any(leaf is not encoder for leaf in jax.tree.leaves(encoder)):
            params, rest = partition(encoder)
            site = numpyro.param(f"{self.prefix}_encoder$params", lambda _: params)
            encoder = combine(site, rest)
        context = jnp.asarray(encoder(*args, **kwargs))
        if context.ndim != 2 or context.shape[1] != self._context_dim:
            raise ValueError(
                f"encoder: expected a context of shape (rows, {self._context_dim}), got "
                f"{context.shape}."
            )
        return context

    def _of_subsample(self, context: Array, index: Array) -> Array:
        full = self._prototype_frame_full_sizes[self._frame.name]
        if len(context) == full and len(index) != full:
            return context[index]
        if len(context) != len(index):
            raise ValueError(
                f"encoder: expected {len(index)} rows, those of the subsample, or all {full} of "
                f"the plate {self._frame.name!r}, got {len(context)}."
            )
        return context

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        flow, context = self._flow(), self._encode(args, kwargs)
        result = {}
        with self._create_plates(*args, **kwargs)[self._frame.name] as index:
            rows = flow.condition(self._of_subsample(context, index))
            latent = numpyro.sample(f"_{self.prefix}_latent", rows, infer={"is_auxiliary": True})
            event_dims = dict(self.space.event_dims)
            for name, value, log_det in self._constrained(latent, rows, args, kwargs):
                delta = Delta(value, log_density=-log_det, event_dim=event_dims[name])
                result[name] = numpyro.sample(name, delta)
        return result

    def _unpack(self, latent: Array) -> dict[str, Array]:
        stops = np.cumsum([math.prod(shape) for shape in self._shapes.values()])[:-1]
        pieces = jnp.split(latent, stops, axis=-1)
        return {
            name: piece.reshape(latent.shape[:-1] + shape)
            for piece, (name, shape) in zip(pieces, self._shapes.items(), strict=True)
        }

    def _constrained(
        self, latent: Array, rows: FlowDistribution, args: tuple, kwargs: dict[str, Any]
    ) -> Iterator[tuple[str, Array, Array]]:
        """Each site's name, values and log-determinants of its constraint."""
        space, windings = self.space, {}
        if space.depends_on_arguments:
            space = self._set_up(jax.random.key(0), args, kwargs).space
        if space.circular:
            # Each row unwinds its angles around the image of the base's centre.
            centre = rows.transform(jnp.zeros(rows.shape(), latent.dtype))
            centres = self._unpack(jax.lax.stop_gradient(centre))
            windings = {name: Winding(centres[name], 1.0) for name in space.circular}
        return constrain(self._unpack(latent), space.supports, dict(space.event_dims), windings, {})

    def sample_posterior(
        self,
        rng_key: Array,
        params: dict[str, Any],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Draws of the local sites for the rows in the arguments, be they those of training or new.

        :param rng_key: ``jax.random.key``.
        :param params: trained parameters.
        :param args: arguments of the model, as are the other keyword arguments; the encoder reads
            them.
        :param sample_shape: leading shape of the draws.
        :return: dict from site names to shape ``(*sample_shape, rows, *event)``.
        """
        check_set_up(self)
        key = site_key(check_key(rng_key), self.prefix)
        flow = handlers.substitute(self._flow, data=params)()
        context = handlers.substitute(self._encode, data=params)(args, kwargs)
        rows = flow.condition(context)
        latent = rows.sample(key, sample_shape)
        return {name: value for name, value, _ in self._constrained(latent, rows, args, kwargs)}
