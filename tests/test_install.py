"Wheel and sdist build and install; `import relax` needs none of the optional packages and little time; the first cell of every notebook gets what is missing."
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
OPTIONAL = "nbdev fastcore execnb IPython jupyter ipykernel jupytext trl peft accelerate datasets bitsandbytes math_verify reasoning_gym sphinx playwright pytest".split()


def first_code(notebook: Path) -> str:
    return "".join(next(c["source"] for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"))


def run(python, code, **options):
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def build(source: Path, target: Path, kind: str) -> Path:
    "A wheel or an sdist by the project's own backend, with the setuptools at hand."
    name = run(sys.executable, f"from setuptools.build_meta import build_{kind}; print(build_{kind}({str(target)!r}))", cwd=source).splitlines()[-1]
    return target / name


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "(wheel, sdist), the wheel made from what the sdist holds, as an installer would."
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("setup.py", "pyproject.toml", "settings.ini", "README.md", "LICENSE", "MANIFEST.in"): shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "relax", source / "relax", ignore=shutil.ignore_patterns("__pycache__"))
    sdist = build(source, target, "sdist")
    with tarfile.open(sdist) as archive: archive.extractall(target, filter="data")
    return build(target / sdist.name.removesuffix(".tar.gz"), target, "wheel"), sdist


@pytest.fixture
def python(tmp_path):
    "An interpreter of its own, in which the packages at hand can be imported, but not this checkout."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"), tmp_path / "env" / "Lib" / "site-packages")
    (site / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # a path of a .pth is searched, but its own .pth files, ours among them, are not read
    return next(p for p in (tmp_path / "env" / "bin" / "python", tmp_path / "env" / "Scripts" / "python.exe") if p.exists()), site


def test_wheel_holds_the_package_and_its_scripts(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {f"relax/{p.name}" for p in (ROOT / "relax").glob("*.py")} <= set(names)
    assert not [n for n in names if n.split("/")[0] in ("tests", "nbs", "site", "data")]
    scripts = next(n for n in names if n.endswith("entry_points.txt"))
    assert all(s in zipfile.ZipFile(built[0]).read(scripts).decode() for s in ("relax_train", "relax_eval", "relax_reproduce"))


def test_extras_are_named(built):
    wheel = zipfile.ZipFile(built[0])
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert all(f"Provides-Extra: {extra}\n" in metadata for extra in ("gpu", "trl", "dev", "site", "eval"))


def test_import_from_the_wheel_needs_nothing_optional(built, python, tmp_path):
    interpreter, site = python
    zipfile.ZipFile(built[0]).extractall(site)
    code = f"""
        import sys
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split('.')[0] in {OPTIONAL}: raise ImportError(name)
        sys.meta_path.insert(0, Refuse())
        import relax, relax.train, relax.experiments, relax.demo, relax.benchmarks, relax.gpu
        print(relax.__file__)"""
    assert Path(run(interpreter, textwrap.dedent(code), cwd=tmp_path)).is_relative_to(site)


def test_import_is_quick():
    "In seconds of processor time, which other programs do not change; the best of three, for the disk."
    code = "import time; t = time.process_time(); import relax; print(time.process_time() - t)"
    assert min(float(run(sys.executable, code)) for _ in range(3)) < 2.5


def test_first_cell_does_nothing_where_relax_is_installed(built, python, tmp_path):
    interpreter, site = python
    zipfile.ZipFile(built[0]).extractall(site)
    folder = tmp_path / "empty"
    folder.mkdir()
    run(interpreter, "\n".join(dict.fromkeys(map(first_code, NOTEBOOKS))) + "\nimport relax", cwd=folder)
    assert not list(folder.iterdir())


def test_first_cells_are_the_same_but_for_extras():
    assert len({re.sub(r"(?<=\{folder\})\[[a-z,]+\]", "", first_code(p)) for p in NOTEBOOKS}) == 1


def test_first_cell_installs_as_on_colab(python, tmp_path):
    "From an empty folder, with this checkout in the place of the address and no network: afterwards relax is imported, with its data and models."
    if not (ROOT / ".git").exists() or shutil.which("git") is None: pytest.skip("needs a git checkout")
    if importlib.util.find_spec("pip") is None: pytest.skip("needs pip")
    cell = first_code(ROOT / "nbs" / "14_gpu.ipynb")  # the others differ from it in the extras only
    address = cell.split('"1", "')[1].split('"')[0]
    folder = tmp_path / "empty"
    folder.mkdir()
    instead = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf", "GIT_CONFIG_VALUE_0": address}
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # pip reads this 0 as "off": no isolation
    check = """
        from relax.reasoner import load_reasoner
        from relax.record import data_dir, notebook_cost
        assert folder in data_dir().parents and "not measured" not in notebook_cost("03_dsd")
        load_reasoner("countdown-tiny")"""
    env = {k: v for k, v in os.environ.items() if k not in ("RELAX_DATA", "PYTHONPATH")} | instead | offline
    run(python[0], cell + textwrap.dedent(check), cwd=folder, env=env)
    assert run(python[0], "import relax; print(relax.__file__)", cwd=folder, env=env).startswith(str(folder))  # after a restart, too
