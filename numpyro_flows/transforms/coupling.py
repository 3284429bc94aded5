"""The coupling layer: half of the coordinates determine an elementwise map of the others."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from ..elementwise import Conditioner, ElementwiseMap, Encoding, check_map
from ..transform import ColumnTransform


class Coupling(ColumnTransform):
    r"""Coupling layer: :math:`y_A = x_A`, :math:`y_B = g(x_B; \theta(x_A, c))`.

    A is the first ``dim // 2`` coordinates, B the others, g an elementwise map and :math:`\theta`
    an :class:`~numpyro_flows.nn.MLP`. The Jacobian is triangular, so its log-determinant is the
    sum of the scalar ones. With ``dim = 1``, A is empty: the layer is then the elementwise map
    itself with parameters that are learned (and depend on the context, if there is one).

    A new layer is the identity. Both directions cost one pass of the network.

    Source: Dinh, Krueger & Bengio (2015), arXiv:1410.8516, section 3.1; Dinh, Sohl-Dickstein &
    Bengio (2017), arXiv:1605.08803, eq. 4-5.

    :param key: ``jax.random.key`` for the network.
    :param dim: number of coordinates; x and y have shape ``(*batch, dim)``.
    :param map: the elementwise map g.
    :param hidden: widths of the network's hidden layers.
    :param context_dim: width of the context, 0 for none.
    :param activation: name of the network's activation.
    :param residual: whether the hidden layers are residual blocks (of equal widths).
    :param encoding: how the network reads the coordinates, such as
        :class:`~numpyro_flows.elementwise.Angles`; as real numbers by default.
    :raises ValueError: for sizes below 1 or an unknown activation.

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_flows.elementwise import Affine
    >>> layer = Coupling(jax.random.key(0), 3, Affine())
    >>> y, log_det = layer.forward_and_log_det(jnp.ones((5, 3)))
    >>> y.shape, log_det.shape
    ((5, 3), (5,))
    """

    map: ElementwiseMap
    conditioner: Conditioner

    def __init__(
        self,
        key: Array,
        dim: int,
        map: ElementwiseMap,
        *,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: str = "relu",
        residual: bool = False,
        encoding: Encoding | None = None,
    ):
        self._set_sizes(dim, context_dim)
        self.map = check_map(map)
        passing = dim // 2
        self.conditioner = Conditioner(
            key,
            passing,
            map.num_params * (dim - passing),
            encoding=encoding,
            hidden=hidden,
            context_size=context_dim,
            activation=activation,
            residual=residual,
        )

    def _inside(self) -> str:
        return type(self.map).__name__

    def _couple(self, step: Callable, value: Array, context: Array | None) -> tuple[Array, Array]:
        half, net = self.dim // 2, self.conditioner
        passing, moving = value[:half], value[half:]
        params = net(net.encoding[:half].read(passing), context)
        params = params.reshape(self.map.num_params, *moving.shape)
        params = net.encoding[half:].mark(self.map, params)
        moved, log_det = step(moving, params)
        return jnp.concatenate([passing, moved]), log_det.sum(0)

    def forward_columns(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._couple(self.map.forward_and_log_det, x, context)

    def inverse_columns(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._couple(self.map.inverse_and_log_det, y, context)
