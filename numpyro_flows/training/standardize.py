"""Standardisation: a flow taken apart, data whitened, and the numbers put back into the flow."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution, constraints

from ..augmented import AugmentedFlow
from ..checks import is_real
from ..circular import angles
from ..compilation import jit
from ..distribution import FlowDistribution
from ..transform import Embedded, FlowTransform
from ..transforms import Chain, NumPyroTransform, Standardized
from .data import Table, in_precision, say_rows


class Parts(NamedTuple):
    """A flow as ``fit`` sees it.

    :ivar core: the flow of the whitened coordinates, which trains.
    :ivar numbers: those of the standardisation that it had, or None.
    :ivar support: the transforms behind it.
    :ivar put_together: undoes it, given a trained core and the numbers of a standardisation or
        None.
    """

    core: Any
    numbers: tuple[np.ndarray, ...] | None
    support: list[NumPyroTransform]
    put_together: Callable[[Any, tuple[Any, ...] | None], Distribution]


@functools.singledispatch
def take_apart(flow: Any) -> Parts:
    """The parts of a ``FlowDistribution`` or ``AugmentedFlow``."""
    raise NotImplementedError


@take_apart.register
def _(flow: FlowDistribution) -> Parts:
    transform = flow.transform
    network = transform.network if isinstance(transform, Embedded) else None
    parts = [transform.transform if isinstance(transform, Embedded) else transform]
    support: list[NumPyroTransform] = []
    while parts and isinstance(last := parts[-1], Chain | NumPyroTransform):
        if isinstance(last, Chain):
            parts[-1:] = last.parts
        else:
            support.insert(0, last)
            parts.pop()
    if not parts:
        raise ValueError(
            "flow: it has no parameters to train (it is only a support). Build one with a recipe "
            "such as `nf.realnvp`."
        )
    core, numbers = _unstandardized(parts[0] if len(parts) == 1 else Chain(parts))

    def put_together(trained: FlowDistribution, numbers: tuple | None) -> FlowDistribution:
        transform, network = trained.transform, None
        if isinstance(transform, Embedded):
            network, transform = transform.network, transform.transform
        if numbers is not None:
            transform = _standardized(transform, *numbers)
        whole = Chain([transform, *support]) if support else transform
        return _embedded(flow.base_dist, whole, network)

    return Parts(_embedded(flow.base_dist, core, network), numbers, support, put_together)


def _embedded(base: Distribution, transform: FlowTransform, network: Any) -> FlowDistribution:
    """The flow, with its context read by the network if there is one."""
    return FlowDistribution(base, transform if network is None else Embedded(transform, network))


@take_apart.register
def _(flow: AugmentedFlow) -> Parts:
    (dim,) = flow.event_shape
    transform, numbers = _unstandardized(flow.transform)
    encoder, _ = _unstandardized(flow.encoder_transform)

    def put_together(trained: AugmentedFlow, numbers: tuple | None) -> AugmentedFlow:
        transform, encoder = trained.transform, trained.encoder_transform
        if numbers is not None:
            # The coordinates beside the data keep their units; q reads x and context.
            ones = np.ones(flow.augment_dim, numbers[1].dtype)
            loc, scale = (np.append(*pair) for pair in zip(numbers, (0 * ones, ones), strict=False))
            transform = _standardized(transform, loc, scale, *numbers[2:])
            x_and_context = (np.concatenate(numbers[i::2]) for i in (0, 1))
            encoder = _standardized(encoder, 0 * ones, ones, *x_and_context)
        return flow.with_transforms(transform, encoder, flow.outer)

    if numbers is not None:
        numbers = (numbers[0][:dim], numbers[1][:dim], *numbers[2:])
    support = [] if flow.outer is None else [flow.outer]
    core = flow.with_transforms(transform, encoder, None)
    return Parts(core, numbers, support, put_together)


def _standardized(
    transform: FlowTransform,
    loc: np.ndarray,
    scale: np.ndarray,
    context_loc: np.ndarray | None = None,
    context_scale: np.ndarray | None = None,
) -> Standardized:
    """``Standardized``, from whole arrays on the device: to make them there takes programs."""
    if context_loc is None or context_scale is None:
        context_loc = np.zeros(transform.context_dim, scale.dtype)
        context_scale = np.ones(transform.context_dim, scale.dtype)
    numbers = jax.device_put((loc, scale, context_loc, context_scale))
    return Standardized(transform, *numbers)


def _unstandardized(
    transform: FlowTransform,
) -> tuple[FlowTransform, tuple[np.ndarray, ...] | None]:
    """What is inside of a standardisation, and its numbers."""
    if not isinstance(transform, Standardized):
        return transform, None
    fixed = (transform.loc, transform.scale, transform.context_loc, transform.context_scale)
    return transform.transform, tuple(np.asarray(number.value) for number in fixed)


def unconstrain(flow: Any, parts: Parts, table: Table) -> tuple[Table, np.ndarray]:
    """Rows before the support's transforms, and log|det| of these at each row.

    Rows of weight 0 go: no split or batch is then of weight 0, and their density is no matter.

    :raises ValueError: for rows outside of the support or on its boundary.
    """
    x, log_det = table.x, np.zeros(len(table.x))
    if parts.support or not is_real(flow.support):
        inside, value, log_dets = _unconstrained(flow, parts.support, x)
        outside = ~np.asarray(inside)
        if outside.any():
            raise ValueError(
                f"x: {say_rows(outside)} lie outside the flow's support {flow.support}; drop them "
                "or build the flow with another `support=`."
            )
        x, log_det = np.asarray(value), np.asarray(log_dets, dtype=float)
    if parts.support:
        bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1) | ~np.isfinite(log_det)
        if isinstance(parts.support[-1].codomain, type(constraints.simplex)):
            # NumPyro clips a last share of 0 to the smallest number, far from any other row.
            tiny = np.finfo(jnp.result_type(float)).tiny
            bad |= (np.abs(x) > -0.9 * np.log(tiny)).any(axis=-1)
        if bad.any():
            raise ValueError(
                f"x: {say_rows(bad)} lie on the boundary of the support, where the density is not "
                "finite; move them inside or drop them."
            )
    keep = table.weights > 0
    return table._replace(x=x).take(keep), log_det[keep]


@jit
def _unconstrained(flow: Any, transforms: list[NumPyroTransform], x: Array) -> Any:
    x = x.astype(jnp.result_type(float))
    if not transforms:
        return flow.support(x), x, jnp.zeros(len(x))
    return flow.support(x), *Chain(transforms).inverse_and_log_det(x)


def moments(name: str, value: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, as the flow will hold them."""
    value = value.astype(float)
    loc = np.average(value, axis=0, weights=weights)
    scale = np.sqrt(np.average((value - loc) ** 2, axis=0, weights=weights))
    loc, scale = in_precision(loc), in_precision(scale)
    info = np.finfo(scale.dtype)
    # A spread of a few units in the last place is rounding, here or in the flow.
    ulps = 16 * float(info.eps) * np.abs(value).max(axis=0)
    constant = (np.ptp(value, axis=0) <= ulps) | (scale < info.tiny)
    if constant.any():
        columns = [int(i[0]) if len(i) == 1 else tuple(i.tolist()) for i in np.argwhere(constant)]
        reason = {
            "x": "so the density is not bounded there; drop it or add noise",
            "context": "so nothing can be learned from it; drop it",
        }
        raise ValueError(
            f"{name}: column {', '.join(map(str, columns))} is constant to the precision of "
            f"{scale.dtype}, {reason[name]}."
        )
    return loc, scale


def numbers_of(table: Table, parts: Parts, embedded: bool) -> tuple[np.ndarray, ...]:
    """The numbers of a standardisation: loc and scale of x, and perhaps of the context."""
    of_context = (
        ()
        if embedded or table.context is None
        else moments("context", table.context, table.weights)
    )
    loc, scale = moments("x", table.x, table.weights)
    if table.x.ndim == 2 and parts.support:
        # The circle has its own units and no place to start from.
        circular = np.array(angles(parts.support[-1].codomain, table.x.shape[1]))
        loc, scale = np.where(circular, 0, loc), np.where(circular, 1, scale)
    return (loc, scale, *of_context)


def whiten(table: Table, numbers: tuple[np.ndarray, ...], embedded: bool) -> tuple[Table, float]:
    """Rows as the core sees them, and log|det| of the way back."""
    x = (table.x.astype(float) - numbers[0]) / numbers[1]
    context = table.context
    if not embedded and context is not None:
        context = (context.astype(float) - numbers[2]) / numbers[3]
    log_det = np.log(numbers[1].astype(float)).sum()
    return table._replace(x=x, context=context), -log_det
