"""Handwritten digits: a small class-conditional Glow, trained on MNIST by a CPU in about an hour.

    python examples/mnist_glow.py                          # train, evaluate, draw pictures
    python examples/mnist_glow.py --model mnist.flow       # evaluate what was trained before
    python examples/mnist_glow.py --epochs 1 --depth 2     # a quick look

MNIST as published (28 x 28, 256 grey levels, uniform dequantisation) is looked for in the folder
``--data``, else in the one that NUMPYRO_FLOWS_DATA names or ../shared/data; without it the 8 x 8
digits of scikit-learn take its place. Training continues from ``--checkpoint`` if that is there.

Prints bits per dimension of the test images, both bounds, and the error of the round trip; draws
samples at several temperatures, samples of each class and interpolations.
"""

import argparse
import gzip
import math
import os
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import numpyro_flows as nf
from numpyro_flows.diagnostics import bits_per_dim

TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)


def load(folder):
    """Images (n, H, W, 1), labels, the same of the test set, and the number of grey levels."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(folder or Path(os.environ.get("NUMPYRO_FLOWS_DATA") or beside) / "mnist")
    if not folder.is_dir():
        from sklearn.datasets import load_digits

        print(f"No MNIST in {folder}: scikit-learn's 8 x 8 digits instead.")
        digits = load_digits()
        images, labels = digits.images.astype(np.uint8)[..., None], digits.target
        return images[:1500], labels[:1500], images[1500:], labels[1500:], 17

    def read(name, offset):
        with gzip.open(folder / f"{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset)

    return (
        read("train-images-idx3", 16).reshape(-1, 28, 28, 1),
        read("train-labels-idx1", 8),
        read("t10k-images-idx3", 16).reshape(-1, 28, 28, 1),
        read("t10k-labels-idx1", 8),
        256,
    )


def one_hot(labels):
    return np.eye(10, dtype=np.float32)[labels]


def build(images, labels, num_levels, options):
    key = jax.random.key(options.seed)
    flow = nf.glow(
        key,
        images.shape[1:],
        levels=2,
        depth=options.depth,
        hidden=[(options.hidden[0],) * 2, (options.hidden[1],) * 2],
        context_dim=10,
        position=4,
    )
    # Four fifths of all pixels are 0: equalised, their noise has as much room as their share.
    flow = nf.equalize(flow, images, num_levels)
    noise = None
    if options.variational:
        noise = nf.dequantization.noise_flow(key, images.shape[1:])
    model = nf.dequantize(flow, num_levels, noise)
    return nf.initialize(model, images[:512], one_hot(labels[:512]))


def train(model, images, labels, options):
    steps = options.epochs * math.ceil(len(images) / options.batch)
    rate = optax.warmup_cosine_decay_schedule(0.0, options.rate, min(200, steps // 10), steps)
    return nf.fit(
        jax.random.key(options.seed + 1),
        model,
        images,
        one_hot(labels),
        optimizer=optax.chain(optax.clip_by_global_norm(1000.0), optax.adam(rate)),
        batch_size=options.batch,
        max_epochs=options.epochs,
        patience=options.epochs,
        val_fraction=0.03,
        checkpoint=options.checkpoint,
    )


def report(model, images, labels):
    """Bits per dimension of the test images, and what is left of them after a round trip."""
    key, count = jax.random.key(2), len(images)
    bits = bits_per_dim(key, model, images, one_hot(labels))
    dim = math.prod(images.shape[1:])
    error = bits.std() / count**0.5
    print(f"test bits/dim given the class {bits.mean():.4f} (standard error {error:.4f})")
    # P(x) is at least P(x, class), so this bound holds without the class as well.
    print(f"test bits/dim without it, at most {bits.mean() + math.log2(10) / dim:.4f}")
    few = slice(0, 500)
    tight = bits_per_dim(key, model, images[few], one_hot(labels[few]), num_samples=16)
    print(f"the first {len(tight)} images: {bits[few].mean():.4f}, 16 draws {tight.mean():.4f}")

    @jax.jit
    def there_and_back(y, context):
        transform = model.flow.condition(context).transform
        return transform(transform.inv(y))

    noise = jax.random.uniform(key, images[:1000].shape)
    real = images[:1000] + noise
    context = one_hot(labels[:1000])
    drawn = model.flow.condition(context).sample(key)
    for name, y in (("test images", real), ("samples at temperature 1", drawn)):
        worst = np.abs(there_and_back(y, context) - y).max() / model.levels
        print(f"round trip of {len(y)} {name}: largest error {worst:.1e} of the range")


def draw(path, rows, title, labels=()):
    axis = nf.plot.images(rows, labels=labels)
    axis.set_title(title)
    axis.figure.savefig(path, dpi=80)
    plt.close(axis.figure)


def pictures(model, images, labels, folder):
    plt.switch_backend("agg")
    folder = Path(folder)
    classes = model.condition(one_hot(np.arange(10)))
    key = jax.random.key(3)
    # The same latent vectors at each temperature.
    rows = [classes.sample(key, temperature=t) for t in TEMPERATURES]
    draw(folder / "temperatures.png", rows, "one draw per class", TEMPERATURES)
    rows = classes.sample(jax.random.key(4), (8,), temperature=0.8)
    draw(folder / "classes.png", rows, "draws at temperature 0.8")
    rows = []
    for digit in range(5):
        context = one_hot(digit)
        transform = model.flow.condition(context).transform
        ends = images[labels == digit][:2] + 0.5
        start, end = np.asarray(transform.inv(ends))
        share = np.linspace(0, 1, 10)[:, None]
        rows.append(transform((1 - share) * start + share * end))
    rows = np.clip(rows, 0, model.levels)
    draw(folder / "interpolations.png", rows, "between two test images")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder with the four idx files of MNIST, gzipped")
    parser.add_argument("--model", help="file of a trained model, to evaluate alone")
    parser.add_argument("--save", default="mnist.flow", help="where the trained model goes")
    parser.add_argument("--checkpoint", help="file to continue from and to write to")
    parser.add_argument("--pictures", default=".", help="folder for the pictures")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="largest learning rate")
    parser.add_argument("--depth", type=int, default=8, help="steps per level")
    parser.add_argument("--hidden", type=int, nargs=2, default=(64, 192), help="of each level")
    parser.add_argument("--variational", action="store_true", help="variational dequantisation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    images, labels, test_images, test_labels, num_levels = load(options.data)
    if options.model:
        model = nf.load(options.model)
    else:
        model = build(images, labels, num_levels, options)
        count = sum(leaf.size for leaf in jax.tree.leaves(nf.partition(model)[0]))
        print(f"{count:,} parameters", flush=True)
        wall, cpu = time.perf_counter(), time.process_time()
        fitted = train(model, images, labels, options)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"trained in {wall / 60:.1f} minutes, {cpu / 60:.1f} CPU minutes")
        per_bit = math.prod(images.shape[1:]) * math.log(2)
        losses = zip(fitted.train_losses, fitted.val_losses, strict=True)
        for i, (loss, val) in enumerate(losses):
            print(f"epoch {i + 1}: {loss / per_bit:.4f} train, {val / per_bit:.4f} val bits/dim")
        model = fitted.flow
        nf.save(options.save, model)
    report(model, test_images, test_labels)
    pictures(model, test_images, test_labels, options.pictures)
    print(f"Pictures: temperatures.png, classes.png, interpolations.png in {options.pictures}")


if __name__ == "__main__":
    main()
