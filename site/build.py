"""`make site`: the book as a static site, from notebooks with their stored outputs. Runs no notebook and needs no network.

Gathers pages under _build/source (notebooks, hand-written pages, and those made from cards, docstrings and measured costs) and hands them to Sphinx; the site
lies in _build/html and opens from there without a server.
"""
import json
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import api
import gallery
import notebooks
import widgets

HERE = Path(__file__).resolve().parent
ROOT, SOURCE, HTML, DOCTREES = HERE.parent, *(HERE / "_build" / name for name in ("source", "html", "doctrees"))
WRITTEN, NEW = set(), set()
READERS = {"who trains language models by reinforcement learning": ("03_dsd", "08_objective", "12_trl"),
           "from dynamical systems": ("01_koopman", "04_hidden", "faithfulness"),
           "student": ("00_dynamics", "07_grpo", "11_train")}


def write(name: str, content: str | bytes):
    "A file among the sources; one that is there already with the same content keeps its date, so that Sphinx need not read it again."
    path, content = SOURCE / name, content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists(): NEW.add(path)
    if path in NEW or path.read_bytes() != content: path.write_bytes(content)
    WRITTEN.add(path)


def forget():
    "Remove what an earlier build left and this one did not write; where a page has come or gone, others may link to it: begin anew."
    gone = [p for p in SOURCE.rglob("*") if p.is_file() and p not in WRITTEN]
    for path in gone: path.unlink()
    if gone or NEW:
        for folder in (HTML, DOCTREES): shutil.rmtree(folder, ignore_errors=True)


def settings() -> dict:
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def book() -> list[Path]:
    "All notebooks but the first page."
    return sorted(p for p in (ROOT / "nbs").glob("**/*.ipynb") if p.stem != "index" and ".ipynb_checkpoints" not in p.parts)


def heading(path: Path) -> tuple[str, str]:
    "A notebook's title and the line under it."
    title, quote = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).split("\n> ")
    return title.strip().removeprefix("# "), quote.split("\n")[0]


def minutes(costs: dict, *names: str) -> str:
    "The measured time of running notebooks, in words."
    seconds = sum(costs[n]["seconds"] for n in names)
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def course_page(costs: dict) -> str:
    "The notebooks in reading order, with what each of them costs to run."
    groups = {"The course": [p for p in book() if p.parent.name == "nbs" and p.stem[:2].isdigit()], "Tools of the book": [p for p in book() if p.parent.name == "nbs" and not p.stem[:2].isdigit()],
              "The paper, figure by figure": [p for p in book() if p.parent.name == "paper"]}
    parts = ["# The notebooks\n\nEach builds one idea, from its equation to tested code. In the order in which the ideas need each other; times are measured."]
    for name, paths in groups.items():
        lines = [[f"[{heading(p)[0]}]({p.relative_to(ROOT)})", heading(p)[1], minutes(costs, p.stem) if p.stem in costs else "not measured"] for p in paths]
        tree = "\n".join(str(p.relative_to(ROOT).with_suffix("")) for p in paths)
        parts.append(f"## {name}\n\n{gallery.table(['notebook', 'what it shows', 'time to run'], lines)}\n\n```{{toctree}}\n:hidden:\n:caption: {name}\n\n{tree}\n```")
    return "\n\n".join(parts) + "\n"


def start_page(costs: dict) -> str:
    "Three notebooks by background, with the measured time that running them takes."
    paths, parts = {p.stem: p for p in book()}, [(HERE / "pages" / "start.md").read_text(encoding="utf-8")]
    for reader, names in READERS.items():
        lines = [f"{i}. [{heading(paths[n])[0]}]({paths[n].relative_to(ROOT)}): {heading(paths[n])[1]} *{minutes(costs, n)}*" for i, n in enumerate(names, 1)]
        parts.append(f"## {reader[0].upper() + reader[1:]}\n\n" + "\n".join(lines) + f"\n\nRunning all three takes {minutes(costs, *names)} on {costs[names[0]]['hardware']}.")
    return "\n\n".join(parts) + "\n"


def gather():
    "Every page, into the source folder."
    repository, costs = settings()["git_url"], json.loads((ROOT / "data" / "notebooks.json").read_text())
    for path in (*(ROOT / "figures").glob("*.png"), *(ROOT / "figures").glob("*.json")): write(f"figures/{path.name}", path.read_bytes())
    write("CITATION.cff", (ROOT / "CITATION.cff").read_bytes())
    for path in book(): write(path.relative_to(ROOT), notebooks.notebook_page(path, repository))
    first = notebooks.sections(notebooks.links((ROOT / "README.md").read_text(encoding="utf-8"), repository))
    first |= {"disagrees": gallery.disagreements(gallery.cards(ROOT / "figures")), "tuning": gallery.tuning(ROOT / "data" / "tuning.csv"), "oracle": (ROOT / "figures" / "signals_tuning.md").read_text(encoding="utf-8"), "first": gallery.first_signals(ROOT / "data" / "signals_first.csv")}
    for page in (HERE / "pages").glob("*.md"):
        if page.stem not in ("start", "api"): write(page.name, filled(page.read_text(encoding="utf-8"), first))
    write("course.md", course_page(costs))
    write("start.md", start_page(costs))
    gather_gallery(repository)
    gather_api()
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"): write(name.lower(), notebooks.links((ROOT / name).read_text(encoding="utf-8"), repository))
    widgets.write_data(ROOT / "data", HERE / "_build" / "data")


def filled(page: str, sections: dict[str, str]) -> str:
    "A hand-written page with sections of the README in the places marked <<heading>>."
    return re.sub(r"<<(.*?)>>", lambda m: sections[m[1]], page)


def gather_gallery(repository: str):
    "The gallery, a page a card, thumbnails, and the recorded runs."
    figures = ROOT / "figures"
    found = gallery.cards(figures)
    for slug, card in found.items():
        if (figures / f"{slug}.png").exists(): write(f"thumbs/{slug}.png", gallery.thumbnail(figures / f"{slug}.png"))
        write(f"gallery/{slug}.md", gallery.card_page(slug, card, figures))
    write("gallery.md", gallery.gallery_page(found, figures))
    write("runs.md", gallery.runs_page(ROOT / "data" / "runs", repository))


def gather_api():
    "A page a module, in the order of the course."
    pages = {}
    for path in sorted((ROOT / "relax").glob("[!_]*.py")):
        made_by = next(line for line in path.read_text(encoding="utf-8").splitlines() if "File to edit: " in line)
        pages[path.stem] = made_by.split("../")[1].rstrip(".")
        write(f"api/{path.stem}.md", api.module_page(path, pages[path.stem]))
    names = sorted(pages, key=lambda n: (not Path(pages[n]).stem[:2].isdigit(), pages[n]))
    lines = [[f"[relax.{n}](api/{n}.md)", api.first_line(ROOT / "relax" / f"{n}.py")] for n in names]
    tree = "\n".join(f"api/{n}" for n in names)
    write("api.md", (HERE / "pages" / "api.md").read_text(encoding="utf-8") + f"\n{gallery.table(['module', 'what it is'], lines)}\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n")


def main() -> int:
    from sphinx.cmd.build import main as sphinx
    gather()
    forget()
    status = sphinx(["-q", "-b", "html", "-c", str(HERE), "-d", str(DOCTREES), "-j", "2", *sys.argv[1:], str(SOURCE), str(HTML)])
    if not status: print(f"The site lies in {HTML.relative_to(ROOT)}: open {(HTML / 'index.html').relative_to(ROOT)} in a browser.")
    return status


if __name__ == "__main__": sys.exit(main())
