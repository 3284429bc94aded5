"""FlowNUTS given starts and settings that are wrong."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from kernels import KEY, SMALL, Y, hierarchical, run, shaken
from numpyro.infer import NUTS

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
    numpyro.sample("k", dist.Poisson(0.5))


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
            "Site 'k' is discrete and latent, and Poisson has no finite list",
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


def mixture(y):
    weight = numpyro.sample("weight", dist.Beta(2.0, 2.0))
    means = numpyro.sample("means", dist.Normal(jnp.array([-2.0, 2.0]), 1.0).to_event(1))
    with numpyro.plate("row", len(y)):
        which = numpyro.sample("which", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(means[which], 1.0), obs=y)
    numpyro.deterministic("gap", means[1] - means[0])


def test_discrete_sites_are_summed_out():
    pytest.importorskip("funsor")
    y = np.array([-2.2, -1.7, 1.5, 2.4, 2.6, 1.9], np.float32)

    def exact(weight, means):  # what enumeration makes of it, by hand
        each = dist.MixtureSameFamily(
            dist.Categorical(jnp.array([1 - weight, weight])), dist.Normal(means, 1.0)
        )
        return each.log_prob(y).sum()

    def summed():
        weight = numpyro.sample("weight", dist.Beta(2.0, 2.0))
        means = numpyro.sample("means", dist.Normal(jnp.array([-2.0, 2.0]), 1.0).to_event(1))
        numpyro.factor("y", exact(weight, means))

    kernel = nf.FlowNUTS(mixture, SMALL, progress_bar=False)
    draws = run(kernel, y, num_samples=2000).get_samples()
    assert set(draws) == {"weight", "means", "gap"}
    expected = run(NUTS(summed), num_samples=2000).get_samples()
    for name in ("weight", "means"):
        one, other = draws[name], expected[name]
        np.testing.assert_allclose(
            one.mean(0), other.mean(0), atol=0.15 * float(other.std(0).max())
        )
        np.testing.assert_allclose(one.std(0), other.std(0), rtol=0.15)
    gap = draws["means"][:, 1] - draws["means"][:, 0]
    np.testing.assert_allclose(draws["gap"], gap, rtol=1e-5)


def counted(y):
    """A loop whose length depends on a value: it has no reverse mode."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    total, _ = jax.lax.while_loop(
        lambda carry: carry[1] < 3, lambda carry: (carry[0] + x, carry[1] + 1), (0.0, 0)
    )
    numpyro.sample("y", dist.Normal(total, 1.0), obs=y)


def test_forward_mode():
    """x ~ N(0, 1), y ~ N(3 x, 1): the posterior is N(0.3 y, 0.1)."""
    with pytest.raises(ValueError, match="[Rr]everse"):
        run(nf.FlowNUTS(counted, SMALL), 2.0)
    kernel = nf.FlowNUTS(counted, SMALL, forward_mode_differentiation=True)
    draws = run(kernel, 2.0).get_samples()["x"]
    assert draws.mean() == pytest.approx(0.6, abs=0.05)
    assert draws.std() == pytest.approx(0.1**0.5, rel=0.1)
