"""A map from a base space to a model's latent space: what guides, NeuTra and samplers share."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions import Distribution

from ..compilation import jit
from ..distribution import FlowDistribution
from ..transform import FlowTransform
from .latent_space import LatentSpace, LogDensity, Sites
from .supports import Winding

#: Draws whose densities are computed at once.
BATCH = 500


class LearnedMap(eqx.Module):
    r"""A flow over the latent space of a model, with the model's density; an immutable pytree.

    With T the flow's transform, u in its base space has density
    :math:`p(T(u)) \, |\det T'(u)|` under the model, close to the base distribution if the flow is
    close to the posterior.

    :ivar density: the model's log density at the arguments that the map was learned for.
    :ivar flow: the flow, over the coordinates of ``density``: the latent space, or what its sites
        are with some degree of centring.
    :ivar windings: what unwinds angles, by site.
    """

    density: LogDensity
    flow: FlowDistribution
    windings: dict[str, Winding]

    @property
    def space(self) -> LatentSpace:
        """The latent space."""
        return self.density.space

    @property
    def base(self) -> Distribution:
        """The base distribution, of event shape ``(dim,)``."""
        return self.flow.base_dist

    @property
    def transform(self) -> FlowTransform:
        """From the base space to the coordinates of ``density``."""
        return self.flow.transform

    def to_latent(self, u: Array) -> Array:
        """Points of the latent space at u in the base space, both ``(*batch, dim)``."""
        return self.density.points(self.density.to_latent, self.transform(u))

    def from_latent(self, x: Array) -> Array:
        """Points of the base space at x in the latent space, both ``(*batch, dim)``."""
        u = self.density.points(self.density.from_latent, x)
        return self.transform.inv(self.space.wind(u, self.windings))

    def log_density(self, u: Array) -> Array:
        """Log density of the model at u in the base space, up to a constant; u of ``(dim,)``."""
        x, log_det = self.transform.forward_and_log_det(u)
        return self.density.unwound(x, self.windings) + log_det

    def sample_start(self, key: Array, num_tries: int = 20) -> Array:
        """A draw of the base at which the log density is finite, ``(dim,)``.

        :param key: ``jax.random.key``.
        :param num_tries: draws that are tried; if none is finite, the last.
        """
        draws = self.base.sample(key, (num_tries,))
        finite = jnp.isfinite(jax.lax.map(self.log_density, draws))
        return draws[jnp.where(finite.any(), jnp.argmax(finite), -1)]

    def to_sites(self, u: Array) -> Sites:
        """Values of the latent and deterministic sites at u in the base space, ``(dim,)``."""
        return self.density.sites(self.transform(u))


class Weighted(NamedTuple):
    """Draws of a guide: the sites, and log densities of model and guide at the latent ones."""

    sites: Sites
    log_p: Array
    log_q: Array


def draw(learned: LearnedMap, key: Array, num_draws: int) -> Weighted:
    """Draws of a map's flow, with the log densities of model and flow at them.

    :param key: ``jax.random.key``.
    :return: shapes ``(num_draws, ...)``; log densities are those of the sites' values.
    """
    size = min(num_draws, BATCH)
    return _draw(learned, key, -(-num_draws // size), size, num_draws)


@jit(static_argnums=(2, 3, 4), once=True)
def _draw(learned: LearnedMap, key: Array, num_batches: int, size: int, num_draws: int) -> Weighted:
    space, windings = learned.space, learned.windings

    def at(u: Array, key: Array) -> tuple[Sites, Array, Array]:
        x, spread = learned.density.to_latent(u)
        value, sites = learned.density.at_latent(x, key)
        steps = space.constrain(x, windings)
        log_det = sum((log_det.sum() for _, _, log_det in steps), jnp.zeros((), x.dtype))
        return sites, value + space.log_winding(x, windings) - log_det, log_det + spread

    def batch(key: Array) -> Weighted:
        draw_key, model_key = jax.random.split(key)
        z = learned.base.sample(draw_key, (size,))
        x, moved = learned.transform.forward_and_log_det(z)
        sites, log_p, log_det = jax.vmap(at)(x, jax.random.split(model_key, size))
        return Weighted(sites, log_p, learned.base.log_prob(z) - moved - log_det)

    found = jax.lax.map(batch, jax.random.split(key, num_batches))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:num_draws], found)
