"""RTE: does a premise entail a hypothesis. Label 0 is entailment, so "Yes" comes first."""

from meerkat.tasks.base import Task

TASK = Task(
    name="rte",
    source="super_glue",
    config="rte",
    prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
    verbalizers=("Yes", "No"),
    test_split="validation",
    cut="premise",
)
