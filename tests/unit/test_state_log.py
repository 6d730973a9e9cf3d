"""The state as a value, and the log that it follows from."""

from __future__ import annotations

import hashlib
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import Log, LogEntry, Update
from meerkat.zo.noise import SHARED
from meerkat.zo.state import ModelState


def make_state(size: int = 5) -> ModelState:
    theta = np.arange(size, dtype=np.float32) / 4
    slots = {"second": theta + 1, "a": np.array([0.1, 1e-300]), "first": -theta}
    return ModelState(theta, slots)


# The state


def test_bytes_are_theta_then_slots_by_name() -> None:
    state = make_state()
    parts = [state.theta, state.slots["a"], state.slots["first"], state.slots["second"]]
    assert state.to_bytes() == b"".join(part.tobytes() for part in parts)
    assert state.nbytes == len(state.to_bytes()) == 4 * 5 * 3 + 8 * 2


def test_without_slots_the_digest_is_that_of_theta() -> None:
    theta = np.array([1.5, -0.0, 3e-45], np.float32)
    assert ModelState(theta).digest == hashlib.sha256(theta.astype("<f4").tobytes()).hexdigest()
    assert ModelState(theta).digest != ModelState(np.abs(theta)).digest  # the sign of a zero


def test_the_order_in_which_slots_were_made_does_not_matter() -> None:
    state = make_state()
    turned = ModelState(state.theta, dict(reversed(state.slots.items())))
    assert turned.digest == state.digest
    assert turned.to_bytes() == state.to_bytes()


def test_the_digest_is_of_names_types_and_places() -> None:
    theta, values = np.ones(4, np.float32), np.ones(4, np.float32)
    states = [
        ModelState(theta),
        ModelState(theta, {"a": values.copy()}),
        ModelState(theta, {"b": values.copy()}),
        ModelState(theta, {"a": values[:2].copy(), "b": values[2:].copy()}),
        ModelState(theta, {"a": values[:1].copy(), "b": values[1:].copy()}),
        ModelState(theta, {"a": np.frombuffer(values.tobytes(), np.float64).copy()}),
        ModelState(np.ones(8, np.float32)),
    ]
    assert len({state.digest for state in states}) == len(states)


def test_a_state_that_was_handed_out_never_changes() -> None:
    state = make_state()
    for array in (state.theta, *state.slots.values()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7


def test_a_state_from_bytes_is_the_state() -> None:
    state = make_state()
    again = ModelState(np.zeros(5, np.float32), dict(make_state().slots)).from_bytes(
        state.to_bytes()
    )
    assert again.digest == state.digest
    assert again.slots.keys() == state.slots.keys()
    for array in (again.theta, *again.slots.values()):
        assert array.dtype.isnative
        assert not array.flags.writeable


@pytest.mark.parametrize("change", [-1, 1, -4, 8, -10_000])
def test_bytes_of_another_length_are_refused(change: int) -> None:
    data = make_state().to_bytes()
    other = data[:change] if change < 0 else data + bytes(change)
    with pytest.raises(ValueError, match=rf"{len(other)} bytes, not {len(data)}"):
        make_state().from_bytes(other)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["theta", "a", "second"])
def test_bytes_that_are_not_finite_are_refused(bad: float, where: str) -> None:
    state = make_state()
    arrays = {"theta": state.theta.copy(), **{k: v.copy() for k, v in state.slots.items()}}
    arrays[where][1] = bad
    other = ModelState(arrays.pop("theta"), arrays)
    with pytest.raises(ValueError, match="not finite"):
        state.from_bytes(other.to_bytes())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    st.dictionaries(
        st.text("abcz", min_size=1, max_size=3),
        st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4),
        max_size=3,
    ),
)
def test_any_state_goes_through_bytes(theta: list[float], slots: dict[str, list[float]]) -> None:
    state = ModelState(
        np.array(theta, np.float32), {name: np.array(values) for name, values in slots.items()}
    )
    again = state.from_bytes(state.to_bytes())
    assert again.to_bytes() == state.to_bytes()
    assert again.digest == state.digest


# The log

# Numbers alone: the types of an `Update` are checked at random, which no strategy may do.
places = st.tuples(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(0, 255),
    st.integers(0, SHARED),
)
entries = st.tuples(places, st.floats(allow_nan=False, allow_infinity=False))
updates = st.tuples(
    st.floats(width=32, min_value=0, allow_nan=False, allow_infinity=False),
    st.lists(entries, min_size=1, max_size=4),
)


def made(rate: float, some: list[tuple[tuple[int, int, int, int], float]]) -> Update:
    return Update(rate, tuple(LogEntry(DirectionKey(*place), value) for place, value in some))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(updates, max_size=4), max_size=4))
def test_a_log_is_the_list_of_its_updates(drawn: list[list[tuple[float, list[Any]]]]) -> None:
    log, expected = Log(), []
    for part in ([made(*one) for one in some] for some in drawn):
        before = len(log)
        log.append(iter(part))
        expected += part
        assert len(log) == before + len(part)
        assert log.since(before) == tuple(part)
    assert list(log) == expected
    for position in range(len(expected) + 1):
        assert log.since(position) == tuple(expected[position:])
        held = sum(len(update.entries) for update in expected[position:])
        assert log.entries_since(position) == held
    assert list(log) == expected  # reading changes nothing


def test_a_position_counts_updates_and_not_entries() -> None:
    log = Log()
    several = tuple(LogEntry(DirectionKey(0, 0, q), float(q)) for q in range(3))
    log.append([Update(0.5, several), Update(0.25, several[:1])])
    assert len(log) == 2
    assert log.since(1) == (Update(0.25, several[:1]),)
    assert (log.entries_since(0), log.entries_since(1), log.entries_since(2)) == (4, 1, 0)


def test_memory_is_24_bytes_an_entry_and_16_an_update() -> None:
    count, each = 20_000, 3
    log = Log()
    update = Update(0.5, tuple(LogEntry(DirectionKey(1, 2, q, 4), 0.25) for q in range(each)))
    tracemalloc.start()
    log.append(update for _ in range(count))
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    # Arrays that grow have some room left: an eighth is plenty.
    assert kept < 1.125 * count * (24 * each + 16)
    assert log.entries_since(0) == count * each
