"""Augmented flows: extra dimensions remove the topological limits of a bijection of the data."""

import copy
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.util import validate_sample

from .checks import (
    check_context,
    check_event_shape,
    check_float,
    check_key,
    check_size,
    is_real,
)
from .coordinates import PerCoordinate, from_coordinates
from .distribution import FlowDistribution, Sampled, solved
from .parts import Exactness, Fixed, for_training, inexactness, num_parameters
from .transform import FlowTransform
from .transforms import Chain, Conditioned, NumPyroTransform


class AugmentedFlow(Exactness, Sampled):
    r"""A flow over x and e, of which only x is data: :math:`p(x) = \int p(x, e) \, de`.

    .. math:: \log p(x) \ge \log \frac{1}{K} \sum_{k=1}^K \frac{p(x, e_k)}{q(e_k \mid x)},
              \quad e_k \sim q(e \mid x)

    A flow carries its base to the data by a homeomorphism, which cannot cut, glue or pass paths
    through each other; one of more coordinates can, as seen in x alone. The price: the density is
    an integral, and **``log_prob`` is a lower bound**. Its K draws e_k come from fixed base noise
    of q, the same for every row (``with_probe`` gives other), so it is a deterministic function,
    at most :math:`\log p(x)` in expectation over the noise, and closer with more draws; but
    no normalised density. Samples are exact, and so is :attr:`joint`, an ordinary flow.

    As prior or likelihood in a model it makes the joint density a lower bound too. Guides, neural
    transport and importance weights need a density and refuse it; ``nf.augmented_model`` is how
    a guide gains coordinates.

    **Training.** ``nf.fit`` draws one e per row and step with fresh noise, which maximises the
    bound with K = 1 in both p and q (more draws would make q's gradient noisier), and validates
    with the fixed noise. Trained on fixed noise, as by SVI, p would gather on those few e_k
    without bound: give each step its own, ``flow.with_probe(numpyro.prng_key())``.

    Cost: K passes of the joint flow per row, in ``dim`` and ``augment_dim`` coordinates together.
    It cannot be a site inside ``numpyro.contrib.control_flow`` loops.

    Sources: Dupont et al. (2019), arXiv:1904.01681, sec. 4 (augmentation); Chen et al. (2020),
    arXiv:2002.09741, eq. 4 and 7 (of densities, and the bounds).

    :param key: ``jax.random.key`` for the noise.
    :param joint: p(x, e) over real vectors, conditional or not, of batch shape ``()``; x are its
        first coordinates.
    :param encoder: q(e | x), a conditional flow over real vectors of size ``augment_dim``; its
        context is x and then the context of ``joint``.
    :param num_samples: K.
    :param support: constraints of the coordinates of x, one each, or None for real ones. ``joint``
        and ``encoder`` see x mapped to the real numbers.
    :param validate_args: whether values are checked against the support, as in NumPyro.
    :raises TypeError: if either is no ``FlowDistribution``.
    :raises ValueError: if their sizes do not fit together, or the density of ``encoder`` is an
        estimate.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> key = jax.random.key(0)
    >>> joint, encoder = nf.nsf(key, 3), nf.realnvp(key, 1, context_dim=2)
    >>> flow = AugmentedFlow(key, joint, encoder, num_samples=4)
    >>> flow.log_prob(jnp.zeros((5, 2))).shape, flow.joint.log_prob(jnp.zeros((5, 3))).shape
    ((5,), (5,))
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    reparametrized_params: ClassVar[list[str]] = []
    pytree_data_fields = (
        "base_dist",
        "transform",
        "encoder_base",
        "encoder_transform",
        "outer",
        "probe",
    )
    _validate_args: bool | None

    def __init__(
        self,
        key: Array,
        joint: FlowDistribution,
        encoder: FlowDistribution,
        *,
        num_samples: int = 16,
        support: tuple[Constraint, ...] | None = None,
        validate_args: bool | None = None,
    ):
        for name, flow in (("joint", joint), ("encoder", encoder)):
            if not isinstance(flow, FlowDistribution):
                raise TypeError(f"{name}: expected a FlowDistribution, got {type(flow).__name__}.")
            if flow.batch_shape or len(flow.event_shape) != 1 or not is_real(flow.support):
                raise ValueError(
                    f"{name}: expected a flow over real vectors of batch shape (), got {flow}."
                )
        total, (augment_dim,) = joint.event_shape[0], encoder.event_shape
        dim = total - augment_dim
        if dim < 1 or encoder.context_dim != dim + joint.context_dim:
            raise ValueError(
                f"encoder: expected a flow over fewer coordinates than the {total} of joint, with "
                f"the others and joint's context (of width {joint.context_dim}) as its context, "
                f"got {encoder}."
            )
        if kind := inexactness(encoder):
            raise ValueError(
                f"encoder: expected an exact log density, without which there is no bound, got an "
                f"{kind}."
            )
        if support is not None and len(support) != dim:
            raise ValueError(f"support: expected {dim} constraints, got {len(support)}.")
        self.base_dist, self.transform = joint.base_dist, joint.transform
        self.encoder_base, self.encoder_transform = encoder.base_dist, encoder.transform
        self.outer = (
            None if support is None else NumPyroTransform(from_coordinates(support), (dim,))
        )
        self.probe = self._noise(key, (check_size("num_samples", num_samples),))
        super().__init__((), (dim,), validate_args=validate_args)
        # NumPyro keeps only what an instance holds when it rebuilds one from its leaves.
        self._validate_args = self._validate_args

    def _noise(self, key: Array, shape: tuple[int, ...]) -> Fixed:
        return Fixed(self.encoder_base.sample(check_key(key), shape))

    def _replaced(self, **changes: Any) -> "AugmentedFlow":
        new = copy.copy(self)
        new.__dict__.update(changes)
        return new

    @property
    def augment_dim(self) -> int:
        """Number of coordinates beside the data."""
        return self.encoder_transform.out_shape[0]

    @property
    def num_samples(self) -> int:
        """K, the number of draws in the bound."""
        return len(self.probe.value)

    @property
    def context_dim(self) -> int:
        """Width of the context this flow waits for; 0 if it is not conditional."""
        return self.transform.context_dim

    @property
    def support(self) -> Constraint:
        return constraints.real_vector if self.outer is None else self.outer.codomain

    @property
    def inexact(self) -> str:
        """What the log density is."""
        bound = f"lower bound of {self.num_samples} draws"
        kind = inexactness((self.base_dist, self.transform))
        return f"{kind} of a {bound}" if kind else bound

    def __repr__(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        size = num_parameters((self.transform, self.encoder_transform))
        return (
            f"AugmentedFlow({self.transform.outline}, batch_shape={self.batch_shape}, "
            f"event_shape={self.event_shape}, augment_dim={self.augment_dim}{context}, "
            f"log_prob={self.inexact}, parameters={size})"
        )

    def entropy(self) -> Array:
        raise NotImplementedError(
            "AugmentedFlow: there is no formula for the entropy of a flow, and its `log_prob` is a "
            "lower bound. Estimate an upper one: `-flow.log_prob(flow.sample(key, (n,))).mean(0)`."
        )

    @property
    def joint(self) -> FlowDistribution:
        """p(x, e) in the units of the data, an ordinary flow."""
        inner, context = self._unbound()
        if self.outer is not None:
            support = self.outer.codomain
            parts = (
                support.parts
                if isinstance(support, PerCoordinate)
                else (support.base_constraint,) * self.event_shape[0]
            )
            both = from_coordinates((*parts, *(constraints.real,) * self.augment_dim))
            inner = Chain([inner, NumPyroTransform(both, inner.out_shape)])
        transform = inner if context is None else Conditioned(inner, context)
        flow = FlowDistribution(self.base_dist, transform, validate_args=self._validate_args)
        return flow.expand(self.batch_shape)

    def encode(self, value: ArrayLike) -> FlowDistribution:
        """q(e | x), from which the bound draws.

        :param value: x, of shape ``(*sample, *batch_shape, dim)``.
        :return: a flow of batch shape ``(*sample, *batch_shape)``.
        """
        u, _ = self._unconstrained(value)
        transform = Conditioned(self.encoder_transform, self._with_context(u))
        return FlowDistribution(self.encoder_base, transform, validate_args=self._validate_args)

    def condition(self, context: ArrayLike) -> "AugmentedFlow":
        """The flow given a context.

        :param context: floating, of shape ``(*batch, context_dim)``.
        :return: a flow of batch shape ``context.shape[:-1]`` broadcast with this one's.
        :raises ValueError: if this flow is not conditional, or the width is wrong.
        :raises TypeError: if the context is not floating.
        """
        transform = Conditioned(self.transform, context)
        shape = jnp.broadcast_shapes(self.batch_shape, jnp.shape(context)[:-1])
        return self._replaced(transform=transform, _batch_shape=shape)

    def with_transforms(
        self, transform: FlowTransform, encoder: FlowTransform, outer: NumPyroTransform | None
    ) -> "AugmentedFlow":
        """The same flow with other transforms of joint and encoder, and another support."""
        return self._replaced(transform=transform, encoder_transform=encoder, outer=outer)

    def with_probe(self, key: Array, num_samples: int | None = None) -> "AugmentedFlow":
        """The same flow with other noise in its bound, and perhaps another number of draws."""
        n = self.num_samples if num_samples is None else check_size("num_samples", num_samples)
        return self._replaced(probe=self._noise(key, (n,)))

    def for_training(self, key: Array | None, rows: int) -> "AugmentedFlow":
        """What a step of training uses in place of this flow, for a batch of ``rows``.

        One draw of e for each row, with noise of its own; without a key, as for validation, the
        fixed noise. The transforms as their own ``for_training`` makes them.
        """
        noise_key = None
        if key is not None:
            key, noise_key = jax.random.split(key)
        transform, encoder = for_training((self.transform, self.encoder_transform), key, rows)
        probe = self.probe if noise_key is None else self._noise(noise_key, (1, rows))
        return self._replaced(transform=transform, encoder_transform=encoder, probe=probe)

    def expand(self, batch_shape: tuple[int, ...]) -> "AugmentedFlow":
        """This flow with a larger batch shape."""
        shape = tuple(batch_shape)
        if jnp.broadcast_shapes(shape, self.batch_shape) != shape:
            raise ValueError(f"Cannot expand batch shape {self.batch_shape} to {shape}.")
        return self._replaced(_batch_shape=shape)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Exact draws of shape ``(*sample_shape, *batch_shape, dim)``: those of ``joint``, less e.

        :param key: ``jax.random.key``.
        :raises TypeError: if ``key`` is not a key.
        :raises ValueError: for a conditional flow without its context.
        """
        return self.joint.sample(key, sample_shape)[..., : self.event_shape[0]]

    rsample = sample

    def _validate_sample(self, value: ArrayLike) -> Any:
        return True if self.outer is None else super()._validate_sample(value)

    @validate_sample
    def log_prob(self, value: ArrayLike) -> Array:
        """Lower bound of the log density at ``value``, by ``num_samples`` draws of e.

        :param value: floating, of shape ``(*sample, *batch_shape, dim)``.
        :return: shape ``(*sample, *batch_shape)``.
        :raises ValueError: for a wrong event shape, or a conditional flow without its context.
        :raises TypeError: for values that are not floating.
        """
        u, log_det = self._unconstrained(value)
        batch = u.shape[:-1]
        noise = self.probe.value
        # Noise of one shape for all rows, or in training of each row's own.
        ones = (1,) * (len(batch) + 2 - noise.ndim)
        noise = noise.reshape(len(noise), *ones, *noise.shape[1:])
        noise = jnp.broadcast_to(noise, (len(noise), *batch, self.augment_dim))
        e, encoder_log_det = self.encoder_transform.forward_and_log_det(
            noise, self._with_context(u)
        )
        log_q = self.encoder_base.log_prob(noise) - encoder_log_det
        u = jnp.broadcast_to(u, (len(noise), *u.shape))
        z, joint_log_det = self.transform.inverse_and_log_det(jnp.concatenate([u, e], axis=-1))
        log_p = solved(self.base_dist.log_prob(z) + joint_log_det, joint_log_det)
        return logsumexp(log_p - log_q, axis=0) - math.log(len(noise)) + log_det

    def _unbound(self) -> tuple[Any, Array | None]:
        """The transform of the joint flow without its context, and the context."""
        if isinstance(self.transform, Conditioned):
            return self.transform.transform, self.transform.context.value
        return self.transform, None

    def _unconstrained(self, value: ArrayLike) -> tuple[Array, Array | float]:
        """x as p and q see it, one row for each of the batch, and the log-determinant."""
        check_context("This flow", None, self.context_dim)
        value = check_float("value", value)
        check_event_shape("value", value.shape, self.event_shape)
        batch = jnp.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = jnp.broadcast_to(value, batch + self.event_shape)
        return (value, 0.0) if self.outer is None else self.outer.inverse_and_log_det(value)

    def _with_context(self, u: Array) -> Array:
        """The context of the encoder."""
        _, context = self._unbound()
        if context is None:
            return u
        context = jnp.broadcast_to(context, (*u.shape[:-1], context.shape[-1]))
        return jnp.concatenate([u, context], axis=-1)


@promote_batch_shape.register
def _promote(flow: AugmentedFlow) -> AugmentedFlow:
    raise NotImplementedError(
        "AugmentedFlow: it cannot be a site inside `numpyro.contrib.control_flow` loops. Draw all "
        "rows in one plate outside of the loop."
    )
