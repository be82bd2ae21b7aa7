"The paper's numbers as data, tables with provenance, and the rule that gives a claim its status."
import csv
import json
from math import nan

import numpy as np
import pandas as pd
import pytest

from relax.objective import ReLaX
from relax.record import (MISSING, STATUSES, Run, both_scores, claim_status, data_dir, evaluations, fingerprint, finished_runs, markdown_table,
                          paper_grid, paper_table, recomputed_averages, save_table, suite_scores, suite_table)
from relax.tasks import TASKS
from relax.train import TrainConfig

PAPER = data_dir() / "paper"
TABLES = (1, 2, 3, 5, 6, 7, 8, 9)
SCHEMA = ["table", "row", "column", "metric", "k", "value", "note"]


def read(name):
    with (PAPER / name).open(newline="") as file: return list(csv.DictReader(file))


@pytest.mark.parametrize("number", TABLES)
def test_tables_have_the_schema(number):
    rows = read(f"table{number}.csv")
    assert list(rows[0]) == SCHEMA
    assert {r["table"] for r in rows} == {str(number)}
    assert len({(r["row"], r["column"], r["metric"]) for r in rows}) == len(rows), "a cell stands twice"
    for r in rows:
        assert r["row"] and r["column"] and r["metric"]
        assert r["value"] or r["note"], "an empty cell says why"
        assert "†" not in r["value"] and (r["note"] == "†" or "†" not in r["note"])
        if number != 3 and r["value"] and r["metric"] != "text": assert float(r["value"]) >= 0


@pytest.mark.parametrize("number, rows, columns, daggers", [(1, 17, 8, 11), (2, 18, 7, 17), (5, 7, 7, 2)])
def test_tables_are_whole(number, rows, columns, daggers):
    grid = paper_grid(number)
    assert grid.shape == (rows, columns) and grid.columns[-1] == "average" and not (grid == "").any(axis=None)
    assert sum(cell.endswith("†") for cell in grid.values.ravel()) == daggers == (paper_table(number).note == "†").sum()


def test_numbers_as_printed():
    grid = paper_grid(2)
    assert list(grid.loc["Qwen2.5-7B + FR3E"]) == ["79.0", "39.0", "49.2†", "67.5", "25.2", "14.8†", "39.2"]
    assert list(grid.loc["Qwen2.5-Math-7B + DCPO"]) == ["82.5", "-", "-", "79.8", "38.8", "17.2", "-"]
    assert list(paper_grid(1).loc["ReLaX-VL-7B"]) == ["77.1", "55.7", "30.2", "55.9", "57.4", "65.5", "30.6", "53.2"]
    assert paper_grid(5).loc["Llama3.2-3B-Instruct", "AIME25"] == "0"
    assert paper_grid(3).loc["top-k", "setting"] == "off"
    step = paper_table(6).set_index(["row", "column"]).value
    assert step["Qwen2.5-Math-7B: whole step", "ReLaX"] == 2273 and np.isnan(step["Qwen2.5-VL-3B: fit dictionary (once)", "GRPO"])


def test_k_of_the_suites():
    k = paper_table(2).dropna(subset="k").groupby("column").k.unique()
    assert {c: list(v) for c, v in k.items()} == {"MATH500": [1], "Minerva": [1], **{c: [32] for c in ("AMC22", "AMC23", "AIME24", "AIME25")}}


@pytest.mark.parametrize("row, total, printed, mean", [("Qwen2.5-7B + ReLaX", 304.5, 43.5, 50.75), ("Qwen2.5-7B + FR3E", 274.7, 39.2, 45.78),
                                                       ("Qwen2.5-7B + SimpleRL (GRPO)", 243.3, 34.8, 40.55), ("Qwen2.5-Math-7B + ReLaX", 344.0, 49.1, 57.33)])
def test_averages_against_hand_values(row, total, printed, mean):
    got = recomputed_averages(2).loc[row]
    assert got["sum"] == pytest.approx(total) and got.printed == printed and got.cells == 6
    assert got["mean"] == pytest.approx(mean, abs=0.005) and round(total / 7, 1) == printed and not got.agrees


def test_every_average_of_table_2_is_divided_by_7_and_of_1_and_5_by_their_cells():
    for number, divisor in ((1, 7), (2, 7), (5, 6)):
        whole = recomputed_averages(number).dropna()
        assert len(whole) >= 6 and ((whole["sum"] / divisor - whole.printed).abs() <= 0.1).all()
        assert whole.agrees.all() == (number != 2)


@pytest.mark.parametrize("number", (1, 2, 5))
def test_recomputed_columns_in_the_files(number):
    rows = paper_table(number)
    ours = rows[rows.column == "average, recomputed"].set_index("row").value
    pd.testing.assert_series_equal(ours, recomputed_averages(number)["mean"], check_names=False, atol=1e-4)


def test_refusals_name_what_is_accepted():
    for number in (4, 10, "two"):
        with pytest.raises(ValueError, match="number: got .*accepted are 1, 2, 3, 5, 6, 7, 8, 9"): paper_table(number)
    with pytest.raises(ValueError, match="prints no averages"): recomputed_averages(6)
    with pytest.raises(ValueError, match="rows: got none"): save_table([], "none", [], "", "")


def test_table_3_is_the_part_of_the_hyperparameters_that_it_prints():
    both = [(r["name"], r["paper"]) for r in read("hyperparameters.csv") if r["where"] == "Table 3"]
    assert both == [(r["row"], r["value"]) for r in read("table3.csv")] and len(both) == 14


def test_hyperparameters_say_what_the_code_does():
    config, method = TrainConfig(method="relax"), ReLaX()
    owners = {"TrainConfig": config, "ReLaX": method, "GRPO": method, "Countdown": TASKS["countdown"]}
    named = [r for r in read("hyperparameters.csv") if r["field"]]
    assert len(named) >= 15
    for r in named:
        owner, name = r["field"].split(".")
        value = getattr(owners[owner], name)
        assert r["ours"] == str(value) or float(r["ours"]) == value, f"{r['name']}: the code says {value}"


def test_each_setting_has_the_papers_sentence_and_a_place_beside_it():
    rows = read("hyperparameters.csv")
    assert all(r["sentence"] and r["why"] for r in rows) and {r["beside"] for r in rows} == {"kept", "scaled", "changed", "not said"}
    assert all(r["ours"] == r["paper"] for r in rows if r["beside"] == "kept" and r["where"] == "Table 3")
    assert all(not r["paper"] for r in rows if r["beside"] == "not said") and all(r["paper"] for r in rows if r["beside"] == "scaled")
    assert next(r for r in rows if r["name"].startswith("alpha"))["beside"] == "changed", "DSD is in another unit, so that equal numbers are not equal settings"


def test_figures_and_claims():
    figures = read("figures.csv")
    assert [int(r["figure"]) for r in figures] == list(range(1, 12)) and all(r["shows"] for r in figures)
    claims = read("claims.csv")
    assert len({r["id"] for r in claims}) == len(claims) and all(r["claim"] and r["evidence"] for r in claims)


@pytest.fixture
def run(tmp_path):
    made = Run.create("made-s0", {"method": "grpo", "seed": 0, "model": "tiny", "task": "countdown", "method_options": None}, tmp_path / "runs")
    made.log("evals", *({"step": s, "level": 1 + i % 2, "samples": 4, "correct": s * i, "problem": i} for s in (0, 1) for i in range(4)))
    return made


def test_save_table_is_byte_stable_and_knows_its_sources(tmp_path, run):
    rows = [{"model": "a|b", "score": 0.1 + 0.2, "paper": "23.5†"}, {"model": "c", "score": nan, "paper": "-"}]
    def files(name):
        text = save_table(rows, "t", [run], "Table 0", "nbs/x.ipynb", files=["paper/table2.csv"], folder=tmp_path / name)
        return text, *((tmp_path / name / f"t.{kind}").read_bytes() for kind in ("csv", "md", "json"))
    text, table, markdown, card = files("one")
    assert (text, table, markdown, card) == files("two")
    assert markdown.decode() == text + "\n" and r"a\|b" in text and "23.5†" in text
    assert table.decode().splitlines()[0] == "model,score,paper" and "0.30000000000000004" in table.decode()
    card = json.loads(card)
    assert card["runs"] == {"made-s0": fingerprint(run)} and card["seeds"] == [0] and card["paper"] == "Table 0" and len(card["hardware"]) == 1
    assert list(card["files"]) == ["data/paper/table2.csv"] and card["values"][1] == {"model": "c", "score": None, "paper": "-"}


def test_save_table_takes_a_frame_and_other_values(tmp_path):
    text = save_table(pd.DataFrame({"x": [1]}, index=pd.Index(["r"], name="method")), "t", [], "", "", values={"x": 2}, folder=tmp_path)
    assert text == "| method | x |\n| --- | --- |\n| r | 1 |"
    assert json.loads((tmp_path / "t.json").read_text())["values"] == {"x": 2} and (tmp_path / "t.csv").read_text() == "method,x\nr,1\n"


def test_markdown_of_the_paper_keeps_the_daggers():
    assert markdown_table(paper_grid(2)).count("†") == 17


def test_evaluations_take_the_last_step_by_level_or_by_given_suites(run):
    frame = evaluations({"grpo": [run], "relax": []})
    assert list(frame.suite.unique()) == ["countdown level 1", "countdown level 2"] and list(frame.score) == [0, 0.25, 0.5, 0.75]
    assert suite_scores(frame, suite="countdown level 2", arm="grpo").values.tolist() == [[0.25, 0.75]]
    assert suite_scores(frame, arm="relax") is None and evaluations({}).empty and evaluations({"grpo": []}).empty
    given = evaluations({"grpo": [run]}, [[3, 1], [0]])
    assert suite_scores(given, suite="suite 1").values.tolist() == [[0.25, 0.75]] and len(given) == 3, "problems in no suite are left out"


def test_two_runs_of_one_seed_are_not_mixed(run, tmp_path):
    other = Run.create("other-s0", run.config, tmp_path / "runs")
    other.log("evals", *run.rows("evals"))
    with pytest.raises(ValueError, match="same seed twice"): suite_scores(evaluations({"grpo": [run, other]}), arm="grpo")
    third = Run.create("third-s1", run.config | {"seed": 1}, tmp_path / "runs")
    third.log("evals", *run.rows("evals")[:-1])
    with pytest.raises(ValueError, match="different problems"): suite_scores(evaluations({"grpo": [run, third]}), arm="grpo")


def test_both_scores_share_suites(run, tmp_path):
    other = Run.create("other-s1", run.config | {"seed": 1}, tmp_path / "runs")
    other.log("evals", *run.rows("evals"))
    frame = evaluations({"a": [run], "b": [other]}, [[0, 1], [2]])
    a, b = both_scores(frame, "a", "b", ["suite 1", "suite 2", "suite 3"])
    assert a.tolist() == b.tolist() == [[0, 0.25, 0.5]]
    assert both_scores(frame, "a", "c", ["suite 1"]) is None and both_scores(frame, "a", "b", ["suite 9"]) is None


def test_suite_table_says_what_was_not_recorded(run):
    table, values = suite_table(evaluations({"grpo": [run]}), {"grpo": "GRPO", "fr3e": "FR3E"}, ["countdown level 1", "other"], lambda s: (s.values.min(), s.values.max()), k=4)
    assert list(table.loc["FR3E"]) == [MISSING, MISSING] and table.loc["GRPO", "other"] == MISSING
    assert table.loc["GRPO", "countdown level 1"] == "25.0 [0.0, 50.0] (1 x 2)" and values == {"grpo | countdown level 1": [0.25, 0.0, 0.5]}
    empty, none = suite_table(evaluations({}), {"grpo": "GRPO"}, ["suite 1"], None)
    assert empty.loc["GRPO", "suite 1"] == MISSING and none == {}


def test_finished_runs_by_pattern_without_live_ones(run, tmp_path):
    for name in ("demo-x", "made-s1"): Run.create(name, run.config, tmp_path / "runs")
    Run("demo-x", tmp_path / "runs").log("evals", *run.rows("evals"))
    assert [r.id for r in finished_runs(root=tmp_path / "runs")] == ["made-s0"] == [r.id for r in finished_runs("made*", tmp_path / "runs")]
    assert finished_runs("x*", tmp_path / "runs") == []


@pytest.mark.parametrize("case, status", [
    ((0.03, (0.01, 0.05), 1), "direction holds at smaller scale"), ((0.03, (0.01, 0.05), 1, "paper"), "reproduced"), ((0.03, (0.01, 0.05), -1), "disagrees"),
    ((-0.03, (-0.05, -0.01), -1), "direction holds at smaller scale"), ((-0.03, (-0.05, -0.01), 1, "paper"), "disagrees"),
    ((0.03, (0.0, 0.06), 1), "inconclusive"), ((0.03, (-0.01, 0.07), 1, "paper"), "inconclusive"), ((-0.03, (-0.06, 0.0), 1), "inconclusive"),
    ((0.01, (-0.02, 0.04), (-0.1, 0.1)), "direction holds at smaller scale"), ((0.3, (0.2, 0.4), (-0.1, 0.1)), "disagrees"),
    ((0.1, (0.05, 0.2), [-0.1, 0.1]), "inconclusive"), ((0.9, (0.01, 0.05), 1), "inconclusive"), ((None,), "not attempted"), ((None, None, (0.1, 0.12), "paper"), "not attempted")])
def test_claim_status(case, status):
    assert claim_status(*case) == status and status in STATUSES


@pytest.mark.parametrize("case, word", [((0.1, None), "interval"), ((0.1, (0.2, 0.0)), "interval"), ((0.1, (nan, 1.0)), "interval"), ((nan, (0.0, 1.0)), "interval"),
                                        ((0.1, (0, 1), 0), "expected"), ((0.1, (0, 1), (2, 1)), "expected"), ((None, None, "up"), "expected"), ((0.1, (0, 1), 1, "7B"), "scale")])
def test_claim_status_refuses(case, word):
    with pytest.raises(ValueError, match=f"^{word}: got"): claim_status(*case)


def test_a_saved_figure_does_not_remember_that_it_was_shown(tmp_path):
    import matplotlib.pyplot as plt
    from relax.record import save_figure, style
    style()
    for name, shown in (("a", False), ("b", True)):
        fig = plt.figure(figsize=(4, 3))
        top, bottom = fig.subfigures(2, 1, height_ratios=[1, 1.3])
        for ax in (*top.subplots(1, 2), bottom.subplots()): ax.set(xlabel="training step", ylabel="a long\nlabel", title="reward")
        bottom.legend(ax.plot([0, 1], [0.1, 3.0]), ["one"], loc="outside lower center")
        if shown: fig.savefig(tmp_path / "shown.png", dpi=73, bbox_inches="tight")
        save_figure(fig, name, {}, [], "none", "none", folder=tmp_path)
        plt.close(fig)
    for kind in ("svg", "png", "json"): assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
