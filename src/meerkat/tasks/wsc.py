"""WSC: which noun a pronoun refers to."""

from meerkat.tasks.base import Task

TASK = Task(
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
)
