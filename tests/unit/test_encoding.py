"""Prompts and verbalizers as tokens; the tasks and their templates."""

from __future__ import annotations

from typing import Any

import pytest
from builders import SECTIONS, WORDS, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from meerkat.config import TaskSection
from meerkat.data.encoding import Encoded, Encoder
from meerkat.errors import DataError
from meerkat.tasks import Example, Task, resolve_task, task_names

TOKENIZER = tiny_tokenizer(600, f"{WORDS} {SECTIONS}")  # knows the verbalizers as words
TOKENIZER.backend_tokenizer.decoder = decoders.ByteLevel()
WINDOW = 128
FIRST = Task("custom", "", "{text} It was", ("terrible", "great"))
MIDDLE = Task(
    "custom",
    "",
    'news: {text}\nquestion "{question}" Yes or No?\n',
    ("No", "Yes"),
    cut="text",
)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have: a blank is put before every text, BOS before a prompt."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # Stands for the merges of a real model, which never join two words.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([f" {word}" for word in WORDS.split() * 9], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def encoder(task: Task, max_length: int = WINDOW, tokenizer: Any = TOKENIZER) -> Encoder:
    return Encoder(task, tokenizer, max_length, WINDOW)


def length(encoded: Encoded) -> int:
    """Tokens that the model reads with the longest answer."""
    return len(encoded.prompt) + max(map(len, encoded.answers)) - 1


# Cutting


@pytest.mark.parametrize("max_length", [16, 40, WINDOW, 1000])
def test_long_text_in_front_keeps_the_answer_position(max_length: int) -> None:
    text = "the film is a good story " * 100
    encoded = encoder(FIRST, max_length).encode(Example({"text": text}, 1))
    limit = min(max_length, WINDOW)
    assert limit - 3 <= length(encoded) <= limit
    shown = TOKENIZER.decode(encoded.prompt)
    assert shown.endswith(" It was")
    assert text.startswith(shown.removesuffix(" It was"))


@pytest.mark.parametrize("max_length", [40, 60, WINDOW])
def test_long_text_in_the_middle_keeps_the_question(max_length: int) -> None:
    text, question = "a story about the actor " * 100, "is the film good"
    encoded = encoder(MIDDLE, max_length).encode(Example({"text": text, "question": question}))
    tail = f'\nquestion "{question}" Yes or No?\n'
    assert max_length - 3 <= length(encoded) <= max_length
    shown = TOKENIZER.decode(encoded.prompt)
    assert shown.startswith("news: a story")
    assert shown.endswith(tail)
    assert encoded.prompt[-5:] == tuple(TOKENIZER(tail)["input_ids"][-5:])
    assert text.startswith(shown.removeprefix("news: ").removesuffix(tail))


def test_text_that_fits_is_whole() -> None:
    encoded = encoder(FIRST).encode(Example({"text": "the film"}, 1))
    assert encoded.prompt == tuple(TOKENIZER("the film It was")["input_ids"])
    assert encoded.label == 1


@settings(max_examples=80, deadline=None)
@given(text=st.text(min_size=1, max_size=400), max_length=st.integers(8, 150))
def test_any_text_is_cut_to_any_length(text: str, max_length: int) -> None:
    encoded = encoder(FIRST, max_length).encode(Example({"text": text}))
    assert length(encoded) <= min(max_length, WINDOW)
    shown = TOKENIZER.decode(encoded.prompt)
    assert shown.endswith(" It was")
    assert f"{text} It was" == shown or text.startswith(shown.removesuffix(" It was"))


def test_a_column_that_is_no_text_is_shown() -> None:
    task = Task("custom", "", "{number} is {text}", ("false", "true"))
    encoded = encoder(task).encode(Example({"number": 7, "text": None}))
    assert TOKENIZER.decode(encoded.prompt) == "7 is None"


def test_braces_in_a_text_are_text() -> None:
    encoded = encoder(FIRST).encode(Example({"text": "{film} {0} {"}))
    assert TOKENIZER.decode(encoded.prompt) == "{film} {0} { It was"


def test_too_small_a_length_is_refused() -> None:
    row = {"text": "the film", "question": "is the film good " * 30}
    with pytest.raises(DataError, match=r"task\.max_length = 50 .*too small .*\{text\}; raise it"):
        encoder(MIDDLE, 50).encode(Example(row))
    # The model's window limits what the recipe asks for.
    with pytest.raises(DataError, match=r"task\.max_length = 20 "):
        Encoder(MIDDLE, TOKENIZER, 1000, 20).encode(Example(row))


def test_room_is_kept_for_the_longest_answer() -> None:
    words = ("World", "Sports news question answer film story")
    task = Task("custom", "", "{text} It was", words)
    encoded = encoder(task, 24).encode(Example({"text": "story " * 50}))
    assert len(encoded.answers[1]) > len(encoded.answers[0])
    assert 22 <= length(encoded) <= 24


# Answers


PROMPTS = (
    "{text} It was",
    "{text}",
    "question {text}?\n",
    "{text} answer ",
    "{text}, ",
    "It is {text}.",
)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, sentencepiece_tokenizer()], ids=["bytes", "sp"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("word", ["great", "terrible", "good film"])
def test_prompt_and_answer_are_the_tokens_of_the_whole_text(
    tokenizer: PreTrainedTokenizerFast, prompt: str, word: str
) -> None:
    task = Task("custom", "", prompt, (word, "Yes"))
    encoded = encoder(task, tokenizer=tokenizer).encode(Example({"text": "the film"}))
    between = "" if prompt[-1].isspace() else " "
    whole = tokenizer(prompt.format(text="the film") + between + word)["input_ids"]
    assert [*encoded.prompt, *encoded.answers[0]] == whole


def test_free_text_answers_are_the_tokens_of_the_whole_text() -> None:
    task = Task("custom", "", "{text} It was", answer="answer")
    for answer in ("a great story", "good"):
        encoded = encoder(task).encode(Example({"text": "the film"}, answer=answer))
        assert len(encoded.answers) == 1
        whole = tuple(TOKENIZER(f"the film It was {answer}")["input_ids"])
        assert encoded.prompt + encoded.answers[0] == whole


def test_special_tokens_stand_around_the_prompt_only() -> None:
    tokenizer = tiny_tokenizer(600)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    encoded = encoder(FIRST, 20, tokenizer).encode(Example({"text": "film " * 50}))
    assert encoded.prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(encoded.prompt[1:]).endswith(" It was")
    assert not {1, 2} & {token for answer in encoded.answers for token in answer}
    assert length(encoded) <= 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("great", "great"), r"'great' and 'great' start with the same token"),
        (("great film", "great story"), r"'great film' and 'great story' start with the same"),
        (("great", ""), r"'' has no token"),
        (("great", "  "), r"'  ' has no token"),
    ],
)
def test_verbalizers_that_cannot_be_told_apart_are_refused(
    words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=rf"task\.verbalizers: {message}"):
        encoder(Task("custom", "", "{text} It was", words))


# The registered tasks, with a row as the hub has it

ROWS: dict[str, dict[str, Any]] = {
    "ag_news": {"text": "Stocks rose on Monday.", "label": 2},
    "boolq": {
        "question": "is the sky blue",
        "passage": "The sky is blue.",
        "idx": 0,
        "label": 1,
    },
    "chinese_reviews": {"text": "很好的书", "label": "pos"},
    "debian_sections": {
        "text": "minesweeper game",
        "section": "games",
        "maintainer": "Debian Games Team",
        "package": "kmines",
    },
    "debian_sections_4": {
        "text": "metronome",
        "section": "sound",
        "maintainer": "person 1",
        "package": "klick",
    },
    "rotten_tomatoes": {"text": "a fine film", "category": "fresh", "movie_name": "film"},
    "rotten_tomatoes_hub": {"text": "a fine film", "label": 1},
    "rte": {"premise": "It rains.", "hypothesis": "It is wet.", "idx": 0, "label": 0},
    "sst2": {"idx": 0, "sentence": "a fine film ", "label": 1},
    "wic": {
        "word": "bank",
        "sentence1": "He sat on the bank.",
        "sentence2": "The bank is closed.",
        "start1": 14,
        "start2": 4,
        "end1": 18,
        "end2": 8,
        "idx": {"sentence1": 0, "sentence2": 0, "word": 0},
        "label": 0,
    },
    "wordnet_pairs": {
        "word": "bank",
        "sentence1": "He sat on the bank.",
        "sentence2": "The bank is closed.",
        "same": "no",
    },
    "wsc": {
        "text": "Mark told Pete that he won.",
        "span1_index": 0,
        "span2_index": 4,
        "span1_text": "Mark",
        "span2_text": "he",
        "idx": 0,
        "label": 1,
    },
    "yelp": {"label": 1, "text": "Good food."},
}
SHOWN = {
    "ag_news": "Stocks rose on Monday. This is about",
    "boolq": "The sky is blue. is the sky blue?\n",
    "chinese_reviews": "很好的书\n这是好评吗？\n",
    "debian_sections": "minesweeper game. This is about",
    "debian_sections_4": "metronome. This is about",
    "rotten_tomatoes": "a fine film It was",
    "rotten_tomatoes_hub": "a fine film It was",
    "rte": 'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n',
    "sst2": "a fine film  It was",
    "wic": 'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
    "He sat on the bank.\nThe bank is closed.\n",
    "wordnet_pairs": 'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
    "He sat on the bank.\nThe bank is closed.\n",
    "wsc": "Mark told Pete that he won.\nIn the previous sentence, does the pronoun "
    '"he" refer to Mark? Yes or No?\n',
    "yelp": "Good food. It was",
}
ANSWERS = {
    "ag_news": "Business",
    "boolq": "Yes",
    "chinese_reviews": "是",
    "debian_sections": "games",
    "debian_sections_4": "music",
    "rotten_tomatoes": "great",
    "rotten_tomatoes_hub": "great",
    "rte": "Yes",
    "sst2": "great",
    "wic": "No",
    "wordnet_pairs": "No",
    "wsc": "Yes",
    "yelp": "great",
}


WITHOUT_A_PROMPT = {"fashion_mnist", "tokens"}
"""Tested in test_images.py and, over rows of tokens, in integration/test_trainer.py."""


def test_every_task_is_tested() -> None:
    assert {*ROWS, *WITHOUT_A_PROMPT, "custom"} == set(task_names())


@pytest.mark.parametrize("name", ROWS)
def test_task_renders_a_row_of_its_data_set(name: str) -> None:
    task = resolve_task(TaskSection(name=name))
    row = ROWS[name]
    label = task.label_names.index(str(row[task.label]))
    encoded = Encoder(task, TOKENIZER, 1000, 1000).encode(
        Example({field: row[field] for field in task.fields}, label)
    )
    assert TOKENIZER.decode(encoded.prompt) == SHOWN[name]
    assert TOKENIZER.decode(encoded.answers[encoded.label]).strip() == ANSWERS[name]
    assert len({answer[0] for answer in encoded.answers}) == len(task.verbalizers)


@pytest.mark.parametrize("name", ROWS)
def test_task_cuts_its_text_alone(name: str) -> None:
    task = resolve_task(TaskSection(name=name))
    row = {field: ROWS[name][field] for field in task.fields}
    long = {**row, task.cut_field: str(row[task.cut_field]) + " and so on" * 200}
    # The tiny vocabulary has hardly a word of these templates: a token a letter.
    encoded = Encoder(task, TOKENIZER, 250, 1000).encode(Example(long))
    assert length(encoded) <= 250
    shown = TOKENIZER.decode(encoded.prompt)
    rest = [str(value) for field, value in row.items() if field != task.cut_field]
    assert all(value in shown for value in rest)
    assert shown.endswith(task.prompt.rpartition("}")[2])


# A recipe's task


def custom(**changes: Any) -> TaskSection:
    given_ = {
        "name": "custom",
        "source": "reviews.csv",
        "prompt": "{text} It was",
        "verbalizers": ("terrible", "great"),
        **changes,
    }
    return TaskSection(**given_)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (TaskSection(name="sst3"), r"task\.name = 'sst3': known tasks are .*sst2.*custom"),
        (custom(source=None), r"task\.source is missing"),
        (custom(prompt=None), r"task\.prompt is missing"),
        (custom(verbalizers=None), r"task\.verbalizers is missing.*or task\.answer"),
        (custom(prompt="It was"), r"task\.prompt = 'It was' shows no column"),
        (custom(prompt="{text It was"), r"task\.prompt = .*write a column as \{column\}"),
        (custom(prompt="{} It was"), r"task\.prompt = .*column"),
        (custom(prompt="{text} {} It was"), r"task\.prompt = .*column"),
        (custom(prompt="{0} It was"), r"task\.prompt = .*column"),
        (custom(prompt="{text.title} It was"), r"task\.prompt = .*column"),
        (custom(prompt="{text[0]} It was"), r"task\.prompt = .*column"),
        (custom(cut="title"), r"task\.cut = 'title' is not a field of the prompt; fields: text"),
        (custom(verbalizers=("great",)), r"task\.verbalizers = \['great'\]: .*at least two"),
        (custom(verbalizers={}), r"task\.verbalizers = \[\]: .*at least two"),
        (
            TaskSection(name="rotten_tomatoes", verbalizers=("bad", "fine", "good")),
            r"task\.verbalizers: 3 given for the labels rotten, fresh",
        ),
    ],
)
def test_mistakes_in_a_task_are_named(section: TaskSection, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve_task(section)


def test_custom_task() -> None:
    task = resolve_task(custom(verbalizers={"neg": "terrible", "pos": "great"}, label="stars"))
    assert task.label_names == ("neg", "pos")
    assert (task.label, task.cut_field, task.fields) == ("stars", "text", ("text",))
    assert task.test_split is None
    free = resolve_task(custom(verbalizers=None, answer="reply", prompt="{a b} {c}\n", cut="c"))
    assert (free.answer, free.verbalizers, free.fields) == ("reply", (), ("a b", "c"))


def test_a_registered_task_keeps_what_is_not_overridden() -> None:
    task = resolve_task(TaskSection(name="boolq", verbalizers=("false", "true")))
    assert (task.verbalizers, task.config, task.test_split) == (
        ("false", "true"),
        "boolq",
        "validation",
    )
    # A file has one split and no configuration; a folder or hub id keeps the split's name.
    file = resolve_task(TaskSection(name="boolq", source="data/boolq.JSONL"))
    assert (file.config, file.test_split) == (None, None)
    hub = resolve_task(TaskSection(name="boolq", source="someone/boolq-v1.1"))
    assert (hub.config, hub.test_split) == (None, "validation")
