"""FlowNUTS beside NUTS, nutpie and BlackJAX: effective draws per gradient and per second.

    python benchmarks/mcmc.py                                   # every target, ours and NUTS
    python benchmarks/mcmc.py funnel_101 --samplers ours nuts nutpie
    python benchmarks/mcmc.py --samplers ours nuts blackjax-lowrank nutpie-lowrank
    python benchmarks/mcmc.py arK garch11 --seeds 0 1 2 --json mcmc.json

One line per target, sampler and seed, each 4 chains of 1,000 draws after 1,000 iterations of
warm-up: bulk ESS of the worst parameter, per 1,000 gradients after warm-up and per second of wall
clock with compilation and training; all gradients, those of training and of batched pilot chains
included, one for each chain; divergences; R-hat; and the largest errors of means (in standard
deviations) and of log standard deviations against the truth, where one is known. The last three
columns are of the first parameter alone (a funnel's neck): standard deviation and two quantiles.
Nothing is tuned to a target. nutpie adapts its flow in 1,500 iterations per chain, two chains;
its low-rank metric and BlackJAX's (Seyboldt, Carlson & Carpenter, 2026, arXiv:2603.18845) have the
iterations of the others, from starts uniform in (-2, 2). nutpie calls the density from Python.
"""

import argparse
import json
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from posteriors import errors, target
from unconstrained import unconstrained

import numpyro_flows as nf

with warnings.catch_warnings(action="ignore", category=FutureWarning):
    import arviz

TARGETS = [
    "funnel_101",
    "funnel_10",
    "eight_schools_centered",
    "german_credit",
    "rotated_normal",
    "two_modes",
    *models.POSTERIORDB,
]
CHAINS, WARMUP, DRAWS = 4, 1000, 1000
MODES, WEIGHTS, WIDTH = jnp.array([[-4.0, -4.0], [4.0, 4.0]]), jnp.array([0.3, 0.7]), 1.0


def rotated_normal(precision):
    numpyro.sample("x", dist.MultivariateNormal(0.0, precision_matrix=precision))


def rotated() -> tuple[np.ndarray, np.ndarray]:
    """Covariance and precision of 100 coordinates, condition number 1e4, in random directions."""
    rng = np.random.default_rng(0)
    frame, _ = np.linalg.qr(rng.normal(size=(100, 100)))
    variances = np.geomspace(1e-2, 1e2, 100)
    return (frame * variances) @ frame.T, (frame / variances) @ frame.T


def two_modes():
    parts = dist.MultivariateNormal(MODES, WIDTH**2 * jnp.eye(2))
    numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(WEIGHTS), parts))


def find(name: str) -> models.Posterior:
    if name == "rotated_normal":
        covariance, precision = rotated()
        sd = np.sqrt(np.diag(covariance))
        return models.Posterior(
            rotated_normal, (jnp.asarray(precision),), lambda d: d["x"], np.zeros(100), sd
        )
    if name == "two_modes":
        mean = np.asarray(WEIGHTS @ MODES)
        sd = np.sqrt(WIDTH**2 + np.asarray(WEIGHTS @ (MODES - mean) ** 2))
        return models.Posterior(two_modes, (), lambda d: d["x"], mean, sd)
    return target(name)


def judged(posterior: models.Posterior, draws: dict, gradients: int, seconds: float) -> dict:
    """Figures of draws ``(chains, draws, *shape)`` by site."""
    chains, num = next(iter(draws.values())).shape[:2]
    stacked = {k: np.asarray(v).reshape(chains * num, *v.shape[2:]) for k, v in draws.items()}
    flat = np.asarray(posterior.flat(stacked), float).reshape(chains, num, -1)
    every = np.concatenate(
        [np.asarray(v, float).reshape(chains, num, -1) for v in draws.values()], axis=-1
    )
    spread = every.reshape(-1, every.shape[-1]).std(0) > 0
    every = every[..., spread]
    ess = min(float(arviz.ess(column, method="bulk")) for column in np.moveaxis(every, -1, 0))
    rhat = max(float(arviz.rhat(column)) for column in np.moveaxis(every, -1, 0))
    first = flat[..., 0].ravel()
    return errors(posterior, stacked) | {
        "ess": ess,
        "ess_first": float(arviz.ess(flat[..., 0], method="bulk")),
        "per_gradient": 1000 * ess / gradients,
        "per_second": ess / seconds,
        "rhat": rhat,
        "seconds": seconds,
        "sampling_gradients": gradients,
        "low": float(np.quantile(first, 0.01)),
        "high": float(np.quantile(first, 0.99)),
        "sd_first": float(first.std()),
        "above": float((first > 0).mean()),
    }


def run(kernel, posterior: models.Posterior, seed: int) -> tuple[MCMC, dict]:
    mcmc = MCMC(
        kernel,
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    start = time.perf_counter()
    mcmc.run(jax.random.key(seed), *posterior.args, extra_fields=("num_steps",))
    draws = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
    seconds = time.perf_counter() - start
    fields = mcmc.get_extra_fields()
    figures = judged(posterior, draws, int(fields["num_steps"].sum()), seconds)
    return mcmc, figures | {"divergences": int(fields["diverging"].sum())}


def nuts(posterior: models.Posterior, seed: int, **settings) -> dict:
    mcmc, figures = run(NUTS(posterior.model, **settings), posterior, seed)
    # The gradients of its warm-up, from the same run again, not timed.
    mcmc.warmup(
        jax.random.key(seed), *posterior.args, extra_fields=("num_steps",), collect_warmup=True
    )
    warmup = int(mcmc.get_extra_fields()["num_steps"].sum())
    return figures | {"all_gradients": warmup + figures["sampling_gradients"]}


def ours(posterior: models.Posterior, seed: int, **settings) -> dict:
    kernel = nf.FlowNUTS(posterior.model, seed=seed, progress_bar=False, **settings)
    mcmc, figures = run(kernel, posterior, seed)
    report = kernel.report(mcmc)
    print(f"    {report}".replace("\n", "\n    "), flush=True)
    return figures | {
        "all_gradients": report.training_gradients + report.run.gradients,
        "guide_ess": report.ess,
        "flow": report.uses_flow,
        "jumps": report.run.jump_acceptance,
    }


def nutpies(posterior: models.Posterior, seed: int, flow: bool) -> dict:
    """nutpie with its flow or with a low-rank metric, on the same unconstrained density."""
    import nutpie

    target = unconstrained(posterior, seed)
    lock = threading.Lock()  # nutpie's chains are threads, and NumPyro's handlers are global

    def log_density(z):
        with lock:
            return target.log_density(z)

    value_and_grad = jax.jit(jax.value_and_grad(log_density))
    dim = target.dim

    def make_logp():
        def logp(z):
            value, grad = value_and_grad(np.asarray(z, np.float64))
            return float(value), np.asarray(grad, np.float64)

        return logp

    start = time.perf_counter()
    compiled = nutpie.compiled_pyfunc.from_pyfunc(
        ndim=dim,
        make_logp_fn=make_logp,
        make_expand_fn=lambda *_: lambda z, **__: {"z": np.asarray(z, np.float64)},
        expanded_dtypes=[np.dtype("float64")],
        expanded_shapes=[(dim,)],
        expanded_names=["z"],
        raw_logp_fn=lambda z: (log_density(z),),
    )
    if flow:
        compiled = compiled.with_transform_adapt(verbose=False)
    trace = nutpie.sample(
        compiled,
        chains=2 if flow else CHAINS,
        tune=1500 if flow else WARMUP,
        draws=DRAWS,
        seed=seed,
        transform_adapt=flow,
        low_rank_modified_mass_matrix=not flow,
        progress_bar=False,
    )
    seconds = time.perf_counter() - start
    z = jnp.asarray(trace.posterior["z"].values)
    draws = jax.vmap(jax.vmap(target.sites))(z)
    stats = trace.sample_stats
    warm = trace.warmup_sample_stats
    gradients = int(stats["n_steps"].sum())
    return judged(posterior, draws, gradients, seconds) | {
        "divergences": int(stats["diverging"].sum()),
        "all_gradients": gradients + int(warm["n_steps"].sum()),
    }


def blackjax_low_rank(posterior: models.Posterior, seed: int) -> dict:
    """BlackJAX's NUTS after its low-rank window adaptation, vectorised, as one program."""
    import blackjax

    target = unconstrained(posterior, seed)

    @jax.jit
    def chain(key):
        start_key, warm_key, key = jax.random.split(key, 3)
        start = jax.random.uniform(start_key, (target.dim,), minval=-2.0, maxval=2.0)
        warmup = blackjax.window_adaptation_low_rank(blackjax.nuts, target.log_density)
        (state, parameters), warm = warmup.run(warm_key, start, num_steps=WARMUP)
        step = blackjax.nuts(target.log_density, **parameters).step

        def draw(state, key):
            state, info = step(key, state)
            return state, (state.position, info.num_integration_steps, info.is_divergent)

        _, (z, steps, diverging) = jax.lax.scan(draw, state, jax.random.split(key, DRAWS))
        warm_steps = warm.info.num_integration_steps.sum()
        return jax.vmap(target.sites)(z), steps.sum(), diverging.sum(), warm_steps

    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(seed), CHAINS)
    draws, steps, diverging, warm_steps = jax.block_until_ready(jax.vmap(chain)(keys))
    seconds = time.perf_counter() - start
    gradients = int(steps.sum())
    return judged(posterior, draws, gradients, seconds) | {
        "divergences": int(diverging.sum()),
        "all_gradients": gradients + int(warm_steps.sum()),
    }


SAMPLERS = {
    "ours": ours,
    "jumps": partial(ours, jump_every=1),
    "vi": partial(ours, train="vi"),
    "fisher": partial(ours, train="fisher"),
    "nuts": nuts,
    "dense": partial(nuts, dense_mass=True),
    "nutpie": partial(nutpies, flow=True),
    "nutpie-lowrank": partial(nutpies, flow=False),
    "blackjax-lowrank": blackjax_low_rank,
}
COLUMNS = {
    "min ESS": ("ess", "{:.0f}"),
    "/ 1000 grad": ("per_gradient", "{:.1f}"),
    "/ s": ("per_second", "{:.1f}"),
    "all grad": ("all_gradients", "{:,}"),
    "s": ("seconds", "{:.0f}"),
    "div": ("divergences", "{}"),
    "R-hat": ("rhat", "{:.3f}"),
    "mean": ("mean", "{:.3f}"),
    "log sd": ("log_sd", "{:.3f}"),
    "sd": ("sd_first", "{:.3g}"),
    "1 %": ("low", "{:.3g}"),
    "99 %": ("high", "{:.3g}"),
}


def rendered(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(rows: list[dict]) -> str:
    head = ["target", "sampler", "seed", *COLUMNS]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [text.format(row[key]) for key, text in COLUMNS.values()]
        lines.append([row["target"], row["sampler"], str(row["seed"]), *cells])
    return rendered(lines)


def beside_the_best(rows: list[dict]) -> str:
    """Effective draws per second of ours, and its ratio to the best of the others, by target.

    A sampler that is wrong (R-hat of 1.05 or more) has none.
    """
    lines = [["target", "ours / s", "best of the others", "/ s", "ratio"], ["---"] * 5]
    for name in dict.fromkeys(row["target"] for row in rows):
        best: dict[str, float] = {}
        for sampler in dict.fromkeys(row["sampler"] for row in rows):
            seeds = [r for r in rows if (r["target"], r["sampler"]) == (name, sampler)]
            figures = [r["per_second"] if r["rhat"] < 1.05 else 0.0 for r in seeds]
            if figures:  # of a run that was stopped, some samplers have none
                best[sampler] = float(np.median(figures))
        ours = best.pop("ours", 0.0)
        if best:
            peer = max(best, key=lambda sampler: best[sampler])
            ratio = f"{ours / best[peer]:.2f}" if best[peer] else "inf"
            lines.append([name, f"{ours:.1f}", peer, f"{best[peer]:.1f}", ratio])
    return rendered(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--samplers", nargs="+", default=["ours", "nuts"], choices=SAMPLERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if set(options.targets) - {"rotated_normal", "two_modes", "funnel_10", "funnel_101"}:
        folder = models.data_folder()
        if not folder.is_dir():
            raise SystemExit(f"The data is not there: {folder}. Set NUMPYRO_FLOWS_DATA.")
    numpyro.set_host_device_count(1)
    rows = []
    for name in options.targets:
        posterior = find(name)
        for seed in options.seeds:
            for sampler in options.samplers:
                row = {"target": name, "sampler": sampler, "seed": seed}
                rows.append(row | SAMPLERS[sampler](posterior, seed))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    print("\n" + table(rows) + "\n\n" + beside_the_best(rows))
    print(f"\njax {jax.__version__}, numpyro {numpyro.__version__}, {jax.devices()[0]}")


if __name__ == "__main__":
    main()
