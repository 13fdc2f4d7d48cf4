"""Virtual time: work done is work asked, the bound is one, and a schedule worked out by hand comes out."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter
from runs import recorded

import hybridq as hq
from hybridq import journal as records
from hybridq.journal import read_records
from hybridq.ledger import Ledger
from hybridq.policies import POLICIES, Batch, Device, Job
from hybridq.resources import Need
from hybridq.simulation import (
    Change,
    PlainOrder,
    Result,
    Task,
    Trace,
    lower_bound,
    of_journal,
    ranked,
    scattered,
    simulate,
    studies,
    trace_from_json,
    trace_to_json,
)

SITE = (
    Device("a", 1, 2**32, 1, 0.012),
    Device("b", 2, 2**33, 2, 0.012, 2.0),
    Device("c", 4, 2**33, 4, 0.1),
    Device("near", 1, 2**31, 1, 1e-4, aside=True),
)


def task(identity: str, seconds: float, *after: str, at: float = 0.0, memory: int = 1, failures: int = 0) -> Task:
    return Task(Job(identity, Need(memory, seconds)), seconds, after, at, failures)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """A few studies on a site whose devices come and go, with failures."""
    rng = draw(st.randoms(use_true_random=False))
    tasks = studies(draw(st.sampled_from([1, 60, 200])), rng.randrange(10**6), spread=draw(st.sampled_from([0.0, 9.0])))
    tasks = tuple(replace(t, failures=int(rng.random() < 0.05) * rng.randint(1, 2)) for t in tasks)
    changes = []
    for device in SITE[: draw(st.integers(0, 3))]:
        at = 0.0
        for joins in (False, True) * draw(st.integers(1, 3)):
            at += rng.uniform(0.0, 4.0)
            changes.append(Change(at, device, joins))
    return ranked(scattered(Trace(tasks, SITE, tuple(changes)), draw(st.sampled_from([0.0, 0.5])), rng.randrange(999)))


@settings(max_examples=30)
@given(traces(), st.sampled_from([*sorted(POLICIES), "plain"]))
def test_what_is_conserved(trace: Trace, policy: str) -> None:
    found = simulate(trace, PlainOrder() if policy == "plain" else Ledger(policy))
    ids = [t.job.id for t in trace.tasks]
    assert not found.refusals
    assert sorted(found.decisions) == sorted(ids)  # each exactly once; `simulate` raises if one is run twice
    assert found.done == pytest.approx(found.asked)
    assert found.asked == pytest.approx(sum(t.seconds for t in trace.tasks))
    assert found.wasted >= sum(t.failures * t.seconds for t in trace.tasks) - 1e-9
    speeds = {device.name: device.speed * device.slots for device in SITE}
    spent = sum(part * found.makespan * speeds[name] for name, part in found.utilisation.items())
    assert spent == pytest.approx(found.done + found.wasted)
    assert all(-1e-9 <= part <= 1 + 1e-9 for part in found.utilisation.values())
    assert found.makespan >= found.bound - 1e-9
    assert len(found.waits) == len(ids)
    assert min(found.waits) >= -1e-9
    if policy != "plain":
        assert found.over_committed == 0
    for t in trace.tasks:
        decision = found.decisions[t.job.id]
        assert t.at <= decision.sent <= decision.begun <= decision.ended <= found.makespan
        assert all(found.decisions[before].ended <= decision.sent for before in t.after)
        assert decision.reason


@settings(max_examples=10)
@given(traces(), st.sampled_from(sorted(POLICIES)))
def test_the_same_trace_gives_the_same_result(trace: Trace, policy: str) -> None:
    assert simulate(trace, Ledger(policy)) == simulate(trace, Ledger(policy))


def optimum(seconds: list[float], slots: list[float]) -> float:
    """The best makespan of independent jobs on slots of given speeds, by trying every assignment."""
    return min(
        max(sum(s for s, where in zip(seconds, places, strict=True) if where == k) / v for k, v in enumerate(slots))
        for places in itertools.product(range(len(slots)), repeat=len(seconds))
    )


@settings(max_examples=40)
@given(
    st.lists(st.floats(0.1, 9.0), min_size=1, max_size=6),
    st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=3),
)
def test_the_lower_bound_is_one(seconds: list[float], speeds: list[float]) -> None:
    devices = [Device(f"d{n}", 1, 1, 1, 0.0, speed) for n, speed in enumerate(speeds)]
    tasks = [task(str(n), s) for n, s in enumerate(seconds)]
    best = optimum(seconds, speeds)
    assert lower_bound(tasks, devices) <= best + 1e-9
    found = simulate(Trace(tuple(tasks), tuple(devices)), Ledger())
    assert best - 1e-9 <= found.makespan <= 2 * best + 1e-9  # longest first is within 2 of the best on such machines


def test_the_bound_knows_chains_trips_speeds_and_memory() -> None:
    small, large = Device("small", 3, 10, 3, 0.5), Device("large", 1, 100, 1, 0.25, 2.0)
    chain = [task("a", 4.0, at=1.0), task("b", 6.0, "a"), task("c", 1.0)]
    assert lower_bound(chain, [small, large]) == pytest.approx(1.0 + (0.25 + 2.0) + (0.25 + 3.0))
    assert lower_bound(chain, [small]) == pytest.approx(1.0 + 4.5 + 6.5)
    wide = [task(str(n), 10.0) for n in range(10)]
    assert lower_bound(wide, [small, large]) == pytest.approx(100 / 5)
    heavy = [task(str(n), 10.0, memory=50 if n < 6 else 1) for n in range(10)]
    assert lower_bound(heavy, [small, large]) == pytest.approx(60 / 2)  # six fit only the large one
    assert lower_bound([], [small]) == 0
    fork = [
        task("problem", 2.0),
        *(task(str(n), 1.0, "problem") for n in range(30)),
        task("fit", 4.0, *map(str, range(30))),
    ]
    plain = Device("plain", 3, 10, 3)
    assert lower_bound(fork, [plain]) == pytest.approx(2 + 30 / 3 + 4)  # and that is what it takes
    assert simulate(Trace(tuple(fork), (plain,)), Ledger(lookahead=0)).makespan == pytest.approx(16.0)


def test_a_schedule_worked_out_by_hand() -> None:
    device = Device("d", 1, 10, 1, latency=0.5, speed=2.0)
    tasks = (task("first", 4.0), task("second", 6.0, "first"), task("late", 1.0, at=20.0))
    found = simulate(Trace(tasks, (device,)), Ledger())
    decisions = {name: (d.sent, d.begun, d.ended) for name, d in found.decisions.items()}
    assert decisions == {"first": (0, 0.25, 2.25), "second": (2.5, 2.75, 5.75), "late": (20, 20.25, 20.75)}
    assert found.makespan == 21.0
    assert found.waits == (0.25, 0.25, 0.25)
    assert found.utilisation == {"d": pytest.approx(5.5 / 21)}
    assert found.bound == pytest.approx(21.0)  # no schedule is faster


def test_sent_ahead_it_begins_when_the_slot_frees() -> None:
    device = Device("d", 1, 10, 1, latency=0.1)
    tasks = tuple(task(str(n), 0.4) for n in range(3))
    ahead = simulate(Trace(tasks, (device,)), Ledger(lookahead=1))
    bare = simulate(Trace(tasks, (device,)), Ledger(lookahead=0))
    assert ahead.makespan == pytest.approx(0.05 + 0.4 + 0.4 + 0.4 + 0.05)
    assert bare.makespan == pytest.approx(3 * 0.5)


def test_what_was_on_a_lost_device_starts_over() -> None:
    a, b = Device("a", 1, 10, 1), Device("b", 1, 10, 1)
    trace = Trace((task("x", 10.0), task("y", 10.0)), (a, b), (Change(4.0, a, False),))
    found = simulate(trace, Ledger())
    assert found.makespan == 20.0
    assert found.wasted == 4.0
    assert found.decisions["x"].device == found.decisions["y"].device == "b"
    assert found.utilisation == {"a": pytest.approx(0.2), "b": pytest.approx(1.0)}
    again = simulate(replace(trace, changes=(*trace.changes, Change(5.0, a, True))), Ledger())
    assert again.makespan == 15.0


def test_a_failure_is_tried_again_and_its_work_is_wasted() -> None:
    found = simulate(Trace((task("x", 3.0, failures=2),), (Device("d", 1, 10, 1),)), Ledger())
    assert (found.makespan, found.done, found.wasted, found.batches) == (9.0, 3.0, 6.0, 3)


def test_a_refused_task_takes_those_that_need_it_with_it() -> None:
    tasks = (
        task("x", 1.0),
        task("too large", 1.0, memory=11),
        task("after", 1.0, "too large", "x"),
        task("z", 1.0, "x"),
    )
    found = simulate(Trace(tasks, (Device("d", 1, 10, 1),)), Ledger())
    assert [refusal.job for refusal in found.refusals] == ["too large"]
    assert set(found.decisions) == {"x", "z"}
    assert found.asked == found.done == 2.0


def test_what_cannot_be_played_says_so() -> None:
    device = Device("d", 1, 10, 1)
    with pytest.raises(ValueError, match="same id"):
        simulate(Trace((task("x", 1.0), task("x", 2.0)), (device,)), Ledger())
    with pytest.raises(RuntimeError, match="1 jobs were never run"):
        simulate(Trace((task("x", 1.0, "nothing"),), (device,)), Ledger())


def test_a_plain_order_over_commits_and_the_ledger_does_not() -> None:
    trace = Trace(tuple(task(str(n), 1.0, memory=6) for n in range(4)), (Device("d", 2, 10, 2),))
    assert simulate(trace, PlainOrder()).over_committed == 2  # the second of each pair
    assert simulate(trace, Ledger()).over_committed == 0


def test_ranks_are_the_longest_chains_behind() -> None:
    tasks = (task("a", 1.0), task("b", 2.0, "a"), task("c", 5.0, "a"), task("d", 1.0, "b", "c"))
    assert [t.job.rank for t in ranked(Trace(tasks, ())).tasks] == [6.0, 1.0, 1.0, 0.0]


def test_scatter_has_mean_one_and_a_seed() -> None:
    trace = Trace(tuple(task(str(n), 2.0) for n in range(20_000)), ())
    found = scattered(trace, 0.5, 1)
    mean = sum(t.seconds for t in found.tasks) / 20_000
    assert mean == pytest.approx(2.0, abs=4 * 2.0 * 0.533 / 20_000**0.5)  # four standard errors
    assert found == scattered(trace, 0.5, 1)
    assert found != scattered(trace, 0.5, 2)
    assert scattered(trace, 0.0, 1) == trace


def test_studies_are_what_they_say() -> None:
    tasks = studies(3000, 7, spread=100.0)
    assert 3000 <= len(tasks) < 9000
    assert tasks == studies(3000, 7, spread=100.0)
    seen: set[object] = set()
    for t in tasks:
        assert seen.issuperset(t.after)
        seen.add(t.job.id)
        need = t.job.need
        assert t.seconds == need.seconds
        if t.job.kind == "quantum":
            assert 4 <= need.qubits <= 20
            assert need.bytes > 16 * 2**need.qubits
        else:
            assert 0.01 <= need.seconds <= 5.0
    assert {t.job.kind for t in tasks} == {"quantum", "classical"}


def test_a_trace_survives_as_text() -> None:
    rng = random.Random(2)
    trace = Trace(studies(50, 3), SITE, tuple(Change(rng.random(), device, False) for device in SITE))
    found = trace_from_json(trace_to_json(trace))
    assert found == trace
    for text in ("[]", "{}", '{"tasks": [{}], "devices": [], "changes": []}', "no"):
        with pytest.raises(ValueError, match=r"not a trace|Expecting value"):
            trace_from_json(text)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_chains_first_beats_the_order_of_arrival(seed: int) -> None:
    """One long loop behind many short jobs: in order of arrival it begins last, and all wait for it."""
    rng = random.Random(seed)
    short = [task(f"s{n}", rng.uniform(0.5, 1.5)) for n in range(120)]
    loop = [task(f"l{n}", 1.0, *([f"l{n - 1}"] if n else [])) for n in range(22)]
    trace = ranked(Trace((*short, *loop), tuple(Device(f"d{n}", 1, 1, 1) for n in range(5))))
    results: dict[str, Result] = {name: simulate(trace, Ledger(name)) for name in ("earliest-finish", "first-come")}
    assert results["earliest-finish"].makespan <= 1.06 * results["earliest-finish"].bound
    assert results["first-come"].makespan > 1.4 * results["earliest-finish"].makespan


class Told:
    """A ledger that is told that all devices are of speed 1; ``watches``: and what batches take."""

    def __init__(self, watches: bool) -> None:
        self.ledger, self.watches = Ledger(), watches
        self.decide, self.submit, self.leave = self.ledger.decide, self.ledger.submit, self.ledger.leave

    def join(self, device: Device, now: float = 0.0) -> None:
        self.ledger.join(replace(device, speed=1.0), now)

    def done(self, batch: Batch, now: float, seconds: float | None = None) -> None:
        self.ledger.done(batch, now, seconds if self.watches else None)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_a_slow_worker_is_found_to_take_shortens_the_whole(seed: int) -> None:
    devices = tuple(
        Device(f"w{i}", 1, 8 * 2**30, 1, 0.012, speed, kinds=("quantum", "classical"))
        for i, speed in enumerate((1.0, 1.0, 1.0, 0.25, 0.25))
    )
    trace = scattered(Trace(studies(1500, seed), devices), 0.3, seed)
    watching, blind = Told(True), Told(False)
    found, without, told = (simulate(trace, scheduler) for scheduler in (watching, blind, Ledger()))
    speeds = [watching.ledger.speed(device.name) for device in devices]
    assert max(speeds[3:]) < 0.5 < 0.8 < min(speeds[:3])
    assert found.makespan < without.makespan
    assert found.makespan < 1.15 * told.makespan  # of one that knows from the start


# -- traces of runs ----------------------------------------------------------------------------------------------------


def step(at: str, began: float, ended: float, attempt: int = 0) -> records.Step:
    return records.Step(at, "", "", None, None, began, ended - began, "w", attempt, 2**20)


def needs(*entries: records.Record) -> dict[str, set[str]]:
    trace = of_journal(list(enumerate(entries, 1)), ())
    return {str(task.job.id): set(map(str, task.after)) for task in trace.tasks}


def test_what_a_record_tells_of_who_needed_whom() -> None:
    steps = [step("s/a[0]", 0, 1), step("s/a[1]", 0.5, 2), step("s/a[2]", 1, 3), step("s/b[0]", 3, 4),
             step("s/a[3]", 4, 5), step("s/c[0]", 5, 6), step("s/c[1]", 6, 7)]  # fmt: skip
    assert needs(*steps) == {
        "s/a[0]": set(), "s/a[1]": set(), "s/a[2]": set(), "s/b[0]": {"s/a[0]", "s/a[1]", "s/a[2]"},
        "s/a[3]": {"s/b[0]"}, "s/c[0]": {"s/a[3]"}, "s/c[1]": {"s/c[0]"},
    }  # fmt: skip
    # bodies side by side, each a chain, after a step and before another; recorded as they ended
    bodies = [step("s/p[0]", 0, 1), step("s/f[1]/a[0]", 1, 2), step("s/f[0]/a[0]", 1, 3), step("s/f[1]/b[0]", 3, 4),
              step("s/f[0]/b[0]", 3, 5), step("s/q[0]", 5, 6)]  # fmt: skip
    assert needs(*bodies) == {
        "s/p[0]": set(), "s/f[0]/a[0]": {"s/p[0]"}, "s/f[1]/a[0]": {"s/p[0]"}, "s/f[0]/b[0]": {"s/f[0]/a[0]"},
        "s/f[1]/b[0]": {"s/f[1]/a[0]"}, "s/q[0]": {"s/f[0]/b[0]", "s/f[1]/b[0]"},
    }  # fmt: skip
    (one,) = of_journal([(1, step("s/a[0]", 5, 7, attempt=2))], [Device("w", 1, 2**30, 1)]).tasks
    assert (one.seconds, one.failures, one.job.kind, one.job.need) == (2, 2, "classical", Need(2**20, 2))


@hq.quantum
def angle(theta: Any, shift: float) -> Any:
    circuit = QuantumCircuit(1)
    circuit.ry(Parameter("a") + shift, 0)
    return hq.expval(circuit, "Z", theta)


@hq.workflow
def lowest(shift: float) -> float:
    return float(hq.minimize(angle, [0.3], args=(shift,), method="COBYLA", options={"maxiter": 8}).fun)


@hq.workflow
def small_study(count: int) -> float:
    start = float(angle([0.2], 0.0))
    return float(angle([min(hq.map(lowest, [start + number for number in range(count)]))], 0.0))


def test_a_run_is_a_trace(store: Path) -> None:
    """On a device beside the driver, which needs no cluster."""
    site = hq.Site(devices=(hq.Device(name="two", backend="aer", slots=2),), backend="two")
    hq.run(small_study, 3, name="run", store=store, site=site)
    devices = [Device(f"w{number}", 1, 2**30, 1, 0.012, kinds=("quantum", "classical")) for number in range(2)]
    trace = of_journal(read_records(store / "run"), devices)
    rows = [r for r in recorded(store / "run", records.Row)]
    took = math.fsum(r.seconds for r in [*rows, *recorded(store / "run", records.Evaluation)])
    assert len(trace.tasks) == len(rows) + 2
    assert math.fsum(task.seconds for task in trace.tasks) == pytest.approx(took)
    tasks = {str(task.job.id): task for task in trace.tasks}
    first, last = "small_study/angle[0]", "small_study/angle[1]"
    loops = [[at for at in tasks if at.startswith(f"small_study/lowest[{n}]/minimize[0]/")] for n in range(3)]
    assert tasks[first].after == ()
    assert set(tasks[last].after) == {loop[-1] for loop in loops}
    for loop in loops:
        assert len(loop) > 2
        assert [tasks[at].after for at in loop] == [(before,) for before in [first, *loop[:-1]]]
        assert {tasks[at].job.need.qubits for at in loop} == {1}
        assert all(tasks[at].job.need.bytes >= 2**25 for at in loop)
    for scheduler in (*map(Ledger, sorted(POLICIES)), PlainOrder()):
        found = simulate(trace, scheduler)
        assert len(found.decisions) == len(trace.tasks)
        assert found.makespan >= found.bound > 0
    assert trace_from_json(trace_to_json(trace)) == trace
