r"""Maps from the real line to the support of each site, with a special one for angles.

NumPyro's ``biject_to`` maps the line onto the circle less the point :math:`\pm\pi`, so that a
posterior around that point falls into two far halves. Here an angle is unwound instead. To a model
with density :math:`p(\theta)` a latent winding number k is added with probabilities :math:`r(k \mid
\theta)`, and :math:`u = \theta + 2 \pi k` runs over the line with density :math:`p(\theta) \,
r(k \mid \theta)`, smooth where p is periodic. Marginally :math:`\theta` keeps its density, whatever
r is, and so do evidence and importance weights (an auxiliary variable: Agakov & Barber, 2004).

The same holds for elements without a density: what ``obs_mask=`` makes latent though it was
observed, and anything else that a mask hides and the model uses nowhere. Each such element is given
a standard normal density on the line, an auxiliary variable again, where it would drift to infinity
otherwise.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions import Normal, biject_to, constraints
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import sum_rightmost

#: Turns to each side that count: with a scale of pi the next has a share below exp(-24).
TURNS = 4


class Winding(Transform):
    r"""Points of the line as angles, with the log probability of their winding number.

    With :math:`v_k = u - c + 2 \pi k`, :math:`r \propto \exp(-v_0^2 / 2 s^2)` among all k: a soft
    window of width :math:`2 \pi` around c. A wrapped normal of scale s unwinds to the normal, a
    uniform angle nearly so with :math:`s = \pi`. ``log_abs_det_jacobian`` returns log r.

    :param centre: c, of the shape of the angles.
    :param scale: s, in radians; at most :math:`\pi`.
    """

    def __init__(self, centre: Array, scale: Array | float):
        self.centre = centre
        self.scale = scale

    @property
    def domain(self) -> Constraint:
        return constraints.real

    @property
    def codomain(self) -> Constraint:
        return constraints.circular

    def __call__(self, x: Array) -> Array:
        return wrapped(x)

    def _inverse(self, y: Array) -> Array:
        return self.centre + wrapped(y - self.centre)

    def log_abs_det_jacobian(self, x: Array, y: Array | None, intermediates: Any = None) -> Array:
        _, every = self._turned(x)
        return -0.5 * ((x - self.centre) / self.scale) ** 2 - jax.nn.logsumexp(every, axis=-1)

    def unwind(self, key: Array, y: Array) -> Array:
        """Angles on the line, their winding numbers drawn from their probabilities."""
        v, logits = self._turned(y)
        chosen = jax.random.categorical(key, logits)[..., None]
        return self.centre + jnp.take_along_axis(v, chosen, axis=-1)[..., 0]

    def _turned(self, x: Array) -> tuple[Array, Array]:
        """Each turn's v, and the logarithm of its window; the turns are the last axis."""
        turns = 2 * jnp.pi * jnp.arange(-TURNS, TURNS + 1, dtype=x.dtype)
        v = wrapped(x - self.centre)[..., None] + turns
        return v, -0.5 * (v / jnp.asarray(self.scale)[..., None]) ** 2

    def tree_flatten(self) -> Any:
        return (self.centre, self.scale), (("centre", "scale"), {})


def wrapped(angle: Array) -> Array:
    """The angle in [-pi, pi]; rounding may not leave the support."""
    turned = angle - 2 * jnp.pi * jnp.round(angle / (2 * jnp.pi))
    return jnp.clip(turned, -jnp.pi, jnp.pi)


def is_circular(support: Constraint) -> bool:
    """Whether a site holds angles."""
    return getattr(support, "base_constraint", support) is constraints.circular


def constrain(
    unconstrained: Mapping[str, Array],
    supports: Mapping[str, Constraint],
    event_dims: Mapping[str, int],
    windings: Mapping[str, Winding],
    idle: Mapping[str, Array],
) -> Iterator[tuple[str, Array, Array]]:
    """Name, value and log-determinant of each site, the latter of the site's batch shape.

    :param unconstrained: the sites' unconstrained values.
    :param supports: the sites' supports.
    :param event_dims: the sites' numbers of event axes.
    :param windings: what unwinds the sites that are angles.
    :param idle: elements of sites without a density; see :func:`with_idle`.
    """
    for name, point in unconstrained.items():
        transform = windings[name] if name in windings else biject_to(supports[name])
        value = transform(point)
        log_det = transform.log_abs_det_jacobian(point, value)
        log_det = sum_rightmost(log_det, log_det.ndim - value.ndim + event_dims[name])
        if name in idle:
            log_det = with_idle(log_det, point, idle[name])
        yield name, value, log_det


def with_idle(log_det: Array, unconstrained: Array, idle: Array) -> Array:
    """Log-determinants of a site, with the log density of its idle elements on the line.

    :param log_det: shape ``(*sample, *batch)``.
    :param unconstrained: the site's unconstrained values, ``(*sample, *batch, *event)``.
    :param idle: which elements have no density of their own, ``(*batch,)``.
    """
    on_the_line = Normal(0.0, 1.0).log_prob(unconstrained)
    return jnp.where(idle, sum_rightmost(on_the_line, unconstrained.ndim - log_det.ndim), log_det)
