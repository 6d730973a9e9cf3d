"""`meerkat push` to a stand-in hub: what is uploaded, as whom, and what is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import invoke, refused
from hub import running_hub

PUSH = "import sys; from meerkat.cli import app; app(['push', *sys.argv[1:]])"


def push(address: str, *arguments: object, token: str = "hf_mine") -> subprocess.CompletedProcess:
    """The command in a process of its own, in which the hub is at this address."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", PUSH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export, as far as a hub sees one."""
    folder = tmp_path / "merged"
    folder.mkdir()
    content = {"README.md": b"# Mine\n", "model.safetensors": bytes(2000), "config.json": b"{}"}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    files = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    (folder / "meerkat.json").write_text(json.dumps({"format": "meerkat-export-1", "files": files}))
    return folder


@pytest.mark.slow
def test_what_an_export_wrote_is_pushed_and_nothing_else(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine, edited\n")
    (folder / "diary.txt").write_text("private")
    with running_hub() as hub:
        done = push(hub.address, folder, "me/mine")
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.address}/me/mine" in done.stdout
    assert [(made["name"], made["visibility"]) for made in hub.made] == [("mine", "private")]
    assert hub.tokens == {"Bearer hf_mine"}
    names = {"README.md", "model.safetensors", "config.json", "meerkat.json"}
    assert hub.files == {name: (folder / name).read_bytes() for name in names}


@pytest.mark.slow
def test_a_hub_that_refuses_or_is_not_there_gives_one_line(folder: Path) -> None:
    with running_hub(refuses=401) as hub:
        done = push(hub.address, folder, "me/mine")
    assert done.returncode == 2
    assert done.stderr.startswith("meerkat: push to me/mine: the hub says 401")
    assert "hf auth login" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not hub.files
    done = push(hub.address, folder, "me/mine")  # it is closed by now
    assert done.returncode == 2
    assert done.stderr.startswith("meerkat: push to me/mine: ")
    assert len(done.stderr.splitlines()) == 1


def test_what_no_export_wrote_is_refused(folder: Path, tmp_path: Path) -> None:
    refused(invoke("push", tmp_path, "me/mine"), "has no meerkat.json", "meerkat export")
    refused(invoke("push", folder, "not a name"), "push to not a name")
    refused(invoke("push", folder, "me/mine"), "push to me/mine")  # offline, as all tests are
    (folder / "config.json").write_text('{"other": 1}')
    refused(invoke("push", folder, "me/mine"), "config.json is not what `meerkat export` wrote")
    (folder / "config.json").unlink()
    refused(invoke("push", folder, "me/mine"), "lacks its file config.json")
    listed = {"format": "meerkat-export-1", "files": {"../secret": "0"}}
    (folder / "meerkat.json").write_text(json.dumps(listed))
    refused(invoke("push", folder, "me/mine"), "lacks its file ../secret")
    for damaged in ("", "{}", '{"format": "meerkat-export-9", "files": {"a": "b"}}'):
        (folder / "meerkat.json").write_text(damaged)
        refused(invoke("push", folder, "me/mine"), "meerkat.json is damaged")
