"""A site in virtual time: what a scheduler's decisions come to, without waiting for it; pure, no clock, no I/O.

`simulate` plays a `Trace` (tasks, what they depend on, how long they truly take, devices that come and go) against
anything that decides like a `hybridq.ledger.Ledger`, and measures what came of it. Times are seconds from the start.

A batch that is sent at t reaches its device at t + latency / 2 and begins when a slot is free, its jobs one after the
other; its end is known latency / 2 later. What was on a device that is lost starts over elsewhere.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from hybridq import journal as records
from hybridq.policies import Batch, Device, Job, Refusal
from hybridq.recorded import Recorded, index
from hybridq.resources import Need

__all__ = [
    "Change", "Decision", "PlainOrder", "Result", "Scheduler", "Task", "Trace", "lower_bound", "of_journal", "ranked",
    "scattered", "simulate", "studies", "trace_from_json", "trace_to_json",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """A job, and what its scheduler does not know."""

    job: Job
    seconds: float
    """What it truly takes on a device of speed 1, in seconds."""
    after: tuple[Hashable, ...] = ()
    """Ids of the jobs whose results it needs; they come before it in the trace."""
    at: float = 0.0
    """When it is asked for, at the earliest."""
    failures: int = 0
    """So many times it fails, at its end, before it succeeds."""


@dataclass(frozen=True, slots=True)
class Change:
    """A device comes, or goes with all that is on it."""

    at: float
    device: Device
    joins: bool


@dataclass(frozen=True, slots=True)
class Trace:
    """What is asked of a site, and what the site is."""

    tasks: tuple[Task, ...]
    """In an order in which each comes after those it needs."""
    devices: tuple[Device, ...]
    """There from the start."""
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a job was sent, when, and why; the last one if it was sent more than once."""

    device: str
    sent: float
    begun: float
    ended: float
    company: int
    """Jobs in its batch, itself included."""
    reason: str


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a trace; seconds of work are those on a device of speed 1."""

    makespan: float
    """When the last result was known, in seconds."""
    bound: float
    """No schedule whatever has a smaller makespan: `lower_bound`."""
    asked: float
    """Seconds of work in the trace, but for refused tasks and those that need them."""
    done: float
    """Seconds of work whose results were used."""
    wasted: float
    """Seconds of work that was lost or failed."""
    utilisation: Mapping[str, float]
    """Of each device, the part of slots times makespan in which a job ran."""
    waits: tuple[float, ...]
    """From when each task could have begun until it did, in seconds, in the order of the trace."""
    decisions: Mapping[Hashable, Decision]
    refusals: tuple[Refusal, ...]
    batches: int
    over_committed: int
    """How many batches began on a device without the memory or the threads for them. A real one would have died; here
    they run on, so a scheduler that ignores memory looks better than it is."""


class Scheduler(Protocol):
    """What `simulate` asks of a `hybridq.ledger.Ledger`, and of others."""

    def join(self, device: Device, now: float = 0.0) -> None:
        """A device is there."""

    def leave(self, name: str) -> tuple[Hashable, ...]:
        """A device is gone; the jobs that were on it."""

    def submit(self, job: Job, now: float) -> Refusal | None:
        """A job waits, or is refused."""

    def decide(self, now: float) -> list[Batch]:
        """What leaves now."""

    def done(self, batch: Batch, now: float, seconds: float | None = None) -> None:
        """A batch has ended, after so many seconds in its slot."""


class PlainOrder:
    """Tasks in order of arrival, one at a time, each to any worker with a free slot: a task queue without more.

    It knows what a device can hold at all, and nothing of what is on it, of speeds, or of times.
    """

    def __init__(self) -> None:
        self._devices: dict[str, tuple[int, Device]] = {}
        self._on: dict[str, dict[Hashable, Batch]] = {}
        self._queues: dict[tuple[Hashable, ...], deque[tuple[int, Job]]] = {}
        self._free: dict[Device, list[tuple[int, str]]] = {}  # by kind of device, the first to join first
        self._submitted = self._joined = self._waiting = 0

    def join(self, device: Device, now: float = 0.0) -> None:
        """A device is there."""
        self._joined += 1
        self._devices[device.name] = (self._joined, device)
        self._on[device.name] = {}
        heap = self._free.setdefault(replace(device, name=""), [])
        for _ in range(device.slots):
            heapq.heappush(heap, (self._joined, device.name))

    def leave(self, name: str) -> tuple[Hashable, ...]:
        """A device is gone; the jobs that were on it."""
        _, device = self._devices.pop(name)
        kind = replace(device, name="")
        self._free[kind] = sorted(entry for entry in self._free[kind] if entry[1] != name)
        return tuple(self._on.pop(name))

    def submit(self, job: Job, now: float) -> Refusal | None:
        """A job waits; none is refused as long as somebody could add a device for it."""
        need = job.need
        key = (job.kind, job.backend, job.pin, need.qubits, need.threads, need.bytes, job.alone)
        self._submitted += 1
        self._waiting += 1
        self._queues.setdefault(key, deque()).append((self._submitted, job))
        return None

    def decide(self, now: float) -> list[Batch]:
        """What leaves now."""
        batches = []
        for kind, heap in self._free.items():
            while heap and self._waiting:
                fitting = [q for q in self._queues.values() if _could_take(kind, q[0][1], heap[0][1])]
                if not fitting:
                    break
                queue = min(fitting, key=lambda q: q[0][0])
                job = queue.popleft()[1]
                if not queue:
                    self._queues = {key: q for key, q in self._queues.items() if q}
                self._waiting -= 1
                name = heapq.heappop(heap)[1]
                need = job.need
                batch = Batch(name, (job.id,), "the next in line", need.bytes, need.threads, need.seconds / kind.speed)
                self._on[name][job.id] = batch
                batches.append(batch)
        return batches

    def done(self, batch: Batch, now: float, seconds: float | None = None) -> None:
        """A batch has ended."""
        del self._on[batch.device][batch.jobs[0]]
        number, device = self._devices[batch.device]
        heapq.heappush(self._free[replace(device, name="")], (number, batch.device))


def _could_take(device: Device, job: Job, name: str) -> bool:
    need = job.need
    return (
        need.bytes <= device.bytes
        and need.threads <= device.threads
        and (device.qubits is None or need.qubits <= device.qubits)
        and job.kind in device.kinds
        and job.backend == device.backend
        and job.pin in (None, name)
        and (job.alone or not device.aside)
    )


@dataclass(eq=False, slots=True)
class _Run:
    """A batch on a machine."""

    batch: Batch
    sent: float
    arrives: float
    seconds: float
    begun: float | None = None
    lost: bool = False


class _Machine:
    """A device as it is: slots, and a queue in front of them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.running: list[_Run] = []
        self.queue: deque[_Run] = deque()
        self.returning: list[_Run] = []


_ARRIVE, _END, _KNOWN, _CHANGE = range(4)


class _Simulation:
    """One run of a trace."""

    def __init__(self, trace: Trace, scheduler: Scheduler) -> None:
        self.trace, self.scheduler = trace, scheduler
        self.tasks = {task.job.id: task for task in trace.tasks}
        if len(self.tasks) != len(trace.tasks):
            raise ValueError("two tasks of the trace have the same id")
        self.needs = {task.job.id: len(set(task.after)) for task in trace.tasks}
        self.followers: dict[Hashable, list[Task]] = {}
        for task in trace.tasks:
            for before in set(task.after):
                self.followers.setdefault(before, []).append(task)
        self.failures = {task.job.id: task.failures for task in trace.tasks}
        self.machines: dict[str, _Machine] = {}
        self.busy: dict[str, float] = {}
        self.events: list[tuple[float, int, int, Any]] = []
        self.count = 0
        self.now = 0.0
        self.ready: dict[Hashable, float] = {}
        self.begun: dict[Hashable, float] = {}
        self.decisions: dict[Hashable, Decision] = {}
        self.refusals: list[Refusal] = []
        self.unasked: set[Hashable] = set()
        self.finished: set[Hashable] = set()
        self.done = self.wasted = self.makespan = 0.0
        self.batches = self.over_committed = 0

    def run(self) -> Result:
        for device in self.trace.devices:
            self.add(device)
        for change in self.trace.changes:
            self.push(change.at, _CHANGE, change)
        for task in self.trace.tasks:
            if not task.after:
                self.push(task.at, _ARRIVE, task)
        while self.events:
            self.now = self.events[0][0]
            while self.events and self.events[0][0] <= self.now:
                _, _, kind, what = heapq.heappop(self.events)
                (self.arrive, self.end, self.known, self.change)[kind](what)
            for batch in self.scheduler.decide(self.now):
                self.send(batch)
        left = len(self.tasks) - len(self.finished | self.unasked)
        if left:
            raise RuntimeError(f"{left} jobs were never run")
        return self.result()

    def push(self, at: float, kind: int, what: Any) -> None:
        self.count += 1
        heapq.heappush(self.events, (max(at, self.now), self.count, kind, what))

    def add(self, device: Device) -> None:
        self.machines[device.name] = _Machine(device)
        self.busy.setdefault(device.name, 0.0)
        self.scheduler.join(device, self.now)

    def arrive(self, task: Task) -> None:
        self.ready.setdefault(task.job.id, self.now)
        refusal = self.scheduler.submit(task.job, self.now)
        if refusal is not None:
            self.refusals.append(refusal)
            out = [task.job.id]
            while out:
                identity = out.pop()
                if identity not in self.unasked:
                    self.unasked.add(identity)
                    out += [follower.job.id for follower in self.followers.get(identity, [])]

    def send(self, batch: Batch) -> None:
        machine = self.machines[batch.device]
        seconds = sum(self.tasks[job].seconds for job in batch.jobs) / machine.device.speed
        self.batches += 1
        machine.queue.append(_Run(batch, self.now, self.now + machine.device.latency / 2, seconds))
        self.start(machine)

    def start(self, machine: _Machine) -> None:
        device = machine.device
        while machine.queue and len(machine.running) < device.slots:
            run = machine.queue.popleft()
            run.begun = max(self.now, run.arrives)
            machine.running.append(run)
            needs = [[self.tasks[job].job.need for job in r.batch.jobs] for r in machine.running]
            memory = sum(max(need.bytes for need in of_one) for of_one in needs)
            threads = sum(max(need.threads or device.threads for need in of_one) for of_one in needs)
            self.over_committed += memory > device.bytes or threads > device.threads
            self.push(run.begun + run.seconds, _END, run)

    def end(self, run: _Run) -> None:
        if run.lost:
            return
        machine = self.machines[run.batch.device]
        machine.running.remove(run)
        machine.returning.append(run)
        self.push(self.now + machine.device.latency / 2, _KNOWN, run)
        self.start(machine)

    def known(self, run: _Run) -> None:
        if run.lost:
            return
        machine, batch = self.machines[run.batch.device], run.batch
        machine.returning.remove(run)
        self.busy[batch.device] += run.seconds
        self.scheduler.done(batch, self.now, run.seconds)
        at = run.begun or 0.0
        for identity in batch.jobs:
            task = self.tasks[identity]
            ended = at + task.seconds / machine.device.speed
            if self.failures[identity]:
                self.failures[identity] -= 1
                self.wasted += task.seconds
                self.arrive(task)
            else:
                if identity in self.finished:
                    raise RuntimeError(f"the job {identity!r} was run twice")
                self.finished.add(identity)
                self.done += task.seconds
                self.begun[identity] = at
                self.makespan = self.now
                self.decisions[identity] = Decision(batch.device, run.sent, at, ended, len(batch.jobs), batch.reason)
                for follower in self.followers.get(identity, []):
                    self.needs[follower.job.id] -= 1
                    if not self.needs[follower.job.id] and follower.job.id not in self.unasked:
                        if follower.at > self.now:
                            self.push(follower.at, _ARRIVE, follower)
                        else:
                            self.arrive(follower)
            at = ended

    def change(self, change: Change) -> None:
        if change.joins:
            self.add(change.device)
            return
        machine = self.machines.pop(change.device.name)
        on_it: list[Hashable] = []
        for run in [*machine.returning, *machine.running, *machine.queue]:
            run.lost = True
            on_it += run.batch.jobs
            if run.begun is not None:
                spent = min(max(0.0, self.now - run.begun), run.seconds)
                self.wasted += spent * machine.device.speed
                self.busy[change.device.name] += spent
        lost = self.scheduler.leave(change.device.name)
        if sorted(map(repr, lost)) != sorted(map(repr, on_it)):
            raise RuntimeError(f"{change.device.name} had {len(on_it)} jobs, and the scheduler gave back {len(lost)}")
        for identity in lost:
            self.arrive(self.tasks[identity])

    def result(self) -> Result:
        tasks = [task for task in self.trace.tasks if task.job.id not in self.unasked]
        devices = {d.name: d for d in (*self.trace.devices, *(c.device for c in self.trace.changes if c.joins))}
        return Result(
            makespan=self.makespan,
            bound=lower_bound(tasks, devices.values()),
            asked=math.fsum(task.seconds for task in tasks),
            done=self.done,
            wasted=self.wasted,
            utilisation={
                name: seconds / (devices[name].slots * self.makespan) if self.makespan else 0.0
                for name, seconds in self.busy.items()
            },
            waits=tuple(self.begun[t.job.id] - self.ready[t.job.id] for t in tasks),
            decisions=self.decisions,
            refusals=tuple(self.refusals),
            batches=self.batches,
            over_committed=self.over_committed,
        )


def simulate(trace: Trace, scheduler: Scheduler) -> Result:
    """Play a trace. Raises ValueError for equal ids, RuntimeError if jobs get lost, run twice, or never run."""
    return _Simulation(trace, scheduler).run()


def lower_bound(tasks: Sequence[Task], devices: Iterable[Device]) -> float:
    """Seconds that any schedule of the tasks on the devices takes at least: the largest of three.

    - The longest chain of tasks, each on the device where trip and job take least; where a task needs several others,
      at least their work over the speeds of as many slots, the fastest there are.
    - The work that only some of the devices can hold, over the speeds of all their slots, for each limit of memory.
    - Before, the chain that leads to a task; then the work of all that are led to and followed by chains as long, over
      the speeds of all slots; after it, the chain that follows. Tried for all of the first and some of the second.
    """
    devices = list(devices)
    kinds = {replace(device, name="") for device in devices}
    able: dict[tuple[Hashable, ...], list[Device]] = {}
    shortest: list[float] = []
    begins: list[float] = []
    ends: dict[Hashable, float] = {}
    spent: dict[Hashable, tuple[float, float]] = {}
    trip = min((device.latency for device in devices), default=0.0)
    by_speed = sorted(devices, key=lambda d: -d.speed)

    @functools.cache
    def fastest(count: int) -> float:
        total = 0.0
        for device in by_speed:
            total += min(count, device.slots) * device.speed
            count -= min(count, device.slots)
        return total

    for task in tasks:
        job, need = task.job, task.job.need
        key = (job.kind, job.backend, need.qubits, need.threads, need.bytes, job.pin)
        if key not in able:
            anywhere = replace(job, alone=True)
            able[key] = [d for d in (devices if job.pin else kinds) if _could_take(d, anywhere, d.name)]
        shortest.append(min((d.latency + task.seconds / d.speed for d in able[key]), default=0.0))
        needs = [(ends[before] - spent[before][0], *spent[before]) for before in set(task.after) if before in ends]
        earliest = max([task.at, *(ends.get(before, 0.0) for before in task.after)])
        if len(needs) > 1:
            together = sum(seconds for _, _, seconds in needs) / fastest(len(needs))
            earliest = max(earliest, min(begun for begun, _, _ in needs) + trip + together)
        begins.append(earliest)
        ends[job.id] = earliest + shortest[-1]
        spent[job.id] = (shortest[-1], task.seconds)
    behind: dict[Hashable, float] = {}
    for task, seconds in zip(reversed(tasks), reversed(shortest), strict=True):
        chain = behind.get(task.job.id, 0.0) + seconds
        for before in task.after:
            behind[before] = max(behind.get(before, 0.0), chain)
    follow = [behind.get(task.job.id, 0.0) for task in tasks]
    bound = max(ends.values(), default=0.0)

    rate = work = 0.0
    by_bytes = sorted(((task.job.need.bytes, task.seconds) for task in tasks), reverse=True)
    sizes = sorted(devices, key=lambda d: -d.bytes)
    at = 0
    # what needs more than the next smaller device has must run on those before it
    for number, device in enumerate(sizes):
        rate += device.slots * device.speed
        smaller = sizes[number + 1].bytes if number + 1 < len(sizes) else -1
        while at < len(by_bytes) and by_bytes[at][0] > smaller:
            work += by_bytes[at][1]
            at += 1
        bound = max(bound, work / rate)

    chains = sorted(set(follow))
    order = sorted(zip(begins, follow, tasks, strict=True), key=lambda e: -e[0])
    for chain in chains[:: max(1, len(chains) // 16)]:
        work = 0.0
        for first, after, task in order:
            if after >= chain:
                work += task.seconds
                bound = max(bound, first + work / rate + chain)
    return bound


def scattered(trace: Trace, sigma: float, seed: int) -> Trace:
    """The trace with true times that are predicted ones times lognormal scatter of mean 1 (``sigma``: of the log)."""
    rng = random.Random(seed)
    return replace(trace, tasks=tuple(
        replace(task, seconds=task.job.need.seconds * rng.lognormvariate(-sigma * sigma / 2, sigma))
        for task in trace.tasks
    ))  # fmt: skip


def ranked(trace: Trace) -> Trace:
    """The trace with each job's `Job.rank`: predicted seconds of the longest chain of those that need its result."""
    still: dict[Hashable, float] = {}
    tasks: list[Task] = []
    for task in reversed(trace.tasks):
        rank = still.get(task.job.id, 0.0)
        tasks.append(replace(task, job=replace(task.job, rank=rank)))
        for before in task.after:
            still[before] = max(still.get(before, 0.0), rank + task.job.need.seconds)
    return replace(trace, tasks=tuple(reversed(tasks)))


def studies(jobs: int, seed: int, *, spread: float = 0.0) -> tuple[Task, ...]:
    """About ``jobs`` tasks of studies as variational ones are, in order of arrival over ``spread`` seconds.

    Each study prepares its problem (classical, 0.1 to 5 s), runs loops side by side (each a chain of 5 to 40 iterations
    of 1 to 6 evaluations at once and a classical update of 10 to 100 ms), and ends with a fit (0.1 to 5 s). Circuits
    have 4 to 20 qubits, fewer large ones; times and bytes are those of a state vector: 1 to 8 rows (a gradient in one
    pass counts as 8) times passes of a nanosecond an amplitude, and 32 MiB beside 48 bytes an amplitude. True times are
    the predicted ones.
    """
    rng = random.Random(seed)
    tasks: list[Task] = []
    number = 0
    while len(tasks) < jobs:
        number += 1
        run, at = f"study{number}", rng.uniform(0.0, spread)
        qubits = min(20, 4 + int(rng.expovariate(1 / 5)))
        rows = rng.choice((1, 8, 40))
        passes = rng.randint(6, 20) * qubits
        seconds = rows * (1e-4 + 1e-9 * 2**qubits * passes)
        quantum = Need(48 * 2**qubits + 2**25, seconds, 1, qubits)

        def classical(name: str, low: float, high: float, after: Sequence[str]) -> str:
            need = Need(rng.choice((50, 200, 800)) * 2**20, math.exp(rng.uniform(math.log(low), math.log(high))))
            job = Job(f"{run}/{name}", need, run, kind="classical", template=name.partition("[")[0])  # noqa: B023
            tasks.append(Task(job, need.seconds, tuple(after), at))  # noqa: B023
            return f"{run}/{name}"  # noqa: B023

        problem = classical("problem", 0.1, 5.0, ())
        ends = []
        for loop in range(rng.choice((1, 1, 2, 4, 13))):
            last = problem
            width = rng.randint(1, 6)
            for iteration in range(rng.randint(5, 40)):
                asked = []
                for point in range(width):
                    name = f"{run}/loop[{loop}]/energy[{iteration},{point}]"
                    job = Job(name, quantum, run, f"loop[{loop}]", template=run)
                    tasks.append(Task(job, seconds, (last,), at))
                    asked.append(name)
                last = classical(f"update[{loop},{iteration}]", 0.01, 0.1, asked)
            ends.append(last)
        classical("fit", 0.1, 5.0, ends)
    return tuple(tasks)


# -- traces of runs ----------------------------------------------------------------------------------------------------


def of_journal(entries: Sequence[tuple[int, records.Record]], devices: Sequence[Device]) -> Trace:
    """A run as it was recorded (`journal.read_records`), as a trace to play on ``devices``.

    Each step, each evaluation and each row of a loop is a task of the seconds that it took, which are taken to be those
    predicted, and fails as often as it did. Bytes are those projected for a circuit, and those a step grew by. All of
    the driver's own work is left out.

    A journal says when calls began and not what they waited for, so that is inferred: in a scope, what began after
    another call had ended is taken to need it. Calls of one name (``energy[0]``, ``energy[1]``) need each other only if
    no two of them overlapped: else they were asked for together. The rows of a loop need each the one before.
    """
    found = index(entries)
    root = _Scope()
    for call in _calls(found, entries):
        scope = root
        for name in call.at.split("/"):
            scope = scope.inner.setdefault(name, _Scope())
        scope.own = call
    after: dict[str, tuple[str, ...]] = {}
    _connect(root, (), after)
    run = found.header.name if found.header is not None else ""
    calls = sorted(_owned(root), key=lambda call: (call.began, call.ended, call.line))
    return Trace(
        tuple(
            Task(
                Job(call.at, call.need, run, call.at.rpartition("/")[0], kind=call.kind, template=call.template),
                call.need.seconds, after[call.at], failures=call.failures,
            )
            for call in calls
        ),
        tuple(devices),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Call:
    """Something that was run, from when to when: seconds since the epoch."""

    at: str
    line: int
    began: float
    ended: float
    need: Need
    kind: str
    template: str
    failures: int = 0


@dataclass(eq=False, slots=True)
class _Scope:
    """A location of a run: a call, or what was called below it."""

    inner: dict[str, _Scope] = field(default_factory=dict)
    own: _Call | None = None
    first: float = 0.0
    last: float = 0.0


def _calls(found: Recorded, entries: Sequence[tuple[int, records.Record]]) -> Iterable[_Call]:
    """All that was run, in the order in which it was recorded; rows of loops follow their headers."""
    latest = 0.0
    for line, record in entries:
        if isinstance(record, records.Opened):
            latest = max(latest, record.time)
        elif isinstance(record, (records.Step, records.Evaluation)) and found.answers.get(record.at) is record:
            ended = record.started + record.seconds
            latest = max(latest, ended)
            if isinstance(record, records.Step):
                need, kind = Need(record.bytes, record.seconds), "classical"
                template = record.at.rpartition("/")[2].partition("[")[0]
            else:
                need, kind, template = _circuit_need(found, record.program, record.seconds), "quantum", record.program
            yield _Call(record.at, line, record.started, ended, need, kind, template, record.attempt)
        elif isinstance(record, records.Loop) and found.loops[record.at].header is record:
            began, template = latest, ""
            for row in found.loops[record.at].rows:
                template = row.program or template
                if row.where:  # else its evaluations have records of their own
                    at = f"{record.at}/{record.function}[{row.i}]"
                    need = _circuit_need(found, template, row.seconds)
                    began = began if row.started is None else row.started
                    yield _Call(at, line, began, began + row.seconds, need, "quantum", template)
                    began += row.seconds


def _circuit_need(found: Recorded, program: str, seconds: float) -> Need:
    circuit = next(iter(found.circuits.get(program, ())), None)
    if circuit is None:
        return Need(0, seconds)
    projected = circuit.need or {}
    amount, shots = int(projected.get("bytes") or 0), int(projected.get("shots") or 0)
    return Need(amount, seconds, circuit.plan["v"].get("threads", 1), circuit.qubits, shots)


def _owned(scope: _Scope) -> Iterable[_Call]:
    if scope.own is not None:
        yield scope.own
    for inner in scope.inner.values():
        yield from _owned(inner)


def _connect(scope: _Scope, before: tuple[str, ...], after: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Enter what each call below ``scope``, which needs ``before``, needs; the calls that end it."""
    if scope.own is not None:
        after[scope.own.at] = before
        return (scope.own.at,)
    for one in scope.inner.values():
        calls = list(_owned(one))
        one.first, one.last = min(c.began for c in calls), max(c.ended for c in calls)
    order = sorted(scope.inner.items(), key=lambda item: (item[1].first, item[1].last))
    alike: dict[str, list[_Scope]] = {}
    for name, one in order:
        alike.setdefault(name.partition("[")[0], []).append(one)
    groups = {name: _Alike(ones) for name, ones in alike.items()}
    ends: dict[int, tuple[str, ...]] = {}
    needed: set[int] = set()
    for name, one in order:
        own = name.partition("[")[0]
        over = {
            other: bisect_right(group.lasts, one.first)
            for other, group in groups.items()
            if not (other == own and group.together)
        }
        found: list[str] = []
        for other, count in over.items():
            # what ended before one of another name began, which is needed here, is needed by that one
            since = max((groups[g].firsts[k - 1] for g, k in over.items() if k and g != other), default=-math.inf)
            start = bisect_right(groups[other].lasts, since)
            if not groups[other].together:
                start = max(start, count - 1)
            for each in groups[other].ones[start:count]:
                if id(each) in ends:
                    needed.add(id(each))
                    found += ends[id(each)]
        ends[id(one)] = _connect(one, tuple(found) or before, after)
    return tuple(at for _, one in order if id(one) not in needed for at in ends[id(one)])


class _Alike:
    """Calls of one name in a scope, in the order in which they ended."""

    def __init__(self, ones: Sequence[_Scope]) -> None:
        """``ones`` in the order in which they began."""
        self.together = any(later.first < one.last for one, later in itertools.pairwise(ones))
        self.ones = sorted(ones, key=lambda one: one.last)
        self.lasts = [one.last for one in self.ones]
        self.firsts = list(itertools.accumulate((one.first for one in self.ones), max))
        """When the last of the first so many began."""


def trace_to_json(trace: Trace) -> str:
    """A trace as text; ids of jobs become strings."""
    return json.dumps({
        "devices": [asdict(device) for device in trace.devices],
        "changes": [asdict(change) for change in trace.changes],
        "tasks": [
            {
                **asdict(task),
                "job": {**asdict(task.job), "id": str(task.job.id)},
                "after": [str(identity) for identity in task.after],
            }
            for task in trace.tasks
        ],
    })  # fmt: skip


def trace_from_json(text: str) -> Trace:
    """A recorded trace, as `trace_to_json` writes it. Raises ValueError if it is none."""
    try:
        found = json.loads(text)
        return Trace(
            tuple(
                Task(**{
                    **task,
                    "job": Job(**{**task["job"], "need": Need(**task["job"]["need"])}),
                    "after": tuple(task["after"]),
                })
                for task in found["tasks"]
            ),
            tuple(_device(device) for device in found["devices"]),
            tuple(Change(change["at"], _device(change["device"]), change["joins"]) for change in found["changes"]),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is not a trace: {type(error).__name__}: {error}") from None


def _device(fields: Mapping[str, Any]) -> Device:
    return Device(**{**fields, "kinds": tuple(fields["kinds"])})
