"""The site: `make docs` builds it with sphinx, furo and MyST into build/docs."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

project = "mantrans"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
highlight_language = "text"
smartquotes = False  # they make one dash of the two in --resume
html_theme = "furo"
html_title = "mantrans"
html_show_copyright = False
html_static_path = ["style.css"]
html_css_files = ["style.css"]
exclude_patterns = ["figures"]
suppress_warnings = ["myst.xref_missing"]


def setup(app: Any) -> None:
    app.connect("doctree-resolved", without_links_to_sources)
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))


def inline_formula(page: Any, node: nodes.Element, display: str = "inline") -> None:
    """Writes MathML, which browsers show without a script from elsewhere."""
    page.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def formula(page: Any, node: nodes.Element) -> None:
    """A formula on its own line, which scrolls where it is wider than the page."""
    page.body.append('<div class="formula">')
    try:
        inline_formula(page, node, "block")
    finally:
        page.body.append("</div>")


def without_links_to_sources(app: Any, doctree: nodes.document, page: str) -> None:
    """Links to files outside docs/ are right in the repository; the site has no copy of them, and
    shows their names alone."""
    for link in list(doctree.findall(nodes.reference)):
        if "/" in link.get("refid", "") or link.get("refuri", "").startswith("#.."):
            link.replace_self(link.children)
