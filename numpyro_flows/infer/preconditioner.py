r"""The search for a preconditioner: an affine map to where the posterior is, found by optimisation.

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

The search runs on the host, in float64, and asks for values and gradients of the log density alone,
at 1 and at 32 points: two small programs are all that is compiled.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_limits

from ..transforms import FixedAffine
from .normals import FULL, TRAINED, Matrix, matched, matched_low_rank

#: Values, ``(n,)``, and gradients of a log density at the rows of ``(n, dim)``.
Rows: TypeAlias = Callable[[Matrix], tuple[Matrix, Matrix]]

#: Curvature pairs that L-BFGS keeps; up to twice as many coordinates have a full covariance.
HISTORY = 20
#: Rank of covariances that are not full.
RANK = 2 * HISTORY
#: Rows whose values are computed at once.
BATCH = 32
#: Rounds in which scales are estimated beyond that, and probes of each.
ROUNDS, PROBES = 8, 16
#: Steps over which the Gaussian fit looks at its weights, and the spread at which it ends.
WINDOW, NEARLY_EQUAL = 25, 0.02
#: Rounds in which a normal is matched to scores at its own draws.
SCORE_ROUNDS = 3


class Affine(NamedTuple):
    """The map of :class:`~numpyro_flows.transforms.FixedAffine`, on the host."""

    loc: Matrix
    scale: Matrix
    frame: Matrix
    core: Matrix

    def _within_frame(self, x: Matrix, core: Callable[[Matrix], Matrix]) -> Matrix:
        """A function of the coordinates in the frame, and the identity on the others, at rows."""
        if len(self.core) and not self.frame.shape[1]:  # the frame is the identity
            return core(x)
        along = x @ self.frame
        return x + (core(along) - along) @ self.frame.T

    def linear(self, x: Matrix) -> Matrix:
        """The map less its shift, at rows."""
        return self._within_frame(x, lambda a: a @ self.core.T) * self.scale

    def __call__(self, x: Matrix) -> Matrix:
        return self.loc + self.linear(x)

    def transposed(self, g: Matrix) -> Matrix:
        """The transpose of the linear part, at rows: a gradient in the map's coordinates."""
        return self._within_frame(g * self.scale, lambda a: a @ self.core)

    def back(self, g: Matrix) -> Matrix:
        """Undo ``transposed``."""
        undo = functools.partial(_solve_triangular, self.core, lower=True, trans="T")
        return self._within_frame(g, lambda a: undo(a.T).T) / self.scale

    def inverse(self, y: Matrix) -> Matrix:
        """Undo the map, at rows."""
        y = (y - self.loc) / self.scale
        undo = functools.partial(_solve_triangular, self.core, lower=True)
        return self._within_frame(y, lambda a: undo(a.T).T)

    def scaled(self, mean: Matrix, scale: Matrix) -> "Affine":
        """This map after another mean and scales beside its own, in its coordinates."""
        return self._replace(loc=self(mean[None])[0], scale=self.scale * scale)

    def after(self, mean: Matrix, factor: Matrix) -> "Affine":
        """This map after ``mean + factor x``, factor lower triangular, as a triangular one."""
        matrix = self.linear(factor.T).T
        length = np.sqrt((matrix**2).sum(1))
        # A triangular root without forming the covariance, whose condition is the matrix's squared.
        upper = np.asarray(np.linalg.qr((matrix / length[:, None]).T, mode="r"))
        sign = np.where(np.diagonal(upper) < 0, -1.0, 1.0)
        frame = np.empty((len(factor), 0))
        return Affine(self(mean[None])[0], length, frame, (upper * sign[:, None]).T)

    def of_one_shape(self) -> "Affine":
        """The same map with the shapes that all have in as many dimensions, as programs want it."""
        dim = len(self.loc)
        return self.after(np.zeros(dim), np.eye(dim)) if dim <= FULL else self

    def matched(self, w: Matrix, score: Matrix, ridge: float) -> "Affine":
        """The normal of these scores, both in this map's coordinates, ``(n, dim)``.

        Full with twice as many rows as coordinates, up to ``FULL`` of these; else of low rank.

        :raises LinAlgError: if it is not positive by rounding.
        """
        num, dim = w.shape
        if num < 2 * dim or dim > FULL:
            # In raw coordinates, where scales and what is of low rank are together such a map.
            low_rank = matched_low_rank(self(w), self.back(score), RANK, ridge)
            return Affine(*low_rank).of_one_shape()
        return self.after(*matched(w, score, ridge))

    @classmethod
    def of(cls, transform: FixedAffine) -> "Affine":
        """The map of a transform."""
        parts = transform.loc, transform.scale, transform.frame, transform.core
        return cls(*(np.asarray(part.value, float) for part in parts))

    def transform(self) -> FixedAffine:
        """The map as a transform, in the current precision."""
        dtype = jnp.result_type(float)
        return FixedAffine(*(np.asarray(part, dtype) for part in self))

    @property
    def log_det(self) -> float:
        return float(np.log(self.scale).sum() + np.log(np.diagonal(self.core)).sum())

    def is_finite(self) -> bool:
        return all(bool(np.isfinite(part).all()) for part in self) and bool((self.scale > 0).all())


def in_batches(rows: Rows, x: Matrix) -> tuple[Matrix, Matrix]:
    """Values and gradients at any number of rows, in batches of one size."""
    values, grads = [], []
    for begin in range(0, len(x), BATCH):
        part = x[begin : begin + BATCH]
        # What is missing is repeated: another size would be another program.
        value, grad = rows(np.resize(part, (BATCH, x.shape[1])))
        values.append(value[: len(part)])
        grads.append(grad[: len(part)])
    return np.concatenate(values), np.concatenate(grads)


class Counted:
    """Values and gradients in batches of one size, counted."""

    def __init__(self, rows: Rows):
        self._rows, self.num_gradients = rows, 0

    def __call__(self, x: Matrix) -> tuple[Matrix, Matrix]:
        self.num_gradients += len(x)
        return self._rows(x) if len(x) == 1 else in_batches(self._rows, x)


def _rough_scale(rows: Rows, rng: np.random.Generator, start: Matrix, init: float) -> Matrix:
    r"""Rough scales :math:`|\mathrm{diag}\, H|^{-1/2}` around a point, shape ``(dim,)``.

    Hutchinson's estimate of the diagonal (Bekas, Kokiopoulou & Saad, 2007) from differences of
    gradients at :math:`x \pm s \odot z`, z random signs. What the other coordinates add in noise
    falls with their own scales, so each round probes with the scales of the last.
    """
    scale = np.full_like(start, init)
    for _ in range(ROUNDS):
        z = rng.choice([-1.0, 1.0], (PROBES, len(start)))
        _, grads = rows(np.concatenate([start + scale * z, start - scale * z]))
        curvature = np.abs(((grads[:PROBES] - grads[PROBES:]) * z).mean(0)) / (2 * scale)
        with np.errstate(divide="ignore"):
            after = np.clip(curvature**-0.5, scale / 10, 10 * scale)
        scale = np.where(np.isfinite(curvature), after, scale / 10)
    return scale


def _path(rows: Rows, start: Matrix, num_steps: int) -> tuple[Matrix, Matrix]:
    """Points of an L-BFGS path and the gradients of the log density there, ``(points, dim)``."""
    from scipy.optimize import minimize  # slow to import

    seen: dict[bytes, Matrix] = {}
    worst = [0.0]

    def loss(x: Matrix) -> tuple[float, Matrix]:
        (value,), (grad,) = rows(x[None])
        if not (np.isfinite(value) and np.isfinite(grad).all()):
            # A wall: the line search turns back at it.
            return worst[0] + 1e3 * (1 + abs(worst[0])), np.zeros_like(x)
        worst[0] = max(worst[0], -float(value))
        seen[x.tobytes()] = grad
        return -float(value), -grad

    points = [start]
    minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        callback=lambda x: points.append(np.array(x)),
        options={"maxcor": HISTORY, "maxiter": num_steps, "maxfun": 2 * num_steps},
    )
    points = [x for x in points if x.tobytes() in seen]
    x = np.array(points).reshape(-1, len(start))
    return x, np.array([seen[x.tobytes()] for x in points]).reshape(x.shape)


def _is_usable(s: Matrix, y: Matrix) -> bool:
    """Whether a pair has curvature worth trusting."""
    square = y @ y
    return bool(np.isfinite(square) and square > 0 and s @ y > 1e-12 * square)


def _updated_diagonal(diagonal: Matrix, s: Matrix, y: Matrix) -> Matrix:
    """The diagonal inverse Hessian after one more pair (Gilbert & Lemarechal, 1989)."""
    a, b, c = (y**2 * diagonal).sum(), (s * y).sum(), (s**2 / diagonal).sum()
    after = 1 / (a / (b * diagonal) + y**2 / b - a * s**2 / (b * c * diagonal**2))
    return after if np.isfinite(after).all() and (after > 0).all() else diagonal


def _solve_triangular(a: Matrix, b: Matrix, **options: Any) -> Matrix:
    """SciPy's, which refuses empty systems before version 1.14."""
    return scipy.linalg.solve_triangular(a, b, **options) if len(a) else b


def _gaussian(x: Matrix, grad: Matrix, diagonal: Matrix, s: Matrix, y: Matrix) -> Affine:
    r"""The normal at one point of a path, from the pairs before it, each of shape (pairs, dim).

    The inverse Hessian is :math:`\mathrm{diag}(\alpha) + B \Gamma B^\top` with
    :math:`B = [\alpha Y, S]` (Zhang et al., algorithm 3). With
    :math:`\alpha^{-1/2} B = Q R`, its root is :math:`\alpha^{1/2} (I + Q (L - I) Q^\top)` where
    :math:`L L^\top = I + R \Gamma R^\top`.
    """
    root = np.sqrt(diagonal)
    products = s @ y.T
    inverse = _solve_triangular(np.triu(products), np.eye(len(s)))
    corner = inverse.T @ (np.diag(np.diag(products)) + (y * diagonal) @ y.T) @ inverse
    gamma = np.block([[np.zeros_like(corner), -inverse], [-inverse.T, corner]])
    frame, r = np.linalg.qr(np.concatenate([y * root, s / root]).T)
    inner = r @ gamma @ r.T
    core = np.linalg.cholesky(np.eye(len(inner)) + (inner + inner.T) / 2)
    step = root * grad
    move = step + (step @ frame @ inner) @ frame.T
    return Affine(x + root * move, root, frame, core)


def _along(x: Matrix, grad: Matrix) -> Iterator[Affine]:
    """The normals at points along one path."""
    # The first points are far apart, later ones are close and many.
    num, dim = x.shape
    chosen = {*range(min(40, num)), *range(0, num, 5), num - 1}
    diagonal: Matrix = np.ones(dim)
    s = y = np.empty((0, dim))
    for i in range(num):
        if i and _is_usable(x[i] - x[i - 1], grad[i - 1] - grad[i]):
            s = np.concatenate([s, [x[i] - x[i - 1]]])[-HISTORY:]
            y = np.concatenate([y, [grad[i - 1] - grad[i]]])[-HISTORY:]
            diagonal = _updated_diagonal(diagonal, s[-1], y[-1])
        if i not in chosen:
            continue
        try:
            affine = _gaussian(x[i], grad[i], diagonal, s, y)
        except np.linalg.LinAlgError:  # not positive by rounding
            continue
        if affine.is_finite():
            yield affine


def best_of(rows: Rows, affines: Iterable[Affine], noise: Matrix) -> tuple[Affine | None, float]:
    """The normal with the largest ELBO by these draws, and that ELBO."""
    num_draws, dim = noise.shape
    entropy = 0.5 * (noise**2).sum(1).mean() + 0.5 * dim * np.log(2 * np.pi)
    best, most, affines = None, -np.inf, iter(affines)
    while some := list(itertools.islice(affines, max(1, BATCH // num_draws))):
        values, _ = rows(np.concatenate([affine(noise) for affine in some]))
        means = values.reshape(len(some), num_draws).mean(1)
        for affine, mean in zip(some, means, strict=True):
            if np.isfinite(mean) and mean + entropy + affine.log_det > most:
                best, most = affine, float(mean + entropy + affine.log_det)
    return best, most


def by_scores(rows: Rows, affine: Affine, rng: np.random.Generator) -> Iterator[Affine]:
    """Normals by the scores at draws of the one before, as long as they are finite."""
    dim = len(affine.loc)
    size = dim if dim <= FULL else 2 * RANK
    num_draws = BATCH * -(-2 * size // BATCH)
    for _ in range(SCORE_ROUNDS):
        w = rng.normal(size=(num_draws, dim))
        _, grads = rows(affine(w))
        if not (np.isfinite(grads).all() and (grads.std(0) > 0).all()):
            return
        try:
            after = affine.matched(w, affine.transposed(grads), ridge=1e-9)
        except np.linalg.LinAlgError:  # not positive by rounding
            return
        if not after.is_finite():
            return
        affine = after
        yield affine


def _log_weights(rows: Rows, affine: Affine, noise: Matrix) -> Matrix:
    """Log importance weights of draws of a normal, up to a constant."""
    return rows(affine(noise))[0] + 0.5 * (noise**2).sum(1)


class Adam:
    """Steps of Adam (Kingma & Ba, 2015, arXiv:1412.6980) on the host, at a rate that falls to 0."""

    def __init__(self, shape: tuple[int, ...], num_steps: int, rate: float = 0.05):
        self.first, self.second = np.zeros(shape), np.zeros(shape)
        self._count, self._num_steps, self._rate = 0, num_steps, rate

    def step(self, slope: Matrix, largest: float) -> Matrix:
        """What to subtract, for a slope whose norm is clipped; nothing where it is not finite."""
        norm = np.linalg.norm(slope)
        if not np.isfinite(norm):
            return np.zeros_like(slope)
        slope = slope * min(1.0, largest / max(float(norm), 1e-300))
        rate = self._rate * 0.5 * (1 + np.cos(np.pi * self._count / self._num_steps))
        self._count += 1
        self.first = 0.9 * self.first + 0.1 * slope
        self.second = 0.999 * self.second + 0.001 * slope**2
        unbiased = self.second / (1 - 0.999**self._count)
        return rate * self.first / (1 - 0.9**self._count) / (np.sqrt(unbiased) + 1e-8)


class Fit:
    r"""A normal in the coordinates of another, fitted by its ELBO with the path gradient.

    With :math:`u = m + L \epsilon` in those coordinates, the path gradient of
    :math:`\log q - \log p` with respect to u is :math:`g = -L^{-\top} \epsilon - \nabla \log p(u)`,
    that with respect to m its mean, and to L the mean of :math:`g \epsilon^\top`. Beyond ``FULL``
    dimensions L is :math:`\mathrm{diag}(e^d)` between the scales and the low-rank part of the map.
    """

    def __init__(self, affine: Affine, num_steps: int):
        dim = len(affine.loc)
        self.affine, self.full = affine, dim <= TRAINED
        size = dim * dim if self.full else dim
        self.theta = np.zeros(dim + size)  # mean, and log scales (with what is below them)
        self.adam = Adam(self.theta.shape, num_steps)
        self.lower = np.tri(dim, k=-1) if self.full else np.zeros(0)

    def factor(self) -> Matrix:
        dim = len(self.affine.loc)
        matrix = self.theta[dim:].reshape(dim, dim)
        return np.diag(np.exp(np.diagonal(matrix))) + matrix * self.lower

    def current(self) -> Affine:
        """The map now."""
        dim = len(self.affine.loc)
        mean, rest = self.theta[:dim], self.theta[dim:]
        if self.full:
            return self.affine.after(mean, self.factor())
        return self.affine.scaled(mean, np.exp(rest))

    def points(self, noise: Matrix) -> Matrix:
        if not self.full:
            return self.current()(noise)
        return self.affine(self.theta[: noise.shape[1]] + noise @ self.factor().T)

    def step(self, noise: Matrix, values: Matrix, grads: Matrix) -> Matrix:
        """One step of Adam; returns the log weights of the draws."""
        dim = noise.shape[1]
        if self.full:
            factor = self.factor()
            back = _solve_triangular(factor, noise.T, lower=True, trans="T").T
            g = -back - self.affine.transposed(grads)
            of_factor = (g.T @ noise / len(noise)) * (self.lower + np.diag(np.diagonal(factor)))
            slope = np.concatenate([g.mean(0), of_factor.ravel()])
            log_det = np.log(np.diagonal(factor)).sum() + self.affine.log_det
        else:
            now = self.current()
            unit = now._replace(loc=np.zeros(dim), scale=np.ones(dim))
            g = -now.back(noise) - grads
            slope = np.concatenate(
                [self.affine.transposed(g).mean(0), (g * now.scale * unit(noise)).mean(0)]
            )
            log_det = now.log_det
        weights = values + 0.5 * (noise**2).sum(1) + 0.5 * dim * np.log(2 * np.pi) + log_det
        self.theta -= self.adam.step(slope, largest=10.0 * dim**0.5)
        return weights


def _fitted(
    rows: Rows, affines: list[Affine], rng: np.random.Generator, num_steps: int, particles: int
) -> list[Affine]:
    """Each normal improved by a Gaussian variational fit; both end when one leaves nothing."""
    fits = [Fit(affine, num_steps) for affine in affines]
    spreads = []
    for _ in range(num_steps):
        noise = rng.normal(size=(len(fits), particles, len(affines[0].loc)))
        points = np.concatenate([fit.points(z) for fit, z in zip(fits, noise, strict=True)])
        values, grads = (a.reshape(len(fits), particles, -1) for a in rows(points))
        spreads.append(
            min(
                fit.step(z, value[:, 0], grad).var()
                for fit, z, value, grad in zip(fits, noise, values, grads, strict=True)
            )
        )
        # Log weights of variance v have an importance ESS of 1 / (1 + v).
        if len(spreads) >= 2 * WINDOW and np.mean(spreads[-WINDOW:]) < NEARLY_EQUAL:
            break
    return [affine for affine in (fit.current() for fit in fits) if affine.is_finite()]


class Located(NamedTuple):
    """The affine map found, its ELBO with a standard normal base, and the gradients it took."""

    affine: Affine
    elbo: float
    num_gradients: int


def locate(
    rows: Rows,
    seed: Any,
    starts: Matrix,
    init_scale: float,
    *,
    num_path_steps: int = 400,
    num_fit_steps: int = 400,
    num_particles: int = 16,
    num_draws: int = 128,
) -> Located:
    """Find an affine map from a standard normal to roughly where a density has its mass.

    :param rows: log density, up to a constant, and its gradient at rows; called with 1 or 32.
    :param seed: seed of NumPy's generator for the draws.
    :param starts: where the paths begin, shape ``(num_starts, dim)``.
    :param init_scale: spread around the starts, in raw units.
    :param num_path_steps: L-BFGS steps per path.
    :param num_fit_steps: steps of the Gaussian fit.
    :param num_particles: draws per step of the fit, and half of it per point of a path.
    :param num_draws: draws by which the last candidates are compared.
    """
    # Small products are no work for threads, which wait for each other on a machine that is busy.
    with threadpool_limits(1):
        return _locate(
            rows, seed, starts, init_scale, num_path_steps, num_fit_steps, num_particles, num_draws
        )


def _locate(
    rows: Rows,
    seed: Any,
    starts: Matrix,
    init_scale: float,
    num_path_steps: int,
    num_fit_steps: int,
    num_particles: int,
    num_draws: int,
) -> Located:
    rng = np.random.default_rng(seed)
    rows = counted = Counted(rows)
    starts = np.asarray(starts, float)
    dim = starts.shape[1]
    rank = min(dim, RANK)

    def pathed() -> Iterator[Affine]:
        for start in starts:
            if dim <= TRAINED:
                yield from _along(*_path(rows, start, num_path_steps))
                continue
            # HISTORY pairs of a path cannot hold as many scales as there are coordinates.
            unit = _rough_scale(rows, rng, start, init_scale)

            def scaled(v: Matrix, start: Matrix = start, unit: Matrix = unit) -> Any:
                values, grads = rows(start + unit * v)
                return values, unit * grads

            for affine in _along(*_path(scaled, np.zeros(dim), num_path_steps)):
                yield affine._replace(loc=start + unit * affine.loc, scale=unit * affine.scale)

    begun = [
        Affine(start, np.full(dim, float(init_scale)), np.eye(dim, rank), np.eye(rank))
        for start in starts
    ]
    # The end of a path may be worthless, and the start far off: the best of each is fitted.
    noise = rng.normal(size=(num_particles // 2, dim))
    found = [best_of(rows, affines, noise)[0] for affines in (begun, pathed())]
    kinds = [affine for affine in found if affine is not None]
    if not kinds:
        return Located(begun[0], -np.inf, counted.num_gradients)
    # Scores know a normal density at once, and give the others a better start.
    scored = [[affine, *by_scores(rows, affine, rng)] for affine in kinds]
    kinds = [affine for each in scored if (affine := best_of(rows, each, noise)[0]) is not None]
    noise = rng.normal(size=(num_draws, dim))
    best, elbo = best_of(rows, kinds, noise)
    if best is not None and _log_weights(rows, best, noise).var() < NEARLY_EQUAL:
        return Located(best.of_one_shape(), elbo, counted.num_gradients)
    candidates = _fitted(rows, kinds, rng, num_fit_steps, num_particles)
    best, elbo = best_of(rows, candidates + kinds, rng.normal(size=(num_draws, dim)))
    return Located((best or begun[0]).of_one_shape(), elbo, counted.num_gradients)
