"Comparison figures: scores, bands, differences, findings, verdicts and looks against numbers worked out by hand."
import io
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from relax.compare import (arm_scores, band, base_arm, by_seed, caption, card, change_table, changes, curve, differences, draw_changes, draw_curves, draw_pass_at_k, draw_probe, dynamics, finding,
                           finding_table, first_seeds, forest, grid, interval, kept, last_over_first, legend, length_said, levels, logged, look, measured, paper_figure, pass_table, probe_change, probe_changes,
                           probe_said, probe_table, ratio, rounded, row_scores, scores, shown, suite_means, verdict)
from relax.experiments import ARMS, EXPERIMENTS
from relax.record import MISSING, Run, settle


def make(root, name, reward, correct=(0, 2, 4), seed=0, method="grpo", **columns):
    "A run of as many steps as rewards, evaluated on problems with 4 samples, `correct` of them right."
    run = Run.create(name, {"method": method, "task": "countdown", "seed": seed, "max_grad_norm": 1.0, "eval_problems": len(correct), "eval_samples": 4}, root)
    run.log("metrics", *({"step": i + 1, "reward": r, **{k: v[i] for k, v in columns.items()}} for i, r in enumerate(reward)))
    for step, shift in ((1, 1), (len(reward), 0)):
        run.log("evals", *({"step": step, "problem": i, "level": 1, "samples": 4, "correct": min(c + shift, 4)} for i, c in enumerate(correct)))
    return run


@pytest.fixture
def two(tmp_path): return [make(tmp_path, "a", [0.0, 1.0, 2.0, 3.0]), make(tmp_path, "b", [2.0, 3.0, 4.0, 5.0], (2, 2, 4), 1)]


def test_scores_are_of_the_last_evaluation(two):
    assert np.allclose(scores(two[0], 1), [0, 0.5, 1]) and np.allclose(scores(two[0], 2), [0, 1 - 1 / 6, 1])  # 1 - C(2,2)/C(4,2)
    assert np.allclose(row_scores(two, 1), [[0, 0.5, 1], [0.5, 0.5, 1]])
    assert np.allclose(np.sort(arm_scores(two, 1)), row_scores(two, 1))  # three different problems: only their order may change


def test_scores_of_different_problems_do_not_mix(two, tmp_path):
    with pytest.raises(ValueError, match="problems"): arm_scores([*two, make(tmp_path, "c", [0.0], (1, 1))], 1)


def test_smoothing_is_centred_and_shorter_at_the_ends(two):
    assert by_seed(two, "reward", 3)["a"].tolist() == [0.5, 1.0, 2.0, 2.5]
    assert curve(two, "reward", 3).tolist() == [1.5, 2.0, 3.0, 3.5]


def test_a_band_is_students_interval_over_seeds(two):
    b = band(two, "reward", 1)
    assert b["mean"].tolist() == [1, 2, 3, 4]
    assert np.allclose(b.high - b["mean"], 12.7062 * 2**0.5 / 2**0.5, atol=1e-3)  # t(.975, 1) s / sqrt(2), s = sqrt(2)
    assert np.allclose(interval([1, 2, 3]), (2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_one_seed_has_no_band(two):
    b = band(two[:1], "reward", 1)
    assert b["mean"].tolist() == [0, 1, 2, 3] and b.low.isna().all() and b.high.isna().all() and math.isnan(interval([1.0])[0])
    fig, ax = plt.subplots()
    assert draw_curves(ax, {"grpo": two[:1]}, "reward", 1)["reward/grpo/low"] == [None] * 4
    plt.close(fig)


def test_derived_and_unknown_columns(tmp_path):
    run = make(tmp_path, "a", [0.0, 0.0], grad_norm=[0.25, 7.0])
    assert logged(run, "grad_clipped").tolist() == [0.25, 1.0]
    with pytest.raises(ValueError, match="dsd_matched"): logged(run, "dsd_matched")


def test_change_and_level(tmp_path):
    run = make(tmp_path, "a", [2.0, 4.0, 1.0, 1.0, 5.0, 7.0])
    assert last_over_first(run, "reward", 2) == 6 / 3 - 1 and levels([run], "reward", 2).tolist() == [[6.0]] and changes([run], "reward", 2).shape == (1, 1)


def test_a_finding_by_hand():
    f = finding("x", 1, np.array([[1.0], [2.0], [3.0]]))
    assert np.allclose([f["value"], f["low"], f["high"]], [2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5]) and f["status"] == "inconclusive" and f["seeds"] == "3"
    a, b = np.array([[0.6, 0.6], [0.62, 0.62]]), np.array([[0.1, 0.1], [0.12, 0.12]])
    assert finding("x", 1, a, b)["status"] == "direction holds at smaller scale" and finding("x", -1, a, b)["status"] == "disagrees"
    assert abs(finding("x", 1, a, b)["value"] - 0.5) < 1e-12 and finding("x", 1, a, b)["seeds"] == "2 / 2"
    assert measured("x", 1, a, b)[0].startswith("x: +0.500 [+0.")


@pytest.mark.parametrize("values", [None, np.empty((0, 1)), [[1.0]], [[1.0], [math.nan]]])
def test_too_few_seeds_are_no_finding(values):
    assert kept(values) is None
    for f in (finding("x", 1, values), finding("x", 1, [[1.0], [2.0]], np.empty((0, 1)) if values is None else values)):
        assert f["status"] == "not attempted" and shown(f) == MISSING
    assert MISSING in finding_table([f]) and card([f])[0]["value"] is None


def test_a_single_arm_finding_is_not_taken_for_a_difference():
    assert finding("x", 1, [[1.0], [1.1]], None)["seeds"] == "2"
    assert finding("x", 1, [[1.0], [1.1]], [[5.0]])["value"] is None  # the other arm has one seed: nothing to compare with


def statuses(*names): return [{"what": "w", "value": None if n is None else 1.0, "low": 0, "high": 2, "status": n or "not attempted"} for n in names]


@pytest.mark.parametrize("names, word", [
    ((None, None), f"q: {MISSING}."), (("disagrees", "disagrees"), "q: disagrees (2 disagrees)."),
    (("disagrees", "inconclusive"), "q: mixed (1 disagrees, 1 inconclusive)."), (("inconclusive", None), f"q: inconclusive, so far (1 inconclusive, 1 {MISSING}).")])
def test_verdict_follows_its_rule(names, word): assert verdict("q", statuses(*names)) == word


def test_differences_keep_arms_without_runs(two):
    rows = differences({"grpo": two, "relax": two}, lambda runs: arm_scores(runs, 1), "pass@1", "grpo", ("relax", "dapo"))
    assert [r["arm"] for r in rows] == ["relax", "dapo"] and rows[0]["value"] == 0 and rows[1]["value"] is None
    fig, ax = plt.subplots()
    forest(ax, rows, "difference")
    assert any(MISSING in t.get_text() for t in ax.texts) and [t.get_text() for t in ax.get_yticklabels()] == ["ReLaX", "DAPO"]
    plt.close(fig)


def test_looks_differ_in_grey_and_an_arm_without_a_look_gets_one():
    main = [look(a)["marker"] for a in ("base", "grpo", "uniform_kl", "relax", "half_lr")]
    assert len(set(main)) == 5 and look("relax")["marker"] == "o" and not any(look(a)["marker"] in main for a in set(ARMS) - {"grpo", "uniform_kl", "relax", "half_lr"})
    for e in EXPERIMENTS.values(): assert len({(str(look(a)["linestyle"]), look(a)["marker"]) for a in e.arms}) == len(e.arms)
    assert look("grpo")["color"] == "#8c8c8c" and look("relax")["color"] == "#c8102e" and all(look(a)["label"] for a in ARMS)
    with pytest.raises(ValueError, match="accepted"): look("ppo")


def test_nothing_recorded_still_draws(tmp_path):
    fig, axes, values = dynamics({}, ("reward", "entropy", "length"))
    assert values == {} and all(MISSING in ax.texts[0].get_text() for ax in axes) and MISSING in caption({}).lower() and base_arm("main", tmp_path) == {}
    plt.close("all")


def test_caption_counts(two):
    assert caption({"grpo": two}, ("grpo", "dapo")).startswith("2 seeds an arm; evaluated on 3 held-out prompts with 4 samples") and "DAPO" in caption({"grpo": two}, ("dapo",))
    assert "GRPO 2, ReLaX 1" in caption({"grpo": two, "relax": two[:1]})
    assert "held-out" not in caption({"grpo": two}, shows=("curves", "changes", "probe", "dots")) and "held-out" in caption({"grpo": two}, shows=("scores",))
    with pytest.raises(ValueError, match="accepted are some of.*dots"): caption({"grpo": two}, shows=("lines",))


def test_a_ratio_by_hand():
    a, b = np.array([[1.1], [1.2], [1.3]]), np.array([[1.0], [1.0], [1.0]])
    f = ratio("x", (0.1, 0.3), a, b)  # 20 % more; b is sure, so the interval is a's own: s / sqrt(3) = .0577, t(2) = 4.303
    assert abs(f["value"] - 0.2) < 1e-12 and abs((f["high"] - f["low"]) / 2 - 4.302653 * 0.1 / 3**0.5) < 0.03 and f["status"] == "inconclusive" and f["seeds"] == "3 / 3"
    assert ratio("x", 1, 2 * a, a)["value"] == pytest.approx(1) and ratio("x", 1, 10 * b, b)["status"] == "direction holds at smaller scale"
    wide, sure = (ratio("x", 1, a, v)["high"] - ratio("x", 1, a, v)["low"] for v in (b + [[-0.3], [0], [0.3]], b))
    assert wide > 1.2 * sure  # the luck of the denominator counts
    assert ratio("x", 1, a, None)["value"] is None
    with pytest.raises(ValueError, match="above zero"): ratio("x", 1, a, -b)


def test_lengths_are_said_with_intervals(tmp_path):
    runs = [make(tmp_path, f"l{i}", [0.0] * 20, length=[10.0] * 10 + [11.0 + i / 10] * 10) for i in range(3)]
    assert length_said({"grpo": runs}) == "Length of the responses, first to last ten steps: GRPO +11% [+9%, +13%]."
    assert "| response length | +11% [+9%, +13%] |" in change_table({"grpo": runs}, ("length",)) and change_table({}) == MISSING
    assert length_said({"grpo": runs[:1]}).endswith("GRPO +10%.") and MISSING in length_said({})


def test_a_grid_has_wide_panels_below(two):
    fig, axes = grid(3, wide=(1.0, 2.0))
    settle(fig)
    boxes = [ax.get_position() for ax in axes]
    assert len(axes) == 5 and boxes[3].width > 1.5 * boxes[0].width and boxes[4].height > boxes[3].height and boxes[0].y0 > boxes[3].y0 > boxes[4].y0
    plt.close("all")


def test_pass_at_k_table_and_picture(two):
    assert pass_table({"grpo": two}, (1,)).loc["GRPO", "pass@1"].startswith("0.583 [")  # (0 + .5 + 1 + .5 + .5 + 1) / 6
    fig, ax = plt.subplots()
    assert draw_pass_at_k(ax, {"grpo": two}, (1, 4)) == {"pass_at_k/grpo": [0.583333, 0.833333]}
    legend(fig, ax)
    plt.close(fig)


def test_suite_means(two):
    table = suite_means({"grpo": two}, [[1, 2], [0]]).set_index("suite")
    assert table.loc["suite 1", "mean"] == 0.75 and table.loc["suite 2", "mean"] == 0.25 and table.seeds.tolist() == [2, 2]
    assert abs(table.loc["suite 1", "one"] - 0.25**0.5 / 2) < 1e-12  # p = .5 and 1: sqrt(.25 + 0) / 2
    assert suite_means({}, [[0]]).empty


def test_rounded(): assert rounded([0.12345678, math.nan]) == [0.123457, None]


def test_first_seeds_makes_arms_alike(two):
    assert first_seeds({"grpo": two, "relax": two[1:]}, 1) == {"grpo": two[:1]}


def test_changes_drawn_are_in_percent(tmp_path):
    fig, ax = plt.subplots()
    assert draw_changes(ax, {"grpo": [make(tmp_path, "a", [1.0] * 10 + [1.5] * 10)]}, ("reward",)) == {"change/reward/grpo": [50.0, None, None]}
    plt.close(fig)


def probed(root, name, own, base, method="grpo"):
    "A run with a probe at each of two steps; the refitted dictionary reads twice what the frozen one does."
    run = Run.create(name, {"method": method, "task": "countdown", "seed": 0}, root)
    run.log("probe", *({"step": s, **{f"{view}_{e}": v * (s if e == "paper" else 1) for e in ("robust", "paper", "authors") for view, v in (("own", o), ("base", b), ("refit", 2 * o))}}
                       for s, o, b in zip((1, 4), own, base)))
    return run


def test_the_hacking_probe_by_hand(tmp_path):
    arms = {"grpo": [probed(tmp_path, f"g{i}", (1, 1.0 + i / 100), (1, 1.0 + i / 100)) for i in range(3)],
            "relax": [probed(tmp_path, f"r{i}", (1, 2.0 + i / 100), (1, 1.0 + i / 100)) for i in range(3)]}
    assert np.allclose(probe_change(arms["relax"], "own"), np.log([[2], [2.01], [2.02]])) and np.allclose(probe_change(arms["relax"], "own", "paper"), np.log([[8], [8.04], [8.08]]))
    assert np.allclose(probe_change(arms["relax"], "own / base"), np.log([[2], [2.01 / 1.01], [2.02 / 1.02]])) and np.allclose(probe_change(arms["grpo"], "own / base"), 0)
    table, findings = probe_changes(arms, estimators=("robust",))
    row = table.set_index(["arm", "reading"]).loc[("relax", "own")]
    assert np.allclose([row.value, row.low, row.high], [np.log([2, 2.01, 2.02]).mean(), *interval(np.log([2, 2.01, 2.02]))]) and row.seeds == 3 and len(table) == 8
    status = {f["what"]: f["status"] for f in findings}
    assert status["log of own / base, first to last probe, robust (claim: within 0.1), GRPO"] == "direction holds at smaller scale"
    assert status["log of own / base, first to last probe, robust (claim: within 0.1), ReLaX"] == "disagrees"
    assert status["log change of probed DSD, robust, own states, ReLaX - GRPO"] == "direction holds at smaller scale"
    assert status["log change of probed DSD, robust, base model, same tokens, ReLaX - GRPO"] == "inconclusive" and len(findings) == 5
    assert len(probe_changes(arms, estimators=("robust",), names=())[1]) == 2


def test_what_the_probe_says_follows_its_intervals(tmp_path):
    arms = {"relax": [probed(tmp_path, f"r{i}", (1, 2.0 + i / 100), (1, 1.0 + (i - 1) / 100)) for i in range(3)],
            "grpo": [probed(tmp_path, f"g{i}", (1, 0.5 + i / 100), (1, 0.5 + i / 100)) for i in range(3)]}
    table, _ = probe_changes(arms)
    relax, grpo = probe_said(table).split("- GRPO")
    assert "own states × 2.01" in relax and "risen; the base model on the same tokens × 1.00" in relax and "not seen to move; own states end above what the base model reads" in relax
    assert "fallen; the base model" in grpo and "the two are not seen to part" in grpo and "ReLaX, eq. 7" in probe_table(table)
    fig, ax = plt.subplots()
    assert draw_probe(ax, table)["probe/robust/own/grpo"][0] == round(np.log([0.5, 0.51, 0.52]).mean(), 6) and ax.get_xscale() == "log"
    plt.close(fig)


def test_a_probe_needs_a_start_and_an_end(tmp_path):
    run = Run.create("once", {"method": "grpo", "seed": 0}, tmp_path)
    for match in ("two probes in \\['once'\\]",) * 2:
        with pytest.raises(ValueError, match=match): probe_change([run], "own")
        if not run.rows("probe"): run.log("probe", {"step": 1, "own_robust": 1.0})
    for bad in (("theirs", "robust"), ("own", "draft")):
        with pytest.raises(ValueError, match="accepted"): probe_change([run], *bad)
    assert probe_changes({})[0].empty and probe_table(probe_changes({})[0]) == MISSING and MISSING in probe_said(probe_changes({})[0])


def test_what_the_paper_drew():
    assert "straight" not in paper_figure(1) and "-a exp(H) + b" in paper_figure(1) and "Figure 11" in paper_figure(11)
    with pytest.raises(ValueError, match="accepted"): paper_figure(12)


def test_saved_bytes_do_not_depend_on_an_earlier_display(two):
    saved = []
    for shown_before in (False, True):
        fig, _, _ = dynamics({"grpo": two}, ("reward",) * 4)
        if shown_before: fig.savefig(io.BytesIO(), format="png", dpi=100, bbox_inches="tight")
        settle(fig)
        saved.append(io.BytesIO())
        fig.savefig(saved[-1], format="svg", metadata={"Date": None, "Creator": None})
    assert saved[0].getvalue() == saved[1].getvalue()
    plt.close("all")
