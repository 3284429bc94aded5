"""Posteriors with known answers: models, their data, and what to compare draws with.

Ten posteriors of posteriordb (Magnusson et al., 2024, arXiv:2407.04967), ported to NumPyro, with
gold-standard draws; funnels with closed forms; sparse logistic regression with the moments of
inference-gym. The data lie in the folder that the environment variable ``NUMPYRO_FLOWS_DATA``
names, else in ``../shared/data`` beside the project.
"""

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints


def data_folder() -> Path:
    """The folder with the data; it may not exist."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    return Path(os.environ.get("NUMPYRO_FLOWS_DATA") or beside)


@dataclasses.dataclass(frozen=True)
class Posterior:
    """A model with its arguments and the truth about its posterior.

    ``flat`` turns a dict of draws ``(n, *shape)`` into columns ``(n, num)``; ``mean`` and ``sd``
    are the true moments of these columns.
    """

    model: Callable
    args: tuple
    flat: Callable[[dict[str, Any]], np.ndarray]
    mean: np.ndarray
    sd: np.ndarray


def flat_prior(name: str, shape: tuple[int, ...] = (), support: Any = constraints.real) -> Any:
    batch, event = (shape, ()) if support.event_dim == 0 else ((), shape)
    return numpyro.sample(name, dist.ImproperUniform(support, batch, event))


def eight_schools(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        unit = numpyro.sample("unit", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * unit)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_centered(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def autoregression(lagged, y):
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(lagged.shape[1]), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lagged @ beta, sigma), obs=y)


def garch(y, sigma1):
    mu = flat_prior("mu")
    alpha0 = flat_prior("alpha0", support=constraints.positive)
    alpha1 = flat_prior("alpha1", support=constraints.unit_interval)
    # Flat on (0, 1 - alpha1), written with a support that does not move.
    share = flat_prior("share", support=constraints.unit_interval)
    beta1 = numpyro.deterministic("beta1", share * (1 - alpha1))
    numpyro.factor("flat", jnp.log1p(-alpha1))

    def step(variance, previous):
        variance = alpha0 + alpha1 * (previous - mu) ** 2 + beta1 * variance
        return variance, variance

    _, later = jax.lax.scan(step, sigma1**2 + 0.0 * mu, y[:-1])
    variance = jnp.concatenate([jnp.full(1, sigma1**2), later])
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)), obs=y)


def gp_poisson(x, k):
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    unit = numpyro.sample("unit", dist.Normal(jnp.zeros(len(x)), 1.0).to_event(1))
    covariance = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2)
    # Stan's 1e-10 is below float32's rounding; 1e-5 moves f by 0.003 of its scale.
    jitter = 1e-10 if covariance.dtype == jnp.float64 else 1e-5
    f = numpyro.deterministic(
        "f", jnp.linalg.cholesky(covariance + jitter * jnp.eye(len(x))) @ unit
    )
    numpyro.sample("k", dist.Poisson(jnp.exp(f)).to_event(1), obs=k)


def mixture(y):
    mu = flat_prior("mu", (2,), constraints.ordered_vector)
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0 * jnp.ones(2)).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    logits = jnp.log(jnp.stack([theta, 1 - theta]))
    terms = logits + dist.Normal(mu, sigma).log_prob(y[:, None])
    numpyro.factor("y", jax.nn.logsumexp(terms, axis=-1).sum())


def regression(x, y):
    beta = flat_prior("beta", (x.shape[1],), constraints.real_vector)
    sigma = flat_prior("sigma", support=constraints.positive)
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kidscore(x, y):
    beta = flat_prior("beta", (x.shape[1],), constraints.real_vector)
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def diamonds(centred, y):
    b = numpyro.sample("b", dist.Normal(jnp.zeros(centred.shape[1]), 1.0).to_event(1))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = flat_prior("sigma", support=constraints.positive)
    numpyro.factor("sigma_prior", dist.StudentT(3.0, 0.0, 10.0).log_prob(sigma))
    numpyro.sample("y", dist.Normal(intercept + centred @ b, sigma), obs=y)


def hmm_drive(u, v, concentration):
    theta1 = numpyro.sample("theta1", dist.Dirichlet(concentration[0]))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(concentration[1]))
    phi = flat_prior("phi", (2,), constraints.positive_ordered_vector)
    rate = flat_prior("lambda", (2,), constraints.positive_ordered_vector)
    where = dist.Normal(jnp.array([0.0, 3.0]), 1.0)
    numpyro.factor("prior", (where.log_prob(phi) + where.log_prob(rate)).sum())
    log_theta = jnp.log(jnp.stack([theta1, theta2]))
    emissions = dist.Exponential(phi).log_prob(u[:, None]) + dist.Exponential(rate).log_prob(
        v[:, None]
    )

    def step(log_alpha, emission):
        log_alpha = jax.nn.logsumexp(log_alpha[:, None] + log_theta, axis=0) + emission
        return log_alpha, None

    log_alpha, _ = jax.lax.scan(step, emissions[0] - jnp.log(2.0), emissions[1:])
    numpyro.factor("uv", jax.nn.logsumexp(log_alpha))


def funnel(dim):
    """Neal's funnel in its centred form: v ~ N(0, 3^2), x_i ~ N(0, exp(v / 2)); log Z = 0."""
    v = numpyro.sample("v", dist.Normal(0.0, 3.0))
    numpyro.sample("x", dist.Normal(jnp.zeros(dim - 1), jnp.exp(v / 2)).to_event(1))


def wide_funnel(dim):
    """log_sigma ~ N(0, 1) over many x_i ~ N(0, exp(log_sigma / 2)); log Z = 0."""
    log_sigma = numpyro.sample("log_sigma", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(jnp.zeros(dim - 1), jnp.exp(log_sigma / 2)).to_event(1))


def sparse_logistic(x, y):
    tau = numpyro.sample("global", dist.Gamma(0.5, 0.5))
    local = numpyro.sample("local", dist.Gamma(0.5 * jnp.ones(x.shape[1]), 0.5).to_event(1))
    unit = numpyro.sample("unit", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ (unit * local * tau)), obs=y)


def _read(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def _arguments(name: str, d: dict[str, np.ndarray]) -> tuple[Callable, tuple]:
    if name == "eight_schools":
        return eight_schools, (d["y"], d["sigma"])
    if name == "arK":
        k, y = int(d["K"]), d["y"]
        lagged = np.stack([y[k - lag : len(y) - lag] for lag in range(1, k + 1)], axis=1)
        return autoregression, (lagged, y[k:])
    if name == "garch11":
        return garch, (d["y"], d["sigma1"])
    if name == "gp_pois_regr":
        return gp_poisson, (d["x"], d["k"])
    if name == "low_dim_gauss_mix":
        return mixture, (d["y"],)
    if name == "hmm_drive_0":
        return hmm_drive, (d["u"], d["v"], d["alpha"])
    if name == "diamonds":
        rest = d["X"][:, 1:]
        return diamonds, (rest - rest.mean(0), d["Y"])
    if name == "logearn_interaction":
        x = [np.ones(len(d["earn"])), d["height"], d["male"], d["height"] * d["male"]]
        return regression, (np.stack(x, 1), np.log(d["earn"]))
    if name == "kidscore_interaction":
        x = [np.ones(len(d["mom_iq"])), d["mom_hs"], d["mom_iq"], d["mom_hs"] * d["mom_iq"]]
        return kidscore, (np.stack(x, 1), d["kid_score"])
    if name == "nes2000":
        age = [d["age_discrete"] == code for code in (2, 3, 4)]
        before, after = ("real_ideo", "race_adj"), ("educ1", "gender", "income")
        x = [np.ones(len(age[0])), *(d[k] for k in before), *age, *(d[k] for k in after)]
        return regression, (np.stack(x, 1), d["partyid7"])
    raise ValueError(f"No posterior {name!r}; expected one of {POSTERIORDB}.")


POSTERIORDB = (
    "eight_schools",
    "arK",
    "garch11",
    "gp_pois_regr",
    "low_dim_gauss_mix",
    "logearn_interaction",
    "diamonds",
    "nes2000",
    "kidscore_interaction",
    "hmm_drive_0",
)


def posterior(name: str) -> Posterior:
    """A posterior of posteriordb with its gold-standard moments.

    ``eight_schools_centered`` is ``eight_schools`` in the centred form, the same posterior.

    :raises FileNotFoundError: without the data.
    """
    folder, stem = data_folder() / "posteriordb", name.removesuffix("_centered")
    raw = _read(folder / f"{stem}.data.json.zip")
    d = {key: np.asarray(value, np.result_type(float)) for key, value in raw.items()}
    model, args = _arguments(stem, d)
    if name == "eight_schools_centered":
        model = eight_schools_centered
    chains = _read(folder / f"{stem}.draws.json.zip")
    names = list(chains[0])
    truth = np.concatenate([[chain[k] for k in names] for chain in chains], axis=1).T

    def flat(draws: dict[str, Any]) -> np.ndarray:
        columns = []
        for full in names:
            site, _, index = full.partition("[")
            value = np.asarray(draws[site], float)
            columns.append(value[:, int(index[:-1]) - 1] if index else value)
        return np.stack(columns, 1)

    args = tuple(jnp.asarray(a, jnp.result_type(float)) for a in args)
    return Posterior(model, args, flat, truth.mean(0), truth.std(0))


def german_credit() -> Posterior:
    """Sparse logistic regression of the German credit data, 51 unconstrained coordinates."""
    folder = data_folder() / "german_credit"
    raw = np.loadtxt(folder / "german.data-numeric")
    x = raw[:, :24]
    x = np.c_[(x - x.mean(0)) / x.std(0), np.ones(len(x))]
    y = (raw[:, 24] == 2).astype(float)
    truth = np.load(folder / "gt_german_credit_numeric_sparse_logistic_regression.npz")
    moments = [
        np.concatenate(
            [np.ravel(truth[key]) for key in sorted(truth.files) if key.endswith(suffix)]
        )
        for suffix in ("_MEAN", "_STANDARD_DEVIATION")
    ]
    return Posterior(
        sparse_logistic,
        (jnp.asarray(x, jnp.result_type(float)), jnp.asarray(y, jnp.result_type(float))),
        lambda draws: np.concatenate(
            [
                np.asarray(draws[site], float).reshape(len(draws[site]), -1)
                for site in ("global", "local", "unit")
            ],
            axis=1,
        ),
        *moments,
    )


def many_schools(num: int = 4998) -> Posterior:
    """The centred eight schools with many schools, drawn with a fixed seed; ``num + 2`` latents.

    Given tau all is normal, so that moments and log evidence are one integral over log tau, done on
    a grid. Standard errors from 0.1 to 10 make the sites' scales differ by a factor of 40.
    """
    rng = np.random.default_rng(0)
    s = np.geomspace(0.1, 10.0, num)
    y = rng.normal(rng.normal(4.0, 3.0, num), s)
    log_tau = np.linspace(np.log(2.0), np.log(4.5), 2001)
    tau = np.exp(log_tau)[:, None]
    v = s**2 + tau**2
    precision = 1 / 25 + (1 / v).sum(1)
    mu = (y / v).sum(1) / precision
    log_joint = (
        -0.5 * (np.log(2 * np.pi * v) + y**2 / v).sum(1)
        + 0.5 * mu**2 * precision
        - 0.5 * np.log(25 * precision)
        + np.log(2 / (np.pi * 5))
        - np.log1p((tau[:, 0] / 5) ** 2)
        + log_tau
    )
    weights = np.exp(log_joint - log_joint.max())
    log_evidence = log_joint.max() + np.log(weights.sum() * (log_tau[1] - log_tau[0]))
    weights /= weights.sum()
    share = tau**2 / v
    means = np.c_[mu, tau, share * y + (1 - share) * mu[:, None]]
    variances = np.c_[1 / precision, 0 * tau, share * s**2 + (1 - share) ** 2 / precision[:, None]]
    mean = weights @ means
    sd = np.sqrt(weights @ (variances + (means - mean) ** 2))
    print(f"{num + 2} latent coordinates: log evidence {log_evidence:.3f}", flush=True)
    args = tuple(jnp.asarray(a, jnp.result_type(float)) for a in (y, s))

    def flat(draws: dict[str, Any]) -> np.ndarray:
        top = [np.asarray(draws[site], float)[:, None] for site in ("mu", "tau")]
        return np.concatenate([*top, np.asarray(draws["theta"], float)], axis=1)

    return Posterior(eight_schools_centered, args, flat, mean, sd)
