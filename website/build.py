"""Build the documentation site from the repository's documents, docstrings, notebook and schema.

    python website/build.py                    # into build/site
    python website/build.py --to FOLDER

The pages lie as they do in the repository, so that links between them, and to files of it, are the
same in both places. A link to nothing, or any other warning, ends the build.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from recipe_page import recipe_page

import meerkat

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COPIED = (
    *("*.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml"),
    *("deploy/*", "docker/**/*", "docs/**/*", "experiments/*.md", "recipes/**/*.toml"),
)
"""What is part of the site, or linked to from it."""
NAV: dict[str, tuple[str, ...]] = {
    "Start": ("README.md", "docs/notebook.md"),
    "Guide": ("docs/guide.md", "docs/comparing.md", "docs/deploy.md", "docker/README.md"),
    "Method": ("docs/method.md", "docs/deviations.md", "docs/security.md"),
    "Results": ("docs/experiments.md", "docs/results/*.md"),
    "Reference": (
        *("docs/reference/recipe.md", "docs/reference/commands.md", "docs/reference/api.md"),
        *("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    ),
}
"""Pages by section, in their order; those of docs/ that are not here go under `REST`."""
REST = "Guide"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=ROOT / "build", help="holds pages/ and site/")
    given = parser.parse_args()
    work: Path = given.to.resolve()
    pages = work / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    copy_documents(pages)
    for notebook in pages.glob("docs/*.ipynb"):
        show_notebook(notebook)
    write_reference(pages / "docs/reference")
    settings = (HERE / "zensical.toml").read_text("utf-8").replace("../../src", str(ROOT / "src"))
    nav = f"[project]\nnav = {navigation(pages)}\n"
    (work / "zensical.toml").write_text(settings.replace("[project]\n", nav, 1), "utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run([*command, "-f", str(work / "zensical.toml")], cwd=work).returncode


def copy_documents(pages: Path) -> None:
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_file() and "__pycache__" not in path.parts:
                to = pages / path.relative_to(ROOT)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)
                if to.suffix == ".md":  # notebooks become pages
                    text = to.read_text("utf-8")
                    to.write_text(text.replace(".ipynb)", ".md)"), "utf-8")


def show_notebook(notebook: Path) -> None:
    """A page of a notebook with the outputs that it holds, in its place."""
    from nbconvert import MarkdownExporter

    names = {"unique_key": notebook.stem, "output_files_dir": f"{notebook.stem}-files"}
    text, made = MarkdownExporter().from_filename(str(notebook), resources=names)
    notebook.with_suffix(".md").write_text(text, "utf-8")
    for name, content in made["outputs"].items():
        path = notebook.parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    notebook.unlink()


def write_reference(folder: Path) -> None:
    """Pages that are made of the code: the recipe's fields, the commands, the functions."""
    folder.mkdir(parents=True)
    schema = meerkat.schema()
    (folder / "recipe.schema.json").write_text(json.dumps(schema, indent=2), "utf-8")
    (folder / "recipe.md").write_text(recipe_page(schema), "utf-8")
    (folder / "commands.md").write_text(commands_page(), "utf-8")
    names = "\n\n".join(f"::: meerkat.{name}" for name in meerkat.__all__)
    (folder / "api.md").write_text(
        f"# Python\n\nWhat `import meerkat` offers.\n\n{names}\n", "utf-8"
    )


def commands_page() -> str:
    """typer's own description of all commands."""
    command = [sys.executable, "-m", "typer", "meerkat.cli", "utils", "docs", "--name", "meerkat"]
    done = subprocess.run(
        [*command, "--title", "Commands"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TERMINAL_WIDTH": "200"},
    )
    # It escapes for HTML also within code, where Markdown does it again.
    return done.stdout.replace("&#x27;", "'").replace("&gt;", ">").replace("&lt;", "<")


def navigation(pages: Path) -> str:
    """The navigation as TOML: pages by section, under their first headings."""

    def found(pattern: str) -> list[str]:
        return sorted(path.relative_to(pages).as_posix() for path in pages.glob(pattern))

    sections = {
        title: [page for pattern in patterns for page in found(pattern)]
        for title, patterns in NAV.items()
    }
    named = {page for listed in sections.values() for page in listed}
    sections[REST] += [page for page in found("docs/*.md") if page not in named]
    written = [
        f"{{ {json.dumps(title)} = ["
        + ", ".join(
            f"{{ {json.dumps(_title(pages / page))} = {json.dumps(page)} }}" for page in listed
        )
        + "] }"
        for title, listed in sections.items()
    ]
    return "[\n  " + ",\n  ".join(written) + ",\n]"


def _title(page: Path) -> str:
    if page.name == "README.md" and page.parent.name == "pages":
        return "Overview"
    heading = re.search(r"^# (.+)$", page.read_text("utf-8"), re.M)
    if heading is None:
        raise SystemExit(f"{page}: it has no heading; begin it with # and its title")
    return heading[1].replace("`", "").partition(": ")[0]


if __name__ == "__main__":
    sys.exit(main())
