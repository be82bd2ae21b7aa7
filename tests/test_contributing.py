"The worked examples of CONTRIBUTING.md do what they say."
import re
from pathlib import Path

import pytest
import torch

from relax import train

GUIDE = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
PARTS = [(re.match(r"Add a (\w+)", part)[1], "\n".join(re.findall(r"^```python\n(.*?)^```", part, re.M | re.S)))
         for part in re.split(r"^## ", GUIDE, flags=re.M) if part.startswith("Add a")]


@pytest.fixture(autouse=True)
def methods_as_before():
    torch.set_num_threads(1)
    before = dict(train.METHODS)
    yield
    train.METHODS.clear()
    train.METHODS.update(before)


def test_there_are_three():
    assert [name for name, _ in PARTS] == ["rival", "task", "figure"]


@pytest.mark.parametrize("name, code", PARTS, ids=[name for name, _ in PARTS])
def test_example_runs(name, code):
    # dataclasses look their module up in sys.modules by name
    exec(compile(code, f"CONTRIBUTING.md, {name}", "exec"), {"__name__": __name__})
