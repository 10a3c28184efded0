"""Sphinx: `make docs` builds pages and API reference into runs/docs, strict about links, names of this project and docstrings.

Docstrings are read as reStructuredText. A name of this project in backticks becomes a link, and must exist if it is written in full.
"""

project = "mess_tf"
extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?s)(?!(mess_tf|mess_runtime|android_bench)\.).*"),  # other projects, whose references would have to be fetched
    ("py:.*", r".*\.(T|Choice|_\w+)"),  # type variables and private types in signatures
]
# Attributes that a docstring lists, such as `sha256`, are looked for everywhere: several classes may have one of the name.
suppress_warnings = ["ref.python"]

# One page per module, written into docs/api before each build.
apidoc_modules = [
    {"path": f"../{path}", "destination": f"api/{path.rpartition('/')[2]}"} for path in ("mess_tf", "tflite/mess_runtime", "android_bench")
]
apidoc_separate_modules = True
apidoc_module_first = True
apidoc_automodule_options = {"members"}
exclude_patterns = ["api/*/modules.rst"]
autodoc_member_order = "bysource"
napoleon_use_ivar = True
add_module_names = False

html_theme = "furo"
html_title = "mess_tf"
html_show_sphinx = False
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False


def setup(app):
    """Leaves out the fields of named tuples, whose own docstrings say "Alias for field number 0"; the class documents them."""
    app.connect("autodoc-skip-member", lambda app, what, name, member, skip, options: skip or type(member).__name__ == "_tuplegetter")
