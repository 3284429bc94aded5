"""The schedule of a guide's training: learning rates, and when to stop."""

from typing import Any, Final

import numpy as np

#: Steps in which the learning rate rises.
WARM_UP: Final = 200
#: Two windows of at least so many steps are compared; a loss that gains less has ceased to fall.
WINDOW: Final = 300
SMALLEST_GAIN: Final = 3e-4
#: Steps per compiled call, by whose losses the spread of the weights is judged.
CHUNK: Final = 100
#: By how much the fall of the rate divides the variance of the log weights: on posteriors of 3 to
#: 15 dimensions it was three to nine, since most of it is the noise of the steps themselves.
FALL_GAINS: Final = 3.0
#: Variance of the log weights below which that noise is most of what the loss could still gain.
MOSTLY_NOISE: Final = 0.25


class Schedule:
    """Learning rates as fractions of the largest, and when to stop.

    The rate rises, holds, and falls as a cosine. The fall begins when half of the steps are left;
    or earlier, when the loss has ceased to fall, and then takes as long as all before it; or when
    the spread of the losses says that the importance weights will be nearly equal at its end, and
    then takes half as long. What ended early can be resumed: once where the weights were not as
    equal as expected, which is not expected again, and once in any case.

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
        self.target_ess = target_ess
        self.losses = np.empty(0)
        #: Importance ESS that an early end counted on.
        self.expected_ess = 0.0
        #: Whether the fall may be counted on; no more once it gave less than that.
        self._hopes = True
        self._is_last = False

    def to_restore(self) -> dict[str, Any]:
        """What :meth:`restore` needs beside the losses, as JSON can hold it."""
        return {name: value for name, value in vars(self).items() if name != "losses"}

    def restore(self, record: dict[str, Any], losses: np.ndarray) -> None:
        """Go on where another schedule of the same call was."""
        vars(self).update(record, losses=losses)

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
        started = max(self.begin + self.warm_up, self.annealing)
        if self._is_last or self.step >= self.fall or self.step < started:
            return
        # A loss is the mean of log weights, whose variance v makes their ESS 1 / (1 + v).
        equal = 1 / self.target_ess - 1
        latest = _finite(self.losses[-CHUNK:])
        enough = self._hopes and len(latest) > CHUNK / 2
        if enough and latest.var() * self.num_particles < FALL_GAINS * equal:
            self._end(1.5, self.target_ess)
        if self.step >= self.fall or self.step < started + 2 * WINDOW:
            return
        # Longer windows later on: what falls slowly needs more steps to be seen beside its noise.
        window = max(WINDOW, (self.step - self.begin) // 3)
        before, after = (_finite(part) for part in np.split(self.losses[-2 * window :], 2))
        if min(len(before), len(after)) < WINDOW / 2:
            return
        variance = after.var() * self.num_particles
        error = np.hypot(before.std() / len(before) ** 0.5, after.std() / len(after) ** 0.5)
        smallest = max(error, SMALLEST_GAIN)
        if self._hopes and variance < MOSTLY_NOISE:
            smallest = max(smallest, variance / 8)  # a quarter of the divergence v / 2 that is left
        if variance < equal:
            self._end(1.5, self.target_ess)
        elif before.mean() - after.mean() < smallest:
            self._end(2.0)

    def _end(self, factor: float, expected_ess: float = 0.0) -> None:
        """Let the rate fall from now on, to the end of ``factor`` times the steps made so far."""
        # A last chunk of another length would be another program to compile.
        num = -(-factor * (self.step - self.begin) // CHUNK) * CHUNK
        self.fall, self.stop = self.step, min(self.stop, self.begin + int(num))
        self.expected_ess = expected_ess

    def resume(self) -> bool:
        """Allow more steps if some are left and this was not done before; whether it did."""
        if self._is_last or self.step >= self.num_steps:
            return False
        was_expected, self.expected_ess = self.expected_ess > 0, 0.0
        self.begin = self.step
        if was_expected and self._hopes:
            self._hopes, self.stop = False, self.num_steps
        else:
            self._is_last, self.stop = True, min(self.num_steps, 2 * self.step)
        self.fall = (self.begin + self.stop) // 2
        return True


def _finite(losses: np.ndarray) -> np.ndarray:
    return losses[np.isfinite(losses)]
