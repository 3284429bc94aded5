"""A context whose columns span orders of magnitude, compressed before a transform sees it."""

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ..parts import Fixed
from ..transform import FlowTransform, Wrapper


class CompressedContext(Wrapper):
    r"""A transform of a context in logarithmic columns: :math:`T(x; \sinh^{-1}((c - a) / b))`.

    The inverse hyperbolic sine is linear up to b around a and logarithmic beyond, on both sides;
    columns with :math:`b = \infty` stay as they are. A context is given, so any injective function
    of it leaves the density exact. ``nf.fit`` puts it around ``Standardized`` where a column of
    the context spans orders of magnitude.

    Source: Burbidge, Magee & Robb (1988), Journal of the American Statistical Association 83(401).

    :param transform: the transform T, with ``context_dim > 0``.
    :param centre: a, shape ``(context_dim,)`` or a number.
    :param width: b, positive, of the same shape.
    :raises ValueError: for numbers of another shape.

    >>> import jax, jax.numpy as jnp, numpyro_flows as nf
    >>> core = nf.realnvp(jax.random.key(0), 2, context_dim=2).transform
    >>> t = CompressedContext(core, 0.0, jnp.array([1e-3, jnp.inf]))
    >>> t.compress(jnp.array([[1.0, 1.0], [1000.0, 2.0]])).round(1)
    Array([[ 7.6,  1. ],
           [14.5,  2. ]], dtype=float32)
    """

    centre: Fixed
    width: Fixed

    def __init__(self, transform: FlowTransform, centre: ArrayLike, width: ArrayLike):
        self.transform = transform
        shape = (transform.context_dim,)
        for name, value in (("centre", centre), ("width", width)):
            if jnp.shape(value) not in ((), shape):
                raise ValueError(f"{name}: expected shape {shape}, got {jnp.shape(value)}.")
        self.centre, self.width = (
            Fixed(jnp.broadcast_to(jnp.asarray(value, jnp.result_type(float, value)), shape))
            for value in (centre, width)
        )

    def compress(self, context: Array | None) -> Array | None:
        """The context as T sees it."""
        if context is None:
            return None
        is_linear = jnp.isinf(self.width.value)
        width = jnp.where(is_linear, 1.0, self.width.value)
        return jnp.where(is_linear, context, jnp.arcsinh((context - self.centre.value) / width))

    def _forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.forward_and_log_det(x, self.compress(context))

    def _inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.inverse_and_log_det(y, self.compress(context))

    def _initialized(
        self, value: Array, context: Array | None, forward: bool
    ) -> tuple[FlowTransform, Array]:
        transform, value = self.transform._initialized(value, self.compress(context), forward)
        return eqx.tree_at(lambda t: t.transform, self, transform), value
