"""Models that a guide over one unconstrained space cannot follow are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, init_to_uniform, init_to_value

import numpyro_flows as nf

KEY = jax.random.key(0)


def local():
    with numpyro.plate("rows", 6, subsample_size=2):
        numpyro.sample("z", dist.Normal(0.0, 1.0))


def two_sizes():
    with numpyro.plate("rows", 2):
        numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 3):
        numpyro.sample("b", dist.Normal(0.0, 1.0))


def point_mass():
    numpyro.sample("a", dist.Delta(1.0))
    numpyro.sample("b", dist.Normal(0.0, 1.0))


def pair():
    with numpyro.plate("rows", 2):
        numpyro.sample("a", dist.Normal(0.0, 1.0))


REFUSED = {
    "local": (local, None, r"'z' is latent in the subsampled plate 'rows' \(2 of 6 rows\)"),
    "two sizes": (
        two_sizes,
        None,
        "'rows' around site 'b' has size 3 at dim -1, and elsewhere size 2",
    ),
    "point mass": (point_mass, None, "'a' is latent and a point mass"),
    "start": (pair, {"a": np.zeros(3)}, r"'a' has values of shape \(2,\).* of shape \(3,\)"),
    "start of all rows": (local, {"z": np.zeros(6)}, r"'z' has values of shape \(2,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_guide_cannot_follow_is_named(case):
    model, values, message = REFUSED[case]
    strategy = init_to_uniform if values is None else init_to_value(values=values)
    guide = nf.AutoFlow(model, init_loc_fn=strategy)
    with pytest.raises(ValueError, match=message):
        nf.fit_guide(KEY, guide, progress_bar=False)
    kernel = nf.FlowNUTS(model, init_strategy=strategy, progress_bar=False)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=2, progress_bar=False)
    with pytest.raises(ValueError, match=message):
        mcmc.run(KEY)


def test_a_missing_plate_is_warned_of():
    def model():
        with numpyro.plate("rows", 3, dim=-2):
            numpyro.sample("z", dist.Normal(jnp.zeros((3, 2)), 1.0))

    with pytest.warns(UserWarning, match="Missing a plate statement"):
        nf.AutoFlow(model).set_up(KEY, (), {})
