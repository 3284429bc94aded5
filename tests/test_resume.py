"""Guides whose training is interrupted, by an exception and by SIGKILL, and goes on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.autoguide import AutoNormal

import numpyro_flows as nf
from numpyro_flows.training import checkpoint

KEY = jax.random.key(0)
Y = np.array([0.5, -1.0, 2.0])


def model(y):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.5))
    x = numpyro.sample("x", dist.Normal(0.0, scale).expand([3]).to_event(1))
    numpyro.sample("y", dist.StudentT(2.0, x, 0.5).to_event(1), obs=y)


def small(key, dim):
    return nf.realnvp(key, dim, depth=2, hidden=(8,))


GUIDES = {"flow": lambda: nf.AutoFlow(model, small), "numpyro": lambda: AutoNormal(model)}


def fit(kind, path=None, y=Y, **settings):
    given = {"num_steps": 500, "num_particles": 16, "num_draws": 500, "progress_bar": False}
    return nf.fit_guide(KEY, GUIDES[kind](), y, checkpoint=path, **given | settings)


def numbers(fitted):
    figures = [fitted.elbo, fitted.ess, fitted.khat]
    return [fitted.losses, figures, *map(np.asarray, jax.tree.leaves(fitted.params))]


def assert_same(one, other):
    for a, b in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", GUIDES)
def test_interrupted_guide_continues(kind, tmp_path, monkeypatch):
    path, savez, calls = tmp_path / "guide.npz", np.savez, []
    whole = fit(kind)

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        savez(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.np, "savez", dying)
        with pytest.raises(KeyboardInterrupt):
            fit(kind, path)
    assert_same(fit(kind, path), whole)
    # One that has ended is judged again, and trains no more.
    assert_same(fit(kind, path), whole)
    assert len(calls) == 3
    for other in ({"y": Y + 1}, {"num_steps": 600}, {"target_ess": 0.9}):
        with pytest.raises(ValueError, match="belongs to a call with other data, settings, key"):
            fit(kind, path, **other)


@pytest.mark.slow
def test_killed_guide_continues(tmp_path):
    """Killed at random moments, each time a little further on."""
    path, done = tmp_path / "guide.npz", tmp_path / "done.npz"
    here = Path(__file__).parent
    script = (
        f"import numpy as np, test_resume as t; f = t.fit('flow', {str(path)!r}); "
        f"np.savez({str(done)!r}, *t.numbers(f))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parent)))}
    rng, kills = np.random.default_rng(int(time.time())), 0
    while not done.exists():
        process = subprocess.Popen([sys.executable, "-c", script], env=env)
        if kills == 20:
            assert process.wait() == 0
            break
        begun = path.stat().st_mtime_ns if path.exists() else 0
        while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > begun):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        kills += 1
    with np.load(done) as file:
        for name, expected in zip(file.files, numbers(fit("flow")), strict=True):
            np.testing.assert_array_equal(file[name], expected)
