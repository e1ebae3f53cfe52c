"""Sphinx: pages in Markdown, the reference from docstrings and from the command line's own parsers."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "pmet_lightning"
version = release = version_of("pmet-lightning")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "commands"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
html_theme = "alabaster"
html_theme_options = {"page_width": "75em", "fixed_sidebar": True}
html_show_copyright = False
