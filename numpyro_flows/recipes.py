"""Well-known flows, each a short function from a key and a dimension to a distribution.

Every recipe has the form ``recipe(key, dim, *, context_dim=0, support=..., base=None,
permutation_seed=0, **config)``. The key sets the initial weights alone: the static structure
(permutations) follows from ``permutation_seed``, so a recipe runs under ``jit`` and ``vmap``, and
``jax.vmap(lambda key: recipe(key, dim))(keys)`` is an ensemble. A new flow is the identity.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution, Normal, biject_to, constraints
from numpyro.distributions.constraints import Constraint

from .checks import check_key, check_size, is_real
from .distribution import FlowDistribution
from .elementwise import Affine, ElementwiseMap, Shift
from .transform import FlowTransform
from .transforms import Chain, Coupling, DiagonalScale, NumPyroTransform, Scan


def _permutations(kind: str, dim: int, depth: int, seed: int) -> list[list[int]]:
    """One permutation after each of ``depth`` layers; together they are the identity."""
    rng = np.random.default_rng(seed)
    swap = np.roll(np.arange(dim), dim // 2)
    kinds = {
        # Two layers with the swap between them move every coordinate; chance alone might leave
        # some out, in two dimensions even for several layers. The pairs are shuffled.
        "random": lambda layer: rng.permutation(dim) if layer % 2 else swap,
        "reverse": lambda layer: np.arange(dim)[::-1],
        "swap": lambda layer: swap,
    }
    if kind not in kinds:
        raise ValueError(f"permutation: expected one of {sorted(kinds)}, got {kind!r}.")
    permutations = [kinds[kind](layer) for layer in range(depth - 1)]
    total = np.arange(dim)
    for permutation in permutations:
        total = total[permutation]
    return [p.tolist() for p in (*permutations, np.argsort(total))]


def _flow(
    transform: FlowTransform, support: Constraint, base: Distribution | None
) -> FlowDistribution:
    """Base -> transform -> support."""
    (dim,) = transform.event_shape
    if base is None:
        base = Normal(jnp.zeros(dim), jnp.ones(dim))
    elif isinstance(base, Distribution) and base.shape() == ():
        base = base.expand((dim,))
    if not isinstance(support, Constraint):
        raise TypeError(
            f"support: expected a NumPyro constraint, got {type(support).__name__}; "
            "for example `numpyro.distributions.constraints.positive`."
        )
    if not is_real(support):
        transform = Chain([transform, NumPyroTransform(biject_to(support), (dim,))])
    return FlowDistribution(base, transform)


def _couplings(
    key: Array,
    dim: int,
    map: ElementwiseMap,
    depth: int,
    permutation: str,
    permutation_seed: int,
    hidden: Sequence[int],
    context_dim: int,
    activation: str,
) -> Scan:
    keys = jax.random.split(check_key(key), check_size("depth", depth))
    layers = jax.vmap(
        lambda key: Coupling(
            key, dim, map, hidden=hidden, context_dim=context_dim, activation=activation
        )
    )(keys)
    return Scan(layers, _permutations(permutation, check_size("dim", dim), depth, permutation_seed))


def nice(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Constraint = constraints.real_vector,
    base: Distribution | None = None,
    permutation_seed: int = 0,
    depth: int = 8,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    permutation: str = "random",
    rescale: bool = True,
) -> FlowDistribution:
    r"""NICE: additive couplings :math:`y_B = x_B + t(x_A)`, then a diagonal scaling.

    Without the scaling the flow preserves volume: its log-determinant is exactly 0.
    Both directions cost ``depth`` passes of the network.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies; a scalar one holds for each coordinate.
    :param base: distribution of z; standard normal by default.
    :param permutation_seed: seed of the permutations between layers.
    :param depth: number of coupling layers; each changes half of the coordinates.
    :param hidden: widths of each conditioner's hidden layers.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``.
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, or ``"random"``:
        a swap within each pair of layers, a random permutation between the pairs.
    :param rescale: whether the diagonal scaling ends the flow.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1 or unknown names.

    Source: Dinh, Krueger & Bengio (2015), arXiv:1410.8516.

    >>> import jax, jax.numpy as jnp
    >>> nice(jax.random.key(0), 3, rescale=False).transform.forward_and_log_det(jnp.ones(3))[1]
    Array(0., dtype=float32)
    """
    couplings = _couplings(
        key, dim, Shift(), depth, permutation, permutation_seed, hidden, context_dim, activation
    )
    transform = Chain([couplings, DiagonalScale(dim)]) if rescale else couplings
    return _flow(transform, support, base)


def realnvp(
    key: Array,
    dim: int,
    *,
    context_dim: int = 0,
    support: Constraint = constraints.real_vector,
    base: Distribution | None = None,
    permutation_seed: int = 0,
    depth: int = 8,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    permutation: str = "random",
    log_scale_bound: float | None = None,
) -> FlowDistribution:
    r"""RealNVP: affine couplings :math:`y_B = x_B \odot e^{s(x_A)} + t(x_A)`.

    The log-scale is :math:`s = c \tanh(h / c)`. By default :math:`c = \min(1, 16 / depth)`: the
    bound tightens with depth, which keeps deep float32 flows invertible. What it costs is reach
    far outside the data, where one layer can stretch a coordinate by no more than :math:`e^c`;
    raise ``log_scale_bound`` for a shallow flow of very uneven scales.
    Both directions cost ``depth`` passes of the network.

    :param key: ``jax.random.key`` for the initial weights.
    :param dim: number of unconstrained coordinates; events have shape ``(dim,)`` unless
        ``support`` changes it. With ``dim = 1`` the layers are elementwise.
    :param context_dim: width of the context; 0 for an unconditional flow.
    :param support: constraint that the data satisfies; a scalar one holds for each coordinate.
    :param base: distribution of z; standard normal by default.
    :param permutation_seed: seed of the permutations between layers.
    :param depth: number of coupling layers; each changes half of the coordinates.
    :param hidden: widths of each conditioner's hidden layers.
    :param activation: a name of ``numpyro_flows.nn.ACTIVATIONS``; a smooth one (``"tanh"``,
        ``"silu"``) gives a density with a smooth gradient, as HMC likes it.
    :param permutation: between layers, ``"swap"`` of the halves, ``"reverse"``, or ``"random"``:
        a swap within each pair of layers, a random permutation between the pairs.
    :param log_scale_bound: the bound c.
    :raises TypeError: for a key that is not one, or sizes that are no integers.
    :raises ValueError: for sizes below 1 or unknown names.

    Source: Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803.

    >>> import jax, jax.numpy as jnp
    >>> flow = realnvp(jax.random.key(0), 3)
    >>> flow.log_prob(jnp.zeros((4, 3))).shape
    (4,)
    """
    bound = (
        min(1.0, 16 / check_size("depth", depth)) if log_scale_bound is None else log_scale_bound
    )
    couplings = _couplings(
        key,
        dim,
        Affine(bound),
        depth,
        permutation,
        permutation_seed,
        hidden,
        context_dim,
        activation,
    )
    return _flow(couplings, support, base)
