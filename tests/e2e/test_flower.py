"""Flower as a user runs it: simulations and deployments with real processes, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import ENVIRONMENT, Cluster, free_port, running, wait_until
from commands import meerkat_process, toml_of
from flower_runs import MANY, ROOT, finished, nodes_of, rounds_of, start_node

import meerkat

pytest.importorskip("flwr")
from meerkat.flower.serving import logged_to


@pytest.fixture(scope="module")
def trial(
    tiny_recipe_data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A recipe, its mask, its clients' folders, and what a local run of it gives."""
    folder = tmp_path_factory.mktemp("trial")
    data = json.loads(json.dumps(tiny_recipe_data))
    data["federation"] |= {"clients": 2, "rounds": 3}
    recipe = folder / "tiny.toml"
    recipe.write_text(toml_of(data))
    mask = folder / "mask.safetensors"
    meerkat.calibrate(recipe, out=mask)
    folders = meerkat.split(recipe, folder / "data")
    summary = meerkat.run(recipe, out=folder / "local")
    cache = data["runtime"]["cache_dir"]
    return {"recipe": recipe, "mask": mask, "data": folders, "local": summary, "cache": cache}


def test_the_server_log_has_each_line_once_whichever_run_writes_it(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with logged_to(tmp_path / name, aloud=False) as logger:
            logger.info("client %d is here", 7)
            logger.info("100 % is no format")
    for name in ("first", "second"):
        lines = (tmp_path / name).read_text().splitlines()
        assert [line[20:] for line in lines] == ["client 7 is here", "100 % is no format"]
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line[:20]) for line in lines)
    assert not logger.handlers
    with logged_to(tmp_path / "third", aloud=False):
        pass
    assert not (tmp_path / "third").exists(), "a run that has nothing to log leaves no file"


def test_a_simulation_from_our_command_line_is_the_local_run(
    trial: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = meerkat_process("run", trial["recipe"], "--out", out, "--engine", "flower")
    printed, _ = process.communicate(timeout=480)
    assert process.returncode == 0, printed
    summary = json.loads((out / "summary.json").read_text())
    for figure in ("state_digest", "fingerprint", "evaluated_examples"):
        assert summary[figure] == trial["local"][figure]
    for when in ("before", "after"):
        found, local = dict(summary[when]), dict(trial["local"][when])
        # The clients' losses are added up by client, and are packed otherwise.
        assert found.pop("loss") == pytest.approx(local.pop("loss"), rel=1e-6)
        assert found == local
        assert set(found) == {"accuracy", "macro_f1"}
    assert "client 1 is here" in (out / "server.log").read_text()
    # The run's directory is like any other, and tells who goes on with it.
    assert json.loads((out / "recipe.json").read_text())["runtime"]["engine"] == "flower"
    assert meerkat.resume(out)["state_digest"] == summary["state_digest"]
    assert meerkat.report(out).exists()
    assert meerkat.export(out, tmp_path / "delta", delta=True).exists()
    again = meerkat_process("run", trial["recipe"], "--out", out, "--engine", "flower")
    printed, _ = again.communicate(timeout=480)
    assert again.returncode == 2
    assert "holds another run" in printed


def test_flwr_run_simulates_and_takes_overrides(trial: dict[str, Any], tmp_path: Path) -> None:
    """`flwr run .` of this repository against a named SuperLink that simulates."""
    out = tmp_path / "run"
    environment = {"MEERKAT_CACHE": trial["cache"]}
    with Cluster(tmp_path, secure=False, simulation=2, environment=environment) as cluster:
        config = {"recipe": str(trial["recipe"]), "out": str(out), "federation.rounds": 2}
        run = cluster.run(ROOT, {**config, "set": "seed=8; optimizer.learning_rate=0.02"})
        summary = finished(cluster, run, out)
        wrong = cluster.run(ROOT, {**config, "out": str(tmp_path / "w"), "federation.rounds": "x"})
        assert cluster.wait(wrong, 480) == "finished:failed"
        assert "meerkat: " in cluster.log(wrong)
        assert "federation.rounds = 'x'" in cluster.log(wrong)
    changes = ["federation.rounds=2", "seed=8", "optimizer.learning_rate=0.02"]
    local = meerkat.run(trial["recipe"], out=tmp_path / "local", overrides=changes)
    assert summary["state_digest"] == local["state_digest"]


def test_a_deployment_over_streams_is_the_local_run_and_survives_its_server(
    trial: dict[str, Any], tmp_path: Path
) -> None:
    """TLS, node keys, folders; then the server app is killed in a run, and started again."""
    environment = {"MEERKAT_CACHE": str(tmp_path / "cache")}
    common = {"recipe": str(trial["recipe"]), "mask": str(trial["mask"])}
    with Cluster(tmp_path, environment=environment) as cluster:
        common["network.listen"] = f"127.0.0.1:{free_port()}"
        nodes_of(cluster, trial)
        out = tmp_path / "run"
        run = cluster.run(ROOT, {**common, "out": str(out)})
        summary = finished(cluster, run, out)
        assert summary["state_digest"] == trial["local"]["state_digest"]
        assert summary["after"]["accuracy"] == trial["local"]["after"]["accuracy"]
        log = (out / "server.log").read_text()
        assert "answered 3" in log  # Flower's message was answered with the client's summary
        assert "the run is complete" in cluster.output("node-0")

        killed = tmp_path / "killed"
        config = {**common, "out": str(killed), "federation.rounds": MANY}
        run = cluster.run(ROOT, config)
        wait_until(lambda: rounds_of(killed) >= 5, 240)
        for pid in cluster.processes("server"):
            os.kill(pid, signal.SIGKILL)
        done = rounds_of(killed)
        assert 5 <= done < MANY, "it was killed too late; raise MANY"
        run = cluster.run(ROOT, config)
        summary = finished(cluster, run, killed)
        log = (killed / "server.log").read_text()
        assert log.count("client 0 is here") == 2
    changes = [f"federation.rounds={MANY}"]
    local = meerkat.run(trial["recipe"], out=tmp_path / "local", overrides=changes)
    assert summary["state_digest"] == local["state_digest"]


def test_a_deployment_over_messages_is_the_local_run(trial: dict[str, Any], tmp_path: Path) -> None:
    """Each message comes to a new process; what a node must remember is in Flower's context."""
    out, environment = tmp_path / "run", {"MEERKAT_CACHE": str(tmp_path / "cache")}
    config = {"recipe": str(trial["recipe"]), "mask": str(trial["mask"]), "out": str(out)}
    with Cluster(tmp_path, secure=False, environment=environment) as cluster:
        for folder in trial["data"]:
            (folder / "test.csv").rename(folder / "later.csv")  # evaluations take processes, too
        try:
            nodes_of(cluster, trial, mask=str(trial["mask"]))
            run = cluster.run(ROOT, {**config, "network.transport": "messages"})
            summary = finished(cluster, run, out)
        finally:
            for folder in trial["data"]:
                (folder / "later.csv").rename(folder / "test.csv")
    assert summary["state_digest"] == trial["local"]["state_digest"]
    assert summary["after"] == {}


def test_mixed_runs_have_the_local_bits_simulated_and_deployed(
    tiny_recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    """A simulation lets every client give exact gradients; a SuperNode gives them if it is told."""
    data = json.loads(json.dumps(tiny_recipe_data))
    data["federation"] |= {"clients": 2, "rounds": 3}
    data |= {"subspace": {"kind": "random", "dimensions": 4}}
    data["optimizer"] = {"learning_rate": 0.1, "epsilon": 0.1, "exact_clients": [1]}
    recipe, mask = tmp_path / "tiny.toml", tmp_path / "mask.safetensors"
    recipe.write_text(toml_of(data))
    local = meerkat.run(recipe, out=tmp_path / "local")
    out = tmp_path / "simulated"
    process = meerkat_process("run", recipe, "--out", out, "--engine", "flower")
    printed, _ = process.communicate(timeout=480)
    assert process.returncode == 0, printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["state_digest"] == local["state_digest"]

    data["optimizer"]["exact_clients"] = "able"
    recipe.write_text(toml_of(data))
    meerkat.calibrate(recipe, out=mask)
    trial = {"data": meerkat.split(recipe, tmp_path / "data")}
    environment = {"MEERKAT_CACHE": str(tmp_path / "cache")}
    out = tmp_path / "deployed"
    config = {"recipe": str(recipe), "mask": str(mask), "out": str(out)}
    with Cluster(tmp_path, environment=environment) as cluster:
        config["network.listen"] = f"127.0.0.1:{free_port()}"
        start_node(cluster, trial, 0)
        start_node(cluster, trial, 1, gradients=True)
        summary = finished(cluster, cluster.run(ROOT, config), out)
    assert summary["state_digest"] == local["state_digest"]


@pytest.mark.real
def test_the_guide_can_be_followed(tmp_path: Path) -> None:
    """docs/deploy.md, certificates to report, with Gemma 3 270M: five rounds at T = 1."""
    folder = tmp_path / "trial"
    command = [sys.executable, str(ROOT / "deploy/follow.py"), "--folder", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, env={**os.environ, **ENVIRONMENT}
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    summary = json.loads((folder / "run/summary.json").read_text())
    assert f"meerkat: accuracy after {summary['after']['accuracy']}" in done.stdout
    assert summary["rounds"] == 5
    assert summary["after"]["accuracy"] > 0.6
    assert summary["state_digest"] in done.stdout  # `meerkat replay run --digest`
    assert "answered 5" in (folder / "run/server.log").read_text()
    wait_until(lambda: not [p for p in running() if str(folder) in p.arguments], 240)
