"""Objectives of guides: the ELBO with the path gradient, and penalties of continuous flows."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
from jax import Array
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike
from numpyro.infer import Trace_ELBO
from numpyro.primitives import Messenger

from ..distribution import FlowDistribution, solved
from ..parts import is_rowwise
from ..training.mesh import Split
from ..transform import FlowTransform
from ..transforms import FixedAffine, penalized
from .guide_flow import assemble
from .latent_space import LogDensity
from .supports import Winding

Step = Callable[[FlowTransform, Array], tuple[Array, Array]]


def _as_batch(step: Step) -> Step:
    """``step``, of which ``jax.vmap`` over values makes one call with a batch.

    What ``vmap`` makes of a layer by itself has the particles first and the coordinates after them,
    and is turned around for every product. There is no reverse mode inside of the ``vmap``.
    """
    whole = custom_vmap(step)

    @whole.def_vmap
    def rule(size: int, mapped: Any, transform: FlowTransform, value: Array) -> Any:
        if any(jax.tree.leaves(mapped[0])):
            axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, mapped)
            return jax.vmap(step, in_axes=axes)(transform, value), (True, True)
        return step(transform, value), (True, True)

    return whole


_forward = _as_batch(lambda transform, x: transform.forward_and_log_det(x))
_inverse = _as_batch(lambda transform, y: transform.inverse_and_log_det(y))


def path_log_prob(flow: FlowDistribution, value: ArrayLike) -> Array:
    """Log density with gradients through the value alone, not through the flow's parameters."""
    base_dist, transform = jax.lax.stop_gradient((flow.base_dist, flow.transform))
    return FlowDistribution(base_dist, transform).log_prob(value)


class _PathFlow(FlowDistribution):
    """A flow with :func:`path_log_prob` as its density."""

    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Array:
        # The intermediates carry the parameters' gradient, so the inverse pass is made anew.
        return path_log_prob(self, value)


class _MappedPathFlow(FlowDistribution):
    """The same for one particle of a ``jax.vmap`` over many."""

    def sample_with_intermediates(
        self, key: Array | None, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, list[Any]]:
        z = self.base_dist.sample(key, sample_shape)
        x, log_det = _forward(self.transform, z)
        return x, [[z, log_det]]

    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Array:
        base_dist, transform = jax.lax.stop_gradient((self.base_dist, self.transform))
        z, log_det = _inverse(transform, jnp.asarray(value))
        return solved(base_dist.log_prob(z) + log_det, log_det)


class _OwnPathFlow(FlowDistribution):
    """The same for a flow of a subclass that draws or evaluates in its own way."""

    def __init__(self, flow: FlowDistribution):
        super().__init__(flow.base_dist, flow.transform)
        self.flow = flow

    def sample_with_intermediates(
        self, key: Array | None, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, list[Any]]:
        return self.flow.sample_with_intermediates(key, sample_shape)

    def sample(
        self, key: Array | None, sample_shape: tuple[int, ...] = (), **options: Any
    ) -> Array:
        return self.flow.sample(key, sample_shape, **options)

    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Array:
        return jax.lax.stop_gradient(self.flow).log_prob(value)


_OWN = ("sample", "sample_with_intermediates", "log_prob")


def _draws_in_its_own_way(flow: FlowDistribution) -> bool:
    return any(getattr(type(flow), name) is not getattr(FlowDistribution, name) for name in _OWN)


class _path_density(Messenger):
    """A guide whose flows become of the class ``path``."""

    def __init__(self, fn: Any, path: type[FlowDistribution]):
        super().__init__(fn)
        self.path = path

    def process_message(self, msg: dict[str, Any]) -> None:
        fn = msg.get("fn")
        if msg["type"] != "sample" or not isinstance(fn, FlowDistribution) or msg["is_observed"]:
            return
        own = _draws_in_its_own_way(fn)
        msg["fn"] = _OwnPathFlow(fn) if own else self.path(fn.base_dist, fn.transform)


class with_penalties(Messenger):
    """A guide whose continuous flows count their penalties, as factors that any ELBO subtracts."""

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        fn = msg.get("fn")
        if msg["type"] != "sample" or not isinstance(fn, FlowDistribution) or msg["is_observed"]:
            return
        transform = penalized(fn.transform)
        if transform is not None and msg["intermediates"]:
            [(z, log_det)] = msg["intermediates"]
            _, less = transform.forward_and_log_det(z)
            numpyro.factor(f"{msg['name']}_penalty", log_det - less)


class STL_ELBO(Trace_ELBO):
    r"""ELBO with the path gradient ("sticking the landing").

    The value is that of ``Trace_ELBO``. In the gradient of
    :math:`\log p(\theta) - \log q_\phi(\theta)` at :math:`\theta = T_\phi(z)`, the term
    :math:`\partial_\phi \log q_\phi(\theta)` at fixed :math:`\theta`, whose mean is zero, is left
    out: where the guide is the posterior, the gradient is then zero for every draw. It applies to
    sites of the guide that are drawn from a ``FlowDistribution``, as in ``nf.AutoFlow``, or from a
    subclass of it; other sites keep their full gradient. Cost: one inverse pass of the flow more
    per draw than ``Trace_ELBO``; all particles pass through a flow as one batch, which is faster
    than ``vmap``, unless a subclass draws or evaluates in its own way.

    :param num_particles: draws per step.
    :param vectorize_particles: as the following, an argument of ``Trace_ELBO``.
    :param multi_sample_guide: whether the guide returns several draws at once.
    :param sum_sites: whether the loss is summed over sites.

    Source: Roeder, Wu & Duvenaud (2017), arXiv:1703.09194, eq. 4.

    >>> import numpyro_flows as nf
    >>> nf.STL_ELBO(num_particles=16).num_particles
    16
    """

    def loss_with_mutable_state(
        self, rng_key: Array, param_map: Any, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> Any:
        mapped = self.num_particles > 1 and self.vectorize_particles is True
        guide = _path_density(guide, _MappedPathFlow if mapped else _PathFlow)
        return super().loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kwargs)


class LatentELBO(eqx.Module):
    """The negative of what :class:`STL_ELBO` estimates, for a flow over a latent space; a pytree.

    :ivar density: the model's log density.
    :ivar windings: what unwinds angles.
    :ivar rest: the part of the guide's flow that is not trained.
    :ivar affine: the preconditioner.
    :ivar num_particles: draws per evaluation.
    :ivar split: how they are split over the devices of a mesh, if they are.
    """

    density: LogDensity
    windings: dict[str, Winding]
    rest: Any
    affine: FixedAffine
    num_particles: int = eqx.field(static=True)
    split: Split | None = eqx.field(static=True, default=None)

    def __call__(self, params: Any, temper: Array, key: Array) -> Array:
        """Mean of :math:`\\log q(u) - t \\log p(u)` over fresh draws.

        :param params: the flow's parameters.
        :param temper: t, a scalar.
        :param key: ``jax.random.key``.
        """
        draw_key, model_key = jax.random.split(key)
        z = self.rest.base_dist.sample(draw_key, (self.num_particles,))
        draws = z, jax.random.split(model_key, self.num_particles)
        if self.split is not None:
            draws = jax.lax.with_sharding_constraint(draws, self.split.sharding(rows_at=0))
            if is_rowwise(self.rest.transform):
                return self.split.mean(_total, params, (self, temper), draws)
        value, number = _total(params, (self, temper), draws)
        return value / number

    def losses(self, params: Any, temper: Array, z: Array, keys: Array) -> Array:
        """:math:`\\log q(u) - t \\log p(u)` at draws of the base, ``(n, dim)``, each with a key."""
        flow = assemble(params, self.rest, self.affine)
        x, log_det = flow.transform.forward_and_log_det(z)
        log_q = path_log_prob(flow, x)
        if (transform := penalized(flow.transform)) is not None:
            log_q = log_q + log_det - transform.forward_and_log_det(z)[1]
        log_p = jax.vmap(self.density.unwound, (0, None, 0))(x, self.windings, keys)
        return log_q - temper * log_p


def _total(params: Any, fixed: tuple[LatentELBO, Array], draws: Any) -> tuple[Array, Array]:
    objective, temper = fixed
    losses = objective.losses(params, temper, *draws)
    return losses.sum(), jnp.asarray(len(losses))
