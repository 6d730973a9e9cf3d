"""What all clients of a run in one process share: one model, one θ."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from meerkat import noise
from meerkat.assembly import Assembly, EncodedExamples, assemble
from meerkat.client import Client, Worker
from meerkat.data.holdings import share
from meerkat.mask.file import load_mask
from meerkat.participant.node import Node
from meerkat.protocol import Proof, Setup

__all__ = ["Crew", "crew_of"]


class Crew:
    """What all clients of a run in this process share: one model, one θ.

    Args:
        own: Is the data the folder of one client?
    """

    def __init__(self, assembly: Assembly, mask: Path, own: bool):
        self.assembly = assembly
        self.session = ""
        """The run that θ belongs to."""
        self._own = own
        self._clients: dict[int, Client] = {}
        digest = load_mask(mask).digest
        self.proof = Proof(assembly.loaded.fingerprint, digest, noise.fingerprint())

    @property
    def is_working(self) -> bool:
        """Was there anything to do yet?"""
        return "worker" in vars(self)

    @cached_property
    def worker(self) -> Worker:
        """The model, and θ as far as the log is known."""
        return self.assembly.worker()

    def join(self, session: str) -> None:
        """Start from the initial θ, unless this run is the one that was joined before."""
        if self.is_working and session != self.session:
            self.worker.synchronise(self.worker.initial, 0)
        self.session = session

    def client(self, number: int) -> Client:
        """A client with its examples."""
        if number not in self._clients:
            assembly, federation = self.assembly, self.assembly.recipe.federation
            part = assembly.parts[0 if self._own else number]
            examples = EncodedExamples([assembly.split.train[i] for i in part], assembly.encoder)
            self._clients[number] = Client(
                number, examples, federation.batch_size, assembly.recipe.seed
            )
        return self._clients[number]

    def held_out(self, number: int) -> EncodedExamples:
        """What a client evaluates on."""
        assembly = self.assembly
        if self._own:
            return assembly.test
        return EncodedExamples(share(assembly.recipe, assembly.split, number), assembly.encoder)


_crews: dict[str, Crew] = {}


def crew_of(node: Node, setup: Setup, mask: Path) -> Crew:
    """The model of a run, loaded once a process; that of an earlier run makes room."""
    settings = replace(node, client=0) if node.data is None else node
    key = repr((settings, setup.recipe, setup.proof, mask))
    if key not in _crews:
        _crews.clear()
        recipe = node.recipe(setup.recipe)
        section = recipe.mask.model_copy(update={"file": str(mask)})
        recipe = recipe.model_copy(update={"mask": section})
        _crews[key] = Crew(assemble(recipe, data=node.data), mask, node.data is not None)
    _crews[key].join(setup.session)
    return _crews[key]
