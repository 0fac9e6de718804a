"""The site: `make docs` builds it with sphinx, furo and MyST into build/docs."""

project = "mantrans"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "mantrans"
exclude_patterns = ["figures"]
# Links to source files are right in the repository; the site has no copy of the sources.
suppress_warnings = ["myst.xref_missing"]
