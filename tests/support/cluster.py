"""A whole Flower deployment on this machine: SuperLink, SuperNodes, TLS and node keys.

End-to-end tests start it as a user would, with Flower's own commands, in a folder of the test:

    with Cluster(tmp_path, nodes=2) as cluster:
        for index in range(2):
            cluster.start_node(index, {"partition-id": index, "num-partitions": 2})
        run_id = cluster.run(app_dir, {"rounds": 3})
        assert cluster.wait(run_id, timeout=60) == "finished:completed", cluster.log(run_id)

Everything listens on 127.0.0.1 and is stopped by its process id when the block ends.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"
BIN = Path(sysconfig.get_path("scripts"))
CONNECTION = "test"  # the name of the SuperLink in Flower's config.toml
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # s; apps start sooner than with Flower's 1 s
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "NO_PROXY": HOST,
}


class Cluster:
    """A SuperLink and up to `nodes` SuperNodes; `secure` means TLS and registered node keys.

    With `simulation`, not secure, it simulates so many SuperNodes itself.

    The output of the SuperLink is in `folder/superlink.log`, that of SuperNode i and of its
    client apps in `folder/node-i.log`. What a server app prints goes only to `log(run_id)`.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        *,
        secure: bool = True,
        simulation: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.nodes = nodes
        self.secure = secure
        self.simulation = simulation
        self.port = free_port()
        self.node_ids: dict[int, int] = {}
        self.ca = folder / "ca.pem"
        self.certificate = folder / "server.pem"
        self.key = folder / "server.key"
        self._environment = {
            **os.environ,
            **ENVIRONMENT,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "home"),
            **(environment or {}),
        }
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._runs = 0

    def __enter__(self) -> Self:
        try:
            self._start_superlink()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        with ExitStack() as stack:  # last started, first stopped; a failure does not spare the rest
            for name in self._started:
                stack.callback(self._stop, name)

    def start_node(
        self, index: int, node_config: Mapping[str, object], timeout: float = 300
    ) -> int:
        """Start SuperNode `index`, wait until the SuperLink knows it, and return its node id.

        A node that was killed counts as online until its heartbeats have been missing for 60 s,
        and the SuperLink turns the same key away until then: this tries again until `timeout`.
        """
        name = f"node-{index}"
        if name in self._started:
            raise ValueError(f"{name} runs already")
        if not 0 <= index < self.nodes:
            raise ValueError(f"No {name} in a cluster of {self.nodes}")
        command = ["flower-supernode", "--superlink", f"{HOST}:{self.port}"]
        command += ["--host", HOST, "--port", str(free_port())]
        command += ["--node-config", " ".join(toml_lines(node_config, "="))]
        if self.secure:
            command += ["--root-certificates", str(self.ca)]
            command += ["--auth-supernode-private-key", str(self.folder / name)]
        else:
            command += ["--insecure"]

        start = len(self.output(name))

        def connected() -> str:
            said = self.output(name)[start:]
            if (process := self._started.get(name)) is None or process.poll() is not None:
                if process is not None and "Failed to activate SuperNode" not in said:
                    raise RuntimeError(f"{name} ended:\n{self._tail(name)}")
                # Each node has a home of its own, as on a machine of its own.
                self._start(name, command, FLWR_HOME=str(self.folder / f"{name}-home"))
            return said.rpartition("SuperNode ID: ")[2].partition("\n")[0]

        self._until(lambda: connected().isdigit(), timeout, f"{name} did not connect", name)
        self.node_ids[index] = int(connected())
        return self.node_ids[index]

    def stop_node(self, index: int, *, kill: bool = False) -> None:
        """Stop SuperNode `index`; with `kill`, it and its client apps go as in a power cut."""
        self._stop(f"node-{index}", kill=kill)

    def run(self, app_dir: Path, config: Mapping[str, object] | None = None) -> int:
        """Submit the app with these values of its run config and return the run id."""
        command = ["run", str(app_dir), CONNECTION]
        if config:
            self._runs += 1
            overrides = self.folder / f"run-{self._runs}.toml"
            overrides.write_text("\n".join(toml_lines(config, " = ")), encoding="utf-8")
            command += ["--run-config", str(overrides)]
        if self.simulation:
            command += ["--federation-config", f"num-supernodes={self.simulation}"]
        return int(self._ask(*command)["run-id"])

    def info(self, run_id: int) -> dict[str, Any]:
        """Return what `flwr ls` knows of a run: status, status-details, network-traffic."""
        (row,) = self._ask("ls", CONNECTION, "--run-id", str(run_id))["runs"]
        return dict(row)

    def wait(self, run_id: int, timeout: float) -> str:
        """Wait until the run has ended; "finished:completed", ":failed" or ":stopped"."""
        status = ""

        def finished() -> bool:
            nonlocal status
            if self.processes("server"):  # a question is a Python that takes a second of a core
                return False
            status = str(self.info(run_id)["status"])
            return status.startswith("finished")

        self._until(finished, timeout, f"Run {run_id} did not end", *self._started, pause=0.5)
        return status

    def log(self, run_id: int) -> str:
        """Return what the server app has logged and printed so far."""
        return self._flwr("log", str(run_id), CONNECTION, "--show")

    def stop(self, run_id: int) -> None:
        """Stop a run as `flwr stop` does."""
        self._flwr("stop", str(run_id), CONNECTION)

    def processes(self, of: str | int) -> list[int]:
        """Return the process ids of the server apps (of="server") or of node `of`'s client apps.

        In a simulation, of="server" has the processes that simulate.
        Flower starts a client app anew if it dies before it has taken its message; to test what
        comes after, wait for some output of the app before you kill it.
        """
        serving = "flwr-simulation" if self.simulation else "flwr-serverapp"
        name, program = (
            ("superlink", serving) if of == "server" else (f"node-{of}", "flwr-clientapp")
        )
        if name not in self._started:
            return []
        return [p.pid for p in family(self._started[name].pid) if program in p.arguments]

    def output(self, name: str) -> str:
        """Return the output so far of "superlink" or "node-0", "node-1", ..."""
        path = self._path(name)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait_for_output(self, name: str, text: str, timeout: float, start: int = 0) -> None:
        """Wait until this text is in `output(name)[start:]`."""
        self._until(
            lambda: text in self.output(name)[start:], timeout, f"No {text!r} in {name}", name
        )

    def _start_superlink(self) -> None:
        connection: dict[str, object] = {"address": f"{HOST}:{self.port}"}
        command = ["flower-superlink", "--host", HOST, "--port", str(self.port)]
        command += ["--disable-runtime-dependency-installation"]
        if self.secure:
            write_certificates(self.ca, self.certificate, self.key)
            connection["root-certificates"] = str(self.ca)
            command += ["--ssl-ca-certfile", str(self.ca), "--ssl-certfile", str(self.certificate)]
            command += ["--ssl-keyfile", str(self.key), "--enable-supernode-auth"]
        else:
            connection["insecure"] = True
            command += ["--insecure", *(["--simulation"] if self.simulation else [])]
        home = self.folder / "home"
        home.mkdir()
        sections = ["[superlink]", f'default = "{CONNECTION}"', f"[superlink.{CONNECTION}]"]
        config = "\n".join([*sections, *toml_lines(connection, " = "), ""])
        (home / "config.toml").write_text(config, encoding="utf-8")

        self._start("superlink", command)
        self._until(self._listens, 240, "The SuperLink did not start", "superlink")
        if self.secure:
            for index in range(self.nodes):
                public = write_node_key(self.folder / f"node-{index}")
                self._flwr(
                    "supernode", "register", str(public), CONNECTION, "--name", f"node-{index}"
                )

    def _listens(self) -> bool:
        if self._started["superlink"].poll() is not None:
            raise RuntimeError(f"The SuperLink ended:\n{self._tail('superlink')}")
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

    def _start(self, name: str, command: list[str], **environment: str) -> None:
        with self._path(name).open("ab") as output:
            self._started[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment | environment,
                cwd=self.folder,
                start_new_session=True,
            )

    def _stop(self, name: str, *, kill: bool = False) -> None:
        """End a process that we started and all that it started: ask first, then kill."""
        process = self._started.pop(name, None)
        if process is None:
            return
        relatives = family(process.pid)
        if not kill:
            process.terminate()
            try:
                process.wait(timeout=10)
                wait_until(lambda: not alive(relatives), timeout=5)
            except (subprocess.TimeoutExpired, TimeoutError):
                kill = True
        if kill:
            process.kill()
            for survivor in alive(relatives):
                with suppress(ProcessLookupError):
                    os.kill(survivor.pid, signal.SIGKILL)
        process.wait(timeout=60)
        wait_until(lambda: not alive(relatives), timeout=60)

    def _flwr(self, *arguments: str) -> str:
        """Run a `flwr` command and return what it printed."""
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self._environment,
            cwd=self.folder,
            timeout=300,
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"flwr {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}"
                f"{done.stderr}\n{self._tail('superlink')}"
            )
        return done.stdout

    def _ask(self, *arguments: str) -> dict[str, Any]:
        """Run a `flwr` command that answers in JSON; it ends with 0 even if it is refused."""
        printed = self._flwr(*arguments, "--format", "json")
        answer = json.loads(printed)
        if not answer["success"]:
            raise RuntimeError(f"flwr {' '.join(arguments)}: {printed}")
        return dict(answer)

    def _until(
        self,
        condition: Callable[[], bool],
        timeout: float,
        failure: str,
        *names: str,
        pause: float = 0.1,
    ) -> None:
        try:
            wait_until(condition, timeout, pause)
        except TimeoutError:
            tails = "\n".join(self._tail(name) for name in names)
            raise TimeoutError(f"{failure} within {timeout:g} s.\n{tails}") from None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _tail(self, name: str, lines: int = 30) -> str:
        text = "\n".join(self.output(name).splitlines()[-lines:])
        return f"--- the end of {self._path(name)}\n{text}"


class Process(NamedTuple):
    """A process as `ps` shows it."""

    pid: int
    parent: int
    group: int
    arguments: str


def running() -> list[Process]:
    """Return all processes of this machine but the zombies."""
    command = ["ps", "-A", "-ww", "-o", "pid=,ppid=,pgid=,stat=,args="]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=4) for line in table.splitlines()]
    return [
        Process(int(row[0]), int(row[1]), int(row[2]), row[4])
        for row in rows
        if len(row) == 5 and not row[3].startswith("Z")
    ]


def family(pid: int) -> list[Process]:
    """Return the descendants of a process and the members of its process group."""
    table = running()
    known = {pid}
    while more := {p.pid for p in table if {p.parent, p.group} & known} - known:
        known |= more
    return [p for p in table if p.pid in known - {pid}]


def alive(processes: list[Process]) -> list[Process]:
    """Return those that still run; a process that lost its parent has another one now."""
    wanted = {(p.pid, p.arguments) for p in processes}
    return [p for p in running() if (p.pid, p.arguments) in wanted]


def wait_until(condition: Callable[[], bool], timeout: float, pause: float = 0.1) -> None:
    """Ask again and again, with short sleeps; TimeoutError if it does not come true in time."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"Not within {timeout:g} s")
        time.sleep(pause)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def toml_lines(values: Mapping[str, object], equals: str) -> list[str]:
    """Write numbers, strings and truth values as TOML; a dot in a key makes a table."""
    return [f"{key}{equals}{json.dumps(value)}" for key, value in values.items()]


def write_certificates(ca: Path, certificate: Path, key: Path) -> None:
    """Make an authority and its certificate for 127.0.0.1 and localhost, valid for a day."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    server_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Meerkat tests")])
    server_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]

    def signed(
        subject: x509.Name, public: ec.EllipticCurvePublicKey, *extensions: x509.ExtensionType
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
        )
        for extension in extensions:
            critical = isinstance(extension, (x509.BasicConstraints, x509.KeyUsage))
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    authority = x509.BasicConstraints(ca=True, path_length=0)
    ca.write_bytes(signed(ca_name, ca_key.public_key(), authority, usage))
    certificate.write_bytes(
        signed(server_name, server_key.public_key(), x509.SubjectAlternativeName(names))
    )
    key.write_bytes(
        server_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def write_node_key(path: Path) -> Path:
    """Write a SuperNode's key as `ssh-keygen -t ecdsa` does; return the path of its public half."""
    private = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    public = path.with_suffix(".pub")
    public.write_bytes(
        private.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    )
    return public
