"The claims table: every filled row shows its card's number, its status follows the rule, nothing goes stale in silence."
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from relax.compare import against_all, claims_table, deciding, shown, verdict
from relax.experiments import EXPERIMENTS
from relax.record import MISSING, data_dir

ROOT = data_dir().parent


def rows_of(markdown: str) -> dict[str, list[str]]:
    "First cell -> the others, of all table rows in a text."
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in markdown.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines}


@pytest.fixture(scope="module")
def claims(): return pd.read_csv(data_dir() / "paper" / "claims.csv", index_col="id")


def test_every_claim_is_decided_by_something(claims):
    rows = deciding()
    assert set(rows.claim) == set(claims.index) and set(rows.experiment) <= set(EXPERIMENTS) and not rows.duplicated(["claim", "finding"]).any()
    assert all((ROOT / n).exists() for n in rows.notebook)


def test_each_filled_row_of_the_readme_is_its_cards_number(claims):
    readme = rows_of((ROOT / "README.md").read_text(encoding="utf-8"))
    for claim, rows in deciding().groupby("claim"):
        ours, status = readme[claims.claim[claim]][1:3]
        recorded = [json.loads((ROOT / "figures" / f"{r.card}.json").read_text(encoding="utf-8"))["values"]["findings"] for r in rows.itertuples() if (ROOT / "figures" / f"{r.card}.json").exists()]
        by_name = {f["what"]: f for findings in recorded for f in findings if f["value"] is not None}
        first = next((by_name[w] for w in rows.finding if w in by_name), None)
        if first is None: assert MISSING in ours and status == "not attempted", claim
        else: assert f"{first['value']:+.3f} [{first['low']:+.3f}, {first['high']:+.3f}]" in ours, claim
        if first and len(rows) > 1: assert status == verdict("", list(rows.found))[2:-1], claim
        if first and len(rows) == 1: assert status == first["status"], claim


def test_the_readme_is_not_behind_the_cards():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for line in claims_table().splitlines()[2:]: assert line.replace("](paper/", "](nbs/paper/") in readme, f"rebuild nbs/index.ipynb and `make export`: {line}"


@pytest.fixture
def made(tmp_path):
    "A checkout with two claims: one decided by a card with three findings, one whose card does not exist yet."
    (tmp_path / "data" / "paper").mkdir(parents=True)
    (tmp_path / "figures").mkdir()
    (tmp_path / "data" / "paper" / "claims.csv").write_text('id,claim,evidence\nup,It rises,Figure 1\nfar,It is far,"Figures 2, 3"\nnone,It sees,Table 1\n')
    (tmp_path / "data" / "claims.csv").write_text('claim,card,experiment,finding\nup,fig01,alpha,"a, first"\nup,fig01,main,b\nup,fig01,main,c\nfar,table9_laptop,sizes,d\n')
    numbers = {"a, first": (None, None, None, "not attempted"), "b": (0.2, 0.1, 0.3, "direction holds at smaller scale"), "c": (-0.2, -0.3, 0.1, "inconclusive")}
    findings = [{"what": w, "value": v, "low": lo, "high": hi, "seeds": "3", "status": s} for w, (v, lo, hi, s) in numbers.items()]
    (tmp_path / "figures" / "fig01.json").write_text(json.dumps({"values": {"findings": findings}}))
    return tmp_path


def test_a_row_shows_the_first_recorded_finding_and_the_rule(made):
    table = rows_of(claims_table(made))
    assert table["It rises"] == ["Figure 1", f"b: +0.200 [+0.100, +0.300]; 1 more; {MISSING}: `relax_reproduce alpha`",
                                 f"mixed, so far (1 direction holds at smaller scale, 1 inconclusive, 1 {MISSING})", "[fig01](paper/fig01.ipynb)"]
    assert table["It is far"] == ["Figures 2, 3", f"{MISSING}: `relax_reproduce sizes`", "not attempted", "[table9](paper/table9.ipynb)"]
    assert table["It sees"][1:3] == ["no experiment here speaks to it yet", "not attempted"]


def test_a_name_that_the_card_lacks_is_an_error(made):
    (made / "data" / "claims.csv").write_text("claim,card,experiment,finding\nup,fig01,main,renamed\n")
    with pytest.raises(ValueError, match="renamed.*fig01.json.*accepted"): claims_table(made)


def seeds(mean, n=4, problems=40, noise=0.01):
    g = np.random.default_rng(int(1000 * abs(mean)) + n)
    return np.clip(np.linspace(0.3, 0.6, problems) + mean + noise * g.normal(size=(n, 1)), 0, 1)


@pytest.mark.parametrize("rivals, status, note", [
    ({"x": seeds(0.0), "y": seeds(0.1)}, "direction holds at smaller scale", "strongest is y; of 2 rivals 2 beaten, 0 surely better"),
    ({"x": seeds(0.0), "y": None}, "inconclusive", f"of 1 rivals 1 beaten, 0 surely better; 1 {MISSING}"),  # a conjunction does not hold with a part missing
    ({"x": seeds(0.0), "y": seeds(0.201)}, "inconclusive", "strongest is y; of 2 rivals 1 beaten, 0 surely better"),
    ({"x": seeds(0.0), "y": seeds(0.4)}, "disagrees", "strongest is y; of 2 rivals 1 beaten, 1 surely better"),
    ({"x": None, "y": np.empty((0, 1))}, "not attempted", f"2 rivals {MISSING}")])
def test_better_than_every_rival(rivals, status, note):
    f = against_all("ours - the strongest", seeds(0.2), rivals)
    assert f["status"] == status and note in f["note"] and (f["value"] is None) == (status == "not attempted")


def test_the_margin_over_the_strongest_allows_for_the_choice():
    a, b = seeds(0.2), seeds(0.1)
    alone, many = against_all("x", a, {"b": b}), against_all("x", a, {"b": b, **{str(i): seeds(-0.1 - i / 100) for i in range(6)}})
    assert alone["value"] == many["value"] and many["high"] - many["low"] > 1.2 * (alone["high"] - alone["low"]) and shown(many)
