"""A Modelfile, with which `ollama create` imports an exported folder.

The syntax is that of Ollama's docs/modelfile.md; templates are Go's (docs/template.md). What a
chat template writes around each turn is found by applying it, and the Go template is used only if
what it stands for gives the same text for several conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["ARCHITECTURES", "MODELFILE", "ChatForm", "chat_form", "modelfile", "not_imported"]

MODELFILE = "Modelfile"
ARCHITECTURES = (
    "CohereForCausalLM",
    "DeepseekV3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GptOssForCausalLM",
    "Lfm2ForCausalLM",
    "LlamaForCausalLM",
    "Ministral3ForCausalLM",
    "MixtralForCausalLM",
    "Olmo3ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
)
"""Causal language models that Ollama imports from safetensors: `LoadModelMetadata` in
convert/convert.go of ollama/ollama at commit 01cf7445."""

Message = dict[str, str]


def not_imported(architecture: str) -> str:
    """One line on an architecture that has no Modelfile."""
    return (
        f"no Modelfile: Ollama does not import {architecture} from safetensors; it imports "
        + ", ".join(ARCHITECTURES)
    )


def modelfile(architecture: str, tokenizer: Any, ends: Sequence[int]) -> str | None:
    """The Modelfile of a folder, or None where Ollama does not import its architecture.

    Args:
        ends: Tokens that end a text.
    """
    if architecture not in ARCHITECTURES:
        return None
    lines = ["# ollama create NAME -f Modelfile", "FROM ."]
    if not getattr(tokenizer, "chat_template", None):
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif (form := chat_form(tokenizer)) is not None:
        lines.append(f'TEMPLATE """{form.go}"""')
        lines.append('# A prompt as it stands: "raw": true in a request to /api/generate.')
    else:
        lines.append("# The tokenizer's chat template could not be written as one of Ollama's.")
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ends))]
    lines += [
        f'PARAMETER stop "{stop}"' for stop in stops if stop.isprintable() and '"' not in stop
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class ChatForm:
    """What a chat template writes around the contents of a conversation."""

    user: tuple[str, str]
    """Before and after a turn of the user."""
    assistant: tuple[str, str]
    answer: str
    """After the last turn, where the assistant's answer begins."""
    usual_system: str = ""
    """First, where there is no system message."""
    system: tuple[str, str] | None = None
    """Around a system message, first; None where the template takes none."""
    joins_user: bool = False
    """Does the system message stand inside the first turn of the user?"""

    @property
    def texts(self) -> tuple[str, ...]:
        """All that it writes besides contents."""
        return (
            self.usual_system,
            *(self.system or ()),
            *self.user,
            *self.assistant,
            self.answer,
        )

    @property
    def go(self) -> str:
        """As a Go template."""
        before, after = self.user
        opening, text = "", "{{ .Content }}"
        if self.system is not None and self.joins_user:
            opening = "{{ $system := .System }}"
            led = "{{ $system }}" + self.system[1] + '{{ $system = "" }}'
            text = "{{ if $system }}" + led + "{{ end }}" + text
        elif self.system is not None:
            first, last = self.system
            opening = "{{ if .System }}" + first + "{{ .System }}" + last
            opening += "{{ else }}" + self.usual_system + "{{ end }}"
        else:
            opening = self.usual_system
        return (
            opening
            + '{{ range .Messages }}{{ if eq .Role "user" }}'
            + before
            + text
            + after
            + '{{ else if eq .Role "assistant" }}'
            + self.assistant[0]
            + "{{ .Content }}"
            + self.assistant[1]
            + "{{ end }}{{ end }}"
            + self.answer
        )

    def text(self, messages: Sequence[Message]) -> str:
        """What the Go template gives for a conversation, up to the assistant's answer."""
        system = "".join(m["content"] for m in messages if m["role"] == "system")
        written = self.usual_system
        if self.system is not None and system and not self.joins_user:
            written = self.system[0] + system + self.system[1]
        for message in messages:
            content = message["content"]
            if message["role"] == "user":
                if self.system is not None and system and self.joins_user:
                    content, system = system + self.system[1] + content, ""
                written += self.user[0] + content + self.user[1]
            elif message["role"] == "assistant":
                written += self.assistant[0] + content + self.assistant[1]
        return written + self.answer


def chat_form(tokenizer: Any) -> ChatForm | None:
    """The form of a tokenizer's chat template; None where it has none that is this simple."""
    if "strftime_now" in str(tokenizer.chat_template):
        return None  # it writes the date
    try:
        applied = _Applied(tokenizer)
        form = _found_form(applied)
        same = all(
            applied(messages, answer=True) == form.text(messages)
            for messages in _conversations(form.system is not None)
        )
    except _OtherFormError:
        return None
    fixed = "".join(form.texts)
    return form if same and not any(mark in fixed for mark in ("{{", '"""')) else None


class _OtherFormError(Exception):
    """A chat template does not put fixed texts around each turn."""


class _Applied:
    """Conversations as text, without the token that begins every text: Ollama adds that.

    Raises:
        _OtherFormError: The template takes no such conversation.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._begin = ""
        longest, begin = _conversations(False)[-1], tokenizer.bos_token
        if begin and self(longest).count(begin) == 1:  # else it opens turns, and is part of them
            self._begin = begin

    def __call__(self, messages: Sequence[Message], answer: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer
            )
        except (TemplateError, TypeError, ValueError):
            raise _OtherFormError from None
        return str(text).removeprefix(self._begin)


def _found_form(applied: _Applied) -> ChatForm:
    ask, say, more, rule = "Qzask", "Qzsay", "Qzmore", "Qzrule"
    user, assistant = _turn("user", ask), _turn("assistant", say)
    first, after = _split(applied([user]), ask)
    answer = _cut_start(applied([user], answer=True), first + ask + after)
    one, last = _split(applied([user, assistant]), say)
    said = _cut_start(one, first + ask + after)
    both = applied([user, assistant, _turn("user", more)])
    before = _cut_start(_split(both, more)[0], one + say + last)
    usual = _cut_end(first, before)
    form = ChatForm((before, after), (said, last), answer, usual)
    try:
        led = applied([_turn("system", rule), user])
    except _OtherFormError:
        return form
    start, rest = _split(led, rule)
    between = _split(rest, ask)[0]
    if before and between.endswith(before):
        return replace(form, system=(start, _cut_end(between, before)))
    if start != first or usual:
        raise _OtherFormError
    return replace(form, system=("", between), joins_user=True)


def _conversations(with_system: bool) -> list[list[Message]]:
    turns = [
        _turn("user", "What is it?"),
        _turn("assistant", "A film."),
        _turn("user", "Good?"),
        _turn("assistant", "It was great."),
        _turn("user", "Why?"),
    ]
    found = [turns[:1], turns[:3], turns]
    if with_system:
        found += [[_turn("system", "Be short."), *some] for some in list(found)]
    return found


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _split(text: str, content: str) -> tuple[str, str]:
    if text.count(content) != 1:
        raise _OtherFormError
    before, _, after = text.partition(content)
    return before, after


def _cut_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise _OtherFormError
    return text[len(start) :]


def _cut_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise _OtherFormError
    return text[: len(text) - len(end)]
