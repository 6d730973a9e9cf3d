"""A mask as the server sends it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from meerkat.spaces.mask_file import Mask, save_mask

__all__ = ["sent_file"]


def sent_file(mask: Mask) -> bytes:
    """The mask as a file, without what clients have or need not know."""
    bare = replace(mask, gradient=None, initial=None, concentration=None)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "mask"
        save_mask(bare, path)
        return path.read_bytes()
