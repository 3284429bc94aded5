"""Arguments of models as NumPyro takes them, and plates of which a model sees some rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

import numpyro_flows as nf

KEY = jax.random.key(0)
SMALL = partial(nf.realnvp, depth=2, hidden=(8,))
ROWS = np.random.default_rng(0).normal(1.0, 1.0, 60).astype(np.float32)
GROUPS = np.arange(60) % 3


def conjugate(y):
    """mu ~ N(0, 1), y_i ~ N(mu, 1)."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)


class Record:
    def __init__(self, y):
        self.y = y


def frame():
    return pytest.importorskip("pandas").DataFrame({"y": ROWS})


MODELS = {
    "frame": (frame, lambda a: conjugate(a["y"].to_numpy())),
    "series": (lambda: frame()["y"], lambda a: conjugate(a.to_numpy())),
    "record array": (
        lambda: np.rec.fromarrays([ROWS, GROUPS], names="y,group"),
        lambda a: conjugate(np.asarray(a.y)),
    ),
    "object": (lambda: Record(ROWS), lambda a: conjugate(a.y)),
    "set": (lambda: set(ROWS.tolist()), lambda a: conjugate(jnp.array(sorted(a)))),
    "strings": (
        lambda: (np.array(["a", "b"])[GROUPS % 2], ROWS),
        lambda a: conjugate(a[1]) if set(a[0]) == {"a", "b"} else None,
    ),
    "dates": (
        lambda: (np.datetime64("2020-01-01") + np.arange(60), ROWS),
        lambda a: conjugate(a[1][np.argsort(a[0])]),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_arguments_of_any_kind(kind):
    make, model = MODELS[kind]
    fitted = nf.fit_guide(KEY, nf.AutoFlow(model, SMALL), make(), progress_bar=False)
    exact = dist.MultivariateNormal(jnp.zeros(60), jnp.eye(60) + 1.0).log_prob(ROWS)
    assert abs(fitted.elbo - exact) < 0.02
    assert abs(fitted.sample(KEY, (4000,))["mu"].mean() - ROWS.sum() / 61) < 0.02
    assert fitted.trusted


def by_group(y, group):
    """Shapes from values, by NumPy on the host and by JAX in the program."""
    names = np.unique(group)
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(len(names)), 1.0).to_event(1))
    (first,) = np.nonzero(group == 0)
    assert len(first) == 20
    assert int(np.max(group)) == 2
    numpyro.sample("y", dist.Normal(mu[group], 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("sampler", ["guide", "nuts"])
def test_shapes_that_are_computed_from_values(sampler):
    mean = np.array([ROWS[g == GROUPS].sum() / 21 for g in range(3)])
    if sampler == "guide":
        guide = nf.AutoFlow(by_group, SMALL)
        draws = nf.fit_guide(KEY, guide, ROWS, GROUPS, progress_bar=False).sample(KEY, (4000,))
    else:
        kernel = nf.FlowNUTS(by_group, SMALL, progress_bar=False)
        mcmc = MCMC(kernel, num_warmup=100, num_samples=1000, progress_bar=False)
        mcmc.run(KEY, ROWS, GROUPS)
        draws = mcmc.get_samples()
    np.testing.assert_allclose(draws["mu"].mean(0), mean, atol=0.04)


def subsampled(y, size=None, batch=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 60, subsample_size=size) as index:
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y[index] if batch is None else batch)


def test_a_guide_of_a_subsampled_model_is_judged_on_all_rows():
    guide = nf.AutoFlow(subsampled, SMALL)
    fitted = nf.fit_guide(KEY, guide, ROWS, 20, num_steps=1500, progress_bar=False)
    assert not fitted.is_noisy
    assert fitted.ess > 0.8
    assert fitted.trusted
    exact = dist.MultivariateNormal(jnp.zeros(60), jnp.eye(60) + 1.0).log_prob(ROWS)
    assert abs(fitted.elbo - exact) < 0.1


def test_a_guide_that_cannot_see_all_rows_is_not_judged():
    guide = nf.AutoFlow(subsampled, SMALL)
    fitted = nf.fit_guide(KEY, guide, ROWS, 20, ROWS[:20], num_steps=100, progress_bar=False)
    assert fitted.is_noisy
    assert not fitted.trusted
    assert fitted.verdict.startswith("not judged: ")
    assert len(fitted.losses) <= 100


def test_numpy_arrays_of_a_closure_indexed_by_a_subsample_are_named():
    def model():
        subsampled(ROWS, 20)

    with pytest.raises(ValueError, match=r"`jnp.asarray\(y\)\[i\]`"):
        nf.fit_guide(KEY, nf.AutoFlow(model, SMALL), progress_bar=False)
