"""A lossy image codec: a flow's latent vector, rounded and entropy-coded, beside JPEG.

    python examples/mnist_glow.py                  # trains mnist.flow
    python examples/compress.py --model mnist.flow [--picture compress.png]

A latent vector has as many numbers as the image has pixels, and yet compresses: under the flow its
numbers are independent and standard normal, so each costs what a normal number rounded to a grid
of that width costs, whatever the image. The sender maps an image to its latent vector, rounds it
to multiples of a step and writes them by a range coder (constriction; zlib where it is not
installed); the receiver decodes the same integers and maps them back. A larger step costs fewer
bits. The class is sent along, one of ten.

Prints bits per pixel and PSNR for each step, and the same for JPEG (Pillow), once for each digit
in a file of its own, and once for all digits on one page, where the file's header does not count.
"""

import argparse
import io
import math
import zlib

import jax
import matplotlib.pyplot as plt
import numpy as np
from mnist_glow import load, one_hot
from PIL import Image

import numpyro_flows as nf

STEPS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
QUALITIES = (5, 10, 25, 50, 75, 90, 95)
LARGEST = 2**12  # of the rounded numbers, far beyond what a flow gives


def encode(symbols, step):
    """Integers, standard normal in units of ``1 / step``, to bytes."""
    try:
        import constriction
    except ImportError:
        return zlib.compress(symbols.astype(np.int16).tobytes(), 9)
    normal = constriction.stream.model.QuantizedGaussian(-LARGEST, LARGEST, 0.0, 1 / step)
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(symbols.astype(np.int32).ravel(), normal)
    return coder.get_compressed().tobytes()


def decode(data, count, step):
    """Undo :func:`encode`."""
    try:
        import constriction
    except ImportError:
        return np.frombuffer(zlib.decompress(data), np.int16).astype(int)
    normal = constriction.stream.model.QuantizedGaussian(-LARGEST, LARGEST, 0.0, 1 / step)
    return constriction.stream.queue.RangeDecoder(np.frombuffer(data, np.uint32)).decode(
        normal, count
    )


def psnr(images, decoded, levels):
    return 10 * math.log10((levels - 1) ** 2 / np.mean((images.astype(float) - decoded) ** 2))


def ours(model, images, labels):
    """Bits per pixel, PSNR and what arrives, for each step."""
    context = one_hot(labels)
    transform = model.flow.condition(context).transform
    z = np.asarray(jax.jit(transform.inv)(images + 0.5))
    back = jax.jit(transform.__call__)
    for step in STEPS:
        symbols = np.clip(np.rint(z / step), -LARGEST, LARGEST).astype(int)
        data = encode(symbols, step)
        received = decode(data, symbols.size, step).reshape(symbols.shape)
        assert np.array_equal(received, symbols)
        decoded = np.clip(np.rint(back(received.astype(z.dtype) * step) - 0.5), 0, model.levels - 1)
        bits = 8 * len(data) + len(images) * math.log2(10)
        yield bits / images.size, psnr(images, decoded, model.levels), decoded


def jpeg(pixels, quality):
    """One page through JPEG: the number of bytes and the page that comes back."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, optimize=True)
    return len(file.getvalue()), np.asarray(Image.open(file))


def jpeg_files(images, levels):
    for quality in QUALITIES:
        coded = [jpeg(image[..., 0], quality) for image in images]
        decoded = np.stack([page for _, page in coded])[..., None]
        bits = 8 * sum(size for size, _ in coded)
        yield bits / images.size, psnr(images, decoded, levels), decoded


def jpeg_page(images, levels):
    """All images on one page, 4 pixels of it white around each, so that no two share a block."""
    n, height, width, _ = images.shape
    columns = math.isqrt(n)
    pad = [(0, 0), (0, -height % 8), (0, -width % 8)]
    tiles = np.pad(images[: columns**2, ..., 0], pad)
    tall, wide = tiles.shape[1:]
    page = tiles.reshape(columns, columns, tall, wide).transpose(0, 2, 1, 3)
    page = page.reshape(columns * tall, columns * wide)
    for quality in QUALITIES:
        size, back = jpeg(page, quality)
        back = back.reshape(columns, tall, columns, wide).transpose(0, 2, 1, 3)
        decoded = back.reshape(-1, tall, wide)[:, :height, :width, None]
        kept = images[: columns**2]
        yield 8 * size / kept.size, psnr(kept, decoded, levels), decoded


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mnist.flow", help="what mnist_glow.py saved")
    parser.add_argument("--data", help="folder with the four idx files of MNIST, gzipped")
    parser.add_argument("--images", type=int, default=1024, help="number of test images")
    parser.add_argument("--picture", default="compress.png", help="where the picture goes")
    options = parser.parse_args()
    model = nf.load(options.model)
    _, _, images, labels, levels = load(options.data)
    if images.shape[1:] != model.event_shape or levels != model.levels:
        parser.error(f"{options.model} is a model of other images than those found.")
    images, labels = images[: options.images], labels[: options.images]
    coders = {
        "flow": list(ours(model, images, labels)),
        "JPEG, a file each": list(jpeg_files(images, levels)),
        "JPEG, one page": list(jpeg_page(images, levels)),
    }
    settings = {"flow": STEPS}
    print("| coder | step or quality | bits per pixel | PSNR, dB |\n|---|---|---|---|")
    for name, results in coders.items():
        for setting, (rate, quality, _) in zip(settings.get(name, QUALITIES), results, strict=True):
            print(f"| {name} | {setting} | {rate:.3f} | {quality:.1f} |")
    plt.switch_backend("agg")
    figure, (curve, shown) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name, results in coders.items():
        rates, qualities, _ = zip(*results, strict=True)
        curve.plot(rates, qualities, marker="o", label=name)
    curve.set(xlabel="bits per pixel", ylabel="PSNR, dB", xscale="log")
    curve.legend()
    rows = [images[:10], *(decoded[:10] for _, _, decoded in coders["flow"])]
    shown.imshow(
        np.stack(rows)[..., 0].transpose(0, 2, 1, 3).reshape(len(rows) * images.shape[1], -1),
        cmap="gray_r",
    )
    shown.set_yticks(
        (np.arange(len(rows)) + 0.5) * images.shape[1],
        ["original", *(f"{rate:.2f}" for rate, _, _ in coders["flow"])],
    )
    shown.set(title="flow, by bits per pixel", xticks=[])
    figure.savefig(options.picture, dpi=100)
    print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
