"""Notebooks as pages: the same cells and stored outputs, without what only the tools need, and with what only a reader needs.

Nothing is run. A page differs from its notebook in this: housekeeping cells are gone, the measured cost stands as a sentence, `#|` lines are taken from the
code, pictures have alternative texts, and links to files of the repository lead to the repository.
"""
import json
import re
from pathlib import Path

HOUSEKEEPING = re.compile(r"#\| (default_exp|hide)\b")


def slug(title: str) -> str:
    "A heading's anchor, as Jupyter makes it: spaces become dashes."
    return re.sub(r"[^\w-]", "", title.strip().replace(" ", "-"))


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "id": "measured", "source": text}


def shown_output(cell: dict) -> str:
    "What a cell printed or returned, as text."
    texts = (o.get("text") or o.get("data", {}).get("text/markdown") or o.get("data", {}).get("text/plain", "") for o in cell["outputs"])
    return "".join("".join(t) for t in texts).strip().strip("'*")


def alternative(cell: dict, heading: str) -> str:
    "What a reader who cannot see the picture is told: where it stands, and the words that the code writes into it."
    words = re.findall(r"(?:title|xlabel|ylabel|suptitle|label)\s*(?:=|\()\s*f?\"([^\"{}]{3,80})\"", "".join(cell["source"]))
    return f"Plot under the heading “{heading}”" + (": " + "; ".join(dict.fromkeys(words)) if words else ", drawn by the code above")


def code_page(cell: dict, heading: str) -> list[dict]:
    "A code cell as it stands on the page, as a list of none or one."
    source = "".join(cell["source"])
    if "notebook_cost(" in source and len(source.splitlines()) < 6: return [markdown("*Measured: " + shown_output(cell) + "*")]
    if HOUSEKEEPING.match(source): return []
    hidden = ["remove-input"] if "#| echo: false" in source else []
    lines = [line for line in source.splitlines() if not line.startswith("#|")]
    image = {"mystnb": {"image": {"alt": alternative(cell, heading)}}} if any("image/png" in o.get("data", {}) for o in cell["outputs"]) else {}
    outputs = [linked(o) for o in cell["outputs"] if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
    return [cell | {"source": "\n".join(lines), "metadata": {"tags": hidden, **image}, "outputs": outputs}]


def linked(output: dict) -> dict:
    "An output in which links to notebooks lead to pages; in Markdown that a cell printed Sphinx leaves them as they are."
    text = "".join(output.get("data", {}).get("text/markdown", ""))
    if not text: return output
    return output | {"data": output["data"] | {"text/markdown": re.sub(r"\]\((?!\w+:)([^)]*)\.ipynb\b", r"](\1.html", text)}}


def links(text: str, repository: str) -> str:
    "Links to folders and files of the repository that are no pages lead to the repository; the badge is a plain link here."
    text = re.sub(r"\[!\[[^\]]*\]\([^)]*colab-badge[^)]*\)\]\(([^)]+)\)", r"[Open in Colab](\1){.colab}", text)
    return re.sub(r"\]\((?:\.\./)*((?:data|configs|relax|tests)/[^)]*)\)", rf"]({repository}/blob/main/\1)", text)


def notebook_page(path: Path, repository: str) -> str:
    "The notebook as the site shows it, as JSON."
    notebook, cells, heading = json.loads(path.read_text(encoding="utf-8")), [], ""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = links("".join(cell["source"]), repository)
            heading = (re.findall(r"^#+ (.+)$", text, re.M) or [heading])[-1]
            cells.append(cell | {"source": text})
        elif cell["cell_type"] == "code": cells += code_page(cell, heading)
    return json.dumps(notebook | {"cells": cells})


def sections(readme: str) -> dict[str, str]:
    "The first page's Markdown by its headings of the second level; what stands before the first one under ''."
    parts = re.split(r"^## (.+)$", readme, flags=re.M)
    return {"": parts[0], **{parts[i]: parts[i + 1].strip() for i in range(1, len(parts), 2)}}
