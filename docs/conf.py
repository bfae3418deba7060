"""The site's settings: ``python -m sphinx -W docs build/site`` builds it from the pages beside this file.

What lives here: Sphinx's settings. What lives elsewhere: what pages take from the bench's results, from the command line
and from drawings (``generated.py``), the drawings themselves (``pictures.py``), the tests that run the pages' code
(``tests/test_docs.py``) and check the site (``tests/test_site.py``).

Sphinx rather than MkDocs: its search needs no server, docstrings are read by a part of it, and a link that leads nowhere
is a warning. Pages stay Markdown, which is read where the source is.
"""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))  # the package is the installed one, with its native module

import fusionsum  # noqa: E402
from fusionsum.pipeline.charts import STYLE  # noqa: E402

project, version = "fusionsum", fusionsum.__version__
html_title = f"{project} {version}"
html_show_copyright = html_show_sphinx = html_copy_source = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]

html_theme = "furo"
html_static_path = [str(STYLE), "_static"]
html_css_files = [STYLE.name, "site.css"]
templates_path, exclude_patterns = [], ["_static"]

myst_heading_anchors = 3
smartquotes_action = "D"  # dashes; quotes stay as they are typed
highlight_language = "none"
pygments_dark_style = "github-dark"

default_role = "py:obj"  # docstrings put names between single backticks
add_module_names = False
autodoc_typehints = "none"  # the docstrings have them
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
