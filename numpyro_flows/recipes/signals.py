"""Flows of sequences: time series, sound and video, autoregressive in time."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jax import Array

from ..checks import check_size
from ..distribution import FlowDistribution
from ..mixed import MixedFlow
from ..transforms import Chain, Conditioned, Embedded, Markov, NumPyroTransform


class Flat(eqx.Module):
    """Covariates ``(*batch, length, num)`` as one vector, as the transform of a sequence reads.

    >>> import jax.numpy as jnp
    >>> Flat()(jnp.ones((7, 5, 2))).shape
    (7, 10)
    """

    def __call__(self, covariates: Array) -> Array:
        return covariates.reshape(*covariates.shape[:-2], -1)


def markov(
    frame_flow: FlowDistribution,
    network: Callable[[Any], Array],
    length: int,
    order: int = 1,
    *,
    num_covariates: int = 0,
) -> FlowDistribution:
    r"""A flow of sequences, each frame drawn from a flow given the frames before it.

    .. math:: p(x_1, ..., x_L) = \prod_t p(x_t \mid h(x_{t-k}, ..., x_{t-1}, c_t))

    with p a conditional flow of frames (numbers, vectors, images) and h a network. The density is
    one pass of both, over all frames in parallel; sampling is a scan of ``length`` steps. The
    support of the frames is mapped to the real numbers first, so that the network sees those, and
    ``nf.fit`` standardises all frames alike. ``nf.forecast`` goes on from a past, over more steps
    than ``length`` too.

    :param frame_flow: conditional flow of batch shape () over one frame, of shape ``frame``.
    :param network: from the past, ``(*batch, order, *frame)``, to ``(*batch, context_dim)``, such
        as ``nf.nn.Embedding(key, jnp.zeros((order, *frame)), context_dim)``; with covariates it is
        called with the pair of the past and ``(*batch, num_covariates)``.
    :param length: number of frames L; events have shape ``(length, *frame)``.
    :param order: k, the frames that the network sees; those before the first are 0.
    :param num_covariates: numbers beside each frame; ``condition`` then takes them as
        ``(*batch, length, num_covariates)``, and they are not standardised.
    :raises TypeError: for another kind of flow, a network that cannot be called, or sizes that are
        no integers.
    :raises ValueError: for a flow without a context of its own, with discrete columns or with batch
        axes, sizes below 1, ``length`` not above ``order``, or a network of another width.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> network = nf.nn.Embedding(jax.random.key(0), jnp.zeros((2, 1)), 4, hidden=(8,))
    >>> frame_flow = nf.realnvp(jax.random.key(1), 1, context_dim=4, depth=2)
    >>> flow = markov(frame_flow, network, 10, order=2)
    >>> flow.sample(jax.random.key(2), (3,)).shape, flow.log_prob(jnp.zeros((5, 10, 1))).shape
    ((3, 10, 1), (5,))
    """
    if not isinstance(frame_flow, FlowDistribution) or isinstance(frame_flow, MixedFlow):
        raise TypeError(
            "frame_flow: expected a FlowDistribution of continuous frames, got "
            f"{type(frame_flow).__name__}."
        )
    transform = frame_flow.transform
    if frame_flow.batch_shape or isinstance(transform, Conditioned | Embedded):
        raise ValueError(
            "frame_flow: expected a conditional flow of batch shape () without a bound context or "
            f"a network of its own, got {frame_flow}."
        )
    if check_size("length", length) <= check_size("order", order):
        raise ValueError(f"length: expected more frames than the order {order}, got {length}.")
    parts = [*transform.parts] if isinstance(transform, Chain) else [transform]
    support: list[NumPyroTransform] = []
    while len(parts) > 1 and isinstance(parts[-1], NumPyroTransform):
        support.insert(0, parts.pop())
    step = parts[0] if len(parts) == 1 else Chain(parts)
    chain = Markov(step, network, length, order, num_covariates)
    onto = [NumPyroTransform(part.transform.value, (length, *part.event_shape)) for part in support]
    base = frame_flow.base_dist.expand((length,)).to_event(1)
    flow = FlowDistribution(base, Chain([chain, *onto]) if onto else chain)
    return flow.embed(Flat()) if num_covariates else flow
