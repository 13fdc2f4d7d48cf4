"""What drivers told of their runs, folded into what the pages show: pure, bounded, without clock, Dask or bokeh.

A message is a JSON document. All that it holds takes the place of what was told before, but for the points of curves,
which are joined to those that are known; so a message that is lost is made good by the next. ``id`` tells runs apart,
``full`` says that what is known of the run is to be forgotten. Times are seconds since the epoch by the driver's clock;
rates are taken from ``clock``, seconds of one that is never set::

    {"v": 1, "id", "run", "workflow", "driver", "full", "time", "clock", "began", "state", "error",
     "totals": {"evaluations", "steps", "shots", "retries", "failures", "quantum", "classical"},
     "loops": [{"at", "group", "state", "method", "rows", "best", "last", "stderr", "seconds", "limit", "where",
                "reference", "source", "unit", "points": [[row, value, stderr, best], ...]}],
     "spans": [[lane, start, seconds, "quantum" | "classical", name, count]],
     "devices": [[name, slots, busy, ahead, projected, allowed]],
     "queue": {"waiting", "seconds"},
     "notes": [[time, "refused" | "retried" | "failed", location, reason]]}

Everything in it is data of strangers: names are escaped by whoever shows them.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from hybridq.pace import remaining

__all__ = [
    "MAX_CURVE", "MAX_LOOPS", "MAX_POINTS", "MAX_RUNS", "MEASURED", "STATES", "TOPIC", "VERSION", "Device", "Group",
    "Loop", "Note", "Queue", "Run", "Sample", "Span", "Store", "Totals", "document",
]  # fmt: skip

TOPIC = "hybridq"
"""Of the Dask events that carry messages."""
VERSION = 1
MEASURED = "hybridq-engines"
"""Metric of a Dask worker: memory that its engine processes take, in bytes."""
STATES = ("running", "finished", "failed", "interrupted", "silent")
MAX_RUNS = 24
MAX_LOOPS = 2000
"""Loops of a run that are kept one by one; of older ones that ended only their group's sums are kept."""
MAX_POINTS = 60_000
"""Of all curves of a run together."""
MAX_CURVE = 200
"""Points of one curve."""
MAX_SPANS = 600
MAX_NOTES = 100
MAX_SAMPLES = 600
MAX_GROUPS = 64
"""Of a run; further ones are taken together as the group ``...``."""
MAX_DEVICES = 256
MAX_TEXT = 300
"""Characters of a name or reason."""
KEPT_SECONDS = 3600.0
"""So long a run is kept that ended or went silent, in seconds."""
SILENT_SECONDS = 30.0
"""A running run whose driver tells nothing for so long counts as silent, in seconds; it says something every few."""
_RATE_SECONDS = 10.0
"""Over so long the rate of evaluations is taken, in seconds."""

Point = tuple[int, float, float, float]
"""Of a curve: row, value, its standard error, and the best value so far."""


@dataclass(frozen=True, slots=True)
class Loop:
    """An optimizer loop: values in ``unit``, ``seconds`` since it began."""

    at: str
    group: str
    state: str
    method: str
    rows: int
    best: float | None
    last: float | None
    stderr: float
    """Of the best value."""
    seconds: float
    limit: int | None
    """Evaluations that it ends after at the latest, if that is known."""
    where: str
    """Where its last row was evaluated."""
    reference: float | None
    source: str
    unit: str
    points: tuple[Point, ...]
    stride: int
    """Every how many rows a point was kept."""

    @property
    def error(self) -> float | None:
        """Best value minus reference, in ``unit``; None without either."""
        return None if self.best is None or self.reference is None else self.best - self.reference


@dataclass(frozen=True, slots=True)
class Totals:
    """What a run did since it was begun, all its drivers together; times in seconds."""

    evaluations: int = 0
    steps: int = 0
    shots: int = 0
    retries: int = 0
    failures: int = 0
    quantum: float = 0.0
    classical: float = 0.0


@dataclass(frozen=True, slots=True)
class Span:
    """Something that ran: ``count`` calls on ``lane`` from ``start`` for ``seconds``."""

    lane: str
    start: float
    seconds: float
    kind: str
    name: str
    count: int


@dataclass(frozen=True, slots=True)
class Device:
    """A device as its driver's ledger has it: slots, those at work, and batches sent ahead."""

    name: str
    slots: int
    busy: int
    ahead: int
    projected: int
    """Bytes that it takes at most now, by what is predicted: with its processes idle, and all that is on it."""
    allowed: int
    """Bytes for what is on it together."""


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits in a driver: calls, and their predicted seconds."""

    waiting: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Occupancy and queue at a time: slots at work and there, calls that wait."""

    time: float
    busy: int
    slots: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Note:
    """Something refused, retried or failed, and why."""

    time: float
    what: str
    at: str
    reason: str


@dataclass(frozen=True, slots=True)
class Group:
    """The loops that were started at one place of a program, taken together.

    ``best``, ``error`` (best minus reference) and ``stderr`` are those of the loop with the largest error where
    references are known, else of the one with the lowest value; so the row of one loop is that loop's.
    """

    name: str
    loops: int
    running: int
    finished: int
    failed: int
    rows: int
    best: float | None
    error: float | None
    stderr: float
    unit: str
    method: str
    devices: tuple[str, ...]
    rate: float
    """Evaluations a second, of late."""
    eta: float | None
    """Seconds until its loops that began have ended, if they need as many evaluations as those that have."""
    latest: float | None
    """Where none has ended: seconds until all have reached the limits of their evaluations."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run as it stood when its driver last told something."""

    id: str
    name: str
    workflow: str
    driver: str
    state: str
    error: str
    began: float
    time: float
    totals: Totals
    rate: float
    groups: tuple[Group, ...]
    loops: tuple[Loop, ...]
    spans: tuple[Span, ...]
    devices: tuple[Device, ...]
    queue: Queue
    samples: tuple[Sample, ...]
    notes: tuple[Note, ...]


@dataclass(slots=True)
class _Past:
    """Sums over loops of a group that are no longer kept."""

    loops: int = 0
    finished: int = 0
    failed: int = 0
    rows: int = 0
    finished_rows: int = 0
    """Of those that finished."""
    worst: Loop | None = None


@dataclass(slots=True)
class _Rate:
    """Evaluations a second over the last seconds."""

    seen: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=64))

    def add(self, time: float, count: int) -> None:
        if self.seen and count < self.seen[-1][1]:
            self.seen.clear()
        if self.seen and time <= self.seen[-1][0]:  # told in several messages
            self.seen.pop()
        self.seen.append((time, count))
        while len(self.seen) > 2 and self.seen[1][0] <= time - _RATE_SECONDS:
            self.seen.popleft()

    def now(self, time: float) -> float:
        if not self.seen or time - self.seen[-1][0] > _RATE_SECONDS:
            return 0.0
        (since, few), (_, many) = self.seen[0], self.seen[-1]
        return (many - few) / (time - since) if time > since else 0.0


@dataclass(slots=True)
class _Known:
    """All that is kept of a run."""

    head: dict[str, Any]
    heard: float
    """When it last told something, by the scheduler's clock."""
    totals: Totals = field(default_factory=Totals)
    loops: dict[str, Loop] = field(default_factory=dict)
    past: dict[str, _Past] = field(default_factory=dict)
    groups: dict[str, _Rate] = field(default_factory=dict)
    rate: _Rate = field(default_factory=_Rate)
    spans: tuple[Span, ...] = ()
    devices: tuple[Device, ...] = ()
    queue: Queue = field(default_factory=Queue)
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    notes: tuple[Note, ...] = ()
    points: int = 0


class Store:
    """Runs by what their drivers told, bounded whatever they tell. Not thread-safe."""

    def __init__(self) -> None:
        self._runs: dict[str, _Known] = {}
        self.version = 0
        """Changes whenever something told changes what is shown."""

    def fold(self, message: Mapping[str, Any], now: float) -> None:
        """Take in a message that came at ``now`` (seconds, of any clock that only goes on).

        Raises ValueError for one that is not as described above; what was known then stays as it was or is partly
        brought up to date.
        """
        try:
            self._fold(message, now)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a message of the topic {TOPIC!r} cannot be read ({type(error).__name__}: {error})"
                             ) from error  # fmt: skip

    def _fold(self, message: Mapping[str, Any], now: float) -> None:
        if message["v"] != VERSION:
            raise ValueError(f"a driver tells its runs in version {message['v']!r}, and version {VERSION} is read here")
        head: dict[str, Any] = {
            "id": _text(message["id"]), "name": _text(message["run"]), "workflow": _text(message["workflow"]),
            "driver": _text(message["driver"]), "state": _one_of(message["state"], STATES),
            "error": _text(message.get("error") or ""), "began": _number(message["began"]),
            "time": _number(message["time"]), "clock": _number(message["clock"]),
        }  # fmt: skip
        known = self._runs.pop(head["id"], None)
        if known is None or message.get("full"):
            known = _Known(head, now)
        known.head, known.heard = head, now
        self._runs[head["id"]] = known  # the one told of last is last
        if "totals" in message:
            given = message["totals"]
            known.totals = Totals(
                *(int(given[n]) for n in ("evaluations", "steps", "shots", "retries", "failures")),
                *(float(_number(given[n])) for n in ("quantum", "classical")),
            )
            known.rate.add(head["clock"], known.totals.evaluations)
        for loop in message.get("loops", ()):
            self._fold_loop(known, loop)
        self._bound(known)
        rows: dict[str, int] = {name: past.rows for name, past in known.past.items()}
        if message.get("loops"):
            for told in known.loops.values():
                rows[told.group] = rows.get(told.group, 0) + told.rows
            for name, count in rows.items():
                known.groups.setdefault(name, _Rate()).add(head["clock"], count)
        if "spans" in message:
            known.spans = tuple(
                Span(_text(lane), _number(start), _number(seconds), _one_of(kind, ("quantum", "classical")),
                     _text(name), int(count))
                for lane, start, seconds, kind, name, count in message["spans"][-MAX_SPANS:]
            )  # fmt: skip
        if "devices" in message:
            devices = message["devices"][:MAX_DEVICES]
            known.devices = tuple(Device(_text(name), *map(int, numbers)) for name, *numbers in devices)
        if "queue" in message:
            known.queue = Queue(int(message["queue"]["waiting"]), _number(message["queue"]["seconds"]))
        if "devices" in message or "queue" in message:
            busy, slots = sum(d.busy for d in known.devices), sum(d.slots for d in known.devices)
            sample = Sample(head["time"], busy, slots, known.queue.waiting)
            if known.samples and known.samples[-1].time >= sample.time:
                known.samples.pop()
            if len(known.samples) == MAX_SAMPLES:  # of the older ones every other one goes: the time line stays whole
                kept = [*list(known.samples)[: MAX_SAMPLES // 2 : 2], *list(known.samples)[MAX_SAMPLES // 2 :]]
                known.samples = deque(kept, maxlen=MAX_SAMPLES)
            known.samples.append(sample)
        if "notes" in message:
            known.notes = tuple(
                Note(_number(time), _one_of(what, ("refused", "retried", "failed")), _text(at), _text(reason))
                for time, what, at, reason in message["notes"][-MAX_NOTES:]
            )
        self.version += 1
        self._forget(now)

    def _fold_loop(self, known: _Known, told: Mapping[str, Any]) -> None:
        at = _text(told["at"])
        before = known.loops.pop(at, None)
        group = _text(told["group"])
        if before is not None:
            group = before.group
            known.points -= len(before.points)
        elif group not in known.groups:
            group = group if len(known.groups) < MAX_GROUPS else "..."
            known.groups.setdefault(group, _Rate())
        points, stride = (before.points, before.stride) if before is not None else ((), 1)
        new = [
            (int(row), _number(value), _number(stderr), _number(best)) for row, value, stderr, best in told["points"]
        ]
        bound = max(8, min(MAX_CURVE, MAX_POINTS // (len(known.loops) + 1)))
        points, stride = _joined(points, new, stride, bound)
        known.points += len(points)
        known.loops[at] = Loop(
            at, group, _one_of(told["state"], STATES), _text(told["method"]), int(told["rows"]),
            _maybe(told["best"]), _maybe(told["last"]), _number(told["stderr"]), _number(told["seconds"]),
            None if told.get("limit") is None else int(told["limit"]), _text(told["where"]), _maybe(told["reference"]),
            _text(told["source"]), _text(told["unit"]), points, stride,
        )  # fmt: skip

    def _bound(self, known: _Known) -> None:
        excess = len(known.loops) - MAX_LOOPS
        if excess > 0:
            # who is told of last stands last: those that ended longest ago go, as they alone will not go on; of the
            # others the ones long silent
            order = sorted(known.loops, key=lambda at: known.loops[at].state != "finished")
            for at in order[:excess]:
                loop = known.loops.pop(at)
                known.points -= len(loop.points)
                past = known.past.setdefault(loop.group, _Past())
                past.loops, past.rows = past.loops + 1, past.rows + loop.rows
                past.finished += loop.state == "finished"
                past.finished_rows += loop.rows * (loop.state == "finished")
                past.failed += loop.state == "failed"
                past.worst = _worst([loop, *([past.worst] if past.worst else [])])
        if known.points > MAX_POINTS + MAX_CURVE:
            bound = max(8, MAX_POINTS // len(known.loops))
            for at, loop in known.loops.items():
                if len(loop.points) > bound:
                    points, stride = _joined(loop.points, (), loop.stride, bound)
                    known.points += len(points) - len(loop.points)
                    known.loops[at] = replace(loop, points=points, stride=stride)

    def _forget(self, now: float) -> None:
        ended = [key for key, known in self._runs.items() if self._state(known, now) != "running"]
        old = [key for key in ended if now - self._runs[key].heard > KEPT_SECONDS]
        keys = [*old, *(key for key in ended if key not in old), *(key for key in self._runs if key not in ended)]
        for key in keys[: max(len(old), len(self._runs) - MAX_RUNS)]:
            del self._runs[key]

    def _state(self, known: _Known, now: float) -> str:
        state: str = known.head["state"]
        return "silent" if state == "running" and now - known.heard > SILENT_SECONDS else state

    def silent(self, now: float) -> int:
        """How many running runs have not been heard of for long: changes without a message."""
        return sum(self._state(known, now) == "silent" for known in self._runs.values())

    def runs(self, now: float) -> tuple[Run, ...]:
        """All runs as they are at ``now``, of the clock of `fold`: those that run first, then the latest first."""
        found = [self._run(known, now) for known in reversed(self._runs.values())]
        return tuple(sorted(found, key=lambda run: (run.state != "running", -run.began)))

    def _run(self, known: _Known, now: float) -> Run:
        head = {**known.head, "state": self._state(known, now)}
        clock = head.pop("clock") + max(0.0, now - known.heard)
        live = head["state"] == "running"
        loops: dict[str, list[Loop]] = {name: [] for name in known.groups}
        for loop in known.loops.values():
            loops[loop.group].append(loop)
        groups = tuple(
            _group(name, members, known.past.get(name, _Past()), known.groups[name].now(clock) if live else 0.0, live)
            for name, members in loops.items()
        )
        rate = known.rate.now(clock) if live else 0.0
        # where it is told of again when it changes, a loop moves to the end of what is kept
        return Run(
            **head, totals=known.totals, rate=rate, groups=groups,
            loops=tuple(sorted(known.loops.values(), key=lambda loop: _natural(loop.at))), spans=known.spans,
            devices=known.devices if live else (), queue=known.queue if live else Queue(), samples=tuple(known.samples),
            notes=known.notes,
        )  # fmt: skip


def document(runs: Iterable[Run]) -> Iterator[str]:
    """Runs as the text of a JSON array, in pieces of a few milliseconds' work.

    Objects have the fields of their classes by name; a loop's points are ``[row, value, stderr, best]``. Numbers that
    JSON lacks are null.
    """
    yield "["
    for number, run in enumerate(runs):
        told = _fields(run)
        loops = told.pop("loops")
        text = _json(told)
        yield f'{"," if number else ""}{text[:-1]},"loops":['
        for start in range(0, len(loops), _TOGETHER):
            yield ("," if start else "") + _json(loops[start : start + _TOGETHER])[1:-1]
        yield "]}"
    yield "]"


_TOGETHER = 32
"""Loops in a piece of a document."""


def _fields(value: Any) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in fields(value)}


def _json(value: Any) -> str:
    try:
        return json.dumps(value, default=_fields, allow_nan=False, separators=(",", ":"))
    except ValueError:  # rare: a look at each number takes several times as long
        return json.dumps(_plain(value), separators=(",", ":"))


def _plain(value: Any) -> Any:
    """``value`` as JSON data, with None for what is not a finite number."""
    if is_dataclass(value):
        value = _fields(value)
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _group(name: str, members: Sequence[Loop], past: _Past, rate: float, live: bool) -> Group:
    running = [loop for loop in members if loop.state == "running"]
    finished = [loop for loop in members if loop.state == "finished"]
    worst = _worst([*members, *([past.worst] if past.worst else [])])
    count = len(finished) + past.finished
    spent = sum(loop.rows for loop in finished) + past.finished_rows
    left = remaining(count, spent, [(loop.rows, loop.limit) for loop in running], rate) if live else None
    eta, latest = (None, None) if left is None else (None, left[0]) if left[1] else (left[0], None)
    return Group(
        name=name, loops=len(members) + past.loops, running=len(running), finished=count,
        failed=sum(loop.state == "failed" for loop in members) + past.failed,
        rows=sum(loop.rows for loop in members) + past.rows, best=worst.best if worst else None,
        error=worst.error if worst else None, stderr=worst.stderr if worst else 0.0,
        unit=worst.unit if worst else "", method=members[-1].method if members else "",
        devices=tuple(sorted({loop.where for loop in running if loop.where})), rate=rate, eta=eta, latest=latest,
    )  # fmt: skip


def _worst(loops: Sequence[Loop]) -> Loop | None:
    """The loop that stands for a group: the one farthest from its reference, or the one with the lowest value."""
    known = [loop for loop in loops if loop.error is not None]
    if known:
        return max(known, key=lambda loop: abs(loop.error or 0.0))
    valued = [loop for loop in loops if loop.best is not None]
    return min(valued, key=lambda loop: loop.best or 0.0, default=None)


def _joined(old: Sequence[Point], new: Sequence[Point], stride: int, bound: int) -> tuple[tuple[Point, ...], int]:
    """A curve with ``new`` points, in at most ``bound`` + 1: every ``stride``-th row, and the last one."""
    rows = old[-1][0] if old else -1
    points = [*old, *(point for point in new if point[0] > rows)]
    last = points[-1:]
    while True:
        kept = [point for point in points[:-1] if point[0] % stride == 0] + last
        if len(kept) <= bound + 1:
            return tuple(kept), stride
        stride *= 2


def _natural(text: str) -> list[tuple[int, int | str]]:
    """A key that puts ``point[2]`` before ``point[10]``."""
    parts: list[tuple[int, int | str]] = []
    for part in text.replace("]", "[").split("["):
        parts.append((0, int(part)) if part.isascii() and part.isdigit() else (1, part))
    return parts


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is not a text")
    text = value.encode("utf-8", "backslashreplace").decode()  # such as a file's name that is none
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _one_of(value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r:.80} is none of {', '.join(allowed)}")
    return str(value)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _maybe(value: Any) -> float | None:
    return None if value is None else float(value)
