"""Fits that are interrupted and go on, and files that belong to another."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from compiled import new
from fitting import (
    KEY,
    SMALL,
    STILL,
    assert_same,
    fit,
    linear,
    normals,
)
from numpyro.distributions import constraints

import numpyro_flows as nf
from numpyro_flows.training import checkpoint, loop


def interrupt(monkeypatch, after):
    """Writing the checkpoint of the epoch after ``after`` dies in the middle of the file."""
    savez, calls = np.savez, []

    def dying(file, *args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            file.write(b"half a file")
            raise KeyboardInterrupt
        savez(file, *args, **kwargs)

    monkeypatch.setattr(checkpoint.np, "savez", dying)


CHECKPOINT = {"max_epochs": 6, "batch_size": 16, "learning_rate": 0.01}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fit.npz"


OPTIMIZERS = {
    "default": lambda: None,
    # Its state holds a random key and bfloat16 numbers.
    "noisy": lambda: optax.chain(
        optax.add_noise(0.1, 0.5, 0), optax.adam(0.01, mu_dtype=jnp.bfloat16)
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_interrupted_run_continues(optimizer, path, monkeypatch):
    def build():
        return nf.realnvp(KEY, 2, **SMALL) if optimizer == "default" else linear()

    x, flow = normals(70), build()
    settings = CHECKPOINT | {"optimizer": OPTIMIZERS[optimizer]()}
    whole = fit(flow, x, **settings)
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            fit(flow, x, checkpoint=path, **settings)
    assert os.listdir(path.parent) == [path.name]
    # From another flow of the same initial weights, as another process would have it.
    flow = build()
    assert_same(fit(flow, x, checkpoint=str(path), **settings), whole)
    assert os.listdir(path.parent) == [path.name]

    def trains(*_, **__):
        pytest.fail("a finished run trains again")

    monkeypatch.setattr(loop, "run_steps", trains)
    assert_same(fit(flow, x, checkpoint=path, **settings), whole)


def test_skipped_steps_and_patience_survive(path, monkeypatch):
    x = normals(70)
    settings = CHECKPOINT | {"standardize": False, "patience": 3, "optimizer": STILL}
    for row in range(10):
        flow = linear(marker=x[row, 0])
        with pytest.warns(RuntimeWarning):
            whole = fit(flow, x, **settings)
        if whole.num_skipped:  # else the row was held out
            break
    assert (len(whole.train_losses), whole.best_epoch, whole.num_skipped) == (3, 0, 3)
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        with pytest.raises(KeyboardInterrupt):
            fit(flow, x, checkpoint=path, **settings)
    with pytest.warns(RuntimeWarning, match="3 steps"):
        assert_same(fit(flow, x, checkpoint=path, **settings), whole)


def awkward_flow(name):
    """NumPyro orders the numbers of such a base and the parts of an augmented flow by hash."""
    if name == "base":
        base = dist.StudentT(np.array([5.0, 6.0]), np.zeros(2), np.ones(2))
        return linear(base=base, support=constraints.interval(-9.0, 9.0))
    encoder = new(nf.realnvp, 1, context_dim=2, **SMALL)
    return nf.AugmentedFlow(KEY, new(nf.realnvp, 3, **SMALL), encoder, num_samples=2)


def fit_awkward(name, path, stop=None):
    """Returns in the middle if asked to."""
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None:
            interrupt(patch, stop)
        return fit(awkward_flow(name), normals(70), checkpoint=path, **CHECKPOINT)


@pytest.mark.parametrize("name", ["base", pytest.param("augmented", marks=pytest.mark.slow)])
def test_another_process_continues(name, path):
    """The order of sets, and so of NumPyro's numbers, differs between processes."""
    script = f"import test_checkpoint; test_checkpoint.fit_awkward({name!r}, {str(path)!r}, 2)"
    here = pathlib.Path(__file__).parent
    search = os.pathsep.join(map(str, (here, here.parent)))
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": search}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr
    assert path.exists()
    assert_same(fit_awkward(name, path), fit_awkward(name, None))


def test_checkpoint_of_another_call(path):
    x = normals(40)
    settings = CHECKPOINT | {"max_epochs": 1, "checkpoint": path}
    fit(linear(), x, **settings)
    before = path.read_bytes()
    activations = [new(nf.realnvp, 2, activation=a, **SMALL) for a in ("relu", "tanh")]
    others = {
        "data": lambda: fit(linear(), x + 1e-3, **settings),
        "data in other units": lambda: fit(linear(), 2 * x, **settings),
        "fewer rows": lambda: fit(linear(), x[:-1], **settings),
        "weights": lambda: fit(linear(), x, weights=np.arange(1.0, 41.0), **settings),
        "key": lambda: fit(linear(), x, key=jax.random.key(1), **settings),
        "epochs": lambda: fit(linear(), x, **settings | {"max_epochs": 2}),
        "batch size": lambda: fit(linear(), x, **settings | {"batch_size": 8}),
        "rate": lambda: fit(linear(), x, **settings | {"learning_rate": 0.02}),
        "optimiser": lambda: fit(linear(), x, optimizer=optax.rmsprop(0.01), **settings),
        "standardisation": lambda: fit(linear(), x, standardize=False, **settings),
        "static field": lambda: fit(linear(label="other"), x, **settings),
        "base": lambda: fit(linear(base=dist.Laplace(jnp.zeros(2), 1.0)), x, **settings),
        "flow": lambda: fit(activations[0], x, **settings),
    }
    for name, call in others.items():
        with pytest.raises(ValueError, match="other data, settings, key or flow. Delete it"):
            pytest.fail(f"accepted: {name}, {call()}")
    assert path.read_bytes() == before
    path.unlink()
    fit(activations[0], x, optimizer=STILL, **settings)
    with pytest.raises(ValueError, match="other data, settings, key or flow"):
        fit(activations[1], x, optimizer=STILL, **settings)


def foreign_files(whole, path):
    yield b""
    yield b"notes of somebody"
    yield whole[: len(whole) // 2]
    yield whole[:-1]
    yield b"\x80\x04]\x94."  # a pickle
    np.save(path.with_suffix(".npy"), np.ones(3))
    yield path.with_suffix(".npy").read_bytes()
    for meta in (np.ones(3), np.array("[]"), np.array("{}"), np.array("{")):
        np.savez(path.with_suffix(".other.npz"), meta=meta)
        yield path.with_suffix(".other.npz").read_bytes()


def test_damaged_and_foreign_files(path, tmp_path):
    x = normals(40)
    settings = {"max_epochs": 1, "optimizer": optax.adam(0.01), "checkpoint": path}
    fit(linear(), x, **settings)
    for content in foreign_files(path.read_bytes(), tmp_path / "foreign"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected a whole file .* damaged or foreign"):
            fit(linear(), x, **settings)
        assert path.read_bytes() == content  # it may be dear to somebody
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="damaged or foreign"):
        fit(linear(), x, **settings)


def test_flipped_bits_are_refused_or_harmless(path):
    x = normals(40)
    settings = {"max_epochs": 1, "optimizer": optax.adam(0.01), "checkpoint": path}
    whole_result = fit(linear(), x, **settings)
    whole = path.read_bytes()
    refused = 0
    for i in range(0, len(whole), 37):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        try:
            result = fit(linear(), x, **settings)
        except ValueError:
            refused += 1
        else:
            assert_same(result, whole_result)
    assert refused > 60


def test_checkpoint_in_no_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*; create it first"):
        fit(linear(), normals(40), checkpoint=tmp_path / "missing" / "fit.npz")
