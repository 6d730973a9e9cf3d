"""Sentences of public texts, in scripts with and without blanks between words."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from meerkat.runs.public_texts import _LONGEST, _SHORTEST, _WORD, _sentences


def test_sentences_of_a_text() -> None:
    text = "It was a good film. Really?  Yes, it was great!\nAnd the plot is thin"
    expected = ["It was a good film.", "Yes, it was great!", "And the plot is thin"]
    assert list(_sentences([text])) == expected


def test_sentences_without_blanks() -> None:
    """A Chinese review has no blank, neither between words nor after a full stop."""
    chinese = "房间很干净，服务也很好。下次还会来！好。" + "很" * 61 + "。"
    assert list(_sentences([chinese])) == ["房间很干净，服务也很好。", "下次还会来！"]
    assert list(_sentences(["この映画はとても面白かった。また見たい。"])) == [
        "この映画はとても面白かった。",
        "また見たい。",
    ]
    assert list(_sentences(["หนังเรื่องนี้ดีมาก"])) == ["หนังเรื่องนี้ดีมาก"]


def test_a_word_of_mixed_text() -> None:
    assert _WORD.findall("1G内存 is 慢 ok") == ["1G", "内", "存", "is", "慢", "ok"]


@given(st.text(st.characters(max_codepoint=0x2FF)))
def test_scripts_with_blanks_are_counted_by_blanks(text: str) -> None:
    """As they always were, so that subspaces made of them are the same."""
    parts = re.split(r"(?<=[.!?])\s+|\n+", text)
    kept = [part.strip() for part in parts if _SHORTEST <= len(part.split()) <= _LONGEST]
    assert list(_sentences([text])) == kept
