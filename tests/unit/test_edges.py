"""Odd input that used to end in a traceback, a wrong value, or too much memory."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from builders import make_recipe, tiny_model
from typer.testing import CliRunner

from meerkat import api
from meerkat.cli import app
from meerkat.config import Selection, load_recipe, parse_recipe
from meerkat.data.encoding import Encoded
from meerkat.data.packing import packs
from meerkat.data.sources import load_folder
from meerkat.errors import DataError, RecipeError
from meerkat.federation.selection import decide_by_paths
from meerkat.models import objective
from meerkat.models.objective import TextObjective
from meerkat.node.config import NodeConfig
from meerkat.node.session import public_message
from meerkat.tasks import Task, resolve_task
from meerkat.zo import directions
from meerkat.zo.directions import DirectionKey, PerturbationStream

BASE = {"model": {"name": "m"}, "task": {"name": "sst2"}, "federation": {"clients": 2, "rounds": 1}}


def test_a_json_recipe_that_is_a_list(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text("[1, 2]")
    with pytest.raises(RecipeError, match="holds a list, not sections"):
        load_recipe(path)


@pytest.mark.parametrize("date", ["2024-01-01", "07:30:00", "2024-01-01T07:30:00Z"])
def test_a_date_is_a_text(date: str) -> None:
    assert parse_recipe(BASE, [f"model.name={date}"]).model.name == date


def test_a_blank_after_the_equals_sign_is_no_part_of_the_value() -> None:
    assert parse_recipe(BASE, ["model.name = gpt2 "]).model.name == "gpt2"


def custom_task() -> Task:
    section = {"name": "custom", "source": "x.csv", "prompt": "{text}"}
    section |= {"verbalizers": {"pos": "good", "neg": "bad"}}
    return resolve_task(parse_recipe({**BASE, "task": section}).task)


@pytest.mark.parametrize("row", ["good,pos,3", "good,pos,"])
def test_a_row_with_more_values_than_columns_is_refused(tmp_path: Path, row: str) -> None:
    (tmp_path / "train.csv").write_text(f"text,label\nfine,pos\n{row}\n")
    with pytest.raises(DataError, match="line 3 has 3 values for 2 columns"):
        load_folder(custom_task(), tmp_path)


def test_a_document_of_any_length_is_read_from_a_table(tmp_path: Path) -> None:
    """Python's own reader of tables stops at 131,072 characters unless it is told otherwise."""
    (tmp_path / "train.csv").write_text("text,label\n" + "word " * 60_000 + ",pos\nshort,neg\n")
    first, second = load_folder(custom_task(), tmp_path).train
    assert (len(first.fields["text"].strip()), second.fields["text"]) == (299_999, "short")
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize("prompt", ["{text:>400000000}", "{text!r}", "{text:{width}}"])
def test_a_prompt_has_no_format_specification(prompt: str) -> None:
    section = make_recipe(task={"prompt": prompt}).task
    with pytest.raises(DataError, match="without format specification or conversion"):
        resolve_task(section)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(api, "run", fail)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(BASE))
    result = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert result.stderr.startswith("meerkat: out of memory; lower federation.batch_size")
    assert result.stderr.count("\n") == 1


def test_other_runtime_errors_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(api, "report", fail)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(result.exception, RuntimeError)


def paths(loud: int, quiet: int, level: float) -> dict[int, np.ndarray]:
    draw = np.random.default_rng(3)
    found = {}
    for client in range(loud + quiet):
        scale = np.full(100, 10.0)
        if client >= loud:
            scale = np.geomspace(10.0, level, 100)
        found[client] = np.abs(draw.normal(size=100)) * scale
    return found


def test_the_threshold_of_quiet_is_fitted_to_the_sigma_that_is_given() -> None:
    """With σ = 0.4 an extreme client is quiet half of the time, not almost always."""
    signals = paths(6, 2, 0.3)
    for sigma in ("auto", 0.4):
        chosen = Selection(kind="gradip", sigma=sigma)
        assert decide_by_paths(chosen, 10, 0, "calibration", signals).flagged == (6, 7)


def free_text(count: int) -> list[Encoded]:
    return [Encoded((3, 4, 5 + i), ((6, 7, 8, 9),), 0) for i in range(count)]


def test_free_text_losses_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = free_text(9)
    whole = TextObjective(tiny_model("llama"), 10_000).losses(examples)
    monkeypatch.setattr(objective, "_LOGITS_PER_PASS", 320 * 8)  # two answers of four tokens
    bounded = TextObjective(tiny_model("llama"), 10_000)
    rows = []
    original = bounded._logits
    monkeypatch.setattr(
        bounded, "_logits", lambda *of: rows.append(len(of[0].scored)) or original(*of)
    )
    np.testing.assert_allclose(bounded.losses(examples), whole, rtol=1e-5)
    assert rows == [8, 8, 8, 8, 4]


def test_an_example_over_the_budget_has_a_pack_of_its_own() -> None:
    assert [pack.examples for pack in packs(free_text(3), 10_000, 1)] == [1, 1, 1]
    assert [pack.examples for pack in packs(free_text(3), 10_000)] == [3]


def test_the_newest_direction_is_kept_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "_KEPT_BYTES", 100)
    drawn = []
    original = directions.draw
    monkeypatch.setattr(directions, "draw", lambda *a: drawn.append(a) or original(*a))
    stream = PerturbationStream(5, 1000)
    first = stream.z(DirectionKey(900, 1))
    assert stream.z(DirectionKey(900, 1)) is first
    assert len(drawn) == 1


# What a server may name at a node


def test_a_node_allows_the_demo_alone_unless_its_operator_says_more() -> None:
    def ask(node: NodeConfig, **task: str) -> None:
        data = {**BASE, "model": {"name": "other/model"}, "task": {"name": "sst2", **task}}
        node.recipe(json.dumps(data))

    strict = NodeConfig.of({"partition-id": 0})
    with pytest.raises(RecipeError, match=r"model.name = 'other/model' is not .*allow-models"):
        ask(strict)
    ask(NodeConfig.of({"partition-id": 0, "model": "mine"}))
    some = NodeConfig.of({"partition-id": 0, "allow-models": "a, other/*"})
    ask(some)
    with pytest.raises(RecipeError, match="not allowed"):
        NodeConfig.of({"partition-id": 0, "allow-models": "other/*"}).recipe(
            json.dumps({**BASE, "model": {"name": "other/../home"}, "task": {"name": "sst2"}})
        )
    with pytest.raises(RecipeError, match=r"task.source = '/etc/passwd.csv' is not.*allow-sources"):
        ask(some, source="/etc/passwd.csv")
    with pytest.raises(RecipeError, match=r"task.max_length = 256 is more than .*most-tokens = 99"):
        ask(NodeConfig.of({"partition-id": 0, "model": "mine", "most-tokens": 99}))
    ask(NodeConfig.of({"partition-id": 0}, trusted=True), source="/anything.csv")


def test_sizes_that_a_server_asks_for_are_bounded() -> None:
    node = NodeConfig(0, model="mine", most_tokens=512)
    large = {**BASE, "federation": {**BASE["federation"], "batch_size": 10**9}}
    with pytest.raises(RecipeError, match=r"federation.batch_size = 1000000000 is more than .*512"):
        node.recipe(json.dumps(large))
    runtime = {
        "threads": 10**6,
        "tokens_per_pass": 10**9,
        "prefix_cache": 10**9,
        "prefix_disk": 10**9,
    }
    found = node.recipe(json.dumps({**BASE, "runtime": runtime})).runtime
    assert found.threads <= (os.cpu_count() or 1)
    assert found.tokens_per_pass == 512
    assert (found.prefix_cache, found.prefix_disk) == (256, 0)


def test_the_demo_needs_no_permission() -> None:
    data = {**BASE, "model": {"name": "demo:gemma-3-270m"}, "task": {"name": "rotten_tomatoes"}}
    recipe = NodeConfig.of({"partition-id": 0}).recipe(json.dumps(data))
    assert recipe.runtime.tokens_per_pass == 16384


def test_a_server_does_not_learn_which_files_exist() -> None:
    from meerkat.errors import MaskError, ModelError

    for error in (
        ModelError("model.name = '/home/a/secret': no such folder"),
        RecipeError("/home/a/secret"),
        DataError("row 3: a patient's name"),
        MaskError("mask /home/a/secret/mask.safetensors is damaged"),
    ):
        assert "secret" not in public_message(error)
        assert "patient" not in public_message(error)
