"""Pictures: what was drawn, with which labels and limits."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_flows as nf
from numpyro_flows.training import FitResult

plt = pytest.importorskip("matplotlib.pyplot")
plt.switch_backend("agg")

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def points(ax, which=0):
    return np.asarray(ax.collections[which].get_offsets())


def legend_texts(place):
    legend = place.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_losses_of_a_fit():
    fitted = FitResult(None, np.array([9.0, 3.0, 2.0]), np.array([8.0, 2.5, 2.7]), 2, 0)
    ax = nf.plot.losses(fitted, unit="bits")
    train, val, best = ax.lines
    np.testing.assert_array_equal(train.get_ydata(), fitted.train_losses)
    np.testing.assert_array_equal(val.get_ydata(), fitted.val_losses)
    np.testing.assert_array_equal(val.get_xdata(), [1, 2, 3])
    assert best.get_xdata()[0] == 2
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss per row (bits)")
    assert legend_texts(ax) == ["training", "validation", "returned"]
    given = plt.figure().subplots()
    alone = FitResult(None, np.array([9.0, 3.0]), np.array([]), 2, 0)
    assert nf.plot.losses(alone, ax=given) is given
    assert len(given.lines) == 1


@pytest.fixture(scope="module")
def guide():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", 2):
            theta = numpyro.sample("theta", dist.Normal(mu, 1.0))
            numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    return nf.fit_guide(KEY, nf.AutoFlow(model), jnp.array([0.0, 1.0]), progress_bar=False)


def test_losses_of_a_guide(guide):
    """The preconditioner of a normal posterior leaves nothing to train."""
    assert len(guide.losses) == 0
    ax = nf.plot.losses(guide)
    assert [line.get_ydata()[0] for line in ax.lines] == [-guide.elbo]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "negative ELBO (nats)")


def test_losses_of_many_noisy_steps():
    steps = np.arange(2000)
    curve = 1e6 * np.exp(-steps / 5) + 3.0 + RNG.normal(size=2000)
    curve[500:520] = np.nan
    ax = nf.plot.losses({"one": curve, "other": curve + 5})
    raw, median, *_ = ax.lines
    assert len(ax.lines) == 4
    np.testing.assert_array_equal(raw.get_ydata(), curve)
    # The running median lies within the noise, over what it runs over.
    x, y = median.get_xdata(), median.get_ydata()
    late = (x > 300) & np.isfinite(y)
    assert np.abs(y[late] - 3).max() < 1
    np.testing.assert_allclose(y[-1], np.median(curve[-20:]))
    assert np.abs(x[-1] - 1990) <= 1
    assert legend_texts(ax) == ["one", "other"]
    low, high = ax.get_ylim()
    assert 0 < low < 3
    assert 8 < high < 20  # the first losses are a millionfold above


def test_scatter_of_draws_and_a_reference():
    draws = RNG.normal(size=(5000, 2)) * [1, 100]
    draws[0] = 1e9
    reference = draws[1:3001] + np.array([4, 0])
    ax = nf.plot.scatter(draws, reference, labels=("flow", "data"), names=["a", "b"])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")
    assert legend_texts(ax) == ["flow", "data"]
    drawn = [points(ax, i) for i in (0, 1)]
    assert [1000 < len(x) <= 2000 for x in drawn] == [True, True]
    assert ax.collections[0].zorder > ax.collections[1].zorder
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    assert -5 < left < -2.5
    assert 6 < right < 9
    assert -500 < low < -250
    assert 250 < high < 500
    np.testing.assert_array_equal(points(nf.plot.scatter(draws, num_points=5000)), draws)


SITES = {"mu": RNG.normal(size=300), "theta": RNG.normal(size=(300, 2))}


def test_pairs_beside_reference_and_truth():
    reference = {"theta": RNG.normal(size=(200, 2)), "mu": RNG.normal(size=200), "tau": np.ones(9)}
    axes = nf.plot.pairs(SITES, reference, truth={"theta": [0.5, 30.0]}, labels=("a", "b"))
    assert axes.shape == (3, 3)
    assert [ax.get_xlabel() for ax in axes[2]] == ["mu", "theta[0]", "theta[1]"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["", "theta[0]", "theta[1]"]
    np.testing.assert_allclose(points(axes[2, 1]), SITES["theta"])
    np.testing.assert_allclose(points(axes[2, 1], 1), reference["theta"])
    assert [len(ax.lines) for ax in axes[2]] == [1, 2, 1]
    assert axes[2, 1].get_ylim()[1] > 30  # the truth is seen
    assert axes[2, 2].get_xlim() == axes[2, 1].get_ylim()
    assert legend_texts(axes[0, 2]) == ["a", "b", "truth"]
    assert not axes[0, 1].axison


def test_pairs_of_some():
    assert nf.plot.pairs(SITES, names=["theta"]).shape == (2, 2)
    axes = nf.plot.pairs(SITES, names=["theta[1]", "mu"])
    assert axes[1, 0].get_xlabel() == "theta[1]"
    assert not legend_texts(axes[0, 1])
    given = plt.figure().subplots(1, 1)
    assert nf.plot.pairs(SITES, names=["mu"], axes=given, truth=[0.0])[0, 0] is given


def test_base_space():
    z = RNG.normal(size=(50, 2))
    ax = nf.plot.base(z, z[:, 0], label="depth", vmin=-2, vmax=2)
    np.testing.assert_array_equal(points(ax), z)
    np.testing.assert_array_equal(ax.collections[0].get_array(), z[:, 0])
    assert ax.collections[0].get_clim() == (-2, 2)
    assert [np.hypot(*line.get_data()).max().round(6) for line in ax.lines] == [1, 2, 3]
    assert ax.get_aspect() == 1
    assert [a.get_ylabel() for a in ax.figure.axes] == ["$z_2$", "depth"]
    assert len(nf.plot.base(z).figure.axes) == 1


def test_spaces_of_a_flow():
    transform = nf.transforms.FixedAffine(np.array([10.0, 0.0, -5.0]), np.array([1.0, 2.0, 3.0]))
    flow = nf.FlowDistribution(dist.Normal(jnp.zeros(3), 1.0), transform)
    left, right = nf.plot.spaces(flow, coordinates=(2, 0), num_samples=40)
    before, after = points(left), points(right)
    np.testing.assert_allclose(after, before * [3, 1] + [-5, 10], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(left.collections[0].get_array(), right.collections[0].get_array())
    assert (left.get_xlabel(), right.get_xlabel()) == ("$z_{3}$", "$x_{3}$")
    assert (left.get_title(), right.get_title()) == ("base space", "data space")
    z = np.ones((2, 3))
    np.testing.assert_array_equal(points(nf.plot.spaces(flow, z)[0]), z[:, :2])


def test_spaces_of_a_guide(guide):
    axes = plt.figure().subplots(1, 2)
    left, right = nf.plot.spaces(guide, coordinates=(0, 2), num_samples=500, axes=axes)
    assert [left, right] == list(axes)
    assert (right.get_xlabel(), right.get_ylabel()) == ("mu", "theta[1]")
    assert right.get_title() == "latent space"
    draws = guide.sample(KEY, (500,))
    np.testing.assert_allclose(points(right)[:, 1].mean(), draws["theta"][:, 1].mean(), atol=0.2)


def test_ranks_and_their_band():
    uniform = RNG.integers(0, 100, size=4000)
    narrow = RNG.binomial(99, RNG.beta(3, 3, size=4000))
    axes = nf.plot.ranks({"mu": uniform, "tau": narrow}, 99, num_bins=8)
    assert [ax.get_title() for ax in axes] == ["mu", "tau"]
    assert axes[0].get_xlabel() == "rank among 99 draws"
    outside = []
    for ax in axes:
        band, counts = ax.patches
        heights, edges, low = band.get_data()
        assert edges[0] == -0.5
        assert edges[-1] == 99.5
        assert {12, 13} == set(np.diff(edges))
        expected = 4000 * np.diff(edges) / 100
        assert ((low < expected) & (expected < heights)).all()
        tops = counts.get_xy()[1:-1:2, 1]
        assert tops.sum() == 4000
        outside.append(((tops < low) | (tops > heights)).sum())
    assert outside[0] <= 1
    assert outside[1] >= 6
    assert nf.plot.ranks(np.zeros((5, 6)), 3)[-1].get_title() == "$x_{6}$"


@pytest.mark.parametrize("num_draws", [3, 99])
def test_coverage(num_draws):
    uniform = np.tile(np.arange(num_draws + 1), 100)
    ax = nf.plot.coverage({"right": uniform, "wide": np.full(90, 1)}, num_draws)
    diagonal, right, wide = (line.get_ydata() for line in ax.lines)
    np.testing.assert_allclose(right, diagonal, atol=1e-9)
    # The step of rank 1, from 1 / n to 2 / n.
    inside = (np.clip(0.5 + diagonal / 2, None, 2 / (num_draws + 1)) * (num_draws + 1) - 1).clip(0)
    outside = (np.clip(0.5 - diagonal / 2, 1 / (num_draws + 1), None) * (num_draws + 1) - 1).clip(0)
    np.testing.assert_allclose(wide, inside - outside.clip(0, 1), atol=1e-9)
    assert legend_texts(ax) == ["right", "wide"]
    assert ax.get_aspect() == 1
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("nominal coverage", "share of simulations")


def test_images():
    rows = RNG.random((2, 3, 4, 5))
    ax = nf.plot.images(rows, labels=[0.5, 1.0])
    page = ax.images[0].get_array()
    assert page.shape == (2 * 6, 3 * 7)
    np.testing.assert_array_equal(page[7:11, 8:13], rows[1, 1])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0.5", "1.0"]
    assert nf.plot.images(RNG.random((1, 2, 4, 4, 3))).images[0].get_array().shape == (6, 12, 3)


CONDITIONAL = nf.realnvp(KEY, 2, depth=2, hidden=(4,), context_dim=1)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: nf.plot.scatter(np.zeros((5, 3))), ValueError, r"two coordinates, got .*names"),
        (lambda: nf.plot.scatter(np.zeros(5)), ValueError, r"\(n, dim\).*got shape \(5,\)"),
        (
            lambda: nf.plot.scatter(np.zeros((5, 2)), names=["a"]),
            ValueError,
            r"names: expected 2, one for each column, got 1",
        ),
        (
            lambda: nf.plot.pairs(np.zeros((5, 2)), np.zeros((5, 3))),
            ValueError,
            r"reference: expected the coordinates",
        ),
        (lambda: nf.plot.pairs(SITES, {"tau": [1.0]}), ValueError, r"got \['tau'\]"),
        (lambda: nf.plot.pairs(SITES, names=["nu"]), ValueError, r"got \['nu'\]"),
        (lambda: nf.plot.pairs(np.zeros((5, 11))), ValueError, r"choose at most 10 by `names`"),
        (lambda: nf.plot.pairs(SITES, truth=[1.0]), ValueError, r"expected 3 values, got 1"),
        (
            lambda: nf.plot.pairs(SITES, axes=plt.figure().subplots(2, 2)),
            ValueError,
            r"axes: expected 3 x 3 of them, got 4",
        ),
        (lambda: nf.plot.base(np.zeros((5, 3))), ValueError, r"\(n, 2\), got \(5, 3\)"),
        (lambda: nf.plot.spaces(CONDITIONAL), ValueError, r"`flow.condition\(context\)`"),
        (
            lambda: nf.plot.spaces(CONDITIONAL.condition(jnp.zeros(1)), coordinates=(0, 2)),
            ValueError,
            r"expected two in 0 to 1, got \(0, 2\)",
        ),
        (lambda: nf.plot.spaces(3), TypeError, r"a fitted `nf.AutoFlow`, got 3"),
        (lambda: nf.plot.ranks(np.array([[100]]), 99), ValueError, r"from 0 to 99"),
        (lambda: nf.plot.coverage(np.array([[-1]]), 99), ValueError, r"from 0 to 99"),
        (lambda: nf.plot.images(np.zeros((4, 4))), ValueError, r"got \(4, 4\)"),
        (
            lambda: nf.plot.images(np.zeros((2, 1, 4, 4)), labels=["a"]),
            ValueError,
            r"labels: expected 2, one for each row, got 1",
        ),
    ],
)
def test_bad_input(draw, error, message):
    with pytest.raises(error, match=message):
        draw()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'numpyro_flows\[plot\]'"):
        nf.plot.losses([1.0, 2.0])
