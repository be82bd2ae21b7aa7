"""The paper's figures and tables as pages, each with its notebook, its recorded runs and its provenance: made from the cards beside them."""
import csv
import io
import json
import re
from collections import Counter
from pathlib import Path

RUN = re.compile(r"^(.*)-s(\d+)$")


def cards(figures: Path) -> dict[str, dict]:
    "Every card figures/<slug>.json, figures of the paper first, then tables, then ours; without that of a live demo, which git does not keep."
    def order(slug): return (0 if slug.startswith("fig") else 1 if slug.startswith("table") else 2, slug)
    return {slug: json.loads((figures / f"{slug}.json").read_text(encoding="utf-8")) for slug in sorted((p.stem for p in figures.glob("*.json") if p.stem != "demo_live"), key=order)}


def findings(card: dict) -> list[dict]:
    return card["values"].get("findings", []) if isinstance(card["values"], dict) else []


def tally(card: dict) -> str:
    "How many of a card's findings have which status."
    counts = Counter(f["status"] for f in findings(card))
    return ", ".join(f"{n} {status}" for status, n in counts.most_common()) or "no claim is judged here"


def finding_rows(card: dict) -> str:
    "What a card found, as a Markdown table."
    rows = [[f["what"], "" if f.get("value") is None else f"{f['value']:+.3f}", "" if f.get("low") is None else f"[{f['low']:+.3f}, {f['high']:+.3f}]", f.get("seeds", ""), f["status"]]
            for f in findings(card)]
    return table(["what", "value", "95 % interval", "seeds", "status"], rows) if rows else ""


def table(head: list, rows: list[list]) -> str:
    def line(cells): return "| " + " | ".join(str(c).replace("|", r"\|") for c in cells) + " |"
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def arm(run_id: str) -> str:
    "A run's name without its seed."
    return RUN.match(run_id)[1]


def run_lines(card: dict) -> str:
    "The runs behind a card, by arm, each leading to its record."
    arms = {}
    for run_id in card["runs"]: arms.setdefault(arm(run_id), []).append(RUN.match(run_id)[2])
    return "\n".join(f"- [{a}](../runs.md#{a.replace('.', '')}), seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" for a, seeds in arms.items()) or "None: drawn from files or from systems computed in the notebook."


def provenance(card: dict) -> str:
    "What was read, to the byte, and on which machines the runs were made."
    rows = [[name, f"`{sha}`"] for name, sha in {**card["runs"], **card.get("files", {})}.items()]
    machines = "Recorded on: " + "; ".join(card["hardware"]) + ".\n\n" if card["hardware"] else ""
    return machines + (table(["read", "sha256"], rows) if rows else "Nothing but the notebook itself.")


def picture(slug: str, card: dict, figures: Path) -> str:
    "The figure, or the table, itself."
    if (figures / f"{slug}.png").exists(): return f"```{{image}} ../figures/{slug}.png\n:alt: {card['paper']}, as drawn by the notebook {Path(card['notebook']).stem}\n```"
    path = figures / f"{slug}.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return re.sub(r"^\|\s+\|", f"| {'row'} |", text, count=1)


def card_page(slug: str, card: dict, figures: Path) -> str:
    "One figure or table: the picture, what it found, and where it comes from."
    found = finding_rows(card)
    parts = [f"# {card['paper'][0].upper()}{card['paper'][1:]}", picture(slug, card, figures), f"**Notebook**: [{card['notebook'].removeprefix('nbs/')}](../{card['notebook']}), with the code, the question and the verdict."]
    if found: parts += ["## What it found", found]
    parts += ["## Recorded runs", run_lines(card), "## Provenance", provenance(card), f"The card with all plotted values: {{download}}`{slug}.json <../figures/{slug}.json>`."]
    return "\n\n".join(parts) + "\n"


def gallery_page(found: dict[str, dict], figures: Path) -> str:
    "All of them on one page: pictures first, then tables."
    drawn = [s for s in found if (figures / f"{s}.png").exists()]
    tables = [s for s in found if s not in drawn]
    tiles = "\n".join(f"```{{figure}} thumbs/{s}.png\n:target: gallery/{s}.html\n:alt: {found[s]['paper']}\n\n[{found[s]['paper']}](gallery/{s}.md): {tally(found[s])}.\n```" for s in drawn)
    rows = table(["what", "found", "notebook"], [[f"[{found[s]['paper']} ({s})](gallery/{s}.md)", tally(found[s]), f"[{Path(found[s]['notebook']).stem}]({found[s]['notebook']})"] for s in tables])
    pages = "\n".join(f"gallery/{s}" for s in drawn + tables)
    return (f"# Figures and tables\n\nEach leads to its notebook, to the recorded runs that it was drawn from, and to its provenance. A status is decided by a "
            f"[rule](nbs/13_record.ipynb), from an interval.\n\n::::{{container}} gallery\n{tiles}\n::::\n\n## Tables and findings\n\n{rows}\n\n```{{toctree}}\n:hidden:\n\nruns\n{pages}\n```\n")


def thumbnail(source: Path, width: int = 480) -> bytes:
    "A smaller picture as PNG, so that the gallery opens quickly."
    from PIL import Image
    out = io.BytesIO()
    with Image.open(source) as image:
        image.convert("RGB").resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS).quantize(128).save(out, "PNG", optimize=True)
    return out.getvalue()


def rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open(newline="", encoding="utf-8"))) if path.exists() else []


def run_row(folder: Path, repository: str) -> list:
    "One recorded run: what it cost and what it reached, from its own tables."
    timing, evals = rows(folder / "timing.csv"), rows(folder / "evals.csv")
    last = max(int(r["step"]) for r in evals)
    solved = [int(r["correct"]) / int(r["samples"]) for r in evals if int(r["step"]) == last]
    minutes = sum(float(v) for r in timing for k, v in r.items() if k.endswith("_seconds") and v) / 60
    seed = RUN.match(folder.name)[2]
    return [seed, last, f"{sum(solved) / len(solved):.3f}", f"{minutes:.1f}" if timing else "", f"[{folder.name}]({repository}/tree/main/data/runs/{folder.name})"]


def runs_page(folder: Path, repository: str) -> str:
    "Every evaluated run under data/runs, by arm: its configuration, and a row a seed."
    arms = {}
    for p in sorted(folder.glob("*/evals.csv")):
        if RUN.match(p.parent.name) and not p.parent.name.startswith("demo-"): arms.setdefault(arm(p.parent.name), []).append(p.parent)
    parts = ["# Recorded runs\n\nWhat the figures and tables are drawn from. A run's folder holds its configuration, metrics of every step, evaluations, samples and the machine."]
    for name, folders in arms.items():
        config = {k: v for k, v in json.loads((folders[0] / "config.json").read_text()).items() if v is not None and k != "seed"}
        parts += [f"## {name}", ", ".join(f"{k} `{json.dumps(v)}`" for k, v in config.items()),
                  table(["seed", "steps", "pass@1, held out", "minutes", "folder"], [run_row(f, repository) for f in folders])]
    return "\n\n".join(parts) + "\n"


def disagreements(found: dict[str, dict]) -> str:
    "Every finding whose status is 'disagrees', with the page that says where it comes from."
    lines = [[f"[{found[s]['paper']}](gallery/{s}.md)", f["what"], f"{f['value']:+.3f}", f"[{f['low']:+.3f}, {f['high']:+.3f}]", f.get("seeds", "")]
             for s in found for f in findings(found[s]) if f["status"] == "disagrees"]
    return table(["picture", "finding", "value", "95 % interval", "seeds"], lines) if lines else "None so far."


def tuning(path: Path) -> str:
    "The tuning log as a table, without the search for a task of many ways, which has one of its own."
    kept = ("date", "task", "arm", "steps", "lr", "kl", "beta", "pass@1", "pass@8", "pass@32", "note")
    return table(kept, [[r[k] for k in kept] for r in rows(path) if not r["note"].startswith("way: ")])


def first_signals(path: Path) -> str:
    "What the oracle won by in the first comparison of signals."
    return table(("what", "difference [95 %]", ""), [[r["what"], "{:+.3f} [{:+.3f}, {:+.3f}]".format(*(float(r[k]) for k in ("value", "low", "high"))), r["status"]] for r in rows(path) if r["arm"] == "bonus_rarity"])
