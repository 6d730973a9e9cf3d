"""Runs over LoRA factors: the journal, other clients and settings, and what is exported."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from builders import ARCHITECTURES, merged, tiny_model
from commands import invoke, refused, toml_of
from peers import RemoteRun, local_run, same_evaluations

import meerkat
from meerkat.config import Recipe, parse_recipe
from meerkat.errors import MaskError, RunError
from meerkat.federation.rounds import RoundRecord
from meerkat.journal import Journal
from meerkat.journal.records import RoundMetrics
from meerkat.node import runtime as node_runtime
from meerkat.node.config import NodeConfig
from meerkat.runs.assembly import assemble
from meerkat.runs.events import RunObserver
from meerkat.runs.planning import plan_run
from meerkat.runs.remote_run import load_server_mask
from meerkat.spaces.mask_file import load_mask

LORA: dict[str, Any] = {
    "mask": {"kind": "lora", "lora_rank": 4, "lora_alpha": 8.0},
    "optimizer": {"learning_rate": 0.02},
}
IDS = torch.arange(5, 35)[None]


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any]) -> dict[str, Any]:
    return merged(tiny_recipe_data, **LORA)


@pytest.fixture(scope="module", params=[name for name in ARCHITECTURES if name != "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each architecture as a folder."""
    folder = tmp_path_factory.mktemp("models") / request.param
    loaded = tiny_model(request.param)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


class _StopAfterTwo(RunObserver):
    """Interrupts a run as Ctrl-C does."""

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        if record.round == 1:
            raise KeyboardInterrupt


def run(data: dict[str, Any], out: Path, **sections: Any) -> dict[str, Any]:
    return meerkat.run(parse_recipe(merged(data, **sections)), out, observers=())


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


def load(path: Path | str, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


# A run, whole


def test_a_run_of_each_architecture_and_its_exports(
    data: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Replayed, resumed, evaluated; merged without peft, and peft's own over the base model."""
    data = merged(data, model={"name": str(folder)})
    found = run(data, tmp_path / "run")
    mask = load_mask(tmp_path / "run" / "mask.safetensors")
    assert mask.kind == "lora"
    assert all(".lora_A." in name or ".lora_B." in name for name in mask.names)
    assert mask.size == mask.eligible == found["mask_size"]
    assert meerkat.replay(tmp_path / "run", audit=True).digest == found["state_digest"]
    with pytest.raises(KeyboardInterrupt):
        meerkat.run(parse_recipe(data), tmp_path / "cut", observers=[_StopAfterTwo()])
    resumed = meerkat.resume(tmp_path / "cut", observers=())
    assert resumed["state_digest"] == found["state_digest"]
    evaluated = meerkat.evaluate(tmp_path / "run")
    assert evaluated.metrics["loss"] == pytest.approx(found["after"]["loss"], abs=1e-6)
    assert found["after"]["loss"] != found["before"]["loss"]

    meerkat.export(tmp_path / "run", tmp_path / "merged")
    meerkat.export(tmp_path / "run", tmp_path / "adapter", peft=True)
    base, plain = load(folder), load(tmp_path / "merged")
    assert list(plain.state_dict()) == list(base.state_dict())
    assert not any("lora" in name for name in plain.state_dict())
    changed = {n for n, p in base.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert changed == {name.split(".lora_")[0] + ".weight" for name in mask.names}
    before = logits(base)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    moved = (logits(adapted) - before).norm()
    assert moved > 0.01
    assert (logits(plain) - logits(adapted)).norm() < 1e-3 * moved
    theirs = dict(adapted.named_parameters())
    theta = meerkat.replay(tmp_path / "run").theta
    ours = [theirs[f"base_model.model.{name}"].detach().flatten() for name in mask.names]
    assert np.array_equal(torch.cat(ours).numpy(), theta)
    # What was evaluated in the run is what the exported model gives.
    again = meerkat.evaluate(tmp_path / "merged", recipe=tmp_path / "run" / "recipe.json")
    assert again.metrics["loss"] == pytest.approx(found["after"]["loss"], abs=1e-4)


def test_a_bfloat16_model_keeps_its_type(
    data: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    data = merged(data, model={"dtype": "bfloat16"})
    found = run(data, tmp_path / "run")
    assert meerkat.replay(tmp_path / "run").digest == found["state_digest"]
    meerkat.export(tmp_path / "run", tmp_path / "merged")
    meerkat.export(tmp_path / "run", tmp_path / "adapter", peft=True)
    plain, base = load(tmp_path / "merged"), load(tiny_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    before = logits(base)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (logits(plain) - logits(adapted)).norm() < 0.5 * (logits(adapted) - before).norm()


def test_the_commands(data: dict[str, Any], tmp_path: Path) -> None:
    recipe, out = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(toml_of(data))
    printed = invoke("run", recipe, "--out", out)
    assert printed.exit_code == 0, printed.output
    assert json.loads((out / "summary.json").read_text())["mask_size"] > 0
    assert (out / "report.html").is_file()
    for option, to in ((["--peft"], "adapter"), ([], "merged")):
        written = invoke("export", out, "--to", tmp_path / to, *option)
        assert written.exit_code == 0, written.output
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors"}
    refused(invoke("export", out, "--to", tmp_path / "adapter", "--peft"), "--to", "empty")
    refused(invoke("export", out, "--to", tmp_path / "d", "--delta"), "--delta", "--peft")
    refused(invoke("export", out, "--to", tmp_path / "d", "--delta", "--peft"), "exclude")
    refused(invoke("gradip", out), "gradient")
    for command in (["evaluate", out], ["replay", out], ["calibrate", recipe], ["plan", recipe]):
        found = invoke(*command)
        assert found.exit_code == 0, found.output


def test_factors_of_a_run_are_no_entries_of_weights(data: dict[str, Any], tmp_path: Path) -> None:
    run(data, tmp_path / "run")
    with pytest.raises(RunError, match=r"--shira: LoRA factors are no entries"):
        meerkat.export(tmp_path / "run", tmp_path / "adapter", shira=True)
    assert not (tmp_path / "adapter").exists()


def test_without_peft_a_run_ends_before_anything_is_loaded(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(toml_of(merged(data, task={"source": str(tmp_path / "nowhere.csv")})))
    monkeypatch.setitem(sys.modules, "peft", None)
    for command in (["run", recipe, "--out", tmp_path / "run"], ["calibrate", recipe]):
        refused(invoke(*command), "package peft", "meerkat-fl[lora]")


def test_a_run_is_evaluated_on_another_recipe(data: dict[str, Any], tmp_path: Path) -> None:
    """Whose mask is another: the factors are the run's."""
    run(data, tmp_path / "run")
    task = {"prompt": "{text} This was"}
    plain = {"kind": "random", "lora_rank": 8, "lora_alpha": 16.0}
    lora = parse_recipe(merged(data, task=task))
    other = parse_recipe(merged(data, task=task, mask=plain))
    inside = parse_recipe(merged(data, task=task, mask=plain, subspace={"kind": "random"}))
    found = meerkat.evaluate(tmp_path / "run", recipe=lora).metrics
    assert meerkat.evaluate(tmp_path / "run", recipe=other).metrics == found
    assert meerkat.evaluate(tmp_path / "run", recipe=inside, examples=20).metrics == found
    run(data, tmp_path / "plain", mask=plain)
    expected = meerkat.evaluate(tmp_path / "plain", recipe=other).metrics
    assert meerkat.evaluate(tmp_path / "plain", recipe=lora).metrics == expected != found


# Settings


def test_only_factors_from_the_first_block_on(data: dict[str, Any], tmp_path: Path) -> None:
    """What the blocks below give a batch is kept, and no bit of the run depends on it."""
    found = [
        run(
            data, tmp_path / f"run{cache}", mask={"first_block": 1}, runtime={"prefix_cache": cache}
        )
        for cache in (0, 64)
    ]
    assert found[0]["state_digest"] == found[1]["state_digest"]
    assert found[0]["after"] == found[1]["after"]


def test_settings_that_change_no_bit(data: dict[str, Any], tmp_path: Path) -> None:
    expected = run(data, tmp_path / "run")["state_digest"]
    for number, runtime in enumerate(
        ({"recompute": True}, {"tokens_together": 0}, {"theta": "device"})
    ):
        assert run(data, tmp_path / f"{number}", runtime=runtime)["state_digest"] == expected


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_in_few_bits(data: dict[str, Any], tmp_path: Path, weights: str) -> None:
    found = run(data, tmp_path / "few", runtime={"weights": weights})
    stored = run(data, tmp_path / "stored")
    assert found["before"]["loss"] != stored["before"]["loss"]
    assert found["before"]["loss"] == pytest.approx(stored["before"]["loss"], abs=0.3)
    assert meerkat.replay(tmp_path / "few").digest == found["state_digest"]
    masks = [load_mask(tmp_path / name / "mask.safetensors") for name in ("few", "stored")]
    assert np.array_equal(masks[0].initial, masks[1].initial)
    meerkat.export(tmp_path / "few", tmp_path / "merged")  # over the weights as they are stored
    assert meerkat.evaluate(tmp_path / "few").metrics["loss"] == pytest.approx(
        found["after"]["loss"], abs=1e-6
    )


def test_exact_slopes_along_directions(data: dict[str, Any], tmp_path: Path) -> None:
    """Those of forward-mode are what two points near θ give, up to the curvature."""
    slopes = []
    for number, kind in enumerate(("forward-mode", "two-point")):
        out = tmp_path / f"{number}"
        optimizer = {"estimator": kind, "learning_rate": 1e-6, "epsilon": "auto"}
        run(data, out, optimizer=optimizer)
        with closing(Journal.open(out / "journal.sqlite")) as journal:
            reports = next(iter(journal.records()))[0].reports
            slopes.append([scalar for report in reports for scalar in report.scalars])
    np.testing.assert_allclose(slopes[0], slopes[1], rtol=0.1, atol=0.05)


@pytest.mark.slow
def test_a_compiled_run(data: dict[str, Any], tmp_path: Path) -> None:
    data = merged(
        data,
        mask={"include": ["*.layers.1.self_attn.*_proj.weight"]},
        federation={"rounds": 1, "clients": 1, "partition": {"kind": "iid"}},
    )
    found = run(data, tmp_path / "compiled", runtime={"compile": True})
    plain = run(data, tmp_path / "plain")
    assert found["before"]["loss"] == pytest.approx(plain["before"]["loss"], abs=1e-3)
    assert found["after"]["loss"] == pytest.approx(plain["after"]["loss"], abs=5e-2)


def test_gradip_needs_a_gradient_that_factors_lack(data: dict[str, Any], tmp_path: Path) -> None:
    selection = {"kind": "gradip", "signal": "gradip", "calibration_steps": 8}
    with pytest.raises(Exception, match=r"selection\.signal = 'gradip' needs .* lora mask lacks"):
        run(data, tmp_path / "run", selection=selection)


@pytest.mark.parametrize("weights", ["stored", "int8", "int4"])
def test_a_plan_counts_the_factors(data: dict[str, Any], weights: str) -> None:
    recipe = parse_recipe(merged(data, mask={"lora_rank": 8}, runtime={"weights": weights}))
    plan = plan_run(recipe)
    assembly = assemble(recipe)
    base = sum(p.numel() for p in assembly.loaded.model.parameters())
    assembly.worker()
    mask = assembly.found_mask.mask
    assert plan.model.masked == plan.model.moving == plan.model.eligible == mask.size
    assert plan.model.parameters == base - mask.size
    held = sum(
        getattr(p, "held_bytes", None) or p.nbytes for p in assembly.loaded.model.parameters()
    )
    assert plan.memory.weights == held
    assert plan.memory.making_the_mask == 0


# Elsewhere


@pytest.fixture
def apart() -> None:
    """Clients that load their own models."""
    node_runtime._leave_all()
    node_runtime._assemblies.clear()


@pytest.mark.usefixtures("apart")
def test_clients_elsewhere_draw_the_same_factors(data: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(data)
    local = local_run(recipe, tmp_path / "local")
    meerkat.calibrate(recipe, out=tmp_path / "mask")
    mask = load_server_mask(tmp_path / "mask")
    found = RemoteRun(recipe, tmp_path / "remote", mask)
    assert found.run()["state_digest"] == local["state_digest"]
    same_evaluations(tmp_path / "local", tmp_path / "remote")
    assert meerkat.replay(tmp_path / "remote").digest == local["state_digest"]
    meerkat.export(tmp_path / "remote", tmp_path / "merged")


@pytest.mark.usefixtures("apart")
def test_a_node_may_keep_few_bits(data: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(data)
    meerkat.calibrate(recipe, out=tmp_path / "mask")
    nodes = [NodeConfig(0), NodeConfig(1, weights="int8"), NodeConfig(2, weights="int4")]
    found = RemoteRun(recipe, tmp_path / "run", load_server_mask(tmp_path / "mask"), nodes).run()
    assert meerkat.replay(tmp_path / "run").digest == found["state_digest"]


@pytest.mark.usefixtures("apart")
def test_a_client_without_peft_says_so(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(data)
    meerkat.calibrate(recipe, out=tmp_path / "mask")
    mask = load_server_mask(tmp_path / "mask")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RunError, match="package peft"):
        RemoteRun(recipe, tmp_path / "run", mask).run()


# Mask files


def with_file(recipe: Recipe, path: Path, **mask: Any) -> Recipe:
    fields = {"file": str(path), **mask}
    return parse_recipe(merged(recipe.model_dump(mode="json"), mask=fields))


def test_a_mask_file_serves_the_recipe_it_was_made_for(
    data: dict[str, Any], tmp_path: Path
) -> None:
    recipe, path = parse_recipe(data), tmp_path / "mask.safetensors"
    meerkat.calibrate(recipe, out=path)
    assert path.stat().st_size < 2e6
    found = local_run(with_file(recipe, path), tmp_path / "run")
    assert found["state_digest"] == local_run(recipe, tmp_path / "own")["state_digest"]
    with pytest.raises(MaskError, match=r"other LoRA factors .*mask\.seed"):
        assemble(with_file(recipe, path, seed=1)).found_mask  # noqa: B018
    with pytest.raises(MaskError, match="is not in the model"):
        assemble(with_file(recipe, path, lora_rank=3)).found_mask  # noqa: B018
    usual = {"lora_rank": 8, "lora_alpha": 16.0}
    with pytest.raises(MaskError, match=r"are LoRA factors, .* is not what the recipe says"):
        assemble(with_file(recipe, path, kind="random", **usual)).found_mask  # noqa: B018


def test_a_mask_of_weights_is_none_of_factors(
    data: dict[str, Any], tiny_recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    other = parse_recipe(merged(tiny_recipe_data, mask={"kind": "random"}))
    meerkat.calibrate(other, out=tmp_path / "mask")
    with pytest.raises(MaskError, match=r"are no LoRA factors, .* is what the recipe says"):
        assemble(with_file(parse_recipe(data), tmp_path / "mask")).found_mask  # noqa: B018
