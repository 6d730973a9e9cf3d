"""Runs in a subspace over Flower: both transports and both kinds give the bits of one process."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from builders import merged
from cluster import Cluster, free_port, wait_until
from commands import meerkat_process, toml_of
from flower_runs import MANY, ROOT, finished, nodes_of, rounds_of, start_node
from journals import content

import meerkat
from meerkat.config import parse_recipe
from meerkat.runs.remote_run import load_server_mask

pytest.importorskip("flwr")

KINDS = ("aligned", "random")
WINDOWS = {"calibration_steps": 6, "first_window": 2, "later_window": 2}
STOPPING = {"kind": "gradip", **WINDOWS}


@pytest.fixture(scope="module")
def trials(
    tiny_recipe_data: dict[str, Any],
    sentences_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """For each kind a recipe with early stopping, its mask with a subspace, clients' folders."""
    folder = tmp_path_factory.mktemp("trials")
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        data = merged(
            tiny_recipe_data,
            federation={"clients": 2, "rounds": 3},
            subspace={"kind": kind, "dimensions": 4, "texts": 12, "corpus": str(sentences_file)},
            optimizer={"learning_rate": 0.1, "epsilon": 0.1},
            selection=STOPPING,
            # A client whose process died is waited for, so that every round has both.
            network={"rejoin": 240.0, "rebind": True},
        )
        recipe, mask = folder / f"{kind}.toml", folder / f"{kind}.safetensors"
        recipe.write_text(toml_of(data))
        meerkat.calibrate(recipe, out=mask)
        assert load_server_mask(mask).dimensions == 4
        found[kind] = {"recipe": recipe, "mask": mask, "given": data}
    folders = meerkat.split(found["random"]["recipe"], folder / "data")
    for trial in found.values():
        trial["data"] = folders
    return found


def local(trial: dict[str, Any], out: Path, rounds: int) -> dict[str, Any]:
    """The same run in one process."""
    data = merged(trial["given"], federation={"rounds": rounds})
    return meerkat.run(parse_recipe(data), out=out, observers=())


def same_bits(out: Path, summary: dict[str, Any], one: Path, expected: dict[str, Any]) -> None:
    assert summary["state_digest"] == expected["state_digest"]
    assert content(out) == content(one)
    assert summary["subspace"] == expected["subspace"]
    assert summary["stopped_early"] == expected["stopped_early"]


def config_of(trial: dict[str, Any], out: Path, **others: object) -> dict[str, object]:
    named = {name: str(trial[name]) for name in ("recipe", "mask")}
    return {**named, "out": str(out), **others}


def kill(processes: list[int]) -> None:
    assert processes
    for pid in processes:
        os.kill(pid, signal.SIGKILL)


def test_over_streams(trials: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Both kinds; then a client that joins anew in mid-run, and a server that is killed."""
    environment = {"MEERKAT_CACHE": str(tmp_path / "cache")}
    with Cluster(tmp_path, secure=False, environment=environment) as cluster:
        nodes_of(cluster, trials["random"])
        listen = {"network.listen": f"127.0.0.1:{free_port()}"}
        out = tmp_path / "random"
        run = cluster.run(ROOT, config_of(trials["random"], out, **listen))
        random = finished(cluster, run, out)

        killed = tmp_path / "aligned"
        config = config_of(trials["aligned"], killed, **listen, **{"federation.rounds": MANY})
        run = cluster.run(ROOT, config)
        wait_until(lambda: rounds_of(killed) >= 5, 240)
        kill(cluster.processes(1))
        log = killed / "server.log"
        wait_until(lambda: log.read_text().count("client 1 is here (peer") == 2, 240)
        rejoined = rounds_of(killed)
        assert rejoined < MANY, "it came back too late; raise MANY"
        wait_until(lambda: rounds_of(killed) >= rejoined + 3, 240)
        kill(cluster.processes("server"))
        assert rounds_of(killed) < MANY, "it was killed too late; raise MANY"
        run = cluster.run(ROOT, config)
        aligned = finished(cluster, run, killed)
    expected = local(trials["random"], tmp_path / "local-random", 3)
    same_bits(out, random, tmp_path / "local-random", expected)
    expected = local(trials["aligned"], tmp_path / "local-aligned", MANY)
    same_bits(killed, aligned, tmp_path / "local-aligned", expected)


def test_over_messages(trials: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Each message comes to a new process; one node loses all it had, and the server is killed."""
    rounds = 4
    environment = {"MEERKAT_CACHE": str(tmp_path / "cache")}
    folders = trials["random"]["data"]
    messages = {"network.transport": "messages"}
    for folder in folders:
        (folder / "test.csv").rename(folder / "later.csv")  # evaluations take processes, too
    try:
        with Cluster(tmp_path, secure=False, environment=environment) as cluster:
            nodes_of(cluster, trials["random"])
            out = tmp_path / "random"
            run = cluster.run(ROOT, config_of(trials["random"], out, **messages))
            random = finished(cluster, run, out)

            killed = tmp_path / "aligned"
            config = config_of(trials["aligned"], killed, **messages)
            config["federation.rounds"] = rounds
            run = cluster.run(ROOT, config)
            wait_until(lambda: rounds_of(killed) >= 1, 240)
            kill(cluster.processes("server"))
            done = rounds_of(killed)
            assert done < rounds, "it was killed too late; raise `rounds`"
            run = cluster.run(ROOT, config)
            wait_until(lambda: rounds_of(killed) >= done + 1, 240)
            cluster.stop_node(1, kill=True)
            assert rounds_of(killed) < rounds, "it was killed too late; raise `rounds`"
            start_node(cluster, trials["random"], 1)  # another node, which takes the client over
            aligned = finished(cluster, run, killed)
            log = (killed / "server.log").read_text()
            assert log.count("client 1 is here (peer") == 3
    finally:
        for folder in folders:
            (folder / "later.csv").rename(folder / "test.csv")
    expected = local(trials["random"], tmp_path / "local-random", 3)
    same_bits(out, random, tmp_path / "local-random", expected)
    expected = local(trials["aligned"], tmp_path / "local-aligned", rounds)
    same_bits(killed, aligned, tmp_path / "local-aligned", expected)


@pytest.fixture
def renewed(trials: dict[str, dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """The aligned recipe, with the subspace renewed before rounds 2 and 4 of 6."""
    changes = {
        "federation": {"rounds": 6},
        "subspace": {"renew_every": 2},
        "selection": {"kind": "none"},
        "network": {"patience": 240.0},
    }
    data = merged(trials["aligned"]["given"], **changes)
    recipe = tmp_path / "renewed.toml"
    recipe.write_text(toml_of(data))
    trial = {**trials["aligned"], "recipe": recipe, "given": data}
    return {**trial, "expected": local(trial, tmp_path / "local", 6)}


def test_a_simulation_renews_the_subspace(renewed: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "simulated"
    process = meerkat_process("run", renewed["recipe"], "--out", out, "--engine", "flower")
    printed, _ = process.communicate(timeout=480)
    assert process.returncode == 0, printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["subspace_renewals"] == [2, 4]
    same_bits(out, summary, tmp_path / "local", renewed["expected"])


def test_a_calibrator_renews_the_subspace_of_a_deployment(
    renewed: dict[str, Any], tmp_path: Path
) -> None:
    """It is killed in mid-run, so the server waits until there is another."""
    out = tmp_path / "deployed"
    environment = {"MEERKAT_CACHE": str(tmp_path / "cache")}
    listen = {"network.listen": f"127.0.0.1:{free_port()}"}
    first = tmp_path / "deployed/mask-000002.safetensors"
    with Cluster(tmp_path, secure=False, environment=environment) as cluster:
        nodes_of(cluster, renewed)
        run = cluster.run(ROOT, config_of(renewed, out, **listen))
        wait_until(lambda: (out / "recipe.json").exists(), 240)
        calibrator = meerkat_process("recalibrate", out)
        wait_until(first.exists, 240)
        calibrator.kill()
        calibrator.communicate()
        log = out / "server.log"
        wait_until(lambda: "waiting for mask-000004.safetensors" in log.read_text(), 240)
        calibrator = meerkat_process("recalibrate", out)
        summary = finished(cluster, run, out)
        printed, _ = calibrator.communicate(timeout=60)
    assert calibrator.returncode == 0, printed
    assert "mask-000004.safetensors" in printed
    same_bits(out, summary, tmp_path / "local", renewed["expected"])
