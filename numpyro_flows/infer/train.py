"""The training loop of a guide, and the importance weights that judge the result."""

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from jax import Array
from tqdm.auto import trange

from ..diagnostics import NEARLY_EQUAL, Shifts, importance_ess, moment_shifts, psis
from ..training.checkpoint import Checkpoint
from .schedule import CHUNK, Schedule
from .trainers import Trainer

#: Standard deviations by which moments of a guide's draws may be off.
TOLERANCE: Final = 0.1


@dataclasses.dataclass(frozen=True)
class Trained:
    """Trained parameters, and what importance weights of fresh draws say of them.

    :ivar params: the trained parameters, for ``SVI``, ``Predictive`` and ``nf.NeuTraReparam``.
    :ivar losses: negative ELBO estimate of each step, NaN where a step was skipped; empty where
        the start left nothing to gain.
    :ivar elbo: the ELBO of the result, from fresh draws.
    :ivar elbo_error: its standard error.
    :ivar khat: Pareto shape of the importance weights; see ``nf.diagnostics.psis_khat``.
    :ivar ess: effective sample size of importance sampling, as a fraction of the draws.
    :ivar shifts: by how much importance weights move the moments of the latent sites, where they
        move them most; see ``nf.diagnostics.moment_shifts``.
    :ivar improper: names of the sites along which the density does not fall, as it does where a
        flat prior is not bounded by data; not looked for with other guides and objectives.
    :ivar is_noisy: whether the weights are of random subsamples of rows, whose noise says nothing
        of the guide: the model could not be run on all rows of its plates.
    """

    params: dict[str, Any]
    losses: np.ndarray
    elbo: float
    elbo_error: float
    khat: float
    ess: float
    is_noisy: bool
    shifts: Shifts
    improper: tuple[str, ...]

    @property
    def num_skipped(self) -> int:
        """Steps left out because a value or a gradient was not finite."""
        return int((~np.isfinite(self.losses)).sum())

    @property
    def trusted(self) -> bool:
        """Whether the guide's own draws may be relied on: they are covered by the weights, and
        their moments are those of the weighted draws within a tenth of a standard deviation.
        """
        return self.is_covered and self.shifts.bound <= TOLERANCE

    @property
    def is_covered(self) -> bool:
        """Whether reweighted draws may be relied on: k-hat below 0.7, or weights nearly equal."""
        if self.is_noisy or self.improper:
            return False
        return self.khat < 0.7 or self.ess >= NEARLY_EQUAL


class NeverFinite(ValueError):
    """Training in which no step had a finite loss.

    :ivar params: the parameters, still those of the start.
    """

    def __init__(self, params: dict[str, Any], found: str = ""):
        super().__init__(
            "The loss was never finite, nor its gradient. "
            f"{found or 'The model and the guide are finite at the start, site by site.'} "
            "If the model is right, start elsewhere with `init_loc_fn`."
        )
        self.params = params


def train(
    trainer: Trainer,
    key: Array,
    *,
    num_steps: int,
    target_ess: float,
    num_draws: int,
    progress_bar: bool,
    learning_rate: float = 3e-3,
    annealing_steps: int = 0,
    store: Callable[[Any], Checkpoint] | None = None,
) -> Trained:
    """Train until the loss ceases to fall, and judge the result; see ``nf.fit_guide``.

    :param key: of the draws that judge.
    :param store: makes the checkpoint, of which it is told what the training begins with.
    :raises NeverFinite: if no step had a finite loss.
    """

    def judged(params: dict[str, Any], losses: np.ndarray) -> Trained:
        draws, log_weights = trainer.weigh(key, params, num_draws)
        smoothed, khat = psis(log_weights)
        return Trained(
            params,
            losses,
            elbo=float(log_weights.mean()),
            elbo_error=float(log_weights.std() / len(log_weights) ** 0.5),
            khat=khat,
            ess=importance_ess(log_weights),
            is_noisy=trainer.is_noisy,
            shifts=moment_shifts(draws, log_weights if np.isnan(khat) else smoothed),
            improper=trainer.improper,
        )

    # Where the preconditioner, or the parameters given, leave nothing to gain, no step is made; nor
    # where there is nothing to approximate.
    if trainer.has_located:
        at_start = judged(trainer.params(), np.empty(0))
        if at_start.improper or (at_start.trusted and at_start.ess >= target_ess):
            return at_start
    schedule = Schedule(num_steps, trainer.num_particles, annealing_steps, target_ess)
    losses: list[np.ndarray] = []
    best_loss, best, best_step = np.inf, trainer.params(), 0
    file, num_chunks = None, 0
    if store is not None:
        begun = trainer.state(), best, np.zeros(0)
        file = store(begun)
        if (restored := file.load(begun)) is not None:
            (state, best, made), record = restored
            trainer.restore(state, record["num_chunks"])
            losses = [np.asarray(made)]
            best_loss, best_step = record["best_loss"], record["best_step"]
            schedule.restore(record["schedule"], np.asarray(made, float))
            num_chunks = record["num_chunks"]
    with trange(num_steps, initial=schedule.step, disable=not progress_bar) as bar:
        while True:
            if schedule.step < schedule.stop:
                rates = learning_rate * schedule.rates(min(CHUNK, schedule.stop - schedule.step))
                tempers = schedule.temper(len(rates)) if annealing_steps else None
                chunk = trainer.run(rates, tempers)
                num_chunks += 1
                losses.append(chunk)
                finite = chunk[np.isfinite(chunk)]
                # The losses of annealing are those of another target.
                annealed = schedule.step < annealing_steps
                enough = not annealed and len(finite) > len(chunk) / 2
                is_best = enough and finite.mean() < best_loss
                schedule.advance(chunk)
                if is_best:
                    best_loss, best = float(finite.mean()), trainer.params()
                    best_step = schedule.step
                bar.total = schedule.stop
                bar.update(len(chunk))
                if len(finite):
                    bar.set_postfix_str(f"loss {finite.mean():.4g}", refresh=False)
                if file is not None:
                    file.save(
                        (trainer.state(), best, np.concatenate(losses)),
                        {
                            "num_chunks": num_chunks,
                            "best_loss": best_loss,
                            "best_step": best_step,
                            "schedule": schedule.to_restore(),
                        },
                    )
                continue

            all_losses = np.concatenate(losses)
            if not np.isfinite(all_losses).any():
                raise NeverFinite(trainer.params())
            candidates = [best] if best_step == schedule.step else [trainer.params(), best]
            trained = max(
                (judged(params, all_losses) for params in candidates),
                key=lambda each: np.nan_to_num(each.elbo, nan=-np.inf),
            )
            is_good = trained.trusted and trained.ess >= schedule.expected_ess
            if is_good or trained.is_noisy or not schedule.resume():
                return trained
