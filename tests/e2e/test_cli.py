"""The commands as a user types them: whole runs, kills, bad input."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from builders import STOPS_ALL, merged
from commands import invoke, meerkat_process, refused, toml_of

import meerkat
from meerkat.journal import Journal
from meerkat.spaces.mask_file import load_mask
from meerkat.zo.directions import DirectionKey


@pytest.fixture
def recipe_file(tiny_recipe_data: dict, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(toml_of(tiny_recipe_data))
    return path


def test_help_of_every_command() -> None:
    commands = ["calibrate", "run", "resume", "replay", "evaluate", "export", "gradip", "report"]
    commands += ["bench", "split"]
    overview = invoke("--help").output
    for command in commands:
        assert command in overview
        text = invoke(command, "--help")
        assert text.exit_code == 0
        assert "Usage" in text.output


@pytest.mark.slow
def test_a_whole_run_in_processes_of_its_own(recipe_file: Path, tmp_path: Path) -> None:
    """run, replay --digest, evaluate, export, report, resume; then plain transformers."""
    out = tmp_path / "run"
    process = meerkat_process("run", recipe_file, "--out", out)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "Fine-tuning: 12 of 12" in printed
    summary = json.loads((out / "summary.json").read_text())

    process = meerkat_process("replay", out, "--digest")
    assert process.communicate(timeout=300)[0].strip() == summary["state_digest"]

    evaluated = json.loads(invoke("evaluate", out, "--json").stdout)
    assert evaluated["examples"] == summary["evaluated_examples"] == 20
    assert evaluated["loss"] == pytest.approx(summary["after"]["loss"], abs=1e-6)
    # The last bits of a loss may differ between processes, so one example may tip over.
    assert evaluated["accuracy"] == pytest.approx(summary["after"]["accuracy"], abs=1.01 / 20)
    merged, delta = tmp_path / "merged", tmp_path / "run.delta"
    assert invoke("export", out, "--to", merged).exit_code == 0
    assert invoke("export", out, "--to", delta, "--delta").exit_code == 0
    again = json.loads(invoke("evaluate", merged, "--recipe", recipe_file, "--json").stdout)
    assert again["accuracy"] == pytest.approx(evaluated["accuracy"], abs=1.01 / 20)
    assert again["loss"] == pytest.approx(evaluated["loss"], abs=1e-6)

    loaded = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    name = meerkat.load_recipe(recipe_file).model.name
    base = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    meerkat.apply_delta(base, delta)
    for ours, theirs in zip(loaded.parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    assert invoke("report", out).exit_code == 0
    assert "tiny" in (out / "report.html").read_text()
    before = (out / "summary.json").read_text()
    assert invoke("resume", out).exit_code == 0
    assert (out / "summary.json").read_text() == before


def test_a_run_that_stops_clients_early(tiny_recipe_data: dict, tmp_path: Path) -> None:
    """run, gradip in all its forms, report, resume, as a user would."""
    path, out, table = tmp_path / "vp.toml", tmp_path / "run", tmp_path / "paths.csv"
    path.write_text(toml_of({**tiny_recipe_data, "selection": STOPS_ALL}))
    printed = invoke("run", path, "--out", out)
    assert printed.exit_code == 0, printed.output
    assert "Calibrating the clients: 3 of 3" in printed.stderr
    assert "0, 1, 2" in printed.stdout

    summary = json.loads((out / "summary.json").read_text())
    assert summary["stopped_early"] == [0, 1, 2]
    assert summary["calibrated_clients"] == 3
    assert summary["calibration_forward_passes"] == 3 * 8 * 2
    assert summary["calibration_bytes_up"] == 3 * (24 + 4 * 8)
    assert summary["calibration_bytes_down"] == 3 * 24
    assert summary["bytes_up_per_client_round"] == 24 + 4  # one step, where two were planned

    selection = json.loads((out / "selection.json").read_text())
    assert selection["flagged"] == [0, 1, 2]
    thresholds = {"later": 0.0, "quiet": 0.0, "sigma": 1e9, "release": None}
    assert selection["decisions"][0]["thresholds"] == thresholds
    counts = meerkat_counts(out)
    for client in selection["clients"]:
        assert client["flagged"]
        assert client["steps"] == 1
        assert client["rho_later"] > 0
        assert client["rho_quiet"] == 1
        assert client["margin"] > 0
        assert list(client["labels"].values()) == counts[client["client"]]

    shown = invoke("gradip", out, "--to", table, "--client", 1)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("stopped, T_k = 1") == 3
    rows = table.read_text().splitlines()
    assert rows[0] == "client,round,step,gradip,norm,cosine"
    assert [row.split(",")[:3] for row in rows[1:]] == [
        *(["1", "calibration", str(step)] for step in range(8)),
        *(["1", str(round), "0"] for round in range(4)),
    ]
    refused(invoke("gradip", out, "--to", table), "exists")
    found = json.loads(invoke("gradip", out, "--json").stdout)
    assert found["calibration"] is True
    assert [entry["steps"] for entry in found["paths"]] == [8, 8, 8]

    before = (out / "summary.json").read_text()
    (out / "selection.json").unlink()
    assert invoke("resume", out).exit_code == 0
    assert (out / "summary.json").read_text() == before
    assert json.loads((out / "selection.json").read_text()) == selection


def meerkat_counts(out: Path) -> list[list[int]]:
    with closing(Journal.open(out / "journal.sqlite")) as journal:
        return journal.header.label_counts


def test_gradip_of_a_run_without_selection(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke("run", recipe_file, "--out", out).exit_code == 0
    assert not (out / "selection.json").exists()
    found = json.loads(invoke("gradip", out, "--json").stdout)
    assert found["calibration"] is False
    assert found["decision"] is None
    assert [path["steps"] for path in found["paths"]] == [8, 8, 8]

    # The figures are those of p, z and g, worked out here one by one.
    with closing(Journal.open(out / "journal.sqlite")) as journal:
        header, stream = journal.header, journal.header.algorithm.stream
        p = load_mask(out / "mask.safetensors", header.model).gradient
        assert p is not None
        products: dict[int, list[float]] = {0: [], 1: [], 2: []}
        for record, _ in journal.records():
            for report in record.reports:
                for step, scalar in enumerate(report.scalars):
                    z = stream.z(DirectionKey(record.round, step)).astype(float)
                    products[report.client].append(scalar * float(p.astype(float) @ z))
    for path in found["paths"]:
        mean = np.abs(products[path["client"]]).mean()
        assert path["first"] == pytest.approx(mean, rel=1e-5)
        assert path["later"] == pytest.approx(mean, rel=1e-5)


def test_gradip_needs_a_gradient(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke("run", recipe_file, "--out", out, "--set", "mask.kind=random").exit_code == 0
    refused(invoke("gradip", out), "random mask", "mask.kind = 'sensitivity'")
    refused(invoke("gradip", tmp_path / "nowhere"), "no such run")


def test_calibrate_says_where_the_sensitivity_is(recipe_file: Path, tmp_path: Path) -> None:
    mask = tmp_path / "mask.safetensors"
    for _ in range(2):  # the second time it is found in the cache
        result = invoke("calibrate", recipe_file, "--out", mask)
        assert result.exit_code == 0, result.output
        assert "369 of 18,432 eligible parameters" in result.output
        assert "of the summed score" in result.output
        assert "model.layers." in result.output
    used = invoke("run", recipe_file, "--out", tmp_path / "run", "--set", f"mask.file={mask}")
    assert used.exit_code == 0, used.output


def test_set_reaches_the_recipe(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ["--set", "federation.rounds=2", "--set", "noise.kind=rademacher"]
    assert invoke("run", recipe_file, "--out", out, *changes).exit_code == 0
    assert json.loads((out / "summary.json").read_text())["rounds"] == 2
    assert json.loads((out / "recipe.json").read_text())["noise"]["kind"] == "rademacher"


KILLED = """
import os, random, signal, sys, threading
import meerkat.api, meerkat.runs.local_run
from meerkat.cli import app
from meerkat.models.objective import TextObjective

*command, out, seed = sys.argv[1:]
moments = random.Random(int(seed))


def killed(arguments, calls, delay):
    \"\"\"In a child: SIGKILL up to `delay` seconds after so many losses; 0 is while it loads.\"\"\"
    # No daemon: a child that is done before that waits for its end.
    kill = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
    seen, losses, assemble = 0, TextObjective.losses, meerkat.runs.local_run.assemble

    def counted(*arguments):
        nonlocal seen
        seen += 1
        if seen == calls:
            kill.start()
        return losses(*arguments)

    def assembled(*arguments, **options):
        if not calls:
            kill.start()
        return assemble(*arguments, **options)

    TextObjective.losses, meerkat.runs.local_run.assemble = counted, assembled
    app(arguments)


calls = [0, 0, *(moments.randrange(1, 46) for _ in range(8))]
for number, count in enumerate(calls):
    arguments = ["run", *command, "--out", out] if number == 0 else ["resume", out]
    delay = moments.random() * (0.005 if count else 0.2)
    child = os.fork()
    if not child:
        killed(arguments, count, delay)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (number, status)
print("killed", len(calls))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "aligned", "random"])
def test_ten_kills_and_the_same_result(
    tiny_recipe_data: dict, sentences_file: Path, tmp_path: Path, kind: str | None
) -> None:
    """Kill -9 at ten random moments, from before the journal exists to the last rounds.

    Over the whole mask, or in a subspace of either kind.
    """
    data = merged(
        tiny_recipe_data,
        federation={"rounds": 60, "clients_per_round": 2},
        evaluation={"every": 7},
    )
    if kind is not None:
        section = {"kind": kind, "dimensions": 4, "texts": 12, "corpus": str(sentences_file)}
        data = merged(data, subspace=section, optimizer={"learning_rate": 0.1, "epsilon": 0.1})
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(toml_of(data))
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert invoke("run", recipe, "--out", whole).exit_code == 0
    # One process that has imported everything, and a fork of it for each life.
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(recipe), str(out), "5"], capture_output=True, text=True
    )
    assert done.stdout.split() == ["killed", "10"], done.stderr
    with closing(Journal.open(out / "journal.sqlite")) as journal:
        assert 5 < journal.rounds < 60
    assert invoke("resume", out).exit_code == 0

    first, second = (json.loads((path / "summary.json").read_text()) for path in (whole, out))
    for summary in (first, second):
        assert summary.pop("seconds") > 0
    for moment in ("before", "after"):
        assert first.pop(moment) == pytest.approx(second.pop(moment))
    assert first == second


KILLED_MAKING = """
import os, signal, sys
from pathlib import Path
import torch
from meerkat.cli import app

moment, *command = sys.argv[1:]
backward, replace, calls = torch.Tensor.backward, Path.replace, 0


def scored(*arguments, **options):
    global calls
    calls += 1
    if moment == "scoring" and calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(*arguments, **options)


def kept(self, target):
    if moment == "keeping" and "subspaces" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)


torch.Tensor.backward, Path.replace = scored, kept
app(command)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["scoring", "keeping"])
def test_a_kill_while_the_subspace_is_made(
    tiny_recipe_data: dict, sentences_file: Path, tmp_path: Path, moment: str
) -> None:
    """Half-way through the texts, or when its file is written and not yet in its place."""
    data = merged(
        tiny_recipe_data,
        mask={"kind": "random"},
        subspace={"dimensions": 4, "texts": 60, "corpus": str(sentences_file)},  # 4 passes
        optimizer={"learning_rate": 0.1, "epsilon": 0.1},
        runtime={"cache_dir": str(tmp_path / "cache")},
    )
    recipe, out = tmp_path / "tiny.toml", tmp_path / "killed"
    recipe.write_text(toml_of(data))
    command = ["run", str(recipe), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", KILLED_MAKING, moment, *command])
    assert done.returncode == -signal.SIGKILL
    assert not list((tmp_path / "cache/subspaces").glob("*.safetensors"))
    assert not (out / "journal.sqlite").exists()
    assert invoke("resume", out).exit_code == 0
    assert invoke("run", recipe, "--out", tmp_path / "whole").exit_code == 0
    found, whole = (meerkat.replay(path).digest for path in (out, tmp_path / "whole"))
    assert found == whole
    assert len(list((tmp_path / "cache/subspaces").glob("*.safetensors"))) == 1


def test_a_directory_with_another_run_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke("run", recipe_file, "--out", out).exit_code == 0
    kept = (out / "journal.sqlite").read_bytes()
    refused(invoke("run", recipe_file, "--out", out), "holds another run", "meerkat resume")
    assert (out / "journal.sqlite").read_bytes() == kept


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("federation.cleints=3", ["federation.cleints", "known key"]),
        ("federtaion.clients=3", ["federtaion", "known key"]),
        ("federation.rounds=many", ["federation.rounds", "'many'"]),
        ("federation.rounds=2.5", ["federation.rounds", "2.5"]),
        ("mask.density=0", ["mask.density", "0", "greater than 0"]),
        ("mask.density=2", ["mask.density", "2", "less than or equal to 1"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate", "-1"]),
        ("optimizer.epsilon=big", ["optimizer.epsilon", "'big'"]),
        ("federation.clients=5000", ["federation.clients = 5000", "too few"]),
        ("federation.clients_per_round=9", ["federation.clients_per_round = 9"]),
        ("federation.partition.kind=odd", ["federation.partition.kind", "'odd'"]),
        ("task.source=none.csv", ["task.source", "none.csv", "no such file"]),
        ("task.name=ssst2", ["task.name", "ssst2", "sst2"]),
        ("task.prompt=It was", ["task.prompt"]),
        ("task.prompt={nothing} It was", ["nothing", "columns: text, label"]),
        ('task.verbalizers={neg="terrible"}', ["task.verbalizers", "at least two"]),
        ('task.verbalizers={neg="bad", other="good"}', ["label 'pos' has no verbalizer"]),
        ('task.verbalizers={neg="great film", pos="great story"}', ["start with the same token"]),
        ("model.name=./nowhere", ["model.name", "./nowhere"]),
        ("mask.corpus=none.txt", ["none.txt"]),
        ("mask.batches=9000", ["mask.corpus", "lower mask.batches"]),
        ("mask.include=['*nothing*']", ["mask.include", "*nothing*"]),
        ("mask.file=none.safetensors", ["none.safetensors", "no such file"]),
        ("runtime.device=tpu", ["runtime.device", "tpu"]),
        ("nonsense", ["--set 'nonsense'"]),
    ],
)
def test_bad_input(recipe_file: Path, tmp_path: Path, change: str, parts: list[str]) -> None:
    out = tmp_path / "run"
    refused(invoke("run", recipe_file, "--out", out, "--set", change), *parts)
    assert not out.exists()


def test_missing_and_malformed_recipes(tmp_path: Path) -> None:
    refused(invoke("run", tmp_path / "none.toml"), "none.toml", "no such file")
    (tmp_path / "bad.toml").write_text("[model\n")
    refused(invoke("run", tmp_path / "bad.toml"), "bad.toml", "not valid TOML")
    (tmp_path / "empty.toml").write_text("")
    refused(invoke("run", tmp_path / "empty.toml"), "model is missing")


def test_empty_text(recipe_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "reviews.csv"
    data.write_text("text,label\na film,pos\n   ,neg\n")
    refused(
        invoke("run", recipe_file, "--set", f"task.source={data}", "--out", tmp_path / "run"),
        "row 2",
        "'text' is empty",
    )


def test_mask_of_another_model(recipe_file: Path, tmp_path: Path) -> None:
    mask = tmp_path / "mask.safetensors"
    assert invoke("calibrate", recipe_file, "--out", mask).exit_code == 0
    result = invoke(
        "run", recipe_file, "--out", tmp_path / "run", "--set", f"mask.file={mask}",
        "--set", "model.dtype=bfloat16",
    )  # fmt: skip
    refused(result, "made for another model", "calibrate for this model")


def test_journal_of_another_recipe(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke("run", recipe_file, "--out", out).exit_code == 0
    edited = json.loads((out / "recipe.json").read_text())
    edited["optimizer"]["learning_rate"] = 0.5
    (out / "recipe.json").write_text(json.dumps(edited))
    for command in ("resume", "replay", "report"):
        refused(invoke(command, out), "not the recipe of this journal", "[network] may change")


def test_runtime_may_change(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke("run", recipe_file, "--out", out).exit_code == 0
    edited = json.loads((out / "recipe.json").read_text())
    edited["runtime"]["tokens_per_pass"] = 50
    (out / "recipe.json").write_text(json.dumps(edited))
    assert invoke("resume", out).exit_code == 0
    assert invoke("evaluate", out).exit_code == 0
    few = invoke("evaluate", out, "--set", "evaluation.examples=5", "--json")
    assert json.loads(few.stdout)["examples"] == 5


def test_damaged_journal(tiny_recipe_data: dict, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(toml_of(merged(tiny_recipe_data, federation={"rounds": 6})))
    out = tmp_path / "run"
    assert invoke("run", recipe, "--out", out).exit_code == 0
    summary = json.loads((out / "summary.json").read_text())
    with sqlite3.connect(out / "journal.sqlite") as connection:
        connection.execute("UPDATE rounds SET updates = zeroblob(48) WHERE round = 4")
    connection.close()
    for command in ("resume", "replay", "report"):
        refused(invoke(command, out), "damaged after 4 good rounds", "--recover")
    result = invoke("resume", out, "--recover")
    assert result.exit_code == 0, result.output
    assert (out / "journal.sqlite.damaged").exists()
    again = json.loads((out / "summary.json").read_text())
    assert again["state_digest"] == summary["state_digest"]


def test_non_finite_loss(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke(
        "run", recipe_file, "--out", out,
        "--set", "optimizer.learning_rate=1e30", "--set", "federation.rounds=30",
    )  # fmt: skip
    refused(result, "round", "lower optimizer.learning_rate")
    assert invoke("replay", out, "--digest").exit_code == 0


def test_directories_without_a_run(tmp_path: Path) -> None:
    for command in ("resume", "replay", "report"):
        refused(invoke(command, tmp_path / "none"), "none")
    refused(invoke("evaluate", tmp_path), "no run directory", "--recipe")
    refused(invoke("export", tmp_path, "--to", tmp_path / "x"), "no run directory", "recipe.json")
    (tmp_path / "recipe.json").write_text("{}")
    refused(invoke("report", tmp_path), "holds no journal", "`meerkat resume")


def test_export_overwrites_nothing(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke("run", recipe_file, "--out", out).exit_code == 0
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    refused(invoke("export", out, "--to", taken), "not an empty folder")
    refused(invoke("export", out, "--to", taken / "file", "--delta"), "exists")


def test_changed_data_are_noticed(recipe_file: Path, tmp_path: Path) -> None:
    source = Path(meerkat.load_recipe(recipe_file).task.source or "")
    own = tmp_path / "own.csv"
    own.write_text(source.read_text())
    out = tmp_path / "run"
    change = f"task.source={own}"
    assert invoke("run", recipe_file, "--out", out, "--set", change).exit_code == 0
    own.write_text("\n".join(own.read_text().splitlines()[:-20]) + "\n")
    with sqlite3.connect(out / "journal.sqlite") as connection:  # as if it had not ended
        connection.execute("DELETE FROM evaluations WHERE round > 0")
    connection.close()
    refused(invoke("resume", out), "another partition")


def test_delta_onto_the_wrong_model(recipe_file: Path, tmp_path: Path) -> None:
    out, delta = tmp_path / "run", tmp_path / "run.delta"
    assert invoke("run", recipe_file, "--out", out).exit_code == 0
    assert invoke("export", out, "--to", delta, "--delta").exit_code == 0
    name = meerkat.load_recipe(recipe_file).model.name
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    with pytest.raises(meerkat.MeerkatError, match="made for another model"):
        meerkat.apply_delta(model, delta)
