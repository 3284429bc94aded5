"""Fits to batches that are read anew in each pass."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fitting import KEY, STILL, assert_same, fit, leaves, linear, normals
from numpyro.distributions import constraints

import numpyro_flows as nf
from numpyro_flows.elementwise import Affine
from numpyro_flows.training.standardize import Running

EPOCHS = {"batch_size": 16, "max_epochs": 20, "learning_rate": 0.03}


class Files:
    """Batches without indices, which count how often they are read."""

    def __init__(self, *batches):
        self.batches, self.passes = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def in_parts(x, *others, num=7):
    parts = zip(*(np.array_split(array, num) for array in (x, *others)), strict=True)
    return [part if others else part[0] for part in parts]


def test_linear_flow_finds_mean_and_covariance(x64):
    """What maximum likelihood has in closed form, from batches as from arrays."""
    x = normals(400) @ [[2.0, 0.5], [0.0, 0.3]] + [3.0, -4.0]
    val = in_parts(x, num=3)
    result = fit(linear(), in_parts(x), val_batches=val, **EPOCHS)
    covariance = np.cov(x.T, bias=True)
    normal = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    assert min(result.val_losses) == pytest.approx(normal, abs=2e-3)
    draws = np.asarray(result.flow.sample(KEY, (20_000,)))
    np.testing.assert_allclose(draws.mean(0), x.mean(0), atol=0.08)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.15)


@pytest.mark.parametrize("kind", ["pairs", "dicts", "files"])
def test_losses_are_those_of_arrays(kind, x64):
    """With an optimiser that moves nothing, all orders of rows have the same losses."""
    x, context = normals(200), normals(200, 3, seed=1)
    weights = np.random.default_rng(2).uniform(0, 2, size=200) * (np.arange(200) % 5 > 0)
    flow = nf.realnvp(KEY, 2, context_dim=3, depth=1, hidden=(4,))
    given = {"max_epochs": 2, "optimizer": STILL, "val_fraction": 0}
    if kind == "dicts":
        parts = in_parts(x, context, weights)
        batches = [dict(zip(("x", "context", "weights"), part, strict=True)) for part in parts]
        whole = fit(flow, x, context, weights=weights, **given)
    else:
        batches = in_parts(x, context)
        batches = Files(*batches) if kind == "files" else batches
        whole = fit(flow, x, context, **given)
    result = fit(flow, batches, **given)
    np.testing.assert_allclose(result.train_losses, whole.train_losses, rtol=1e-10)
    if kind == "files":
        assert batches.passes == 6  # checks, the initial loss, and two epochs with theirs


def test_rows_are_cut_to_the_size_of_a_step(monkeypatch):
    """Each row is seen once in an epoch, whatever the batches are."""
    from numpyro_flows.training import stream

    monkeypatch.setattr(stream, "PIECE", 3)
    rows = np.arange(101.0)
    tables = ({"x": part, "weights": np.ones(len(part))} for part in np.array_split(rows, 4))
    pieces = list(stream._pieces(tables, 8, np.random.default_rng(0)))
    assert [is_row.shape for _, is_row in pieces] == [(3, 8)] * 4 + [(1, 8)]
    seen = np.concatenate([piece["x"][is_row] for piece, is_row in pieces])
    assert sorted(seen) == sorted(rows)
    assert (seen != rows).any()


def test_moments_of_parts_are_those_of_the_whole():
    x = normals(300, 3) * [1.0, 1e-3, 10] + [1e6, 5, -7]
    weights = np.random.default_rng(1).uniform(size=300)
    running = Running()
    for part, weight in in_parts(x, weights, num=11):
        running.add(part, weight)
    loc, scale = running.numbers("x")
    mean = np.average(x, axis=0, weights=weights)
    np.testing.assert_allclose(loc, mean, rtol=1e-6)
    spread = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    np.testing.assert_allclose(scale, spread, rtol=1e-6)


def test_interrupted_run_continues(tmp_path):
    batches, given = in_parts(normals(70)), {"batch_size": 16, "max_epochs": 4}
    whole = fit(linear(), batches, **given)

    class Dies(Files):
        def __iter__(self):
            if self.passes == 4:
                raise KeyboardInterrupt
            return super().__iter__()

    path = tmp_path / "fit.npz"
    with pytest.raises(KeyboardInterrupt):
        fit(linear(), Dies(*batches), checkpoint=path, **given)
    assert path.exists()
    again = fit(linear(), Files(*batches), checkpoint=path, **given)
    assert_same(again, fit(linear(), Files(*batches), **given))
    assert len(leaves(whole)) == len(leaves(again))


def recipe(name):
    """A class of docs/scale.md."""
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if name in block]
    names = {}
    exec(code, names)
    return names[name]


def test_parquet_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet is read by pyarrow")
    from pyarrow import parquet

    x = normals(100)
    table = pyarrow.table({"a": x[:, 0], "b": x[:, 1]})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=30)
    batches = recipe("ParquetBatches")(tmp_path / "x.parquet", ["a", "b"])
    np.testing.assert_array_equal(np.concatenate([*batches]), x)
    assert_same(fit(linear(), [*batches], max_epochs=1), fit(linear(), batches, max_epochs=1))


def test_zarr_arrays(tmp_path):
    zarr = pytest.importorskip("zarr", reason="an optional reader")
    x = normals(100)
    array = zarr.open(str(tmp_path / "x"), mode="w", shape=x.shape, chunks=(30, 2), dtype=x.dtype)
    array[:] = x
    batches = recipe("ZarrBatches")(array)
    np.testing.assert_array_equal(np.concatenate([*batches]), x)
    assert_same(fit(linear(), [*batches], max_epochs=1), fit(linear(), batches, max_epochs=1))


def test_grain_datasets():
    grain = pytest.importorskip("grain", reason="an optional reader")
    x = normals(100)
    batches = grain.MapDataset.source(x).shuffle(seed=0).batch(32)
    result = fit(linear(), batches, max_epochs=1)
    assert_same(result, fit(linear(), [batches[i] for i in range(len(batches))], max_epochs=1))


def bad_batches():
    x, nan, wide = normals(90), normals(90), in_parts(normals(90), num=30)
    nan[[53, 54]] = np.nan
    wide[17] = normals(3, 3)
    yield (part for part in in_parts(x)), TypeError, "can be read again .* got generator"
    yield in_parts(nan, num=30), ValueError, r"batch 17: x: 1 of 3 rows \(row 2\) hold NaN"
    yield wide, ValueError, r"batch 17: x: expected shape \(n, 2\), .* got \(3, 3\)"
    yield Files(), ValueError, "expected batches, got none"
    yield [{"y": x}], ValueError, "batch 0: expected a dict with 'x'"
    yield [(x, x)], ValueError, "batch 0: This flow takes no context"
    yield [np.ones((5, 2))] * 3, ValueError, "columns 0, 1 are constant"
    yield [np.ones((5, 2), int)], TypeError, "batch 0: x: .*float"


@pytest.mark.parametrize(("batches", "error", "text"), [*bad_batches()])
def test_bad_batches(batches, error, text):
    with pytest.raises(error, match=text):
        fit(linear(), batches, max_epochs=1)


def test_arguments_that_batches_hold():
    with pytest.raises(ValueError, match=r"with batches they are parts of these"):
        fit(linear(), in_parts(normals(70)), weights=np.ones(70))
    with pytest.raises(ValueError, match="val_batches: expected none, as x is an array"):
        fit(linear(), normals(70), val_batches=in_parts(normals(70)))


def test_passes_of_other_lengths():
    class Shrinks(Files):
        def __iter__(self):
            return iter(list(super().__iter__())[: -1 if self.passes > 1 else None])

    with pytest.raises(ValueError, match="expected as many rows in each pass, got 70 in the first"):
        fit(linear(), Shrinks(*in_parts(normals(70))), val_fraction=0, max_epochs=1)


def test_integers_in_batches(x64):
    """Standardised by the moments of the levels with uniform noise on them."""
    levels = np.random.default_rng(0).integers([0, 90], [8, 120], size=(3000, 2))
    model = nf.dequantize(nf.realnvp(KEY, 2, depth=1, hidden=(4,)), (8, 120))
    result = fit(model, in_parts(levels), max_epochs=2)
    assert np.isfinite(result.val_losses).all()
    transform = result.flow.flow.transform
    np.testing.assert_allclose(transform.loc.value, levels.mean(0) + 0.5, atol=0.03)
    spread = np.sqrt(levels.var(0) + 1 / 12)
    np.testing.assert_allclose(transform.scale.value, spread, rtol=0.01)
    raw = fit(model, in_parts(levels), max_epochs=1, standardize=False)
    assert type(raw.flow.flow.transform) is type(model.flow.transform)


def mixed():
    support = (constraints.real, constraints.integer_interval(3, 6), constraints.boolean)
    x = np.stack([40 + 9 * normals(200, 1)[:, 0], np.arange(200) % 4 + 3, np.ones(200)], 1)
    return nf.nsf_ar(KEY, 3, support=support, depth=1, hidden=(4,)), x


def sequences():
    network = nf.nn.Embedding(KEY, jnp.zeros((1, 1)), 2, hidden=(4,))
    frame = nf.coupling_flow(KEY, 1, Affine(), context_dim=2, depth=1, hidden=(4,))
    return nf.markov(frame, network, 5), 30 + normals(200, 5)[..., None] * np.arange(1, 6)[:, None]


@pytest.mark.parametrize("made", [mixed, sequences])
def test_columns_that_share_or_keep_units(made, x64, recwarn):
    """Integers keep theirs, frames have one for all times: in batches as in arrays."""
    flow, x = made()
    given = {"max_epochs": 1, "optimizer": STILL, "val_fraction": 0}
    whole, parts = fit(flow, x, **given), fit(flow, in_parts(x), **given)
    np.testing.assert_allclose(parts.train_losses, whole.train_losses, rtol=1e-10)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    transform = parts.flow.transform
    standardized = transform.parts[0] if made is mixed else transform
    x = x if made is mixed else x.reshape(-1, 1)
    loc, scale = x.mean(0), x.std(0)
    if made is mixed:
        loc[1:], scale[1:] = 0, 1
    shape = standardized.loc.value.shape
    np.testing.assert_allclose(standardized.loc.value, np.broadcast_to(loc, shape))
    np.testing.assert_allclose(standardized.scale.value, np.broadcast_to(scale, shape))


def test_one_device_is_a_mesh():
    batches, given = in_parts(normals(70)), {"max_epochs": 2, "batch_size": 16}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    plain, meshed = fit(linear(), batches, **given), fit(linear(), batches, mesh=mesh, **given)
    np.testing.assert_allclose(meshed.val_losses, plain.val_losses, rtol=1e-6)
