"""A table of real and discrete columns: an exact mixed flow beside a Gaussian copula.

    python examples/mixed_table.py [--data german.data-numeric] [--folds 5]

The German credit data (UCI Statlog, the numeric form): 1,000 loans, of which duration, amount and
age are continuous, though rounded, which noise undoes for both models, and 22 columns have 2 to 11
levels. They are looked for where ``--data`` says, then in the folder german_credit of
NUMPYRO_FLOWS_DATA or ../shared/data.

Prints held-out log likelihoods, in nats per row, of columns that are independent, of the copula
(correlations by stochastic EM, masses of its boxes by the GHK simulator) and of the flow; then, as
a column to impute, whether the loan was bad: the area under the ROC curve of the flow's exact
conditional, and of a logistic regression that was trained for nothing else.
"""

import argparse
import os
from pathlib import Path

import jax
import numpy as np
import optax
from numpyro.distributions import constraints
from scipy.special import logsumexp, ndtr, ndtri
from scipy.stats import gaussian_kde, norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

import numpyro_flows as nf

KEY = jax.random.key(0)
REAL = [1, 3, 9]  # duration, amount, age
LABEL = 24


def load(path):
    """Rows with noise between the integers of continuous columns; None without the file."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("NUMPYRO_FLOWS_DATA") or beside) / "german_credit"
    path = Path(path or folder / "german.data-numeric")
    if not path.is_file():
        return None
    x = np.loadtxt(path)
    x[:, REAL] = np.log(x[:, REAL] + np.random.default_rng(0).random((len(x), len(REAL))))
    return x


class Copula:
    """Normal scores of each column, correlated; margins are kernel estimates and frequencies."""

    def __init__(self, x, levels, sweeps=60):
        self.real, self.discrete = REAL, [j for j in range(x.shape[1]) if j not in REAL]
        self.kernels = {j: gaussian_kde(x[:, j]) for j in self.real}
        self.edges = {}
        for j in self.discrete:
            counts = 0.5 + (x[:, j, None] == np.arange(levels[j][0], levels[j][1] + 1)).sum(0)
            self.edges[j] = ndtri(np.append(0, np.cumsum(counts / counts.sum()).clip(0, 1))).clip(
                -9, 9
            )
        self.levels, rng = levels, np.random.default_rng(0)
        low, high = self._boxes(x)
        z = np.where(np.isin(np.arange(x.shape[1]), self.real), low, (low + high).clip(-2, 2) / 2)
        kept = []
        for _ in range(sweeps):
            # Too few rows for 25 x 25 correlations: shrunk a little, which also keeps them regular.
            correlation = 0.98 * np.corrcoef(z.T) + 0.02 * np.eye(z.shape[1])
            kept.append(correlation)
            precision = np.linalg.inv(correlation)
            for j in self.discrete:
                others = z @ precision[j] - z[:, j] * precision[j, j]
                mean, scale = -others / precision[j, j], precision[j, j] ** -0.5
                a, b = ndtr((low[:, j] - mean) / scale), ndtr((high[:, j] - mean) / scale)
                u = (a + (b - a) * rng.random(len(z))).clip(1e-12, 1 - 1e-12)
                z[:, j] = (mean + scale * ndtri(u)).clip(low[:, j], high[:, j])
        self.correlation = np.mean(kept[sweeps // 2 :], axis=0)

    def _boxes(self, x):
        """Lower and upper normal scores of each entry, equal where columns are real."""
        low = np.zeros_like(x)
        high = np.zeros_like(x)
        for j in self.real:
            below = [self.kernels[j].integrate_box_1d(-np.inf, value) for value in x[:, j]]
            low[:, j] = high[:, j] = ndtri(np.clip(below, 1e-9, 1 - 1e-9))
        for j in self.discrete:
            cell = (x[:, j] - self.levels[j][0]).astype(int)
            low[:, j], high[:, j] = self.edges[j][cell], self.edges[j][cell + 1]
        return low, high

    def log_prob(self, x, num_samples=1000):
        low, high = self._boxes(x)
        order = self.real + self.discrete
        factor = np.linalg.cholesky(self.correlation[np.ix_(order, order)])
        rng, n = np.random.default_rng(1), len(self.real)
        total = sum(np.log(self.kernels[j](x[:, j])) - norm.logpdf(low[:, j]) for j in self.real)
        noise = np.zeros((num_samples, *x.shape))
        log_weight = np.zeros((num_samples, len(x)))
        for i, j in enumerate(order):
            mean = noise[:, :, :i] @ factor[i, :i]
            if i < n:
                noise[:, :, i] = (low[:, j] - mean) / factor[i, i]
                log_weight += norm.logpdf(noise[:, :, i]) - np.log(factor[i, i])
                continue
            a, b = (ndtr((edge[:, j] - mean) / factor[i, i]) for edge in (low, high))
            log_weight += np.log((b - a).clip(1e-12))
            noise[:, :, i] = ndtri((a + (b - a) * rng.random(a.shape)).clip(1e-12, 1 - 1e-12))
        return total + logsumexp(log_weight, axis=0) - np.log(num_samples)

    def log_prob_of_margins(self, x):
        """Log likelihood as if columns were independent."""
        low, high = self._boxes(x)
        cells = [np.log(ndtr(high[:, j]) - ndtr(low[:, j])) for j in self.discrete]
        return sum(cells) + sum(np.log(self.kernels[j](x[:, j])) for j in self.real)


def fit_flow(x, levels, key):
    support = [
        constraints.real if j in REAL else constraints.integer_interval(*levels[j])
        for j in range(x.shape[1])
    ]
    # Linear logits, as there are few rows; the biases, which are the margins, do not decay.
    flow = jax.jit(
        lambda key: nf.nsf_ar(key, x.shape[1], support=support, hidden=(), depth=2, num_bins=4)
    )(key)
    optimizer = optax.adamw(1e-2, weight_decay=0.3, mask=is_weight)
    return nf.fit(
        key,
        flow,
        x,
        optimizer=optimizer,
        batch_size=64,
        max_epochs=100,
        patience=8,
        progress_bar=False,
    ).flow


def is_weight(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="the file german.data-numeric")
    parser.add_argument("--folds", type=int, default=5)
    options = parser.parse_args()
    x = load(options.data)
    if x is None:
        print("No German credit data found: set NUMPYRO_FLOWS_DATA, or pass --data.")
        return
    levels = [(int(a), int(b)) for a, b in zip(x.min(0), x.max(0), strict=True)]
    scores = {"independent columns": [], "Gaussian copula": [], "mixed flow": []}
    chance = {"conditional of the flow": [], "logistic regression": []}
    truth = []
    for train, test in KFold(options.folds, shuffle=True, random_state=0).split(x):
        copula, flow = Copula(x[train], levels), fit_flow(x[train], levels, KEY)
        rows = x[test].astype(np.float32)
        scores["independent columns"].append(copula.log_prob_of_margins(x[test]))
        scores["Gaussian copula"].append(copula.log_prob(x[test]))
        scores["mixed flow"].append(np.asarray(jax.jit(flow.log_prob)(rows)))
        bad = jax.jit(lambda rows, flow=flow: flow.conditional_log_masses(rows, LABEL)[:, 1])(rows)
        chance["conditional of the flow"].append(np.exp(bad))
        scaler = StandardScaler().fit(x[train, :LABEL])
        regression = LogisticRegression(C=0.1, max_iter=1000)
        regression.fit(scaler.transform(x[train, :LABEL]), x[train, LABEL])
        chance["logistic regression"].append(
            regression.predict_proba(scaler.transform(x[test, :LABEL]))[:, 1]
        )
        truth.append(x[test, LABEL] == levels[LABEL][1])
    for name, values in scores.items():
        values = np.concatenate(values)
        error = values.std() / len(values) ** 0.5
        print(f"{name:24} log likelihood {values.mean():7.2f} +- {error:.2f}")
    for name, values in chance.items():
        area = roc_auc_score(np.concatenate(truth), np.concatenate(values))
        print(f"{name:24} area under the curve {area:.3f}")
    draws = np.asarray(jax.jit(lambda key: flow.sample(key, (1000,)))(KEY))
    typed = all(
        np.isin(draws[:, j], np.arange(a, b + 1)).all()
        for j, (a, b) in enumerate(levels)
        if j not in REAL
    )
    print(f"draws keep the levels of all discrete columns: {typed}")


if __name__ == "__main__":
    main()
