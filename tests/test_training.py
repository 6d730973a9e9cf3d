"""Whole runs in this process: replay, golden digest, the method's options, speed settings."""

from __future__ import annotations

import copy
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import meerkat
from meerkat import directory
from meerkat.descent import digest
from meerkat.engines.local import LocalEngine
from meerkat.errors import DivergedError
from meerkat.journal import Journal, replay
from meerkat.recipe import parse_recipe
from meerkat.rounds import close_round

GOLDEN = "9b5fc56f87a14ddc"


def recipe_with(data: dict[str, Any], **sections: dict[str, Any]) -> meerkat.Recipe:
    merged = copy.deepcopy(data)
    for section, fields in sections.items():
        merged.setdefault(section, {}).update(fields)
    return parse_recipe(merged)


def run(data: dict[str, Any], directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    return meerkat.run(recipe_with(data, **sections), directory)


def test_summary_has_what_it_promises(tiny_recipe_data: dict, tmp_path: Path) -> None:
    summary = run(tiny_recipe_data, tmp_path / "run")
    assert summary["rounds"] == 4
    assert summary["clients"] == 3
    assert summary["local_steps"] == 2
    assert summary["mask_size"] == round(0.02 * summary["eligible_parameters"])
    assert summary["bytes_up_per_client_round"] == 24 + 4 * 2
    # The first plan has no log entries, each later one those of one round.
    assert summary["bytes_down_per_client_round"] == 24 + 24 * 2 * 3 / 4
    assert summary["theta_digest"] == meerkat.replay(tmp_path / "run").digest
    assert 0 <= summary["accuracy_before"] <= 1
    assert summary["seconds"] > 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "journal.sqlite",
        "mask.safetensors",
        "recipe.json",
        "report.html",
        "summary.json",
    }


def test_golden_digest(tiny_recipe_data: dict, tmp_path: Path) -> None:
    """Ten rounds in float32 on one CPU thread, to the last bit of what the server computes.

    The scalars g come from float32 matrix products, whose last bits differ between processors;
    they are rounded to two decimals here, so that the digest pins all arithmetic but theirs.
    """
    original = LocalEngine.run

    def rounded(self: LocalEngine, plans: Any) -> Any:
        outcome = original(self, plans)
        reports = tuple(
            type(report)(**{**vars(report), "scalars": tuple(round(g, 2) for g in report.scalars)})
            for report in outcome.reports
        )
        return type(outcome)(**{**vars(outcome), "reports": reports})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalEngine, "run", rounded)
        summary = run(tiny_recipe_data, tmp_path / "run", federation={"rounds": 10})
    assert summary["theta_digest"][:16] == GOLDEN


OPTIONS: list[dict[str, dict[str, Any]]] = [
    {},
    {"federation": {"local_steps": 1}},
    {"federation": {"clients_per_round": 2}},
    {"federation": {"weighting": "examples"}},
    {"noise": {"kind": "rademacher"}},
    {"noise": {"perturbations": 3}},
    {"noise": {"directions": "per-client", "perturbations": 2}},
    {"optimizer": {"schedule": "linear"}},
    {"optimizer": {"schedule": "cosine", "epsilon": 1e-2}},
    {"mask": {"kind": "magnitude"}},
    {"mask": {"kind": "random"}},
    {"mask": {"kind": "full"}},
    {"mask": {"kind": "union"}},
    {"mask": {"score": "squared_mean", "scope": "tensor"}},
    {"model": {"dtype": "bfloat16"}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replay_equals_live_theta_at_every_round(
    tiny_recipe_data: dict,
    tmp_path: Path,
    options: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live: list[str] = []

    def watched(*arguments: Any) -> Any:
        state, record = close_round(*arguments)
        live.append(digest(state.theta))
        return state, record

    monkeypatch.setattr("meerkat.training.close_round", watched)
    run(tiny_recipe_data, tmp_path / "run", **options)
    assert len(live) == 4
    assert len(set(live)) == 4
    for number, expected in enumerate(live, start=1):
        assert meerkat.replay(tmp_path / "run", number).digest == expected


def test_log_holds_a_scalar_for_each_client_with_directions_of_their_own(
    tiny_recipe_data: dict, tmp_path: Path
) -> None:
    run(tiny_recipe_data, tmp_path / "run", noise={"directions": "per-client"})
    with closing(Journal.open(tmp_path / "run" / "journal.sqlite")) as journal:
        first, _ = next(journal.records())
    assert [(e.step, e.client) for e in first.entries] == [
        (step, client) for step in (0, 1) for client in (0, 1, 2)
    ]


@pytest.mark.parametrize(
    "runtime",
    [
        {"tokens_per_pass": 40},
        {"calibration_passes": 2},
        {"threads": 2},
        pytest.param(
            {"compile": True},
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
        ),
    ],
    ids=str,
)
def test_speed_settings_do_not_change_the_science(
    tiny_recipe_data: dict, tmp_path: Path, runtime: dict[str, Any]
) -> None:
    plain = recipe_with(tiny_recipe_data)
    fast = recipe_with(
        tiny_recipe_data, runtime={**runtime, "cache_dir": str(tmp_path / "own-cache")}
    )
    assert plain.fingerprint == fast.fingerprint
    meerkat.run(plain, tmp_path / "plain")
    meerkat.run(fast, tmp_path / "fast")
    thetas = [meerkat.replay(tmp_path / name).theta for name in ("plain", "fast")]
    start = meerkat.replay(tmp_path / "plain", 0).theta
    moved = np.abs(thetas[0] - start).max()
    assert np.abs(thetas[0] - thetas[1]).max() < 0.01 * moved


def test_training_lowers_the_loss(tiny_recipe_data: dict, tmp_path: Path) -> None:
    summary = run(
        tiny_recipe_data,
        tmp_path / "run",
        federation={"rounds": 60, "local_steps": 1, "partition": {"kind": "iid"}},
        optimizer={"learning_rate": 0.05},
    )
    assert summary["loss_after"] < summary["loss_before"] - 0.02


def test_free_text(tiny_recipe_data: dict, tmp_path: Path) -> None:
    data = copy.deepcopy(tiny_recipe_data)
    del data["task"]["verbalizers"]
    data["task"]["answer"] = "label"
    data["federation"]["partition"] = {"kind": "iid"}
    summary = meerkat.run(parse_recipe(data), tmp_path / "run")
    assert summary["accuracy_after"] is None
    assert summary["loss_after"] != summary["loss_before"]


def test_several_tokens_a_verbalizer(tiny_recipe_data: dict, tmp_path: Path) -> None:
    words = {"neg": "terrible awful story", "pos": "great"}
    data = copy.deepcopy(tiny_recipe_data)
    data["task"]["verbalizers"] = words
    assert meerkat.run(parse_recipe(data), tmp_path / "run")["accuracy_after"] is not None


def test_divergence_stops_the_run_and_keeps_the_journal(
    tiny_recipe_data: dict, tmp_path: Path
) -> None:
    with pytest.raises(DivergedError, match=r"round \d+: .*lower optimizer.learning_rate"):
        run(
            tiny_recipe_data,
            tmp_path / "run",
            federation={"rounds": 30},
            optimizer={"learning_rate": 1e30},
        )
    with closing(directory.open_journal(tmp_path / "run")) as journal:
        assert journal.rounds < 30
        replay(journal)


def test_mask_is_found_again(tiny_recipe_data: dict, tmp_path: Path) -> None:
    recipe = recipe_with(tiny_recipe_data, runtime={"cache_dir": str(tmp_path / "cache")})
    first = meerkat.calibrate(recipe)
    assert first.path is not None
    written = first.path.stat().st_mtime_ns
    again = meerkat.calibrate(recipe)
    assert again.mask.digest == first.mask.digest
    assert first.path.stat().st_mtime_ns == written
    other = meerkat.calibrate(recipe, overrides=["mask.density=0.01"])
    assert other.path != first.path


def test_the_model_is_left_as_it_was(tiny_recipe_data: dict, tmp_path: Path) -> None:
    """Two runs in one process do not see each other."""
    first = run(tiny_recipe_data, tmp_path / "one")
    second = run(tiny_recipe_data, tmp_path / "two")
    assert first["theta_digest"] == second["theta_digest"]
    assert first["accuracy_before"] == second["accuracy_before"]
