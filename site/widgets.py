"""The data of the spectrum explorer and the training replay, as scripts: a page opened from the disk may load a script, but not fetch a file."""
import csv
import json
from pathlib import Path

CURVES = {"reward": "reward", "entropy": "token entropy (nats)", "dsd_robust": "DSD (robust)", "dsd_matched": "DSD at equal length"}


def script(name: str, value) -> str:
    return f"window.{name} = {json.dumps(value, separators=(',', ':'), ensure_ascii=False)};\n"


def curves(folder: Path) -> dict[str, list]:
    "A run's metrics by step, rounded for the eye; None where a step logged nothing."
    rows = list(csv.DictReader((folder / "metrics.csv").open(newline="", encoding="utf-8")))
    return {k: [float(f"{float(r[k]):.4g}") if r.get(k) else None for r in rows] for k in CURVES}


def replay(data: Path) -> dict:
    "What was looked at along the way, with the curves of the recorded runs that it belongs to."
    recorded = json.loads((data / "site" / "replay.json").read_text(encoding="utf-8"))
    runs = {i: {"curves": curves(data / "runs" / i), "looks": r["looks"]} for i, r in recorded["runs"].items()}
    return {"labels": CURVES, "responses": recorded["responses"], "runs": runs}


def write_data(data: Path, target: Path):
    "explorer-data.js and replay-data.js."
    target.mkdir(parents=True, exist_ok=True)
    explorer = json.loads((data / "site" / "explorer.json").read_text(encoding="utf-8"))
    (target / "explorer-data.js").write_text(script("RELAX_EXPLORER", explorer), encoding="utf-8")
    (target / "replay-data.js").write_text(script("RELAX_REPLAY", replay(data)), encoding="utf-8")
