"""The licence of a base model, from its own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meerkat.models.demo_models import DEMO_MODELS

__all__ = ["UNKNOWN", "Licence", "licence_of"]

_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "USE_POLICY.md")


@dataclass(frozen=True)
class Licence:
    """What is known of a licence."""

    name: str | None = None
    """A hub's identifier, such as `apache-2.0`; `other` where there is only a text of it."""
    files: tuple[Path, ...] = ()
    """Texts of it in the folder of the base model, which go with what is derived from it."""

    @property
    def title(self) -> str:
        """For people."""
        if self.name is None:
            return "unknown: ask where the base model came from, before you pass this on"
        return f"see {self.files[0].name}" if self.name == "other" and self.files else self.name


UNKNOWN = Licence()


def licence_of(model: str) -> Licence:
    """The licence of a model, as `model.name` names it.

    It is that of a demo model's package, of the metadata of a GGUF file, of the card of a folder
    or of a hub's model; where the card cannot be had, it is not known.
    """
    if model in DEMO_MODELS:
        return Licence(DEMO_MODELS[model].licence)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return Licence(_of_gguf(path))
    if not path.is_dir():
        return Licence(_of_hub(model))
    files = tuple(path / name for name in _FILES if (path / name).is_file())
    card = path / "README.md"
    name = _of_card(card) if card.is_file() else None
    return Licence(name or ("other" if files else None), files)


def _of_card(path: Path) -> str | None:
    from huggingface_hub import ModelCard

    try:
        # Some cards name several.
        found = ModelCard.load(path, ignore_metadata_errors=True).data.license
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _of_hub(name: str) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _of_card(Path(hf_hub_download(name, "README.md")))
    except (OSError, ValueError, EntryNotFoundError):  # offline, or no card: not known
        return None


def _of_gguf(path: Path) -> str | None:
    import gguf

    try:
        field = gguf.GGUFReader(path).get_field("general.license")
    except (OSError, ValueError):
        return None
    return None if field is None else str(field.contents())
