"""A run beside the same run made again: grades of outputs, with bounds written out here."""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter
from qiskit.quantum_info import SparsePauliOp
from runs import recorded
from scipy.optimize import LbfgsInvHessProduct, OptimizeResult

import hybridq as hq
from hybridq import comparison
from hybridq.comparison import GRADES, PARTS, Compared, Comparison, begin_again, compare, finished
from hybridq.errors import Corrupt, JournalError, WorkflowError
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
)
from hybridq.values import decode, encode

HEADER = RunHeader(1, "study", "curve", "c0", "a0", [0.5], 7, None)
OPENED = Opened("host", 12, 1.5, "3.11", "x86_64", {"numpy": "2.0"}, ["study.py", "4"])
END = End("finished", 1.5, None, 3.0, 1e9)
LOOP = Loop("a/m[0]", "energy", "c1", "a1", [], "COBYLA", "none")


def step(at: str, output: Any, code: str = "c1") -> Step:
    return Step(at, code, "a1", [], output, 1e9, 0.1, "worker", 0, 0)


def write(directory: Path, *entries: Record) -> Path:
    """A run's record."""
    journal = Journal(directory)
    for record in entries:
        journal.append(record)
    journal.close()
    return directory


def made(directory: Path, *outputs: Any) -> Path:
    """A finished run with a step for each output."""
    journal = Journal(directory)
    journal.append(HEADER)
    journal.append(OPENED)
    for i, output in enumerate(outputs):
        journal.append(step(f"a/b[{i}]", journal.store(encode(output))))
    journal.append(END)
    journal.close()
    return directory


def outputs(found: Comparison, part: str) -> list[Compared]:
    return [output for output in found.outputs if output.part == part]


# -- two outputs ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """A class of a study's own."""

    x: float
    name: str = "p"


def circuit(gate: str = "ry") -> QuantumCircuit:
    found = QuantumCircuit(1)
    getattr(found, gate)(Parameter("a"), 0)
    return found


def sampled(value: Any, stderr: Any, shots: int | None = 100) -> hq.Estimate:
    return hq.Estimate(value, stderr, shots)


TINY = 1e-10
LONG = np.arange(1.0, 400.0)
ERRORS = np.full(3, 0.1)
UPDATES, OTHERS = (LbfgsInvHessProduct(np.eye(3, 40), np.eye(3, 40) + 0.01 + extra) for extra in (0.0, 1e-5))
PAIRS: dict[str, tuple[Any, Any, str]] = {
    "a number": (0.1, 0.1, "identical"),
    "no number": (math.nan, math.nan, "identical"),
    "text in a file": ("x" * 5000, "x" * 5000, "identical"),
    "an order of keys": ({"a": 1, "b": 2}, {"b": 2, "a": 1}, "identical"),
    "an inverse Hessian": (UPDATES, UPDATES, "identical"),
    "one that was recorded as a matrix": (UPDATES, UPDATES.todense(), "identical"),
    "a short one": (LbfgsInvHessProduct(np.eye(2), np.eye(2)), np.eye(2), "identical"),
    "another inverse Hessian": (UPDATES, OTHERS, "differs"),
    "another matrix": (UPDATES, OTHERS.todense(), "differs"),
    "no inverse Hessian": (UPDATES, [1.0], "differs"),
    "a circuit with other parameters": (circuit(), circuit(), "identical"),
    "a class": (Point(1.0), Point(1.0), "identical"),
    "the last bit": (0.1, math.nextafter(0.1, 1), "close"),
    "zeros": (0.0, -0.0, "close"),
    "zeros in an array": (np.array([0.0]), np.array([-0.0]), "close"),
    "large numbers": (1e12, 1e12 + 100, "close"),
    "an array": (LONG, LONG * (1 + TINY), "close"),
    "a short array": (LONG[:3], LONG[:3] + TINY, "close"),
    "deep inside": ([{"a": (1, Point(2.0))}], [{"a": (1, Point(2.0 + TINY))}], "close"),
    "a complex number": (1 + 2j, 1 + (2 + TINY) * 1j, "close"),
    "a scalar": (np.float64(1.0), np.float64(1.0 + TINY), "close"),
    "an exact value": (hq.Estimate(0.5), hq.Estimate(0.5 + TINY), "close"),
    "a sampled value that is close": (sampled(0.5, 0.1), sampled(0.5 + TINY, 0.1), "close"),
    "an observable": (SparsePauliOp(["XX"], [1.0]), SparsePauliOp(["XX"], [1 + TINY]), "close"),
    "a result": (OptimizeResult(fun=1.0, nit=2), OptimizeResult(fun=1.0 + TINY, nit=2), "close"),
    "a sampled value": (sampled(0.5, 0.1), sampled(0.5 + 0.56, 0.1), "within stderr"),  # 4 sqrt(2) 0.1 = 0.566
    "sampled values": (sampled(ERRORS, ERRORS), sampled(ERRORS + 0.56, ERRORS), "within stderr"),
    "a sampled value among others": ([1, sampled(0.5, 0.1)], [1, sampled(0.6, 0.1)], "within stderr"),
    "a sampled value far off": (sampled(0.5, 0.1), sampled(0.5 + 0.57, 0.1), "differs"),
    "one sampled value far off": (sampled(ERRORS, ERRORS), sampled(ERRORS + np.array([0, 0.57, 0]), ERRORS), "differs"),
    "other shots": (sampled(0.5, 0.1), sampled(0.6, 0.1, 200), "differs"),
    "an exact value far off": (hq.Estimate(0.5, 0.1), hq.Estimate(0.6, 0.1), "differs"),
    "other shapes of samples": (sampled(ERRORS, ERRORS), sampled(ERRORS[:2], ERRORS[:2]), "differs"),
    "a number far off": (0.1, 0.1 + 2e-9, "differs"),
    "one of an array": (LONG, np.where(LONG == 7.0, 7.1, LONG), "differs"),
    "integers": (np.arange(3), np.arange(3) + np.array([0, 0, 1]), "differs"),
    "a type of number": (1, 1.0, "differs"),
    "a truth": (1, True, "differs"),
    "a type of array": (np.arange(3.0), np.arange(3), "differs"),
    "a shape": (LONG[:4], LONG[:4].reshape(2, 2), "differs"),
    "a length": ([1, 2], [1, 2, 3], "differs"),
    "keys": ({"a": 1}, {"b": 1}, "differs"),
    "a list and a tuple": ([1.0], (1.0,), "differs"),
    "text": ("a", "b", "differs"),
    "a class's name": (Point(1.0, "p"), Point(1.0, "q"), "differs"),
    "a circuit": (circuit(), circuit("rx"), "differs"),
    "a Pauli": (SparsePauliOp(["XX"]), SparsePauliOp(["XY"]), "differs"),
    "a result's message": (OptimizeResult(message="a"), OptimizeResult(message="b"), "differs"),
    "the worst counts": ([0.1, 1.0, sampled(0.5, 0.1)], [0.1 + TINY, 2.0, sampled(0.6, 0.1)], "differs"),
}


def test_each_grade_of_outputs(tmp_path: Path) -> None:
    """Each pair in a step of its own, and the other way round."""
    sides = [[pair[side] for pair in PAIRS.values()] for side in (0, 1)]
    one, two = (made(tmp_path / str(i), *side) for i, side in enumerate(sides))
    for found in (compare(one, two), compare(two, one)):
        steps = outputs(found, "steps")
        assert {name: output.grade for name, output in zip(PAIRS, steps, strict=True)} == {
            name: grade for name, (_, _, grade) in PAIRS.items()
        }
        expected = {grade: sum(g == grade for _, _, g in PAIRS.values()) for grade in GRADES}
        assert found.counts["steps"] == expected
        assert not found.same
    assert not compare(one, two).notes


SHOWN = {
    "one of an array": ("[6]", "7.0", "7.1"),
    "one sampled value far off": ("[1]", "0.1 ± 0.1", "0.6699999999999999 ± 0.1"),
    "a sampled value far off": ("", "0.5 ± 0.1", "1.0699999999999998 ± 0.1"),
    "the worst counts": ("[1]", "1.0", "2.0"),
    "a class's name": (".name", "p", "q"),
    "a number far off": ("", "0.1", "0.100000002"),
    "a shape": ("", "an array of float64, shape (4,)", "an array of float64, shape (2, 2)"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_differs_is_shown_with_both_values(name: str, tmp_path: Path) -> None:
    old, new, _ = PAIRS[name]
    [output] = outputs(compare(made(tmp_path / "a", old), made(tmp_path / "b", new)), "steps")
    assert (output.where, output.recorded, output.now) == SHOWN[name]


def test_a_large_value_is_cut(tmp_path: Path) -> None:
    [output] = outputs(compare(made(tmp_path / "a", "x" * 9000), made(tmp_path / "b", "y" * 9000)), "steps")
    assert (len(output.recorded), len(output.now)) == (60, 60)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(-3e-9, 3e-9))
def test_numbers_are_graded_by_their_distance(a: float, relative: float) -> None:
    b = a * (1 + relative) if abs(a) > 1 else a + relative
    if math.isinf(b):
        return
    if struct.pack("<d", a) == struct.pack("<d", b):
        expected = "identical"
    else:
        expected = "close" if abs(a - b) <= 1e-9 * max(1.0, abs(a), abs(b)) else "differs"
    assert comparison._floats(a, b, "").grade == expected


# -- loops, failures, values ---------------------------------------------------------------------------------------


def row(i: int = 0, x: Any = (1.0, 2.0), value: float = 0.5, g: Any = None, stderr: float = 0.0,
        shots: int | None = None) -> Row:  # fmt: skip
    return Row(
        5, i, pack_array(np.array(x)), value, None if g is None else pack_array(np.array(g)), stderr, shots, 0.1, "d"
    )


def loop(directory: Path, *rows: Row, fun: float = 0.5) -> Path:
    begun = (HEADER, OPENED, Code("energy", "c1", ""), Circuit("p", None, None, {}, 1, 1, 1, None), LOOP)
    return write(directory, *begun, *rows, LoopEnd(5, fun, 0.1), END)


ROWS: dict[str, tuple[Row, Row, str, str]] = {
    "equal": (row(), row(), "identical", ""),
    "equal gradients": (row(g=[1.0, 2.0]), row(g=[1.0, 2.0]), "identical", ""),
    "a point that is close": (row(), row(x=[1.0 + TINY, 2.0]), "close", "x[0]"),
    "another point": (row(), row(x=[1.0, 2.1]), "differs", "x[1]"),
    "a longer point": (row(), row(x=[1.0, 2.0, 3.0]), "differs", "x"),
    "another value": (row(), row(value=0.6), "differs", "value"),
    "another gradient": (row(g=[1.0, 2.0]), row(g=[1.0, 2.1]), "differs", "gradient[1]"),
    "no gradient": (row(g=[1.0, 2.0]), row(), "differs", "gradient"),
    "samples": (row(stderr=0.1, shots=9), row(value=1.06, stderr=0.1, shots=9), "within stderr", "value"),
    "samples far off": (row(stderr=0.1, shots=9), row(value=1.07, stderr=0.1, shots=9), "differs", "value"),
    "samples of other shots": (row(stderr=0.1, shots=9), row(value=0.6, stderr=0.1, shots=8), "differs", "value"),
    "samples elsewhere": (row(stderr=0.1, shots=9), row(x=[3.0, 2.0], stderr=0.1, shots=9), "differs", "x[0]"),
}


@pytest.mark.parametrize(("old", "new", "grade", "where"), ROWS.values(), ids=ROWS.keys())
def test_each_grade_of_rows(old: Row, new: Row, grade: str, where: str, tmp_path: Path) -> None:
    found = compare(loop(tmp_path / "a", old), loop(tmp_path / "b", new))
    [output] = outputs(found, "loop rows")
    assert (output.at, output.grade, output.where) == ("a/m[0] row 0", grade, where)
    assert found.counts["loop results"]["identical"] == 1
    assert found.same == (grade != "differs")


def test_what_only_one_of_the_two_has(tmp_path: Path) -> None:
    failed = Failure("a/b[1]", "builtins:ValueError", "no", None, "", 1e9, 0.1, "", 0)
    other = dataclasses.replace(failed, type="builtins:KeyError")
    one = write(
        tmp_path / "a", HEADER, OPENED, step("a/b[0]", 1), failed, Survived("a/b[1]"), LOOP, row(0), row(1), END
    )  # the loop is in line 6, its rows are of line 5
    lines = [record for _, record in read_records(one)]
    one = write(tmp_path / "c", *[dataclasses.replace(r, loop=6) if isinstance(r, Row) else r for r in lines])
    evaluation = Evaluation("a/e[0]", "p", [0.1], None, 1.0, 1e9, 0.1, "driver", 0, 0)
    two = write(
        tmp_path / "b", HEADER, OPENED, evaluation, other, Survived("a/b[1]"), LOOP,
        *[dataclasses.replace(row(i), loop=6) for i in range(3)], LoopEnd(6, 0.5, 0.1),
        dataclasses.replace(END, output=2.5),
    )  # fmt: skip
    found = compare(one, two)
    assert [(o.part, o.at, o.grade) for o in found.outputs if o.grade != "identical"] == [
        ("steps", "a/b[0]", "missing"), ("evaluations", "a/e[0]", "new"), ("loop rows", "a/m[0] row 2", "new"),
        ("loop results", "a/m[0]", "new"), ("failures", "a/b[1]", "differs"), ("value", "", "differs"),
    ]  # fmt: skip
    assert set(found.counts) == set(PARTS)
    assert found.counts["loop rows"] == dict.fromkeys(GRADES, 0) | {"identical": 2, "new": 1}
    assert not found.same
    extra = compare(made(tmp_path / "d", 1), made(tmp_path / "e", 1, 2))
    assert [o.grade for o in outputs(extra, "steps")] == ["identical", "new"]
    assert extra.same  # more than was recorded, as after a survived failure that is gone, and nothing less


def test_environment_code_and_values_that_were_not_kept_are_noted(tmp_path: Path) -> None:
    earlier = dataclasses.replace(OPENED, versions={"numpy": "1.0"})
    end = dataclasses.replace(END, output=None)
    one = write(tmp_path / "a", HEADER, earlier, OPENED, step("a/b[0]", 1), step("a/b[1]", 1), end)
    here = dataclasses.replace(OPENED, python="3.12", versions={"numpy": "2.0", "scipy": "1.0"})
    two = write(tmp_path / "b", HEADER, here, step("a/b[0]", 1, "c2"), step("a/b[1]", 1), end)
    assert compare(one, two).notes == (
        "numpy: recorded with 1.0 and 2.0, now 2.0",
        "python: recorded with 3.11, now 3.12",
        "scipy: recorded with not recorded, now 1.0",
        "the code is not what was recorded at a/b[0]",
        "the recorded value is None, or no data: it was not kept",
    )
    assert compare(one, two).same
    assert compare(two, two).notes[:-1] == ()


def test_a_damaged_record_is_not_compared(tmp_path: Path) -> None:
    one, two = made(tmp_path / "a", LONG), made(tmp_path / "b", LONG + 1)
    [path] = (one / "values").iterdir()
    path.write_bytes(b"")
    with pytest.raises(Corrupt, match=path.name):
        compare(one, two)


# -- beginning again -----------------------------------------------------------------------------------------------


def test_what_a_run_begins_again_with(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a")
    large = journal.store(encode("x" * 5000))
    header = dataclasses.replace(HEADER, inputs=journal.store(encode([LONG])))
    for record in (header, OPENED, step("a/b[0]", 1), Event("a/now[0]", 1.5), Event("a/now[1]", large), END):
        journal.append(record)
    journal.close()
    assert begin_again(tmp_path / "a", tmp_path / "b") == 2
    assert [type(record) for _, record in read_records(tmp_path / "b")] == [RunHeader, Event, Event]
    [copy] = recorded(tmp_path / "b", RunHeader)
    assert copy == header
    assert decode(load_value(tmp_path / "b", copy.inputs))[0][-1] == 399.0
    assert [decode(load_value(tmp_path / "b", e.output)) for e in recorded(tmp_path / "b", Event)] == [1.5, "x" * 5000]


def test_only_finished_runs_are_made_again(tmp_path: Path) -> None:
    later = dataclasses.replace(OPENED, command=["other.py"])
    planned = dataclasses.replace(END, status="planned")
    run = write(tmp_path / "a", HEADER, OPENED, END, later)
    assert finished(run) == (HEADER, later)
    for i, (entries, state) in enumerate(
        [
            ([HEADER], "unfinished"),
            ([HEADER, OPENED], "unfinished"),
            ([HEADER, OPENED, planned], "planned"),
            ([], "unf"),
        ]
    ):
        with pytest.raises(WorkflowError, match=rf"has not finished \({state}"):
            finished(write(tmp_path / f"b{i}", *entries))
    with pytest.raises(JournalError, match="there is no run"):
        finished(tmp_path / "nothing")
