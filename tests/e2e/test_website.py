"""The documentation site: built as `make docs` does, and opened in a browser."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import get_args

import pytest
from browser import Browser

import meerkat
from meerkat.cli import app
from meerkat.config.parts import Choice, Section

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def build(to: Path, source: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(source / "website/build.py"), "--to", str(to)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("website")
    done = build(to)
    assert done.returncode == 0, done.stdout + done.stderr
    return to / "site"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site: Path) -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    pages = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    for document in documents:
        name = document.relative_to(ROOT).with_suffix("").as_posix()
        assert ("index" if name == "README" else name) in pages
    loaded = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?(https?:)?//""")
    for path in site.rglob("*.html"):
        assert not loaded.search(path.read_text("utf-8")), path


def names_of(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Names of all fields of a recipe, and of its sections."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section) and kind is not Choice:
                yield from names_of(kind, f"{prefix}{name}.")


def test_the_reference_has_every_field_command_and_name(site: Path) -> None:
    reference = site / "docs/reference"
    assert json.loads((reference / "recipe.schema.json").read_text("utf-8")) == meerkat.schema()
    recipe = (reference / "recipe.html").read_text("utf-8")
    for name in names_of(meerkat.Recipe):
        assert f'id="{name.replace("_", "-")}"' in recipe
    commands = (reference / "commands.html").read_text("utf-8")
    for command in app.registered_commands:
        assert command.callback is not None
        assert f'id="meerkat-{command.callback.__name__}"' in commands
    functions = (reference / "api.html").read_text("utf-8")
    for name in meerkat.__all__:
        assert re.search(rf'id="meerkat\.[\w.]*\b{name}"', functions), name


def test_a_link_to_nothing_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "src").symlink_to(ROOT / "src")
    for name in ("deploy", "docker", "docs", "experiments", "recipes", "website"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "docs/broken.md").write_text("# Broken\n\n[nowhere](missing.md)\n")
    done = build(tmp_path / "build", tmp_path)
    assert done.returncode != 0
    told = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
    assert "missing.md" in told
    assert "1 issue found" in told


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_browser_finds_a_field_and_asks_nobody_else(tmp_path: Path, address: str) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"{address}/index.html")
        assert browser.evaluate("document.title") == "Overview - Meerkat"
        browser.evaluate("document.querySelector('.md-search__button').click()")
        box = "[...document.querySelectorAll('*')].find(e => e.shadowRoot?.querySelector('dialog'))"
        browser.wait_for(f"{box}?.shadowRoot.activeElement?.tagName == 'INPUT'")
        browser.call("Input.insertText", text="clip_factor")
        found = browser.wait_for(f"{box}.shadowRoot.querySelector('[role=option]')?.href")
        assert found.startswith(f"{address}/docs/reference/recipe.html")
        assert found.endswith("#federation.clip-factor")
        for page in ("docs/reference/recipe", "docs/reference/api", "docs/method", "docs/guide"):
            browser.open(f"{address}/{page}.html")
            assert browser.evaluate("document.querySelectorAll('h1').length") == 1
        outside = [r for r in browser.requests if not r.startswith((f"{address}/", "data:"))]
        assert outside == []
        assert browser.complaints == []
