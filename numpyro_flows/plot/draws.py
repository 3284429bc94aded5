"""Draws beside a reference or the truth."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from ..checks import check_size
from ._figure import Axes, Draws, columns_of, grid, legend, limits_of, named, one

#: Most coordinates of which pairs can be read.
MOST_PAIRS = 10


def scatter(
    draws: Draws,
    reference: Draws | None = None,
    *,
    labels: tuple[str, str] = ("draws", "reference"),
    names: Sequence[str] | None = None,
    num_points: int = 2000,
    ax: Axes | None = None,
) -> Axes:
    """Draws of two coordinates, over those of a reference if there is one.

    The axes leave out the outermost 0.2 % of the draws at either end.

    :param draws: shape ``(n, 2)``, or sites by name, each ``(n, *shape)``.
    :param reference: draws to compare with, of the same coordinates; another number of them.
    :param labels: what draws and reference are called.
    :param names: of an array's columns; of sites, the two to draw, such as ``["tau", "theta[0]"]``.
    :param num_points: largest number of points of each.
    :param ax: axes to draw into.
    :return: the axes.
    :raises ValueError: unless there are two coordinates, the same in both.

    >>> import matplotlib; matplotlib.use("agg")
    >>> import numpy as np, numpyro_flows as nf
    >>> draws = np.random.default_rng(0).normal(size=(100, 2))
    >>> nf.plot.scatter(draws, names=["mu", "tau"]).get_ylabel()
    'tau'
    """
    clouds = _clouds(draws, reference, labels, names, num_points)
    columns = list(clouds[labels[0]])
    if len(columns) != 2:
        raise ValueError(f"Expected two coordinates, got {columns}: choose them by `names`.")
    ax = one(ax)
    _cloud(ax, clouds, *columns)
    if reference is not None:
        legend(ax)
    return ax


def pairs(
    draws: Draws,
    reference: Draws | None = None,
    *,
    truth: Mapping[str, ArrayLike] | ArrayLike | None = None,
    labels: tuple[str, str] = ("draws", "reference"),
    names: Sequence[str] | None = None,
    num_points: int = 2000,
    axes: Any = None,
) -> np.ndarray:
    """Each pair of coordinates, and a histogram of each, beside a reference or the truth.

    The axes leave out the outermost 0.2 % of the draws at either end.

    :param draws: shape ``(n, dim)``, or sites by name, each ``(n, *shape)``.
    :param reference: draws to compare with, of the same coordinates; of sites, those are drawn
        that both have.
    :param truth: values that made the data: shape ``(dim,)``, or sites by name.
    :param labels: what draws and reference are called.
    :param names: of an array's columns; of sites, those to draw, whole or by coordinate.
    :param num_points: largest number of points of each.
    :param axes: ``dim`` x ``dim`` axes to draw into; those above the diagonal are switched off.
    :return: the axes, ``(dim, dim)``.
    :raises ValueError: for coordinates that do not fit, or more than 10.

    >>> import matplotlib; matplotlib.use("agg")
    >>> import numpy as np, numpyro_flows as nf
    >>> draws = {"mu": np.zeros(100), "theta": np.random.default_rng(0).normal(size=(100, 2))}
    >>> [ax.get_xlabel() for ax in nf.plot.pairs(draws)[-1]]
    ['mu', 'theta[0]', 'theta[1]']
    """
    clouds = _clouds(draws, reference, labels, names, num_points)
    columns = list(clouds[labels[0]])
    if len(columns) > MOST_PAIRS:
        raise ValueError(
            f"Pairs of {len(columns)} coordinates cannot be read: choose at most {MOST_PAIRS} by "
            "`names`, or columns of the array."
        )
    true = _truth(truth, columns)
    axes = grid(axes, len(columns), len(columns), max(1.6, 6.0 / len(columns)))
    limits = {n: limits_of([cloud[n] for cloud in clouds.values()]) for n in columns}
    for name, value in true.items():
        low, high = limits[name]
        margin = 0.05 * (high - low)
        limits[name] = min(low, value - margin), max(high, value + margin)
    for (i, j), ax in np.ndenumerate(axes):
        x, y = columns[j], columns[i]
        if j > i:
            ax.axis("off")
            continue
        if i == j:
            for cloud in clouds.values():
                bins = np.linspace(*limits[x], 31)
                ax.hist(cloud[x], bins, density=True, histtype="step")
            ax.set(xlim=limits[x], yticks=[])
        else:
            _cloud(ax, clouds, x, y)
            ax.set(xlim=limits[x], ylim=limits[y])
            if y in true:
                ax.axhline(true[y], color="k", linewidth=0.8, label="truth")
        if x in true:
            ax.axvline(true[x], color="k", linewidth=0.8)
        is_last, is_first = i == len(columns) - 1, j == 0 and i > 0
        ax.set(xlabel=x if is_last else "", ylabel=y if is_first else "")
        ax.tick_params(labelbottom=is_last, labelleft=is_first)
    if len(columns) > 1 and (reference is not None or true):
        handles, texts = axes[-1, 0].get_legend_handles_labels()
        legend(axes[0, -1], handles=handles, labels=texts, loc="upper right")
    return axes


def _clouds(
    draws: Draws,
    reference: Draws | None,
    labels: tuple[str, str],
    names: Sequence[str] | None,
    num_points: int,
) -> dict[str, dict[str, np.ndarray]]:
    """Coordinates of draws and reference by label, at most ``num_points`` of each.

    :raises ValueError: for a reference of other coordinates.
    """
    check_size("num_points", num_points)
    clouds = {labels[0]: named(draws, names)}
    if reference is not None:
        clouds[labels[1]] = named(reference, names)
        shared = [name for name in clouds[labels[0]] if name in clouds[labels[1]]]
        arrays = not isinstance(draws, Mapping) and not isinstance(reference, Mapping)
        if not shared or (arrays and len(clouds[labels[0]]) != len(clouds[labels[1]])):
            raise ValueError(
                f"reference: expected the coordinates {list(clouds[labels[0]])} of the draws, got "
                f"{list(clouds[labels[1]])}."
            )
        clouds = {label: {n: cloud[n] for n in shared} for label, cloud in clouds.items()}
    return {
        label: {n: x[:: -(-len(x) // num_points)] for n, x in cloud.items()}
        for label, cloud in clouds.items()
    }


def _cloud(ax: Axes, clouds: dict[str, dict[str, np.ndarray]], x: str, y: str) -> None:
    """Two coordinates of each cloud, the first on top."""
    for order, (label, cloud) in enumerate(clouds.items()):
        style = {"s": 6, "alpha": 0.4, "linewidths": 0, "zorder": 2 - order / 10}
        ax.scatter(cloud[x], cloud[y], label=label, **style)
    limits = [limits_of([cloud[name] for cloud in clouds.values()]) for name in (x, y)]
    ax.set(xlabel=x, ylabel=y, xlim=limits[0], ylim=limits[1])


def _truth(truth: Any, columns: list[str]) -> dict[str, float]:
    """Values by coordinate.

    :raises ValueError: for an array of another size.
    """
    if truth is None:
        return {}
    if isinstance(truth, Mapping):
        values = columns_of({name: np.asarray(value)[None] for name, value in truth.items()})
        return {name: float(x[0]) for name, x in values.items() if name in columns}
    flat = np.ravel(truth)
    if len(flat) != len(columns):
        raise ValueError(f"truth: expected {len(columns)} values, got {len(flat)}.")
    return dict(zip(columns, map(float, flat), strict=True))
