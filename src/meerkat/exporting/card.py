"""The model card of an export: README.md, with the YAML that hubs read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version

from huggingface_hub import EvalResult, ModelCardData

from meerkat.exporting.about import About
from meerkat.models.loading import LoadedModel
from meerkat.tasks.metrics import LOSS, metric_title
from meerkat.tasks.metrics.validation import VALIDATION

__all__ = ["adapter_card", "model_card"]

_WRITING = (
    "written = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
    "print(tokenizer.decode(written[0, inputs['input_ids'].shape[1] :]))",
)

_ON_HUBS = {"macro_f1": "f1"}
"""What hubs call a metric, where it is not our name."""


def model_card(about: About, title: str, loaded: LoadedModel, notes: list[str]) -> str:
    """The card of a merged model.

    Args:
        title: What the model is called.
        notes: Lines on the files beside it.
    """
    if about.task.image is not None:
        return _card(about, title, "transformers", "\n".join(_image_lines(loaded)), notes)
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this folder, or its name on a hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        *_example(about, loaded),
    ]
    return _card(about, title, "transformers", "\n".join(lines), notes)


def adapter_card(about: About, title: str, kind: str, notes: list[str]) -> str:
    """The card of an adapter for peft.

    Args:
        kind: What peft calls it: LoRA or SHiRA.
    """
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        "# The base model with the weights of the run: " + about.base,
        f"base = AutoModelForCausalLM.from_pretrained(BASE, dtype={about.recipe.model.dtype!r})",
        'model = PeftModel.from_pretrained(base, ".")  # this folder, or its name on a hub',
    ]
    return _card(about, title, "peft", "\n".join(lines), [f"A {kind} adapter.", *notes])


def _card(about: About, title: str, library: str, code: str, notes: list[str]) -> str:
    clients = about.recipe.federation.clients
    apart = "on one machine" if clients == 1 else f"over {clients} clients that keep their data"
    parts = [
        f"---\n{_data(about, title, library).to_yaml().strip()}\n---",
        f"# {title}",
        f"{about.base} fine-tuned on {about.task.name} {apart}. A client computes forward "
        "passes, and sends a few numbers a step (Meerkat: sparse zeroth-order federated "
        "fine-tuning, arXiv 2506.03337).",
        _table(["", ""], _facts(about)),
        "## Scores",
        _scores(about),
        "## Use",
        f"```python\n{code}\n```",
        "## Files",
        "\n".join(f"- {note}" for note in notes),
        "Few weights differ from the base model, and by little. Where this is quantised to few "
        "bits some of the differences round away: measure again afterwards.",
    ]
    return "\n\n".join(parts) + "\n"


def _data(about: About, title: str, library: str) -> ModelCardData:
    classes, images = about.task.has_classes, about.task.image is not None
    kind = "image-classification" if images else "text-generation"
    measured = {name: after for name, (_, after) in about.scores.items() if after is not None}
    results = [
        EvalResult(
            task_type=kind if images or not classes else "text-classification",
            dataset_type=about.data_id or about.task.name,
            dataset_name=about.task.name,
            dataset_split=about.split,
            metric_type=_ON_HUBS.get(name, name),
            metric_name=metric_title(name),
            metric_value=value,
        )
        for name, value in measured.items()
        if not name.startswith(VALIDATION)
    ]
    named = [_ON_HUBS.get(name, name) for name in measured if name != LOSS]
    # Only what a hub knows under a name is named.
    return ModelCardData(
        model_name=title,
        base_model=about.base_id,
        license=about.licence.name,
        license_link=about.licence.files[0].name if about.licence.name == "other" else None,
        datasets=about.data_id and [about.data_id],
        library_name=library,
        pipeline_tag=kind,
        metrics=[name for name in named if not name.startswith(VALIDATION)] or None,
        tags=["meerkat", "federated-learning", "zeroth-order"],
        eval_results=results or None,
    )


def _facts(about: About) -> list[tuple[str, str]]:
    recipe, federation = about.recipe, about.recipe.federation
    sampled = recipe.clients_per_round
    each = "" if sampled == federation.clients else f", {sampled} in a round"
    steps = f"{federation.local_steps} local step{'s' if federation.local_steps > 1 else ''}"
    space = f"{about.mask_kind} mask, {about.mask_size:,} of {about.eligible:,} parameters"
    if recipe.subspace is not None and about.dimensions is not None:
        space += f"; {recipe.subspace.kind} subspace, {about.dimensions} dimensions"
    source = _source(about)
    return [
        ("base model", about.base),
        ("licence of the base model", about.licence.title),
        ("task", f"{about.task.name}{f' ({source})' if source else ''}"),
        *_shown(about),
        ("clients", f"{federation.clients}{each}"),
        ("partition", _partition(about)),
        ("rounds", f"{about.rounds} of {federation.rounds}, of {steps}"),
        ("what moved", space),
        ("method", f"{recipe.algorithm.kind}, {recipe.optimizer.estimator.kind} estimator"),
        ("bytes up", _bytes(about.bytes_up, about.reports)),
        ("bytes down", _bytes(about.bytes_down, about.reports)),
        ("fingerprint of the run", f"`{about.fingerprint[:16]}`, seed {recipe.seed}"),
        ("made with", f"meerkat-fl {version('meerkat-fl')}"),
    ]


def _partition(about: About) -> str:
    chosen = about.recipe.federation.partition
    options = {
        "dirichlet": f" (alpha = {chosen.alpha:g})",
        "pathological": f" ({chosen.labels_per_client} labels a client)",
    }
    extreme = f", {chosen.extreme} clients of a single label" if chosen.extreme else ""
    return chosen.kind + options.get(chosen.kind, "") + extreme


def _bytes(total: int, reports: int) -> str:
    return f"{total:,} in all, {total / max(1, reports):,.0f} for a client and round"


def _scores(about: About) -> str:
    rows = [
        (metric_title(name), *("not measured" if v is None else f"{v:.4f}" for v in values))
        for name, values in about.scores.items()
    ]
    if not rows:
        return "None was measured."
    measured = about.after or about.before
    assert measured is not None
    examples = f"Measured on {measured.examples} examples (split: {about.split})"
    validation = about.recipe.evaluation.validation
    if any(name.startswith(VALIDATION) for name in about.scores):
        examples += f", and validation metrics on up to {validation} others"
    return _table(["metric", "before", "after"], rows) + f"\n\n{examples}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(part) for part in row) + " |" for row in lines)


def _source(about: About) -> str:
    """Where the data are from, where the task's name does not say it."""
    task = about.task
    if about.data_id or task.name != "custom":
        return about.data_id or ""
    return task.source if task.source.startswith("demo:") else "files of its owner"


def _shown(about: About) -> list[tuple[str, str]]:
    """In what text the model is shown an example."""
    task = about.task
    if task.is_chat:
        whose = "model" if about.recipe.task.chat_template is None else "recipe"
        return [("examples", f"conversations, in the {whose}'s chat template")]
    if task.is_tokens or not task.prompt:
        return []
    return [("prompt", f"`{json.dumps(task.prompt, ensure_ascii=False)}`")]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _example(about: About, loaded: LoadedModel) -> list[str]:
    """Lines that score the answers to a prompt, or write one."""
    from meerkat.data.encoding import Encoder

    task = about.task
    section = about.recipe.task
    if task.is_tokens:
        return []
    if task.is_chat:
        return [
            "",
            'messages = [{"role": "user", "content": "..."}]',
            "shape = {'add_generation_prompt': True, 'return_dict': True, 'return_tensors': 'pt'}",
            "inputs = tokenizer.apply_chat_template(messages, **shape)",
            *_WRITING,
        ]
    # The blank before an answer is part of its first token, so a prompt ends without one.
    prompt = task.prompt.removesuffix(" ")
    shown = dict.fromkeys(task.fields, "...")
    lines = [
        "",
        f"prompt = {prompt!r}",
        f"inputs = tokenizer(prompt.format(**{shown!r}), return_tensors='pt')",
    ]
    if not task.has_classes:
        return [*lines, *_WRITING]
    encoder = Encoder(task, loaded.tokenizer, section.max_length, loaded.window)
    first = {word: ids[0] for word, ids in zip(task.verbalizers, encoder.verbalizers, strict=True)}
    return [
        *lines,
        "scores = model(**inputs).logits[0, -1].log_softmax(-1)",
        f"answers = {first!r}  # the first token of each",
        "print({answer: scores[token].item() for answer, token in answers.items()})",
    ]


def _image_lines(loaded: LoadedModel) -> list[str]:
    """Lines that score an image."""
    lines = ["from transformers import AutoImageProcessor, AutoModelForImageClassification"]
    module = type(loaded.model).__module__
    if module.startswith("meerkat."):
        lines += ["", f"import {module}  # the architecture, which transformers has not"]
    return [
        *lines,
        "",
        'folder = "."  # this folder, or its name on a hub',
        "processor = AutoImageProcessor.from_pretrained(folder)",
        "model = AutoModelForImageClassification.from_pretrained(folder)",
        "",
        "image = ...  # of PIL",
        "scores = model(**processor(image, return_tensors='pt')).logits[0]",
        "print(model.config.id2label[scores.argmax().item()])",
    ]
