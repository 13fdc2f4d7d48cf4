"""The run directory: nothing acknowledged is lost, no damage goes unseen, and one driver at a time writes."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hybridq import journal as journals
from hybridq.errors import Corrupt, JournalError, Locked, Version, WorkflowError
from hybridq.journal import (
    Circuit,
    Code,
    End,
    Evaluation,
    Event,
    Failure,
    Journal,
    Loop,
    LoopEnd,
    Opened,
    Record,
    Row,
    RunHeader,
    Step,
    Survived,
    load_value,
    pack_array,
    read_records,
    run_directory,
    run_names,
    unpack_array,
)
from hybridq.values import decode, encode

HEADER = RunHeader(1, "study", "curve", "c0", "a0", [0.5, {"$": "tuple", "v": []}], 7, None)
RECORDS: list[Record] = [
    HEADER,
    Opened("host", 12, 1.5, "3.11", "x86_64", {"numpy": "2.0"}, ["python", "naïve \udcff.py"]),
    Code("energy", "c1", "def energy():\n    return 'ü\u2028'\n"),
    Circuit("p1", {"$": "qpy", "f": "x"}, None, {"engine": "aer"}, 2, 3, 4, None),
    Step("a/b[0]", "c1", "a1", [1, None], {"k": -0.0}, 1e9, 0.1, "worker", 0, 2**40),
    Evaluation("a/e[0]", "p1", [0.1], None, {"v": 5e-324}, 1e9, 0.25, "driver", 1, 0),
    Loop("a/m[0]", "energy", "c1", "a1", [], "L-BFGS-B", "adjoint"),
    Row(7, 0, pack_array(np.array([0.1, -0.0])), -1.25, pack_array(np.array([0.5, 2.0])), 0.0, None, 0.001, "driver"),
    Row(7, 1, "", 1.7976931348623157e308, None, 0.5, 100, 0.001, ""),
    LoopEnd(7, {"$": "OptimizeResult", "v": {}}, 2.5),
    Failure("a/b[1]", "builtins:ValueError", "no", ["no"], "Traceback\n", 1e9, 0.1, "worker", 2),
    Survived("a/b[1]"),
    Event("a/now[0]", 1.5),
    End("finished", None, None, 3.0, 1e9),
]
SMALL: list[Record] = [HEADER, Event("n[0]", 1.5), Survived("é[1]"), Event("n[1]", [])]


def write(directory: Path, records: list[Record]) -> Path:
    journal = Journal(directory)
    for record in records:
        journal.append(record)
    journal.close()
    return directory / "journal.jsonl"


def replace(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def chained(lines: list[dict[str, Any]]) -> bytes:
    """A journal written without the code under test."""
    chain, data = "0" * 64, b""
    for line in lines:
        rest = json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode()[1:]
        chain = hashlib.sha256(chain.encode() + rest).hexdigest()
        data += b'{"chain":"' + chain.encode() + b'",' + rest + b"\n"
    return data


def verify(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal, their chain checked without the code under test."""
    chain, lines = "0" * 64, []
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    for raw in data.split(b"\n")[:-1]:
        line = json.loads(raw)
        rest = raw[len('{"chain":""') + 64 + 1 :]
        found = hashlib.sha256(chain.encode() + rest).hexdigest()
        assert line.pop("chain") == found
        chain = found
        lines.append(line)
    return lines


# -- what was written comes back -----------------------------------------------------------------------------------


def test_each_kind_of_record_comes_back_equal(store: Path) -> None:
    assert {type(r) for r in RECORDS} == set(journals._FIELDS)
    write(store, RECORDS)
    found = read_records(store)
    assert [number for number, _ in found] == list(range(1, len(RECORDS) + 1))
    assert [record for _, record in found] == RECORDS
    again = Journal(store)
    assert again.records == found
    again.close()


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_a_line_is_the_json_of_its_record(record: Record) -> None:
    fields = {"k": record.kind, **{f.name: getattr(record, f.name) for f in dataclasses.fields(record)}}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    assert journals._text(record) == text.encode("utf-8", "backslashreplace")[1:]


def test_a_value_that_knows_its_json_is_written_as_any_other() -> None:
    array = encode(np.array([0.25, -1.0])).document
    event = Event("study/now[0]", array)
    assert journals._text(event) == journals._text(Event("study/now[0]", dict(array)))


def test_the_chain_is_what_the_module_says(store: Path) -> None:
    path = write(store, RECORDS)
    lines = verify(path)
    assert [line.pop("k") for line in lines] == [r.kind for r in RECORDS]
    for line, record in zip(lines, RECORDS, strict=True):
        assert line == {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}


def test_a_journal_written_elsewhere_is_read(store: Path) -> None:
    store.mkdir()
    lines = [{"k": r.kind, **{f.name: getattr(r, f.name) for f in dataclasses.fields(r)}} for r in SMALL]
    replace(store / "journal.jsonl", chained(lines))
    assert [r for _, r in read_records(store)] == SMALL


def test_a_journal_from_before_predictions_is_read(store: Path) -> None:
    records = [HEADER, *(next(r for r in RECORDS if isinstance(r, kind)) for kind in (Circuit, Row))]
    store.mkdir()
    lines = [{"k": r.kind, **{f.name: getattr(r, f.name) for f in dataclasses.fields(r)}} for r in records]
    del lines[1]["need"], lines[2]["program"]
    replace(store / "journal.jsonl", chained(lines))
    assert [r for _, r in read_records(store)] == records
    del lines[1]["plan"]
    replace(store / "journal.jsonl", chained(lines))
    with pytest.raises(Version, match="line 2"):
        read_records(store)


def test_append_counts_lines_and_a_later_driver_goes_on(store: Path) -> None:
    for opening in range(3):
        journal = Journal(store)
        assert len(journal.records) == 2 * opening
        assert journal.append(HEADER if opening == 0 else Event("x", opening)) == 2 * opening + 1
        assert journal.append(Event("y", opening)) == 2 * opening + 2
        journal.close()
    assert len(verify(store / "journal.jsonl")) == 6


def test_a_record_is_in_the_file_when_append_returns(store: Path) -> None:
    journal = Journal(store)
    for count, record in enumerate(RECORDS, start=1):
        journal.append(record)
        assert len(verify(store / "journal.jsonl")) == count
    journal.close()


def test_floats_come_back_to_the_bit(store: Path) -> None:
    numbers = [0.1, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, 2**53 + 1.0]
    write(store, [HEADER, *(Event("x", n) for n in numbers)])
    found = [r.output for _, r in read_records(store)[1:] if isinstance(r, Event)]
    assert [n.hex() for n in found] == [n.hex() for n in numbers]


def test_what_is_no_number_is_no_record_and_harms_nothing(store: Path) -> None:
    journal = Journal(store)
    journal.append(HEADER)
    with pytest.raises(ValueError, match="JSON compliant"):
        journal.append(Event("x", float("nan")))
    journal.append(Event("x", 1.0))
    journal.close()
    assert len(verify(store / "journal.jsonl")) == 2


def test_a_row_of_fifty_parameters_takes_a_kilobyte() -> None:
    rng = np.random.default_rng(1)
    x, g = (pack_array(rng.uniform(-np.pi, np.pi, 50)) for _ in range(2))
    ends = 8 + 1 + 64 + 2 + 1  # of the line: the chain and the newline
    for gradient, limit in ((None, 1024), (g, 1638)):
        row = Row(123_456, 99_999, x, -1.2345678901234567, gradient, 0.0123456789012345, 10**5, 0.00123456789, "w" * 60)
        assert len(journals._text(row)) + ends < limit


@given(hnp.arrays(np.float64, st.integers(0, 6)))
def test_packed_vectors_come_back_to_the_bit(array: np.ndarray[Any, Any]) -> None:
    found = unpack_array(pack_array(array))
    assert found.tobytes() == array.tobytes()
    assert found.dtype == np.float64
    assert found.shape == array.shape
    found[...] = 0.0  # writable, and not the text's


def test_eight_threads_keep_the_chain(store: Path) -> None:
    journal = Journal(store)
    journal.append(HEADER)

    def work(thread: int) -> list[int]:
        values = [journal.store(encode(np.full(300, float(i % 5)))) for i in range(40)]
        return [journal.append(Event(f"{thread}[{i}]", value)) for i, value in enumerate(values)]

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(work, range(8)))
    journal.close()
    assert sorted(n for ns in numbers for n in ns) == list(range(2, 322))
    found = dict(read_records(store))
    for thread, ns in enumerate(numbers):
        assert ns == sorted(ns)
        for i, n in enumerate(ns):
            record = found[n]
            assert isinstance(record, Event)
            assert record.at == f"{thread}[{i}]"
            assert decode(load_value(store, record.output))[0] == i % 5
    assert len(verify(store / "journal.jsonl")) == 321
    assert len(list((store / "values").iterdir())) == 5


def test_directories_and_files_are_the_owners_alone(store: Path) -> None:
    before = os.umask(0)
    try:
        journal = Journal(store / "run")
        journal.append(HEADER)
        journal.close()
    finally:
        os.umask(before)
    for path, mode in [("run", 0o700), ("run/values", 0o700), ("run/journal.jsonl", 0o600), ("run/owner", 0o600)]:
        assert stat.S_IMODE((store / path).stat().st_mode) == mode


# -- damage --------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(store: Path) -> None:
    records = SMALL[:3]
    path = write(store, records)
    intact = path.read_bytes()
    for position in range(len(intact)):
        for bit in range(8):
            damaged = bytearray(intact)
            damaged[position] ^= 1 << bit
            replace(path, bytes(damaged))
            with pytest.raises((Corrupt, Version)) as caught:
                read_records(store)
            assert str(path) in str(caught.value)


def test_damage_stops_a_driver_before_it_writes(store: Path) -> None:
    path = write(store, SMALL)
    damaged = path.read_bytes().replace(b"1.5", b"1.6")
    replace(path, damaged)
    with pytest.raises(Corrupt, match=r"journal\.jsonl, line 2: its checksum does not match"):
        Journal(store)
    assert path.read_bytes() == damaged
    replace(path, damaged.replace(b"1.6", b"1.5"))
    Journal(store).close()  # and the refusal left no lock behind


@pytest.mark.parametrize("change", ["swap", "remove", "repeat", "insert", "empty line", "first"])
def test_lines_that_moved_are_found(store: Path, change: str) -> None:
    path = write(store, SMALL)
    lines = path.read_bytes().splitlines(keepends=True)
    other = store.parent / "other"
    foreign = write(other, [HEADER, Event("foreign", 1)]).read_bytes().splitlines(keepends=True)[1]
    changed = {
        "swap": [lines[0], lines[2], lines[1], lines[3]],
        "remove": [lines[0], *lines[2:]],
        "repeat": [lines[0], lines[1], *lines[1:]],
        "insert": [*lines[:2], foreign, *lines[2:]],
        "empty line": [lines[0], b"\n", *lines[1:]],
        "first": lines[1:],
    }[change]
    replace(path, b"".join(changed))
    with pytest.raises(Corrupt):
        read_records(store)


def test_a_torn_tail_is_dropped_at_each_of_its_bytes(store: Path) -> None:
    path = write(store, RECORDS)
    intact = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(intact) if byte == ord("\n")]
    assert len(ends) == len(RECORDS)
    for size in range(ends[-4], len(intact) + 1):
        replace(path, intact[:size])
        whole = sum(end <= size for end in ends)
        assert [r for _, r in read_records(store)] == RECORDS[:whole]
        if size % 7 == 0 or size in ends:
            journal = Journal(store)
            assert path.stat().st_size == ends[whole - 1]
            assert journal.append(Event("again", size)) == whole + 1
            journal.close()
            assert verify(path)[-1] == {"k": "event", "at": "again", "output": size}


def test_a_run_cut_off_in_its_first_line_starts_anew(store: Path) -> None:
    path = write(store, SMALL)
    replace(path, path.read_bytes()[:50])
    journal = Journal(store)
    assert journal.records == []
    assert journal.append(HEADER) == 1
    journal.close()
    assert len(verify(path)) == 1


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ({"k": "run", **{**vars(HEADER), "format": 2}}, Version),
        ({"k": "run", "format": 99, "whatever": []}, Version),
        ({"k": "header of another kind", "format": 3}, Version),
        ({"k": "run", **{**vars(HEADER), "more": 1}}, Version),
        ({"k": "event", "at": "x", "output": 1}, Corrupt),
    ],
)
def test_a_run_of_another_format_is_refused_untouched(store: Path, line: Any, error: type[Exception]) -> None:
    store.mkdir()
    data = chained([line]) + b'{"chain":"torn'
    replace(store / "journal.jsonl", data)
    for look in (read_records, Journal):
        with pytest.raises(error, match=r"journal\.jsonl"):
            look(store)
    assert (store / "journal.jsonl").read_bytes() == data


@pytest.mark.parametrize(
    "line", [{"k": "event", "at": "x"}, {"k": "later"}, {"k": "event", "at": "x", "output": 1, "n": 1}, {}]
)
def test_a_record_of_another_version_is_refused_by_line(store: Path, line: Any) -> None:
    store.mkdir()
    replace(store / "journal.jsonl", chained([{"k": "run", **vars(HEADER)}, line]))
    with pytest.raises(Version, match="line 2"):
        read_records(store)


@pytest.mark.parametrize(
    "rest", [b"not json}", b'"k":"event","at":' + b"[" * 5000 + b"]" * 5000 + b',"output":1}', b'"k":"\xff"}']
)
def test_hostile_lines_with_a_right_checksum_are_refused(store: Path, rest: bytes) -> None:
    store.mkdir()
    first = chained([{"k": "run", **vars(HEADER)}])
    chain = hashlib.sha256(json.loads(first)["chain"].encode() + rest).hexdigest()
    replace(store / "journal.jsonl", first + b'{"chain":"' + chain.encode() + b'",' + rest + b"\n")
    with pytest.raises(Corrupt, match="line 2"):
        read_records(store)


def test_there_is_no_run(store: Path) -> None:
    with pytest.raises(JournalError, match="there is no run in"):
        read_records(store)


# -- values --------------------------------------------------------------------------------------------------------


def test_values_are_kept_inline_or_in_files(store: Path) -> None:
    journal = Journal(store)
    made = [1.5, {"a": [1, 2]}, "x" * 4000, "x" * 5000, "\udc80" * 2000, np.arange(10.0), np.arange(1000.0),
            [np.arange(1000.0), "y" * 5000]]  # fmt: skip
    documents = [journal.store(encode(value)) for value in made]
    assert documents[0] == 1.5
    for value, document in zip(made, documents, strict=True):
        np.testing.assert_equal(decode(journal.load(document)), value)
        np.testing.assert_equal(decode(load_value(store, json.loads(json.dumps(document)))), value)
    names = {p.name for p in (store / "values").iterdir()}
    assert len(names) == 4  # the array of the last value is that of the one before
    for name in names:
        assert hashlib.sha256((store / "values" / name).read_bytes()).hexdigest() == name.partition(".")[0]
    journal.close()


def test_every_flipped_bit_of_a_value_is_found(store: Path) -> None:
    journal = Journal(store)
    document = journal.store(encode(np.arange(130.0)))
    journal.close()
    (path,) = (store / "values").iterdir()
    intact = path.read_bytes()
    for position in range(0, len(intact), 3):
        replace(path, intact[:position] + bytes([intact[position] ^ (1 << position % 8)]) + intact[position + 1 :])
        with pytest.raises(Corrupt, match=path.name):
            load_value(store, document)
    for damaged in (b"", intact[:-1], intact + b"\0"):
        replace(path, damaged)
        with pytest.raises(Corrupt, match="do not match the checksum in its name"):
            load_value(store, document)
    replace(path, intact)
    assert decode(load_value(store, document))[-1] == 129.0


def test_a_missing_value_is_named(store: Path) -> None:
    journal = Journal(store)
    document = journal.store(encode({"a": [np.arange(130.0)]}))
    (path,) = (store / "values").iterdir()
    path.unlink()
    with pytest.raises(Corrupt, match=rf"{path.name} is missing"):
        journal.load(document)
    path.mkdir()
    with pytest.raises(Corrupt, match=path.name):
        journal.load(document)
    journal.close()


@pytest.mark.parametrize(
    "name",
    [
        "../journal.jsonl",
        "/etc/passwd",
        "x",
        "0" * 64,
        "0" * 63 + ".npy",
        "0" * 64 + ".pkl",
        "A" * 64 + ".npy",
        "0" * 64 + ".npy\n",
        "",
    ],
)
def test_values_are_read_from_their_directory_alone(store: Path, name: str) -> None:
    write(store, SMALL)
    for document in ({"$": "npy", "f": name}, {"$": "file", "f": name}, [{"deep": {"$": "qpy", "f": name}}]):
        with pytest.raises(Corrupt, match="is not the name of a stored value"):
            load_value(store, document)


def test_a_value_larger_than_any_is_not_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(store)
    document = journal.store(encode(np.arange(1000.0)))
    journal.close()
    (path,) = (store / "values").iterdir()
    monkeypatch.setattr(journals, "MAX_VALUE_BYTES", path.stat().st_size - 1)
    with pytest.raises(Corrupt, match=rf"{path.name} has 8,128 bytes, more than any stored value \(8,127\)"):
        load_value(store, document)


def test_what_a_killed_driver_left_half_written_is_removed(store: Path) -> None:
    write(store, SMALL)
    part = store / "values" / f".{'0' * 64}.npy.123.part"
    part.write_bytes(b"half")
    Journal(store).close()
    assert list((store / "values").iterdir()) == []


# -- one driver at a time ------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from hybridq.journal import Journal, Event, RunHeader
journal = Journal(Path(sys.argv[1]))
journal.append(RunHeader(1, "study", "curve", "c", "a", None, 7, None))
for i in range(5):
    journal.append(Event(f"x[{i}]", i))
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(store: Path) -> Iterator[subprocess.Popen[str]]:
    """A driver in a process of its own that has the run open."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_driver_in_this_process_is_refused(store: Path) -> None:
    journal = Journal(store)
    with pytest.raises(Locked, match=rf"in use by process {os.getpid()}@{socket.gethostname()} since"):
        Journal(store)
    with pytest.raises(Locked):  # nor can it be taken over while it lives
        Journal(store, take_over=True)
    journal.append(HEADER)
    journal.close()
    Journal(store).close()


def test_a_driver_in_another_process_is_named_and_its_death_frees_the_run(
    store: Path, owner: subprocess.Popen[str]
) -> None:
    with pytest.raises(Locked, match=rf"in use by process {owner.pid}@{socket.gethostname()} since"):
        Journal(store)
    assert len(read_records(store)) == 6  # reading needs no ownership
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    journal = Journal(store)
    assert len(journal.records) == 6
    assert journal.append(Event("after", 1)) == 7
    journal.close()
    assert len(verify(store / "journal.jsonl")) == 7


def test_a_driver_on_another_host_has_to_be_taken_over(store: Path) -> None:
    path = write(store, SMALL)
    left = json.dumps({"host": "elsewhere", "pid": 4711, "since": 0.0})
    (store / "owner").write_text(left)
    with pytest.raises(Locked, match=r"left open by process 4711@elsewhere since .*--take-over"):
        Journal(store)
    assert (store / "owner").read_text() == left
    journal = Journal(store, take_over=True)
    journal.append(Event("mine", 1))
    assert json.loads((store / "owner").read_text())["host"] == socket.gethostname()
    journal.close()
    assert (store / "owner").read_text() == ""
    assert len(verify(path)) == len(SMALL) + 1


@pytest.mark.parametrize("text", ["junk", "[]", '{"host": 1}', "null", '{"host":"a","pid":"x","since":0}'])
def test_an_owner_that_cannot_be_read_has_to_be_taken_over(store: Path, text: str) -> None:
    write(store, SMALL)
    (store / "owner").write_text(text)
    with pytest.raises(Locked, match="an unknown host"):
        Journal(store)
    Journal(store, take_over=True).close()


def test_closing_twice_is_closing_once_and_ends_recording(store: Path) -> None:
    journal = Journal(store)
    journal.append(HEADER)
    threads = threading.active_count()
    journal.close()
    journal.close()
    assert threading.active_count() == threads - 1
    stranger = os.open(store / "stranger", os.O_WRONLY | os.O_CREAT)  # takes the number of the journal's file
    try:
        for use in (lambda: journal.append(Event("late", 1)), journal.sync):
            with pytest.raises(JournalError, match="is closed"):
                use()
    finally:
        os.close(stranger)
    assert (store / "stranger").read_bytes() == b""
    assert len(verify(store / "journal.jsonl")) == 1


# -- a disk that fails ---------------------------------------------------------------------------------------------

FILL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from hybridq.errors import JournalError
from hybridq.journal import Event, Journal, RunHeader
from hybridq.values import encode
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
journal = None
try:
    journal = Journal(Path(sys.argv[1]))
    if not journal.records:
        journal.append(RunHeader(1, "study", "curve", "c", "a", None, 7, None))
    for i in range(len(journal.records), 30):
        journal.append(Event(f"x[{i}]", journal.store(encode(i if i % 10 else [i] * 3000))))
        print("acknowledged", i, flush=True)
except JournalError as error:
    print("stopped:", error)
    if journal is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if limit >= 250:
            journal.append(Event("after", 1))  # there is space again
        journal.close()
"""


def fill(directory: Path, limit: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(directory), str(limit)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("limit", [20, 60, 250, 1000, 1024, 5000])
def test_a_full_disk_stops_clearly_and_loses_nothing(store: Path, limit: int) -> None:
    lines = fill(store, limit)
    assert lines[-1].startswith("stopped:")
    assert "File too large" in lines[-1]
    acknowledged = sum(line.startswith("acknowledged") for line in lines)
    if limit >= 250:
        found = verify(store / "journal.jsonl")  # no line is left cut in two
        assert found[-1] == {"k": "event", "at": "after", "output": 1}
        assert acknowledged <= len(found) - 1
        assert [line["at"] for line in found[1 : acknowledged + 1]] == [f"x[{i}]" for i in range(acknowledged)]
    assert not list((store / "values").glob(".*.part"))
    more = fill(store, 10**9)
    assert "stopped" not in more[-1]
    verify(store / "journal.jsonl")


class Disk:
    """System calls that fail with an error at a given time, as a disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.calls = 0

    def fail(self, name: str, code: int, at: int = 1, *, after: int = 0) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def call(fd: int, *args: Any) -> Any:
            self.calls += 1
            if self.calls == at:
                if after:
                    real(fd, args[0][:after])
                raise OSError(code, os.strerror(code))
            return real(fd, *args)

        self._monkeypatch.setattr(os, name, call)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("after", [0, 1, 70])
def test_a_record_that_could_not_be_written_whole_leaves_no_trace(
    store: Path, disk: Disk, code: int, after: int
) -> None:
    journal = Journal(store)
    journal.append(HEADER)
    disk.fail("write", code, at=2, after=after)
    assert journal.append(Event("a", 1)) == 2
    with pytest.raises(JournalError, match="writing a record failed") as caught:
        journal.append(Event("b", 1))
    assert os.strerror(code) in str(caught.value)
    verify(store / "journal.jsonl")
    assert journal.append(Event("c", 1)) == 3
    journal.close()
    assert [line.get("at") for line in verify(store / "journal.jsonl")] == [None, "a", "c"]
    assert disk.calls == 3


def test_a_file_that_could_not_be_cut_back_takes_no_more(
    store: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(store)
    journal.append(HEADER)

    def stuck(fd: int, size: int) -> None:
        raise OSError(errno.EIO, "stuck")

    disk.fail("write", errno.ENOSPC, at=1, after=30)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", stuck)
        with pytest.raises(JournalError, match="writing a record failed"):
            journal.append(Event("a", 1))
    with pytest.raises(JournalError, match="nothing more is recorded"):
        journal.append(Event("b", 1))
    journal.close()
    again = Journal(store)
    assert [r for _, r in again.records] == [HEADER]
    again.close()


@pytest.mark.parametrize("kind", ["journal", "value", "directory"])
def test_a_failed_fsync_is_never_tried_again(
    store: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(journals, "_FSYNC_WITHIN", 3600.0)  # no sync but ours
    journal = Journal(store)
    journal.append(HEADER)
    if kind != "journal":
        journal.store(encode(np.arange(1000.0)))
    disk.fail("fsync", errno.EIO, at={"journal": 1, "value": 1, "directory": 2}[kind])
    with pytest.raises(JournalError, match="making records durable failed"):
        journal.sync()
    calls = disk.calls
    for use in (journal.sync, lambda: journal.append(Event("a", 1))):
        with pytest.raises(JournalError, match="nothing more is recorded"):
            use()
    journal.close()
    assert disk.calls == calls
    assert len(verify(store / "journal.jsonl")) == 1


def test_a_failed_fsync_in_the_background_is_raised_by_the_next_call(
    store: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "_FSYNC_WITHIN", 0.0)
    journal = Journal(store)
    disk.fail("fsync", errno.EIO)
    journal.append(HEADER)
    journal._syncer.join(timeout=60)
    assert not journal._syncer.is_alive()
    with pytest.raises(JournalError, match="making records durable failed"):
        journal.append(Event("a", 1))
    journal.close()


def test_written_records_are_synced_without_being_asked(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = threading.Event(), os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        if os.readlink(f"/proc/self/fd/{fd}").endswith("journal.jsonl"):
            synced.set()

    monkeypatch.setattr(os, "fsync", fsync)
    journal = Journal(store)
    assert not synced.is_set()
    journal.append(HEADER)
    assert synced.wait(60)
    journal.close()


def test_values_are_made_durable_before_the_records_that_name_them(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, real = [], os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)

    monkeypatch.setattr(journals, "_FSYNC_WITHIN", 3600.0)
    monkeypatch.setattr(os, "fsync", fsync)
    journal = Journal(store)
    assert order == [store.name, store.parent.name]  # a new run's own names
    order.clear()
    document = journal.store(encode(np.arange(1000.0)))
    journal.append(Event("a", document))
    journal.sync()
    assert order == [document["f"], "values", "journal.jsonl"]
    journal.close()


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_an_interrupt_within_a_write_leaves_nothing_half_done(
    store: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    journal = Journal(store)
    journal.append(HEADER)
    real = getattr(os, moment)

    def interrupted(*args: Any) -> None:
        if moment == "write":
            real(*args)  # Ctrl-C between a write and the note of it
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.append(Event("a", journal.store(encode(np.arange(1000.0)))))
    assert not list((store / "values").glob(".*"))
    document = journal.store(encode(np.arange(1000.0)))
    assert journal.append(Event("b", document)) == 2
    journal.close()
    assert [line.get("at") for line in verify(store / "journal.jsonl")] == [None, "b"]
    assert decode(load_value(store, document))[-1] == 999.0


def test_a_failure_stays_known(store: Path, disk: Disk) -> None:
    journal = Journal(store)
    disk.fail("write", errno.ENOSPC, at=1)
    with pytest.raises(JournalError) as caught:
        journal.append(HEADER)
    journal.append(HEADER)  # there is space again, but whoever asked before went on without a record
    assert journal.failure is caught.value
    journal.close()


def test_a_value_damaged_while_nobody_looked_is_written_again(store: Path) -> None:
    journal = Journal(store)
    document = journal.store(encode(np.arange(1000.0)))
    journal.close()
    (path,) = (store / "values").iterdir()
    replace(path, b"")  # as a power loss before the first sync leaves it
    journal = Journal(store)
    assert journal.store(encode(np.arange(1000.0))) == document
    assert decode(journal.load(document))[-1] == 999.0
    assert journal.failure is None
    journal.close()


def test_a_full_device_is_no_place_for_a_journal(store: Path) -> None:
    journal = Journal(store)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._fd)
    os.close(full)
    with pytest.raises(JournalError, match="No space left on device"):
        journal.append(HEADER)
    with pytest.raises(JournalError, match="nothing more is recorded"):  # a device cannot be cut back
        journal.append(HEADER)
    journal.close()
    assert read_records(store) == []


def test_a_value_that_could_not_be_written_leaves_no_trace(store: Path) -> None:
    journal = Journal(store)
    shutil.rmtree(store / "values")
    with pytest.raises(JournalError, match="writing a value failed"):
        journal.store(encode(np.arange(1000.0)))
    (store / "values").mkdir()
    journal.load(journal.store(encode(np.arange(1000.0))))
    journal.close()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_named(store: Path) -> None:
    store.mkdir(mode=0o500)
    with pytest.raises(JournalError, match="cannot be opened for writing"):
        Journal(store / "run")


# -- hostile directories -------------------------------------------------------------------------------------------

HOSTILE = [
    "../x",
    "..",
    ".",
    "/abs",
    "a/b",
    "a\\b",
    "a\0b",
    "",
    "x" * 65,
    ".hidden",
    "-option",
    "_x",
    "a b",
    "naïve",
    "a\n",
    "~",
    "$HOME",
    "a:b",
    "*",
    "٣",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_of_runs_are_refused(store: Path, name: str) -> None:
    with pytest.raises(WorkflowError, match="cannot name a run"):
        run_directory(store, name)


@pytest.mark.parametrize("name", ["a", "A9", "0", "h2-curve", "a.b_c-d", "x" * 64, "a..b"])
def test_harmless_names_of_runs(store: Path, name: str) -> None:
    assert run_directory(store, name) == store / name
    assert not store.exists()  # looking creates nothing


def test_a_run_that_is_a_link_or_a_file_is_refused(store: Path) -> None:
    store.mkdir()
    (store / "away").symlink_to(store.parent)
    (store / "nowhere").symlink_to(store / "missing")
    (store / "file").write_text("")
    for name in ("away", "nowhere", "file"):
        with pytest.raises(WorkflowError, match="is not a directory"):
            run_directory(store, name)


@pytest.mark.parametrize("name", ["owner", "journal.jsonl", "values"])
def test_links_inside_a_run_are_not_written_through(store: Path, name: str) -> None:
    outside = store.parent / "outside"
    if name == "values":
        outside.mkdir()
    else:
        outside.write_bytes(b"precious")
    write(store, SMALL)
    kept = store / name
    shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    kept.symlink_to(outside)
    with pytest.raises(JournalError):
        Journal(store)
    assert list(outside.iterdir()) == [] if name == "values" else outside.read_bytes() == b"precious"


def test_names_of_runs_are_listed_oldest_first(store: Path) -> None:
    assert run_names(store) == []
    for age, name in enumerate(["c", "a", "b"]):
        path = write(store / name, [HEADER])
        os.utime(path, (age, age))
    (store / "empty").mkdir()
    (store / "file").write_text("")
    (store / "link").symlink_to(store / "a")
    assert run_names(store) == ["c", "a", "b"]
