"""Flows of images: Glow, RealNVP's multi-scale architecture, and the support of grey levels."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.constraints import Constraint

from ..checks import check_image_shape, check_key, check_size
from ..distribution import FlowDistribution
from ..elementwise import ElementwiseMap
from ..transform import FlowTransform, Inverse
from ..transforms import (
    ActNorm,
    Chain,
    ConvCoupling,
    DenseLinear,
    Householder,
    LULinear,
    MultiScale,
    Pixelwise,
    Scan,
    Squeeze,
)
from ._building import bounded_affine, channel_permutations, check_no_angles, flow_on
from ._options import Support


def glow(
    key: Array,
    shape: Sequence[int],
    *,
    levels: int = 2,
    depth: int | Sequence[int] = 8,
    hidden: Sequence[int] | Sequence[Sequence[int]] = (128, 128),
    context_dim: int = 0,
    context_shape: Sequence[int] | None = None,
    support: Support = constraints.real,
    base: Distribution | None = None,
    permutation_seed: int = 0,
    map: ElementwiseMap | None = None,
    mixing: str = "lu",
    checkerboards: int = 0,
    position: int = 0,
    activation: str = "relu",
) -> FlowDistribution:
    r"""Glow (Kingma & Dhariwal, 2018), and RealNVP for images (Dinh et al., 2017).

    From the data: each level squeezes 2 x 2 pixels into channels, makes ``depth`` steps (ActNorm,
    invertible 1 x 1 convolution, coupling by a convolutional network) and, but for the last level,
    factors out half of the channels, whose mean and scale one convolution computes from the other
    half. Both directions cost one pass of all networks. Steps are scanned: compile time does not
    grow with ``depth``.

    ``mixing="none"`` with ``checkerboards=2`` is RealNVP's multi-scale architecture. Call
    ``nf.initialize(flow, batch)`` before training: it sets the ActNorms. Grey levels are integers:
    wrap the flow by ``nf.dequantize``. A new flow rearranges the latent vector into an image and
    does nothing else.

    Source: Kingma & Dhariwal (2018), arXiv:1807.03039; Dinh, Sohl-Dickstein & Bengio (2017),
    arXiv:1605.08803.

    :param key: ``jax.random.key`` for the initial weights.
    :param shape: (H, W, C), H and W divisible by ``2**levels``. The base distribution is one of
        vectors of H W C numbers.
    :param levels: number of levels.
    :param depth: steps per level, or one number for each level, finest first.
    :param hidden: channels of the hidden layers of the networks, or for each level, finest first.
    :param context_dim: width of the context, such as 10 for one-hot classes.
    :param context_shape: (H, W, channels) of a context that is an image in place of a vector, such
        as the frames before: it is squeezed with the image, so that each pixel sees what lies
        there. ``condition`` takes its numbers row by row, as ``context.reshape(*batch, -1)``.
    :param support: scalar constraint that the data satisfies, or a tuple of one per channel;
        ``nf.recipes.grey_levels(256)`` is the logit preprocessing of images.
    :param base: distribution of z; standard normal by default.
    :param permutation_seed: seed of the channel permutations between steps.
    :param map: elementwise map of the couplings; by default affine, its log-scale bounded by
        ``min(2, 16 / (number of couplings))``.
    :param mixing: the 1 x 1 convolution: ``"lu"``, ``"dense"``, ``"householder"`` or ``"none"``.
    :param checkerboards: pairs of checkerboard couplings before each squeeze.
    :param position: number of cosines per axis that tell networks where a pixel is; 0 for plain
        convolutions. Centred data, such as digits, gain much from 4.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for a shape that is not one of images or cannot be halved ``levels`` times,
        sizes below 1, unknown names, angles, or a context image of another size.

    >>> import jax, jax.numpy as jnp
    >>> flow = glow(jax.random.key(0), (8, 8, 1), levels=2, depth=2, hidden=(8, 8))
    >>> flow.log_prob(jnp.zeros((5, 8, 8, 1))).shape
    (5,)
    """
    shape = check_image_shape(shape)
    _check_halvings(shape, check_size("levels", levels))
    constraint = check_no_angles("Glow", support, shape[-1])
    depths = [check_size("depth", n) for n in _per_level("depth", depth, levels)]
    nested = any(isinstance(entry, Sequence) for entry in hidden)
    widths = _per_level("hidden", hidden, levels) if nested else [tuple(hidden)] * levels
    check_size("checkerboards", checkerboards, minimum=0)
    if mixing not in _MIXING:
        raise ValueError(f"mixing: expected one of {sorted(_MIXING)}, got {mixing!r}.")
    if map is None:
        map = bounded_affine(None, sum(depths) + 2 * levels * checkerboards)
    if context_shape is not None and tuple(context_shape)[:2] != shape[:2]:
        raise ValueError(
            f"context_shape: expected ({shape[0]}, {shape[1]}, channels), the pixels of the image, "
            f"got {context_shape}."
        )
    config: dict[str, Any] = {
        "context_dim": context_dim,
        "context_shape": context_shape,
        "position": position,
        "activation": activation,
    }
    parts, seen = [], shape
    for i, level_key in enumerate(jax.random.split(check_key(key), levels)):
        board_key, step_key, split_key = jax.random.split(level_key, 3)
        squeeze = Squeeze(seen)
        height, width, channels = squeeze.out_shape
        level: list[FlowTransform] = [
            _steps(
                step_key,
                squeeze.out_shape,
                map,
                depths[i],
                mixing,
                permutation_seed + i,
                hidden=widths[i],
                **config,
            ),
            Inverse(squeeze),
        ]
        if checkerboards:
            level.append(_boards(board_key, seen, map, checkerboards, hidden=widths[i], **config))
        if i < levels - 1:
            # Mean and scale of the channels that are factored out, from those that go on.
            level.insert(0, ConvCoupling(split_key, squeeze.out_shape, map, hidden=(), **config))
        parts.append(Chain(level))
        seen = (height, width, channels // 2)
    transform = MultiScale(parts[::-1])
    return flow_on(constraint, transform, base)


def grey_levels(levels: int = 256, *, margin: float = 0.05) -> Constraint:
    r"""The support of dequantised grey levels: the logit preprocessing of images.

    The interval :math:`(-a L, (1 + a) L)` with :math:`a = m / (1 - 2 m)`. NumPyro's map from the
    line onto it is :math:`x = L (\sigma(z) - m) / (1 - 2 m)`, whose inverse is the logit of
    :math:`m + (1 - 2 m) x / L`; its log-determinant is part of the flow's density.

    Source: Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803, section 4.1.

    :param levels: number L of grey levels; data are 0 to L - 1 plus noise in [0, 1).
    :param margin: m in (0, 1/2): how far the ends stay from where the logit is infinite.
    :raises ValueError: for fewer than 2 levels or a margin outside of (0, 1/2).

    >>> grey_levels(256, margin=0.25)
    Interval(lower_bound=-128.0, upper_bound=384.0)
    """
    check_size("levels", levels, minimum=2)
    if not 0 < margin < 0.5:
        raise ValueError(f"margin: expected a number between 0 and 1/2, got {margin}.")
    beyond = margin / (1 - 2 * margin) * levels
    return constraints.interval(-beyond, levels + beyond)


def _check_halvings(shape: tuple[int, int, int], levels: int) -> None:
    unit = 2**levels
    if shape[0] % unit or shape[1] % unit:
        nearest = [max(unit, unit * round(size / unit)) for size in shape[:2]]
        larger = [unit * -(-size // unit) for size in shape[:2]]
        raise ValueError(
            f"shape: expected a height and width divisible by 2**levels = {unit}, got "
            f"{shape[0]} x {shape[1]}. Nearest: {nearest[0]} x {nearest[1]}; by padding alone: "
            f"{larger[0]} x {larger[1]}."
        )


def _per_level(name: str, value: Any, levels: int) -> list:
    if not isinstance(value, Sequence):
        return [value] * levels
    if len(value) != levels:
        raise ValueError(
            f"{name}: expected one entry for each of {levels} levels, got {len(value)}: {value!r}."
        )
    return list(value)


_MIXING = {
    "lu": lambda key, dim: LULinear(dim, bias=False),
    "dense": lambda key, dim: DenseLinear(dim),
    "householder": lambda key, dim: Householder(key, dim),
    "none": None,
}


def _steps(
    key: Array,
    shape: tuple[int, ...],
    map: ElementwiseMap,
    depth: int,
    mixing: str,
    seed: int,
    **config: Any,
) -> Scan:
    """The steps of a level, base to data, with the channels permuted between them."""
    height, width, channels = shape
    linear = _MIXING[mixing]

    def step(key: Array) -> FlowTransform:
        net_key, linear_key = jax.random.split(key)
        parts: list[FlowTransform] = [ConvCoupling(net_key, shape, map, **config)]
        if linear is not None:
            # Inverted, the density has its matrix product and sampling its solves.
            parts.append(Inverse(Pixelwise(linear(linear_key, channels), height, width)))
        return Chain([*parts, ActNorm(shape)])

    permutations = channel_permutations(channels, depth, seed)
    return Scan(jax.vmap(step)(jax.random.split(key, depth)), permutations)


def _boards(
    key: Array, shape: tuple[int, ...], map: ElementwiseMap, pairs: int, **config: Any
) -> Scan:
    """Pairs of checkerboard couplings, of either parity."""

    def pair(key: Array) -> FlowTransform:
        boards = [
            ConvCoupling(k, shape, map, mask="checkerboard", parity=parity, **config)
            for parity, k in enumerate(jax.random.split(key))
        ]
        return Chain([*boards, ActNorm(shape)])

    return Scan(jax.vmap(pair)(jax.random.split(key, pairs)))
