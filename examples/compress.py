"""A lossy image codec: a flow's latent vector, rounded and entropy-coded, beside JPEG.

    python examples/mnist_glow.py                  # trains mnist.flow
    python examples/compress.py --model mnist.flow [--picture compress.png]

A latent vector has as many numbers as the image has pixels, and yet compresses: under the flow its
numbers are independent and standard normal, so each costs what a normal number rounded to a grid
costs, whatever the image. The sender maps an image to its latent vector, rounds it and writes it by
a range coder (constriction; zlib where it is not installed); the receiver decodes the same integers
and maps them back.

Most of the numbers hold the noise between grey levels, which nobody wants. So each is rounded as
coarsely as the image allows: to a grid whose width moves the image by ``step`` grey levels. For the
coarse half of the vector the slopes are averages over training images; for the fine half, those at
the image that the coarse half alone gives, which the receiver knows by then. The class is sent
along, one of ten.

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

STEPS = (8, 16, 32, 64, 96, 128, 192, 256)
QUALITIES = (5, 10, 25, 50, 75, 90, 95)
LARGEST = 2**12  # of the rounded numbers, far beyond what a flow gives
WIDEST = 16.0  # a standard normal number rounded to this grid is 0
PROBES = 8


def encode(symbols, widths):
    """Integers, standard normal in units of ``1 / widths``, to bytes."""
    try:
        import constriction
    except ImportError:
        return zlib.compress(symbols.astype(np.int16).tobytes(), 9)
    normal = constriction.stream.model.QuantizedGaussian(-LARGEST, LARGEST)
    coder = constriction.stream.queue.RangeEncoder()
    scales = 1 / widths.ravel().astype(float)
    coder.encode(symbols.astype(np.int32).ravel(), normal, np.zeros_like(scales), scales)
    return coder.get_compressed().tobytes()


def decode(data, widths):
    """Undo :func:`encode`."""
    try:
        import constriction
    except ImportError:
        return np.frombuffer(zlib.decompress(data), np.int16).reshape(widths.shape)
    normal = constriction.stream.model.QuantizedGaussian(-LARGEST, LARGEST)
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, np.uint32))
    scales = 1 / widths.ravel().astype(float)
    return coder.decode(normal, np.zeros_like(scales), scales).reshape(widths.shape)


class Codec:
    """What sender and receiver share: the flow, and how finely each latent number is rounded."""

    def __init__(self, model, images, labels):
        self.model = model
        flow = model.flow

        @jax.jit
        def slopes(z, context):
            # Squared lengths of the Jacobian's columns, by random signs.
            image, pull = jax.vjp(flow.condition(context).transform, z)
            keys = jax.random.split(jax.random.key(0), PROBES)
            signs = jax.vmap(lambda key: jax.random.rademacher(key, image.shape, z.dtype))(keys)
            return jax.lax.map(lambda sign: pull(sign)[0] ** 2, signs).mean(0)

        self.slopes = slopes
        self.to_latent = jax.jit(lambda y, c: flow.condition(c).transform.inv(y))
        self.to_image = jax.jit(lambda z, c: flow.condition(c).transform(z))
        multiscale = flow.transform.parts[0]
        self.half = math.prod(multiscale.levels[0].event_shape)
        context = one_hot(labels)
        z = np.asarray(self.to_latent(images + 0.5, context))
        self.average = np.asarray(slopes(z, context)).mean(0)[: self.half]

    def widths(self, squares, step):
        # Powers of the root of 2, so that a last digit does not part sender and receiver.
        widths = np.minimum(step / np.sqrt(np.maximum(squares, 1e-12)), WIDEST)
        return 2 ** (np.rint(2 * np.log2(widths)) / 2)

    def coarse_widths(self, count, step):
        return np.broadcast_to(self.widths(self.average, step), (count, self.half))

    def fine_widths(self, coarse, context, step):
        dim = math.prod(self.model.event_shape)
        known = np.pad(coarse, [(0, 0), (0, dim - self.half)]).astype(np.float32)
        squares = np.asarray(self.slopes(known, context))
        return self.widths(squares[:, self.half :], step)

    def send(self, images, labels, step):
        context = one_hot(labels)
        z = np.asarray(self.to_latent(images + 0.5, context))
        widths = self.coarse_widths(len(z), step)
        symbols = np.rint(z[:, : self.half] / widths).astype(int)
        fine = self.fine_widths(symbols * widths, context, step)
        return encode(symbols, widths), encode(np.rint(z[:, self.half :] / fine).astype(int), fine)

    def receive(self, data, labels, step):
        context = one_hot(labels)
        widths = self.coarse_widths(len(labels), step)
        coarse = decode(data[0], widths) * widths
        fine = self.fine_widths(coarse, context, step)
        z = np.concatenate([coarse, decode(data[1], fine) * fine], axis=1).astype(np.float32)
        y = np.asarray(self.to_image(z, context))
        return np.clip(np.floor(y), 0, self.model.levels - 1)


def psnr(images, decoded, levels):
    return 10 * math.log10((levels - 1) ** 2 / np.mean((images.astype(float) - decoded) ** 2))


def ours(codec, images, labels):
    """Bits per pixel, PSNR and what arrives, for each step."""
    for step in STEPS:
        data = codec.send(images, labels, step)
        decoded = codec.receive(data, labels, step)
        bits = 8 * sum(map(len, data)) + len(images) * math.log2(10)
        yield bits / images.size, psnr(images, decoded, codec.model.levels), decoded


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
    parser.add_argument("--images", type=int, default=256, help="number of test images")
    parser.add_argument("--picture", default="compress.png", help="where the picture goes")
    options = parser.parse_args()
    model = nf.load(options.model)
    train_images, train_labels, images, labels, levels = load(options.data)
    if images.shape[1:] != model.event_shape or levels != model.levels:
        parser.error(f"{options.model} is a model of other images than those found.")
    images, labels = images[: options.images], labels[: options.images]
    codec = Codec(model, train_images[:512], train_labels[:512])
    coders = {
        "flow": list(ours(codec, images, labels)),
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
    curve.set(xlabel="bits per pixel", ylabel="PSNR, dB", xlim=(0, None))
    curve.legend()
    rows = [images[:10], *(decoded[:10] for _, _, decoded in coders["flow"])]
    labels = ["original", *(f"{rate:.2f}" for rate, _, _ in coders["flow"])]
    nf.plot.images(np.stack(rows), labels=labels, ax=shown)
    shown.set(title="flow, by bits per pixel", xticks=[])
    figure.savefig(options.picture, dpi=100)
    print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
