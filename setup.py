"""Hand settings.ini, the one place where nbdev and pip both look, to setuptools."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read("settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("trl", "gpu", "eval", "site", "browser", "dev")}

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"], license="Apache-2.0", license_files=["LICENSE"],
    keywords=cfg["keywords"].split(), packages=find_packages(include=["relax", "relax.*"]),
    python_requires=f">={cfg['min_python']}", install_requires=cfg["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["relax=relax._modidx:d"]},
)
