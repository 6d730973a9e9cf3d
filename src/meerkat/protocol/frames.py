"""What server and client say to each other: one byte that names the kind, then its content.

    server                                client
    Setup ──────────────────────────────▶         what the run is, and what must be proved
          ◀────────────────────── WantMask        only if it has no mask with that digest
    MaskFile ───────────────────────────▶
          ◀───────────────────────── Hello        who it is, what it holds, how far its θ is
    Welcome or Refused ─────────────────▶
    Entries or Snapshot, Plan ──────────▶
          ◀───────── Report, Need or Failed       Need: its θ is behind what the plan starts from
    Notice ─────────────────────────────▶         only if the answer is not used
    Evaluate ───────────────────────────▶
          ◀──────────── Evaluation or Failed
    Goodbye ────────────────────────────▶

Both transports carry the same frames: `messages` in Flower messages, `stream` one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from meerkat.protocol.messages import ClientReport, LogEntry, RoundPlan

__all__ = [
    "DownFrame",
    "Entries",
    "Evaluate",
    "Evaluation",
    "Failed",
    "Goodbye",
    "Hello",
    "MaskFile",
    "Need",
    "Notice",
    "Plan",
    "Proof",
    "Refused",
    "Report",
    "Setup",
    "Snapshot",
    "UpFrame",
    "WantMask",
    "Welcome",
]


@dataclass(frozen=True)
class Proof:
    """What server and client must have in common (method.md section 6), as hexadecimal SHA-256."""

    model: str
    """Fingerprint of the base model."""
    mask: str
    """Digest of the mask."""
    noise: str
    """Fingerprint of the noise generator."""


# Server to client


@dataclass(frozen=True)
class Setup:
    """What the run is, and what must be proved."""

    recipe: str
    """The recipe as JSON."""
    proof: Proof
    session: str
    """A name that no other start of a server has."""
    remember: bool
    """Must θ outlive the process, since each message may come to a new one?"""


@dataclass(frozen=True)
class MaskFile:
    """The mask as a file, without the pre-training gradient."""

    content: bytes


@dataclass(frozen=True)
class Welcome:
    """The client takes part from now on."""


@dataclass(frozen=True)
class Refused:
    """The client does not take part; the line says why, and the way out."""

    reason: str


@dataclass(frozen=True)
class Entries:
    """The log from a position on."""

    position: int
    entries: tuple[LogEntry, ...]


@dataclass(frozen=True)
class Snapshot:
    """θ after so many log entries, where that is smaller than the entries."""

    position: int
    theta: bytes
    """float32 values."""


@dataclass(frozen=True)
class Plan:
    """What the client is asked to do in a round."""

    plan: RoundPlan


@dataclass(frozen=True)
class Evaluate:
    """Measure θ, as it is after so many log entries, on the client's held-out examples."""

    round: int
    position: int


@dataclass(frozen=True)
class Notice:
    """An answer was not used; the line says why."""

    reason: str


@dataclass(frozen=True)
class Goodbye:
    """The run is over for this client."""

    reason: str


# Client to server


@dataclass(frozen=True)
class WantMask:
    """The client has no mask with the digest of the setup."""


@dataclass(frozen=True)
class Hello:
    """Who a client is and what it holds."""

    client: int
    examples: int
    """To train on."""
    held_out: int
    """To evaluate on."""
    position: int
    """Log entries that its θ contains."""
    proof: Proof


@dataclass(frozen=True)
class Report:
    """The answer to a plan."""

    report: ClientReport


@dataclass(frozen=True)
class Need:
    """The plan or evaluation starts after the log entries that the client has."""

    position: int


@dataclass(frozen=True)
class Evaluation:
    """The answer to `Evaluate`: sums, which add up over clients."""

    round: int
    examples: int
    loss: float
    """Summed over the examples."""
    confusion: tuple[tuple[int, ...], ...]
    """[label][prediction] counts; empty for free text."""


@dataclass(frozen=True)
class Failed:
    """The client could not do what it was asked."""

    reason: str


DownFrame: TypeAlias = (
    Setup | MaskFile | Welcome | Refused | Entries | Snapshot | Plan | Evaluate | Goodbye | Notice
)
UpFrame: TypeAlias = WantMask | Hello | Report | Need | Evaluation | Failed
