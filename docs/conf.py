"""How the pages are built. Nothing here, and nothing in the pages, needs a network."""

from __future__ import annotations

from typing import Any

import polyak

project = "polyak"
author = "the authors of polyak"
project_copyright = "the authors of polyak"
version = release = polyak.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# Other pages include the tables and the report.
exclude_patterns = ["_build", "*-table.md", "ssl-report.md"]
html_theme = "furo"
html_title = f"polyak {release}"
html_show_sourcelink = False

# `x` in a docstring is code, and a link where x is documented here.
default_role = "py:obj"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

_COLON = "\ue000"


def setup(app: Any) -> None:
    """Keep napoleon from taking what precedes a colon in a property's docstring for its type."""

    def hide(
        app: Any, what: str, name: str, obj: object, options: object, lines: list[str]
    ) -> None:
        if what == "property":
            lines[:] = [line.replace(": ", f"{_COLON} ") for line in lines]

    def show(
        app: Any, what: str, name: str, obj: object, options: object, lines: list[str]
    ) -> None:
        lines[:] = [line.replace(_COLON, ":") for line in lines]

    app.connect("autodoc-process-docstring", hide, priority=400)  # napoleon comes at 500
    app.connect("autodoc-process-docstring", show, priority=600)
