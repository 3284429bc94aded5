"""What ``infer/_numpyro.py`` takes from NumPyro's private parts is there, and is what it was."""

import warnings

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

from numpyro_flows.infer import _numpyro


def model():
    numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", 6, subsample_size=2), handlers.mask(mask=jnp.array([True, False])):
        numpyro.sample("z", dist.LogNormal(0.0, 1.0))


def full():
    with numpyro.plate("n", 3):
        numpyro.sample("z", dist.LogNormal(0.0, 1.0))
    numpyro.deterministic("twice", 2.0)


def traced(model):
    return handlers.trace(handlers.seed(model, 0)).get_trace()


def numpyros_own(model):
    guide = AutoNormal(model)
    handlers.seed(guide, 0)()
    return guide


def test_a_guide_that_adopts_a_trace_is_as_one_that_numpyro_set_up():
    own, adopted = numpyros_own(full), AutoNormal(full)
    _numpyro.adopt(adopted, traced(full))
    names = ("_prototype_frames", "_prototype_frame_full_sizes")
    for name in names:
        assert getattr(adopted, name) == getattr(own, name)
    assert adopted.prototype_trace.keys() == own.prototype_trace.keys()


def test_masks():
    assert _numpyro.mask_of(traced(model)["z"]["fn"]).tolist() == [True, False]
    assert _numpyro.mask_of(dist.Normal(0.0, 1.0)) is True
    assert _numpyro.mask_of(dist.Normal(0.0, 1.0).mask(False)) is False


def test_a_continuous_guide_unpacks_its_latent_vector():
    guide = AutoDiagonalNormal(full)
    handlers.seed(guide, 0)()
    latent = jnp.arange(3.0)
    assert _numpyro.unpack(guide, latent)["z"].tolist() == [0.0, 1.0, 2.0]
    params = {"auto_loc": latent, "auto_scale": jnp.ones(3)}
    sites = _numpyro.sites_of(guide, latent, params)
    assert sites["z"].tolist() == jnp.exp(latent).tolist()
    assert float(sites["twice"]) == 2.0


def test_numpyro_warns_of_missing_plates():
    def missing():
        with numpyro.plate("n", 3, dim=-2):
            numpyro.sample("z", dist.Normal(jnp.zeros((3, 2)), 1.0))

    with pytest.warns(UserWarning, match="Missing a plate statement"):
        _numpyro.warn_of_missing_plates(traced(missing))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _numpyro.warn_of_missing_plates(traced(full))
