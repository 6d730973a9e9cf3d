"""Model and training state of a run, shared by all its clients in one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from meerkat.config import Recipe
from meerkat.data.clients import held_out_shard, validation_shard
from meerkat.federation.client import Client, Worker
from meerkat.models.quantised import keeps
from meerkat.node.config import NodeConfig
from meerkat.runs.assembly import Assembly, EncodedExamples, assemble
from meerkat.spaces.mask_file import load_mask
from meerkat.tasks.losses import import_objective
from meerkat.transport.handshake import Proof
from meerkat.transport.server_frames import Setup
from meerkat.zo import noise

__all__ = ["ClientRuntime", "assembly_of", "runtime_of"]


class ClientRuntime:
    """Model, training state and data of a run, for all its clients in this process.

    Args:
        mask: Its file.
        own: Is the data a folder with the examples of one client?
        begins: Updates of the log before the state that the mask's space starts from.
    """

    def __init__(self, assembly: Assembly, mask: Path, own: bool, begins: int = 0):
        self.assembly = assembly
        self._begins = begins
        self.session = ""
        """The server's session that the state belongs to."""
        self._own = own
        self._clients: dict[int, Client] = {}
        loaded = assembly.loaded
        space = load_mask(mask, parameters=loaded.parameters).fingerprint
        self.proof = Proof(
            loaded.fingerprint, space, noise.fingerprint(), assembly.configuration, loaded.probe
        )

    @property
    def is_working(self) -> bool:
        """Has the state been read or changed?"""
        return "worker" in vars(self)

    @cached_property
    def worker(self) -> Worker:
        """The model, and the state after the updates received so far."""
        worker = self.assembly.worker()
        worker.synchronise(worker.initial, self._begins)
        return worker

    def leave(self) -> None:
        """Put the model's own weights back, for another runtime with the same model."""
        if self.is_working:
            self.worker.space.restore()

    def join(self, session: str) -> None:
        """Begin a session; unless it is the current one, the state is initial again."""
        if self.is_working and session != self.session:
            self.worker.synchronise(self.worker.initial, self._begins)
        self.session = session

    def client(self, number: int) -> Client:
        """A client with its examples."""
        if number not in self._clients:
            part = 0 if self._own else number
            self._clients[number] = self.assembly.client(number, part)
        return self._clients[number]

    def held_out(self, number: int) -> EncodedExamples:
        """The held-out examples of a client to test on."""
        assembly = self.assembly
        if self._own:
            return assembly.test
        return EncodedExamples(
            held_out_shard(assembly.recipe, assembly.split, number), assembly.encoder
        )

    def validation(self, number: int) -> EncodedExamples:
        """The examples of a client to choose a round by; none of them is in `held_out`."""
        assembly = self.assembly
        if self._own:
            return assembly.validation
        return EncodedExamples(
            validation_shard(assembly.recipe, assembly.split, number), assembly.encoder
        )


_runtimes: dict[str, ClientRuntime] = {}
_assemblies: dict[str, Assembly] = {}


def _shared(node: NodeConfig) -> NodeConfig:
    """What of a node's settings its model and data depend on."""
    same = replace(node, gradients=False)  # it decides on reports alone
    return replace(same, client=0) if node.data is None else same


def assembly_of(node: NodeConfig, recipe: Recipe, setup: Setup) -> Assembly:
    """The model and data of a run, loaded once in a process, before there is a mask.

    Args:
        recipe: The setup's, with the node's settings.
    """
    key = repr((_shared(node), setup.recipe))
    if key not in _assemblies:
        import_objective(recipe)
        _leave_all()
        _assemblies.clear()
        _assemblies[key] = assemble(recipe, data=node.data)
    return _assemblies[key]


def runtime_of(node: NodeConfig, recipe: Recipe, setup: Setup, mask: Path) -> ClientRuntime:
    """The runtime of a run, made once in a process; the runtime of an earlier run is freed.

    Args:
        recipe: The setup's, with the node's settings.
    """
    key = repr((_shared(node), setup.recipe, setup.proof, setup.position, mask))
    if key not in _runtimes:
        _leave_all()
        assembly = assembly_of(node, recipe, setup)
        if recipe.runtime.weights != "stored":
            found = load_mask(mask, parameters=assembly.loaded.parameters)
            if not keeps(assembly.loaded.model, dict(zip(found.names, found.indices, strict=True))):
                _assemblies.clear()  # an earlier run had another mask, and its weights are rounded
                assembly = assembly_of(node, recipe, setup)
        assembly = replace(assembly, mask_file=mask)
        own = node.data is not None
        _runtimes[key] = ClientRuntime(assembly, mask, own, setup.position)
    _runtimes[key].join(setup.session)
    return _runtimes[key]


def _leave_all() -> None:
    for runtime in _runtimes.values():
        runtime.leave()
    _runtimes.clear()
