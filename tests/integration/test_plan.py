"""What `meerkat plan` says, against runs that were made."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import merged

import meerkat
from meerkat.config import parse_recipe
from meerkat.journal import Journal
from meerkat.models.objective import TextObjective
from meerkat.runs import planning
from meerkat.runs.planning import plan_run

SUBSPACE = {"dimensions": 4, "texts": 12}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"federation": {"clients": 6, "clients_per_round": 2, "rounds": 12}},
    "several": {"noise": {"perturbations": 3, "directions": "per-client"}},
    "one-sided": {"noise": {"perturbations": 3}, "optimizer": {"estimator": "one-sided"}},
    "aligned": {"subspace": SUBSPACE, "evaluation": {"every": 3}},
    "exact": {"subspace": SUBSPACE, "optimizer": {"estimator": "backward"}},
    "mixed": {"subspace": SUBSPACE, "optimizer": {"exact_clients": [0, 2]}},
    "random": {"mask": {"kind": "random"}},
    "magnitude": {"mask": {"kind": "magnitude"}},
    "by tensor": {"mask": {"scope": "tensor"}},
    "full": {"mask": {"kind": "full"}},
    "high": {"mask": {"first_block": 1}},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_needs_what_was_planned(
    tiny_recipe_data: dict[str, Any], sentences_file: Path, tmp_path: Path, kind: str
) -> None:
    data = merged(tiny_recipe_data, mask={"corpus": str(sentences_file)})
    recipe = parse_recipe(merged(data, **KINDS[kind]))
    found = meerkat.plan(recipe)
    summary = meerkat.run(recipe, tmp_path / "run", observers=())
    with closing(Journal.open(tmp_path / "run/journal.sqlite")) as journal:
        metrics = [m for _, m in journal.records()]
        evaluated = sum(e.examples for e in journal.evaluations())
        header = journal.header
    assert found.model.eligible == header.eligible
    assert found.model.masked == header.mask_size
    assert found.model.moving == (4 if recipe.subspace is not None else header.mask_size)
    assert found.passes.evaluating == evaluated
    up, down = sum(m.bytes_up for m in metrics), sum(m.bytes_down for m in metrics)
    if kind == "mixed":  # a client without gradients reports fewer numbers than planned
        assert found.bytes.up * 0.5 < up <= found.bytes.up
        assert down <= found.bytes.down
    elif kind == "sampled":  # who was not asked for some rounds at the end lacks their log
        assert up == found.bytes.up
        assert 0.7 * found.bytes.down < down <= found.bytes.down
    else:
        assert (up, down) == (found.bytes.up, found.bytes.down)
        assert summary["bytes_up_per_client_round"] == found.bytes.up_a_client_round
        assert summary["bytes_down_per_client_round"] == found.bytes.down_a_client_round
    mask = (tmp_path / "run/mask.safetensors").stat().st_size
    assert found.disk.mask == found.bytes.once
    assert found.disk.mask <= mask <= found.disk.mask + 8_000  # the file's head
    journalled = (tmp_path / "run/journal.sqlite").stat().st_size
    assert 0.5 * found.disk.journal < journalled < 1.5 * found.disk.journal


def test_no_weight_is_loaded(
    tiny_recipe_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **others: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    found = plan_run(parse_recipe(tiny_recipe_data))
    assert found.seconds is None
    assert (found.model.blocks, found.model.kept_blocks) == (2, 0)
    assert found.memory.weights == 4 * found.model.parameters


def test_memory_follows_the_recipe(tiny_recipe_data: dict[str, Any]) -> None:
    def memory(**sections: Any) -> planning.MemoryFigures:
        return plan_run(parse_recipe(merged(tiny_recipe_data, **sections))).memory

    plain = memory()
    narrow = memory(model={"dtype": "bfloat16"}, runtime={"compute": "stored"})
    assert narrow.weights * 2 == plain.weights
    assert memory(model={"dtype": "bfloat16"}, runtime={"compute": "float32"}) == plain
    assert memory(runtime={"mask_passes": 2}).making_the_mask < plain.making_the_mask
    assert memory(mask={"kind": "random"}).making_the_mask == 0
    assert plain.making_the_subspace == 0
    exact = memory(subspace=SUBSPACE, optimizer={"estimator": "backward"})
    one_by_one = memory(subspace=SUBSPACE, runtime={"tokens_together": 0})
    assert exact.activations == 2 * one_by_one.activations  # of two blocks
    for tokens, copies in ((10**6, 2), (2 * 4 * 64, 2), (2 * 4 * 64 - 1, 1)):  # of 4 examples
        found = memory(subspace=SUBSPACE, runtime={"tokens_together": tokens})
        assert found.activations == copies * one_by_one.activations
    magnitude = {"mask": {"kind": "magnitude"}, "subspace": SUBSPACE}
    assert memory(**magnitude).activations == 2 * one_by_one.activations
    random = {"mask": {"kind": "random"}, "runtime": {"tokens_together": 10**6}}
    assert memory(**random) == memory(mask={"kind": "random"}, runtime={"tokens_together": 0})
    assert exact.making_the_subspace > exact.weights
    assert exact.server < exact.client - exact.weights
    for runtime in ({"prefix_cache": 3}, {"prefix_cache": 0, "prefix_disk": 3}):
        found = plan_run(
            parse_recipe(merged(tiny_recipe_data, mask={"first_block": 1}, runtime=runtime))
        )
        assert found.model.kept_blocks == 1
        held = found.memory.weights + found.memory.activations + found.memory.server
        assert found.memory.client == held + runtime["prefix_cache"] * 2**20


def test_blocks_that_are_computed_again_keep_little(tiny_recipe_data: dict[str, Any]) -> None:
    data = merged(
        tiny_recipe_data, subspace=SUBSPACE, optimizer={"estimator": "backward"}
    )  # four layers from and to 32 and 16, three from or to 64: 512 values a token and block
    usual = plan_run(parse_recipe(data)).memory
    again = plan_run(parse_recipe(merged(data, runtime={"recompute": True}))).memory
    tokens, one, hidden = 64 * 4, 512, 32
    assert usual.activations == 4 * tokens * 2 * one
    assert again.activations == 4 * tokens * (one + 2 * hidden)
    for name in ("making_the_mask", "making_the_subspace"):
        assert getattr(again, name) < getattr(usual, name)


def test_an_estimate_of_time_is_made_of_measured_passes(
    tiny_recipe_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that goes one second a pass, the seconds are the passes."""
    clock = [0.0]
    losses = TextObjective.losses

    def slow(self: TextObjective, examples: Any) -> Any:
        clock[0] += 1.0
        return losses(self, examples)

    predict = TextObjective.predict

    def predicted(self: TextObjective, examples: Any) -> Any:
        clock[0] += 0.1 * len(examples)
        return predict(self, examples)

    monkeypatch.setattr(TextObjective, "losses", slow)
    monkeypatch.setattr(TextObjective, "predict", predicted)
    monkeypatch.setattr(planning.time, "perf_counter", lambda: clock[0])
    data = merged(tiny_recipe_data, noise={"perturbations": 2}, mask={"kind": "random"})
    found = plan_run(parse_recipe(data), measure=True).seconds
    assert found is not None
    assert (found.forward, found.step, found.mask, found.subspace) == (1.0, 4.0, 0.0, 0.0)
    assert found.training == 4 * 3 * 2 * 4  # passes, clients, steps, rounds
    assert found.evaluating == pytest.approx(2 * 20 * 0.1)
    sensitive = merged(tiny_recipe_data, noise={"perturbations": 2})
    together = plan_run(parse_recipe(sensitive), measure=True).seconds
    assert together is not None
    assert together.step == 1.0  # four passes in one
    data = merged(data, mask={"first_block": 1})
    kept = plan_run(parse_recipe(data), measure=True).seconds
    assert kept is not None
    assert kept.step == 0.5 + 4 * 0.5


@pytest.mark.real
def test_the_demo_at_a_glance() -> None:
    found = meerkat.plan(Path(__file__).parents[2] / "recipes/demo.toml")
    assert found.model.eligible == 100_270_080
    assert found.model.masked == 100_270
    assert found.bytes.up_a_client_round == 52
    assert found.memory.weights == (2 if torch.cpu.get_capabilities().get("avx512_f") else 4) * (
        found.model.parameters
    )
    assert found.bytes.once == 100_270 * (12 + 64)
