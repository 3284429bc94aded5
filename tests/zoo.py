"""Small elementwise maps and recipes, one entry at least for each that the package has.

The tests of all maps (``tests/test_elementwise.py``) and of all recipes (``tests/test_zoo.py``) run
through them, and ask for an entry of any that is missing.
"""

from functools import partial

import numpyro_flows as nf
from numpyro_flows.elementwise import (
    Affine,
    CircularSpline,
    DeepSigmoid,
    HeavyTail,
    RationalQuadraticSpline,
    SinhArcsinh,
)
from numpyro_flows.transforms import Radial

# label -> map
MAPS = {
    "affine": Affine(),
    "spline": RationalQuadraticSpline(3),
    "circular": CircularSpline(2),
    "sinh-arcsinh": SinhArcsinh(),
    "deep sigmoid": DeepSigmoid(3),
    "heavy tail": HeavyTail(),
}

NARROW = {"depth": 2, "hidden": (8,)}

# label -> a partial of the recipe: key, dim, context_dim=... -> FlowDistribution
RECIPES = {
    "planar": partial(nf.planar, **NARROW),
    "radial": partial(nf.radial, **NARROW),
    "sylvester": partial(nf.sylvester, **NARROW),
    "residual, swapped": partial(nf.residual_flow, layer=Radial, permutation="swap", **NARROW),
    "nice": partial(nf.nice, **NARROW),
    "realnvp": partial(nf.realnvp, **NARROW),
    "nsf": partial(nf.nsf, **NARROW, num_bins=4),
    "nsf lu": partial(nf.nsf, **NARROW, num_bins=4, mixing="lu"),
    "coupling, reversed": partial(nf.coupling_flow, map=Affine(), permutation="reverse", **NARROW),
    "maf": partial(nf.maf, **NARROW),
    "iaf": partial(nf.iaf, **NARROW),
    "nsf_ar": partial(nf.nsf_ar, **NARROW, num_bins=4),
    "bnaf": partial(nf.bnaf, depth=1, hidden_factors=(4,), hidden=(8,)),
    "naf": partial(nf.autoregressive_flow, map=DeepSigmoid(3), **NARROW),
    "cnf": partial(nf.cnf, hidden=(8,)),
}

# What has tests of its own, by name.
ELSEWHERE = {
    "Shift": "no log-derivative: tests/test_elementwise.py::test_shapes_and_dtypes_are_kept",
    "ByKind": "two maps in one: tests/test_angles.py::test_densities_on_a_torus_and_a_cylinder",
    "Masses": "onto the unit interval: tests/test_mixed.py",
    "augmented_cnf": "a bound, not a density: tests/test_augmented.py",
    "conditional_gaussian": "needs a context: tests/test_augmented.py",
    "markov": "of sequences: tests/test_markov.py",
    "glow": "of images: tests/test_images.py",
}
