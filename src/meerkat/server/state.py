"""What the server knows between two rounds: O(n) floats, O(K) integers and the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from meerkat.descent import Theta
from meerkat.protocol import LogEntry, decode_entries, encode_entries

__all__ = ["Log", "ServerState", "initial_state"]


class Log:
    """The append-only list of log entries, 24 bytes each (method.md section 6)."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._width = len(encode_entries([LogEntry(0, 0, 0, 0, 0.0, 0.0)]))

    def __len__(self) -> int:
        return len(self._bytes) // self._width

    def append(self, entries: Sequence[LogEntry]) -> None:
        self._bytes += encode_entries(entries)

    def since(self, position: int) -> tuple[LogEntry, ...]:
        """Entries from this position on."""
        return decode_entries(bytes(self._bytes[position * self._width :]))


@dataclass(frozen=True)
class ServerState:
    """The state before a round; `rounds.close_round` makes the next one."""

    round: int
    """Number of the round to come, from 0."""
    theta: Theta
    """θ_r; read-only."""
    theta_digest: str
    known: Int64[np.ndarray, " K"]
    """Log entries that each client has."""
    steps_taken: Int64[np.ndarray, " K"]
    """Local steps that each client took; its data pointer."""
    local_steps: Int64[np.ndarray, " K"]
    """T_k."""


def initial_state(theta: Theta, theta_digest: str, clients: int, local_steps: int) -> ServerState:
    """The state before round 0, with `local_steps` for every client."""
    return ServerState(
        0,
        _read_only(theta),
        theta_digest,
        _read_only(np.zeros(clients, np.int64)),
        _read_only(np.zeros(clients, np.int64)),
        _read_only(np.full(clients, local_steps, np.int64)),
    )


def _read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array
