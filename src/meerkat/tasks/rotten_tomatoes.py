"""Rotten Tomatoes from the hub: 10,662 balanced review snippets."""

from meerkat.tasks.base import Task

TASK = Task(
    name="rotten_tomatoes_hub",
    source="cornell-movie-review-data/rotten_tomatoes",
    prompt="{text} It was",
    verbalizers=("terrible", "great"),
    test_split="test",
)
