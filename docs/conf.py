"""The site of these pages and of the docstrings, which ``make docs`` builds in build/site.

The source folder is the root of the repository, so that a relative link means the same on the site and on a forge.
"""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

import topk_fast

project = "topk_fast"
version = release = topk_fast.__version__
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
nitpicky = True  # a reference that leads nowhere is a warning, which fails the build
nitpick_ignore_regex = [("py:.*", r"torch\..*"), ("py:.*", r"collections\..*")]  # their documentation is elsewhere
nitpick_ignore = [("py:class", "topk_fast.nn.Loss")]  # the annotation of a criterion, which the text describes

myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
napoleon_google_docstring, napoleon_numpy_docstring = True, False
add_module_names = False
toc_object_entries = False

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"topk_fast {version}"
html_show_copyright = html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}  # there is no address of the sources to view or edit
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "to_front_page.html"}
templates_path = ["."]
html_math_renderer = "mathml"


def show_formula(self, node):
    """MathML: browsers lay it out themselves, without a script from elsewhere."""
    is_block = node.tagname == "math_block"
    formula = convert(node.astext(), display="block" if is_block else "inline")
    self.body.append(f'<div class="math">{formula}</div>' if is_block else formula)
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(show_formula, None), block_renderers=(show_formula, None))
