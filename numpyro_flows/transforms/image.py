"""Layers of images: squeeze, a transform of the channels at every pixel, convolutional coupling."""

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import check_image_shape, check_size
from ..convnet import ConvNet
from ..elementwise import ElementwiseMap
from ..transform import FlowTransform, ImageTransform


class Squeeze(ImageTransform):
    r"""Blocks of a x b pixels to channels: (H, W, C) to (H / a, W / b, a b C), log-determinant 0.

    Channel :math:`c + C (a j + i)` of the result is channel c of the pixel in row i and column j of
    each block: of squares, the first half of the channels are their left pixels.

    Source: Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803, section 3.6.

    :param shape: (H, W, C); x has shape ``(*batch, H, W, C)``, y ``(*batch, H / a, W / b, a b C)``.
    :param factor: (a, b), rows and columns of a block; (k, 1) for signals, images of one column.
    :raises ValueError: for a height or width that the factor does not divide, a factor that is not
        of two numbers from 1 on, or a shape that is not one of images.
    :raises TypeError: for sizes that are no integers.

    >>> import jax.numpy as jnp
    >>> Squeeze((28, 28, 1))(jnp.ones((5, 28, 28, 1))).shape
    (5, 14, 14, 4)
    """

    factor: tuple[int, int] = eqx.field(static=True)

    def __init__(self, shape: Sequence[int], factor: Sequence[int] = (2, 2)):
        self._set_shape(shape)
        height, width, _ = self.shape
        if len(factor) != 2:
            raise ValueError(f"factor: expected rows and columns of a block, got {factor}.")
        a, b = self.factor = (check_size("factor", factor[0]), check_size("factor", factor[1]))
        if height % a or width % b:
            raise ValueError(
                f"Squeeze: expected a height and width divisible by {a} and {b}, got {height} x "
                f"{width}. Pad or crop the images."
            )

    @property
    def out_shape(self) -> tuple[int, ...]:
        (height, width, channels), (a, b) = self.shape, self.factor
        return height // a, width // b, a * b * channels

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return _squeezed(x, self.factor), jnp.zeros(x.shape[-1], x.dtype)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        (height, width, channels), (a, b) = self.shape, self.factor
        x = y.reshape(b, a, channels, width // b, height // a, -1).transpose(2, 3, 0, 4, 1, 5)
        return x.reshape(channels, width, height, -1), jnp.zeros(y.shape[-1], y.dtype)


def _squeezed(x: Array, factor: tuple[int, int]) -> Array:
    """Blocks of pixels to channels, of images as columns."""
    (channels, width, height), (a, b) = x.shape[:3], factor
    y = x.reshape(channels, width // b, b, height // a, a, -1).transpose(2, 4, 0, 1, 3, 5)
    return y.reshape(a * b * channels, width // b, height // a, -1)


class Pixelwise(ImageTransform):
    r"""One transform of vectors applied to the channels at every pixel: :math:`y_{ij} = T(x_{ij})`.

    Around a linear transform it is the invertible 1 x 1 convolution, in whichever parametrisation:
    ``LULinear`` (triangular factors with the logarithms of the diagonal), ``DenseLinear`` (the
    plain matrix) or ``Householder``. The log-determinant is the sum over pixels, for a matrix K
    :math:`H W \log |\det K|`. Cost: one pass of T over all pixels as rows.

    Source: Kingma & Dhariwal (2018), arXiv:1807.03039, section 3.2.

    :param transform: a transform of vectors of C coordinates without context.
    :param height: H; x and y have shape ``(*batch, H, W, C)``.
    :param width: W.
    :raises ValueError: for a transform of other events or with a context, or sizes below 1.

    >>> import jax.numpy as jnp, numpyro_flows as nf
    >>> layer = Pixelwise(nf.transforms.LULinear(3), 4, 4)
    >>> layer.forward_and_log_det(jnp.ones((5, 4, 4, 3)))[1].shape
    (5,)
    """

    transform: FlowTransform

    def __init__(self, transform: FlowTransform, height: int, width: int):
        event = transform.event_shape
        if len(event) != 1 or transform.out_shape != event or transform.context_dim:
            raise ValueError(
                "Pixelwise: expected a transform of vectors to vectors of the same size without "
                f"context, got {event} to {transform.out_shape}, context {transform.context_dim}."
            )
        self.transform = transform
        self._set_shape((height, width, event[0]))

    def _inside(self) -> str:
        return self.transform.outline

    def _apply(self, step: Callable, value: Array) -> tuple[Array, Array]:
        result, log_det = step(value.reshape(len(value), -1))
        return result.reshape(value.shape), log_det.reshape(-1, value.shape[-1]).sum(0)

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._apply(self.transform.forward_columns, x)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._apply(self.transform.inverse_columns, y)

    def initialized(
        self, value: Array, context: Array | None, forward: bool
    ) -> tuple[FlowTransform, Array]:
        rows = value.reshape(-1, value.shape[-1])
        transform, rows = self.transform.initialized(rows, None, forward)
        return eqx.tree_at(lambda t: t.transform, self, transform), rows.reshape(value.shape)


class ConvCoupling(ImageTransform):
    r"""Coupling layer of images: some numbers pass and determine a map of the others.

    :math:`y_A = x_A`, :math:`y_B = g(x_B; \theta(x_A, c))` with an elementwise map g and a
    :class:`~numpyro_flows.convnet.ConvNet`. With the mask ``"channel"``, A is the first ``C // 2``
    channels; with ``"checkerboard"`` the pixels whose row and column add up to an even number
    (plus ``parity``). Log-determinant: the sum of the scalar ones. A new layer is the identity.

    Both directions cost one pass of the network, over half of the channels, or for a checkerboard
    over the whole image, half of whose parameters are not used.

    Source: Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803, sections 3.4 and 3.5; Kingma &
    Dhariwal (2018), arXiv:1807.03039, section 3.3.

    :param key: ``jax.random.key`` for the network.
    :param shape: (H, W, C); x and y have shape ``(*batch, H, W, C)``.
    :param map: the elementwise map g.
    :param mask: ``"channel"`` or ``"checkerboard"``.
    :param parity: 0 or 1: which pixels of a checkerboard pass.
    :param hidden: channels of the network's hidden layers.
    :param context_dim: width of the context, 0 for none.
    :param context_shape: of a context that is an image, (a H, b W, channels) with integers a and b,
        or None. As any context it arrives as a vector, of all its numbers row by row; blocks of
        a x b pixels become channels, so that the network sees of each pixel what lies there.
    :param position: number of cosines by which the network knows where a pixel is; see ``ConvNet``.
    :param activation: name of the network's activation.
    :raises ValueError: for sizes below 1, an unknown mask or activation, both kinds of context, or
        a context image of a size that is no multiple.
    :raises TypeError: for a key that is not one, or sizes that are no integers.

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_flows.elementwise import Affine
    >>> layer = ConvCoupling(jax.random.key(0), (4, 4, 3), Affine(), hidden=(8, 8))
    >>> y, log_det = layer.forward_and_log_det(jnp.ones((5, 4, 4, 3)))
    >>> y.shape, log_det.shape
    ((5, 4, 4, 3), (5,))
    """

    map: ElementwiseMap
    conditioner: ConvNet
    mask: str = eqx.field(static=True)
    parity: int = eqx.field(static=True)
    context_shape: tuple[int, int, int] | None = eqx.field(static=True)

    def __init__(
        self,
        key: Array,
        shape: Sequence[int],
        map: ElementwiseMap,
        *,
        mask: str = "channel",
        parity: int = 0,
        hidden: Sequence[int] = (128, 128),
        context_dim: int = 0,
        context_shape: Sequence[int] | None = None,
        position: int = 0,
        activation: str = "relu",
    ):
        if mask not in ("channel", "checkerboard"):
            raise ValueError(f"mask: expected 'channel' or 'checkerboard', got {mask!r}.")
        if parity not in (0, 1):
            raise ValueError(f"parity: expected 0 or 1, got {parity!r}.")
        if context_dim and context_shape is not None:
            raise ValueError(
                "ConvCoupling: expected a context that is a vector (`context_dim`) or an image "
                "(`context_shape`), got both."
            )
        self._set_shape(shape, context_dim)
        height, width, channels = self.shape
        self.context_shape, context_channels = None, 0
        if context_shape is not None:
            self.context_shape = check_image_shape(context_shape)
            if self.context_shape[0] % height or self.context_shape[1] % width:
                raise ValueError(
                    f"context_shape: expected multiples of the image's {height} x {width} pixels, "
                    f"got {self.context_shape}."
                )
            self.context_size = math.prod(self.context_shape)
            context_channels = self.context_size // (height * width)
        self.map, self.mask, self.parity = map, mask, parity
        passing = channels // 2 if mask == "channel" else channels
        moving = channels - passing if mask == "channel" else channels
        self.conditioner = ConvNet(
            key,
            passing + context_channels,
            map.num_params * moving,
            hidden=hidden,
            context_size=context_dim,
            position=position,
            activation=activation,
        )

    def _inside(self) -> str:
        return type(self.map).__name__

    def _params(self, passing: Array, shape: tuple[int, ...], context: Array | None) -> Array:
        if self.context_shape is not None and context is not None:
            height, width, _ = self.shape
            factor = self.context_shape[0] // height, self.context_shape[1] // width
            image = context.reshape(*self.context_shape, -1).transpose(2, 1, 0, 3)
            image = _squeezed(image, factor)
            image = jnp.broadcast_to(image, image.shape[:3] + passing.shape[3:])
            passing, context = jnp.concatenate([passing, image]), None
        return self.conditioner(passing, context).reshape(self.map.num_params, *shape)

    def _couple(self, step: Callable, value: Array, context: Array | None) -> tuple[Array, Array]:
        if self.mask == "checkerboard":
            width, height = value.shape[1:3]
            passes = (np.indices((width, height)).sum(0) + self.parity) % 2 == 0
            passes = jnp.asarray(passes[..., None])
            params = self._params(jnp.where(passes, value, 0), value.shape, context)
            moved, log_det = step(value, params)
            return jnp.where(passes, value, moved), jnp.where(passes, 0, log_det).sum((0, 1, 2))
        half = len(value) // 2
        passing, moving = value[:half], value[half:]
        moved, log_det = step(moving, self._params(passing, moving.shape, context))
        return jnp.concatenate([passing, moved]), log_det.sum((0, 1, 2))

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._couple(self.map.forward_and_log_det, x, context)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._couple(self.map.inverse_and_log_det, y, context)
