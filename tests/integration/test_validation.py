"""Runs that keep validation examples: what they measure, where they end, which round is best."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from builders import merged
from journals import content
from peers import RemoteRun, evaluations, loaded_once, local_run, new_process, same_evaluations
from safetensors.numpy import load_file
from scripted import CLIENTS, Clock, ScriptedClient, ScriptedRun, sums_of
from scripted import recipe_of as scripted_recipe

import meerkat
from meerkat.config import Recipe, parse_recipe
from meerkat.data.clients import validation_examples, write_client_folders
from meerkat.errors import RunError
from meerkat.flower.serving import largest_client_frame
from meerkat.journal import Journal
from meerkat.journal.records import Evaluated
from meerkat.node.config import NodeConfig
from meerkat.progress import Progress
from meerkat.runs import assembly, driver, remote_run
from meerkat.runs import local_run as local_module
from meerkat.runs.assembly import assemble
from meerkat.runs.best_round import best_evaluation, score_of
from meerkat.runs.evaluation import evaluate_objective
from meerkat.runs.watching import ProgressObserver
from meerkat.spaces.mask_file import Mask
from meerkat.terminal.tables import summary_table
from meerkat.transport.client_frames import Evaluation, Hello
from meerkat.transport.frame import DownFrame, encode
from meerkat.transport.server_frames import EvaluateRequest

NAMES = ["loss", "accuracy", "macro_f1"]
BOTH = [*NAMES, *(f"validation_{name}" for name in NAMES)]
ACCURACIES = {0: 0.25, 1: 0.5, 2: 0.75, 3: 0.5, 4: 0.75, 5: 1.0, 6: 0.25}
"""On validation, by round; with a patience of 2 a run ends after round 4, and is best at 2."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(assembly, "load_model", loaded_once)
    monkeypatch.setenv("MEERKAT_CACHE", str(tmp_path / "cache"))
    yield
    new_process()


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any]) -> dict[str, Any]:
    """20 rows are held out: 12 to test on, 8 to choose a round by."""
    evaluation = {"examples": 12, "validation": 8, "every": 1}
    return merged(tiny_recipe_data, federation={"rounds": 6}, evaluation=evaluation)


@pytest.fixture
def patient(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Of a run whose validation accuracies are `ACCURACIES`."""

    def scripted(*arguments: Any, **options: Any) -> Evaluated:
        found = evaluate_objective(*arguments, **options)
        found.metrics["validation_accuracy"] = ACCURACIES[found.round]
        found.metrics["validation_loss"] = 0.5
        return found

    monkeypatch.setattr(local_module, "evaluate_objective", scripted)
    return parse_recipe(merged(data, evaluation={"patience": 2}))


@pytest.fixture
def mask(data: dict[str, Any], tmp_path: Path) -> Mask:
    meerkat.calibrate(parse_recipe(data), out=tmp_path / "mask")
    return remote_run.load_server_mask(tmp_path / "mask")


def texts(examples: Any) -> set[str]:
    return {str(example.fields["text"]) for example in examples}


# What is measured


def test_each_evaluation_measures_both(data: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(data)
    summary = local_run(recipe, tmp_path / "run")
    found = evaluations(tmp_path / "run")
    assert [e.round for e in found] == list(range(7))
    assert all((list(e.metrics), e.examples) == (BOTH, 12) for e in found)
    assert summary["before"] == found[0].metrics
    assert summary["after"] == found[-1].metrics
    best = best_evaluation(found)
    assert best is not None
    assert (summary["best_round"], summary["best"]) == (best.round, best.metrics)
    assert (summary["rounds"], summary["planned_rounds"]) == (6, 6)
    assert meerkat.plan(recipe).passes.evaluating == 7 * (12 + 8)
    # Each is over its own rows, and no client trains on any of them.
    assembled = assemble(recipe)
    chosen = validation_examples(recipe, assembled.split)
    tested = assembled.split.test[:12]
    assert (len(texts(tested)), len(texts(chosen))) == (12, 8)
    assert not texts(chosen) & texts(tested)
    assert not (texts(chosen) | texts(tested)) & texts(assembled.split.train)
    for split, prefix, count in (("test", "", 12), ("validation", "validation_", 8)):
        again = meerkat.evaluate(tmp_path / "run", split=split)
        assert again.examples == count
        assert list(again.metrics) == NAMES
        for name in NAMES:
            expected = found[-1].metrics[prefix + name]
            assert again.metrics[name] == pytest.approx(expected, abs=1e-6)
    assert meerkat.evaluate(tmp_path / "run", examples=500).examples == 12


def test_what_a_run_does_is_the_same_without_them(data: dict[str, Any], tmp_path: Path) -> None:
    local_run(parse_recipe(data), tmp_path / "kept")
    plain = parse_recipe(merged(data, evaluation={"validation": 0}))
    summary = local_run(plain, tmp_path / "plain")
    assert content(tmp_path / "kept") == content(tmp_path / "plain")
    assert summary["best_round"] is None
    for ours, theirs in zip(
        *map(evaluations, (tmp_path / "kept", tmp_path / "plain")), strict=True
    ):
        assert {name: ours.metrics[name] for name in NAMES} == theirs.metrics


# Where a run ends


class Shown(Progress):
    """The last stage, and the figures beside it."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.figures: dict[str, str] = {}

    def start(self, stage: str, total: int, done: int = 0) -> None:
        self.stages.append((stage, total, done))

    def show(self, figures: dict[str, str]) -> None:
        self.figures |= figures


def test_a_run_ends_by_its_patience(patient: Recipe, tmp_path: Path) -> None:
    out, shown = tmp_path / "run", Shown()
    observer = ProgressObserver(shown)
    summary = meerkat.run(patient, out, observers=[observer])
    assert summary["rounds"] == 4
    assert summary["best_round"] == 2
    assert summary["best"]["validation_accuracy"] == 0.75
    assert shown.stages[-1] == ("Fine-tuning", 4 * 3, 4 * 3)
    assert shown.figures.keys() >= {"accuracy"}
    # It is complete: what it wrote is written again, and nothing else is done.
    before = content(out)
    again = Shown()
    assert meerkat.resume(out, observers=[ProgressObserver(again)]) == summary
    assert again.stages[-1] == ("Fine-tuning", 4 * 3, 4 * 3)
    assert content(out) == before
    page = meerkat.report(out).read_text()
    assert "unfinished" not in page
    assert "best on validation after 2" in page
    assert "validation macro F1" in page
    columns = summary_table(summary, out).columns
    rows = dict(zip(*(map(str, column.cells) for column in columns), strict=True))
    assert rows["rounds"] == "4 of 6; then no better"
    assert rows["best round"].startswith("2, validation accuracy 0.750, accuracy 0.")
    assert list(rows)[:4] == ["accuracy", "macro F1", "loss", "validation accuracy"]


def test_who_has_more_patience_goes_on(patient: Recipe, tmp_path: Path) -> None:
    longer = merged(patient.model_dump(mode="json"), evaluation={"patience": 3})
    summary = local_run(parse_recipe(longer), tmp_path / "run")
    assert (summary["rounds"], summary["best_round"]) == (6, 5)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_run_that_was_killed_ends_at_the_same_round(
    patient: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: int
) -> None:
    """Just before or after one of its evaluations is in the journal, the deciding one is 4."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    summary = local_run(patient, whole)
    append = Journal.append_evaluation

    def killed(journal: Journal, found: Evaluated) -> None:
        if found.round == number and moment == "before":
            raise KeyboardInterrupt
        append(journal, found)
        if found.round == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append_evaluation", killed)
        with pytest.raises(KeyboardInterrupt):
            local_run(patient, out)
    again = meerkat.resume(out, observers=())
    assert content(out) == content(whole)
    assert (again["rounds"], again["state_digest"]) == (4, summary["state_digest"])
    assert (again["best_round"], again["best"]) == (2, summary["best"])


def test_a_damaged_run_ends_where_it_ended(patient: Recipe, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "damaged"
    for directory in (whole, out):
        local_run(patient, directory)
    with closing(Journal.connect(out / "journal.sqlite")) as connection:
        connection.execute("UPDATE rounds SET updates = zeroblob(9) WHERE round = 3")
        connection.commit() if connection.in_transaction else None
    summary = meerkat.resume(out, recover=True, observers=())
    assert summary["rounds"] == 4
    assert content(out) == content(whole)


# Which round is best


def test_the_best_round_by_name(patient: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    local_run(patient, out)
    best = meerkat.replay(out, "best")
    assert (best.rounds, best.digest) == (2, meerkat.replay(out, 2).digest)
    assert best.digest != meerkat.replay(out).digest
    assert meerkat.replay(out, "best", audit=True).digest == best.digest
    assert meerkat.evaluate(out, rounds="best").metrics == meerkat.evaluate(out, rounds=2).metrics
    for rounds in ("best", 2):
        meerkat.export(out, tmp_path / f"{rounds}", rounds=rounds)
        meerkat.export(out, tmp_path / f"{rounds}.delta", delta=True, rounds=rounds)
    for name in ("{}/model.safetensors", "{}.delta"):
        one, other = (load_file(tmp_path / name.format(rounds)) for rounds in ("best", 2))
        assert one.keys() == other.keys()
        assert all(one[tensor].tobytes() == other[tensor].tobytes() for tensor in one)


def test_no_round_is_best_without_a_validation(data: dict[str, Any], tmp_path: Path) -> None:
    local_run(parse_recipe(merged(data, evaluation={"validation": 0})), tmp_path / "run")
    line = (
        r"--round best: .*run has no validation score to choose by \(evaluation.validation = 0\); "
        "give a number, or make a run with evaluation.validation and evaluation.every"
    )
    for command in (
        lambda: meerkat.replay(tmp_path / "run", "best"),
        lambda: meerkat.evaluate(tmp_path / "run", rounds="best"),
        lambda: meerkat.export(tmp_path / "run", tmp_path / "to", rounds="best"),
    ):
        with pytest.raises(RunError, match=line):
            command()


def test_free_text_goes_by_the_loss(data: dict[str, Any], tmp_path: Path) -> None:
    task = {"verbalizers": None, "answer": "label"}
    recipe = parse_recipe(merged(data, task=task))
    summary = local_run(recipe, tmp_path / "run")
    found = evaluations(tmp_path / "run")
    assert all(list(e.metrics) == ["loss", "validation_loss"] for e in found)
    lowest = min(e.metrics["validation_loss"] for e in found)
    assert summary["best"]["validation_loss"] == lowest
    assert meerkat.replay(tmp_path / "run", "best").rounds == summary["best_round"]
    assert meerkat.report(tmp_path / "run").exists()
    columns = summary_table(summary, tmp_path).columns
    rows = dict(zip(*(map(str, column.cells) for column in columns), strict=True))
    assert f"validation loss {lowest:.3f}" in rows["best round"]


# Clients elsewhere


@pytest.mark.parametrize("own", [False, True], ids=["partition", "folders"])
def test_clients_elsewhere_measure_both(
    data: dict[str, Any], mask: Mask, tmp_path: Path, own: bool
) -> None:
    recipe = parse_recipe(data)
    local_run(recipe, tmp_path / "local")
    nodes = [NodeConfig(number) for number in range(3)]
    if own:
        folders = write_client_folders(recipe, tmp_path / "folders")
        nodes = [NodeConfig(k, data=folder) for k, folder in enumerate(folders)]
    remote = RemoteRun(recipe, tmp_path / "remote", mask, nodes)
    summary = remote.run()
    assert all(" is here " in line for line in remote.lines), remote.lines
    assert content(remote.out) == content(tmp_path / "local")
    assert all((list(e.metrics), e.examples) == (BOTH, 12) for e in evaluations(remote.out))
    same_evaluations(remote.out, tmp_path / "local")
    assert meerkat.replay(remote.out, "best").rounds == summary["best_round"]
    hellos = [a for _, a in remote.peers.answers if isinstance(a, Hello)]
    assert sum(hello.held_out for hello in hellos) == 20


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScriptedRun]:
    clock = Clock()
    clock.install(monkeypatch)

    def make(clients: list[ScriptedClient], **evaluation: Any) -> ScriptedRun:
        recipe = scripted_recipe(evaluation={"validation": 9, "every": 1} | evaluation)
        return ScriptedRun(recipe, tmp_path / "hosted", clock, clients)

    return make


def answering(client: ScriptedClient, sums: Callable[[int], dict[str, tuple[float, ...]]]) -> None:
    """Have a client answer evaluations with these sums, by round."""

    def act(client: ScriptedClient, frame: DownFrame) -> bool:
        if not isinstance(frame, EvaluateRequest) or frame.position != client.position:
            return False
        client.send(Evaluation(frame.round, client.held_out, sums(frame.round)))
        return True

    client.act = act


def with_validation(
    tests: dict[str, tuple[float, ...]], hits: int, count: float = 4
) -> dict[str, tuple[float, ...]]:
    """Sums of an answer that also has four validation examples, so many of them right."""
    others = sums_of(((hits, 0), (4 - hits, 0)), 2.0)
    named = {f"validation_{name}": sums for name, sums in others.items()}
    return {**tests, **named, "validation_examples": (float(count),)}


TESTS = sums_of(((1, 1), (0, 1)), 1.5)
"""Of three test examples."""


def test_a_server_adds_up_validation_and_ends_by_its_patience(
    make_run: Callable[..., ScriptedRun],
) -> None:
    """One client has both kinds of examples, one validation alone, one test alone, one none."""
    clients = [ScriptedClient(k, held_out) for k, held_out in enumerate((7, 4, 3, 0))]
    hits = {0: 1, 1: 3, 2: 3, 3: 2}
    answering(clients[0], lambda r: with_validation(TESTS, hits[r]))
    answering(clients[1], lambda r: with_validation({}, hits[r]))
    answering(clients[2], lambda r: TESTS)
    hosted = make_run(clients, patience=2)
    summary = hosted.run()
    assert (summary["rounds"], summary["best_round"]) == (3, 1)
    assert hosted.transport.closed == "the run is complete"
    for found in evaluations(hosted.out):
        assert list(found.metrics) == BOTH
        assert found.examples == 6
        assert found.metrics["accuracy"] == 4 / 6
        assert found.metrics["validation_accuracy"] == hits[found.round] / 4
        assert found.metrics["validation_loss"] == 0.5
    assert hosted.run() == summary
    assert not [line for line in hosted.lines if "not used" in line or "refused" in line]


@pytest.mark.parametrize(
    ("sums", "cause"),
    [
        (with_validation(TESTS, 2, 8), "its validation_examples of 7 are not possible"),
        (with_validation(TESTS, 2, 1.5), "its validation_examples of 7 are not possible"),
        (with_validation(TESTS, 2, -1), "its validation_examples of 7 are not possible"),
        (with_validation(TESTS, 2, 3), "its macro_f1 of 4 examples is not possible"),
        (with_validation(TESTS, 2, 0), "its metrics are not the run's"),
        (with_validation({}, 2), "its metrics are not the run's"),
        (TESTS, "its macro_f1 of 7 examples is not possible"),
        (
            with_validation(TESTS, 2) | {"validation_accuracy": (5.0,)},
            "its validation_accuracy of 4 examples is not possible",
        ),
    ],
)
def test_a_client_that_lies_about_validation_is_left_out(
    make_run: Callable[..., ScriptedRun], sums: dict[str, tuple[float, ...]], cause: str
) -> None:
    clients = [ScriptedClient(k, 7) for k in range(CLIENTS)]
    for client in clients:
        answering(client, lambda r: with_validation(TESTS, 2))
    answering(clients[2], lambda r: sums)
    hosted = make_run(clients)
    hosted.run()
    assert {e.examples for e in evaluations(hosted.out)} == {9}
    assert hosted.line("evaluation after 0 rounds: client 2", cause)


def test_validation_that_the_recipe_does_not_have_is_refused(
    make_run: Callable[..., ScriptedRun],
) -> None:
    clients = [ScriptedClient(k, 3) for k in range(CLIENTS)]
    for client in clients:
        answering(client, lambda r: TESTS)
    clients[2].held_out = 7
    answering(clients[2], lambda r: with_validation(TESTS, 2))
    hosted = make_run(clients, validation=0)
    hosted.run()
    assert {e.examples for e in evaluations(hosted.out)} == {9}
    assert hosted.line("evaluation after 0 rounds: client 2", "its metrics are not the run's")


def test_a_server_says_when_nobody_has_validation_examples(
    make_run: Callable[..., ScriptedRun],
) -> None:
    """Then no round is best, and no patience comes to an end."""
    clients = [ScriptedClient(k, 3) for k in range(CLIENTS)]
    for client in clients:
        answering(client, lambda r: TESTS)
    hosted = make_run(clients, patience=1)
    summary = hosted.run()
    assert summary["rounds"] == 5
    assert summary["best_round"] is None
    assert hosted.line("evaluation after 0 rounds: no client has validation examples")
    assert all(score_of(e) is None for e in evaluations(hosted.out))
    with pytest.raises(RunError, match="no evaluation has a validation score yet"):
        meerkat.replay(hosted.out, "best")


def test_validation_alone_can_be_what_clients_have(make_run: Callable[..., ScriptedRun]) -> None:
    clients = [ScriptedClient(k, 4) for k in range(CLIENTS)]
    for client in clients:
        answering(client, lambda r: with_validation({}, 2))
    hosted = make_run(clients)
    summary = hosted.run()
    assert summary["best_round"] == 0
    found = evaluations(hosted.out)[0]
    assert math.isnan(found.metrics["loss"])
    assert found.metrics["validation_accuracy"] == 0.5
    strict = json.loads((hosted.out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert strict == summary


def test_a_run_ends_before_its_last_checkpoint(
    patient: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "CHECKPOINT_EVERY", 2)
    summary = local_run(patient, tmp_path / "run")
    assert meerkat.replay(tmp_path / "run").digest == summary["state_digest"]
    assert meerkat.replay(tmp_path / "run", "best", audit=True).rounds == 2


def test_no_subspace_is_made_for_a_run_that_has_ended(
    patient: Recipe, sentences_file: Path, tmp_path: Path
) -> None:
    """Neither by the run nor by a calibrator beside it, though one is due after four rounds."""
    section = {"dimensions": 4, "texts": 12, "corpus": str(sentences_file), "renew_every": 2}
    dumped = patient.model_dump(mode="json", exclude={"subspace"})
    optimizer = {"learning_rate": 0.1, "epsilon": 0.1}
    recipe = parse_recipe(merged(dumped, subspace=section, optimizer=optimizer))
    out = tmp_path / "run"
    summary = local_run(recipe, out)
    assert (summary["rounds"], summary["subspace_renewals"]) == (4, [2])
    meerkat.recalibrate(out)
    assert not (out / "mask-000004.safetensors").exists()
    assert meerkat.replay(out, "best").rounds == 2


@pytest.mark.parametrize("classes", [2, 300, 20_000])
def test_the_largest_frame_has_room_for_both(classes: int) -> None:
    recipe = scripted_recipe(
        task={"verbalizers": {f"c{n}": f"answer {n}" for n in range(classes)}},
        evaluation={"validation": 9},
    )
    counts = (1.0,) * (3 * classes)
    tests = {"loss": (1.0,), "accuracy": (1.0,), "macro_f1": counts}
    others = {f"validation_{name}": sums for name, sums in tests.items()}
    frame = encode(Evaluation(5, 18, {**tests, **others, "validation_examples": (9.0,)}))
    assert 2 * 8 * 3 * classes < len(frame) <= largest_client_frame(recipe)
