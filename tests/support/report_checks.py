"""What tests of the report check of its page and its pictures."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["check_self_contained", "pictures"]


def check_self_contained(page: str) -> None:
    assert not re.search(r"<script", page, re.IGNORECASE)
    assert not re.search(r"\son\w+\s*=", page)
    assert not re.search(r"(src|href)\s*=", page)
    assert not re.search(r"""(url\(|@import)\s*["']?(?!#)""", page)
    assert set(re.findall(r"https?://[^\s\"'<>]*", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def pictures(directory: Path) -> set[str]:
    return {path.name for path in (directory / "report").iterdir()}
