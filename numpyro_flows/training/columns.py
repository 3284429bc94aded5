"""Checks of data, column by column: rows far from all others, heavy tails, no density."""

from typing import Any, Final

import jax
import numpy as np

from .data import Table, say_rows

#: A standard deviation so many times what the quantiles say is that of a few rows.
RULED: Final = 2.0
#: Rows are set apart if they are so many times as far out as all others,
GAP: Final = 10.0
#: and at most this share of the rows.
FEW: Final = 0.01
#: Rows that are looked at for quantiles and ties.
LOOK_AT: Final = 20_000
#: Fewer rows say nothing of this kind.
ENOUGH: Final = 20
#: A value in so many rows, and in this share of them, is a point mass.
TIES: Final = 5
TIED: Final = 0.05
#: Least variance, per variance of a coordinate, of a combination of columns that varies.
FLAT: Final = 1e-8


def say_columns(columns: np.ndarray, verb: str = "") -> str:
    """Names of the columns, given which of an event they are: 'column 1', 'columns 0, 2'.

    :param verb: what they do, as 'repeat' of 'column 1 repeats' and 'columns 0, 2 repeat'.
    """
    indices = [tuple(index.tolist()) for index in np.argwhere(columns)]
    named = [str(index[0]) if len(index) == 1 else str(index) for index in indices]
    listed = ", ".join(named[:10]) + (", ..." if len(named) > 10 else "")
    many = len(named) > 1
    verb = "" if not verb else f" {verb}" if many else f" {verb}s"
    return f"column{'s' if many else ''} {listed}{verb}"


def spread(value: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median of each column, and the scale of a normal with its quantiles at 10 and 90 %.

    :param value: shape ``(n, *columns)``.
    """
    some = slice(None, None, -(-len(value) // LOOK_AT))
    value, weights = value[some].reshape(len(value[some]), -1), weights[some]
    order = np.argsort(value, axis=0)
    mass = np.cumsum(weights[order], axis=0)
    low, middle, high = (
        np.take_along_axis(order, (mass < p * mass[-1]).sum(0, keepdims=True), axis=0)
        for p in (0.1, 0.5, 0.9)
    )
    low, middle, high = (
        np.take_along_axis(value, rows, axis=0)[0].astype(float) for rows in (low, middle, high)
    )
    return middle, (high - low) / 2.563


def heavy(value: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns whose standard deviation a few rows dominate, with medians and scales of all.

    :param value: shape ``(n, *columns)``.
    :return: three arrays of shape ``columns``.
    """
    columns = value.shape[1:]
    if len(value) < ENOUGH:
        return np.zeros(columns, bool), np.zeros(columns), np.ones(columns)
    median, scale = (numbers.reshape(columns) for numbers in spread(value, weights))
    mean = np.average(value, axis=0, weights=weights)
    variance = np.average((value.astype(float) - mean) ** 2, axis=0, weights=weights)
    # Where most rows are equal, their quantiles say nothing.
    return (variance > (RULED * scale) ** 2) & (scale > 0), median, scale


def set_apart(name: str, value: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, str]:
    """Rows that are few and far from all others in some column, and a sentence that names them.

    :param value: shape ``(n, *columns)``.
    :return: mask of shape ``(n,)``, and a text, empty if there are none.
    """
    suspect, median, scale = heavy(value, weights)
    rows, columns = np.zeros(len(value), bool), np.zeros(suspect.shape, bool)
    present = weights > 0
    most = max(1, int(FEW * present.sum()))
    for index in map(tuple, np.argwhere(suspect)):
        distance = np.where(
            present, np.abs(value[(slice(None), *index)] - median[index]) / scale[index], 0.0
        )
        top = np.sort(distance)[-most - 1 :]
        gaps = np.flatnonzero(top[1:] > GAP * np.maximum(top[:-1], RULED))
        if len(gaps):
            rows |= distance > top[gaps[0]]
            columns[index] = True
    if not rows.any():
        return rows, ""
    return rows, (
        f"{name}: {say_rows(rows)} lie more than {GAP:g} times as far out as all others in "
        f"{say_columns(columns)}, and are left out of the fit. Drop or mend them if they are "
        "errors; `standardize=False` keeps them."
    )


def without_bound(x: np.ndarray, table: Table, embedded: bool, cells: np.ndarray) -> list[str]:
    """A warning for data without a density, on which a likelihood grows without limit.

    :param x: rows in their own units, shape ``(n, *event_shape)``.
    :param table: the same rows whitened, with their contexts.
    :param cells: columns of integers, which have masses, not densities.
    """
    if len(x) < ENOUGH or cells.all():
        return []
    rest = table._replace(x=np.where(cells, 0, table.x))
    notes = [_ties(x, cells), _flat(rest, embedded)]
    # A network may read a context of many arrays; rows that differ there are no copies.
    return [note for note in (*notes, "" if embedded else _copies(x, table.context)) if note]


def _ties(x: np.ndarray, cells: np.ndarray) -> str:
    """Columns that hold one value again and again."""
    flat = x.reshape(len(x), -1)[:: -(-len(x) // LOOK_AT)]
    counts = np.zeros(flat.shape[1], int)
    values = np.zeros(flat.shape[1])
    for i, column in enumerate(np.sort(flat, axis=0).T):
        starts = np.flatnonzero(np.append(True, column[1:] != column[:-1]))
        lengths = np.diff(np.append(starts, len(column)))
        counts[i], values[i] = lengths.max(), column[starts[lengths.argmax()]]
    tied = (counts >= max(TIES, TIED * len(flat))) & ~cells.reshape(-1)
    if not tied.any():
        return ""
    first = np.argmax(tied)
    return (
        f"x: {say_columns(tied.reshape(x.shape[1:]), 'repeat')} a value ({values[first]:g} in "
        f"{counts[first] / len(flat):.0%} of the rows), where a density has no bound: the fit will "
        "raise it as long as it runs, and its losses mean nothing. Give such a column a discrete "
        "support such as `constraints.integer_interval(0, 4)`, make counts continuous by "
        "`nf.dequantize`, or drop it."
    )


def _flat(table: Table, embedded: bool) -> str:
    """Columns that are a linear function of others, or of the context."""
    x = table.x.reshape(len(table.x), -1)
    dim = x.shape[1]
    if not embedded and table.context is not None:
        x = np.concatenate([x, table.context], axis=1)
    x = x[:: -(-len(x) // LOOK_AT)].astype(float)
    if len(x) < 2 * x.shape[1] or x.shape[1] > 512:
        return ""
    median, scale = spread(x, np.ones(len(x)))
    x = (x - median) / np.where(scale > 0, scale, np.maximum(x.std(axis=0), np.finfo(float).tiny))
    # Rows far out would hide what the others do.
    x = x[(np.abs(x) < 3 * GAP).all(axis=1)]
    if len(x) < max(ENOUGH, 2 * x.shape[1]):
        return ""
    varies = x.std(axis=0) > 1e-2
    values, vectors = np.linalg.eigh(np.cov(x[:, varies].T).reshape(varies.sum(), -1))
    part = np.zeros(x.shape[1], bool)
    part[varies] = (np.abs(vectors[:, values < FLAT]) > 0.1).any(axis=1)
    columns = part[:dim].reshape(table.x.shape[1:])
    if not columns.any() or part.sum() < 2:
        return ""
    others = f" and {say_columns(part[dim:])} of the context" if part[dim:].any() else ""
    return (
        f"x: {say_columns(columns)}{others} depend linearly on each other, so that all rows lie on "
        "a plane, where a density has no bound. Drop a column, or model the others given it."
    )


def _copies(x: np.ndarray, context: Any) -> str:
    """Rows that are copies of others."""
    n = min(len(x), LOOK_AT)
    rows = [array[:n].reshape(n, -1) for array in jax.tree.leaves((x, context))]
    whole = np.ascontiguousarray(np.concatenate(rows, axis=1))
    distinct = len(np.unique(whole.view(np.dtype((np.void, whole.itemsize * whole.shape[1])))))
    if distinct * 2 >= len(whole):
        return ""
    return (
        f"x: only {distinct} of {len(whole)} rows are different. Rows held out are then copies of "
        "rows trained on, and training does not stop where it should. Pass each row once, with "
        "`weights=` for how often it occurs."
    )
