"""The continuous flow: an ordinary differential equation carries base draws to data."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import check_key, check_size
from ..parts import Fixed
from ..transform import ColumnTransform

if TYPE_CHECKING:
    import diffrax

# Diffrax takes as long to import as everything else here, and only this file's solves need it.
_ADJOINTS: Final = {
    "checkpoint": "RecursiveCheckpointAdjoint",
    "backsolve": "BacksolveAdjoint",
    "direct": "DirectAdjoint",
}
_NOISES: Final[dict[str, Callable[..., Array]]] = {
    "rademacher": jax.random.rademacher,
    "gaussian": jax.random.normal,
}
_FAILED: Final = (
    "Continuous: the equation was not solved: it needed more than `max_steps`, or met values that "
    "are not finite. Raise `max_steps`, `rtol` and `atol`, look for extreme values in the input, "
    "or pass `throw=False` for a log density of -inf."
)
# Length of the first step, as a share of T; the controller takes over from there.
_FIRST_STEP: Final = 0.1


class _Callable(eqx.Module):
    """Any callable as a pytree of floating arrays; what else it holds is static."""

    arrays: Any
    rest: Any = eqx.field(static=True)

    def __init__(self, function: Callable[..., Array]):
        self.arrays, rest = eqx.partition(function, eqx.is_inexact_array)
        leaves, structure = jax.tree.flatten(rest)
        self.rest = (tuple(leaves), structure)

    def __call__(self, t: Array, z: Array, context: Array | None) -> Array:
        leaves, structure = self.rest
        return eqx.combine(self.arrays, jax.tree.unflatten(structure, leaves))(t, z, context)


class Continuous(ColumnTransform):
    r"""The flow of a vector field: :math:`y = z(T)`, :math:`dz/dt = f(t, z)`, :math:`z(0) = x`.

    .. math:: \log |\det \partial y / \partial x|
              = \int_0^T \operatorname{tr} \frac{\partial f}{\partial z}(t, z(t)) \, dt

    State and log-determinant are one equation, solved once in either direction. The field is free:
    no restriction on its Jacobian. A batch is one state with common steps, so a row's value
    depends on its batch to the tolerance; ``per_row`` solves each row by itself, at several times
    the cost.

    **The trace.** ``"exact"`` takes ``dim`` derivatives of the field at each evaluation.
    ``"hutchinson"`` takes ``num_probes`` and estimates :math:`\operatorname{tr} J` by the mean of
    :math:`\epsilon^\top J \epsilon`, with :math:`\epsilon` held by the transform, the same for
    every row and over the solve: deterministic and unbiased over probes, but an estimate and not a
    log-determinant. What needs a density (guides, neural transport, importance weights) refuses it;
    ``with_trace("exact")`` turns a trained flow into an exact one.

    **Training.** ``nf.fit`` draws new probes for each row in each step, and adds the penalties
    :math:`\lambda_K \int |f|^2 dt + \lambda_J \int \|\partial f / \partial z\|_F^2 dt`, whose
    minimisers are paths that are straight and quick to solve; the second integral uses what the
    trace has computed. With ``steer`` b the end time of each step is uniform on
    :math:`T \pm b`. Neither touches the transform itself. ``nf.fit_guide`` adds the penalties too,
    at the cost of one more solve per step unless both are 0, and has no random end times.

    Cost: one evaluation of the field and its derivatives per stage of the solver, read by
    ``statistics``. The inverse is that of the exact equation: forward and back agree to the
    tolerance of the solver, about 1e-5 per unit of the state at the default. Gradients are of
    reverse mode, except with the adjoint ``"direct"``, which has both.

    Sources: Chen et al. (2018), arXiv:1806.07366, eq. 8; Grathwohl et al. (2019),
    arXiv:1810.01367, eq. 7 (the estimate of the trace); Finlay et al. (2020), arXiv:2002.02798,
    eq. 8 (the penalties); Ghosh et al. (2020), arXiv:2006.10711, eq. 9 (the random end time).

    :param key: ``jax.random.key`` for the probes.
    :param dim: number of coordinates; x and y have shape ``(*batch, dim)``.
    :param field: ``(t, z, context) -> dz/dt`` for one row: ``t`` a scalar, ``z`` of shape
        ``(dim,)``, ``context`` ``(context_dim,)`` or None. An Equinox module trains; so do the
        floating arrays of any other pytree.
    :param context_dim: width of the context, 0 for none.
    :param trace: ``"exact"``, ``"hutchinson"``, or None for exact up to 16 coordinates.
    :param noise: of the probes, ``"rademacher"`` (of the smaller variance) or ``"gaussian"``.
    :param num_probes: how many of them.
    :param solver: name of an explicit Runge-Kutta method of diffrax, or an instance of one.
    :param rtol: relative tolerance of the adaptive steps.
    :param atol: absolute tolerance of the adaptive steps, in units of the state.
    :param num_steps: number of equal steps in place of adaptive ones.
    :param max_steps: most steps, rejected ones included.
    :param adjoint: how gradients pass the solve: ``"checkpoint"`` (differentiates the steps, memory
        grows with the logarithm of their number), ``"backsolve"`` (solves backwards, constant
        memory, gradients to the tolerance) or ``"direct"`` (stores every step, forward mode too).
    :param end_time: T.
    :param per_row: whether each row chooses its own steps.
    :param kinetic_penalty: :math:`\lambda_K`.
    :param jacobian_penalty: :math:`\lambda_J`.
    :param steer: b, below T.
    :param throw: whether a solve that fails raises; if not, its values are NaN and its
        log-determinants (thus log densities) -inf.
    :raises TypeError: for a field that cannot be called, or sizes that are no integers.
    :raises ValueError: for a field whose result is not of its input's shape, unknown names, or
        numbers outside their range.
    :raises RuntimeError: when called, if a solve needs more than ``max_steps``.

    >>> import jax, jax.numpy as jnp
    >>> rotation = Continuous(jax.random.key(0), 2, lambda t, z, context: jnp.array([-z[1], z[0]]))
    >>> y, log_det = rotation.forward_and_log_det(jnp.array([1.0, 0.0]))
    >>> bool(jnp.allclose(y, jnp.array([jnp.cos(1.0), jnp.sin(1.0)]), atol=1e-4)), float(log_det)
    (True, 0.0)
    """

    field: Any
    probes: Fixed
    trace: str = eqx.field(static=True)
    noise: str = eqx.field(static=True)
    solver: str = eqx.field(static=True)
    rtol: float = eqx.field(static=True)
    atol: float = eqx.field(static=True)
    num_steps: int | None = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    adjoint: str = eqx.field(static=True)
    end_time: float = eqx.field(static=True)
    per_row: bool = eqx.field(static=True)
    kinetic_penalty: float = eqx.field(static=True)
    jacobian_penalty: float = eqx.field(static=True)
    steer: float = eqx.field(static=True)
    throw: bool = eqx.field(static=True)
    # What `for_training` adds: a shift of the end time, and the penalties in the log-determinant.
    shift: Fixed | None

    def __init__(
        self,
        key: Array,
        dim: int,
        field: Callable[..., Array],
        *,
        context_dim: int = 0,
        trace: str | None = None,
        noise: str = "rademacher",
        num_probes: int = 1,
        solver: "str | diffrax.AbstractERK" = "Tsit5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        num_steps: int | None = None,
        max_steps: int = 4096,
        adjoint: str = "checkpoint",
        end_time: float = 1.0,
        per_row: bool = False,
        kinetic_penalty: float = 0.01,
        jacobian_penalty: float = 0.01,
        steer: float = 0.0,
        throw: bool = True,
    ):
        self._set_sizes(dim, context_dim)
        self.trace = ("exact" if dim <= 16 else "hutchinson") if trace is None else trace
        _check_name("trace", self.trace, ("exact", "hutchinson"))
        self.noise = _check_name("noise", noise, _NOISES)
        self.adjoint = _check_name("adjoint", adjoint, _ADJOINTS)
        self.solver = _solver_name(solver)
        self.rtol, self.atol = _check_positive("rtol", rtol), _check_positive("atol", atol)
        self.end_time = _check_positive("end_time", end_time)
        self.num_steps = None if num_steps is None else check_size("num_steps", num_steps)
        self.max_steps = check_size("max_steps", max_steps)
        self.kinetic_penalty = _check_positive("kinetic_penalty", kinetic_penalty, or_zero=True)
        self.jacobian_penalty = _check_positive("jacobian_penalty", jacobian_penalty, or_zero=True)
        self.steer = _check_positive("steer", steer, or_zero=True)
        if not self.steer < self.end_time:
            raise ValueError(f"steer: expected less than end_time={end_time}, got {steer}.")
        self.per_row, self.throw = per_row, throw
        self.field = _as_module(field)
        self._check_field()
        self.probes = Fixed(self._draw(key, (check_size("num_probes", num_probes), dim)))
        self.shift = None

    @property
    def inexact(self) -> str:
        """What the log-determinant is, if not exact."""
        return "" if self.trace == "exact" else "estimate"

    def _inside(self) -> str:
        return f"trace={self.trace!r}, solver={self.solver!r}"

    def _check_field(self) -> None:
        z, context = jnp.zeros(self.dim), jnp.zeros(self.context_dim) if self.context_dim else None
        out = jax.eval_shape(self.field, jnp.zeros(()), z, context)
        if getattr(out, "shape", None) != z.shape:
            got = getattr(out, "shape", type(out).__name__)
            raise ValueError(
                f"field: expected a result of the shape of z, {z.shape}, got {got}. It is called "
                "with one row: (t, z, context) -> dz/dt."
            )

    def _draw(self, key: Array, shape: tuple[int, ...]) -> Array:
        return _NOISES[self.noise](check_key(key), shape, jnp.result_type(float))

    def with_trace(self, trace: str) -> "Continuous":
        """The same flow with the trace ``"exact"`` or ``"hutchinson"``."""
        _check_name("trace", trace, ("exact", "hutchinson"))
        return self._replaced(trace=trace)

    def with_probe(self, key: Array) -> "Continuous":
        """The same flow with other probes."""
        return self._replaced(probes=Fixed(self._draw(key, self.probes.value.shape)))

    def for_training(self, key: Array | None, rows: int) -> "Continuous":
        """What a step of training uses in place of this transform, for a batch of ``rows``.

        Probes of its own for each row, the end time shifted, and a log-determinant from which the
        penalties are subtracted. A loss contains minus the log-determinant of the map that it
        applies, in whichever direction, and so gains the penalties. A failed solve gives a loss of
        infinity rather than an error, and the step can be skipped; that alone without a key, as
        for validation.
        """
        if key is None:
            return self._replaced(throw=False)
        probe_key, time_key = jax.random.split(key)
        shift = self.steer * jax.random.uniform(time_key, (), minval=-1.0)
        probes = self._draw(probe_key, (*self.probes.value.shape, rows))
        return self._replaced(probes=Fixed(probes), shift=Fixed(shift), throw=False)

    def penalized(self) -> "Continuous":
        """The same flow with its penalties subtracted from the log-determinant."""
        return self._replaced(shift=Fixed(jnp.zeros(())))

    def _replaced(self, **changes: Any) -> "Continuous":
        new = object.__new__(type(self))
        for name, value in (vars(self) | changes).items():
            object.__setattr__(new, name, value)
        return new

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return _solve(self, x, context, forward=True)[:2]

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return _solve(self, y, context, forward=False)[:2]

    def velocity(self, t: Array, z: Array, context: Array | None = None) -> Array:
        """The vector field, for any batch.

        :param t: times in [0, T], of shape ``()`` or ``batch``.
        :param z: shape ``(*batch, dim)``.
        :param context: shape ``(*batch, context_dim)`` or ``(context_dim,)``.
        :return: shape ``(*batch, dim)``.
        """
        batch = z.shape[:-1]
        context = self.read_context(context)
        field = jax.vmap(self.field, in_axes=(0, 0, None if context is None else 0))
        rows = jnp.broadcast_to(t, batch).reshape(-1), z.reshape(-1, self.dim)
        if context is not None:
            shape = (*batch, self.context_dim)
            context = jnp.broadcast_to(context, shape).reshape(-1, self.context_dim)
        return field(*rows, context).reshape(z.shape)

    def trajectories(self, x: Array, times: Array, context: Array | None = None) -> Array:
        """Where points of the base are on their way to the data.

        :param x: positions at time 0, of shape ``(*batch, dim)``.
        :param times: increasing, in [0, T], shape ``(n,)``.
        :param context: as for ``velocity``.
        :return: positions, of shape ``(n, *batch, dim)``; at T those of the transform.
        """
        return _trajectories(self, x, times, context)

    def statistics(
        self, value: Array, context: Array | None = None, *, inverse: bool = True
    ) -> dict[str, Array]:
        """What a solve costs: its steps and its evaluations of the field.

        :param value: shape ``(*batch, dim)``: data if ``inverse``, else base draws.
        :param context: as for the transform.
        :param inverse: direction of the solve, True for that of the density.
        :return: ``num_evaluations``, ``num_steps``, ``num_accepted_steps``,
            ``num_rejected_steps``: integers, or of shape ``(rows,)`` if each row has its steps.
            If the first step is rejected, its first evaluation is repeated; it counts once.
        """
        import diffrax

        value = jnp.asarray(value).reshape(-1, self.dim).T
        context = self.read_context(context)
        if context is not None:
            context = context.reshape(-1, self.context_dim).T
        stats = _solve(self, value, context, forward=not inverse)[2]
        tableau = getattr(diffrax, self.solver).tableau
        per_step = tableau.num_stages - tableau.fsal
        counts = {
            name: stats[name] for name in ("num_steps", "num_accepted_steps", "num_rejected_steps")
        }
        # The last evaluation of a step is the first of the next, and the solver keeps that of a
        # step that was rejected; how often it rejected the very first step, it does not say.
        return {"num_evaluations": per_step * stats["num_steps"] + tableau.fsal, **counts}


# Compiled as one: diffrax compiles each solve of a field it has not seen, and every call makes one.
@eqx.filter_jit
def _solve(
    flow: Continuous, value: Array, context: Array | None, forward: bool
) -> tuple[Array, Array, dict[str, Array]]:
    import diffrax

    shared = context is None or context.shape[1] == 1
    probes = jnp.eye(flow.dim) if flow.trace == "exact" else flow.probes.value
    each = probes.ndim == 3
    field = jax.vmap(
        _with_derivatives,
        in_axes=(None, None, 1, None if shared else 1, 2 if each else None),
        out_axes=(1, 0, 0),
    )
    share = 1.0 if flow.trace == "exact" else 1 / len(flow.probes.value)
    # The penalties are subtracted whichever way time runs.
    sign = 1.0 if forward else -1.0

    def derivative(t: Any, state: Any, args: Any) -> tuple[Array, Array]:
        module, context, probes = args
        f, trace, square = field(module, t, state[0], context, probes)
        rate = share * trace
        if flow.shift is not None:  # in training
            penalty = flow.kinetic_penalty * (f * f).sum(0) + flow.jacobian_penalty * share * square
            rate = rate - sign * penalty
        return f, rate

    end = jnp.asarray(flow.end_time, value.dtype)
    if flow.shift is not None:
        end = end + flow.shift.value
    start, stop = (jnp.zeros_like(end), end) if forward else (end, jnp.zeros_like(end))
    controller: Any
    if flow.num_steps is None:
        controller = diffrax.PIDController(rtol=flow.rtol, atol=flow.atol)
        first = _FIRST_STEP * (stop - start)
    else:
        controller = diffrax.StepTo(jnp.linspace(start, stop, flow.num_steps + 1))
        first = None

    def solve(value: Array, context: Array | None, probes: Array) -> tuple[Array, Array, Any]:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(derivative),
            getattr(diffrax, flow.solver)(),
            start,
            stop,
            first,
            (value, jnp.zeros_like(value[0])),
            (flow.field, context, probes),
            stepsize_controller=controller,
            adjoint=getattr(diffrax, _ADJOINTS[flow.adjoint])(),
            max_steps=flow.max_steps if flow.num_steps is None else flow.num_steps,
            throw=False,
        )
        result, log_det = (leaf[0] for leaf in solution.ys)
        finite = jnp.isfinite(result).all(0) & jnp.isfinite(log_det)
        ok = finite & (solution.result == diffrax.RESULTS.successful)
        if flow.throw:
            result, log_det = eqx.error_if((result, log_det), ~ok, _FAILED)
        else:
            result, log_det = jnp.where(ok, result, jnp.nan), jnp.where(ok, log_det, -jnp.inf)
        return result, log_det, solution.stats

    if context is not None and shared:
        context = context[:, 0]
    if not flow.per_row:
        return solve(value, context, probes)

    def one(value: Array, context: Array | None, probes: Array) -> Any:
        context = context if shared or context is None else context[:, None]
        probes = probes[..., None] if each else probes
        result, log_det, stats = solve(value[:, None], context, probes)
        return result[:, 0], log_det[0], stats

    axes = (1, None if shared else 1, 2 if each else None)
    return jax.vmap(one, in_axes=axes, out_axes=(1, 0, 0))(value, context, probes)


@eqx.filter_jit
def _trajectories(flow: Continuous, x: Array, times: Array, context: Array | None) -> Array:
    import diffrax

    def derivative(t: Any, z: Any, args: Any) -> Array:
        return flow.velocity(t, z, context)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(derivative),
        getattr(diffrax, flow.solver)(),
        0.0,
        flow.end_time,
        _FIRST_STEP * flow.end_time,
        x,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=flow.rtol, atol=flow.atol),
        max_steps=flow.max_steps,
    )
    return solution.ys


def _with_derivatives(
    field: Any, t: Array, z: Array, context: Array | None, probes: Array
) -> tuple[Array, Array, Array]:
    """The field at one row, and sums over the probes e of ``e . J e`` and of ``|J e|^2``."""

    def along(probe: Array) -> tuple[Array, Array]:
        return jax.jvp(lambda z: field(t, z, context), (z,), (probe,))

    f, products = jax.vmap(along, out_axes=(None, 0))(probes.astype(z.dtype))
    return f, (probes * products).sum(), (products * products).sum()


def penalized(tree: Any) -> Any:
    """A flow or transform with its penalties in its log-determinants, None if it has none.

    :param tree: a flow or a transform.

    >>> import jax, numpyro_flows as nf
    >>> penalized(nf.realnvp(jax.random.key(0), 2)) is None
    True
    """

    def has_penalty(node: Any) -> bool:
        return isinstance(node, Continuous) and node.kinetic_penalty + node.jacobian_penalty > 0

    leaves, structure = jax.tree.flatten(tree, is_leaf=has_penalty)
    if not any(map(has_penalty, leaves)):
        return None
    leaves = [leaf.penalized() if has_penalty(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)


def _as_module(field: Any) -> Any:
    if not callable(field):
        raise TypeError(f"field: expected something to call, got {type(field).__name__}.")
    is_data = isinstance(field, eqx.Module) and all(
        map(eqx.is_inexact_array, jax.tree.leaves(field))
    )
    return field if is_data else _Callable(field)


def _solver_name(solver: Any) -> str:
    import diffrax

    name = solver if isinstance(solver, str) else type(solver).__name__
    cls = getattr(diffrax, name, None)
    known = (
        isinstance(cls, type)
        and issubclass(cls, diffrax.AbstractERK)
        and (isinstance(solver, str) or solver == cls())
    )
    if not known:
        raise ValueError(
            "solver: expected the name of an explicit Runge-Kutta method of diffrax, such as "
            f"'Tsit5', 'Dopri5' or 'Heun', got {solver!r}."
        )
    return name


def _check_name(what: str, name: str, names: Any) -> str:
    if name not in names:
        raise ValueError(f"{what}: expected one of {sorted(names)}, got {name!r}.")
    return name


def _check_positive(name: str, value: float, or_zero: bool = False) -> float:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not np.isfinite(value) or value < 0 or (value == 0 and not or_zero):
        least = "0 or a positive number" if or_zero else "a positive number"
        raise ValueError(f"{name}: expected {least}, got {value!r}.")
    return float(value)
