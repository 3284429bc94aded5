"""Fits over several devices and processes, beside those of one device."""

import jax
import numpy as np
import pytest
from fitting import KEY, linear, normals
from meshes import difference, regression, run

import numpyro_flows as nf
from numpyro_flows.training import processes

#: What reductions in another order may change in float64.
SAME = 1e-9
ONE = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))


def test_eight_devices_fit_as_one():
    """The last batch is ragged, and eight devices do not divide the validation rows."""
    differences = run("compare_fits", "realnvp", ["explicit"], True, devices=8)
    assert max(differences) < SAME


def test_gradients_are_reduced_once():
    """No other collective is in the program: rows stay where they are."""
    num_params, found = run("collectives", devices=8)
    assert found == [["all-reduce", f"f64[{num_params + 2}]{{0}}"]]


@pytest.mark.slow
def test_mesh_of_two_axes_fits_as_one():
    assert max(run("compare_fits", "realnvp", ["two axes"], devices=8)) < SAME


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nsf", "maf", "glow", "cnf", "matching"])
@pytest.mark.parametrize("with_extras", [False, True])
def test_eight_devices_fit_all_flows_as_one(name, with_extras):
    if with_extras and name in ("glow", "matching"):
        pytest.skip("its data have no context here")
    assert max(run("compare_fits", name, ["explicit"], with_extras, devices=8)) < SAME


@pytest.mark.slow
@pytest.mark.parametrize("name", ["realnvp", "nsf", "maf", "glow", "cnf"])
def test_two_processes_fit_as_one_device(name):
    with_extras = name == "realnvp"
    whole = run("fit", name, "none", with_extras)
    two = run("fit", name, "auto", with_extras, devices=2, processes=2)
    assert difference(whole, two) < SAME


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["here", "split"])
def test_eight_devices_fit_a_guide_as_one(rows):
    cases = [("explicit", rows, "realnvp"), ("two axes", rows, "realnvp"), ("auto", rows, "cnf")]
    assert max(run("compare_guides", cases, devices=8)) < SAME


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["here", "split"])
def test_two_processes_fit_a_guide_as_one_device(rows):
    whole = run("fit_guide", "none")
    assert difference(whole, run("fit_guide", "auto", rows, devices=2, processes=2)) < SAME


@pytest.mark.slow
def test_processes_with_other_rows_are_told():
    for error in run("fit_unevenly", devices=1, processes=2, fails=True):
        assert "expected as many rows on each process" in error
        assert "process 0 has float64 (100, 4); process 1 has float64 (90, 4)" in error


def test_one_device_is_a_mesh():
    """Rows are handed out in the order of no mesh."""
    x, settings = normals(50), {"batch_size": 16, "max_epochs": 3, "progress_bar": False}
    plain = nf.fit(KEY, linear(), x, **settings)
    meshed = nf.fit(KEY, linear(), x, mesh=ONE, **settings)
    np.testing.assert_allclose(meshed.train_losses, plain.train_losses, rtol=1e-6)
    np.testing.assert_allclose(meshed.val_losses, plain.val_losses, rtol=1e-6)


def test_meshes_that_are_none():
    with pytest.raises(TypeError, match=r"mesh: expected a `jax.sharding.Mesh` .*, got int"):
        nf.fit(KEY, linear(), normals(50), mesh=8)
    model, x, y = regression()
    with pytest.raises(ValueError, match=r"mesh: particles are split for an `nf.AutoFlow`"):
        nf.fit_guide(KEY, nf.AutoFlow(model), x, y, elbo=nf.STL_ELBO(8), mesh=ONE)


def test_batches_that_no_mesh_splits():
    errors = run("refusals", devices=8)
    assert errors == [
        "batch_size: 100 cannot be split evenly over the 8 devices of the mesh's first axis "
        "'rows'. Take a multiple, such as 104.",
        "num_particles: 12 cannot be split evenly over the 8 devices of the mesh's first axis "
        "'rows'. Take a multiple, such as 16.",
    ]


def test_one_process_shares_with_itself():
    assert processes.shared(b"content") == b"content"
    assert processes.rows_of_all(rows := [np.ones(3)]) is rows
