"""Settings of the site: `make docs` builds it, and executes every notebook that has changed."""

import hashlib
import os
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

HERE = Path(__file__).parent
ROOT = HERE.parent


def digest_of_the_code() -> str:
    """Of every file of the package, so that a change of it executes the notebooks again."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "numpyro_flows").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# What libraries say in notebooks and no reader can act on.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found,ignore:Creating legend with loc"

project = "numpyro_flows"
author = "The numpyro_flows developers"
copyright = "The numpyro_flows developers, Apache-2.0"
version = release = installed_version("numpyro_flows")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # nothing is loaded from elsewhere
    "sphinx_design",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb"}
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]

# The reference comes from the docstrings.
autosummary_generate = True
autosummary_generate_overwrite = True
autodoc_typehints = "none"  # the docstrings say shapes, which types do not
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
add_module_names = False

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

nb_execution_mode = os.environ.get("DOCS_EXECUTION", "cache")
nb_execution_cache_path = str(ROOT / ".cache" / "docs" / digest_of_the_code())
nb_execution_timeout = 900  # of a cell, on a busy machine
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/html", 0), ("html", "image/png", 5)]

html_theme = "furo"
html_title = f"numpyro_flows {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = True
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

suppress_warnings = ["mystnb.unknown_mime_type"]


def to_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links of the pages that are read in the repository too, to where the site has them."""
    source[0] = source[0].replace("](../benchmarks/README.md", "](benchmarks.md")


def by_last_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element
) -> Element | None:
    """Docstrings name what is in their own module; the site has it under its public name."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains["py"]
    found = {name for name in domain.objects if name.rpartition(".")[2] == node["reftarget"]}
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found.pop(), node, contnode)


def setup(app: Sphinx) -> dict[str, bool]:
    # ArviZ 0.23 warns on import, in any page that draws with it.
    warnings.filterwarnings("ignore", message=".*ArviZ is undergoing", category=FutureWarning)
    app.connect("source-read", to_pages)
    app.connect("missing-reference", by_last_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
