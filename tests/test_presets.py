"""What recipes say of themselves: signatures, docstrings, types, and settings for guides."""

import ast
import inspect
import itertools
import os
import pickle
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack, get_args, get_type_hints

import jax
import pytest

import numpyro_flows as nf
from numpyro_flows.infer.guide_flow import for_guide
from numpyro_flows.recipes import in_guides, preset


def test_no_recipe_ignores_an_argument():
    files = [path for path in map(Path, nf.recipes.__path__) for path in path.glob("[a-z]*.py")]
    recipes = [
        node
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert {"realnvp", "glow", "residual_flow"} < {recipe.name for recipe in recipes}
    for recipe in recipes:
        read = {name.id for name in ast.walk(recipe) if isinstance(name, ast.Name)}
        given = [*recipe.args.args, *recipe.args.kwonlyargs, *filter(None, [recipe.args.kwarg])]
        arguments = {argument.arg for argument in given}
        assert arguments <= read, f"{recipe.name} ignores {arguments - read}"


PRESETS = {
    nf.coupling_flow: [nf.nice, nf.realnvp, nf.nsf],
    nf.autoregressive_flow: [nf.maf, nf.iaf, nf.nsf_ar],
    nf.residual_flow: [nf.planar, nf.radial, nf.sylvester, nf.bnaf],
    nf.cnf: [nf.augmented_cnf],
}
PAIRS = [(preset, structure) for structure, presets in PRESETS.items() for preset in presets]


def described(recipe):
    return re.findall(r"^ *:param (\w+):", recipe.__doc__, re.MULTILINE)


@pytest.mark.parametrize("recipe", [*PRESETS, *itertools.chain(*PRESETS.values()), nf.glow])
def test_signatures_and_docstrings_are_complete(recipe):
    parameters = inspect.signature(recipe).parameters
    assert described(recipe) == list(parameters)
    assert inspect.Parameter.VAR_KEYWORD not in {p.kind for p in parameters.values()}
    assert inspect.getdoc(recipe).count(">>> ") > 1


@pytest.mark.parametrize(("recipe", "structure"), PAIRS)
def test_options_have_the_types_and_defaults_of_the_structure(recipe, structure):
    own = inspect.signature(inspect.unwrap(recipe)).parameters
    (options,) = get_args(own["options"].annotation)
    theirs = inspect.signature(structure).parameters
    for name, annotation in get_type_hints(options).items():
        assert annotation == theirs[name].annotation
        assert inspect.signature(recipe).parameters[name] == theirs[name]


def test_the_parts_of_a_completed_recipe():
    def structure(key, dim, map, *, depth: int = 3, inverse: bool = True, hidden: int = 8):
        """Summary.

        :param depth: layers,
            stacked.
        :param hidden: width.
        :raises ValueError: never.
        """
        return map, depth, inverse, hidden

    class Options(TypedDict, total=False):
        depth: int

    def mine(key, dim, *, hidden: int = 5, bins: int = 2, **options: Unpack[Options]):
        """Mine.

        :param bins: of the spline.

        Source: this.
        """
        return structure(key, dim, bins, hidden=hidden, **options)

    made = preset(in_guides(inverse=False, depth=9)(structure))(mine)
    assert list(inspect.signature(made).parameters) == ["key", "dim", "depth", "hidden", "bins"]
    assert inspect.signature(made).parameters["hidden"].default == 5
    assert made.__doc__ == (
        "Mine.\n\n:param depth: layers,\n    stacked.\n:param hidden: width.\n"
        ":param bins: of the spline.\n\nSource: this.\n"
    )
    assert made(0, 1, depth=2) == (2, 2, True, 5)
    # Guides set what the preset leaves open; `inverse` is none of its arguments.
    assert made.guide_settings == {"depth": 9}
    assert for_guide(partial(made, bins=7))(0, 1) == (7, 9, True, 5)
    with pytest.raises(
        TypeError, match=r"mine\(\) got an unexpected .* 'dept'; did you mean 'depth'"
    ):
        made(0, 1, dept=2)
    with pytest.raises(TypeError, match=r"'inverse'; it takes key, dim, depth, hidden, bins\."):
        made(0, 1, inverse=True)

    with pytest.raises(TypeError, match="expected structure to end with"):
        preset(structure)(structure)
    with pytest.raises(TypeError, match=r"Options has \['depth'\], which"):
        preset(lambda key, dim: None)(mine)


USER = """
import jax
import numpyro_flows as nf

key = jax.random.key(0)
nf.realnvp(key, 2, depth=3, hidden=(8,), log_scale_bound=1.0).sample(key, (3,))
nf.augmented_cnf(key, 2, augment_dim=2, rtol=1e-3)
nf.residual_flow(key, 2, nf.transforms.Radial, inverse=False)
nf.realnvp(key, 2, depht=3)  # Unexpected keyword argument "depht" for "realnvp"
nf.nsf(key, 2, hidden=64)  # Argument "hidden" to "nsf" has incompatible type "int"
nf.iaf(key, 2, inverse=True)  # Unexpected keyword argument "inverse" for "iaf"
nf.planar(key, 2, permutation_seed=1)  # Unexpected keyword argument "permutation_seed"
nf.augmented_cnf(key, 2, rtol="small")  # Argument "rtol" to "augmented_cnf" has incompatible
nf.glow(key, (8, 8, 1), level=2)  # Unexpected keyword argument "level" for "glow"
"""


def test_type_checkers_find_wrong_options(tmp_path):
    """In a user's file, of the installed package: mypy reads such types only beside py.typed."""
    (tmp_path / "user.py").write_text(USER)
    # Others' packages would take a minute to read, and have no part in it.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = skip\n[mypy-numpyro_flows.*]\nfollow_imports = silent\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", "cache", "user.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(nf.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    errors = dict(re.findall(r"^user\.py:(\d+): error: (.*)$", found.stdout, re.MULTILINE))
    for number, line in enumerate(USER.splitlines(), 1):
        _, _, expected = line.partition("  # ")
        error = errors.pop(str(number), "")
        assert error.startswith(expected) if expected else not error, found.stdout + found.stderr
    assert not errors


def test_presets_are_functions_like_any_other(monkeypatch):
    assert pickle.loads(pickle.dumps(nf.realnvp)) is nf.realnvp
    assert nf.realnvp.__module__ == "numpyro_flows.recipes.coupling"
    # Without docstrings, as under `python -OO`.
    bare = inspect.unwrap(nf.radial)
    monkeypatch.setattr(bare, "__doc__", None)
    assert preset(nf.residual_flow)(bare).__doc__ is None


@pytest.mark.parametrize("recipe", [nf.planar, nf.radial, nf.sylvester, nf.cnf, nf.augmented_cnf])
def test_where_nothing_is_permuted_there_is_no_seed(recipe):
    with pytest.raises(TypeError, match="permutation_seed"):
        recipe(jax.random.key(0), 2, permutation_seed=1)


def test_guides_set_what_a_recipe_declares_and_nothing_else():
    def own(key, dim, *, inverse=3, trace="of sums", throw="far"):
        return inverse, trace, throw

    assert for_guide(own)(jax.random.key(0), 2) == (3, "of sums", "far")
    assert for_guide(partial(own, throw=1))(jax.random.key(0), 2) == (3, "of sums", 1)
    declared = in_guides(inverse=4, trace="exact")(own)
    assert for_guide(declared)(jax.random.key(0), 2) == (4, "exact", "far")
    assert for_guide(partial(declared, trace="mine"))(jax.random.key(0), 2) == (4, "mine", "far")
    assert declared(jax.random.key(0), 2) == (3, "of sums", "far")


@pytest.mark.parametrize(
    "recipe",
    [nf.autoregressive_flow, nf.nsf_ar, nf.residual_flow, *PRESETS[nf.residual_flow]],
)
def test_guides_ask_for_fast_sampling(recipe):
    assert for_guide(recipe).keywords == {"inverse": False}
