"""Masks in the user's cache, found again by what fixes their bits."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from meerkat.config.sections import Runtime
from meerkat.errors import MaskError
from meerkat.models.loading import cache_dir
from meerkat.spaces.mask_file import Mask, load_mask

__all__ = ["cache_path", "corpus_digests", "read_cached"]

_logger = logging.getLogger("meerkat")


def cache_path(runtime: Runtime, folder: str, content: Any) -> Path:
    """Where a mask is kept that follows from `content`, which is anything JSON can hold."""
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir(runtime, folder) / f"{key}.safetensors"


def read_cached(path: Path, model: str) -> Mask | None:
    """A mask of the cache; None where it is absent, or cannot be used, which is said."""
    if not path.exists():
        return None
    try:
        return load_mask(path, model)
    except MaskError as error:
        _logger.warning("%s; it is in the cache, and is made again", error)
        return None


def corpus_digests(corpus: str | tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of each file or folder of a corpus; names of the hub have none."""
    names = (corpus,) if isinstance(corpus, str) else corpus
    files = {name: Path(name).expanduser() for name in names}
    return {
        name: _digest(path)
        for name, path in files.items()
        if path.is_file() or (path.is_dir() and not name.startswith("demo"))
    }


def _digest(path: Path) -> str:
    """Of a file's content, or of the names and contents of all files in a folder."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = hashlib.sha256()
    for file in sorted(inner for inner in path.rglob("*") if inner.is_file()):
        found.update(f"{file.relative_to(path)} {_digest(file)}\n".encode())
    return found.hexdigest()
