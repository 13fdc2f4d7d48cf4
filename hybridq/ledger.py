"""Which job goes where, with which others, and what every device holds: pure, no clock, no I/O, no Dask.

A `Ledger` is told what happens (a device joins, a job is submitted, a batch is done) and says what to do next; time is
an argument. The same ledger runs the real thing and the simulator of `hybridq.simulation`, and equal calls give equal
answers.

What always holds, whatever the policy: of all batches on a device, the ``slots`` largest together take at most its
bytes, the ``slots`` widest at most its threads. At most ``slots`` run side by side, so this covers those sent ahead in
whatever order they start. Who breaks it gets an exception, not a device.

Waiting jobs stand in *lines* of those that could stand in for each other (backend, qubits, threads, octaves of bytes
and of seconds, priority), and devices in *kinds*; a decision looks at the first of each line and the best of each kind,
so its cost depends on how many sorts of jobs and devices there are, and hardly on how many of each.
"""

from __future__ import annotations

import heapq
import math
import statistics
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from hybridq.errors import NoDevice, PlacementError, TooLarge
from hybridq.policies import (
    LONGEST,
    POLICIES,
    Batch,
    Device,
    Job,
    Load,
    Policy,
    Refusal,
    accepts,
    check,
    shortfall,
    takes,
)
from hybridq.resources import format_bytes

__all__ = ["MAX_BATCH_JOBS", "MAX_BATCH_SECONDS", "Ledger"]

MAX_BATCH_SECONDS = 0.5
"""No batch is predicted to hold a slot for longer, unless one job alone does."""
MAX_BATCH_JOBS = 256
_WORTH_THE_TRIP = 10.0
"""A lone job this many times longer than the trip to a device is sent there rather than run at hand; a batch as long
is worth a trip even where others wait for its first job."""
_LINES_AHEAD = 8
"""Where no slot is free, so many lines, at most, are asked whether they send something ahead."""
_LINES_A_BATCH = 8
"""From so many further lines, at most, a batch is filled up."""
_TELLING = 0.005
"""Seconds from which a prediction says something about the device: what is added to shorter batches is not its work."""
_LIKELY = 8
"""So many batches of a device, at least, correct its speed; the last `_KEPT` of them, and twice that of each
template."""
_KEPT = 25
_TEMPLATES = 1024
_MOVED = math.log(1.15)
"""By less a speed is not changed: it would be found anew all the time. Nor by less than `_CERTAIN` standard errors."""
_CERTAIN = 3.0
_DRAINABLE = 16
"""So many devices, at most, are compared when one is to be kept free for a large job."""


@dataclass(eq=False, slots=True)
class _Waiting:
    """A job in the queue; ``gone`` once it left, because heaps forget lazily."""

    job: Job
    key: float
    seq: int
    line: _Line
    gone: bool = False
    held: _Station | None = None
    """The device that is kept free for it."""


_Heap = list[tuple[float, int, _Waiting]]


def _top(heap: _Heap) -> _Waiting | None:
    while heap:
        if not heap[0][2].gone:
            return heap[0][2]
        heapq.heappop(heap)
    return None


@dataclass(eq=False, slots=True)
class _Line:
    """Waiting jobs that could stand in for each other: all fit where one does, but for bytes within an octave."""

    key: tuple[Hashable, ...]
    sample: Job
    """The first that stood in it; its bytes and seconds are not the others'."""
    group: _Group
    kinds: list[_Kind] = field(default_factory=list)
    """Those that could take the smallest job that may stand here; `usual` are without those aside."""
    usual: list[_Kind] = field(default_factory=list)
    mask: int = 0
    count: int = 0
    place: tuple[float, int, _Line] | None = None
    """Its entry in the order of its group: by the key of its first job."""
    heap: _Heap = field(default_factory=list)
    templates: dict[str, _Heap] = field(default_factory=dict)
    parked: float = -math.inf
    """Until when, in seconds, its first waits for one of the kinds in `wants` (bits), the best of them `awaited`."""
    spare: int = 0
    """How many more may join it until then without a reason to ask again."""
    ends: float = 0.0
    """When the last of them is predicted to end there."""
    wants: int = 0
    awaited: int = 0
    stuck: int = -1
    """How often something was freed when it found no room."""
    by_bytes: _Heap | None = None
    """Made when the first in line is too large for a device that others may fit."""

    def push(self, waiting: _Waiting) -> None:
        entry = (waiting.key, waiting.seq, waiting)
        heapq.heappush(self.heap, entry)
        heapq.heappush(self.templates.setdefault(waiting.job.template, []), entry)
        if self.by_bytes is not None:
            heapq.heappush(self.by_bytes, (waiting.job.need.bytes, waiting.seq, waiting))
        self.count += 1
        self.spare -= 1
        if self.spare < 0:
            self.parked = -math.inf
        self.stuck = -1

    def drop(self, waiting: _Waiting) -> None:
        waiting.gone = True
        self.count -= 1
        template = waiting.job.template
        if _top(self.templates[template]) is None:
            del self.templates[template]
        if len(self.heap) > 2 * self.count + 64:  # most have left by another heap
            self.heap = sorted(entry for entry in self.heap if not entry[2].gone)
        if self.by_bytes is not None and len(self.by_bytes) > 2 * self.count + 64:
            self.by_bytes = None

    def head(self) -> _Waiting:
        found = _top(self.heap)
        assert found is not None, "empty lines are removed"
        return found

    def smallest(self) -> _Waiting:
        if self.by_bytes is None:
            self.by_bytes = sorted((w.job.need.bytes, w.seq, w) for _, _, w in self.heap if not w.gone)
        found = _top(self.by_bytes)
        assert found is not None
        return found

    def next(self, template: str) -> _Waiting | None:
        """Who follows into a batch: of ``template`` if there is one, else the first in line."""
        return _top(self.templates.get(template, [])) or _top(self.heap)


@dataclass(eq=False, slots=True)
class _Group:
    """Lines of one priority and, where runs share, of one run: they move together in the order of all."""

    key: tuple[int, str]
    number: int
    share: _Share | None
    lines: int = 0
    order: list[tuple[float, int, _Line]] = field(default_factory=list)
    place: tuple[float, float, int, _Group] | None = None
    """Its entry in the order of groups: by priority, then by what its run has used."""


@dataclass(eq=False, slots=True)
class _Sent:
    """A batch on a device."""

    batch: Batch
    ends: float | None
    """When it is predicted to end; None while it waits there for a slot."""
    sole: bool = False
    """Whether nothing may be beside it."""
    work: float = 0.0
    """Predicted seconds at speed 1."""
    template: str | None = None
    """Of all its jobs, with what is predicted for the first, to 15 %: as the prediction is learned, ratios to it would
    change for everyone, but not at once. None where templates differ."""


@dataclass(eq=False, slots=True)
class _Station:
    """A device and what is on it."""

    device: Device
    kind: _Kind
    number: int
    declared: float
    """Its speed as it joined; that of `device` is corrected."""
    turn: int = 0
    version: int = 0
    """Of its entries in heaps only the latest counts."""
    sent: dict[Hashable, _Sent] = field(default_factory=dict)
    """By the first job, in the order they were sent."""
    bytes: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    """Reservations of all batches on it, ascending."""
    room: int = 0
    width: int = 0
    """The most bytes and threads that one more batch can be given."""
    lanes: int = 0
    """How many more batches may be sent."""
    release: float = -math.inf
    """When a slot is predicted to be free; minus infinity if one is."""
    keeps: _Waiting | None = None
    """The job it is kept free for, and until when others may use it."""
    until: float = 0.0
    idle: bool = False
    """Whether it counts among those of its kind with a free slot."""
    pinned: list[_Line] = field(default_factory=list)

    @property
    def idle_slot(self) -> bool:
        return len(self.sent) < self.device.slots

    def holds(self, job: Job) -> bool:
        need = job.need
        return need.bytes <= self.room and need.threads <= self.width and not (self.sent and _whole(job))

    def put(self, sent: _Sent) -> None:
        insort(self.bytes, sent.batch.bytes)
        insort(self.threads, sent.batch.threads)
        self.sent[sent.batch.jobs[0]] = sent

    def take(self, first: Hashable, now: float) -> _Sent:
        sent = self.sent.pop(first)
        del self.bytes[bisect_left(self.bytes, sent.batch.bytes)]
        del self.threads[bisect_left(self.threads, sent.batch.threads)]
        if sent.ends is not None:
            follower = next((s for s in self.sent.values() if s.ends is None), None)
            if follower is not None:
                follower.ends = now + follower.batch.seconds
        return sent

    def measure(self, now: float, lookahead: int, ahead_seconds: float) -> None:
        """Work out what else it can be given."""
        device = self.device
        self.room = _room(self.bytes, device.slots, device.bytes)
        self.width = _room(self.threads, device.slots, device.threads)
        free = device.slots - len(self.sent)
        self.release = -math.inf
        first = next(iter(self.sent.values()), None)
        if first is not None and first.sole:
            free, self.release = 0, max(now, first.ends or now)
        elif free <= 0:
            ends = [max(now, s.ends) for s in self.sent.values() if s.ends is not None]
            heapq.heapify(ends)
            for s in self.sent.values():
                if s.ends is None:
                    heapq.heapreplace(ends, ends[0] + s.batch.seconds)
            self.release = ends[0]
            short = self.release - now <= ahead_seconds and self.keeps is None
            free = max(0, device.slots * (1 + lookahead) - len(self.sent)) if short else 0
        self.lanes = free if self.width > 0 else 0

    def drained(self, job: Job) -> float:
        """When ``job`` is predicted to fit."""
        need = job.need
        heights, widths, when = list(self.bytes), list(self.threads), -math.inf
        for sent in sorted(self.sent.values(), key=lambda s: math.inf if s.ends is None else s.ends):
            slots = self.device.slots
            height, width = _room(heights, slots, self.device.bytes), _room(widths, slots, self.device.threads)
            if not _whole(job) and need.bytes <= height and need.threads <= width:
                break
            heights.remove(sent.batch.bytes)
            widths.remove(sent.batch.threads)
            when = max(when, sent.ends if sent.ends is not None else when + sent.batch.seconds)
        return when


def _room(reserved: Sequence[int], slots: int, allowed: int) -> int:
    """The largest amount that can join ``reserved`` (ascending) with its ``slots`` largest within ``allowed``."""
    largest = reserved[-slots:]
    return allowed - sum(largest) + (largest[0] if len(largest) == slots else 0)


def _beside(device: Device, reserved: Sequence[int], threads: Sequence[int], job: Job) -> int:
    """How many jobs like ``job`` the device can run beside batches with such reservations."""
    need = job.need
    room, width = device.bytes - sum(reserved), device.threads - sum(threads)
    if _whole(job):
        return int(not reserved and need.bytes <= room)
    return max(0, min(device.slots - len(reserved), width // need.threads, room // max(1, need.bytes)))


def _whole(job: Job) -> bool:
    """Whether nothing may be beside it on its device."""
    return job.sole or not job.need.threads


@dataclass(eq=False, slots=True)
class _Kind:
    """Devices that are alike: of about one speed and trip, an octave of bytes, and else equal in what they take."""

    sample: Device
    bit: int
    stations: int = 0
    rate: float = 0.0
    """Slots times speed of all."""
    sizes: list[int] = field(default_factory=list)
    """Bytes of each device of the kind, present or expected, ascending; `most` is the last."""
    most: int = -1
    rooms: dict[tuple[int, int], list[tuple[tuple[float, ...], int, int, _Station]]] = field(default_factory=dict)
    """Open devices by octaves of room and width, each a heap by the policy's preference."""
    releases: list[tuple[float, int, int, _Station]] = field(default_factory=list)
    """Devices without a free slot, by when one is predicted to be."""
    kept: dict[int, _Station] = field(default_factory=dict)
    """Those kept free for a job, by number."""
    open: int = 0
    """How many have a free lane."""
    idle: int = 0
    """How many have a free slot."""

    def count_in(self, size: int) -> None:
        insort(self.sizes, size)
        self.most = self.sizes[-1]

    def count_out(self, size: int) -> None:
        del self.sizes[bisect_left(self.sizes, size)]
        self.most = self.sizes[-1] if self.sizes else -1

    def best(self, job: Job) -> _Station | None:
        """The preferred of the open devices that have room for ``job``."""
        if _whole(job):
            return next((station for station in self.roomiest() if station.holds(job)), None)
        need = job.need
        height, width = need.bytes.bit_length(), need.threads.bit_length()
        found: tuple[tuple[float, ...], int, int, _Station] | None = None
        for octaves, heap in list(self.rooms.items()):
            if octaves[0] < height or octaves[1] < width:
                continue
            while heap and heap[0][2] != heap[0][3].version:
                heapq.heappop(heap)
            if not heap:
                del self.rooms[octaves]
                continue
            first: tuple[tuple[float, ...], int, int, _Station] | None = heap[0]
            if not heap[0][3].holds(job):  # only in its own octave: look at each
                fitting = (e for e in heap if e[2] == e[3].version and e[3].holds(job))
                first = min(fitting, key=lambda e: e[:2], default=None)
            if first is not None and (found is None or first[:2] < found[:2]):
                found = first
        return found[3] if found else None

    def roomiest(self) -> Iterator[_Station]:
        """Open devices, roughly by room."""
        for octaves in sorted(self.rooms, reverse=True):
            for entry in self.rooms[octaves]:
                if entry[2] == entry[3].version:
                    yield entry[3]

    def next_release(self) -> _Station | None:
        while self.releases and self.releases[0][2] != self.releases[0][3].version:
            heapq.heappop(self.releases)
        return self.releases[0][3] if self.releases else None


def _kind_of(device: Device) -> tuple[Hashable, ...]:
    """Coarse in what is measured, so that a site of machines that all differ a little has few kinds."""
    return (
        device.slots, device.threads, device.qubits, device.backend, device.cost_per_shot, device.kinds, device.aside,
        round(math.log(device.speed, 1.5)), round(math.log2(max(device.latency, 1e-5))), device.bytes.bit_length(),
    )  # fmt: skip


@dataclass(eq=False, slots=True)
class _Share:
    """What a run has used, in predicted seconds, and its loops."""

    used: float = 0.0
    waiting: int = 0
    groups: list[_Group] = field(default_factory=list)
    clock: float = 0.0
    loops: dict[str, float] = field(default_factory=dict)

    def tag(self, loop: str, seconds: float) -> float:
        """When, on the run's own clock of seconds used, the loop's next job is due (start-time fair queueing)."""
        start = max(self.clock, self.loops.get(loop, 0.0))
        self.loops[loop] = start + seconds
        if len(self.loops) > 4096:  # who is behind the clock starts at it anyway
            self.loops = {name: due for name, due in self.loops.items() if due > self.clock}
        return start


class _Speeds:
    """How fast devices are beside one another, from what their batches took.

    A batch counts by the logarithm of its seconds over those predicted. What is usual for its template, wherever it
    runs, is a wrong prediction and not the device's doing; the median of what is left is the device's own slowness. The
    devices' lower median is as fast as it was said to be.
    """

    def __init__(self) -> None:
        self._usual: OrderedDict[str, tuple[deque[float], float]] = OrderedDict()
        self._own: dict[str, deque[tuple[str, float]]] = {}
        self._slow: dict[str, float] = {}
        self._sorted: list[float] = []

    def observe(self, name: str, template: str, predicted: float, seconds: float) -> float | None:
        """Note a batch; the logarithm of what the declared speed of the device is to be multiplied by, if known.

        It is 0 as long as the difference may be chance.
        """
        ratio = math.log(seconds / predicted)
        last, _ = self._usual.pop(template, (deque(maxlen=2 * _KEPT), 0.0))
        last.append(ratio)
        self._usual[template] = last, statistics.median(last)
        if len(self._usual) > _TEMPLATES:
            self._usual.popitem(last=False)
        own = self._own.setdefault(name, deque(maxlen=_KEPT))
        own.append((template, ratio))
        if len(own) < _LIKELY:
            return None
        left = [one - self._usual[known][1] for known, one in own if known in self._usual]
        if len(left) < _LIKELY:
            return None
        slow = statistics.median(left)
        self._drop(name)
        self._slow[name] = slow
        insort(self._sorted, slow)
        found = self._sorted[(len(self._sorted) - 1) // 2] - slow
        # of a median, from the median distance to it, as if they were normally distributed
        error = 1.253 * 1.483 * statistics.median(abs(one - slow) for one in left) / math.sqrt(len(left))
        return found if abs(found) > max(_MOVED, _CERTAIN * error) else 0.0

    def forget(self, name: str) -> None:
        """The device is gone."""
        self._own.pop(name, None)
        self._drop(name)

    def _drop(self, name: str) -> None:
        if name in self._slow:
            del self._sorted[bisect_left(self._sorted, self._slow.pop(name))]


class Ledger:
    """What waits, what runs where, and what to do next. Not thread-safe; needs no thread of its own.

    The order of business: `join` devices, `submit` jobs, `decide`, send the batches, and tell their end with `done`.
    ``expected`` are devices the site has declared but that are not there (yet, or now): jobs that only they can take
    wait instead of being refused. Jobs leave by priority, then in the order of the policy. Two rules hold under each:

    - **No starvation.** A job that is next in the order but finds no room, while smaller ones could pass it, gets a
      device kept free for it: others may use that one only if they are predicted to be gone when the room is.
    - **A lone job is not delayed.** It leaves alone, at the first decision with a slot free somewhere, to the nearest
      device if it is short beside the trip to the one it would go to otherwise.

    A batch is sent ahead to a device without a free slot, up to ``lookahead`` for each slot, only if one is predicted
    to free within ten trips: beside longer waits the trip does not matter, and it may be better off elsewhere.
    """

    def __init__(
        self,
        policy: str | Policy = "earliest-finish",
        *,
        expected: Iterable[Device] = (),
        lookahead: int = 1,
        batch_seconds: float = MAX_BATCH_SECONDS,
        batch_jobs: int = MAX_BATCH_JOBS,
    ) -> None:
        """Raises ValueError for a policy that is not in `POLICIES`, or an impossible device."""
        if isinstance(policy, str):
            if policy not in POLICIES:
                raise ValueError(f"there is no policy {policy!r}; there are {', '.join(sorted(POLICIES))}")
            policy = POLICIES[policy]
        if lookahead < 0 or batch_jobs < 1:
            raise ValueError(f"lookahead is at least 0 and batch_jobs at least 1, not {lookahead} and {batch_jobs}")
        self.policy = policy
        self._lookahead, self._batch_seconds, self._batch_jobs = lookahead, batch_seconds, batch_jobs
        self._expected: dict[str, Device] = {}
        self._kinds: dict[tuple[Hashable, ...], _Kind] = {}
        self._stations: dict[str, _Station] = {}
        self._lines: dict[tuple[Hashable, ...], _Line] = {}
        self._ranks: dict[tuple[int, str], _Group] = {}
        self._groups: list[tuple[float, float, int, _Group]] = []
        self._waiting: dict[Hashable, _Waiting] = {}
        self._running: dict[Hashable, str] = {}
        self._speeds = _Speeds()
        self._shares: dict[str, _Share] = {}
        self._share_clock = 0.0
        self._open = self._idle = 0  # a bit for each kind that has an open device; one with a free slot
        self._looked = 0
        self._lanes = 0
        self._work = 0.0  # seconds waiting
        self._joined = self._submitted = self._sent = self._grouped = 0
        self._now = -math.inf  # of the last call that said so
        self._freed = 0
        self.expect(expected)

    # -- what is -----------------------------------------------------------------------------------------------------

    @property
    def devices(self) -> tuple[Device, ...]:
        """Those that are there, in the order they joined."""
        return tuple(station.device for station in self._stations.values())

    @property
    def waiting(self) -> int:
        """How many jobs are in the queue."""
        return len(self._waiting)

    @property
    def work(self) -> float:
        """Predicted seconds of the jobs in the queue."""
        return self._work

    def running(self, name: str) -> tuple[Batch, ...]:
        """The batches on device ``name``, in the order they were sent. Raises KeyError if it is not there."""
        return tuple(sent.batch for sent in self._stations[name].sent.values())

    def reserved(self, name: str) -> tuple[int, int]:
        """Bytes and threads that can be in use on device ``name`` at once. Raises KeyError if it is not there."""
        station = self._stations[name]
        slots = station.device.slots
        return sum(station.bytes[-slots:]), sum(station.threads[-slots:])

    def free(self, job: Job) -> int:
        """How many jobs like ``job``, which is not submitted, could begin side by side now; none if others wait.

        Where no device has joined that could take it, those that are expected count.
        """
        if self._waiting:
            return 0
        there = [s for s in self._stations.values() if not s.device.aside and takes(s.device, job)]
        if there:
            return sum(0 if s.keeps else _beside(s.device, s.bytes, s.threads, job) for s in there if s.lanes)
        expected = (d for d in self._expected.values() if not d.aside and takes(d, job))
        return sum(_beside(device, (), (), job) for device in expected)

    def speed(self, name: str) -> float:
        """How fast device ``name`` is, as far as is known by now; 1 if it is not there."""
        station = self._stations.get(name)
        return 1.0 if station is None else station.device.speed

    def stranded(self) -> list[Refusal]:
        """Waiting jobs that nothing present or expected could take, since a device left; they stay in the queue."""
        lost = [w.job for w in self._waiting.values() if not self._possible(w.job, w.line)]
        return [self._refusal(job) for job in lost]

    # -- what happens ------------------------------------------------------------------------------------------------

    def expect(self, devices: Iterable[Device]) -> None:
        """Expect these devices in place of those declared before; `stranded` tells what then fits none.

        Raises ValueError for one that is impossible.
        """
        for device in self._expected.values():
            self._kind(device).count_out(device.bytes)
        self._expected = {}
        for device in devices:
            check(device)
            self._expected[device.name] = device
            self._kind(device).count_in(device.bytes)
        for line in self._lines.values():
            self._match_kinds(line)

    def join(self, device: Device, now: float = 0.0) -> None:
        """A device is there. Raises ValueError if one of its name is, or if it is impossible."""
        check(device)
        if device.name in self._stations:
            raise ValueError(f"a device named {device.name!r} has joined already")
        self._joined += 1
        station = self._stations[device.name] = _Station(device, self._count(device), self._joined, device.speed)
        station.pinned = [line for line in self._lines.values() if line.sample.pin == device.name]
        self._changed(station, now)

    def leave(self, name: str) -> tuple[Hashable, ...]:
        """A device is gone; the jobs that were on it, in the order they were sent. Raises KeyError if unknown."""
        station = self._stations.pop(name)
        self._speeds.forget(name)
        self._keep(station, None)
        lost = tuple(job for sent in station.sent.values() for job in sent.batch.jobs)
        for job in lost:
            del self._running[job]
        self._close(station)
        self._discount(station)
        station.version = -1
        for line in station.pinned:
            self._unplace(line)
        return lost

    def submit(self, job: Job, now: float) -> Refusal | None:
        """A job waits, unless no device present or expected could ever take it.

        Raises ValueError if one of its id waits or runs, or if its seconds are negative or not finite.
        """
        if job.id in self._waiting or job.id in self._running:
            raise ValueError(f"the job {job.id!r} was submitted and is not done")
        seconds = job.need.seconds
        if not (0 <= seconds < math.inf and job.rank >= 0 and job.need.bytes >= 0 and job.need.threads >= 0):
            raise ValueError(f"the job {job.id!r} asks for {job.need} with rank {job.rank}")
        line = self._line(job)
        if not self._possible(job, line):
            if not line.count:
                self._forget(line)
            return self._refusal(job)
        self._submitted += 1
        seconds = min(LONGEST, job.need.seconds)
        if self.policy.shares:
            share = self._share(job.run)
            if not share.waiting:
                share.used = max(share.used, self._share_clock)  # no credit for the time it had nothing to run
            share.waiting += 1
            key = share.tag(job.loop, seconds)
        else:
            key = self.policy.order(job, now)
        waiting = self._waiting[job.id] = _Waiting(job, key, self._submitted, line)
        first = line.place[:2] if line.place else (math.inf, 0)
        line.push(waiting)
        self._work += seconds
        if (key, self._submitted) < first:
            self._put(line)
        return None

    def cancel(self, job: Hashable) -> bool:
        """Take a job out of the queue; False if it does not wait (it runs, or is not known)."""
        waiting = self._waiting.get(job)
        if waiting is None:
            return False
        self._remove(waiting)
        self._settle(waiting.line)
        return True

    def done(self, batch: Batch, now: float, seconds: float | None = None) -> None:
        """A batch is no longer on its device, however it ended. Raises KeyError if it was not there.

        ``seconds`` is what its jobs took in the slot, if that was measured: devices that are slower than others with
        the same jobs are taken to be so from then on.
        """
        station = self._stations[batch.device]
        if station.sent[batch.jobs[0]].batch != batch:
            raise KeyError(batch.jobs[0])
        sent = station.take(batch.jobs[0], now)
        for job in batch.jobs:
            del self._running[job]
        if (
            seconds is not None
            and sent.template is not None
            and not sent.sole  # with all threads it tells how many there are
            and min(seconds, sent.work) >= _TELLING
        ):
            factor = self._speeds.observe(batch.device, sent.template, sent.work, seconds)
            if factor is not None:
                self._correct(station, station.declared * math.exp(factor))
        self._changed(station, now)

    # -- what to do --------------------------------------------------------------------------------------------------

    def decide(self, now: float) -> list[Batch]:
        """What leaves now. Raises `PlacementError` if the policy chose a device that has no room."""
        batches: list[Batch] = []
        claims: dict[int, float] = {}
        at = self._looked = 0
        while at < len(self._groups) and self._open:
            place = self._groups[at]
            if self._decide_group(place[3], now, claims, batches):
                at = bisect_left(self._groups, place)  # its run has used more: others come first now
            elif self._looked >= _LINES_AHEAD and not self._idle:
                break
            else:
                at += 1
        return batches

    def _decide_group(self, group: _Group, now: float, claims: dict[int, float], batches: list[Batch]) -> bool:
        """What leaves of a group; True as soon as the group has moved."""
        order, place, at = group.order, group.place, 0
        while at < len(order) and self._open:
            entry = order[at]
            line = entry[2]
            found = None
            if now < line.parked and not (line.wants & self._open and self._wanted(line, now)):
                claims[line.awaited] = claims.get(line.awaited, 0.0) + line.count * line.sample.need.seconds
            elif line.mask & (self._open if self._looked < _LINES_AHEAD else self._idle) and line.stuck != self._freed:
                found = self._match(line, now, claims)
            if found is None:
                self._looked += not line.mask & self._idle
                if self._looked >= _LINES_AHEAD and not self._idle:
                    break
                at += 1
                continue
            batches.append(self._send(*found, now))
            if group.place is not place:
                return True
            at = bisect_left(order, entry)  # who was passed over stays before it
        return False

    def _match(self, line: _Line, now: float, claims: dict[int, float]) -> tuple[_Waiting, _Station, str] | None:
        """Who of a line goes where: the first, or the smallest where only that one has room."""
        head = line.head()
        found, crowded = self._find(head, now, claims)
        if found is None and crowded:
            if head.held is None:
                self._hold(head, now)
            smallest = line.smallest()
            if smallest.job.need.bytes < head.job.need.bytes:
                head = smallest
                found, _ = self._find(head, now, claims)
            if found is None:
                line.stuck = self._freed
        return None if found is None else (head, *found)

    def _find(
        self, waiting: _Waiting, now: float, claims: dict[int, float]
    ) -> tuple[tuple[_Station, str] | None, bool]:
        """The device a job goes to and why, or None and whether that is for want of room."""
        job, need = waiting.job, waiting.job.need
        if job.pin is not None:
            only = self._stations[job.pin]
            if only.lanes and only.holds(job) and self._admits(only, waiting, now):
                return (only, "pinned to it"), False
            return None, not only.holds(job)
        line, memory = waiting.line, need.bytes
        kinds = line.kinds
        if not job.alone and any(memory <= kind.most for kind in line.usual):
            kinds = line.usual
        loads: list[Load] = []
        crowded = open_one = False
        for kind in kinds:
            if memory > kind.most:
                continue
            station = self._open_one(kind, waiting, now) if kind.open else None
            if station is not None:
                start = 0.0 if station.idle_slot else max(0.0, station.release - now)
                loads.append(_load(station, need.seconds, start, True))
                open_one = True
                continue
            crowded |= kind.open > 0
            later = kind.next_release() if self.policy.waits and not job.alone else None
            if later is not None and memory <= later.device.bytes:
                ahead = claims.get(kind.bit, 0.0) + (line.count - 1) * min(LONGEST, need.seconds)
                due = later.release - now
                # what is overdue is predicted to take half as long again
                start = (due if due >= 0 else -due / 2) + ahead / kind.rate
                loads.append(_load(later, need.seconds, start, False))
        if not open_one:
            return None, crowded
        if job.alone:
            return self._near(job, [load for load in loads if load.open]), False
        name = self.policy.choose(job, loads)
        if name is None:
            self._park(waiting, loads, now, claims)
            return None, False
        chosen = self._stations[name]
        if chosen is waiting.held:
            why = "kept free for it"
        elif chosen.idle_slot:
            why = "a slot was free"
        else:
            why = f"sent ahead, a slot frees in about {max(0.0, chosen.release - now):.2g} s"
        return (chosen, why), False

    def _park(self, waiting: _Waiting, loads: Sequence[Load], now: float, claims: dict[int, float]) -> None:
        """A line waits for a busy kind: it is not asked again before one such is open, or far later than predicted."""
        busy = [load for load in loads if not load.open]
        if not busy:
            return
        line, seconds = waiting.line, min(LONGEST, waiting.job.need.seconds)
        awaited = min(busy, key=lambda load: load.finish)
        slack = min(load.finish for load in loads if load.open) - awaited.finish
        kind = self._stations[awaited.device.name].kind
        line.awaited = kind.bit
        line.wants = 0
        for load in busy:
            line.wants |= self._stations[load.device.name].kind.bit
        line.ends = now + awaited.finish
        line.parked = now + awaited.start + 2 * slack
        line.spare = int(min(1e9, slack * kind.rate / max(1e-9, seconds)))
        # who comes after it in the order finds that one taken
        claims[line.awaited] = claims.get(line.awaited, 0.0) + line.count * seconds

    def _wanted(self, line: _Line, now: float) -> bool:
        """Whether one of the open kinds that a line waits for would end its first earlier than the one awaited."""
        bits, seconds = line.wants & self._open, line.head().job.need.seconds
        return any(
            kind.bit & bits
            and (kind.bit == line.awaited or now + kind.sample.latency + seconds / kind.sample.speed < line.ends)
            for kind in line.kinds
        )

    def _near(self, job: Job, loads: Sequence[Load]) -> tuple[_Station, str]:
        """Where a lone job goes: of the devices with a free slot, the nearest, unless it is long beside the trip."""
        now = [load for load in loads if load.start <= 0] or list(loads)
        nearest = min(now, key=lambda load: (load.device.latency, load.number))
        usual = [load for load in now if not load.device.aside]
        name = self.policy.choose(job, usual) if usual else None
        far = self._stations[nearest.device.name if name is None else name]
        if job.need.seconds >= _WORTH_THE_TRIP * far.device.latency:
            return far, "alone, and worth the trip"
        return self._stations[nearest.device.name], "alone, and at the nearest"

    def _send(self, waiting: _Waiting, station: _Station, why: str, now: float) -> Batch:
        """Make a batch that starts with ``waiting``, and enter it."""
        job, device = waiting.job, station.device
        if not (station.lanes > 0 and station.holds(job) and takes(device, job) and self._stands(station)):
            raise self._over_committed(job, station)
        self._sent += 1
        station.turn = self._sent
        count = len(self._waiting)
        if waiting.held is station:
            self._keep(station, None)
        jobs, lines = [waiting], {waiting.line.key: waiting.line}
        seconds, most = job.need.seconds / device.speed, job.need.bytes
        # an equal part of what waits for each batch that may leave, so that no slot stays free; but worth the trip
        part = 1.000001 * self._work / device.speed / self._lanes
        self._remove(waiting)
        limit = min(self._batch_seconds, max(device.latency, part))
        if job.rank > 0:  # others wait for its end, which is known only with that of the batch
            limit = min(limit, _WORTH_THE_TRIP * device.latency)
        if seconds <= limit and not (job.alone or job.single or _whole(job)) and self._batch_jobs > 1:
            if station.keeps is not None:
                limit = min(limit, station.until - now - device.latency)
            for follower in self._followers(waiting, station):
                longer = seconds + follower.job.need.seconds / device.speed
                if longer > limit or len(jobs) >= self._batch_jobs:
                    break
                seconds, most = longer, max(most, follower.job.need.bytes)
                jobs.append(follower)
                lines[follower.line.key] = follower.line
                self._remove(follower)
        if len(jobs) > 1:
            alike = sum(w.job.template == job.template for w in jobs)
            company = f"{len(jobs)} of {count} waiting" + (f", {alike} of one template" if alike < len(jobs) else "")
        else:
            company = "the only one waiting" if count == 1 else f"1 of {count} waiting"
        ids = tuple(w.job.id for w in jobs)
        threads, work = job.need.threads or device.threads, seconds * device.speed
        template = None
        if all(w.job.template == job.template for w in jobs):
            template = f"{job.template} {round(math.log(max(job.need.seconds, 1e-9), 1.15))}"
        batch = Batch(device.name, ids, f"{why}; {company}", most, threads, seconds)
        for identity in ids:
            self._running[identity] = device.name
        ends = now + device.latency + seconds if station.idle_slot else None
        station.put(_Sent(batch, ends, _whole(job), work, template))
        if self.policy.shares:
            self._charge(jobs)
        for line in lines.values():
            self._settle(line)
        self._changed(station, now)
        return batch

    def _followers(self, first: _Waiting, station: _Station) -> Iterator[_Waiting]:
        """Who may follow ``first`` into its batch: within its octave of bytes. Each is to be taken before the next."""
        line, bit = first.line, station.kind.bit
        most = min(station.room, (1 << first.job.need.bytes.bit_length()) - 1)
        order = line.group.order
        index = 0 if line.place is None else bisect_left(order, line.place) + 1
        near, others = order[index : index + 4 * _LINES_A_BATCH], 0
        for source in (line, *(entry[2] for entry in near)):
            if source is not line:
                if not (source.mask & bit and _alike(source.sample, first.job)):
                    continue
                others += 1
                if others > _LINES_A_BATCH:
                    return
            while source.count:
                follower = source.next(first.job.template)
                if follower is None or follower.job.need.bytes > most:
                    break
                yield follower
                if not follower.gone:
                    return

    def _over_committed(self, job: Job, station: _Station) -> PlacementError:
        device, need = station.device, job.need
        on_it = f"the policy {self.policy.name!r} chose {device.name} for the job {job.id!r}, which"
        if need.bytes > station.room:
            return TooLarge(
                f"{on_it} needs {format_bytes(need.bytes)} ({need.bytes:,} bytes), and {format_bytes(station.room)} "
                f"({station.room:,} bytes) of {format_bytes(device.bytes)} are free there."
            )
        if need.threads > station.width:
            return TooLarge(f"{on_it} needs {need.threads} threads, and {station.width} of {device.threads} are free.")
        if not takes(device, job):
            return NoDevice(f"{on_it} cannot run there: {shortfall(device, job)}.")
        return NoDevice(f"{on_it} has to wait: {len(station.sent)} batches are on its {device.slots} slots.")

    # -- room kept free ----------------------------------------------------------------------------------------------

    def _hold(self, waiting: _Waiting, now: float) -> None:
        """Keep a device free for a job that smaller ones could pass: the one predicted to have room first."""
        job = waiting.job
        if job.pin is not None:
            stations: Iterable[_Station] = [self._stations[job.pin]]
        else:
            stations = (s for kind in waiting.line.kinds for s in kind.roomiest())
        fitting = (s for s in stations if s.keeps is None and takes(s.device, job))
        best = min(
            ((s.drained(job), s.number, s) for s in islice(fitting, _DRAINABLE)), default=None, key=lambda e: e[:2]
        )
        if best is not None:
            best[2].until = max(now, best[0])
            self._keep(best[2], waiting)
            self._changed(best[2], now)

    def _keep(self, station: _Station, waiting: _Waiting | None) -> None:
        """Keep a device for a job, or for none; `_changed` is to follow."""
        if station.keeps is not None:
            self._freed += 1
            station.keeps.held = None
            del station.kind.kept[station.number]
        station.keeps = waiting
        if waiting is not None:
            waiting.held = station
            station.kind.kept[station.number] = station

    def _admits(self, station: _Station, waiting: _Waiting, now: float) -> bool:
        """Whether a job may use a device in spite of the one it is kept for: who is before that one may."""
        keeps, device = station.keeps, station.device
        if keeps is None or keeps is waiting or self._rank(waiting) < self._rank(keeps):
            return True
        seconds = device.latency + waiting.job.need.seconds / device.speed
        return station.idle_slot and now + seconds <= station.until

    def _open_one(self, kind: _Kind, waiting: _Waiting, now: float) -> _Station | None:
        """The device of a kind that a job could be sent to."""
        job, held = waiting.job, waiting.held
        if held is not None and held.kind is kind and held.lanes and held.holds(job):
            return held
        station = kind.best(job)
        if station is None and kind.kept:
            fitting = (s for s in kind.kept.values() if s.lanes and s.holds(job) and self._admits(s, waiting, now))
            station = next(fitting, None)
        return station

    # -- indexes -----------------------------------------------------------------------------------------------------

    def _kind(self, device: Device) -> _Kind:
        key = _kind_of(device)
        if key not in self._kinds:
            self._kinds[key] = _Kind(device, 1 << len(self._kinds))
        return self._kinds[key]

    def _count(self, device: Device) -> _Kind:
        """The kind of a device that is there from now on."""
        known = len(self._kinds)
        kind = self._kind(device)
        grown = device.bytes > kind.most
        kind.count_in(device.bytes)
        kind.stations += 1
        kind.rate += device.slots * device.speed
        if grown or len(self._kinds) > known:
            for line in self._lines.values():
                self._match_kinds(line)
        return kind

    def _discount(self, station: _Station) -> None:
        """A device is no longer of its kind."""
        kind, device = station.kind, station.device
        kind.stations -= 1
        kind.rate = kind.rate - device.slots * device.speed if kind.stations else 0.0
        kind.count_out(device.bytes)

    def _correct(self, station: _Station, speed: float) -> None:
        """A device is faster or slower than it was taken to be; `_changed` is to follow."""
        if abs(math.log(speed / station.device.speed)) < _MOVED:
            return
        keeps = station.keeps
        self._keep(station, None)
        self._close(station)
        self._discount(station)
        station.device = replace(station.device, speed=speed)
        station.kind = self._count(station.device)
        self._keep(station, keeps)
        self._freed += 1
        for line in self._lines.values():  # who waits for a kind may find the device in another
            line.parked = -math.inf

    def _changed(self, station: _Station, now: float) -> None:
        """Bring the indexes up to date with a device."""
        self._now = max(self._now, now)
        room, width, lanes = station.room, station.width, station.lanes
        self._close(station)
        station.measure(now, self._lookahead, min(self._batch_seconds, _WORTH_THE_TRIP * station.device.latency))
        self._freed += station.room > room or station.width > width or station.lanes > lanes
        kind = station.kind
        if station.release > -math.inf:
            heapq.heappush(kind.releases, (station.release, station.number, station.version, station))
            if len(kind.releases) > 2 * kind.stations + 64:
                kind.releases = sorted(e for e in kind.releases if e[2] == e[3].version)
        if station.lanes:
            kind.open += 1
            self._open |= kind.bit
            if station.idle_slot:
                station.idle = True
                kind.idle += 1
                self._idle |= kind.bit
            self._lanes += station.lanes
            if station.keeps is None:
                # any time will do: only devices that are alike are compared
                load = _load(station, 0.0, 0.0 if station.idle_slot else max(1e-9, station.release), True)
                octaves = (station.room.bit_length(), station.width.bit_length())
                heap = kind.rooms.setdefault(octaves, [])
                heapq.heappush(heap, (self.policy.prefer(load), station.number, station.version, station))
                if len(heap) > 2 * kind.stations + 64:
                    kind.rooms[octaves] = sorted(e for e in heap if e[2] == e[3].version)
        for line in station.pinned:
            if bool(station.lanes) != (line.place is not None):
                self._put(line)

    def _close(self, station: _Station) -> None:
        """Take a device out of the indexes."""
        station.version += 1
        if station.lanes:
            station.kind.open -= 1
            if not station.kind.open:
                self._open &= ~station.kind.bit
            self._lanes -= station.lanes
            station.lanes = 0
            if station.idle:
                station.idle = False
                station.kind.idle -= 1
                if not station.kind.idle:
                    self._idle &= ~station.kind.bit

    def _stands(self, station: _Station) -> bool:
        return self._stations.get(station.device.name) is station

    def _line(self, job: Job) -> _Line:
        """The line a job stands in; made if there is none."""
        need = job.need
        octave = max(-14, math.frexp(min(LONGEST, need.seconds))[1]) if need.seconds else -14
        run = job.run if self.policy.shares else ""
        key = (
            job.priority, run, job.kind, job.backend, need.qubits, need.threads, need.bytes.bit_length(), octave,
            job.alone, job.sole, job.single, job.pin,
        )  # fmt: skip
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(key, job, self._group(job.priority, run))
            line.group.lines += 1
            self._match_kinds(line)
            if job.pin is not None and job.pin in self._stations:
                self._stations[job.pin].pinned.append(line)
        return line

    def _match_kinds(self, line: _Line) -> None:
        least = (1 << line.sample.need.bytes.bit_length()) >> 1
        line.kinds = [k for k in self._kinds.values() if accepts(k.sample, line.sample) and least <= k.most]
        line.usual = [kind for kind in line.kinds if not kind.sample.aside]
        line.mask = sum(kind.bit for kind in line.kinds)

    def _rank(self, waiting: _Waiting) -> tuple[float, float, float, int]:
        """Who is smaller leaves first."""
        used = self._shares[waiting.job.run].used if self.policy.shares else 0.0
        return (-waiting.job.priority, used, waiting.key, waiting.seq)

    def _put(self, line: _Line) -> None:
        """Give a line its place in the order, by the job at its head."""
        self._unplace(line)
        sample = line.sample
        if sample.pin is not None and (sample.pin not in self._stations or not self._stations[sample.pin].lanes):
            return  # it would only be passed over, each time
        head = line.head()
        line.place = (head.key, head.seq, line)
        insort(line.group.order, line.place)
        if line.group.place is None:
            self._enter(line.group)

    def _unplace(self, line: _Line) -> None:
        if line.place is not None:
            order = line.group.order
            del order[bisect_left(order, line.place)]
            line.place = None
            if not order:
                self._exit(line.group)

    def _group(self, priority: int, run: str) -> _Group:
        key = (priority, run)
        group = self._ranks.get(key)
        if group is None:
            self._grouped += 1
            share = self._share(run) if self.policy.shares else None
            group = self._ranks[key] = _Group(key, self._grouped, share)
            if share is not None:
                share.groups.append(group)
        return group

    def _enter(self, group: _Group) -> None:
        used = group.share.used if group.share else 0.0
        group.place = (-group.key[0], used, group.number, group)
        insort(self._groups, group.place)

    def _exit(self, group: _Group) -> None:
        if group.place is not None:
            del self._groups[bisect_left(self._groups, group.place)]
            group.place = None

    def _settle(self, line: _Line) -> None:
        """After jobs left a line."""
        if not line.count:
            self._forget(line)
        else:
            head = line.head()
            if line.place is None or line.place[:2] != (head.key, head.seq):
                self._put(line)

    def _forget(self, line: _Line) -> None:
        self._unplace(line)
        del self._lines[line.key]
        pin = line.sample.pin
        if pin is not None and pin in self._stations:
            self._stations[pin].pinned.remove(line)
        group = line.group
        group.lines -= 1
        if not group.lines:
            del self._ranks[group.key]
            if group.share is not None:
                group.share.groups.remove(group)

    def _remove(self, waiting: _Waiting) -> None:
        """Out of the queue; `_settle` is to follow."""
        if waiting.held is not None:
            station = waiting.held
            self._keep(station, None)
            self._changed(station, self._now)
        del self._waiting[waiting.job.id]
        waiting.line.drop(waiting)
        self._work = self._work - min(LONGEST, waiting.job.need.seconds) if self._waiting else 0.0
        if self.policy.shares:
            self._shares[waiting.job.run].waiting -= 1

    # -- shares ------------------------------------------------------------------------------------------------------

    def _share(self, run: str) -> _Share:
        share = self._shares.get(run)
        if share is None:
            if len(self._shares) > 4096:  # who is behind the clock and has nothing here would start at it anyway
                self._shares = {r: s for r, s in self._shares.items() if s.groups or s.used > self._share_clock}
            share = self._shares[run] = _Share()
        return share

    def _charge(self, jobs: Sequence[_Waiting]) -> None:
        """Enter what a run has used: its groups move back in the order."""
        share = self._shares[jobs[0].job.run]
        self._share_clock = max(self._share_clock, share.used)
        for waiting in jobs:
            share.used += min(LONGEST, waiting.job.need.seconds)
            share.clock = max(share.clock, waiting.key)
        for group in share.groups:
            if group.place is not None:
                self._exit(group)
                self._enter(group)

    # -- refusals ----------------------------------------------------------------------------------------------------

    def _possible(self, job: Job, line: _Line) -> bool:
        if job.pin is not None:
            station = self._stations.get(job.pin)
            device = station.device if station else self._expected.get(job.pin)
            return device is not None and takes(device, job)
        return any(job.need.bytes <= kind.most for kind in line.kinds)

    def _refusal(self, job: Job) -> Refusal:
        need = job.need
        site = [*(s.device for s in self._stations.values()), *self._expected.values()]
        about = [device for device in site if job.pin in (None, device.name)]
        alike: dict[tuple[Hashable, ...], list[Device]] = {}
        for device in about:
            alike.setdefault(_kind_of(device), []).append(device)
        reasons: list[str] = []
        for devices in alike.values():
            largest = max(devices, key=lambda d: d.bytes)
            more = f" and {len(devices) - 1} like it" if len(devices) > 1 else ""
            reasons.append(f"{largest.name}{more}: {shortfall(largest, job)}")
        if job.pin is not None and not about:
            reasons.append(f"{job.pin}: not a device of this site")
        numbers = (
            f"the job {job.id!r} needs {format_bytes(need.bytes)} ({need.bytes:,} bytes), {need.qubits} qubits and "
            f"{need.threads or 'all'} threads"
        )
        able = [device for device in about if accepts(device, job)]
        error: PlacementError
        if able:
            most = max(able, key=lambda d: d.bytes)
            error = TooLarge(
                f"{numbers}, and the largest device for it, {most.name}, has {format_bytes(most.bytes)} "
                f"({most.bytes:,} bytes). Use fewer qubits, fewer workers with more memory each, or a cluster with "
                "larger workers."
            )
        else:
            error = NoDevice(f"{numbers}, and no device takes it. {'; '.join(reasons) or 'There is no device'}.")
        limits = [device.qubits for device in about]
        qubits = None if None in limits else max((q for q in limits if q is not None), default=0)
        return Refusal(
            job.id, error, tuple(reasons), need,
            max((d.bytes for d in about), default=0), max((d.threads for d in about), default=0), qubits,
        )  # fmt: skip


def _load(station: _Station, seconds: float, start: float, open_now: bool) -> Load:
    device = station.device
    finish = start + device.latency + seconds / device.speed
    return Load(device, open_now, start, finish, len(station.sent), station.number, station.turn)


def _alike(sample: Job, job: Job) -> bool:
    """Whether jobs of two lines may share a batch."""
    return (
        sample.priority == job.priority
        and sample.kind == job.kind
        and sample.backend == job.backend
        and sample.need.threads == job.need.threads
        and sample.pin == job.pin
        and not (sample.alone or sample.single or _whole(sample))
    )
