"""Put the Colab badge and the first cell into every notebook: `python site/colab.py`. Changes nothing where they are as they should be.

The repository's address is `git_url` in settings.ini and nowhere else by hand.
"""
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BADGE = re.compile(r"\n*\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)\n*")
MARK = "# On Colab this fetches relax"
#: What a notebook mentions, and the extra that it needs for it.
EXTRAS = {"trl": r"relax\.trl|relax\.gpu|from trl|import trl", "gpu": r"relax\.gpu|bitsandbytes", "eval": r"relax\.benchmarks|math_verify|reasoning_gym"}


def repository() -> str:
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["git_url"]


def badge(path: Path) -> str:
    where = repository().removeprefix("https://github.com/")
    return (f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
            f"(https://colab.research.google.com/github/{where}/blob/main/{path.relative_to(ROOT)})")


def first_cell(cells: list[dict]) -> str:
    "The code of the first cell: gets what is missing, and nothing where relax can be imported."
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    extras = ",".join(name for name, pattern in EXTRAS.items() if re.search(pattern, code))
    return f'''#| hide
{MARK} with its recorded runs, once. Where relax is installed it does nothing.
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("relax") is None:
    folder = Path("relax-repository").resolve()
    if not folder.exists(): subprocess.run(["git", "clone", "-q", "--depth", "1", "{repository()}", str(folder)], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"{{folder}}{f'[{extras}]' if extras else ''}"], check=True)
    sys.path.insert(0, str(folder))'''


def with_badge(title: str, path: Path) -> str:
    "The first Markdown cell with the badge under title and quote."
    text = BADGE.sub("\n\n", title, count=1)
    head = re.match(r"# .*(?:\n+> .*)?", text)[0]
    return f"{head}\n\n{badge(path)}\n\n{text[len(head):].lstrip()}".rstrip()


def stamped(path: Path) -> str:
    "The notebook as it should be, as JSON in nbdev's spelling."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    title, *rest = notebook["cells"]
    rest = [c for c in rest if MARK not in "".join(c["source"])]
    title["source"] = with_badge("".join(title["source"]), path).splitlines(keepends=True)
    first = {"cell_type": "code", "execution_count": None, "id": "", "metadata": {}, "outputs": [], "source": first_cell(rest).splitlines(keepends=True)}
    notebook["cells"] = [title, first, *rest]
    for i, cell in enumerate(notebook["cells"]): cell["id"] = f"cell-{i}"
    return json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def notebooks() -> list[Path]:
    return sorted(p for p in (ROOT / "nbs").glob("**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def main():
    for path in [Path(p).resolve() for p in sys.argv[1:]] or notebooks():
        if (text := stamped(path)) != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__": main()
