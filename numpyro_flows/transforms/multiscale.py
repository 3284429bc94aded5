"""The multi-scale architecture: a flat latent vector to an image, coarse levels first."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from ..transform import FlowTransform, in_columns


class MultiScale(FlowTransform):
    r"""Levels that each take in fresh latent numbers beside what the coarser level returned.

    The first level maps its share of the vector, an image of few pixels. The result is joined by
    as many fresh channels as the second level needs, and so on; seen from the data, each level
    factors out channels that later levels leave alone, which saves their cost. Log-determinants
    add up.

    The vector holds the levels' shares in the order of the levels, coarsest first, each channel by
    channel (C, W, H). Any base distribution over vectors serves, and a straight line between two
    vectors is an interpolation between two images.

    Source: Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803, section 3.6.

    :param levels: transforms of images, coarsest first. Each may end in another shape than it
        begins with; the next one begins with the same height and width and at least one channel
        more. x has shape ``(*batch, dim)``, y ``(*batch, *levels[-1].out_shape)``.
    :raises ValueError: for no levels, or shapes that do not fit together.

    >>> import jax.numpy as jnp, numpyro_flows as nf
    >>> coarse, fine = nf.transforms.Squeeze((4, 4, 2)).inv, nf.transforms.Squeeze((8, 8, 1)).inv
    >>> MultiScale([coarse, fine])(jnp.ones((5, 64))).shape
    (5, 8, 8, 1)
    """

    levels: tuple[FlowTransform, ...]

    def __init__(self, levels: Sequence[FlowTransform]):
        self.levels = tuple(levels)
        if not self.levels:
            raise ValueError("MultiScale: expected at least one level, got none.")
        for level in self.levels:
            if len(level.event_shape) != 3 or len(level.out_shape) != 3:
                raise ValueError(
                    "MultiScale: expected transforms of images (H, W, C), got one from "
                    f"{level.event_shape} to {level.out_shape}."
                )
        for coarse, fine in zip(self.levels, self.levels[1:], strict=False):
            (*size, channels), (*next_size, next_channels) = coarse.out_shape, fine.event_shape
            if size != next_size or channels >= next_channels:
                raise ValueError(
                    f"MultiScale: a level returns {coarse.out_shape}, so the next one must begin "
                    f"with {tuple(size)} pixels and more than {channels} channels, got "
                    f"{fine.event_shape}."
                )
        widths = {level.context_dim for level in self.levels} - {0}
        if len(widths) > 1:
            raise ValueError(
                f"MultiScale: the levels expect contexts of different widths {sorted(widths)}."
            )

    def _inside(self) -> str:
        return ", ".join(level.outline for level in self.levels)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (math.prod(self.out_shape),)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.levels[-1].out_shape

    @property
    def context_dim(self) -> int:
        return max(level.context_dim for level in self.levels)

    def _kept(self) -> list[int]:
        """How many channels of each level's input come from the level before."""
        return [0, *(level.out_shape[2] for level in self.levels[:-1])]

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        start, total = 0, jnp.zeros(x.shape[1:], x.dtype)
        value = x[:0].reshape(0, *self.levels[0].event_shape[1::-1], x.shape[1])
        for level, kept in zip(self.levels, self._kept(), strict=True):
            height, width, channels = level.event_shape
            end = start + (channels - kept) * height * width
            fresh = x[start:end].reshape(channels - kept, width, height, -1)
            value, log_det = level.forward_columns(
                jnp.concatenate([value, fresh]), context if level.context_dim else None
            )
            start, total = end, total + log_det
        return value, total

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        shares, total = [], jnp.zeros(y.shape[-1], y.dtype)
        for level, kept in zip(self.levels[::-1], self._kept()[::-1], strict=True):
            y, log_det = level.inverse_columns(y, context if level.context_dim else None)
            shares.append(y[kept:].reshape(-1, y.shape[-1]))
            y, total = y[:kept], total + log_det
        return jnp.concatenate(shares[::-1]), total

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return in_columns(self.forward_columns, x, context)

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return in_columns(self.inverse_columns, y, context, event_ndim=3)

    def initialized(
        self, value: Array, context: Array | None, forward: bool
    ) -> tuple[FlowTransform, Array]:
        levels, n = [], len(value)
        if forward:
            start = 0
            image = jnp.zeros((n, *self.levels[0].event_shape[:2], 0), value.dtype)
            for level, kept in zip(self.levels, self._kept(), strict=True):
                height, width, channels = level.event_shape
                end = start + (channels - kept) * height * width
                fresh = value[:, start:end].T.reshape(channels - kept, width, height, n).T
                image = jnp.concatenate([image, fresh], axis=-1)
                seen = context if level.context_dim else None
                level, image = level.initialized(image, seen, True)
                levels.append(level)
                start = end
            return MultiScale(levels), image
        shares = []
        for level, kept in zip(self.levels[::-1], self._kept()[::-1], strict=True):
            seen = context if level.context_dim else None
            level, value = level.initialized(value, seen, False)
            levels.append(level)
            shares.append(value[..., kept:].T.reshape(-1, n))
            value = value[..., :kept]
        return MultiScale(levels[::-1]), jnp.concatenate(shares[::-1]).T
