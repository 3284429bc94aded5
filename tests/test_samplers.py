"""Samplers of other libraries on a learned map."""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    """examples/mclmc.py as a module."""
    pytest.importorskip("blackjax", reason="a sampler of BlackJAX: the extra `samplers`")
    spec = importlib.util.spec_from_file_location("mclmc", EXAMPLES / "mclmc.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES))  # its helpers lie beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


@pytest.mark.slow
def test_adjusted_mclmc_as_a_kernel(example):
    """A conjugate posterior: theta ~ N(2 y / 3, 1 / 3) for each of two rows, precisions 1 and 2."""

    def model(y):
        with numpyro.plate("row", 2):
            theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
            numpyro.deterministic("twice", 2 * theta)
            numpyro.sample("y", dist.Normal(theta, 0.5**0.5), obs=y)

    y = np.array([30.0, -3.0], np.float32)
    kernel = example.AdjustedMCLMC(model)
    options = {"num_chains": 4, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=300, num_samples=2000, **options)
    mcmc.run(jax.random.key(0), y, extra_fields=["acceptance"])
    sites = mcmc.get_samples(group_by_chain=True)
    draws = sites["theta"]
    np.testing.assert_allclose(sites["twice"], 2 * draws, rtol=1e-6)
    assert draws.shape == (4, 2000, 2)
    assert mcmc.get_extra_fields()["acceptance"].mean() > 0.8
    flat = np.asarray(draws).reshape(-1, 2)
    np.testing.assert_allclose(flat.mean(0), 2 * y / 3, atol=0.05)
    np.testing.assert_allclose(flat.std(0), 3**-0.5, rtol=0.05)
    np.testing.assert_allclose(np.corrcoef(flat.T)[0, 1], 0.0, atol=0.1)
