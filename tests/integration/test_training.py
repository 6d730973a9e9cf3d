"""Whole runs in this process: replay, the method's options, speed settings, divergence."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import merged
from commands import invoke, toml_of

import meerkat
from meerkat.config import Recipe, parse_recipe
from meerkat.errors import DivergedError
from meerkat.federation.rounds import close_round
from meerkat.journal import Journal, replay
from meerkat.runs import directory
from meerkat.tasks.metrics import METRICS, Sums
from meerkat.tasks.objective import Predictions

ROOT = Path(__file__).parents[2]


def recipe_with(data: dict[str, Any], **sections: Any) -> Recipe:
    return parse_recipe(merged(data, **sections))


def run(data: dict[str, Any], out: Path, **sections: Any) -> dict[str, Any]:
    """A run that draws no report."""
    return meerkat.run(recipe_with(data, **sections), out, observers=())


def test_summary_has_what_it_promises(tiny_recipe_data: dict, tmp_path: Path) -> None:
    summary = meerkat.run(parse_recipe(tiny_recipe_data), tmp_path / "run")
    assert summary["rounds"] == 4
    assert summary["clients"] == 3
    assert summary["local_steps"] == 2
    assert summary["mask_size"] == round(0.02 * summary["eligible_parameters"])
    assert summary["bytes_up_per_client_round"] == 24 + 4 * 2
    # The first plan has no log entries, each later one those of one round.
    assert summary["bytes_down_per_client_round"] == 24 + 24 * 2 * 3 / 4
    assert summary["state_digest"] == meerkat.replay(tmp_path / "run").digest
    assert summary["before"].keys() == summary["after"].keys() == {"loss", "accuracy", "macro_f1"}
    assert 0 <= summary["before"]["accuracy"] <= 1
    assert summary["seconds"] > 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "journal.sqlite",
        "mask.safetensors",
        "recipe.json",
        "report.html",
        "summary.json",
    }


def test_the_readmes_python_runs(
    tiny_recipe_data: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the tiny recipe in the demo's place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/demo.toml").write_text(toml_of(tiny_recipe_data))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    exec(compile("".join(blocks), "README.md", "exec"), {})
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    before, after = (summary[moment]["accuracy"] for moment in ("before", "after"))
    assert capsys.readouterr().out == f"{before} → {after}\n"
    assert (tmp_path / "demo.delta").is_file()


class ErrorRate:
    """A metric of a user's own."""

    title, percent, lower_is_better, of_classes = "share of misses", True, True, True

    def sums(self, found: Predictions) -> Sums:
        return np.array([np.count_nonzero(found.labels != found.predicted)], np.float64)

    def value(self, sums: Sums, examples: int) -> float:
        return float(sums[0]) / examples

    def is_possible(self, sums: Sums, examples: int, classes: int) -> bool:
        return len(sums) == 1 and 0 <= sums[0] <= examples


def test_a_metric_that_is_registered_reaches_all_that_shows_metrics(
    tiny_recipe_data: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "error_rate", ErrorRate())
    names = ["error_rate", "accuracy"]
    recipe, out = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(toml_of(merged(tiny_recipe_data, evaluation={"metrics": names})))
    printed = invoke("run", recipe, "--out", out)
    assert printed.exit_code == 0, printed.output

    with closing(directory.open_journal(out)) as journal:
        first, last = journal.evaluations()
    for found in (first, last):
        assert list(found.metrics) == ["loss", *names]
        assert found.metrics["error_rate"] == pytest.approx(1 - found.metrics["accuracy"])
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["before"], summary["after"]) == (first.metrics, last.metrics)

    before, after = first.metrics["error_rate"], last.metrics["error_rate"]
    assert f"share of misses {before:.3f}" in printed.stderr  # beside the bar
    assert re.search(rf"share of misses +{before:.3f} → {after:.3f}", printed.stdout)
    page = (out / "report.html").read_text()
    assert "Held-out share of misses" in page
    assert f"{100 * before:.1f} → {100 * after:.1f} %" in page

    evaluated = json.loads(invoke("evaluate", out, "--json").stdout)
    assert evaluated["error_rate"] == pytest.approx(after, abs=1.01 / 20)
    changed = invoke("evaluate", out, "--json", "--set", 'evaluation.metrics=["macro_f1"]')
    assert list(json.loads(changed.stdout)) == ["loss", "macro_f1", "examples", "split"]


OPTIONS: list[dict[str, dict[str, Any]]] = [
    {},
    {"federation": {"local_steps": 1}},
    {"federation": {"clients_per_round": 2}},
    {"federation": {"weighting": "examples"}},
    {"noise": {"kind": "rademacher"}},
    {"noise": {"kind": "tabulated"}},
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
def test_replay_equals_the_live_state_at_every_round(
    tiny_recipe_data: dict,
    tmp_path: Path,
    options: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live: list[str] = []

    def watched(*arguments: Any) -> Any:
        state, record = close_round(*arguments)
        live.append(state.model.digest)
        return state, record

    monkeypatch.setattr("meerkat.runs.driver.close_round", watched)
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
    assert [(e.key.step, e.key.client) for u in first.updates for e in u.entries] == [
        (step, client) for step in (0, 1) for client in (0, 1, 2)
    ]


@pytest.mark.parametrize(
    "runtime",
    [
        {"tokens_per_pass": 40},
        {"mask_passes": 2},
        pytest.param({"threads": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"compile": True},
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
            ],
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
    meerkat.run(plain, tmp_path / "plain", observers=())
    meerkat.run(fast, tmp_path / "fast", observers=())
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
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.02


def test_free_text(tiny_recipe_data: dict, tmp_path: Path) -> None:
    summary = run(
        tiny_recipe_data,
        tmp_path / "run",
        task={"verbalizers": None, "answer": "label"},
        federation={"partition": {"kind": "iid"}},
    )
    assert summary["before"].keys() == summary["after"].keys() == {"loss"}
    assert summary["after"]["loss"] != summary["before"]["loss"]


def test_several_tokens_a_verbalizer(tiny_recipe_data: dict, tmp_path: Path) -> None:
    words = {"neg": "terrible awful story", "pos": "great"}
    summary = run(tiny_recipe_data, tmp_path / "run", task={"verbalizers": words})
    assert summary["after"].keys() == {"loss", "accuracy", "macro_f1"}


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
    runs = [tmp_path / "one", tmp_path / "two"]
    first, second = (run(tiny_recipe_data, out) for out in runs)
    headers, starts, ends = [], [], []
    for out in runs:
        with closing(directory.open_journal(out)) as journal:
            headers.append(journal.header)
            starts.append(journal.theta0)
            ends.append(replay(journal).theta)
    assert headers[0] == headers[1]  # with the fingerprint of the model
    assert np.array_equal(*starts)
    assert first["before"]["loss"] == pytest.approx(second["before"]["loss"])
    assert np.abs(ends[0] - ends[1]).max() < 0.01 * np.abs(ends[0] - starts[0]).max()
