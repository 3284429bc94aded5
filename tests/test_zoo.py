"""All recipes together: identity, normalisation, stress, numerical inverses, structure."""

import inspect
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from compiled import forward, inverse, log_prob, new, sample, there_and_back
from numpyro.distributions import constraints
from small import layer, points, shake
from zoo import ELSEWHERE, NARROW
from zoo import RECIPES as SMALL_RECIPES

import numpyro_flows as nf
from numpyro_flows.elementwise import (
    Affine,
    Angles,
    ByKind,
    CircularSpline,
    DeepSigmoid,
    HeavyTail,
    RationalQuadraticSpline,
)
from numpyro_flows.nn import masked_product
from numpyro_flows.recipes._building import permutations
from numpyro_flows.solve import monotone_root
from numpyro_flows.transforms import autoregressive


def by_one_program(recipe):
    return lambda key, dim, **config: jax.jit(lambda key: recipe(key, dim, **config))(key)


RECIPES = {label: by_one_program(recipe) for label, recipe in SMALL_RECIPES.items()}


@jax.jit
def judged(new, shaken, grid):
    """What the new flow does to points; draws of the shaken one, and its density there, too."""
    y, log_det = new.transform.forward_and_log_det(points(2), points(1))
    flow = shaken.condition(jnp.array([0.7]))
    x, own = flow.sample_and_log_prob(jax.random.key(2), (500,))
    found = flow.log_prob(jnp.concatenate([grid, x]))
    return (y, log_det), (own, found[len(grid) :]), found[: len(grid)]


def exported_recipes():
    functions = [f for f in vars(nf.recipes).values() if inspect.isfunction(f)]
    return [f for f in functions if next(iter(inspect.signature(f).parameters)) == "key"]


@pytest.mark.parametrize("recipe", exported_recipes(), ids=lambda recipe: recipe.__name__)
def test_every_recipe_has_a_case(recipe):
    cases = [case.func for case in SMALL_RECIPES.values()]
    assert recipe in cases or recipe.__name__ in ELSEWHERE, (
        f"{recipe.__name__} has no tests: add an entry to RECIPES in tests/zoo.py, a partial of it "
        "that takes key, dim and context_dim."
    )


def some(names, *usual):
    """The names, all but some of them slow."""
    assert set(usual) <= set(names)
    return [n if n in usual else pytest.param(n, marks=pytest.mark.slow) for n in names]


ALIKE = {"residual, swapped", "nsf lu", "coupling, reversed"}  # recipes of others, set otherwise


@pytest.mark.parametrize("name", some(RECIPES, *(set(RECIPES) - ALIKE)))
def test_a_recipe_from_identity_to_density(name):
    """A new flow is the identity; a shaken one is normalised, conditional or not."""
    new = RECIPES[name](jax.random.key(0), 2, context_dim=1)
    axis = np.linspace(-40, 40, 801)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2))
    (y, log_det), (own, found), log_density = judged(new, shake(new, jax.random.key(1), 0.6), grid)
    np.testing.assert_allclose(y, points(2), atol=1e-6)
    np.testing.assert_allclose(log_det, 0, atol=1e-6)
    density = np.exp(np.asarray(log_density, float))
    assert abs(density.sum() * (axis[1] - axis[0]) ** 2 - 1) < 1e-3
    np.testing.assert_allclose(found, own, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", some(RECIPES, "planar", "nsf_ar", "residual, swapped"))
def test_one_dimension_integrates_to_one(name):
    flow = shake(RECIPES[name](jax.random.key(0), 1), jax.random.key(1), 0.6)
    axis = np.linspace(-60, 60, 24_001)
    density = np.exp(np.asarray(log_prob(flow, jnp.asarray(axis)[:, None]), float))
    assert abs(density.sum() * (axis[1] - axis[0]) - 1) < 1e-3


@pytest.mark.parametrize(
    "name", some(["planar", "sylvester", "maf", "nsf_ar", "naf", "bnaf"], "planar", "bnaf")
)
def test_gradients_through_a_numerical_inverse(name, x64):
    """Of a value, a context and every parameter, against central differences."""
    flow = shake(RECIPES[name](jax.random.key(0), 2, context_dim=1), jax.random.key(1))
    params, rest = nf.partition(flow.transform)
    z, context = points(2, 3), points(1, 3, seed=4)

    @jax.jit
    def loss(args):
        params, z, context = args
        x, log_det = nf.combine(params, rest).forward_and_log_det(z, context)
        return (x * jnp.array([1.0, -2.0])).sum() + log_det.sum()

    args = (params, z, context)
    rng = np.random.default_rng(0)
    step = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), args)

    @jax.jit
    def along(args, step):
        """The derivative along a step, by reverse and by forward mode."""
        grads, steps = jax.tree.leaves(jax.grad(loss)(args)), jax.tree.leaves(step)
        reverse = sum((grad * d).sum() for grad, d in zip(grads, steps, strict=True))
        return reverse, jax.jvp(loss, (args,), (step,))[1]

    def moved(h):
        return loss(jax.tree.map(lambda a, d: np.asarray(a) + h * np.asarray(d), args, step))

    h = 1e-6
    expected, forward_mode = along(args, step)
    np.testing.assert_allclose((moved(h) - moved(-h)) / (2 * h), expected, rtol=1e-5)
    np.testing.assert_allclose(forward_mode, expected, rtol=1e-9)


@pytest.mark.parametrize("name", some(RECIPES, "realnvp", "nsf_ar", "bnaf"))
def test_stress(name):
    """20,000 points out to 10 sigma, parameters five times wider: finite, whatever the error."""
    flow = shake(RECIPES[name](jax.random.key(0), 4), jax.random.key(1), 1.5)
    x = 10 * jax.random.uniform(jax.random.key(2), (20_000, 4), minval=-1.0)

    results = there_and_back(flow.transform.inv, x)
    assert all(np.isfinite(result).all() for result in results)
    assert np.median(np.abs(results[2] - x)) < 1e-3


def test_autoregressive_structure():
    """Strictly triangular in the given order, complete even for networks narrower than dim."""

    def jacobian(made):
        return np.asarray(jax.jit(jax.jacobian(lambda x: made(x)))(points(5)[0]))

    order = [3, 1, 4, 0, 2]
    for hidden in ((16,), (2, 3), ()):
        made = layer(
            nf.transforms.MaskedAutoregressive,
            5,
            Affine(),
            order=order,
            hidden=hidden,
            activation="tanh",
        )
        j = jacobian(made)[np.ix_(order, order)]
        np.testing.assert_array_equal(np.triu(j, 1), 0)
        assert (np.abs(j[np.tril_indices(5, -1)]) > 0).all()
    parents = ((), (0,), (0,), (1, 2), (3,))
    made = layer(
        nf.transforms.MaskedAutoregressive,
        5,
        Affine(),
        parents=parents,
        hidden=(20,),
        activation="tanh",
    )
    j = jacobian(made)
    expected = np.array([[i == k or k in parents[i] for k in range(5)] for i in range(5)])
    np.testing.assert_array_equal(j != 0, expected)
    mask = expected & ~np.eye(5, dtype=bool)
    masked = nf.transforms.MaskedAutoregressive(jax.random.key(0), 5, Affine(), parents=mask)
    assert masked.parents == made.parents


@pytest.mark.parametrize("shape", [(5, 3), (2, 7), (256, 70), (130, 256)])
def test_masked_products_are_dense_ones(shape, x64):
    """Values and both gradients, of triangular masks and others, in one block and in several."""
    rng = np.random.default_rng(0)
    weight, h = rng.normal(size=shape), rng.normal(size=(shape[1], 4))
    triangular = np.arange(shape[1]) * shape[0] <= np.arange(shape[0])[:, None] * shape[1]

    def judge(product, mask):
        @jax.jit
        def value_and_gradients(weight, h):
            value, pull = jax.vjp(lambda w, h: product(w, mask, h), weight, h)
            return value, *pull(jnp.cos(value))

        return value_and_gradients(weight, h)

    for mask in (triangular, rng.random(shape) > 0.9, np.zeros(shape)):
        mask = mask.astype("float32")
        ours = judge(masked_product, mask)
        for got, expected in zip(ours, judge(lambda w, m, h: (w * m) @ h, mask), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-12)


def test_sampling_agrees_with_one_pass_per_coordinate():
    """The incremental inverse, against substitution by whole passes of the network."""
    made = layer(
        nf.transforms.MaskedAutoregressive, 6, Affine(), hidden=(7, 7), residual=True, context_dim=2
    )
    context, y = points(2), points(6)
    x = jnp.zeros_like(y)

    @jax.jit
    def substituted(x):  # x_i = (y_i - t_i) e^(-s_i) = x_i + (y_i - T(x)_i) / dT_i/dx_i
        def one(x, context):
            return made.forward_and_log_det(x, context)[0]

        scale = jax.vmap(lambda x, c: jnp.diag(jax.jacobian(one)(x, c)))(x, context)
        return x + (y - one(x, context)) / scale

    for _ in range(6):
        x = substituted(x)
    np.testing.assert_allclose(inverse(made, y, context)[0], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"hidden": (24, 24), "residual": True, "context_dim": 2},
        {"hidden": (5,)},
        {"hidden": (), "context_dim": 2},
        {"hidden": (30, 17), "parents": [range(max(0, i - 3), i) for i in range(21)]},
        {"hidden": (24,), "encoding": Angles(jnp.arange(21.0) % 2)},
    ],
    ids=["residual", "narrow", "linear", "graph", "angles"],
)
def test_sampling_in_blocks(config, x64, monkeypatch):
    """Of blocks that overlap, against one pass of the network."""
    monkeypatch.setattr(autoregressive, "BLOCK", 8)
    splines = ByKind(RationalQuadraticSpline(3), CircularSpline(4))
    map = splines if "encoding" in config else Affine()
    made = layer(nf.transforms.MaskedAutoregressive, 21, map, **config)
    context = points(2) if "context_dim" in config else None
    x = jnp.clip(points(21), -3, 3)
    y, log_det = forward(made, x, context)
    back, inverse_log_det = inverse(made, y, context)
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(inverse_log_det, -log_det, rtol=1e-9, atol=1e-9)


def test_planar_agrees_with_the_paper():
    """y = x + u_hat tanh(w x + b) with u_hat from eq. 23, computed here by NumPy."""
    planar = layer(nf.transforms.Planar, 3)
    w, u, b = np.split(np.asarray(planar.params.value, float), [3, 6])
    a = w @ u
    softplus = np.log1p(np.exp(a + np.log(np.expm1(0.99))))
    u_hat = u + (softplus - 0.99 - a) * w / (w @ w)
    x = np.asarray(points(3), float)
    h = np.tanh(x @ w + b)
    y, log_det = forward(planar, points(3))
    np.testing.assert_allclose(y, x + h[:, None] * u_hat, rtol=1e-5)
    np.testing.assert_allclose(log_det, np.log1p((1 - h**2) * (w @ u_hat)), rtol=1e-4, atol=1e-6)


def test_planar_is_safe_at_zero_and_takes_any_monotone_activation():
    zero = jax.tree.map(jnp.zeros_like, nf.transforms.Planar(jax.random.key(0), 2))
    total = jax.jit(jax.grad(lambda t, x: sum(a.sum() for a in t.forward_and_log_det(x))))
    grads = total(zero, points(2))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    ridge = nf.transforms.Ridge(lambda x: 2 * jnp.arctan(x), lambda x: 2 / (1 + x**2), 2.0)
    assert nf.check_transform(layer(nf.transforms.Planar, 2, activation=ridge), points(2)).passed


def test_bnaf_reaches_every_point():
    """NumPyro's has no inverse; ours finds z for points far outside what tanh alone can reach."""
    flow = shake(new(nf.bnaf, 2, inverse=False), jax.random.key(1))
    x = 1e3 * points(2)
    z, log_det = inverse(flow.transform, x)
    np.testing.assert_allclose(forward(flow.transform, z)[0], x, rtol=1e-5)
    assert np.isfinite(log_det).all()


def test_monotone_root():
    """Kinks, overflow and near-flat stretches; second derivatives."""
    y = jnp.linspace(-50, 50, 2001)

    def kinked(x, slope):
        return jnp.where(x > 0, slope * x, 0.01 * x)

    def steep(x, a):
        return jnp.sinh(a * x)

    x = jax.jit(partial(monotone_root, kinked))(y, 2.0, -200 * abs(y), 200 * abs(y))
    np.testing.assert_allclose(kinked(x, 2.0), y, rtol=1e-5, atol=1e-5)
    x = jax.jit(partial(monotone_root, steep))(y, 5.0, -abs(y) - 1, abs(y) + 1)
    np.testing.assert_allclose(x, np.arcsinh(y) / 5, rtol=1e-5, atol=1e-6)

    def root(a):
        return monotone_root(lambda x, a: x + a * x**3, 2.0 + 0 * a, a, 0 * a, 2.0 + 0 * a)

    # With a = 1, x = 1: x' = -x^3 / (1 + 3 a x^2) = -1/4, and x'' by differences.
    assert root(1.0) == pytest.approx(1.0)
    assert jax.grad(root)(1.0) == pytest.approx(-0.25)
    slope = (jax.grad(root)(1.01) - jax.grad(root)(0.99)) / 0.02
    assert float(jax.grad(jax.grad(root))(1.0)) == pytest.approx(float(slope), rel=1e-2)


def test_supports_per_coordinate():
    support = (constraints.positive, constraints.interval(-1.0, 2.0))
    flow = shake(new(nf.maf, 2, support=support, **NARROW), jax.random.key(1))
    plain = nf.FlowDistribution(flow.base_dist, flow.transform.parts[0])
    parts = [dist.biject_to(part) for part in support]

    @jax.jit
    def by_hand(plain):
        x = plain.sample(jax.random.key(2), (50,))
        y = jnp.stack([part(x[:, i]) for i, part in enumerate(parts)], -1)
        log_det = sum(part.log_abs_det_jacobian(x[:, i], y[:, i]) for i, part in enumerate(parts))
        return y, plain.log_prob(x) - log_det

    y, expected = by_hand(plain)
    np.testing.assert_allclose(log_prob(flow, y), expected, rtol=1e-3, atol=1e-3)

    # What NUTS does with such a prior: its own map onto the support, and back.
    to_support = dist.biject_to(flow.support)
    again = jax.jit(lambda y: to_support(to_support.inv(y)))(y)
    np.testing.assert_allclose(again, y, rtol=1e-4)
    assert flow.support(to_support(jnp.zeros((3, 2)))).all()


def test_an_embedding_reads_any_pytree():
    example = {"dose": jnp.zeros(()), "curve": jnp.zeros(3)}
    network = nf.nn.Embedding(jax.random.key(0), example, 2, hidden=(16,))
    flow = nf.realnvp(jax.random.key(1), 1, context_dim=2, depth=2, hidden=(8,)).embed(network)
    rng = np.random.default_rng(0)
    context = {"dose": rng.normal(size=500), "curve": rng.normal(size=(500, 3))}
    x = 3 * context["dose"] + context["curve"].sum(-1) + 0.3 * rng.normal(size=500)
    fitted = nf.fit(
        jax.random.key(2),
        flow,
        x[:, None],
        context,
        max_epochs=40,
        learning_rate=1e-2,
        progress_bar=False,
    )
    assert fitted.val_losses.min() < 2.0  # without the context 2.7, with it 0.2 at best
    given = fitted.flow.condition(jax.tree.map(lambda a: jnp.asarray(a[:4]), context))
    assert given.batch_shape == (4,)
    assert sample(given, jax.random.key(3), (5,)).shape == (5, 4, 1)
    with pytest.raises(ValueError, match="expected the arrays"):
        flow.condition(jnp.ones(4))
    with pytest.raises(ValueError, match=r"got \(4,\)"):
        flow.condition({"dose": jnp.ones(()), "curve": jnp.ones(4)})


def test_an_ensemble_by_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    flows = jax.jit(jax.vmap(lambda key: nf.maf(key, 2, **NARROW)))(keys)
    scores = jax.jit(jax.vmap(lambda flow: flow.log_prob(points(2))))(flows)
    assert scores.shape == (3, 6)
    np.testing.assert_allclose(scores[0], dist.Normal().log_prob(points(2)).sum(-1), rtol=1e-5)
    # Through the numerical inverse, forwards and backwards, as each flow by itself.
    flows = shake(flows, jax.random.key(1))

    def total(flow):
        return (flow.transform(points(2)) ** 2).sum()

    grads = jax.jit(jax.vmap(jax.grad(total)))(flows).transform
    alone = jax.jit(jax.grad(total))(jax.tree.map(lambda leaf: leaf[1], flows)).transform
    for every, one in zip(jax.tree.leaves(grads), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(every[1], one, rtol=1e-3, atol=1e-4)


def test_guides_ask_for_the_fast_side():
    def model():
        numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    for recipe, wanted in (
        (nf.planar, nf.transforms.Scan),
        (partial(nf.planar, depth=2), nf.transforms.Scan),
        (partial(nf.planar, inverse=True), nf.transforms.Inverse),
    ):
        flow = nf.AutoFlow(model, recipe)._recipe(jax.random.key(0), 2)
        assert type(flow.transform) is wanted


BUILD = partial(nf.transforms.MaskedAutoregressive, jax.random.key(0), 3, Affine())
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BUILD(order=(0, 0, 1)), ValueError, r"a permutation of range\(3\)"),
        (lambda: BUILD(parents=((1,), (0,), ())), ValueError, r"cycle among coordinates \[0, 1\]"),
        (lambda: BUILD(parents=((), (3,), ())), ValueError, r"coordinates in range\(3\)"),
        (lambda: BUILD(parents=((), ())), ValueError, "one sequence for each of 3"),
        (lambda: BUILD(parents=(0, 1, 2)), ValueError, "one sequence for each of 3"),
        (lambda: BUILD(parents=np.tri(3, k=-1)), ValueError, r"`mask.astype\(bool\)`"),
        (lambda: BUILD(parents=np.tri(2, dtype=bool)), ValueError, r"mask of shape \(3, 3\)"),
        (lambda: BUILD(parents=np.tri(3, dtype=bool)), ValueError, r"cycle among .* \[0, 1, 2\]"),
        (lambda: nf.maf(KEY, 3, parents=((2,), (0,), (1,))), ValueError, "cycle among"),
        (lambda: nf.coupling_flow(KEY, 2, "affine"), TypeError, "map: expected an ElementwiseMap"),
        (lambda: nf.autoregressive_flow(KEY, 2, Affine), TypeError, "expected an ElementwiseMap"),
        (
            lambda: nf.planar(
                KEY,
                2,
                activation=nf.transforms.Ridge(jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2, np.inf),
            ),
            ValueError,
            "max_slope: expected a positive finite number",
        ),
        (
            lambda: nf.nsf(KEY, 2, support=constraints.circular, base=dist.Normal(0.0, 1.0)),
            ValueError,
            "base: expected a distribution on the circle",
        ),
        (
            lambda: (
                nf.maf(KEY, 2, context_dim=1).condition(jnp.ones((4, 1))).log_prob(points(2, 3))
            ),
            ValueError,
            r"batch shape \(3,\) and context of batch shape \(4,\) do not broadcast",
        ),
        (lambda: BUILD(parents=((), (), ()), order=(0, 1, 2)), ValueError, "got both"),
        (lambda: BUILD(residual=True, hidden=(4, 5)), ValueError, "equal widths for residual"),
        (lambda: nf.planar(KEY, 2, activation="sine"), ValueError, "Unknown activation 'sine'"),
        (lambda: nf.planar(KEY, 2, activation=jnp.tanh), TypeError, "a name or a Ridge"),
        (
            lambda: nf.planar(KEY, 2, activation=nf.transforms.Ridge(jnp.sin, jnp.cos)),
            ValueError,
            "expected a monotone function",
        ),
        (
            lambda: nf.planar(KEY, 2, activation=nf.transforms.Ridge(jnp.arctan, jnp.ones_like)),
            ValueError,
            "expected the derivative of the function",
        ),
        (
            lambda: nf.planar(
                KEY, 2, activation=nf.transforms.Ridge(lambda x: 2 * x, lambda x: 2 + 0 * x)
            ),
            ValueError,
            "slopes between 0 and max_slope",
        ),
        (lambda: nf.sylvester(KEY, 2, num_ridges=3), ValueError, "at most dim=2"),
        (lambda: nf.bnaf(KEY, 2, hidden_factors=()), ValueError, "at least one hidden layer"),
        (lambda: nf.nsf(KEY, 2, num_bins=1), ValueError, "num_bins: expected at least 2"),
        (lambda: nf.nsf(KEY, 2, mixing="qr"), ValueError, "'none' or 'lu'"),
        (lambda: nf.maf(KEY, 3, permutation=(0, 1)), ValueError, r"one of range\(3\)"),
        (lambda: nf.realnvp(KEY, 2, support=constraints.circular), ValueError, "Use `nf.nsf`"),
        (lambda: nf.planar(KEY, 2, support=constraints.circular), ValueError, "Use `nf.nsf`"),
        (
            lambda: nf.nsf(KEY, 2, support=constraints.circular, mixing="lu"),
            ValueError,
            "tear the circle",
        ),
        (
            lambda: nf.nsf(KEY, 2, support=(constraints.real,)),
            ValueError,
            "for each of 2 coordinates",
        ),
        (
            lambda: nf.nsf(KEY, 2, support=(constraints.real, constraints.simplex)),
            ValueError,
            "scalar constraints",
        ),
        (
            lambda: nf.fit(
                KEY, nf.nsf(KEY, 1, support=constraints.circular), np.linspace(0, 6, 50)[:, None]
            ),
            ValueError,
            "outside the flow's support",
        ),
        (
            lambda: nf.transforms.Embedded(nf.planar(KEY, 2).transform, abs),
            ValueError,
            "conditional",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_permutations_of_two_coordinates_always_swap():
    """Chance would leave one coordinate still for several layers."""
    assert permutations("random", 2, 6, seed=0)[:-1] == [[1, 0]] * 5


def test_a_composed_flow_has_heavy_tails():
    """With lambda = 1/3 on both sides, density falls like a Student's with 3 degrees of freedom."""
    recipe = partial(nf.autoregressive_flow, map=DeepSigmoid(3), depth=1, hidden=(8,))
    flow = by_one_program(recipe)(jax.random.key(0), 1)
    raw = jnp.full(2, jnp.arctanh(1 / 3))
    tails = nf.transforms.Elementwise(jax.random.key(1), 1, HeavyTail())
    tails = eqx.tree_at(lambda t: t.params.value, tails, raw)
    heavy = nf.FlowDistribution(flow.base_dist, nf.transforms.Chain([flow.transform, tails]))
    x = jnp.array([-1e4, -1e3, 1e3, 1e4])[:, None]
    slopes = log_prob(heavy, x) - dist.StudentT(3.0).log_prob(x[:, 0])
    np.testing.assert_allclose(slopes, slopes[0], atol=0.5)
