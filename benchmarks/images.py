"""Images: Glow beside normflows' (PyTorch), compile times, convolutions, and preprocessing.

    python benchmarks/images.py peers           # 3 levels of 16 steps on 32 x 32 x 3
    python benchmarks/images.py peers --shape 28 28 1 --levels 2 --depth 8 --hidden 64 --batch 64
    python benchmarks/images.py compile         # compile time against depth
    python benchmarks/images.py convolutions    # the network beside XLA's convolutions
    python benchmarks/images.py preprocessing   # MNIST, 200 steps behind each map of grey levels

``peers``: the same levels, steps (ActNorm, LU 1 x 1 convolution, affine coupling by 3 x 3, 1 x 1,
3 x 3 convolutions) and widths on both sides. Where channels are factored out, ours has one
convolution more for their mean and scale, and normflows a mean and scale per channel. Time is taken
as in ``peers.py``: parameters shaken, calls interleaved, medians over rounds, compilation apart.

``convolutions`` times value and gradient of one network, 64 rows of 14 x 14 pixels.
``preprocessing`` trains one small Glow for 200 steps of 64 images (Adam, warm-up, cosine) and
prints the mean bits/dim of the last 50 steps.
"""

import argparse
import math
import os
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from libraries import OPTIMIZER, Program, TorchProgram, shake
from peers import COLUMNS, compare

import numpyro_flows as nf
from numpyro_flows.convnet import ConvNet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from mnist_glow import load


def ours(options, depth=None) -> dict[str, Program]:
    flow = nf.glow(
        jax.random.key(0),
        options.shape,
        levels=options.levels,
        depth=depth or options.depth,
        hidden=(options.hidden,) * 2,
    )
    params, rest = nf.partition(flow)
    params = jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, shake(params), params)
    x = jax.random.normal(jax.random.key(1), (options.batch, *options.shape))

    def log_prob(params, x):
        return nf.combine(params, rest).log_prob(x)

    def step(params, state, x):
        loss, grads = jax.value_and_grad(lambda params: -log_prob(params, x).mean())(params)
        updates, state = OPTIMIZER.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state, loss

    return {
        "train step": Program(jax.jit(step), params, OPTIMIZER.init(params), x, carried=2),
        "log_prob": Program(jax.jit(log_prob), params, x),
    }


def normflows_glow(options) -> dict[str, TorchProgram]:
    import normflows
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    height, width, channels = options.shape
    bases, flows, merges = [], [], []
    for level in range(options.levels):  # coarsest first, as normflows wants them
        halvings = options.levels - level
        block_channels = channels * 2 ** (halvings + 1)
        flows.append(
            [
                normflows.flows.GlowBlock(block_channels, options.hidden, scale_map="exp")
                for _ in range(options.depth)
            ]
            + [normflows.flows.Squeeze()]
        )
        latent = block_channels // 2 if level else block_channels
        shape = (latent, height // 2**halvings, width // 2**halvings)
        bases.append(normflows.distributions.DiagGaussian(shape))
        if level:
            merges.append(normflows.flows.Merge())
    module = normflows.MultiscaleFlow(bases, flows, merges, class_cond=False)
    x = torch.randn(options.batch, channels, height, width)
    with torch.no_grad():
        module.log_prob(x, None)  # sets its ActNorms
        for parameter in module.parameters():
            parameter += 0.005 * torch.randn_like(parameter)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        loss = -module.log_prob(x, None).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    print(f"normflows: {sum(p.numel() for p in module.parameters()):,} parameters")
    return {
        "train step": TorchProgram(step),
        "log_prob": TorchProgram(torch.no_grad()(lambda: module.log_prob(x, None))),
    }


def peers(options) -> None:
    our_programs, their_programs = ours(options), normflows_glow(options)
    size = sum(leaf.size for leaf in jax.tree.leaves(our_programs["log_prob"].args[0]))
    print(f"ours: {size:,} parameters")
    print("| program | " + " | ".join(COLUMNS[:6]) + " |")
    print("|---" * 7 + "|")
    for name, program in our_programs.items():
        row = compare({"": program}, {"": their_programs[name]}, options.rounds)
        cells = [f"{row[column]:.3f}" for column in COLUMNS[:6]]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def compile_times(options) -> None:
    for depth in (2, options.depth, 2 * options.depth):
        seconds = np.median([ours(options, depth)["train step"].compile() for _ in range(3)])
        print(f"depth {depth}: training step compiles in {seconds:.1f} s", flush=True)


def convolutions(options) -> None:
    net = ConvNet(jax.random.key(0), 2, 4, hidden=(options.hidden, options.hidden))
    net = shake(net)
    x = jax.random.normal(jax.random.key(1), (2, 14, 14, 64))

    def xla(net, x):
        first, middle, last = net.weights
        kernels = (
            first.reshape(-1, 3, 3, 2).transpose(2, 1, 3, 0),
            middle.T[None, None],
            last.reshape(3, 3, 4, -1).transpose(1, 0, 3, 2),
        )
        h = x.T
        for i, (kernel, bias) in enumerate(zip(kernels, net.biases, strict=True)):
            numbers = ("NHWC", "HWIO", "NHWC")
            h = jax.nn.relu(h) if i else h
            h = jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=numbers)
            h = h + bias
        return h.T

    assert np.allclose(net(x), xla(net, x), atol=1e-3)
    for name, forward in (("products", ConvNet.__call__), ("XLA", xla)):
        loss = partial(lambda forward, net, x: (forward(net, x) ** 2).sum(), forward)
        both = jax.jit(jax.value_and_grad(loss, (0, 1)))
        times = []
        for _ in range(options.rounds + 1):
            start = time.perf_counter()
            jax.block_until_ready(both(net, x))
            times.append(time.perf_counter() - start)
        print(f"{name}: value and gradient {1e3 * np.median(times[1:]):.0f} ms", flush=True)


def preprocessing(options) -> None:
    images, _, _, _, levels = load(None)
    steps, size = 200, math.prod(images.shape[1:]) * math.log(2)
    rng = np.random.default_rng(0)
    batches = images[rng.integers(len(images), size=(steps, 64))]
    build = partial(
        nf.glow,
        jax.random.key(0),
        images.shape[1:],
        depth=4,
        hidden=((48, 48), (128, 128)),
        position=4,
    )
    flows = {
        "none": build(),
        "logit, margin 0.05": build(support=nf.recipes.grey_levels(levels)),
        "logit, margin 1e-4": build(support=nf.recipes.grey_levels(levels, margin=1e-4)),
        "logit, margin 1e-6": build(support=nf.recipes.grey_levels(levels, margin=1e-6)),
        "histogram": nf.equalize(build(), images, levels),
    }
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 50, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1000.0), optax.adam(schedule))
    for name, flow in flows.items():
        model = nf.initialize(nf.dequantize(flow, levels), images[:512])
        params, rest = nf.partition(model)

        @jax.jit
        def train(params, batches, rest=rest):
            def step(carry, scanned):
                params, state = carry
                key, x = scanned

                def loss(params):
                    return -nf.combine(params, rest).log_prob_bound(key, x).mean()

                value, grads = jax.value_and_grad(loss)(params)
                updates, state = optimizer.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), value

            keys = jax.random.split(jax.random.key(1), len(batches))
            return jax.lax.scan(step, (params, optimizer.init(params)), (keys, batches))[1]

        losses = train(params, batches)
        print(f"{name}: {losses[-50:].mean() / size:.3f} bits/dim", flush=True)


PARTS = {
    "peers": peers,
    "compile": compile_times,
    "convolutions": convolutions,
    "preprocessing": preprocessing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 32, 3))
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    options.shape = tuple(options.shape)
    jax.config.update("jax_enable_compilation_cache", False)
    names = ("jax", "jaxlib", "normflows", "torch")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions}; {options}")
    PARTS[options.part](options)


if __name__ == "__main__":
    main()
