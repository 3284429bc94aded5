"""The splines, judged by the papers' formulas in NumPy and by their densities on the circle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import forward, inverse, raw, wrap

from numpyro_flows.elementwise import CircularSpline, RationalQuadraticSpline


def unit_spline(t, widths, heights, slopes):
    """Durkan et al. (2019), eq. 4, at one t in [0, 1]."""
    xs, ys = np.cumsum([0, *widths]), np.cumsum([0, *heights])
    k = min(np.searchsorted(xs, t, side="right") - 1, len(widths) - 1)
    s = heights[k] / widths[k]
    xi = (t - xs[k]) / widths[k]
    top = heights[k] * (s * xi**2 + slopes[k] * xi * (1 - xi))
    return ys[k] + top / (s + (slopes[k + 1] + slopes[k] - 2 * s) * xi * (1 - xi))


def shares(logits, minimum):
    return minimum + (1 - len(logits) * minimum) * scipy.special.softmax(logits)


def softplus(value, minimum):
    return minimum + np.logaddexp(0, value + np.log(np.expm1(1 - minimum)))


@settings(max_examples=5, deadline=None)
@given(st.integers(2, 4), st.floats(0.5, 9.0), st.floats(0.0, 3.0), st.integers(0, 99))
def test_spline_is_the_formula(num_bins, bound, scale, seed):
    map = RationalQuadraticSpline(num_bins, bound, 0.02, 0.01, 0.03)
    params = raw(map, scale=scale, seed=seed)
    widths = shares(params[:num_bins], 0.02)
    heights = shares(params[num_bins : 2 * num_bins], 0.01)
    slopes = [1, *softplus(params[2 * num_bins :], 0.03), 1]
    x = np.linspace(-bound, bound, 31)
    expected = [
        2 * bound * unit_spline((value + bound) / (2 * bound), widths, heights, slopes) - bound
        for value in x
    ]
    columns = jnp.broadcast_to(params[:, None], (len(params), 31))
    y, _ = map.forward_and_log_det(jnp.asarray(x, jnp.float32), jnp.asarray(columns, jnp.float32))
    np.testing.assert_allclose(y, expected, atol=2e-5 * bound)


def test_spline_inverse_is_the_root(x64):
    map = RationalQuadraticSpline(5)
    params = raw(map, scale=2.0)
    columns = jnp.asarray(np.broadcast_to(params[:, None], (len(params), 9)))

    def reach(x, y):
        return forward(map, jnp.full(9, x), columns)[0][0] - y

    ys = jnp.linspace(-3.9, 3.9, 9)
    roots = [scipy.optimize.brentq(reach, -4, 4, args=(y,), xtol=1e-13) for y in ys]
    np.testing.assert_allclose(inverse(map, ys, columns)[0], roots, atol=1e-10)


def test_spline_is_smooth_at_its_ends_and_the_identity_outside(x64):
    map = RationalQuadraticSpline(bound=2.0)
    params = jnp.asarray(np.repeat(raw(map, 1), 6, axis=1))
    x = jnp.array([-2 - 1e-9, -2, -2 + 1e-9, 2 - 1e-9, 2, 2 + 1e-9])
    y, log_det = forward(map, x, params)
    np.testing.assert_allclose(y, x, atol=1e-8)
    np.testing.assert_allclose(log_det, 0, atol=1e-6)
    far = jnp.array([-1e4, -5.0, 2.5, 7.0, 1e4, 1e30])
    for step in (forward, inverse):
        y, log_det = step(map, far, params)
        np.testing.assert_array_equal(y, far)
        np.testing.assert_array_equal(log_det, 0)
    gradient = jax.grad(lambda p: forward(map, far, p)[0].sum())(params)
    np.testing.assert_array_equal(gradient, 0)


def test_gradients_of_a_spline_keep_few_numbers(x64):
    """The derivative by hand is there for speed: no mask for each bin is kept."""
    map = RationalQuadraticSpline(8)
    x, params = jnp.zeros((3, 50)), jnp.zeros((map.num_params, 3, 50))
    pull = jax.eval_shape(lambda *args: jax.vjp(map.inverse_and_log_det, *args)[1], x, params)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull)) / x.size
    assert kept < map.num_params + 40


@pytest.fixture(scope="module")
def turned():
    """A circular spline and its parameters, far from the identity."""
    map = CircularSpline(6)
    return map, raw(map, scale=0.7, seed=3)


def circle_density(turned, base, n=20_000):
    map, params = turned
    y = jnp.linspace(-np.pi, np.pi, n, endpoint=False)
    x, log_det = inverse(map, y, jnp.asarray(np.broadcast_to(params[:, None], (len(params), n))))
    return np.exp(base(np.asarray(x)) + np.asarray(log_det))


@pytest.mark.parametrize(
    "base",
    [scipy.stats.uniform(-np.pi, 2 * np.pi).logpdf, scipy.stats.vonmises(2.0, loc=1.0).logpdf],
    ids=["uniform", "von Mises"],
)
def test_density_on_the_circle(turned, base, x64):
    density = circle_density(turned, base)
    assert np.mean(density) * 2 * np.pi == pytest.approx(1, abs=1e-6)
    jumps = np.abs(np.diff([*density, density[0]])) / density.max()
    assert jumps[-1] < 3 * max(jumps[0], jumps[-2])  # at the seam as beside it


def test_angles_are_taken_modulo_a_turn(turned, x64):
    map, params = turned
    x = jnp.array([-3.1, -1.0, 0.0, 2.0, 3.1])
    params = jnp.asarray(np.broadcast_to(params[:, None], (len(params), 5)))
    for step in (forward, inverse):
        y, log_det = step(map, x, params)
        for turns in (-3, 1):
            again = step(map, x + 2 * np.pi * turns, params)
            np.testing.assert_allclose(again[0], y, atol=1e-12)
            np.testing.assert_allclose(again[1], log_det, atol=1e-10)


def test_circular_spline_is_the_formula(turned, x64):
    map, params = turned
    slopes = softplus(params[12:18], 1e-3)
    spline = partial(
        unit_spline,
        widths=shares(params[:6], 1e-3),
        heights=shares(params[6:12], 1e-3),
        slopes=[*slopes, slopes[0]],
    )
    x = np.linspace(-3.1, 3.1, 23)
    expected = [2 * np.pi * spline(value / (2 * np.pi) + 0.5) - np.pi + params[-1] for value in x]
    y, _ = forward(map, jnp.asarray(x), jnp.asarray(np.repeat(params[:, None], 23, axis=1)))
    np.testing.assert_allclose(y, wrap(np.array(expected)), atol=1e-12)
