"""Missing values: no call takes the numbers under a mask or in a fill value for data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import new

import numpyro_flows as nf

KEY = jax.random.key(0)
FLOW = new(nf.realnvp, 2, depth=2, hidden=(4,))
CONDITIONAL = new(nf.realnvp, 2, context_dim=1, depth=2, hidden=(4,))
LEVELS = nf.dequantize(FLOW, 8)
GOOD = np.random.default_rng(0).normal(size=(40, 2))
COLUMN = GOOD[:, :1]
COUNTS = np.random.default_rng(0).integers(0, 8, size=(40, 2))


def holed(array):
    """Two rows with a hole, under which is a number that would be seen."""
    mask = np.zeros(array.shape, bool)
    mask[5, 0] = mask[7] = True
    return np.ma.masked_array(np.where(mask, 3, array), mask)


def embedded():
    network = nf.nn.Embedding(KEY, {"dose": jnp.zeros(1)}, 1, hidden=(4,))
    return CONDITIONAL.embed(network)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: nf.fit(KEY, FLOW, holed(GOOD)), "x"),
        (lambda: nf.fit(KEY, FLOW, GOOD, weights=holed(COLUMN)[:, 0]), "weights"),
        (lambda: nf.fit(KEY, CONDITIONAL, GOOD, holed(COLUMN)), "context"),
        (lambda: nf.fit(KEY, embedded(), GOOD, {"dose": holed(COLUMN)}), "context"),
        (lambda: nf.fit(KEY, LEVELS, holed(COUNTS)), "x"),
        (lambda: nf.fit(KEY, nf.cnf(KEY, 2), holed(GOOD), objective=nf.FlowMatching()), "x"),
        (lambda: nf.diagnostics.bits_per_dim(KEY, LEVELS, holed(COUNTS)), "x"),
        (lambda: nf.equalize(FLOW, holed(COUNTS), 8), "x"),
        (lambda: nf.initialize(LEVELS, holed(COUNTS)), "batch"),
        (lambda: nf.initialize(FLOW, holed(GOOD)), "batch"),
        (lambda: FLOW.log_prob(holed(GOOD)), "value"),
        (lambda: LEVELS.log_prob_bound(KEY, holed(COUNTS)), "x"),
        (lambda: CONDITIONAL.condition(holed(COLUMN)), "context"),
        (lambda: FLOW.transform.forward_and_log_det(holed(GOOD)), "input"),
    ],
)
def test_masked_entries_are_refused(call, name):
    with pytest.raises(ValueError, match=rf"{name}: 2 of 40 rows have masked entries"):
        call()


def test_a_mask_that_hides_nothing_is_ignored():
    whole = np.ma.masked_array(GOOD, np.zeros(GOOD.shape, bool))
    a, b = (nf.fit(KEY, FLOW, x, max_epochs=1, progress_bar=False) for x in (whole, GOOD))
    np.testing.assert_array_equal(a.flow.log_prob(GOOD), b.flow.log_prob(GOOD))


# Tables: pandas and xarray, which is no dependency of the package.


def test_tables_are_arrays():
    pandas = pytest.importorskip("pandas")
    settings = {"max_epochs": 1, "progress_bar": False}
    plain = nf.fit(KEY, CONDITIONAL, GOOD, COLUMN, weights=GOOD[:, 0] ** 2, **settings)
    mixed = pandas.DataFrame({"a": GOOD[:, 0], "b": pandas.array(GOOD[:, 1], dtype="Float64")})
    for table in (pandas.DataFrame(GOOD), mixed):
        first = table.iloc[:, 0]
        fitted = nf.fit(KEY, CONDITIONAL, table, table.iloc[:, :1], weights=first**2, **settings)
        np.testing.assert_array_equal(fitted.train_losses, plain.train_losses)
        np.testing.assert_array_equal(FLOW.log_prob(table), FLOW.log_prob(GOOD))
        assert CONDITIONAL.condition(table.iloc[:, :1]).batch_shape == (40,)
    counts = pandas.DataFrame(COUNTS).astype({0: "Int64"})
    fitted = nf.fit(KEY, LEVELS, counts, **settings)
    np.testing.assert_array_equal(
        fitted.train_losses, nf.fit(KEY, LEVELS, COUNTS, **settings).train_losses
    )


def test_tables_that_are_no_numbers():
    pandas = pytest.importorskip("pandas")
    words = pandas.DataFrame({"a": GOOD[:, 0], "b": ["word"] * 40})
    with pytest.raises(TypeError, match="x: expected floating-point numbers, got dtype object"):
        nf.fit(KEY, FLOW, words)
    with pytest.raises(TypeError, match="x: expected floating-point numbers, got dtype int64"):
        nf.fit(KEY, FLOW, pandas.DataFrame(COUNTS).astype({0: "Int64"}))
    with pytest.raises(TypeError, match="value: expected floating-point numbers, got dtype object"):
        FLOW.log_prob(words)


@pytest.mark.parametrize("dtype", [float, "Float64"])
def test_missing_entries_of_pandas(dtype):
    pandas = pytest.importorskip("pandas")
    x = pandas.DataFrame(GOOD).astype({0: dtype})
    x.iloc[[5, 7], 0] = None
    counts = pandas.DataFrame(COUNTS).astype({0: "Int64"})
    counts.iloc[[5, 7], 0] = None
    for call, name in (
        (lambda: nf.fit(KEY, FLOW, x), "x"),
        (lambda: nf.fit(KEY, CONDITIONAL, GOOD, x.iloc[:, :1]), "context"),
        (lambda: nf.fit(KEY, FLOW, GOOD, weights=x[0] ** 2), "weights"),
        (lambda: nf.fit(KEY, LEVELS, counts), "x"),
        (lambda: FLOW.log_prob(x), "value"),
    ):
        with pytest.raises(ValueError, match=f"{name}: 2 of 40 rows have masked entries"):
            call()


@pytest.mark.parametrize("attribute", ["_FillValue", "missing_value"])
def test_fill_values_of_xarray(attribute):
    xarray = pytest.importorskip("xarray")
    x = GOOD.astype(np.float32)
    x[[5, 7], 0] = 1e20
    filled = xarray.DataArray(x, attrs={attribute: np.float32(1e20), "units": "m"})
    with pytest.raises(ValueError, match="x: 2 of 40 rows have masked entries"):
        nf.fit(KEY, FLOW, filled)
    with pytest.raises(ValueError, match="value: 2 of 40 rows have masked entries"):
        FLOW.log_prob(filled)
    counts = xarray.DataArray(COUNTS, attrs={attribute: np.array([6, 7])})
    with pytest.raises(ValueError, match="rows have masked entries"):
        nf.fit(KEY, LEVELS, counts)
    for attributes in ({"units": "m"}, {attribute: np.nan}, {attribute: 1e20}):
        whole = xarray.DataArray(GOOD, attrs=attributes)
        np.testing.assert_array_equal(FLOW.log_prob(whole), FLOW.log_prob(GOOD))
    decoded = xarray.DataArray(np.where(x > 1e19, np.nan, x))
    with pytest.raises(ValueError, match=r"x: 2 of 40 rows \(rows 5, 7\) hold NaN"):
        nf.fit(KEY, FLOW, decoded)
