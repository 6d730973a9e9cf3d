"""A client's answers to the frames of a server."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from meerkat.config import Recipe
from meerkat.errors import (
    DataError,
    DivergedError,
    MaskError,
    MeerkatError,
    ModelError,
    ProtocolError,
    RecipeError,
)
from meerkat.federation.messages import RoundPlan
from meerkat.models.loading import cache_dir
from meerkat.node.config import NodeConfig
from meerkat.node.runtime import ClientRuntime, assembly_of, runtime_of
from meerkat.runs.evaluation import evaluation_sums
from meerkat.spaces.mask_file import load_mask
from meerkat.tasks.metrics.validation import VALIDATION_EXAMPLES, on_validation
from meerkat.transport.client_frames import Evaluation, Failed, Hello, Need, Report, WantSpace
from meerkat.transport.frame import DownFrame, UpFrame, encode
from meerkat.transport.handshake import difference
from meerkat.transport.server_frames import (
    EvaluateRequest,
    Goodbye,
    LogPart,
    Notice,
    Plan,
    Refused,
    Setup,
    Snapshot,
    SpaceFile,
    Welcome,
    decode_down,
    wants_answer,
)

__all__ = ["ClientSession", "public_message"]

Say = Callable[[str], None]
_log = logging.getLogger("meerkat")


def public_message(error: Exception) -> str:
    """The text of an error that may be sent to the server.

    It quotes no data, and does not reveal which files or models are on the client's machine.
    """
    for kind, text in (
        (DataError, "its data cannot be used; its own log says why"),
        (ModelError, "its model cannot be used; its own log says why"),
        (RecipeError, "its operator or version does not allow this recipe; its own log says why"),
    ):
        if isinstance(error, kind):
            return text
    if not isinstance(error, MeerkatError):
        return type(error).__name__
    text = str(error)
    return "it failed; its own log says why" if "/" in text or "\\" in text else text


class ClientSession:
    """One client of a run: takes the server's frames and gives the answers.

    Args:
        say: Takes a line for the log.
    """

    def __init__(self, node: NodeConfig, say: Say = _log.info):
        self._node = node
        self._say = say
        self._setup: Setup | None = None
        self._recipe: Recipe | None = None
        self._runtime: ClientRuntime | None = None
        self._error = ""
        """An error that is not sent yet: the server reads it only as the answer to a request."""
        self.answered = 0
        """Plans answered."""
        self.working = 0.0
        """Seconds spent on plans."""

    def begin(self, setup: Setup) -> bytes:
        """The client's first frame on a connection: a hello, or a request for the mask.

        Where the connection broke after the subspace was renewed, the later setup holds.

        Raises:
            MeerkatError: Model, data or settings do not fit the run.
        """
        last = self._setup
        if last is not None and last.session == setup.session and last.position > setup.position:
            setup = last
        return encode(self._begin(setup))

    def _begin(self, setup: Setup) -> UpFrame:
        if self._recipe is None or setup != self._setup:
            self._setup, self._recipe = setup, self._node.recipe(setup.recipe)
        frame: UpFrame = WantSpace(setup.proof.space)
        path = self._mask_path(setup, self._recipe)
        if path.exists():
            try:
                self._runtime = runtime_of(self._node, self._recipe, setup, path)
                frame = self._hello(self._runtime, setup)
            except MaskError:
                if self._own_mask(setup) is not None:
                    raise  # else the cached mask is damaged, and the server sends it again
        return frame

    def answer(self, data: bytes) -> Iterator[bytes]:
        """The frames that answer a frame of the server.

        An error at this client is sent as a line of text, with the next frame that waits for an
        answer.

        Raises:
            ProtocolError: The server's frame breaks the protocol.
        """
        frame, encoded = decode_down(data), None
        waits = wants_answer(data)
        try:
            if not (waits and self._error):
                answer = self._answer(frame)
                encoded = None if answer is None else encode(answer)
        except ProtocolError:
            raise
        except Exception as error:
            self._error = public_message(error)
            ours = isinstance(error, MeerkatError)
            _log.warning(
                "client %d failed: %s", self._node.client, error, exc_info=None if ours else error
            )
        if waits and self._error:
            encoded, self._error = encode(Failed(self._error)), ""
        if encoded is not None:
            yield encoded

    def remembered(self) -> bytes | None:
        """The state as a frame that `recall` takes in a new process; None if it is initial."""
        if self._runtime is None or not self._runtime.is_working:
            return None
        worker = self._runtime.worker
        return encode(Snapshot(worker.position, worker.state.to_bytes()))

    def recall(self, remembered: bytes) -> None:
        """Take the state that another process `remembered`, unless this one has more updates."""
        frame = decode_down(remembered)
        if self._runtime is None or not isinstance(frame, Snapshot):
            return
        if not self._runtime.is_working or self._runtime.worker.position < frame.position:
            self._work(frame)

    def _answer(self, frame: DownFrame) -> UpFrame | None:
        match frame:
            case Setup():
                return self._renew(frame)
            case SpaceFile(content):
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

    def _renew(self, setup: Setup) -> UpFrame:
        """The answer to the setup of a renewed subspace."""
        former = self._setup
        own = former is not None and (setup.session, setup.recipe) == (
            former.session,
            former.recipe,
        )
        if former is None or not own or not setup.position:
            raise ProtocolError("a second setup in one conversation")
        if setup.position < former.position:
            raise ProtocolError("a setup of a subspace that was renewed")
        self._say(f"client {self._node.client}: the subspace is renewed")
        return self._begin(setup)

    def _work(self, frame: DownFrame) -> UpFrame | None:
        if self._runtime is None or self._setup is None:
            raise ProtocolError(f"{type(frame).__name__.lower()} before the setup")
        differs = difference(self._runtime.proof, self._setup.proof)
        if differs is not None:
            raise MaskError(differs)
        worker = self._runtime.worker
        match frame:
            case Snapshot(position, data):
                try:
                    worker.synchronise(worker.initial.from_bytes(data), position)
                except ValueError as error:
                    raise ProtocolError(f"snapshot: {error}") from None
                return None
            case LogPart(position, updates):
                if position <= worker.position:  # else the next request is answered with Need
                    worker.catch_up(position, updates)
                return None
            case Plan(plan):
                return self._report(plan)
            case EvaluateRequest(number, position):
                return self._evaluate(number, position)
        raise ProtocolError(f"{type(frame).__name__.lower()} is not for a client")

    def _report(self, plan: RoundPlan) -> UpFrame:
        assert self._runtime is not None
        if plan.log_start > self._runtime.worker.position:
            return Need(self._runtime.worker.position)
        if plan.along == "axes" and not self._node.gradients:
            raise RecipeError(
                "the server asks for the exact gradient, which is not allowed at this node; set "
                "--node-config gradients = true"
            )
        started = time.monotonic()
        report, _loss = self._runtime.client(self._node.client).answer(plan, self._runtime.worker)
        self.working += time.monotonic() - started
        self.answered += 1
        return Report(report)

    def _evaluate(self, number: int, position: int) -> UpFrame:
        assert self._runtime is not None
        worker = self._runtime.worker
        if position != worker.position:
            return Need(worker.position)
        client, metrics = self._node.client, self._runtime.assembly.metrics
        examples, validation = self._runtime.held_out(client), self._runtime.validation(client)
        worker.space.write(worker.state.theta)
        write = self._runtime.assembly.write
        found = evaluation_sums(worker.objective, examples, metrics, write)
        if validation:
            found |= on_validation(evaluation_sums(worker.objective, validation, metrics, write))
            found[VALIDATION_EXAMPLES] = np.array([len(validation)], np.float64)
        if not all(np.isfinite(sums).all() for sums in found.values()):
            raise DivergedError("the loss on its held-out examples is not finite")
        sums = {name: tuple(values.tolist()) for name, values in found.items()}
        return Evaluation(number, len(examples) + len(validation), sums)

    def _own_mask(self, setup: Setup) -> Path | None:
        """The mask that the operator gave, which serves until the subspace is renewed."""
        return None if setup.position else self._node.mask

    def _mask_path(self, setup: Setup, recipe: Recipe) -> Path:
        own = self._own_mask(setup)
        if own is not None:
            if not own.is_file():
                raise MaskError(f"--node-config mask = {str(own)!r}: no such file")
            return own
        return cache_dir(recipe.runtime, "masks") / f"run-{setup.proof.space[:24]}.safetensors"

    def _keep_mask(self, content: bytes) -> UpFrame:
        """Cache the mask that the server sent, for this run and later ones."""
        setup, recipe = self._setup, self._recipe
        if setup is None or recipe is None:
            raise ProtocolError("a mask before the setup")
        if self._own_mask(setup) is not None:
            raise ProtocolError("a mask that was not asked for")
        path = self._mask_path(setup, recipe)
        scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
        scratch.write_bytes(content)
        try:
            loaded = assembly_of(self._node, recipe, setup).loaded
            found = load_mask(scratch, loaded.fingerprint, loaded.parameters).fingerprint
            if found != setup.proof.space:
                raise MaskError(f"the server sent mask {found[:12]}, not {setup.proof.space[:12]}")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        self._runtime = runtime_of(self._node, recipe, setup, path)
        return self._hello(self._runtime, setup)

    def _hello(self, runtime: ClientRuntime, setup: Setup) -> Hello:
        client = self._node.client
        differs = difference(runtime.proof, setup.proof)
        if differs is not None:
            self._say(f"client {client} does not fit this run: {differs}")
        position = runtime.worker.position if runtime.is_working else setup.position
        examples = len(runtime.client(client).examples)
        held_out = len(runtime.held_out(client)) + len(runtime.validation(client))
        gradients = self._node.gradients
        return Hello(client, examples, held_out, position, runtime.proof, gradients)
