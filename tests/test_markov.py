"""Flows of sequences and forecasts from them, against closed forms of an AR(1)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from compiled import log_prob, new, sample_and_log_prob
from numpyro.distributions import constraints
from scipy import stats
from small import assert_same, chain, shake

import numpyro_flows as nf
from numpyro_flows.elementwise import Affine

KEY = jax.random.key(0)
SLOPE, SCALE, OFFSET = 0.8, 0.5, 0.3


class Linear(eqx.Module):
    """The mean of an AR(1) as the shift of an affine map, and the log of its scale."""

    slope: jax.Array

    def __call__(self, past):
        mean = OFFSET + self.slope * past[..., -1, :]
        return jnp.concatenate([mean, jnp.full_like(mean, jnp.log(SCALE))], axis=-1)


class ShiftAndScale(nf.FlowTransform):
    """y = exp(c_2) x + c_1 with the context c."""

    @property
    def event_shape(self):
        return (1,)

    @property
    def context_dim(self):
        return 2

    def _forward_and_log_det(self, x, context=None):
        log_scale = context[..., 1:]
        return jnp.exp(log_scale) * x + context[..., :1], log_scale[..., 0] + 0 * x[..., 0]

    def _inverse_and_log_det(self, y, context=None):
        log_scale = context[..., 1:]
        return jnp.exp(-log_scale) * (y - context[..., :1]), -log_scale[..., 0] + 0 * y[..., 0]


def ar1(length):
    """x_t = 0.3 + 0.8 x_{t-1} + 0.5 e_t from x_0 = 0, as a flow."""
    frame = nf.FlowDistribution(dist.Normal(jnp.zeros(1), 1.0), ShiftAndScale())
    return nf.markov(frame, Linear(jnp.array(SLOPE)), length)


def moments(steps, last):
    """Mean and standard deviation of an AR(1) so many steps ahead."""
    powers = SLOPE ** np.arange(steps)
    means = [SLOPE**t * last + OFFSET * powers[:t].sum() for t in range(1, steps + 1)]
    return np.array(means), SCALE * np.sqrt(np.cumsum(powers**2))


def test_the_density_is_that_of_an_ar1():
    flow, length = ar1(6), 6
    means, _ = moments(length, 0.0)
    lags = np.subtract.outer(np.arange(length), np.arange(length))
    root = SCALE * np.tril(SLOPE ** np.maximum(lags, 0))
    x = np.random.default_rng(0).normal(size=(4, length))
    expected = stats.multivariate_normal(means, root @ root.T).logpdf(x)
    np.testing.assert_allclose(log_prob(flow, jnp.asarray(x)[..., None]), expected, rtol=1e-5)


def test_forecasts_are_those_of_an_ar1():
    """Also over more steps than the flow has, of a batch of pasts that it need not see whole."""
    past = jnp.array([[[9.0], [1.0], [2.0]], [[0.0], [0.0], [-1.0]]])
    drawn = np.asarray(nf.forecast(KEY, ar1(4), past, steps=10, num_samples=4000))[..., 0]
    assert drawn.shape == (4000, 2, 10)
    for i, last in enumerate((2.0, -1.0)):
        mean, sd = moments(10, last)
        for t in (0, 2, 9):  # within the first window, at its end, in the fourth
            assert stats.kstest(drawn[:, i, t], stats.norm(mean[t], sd[t]).cdf).pvalue > 1e-3
        lag = np.corrcoef(drawn[:, i, 2], drawn[:, i, 3])[0, 1]  # across windows
        assert abs(lag - SLOPE * sd[2] / sd[3]) < 0.05


@pytest.mark.slow
def test_draws_follow_the_density():
    """KS of the second frame given the first, whose distribution function comes by quadrature."""
    network = nf.nn.Embedding(jax.random.key(1), jnp.zeros((1, 1)), 3, hidden=(8,))
    frame = new(nf.nsf, 1, context_dim=3, depth=1, hidden=(8,), support=constraints.positive)
    flow = shake(nf.markov(frame, network, 2), jax.random.key(2), 0.4)
    x, own = sample_and_log_prob(flow, KEY, (2000,))
    np.testing.assert_allclose(log_prob(flow, x), own, rtol=1e-3, atol=1e-3)
    u = np.linspace(-8, 8, 801)
    grid = np.exp(np.stack(np.meshgrid(u, u, indexing="ij"), -1)).reshape(-1, 2)
    density = np.exp(np.asarray(log_prob(flow, jnp.asarray(grid)[..., None]), float))
    mass = (density * grid.prod(-1)).reshape(len(u), len(u)) * (u[1] - u[0]) ** 2
    np.testing.assert_allclose(mass.sum(), 1, rtol=5e-3)
    below = np.cumsum(mass.sum(0)) - mass.sum(0) / 2
    drawn = np.log(np.asarray(x)[:, 1, 0])
    assert stats.kstest(drawn, lambda v: np.interp(v, u, below)).pvalue > 1e-3


def test_fit_gives_all_frames_one_unit(tmp_path):
    """Sequences far from 0: one standardisation for all times, so that forecasts are stationary."""
    rng = np.random.default_rng(0)
    x = np.zeros((800, 12))
    x[:, 0] = rng.normal(0, SCALE / (1 - SLOPE**2) ** 0.5, len(x))
    for t in range(1, x.shape[1]):
        x[:, t] = SLOPE * x[:, t - 1] + SCALE * rng.normal(size=len(x))
    x = 500 + 20 * x[..., None]

    def build(key):
        network = nf.nn.Embedding(key, jnp.zeros((1, 1)), 4, hidden=(8,))
        frame = nf.coupling_flow(key, 1, Affine(), context_dim=4, depth=1, hidden=(8,))
        return nf.markov(frame, network, 12)

    flow = jax.jit(build)(KEY)
    fitted = nf.fit(KEY, flow, x, learning_rate=1e-2, max_epochs=60, progress_bar=False)
    scale = fitted.flow.transform.scale.value
    assert scale.shape == (12, 1)
    assert np.ptp(scale) == 0
    entropy = 0.5 * np.log(2 * np.pi * np.e) + np.log(20 * SCALE)
    start = -0.5 * np.log(1 - SLOPE**2)
    assert abs(fitted.val_losses[-1] - 12 * entropy - start) < 0.5
    ahead = nf.forecast(KEY, fitted.flow, jnp.array([[560.0]]), 30, 2000)[..., 0]
    assert abs(ahead[:, 0].mean() - 548) < 2
    assert abs(ahead[:, 29].mean() - 500) < 4
    nf.save(tmp_path / "chain", fitted.flow)
    assert_same(nf.load(tmp_path / "chain"), fitted.flow)


def test_covariates_are_those_of_their_frame():
    step = chain(1)
    base = dist.Normal(jnp.zeros((5, 2)), 1.0).to_event(2)
    flow = nf.FlowDistribution(base, step).embed(nf.recipes.Flat())
    covariates = jnp.zeros((5, 1)).at[3].set(2.0)
    x = sample_and_log_prob(flow.condition(covariates), KEY)[0]
    other = sample_and_log_prob(flow.condition(0 * covariates), KEY)[0]
    assert np.flatnonzero((x != other).any(-1)).tolist() == [3, 4]
    beside = jnp.zeros((7, 1)).at[4].set(2.0)  # 2 of the past and 5 to come
    ahead, same = (nf.forecast(KEY, flow, x[:2], 5, covariates=c) for c in (beside, 0 * beside))
    assert np.flatnonzero((ahead[0] != same[0]).any(-1)).tolist() == [2, 3, 4]


def network(width=4):
    return nf.nn.Embedding(KEY, jnp.zeros((2, 1)), width, hidden=(4,))


def frame_flow(**config):
    return nf.realnvp(KEY, 1, **{"context_dim": 4, "depth": 1, "hidden": (4,), **config})


def positive():
    return nf.markov(frame_flow(support=constraints.positive), network(), 4, 2)


REFUSED = {
    "no flow": (lambda: nf.markov(frame_flow().transform, network(), 4, 2), TypeError, "got Scan"),
    "discrete frames": (
        lambda: nf.markov(frame_flow(support=constraints.boolean), network(), 4, 2),
        TypeError,
        "of continuous frames, got MixedFlow",
    ),
    "a bound context": (
        lambda: nf.markov(frame_flow().condition(jnp.zeros(4)), network(), 4, 2),
        ValueError,
        "without a bound context",
    ),
    "no context": (
        lambda: nf.markov(frame_flow(context_dim=0), network(), 4, 2),
        ValueError,
        "expected a conditional transform of a frame",
    ),
    "another width": (
        lambda: nf.markov(frame_flow(), network(5), 4, 2),
        ValueError,
        r"return the shape \(\*batch, 4\), .* got \(1, 5\)",
    ),
    "too few frames": (
        lambda: nf.markov(frame_flow(), network(), 2, 2),
        ValueError,
        "length: expected more frames than the order 2, got 2",
    ),
    "no function": (lambda: nf.markov(frame_flow(), 3, 4, 2), TypeError, "something to call"),
    "too short a past": (
        lambda: nf.forecast(KEY, positive(), jnp.ones((1, 1)), 3),
        ValueError,
        r"past: expected shape \(\*batch, n, 1\) with at least 2 frames.*, got \(1, 1\)",
    ),
    "frames of another shape": (
        lambda: nf.forecast(KEY, positive(), jnp.ones((3, 2)), 3),
        ValueError,
        r"past: expected shape .*, got \(3, 2\)",
    ),
    "outside of the support": (
        lambda: nf.forecast(KEY, positive(), -jnp.ones((3, 1)), 3),
        ValueError,
        "past: expected values in the flow's support",
    ),
    "surplus covariates": (
        lambda: nf.forecast(KEY, positive(), jnp.ones((3, 1)), 3, covariates=jnp.ones((5, 1))),
        ValueError,
        "covariates: expected none",
    ),
    "another flow": (
        lambda: nf.forecast(KEY, frame_flow(), jnp.ones((3, 1)), 3),
        TypeError,
        "flow: expected one that `nf.markov` returned",
    ),
    "ragged series": (
        lambda: nf.fit(KEY, positive(), np.ones((7, 3, 1))),
        ValueError,
        r"x: expected shape \(n, 4, 1\), one draw per row, got \(7, 3, 1\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
