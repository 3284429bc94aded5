"""The elementwise maps, judged by their formulas in NumPy and SciPy, quadrature and differences."""

import importlib
import pkgutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
from maps import forward, inverse, raw, wrap
from numpyro.distributions import Normal
from zoo import ELSEWHERE, MAPS

import numpyro_flows as nf
from numpyro_flows.elementwise import (
    Affine,
    CircularSpline,
    DeepSigmoid,
    HeavyTail,
    RationalQuadraticSpline,
    Shift,
    SinhArcsinh,
)
from numpyro_flows.elementwise.deep_sigmoid import _gains

every_map = pytest.mark.parametrize("map", MAPS.values(), ids=MAPS)


def dot(a, b):
    return sum((u * v).sum() for u, v in zip(a, b, strict=True))


def concrete_maps():
    for module in pkgutil.iter_modules(nf.elementwise.__path__, "numpyro_flows.elementwise."):
        importlib.import_module(module.name)
    return [
        cls
        for cls in nf.elementwise.ElementwiseMap.__subclasses__()
        if cls.__module__.startswith("numpyro_flows.")
    ]


@pytest.mark.parametrize("cls", concrete_maps(), ids=lambda cls: cls.__name__)
def test_every_map_has_a_case(cls):
    assert cls in map(type, MAPS.values()) or cls.__name__ in ELSEWHERE, (
        f"{cls.__name__} has no tests: add an instance to MAPS in tests/zoo.py."
    )


# What all maps promise. Compiling is what takes time: one program for each test and map.


@every_map
def test_derivatives(map, x64):
    """Autodiff for the log-derivatives, differences for first and second derivatives."""

    @jax.jit
    def judge(point, direction):
        def loss(point):
            x, y, params = point
            outs = *map.forward_and_log_det(x, params), *map.inverse_and_log_det(y, params)
            return sum((out * jnp.cos(jnp.arange(5) + i)).sum() for i, out in enumerate(outs))

        def with_slope(step, value):
            (out, log_det), (slope, _) = jax.jvp(
                lambda value: step(value, point[2]), (value,), (jnp.ones_like(value),)
            )
            return out, log_det, slope

        values = (
            with_slope(map.forward_and_log_det, point[0]),
            with_slope(map.inverse_and_log_det, point[1]),
        )
        # Reverse mode, and forward mode over it.
        return values, loss(point), *jax.jvp(jax.grad(loss), (point,), (direction,))

    x = jnp.array([-1.9, -0.3, 0.4, 2.6, 1.3])
    params = jnp.asarray(raw(map, 5)).at[:, 4].set(0)  # the last one is the identity
    point = x, x, params
    y = judge(point, point)[0][0][0]
    point = x, y, params
    rng, h = np.random.default_rng(1), 1e-6
    direction = tuple(rng.normal(size=a.shape) for a in point)
    values, _, first, second = judge(point, direction)
    (y, log_det, slope), (back, inverse_log_det, inverse_slope) = values
    np.testing.assert_allclose([y[4], log_det[4], inverse_log_det[4]], [x[4], 0, 0], atol=1e-15)
    np.testing.assert_allclose(back, x, atol=1e-9)
    np.testing.assert_allclose(log_det, np.log(slope), atol=1e-12)
    np.testing.assert_allclose(inverse_log_det, np.log(inverse_slope), atol=1e-8)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-8)

    plus, minus = (
        judge(tuple(a + s * b for a, b in zip(point, direction, strict=True)), direction)
        for s in (h, -h)
    )
    assert float(dot(first, direction)) == pytest.approx(
        float(plus[1] - minus[1]) / (2 * h), rel=1e-6
    )
    # In its parameters a heavy tail is only once differentiable at zero.
    n = 4 if isinstance(map, HeavyTail) else 5
    for a, b, c in zip(plus[2], minus[2], second, strict=True):
        a, b, c = a[..., :n], b[..., :n], c[..., :n]
        np.testing.assert_allclose(c, (a - b) / (2 * h), rtol=1e-4, atol=1e-4)

    # Zero parameters have gradients, so that training can leave the identity.
    at_zero = np.abs(judge((x, x, 0 * params), direction)[2][2]).max(1)
    if isinstance(map, DeepSigmoid):  # the weights of equal units do not matter yet
        at_zero = at_zero[map.num_units :]
    assert (at_zero > 1e-3).all()


@pytest.mark.slow
@every_map
def test_float32_stress(map):
    """200,000 points to +-1e4: finite, increasing, invertible, finite gradients."""

    @jax.jit
    def stress(x, params):
        y, log_det = map.forward_and_log_det(x, params)

        def loss(x, y, params):
            outs = *map.forward_and_log_det(x, params), *map.inverse_and_log_det(y, params)
            scaled = sum((out / (1 + jnp.abs(jax.lax.stop_gradient(out)))).sum() for out in outs)
            return scaled, outs[2:]

        gradients, (back, inverse_log_det) = jax.grad(loss, (0, 1, 2), has_aux=True)(x, y, params)
        return (y, log_det, back, inverse_log_det), gradients

    n, m = 100, 2000
    params = raw(map, n, scale=np.geomspace(0.1, 5, n))
    params[:, 0], params[:, 1], params[:, 2] = 0, 1e30, -1e30  # the identity, and the absurd
    if isinstance(map, Affine | SinhArcsinh):
        params[0, 1:3] = 0  # a shift of 1e30 is what it says
    circular = isinstance(map, CircularSpline)
    near, far = np.linspace(-5, 5, m // 2), np.geomspace(5, 1e4, m // 4)
    grid = np.linspace(-np.pi, np.pi, m + 1)[:-1] if circular else [*-far[::-1], *near, *far]
    x = jnp.broadcast_to(jnp.asarray(np.array(grid), jnp.float32), (n, m))
    params = jnp.broadcast_to(jnp.asarray(params, jnp.float32)[..., None], (map.num_params, n, m))
    values, gradients = stress(x, params)
    for value in (*values, *gradients):
        assert np.isfinite(value).all()
    x, y, log_det, back, _ = (np.asarray(value, float) for value in (x, *values))
    np.testing.assert_allclose(
        wrap(y[0] - x[0]) if circular else y[0], 0 if circular else x[0], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(log_det[0], 0, atol=1e-6)

    steps, size = np.diff(y), 1 + np.abs(y)
    if circular:
        assert y.min() >= -np.float32(np.pi)
        assert y.max() < np.float32(np.pi)
        # All steps forward, and together not more than one turn.
        assert (np.mod(steps + 1e-5, 2 * np.pi).sum(1) < 2 * np.pi + m * 1e-5).all()
    else:
        assert (steps > -1e-5 * size[:, 1:]).all()

    error = np.abs(wrap(back - x) if circular else back - x)[3:]
    # Rounding of y, as far as x feels it: through the smallest slope nearby.
    log_det[:, 1:-1] = np.min([log_det[:, 2:], log_det[:, 1:-1], log_det[:, :-2]], axis=0)
    assert (error <= 6e-6 * (1 + np.abs(x) + size * np.exp(-log_det))[3:]).all()


@pytest.mark.parametrize("map", [Shift(), *MAPS.values()], ids=["shift", *MAPS])
@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
def test_shapes_and_dtypes_are_kept(map, shape, x64):
    for dtype in ("float32", "float64"):
        x, params = jnp.ones(shape, dtype), jnp.ones((map.num_params, *shape), dtype)
        for step in (map.forward_and_log_det, map.inverse_and_log_det):
            for out in jax.eval_shape(step, x, params):
                assert (out.shape, str(out.dtype)) == (shape, dtype)


# The smooth maps.


def test_sinh_arcsinh_is_the_formula(x64):
    map, params = SinhArcsinh(1.5, 2.5, 0.6), raw(SinhArcsinh(), 9, scale=2.0)
    x = np.linspace(-4, 4, 9)
    s, e, d = (
        bound * np.tanh(p / bound) for p, bound in zip(params[1:], (1.5, 2.5, 0.6), strict=True)
    )
    expected = params[0] + np.exp(s) * np.sinh((np.arcsinh(x) + e) * np.exp(d))
    y, _ = forward(map, jnp.asarray(x), jnp.asarray(params))
    np.testing.assert_allclose(y, expected, rtol=1e-12)


def test_sinh_arcsinh_skews_and_weighs_tails():
    z = jax.random.normal(jax.random.key(0), (20_000,))

    def sample(skewness, tail):
        params = jnp.array([0.0, 0.0, skewness, tail])[:, None]
        return forward(SinhArcsinh(), z, jnp.broadcast_to(params, (4, len(z))))[0]

    assert scipy.stats.skew(sample(0.5, 0.0)) > 0.3 > 0 > scipy.stats.skew(sample(-0.5, 0.0))
    assert scipy.stats.kurtosis(sample(0.0, 0.3)) > 0.7
    assert scipy.stats.kurtosis(sample(0.0, -0.3)) < -0.3


def sigmoid_units(map, params):
    """Weights, slopes and biases of a one-layer map."""
    gained = params.reshape(3, map.num_units) * _gains(map.num_units)
    bounds = np.array([[20], [map.log_slope_bound], [100]])
    weight, slope, bias = bounds * np.tanh(gained / bounds)
    return scipy.special.softmax(weight), np.exp(slope), bias


def test_deep_sigmoid_is_the_formula(x64):
    map = DeepSigmoid(5)
    params = raw(map)
    w, a, b = sigmoid_units(map, params)
    x = np.linspace(-5, 5, 11)
    expected = scipy.special.logit((w * scipy.special.expit(a * x[:, None] + b)).sum(1))
    columns = jnp.asarray(np.repeat(params[:, None], 11, axis=1))
    y, _ = forward(map, jnp.asarray(x), columns)
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)

    def reach(x, y):
        return scipy.special.logit((w * scipy.special.expit(a * x + b)).sum()) - y

    roots = [scipy.optimize.brentq(reach, -30, 30, args=(value,), xtol=1e-13) for value in y]
    np.testing.assert_allclose(inverse(map, y, columns)[0], roots, atol=1e-10)


def test_deep_sigmoid_layers_are_composed():
    map, x = DeepSigmoid(3, 2), jnp.array([-2.0, 0.5, 3.0])
    params = jnp.asarray(raw(map, 3))
    y, log_det = forward(map, x, params)
    first = forward(DeepSigmoid(3), x, params[:9])
    second = forward(DeepSigmoid(3), first[0], params[9:])
    np.testing.assert_allclose(y, second[0], rtol=1e-6)
    np.testing.assert_allclose(log_det, first[1] + second[1], rtol=1e-5, atol=1e-6)


def test_deep_sigmoid_far_out():
    """In float32 at +-1e4, where 1 - sigmoid is 0: the tails are linear, with the least slope."""
    map = DeepSigmoid(5)
    params = raw(map)
    w, a, b = sigmoid_units(map, params)
    x = np.array([-1e4, -100, 100, 1e4])
    z = a * x[:, None] + b
    expected = scipy.special.logsumexp(-np.logaddexp(0, -z), axis=1, b=w)
    expected = expected - scipy.special.logsumexp(-np.logaddexp(0, z), axis=1, b=w)
    columns = jnp.asarray(np.repeat(params[:, None], 4, axis=1), jnp.float32)
    y, log_det = forward(map, jnp.asarray(x, jnp.float32), columns)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(log_det[jnp.array([0, 3])], np.log(a.min()), atol=1e-5)
    back, inverse_log_det = inverse(map, y, columns)
    np.testing.assert_allclose(back, x, rtol=1e-6)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-5)


def test_deep_sigmoid_learns_modes_from_equal_units():
    """Adam from zero: the units part, and the density gets the three modes of the data."""
    import optax

    centres, scale = np.array([-2.5, 0.0, 2.0]), 0.35
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.choice(centres, 300) + scale * rng.normal(size=300), jnp.float32)
    map = DeepSigmoid(6)
    optimizer = optax.adam(0.05)

    def loss(params):
        columns = jnp.broadcast_to(params[:, None], (len(params), len(x)))
        z, log_det = map.forward_and_log_det(x, columns)
        return jnp.mean(0.5 * z**2 - log_det) + 0.5 * np.log(2 * np.pi)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        start = params, optimizer.init(params)
        return loss(jax.lax.scan(step, start, None, length=400)[0][0])

    normal = scipy.stats.norm(x.mean(), x.std()).logpdf(x).mean()
    truth = np.mean(np.log(scipy.stats.norm.pdf(x[:, None], centres, scale).mean(1)))
    assert float(train(jnp.zeros(map.num_params))) < -normal - 0.9 * (truth - normal)


@pytest.mark.parametrize("freedom", [1.5, 4.0, 20.0])
def test_heavy_tail_is_close_to_student(freedom, x64):
    """Wallace (1959): the inverse bounds the map that makes a Student variable normal."""
    map, weight = HeavyTail(), 1 / freedom
    params = jnp.full((2, 8), np.arctanh(weight))
    y = np.array([-25.0, -3.0, -0.5, 0.1, 1.0, 4.0, 15.0, 30.0])
    x, _ = inverse(map, jnp.asarray(y), params)
    expected = np.sign(y) * np.sqrt(freedom * np.log1p(y**2 / freedom))
    np.testing.assert_allclose(x, expected, rtol=1e-12)
    student = scipy.stats.norm.isf(scipy.stats.t(freedom).sf(np.abs(y)))
    assert (np.abs(x) >= student).all()
    assert (np.abs(x) <= student * (1 + 0.4 / freedom)).all()


def test_heavy_tail_has_a_power_law(x64):
    """log P(Y > y) against log y: the slope tends to -1 / lambda, slowly (a logarithm)."""
    y = jnp.array([1e3, 1e4, 1e6, 1e7])
    params = jnp.full((2, 4), np.arctanh(0.5))
    x, _ = inverse(HeavyTail(), y, params)
    log_survival = scipy.stats.norm.logsf(x)
    slopes = np.diff(log_survival)[[0, 2]] / np.log(10)
    np.testing.assert_allclose(slopes, -2, atol=0.07)
    assert abs(slopes[1] + 2) < abs(slopes[0] + 2)


def test_heavy_tail_density_integrates_to_one(x64):
    params = jnp.array([0.4, -0.8])[:, None]

    def density(y):
        x, log_det = inverse(HeavyTail(), jnp.array([y]), params)
        return scipy.stats.norm.pdf(x[0]) * np.exp(log_det[0])

    right = scipy.integrate.quad(density, 0, np.inf, epsabs=1e-7)[0]
    left = scipy.integrate.quad(density, -8, 0, epsabs=1e-7)[0]
    assert right == pytest.approx(0.5, abs=1e-4)
    assert left == pytest.approx(0.5, abs=1e-4)


def test_heavy_tail_is_smooth_where_the_weight_changes_its_sign(x64):
    """The derivative in the weight is x^3 / 4 from both sides; also by autodiff at zero."""
    x = jnp.array([-3.0, -1.0, 0.5, 2.0])

    def y(weight, step=forward):
        return step(HeavyTail(), x, jnp.full((2, 4), weight))[0]

    h = 1e-7
    for slope in ((y(h) - y(0.0)) / h, (y(0.0) - y(-h)) / h, jax.jacfwd(y)(0.0)):
        np.testing.assert_allclose(slope, x**3 / 4, rtol=1e-5)
    np.testing.assert_allclose(jax.jacfwd(partial(y, step=inverse))(0.0), -(x**3) / 4, rtol=1e-12)
    lighter = inverse(HeavyTail(), x, jnp.full((2, 4), 0.3))[0]
    np.testing.assert_allclose(y(-0.3), lighter, rtol=1e-14)


def test_heavy_tail_goes_on_linearly():
    map = HeavyTail(0.5)
    end = (80 / 0.5) ** 0.5
    params = jnp.full((2, 4), 5.0)
    x = jnp.array([end - 0.01, end + 0.01, 2 * end, 1e4])
    y, log_det = forward(map, x, params)
    np.testing.assert_allclose(log_det[0], log_det[1], rtol=1e-2)
    np.testing.assert_allclose(log_det[1:], log_det[1])
    np.testing.assert_allclose(
        (y[3] - y[2]) / (x[3] - x[2]), np.exp(np.float64(log_det[2])), rtol=1e-4
    )


# The layer.


def test_elementwise_keeps_coordinates_apart():
    layer = nf.transforms.Elementwise(jax.random.key(0), 3, SinhArcsinh(), context_dim=2, hidden=())
    rng = np.random.default_rng(0)
    layer = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), layer)
    x, context = jnp.array([0.3, -1.0, 2.0]), jnp.array([1.0, -0.5])
    jacobians = jax.jit(jax.jacfwd(lambda *args: layer.forward_and_log_det(*args)[0], (0, 1)))
    jacobian, by_context = jacobians(x, context)
    np.testing.assert_array_equal(jacobian, np.diag(np.diag(jacobian)))
    assert (np.abs(by_context) > 1e-3).all()


def test_elementwise_ends_a_flow_with_heavy_tails():
    tails = nf.transforms.Elementwise(jax.random.key(1), 2, HeavyTail())
    weights = jnp.array([0.5, 0.0, 0.5, 0.0])  # the first coordinate has heavy tails
    tails = jax.tree.map(lambda _: weights, tails)
    flow = nf.FlowDistribution(
        Normal(jnp.zeros(2), 1.0), nf.transforms.Chain([nf.transforms.DiagonalScale(2), tails])
    )
    x = np.asarray(jax.jit(lambda key: flow.sample(key, (20_000,)))(jax.random.key(2)), float)
    kurtosis = scipy.stats.kurtosis(x)
    assert kurtosis[0] > 5 > 0.3 > abs(kurtosis[1])
    # Far out the density falls like a power, where a normal one falls like exp(-5e5).
    assert jax.jit(flow.log_prob)(jnp.array([1e3, 0.0])) > -40


@every_map
def test_elementwise_is_saved(map, tmp_path):
    layer = nf.transforms.Elementwise(jax.random.key(0), 2, map)
    nf.save(tmp_path / "layer", layer)
    assert nf.load(tmp_path / "layer").eq(layer)


# Bad input.


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: RationalQuadraticSpline(1), ValueError, "num_bins: expected at least 2"),
        (lambda: RationalQuadraticSpline(8.0), TypeError, "num_bins: expected an int"),
        (lambda: RationalQuadraticSpline(bound=0.0), ValueError, "bound: expected a positive"),
        (lambda: RationalQuadraticSpline(10, 4.0, 0.1), ValueError, "min_bin_width: .* below"),
        (lambda: RationalQuadraticSpline(min_bin_height=0), ValueError, "min_bin_height: .* pos"),
        (lambda: RationalQuadraticSpline(min_derivative=1.0), ValueError, "between 0 and 1"),
        (lambda: CircularSpline(1), ValueError, "num_bins: expected at least 2"),
        (lambda: CircularSpline(4, 0.3), ValueError, "min_bin_width: expected a positive share"),
        (lambda: SinhArcsinh(tail_bound=-1), ValueError, "tail_bound: expected a positive"),
        (lambda: SinhArcsinh(skewness_bound=np.inf), ValueError, "skewness_bound: expected a pos"),
        (lambda: DeepSigmoid(0), ValueError, "num_units: expected at least 1"),
        (lambda: DeepSigmoid(num_layers=1.5), TypeError, "num_layers: expected an int"),
        (lambda: DeepSigmoid(log_slope_bound=0), ValueError, "log_slope_bound: expected a pos"),
        (lambda: HeavyTail(-1.0), ValueError, "bound: expected a positive"),
        (lambda: nf.transforms.Elementwise(0, 2, Affine()), TypeError, "jax.random.key"),
        (
            lambda: nf.transforms.Elementwise(jax.random.key(0), 0, Affine()),
            ValueError,
            "dim: expected at",
        ),
        (
            lambda: nf.transforms.Elementwise(jax.random.key(0), 2, Affine),
            TypeError,
            "an ElementwiseMap, got",
        ),
    ],
)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        build()
