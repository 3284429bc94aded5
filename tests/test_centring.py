"""Degrees of centring: the map, by autodiff and NumPyro's densities; guides and samplers in it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from kernels import run
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, init_to_uniform
from programs import compiled_programs
from scipy import integrate, stats

import numpyro_flows as nf
from numpyro_flows.infer.centring import degrees_of, loc_scale
from numpyro_flows.infer.latent_space import Centring, LogDensity
from numpyro_flows.infer.setup import SetUp

KEY = jax.random.key(0)
SMALL = partial(nf.realnvp, depth=2, hidden=(8,))
Y, NOISE = np.array([2.0, -1.0, 0.5, 3.0], np.float32), np.array([0.1, 1.0, 3.0, 30.0], np.float32)


def density_of(model, *args):
    space = SetUp("a test", model, init_to_uniform, KEY, args, {}).space
    return LogDensity(model, space, args, {}, KEY)


def degrees(density, seed=0):
    shape = 2, density.space.dim
    return tuple(jax.random.uniform(jax.random.key(seed), shape, jnp.result_type(float)))


def groups(noise, y):
    """Groups of which some are known well and others hardly at all, in the centred form."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("group", len(y)):
        level = numpyro.sample("level", dist.Normal(mean, scale))
        numpyro.sample("y", dist.Normal(level, noise), obs=y)


def known(noise, y):
    """Log evidence, and mean and sd of log scale, by quadrature: the rest is normal."""

    def log_joint(log_scale):
        covariance = np.diag(noise**2 + np.exp(2 * log_scale)) + 4.0
        likelihood = stats.multivariate_normal(np.zeros(len(y)), covariance).logpdf(y)
        return likelihood + stats.norm.logpdf(log_scale)

    points = np.linspace(-6, 6, 4001)
    values = np.exp([log_joint(t) for t in points])
    total = integrate.simpson(values, x=points)
    mean = integrate.simpson(points * values, x=points) / total
    second = integrate.simpson(points**2 * values, x=points) / total
    return np.log(total), mean, np.sqrt(second - mean**2)


def deep(y, group):
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = numpyro.sample("scale", dist.HalfCauchy(jnp.exp(0.1 * mean)))
    with numpyro.plate("group", 3):
        level = numpyro.sample("level", dist.Normal(mean, scale))
        size = numpyro.sample("size", dist.LogNormal(level, scale))
    effect = numpyro.sample("effect", dist.StudentT(3.0, size.sum(), scale).expand([2]).to_event(1))
    correlation = numpyro.sample("correlation", dist.LKJCholesky(2, 1.0))
    with numpyro.plate("pair", 2):
        root = scale * correlation
        pair = numpyro.sample("pairs", dist.MultivariateNormal(effect, scale_tril=root))
    numpyro.sample("y", dist.Normal(level[group] + pair.sum(), 1.0), obs=y)


def test_the_map_is_exact(x64):
    density = density_of(deep, jnp.ones(4), jnp.array([0, 1, 2, 0]))
    assert density.hierarchy.num_levels == 5
    centred = density.centred(degrees(density))
    u = jax.random.normal(KEY, (5, density.space.dim))
    transform = Centring(centred)

    @jax.jit
    def both_ways(u):
        x, log_det = transform.forward_and_log_det(u)
        inverse = transform.inverse_and_log_det(x)
        return x, log_det, *inverse, jax.vmap(jax.jacobian(transform))(u)

    x, log_det, back, inverse_log_det, jacobians = both_ways(u)
    np.testing.assert_allclose(back, u, atol=1e-12)
    np.testing.assert_allclose(log_det, jnp.linalg.slogdet(jacobians)[1], atol=1e-12)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-12)
    values, grads = jax.jit(jax.vmap(centred.value_and_grad))(u)
    np.testing.assert_allclose(values, jax.vmap(density)(x) + log_det, atol=1e-10)
    steps = 1e-6 * jax.random.normal(jax.random.key(1), u.shape)
    of_rows = jax.jit(jax.vmap(centred))
    differences = (of_rows(u + steps) - of_rows(u - steps)) / 2
    np.testing.assert_allclose(differences, (grads * steps).sum(-1), rtol=1e-5)


FAMILIES = {
    "normal": lambda t: dist.Normal(t, jnp.exp(t)),
    "expanded": lambda t: dist.Normal(t, jnp.exp(t)).expand((2,)).to_event(1),
    "Student": lambda t: dist.StudentT(4.0, t, jnp.exp(t)),
    "Laplace": lambda t: dist.Laplace(t, jnp.exp(t)),
    "asymmetric": lambda t: dist.AsymmetricLaplace(t, jnp.exp(t), 2.0),
    "soft": lambda t: dist.SoftLaplace(t, jnp.exp(t)),
    "logistic": lambda t: dist.Logistic(t, jnp.exp(t)),
    "Gumbel": lambda t: dist.Gumbel(t, jnp.exp(t)),
    "Cauchy": lambda t: dist.Cauchy(t, jnp.exp(t)),
    "lognormal": lambda t: dist.LogNormal(t, jnp.exp(t)),
    "half normal": lambda t: dist.HalfNormal(jnp.exp(t)),
    "half Cauchy": lambda t: dist.HalfCauchy(jnp.exp(t)),
    "exponential": lambda t: dist.Exponential(jnp.exp(t)),
    "gamma": lambda t: dist.Gamma(3.0, jnp.exp(t)),
    "inverse gamma": lambda t: dist.InverseGamma(3.0, jnp.exp(t)),
    "Weibull": lambda t: dist.Weibull(jnp.exp(t), 2.0),
    "Weibull of a shape": lambda t: dist.Weibull(jnp.exp(t), jnp.exp(t)),
    "walk": lambda t: dist.GaussianRandomWalk(jnp.exp(t), 3),
    "covariance": lambda t: dist.MultivariateNormal(
        jnp.array([t, 1.0]), scale_tril=jnp.array([[1.0, 0.0], [t, 1.0]]) * jnp.exp(t)
    ),
    "covariance, Student": lambda t: dist.MultivariateStudentT(
        4.0, jnp.array([t, 1.0]), jnp.array([[1.0, 0.0], [0.5, 1.0]]) * jnp.exp(t)
    ),
    "affine": lambda t: dist.TransformedDistribution(
        dist.Normal(1.0, 2.0), dist.transforms.AffineTransform(t, jnp.exp(t))
    ),
    "affine exponential": lambda t: dist.TransformedDistribution(
        dist.StudentT(5.0, 1.0, 2.0),
        [dist.transforms.AffineTransform(t, -jnp.exp(t)), dist.transforms.ExpTransform()],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_non_centred_form_does_not_know_its_parents(family, x64):
    """The prior is a product there: its log density is a term of the parent and one of the rest."""

    def model():
        parent = numpyro.sample("parent", dist.Normal(0.0, 1.0))
        numpyro.sample("child", FAMILIES[family](parent))

    density = density_of(model)
    assert [site.name for site in density.hierarchy.sites] == ["child"]
    dim = density.space.dim
    plain = density.centred((jnp.zeros(dim), jnp.zeros(dim)))
    u, v = jax.random.normal(KEY, (2, dim))
    index = density.space.unpack(jnp.arange(dim))["parent"]
    mixed = u.at[index].set(v[index])
    other = v.at[index].set(u[index])
    total = plain(u) + plain(v) - plain(mixed) - plain(other)
    np.testing.assert_allclose(total, 0.0, atol=1e-10)
    centred = density(u) + density(v) - density(mixed) - density(other)
    assert abs(centred) > 0.01


def walk(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def step(before, seen):
        x = numpyro.sample("x", dist.Normal(before, scale))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=seen)
        return x, None

    scan(step, 0.0, y)


def chain(y):
    before, scale = 0.0, numpyro.sample("scale", dist.HalfNormal(1.0))
    for t, seen in enumerate(y):
        before = numpyro.sample(f"x{t}", dist.Normal(before, scale))
        numpyro.sample(f"y{t}", dist.Normal(before, 0.5), obs=seen)


def test_what_can_be_centred():
    """Not what depends on nothing; of a series the scale alone, since it depends on itself."""

    def flat():
        numpyro.sample("x", dist.Normal(1.0, 2.0))
        centre = numpyro.sample("centre", dist.Normal())
        numpyro.sample("angle", dist.VonMises(centre, 1.0))
        numpyro.sample("masked", dist.Normal(centre, 1.0).mask(jnp.array(False)))

    assert not density_of(flat).hierarchy.sites
    assert density_of(walk, Y).hierarchy.sites == (("x", False, True),)
    of_chain = density_of(chain, np.zeros(9, np.float32)).hierarchy
    assert of_chain.num_levels == 1
    assert {site.has_loc for site in of_chain.sites} == {False}
    assert [site.has_loc for site in density_of(chain, Y).hierarchy.sites] == [False, *3 * [True]]


def test_a_guide_learns_where_to_centre():
    guide = nf.AutoFlow(groups, SMALL_INFORMED)
    fitted = nf.fit_guide(KEY, guide, NOISE, Y, progress_bar=False)
    evidence, mean, sd = known(NOISE, Y)
    assert fitted.trusted
    assert fitted.ess > 0.9
    assert fitted.elbo == pytest.approx(evidence, abs=0.05)
    log_scale = np.log(fitted.sample(KEY, (20_000,))["scale"])
    assert log_scale.mean() == pytest.approx(mean, abs=0.1 * sd)
    assert log_scale.std() == pytest.approx(sd, rel=0.1)
    _, of_scale = fitted.params["auto_preconditioner"].degrees.value
    by_group = guide.space.unpack(of_scale)["level"]
    assert by_group[0] > 0.5 > by_group[-1]  # centred where the data say much


SMALL_INFORMED = partial(nf.model_informed, flow=SMALL)


def test_all_that_a_guide_does_agrees():
    """Draws, densities, weights, NeuTra and NumPyro's SVI are of one and the same distribution."""
    guide = nf.AutoFlow(groups, SMALL_INFORMED)
    fitted = nf.fit_guide(KEY, guide, NOISE, Y, num_steps=100, progress_bar=False)
    posterior = guide.get_posterior(fitted.params)
    x = posterior.sample(KEY, (3,))
    with handlers.seed(rng_seed=1):
        traced = handlers.trace(handlers.substitute(guide, data=fitted.params)).get_trace(NOISE, Y)
    u = traced["_auto_latent"]["value"]
    of_sites = guide.to_sites(u, fitted.params)
    for name in ("mean", "scale", "level"):
        np.testing.assert_allclose(of_sites[name], traced[name]["value"], rtol=1e-5)
    assert posterior.log_prob(x).shape == (3,)
    np.testing.assert_allclose(
        traced["_auto_latent"]["fn"].log_prob(u), posterior.log_prob(u), rtol=1e-5
    )
    drawn = nf.importance_log_weights(KEY, guide, fitted.params, NOISE, Y, num_samples=4000)
    assert float(drawn.mean()) == pytest.approx(fitted.elbo, abs=0.05)
    evidence, _, _ = known(NOISE, Y)
    mixture = jax.nn.logsumexp(drawn) - np.log(len(drawn))
    assert float(mixture) == pytest.approx(evidence, abs=0.05)
    svi = SVI(groups, guide, numpyro.optim.Adam(1e-4), nf.STL_ELBO(num_particles=64))
    result = svi.run(KEY, 20, NOISE, Y, init_params=fitted.params, progress_bar=False)
    assert -np.mean(result.losses) == pytest.approx(fitted.elbo, abs=0.1)


@pytest.mark.slow
def test_neural_transport_through_these_coordinates():
    guide = nf.AutoFlow(groups, SMALL_INFORMED)
    fitted = nf.fit_guide(KEY, guide, NOISE, Y, num_steps=100, progress_bar=False)
    chains = run(numpyro.infer.NUTS(fitted.neutra().reparam(groups)), NOISE, Y)
    _, mean, sd = known(NOISE, Y)
    log_scale = np.log(chains.get_samples()["scale"])
    assert log_scale.mean() == pytest.approx(mean, abs=0.2 * sd)


def test_the_default_guide_chooses():
    """Centred coordinates where data are strong, and where they are weak those of degrees."""
    strong, weak = np.full(4, 0.01, np.float32), np.full(4, 30.0, np.float32)
    guide = nf.AutoFlow(groups)
    begun = guide.set_up(KEY, (weak, Y), {})
    with compiled_programs() as programs:
        assert degrees_of(guide.locate(KEY, begun).affine) is not None
    assert len(programs) <= 8
    with compiled_programs() as programs:
        located = guide.locate(KEY, guide.set_up(KEY, (strong, Y), {})).affine
    assert not programs
    found = degrees_of(located)
    assert found is None or guide.space.unpack(found[1])["level"].min() > 0.5
    other = nf.AutoFlow(groups, SMALL)
    assert degrees_of(other.locate(KEY, other.set_up(KEY, (weak, Y), {})).affine) is None


def is_right(chains):
    _, mean, sd = known(NOISE, Y)
    log_scale = np.log(chains.get_samples()["scale"])
    assert log_scale.mean() == pytest.approx(mean, abs=0.15 * sd)
    assert log_scale.std() == pytest.approx(sd, rel=0.15)
    assert chains.sampler.report(chains).run.divergences <= 0.005 * len(log_scale)


def test_a_sampler_in_these_coordinates():
    kernel = nf.FlowNUTS(groups, SMALL_INFORMED, progress_bar=False)
    is_right(run(kernel, NOISE, Y, num_chains=4))


@pytest.mark.slow
def test_a_sampler_by_scores_in_these_coordinates():
    kernel = nf.FlowNUTS(groups, SMALL_INFORMED, train="fisher", progress_bar=False)
    chains = run(kernel, NOISE, Y, num_chains=4)
    is_right(chains)
    draws = chains.get_samples()
    # Other data, through the map at hand.
    chains.run(KEY, NOISE[::-1], Y[::-1])
    np.testing.assert_allclose(
        chains.get_samples()["level"].mean(0)[::-1][0], draws["level"].mean(0)[0], atol=0.1
    )


def test_a_chain_starts_where_it_is_told():
    kernel = nf.FlowNUTS(groups, SMALL_INFORMED, progress_bar=False)
    start = {"mean": 0.3, "scale": -0.2, "level": np.array([2.0, -1.0, 0.2, 0.4], np.float32)}
    start = {name: jnp.asarray(value) for name, value in start.items()}
    state = kernel.init(KEY, 20, start, (NOISE, Y), {})
    for name, value in start.items():
        np.testing.assert_allclose(state.z[name], value, atol=1e-4)


def test_a_family_of_ones_own():
    class Skewed(dist.Normal):
        pass

    assert loc_scale(dist.Beta(1.0, 2.0)) is None
    assert loc_scale(Skewed(1.0, 2.0)) == (1.0, 2.0)
