"""Masks, subspaces and runs with `runtime.recompute`: the same bits, less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import merged

import meerkat
from meerkat.config import parse_recipe
from meerkat.errors import ModelError
from meerkat.models import recomputing
from meerkat.runs.assembly import assemble

SUBSPACE = {"dimensions": 4, "texts": 12}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "squared mean": {"mask": {"score": "squared_mean"}, "runtime": {"mask_passes": 2}},
    "aligned": {"subspace": SUBSPACE},
    "exact": {"subspace": SUBSPACE, "optimizer": {"estimator": "backward", "learning_rate": 0.1}},
    "outside linear layers": {
        "mask": {"include": ["*"]},
        "subspace": SUBSPACE,
        "optimizer": {"estimator": "backward", "learning_rate": 0.1},
    },
    "above the first block": {"mask": {"first_block": 1}, "subspace": SUBSPACE},
    "few bits": {
        "subspace": SUBSPACE,
        "optimizer": {"estimator": "backward", "learning_rate": 0.1},
        "runtime": {"weights": "int8"},
    },
}


def test_a_model_without_blocks_is_refused(
    tiny_recipe_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = assemble(parse_recipe(merged(tiny_recipe_data, runtime={"recompute": True})))
    monkeypatch.setattr(found.loaded.model, "modules", lambda: iter(()))
    monkeypatch.setattr(found.loaded.model, "named_modules", lambda: iter(()))
    with pytest.raises(ModelError, match=r"runtime.recompute.*set it to false"):
        _ = found.objective


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_depends_on_it(
    tiny_recipe_data: dict[str, Any],
    sentences_file: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    checkpoint = recomputing.checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return checkpoint(*arguments, **options)

    monkeypatch.setattr(recomputing, "checkpoint", counted)
    found = []
    for again in (False, True):
        runtime = {"recompute": again, "cache_dir": str(tmp_path / f"cache{again}")}
        data = merged(tiny_recipe_data, mask={"corpus": str(sentences_file)})
        recipe = parse_recipe(merged(merged(data, **KINDS[kind]), runtime=runtime))
        mask = assemble(recipe).found_mask.mask
        summary = meerkat.run(recipe, tmp_path / f"run{again}", observers=())
        found.append((recipe.fingerprint, mask.fingerprint, summary["state_digest"]))
        assert bool(calls) == again
    assert found[0] == found[1]
