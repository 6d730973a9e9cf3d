"""The state after any round, from the journal alone (method.md section 6)."""

from __future__ import annotations

from meerkat.errors import JournalError
from meerkat.journal.journal import Journal
from meerkat.zo.state import ModelState, Theta

__all__ = ["origin", "replay"]


def replay(journal: Journal, rounds: int | None = None, audit: bool = False) -> ModelState:
    """The state after so many rounds (all by default), from the journal alone.

    It is a state of the subspace that those rounds ended in, whether or not that is renewed then.

    Args:
        audit: Start from the initial state, whatever checkpoints there are, and compare the state
            with them, and with the digest of each round.

    Raises:
        JournalError: There are fewer rounds, or the state is not what the run recorded.
    """
    available = journal.rounds
    wanted = available if rounds is None else rounds
    if not 0 <= wanted <= available:
        raise JournalError(f"round {wanted} is not in {journal.path}: it has {available} rounds")
    algorithm = journal.header.algorithm
    state, done = algorithm.init(journal.theta0), 0
    checkpoint = None if audit else journal.checkpoint(wanted)
    if checkpoint is not None:
        state, done = state.from_bytes(checkpoint.state), checkpoint.round
        _check(journal, done, state, journal.state_digest(done))
    marks = {found.round: found.state for found in journal.checkpoints()} if audit else {}
    recorded = state.digest
    renewed = {renewal.round: renewal.start for renewal in journal.renewals()}
    for record, _ in journal.records(done):
        if done == wanted:
            break
        if done in renewed:
            state = algorithm.init(renewed[done])
        state, done = algorithm.apply(state, record.updates), record.round + 1
        recorded = record.state_digest
        if audit:
            _check(journal, done, state, recorded)
            if done in marks and marks[done] != state.to_bytes():
                raise JournalError(f"{journal.path}: the checkpoint after round {done} is another")
    _check(journal, done, state, recorded)
    return state


def origin(journal: Journal, rounds: int | None = None) -> tuple[int, Theta]:
    """From which round, and which values, a state of `replay` has been led to in its space."""
    renewals = journal.renewals(journal.rounds if rounds is None else rounds)
    return (renewals[-1].round, renewals[-1].start) if renewals else (0, journal.theta0)


def _check(journal: Journal, done: int, state: ModelState, recorded: str) -> None:
    """Compare the digest of a state with what the run recorded after so many rounds."""
    if state.digest != recorded:
        raise JournalError(
            f"{journal.path}: the state after round {done} has digest {state.digest[:16]}, the "
            f"run recorded {recorded[:16]}; this machine's noise or arithmetic differs"
        )
