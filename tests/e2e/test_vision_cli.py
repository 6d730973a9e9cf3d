"""A run over images through the command line: run, kill, resume, replay, evaluate, report."""

from __future__ import annotations

import json
from pathlib import Path

from commands import invoke, refused, toml_of
from pictures import recipe_of_pictures, write_idx


def test_a_run_over_images_from_recipe_to_report(tmp_path: Path) -> None:
    data = recipe_of_pictures(
        tmp_path,
        federation={"clients": 2, "rounds": 4, "partition": {"kind": "dirichlet", "alpha": 1.0}},
        evaluation={"examples": 12, "every": 2},
    )
    recipe, out = tmp_path / "vision.toml", tmp_path / "run"
    recipe.write_text(toml_of(data), "utf-8")
    assert invoke("calibrate", recipe).exit_code == 0
    assert invoke("run", recipe, "--out", out).exit_code == 0
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert set(summary["after"]) >= {"accuracy", "macro_f1", "loss"}
    assert "zero" in (out / "report.html").read_text("utf-8")
    for round in (1, 4):
        assert invoke("replay", out, "--round", round).exit_code == 0
    again = invoke("resume", out)
    assert again.exit_code == 0, again.output
    evaluated = invoke("evaluate", out)
    assert f"{summary['after']['accuracy']:.3f}"[:4] in evaluated.output
    assert invoke("export", out, "--to", tmp_path / "d.safetensors", "--delta").exit_code == 0


def test_what_is_wrong_with_images_is_one_line(tmp_path: Path) -> None:
    data = recipe_of_pictures(tmp_path)
    recipe = tmp_path / "vision.toml"
    recipe.write_text(toml_of(data), "utf-8")
    refused(invoke("plan", recipe), "task.name = 'custom'", "images")
    refused(
        invoke("run", recipe, "--out", tmp_path / "a", "--set", "task.verbalizers=['zero','one']"),
        "task.verbalizers",
    )
    other = write_idx(tmp_path / "other")
    (other / "t10k-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x03")
    refused(
        invoke("run", recipe, "--out", tmp_path / "b", "--set", f"task.source={other}"),
        "t10k-labels-idx1-ubyte is no IDX file",
    )
