"""The search for degrees of centring: a Gaussian fit in which they are learned as well."""

from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..compilation import jit
from .centring import Degrees
from .latent_space import LogDensity, advised, search_rows
from .normals import Matrix
from .preconditioner import (
    BATCH,
    NEARLY_EQUAL,
    WINDOW,
    Adam,
    Affine,
    Counted,
    Fit,
    Located,
    best_of,
    by_scores,
    locate,
)
from .supports import Winding

#: Steps of the fit.
NUM_STEPS: Final = 400
#: Draws by which candidates are compared.
NUM_DRAWS: Final = 512


class Recentred(NamedTuple):
    """An affine map onto the coordinates of some degrees of centring."""

    located: Located
    degrees: Degrees


@jit(once=True)
def rows_from_latent(density: LogDensity, x: Array) -> Array:
    """Points of the latent space, ``(n, dim)``, in the coordinates of a density."""
    return jax.vmap(lambda x: density.from_latent(x)[0])(x)


@jit(once=True)
def _by_degrees(
    density: LogDensity, windings: dict[str, Winding], degrees: Degrees, u: Array
) -> tuple[Array, tuple[Array, Degrees]]:
    """Log densities at rows, their gradients, and the mean gradient with respect to the degrees."""
    plain = density.centred(None)

    def one(u: Array, degrees: Degrees) -> Array:
        x, log_det = density.centred(degrees).to_latent(u)
        return plain.unwound(x, windings) + log_det

    values, (grads, slopes) = jax.vmap(jax.value_and_grad(one, argnums=(0, 1)), in_axes=(0, None))(
        u, degrees
    )
    return values, (grads, jax.tree.map(lambda slope: slope.mean(0), slopes))


def recentre(
    density: LogDensity, seed: Any, starts: Matrix, init_scale: float, plain: Located
) -> Recentred | None:
    """Find degrees of centring, and an affine map onto their coordinates, by the ELBO.

    Variationally inferred parameters (Gorinova, Moore & Hoffman, 2020, arXiv:1906.03028), begun at
    the better of the centred and the non-centred form.

    :param density: the model's log density, over its latent space.
    :param seed: seed of NumPy's generator for the draws.
    :param starts: where the search begins, ``(n, dim)``, in the latent space.
    :param init_scale: spread around the starts.
    :param plain: what was found in the latent space itself.
    :return: None where that is better.
    """
    dim, dtype = density.space.dim, jnp.result_type(float)
    rng = np.random.default_rng(seed)

    def rows_at(degrees: Degrees) -> Any:
        return search_rows(density.centred(degrees), np.asarray(starts[0], dtype))

    non_centred, of_centred = (
        (jnp.full(dim, x, dtype), jnp.full(dim, x, dtype)) for x in (0.0, 1.0)
    )
    begin = np.asarray(rows_from_latent(density.centred(non_centred), np.asarray(starts, dtype)))
    found = [(plain, of_centred)]
    if (finite := np.isfinite(begin).all(axis=1)).any():
        found.append((locate(rows_at(non_centred), seed, begin[finite], init_scale), non_centred))
    begun, degrees = max(found, key=lambda each: each[0].elbo)
    num_gradients = sum(located.num_gradients for located, _ in found)
    if not np.isfinite(begun.elbo):
        return None
    noise = rng.normal(size=(NUM_DRAWS, dim))
    candidates = [(located.affine, degrees) for located, degrees in found]
    fitted = _fitted(density, begun.affine, degrees, starts, rng)
    if fitted is not None:
        # The degrees have moved since scores were matched, and many coordinates with them.
        rows = Counted(rows_at(fitted[1]))
        candidates += [(affine, fitted[1]) for affine in by_scores(rows, fitted[0], rng)]
        num_gradients += rows.num_gradients
        candidates.append(fitted)
    judged = [(best_of(rows_at(d), [affine], noise), d) for affine, d in candidates]
    num_gradients += len(judged) * NUM_DRAWS + NUM_STEPS * BATCH
    (affine, elbo), degrees = max(judged, key=lambda each: each[0][1])
    if affine is None or degrees is of_centred:
        return None
    return Recentred(Located(affine, elbo, num_gradients), degrees)


def _fitted(
    density: LogDensity, affine: Affine, degrees: Degrees, starts: Matrix, rng: np.random.Generator
) -> tuple[Affine, Degrees] | None:
    """Affine map and degrees after the fit."""
    dtype, dim = jnp.result_type(float), density.space.dim
    windings = density.space.windings(np.asarray(starts[0], dtype))
    fit, values = Fit(affine, NUM_STEPS), np.array(degrees, float)
    adam, spreads = Adam(values.shape, NUM_STEPS), []
    for _ in range(NUM_STEPS):
        noise = rng.normal(size=(BATCH, dim))
        now: Degrees = tuple(np.asarray(values, dtype))
        with advised():
            found = _by_degrees(density, windings, now, np.asarray(fit.points(noise), dtype))
            log_density, (grads, slopes) = jax.tree.map(lambda a: np.asarray(a, float), found)
        spreads.append(fit.step(noise, log_density, grads).var())
        step = adam.step(-np.array(slopes), largest=10.0 * dim**0.5)
        values = np.clip(values - step, 0.0, 1.0)
        if len(spreads) >= 2 * WINDOW and np.mean(spreads[-WINDOW:]) < NEARLY_EQUAL:
            break
    current = fit.current()
    return (current, tuple(np.asarray(values, dtype))) if current.is_finite() else None
