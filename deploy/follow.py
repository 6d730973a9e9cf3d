"""Run the commands of docs/deploy.md on this machine, in a folder of its own.

    python deploy/follow.py                     # free ports, a temporary folder
    python deploy/follow.py --folder trial      # keep what comes out
    python deploy/follow.py --print             # show the shell script instead

Blocks marked `bash` are run in their order by one shell; those marked `bash service` go on in the
background. When the last block has ended, or one has failed, all that was started is stopped.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs/deploy.md"
READY = "Uvicorn running"
"""What SuperLink and SuperNodes print when they are up."""

PROLOGUE = """set -euo pipefail
set -m  # each service is a process group of its own
services=()
finish() { for group in "${services[@]}"; do kill -- "-$group" 2>/dev/null || true; done; wait; }
trap finish EXIT
ready() {  # pid, log
    for _ in $(seq 120); do
        grep -q "%s" "$2" && return
        kill -0 "$1" 2>/dev/null || break
        sleep 0.5
    done
    cat "$2"; echo "follow: this service did not start"; exit 1
}
"""


def script(guide: str, values: dict[str, str]) -> str:
    """The guide as a shell script, with other values for the variables of its first block."""
    parts, services = [PROLOGUE % READY], 0
    for kind, block in re.findall(r"^```bash( service)?\n(.*?)^```$", guide, re.M | re.S):
        for name, value in values.items():
            block = re.sub(rf"^{name}=\S+", f"{name}={value}", block, flags=re.M)
            block = re.sub(rf"--port {name}\b", f"--port {value}", block)
        if kind:
            log = f"service-{services}.log"
            services += 1
            parts.append(f"(\n{block}) > {log} 2>&1 &\nservices+=($!)\nready $! {log}\n")
        else:
            parts.append("set -x\n" + block + "{ set +x; } 2>/dev/null\n")
    return "\n".join(parts)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work; must not exist")
    parser.add_argument("--print", action="store_true", help="show the script instead")
    given = parser.parse_args()
    names = ("PORT", "STREAM", "9094", "9095")
    values = {**{name: free_port() for name in names}, "APP": str(ROOT)}
    text = script(GUIDE.read_text("utf-8"), values)
    if given.print:
        print(text)
        return 0
    # The commands of the environment that this script runs in.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.folder or Path(scratch) / "trial").resolve()
        folder.mkdir(parents=True)
        shell = subprocess.Popen(["bash", "-c", text], cwd=folder, env={**os.environ, "PATH": path})
        try:
            return shell.wait()
        except KeyboardInterrupt:
            shell.send_signal(signal.SIGTERM)
            return shell.wait()


if __name__ == "__main__":
    sys.exit(main())
