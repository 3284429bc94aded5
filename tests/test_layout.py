"""The layout of the code: short files, imports that go down, nothing private or textual relied on.

No file is above 500 lines; imports go down one list; private names stay in their file, and no
decision is made by the text of an error.
"""

import ast
import itertools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import numpyro_flows as nf

ROOT = Path(__file__).parent.parent
PACKAGE = "numpyro_flows"
LONGEST = 500

#: Files and folders of the package: each imports those below it alone.
LAYOUT = (
    "plot",
    "infer",
    "training",
    "initialization",
    "dequantization",
    "forecasting",
    "recipes",
    "diagnostics",
    "augmented",
    "mixed",
    "distribution",
    "transforms",
    "transform",
    "elementwise",
    "convnet",
    "nn",
    "solve",
    "coordinates",
    "parts",
    "io",
    "checks",
    "compilation",
)

#: Files of a folder that others beside them may import, if those stand above them or are not
#: listed; no other file is imported from beside it. Why a folder has any:
SIBLINGS = {
    # A map is written in terms of what a map is.
    "elementwise": ("base",),
    # An augmented flow draws its noise from a conditional Gaussian.
    "recipes": ("coupling",),
    # Data are checked and standardised, then an objective is followed by the one loop.
    "training": (
        "fit",
        "epochs",
        "ensemble",
        "stream",
        "tasks",
        "standardize",
        "columns",
        "data",
        "batches",
        "checkpoint",
        "objectives",
        "loop",
        "mesh",
        "processes",
    ),
    # A likelihood ratio is a difference of bits.
    "diagnostics": ("bits",),
    # Inference goes in steps, from a model's arguments and sites to a guide, its fit and a sampler.
    "infer": (
        "pymc_models",
        "kernels",
        "learning",
        "evidence",
        "fit",
        "pilots",
        "train",
        "trainers",
        "nonfinite",
        "export",
        "fisher",
        "reparam",
        "importance",
        "guides",
        "elbo",
        "guide_flow",
        "params",
        "maps",
        "propriety",
        "recentre",
        "setup",
        "latent_space",
        "preconditioner",
        "normals",
        "centring",
        "supports",
        "density",
        "traced",
        "schedule",
        "log_density_model",
        "arguments",
    ),
    # A kernel starts chains and reports its run.
    "infer.kernels": ("state", "starts", "report"),
}

#: The one file that may reach into NumPyro's private parts.
INSIDE_NUMPYRO = "numpyro_flows/infer/_numpyro.py"
#: Methods of named tuples, which have an underscore so that they do not clash with fields.
OF_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


def files(*folders):
    """Paths below the root, as in the tables above, and the syntax trees of the files."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


CODE = files(PACKAGE)
SCRIPTS = files("examples", "benchmarks")


def module_of(path):
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in CODE}


def imports_of(path, tree):
    """Modules of the package that a file imports anywhere, functions included."""
    module = module_of(path)
    package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == PACKAGE:
                    yield alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*(parts if node.level else []), *filter(None, [node.module])])
            if source.partition(".")[0] != PACKAGE:
                continue
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if name in MODULES else source


GRAPH = {module_of(path): set(imports_of(path, tree)) for path, tree in CODE.items()}


def place(module):
    """The entry of the layout that a module belongs to; the package's own text is above all."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def apart(module, imported):
    """The innermost folder of two modules, and their paths inside of it."""
    one, other = module.split(".")[1:], imported.split(".")[1:]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    depth = len([*same])
    return ".".join(one[:depth]), one[depth:], other[depth:]


def is_downwards(module, imported):
    upper, lower = place(module), place(imported)
    if upper != lower:
        order = ("", *LAYOUT)
        return order.index(upper) < order.index(lower)
    if MODULES[module].endswith("__init__.py"):
        return imported.startswith(module + ".")
    # The folder that both are in, and what each is called there.
    folder, above, below = apart(module, imported)
    if not below:  # the folder's own ``__init__``
        return False
    above, below = above[0], below[0]
    order = SIBLINGS.get(folder, ())
    if below not in order:
        return below.startswith("_")
    return above not in order or order.index(above) < order.index(below)


def test_every_file_has_its_place():
    assert {place(module) for module in MODULES} == {"", *LAYOUT}
    for folder, names in SIBLINGS.items():
        assert {f"{PACKAGE}.{folder}.{name}" for name in names} <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_go_down(module):
    wrong = sorted(name for name in GRAPH[module] if not is_downwards(module, name))
    assert not wrong, f"{module} imports {wrong}, which are not below it"


def test_there_is_no_cycle():
    """Of files; a folder's ``__init__`` counts as what it imports."""
    left = {module: imports & MODULES.keys() for module, imports in GRAPH.items()}
    while free := {module for module, imports in left.items() if not imports & left.keys()}:
        left = {module: imports for module, imports in left.items() if module not in free}
    assert not left, f"cycle among {sorted(left)}"


def test_few_names_are_public():
    """What most programs type, and all that the README does; each is listed once, and is there."""
    assert len(nf.__all__) == len(set(nf.__all__)) <= 58
    assert all(hasattr(nf, name) for name in nf.__all__)
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"\bnf\.(\w+)", readme)) <= set(nf.__all__)


def test_files_are_short():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for folder in (PACKAGE, "tests", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert not {path: lines for path, lines in lengths.items() if lines > LONGEST}


def own_names(tree):
    """Private names that a file defines: functions, classes, fields, and attributes of ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def private_reaches(tree):
    """Uses of private names that belong to another file: ``x._y``, and ``from m import _y``."""
    own = {*own_names(tree), *OF_TUPLES}

    def is_private(name):
        return name.startswith("_") and not name.startswith("__") and name not in own

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.module is not None:  # a file named `_x.py` is private to its folder alone
                yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            value = node.value
            by_name = isinstance(value, ast.Name) and value.id in ("self", "cls")
            by_super = isinstance(value, ast.Call) and ast.unparse(value.func) == "super"
            if not (by_name or by_super):
                yield ast.unparse(node)


TEXTUAL = {"startswith", "endswith", "find", "index", "count", "match", "search", "fullmatch"}


def decisions_by_text(tree):
    """Comparisons, searches and matches of an error's text where the error is handled."""

    def mentions(node, names):
        """Whether an expression holds ``str(error)``, ``repr(error)``, ``error.args`` or such."""
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id in names[1:]:
                return True
            if isinstance(part, ast.Attribute) and part.attr in ("args", "message", "msg"):
                return isinstance(part.value, ast.Name) and part.value.id == names[0]
            if isinstance(part, ast.Call) and ast.unparse(part.func) in ("str", "repr", "format"):
                return any(isinstance(arg, ast.Name) and arg.id == names[0] for arg in part.args)
        return False

    for handler in ast.walk(tree):
        if not isinstance(handler, ast.ExceptHandler) or handler.name is None:
            continue
        names = [handler.name]
        inside = list(itertools.chain.from_iterable(map(ast.walk, handler.body)))
        for node in inside:
            if isinstance(node, ast.Assign) and mentions(node.value, names):
                names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        for node in inside:
            is_search = (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in TEXTUAL
            )
            if (isinstance(node, ast.Compare) or is_search) and mentions(node, names):
                yield ast.unparse(node)


def count(rule, trees):
    found = Counter({path: len(list(rule(tree))) for path, tree in trees.items()})
    return {path: number for path, number in found.items() if number}


def test_what_is_private_stays_in_its_file():
    trees = {path: tree for path, tree in (CODE | SCRIPTS).items() if path != INSIDE_NUMPYRO}
    assert count(private_reaches, trees) == {}


def test_no_decision_is_made_by_the_text_of_an_error():
    assert count(decisions_by_text, CODE | SCRIPTS) == {}


def test_the_rules_see_what_they_forbid():
    bad = ast.parse(
        "from m import _a\n"
        "def f(other, self):\n"
        "    other._b, self.part._c, self._d, super()._e, other.__dict__, other._replace()\n"
        "    other._f = 1\n"
        "    other._f\n"
        "try:\n    pass\n"
        "except ValueError as error:\n"
        "    text = repr(error)\n"
        "    'a' in str(error), text == 'b', re.search('c', text), error.args[0] == 1\n"
        "    message = f'{error}', type(error) is KeyError\n"
    )
    assert list(private_reaches(bad)) == ["_a", "other._b", "self.part._c"]
    assert len(list(decisions_by_text(bad))) == 4
    assert not is_downwards(f"{PACKAGE}.checks", f"{PACKAGE}.transform")
    assert not is_downwards(f"{PACKAGE}.transforms.radial", f"{PACKAGE}.transforms.planar")
    assert not is_downwards(f"{PACKAGE}.transforms.radial", f"{PACKAGE}.transforms")
    assert is_downwards(f"{PACKAGE}.elementwise.affine", f"{PACKAGE}.elementwise.base")
    assert not is_downwards(f"{PACKAGE}.elementwise.base", f"{PACKAGE}.elementwise.affine")


def test_what_is_slow_to_import_waits_for_its_use():
    code = "import sys, numpyro_flows; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {"arviz", "blackjax", "diffrax", "funsor", "matplotlib", "scipy.optimize", "scipy.stats"}
    assert not slow & set(done.stdout.split())
