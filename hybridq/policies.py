"""Devices, jobs and batches, and the policies between them: who leaves first, and where to; pure.

What fits is not a policy's to say: `hybridq.ledger` shows it only devices that have room.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from hybridq.errors import PlacementError
from hybridq.resources import Need, format_bytes

__all__ = [
    "LONGEST", "POLICIES", "Batch", "Device", "Job", "Load", "Part", "Policy", "Refusal", "accepts", "check", "parted",
    "shortfall", "takes",
]  # fmt: skip

_URGENCY = 10.0
"""Seconds in the queue that weigh as much as one second less to come: the longest first, but nobody for ever."""
LONGEST = 1e6
"""Longer predictions, in seconds, count as this long where jobs are put in order."""


@dataclass(frozen=True, slots=True)
class Device:
    """Something that runs jobs: a worker with its engine processes, the driver's own engine, a QPU."""

    name: str
    slots: int
    """How many batches run on it side by side."""
    bytes: int
    """Memory that everything running on it may take together, in bytes."""
    threads: int
    """Threads that everything running on it may use together."""
    latency: float = 0.0
    """Seconds from handing a batch over to its first gate, and from its last one back, together."""
    speed: float = 1.0
    """A job of ``need.seconds`` takes ``need.seconds / speed`` here."""
    qubits: int | None = None
    """The largest circuit it takes; None: only its memory bounds that."""
    backend: str = ""
    """Identity of what it evaluates; "": whatever can be simulated. A job runs only where its backend is the same."""
    cost_per_shot: float = 0.0
    """In any one currency; of devices that finish at the same time the cheaper one is taken."""
    kinds: tuple[str, ...] = ("quantum", "classical")
    """Which kinds of jobs it runs."""
    aside: bool = False
    """Only for short lone jobs, pinned ones, and those that fit no other device: the driver's own engine."""


@dataclass(frozen=True, slots=True)
class Job:
    """Something to run, as far as its placement depends on it."""

    id: Hashable
    need: Need
    run: str = ""
    loop: str = ""
    """Run and loop are the names between which a fair share is kept."""
    priority: int = 0
    """Higher leaves first."""
    pin: str | None = None
    """Name of the only device it may run on."""
    backend: str = ""
    template: str = ""
    """Jobs of equal template share a prepared circuit: a batch takes them first."""
    alone: bool = False
    """Whether nothing else of its run could be waiting at the same time."""
    sole: bool = False
    """Whether it has its device to itself: with nothing beside it, and nothing sent ahead. So has one that needs all
    threads."""
    kind: str = "quantum"
    single: bool = False
    """Whether no other job travels in its batch: it has a time limit, which is a batch's, or is a slice of a loop."""
    rank: float = 0.0
    """Predicted seconds of the longest chain of jobs that wait for this one to end; 0 if not known. If it is known, the
    batch that the job leads is no longer than ten trips: its end would be known only with that of the batch."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs that leave together for one slot of a device and run there one after the other."""

    device: str
    jobs: tuple[Hashable, ...]
    reason: str
    """Why here, why now, with what: for a person."""
    bytes: int
    """What is reserved for it: the most that one of its jobs takes."""
    threads: int
    seconds: float
    """Predicted time on the slot, in seconds, without the trip."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A job that no device of the site, present or expected, could ever run."""

    job: Hashable
    error: PlacementError
    """`TooLarge` if only bytes are missing somewhere, else `NoDevice`; its message holds the reasons."""
    reasons: tuple[str, ...]
    """One for each kind of device, with what is needed and what is there."""
    needed: Need
    bytes: int
    """The most that one device of the site has; so are the next two."""
    threads: int
    qubits: int | None
    """None: no limit but memory."""


class Part(NamedTuple):
    """Some of the rows of a program, or of the derivatives of one row."""

    rows: tuple[int, int]
    """The first, and the one after the last."""
    columns: tuple[int, int]
    """The same of the parameters that its derivatives are by."""


class Load(NamedTuple):
    """What a policy sees of a device when it chooses: times in seconds from now."""

    device: Device
    open: bool
    """Whether a batch can be sent now; if not, `start` is when the last of those waiting alike would start."""
    start: float
    finish: float
    """Predicted end of the job there, the trip included."""
    busy: int
    """Batches on it."""
    number: int
    """The how manieth device to join."""
    turn: int
    """The how manieth batch of the ledger was its last one; 0 if it had none."""


@dataclass(frozen=True)
class Policy:
    """Who leaves first, and where to: pure functions. What fits is not theirs to say."""

    name: str
    order: Callable[[Job, float], float]
    """Of a job and when it was submitted, in seconds: among jobs of equal priority the smallest leaves first."""
    prefer: Callable[[Load], tuple[float, ...]]
    """Between devices of one kind, the smallest; of times, only the order of `start` and whether it is 0 count."""
    choose: Callable[[Job, Sequence[Load]], str | None]
    """The name of the device to take, of the best of each kind; None to go on waiting."""
    waits: bool = False
    """Whether `choose` is also shown kinds that are busy, so that a job may wait for one of them."""
    shares: bool = False
    """Whether runs, and within them loops, share predicted seconds equally; `order` is not asked then."""


def _urgency(job: Job, arrived: float) -> float:
    return arrived - _URGENCY * min(LONGEST, job.need.seconds + job.rank)


def _arrival(job: Job, arrived: float) -> float:
    return arrived


def _soonest(load: Load) -> tuple[float, ...]:
    return (load.start, -load.device.speed, load.busy / load.device.slots, load.number)


def _first(load: Load) -> tuple[float, ...]:
    return (load.start > 0, load.number)


def _idlest(load: Load) -> tuple[float, ...]:
    return (load.busy / load.device.slots, load.number)


def _next_in_turn(load: Load) -> tuple[float, ...]:
    return (load.start > 0, load.turn, load.number)


def _earliest(job: Job, loads: Sequence[Load]) -> str | None:
    """The device where it is predicted to end first, unless that one is still busy; then wait for it."""
    shots = job.need.shots
    best = min(loads, key=lambda load: (load.finish, shots * load.device.cost_per_shot, load.number))
    return best.device.name if best.open else None


def _by(prefer: Callable[[Load], tuple[float, ...]]) -> Callable[[Job, Sequence[Load]], str | None]:
    return lambda job, loads: min(loads, key=prefer).device.name


POLICIES: Mapping[str, Policy] = MappingProxyType({
    policy.name: policy
    for policy in (
        Policy("earliest-finish", _urgency, _soonest, _earliest, waits=True),
        Policy("first-come", _arrival, _first, _by(_first)),
        Policy("fair-share", _arrival, _soonest, _earliest, waits=True, shares=True),
        Policy("least-busy", _arrival, _idlest, _by(_idlest)),
        Policy("round-robin", _arrival, _next_in_turn, _by(_next_in_turn)),
    )
})  # fmt: skip
"""By name. ``earliest-finish``: first those with most still to come, each to where it ends first, if need be later.
``fair-share``: the run, then the loop, that used least. The others, in order of arrival, are there to compare with."""


def parted(rows: int, columns: int, seconds: float, slots: int, least: float) -> tuple[Part, ...]:
    """A long program in parts for as many of ``slots`` free ones as it is worth, in order, rows first.

    ``columns`` are the parameters whose derivatives can be had apart; 1 where a row is not to be divided. Each part
    takes at least about ``least`` of the program's ``seconds``. Fewer rows than parts are divided by columns.
    """
    count = max(1, min(slots, rows * columns, int(seconds / least)))
    if count <= max(1, rows):
        return tuple(Part(bounds, (0, columns)) for bounds in _even(rows, count))
    return tuple(
        Part((row, row + 1), bounds)
        for row, (first, stop) in enumerate(_even(count, rows))
        for bounds in _even(columns, min(columns, stop - first))
    )


def _even(amount: int, count: int) -> list[tuple[int, int]]:
    """``amount`` things as ``count`` runs of nearly equal length: the first of each, and the one after its last."""
    bounds = [amount * i // count for i in range(count + 1)]
    return list(itertools.pairwise(bounds))


def accepts(device: Device, job: Job) -> bool:
    """Whether a device could run a job, given memory enough."""
    return (
        job.kind in device.kinds
        and job.backend == device.backend
        and (device.qubits is None or job.need.qubits <= device.qubits)
        and job.need.threads <= device.threads
    )


def takes(device: Device, job: Job) -> bool:
    """Whether a device that is empty could run a job."""
    return accepts(device, job) and job.need.bytes <= device.bytes and job.pin in (None, device.name)


def shortfall(device: Device, job: Job) -> str:
    """What a device lacks for a job, both numbers each."""
    need, lacks = job.need, []
    if job.kind not in device.kinds:
        lacks.append(f"runs {' and '.join(device.kinds)} jobs, not {job.kind} ones")
    if job.backend != device.backend:
        lacks.append(f"evaluates {device.backend or 'simulated circuits'}, not {job.backend or 'simulated circuits'}")
    if device.qubits is not None and need.qubits > device.qubits:
        lacks.append(f"needs {need.qubits} qubits, has {device.qubits}")
    if need.threads > device.threads:
        lacks.append(f"needs {need.threads} threads, has {device.threads}")
    if need.bytes > device.bytes:
        lacks.append(
            f"needs {format_bytes(need.bytes)} ({need.bytes:,} bytes), "
            f"has {format_bytes(device.bytes)} ({device.bytes:,} bytes)"
        )
    return ", ".join(lacks)


def check(device: Device) -> None:
    """Raises ValueError for a device that cannot be."""
    if not (
        device.slots >= 1
        and device.threads >= 1
        and device.bytes >= 0
        and 0 <= device.latency < math.inf
        and 0 < device.speed < math.inf
    ):
        raise ValueError(f"{device} cannot be: slots, threads and speed are positive, bytes and latency not negative")
