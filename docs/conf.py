"""How the pages are built: Sphinx, Markdown by MyST, the notebook as it was run, the API from docstrings."""

import os
import re
from importlib.util import find_spec

import duotone

# the extra brings JAX along; docstrings are the same on every backend
os.environ.setdefault("KERAS_BACKEND", "jax")

project = "Duotone"
author = "the Duotone authors"
version = release = duotone.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Duotone"
html_show_copyright = False

# what stands in single backticks in a docstring is code
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True

myst_heading_anchors = 3
# tests run the notebook; the pages show what it printed then
nb_execution_mode = "off"
suppress_warnings = ["myst.xref_missing"]


def _indent_blocks(app, what, name, obj, options, lines):
    """Have blocks of Markdown that docstrings hold, such as ```text, shown as they are."""
    inside = False
    for number, line in enumerate(lines):
        if re.match(r"\s*```", line):
            lines[number] = "" if inside else "::\n"
            inside = not inside
        elif inside:
            lines[number] = f"    {line}"


def _without_absent(app, docname, source):
    """Leave out the docstrings of duotone.jax and duotone.keras where their framework is not there to be imported."""
    for name in ("jax", "keras"):
        if find_spec(name) is None:
            # with its options, which are indented
            lines = rf"^\.\. auto\w+:: duotone\.{name}\..*\n(?:   .*\n)*"
            source[0] = re.sub(lines, "", source[0], flags=re.MULTILINE)


def setup(app):
    """Have Sphinx call what stands above."""
    app.connect("source-read", _without_absent)
    app.connect("autodoc-process-docstring", _indent_blocks)
