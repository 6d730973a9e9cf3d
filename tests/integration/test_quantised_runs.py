"""Runs over weights in few bits: mask, states and exports are those of the stored model."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import transformers
from builders import merged
from peers import RemoteRun, local_run

import meerkat
from meerkat.config import parse_recipe
from meerkat.federation.rounds import RoundRecord
from meerkat.journal import Journal
from meerkat.journal.records import RoundMetrics
from meerkat.models.quantised import QuantisedWeight
from meerkat.node import runtime
from meerkat.node.config import NodeConfig
from meerkat.runs.assembly import assemble
from meerkat.runs.events import RunObserver
from meerkat.runs.planning import plan_run
from meerkat.runs.remote_run import load_server_mask
from meerkat.spaces.mask_file import load_mask

SUBSPACE = {"dimensions": 4, "texts": 12}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "aligned": {"subspace": SUBSPACE},
    "renewed": {"subspace": {**SUBSPACE, "renew_every": 2}},
    "exact": {
        "subspace": SUBSPACE,
        "optimizer": {"estimator": "backward", "learning_rate": 0.1},
    },
    "forward-mode": {"subspace": SUBSPACE, "optimizer": {"estimator": "forward-mode"}},
}


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any], sentences_file: Path) -> dict[str, Any]:
    return merged(tiny_recipe_data, mask={"corpus": str(sentences_file)})


class _StopAfterTwo(RunObserver):
    """Interrupts a run as Ctrl-C does."""

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        if record.round == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_run_learns_is_resumed_and_evaluated(
    data: dict[str, Any], tmp_path: Path, kind: str, weights: str
) -> None:
    few = parse_recipe(merged(data, **KINDS[kind], runtime={"weights": weights}))
    stored = parse_recipe(merged(data, **KINDS[kind]))
    assert few.fingerprint == stored.fingerprint
    found = meerkat.run(few, tmp_path / "few", observers=())
    expected = meerkat.run(stored, tmp_path / "stored", observers=())
    masks = [load_mask(tmp_path / name / "mask.safetensors") for name in ("few", "stored")]
    assert masks[0].fingerprint == masks[1].fingerprint
    assert found["before"]["loss"] != expected["before"]["loss"]
    assert found["before"]["loss"] == pytest.approx(expected["before"]["loss"], abs=0.3)
    assert found["state_digest"] != expected["state_digest"]
    with pytest.raises(KeyboardInterrupt):
        meerkat.run(few, tmp_path / "stopped", observers=[_StopAfterTwo()])
    resumed = meerkat.resume(tmp_path / "stopped", observers=())
    assert resumed["state_digest"] == found["state_digest"]
    evaluated = meerkat.evaluate(tmp_path / "few")
    assert evaluated.metrics["loss"] == pytest.approx(found["after"]["loss"], abs=1e-6)


def test_what_is_exported_is_the_stored_model(data: dict[str, Any], tmp_path: Path) -> None:
    """Nothing but the masked weights differs from the model that was loaded."""
    recipe = parse_recipe(merged(data, runtime={"weights": "int4"}))
    meerkat.run(recipe, tmp_path / "run", observers=())
    meerkat.export(tmp_path / "run", tmp_path / "merged")
    load = transformers.AutoModelForCausalLM.from_pretrained
    before, after = load(recipe.model.name), load(tmp_path / "merged")
    mask = load_mask(tmp_path / "run" / "mask.safetensors")
    indices = dict(zip(mask.names, mask.indices, strict=True))
    moved = 0
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        differ = (old != new).flatten().nonzero().flatten()
        assert set(differ.tolist()) <= set(indices.get(name, []))
        moved += len(differ)
    assert moved > mask.size // 2


def test_a_plan_counts_the_bytes_that_are_kept(data: dict[str, Any]) -> None:
    for weights in ("int8", "int4"):
        recipe = parse_recipe(merged(data, runtime={"weights": weights}))
        found = assemble(recipe)
        found.worker()
        parameters = list(found.loaded.model.parameters())
        assert any(isinstance(parameter, QuantisedWeight) for parameter in parameters)
        held = sum(
            p.held_bytes - p.moving.nbytes - (0 if p.places is None else p.places.nbytes)
            if isinstance(p, QuantisedWeight)
            else p.nbytes
            for p in parameters
        )
        assert plan_run(recipe).memory.weights == held


def test_clients_of_one_run_keep_weights_in_bits_of_their_own(
    data: dict[str, Any], tmp_path: Path
) -> None:
    """Nobody refuses anybody: all have the same θ, and the one that rounds nothing reports what it
    would report among its like."""
    recipe = parse_recipe(merged(data, runtime={"tokens_together": 0}))
    local = local_run(recipe, tmp_path / "local")
    mask = load_server_mask(tmp_path / "local" / "mask.safetensors")
    nodes = [NodeConfig(0), NodeConfig(1, weights="int8"), NodeConfig(2, weights="int4")]
    found = RemoteRun(recipe, tmp_path / "mixed", mask, nodes).run()
    assert found["state_digest"] != local["state_digest"]
    assert meerkat.replay(tmp_path / "mixed").digest == found["state_digest"]
    scalars = []
    for out in ("local", "mixed"):
        with closing(Journal.open(tmp_path / out / "journal.sqlite")) as journal:
            first = next(iter(journal.records()))[0]
            assert len(first.reports) == 3
            scalars.append([report.scalars for report in first.reports])
    assert [ours == theirs for ours, theirs in zip(*scalars, strict=True)] == [True, False, False]


def test_a_process_has_the_next_run_with_another_mask(data: dict[str, Any], tmp_path: Path) -> None:
    """The model of the first run is quantised around its mask, so the second loads it again."""
    recipe = parse_recipe(merged(data, runtime={"weights": "int8"}))
    other = parse_recipe(merged(data, mask={"kind": "magnitude"}))
    masks = []
    for name, calibrated in (("one", recipe), ("other", other)):
        meerkat.calibrate(calibrated, out=tmp_path / name)
        masks.append(load_server_mask(tmp_path / name))
    assert masks[0].fingerprint != masks[1].fingerprint
    digests = []
    for number, mask in enumerate([masks[1], masks[0], masks[1]]):
        if not number:
            runtime._leave_all()
            runtime._assemblies.clear()
        digests.append(RemoteRun(recipe, tmp_path / f"run{number}", mask).run()["state_digest"])
    assert digests[0] == digests[2] != digests[1]
