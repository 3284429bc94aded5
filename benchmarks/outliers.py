"""Out of distribution: AUROC of the tests of ``nf.diagnostics`` for a Glow of handwritten digits.

    python examples/mnist_glow.py                             # trains mnist.flow
    python benchmarks/outliers.py --model mnist.flow [--fashion FOLDER]

Inside are MNIST's test images; outside are Fashion-MNIST (Debian package dataset-fashion-mnist, or
``--fashion`` a folder with its idx files), the test images turned by 90 degrees, uniform noise, and
blank pages. The model is conditional: an image's likelihood is the mean
over the ten classes, log 1/10 sum_y P(x | y). Scores, high inside: the likelihood; minus the
statistic of the typicality test for single images and for batches of 10 and 50; the p-value of the
latent chi-square test, under the likeliest class; the likelihood ratio to a background model, which
is trained here, one epoch on images with a fifth of their pixels drawn anew.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax

import numpyro_flows as nf
from numpyro_flows import diagnostics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from mnist_glow import load, one_hot

FASHION = "/usr/share/datasets/fashion-mnist"
KEY = jax.random.key(0)


def by_class(model, images):
    """log P(x) in nats, and the latent vectors under the likeliest class."""
    size = math.prod(images.shape[1:]) * math.log(2)
    each = -size * np.stack(
        [
            diagnostics.bits_per_dim(
                KEY, model, images, np.broadcast_to(one_hot(c), (len(images), 10))
            )
            for c in range(10)
        ]
    )
    best = each.argmax(0)
    log_probs = np.logaddexp.reduce(each, axis=0) - math.log(10)
    noise = np.asarray(jax.random.uniform(KEY, images.shape))
    inverse = jax.jit(lambda y, c: model.flow.condition(c).transform.inv(y))
    return log_probs, np.asarray(inverse(images + noise, one_hot(best)))


def background_model(images, epochs):
    perturbed = np.asarray(diagnostics.perturb_levels(KEY, images))
    flow = nf.glow(KEY, images.shape[1:], depth=4, hidden=((32, 32), (96, 96)), position=4)
    model = nf.dequantize(nf.equalize(flow, perturbed))
    model = nf.initialize(model, perturbed[:512])
    steps = epochs * -(-len(images) // 64)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, min(100, steps // 10), steps)
    fitted = nf.fit(
        KEY, model, perturbed, optimizer=optax.adam(rate), batch_size=64, max_epochs=epochs,
        val_fraction=0.02,
    )  # fmt: skip
    return fitted.flow


def batched(values, size):
    return values[: len(values) // size * size].reshape(-1, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mnist.flow")
    parser.add_argument("--data")
    parser.add_argument("--fashion", default=FASHION)
    parser.add_argument("--images", type=int, default=1000, help="of each kind")
    parser.add_argument("--background-epochs", type=int, default=1)
    options = parser.parse_args()
    images, _, test_images, _, _ = load(options.data)
    model = nf.load(options.model)
    n = options.images
    rng = np.random.default_rng(0)
    # The file begins with the easier half of the digits.
    test_images = rng.permutation(test_images)
    kinds = {
        "MNIST": test_images[:n],
        "Fashion-MNIST": load(options.fashion)[2][:n],
        "turned by 90 degrees": np.rot90(test_images[:n], axes=(1, 2)),
        "uniform noise": rng.integers(256, size=test_images[:n].shape, dtype=np.uint8),
        "blank": np.zeros_like(test_images[:n]),
    }
    start = time.perf_counter()
    background = background_model(images, options.background_epochs)
    print(f"background model: {time.perf_counter() - start:.0f} s")
    # Other test images are the reference: held out, as the inside ones are.
    reference, _ = by_class(model, test_images[-n:])
    size = math.prod(test_images.shape[1:]) * math.log(2)
    scores, bits = {}, {}
    for kind, x in kinds.items():
        log_probs, z = by_class(model, x)
        bits[kind] = -log_probs.mean() / size
        scores[kind] = {
            "likelihood": log_probs,
            **{
                f"typicality, {m}": -diagnostics.typicality(
                    batched(log_probs, m), reference
                ).statistic
                for m in (1, 10, 50)
            },
            "latent chi-square": diagnostics.latent_chi_square(z),
            "likelihood ratio": log_probs + size * diagnostics.bits_per_dim(KEY, background, x),
        }
    names = list(scores["MNIST"])
    print("| outside | bits/dim | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 2) + "|")
    for kind, of_kind in scores.items():
        cells = [
            ""
            if kind == "MNIST"
            else f"{diagnostics.auroc(scores['MNIST'][name], of_kind[name]):.3f}"
            for name in names
        ]
        print(f"| {kind} | {bits[kind]:.3f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
