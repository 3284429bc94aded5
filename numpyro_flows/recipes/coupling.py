"""Flows of coupling layers: fast in both directions."""

from collections.abc import Sequence
from functools import partial
from typing import Final, Unpack

from jax import Array
from numpyro.distributions import Distribution, constraints

from ..checks import check_size
from ..coordinates import angles, discrete
from ..distribution import FlowDistribution
from ..elementwise import Angles, CircularSpline, ElementwiseMap, RationalQuadraticSpline, Shift
from ..transform import FlowTransform, Inverse
from ..transforms import Chain, Coupling, DiagonalScale, LULinear
from ._building import (
    bounded_affine,
    check_no_angles,
    check_support,
    each_coordinate,
    flow_on,
    map_for,
    permutations,
    stack,
)
from ._mixed import mixed_flow
from ._options import CouplingOptions, LayerOptions, Support, preset

#: Layers by default, on which the default bound of an affine map depends.
DEPTH: Final = 8


def coupling_flow(
    key: Array,
    dim: int,
    map: ElementwiseMap,
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    permutation_seed: int = 0,
    circular_map: ElementwiseMap | None = None,
    depth: int = DEPTH,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    residual: bool = False,
    permutation: str | Sequence[int] = "random",
    mixing: str = "none",
) -> FlowDistribution:
    r"""Coupling layers around any elementwise map: what ``nice``, ``realnvp`` and ``nsf`` are.

    Each layer is :math:`y_B = g(x_B; \theta(x_A))` with the first half A passing, followed by a
    permutation. Both directions cost ``depth`` passes of the network. With ``dim = 1`` the layers
    are elementwise.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param map: the elementwise map g.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate. Discrete
        ones get exact masses (:class:`~numpyro_flows.mixed.MixedFlow`) by a network of the same
        ``hidden``, before the layers, which are of the other coordinates.
    :param base: distribution of z; standard normal by default (uniform for angles).
    :param permutation_seed: seed of the permutations between layers.
    :param circular_map: the map for coordinates that are angles.
    :param depth: number of coupling layers; each changes half of the coordinates.
    :param hidden: widths of each conditioner's hidden layers.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``; a smooth one (``"tanh"``,
        ``"silu"``) gives a density with a smooth gradient, which suits HMC.
    :param residual: whether the hidden layers are residual blocks (of equal widths).
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, ``"random"`` (a
        swap within each pair of layers, a random permutation between the pairs), or a permutation
        of ``range(dim)``.
    :param mixing: ``"lu"`` puts an LU-decomposed linear layer before each coupling.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names, or angles without a circular map.

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_flows.elementwise import SinhArcsinh
    >>> flow = coupling_flow(jax.random.key(0), 3, SinhArcsinh(), activation="silu")
    >>> flow.log_prob(jnp.zeros((4, 3))).shape
    (4,)
    """
    check_size("dim", dim)
    constraint = check_support(support, dim)
    if any(discrete(constraint, dim)):
        build_rest = partial(
            coupling_flow,
            map=map,
            permutation_seed=permutation_seed,
            circular_map=circular_map,
            depth=depth,
            hidden=hidden,
            activation=activation,
            residual=residual,
            permutation=permutation,
            mixing=mixing,
        )
        return mixed_flow(
            key,
            each_coordinate(constraint, dim),
            build_rest,
            context_dim=context_dim,
            hidden=hidden,
            activation=activation,
            residual=residual,
            base=base,
        )
    flags = angles(constraint, dim)
    map = map_for(map, circular_map, flags)
    if mixing not in ("none", "lu"):
        raise ValueError(f"mixing: expected 'none' or 'lu', got {mixing!r}.")
    if mixing == "lu" and any(flags):
        raise ValueError("mixing: a linear layer would tear the circle; angles need 'none'.")

    def build(key: Array, dim: int, circular: Array | None = None) -> FlowTransform:
        layer = Coupling(
            key,
            dim,
            map,
            hidden=hidden,
            context_dim=context_dim,
            activation=activation,
            residual=residual,
            encoding=None if circular is None else Angles(circular),
        )
        # Inverted, the density has its matrix product and sampling its triangular solves.
        return Chain([Inverse(LULinear(dim)), layer]) if mixing == "lu" else layer

    between = permutations(permutation, dim, check_size("depth", depth), permutation_seed)
    return flow_on(constraint, stack(build, key, dim, depth, between, flags), base)


@preset(coupling_flow)
def nice(
    key: Array,
    dim: int,
    *,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    rescale: bool = True,
    **options: Unpack[LayerOptions],
) -> FlowDistribution:
    r"""NICE: additive couplings :math:`y_B = x_B + t(x_A)`, then a diagonal scaling.

    Without the scaling the flow preserves volume: its log-determinant is exactly 0.
    Both directions cost ``depth`` passes of the network.

    :param base: distribution of z; standard normal by default.
    :param rescale: whether the diagonal scaling ends the flow.
    :raises TypeError: for a key that is not one, sizes that are no integers, or an argument that
        is none of these.
    :raises ValueError: for sizes below 1, unknown names, or angles.

    Source: Dinh, Krueger & Bengio (2015), arXiv:1410.8516.

    >>> import jax, jax.numpy as jnp
    >>> nice(jax.random.key(0), 3, rescale=False).transform.forward_and_log_det(jnp.ones(3))[1]
    Array(0., dtype=float32)
    """
    transform = coupling_flow(key, dim, Shift(), **options).transform
    if rescale:
        transform = Chain([transform, DiagonalScale(dim)])
    return flow_on(check_no_angles("nice", support, dim), transform, base)


@preset(coupling_flow)
def realnvp(
    key: Array,
    dim: int,
    *,
    log_scale_bound: float | None = None,
    **options: Unpack[CouplingOptions],
) -> FlowDistribution:
    r"""RealNVP: affine couplings :math:`y_B = x_B \odot e^{s(x_A)} + t(x_A)`.

    The log-scale is :math:`s = c \tanh(h / c)`. By default :math:`c = \min(2, 16 / depth)`: the
    bound tightens with depth, which keeps deep float32 flows invertible. One layer stretches a
    coordinate by at most :math:`e^c`, also far outside the data, where densities may ask for more:
    raise ``log_scale_bound`` for a shallow flow of very uneven scales.
    Both directions cost ``depth`` passes of the network. With ``dim = 1`` the layers are
    elementwise.

    :param base: distribution of z; standard normal by default.
    :param log_scale_bound: the bound c.
    :raises TypeError: for a key that is not one, sizes that are no integers, or an argument that
        is none of these.
    :raises ValueError: for sizes below 1, unknown names, or angles.

    Source: Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803.

    >>> import jax, jax.numpy as jnp
    >>> flow = realnvp(jax.random.key(0), 3)
    >>> flow.log_prob(jnp.zeros((4, 3))).shape
    (4,)
    """
    map = bounded_affine(log_scale_bound, options.get("depth", DEPTH))
    return coupling_flow(key, dim, map, **options)


@preset(coupling_flow)
def nsf(
    key: Array,
    dim: int,
    *,
    num_bins: int = 8,
    bound: float = 4.0,
    **options: Unpack[CouplingOptions],
) -> FlowDistribution:
    r"""Neural spline flow: couplings whose maps are monotone rational-quadratic splines.

    Both directions cost ``depth`` passes of the network, and both are closed formulas. The density
    is continuous, its gradient has kinks at the knots: for HMC prefer a smooth map
    (``nf.coupling_flow`` with ``SinhArcsinh`` or ``DeepSigmoid``).

    With ``support=constraints.circular``, or a tuple of supports some of which are circular, the
    flow lives on a torus or on real coordinates and angles together: angles have circular splines
    and a rotation, so that the density is continuous across +-pi.

    :param num_bins: bins of each spline.
    :param bound: the splines act on [-bound, bound] and are the identity outside; on angles they
        act on the whole circle.
    :raises TypeError: for a key that is not one, sizes that are no integers, or an argument that
        is none of these.
    :raises ValueError: for sizes below 1, unknown names, or fewer than 2 bins.

    Source: Durkan, Bekasov, Murray & Papamakarios (2019), arXiv:1906.04032; on the circle
    Rezende et al. (2020), arXiv:2002.02428.

    >>> import jax, jax.numpy as jnp
    >>> from numpyro.distributions import constraints
    >>> flow = nsf(jax.random.key(0), 2, support=(constraints.circular, constraints.real))
    >>> flow.log_prob(jnp.array([[3.1, 7.0]])).shape
    (1,)
    """
    map, circular = RationalQuadraticSpline(num_bins, bound), CircularSpline(num_bins)
    return coupling_flow(key, dim, map, circular_map=circular, **options)


def conditional_gaussian(key: Array, dim: int, *, context_dim: int) -> FlowDistribution:
    """The default q(e | x) of an augmented flow.

    Two affine couplings with networks of two layers of 32 units: in one dimension a normal with
    location and scale of the context, in more one with a skewed dependence.

    :param key: ``jax.random.key``.
    :param dim: number of coordinates.
    :param context_dim: width of the context.

    Cost: two passes of a network in either direction.

    >>> import jax, jax.numpy as jnp
    >>> q = conditional_gaussian(jax.random.key(0), 2, context_dim=3)
    >>> q.condition(jnp.zeros((5, 3))).sample(jax.random.key(1)).shape
    (5, 2)
    """
    return realnvp(key, dim, context_dim=context_dim, depth=2, hidden=(32, 32), activation="silu")
