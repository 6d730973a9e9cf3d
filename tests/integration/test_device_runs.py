"""Runs whose clients keep θ and draw z on the model's device: the same bits, whoever does so."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import merged
from peers import RemoteRun, local_run
from typer.testing import CliRunner

import meerkat
from meerkat.cli import app
from meerkat.config import parse_recipe
from meerkat.errors import RecipeError
from meerkat.federation.client import Worker
from meerkat.federation.rounds import RoundRecord
from meerkat.journal import Journal
from meerkat.journal.records import RoundMetrics
from meerkat.node.config import NodeConfig
from meerkat.runs.assembly import Assembly, assemble
from meerkat.runs.events import RunObserver
from meerkat.runs.remote_run import load_server_mask
from meerkat.transport.server_frames import Snapshot

DEVICE = {"runtime": {"theta": "device"}}
SUBSPACE = {"dimensions": 4, "texts": 12}
KINDS: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "tabulated": {"noise": {"kind": "tabulated", "perturbations": 2}},
    "rademacher": {"noise": {"kind": "rademacher", "directions": "per-client"}},
    "pool": {"noise": {"kind": "tabulated", "keys": {"kind": "pool", "size": 3}}},
    "momentum": {"optimizer": {"rule": "momentum"}, "noise": {"kind": "tabulated"}},
    "adam": {"optimizer": {"rule": "adam"}, "noise": {"kind": "rademacher"}},
    "hiso": {"optimizer": {"rule": "hiso", "learning_rate": 1e-3}},
    "one-sided": {"optimizer": {"estimator": "one-sided"}, "noise": {"perturbations": 3}},
    "forward-mode": {"optimizer": {"estimator": "forward-mode"}},
    "stopping": {
        "selection": {
            "kind": "gradip",
            "calibration_steps": 6,
            "first_window": 2,
            "later_window": 2,
        }
    },
    "aligned": {"subspace": SUBSPACE},
    "exact": {"subspace": SUBSPACE, "optimizer": {"estimator": "backward", "learning_rate": 0.1}},
    "renewed": {"subspace": {**SUBSPACE, "renew_every": 2}},
    "few bits": {"runtime": {"weights": "int8"}},
}


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any], sentences_file: Path) -> dict[str, Any]:
    return merged(tiny_recipe_data, mask={"corpus": str(sentences_file)})


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """The workers that were made."""
    made, make = [], Assembly.worker

    def worker(self: Assembly) -> Worker:
        made.append(make(self))
        return made[-1]

    monkeypatch.setattr(Assembly, "worker", worker)
    return made


def content(directory: Path) -> list[Any]:
    with closing(Journal.open(directory / "journal.sqlite")) as journal:
        return [(r.reports, r.updates, r.state_digest, m.loss) for r, m in journal.records()]


class _StopAfterTwo(RunObserver):
    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        if record.round == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_depends_on_where_theta_is(
    data: dict[str, Any], tmp_path: Path, kind: str, workers: list[Worker]
) -> None:
    host = parse_recipe(merged(data, **KINDS[kind]))
    device = parse_recipe(merged(merged(data, **KINDS[kind]), **DEVICE))
    assert host.fingerprint == device.fingerprint
    summaries = [
        meerkat.run(recipe, tmp_path / name, observers=())
        for name, recipe in (("host", host), ("device", device))
    ]
    assert content(tmp_path / "host") == content(tmp_path / "device")
    assert summaries[0]["after"] == summaries[1]["after"]
    there = [isinstance(worker.state.theta, torch.Tensor) for worker in workers]
    assert there == [False, "subspace" not in KINDS[kind]]
    with pytest.raises(KeyboardInterrupt):
        meerkat.run(device, tmp_path / "stopped", observers=[_StopAfterTwo()])
    resumed = meerkat.resume(tmp_path / "stopped", observers=())
    assert resumed["state_digest"] == summaries[0]["state_digest"]
    assert content(tmp_path / "stopped") == content(tmp_path / "host")


def test_clients_of_one_run_may_differ(data: dict[str, Any], tmp_path: Path) -> None:
    """One of three, which comes late and gets a snapshot of θ and the rule's slots."""
    recipe = parse_recipe(
        merged(
            data,
            optimizer={"rule": "adam"},
            noise={"kind": "tabulated"},
            mask={"density": 0.0002},
            network={"quorum": 1},
            federation={"rounds": 9},
        )
    )
    local_run(recipe, tmp_path / "local")
    mask = load_server_mask(tmp_path / "local" / "mask.safetensors")
    nodes = [NodeConfig(0), NodeConfig(1), NodeConfig(2, theta="device")]
    remote = RemoteRun(recipe, tmp_path / "remote", mask, nodes)
    remote.anew = True  # each message is answered by a new process, so θ is sent again and again
    found = remote.run()
    assert remote.peers.count(Snapshot, 12) > 0
    assert content(tmp_path / "remote")[-1][2] == content(tmp_path / "local")[-1][2]
    assert meerkat.replay(tmp_path / "remote").digest == found["state_digest"]


def test_directions_are_tensors_of_the_device(data: dict[str, Any]) -> None:
    found = assemble(parse_recipe(merged(data, **DEVICE)))
    stream = found.worker().algorithm.stream
    (key,) = stream.keys(0, 0, 0)
    assert isinstance(stream.z(key), torch.Tensor)
    assert stream.z(key).numpy().tobytes() == found.algorithm.stream.z(key).tobytes()


def test_by_the_command_line(data: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(parse_recipe(data).model_dump_json())
    meerkat.run(parse_recipe(data), tmp_path / "host", observers=())
    out = str(tmp_path / "device")
    found = CliRunner().invoke(
        app, ["run", str(path), "--out", out, "--set", "runtime.theta=device"]
    )
    assert found.exit_code == 0, found.output
    assert content(tmp_path / "device") == content(tmp_path / "host")


def test_a_node_says_what_it_may_be() -> None:
    assert NodeConfig.of({"partition-id": 0, "theta": "device"}).theta == "device"
    with pytest.raises(RecipeError, match=r"theta = 'gpu' is none of host, device"):
        NodeConfig.of({"partition-id": 0, "theta": "gpu"})
