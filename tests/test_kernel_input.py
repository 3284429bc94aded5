"""FlowNUTS given starts and settings that are wrong."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from kernels import KEY, SMALL, Y, hierarchical, run, shaken

import numpyro_flows as nf

START = {
    "theta": jnp.arange(4.0),
    "pair": jnp.ones((2, 2)),
    "narrow": -0.5,
    "flat": jnp.array([0.5, 1.5]),
}


@pytest.fixture(scope="module")
def kernel():
    return shaken(nf.FlowNUTS(hierarchical, SMALL), Y)


def test_starts_of_deterministic_sites_are_ignored(kernel):
    state = kernel.init(KEY, 100, START | {"total": 0.0}, (Y,), {})
    np.testing.assert_allclose(state.z["theta"], START["theta"], atol=1e-4)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (START | {"thta": 0.0}, r"no site 'thta'; its latent sites are \['flat', 'narrow'"),
        ({"theta": jnp.arange(4.0)}, "no value for site '(pair|narrow|flat)'"),
        (START | {"theta": jnp.ones(3)}, r"shape \(4,\) for site 'theta'.*got \(3,\)"),
    ],
)
def test_bad_starts_name_the_site(kernel, start, message):
    with pytest.raises(ValueError, match=message):
        kernel.init(KEY, 100, start, (Y,), {})


def test_starts_of_several_chains_need_their_axis(kernel):
    message = r"init_params: expected shape \(2, \d.*number of chains first"
    with pytest.raises(ValueError, match=message):
        kernel.init(jax.random.split(KEY), 100, START, (Y,), {})


def discrete():
    numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("k", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nf.FlowNUTS(3), TypeError, "model: expected a NumPyro model, got int"),
        (lambda: nf.FlowNUTS(hierarchical, 3), TypeError, "flow: expected a function"),
        (lambda: nf.FlowNUTS(hierarchical, train="x"), ValueError, "train: expected one of"),
        (
            lambda: nf.FlowNUTS(hierarchical, num_steps=0),
            ValueError,
            "num_steps: expected at least",
        ),
        (lambda: nf.FlowNUTS(hierarchical, jump_every=-1), ValueError, "jump_every: expected"),
        (
            lambda: nf.FlowNUTS(hierarchical, target_accept_prob=1.5),
            ValueError,
            "target_accept_prob: expected a number in",
        ),
        (
            lambda: run(nf.FlowNUTS(discrete)),
            ValueError,
            "site 'k' is discrete and latent",
        ),
        (
            lambda: run(nf.FlowNUTS(lambda: None)),
            ValueError,
            "FlowNUTS: the model has no latent sites",
        ),
        (
            lambda: nf.FlowNUTS(hierarchical).init(KEY, 5, None, (Y,), {}),
            ValueError,
            "num_warmup of at least 20",
        ),
        (
            lambda: run(nf.FlowNUTS(hierarchical, partial(nf.cnf, trace="hutchinson")), Y),
            ValueError,
            "stochastic trace",
        ),
        (
            lambda: jax.jit(lambda y: run(nf.FlowNUTS(hierarchical), y).get_samples())(Y),
            ValueError,
            "arguments are being traced",
        ),
        (lambda: nf.FlowNUTS(hierarchical).report(), ValueError, "nothing was learned yet"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
