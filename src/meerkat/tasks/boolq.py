"""BoolQ: a passage and a yes/no question; the passage is cut, never the question."""

from meerkat.tasks.base import Task

TASK = Task(
    name="boolq",
    source="super_glue",
    config="boolq",
    prompt="{passage} {question}?\n",
    verbalizers=("No", "Yes"),
    test_split="validation",
    cut="passage",
)
