"""The elementwise layer: one scalar map per coordinate, with learned parameters."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from ..checks import check_key
from ..elementwise import ElementwiseMap, check_map
from ..nn import Parameters
from ..transform import ColumnTransform


class Elementwise(ColumnTransform):
    r"""Elementwise layer: :math:`y_i = g(x_i; \theta_i(c))`, no coordinate sees another.

    It ends a flow where the marginals need something that the other layers lack, such as heavy
    tails. With a context c, a network adds to the learned parameters :math:`\theta` what the
    context asks for. A new layer is the identity.

    Cost: that of the map, and with a context one pass of the network.

    :param key: ``jax.random.key`` for the network; without a context nothing is drawn.
    :param dim: number of coordinates; x and y have shape ``(*batch, dim)``.
    :param map: the elementwise map g.
    :param context_dim: width of the context, 0 for none.
    :param hidden: widths of the network's hidden layers.
    :param activation: name of the network's activation.
    :raises ValueError: for sizes below 1 or an unknown activation.
    :raises TypeError: for a key that is not one, sizes that are no integers, or a map that is no
        ``ElementwiseMap``.

    >>> import jax, numpyro_flows as nf
    >>> from numpyro_flows.elementwise import HeavyTail
    >>> flow = nf.realnvp(jax.random.key(0), 3)
    >>> tails = nf.transforms.Elementwise(jax.random.key(1), 3, HeavyTail())
    >>> nf.FlowDistribution(flow.base_dist, nf.transforms.Chain([flow.transform, tails]))
    FlowDistribution(Normal -> 8 x Coupling(Affine) -> Elementwise(HeavyTail), batch_shape=(),
                     event_shape=(3,), parameters=36390)
    """

    map: ElementwiseMap
    params: Parameters

    def __init__(
        self,
        key: Array,
        dim: int,
        map: ElementwiseMap,
        *,
        context_dim: int = 0,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
    ):
        self.map = check_map(map)
        self._set_sizes(dim, context_dim)
        self.params = Parameters(
            check_key(key),
            jnp.zeros(map.num_params * dim),
            context_size=context_dim,
            hidden=hidden,
            activation=activation,
        )

    def _inside(self) -> str:
        return type(self.map).__name__

    def _apply(self, step: Callable, value: Array, context: Array | None) -> tuple[Array, Array]:
        params = self.params(context).reshape(self.map.num_params, self.dim, -1)
        params = jnp.broadcast_to(params, (self.map.num_params, *value.shape))
        moved, log_det = step(value, params)
        return moved, log_det.sum(0)

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._apply(self.map.forward_and_log_det, x, context)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._apply(self.map.inverse_and_log_det, y, context)
