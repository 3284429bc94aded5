"""Training curves."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..infer import GuideFit
from ..training import FitResult
from ._figure import Axes, one


def losses(fitted: Any, *, unit: str = "nats", ax: Axes | None = None) -> Axes:
    """Training curves: of ``nf.fit`` by epoch, of ``nf.fit_guide`` by step.

    A guide's losses are drawn with their running median, beside the ELBO of the result. The axis
    leaves out the first losses where they are far above all others.

    :param fitted: what ``nf.fit`` or ``nf.fit_guide`` returned, an array ``(n,)`` of losses, as of
        ``SVI.run``, or several by label.
    :param unit: of the losses.
    :param ax: axes to draw into.
    :return: the axes.

    >>> import matplotlib; matplotlib.use("agg")
    >>> import numpy as np, numpyro_flows as nf
    >>> nf.plot.losses(np.exp(-np.arange(50.0))).get_ylabel()
    'loss (nats)'
    """
    ax = one(ax)
    if isinstance(fitted, FitResult):
        curves = {"training": fitted.train_losses, "validation": fitted.val_losses}
        for label, curve in curves.items():
            if len(curve):
                ax.plot(1 + np.arange(len(curve)), curve, marker=".", label=label)
        if len(fitted.val_losses) and fitted.best_epoch:
            ax.axvline(fitted.best_epoch, color="0.4", linestyle=":", label="returned")
        ax.set(xlabel="epoch", ylabel=f"loss per row ({unit})")
        shown = [x for x in curves.values() if len(x)]
    elif isinstance(fitted, GuideFit):
        shown = [_noisy(ax, "-ELBO of a step", fitted.losses)] if len(fitted.losses) else []
        ax.axhline(-fitted.elbo, color="k", linestyle="--", label="-ELBO of the result")
        shown.append(np.array([-fitted.elbo]))
        ax.set(xlabel="step", ylabel=f"negative ELBO ({unit})")
    else:
        several = fitted if isinstance(fitted, Mapping) else {"": fitted}
        shown = [_noisy(ax, label, np.asarray(curve)) for label, curve in several.items()]
        ax.set(xlabel="step", ylabel=f"loss ({unit})")
    values = np.concatenate(shown)
    values = values[np.isfinite(values)]
    if len(values) > 1:
        low, most = values.min(), np.quantile(values, 0.95)
        high = min(values.max(), most + (most - low))
        margin = 0.05 * (high - low) or 0.5
        ax.set_ylim(low - margin, high + margin)
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return ax


def _noisy(ax: Axes, label: str, curve: np.ndarray) -> np.ndarray:
    """A curve with its running median, which is returned; few losses are drawn as they are."""
    window = len(curve) // 100
    steps = 1 + np.arange(len(curve))
    if window < 2:
        ax.plot(steps, curve, label=label or None)
        return curve
    (line,) = ax.plot(steps, curve, linewidth=0.5, alpha=0.3)
    views = np.lib.stride_tricks.sliding_window_view(curve, window)
    finite = np.isfinite(views).any(axis=1)
    median = np.full(len(views), np.nan)
    median[finite] = np.nanmedian(np.where(np.isfinite(views), views, np.nan)[finite], axis=1)
    middle = steps[window // 2 :][: len(views)]
    ax.plot(middle, median, color=line.get_color(), label=label or "running median")
    return median
