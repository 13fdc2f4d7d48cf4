"""Verifying a run directory: all damage is told with its place, by hybridq and by a program that knows no hybridq."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter
from runs import journal

import hybridq as hq
from hybridq.audit import Verified, verify
from hybridq.errors import JournalError
from hybridq.journal import Circuit, Code, Event, Failure, Journal, Loop, LoopEnd, Row, RunHeader, Step, Survived
from hybridq.values import encode

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "check_run.py"
CIRCUIT = QuantumCircuit(1)
CIRCUIT.ry(Parameter("a"), 0)
FLIPS = (0x01, 0x80)


def _loaded() -> Any:
    """The stand-alone program as a module."""
    spec = importlib.util.spec_from_file_location("check_run", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_run = _loaded()


def wrong(directory: Path) -> list[str]:
    """What the stand-alone program says."""
    found: list[str] = check_run.check(directory).wrong
    return found


@dataclasses.dataclass(frozen=True)
class Point:
    """A class of a study's own."""

    x: float


@hq.quantum
def energy(theta: Any) -> Any:
    return hq.expval(CIRCUIT, "Z", theta)


@hq.classical
def text(length: int) -> dict[str, Any]:
    return {"text": "é" * length, "point": Point(0.5)}


@hq.classical
def broken(x: int) -> None:
    raise ValueError(f"no {x}")


@hq.workflow
def study() -> list[Any]:
    found: list[Any] = [hq.now(), hq.minimize(energy, [0.3], method="COBYLA", options={"maxiter": 4}).fun]
    found.append(len(text(2100)["text"]))
    try:
        broken(3)
    except ValueError as error:
        found.append(str(error))
    return [*found, float(energy(np.linspace(0, 1, 140)[:, None]).value.sum())]


@pytest.fixture(scope="module")
def original(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one of everything; tests change copies of it."""
    store = tmp_path_factory.mktemp("original")
    hq.run(study, name="small", store=store, cluster=client)
    return store / "small"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(original, tmp_path / "small"))


def chained(lines: list[dict[str, Any] | bytes]) -> bytes:
    """A journal written without the code under test."""
    chain, data = "0" * 64, b""
    for line in lines:
        rest = line if isinstance(line, bytes) else json.dumps(line, separators=(",", ":")).encode()[1:]
        chain = hashlib.sha256(chain.encode() + rest).hexdigest()
        data += b'{"chain":"' + chain.encode() + b'",' + rest + b"\n"
    return data


def damage(found: Verified) -> list[str]:
    return list(map(str, found.damage))


# -- sound runs ----------------------------------------------------------------------------------------------------


def test_a_sound_run_is_counted_and_nothing_is_found(original: Path) -> None:
    found, lines = verify(original), journal(original)
    kinds = Counter(line["k"] for line in lines)
    assert set(kinds) == {
        "run", "opened", "code", "circuit", "step", "eval", "loop", "row", "loop-end", "failure", "survived", "event",
        "end",
    }  # fmt: skip
    files = list((original / "values").iterdir())
    assert {path.suffix for path in files} == {".json", ".npy", ".qpy"}
    assert max(path.stat().st_size for path in files if path.suffix == ".json") > 4096
    assert found.findings == ()
    assert dict(found.counts) == {
        "lines": len(lines), "sessions": 1, "steps": 1, "evaluations": 5, "loops": 1, "rows": 4, "failures": 1,
        "events": 1, "values": len(files), "bytes": sum(path.stat().st_size for path in files),
    }  # fmt: skip
    assert (found.name, found.workflow, found.status) == ("small", "study", "finished")
    assert found.last == lines[-1]["chain"]
    opened = next(line for line in lines if line["k"] == "opened")
    [where] = found.environments
    assert (where.python, where.processor, dict(where.versions), where.sessions) == (
        opened["python"], opened["processor"], opened["versions"], 1,
    )  # fmt: skip
    assert wrong(original) == []


def test_sessions_are_counted_by_environment(run: Path) -> None:
    lines = [{k: v for k, v in line.items() if k != "chain"} for line in journal(run)]
    opened = next(line for line in lines if line["k"] == "opened")
    lines += [opened, {**opened, "versions": {"numpy": "1.0"}}]
    (run / "journal.jsonl").write_bytes(chained(lines))
    found = verify(run)
    assert [(one.sessions, one.versions.get("numpy")) for one in found.environments] == [
        (2, opened["versions"]["numpy"]), (1, "1.0"),
    ]  # fmt: skip
    assert (found.status, found.damage, wrong(run)) == ("unfinished", (), [])


def test_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="there is no run in"):
        verify(tmp_path)
    assert len(wrong(tmp_path)) == 1


def test_nothing_of_the_study_is_made_and_no_circuit_is_loaded(run: Path) -> None:
    """In a process that has neither the study's module nor its classes."""
    program = (
        "import sys; from pathlib import Path; from hybridq.audit import verify\n"
        "found = verify(Path(sys.argv[1])); assert not found.findings, found.findings\n"
        "print(sorted({'qiskit', 'scipy', 'distributed'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, run], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    assert done.stdout == "[]\n"


# -- changed bytes -------------------------------------------------------------------------------------------------


def changed(run: Path, stride: int, start: int = 0) -> Iterator[tuple[Path, int, int]]:
    """Each ``stride``-th byte of the run changed in turn: file, position, flip; the file is put back afterwards."""
    for path in sorted([run / "journal.jsonl", *(run / "values").iterdir()]):
        intact = path.read_bytes()
        for position in range(start % stride, len(intact), stride):
            for flip in FLIPS:
                data = bytearray(intact)
                data[position] ^= flip
                path.write_bytes(data)
                yield path, position, flip
        path.write_bytes(intact)


def found_where_it_is(run: Path, path: Path, position: int, flip: int, intact: bytes) -> None:
    mine, theirs = verify(run).damage, wrong(run)
    place = f"{path.name} at {position} ^ {flip:#x}"
    assert mine, place
    assert theirs, place
    file = str(path.relative_to(run))
    assert mine[0].file == file, place
    assert file in theirs[0], place
    if path.name == "journal.jsonl":
        line = intact.count(b"\n", 0, position) + 1
        assert mine[0].line == line, place
        assert f"line {line}:" in theirs[0], place
    if intact[position] ^ flip != ord("\n"):  # a line cut in two is two broken lines
        assert len(mine) == len(theirs) == 1, place


def test_changed_bytes_are_found(run: Path) -> None:
    intact = (run / "journal.jsonl").read_bytes()
    for path, position, flip in changed(run, 211, start=17):
        found_where_it_is(run, path, position, flip, intact)


def test_changed_ends_of_lines_are_found(run: Path) -> None:
    path = run / "journal.jsonl"
    intact = path.read_bytes()
    for position in (i for i, byte in enumerate(intact) if byte == ord("\n")):
        for flip in FLIPS:
            path.write_bytes(intact[:position] + bytes([intact[position] ^ flip]) + intact[position + 1 :])
            found_where_it_is(run, path, position, flip, intact)


PARTS = 4  # side by side


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_changed_byte_is_found(run: Path, part: int) -> None:
    intact = (run / "journal.jsonl").read_bytes()
    sizes = [len(intact), *(path.stat().st_size for path in (run / "values").iterdir())]
    count = 0
    for path, position, flip in changed(run, PARTS, part):
        found_where_it_is(run, path, position, flip, intact)
        count += 1
    assert count == len(FLIPS) * sum(len(range(part, size, PARTS)) for size in sizes)


@given(data=st.data())
def test_both_programs_agree_on_edited_journals(original: Path, data: st.DataObject) -> None:
    """Pieces of a journal cut out, copied elsewhere or overwritten: whatever is left is sound to both or to neither."""
    path = _scratch(original) / "journal.jsonl"
    text = (original / "journal.jsonl").read_bytes()
    edges = [0, *(i + 1 for i, byte in enumerate(text) if byte == ord("\n"))]
    place = st.one_of(st.integers(0, len(text)), st.sampled_from(edges))
    for _ in range(data.draw(st.integers(1, 3))):
        first, second = sorted((data.draw(place), data.draw(place)))
        target = data.draw(place)
        piece = text[first:second] if data.draw(st.booleans()) else b""
        text = text[:first] + text[second:] if not piece else text[:target] + piece + text[target:]
    path.write_bytes(text)
    mine, theirs = verify(path.parent).damage, wrong(path.parent)
    assert bool(mine) == bool(theirs), (mine, theirs)
    lines = text.count(b"\n")
    if text != (original / "journal.jsonl").read_bytes()[: len(text)] and lines:
        assert mine or text[: text.rfind(b"\n") + 1] == _prefix(original, lines)


@functools.cache
def _scratch(original: Path) -> Path:
    """A copy of the run for all examples of a property."""
    return Path(shutil.copytree(original, original.parent / "scratch"))


def _prefix(original: Path, lines: int) -> bytes:
    return b"".join((original / "journal.jsonl").read_bytes().splitlines(keepends=True)[:lines])


@pytest.mark.parametrize("change", ["swap", "remove", "repeat", "insert", "empty line", "first", "last"])
def test_lines_that_moved_are_found(run: Path, change: str) -> None:
    path = run / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    foreign = chained([{"k": "event", "at": "x", "output": 1}])
    data = b"".join({
        "swap": [*lines[:4], lines[5], lines[4], *lines[6:]],
        "remove": [*lines[:4], *lines[5:]],
        "repeat": [*lines[:5], *lines[4:]],
        "insert": [*lines[:4], foreign, *lines[4:]],
        "empty line": [*lines[:4], b"\n", *lines[4:]],
        "first": lines[1:],
        "last": [*lines, lines[-1]],
    }[change])  # fmt: skip
    path.write_bytes(data)
    first = {"first": 1, "repeat": 6, "last": len(lines) + 1}.get(change, 5)
    assert verify(run).damage[0].line == first
    assert f"line {first}:" in wrong(run)[0]


def test_all_damage_is_told(run: Path) -> None:
    path = run / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for number in (3, 9, len(lines)):
        lines[number - 1] = lines[number - 1].replace(b'"k":"', b'"k" "')
    path.write_bytes(b"".join(lines))
    values = sorted((run / "values").iterdir())
    values[0].write_bytes(values[0].read_bytes()[:-1])
    text = next(path for path in values[1:] if path.suffix in (".npy", ".json"))
    text.unlink()
    found = verify(run)
    assert [(f.file, f.line) for f in found.damage] == [
        ("journal.jsonl", 3), ("journal.jsonl", 9), ("journal.jsonl", len(lines)), (f"values/{text.name}", None),
        (f"values/{values[0].name}", None),
    ]  # fmt: skip
    assert "is missing; journal.jsonl, line" in found.damage[3].text
    assert "do not match the checksum in its name" in found.damage[4].text
    assert len(wrong(run)) == 5


@pytest.mark.parametrize("place", [10, 4, -2, 100], ids=["digest", "head", "last member", "first member"])
def test_a_journal_of_broken_lines_is_told_line_by_line(place: int, tmp_path: Path) -> None:
    lines = chained([HEADER, *[{**EVENT, "at": f"a/now[{i}]"} for i in range(400)]]).splitlines()
    for line in (several := [bytearray(line) for line in lines])[100:300]:
        line[place] ^= 0x01
    (tmp_path / "journal.jsonl").write_bytes(b"".join(bytes(line) + b"\n" for line in several))
    assert [f.line for f in verify(tmp_path).damage] == list(range(101, 301))
    assert len(wrong(tmp_path)) == 200


def test_a_torn_last_line_is_no_damage(run: Path) -> None:
    path = run / "journal.jsonl"
    intact = path.read_bytes()
    end = intact.rindex(b"\n", 0, -1) + 1
    for size in range(end + 1, len(intact), 7):
        path.write_bytes(intact[:size])
        [note] = verify(run).findings
        assert not note.damage
        assert "a kill cut short; the next run drops it" in note.text
        assert wrong(run) == []
    path.write_bytes(intact[:-1])  # all but the end of the line, which nobody was told of
    assert verify(run).damage == ()
    assert wrong(run) == []
    path.write_bytes(b"")
    assert [f.text for f in verify(run).findings if f.file == "journal.jsonl"] == ["the run holds no record yet"]


# -- lines that are chained, and do not fit together ---------------------------------------------------------------


def fields(record: Any) -> dict[str, Any]:
    return {"k": record.kind, **{f.name: getattr(record, f.name) for f in dataclasses.fields(record)}}


PACKED = "AAAAAAAA8D8="  # 1.0
HEADER = fields(RunHeader(1, "study", "curve", "c0", "a0", [], 7, None))
CODE = fields(Code("energy", "c1", "def energy(): ..."))
PROGRAM = fields(Circuit("p1", None, None, {}, 1, 1, 1, None))
STEP = fields(Step("a/b[0]", "c1", "a1", [], 1.5, 1e9, 0.1, "worker", 0, 0))
LOOP = fields(Loop("a/m[0]", "energy", "c1", "a1", [], "COBYLA", "none"))  # line 4
ROW = fields(Row(4, 0, PACKED, -1.0, None, 0.0, None, 0.1, "driver", "p1"))
END = fields(LoopEnd(4, 1.0, 0.1))
FAILED = fields(Failure("a/b[1]", "builtins:ValueError", "no", ["no"], "", 1e9, 0.1, "", 0))
SURVIVED = fields(Survived("a/b[1]"))
EVENT = fields(Event("a/now[0]", 1.5))
BEGUN: list[Any] = [HEADER, CODE, PROGRAM, LOOP, ROW]  # five lines
NAME = hashlib.sha256(b"{").hexdigest()
DEEP = b'"k":"event","at":"x","output":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

UNFIT: dict[str, tuple[list[Any], int, str]] = {
    "no header": ([EVENT], 1, "the run's header is missing"),
    "two headers": ([*BEGUN, HEADER], 6, "a second header"),
    "another format": ([{**HEADER, "format": 2}, EVENT], 1, "has format 2, and this hybridq reads format 1"),
    "another format's header": ([{"k": "run", "format": 9, "new": 1}, {"k": "new"}], 1, "has format 9"),
    "unknown kind": ([*BEGUN, {"k": "later"}], 6, "the kind 'later'"),
    "no kind": ([*BEGUN, {"at": "x"}], 6, "the kind None"),
    "a kind that is a list": ([*BEGUN, {"k": []}], 6, "the kind []"),
    "a member too many": ([*BEGUN, {**EVENT, "n": 1}], 6, "the member 'n'"),
    "a member missing": ([*BEGUN, {"k": "event", "at": "x"}], 6, "without the member 'output'"),
    "a location that is a number": ([*BEGUN, {**EVENT, "at": 1}], 6, "the member 'at' of a 'event' record is 1"),
    "a row number that is true": ([*BEGUN, {**ROW, "i": True}], 6, "the member 'i'"),
    "a loop that is a list": ([*BEGUN, {**ROW, "loop": [4]}], 6, "the member 'loop'"),
    "not JSON": ([*BEGUN, b'"k":"event",}'], 6, "it is not a record"),
    "not UTF-8": ([*BEGUN, b'"k":"event","at":"\xff","output":1}'], 6, "it is not a record"),
    "deep": ([*BEGUN, DEEP], 6, "it is not a record"),
    "row of no loop": ([*BEGUN, {**ROW, "loop": 3, "i": 1}], 6, "line 3, where none begins"),
    "row of a later loop": ([HEADER, CODE, PROGRAM, {**ROW, "loop": 5}, LOOP], 4, "line 5, where none begins"),
    "row again": ([*BEGUN, ROW], 6, "row 0 of a/m[0] stands in a line before"),
    "row missing": ([*BEGUN, {**ROW, "i": 2}], 6, "row 2 of a/m[0] follows row 0"),
    "first row missing": ([*BEGUN[:4], {**ROW, "i": 1}], 5, "row 1 of a/m[0]"),
    "a point that is no vector": ([*BEGUN, {**ROW, "i": 1, "x": "AAAA"}], 6, "no vector"),
    "a gradient of another length": ([*BEGUN, {**ROW, "i": 1, "g": PACKED[:-1] + "A" + PACKED}], 6, "no vector"),
    "end of no loop": ([*BEGUN, {**END, "loop": 5}], 6, "line 5, where none begins"),
    "end again": ([*BEGUN, END, END], 7, "which line 6 ended"),
    "answered twice": ([*BEGUN, STEP, {**STEP, "output": 2}], 7, "a/b[0] was answered in line 6 already"),
    "answered as another kind": ([*BEGUN, {**EVENT, "at": "a/m[0]"}], 6, "a/m[0] was answered in line 4"),
    "survived nothing": ([*BEGUN, SURVIVED, FAILED], 6, "a failure of a/b[1], and none is recorded"),
    "code that is not recorded": ([*BEGUN, {**STEP, "code": "c2"}], 6, "the step's code c2 is in no line before"),
    "code recorded later": ([HEADER, STEP, CODE], 2, "the step's code c1 is in no line before"),
    "row of another program": ([*BEGUN, {**ROW, "i": 1, "program": "p2"}], 6, "the program p2 is in no line before"),
    "a value that is missing": ([*BEGUN, {**EVENT, "output": {"$": "file", "f": f"{NAME}.json"}}], 0, "line 6"),
    "a value elsewhere": ([*BEGUN, {**EVENT, "output": {"$": "npy", "f": "../owner"}}], 6, "'../owner' is not the"),
    "a value of another kind": ([*BEGUN, {**EVENT, "output": [{"$": "npy", "f": f"{NAME}.qpy"}]}], 6, "is not the"),
    "a value without a name": ([*BEGUN, {**EVENT, "output": {"$": "qpy", "f": 1}}], 6, "1 is not the name"),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "line", "words"), UNFIT.values(), ids=UNFIT.keys())
def test_lines_that_do_not_fit_are_found(lines: list[Any], line: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(chained(lines))
    found = verify(tmp_path).damage
    assert [f.line or 0 for f in found] == [line]
    assert words in str(found[0])
    theirs = wrong(tmp_path)
    assert theirs
    assert f"line {line}:" in theirs[0] if line else "line 6" in theirs[0]


def test_lines_that_fit(tmp_path: Path) -> None:
    """What the table above changes; older journals lack a member, failures come more than once."""
    row = {k: v for k, v in ROW.items() if k != "program"}
    old = {k: v for k, v in PROGRAM.items() if k != "need"}
    lines = [HEADER, CODE, old, LOOP, row, {**row, "i": 1, "g": PACKED}, END, STEP, FAILED, FAILED, SURVIVED, EVENT]
    (tmp_path / "journal.jsonl").write_bytes(chained(lines))
    assert damage(verify(tmp_path)) == []
    assert wrong(tmp_path) == []


# -- values --------------------------------------------------------------------------------------------------------


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


STORED: dict[str, tuple[str, bytes, str]] = {
    "text that is not JSON": ("json", b"{", "JSONDecodeError"),
    "an array that is pickled": ("npy", npy(np.array([{}, None])), "allow_pickle=False"),
    "an array cut off": ("npy", npy(np.arange(9.0))[:-8], "cannot be read"),
    "a circuit of old": ("qpy", b"QISKIT\x0c" + bytes(20), "is not a QPY file of version 13 or later"),
    "no circuit": ("qpy", b"PK\x03\x04" + bytes(20), "is not a QPY file"),
    "an unknown tag": ("json", b'{"$":"later"}', "unknown tag 'later'"),
    "a tag without a value": ("json", b'[{"$":"tuple"}]', "KeyError"),
    "an array inside that is none": ("json", b'{"$":"array","d":"<f8","s":[2],"v":"AAAA"}', "cannot be read"),
    "an observable of other qubits": ("json", b'{"$":"SparsePauliOp","n":2,"labels":["X"],"coeffs":1}', "no Paulis"),
}


@pytest.mark.parametrize(("suffix", "data", "words"), STORED.values(), ids=STORED.keys())
def test_values_that_cannot_be_read_are_found(suffix: str, data: bytes, words: str, tmp_path: Path) -> None:
    """Their bytes are those of their names; the stand-alone program looks no further."""
    (tmp_path / "values").mkdir()
    name = f"{hashlib.sha256(data).hexdigest()}.{suffix}"
    (tmp_path / "values" / name).write_bytes(data)
    output = {"$": "file" if suffix == "json" else suffix, "f": name}
    (tmp_path / "journal.jsonl").write_bytes(chained([HEADER, {**EVENT, "output": output}]))
    [text] = damage(verify(tmp_path))
    assert text.startswith("journal.jsonl, line 2: its output cannot be read: ")
    assert words in text


def test_what_can_be_stored_can_be_verified(tmp_path: Path) -> None:
    from qiskit.primitives import BitArray
    from qiskit.quantum_info import SparsePauliOp
    from scipy.optimize import LbfgsInvHessProduct, OptimizeResult

    big = np.arange(2000.0)
    few, many = (LbfgsInvHessProduct(np.ones((10, n)), np.ones((10, n))) for n in (2, 300))
    made = [
        None, 2**90_000, -0.0, float("nan"), "\udcff", b"x" * 9, 1 + 2j, (1, [2, {3: (4,)}]), {"$": 1}, "y" * 9999,
        {frozenset({Point(1.0)}): {1}}, np.str_("ü" * 900), np.float32(1.5), np.array(["a", "bc"]), big,
        [Point(2.0), {"deep": [big]}],
        CIRCUIT, SparsePauliOp(["XX", "ZI"], [1.0, 2.0]), SparsePauliOp(["XX"] * 200, big[:200]),
        BitArray.from_counts({"01": 3, "11": 9}), BitArray.from_counts({hex(n): 9 for n in range(400)}),
        OptimizeResult(x=big, fun=np.float64(1.0), success=True, message="done", hess_inv=many), few,
        hq.Aer(method="stabilizer"),
    ]  # fmt: skip
    journal = Journal(tmp_path / "run")
    journal.append(RunHeader(1, "study", "curve", "c0", "a0", [], 7, None))
    for i, value in enumerate(made):
        journal.append(Event(f"x[{i}]", journal.store(encode(value))))
    journal.close()
    assert damage(verify(tmp_path / "run")) == []
    assert wrong(tmp_path / "run") == []
    (tmp_path / "run/values" / f"{NAME}.json").write_bytes(b"[")
    [text] = damage(verify(tmp_path / "run"))
    assert "do not match the checksum in its name; nothing that could be read refers to it" in text
    assert len(wrong(tmp_path / "run")) == 1


# -- around them ---------------------------------------------------------------------------------------------------


def test_what_stands_around_is_noted(run: Path) -> None:
    (run / "values" / f"{NAME}.json").write_bytes(b"{")
    (run / "values" / f".{NAME}.json.12.part").write_bytes(b"")
    (run / "values" / "notes.txt").write_bytes(b"")
    (run / "figure.png").write_bytes(b"")
    (run / "elsewhere").symlink_to("/")
    (run / "owner").write_text('{"host":"a","pid":1,"since":0}')
    (run / "values").chmod(0o755)
    run.chmod(0o750)
    found = verify(run)
    assert found.damage == ()
    assert {(note.file, note.text.partition(";")[0].partition(":")[0]) for note in found.notes} == {
        ("elsewhere", "a link that is no part of a run"),
        ("figure.png", "a file that is no part of a run"),
        ("owner", "a driver has the run open, or was killed"),
        (".", "has mode 0750"),
        ("values", "has mode 0755"),
        (f"values/{NAME}.json", "nothing refers to it"),
        (f"values/.{NAME}.json.12.part", "a value that a kill cut short"),
        ("values/notes.txt", "no value of a run"),
    }
    assert wrong(run) == []


@pytest.mark.parametrize("what", ["journal.jsonl", "owner", "values", "one value"])
def test_links_are_damage(run: Path, what: str) -> None:
    """Whatever they point at, equal bytes included."""
    path = sorted((run / "values").iterdir())[0] if what == "one value" else run / what
    away = run.parent / "away"
    path.rename(away)
    path.symlink_to(away)
    texts = damage(verify(run))
    assert texts[0].startswith(f"{path.relative_to(run)}: ") or what == "values"
    assert any("symbolic link" in text for text in texts)


# -- the program that knows no hybridq -----------------------------------------------------------------------------


def test_the_stand_alone_program_is_short_and_imports_the_standard_library_alone() -> None:
    text = TOOL.read_text()
    assert len(text.splitlines()) < 200
    tree = ast.parse(text)
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
    assert "__import__" not in text
    assert "importlib" not in text


def test_the_stand_alone_program_runs_without_hybridq(run: Path, tmp_path: Path) -> None:
    """Isolated and without site-packages, as on a machine that has nothing but Python."""

    def check(*places: Path | str, code: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-S", TOOL, *places]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60, env=environment
        )
        assert done.returncode == code, done.stderr
        return done

    assert "nothing wrong" in check(run, code=0).stdout
    path = run / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b"COBYLA", b"cobyla", 1))
    done = check(run, code=1)
    line = next(n for n, line in enumerate(path.read_bytes().splitlines(), 1) if b"cobyla" in line)
    assert done.stdout.startswith(f"{path}, line {line}: the checksum does not match\n")
    assert done.stdout.endswith("1 wrong\n")
    assert check(tmp_path, run, code=1).stdout.count("wrong\n") == 2
    assert "check_run.py" in check(code=2).stderr
