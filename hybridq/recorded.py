"""What journals answer: the records of a run by location, and those of other runs that may stand in for calls of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from hybridq import journal as records
from hybridq.errors import WorkflowError
from hybridq.journal import Document, Journal, load_value, read_records
from hybridq.values import decode, digest_bytes

__all__ = ["Earlier", "LoopRecord", "Recorded", "circuit_key", "differs", "index", "origin_of"]

Answer: TypeAlias = records.Step | records.Evaluation | records.Event
_A = TypeVar("_A", records.Step, records.Evaluation, records.Event)


@dataclass
class LoopRecord:
    """A loop's header with its line number, its rows in order, and its end if it has one."""

    line: int
    header: records.Loop
    rows: list[records.Row] = field(default_factory=list)
    end: records.LoopEnd | None = None
    counted: int = 0
    """Rows that are in the run's counts already."""


@dataclass
class Recorded:
    """A journal's records by location."""

    header: records.RunHeader | None = None
    answers: dict[str, Answer] = field(default_factory=dict)
    loops: dict[str, LoopRecord] = field(default_factory=dict)
    failures: dict[str, records.Failure] = field(default_factory=dict)
    survived: set[str] = field(default_factory=set)
    attempts: Counter[str] = field(default_factory=Counter)
    known: set[str] = field(default_factory=set)
    """Digests of code whose text is recorded, and `circuit_key` of programs."""
    circuits: dict[str, list[records.Circuit]] = field(default_factory=dict)
    """Of each program, one for each numeric plan."""
    environments: list[records.Opened] = field(default_factory=list)
    within: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Recorded evaluations and steps below each location."""


def index(entries: Sequence[tuple[int, records.Record]]) -> Recorded:
    """The records of `journal.read_records` by location."""
    found = Recorded()
    lines: dict[int, LoopRecord] = {}
    for number, record in entries:
        match record:
            case records.RunHeader():
                found.header = record
            case records.Opened():
                found.environments.append(record)
            case records.Code():
                found.known.add(record.code)
            case records.Circuit():
                found.known.add(circuit_key(record.program, record.plan))
                found.circuits.setdefault(record.program, []).append(record)
            case records.Step() | records.Evaluation() | records.Event():
                found.answers.setdefault(record.at, record)
                for above in _above(record.at):
                    found.within[above, record.kind] += 1
            case records.Loop():
                lines[number] = found.loops.setdefault(record.at, LoopRecord(number, record))
            case records.Row():
                rows = lines[record.loop].rows
                if record.i == len(rows):
                    rows.append(record)
            case records.LoopEnd():
                lines[record.loop].end = record
            case records.Failure():
                found.failures[record.at] = record
                found.attempts[record.at] = record.attempt + 1
            case records.Survived():
                found.survived.add(record.at)
            case records.End():
                pass
    return found


def circuit_key(program: str, plan: Document) -> str:
    """What a circuit is recorded once for: a program's digest, and its numeric plan."""
    return f"{program}/{json.dumps(plan)}"


def _above(at: str) -> Iterator[str]:
    while "/" in at:
        at = at.rpartition("/")[0]
        yield at


def differs(now: records.Opened, then: records.Opened) -> bool:
    """Whether two drivers had other versions or another type of processor, so that bits may differ."""
    return (now.python, now.processor, dict(now.versions)) != (then.python, then.processor, dict(then.versions))


def origin_of(directory: Path) -> dict[str, Any]:
    """What a forked run keeps of where it came from: the run, and SHA-256 and number of bytes of its journal then."""
    data = (directory / "journal.jsonl").read_bytes()
    return {"run": directory.name, "bytes": len(data), "sha256": digest_bytes(data)}


@dataclass(frozen=True)
class _Run:
    """Another run, as it was when this one was opened."""

    directory: Path
    recorded: Recorded


class Earlier:
    """Other runs, whose records may answer calls of a run that has no record of them yet.

    Of the run ``fork`` everything at an equal location answers an equal call: that is how a run branches off another
    one. Of the runs in ``reuse`` only exact evaluations, and loops of nothing else, answer, wherever they stood, and
    only if the environment is the same: nothing else is certain to come out the same again. What answers is copied into
    the run's own journal, so that it does not depend on the others afterwards.

    Raises `WorkflowError` if the run ``fork`` had another seed or workflow, and what `read_records` raises.
    """

    def __init__(self, header: records.RunHeader, opened: records.Opened, fork: Path | None, reuse: Sequence[Path]
                 ) -> None:  # fmt: skip
        self._fork: _Run | None = None
        if fork is not None:
            self._fork = _Run(fork, index(read_records(fork)))
            found = self._fork.recorded.header
            for what in ("workflow", "seed"):
                if getattr(found, what, None) != getattr(header, what):
                    raise WorkflowError(
                        f"the run {fork.name} cannot be forked: its {what} is "
                        f"{getattr(found, what, 'not recorded')}, that of this run {getattr(header, what)}. They must "
                        "be equal, since locations and random numbers follow from them."
                    )
        self.left_out: list[str] = []
        """Names of runs that were to be reused and were made in another environment."""
        self._evaluations: dict[tuple[str, str], list[tuple[_Run, records.Evaluation]]] = {}
        self._loops: dict[tuple[str, str, str, str], tuple[_Run, LoopRecord]] = {}
        for directory in reuse:
            run = _Run(directory, index(read_records(directory)))
            if any(differs(opened, then) for then in run.recorded.environments):
                self.left_out.append(directory.name)
            else:
                self._add(run)

    def _add(self, run: _Run) -> None:
        for answer in run.recorded.answers.values():
            if isinstance(answer, records.Evaluation) and answer.shots is None:  # samples are seeded by their place
                self._evaluations.setdefault((answer.program, _key(answer.theta)), []).append((run, answer))
        for entry in run.recorded.loops.values():
            exact = all(row.where and row.shots is None and row.stderr == 0.0 for row in entry.rows)
            if entry.end is not None and entry.rows and exact and entry.header.gradient != "spsa":
                self._loops.setdefault(_loop_key(entry.header), (run, entry))

    def step(self, at: str, code: str, arguments: str, journal: Journal, known: Callable[[], None]
             ) -> records.Step | None:  # fmt: skip
        """The record of an equal call of a step, copied; ``known`` records its code, which comes before."""
        found = self._at(at, records.Step)
        if found is None or (found.code, found.arguments) != (code, arguments):
            return None
        known()
        return self._copied(found, journal, ("inputs", "output"))

    def event(self, at: str, fits: Callable[[Any], bool], journal: Journal) -> records.Event | None:
        """The record of an event, copied, if its value ``fits``."""
        found = self._at(at, records.Event)
        if found is None or self._fork is None or not fits(decode(load_value(self._fork.directory, found.output))):
            return None
        return self._copied(found, journal, ("output",))

    def evaluation(self, at: str, program: str, plan: Document, shots: int | None, theta: Document, journal: Journal,
                   known: Callable[[], None]) -> records.Evaluation | None:  # fmt: skip
        """The record of an equal evaluation, copied; ``known`` records its circuit, which comes before.

        ``theta`` and ``plan`` are as in records.
        """
        found = self._at(at, records.Evaluation)
        if found is not None and (found.program, found.shots, _key(found.theta)) == (program, shots, _key(theta)):
            known()
            return self._copied(found, journal, ("theta", "output"))
        gradient = str(plan.get("v", {}).get("gradient", "none"))
        if shots is not None or gradient == "spsa":
            return None
        for run, exact in self._evaluations.get((program, _key(theta)), ()):
            planned = any(circuit.plan == plan for circuit in run.recorded.circuits.get(program, ()))
            if planned and _is_gradient(run, exact) == (gradient != "none"):
                known()
                return _copy(run, replace(exact, at=at), journal, ("theta", "output"))
        return None

    def loop(self, header: records.Loop, known: set[str], journal: Journal) -> LoopRecord | None:
        """The header, rows and end of an equal loop of a quantum function, copied.

        ``known`` are `Recorded.known` of the run that asks.
        """
        run, entry = self._fork, None
        if run is not None:
            entry = run.recorded.loops.get(header.at)
            if entry is not None and _loop_key(entry.header) != _loop_key(header):
                entry = None
        if entry is None:
            run, entry = self._loops.get(_loop_key(header), (None, None))
        if run is None or entry is None:
            return None
        for program in dict.fromkeys(row.program for row in entry.rows if row.program):
            for circuit in run.recorded.circuits.get(program, ()):
                if (name := circuit_key(program, circuit.plan)) not in known:
                    known.add(name)
                    _copy(run, circuit, journal, ("circuit", "observables", "backend"))
        line = journal.append(header)
        rows = [replace(row, loop=line, where=_where(run)) for row in entry.rows]
        if rows:
            journal.append_all(rows)
        end = None if entry.end is None else _copy(run, replace(entry.end, loop=line), journal, ("output",))
        return LoopRecord(line, header, rows, end)

    def _at(self, at: str, kind: type[_A]) -> _A | None:
        found = None if self._fork is None else self._fork.recorded.answers.get(at)
        return found if isinstance(found, kind) else None

    def _copied(self, record: _A, journal: Journal, documents: Sequence[str]) -> _A:
        assert self._fork is not None
        return _copy(self._fork, record, journal, documents)


_R = TypeVar("_R", records.Step, records.Evaluation, records.Event, records.Circuit, records.LoopEnd)


def _copy(run: _Run, record: _R, journal: Journal, documents: Sequence[str]) -> _R:
    """``record`` with its ``documents``, written into ``journal``; where it says where, it says of which run it is."""
    changed: dict[str, Any] = {
        name: journal.store(load_value(run.directory, getattr(record, name))) for name in documents
    }
    if hasattr(record, "where"):
        changed["where"] = _where(run)
    copied = replace(record, **changed)
    journal.append(copied)
    return copied


def _where(run: _Run) -> str:
    return f"run {run.directory.name}"


def _key(document: Document) -> str:
    return json.dumps(document, sort_keys=True)


def _loop_key(header: records.Loop) -> tuple[str, str, str, str]:
    return header.code, header.arguments, header.method, header.gradient


def _is_gradient(run: _Run, answer: records.Evaluation) -> bool:
    """Whether an evaluation's answer is derivatives, an array, and not values with their errors."""
    document = load_value(run.directory, answer.output).document
    return isinstance(document, Mapping) and document.get("$") in ("array", "npy")
