"""What the tests of ``nf.fit`` share: a linear flow, and NumPy's figures to compare with."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from numpyro.distributions import biject_to
from scipy import stats

import numpyro_flows as nf

KEY = jax.random.key(0)
STILL = optax.sgd(0.0)  # moves nothing: losses are those of the initial flow, exactly
SMALL = {"depth": 2, "hidden": (8,)}


def fit(flow, x, context=None, *, key=KEY, **settings):
    return nf.fit(key, flow, x, context, **({"progress_bar": False} | settings))


_log_prob = jax.jit(lambda flow, x: flow.log_prob(x))
_sample = jax.jit(lambda flow, n: flow.sample(KEY, (n,)), static_argnums=1)


def log_prob(flow, x):
    return np.asarray(_log_prob(flow, x), float)


def sample(flow, n):
    return np.asarray(_sample(flow, n), float)


class Linear(nf.FlowTransform):
    """x = W (y - b): its fit is the sample mean and covariance. Rows at the marker score NaN."""

    shift: jax.Array
    log_diagonal: jax.Array
    lower: jax.Array
    marker: nf.Fixed
    label: str = eqx.field(static=True)

    def __init__(self, dim, marker=np.inf, label=""):
        self.shift, self.log_diagonal = jnp.zeros(dim), jnp.zeros(dim)
        self.lower = jnp.zeros((dim, dim))
        self.marker = nf.Fixed(jnp.asarray(marker, float))
        self.label = label

    @property
    def event_shape(self):
        return self.shift.shape

    def matrix(self):
        return jnp.tril(self.lower, -1) + jnp.diag(jnp.exp(self.log_diagonal))

    def _forward_and_log_det(self, x, context=None):
        y = x @ jnp.linalg.inv(self.matrix()).T + self.shift
        return y, jnp.broadcast_to(-self.log_diagonal.sum(), x.shape[:-1])

    def _inverse_and_log_det(self, y, context=None):
        spoil = jnp.where(jnp.abs(y[..., 0] - self.marker.value) < 1e-6, jnp.nan, 1.0)
        x = (y - self.shift) @ self.matrix().T
        return x * spoil[..., None], self.log_diagonal.sum() * spoil


def linear(dim=2, support=None, base=None, **fields):
    transform = Linear(dim, **fields)
    if support is not None:
        transform = nf.transforms.Chain(
            [transform, nf.transforms.NumPyroTransform(biject_to(support), (dim,))]
        )
    return nf.FlowDistribution(base or dist.Normal(jnp.zeros(dim), 1.0), transform)


def normals(n, dim=2, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim))


def leaves(fitted):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(fitted.flow.transform)]


def assert_same(a, b):
    """Bitwise the same result."""
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.train_losses, b.train_losses)
    np.testing.assert_array_equal(a.val_losses, b.val_losses)
    assert (a.best_epoch, a.num_skipped) == (b.best_epoch, b.num_skipped)


def numpy_normal_nll(x, weights=None):
    """Mean -log p(x) under independent normals of the sample's own mean and spread."""
    loc = np.average(x, axis=0, weights=weights)
    scale = np.sqrt(np.average((x - loc) ** 2, axis=0, weights=weights))
    return -np.average(stats.norm.logpdf(x, loc, scale).sum(1), weights=weights)
