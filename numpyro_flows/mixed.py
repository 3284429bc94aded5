"""Mixed and discrete data with an exact likelihood: a flow some of whose columns are integers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import Distribution

from .checks import check_event_shape, check_size
from .distribution import FlowDistribution
from .transform import FlowTransform


class MixedFlow(FlowDistribution):
    r"""A flow of vectors with discrete and continuous columns, and an exact ``log_prob``.

    .. math:: p(d, r \mid c) = \prod_i P(d_i \mid d_{<i}, c) \; p(r \mid d, c)

    a mass in the discrete columns d and a density in the others r, of one pass of the networks: no
    noise and no bound. Recipes make it where ``support`` has ``constraints.integer_interval`` or
    ``constraints.boolean``; in a model it stands where any distribution does, with ``obs=`` as
    well. Values are vectors of floating numbers, integers among them; where all columns are
    discrete, of integers.

    Values beyond the levels have the log mass :math:`-\infty`. Draws have no gradient in their
    discrete columns.

    :param base_dist: distribution of z, uniform on [0, 1) where columns are discrete.
    :param transform: ends in or holds a :class:`~numpyro_flows.transforms.Mixed`.
    :param discrete: for each column whether it is.
    :param levels: for each column its lowest level and the number of levels; anything where the
        column is not discrete.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> from numpyro.distributions import constraints
    >>> support = (constraints.real, constraints.integer_interval(0, 4), constraints.boolean)
    >>> flow = nf.nsf_ar(jax.random.key(0), 3, support=support)
    >>> flow.log_prob(jnp.array([0.3, 2, 1])).round(2)  # log N(0.3; 0, 1) / 10
    Array(-3.27, dtype=float32)
    """

    pytree_aux_fields = ("levels",)

    def __init__(
        self,
        base_dist: Distribution,
        transform: FlowTransform,
        levels: Sequence[tuple[int, int] | None],
        *,
        validate_args: bool | None = None,
    ):
        self.levels = tuple(levels)
        super().__init__(base_dist, transform, validate_args=validate_args)

    @property
    def discrete(self) -> tuple[bool, ...]:
        """Which columns are integers."""
        return tuple(of_one is not None for of_one in self.levels)

    @property
    def has_rsample(self) -> bool:
        return False

    def _read(self, value: ArrayLike) -> Array:
        """Values as the transform sees them: integers in the middle of their cells."""
        whole = jnp.asarray(value)
        if all(self.discrete) and not jnp.issubdtype(whole.dtype, jnp.floating):
            value = whole.astype(jnp.result_type(float))
        read = super()._read(value)
        return read + 0.5 * jnp.array(self.discrete, read.dtype)

    def sample_with_intermediates(
        self, key: Array | None, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, list[Any]]:
        x, intermediates = super().sample_with_intermediates(key, sample_shape)
        x = jnp.where(jnp.array(self.discrete), jnp.floor(x), x)
        return x.astype(int) if all(self.discrete) else x, intermediates

    def conditional_log_masses(self, value: ArrayLike, column: int) -> Array:
        r"""Log masses of the levels of one discrete column, given all other columns, exactly.

        .. math:: \log P(x_j = k \mid x_{-j}, c)

        by one pass for each level: what imputes a missing entry, or predicts a class.

        :param value: shape ``(*sample, *batch_shape, dim)``; what ``column`` holds is not looked
            at.
        :param column: which column, of those that are discrete.
        :return: shape ``(*sample, *batch_shape, levels)``, from the lowest level on.
        :raises ValueError: for a column that is not discrete, a wrong shape, or a conditional flow
            without its context.
        :raises TypeError: for a column that is no integer.

        >>> import jax, jax.numpy as jnp, numpyro_flows as nf
        >>> from numpyro.distributions import constraints
        >>> flow = nf.nsf_ar(jax.random.key(0), 2, support=(constraints.boolean, constraints.real))
        >>> jnp.exp(flow.conditional_log_masses(jnp.array([jnp.nan, 0.3]), 0))
        Array([0.5, 0.5], dtype=float32)
        """
        check_size("column", column, minimum=0)
        if column >= len(self.levels) or (levels := self.levels[column]) is None:
            which = [i for i, flag in enumerate(self.discrete) if flag]
            raise ValueError(f"column: expected one of the discrete columns {which}, got {column}.")
        value = jnp.asarray(value)
        check_event_shape("value", value.shape, self.event_shape)

        def at(level: Array) -> Array:
            return self.log_prob(value.at[..., column].set(level.astype(value.dtype)))

        start, count = levels
        log_masses = jax.lax.map(at, start + jnp.arange(count))
        return jax.nn.log_softmax(jnp.moveaxis(log_masses, 0, -1), axis=-1)

    def enumerate_support(self, expand: bool = True) -> Array:
        raise NotImplementedError(
            f"{type(self).__name__}: the values of its discrete columns are too many to "
            "enumerate. `conditional_log_masses` enumerates one column given the others."
        )
