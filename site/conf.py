"Sphinx configuration of the book; `make site` runs it on the pages that build.py has gathered."
import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # equations
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(HERE.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project, author, release = settings["title"], settings["author"], settings["version"]
project_copyright = settings["copyright"]
language = "en"
extensions = ["myst_nb", "equations"]
html_math_renderer = "mathml"

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # no page loads anything from the network
nb_mime_priority_overrides = [("html", "text/markdown", 0), ("html", "image/png", 10)]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3
myst_heading_slug_func = "notebooks.slug"
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]

html_theme = "furo"
html_title = "relax"
html_static_path = [str(HERE / "static"), str(HERE / "_build" / "data")]
html_css_files = ["site.css"]
html_js_files = [("keyboard.js", {"defer": "defer"})]
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it is fetched, which a page opened from the disk may not do
html_show_sphinx = False
html_theme_options = {"source_repository": settings["git_url"], "source_branch": settings["branch"], "top_of_page_buttons": []}
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"


def level(app, page, template, context, doctree):
    "The theme calls its captions headings, but of no level; screen readers want one."
    tree = context.get("furo_navigation_tree")
    if tree: context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app): app.connect("html-page-context", level, priority=900)
