"""A model that computes in float32 with bfloat16 weights is the same model, and so is its run."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import merged

import meerkat
from meerkat.config import parse_recipe
from meerkat.journal import Journal
from meerkat.models.compute import computes_in_float32
from meerkat.models.loading import fingerprint
from meerkat.runs.assembly import Assembly, assemble

CPU = torch.device("cpu")


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any]) -> dict[str, Any]:
    return merged(
        tiny_recipe_data, model={"dtype": "bfloat16"}, mask={"kind": "random", "density": 0.05}
    )


def assembled(data: dict[str, Any], compute: str) -> Assembly:
    return assemble(parse_recipe(merged(data, runtime={"compute": compute})))


def test_it_is_the_same_model(data: dict[str, Any]) -> None:
    stored, wide = assembled(data, "stored"), assembled(data, "float32")
    assert stored.recipe.fingerprint == wide.recipe.fingerprint
    for name in ("fingerprint", "configuration", "probe", "parameters"):
        assert getattr(stored.loaded, name) == getattr(wide.loaded, name)
    assert stored.found_mask.mask.fingerprint == wide.found_mask.mask.fingerprint
    kinds = [{p.dtype for p in a.loaded.model.parameters()} for a in (stored, wide)]
    assert kinds == [{torch.bfloat16}, {torch.float32}]
    examples = stored.test[:8]
    ours, theirs = stored.objective.losses(examples), wide.objective.losses(examples)
    assert np.allclose(ours, theirs, atol=0.05)
    assert not np.array_equal(ours, theirs)


def test_what_moves_is_rounded_to_the_stored_type(data: dict[str, Any]) -> None:
    """The same θ gives the same weights, and restoring gives those that were loaded."""
    weights = []
    for compute in ("stored", "float32"):
        found = assembled(data, compute)
        before = fingerprint(found.loaded.model)
        space = found.worker().space
        theta = space.read() + np.float32(1e-3) * np.arange(space.size, dtype=np.float32)
        space.write(theta)
        weights.append([p.float().clone() for p in found.loaded.model.parameters()])
        assert fingerprint(found.loaded.model) != before
        space.restore()
        assert fingerprint(found.loaded.model) == before
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_run_goes_on_in_another_type(data: dict[str, Any], tmp_path: Path) -> None:
    """As on another machine: journal, mask and model are the same, the losses are nearly so."""
    ends = {}
    for compute in ("stored", "float32"):
        recipe = parse_recipe(merged(data, runtime={"compute": compute}))
        meerkat.run(recipe, tmp_path / compute, observers=())
        with closing(Journal.open(tmp_path / compute / "journal.sqlite")) as journal:
            ends[compute] = journal.header, [r.reports for r, _ in journal.records()]
    (ours, some), (theirs, others) = ends.values()
    assert (ours.fingerprint, ours.model, ours.space) == (
        theirs.fingerprint,
        theirs.model,
        theirs.space,
    )
    assert some != others
    path = tmp_path / "stored/recipe.json"
    text = path.read_text()
    assert '"compute": "stored"' in text
    path.write_text(text.replace('"compute": "stored"', '"compute": "float32"'))
    found = meerkat.evaluate(tmp_path / "stored")
    assert found.metrics["loss"] > 0


def test_what_is_exported_has_the_stored_type(data: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    recipe = parse_recipe(merged(data, runtime={"compute": "float32"}))
    meerkat.run(recipe, tmp_path / "run", observers=())
    meerkat.export(tmp_path / "run", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    meerkat.export(tmp_path / "run", tmp_path / "delta", delta=True)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=torch.bfloat16)
    meerkat.apply_delta(base, tmp_path / "delta")
    assert fingerprint(base) == fingerprint(model)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"architecture": "x86_64", "avx512_f": False}, True),
        ({"architecture": "x86_64", "avx512_f": True}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_what_auto_means(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], expected: bool
) -> None:
    """float32 where the processor computes in nothing wider than AVX2."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert computes_in_float32("auto", torch.bfloat16, CPU) == expected
    assert not computes_in_float32("auto", torch.bfloat16, torch.device("cuda"))
    assert not computes_in_float32("auto", torch.float32, CPU)
    assert not computes_in_float32("stored", torch.bfloat16, CPU)
    assert computes_in_float32("float32", torch.bfloat16, CPU)
