"""Log evidence from draws at hand, against closed forms and quadrature."""

import functools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from kernels import run
from numpyro.infer import NUTS

import numpyro_flows as nf
from numpyro_flows.infer.evidence import _bridge

SMALL = functools.partial(nf.realnvp, depth=4, hidden=(16,), activation="gelu")
RNG = np.random.default_rng(0)


def agrees(found, exact, largest_error):
    assert found.trusted
    assert found.error < largest_error
    assert abs(found.log_evidence - exact) < 3 * found.error + 1e-4


def regression():
    """Three correlated coefficients with a normal prior: everything in closed form."""
    x = RNG.normal(size=(20, 3)) @ np.array([[1.0, 0.9, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 2.0]])
    y = x @ [1.0, -1.0, 0.5] + RNG.normal(size=20)

    def model(x, y):
        beta = numpyro.sample("beta", dist.Normal(jnp.zeros(3), 2.0).to_event(1))
        numpyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)

    covariance = np.linalg.inv(x.T @ x + np.eye(3) / 4)
    draws = RNG.multivariate_normal(covariance @ x.T @ y, covariance, size=4000)
    exact = scipy.stats.multivariate_normal(np.zeros(20), np.eye(20) + 4 * x @ x.T).logpdf(y)
    return model, (x, y), {"beta": draws}, exact


def shares():
    """A probability and a simplex, of Beta and Dirichlet posteriors."""
    counts = np.array([3, 10, 1])

    def model(successes, counts):
        p = numpyro.sample("p", dist.Beta(2.0, 3.0))
        numpyro.sample("k", dist.Binomial(20, p), obs=successes)
        share = numpyro.sample("share", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
        numpyro.sample("counts", dist.Multinomial(14, share), obs=counts)

    prior = np.array([1.0, 2.0, 3.0])
    draws = {"p": RNG.beta(9, 16, size=4000), "share": RNG.dirichlet(prior + counts, size=4000)}
    exact = scipy.stats.betabinom(20, 2, 3).logpmf(7)
    exact += scipy.stats.dirichlet_multinomial(prior, 14).logpmf(counts)
    return model, (7, counts), draws, exact


def angle():
    """A direction whose posterior lies around +-pi; by quadrature, draws by its distribution."""

    def model(y):
        theta = numpyro.sample("theta", dist.VonMises(3.0, 2.0))
        numpyro.sample("y", dist.Normal(jnp.cos(theta), 0.3), obs=y)

    grid = np.linspace(-np.pi, np.pi, 20_001)
    density = scipy.stats.vonmises(2.0, loc=3.0).pdf(grid)
    density = density * scipy.stats.norm(np.cos(grid), 0.3).pdf(-0.8)
    cumulative = np.concatenate([[0.0], scipy.integrate.cumulative_trapezoid(density, grid)])
    draws = np.interp(RNG.uniform(size=4000) * cumulative[-1], cumulative, grid)
    return model, (-0.8,), {"theta": draws}, np.log(cumulative[-1])


def masked():
    """Half of the observations are missing, and latent."""
    y, seen = np.array([0.3, -1.0, 2.0, 0.0]), np.array([True, True, False, False])

    def model(y, seen):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mean, 1.0).expand([4]), obs=y, obs_mask=seen)

    mean = RNG.normal(-0.7 / 3, 3**-0.5, size=4000)
    latent = mean[:, None] + RNG.normal(size=(4000, 4))
    exact = scipy.stats.multivariate_normal(np.zeros(2), np.eye(2) + 1).logpdf(y[:2])
    return model, (y, seen), {"mean": mean, "y_unobserved": latent}, exact


@pytest.mark.parametrize("case", [regression, shares, angle, masked], ids=lambda c: c.__name__)
def test_closed_forms(case):
    model, args, samples, exact = case()
    found = nf.log_evidence(samples, model, *args, flow=SMALL, progress_bar=False)
    agrees(found, exact, 0.05)
    assert found.num_effective > 1500


def eight_schools(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def test_draws_of_nuts_with_their_chains():
    """Eight schools, of which the schools can be integrated out and the rest by quadrature."""
    y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def not_centred(y, sigma):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("school", len(y)):
            unit = numpyro.sample("unit", dist.Normal(0.0, 1.0))
            theta = numpyro.deterministic("theta", mu + tau * unit)
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    samples = run(NUTS(not_centred), y, sigma, num_chains=4).get_samples(group_by_chain=True)
    found = nf.log_evidence(samples, eight_schools, y, sigma, progress_bar=False)

    # tau = 5 tan(phi) turns the half-Cauchy prior into a uniform one.
    phi = (np.arange(1000) + 0.5) / 1000 * np.pi / 2
    mu = np.linspace(-30, 30, 301)
    spread = np.hypot(5 * np.tan(phi)[:, None], sigma)
    log_p = scipy.stats.norm(mu[:, None, None], spread).logpdf(y).sum(-1)
    log_p += scipy.stats.norm(0, 5).logpdf(mu)[:, None] + np.log(mu[1] - mu[0])
    exact = scipy.special.logsumexp(log_p) - np.log(len(phi))
    agrees(found, exact, 0.1)
    assert 200 < found.num_effective < 2000


def test_errors_are_errors():
    """The spread of estimates over repetitions is the error that they state."""
    z, sds = [], []
    for _ in range(200):
        x, flow = RNG.normal(size=(2, 300)), 0.5 + 1.5 * RNG.normal(size=1000)

        def ratios(x):
            return 3 + scipy.stats.norm.logpdf(x) - scipy.stats.norm(0.5, 1.5).logpdf(x)

        found = _bridge(ratios(x), ratios(flow))
        z.append((found.log_evidence - 3) / found.error)
        sds.append(found.error)
    assert abs(np.mean(z)) < 0.25
    assert 0.85 < np.std(z) < 1.15
    assert np.mean(sds) < 0.06


def test_draws_that_hardly_meet_are_called_so():
    """A flow that cannot reach the posterior, here by draws of another one."""
    model, args, samples, _ = regression()
    found = nf.log_evidence(
        {"beta": samples["beta"] * 40}, model, *args, flow=SMALL, progress_bar=False
    )
    assert not found.trusted
    assert "hardly meet" in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {}, "no draws of the latent site 'beta'"),
        (lambda s: {"beta": s["beta"][:, :2]}, r"site 'beta' of shape \(n, \*\(3,\)\)"),
        (lambda s: {"beta": s["beta"][:50]}, "at least 100 draws, got 50"),
        (lambda s: {"beta": s["beta"] * [1.0, 0.0, 1.0]}, "draws of site 'beta' do not move"),
        (lambda s: {"beta": s["beta"] * np.nan}, "4000 of 4000 draws lie on the boundary"),
    ],
)
def test_bad_draws(change, message):
    model, args, samples, _ = regression()
    with pytest.raises(ValueError, match=message):
        nf.log_evidence(change(samples), model, *args, flow=SMALL, progress_bar=False)
