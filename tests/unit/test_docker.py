"""The files of docker/: what they name is there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text("utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.parametrize("script", sorted((DOCKER / "services").iterdir()), ids=lambda p: p.name)
def test_each_script_is_one(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text("utf-8").startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", str(script)], check=True)


def test_what_is_copied_is_there_and_is_sent_to_the_build() -> None:
    sent = (ROOT / ".dockerignore").read_text("utf-8").split()
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M)
        for source in line.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in sent, source
    assert sent[0] == "*"  # and nothing else of a clone: no run, no history


def test_services_use_what_is_declared() -> None:
    stages = set(re.findall(r"^FROM .+ AS (\S+)$", DOCKERFILE, re.M))
    for name, service in SERVICES.items():
        assert (DOCKER / "services" / service["command"].split()[0].rpartition("/")[2]).is_file()
        assert service["image"].partition(":")[2] in stages
        assert service.get("build", {}).get("target", "server") in stages
        assert set(service.get("depends_on", {})) <= set(SERVICES)
        for volume in service["volumes"]:
            source, where = re.fullmatch(
                r"(?:\$\{\w+:-)?([\w-]+)\}?:([^:]+)(?::ro)?", volume
            ).groups()
            assert source in COMPOSE["volumes"], name
            assert where.startswith("/work/")


def test_a_client_has_its_own_data_and_key_alone() -> None:
    for number, other in ((0, 1), (1, 0)):
        held = " ".join(SERVICES[f"client-{number}"]["volumes"])
        assert f"data-{number}" in held
        assert f"key-{number}:/work/key:ro" in held
        for secret in (f"data-{other}", f"key-{other}", "authority", "server-key"):
            assert secret not in held
    server = " ".join(SERVICES["server"]["volumes"])
    assert not re.search(r"data-|key-\d|authority|cache", server)
