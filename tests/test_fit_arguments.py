"""What users get wrong in a call of `fit`, and what they are told."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from compiled import new
from fitting import (
    KEY,
    SMALL,
    Linear,
    fit,
    linear,
)
from numpyro.distributions import biject_to, constraints

import numpyro_flows as nf


def conditional():
    return new(nf.realnvp, 2, context_dim=1, **SMALL)


def positive():
    return linear(support=constraints.positive)


def interval():
    return linear(support=constraints.interval(0.0, 2.0))


def simplex():
    return linear(support=constraints.simplex)


def changed(values, dim=2, n=30):
    """Rows in (0.1, 1.9), with some replaced."""
    x = np.random.default_rng(0).uniform(0.1, 1.9, (n, dim))
    for row, value in values.items():
        x[row] = value
    return x


GOOD = changed({})
SHARES = changed({}, dim=3) / changed({}, dim=3).sum(1, keepdims=True)


def weights(values):
    result = np.ones(30)
    for row, value in values.items():
        result[row] = value
    return {"weights": result}


BAD = {
    "integers": (linear, lambda: GOOD.astype(int), {}, TypeError, r"x: .*dtype int.*astype"),
    "objects": (linear, lambda: GOOD.astype(object), {}, TypeError, "got dtype object"),
    "nan": (
        linear,
        lambda: changed({4: np.nan, 17: np.inf}),
        {},
        ValueError,
        r"x: 2 of 30 rows \(rows 4, 17\) hold NaN .*; drop or impute",
    ),
    "one nan": (linear, lambda: changed({4: np.nan}), {}, ValueError, r"1 of 30 rows \(row 4\)"),
    "many nan": (
        linear,
        lambda: changed(dict.fromkeys(range(15), np.nan)),
        {},
        ValueError,
        r"15 of 30 rows \(rows 0, .*, 9, \.\.\.\)",
    ),
    "beyond float32": (
        linear,
        lambda: changed({4: 1e39}),
        {},
        ValueError,
        r"\(row 4\) hold NaN or values that are infinite in float32",
    ),
    "width": (
        linear,
        lambda: changed({}, dim=3),
        {},
        ValueError,
        r"x: expected shape \(n, 2\), .*got \(30, 3\)",
    ),
    "one axis": (linear, lambda: GOOD[:, 0], {}, ValueError, r"shape \(n, 2\).*got \(30,\)"),
    "one row as a vector": (linear, lambda: GOOD[0], {}, ValueError, r"\(n, 2\).*got \(2,\)"),
    "three axes": (linear, lambda: GOOD[None], {}, ValueError, r"\(n, 2\).*got \(1, 30, 2\)"),
    "scalar data": (
        lambda: linear(1),
        lambda: GOOD[:, 0],
        {},
        ValueError,
        r"expected shape \(n, 1\), .*got \(30,\)\. .*x\[:, None\]",
    ),
    "a number": (linear, lambda: 1.5, {}, ValueError, r"\(n, 2\).*got \(\)"),
    "empty": (linear, lambda: GOOD[:0], {}, ValueError, "at least 2 rows, got 0"),
    "one row": (linear, lambda: GOOD[:1], {}, ValueError, "at least 2 rows, got 1"),
    "no context": (
        conditional,
        lambda: GOOD,
        {},
        ValueError,
        r"this flow is conditional; pass `context=` of shape \(30, 1\)",
    ),
    "surplus context": (
        linear,
        lambda: GOOD,
        {"context": GOOD},
        ValueError,
        r"takes no context, got one of shape \(30, 2\).*context_dim",
    ),
    "context rows": (
        conditional,
        lambda: GOOD,
        {"context": GOOD[:20, :1]},
        ValueError,
        r"context: expected shape \(30, 1\), one row per row of x, got \(20, 1\)",
    ),
    "context width": (
        conditional,
        lambda: GOOD,
        {"context": GOOD},
        ValueError,
        r"context: expected shape \(30, 1\), .*got \(30, 2\)",
    ),
    "context axis": (
        conditional,
        lambda: GOOD,
        {"context": GOOD[:, 0]},
        ValueError,
        r"expected shape \(30, 1\), .*got \(30,\)\. .*context\[:, None\]",
    ),
    "context number": (conditional, lambda: GOOD, {"context": 1.0}, ValueError, r"got \(\)"),
    "context nan": (
        conditional,
        lambda: GOOD,
        {"context": changed({5: np.nan})[:, :1]},
        ValueError,
        r"context: 1 of 30 rows \(row 5\) hold NaN",
    ),
    "context integers": (
        conditional,
        lambda: GOOD,
        {"context": np.arange(30)[:, None]},
        TypeError,
        "context: expected floating-point",
    ),
    "constant context": (
        conditional,
        lambda: GOOD,
        {"context": np.full((30, 1), 2000.1)},
        ValueError,
        "context: column 0 is constant .*nothing can be learned from it; drop it",
    ),
    "negative weights": (
        linear,
        lambda: GOOD,
        weights({3: -1.0}),
        ValueError,
        r"weights: expected non-negative numbers, got 1 of 30 rows \(row 3\) below 0; 0 leaves",
    ),
    "nan weights": (
        linear,
        lambda: GOOD,
        weights({3: np.nan}),
        ValueError,
        r"weights: .*\(row 3\) hold NaN",
    ),
    "infinite weights": (linear, lambda: GOOD, weights({3: np.inf}), ValueError, "infinite"),
    "number of weights": (
        linear,
        lambda: GOOD,
        {"weights": np.ones(29)},
        ValueError,
        r"weights: expected shape \(30,\), one number per row of x, got \(29,\)",
    ),
    "column of weights": (
        linear,
        lambda: GOOD,
        {"weights": np.ones((30, 1))},
        ValueError,
        r"weights: expected shape \(30,\), .*got \(30, 1\)",
    ),
    "zero weights": (
        linear,
        lambda: GOOD,
        {"weights": np.zeros(30)},
        ValueError,
        "weights: expected at least 2 positive ones, got 0",
    ),
    "one weight": (
        linear,
        lambda: GOOD,
        {"weights": np.eye(30)[0]},
        ValueError,
        "at least 2 positive ones, got 1",
    ),
    "outside": (
        positive,
        lambda: changed({2: -1.0, 8: -0.1}),
        {},
        ValueError,
        r"2 of 30 rows \(rows 2, 8\) lie outside .*Positive.*; drop them or .*support=",
    ),
    "outside the interval": (interval, lambda: changed({2: 2.5}), {}, ValueError, "row 2.*outside"),
    "shares that do not add up": (
        simplex,
        lambda: changed({}, dim=3),
        {},
        ValueError,
        "30 of 30 rows .* lie outside .*Simplex",
    ),
    "boundary": (
        interval,
        lambda: changed({2: 0.0, 8: 2.0}),
        weights({0: 0.0}),
        ValueError,
        r"2 of 30 rows \(rows 2, 8\) lie on the boundary of the support.*move them inside",
    ),
    "first share 0": (
        simplex,
        lambda: np.concatenate([SHARES, [[0.0, 0.5, 0.5]]]),
        {},
        ValueError,
        r"\(row 30\) lie on the boundary",
    ),
    "last share 0": (
        simplex,
        lambda: np.concatenate([SHARES, [[0.5, 0.5, 0.0]]]),
        {},
        ValueError,
        r"\(row 30\) lie on the boundary",
    ),
    "constant column": (
        linear,
        lambda: changed({}) * [1, 0] + [0, 0.1],
        {},
        ValueError,
        "x: column 1 is constant .*density is not bounded there; drop it or add noise",
    ),
    "constant but for rounding": (
        linear,
        lambda: 1e6 + 1e-3 * GOOD,
        {},
        ValueError,
        "columns 0, 1 are constant to the precision of float32",
    ),
    "constant where the weight is": (
        linear,
        lambda: np.where(np.arange(30)[:, None] < 10, GOOD, [[1.0, 0.0]] * GOOD + [[0.0, 1.0]]),
        {"weights": (np.arange(30) >= 10).astype(float)},
        ValueError,
        "column 1 is constant",
    ),
    "constant in the support": (
        positive,
        lambda: changed({}) * [1, 0] + [0, 0.1],
        {},
        ValueError,
        "column 1 is constant",
    ),
    "val_fraction 1": (
        linear,
        lambda: GOOD,
        {"val_fraction": 1.0},
        ValueError,
        r"val_fraction: expected a number in \[0, 1\), got 1.0",
    ),
    "negative val_fraction": (linear, lambda: GOOD, {"val_fraction": -0.1}, ValueError, "-0.1"),
    "nan val_fraction": (linear, lambda: GOOD, {"val_fraction": np.nan}, ValueError, "got nan"),
    "clip_norm": (linear, lambda: GOOD, {"clip_norm": 0.0}, ValueError, "clip_norm: .*got 0"),
    **{
        f"{name} {value}": (linear, lambda: GOOD, {name: value}, error, f"{name}: .*got {value}")
        for name in ("batch_size", "max_epochs", "patience")
        for value, error in ((0, ValueError), (2.5, TypeError))
    },
    "int key": (linear, lambda: GOOD, {"key": 0}, TypeError, r"jax\.random\.key\(0\)"),
    "several keys": (linear, lambda: GOOD, {"key": jax.random.split(KEY)}, TypeError, "single"),
    "conditioned": (
        lambda: conditional().condition(GOOD[:, :1]),
        lambda: GOOD,
        {},
        ValueError,
        r"flow: .*batch_shape=\(30,\).*Pass the conditional flow itself and `context=`",
    ),
    "conditioned on one": (
        lambda: conditional().condition(GOOD[0, :1]),
        lambda: GOOD,
        {},
        ValueError,
        "no bound context, .*Pass the conditional flow itself and `context=`",
    ),
    "a transform": (lambda: Linear(2), lambda: GOOD, {}, TypeError, "FlowDistribution, got Linear"),
    "a recipe": (lambda: nf.realnvp, lambda: GOOD, {}, TypeError, "FlowDistribution, got function"),
    "only a support": (
        lambda: nf.FlowDistribution(dist.Normal(), biject_to(constraints.positive)),
        lambda: GOOD[:, 0],
        {},
        ValueError,
        "flow: it has no parameters to train .*recipe",
    ),
    "nothing to train": (
        lambda: nf.FlowDistribution(
            dist.Normal(jnp.zeros(2), 1.0),
            nf.transforms.Standardized(
                nf.transforms.NumPyroTransform(biject_to(constraints.real), (2,)), 0.0, 1.0
            ),
        ),
        lambda: GOOD,
        {},
        ValueError,
        "flow: it has no parameters to train .*recipe",
    ),
    "support that cannot be standardised": (
        lambda: nf.FlowDistribution(dist.Normal(jnp.zeros(2), 1.0), OntoPositive(2)),
        lambda: GOOD,
        {},
        ValueError,
        "OntoPositive onto the real numbers, .*standardize=False",
    ),
}


class OntoPositive(Linear):
    @property
    def codomain(self):
        return constraints.independent(constraints.positive, 1)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    flow, x, settings, error, message = BAD[name]
    flow, x = flow(), x()
    with pytest.raises(error, match=message):
        fit(flow, x, **settings)


def test_constant_column_of_many_rows(x64):
    """The mean of many equal numbers is not that number, by more than a few units of rounding."""
    x = np.stack([np.random.default_rng(0).normal(size=500_000), np.full(500_000, 0.1)], -1)
    with pytest.raises(ValueError, match="column 1 is constant"):
        fit(linear(), x)
