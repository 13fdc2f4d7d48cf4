"""The ledger: never over-committed, nobody lost or starved, and who leaves first, where to, and with whom."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hybridq.errors import NoDevice, PlacementError, TooLarge
from hybridq.ledger import MAX_BATCH_JOBS, MAX_BATCH_SECONDS, Ledger
from hybridq.policies import POLICIES, Batch, Device, Job, Load, Policy, parted
from hybridq.resources import Need, format_bytes

GiB = 2**30
WORKER = Device("worker", 1, 4 * GiB, 1, 0.012)
NEAR = Device("near", 1, 8 * GiB, 1, 1e-4, kinds=("quantum",), aside=True)


def job(
    identity: Hashable, seconds: float = 1.0, memory: int = GiB, threads: int = 1, qubits: int = 4, **rest: Any
) -> Job:
    return Job(identity, Need(memory, seconds, threads, qubits), **rest)


def ledger(*devices: Device, policy: str | Policy = "earliest-finish", **options: Any) -> Ledger:
    made = Ledger(policy, **options)
    for device in devices:
        made.join(device)
    return made


def sent(batches: Sequence[Batch]) -> list[tuple[str, tuple[Hashable, ...]]]:
    return [(batch.device, batch.jobs) for batch in batches]


def drain(made: Ledger, now: float = 0.0) -> list[Batch]:
    """Run everything to its end, as predicted, one batch at a time; the batches in the order they left."""
    found: list[Batch] = []
    flying: list[Batch] = []
    while True:
        new = made.decide(now)
        found += new
        flying += new
        if not flying:
            return found
        batch = flying.pop(0)
        now += batch.seconds
        made.done(batch, now)


# -- anything may happen, in any order ---------------------------------------------------------------------------------

DEVICES = [
    Device("a", 1, 12, 1, 0.012),
    Device("b", 3, 10, 4, 0.1, 2.0),
    Device("c", 3, 11, 4, 0.1, 2.1),
    Device("d", 2, 20, 2, 0.1, 0.5, qubits=5),
    Device("near", 1, 9, 1, 1e-4, kinds=("quantum",), aside=True),
    Device("qpu", 1, 100, 1, 2.0, qubits=6, backend="qpu", cost_per_shot=1e-3, kinds=("quantum",)),
]
DONE = {"a": 1.0, "b": 2.0, "c": 30.0, "d": 0.1, "near": 0.0, "qpu": 1.0}
"""How slow each is, at random; nothing is measured of what is near."""
JOBS = st.builds(
    Job,
    id=st.integers(0, 60),
    need=st.builds(
        Need,
        st.integers(0, 24),
        st.sampled_from([0.0, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.51, 3.0, 40.0]),
        st.integers(0, 5),
        st.integers(1, 8),
        st.just(100),
    ),
    run=st.sampled_from(["", "r", "s"]),
    loop=st.sampled_from(["", "l", "m"]),
    priority=st.sampled_from([0, 0, 0, 2]),
    pin=st.sampled_from([None, None, None, "a", "b", "near", "elsewhere"]),
    backend=st.sampled_from(["", "", "", "qpu", "other"]),
    template=st.sampled_from(["", "t", "u"]),
    alone=st.booleans(),
    kind=st.sampled_from(["quantum", "quantum", "classical"]),
    rank=st.sampled_from([0.0, 1.0, 30.0]),
    sole=st.sampled_from([False, False, False, True]),
)


def takes(device: Device, asked: Job) -> bool:
    return (
        asked.need.bytes <= device.bytes
        and asked.need.threads <= device.threads
        and (device.qubits is None or asked.need.qubits <= device.qubits)
        and asked.kind in device.kinds
        and asked.backend == device.backend
        and asked.pin in (None, device.name)
    )


def most(values: Sequence[int], slots: int) -> int:
    """The largest sum of at most ``slots`` values, by trying them all."""
    return max(sum(some) for n in range(slots + 1) for some in itertools.combinations(values, n))


def by_itself(asked: Job) -> bool:
    return asked.sole or asked.need.threads == 0


class Anything(RuleBasedStateMachine):
    """A ledger beside plain dictionaries of what must be where."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger: Ledger | None = None
        self.now = 0.0
        self.here: dict[str, Device] = {}
        self.waiting: dict[Hashable, Job] = {}
        self.running: dict[Hashable, tuple[Batch, dict[Hashable, Job]]] = {}

    @precondition(lambda self: self.ledger is None)
    @rule(policy=st.sampled_from(sorted(POLICIES)), lookahead=st.integers(0, 2), expected=st.booleans())
    def start(self, policy: str, lookahead: int, expected: bool) -> None:
        self.lookahead = lookahead
        self.expected = DEVICES[:2] if expected else []
        self.ledger = Ledger(policy, lookahead=lookahead, expected=self.expected)

    @precondition(lambda self: self.ledger is not None)
    @rule(device=st.sampled_from(DEVICES))
    def join_or_leave(self, device: Device) -> None:
        if device.name not in self.here:
            self.ledger.join(device, self.now)
            self.here[device.name] = device
            return
        del self.here[device.name]
        there = [first for first, (batch, _) in self.running.items() if batch.device == device.name]
        lost = [identity for first in there for identity in self.running[first][0].jobs]
        assert list(self.ledger.leave(device.name)) == lost
        for first in there:
            for asked in self.running.pop(first)[1].values():
                if self.ledger.submit(asked, self.now) is None:
                    self.waiting[asked.id] = asked

    @precondition(lambda self: self.ledger is not None)
    @rule(asked=st.lists(JOBS, min_size=1, max_size=8))
    def submit(self, asked: list[Job]) -> None:
        for one in asked:
            if one.id in self.waiting or any(one.id in jobs for _, jobs in self.running.values()):
                with pytest.raises(ValueError, match="is not done"):
                    self.ledger.submit(one, self.now)
                continue
            refusal = self.ledger.submit(one, self.now)
            possible = any(takes(device, one) for device in (*self.here.values(), *self.expected))
            assert (refusal is None) == possible
            if refusal is None:
                self.waiting[one.id] = one
            else:
                assert refusal.job == one.id
                assert refusal.error

    @precondition(lambda self: self.waiting)
    @rule(pick=st.randoms(use_true_random=False))
    def cancel(self, pick: random.Random) -> None:
        identity = pick.choice(sorted(self.waiting))
        assert self.ledger.cancel(identity)
        assert not self.ledger.cancel(identity)
        del self.waiting[identity]

    @precondition(lambda self: self.ledger is not None)
    @rule()
    def decide(self) -> None:
        for batch in self.ledger.decide(self.now):
            jobs = {identity: self.waiting.pop(identity) for identity in batch.jobs}  # each waited, none twice
            self.running[batch.jobs[0]] = (batch, jobs)
            assert batch.reason
            assert all(takes(self.here[batch.device], one) for one in jobs.values())
            assert batch.bytes == max(one.need.bytes for one in jobs.values())
            every = self.here[batch.device].threads
            assert batch.threads == max(one.need.threads or every for one in jobs.values())
            assert len(jobs) <= MAX_BATCH_JOBS
            assert len(jobs) == 1 or batch.seconds <= MAX_BATCH_SECONDS + 1e-9
            assert len(jobs) == 1 or not any(one.alone or by_itself(one) for one in jobs.values())
            assert len({(one.kind, one.priority, one.need.threads) for one in jobs.values()}) == 1
        assert self.ledger.decide(self.now) == []  # it had decided everything

    @precondition(lambda self: self.running)
    @rule(pick=st.randoms(use_true_random=False), seconds=st.sampled_from([0.0, 0.01, 1.0, 100.0]))
    def done(self, pick: random.Random, seconds: float) -> None:
        self.now += seconds
        batch, _ = self.running.pop(pick.choice(sorted(self.running)))
        self.ledger.done(batch, self.now, seconds * DONE[batch.device] or None)

    @precondition(lambda self: self.ledger is not None)
    @invariant()
    def nothing_is_over_committed(self) -> None:
        assert self.ledger.waiting == len(self.waiting)
        for name, device in self.here.items():
            batches = [batch for batch, _ in self.running.values() if batch.device == name]
            assert list(self.ledger.running(name)) == batches
            memory = most([b.bytes for b in batches], device.slots)
            threads = most([b.threads for b in batches], device.slots)
            assert self.ledger.reserved(name) == (memory, threads)
            assert memory <= device.bytes
            assert threads <= device.threads
            assert len(batches) <= device.slots * (1 + self.lookahead)
            jobs = {i: one for batch, held in self.running.values() if batch.device == name for i, one in held.items()}
            assert len(jobs) <= 1 or not any(by_itself(one) for one in jobs.values())

    def teardown(self) -> None:
        """Whatever happened: with every device there, everything still waiting is run, once each."""
        if self.ledger is None:
            return
        for device in DEVICES:
            if device.name not in self.here:
                self.ledger.join(device, self.now)
                self.here[device.name] = device
        assert not self.ledger.stranded() or any(w.pin == "elsewhere" for w in self.waiting.values())
        for _ in range(1000):
            self.decide()
            if not self.running:
                break
            self.now += 1.0
            self.ledger.done(self.running.pop(min(self.running))[0], self.now)
        assert not self.waiting
        assert not self.ledger._lines
        assert not self.ledger._groups
        assert not self.ledger._ranks


Anything.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestAnything = Anything.TestCase


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_a_thousand_programs_that_fit_nowhere_are_refused_with_both_numbers() -> None:
    rng = random.Random(5)
    devices = [Device(f"d{n}", rng.randint(1, 8), rng.randint(GiB, 64 * GiB), 8, qubits=30) for n in range(20)]
    made = ledger(*devices)
    largest = max(device.bytes for device in devices)
    for number in range(1000):
        memory = largest + rng.randint(1, 2 ** rng.randint(1, 60))
        refusal = made.submit(job(number, memory=memory, qubits=rng.randint(1, 30)), 0.0)
        assert refusal is not None
        assert isinstance(refusal.error, TooLarge)
        assert (refusal.needed.bytes, refusal.bytes) == (memory, largest)
        for text in (str(refusal.error), *refusal.reasons):
            assert f"{memory:,} bytes" in text
            assert format_bytes(memory) in text
        assert f"{largest:,} bytes" in str(refusal.error)
        assert any(f"{largest:,} bytes" in reason for reason in refusal.reasons)
    assert made.waiting == 0
    assert made.decide(0.0) == []


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (job(1, qubits=9), "needs 9 qubits, has 5"),
        (job(1, threads=3), "needs 3 threads, has 2"),
        (job(1, backend="ibm"), "evaluates simulated circuits, not ibm"),
        (job(1, kind="classical"), "runs quantum jobs, not classical ones"),
        (job(1, pin="moon"), "moon: not a device of this site"),
    ],
)
def test_what_no_device_accepts_is_refused_with_the_reason(asked: Job, words: str) -> None:
    refusal = ledger(Device("d", 1, GiB, 2, qubits=5, kinds=("quantum",))).submit(asked, 0.0)
    assert refusal is not None
    assert isinstance(refusal.error, NoDevice)
    assert words in str(refusal.error)
    assert words in refusal.reasons[0]
    assert (refusal.threads, refusal.qubits) == ((2, 5) if asked.pin is None else (0, 0))


def test_what_no_machine_could_hold_is_refused_too() -> None:
    refusal = ledger(WORKER).submit(Job(1, Need(2**2000, 1e50, qubits=1995)), 0.0)
    assert refusal is not None
    assert "2^2000 B" in str(refusal.error)


@pytest.mark.parametrize("taken", [{"memory": 3 * GiB}, {"threads": 3}, {}])
def test_a_policy_that_over_commits_cannot(taken: dict[str, int]) -> None:
    """This one sends everything to the first device, whatever it is shown."""
    blind = Policy("blind", lambda job, now: now, lambda load: (load.number,), lambda job, loads: "first")
    slots = 2 if taken else 1
    made = ledger(
        Device("first", slots, 4 * GiB, 4), Device("second", 9, 64 * GiB, 64, speed=2.0), policy=blind, lookahead=0
    )
    for number in range(2):
        made.submit(job(number, 9.0, **taken), 0.0)
    with pytest.raises(PlacementError) as error:
        made.decide(0.0)
    message = str(error.value)
    assert "'blind'" in message
    for number in {"memory": (f"{3 * GiB:,}", f"{GiB:,}"), "threads": ("3", "1")}.get(next(iter(taken), ""), ("1",)):
        assert number in message
    assert sent(made.running("first")) == [("first", (0,))]  # and nothing was entered
    assert made.waiting == 1


def test_no_policy_is_shown_what_does_not_fit() -> None:
    shown: list[Load] = []

    def choose(asked: Job, loads: Sequence[Load]) -> str | None:
        shown.extend(loads)
        return loads[-1].device.name

    devices = [Device(f"d{n}", 1, n * GiB, 1) for n in range(1, 9)]
    made = ledger(*devices, policy=Policy("watched", lambda job, now: now, lambda load: (load.number,), choose))
    made.submit(job(1, memory=5 * GiB), 0.0)
    made.decide(0.0)
    assert shown
    assert all(load.device.bytes >= 5 * GiB for load in shown)


def test_devices_and_jobs_that_cannot_be() -> None:
    for wrong in ({"slots": 0}, {"threads": 0}, {"bytes": -1}, {"speed": 0.0}, {"latency": -1.0}):
        with pytest.raises(ValueError, match="cannot be"):
            ledger(replace(WORKER, **wrong))
    made = ledger(WORKER)
    with pytest.raises(ValueError, match="joined already"):
        made.join(WORKER)
    with pytest.raises(ValueError, match="asks for"):
        made.submit(job(1, float("nan")), 0.0)
    with pytest.raises(ValueError, match="earliest-finish"):
        Ledger("best")
    with pytest.raises(ValueError, match="lookahead"):
        Ledger(lookahead=-1)
    with pytest.raises(KeyError):
        made.done(Batch("worker", (1,), "", 1, 1, 1.0), 0.0)


# -- a site that changes -----------------------------------------------------------------------------------------------


def test_a_job_waits_for_a_device_that_the_site_expects() -> None:
    qpu = Device("qpu", 1, GiB, 1, backend="qpu")
    made = ledger(WORKER, expected=[qpu, Device("big", 1, 64 * GiB, 1)])
    assert made.submit(job(1, backend="qpu"), 0.0) is None
    assert made.submit(job(2, memory=50 * GiB), 0.0) is None
    assert made.submit(job(3, pin="big"), 0.0) is None
    assert made.submit(job(4, memory=65 * GiB), 0.0) is not None
    assert made.decide(0.0) == []
    assert not made.stranded()
    made.join(qpu)
    assert sent(made.decide(1.0)) == [("qpu", (1,))]
    made.join(Device("big", 2, 128 * GiB, 2))  # not as it was expected, but it does
    assert sent(made.decide(2.0)) == [("big", (2,)), ("big", (3,))]


def test_a_device_that_leaves_gives_back_everything_and_strands_what_only_it_could_take() -> None:
    big = Device("big", 1, 64 * GiB, 1, 0.012)
    made = ledger(WORKER, big)
    for number in range(4):
        made.submit(job(number, 0.2, memory=50 * GiB, run=str(number)), 0.0)
    made.submit(job(9, 1.0), 0.0)
    gone = [identity for batch in made.decide(0.0) for identity in batch.jobs if batch.device == "big"]
    assert made.waiting < 4
    assert list(made.leave("big")) == gone
    with pytest.raises(KeyError):
        made.running("big")
    assert {refusal.job for refusal in made.stranded()} == set(range(4)) - set(gone)
    for number in gone:
        assert made.submit(job(number, 0.2, memory=50 * GiB), 1.0) is not None
    made.join(big, 2.0)
    assert not made.stranded()
    assert {i for batch in drain(made, 2.0) for i in batch.jobs} == set(range(4)) - set(gone)


# -- who leaves first --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(-2, 2), st.sampled_from([0.01, 0.7, 3.0]), st.booleans()), max_size=30))
def test_higher_priorities_leave_first(policy: str, asked: list[tuple[int, float, bool]]) -> None:
    made = ledger(WORKER, policy=policy, lookahead=0)
    for number, (priority, seconds, alone) in enumerate(asked):
        made.submit(job(number, seconds, priority=priority, run=str(number % 3), alone=alone), 0.0)
    order = [asked[identity][0] for batch in drain(made) for identity in batch.jobs]
    assert order == sorted(order, reverse=True)
    assert len(order) == len(asked)


@pytest.mark.parametrize("policy", ["first-come", "least-busy", "round-robin"])
def test_these_keep_the_order_of_arrival(policy: str) -> None:
    made = ledger(WORKER, policy=policy, batch_jobs=1)
    rng = random.Random(3)
    for number in range(50):
        made.submit(job(number, rng.choice([0.01, 0.1, 5.0]), rng.choice([1, GiB])), float(number))
    assert [identity for batch in drain(made, 50.0) for identity in batch.jobs] == list(range(50))


def test_the_longest_chain_leaves_first_but_nobody_waits_for_ever() -> None:
    made = ledger(WORKER, lookahead=0)
    made.submit(job("short", 1.0), 0.0)
    made.submit(job("long", 2.0), 0.0)
    made.submit(job("chain", 1.0, rank=30.0), 0.0)
    assert sent(made.decide(0.0)) == [("worker", ("chain",))]
    made = ledger(WORKER, lookahead=0)
    made.submit(job("short", 1.0), 0.0)
    (batch,) = made.decide(0.0)
    made.submit(job("patient", 1.0), 0.0)
    for now in range(1, 400):  # longer ones keep coming, one for each that leaves
        made.submit(job(now, 20.0), float(now))
        made.done(batch, float(now))
        (batch,) = made.decide(float(now))
        if batch.jobs == ("patient",):
            break
    assert 190 <= now <= 200


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(POLICIES)), st.integers(1, 4), st.integers(2, 4), st.integers(0, 2), st.integers(0, 10**6)
)
def test_a_large_job_runs_although_small_ones_keep_coming(
    policy: str, devices: int, slots: int, lookahead: int, seed: int
) -> None:
    """The small ones alone would keep every device too full for ever: as soon as one ends, two more come."""
    rng = random.Random(seed)
    made = ledger(
        *(Device(f"d{n}", slots, 100, slots, 0.01) for n in range(devices)), policy=policy, lookahead=lookahead
    )
    flying: list[Batch] = []
    numbers = itertools.count()

    def small() -> Job:
        return job(next(numbers), rng.choice([0.6, 1.0, 2.0]), rng.randint(20, 40), run=rng.choice("ab"))

    now = 0.0
    for _ in range(3 * devices * slots):
        made.submit(small(), now)
    flying += made.decide(now)
    large = rng.choice([
        job("large", 1.0, 90), job("large", 1.0, 90, pin="d0"), job("large", 1.0, 10, slots),
        job("large", 1.0, 10, sole=True), job("large", 1.0, 10, sole=True, pin="d0"),
    ])  # fmt: skip
    assert made.submit(large, now) is None
    for _ in range(400 * devices * slots):
        flying += made.decide(now)
        if any("large" in batch.jobs for batch in flying):
            break
        batch = flying.pop(rng.randrange(len(flying)))
        now += rng.uniform(0.0, 1.0)
        made.done(batch, now)
        for _ in range(2):
            made.submit(small(), now)
    else:
        raise AssertionError("it starves")
    event(f"after {int(now)} s")


def test_others_use_a_device_that_is_kept_free_only_as_long_as_it_drains() -> None:
    made = ledger(Device("d", 4, 100, 4), lookahead=0)
    for number, seconds in enumerate([10.0, 10.0, 2.0]):
        made.submit(job(number, seconds, 30), 0.0)
    made.decide(0.0)
    made.submit(job("large", 20.0, 60), 1.0)
    made.submit(job("long", 15.0, 10), 1.0)
    made.submit(job("short", 3.0, 10), 1.0)
    (batch,) = made.decide(1.0)  # room for the large one is predicted at 10 s: the short one is gone by then
    assert batch.jobs == ("short",)
    first, second, third = (batch for batch in made.running("d") if batch.jobs[0] in (0, 1, 2))
    made.done(third, 2.0)
    assert made.decide(2.0) == []
    made.done(first, 9.0)
    (batch,) = made.decide(9.0)
    assert batch.jobs == ("large",)
    assert "kept free" in batch.reason
    assert second in made.running("d")


def test_a_batch_that_uses_a_kept_device_is_gone_in_time_as_a_whole() -> None:
    made = ledger(Device("d", 4, 100, 4), lookahead=0)
    for number in range(3):
        made.submit(job(number, 10.0, 30), 0.0)
    assert len(made.decide(0.0)) == 3
    made.submit(job("large", 20.0, 60), 9.7)
    for name in ("one", "two"):
        made.submit(job(name, 0.2, 10), 9.7)
    assert sent(made.decide(9.7)) == [("d", ("one",))]


def test_whoever_is_first_may_use_what_is_kept_for_a_later_one() -> None:
    made = ledger(Device("d", 2, 100, 2), lookahead=0)
    made.submit(job("running", 50.0, 50), 0.0)
    (running,) = made.decide(0.0)
    made.submit(job("large", 9.0, 90), 1.0)
    assert made.decide(1.0) == []
    made.submit(job("urgent", 90.0, 95, priority=1), 2.0)
    assert made.decide(2.0) == []
    made.done(running, 50.0)
    (urgent,) = made.decide(50.0)
    assert urgent.jobs == ("urgent",)
    made.done(urgent, 140.0)
    assert sent(made.decide(140.0)) == [("d", ("large",))]


def test_a_job_that_is_cancelled_frees_what_was_kept_for_it() -> None:
    made = ledger(Device("d", 2, 100, 2), lookahead=0)
    made.submit(job("running", 50.0, 50), 0.0)
    made.decide(0.0)
    made.submit(job("large", 90.0, 90), 1.0)
    made.submit(job("small", 80.0, 30), 1.0)
    assert made.decide(1.0) == []
    made.cancel("large")
    assert sent(made.decide(2.0)) == [("d", ("small",))]


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from([0.02, 0.3, 1.0]), min_size=2, max_size=4),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_runs_that_always_have_something_to_do_get_equal_shares(sizes: list[float], slots: int, seed: int) -> None:
    made = ledger(Device("d", slots, 100, slots), policy="fair-share", lookahead=0)
    numbers = itertools.count()
    used = dict.fromkeys(range(len(sizes)), 0.0)
    of: dict[Hashable, int] = {}
    flying: list[Batch] = []
    rng = random.Random(seed)

    def ask(run: int, count: int) -> None:
        for _ in range(count):
            of[number := next(numbers)] = run
            made.submit(job(number, sizes[run], 1, run=str(run)), 0.0)

    for run in used:
        ask(run, 100)
    bound = MAX_BATCH_SECONDS + max(sizes)  # one batch more than the others, at any moment
    for _ in range(40):
        for batch in made.decide(0.0):
            flying.append(batch)
            for identity in batch.jobs:
                used[of[identity]] += sizes[of[identity]]
                ask(of[identity], 1)
            assert max(used.values()) - min(used.values()) <= bound + 1e-9
        made.done(flying.pop(rng.randrange(len(flying))), 0.0)


def test_within_a_run_loops_share_and_a_newcomer_gets_no_credit() -> None:
    made = ledger(WORKER, policy="fair-share", lookahead=0, batch_jobs=1)
    for number in range(40):
        made.submit(job(("greedy", number), run="r", loop="greedy"), 0.0)
    for number in range(5):
        made.submit(job(("modest", number), run="r", loop="modest"), 0.0)
    names = []
    for now in range(20):
        (batch,) = made.decide(float(now))
        names.append(batch.jobs[0][0])  # type: ignore[index]
        made.done(batch, float(now))
    assert Counter(names[:10]) == {"greedy": 5, "modest": 5}
    for number in range(20):
        made.submit(job(("new", number), run="s"), 20.0)
    names = []
    for now in range(20, 40):
        (batch,) = made.decide(float(now))
        names.append(batch.jobs[0][0])  # type: ignore[index]
        made.done(batch, float(now))
    assert abs(names.count("greedy") - names.count("new")) <= 2  # not twenty for the newcomer


# -- where to ----------------------------------------------------------------------------------------------------------


def test_a_job_goes_where_it_ends_first_and_waits_for_that_if_need_be() -> None:
    slow, fast = Device("slow", 1, GiB, 1), Device("fast", 1, GiB, 1, speed=10.0)
    made = ledger(slow, fast)
    made.submit(job(1, 100.0), 0.0)
    made.submit(job(2, 100.0), 0.0)
    made.submit(job(3, 1.0), 0.0)
    # 100 s on the slow one, or 10 + 10 s on the fast one: the second waits, and the third does not
    assert sent(made.decide(0.0)) == [("fast", (1,)), ("slow", (3,))]
    made.done(made.running("fast")[0], 10.0)
    assert sent(made.decide(10.0)) == [("fast", (2,))]


def test_many_that_wait_for_the_same_device_take_the_slower_one_too() -> None:
    slow, fast = Device("slow", 1, GiB, 1), Device("fast", 1, GiB, 1, speed=10.0)
    made = ledger(slow, fast)
    for number in range(20):
        made.submit(job(number, 100.0), 0.0)
    assert sent(made.decide(0.0)) == [("fast", (0,)), ("slow", (1,))]  # the last of them would wait for 190 s


def test_who_joins_those_that_wait_may_change_their_mind() -> None:
    slow, fast = Device("slow", 1, GiB, 1), Device("fast", 1, GiB, 1, speed=10.0)
    made = ledger(slow, fast)
    made.submit(job(1, 100.0), 0.0)
    made.submit(job(2, 100.0), 0.0)
    assert sent(made.decide(0.0)) == [("fast", (1,))]
    for number in range(3, 9):
        made.submit(job(number, 100.0), 0.0)
        assert made.decide(0.0) == []  # the last of them ends at 80 s at most
    for number in range(9, 13):
        made.submit(job(number, 100.0), 0.0)
    assert sent(made.decide(0.0)) == [("slow", (2,))]


def test_nobody_waits_for_a_device_that_is_too_small() -> None:
    """The fast ones are of one kind: the small one frees soon, and the other does not."""
    devices = [Device("slow", 1, 15, 1), Device("small", 1, 9, 1, speed=10.0), Device("fast", 1, 15, 1, speed=10.0)]
    made = ledger(*devices)
    made.submit(job(1, 9000.0, 9, pin="fast"), 0.0)
    made.submit(job(2, 1.0, 9, pin="small"), 0.0)
    assert len(made.decide(0.0)) == 2
    made.submit(job(3, 100.0, 15), 0.0)
    assert sent(made.decide(0.0)) == [("slow", (3,))]


def test_what_is_overdue_is_waited_for_less_and_less() -> None:
    slow, fast = Device("slow", 1, GiB, 1), Device("fast", 1, GiB, 1, speed=10.0)
    made = ledger(slow, fast)
    made.submit(job(1, 100.0), 0.0)
    made.submit(job(2, 100.0), 0.0)
    made.decide(0.0)
    assert made.decide(50.0) == []
    assert sent(made.decide(1000.0)) == [("slow", (2,))]


def test_of_devices_that_end_together_the_cheaper_one_is_taken() -> None:
    devices = [
        Device(name, 1, GiB, 1, backend="q", cost_per_shot=cost) for name, cost in (("dear", 2.0), ("cheap", 1.0))
    ]
    made = ledger(*devices)
    made.submit(Job(1, Need(1, 1.0, shots=1000), backend="q"), 0.0)
    assert sent(made.decide(0.0)) == [("cheap", (1,))]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("first-come", "aab"), ("least-busy", "aba"), ("round-robin", "aba"), ("earliest-finish", "aba")],
)
def test_each_policy_has_its_own_next_device(policy: str, expected: str) -> None:
    made = ledger(Device("a", 2, GiB, 2), Device("b", 2, GiB, 2), policy=policy)
    names = []
    for number in range(3):
        made.submit(job(number, 9.0, 1), 0.0)
        names += [batch.device for batch in made.decide(0.0)]
    assert "".join(names) == expected


@settings(max_examples=60)
@given(st.lists(st.sampled_from([None, "d0", "d1", "d2"]), min_size=1, max_size=40), st.sampled_from(sorted(POLICIES)))
def test_pins_are_kept(pins: list[str | None], policy: str) -> None:
    made = ledger(*(Device(f"d{n}", 1, GiB, 1) for n in range(3)), policy=policy)
    for number, pin in enumerate(pins):
        made.submit(job(number, 0.1 * (number % 7), pin=pin), 0.0)
    batches = drain(made)
    assert sorted(identity for batch in batches for identity in batch.jobs) == list(range(len(pins)))
    assert all(pins[identity] in (None, batch.device) for batch in batches for identity in batch.jobs)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("seconds", "alone", "expected"),
    [
        (1e-3, True, "near"),
        (1e-3, False, "worker"),
        (0.119, True, "near"),
        (0.13, True, "worker"),
        (5.0, True, "worker"),
    ],
)
def test_only_a_short_lone_job_stays_at_hand(
    policy: str, reverse: bool, seconds: float, alone: bool, expected: str
) -> None:
    made = ledger(*([WORKER, NEAR] if reverse else [NEAR, WORKER]), policy=policy)
    made.submit(job(1, seconds, alone=alone), 0.0)
    assert sent(made.decide(0.0)) == [(expected, (1,))]


@settings(max_examples=60)
@given(st.lists(st.sampled_from([1e-3, 0.2, 30.0]), max_size=20), st.sampled_from([1e-3, 1.0, 99.0]))
def test_a_lone_job_is_not_delayed(others: list[float], seconds: float) -> None:
    """Whatever else waits, and however much better another device would be: a slot is free, it leaves, and alone."""
    made = ledger(Device("fast", 1, GiB, 1, speed=1000.0), NEAR, lookahead=0)
    for number, other in enumerate(others):
        made.submit(job(number, other, 1, template="t"), 0.0)
    made.decide(0.0)
    made.submit(job("lone", seconds, 1, alone=True, template="t"), 0.0)
    assert [batch.jobs for batch in made.decide(0.0)] == [("lone",)]


def test_the_engine_aside_takes_what_fits_nowhere_else() -> None:
    made = ledger(WORKER, NEAR, expected=[Device("big", 1, 6 * GiB, 1)])
    made.submit(job("only there", memory=7 * GiB), 0.0)
    made.submit(job("elsewhere, later", memory=5 * GiB), 0.0)
    assert sent(made.decide(0.0)) == [("near", ("only there",))]


# -- with whom ---------------------------------------------------------------------------------------------------------


def test_what_waited_leaves_together_equal_templates_first() -> None:
    made = ledger(WORKER, lookahead=0)
    made.submit(job("running", 0.01), 0.0)
    (running,) = made.decide(0.0)
    for number in range(8):
        made.submit(job(number, 0.01, template="tu"[number % 2]), 0.1 * number)
    assert made.decide(1.0) == []
    made.done(running, 1.0)
    (batch,) = made.decide(1.0)
    assert batch.jobs == (0, 2, 4, 6, 1, 3, 5, 7)
    assert "8 of 8 waiting, 4 of one template" in batch.reason


def test_batches_are_bounded_in_time_number_and_bytes() -> None:
    def first(asked: list[Job], *devices: Device) -> int:
        made = ledger(*(devices or (WORKER,)), lookahead=0)
        for one in asked:
            made.submit(one, 0.0)
        return len(made.decide(0.0)[0].jobs)

    assert first([job(n, 0.2) for n in range(5)]) == 2
    assert first([job(n, 0.2) for n in range(5)], replace(WORKER, speed=2.0)) == 5
    assert first([job(n, 9.0) for n in range(2)]) == 1
    assert first([job(n, 0.0) for n in range(5000)]) == MAX_BATCH_JOBS
    assert first([job(n, 0.01, memory=4 * GiB - n) for n in range(5)]) == 5  # one after the other: the largest counts
    assert first([job(n, 0.01, memory=[1, GiB][n]) for n in range(2)]) == 1  # no large one in the wake of a small one
    assert first([job(n, 0.01, priority=n) for n in range(2)]) == 1
    assert first([job(n, 0.01, kind=["quantum", "classical"][n]) for n in range(2)]) == 1


def test_free_slots_share_what_waits() -> None:
    wide = Device("wide", 4, 4 * GiB, 4, 0.012)
    for count, expected in ((40, [10, 10, 10, 10]), (2, [2]), (0, [])):
        made = ledger(wide, lookahead=0)
        for number in range(count):
            made.submit(job(number, 0.006, 1), 0.0)
        assert [len(batch.jobs) for batch in made.decide(0.0)] == expected


def test_the_next_batch_is_on_its_way_if_the_slot_frees_soon() -> None:
    for seconds, counts in ((0.2, [1, 2, 3]), (0.4, [1, 2, 2]), (9.0, [1, 1, 1])):
        for lookahead, expected in enumerate(counts):
            made = ledger(replace(WORKER, latency=0.05), lookahead=lookahead, batch_jobs=1)
            for number in range(6):
                made.submit(job(number, seconds), 0.0)
            batches = made.decide(0.0)
            assert len(batches) == expected
            assert ["ahead" in batch.reason for batch in batches] == [False, True, True][:expected]


def test_what_is_sent_ahead_counts_in_whatever_order_it_starts() -> None:
    made = ledger(Device("d", 2, 100, 2, 0.05), lookahead=3, batch_jobs=1)
    for number, memory in enumerate([60, 30, 40, 10, 50]):
        made.submit(job(number, 0.1, memory), 0.0)
    found = [batch.bytes for batch in made.decide(0.0)]
    assert found == [60, 30, 40, 10]  # 50 and 60 would be too much, if 30 and 40 end first
    assert made.reserved("d") == (100, 2)


# -- the same again ----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(JOBS, max_size=40, unique_by=lambda j: j.id), st.sampled_from(sorted(POLICIES)), st.integers(0, 3))
def test_equal_calls_give_equal_answers(asked: list[Job], policy: str, ends: int) -> None:
    def play() -> list[Any]:
        made = ledger(*DEVICES, policy=policy)
        answers: list[Any] = []
        flying: list[Batch] = []
        for number, one in enumerate(asked):
            refusal = made.submit(one, number / 7)
            answers.append(refusal and (str(refusal.error), refusal.reasons))
            flying += made.decide(number / 7)
            for batch in flying[:ends]:
                made.done(batch, number / 7)
            answers.append(flying)
            flying = flying[ends:]
        return answers

    assert play() == play()


# -- wide programs -----------------------------------------------------------------------------------------------------


def test_a_wide_one_has_all_slots_and_threads_of_a_device() -> None:
    made = ledger(Device("four", 4, 16 * GiB, 4, 0.012))
    for number in range(4):
        made.submit(job(f"small {number}"), 0.0)
    small = made.decide(0.0)
    assert {batch.threads for batch in small} == {1}
    made.submit(job("wide", 10.0, threads=0), 0.1)
    made.submit(job("late"), 0.2)
    for batch in small[:3]:
        made.done(batch, 1.0)
        assert made.decide(1.0) == []  # one is still on it, and nobody else is let in before
    made.done(small[3], 2.0)
    assert sent(drain(made, 2.0)) == [("four", ("wide",)), ("four", ("late",))]
    made = ledger(Device("four", 4, 16 * GiB, 4, 0.012))
    made.submit(job("wide", 10.0, threads=0), 0.0)
    (wide,) = made.decide(0.0)
    assert (wide.threads, made.reserved("four")) == (4, (GiB, 4))
    made.submit(job("small"), 0.1)
    assert made.decide(0.1) == []
    made.done(wide, 10.0)
    assert sent(made.decide(10.0)) == [("four", ("small",))]


# -- speeds ------------------------------------------------------------------------------------------------------------


def test_speeds_are_corrected_by_what_batches_took() -> None:
    """Twice the seconds of others with the same jobs, whatever was predicted of these."""
    made = ledger(*(replace(WORKER, name=name) for name in "abcd"))
    slow = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 2.0}
    for turn in range(40):
        for name in "abcd":
            wrong = (0.5, 4.0, 1.0)[turn % 3]
            made.submit(job(f"{name}{turn}", pin=name, template=f"t{turn % 3}"), float(turn))
            (batch,) = made.decide(float(turn))
            made.done(batch, turn + 0.5, wrong * slow[name])
    assert [made.speed(name) for name in "abcd"] == pytest.approx([1.0, 1.0, 1.0, 0.5])
    made.leave("d")
    made.join(replace(WORKER, name="d"))
    assert (made.speed("d"), made.speed("nowhere")) == (1.0, 1.0)


def test_predictions_that_are_learned_say_nothing_of_speeds() -> None:
    """The first batches, all on one device, were predicted five times too short; then another one joins."""
    made = ledger(replace(WORKER, name="a"))
    for turn in range(60):
        made.submit(job(f"old{turn}", 0.2, pin="a", template="t"), float(turn))
        (batch,) = made.decide(float(turn))
        made.done(batch, turn + 0.5, 1.0)
    made.join(replace(WORKER, name="b"))
    for turn in range(60, 100):
        for name in "ab":
            made.submit(job(f"{name}{turn}", 1.0, pin=name, template="t"), float(turn))
            (batch,) = made.decide(float(turn))
            made.done(batch, turn + 0.5, 1.0)
        assert made.speed("a") == made.speed("b") == 1.0


def test_a_single_one_travels_alone_however_fast_the_device() -> None:
    for speed in (1.0, 100.0):
        made = ledger(replace(WORKER, speed=speed), batch_seconds=0.2)
        for number in range(6):
            made.submit(job(number, 0.01, 1, single=number in (0, 3)), 0.0)
        batches = [jobs for _, jobs in sent(drain(made))]
        assert (0,) in batches
        assert (3,) in batches
        assert max(map(len, batches)) > 1


def test_what_runs_on_one_device_alone_says_nothing_of_its_speed() -> None:
    made = ledger(replace(WORKER, name="a"), replace(WORKER, name="b"))
    for turn in range(40):
        for name, took in (("a", 1.0), ("b", 5.0)):
            made.submit(job(f"{name}{turn}", pin=name, template=f"only {name}"), float(turn))
            (batch,) = made.decide(float(turn))
            made.done(batch, turn + 0.5, took)
    assert made.speed("a") == made.speed("b") == 1.0


# -- long calls in parts -----------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 100), st.integers(0, 50))
def test_parts_are_the_whole(rows: int, columns: int, seconds: float, slots: int) -> None:
    parts = parted(rows, columns, seconds, slots, 0.12)
    covered = [
        (row, column)
        for part in parts
        for row in range(*part.rows)
        for column in range(*part.columns)
        if row < rows and column < columns
    ]
    assert sorted(covered) == list(itertools.product(range(rows), range(columns)))
    assert len(covered) == len(set(covered)) == rows * columns
    assert list(parts) == sorted(parts)
    assert len(parts) <= max(1, min(slots, seconds / 0.12))
    assert all(len({part.rows for part in parts if row in range(*part.rows)}) == 1 for row in range(rows))


def test_parts_by_hand() -> None:
    assert parted(10, 6, 0.2, 8, 0.12) == (((0, 10), (0, 6)),)
    assert parted(10, 6, 9.0, 2, 0.12) == (((0, 5), (0, 6)), ((5, 10), (0, 6)))
    assert parted(2, 6, 9.0, 3, 0.12) == (((0, 1), (0, 6)), ((1, 2), (0, 3)), ((1, 2), (3, 6)))
    assert parted(1, 1, 9.0, 8, 0.12) == (((0, 1), (0, 1)),)
    assert parted(0, 6, 9.0, 8, 0.12) == (((0, 0), (0, 6)),)


def test_slots_that_are_free_for_the_parts_of_one() -> None:
    pair = Device("pair", 2, 4 * GiB, 2, 0.012)
    made = ledger(pair, WORKER, NEAR, Device("other", 4, 9 * GiB, 4, backend="q"))
    assert made.free(job("parts")) == 3  # not at hand, and not what evaluates something else
    assert made.free(job("parts", memory=3 * GiB)) == 2
    assert made.free(job("parts", memory=5 * GiB)) == 0
    assert made.free(job("parts", threads=2)) == 1
    assert made.free(job("parts", threads=0)) == 2
    assert made.free(job("parts", pin="pair")) == 2
    assert made.free(job("parts", backend="q")) == 4
    made.submit(job("one", pin="pair"), 0.0)
    assert made.free(job("parts")) == 0  # somebody waits
    made.decide(0.0)
    assert made.free(job("parts")) == 2
    made.submit(job("two", sole=True, pin="worker"), 0.0)
    made.decide(0.0)
    assert made.free(job("parts")) == 1
    assert Ledger(expected=[pair, WORKER]).free(job("parts")) == 3
    assert Ledger().free(job("parts")) == 0
