"""What stands beside exported weights in their folder, and the list of what was written.

FOLDER/README.md     the model card
FOLDER/recipe.json   the run's recipe, without paths and settings of its machine
FOLDER/Modelfile     for Ollama, where it imports the architecture
FOLDER/LICENSE       and other texts of the base model's licence, where its folder has them
FOLDER/meerkat.json  SHA-256 of each file, by name: what `meerkat push` uploads
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from meerkat.errors import RunError
from meerkat.exporting.about import About, published_recipe
from meerkat.exporting.card import adapter_card, model_card
from meerkat.exporting.ollama import MODELFILE, modelfile, not_imported
from meerkat.models.loading import LoadedModel

__all__ = ["CARD", "complete_adapter", "complete_model", "written_files"]

CARD, _RECIPE, _LIST = "README.md", "recipe.json", "meerkat.json"
_FORMAT = "meerkat-export-1"
_RECIPE_NOTE = f"`{_RECIPE}`: the recipe of the run, with names in the place of local paths"


def complete_model(folder: Path, about: About, loaded: LoadedModel) -> None:
    """Write what belongs beside a merged model."""
    architecture = type(loaded.model).__name__
    text = modelfile(architecture, loaded.tokenizer, sorted(loaded.ends))
    if text is not None:
        (folder / MODELFILE).write_text(text, "utf-8")
        ollama = f"`{MODELFILE}`: `ollama create NAME` in this folder imports the model"
    else:
        ollama = not_imported(architecture)
    _complete(folder, about)
    card = model_card(about, about.title, loaded, [_RECIPE_NOTE, ollama])
    (folder / CARD).write_text(card, "utf-8")
    _write_list(folder)


def complete_adapter(folder: Path, about: About, kind: str) -> None:
    """Write what belongs beside an adapter for peft.

    Args:
        kind: What peft calls it.
    """
    _complete(folder, about)
    (folder / CARD).write_text(adapter_card(about, about.title, kind, [_RECIPE_NOTE]), "utf-8")
    _write_list(folder)


def written_files(folder: Path) -> list[str]:
    """Names of the files of an export, as it wrote them; a card may have been edited.

    Raises:
        RunError: The folder is no export, or a file of it is missing or another.
    """
    path = folder / _LIST
    if not path.is_file():
        raise RunError(
            f"{folder} has no {_LIST}: it is no folder that `meerkat export` wrote; export the run "
            "to a folder first"
        )
    try:
        content = json.loads(path.read_text("utf-8"))
        files: dict[str, str] = content["files"]
        if content["format"] != _FORMAT or not files:
            raise ValueError(f"its format is {content['format']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); export the run again") from None
    for name, digest in files.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise RunError(f"{folder} lacks its file {name}; export the run again")
        if name != CARD and _digest(folder / name) != digest:
            raise RunError(
                f"{folder / name} is not what `meerkat export` wrote; export the run again (only "
                f"{CARD} may be edited)"
            )
    return [*files, _LIST]


def _complete(folder: Path, about: About) -> None:
    recipe = json.dumps(published_recipe(about.recipe), indent=2, ensure_ascii=False)
    (folder / _RECIPE).write_text(recipe + "\n", "utf-8")
    for text in about.licence.files:
        shutil.copyfile(text, folder / text.name)


def _write_list(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.name != _LIST)
    content = {"format": _FORMAT, "files": {name: _digest(folder / name) for name in names}}
    (folder / _LIST).write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
