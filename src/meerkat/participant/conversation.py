"""What a client answers to which frame."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from meerkat.descent import follow
from meerkat.errors import DataError, DivergedError, MaskError, MeerkatError, ProtocolError
from meerkat.evaluation import evaluation_sums
from meerkat.mask.file import load_mask
from meerkat.models import cache_dir
from meerkat.participant.crew import Crew, crew_of
from meerkat.participant.node import Node
from meerkat.protocol import (
    DownFrame,
    Entries,
    Evaluate,
    Evaluation,
    Failed,
    Goodbye,
    Hello,
    MaskFile,
    Need,
    Notice,
    Plan,
    Refused,
    Report,
    RoundPlan,
    Setup,
    Snapshot,
    UpFrame,
    WantMask,
    Welcome,
    decode_down,
    difference,
    encode,
    wants_answer,
)

__all__ = ["Participant", "told"]

Say = Callable[[str], None]
_log = logging.getLogger("meerkat")


def told(error: Exception) -> str:
    """What a server is told of an error here: nothing that could quote a client's data."""
    if isinstance(error, DataError):
        return "its data cannot be used; its own log says why"
    return str(error) if isinstance(error, MeerkatError) else type(error).__name__


class Participant:
    """One client of a run.

    Args:
        say: Takes a line for the log.
    """

    def __init__(self, node: Node, say: Say = _log.info):
        self._node = node
        self._say = say
        self._setup: Setup | None = None
        self._crew: Crew | None = None
        self._broken = ""
        """What went wrong while the server waited for nothing."""
        self.answered = 0
        """Plans that were answered."""
        self.working = 0.0
        """Seconds spent on them."""

    def begin(self, setup: Setup) -> bytes:
        """The first frame of a conversation: hello, or the wish for the mask.

        Raises:
            MeerkatError: Model, data or settings do not allow to take part.
        """
        self._setup = setup
        frame: UpFrame = WantMask()
        path = self._mask_path(setup)
        if path.exists():
            try:
                self._crew = crew_of(self._node, setup, path)
                frame = self._hello(self._crew, setup)
            except MaskError:
                if self._node.mask is not None:
                    raise  # else what was kept is damaged, and the server sends it again
        return encode(frame)

    def answer(self, data: bytes) -> Iterator[bytes]:
        """Frames that answer the server's; an error of ours goes to it as a line, once it waits.

        Raises:
            ProtocolError: The server's frame breaks the protocol.
        """
        frame, encoded = decode_down(data), None
        waits = wants_answer(data)
        try:
            if not (waits and self._broken):
                answer = self._answer(frame)
                encoded = None if answer is None else encode(answer)
        except ProtocolError:
            raise
        except Exception as error:
            self._broken = told(error)
            ours = isinstance(error, MeerkatError)
            _log.warning(
                "client %d failed: %s", self._node.client, error, exc_info=None if ours else error
            )
        if waits and self._broken:
            encoded, self._broken = encode(Failed(self._broken)), ""
        if encoded is not None:
            yield encoded

    def remembered(self) -> bytes | None:
        """A frame that brings a new process to the θ of this one."""
        if self._crew is None or not self._crew.is_working:
            return None
        worker = self._crew.worker
        return encode(Snapshot(worker.position, worker.theta.astype("<f4").tobytes()))

    def recall(self, remembered: bytes) -> None:
        """Take over what another process remembered, unless this one is further."""
        frame = decode_down(remembered)
        if self._crew is None or not isinstance(frame, Snapshot):
            return
        if not self._crew.is_working or self._crew.worker.position < frame.position:
            self._work(frame)

    def _answer(self, frame: DownFrame) -> UpFrame | None:
        match frame:
            case Setup():
                raise ProtocolError("a second setup in one conversation")
            case MaskFile(content):
                return self._keep_mask(content)
            case Welcome():
                self._say(f"client {self._node.client} takes part")
            case Refused(reason):
                self._say(f"client {self._node.client} is refused: {reason}")
            case Notice(reason):
                self._say(f"client {self._node.client}: its answer is not used: {reason}")
            case Goodbye(reason):
                self._say(f"client {self._node.client}: the server ends the session: {reason}")
            case _:
                return self._work(frame)
        return None

    def _work(self, frame: DownFrame) -> UpFrame | None:
        if self._crew is None or self._setup is None:
            raise ProtocolError(f"{type(frame).__name__.lower()} before the setup")
        differs = difference(self._crew.proof, self._setup.proof)
        if differs is not None:
            raise MaskError(differs)
        worker = self._crew.worker
        match frame:
            case Snapshot(position, theta):
                values = np.frombuffer(theta, "<f4").astype(np.float32)
                if len(values) != worker.space.size:
                    raise ProtocolError(
                        f"snapshot of {len(values)} values, not {worker.space.size}"
                    )
                worker.synchronise(values, position)
                return None
            case Entries(position, entries):
                if position > worker.position:
                    return None  # the evaluation that follows will ask for more
                fresh = entries[worker.position - position :]
                follow(worker.theta, fresh, worker.directions)
                worker.position += len(fresh)
                return None
            case Plan(plan):
                return self._report(plan)
            case Evaluate(number, position):
                return self._evaluate(number, position)
        raise ProtocolError(f"{type(frame).__name__.lower()} is not for a client")

    def _report(self, plan: RoundPlan) -> UpFrame:
        assert self._crew is not None
        if plan.log_start > self._crew.worker.position:
            return Need(self._crew.worker.position)
        started = time.monotonic()
        report, _loss = self._crew.client(self._node.client).answer(plan, self._crew.worker)
        self.working += time.monotonic() - started
        self.answered += 1
        return Report(report)

    def _evaluate(self, number: int, position: int) -> UpFrame:
        assert self._crew is not None
        worker = self._crew.worker
        if position != worker.position:
            return Need(worker.position)
        examples = self._crew.held_out(self._node.client)
        worker.space.write(worker.theta)
        size = self._crew.assembly.recipe.federation.batch_size
        loss, confusion = evaluation_sums(worker.objective, examples, size)
        if not math.isfinite(loss):
            raise DivergedError("the loss on its held-out examples is not finite")
        return Evaluation(number, len(examples), loss, confusion)

    def _mask_path(self, setup: Setup) -> Path:
        if self._node.mask is not None:
            if not self._node.mask.is_file():
                raise MaskError(f"--node-config mask = {str(self._node.mask)!r}: no such file")
            return self._node.mask
        recipe = self._node.recipe(setup.recipe)
        return cache_dir(recipe.runtime, "masks") / f"run-{setup.proof.mask[:24]}.safetensors"

    def _keep_mask(self, content: bytes) -> UpFrame:
        """Keep the mask that the server sent, for this run and the next."""
        setup = self._setup
        if setup is None:
            raise ProtocolError("a mask before the setup")
        if self._node.mask is not None:
            raise ProtocolError("a mask that was not asked for")
        path = self._mask_path(setup)
        scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
        scratch.write_bytes(content)
        try:
            found = load_mask(scratch).digest
            if found != setup.proof.mask:
                raise MaskError(f"the server sent mask {found[:12]}, not {setup.proof.mask[:12]}")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        self._crew = crew_of(self._node, setup, path)
        return self._hello(self._crew, setup)

    def _hello(self, crew: Crew, setup: Setup) -> Hello:
        client = self._node.client
        differs = difference(crew.proof, setup.proof)
        if differs is not None:
            self._say(f"client {client} does not fit this run: {differs}")
        position = crew.worker.position if crew.is_working else 0
        examples, held_out = len(crew.client(client).examples), len(crew.held_out(client))
        return Hello(client, examples, held_out, position, crew.proof)
