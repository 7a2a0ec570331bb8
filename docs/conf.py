"""Settings of the site: ``sphinx-build -W -b html docs docs/_build/html``.

Nothing is fetched, neither when it is built nor when it is read: no inventories of other sites, and
formulas are MathML. What is generated on the way goes to docs/generated.
"""

import os
import sys
from importlib.resources import files
from pathlib import Path

# Before NumPy is imported: threads slow down the small products of the examples, as perceptron.py
# says, which is imported too late for that.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))  # extension.py
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks

import nbnorm

project = "nbnorm"
author = project_copyright = "The nbnorm developers"
version = release = nbnorm.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_gallery.gen_gallery",
    "extension",
]
exclude_patterns = ["_build", "examples", "generated/speed.md"]

# Markdown as code hosts read it: $math$, ```math and #anchors of headings.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4

# The reference is the same whether or not hosts are installed.
autodoc_mock_imports = ["autograd", "mygrad", "onnx", "sklearn", "thinc", "torch"]
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc's sections say it better
autosummary_generate = True
numpydoc_show_class_members = False
default_role = "py:obj"
highlight_language = "none"  # where a block does not say
smartquotes = False  # options have two hyphens
templates_path = ["_templates"]

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "generated/examples",
    "filename_pattern": "plot_",  # the others are shown and not run
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "capture_repr": (),  # what is printed, and pictures
    "ignore_pattern": r"^(perceptron|runs)\.py$",  # what examples share, linked to in the header
    "copyfile_regex": r"(perceptron|runs)\.py$",
    "remove_config_comments": True,
    "min_reported_time": 60,
    "notebook_extensions": set(),
    "show_signature": False,
    "write_computation_times": False,
}

html_theme = "pydata_sphinx_theme"
html_title = project
html_math_renderer = "mathml"
html_show_sourcelink = False
# A font for formulas: not every system has one.
html_static_path = ["_static", str(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")]
html_css_files = ["site.css"]
html_sidebars = {page: [] for page in ("benchmarks", "experiments", "index", "quickstart")}
html_theme_options = {
    # In one row, with seven pages: an icon rather than a field to search in.
    "navbar_persistent": ["search-button"],
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 7,
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": False,
}
