"""Every public name has a docstring that says what it needs to, and is in the site's reference."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import numpyro_flows as nf

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"

#: Modules that are files, and what is public in them.
FILES = {
    "nn": ("MLP", "ConcatSquash", "Embedding", "Parameters", "masked_product"),
    "dequantization": ("Dequantized", "noise_flow"),
    "io": ("register",),
}
FOLDERS = ("recipes", "transforms", "elementwise", "training", "infer", "diagnostics", "plot")


def public_names():
    """Objects by the name under which programs reach them first, ``realnvp`` or ``nn.MLP``."""
    candidates = {name: getattr(nf, name) for name in nf.__all__}
    for module in FOLDERS:
        folder = getattr(nf, module)
        names = getattr(folder, "__all__", [n for n in vars(folder) if not n.startswith("_")])
        candidates |= {f"{module}.{name}": getattr(folder, name) for name in names}
    for module, names in FILES.items():
        candidates |= {f"{module}.{name}": getattr(getattr(nf, module), name) for name in names}
    found = {}
    for name, value in candidates.items():
        is_ours = getattr(value, "__module__", "").startswith("numpyro_flows")
        if is_ours and callable(value) and value not in found.values():
            found[name] = value
    return found


PUBLIC = public_names()


#: What functions return, and what is implemented or inherited rather than called.
RESULTS = {
    "training.Ensemble",
    "training.FitResult",
    "infer.Evidence",
    "infer.FlowNUTSReport",
    "infer.GuideFit",
    "dequantization.Dequantized",
    "diagnostics.Check",
    "diagnostics.Report",
    "diagnostics.Shift",
    "diagnostics.Shifts",
    "diagnostics.TransformError",
    "diagnostics.Typicality",
}
ABSTRACT = {
    "FlowTransform",
    "elementwise.ElementwiseMap",
    "elementwise.Encoding",
    "training.Objective",
}


def is_options(value):
    """A ``TypedDict``, which type checkers read."""
    return hasattr(value, "__total__")


def parameters(value):
    """Names of the parameters, without those that are handed on to a model."""
    handed_on = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(value).parameters.values()
    return [p.name for p in found if p.kind not in handed_on]


def fields(value):
    """Of a named tuple, a dataclass or a module, with those that it inherits."""
    names = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", {})
    return set(names)


def refuses(value):
    """Whether the code of a function, or of a class's ``__init__``, raises or checks arguments."""
    function = inspect.unwrap(value.__init__ if inspect.isclass(value) else value)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):  # made by `dataclass`, or of a built-in class
        return False
    called = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    checks = [name for name in called if name.rpartition(".")[2].startswith("check_")]
    return bool(checks) or any(isinstance(node, ast.Raise) for node in ast.walk(tree))


def takes_arrays(value):
    signature = inspect.signature(value)
    kinds = [p.annotation for n, p in signature.parameters.items() if n not in ("key", "self")]
    return any("Array" in str(kind) for kind in kinds)


def missing(name, value):
    """What the docstring of a name lacks."""
    doc = inspect.getdoc(value) or ""
    if len(doc) < 20:
        yield "a docstring"
    if name in RESULTS:
        inherited = "".join(base.__doc__ or "" for base in value.__mro__)
        documented = set(re.findall(r":(?:ivar|param) (\w+):", inherited))
        if undocumented := sorted(fields(value) - documented):
            yield f"fields {undocumented}"
    if name in RESULTS | ABSTRACT or is_options(value):
        return
    documented = set(re.findall(r":param (\w+):", doc))
    if undocumented := [name for name in parameters(value) if name not in documented]:
        yield f"parameters {undocumented}"
    if ">>>" not in doc:
        yield "a doctest"
    if refuses(value) and ":raises" not in doc:
        yield "what it raises"
    if takes_arrays(value) and not re.search(r"shape|``\([^`]*\)``|as for|scalar|pytree", doc):
        yield "shapes"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstring(name):
    lacking = list(missing(name, PUBLIC[name]))
    assert not lacking, f"nf.{name}: its docstring lacks {', '.join(lacking)}"


def test_recipes_state_their_cost():
    recipes = {n: v for n, v in PUBLIC.items() if v.__module__.startswith("numpyro_flows.recipes.")}
    flows = [n for n, v in recipes.items() if not is_options(v) and "key" in parameters(v)]
    assert len(flows) >= 16
    silent = [n for n in flows if not re.search(r"[Cc]ost", inspect.getdoc(recipes[n]))]
    assert not silent


def test_the_reference_has_every_name():
    """Once each, and no other."""
    listed = []
    for page in REFERENCE.glob("*.rst"):
        lines = page.read_text().splitlines()
        prefix = ""
        for line in lines:
            if match := re.match(r"\.\. currentmodule:: numpyro_flows\.?(.*)", line):
                prefix = match[1] and f"{match[1]}."
            elif match := re.fullmatch(r"   ([A-Za-z_][\w.]*)", line):
                listed.append(prefix + match[1])
    assert sorted(listed) == sorted(PUBLIC)


def test_the_bibliography_has_every_source():
    known = set(re.findall(r"arXiv:([\d.]+\d)", (ROOT / "docs/references.bib").read_text()))
    pages = [path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts]
    cited = {
        number
        for path in [*(ROOT / "numpyro_flows").rglob("*.py"), *pages]
        for number in re.findall(r"arXiv:(\d{4}\.\d{4,5})", path.read_text())
    }
    assert len(cited) > 40
    assert cited <= known
