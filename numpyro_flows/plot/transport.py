"""Draws in the base space of a flow, and their images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ..checks import check_key, check_size
from ..compilation import jit
from ..distribution import FlowDistribution
from ..infer import GuideFit
from ..infer.maps import LearnedMap
from ..transform import FlowTransform
from ._figure import Axes, columns_of, grid, limits_of, one


def base(
    z: ArrayLike,
    color: ArrayLike | None = None,
    *,
    label: str = "",
    names: Sequence[str] = ("$z_1$", "$z_2$"),
    ax: Axes | None = None,
    **options: Any,
) -> Axes:
    """Draws in two coordinates of a base space, with circles of radius 1, 2 and 3 around 0.

    A standard normal has 39 %, 86 % and 99 % of its mass in them.

    :param z: shape ``(n, 2)``.
    :param color: shape ``(n,)``, a quantity whose value the colour of a draw shows.
    :param label: what the colours show, beside their bar.
    :param names: of the coordinates.
    :param ax: axes to draw into.
    :param options: for ``ax.scatter``, such as ``vmin``, ``vmax`` and ``cmap``.
    :return: the axes.
    :raises ValueError: for another shape.

    >>> import matplotlib; matplotlib.use("agg")
    >>> import numpy as np, numpyro_flows as nf
    >>> ax = nf.plot.base(np.random.default_rng(0).normal(size=(100, 2)))
    >>> ax.get_aspect(), len(ax.lines)
    (1.0, 3)
    """
    z = np.asarray(z)
    if z.ndim != 2 or z.shape[1] != 2:
        raise ValueError(f"z: expected draws of shape (n, 2), got {z.shape}.")
    ax = one(ax)
    _colored(ax, z, color, label, options)
    turn = np.linspace(0, 2 * np.pi, 200)
    for radius in (1, 2, 3):
        ax.plot(radius * np.cos(turn), radius * np.sin(turn), color="0.3", linewidth=0.7)
    side = (-4.5, 4.5)
    ax.set(xlabel=names[0], ylabel=names[1], xlim=side, ylim=side, aspect="equal")
    return ax


def spaces(
    flow: FlowDistribution | LearnedMap | GuideFit,
    z: ArrayLike | None = None,
    *,
    coordinates: tuple[int, int] = (0, 1),
    names: Sequence[str] | None = None,
    key: Array | None = None,
    num_samples: int = 2000,
    axes: Any = None,
) -> np.ndarray:
    """The same points before and after a flow's transform, in two of the coordinates.

    A point has the colour of its angle around 0 in the base space, so that the eye can follow it.

    :param flow: a flow over vectors, a learned map, or a fitted guide; of the last two the space
        on the right is the latent space.
    :param z: points of the base space, ``(n, dim)``, as of a sampler that runs there; draws of the
        base distribution by default.
    :param coordinates: the two to draw.
    :param names: of the two; of a learned map or guide, the sites' by default.
    :param key: ``jax.random.key`` of the draws; that of seed 0 by default.
    :param num_samples: number of draws.
    :param axes: two axes to draw into.
    :return: the two axes: base space, and data or latent space.
    :raises TypeError: for what has no flow.
    :raises ValueError: for a flow that is no vector's, is conditional, or lacks a coordinate.

    >>> import matplotlib; matplotlib.use("agg")
    >>> import jax, numpyro_flows as nf
    >>> nf.plot.spaces(nf.realnvp(jax.random.key(0), 2), num_samples=100).shape
    (2,)
    """
    flow, own, title = _flow_of(flow)
    if len(flow.event_shape) != 1 or flow.batch_shape or flow.transform.context_dim:
        raise ValueError(
            f"flow: expected an unconditional flow over vectors, got {flow}. One that takes a "
            "context gets it by `flow.condition(context)`."
        )
    (dim,) = flow.event_shape
    first, second = coordinates
    if not (0 <= first < dim and 0 <= second < dim):
        raise ValueError(f"coordinates: expected two in 0 to {dim - 1}, got {coordinates}.")
    if z is None:
        check_size("num_samples", num_samples)
        key = jax.random.key(0) if key is None else check_key(key)
        z = flow.base_dist.sample(key, (num_samples,))
    after = np.asarray(_image(flow.transform, jnp.asarray(z)))[:, coordinates]
    before = np.asarray(z)[:, coordinates]
    angle = np.arctan2(before[:, 1], before[:, 0])
    names = names or [own[i] for i in coordinates]
    left, right = grid(axes, 1, 2, 4.5)[0]
    style: dict[str, Any] = {"cmap": "hsv", "vmin": -np.pi, "vmax": np.pi, "alpha": 0.8}
    base(before, angle, names=[f"$z_{{{i + 1}}}$" for i in coordinates], ax=left, **style)
    _colored(right, after, angle, "", style)
    left.set(title="base space")
    xlim, ylim = (limits_of([column]) for column in after.T)
    right.set(title=title, xlabel=names[0], ylabel=names[1], xlim=xlim, ylim=ylim)
    return np.array([left, right])


def _colored(
    ax: Axes, points: np.ndarray, color: ArrayLike | None, label: str, options: dict[str, Any]
) -> None:
    """A scatter with a bar of its colours."""
    style = {"s": 6, "alpha": 0.5, "linewidths": 0} | options
    shown = ax.scatter(*points.T, c=None if color is None else np.ravel(color), **style)
    if label:
        ax.figure.colorbar(shown, ax=ax, label=label).solids.set_alpha(1)


@jit(once=True)
def _image(transform: FlowTransform, z: Array) -> Array:
    return transform(z)


def _flow_of(flow: Any) -> tuple[FlowDistribution, list[str], str]:
    """A flow, names of its coordinates, and what its space is called."""
    if isinstance(flow, FlowDistribution):
        return flow, [f"$x_{{{i + 1}}}$" for i in range(flow.event_shape[0])], "data space"
    if isinstance(flow, LearnedMap):
        found, space = flow.flow, flow.space
    elif isinstance(flow, GuideFit) and hasattr(flow.guide, "space"):
        found, space = flow.guide.get_posterior(flow.params), flow.guide.space
    else:
        raise TypeError(
            "flow: expected a flow, what `nf.learn_map` returned, or a fitted `nf.AutoFlow`, got "
            f"{flow!r}."
        )
    sites = {name: np.zeros((1, *shape)) for name, shape in space.shapes}
    return found, list(columns_of(sites)), "latent space"
