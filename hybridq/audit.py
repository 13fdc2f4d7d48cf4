"""What a run directory proves of itself: every line, reference and value is looked at, and all damage told.

`read_records` stops at the first damaged line, because nothing may run on it. Here the whole is wanted: after a broken
line the chain goes on from the digest that the line states, so that one changed byte is one finding. Nothing is
written, no circuit is loaded, and no class of the researcher's is made or imported.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import re
import stat
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridq import journal as records
from hybridq.errors import Corrupt, JournalError
from hybridq.journal import FORMAT, GENESIS, HEAD, link
from hybridq.values import QPY_FLOOR, Encoded, decode

__all__ = ["Environment", "Finding", "Verified", "verify"]

_JOURNAL, _VALUES, _OWNER = "journal.jsonl", "values", "owner"
_DIGEST = re.compile(rb"[0-9a-f]{64}")
_HEAD_BYTES = 76
_STATED = re.compile(rb'"chain":"([0-9a-f]{64})"')
_MOST_LINKS = 8
_VALUE = re.compile(r"([0-9a-f]{64})\.(json|npy|qpy)")
_PART = re.compile(r"\..+\.part")


@dataclass(frozen=True)
class Finding:
    """Something found in a run directory: damage, or a note that nothing is wrong with."""

    file: str
    """Relative to the run directory; "." is the directory itself."""
    line: int | None
    """Of the journal, from 1; None for a file that has none."""
    text: str
    damage: bool = True

    def __str__(self) -> str:
        return f"{self.file}{'' if self.line is None else f', line {self.line}'}: {self.text}"


@dataclass(frozen=True)
class Environment:
    """Where drivers that had the run open ran."""

    python: str
    processor: str
    versions: Mapping[str, str]
    sessions: int
    """How many drivers ran there."""


@dataclass(frozen=True)
class Verified:
    """What `verify` looked at, and what it found."""

    directory: Path
    name: str | None
    """As the header says; None without one, as for ``workflow``."""
    workflow: str | None
    status: str
    """How the last driver left the run, or ``unfinished``."""
    last: str
    """The last line's digest: who kept it elsewhere can tell this record from any other. Empty without a line."""
    counts: Mapping[str, int]
    """``lines``, ``sessions``, ``steps``, ``evaluations`` (those of loops included), ``loops``, ``rows``, ``failures``,
    ``events``; ``values`` that were read, and their ``bytes``."""
    environments: tuple[Environment, ...]
    findings: tuple[Finding, ...]

    @property
    def damage(self) -> tuple[Finding, ...]:
        """What should not be."""
        return tuple(f for f in self.findings if f.damage)

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What is worth knowing, and no damage."""
        return tuple(f for f in self.findings if not f.damage)


def verify(directory: Path) -> Verified:
    """Look at everything in a run directory.

    Raises `JournalError` if there is no run in it.
    """
    path = directory / _JOURNAL
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise JournalError(f"there is no run in {directory}; `hybridq runs --store DIR` lists the runs.") from None
    except OSError as error:
        raise JournalError(f"{path} cannot be read ({error.strerror}); make it readable, then verify again.") from error
    values = _Values(directory / _VALUES)
    journal = _Journal(values)
    journal.read(data)
    findings = [*_around(directory), *journal.findings, *values.findings()]
    counts = {"lines": journal.lines, **{key: journal.counts[key] for key in _COUNTED}}
    return Verified(
        directory, journal.name, journal.workflow, journal.status, journal.last, counts | values.counts,
        tuple(Environment(python, processor, dict(versions), sessions)
              for (python, processor, versions), sessions in journal.environments.items()),
        tuple(findings),
    )  # fmt: skip


_COUNTED = ("sessions", "steps", "evaluations", "loops", "rows", "failures", "events")


def _around(directory: Path) -> Iterator[Finding]:
    """What is wrong around journal and values: links, foreign files, directories that others may enter."""
    for entry in sorted(directory.iterdir()):
        name = entry.name
        if name not in (_JOURNAL, _VALUES, _OWNER):
            what = "a link" if entry.is_symlink() else "a directory" if entry.is_dir() else "a file"
            yield Finding(name, None, f"{what} that is no part of a run", damage=False)
        elif entry.is_symlink():
            yield Finding(name, None, "is a symbolic link, which hybridq never makes; put back what it stands for")
        elif name == _OWNER and entry.stat().st_size:
            text = "a driver has the run open, or was killed; the next run finds out which"
            yield Finding(name, None, text, damage=False)
    for place, name in ((directory, "."), (directory / _VALUES, _VALUES)):
        mode = stat.S_IMODE(place.stat().st_mode) if place.exists() else 0o700
        if mode != 0o700:
            yield Finding(name, None, f"has mode {mode:04o}; hybridq makes it 0700, its owner's alone", damage=False)


# -- the journal -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    number: int
    rest: bytes
    """From the first member after the digest on."""
    digest: str
    intact: bool


def _chained(lines: list[bytes]) -> Iterator[_Line]:
    """Each line, and whether its digest is that of the line before followed by its own bytes.

    After a broken one the chain goes on from any digest that it states, or that it ought to have stated; so a line of
    which one byte was changed, its end included, is broken alone.
    """
    before, doubtful = [GENESIS], list[str]()
    for number, text in enumerate(lines, start=1):
        rest = text[_HEAD_BYTES:]
        links = [link(chain, rest) for chain in before[:_MOST_LINKS]]
        head = HEAD.match(text)
        stated = head[1].decode() if head else ""
        if stated in links:
            before, doubtful = [stated], []
            yield _Line(number, rest, stated, True)
            continue
        named = [*_STATED.findall(text)[-2:], *_DIGEST.findall(text[:_HEAD_BYTES])]
        own = [*links[:1], *(digest.decode() for digest in named)]
        before, doubtful = [*own, *doubtful], own
        yield _Line(number, rest, stated, False)


_KINDS: dict[str, type[Any]] = {kind.kind: kind for kind in typing.get_args(records.Record)}
_HINTS = {kind: typing.get_type_hints(kind) for kind in _KINDS.values()}
_DOCUMENTS = {
    kind: [f.name for f in dataclasses.fields(kind) if f.type == "Document"] for kind in _KINDS.values()
}  # fmt: skip


def _parse(rest: bytes) -> Any:
    """The record of a line. Raises `ValueError` with what is wrong with it."""
    try:
        members = json.loads(b"{" + rest, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not a record ({error})") from error
    name = members.pop("k", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"a record of the kind {name!r}, which this version of hybridq does not know")
    hints = _HINTS[kind]
    for member in members.keys() - hints.keys():
        raise ValueError(f"a {name!r} record with the member {member!r}, which this version of hybridq does not know")
    for member in dataclasses.fields(kind):
        if member.name in members:
            if not _fits(members[member.name], hints[member.name]):
                raise ValueError(f"the member {member.name!r} of a {name!r} record is {members[member.name]!r:.60}")
        elif member.default is dataclasses.MISSING:
            raise ValueError(f"a {name!r} record without the member {member.name!r}")
    return kind(**members)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a member is of its type; documents may be anything."""
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, str, type(None)):
        return type(value) is hint
    parts = typing.get_args(hint)
    match typing.get_origin(hint):
        case origin if origin is list:
            return type(value) is list and all(_fits(v, parts[0]) for v in value)
        case origin if origin is Mapping:
            return type(value) is dict and all(_fits(v, parts[1]) for v in value.values())
    return any(_fits(value, part) for part in parts)


@dataclass
class _Loop:
    at: str
    rows: int = 0
    ended: int | None = None


class _Journal:
    """One pass over the lines of a journal: what they are, and whether they fit together."""

    def __init__(self, values: _Values) -> None:
        self.findings: list[Finding] = []
        self.lines = 0
        self.counts: Counter[str] = Counter()
        self.environments: Counter[tuple[Any, ...]] = Counter()
        self.name: str | None = None
        self.workflow: str | None = None
        self.status, self.last = "unfinished", ""
        self._values = values
        self._broken = False
        """Whether a line before is broken."""
        self._readable = True
        """Whether the format is one that this version knows."""
        self._answered: dict[str, int] = {}
        self._loops: dict[int, _Loop] = {}
        self._failed: set[str] = set()
        self._known: set[str] = set()
        """Digests of code and of programs."""

    def read(self, data: bytes) -> None:
        """Look at the whole file."""
        lines = data.split(b"\n")
        tail = lines.pop()
        before = GENESIS
        for line in _chained(lines):
            self.lines, before = line.number, line.digest
            if not line.intact:
                self._damaged(line.number, "its checksum does not match: it was changed, or a line before it is gone")
                self._broken = True
            self._take(line)
        self.last = before if lines else ""
        if tail:
            head = HEAD.match(tail)
            number, whole = len(lines) + 1, tail[_HEAD_BYTES:-1]
            if head is not None and head[1].decode() == link(before, whole):
                self._damaged(number, "a whole record, of which the end of the line was changed")
            else:
                self._note(number, f"{len(tail)} bytes of a record that a kill cut short; the next run drops it")
        elif not lines:
            self._note(1, "the run holds no record yet")

    def _damaged(self, line: int, text: str) -> None:
        self.findings.append(Finding(_JOURNAL, line, text))

    def _note(self, line: int, text: str) -> None:
        self.findings.append(Finding(_JOURNAL, line, text, damage=False))

    def _take(self, line: _Line) -> None:
        try:
            record = _parse(line.rest) if self._readable else None
        except ValueError as error:
            text = str(error)
            if line.number == 1 and (other := _other_format(line.rest)) is not None:
                self._readable = False
                text = f"{_of_format(other)}; only its chain and the bytes of its values were checked"
            if line.intact:
                self._damaged(line.number, text)
            return
        if record is None:
            return
        found = [*self._header(line.number, record), *self._structure(line.number, record)]
        if not line.intact:  # its content may have been changed: it counts as being there, and as nothing else
            if self._answered.get(at := getattr(record, "at", "")) == line.number:
                del self._answered[at]
            return
        for text in found:
            self._damaged(line.number, text)
        for member in _DOCUMENTS[type(record)]:
            for text in self._values.check(getattr(record, member), line.number):
                self._damaged(line.number, f"its {member} cannot be read: {text}")

    def _header(self, number: int, record: Any) -> Iterator[str]:
        match record:
            case records.RunHeader() if number == 1:
                self.name, self.workflow = record.name, record.workflow
                if record.format != FORMAT:
                    yield _of_format(record.format)
            case records.RunHeader():
                yield "a second header of a run"
            case _ if number == 1:
                yield "the run's header is missing"
            case records.Opened():
                self.counts["sessions"] += 1
                versions = tuple(sorted(record.versions.items()))
                self.environments[record.python, record.processor, versions] += 1
                self.status = "unfinished"
            case records.End():
                self.status = record.status

    def _structure(self, number: int, record: Any) -> Iterator[str]:
        """What does not fit to the lines before."""
        match record:
            case records.Code():
                self._known.add(record.code)
            case records.Circuit():
                self._known.add(record.program)
            case records.Step():
                self.counts["steps"] += 1
                yield from self._answer(number, record.at)
                yield from self._refers(record.code, "the step's code")
            case records.Evaluation():
                self.counts["evaluations"] += 1
                yield from self._answer(number, record.at)
                yield from self._refers(record.program, "the program")
            case records.Event():
                self.counts["events"] += 1
                yield from self._answer(number, record.at)
            case records.Loop():
                self.counts["loops"] += 1
                self._loops[number] = _Loop(record.at)
                yield from self._answer(number, record.at)
                yield from self._refers(record.code, "the objective's code")
            case records.Row():
                self.counts["rows"] += 1
                self.counts["evaluations"] += record.where != ""
                yield from self._row(record)
            case records.LoopEnd():
                loop = self._loops.get(record.loop)
                if loop is None:
                    yield from self._astray(f"it ends a loop of line {record.loop}, where none begins")
                elif loop.ended is not None:
                    yield from self._astray(f"it ends {loop.at} again, which line {loop.ended} ended")
                else:
                    loop.ended = number
            case records.Failure():
                self.counts["failures"] += 1
                self._failed.add(record.at)
            case records.Survived():
                if record.at not in self._failed:
                    yield from self._astray(
                        f"the workflow went on after a failure of {record.at}, and none is recorded"
                    )

    def _row(self, row: records.Row) -> Iterator[str]:
        loop = self._loops.get(row.loop)
        if loop is None:
            yield from self._astray(f"a row of a loop of line {row.loop}, where none begins")
        else:
            if row.i < loop.rows:
                yield from self._astray(f"row {row.i} of {loop.at} stands in a line before already")
            elif row.i > loop.rows:
                yield from self._astray(
                    f"row {row.i} of {loop.at} follows row {loop.rows - 1}: rows between are missing"
                )
            loop.rows = max(loop.rows, row.i + 1)
        if row.program:
            yield from self._refers(row.program, "the program")
        sizes = [_packed(vector) for vector in (row.x, row.g) if vector is not None]
        if None in sizes or len(set(sizes)) > 1:
            yield "its point or gradient is no vector, or the two differ in length"

    def _answer(self, number: int, at: str) -> Iterator[str]:
        first = self._answered.setdefault(at, number)
        if first != number:
            yield f"{at} was answered in line {first} already"

    def _refers(self, digest: str, what: str) -> Iterator[str]:
        if digest not in self._known:
            yield from self._astray(f"{what} {digest} is in no line before")

    def _astray(self, text: str) -> Iterator[str]:
        """What may follow from a broken line before alone: one that is gone, or others that moved."""
        if not self._broken:
            yield text


def _of_format(found: Any) -> str:
    return f"the run has format {found}, and this hybridq reads format {FORMAT}: use the version that wrote it"


def _other_format(rest: bytes) -> Any:
    """The format that a header of another version states; None if it states none, or this one."""
    try:
        found = json.loads(b"{" + rest).get("format")
    except (ValueError, RecursionError):
        return None
    return None if found == FORMAT else found


def _packed(text: str) -> int | None:
    """Numbers in a packed vector; None if it is none."""
    try:
        size, odd = divmod(len(base64.b64decode(text, validate=True)), 8)
    except (binascii.Error, ValueError):
        return None
    return None if odd else size


# -- values ------------------------------------------------------------------------------------------------------


@dataclass
class _Values:
    """The files of ``values/``, each read once for its digest, and what refers to them."""

    directory: Path
    _intact: set[str] = field(default_factory=set)
    _damaged: dict[str, str] = field(default_factory=dict)
    _others: list[Finding] = field(default_factory=list)
    _lines: dict[str, int] = field(default_factory=dict)
    """The first line that refers to a file, by its name."""
    _bytes: int = 0
    _looked: dict[str, str | None] = field(default_factory=dict)
    """What is wrong inside of a file whose bytes are right, by its name."""

    def __post_init__(self) -> None:
        if self.directory.is_symlink() or not self.directory.is_dir():
            return
        for path in sorted(self.directory.iterdir()):
            match = _VALUE.fullmatch(path.name)
            if match is None or not (path.is_symlink() or path.is_file()):
                text = "a value that a kill cut short; the next run removes it" if _PART.fullmatch(path.name) else (
                    "no value of a run")  # fmt: skip
                self._others.append(Finding(f"{_VALUES}/{path.name}", None, text, damage=False))
            elif path.is_symlink():
                self._damaged[path.name] = "is a symbolic link, which hybridq never makes"
            else:
                self._read(path, match[1])

    def _read(self, path: Path, digest: str) -> None:
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                self._bytes += file.tell()
        except OSError as error:
            self._damaged[path.name] = f"cannot be read ({error.strerror})"
            return
        if found == digest:
            self._intact.add(path.name)
        else:
            self._damaged[path.name] = "its bytes do not match the checksum in its name"

    @property
    def counts(self) -> dict[str, int]:
        """Files, and their bytes."""
        return {"values": len(self._intact) + len(self._damaged), "bytes": self._bytes}

    def check(self, document: Any, line: int) -> Iterator[str]:
        """What is wrong with a document beyond the bytes of its files, which `findings` tells of."""
        try:
            if isinstance(document, dict) and document.get("$") == "file":
                yield from self._file(document.get("f"), line)
                return
            bare = _Bare(self, line)
            stripped = bare.walk(document)
            yield from bare.wrong
            decode(Encoded(stripped))
        except (Corrupt, KeyError, TypeError, ValueError, RecursionError) as error:
            yield f"{error if isinstance(error, Corrupt) else f'{type(error).__name__}: {error}'}"

    def refer(self, name: Any, line: int, suffixes: tuple[str, ...]) -> str | None:
        """Note that ``line`` refers to a file; what is wrong with its name, if anything is."""
        if not isinstance(name, str) or not _VALUE.fullmatch(name) or not name.endswith(suffixes):
            return f"{name!r:.90} is not the name of a stored value"
        self._lines.setdefault(name, line)
        return None

    def _file(self, name: Any, line: int) -> Iterator[str]:
        """A document that is kept in a file of its own."""
        wrong = self.refer(name, line, (".json",))
        if wrong is not None:
            yield wrong
        elif name in self._intact and name not in self._looked:
            self._looked[name] = None
            for text in self.check(json.loads((self.directory / name).read_bytes()), line):
                yield f"{_VALUES}/{name}: {text}"

    def inside(self, name: str) -> str | None:
        """What is wrong inside of an array's or circuit's file whose bytes are those of its name."""
        if name not in self._looked:
            self._looked[name] = self._look(name) if name in self._intact else None
        return self._looked[name]

    def _look(self, name: str) -> str | None:
        path = self.directory / name
        if name.endswith(".qpy"):
            with open(path, "rb") as file:
                start = file.read(7)
            good = start[:6] == b"QISKIT" and len(start) == 7 and start[6] >= QPY_FLOOR
            return None if good else f"{_VALUES}/{name} is not a QPY file of version {QPY_FLOOR} or later"
        try:
            decode(Encoded({"$": "npy", "f": name}, {name: path.read_bytes()}))
        except Corrupt as error:
            return f"{_VALUES}/{name}: {error}"
        return None

    def findings(self) -> list[Finding]:
        """What is wrong with the files, one finding each, and those that nothing refers to."""
        found = []
        for name, line in self._lines.items():
            if name not in self._intact and name not in self._damaged:
                text = f"is missing; {_JOURNAL}, line {line}, refers to it"
                found.append(Finding(f"{_VALUES}/{name}", None, text))
        for name, text in self._damaged.items():
            first = self._lines.get(name)
            by = f"{_JOURNAL}, line {first}, refers to it" if first else "nothing that could be read refers to it"
            found.append(Finding(f"{_VALUES}/{name}", None, f"{text}; {by}"))
        for name in sorted(self._intact - self._lines.keys()):
            text = "nothing refers to it: what it was kept for was not recorded, or that line is broken"
            found.append(Finding(f"{_VALUES}/{name}", None, text, damage=False))
        return [*found, *self._others]


_MEMBERS = ("tuple", "set", "frozenset", "dict", "dataclass", "OptimizeResult", "scalar")


class _Bare:
    """A document without its files and classes: what is left is what reading it has to make sense of."""

    def __init__(self, values: _Values, line: int) -> None:
        self.wrong: list[str] = []
        self._values, self._line = values, line

    def walk(self, document: Any) -> Any:
        """``document`` with lists for containers, members for classes, and nothing for files and names."""
        if isinstance(document, list):
            return [self.walk(v) for v in document]
        if not isinstance(document, dict):
            return document
        tag = document.get("$")
        if tag in ("npy", "qpy"):
            name = document["f"]
            wrong = self._values.refer(name, self._line, (f".{tag}",)) or self._values.inside(name)
            self.wrong += [] if wrong is None else [wrong]
            return None
        if tag == "SparsePauliOp":  # its numbers may be in a file
            labels, width = document["labels"], document["n"]
            if not all(type(p) is str and len(p) == width and set(p) <= set("IXYZ") for p in labels):
                raise Corrupt("an observable's labels are no Paulis of its qubits")
            return self.walk(document["coeffs"])
        if tag in ("BitArray", "LbfgsInvHessProduct"):
            return self.walk(document["v"])
        if tag in _MEMBERS:
            return self.walk(document["v"])
        return None if tag == "enum" else {key: self.walk(v) for key, v in document.items()}
