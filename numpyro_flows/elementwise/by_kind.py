"""An elementwise map for layers that hold both real coordinates and angles."""

from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from .base import ElementwiseMap


class ByKind(ElementwiseMap):
    """One elementwise map for real coordinates and another for angles.

    The kind of a coordinate is one more row of parameters, which :meth:`Angles.mark` adds: 1 for
    an angle, 0 for a real coordinate. Both maps are computed, at the cost of both, so that layers
    of one scan may differ in which coordinates are angles.

    :param real: map of the real coordinates.
    :param circular: map of the circle [-pi, pi) onto itself.

    >>> from numpyro_flows.elementwise import Affine, CircularSpline
    >>> ByKind(Affine(), CircularSpline(4)).num_params > Affine().num_params
    True
    """

    real: ElementwiseMap
    circular: ElementwiseMap
    reads_kinds: ClassVar[bool] = True

    @property
    def num_params(self) -> int:
        return max(self.real.num_params, self.circular.num_params)

    def _choose(
        self, angle: Array, real: tuple[Array, Array], circular: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        return jnp.where(angle, circular[0], real[0]), jnp.where(angle, circular[1], real[1])

    def _parts(self, params: Array) -> tuple[Array, Array, Array]:
        n, m = self.real.num_params, self.circular.num_params
        return params[-1] > 0, params[:n], params[:m]

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        angle, real, circular = self._parts(params)
        return self._choose(
            angle,
            self.real.forward_and_log_det(x, real),
            self.circular.forward_and_log_det(x, circular),
        )

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        angle, real, circular = self._parts(params)
        return self._choose(
            angle,
            self.real.inverse_and_log_det(y, real),
            self.circular.inverse_and_log_det(y, circular),
        )
