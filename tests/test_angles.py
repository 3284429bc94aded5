"""Angles: how conditioners read them, and flows that stay on the circle."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from compiled import log_prob, new, sample
from numpyro.distributions import constraints
from small import layer, points, shake

import numpyro_flows as nf
from numpyro_flows.elementwise import (
    Affine,
    Angles,
    ByKind,
    CircularSpline,
    Conditioner,
    Encoding,
    RationalQuadraticSpline,
)

FLAGS = jnp.array([0.0, 1.0, 1.0])
BOTH = ByKind(RationalQuadraticSpline(3), CircularSpline(4))


def test_an_encoding_reads_angles_by_cosine_and_sine():
    x = jnp.array([[3.0], [jnp.pi / 2], [0.0]])
    expected = [[3.0], [0.0], [1.0], [0.0], [1.0], [0.0]]
    np.testing.assert_allclose(Angles(FLAGS).read(x), expected, atol=1e-6)
    np.testing.assert_allclose(Angles(FLAGS)[1:].read(x[1:]), [[0], [1], [1], [0]], atol=1e-6)
    np.testing.assert_allclose(Angles(FLAGS).at(jnp.array(2)).read(x[2:]), [[1], [0]], atol=1e-6)
    assert Encoding().read(x) is x
    assert Encoding()[1:].at(0).read(x) is x


def test_an_encoding_marks_parameters_for_maps_that_ask():
    params = jnp.zeros((13, 3, 5))
    marked = Angles(FLAGS).mark(BOTH, params)
    assert marked.shape == (14, 3, 5)
    np.testing.assert_array_equal(marked[-1], jnp.broadcast_to(FLAGS[:, None], (3, 5)))
    assert Angles(FLAGS).mark(CircularSpline(4), params) is params
    assert Encoding().mark(BOTH, params) is params


@pytest.mark.parametrize(
    "cls",
    [
        pytest.param(nf.transforms.Coupling, marks=pytest.mark.slow),
        nf.transforms.MaskedAutoregressive,
    ],
)
def test_the_conditioner_alone_knows_of_angles(cls):
    made = layer(cls, 3, BOTH, encoding=Angles(FLAGS))
    fields = dict(vars(made))
    conditioner = fields.pop("conditioner")
    assert isinstance(conditioner, Conditioner)
    np.testing.assert_array_equal(conditioner.encoding.flags.value, FLAGS)
    assert not any(np.array_equal(leaf, FLAGS) for leaf in jax.tree.leaves(fields))
    params, _ = nf.partition(made)
    assert params.conditioner.encoding.flags is None  # they do not train
    x = points(3)
    assert nf.check_transform(made, x, tolerance=1e-3, quick=True).passed
    # A whole turn is nothing.
    turned = made(x + 2 * jnp.pi * FLAGS)
    np.testing.assert_allclose(turned, made(x), atol=1e-4)


def test_real_coordinates_cost_no_operation():
    def jaxpr(encoding):
        made = layer(nf.transforms.Coupling, 4, Affine(), encoding=encoding)
        return jax.make_jaxpr(made.forward_columns)(points(4).T)

    assert str(jaxpr(None)) == str(jaxpr(Encoding()))
    assert "cos" not in str(jaxpr(None))


def test_orders_permute_the_encoding():
    order = (2, 0, 1)
    config = {"encoding": Angles(FLAGS), "order": order}
    made = layer(nf.transforms.MaskedAutoregressive, 3, BOTH, **config)
    x = points(3)
    np.testing.assert_allclose(made(x + 2 * jnp.pi * FLAGS), made(x), atol=1e-4)


@pytest.mark.slow
def test_angles_are_learned_across_the_cut():
    """A von Mises angle at the cut and a real coordinate that depends on it."""
    rng = np.random.default_rng(0)
    angle = rng.vonmises(3.0, 4.0, 4000)
    x = np.stack([angle, 10 * np.cos(angle) + 3 * rng.normal(size=4000)], 1).astype("float32")
    support = (constraints.circular, constraints.real)
    untrained = new(nf.nsf, 2, support=support, depth=2, hidden=(32,))
    fitted = nf.fit(
        jax.random.key(1), untrained, x, max_epochs=15, learning_rate=5e-3, progress_bar=False
    ).flow
    truth = dist.VonMises(3.0, 4.0).log_prob(angle) + dist.Normal(10 * np.cos(angle), 3.0).log_prob(
        x[:, 1]
    )
    assert log_prob(fitted, x).mean() > truth.mean() - 0.1
    edge = jnp.array([[np.pi, -10.0], [-np.pi, -10.0]], jnp.float32)
    np.testing.assert_allclose(*log_prob(fitted, edge), rtol=1e-4)
    draws = sample(fitted, jax.random.key(2), (1000,))
    assert fitted.support(draws).all()
    # Mean direction of the draws, whose arithmetic mean would be near zero.
    mean = np.angle(np.exp(1j * np.asarray(draws[:, 0])).mean())
    assert abs(np.angle(np.exp(1j * (mean - 3.0)))) < 0.1


@pytest.mark.parametrize("recipe", [nf.nsf, nf.nsf_ar])
@pytest.mark.parametrize("other", [constraints.circular, constraints.real], ids=["torus", "mixed"])
def test_densities_on_a_torus_and_a_cylinder(recipe, other):
    """Mass one over the whole space, and no seam at +-pi."""
    new = recipe(
        jax.random.key(0),
        2,
        support=(constraints.circular, other),
        depth=2,
        hidden=(8,),
        num_bins=4,
    )
    flow = shake(new, jax.random.key(1), 0.6)
    end = np.pi if other is constraints.circular else 20.0
    middles = [np.linspace(-e, e, 401)[1:] - e / 400 for e in (np.pi, end)]
    grid = jnp.asarray(np.stack(np.meshgrid(*middles), axis=-1).reshape(-1, 2), "float32")
    density = np.exp(np.asarray(jax.jit(lambda f, x: f.log_prob(x))(flow, grid), float))
    assert abs(density.mean() * 2 * np.pi * 2 * end - 1) < 1e-3
    edges = [jnp.stack([jnp.full(9, e), jnp.linspace(-3, 3, 9)], -1) for e in (-np.pi, np.pi)]
    np.testing.assert_allclose(*(log_prob(flow, edge) for edge in edges), rtol=1e-4, atol=1e-4)
