"""AG News: topics of news."""

from meerkat.tasks.base import Task

TASK = Task(
    name="ag_news",
    source="fancyzhx/ag_news",
    prompt="{text} This is about",
    verbalizers=("World", "Sports", "Business", "Technology"),
    test_split="test",
)
