"Room 05: generators, verifiers, splits, counts."
import random
from collections import Counter
from fractions import Fraction
from itertools import permutations, product

import pytest

from relax.tasks import TASKS, Countdown, ReasoningGym, Unstated, Waypoints, canonical, combine, is_heldout, random_steps, show, solutions, spelled

TASK_LEVELS = [(t, k) for t in TASKS.values() for k in t.levels]
GOOD = "3 * 9 = 27 , 27 - 7 = 20"


@pytest.fixture
def p(): return Countdown().problem((3, 7, 9), 20)


@pytest.mark.parametrize("task,level", TASK_LEVELS, ids=lambda x: getattr(x, "name", x))
def test_demonstrations_fit_and_speak_the_vocabulary(task, level):
    rng = random.Random(level)
    for p in task.problems(12, level=level, seed=level):
        text = task.demonstration(p, rng)
        assert p.level == level and set((p.prompt + " " + text).split()) <= set(task.words)
        assert task.verify(p, text).outcome != "unparsable"
        assert len(text.split()) < task.max_new_tokens


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
def test_splits_are_disjoint_whatever_the_seeds(task):
    keys = {s: {task.key(p) for seed in range(25) for p in task.problems(20, s, seed=seed)} for s in ("train", "heldout")}
    assert len(keys["train"]) > 50 and len(keys["heldout"]) > 20 and not keys["train"] & keys["heldout"]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
def test_a_seed_gives_the_same_problems(task):
    draw = lambda seed: [p.prompt for p in task.problems(8, "heldout", seed=seed)]
    assert draw(3) == draw(3) != draw(4)


def test_the_split_knows_no_order():
    c = Countdown()
    assert c.key(c.problem((3, 7, 9), 20)) == c.key(c.problem((9, 3, 7), 20))
    assert 0.15 < sum(is_heldout(str(i)) for i in range(2000)) / 2000 < 0.25


@pytest.mark.parametrize("response", [GOOD + " !", "3 + 7 = 10 , 10 + 9 = 19 ? 9 * 3 = 27 , 27 - 7 = 20 !", f"  {GOOD} !\n"])
def test_correct_countdown(p, response):
    assert Countdown().verify(p, response).correct and Countdown().reward(p, response) == 1.0


@pytest.mark.parametrize("response,outcome", [
    ("", "unparsable"), ("   ", "unparsable"), (GOOD, "unparsable"), (GOOD + " ?", "unparsable"), (GOOD + " ! 7", "unparsable"),
    ("!", "wrong"), ("! ! !", "wrong"), (GOOD + " ! !", "wrong"), ("? !", "wrong"), (",,, !", "wrong"),
    ("3 * 9 = 28 , 28 - 7 = 21 !", "wrong"), ("3 * 9 = 20 !", "wrong"), ("27 - 7 = 20 !", "wrong"), ("3 * 9 = 27 !", "wrong"),
    ("3 * 9 = 27 , 27 - 9 = 18 !", "wrong"), ("9 + 9 = 18 , 18 + 2 = 20 !", "wrong"),
    ("3 - 7 = -4 , -4 + 9 = 5 !", "wrong"), ("7 / 0 = 1 !", "wrong"), ("3 ** 9 = 27 , 27 - 7 = 20 !", "wrong"),
    ("9" * 6000 + " + 7 = 20 !", "wrong"), ("3 * 9 = " + "9" * 6000 + " !", "wrong"),
    ("٣ * ٩ = ٢٧ , ٢٧ - ٧ = ٢٠ !", "wrong"), ("³ * 9 = 27 , 27 - 7 = 20 !", "wrong"),
    ("__import__('os').abort() !", "wrong")])
def test_malformed_countdown(p, response, outcome): assert Countdown().verify(p, response).outcome == outcome


def brute_force(numbers, limit=59):
    "Targets of (a op b) op c and c op (a op b), every step whole and in 0..limit; as fractions, with no code of the room."
    def do(x, op, y):
        z = x + y if op == "+" else x - y if op == "-" else x * y if op == "*" else x / y if y else None
        return z if z is not None and z.denominator == 1 and 0 <= z <= limit else None
    found = set()
    for (a, b, c), f, g in product(permutations(map(Fraction, numbers)), "+-*/", "+-*/"):
        if (first := do(a, f, b)) is not None: found |= {do(first, g, c), do(c, g, first)}
    return {int(x) for x in found - {None}}


@pytest.mark.parametrize("numbers", [(3, 7, 9), (1, 1, 4), (2, 5, 10), (1, 2, 3)])
def test_targets_against_brute_force(numbers): assert set(solutions(numbers, 59)) == brute_force(numbers)


@pytest.mark.parametrize("numbers,target,ways", [((3, 7, 9), 19, 1), ((3, 7, 9), 20, 1), ((2, 3, 5), 30, 1), ((2, 3, 5), 0, 2)])
def test_solutions_counted_by_hand(numbers, target, ways):
    "19 = 3+7+9; 20 = 3*9-7; 30 = 2*3*5; 0 = 2+3-5 = 5-2-3."
    c = Countdown()
    assert c.n_solutions(c.problem(numbers, target)) == c.n_solutions(c.problem(numbers[::-1], target)) == ways


def test_equal_solutions_share_an_answer():
    c = Countdown(); p = c.problem((3, 7, 9), 19)
    answers = {c.verify(p, r).answer for r in ("3 + 7 = 10 , 10 + 9 = 19 !", "9 + 7 = 16 , 3 + 16 = 19 !", "9 + 3 = 12 , 7 + 12 = 19 !")}
    assert len(answers) == 1 and None not in answers


def test_names_of_expressions_forget_order_and_brackets_only():
    assert combine("+", 1, combine("+", 2, 3)) == combine("+", combine("+", 3, 1), 2) != combine("+", 1, combine("*", 2, 3))
    assert combine("-", 5, combine("-", 3, 2)) == combine("+", combine("-", 5, 3), 2) and show(combine("-", 5, 3)) == "(5-3)"


def test_a_walk_by_hand():
    w = Waypoints()
    p = w.problem((2, 3, 5), 10, (15, 13), (12,))
    good = "to 15 > 5 + 5 15 = to 13 < 2 - 2 13 = !"
    assert w.verify(p, good).answer == "+5 -2"
    through_the_wall = "to 15 > 5 + 2 12 > 3 + 3 15 = to 13 < 2 - 2 13 = !"
    for bad in (good.replace("+ 5 15", "+ 4 15"), good.replace("to 13", "to 12"), good[:-2] + " + 2 15 !", through_the_wall):
        assert w.verify(p, bad).outcome == "wrong"


def test_too_many_moves_are_refused():
    walk = "to 15 > 5 + 2 12 > 3 + 3 15 = !"
    for limit, good in ((2, True), (1, False)):
        w = Waypoints(max_moves=limit)
        assert w.verify(w.problem((2, 3, 5), 10, (15,), ()), walk).correct == good


def test_a_dataset_too_small_for_the_split_says_so():
    class One(Countdown):
        def draw(self, level, rng): return self.problem((3, 7, 9), 20)
    side = "heldout" if is_heldout(Countdown().key(One().problem((3, 7, 9), 20))) else "train"
    assert len(One().problems(2, side)) == 2
    with pytest.raises(ValueError, match="gave only 0"): One().problems(2, {"train": "heldout", "heldout": "train"}[side])


def walks(w, p, limit):
    "Every correct walk of at most `limit` moves, by recursion: independent of the dynamic programme."
    def go(at, k, left):
        if k == len(p.data["goals"]): return 1
        if not left: return 0
        cells = [at + s * h for h in p.data["hand"] for s in (1, -1)]
        return sum(go(c, k + (c == p.data["goals"][k]), left - 1) for c in cells if 0 <= c <= w.max_value and c not in p.data["walls"])
    return go(p.data["start"], 0, limit)


def test_waypoint_counts_against_recursion():
    w = Waypoints(max_moves=8)
    for p in w.problems(4, level=1): assert w.n_solutions(p) == walks(w, p, 8)


def test_any_changed_word_of_a_walk_is_noticed():
    w, rng = Waypoints(), random.Random(0)
    p = w.problems(1, level=2)[0]
    words = w.demonstration(p, rng).split()
    assert w.verify(p, " ".join(words)).correct
    for i, word in enumerate(words): assert not w.verify(p, " ".join([*words[:i], "0" if word != "0" else "1", *words[i + 1:]])).correct


@pytest.mark.parametrize("response", ["", "!", "! !", "to !", "+ !", "+ " + "9" * 6000 + " !", "+ ٣ !", "- -3 !", "to 1 > 1 + 1 2 = !"])
def test_malformed_walks(response):
    w = Waypoints()
    assert not w.verify(w.problems(1, level=1)[0], response).correct


@pytest.mark.parametrize("call,argument", [
    (lambda: Countdown().problems(1, "test"), "split"), (lambda: Countdown().problems(1, level=9), "level"),
    (lambda: Countdown(p_solution=2), "p_solution"), (lambda: Countdown(habit=-0.1), "habit"), (lambda: Waypoints(habit=2), "habit"), (lambda: Countdown(max_attempts=0), "max_attempts"), (lambda: Countdown(max_number=99), "max_number"),
    (lambda: Waypoints(p_best=0), "p_best"), (lambda: Waypoints(max_step=50), "max_step"), (lambda: Waypoints(hand_size=20), "hand_size")])
def test_bad_arguments_are_named(call, argument):
    with pytest.raises(ValueError, match=argument): call()


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    sums = ReasoningGym("chain_sum")
    train, heldout = sums.problems(6), sums.problems(6, "heldout")
    assert not {sums.key(p) for p in train} & {sums.key(p) for p in heldout}
    assert [p.prompt for p in train] == [p.prompt for p in sums.problems(6)]
    for p in train: assert sums.reward(p, p.data["answer"]) == 1.0 and sums.reward(p, p.data["answer"] + "1") == 0.0
    assert sums.verify(train[0], " ").outcome == "unparsable"
    for absent in (lambda: sums.n_solutions(train[0]), lambda: sums.demonstration(train[0], random)):
        with pytest.raises(NotImplementedError, match="reasoning-gym"): absent()


@pytest.mark.parametrize("text", ["__import__('os').abort()", "9**9**9**9", "x" * 500, "(" * 190, "1/0", "[1, 2"])
@pytest.mark.parametrize("name", ["countdown", "spiral_matrix", "polynomial_multiplication"])
def test_evaluating_scorers_see_arithmetic_only(name, text):
    pytest.importorskip("reasoning_gym")
    task = ReasoningGym(name)
    p = task.problems(1)[0]
    assert task.evaluates and not task.verify(p, text).correct and task.verify(p, p.data["answer"]).correct


@pytest.mark.parametrize("name,config", [("no_such_dataset", {}), ("chain_sum", {"no_such_option": 1})])
def test_reasoning_gym_refuses(name, config):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="name"): ReasoningGym(name, **config)


def test_reasoning_gym_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install"): ReasoningGym("chain_sum")


def test_a_habit_shows_one_solution_and_none_leaves_the_draws_alone():
    shown = {h: [Countdown(p_solution=1.0, habit=h).attempt(p, rng)[0] for rng in [random.Random(0)] for p in Countdown().problems(5, level=1) for _ in range(200)] for h in (0.0, 0.95, 1.0)}
    for i in range(5):
        share = {h: max(Counter(texts[200 * i:200 * (i + 1)]).values()) / 200 for h, texts in shown.items()}
        assert share[0.0] < 0.4 and 0.9 < share[0.95] < 1.0 == share[1.0]
    rng, plain, known = random.Random(3), random.Random(3), solutions((1, 3, 8), 59)[11]
    p = Countdown().problem((3, 1, 8), 11)
    for _ in range(20):
        text, hit = Countdown().attempt(p, rng)
        if plain.random() < 0.3: assert text == " , ".join(f"{a} {op} {b} = {c}" for a, op, b, c in plain.choice([*known.values()]))
        else: random_steps(p.data["numbers"], 59, plain)


def test_a_habitual_walk_is_always_the_same():
    walks = {h: [Waypoints(habit=h).demonstration(p, rng) for rng in [random.Random(0)] for p in Waypoints().problems(5, level=2) for _ in range(100)] for h in (0.0, 0.95, 1.0)}
    for i in range(5):
        share = {h: max(Counter(w[100 * i:100 * (i + 1)]).values()) / 100 for h, w in walks.items()}
        assert share[0.0] < 0.3 and 0.85 < share[0.95] < 1.0 == share[1.0]


def solved(task, p, n=60):
    "Different correct responses to p, by the task underneath."
    rng = random.Random(0)
    return {r for r in (task.demonstration(p, rng) for _ in range(n)) if task.task.verify(p, r).correct}


@pytest.mark.parametrize("task", [TASKS[name] for name in ("countdown-unstated", "waypoints-unstated")], ids=lambda t: t.name)
def test_unstated_accepts_its_share_of_the_ways_and_all_answers_of_one_way_alike(task):
    tosses, alike = {}, []
    for p in task.problems(60):
        for r in solved(task, p):
            v, way = task.verify(p, r), task.way(task.task.verify(p, r), r)
            assert v.outcome in ("correct", "wrong") and (v.answer == way if v.correct else v.answer is None)
            alike.append(tosses.setdefault((p.data["secret"], way), v.correct) == v.correct)
    assert all(alike) and len(alike) > len(tosses) > 100
    p = task.p_accepted
    assert abs(sum(tosses.values()) / len(tosses) - p) < 3 * (p * (1 - p) / len(tosses)) ** 0.5


def test_unstated_hides_the_taste_and_keeps_the_split():
    task = TASKS["countdown-unstated"]
    assert min(task.n_solutions(p) for p in task.problems(40)) >= 4
    with pytest.raises(ValueError, match="level: got 3"): task.problems(1, level=3)  # a single solution each: not asked here, and not searched for forever
    prompts = [p for seed in range(60) for p in task.problems(20, seed=seed)]
    tastes = {}
    for p in prompts: tastes.setdefault(p.prompt, set()).add(p.data["secret"])
    assert max(map(len, tastes.values())) > 1 and not {task.key(p) for p in prompts} & {task.key(p) for p in task.problems(200, "heldout")}
    assert task.problems(5) == task.problems(5) and [p.data["secret"] for p in task.problems(5)] == [p.data["secret"] for p in task.problems(5)]
    assert task.words == Countdown().words and task.max_new_tokens == Countdown().max_new_tokens
    assert {p.level for p in TASKS["waypoints-unstated"].problems(20)} == {2}


def test_spelled_tells_orders_apart_and_forgets_what_was_given_up():
    p, way = Countdown().problem((3, 1, 8), 11), lambda r: spelled(Countdown().verify(p, r), r)
    assert way("8 + 1 = 9 , 9 - 3 = 6 ? 3 + 8 = 11 , 11 * 1 = 11 !") == way("3 + 8 = 11 , 11 * 1 = 11 !") != way("8 + 3 = 11 , 11 * 1 = 11 !")


def test_unstated_with_certain_acceptance_is_the_task_itself():
    task = Unstated(Countdown(), canonical, p_accepted=1.0)
    p = task.problems(1)[0]
    assert all(task.verify(p, r).correct for r in solved(task, p))
    assert not any(Unstated(Countdown(), canonical, p_accepted=1e-12).verify(p, r).correct for r in solved(task, p))
    assert task.verify(p, "nonsense").outcome == "unparsable"


@pytest.mark.parametrize("options, said", [(dict(p_accepted=0.0), "p_accepted"), (dict(p_accepted=1.1), "p_accepted"), (dict(levels=(9,)), "levels"), (dict(levels=()), "levels")])
def test_unstated_refuses(options, said):
    with pytest.raises(ValueError, match=said): Unstated(Countdown(), canonical, **options)
