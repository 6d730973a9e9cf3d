"""What the server does for a client does not depend on how many others there are."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Iterable
from pathlib import Path

import pytest
from builders import algorithm_of, make_recipe, make_server_state
from scripted import Clock, ScriptedClient, ScriptedRun, recipe_of

from meerkat.engines.members import Members
from meerkat.federation.rounds import plan_round
from meerkat.federation.schedule import Schedule
from meerkat.transport.client_frames import Hello
from meerkat.zo.log import Log


class Unsearchable(list[int]):
    def __contains__(self, item: object) -> bool:
        raise AssertionError("a list is searched for each client")


def test_clients_that_are_there_are_not_searched_for_one_by_one() -> None:
    recipe = make_recipe(federation={"clients": 50})
    algorithm = algorithm_of(20, federation={"clients": 50})
    state = make_server_state(algorithm, 50)
    plans = plan_round(Schedule.of(recipe), state, Log(), Unsearchable(range(0, 50, 2)))
    assert sorted(plans) == list(range(0, 50, 2))


class Counting(set[int]):
    """A set that knows how often it is gone through."""

    passes = 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        Counting.passes += 1
        return super().__iter__()


def test_joining_does_not_go_through_those_who_are_there() -> None:
    class Silent:
        def send(self, peer: int, frame: bytes) -> None: ...

        def drop(self, peer: int, reason: str, bar: bool = False) -> None: ...

        def close(self, reason: str) -> None: ...

        def receive(self, timeout: float) -> None: ...

    client = ScriptedClient(0)
    members = Members(Silent(), 100, client.proof, lambda line: None)
    members._idle = Counting()
    for number in range(100):
        assert members.admit(number, Hello(number, 10, 0, 0, client.proof))
        assert len(members.idle) == number + 1
    assert members.idle == set(range(100))
    Counting.passes = 0
    members.set_overdue(5, "round 1")
    members.remove(7, "it left")
    assert len(members.idle) == 98
    assert Counting.passes == 0


def calls_within(names: Iterable[str], work: cProfile.Profile) -> int:
    stats = pstats.Stats(work).stats  # type: ignore[attr-defined]
    return sum(
        count
        for (file, _, _), (_, count, *_) in stats.items()
        if any(name in file for name in names)
    )


@pytest.mark.parametrize("leave", [False, True], ids=["all answer", "a third leaves"])
def test_the_work_of_a_round_grows_with_its_clients(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, leave: bool
) -> None:
    """Calls within the server's loop, for four times as many clients."""
    counts = {}
    for clients in (30, 120):
        clock = Clock()
        clock.install(monkeypatch)
        federation = {"clients": clients, "rounds": 3, "local_steps": 1}
        recipe = recipe_of(federation=federation, network={"quorum": 5})
        hosted = ScriptedRun(recipe, tmp_path / str(clients), clock)
        for client in hosted.clients[:: 3 if leave else clients]:
            if leave:
                client.act = lambda client, frame: (
                    type(frame).__name__ == "Plan"
                    and client.transport.peers.get(client.peer) is client
                    and client.transport.leave(client) is None
                )
        profile = cProfile.Profile()
        profile.enable()
        hosted.run()
        profile.disable()
        counts[clients] = calls_within(("engines/", "federation/rounds"), profile)
    assert counts[120] < 5 * counts[30]
