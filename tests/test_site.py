"The site: equations, pages and recorded data without a browser; links, search, controls and accessibility with one (`make site-test`)."
import html
import importlib
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "site" / "_build" / "html"
NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def room(name: str):
    "A module of site/, which is no package: what builds the book is not part of the library."
    if str(ROOT / "site") not in sys.path: sys.path.append(str(ROOT / "site"))
    return importlib.import_module(name)


# Without a browser.

def equations(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "markdown": continue
        text = re.sub(r"```.*?```|`[^`]*`", "", "".join(cell["source"]), flags=re.S)
        yield from ((b or i) for b, i in re.findall(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)", text, flags=re.S))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_equations_become_mathml(notebook):
    pytest.importorskip("latex2mathml")
    for latex in equations(notebook): assert "\\" not in room("equations").mathml(latex), latex


def test_letters_of_other_alphabets():
    pytest.importorskip("latex2mathml")
    text = html.unescape(room("equations").mathml(r"\mathbb E\mathcal{L}\mathbb{R}\mathbb 1|x|"))
    assert all(letter in text for letter in "𝔼ℒℝ𝟙") and text.count('stretchy="false"') == 2 and "mathvariant" not in text


def test_notebook_page_drops_housekeeping_and_keeps_the_rest():
    page = json.loads(room("notebooks").notebook_page(ROOT / "nbs" / "03_dsd.ipynb", "https://example.org/r"))
    code = ["".join(c["source"]) for c in page["cells"] if c["cell_type"] == "code"]
    assert not any("#|" in c or "find_spec" in c for c in code) and any("def dsd(" in c for c in code)
    text = "\n".join("".join(c["source"]) for c in page["cells"] if c["cell_type"] == "markdown")
    assert "*Measured: 03_dsd: " in text and "colab-badge" not in text and "[Open in Colab](" in text
    pictures = [c for c in page["cells"] if c["cell_type"] == "code" and any("image/png" in o.get("data", {}) for o in c["outputs"])]
    assert pictures and all(len(c["metadata"]["mystnb"]["image"]["alt"]) > 30 for c in pictures)


def test_links_into_the_repository():
    links = room("notebooks").links
    assert links("[a](../data/bench.json) [b](03_dsd.ipynb)", "https://x.org/r") == "[a](https://x.org/r/blob/main/data/bench.json) [b](03_dsd.ipynb)"


@pytest.mark.parametrize("module", sorted(p.stem for p in (ROOT / "relax").glob("[!_]*.py")))
def test_api_page_has_every_public_name(module):
    page = room("api").module_page(ROOT / "relax" / f"{module}.py", "nbs/x.ipynb")
    public = importlib.import_module(f"relax.{module}").__all__ if module not in ("trl", "gpu") else []
    assert all(re.search(rf"::\{{py:(function|class|data)\}} {re.escape(n)}\b", page) for n in public)


def test_docstring_as_markdown():
    assert room("api").prose("Takes `x_t` and a*b.\nmask: (B, T), <true>.") == "Takes `x_t` and a\\*b.\\\nmask: (B, T), \\<true\\>."


def test_methods_added_later_are_shown():
    page = room("api").module_page(ROOT / "relax" / "dictionary.py", "nbs/02_dictionary.ipynb")
    assert "{py:method} fit(" in page and "{py:method} save_pretrained(" in page


def test_every_card_has_a_page_with_runs_and_provenance():
    gallery, figures = room("gallery"), ROOT / "figures"
    for slug, card in gallery.cards(figures).items():
        page = gallery.card_page(slug, card, figures)
        assert card["notebook"] in page and all(sha in page for sha in card["runs"].values())
        assert page.count("../runs.md#") == len({gallery.arm(r) for r in card["runs"]})


def test_colab_cell_and_badge_are_in_place():
    colab = room("colab")
    wrong = [p.name for p in NOTEBOOKS if colab.stamped(p) != p.read_text(encoding="utf-8")]
    assert not wrong, f"run `python site/colab.py`: {wrong}"


def test_addresses_come_from_settings():
    address, colab = room("colab").repository(), room("colab")
    assert address in (ROOT / "CITATION.cff").read_text() and all(colab.badge(p) in p.read_text(encoding="utf-8") for p in NOTEBOOKS)


def test_explorer_shows_what_the_package_computes():
    "Some cells of the record, computed again."
    explorer, torch_threads = room("explorer"), torch.get_num_threads()
    recorded = json.loads((ROOT / "data" / "site" / "explorer.json").read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    source = explorer.system_source(*explorer.SYSTEMS["spread"])
    found = explorer.dictionary(source, 3)
    for name in ("robust", "paper", "authors"):
        for i, ridge in ((0, None), (3, 0.1)):
            now, then = explorer.cell(source.shown[:, :128].double(), found, name, ridge), recorded["sources"]["spread"]["cells"][f"{name}/3/{i}/128"]
            assert now[0] == pytest.approx(then[0], rel=0.02, abs=1e-4) and now[1:] == pytest.approx(then[1:], abs=10)
    torch.set_num_threads(torch_threads)


def test_explorer_has_every_choice():
    explorer = room("explorer")
    recorded = json.loads((ROOT / "data" / "site" / "explorer.json").read_text(encoding="utf-8"))
    for source in recorded["sources"].values():
        assert len(source["cells"]) == 3 * len(explorer.OBSERVABLES) * len(explorer.RIDGES) * len(source["lengths"])
        assert len(source["path"]) >= 2 * source["lengths"][-1]


def test_replay_belongs_to_the_recorded_runs():
    from relax.record import Run, fingerprint
    recorded = json.loads((ROOT / "data" / "site" / "replay.json").read_text(encoding="utf-8"))
    assert {Run(i).id.split("-")[2] for i in recorded["runs"]} == {"grpo", "uniform_kl", "half_lr", "relax"}  # the controls, and what they are to judge
    for run_id, run in recorded["runs"].items():
        assert run["sha256"] == fingerprint(Run(run_id)) and run["largest relative difference of a metric"] == 0
        assert "0" in run["looks"] and len(run["looks"]) > 1


# With the built site, and a browser.

class Page(HTMLParser):
    "What a page refers to, and the anchors that it has."

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.unnamed = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        self.links += [a[k] for k in ("href", "src") if a.get(k)]
        if tag == "img" and not a.get("alt"): self.unnamed.append(a.get("src"))


@pytest.fixture(scope="module")
def pages():
    if not (HTML / "index.html").exists(): pytest.skip("no site: run `make site`")
    return {p: Page(p) for p in sorted(HTML.rglob("*.html")) if "_static" not in p.parts}


@pytest.mark.browser
def test_internal_links_and_images_resolve(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.exists(): broken.append((path.name, link))
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids: broken.append((path.name, link))
    assert not broken, broken


@pytest.mark.browser
def test_pictures_have_words_and_nothing_comes_from_the_network(pages):
    for path, page in pages.items():
        assert not page.unnamed, (path, page.unnamed)
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]*src=\"https?://|<link[^>]*stylesheet[^>]*href=\"https?://", text), path


@pytest.mark.browser
def test_pages_are_light(pages):
    for path, page in pages.items():
        own = {(path.parent / unquote(urlsplit(link).path)).resolve() for link in page.links if re.search(r"\.(png|svg|js|css|woff2)(\?|$)", link) and not urlsplit(link).scheme}
        size = path.stat().st_size + sum(p.stat().st_size for p in own if p.exists())
        assert size < 2e6, f"{path.relative_to(HTML)}: {size / 1e6:.1f} MB"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium: pytest.skip("no chromium: install the package of that name")
    if not (HTML / "index.html").exists(): pytest.skip("no site: run `make site`")
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser):
    "Opens a page of the site from the disk, offline; fails the test for whatever the console complains of."
    complaints, contexts = [], []

    def open_page(name, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto((HTML / name).as_uri())
        return page

    yield open_page
    for context in contexts: context.close()
    assert not complaints, complaints


PAGES = ["index.html", "start.html", "explorer.html", "replay.html", "gallery.html", "gallery/fig03.html", "nbs/03_dsd.html", "nbs/explore.html", "api/dsd.html", "glossary.html"]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_accessible(visit, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(visit(name, scheme=scheme), options={"preload": False, "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}).response["violations"]
    assert not found, [(v["id"], v["help"], [n["html"][:160] for n in v["nodes"][:3]]) for v in found]


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_fits_a_phone(visit, name):
    page = visit(name, width=390)
    folder = HTML.parent / "screenshots"
    folder.mkdir(exist_ok=True)
    page.screenshot(path=folder / f"{name.replace('/', '-')}.phone.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_search_finds_leverage(visit):
    page = visit("index.html")
    page.locator("input[name=q]").first.fill("leverage")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    found = page.locator("#search-results li > a").evaluate_all("links => links.map(a => a.href)")
    assert any("03_dsd.html" in link for link in found) and any("glossary.html" in link for link in found)


def state(page, root): return page.locator(root).inner_html()


@pytest.mark.browser
@pytest.mark.parametrize("control, keys", [("ex-source", "ArrowDown"), ("ex-estimator", "ArrowDown"), ("ex-m", "ArrowRight"), ("ex-ridge", "ArrowRight"), ("ex-length", "ArrowLeft")])
def test_explorer_reacts_to_each_control(visit, control, keys):
    "By the keyboard alone: DSD and the picture of the eigenvalues change."
    page = visit("explorer.html")
    before = page.locator("#explorer .number").inner_text(), page.locator("#explorer figure:nth-of-type(2) svg").inner_html()
    page.locator(f"#{control}").focus()
    page.keyboard.press(keys)
    after = page.locator("#explorer .number").inner_text(), page.locator("#explorer figure:nth-of-type(2) svg").inner_html()
    assert before[0] != after[0] and before[1] != after[1]


@pytest.mark.browser
def test_explorer_shows_the_record(visit):
    recorded = json.loads((ROOT / "data" / "site" / "explorer.json").read_text(encoding="utf-8"))
    page = visit("explorer.html")
    for source in recorded["sources"]:
        page.select_option("#ex-source", source)
        for estimator in ("robust", "paper", "authors"):
            page.select_option("#ex-estimator", estimator)
            length = int(page.locator("output[for=ex-length]").inner_text().split()[0])
            m = int(page.locator("output[for=ex-m]").inner_text())
            dsd = recorded["sources"][source]["cells"][f"{estimator}/{m}/0/{length}"][0]
            assert float(page.locator("#explorer .number").inner_text().split("=")[1]) == dsd
            assert page.locator("#explorer tbody tr").count() == m
            assert page.locator("#explorer figure svg[aria-label]").count() == 3


@pytest.mark.browser
def test_replay_moves(visit):
    page = visit("replay.html")
    seen = set()
    for _ in range(3):
        seen.add((page.locator("#replay .number").inner_text(), page.locator("#replay .words").inner_text()))
        page.locator("#re-step").focus()
        page.keyboard.press("End" if len(seen) == 2 else "ArrowRight")
    assert len(seen) == 3
    assert len(set(page.locator("#re-run option").all_inner_texts())) == 4 and "GRPO, half the learning rate" in page.locator("#re-run").inner_text()
    for control in ("re-run", "re-problem"):
        before = state(page, "#replay")
        page.locator(f"#{control}").focus()
        page.keyboard.press("ArrowUp" if page.locator(f"#{control}").evaluate("s => s.selectedIndex") else "ArrowDown")
        assert state(page, "#replay") != before
    page.locator("#replay button").focus()
    page.keyboard.press("Enter")
    assert page.locator("#replay button").inner_text() == "Pause"


@pytest.mark.browser
def test_pictures_of_pages_for_the_eye(visit):
    "Screenshots, kept out of git; looked at by people."
    folder = HTML.parent / "screenshots"
    folder.mkdir(exist_ok=True)
    for name in PAGES:
        for scheme in ("light", "dark"):
            visit(name, scheme=scheme).screenshot(path=folder / f"{name.replace('/', '-')}.{scheme}.png", full_page=name in ("explorer.html", "replay.html", "gallery.html"))
