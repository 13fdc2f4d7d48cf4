"""What a run's records say to people who look at it: one pass over them, a bounded memory, frozen views out.

`History` knows nothing of disk, Dask or the clock. Names in what it gives are data, to be escaped where they are shown.
"""

from __future__ import annotations

import ast
import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hybridq import journal as records
from hybridq.errors import HybridqError
from hybridq.journal import unpack_array
from hybridq.location import Location
from hybridq.pace import pace
from hybridq.source import parsing
from hybridq.values import Encoded, decode

__all__ = [
    "Calls",
    "Fault",
    "History",
    "LoopHistory",
    "Point",
    "ProgramUse",
    "Reference",
    "RunHistory",
    "Session",
    "Span",
    "group_of",
]

_PROBLEM = "hybridq.problems.problem:Problem"
_DEPTH = 8
_MOST_NUMBERS = 8
_MOST_SCOPES = 10_000
"""Scopes whose steps' numbers are kept."""
_MOST_PROGRAMS = 1_000
"""Programs whose use is kept where the history is bounded."""


@dataclass(frozen=True)
class Reference:
    """What a loop's result should be, as the one problem in its arguments says."""

    value: float
    """In ``unit``."""
    source: str
    unit: str
    """"hartree" or "J"; "" if the problem does not say."""
    problem: str


@dataclass(frozen=True)
class Point:
    """One evaluation of a loop's objective, in the objective's unit."""

    row: int
    value: float
    stderr: float
    best: float
    """The lowest value so far."""
    best_stderr: float
    """Of that value."""


@dataclass(frozen=True)
class LoopHistory:
    """An optimizer loop so far."""

    line: int
    """Of its header in the journal."""
    at: str
    group: str
    """What it has in common with the other loops of its place: ``point/energy``."""
    function: str
    method: str
    gradient: str
    state: str
    """``running``, ``finished``, ``failed``, or ``interrupted`` if no driver works on it."""
    rows: int
    """Evaluations of its objective."""
    evaluations: int
    """Quantum evaluations: its rows, or what a plain objective called."""
    shots: int
    limit: int | None
    """Evaluations of the objective at most, as its options or scipy's defaults say."""
    bound: int | None
    """The same, where an option was given that the method keeps to."""
    best: float | None
    best_row: int | None
    best_stderr: float | None
    last: float | None
    last_stderr: float | None
    result: float | None
    """``fun`` of the optimizer's result, when it has ended."""
    iterations: int | None
    """``nit`` of the optimizer's result."""
    message: str | None
    """The optimizer's own word on how it ended."""
    began: float | None
    """Seconds since 1970 at which its first timed row began; None if none is timed."""
    ended: float | None
    """Seconds since 1970 at which its last timed row ended."""
    seconds: float
    """Sum of what its rows took."""
    reference: Reference | None
    numbers: Mapping[str, float]
    """Numbers that its arguments, or those of the steps beside it, hold by name: what may tell it from its group."""
    curve: tuple[Point, ...]
    """In order; thinned if the history is bounded, first and last always there."""
    where: str = ""
    """Where its last row was evaluated; empty for an objective that is not itself a quantum function."""

    @property
    def error(self) -> float | None:
        """Best value minus the reference, in its unit."""
        return None if self.best is None or self.reference is None else self.best - self.reference.value


@dataclass(frozen=True)
class Calls:
    """Recorded calls of one place: classical steps, or quantum evaluations outside of loops."""

    group: str
    kind: str
    """``classical`` or ``quantum``."""
    done: int
    seconds: float
    """Where they ran, summed."""


@dataclass(frozen=True)
class Span:
    """Time that a device was busy with one kind of work, several calls in a row merged where the history is bounded."""

    where: str
    kind: str
    """``classical`` or ``quantum``."""
    group: str
    began: float
    """Seconds since 1970."""
    seconds: float
    """From its first call's begin to its last one's end."""
    busy: float
    """Of these, what its calls took."""
    calls: int


@dataclass(frozen=True)
class Fault:
    """A call that raised."""

    line: int
    at: str
    type: str
    """``module:Name`` of the exception."""
    message: str
    where: str
    attempt: int
    began: float
    seconds: float
    survived: bool
    """Whether the workflow went on after it."""
    repaired: bool
    """Whether the call was tried again and has a value now."""


@dataclass(frozen=True)
class Session:
    """A driver that had the run open."""

    host: str
    pid: int
    began: float
    """Seconds since 1970."""
    python: str
    processor: str
    versions: Mapping[str, str]
    command: tuple[str, ...]
    status: str | None
    """How it left the run; None if it did not say."""
    seconds: float | None


@dataclass(frozen=True)
class ProgramUse:
    """What a program was predicted to take, beside what it took, for one number of shots."""

    program: str
    qubits: int
    gates: int
    paulis: int
    gradient: bool
    shots: int | None
    """None for exact values."""
    evaluations: int
    rows: int
    """Parameter sets."""
    predicted_seconds: float | None
    """Of one row."""
    seconds: float
    """Median of one row."""
    predicted_bytes: int | None
    bytes: int | None
    """The largest measured; None where nothing was."""


@dataclass(frozen=True)
class RunHistory:
    """A run so far."""

    name: str
    workflow: str
    seed: int | None
    status: str
    """``running`` since its last driver opened it, or as that driver left it: ``finished``, ``failed``,
    ``interrupted``, ``planned``."""
    error: str | None
    lines: int
    """Records seen."""
    evaluations: int
    steps: int
    shots: int
    retries: int
    """Attempts that were made again after a failure."""
    failures: int
    """Calls that raised; ``faults`` are the last of them where the history is bounded."""
    sessions: tuple[Session, ...]
    loops: tuple[LoopHistory, ...]
    calls: tuple[Calls, ...]
    faults: tuple[Fault, ...]
    spans: tuple[Span, ...]
    untimed: int
    """Rows of loops recorded without the time they began, which are in no span."""
    programs: tuple[ProgramUse, ...]
    reused: Mapping[str, int]
    """Calls that records of other runs answered, by run."""

    @property
    def unit(self) -> str:
        """The unit that all references have in common; "" if there is none."""
        units = {loop.reference.unit for loop in self.loops if loop.reference is not None}
        return units.pop() if len(units) == 1 else ""


def group_of(at: str, name: str) -> str:
    """What calls of ``name`` at one place of a workflow have in common: the scope's name, and theirs."""
    parent = Location(at).parent
    return name if parent is None else f"{parent.name}/{name}"


class History:
    """What records say, taken one by one in the journal's order.

    ``load`` gives the encoded value behind a document that stands for a file; without it, and where it raises a
    `HybridqError`, such values count as not known. ``points``, ``spans`` and ``faults`` bound what is kept of each
    loop's curve (3 at least), of the time line and of failures; None keeps all.
    """

    def __init__(self, load: Callable[[Any], Encoded] | None = None, *, points: int | None = None,
                 spans: int | None = None, faults: int | None = None) -> None:  # fmt: skip
        self._load = load
        self._most_points = points
        self._most_faults = faults
        self._lines = 0
        self._header: records.RunHeader | None = None
        self._sessions: list[Session] = []
        self._end: records.End | None = None
        self._loops: dict[int, _Loop] = {}
        self._places: dict[str, int] = {}
        self._changed: dict[int, None] = {}
        self._calls: dict[tuple[str, str], list[float]] = {}
        self._faults: list[Fault] = []
        self._failures = 0
        self._attempts: Counter[str] = Counter()
        self._survived: set[str] = set()
        self._repaired: set[str] = set()
        self._retried: dict[str, int] = {}
        """Attempts after the first one, by location."""
        self._spans = _Spans(spans)
        self._untimed = 0
        self._programs = _Programs(points)
        self._parameters: dict[str, tuple[str, ...]] = {}
        self._numbers: dict[str, dict[str, float]] = {}
        self._reused: Counter[str] = Counter()
        self._evaluations = self._steps = self._shots = 0

    def take(self, number: int, record: records.Record) -> None:
        """Fold the record of the journal's line ``number``; numbers only grow."""
        self._lines += 1
        match record:
            case records.Row():
                self._row(record)
            case records.Evaluation():
                self._evaluation(record)
            case records.Step():
                self._steps += 1
                self._answered(record, "classical", _last_name(record.at))
                self._numbers_of(record)
            case records.Loop():
                self._loop(number, record)
            case records.LoopEnd():
                loop = self._loops[record.loop]
                loop.take_end(self._value(record.output))
                self._changed[record.loop] = None
            case records.Circuit():
                self._programs.circuit(record)
            case records.Code():
                self._parameters[record.code] = _parameters(self._document(record.text))
            case records.Failure():
                self._failure(number, record)
            case records.Survived():
                self._survived.add(record.at)
            case records.RunHeader():
                self._header = record
            case records.Opened():
                self._opened(record)
            case records.End():
                self._ended(record)
            case records.Event():
                pass

    @property
    def status(self) -> str | None:
        """As of `RunHistory`; None before the run's header was taken."""
        return None if self._header is None else "running" if self._end is None else self._end.status

    def changed(self) -> tuple[LoopHistory, ...]:
        """The loops about which something was taken since this was last called."""
        found = tuple(self._loop_history(line, self._loops[line]) for line in self._changed)
        self._changed.clear()
        return found

    def run(self, *, details: bool = True) -> RunHistory:
        """All of it, as it is now; without ``details`` no loops and no programs are in it, which may be thousands."""
        header, end = self._header, self._end
        return RunHistory(
            name="" if header is None else header.name,
            workflow="" if header is None else header.workflow,
            seed=None if header is None else header.seed,
            status=self.status or "running",
            error=None if end is None else end.error,
            lines=self._lines, evaluations=self._evaluations, steps=self._steps, shots=self._shots,
            retries=sum(self._retried.values()), sessions=tuple(self._sessions),
            loops=tuple(self._loop_history(line, loop) for line, loop in self._loops.items()) if details else (),
            calls=tuple(
                Calls(group, kind, int(done), seconds) for (group, kind), (done, seconds) in self._calls.items()
            ),
            failures=self._failures,
            faults=tuple(
                replace(f, survived=f.at in self._survived, repaired=f.at in self._repaired) for f in self._faults
            ),
            spans=self._spans.all(), untimed=self._untimed, programs=self._programs.uses() if details else (),
            reused=dict(self._reused),
        )  # fmt: skip

    # -- single records ------------------------------------------------------------------------------------------------

    def _opened(self, record: records.Opened) -> None:
        self._end = None
        self._sessions.append(Session(
            record.host, record.pid, record.time, record.python, record.processor, dict(record.versions),
            tuple(record.command), None, None,
        ))  # fmt: skip
        self._stop_loops()

    def _ended(self, record: records.End) -> None:
        self._end = record
        if self._sessions:
            last = self._sessions[-1]
            self._sessions[-1] = replace(last, status=record.status, seconds=record.seconds)
        self._stop_loops()

    def _stop_loops(self) -> None:
        """No driver works on a loop any more that has not ended."""
        for line, loop in self._loops.items():
            if loop.state == "running":
                loop.state = "interrupted"
                self._changed[line] = None

    def _loop(self, number: int, record: records.Loop) -> None:
        document = self._document(record.inputs)
        settings = document if isinstance(document, Mapping) else {}
        self._loops[number] = _Loop(record, settings, self._most_points)
        self._places[record.at] = number
        self._changed[number] = None

    def _row(self, record: records.Row) -> None:
        loop = self._loops[record.loop]
        if record.i != loop.rows:
            return  # as `recorded.index` reads it
        began = record.started
        loop.take(record, began)
        self._changed[record.loop] = None
        if not record.where:
            return
        self._evaluations += 1
        self._shots += record.shots or 0
        loop.evaluations += 1
        loop.shots += record.shots or 0
        self._programs.row(record, loop)
        if record.where.startswith("run "):
            self._reused[record.where[4:]] += 1
        elif began is None:
            self._untimed += 1
        else:
            self._spans.add(record.where, "quantum", loop.group, began, record.seconds)

    def _evaluation(self, record: records.Evaluation) -> None:
        self._evaluations += 1
        self._shots += record.shots or 0
        self._answered(record, "quantum", _last_name(record.at))
        shape = self._shape(record.theta)
        self._programs.evaluation(record, math.prod(shape[:-1]) if shape else 1)
        for above in _above(record.at):
            line = self._places.get(above)
            if line is not None:
                self._loops[line].evaluations += 1
                self._loops[line].shots += record.shots or 0
                self._changed[line] = None
                break

    def _answered(self, record: records.Step | records.Evaluation, kind: str, name: str) -> None:
        group = group_of(record.at, name)
        if record.where.startswith("run "):
            self._reused[record.where[4:]] += 1
        else:
            self._spans.add(record.where, kind, group, record.started, record.seconds)
        calls = self._calls.setdefault((group, kind), [0, 0.0])
        calls[0] += 1
        calls[1] += record.seconds
        self._tried(record.at, record.attempt)
        if self._attempts.pop(record.at, 0):
            self._repaired.add(record.at)

    def _tried(self, at: str, attempt: int) -> None:
        if attempt > self._retried.get(at, 0):
            self._retried[at] = attempt

    def _failure(self, number: int, record: records.Failure) -> None:
        self._tried(record.at, record.attempt)
        self._attempts[record.at] += 1
        self._failures += 1
        self._faults.append(Fault(
            number, record.at, record.type, record.message, record.where, record.attempt, record.started,
            record.seconds, survived=False, repaired=False,
        ))  # fmt: skip
        if self._most_faults is not None and len(self._faults) > self._most_faults:
            del self._faults[0]
        line = self._places.get(record.at)
        if line is not None:
            self._loops[line].state = "failed"
            self._changed[line] = None

    def _loop_history(self, line: int, loop: _Loop) -> LoopHistory:
        parent = Location(loop.at).parent
        beside = {} if parent is None else self._numbers.get(str(parent), {})
        return loop.history(line, beside)

    def _numbers_of(self, record: records.Step) -> None:
        """Numbers that a step was called with: of use where a loop of the same scope follows."""
        parent = str(Location(record.at).parent or "")
        known = self._numbers.get(parent, {})
        if len(known) >= _MOST_NUMBERS or len(self._numbers) >= _MOST_SCOPES:
            return
        document = self._document(record.inputs)
        if not isinstance(document, list) or len(document) != 2:
            return
        name, names = _last_name(record.at), self._parameters.get(record.code, ())
        args = document[0] if isinstance(document[0], list) else []
        given = [(names[i] if i < len(names) else str(i), value) for i, value in enumerate(args)]
        given += list(document[1].items()) if isinstance(document[1], Mapping) and "$" not in document[1] else []
        for parameter, value in given:
            number = _number(value)
            if number is not None:
                known.setdefault(f"{parameter} of {name}()", number)
        if known:
            self._numbers[parent] = known

    # -- documents -----------------------------------------------------------------------------------------------------

    def _document(self, document: Any) -> Any:
        """A record's document, read from its file if it is in one; None if that is not to be had."""
        if not (isinstance(document, Mapping) and document.get("$") == "file"):
            return document
        if self._load is None:
            return None
        try:
            return self._load(document).document
        except HybridqError:
            return None

    def _value(self, document: Any) -> Any:
        """The members of an optimizer's result that are short, by name."""
        found = self._document(document)
        members = found.get("v") if isinstance(found, Mapping) and found.get("$") == "OptimizeResult" else None
        return members if isinstance(members, Mapping) else {}

    def _shape(self, document: Any) -> tuple[int, ...]:
        found = self._document(document)
        if isinstance(found, Mapping) and isinstance(found.get("s"), list):
            return tuple(found["s"])
        if self._load is None or not isinstance(found, Mapping):
            return ()
        try:
            return tuple(decode(self._load(document)).shape)
        except HybridqError:
            return ()


class _Loop:
    """A loop's numbers: its curve as arrays, thinned when it grows too long."""

    def __init__(self, header: records.Loop, settings: Mapping[str, Any], most: int | None) -> None:
        self.at, self.function, self.method, self.gradient = header.at, header.function, header.method, header.gradient
        self.group = group_of(header.at, header.function)
        self.state = "running"
        self.rows = self.evaluations = self.shots = 0
        self.seconds = 0.0
        self.began: float | None = None
        self.ended: float | None = None
        self.program = self.where = ""
        self._limited = _limited(header, settings)
        self._limit: tuple[int | None, int | None] = (None, None)
        self._reference = _reference(settings.get("args"))
        self._numbers = dict(_arguments(settings.get("args")))
        self._most, self._stride = most, 1
        self._kept: tuple[array[Any], ...] = (array("q"), *(array("d") for _ in range(4)))
        self._last: tuple[int, float, float, float, float] | None = None
        """The members of a `Point`."""
        self._best: tuple[float, int, float] | None = None
        self._result: float | None = None
        self._iterations: int | None = None
        self._message: str | None = None

    def take(self, row: records.Row, began: float | None) -> None:
        if self._last is None:
            self._limit = self._limited(len(unpack_array(row.x)))
        self.rows += 1
        self.state = "running"
        self.where = row.where
        self.seconds += row.seconds
        if began is not None:
            self.began = began if self.began is None else min(self.began, began)
            self.ended = max(began + row.seconds, self.ended or 0.0)
        if self._best is None or row.value < self._best[0]:
            self._best = (row.value, row.i, row.stderr)
        self._last = (row.i, row.value, row.stderr, self._best[0], self._best[2])
        if row.i % self._stride == 0:
            self._keep(self._last)

    def take_end(self, result: Mapping[str, Any]) -> None:
        self.state = "finished"
        self._result = _number(result.get("fun"))
        nit, message = result.get("nit"), result.get("message")
        self._iterations = nit if isinstance(nit, int) else None
        self._message = message if isinstance(message, str) else None

    def _keep(self, members: tuple[int, float, float, float, float]) -> None:
        for kept, number in zip(self._kept, members, strict=True):
            kept.append(number)
        if self._most is not None and len(self._kept[0]) > max(2, self._most - 1):  # the last one is kept apart
            self._stride *= 2
            for kept in self._kept:
                kept[:] = kept[::2]

    def history(self, line: int, beside: Mapping[str, float]) -> LoopHistory:
        last, best = self._last, self._best
        points = [Point(*members) for members in zip(*self._kept, strict=True)]
        if last is not None and points[-1].row != last[0]:
            points.append(Point(*last))
        return LoopHistory(
            line=line, at=self.at, group=self.group, function=self.function, method=self.method,
            gradient=self.gradient, state=self.state, rows=self.rows, evaluations=self.evaluations, shots=self.shots,
            limit=self._limit[0], bound=self._limit[1],
            best=None if best is None else best[0], best_row=None if best is None else best[1],
            best_stderr=None if best is None else best[2], last=None if last is None else last[1],
            last_stderr=None if last is None else last[2], result=self._result, iterations=self._iterations,
            message=self._message, began=self.began, ended=self.ended, seconds=self.seconds,
            reference=self._reference, numbers={**self._numbers, **beside}, curve=tuple(points), where=self.where,
        )  # fmt: skip


class _Spans:
    """The time line: spans of one device and kind are merged over longer and longer gaps when there are too many."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._gap = 0.0
        self._spans: list[list[Any]] = []
        self._open: dict[tuple[str, str, str], list[Any]] = {}
        """The last span of each device, kind and group."""

    def add(self, where: str, kind: str, group: str, began: float, seconds: float) -> None:
        key = (where, kind, group)
        last = self._open.get(key)
        if self._gap and last is not None and last[0] <= began <= last[1] + self._gap:
            last[1] = max(last[1], began + seconds)
            last[2] += seconds
            last[3] += 1
            return
        span = self._open[key] = [began, began + seconds, seconds, 1, key]
        self._spans.append(span)
        if self._most is not None and len(self._spans) > self._most:
            self._merge()

    def _merge(self) -> None:
        assert self._most is not None
        whole = max(s[1] for s in self._spans) - min(s[0] for s in self._spans)
        while True:
            merged: list[list[Any]] = []
            self._open = {}
            for span in sorted(self._spans, key=lambda s: float(s[0])):
                last = self._open.get(span[4])
                if last is not None and span[0] - last[1] <= self._gap:
                    last[1] = max(last[1], span[1])
                    last[2] += span[2]
                    last[3] += span[3]
                else:
                    merged.append(span)
                    self._open[span[4]] = span
            self._spans = merged
            if len(merged) <= self._most // 2 or self._gap >= whole:
                return
            self._gap = max(2 * self._gap, whole / self._most, 1e-3)

    def all(self) -> tuple[Span, ...]:
        return tuple(
            Span(where, kind, group, began, ended - began, busy, calls)
            for began, ended, busy, calls, (where, kind, group) in self._spans
        )


class _Programs:
    """What programs were predicted to take, beside what they took."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._circuits: dict[tuple[str, bool], _Circuit] = {}
        self._used: dict[tuple[str, bool, int | None], _Used] = {}

    def circuit(self, record: records.Circuit) -> None:
        if self._most is None or len(self._circuits) < _MOST_PROGRAMS:
            found = _Circuit(record.qubits, record.gates, record.paulis, dict(record.need or {}))
            self._circuits.setdefault((record.program, _of_gradient(record)), found)

    def row(self, record: records.Row, loop: _Loop) -> None:
        loop.program = record.program or loop.program
        self._add(loop.program, loop.gradient != "none", record.shots, record.seconds, 0, 1)

    def evaluation(self, record: records.Evaluation, rows: int) -> None:
        gradient = (record.program, False) not in self._circuits  # else it has a circuit without one, or both
        self._add(record.program, gradient, record.shots, record.seconds / max(1, rows), record.bytes, rows)

    def _add(self, program: str, gradient: bool, shots: int | None, seconds: float, size: int, rows: int) -> None:
        used = self._used.get((program, gradient, shots))
        if used is None:
            if self._most is not None and len(self._used) >= _MOST_PROGRAMS:
                return
            used = self._used[program, gradient, shots] = _Used()
        used.add(seconds, size, rows, self._most)

    def uses(self) -> tuple[ProgramUse, ...]:
        found = []
        for (program, gradient, shots), used in self._used.items():
            circuit = self._circuits.get((program, gradient))
            if circuit is None:
                continue
            need = circuit.need if circuit.need and circuit.need["shots"] == shots else {}
            found.append(ProgramUse(
                program, circuit.qubits, circuit.gates, circuit.paulis, gradient, shots, used.evaluations, used.rows,
                need.get("seconds"), used.median, need.get("bytes"), used.bytes or None,
            ))  # fmt: skip
        return tuple(found)


@dataclass(frozen=True)
class _Circuit:
    qubits: int
    gates: int
    paulis: int
    need: dict[str, Any]


@dataclass
class _Used:
    evaluations: int = 0
    rows: int = 0
    bytes: int = 0
    stride: int = 1
    seconds: array[float] = field(default_factory=lambda: array("d"))

    def add(self, seconds: float, size: int, rows: int, most: int | None) -> None:
        if self.evaluations % self.stride == 0:
            self.seconds.append(seconds)
            if most is not None and len(self.seconds) > most:
                self.seconds, self.stride = self.seconds[::2], 2 * self.stride
        self.evaluations += 1
        self.rows += rows
        self.bytes = max(self.bytes, size)

    @property
    def median(self) -> float:
        ordered = sorted(self.seconds)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _of_gradient(circuit: records.Circuit) -> bool:
    plan = circuit.plan.get("v", {}) if isinstance(circuit.plan, dict) else {}
    return str(plan.get("gradient", "none")) != "none"


def _above(at: str) -> Iterator[str]:
    while "/" in at:
        at = at.rpartition("/")[0]
        yield at


def _last_name(at: str) -> str:
    return Location(at).name


def _number(document: Any) -> float | None:
    """A finite real number, plain or NumPy's, as a float."""
    if isinstance(document, Mapping) and document.get("$") == "scalar":
        try:
            document = decode(Encoded(document)).item()
        except HybridqError:
            return None
    if isinstance(document, bool) or not isinstance(document, (int, float)):
        return None
    try:
        found = float(document)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _limited(header: records.Loop, settings: Mapping[str, Any]) -> Callable[[int], tuple[int | None, int | None]]:
    """`limit` and `bound` of a loop of so many parameters; what it gives holds no settings.

    A method that is code of the researcher's says nothing.
    """
    if not isinstance(settings.get("method"), (str, type(None))):
        return lambda parameters: (None, None)
    method, options, constraints = header.method, settings.get("options"), settings.get("constraints")
    limits = {key: _number(value) for key, value in options.items()} if isinstance(options, Mapping) else {}
    given: dict[str, Any] = {
        "gradient": header.gradient != "none" or isinstance(settings.get("jac"), Mapping), "options": limits,
        "jac": jac if isinstance(jac := settings.get("jac"), str) else None,
        "constrained": bool(constraints.get("v", True) if isinstance(constraints, Mapping) else constraints),
        "bounded": settings.get("bounds") is not None,
    }  # fmt: skip

    def limited(parameters: int) -> tuple[int | None, int | None]:
        found = pace(method, parameters, **given)
        return found.limit, found.bound

    return limited


def _arguments(document: Any) -> Iterator[tuple[str, float]]:
    """Numbers among a loop's own arguments, by their place."""
    members = document.get("v") if isinstance(document, Mapping) and document.get("$") == "tuple" else document
    for place, member in enumerate(members if isinstance(members, list) else [members]):
        number = _number(member)
        if number is not None and place < _MOST_NUMBERS:
            yield f"argument {place + 1}", number


def _reference(document: Any) -> Reference | None:
    """The reference of the problems in a loop's arguments, if they have one in common."""
    found = {json.dumps(problem, sort_keys=True): problem for problem in _problems(document, _DEPTH)}
    if len(found) != 1:
        return None
    fields = next(iter(found.values()))
    value = _number(fields["reference"])
    return None if value is None else Reference(value, fields["source"], fields["unit"], fields["name"])


def _problems(document: Any, depth: int) -> Iterator[dict[str, Any]]:
    if depth == 0:
        return
    if isinstance(document, Mapping):
        members = document.get("v")
        if document.get("t") == _PROBLEM and isinstance(members, Mapping):
            yield {"reference": members.get("reference"),
                   **{key: str(members.get(key, "")) for key in ("source", "unit", "name")}}  # fmt: skip
            return
        for member in document.values():
            yield from _problems(member, depth - 1)
    elif isinstance(document, list):
        for member in document:
            yield from _problems(member, depth - 1)


def _parameters(text: Any) -> tuple[str, ...]:
    """Names of the positional parameters of a step, from its recorded source; none where it is no plain function."""
    if not isinstance(text, str):
        return ()
    try:
        with parsing:
            tree = ast.parse(text.split("\n\n")[0].partition("=\n")[2])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return ()
    arguments = tree.body[0].args
    return tuple(argument.arg for argument in (*arguments.posonlyargs, *arguments.args))
