"""Numerical limits: what float32 leaves of a round trip, per recipe and for deep trained flows.

    python benchmarks/limits.py stress               # wild parameters, 200,000 points
    python benchmarks/limits.py deep --steps 1000    # 64 layers in 64 dimensions, after training
    python benchmarks/limits.py compile              # compile time of 64 layers, scanned and not
    python benchmarks/limits.py levels               # LLVM's level 2 against XLA's default of 3

``stress`` shakes the parameters of each recipe in 4 dimensions by N(0, 1.5^2 / fan-in), five times
as wide as the contract tests do, sends points uniform within 10 standard deviations to the base and
back, and reports the quantiles of the largest error of a row. No value may be nan or infinite.

``deep`` trains 64 layers in 64 dimensions on correlated, skewed draws and reports the largest error
of a round trip over 2,000 fresh draws, with the seconds that the training step took to compile.

``compile`` times trace, lowering and compilation of a training step of MAF with 64 layers in 64
dimensions, here and with NumPyro's transforms, which are unrolled; median of 3.

``levels`` times the gradient of the mean log density of 512 rows in 16 dimensions, compiled at both
levels, interleaved; medians of 40.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import numpyro_flows as nf

RECIPES = (
    "planar",
    "radial",
    "sylvester",
    "nice",
    "realnvp",
    "nsf",
    "maf",
    "iaf",
    "nsf_ar",
    "bnaf",
)
DEEP = ("realnvp", "nsf", "maf")


def shake(tree, scale: float, seed: int = 1):
    params, rest = nf.partition(tree)
    rng = np.random.default_rng(seed)

    def shaken(leaf):
        fan_in = leaf.shape[-1] if leaf.ndim > 1 else 1
        return leaf + jnp.asarray(scale * rng.normal(size=leaf.shape) / fan_in**0.5, leaf.dtype)

    return nf.combine(jax.tree.map(shaken, params), rest)


@jax.jit
def there_and_back(transform, x):
    z, log_det = transform.inverse_and_log_det(x)
    again, back = transform.forward_and_log_det(z)
    return jnp.abs(again - x).max(-1), jnp.isfinite(z).all() & jnp.isfinite(log_det + back).all()


def stress() -> None:
    x = 10 * jax.random.uniform(jax.random.key(2), (200_000, 4), minval=-1.0)
    print("| recipe | median | 99 % | 99.99 % | largest | finite |\n|---|---|---|---|---|---|")
    for name in RECIPES:
        flow = shake(getattr(nf, name)(jax.random.key(0), 4), 1.5)
        error, finite = there_and_back(flow.transform, x)
        quantiles = np.quantile(np.asarray(error, float), (0.5, 0.99, 0.9999, 1.0))
        print(f"| {name} |", *(f"{q:.1e} |" for q in quantiles), "yes |" if finite else "NO |")


def draws(key, n: int, dim: int = 64):
    mixing = np.random.default_rng(0).normal(size=(dim, dim)) / dim**0.5
    z = jax.random.normal(key, (n, dim))
    x = z @ jnp.asarray(mixing, z.dtype)
    return jnp.sinh(0.5 * x) + 0.3 * z**2


def deep(steps: int) -> None:
    x = draws(jax.random.key(0), 20_000)
    loc, scale = x.mean(0), x.std(0)
    x, test = (x - loc) / scale, (draws(jax.random.key(1), 2_000) - loc) / scale
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0), optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    )
    print("| recipe, 64 layers | largest error | nats before | nats after | compile, s |")
    print("|---|---|---|---|---|")
    for name in DEEP:
        flow = getattr(nf, name)(jax.random.key(0), 64, depth=64)
        params, rest = nf.partition(flow)
        state = optimizer.init(params)

        def loss(params, batch, rest=rest):
            return -nf.combine(params, rest).log_prob(batch).mean()

        def step(params, state, batch, loss=loss):
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        before = float(jax.jit(loss)(params, test))
        start = time.perf_counter()
        compiled = jax.jit(step).lower(params, state, x[:256]).compile()
        seconds = time.perf_counter() - start
        rng = np.random.default_rng(0)
        for _ in range(steps):
            params, state, _ = compiled(params, state, x[rng.integers(len(x), size=256)])
        error, finite = there_and_back(nf.combine(params, rest).transform, test)
        assert finite
        after = float(jax.jit(loss)(params, test))
        print(f"| {name} | {error.max():.1e} | {before:.2f} | {after:.2f} | {seconds:.1f} |")


def compile_times() -> None:
    import libraries
    import peers

    sizes = argparse.Namespace(**peers.SIZES | {"dim": 64, "depth": 64})
    for name, build in (
        ("ours", libraries.ours(nf.maf, "depth", "hidden")),
        ("numpyro", libraries.numpyro_maf),
    ):
        (program,) = build(sizes)["train step"].values()
        seconds = [program.compile() for _ in range(3)]
        print(f"maf, 64 layers, {name}: {np.median(seconds):.2f} s to compile", flush=True)


def levels() -> None:
    x = jax.random.normal(jax.random.key(0), (512, 16))

    def loss(params, rest):
        return -nf.combine(params, rest).log_prob(x).mean()

    print("| recipe | level 3, ms | level 2, ms | ratio |\n| --- | --- | --- | --- |")
    for name in RECIPES:
        params, rest = nf.partition(getattr(nf, name)(jax.random.key(1), 16))
        lowered = jax.jit(jax.grad(loss)).lower(params, rest)
        programs = {
            level: lowered.compile(compiler_options={"xla_backend_optimization_level": level})
            for level in (3, 2)
        }
        seconds: dict[int, list[float]] = {level: [] for level in programs}
        for _ in range(40):
            for level, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(params, rest))
                seconds[level].append(time.perf_counter() - start)
        slow, fast = (1e3 * np.median(seconds[level]) for level in (3, 2))
        print(f"| {name} | {slow:.2f} | {fast:.2f} | {fast / slow:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("stress", "deep", "compile", "levels"))
    parser.add_argument("--steps", type=int, default=1000, help="training steps, default 1000")
    options = parser.parse_args()
    if options.what == "deep":
        deep(options.steps)
    else:
        {"stress": stress, "compile": compile_times, "levels": levels}[options.what]()


if __name__ == "__main__":
    main()
