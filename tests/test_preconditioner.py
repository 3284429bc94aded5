"""Where the guide starts: the affine map chosen by ELBO."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI

import numpyro_flows as nf
from numpyro_flows.infer import preconditioner
from numpyro_flows.infer.normals import FULL, matched, matched_low_rank
from numpyro_flows.infer.preconditioner import HISTORY, Affine, _gaussian, locate

KEY = jax.random.key(0)


def moments(affine):
    """Mean and covariance of the normal, by pushing the unit vectors through the map."""
    dim = len(affine.loc) if isinstance(affine, Affine) else affine.dim
    mean, *rows = np.asarray(affine(np.eye(dim + 1, dim, k=-1)))
    factor = np.array(rows) - mean
    return mean, factor.T @ factor


def search(log_density, starts, seed=0):
    """``locate`` on a JAX function; the number of rows per call is 1 or 32."""
    compiled = jax.jit(jax.vmap(jax.value_and_grad(log_density)))

    def rows(x):
        assert len(x) in (1, 32)
        return [np.asarray(a, float) for a in compiled(jnp.asarray(x, starts.dtype))]

    return locate(rows, seed, starts, 0.1)


def gaussian(dim, condition, seed=0):
    """A normal far from the origin, with the square of its scales spread over ``condition``."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    covariance = (rotation * np.geomspace(1, 1 / condition, dim)) @ rotation.T
    mean = 20 * rng.normal(size=dim)
    precision = jnp.asarray(np.linalg.inv(covariance), jnp.result_type(float))
    log_det = np.linalg.slogdet(covariance)[1]

    def log_density(x):
        away = x - jnp.asarray(mean, x.dtype)
        return -0.5 * (away @ precision @ away + log_det + dim * np.log(2 * np.pi))

    return log_density, mean, covariance


@pytest.mark.parametrize("dim", [1, 6])
def test_finds_an_ill_conditioned_normal(dim):
    log_density, mean, covariance = gaussian(dim, 1e4)
    starts = jax.random.normal(KEY, (3, dim))
    found = search(log_density, starts)
    got_mean, got = moments(found.affine)
    sd = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(got_mean / sd, mean / sd, atol=0.15)
    np.testing.assert_allclose(got / np.outer(sd, sd), covariance / np.outer(sd, sd), atol=0.15)
    assert abs(found.elbo) < 0.05  # the log evidence is 0


@pytest.mark.parametrize("dim", [FULL + 1, pytest.param(5000, marks=pytest.mark.slow)])
def test_many_dimensions_of_unlike_scales(dim):
    """Scales from 0.01 to 100, and one direction that an observation holds: diagonal + rank 1."""
    scales = jnp.geomspace(0.01, 100.0, dim)
    weights = np.random.default_rng(0).normal(size=dim) / dim**0.5

    def log_density(x):
        u = x / scales - jnp.arange(dim) / 10
        return dist.Normal(0, 1).log_prob(u).sum() + dist.Normal(u @ weights, 0.1).log_prob(2.0)

    starts = jnp.zeros((2, dim))
    found = search(log_density, starts)
    assert found.affine.core.shape == (2 * HISTORY, 2 * HISTORY)
    # In the coordinates u: precision I + 100 w w'.
    square = weights @ weights
    mean = np.arange(dim) / 10 + 2.0 * weights / (square + 0.01)
    sd = np.sqrt(1 - weights**2 / (square + 0.01))
    assert np.abs((found.affine.loc / scales - mean) / sd).max() < 0.5
    along = weights @ (found.affine.loc / scales - np.arange(dim) / 10)
    assert abs(along - 2.0) < 0.2
    got_sd = found.affine.transform().standard_deviation / scales
    assert np.abs(np.log(got_sd / sd)).max() < 1.0
    assert np.abs(np.log(got_sd / sd)).mean() < 0.2


def test_standard_deviation_of_an_affine_map():
    rng = np.random.default_rng(0)
    frame, _ = np.linalg.qr(rng.normal(size=(5, 2)))
    core = np.array([[0.5, 0.0], [0.3, 2.0]])
    affine = nf.transforms.FixedAffine(
        jnp.ones(5), jnp.arange(1.0, 6.0), jnp.array(frame), jnp.array(core)
    )
    _, covariance = moments(affine)
    np.testing.assert_allclose(affine.standard_deviation**2, np.diag(covariance), rtol=1e-5)


def test_a_funnel_is_not_located_at_its_mode():
    """The density is unbounded where the scale goes to 0; the mass is not there."""

    def log_density(x):
        scale = jnp.exp(x[0] / 2)
        return dist.Normal(0, 1).log_prob(x[0]) + dist.Normal(0, scale).log_prob(x[1:]).sum()

    starts = jax.random.normal(KEY, (3, 30))
    found = search(log_density, starts)
    mean, covariance = moments(found.affine)
    assert abs(mean[0]) < 1.0
    assert 0.02 < covariance[0, 0] < 2.0
    assert found.elbo > -3.0


def test_a_bad_start_does_not_spoil_the_others():
    log_density, mean, _ = gaussian(3, 10.0)

    def fragile(x):
        return jnp.where(x[0] < -50, jnp.nan, log_density(x))

    starts = jnp.array([[-100.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = search(fragile, starts)
    got_mean, _ = moments(found.affine)
    np.testing.assert_allclose(got_mean, mean, atol=0.3)


def test_the_normal_of_a_quadratic_is_exact(x64):
    """With as many pairs as dimensions, L-BFGS knows the Hessian of a quadratic."""
    _, mean, covariance = gaussian(4, 50.0)
    precision = np.linalg.inv(covariance)
    # Exact line searches along conjugate directions make the quasi-Newton equations exact.
    directions = np.linalg.eigh(precision)[1].T
    s = directions
    y = s @ precision
    x = np.ones(4)
    grad = -precision @ (x - mean)
    affine = _gaussian(x, grad, np.ones(4), s, y)
    got_mean, got = moments(affine)
    np.testing.assert_allclose(got, covariance, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(got_mean, mean, rtol=1e-8)


def test_the_host_has_the_map_of_the_transform(x64):
    rng = np.random.default_rng(0)
    frame, _ = np.linalg.qr(rng.normal(size=(5, 2)))
    affine = Affine(
        rng.normal(size=5), rng.uniform(0.1, 3, size=5), frame, np.array([[2.0, 0.0], [0.3, 0.2]])
    )
    transform, x = affine.transform(), rng.normal(size=(7, 5))
    y, log_det = transform.forward_and_log_det(jnp.asarray(x))
    np.testing.assert_allclose(affine(x), y, rtol=1e-12)
    np.testing.assert_allclose(affine.log_det, log_det[0], rtol=1e-12)
    np.testing.assert_allclose(affine.inverse(np.asarray(y)), x, rtol=1e-10)
    _, pull = jax.vjp(transform, jnp.asarray(x))
    np.testing.assert_allclose(affine.transposed(x), pull(jnp.asarray(x))[0], rtol=1e-10)
    for one, other in zip(affine, Affine.of(transform), strict=True):
        np.testing.assert_array_equal(one, other)
    mean, factor = rng.normal(size=5), np.tril(rng.normal(size=(5, 5))) + 2 * np.eye(5)
    expected_mean, expected = moments(affine.after(mean, factor))
    inner = affine.linear(factor.T)
    np.testing.assert_allclose(expected, inner.T @ inner, atol=1e-12)
    np.testing.assert_allclose(expected_mean, affine(mean[None])[0])


@pytest.mark.parametrize("dim", [4, pytest.param(150, marks=pytest.mark.slow)])
def test_the_gaussian_fit_has_the_path_gradient(dim, x64, monkeypatch):
    """Against autodiff of the ELBO with the density of q held."""
    monkeypatch.setattr(preconditioner, "TRAINED", 10)
    rng = np.random.default_rng(1)
    frame, _ = np.linalg.qr(rng.normal(size=(dim, 2)))
    affine = Affine(
        rng.normal(size=dim), rng.uniform(0.5, 2, dim), frame, np.array([[1.5, 0.0], [0.3, 0.8]])
    )
    fit = preconditioner.Fit(affine, 400)
    fit.theta = 0.1 * rng.normal(size=fit.theta.shape)
    noise = rng.normal(size=(8, dim))

    def log_density(x):
        return -jnp.log(jnp.cosh(x)).sum(-1) + jnp.sin(x[..., 0])

    outer = affine.transform()

    def normal(theta):
        mean, rest = theta[:dim], theta[dim:]
        if dim > 10:
            scale = outer.scale.value * jnp.exp(rest)
            return nf.transforms.FixedAffine(
                outer(mean), scale, outer.frame.value, outer.core.value
            )
        matrix = rest.reshape(dim, dim)
        factor = jnp.tril(matrix, -1) + jnp.diag(jnp.exp(jnp.diagonal(matrix)))
        inner = nf.transforms.FixedAffine(mean, jnp.ones(dim), jnp.eye(dim), factor)
        return nf.transforms.Chain([inner, outer])

    def loss(theta):
        x = normal(theta)(jnp.asarray(noise))
        z, log_det = jax.lax.stop_gradient(normal(theta)).inverse_and_log_det(x)
        log_q = dist.Normal(0, 1).log_prob(z).sum(-1) + log_det
        return (log_q - log_density(x)).mean()

    x = fit.points(noise)
    np.testing.assert_allclose(x, normal(jnp.asarray(fit.theta))(jnp.asarray(noise)), rtol=1e-9)
    values, grads = jax.vmap(jax.value_and_grad(log_density))(jnp.asarray(x))
    expected = jax.grad(loss)(jnp.asarray(fit.theta))
    value = -loss(jnp.asarray(fit.theta))
    weights = fit.step(noise, np.asarray(values), np.asarray(grads))
    np.testing.assert_allclose(weights.mean(), value, rtol=1e-9)
    np.testing.assert_allclose(fit.adam.first / 0.1, expected, rtol=1e-7, atol=1e-9)


def scaled(x, y):
    """Two coefficients whose scales differ ten-thousandfold."""
    beta = numpyro.sample("beta", dist.Normal(0.0, jnp.array([1.0, 1e4])).to_event(1))
    numpyro.sample("y", dist.Normal(x @ beta, 0.5), obs=y)


@pytest.mark.slow
def test_the_guide_carries_it_in_its_parameters():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(50, 2)) * np.array([1.0, 1e-3]), jnp.float32)
    y = x @ jnp.array([1.0, 3000.0])
    guide = nf.AutoFlow(scaled, nf.realnvp)
    svi = SVI(scaled, guide, optax.adam(1e-3), nf.STL_ELBO(num_particles=16))
    state = svi.init(jax.random.key(0), x, y)
    before = svi.get_params(state)["auto_preconditioner"]
    result = svi.run(jax.random.key(0), 20, x, y, progress_bar=False, init_state=state)
    after = result.params["auto_preconditioner"]
    np.testing.assert_array_equal(after.loc.value, before.loc.value)
    np.testing.assert_array_equal(after.core.value, before.core.value)
    precision = np.asarray(x.T @ x) / 0.25 + np.diag([1.0, 1e-8])
    mean = np.linalg.solve(precision, np.asarray(x.T @ y) / 0.25)
    sd = np.sqrt(np.diag(np.linalg.inv(precision)))
    draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(20_000,))["beta"]
    np.testing.assert_allclose(draws.mean(0) / sd, mean / sd, atol=0.1)
    np.testing.assert_allclose(draws.std(0) / sd, 1.0, atol=0.1)
    fresh = nf.AutoFlow(scaled, nf.realnvp, init="location")
    jax.eval_shape(lambda: numpyro.handlers.seed(fresh, 0)(x, y))
    again = fresh.sample_posterior(jax.random.key(1), result.params, sample_shape=(20_000,))["beta"]
    np.testing.assert_array_equal(again, draws)


LOC, SCALE = np.array([5.0, -300.0]), np.array([0.01, 100.0])


def plain_normal():
    numpyro.sample("x", dist.Normal(LOC, SCALE).to_event(1))


def test_a_function_of_ones_own():
    """It gets the model's density, and what it returns is where the guide starts."""
    seen = []

    def of_gradients(log_density, key, starts):
        # The gradient of a normal is linear: two of them have its mean and its scales.
        seen.append((log_density(starts[0]), starts, key))
        _, one = log_density.value_and_grad(jnp.zeros(2))
        _, other = log_density.value_and_grad(jnp.ones(2))
        precision = np.asarray(one - other)
        return nf.transforms.FixedAffine(np.asarray(one) / precision, precision**-0.5)

    guide = nf.AutoFlow(plain_normal, init=of_gradients)
    fitted = nf.fit_guide(KEY, guide, progress_bar=False)
    ((value, starts, key),) = seen
    assert starts.shape[1] == 2
    np.testing.assert_allclose(value, dist.Normal(LOC, SCALE).log_prob(starts[0]).sum(), rtol=1e-4)
    assert key.shape == ()
    affine = fitted.params["auto_preconditioner"]
    np.testing.assert_allclose(affine.loc.value, LOC, rtol=1e-2)
    np.testing.assert_allclose(affine.scale.value, SCALE, rtol=1e-2)
    assert len(fitted.losses) == 0
    assert fitted.trusted


@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        ("laplace", ValueError, r"init: expected 'auto', 'location' or a function, got 'laplace'"),
        (
            lambda *_: None,
            TypeError,
            r"returns `nf.transforms.FixedAffine.*2 coordinates, got None",
        ),
        (
            lambda *_: nf.transforms.FixedAffine(jnp.zeros(3), 1.0),
            TypeError,
            r"of 2 coordinates, got FixedAffine",
        ),
        (
            lambda *_: nf.transforms.FixedAffine(jnp.array([0.0, jnp.nan]), 1.0),
            ValueError,
            r"init: the function returned a map whose numbers are not all finite",
        ),
    ],
)
def test_a_function_that_is_none(init, error, message):
    with pytest.raises(error, match=message):
        nf.fit_guide(KEY, nf.AutoFlow(plain_normal, init=init), progress_bar=False)


def test_fixed_affine_refuses():
    with pytest.raises(ValueError, match="loc of shape"):
        nf.transforms.FixedAffine(0.0, 1.0)
    with pytest.raises(ValueError, match="frame and core together"):
        nf.transforms.FixedAffine(jnp.zeros(2), 1.0, frame=jnp.eye(2))
    with pytest.raises(ValueError, match="scale: expected shape"):
        nf.transforms.FixedAffine(jnp.zeros(2), jnp.ones(3))
    with pytest.raises(ValueError, match="frame: expected shape"):
        nf.transforms.FixedAffine(jnp.zeros(2), 1.0, jnp.eye(3), jnp.eye(2))
    with pytest.raises(ValueError, match="init: expected 'auto', 'location' or a function"):
        nf.AutoFlow(scaled, init="laplace")


@pytest.mark.parametrize("num", [40, 400])
def test_scores_of_a_normal_give_it_wherever_they_are(num):
    """A condition number of 1e6, and points far from the mass."""
    rng = np.random.default_rng(0)
    frame, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    covariance = (frame * np.geomspace(1e-3, 1e3, 8)) @ frame.T
    mean = rng.normal(size=8)
    points = 5.0 + rng.normal(size=(num, 8))
    scores = -np.linalg.solve(covariance, (points - mean).T).T
    found, factor = matched(points, scores)
    sd = np.sqrt(np.diagonal(covariance))
    np.testing.assert_allclose((found - mean) / sd, 0.0, atol=0.01)
    # What is one in the right coordinates; the ridge shows in the narrowest direction.
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), factor)
    np.testing.assert_allclose(np.linalg.svd(whitened)[1], 1.0, atol=0.1)


def test_draws_and_scores_give_what_is_of_low_rank():
    """Scales over six decades, and ten directions 30 times as long or as short as these."""
    rng, dim = np.random.default_rng(0), 600
    axes, _ = np.linalg.qr(rng.normal(size=(dim, 10)))
    lengths, scale = np.repeat([30.0, 1 / 30], 5), np.geomspace(1e-3, 1e3, dim)
    mean = rng.normal(size=dim)
    x = rng.normal(size=(400, dim))
    x += (x @ axes * (lengths - 1)) @ axes.T
    scores = -(x + (x @ axes * (lengths**-2 - 1)) @ axes.T) / scale
    found = matched_low_rank(mean + scale * x, scores, 40)
    np.testing.assert_allclose(found.frame.T @ found.frame, np.eye(40), atol=1e-10)
    np.testing.assert_allclose((found.mean - mean) / scale, 0.0, atol=0.5)
    # Undone on the normal's own root, of condition 900, the map leaves what is nearly a rotation.
    root = (np.eye(dim) + (axes * (lengths - 1)) @ axes.T) * scale
    whitened = np.linalg.svd(Affine(*found).inverse(found.mean + root))[1]
    assert whitened.max() < 2.0
    assert whitened.min() > 0.5
    # Points that are few determine less.
    assert np.isfinite(matched_low_rank(x[:3], scores[:3], 40).frame).all()


def test_a_normal_of_hundreds_of_coordinates_is_found_whole():
    rng, dim = np.random.default_rng(0), 200
    frame, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    variances = np.geomspace(1e-3, 1e3, dim)
    precision = (frame / variances) @ frame.T

    def rows(x):
        slope = x @ precision
        return -0.5 * (x * slope).sum(1), -slope

    found = locate(rows, 0, rng.normal(size=(2, dim)), 0.1)
    log_evidence = 0.5 * (dim * np.log(2 * np.pi) + np.log(variances).sum())
    assert found.elbo == pytest.approx(log_evidence, abs=0.05)
    assert found.affine.core.shape == (dim, dim)


def test_a_normal_takes_few_gradients():
    rng = np.random.default_rng(0)
    frame, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    precision = (frame / np.geomspace(1e-4, 1e4, 20)) @ frame.T

    def rows(x):
        slope = x @ precision
        return -0.5 * (x * slope).sum(1), -slope

    found = locate(rows, 0, rng.normal(size=(4, 20)), 0.1)
    assert found.num_gradients < 7000  # most of them of the paths
    log_evidence = 0.5 * (20 * np.log(2 * np.pi) + np.log(np.geomspace(1e-4, 1e4, 20)).sum())
    assert found.elbo == pytest.approx(log_evidence, abs=0.05)
