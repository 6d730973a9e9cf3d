"""The task mask: scores by the loss of the clients' labelled examples, an oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import ARCHITECTURES, merged, tiny_model
from commands import invoke, toml_of

import meerkat
from meerkat.config import Recipe, parse_recipe
from meerkat.data.encoding import Encoded
from meerkat.runs.assembly import assemble
from meerkat.runs.planning import plan_run
from meerkat.spaces.mask_file import Mask, load_mask

FIELDS = {"kind": "task", "batches": 3, "batch_size": 4}


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any]) -> dict[str, Any]:
    return merged(tiny_recipe_data, mask=FIELDS)


def mask_of(data: dict[str, Any], **sections: Any) -> Mask:
    return assemble(parse_recipe(merged(data, **sections))).found_mask.mask


def as_sets(mask: Mask) -> dict[str, set[int]]:
    return {n: set(i.tolist()) for n, i in zip(mask.names, mask.indices, strict=True)}


def gradients(model: Any, batch: list[Encoded]) -> dict[str, np.ndarray]:
    """Of the mean cross-entropy over the answers, by a plain pass for each answer of an example."""
    model.zero_grad()
    for example in batch:
        found = []
        for answer in example.answers:
            ids = torch.tensor([example.prompt + answer[:-1]])
            log_p = model(input_ids=ids).logits[0, -len(answer) :].log_softmax(1)
            found.append(log_p[range(len(answer)), answer].mean())
        scores = torch.stack(found)
        (-scores.log_softmax(0)[example.label] / len(batch)).backward()
    return {
        name: p.grad.double().numpy().copy()
        for name, p in model.named_parameters()
        if ".layers." in name and p.ndim == 2
    }


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gpt2"])
def test_scores_are_mean_squares_of_the_tasks_gradients(
    data: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    loaded = tiny_model(architecture)
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    assembly = assemble(parse_recipe(merged(data, model={"name": str(tmp_path / "model")})))
    batches = assembly.example_batches()
    assert [len(batch) for batch in batches] == [4, 4, 4]
    found = assembly.found_mask.mask
    model = loaded.model.requires_grad_(True)
    each = [gradients(model, batch) for batch in batches]
    scores = {name: sum(g[name] ** 2 for g in each) / len(each) for name in each[0]}
    means = {name: sum(g[name] for g in each) / len(each) for name in each[0]}
    chosen = np.concatenate(
        [scores[n].flatten()[i] for n, i in zip(found.names, found.indices, strict=True)]
    )
    best = np.sort(np.concatenate([score.flatten() for score in scores.values()]))[::-1]
    # As large as the largest there are: which of two that are nearly equal is a matter of rounding.
    np.testing.assert_allclose(np.sort(chosen)[::-1], best[: found.size], rtol=1e-3)
    p = np.concatenate(
        [means[n].flatten()[i] for n, i in zip(found.names, found.indices, strict=True)]
    )
    np.testing.assert_allclose(found.gradient, p, rtol=1e-3, atol=1e-6)
    assert found.kind == "task"
    assert found.concentration is not None


def test_examples_are_drawn_by_the_masks_seed(data: dict[str, Any]) -> None:
    def drawn(**mask: Any) -> list[list[Encoded]]:
        return assemble(parse_recipe(merged(data, mask=mask))).example_batches()

    first = drawn()
    assert drawn() == first
    assert drawn(seed=1) != first
    texts = [example.prompt for batch in drawn(batches=20) for example in batch]
    assert len(set(texts)) == len(texts)
    held = sum(map(len, assemble(parse_recipe(data)).parts))
    most = drawn(batches=1000, batch_size=8)
    assert len(most) == held // 8
    assert {len(batch) for batch in most} == {8}
    (whole,) = drawn(batch_size=1000)
    assert len(whole) == held


def test_the_mask_follows_the_task(data: dict[str, Any], tmp_path: Path) -> None:
    """No cache stands between: another prompt, other labels, or another loss is another mask."""
    found = mask_of(data)
    assert as_sets(mask_of(data)) == as_sets(found)
    swapped = {"verbalizers": {"neg": "great", "pos": "terrible"}}
    for task in ({"prompt": "{text} This film is"}, swapped):
        assert as_sets(mask_of(data, task=task)) != as_sets(found)
    assert as_sets(mask_of(data, mask={"kind": "sensitivity"})) != as_sets(found)
    assert as_sets(mask_of(data, mask={"corpus": "nowhere.txt"})) == as_sets(found)


def test_settings_give_the_same_mask(data: dict[str, Any]) -> None:
    found = mask_of(data)
    for runtime in ({"mask_passes": 2}, {"recompute": True}, {"tokens_per_pass": 100}):
        other = mask_of(data, runtime=runtime)
        same = sum(len(as_sets(found)[n] & as_sets(other).get(n, set())) for n in found.names)
        assert same >= 0.98 * found.size
        assert np.linalg.norm(other.gradient) == pytest.approx(
            np.linalg.norm(found.gradient), rel=1e-2
        )


def test_free_text_has_a_task_mask(data: dict[str, Any], reviews_file: Path) -> None:
    task = {
        "name": "custom",
        "source": str(reviews_file),
        "prompt": "{text} It was",
        "answer": "label",
        "max_length": 64,
    }
    partition = {"kind": "iid"}
    recipe = merged({**data, "task": task}, federation={"partition": partition})
    assert parse_recipe(recipe).task.verbalizers is None
    assert assemble(parse_recipe(recipe)).found_mask.mask.size > 0


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_plan_knows_it(data: dict[str, Any], scope: str) -> None:
    recipe = parse_recipe(merged(data, mask={"scope": scope}))
    plan, mask = plan_run(recipe), mask_of(data, mask={"scope": scope})
    assert plan.model.masked == mask.size
    assert plan.memory.making_the_mask > plan.memory.weights
    corpus = plan_run(parse_recipe(merged(data, mask={"kind": "sensitivity"})))
    assert plan.bytes.once == corpus.bytes.once or scope == "tensor"
    assert plan_run(recipe, measure=True).seconds.mask > 0


def test_a_run_with_the_commands(data: dict[str, Any], tmp_path: Path) -> None:
    """From calibration to GradIP along p, and export; resumed with the mask that it has."""
    selection = {"kind": "gradip", "signal": "gradip", "calibration_steps": 8}
    recipe, out = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(toml_of(merged(data, selection=selection)))
    for command in (
        ["run", recipe, "--out", out],
        ["calibrate", recipe, "--out", tmp_path / "mask"],
        ["gradip", out],
        ["resume", out],
        ["evaluate", out],
        ["export", out, "--to", tmp_path / "delta", "--delta"],
    ):
        printed = invoke(*command)
        assert printed.exit_code == 0, printed.output
    masks = [load_mask(tmp_path / name) for name in ("mask", "run/mask.safetensors")]
    assert masks[0].digest == masks[1].digest
    assert np.array_equal(masks[0].gradient, masks[1].gradient)
    assert meerkat.replay(out, audit=True).rounds > 0


def test_a_server_takes_its_file(data: dict[str, Any], tmp_path: Path) -> None:
    """Made where the labelled examples are, used where they are not."""
    recipe = parse_recipe(data)
    meerkat.calibrate(recipe, out=tmp_path / "mask")
    fields = {"file": str(tmp_path / "mask")}
    given: Recipe = parse_recipe(merged(recipe.model_dump(mode="json"), mask=fields))
    assert assemble(given).found_mask.mask.digest == assemble(recipe).found_mask.mask.digest
