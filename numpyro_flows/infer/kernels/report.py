"""The report of FlowNUTS: the map that it learned, its run, and a verdict on the draws."""

import dataclasses
from typing import Any, Final

import numpy as np
from numpyro.infer import MCMC

from ..learning import DIVERGENT, Learned, Trial

#: Limits of Vehtari et al. (2021), arXiv:1903.08008, and Betancourt (2016), arXiv:1604.00695. Of
#: R-hat they ask 1.01; the largest of many coordinates is above that in good short runs, too.
R_HAT: Final = 1.02
ESS_PER_CHAIN: Final = 100
BFMI: Final = 0.3


@dataclasses.dataclass(frozen=True)
class FlowNUTSReport:
    """What :meth:`FlowNUTS.report` returns; ``print`` it.

    :ivar trials: the candidate maps, in order; none if the first affine map was good enough.
    :ivar ess: importance ESS of the learned map, as a fraction of draws; 1 for a perfect one.
    :ivar khat: Pareto shape of its importance weights.
    :ivar training_gradients: gradients of the model's log density before the first iteration, in
        the search for the affine map, in training and on pilot chains.
    :ivar pilot_divergences: divergent draws of the pilot chains.
    :ivar uses_flow: whether a flow was accepted; otherwise the map is affine.
    :ivar decision: why a flow was trained or not; empty if ``train`` said so, or jumps.
    :ivar improper: sites along which the density does not fall, so that draws have no meaning.
    :ivar run: how the run went; None without one.
    """

    trials: tuple[Trial, ...]
    ess: float
    khat: float
    training_gradients: int
    pilot_divergences: int
    uses_flow: bool
    decision: str = ""
    improper: tuple[str, ...] = ()
    run: "RunReport | None" = None

    def __str__(self) -> str:
        kind = "flow" if self.uses_flow else "affine map"
        lines = [
            f"Learned: {kind}, importance ESS {self.ess:.0%}, k-hat {self.khat:.2f}, "
            f"{self.training_gradients:,} gradients."
        ]
        lines += [f"  {trial}" for trial in self.trials]
        if self.decision:
            lines.append(f"  Decided: {self.decision}.")
        if self.improper:
            lines.append(f"  Improper along {', '.join(map(repr, self.improper))}: not reliable.")
        if self.pilot_divergences:
            lines.append(f"  {self.pilot_divergences} divergences of pilot chains.")
        if self.run is not None:
            lines.append(str(self.run))
            if not self.run.trusted and not self.uses_flow:
                lines.append('The map is affine: `train="vi"` trains a flow.')
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class RunReport:
    """How a run of FlowNUTS went.

    :ivar num_draws: number of draws of all chains.
    :ivar gradients: gradients of the model that all chains took, warm-up included.
    :ivar divergences: number of divergent draws after warm-up.
    :ivar bfmi: energy Bayesian fraction of missing information of each chain, in the base space;
        below 0.3 the tails are slow.
    :ivar jump_acceptance: share of jumps that were accepted; None without jumps.
    :ivar r_hat: name and rank-normalised split R-hat of the worst coordinate.
    :ivar ess_bulk: name and bulk ESS of the worst coordinate.
    :ivar ess_tail: name and tail ESS of the worst coordinate.
    :ivar num_chains: number of chains.
    """

    num_draws: int
    num_chains: int
    gradients: int
    divergences: int
    bfmi: np.ndarray
    jump_acceptance: float | None
    r_hat: tuple[str, float]
    ess_bulk: tuple[str, float]
    ess_tail: tuple[str, float]

    @property
    def faults(self) -> tuple[str, ...]:
        """What speaks against the draws, with what to try; empty if nothing does."""
        found = []
        if not self.r_hat[1] < R_HAT:
            found.append(
                f"chains disagree on {self.r_hat[0]} (R-hat {self.r_hat[1]:.2f}): draw longer, or "
                "with `jump_every=` where modes are far apart"
            )
        for name, (site, ess) in (("bulk", self.ess_bulk), ("tail", self.ess_tail)):
            if not ess >= ESS_PER_CHAIN * self.num_chains:
                found.append(f"few effective draws of {site} ({name} ESS {ess:.0f}): draw longer")
        if self.divergences > DIVERGENT * self.num_draws:
            found.append(
                f"{self.divergences / self.num_draws:.1%} of trajectories diverge: a region of "
                "high curvature is left out; raise `target_accept_prob`, take a richer flow, or "
                "reparameterise the model"
            )
        if not self.bfmi.min() > BFMI:
            found.append(f"heavy tails are slow (E-BFMI {self.bfmi.min():.2f}): a richer flow")
        return tuple(found)

    @property
    def trusted(self) -> bool:
        """Whether nothing speaks against the draws."""
        return not self.faults

    @property
    def verdict(self) -> str:
        """One line: reliable or not, and what to try."""
        if self.trusted:
            return "reliable: no sign of trouble in R-hat, ESS, divergences and E-BFMI."
        return f"not reliable: {'; '.join(self.faults)}."

    def __str__(self) -> str:
        (r_site, r_hat), (b_site, bulk), (t_site, tail) = self.r_hat, self.ess_bulk, self.ess_tail
        lines = [
            f"Sampled: {self.num_draws:,} draws of {self.num_chains} chains, "
            f"{self.gradients:,} gradients, {self.divergences} divergences "
            f"({self.divergences / self.num_draws:.1%}), smallest E-BFMI {self.bfmi.min():.2f}.",
            f"  Worst: R-hat {r_hat:.3f} ({r_site}), bulk ESS {bulk:.0f} ({b_site}), tail ESS "
            f"{tail:.0f} ({t_site}).",
        ]
        if self.jump_acceptance is not None:
            lines.append(f"  {self.jump_acceptance:.0%} of jumps accepted.")
        return "\n".join([*lines, self.verdict])


def report_of(learned: Learned) -> FlowNUTSReport:
    """The report of a map that was learned."""
    return FlowNUTSReport(
        trials=learned.trials,
        ess=learned.ess,
        khat=learned.khat,
        training_gradients=learned.num_gradients,
        pilot_divergences=learned.pilot_divergences,
        uses_flow=learned.uses_flow,
        decision=learned.decision,
        improper=learned.improper,
    )


def report_of_run(mcmc: MCMC, draws: dict[str, Any], jump_every: int) -> RunReport:
    """The report of a run, with the draws of its latent sites, ``(chains, n, *shape)``."""
    fields = mcmc.get_extra_fields(group_by_chain=True)
    energy, jumped = np.asarray(fields["energy"]), np.asarray(fields["jumped"])
    num_jumps = jumped.shape[1] // jump_every if jump_every else 0
    figures = _figures({name: np.asarray(values) for name, values in draws.items()})
    return RunReport(
        num_draws=energy.size,
        num_chains=len(energy),
        gradients=int(np.asarray(mcmc.last_state.num_gradients).sum()),
        divergences=int(np.asarray(fields["diverging"]).sum()),
        bfmi=(np.diff(energy, axis=1) ** 2).mean(1) / energy.var(axis=1),
        jump_acceptance=float(jumped.sum(1).mean() / num_jumps) if num_jumps else None,
        **figures,
    )


def _figures(draws: dict[str, np.ndarray]) -> dict[str, tuple[str, float]]:
    """The worst R-hat, bulk and tail ESS, each with the name of its coordinate."""
    import arviz

    names: list[str] = []
    found: list[tuple[float, float, float]] = []
    for name, values in draws.items():
        for index in np.ndindex(*values.shape[2:]):
            series = values[(slice(None), slice(None), *index)]
            if np.ptp(series) == 0:  # a coordinate that its support holds
                continue
            names.append(f"{name}{list(index)}" if index else name)
            found.append(
                (
                    _number(arviz.rhat(series)) if len(series) > 1 else 1.0,
                    _number(arviz.ess(series, method="bulk")),
                    _number(arviz.ess(series, method="tail", prob=(0.05, 0.95))),
                )
            )
    r_hat, bulk, tail = np.array(found).T
    worst = {"r_hat": np.argmax(r_hat), "ess_bulk": np.argmin(bulk), "ess_tail": np.argmin(tail)}
    columns = {"r_hat": r_hat, "ess_bulk": bulk, "ess_tail": tail}
    return {key: (names[i], float(columns[key][i])) for key, i in worst.items()}


def _number(value: Any) -> float:
    return float(np.asarray(value))
