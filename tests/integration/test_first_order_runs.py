"""First-order runs of a tiny model: what they reach, what they keep, what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import merged
from numpy.testing import assert_allclose

import meerkat
from meerkat.comparison import first_order as module
from meerkat.comparison.first_order import run_first_order, train_first_order
from meerkat.comparison.results import FirstOrder, result_path
from meerkat.config import Recipe, parse_recipe
from meerkat.errors import DivergedError, RecipeError, RunError
from meerkat.runs.assembly import Assembly, assemble
from meerkat.runs.evaluation import evaluate_objective

METHODS = [
    FirstOrder("fedavg"),
    FirstOrder("fedavg", optimizer="adam"),
    FirstOrder("fedavgm", momentum=0.5),
    FirstOrder("scaffold"),
    FirstOrder("central"),
    FirstOrder("central", optimizer="adam"),
    FirstOrder("fedavg", "masked"),
    FirstOrder("fedavg", "masked", "adam"),
    FirstOrder("fedavgm", "masked", momentum=0.5),
    FirstOrder("scaffold", "masked"),
    FirstOrder("central", "masked", "adam"),
]


def recipe_of(data: dict[str, Any], method: FirstOrder | None = None, **sections: Any) -> Recipe:
    """A few rounds at a rate that suits the method."""
    adam = method is not None and method.optimizer == "adam"
    rate = 2e-3 if adam else 0.02
    changed = merged(data, optimizer={"learning_rate": rate}, evaluation={"every": 2})
    return parse_recipe(merged(changed, **sections))


def bits(assembly: Assembly) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in assembly.loaded.model.named_parameters()}


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_loss_goes_down(tiny_recipe_data: dict, tmp_path: Path, method: FirstOrder) -> None:
    recipe = recipe_of(tiny_recipe_data, method)
    found = run_first_order(recipe, method, tmp_path / "run")
    assert [point.round for point in found.points] == [0, 2, 4]
    losses = [point.metrics["loss"] for point in found.points]
    assert losses[-1] < losses[0]
    assert found.points[0].training_loss is None
    assert found.finished
    assert found.fingerprint == recipe.fingerprint
    # 3 clients, 2 local steps of 4 examples, forward and backward
    assert [p.example_passes for p in found.points] == [0, 2 * 72, 4 * 72]
    sent = {"central": 0, "scaffold": 8}.get(method.method, 4) * found.size
    assert (found.bytes_up, found.bytes_down) == (sent, sent)
    kept = json.loads(result_path(tmp_path / "run").read_text())
    assert kept["size"] == found.size
    assert kept["points"][-1]["metrics"] == found.points[-1].metrics


@pytest.mark.parametrize("method", ["fedavg", "central"])
def test_masked_sgd_of_one_step_is_a_gradient_step_by_hand(
    tiny_recipe_data: dict, method: str
) -> None:
    federation = {"rounds": 2, "local_steps": 1, "weighting": "examples"}
    recipe = recipe_of(tiny_recipe_data, federation=federation, optimizer={"schedule": "linear"})
    assembly = assemble(recipe)
    mask, model, objective = assembly.found_mask.mask, assembly.loaded.model, assembly.objective
    held = np.array([len(part) for part in assembly.parts])
    parameters = dict(model.named_parameters())
    counts = {name: len(i) for name, i in zip(mask.names, mask.indices, strict=True)}
    before = bits(assembly)
    for round, rate in enumerate((0.02, 0.01)):
        total = {name: torch.zeros(count) for name, count in counts.items()}
        for client, share in zip(assembly.clients(), held / held.sum(), strict=True):
            for name in mask.names:
                parameters[name].requires_grad_(True)
            losses = torch.cat(list(objective.losses_with_graph(client.batch(round))))
            losses.mean().backward()
            for name, indices in zip(mask.names, mask.indices, strict=True):
                gradient = parameters[name].grad
                assert gradient is not None
                total[name] += share * gradient.reshape(-1)[torch.from_numpy(indices)]
                parameters[name].grad = None
                parameters[name].requires_grad_(False)
        with torch.no_grad():
            for name, indices in zip(mask.names, mask.indices, strict=True):
                parameters[name].view(-1)[torch.from_numpy(indices)] -= rate * total[name]
    wanted = evaluate_objective(objective, assembly.test, assembly.metrics).metrics
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
    found = train_first_order(assembly, FirstOrder(method, "masked"))  # type: ignore[arg-type]
    assert found.size == mask.size
    assert_allclose(found.points[-1].metrics["loss"], wanted["loss"], rtol=1e-5)
    assert found.points[0].metrics["loss"] != pytest.approx(wanted["loss"], rel=1e-4)


@pytest.mark.parametrize("place", ["all", "masked"])
def test_the_model_is_restored(tiny_recipe_data: dict, place: str) -> None:
    assembly = assemble(recipe_of(tiny_recipe_data))
    before = bits(assembly)
    moved = []
    train_first_order(
        assembly,
        FirstOrder("fedavg", place),  # type: ignore[arg-type]
        lambda _: moved.append(
            any(not torch.equal(p, before[n]) for n, p in bits(assembly).items())
        ),
    )
    assert moved == [False, True, True]
    assert all(torch.equal(p, before[n]) for n, p in bits(assembly).items())


def test_a_finished_result_is_not_run_again(
    tiny_recipe_data: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, method = recipe_of(tiny_recipe_data), FirstOrder("fedavg", "masked")
    found = run_first_order(recipe, method, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(module, "assemble", lambda *_: pytest.fail("it was run again"))
        assert run_first_order(recipe, method, tmp_path) == found
        for other in (
            (recipe_of(tiny_recipe_data, seed=8), method),
            (recipe, FirstOrder("fedavgm", "masked")),
        ):
            with pytest.raises(RunError, match=r"another method or recipe.*another directory"):
                run_first_order(*other, tmp_path)


def test_an_unfinished_result_is_run_from_the_beginning(
    tiny_recipe_data: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, method = recipe_of(tiny_recipe_data), FirstOrder("scaffold", "masked")
    whole = run_first_order(recipe, method, tmp_path / "whole")
    evaluate, out = module._evaluate, tmp_path / "out"

    def interrupted(assembly: Assembly, round: int) -> Any:
        if round == 4:
            raise KeyboardInterrupt
        return evaluate(assembly, round)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_first_order(recipe, method, out)
    kept = json.loads(result_path(out).read_text())
    assert not kept["finished"]
    assert [point["round"] for point in kept["points"]] == [0, 2]
    found = run_first_order(recipe, method, out)
    assert found.finished
    assert [p.metrics for p in found.points] == [p.metrics for p in whole.points]


def test_a_round_of_some_clients_counts_their_passes_alone(
    tiny_recipe_data: dict, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_recipe_data, federation={"clients_per_round": 2})
    for name, passes in (("scaffold", 4 * 48), ("central", 4 * 72)):
        method = FirstOrder(name, "masked")  # type: ignore[arg-type]
        found = run_first_order(recipe, method, tmp_path / name)
        assert found.points[-1].example_passes == passes


def test_zeroth_order_settings_are_left_out_and_the_model_is_in_float32(
    tiny_recipe_data: dict, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "model": {"dtype": "bfloat16"},
        "subspace": {"dimensions": 4, "texts": 8, "corpus": tiny_recipe_data["mask"]["corpus"]},
        "optimizer": {"estimator": "backward", "schedule": "constant"},
        "noise": {"kind": "orthogonal"},
        "runtime": {"weights": "int8"},
    }
    method = FirstOrder("fedavg", "masked")
    plain = recipe_of(tiny_recipe_data, method, optimizer={"schedule": "constant"})
    changed = recipe_of(tiny_recipe_data, method, **sections)
    assert changed.fingerprint != plain.fingerprint
    one = run_first_order(plain, method, tmp_path / "plain")
    other = run_first_order(changed, method, tmp_path / "changed")
    assert other.fingerprint == changed.fingerprint
    assert [p.metrics for p in one.points] == [p.metrics for p in other.points]


def test_a_loss_that_is_not_finite_ends_the_run(tiny_recipe_data: dict, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe_data, optimizer={"learning_rate": 1e30})
    with pytest.raises(DivergedError, match=r"the loss .*lower optimizer.learning_rate"):
        run_first_order(recipe, FirstOrder("fedavg"), tmp_path)
    kept = json.loads(result_path(tmp_path).read_text())
    assert [point["round"] for point in kept["points"]] == [0]


def test_vectors_beyond_the_limit_are_refused(tiny_recipe_data: dict, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe_data)
    with pytest.raises(RecipeError, match=r"'scaffold'.*federation.clients = 3.*memory_limit"):
        run_first_order(recipe, FirstOrder("scaffold"), tmp_path / "out", memory_limit=2**20)
    assert not (tmp_path / "out").exists()
    run_first_order(recipe, FirstOrder("scaffold"), tmp_path / "out", memory_limit=2**24)


def test_a_directory_with_a_run_is_left_alone(tiny_recipe_data: dict, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe_data, federation={"rounds": 1})
    meerkat.run(recipe, tmp_path / "run", observers=())
    with pytest.raises(RunError, match="holds another run"):
        run_first_order(recipe, FirstOrder("fedavg"), tmp_path / "run")
