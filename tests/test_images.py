"""Image layers against NumPy, SciPy and XLA's convolution; Glow's structure; bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from compiled import forward, inverse, log_prob, new, sample
from numpyro.distributions import constraints
from scipy import stats
from small import conv_coupling, normal, shake

import numpyro_flows as nf
from numpyro_flows.convnet import ConvEmbedding, ConvNet
from numpyro_flows.elementwise import Affine

KEY = jax.random.key(0)
TINY = {"depth": 2, "hidden": (4, 4)}


def as_columns(x):
    return x.T


@pytest.mark.parametrize("hidden", [(), (5,), (5, 6)], ids=str)
def test_convnet_is_a_convolution(hidden):
    net = shake(ConvNet(KEY, 3, 2, hidden=hidden, context_size=2, position=2), KEY, 1.0)
    x, context = normal(4, 5, 6, 3), normal(4, 2)

    def convolve(x, weight, last):
        # Rows of a weight's gathered side run over (column, row, channel) of the filter.
        if last:
            kernel = weight.reshape(3, 3, -1, weight.shape[1]).transpose(1, 0, 3, 2)
        else:
            kernel = weight.reshape(len(weight), 3, 3, -1).transpose(2, 1, 3, 0)
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    u, v = (np.arange(6) + 0.5) / 6, (np.arange(5) + 0.5) / 5
    waves = np.stack(
        [np.outer(np.cos(np.pi * b * v), np.cos(np.pi * a * u)) for a in range(2) for b in range(2)]
    )
    h = convolve(x, net.weights[0], False) + net.biases[0]
    h = h + (context @ net.context_weight.T)[:, None, None]
    h = h + np.einsum("khw,ck->hwc", waves, net.position_weight)
    for i in range(1, len(net.weights)):
        h = jax.nn.relu(h)
        last = i == len(net.weights) - 1
        h = (convolve(h, net.weights[i], True) if last else h @ net.weights[i].T) + net.biases[i]
    assert np.allclose(net(x.T, context.T).T, h, atol=1e-4)


def test_new_networks():
    assert not ConvNet(KEY, 2, 3, hidden=(4,))(normal(2, 4, 4, 5)).any()
    features = ConvEmbedding(KEY, (4, 6, 1), 3, hidden=(4,))(normal(2, 5, 4, 6, 1))
    assert features.shape == (2, 5, 18)
    assert features.std() > 0.1
    with pytest.raises(ValueError, match="Unknown activation 'sine'"):
        ConvNet(KEY, 2, 3, activation="sine")
    with pytest.raises(ValueError, match="hidden: expected positive integers"):
        ConvNet(KEY, 2, 3, hidden=(0,))


def test_squeeze_takes_squares_apart():
    x = np.asarray(normal(2, 4, 6, 3))
    y = nf.transforms.Squeeze((4, 6, 3))(x)
    for i in range(2):
        for j in range(2):
            channels = y[..., 3 * (2 * j + i) : 3 * (2 * j + i) + 3]
            assert np.array_equal(channels, x[:, i::2, j::2])


def test_log_determinants_of_the_paper():
    x = normal(3, 4, 6, 3)
    norm = shake(nf.transforms.ActNorm((4, 6, 3)), KEY, 1.0)
    assert np.allclose(forward(norm, x)[1], 24 * norm.log_scale.sum())
    matrix = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    dense = nf.transforms.Pixelwise(nf.transforms.DenseLinear(3), 4, 6)
    dense = jax.tree.map(lambda leaf: jnp.asarray(matrix), dense)
    y, log_det = forward(dense, x)
    assert np.allclose(y, np.einsum("ij,nhwj->nhwi", matrix, x), atol=1e-5)
    assert np.allclose(log_det, 24 * np.linalg.slogdet(matrix.astype(float))[1], rtol=1e-5)


@pytest.mark.parametrize("parity", [0, 1])
def test_checkerboard(parity):
    layer = conv_coupling((3, 4, 2), Affine(), mask="checkerboard", parity=parity)
    x = normal(5, 3, 4, 2)
    moved = np.asarray(forward(layer, x)[0] != x).any((0, 3))
    assert np.array_equal(moved, (np.indices((3, 4)).sum(0) + parity) % 2 == 1)


def test_channels_that_pass_steer_the_others():
    layer = conv_coupling((3, 3, 3), Affine())
    x = normal(1, 3, 3, 3)
    assert np.array_equal(forward(layer, x)[0][..., :1], x[..., :1])
    jacobian = np.asarray(jax.jit(jax.jacobian(lambda x: layer(x[None])[0]))(x[0]))
    own = np.einsum("hwchwc->hwc", jacobian)
    assert (own[..., :1] == 1).all()
    assert np.abs(jacobian[..., 1:, :, :, 1:]).sum() == pytest.approx(np.abs(own[..., 1:]).sum())


@pytest.mark.parametrize(
    "shape", [pytest.param((4, 8, 1), marks=pytest.mark.slow), (8, 4, 3)], ids=str
)
def test_new_glow_rearranges(shape):
    flow = new(nf.glow, shape, levels=2, checkerboards=1, position=2, **TINY)
    z = normal(2, np.prod(shape))
    y, log_det = forward(flow.transform, z)
    assert np.allclose(np.sort(y.reshape(2, -1)), np.sort(z), atol=1e-6)
    assert np.abs(log_det).max() < 1e-6
    assert flow.transform.forward_shape((7, *z.shape[1:])) == (7, *shape)
    assert flow.transform.inverse_shape((7, *shape)) == (7, *z.shape[1:])


def test_latent_vector_is_coarsest_first():
    """Fine numbers change no more than the reach of the fine level's filters."""
    flow = shake(new(nf.glow, (16, 16, 1), levels=2, depth=1, hidden=(4,)), KEY, 0.1)
    z = normal(256)
    y = jax.jit(flow.transform)(jnp.stack([z, z.at[-1].add(1.0), z.at[0].add(1.0)]))
    fine, coarse = np.abs(y[1:] - y[0])[..., 0]
    assert fine[-4:, -4:].max() > 0.1
    assert fine[:8, :8].max() == 0
    assert (coarse > 1e-6).sum() > 32


def test_depth_and_widths_by_level():
    flow = new(nf.glow, (8, 8, 1), levels=2, depth=(1, 3), hidden=((4,), (5, 6)))
    coarse, fine = flow.transform.levels
    assert coarse.parts[0].layers.parts[0].conditioner.weights[1].shape == (3, 6, 5)
    assert fine.parts[1].layers.parts[0].conditioner.weights[0].shape == (1, 4, 18)


def test_programs_do_not_grow_with_depth():
    def size(depth):
        flow = new(nf.glow, (4, 4, 1), levels=1, depth=depth, hidden=(4,))
        return len(str(jax.make_jaxpr(flow.log_prob)(normal(2, 4, 4, 1))))

    assert size(12) < 1.1 * size(4)


def test_structure_is_independent_of_the_key():
    make = jax.jit(lambda key: nf.glow(key, (4, 4, 1), levels=1, **TINY))
    assert jax.tree.structure(make(KEY)) == jax.tree.structure(make(jax.random.key(1)))


@pytest.mark.parametrize("mixing", ["none", "lu", "dense", "householder"])
def test_initialized_steps_see_normal_channels(mixing):
    x = 3 + 2 * normal(64, 4, 4, 1) ** 2
    flow = nf.initialize(new(nf.glow, (4, 4, 1), levels=1, mixing=mixing, **TINY), x)
    z = inverse(flow.transform, x)[0].reshape(64, 4, 4)
    assert np.allclose(z.mean((0, 2)), 0, atol=1e-3)
    assert np.allclose(z.std((0, 2)), 1, atol=1e-3)


def test_class_conditional():
    flow = shake(new(nf.glow, (4, 4, 1), context_dim=3, **TINY), KEY, 0.3)
    bound = flow.condition(jnp.eye(3))
    sample = jax.eval_shape(lambda key: bound.sample(key, (2,), temperature=0.7), KEY)
    assert sample.shape == (2, 3, 4, 4, 1)
    log_prob = jax.jit(lambda x, context: flow.condition(context).log_prob(x))
    x = normal(3, 4, 4, 1)
    together = log_prob(x, jnp.eye(3))
    assert np.allclose(together[1:2], log_prob(x[1:2], jnp.eye(3)[1:2]), rtol=1e-4)
    assert np.ptp(log_prob(x[:1], jnp.eye(3))) > 1e-3


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_temperature_scales_deviations_from_the_mean(temperature):
    flow = new(nf.realnvp, 2, base=dist.Normal(jnp.array([1.0, -2.0]), 3.0), depth=2, hidden=(4,))
    draws = flow.sample(KEY, (20_000,), temperature=temperature)
    assert np.allclose(draws.mean(0), [1, -2], atol=0.05)
    assert np.allclose(draws.std(0), 3 * temperature, atol=0.05)


def test_temperature_needs_a_mean():
    flow = new(nf.realnvp, 2, base=dist.Cauchy(jnp.zeros(2), 1.0), depth=2, hidden=(4,))
    with pytest.raises(ValueError, match="temperature: the base distribution .* has no mean"):
        flow.sample(KEY, (2,), temperature=0.5)
    with pytest.raises(ValueError, match="temperature: expected a number from 0 on, got -1"):
        flow.sample(KEY, (2,), temperature=-1)


@pytest.mark.parametrize("finer", [1, 2, 4])
def test_a_context_image_is_seen_where_it_lies(finer):
    """A pixel of the context changes its own place and its neighbours, at each resolution."""
    shape = (6, 8, 2)
    seen = (6 * finer, 8 * finer, 1)
    layer = conv_coupling(shape, Affine(), context_shape=seen, hidden=())  # one 3 x 3 convolution
    x, context = normal(*shape), np.zeros(seen)
    row, column = 4 * finer + finer - 1, 2 * finer
    context[row, column] = 9.0
    zeros = jnp.zeros(context.size)
    plain, lit = (forward(layer, x, jnp.asarray(c.ravel()))[0] for c in (zeros, context))
    changed = np.argwhere((np.asarray(plain) != np.asarray(lit)).any(-1))
    assert changed.min(0).tolist() == [3, 1]
    assert changed.max(0).tolist() == [5, 3]
    assert len(changed) == 9


def test_glow_squeezes_a_context_image_with_the_image():
    """Below the first level too, a pixel of the context acts nearby; nothing far away changes."""
    made = new(nf.glow, (32, 32, 1), levels=2, depth=1, hidden=(), context_shape=(32, 32, 2))
    transform = shake(made, KEY, 0.3).transform
    assert transform.context_dim == 2048
    z, context = normal(1024), np.zeros((32, 32, 2))
    context[5, 26, 1] = 3.0
    plain, lit = (
        np.asarray(forward(transform, z, jnp.asarray(c.ravel()))[0]) for c in (0 * context, context)
    )
    rows, columns, _ = np.nonzero(plain != lit)
    # 3 x 3 convolutions reach 4 pixels at a quarter of the size and 2 at a half, some after others.
    assert {(5, 26), (4, 27)} <= set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert rows.max() <= 5 + 16
    assert columns.min() >= 26 - 16


def test_grey_levels_are_the_logit_of_realnvp(x64):
    support = nf.recipes.grey_levels(256, margin=0.05)
    flow = new(nf.glow, (4, 4, 1), levels=1, support=support, **TINY)
    y = 256 * jax.random.uniform(KEY, (3, 4, 4, 1))
    p = 0.05 + 0.9 * np.asarray(y) / 256
    z = np.log(p) - np.log1p(-p)
    slope = 0.9 / 256 / (p * (1 - p))
    expected = stats.norm.logpdf(z).sum((1, 2, 3)) + np.log(slope).sum((1, 2, 3))
    assert np.allclose(log_prob(flow, y), expected)


def test_a_support_for_each_channel():
    support = (constraints.positive, constraints.real)
    flow = new(nf.glow, (4, 4, 2), levels=1, support=support, **TINY)
    x = sample(flow, KEY, (3,))
    assert (x[..., 0] > 0).all()
    assert (x[..., 1] < 0).any()
    plain = new(nf.glow, (4, 4, 2), levels=1, **TINY)
    logs = np.log(x[..., 0])
    expected = log_prob(plain, x.at[..., 0].set(logs)) - logs.sum((1, 2))
    assert np.allclose(log_prob(flow, x), expected, rtol=1e-5)


def test_equalization_is_the_histogram(dtype):
    counts = np.array([90.0, 1.0, 4.0, 5.0])
    t = nf.transforms.Equalization(counts, (1,))
    y = np.linspace(0.01, 3.99, 200)
    expected = stats.norm.ppf(np.interp(y, np.arange(5), np.append(0, np.cumsum(counts)) / 100))
    assert np.allclose(inverse(t, y[:, None].astype(dtype))[0][:, 0], expected, atol=1e-3)
    levels = np.floor(forward(t, jax.random.normal(KEY, (20_000, 1), dtype))[0][:, 0])
    assert np.allclose(np.bincount(levels.astype(int)) / 20_000, counts / 100, atol=0.01)


def test_equalization_at_the_edges():
    t = nf.transforms.Equalization(jnp.array([9.0, 1.0]), (1,))
    y = jnp.array([[0.0], [2.0]])
    x, log_det = inverse(t, y)
    assert np.isfinite(x).all()
    assert np.isfinite(log_det).all()
    assert np.allclose(forward(t, x)[0], y, atol=1e-5)
    assert np.array_equal(forward(t, jnp.array([[-40.0], [40.0]]))[0], y)


BAD = {
    "rank": (lambda: nf.glow(KEY, (28, 28)), ValueError, r"shape \(H, W, C\) of an image"),
    "int shape": (lambda: nf.glow(KEY, 784), ValueError, r"shape \(H, W, C\) of an image"),
    "odd size": (
        lambda: nf.glow(KEY, (30, 28, 1), levels=2),
        ValueError,
        r"divisible by 2\*\*levels = 4, got 30 x 28. Nearest: 32 x 28",
    ),
    "levels": (lambda: nf.glow(KEY, (8, 8, 1), levels=0), ValueError, "levels: expected at least"),
    "key": (lambda: nf.glow(0, (8, 8, 1)), TypeError, r"jax.random.key\(0\)"),
    "mixing": (lambda: nf.glow(KEY, (8, 8, 1), mixing="qr"), ValueError, "mixing: expected one"),
    "depths": (
        lambda: nf.glow(KEY, (8, 8, 1), levels=2, depth=(1, 2, 3)),
        ValueError,
        "depth: expected one entry for each of 2 levels, got 3",
    ),
    "squeeze": (
        lambda: nf.transforms.Squeeze((3, 4, 1)),
        ValueError,
        "height and width divisible by 2 and 2, got 3 x 4",
    ),
    "pixelwise": (
        lambda: nf.transforms.Pixelwise(nf.transforms.Squeeze((2, 2, 1)), 2, 2),
        ValueError,
        "Pixelwise: expected a transform of vectors",
    ),
    "mask": (
        lambda: nf.transforms.ConvCoupling(KEY, (2, 2, 2), Affine(), mask="rows"),
        ValueError,
        "mask: expected 'channel' or 'checkerboard', got 'rows'",
    ),
    "contexts": (
        lambda: nf.transforms.ConvCoupling(
            KEY, (2, 2, 2), Affine(), context_dim=1, context_shape=(2, 2, 1)
        ),
        ValueError,
        "got both",
    ),
    "a context image of another size": (
        lambda: nf.transforms.ConvCoupling(KEY, (4, 4, 2), Affine(), context_shape=(6, 4, 1)),
        ValueError,
        r"context_shape: expected multiples of the image's 4 x 4 pixels, got \(6, 4, 1\)",
    ),
    "a context of other pixels": (
        lambda: nf.glow(KEY, (4, 4, 1), levels=1, context_shape=(8, 8, 1)),
        ValueError,
        r"context_shape: expected \(4, 4, channels\)",
    ),
    "a factor of one number": (
        lambda: nf.transforms.Squeeze((4, 4, 1), (2,)),
        ValueError,
        "factor: expected rows and columns",
    ),
    "no levels": (lambda: nf.transforms.MultiScale([]), ValueError, "at least one level"),
    "levels that do not fit": (
        lambda: nf.transforms.MultiScale(
            [nf.transforms.Squeeze((4, 4, 1)).inv, nf.transforms.Squeeze((4, 4, 1)).inv]
        ),
        ValueError,
        r"must begin with \(4, 4\) pixels and more than 1 channels, got \(2, 2, 4\)",
    ),
    "counts": (lambda: nf.transforms.Equalization([1.0, 0.0], (2,)), ValueError, "add 1 to each"),
    "histograms": (
        lambda: nf.transforms.Equalization(np.ones((2, 4)), (3,)),
        ValueError,
        r"counts: expected shape \(L,\), or \(C, L\)",
    ),
    "angles": (
        lambda: nf.glow(KEY, (8, 8, 1), support=constraints.circular),
        ValueError,
        "got angles, which Glow would tear",
    ),
    "margin": (lambda: nf.recipes.grey_levels(256, margin=0.5), ValueError, "between 0 and 1/2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call()


def test_images_of_the_wrong_rank():
    flow = new(nf.glow, (4, 4, 1), levels=1, **TINY)
    with pytest.raises(ValueError, match=r"expected shape \(\*batch, 4, 4, 1\), got \(5, 4, 4\)"):
        flow.log_prob(jnp.zeros((5, 4, 4)))
