"""Rows as conversations: OpenAI's messages, ShareGPT's conversations, alpaca's instructions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from meerkat.errors import DataError
from meerkat.tasks.base import MESSAGES, Example, Format

__all__ = ["Message", "conversation_example", "conversation_row", "messages_of"]

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

_COLUMNS: Mapping[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
}
"""Columns that a form needs; `alpaca` may have `input`, too."""
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_NOT_TEXT = ("tool_calls", "function_call", "weight")
"""Keys of a message that say more than its text does."""


def conversation_example(form: Format, row: Mapping[str, Any], holder: str, where: str) -> Example:
    """A row as an example, whose answer is the assistant's last message.

    Args:
        where: Source, split and row, for errors.

    Raises:
        DataError: The row has none of the forms, or is no conversation with an answer.
    """
    messages = _messages(form, row, where)
    *before, last = messages
    return Example({MESSAGES: before}, answer=last["content"], holder=holder, where=where)


def messages_of(example: Example) -> list[Message]:
    """All messages of an example, its answer included where it has one.

    >>> messages_of(Example({"messages": "Hello"}))
    [{'role': 'user', 'content': 'Hello'}]
    """
    before = example.fields[MESSAGES]
    if isinstance(before, str):
        before = [{"role": "user", "content": before}]
    return [*before, {"role": "assistant", "content": example.answer}] if example.answer else before


def conversation_row(form: Format, example: Example) -> dict[str, Any]:
    """An example as a row that `conversation_example` reads again, by the same form.

    >>> row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    >>> conversation_row("alpaca", conversation_example("alpaca", row, "", ""))
    {'instruction': 'Add.\\n\\n1 and 2', 'output': '3'}
    """
    messages = [dict(message) for message in messages_of(example)]
    match form:
        case "sharegpt":
            named = {"user": "human", "assistant": "gpt"}
            turns = [(named.get(m["role"], m["role"]), m["content"]) for m in messages]
            return {"conversations": [{"from": who, "value": text} for who, text in turns]}
        case "alpaca":
            return {"instruction": messages[0]["content"], "output": messages[-1]["content"]}
    return {"messages": messages}


def _messages(form: Format, row: Mapping[str, Any], where: str) -> list[Message]:
    column = _form_of(form, row, where)
    if column == "alpaca":
        return _instruction(row, where)
    found = row[_COLUMNS[column][0]]
    name = _COLUMNS[column][0]
    if isinstance(found, str | bytes | Mapping) or not hasattr(found, "__iter__"):
        raise DataError(f"{where}: column {name!r} holds {_shown(found)}, not a list of messages")
    messages = [_message(turn, f"{where}, message {n}") for n, turn in enumerate(found, start=1)]
    _check_order([message["role"] for message in messages], where)
    return messages


def _form_of(form: Format, row: Mapping[str, Any], where: str) -> Format:
    """The form of a row: the one that is asked for, or that of its columns."""
    candidates = [form] if form != "chat" else list(_COLUMNS)
    fitting = [name for name in candidates if set(_COLUMNS[name]) <= row.keys()]
    # A table of several sources may have the columns of more than one form: those with a value.
    filled = [name for name in fitting if all(_is_filled(row[c]) for c in _COLUMNS[name])]
    chosen = filled or fitting
    if len(chosen) == 1:
        return chosen[0]
    columns = ", ".join(map(str, row)) or "none"
    needed = "; or ".join(f"{', '.join(_COLUMNS[name])} ({name})" for name in candidates)
    if not chosen:
        raise DataError(
            f"{where}: no conversation in the columns {columns}; needed are {needed}: rename them, "
            "or set task.format"
        )
    raise DataError(
        f"{where}: the columns {columns} may be {' or '.join(chosen)}; say which in task.format"
    )


def _instruction(row: Mapping[str, Any], where: str) -> list[Message]:
    texts = {}
    for column in ("instruction", "output", "input"):
        value = row.get(column)
        if column == "input" and not _is_filled(value):
            value = ""
        elif not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: column {column!r} holds {_shown(value)}; it needs a text")
        texts[column] = value
    asked = "\n\n".join(filter(None, (texts["instruction"], texts["input"])))
    answer = {"role": "assistant", "content": texts["output"]}
    return [{"role": "user", "content": asked}, answer]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {_shown(turn)}; it needs a role and a content")
    who, what = ("role", "content") if turn.get("role") is not None else ("from", "value")
    if turn.get(who) is None:
        keys = ", ".join(map(str, turn)) or "nothing"
        raise DataError(f"{where} has {keys}; it needs role and content (or from and value)")
    if turn[who] not in _ROLES:
        raise DataError(
            f"{where} is by {turn[who]!r}; known are {', '.join(_ROLES)}: leave the row out"
        )
    unusable = [key for key in _NOT_TEXT if _is_filled(turn.get(key))]
    if unusable:
        raise DataError(
            f"{where} has {unusable[0]}, and a message is a text here; remove it, or the row"
        )
    text = _text(turn.get(what))
    if text is None or not text.strip():
        raise DataError(
            f"{where}, by {turn[who]}: {what} is {_shown(turn.get(what))}; it needs a text: remove "
            "the row or fill it in"
        )
    return {"role": _ROLES[turn[who]], "content": text}


def _text(content: Any) -> str | None:
    """A text, or that of a list of parts that are all text; None for anything else."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Sequence) or hasattr(content, "tolist"):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if len(texts) == len(parts) else None
    return None


def _check_order(roles: Sequence[str], where: str) -> None:
    """System, if any, first; then user and assistant in turn, the assistant last.

    Raises:
        DataError: The order is another one.
    """
    if "assistant" not in roles:
        raise DataError(f"{where}: no message of the assistant, so nothing to learn; remove it")
    first = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[first:], start=first):
        expected = ("user", "assistant")[(number - first) % 2]
        if role != expected:
            raise DataError(
                f"{where}: message {number + 1} is by the {role}, where the {expected}'s turn is "
                "(system first, then user and assistant in turn); remove the row or reorder it"
            )
    if roles[-1] != "assistant":
        raise DataError(
            f"{where}: message {len(roles)}, the last, is by the {roles[-1]}; end the row with the "
            "assistant's answer"
        )


def _is_filled(value: Any) -> bool:
    """Is it neither None, nor what a table has for a missing value, nor empty?"""
    if value is None or (isinstance(value, float) and value != value):
        return False
    return bool(value.strip()) if isinstance(value, str) else not _is_empty(value)


def _is_empty(value: Any) -> bool:
    return isinstance(value, Collection) and not len(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
