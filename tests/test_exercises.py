"""Every notebook has two exercises or more, and every folded solution runs.

A solution is run after those cells of its notebook on which it depends, found by the names that it uses, not after the whole notebook; what the notebook
exports comes from the module.
"""
import ast
import builtins
import contextlib
import importlib
import io
import json
import re
from functools import partial
from pathlib import Path

import matplotlib
import pytest
import torch

from relax import record

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts and p.stem != "index")
SKIPPED = re.compile(r"#\|\s*(export|default_exp|slow|gpu)\b")


def cells(path) -> list[str]:
    "The code that a solution may depend on, in order; exported cells are in the module."
    found = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    return [source for c in found if not SKIPPED.match(source := "".join(c["source"])) and "find_spec(\"relax\")" not in source]


def solutions(path) -> list[str]:
    "The code of every folded solution."
    text = "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    folded = re.findall(r"<details>.*?</details>", text, re.S)
    return ["\n".join(re.findall(r"^```python\n(.*?)^```", part, re.M | re.S)) for part in folded if "<summary>Solution" in part]


def reads(node) -> set[str]:
    "Names that an expression or definition reads from outside: not its own arguments, loop variables and locals."
    inner = set().union(*map(reads, ast.iter_child_nodes(node)))
    if isinstance(node, ast.Name): return {node.id} if isinstance(node.ctx, ast.Load) else set()
    if isinstance(node, ast.AugAssign): return inner | ({node.target.id} if isinstance(node.target, ast.Name) else set())
    if isinstance(node, (ast.Lambda, ast.FunctionDef)): return inner - {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)} - (defines(node) if isinstance(node, ast.FunctionDef) else set())
    return inner - defines(node) if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)) else inner


def first_read(statements, bound: frozenset = frozenset()) -> tuple[set[str], frozenset]:
    "Names that statements, one after the other, read without having bound them; and what is bound in the end. What only one branch binds does not count."
    found = set()
    for n in statements:
        blocks = [getattr(n, b) for b in ("body", "orelse", "finalbody") if hasattr(n, b)] if isinstance(n, (ast.For, ast.While, ast.With, ast.If, ast.Try)) else []
        inside = {id(s) for block in blocks for s in block}
        heads = [c for c in ast.iter_child_nodes(n) if id(c) not in inside] if blocks else [n]
        if not isinstance(n, ast.Try): found |= set().union(*map(reads, heads)) - bound
        else: blocks += [[ast.Assign([ast.Name(h.name or "_", ast.Store())], h.type or ast.Constant(0)), *h.body] for h in n.handlers]
        if not isinstance(n, (ast.If, ast.Try)): bound |= set().union(*map(defines, heads))
        for block in blocks:
            new, after = first_read(block, bound)
            found |= new
            if not isinstance(n, ast.If): bound = after
    return found, bound


def uses(code: str) -> set[str]:
    "Names that a piece of code needs from before."
    return first_read(ast.parse(code).body)[0] - set(dir(builtins))


def defines(code) -> set[str]:
    "Names that a piece of code, or a node of it, binds."
    tree = list(ast.walk(ast.parse(code) if isinstance(code, str) else code))
    names = {n.id for n in tree if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names |= {n.name for n in tree if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)) and n.name}
    return names | {(a.asname or a.name).split(".")[0] for n in tree if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}


def touches(code: str) -> set[str]:
    "Names whose objects it may change: `x[...] = `, `x.y = `, a bare `x.method(...)`, and what a bare call is given, unless it only prints."
    def base(n):
        while isinstance(n, (ast.Attribute, ast.Subscript, ast.Call)): n = n.func if isinstance(n, ast.Call) else n.value
        return {n.id} if isinstance(n, ast.Name) else set()
    found = set()
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, (ast.Attribute, ast.Subscript)) and isinstance(n.ctx, (ast.Store, ast.Del)): found |= base(n)
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call) and not (isinstance(n.value.func, ast.Name) and n.value.func.id == "print"):
            found |= base(n.value).union(*(base(a) for a in [*n.value.args, *(k.value for k in n.value.keywords)]))
    return found


def needed(code: str, before: list[str]) -> set[int]:
    "Which of the cells `before` a piece of code depends on: the last that binds each of its names, those that change it since, and what these depend on."
    chosen, waiting = set(), [(name, len(before)) for name in uses(code)]
    while waiting:
        name, end = waiting.pop()
        binding = next((i for i in reversed(range(end)) if name in defines(before[i])), None)
        if binding is None: continue
        for i in (j for j in range(binding, end) if j == binding or name in touches(before[j])):
            if i not in chosen: waiting += [(n, i) for n in uses(before[i])]
            chosen.add(i)
    return chosen


def namespace(path) -> dict:
    "What the notebook's module knows, or nothing for a notebook that exports nothing."
    module = re.search(r"#\| default_exp (\w+)", path.read_text(encoding="utf-8"))
    return dict(vars(importlib.import_module(f"relax.{module[1]}"))) if module else {}


def test_slices_are_right():
    before = ["a = [1]", "b = 2", "a.append(b)", "c = a", "a = [9]"]
    assert needed("print(c)", before) == {0, 1, 2, 3} and needed("print(a)", before) == {4} and needed("print(1)", before) == set()
    assert needed("a = 3\nprint(a)", before) == needed("print([a for a in [1]])", before) == needed("(lambda a: a)(1)", before) == set()
    assert needed("for b in [1]:\n    c = b\n    print(c)\nprint(b)", before) == needed("def c(a):\n    b = a\n    return b", before) == set()
    assert needed("b = b + 1", before) == needed("b += 1", before) == needed("for a in [1]: b = b + a", before) == needed("if 0: b = 1\nprint(b)", before) == needed("print(b)", before) != set()
    assert needed("try: print(1)\nexcept ValueError as b: print(b)", before) == set() and needed("def f(): return b", before) == needed("print(b)", before)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_two_exercises_or_more(notebook):
    assert len(solutions(notebook)) >= 2


@pytest.mark.exercises
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_solutions_run(notebook, monkeypatch, tmp_path):
    torch.set_num_threads(1)
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    for name in ("save_figure", "save_table"): monkeypatch.setattr(record, name, partial(getattr(record, name), folder=tmp_path))  # a test draws nothing into figures/
    before, found = cells(notebook), [s for s in solutions(notebook) if s]
    space = namespace(notebook) | {"__name__": notebook.stem, "display": print}
    wanted = sorted(set().union(*(needed(s, before) for s in found)))
    with contextlib.redirect_stdout(io.StringIO()):
        for i in wanted: exec(compile(before[i], f"{notebook.stem}, code cell {i}", "exec"), space)
        for i, code in enumerate(found, 1): exec(compile(code, f"{notebook.stem}, solution {i}", "exec"), space)
    matplotlib.pyplot.close("all")
