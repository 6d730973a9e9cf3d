"""`meerkat.Trainer`: the same bits as `meerkat run`, callbacks, metrics, resume, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from builders import merged, tiny_model
from journals import content
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

import meerkat
from meerkat.errors import DataError, MeerkatError, RecipeError, RunError
from meerkat.journal import Journal
from meerkat.models.loading import fingerprint

TASK = {"prompt": "{text} It was", "verbalizers": {"neg": "terrible", "pos": "great"}}
Make = Callable[..., meerkat.Trainer]


@pytest.fixture
def rows(reviews_file: Path) -> list[dict[str, str]]:
    return pandas.read_csv(reviews_file).to_dict("records")


@pytest.fixture
def settings(tiny_recipe_data: dict[str, Any]) -> dict[str, Any]:
    """What of the tiny recipe no argument names."""
    mask, runtime = tiny_recipe_data["mask"], tiny_recipe_data["runtime"]
    return {
        **{f"mask.{name}": value for name, value in mask.items()},
        **{f"runtime.{name}": value for name, value in runtime.items()},
        "task.max_length": 64,
        "model.dtype": "float32",
    }


@pytest.fixture
def make(
    tiny_folder: Path, rows: list[dict[str, str]], settings: dict[str, Any], tmp_path: Path
) -> Make:
    def trainer(out: str = "run", model: Any = None, **options: Any) -> meerkat.Trainer:
        own = {key: options.pop(key) for key in ARGUMENTS & options.keys()}
        arguments = {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "seed": 7,
            "disable_tqdm": True,
            **own,
        }
        arguments["settings"] = {**settings, **arguments.get("settings", {})}
        options = {"train_dataset": rows[:160], "eval_dataset": rows[160:], "task": TASK, **options}
        args = meerkat.TrainingArguments(tmp_path / out, **arguments)
        return meerkat.Trainer(str(tiny_folder) if model is None else model, args, **options)

    return trainer


ARGUMENTS = {
    "eval_steps",
    "learning_rate",
    "per_device_train_batch_size",
    "eval_strategy",
    "load_best_model_at_end",
    "logging_steps",
    "max_steps",
    "metric_for_best_model",
    "num_train_epochs",
    "seed",
    "settings",
}


def tokenised(rows: list[dict[str, str]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """As for transformers' Trainer: the prompt is not scored, and rows are padded."""
    found = []
    for row in rows:
        prompt = tokenizer(row["text"] + " It was")["input_ids"]
        answer = tokenizer(" great" if row["label"] == "pos" else " terrible")["input_ids"]
        ids, labels = prompt + answer, [-100] * len(prompt) + answer
        room = 60 - len(ids)
        found.append(
            {
                "input_ids": ids + [0] * room,
                "labels": labels + [-100] * room,
                "attention_mask": [1] * len(ids) + [0] * room,
            }
        )
    return found


class Watcher(TrainerCallback):
    """Keeps what it is told, and stops after so many steps."""

    def __init__(self, stop: int = 0):
        self.events: list[str] = []
        self.stop = stop
        self.metrics: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        assert not model.training
        self.events.append(f"begin {state.global_step} of {state.max_steps}")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step {state.global_step}")
        if state.global_step == self.stop:
            control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs, **kwargs):
        self.events.append("log " + ("loss" if "loss" in logs else "eval"))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append(f"evaluate {state.global_step}")
        self.metrics.append(metrics)

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


def thetas(directory: Path) -> list[str]:
    """Digests of θ round by round."""
    with closing(Journal.open(directory / "journal.sqlite")) as journal:
        rounds = journal.rounds
    return [meerkat.replay(directory, each).digest for each in range(rounds + 1)]


def test_a_trainer_gives_the_bits_of_a_run_with_one_client(
    make: Make,
    tiny_recipe_data: dict[str, Any],
    tiny_folder: Path,
    rows: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    """By name, in memory, and from the command's own recipe over the same rows in files."""
    for name, some in (("train", rows[:160]), ("test", rows[160:])):
        (tmp_path / "files").mkdir(exist_ok=True)
        pandas.DataFrame(some).to_csv(tmp_path / "files" / f"{name}.csv", index=False)
    data = merged(
        tiny_recipe_data,
        task={"source": str(tmp_path / "files"), "test_split": "test"},
        federation={"rounds": 6, "local_steps": 1},
        evaluation={"examples": 40},
    )
    data["federation"] |= {"clients": 1, "partition": {"kind": "iid"}}
    summary = meerkat.run(meerkat.parse_recipe(data), tmp_path / "run", observers=())

    named = make("named")
    found = named.train()
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    base = fingerprint(model)
    held = make("held", model)
    held.train()
    assert thetas(tmp_path / "named") == thetas(tmp_path / "held") == thetas(tmp_path / "run")
    assert found.global_step == 6

    # The model is left trained, evaluates as the run did, is saved as it is, and is given back.
    assert fingerprint(model) != base
    metrics = held.evaluate()
    after = summary["after"]
    assert metrics["eval_loss"] == pytest.approx(after["loss"], rel=1e-6)
    assert metrics["eval_accuracy"] == after["accuracy"]
    for trainer in (named, held):
        saved = AutoModelForCausalLM.from_pretrained(trainer.save_model(), dtype=torch.float32)
        assert fingerprint(saved) == fingerprint(model)
    held.restore()
    assert fingerprint(model) == base
    # The folder is a run's: the commands take it.
    assert meerkat.evaluate(tmp_path / "named").metrics["accuracy"] == after["accuracy"]


def test_callbacks_are_told_in_order_and_can_stop_a_run_that_goes_on(
    make: Make, tmp_path: Path
) -> None:
    whole, first, rest = Watcher(), Watcher(stop=3), Watcher()
    every = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    make("whole", callbacks=[whole], **every).train()
    assert whole.events == [
        *("begin 0 of 6", "log eval", "evaluate 0"),
        *("step 1", "step 2", "log loss", "log eval", "evaluate 2"),
        *("step 3", "step 4", "log loss", "log eval", "evaluate 4"),
        *("step 5", "step 6", "log loss", "log eval", "evaluate 6", "end"),
    ]
    stopped = make("parts", callbacks=[first], **every)
    assert stopped.train().global_step == 3
    assert first.events[-3:] == ["evaluate 3", "log loss", "end"]
    with pytest.raises(RunError, match=r"holds a run; .*resume_from_checkpoint=True"):
        stopped.train()
    again = make("parts", callbacks=[rest], **every)
    assert again.train(resume_from_checkpoint=True).global_step == 6
    assert rest.events[0] == "begin 3 of 6"
    assert thetas(tmp_path / "parts") == thetas(tmp_path / "whole")
    # Nothing but the evaluation where it stopped tells the journals apart.
    one, other = (content(tmp_path / name) for name in ("whole", "parts"))
    assert one["rounds"] == other["rounds"]
    losses = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert len(losses) == 2
    with pytest.raises(RecipeError, match=r"federation\.rounds = 9 now, and the run began with 6"):
        make("parts", max_steps=9).train(resume_from_checkpoint=True)


def test_metrics_of_ones_own_choose_the_best_step_and_stop_early(make: Make) -> None:
    """The metric is best after 2 steps; transformers' own callback stops two evaluations later."""
    values = iter([0.1, 0.9, 0.5, 0.4, 0.3])
    seen = []

    def compute(found: Any) -> dict[str, float]:
        seen.append((found.predictions.shape, found.label_ids.tolist()))
        return {
            "mine": next(values),
            "accuracy_too": np.mean(found.predictions.argmax(1) == found.label_ids),
        }

    trainer = make(
        compute_metrics=compute,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        max_steps=20,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_mine",
        load_best_model_at_end=True,
    )
    assert trainer.train().global_step == 6
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (2, 0.9)
    evaluations = [entry for entry in trainer.state.log_history if "eval_mine" in entry]
    assert [entry["eval_mine"] for entry in evaluations] == [0.1, 0.9, 0.5, 0.4]
    assert all(entry["eval_accuracy_too"] == entry["eval_accuracy"] for entry in evaluations)
    assert set(map(len, seen[0][1:])) == {40}
    assert seen[0][0] == (40, 2)
    at_best = meerkat.evaluate(trainer.args.output_dir, rounds=2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(at_best.metrics["loss"], rel=1e-6)


def test_tokenised_rows(make: Make, rows: list[dict[str, str]], tmp_path: Path) -> None:
    loaded = tiny_model()
    train, held_out = (tokenised(some, loaded.tokenizer) for some in (rows[:160], rows[160:]))
    tuned: dict[str, Any] = {"train_dataset": train, "eval_dataset": held_out, "task": None}

    def exact(found: Any) -> dict[str, float]:
        scored = found.label_ids[:, 1:] != -100
        right = found.predictions[:, :-1] == found.label_ids[:, 1:]
        return {"exact": float((right | ~scored).all(1).mean())}

    given = {"model": loaded.model, "processing_class": loaded.tokenizer, "compute_metrics": exact}
    trainer = make("memory", **given, **tuned, max_steps=30, settings={"task.max_length": 64})
    trainer.train()
    before, after = (
        [entry[name] for entry in trainer.state.log_history if name in entry]
        for name in ("eval_loss", "eval_exact")
    )
    assert before[-1] < before[0]
    # The same examples as texts, a free answer each, give the same steps.
    texts = [
        {"text": row["text"], "answer": "great" if row["label"] == "pos" else "terrible"}
        for row in rows
    ]
    trainer.restore()
    free = {"prompt": "{text} It was", "answer": "answer"}
    other = make(
        "texts",
        loaded.model,
        processing_class=loaded.tokenizer,
        task=free,
        max_steps=30,
        train_dataset=datasets.Dataset.from_list(texts[:160]),
        eval_dataset=texts[160:],
    )
    other.train()
    assert thetas(tmp_path / "memory") == thetas(tmp_path / "texts")
    # Predictions follow their rows, repeated ones included.
    found = other.predict([texts[0], texts[1], texts[0]])
    assert found.predictions.shape == found.label_ids.shape
    assert np.array_equal(found.predictions[0], found.predictions[2])
    assert found.metrics["test_loss"] > 0
    assert 0 <= after[-1] <= 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2, 3], "labels": [-100] * 3}, "row 2: labels are all -100"),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2]}, "row 2: 3 input_ids and 2 labels"),
        (
            {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]},
            "row 2: labels leave out tokens between",
        ),
        ({"input_ids": [1, 2, 3], "labels": [-100, 3, 4]}, "row 2: labels differ from input_ids"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(
    make: Make, row: dict[str, list[int]], message: str
) -> None:
    good = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    with pytest.raises(DataError, match=f"train_dataset {message}"):
        make(train_dataset=[good, row], eval_dataset=[good], task=None)


def test_what_a_trainer_cannot_do_is_refused_in_one_line(
    make: Make, rows: list[dict[str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    for arguments, message in (
        ({"weight_decay": 0.1}, r"weight_decay = 0\.1: .*leave it out"),
        ({"optim": "adamw_torch"}, r"optimizer\.rule"),
        ({"adam_beta1": 0.9}, "no gradient of the weights"),
        ({"bf16": True}, "type of the model"),
        ({"lerning_rate": 1.0}, "did you mean learning_rate"),
        ({"eval_strategy": "epoch"}, "'no' or 'steps'"),
        ({"load_best_model_at_end": True}, "needs evaluations"),
        ({"settings": {"federation.rounds": 3}}, "it is max_steps"),
        ({"logging_steps": 0}, "at least 1"),
    ):
        with pytest.raises(RecipeError, match=message):
            meerkat.TrainingArguments(out, max_steps=2, **arguments)
    with pytest.raises(RecipeError, match="give max_steps, or num_train_epochs"):
        meerkat.TrainingArguments(out)
    meerkat.TrainingArguments(out, max_steps=1, save_steps=500, fp16=False)
    assert "save_steps = 500 has no meaning here" in caplog.text
    for options, error, message in (
        ({"settings": {"mask.kind": "lora"}}, RecipeError, "take meerkat.run"),
        ({"model": tiny_model(dtype=torch.bfloat16).model}, RecipeError, "it has bfloat16"),
        ({"task": None}, DataError, "rows of texts .* need a task"),
        ({"train_dataset": []}, DataError, "train_dataset has no rows"),
        ({"train_dataset": ["text"]}, DataError, "row 1 is a str"),
        ({"eval_dataset": [{"text": "a"}]}, DataError, "eval_dataset has no column 'label'"),
        ({"model": tiny_model(dtype=torch.float16).model}, MeerkatError, "in float16"),
        ({"model": tiny_model().model}, MeerkatError, "processing_class is missing"),
    ):
        with pytest.raises(error, match=message):
            make(**options).train()
    with pytest.raises(RunError, match="holds no run of a Trainer"):
        make().train(resume_from_checkpoint=True)
    with pytest.raises(RecipeError, match="compute_metrics: 'mine' = 'much' is no number"):
        make(compute_metrics=lambda found: {"mine": "much"}).train()


def test_epochs_count_the_rows_and_a_subspace_brings_its_batch(
    make: Make, rows: list[dict[str, str]], sentences_file: Path
) -> None:
    """Of a subspace for tokens the public texts are prompts, which the model answers itself."""
    assert make(max_steps=-1, num_train_epochs=1.5).recipe.federation.rounds == 60
    within = {"subspace.dimensions": 4, "subspace.texts": 8, "subspace.corpus": str(sentences_file)}
    loaded = tiny_model()
    trainer = make(
        "tokens",
        loaded.model,
        processing_class=loaded.tokenizer,
        train_dataset=tokenised(rows[:40], loaded.tokenizer),
        eval_dataset=tokenised(rows[40:60], loaded.tokenizer),
        task=None,
        max_steps=-1,
        num_train_epochs=0.3,
        per_device_train_batch_size=None,
        learning_rate="auto",
        settings=within,
    )
    assert trainer.recipe.federation.batch_size == 4
    assert trainer.train().global_step == 3
    assert len(meerkat.replay(trainer.args.output_dir).theta) == 4


def test_the_pages_code_runs(
    tiny_folder: Path,
    rows: list[dict[str, str]],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = Path(__file__).parents[2] / "docs" / "one-machine.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(block, names)
    trainer = names["train"](str(tiny_folder), rows[:160], rows[160:], settings)
    assert trainer.state.global_step == 8
    saved = AutoModelForCausalLM.from_pretrained("runs/mine/model", dtype=torch.float32)
    assert fingerprint(saved) != fingerprint(trainer.model)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert fingerprint(base) == fingerprint(trainer.model)
