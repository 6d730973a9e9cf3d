"""Pairs of answers: rows, tokens, losses of SimPO and DPO, the reference, metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import algorithm_of, make_mask, make_recipe, tiny_model
from torch.nn.functional import logsigmoid

from meerkat.config import Recipe
from meerkat.data.clients import client_label_counts, load_partition
from meerkat.data.encoding import Encoded, Encoder
from meerkat.data.sources import load_examples
from meerkat.errors import DataError, RecipeError
from meerkat.federation.client import Worker
from meerkat.models.objective import TextObjective
from meerkat.spaces.masked import MaskedSpace
from meerkat.tasks import resolve_task
from meerkat.tasks.losses import Scored, TrainingLoss, UsualLoss, training_loss
from meerkat.tasks.losses.preference import DPO, SimPO

PAIRS = {"prompt": "{prompt}\n", "chosen": "chosen", "rejected": "rejected"}


def recipe_of(source: Path, **task: Any) -> Recipe:
    return make_recipe(task={"name": "custom", "source": str(source), **PAIRS, **task})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompt": f"question {number}",
        "chosen": "good answer",
        "rejected": "bad",
        **changes,
    }


# Rows


def test_a_row_is_an_example_with_two_answers_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [row(n, rejected=f"bad {n}") for n in range(20)])
    recipe = recipe_of(path)
    task = resolve_task(recipe.task)
    assert (task.has_pairs, task.has_classes) == (True, False)
    example = load_examples(task, recipe.task).train[0]
    loaded = tiny_model()
    encoded = Encoder(task, loaded.tokenizer, 64, loaded.window).encode(example)
    assert example.answer == "good answer"
    assert example.rejected.startswith("bad ")
    texts = (example.answer, example.rejected)
    assert encoded.answers == tuple(
        tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
    )
    assert encoded.label == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": " "}, r"train row 2: column 'chosen' is empty"),
        ({"rejected": None}, r"train row 2: column 'rejected' is empty"),
        ({"rejected": "good answer "}, r"train row 2: both answers are the same"),
        ({"chosen": [{"role": "assistant"}]}, r"'chosen' holds a list, and an answer is a text"),
    ],
)
def test_a_row_that_is_no_pair(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "pairs.jsonl", [row(0), row(1, **changes), row(2)])
    recipe = recipe_of(path)
    with pytest.raises(DataError, match=message) as caught:
        load_examples(resolve_task(recipe.task), recipe.task)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_missing(tmp_path: Path) -> None:
    recipe = recipe_of(write(tmp_path / "pairs.jsonl", [row(0)]), rejected="worse")
    with pytest.raises(DataError, match="no column 'worse'; columns: prompt, chosen, rejected"):
        load_examples(resolve_task(recipe.task), recipe.task)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"rejected": None}, r"task\.rejected is missing; pairs need it beside task\.chosen"),
        ({"chosen": None}, r"task\.chosen is missing; pairs need it beside task\.rejected"),
        ({"answer": "a"}, r"task\.answer and task\.chosen exclude each other"),
        ({"verbalizers": ["a", "b"]}, r"task\.verbalizers and task\.chosen exclude each other"),
    ],
)
def test_half_a_pair_in_a_recipe(task: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(Path("x.jsonl"), **task)


def test_the_digest_of_the_data_knows_the_rejected_answers(tmp_path: Path) -> None:
    digests = set()
    for word in ("bad", "awful"):
        path = write(tmp_path / "pairs.jsonl", [row(n, rejected=word) for n in range(40)])
        recipe = recipe_of(path)
        task = resolve_task(recipe.task)
        digests.add(client_label_counts(task, *load_partition(recipe, task))[1])
    assert len(digests) == 2


@pytest.mark.parametrize("objective", ["dpo", "simpo", "accuracy"])
def test_objectives_of_pairs(objective: str) -> None:
    recipe = recipe_of(Path("x.jsonl"), objective=objective)
    assert training_loss(recipe, resolve_task(recipe.task)).of in ("pairs", "answers")
    words = make_recipe(task={"name": "sst2", "objective": objective})
    if objective != "accuracy":
        with pytest.raises(RecipeError, match="is about pairs, and the task has classes"):
            training_loss(words, resolve_task(words.task))


def test_macro_f1_is_not_of_pairs() -> None:
    recipe = recipe_of(Path("x.jsonl"), objective="macro_f1")
    with pytest.raises(RecipeError, match=r"'macro_f1' is about classes, and the task is of pairs"):
        training_loss(recipe, resolve_task(recipe.task))


# Losses


def test_formulas() -> None:
    scores = torch.tensor([[-1.0, -2.5], [-3.0, -0.5], [40.0, -40.0], [-60.0, 60.0]])
    lengths = torch.tensor([[3.0, 2.0], [1.0, 4.0], [2.0, 2.0], [2.0, 2.0]])
    reference = scores.flip(0) / 3
    batch = Scored(scores, torch.zeros(4, dtype=torch.int64), lengths, reference)
    difference = scores[:, 0] - scores[:, 1]
    simpo = -logsigmoid(2.0 * difference - 0.5)
    assert torch.allclose(SimPO().losses(batch), simpo)
    assert torch.allclose(SimPO(1.0, 0.0).losses(batch), UsualLoss().losses(batch), atol=1e-6)
    chosen, rejected = ((scores - reference) * lengths).unbind(1)
    assert torch.allclose(DPO(0.3).losses(batch), -logsigmoid(0.3 * (chosen - rejected)))


def pairs(count: int, answers: int = 4) -> list[Encoded]:
    draw = np.random.default_rng(0)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, 320, int(draw.integers(1, most + 1))).tolist())

    return [Encoded(tokens(12), (tokens(answers), tokens(answers)), 0) for _ in range(count)]


@torch.inference_mode()
def plain(model: Any, example: Encoded, which: int) -> float:
    """Sum of the log-probabilities of an answer's tokens, from one unpacked sequence."""
    answer, begin = example.answers[which], len(example.prompt) - 1
    ids = torch.tensor([[*example.prompt, *answer]])
    logits = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(1)
    return float(sum(logits[begin + place, token] for place, token in enumerate(answer)))


@pytest.mark.parametrize("answers", [4, 1])
def test_dpo_over_a_model_is_that_of_plain_passes(answers: int) -> None:
    """Answers of one token each, too, which differ from pair to pair."""
    loaded, examples = tiny_model("llama"), pairs(6, answers)
    of = TextObjective(loaded, 10_000, loss=DPO(0.5))
    space = MaskedSpace(loaded.model, make_mask(loaded, 200))
    before = [[plain(loaded.model, e, which) for which in (0, 1)] for e in examples]
    assert of.unreferred(examples) == examples
    of.refer(examples)
    assert of.unreferred(examples) == []
    assert of.losses(examples) == pytest.approx(np.full(6, np.log(2)), abs=1e-5)
    space.write(space.read() + np.float32(0.3))
    after = [[plain(loaded.model, e, which) for which in (0, 1)] for e in examples]
    moved = np.array(after) - np.array(before)
    expected = np.logaddexp(0, -0.5 * (moved[:, 0] - moved[:, 1]))
    assert np.abs(moved).max() > 0.05
    assert of.losses(examples) == pytest.approx(expected, abs=1e-4)
    assert of.losses_of_copies(examples, 2)[1] == pytest.approx(expected, abs=1e-4)
    assert of.predict(examples).losses == pytest.approx(
        np.logaddexp(0, -np.array(of.predict(examples).margins)), abs=1e-4
    )


def worker_of(loss: TrainingLoss) -> Worker:
    loaded = tiny_model("llama")
    space = MaskedSpace(loaded.model, make_mask(loaded, 200))
    algorithm = algorithm_of(200, optimizer={"learning_rate": 0.05})
    return Worker(space, TextObjective(loaded, 10_000, loss=loss), algorithm)


def test_the_reference_is_the_model_as_loaded_whenever_it_is_asked_for() -> None:
    """A client that takes its first step when θ has moved has the losses of one that was there."""
    examples = pairs(8)
    early = worker_of(DPO())
    early.refer(examples)
    late = worker_of(DPO())
    moved = late.state.theta + np.float32(0.5)
    for worker in (early, late):
        worker.space.write(moved)
        worker.refer(examples[:3])  # what else is asked for has no part in it
        worker.refer(examples)
        worker.space.write(moved)
    found = [worker.objective.losses(examples) for worker in (early, late)]
    assert found[0].tolist() == found[1].tolist()
    assert np.abs(found[0] - np.log(2)).max() > 1e-3


def test_margins_and_their_share() -> None:
    examples = pairs(5)
    found = TextObjective(tiny_model("llama"), 10_000).predict(examples)
    model = tiny_model("llama").model
    means = [[plain(model, e, which) / len(e.answers[which]) for which in (0, 1)] for e in examples]
    margins = np.array(means)[:, 0] - np.array(means)[:, 1]
    assert found.margins == pytest.approx(margins, abs=1e-4)
    assert ((found.predicted == 0) == (margins > 0)).all()
    assert found.classes == 2
