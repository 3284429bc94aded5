"""What the sampling examples share: runs with their cost, effective sample sizes, tables."""

import time
import warnings
from typing import NamedTuple

import jax
import numpy as np
from numpyro.infer import MCMC

import numpyro_flows as nf


class Run(NamedTuple):
    """Draws by chain, ``(chains, draws, *shape)``, and what they cost."""

    mcmc: MCMC
    draws: dict
    divergences: int
    gradients: int
    seconds: float


def run(kernel, *args, seed=1, num_warmup=1000, num_samples=1000, num_chains=4) -> Run:
    """Vectorised chains; gradients are those after warm-up, seconds include compilation."""
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    fields = ["num_steps", "diverging"]
    if isinstance(kernel, nf.FlowNUTS):
        fields.append("warped.z")  # the draws in the flow's base space
    start = time.perf_counter()
    mcmc.run(jax.random.key(seed), *args, extra_fields=fields)
    draws = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
    seconds = time.perf_counter() - start
    cost = mcmc.get_extra_fields()
    return Run(mcmc, draws, int(cost["diverging"].sum()), int(cost["num_steps"].sum()), seconds)


def bulk_ess(draws) -> dict[str, list[float]]:
    """Bulk effective sample size of each parameter, all shapes flattened."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # ArviZ 0.23 on import
        import arviz
    return {
        name: [float(arviz.ess(chain, method="bulk")) for chain in np.moveaxis(flat, -1, 0)]
        for name, value in draws.items()
        for flat in [np.asarray(value).reshape(*value.shape[:2], -1)]
    }


def figures(result: Run) -> list[str]:
    """Divergences, smallest ESS, the same per 1,000 gradients and per second, and seconds."""
    lowest = min(min(values) for values in bulk_ess(result.draws).values())
    return [
        str(result.divergences),
        f"{lowest:.0f}",
        f"{1000 * lowest / result.gradients:.1f}",
        f"{lowest / result.seconds:.1f}",
        f"{result.seconds:.1f}",
    ]


FIGURES = ["divergences", "min bulk ESS", "/ 1000 grad", "/ s", "seconds"]


def print_table(header, rows) -> None:
    """Rows of text under a header, the first column to the left."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([line[0].ljust(widths[0]), *cells]))
