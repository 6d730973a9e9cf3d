"""Whole runs in a subspace: replay, resume, export, GradIP, and a mask file that carries one."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import merged

import meerkat
from meerkat.config import parse_recipe
from meerkat.errors import MaskError, RecipeError
from meerkat.federation.rounds import RoundRecord
from meerkat.journal import Journal
from meerkat.journal.records import RoundMetrics
from meerkat.runs.directory import journal_path, mask_of
from meerkat.runs.events import RunObserver
from meerkat.spaces.mask_file import load_mask, save_mask

SUBSPACE = {"dimensions": 4, "texts": 12}
RATES = {"learning_rate": 0.1, "epsilon": 0.1}


@pytest.fixture
def data(tiny_recipe_data: dict, sentences_file: Path, tmp_path: Path) -> dict[str, Any]:
    corpus = shutil.copy(sentences_file, tmp_path / "sentences.txt")
    subspace = {**SUBSPACE, "corpus": str(corpus)}
    return merged(tiny_recipe_data, subspace=subspace, optimizer=RATES)


def run(data: dict[str, Any], out: Path, **sections: Any) -> dict[str, Any]:
    """A run that draws no report."""
    return meerkat.run(parse_recipe(merged(data, **sections)), out, observers=())


@pytest.mark.parametrize("score", ["auto", "sampled", "uniform", "mixed"])
def test_a_run_is_replayed_and_made_again(data: dict, tmp_path: Path, score: str) -> None:
    section = {"score": score}
    found = run(data, tmp_path / "a", subspace=section)
    again = run(data, tmp_path / "b", subspace=section)
    replayed = meerkat.replay(tmp_path / "a")
    assert found["state_digest"] == again["state_digest"] == replayed.digest
    assert replayed.theta.shape == (4,)
    assert np.abs(replayed.theta).min() > 0
    assert found["bytes_up_per_client_round"] == 24 + 4 * 2  # as without a subspace


class _StopAfterTwo(RunObserver):
    """Interrupts a run as Ctrl-C does."""

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        if record.round == 1:
            raise KeyboardInterrupt


def test_a_run_goes_on_with_the_subspace_that_it_began_with(data: dict, tmp_path: Path) -> None:
    """Its corpus is gone, so nothing could be made again."""
    whole = run(data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        meerkat.run(parse_recipe(data), tmp_path / "run", observers=[_StopAfterTwo()])
    Path(data["subspace"]["corpus"]).unlink()
    assert meerkat.resume(tmp_path / "run", observers=())["state_digest"] == whole["state_digest"]


def test_the_exported_delta_is_the_sum_of_directions(data: dict, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    run(data, tmp_path / "run")
    with closing(Journal.open(journal_path(tmp_path / "run"))) as journal:
        mask = mask_of(tmp_path / "run", journal)
    w = meerkat.replay(tmp_path / "run").theta
    assert mask.subspace is not None
    assert mask.initial is not None
    expected = mask.initial.copy()
    for weight, row in zip(w, mask.subspace.basis, strict=True):
        expected = expected + row * weight
    assert np.array_equal(mask.weights(w), expected)
    meerkat.export(tmp_path / "run", tmp_path / "delta.safetensors", delta=True)
    held = load_file(tmp_path / "delta.safetensors")
    assert any(
        values.shape == expected.shape and np.array_equal(values, expected)
        for values in held.values()
    )


def test_a_run_is_evaluated_on_other_tasks(data: dict, tmp_path: Path) -> None:
    """Its subspace is for one prompt; the model that came out of it is for any."""
    run(data, tmp_path / "run")
    Path(data["subspace"]["corpus"]).unlink()  # nothing could be made again
    task = {"prompt": "{text} This was", "verbalizers": {"neg": "awful", "pos": "fine"}}
    inside = parse_recipe(merged(data, task=task, subspace={"dimensions": 2}))
    plain = parse_recipe({**merged(data, task=task, optimizer={"epsilon": 1e-3}), "subspace": None})
    found = meerkat.evaluate(tmp_path / "run", recipe=inside)
    assert meerkat.evaluate(tmp_path / "run", recipe=plain).metrics == found.metrics
    meerkat.export(tmp_path / "run", tmp_path / "model")
    exported = meerkat.evaluate(tmp_path / "model", recipe=plain).metrics
    assert exported == pytest.approx(found.metrics, rel=1e-5)


def test_early_stopping_sees_the_projected_gradient(data: dict, tmp_path: Path) -> None:
    """GradIP takes B p, of k numbers."""
    selection = {"kind": "gradip", "calibration_steps": 6}
    run(data, tmp_path / "run", selection=selection)
    mask = load_mask(tmp_path / "run/mask.safetensors")
    assert mask.subspace is not None
    assert mask.gradient is not None
    assert mask.direction_gradient is not None
    exact = mask.subspace.basis.astype(np.float64) @ mask.gradient.astype(np.float64)
    assert np.allclose(mask.direction_gradient, exact, rtol=1e-4, atol=1e-9)
    assert (tmp_path / "run/selection.json").exists()


def test_a_mask_file_carries_its_subspace_to_the_same_recipe_only(
    data: dict, tmp_path: Path
) -> None:
    found = run(data, tmp_path / "run")
    file = str(tmp_path / "run/mask.safetensors")
    again = run(data, tmp_path / "again", mask={"file": file})
    assert again["state_digest"] == found["state_digest"]
    others: list[tuple[dict[str, Any], str]] = [
        ({"subspace": None}, "holds a subspace; add"),
        ({"subspace": {"dimensions": 3}}, "other settings"),
        ({"task": {"prompt": "About {text}:"}}, "for the prompt"),
    ]
    for number, (changes, reason) in enumerate(others):
        with pytest.raises(MaskError, match=reason):
            run(data, tmp_path / f"other{number}", mask={"file": file}, **changes)


def test_a_subspace_is_part_of_the_file_and_of_its_fingerprint(data: dict, tmp_path: Path) -> None:
    run(data, tmp_path / "run", subspace={"kind": "random", "dimensions": 3})
    mask = load_mask(tmp_path / "run/mask.safetensors")
    save_mask(mask, tmp_path / "copy.safetensors")
    copy = load_mask(tmp_path / "copy.safetensors")
    assert copy.fingerprint == mask.fingerprint != mask.digest
    assert copy.dimensions == 3
    content = bytearray((tmp_path / "copy.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "copy.safetensors").write_bytes(content)
    with pytest.raises(MaskError):
        load_mask(tmp_path / "copy.safetensors")


def test_too_many_dimensions_are_refused(data: dict, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"subspace\.dimensions = 40"):
        run(data, tmp_path / "run", subspace={"dimensions": 40, "texts": 12})
