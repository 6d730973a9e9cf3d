"""Conversations as tokens, over the templates of real model families."""

from __future__ import annotations

import logging
from functools import cache

import pytest
import torch
from builders import tiny_model
from chat_templates import FAMILIES, Family, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from meerkat.data.chat_encoding import ChatEncoder
from meerkat.data.encoding import Encoded
from meerkat.errors import DataError
from meerkat.models.objective import TextObjective
from meerkat.tasks import Example, Task

TASK = Task("custom", "", "", format="chat")
LONG = 100_000
Turns = list[tuple[str, str]]


@cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    return chat_tokenizer(FAMILIES[family])


def encoder(family: str, max_length: int = LONG, own: str | None = None) -> ChatEncoder:
    task = Task("custom", "", "", format="chat", chat_template=own)
    return ChatEncoder(task, tokenizer(family), max_length, LONG)


def example(turns: Turns) -> Example:
    *before, (_, answer) = turns
    messages = [{"role": role, "content": text} for role, text in before]
    return Example({"messages": messages}, answer=answer, where="chat.jsonl, train row 7")


def conversation(*texts: str, system: str | None = None) -> Turns:
    """Texts by user and assistant in turn."""
    turns = [("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(texts)]
    return [("system", system), *turns] if system else turns


def spans(encoded: Encoded, tokens: PreTrainedTokenizerFast) -> list[str]:
    (answer,) = encoded.answers
    return [tokens.decode(list(answer[first:after])) for first, after in encoded.spans]


def whole(encoded: Encoded) -> list[int]:
    return [*encoded.prompt, *encoded.answers[0]]


# Letters of several scripts, blanks within, characters of templates, several bytes a letter.
text = st.text(st.sampled_from("aZ é漢😀<>|[]/{}'\"\n\t.#:_1"), min_size=1, max_size=24).filter(
    lambda found: bool(found.strip())
)


@st.composite
def conversations(draw: st.DrawFn, has_system: bool) -> Turns:
    pairs = draw(st.integers(1, 3))
    texts = draw(st.lists(text, min_size=2 * pairs, max_size=2 * pairs))
    system = draw(text) if has_system and draw(st.booleans()) else None
    return conversation(*texts, system=system)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_each_span_is_an_answer_and_its_end(family: str, data: st.DataObject) -> None:
    """And no other token has weight: there are as many spans as answers."""
    known, turns = FAMILIES[family], data.draw(conversations(FAMILIES[family].has_system))
    encoded = encoder(family).encode(example(turns))
    answers = [content for role, content in turns if role == "assistant"]
    found = spans(encoded, tokenizer(family))
    assert len(found) == len(answers)
    for shown, answer in zip(found, answers, strict=True):
        assert shown.rstrip().endswith(known.end)
        assert shown.strip().removesuffix(known.end).strip() == answer.strip()
    assert encoded.answers[0][encoded.spans[-1][1] :] == ()
    assert encoded.spans[0][0] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_apply_chat_template(family: str) -> None:
    """As far as the end of the last answer, after which nothing is learned or read."""
    known = FAMILIES[family]
    turns = conversation(
        "It was?", "great film", "Yes?", "No", system="news" if known.has_system else None
    )
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = tokenizer(family).apply_chat_template(messages, date_string="26 Jul 2024")
    found = whole(encoder(family).encode(example(turns)))
    assert found == expected["input_ids"][: len(found)]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"qwen-3", "zephyr"}))
def test_the_last_answer_follows_the_generation_prompt(family: str) -> None:
    """Where a template has one: Qwen 3 adds an empty thought, zephyr's lacks a new line."""
    turns = conversation("It was?", "great film", "Yes?", "No")
    encoded = encoder(family).encode(example(turns))
    messages = [{"role": role, "content": content} for role, content in turns[:-1]]
    expected = tokenizer(family).apply_chat_template(
        messages, add_generation_prompt=True, date_string="26 Jul 2024"
    )["input_ids"]
    decode = tokenizer(family).decode
    assert decode(list(encoded.lead)) == decode(expected)


def test_a_date_in_a_template_is_always_the_same() -> None:
    clock = "{{ strftime_now('%Y') }}" + FAMILIES["smollm-2"].template
    encoded = encoder("smollm-2", own=clock).encode(example(conversation("It was?", "great")))
    assert tokenizer("smollm-2").decode(whole(encoded)).startswith("26 Jul 2024<|im_start|>")


@pytest.mark.parametrize("answer", ["\n\n great", "great \n", " great"])
@pytest.mark.parametrize("family", ["qwen-2.5", "phi-3", "mistral-7b", "zephyr"])
def test_blanks_at_the_borders_of_an_answer(family: str, answer: str) -> None:
    """A token may be over a border there; then the parts are tokenised one by one."""
    encoded = encoder(family).encode(example(conversation("It was?", answer)))
    (found,) = spans(encoded, tokenizer(family))
    assert found.strip().removesuffix(FAMILIES[family].end).strip() == "great"


# Refused


@pytest.mark.parametrize(
    ("family", "turns", "said"),
    [
        (
            "gemma-2",
            conversation("It was?", "great", system="news"),
            "message 1: the chat template refuses this message by the system: System role not "
            "supported",
        ),
        (
            "mistral-7b",
            conversation("It was?", "great", system="news"),
            "message 1: the chat template refuses this message by the system: Conversation roles",
        ),
        (
            "qwen-3",
            conversation("It?", "<think>\nhm\n</think>\n\nYes", "So?", "No"),
            "message 2: the chat template does not show this answer of the assistant as it is",
        ),
    ],
)
def test_what_a_template_refuses_is_named_by_row(family: str, turns: Turns, said: str) -> None:
    for use in (encoder(family).encode, lambda found: encoder(family).check([found])):
        with pytest.raises(DataError) as raised:
            use(example(turns))
        assert str(raised.value).startswith(f"chat.jsonl, train row 7, {said}")


def test_a_thought_in_the_last_answer_of_qwen_3_is_learned() -> None:
    encoded = encoder("qwen-3").encode(example(conversation("It?", "plain", "So?", "No")))
    assert spans(encoded, tokenizer("qwen-3")) == ["plain<|im_end|>", "No<|im_end|>"]
    assert tokenizer("qwen-3").decode(list(encoded.lead)).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "without a special token"),
        ("{{ messages[0].content }}<|im_end|>", "leaves this answer of the assistant out"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "shows an answer twice"),
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "leaves this"),
        ("{% for m in messages %}{{ m.content | title }}<|im_end|>{% endfor %}", "leaves this"),
        ("{% for m in messages %}{{ m.content.nothing.here }}{% endfor %}", "refuses this message"),
        ("{% for m in messages %}", "refuses this message"),
    ],
)
def test_a_template_that_cannot_serve(own: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        encoder("smollm-2", own=own).encode(example(conversation("It was?", "great")))


def test_a_tokenizer_without_a_template() -> None:
    bare = chat_tokenizer(Family("", ("</s>",), "</s>"))
    with pytest.raises(DataError, match=r"no chat template .* task\.chat_template"):
        ChatEncoder(TASK, bare, LONG, LONG)
    with pytest.raises(DataError, match=r"'mine.txt' shows no message"):
        encoder("smollm-2", own="mine.txt")


# Too long


def fitted(size: int, turns: Turns, family: str = "smollm-2") -> str:
    encoded = encoder(family, size).encode(example(turns))
    assert len(whole(encoded)) <= size + 1
    return tokenizer(family).decode(whole(encoded))


def test_earliest_turns_go_first_and_the_last_answer_stays() -> None:
    turns = conversation("first?", "one", "second?", "two", "third?", "three", system="be brief")
    full = len(whole(encoder("smollm-2").encode(example(turns))))
    assert fitted(full - 1, turns).count("<|im_start|>") == 7
    shorter = fitted(full - 2, turns)
    assert "first" not in shorter
    assert all(part in shorter for part in ("be brief", "second?", "two", "third?"))
    encoded = encoder("smollm-2", full - 2).encode(example(turns))
    assert spans(encoded, tokenizer("smollm-2")) == ["two<|im_end|>", "three<|im_end|>"]


@settings(max_examples=40, deadline=None)
@given(turns=conversations(True), size=st.integers(90, 160))
def test_the_last_answer_is_kept_to_its_end(turns: Turns, size: int) -> None:
    encoded = encoder("qwen-2.5", size).encode(example(turns))
    assert len(whole(encoded)) <= size + 1
    *_, last = spans(encoded, tokenizer("qwen-2.5"))
    if last.endswith("<|im_end|>"):
        assert last == turns[-1][1] + "<|im_end|>"
    else:  # alone it is too long
        assert len(encoded.spans) == 1


def test_the_front_of_the_last_question_is_cut_before_the_system_message_goes() -> None:
    turns = conversation("early " * 30 + "at last?", "great", system="be brief")
    kept = fitted(60, turns)
    assert "be brief" in kept
    assert "at last?<|im_end|>" in kept
    assert "early early early early" not in kept
    assert kept.endswith("great<|im_end|>")
    # With room for one of them, the question's end is worth more.
    turns = conversation("at last?", "great", system="be very brief " * 12)
    assert "brief" not in fitted(80, turns, "llama-3")
    assert "at last?" in fitted(80, turns, "llama-3")


def test_an_answer_that_alone_is_too_long_loses_its_end(caplog: pytest.LogCaptureFixture) -> None:
    long = encoder("llama-3", 40)
    found = example(conversation("It was?", "great film " * 40))
    with caplog.at_level(logging.WARNING):
        encoded = long.encode(found)
        long.encode(found)
    assert len(whole(encoded)) == 41
    (shown,) = spans(encoded, tokenizer("llama-3"))
    assert ("great film " * 40).startswith(shown)
    (record,) = caplog.records
    assert "train row 7: the last answer of" in record.getMessage()
    with pytest.raises(DataError, match=r"task\.max_length = 8 .* leaves no token"):
        encoder("llama-3", 8).encode(found)


# The loss


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_the_loss_is_that_of_masked_labels(architecture: str) -> None:
    """transformers' own loss, one conversation at a time, with −100 where no answer is."""
    family = {"llama": "llama-3", "qwen2": "qwen-2.5", "gemma3": "gemma-3"}[architecture]
    size = {} if architecture == "gemma3" else {"max_position_embeddings": 512}
    loaded = tiny_model(architecture, **size)
    found = [
        conversation("It was?", "great", "Yes?", "No question", "film?", "awful plot"),
        conversation("story", "true"),
        conversation("news about Sports?", "Yes", "World?", "a good scene", system="film"),
    ]
    encoded = [encoder(family).encode(example(turns)) for turns in found]
    expected = []
    for one in encoded:
        ids = whole(one)
        labels = [-100] * len(ids)
        for first, after in one.spans:
            begin = len(one.prompt) + first
            labels[begin : begin + after - first] = ids[begin : begin + after - first]
        with torch.no_grad():
            output = loaded.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        expected.append(float(output.loss))
    packed = TextObjective(loaded, 10_000).losses(encoded)
    assert packed == pytest.approx(expected, rel=2e-4)
    apart = TextObjective(loaded, 1).losses(encoded)
    assert apart == pytest.approx(expected, rel=2e-4)
