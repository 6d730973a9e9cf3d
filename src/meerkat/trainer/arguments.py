"""Arguments of a `Trainer`: those of transformers' that mean something here, under their names."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from meerkat.config import Recipe, parse_recipe
from meerkat.config.reading import with_settings
from meerkat.errors import RecipeError

__all__ = ["TrainingArguments"]

_logger = logging.getLogger(__name__)

_NO_GRADIENT = "there is no gradient of the weights"
_ONE_PRECISION = "the forward pass has the type of the model; load it in that, or set model.dtype"
_EVERY_STEP = "every step is in the journal, a few bytes; any can be replayed"
_REFUSED: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "adafactor": ("there is no optimizer of the weights", (False,)),
    "bf16": (_ONE_PRECISION, (False, None)),
    "bf16_full_eval": (_ONE_PRECISION, (False,)),
    "data_seed": ("seed decides on noise and order of the data", (None,)),
    "deepspeed": ("one process holds the model", (None,)),
    "eval_accumulation_steps": ("what is kept of an evaluation is small", (None,)),
    "fp16": (_ONE_PRECISION, (False,)),
    "fp16_full_eval": (_ONE_PRECISION, (False,)),
    "fsdp": ("one process holds the model", (None, "", False, [])),
    "gradient_accumulation_steps": (
        "a larger per_device_train_batch_size takes no more memory: runtime.tokens_per_pass",
        (1,),
    ),
    "gradient_checkpointing": ("no activation is kept", (False,)),
    "label_smoothing_factor": ("the loss is the cross-entropy", (0, 0.0)),
    "max_grad_norm": (_NO_GRADIENT, (0, 0.0, 1.0, None)),
    "neftune_noise_alpha": ("embeddings are read as they are", (None,)),
    "optim": ("the update rule is settings = {'optimizer.rule': …}", ("sgd", None)),
    "per_gpu_train_batch_size": ("it is per_device_train_batch_size", (None,)),
    "push_to_hub": ("save_model() writes a folder that can be pushed", (False,)),
    "save_strategy": (_EVERY_STEP, ("no", "steps", "epoch")),
    "warmup_ratio": ("a zeroth-order step needs no warm-up", (0, 0.0, None)),
    "warmup_steps": ("a zeroth-order step needs no warm-up", (0, 0.0)),
    "weight_decay": ("decay is along drawn directions alone, or none", (0, 0.0)),
}
"""Arguments that would change what is computed: why not, and the values that change nothing."""
_IGNORED: Mapping[str, str] = {
    "dataloader_drop_last": "a batch runs on into the next epoch",
    "dataloader_num_workers": "examples are encoded once",
    "dataloader_pin_memory": "examples are encoded once",
    "ddp_find_unused_parameters": "one process holds the model",
    "group_by_length": "batches are packed, without padding",
    "overwrite_output_dir": "a run is never overwritten; remove the folder, or take another",
    "per_device_eval_batch_size": "evaluations are packed by runtime.tokens_per_pass",
    "remove_unused_columns": "the columns that are needed are read",
    "report_to": "callbacks are told what is logged; meerkat report draws a page",
    "run_name": "output_dir names the run",
    "save_safetensors": "everything is",
    "save_steps": _EVERY_STEP,
    "save_total_limit": _EVERY_STEP,
    "use_cpu": "it is settings = {'runtime.device': 'cpu'}",
}
"""Arguments without a meaning here: why. A line of the log says so."""
_OWN = {
    "federation.clients": "a Trainer has one client; take meerkat.run for more",
    "federation.rounds": "it is max_steps",
    "federation.local_steps": "a step is a round of one client; take meerkat.run for more",
    "federation.batch_size": "it is per_device_train_batch_size",
    "optimizer.learning_rate": "it is learning_rate",
    "optimizer.schedule": "it is lr_scheduler_type",
    "evaluation.every": "it is eval_steps",
    "seed": "it is seed, beside settings",
}


@dataclass
class TrainingArguments:
    """What a `Trainer` does; a field means what it means in transformers, as far as it can.

    Raises:
        RecipeError: An argument is unknown, or asks for something that zeroth order has not.
    """

    output_dir: str | Path
    """The run's directory: journal, mask, data, summary."""
    max_steps: int = -1
    """Steps; by default `num_train_epochs` says it."""
    num_train_epochs: float | None = None
    """Passes over the data, where `max_steps` is not given. One of both is needed: zeroth order
    takes more steps than first order, and no default would be right."""
    per_device_train_batch_size: int | None = None
    """Examples of a step: `federation.batch_size`, whose default it has."""
    learning_rate: float | Literal["auto"] = "auto"
    """`optimizer.learning_rate`: `auto` follows from the space; without a subspace it is 1e-5."""
    lr_scheduler_type: Literal["auto", "constant", "linear", "cosine"] = "auto"
    """`optimizer.schedule`; linear and cosine end at zero."""
    eval_strategy: Literal["no", "steps"] = "no"
    """`steps`: evaluate after every `eval_steps` steps, besides before the first and after the
    last, which every run does."""
    eval_steps: int | None = None
    """Steps between evaluations; `logging_steps` by default, as in transformers."""
    logging_steps: int = 10
    """Steps between two entries of `log_history`, each with the mean loss since the last."""
    seed: int = 42
    """Of noise and order of the data."""
    metric_for_best_model: str | None = None
    """What the best evaluation is chosen by, with or without `eval_`; the loss by default."""
    greater_is_better: bool | None = None
    """By default unless the metric's name ends in `loss`."""
    load_best_model_at_end: bool = False
    """Leave the model at the best evaluation, and not after the last step."""
    disable_tqdm: bool = False
    """Show no progress."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of a recipe by `section.field`, such as `{"subspace.dimensions": 32}`."""

    def __init__(self, output_dir: str | Path, **given: Any):
        self.output_dir = output_dir
        known = {each.name: each for each in fields(self)[1:]}
        for name, value in given.items():
            if name not in known:
                _refuse(name, value, list(known))
        for name, each in known.items():
            empty = {} if name == "settings" else each.default
            setattr(self, name, given.get(name, empty))
        self.eval_strategy = getattr(self.eval_strategy, "value", self.eval_strategy)
        self.lr_scheduler_type = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        self._check()

    def _check(self) -> None:
        if self.eval_strategy not in ("no", "steps"):
            raise RecipeError(
                f"eval_strategy = {self.eval_strategy!r}: it is 'no' or 'steps', with eval_steps"
            )
        if self.max_steps < 1 and not (self.num_train_epochs or 0) > 0:
            raise RecipeError(
                f"max_steps = {self.max_steps}: give max_steps, or num_train_epochs; zeroth "
                "order takes some hundred steps and more"
            )
        if self.logging_steps < 1:
            raise RecipeError(f"logging_steps = {self.logging_steps}: it is at least 1")
        if self.eval_steps is None and self.eval_strategy == "steps":
            self.eval_steps = self.logging_steps
        if self.eval_steps is not None and self.eval_steps < 1:
            raise RecipeError(f"eval_steps = {self.eval_steps}: it is at least 1")
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise RecipeError(
                "load_best_model_at_end = True needs evaluations to choose by: set "
                "eval_strategy = 'steps' and eval_steps"
            )
        if self.metric_for_best_model is None and self.load_best_model_at_end:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        for key, why in _OWN.items():
            if key in self.settings:
                raise RecipeError(f"settings: {key} = {self.settings[key]!r}: {why}")

    @property
    def directory(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)

    def recipe(self, sections: Mapping[str, Any], examples: int) -> Recipe:
        """The recipe of a run with one client.

        Args:
            sections: Its model, task and evaluation.
            examples: Training examples, which epochs are counted by.

        Raises:
            RecipeError: A field is not valid.
        """
        settings: dict[str, Any] = {
            "federation.clients": 1,
            "federation.rounds": max(1, self.max_steps),
            "optimizer.learning_rate": self.learning_rate,
            "optimizer.schedule": self.lr_scheduler_type,
            "seed": self.seed,
        }
        if self.per_device_train_batch_size is not None:
            settings["federation.batch_size"] = self.per_device_train_batch_size
        if self.eval_strategy == "steps":
            settings["evaluation.every"] = self.eval_steps
        data = with_settings(with_settings(sections, settings), self.settings)
        recipe = parse_recipe(data, origin="TrainingArguments")
        if self.max_steps < 1:
            # A subspace may have changed the batch size, so it is asked of the recipe.
            batch = min(recipe.federation.batch_size, examples)
            rounds = math.ceil(float(self.num_train_epochs or 0) * examples / batch)
            data = with_settings(data, {"federation.rounds": max(1, rounds)})
            recipe = parse_recipe(data, origin="TrainingArguments")
        return recipe


def _refuse(name: str, value: Any, known: list[str]) -> None:
    """Pass over an argument that changes nothing.

    Raises:
        RecipeError: It would change something, or nobody knows it.
    """
    if name in _IGNORED:
        _logger.warning("%s = %r has no meaning here: %s", name, value, _IGNORED[name])
        return
    if name in _REFUSED:
        why, harmless = _REFUSED[name]
        if value not in harmless:
            raise RecipeError(f"{name} = {value!r}: {why}; leave it out")
        return
    if name.startswith(("adam_", "lr_scheduler_kwargs", "lion_", "optim_")):
        raise RecipeError(f"{name} = {value!r}: {_NO_GRADIENT}; leave it out")
    near = get_close_matches(name, [*known, *_IGNORED, *_REFUSED], 1)
    hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}"
    raise RecipeError(f"{name} = {value!r} is no argument of a Trainer without gradients{hint}")
