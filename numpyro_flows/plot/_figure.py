"""Axes, coordinates and limits: what the pictures share."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax.typing import ArrayLike

#: matplotlib's own, which is imported when something is drawn.
Axes: TypeAlias = Any
#: An array ``(n, dim)``, or sites by name, each ``(n, *shape)``.
Draws: TypeAlias = ArrayLike | Mapping[str, ArrayLike]

#: Share of draws at either end that limits of axes may leave out.
TAIL = 0.002


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "nf.plot draws with matplotlib, which is not installed: "
            "`pip install 'numpyro_flows[plot]'`."
        ) from error
    return plt


def one(ax: Axes | None, size: tuple[float, float] = (5.0, 4.0)) -> Axes:
    """The axes given, or those of a new figure."""
    return _pyplot().subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def grid(axes: Axes | None, rows: int, columns: int, size: float) -> np.ndarray:
    """Axes in ``rows`` and ``columns``, those given or those of a new figure.

    :raises ValueError: for another number of axes.
    """
    if axes is None:
        shape = (size * columns, size * rows)
        return _pyplot().subplots(
            rows, columns, figsize=shape, squeeze=False, layout="constrained"
        )[1]
    found = np.asarray(axes, object)
    if found.size != rows * columns:
        raise ValueError(f"axes: expected {rows} x {columns} of them, got {found.size}.")
    return found.reshape(rows, columns)


def strip(axes: Any, count: int, size: float, wide: int = 4) -> np.ndarray:
    """So many axes, in rows of at most ``wide``, those given or those of a new figure.

    :raises ValueError: for another number of axes.
    """
    if axes is not None:
        return grid(axes, 1, count, size)[0]
    wide = min(count, wide)
    found = grid(None, -(-count // wide), wide, size).ravel()
    for ax in found[count:]:
        ax.remove()
    return found[:count]


def columns_of(draws: Draws) -> dict[str, np.ndarray]:
    """Coordinates by name, each ``(n,)``.

    :raises ValueError: for an array that is no matrix.
    """
    if isinstance(draws, Mapping):
        return {
            f"{name}{list(index)}" if index else name: values[(slice(None), *index)]
            for name, values in ((name, np.asarray(site)) for name, site in draws.items())
            for index in np.ndindex(*values.shape[1:])
        }
    matrix = np.asarray(draws)
    if matrix.ndim != 2:
        raise ValueError(
            f"Expected draws of shape (n, dim), or a dict of sites, got shape {matrix.shape}."
        )
    return {f"$x_{{{i + 1}}}$": column for i, column in enumerate(matrix.T)}


def named(draws: Draws, names: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Coordinates under these names: of an array in their order, of sites those chosen.

    :raises ValueError: for names that do not fit.
    """
    columns = columns_of(draws)
    if names is None:
        return columns
    if isinstance(draws, Mapping):
        chosen = {
            column: values
            for name in names
            for column, values in columns.items()
            if name in (column, column.partition("[")[0])
        }
        unknown = [n for n in names if n not in columns and n not in draws]
        if unknown:
            raise ValueError(f"names: expected some of {list(columns)}, got {unknown}.")
        return chosen
    if len(names) != len(columns):
        raise ValueError(f"names: expected {len(columns)}, one for each column, got {len(names)}.")
    return dict(zip(names, columns.values(), strict=True))


def limits_of(columns: Sequence[np.ndarray]) -> tuple[float, float]:
    """What an axis shows: all but the ends of tails, with a margin."""
    ends = np.array([np.nanquantile(x.astype(float), (TAIL, 1 - TAIL)) for x in columns])
    low, high = ends[:, 0].min(), ends[:, 1].max()
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def legend(place: Any, **options: Any) -> None:
    """A legend whose markers can be seen."""
    for handle in place.legend(**options).legend_handles:
        handle.set_alpha(1)
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([20])
