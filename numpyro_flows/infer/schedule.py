"""The schedule of a guide's training: learning rates, and when to stop."""

from typing import Final

import numpy as np

#: Steps in which the learning rate rises.
WARM_UP: Final = 200
#: Two windows of at least so many steps are compared; a loss that gains less has ceased to fall.
WINDOW: Final = 300
SMALLEST_GAIN: Final = 3e-4
#: Steps per compiled call.
CHUNK: Final = 100


class Schedule:
    """Learning rates as fractions of the largest, and when to stop.

    The rate rises, holds, and falls as a cosine. The fall begins when half of the steps are left;
    or earlier, when the loss has ceased to fall, and then takes as long as all before it; or when
    the spread of the losses says that the importance weights are nearly equal, and then takes half
    as long. What ended early can be resumed once.

    :param num_steps: largest number of steps.
    :param num_particles: draws of which each loss is the mean.
    :param annealing_steps: first steps, whose losses say nothing.
    :param target_ess: importance ESS above which weights are nearly equal.
    """

    def __init__(
        self, num_steps: int, num_particles: int, annealing_steps: int = 0, target_ess: float = 0.99
    ):
        self.begin = self.step = 0
        self.stop = self.num_steps = num_steps
        self.warm_up = min(WARM_UP, max(1, num_steps // 10))
        self.annealing = annealing_steps
        self.fall = num_steps // 2
        self.num_particles = num_particles
        self.equal = (1 / target_ess - 1) ** 0.5
        self.losses = np.empty(0)

    def rates(self, num: int) -> np.ndarray:
        steps = np.arange(self.step, self.step + num)
        rise = np.minimum(1.0, (steps - self.begin + 1) / self.warm_up)
        share = np.clip((steps - self.fall) / max(1, self.stop - self.fall), 0.0, 1.0)
        return rise * 0.5 * (1 + np.cos(np.pi * share))

    def temper(self, num: int) -> np.ndarray:
        """Factors of the model's log density."""
        return np.clip((self.step + np.arange(num)) / max(1, self.annealing), 0.01, 1.0)

    def advance(self, losses: np.ndarray) -> None:
        self.step += len(losses)
        self.losses = np.append(self.losses, losses)
        started = max(self.warm_up, self.annealing)
        if self.begin or self.step >= self.fall or self.step < started + 2 * WINDOW:
            return
        # Longer windows later on: what falls slowly needs more steps to be seen beside its noise.
        window = max(WINDOW, self.step // 3)
        latest = np.split(self.losses[-2 * window :], 2)
        before, after = (part[np.isfinite(part)] for part in latest)
        if min(len(before), len(after)) < WINDOW / 2:
            return
        error = np.hypot(before.std() / len(before) ** 0.5, after.std() / len(after) ** 0.5)
        # A loss is the mean of log weights, whose variance v makes their ESS 1 / (1 + v).
        if after.std() * self.num_particles**0.5 < self.equal:
            # A last chunk of another length would be another program to compile.
            end = -(-self.step * 3 // (2 * CHUNK)) * CHUNK
            self.fall, self.stop = self.step, min(self.stop, end)
        elif before.mean() - after.mean() < max(error, SMALLEST_GAIN):
            self.fall, self.stop = self.step, min(self.stop, 2 * self.step)

    def resume(self) -> bool:
        """Allow as many steps again as were made, if some are left and this is the first time."""
        if self.begin or self.step >= self.num_steps:
            return False
        self.begin, self.stop = self.step, min(self.num_steps, 2 * self.step)
        self.fall = (self.begin + self.stop) // 2
        return True
