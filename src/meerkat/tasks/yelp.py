"""Yelp polarity: long reviews of businesses."""

from meerkat.tasks.base import Task

TASK = Task(
    name="yelp",
    source="fancyzhx/yelp_polarity",
    prompt="{text} It was",
    verbalizers=("terrible", "great"),
    test_split="test",
)
