"""Checks of a transform against its contract, with automatic differentiation as the judge."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import Normal, TransformedDistribution
from numpyro.distributions.transforms import Transform

from ..checks import check_event_shape, check_float
from ..compilation import jit
from ..distribution import FlowDistribution, leaf_names
from ..transform import FlowTransform, Wrapper
from ..transforms import Conditioned, NumPyroTransform


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of a report.

    :ivar name: what was checked.
    :ivar passed: whether it holds.
    :ivar detail: the figure behind it.
    """

    name: str
    passed: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`check_transform` found; ``print`` it.

    :ivar title: the transform, its shapes and dtype.
    :ivar checks: one :class:`Check` per line.
    """

    title: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [
            f"  {'ok  ' if check.passed else 'FAIL'}  {check.name:<{width}}  {check.detail}"
            for check in self.checks
        ]
        return "\n".join([self.title, *lines])


class TransformError(ValueError):
    """A transform breaks its contract; the message is the report, also at ``.report``."""

    def __init__(self, report: Report):
        super().__init__(f"the transform breaks its contract\n{report}")
        self.report = report


def check_transform(
    transform: Transform,
    x: ArrayLike,
    context: Any = None,
    *,
    tolerance: float | None = None,
    quick: bool = False,
) -> Report:
    r"""Check any transform against the contract, with automatic differentiation as the judge.

    Both round trips; the log-determinant against the autodiff Jacobian and the inverse's against
    minus the forward one; NumPyro's protocol; batch shapes; floating leaves with names; finite
    gradients with respect to x, the context and every leaf; the dtype; and that wrong shapes,
    dtypes and contexts are refused. Errors are relative, :math:`|a - b| / \max(1, |b|)`.

    :param transform: a ``FlowTransform``, or any NumPyro transform.
    :param x: points of its domain, shape ``(n, *event_shape)`` with n at least 2, in float32 or
        float64; the figures hold for these points.
    :param context: shape ``(n, context_dim)`` for a conditional transform; for an ``Embedded``
        one the pytree that its network reads, n rows in each leaf.
    :param tolerance: largest relative error of a round trip, by default 1e-4 in float32 and
        1e-9 in float64; log-determinants are allowed ten times as much.
    :param quick: whether to check round trips, shapes, dtypes, leaves and refusals alone, for which
        one program is compiled rather than five. (A check in float64 is the sharper one; a quick
        one in float32 beside it says what precision leaves of the round trip.)
    :return: the report, every line of it passed.
    :raises TransformError: with the report, if a line failed.
    :raises ValueError: for x or a context of the wrong shape.
    :raises TypeError: for something that is no transform.

    >>> import jax, numpyro_flows as nf
    >>> flow = nf.realnvp(jax.random.key(0), 3, depth=2, hidden=(8,))
    >>> report = check_transform(flow.transform, jax.random.normal(jax.random.key(1), (4, 3)))
    >>> report.passed
    True
    """
    x = check_float("x", x)
    if not isinstance(transform, Transform):
        raise TypeError(f"Expected a transform, got {type(transform).__name__}.")
    if not isinstance(transform, FlowTransform):
        transform = NumPyroTransform(transform, x.shape[1:])
    check_event_shape("x", x.shape, transform.event_shape)
    if x.ndim != 1 + len(transform.event_shape) or len(x) < 2:
        raise ValueError(
            f"x: expected shape (n, *{transform.event_shape}) with n at least 2, got {x.shape}."
        )
    context = jax.tree.map(jnp.asarray, context)
    transform.read_context(context)  # raises where the context does not fit
    if tolerance is None:
        tolerance = 1e-9 if x.dtype == jnp.float64 else 1e-4
    checks: list[Check] = []
    compiled = () if quick else (_jacobian, _batches, _gradients, _protocol)
    for group in (_leaves, _values, *compiled, _refusals):
        try:
            checks += group(transform, x, context, tolerance)
        except Exception as error:  # a transform may fail in any way, and the report must say so
            message = f"{type(error).__name__}: {error}".split("\n")[0]
            checks.append(Check(group.__name__.strip("_"), False, message))
    report = Report(
        f"{type(transform).__name__}: {transform.event_shape} -> {transform.out_shape}, "
        f"{x.dtype}, {len(x)} points",
        tuple(checks),
    )
    if not report.passed:
        raise TransformError(report)
    return report


def _error(a: ArrayLike, b: ArrayLike) -> float:
    """Largest relative error of a against b; infinite where either is not finite."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.inf
    return float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b)), initial=0.0))


def _close(name: str, a: ArrayLike, b: ArrayLike, tolerance: float) -> Check:
    error = _error(a, b)
    return Check(name, error <= tolerance, f"error {error:.1e} (at most {tolerance:.0e})")


def _same(name: str, got: Any, expected: Any) -> Check:
    return Check(name, got == expected, f"{got}" + ("" if got == expected else f", not {expected}"))


# Each direction is a program inside the others: Python runs once for each shape of values, and what
# the programs ask of a direction again, also its derivatives, is read from that trace.
@jax.jit
def _forward(transform: FlowTransform, x: Array, context: Any = None) -> tuple[Array, Array]:
    return transform.forward_and_log_det(x, context)


@jax.jit
def _inverse(transform: FlowTransform, y: Array, context: Any = None) -> tuple[Array, Array]:
    return transform.inverse_and_log_det(y, context)


class _Traced(Wrapper):
    """The transform by those two, for the methods that ``FlowTransform`` builds upon them."""

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return _forward(self.transform, x)

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return _inverse(self.transform, y)


def _has_a_protocol_of_its_own(transform: FlowTransform) -> bool:
    names = ("__call__", "_inverse", "inv", "call_with_intermediates", "log_abs_det_jacobian")
    return any(getattr(type(transform), name) is not getattr(FlowTransform, name) for name in names)


# Compiled once per structure of transform, so that a suite of transforms shares the programs.
@jit(once=True)
def _round_trip(transform: FlowTransform, x: Array, context: Any):
    y, log_det = _forward(transform, x, context)
    x_again, inverse_log_det = _inverse(transform, y, context)
    y_again, _ = _forward(transform, x_again, context)
    return y, log_det, x_again, inverse_log_det, y_again


def _leaves(transform, x, context, tolerance) -> list[Check]:
    bad = [
        f"{name} ({type(leaf).__name__})"
        for name, leaf in zip(leaf_names(transform), jax.tree.leaves(transform), strict=True)
        if not (name and isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating))
    ]
    count = len(jax.tree.leaves(transform))
    return [Check("leaves are named floating arrays", not bad, ", ".join(bad) or f"{count} leaves")]


def _values(transform, x, context, tolerance) -> list[Check]:
    y, log_det, x_again, inverse_log_det, y_again = _round_trip(transform, x, context)
    dtypes = {str(value.dtype) for value in (y, log_det, x_again, inverse_log_det)}
    return [
        _same("shape of forward", y.shape, x.shape[:1] + transform.out_shape),
        _same("shape of log-det", log_det.shape, x.shape[:1]),
        _same("dtype kept", dtypes, {str(x.dtype)}),
        _close("inverse(forward(x)) = x", x_again, x, tolerance),
        _close("forward(inverse(y)) = y", y_again, y, tolerance),
        _close("inverse log-det = -log-det", inverse_log_det, -log_det, 10 * tolerance),
    ]


# Both directions are one program each time: a program costs more than what it computes.
def _directions(transform: FlowTransform) -> tuple[Callable, Callable]:
    return functools.partial(_forward, transform), functools.partial(_inverse, transform)


@jit(once=True)
def _log_abs_dets(transform, x, y, context) -> list[Array]:
    def log_abs_det(step, values):
        shape = values.shape[1:]

        def by(jacobian, value, context):
            def flat(v):
                return step(v.reshape(shape), context)[0].reshape(-1)

            return jnp.linalg.slogdet(jacobian(flat)(value.reshape(-1)))[1]

        def of_rows(jacobian):  # a program inside, of which nothing stays where the mode fails
            return jax.jit(jax.vmap(functools.partial(by, jacobian)))(values, context)

        try:
            return of_rows(jax.jacfwd)
        except TypeError:  # JAX's answer where a mode does not exist
            return of_rows(jax.jacrev)

    return [*map(log_abs_det, _directions(transform), (x, y))]


def _jacobian(transform, x, context, tolerance) -> list[Check]:
    if np.prod(transform.event_shape) != np.prod(transform.out_shape):
        # On a manifold the log-determinant is a convention, which NumPyro's own tests judge.
        return []
    y, log_det, _, inverse_log_det, _ = _round_trip(transform, x, context)
    forward, inverse = _log_abs_dets(transform, x, y, context)
    return [
        _close("log-det = autodiff", log_det, forward, 10 * tolerance),
        _close("inverse log-det = autodiff", inverse_log_det, inverse, 10 * tolerance),
    ]


@jit(once=True)
def _rearranged(transform, x, y, context):
    """One row alone, rows under two batch axes, and one context shared by all rows."""

    def rearranged(step, value):
        def pick(choose):
            return choose(value), jax.tree.map(choose, context)

        row = step(*pick(lambda a: a[0]))
        stacked = step(*pick(lambda a: jnp.stack([a, a[::-1]])))
        if context is None:
            return row, stacked, None, None
        first = jax.tree.map(lambda a: a[:1], context)
        shared = step(value, first)
        repeated = step(
            value, jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), first, context)
        )
        return row, stacked, shared, repeated

    return [*map(rearranged, _directions(transform), (x, y))]


def _batches(transform, x, context, tolerance) -> list[Check]:
    y, log_det, x_again, inverse_log_det, _ = _round_trip(transform, x, context)
    checks = []
    for (name, out, log_dets), (row, stacked, shared, repeated) in zip(
        (("forward", y, log_det), ("inverse", x_again, inverse_log_det)),
        _rearranged(transform, x, y, context),
        strict=True,
    ):
        checks += [
            _close(f"{name} of one row", row[0], out[0], tolerance),
            _close(f"{name} of one row: log-det", row[1], log_dets[0], 10 * tolerance),
            _close(f"{name} of two batch axes", stacked[0][1], out[::-1], tolerance),
            _close(f"{name} of two batch axes: log-det", stacked[1][0], log_dets, 10 * tolerance),
        ]
        if context is not None:
            checks.append(_close(f"{name}: context broadcasts", shared[0], repeated[0], tolerance))
    return checks


@jit(once=True)
def _gradient(transform, x, y, context):
    def gradient(forward, value):
        def loss(transform, value, context):
            out, log_det = (_forward if forward else _inverse)(transform, value, context)
            # Unequal weights, so that contributions do not cancel.
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + log_det.sum()

        return jax.grad(loss, argnums=(0, 1, 2) if context is not None else (0, 1))(
            transform, value, context
        )

    return gradient(True, x), gradient(False, y)


def _gradients(transform, x, context, tolerance) -> list[Check]:
    y, *_ = _round_trip(transform, x, context)
    checks = []
    both = _gradient(transform, x, y, context)
    for name, grads in zip(("forward", "inverse"), both, strict=True):
        parts = dict(zip(("leaf ", "x", "context"), grads, strict=False))
        bad = [
            part + leaf
            for part, tree in parts.items()
            for leaf, grad in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
            if not np.isfinite(grad).all()
        ]
        count = len(jax.tree.leaves(grads))
        checks.append(
            Check(
                f"{name}: gradients are finite",
                not bad,
                f"not with respect to {', '.join(bad)}" if bad else f"{count} arrays",
            )
        )
    return checks


@jit(once=True)
def _as_numpyro_does(bound: FlowTransform, x: Array, y: Array) -> dict[str, Array]:
    called, intermediates = bound.call_with_intermediates(x)
    base = Normal(jnp.zeros_like(x), jnp.ones_like(x)).to_event(len(bound.event_shape))
    stock = TransformedDistribution(base, bound, validate_args=False)
    return {
        "T(x)": bound(x),
        "T.inv(y)": bound.inv(y),
        "called": called,
        "reused": bound.log_abs_det_jacobian(x, y, intermediates),
        "log_abs_det": bound.log_abs_det_jacobian(x, y),
        "inverse log_abs_det": bound.inv.log_abs_det_jacobian(y, x),
        "stock": stock.log_prob(y),
        "flow": FlowDistribution(base, bound, validate_args=False).log_prob(y),
    }


def _protocol(transform, x, context, tolerance) -> list[Check]:
    bound = transform if context is None else Conditioned(transform, context)
    y, log_det, *_ = _round_trip(transform, x, context)
    got = _as_numpyro_does(bound if _has_a_protocol_of_its_own(bound) else _Traced(bound), x, y)
    leaves, structure = jax.tree.flatten(bound)
    copy = jax.tree.unflatten(structure, leaves)
    inside = np.asarray(bound.codomain(y))
    name = "log_abs_det_jacobian"
    return [
        _close("T(x)", got["T(x)"], y, tolerance),
        _close("T.inv(y)", got["T.inv(y)"], x, tolerance),
        Check("T.inv.inv = T", bool(bound.inv.inv.eq(bound)), ""),
        _close("call_with_intermediates", got["called"], y, tolerance),
        _close(f"{name} with intermediates", got["reused"], log_det, 10 * tolerance),
        _close(name, got["log_abs_det"], log_det, 10 * tolerance),
        _close(f"{name} of the inverse", got["inverse log_abs_det"], -log_det, 10 * tolerance),
        _same("forward_shape", bound.forward_shape(x.shape), y.shape),
        _same("inverse_shape", bound.inverse_shape(y.shape), x.shape),
        _same("event dim of domain", bound.domain.event_dim, len(transform.event_shape)),
        _same("event dim of codomain", bound.codomain.event_dim, len(transform.out_shape)),
        _same("rows of y in the codomain", int(inside.sum()), inside.size),
        _close("FlowDistribution.log_prob = NumPyro's", got["flow"], got["stock"], 10 * tolerance),
        Check("pytree round trip", bool(bound.eq(copy)), f"{len(leaves)} leaves"),
    ]


def _refusals(transform, x, context, tolerance) -> list[Check]:
    def refuses(name: str, call: Callable[[], Any]) -> Check:
        try:
            call()
        except (ValueError, TypeError) as error:
            return Check(f"refuses {name}", True, type(error).__name__)
        return Check(f"refuses {name}", False, "accepted")

    y, *_ = _round_trip(transform, x, context)
    checks = [
        refuses(
            "a wrong event shape",
            lambda: transform.forward_and_log_det(jnp.concatenate([x, x], axis=-1), context),
        ),
        refuses(
            "a wrong event shape of the inverse",
            lambda: transform.inverse_and_log_det(jnp.concatenate([y, y], axis=-1), context),
        ),
        refuses("integers", lambda: transform.forward_and_log_det(x.astype(int), context)),
    ]
    if context is None:
        surplus = jnp.ones((len(x), 1), x.dtype)
        checks.append(
            refuses("a surplus context", lambda: transform.forward_and_log_det(x, surplus))
        )
    else:
        wide = jax.tree.map(lambda a: jnp.concatenate([a, a], axis=-1), context)
        checks += [
            refuses("a missing context", lambda: transform.forward_and_log_det(x)),
            refuses("a context of wrong width", lambda: transform.forward_and_log_det(x, wide)),
        ]
    return checks
