"""The run directory: records and values on disk, and the only code that writes them.

::

    NAME/
      journal.jsonl   one record a line, append-only, each line bound to the one before by SHA-256
      values/         larger values, each file named by the SHA-256 of its bytes
      owner           the driver that has the run open: host, process id, since when

A record is written before the call it answers returns, so that any kill of processes leaves it; a background thread
makes written records durable against power loss within 50 ms. A line is ``{"chain":"<64 hex>",<rest>`` where the 64
digits are the SHA-256 of the previous line's 64 digits followed by ``<rest>``, byte for byte.
"""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import hashlib
import json
import math
import operator
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hybridq.errors import Corrupt, JournalError, Locked, Version, WorkflowError
from hybridq.faults import faultpoint
from hybridq.values import MAX_VALUE_BYTES, Encoded, Written, digest_bytes, to_json

__all__ = [
    "GENESIS",
    "HEAD",
    "Circuit",
    "Code",
    "End",
    "Evaluation",
    "Event",
    "Failure",
    "Journal",
    "Loop",
    "LoopEnd",
    "Opened",
    "Owner",
    "Record",
    "Row",
    "RunHeader",
    "Step",
    "Survived",
    "Tail",
    "link",
    "load_value",
    "pack_array",
    "read_owner",
    "read_records",
    "run_directory",
    "run_names",
    "unpack_array",
]

FORMAT = 1
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FSYNC_WITHIN = 0.05
_INLINE_BYTES = 4096
HEAD = re.compile(rb'\{"chain":"([0-9a-f]{64})",')
"""A line's beginning, with its digest."""
GENESIS = "0" * 64
"""What the first line is bound to."""

Document: TypeAlias = Any
"""A JSON document: an encoded value, or ``{"$": "file", "f": name}`` for one kept in ``values/``."""


# -- records -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunHeader:
    """First record of every run: what was asked for."""

    kind = "run"
    format: int
    name: str
    workflow: str
    code: str
    arguments: str
    inputs: Document
    seed: int
    backend: Document
    """What evaluates everything that names no backend of its own."""
    forked: Document = None
    """The run that it was forked from, as it was then: name, and bytes and SHA-256 of its journal."""


@dataclass(frozen=True)
class Opened:
    """A driver took the run up: which process, in which environment."""

    kind = "opened"
    host: str
    pid: int
    time: float
    python: str
    processor: str
    versions: Mapping[str, str]
    command: list[str]


@dataclass(frozen=True)
class Code:
    """Source of a step or objective, once for each digest."""

    kind = "code"
    name: str
    code: str
    text: Document


@dataclass(frozen=True)
class Circuit:
    """A circuit with its observables and numeric plan, once for each template and plan."""

    kind = "circuit"
    program: str
    circuit: Document
    observables: Document
    plan: Document
    qubits: int
    gates: int
    paulis: int
    backend: Document
    """What evaluated it: method and noise, or where a backend came from."""
    need: Document = None
    """What one row of it was predicted to take when it was first recorded: ``bytes``, ``seconds``, with its ``shots``
    (None for exact values)."""


@dataclass(frozen=True)
class Step:
    """A classical step that returned."""

    kind = "step"
    at: str
    code: str
    arguments: str
    inputs: Document
    output: Document
    started: float
    seconds: float
    where: str
    attempt: int
    bytes: int


@dataclass(frozen=True)
class Evaluation:
    """A quantum evaluation outside of loops that returned."""

    kind = "eval"
    at: str
    program: str
    theta: Document
    shots: int | None
    output: Document
    started: float
    seconds: float
    where: str
    attempt: int
    bytes: int


@dataclass(frozen=True)
class Loop:
    """Header of an optimizer loop."""

    kind = "loop"
    at: str
    function: str
    code: str
    arguments: str
    inputs: Document
    method: str
    gradient: str
    """``none``, ``adjoint`` or ``parameter-shift``: chosen when the loop began, kept when it resumes."""


@dataclass(frozen=True)
class Row:
    """One objective evaluation of a loop.

    ``loop`` is the header's line number, ``x`` the packed point, ``g`` the packed gradient, ``where`` the engine that
    evaluated it: empty for an objective that is not itself a quantum function.
    """

    kind = "row"
    loop: int
    i: int
    x: str
    value: float
    g: str | None
    stderr: float
    shots: int | None
    seconds: float
    where: str
    program: str = ""
    """What was evaluated, as in `Circuit`; empty for the same as in the loop's row before, or for another objective."""
    started: float | None = None
    """Seconds since 1970, by the clock of the machine that evaluated it."""


@dataclass(frozen=True)
class LoopEnd:
    """The loop's ``OptimizeResult``."""

    kind = "loop-end"
    loop: int
    output: Document
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A call that raised; it is tried again unless a `Survived` record follows."""

    kind = "failure"
    at: str
    type: str
    message: str
    arguments: Document
    traceback: str
    started: float
    seconds: float
    where: str
    attempt: int


@dataclass(frozen=True)
class Survived:
    """The workflow went on after the failure at this location, so a replay raises it again."""

    kind = "survived"
    at: str


@dataclass(frozen=True)
class Event:
    """Something that cannot be computed again: a clock reading, an order of completion."""

    kind = "event"
    at: str
    output: Document


@dataclass(frozen=True)
class End:
    """A driver left the run: ``finished``, ``failed``, ``interrupted``, or ``planned``."""

    kind = "end"
    status: str
    output: Document
    error: str | None
    seconds: float
    time: float


Record: TypeAlias = (
    RunHeader | Opened | Code | Circuit | Step | Evaluation | Loop | Row | LoopEnd | Failure | Survived | Event | End
)
_KINDS: dict[str, type[Any]] = {
    c.kind: c
    for c in (RunHeader, Opened, Code, Circuit, Step, Evaluation, Loop, Row, LoopEnd, Failure, Survived, Event, End)
}
_FIELDS = {c: tuple(f.name for f in dataclasses.fields(c)) for c in _KINDS.values()}
_NAMES = {c: frozenset(names) for c, names in _FIELDS.items()}
_OPTIONAL = {
    c: {f.name for f in dataclasses.fields(c) if f.default is not dataclasses.MISSING} for c in _KINDS.values()
}
"""Fields that older journals do not have."""


_FLOAT = np.dtype("<f8")


class _Base64(str):
    """What JSON takes as it is."""

    __slots__ = ()


def pack_array(array: NDArray[np.float64]) -> str:
    """A vector of float64 as base64 of its little-endian bytes: compact, and exact to the bit."""
    return _Base64(base64.b64encode(array.astype(_FLOAT, copy=False).tobytes()), "ascii")


def unpack_array(text: str) -> NDArray[np.float64]:
    """The vector that `pack_array` was given, shape (n,)."""
    return np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64)


def _text(record: Record) -> bytes:
    """A record's line from its first member on."""
    first, starts, members = _LAYOUTS[type(record)]
    parts = [first]
    for start, value in zip(starts, members(record), strict=True):
        kind = type(value)  # what most are is written in less time than `json.dumps` takes
        if value is None:
            parts.append(start + "null")
        elif kind is int or (kind is float and math.isfinite(value)):
            parts.append(start + repr(value))
        elif kind is _Base64:
            parts.append(f'{start}"{value}"')
        else:
            parts.append(start + (value.json if kind is Written else to_json(value)))
    text = ",".join(parts)
    return text.encode("utf-8", "backslashreplace") + b"}"  # a lone surrogate, as of a file's name, as JSON's escape


def _getter(names: tuple[str, ...]) -> Callable[[Record], tuple[Any, ...]]:
    """All members at once; `operator.attrgetter` gives one by itself."""
    get = operator.attrgetter(*names)
    return get if len(names) > 1 else lambda record: (get(record),)


_LAYOUTS = {
    kind: (f'"k":"{kind.kind}"', tuple(f'"{name}":' for name in names), _getter(names))
    for kind, names in _FIELDS.items()
}
"""Of each kind of record: its line's beginning, what stands before each member, and all members at once."""


# -- run directories ---------------------------------------------------------------------------------------------


def run_directory(store: Path, name: str) -> Path:
    """``store/name``, checked: the name is harmless and the directory lies inside the store.

    Raises `WorkflowError` for any other name, and for a run that is a symbolic link.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise WorkflowError(
            f"{name!r} cannot name a run: use letters, digits, '.', '_' and '-', begin with a letter or digit, and "
            "stay within 64 characters."
        )
    directory = store / name
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise WorkflowError(f"{directory} is not a directory; choose another name or remove it.")
    return directory


def run_names(store: Path) -> list[str]:
    """Names of the runs in ``store``, oldest first by last change."""
    found = [p.parent for p in store.glob("*/journal.jsonl") if not p.parent.is_symlink()]
    return [p.name for p in sorted(found, key=lambda p: (p / "journal.jsonl").stat().st_mtime)]


@dataclass(frozen=True)
class _Scan:
    """What a journal file holds."""

    records: list[tuple[int, Record]] = field(default_factory=list)
    """Line number, from 1, and record."""
    chain: str = GENESIS
    intact: int = 0
    """Bytes up to the end of the last whole line."""
    torn: int = 0
    """Bytes of an unfinished last line: a write that a kill cut short, never acknowledged."""


def read_records(directory: Path) -> list[tuple[int, Record]]:
    """The records of a run with their line numbers, read without owning it.

    Raises `JournalError` if there is no run, `Corrupt` for a damaged line, `Version` for another format.
    """
    return _scan(directory).records


def _scan(directory: Path) -> _Scan:
    path = directory / "journal.jsonl"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise _no_run(directory) from None
    lines = data.split(b"\n")
    torn = lines.pop()
    records, chain = _checked(path, lines, 1, GENESIS)
    head = HEAD.match(torn)
    if head is not None and link(chain, torn[head.end() : -1]) == head[1].decode():
        raise Corrupt(  # a write that was cut short leaves less than a line, never a line with another end
            f"{path}, line {len(lines) + 1}: its end was changed. Nothing was run or written. Restore the file from a "
            "copy, or start a run under another name."
        )
    return _Scan(records, chain, len(data) - len(torn), len(torn))


def _checked(path: Path, lines: Sequence[bytes], first: int, chain: str) -> tuple[list[tuple[int, Record]], str]:
    """Records of whole ``lines``, the first of which is number ``first`` and follows on ``chain``; the chain then."""
    records: list[tuple[int, Record]] = []
    for number, line in enumerate(lines, start=first):
        head = HEAD.match(line)
        if head is None or (found := link(chain, line[head.end() :])) != head[1].decode():
            raise Corrupt(
                f"{path}, line {number}: its checksum does not match; the line or the one before it was changed. "
                "Nothing was run or written. Restore the file from a copy, or start a run under another name."
            )
        chain = found
        try:
            fields = json.loads("{" + line[head.end() :].decode())
        except (ValueError, RecursionError) as error:
            raise Corrupt(f"{path}, line {number}: it is not a record ({error}).") from error
        records.append((number, _parse(fields, path, number)))
    if first == 1 and records and not isinstance(records[0][1], RunHeader):
        raise Corrupt(f"{path}, line 1: the run's header is missing.")
    return records, chain


class Tail:
    """A journal's records as they are written, read without owning it; each line is read and checked once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._chain, self._number, self._read = GENESIS, 0, 0

    def read(self) -> list[tuple[int, Record]]:
        """The whole lines since the last call, with their numbers.

        Raises what `read_records` does; also `Corrupt` if lines that were read are gone, as where a driver could not
        write all of several records: another tail reads what is there then.
        """
        path = self._directory / "journal.jsonl"
        try:
            with open(path, "rb") as file:
                if file.seek(0, os.SEEK_END) < self._read:
                    raise Corrupt(f"{path} is shorter than it was: lines that were read are gone. Read it again.")
                file.seek(self._read)
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            raise _no_run(self._directory) from None
        lines.pop()  # what is written of the next line
        found, self._chain = _checked(path, lines, self._number + 1, self._chain)
        self._number += len(lines)
        self._read += sum(len(line) + 1 for line in lines)
        return found


def _no_run(directory: Path) -> JournalError:
    return JournalError(f"there is no run in {directory}; `hybridq runs --store DIR` lists the runs.")


def link(chain: str, rest: bytes) -> str:
    """The digest of a line: of that of the line before, and all bytes behind its own."""
    return hashlib.sha256(chain.encode() + rest).hexdigest()


def _parse(fields: dict[str, Any], path: Path, number: int) -> Record:
    kind = _KINDS.get(fields.pop("k", ""))
    if number == 1 and kind in (None, RunHeader) and fields.get("format") != FORMAT:
        raise Version(
            f"{path} has format {fields.get('format')}, this hybridq reads format {FORMAT}; it was left untouched. "
            "Use the version of hybridq that wrote it."
        )
    if kind is None or (fields.keys() != _NAMES[kind] and fields.keys() | _OPTIONAL[kind] != _NAMES[kind]):
        raise Version(f"{path}, line {number}: a record that this version of hybridq does not know; left untouched.")
    record: Record = kind(**fields)
    return record


def load_value(directory: Path, document: Document) -> Encoded:
    """The encoded value behind a record's document, its attachments read and checked.

    Raises `Corrupt`, naming the file, if one is missing or its bytes do not match its name.
    """
    if isinstance(document, dict) and document.get("$") == "file":
        document = json.loads(_read_value(directory, document["f"]))
    return Encoded(document, {name: _read_value(directory, name) for name in _attachments(document)})


def _read_value(directory: Path, name: str) -> bytes:
    path = directory / "values" / name
    if not re.fullmatch(r"[0-9a-f]{64}\.(json|npy|qpy)", name):
        raise Corrupt(f"{directory}: {name!r} is not the name of a stored value.")
    try:
        if (size := path.stat().st_size) > MAX_VALUE_BYTES:
            raise Corrupt(f"{path} has {size:,} bytes, more than any stored value ({MAX_VALUE_BYTES:,}); not loaded.")
        data = path.read_bytes()
    except OSError as error:
        raise Corrupt(f"{path} is missing or unreadable ({error.strerror}); restore it from a copy.") from error
    if digest_bytes(data) != name.partition(".")[0]:
        raise Corrupt(f"{path}: its bytes do not match the checksum in its name; restore it from a copy.")
    return data


def _attachments(document: Document) -> Iterator[str]:
    if isinstance(document, dict):
        if document.get("$") in ("npy", "qpy"):
            yield document["f"]
        for member in document.values():
            yield from _attachments(member)
    elif isinstance(document, list):
        for member in document:
            yield from _attachments(member)


# -- writing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tail:
    """Where the next record goes: replaced as a whole, so that an interrupt never leaves half of it changed."""

    chain: str
    size: int
    line: int


class Journal:
    """An open run directory. Thread-safe; one process at a time owns it.

    Opening creates the directory (mode 0700), takes ownership, checks every line and drops an unfinished last one.
    Raises `Locked` if another driver has it open, naming process and host; ``take_over`` allows taking it from a driver
    on another host that is known to be gone. Raises `Corrupt` and `Version` as `read_records` does, and `JournalError`
    if the directory cannot be written.
    """

    def __init__(self, directory: Path, *, take_over: bool = False) -> None:
        self.directory = directory
        try:
            self._scan = self._open(directory / "journal.jsonl", directory / "values", take_over)
        except OSError as error:
            raise JournalError(f"{directory} cannot be opened for writing: {error}.") from error
        self.records = self._scan.records
        """Line numbers and records found when the run was opened."""
        self.failure: JournalError | None = None
        """The first thing that could not be written, made durable or read back: no run is complete after it."""
        self._tail = _Tail(self._scan.chain, self._scan.intact, len(self.records))
        self._writing = False
        """Whether there may be bytes behind the tail: an interrupt may come between a write and the note of it."""
        self._lock = threading.Lock()
        self._follower: deque[tuple[int, Record]] | None = None
        self._broken: str | None = None
        self._stored: set[str] = set()
        """Values that this driver wrote, or found to be what it would write."""
        self._unsynced: list[Path] = []
        self._dirty = threading.Event()
        self._closing = threading.Event()
        self._syncer = threading.Thread(target=self._sync_forever, name="hybridq-journal", daemon=True)
        self._syncer.start()

    def _open(self, path: Path, values: Path, take_over: bool) -> _Scan:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if values.is_symlink():
            raise JournalError(f"{values} is a symbolic link; nothing is written through it.")
        values.mkdir(mode=0o700, exist_ok=True)
        self._owner = _own(self.directory, take_over)
        try:
            found = os.path.lexists(path)
            scan = _scan(self.directory) if found else _Scan()
            faultpoint("create.before")
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if scan.torn:
                    faultpoint("cut.before")
                    os.ftruncate(self._fd, scan.intact)
                    faultpoint("cut.after")
                for part in values.glob(".*.part"):  # left by a driver that was killed
                    part.unlink()
                if not found:  # or a power loss could take the names of what is made durable
                    _fsync_path(self.directory)
                    _fsync_path(self.directory.parent)
                faultpoint("create.after")
            except BaseException:
                os.close(self._fd)
                raise
        except BaseException:
            _disown(self._owner)
            raise
        return scan

    def append(self, record: Record) -> int:
        """Write ``record``; return its line number.

        When this returns the record survives any kill of processes. Raises `JournalError` if it could not be written
        whole (the file is cut back to its last whole line), or if an earlier write or sync failed.
        """
        return self.append_all([record])

    def append_all(self, several: Sequence[Record]) -> int:
        """Write ``several`` records as `append` does, all at once; return the last one's line number."""
        texts = [_text(record) for record in several]
        with self._lock:
            self._check()
            tail = self._tail
            chain, lines = tail.chain, []
            for text in texts:
                chain = link(chain, text)
                lines.append(b'{"chain":"' + chain.encode() + b'",' + text + b"\n")
            whole = b"".join(lines)
            self._write(whole)
            number = tail.line + len(texts)
            if self._follower is not None:
                self._follower.extend(enumerate(several, tail.line + 1))
            self._tail = _Tail(chain, tail.size + len(whole), number)
            self._writing = False
        if not self._dirty.is_set():  # else a sync is to come that begins after this
            self._dirty.set()
        return number

    def follow(self, follower: deque[tuple[int, Record]] | None) -> int:
        """Put what is appended from now on into ``follower`` too, with its line number; None ends that.

        Returns the number of the last line that is not among it. Who follows keeps up with it: it is not bounded.
        """
        with self._lock:
            self._follower = follower
            return self._tail.line

    def store(self, encoded: Encoded) -> Document:
        """Keep an encoded value; return the document that stands for it in a record."""
        for name, data in encoded.attachments.items():
            self._store_file(name, data)
        document = encoded.document
        if type(document) is Written and document.json.isascii() and len(document.json) <= _INLINE_BYTES:
            return document
        text = encoded.text
        if len(text) <= _INLINE_BYTES:
            return document
        name = f"{digest_bytes(text)}.json"
        self._store_file(name, text)
        return {"$": "file", "f": name}

    def load(self, document: Document) -> Encoded:
        """The encoded value that `store` was given; raises `Corrupt` as `load_value` does."""
        try:
            return load_value(self.directory, document)
        except JournalError as error:
            self.failure = self.failure or error
            raise

    def sync(self) -> None:
        """Make everything written so far durable against power loss; raises `JournalError` if that fails."""
        with self._lock:
            self._check()
            files, self._unsynced = self._unsynced, []
        try:
            faultpoint("sync.before")
            for path in files:
                _fsync_path(path)
                faultpoint("sync.value")
            if files:
                _fsync_path(self.directory / "values")
                faultpoint("sync.directory")
            os.fsync(self._fd)
            faultpoint("sync.after")
        except OSError as error:
            # after a failed fsync the kernel may have dropped the pages: trying again would lie
            self._broken = f"{self.directory}: making records durable failed ({error.strerror})"
            raise self._failed(f"{self._broken}; run again when the disk works.") from error
        except BaseException:
            with self._lock:
                self._unsynced = files + self._unsynced
            raise

    def close(self) -> None:
        """Make everything durable, and give up ownership. A second call does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._dirty.set()
        self._syncer.join()
        try:
            if self._broken is None:
                self.sync()
        finally:
            with self._lock:
                self._broken = self._broken or f"{self.directory} is closed"
                os.close(self._fd)
            try:
                _disown(self._owner)
            except OSError as error:
                raise self._failed(f"{self.directory}: giving it up failed ({error.strerror}).") from error

    def _failed(self, message: str) -> JournalError:
        error = JournalError(message)
        self.failure = self.failure or error
        return error

    def _check(self) -> None:
        if self._broken is not None:
            raise self._failed(f"{self._broken}; nothing more is recorded. Run again when that is mended.")

    def _write(self, line: bytes) -> None:
        size, written = self._tail.size, 0
        try:
            if self._writing:
                os.ftruncate(self._fd, size)
            self._writing = True
            faultpoint("append.before")
            while written < len(line):
                written += os.write(self._fd, line[written:])
            faultpoint("append.after")
        except OSError as error:
            message = f"{self.directory / 'journal.jsonl'}: writing a record failed ({error.strerror})"
            try:
                os.ftruncate(self._fd, size)
            except OSError:
                self._broken = message
            raise self._failed(f"{message}; nothing recorded is lost. Free space and run again to resume.") from error

    def _store_file(self, name: str, data: bytes) -> None:
        if name in self._stored:
            return
        path = self.directory / "values" / name
        part = path.with_name(f".{name}.{threading.get_ident()}.part")
        try:
            # one that is there may be from before a power loss, which leaves names without what they name
            if not path.exists() or path.read_bytes() != data:
                faultpoint("value.before")
                with open(part, "wb") as file:
                    file.write(data)
                faultpoint("value.written")
                os.replace(part, path)
                faultpoint("value.renamed")
        except OSError as error:
            part.unlink(missing_ok=True)
            message = f"{path}: writing a value failed ({error.strerror}); free space and run again."
            raise self._failed(message) from error
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        with self._lock:
            self._unsynced.append(path)
            self._stored.add(name)
        self._dirty.set()

    def _sync_forever(self) -> None:
        while not self._closing.is_set():
            self._dirty.wait()
            if self._closing.wait(_FSYNC_WITHIN):
                return
            self._dirty.clear()
            try:
                self.sync()
            except JournalError:
                return  # kept in _broken: the next append raises it


def _fsync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _own(directory: Path, take_over: bool) -> int:
    """Take ownership of a run: a lock that the kernel frees with the process, and a text that says whose it is."""
    path = directory / "owner"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except BlockingIOError:
            held = True
        text = os.pread(fd, 4096, 0)
        owner = _read_owner(text)
        if held:
            raise Locked(f"{directory} is in use by {owner}; wait for it to end, or stop it, then run again.")
        if text and owner.host != socket.gethostname() and not take_over:
            raise Locked(
                f"{directory} was left open by {owner} on another host, whose locks may not reach here. If that driver "
                "is gone, run again with --take-over (take_over=True)."
            )
        faultpoint("own.before")
        os.ftruncate(fd, 0)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        os.pwrite(fd, json.dumps(me).encode(), 0)
        faultpoint("own.after")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _disown(fd: int) -> None:
    try:
        faultpoint("leave.before")
        os.ftruncate(fd, 0)
        faultpoint("leave.after")
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Owner:
    """The driver that has a run open, or was killed while it had."""

    host: str
    pid: int
    since: float
    """Seconds since 1970."""

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid}@{self.host} since {since}"


def read_owner(directory: Path) -> Owner | None:
    """The driver that has the run open, as it says; None if the last one has left it. It may be gone."""
    try:
        text = (directory / "owner").read_bytes()
    except OSError:
        return None
    return _read_owner(text) if text else None


def _read_owner(text: bytes) -> Owner:
    try:
        fields = json.loads(text)
        return Owner(str(fields["host"]), int(fields["pid"]), float(fields["since"]))
    except (ValueError, KeyError, TypeError):
        return Owner("an unknown host", 0, 0.0)
