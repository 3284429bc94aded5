"""Costs of scale: a mesh of one device, ensembles in one program, and batches from disk.

``python benchmarks/scale.py mesh|many|disk`` prints one figure each; see docs/scale.md. Times are
taken after compilation, in turns, and the median of the ratios is reported; those of ``disk`` hold
the compilation.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax

import numpyro_flows as nf

KEY = jax.random.key(0)
#: One object, so that a second fit compiles nothing.
OPTIMIZER = optax.adam(1e-3)
SETTINGS = {"optimizer": OPTIMIZER, "progress_bar": False, "patience": 1000}


def seconds(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def ratio(call, other, times=7):
    """Median of the times of one call in those of another, made in turns."""
    call(), other()
    return np.median([seconds(call) / seconds(other) for _ in range(times)])


def mesh():
    """Per-step overhead of ``mesh=`` with one device."""
    x = np.random.default_rng(0).normal(size=(100_000, 4))
    flow, one = nf.realnvp(KEY, 4), jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))

    def fit(epochs, mesh=None):
        given = {"max_epochs": epochs, "batch_size": 1000, "val_fraction": 0.01}
        return lambda: nf.fit(KEY, flow, x, mesh=mesh, **SETTINGS | given)

    # Differences of two lengths leave out what comes before the first step.
    fits = [fit(epochs, mesh) for mesh in (None, one) for epochs in (1, 4)]
    for call in fits:
        call()
    times = np.array([[seconds(call) for call in fits] for _ in range(7)])
    plain, meshed = times[:, 1] - times[:, 0], times[:, 3] - times[:, 2]
    print(f"mesh of one device: steps take {np.median(meshed / plain):.3f} of those without")


def many(members=32):
    """``fit_many`` beside as many single fits, both compiled."""
    x = np.random.default_rng(0).normal(size=(2000, 4))
    keys = jax.random.split(KEY, members)
    given = SETTINGS | {"max_epochs": 20, "batch_size": 256}

    def singles():
        for key in keys:
            build_key, fit_key = jax.random.split(key)
            nf.fit(fit_key, nf.realnvp(build_key, 4), x, **given)

    def together():
        nf.fit_many(keys, lambda key: nf.realnvp(key, 4), x, **given)

    print(f"{members} members: {ratio(together, singles, 3):.3f} of the time of single fits")


class Files:
    """Arrays on disk, each read anew."""

    def __init__(self, folder, num, rows):
        self.paths = [Path(folder) / f"{i}.npy" for i in range(num)]
        for i, path in enumerate(self.paths):
            np.save(path, np.random.default_rng(i).normal(size=(rows, 16)).astype("float32"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return np.load(self.paths[i])


def disk(megabytes="64 256 1024"):
    """Peak resident memory, and throughput beside arrays, for growing data."""
    flow = nf.realnvp(KEY, 16, depth=4, hidden=(32,))
    given = SETTINGS | {"max_epochs": 1, "batch_size": 4096, "val_fraction": 0.0}
    rows = 1 << 17  # of 8 MB
    for size in map(int, megabytes.split()):
        with tempfile.TemporaryDirectory() as folder:
            files = Files(folder, size // 8, rows)
            begin = time.perf_counter()
            nf.fit(KEY, flow, files, val_batches=[files[0][:4096]], **given)
            once = time.perf_counter() - begin
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{size} MB on disk: {once:.1f} s, peak resident memory {peak:.0f} MB", flush=True)


if __name__ == "__main__":
    {"mesh": mesh, "many": many, "disk": disk}[sys.argv[1]](*sys.argv[2:])
