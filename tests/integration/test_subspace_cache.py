"""A subspace in the user's cache: found without a backward pass, and only where all is the same."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import merged

import meerkat
from meerkat.config import parse_recipe
from meerkat.progress import Progress
from meerkat.spaces.mask_file import load_mask, save_mask

TEXTS = 12
PASSES = 1
"""Backward passes for so many texts, or for one more."""


@pytest.fixture
def data(tiny_recipe_data: dict, sentences_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe with a cache of the test's own; the mask is at random, so it costs no pass."""
    corpus = shutil.copy(sentences_file, tmp_path / "sentences.txt")
    return merged(
        tiny_recipe_data,
        mask={"kind": "random"},
        subspace={"dimensions": 4, "texts": TEXTS, "corpus": str(corpus)},
        optimizer={"learning_rate": 0.1, "epsilon": 0.1},
        runtime={"cache_dir": str(tmp_path / "cache")},
    )


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each backward pass."""
    made: list[int] = []
    backward = torch.Tensor.backward

    def counted(self: torch.Tensor, *arguments: Any, **options: Any) -> None:
        made.append(1)
        backward(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    return made


class _Stages(Progress):
    def __init__(self) -> None:
        self.stages: dict[str, int] = {}
        self.done = 0

    def start(self, stage: str, total: int, done: int = 0) -> None:
        self.stages[stage], self.done = total, done

    def advance(self) -> None:
        self.done += 1


def subspace_digest(data: dict[str, Any], **sections: Any) -> str:
    mask = meerkat.calibrate(parse_recipe(merged(data, **sections))).mask
    assert mask.subspace is not None
    return mask.subspace.digest


def test_a_second_run_makes_no_backward_pass(
    data: dict[str, Any], tmp_path: Path, passes: list[int]
) -> None:
    """Whoever made it: `meerkat calibrate` or a run."""
    progress = _Stages()
    found = meerkat.calibrate(parse_recipe(data), progress=progress)
    assert len(passes) == PASSES
    assert progress.stages["Finding the subspace"] == progress.done == TEXTS
    assert found.path is not None
    assert load_mask(found.path).fingerprint == found.mask.fingerprint
    first = meerkat.run(parse_recipe(data), tmp_path / "a", observers=())
    written = meerkat.calibrate(parse_recipe(data), tmp_path / "mask.safetensors")
    assert len(passes) == PASSES
    shutil.rmtree(tmp_path / "cache")
    second = meerkat.run(parse_recipe(data), tmp_path / "b", observers=())
    assert len(passes) == 2 * PASSES
    assert first["state_digest"] == second["state_digest"]
    for name in ("a", "b"):
        kept = load_mask(tmp_path / name / "mask.safetensors")
        assert kept.fingerprint == found.mask.fingerprint == written.mask.fingerprint
    assert load_mask(tmp_path / "mask.safetensors").fingerprint == found.mask.fingerprint


def test_the_file_in_the_cache_is_a_mask_to_start_from(
    data: dict[str, Any], tmp_path: Path
) -> None:
    found = meerkat.calibrate(parse_recipe(data))
    changes = {"mask": {"file": str(found.path)}}
    again = meerkat.calibrate(parse_recipe(merged(data, **changes)), tmp_path / "out")
    assert again.mask.fingerprint == found.mask.fingerprint
    assert again.mask.initial is not None


@pytest.mark.parametrize(
    "change",
    [
        {"task": {"prompt": "About {text}:"}},
        {"task": {"verbalizers": {"neg": "bad", "pos": "good"}}},
        {"task": {"max_length": 8}},
        {"subspace": {"dimensions": 3}},
        {"subspace": {"damping": 0.1}},
        {"subspace": {"power": 0.25}},
        {"subspace": {"texts": 13}},
        {"subspace": {"seed": 1}},
        {"subspace": {"score": "sampled"}},
        {"mask": {"seed": 5}},
        {"mask": {"density": 0.03}},
        {"model": {"dtype": "bfloat16"}},
    ],
    ids=str,
)
def test_what_its_bits_follow_from_is_its_key(
    data: dict[str, Any], passes: list[int], change: dict[str, Any]
) -> None:
    kept = subspace_digest(data)
    assert subspace_digest(data, **change) != kept
    # Where scores are drawn, those of each of two answers are needed to balance them.
    drawn = 2 if change == {"subspace": {"score": "sampled"}} else 0
    assert len(passes) == 2 * PASSES + drawn
    assert subspace_digest(data) == kept
    assert len(passes) == 2 * PASSES + drawn


def test_another_content_of_the_corpus_is_another_key(
    data: dict[str, Any], passes: list[int]
) -> None:
    kept = subspace_digest(data)
    corpus = Path(data["subspace"]["corpus"])
    corpus.write_text("\n".join(reversed(corpus.read_text().splitlines())))
    assert subspace_digest(data) != kept
    assert len(passes) == 2 * PASSES


def test_where_the_model_computed_other_logits_it_is_made_again(
    data: dict[str, Any], passes: list[int]
) -> None:
    """As another release of transformers may."""
    found = meerkat.calibrate(parse_recipe(data))
    assert found.path is not None
    save_mask(replace(found.mask, probe=tuple(x + 1.0 for x in found.mask.probe)), found.path)
    assert meerkat.calibrate(parse_recipe(data)).mask.fingerprint == found.mask.fingerprint
    assert len(passes) == 2 * PASSES
    meerkat.calibrate(parse_recipe(data))
    assert len(passes) == 2 * PASSES


@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"federation": {"rounds": 2}}, {"optimizer": {"learning_rate": 0.2}}],
    ids=str,
)
def test_what_its_bits_do_not_follow_from_is_not(
    data: dict[str, Any], passes: list[int], change: dict[str, Any]
) -> None:
    kept = subspace_digest(data)
    assert subspace_digest(data, **change) == kept
    assert len(passes) == PASSES


def test_a_random_one_needs_no_cache(
    data: dict[str, Any], tmp_path: Path, passes: list[int]
) -> None:
    found = meerkat.calibrate(parse_recipe(merged(data, subspace={"kind": "random"})))
    assert (found.path, passes) == (None, [])
    assert not (tmp_path / "cache/subspaces").exists()


@pytest.mark.parametrize("kind", ["subspaces", "masks"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_said_and_made_again(
    data: dict[str, Any],
    tmp_path: Path,
    passes: list[int],
    caplog: pytest.LogCaptureFixture,
    kind: str,
    damage: str,
) -> None:
    data = merged(data, mask={"kind": "sensitivity"})
    fingerprint = meerkat.calibrate(parse_recipe(data)).mask.fingerprint
    (file,) = (tmp_path / "cache" / kind).iterdir()
    whole, made, kept = file.read_bytes(), len(passes), load_mask(file).fingerprint
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    file.write_bytes({"cut": whole[:-20], "flipped": flipped, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING, "meerkat"):
        assert meerkat.calibrate(parse_recipe(data)).mask.fingerprint == fingerprint
    (said,) = caplog.messages
    assert str(file) in said
    assert "made again" in said
    assert load_mask(file).fingerprint == kept
    assert len(passes) == made + (PASSES if kind == "subspaces" else made - PASSES)
    caplog.clear()
    assert meerkat.calibrate(parse_recipe(data)).mask.fingerprint == fingerprint
    assert caplog.messages == []
