"""Masked entries are missing values: no call takes the numbers under the mask for data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_flows as nf

KEY = jax.random.key(0)
FLOW = nf.realnvp(KEY, 2, depth=2, hidden=(4,))
CONDITIONAL = nf.realnvp(KEY, 2, context_dim=1, depth=2, hidden=(4,))
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
        (lambda: nf.bits_per_dim(KEY, LEVELS, holed(COUNTS)), "x"),
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
