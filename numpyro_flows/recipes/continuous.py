"""Continuous flows, alone and augmented by coordinates beside the data."""

from collections.abc import Callable, Sequence
from typing import Unpack

import jax
from jax import Array
from numpyro.distributions import Distribution, constraints

from ..augmented import AugmentedFlow
from ..checks import check_key, check_size, is_real
from ..distribution import FlowDistribution
from ..nn import ConcatSquash
from ..transforms import Continuous
from ._building import check_no_angles, each_coordinate, flow_on
from ._options import ContinuousOptions, Support, in_guides, preset
from .coupling import conditional_gaussian


@in_guides(trace="exact", throw=False)
def cnf(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    field: Callable[..., Array] | None = None,
    trace: str | None = None,
    noise: str = "rademacher",
    num_probes: int = 1,
    solver: str = "Tsit5",
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
) -> FlowDistribution:
    r"""Continuous normalizing flow: :math:`dz/dt = f(t, z)` from base to data; ``Continuous``.

    .. math:: \log p(x) = \log p_Z(z(0)) - \int_0^T \operatorname{tr} \partial f / \partial z \, dt

    With ``trace="hutchinson"`` (the default above 16 coordinates) ``log_prob`` is an estimate, not
    a normalised density; ``flow.transform.with_trace("exact")`` gives the transform of one.

    :param key: ``jax.random.key`` for the initial weights and the probes.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default.
    :param hidden: widths of the hidden layers of the field, ``numpyro_flows.nn.ConcatSquash``.
    :param activation: name of a smooth one of ``numpyro_flows.nn.ACTIVATIONS``.
    :param field: a field of your own in place of the network, ``(t, z, context) -> dz/dt`` for one
        row.
    :param trace: ``"exact"``, ``"hutchinson"``, or None for exact up to 16 coordinates.
    :param noise: distribution of the probes, ``"rademacher"`` or ``"gaussian"``.
    :param num_probes: number of probes.
    :param solver: name of an explicit Runge-Kutta method of diffrax.
    :param rtol: relative tolerance.
    :param atol: absolute tolerance, in units of the state.
    :param num_steps: number of equal steps in place of adaptive ones.
    :param max_steps: largest number of steps of a solve.
    :param adjoint: ``"checkpoint"``, ``"backsolve"`` or ``"direct"``.
    :param end_time: the end time T.
    :param per_row: whether each row chooses its own steps.
    :param kinetic_penalty: weight of :math:`\int |f|^2 dt` in training.
    :param jacobian_penalty: weight of :math:`\int \|\partial f / \partial z\|_F^2 dt` in training.
    :param steer: half width of the random end time in training.
    :param throw: whether a failed solve raises; if not, its log density is -inf.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for numbers outside their range, unknown names, a field of another shape,
        or angles.

    Cost, sources and limits: see ``Continuous``.

    >>> import jax, jax.numpy as jnp
    >>> flow = cnf(jax.random.key(0), 2, hidden=(16,))
    >>> flow.log_prob(jnp.zeros((4, 2))).shape
    (4,)
    """
    check_size("dim", dim)
    constraint = check_no_angles("Continuous", support, dim)
    field_key, probe_key = jax.random.split(check_key(key))
    if field is None:
        field = ConcatSquash(
            field_key, dim, hidden=hidden, context_size=context_dim, activation=activation
        )
    transform = Continuous(
        probe_key,
        dim,
        field,
        context_dim=context_dim,
        trace=trace,
        noise=noise,
        num_probes=num_probes,
        solver=solver,
        rtol=rtol,
        atol=atol,
        num_steps=num_steps,
        max_steps=max_steps,
        adjoint=adjoint,
        end_time=end_time,
        per_row=per_row,
        kinetic_penalty=kinetic_penalty,
        jacobian_penalty=jacobian_penalty,
        steer=steer,
        throw=throw,
    )
    return flow_on(constraint, transform, base)


@preset(cnf)
def augmented_cnf(
    key: Array,
    dim: int,
    *,
    augment_dim: int = 1,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    num_samples: int = 16,
    encoder: Callable[..., FlowDistribution] = conditional_gaussian,
    **options: Unpack[ContinuousOptions],
) -> AugmentedFlow:
    r"""Augmented continuous flow: ``cnf`` over the data and ``augment_dim`` more coordinates.

    Paths that would have to cross, or holes that would have to open, in ``dim`` coordinates pass
    each other in more. ``log_prob`` is the lower bound of ``AugmentedFlow``, which has the
    mathematics, cost, limits and sources; ``flow.joint`` is the ``cnf`` over both.

    :param key: ``jax.random.key`` for the initial weights, probes and noise.
    :param dim: number of coordinates of the data; events have shape ``(dim,)``.
    :param augment_dim: number of coordinates beside them.
    :param support: a constraint that holds for each coordinate, or a tuple of one per coordinate.
    :param base: distribution of the base of all ``dim + augment_dim`` coordinates; standard normal
        by default.
    :param num_samples: number of draws of the bound.
    :param encoder: recipe of q(e | x), ``key, augment_dim, context_dim=... -> FlowDistribution``
        with an exact density; its context is x mapped to the real numbers, then the context.
    :param trace: ``"exact"``, ``"hutchinson"``, or None for exact up to 16 coordinates, those
        beside the data included.
    :return: an ``AugmentedFlow``.
    :raises TypeError: for a key that is not one, sizes that are no integers, an argument that is
        none of these, or an encoder that returns no ``FlowDistribution``.
    :raises ValueError: for numbers outside their range, unknown names, a field of another shape,
        angles, or a support that is not one of each coordinate.

    >>> import jax, jax.numpy as jnp
    >>> flow = augmented_cnf(jax.random.key(0), 2, augment_dim=1, hidden=(16,))
    >>> flow.log_prob(jnp.zeros((4, 2))).shape, flow.joint.event_shape
    ((4,), (3,))
    """
    check_size("dim", dim)
    check_size("augment_dim", augment_dim)
    joint_key, encoder_key, noise_key = jax.random.split(check_key(key), 3)
    constraint = check_no_angles("Continuous", support, dim)
    return AugmentedFlow(
        noise_key,
        cnf(joint_key, dim + augment_dim, context_dim=context_dim, **options),
        encoder(encoder_key, augment_dim, context_dim=dim + context_dim),
        num_samples=num_samples,
        support=None if is_real(constraint) else each_coordinate(constraint, dim),
    )
