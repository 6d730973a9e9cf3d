"""Rotten Tomatoes from the demo extra: 12,808 review snippets, 58 % of them fresh.

No split comes with it, so a part is held out.
"""

from meerkat.tasks.base import Task

TASK = Task(
    name="rotten_tomatoes",
    source="demo",
    prompt="{text} It was",
    verbalizers=("terrible", "great"),
    labels=("rotten", "fresh"),
    label="category",
)
