"""Whether posteriors of simulated data are calibrated."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checks import check_size
from ._figure import Axes, Draws, named, one, strip


def ranks(
    ranks: Draws,
    num_draws: int,
    *,
    num_bins: int = 20,
    names: Sequence[str] | None = None,
    axes: Any = None,
) -> np.ndarray:
    r"""Histograms of simulation-based calibration: ranks of the truth among posterior draws.

    If posteriors are right, ranks are uniform, and a bin is in the grey band 99 times of 100: a
    hump says that posteriors are too wide, a bowl too narrow, a slope that they are shifted.

    :param ranks: of each simulation, how many of the posterior's draws are below the truth: shape
        ``(num_simulations, dim)``, or by site, ``(num_simulations, *shape)``.
    :param num_draws: number of draws among which the ranks are, so that they run from 0 to this.
    :param num_bins: number of bins, at most ``num_draws + 1``.
    :param names: of an array's columns; of sites, those to draw.
    :param axes: ``dim`` axes to draw into.
    :return: the axes, ``(dim,)``.
    :raises ValueError: for ranks outside of 0 to ``num_draws``.

    Source: Talts et al. (2018), arXiv:1804.06788.

    >>> import matplotlib; matplotlib.use("agg")
    >>> import numpy as np, numpyro_flows as nf
    >>> ranks = np.random.default_rng(0).integers(0, 100, size=(500, 2))
    >>> nf.plot.ranks(ranks, 99, names=["mu", "tau"])[0].get_title()
    'mu'
    """
    from scipy import stats  # slow to import

    columns = _ranks(ranks, num_draws, names)
    num_bins = min(check_size("num_bins", num_bins), num_draws + 1)
    # Bins hold whole numbers of ranks, and as many of them as can be.
    edges = np.round(np.linspace(0, num_draws + 1, num_bins + 1)) - 0.5
    share = np.diff(edges) / (num_draws + 1)
    found = strip(axes, len(columns), 3.0)
    for ax, (name, column) in zip(found, columns.items(), strict=True):
        band = stats.binom.ppf([[0.005], [0.995]], len(column), share)
        ax.stairs(band[1], edges, baseline=band[0], fill=True, color="0.85")
        ax.hist(column, edges, histtype="step", color="tab:blue")
        ax.set(title=name, xlabel=f"rank among {num_draws} draws", ylabel="simulations")
        ax.set_ylim(0, None)
    return found


def coverage(
    ranks: Draws,
    num_draws: int,
    *,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """How often central posterior intervals hold the truth, against how often they should.

    Above the diagonal posteriors are too wide, below too narrow. For right posteriors, the grey
    band holds each point of a curve 95 times of 100.

    :param ranks: as for :func:`ranks`.
    :param num_draws: number of draws among which the ranks are.
    :param names: of an array's columns; of sites, those to draw.
    :param ax: axes to draw into.
    :return: the axes.
    :raises ValueError: for ranks outside of 0 to ``num_draws``.

    >>> import matplotlib; matplotlib.use("agg")
    >>> import numpy as np, numpyro_flows as nf
    >>> ranks = np.random.default_rng(0).integers(0, 100, size=(500, 2))
    >>> len(nf.plot.coverage(ranks, 99, names=["mu", "tau"]).lines)
    3
    """
    columns = _ranks(ranks, num_draws, names)
    ax = one(ax, (4.5, 4.5))
    levels = np.linspace(0, 1, 101)
    num = min(map(len, columns.values()))
    edges = np.stack([1 - levels, 1 + levels]) / 2
    from scipy import stats  # slow to import

    low, high = stats.binom.ppf([[0.025], [0.975]], num, levels) / num
    ax.fill_between(levels, low, high, color="0.85", linewidth=0)
    ax.plot(levels, levels, color="0.4", linewidth=0.8)
    for name, column in columns.items():
        # A rank stands for a step of the distribution function, which may be inside in part.
        step = np.clip(edges * (num_draws + 1) - column[:, None, None], 0, 1)
        ax.plot(levels, (step[:, 1] - step[:, 0]).mean(0), label=name)
    ax.set(xlabel="nominal coverage", ylabel="share of simulations", xlim=(0, 1), ylim=(0, 1))
    ax.set_aspect("equal")
    ax.legend(loc="lower right")
    return ax


def _ranks(ranks: Draws, num_draws: int, names: Sequence[str] | None) -> dict[str, np.ndarray]:
    check_size("num_draws", num_draws)
    columns = named(ranks, names)
    for name, column in columns.items():
        if not len(column) or not ((column >= 0) & (column <= num_draws)).all():
            raise ValueError(f"ranks: expected numbers from 0 to {num_draws} of {name}.")
    return columns
