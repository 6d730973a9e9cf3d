"""The append-only record of a run (SQLite, write-ahead log): replay and resume read it.

The journal *is* the model: θ at any round follows from its header and its log entries, without
model or data (method.md section 6). Each round is one transaction and carries a digest chained
over all rounds before it, so that damage is found, and what lies before the damage is kept.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from meerkat.errors import JournalError, ProtocolError
from meerkat.federation.messages import ClientReport
from meerkat.federation.rounds import RoundRecord
from meerkat.federation.selection import Decision
from meerkat.journal.codec import decode_report, decode_updates, encode_report, encode_updates
from meerkat.journal.records import Evaluated, RoundMetrics
from meerkat.journal.store import Store, chain_digest
from meerkat.zo.state import ModelState

__all__ = ["Journal", "replay"]


class Journal(Store):
    """One run's record. Use `create` or `open`.

    Every write is durable when the call returns. A failed one leaves all before it readable.
    """

    @classmethod
    def open(cls, path: Path) -> Journal:
        """An existing journal, checked from end to end.

        Raises:
            JournalError: There is none, another version wrote it, or it is damaged; the line says
                up to where it is good.
        """
        if not cls.exists(path):
            raise JournalError(f"{path}: no journal; the run has not begun")
        journal = cls(path, sqlite3.connect(path, isolation_level=None))
        try:
            good = journal._verify()
        except JournalError:
            journal.close()
            raise
        if good is not None:
            journal.close()
            raise JournalError(
                f"{path} is damaged after {good} good rounds; `meerkat resume --recover` keeps "
                "these, sets the damaged file aside and goes on"
            )
        return journal

    @classmethod
    def recover(cls, path: Path) -> Journal:
        """Keep the good part of a damaged journal; the damaged file is set aside beside it.

        Raises:
            JournalError: Not even the header is readable, or another version wrote it.
        """
        damaged = cls(path, sqlite3.connect(path, isolation_level=None))
        scratch = path.with_name(path.name + ".recovered")
        scratch.unlink(missing_ok=True)
        try:
            kept = cls.create(scratch, damaged.header, damaged.theta0)
            evaluations = {e.round: e for e in damaged._readable_evaluations()}
            for record, metrics in damaged._good_rounds():
                if record.round in evaluations:
                    kept.append_evaluation(evaluations.pop(record.round))
                kept.append_round(record, metrics)
            if kept.rounds in evaluations:
                kept.append_evaluation(evaluations[kept.rounds])
            kept.append_calibrations(list(damaged.calibrations()))
            for decision in damaged.decisions():
                if decision.round <= kept.rounds:
                    kept.append_decision(decision)
        except (sqlite3.DatabaseError, KeyError, TypeError, ValueError) as error:
            raise JournalError(
                f"{path}: not even its header is readable ({error}); start the run again in "
                "another directory"
            ) from None
        finally:
            damaged.close()
        kept.close()
        aside = path.with_name(path.name + ".damaged")
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.replace(aside)
        scratch.replace(path)
        return cls.open(path)

    # What a run writes

    def append_round(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        """Write a round and its reports, in one transaction.

        Raises:
            JournalError: The disk is full, or the file cannot be written; nothing of it is kept.
        """
        updates = encode_updates(record.updates)
        payloads = [(r.client, encode_report(r)) for r in record.reports]
        chain = chain_digest(self._chain, record.round, updates, record.state_digest, payloads)
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?, ?)",
                (record.round, updates, record.state_digest, json.dumps(asdict(metrics)), chain),
            )
            connection.executemany(
                "INSERT INTO reports VALUES (?, ?, ?)",
                [(record.round, client, payload) for client, payload in payloads],
            )
        self._chain = chain

    def append_evaluation(self, evaluated: Evaluated) -> None:
        """Write an evaluation.

        Raises:
            JournalError: As `append_round`.
        """
        with self._writing() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO evaluations VALUES (?, ?)",
                (evaluated.round, json.dumps(asdict(evaluated))),
            )

    def append_calibrations(self, reports: Sequence[ClientReport]) -> None:
        """Write what clients answered to their calibration plans, in one transaction.

        Raises:
            JournalError: As `append_round`.
        """
        rows = [(report.client, encode_report(report)) for report in reports]
        with self._writing() as connection:
            connection.executemany(
                "INSERT INTO calibrations VALUES (?, ?, ?)",
                [(client, payload, self._seal(payload)) for client, payload in rows],
            )

    def append_decision(self, decision: Decision) -> None:
        """Write which clients are stopped early from a round on.

        Raises:
            JournalError: As `append_round`.
        """
        content = decision.to_json().encode()
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO decisions (content, seal) VALUES (?, ?)",
                (content, self._seal(content)),
            )

    # What everyone reads

    @property
    def rounds(self) -> int:
        """Complete rounds."""
        return self._count("rounds")

    def records(self, start: int = 0) -> Iterator[tuple[RoundRecord, RoundMetrics]]:
        """All rounds in order, from number `start` on."""
        for row in self._rows(start):
            yield self._decode(*row[:3]), RoundMetrics(**json.loads(row[3]))

    def evaluations(self) -> list[Evaluated]:
        """All evaluations by round."""
        rows = self._connection.execute("SELECT content FROM evaluations ORDER BY round")
        return [Evaluated(**json.loads(content)) for (content,) in rows]

    def calibrated(self) -> set[int]:
        """Clients whose answer to a calibration plan is here."""
        return {row[0] for row in self._connection.execute("SELECT client FROM calibrations")}

    def calibrations(self) -> Iterator[ClientReport]:
        """Answers to calibration plans, by client."""
        for payload in self._sealed("SELECT payload, seal FROM calibrations ORDER BY client"):
            yield decode_report(payload)

    def decisions(self) -> list[Decision]:
        """All decisions in the order they were made; the last is in force."""
        rows = self._sealed("SELECT content, seal FROM decisions ORDER BY made")
        return [Decision.from_json(content.decode()) for content in rows]

    # Within

    def _rows(self, start: int = 0) -> Iterator[tuple[int, bytes, str, str, bytes]]:
        query = (
            "SELECT round, updates, digest, metrics, chain FROM rounds WHERE round >= ? "
            "ORDER BY round"
        )
        yield from self._connection.execute(query, (start,))

    def _payloads(self, number: int) -> list[tuple[int, bytes]]:
        query = "SELECT client, payload FROM reports WHERE round = ? ORDER BY client"
        return self._connection.execute(query, (number,)).fetchall()

    def _decode(self, number: int, updates: bytes, digest: str) -> RoundRecord:
        reports: list[ClientReport] = [decode_report(data) for _, data in self._payloads(number)]
        return RoundRecord(number, tuple(reports), decode_updates(updates), digest)

    def _good_rounds(self) -> Iterator[tuple[RoundRecord, RoundMetrics]]:
        """Rounds up to the first that is missing, unreadable, or does not match its digest."""
        chain = self._header_digest()
        try:
            for expected, row in enumerate(self._rows()):
                number, updates, digest, metrics, stored = row
                payloads = self._payloads(number)
                chain = chain_digest(chain, number, updates, digest, payloads)
                if number != expected or chain != stored:
                    return
                yield (
                    self._decode(number, updates, digest),
                    RoundMetrics(**json.loads(metrics)),
                )
                self._chain = chain
        except (sqlite3.DatabaseError, ProtocolError, ValueError, TypeError):
            return

    def _verify(self) -> int | None:
        """None if all is well, else how many rounds are good; leaves the chain at its end."""
        try:
            self._connection.execute("BEGIN")  # one moment of a run that may be under way
            self._chain = self._header_digest()
            good = sum(1 for _ in self._good_rounds())
            broken = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok"
            kept = sum(1 for _ in self.calibrations()), len(self.decisions())
            whole = kept == (self._count("calibrations"), self._count("decisions"))
            return good if broken or not whole or good != self.rounds else None
        except (sqlite3.DatabaseError, ValueError, KeyError, TypeError):
            return 0
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _readable_evaluations(self) -> list[Evaluated]:
        try:
            return self.evaluations()
        except (sqlite3.DatabaseError, ValueError, TypeError):
            return []


def replay(journal: Journal, rounds: int | None = None) -> ModelState:
    """The state after so many rounds (all by default), from the journal alone.

    Raises:
        JournalError: There are fewer rounds, or the state is not what the run recorded.
    """
    available = journal.rounds
    wanted = available if rounds is None else rounds
    if not 0 <= wanted <= available:
        raise JournalError(f"round {wanted} is not in {journal.path}: it has {available} rounds")
    algorithm = journal.header.algorithm
    state = algorithm.init(journal.theta0)
    recorded = state.digest
    for record, _ in journal.records():
        if record.round >= wanted:
            break
        state = algorithm.apply(state, record.updates)
        recorded = record.state_digest
    if state.digest != recorded:
        raise JournalError(
            f"{journal.path}: the state after round {wanted} has digest {state.digest[:16]}, the "
            f"run recorded {recorded[:16]}; this machine's noise or arithmetic differs"
        )
    return state
