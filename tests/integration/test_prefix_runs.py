"""Runs whose mask begins above the first block: no bit depends on what is kept."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from builders import merged

import meerkat
from meerkat.config import parse_recipe
from meerkat.errors import ModelError
from meerkat.federation.rounds import RoundRecord
from meerkat.journal import Journal
from meerkat.journal.records import RoundMetrics
from meerkat.models.prefix import Prefix
from meerkat.progress import Progress
from meerkat.runs.assembly import assemble
from meerkat.runs.events import RunObserver
from meerkat.runs.local_run import start_run

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"optimizer": {"rule": {"kind": "momentum", "decay": 0.5}}},
    "aligned": {"subspace": {"dimensions": 4, "texts": 12}, "evaluation": {"every": 2}},
    "renewed": {"subspace": {"dimensions": 4, "texts": 12, "renew_every": 2}},
    "exact": {
        "subspace": {"dimensions": 4, "texts": 12},
        "optimizer": {"estimator": "backward", "learning_rate": 0.1},
    },
}


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any], sentences_file: Path) -> dict[str, Any]:
    return merged(tiny_recipe_data, mask={"first_block": 1, "corpus": str(sentences_file)})


class _StopAfterTwo(RunObserver):
    """Interrupts a run as Ctrl-C does."""

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        if record.round == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_bit_of_a_run_depends_on_the_cache(
    data: dict[str, Any], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    compute = Prefix._compute

    def counted(self: Prefix, batch: Any) -> Any:
        computed.append(batch.tokens)
        return compute(self, batch)

    monkeypatch.setattr(Prefix, "_compute", counted)
    ends, counts = [], []
    for name, memory, disk in (("none", 0, 0), ("memory", 256, 0), ("disk", 0, 256)):
        runtime = {"prefix_cache": memory, "prefix_disk": disk}
        recipe = parse_recipe(merged(data, **KINDS[kind], runtime=runtime))
        computed.clear()
        summary = meerkat.run(recipe, tmp_path / name, observers=())
        counts.append(len(computed))
        with closing(Journal.open(tmp_path / name / "journal.sqlite")) as journal:
            records = [(r.reports, m.loss) for r, m in journal.records()]
            ends.append((recipe.fingerprint, summary["state_digest"], summary["after"], records))
    assert ends[0] == ends[1] == ends[2]
    # Its own check; then once for both places of each of 3 × 2 × 4 steps.
    assert counts[0] == 2 + (0 if kind == "exact" else 24)
    assert 2 < counts[1] == counts[2]
    recipe = parse_recipe(merged(data, **KINDS[kind]))
    with pytest.raises(KeyboardInterrupt):
        meerkat.run(recipe, tmp_path / "stopped", observers=[_StopAfterTwo()])
    resumed = meerkat.resume(tmp_path / "stopped", observers=())
    assert resumed["state_digest"] == ends[0][1]


def test_each_batch_is_computed_once(data: dict[str, Any]) -> None:
    found = assemble(parse_recipe(data))
    worker = found.worker()
    prefix = found.objective.prefix
    assert prefix is not None
    batches = [client.batch(step) for client in found.clients() for step in range(2)]
    for batch in batches:
        for _ in range(2):
            worker.objective.losses(batch)
    assert (prefix.kept.computed, prefix.kept.found) == (len(batches), len(batches))
    tokens = sum(pack.tokens for batch in batches for pack in found.objective.packs(batch))
    assert prefix.kept.in_memory == 4 * 32 * tokens


class _Figures(Progress):
    def __init__(self) -> None:
        self.shown: list[str] = []

    def show(self, figures: dict[str, str]) -> None:
        self.shown.extend(value for name, value in figures.items() if name == "first blocks kept")


def test_what_is_kept_is_shown(data: dict[str, Any], tmp_path: Path) -> None:
    """Three clients take two steps in each of four rounds: one of two passes of each is saved."""
    for name, memory, disk in (("memory", 256, 0), ("disk", 0, 256), ("none", 0, 0)):
        progress = _Figures()
        runtime = {"prefix_cache": memory, "prefix_disk": disk, "tokens_together": 0}
        recipe = parse_recipe(merged(data, runtime=runtime))
        start_run(recipe, tmp_path / name, RunObserver(), progress)
        if name == "none":
            assert not progress.shown
            continue
        assert len(progress.shown) == 3 * 4
        first, last = progress.shown[0], progress.shown[-1]
        assert re.search(r"\((\d+) of (\d+) passes saved\)", last)
        assert (" on disk" in last) == (name == "disk")
        saved, asked = (int(n) for n in re.findall(r"(\d+) of (\d+)", last)[0])
        assert saved == 24
        assert asked >= 48
        assert first != last


def test_a_mask_over_all_blocks_has_no_prefix(tiny_recipe_data: dict[str, Any]) -> None:
    found = assemble(parse_recipe(tiny_recipe_data))
    found.worker()
    assert found.objective.prefix is None


def test_a_model_that_has_no_prefix_runs_without(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A speed setting that cannot be had stops nothing, and is said."""
    expected = meerkat.run(parse_recipe(data), tmp_path / "with", observers=())

    def refuse(self: Prefix, name: str) -> None:
        raise ModelError("runtime.prefix_cache does not go with this; set it to 0")

    monkeypatch.setattr(Prefix, "_check", refuse)
    found = meerkat.run(parse_recipe(data), tmp_path / "without", observers=())
    assert found["state_digest"] == expected["state_digest"]
    assert "set it to 0 to be rid of this line" in caplog.text
