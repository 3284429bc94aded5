"""Flows of layers that are the identity plus something: planar, radial, Sylvester, block neural."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Unpack

from jax import Array
from numpyro.distributions import Distribution, constraints

from ..checks import check_size
from ..distribution import FlowDistribution
from ..transform import FlowTransform, Inverse
from ..transforms import BlockAutoregressive, Planar, Radial, Ridge, Sylvester
from ._building import check_no_angles, flow_on, permutations, stack
from ._options import ResidualOptions, Support, in_guides, preset


@in_guides(inverse=False)
def residual_flow(
    key: Array,
    dim: int,
    layer: Callable[..., FlowTransform],
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    permutation_seed: int = 0,
    depth: int = 8,
    hidden: Sequence[int] = (64, 64),
    permutation: str | Sequence[int] | None = None,
    inverse: bool = True,
) -> FlowDistribution:
    r"""Layers :math:`y = x + g(x)`, in either direction: ``planar``, ``radial``, ``bnaf`` and more.

    The layers are those whose inverse, or whose determinant, is cheap although no coordinate
    passes unchanged. Cost: ``depth`` times that of a layer.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param layer: the layer, ``(key, dim, context_dim=..., hidden=...) -> FlowTransform``, such as
        ``nf.transforms.Radial``.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default.
    :param permutation_seed: seed of the permutations between layers.
    :param depth: number of layers.
    :param hidden: widths of the network that reads the context.
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, ``"random"`` (a
        swap within each pair of layers, a random permutation between the pairs), a permutation
        of ``range(dim)``, or None where layers treat all coordinates alike.
    :param inverse: True for a parallel ``log_prob``, False for parallel sampling.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names, or angles.

    Source: Papamakarios, Nalisnick, Rezende, Mohamed & Lakshminarayanan (2021), arXiv:1912.02762,
    section 3.3.

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_flows.transforms import Radial
    >>> residual_flow(jax.random.key(0), 3, Radial).log_prob(jnp.zeros((4, 3))).shape
    (4,)
    """
    check_size("dim", dim)
    check_size("depth", depth)
    between = None
    if permutation is not None:
        between = permutations(permutation, dim, depth, permutation_seed)
    build = partial(layer, context_dim=context_dim, hidden=hidden)
    layers = stack(build, key, dim, depth, between)
    constraint = check_no_angles(type(layers.layers).__name__, support, dim)
    return flow_on(constraint, Inverse(layers) if inverse else layers, base)


@preset(residual_flow)
def planar(
    key: Array,
    dim: int,
    *,
    depth: int = 16,
    activation: str | Ridge = "tanh",
    **options: Unpack[ResidualOptions],
) -> FlowDistribution:
    r"""Planar flow: :math:`y = x + \hat u \, h(w \cdot x + b)`, one ridge per layer.

    The fast direction costs O(depth dim); the other one scalar equation per layer and row, solved
    to rounding error with implicit gradients.

    :param activation: h: a name of ``numpyro_flows.transforms.planar.RIDGES`` or a ``Ridge``.
    :raises TypeError: for a key that is not one, sizes that are no integers, or an argument that
        is none of these.
    :raises ValueError: for sizes below 1, unknown names, angles, or an activation that breaks
        the constraint.

    Source: Rezende & Mohamed (2015), arXiv:1505.05770.

    >>> import jax, jax.numpy as jnp
    >>> planar(jax.random.key(0), 2).log_prob(jnp.zeros((4, 2))).shape
    (4,)
    """
    return residual_flow(key, dim, partial(Planar, activation=activation), depth=depth, **options)


@preset(residual_flow)
def radial(
    key: Array, dim: int, *, depth: int = 16, **options: Unpack[ResidualOptions]
) -> FlowDistribution:
    r"""Radial flow: :math:`y = x + \beta (x - x_0) / (\alpha + |x - x_0|)`, one centre per layer.

    Both directions cost O(depth dim), with the inverse in closed form.

    :param inverse: True if the formula above goes from data to base, False for the other way.
    :raises TypeError: for a key that is not one, sizes that are no integers, or an argument that
        is none of these.
    :raises ValueError: for sizes below 1, or angles.

    Source: Rezende & Mohamed (2015), arXiv:1505.05770, eq. 14.

    >>> import jax, jax.numpy as jnp
    >>> radial(jax.random.key(0), 2).log_prob(jnp.zeros((4, 2))).shape
    (4,)
    """
    return residual_flow(key, dim, Radial, depth=depth, **options)


@preset(residual_flow)
def sylvester(
    key: Array,
    dim: int,
    *,
    depth: int = 8,
    num_ridges: int | None = None,
    activation: str | Ridge = "tanh",
    **options: Unpack[ResidualOptions],
) -> FlowDistribution:
    r"""Sylvester flow: :math:`y = x + Q R \, h(\tilde R Q^\top x + b)`, several ridges per layer.

    The fast direction costs O(depth dim num_ridges); the other ``num_ridges`` scalar equations per
    layer and row, solved to rounding error with implicit gradients.

    :param num_ridges: ridges per layer, at most ``dim``; by default ``min(dim, 8)``.
    :param activation: h: a name of ``numpyro_flows.transforms.planar.RIDGES`` or a ``Ridge``.
    :raises TypeError: for a key that is not one, sizes that are no integers, or an argument that
        is none of these.
    :raises ValueError: for sizes below 1, unknown names, angles, or an activation that breaks
        the constraint.

    Source: van den Berg, Hasenclever, Tomczak & Welling (2018), arXiv:1803.05649.

    >>> import jax, jax.numpy as jnp
    >>> sylvester(jax.random.key(0), 2).log_prob(jnp.zeros((4, 2))).shape
    (4,)
    """
    layer = partial(Sylvester, num_ridges=num_ridges, activation=activation)
    return residual_flow(key, dim, layer, depth=depth, **options)


@preset(residual_flow)
def bnaf(
    key: Array,
    dim: int,
    *,
    permutation_seed: int = 0,
    depth: int = 1,
    hidden_factors: Sequence[int] = (8, 8),
    permutation: str | Sequence[int] = "reverse",
    **options: Unpack[ResidualOptions],
) -> FlowDistribution:
    r"""Block neural autoregressive flow, bijective on all of the real vectors.

    The fast direction costs ``depth`` passes of networks with ``hidden_factors`` units per
    coordinate; the other one about the same arithmetic in ``dim`` steps, each with a scalar
    equation solved to rounding error. ``log_prob`` works at any point in both.

    :param depth: number of blocks.
    :param hidden_factors: units per coordinate in each hidden layer of a block.
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, ``"random"`` (a
        swap within each pair of layers, a random permutation between the pairs), or a permutation
        of ``range(dim)``.
    :raises TypeError: for a key that is not one, sizes that are no integers, or an argument that
        is none of these.
    :raises ValueError: for sizes below 1, unknown names, or angles.

    Source: De Cao, Titov & Aziz (2019), arXiv:1904.04676.

    >>> import jax, jax.numpy as jnp
    >>> flow = bnaf(jax.random.key(0), 3)
    >>> flow.log_prob(flow.sample(jax.random.key(1), (4,))).shape
    (4,)
    """
    return residual_flow(
        key,
        dim,
        partial(BlockAutoregressive, hidden_factors=hidden_factors),
        permutation_seed=permutation_seed,
        depth=depth,
        permutation=permutation,
        **options,
    )
