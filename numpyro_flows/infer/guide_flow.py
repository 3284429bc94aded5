"""The flow inside a guide: the default one, and the settings of recipes for guides."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution
from numpyro.infer.initialization import init_to_value

from ..checks import is_real
from ..compilation import jit
from ..distribution import FlowDistribution, combine, partition
from ..elementwise import DeepSigmoid
from ..parts import inexactness
from ..recipes import coupling_flow, realnvp
from ..transforms import ActNorm, Chain, FixedAffine, TriangularAffine
from .normals import TRAINED


def for_guide(recipe: Callable[..., FlowDistribution]) -> Callable[..., FlowDistribution]:
    """The recipe with the ``guide_settings`` that it declares, where they were left open."""
    inner, given = recipe, {}
    if isinstance(recipe, functools.partial):
        inner, given = recipe.func, recipe.keywords
    settings = getattr(inner, "guide_settings", {})
    return functools.partial(recipe, **(settings | given)) if settings else recipe


def with_arrays(strategy: Callable) -> Callable:
    """``init_to_value`` with floating arrays for Python numbers and integers, others as they are.

    NumPyro hands values on as they came, to code that differentiates and reshapes them.
    """
    if not isinstance(strategy, functools.partial) or strategy.func is not init_to_value:
        return strategy
    values = strategy.keywords.get("values", {})
    return init_to_value(
        values={name: np.asarray(x, jnp.result_type(float, x)) for name, x in values.items()}
    )


def check_exact(flow: Any) -> None:
    """Refuse a flow or transform whose log density or log-determinant is not exact.

    :raises ValueError: for one that is an estimate or a bound.
    """
    if kind := inexactness(flow):
        raise ValueError(
            f"flow: expected an exact log density, got the {kind}, with which neither ELBO nor "
            "importance weights nor neural transport would be right. Build a continuous flow with "
            "`trace='exact'` in place of a stochastic trace; for an augmented guide, fit an exact "
            "flow to `nf.augmented_model(model)`."
        )


def site_key(key: Array, prefix: str) -> Array:
    """A key of this guide's own: ``AutoGuideList`` hands all its guides the same one."""
    return jax.random.fold_in(key, zlib.crc32(prefix.encode()))


def guide_flow(key: Array, dim: int, *, context_dim: int = 0) -> FlowDistribution:
    """The flow of a guide for which none was chosen: smooth, deep and narrow.

    Sixteen affine couplings with networks of two layers of 32 units; in one dimension, where
    affine maps are all alike, monotone networks instead.

    :param key: ``jax.random.key``.
    :param dim: number of coordinates.
    :param context_dim: width of the context.
    """
    if dim == 1:
        return coupling_flow(
            key, 1, DeepSigmoid(), depth=2, hidden=(32, 32), context_dim=context_dim
        )
    # Each coordinate moves in half of the layers, and another passes in half of those: a scale that
    # grows with it to the end of its tail, as a funnel's does, needs more than the default bound.
    return realnvp(
        key,
        dim,
        depth=16,
        hidden=(32, 32),
        activation="gelu",
        log_scale_bound=3.0,
        context_dim=context_dim,
    )


def model_informed(
    key: Array,
    dim: int,
    *,
    flow: Callable[..., FlowDistribution] = guide_flow,
    context_dim: int = 0,
) -> FlowDistribution:
    r"""A guide's flow whose coordinates know the model's hierarchies, for ``nf.AutoFlow``.

    Where the location m and the scale s of a site depend on other sites, as in
    :math:`\theta_j \sim N(\mu, \tau)`, its unconstrained value is

    .. math:: x = (1 - a) \, m + s^{1 - b} u, \qquad a, b \in [0, 1],

    with degrees of centring a and b for each element, and the flow is one over all u. They are
    found with the preconditioner, by the ELBO of a normal, and stay as they are while the flow
    trains. So a guide or a sampler needs no choice between the centred form (1) and the non-centred
    one (0), in which data that say little or much of an element make a funnel. The map is exact.
    Families: normal, Student, Laplace, Cauchy, logistic, Gumbel and their log and affine maps;
    normal and Student with a covariance; random walks; positive ones with a scale or a rate
    (half-normal, half-Cauchy, exponential, gamma, inverse gamma, Weibull); all also inside plates.
    A family of one's own joins by ``numpyro_flows.infer.centring.loc_scale.register``. Sites that
    depend on themselves, as in a ``scan``, keep their location.

    The default flow of ``nf.AutoFlow`` and ``nf.FlowNUTS`` does the same wherever it has the better
    ELBO. Cost: a second search for the preconditioner, and in each pass the evaluation of the
    sites' priors once for every level of the hierarchy.

    :param key: ``jax.random.key``.
    :param dim: number of coordinates.
    :param flow: the recipe of the flow over u.
    :param context_dim: width of the context.
    :return: a flow over vectors of size ``dim``.

    Sources: Gorinova, Moore & Hoffman (2020), arXiv:1906.03028; Ko & Domke (2025),
    arXiv:2505.24243.

    >>> import jax, numpyro, numpyro.distributions as dist, numpyro_flows as nf
    >>> def model():
    ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    ...     numpyro.sample("effect", dist.Normal(0.0, scale).expand([3]).to_event(1))
    >>> guide = nf.AutoFlow(model, nf.model_informed)
    >>> fitted = nf.fit_guide(jax.random.key(0), guide, num_steps=100, progress_bar=False)
    >>> fitted.trusted
    True
    """
    given = {"context_dim": context_dim} if context_dim else {}
    return for_guide(flow)(key, dim, **given)


class Recipe:
    """A recipe with its settings, equal to others of the same function and equal settings.

    ``build`` is compiled for a recipe, and partial functions compare by identity.
    """

    def __init__(self, recipe: Callable[..., FlowDistribution]):
        self._recipe = recipe
        self._key: Any = recipe
        inner = recipe.func if isinstance(recipe, functools.partial) else recipe
        #: Whether the flow may be one over coordinates with degrees of centring.
        self.centres = inner in (guide_flow, model_informed)
        if isinstance(recipe, functools.partial):
            self._key = recipe.func, recipe.args, tuple(sorted(recipe.keywords.items()))
            try:
                hash(self._key)
            except TypeError:
                self._key = id(recipe)  # kept alive by this object

    def __call__(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        return self._recipe(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class Rest(NamedTuple):
    """What of a guide's flow is not trained."""

    base_dist: Distribution
    transform: Any


# Compiled as one: run bit by bit, a recipe's many small programs take seconds.
@jit(static_argnums=(0, 1), once=True)
def build(recipe: Recipe, dim: int, key: Array) -> tuple[Any, Rest]:
    """The recipe's flow with a trainable affine map behind it, parted for training."""
    flow = recipe(key, dim)
    check_exact(flow)
    if not isinstance(flow, FlowDistribution):
        raise TypeError(
            f"flow: expected a recipe that returns a FlowDistribution, got one that returns "
            f"{type(flow).__name__}."
        )
    shape_fits = flow.event_shape == (dim,) and not flow.batch_shape
    if not shape_fits or flow.context_dim or not is_real(flow.support):
        raise ValueError(
            f"flow: expected an unconditional flow over real vectors of size {dim}, got {flow} "
            f"with support {flow.support}. The guide works in the unconstrained space and applies "
            "the sites' supports itself."
        )
    affine = TriangularAffine(dim) if dim <= TRAINED else ActNorm(dim)
    # The transform's alone: NumPyro's scan asks parameters for their shape, and a distribution's is
    # a method.
    params, rest = partition(Chain([flow.transform, affine]))
    return params, Rest(flow.base_dist, rest)


def flow_of(params: Any, rest: Rest) -> FlowDistribution:
    """What ``build`` parted, as one flow."""
    return FlowDistribution(rest.base_dist, combine(params, rest.transform))


def assemble(params: Any, rest: Rest, affine: FixedAffine) -> FlowDistribution:
    """The flow over the latent space: what ``build`` parted, behind the frozen preconditioner."""
    transform, affine = combine(params, rest.transform), jax.lax.stop_gradient(affine)
    return FlowDistribution(rest.base_dist, Chain([*transform.parts, affine]))
