"""Declarations of a flow's parts: fixed numbers, inexact densities, substitutes in training."""

from typing import Any

import equinox as eqx
import jax
from jax import Array


class Fixed(eqx.Module):
    """Numbers that never train: a standardisation, support bounds, a bound context.

    ``nf.partition`` keeps whatever is wrapped here out of the parameters, so that optimisers,
    weight decay, priors and NUTS over weights leave it alone. Gradients still flow through it.

    :param value: any pytree of arrays.

    >>> import jax.numpy as jnp
    >>> Fixed(jnp.ones(3)).value.shape
    (3,)
    """

    value: Any


class Exactness:
    """Base of transforms and flows: whether the density is exact, and what training uses instead.

    The defaults ask the parts, which are whatever fields hold another ``Exactness``.
    """

    @property
    def inexact(self) -> str:
        """What the log-determinant or log density is ("estimate", ...); empty if it is exact."""
        return _first_inexact(*_flatten(self, below=True))

    def for_training(self, key: Array | None, rows: int) -> Any:
        """What one step of training uses in place of this object.

        :param key: for probes or noise of this step's own; None for validation.
        :param rows: number of rows in the step's batch.
        """
        return _as_trained(*_flatten(self, below=True), key, rows)


def inexactness(tree: Any) -> str:
    """``inexact`` of the first part of a pytree of flows and transforms that is not exact."""
    return _first_inexact(*_flatten(tree))


def for_training(tree: Any, key: Array | None, rows: int) -> Any:
    """A pytree of flows and transforms as one step of training uses it."""
    return _as_trained(*_flatten(tree), key, rows)


def is_rowwise(tree: Any, below: bool = False) -> bool:
    """Whether training treats each row by itself, without noise or a solver that rows share.

    So it is where nothing in the tree has a substitute of its own in training.
    """
    parts = [node for node in _flatten(tree, below)[0] if isinstance(node, Exactness)]
    return all(
        type(part).for_training is Exactness.for_training and is_rowwise(part, below=True)
        for part in parts
    )


def num_parameters(tree: Any) -> int:
    """How many numbers in a pytree train: those in floating arrays outside of :class:`Fixed`."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Fixed))
    return sum(leaf.size for leaf in leaves if eqx.is_inexact_array(leaf))


def _flatten(tree: Any, below: bool = False) -> tuple[list[Any], Any]:
    """The outermost parts of a tree, or the outermost ones ``below`` its root, and other leaves."""

    def is_part(node: Any) -> bool:
        return isinstance(node, Exactness) and not (below and node is tree)

    return jax.tree.flatten(tree, is_leaf=is_part)


def _first_inexact(nodes: list[Any], structure: Any) -> str:
    kinds = (node.inexact for node in nodes if isinstance(node, Exactness))
    return next(filter(None, kinds), "")


def _as_trained(nodes: list[Any], structure: Any, key: Array | None, rows: int) -> Any:
    trained = [
        node.for_training(None if key is None else jax.random.fold_in(key, i), rows)
        if isinstance(node, Exactness)
        else node
        for i, node in enumerate(nodes)
    ]
    return jax.tree.unflatten(structure, trained)
