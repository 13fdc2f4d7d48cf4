"""A run beside the same run made again: what each call, row and result came to, one by one.

Two records are compared by location, as data: no class of the researcher's is made. Numbers count as ``identical`` to
the bit, as ``close`` within 1e-9, absolute and relative, and values that were sampled as ``within stderr`` if they are
not further apart than 4 combined standard errors.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridq import journal as records
from hybridq.errors import WorkflowError
from hybridq.journal import Journal, load_value, read_records, unpack_array
from hybridq.values import Encoded, circuit_digest, decode, to_json

__all__ = ["GRADES", "PARTS", "Compared", "Comparison", "begin_again", "compare", "finished"]

PARTS = ("steps", "evaluations", "loop rows", "loop results", "failures", "value")
"""What is compared: outputs of steps and of evaluations, rows and results of loops, types of the exceptions that the
workflow went on after, and the workflow's value."""
GRADES = ("identical", "close", "within stderr", "differs", "missing", "new")
"""From the best on; ``missing`` is in the record alone, ``new`` in the run made again."""
TOLERANCE = 1e-9
STANDARD_ERRORS = 4.0
_ESTIMATE = "hybridq.program:Estimate"


@dataclass(frozen=True)
class Compared:
    """One output of a run, recorded and made again."""

    part: str
    """One of `PARTS`."""
    at: str
    """Its location; a row's has its number behind the loop's."""
    grade: str
    """One of `GRADES`."""
    where: str = ""
    """Inside of it, where the two differ most plainly."""
    recorded: str = ""
    now: str = ""


@dataclass(frozen=True)
class Comparison:
    """All outputs of two runs, side by side."""

    outputs: tuple[Compared, ...]
    notes: tuple[str, ...]
    """Other differences: environments, code, what was not compared."""

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """How many outputs of each part have each grade."""
        found = Counter((output.part, output.grade) for output in self.outputs)
        return {part: {grade: found[part, grade] for grade in GRADES} for part in PARTS}

    @property
    def same(self) -> bool:
        """Whether nothing differs and nothing is missing."""
        return not any(output.grade in ("differs", "missing") for output in self.outputs)


def finished(directory: Path) -> tuple[records.RunHeader, records.Opened]:
    """A finished run's header, and the driver that opened it last.

    Raises `JournalError` as `read_records` does, and `WorkflowError` for a run that has not finished.
    """
    entries = [record for _, record in read_records(directory)]
    ends = [record for record in entries if isinstance(record, records.End)]
    opened = [record for record in entries if isinstance(record, records.Opened)]
    if not entries or not opened or not any(end.status == "finished" for end in ends):
        state = ends[-1].status if ends else "unfinished"
        raise WorkflowError(
            f"the run in {directory} has not finished ({state}), so there is nothing to compare with; finish it with "
            "the command that began it, then check."
        )
    header = entries[0]
    assert isinstance(header, records.RunHeader)
    return header, opened[-1]


def begin_again(directory: Path, other: Path) -> int:
    """Make in ``other`` the record that the same run begins with: what was asked for, and what cannot be made again.

    These are the readings of the clock and the orders of completion, which the run made again is answered. Returns how
    many.
    """
    journal, events = Journal(other), 0
    try:
        for _, record in read_records(directory):
            if isinstance(record, records.RunHeader):
                inputs, backend = (journal.store(load_value(directory, d)) for d in (record.inputs, record.backend))
                journal.append(replace(record, inputs=inputs, backend=backend))
            elif isinstance(record, records.Event):
                journal.append(replace(record, output=journal.store(load_value(directory, record.output))))
                events += 1
    finally:
        journal.close()
    return events


# -- two records -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outputs:
    """What a run came to, by part and location."""

    directory: Path
    found: Mapping[tuple[str, str], Any]
    """A document, or a loop's row."""
    codes: Mapping[str, str]
    """Digest of the code of each step and objective, by location."""
    opened: tuple[records.Opened, ...]


def _outputs(directory: Path) -> _Outputs:
    found: dict[tuple[str, str], Any] = {}
    codes: dict[str, str] = {}
    loops: dict[int, str] = {}
    failures: dict[str, str] = {}
    opened = []
    for number, record in read_records(directory):
        match record:
            case records.Opened():
                opened.append(record)
            case records.Step():
                found["steps", record.at] = record.output
                codes[record.at] = record.code
            case records.Evaluation():
                found["evaluations", record.at] = record.output
            case records.Loop():
                loops[number] = record.at
                codes[record.at] = record.code
            case records.Row():
                found["loop rows", f"{loops[record.loop]} row {record.i}"] = record
            case records.LoopEnd():
                found["loop results", loops[record.loop]] = record.output
            case records.Failure():
                failures[record.at] = record.type
            case records.Survived():
                found["failures", record.at] = failures.get(record.at)
            case records.End() if record.status == "finished":
                found["value", ""] = record.output
    return _Outputs(directory, found, codes, tuple(opened))


def compare(recorded: Path, now: Path) -> Comparison:
    """Compare the finished run in ``recorded`` with the one in ``now``, the same run made again.

    Raises `JournalError` if either cannot be read.
    """
    old, new = _outputs(recorded), _outputs(now)
    outputs = [_compared(part, at, old, new) for part, at in dict.fromkeys([*old.found, *new.found])]
    outputs.sort(key=lambda output: PARTS.index(output.part))
    notes = list(_environments(old.opened, new.opened))
    changed = [at for at, code in old.codes.items() if new.codes.get(at, code) != code]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        notes.append(f"the code is not what was recorded at {', '.join(changed[:3])}{more}")
    if ("value", "") in old.found and old.found["value", ""] is None:
        notes.append("the recorded value is None, or no data: it was not kept")
    return Comparison(tuple(outputs), tuple(notes))


def _compared(part: str, at: str, old: _Outputs, new: _Outputs) -> Compared:
    if (part, at) not in new.found:
        return Compared(part, at, "missing")
    if (part, at) not in old.found:
        return Compared(part, at, "new")
    a, b = old.found[part, at], new.found[part, at]
    if isinstance(a, records.Row):
        return _rows(part, at, a, b)
    return _graded(part, at, _document(load_value(old.directory, a), load_value(new.directory, b)))


def _graded(part: str, at: str, found: _Found) -> Compared:
    if found.grade == "identical":
        return Compared(part, at, found.grade)
    return Compared(part, at, found.grade, found.where, *(_short(v) for v in (found.recorded, found.now)))


def _environments(old: Iterable[records.Opened], new: Iterable[records.Opened]) -> Iterator[str]:
    """What is installed here beside what was there: each thing that any recorded driver had otherwise."""
    for now in list(new)[-1:]:
        here = {"python": now.python, "processor": now.processor, **now.versions}
        there: dict[str, dict[str, None]] = {}
        for driver in old:
            for name, value in {"python": driver.python, "processor": driver.processor, **driver.versions}.items():
                there.setdefault(name, {})[value] = None
        for name in sorted(here.keys() | there.keys()):
            values = list(there.get(name, {"not recorded": None}))
            if values != [here.get(name)]:
                yield f"{name}: recorded with {' and '.join(values)}, now {here.get(name, 'not asked for')}"


# -- two outputs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """How two documents compare, and the part of them that says so."""

    grade: str
    where: str = ""
    recorded: Any = None
    now: Any = None


_SAME = _Found("identical")


def _worst(several: Iterable[_Found]) -> _Found:
    return max(several, key=lambda found: GRADES.index(found.grade), default=_SAME)


def _rows(part: str, at: str, old: records.Row, new: records.Row) -> Compared:
    """Two rows of a loop: point, value with its error, gradient."""
    points = _arrays(unpack_array(old.x), unpack_array(new.x), "x")
    values = _worst([_floats(old.value, new.value, "value"), _floats(old.stderr, new.stderr, "stderr")])
    if values.grade == "differs" and old.shots is not None and old.shots == new.shots:
        a, b = (np.array([[row.value], [row.stderr]]) for row in (old, new))
        values = _sampled(a, b, f"{old.value!r} ± {old.stderr:.2g}", f"{new.value!r} ± {new.stderr:.2g}")
    slopes = _SAME
    if old.g is not None and new.g is not None:
        slopes = _arrays(unpack_array(old.g), unpack_array(new.g), "gradient")
    elif old.g is not new.g:
        slopes = _Found("differs", "gradient", old.g is not None, new.g is not None)
    return _graded(part, at, _worst([points, values, slopes]))


def _document(old: Encoded, new: Encoded) -> _Found:
    if to_json(old.document) == to_json(new.document):  # files are named by their bytes
        return _SAME
    return _Walk(old.attachments, new.attachments).walk(old.document, new.document, "")


class _Walk:
    """Both documents at once, to where they differ."""

    def __init__(self, old: Mapping[str, bytes], new: Mapping[str, bytes]) -> None:
        self._old, self._new = old, new

    def walk(self, a: Any, b: Any, where: str) -> _Found:
        """How two parts compare that stand at the same place."""
        if isinstance(a, float) and isinstance(b, float):
            return _floats(a, b, where)
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            return _worst(self.walk(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
        if isinstance(a, dict) and isinstance(b, dict):
            return self._tagged(a, b, where)
        same = type(a) is type(b) and not isinstance(a, list) and a == b
        return _SAME if same else _Found("differs", where, a, b)

    def _tagged(self, a: Mapping[str, Any], b: Mapping[str, Any], where: str) -> _Found:
        kinds = {a.get("$"), b.get("$")}
        if kinds <= {"array", "npy"}:
            return _arrays(self._array(a, self._old), self._array(b, self._new), where)
        if "LbfgsInvHessProduct" in kinds <= {"LbfgsInvHessProduct", "array", "npy"} and len(kinds) > 1:
            return _arrays(self._dense(a, self._old), self._dense(b, self._new), where)
        if a.get("$") == b.get("$") == "qpy":
            digests = [circuit_digest(decode(Encoded(d, f))) for d, f in ((a, self._old), (b, self._new))]
            return _SAME if digests[0] == digests[1] else _Found("differs", f"{where} (a circuit)", *digests)
        if a.keys() != b.keys():
            return _Found("differs", where, a, b)
        plain = "$" not in a or "t" not in a  # a class's members stand one level deeper
        found = _worst(
            self.walk(a[key], b[key], f"{where}.{key}" if "$" not in a else where if key == "v" else f"{where} {key}")
            for key in a
        )
        if plain or found.grade != "differs" or not (a["t"] == b["t"] == _ESTIMATE):
            return found
        return self._estimates(a["v"], b["v"], where) or found

    def _estimates(self, a: Mapping[str, Any], b: Mapping[str, Any], where: str) -> _Found | None:
        """Two sampled values within their errors; None for any others."""
        if a["shots"] is None or a["shots"] != b["shots"]:
            return None
        old, new = (
            [np.asarray(self._array(e[key], files), dtype=float) for key in ("value", "stderr")]
            for e, files in ((a, self._old), (b, self._new))
        )
        if len({array.shape for array in (*old, *new)}) != 1:
            return None
        x, y = np.array(old), np.array(new)
        far = np.unravel_index(np.argmax(np.abs(x[0] - y[0])), x[0].shape)
        before, after = (f"{float(z[0][far])!r} ± {float(z[1][far]):.2g}" for z in (x, y))
        place = f"[{', '.join(map(str, far))}]" if far else ""
        return _sampled(x, y, before, after, f"{where}{place}")

    def _dense(self, document: Any, files: Mapping[str, bytes]) -> NDArray[Any]:
        """An inverse Hessian as a matrix, as which those of L-BFGS-B were recorded once."""
        found = decode(Encoded(document, files))
        return np.asarray(found.todense() if hasattr(found, "todense") else found)

    def _array(self, document: Any, files: Mapping[str, bytes]) -> NDArray[Any]:
        """An array or a number as an array."""
        return np.asarray(decode(Encoded(document, files)))


def _sampled(old: NDArray[Any], new: NDArray[Any], recorded: str, now: str, where: str = "value") -> _Found:
    """Values with errors, each of shape (2, ...): within their combined errors, or not."""
    within = np.abs(old[0] - new[0]) <= STANDARD_ERRORS * np.hypot(old[1], new[1])
    return _Found("within stderr" if bool(np.all(within)) else "differs", where, recorded, now)


def _floats(a: float, b: float, where: str) -> _Found:
    if struct.pack("<d", a) == struct.pack("<d", b):
        return _SAME
    close = math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return _Found("close" if close else "differs", where, a, b)


def _arrays(a: NDArray[Any], b: NDArray[Any], where: str) -> _Found:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return _Found("differs", where, *(f"an array of {v.dtype}, shape {v.shape}" for v in (a, b)))
    if a.tobytes() == b.tobytes():
        return _SAME
    if a.dtype.kind in "fc":
        apart = ~np.isclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        grade, unlike = ("differs", apart) if apart.any() else ("close", a != b)
    else:
        grade, unlike = "differs", a != b
    place = tuple(map(int, np.argwhere(unlike)[0])) if np.any(unlike) else ()
    shown = [v[place].item() if place else v.tolist() for v in (a, b)]
    return _Found(grade, where + (f"[{', '.join(map(str, place))}]" if place else ""), *shown)


def _short(value: Any, width: int = 60) -> str:
    """A part of a document for a person to read."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."
