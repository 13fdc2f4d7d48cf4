"""Placement: pure, in order of arrival, and nothing goes where it does not fit."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from hybridq.errors import TooLarge
from hybridq.placement import MAX_BATCH_PROGRAMS, MAX_BATCH_SECONDS, Free, Placements, Waiting, place
from hybridq.resources import Device, Need, format_bytes

SECONDS = st.sampled_from([0.0, 1e-4, 0.01, 0.1, 0.2, 0.25, 0.5, 0.51, 3.0])
BYTES = st.integers(0, 12)


@st.composite
def queues(draw: st.DrawFn) -> tuple[list[Waiting], list[Free]]:
    size = draw(st.sampled_from([0, 1, 2, 5, 30]))
    queue = [Waiting(Need(draw(BYTES), draw(SECONDS), qubits=2), draw(st.booleans())) for _ in range(size)]
    count = draw(st.integers(1, 3))
    devices = []
    for number in range(count):
        slots = draw(st.integers(1, 4))
        device = Device(f"d{number}", slots, draw(BYTES), draw(st.sampled_from([0.0, 2e-5, 0.012])))
        devices.append(Free(device, draw(st.integers(0, slots))))
    return queue, devices


def placed(placements: Placements) -> list[int]:
    return [program for batch in placements.batches for program in batch.programs]


@settings(max_examples=400)
@given(queues())
def test_what_holds_for_every_placement(case: tuple[list[Waiting], list[Free]]) -> None:
    queue, devices = case
    before = copy.deepcopy(case)
    found = place(queue, devices)
    assert repr(found) == repr(place(queue, devices))  # pure: the same again, and nothing was changed
    assert (queue, devices) == before

    free = {f.device.name: f for f in devices}
    everywhere, refused = placed(found), [refusal.program for refusal in found.refusals]
    waiting = set(range(len(queue))) - set(everywhere) - set(refused)
    event(f"placed {bool(everywhere)}, refused {bool(refused)}, waiting {bool(waiting)}")
    assert max(Counter(everywhere + refused).values(), default=1) == 1  # nothing twice
    assert set(everywhere) | set(refused) <= set(range(len(queue)))

    largest = max(f.device.bytes for f in devices)
    assert refused == [i for i, w in enumerate(queue) if w.need.bytes > largest]  # neither more nor fewer
    for name, count in Counter(batch.device for batch in found.batches).items():
        assert count <= free[name].slots
    for batch in found.batches:
        assert batch.programs
        assert batch.reason
        assert len(batch.programs) <= MAX_BATCH_PROGRAMS
        assert all(queue[i].need.bytes <= free[batch.device].device.bytes for i in batch.programs)
        seconds = sum(queue[i].need.seconds for i in batch.programs)
        assert len(batch.programs) == 1 or seconds <= MAX_BATCH_SECONDS
    for _, batches in itertools.groupby(sorted(found.batches, key=lambda b: b.device), key=lambda b: b.device):
        order = [i for batch in batches for i in batch.programs]
        assert order == sorted(order)
    # who waits does so behind a full device: whoever came first is never passed over on the same one
    for i in waiting:
        fitting = [f for f in devices if queue[i].need.bytes <= f.device.bytes]
        assert fitting
        assert any(f.slots == sum(b.device == f.device.name for b in found.batches) for f in fitting)


@settings(max_examples=200)
@given(queues(), st.integers(0, 3))
def test_more_free_slots_never_place_fewer(case: tuple[list[Waiting], list[Free]], which: int) -> None:
    queue, devices = case
    more = list(devices)
    chosen = more[which % len(more)]
    more[which % len(more)] = Free(chosen.device, chosen.slots + 1)
    assert len(placed(place(queue, more))) >= len(placed(place(queue, devices)))


@given(queues())
def test_everything_leaves_in_the_end(case: tuple[list[Waiting], list[Free]]) -> None:
    queue, devices = case
    largest = max(f.device.bytes for f in devices)
    rest = [w for w in queue if w.need.bytes <= largest]
    idle = [Free(f.device, f.device.slots) for f in devices]
    for _ in range(len(rest)):
        if rest:
            gone = set(placed(place(rest, idle)))
            assert 0 in gone  # the first in line always goes
            rest = [w for i, w in enumerate(rest) if i not in gone]
    assert not rest


NEAR = Device("near", 1, 100, 2e-5)
WIDE = Device("wide", 4, 100, 0.012)


def batches(queue: list[Waiting], *devices: Free) -> list[tuple[str, tuple[int, ...]]]:
    return [(b.device, b.programs) for b in place(queue, devices).batches]


def short(seconds: float = 1e-3, alone: bool = False, size: int = 1) -> Waiting:
    return Waiting(Need(size, seconds), alone)


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        (short(alone=True), "near"),
        (short(), "wide"),
        (short(0.119, alone=True), "near"),
        (short(0.13, alone=True), "wide"),
        (short(5.0, alone=True), "wide"),
    ],
)
def test_only_a_short_program_of_a_lone_loop_stays_at_hand(waiting: Waiting, expected: str) -> None:
    for devices in ((Free(NEAR, 1), Free(WIDE, 4)), (Free(WIDE, 4), Free(NEAR, 1))):
        assert batches([waiting], *devices) == [(expected, (0,))]


def test_a_program_goes_to_the_device_that_holds_it() -> None:
    large = Free(Device("large", 1, 1000, 0.012), 1)
    assert batches([short(size=500), short()], Free(NEAR, 1), Free(WIDE, 4), large) == [("large", (0,)), ("wide", (1,))]
    assert batches([short(size=500, alone=True)], Free(NEAR, 1), large) == [("large", (0,))]


def test_free_slots_share_what_waits() -> None:
    queue = [short(0.006) for _ in range(10)]  # together five trips
    assert batches(queue, Free(WIDE, 4)) == [
        ("wide", (0, 1, 2)), ("wide", (3, 4, 5)), ("wide", (6, 7)), ("wide", (8, 9)),
    ]  # fmt: skip
    assert batches(queue, Free(WIDE, 1)) == [("wide", tuple(range(10)))]
    assert batches(queue[:2], Free(WIDE, 4)) == [("wide", (0, 1))]
    assert batches(queue[:3], Free(WIDE, 4)) == [("wide", (0, 1)), ("wide", (2,))]
    assert batches(queue, Free(WIDE, 0)) == []
    assert batches([], Free(WIDE, 4)) == []


def test_batches_are_bounded_in_time_and_number() -> None:
    assert batches([short(0.2)] * 5, Free(WIDE, 1)) == [("wide", (0, 1))]
    assert batches([short(9.0)] * 2, Free(WIDE, 1)) == [("wide", (0,))]
    assert batches([short(0.1), short(9.0)], Free(WIDE, 1)) == [("wide", (0,))]
    (only,) = batches([short(0.0)] * 5000, Free(WIDE, 1))
    assert len(only[1]) == MAX_BATCH_PROGRAMS
    assert len(batches([short(0.0)] * 5000, Free(WIDE, 64))) > 1  # no slot stays free for want of a longer batch


def test_a_refusal_names_both_numbers_and_the_device() -> None:
    need = Need(2**34, 1.0, qubits=30)
    devices = [Free(Device("small", 9, 2**20, 0.0), 9), Free(Device("big", 1, 3 * 2**30, 0.0), 0)]
    found = place([short(), Waiting(need, False)], devices)
    (refusal,) = found.refusals
    assert refusal.program == 1
    assert isinstance(refusal.error, TooLarge)
    for words in (
        format_bytes(2**34),
        f"{2**34:,} bytes",
        "30 qubits",
        "big",
        format_bytes(3 * 2**30),
        f"{3 * 2**30:,} bytes",
    ):
        assert words in str(refusal.error)
    assert "small" not in str(refusal.error)
    assert placed(found) == [0]


def test_what_no_machine_could_hold_is_refused_too() -> None:
    (refusal,) = place([Waiting(Need(2**2000, 1e50, qubits=1995), False)], [Free(WIDE, 4)]).refusals
    assert "2^2000 B" in str(refusal.error)
