"""What the package promises as a whole: its names, what a server imports, its documents."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import meerkat
from meerkat.config import load_recipe, parse_recipe
from meerkat.tasks import resolve_task

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SERVER = ("algorithms", "config", "federation", "journal", "tasks", "transport", "zo")
"""Packages that a server has, whole."""
ABSENT = ("altair", "datasets", "pandas", "torch", "transformers", "vl_convert")


def modules(*packages: str) -> list[str]:
    """The names of all modules of these packages of ours."""
    found = [f"meerkat.{package}" for package in packages]
    for name in tuple(found):
        package = importlib.import_module(name)
        if hasattr(package, "__path__"):
            found += [m.name for m in pkgutil.walk_packages(package.__path__, f"{name}.")]
    return sorted(found)


def every_module() -> list[str]:
    top = [m.name for m in pkgutil.iter_modules(meerkat.__path__) if m.name != "__main__"]
    return ["meerkat", *modules(*top)]


def in_order(names: list[str]) -> list[str]:
    """Constants, then classes, then functions, as ruff sorts `__all__`."""
    return sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))


def test_exported_names_are_sorted_and_are_no_modules() -> None:
    assert meerkat.__all__ == sorted(meerkat.__all__)
    for name in meerkat.__all__:
        assert not isinstance(getattr(meerkat, name), types.ModuleType), name
    assert dir(meerkat) == meerkat.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        meerkat.nonsense  # noqa: B018


@pytest.mark.parametrize("name", every_module())
def test_every_module_says_what_it_is_and_exports_sorted_names(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, name
    exported = list(getattr(module, "__all__", []))
    assert exported == in_order(exported)
    assert len(set(exported)) == len(exported)
    for each in exported:
        assert hasattr(module, each), each


def test_a_server_imports_no_model_code_and_no_pictures() -> None:
    names = [*modules(*SERVER), "meerkat.engines.remote", "meerkat.runs.remote_run", "meerkat.api"]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print(sorted(set({ABSENT!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# The documents


def blocks(path: Path, language: str) -> list[str]:
    """What stands in a document in this language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_readmes_recipe_is_valid() -> None:
    recipe = parse_recipe(tomllib.loads("".join(blocks(ROOT / "README.md", "toml"))))
    resolve_task(recipe.task)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_uses_names_that_exist(path: Path) -> None:
    """tests/integration/test_training.py runs that of the README."""
    for block in blocks(path, "python"):
        compile(block, path.name, "exec")
        for name in re.findall(r"\bmeerkat\.(\w+)\(", block):
            assert name in meerkat.__all__
        for package, names in re.findall(r"^from (meerkat[\w.]*) import ([\w, ]+)$", block, re.M):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(package), name), f"{package}.{name}"


def test_shipped_recipes_are_valid() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        resolve_task(load_recipe(path).task)


def named_files(path: Path) -> Iterator[Path]:
    """Files and folders of the repository that a document names in backticks or links to."""
    text = path.read_text()
    for name in re.findall(
        r"`((?:src/|tests/|docs/|recipes/|experiments/|deploy/)[\w/.-]+)`", text
    ):
        yield ROOT / name
    for target in re.findall(r"\]\(([\w/.-]+)(?:#[\w-]*)?\)", text):
        yield path.parent / target
    if path.name == "ARCHITECTURE.md":  # its tables count from the package
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", text):
            if not name.startswith(("src/", "tests/")) and "NAME" not in name:
                bare = name.startswith("test_")
                yield ROOT / "tests/integration" / name if bare else ROOT / "src/meerkat" / name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_files_that_exist(path: Path) -> None:
    missing = [str(name) for name in named_files(path) if not name.exists()]
    assert not missing


def test_architecture_names_every_package() -> None:
    """And in its reading order, which import-linter keeps."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for module in pkgutil.iter_modules(meerkat.__path__):
        name = f"{module.name}/" if module.ispkg else f"{module.name}.py"
        assert f"`{name}`" in text or module.name == "__main__", name
