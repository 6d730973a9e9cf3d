"""The client's side: real participants in this process, their data, their mask, their answers."""

from __future__ import annotations

import copy
import csv
import functools
import json
import math
import sqlite3
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import meerkat
from meerkat import assembly, hosting, noise
from meerkat.cli import app
from meerkat.data.holdings import deal, share, write_folders
from meerkat.data.sources import Split, load_folder
from meerkat.descent import digest
from meerkat.errors import DataError, MaskError, ModelError, ProtocolError, RecipeError, RunError
from meerkat.journal import Journal
from meerkat.links import Event
from meerkat.mask.file import Mask, load_mask
from meerkat.models import LoadedModel, load_model
from meerkat.participant import Node, Participant, conversation
from meerkat.participant import crew as crew_room
from meerkat.progress import Progress
from meerkat.protocol import (
    DownFrame,
    Entries,
    Evaluate,
    Evaluation,
    Failed,
    Goodbye,
    Hello,
    LogEntry,
    MaskFile,
    Need,
    Plan,
    Proof,
    Refused,
    Report,
    RoundPlan,
    Setup,
    Snapshot,
    WantMask,
    Welcome,
    decode_down,
    decode_up,
    encode,
    wants_answer,
)
from meerkat.recipe import Recipe, parse_recipe
from meerkat.records import Evaluated
from meerkat.tasks import Example, Task, resolve_task
from meerkat.zeroth_order import Probe

# What the tests are made of


@functools.cache
def loaded_once(section: Any, runtime: Any) -> LoadedModel:
    """A run leaves its model as it was; `new_process` does the same for participants."""
    return load_model(section, runtime)


def new_process() -> None:
    """Participants that are made from now on share nothing with those before."""
    for crew in crew_room._crews.values():
        if crew.is_working:
            crew.worker.space.restore()
    crew_room._crews.clear()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: Any) -> Iterator[None]:
    monkeypatch.setattr(assembly, "load_model", loaded_once)
    if "reports" not in request.fixturenames:
        monkeypatch.setattr("meerkat.directory.write_report", lambda directory, journal: None)
    monkeypatch.setenv("MEERKAT_CACHE", str(tmp_path / "cache"))
    yield
    new_process()


@pytest.fixture
def reports() -> None:
    """Reports are written."""


def slope(space: Any, objective: Any, theta: Any, z: Any, epsilon: float, batch: Any) -> Probe:
    """A projected gradient without a model, which depends on θ, z and the examples."""
    weight = sum(sum(example.prompt) for example in batch) % 101
    return Probe(float(theta[:20] @ z[:20]) + weight / 101 * float(z[0]), 0.7)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward passes but those of the evaluation."""
    monkeypatch.setattr("meerkat.client.projected_gradient", slope)


def recipe_with(data: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    merged = copy.deepcopy(data)
    merged["federation"] |= {"clients": 3, "rounds": 4}
    merged["network"] = {"deadline": 0.5, "rejoin": 0.1, "patience": 1.0}
    for section, fields in sections.items():
        merged.setdefault(section, {}).update(fields)
    if merged.get("selection", {}).get("kind") == "gradip":
        windows = {"calibration_steps": 6, "first_window": 2, "later_window": 2}
        merged["selection"] = {**windows, **merged["selection"]}
    return parse_recipe(merged)


@pytest.fixture
def recipe(tiny_recipe_data: dict[str, Any]) -> Recipe:
    return recipe_with(tiny_recipe_data)


@pytest.fixture(scope="session")
def mask_file(tiny_recipe_data: dict[str, Any], tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    meerkat.calibrate(recipe_with(tiny_recipe_data), out=path)
    return path


@pytest.fixture
def mask(mask_file: Path) -> Mask:
    return hosting.host_mask(mask_file)


class Room:
    """A transport whose seats are participants in this process.

    Args:
        anew: Is each message answered by a new process?
    """

    def __init__(self, setup: Setup, nodes: list[Node], anew: bool = False):
        self.setup, self.anew = setup, anew
        self.nodes = {10 + seat: node for seat, node in enumerate(nodes)}
        self.events: deque[Event] = deque()
        self.said: list[str] = []
        self.seats = {seat: self.participant(node) for seat, node in self.nodes.items()}
        self.sent: list[tuple[int, DownFrame]] = []
        self.answers: list[tuple[int, Any]] = []
        self.closed = ""
        self.cut_in = math.inf
        self._kept: dict[int, bytes | None] = {}
        self._waiting: dict[int, list[bytes]] = {}
        for seat, member in self.seats.items():
            self.put(seat, member.begin(setup))

    def participant(self, node: Node) -> Participant:
        return Participant(node, self.said.append)

    def put(self, seat: int, frame: bytes) -> None:
        self.answers.append((seat, decode_up(frame)))
        self.events.append(Event(seat, frame))

    def send(self, seat: int, frame: bytes) -> None:
        self.sent.append((seat, decode_down(frame)))
        if self.anew:
            self._send_anew(seat, frame)
            return
        if seat in self.seats:
            for answer in self.seats[seat].answer(frame):
                self.put(seat, answer)

    def _send_anew(self, seat: int, frame: bytes) -> None:
        """As Flower's messages: what needs no answer waits for what does."""
        waiting = self._waiting.setdefault(seat, [])
        waiting.append(frame)
        if not wants_answer(frame):
            return
        new_process()
        member = self.participant(self.nodes[seat])
        member.begin(self.setup)
        kept = self._kept.get(seat)
        if kept is not None:
            member.recall(kept)
        for waited in waiting:
            for answer in member.answer(waited):
                self.put(seat, answer)
        waiting.clear()
        self._kept[seat] = member.remembered() if self.setup.remember else None

    def receive(self, timeout: float) -> Event | None:
        self.cut_in -= 1
        if self.cut_in < 0:
            raise RunError("the transport was stopped")
        return self.events.popleft() if self.events else None

    def drop(self, seat: int, reason: str, bar: bool = False) -> None:
        if self.seats.pop(seat, None) is not None:
            self.events.append(Event(seat, None, reason))

    def close(self, reason: str) -> None:
        self.closed = reason

    def count(self, kind: type) -> int:
        return sum(isinstance(frame, kind) for _, frame in self.sent + self.answers)


class Hosted:
    """A run over a room."""

    def __init__(self, recipe: Recipe, out: Path, mask: Mask, nodes: list[Node] | None = None):
        self.recipe, self.out, self.mask = recipe, out, mask
        self.nodes = nodes or [Node(number) for number in range(recipe.federation.clients)]
        self.lines: list[str] = []
        self.cut_in = math.inf
        self.anew = self.remember = False
        self.room: Room

    def run(self) -> dict[str, Any]:
        return hosting.host(
            self.recipe,
            self.out,
            self.mask,
            self._connect,
            Progress(),
            self.lines.append,
            remember=self.remember,
        )

    def _connect(self, setup: Setup) -> Room:
        self.room = Room(setup, self.nodes, self.anew)
        self.room.cut_in = self.cut_in
        return self.room


def content(directory: Path) -> dict[str, Any]:
    """Rounds, reports and calibrations as they are in a journal."""
    queries = {
        "rounds": "SELECT round, entries, digest FROM rounds ORDER BY 1",
        "reports": "SELECT round, client, payload FROM reports ORDER BY 1, 2",
        "calibrations": "SELECT client, payload FROM calibrations ORDER BY 1",
    }
    with closing(sqlite3.connect(directory / "journal.sqlite")) as connection:
        return {table: connection.execute(query).fetchall() for table, query in queries.items()}


def evaluations(directory: Path) -> list[Evaluated]:
    with closing(Journal.open(directory / "journal.sqlite")) as journal:
        return journal.evaluations()


def same_evaluations(one: Path, other: Path) -> None:
    first, second = evaluations(one), evaluations(other)
    figures = [(e.round, e.accuracy, e.macro_f1, e.examples) for e in first]
    assert figures == [(e.round, e.accuracy, e.macro_f1, e.examples) for e in second]
    assert [e.loss for e in first] == pytest.approx([e.loss for e in second], abs=1e-6)


# A run elsewhere is the local run


@pytest.mark.parametrize("own", [False, True], ids=["parts", "folders"])
def test_a_run_elsewhere_is_the_local_run(
    recipe: Recipe, mask: Mask, tmp_path: Path, own: bool
) -> None:
    """With real forward passes: the same bits from the recipe's data and from own folders."""
    local = meerkat.run(recipe, out=tmp_path / "local")
    nodes = None
    if own:
        folders = write_folders(recipe, tmp_path / "folders")
        nodes = [Node(number, data=folder) for number, folder in enumerate(folders)]
    hosted = Hosted(recipe, tmp_path / "hosted", mask, nodes)
    remote = hosted.run()
    assert content(hosted.out) == content(tmp_path / "local")
    same_evaluations(hosted.out, tmp_path / "local")
    assert remote["theta_digest"] == local["theta_digest"]
    assert remote["evaluated_examples"] == 20
    assert hosted.room.closed == "the run is complete"
    assert all(" is here " in line for line in hosted.lines)
    assert hosted.room.said.count("client 1 takes part") == 1


RUNS: dict[str, dict[str, Any]] = {
    "T=1": {"federation": {"local_steps": 1}, "evaluation": {"every": 1}},
    "T=5": {"federation": {"local_steps": 5}},
    "sampled by examples": {
        "federation": {"clients_per_round": 2, "weighting": "examples", "rounds": 6}
    },
    "per client": {"noise": {"directions": "per-client", "perturbations": 2}},
    "rademacher": {"noise": {"kind": "rademacher"}},
    "gradip": {"selection": {"kind": "gradip", "rho_later": 1.0, "rho_quiet": 0.0, "sigma": 1e9}},
    "apply, every": {
        "selection": {"kind": "gradip", "apply": True, "signal": "gradip", "every": 2},
        "federation": {"rounds": 6},
    },
    "random": {"selection": {"kind": "random", "count": 1}},
}


@pytest.mark.parametrize(
    ("name", "anew"),
    [
        *((name, "stay") for name in RUNS),
        *((name, anew) for name in ("T=1", "apply, every") for anew in ("anew", "remember")),
    ],
)
def test_participants_give_the_local_bits(
    tiny_recipe_data: dict[str, Any],
    mask: Mask,
    tmp_path: Path,
    cheap: None,
    name: str,
    anew: str,
) -> None:
    """In one process, in a new one for each message, or in such a one that remembers θ."""
    recipe = recipe_with(tiny_recipe_data, **RUNS[name])
    meerkat.run(recipe, out=tmp_path / "local")
    hosted = Hosted(recipe, tmp_path / "hosted", mask)
    hosted.anew, hosted.remember = anew != "stay", anew == "remember"
    hosted.run()
    assert content(hosted.out) == content(tmp_path / "local")
    same_evaluations(hosted.out, tmp_path / "local")
    assert (hosted.room.count(Need) > 0) == (anew == "anew")
    assert all(" is here " in line for line in hosted.lines)


@pytest.mark.parametrize("anew", [False, True], ids=["clients stay", "clients start anew"])
def test_interruptions_leave_no_trace(
    tiny_recipe_data: dict[str, Any], mask: Mask, tmp_path: Path, cheap: None, anew: bool
) -> None:
    recipe = recipe_with(tiny_recipe_data, selection={"kind": "gradip"})
    meerkat.run(recipe, out=tmp_path / "local")
    hosted, failures = Hosted(recipe, tmp_path / "hosted", mask), 0
    hosted.cut_in = 13
    while True:
        with suppress(RunError):
            hosted.run()
            break
        failures += 1
        if anew:
            new_process()
    assert failures >= 3
    assert content(hosted.out) == content(tmp_path / "local")
    same_evaluations(hosted.out, tmp_path / "local")


def test_commands_work_on_a_hosted_run(
    tiny_recipe_data: dict[str, Any], mask: Mask, tmp_path: Path, cheap: None, reports: None
) -> None:
    some = {"kind": "gradip", "signal": "gradip", "rho_later": 0.0, "rho_quiet": 0.0, "sigma": 1e9}
    recipe = recipe_with(tiny_recipe_data, selection=some)
    meerkat.run(recipe, out=tmp_path / "local")
    hosted = Hosted(recipe, tmp_path / "hosted", mask)
    summary = hosted.run()
    for command in (["report"], ["gradip"], ["replay"]):
        done = CliRunner().invoke(app, [*command, str(hosted.out)])
        assert done.exit_code == 0, done.output
    assert (hosted.out / "report.html").stat().st_size > 10_000
    assert meerkat.replay(hosted.out).digest == summary["theta_digest"]
    assert meerkat.replay(hosted.out, 2).digest == meerkat.replay(tmp_path / "local", 2).digest
    assert meerkat.gradip(hosted.out).paths == meerkat.gradip(tmp_path / "local").paths
    meerkat.export(hosted.out, tmp_path / "merged")
    meerkat.export(tmp_path / "local", tmp_path / "as local")
    name = "model.safetensors"
    merged = (tmp_path / "merged" / name).read_bytes()
    assert merged == (tmp_path / "as local" / name).read_bytes()
    meerkat.export(hosted.out, tmp_path / "delta", delta=True)
    chosen = json.loads((hosted.out / "selection.json").read_text())
    assert chosen["flagged"]
    assert not any("labels" in client for client in chosen["clients"])
    local = json.loads((tmp_path / "local" / "selection.json").read_text())
    assert chosen["flagged"] == local["flagged"]
    strict = json.loads((hosted.out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert strict == summary
    found = meerkat.evaluate(hosted.out)
    loaded_once.cache_clear()  # it leaves θ in its model
    assert found.accuracy == summary["accuracy_after"]


def test_three_classes_and_free_text(
    tiny_recipe_data: dict[str, Any], mask: Mask, tmp_path: Path, cheap: None
) -> None:
    """Sums over the clients are the evaluation of all held-out examples."""
    path = tmp_path / "topics.csv"
    names = ("World", "Sports", "Business")
    rows = [f"film {i} is a {names[i * i % 3]} story,{names[i % 3]}" for i in range(90)]
    path.write_text("\n".join(["text,topic", *rows]) + "\n")
    task = {"source": str(path), "label": "topic"}
    for kind in (
        {"verbalizers": dict(zip(names, ("great", "terrible", "bad"), strict=True))},
        {"verbalizers": None, "answer": "topic"},
    ):
        recipe = recipe_with(
            tiny_recipe_data, task={**task, **kind}, evaluation={"examples": 8, "every": 2}
        )
        local, hosted = tmp_path / f"local {len(kind)}", tmp_path / f"hosted {len(kind)}"
        meerkat.run(recipe, out=local)
        stage = Hosted(recipe, hosted, mask)
        stage.run()
        assert all(" is here " in line for line in stage.lines), stage.lines
        assert content(hosted) == content(local)
        same_evaluations(hosted, local)
        assert {e.examples for e in evaluations(hosted)} == {8}
        assert all((e.accuracy is None) == ("answer" in kind) for e in evaluations(hosted))
        new_process()


# What a participant answers


def proof_of(mask: Mask) -> Proof:
    return Proof(mask.model, mask.digest, noise.fingerprint())


def setup_of(recipe: Recipe, mask: Mask, /, **changes: str) -> Setup:
    return Setup(recipe.to_json(), replace(proof_of(mask), **changes), "session", False)


class Talk:
    """A conversation with one participant."""

    def __init__(self, setup: Setup, node: Node | None = None):
        self.said: list[str] = []
        self.client = Participant(node or Node(0), self.said.append)
        self.first = decode_up(self.client.begin(setup))

    def __call__(self, frame: DownFrame) -> Any:
        answers = [decode_up(data) for data in self.client.answer(encode(frame))]
        assert len(answers) < 2
        return answers[0] if answers else None

    @property
    def worker(self) -> Any:
        assert self.client._crew is not None
        return self.client._crew.worker


@pytest.fixture
def talk(recipe: Recipe, mask: Mask, mask_file: Path, cheap: None) -> Talk:
    return Talk(setup_of(recipe, mask), Node(0, mask=mask_file))


def entries(count: int, start: int = 0) -> tuple[LogEntry, ...]:
    return tuple(LogEntry(n, 0, 0, 2**32 - 1, 0.5, n + 0.25) for n in range(start, start + count))


def plan(start: int = 0, log: tuple[LogEntry, ...] = ()) -> Plan:
    return Plan(RoundPlan(1, 2, 0.5, 0, start, log))


def test_a_hello_says_who_and_what(recipe: Recipe, mask: Mask, talk: Talk) -> None:
    _, parts = deal(recipe, resolve_task(recipe.task))
    assert talk.first == Hello(0, len(parts[0]), 7, 0, proof_of(mask))
    talk(plan(0, entries(3)))
    again = decode_up(talk.client.begin(setup_of(recipe, mask)))
    assert again.position == 3


def test_what_a_plan_lacks_is_asked_for(talk: Talk) -> None:
    assert talk(plan(2)) == Need(0)
    assert talk(Entries(1, entries(1, 1))) is None, "not its place in the log"
    assert talk.worker.position == 0
    assert talk(Entries(0, entries(2))) is None
    assert isinstance(talk(plan(2)), Report)
    assert talk(Evaluate(1, 3)) == Need(2)
    assert talk(Entries(1, entries(2, 1))) is None, "the first one is known"
    assert isinstance(talk(Evaluate(1, 3)), Evaluation)
    followed = talk.worker.theta.copy()
    assert talk(Snapshot(3, followed.tobytes())) is None
    assert talk(Evaluate(1, 2)) == Need(3)
    assert np.array_equal(talk.worker.theta, followed)


def test_a_report_is_that_of_the_theta_it_was_brought_to(talk: Talk) -> None:
    first = talk(plan(0, entries(2))).report
    theta = talk.worker.theta.copy()
    assert first.theta_digest == bytes.fromhex(digest(theta))[:8]
    assert talk(plan(0, entries(2))).report == first, "asked again"
    assert talk(plan(1, entries(1, 1))).report == first
    assert talk(Snapshot(2, theta.tobytes())) is None
    assert talk(plan(2)).report == first
    assert talk(Snapshot(2, (theta + 1).tobytes())) is None, "a snapshot is taken as it is"
    assert talk(plan(2)).report.theta_digest != first.theta_digest
    assert talk.client.answered == 5


def test_a_snapshot_of_another_size_is_refused(talk: Talk) -> None:
    with pytest.raises(ProtocolError, match=r"snapshot of 3 values, not \d+"):
        talk(Snapshot(1, bytes(12)))


def test_an_error_is_told_once_and_the_client_lives(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the server waits for an answer."""
    size = talk.worker.space.size

    def broken(*_: Any) -> None:
        raise RuntimeError("secret path /home/me")

    with monkeypatch.context() as patch:
        patch.setattr(conversation, "evaluation_sums", broken)
        patch.setattr("meerkat.client.projected_gradient", broken)
        patch.setattr("meerkat.client.Worker.synchronise", broken)
        assert talk(Snapshot(1, bytes(4 * size))) is None
        assert talk(plan()) == Failed("RuntimeError")
        assert talk(Evaluate(0, 0)) == Failed("RuntimeError")
    assert isinstance(talk(plan()), Report)


def test_a_loss_that_is_not_finite_is_told(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes such a number for a broken frame."""
    for loss in (math.nan, math.inf):
        found = (loss, ((1, 0), (0, 6)))
        monkeypatch.setattr(conversation, "evaluation_sums", lambda *_, found=found: found)
        answer = talk(Evaluate(0, 0))
        assert isinstance(answer, Failed)
        assert "not finite" in answer.reason


def test_what_has_no_place(recipe: Recipe, mask: Mask, talk: Talk) -> None:
    with pytest.raises(ProtocolError, match="a second setup"):
        talk(setup_of(recipe, mask))
    with pytest.raises(ProtocolError, match="kind 65 has no place"):
        list(talk.client.answer(encode(talk.first)))
    fresh = Participant(Node(0), talk.said.append)
    for frame, line in ((plan(), "plan before the setup"), (MaskFile(b""), "before the setup")):
        with pytest.raises(ProtocolError, match=line):
            list(fresh.answer(encode(frame)))
    assert fresh.remembered() is None
    for frame in (Welcome(), Refused("too late"), Goodbye("that was all")):
        assert talk(frame) is None
    assert talk.said[-2:] == [
        "client 0 is refused: too late",
        "client 0: the server ends the session: that was all",
    ]


def test_a_new_process_remembers(recipe: Recipe, mask: Mask, talk: Talk, mask_file: Path) -> None:
    assert talk.client.remembered() is None, "nothing was done yet"
    report = talk(plan(0, entries(3)))
    kept = talk.client.remembered()
    new_process()
    again = Talk(setup_of(recipe, mask), Node(0, mask=mask_file))
    again.client.recall(kept)
    assert again(plan(3)) == report
    again(plan(3, entries(1, 3)))
    again.client.recall(kept)
    assert again.worker.position == 4, "what is older is not taken over"
    again.client.recall(encode(Welcome()))


# The handshake


@pytest.mark.parametrize("field", ["model", "mask", "noise"])
def test_who_does_not_fit_says_so_and_does_nothing(
    recipe: Recipe, mask: Mask, mask_file: Path, field: str
) -> None:
    setup = setup_of(recipe, mask, **{field: "00" * 32})
    talk = Talk(setup, Node(0, mask=mask_file))
    assert isinstance(talk.first, Hello), "the server is told what this client holds"
    (line,) = talk.said
    name = {"model": "base model", "mask": "mask", "noise": "noise generator"}[field]
    assert line.startswith(f"client 0 does not fit this run: the client's {name} is ")
    assert "the run's is 000000000000; " in line
    for frame in (plan(), Evaluate(0, 0)):
        answer = talk(frame)
        assert isinstance(answer, Failed)
        assert answer.reason in line
    assert not talk.client._crew.is_working


def test_a_number_or_recipe_that_does_not_fit(recipe: Recipe, mask: Mask) -> None:
    with pytest.raises(RecipeError, match=r"partition-id = 3 is not one of federation.clients = 3"):
        Talk(setup_of(recipe, mask), Node(3))
    for text, line in (
        ("{", "not JSON"),
        ("[]", "not JSON of a recipe"),
        ("[" * 100_000, "not JSON"),
        ("{}", "server's recipe"),
        (json.dumps({**json.loads(recipe.to_json()), "surprise": 1}), "surprise"),
    ):
        with pytest.raises((ProtocolError, RecipeError), match=line):
            Participant(Node(0)).begin(replace(setup_of(recipe, mask), recipe=text))


def test_a_node_without_examples_is_refused_on_both_sides(
    recipe: Recipe, mask: Mask, tmp_path: Path
) -> None:
    folders = write_folders(recipe, tmp_path / "folders")
    (folders[1] / "train.csv").write_text("text,label\n")
    nodes = [Node(number, data=folder) for number, folder in enumerate(folders)]
    hosted = Hosted(recipe, tmp_path / "hosted", mask, nodes)
    hosted.run()
    line = "client 1 has no examples; put some into its data folder"
    assert f"client 1 (seat 11) is refused: {line}" in hosted.lines
    assert f"client 1 is refused: {line}" in hosted.room.said
    assert {client for _, client, _ in content(hosted.out)["reports"]} == {0, 2}


def test_a_node_without_held_out_examples_is_not_asked_for_them(
    recipe: Recipe, mask: Mask, tmp_path: Path, cheap: None
) -> None:
    folders = write_folders(recipe, tmp_path / "folders")
    (folders[1] / "test.csv").unlink()
    (folders[2] / "test.csv").write_text("text,label\n")
    nodes = [Node(number, data=folder) for number, folder in enumerate(folders)]
    hosted = Hosted(recipe, tmp_path / "hosted", mask, nodes)
    assert hosted.run()["evaluated_examples"] == 7
    asked = [seat for seat, frame in hosted.room.sent if isinstance(frame, Evaluate)]
    assert asked == [10, 10]


def test_the_models_place_and_the_threads_are_the_nodes(
    recipe: Recipe, mask: Mask, mask_file: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(tiny_folder)
    changed = parse_recipe(json.loads(recipe.to_json()), ['model.name="/not/here"'])
    node = Node(1, model=str(elsewhere), mask=mask_file, device="cpu", threads=1)
    found = node.recipe(changed.to_json())
    assert (found.model.name, found.runtime.device) == (str(elsewhere), "cpu")
    assert (found.runtime.threads, found.runtime.cache_dir) == (1, None)
    assert Talk(setup_of(changed, mask), node).first.proof == proof_of(mask)
    with pytest.raises(ModelError, match="/not/here"):
        Talk(setup_of(changed, mask), Node(1, mask=mask_file))
    with pytest.raises(ModelError, match="nowhere"):
        Talk(setup_of(recipe, mask), Node(1, mask=mask_file, device="nowhere"))


# The mask


def test_the_mask_is_sent_once_and_kept(recipe: Recipe, mask: Mask, tmp_path: Path) -> None:
    setup = setup_of(recipe, mask)
    talk = Talk(setup)
    assert talk.first == WantMask()
    content = hosting._for_clients(mask)
    assert talk(MaskFile(content)) == Talk(setup).first
    (kept,) = (tmp_path / "cache" / "masks").iterdir()
    assert kept.read_bytes() == content
    bare = load_mask(kept)
    assert (bare.gradient, bare.initial, bare.concentration) == (None, None, None)
    assert bare.digest == mask.digest


@pytest.mark.parametrize("damage", [b"", b"garbage", "other"])
def test_a_mask_that_is_damaged_or_another_is_refused(
    recipe: Recipe, mask: Mask, tmp_path: Path, damage: Any
) -> None:
    content = damage
    if damage == "other":
        other = replace(mask, indices=tuple(np.unique(i // 2) for i in mask.indices))
        content = hosting._for_clients(other)
    talk = Talk(setup_of(recipe, mask))
    answer = talk(MaskFile(content))
    assert isinstance(answer, Failed)
    assert ("the server sent mask" in answer.reason) == (damage == "other")
    assert not list((tmp_path / "cache" / "masks").iterdir())
    assert Talk(setup_of(recipe, mask)).first == WantMask()


def test_a_kept_mask_that_was_damaged_is_asked_for_again(
    recipe: Recipe, mask: Mask, tmp_path: Path
) -> None:
    setup, content = setup_of(recipe, mask), hosting._for_clients(mask)
    Talk(setup)(MaskFile(content))
    (kept,) = (tmp_path / "cache" / "masks").iterdir()
    kept.write_bytes(content[:-20])
    new_process()
    talk = Talk(setup)
    assert talk.first == WantMask()
    assert isinstance(talk(MaskFile(content)), Hello)
    assert kept.read_bytes() == content


def test_a_mask_of_the_operator_is_never_written(
    recipe: Recipe, mask: Mask, mask_file: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.write_bytes(mask_file.read_bytes())
    talk = Talk(setup_of(recipe, mask), Node(0, mask=own))
    with pytest.raises(ProtocolError, match="mask"):
        talk(MaskFile(hosting._for_clients(mask)))
    assert own.read_bytes() == mask_file.read_bytes()
    assert list(tmp_path.glob("*.part")) == []
    with pytest.raises(MaskError, match="no such file"):
        Talk(setup_of(recipe, mask), Node(0, mask=tmp_path / "none"))


def test_only_who_lacks_the_mask_gets_it(
    recipe: Recipe, mask: Mask, mask_file: Path, tmp_path: Path, cheap: None
) -> None:
    nodes = [Node(0), Node(1, mask=mask_file), Node(2)]
    hosted = Hosted(recipe, tmp_path / "hosted", mask, nodes)
    hosted.run()
    sent = [seat for seat, frame in hosted.room.sent if isinstance(frame, MaskFile)]
    assert sent == [10, 12]
    new_process()
    again = Hosted(recipe, tmp_path / "again", mask, nodes)
    again.run()
    assert again.room.count(MaskFile) == 0
    assert content(again.out) == content(hosted.out)


# The settings of a node


def test_settings_of_a_node() -> None:
    config = {
        "partition-id": 2,
        "num-partitions": 5,
        "data": "some/folder",
        "model": "m",
        "mask": "f",
        "device": "cpu",
        "threads": "3",
    }
    assert Node.of(config) == Node(2, Path("some/folder"), "m", Path("f"), "cpu", 3)
    assert Node.of({"partition-id": "7"}) == Node(7)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({}, "lacks partition-id"),
        ({"num-partitions": 3}, "lacks partition-id"),
        ({"partition-id": -1}, "partition-id"),
        ({"partition-id": "one"}, "partition-id = 'one' is no int"),
        ({"partition-id": 1.5}, "partition-id = 1.5 is no int"),
        ({"partition-id": True}, "partition-id = True is no int"),
        ({"partition-id": None}, "partition-id = None is no int"),
        ({"partition-id": 0, "threads": "many"}, "threads = 'many' is no int"),
        ({"partition-id": 0, "threads": -2}, "threads"),
        ({"partition-id": 0, "data": 5}, "data = 5 is no "),
        ({"partition-id": 0, "partition": 5}, "partition is not a known setting; known are part"),
    ],
    ids=str,
)
def test_settings_of_a_node_that_are_none(config: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError, match=line) as caught:
        Node.of(config)
    assert str(caught.value).startswith("--node-config ")
    assert "\n" not in str(caught.value)


# Folders of clients' own data

TEXT = st.text(
    st.one_of(
        st.sampled_from(" \t\n\r\x0b\x0c\x00\x1a\"',;\\#\ufeff\u2028NA0"),
        st.characters(codec="utf-8"),
    ),
    min_size=1,
    max_size=12,
).filter(lambda text: bool(text.strip()))
CLASSES = Task("custom", "", "{text} and {other}", ("a", "b", "c"), ("no", "yes", "may be, 'so'"))
ANSWERS = Task("custom", "", "{text} and {text} and {other}", answer="said")


def written(task: Task, examples: list[Example], folder: Path, name: str = "train") -> None:
    from meerkat.data import holdings

    folder.mkdir(exist_ok=True)
    holdings._write(task, examples, folder / f"{name}.csv")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_text_comes_back_from_a_folder(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    task = data.draw(st.sampled_from([CLASSES, ANSWERS]))
    drawn = data.draw(
        st.lists(
            st.tuples(TEXT, TEXT, TEXT, st.integers(0, 2)),
            min_size=1,
            max_size=4,
            unique_by=lambda row: (row[0].strip().casefold(), row[1].strip().casefold()),
        )
    )
    examples = [
        Example({"text": text, "other": other}, answer=answer)
        if task.answer
        else Example({"text": text, "other": other}, label=label)
        for text, other, answer, label in drawn
    ]
    folder = tmp_path_factory.mktemp("folder")
    written(task, examples, folder)
    assert load_folder(task, folder) == Split(tuple(examples), ())


def test_folders_hold_what_clients_hold(recipe: Recipe, tmp_path: Path) -> None:
    task = resolve_task(recipe.task)
    split, parts = deal(recipe, task)
    folders = write_folders(recipe, tmp_path / "folders")
    assert [folder.name for folder in folders] == ["client-0", "client-1", "client-2"]
    shown = set()
    for client, folder in enumerate(folders):
        own = load_folder(task, folder)
        assert own.train == tuple(split.train[index] for index in parts[client])
        assert own.test == share(recipe, split, client)
        shown |= {example.fields["text"] for example in own.test}
    assert shown == {example.fields["text"] for example in split.test[:20]}
    with pytest.raises(RunError, match="not an empty folder"):
        write_folders(recipe, tmp_path / "folders")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="not an empty folder"):
        write_folders(recipe, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert len(write_folders(recipe, tmp_path / "empty")) == 3


def test_a_client_without_held_out_examples_has_no_file_of_them(
    tiny_recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    recipe = recipe_with(tiny_recipe_data, evaluation={"examples": 2})
    folders = write_folders(recipe, tmp_path / "folders")
    assert [(folder / "test.csv").exists() for folder in folders] == [True, True, False]


@pytest.mark.parametrize("missing", ["folder", "train", "two", "two tests"])
def test_a_folder_needs_one_file_of_each(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "data"
    examples = [Example({"text": "a", "other": "b"})]
    if missing != "folder":
        written(CLASSES, examples, folder, "test")
    if missing in ("two", "two tests"):
        written(CLASSES, examples, folder)
        name = "train.jsonl" if missing == "two" else "test.tsv"
        (folder / name).write_text("")
    with pytest.raises(DataError, match=r"it needs one file train .and may have one file test."):
        load_folder(CLASSES, folder)


def test_a_row_that_does_not_fit_is_named(tmp_path: Path) -> None:
    for rows, line in (
        ([["text", "label"], ["a", "no"]], "train row 1: no column 'other'"),
        ([["text", "other", "label"], ["a", "b", "no"], ["c", "d", "so"]], "row 2: label 'so'"),
        ([["text", "other", "label"], ["a", "  ", "no"]], "row 1: column 'other' is empty"),
    ):
        with (tmp_path / "train.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        with pytest.raises(DataError, match=line) as caught:
            load_folder(CLASSES, tmp_path)
        assert str(tmp_path / "train.csv") in str(caught.value)
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        load_folder(CLASSES, tmp_path)


def test_no_text_is_in_both_files(tmp_path: Path) -> None:
    one, two, three = (Example({"text": text, "other": "x"}, 1) for text in ("A b", "c", "d"))
    shouted = replace(one, fields={"text": " a B", "other": "X "})
    written(CLASSES, [one, two, two, three], tmp_path)
    written(CLASSES, [shouted, three], tmp_path, "test")
    assert load_folder(CLASSES, tmp_path) == Split((two,), (shouted, three))


def test_other_kinds_of_files(tmp_path: Path) -> None:
    rows = [{"text": "a\n b", "other": 5, "label": "yes"}, {"text": "c", "other": 1, "label": "no"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.tsv").write_text("text\tother\tlabel\nd, e\tNA\tno\n")
    found = load_folder(CLASSES, tmp_path)
    assert [(e.fields, e.label) for e in found.train] == [
        ({"text": "a\n b", "other": 5}, 1),
        ({"text": "c", "other": 1}, 0),
    ]
    assert [(e.fields, e.label) for e in found.test] == [({"text": "d, e", "other": "NA"}, 0)]
