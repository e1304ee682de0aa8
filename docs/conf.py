"""Settings of Sphinx, which builds the site from these pages: see ci/docs."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "polars-async"
author = "the authors of polars-async"
release = version = version_of("polars-async")
html_title = f"polars-async {version}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["README.md"]

# Nothing is fetched when the site is built, nor when it is read.
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
templates_path: list[str] = []
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e99", "color-brand-content": "#0b6e99"},
    "dark_css_variables": {"color-brand-primary": "#5ec4ee", "color-brand-content": "#5ec4ee"},
}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# `names` in docstrings are links, where they name something public.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": True}
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 60

# A link to a class that does not exist is an error. What these name stands in other projects, or is
# a parameter, a type variable, or a value.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:obj", r"Reason"),  # where pytest_plugin, which is another module, names it
    (
        r"py:.*",
        r"(pl|polars|collections|concurrent|contextlib|asyncio|gevent|abc|os|enum|starlette)\..*",
    ),
    (
        r"py:(class|obj|data)",
        r"([a-z_]+|.*\bTs?|Client|Executor|PathLike|Query|QueryResult|Request|TracebackType)",
    ),
    (r"py:class", r"CollectorRegistry|MeterProvider|TracerProvider"),
    (
        r"py:class",
        r"signal\.Signals|(.*\.)?(Ahead|DeferringEngine|Failing|Progress|SimulatedFault)",
    ),
    (
        r"py:class",
        r"(.*\.)?(Engine(Request|Source)|ExecutorRequest|GpuPolicy|Query(Path|Source|State))",
    ),
]
