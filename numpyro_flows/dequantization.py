"""Discrete data: a flow of integers, by noise that fills the gaps between them.

:func:`dequantize` makes a model of integers from a flow of real numbers. Its likelihood is an
integral over the noise, so what can be computed and trained is a bound; its name says so.
"""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import Logistic, biject_to, constraints

from .checks import (
    as_numpy,
    check_image_shape,
    check_integers,
    check_key,
    check_size,
    check_unmasked,
)
from .convnet import ConvEmbedding
from .distribution import FlowDistribution
from .elementwise import Affine
from .recipes import channel_permutations
from .transform import FlowTransform, Inverse
from .transforms import (
    ActNorm,
    Chain,
    ConvCoupling,
    Equalization,
    NumPyroTransform,
    Scan,
    Squeeze,
)


class Dequantized(eqx.Module):
    r"""A model of integers a to a + L - 1: the mass that a flow gives each cell of the grid.

    .. math:: P(x) = \int_{[0, 1)^D} p(x + u) \, du
              = \mathbb{E}_{q(u \mid x)} \left[ \frac{p(x + u)}{q(u \mid x)} \right]

    with q uniform (Theis, van den Oord & Bethge, 2016, arXiv:1511.01844, section 3.1) or a
    conditional flow (variational dequantisation; Ho et al., 2019, arXiv:1902.00275, section 3.1).
    :func:`dequantize` builds it, ``nf.fit`` trains it with fresh noise in every step, and
    ``nf.initialize``, ``nf.partition``, ``nf.save`` and ``nf.load`` take it as they take a flow.

    :ivar flow: p, the flow of real numbers.
    :ivar noise: q, a flow on the unit cube conditioned on the data, or None for uniform noise.
    :ivar levels: L, or one for each column.
    :ivar start: a, or one for each column.
    """

    flow: FlowDistribution
    noise: FlowDistribution | None
    levels: int | tuple[int, ...] = eqx.field(static=True)
    start: int | tuple[int, ...] = eqx.field(static=True, default=0)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.flow.event_shape

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.flow.batch_shape

    @property
    def context_dim(self) -> int:
        return self.flow.context_dim

    def condition(self, context: Any) -> "Dequantized":
        """The model given a context; see ``FlowDistribution.condition``."""
        return self.with_flow(self.flow.condition(context))

    def with_flow(self, flow: FlowDistribution) -> "Dequantized":
        """The model of another flow over the same cells."""
        return Dequantized(flow, self.noise, self.levels, self.start)

    def sample(
        self, key: Array, sample_shape: tuple[int, ...] = (), *, temperature: float = 1.0
    ) -> Array:
        """Integers of shape ``(*sample_shape, *batch_shape, *event_shape)``.

        What the flow puts outside of the range is moved to its ends.

        :param temperature: as in ``FlowDistribution.sample``.
        """
        y = self.flow.sample(key, sample_shape, temperature=temperature)
        lowest = np.array(self.start)
        return jnp.clip(jnp.floor(y), lowest, lowest + np.array(self.levels) - 1).astype(int)

    def log_prob_bound(self, key: Array, x: ArrayLike, *, num_samples: int = 1) -> Array:
        r"""A lower bound of log P(x), in expectation over the noise.

        :math:`\log \frac1k \sum_{i=1}^k p(x + u_i) / q(u_i \mid x)`; with k = 1 what training
        maximises, with larger k tighter (Burda, Grosse & Salakhutdinov, 2016, arXiv:1509.00519).

        :param key: ``jax.random.key`` for the noise.
        :param x: integers, shape ``(*sample, *batch_shape, *event_shape)``.
        :param num_samples: k; the cost is k passes.
        :return: shape ``(*sample, *batch_shape)``.
        :raises TypeError: for data that are not integers.
        :raises ValueError: for a wrong shape, or values outside of the range.
        """
        check_unmasked("x", x)
        x = jnp.asarray(x)
        check_integers("x", x, self.levels, self.event_shape, self.start)
        check_size("num_samples", num_samples)
        whole = x.astype(jnp.result_type(float))

        def one(key: Array) -> Array:
            y, log_q = self.add_noise(key, whole)
            return self.flow.log_prob(y) - log_q

        if num_samples == 1:
            return one(check_key(key))
        terms = jax.lax.map(one, jax.random.split(check_key(key), num_samples))
        return jax.nn.logsumexp(terms, axis=0) - math.log(num_samples)

    def add_noise(self, key: Array, x: Array) -> tuple[Array, Array | float]:
        """``x + u`` with u drawn from q, and log q(u | x), 0 for uniform noise."""
        if self.noise is None:
            return x + jax.random.uniform(key, x.shape, x.dtype), 0.0
        levels, start = (jnp.array(ends, x.dtype) for ends in (self.levels, self.start))
        centred = (2 * (x - start) + 1) / levels - 1
        u, log_q = self.noise.condition(centred).sample_and_log_prob(key)
        # Rounded up to 1, the noise would reach the next cell.
        return x + jnp.minimum(u, 1 - jnp.finfo(u.dtype).epsneg), log_q


def dequantize(
    flow: FlowDistribution,
    levels: int | Sequence[int] = 256,
    noise: FlowDistribution | None = None,
    *,
    start: int | Sequence[int] = 0,
) -> Dequantized:
    """A model of the integers ``start`` to ``start + levels - 1`` from a flow of real numbers.

    Of vectors with few levels ``nf.nsf_ar(key, dim, support=constraints.integer_interval(0, 4))``
    has the exact mass, where this has a bound.

    :param flow: flow over data in units of one level, so over ``x + u`` in [start, start + levels).
    :param levels: number of levels, 256 for images of 8 bits; or of vectors one for each column.
    :param noise: the noise's distribution given the data, as :func:`noise_flow` makes
        it; uniform by default.
    :param start: the lowest level, such as -32768 for sound of 16 bits, whose common small numbers
        then keep all their digits; or one for each column.
    :raises TypeError: if ``flow`` or ``noise`` is no ``FlowDistribution``, or for levels that are
        no integers.
    :raises ValueError: if the flow's support leaves out part of [start, start + levels), the
        noise's support is not the unit interval, their events differ, or there is not one number of
        levels for each column.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> key, shape = jax.random.key(0), (8, 8, 1)
    >>> flow = nf.glow(key, shape, depth=2, hidden=(8, 8), support=nf.recipes.grey_levels(16))
    >>> model = dequantize(flow, 16)
    >>> x = jnp.zeros((5, 8, 8, 1), int)
    >>> model.log_prob_bound(key, x).shape, model.sample(key, (2,)).shape
    ((5,), (2, 8, 8, 1))
    """
    for name, part in (("flow", flow), ("noise", noise)):
        if not isinstance(part, FlowDistribution) and not (part is None and name == "noise"):
            raise TypeError(f"{name}: expected a FlowDistribution, got {type(part).__name__}.")
    levels = _each_column("levels", levels, flow.event_shape, 2)
    start = _each_column("start", start, flow.event_shape, None)
    lowest = np.array(start)
    ends = np.stack([np.broadcast_to(n, flow.event_shape) for n in (lowest, lowest + levels)])
    if not np.all(flow.support(jnp.asarray(ends, float))):
        raise ValueError(
            f"flow: expected a support that holds {start} to {(lowest + levels).tolist()}, the "
            f"units of one level, got {flow.support}. "
            "`support=nf.recipes.grey_levels(levels)` is the one of images."
        )
    if noise is not None:
        middle = jnp.full(noise.event_shape, 0.5)
        if noise.event_shape != flow.event_shape or not noise.context_dim:
            raise ValueError(
                f"noise: expected a conditional flow over events of shape {flow.event_shape}, got "
                f"{noise}. `nf.dequantization.noise_flow` makes one."
            )
        if not np.all(noise.support(middle)) or np.any(noise.support(middle + 1)):
            raise ValueError(
                f"noise: expected the unit interval as its support, got {noise.support}."
            )
    return Dequantized(flow, noise, levels, start)


def _each_column(
    name: str, value: int | Sequence[int], shape: tuple[int, ...], minimum: int | None
) -> int | tuple[int, ...]:
    """One integer, or one for each column of vectors."""
    least = -(2**31) if minimum is None else minimum
    if not isinstance(value, Sequence):
        return check_size(name, value, least)
    if shape != (len(value),):
        raise ValueError(
            f"{name}: expected one integer, or one for each column of events of shape {shape}, got "
            f"{len(value)}."
        )
    return tuple(check_size(f"{name}[{i}]", n, least) for i, n in enumerate(value))


def equalize(flow: FlowDistribution, x: ArrayLike, levels: int = 256) -> FlowDistribution:
    """A flow of real numbers behind the histogram equalisation of integer data.

    Each channel's histogram of x, every count plus 1, becomes a fixed last part of the flow
    (:class:`~numpyro_flows.transforms.Equalization`). It serves where the logit of
    :func:`grey_levels` does and spreads the common levels: four fifths of all pixels of handwritten
    digits are 0, and their noise fills 1/256 of the range.

    :param flow: flow over real numbers, which will see numbers of mean about 0 and scale about 1.
    :param x: integers 0 to ``levels - 1``, shape ``(n, *event_shape)``; rows to train on.
    :param levels: number of levels.
    :return: a flow over (0, levels), for :func:`dequantize`.
    :raises TypeError: for data that are not integers, or something else than a flow.
    :raises ValueError: for a wrong shape or values outside of the range.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> flow = equalize(nf.realnvp(jax.random.key(0), 2), jnp.array([[0, 1], [0, 3]]), 4)
    >>> nf.dequantize(flow, 4).sample(jax.random.key(1), (5,)).shape
    (5, 2)
    """
    if not isinstance(flow, FlowDistribution):
        raise TypeError(f"flow: expected a FlowDistribution, got {type(flow).__name__}.")
    check_unmasked("x", x)
    x = as_numpy(x)
    check_size("levels", levels, minimum=2)
    check_integers("x", x, levels, flow.event_shape)
    channels = x.reshape(-1, x.shape[-1]).T
    counts = np.stack([1.0 + np.bincount(values, minlength=levels) for values in channels])
    last = Equalization(counts, flow.event_shape)
    return flow.with_parts(transform=Chain([flow.transform, last]))


def noise_flow(
    key: Array,
    shape: Sequence[int],
    *,
    depth: int = 4,
    hidden: Sequence[int] = (32, 32),
    features: int = 8,
    activation: str = "relu",
) -> FlowDistribution:
    """The noise of variational dequantisation: a flow on [0, 1)^(H W C) that sees the image.

    A network makes ``features`` numbers of each square of 2 x 2 pixels of the image, and ``depth``
    couplings between the squares' pixels read them. New noise is uniform.

    Source: Ho et al. (2019), arXiv:1902.00275, section 3.1; the base is logistic so that its
    sigmoid is uniform.

    :param key: ``jax.random.key`` for the initial weights.
    :param shape: (H, W, C) with even H and W.
    :param depth: number of couplings.
    :param hidden: channels of the hidden layers, of the couplings' and of the features' network.
    :param features: numbers per square.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``.
    :raises ValueError: for odd sizes, sizes below 1 or an unknown activation.
    :raises TypeError: for a key that is not one, or sizes that are no integers.

    >>> import jax
    >>> noise_flow(jax.random.key(0), (4, 4, 1), depth=2, hidden=(4,)).event_shape
    (4, 4, 1)
    """
    shape = check_image_shape(shape)
    squeeze = Squeeze(shape)
    small = squeeze.out_shape
    seen = (*small[:2], check_size("features", features))
    map = Affine(min(2.0, 16 / check_size("depth", depth)))
    net_key, key = jax.random.split(check_key(key))

    def step(key: Array) -> FlowTransform:
        coupling = ConvCoupling(
            key, small, map, hidden=hidden, context_shape=seen, activation=activation
        )
        return Chain([coupling, ActNorm(small)])

    layers = jax.vmap(step)(jax.random.split(key, depth))
    steps = Scan(layers, channel_permutations(small[2], depth, 0))
    sigmoid = NumPyroTransform(biject_to(constraints.unit_interval), shape)
    network = ConvEmbedding(net_key, shape, features, hidden=hidden, activation=activation)
    base = Logistic(jnp.zeros(small), jnp.ones(small)).to_event(3)
    return FlowDistribution(base, Chain([steps, Inverse(squeeze), sigmoid])).embed(network)
