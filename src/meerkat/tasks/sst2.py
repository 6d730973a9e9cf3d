"""SST-2: sentences of movie reviews. The hub's test split has no labels, so validation is used."""

from meerkat.tasks.base import Task

TASK = Task(
    name="sst2",
    source="stanfordnlp/sst2",
    prompt="{sentence} It was",
    verbalizers=("terrible", "great"),
    test_split="validation",
)
