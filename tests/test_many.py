"""Ensembles: members beside single fits, their mixture beside NumPyro's, and engines."""

import functools
import os
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from fitting import linear, normals
from programs import compiled_programs

import numpyro_flows as nf
from numpyro_flows.training import loop

KEYS = jax.random.split(jax.random.key(3), 3)
GIVEN = {"max_epochs": 4, "batch_size": 16, "learning_rate": 0.02, "progress_bar": False}


def build(key):
    return nf.realnvp(key, 2, depth=2, hidden=(4,))


def single(key, x, **given):
    build_key, fit_key = jax.random.split(key)
    return nf.fit(fit_key, build(build_key), x, **GIVEN | given)


def assert_close(flow, other):
    leaves = (jax.tree.leaves(each.transform) for each in (flow, other))
    for one, two in zip(*leaves, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-11)


def test_members_are_single_fits(x64):
    """Each with early stopping of its own."""
    x, given = normals(70), {"patience": 1, "max_epochs": 6}
    flows = nf.fit_many(KEYS, build, x, **GIVEN | given)
    assert len(flows) == 3
    for i, key in enumerate(KEYS):
        alone = single(key, x, **given)
        epochs = len(alone.train_losses)
        np.testing.assert_allclose(flows.train_losses[i, :epochs], alone.train_losses, rtol=1e-10)
        np.testing.assert_allclose(flows.val_losses[i, :epochs], alone.val_losses, rtol=1e-10)
        assert np.isnan(flows.train_losses[i, epochs:]).all()
        assert flows.best_epochs[i] == alone.best_epoch
        assert_close(flows[i], alone.flow)


def test_one_program_trains_all():
    x = normals(70)
    with compiled_programs() as programs:
        nf.fit_many(jax.random.split(KEYS[0], 5), build, x, **GIVEN)
    assert programs.count("jit(run_many_steps)") == 1
    assert "jit(run_steps)" not in programs
    with compiled_programs() as programs:
        nf.fit_many(jax.random.split(KEYS[1], 5), build, 2 * x, **GIVEN)
    assert "jit(run_many_steps)" not in programs


def test_mixture_is_that_of_numpyro(x64):
    x = normals(70)
    flows = nf.fit_many(KEYS, build, x, **GIVEN)
    mixture = flows.mixture()
    parts = [flows[i] for i in range(3)]
    theirs = dist.MixtureGeneral(dist.Categorical(probs=np.ones(3) / 3), parts)
    np.testing.assert_allclose(mixture.log_prob(x), theirs.log_prob(x), rtol=1e-12)
    draws = mixture.sample(jax.random.key(0), (4000,))
    assert draws.shape == (4000, 2)
    means = [np.asarray(part.sample(jax.random.key(1), (4000,))).mean(0) for part in parts]
    np.testing.assert_allclose(draws.mean(0), np.mean(means, 0), atol=0.08)
    again = jax.jit(lambda mixture: mixture.log_prob(x))(mixture)
    np.testing.assert_allclose(again, mixture.log_prob(x), rtol=1e-12)
    with pytest.raises(IndexError):
        flows[3]


def test_mixture_of_conditional_flows():
    c = normals(70, 1, seed=1)
    flows = nf.fit_many(
        KEYS, functools.partial(nf.realnvp, dim=2, context_dim=1, depth=1), normals(70), c, **GIVEN
    )
    each = [np.asarray(flows[i].condition(c).log_prob(normals(70))) for i in range(3)]
    mean = np.log(np.exp(each).mean(0))
    np.testing.assert_allclose(flows.mixture(c).log_prob(normals(70)), mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", [0, 2])
def test_interrupted_ensemble_continues(at, tmp_path, monkeypatch):
    x, path = normals(70), tmp_path / "many.npz"
    whole = nf.fit_many(KEYS, build, x, **GIVEN)
    run, calls = loop.run_many_steps, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) > at + 1:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("numpyro_flows.training.many.run_many_steps", dying)
        with pytest.raises(KeyboardInterrupt):
            nf.fit_many(KEYS, build, x, checkpoint=path, **GIVEN)
    again = nf.fit_many(KEYS, build, x, checkpoint=path, **GIVEN)
    np.testing.assert_array_equal(again.train_losses, whole.train_losses)
    np.testing.assert_array_equal(again.val_losses, whole.val_losses)
    for one, other in zip(
        jax.tree.leaves(again.flows.transform), jax.tree.leaves(whole.flows.transform), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="belongs to a call with other data"):
        nf.fit_many(KEYS, build, 2 * x, checkpoint=path, **GIVEN)


def test_any_executor(tmp_path):
    """Threads, each member a fit of its own; a folder holds their checkpoints."""
    with ThreadPoolExecutor(1) as executor:
        flows = nf.fit_many(
            KEYS[:2], build, normals(70), executor=executor, checkpoint=tmp_path / "c", **GIVEN
        )
    assert sorted(os.listdir(tmp_path / "c")) == ["member-0.npz", "member-1.npz"]
    np.testing.assert_array_equal(flows.train_losses[1], single(KEYS[1], normals(70)).train_losses)


def dying_once(path, key):
    """The first worker that builds a flow is killed."""
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return build(key)


@pytest.mark.slow
def test_dask_retries_a_member_whose_worker_died(tmp_path):
    distributed = pytest.importorskip("dask.distributed", reason="the engine is not installed")
    recipe = functools.partial(dying_once, tmp_path / "died")
    with (
        distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.upload_file(__file__)
        flows = nf.fit_many(KEYS, recipe, normals(70), executor=client.get_executor(), **GIVEN)
    assert (tmp_path / "died").exists()
    for i, key in enumerate(KEYS):
        np.testing.assert_allclose(
            flows.train_losses[i], single(key, normals(70)).train_losses, rtol=1e-5
        )


def test_bad_input():
    with pytest.raises(TypeError, match=r"keys: expected an array of keys"):
        nf.fit_many(jax.random.key(0), build, normals(70))
    depths = iter([1, 2])
    with pytest.raises(ValueError, match=r"build: expected flows of one structure for all keys"):
        nf.fit_many(KEYS[:2], lambda key: nf.realnvp(key, 2, depth=next(depths)), normals(70))
    with (
        ProcessPoolExecutor(1) as executor,
        pytest.raises(TypeError, match=r"build: expected what the executor can send"),
    ):
        nf.fit_many(KEYS, lambda key: linear(), normals(70), executor=executor)
