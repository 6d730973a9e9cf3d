"""Chat templates as Ollama's, and the lines of a Modelfile."""

from __future__ import annotations

import pytest
from builders import tiny_tokenizer

from meerkat.exporting.ollama import ARCHITECTURES, chat_form, modelfile, not_imported

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USUAL_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML.partition("%}")[2]
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m['content'] | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)


def tokenizer(template: str | None = None, **changes: str):
    found = tiny_tokenizer()
    found.chat_template = template
    for name, value in changes.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize(
    ("template", "bos"),
    [
        (CHATML, "<s>"),
        (CHATML, "<|im_start|>"),
        (USUAL_SYSTEM, "<|im_start|>"),
        (GEMMA, "<s>"),
        (INSTRUCT, "<s>"),
    ],
)
def test_a_template_of_fixed_texts_is_found_whole(template: str, bos: str) -> None:
    """What the Go template stands for is what the tokenizer writes, less the first token."""
    found = tokenizer(template, bos_token=bos)
    form = chat_form(found)
    assert form is not None
    turns = [("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e"), ("user", "f")]
    messages = [{"role": role, "content": content} for role, content in turns]
    with_system = [{"role": "system", "content": "s t"}, *messages]
    for conversation in (messages[:1], messages, *([with_system] if form.system else [])):
        written = found.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        assert form.text(conversation) == str(written).removeprefix("<s>")


def test_go_templates() -> None:
    form = chat_form(tokenizer(USUAL_SYSTEM, bos_token="<|im_start|>"))
    assert form is not None
    assert form.go == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n"
        "{{ else }}<|im_start|>system\nYou help.<|im_end|>\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )
    form = chat_form(tokenizer(GEMMA))
    assert form is not None
    assert form.go == (
        '{{ $system := .System }}{{ range .Messages }}{{ if eq .Role "user" }}<start_of_turn>user\n'
        '{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}{{ .Content }}<end_of_turn>\n'
        '{{ else if eq .Role "assistant" }}<start_of_turn>model\n{{ .Content }}<end_of_turn>\n'
        "{{ end }}{{ end }}<start_of_turn>model\n"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}" + CHATML,
        "{{ messages | length }}" + CHATML,
        CHATML.replace("'\n'", "'{{'"),
        "{{ messages[0]['content'] }}",
        "{{ raise_exception('never') }}",
    ],
)
def test_any_other_template_is_left_to_ollama(template: str) -> None:
    assert chat_form(tokenizer(template)) is None
    text = modelfile("LlamaForCausalLM", tokenizer(template), [2])
    assert text is not None
    assert "\nTEMPLATE" not in text
    assert "could not be written" in text


def test_a_modelfile() -> None:
    text = modelfile("Gemma3ForCausalLM", tokenizer(GEMMA), [2, 1])
    assert text is not None
    assert text.splitlines()[1] == "FROM ."
    assert text.count('"""') == 2
    assert text.endswith('PARAMETER stop "<s>"\nPARAMETER stop "</s>"\n')
    assert modelfile("OPTForCausalLM", tokenizer(), [2]) is None
    line = not_imported("OPTForCausalLM")
    assert all(name in line for name in ("OPTForCausalLM", *ARCHITECTURES))
    assert "\n" not in line
