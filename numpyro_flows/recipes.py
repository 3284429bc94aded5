"""Well-known flows, each a short function from a key and a dimension to a distribution.

Every recipe has the form ``recipe(key, dim, *, context_dim=0, support=..., base=None, **config)``.
The key sets the initial weights alone: the static structure (permutations, where there are any)
follows from ``permutation_seed``, so a recipe runs under ``jit`` and ``vmap``, and
``jax.vmap(lambda key: recipe(key, dim))(keys)`` is an ensemble. A new flow is the identity.

``support`` is a constraint on the whole vector, a scalar one that holds for each coordinate, or a
tuple of scalar ones, one per coordinate. Angles (``constraints.circular``) need circular maps,
which ``nsf`` and ``nsf_ar`` have. ``inverse`` says which direction is the fast one: True for the
density (training on data), False for sampling (guides).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution, Normal, biject_to, constraints
from numpyro.distributions.constraints import Constraint

from .augmented import AugmentedFlow
from .checks import check_key, check_size, is_real
from .coordinates import (
    PerCoordinate,
    StandardBase,
    angles,
    coordinates,
    from_coordinates,
)
from .distribution import FlowDistribution
from .elementwise import (
    Affine,
    Angles,
    ByKind,
    CircularSpline,
    ElementwiseMap,
    RationalQuadraticSpline,
    Shift,
)
from .nn import ConcatSquash
from .transform import FlowTransform, Inverse
from .transforms import (
    BlockAutoregressive,
    Chain,
    Continuous,
    Coupling,
    DiagonalScale,
    LULinear,
    MaskedAutoregressive,
    NumPyroTransform,
    Planar,
    Radial,
    Ridge,
    Scan,
    Sylvester,
)
from .transforms.autoregressive import Graph

Support: TypeAlias = Constraint | Sequence[Constraint]

Recipe = TypeVar("Recipe", bound=Callable[..., Any])


def in_guides(**settings: Any) -> Callable[[Recipe], Recipe]:
    """Declare arguments that guides set, where the user leaves them open.

    A guide needs fast sampling, an exact density, and no exception where a step of training can be
    skipped.

    :param settings: arguments of the decorated recipe, kept as its ``guide_settings``.
    """

    def declare(recipe: Recipe) -> Recipe:
        recipe.__dict__["guide_settings"] = settings
        return recipe

    return declare


def _permutations(kind: str | Sequence[int], dim: int, depth: int, seed: int) -> list[list[int]]:
    """One permutation after each of ``depth`` layers; together they are the identity."""
    rng = np.random.default_rng(seed)
    swap = np.roll(np.arange(dim), dim // 2)
    kinds: dict[str, Callable[[int], np.ndarray]] = {
        # Two layers with the swap between them move every coordinate; chance alone might leave
        # some out, in two dimensions even for several layers. The pairs are shuffled.
        "random": lambda layer: rng.permutation(dim) if layer % 2 and dim > 2 else swap,
        "reverse": lambda layer: np.arange(dim)[::-1],
        "swap": lambda layer: swap,
    }
    if isinstance(kind, str):
        if kind not in kinds:
            raise ValueError(
                f"permutation: expected one of {sorted(kinds)} or a permutation of "
                f"range({dim}), got {kind!r}."
            )
        permutations = [kinds[kind](layer) for layer in range(depth - 1)]
    else:
        if sorted(kind) != list(range(dim)):
            raise ValueError(f"permutation: expected one of range({dim}), got {kind!r}.")
        permutations = [np.array(kind)] * (depth - 1)
    total = np.arange(dim)
    for permutation in permutations:
        total = total[permutation]
    return [p.tolist() for p in (*permutations, np.argsort(total))]


def channel_permutations(channels: int, depth: int, seed: int) -> list[list[int]]:
    """The default permutations of ``coupling_flow``, for the channels of images."""
    return _permutations("random", channels, depth, seed)


def _check_support(support: Support, dim: int) -> Constraint:
    """The support as one constraint."""
    if isinstance(support, Sequence):
        if len(support) != dim or not all(isinstance(part, Constraint) for part in support):
            raise ValueError(
                f"support: expected one NumPyro constraint for each of {dim} coordinates, got "
                f"{support!r}."
            )
        if any(part.event_dim for part in support):
            raise ValueError(
                f"support: expected scalar constraints for the coordinates, got {support!r}."
            )
        return coordinates(support)
    if not isinstance(support, Constraint):
        raise TypeError(
            f"support: expected a NumPyro constraint, got {type(support).__name__}; "
            "for example `numpyro.distributions.constraints.positive`."
        )
    return support


def _flow(
    transform: FlowTransform, support: Constraint, base: Distribution | None
) -> FlowDistribution:
    """Base -> transform -> support."""
    (dim,) = transform.event_shape
    flags = angles(support, dim)
    if base is None:
        base = StandardBase(flags) if any(flags) else Normal(jnp.zeros(dim), jnp.ones(dim))
    elif isinstance(base, Distribution):
        if any(flags) and is_real(base.support):
            raise ValueError(
                f"base: expected a distribution on the circle for angles, got "
                f"{type(base).__name__} on the line, whose mass beyond +-pi would be lost. Take "
                "the default (uniform), or one such as `VonMises` if all coordinates are angles."
            )
        if base.shape() == ():
            base = base.expand((dim,))
    if isinstance(support, PerCoordinate) or any(flags):
        parts = (
            support.parts if isinstance(support, PerCoordinate) else (constraints.circular,) * dim
        )
        transform = Chain([transform, NumPyroTransform(from_coordinates(parts), (dim,))])
    elif not is_real(support):
        transform = Chain([transform, NumPyroTransform(biject_to(support), (dim,))])
    return FlowDistribution(base, transform)


def _layers(
    build: Callable[..., FlowTransform],
    key: Array,
    dim: int,
    depth: int,
    permutations: list[list[int]] | None,
    flags: tuple[bool, ...] = (),
) -> Scan:
    """``depth`` layers ``build(key, dim)`` stacked, with the flags as each of them meets them."""
    keys = jax.random.split(check_key(key), depth)
    if not any(flags):
        return Scan(jax.vmap(lambda key: build(key, dim))(keys), permutations)
    current, each = np.array(flags, float), []
    for permutation in permutations or [list(range(dim))] * depth:
        each.append(current)
        current = current[permutation]
    stacked = jnp.array(np.stack(each), jnp.result_type(float))
    return Scan(
        jax.vmap(lambda key, flags: build(key, dim, circular=flags))(keys, stacked), permutations
    )


def _refuse_angles(what: str) -> ValueError:
    return ValueError(
        f"support: expected real or constrained coordinates, got angles, which {what} would tear "
        "at +-pi. Use `nf.nsf` or `nf.nsf_ar`."
    )


def _map_for(
    map: ElementwiseMap, circular_map: ElementwiseMap | None, flags: tuple[bool, ...]
) -> ElementwiseMap:
    if not any(flags):
        return map
    if circular_map is None:
        raise _refuse_angles(type(map).__name__)
    return circular_map if all(flags) else ByKind(map, circular_map)


def _log_scale_bound(bound: float | None, depth: int) -> float:
    return min(2.0, 16 / check_size("depth", depth)) if bound is None else bound


def _check_no_angles(what: str, support: Support, dim: int) -> Constraint:
    """The support as one constraint, for flows that cannot stay on a circle."""
    constraint = _check_support(support, dim)
    if any(angles(constraint, dim)):
        raise _refuse_angles(what)
    return constraint


def _residual(
    build: Callable[..., FlowTransform],
    key: Array,
    dim: int,
    depth: int,
    inverse: bool,
    support: Support,
    base: Distribution | None,
    permutations: list[list[int]] | None = None,
) -> FlowDistribution:
    """Layers that are the identity plus something, read in one direction or the other."""
    check_size("dim", dim)
    layers = _layers(build, key, dim, check_size("depth", depth), permutations)
    constraint = _check_no_angles(type(layers.layers).__name__, support, dim)
    return _flow(Inverse(layers) if inverse else layers, constraint, base)


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
    depth: int = 8,
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
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default (uniform for angles).
    :param permutation_seed: seed of the permutations between layers.
    :param circular_map: the map for coordinates that are angles.
    :param depth: number of coupling layers; each changes half of the coordinates.
    :param hidden: widths of each conditioner's hidden layers.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``; a smooth one (``"tanh"``,
        ``"silu"``) gives a density with a smooth gradient, as HMC likes it.
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
    constraint = _check_support(support, dim)
    flags = angles(constraint, dim)
    map = _map_for(map, circular_map, flags)
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

    permutations = _permutations(permutation, dim, check_size("depth", depth), permutation_seed)
    return _flow(_layers(build, key, dim, depth, permutations, flags), constraint, base)


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
    depth: int = 5,
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
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default (uniform for angles).
    :param permutation_seed: seed of the permutations between layers.
    :param circular_map: the map for coordinates that are angles.
    :param depth: number of layers.
    :param hidden: widths of each conditioner's hidden layers.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``; a smooth one (``"tanh"``,
        ``"silu"``) gives a density with a smooth gradient, as HMC likes it.
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
    constraint = _check_support(support, dim)
    flags = angles(constraint, dim)
    map = _map_for(map, circular_map, flags)

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
    permutations = (
        _permutations(permutation, dim, depth, permutation_seed) if parents is None else None
    )
    layers = _layers(build, key, dim, depth, permutations, flags)
    return _flow(Inverse(layers) if inverse else layers, constraint, base)


@in_guides(inverse=False)
def planar(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    depth: int = 16,
    activation: str | Ridge = "tanh",
    hidden: Sequence[int] = (64, 64),
    inverse: bool = True,
) -> FlowDistribution:
    r"""Planar flow: :math:`y = x + \hat u \, h(w \cdot x + b)`, one ridge per layer.

    The fast direction costs O(depth dim); the other one scalar equation per layer and row, solved
    to rounding error with implicit gradients.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default.
    :param depth: number of layers.
    :param activation: h: a name of ``numpyro_flows.transforms.planar.RIDGES`` or a ``Ridge``.
    :param hidden: widths of the network that reads the context.
    :param inverse: True for a parallel ``log_prob``, False for parallel sampling.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names, or an activation that breaks
        the constraint.

    Source: Rezende & Mohamed (2015), arXiv:1505.05770.

    >>> import jax, jax.numpy as jnp
    >>> planar(jax.random.key(0), 2).log_prob(jnp.zeros((4, 2))).shape
    (4,)
    """

    def build(key: Array, dim: int) -> FlowTransform:
        return Planar(key, dim, activation=activation, context_dim=context_dim, hidden=hidden)

    return _residual(build, key, dim, depth, inverse, support, base)


@in_guides(inverse=False)
def radial(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    depth: int = 16,
    hidden: Sequence[int] = (64, 64),
    inverse: bool = True,
) -> FlowDistribution:
    r"""Radial flow: :math:`y = x + \beta (x - x_0) / (\alpha + |x - x_0|)`, one centre per layer.

    Both directions cost O(depth dim), with the inverse in closed form.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default.
    :param depth: number of layers.
    :param hidden: widths of the network that reads the context.
    :param inverse: True if the formula above goes from data to base, False for the other way.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names.

    Source: Rezende & Mohamed (2015), arXiv:1505.05770, eq. 14.

    >>> import jax, jax.numpy as jnp
    >>> radial(jax.random.key(0), 2).log_prob(jnp.zeros((4, 2))).shape
    (4,)
    """

    def build(key: Array, dim: int) -> FlowTransform:
        return Radial(key, dim, context_dim=context_dim, hidden=hidden)

    return _residual(build, key, dim, depth, inverse, support, base)


@in_guides(inverse=False)
def sylvester(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    depth: int = 8,
    num_ridges: int | None = None,
    activation: str | Ridge = "tanh",
    hidden: Sequence[int] = (64, 64),
    inverse: bool = True,
) -> FlowDistribution:
    r"""Sylvester flow: :math:`y = x + Q R \, h(\tilde R Q^\top x + b)`, several ridges per layer.

    The fast direction costs O(depth dim num_ridges); the other ``num_ridges`` scalar equations per
    layer and row, solved to rounding error with implicit gradients.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default.
    :param depth: number of layers.
    :param num_ridges: ridges per layer, at most ``dim``; by default ``min(dim, 8)``.
    :param activation: h: a name of ``numpyro_flows.transforms.planar.RIDGES`` or a ``Ridge``.
    :param hidden: widths of the network that reads the context.
    :param inverse: True for a parallel ``log_prob``, False for parallel sampling.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names, or an activation that breaks
        the constraint.

    Source: van den Berg, Hasenclever, Tomczak & Welling (2018), arXiv:1803.05649.

    >>> import jax, jax.numpy as jnp
    >>> sylvester(jax.random.key(0), 2).log_prob(jnp.zeros((4, 2))).shape
    (4,)
    """

    def build(key: Array, dim: int) -> FlowTransform:
        return Sylvester(
            key,
            dim,
            num_ridges=num_ridges,
            activation=activation,
            context_dim=context_dim,
            hidden=hidden,
        )

    return _residual(build, key, dim, depth, inverse, support, base)


def nice(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    permutation_seed: int = 0,
    depth: int = 8,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    permutation: str | Sequence[int] = "random",
    rescale: bool = True,
) -> FlowDistribution:
    r"""NICE: additive couplings :math:`y_B = x_B + t(x_A)`, then a diagonal scaling.

    Without the scaling the flow preserves volume: its log-determinant is exactly 0.
    Both directions cost ``depth`` passes of the network.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default.
    :param permutation_seed: seed of the permutations between layers.
    :param depth: number of coupling layers; each changes half of the coordinates.
    :param hidden: widths of each conditioner's hidden layers.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``; a smooth one (``"tanh"``,
        ``"silu"``) gives a density with a smooth gradient, as HMC likes it.
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, ``"random"`` (a
        swap within each pair of layers, a random permutation between the pairs), or a permutation
        of ``range(dim)``.
    :param rescale: whether the diagonal scaling ends the flow.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names, or angles.

    Source: Dinh, Krueger & Bengio (2015), arXiv:1410.8516.

    >>> import jax, jax.numpy as jnp
    >>> nice(jax.random.key(0), 3, rescale=False).transform.forward_and_log_det(jnp.ones(3))[1]
    Array(0., dtype=float32)
    """
    flow = coupling_flow(
        key,
        dim,
        Shift(),
        context_dim=context_dim,
        permutation_seed=permutation_seed,
        depth=depth,
        hidden=hidden,
        activation=activation,
        permutation=permutation,
    )
    transform = flow.transform
    if rescale:
        transform = Chain([transform, DiagonalScale(dim)])
    return _flow(transform, _check_no_angles("nice", support, dim), base)


def realnvp(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    permutation_seed: int = 0,
    depth: int = 8,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    residual: bool = False,
    permutation: str | Sequence[int] = "random",
    mixing: str = "none",
    log_scale_bound: float | None = None,
) -> FlowDistribution:
    r"""RealNVP: affine couplings :math:`y_B = x_B \odot e^{s(x_A)} + t(x_A)`.

    The log-scale is :math:`s = c \tanh(h / c)`. By default :math:`c = \min(2, 16 / depth)`: the
    bound tightens with depth, which keeps deep float32 flows invertible. What it costs is reach
    far outside the data, where one layer can stretch a coordinate by no more than :math:`e^c`;
    raise ``log_scale_bound`` for a shallow flow of very uneven scales.
    Both directions cost ``depth`` passes of the network. With ``dim = 1`` the layers are
    elementwise.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default.
    :param permutation_seed: seed of the permutations between layers.
    :param depth: number of coupling layers; each changes half of the coordinates.
    :param hidden: widths of each conditioner's hidden layers.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``; a smooth one (``"tanh"``,
        ``"silu"``) gives a density with a smooth gradient, as HMC likes it.
    :param residual: whether the hidden layers are residual blocks (of equal widths).
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, ``"random"`` (a
        swap within each pair of layers, a random permutation between the pairs), or a permutation
        of ``range(dim)``.
    :param mixing: ``"lu"`` puts an LU-decomposed linear layer before each coupling.
    :param log_scale_bound: the bound c.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names, or angles.

    Source: Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803.

    >>> import jax, jax.numpy as jnp
    >>> flow = realnvp(jax.random.key(0), 3)
    >>> flow.log_prob(jnp.zeros((4, 3))).shape
    (4,)
    """
    return coupling_flow(
        key,
        dim,
        Affine(_log_scale_bound(log_scale_bound, depth)),
        context_dim=context_dim,
        support=support,
        base=base,
        permutation_seed=permutation_seed,
        depth=depth,
        hidden=hidden,
        activation=activation,
        residual=residual,
        permutation=permutation,
        mixing=mixing,
    )


def nsf(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    permutation_seed: int = 0,
    depth: int = 8,
    hidden: Sequence[int] = (64, 64),
    num_bins: int = 8,
    bound: float = 4.0,
    activation: str = "relu",
    residual: bool = False,
    permutation: str | Sequence[int] = "random",
    mixing: str = "none",
) -> FlowDistribution:
    r"""Neural spline flow: couplings whose maps are monotone rational-quadratic splines.

    Both directions cost ``depth`` passes of the network, and both are closed formulas. The density
    is continuous, its gradient has kinks at the knots: for HMC prefer a smooth map
    (``nf.coupling_flow`` with ``SinhArcsinh`` or ``DeepSigmoid``).

    With ``support=constraints.circular``, or a tuple of supports some of which are circular, the
    flow lives on a torus or on real coordinates and angles together: angles have circular splines
    and a rotation, so that the density is continuous across +-pi.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default (uniform for angles).
    :param permutation_seed: seed of the permutations between layers.
    :param depth: number of coupling layers; each changes half of the coordinates.
    :param hidden: widths of each conditioner's hidden layers.
    :param num_bins: bins of each spline.
    :param bound: the splines act on [-bound, bound] and are the identity outside; on angles they
        act on the whole circle.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``; a smooth one (``"tanh"``,
        ``"silu"``) gives a density with a smooth gradient, as HMC likes it.
    :param residual: whether the hidden layers are residual blocks (of equal widths).
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, ``"random"`` (a
        swap within each pair of layers, a random permutation between the pairs), or a permutation
        of ``range(dim)``.
    :param mixing: ``"lu"`` puts an LU-decomposed linear layer before each coupling.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names, or fewer than 2 bins.

    Source: Durkan, Bekasov, Murray & Papamakarios (2019), arXiv:1906.04032; on the circle
    Rezende et al. (2020), arXiv:2002.02428.

    >>> import jax, jax.numpy as jnp
    >>> from numpyro.distributions import constraints
    >>> flow = nsf(jax.random.key(0), 2, support=(constraints.circular, constraints.real))
    >>> flow.log_prob(jnp.array([[3.1, 7.0]])).shape
    (1,)
    """
    return coupling_flow(
        key,
        dim,
        RationalQuadraticSpline(num_bins, bound),
        circular_map=CircularSpline(num_bins),
        context_dim=context_dim,
        support=support,
        base=base,
        permutation_seed=permutation_seed,
        depth=depth,
        hidden=hidden,
        activation=activation,
        residual=residual,
        permutation=permutation,
        mixing=mixing,
    )


def maf(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    permutation_seed: int = 0,
    depth: int = 5,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    residual: bool = False,
    permutation: str | Sequence[int] = "reverse",
    parents: Graph | None = None,
    log_scale_bound: float | None = None,
) -> FlowDistribution:
    r"""MAF: affine autoregressive layers with a parallel density.

    From data to base a layer is :math:`z_i = x_i e^{s_i(x_{<i})} + t_i(x_{<i})`: ``log_prob`` costs
    ``depth`` passes of the network. Sampling goes coordinate by coordinate, computing each hidden
    unit once, about the arithmetic of one pass in ``dim`` steps.
    :math:`s = c \tanh(h / c)`; see ``realnvp``.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default.
    :param permutation_seed: seed of the permutations between layers.
    :param depth: number of layers.
    :param hidden: widths of each conditioner's hidden layers.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``; a smooth one (``"tanh"``,
        ``"silu"``) gives a density with a smooth gradient, as HMC likes it.
    :param residual: whether the hidden layers are residual blocks (of equal widths).
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, ``"random"`` (a
        swap within each pair of layers, a random permutation between the pairs), or a permutation
        of ``range(dim)``.
    :param parents: for each coordinate those that it depends on (or a boolean mask whose row i
        marks them), an acyclic graph in place of the complete order; the layers are then not
        permuted.
    :param log_scale_bound: the bound c; by default min(2, 16 / depth).
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names, a graph with a cycle, or angles.

    Source: Papamakarios, Pavlakou & Murray (2017), arXiv:1705.07057.

    >>> import jax, jax.numpy as jnp
    >>> maf(jax.random.key(0), 3).sample(jax.random.key(1), (4,)).shape
    (4, 3)
    """
    return autoregressive_flow(
        key,
        dim,
        Affine(_log_scale_bound(log_scale_bound, depth)),
        context_dim=context_dim,
        support=support,
        base=base,
        permutation_seed=permutation_seed,
        depth=depth,
        hidden=hidden,
        activation=activation,
        residual=residual,
        permutation=permutation,
        parents=parents,
        inverse=True,
    )


def iaf(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    permutation_seed: int = 0,
    depth: int = 5,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    residual: bool = False,
    permutation: str | Sequence[int] = "reverse",
    parents: Graph | None = None,
    log_scale_bound: float | None = None,
) -> FlowDistribution:
    r"""IAF: affine autoregressive layers with parallel sampling.

    From base to data a layer is :math:`x_i = z_i e^{s_i(z_{<i})} + t_i(z_{<i})`: sampling, with the
    density of what was sampled, costs ``depth`` passes of the network; the right direction for
    guides. ``log_prob`` of other points goes coordinate by coordinate, with implicit gradients, so
    that it can be trained on data too.
    :math:`s = c \tanh(h / c)`; see ``realnvp``.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default.
    :param permutation_seed: seed of the permutations between layers.
    :param depth: number of layers.
    :param hidden: widths of each conditioner's hidden layers.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``; a smooth one (``"tanh"``,
        ``"silu"``) gives a density with a smooth gradient, as HMC likes it.
    :param residual: whether the hidden layers are residual blocks (of equal widths).
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, ``"random"`` (a
        swap within each pair of layers, a random permutation between the pairs), or a permutation
        of ``range(dim)``.
    :param parents: for each coordinate those that it depends on (or a boolean mask whose row i
        marks them), an acyclic graph in place of the complete order; the layers are then not
        permuted.
    :param log_scale_bound: the bound c; by default min(2, 16 / depth).
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names, a graph with a cycle, or angles.

    Source: Kingma et al. (2016), arXiv:1606.04934.

    >>> import jax, jax.numpy as jnp
    >>> iaf(jax.random.key(0), 3).sample(jax.random.key(1), (4,)).shape
    (4, 3)
    """
    return autoregressive_flow(
        key,
        dim,
        Affine(_log_scale_bound(log_scale_bound, depth)),
        context_dim=context_dim,
        support=support,
        base=base,
        permutation_seed=permutation_seed,
        depth=depth,
        hidden=hidden,
        activation=activation,
        residual=residual,
        permutation=permutation,
        parents=parents,
        inverse=False,
    )


@in_guides(inverse=False)
def nsf_ar(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    permutation_seed: int = 0,
    depth: int = 5,
    hidden: Sequence[int] = (64, 64),
    num_bins: int = 8,
    bound: float = 4.0,
    activation: str = "relu",
    residual: bool = False,
    permutation: str | Sequence[int] = "reverse",
    parents: Graph | None = None,
    inverse: bool = True,
) -> FlowDistribution:
    r"""Autoregressive neural spline flow: splines steered by all coordinates before.

    More flexible per layer than ``nsf``, with one slow direction (see ``nf.autoregressive_flow``).
    Angles are handled as in ``nsf``.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default (uniform for angles).
    :param permutation_seed: seed of the permutations between layers.
    :param depth: number of layers.
    :param hidden: widths of each conditioner's hidden layers.
    :param num_bins: bins of each spline.
    :param bound: the splines act on [-bound, bound] and are the identity outside; on angles they
        act on the whole circle.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``; a smooth one (``"tanh"``,
        ``"silu"``) gives a density with a smooth gradient, as HMC likes it.
    :param residual: whether the hidden layers are residual blocks (of equal widths).
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, ``"random"`` (a
        swap within each pair of layers, a random permutation between the pairs), or a permutation
        of ``range(dim)``.
    :param parents: for each coordinate those that it depends on (or a boolean mask whose row i
        marks them), an acyclic graph in place of the complete order; the layers are then not
        permuted.
    :param inverse: True for a parallel ``log_prob``, False for parallel sampling.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names, a graph with a cycle, or fewer
        than 2 bins.

    Source: Durkan, Bekasov, Murray & Papamakarios (2019), arXiv:1906.04032; on the circle
    Rezende et al. (2020), arXiv:2002.02428.

    >>> import jax, jax.numpy as jnp
    >>> nsf_ar(jax.random.key(0), 3, depth=2).log_prob(jnp.zeros((4, 3))).shape
    (4,)
    """
    return autoregressive_flow(
        key,
        dim,
        RationalQuadraticSpline(num_bins, bound),
        circular_map=CircularSpline(num_bins),
        context_dim=context_dim,
        support=support,
        base=base,
        permutation_seed=permutation_seed,
        depth=depth,
        hidden=hidden,
        activation=activation,
        residual=residual,
        permutation=permutation,
        parents=parents,
        inverse=inverse,
    )


@in_guides(inverse=False)
def bnaf(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    permutation_seed: int = 0,
    depth: int = 1,
    hidden_factors: Sequence[int] = (8, 8),
    hidden: Sequence[int] = (64, 64),
    permutation: str | Sequence[int] = "reverse",
    inverse: bool = True,
) -> FlowDistribution:
    r"""Block neural autoregressive flow, bijective on all of the real vectors.

    The fast direction costs ``depth`` passes of networks with ``hidden_factors`` units per
    coordinate; the other one about the same arithmetic in ``dim`` steps, each with a scalar
    equation solved to rounding error. ``log_prob`` works at any point in both.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies, or a tuple of one per coordinate.
    :param base: distribution of z; standard normal by default.
    :param permutation_seed: seed of the permutations between layers.
    :param depth: number of blocks.
    :param hidden_factors: units per coordinate in each hidden layer of a block.
    :param hidden: widths of the network that reads the context.
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, ``"random"`` (a
        swap within each pair of layers, a random permutation between the pairs), or a permutation
        of ``range(dim)``.
    :param inverse: True for a parallel ``log_prob``, False for parallel sampling.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1, unknown names, or angles.

    Source: De Cao, Titov & Aziz (2019), arXiv:1904.04676.

    >>> import jax, jax.numpy as jnp
    >>> flow = bnaf(jax.random.key(0), 3)
    >>> flow.log_prob(flow.sample(jax.random.key(1), (4,))).shape
    (4,)
    """

    def build(key: Array, dim: int) -> FlowTransform:
        return BlockAutoregressive(
            key, dim, hidden_factors=hidden_factors, context_dim=context_dim, hidden=hidden
        )

    check_size("dim", dim)
    permutations = _permutations(permutation, dim, check_size("depth", depth), permutation_seed)
    return _residual(build, key, dim, depth, inverse, support, base, permutations)


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
    :param noise: of the probes, ``"rademacher"`` or ``"gaussian"``.
    :param num_probes: how many of them.
    :param solver: name of an explicit Runge-Kutta method of diffrax.
    :param rtol: relative tolerance.
    :param atol: absolute tolerance, in units of the state.
    :param num_steps: number of equal steps in place of adaptive ones.
    :param max_steps: most steps.
    :param adjoint: ``"checkpoint"``, ``"backsolve"`` or ``"direct"``.
    :param end_time: T.
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
    constraint = _check_no_angles("Continuous", support, dim)
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
    return _flow(transform, constraint, base)


def conditional_gaussian(key: Array, dim: int, *, context_dim: int) -> FlowDistribution:
    """The q(e | x) of an augmented flow for which none was chosen.

    Two affine couplings with networks of two layers of 32 units: in one dimension a normal with
    location and scale of the context, in more one with a skewed dependence.

    :param key: ``jax.random.key``.
    :param dim: number of coordinates.
    :param context_dim: width of the context.
    """
    return realnvp(key, dim, context_dim=context_dim, depth=2, hidden=(32, 32), activation="silu")


@in_guides(trace="exact", throw=False)
def augmented_cnf(
    key: Array,
    dim: int,
    *,
    augment_dim: int = 1,
    context_dim: int = 0,
    support: Support = constraints.real_vector,
    base: Distribution | None = None,
    num_samples: int = 16,
    encoder: Callable[..., FlowDistribution] = conditional_gaussian,
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
) -> AugmentedFlow:
    r"""Augmented continuous flow: ``cnf`` over the data and ``augment_dim`` coordinates beside.

    Paths that would have to cross, or holes that would have to open, in ``dim`` coordinates pass
    each other in more. ``log_prob`` is the lower bound of ``AugmentedFlow``, which has the
    mathematics, cost, limits and sources; ``flow.joint`` is the ``cnf`` over both.

    :param key: ``jax.random.key`` for the initial weights, probes and noise.
    :param dim: number of coordinates of the data; events have shape ``(dim,)``.
    :param augment_dim: number of coordinates beside them.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: a constraint that holds for each coordinate, or a tuple of one per coordinate.
    :param base: distribution of the base of all ``dim + augment_dim`` coordinates; standard normal
        by default.
    :param num_samples: number of draws of the bound.
    :param encoder: recipe of q(e | x), ``key, augment_dim, context_dim=... -> FlowDistribution``
        with an exact density; its context is x mapped to the real numbers, then the context.
    :return: an ``AugmentedFlow``; what follows is as for ``cnf``, in ``dim + augment_dim``
        coordinates.
    :param hidden: widths of the hidden layers of the field, ``numpyro_flows.nn.ConcatSquash``.
    :param activation: name of a smooth one of ``numpyro_flows.nn.ACTIVATIONS``.
    :param field: a field of your own in place of the network, ``(t, z, context) -> dz/dt``.
    :param trace: ``"exact"``, ``"hutchinson"``, or None for exact up to 16 coordinates.
    :param noise: of the probes, ``"rademacher"`` or ``"gaussian"``.
    :param num_probes: how many of them.
    :param solver: name of an explicit Runge-Kutta method of diffrax.
    :param rtol: relative tolerance.
    :param atol: absolute tolerance, in units of the state.
    :param num_steps: number of equal steps in place of adaptive ones.
    :param max_steps: most steps.
    :param adjoint: ``"checkpoint"``, ``"backsolve"`` or ``"direct"``.
    :param end_time: T.
    :param per_row: whether each row chooses its own steps.
    :param kinetic_penalty: weight of :math:`\int |f|^2 dt` in training.
    :param jacobian_penalty: weight of :math:`\int \|\partial f / \partial z\|_F^2 dt` in training.
    :param steer: half width of the random end time in training.
    :param throw: whether a failed solve raises; if not, its log density is -inf.
    :raises TypeError: for a key that is not one, sizes that are no integers, or an encoder that
        returns no ``FlowDistribution``.
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
    constraint = _check_no_angles("Continuous", support, dim)
    joint = cnf(
        joint_key,
        dim + augment_dim,
        context_dim=context_dim,
        base=base,
        hidden=hidden,
        activation=activation,
        field=field,
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
    return AugmentedFlow(
        noise_key,
        joint,
        encoder(encoder_key, augment_dim, context_dim=dim + context_dim),
        num_samples=num_samples,
        support=None if is_real(constraint) else _each(constraint, dim),
    )


def _each(support: Constraint, dim: int) -> tuple[Constraint, ...]:
    """The constraint of each coordinate."""
    if isinstance(support, PerCoordinate):
        return support.parts
    part = getattr(support, "base_constraint", support)
    if part.event_dim:
        raise ValueError(
            f"support: expected a constraint of each coordinate, got {support}, which binds them "
            "together. Augmented flows take scalar constraints or a tuple of them."
        )
    return (part,) * dim
