"""Standardisation: a flow taken apart, data whitened, and the numbers put back into the flow."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution, constraints

from ..augmented import AugmentedFlow
from ..checks import is_real
from ..compilation import jit
from ..coordinates import angles, discrete
from ..distribution import FlowDistribution
from ..parts import Fixed
from ..transform import FlowTransform
from ..transforms import Chain, CompressedContext, Embedded, NumPyroTransform, Standardized
from .columns import heavy, say_columns, set_apart
from .data import Table, in_precision, say_rows


class Numbers(NamedTuple):
    """The numbers of a standardisation.

    :ivar loc: and ``scale``, of x.
    :ivar context: loc and scale of the context, or these with centre and width of the compression
        before it (:class:`CompressedContext`); empty without a context that is standardised.
    """

    loc: np.ndarray
    scale: np.ndarray
    context: tuple[np.ndarray, ...] = ()


class Parts(NamedTuple):
    """A flow as ``fit`` sees it.

    :ivar core: the flow of the whitened coordinates, which trains.
    :ivar numbers: those of the standardisation that it had, or None.
    :ivar support: the transforms behind it.
    :ivar put_together: undoes it, given a trained core and the numbers of a standardisation or
        None.
    """

    core: Any
    numbers: Numbers | None
    support: list[NumPyroTransform]
    put_together: Callable[[Any, Numbers | None], Distribution]


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

    def put_together(trained: FlowDistribution, numbers: Numbers | None) -> FlowDistribution:
        transform, network = trained.transform, None
        if isinstance(transform, Embedded):
            network, transform = transform.network, transform.transform
        if numbers is not None:
            transform = _standardized(transform, numbers)
        whole = Chain([transform, *support]) if support else transform
        return _embedded(trained, whole, network)

    return Parts(_embedded(flow, core, network), numbers, support, put_together)


def _embedded(flow: FlowDistribution, transform: FlowTransform, network: Any) -> FlowDistribution:
    """The flow with this transform, whose context is read by the network if there is one."""
    return flow.with_parts(transform=transform if network is None else Embedded(transform, network))


@take_apart.register
def _(flow: AugmentedFlow) -> Parts:
    (dim,) = flow.event_shape
    transform, numbers = _unstandardized(flow.transform)
    encoder, _ = _unstandardized(flow.encoder_transform)

    def put_together(trained: AugmentedFlow, numbers: Numbers | None) -> AugmentedFlow:
        transform, encoder = trained.transform, trained.encoder_transform
        if numbers is not None:
            # The coordinates beside the data keep their units; q reads x and context.
            loc, scale, context = numbers
            ones = np.ones(flow.augment_dim, scale.dtype)
            zeros = 0 * ones
            whole = Numbers(np.append(loc, zeros), np.append(scale, ones), context)
            transform = _standardized(transform, whole)
            of_x = (loc, scale, np.zeros_like(loc), np.full_like(scale, np.inf))
            seen = map(np.append, of_x, context) if context else of_x[:2]
            encoder = _standardized(encoder, Numbers(zeros, ones, tuple(seen)))
        return flow.with_transforms(transform, encoder, flow.outer)

    if numbers is not None:
        numbers = Numbers(numbers.loc[:dim], numbers.scale[:dim], numbers.context)
    support = [] if flow.outer is None else [flow.outer]
    core = flow.with_transforms(transform, encoder, None)
    return Parts(core, numbers, support, put_together)


def _standardized(transform: FlowTransform, numbers: Numbers) -> FlowTransform:
    """In standardised coordinates, from whole arrays on the device: to make them takes programs."""
    width, dtype = transform.context_dim, numbers.scale.dtype
    context = numbers.context or (np.zeros(width, dtype), np.ones(width, dtype))
    loc, scale, context = jax.device_put((numbers.loc, numbers.scale, context))
    standardized = Standardized(transform, loc, scale, *context[:2])
    return CompressedContext(standardized, *context[2:]) if context[2:] else standardized


def _unstandardized(transform: FlowTransform) -> tuple[FlowTransform, Numbers | None]:
    """What is inside of a standardisation, and its numbers."""
    compression: list[Fixed] = []
    if isinstance(transform, CompressedContext):
        compression = [transform.centre, transform.width]
        transform = transform.transform
    if not isinstance(transform, Standardized):
        return transform, None
    fixed = [transform.context_loc, transform.context_scale, *compression]
    loc, scale, *context = (
        np.asarray(number.value) for number in (transform.loc, transform.scale, *fixed)
    )
    return transform.transform, Numbers(loc, scale, tuple(context))


def unconstrain(flow: Any, parts: Parts, table: Table) -> tuple[Table, np.ndarray]:
    """Rows in unconstrained coordinates, and the log-determinant of the map to them at each row.

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
    return table._replace(x=x), log_det


@jit
def _unconstrained(flow: Any, transforms: list[NumPyroTransform], x: Array) -> Any:
    x = x.astype(jnp.result_type(float))
    if not transforms:
        return flow.support(x), x, jnp.zeros(len(x))
    return flow.support(x), *Chain(transforms).inverse_and_log_det(x)


def is_discrete(flow: Any) -> np.ndarray:
    """Which coordinates of an event are integers, which keep their units; one False if none."""
    shape = flow.event_shape
    flags = np.array(discrete(flow.support, shape[0]) if len(shape) == 1 else False)
    return flags if flags.any() else np.array(False)


class Running:
    """Mean and spread of each column of rows that come in parts.

    Source: Chan, Golub & LeVeque (1983), doi:10.1080/00031305.1983.10483115, which is Welford's
    recurrence for parts in place of rows.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.loc: Any = 0.0
        self._squares: Any = 0.0
        self._low, self._high = np.inf, -np.inf

    def add(self, value: np.ndarray, weights: np.ndarray) -> "Running":
        """Rows, ``(n, *columns)``, of positive weights."""
        value, weight = value.astype(float), float(weights.sum(dtype=float))
        loc = np.average(value, axis=0, weights=weights)
        squares = weight * np.average((value - loc) ** 2, axis=0, weights=weights)
        total = self.weight + weight
        shift = loc - self.loc
        self._squares = self._squares + squares + shift**2 * (self.weight * weight / total)
        self.loc, self.weight = self.loc + shift * (weight / total), total
        self._low = np.minimum(self._low, value.min(axis=0))
        self._high = np.maximum(self._high, value.max(axis=0))
        return self

    def numbers(self, name: str, exempt: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each column, as the flow will hold them.

        :param exempt: columns that may be constant.
        :raises ValueError: for columns that are constant.
        """
        loc = in_precision(self.loc)
        scale = in_precision(np.sqrt(self._squares / self.weight))
        info = np.finfo(scale.dtype)
        # A spread of a few units in the last place is rounding, here or in the flow.
        largest = np.maximum(np.abs(self._low), np.abs(self._high))
        ulps = 16 * float(info.eps) * largest
        constant = (self._high - self._low <= ulps) | (scale < info.tiny)
        if exempt is not None:
            constant &= ~exempt
        if constant.any():
            reason = {
                "x": "so the density is not bounded there; drop it or add noise",
                "context": "so nothing can be learned from it; drop it",
            }
            raise ValueError(
                f"{name}: {say_columns(constant)} {'is' if constant.sum() == 1 else 'are'} "
                f"constant to the precision of {scale.dtype}, {reason[name]}."
            )
        return loc, scale


def by_kind(table: Table, transform: FlowTransform) -> tuple[np.ndarray, np.ndarray]:
    """Rows of x and their weights; along axes that are repeated, as time, a row for each place."""
    shape, axes = table.x.shape[1:], transform.repeated_axes
    return table.x.reshape(-1, *shape[axes:]), np.repeat(table.weights, math.prod(shape[:axes]))


class Moments:
    """Mean and spread of the columns of data and context, of rows that may come in parts."""

    def __init__(self, transform: FlowTransform):
        self._transform = transform
        self.x, self.context = Running(), Running()

    def add(self, table: Table) -> "Moments":
        """Rows in unconstrained coordinates, of positive weights."""
        self.x.add(*by_kind(table, self._transform))
        if table.context is not None and not isinstance(self._transform, Embedded):
            self.context.add(table.context, table.weights)
        return self


def leave_out(table: Table, embedded: bool, cells: np.ndarray) -> tuple[Table, list[str]]:
    """Weight 0 for rows that are few and far from all others, and a sentence that names them.

    :param cells: columns of integers, which are not looked at.
    """
    columns = {"x": np.where(cells, 0, table.x)}
    if not embedded and table.context is not None:
        columns["context"] = table.context
    apart = [set_apart(name, value, table.weights) for name, value in columns.items()]
    rows = np.any([rows for rows, _ in apart], axis=0)
    if not rows.any():
        return table, []
    weights = np.where(rows, 0, table.weights)
    weights = (weights / weights[weights > 0].mean(dtype=float)).astype(weights.dtype)
    return table._replace(weights=weights), [note for _, note in apart if note]


def numbers_of(
    table: Table, parts: Parts, embedded: bool, cells: np.ndarray, known: Moments | None = None
) -> tuple[Numbers, list[str]]:
    """The numbers of a standardisation, and warnings about columns with heavy tails.

    Mean and standard deviation, but quantiles where these are those of a few rows; a column of the
    context is then compressed.

    :param cells: columns of integers.
    :param known: the moments of all rows, where the table holds some alone.
    """
    transform = parts.core.transform
    moments = Moments(transform).add(table) if known is None else known
    kinds = np.broadcast_to(cells, table.x.shape[1:])[(0,) * transform.repeated_axes]
    found = moments.x.numbers("x", kinds), heavy(*by_kind(table, transform))
    (loc, scale), (skewed, median, width) = jax.tree.map(
        lambda numbers: np.broadcast_to(numbers, table.x.shape[1:]).copy(), found
    )
    notes = []
    # Integers and the circle have their own units and no place to start from.
    own = cells
    if table.x.ndim == 2 and parts.support:
        own = cells | np.array(angles(parts.support[-1].codomain, table.x.shape[1]))
    loc, scale = np.where(own, loc.dtype.type(0), loc), np.where(own, scale.dtype.type(1), scale)
    skewed &= ~own
    if skewed.any():
        loc, scale = (
            np.where(skewed, robust, usual).astype(usual.dtype)
            for robust, usual in ((median, loc), (width, scale))
        )
        notes.append(
            f"x: tails rule the standard deviation of {say_columns(skewed)}; quantiles standardise "
            "instead. A flow learns such tails badly: of positive numbers, build it with "
            "`support=constraints.positive`; else put `nf.elementwise.HeavyTail` at its end."
        )
    if embedded or table.context is None:
        return Numbers(loc, scale), notes
    context = table.context
    usual = moments.context.numbers("context")  # raises for constant columns
    skewed, median, width = heavy(context, table.weights)
    if not skewed.any():
        return Numbers(loc, scale, usual), notes
    one_sided = (context >= 0).all(axis=0) | (context <= 0).all(axis=0)
    for i in np.flatnonzero(skewed & one_sided):
        # From the small numbers on, in orders of magnitude.
        sizes = np.abs(context[:, i])
        median[i], width[i] = 0, np.quantile(sizes[sizes > 0], 0.01)
    centre = in_precision(np.where(skewed, median, 0))
    width = in_precision(np.where(skewed, width, np.inf))
    notes.append(
        f"context: {say_columns(skewed, 'span')} orders of magnitude; the flow sees the inverse "
        "hyperbolic sine, which is like the logarithm."
    )
    seen = compress(context, centre, width)
    usual = Running().add(seen, table.weights).numbers("context")
    return Numbers(loc, scale, (*usual, centre, width)), notes


def compress(context: np.ndarray, centre: np.ndarray, width: np.ndarray) -> np.ndarray:
    """The context as a :class:`CompressedContext` passes it on."""
    is_linear = np.isinf(width)
    bent = np.arcsinh((context - centre.astype(float)) / np.where(is_linear, 1, width))
    return np.where(is_linear, context, bent)


def whiten(table: Table, numbers: Numbers, embedded: bool) -> tuple[Table, float]:
    """Rows in the coordinates of the core, and the log-determinant of the map to them."""
    x = (table.x.astype(float) - numbers.loc) / numbers.scale
    context = table.context
    if not embedded and context is not None:
        loc, scale, *compression = numbers.context
        context = compress(context, *compression) if compression else context
        context = (context.astype(float) - loc) / scale
    log_det = np.log(numbers.scale.astype(float)).sum()
    return table._replace(x=x, context=context), -log_det
