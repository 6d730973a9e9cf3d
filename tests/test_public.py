"""What the package promises as a whole: its names, its import order, its README."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import meerkat
from meerkat.recipe import load_recipe
from meerkat.tasks import resolve_task

ROOT = Path(__file__).parent.parent


def test_exported_names_are_sorted_and_are_no_modules() -> None:
    assert meerkat.__all__ == sorted(meerkat.__all__)
    for name in meerkat.__all__:
        assert not isinstance(getattr(meerkat, name), types.ModuleType), name
    assert dir(meerkat) == meerkat.__all__


def test_every_room_exports_sorted_names_that_exist() -> None:
    for path in sorted((ROOT / "src/meerkat").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        if path.name == "__init__.py" or path.name == "__main__.py" or "tasks" in path.parts:
            continue
        module = __import__(name, fromlist=["x"])
        for exported in getattr(module, "__all__", []):
            assert hasattr(module, exported), f"{name}.{exported}"


def test_the_server_imports_no_model_code() -> None:
    rooms = ["rounds", "protocol", "recipe", "journal", "trajectories", "early_stopping"]
    rooms = [f"meerkat.{room}" for room in rooms]
    server = ROOT / "src/meerkat/server"
    rooms += [f"meerkat.server.{path.stem}" for path in server.glob("[a-z]*.py")]
    code = f"""
import importlib, sys
for room in {rooms!r}:
    importlib.import_module(room)
print(sorted({{"torch", "transformers", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_readmes_recipe_is_valid_and_its_python_compiles() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = dict.fromkeys(("toml", "python"), "")
    for language, block in re.findall(r"```(toml|python)\n(.*?)```", text, re.DOTALL):
        blocks[language] += block
        if language == "python":
            compile(block, "README", "exec")
    assert blocks["toml"]
    assert blocks["python"]
    for name in re.findall(r"meerkat\.(\w+)\(", blocks["python"]):
        assert name in meerkat.__all__


def test_shipped_recipes_are_valid() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        resolve_task(load_recipe(path).task)


def test_documents_name_files_that_exist() -> None:
    """A path in backticks in ARCHITECTURE.md is one of the repository."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for name in re.findall(r"`((?:src/meerkat/|tests/|docs/|recipes/)[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"^\| `([\w/]+(?:\.py|/))`", text, re.MULTILINE):
        assert (ROOT / "src/meerkat" / name).exists(), name
