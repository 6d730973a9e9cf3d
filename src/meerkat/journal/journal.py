"""The append-only record of a run (SQLite, write-ahead log): replay and resume read it.

The journal *is* the model: θ at any round follows from its header and its log entries, without
model or data (method.md section 6). Each round is one transaction and carries a digest chained
over all rounds before it, so that damage is found, and what lies before the damage is kept.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from meerkat.errors import JournalError
from meerkat.federation.messages import ClientReport
from meerkat.federation.rounds import RoundRecord
from meerkat.federation.selection import Decision
from meerkat.journal.codec import decode_report, decode_updates, encode_report, encode_updates
from meerkat.journal.records import Checkpoint, Evaluated, Renewal, RoundMetrics
from meerkat.journal.store import Store, chain_digest, check_damage

__all__ = ["Journal"]


class Journal(Store):
    """One run's record. Use `create` or `open`.

    Every write is durable when the call returns. A failed one leaves all before it readable.
    """

    @classmethod
    def open(cls, path: Path, read_only: bool = False, audit: bool = False) -> Journal:
        """An existing journal, checked from its last checkpoint on.

        Args:
            read_only: For commands that write nothing.
            audit: Check it from end to end, which takes minutes for millions of records.

        Raises:
            JournalError: There is none, another version wrote it, or it is damaged; the line says
                up to where it is good.
        """
        if not cls.exists(path):
            raise JournalError(f"{path}: no journal; the run has not begun")
        journal = cls(path, cls.connect(path, read_only))
        try:
            good = journal._verify(audit)
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
        damaged = cls(path, cls.connect(path))
        scratch = path.with_name(path.name + ".recovered")
        scratch.unlink(missing_ok=True)
        try:
            kept = cls.create(scratch, damaged.header, damaged.theta0)
            evaluations = {e.round: e for e in damaged._readable_evaluations()}
            renewals = {renewal.round: renewal for renewal in damaged.renewals()}
            began = damaged._rounds_renewed()
            for record, metrics in damaged._good_rounds():
                if record.round in began and record.round not in renewals:
                    break  # from here on no state follows without it; it is made again
                if record.round in renewals:
                    kept.append_renewal(renewals[record.round])
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
            check_damage(error, path)
            raise JournalError(
                f"{path}: not even its header is readable ({error}); start the run again in "
                "another directory"
            ) from None
        finally:
            damaged.close()
        kept.close()
        aside = path.with_name(path.name + ".damaged")
        # A kill at any moment leaves a journal in place: the damaged one, or the recovered one.
        shutil.copy2(path, aside)
        wal = path.with_name(path.name + "-wal")
        if wal.exists():  # it could not be written into the damaged file, and holds rounds of it
            shutil.copy2(wal, aside.with_name(aside.name + "-wal"))
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
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

    def append_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write where a run stands after its last round; the last two are kept.

        Raises:
            JournalError: As `append_round`.
        """
        content = checkpoint.encode()
        seal = self._seal(content + self._chain)
        with self._writing() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?)",
                (checkpoint.round, content, self._chain, seal),
            )
            connection.execute(
                "DELETE FROM checkpoints WHERE round NOT IN "
                "(SELECT round FROM checkpoints ORDER BY round DESC LIMIT 2)"
            )

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

    def append_renewal(self, renewal: Renewal) -> None:
        """Write that a subspace was made again; its mask is in the run's directory by then.

        Raises:
            JournalError: As `append_round`.
        """
        content = renewal.encode()
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO renewals VALUES (?, ?, ?)",
                (renewal.round, content, self._seal(content)),
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

    def renewals(self, before: int | None = None) -> list[Renewal]:
        """Subspaces that were made in mid-run, by round.

        Args:
            before: Only those whose first round comes before this one.
        """
        rows = self._sealed("SELECT content, seal FROM renewals ORDER BY round")
        found = map(Renewal.decode, rows)
        return [renewal for renewal in found if before is None or renewal.round < before]

    def checkpoints(self) -> Iterator[Checkpoint]:
        """The checkpoints that are whole, the last one first."""
        return (checkpoint for checkpoint, _ in self._checkpoints())

    def checkpoint(self, most: int | None = None) -> Checkpoint | None:
        """The last whole checkpoint of at most so many rounds; None where there is none."""
        found = (c for c in self.checkpoints() if most is None or c.round <= most)
        return next(found, None)

    def state_digest(self, rounds: int) -> str:
        """Digest of the state after so many rounds, at least one."""
        query = "SELECT digest FROM rounds WHERE round = ?"
        digest: str = self._connection.execute(query, (rounds - 1,)).fetchone()[0]
        return digest

    # Within

    def _rounds_renewed(self) -> set[int]:
        """Rounds with a renewal, damaged or not."""
        return {row[0] for row in self._connection.execute("SELECT round FROM renewals")}

    def _checkpoints(self) -> Iterator[tuple[Checkpoint, bytes]]:
        """Each whole checkpoint with the chained digest of the rounds before it."""
        query = "SELECT content, chain, seal FROM checkpoints ORDER BY round DESC"
        for content, chain, seal in self._connection.execute(query).fetchall():
            if isinstance(content, bytes) and seal == self._seal(content + chain):
                yield Checkpoint.decode(content), chain

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

    def _good_rounds(self, start: int = 0) -> Iterator[tuple[RoundRecord, RoundMetrics]]:
        """Rounds up to the first that is missing, unreadable, or does not match its digest."""
        if not start:
            self._chain = self._header_digest()
        chain = self._chain
        try:
            for expected, row in enumerate(self._rows(start), start=start):
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
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            check_damage(error, self.path)
            return

    def _verify(self, audit: bool) -> int | None:
        """None if all is well, else how many rounds are good; leaves the chain at its end."""
        try:
            self._connection.execute("BEGIN")  # one moment of a run that may be under way
            self._chain = self._header_digest()
            found, broken, start = None if audit else next(self._checkpoints(), None), False, 0
            if found is not None:
                start, self._chain = found[0].round, found[1]
            else:
                check = self._connection.execute("PRAGMA quick_check(1)").fetchone()
                broken = check[0] != "ok"
            good = start + sum(1 for _ in self._good_rounds(start))
            kept = sum(1 for _ in self.calibrations()), len(self.decisions()), len(self.renewals())
            whole = kept == tuple(map(self._count, ("calibrations", "decisions", "renewals")))
            return good if broken or not whole or good != self.rounds else None
        except (sqlite3.DatabaseError, ValueError, KeyError, TypeError) as error:
            check_damage(error, self.path)
            return 0
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _readable_evaluations(self) -> list[Evaluated]:
        try:
            return self.evaluations()
        except (sqlite3.DatabaseError, ValueError, TypeError):
            return []
