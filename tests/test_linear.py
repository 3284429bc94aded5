"""Linear transforms against dense matrices, ActNorm and initialisation against NumPy's moments."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.linalg
from cases import CASES
from numpyro.distributions import constraints
from small import points, stacked

import numpyro_flows as nf
from numpyro_flows.elementwise import Affine
from numpyro_flows.transforms import compose

DIM = 4
LINEAR = {
    "permutation": lambda: nf.transforms.Permutation((2, 0, 3, 1)),
    "diagonal": lambda: nf.transforms.DiagonalScale(DIM),
    "triangular": lambda: nf.transforms.TriangularAffine(DIM),
    "lu": lambda: nf.transforms.LULinear(DIM),
    "lu without bias": lambda: nf.transforms.LULinear(DIM, bias=False),
    "householder": lambda: nf.transforms.Householder(jax.random.key(0), DIM),
    "two reflections": lambda: nf.transforms.Householder(jax.random.key(0), DIM, num_reflections=2),
    "cayley": lambda: nf.transforms.Orthogonal(DIM),
    "expm": lambda: nf.transforms.Orthogonal(DIM, method="expm"),
    "actnorm": lambda: nf.transforms.ActNorm(DIM),
}
NEW_IDENTITIES = [name for name in LINEAR if name != "permutation"]


def moved(tree, scale=0.3):
    """The tree off the identity; by NumPy, so that there is nothing to compile."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            np.asarray(leaf) + scale * rng.normal(size=leaf.shape), leaf.dtype
        ),
        tree,
    )


@jax.jit
def forward(transform, x):
    return transform.forward_and_log_det(x)


@jax.jit
def both_ways(transform, value):
    return transform.forward_and_log_det(value), transform.inverse_and_log_det(value)


def strictly_lower(values):
    matrix = np.zeros((DIM, DIM))
    position = 0
    for i in range(DIM):
        for j in range(i):
            matrix[i, j] = values[position]
            position += 1
    return matrix


def dense(name, t):
    """W and b assembled from the leaves, by NumPy and SciPy alone."""
    eye = np.eye(DIM)
    leaf = {k: np.asarray(v, float) for k, v in vars(t).items() if isinstance(v, jax.Array)}
    if name == "permutation":
        return eye[[2, 0, 3, 1]], 0.0
    if name in ("diagonal", "actnorm"):
        return np.diag(np.exp(leaf["log_scale"])), leaf.get("shift", 0.0)
    if name == "triangular":
        return strictly_lower(leaf["below"]) + np.diag(np.exp(leaf["log_diag"])), leaf["bias"]
    if name.startswith("lu"):
        upper = strictly_lower(leaf["upper"]).T + np.diag(np.exp(leaf["log_diag"]))
        return (strictly_lower(leaf["lower"]) + eye) @ upper, leaf.get("bias", 0.0)
    if "vectors" in leaf:
        reflections = [eye - 2 * np.outer(v, v) / (v @ v) for v in leaf["vectors"]]
        return functools.reduce(np.matmul, reflections), 0.0
    skew = strictly_lower(leaf["skew"])
    skew = skew - skew.T
    if name == "expm":
        return scipy.linalg.expm(skew), 0.0
    return (eye + skew / 2) @ np.linalg.inv(eye - skew / 2), 0.0


@pytest.mark.parametrize("name", LINEAR)
def test_dense_matrix(name, x64):
    t, x = moved(LINEAR[name](), 1.0), points(DIM)
    matrix, bias = dense(name, t)
    (y, log_det), (z, inverse_log_det) = both_ways(t, x)
    np.testing.assert_allclose(y, x @ matrix.T + bias, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(z, np.linalg.solve(matrix, (x - bias).T).T, rtol=1e-9, atol=1e-9)
    expected = np.full(len(x), np.linalg.slogdet(matrix).logabsdet)
    np.testing.assert_allclose(log_det, expected, atol=1e-12)
    np.testing.assert_allclose(inverse_log_det, -expected, atol=1e-12)
    if name in ("householder", "two reflections", "cayley", "expm"):
        q = np.asarray(both_ways(t, jnp.eye(DIM))[0][0]).T
        np.testing.assert_allclose(q.T @ q, np.eye(DIM), atol=1e-13)
        assert np.linalg.det(q) == pytest.approx(1)
        assert np.abs(q - np.eye(DIM)).max() > 0.1


@pytest.mark.parametrize("name", NEW_IDENTITIES)
def test_starts_as_the_identity(name, x64):
    x = points(DIM)
    for out, log_det in both_ways(LINEAR[name](), x):
        np.testing.assert_allclose(out, x, atol=1e-15)
        np.testing.assert_array_equal(log_det, 0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nf.transforms.Permutation([0]),
        lambda: nf.transforms.TriangularAffine(1),
        lambda: nf.transforms.LULinear(1),
        lambda: nf.transforms.Householder(jax.random.key(0), 1),
        lambda: nf.transforms.Orthogonal(1),
        lambda: nf.transforms.Orthogonal(1, method="expm"),
    ],
)
def test_one_dimension(build):
    for out, log_det in both_ways(build(), points(1)):
        np.testing.assert_allclose(out, points(1), atol=1e-6)
        np.testing.assert_array_equal(log_det, np.zeros(6))


def test_no_rows():
    for name in ("lu", "householder"):
        (y, log_det), (z, _) = both_ways(LINEAR[name](), jnp.zeros((0, DIM)))
        assert y.shape == z.shape == (0, DIM)
        assert log_det.shape == (0,)


@jax.jit
def values_and_gradient(t, x):
    def cubes(t):
        y = t(x)
        return (y**3).sum(), y

    return jax.grad(cubes, has_aux=True)(t)[::-1]


def test_householder_with_vectors_of_any_length():
    t, x = LINEAR["householder"](), points(DIM)
    base = np.asarray(jax.random.normal(jax.random.key(3), (4, DIM)))

    def judge(vectors, reflectors):
        changed = eqx.tree_at(lambda t: t.vectors, t, jnp.asarray(vectors))
        y, gradient = values_and_gradient(changed, x)
        reflections = [np.eye(DIM) - 2 * np.outer(v, v) / (v @ v) for v in reflectors]
        np.testing.assert_allclose(y, x @ functools.reduce(np.matmul, reflections).T, atol=1e-5)
        assert np.isfinite(gradient.vectors).all()

    judge(base * np.float32([[1e-30], [1e30], [1e-25], [1.0]]), base)
    # A vector of zeros is no reflection.
    judge(base * np.float32([[1], [0], [1], [1]]), base[[0, 2, 3]])


def test_new_householder_can_learn():
    """Pairs of equal reflections are no stationary point: they can turn against each other."""
    _, gradient = values_and_gradient(LINEAR["householder"](), points(DIM))
    assert np.abs(gradient.vectors).max() > 0.01


@pytest.mark.parametrize("method", ["cayley", "expm"])
def test_large_rotations_stay_orthogonal(method):
    t = moved(nf.transforms.Orthogonal(8, method=method), 30.0)
    q = np.asarray(jax.jit(t)(jnp.eye(8)), float)
    np.testing.assert_allclose(q.T @ q, np.eye(8), atol=1e-4)


PERMUTATIONS = [(1, 2, 0), (2, 1, 0), (0, 1, 2)]


@functools.cache
def new_glow():
    """Layers of ActNorm, LULinear and Coupling, stacked, with permutations between."""

    def step(key):
        return nf.transforms.Chain(
            [
                nf.transforms.ActNorm(3),
                nf.transforms.LULinear(3),
                nf.transforms.Coupling(key, 3, Affine(), hidden=(8,)),
            ]
        )

    return nf.transforms.Scan(stacked(step), PERMUTATIONS)


def unstacked(scan):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], scan.layers) for i in range(3)]


def test_layers_in_a_scan_equal_the_loop():
    x = points(3)
    np.testing.assert_allclose(forward(new_glow(), x)[0], x[:, [0, 2, 1]], atol=1e-6)
    scan = moved(new_glow())
    y, log_det = forward(scan, x)
    expected, total = x, 0.0
    for layer, permutation in zip(unstacked(scan), PERMUTATIONS, strict=True):
        expected, log_det_i = forward(layer, expected)
        expected, total = expected[:, permutation], total + log_det_i
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(log_det, total, atol=1e-5)


def test_few_large_layers_run_unrolled(monkeypatch):
    x, scan = points(3), moved(new_glow())

    def unrolled(method):
        program = jax.make_jaxpr(lambda t, x: method(t, x))(scan, x)
        return [eqn.params["unroll"] for eqn in program.eqns if eqn.primitive.name == "scan"]

    forward_of, inverse_of = (
        nf.transforms.Scan.forward_and_log_det,
        nf.transforms.Scan.inverse_and_log_det,
    )
    looped = jax.jit(forward_of)(scan, x)
    assert unrolled(forward_of) == [1]
    monkeypatch.setattr(compose, "LARGE", 1)
    assert unrolled(forward_of) == [3]
    assert unrolled(inverse_of) == [1]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5),
        looped,
        jax.jit(lambda *args: forward_of(*args))(scan, x),
    )
    monkeypatch.setattr(compose, "FEW", 2)
    assert unrolled(forward_of) == [1]


def test_scan_without_permutations():
    layers = moved(stacked(lambda key: nf.transforms.ActNorm(2)))
    scan = nf.transforms.Scan(layers)
    x = points(2)
    y, log_det = scan.forward_and_log_det(x)
    expected = np.asarray(x, float)
    for scale, shift in zip(np.exp(layers.log_scale), layers.shift, strict=True):
        expected = expected * scale + shift
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    np.testing.assert_allclose(log_det, np.full(6, np.sum(layers.log_scale)), rtol=1e-5)

    def program(scan):
        return jax.jit(lambda t, x: t.inverse_and_log_det(x)).lower(scan, x).as_text()

    assert "gather" not in program(scan)
    assert "gather" in program(nf.transforms.Scan(layers, [[1, 0]] * 3))


def test_scan_errors():
    with pytest.raises(ValueError, match="got 0 leaves without one"):
        nf.transforms.Scan(nf.transforms.Permutation([1, 0]))
    with pytest.raises(ValueError, match="number of layers: expected at least 1, got 0"):
        nf.transforms.Scan(
            jax.tree.map(lambda leaf: leaf[:0], stacked(lambda key: nf.transforms.ActNorm(2)))
        )
    with pytest.raises(ValueError, match="leading axis of 3 layers, got a leaf of shape"):
        nf.transforms.Scan(
            nf.transforms.Chain(
                [stacked(lambda key: nf.transforms.ActNorm(2)), nf.transforms.ActNorm(2)]
            )
        )
    with pytest.raises(ValueError, match=r"permutations of range\(2\)"):
        nf.transforms.Scan(stacked(lambda key: nf.transforms.ActNorm((2, 2))), [[0, 2]] * 3)


def test_argument_errors():
    for bad in ([0, 0, 2], [1, 2, 3], [], [0.5, 1]):
        with pytest.raises(ValueError, match=r"expected a permutation of range\(\d\), got \("):
            nf.transforms.Permutation(bad)
    with pytest.raises(ValueError, match=r"expected an even number, got 3\..*determinant -1"):
        nf.transforms.Householder(jax.random.key(0), 3, num_reflections=3)
    with pytest.raises(ValueError, match="num_reflections: expected at least 2, got 0"):
        nf.transforms.Householder(jax.random.key(0), 3, num_reflections=0)
    with pytest.raises(TypeError, match="random key"):
        nf.transforms.Householder(0, 3)
    with pytest.raises(ValueError, match="expected 'cayley' or 'expm', got 'qr'"):
        nf.transforms.Orthogonal(3, method="qr")
    with pytest.raises(ValueError, match="at least one axis"):
        nf.transforms.ActNorm(())
    with pytest.raises(ValueError, match="shape: expected at least 1, got 0"):
        nf.transforms.ActNorm((2, 0))
    for build in (nf.transforms.TriangularAffine, nf.transforms.LULinear, nf.transforms.Orthogonal):
        with pytest.raises(ValueError, match="dim: expected at least 1, got 0"):
            build(0)


@pytest.mark.parametrize("name", [*LINEAR, "image", "scan without permutations"])
def test_save_and_load(name, tmp_path):
    others = {
        "image": lambda: CASES[nf.transforms.ActNorm]["image"]()[0],
        "scan without permutations": lambda: CASES[nf.transforms.Scan]["no permutations"]()[0],
    }
    t = others[name]() if name in others else moved(LINEAR[name](), 1.0)
    nf.save(tmp_path / "flow", t)
    loaded = nf.load(tmp_path / "flow")
    assert jax.tree.structure(loaded) == jax.tree.structure(t)
    assert loaded.eq(t)


# initialize


def skewed(n=200, dim=3, seed=5):
    """Rows of unequal means and spreads, correlated and not normal."""
    z = points(dim, n, seed)
    return jnp.asarray(np.exp(z / 2) @ np.triu(np.ones((dim, dim))) * 10.0 ** np.arange(dim) + 5)


def moments(values):
    values = np.asarray(values, float)
    axes = tuple(range(values.ndim - 1))
    return values.mean(axes), values.std(axes)


def assert_normalized(values, atol=2e-4):
    for got, expected in zip(moments(values), (0.0, 1.0), strict=True):
        np.testing.assert_allclose(got, np.full_like(got, expected), atol=atol)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)])
def test_one_layer_in_both_directions(shape):
    batch = skewed().reshape(-1, *shape)
    loc, scale = moments(batch)
    t = nf.initialize(nf.transforms.ActNorm(shape), batch)
    np.testing.assert_allclose(t.shift, loc, rtol=1e-5)
    np.testing.assert_allclose(np.exp(t.log_scale), scale, rtol=1e-4)
    assert_normalized(t.inv(batch))
    inverse = nf.initialize(nf.transforms.ActNorm(shape).inv, batch)
    np.testing.assert_allclose(inverse.transform.shift, -loc / scale, rtol=1e-4)
    np.testing.assert_allclose(np.exp(inverse.transform.log_scale), 1 / scale, rtol=1e-4)
    assert_normalized(inverse.inv(batch))
    log_det = t.inverse_and_log_det(batch)[1]
    expected = -np.prod(shape[:-1]) * np.log(scale).sum()
    np.testing.assert_allclose(log_det, np.full(len(batch), expected), rtol=1e-4)


def test_flow_of_layers_against_a_loop():
    """Scan of ActNorm, LU and coupling under a support: each ActNorm in it has done its work."""
    support = nf.transforms.NumPyroTransform(dist.biject_to(constraints.positive), (3,))
    t = nf.transforms.Chain([moved(new_glow()), support])
    before = nf.FlowDistribution(dist.Normal(jnp.zeros(3), 1.0), t)
    batch = skewed()
    after = jax.jit(nf.initialize)(before, batch)
    assert isinstance(after, nf.FlowDistribution)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    value = np.log(batch)
    for layer, permutation in zip(
        reversed(unstacked(after.transform.parts[0])), reversed(PERMUTATIONS), strict=True
    ):
        norm, *rest = layer.parts
        value = forward(nf.transforms.Chain(rest).inv, value[:, np.argsort(permutation)])[0]
        np.testing.assert_allclose(norm.shift, moments(value)[0], rtol=1e-3, atol=1e-4)
        value = (value - norm.shift) * np.exp(-norm.log_scale)
        assert_normalized(value, atol=1e-3)

    # All else is what it was, and a second call changes nothing.
    def forget(flow):
        fields = {"log_scale": 0.0, "shift": 0.0}
        return [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(flow.transform)
            if getattr(path[-1], "name", None) not in fields
        ]

    for a, b in zip(forget(before), forget(after), strict=True):
        np.testing.assert_array_equal(a, b)
    again = nf.initialize(after, batch)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_scan_run_forward():
    """Inside an Inverse the batch goes through the scan from the first layer to the last."""
    layers = stacked(
        lambda key: nf.transforms.Chain([nf.transforms.LULinear(3), nf.transforms.ActNorm(3)])
    )
    scan = moved(nf.transforms.Scan(layers, [(1, 2, 0)] * 3))
    after = nf.initialize(scan.inv, skewed()).transform
    value = skewed()
    for layer in unstacked(after):
        value = forward(layer, value)[0]
        assert_normalized(value, atol=1e-3)
        value = value[:, (1, 2, 0)]


@functools.cache
def conditional():
    layer = moved(
        nf.transforms.Coupling(jax.random.key(0), 3, Affine(), hidden=(8,), context_dim=2)
    )
    return nf.transforms.Chain([nf.transforms.ActNorm(3), layer, nf.transforms.ActNorm(3)])


@pytest.mark.parametrize("wrapped", ["argument", "bound", "one for all", "standardized", "inverse"])
def test_nested(wrapped):
    context = jax.random.normal(jax.random.key(7), (200, 2))
    t, batch = conditional(), skewed()
    if wrapped == "one for all":
        context = context[0]
    if wrapped in ("standardized", "inverse"):
        t = nf.transforms.Standardized(t, 2.0, jnp.array([1.0, 2.0, 3.0]), 1.0, 2.0)
    if wrapped == "inverse":
        t = t.inv
    if wrapped == "bound":
        after = nf.initialize(nf.transforms.Conditioned(t, context), batch)
        np.testing.assert_array_equal(after.context.value, context)
    else:
        after = nf.transforms.Conditioned(nf.initialize(t, batch, context), context)
    if wrapped != "inverse":
        # The part next to the base comes last, so its output is the base's sample.
        assert_normalized(after.inv(batch), atol=1e-3)
        return
    # Data enter forward: standardised by nothing, and normalised before the affine part.
    value = after.inv(batch)
    assert_normalized((value - 2.0) / jnp.array([1.0, 2.0, 3.0]), atol=1e-3)


def test_constant_columns_and_extreme_units():
    n = 50
    noise = points(4, n)
    columns = [
        jnp.full(n, 1e3),
        jnp.zeros(n),
        1e30 * (1 + 0.1 * noise[:, 2]),
        1e-30 * noise[:, 3],
    ]
    batch = jnp.stack(columns, -1)
    t = nf.initialize(nf.transforms.ActNorm(4), batch)
    np.testing.assert_array_equal(t.log_scale[:2], 0)
    z = t.inv(batch)
    np.testing.assert_array_equal(z[:, :2], 0)
    assert_normalized(z[:, 2:])


def test_many_rows_far_from_zero():
    batch = 1e3 + points(2, 100_000)
    assert_normalized(nf.initialize(nf.transforms.ActNorm(2), batch).inv(batch), atol=1e-3)


def test_dtypes(x64):
    """Leaves keep their dtype whatever the batch comes in."""
    t = nf.transforms.Scan(stacked(lambda key: nf.transforms.ActNorm(3)))
    batch = np.asarray(skewed(), np.float32)
    for dtype in (jnp.float32, jnp.float64):
        after = nf.initialize(jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), t), batch)
        assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(dtype)}


def test_initialize_reads_a_context_of_any_structure():
    example = {"dose": jnp.zeros(()), "curve": jnp.zeros(2)}
    network = nf.nn.Embedding(jax.random.key(0), example, 2, hidden=(4,))
    t = nf.transforms.Embedded(conditional(), network)
    keys = jax.random.split(jax.random.key(7))
    context = {
        "dose": jax.random.normal(keys[0], (200,)),
        "curve": jax.random.normal(keys[1], (200, 2)),
    }
    after = nf.transforms.Conditioned(nf.initialize(t, skewed(), context), context)
    assert_normalized(after.inv(skewed()), atol=1e-3)
    with pytest.raises(ValueError, match="context: expected 200 rows"):
        nf.initialize(t, skewed(), jax.tree.map(lambda a: a[:5], context))


def test_initialize_errors():
    t, batch = nf.transforms.ActNorm(3), skewed()
    with pytest.raises(TypeError, match="expected a FlowDistribution or a FlowTransform, got Norm"):
        nf.initialize(dist.Normal(), batch)
    with pytest.raises(TypeError, match="batch: expected floating-point"):
        nf.initialize(t, np.ones((4, 3), int))
    for shape in ((3,), (4, 2), (4, 4, 3), ()):
        with pytest.raises(ValueError, match=r"batch: expected shape \(n, 3\), got \("):
            nf.initialize(t, jnp.zeros(shape))
    with pytest.raises(ValueError, match="at least 2 rows, which have a variance, got 1"):
        nf.initialize(t, batch[:1])
    with pytest.raises(ValueError, match="batch: 1 of 200 rows hold NaN or infinite values"):
        nf.initialize(t, batch.at[7, 1].set(jnp.nan))
    positive = nf.transforms.Chain(
        [t, nf.transforms.NumPyroTransform(dist.biject_to(constraints.positive), (3,))]
    )
    with pytest.raises(ValueError, match="batch: 200 of 200 rows lie outside the flow's support"):
        nf.initialize(positive, -batch)
    context = jnp.zeros((200, 2))
    with pytest.raises(ValueError, match="got no context"):
        nf.initialize(conditional(), batch)
    with pytest.raises(ValueError, match="takes no context"):
        nf.initialize(t, batch, context)
    with pytest.raises(ValueError, match="context: expected 200 rows"):
        nf.initialize(conditional(), batch, context[:5])
    with pytest.raises(ValueError, match="context: 1 of 1 rows hold NaN"):
        nf.initialize(conditional(), batch, jnp.array([0.0, jnp.inf]))
    with pytest.raises(ValueError, match=r"got 200 rows for contexts of batch shape \(5,\)"):
        nf.initialize(nf.transforms.Conditioned(conditional(), context[:5]), batch)
