"""Tasks by name, and a recipe's task with the user's changes applied."""

from __future__ import annotations

import dataclasses
import string
from pathlib import Path
from typing import Any

from meerkat.config import TaskSection
from meerkat.errors import DataError
from meerkat.tasks.base import FILE_SUFFIXES, Example, Task
from meerkat.tasks.registry import TASKS

__all__ = ["Example", "Task", "resolve_task", "task_names"]


def task_names() -> tuple[str, ...]:
    """Names that `task.name` may have."""
    return (*sorted(TASKS), "custom")


def resolve_task(section: TaskSection) -> Task:
    """The task of a recipe: a registered one or `custom`, with what the recipe overrides.

    Raises:
        DataError: The name is not registered, or a custom task lacks what it needs.
    """
    if section.name != "custom" and section.name not in TASKS:
        raise DataError(f"task.name = {section.name!r}: known tasks are {', '.join(task_names())}")
    if section.format != "columns":
        return _conversations(section)
    if section.chat_template is not None:
        raise DataError(
            "task.chat_template goes with conversations, and task.format = 'columns': set "
            "task.format = 'chat', or leave it out"
        )
    if section.name == "custom":
        _require(section)
        task = Task("custom", source="", prompt="")
    else:
        task = TASKS[section.name]
    task = dataclasses.replace(task, **_overrides(section))
    if not task.source:
        raise DataError(f"task.source is missing; task.name = {task.name!r} needs it")
    if task.image is None:
        _check_prompt(section, task)
    else:
        _check_image(section, task)
    if task.has_classes and len(task.verbalizers) < 2:
        raise DataError(f"task.verbalizers = {list(task.verbalizers)}: a task needs at least two")
    if len(task.label_names) != len(task.verbalizers):
        raise DataError(
            f"task.verbalizers: {len(task.verbalizers)} given for the labels "
            f"{', '.join(task.label_names)}; give one for each, or a table by label"
        )
    return task


def _check_image(section: TaskSection, task: Task) -> None:
    """Does a task over images have nothing of one over texts?"""
    for field in ("prompt", "answer", "cut"):
        if getattr(section, field) is not None:
            raise DataError(
                f"task.{field} = {getattr(section, field)!r} is for texts, and task.image = "
                f"{task.image!r} makes it a task over images; leave one of them out"
            )


def _check_prompt(section: TaskSection, task: Task) -> None:
    """Is the prompt a template of columns?"""
    if section.image_size is not None:
        raise DataError(
            f"task.image_size = {section.image_size}: this is a task over texts; leave it out, or "
            "name the column of the images in task.image"
        )
    try:
        fields = task.fields
    except ValueError as error:
        raise DataError(
            f"task.prompt = {task.prompt!r}: {error}; write a column as {{column}}"
        ) from None
    parts = string.Formatter().parse(task.prompt)
    if any(specification or conversion for _, _, specification, conversion in parts):
        raise DataError(
            f"task.prompt = {task.prompt!r}: a column is written {{column}}, without format "
            "specification or conversion"
        )
    # `str.format` takes no name or a number for a position, and a dot or bracket for a part.
    unusable = [name for name in fields if not name or name.isdigit() or set(name) & set(".[")]
    if not fields or unusable:
        what = f"cannot show {unusable[0]!r}" if unusable else "shows no column"
        raise DataError(f"task.prompt = {task.prompt!r} {what}; write a column as {{column}}")
    if task.cut_field not in fields:
        raise DataError(
            f"task.cut = {task.cut!r} is not a field of the prompt; fields: {', '.join(fields)}"
        )


def _conversations(section: TaskSection) -> Task:
    """A custom task whose examples are conversations.

    Raises:
        DataError: It is not `custom`, has no source, or says what a task with a prompt has.
    """
    asked = f"task.format = {section.format!r}"
    if section.name != "custom":
        raise DataError(f"{asked} goes with task.name = 'custom', which is {section.name!r}")
    if section.source is None:
        raise DataError("task.source is missing; a custom task needs it")
    for field in ("prompt", "label", "verbalizers", "answer", "cut"):
        if getattr(section, field) is not None:
            raise DataError(
                f"task.{field} is for a task with a prompt, and {asked} has conversations; leave "
                "it out"
            )
    task = Task(
        "custom",
        source="",
        prompt="",
        format=section.format,
        chat_template=section.chat_template,
    )
    return dataclasses.replace(task, **_overrides(section))


def _require(section: TaskSection) -> None:
    for field in ("source",) if section.image is not None else ("source", "prompt"):
        if getattr(section, field) is None:
            raise DataError(f"task.{field} is missing; a custom task needs it")
    if section.verbalizers is None and section.answer is None and section.chosen is None:
        raise DataError(
            "task.verbalizers is missing; a custom task needs it, or task.answer, or task.chosen "
            "and task.rejected"
        )


def _overrides(section: TaskSection) -> dict[str, Any]:
    """Fields of a `Task` that the recipe sets."""
    fields = ("source", "prompt", "image", "label", "answer", "cut")
    splits = ("train_split", "test_split", "validation_split")
    changed: dict[str, Any] = {
        field: getattr(section, field)
        for field in (*fields, *splits)
        if getattr(section, field) is not None
    }
    if section.source_config is not None or section.source is not None:
        changed["config"] = section.source_config
    if section.holder is not None or section.source is not None:
        changed["holder"] = section.holder
    if section.chosen is not None:
        pair = {"chosen": section.chosen, "rejected": section.rejected}
        changed |= {**pair, "verbalizers": (), "labels": (), "answer": None}
    elif section.answer is not None:
        changed |= {"verbalizers": (), "labels": ()}
    elif isinstance(section.verbalizers, dict):
        changed["verbalizers"] = tuple(section.verbalizers.values())
        changed["labels"] = tuple(section.verbalizers)
    elif section.verbalizers is not None:
        changed["verbalizers"] = section.verbalizers
    is_file = section.source is not None and Path(section.source).suffix.lower() in FILE_SUFFIXES
    if is_file and section.test_split is None:
        changed["test_split"] = None  # one file has one split
    return changed
