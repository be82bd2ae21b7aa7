"""Oracles: enumeration of all subsets, exact integers, known truth in simulation."""
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch

from relax.evaluate import bootstrap_ci, collapse, mean_at_k, paired_difference, pass_at_k, pass_at_k_per_problem


@pytest.fixture
def correct():
    rng = np.random.default_rng(0)
    return rng.random((20, 9)) < rng.random((20, 1))


def row_table(n): return np.arange(n) < np.arange(n + 1)[:, None]  # row c has c correct


def test_mean_at_k_by_hand():
    grades = [[True, False, False, False], [True, True, False, True]]
    assert mean_at_k(grades) == mean_at_k(torch.tensor(grades)) == mean_at_k(np.array(grades)) == 0.5
    assert type(mean_at_k(grades)) is float and type(pass_at_k(grades, 2)) is float


@pytest.mark.parametrize("k", range(1, 10))
def test_pass_at_k_is_the_mean_over_subsets(correct, k):
    by_hand = np.mean([[any(s) for s in combinations(row, k)] for row in correct], axis=1)
    np.testing.assert_allclose(pass_at_k_per_problem(correct, k), by_hand, atol=1e-13)
    assert pass_at_k(correct, k) == pytest.approx(by_hand.mean())
    assert pass_at_k(torch.tensor(correct), k) == pass_at_k(correct, k)


@pytest.mark.parametrize("n, k", [(64, 32), (1000, 1), (1000, 400), (1000, 1000)])
def test_pass_at_k_against_exact_integers(n, k):
    exact = [1 - comb(n - c, k) / comb(n, k) for c in range(n + 1)]
    got = pass_at_k_per_problem(row_table(n), k)
    np.testing.assert_allclose(got, exact, atol=1e-12)
    assert got.min() == 0 and got.max() == 1


def test_pass_at_k_edges_and_order(correct):
    assert pass_at_k(correct, 1) == pytest.approx(mean_at_k(correct))
    np.testing.assert_array_equal(pass_at_k_per_problem(correct, 9), correct.any(1))
    assert np.all(np.diff([pass_at_k_per_problem(correct, k) for k in range(1, 10)], axis=0) >= 0)
    shuffled = np.random.default_rng(1).permuted(correct, axis=1)
    assert pass_at_k(shuffled, 4) == pass_at_k(correct, 4)
    assert pass_at_k(correct, np.int64(3)) == pass_at_k(correct, 3)


def test_pass_at_k_is_unbiased():
    rng = np.random.default_rng(0)
    p = rng.beta(0.3, 1.2, 4000)
    grades = rng.random((4000, 16)) < p[:, None]
    for k in (1, 4, 16):
        error = pass_at_k_per_problem(grades, k) - (1 - (1 - p)**k)
        assert abs(error.mean()) < 4 * error.std() / 4000**0.5


@pytest.mark.parametrize("k", [0, -1, 10, 1.5, 2.0, "2", None])
def test_bad_k(correct, k):
    with pytest.raises(ValueError, match="k: got .* with 9 samples a problem; accepted: an integer from 1 to 9"): pass_at_k(correct, k)


@pytest.mark.parametrize("bad", [[], [[]], np.zeros((0, 4), bool), np.ones((3, 4)), np.ones((3, 4), int), np.ones(4, bool), np.ones((2, 2, 2), bool),
                                 [[True], [True, False]], torch.ones(2, 2)])
def test_bad_correct(bad):
    for call in (mean_at_k, lambda x: pass_at_k(x, 1)):
        with pytest.raises(ValueError, match="correct: got .*accepted"): call(bad)


def test_one_run_against_the_normal_interval():
    x = np.random.default_rng(0).random(400)
    low, high = bootstrap_ci(x)
    half = 1.96 * x.std() / 20
    assert low == pytest.approx(x.mean() - half, abs=0.1 * half) and high == pytest.approx(x.mean() + half, abs=0.1 * half)
    narrow = bootstrap_ci(x, level=0.5)
    assert low < narrow[0] < x.mean() < narrow[1] < high


def test_generators():
    x = np.random.default_rng(0).random(50)
    torch_rng = lambda seed: torch.Generator().manual_seed(seed)
    assert bootstrap_ci(x) == bootstrap_ci(x) == bootstrap_ci(torch.tensor(x))
    assert bootstrap_ci(x, generator=torch_rng(1)) == bootstrap_ci(x, generator=torch_rng(1)) != bootstrap_ci(x, generator=torch_rng(2))
    assert bootstrap_ci(x, generator=np.random.default_rng(1)) == bootstrap_ci(x, generator=np.random.default_rng(1))
    rng = torch_rng(1)
    assert bootstrap_ci(x, generator=rng) != bootstrap_ci(x, generator=rng)
    before = (np.random.get_state()[1].copy(), torch.get_rng_state())
    bootstrap_ci(x, generator=rng)
    assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.get_rng_state())


def test_constant_values_give_a_point():
    for shape in ((7,), (1, 7), (3, 7)): assert bootstrap_ci(np.full(shape, 0.25)) == (0.25, 0.25)
    assert bootstrap_ci(np.zeros(30)) == (0.0, 0.0) and bootstrap_ci([0.5]) == (0.5, 0.5)


def test_seed_noise_widens_the_interval():
    rng = np.random.default_rng(0)
    values = 0.5 + 0.1 * np.array([[-1.0], [0.0], [1.0]]) + 0.01 * rng.standard_normal((3, 500))
    width = lambda v, **options: float(np.diff(bootstrap_ci(v, **options))[0])
    assert width(values.mean(0)) < 0.1 * width(values, seeds="resample") < 0.1 * width(values)
    means = values.mean(1)
    low, high = bootstrap_ci(values, seeds="resample")
    assert means.min() - 0.01 < low and high < means.max() + 0.01  # drawing seeds cannot reach beyond them
    low, high = bootstrap_ci(values, n_boot=20_000)
    assert (high - low) / 2 == pytest.approx(4.303 * means.std(ddof=1) / 3**0.5, rel=0.15)  # Student's t, two degrees of freedom


@pytest.mark.parametrize("seeds, at_least, at_most", [("student", 0.92, 0.98), ("resample", 0.65, 0.80)])
def test_coverage_with_three_seeds_only(seeds, at_least, at_most):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(800):
        low, high = bootstrap_ci(np.repeat(rng.standard_normal((3, 1)), 2, axis=1), n_boot=400, generator=rng, seeds=seeds)
        hits += low <= 0 <= high
    assert at_least < hits / 800 < at_most


@pytest.mark.parametrize("n_seeds", [1, 4])
def test_coverage_with_problems(n_seeds):
    rng, hits = np.random.default_rng(1), 0
    for _ in range(500):
        low, high = bootstrap_ci(rng.standard_normal(60) + 0.1 * rng.standard_normal((n_seeds, 60)), n_boot=300, generator=rng)
        hits += low <= 0 <= high
    assert 0.9 < hits / 500 < 0.985


def test_paired_difference():
    rng = np.random.default_rng(0)
    hardness = rng.random(200)
    a, b = hardness + 0.05 + 0.01 * rng.standard_normal(200), hardness + 0.01 * rng.standard_normal(200)
    d, low, high = paired_difference(a, b)
    assert d == pytest.approx(a.mean() - b.mean()) and 0.045 < low < d < high < 0.055
    _, wide_low, wide_high = paired_difference(a, rng.permutation(b))
    assert wide_high - wide_low > 10 * (high - low)
    assert paired_difference(a, a) == (0.0, 0.0, 0.0)
    d2, low2, high2 = paired_difference(b, a)
    assert d2 == -d and low2 == pytest.approx(-high, abs=1e-3) and high2 == pytest.approx(-low, abs=1e-3)


def test_paired_difference_false_alarms_with_three_seeds():
    rng, alarms = np.random.default_rng(0), {"student": 0, "resample": 0}
    for _ in range(400):
        problems = rng.standard_normal(50)
        a, b = (problems + rng.standard_normal((3, 1)) for _ in range(2))
        for seeds in alarms:
            _, low, high = paired_difference(a, b, n_boot=300, generator=rng, seeds=seeds)
            alarms[seeds] += (not low <= 0 <= high) / 400
    assert alarms["student"] < 0.08 and alarms["resample"] > 0.12


def test_collapse_by_hand():
    values = [[1.0, 0, 1, 1], [0, 0, 0, 1]]  # rows 0 and 2 ask the same; means 3/4 and 1/4
    table = collapse(values, ["a", "b", "a", "c"])
    assert table == pytest.approx(np.array([[3 / 4 + 3 / 8, 3 / 4 - 9 / 16, 3 / 4 + 3 / 16], [1 / 4 - 3 / 8, 1 / 4 - 3 / 16, 1 / 4 + 9 / 16]]))
    assert table.mean(1) == pytest.approx(np.mean(values, 1))
    assert (collapse(values, range(4)) == np.array(values)).all()
    with pytest.raises(ValueError, match="^keys: got 3 for 4 rows"): collapse(values, "abc")


def test_collapsed_intervals_cover_where_rows_repeat():
    rng, missed, naive = np.random.default_rng(0), 0, 0
    for _ in range(200):
        sizes = rng.integers(1, 9, 40)  # 40 problems asked 1 to 8 times
        rows = np.repeat(rng.random(40), sizes)
        low, high = bootstrap_ci(collapse(rows, np.repeat(np.arange(40), sizes)), n_boot=300)
        missed += not low <= 0.5 <= high
        low, high = bootstrap_ci(rows, n_boot=300)
        naive += not low <= 0.5 <= high
    assert missed <= 24 and naive > 50  # 10 expected of the one, most of the other's intervals are half too short


def test_paired_difference_with_unequal_seeds():
    d, low, high = paired_difference(np.random.default_rng(0).random((4, 30)), np.random.default_rng(1).random(30))
    assert low < d < high


@pytest.mark.parametrize("bad", [[], np.zeros((2, 0)), np.zeros((2, 2, 2)), [0.1, np.nan], [0.1, np.inf], ["a"], [[1.0], [1.0, 2.0]], 3.0, None])
def test_bad_values(bad):
    with pytest.raises(ValueError, match="values: got .*accepted"): bootstrap_ci(bad)
    with pytest.raises(ValueError, match="^a: got .*accepted"): paired_difference(bad, [1.0])
    with pytest.raises(ValueError, match="^b: got .*accepted"): paired_difference([1.0], bad)


@pytest.mark.parametrize("option", [dict(n_boot=0), dict(n_boot=1.5), dict(level=0), dict(level=95), dict(seeds="t"), dict(generator=3)])
def test_bad_options(option):
    for call in (lambda: bootstrap_ci([1.0, 2.0], **option), lambda: paired_difference([1.0, 2.0], [1.0, 2.0], **option)):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: got .*accepted"): call()


def test_different_problems():
    with pytest.raises(ValueError, match="b: got 2 problems against 3 of a"): paired_difference(np.ones(3), np.ones(2))
