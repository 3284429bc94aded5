"""Flows of masked autoregressive layers: one direction fast, the other coordinate by coordinate."""

from collections.abc import Sequence
from functools import partial
from typing import Final, Unpack

from jax import Array
from numpyro.distributions import Distribution, constraints

from ..checks import check_size
from ..coordinates import angles, discrete
from ..distribution import FlowDistribution
from ..elementwise import Angles, CircularSpline, ElementwiseMap, RationalQuadraticSpline
from ..transform import FlowTransform, Inverse
from ..transforms import MaskedAutoregressive
from ..transforms.autoregressive import Graph
from ._building import (
    bounded_affine,
    check_support,
    each_coordinate,
    flow_on,
    map_for,
    permutations,
    stack,
)
from ._mixed import mixed_flow
from ._options import AutoregressiveOptions, Support, in_guides, preset

#: Layers by default, on which the default bound of an affine map depends.
DEPTH: Final = 5


@in_guides(inverse=False)
def autoregressive_flow(
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
    permutation: str | Sequence[int] = "reverse",
    parents: Graph | None = None,
    inverse: bool = True,
) -> FlowDistribution:
    r"""Masked autoregressive layers around any elementwise map: ``maf``, ``iaf``, ``nsf_ar``.

    Each layer is :math:`g(x_i; \theta_i(x_{<i}))`. The fast direction costs ``depth`` passes of the
    network, the other about as many operations but ``dim`` steps per layer.

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
    :param depth: number of layers.
    :param hidden: widths of each conditioner's hidden layers.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``; a smooth one (``"tanh"``,
        ``"silu"``) gives a density with a smooth gradient, which suits HMC.
    :param residual: whether the hidden layers are residual blocks (of equal widths).
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, ``"random"`` (a
        swap within each pair of layers, a random permutation between the pairs), or a permutation
        of ``range(dim)``.
    :param parents: for each coordinate those that it depends on (or a boolean mask whose row i
        marks them), an acyclic graph in place of the complete order; the layers are then not
        permuted.
    :param inverse: True for a parallel ``log_prob``, False for parallel sampling.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names, a graph with a cycle, or angles
        without a circular map.

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_flows.elementwise import DeepSigmoid
    >>> naf = autoregressive_flow(jax.random.key(0), 3, DeepSigmoid(num_units=4))
    >>> naf.log_prob(jnp.zeros((4, 3))).shape
    (4,)
    """
    check_size("dim", dim)
    constraint = check_support(support, dim)
    if any(discrete(constraint, dim)):
        if parents is not None:
            raise ValueError(
                "parents: expected the complete order for a support with discrete coordinates, "
                "which come first, each after those before it. Leave the graph out."
            )
        build_rest = partial(
            autoregressive_flow,
            map=map,
            permutation_seed=permutation_seed,
            circular_map=circular_map,
            depth=depth,
            hidden=hidden,
            activation=activation,
            residual=residual,
            permutation=permutation,
            inverse=inverse,
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

    def build(key: Array, dim: int, circular: Array | None = None) -> FlowTransform:
        return MaskedAutoregressive(
            key,
            dim,
            map,
            hidden=hidden,
            residual=residual,
            context_dim=context_dim,
            activation=activation,
            parents=parents,
            encoding=None if circular is None else Angles(circular),
        )

    check_size("depth", depth)
    between = permutations(permutation, dim, depth, permutation_seed) if parents is None else None
    layers = stack(build, key, dim, depth, between, flags)
    return flow_on(constraint, Inverse(layers) if inverse else layers, base)


@preset(autoregressive_flow)
def maf(
    key: Array,
    dim: int,
    *,
    log_scale_bound: float | None = None,
    **options: Unpack[AutoregressiveOptions],
) -> FlowDistribution:
    r"""MAF: affine autoregressive layers with a parallel density.

    From data to base a layer is :math:`z_i = x_i e^{s_i(x_{<i})} + t_i(x_{<i})`: ``log_prob`` costs
    ``depth`` passes of the network. Sampling goes coordinate by coordinate, computing each hidden
    unit once, about the arithmetic of one pass in ``dim`` steps.
    :math:`s = c \tanh(h / c)`; see ``realnvp``.

    :param base: distribution of z; standard normal by default.
    :param log_scale_bound: the bound c; by default min(2, 16 / depth).
    :raises TypeError: for a key that is not one, sizes that are no integers, or an argument that
        is none of these.
    :raises ValueError: for sizes below 1, unknown names, a graph with a cycle, or angles.

    Source: Papamakarios, Pavlakou & Murray (2017), arXiv:1705.07057.

    >>> import jax, jax.numpy as jnp
    >>> maf(jax.random.key(0), 3).sample(jax.random.key(1), (4,)).shape
    (4, 3)
    """
    map = bounded_affine(log_scale_bound, options.get("depth", DEPTH))
    return autoregressive_flow(key, dim, map, inverse=True, **options)


@preset(autoregressive_flow)
def iaf(
    key: Array,
    dim: int,
    *,
    log_scale_bound: float | None = None,
    **options: Unpack[AutoregressiveOptions],
) -> FlowDistribution:
    r"""IAF: affine autoregressive layers with parallel sampling.

    From base to data a layer is :math:`x_i = z_i e^{s_i(z_{<i})} + t_i(z_{<i})`: sampling, with the
    density of what was sampled, costs ``depth`` passes of the network; the right direction for
    guides. ``log_prob`` of other points goes coordinate by coordinate, with implicit gradients, so
    that it can be trained on data too.
    :math:`s = c \tanh(h / c)`; see ``realnvp``.

    :param base: distribution of z; standard normal by default.
    :param log_scale_bound: the bound c; by default min(2, 16 / depth).
    :raises TypeError: for a key that is not one, sizes that are no integers, or an argument that
        is none of these.
    :raises ValueError: for sizes below 1, unknown names, a graph with a cycle, or angles.

    Source: Kingma et al. (2016), arXiv:1606.04934.

    >>> import jax, jax.numpy as jnp
    >>> iaf(jax.random.key(0), 3).sample(jax.random.key(1), (4,)).shape
    (4, 3)
    """
    map = bounded_affine(log_scale_bound, options.get("depth", DEPTH))
    return autoregressive_flow(key, dim, map, inverse=False, **options)


@preset(autoregressive_flow)
def nsf_ar(
    key: Array,
    dim: int,
    *,
    num_bins: int = 8,
    bound: float = 4.0,
    inverse: bool = True,
    **options: Unpack[AutoregressiveOptions],
) -> FlowDistribution:
    r"""Autoregressive neural spline flow: the spline of a coordinate depends on all before it.

    More flexible per layer than ``nsf``, with one slow direction: the fast one costs ``depth``
    passes of the network, the other about as many operations in ``dim`` steps per layer. Angles are
    handled as in ``nsf``.

    :param num_bins: bins of each spline.
    :param bound: the splines act on [-bound, bound] and are the identity outside; on angles they
        act on the whole circle.
    :raises TypeError: for a key that is not one, sizes that are no integers, or an argument that
        is none of these.
    :raises ValueError: for sizes below 1, unknown names, a graph with a cycle, or fewer
        than 2 bins.

    Source: Durkan, Bekasov, Murray & Papamakarios (2019), arXiv:1906.04032; on the circle
    Rezende et al. (2020), arXiv:2002.02428.

    >>> import jax, jax.numpy as jnp
    >>> nsf_ar(jax.random.key(0), 3, depth=2).log_prob(jnp.zeros((4, 3))).shape
    (4,)
    """
    map, circular = RationalQuadraticSpline(num_bins, bound), CircularSpline(num_bins)
    return autoregressive_flow(key, dim, map, circular_map=circular, inverse=inverse, **options)
