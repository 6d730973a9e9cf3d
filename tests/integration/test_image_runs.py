"""Runs over images: the same promises as over texts, on a tiny network of the real architecture."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import recipe_of_pictures
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

import meerkat
from meerkat.config import parse_recipe
from meerkat.data.clients import write_client_folders
from meerkat.data.sources import load_folder
from meerkat.errors import MeerkatError
from meerkat.journal import Journal
from meerkat.models.image_objective import ImageObjective
from meerkat.models.loading import fingerprint
from meerkat.runs.assembly import Assembly, assemble
from meerkat.tasks.objective import DifferentiableObjective

SUBSPACE = {"dimensions": 4, "texts": 12}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    return recipe_of_pictures(tmp_path)


@pytest.fixture
def assembly(data: dict[str, Any]) -> Assembly:
    return assemble(parse_recipe(data))


def test_losses_are_cross_entropies_of_the_answers_logits(assembly: Assembly) -> None:
    objective, examples = assembly.objective, assembly.test[:7]
    assert isinstance(objective, ImageObjective)
    assert isinstance(objective, DifferentiableObjective)
    pixels = torch.stack([torch.from_numpy(e.pixels.copy()) for e in examples]).expand(
        -1, 3, 16, 16
    )
    labels = torch.tensor([e.label for e in examples])
    with torch.no_grad():
        logits = assembly.loaded.model(pixel_values=pixels / 127.5 - 1).logits[:, [1, 2, 3]]
    expected = cross_entropy(logits, labels, reduction="none").double().numpy()
    assert np.allclose(objective.losses(examples), expected, atol=1e-5)
    alone = np.concatenate([objective.losses([e]) for e in examples])
    assert np.allclose(alone, expected, atol=1e-5)  # statistics of batches are frozen
    found = objective.predict(examples)
    assert found.predicted.tolist() == logits.argmax(1).tolist()
    assert np.allclose(found.losses, expected, atol=1e-5)
    assert found.classes == 3


def test_classes_are_drawn_as_often_as_the_network_says(assembly: Assembly) -> None:
    objective, image = assembly.objective, assembly.test[0]
    assert isinstance(objective, ImageObjective)
    numbers = (np.arange(200) + 0.5) / 200
    with torch.no_grad():
        loss = objective.pretraining_loss(([image] * 200, numbers))
        shares = objective._logits([image])[0].double().softmax(0)
    entropy = -(shares * shares.log()).sum()
    assert abs(float(loss) - float(entropy)) < 0.05


def test_masked_convolutions_move_and_come_back_bit_for_bit(assembly: Assembly) -> None:
    before = fingerprint(assembly.loaded.model)
    buffers = [buffer.clone() for buffer in assembly.loaded.model.buffers()]
    mask, worker = assembly.found_mask.mask, assembly.worker()
    assert {len(shape) for shape in mask.shapes} == {4}
    assert all(name.startswith("_blocks.") for name in mask.names)
    untouched = {
        name: parameter.detach().clone()
        for name, parameter in assembly.loaded.model.named_parameters()
    }
    theta = worker.space.read()
    worker.space.write(theta + np.float32(1))
    assert np.array_equal(worker.space.read(), theta + np.float32(1))
    for name, parameter in assembly.loaded.model.named_parameters():
        moved = torch.nonzero((parameter != untouched[name]).flatten()).flatten().tolist()
        place = mask.names.index(name) if name in mask.names else None
        assert moved == ([] if place is None else mask.indices[place].tolist())
    worker.space.restore()
    assert fingerprint(assembly.loaded.model) == before
    for buffer, kept in zip(assembly.loaded.model.buffers(), buffers, strict=True):
        assert torch.equal(buffer, kept)


@pytest.mark.parametrize("subspace", [None, SUBSPACE])
def test_replay_and_resume_give_the_bits_of_the_run(
    data: dict[str, Any], tmp_path: Path, subspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if subspace is not None:
        data |= {"subspace": subspace, "optimizer": {}}
        del data["federation"]["batch_size"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    meerkat.run(parse_recipe(data), whole, observers=())
    with closing(Journal.open(whole / "journal.sqlite")) as journal:
        digests = [record.state_digest for record, _ in journal.records()]
    assert len(digests) == 4
    for rounds, digest in enumerate(digests, start=1):
        assert meerkat.replay(whole, rounds).digest == digest
    append = Journal.append_round

    def failing(journal: Journal, *arguments: Any, **options: Any) -> None:
        append(journal, *arguments, **options)
        if journal.rounds == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append_round", failing)
        with pytest.raises(KeyboardInterrupt):
            meerkat.run(parse_recipe(data), broken, observers=())
    resumed = meerkat.resume(broken, observers=())
    assert meerkat.replay(broken).digest == digests[-1]
    assert resumed["after"]["accuracy"] == meerkat.evaluate(whole).metrics["accuracy"]


def test_an_exact_gradient_is_had_through_convolutions(
    data: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"subspace": SUBSPACE, "optimizer": {"estimator": "backward"}}
    summary = meerkat.run(parse_recipe(data | changes), tmp_path / "exact", observers=())
    assert summary["after"]["loss"] != summary["before"]["loss"]


@pytest.mark.parametrize("kind", ["task", "union", "magnitude", "random", "full"])
def test_other_masks_are_found(data: dict[str, Any], kind: str) -> None:
    data["mask"] |= {"kind": kind}
    mask = assemble(parse_recipe(data)).found_mask.mask
    assert mask.kind == kind
    assert mask.size >= round(0.1 * mask.eligible)


def test_an_export_is_a_classifier_with_the_weights_of_the_run(
    data: dict[str, Any], tmp_path: Path
) -> None:
    meerkat.run(parse_recipe(data), tmp_path / "run", observers=())
    meerkat.export(tmp_path / "run", tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "import meerkat.models.efficientnet_lite" in card
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    base = AutoModelForImageClassification.from_pretrained(data["model"]["name"])
    assert fingerprint(merged) != fingerprint(base)
    own = meerkat.evaluate(tmp_path / "run")
    again = meerkat.evaluate(tmp_path / "merged", parse_recipe(data))
    assert own.metrics == pytest.approx(again.metrics)


def test_a_clients_folder_holds_what_it_holds_in_a_simulation(
    data: dict[str, Any], assembly: Assembly, tmp_path: Path
) -> None:
    folders = write_client_folders(parse_recipe(data), tmp_path / "clients")
    for folder, part in zip(folders, assembly.parts, strict=True):
        found = load_folder(assembly.task, folder).train
        expected = [assembly.split.train[index] for index in part]
        assert [(str(e.fields["image"]), e.label) for e in found] == [
            (str(e.fields["image"]), e.label) for e in expected
        ]


@pytest.mark.parametrize(
    ("section", "fields", "named"),
    [
        ("mask", {"kind": "lora"}, "mask.kind = 'lora'"),
        ("runtime", {"weights": "int8"}, "runtime.weights = 'int8'"),
        ("runtime", {"compile": True}, "runtime.compile = True"),
        ("subspace", {"corpus": "model"}, "subspace.corpus = 'model'"),
        ("model", {"name": "./nowhere"}, "model.name = './nowhere'"),
        ("model", {"name": "demo:gemma-3-270m"}, "demo:efficientnet-lite0"),
    ],
)
def test_what_is_for_texts_is_refused(
    data: dict[str, Any], section: str, fields: dict[str, Any], named: str
) -> None:
    data[section] = {**data.get(section, {}), **fields}
    with pytest.raises(MeerkatError, match=named) as raised:
        assemble(parse_recipe(data))
    assert "\n" not in str(raised.value)
    with pytest.raises(MeerkatError):
        meerkat.plan(parse_recipe(data))


def test_a_run_goes_on_only_with_the_same_statistics_of_batches(
    data: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    first = assemble(parse_recipe(data)).loaded
    weights = Path(data["model"]["name"]) / "model.safetensors"
    tensors = load_file(weights)
    tensors["_bn1.running_mean"] += 1
    save_file(tensors, weights, {"format": "pt"})
    second = assemble(parse_recipe(data)).loaded
    assert second.fingerprint == first.fingerprint
    assert second.configuration != first.configuration
