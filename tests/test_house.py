"The house rules: modules and README are what the notebooks say, notebooks are clean, code stays short."
import ast
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from relax.record import readme

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "relax").glob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the checkout in which nbdev may write."
    folder = tmp_path_factory.mktemp("house")
    for name in ("nbs", "relax"): shutil.copytree(ROOT / name, folder / name)
    for name in ("settings.ini", "pyproject.toml", "setup.py"): shutil.copy(ROOT / name, folder)
    for tool in ("nbdev_export", "nbdev_clean"): subprocess.run([Path(sys.executable).parent / tool], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_module_is_what_its_notebook_exports(copy, module):
    assert (copy / "relax" / module.name).read_text() == module.read_text(), "run `make export`"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(copy, notebook):
    assert (copy / notebook.relative_to(ROOT)).read_text() == notebook.read_text(), "run `make export`"


def test_readme_is_what_the_index_says():
    assert readme(ROOT / "nbs" / "index.ipynb") == (ROOT / "README.md").read_text(), "run `make export`"


def functions(path):
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_functions_are_short():
    lengths = {f"{p.stem}.{f.name}": f.end_lineno - f.lineno + 1 for p in MODULES for f in functions(p)}
    assert max(lengths.values()) <= 60, {k: v for k, v in lengths.items() if v > 60}
    assert statistics.median(lengths.values()) < 10


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_are_short_and_outputs_stored(notebook):
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    assert all(len("".join(c["source"]).splitlines()) <= 40 for c in cells)
    assert any(c["outputs"] for c in cells), "execute the notebook and store its outputs"
    assert not any(o["output_type"] == "error" for c in cells for o in c["outputs"])
