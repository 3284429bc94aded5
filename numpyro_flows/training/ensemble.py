"""Members of an ensemble, and their mixture as a distribution."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import Distribution

from ..checks import check_key


class FlowMixture(Distribution):
    r"""The mixture :math:`\frac1m \sum_i p_i(x)` of m flows with equal weights; exact.

    A log density takes one pass of each member, and so does a draw, of which one member's is kept.

    :param flows: the flows as one, each array with a first axis over the members.

    >>> import jax, numpyro_flows as nf
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> flows = jax.vmap(lambda key: nf.realnvp(key, 2, depth=2))(keys)
    >>> FlowMixture(flows).event_shape
    (2,)
    """

    pytree_data_fields = ("flows",)

    def __init__(self, flows: Any):
        self.flows = flows
        one = jax.tree.map(lambda leaf: leaf[0], flows)
        self._size = len(jax.tree.leaves(flows)[0])
        super().__init__(one.batch_shape, one.event_shape)

    pytree_aux_fields = ("_size",)

    @property
    def support(self) -> Any:
        return jax.tree.map(lambda leaf: leaf[0], self.flows).support

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:
        each = jax.vmap(lambda flow: flow.log_prob(value))(self.flows)
        return jax.nn.logsumexp(each, axis=0) - np.log(self._size)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        choose_key, draw_key = jax.random.split(check_key(key))
        shape = tuple(sample_shape) + self.batch_shape
        which = jax.random.randint(choose_key, shape, 0, self._size)
        keys = jax.random.split(draw_key, self._size)
        draws = jax.vmap(lambda flow, key: flow.sample(key, sample_shape))(self.flows, keys)
        index = which.reshape(1, *shape, *(1,) * len(self.event_shape))
        return jnp.take_along_axis(draws, index, axis=0)[0]


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """What :func:`fit_many` returns.

    :ivar flows: the fitted flows as one pytree, each array with a first axis over the members.
    :ivar train_losses: as those of ``nf.fit``, ``(members, epochs)``; NaN after a member's end.
    :ivar val_losses: the same; without epochs where nothing is held out.
    :ivar best_epochs: epochs whose parameters are returned, ``(members,)``.
    :ivar num_skipped: steps skipped by each, ``(members,)``.
    """

    flows: Any
    train_losses: np.ndarray
    val_losses: np.ndarray
    best_epochs: np.ndarray
    num_skipped: np.ndarray

    def __len__(self) -> int:
        return len(self.best_epochs)

    def __getitem__(self, i: int) -> Any:
        """The flow of one member."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"expected a member below {len(self)}, got {i}.")
        return jax.tree.map(lambda leaf: leaf[i], self.flows)

    def mixture(self, context: ArrayLike | None = None) -> FlowMixture:
        """The mixture of all members with equal weights, whose spread shows what data leave open.

        :param context: of conditional flows, shape ``(*batch, context_dim)``.
        """
        if context is None:
            return FlowMixture(self.flows)
        return FlowMixture(jax.vmap(lambda flow: flow.condition(context))(self.flows))


def ensemble_of(results: list[Any]) -> Ensemble:
    """Results of ``fit`` as one.

    :raises ValueError: if the flows are of different structures.
    """

    def table(rows: list[np.ndarray]) -> np.ndarray:
        longest = max(map(len, rows))
        padded = [np.pad(r, (0, longest - len(r)), constant_values=np.nan) for r in rows]
        return np.array(padded)

    return Ensemble(
        stacked([result.flow for result in results]),
        table([result.train_losses for result in results]),
        table([result.val_losses for result in results]),
        np.array([result.best_epoch for result in results]),
        np.array([result.num_skipped for result in results]),
    )


def stacked(trees: list[Any]) -> Any:
    """Pytrees as one, whose arrays have a first axis over them.

    :raises ValueError: if they have different structures.
    """
    shapes: list[Any] = [
        jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), t) for t in trees
    ]
    for i, (tree, shape) in enumerate(zip(trees, shapes, strict=True)):
        structures: list[Any] = [jax.tree.structure(tree), jax.tree.structure(trees[0])]
        same = structures[0] == structures[1]
        if not same or jax.tree.leaves(shape) != jax.tree.leaves(shapes[0]):
            raise ValueError(
                f"build: expected flows of one structure for all keys, got {trees[0]} and, of key "
                f"{i}, {tree}. Sizes must not depend on the key."
            )
    return jax.tree.map(
        lambda *leaves: jnp.asarray(np.stack(list(map(np.asarray, leaves)))), *trees
    )
