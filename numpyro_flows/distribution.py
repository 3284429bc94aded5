"""The flow as a distribution, and its split into parameters and the rest."""

import copy
from collections.abc import Callable
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import (
    Distribution,
    ExpandedDistribution,
    Independent,
    TransformedDistribution,
)
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import validate_sample

from .checks import check_context, check_event_shape, check_float, check_key, is_real
from .parts import Fixed, inexactness, num_parameters
from .transform import FlowTransform
from .transforms import Conditioned, Embedded, NumPyroTransform, Stacked


class Sampled(Distribution):
    """Base class of flows: moments and quantiles have no formula, so errors name the draws."""

    @classmethod
    def gather_pytree_data_fields(cls) -> tuple[str, ...]:
        # One order of the leaves: NumPyro's is that of a set, another in each process.
        return tuple(sorted(super().gather_pytree_data_fields()))

    def _no_formula(self, what: str, call: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__}: there is no formula for the {what} of a flow. Estimate it "
            f"from draws: `{call}`."
        )

    @property
    def mean(self) -> Array:
        raise self._no_formula("mean", "flow.sample(key, (n,)).mean(0)")

    @property
    def variance(self) -> Array:
        raise self._no_formula("variance", "flow.sample(key, (n,)).var(0)")

    def cdf(self, value: ArrayLike) -> Array:
        raise self._no_formula(
            "distribution function", "(flow.sample(key, (n,)) <= value).all(-1).mean(0)"
        )

    def icdf(self, q: ArrayLike) -> Array:
        raise self._no_formula("quantiles", "jnp.quantile(flow.sample(key, (n,)), q, axis=0)")

    def entropy(self) -> Array:
        raise self._no_formula("entropy", "-flow.log_prob(flow.sample(key, (n,))).mean(0)")

    def enumerate_support(self, expand: bool = True) -> Array:
        raise NotImplementedError(
            f"{type(self).__name__}: a flow is continuous, so its values cannot be enumerated. "
            "Draw some: `flow.sample(key, (n,))`."
        )


class FlowDistribution(Sampled, TransformedDistribution):
    r"""A normalizing flow: :math:`x = T(z)` with z from a base distribution.

    .. math:: \log p(x) = \log p_Z(T^{-1}(x)) + \log |\det \partial T^{-1} / \partial x|

    An ordinary NumPyro ``TransformedDistribution`` (usable in plates, as a prior, likelihood or
    guide), except that ``log_prob`` makes one pass of the transform where NumPyro's makes two.
    ``base_dist`` and ``transform`` are its parts.

    :param base_dist: distribution of z, continuous, of event shape ``transform.event_shape``;
        missing event axes are taken from its batch axes. Numbers in it become floating arrays.
    :param transform: a ``FlowTransform`` or any NumPyro transform.
    :param validate_args: whether values are checked against the support, as in NumPyro.
    :raises TypeError: if either is neither.
    :raises ValueError: if the base is discrete or its shape does not fit.

    >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, numpyro_flows as nf
    >>> t = nf.realnvp(jax.random.key(0), 2).transform
    >>> flow = nf.FlowDistribution(dist.Normal(jnp.zeros(2), 1.0), t)
    >>> flow
    FlowDistribution(Normal -> 8 x Coupling(Affine), batch_shape=(), event_shape=(2,),
                     parameters=35344)
    >>> flow.sample(jax.random.key(1), (7,)).shape, flow.log_prob(jnp.zeros((7, 2))).shape
    ((7, 2), (7,))
    """

    _validate_args: bool | None

    def __init__(
        self,
        base_dist: Distribution,
        transform: Transform,
        *,
        validate_args: bool | None = None,
    ):
        if not isinstance(base_dist, Distribution):
            raise TypeError(
                f"base_dist: expected a NumPyro distribution, got {type(base_dist).__name__}."
            )
        if not isinstance(transform, FlowTransform):
            transform = NumPyroTransform(
                transform, base_dist.shape()[len(base_dist.shape()) - transform.domain.event_dim :]
            )
        event_shape = transform.event_shape
        check_event_shape("base_dist", base_dist.shape(), event_shape)
        if base_dist.event_dim > len(event_shape):
            raise ValueError(
                f"base_dist: its event shape {base_dist.event_shape} has more axes than the "
                f"transform's {event_shape}."
            )
        if base_dist.support.is_discrete:
            raise ValueError(
                f"base_dist: expected a continuous distribution, got {type(base_dist).__name__}."
            )
        base_dist = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.result_type(float, leaf)), base_dist
        )
        base_dist = base_dist.to_event(len(event_shape) - base_dist.event_dim)
        # A bound context adds batch axes, and each of its rows has base noise of its own.
        shape = transform.forward_shape(base_dist.shape())
        batch_shape = shape[: len(shape) - len(transform.out_shape)]
        self.base_dist = base_dist.expand(batch_shape)
        self.transforms = [transform]
        Distribution.__init__(self, batch_shape, transform.out_shape, validate_args=validate_args)
        # NumPyro keeps only what an instance holds when it rebuilds one from its leaves.
        self._validate_args = self._validate_args

    @property
    def transform(self) -> FlowTransform:
        """The bijection from base to data."""
        return self.transforms[0]

    @property
    def context_dim(self) -> int:
        """Width of the context this flow waits for; 0 if it is not conditional."""
        return self.transform.context_dim

    @property
    def support(self) -> Constraint:
        return self.transform.codomain

    def __repr__(self) -> str:
        base = self.base_dist
        while isinstance(base, Independent | ExpandedDistribution):
            base = base.base_dist
        inexact = inexactness((self.base_dist, self.transform))
        texts = [
            f"{type(base).__name__} -> {self.transform.outline}",
            f"batch_shape={self.batch_shape}",
            f"event_shape={self.event_shape}",
        ]
        texts += [f"context_dim={self.context_dim}"] * (self.context_dim > 0)
        texts += [f"log_prob={inexact}"] * bool(inexact)
        texts += [f"parameters={num_parameters(self.transform)}"]
        return f"{type(self).__name__}({', '.join(texts)})"

    def with_parts(
        self, base_dist: Distribution | None = None, transform: FlowTransform | None = None
    ) -> Self:
        """This flow with another base or transform; all else, as ``validate_args``, stays.

        A flow of a subclass keeps its class and what else it holds.

        :param base_dist: as for the constructor; the same by default.
        :param transform: likewise.
        """
        parts = FlowDistribution(
            self.base_dist if base_dist is None else base_dist,
            self.transform if transform is None else transform,
            validate_args=self._validate_args,
        )
        new = copy.copy(self)
        new.__dict__.update(vars(parts))
        return new

    def condition(self, context: Any) -> Self:
        """The flow given a context.

        :param context: floating, of shape ``(*batch, context_dim)``; for a flow with an embedding
            network the pytree that it reads, batch axes first.
        :return: a flow of batch shape ``context.shape[:-1]`` broadcast with this one's.
        :raises ValueError: if this flow is not conditional, or the width is wrong.
        :raises TypeError: if the context is not floating.
        """
        return self.with_parts(transform=Conditioned(self.transform, context))

    def embed(self, network: Callable[[Any], Array]) -> Self:
        """This conditional flow with its context read by a network.

        :param network: see :class:`~numpyro_flows.transforms.Embedded`.
        """
        return self.with_parts(transform=Embedded(self.transform, network))

    def _check_conditioned(self) -> None:
        check_context("This flow", None, self.context_dim)

    def _validate_sample(self, value: ArrayLike) -> Any:
        # Nothing lies outside the reals, and the check would cost as much as half a layer.
        return True if is_real(self.support) else super()._validate_sample(value)

    def _read(self, value: ArrayLike) -> Array:
        """Values as the transform sees them."""
        return check_float("value", value)

    @validate_sample
    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Array:
        """Log density at ``value``, in one pass.

        :param value: floating, of shape ``(*sample, *batch_shape, *event_shape)``.
        :param intermediates: what ``sample_with_intermediates`` returned beside ``value``.
        :return: shape ``(*sample, *batch_shape)``.
        :raises ValueError: for a wrong event shape, or a conditional flow without its context.
        :raises TypeError: for values that are not floating.
        """
        self._check_conditioned()
        if intermediates:
            [(z, log_det)] = intermediates
            return solved(self.base_dist.log_prob(z) - log_det, log_det)
        value = self._read(value)
        check_event_shape("value", value.shape, self.event_shape)
        z, log_det = self.transform.inverse_and_log_det(value)
        return solved(self.base_dist.log_prob(z) + log_det, log_det)

    def sample_with_intermediates(
        self, key: Array | None, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, list[Any]]:
        self._check_conditioned()
        z = self.base_dist.sample(check_key(key), sample_shape)
        x, log_det = self.transform.forward_and_log_det(z)
        return x, [[z, log_det]]

    def sample(
        self,
        key: Array | None,
        sample_shape: tuple[int, ...] = (),
        *,
        temperature: float = 1.0,
    ) -> Array:
        """Draws of shape ``(*sample_shape, *batch_shape, *event_shape)``.

        :param key: ``jax.random.key``.
        :param temperature: factor on the base's deviations from its mean. Below 1 draws are more
            typical and less varied (Kingma & Dhariwal, 2018, arXiv:1807.03039, section 5.2); they
            are then not draws of this distribution.
        :raises TypeError: if ``key`` is not a key.
        :raises ValueError: for a conditional flow without its context, a negative temperature, or
            one other than 1 with a base that has no mean.
        """
        if temperature == 1:
            return self.sample_with_intermediates(key, sample_shape)[0]
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature: expected a number from 0 on, got {temperature}.")
        self._check_conditioned()
        try:
            mean = self.base_dist.mean
        except NotImplementedError:
            mean = jnp.asarray(jnp.nan)
        z = self.base_dist.sample(check_key(key), sample_shape)
        z = mean + temperature * (z - mean)
        if not isinstance(mean, jax.core.Tracer) and not jnp.isfinite(mean).all():
            raise ValueError(
                f"temperature: the base distribution {type(self.base_dist).__name__} has no mean "
                "to draw towards; sample with temperature=1."
            )
        return self.transform.forward_and_log_det(z)[0]

    rsample = sample

    def sample_and_log_prob(
        self, key: Array, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, Array]:
        """Draws and their log densities, in one pass; shapes as ``sample`` and ``log_prob``."""
        x, intermediates = self.sample_with_intermediates(key, sample_shape)
        return x, self.log_prob(x, intermediates)

    def expand(self, batch_shape: tuple[int, ...]) -> Self:
        """This flow with a larger batch shape; the transform is shared, the noise is not."""
        batch_shape = tuple(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        return self.with_parts(base_dist=self.base_dist.expand(batch_shape))


def solved(log_density: Array, log_det: Array) -> Array:
    """The log density, -inf where a numerical solve failed (values NaN, log-determinant -inf)."""
    return jnp.where(log_det == -jnp.inf, -jnp.inf, log_density)


@promote_batch_shape.register
def _promote(flow: FlowDistribution) -> FlowDistribution:
    # A scan inside a model returns its distributions with all leaves stacked along a first axis.
    return flow.with_parts(
        promote_batch_shape(flow.base_dist), Stacked(flow.transform, len(flow.batch_shape))
    )


def partition(flow: Any, *, train_base: bool = False) -> tuple[Any, Any]:
    """Split a flow or transform into parameters and everything else.

    Both halves have the structure of ``flow``, with ``None`` where the leaf is in the other half.
    Leaves under :class:`Fixed` and, unless asked for, those of the base distribution are no
    parameters.

    :param flow: a ``FlowDistribution``, a transform, or any pytree that holds some.
    :param train_base: whether the base distribution's numbers are parameters. They are then
        unconstrained numbers to an optimiser; ``nf.flow_module(..., train_base=True)`` keeps
        scales positive.
    :return: ``(params, rest)``, undone by :func:`combine`.

    >>> import jax, numpyro_flows as nf
    >>> params, rest = nf.partition(nf.realnvp(jax.random.key(0), 2))
    >>> nf.combine(params, rest).event_shape
    (2,)
    """

    flows = {id(node) for node in jax.tree.leaves(flow, is_leaf=_is_flow) if _is_flow(node)}

    def is_fixed(node: Any) -> bool:
        is_base = isinstance(node, Distribution) and id(node) not in flows
        return isinstance(node, Fixed) or (is_base and not train_base)

    return eqx.partition(
        flow,
        lambda leaf: not is_fixed(leaf) and eqx.is_inexact_array(leaf),
        is_leaf=is_fixed,
    )


def _is_flow(node: Any) -> bool:
    """Whether a node is a flow, augmented or not."""
    transform = getattr(node, "transform", None)
    return isinstance(node, Distribution) and isinstance(transform, FlowTransform)


def combine(params: Any, rest: Any) -> Any:
    """Undo :func:`partition`: the flow with these parameters.

    :param params: the first half that ``partition`` returned, or a pytree like it.
    :param rest: the second half.
    :return: the flow, or the tree of flows.

    >>> import jax, numpyro_flows as nf
    >>> flow = nf.realnvp(jax.random.key(0), 2)
    >>> params, rest = nf.partition(flow)
    >>> combine(jax.tree.map(lambda a: 0.5 * a, params), rest).event_shape
    (2,)
    """
    return eqx.combine(params, rest)


def leaf_names(tree: Any) -> list[str]:
    """Names of the leaves of a pytree, in the order of ``jax.tree.leaves``.

    Fields joined by dots. NumPyro distributions do not name their children to JAX and order them
    anew in each process, so their fields are looked up here.
    """

    def is_distribution(node: Any) -> bool:
        return isinstance(node, Distribution)

    names = []
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_distribution)
    for path, leaf in leaves:
        prefix = jax.tree_util.keystr(path, simple=True, separator=".")
        if is_distribution(leaf):
            for field in type(leaf).gather_pytree_data_fields():
                inner = leaf_names(leaf.__dict__.get(field))
                names += [".".join(filter(None, (prefix, field, name))) for name in inner]
        else:
            names.append(prefix)
    return names
