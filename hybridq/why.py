"""What a recorded value came from, and what decides whether it answers a call."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridq import journal as records
from hybridq.differences import readable, two_columns
from hybridq.errors import WorkflowError
from hybridq.journal import load_value, read_records, unpack_array
from hybridq.recorded import LoopRecord, Recorded, differs, index

__all__ = ["ARGUMENTS", "VALUE", "Origin", "Part", "Why", "origins", "why"]

_KINDS = {records.Step: "classical step", records.Evaluation: "quantum evaluation", records.Event: "event"}
_LEAST_TELLING = 8
"""Characters of a number from which on its being equal to a result says that it is that result."""


ARGUMENTS, VALUE = "(arguments)", "(value)"
"""Where in `Origin` a location would stand: the run's own arguments, and its value."""


@dataclass(frozen=True)
class Origin:
    """Where an argument of a call came from."""

    at: str
    """The call, or `VALUE`."""
    path: str
    """Where in its arguments; "" for all of them."""
    source: str
    """The call that gave it, or `ARGUMENTS`."""
    part: str
    """Which part of what that gave; "" for all of it."""


@dataclass(frozen=True)
class Part:
    """One part of what decides whether the record answers a call."""

    name: str
    value: str
    """A digest or a few words."""
    difference: str | None = None
    """How it differs from that of the run it is compared with, in two columns; "" where it is the same, None where
    nothing is compared."""


@dataclass(frozen=True)
class Why:
    """What a recorded value came from, and what decides whether it answers a call."""

    run: str
    at: str
    kind: str
    value: Any
    """As data; arrays as lists."""
    came: str
    """Where, when and by which driver it came about."""
    inputs: tuple[tuple[str, str], ...]
    """Where in the arguments the value of another call stands, and that call's location."""
    failures: tuple[str, ...]
    """What it raised before."""
    parts: tuple[Part, ...]
    against: str | None
    """The run it is compared with."""
    verdict: str


@dataclass(frozen=True)
class _Look:
    """A run as it is recorded."""

    directory: Path
    entries: list[tuple[int, records.Record]]
    recorded: Recorded

    @property
    def header(self) -> records.RunHeader:
        assert self.recorded.header is not None
        return self.recorded.header

    def document(self, document: Any) -> Any:
        """A record's document, whole and readable."""
        return readable(load_value(self.directory, document).document)

    def code(self, digest: str) -> str:
        """The source behind a digest."""
        for _, record in self.entries:
            if isinstance(record, records.Code) and record.code == digest:
                return str(self.document(record.text))
        return f"(code {digest})"


def why(directory: Path, at: str, against: Path | None = None) -> Why:
    """What the value at the location ``at`` of a run came from.

    Compared with the run ``against`` (default: the one that this one was forked from, if it is still there), part by
    part. Raises `WorkflowError` for a location that has no record, naming some that have, and what `read_records` does.
    """
    run = _look(directory)
    forked = run.header.forked
    if against is None and forked is not None and (directory.parent / forked["run"] / "journal.jsonl").exists():
        against = directory.parent / forked["run"]
    other = None if against is None else _look(against)
    found = _find(run, at)
    if found is None:
        raise WorkflowError(f"the run {directory.name} has no record of {at!r}; {_near(run, at)}")
    parts = _parts(run, at, found)
    theirs = None if other is None else _find(other, at)
    compared = {} if other is None or theirs is None else _parts(other, at, theirs)
    listed = []
    for name, (shown, text) in parts.items():
        difference = None
        if name in compared:
            heads = (f"run {other.directory.name}"[:56] if other else "", f"run {directory.name}"[:56])
            difference = "" if compared[name][1] == text else two_columns(compared[name][1], text, heads=heads)
        listed.append(Part(name, shown, difference))
    return Why(
        directory.name, at, _kind(found), _value(run, found), _came(run, at, found), tuple(_inputs(run, at, found)),
        tuple(_failures(run, at)), tuple(listed), None if other is None else other.directory.name,
        _verdict(run, found, other, theirs, listed),
    )  # fmt: skip


def _look(directory: Path) -> _Look:
    entries = read_records(directory)
    if not entries:
        raise WorkflowError(f"{directory} holds no record yet.")
    return _Look(directory, entries, index(entries))


_Found = records.Step | records.Evaluation | records.Event | LoopRecord | tuple[LoopRecord, records.Row]


def _find(run: _Look, at: str) -> _Found | None:
    recorded = run.recorded
    if at in recorded.answers:
        return recorded.answers[at]
    if at in recorded.loops:
        return recorded.loops[at]
    loop = recorded.loops.get(at.rpartition("/")[0])
    number = re.fullmatch(r"(.*)\[(\d+)\]", at.rpartition("/")[2])
    if loop is None or number is None or number[1] != loop.header.function or int(number[2]) >= len(loop.rows):
        return None
    return loop, loop.rows[int(number[2])]


def _near(run: _Look, at: str) -> str:
    recorded = run.recorded
    if at in recorded.failures:
        failure = recorded.failures[at]
        return f"it raised {failure.type.partition(':')[2]}: {failure.message}"
    known = [*recorded.answers, *recorded.loops]
    above = at
    while "/" in above:
        above = above.rpartition("/")[0]
        inside = [one for one in known if one.startswith(f"{above}/")]
        if inside:
            return f"below {above} it has {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}."
    return f"it has {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}."


def _kind(found: _Found) -> str:
    if isinstance(found, LoopRecord):
        return "loop"
    return "evaluation of a loop" if isinstance(found, tuple) else _KINDS[type(found)]


def _value(run: _Look, found: _Found) -> Any:
    if isinstance(found, tuple):
        return found[1].value
    if isinstance(found, LoopRecord):
        return None if found.end is None else run.document(found.end.output)
    return run.document(found.output)


def _parts(run: _Look, at: str, found: _Found) -> dict[str, tuple[str, Any]]:
    """What decides whether the record answers a call: by name, a few words and all of it."""
    header = run.header
    parts: dict[str, tuple[str, Any]] = {"workflow": (header.workflow, header.workflow)}
    parts["seed"] = (str(header.seed), header.seed)
    if isinstance(found, tuple):
        loop, row = found
        return (
            parts | _of_loop(run, loop) | {"point": (f"{len(unpack_array(row.x))} numbers", list(unpack_array(row.x)))}
        )
    if isinstance(found, LoopRecord):
        return parts | _of_loop(run, found)
    if isinstance(found, records.Step):
        parts["code"] = (found.code[:12], run.code(found.code))
        parts["arguments"] = (found.arguments[:12], run.document(found.inputs))
    elif isinstance(found, records.Evaluation):
        circuits = run.recorded.circuits.get(found.program, [])
        words = [f"{c.qubits} qubits, {c.gates} gates, {c.paulis} Paulis" for c in circuits[:1]]
        parts["program"] = (", ".join([found.program[:12], *words]), {"program": found.program, "of": words})
        parts["shots"] = ("exact" if found.shots is None else str(found.shots), found.shots)
        parts["parameters"] = ("", run.document(found.theta))
    return parts


def _of_loop(run: _Look, loop: LoopRecord) -> dict[str, tuple[str, Any]]:
    header = loop.header
    return {
        "code": (header.code[:12], run.code(header.code)),
        "method": (f"{header.method}, gradient {header.gradient}", [header.method, header.gradient]),
        "settings": (header.arguments[:12], run.document(header.inputs)),
    }


def _came(run: _Look, at: str, found: _Found) -> str:
    record = found[1] if isinstance(found, tuple) else found.header if isinstance(found, LoopRecord) else found
    line = next(number for number, one in run.entries if one is record)
    drivers = [(number, one) for number, one in run.entries if isinstance(one, records.Opened)]
    before = [one for number, one in drivers if number < line]
    words = [f"line {line} of the journal"]
    if isinstance(record, (records.Step, records.Evaluation)):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.started))
        words.append(f"{record.seconds:.3g} s on {record.where} from {when}, attempt {record.attempt}")
    elif isinstance(record, records.Row) and record.where:
        words.append(f"{record.seconds:.3g} s on {record.where}")
    if before:
        versions = ", ".join(f"{name} {version}" for name, version in before[-1].versions.items())
        words.append(f"by driver {len(before)} of {len(drivers)}, process {before[-1].pid}@{before[-1].host}: "
                     f"Python {before[-1].python}, {versions}")  # fmt: skip
    return "; ".join(words)


def _failures(run: _Look, at: str) -> Iterator[str]:
    for number, record in run.entries:
        if isinstance(record, records.Failure) and record.at == at:
            went_on = ", and the workflow went on" if at in run.recorded.survived else ""
            kind = record.type.partition(":")[2]
            yield f"line {number}: {kind}: {record.message} (attempt {record.attempt}, {record.where}{went_on})"


def _inputs(run: _Look, at: str, found: _Found) -> Iterator[tuple[str, str]]:
    """Where in a call's arguments values of calls before it stand."""
    if isinstance(found, tuple):
        return
    inputs = (
        found.header.inputs if isinstance(found, LoopRecord) else found.theta if isinstance(found, records.Evaluation)
        else found.inputs if isinstance(found, records.Step) else None
    )  # fmt: skip
    if inputs is None:
        return
    for origin in _traced(at, load_value(run.directory, inputs).document, _made(_outputs(run))):
        yield origin.path or "all", f"{origin.source}, its {origin.part}" if origin.part else origin.source


def origins(directory: Path) -> Iterator[Origin]:
    """Where the arguments of all calls of a run, and its value, came from, as far as values tell it.

    A value tells it if it hardly comes about twice: a number of few digits does not. Raises what `read_records` does,
    and `WorkflowError` for a run without a record.
    """
    run = _look(directory)
    header = load_value(directory, run.header.inputs).document
    made = _made([*_outputs(run), (ARGUMENTS, header)])
    calls = [(at, answer.theta if isinstance(answer, records.Evaluation) else answer.inputs)
             for at, answer in run.recorded.answers.items() if not isinstance(answer, records.Event)]  # fmt: skip
    calls += [(at, loop.header.inputs) for at, loop in run.recorded.loops.items()]
    for at, inputs in calls:
        yield from _traced(at, load_value(directory, inputs).document, made)
    ends = [record for _, record in run.entries if isinstance(record, records.End)]
    if ends and ends[-1].output is not None:
        yield from _traced(VALUE, load_value(directory, ends[-1].output).document, made)


def _made(outputs: Iterable[tuple[str, Any]]) -> dict[str, tuple[str, str]]:
    """Which call gave what, and which part of its value that is, by text."""
    made: dict[str, tuple[str, str]] = {}
    for place, document in outputs:
        for part, text in _telling(document, ""):
            made.setdefault(text, (place, part))
    return made


def _traced(at: str, document: Any, made: Mapping[str, tuple[str, str]]) -> Iterator[Origin]:
    seen: set[str] = set()
    for path, text in _telling(document, ""):
        source, part = made.get(text, (at, ""))
        if source != at and path not in seen:
            seen.add(path)
            yield Origin(at, path, source, part)


def _outputs(run: _Look) -> Iterator[tuple[str, Any]]:
    for place, answer in run.recorded.answers.items():
        if not isinstance(answer, records.Event):
            yield place, load_value(run.directory, answer.output).document
    for place, loop in run.recorded.loops.items():
        if loop.end is not None:
            yield place, load_value(run.directory, loop.end.output).document


def _telling(document: Any, path: str) -> Iterator[tuple[str, str]]:
    """Parts of a document that hardly come about twice, as (path, text): the largest first."""
    if isinstance(document, bool) or document is None:
        return
    text = json.dumps(document, sort_keys=True)
    if len(text) >= _LEAST_TELLING and not isinstance(document, str):
        yield path, text
    if isinstance(document, Mapping) and "$" not in document:
        for key, member in document.items():
            yield from _telling(member, f"{path}.{key}" if path else str(key))
    elif isinstance(document, Mapping) and isinstance(document.get("v"), Mapping):
        for key, member in document["v"].items():
            yield from _telling(member, f"{path}.{key}" if path else str(key))
    elif isinstance(document, Mapping) and document.get("$") == "tuple":
        yield from _telling(document["v"], path)
    elif isinstance(document, list):
        for number, member in enumerate(document):
            yield from _telling(member, f"{path}[{number}]")


def _verdict(run: _Look, found: _Found, other: _Look | None, theirs: _Found | None, parts: list[Part]) -> str:
    if other is None:
        return "It answers the call at this location as long as all of these are the same."
    name = other.directory.name
    if theirs is None:
        return f"The run {name} has no record at this location, so it cannot answer here."
    if type(theirs) is not type(found):
        return f"In the run {name} another kind of call stands here, a {_kind(theirs)}, so it cannot answer."
    changed = [part.name for part in parts if part.difference]
    if changed:
        return f"The run {name} does not answer here: {', '.join(changed)} changed."
    mine, its = (one.recorded.environments for one in (run, other))
    if mine and its and differs(mine[-1], its[-1]):
        return f"The run {name} answers here; its versions or processor are others, so the bits may be, too."
    return f"The run {name} answers here: all of these are the same."
