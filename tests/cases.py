"""One entry per concrete transform: small instances, shaken off the identity.

``tests/test_contract.py`` finds every concrete class of the package by itself and asks for its
entry here.
"""

import jax
import jax.numpy as jnp
from numpyro.distributions import Normal, StudentT, biject_to, constraints
from small import (
    chain,
    continuous,
    conv_coupling,
    coupling,
    flow,
    glow_like,
    image,
    layer,
    mixed,
    normal,
    points,
    shake,
    small_glow,
    stacked,
    transform,
    unit_where_discrete,
)

import numpyro_flows as nf
from numpyro_flows.elementwise import (
    Affine,
    DeepSigmoid,
    HeavyTail,
    RationalQuadraticSpline,
    Shift,
    SinhArcsinh,
)
from numpyro_flows.infer.centring import CentredAffine
from numpyro_flows.infer.latent_space import Centring

# class -> {label: () -> (transform, x, context)}
CASES = {
    nf.transforms.Coupling: {
        "affine": lambda: (coupling(3, Affine()), points(3), None),
        "shift": lambda: (coupling(2, Shift()), points(2), None),
        "dim=1": lambda: (coupling(1, Affine()), points(1), None),
        "context": lambda: (coupling(3, Affine(), context_dim=2), points(3), points(2, seed=3)),
        "dim=1, context": lambda: (
            coupling(1, Affine(), context_dim=2),
            points(1),
            points(2, seed=3),
        ),
        "residual": lambda: (coupling(3, Affine(), residual=True), points(3), None),
        "spline": lambda: (coupling(3, RationalQuadraticSpline(3)), points(3), None),
        "sinh-arcsinh": lambda: (coupling(3, SinhArcsinh()), points(3), None),
        "deep sigmoid": lambda: (coupling(2, DeepSigmoid(4)), points(2), None),
    },
    nf.transforms.Markov: {
        "": lambda: (chain(), normal(6, 5, 2), None),
        "covariates": lambda: (chain(1), normal(6, 5, 2), normal(6, 5, seed=3)),
    },
    nf.transforms.Mixed: {
        "": lambda: (mixed(), unit_where_discrete(mixed()), None),
        "context": lambda: (
            mixed(context_dim=2),
            unit_where_discrete(mixed()),
            points(2, seed=3),
        ),
    },
    nf.transforms.MaskedAutoregressive: {
        "affine": lambda: (layer(nf.transforms.MaskedAutoregressive, 4, Affine()), points(4), None),
        "narrow, context": lambda: (
            layer(nf.transforms.MaskedAutoregressive, 5, Affine(), hidden=(2, 3), context_dim=2),
            points(5),
            points(2, seed=3),
        ),
        "residual, order": lambda: (
            layer(
                nf.transforms.MaskedAutoregressive,
                3,
                Affine(),
                hidden=(6, 6),
                residual=True,
                order=(2, 0, 1),
            ),
            points(3),
            None,
        ),
        "graph": lambda: (
            layer(
                nf.transforms.MaskedAutoregressive,
                4,
                Affine(),
                hidden=(12,),
                parents=((1, 3), (), (0,), (1,)),
            ),
            points(4),
            None,
        ),
        "dim=1": lambda: (layer(nf.transforms.MaskedAutoregressive, 1, Affine()), points(1), None),
    },
    nf.transforms.BlockAutoregressive: {
        "two layers": lambda: (
            layer(nf.transforms.BlockAutoregressive, 3, hidden_factors=(4, 3)),
            points(3),
            None,
        ),
        "dim=1, context": lambda: (
            layer(
                nf.transforms.BlockAutoregressive,
                1,
                hidden_factors=(4,),
                context_dim=2,
                hidden=(4,),
            ),
            points(1),
            points(2, seed=3),
        ),
    },
    nf.transforms.Planar: {
        "tanh": lambda: (layer(nf.transforms.Planar, 3), points(3), None),
        "leaky ReLU, context": lambda: (
            layer(nf.transforms.Planar, 2, activation="leaky_relu", context_dim=2),
            points(2),
            points(2, seed=3),
        ),
    },
    nf.transforms.Sylvester: {
        "": lambda: (layer(nf.transforms.Sylvester, 4, num_ridges=3), points(4), None),
        "context": lambda: (
            layer(nf.transforms.Sylvester, 2, activation="elu", context_dim=2),
            points(2),
            points(2, seed=3),
        ),
    },
    nf.transforms.Radial: {
        "": lambda: (layer(nf.transforms.Radial, 3), points(3), None),
        "dim=1, context": lambda: (
            layer(nf.transforms.Radial, 1, context_dim=2),
            points(1),
            points(2, seed=3),
        ),
    },
    nf.transforms.Elementwise: {
        "heavy tail": lambda: (layer(nf.transforms.Elementwise, 3, HeavyTail()), points(3), None),
        "context": lambda: (
            layer(nf.transforms.Elementwise, 2, SinhArcsinh(), context_dim=2),
            points(2),
            points(2, seed=3),
        ),
    },
    nf.transforms.Embedded: {
        "": lambda: (
            flow(nf.realnvp, 3, context_dim=2)
            .embed(
                nf.nn.Embedding(
                    jax.random.key(3),
                    {"dose": jnp.zeros(()), "curve": jnp.zeros(2)},
                    2,
                    hidden=(4,),
                )
            )
            .transform,
            points(3),
            {"dose": points(1, seed=3)[:, 0], "curve": points(2, seed=4)},
        ),
    },
    nf.transforms.Scan: {
        "realnvp": lambda: (transform(nf.realnvp, 5), points(5), None),
        "realnvp, dim=1": lambda: (transform(nf.realnvp, 1), points(1), None),
        "realnvp, context": lambda: (
            transform(nf.realnvp, 2, context_dim=1, permutation="swap"),
            points(2),
            points(1, seed=3),
        ),
        "nice": lambda: (transform(nf.nice, 3, rescale=False), points(3), None),
        "LU and couplings": lambda: (glow_like(3), points(3), None),
        "channels permuted": lambda: (
            shake(
                nf.transforms.Scan(
                    stacked(lambda k: nf.transforms.ActNorm((2, 2, 3))), [(1, 2, 0)] * 3
                ),
                jax.random.key(1),
            ),
            points(12).reshape(6, 2, 2, 3),
            None,
        ),
        "no permutations": lambda: (
            shake(
                nf.transforms.Scan(stacked(lambda k: nf.transforms.ActNorm((2, 2, 3)))),
                jax.random.key(1),
            ),
            points(12).reshape(6, 2, 2, 3),
            None,
        ),
    },
    nf.transforms.Chain: {
        "nice, rescaled": lambda: (transform(nf.nice, 4, permutation="reverse"), points(4), None),
        "context in one part": lambda: (
            transform(nf.nice, 3, context_dim=2),
            points(3),
            points(2, seed=3),
        ),
        "simplex": lambda: (transform(nf.realnvp, 3, support=constraints.simplex), points(3), None),
        "angles": lambda: (
            transform(
                nf.nsf,
                3,
                support=(constraints.circular, constraints.positive, constraints.real),
                depth=1,
            ),
            points(3).at[:, 0].set(jnp.linspace(-3, 3, 6)),
            None,
        ),
    },
    nf.transforms.DiagonalScale: {
        "": lambda: (shake(nf.transforms.DiagonalScale(3), jax.random.key(1)), points(3), None),
    },
    nf.transforms.Permutation: {
        "": lambda: (nf.transforms.Permutation((2, 0, 3, 1)), points(4), None),
    },
    nf.transforms.TriangularAffine: {
        "": lambda: (shake(nf.transforms.TriangularAffine(4), jax.random.key(1)), points(4), None),
    },
    nf.transforms.LULinear: {
        "": lambda: (shake(nf.transforms.LULinear(4), jax.random.key(1)), points(4), None),
    },
    nf.transforms.Householder: {
        "": lambda: (
            shake(nf.transforms.Householder(jax.random.key(0), 5), jax.random.key(1), scale=2.0),
            points(5),
            None,
        ),
    },
    nf.transforms.Orthogonal: {
        "cayley": lambda: (
            shake(nf.transforms.Orthogonal(4), jax.random.key(1), 2.0),
            points(4),
            None,
        ),
        "expm": lambda: (
            shake(nf.transforms.Orthogonal(4, method="expm"), jax.random.key(1), 2.0),
            points(4),
            None,
        ),
    },
    nf.transforms.ActNorm: {
        "": lambda: (shake(nf.transforms.ActNorm(3), jax.random.key(1)), points(3), None),
        "image": lambda: (
            shake(nf.transforms.ActNorm((2, 2, 3)), jax.random.key(1)),
            points(12).reshape(6, 2, 2, 3),
            None,
        ),
    },
    nf.transforms.Inverse: {
        "": lambda: (transform(nf.realnvp, 3).inv, points(3), None),
        "context": lambda: (
            transform(nf.realnvp, 3, context_dim=2).inv,
            points(3),
            points(2, seed=3),
        ),
    },
    nf.transforms.Conditioned: {
        "": lambda: (
            nf.transforms.Conditioned(
                transform(nf.realnvp, 3, context_dim=2), jnp.array([0.5, -1.0])
            ),
            points(3),
            None,
        ),
    },
    nf.transforms.Standardized: {
        "": lambda: (
            nf.transforms.Standardized(
                transform(nf.realnvp, 2), jnp.array([3.0, -1.0]), jnp.array([2.0, 0.5])
            ),
            points(2),
            None,
        ),
        "context": lambda: (
            nf.transforms.Standardized(
                transform(nf.realnvp, 2, context_dim=1),
                jnp.array([3.0, -1.0]),
                jnp.array([2.0, 0.5]),
                jnp.array([10.0]),
                jnp.array([5.0]),
            ),
            points(2),
            10 + 5 * points(1, seed=3),
        ),
    },
    nf.transforms.CompressedContext: {
        "": lambda: (
            nf.transforms.CompressedContext(
                transform(nf.realnvp, 2, context_dim=2), 1.0, jnp.array([1e-3, jnp.inf])
            ),
            points(2),
            points(2, seed=3),
        ),
    },
    nf.transforms.Continuous: {
        "fixed steps": lambda: (
            continuous(3, adjoint="direct", solver="Dopri8", num_steps=16),
            points(3),
            None,
        ),
        "exact": lambda: (continuous(3), points(3), None),
        "context": lambda: (continuous(2, context_dim=2), points(2), points(2, seed=3)),
    },
    nf.transforms.DenseLinear: {
        "": lambda: (shake(nf.transforms.DenseLinear(4), jax.random.key(1)), points(4), None),
    },
    nf.transforms.Squeeze: {
        "": lambda: (nf.transforms.Squeeze((4, 2, 3)), image(4, 2, 3), None),
        "signal": lambda: (nf.transforms.Squeeze((6, 1, 2), (3, 1)), image(6, 1, 2), None),
    },
    nf.transforms.Pixelwise: {
        "LU": lambda: (
            shake(nf.transforms.Pixelwise(nf.transforms.LULinear(3), 2, 4), jax.random.key(1)),
            image(2, 4, 3),
            None,
        ),
        "Householder": lambda: (
            shake(
                nf.transforms.Pixelwise(nf.transforms.Householder(jax.random.key(0), 4), 2, 2),
                jax.random.key(1),
            ),
            image(2, 2, 4),
            None,
        ),
    },
    nf.transforms.ConvCoupling: {
        "channel, position": lambda: (
            conv_coupling((3, 4, 3), Affine(), position=2),
            image(3, 4, 3),
            None,
        ),
        "checkerboard, spline, context": lambda: (
            conv_coupling(
                (3, 2, 1),
                RationalQuadraticSpline(3),
                mask="checkerboard",
                parity=1,
                context_dim=2,
            ),
            image(3, 2, 1),
            points(2, n=4, seed=3),
        ),
        "one convolution, context": lambda: (
            conv_coupling((2, 2, 2), Affine(), hidden=(), context_dim=2),
            image(2, 2, 2),
            points(2, n=4, seed=3),
        ),
        "context is an image": lambda: (
            conv_coupling((2, 3, 2), Affine(), context_shape=(2, 3, 2)),
            image(2, 3, 2),
            points(12, n=4, seed=3),
        ),
        "context is a finer image": lambda: (
            conv_coupling((2, 3, 2), Affine(), context_shape=(4, 3, 1)),
            image(2, 3, 2),
            points(12, n=4, seed=3),
        ),
    },
    nf.transforms.MultiScale: {
        "glow, one step": lambda: (small_glow(depth=1, hidden=(6,)), image(16), None),
        "glow": lambda: (small_glow(), image(16), None),
        "checkerboards, dense, context": lambda: (
            small_glow((4, 4, 3), levels=1, checkerboards=1, mixing="dense", context_dim=2),
            image(48),
            points(2, n=4, seed=3),
        ),
    },
    nf.transforms.Equalization: {
        "": lambda: (nf.transforms.Equalization(jnp.array([4.0, 1.0, 2.0]), (3,)), points(3), None),
        "channels": lambda: (
            nf.transforms.Equalization(jnp.array([[4.0, 1.0], [1.0, 1.0]]), (2, 1, 2)),
            image(2, 1, 2),
            None,
        ),
    },
    nf.transforms.FixedAffine: {
        "low rank": lambda: (
            nf.transforms.FixedAffine(
                jnp.array([1.0, -2.0, 3.0, 0.0]),
                jnp.array([0.5, 2.0, 1.0, 3.0]),
                jnp.array([[0.6, 0.0], [0.8, 0.0], [0.0, 1.0], [0.0, 0.0]]),
                jnp.array([[2.0, 0.0], [-0.7, 0.5]]),
            ),
            points(4),
            None,
        ),
        "diagonal": lambda: (
            nf.transforms.FixedAffine(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0])),
            points(2),
            None,
        ),
    },
    nf.transforms.NumPyroTransform: {
        "positive": lambda: (
            nf.transforms.NumPyroTransform(biject_to(constraints.positive), (3,)),
            points(3),
            None,
        ),
        "interval": lambda: (
            nf.transforms.NumPyroTransform(biject_to(constraints.interval(-1, 3)), (2,)),
            points(2),
            None,
        ),
        "ordered": lambda: (
            nf.transforms.NumPyroTransform(biject_to(constraints.ordered_vector), (3,)),
            points(3),
            None,
        ),
        "corr_cholesky": lambda: (
            nf.transforms.NumPyroTransform(biject_to(constraints.corr_cholesky), (3,)),
            0.5 * points(3),
            None,
        ),
    },
}

# Classes whose values carry a batch axis of their own and so cannot be tried on one row.
ELSEWHERE = {
    nf.transforms.Stacked: "tests/test_params.py::test_flow_inside_scan",
    CentredAffine: "tests/test_centring.py::test_all_that_a_guide_does_agrees",
    Centring: "tests/test_centring.py::test_the_map_is_exact",
}

BASES = {
    "scalar": lambda: Normal(0, 1),
    "batch": lambda: Normal(jnp.zeros(3), 2.0),
    "student": lambda: StudentT(5),
}
