"""A stand-in for a model hub on 127.0.0.1: takes what `HfApi` uploads, and keeps it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Hub", "running_hub"]


class Hub(ThreadingHTTPServer):
    """Keeps repositories, and the files of their commits.

    Args:
        refuses: Status that a new repository is answered with, if not made.
    """

    daemon_threads = True

    def __init__(self, refuses: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuses = refuses
        self.made: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length is not None else self._chunks()
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif path.endswith("/commit/main"):
            self._commit(body)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self._answer({"error": f"not here: {path}"}, 404)

    def _create(self, wanted: dict[str, Any]) -> None:
        if self.server.refuses:
            self._answer({"error": "no"}, self.server.refuses)
            return
        self.server.made.append(wanted)
        owner = wanted.get("organization") or "me"
        self._answer({"url": f"{self.server.address}/{owner}/{wanted['name']}"})

    def _commit(self, body: bytes) -> None:
        for line in body.splitlines():
            part = json.loads(line)
            if part["key"] == "file":
                value = part["value"]
                self.server.files[value["path"]] = base64.b64decode(value["content"])
        address = f"{self.server.address}/me/mine"
        commit = {"commitUrl": f"{address}/commit/{'0' * 40}", "commitOid": "0" * 40}
        self._answer({**commit, "success": True, "hookOutput": ""})

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def running_hub(refuses: int = 0) -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub(refuses)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
