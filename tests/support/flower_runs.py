"""What tests of runs over Flower share: nodes with folders, and how a run is waited for."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from cluster import Cluster

from meerkat.journal import Journal

__all__ = ["MANY", "ROOT", "finished", "nodes_of", "rounds_of", "start_node"]

ROOT = Path(__file__).parents[2]
MANY = 150
"""Rounds that take a few seconds on any machine."""


def nodes_of(cluster: Cluster, trial: dict[str, Any], **others: object) -> None:
    """Two SuperNodes, each with a folder that only its own configuration names."""
    for number in range(2):
        start_node(cluster, trial, number, **others)


def start_node(cluster: Cluster, trial: dict[str, Any], number: int, **others: object) -> None:
    """One of them."""
    folder = trial["data"][number]
    config = {"partition-id": number, "num-partitions": 2, "data": str(folder), "threads": 1}
    config["allow-models"] = "*/tiny-llama"
    cluster.start_node(number, {**config, **others})


def finished(cluster: Cluster, run: int, out: Path, timeout: float = 480) -> dict[str, Any]:
    status = cluster.wait(run, timeout)
    assert status == "finished:completed", cluster.log(run)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def rounds_of(directory: Path) -> int:
    """Rounds in a journal that somebody else is writing."""
    if not Journal.exists(directory / "journal.sqlite"):
        return 0
    with closing(Journal.open(directory / "journal.sqlite")) as journal:
        return journal.rounds
