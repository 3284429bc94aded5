"""What flows are fitted to: five densities of the plane, and UCI household power."""

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from models import data_folder


class Density(NamedTuple):
    """A density of the plane: draws from a NumPy generator, and its exact logarithm."""

    sample: Callable[[np.random.Generator, int], np.ndarray]
    log_prob: Callable[[np.ndarray], np.ndarray]


def blurred(curve: Callable[[np.ndarray], np.ndarray], sigma: float, nodes: int = 2000) -> Density:
    """Points ``curve(u)``, u uniform in [0, 1), plus N(0, sigma^2) noise; midpoint quadrature."""
    centres = curve((np.arange(nodes) + 0.5) / nodes)

    def sample(rng, n):
        return curve(rng.random(n)) + sigma * rng.standard_normal((n, 2))

    def log_prob(x):
        blocks = np.array_split(x, max(1, len(x) // 1000))
        squares = (((block[:, None] - centres) ** 2).sum(-1) for block in blocks)
        kernels = [np.exp(-square / (2 * sigma**2)).mean(1) for square in squares]
        with np.errstate(divide="ignore"):  # far outside, exp underflows to a density of 0
            return np.log(np.concatenate(kernels)) - math.log(2 * math.pi * sigma**2)

    return Density(sample, log_prob)


def polar(radius, angle) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def moons(u: np.ndarray) -> np.ndarray:
    """Two half circles of radius 1, the second upside down and moved by (1, 0.5)."""
    moon, along = np.divmod(2 * u, 1)
    moon = moon[:, None]
    return (1 - 2 * moon) * polar(1, np.pi * along) + moon * np.array([1.0, 0.5])


def octagon(u: np.ndarray) -> np.ndarray:
    """The corners of an octagon of radius 4."""
    return polar(4, np.pi / 4 * np.floor(8 * u))


def spirals(u: np.ndarray) -> np.ndarray:
    """Two Archimedean spirals of one and a half turns, opposite to each other."""
    arm, along = np.divmod(2 * u, 1)
    angle = 3 * np.pi * np.sqrt(along)
    return polar(angle / 3, angle + np.pi * arm)


def checkerboard() -> Density:
    """Uniform on the 8 dark squares of a 4 x 4 board that covers [-4, 4]^2."""

    def sample(rng, n):
        column, pair = rng.integers(4, size=n), rng.integers(2, size=n)
        corner = np.stack([column, 2 * pair + column % 2], axis=-1)
        return 2 * (corner + rng.random((n, 2))) - 4

    def log_prob(x):
        dark = (np.floor(x / 2).sum(-1) % 2 == 0) & (np.abs(x) <= 4).all(-1)
        return np.where(dark, -math.log(32), -np.inf)

    return Density(sample, log_prob)


def pinwheel(arms: int = 5, rate: float = 0.25) -> Density:
    """Gaussian arms N((2, 0), diag(0.6, 0.2)^2), turned by an angle that grows with the radius.

    The swirl of Johnson et al. (2016), arXiv:1603.06277, with the radius in place of the first
    coordinate: the turn then preserves area, and the density is exact.
    """
    loc, scale = np.array([2.0, 0.0]), np.array([0.6, 0.2])

    def turned(x, arm, sign):
        """x turned as arm number ``arm`` is, or back."""
        radius = np.hypot(*x.T)
        turn = 2 * np.pi * arm / arms + rate * np.exp(radius / 2)
        return polar(radius, np.arctan2(x[:, 1], x[:, 0]) + sign * turn)

    def sample(rng, n):
        return turned(loc + scale * rng.standard_normal((n, 2)), rng.integers(arms, size=n), 1)

    def log_prob(x):
        squares = [(((turned(x, arm, -1) - loc) / scale) ** 2).sum(-1) for arm in range(arms)]
        log_scale = math.log(2 * math.pi * scale.prod() * arms)
        return np.logaddexp.reduce(-0.5 * np.stack(squares)) - log_scale

    return Density(sample, log_prob)


DENSITIES = {
    "two moons": blurred(moons, 0.1),
    "8 Gaussians": blurred(octagon, 0.5, nodes=8),
    "checkerboard": checkerboard(),
    "pinwheel": pinwheel(),
    "two spirals": blurred(spirals, 0.1),
}


def load_power() -> dict[str, np.ndarray]:
    """Training, validation and test rows, as Papamakarios et al. (2017) prepare and split them.

    Source: arXiv:1705.07057, appendix D: noise that undoes the rounding, the columns of reactive
    power and of date left out, standardised by the mean and scale of all but the test rows.
    """
    path = data_folder() / "power" / "power_int.npz"
    if not path.exists():
        sys.exit(
            f"power: no data at {path}. Set NUMPYRO_FLOWS_DATA to the folder that holds "
            "power/power_int.npz (UCI household power, integer coded), or run `toy`."
        )
    with np.load(path) as file:
        units = {"gap_W": 1e3, "grp_VAr": 1e3, "voltage_cV": 1e2, "intensity_dA": 1e1}
        units |= {"sm1": 1.0, "sm2": 1.0, "sm3": 1.0, "minute": 1.0}
        d = np.stack([file[name] / unit for name, unit in units.items()], axis=-1)
    # The published split follows from this generator, in this order.
    rng = np.random.RandomState(42)
    rng.shuffle(d)
    d = np.delete(d, (1, 3), axis=1)
    n = len(d)
    voltage, active, meters = 0.01 * rng.rand(n, 1), 0.001 * rng.rand(n, 1), rng.rand(n, 3)
    d += np.hstack((active, voltage, meters, np.zeros((n, 1))))
    rest, test = np.split(d, [n - n // 10])
    train, val = np.split(rest, [len(rest) - len(rest) // 10])
    loc, scale = rest.mean(0), rest.std(0)
    return {
        name: (rows - loc) / scale
        for name, rows in {"train": train, "val": val, "test": test}.items()
    }


def gaussian(data: dict[str, np.ndarray]) -> np.ndarray:
    """Log densities of the test rows under the Gaussian with the moments of the other rows."""
    rest = np.concatenate([data["train"], data["val"]])
    factor = np.linalg.cholesky(np.cov(rest.T))
    z = np.linalg.solve(factor, (data["test"] - rest.mean(0)).T)
    log_scale = np.log(np.diag(factor)).sum() + 0.5 * len(z) * math.log(2 * math.pi)
    return -0.5 * (z**2).sum(0) - log_scale
