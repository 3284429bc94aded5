"""A fitted flow fitted again: one standardisation, with the numbers of the new data."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from compiled import new
from fitting import (
    SMALL,
    STILL,
    Linear,
    fit,
    leaves,
    linear,
    log_prob,
    normals,
    numpy_normal_nll,
)
from numpyro.distributions import biject_to, constraints
from scipy import stats

import numpyro_flows as nf


def count_standardized(flow):
    return str(jax.tree.structure(flow.transform)).count("Standardized")


@pytest.mark.parametrize("support", [None, constraints.positive])
def test_refit(support):
    old, new = np.exp(0.1 * normals(40)), 7 * np.exp(0.5 * normals(40, seed=1))
    settings = {"optimizer": optax.sgd(0.1), "max_epochs": 1, "val_fraction": 0.0}
    first = fit(linear(support=support), old, **settings)
    assert count_standardized(first.flow) == 1

    def parts(fitted):
        transform = fitted.flow.transform
        return transform if support is None else transform.parts[0]

    def log(x):
        return x if support is None else np.log(x)

    settings |= {"optimizer": STILL}
    again = fit(first.flow, new, **settings)
    assert count_standardized(again.flow) == 1
    np.testing.assert_allclose(parts(again).loc.value, log(new).mean(0), rtol=1e-4)
    np.testing.assert_allclose(parts(again).scale.value, log(new).std(0), rtol=1e-4)
    np.testing.assert_array_equal(
        parts(again).transform.log_diagonal, parts(first).transform.log_diagonal
    )

    kept = fit(first.flow, new, standardize=False, **settings)
    assert count_standardized(kept.flow) == 1
    for a, b in zip(leaves(kept), leaves(first), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(kept.train_losses, [-np.mean(log_prob(first.flow, new))], rtol=1e-4)


def test_refit_conditional():
    context, flow = 1e3 * normals(40, 1, seed=1), new(nf.realnvp, 2, context_dim=1, **SMALL)
    settings = {"optimizer": STILL, "max_epochs": 1}
    first = fit(flow, 3 * normals(40), context, **settings)
    again = fit(first.flow, normals(40), context + 500, **settings)
    assert count_standardized(again.flow) == 1
    parts = again.flow.transform
    np.testing.assert_allclose(parts.context_loc.value, context.mean(0) + 500, rtol=1e-5)
    kept = fit(first.flow, normals(40), context + 500, standardize=False, **settings)
    for a, b in zip(leaves(kept), leaves(first), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_standardisation():
    x = normals(40)
    fitted = fit(linear(), x, standardize=False, optimizer=STILL, max_epochs=1, val_fraction=0.0)
    assert count_standardized(fitted.flow) == 0
    expected = -stats.norm.logpdf(x).sum(1).mean()
    np.testing.assert_allclose(fitted.train_losses, [expected], rtol=1e-5)


def test_support_in_a_nested_chain():
    exp = nf.transforms.NumPyroTransform(biject_to(constraints.positive), (2,))
    shift = nf.transforms.NumPyroTransform(dist.transforms.AffineTransform(5.0, 2.0), (2,))
    transform = nf.transforms.Chain([nf.transforms.Chain([Linear(2), exp]), shift])
    flow = nf.FlowDistribution(dist.Normal(jnp.zeros(2), 1.0), transform)
    y = normals(40)
    fitted = fit(flow, 5 + 2 * np.exp(y), optimizer=STILL, max_epochs=1, val_fraction=0.0)
    expected = numpy_normal_nll(y) + y.sum(1).mean() + 2 * np.log(2)
    np.testing.assert_allclose(fitted.train_losses, [expected], rtol=1e-4)
