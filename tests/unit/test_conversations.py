"""Rows of several forms as conversations; wrong rows by file and number; a round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from meerkat.config import TaskSection
from meerkat.data.clients import write_client_folders
from meerkat.data.conversations import conversation_example, conversation_row, messages_of
from meerkat.data.sources import Split, load_examples, load_folder
from meerkat.errors import DataError
from meerkat.tasks import Example, resolve_task

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Six."},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
    for m in MESSAGES
]


def task_of(source: Path, form: str = "chat", **changes: Any) -> tuple[Any, TaskSection]:
    section = TaskSection(name="custom", source=str(source), format=form, **changes)
    return resolve_task(section), section


def load(source: Path, form: str = "chat", **changes: Any) -> Split:
    return load_examples(*task_of(source, form, **changes))


def contents(example: Example) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages_of(example)]


def numbered(form: str, count: int = 20) -> list[dict[str, Any]]:
    """Rows that differ."""
    match form:
        case "messages":
            turns = [{**MESSAGES[1]}, {**MESSAGES[2]}]
            return [
                {"messages": [{**turns[0], "content": f"{n}?"}, turns[1]], "who": f"p{n % 3}"}
                for n in range(count)
            ]
        case "sharegpt":
            return [
                {
                    "conversations": [{"from": "human", "value": f"{n}?"}, SHAREGPT[2]],
                    "who": f"p{n % 3}",
                }
                for n in range(count)
            ]
    return [
        {"instruction": "Add.", "input": f"{n} and 1" if n % 2 else "", "output": f"{n + 1}."}
        for n in range(1, 2 * count, 2)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca"])
def test_every_form_in_every_kind_of_file(form: str, kind: str, tmp_path: Path) -> None:
    rows, path = numbered(form), tmp_path / f"rows.{kind}"
    match kind:
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "json":
            path.write_text(json.dumps(rows))
        case "parquet":
            pandas.DataFrame(rows).to_parquet(path)
        case "folder":
            datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    for asked in ("chat", form):
        split = load(path, asked)
        found = sorted(contents(example)[0][1] for example in (*split.train, *split.test))
        questions = [f"{n}?" for n in range(20)]
        if form == "alpaca":
            questions = [f"Add.\n\n{n} and 1" for n in range(1, 40, 2)]
        assert found == sorted(questions)
        assert all(len(contents(example)) == 2 for example in split.train)


def test_csv_is_for_alpaca(tmp_path: Path) -> None:
    pandas.DataFrame(numbered("alpaca")).to_csv(tmp_path / "rows.csv", index=False)
    assert len(load(tmp_path / "rows.csv").train) == 18
    (tmp_path / "other.csv").write_text("messages\nhello\n")
    with pytest.raises(
        DataError, match=r"train row 1: column 'messages' holds 'hello', not a list"
    ):
        load(tmp_path / "other.csv")


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "Two "}, {"type": "text", "text": "and two?"}]
    row = {"messages": [{"role": "user", "content": parts}, MESSAGES[2]]}
    assert contents(conversation_example("chat", row, "", ""))[0] == ("user", "Two and two?")


USER, ASSISTANT = MESSAGES[1], MESSAGES[2]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "label": 1}, "no conversation in the columns text, label; needed are"),
        ({"instruction": "a", "response": "b"}, "columns instruction, response; needed are"),
        ({"messages": "Hello"}, "'messages' holds 'Hello', not a list of messages"),
        ({"messages": None, "text": ""}, "'messages' holds None, not a list"),
        ({"messages": 3}, "holds 3, not a list"),
        ({"messages": []}, "no message of the assistant"),
        ({"messages": [USER]}, "no message of the assistant"),
        ({"messages": ["Hello", ASSISTANT]}, "message 1 is 'Hello'; it needs a role and a content"),
        ({"messages": [{"text": "a"}, ASSISTANT]}, "message 1 has text; it needs role and content"),
        ({"messages": [USER, {"role": "tool", "content": "3"}]}, "message 2 is by 'tool'; known"),
        (
            {"messages": [{"role": "user", "content": " "}, ASSISTANT]},
            "message 1, by user: content",
        ),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content is None; it needs"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2, by assistant: content is None"),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": [{"id": 1}]}]},
            "message 2 has tool_calls",
        ),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "message 2 has weight"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]},
            "content is .*; it needs a text",
        ),
        ({"messages": [ASSISTANT]}, "message 1 is by the assistant, where the user's turn is"),
        ({"messages": [USER, USER, ASSISTANT]}, "message 2 is by the user, where the assistant's"),
        ({"messages": [USER, MESSAGES[0], ASSISTANT]}, "message 2 is by the system, where"),
        ({"messages": [USER, ASSISTANT, USER]}, "message 3, the last, is by the user; end the row"),
        ({"instruction": "", "output": "b"}, "column 'instruction' holds ''; it needs a text"),
        ({"instruction": "a", "output": None}, "column 'output' holds None"),
        (
            {"messages": [USER, ASSISTANT], "instruction": "a", "output": "b"},
            "may be messages or alpaca; say which in task.format",
        ),
    ],
)
def test_a_wrong_row_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    good = {"messages": [USER, ASSISTANT]}
    path.write_text(json.dumps([good]))
    where = f"task.source = {str(path)!r}, train row 7"
    with pytest.raises(DataError, match=said) as raised:
        conversation_example("chat", row, "", where)
    assert str(raised.value).startswith(f"{where}")
    assert "\n" not in str(raised.value)


def test_the_row_of_a_file_is_counted_from_one(tmp_path: Path) -> None:
    rows = [*numbered("messages", 4), {"messages": [USER]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows.jsonl', train row 5: no message of the assistant"):
        load(tmp_path / "rows.jsonl")


def test_a_form_that_is_asked_for_is_the_only_one(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    with pytest.raises(DataError, match=r"in the columns messages; needed are conversations"):
        load(tmp_path / "rows.jsonl", "sharegpt")


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_a_row_is_written_as_it_was_read(form: str) -> None:
    column = {"messages": ("messages", MESSAGES), "sharegpt": ("conversations", SHAREGPT)}[form]
    row = {column[0]: column[1]}
    assert conversation_row(form, conversation_example(form, row, "", "")) == row


@pytest.mark.parametrize("form", ["chat", "messages", "sharegpt", "alpaca"])
def test_client_folders_hold_what_the_clients_hold(form: str, tmp_path: Path) -> None:
    from builders import make_recipe

    rows = numbered({"chat": "messages"}.get(form, form), 40)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "custom", "source": str(tmp_path / "rows.jsonl"), "format": form}
    recipe = make_recipe(task=task, evaluation={"examples": 2, "validation": 2})
    folders = write_client_folders(recipe, tmp_path / "folders")
    own = [load_folder(resolve_task(recipe.task), folder) for folder in folders]
    whole = load_examples(resolve_task(recipe.task), recipe.task)
    written = [contents(example) for split in own for example in split.train]
    assert sorted(written) == sorted(contents(example) for example in whole.train)
    assert sum(len(split.test) for split in own) == 2
    assert (folders[0] / "train.jsonl").exists()


def test_rows_of_one_holder_are_at_one_client(tmp_path: Path) -> None:
    from builders import make_recipe

    from meerkat.data.clients import load_partition

    lines = "".join(json.dumps(row) + "\n" for row in numbered("messages", 40))
    (tmp_path / "rows.jsonl").write_text(lines)
    task = {"source": str(tmp_path / "rows.jsonl"), "format": "chat", "holder": "who"}
    recipe = make_recipe(
        task={"name": "custom", **task}, federation={"partition": {"kind": "natural"}}
    )
    split, parts = load_partition(recipe, resolve_task(recipe.task))
    holders = [{split.train[place].holder for place in part} for part in parts]
    assert sorted(holders, key=str) == [{"p0"}, {"p1"}, {"p2"}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "{text}"}, r"task\.prompt is for a task with a prompt"),
        ({"verbalizers": ("a", "b")}, r"task\.verbalizers is for a task with a prompt"),
        ({"name": "sst2"}, r"goes with task\.name = 'custom'"),
        ({"source": None}, r"task\.source is missing"),
        ({"format": "columns", "chat_template": "{{ x }}"}, r"task\.chat_template goes with conv"),
    ],
)
def test_a_task_of_conversations_has_no_prompt(changes: dict[str, Any], said: str) -> None:
    fields = {"name": "custom", "source": "rows.jsonl", "format": "chat", **changes}
    with pytest.raises(DataError, match=said):
        resolve_task(TaskSection(**fields))
