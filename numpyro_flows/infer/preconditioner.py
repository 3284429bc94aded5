r"""Where a posterior lies and how wide it is: an affine map found by optimisation, then frozen.

A flow that starts near the identity learns the shape of a posterior well and its place and scale
badly: in raw coordinates one step size has to serve scales that may differ a millionfold. So the
posterior is first located roughly by :math:`\theta = A u`, A affine, chosen by its ELBO with a
standard normal u among three kinds of candidates:

- the start itself, with a small spread;
- the points along several L-BFGS paths, each with the inverse Hessian that L-BFGS knows there
  (Pathfinder: Zhang, Carpenter, Gelman & Vehtari, 2022, arXiv:2108.03782). The ELBO, not the
  density, picks the point: on a funnel the mode is far from the mass. In many dimensions a path
  runs in coordinates scaled by a rough diagonal of the Hessian;
- the best of these after a short Gaussian variational fit in its own coordinates.

Only first derivatives of the log density are taken, in reverse mode.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ..transforms import FixedAffine

LogDensity: TypeAlias = Callable[[Array], Array]

#: Curvature pairs that L-BFGS keeps; up to twice as many coordinates have a full covariance.
HISTORY = 20
#: Candidates whose ELBO is computed at once.
BATCH = 32
#: Largest dimension in which the Gaussian fit has a full covariance.
FULL = 128
#: Rounds in which scales are estimated beyond that, and probes of each.
ROUNDS, PROBES = 8, 16


def _rough_scale(
    log_density: LogDensity,
    key: Array,
    start: Array,
    init_scale: float,
) -> Array:
    r"""Rough scales :math:`|\mathrm{diag}\, H|^{-1/2}` around a point, shape ``(dim,)``.

    Hutchinson's estimate of the diagonal (Bekas, Kokiopoulou & Saad, 2007) from differences of
    gradients at :math:`x \pm s \odot z`, z random signs. What the other coordinates add in noise
    falls with their own scales, so each round probes with the scales of the last.
    """

    def one_round(scale: Array, key: Array) -> tuple[Array, None]:
        z = jax.random.rademacher(key, (PROBES, len(start)), start.dtype)
        gradient = jax.vmap(jax.grad(log_density))
        difference = gradient(start + scale * z) - gradient(start - scale * z)
        curvature = jnp.abs((difference * z).mean(0)) / (2 * scale)
        after = jax.lax.rsqrt(jnp.maximum(curvature, jnp.finfo(start.dtype).tiny))
        after = jnp.clip(after, scale / 10, 10 * scale)
        return jnp.where(jnp.isfinite(curvature), after, scale / 10), None

    scale = jnp.full_like(start, init_scale)
    return jax.lax.scan(one_round, scale, jax.random.split(key, ROUNDS))[0]


class _Path(NamedTuple):
    """An L-BFGS path: positions, gradients of the log density, and diagonal inverse Hessians.

    ``num_gradients`` is what it took, line searches included.
    """

    x: Array
    grad: Array
    diagonal: Array
    num_gradients: Array


def _lbfgs_path(log_density: LogDensity, start: Array, num_steps: int) -> _Path:
    """Maximise from one start; arrays of shape ``(num_steps, dim)``."""

    def loss(x: Array) -> Array:
        return -log_density(x)

    optimizer = optax.lbfgs(memory_size=HISTORY)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        x, state = carry
        value, grad = value_and_grad(x, state=state)
        updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=loss)
        after = optax.apply_updates(x, updates)
        searched = optax.tree_utils.tree_get(state, "num_linesearch_steps")
        return (after, state), (x, -grad, searched)

    _, (x, grad, searched) = jax.lax.scan(step, (start, optimizer.init(start)), length=num_steps)

    def widen(diagonal, pair):
        s, y = pair
        diagonal = _updated_diagonal(diagonal, s, y)
        return diagonal, diagonal

    diagonal = jnp.ones_like(start)
    _, diagonals = jax.lax.scan(widen, diagonal, (jnp.diff(x, axis=0), -jnp.diff(grad, axis=0)))
    return _Path(x, grad, jnp.concatenate([diagonal[None], diagonals]), searched.sum())


def _usable(s: Array, y: Array) -> Array:
    """Whether a pair has curvature worth trusting."""
    b, square = s @ y, y @ y
    return jnp.isfinite(square) & (b > 1e-12 * square) & (square > 0)


def _updated_diagonal(diagonal: Array, s: Array, y: Array) -> Array:
    """The diagonal inverse Hessian after one more pair (Gilbert & Lemarechal, 1989)."""
    usable = _usable(s, y)
    s, y = jnp.where(usable, s, 1.0), jnp.where(usable, y, 1.0)
    a, b, c = (y**2 * diagonal).sum(), (s * y).sum(), (s**2 / diagonal).sum()
    inverse = a / (b * diagonal) + y**2 / b - a * s**2 / (b * c * diagonal**2)
    after = 1 / inverse
    good = usable & (jnp.isfinite(after) & (after > 0)).all()
    return jnp.where(good, after, diagonal)


def _gaussian(x: Array, grad: Array, diagonal: Array, s: Array, y: Array) -> FixedAffine:
    r"""The normal at one point of a path, from the pairs before it, each of shape (HISTORY, dim).

    The inverse Hessian is :math:`\mathrm{diag}(\alpha) + B \Gamma B^\top` with
    :math:`B = [\alpha Y, S]` (Zhang et al., algorithm 3). With
    :math:`\alpha^{-1/2} B = Q R`, its root is :math:`\alpha^{1/2} (I + Q (L - I) Q^\top)` where
    :math:`L L^\top = I + R \Gamma R^\top`.
    """
    usable = jax.vmap(_usable)(s, y)
    s, y = jnp.where(usable[:, None], s, 0.0), jnp.where(usable[:, None], y, 0.0)
    root = jnp.sqrt(diagonal)
    products = s @ y.T
    # A missing pair is a row and a column of zeros; the 1 keeps the triangle invertible.
    upper = jnp.triu(products) + jnp.diag(jnp.where(usable, 0.0, 1.0))
    inverse = jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(s), dtype=s.dtype))
    eta = jnp.diag(jnp.where(usable, jnp.diag(products), 0.0))
    corner = inverse.T @ (eta + (y * diagonal) @ y.T) @ inverse
    gamma = jnp.block([[jnp.zeros_like(corner), -inverse], [-inverse.T, corner]])
    frame, r = jnp.linalg.qr(jnp.concatenate([y * root, s / root]).T)
    inner = r @ gamma @ r.T
    core = jnp.linalg.cholesky(jnp.eye(len(inner), dtype=s.dtype) + (inner + inner.T) / 2)
    step = root * grad
    move = step + frame @ (inner @ (frame.T @ step))
    return FixedAffine(x + root * move, root, frame, core)


def _path_gaussians(path: _Path) -> FixedAffine:
    """The normals at points along one path, stacked."""
    num, dim = path.x.shape
    s, y = jnp.diff(path.x, axis=0), -jnp.diff(path.grad, axis=0)
    empty = jnp.zeros((HISTORY, dim), s.dtype)
    s, y = jnp.concatenate([empty, s]), jnp.concatenate([empty, y])

    # The first points are far apart, later ones are close and many.
    points = np.unique(np.r_[np.arange(min(40, num)), np.arange(0, num, 5), num - 1])

    def at(i: Array) -> FixedAffine:
        before = [jax.lax.dynamic_slice_in_dim(a, i, HISTORY) for a in (s, y)]
        return _gaussian(path.x[i], path.grad[i], path.diagonal[i], *before)

    return jax.lax.map(at, jnp.asarray(points))


def _elbo(log_density: LogDensity, affine: FixedAffine, noise: Array) -> Array:
    """ELBO of the normal ``affine`` with these base draws, shape ``(n, dim)``."""
    theta, log_det = affine.forward_and_log_det(noise)
    log_q = jax.scipy.stats.norm.logpdf(noise).sum(-1) - log_det
    return (jax.vmap(log_density)(theta) - log_q).mean()


def _best(affines: FixedAffine, elbos: Array) -> FixedAffine:
    index = jnp.argmax(elbos)
    return jax.tree.map(lambda leaf: leaf[index], affines)


def _concatenate(a: FixedAffine, b: FixedAffine) -> FixedAffine:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def _triangular(affine: FixedAffine, factor: Array) -> FixedAffine:
    """``affine`` after a lower triangular ``factor``, as one lower triangular map."""
    frame, core = affine.frame.value, affine.core.value
    dim = len(factor)
    identity = jnp.eye(dim, dtype=factor.dtype)
    inner = identity + frame @ (core - jnp.eye(len(core), dtype=core.dtype)) @ frame.T
    matrix = affine.scale.value[:, None] * (inner @ factor)
    length = jnp.sqrt((matrix**2).sum(1))
    # A triangular root without forming the covariance, whose condition is the matrix's squared.
    upper = jnp.linalg.qr((matrix / length[:, None]).T, mode="r")
    sign = jnp.where(jnp.diagonal(upper) < 0, -1.0, 1.0)
    return FixedAffine(affine.loc.value, length, identity, (upper * sign[:, None]).T)


class Gaussian(NamedTuple):
    """A normal in the coordinates of another: mean, log standard deviations, strict lower part."""

    mean: Array
    log_diagonal: Array
    below: Array | None

    def factor(self) -> Array:
        diagonal = jnp.diag(jnp.exp(self.log_diagonal))
        return diagonal if self.below is None else diagonal + jnp.tril(self.below, -1)


def moved(affine: FixedAffine, gaussian: Gaussian) -> FixedAffine:
    """``affine`` after the map onto a normal in its coordinates."""
    loc = affine(gaussian.mean)
    if gaussian.below is not None:
        there = FixedAffine(loc, affine.scale.value, affine.frame.value, affine.core.value)
        return _triangular(there, gaussian.factor())
    scale = affine.scale.value * jnp.exp(gaussian.log_diagonal)
    return FixedAffine(loc, scale, affine.frame.value, affine.core.value)


def _fit(
    log_density: LogDensity, key: Array, affine: FixedAffine, num_steps: int, num_particles: int
) -> FixedAffine:
    """``affine`` improved by a Gaussian variational fit, with the path gradient."""
    dim, dtype = affine.dim, affine.loc.value.dtype
    full = dim <= FULL

    def theta_and_log_q(gaussian: Gaussian, noise: Array) -> tuple[Array, Array]:
        if not full:
            to = moved(affine, gaussian)
            theta = to(noise)
            x, log_det = jax.lax.stop_gradient(to).inverse_and_log_det(theta)
            return theta, jax.scipy.stats.norm.logpdf(x).sum(-1) + log_det
        u = gaussian.mean + noise @ gaussian.factor().T
        held = jax.lax.stop_gradient(gaussian)
        x = jax.scipy.linalg.solve_triangular(held.factor(), (u - held.mean).T, lower=True).T
        theta, log_det = affine.forward_and_log_det(u)
        log_q = jax.scipy.stats.norm.logpdf(x).sum(-1) - held.log_diagonal.sum() - log_det
        return theta, log_q

    def loss(gaussian: Gaussian, noise: Array) -> Array:
        theta, log_q = theta_and_log_q(gaussian, noise)
        return (log_q - jax.vmap(log_density)(theta)).mean()

    schedule = optax.cosine_decay_schedule(0.05, num_steps)
    optimizer = optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(10.0 * dim**0.5), optax.adam(schedule)), num_steps
    )
    start = Gaussian(
        jnp.zeros(dim, dtype), jnp.zeros(dim, dtype), jnp.zeros((dim, dim), dtype) if full else None
    )

    def step(carry, key):
        gaussian, state = carry
        grads = jax.grad(loss)(gaussian, jax.random.normal(key, (num_particles, dim), dtype))
        updates, state = optimizer.update(grads, state, gaussian)
        return (optax.apply_updates(gaussian, updates), state), None

    keys = jax.random.split(key, num_steps)
    (gaussian, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), keys)
    return moved(affine, gaussian)


class Located(NamedTuple):
    """The affine map found, its ELBO with a standard normal base, and the gradients it took."""

    affine: FixedAffine
    elbo: Array
    num_gradients: Array


def locate(
    log_density: LogDensity,
    key: Array,
    starts: Array,
    init_scale: float,
    *,
    num_path_steps: int = 400,
    num_fit_steps: int = 400,
    num_particles: int = 16,
    num_draws: int = 128,
) -> Located:
    """Find an affine map from a standard normal to roughly where ``log_density`` has its mass.

    :param log_density: from ``(dim,)`` to a scalar, up to a constant.
    :param key: ``jax.random.key``.
    :param starts: where the paths begin, shape ``(num_starts, dim)``.
    :param init_scale: spread around the starts, in raw units.
    :param num_path_steps: L-BFGS steps per path.
    :param num_fit_steps: steps of the Gaussian fit.
    :param num_particles: draws per step of the fit, and half of it per point of a path.
    :param num_draws: draws by which the last candidates are compared.
    """
    dim = starts.shape[1]
    rank = min(dim, 2 * HISTORY)
    few_key, many_key, *fit_keys = jax.random.split(key, 4)
    wide = dim > FULL

    def judge(affines: FixedAffine, key: Array, n: int) -> Array:
        noise = jax.random.normal(key, (n, dim), starts.dtype)
        # With batches that leave no remainder the model is compiled once, else twice.
        sizes = range(BATCH, BATCH // 2, -1)
        size = next((size for size in sizes if len(affines.loc.value) % size == 0), BATCH)
        elbos = jax.lax.map(
            lambda affine: _elbo(log_density, affine, noise), affines, batch_size=size
        )
        return jnp.where(jnp.isfinite(elbos), elbos, -jnp.inf)

    def begin(start: Array) -> FixedAffine:
        frame = jnp.eye(dim, rank, dtype=starts.dtype)
        return FixedAffine(start, init_scale, frame, jnp.eye(rank, dtype=starts.dtype))

    def along(start: Array, key: Array) -> tuple[FixedAffine, Array]:
        if not wide:
            path = _lbfgs_path(log_density, start, num_path_steps)
            return _path_gaussians(path), path.num_gradients
        # HISTORY pairs of a path cannot hold as many scales as there are coordinates.
        unit = _rough_scale(log_density, key, start, init_scale)
        path = _lbfgs_path(lambda v: log_density(start + unit * v), 0 * start, num_path_steps)
        affines = _path_gaussians(path)
        moved = eqx.tree_at(
            lambda affine: (affine.loc.value, affine.scale.value),
            affines,
            (start + unit * affines.loc.value, unit * affines.scale.value),
        )
        return moved, path.num_gradients + 2 * ROUNDS * PROBES

    path_keys = jax.random.split(jax.random.fold_in(key, 1), len(starts))
    pathed, spent = jax.vmap(along)(starts, path_keys)
    pathed = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), pathed)
    rough = _concatenate(jax.vmap(begin)(starts), pathed)
    elbos = judge(rough, few_key, num_particles // 2)
    # The end of a path may be worthless, and the start far off: the best of each is fitted.
    is_start = jnp.arange(len(elbos)) < len(starts)
    best = [_best(rough, jnp.where(kind, elbos, -jnp.inf)) for kind in (is_start, ~is_start)]
    kinds = jax.tree.map(lambda a, b: jnp.stack([a, b]), *best)
    fitted = jax.vmap(
        lambda key, affine: _fit(log_density, key, affine, num_fit_steps, num_particles)
    )(jnp.stack(fit_keys), kinds)
    if not wide:
        identity = jnp.eye(dim, dtype=starts.dtype)
        kinds = jax.vmap(lambda affine: _triangular(affine, identity))(kinds)
    candidates = _concatenate(kinds, fitted)
    elbos = judge(candidates, many_key, num_draws)
    spent = spent.sum() + 2 * num_fit_steps * num_particles
    return Located(_best(candidates, elbos), elbos.max(), spent)
