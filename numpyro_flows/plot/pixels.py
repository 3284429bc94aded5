"""Rows of images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from ._figure import Axes, one


def images(
    rows: ArrayLike,
    *,
    labels: Sequence[Any] = (),
    cmap: str = "gray_r",
    ax: Axes | None = None,
) -> Axes:
    """Rows of images, with thin gaps.

    :param rows: shape ``(rows, columns, H, W)``, or with 1 or 3 channels last; grey levels of any
        range, colours as ``ax.imshow`` takes them.
    :param labels: of the rows.
    :param cmap: colours of grey levels; black on white by default.
    :param ax: axes to draw into.
    :return: the axes.
    :raises ValueError: for another shape, or another number of labels.

    >>> import matplotlib; matplotlib.use("agg")
    >>> import numpy as np, numpyro_flows as nf
    >>> nf.plot.images(np.zeros((2, 5, 8, 8, 1)), labels=["a", "b"]).images[0].get_size()
    (20, 50)
    """
    pixels = np.asarray(rows)
    if pixels.ndim == 4:
        pixels = pixels[..., None]
    if pixels.ndim != 5 or pixels.shape[-1] not in (1, 3):
        raise ValueError(
            f"rows: expected images of shape (rows, columns, H, W, C), C 1 or 3, got "
            f"{np.shape(rows)}."
        )
    if len(labels) not in (0, len(pixels)):
        raise ValueError(f"labels: expected {len(pixels)}, one for each row, got {len(labels)}.")
    pixels = np.pad(pixels, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)])
    down, across, height, width, channels = pixels.shape
    page = pixels.transpose(0, 2, 1, 3, 4).reshape(down * height, across * width, channels)
    ax = one(ax, (0.4 + across * width / 45, 0.4 + down * height / 45))
    ax.imshow(page[..., 0] if channels == 1 else page, cmap=cmap, interpolation="nearest")
    ax.set(xticks=[])
    ax.set_yticks((np.arange(len(labels)) + 0.5) * height, labels)
    return ax
