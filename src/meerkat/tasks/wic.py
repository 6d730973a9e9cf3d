"""WiC: does a word mean the same in two sentences."""

from meerkat.tasks.base import Task

TASK = Task(
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
)
