"""The conditioner network of images: convolutions as matrix products, channels first, rows last.

An image is ``(C, W, H, rows)`` here. A convolution of few channels into many gathers the pixels
around each pixel and multiplies once; one of many channels into few multiplies first and adds the
shifted results. What is shifted is thus always the small side, everything else is a product of
contiguous matrices, and so is its gradient: on two CPU cores value and gradient of a network of
256 channels take 219 ms where XLA's convolutions take 513 (14 x 14 pixels, 64 rows).
"""

import functools
import math
import operator
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .checks import check_event_shape, check_key, check_size
from .nn import ACTIVATIONS, drawn

_SIZE = 3  # pixels on a side of a filter
_OFFSETS = [(i, j) for i in range(_SIZE) for j in range(_SIZE)]


def _pad(x: Array) -> Array:
    edge = _SIZE // 2
    return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(edge, edge), (edge, edge), (0, 0)])


def _gather(x: Array) -> Array:
    """``(C, W, H, rows)`` to ``(9 C, W, H, rows)``: what a filter sees, zeros beyond the edge."""
    width, height = x.shape[1:3]
    padded = _pad(x)
    return jnp.concatenate([padded[:, i : i + width, j : j + height] for i, j in _OFFSETS])


def _add_shifted(y: Array) -> Array:
    """``(9 C, W, H, rows)`` to ``(C, W, H, rows)``: each filter's parts added where they belong."""
    width, height = y.shape[1:3]
    parts = _pad(y.reshape(len(_OFFSETS), -1, *y.shape[1:]))
    shifted = [parts[k, :, i : i + width, j : j + height] for k, (i, j) in enumerate(_OFFSETS)]
    return functools.reduce(operator.add, shifted)


def _waves(width: int, height: int, num: int) -> np.ndarray:
    r"""Cosines :math:`\cos(\pi a u) \cos(\pi b v)` at each pixel, ``(num^2, W H)``."""
    along = [
        np.cos(np.pi * np.arange(num)[:, None] * (np.arange(size) + 0.5) / size)
        for size in (width, height)
    ]
    return np.einsum("aw,bh->abwh", *along).reshape(num * num, width * height)


class ConvNet(eqx.Module):
    r"""Convolutional network: filters of 3 x 3 pixels first and last, of one pixel in between.

    With ``hidden = (a, b)`` it is the network of Glow: 3 x 3 to a channels, 1 x 1 to b, 3 x 3 to
    the result. Pixels beyond the edge are zeros. A context adds to each row, and ``position`` to
    each pixel, a number per channel of the first layer, the latter a learned sum of
    ``position**2`` slow cosines over the image: a filter alone knows nothing of where it is.

    Initial weights are those of :class:`~numpyro_flows.nn.MLP`, the whole last layer zero.

    Source: Kingma & Dhariwal (2018), arXiv:1807.03039, section B; Liu et al. (2018),
    arXiv:1807.03247 (coordinates for convolutions).

    :param key: ``jax.random.key`` for the initial weights.
    :param in_size: number of channels of ``x``; 0 is allowed.
    :param out_size: number of channels of the result.
    :param hidden: channels of the hidden layers; with none it is one convolution.
    :param context_size: width of the context, 0 for none.
    :param position: number of cosines along each axis, 0 for none.
    :param activation: one of ``ACTIVATIONS``.

    Calling it: ``x`` of shape ``(in_size, W, H, rows)`` and ``context`` of shape
    ``(context_size, rows)`` or ``(context_size, 1)`` to ``(out_size, W, H, rows)``. Cost: one
    matrix product per layer, over all pixels of all rows.

    :raises ValueError: for an unknown activation or a negative size.

    >>> import jax, jax.numpy as jnp
    >>> net = ConvNet(jax.random.key(0), 3, 2, hidden=(8, 8))
    >>> net(jnp.ones((3, 4, 4, 5))).shape
    (2, 4, 4, 5)
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    context_weight: Array | None
    position_weight: Array | None
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        key: Array,
        in_size: int,
        out_size: int,
        *,
        hidden: Sequence[int] = (128, 128),
        context_size: int = 0,
        position: int = 0,
        activation: str = "relu",
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Unknown activation {activation!r}. Expected one of {sorted(ACTIVATIONS)}."
            )
        if any(not isinstance(width, int) or width < 1 for width in hidden):
            raise ValueError(
                f"hidden: expected positive integers, channels per hidden layer, got {hidden!r}."
            )
        check_size("position", position, minimum=0)
        self.activation = activation
        pixels = len(_OFFSETS)
        sizes = (in_size * pixels, *hidden, out_size * (pixels if hidden else 1))
        first = (*hidden, out_size)[0]
        weight_key, bias_key, context_key = jax.random.split(check_key(key), 3)
        fan_ins = [in_size * pixels + context_size, *hidden]
        scales = [(2.0 / max(fan_in, 1)) ** 0.5 for fan_in in fan_ins[:-1]] + [0.0]
        bounds = [max(fan_in, 1) ** -0.5 for fan_in in fan_ins[:-1]] + [0.0]
        shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
        widths = [(width,) for width in (*hidden, out_size)]
        weights = drawn(jax.random.normal, weight_key, shapes)
        biases = drawn(functools.partial(jax.random.uniform, minval=-1.0), bias_key, widths)
        self.weights = tuple(a * weight for a, weight in zip(scales, weights, strict=True))
        self.biases = tuple(a * bias for a, bias in zip(bounds, biases, strict=True))
        self.context_weight = (
            scales[0] * jax.random.normal(context_key, (first, context_size))
            if context_size
            else None
        )
        self.position_weight = jnp.zeros((first, position**2)) if position else None

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        act = ACTIVATIONS[self.activation]
        width, height = x.shape[1:3]
        last = len(self.weights) - 1

        def linear(layer: int, h: Array) -> Array:
            product = self.weights[layer] @ h.reshape(len(h), -1)
            product = product.reshape(-1, *x.shape[1:])
            if layer == last > 0:
                product = _add_shifted(product)
            return product + self.biases[layer][:, None, None, None]

        h = linear(0, _gather(x))
        if self.context_weight is not None and context is not None:
            h = h + (self.context_weight @ context)[:, None, None]
        if self.position_weight is not None:
            num = math.isqrt(self.position_weight.shape[1])
            waves = jnp.asarray(_waves(width, height, num), self.position_weight.dtype)
            h = h + (self.position_weight @ waves).reshape(-1, width, height, 1)
        for layer in range(1, len(self.weights)):
            h = linear(layer, act(h))
        return h


class ConvEmbedding(eqx.Module):
    """A network from images to the context of couplings at half their size, for ``flow.embed``.

    :param key: ``jax.random.key`` for the initial weights.
    :param shape: (H, W, C) of the images, H and W even.
    :param features: numbers per square of 2 x 2 pixels.
    :param hidden: channels of the hidden layers.
    :param activation: one of ``ACTIVATIONS``.

    Calling it: images of shape ``(*batch, H, W, C)`` to ``(*batch, H W features / 4)``, what
    ``ConvCoupling`` reads with ``context_shape=(H / 2, W / 2, features)``.

    :raises ValueError: for images of another shape.
    """

    net: ConvNet
    shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        key: Array,
        shape: tuple[int, int, int],
        features: int,
        *,
        hidden: Sequence[int] = (32, 32),
        activation: str = "relu",
    ):
        self.shape = shape
        first, last = jax.random.split(key)
        net = ConvNet(first, 4 * shape[2], features, hidden=hidden, activation=activation)
        # A ConvNet starts at zero; an embedding that did would pass no gradient on.
        size = net.weights[-1].shape
        weight = jax.random.normal(last, size) / (size[1] * (len(_OFFSETS) if hidden else 1)) ** 0.5
        self.net = eqx.tree_at(lambda net: net.weights[-1], net, weight)

    def __call__(self, images: Array) -> Array:
        check_event_shape("context", images.shape, self.shape)
        height, width, channels = self.shape
        batch = images.shape[:-3]
        x = images.reshape(-1, height, width, channels).T
        x = x.reshape(channels, width // 2, 2, height // 2, 2, -1).transpose(0, 2, 4, 1, 3, 5)
        features = self.net(x.reshape(4 * channels, width // 2, height // 2, -1))
        return features.T.reshape(*batch, -1)
