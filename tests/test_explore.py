"Controls where somebody can move them, the same picture once where not; the notebook's stored pictures."
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from relax.explore import live, play

NOTEBOOK = json.loads((Path(__file__).resolve().parents[1] / "nbs" / "explore.ipynb").read_text(encoding="utf-8"))
CHOICES = {"kind": ["sine", "line"], "n": [4, 8, 16]}


@pytest.fixture(autouse=True)
def quiet():
    matplotlib.use("agg")
    yield
    plt.close("all")


@pytest.fixture
def screen(monkeypatch):
    "A kernel whose front end takes input, as a notebook on a screen has it."
    pytest.importorskip("ipywidgets")
    kernel = SimpleNamespace(_allow_stdin=True)
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=kernel))
    return kernel


def curve(kind, n):
    "Draws; what was drawn is found in `curve.drawn`."
    _, ax = plt.subplots()
    line, = ax.plot(np.sin(np.arange(n)) if kind == "sine" else np.arange(n))
    curve.drawn.append(line.get_ydata().tolist())


@pytest.fixture(autouse=True)
def forget(): curve.drawn = []


def test_with_controls_it_draws_at_the_start_and_again_for_each_change(screen, capsys):
    play(curve, CHOICES, n=8)
    assert live() and curve.drawn == [np.sin(np.arange(8)).tolist()]
    kind, n = curve.widget.children[:2]
    assert type(kind).__name__ == "Dropdown" and type(n).__name__ == "SelectionSlider"
    kind.value = "line"
    n.value = 4
    assert curve.drawn[1:] == [list(range(8)), list(range(4))]


def test_the_same_picture_once_without_ipywidgets(screen, monkeypatch):
    play(curve, CHOICES, n=8)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    play(curve, CHOICES, n=8)
    assert not live() and len(curve.drawn) == 2 and curve.drawn[0] == curve.drawn[1]


def test_once_where_a_program_runs_the_notebook(screen):
    screen._allow_stdin = False
    play(curve, CHOICES, kind="line")
    assert not live() and curve.drawn == [list(range(4))]


def test_once_outside_of_a_notebook(monkeypatch):
    if importlib.util.find_spec("IPython"): monkeypatch.setattr("IPython.get_ipython", lambda: None)
    play(curve, CHOICES)
    assert curve.drawn == [np.sin(np.arange(4)).tolist()]


@pytest.mark.parametrize("start, said", [({"n": 5}, r"n: got 5, accepted are \[4, 8, 16\]"), ({"m": 4}, r"m: got 4, accepted are the settings \['kind', 'n'\]")])
def test_a_wrong_start_is_refused(start, said):
    with pytest.raises(ValueError, match=said): play(curve, CHOICES, **start)
    assert not curve.drawn


def test_stored_outputs_are_pictures_without_dead_controls():
    played = [c for c in NOTEBOOK["cells"] if c["cell_type"] == "code" and "".join(c["source"]).startswith("play(")]
    assert len(played) == 2 and all(any("image/png" in o.get("data", {}) for o in c["outputs"]) for c in played)
    assert "widget-view" not in json.dumps(NOTEBOOK) and "interactive(" not in json.dumps([c.get("outputs") for c in NOTEBOOK["cells"]])
