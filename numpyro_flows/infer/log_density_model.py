"""A log density of any pytree as a NumPyro model."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint

from ..compilation import is_traced


class LogDensityModel:
    """What :func:`log_density_model` returns: the model, and its pytree from and to sites.

    :ivar names: names of the sites, in the order of the leaves.
    """

    def __init__(self, log_density: Callable[..., Any], example: Any, support: Any = None):
        if not callable(log_density):
            raise TypeError(
                f"log_density: expected a function of a pytree, got {type(log_density).__name__}."
            )
        paths, structure = jax.tree.flatten_with_path(example)
        self._structure: Any = structure
        if not paths:
            raise ValueError("example: expected a pytree with arrays, got one without leaves.")
        self.names = tuple(_name(path) for path, _ in paths)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"example: two leaves have one name among {sorted(self.names)}.")
        self._log_density = log_density
        named = zip(self.names, (leaf for _, leaf in paths), strict=True)
        supports = _supports(support, example)
        self._priors = [
            _flat(name, leaf, each) for (name, leaf), each in zip(named, supports, strict=True)
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; the arguments are handed on to the log density.

        :return: the pytree of values.
        """
        values = map(numpyro.sample, self.names, self._priors)
        tree = jax.tree.unflatten(self._structure, values)
        value = self._log_density(tree, *args, **kwargs)
        if jnp.shape(value) != ():
            raise ValueError(
                "log_density: expected a scalar, got a value of shape "
                f"{jnp.shape(value)}. Sum the terms."
            )
        numpyro.factor("log_density", value)
        return tree

    def tree(self, sites: Mapping[str, Any]) -> Any:
        """The pytree from values of the sites, as draws have them.

        :param sites: by name, ``(*batch, *shape)``; other sites are ignored.
        """
        return jax.tree.unflatten(self._structure, [sites[name] for name in self.names])

    def sites(self, tree: Any) -> dict[str, Array]:
        """Values of the sites from a pytree of the example's structure.

        :raises ValueError: for another structure.
        """
        leaves, structure = jax.tree.flatten(tree)
        if structure != self._structure:
            raise ValueError(f"Expected a pytree like {self._structure}, got {structure}.")
        return dict(zip(self.names, leaves, strict=True))

    def is_like(self, example: Any) -> bool:
        """Whether a pytree has the structure and the shapes of the example."""
        leaves, structure = jax.tree.flatten(example)
        shapes = [prior.event_shape for prior in self._priors]
        return structure == self._structure and shapes == list(map(jnp.shape, leaves))


def log_density_model(
    log_density: Callable[..., Any], example: Any, support: Any = None
) -> LogDensityModel:
    r"""A NumPyro model whose posterior has a given log density.

    .. math:: p(\theta) \propto \exp f(\theta), \qquad \theta \text{ in the support}

    Each leaf of the pytree is a site, flat on its support (``ImproperUniform``), and one ``factor``
    adds f. The model goes wherever a NumPyro model goes: ``nf.AutoFlow`` and ``nf.fit_guide``,
    ``nf.FlowNUTS``, ``nf.NeuTraReparam``, NumPyro's own guides and kernels. A site has the name of
    its leaf: ``"scale"`` for ``{"scale": ...}``, ``"group.0"`` for ``{"group": (...,)}``, and
    ``"x"`` for a bare array. f is a density of the constrained values, as in any NumPyro model; the
    log-determinants of what constrains them are no part of it. That f can be normalised is not
    checked here; ``nf.fit_guide`` and ``nf.FlowNUTS`` say so where it seems not to be.

    Cost: that of f.

    :param log_density: f, from a pytree like the example, and the arguments of the model if it is
        called with any, to a scalar; up to a constant; differentiable by JAX in reverse mode.
    :param example: a pytree of floating-point arrays (or ``jax.ShapeDtypeStruct``), whose
        structure and shapes count.
    :param support: NumPyro constraints, by default the real numbers: one for all leaves, or a
        pytree of them, each for what the example has in its place.
    :return: the model. ``model.tree(sites)`` turns draws of the sites into the pytree,
        ``model.sites(tree)`` turns it back.
    :raises TypeError: for a log density that cannot be called, and for integers in the pytree.
    :raises ValueError: for supports that do not fit the pytree, for a discrete one, for an example
        outside its support, and as the model runs for a log density that is not a scalar.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> from numpyro.distributions import constraints
    >>> def log_density(p):  # Gamma(3, 2) and a normal as wide as its square root
    ...     return 2.5 * jnp.log(p["v"]) - 2 * p["v"] - 0.5 * (p["x"] ** 2).sum() / p["v"]
    >>> model = nf.log_density_model(
    ...     log_density,
    ...     {"v": 1.0, "x": jnp.zeros(1)},
    ...     {"v": constraints.positive, "x": constraints.real},
    ... )
    >>> fitted = nf.fit_guide(jax.random.key(0), nf.AutoFlow(model), progress_bar=False)
    >>> draws = model.tree(fitted.sample(jax.random.key(1), (4000,)))
    >>> draws["x"].shape, bool(abs(draws["v"].mean() - 2.0) < 0.1)
    ((4000, 1), True)
    """
    return LogDensityModel(log_density, example, support)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "x"


def _supports(support: Any, example: Any) -> list[Constraint]:
    """A constraint for each leaf."""

    def is_constraint(node: Any) -> bool:
        return isinstance(node, Constraint)

    def each(node: Any, part: Any) -> list[Any]:
        if not is_constraint(node):
            raise TypeError(f"support: expected NumPyro constraints, got {node!r}.")
        return [node] * len(jax.tree.leaves(part))

    if support is None:
        support = constraints.real
    try:
        found = jax.tree.map(each, support, example, is_leaf=is_constraint)
    except ValueError as error:
        raise ValueError(
            "support: expected one constraint, or a pytree of them like the example, got "
            f"{jax.tree.structure(support, is_leaf=is_constraint)} for "
            f"{jax.tree.structure(example)}."
        ) from error
    return jax.tree.leaves(found, is_leaf=is_constraint)


def _flat(name: str, leaf: Any, support: Constraint) -> dist.Distribution:
    """The flat prior of one leaf."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"example: leaf {name!r} is of dtype {dtype}, and flows are continuous: expected "
            "floating-point numbers. Close over what is no parameter."
        )
    if support.is_discrete:
        raise ValueError(f"support: {support!r} of leaf {name!r} is discrete.")
    shape = jnp.shape(leaf)
    if (missing := support.event_dim - len(shape)) > 0:
        raise ValueError(
            f"support: {support!r} is for arrays of {support.event_dim} axes, and leaf {name!r} "
            f"has {missing} fewer: its shape is {shape}."
        )
    if not isinstance(leaf, jax.ShapeDtypeStruct) and not is_traced(leaf):
        if not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(f"example: leaf {name!r} is not finite: {leaf}.")
        if not np.all(support(jnp.asarray(leaf))):
            raise ValueError(f"support: leaf {name!r} of the example is outside of {support!r}.")
    # One event, since rows of no plate would look forgotten.
    whole = constraints.independent(support, len(shape) - support.event_dim)
    return dist.ImproperUniform(whole, (), shape)
