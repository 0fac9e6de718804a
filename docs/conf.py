"""The site: `make docs` builds it with sphinx, furo and MyST into build/docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

from mantrans.explain.page import TEXT, fresh, write

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


# An address on the reader's own page of a step; on the site it leads to a tiny model's, in a folder
# of its own, of the family that has the operation.
ADDRESS = re.compile(r"explain\.html(?:#(\w+)(?:/\w+)?)?")
LLAMA = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False, "n_kv_heads": 1}
STEPS: dict[str, dict[str, Any]] = {"gpt2": {}, "llama": LLAMA, "qwen3": {**LLAMA, "qk_norm": True}}
FAMILY = {"rms_norm": "llama", "rotary": "llama", "swiglu": "llama", "norm_rotary": "qwen3"}


def setup(app: Any) -> None:
    app.connect("doctree-resolved", without_links_to_sources)
    app.connect("doctree-resolved", with_links_to_steps)
    app.connect("build-finished", write_steps)
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


def with_links_to_steps(app: Any, doctree: nodes.document, page: str) -> None:
    for address in list(doctree.findall(nodes.literal)):
        if found := ADDRESS.fullmatch(address.astext()):
            folder = f"{'../' * page.count('/')}steps/{FAMILY.get(found[1], 'gpt2')}"
            link = nodes.reference("", "", address.deepcopy(), refuri=f"{folder}/{found[0]}")
            address.replace_self(link)


def write_steps(app: Any, failure: Exception | None) -> None:
    """The pages that the addresses lead to. Their links to derivations lead back to the site."""
    if failure is not None or app.builder.format != "html":
        return
    for name, shape in STEPS.items():
        page = write(fresh(**shape), TEXT, Path(app.outdir, "steps", name))
        html = page.read_text(encoding="utf-8")
        html = re.sub(r'"link": "[^"]*docs/gradients/(\w+)\.md"', _to_derivation, html)
        page.write_text(re.sub(r'"link": "(?!\.\./\.\./gradients/)[^"]*"', '"link": null', html))


def _to_derivation(link: re.Match[str]) -> str:
    return f'"link": "../../gradients/{link[1]}.html"'
