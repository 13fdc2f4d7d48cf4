"""The fold of a run's records: its numbers are those of the lines, taken one by one, whole or in bounded memory."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import journal, report

import hybridq as hq
from hybridq.errors import JournalError
from hybridq.history import Fault, History, LoopHistory, RunHistory, Span, group_of
from hybridq.journal import (
    Circuit,
    Code,
    End,
    Evaluation,
    Failure,
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
from hybridq.values import Encoded, encode

HEADER = RunHeader(1, "<b>run</b>", "study", "c" * 64, "a" * 64, [], 7, None)
OPENED = Opened("host", 12, 100.0, "3.11.7", "cpu", {"numpy": "2.0"}, ["study.py", "4"])


def problem(reference: Any = -2.0, unit: str = "hartree") -> dict[str, Any]:
    members = {"name": "H2", "reference": reference, "source": "FCI", "unit": unit, "properties": {"deep": [1, 2]}}
    return {"$": "dataclass", "t": "hybridq.problems.problem:Problem", "v": members}


def loop(at: str, *args: Any, method: str = "COBYLA", options: Any = None, gradient: str = "none") -> Loop:
    settings = {"args": {"$": "tuple", "v": list(args)}, "method": method, "options": options, "jac": None,
                "bounds": None, "constraints": {"$": "tuple", "v": []}}  # fmt: skip
    return Loop(at, "energy", "d" * 64, "e" * 64, settings, method, gradient)


def row(line: int, i: int, value: float, *, stderr: float = 0.0, shots: int | None = None, seconds: float = 0.5,
        where: str = "w0", started: float | None = None, program: str = "") -> Row:  # fmt: skip
    return Row(line, i, pack_array(np.zeros(3)), value, None, stderr, shots, seconds, where, program, started)


def step(at: str, started: float = 1.0, *, where: str = "w0", attempt: int = 0, inputs: Any = None) -> Step:
    return Step(at, "d" * 64, "a" * 64, [[], {}] if inputs is None else inputs, None, started, 2.0, where, attempt, 10)


def failure(at: str, attempt: int = 0) -> Failure:
    return Failure(at, "builtins:ValueError", "no", None, "", 3.0, 0.1, "w1", attempt)


def folded(*entries: Record, **options: Any) -> RunHistory:
    history = History(**options)
    for number, record in enumerate(entries, start=1):
        history.take(number, record)
    return history.run()


def only(found: RunHistory) -> LoopHistory:
    (one,) = found.loops
    return one


def test_nothing_taken_is_a_run_without_anything() -> None:
    found = folded()
    assert (found.name, found.status, found.loops, found.seed, found.unit) == ("", "running", (), None, "")


def test_a_group_is_the_scope_and_the_name() -> None:
    assert group_of("study/point[3]/minimize[0]", "energy") == "point/energy"
    assert group_of("study", "energy") == "energy"


def test_a_loop_so_far() -> None:
    found = only(folded(
        HEADER, OPENED, loop("study/point[2]/minimize[0]", problem(), 0.75, options={"maxiter": 50}),
        row(3, 0, -1.5, stderr=0.1, shots=100, started=200.0), row(3, 1, -1.9, stderr=0.2, shots=100, started=201.0),
        row(3, 2, -1.7, stderr=0.3, shots=100, started=202.0),
    ))  # fmt: skip
    assert (found.line, found.group, found.method, found.state) == (3, "point/energy", "COBYLA", "running")
    assert (found.rows, found.evaluations, found.shots, found.limit) == (3, 3, 300, 50)
    assert (found.best, found.best_row, found.best_stderr) == (-1.9, 1, 0.2)
    assert (found.last, found.last_stderr, found.result) == (-1.7, 0.3, None)
    assert (found.began, found.ended, found.seconds) == (200.0, 202.5, 1.5)
    assert found.reference is not None
    assert asdict(found.reference) == {"value": -2.0, "source": "FCI", "unit": "hartree", "problem": "H2"}
    assert found.error == pytest.approx(0.1)
    assert found.numbers == {"argument 2": 0.75}
    assert [(p.row, p.value, p.stderr, p.best, p.best_stderr) for p in found.curve] == [
        (0, -1.5, 0.1, -1.5, 0.1), (1, -1.9, 0.2, -1.9, 0.2), (2, -1.7, 0.3, -1.9, 0.2),
    ]  # fmt: skip


def test_the_state_of_a_loop_follows_the_drivers_and_its_end() -> None:
    at = "study/minimize[0]"
    begun: list[Record] = [HEADER, OPENED, loop(at), row(3, 0, 1.0)]
    result = {"$": "OptimizeResult", "v": {"fun": 0.5, "nit": 4, "message": "done"}}
    states = {
        "running": begun,
        "interrupted": [*begun, End("interrupted", None, None, 1.0, 2.0)],
        "interrupted ": [*begun, OPENED],  # killed, then opened by another driver that has not got there yet
        "running ": [*begun, OPENED, row(3, 1, 1.0)],
        "failed": [*begun, failure(at)],
        "running  ": [*begun, failure(at), OPENED, row(3, 1, 1.0)],
        "finished": [*begun, LoopEnd(3, result, 1.0), End("failed", None, "x", 1.0, 2.0), OPENED],
    }
    for state, entries in states.items():
        assert only(folded(*entries)).state == state.strip(), state
    ended = only(folded(*states["finished"]))
    assert (ended.result, ended.iterations, ended.message) == (0.5, 4, "done")


def test_the_state_of_a_run_is_how_its_last_driver_left_it() -> None:
    failed = End("failed", None, "ValueError: no", 5.0, 6.0)
    assert folded(HEADER, OPENED).status == "running"
    found = folded(HEADER, OPENED, failed)
    assert (found.status, found.error) == ("failed", "ValueError: no")
    assert [(s.status, s.seconds, s.command) for s in found.sessions] == [("failed", 5.0, ("study.py", "4"))]
    again = folded(HEADER, OPENED, failed, OPENED)
    assert (again.status, again.error, len(again.sessions)) == ("running", None, 2)
    assert [s.status for s in again.sessions] == ["failed", None]


def test_two_different_problems_are_no_reference() -> None:
    at = "study/minimize[0]"
    assert only(folded(HEADER, OPENED, loop(at, problem(-1.0), problem(-2.0)))).reference is None
    assert only(folded(HEADER, OPENED, loop(at, problem(-1.0), [problem(-1.0)]))).reference is not None
    assert only(folded(HEADER, OPENED, loop(at, problem(None)))).reference is None
    scalar = encode(np.float64(-1.25)).document
    found = only(folded(HEADER, OPENED, loop(at, {"deeper": [problem(scalar)]}))).reference
    assert found is not None
    assert found.value == -1.25


def test_the_unit_is_the_one_that_all_references_have() -> None:
    one, other = loop("s/minimize[0]", problem()), loop("s/minimize[1]", problem(-3.0, "J"))
    assert folded(HEADER, OPENED, one).unit == "hartree"
    assert folded(HEADER, OPENED, one, other).unit == ""


def test_inputs_in_a_file_are_read_where_that_is_possible() -> None:
    asked = []

    def load(document: Any) -> Encoded:
        asked.append(document["f"])
        if document["f"] == "gone":
            raise JournalError("gone")
        return Encoded({"args": [problem()], "method": "COBYLA", "options": {"maxiter": 9}, "constraints": []})

    kept = Loop("s/minimize[0]", "energy", "d", "e", {"$": "file", "f": "there"}, "COBYLA", "none")
    gone = Loop("s/minimize[1]", "energy", "d", "e", {"$": "file", "f": "gone"}, "COBYLA", "none")
    first, second = folded(HEADER, OPENED, kept, gone, row(3, 0, 0.0), load=load).loops
    assert asked == ["there", "gone"]
    assert first.reference is not None
    assert first.limit == 9
    assert second.reference is None
    assert only(folded(HEADER, OPENED, kept)).reference is None


def test_numbers_of_the_steps_beside_a_loop_may_tell_it_from_others() -> None:
    text = "problem =\ndef problem(bond: float, basis: str='x') -> object:\n    return bond\n\nhq = module hybridq"
    code = Code("problem", "d" * 64, text)
    beside = step("study/point[1]/problem[0]", inputs=[[0.75, "sto-3g"], {"charge": 1}])
    elsewhere = step("study/point[2]/problem[0]", inputs=[[0.5], {}])
    found = only(folded(HEADER, OPENED, code, beside, elsewhere, loop("study/point[1]/minimize[0]")))
    assert found.numbers == {"bond of problem()": 0.75, "charge of problem()": 1.0}
    odd = Code("problem", "d" * 64, "problem =\nfunctools.partial(nothing)")
    assert only(folded(HEADER, OPENED, odd, beside, loop("study/point[1]/minimize[0]"))).numbers == {
        "0 of problem()": 0.75, "charge of problem()": 1.0,
    }  # fmt: skip


def test_evaluations_of_a_plain_objective_are_its_loops() -> None:
    at = "study/minimize[0]"
    inner = Evaluation(f"{at}/cost[0]/energy[0]", "p", {"$": "array", "s": [2]}, 50, None, 1.0, 0.1, "w0", 0, 5)
    outside = Evaluation("study/energy[0]", "p", {"$": "array", "s": [2]}, 50, None, 1.0, 0.1, "w0", 0, 5)
    found = folded(HEADER, OPENED, loop(at), inner, row(3, 0, 1.0, where=""), outside)
    assert (found.evaluations, found.shots) == (2, 100)
    assert (only(found).rows, only(found).evaluations, only(found).shots) == (1, 1, 50)
    assert [(c.group, c.kind, c.done) for c in found.calls] == [
        ("cost/energy", "quantum", 1),
        ("study/energy", "quantum", 1),
    ]


def test_failures_are_told_with_what_became_of_them() -> None:
    found = folded(
        HEADER, OPENED, failure("s/a[0]"), failure("s/a[0]", 1), step("s/a[0]", attempt=2), failure("s/b[0]"),
        Survived("s/b[0]"), failure("s/c[0]"),
    )  # fmt: skip
    assert found.retries == 2
    assert [(f.line, f.at, f.attempt, f.repaired, f.survived) for f in found.faults] == [
        (3, "s/a[0]", 0, True, False), (4, "s/a[0]", 1, True, False), (6, "s/b[0]", 0, False, True),
        (8, "s/c[0]", 0, False, False),
    ]  # fmt: skip
    assert found.faults[0] == Fault(
        3, "s/a[0]", "builtins:ValueError", "no", "w1", 0, 3.0, 0.1, survived=False, repaired=True
    )
    many = folded(HEADER, OPENED, *[failure(f"s/a[{i}]") for i in range(20)], faults=5)
    assert [f.at for f in many.faults] == [f"s/a[{i}]" for i in range(15, 20)]


def test_the_time_line() -> None:
    found = folded(
        HEADER, OPENED, loop("s/minimize[0]"), step("s/a[0]", 10.0), row(3, 0, 1.0, started=12.0, where="w1"),
        row(3, 1, 1.0), step("s/a[1]", 9.0, where="run other"), row(3, 2, 1.0, where="run other", started=1.0),
    )  # fmt: skip
    assert found.spans == (
        Span("w0", "classical", "s/a", 10.0, 2.0, 2.0, 1), Span("w1", "quantum", "s/energy", 12.0, 0.5, 0.5, 1),
    )  # fmt: skip
    assert found.untimed == 1
    assert found.reused == {"other": 2}


def test_a_bounded_time_line_keeps_every_second_of_work() -> None:
    rng = np.random.default_rng(3)
    entries: list[Record] = [HEADER, OPENED, loop("s/minimize[0]")]
    entries += [row(3, i, 1.0, started=100.0 + i, seconds=float(rng.uniform(0.1, 0.9)), where=f"w{i % 3}")
                for i in range(5000)]  # fmt: skip
    whole, bounded = folded(*entries).spans, folded(*entries, spans=50).spans
    assert len(whole) == 5000
    assert len(bounded) <= 50
    for where in ("w0", "w1", "w2"):
        mine, its = ([s for s in spans if s.where == where] for spans in (whole, bounded))
        assert sum(s.busy for s in its) == pytest.approx(sum(s.busy for s in mine))
        assert sum(s.calls for s in its) == len(mine)
        assert min(s.began for s in its) == min(s.began for s in mine)
        assert max(s.began + s.seconds for s in its) == pytest.approx(max(s.began + s.seconds for s in mine))


@pytest.mark.parametrize("most", [2, 50])
def test_a_bounded_time_line_of_calls_that_overlap_is_bounded(most: int) -> None:
    """Batches of twenty that begin together, as they are recorded."""
    entries: list[Record] = [HEADER, OPENED, loop("s/minimize[0]")]
    entries += [row(3, i, 1.0, started=100.0 + i // 20, seconds=0.5, where=f"w{i % 2}") for i in range(4000)]
    history = History(spans=most)
    for number, entry in enumerate(entries, 1):
        history.take(number, entry)
        assert len(history._spans._spans) <= max(most, 2)
    found = history.run().spans
    assert sum(s.calls for s in found) == 4000
    assert sum(s.busy for s in found) == pytest.approx(2000.0)


def test_failures_are_counted_beyond_those_that_are_kept() -> None:
    failures = [Failure(f"s/step[{i}]", "builtins:ValueError", "no", None, "", 1.0, 0.1, "w0", 0) for i in range(30)]
    found = folded(HEADER, OPENED, *failures, faults=10)
    assert (found.failures, len(found.faults)) == (30, 10)


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 11, 1000])
def test_a_bounded_curve_keeps_its_ends_and_true_points(count: int) -> None:
    values = np.random.default_rng(4).normal(size=count).tolist()
    entries = [HEADER, OPENED, loop("s/minimize[0]"), *[row(3, i, value) for i, value in enumerate(values)]]
    found = only(folded(*entries, points=10))
    rows = [p.row for p in found.curve]
    assert len(rows) <= 10
    assert rows == sorted(set(rows))
    assert (rows[0], rows[-1]) == (0, count - 1)
    assert [p.value for p in found.curve] == [values[i] for i in rows]
    assert [p.best for p in found.curve] == [min(values[: i + 1]) for i in rows]
    assert (found.best, found.best_row, found.rows) == (min(values), int(np.argmin(values)), count)


def test_programs_are_what_was_predicted_beside_what_was_measured() -> None:
    need = {"bytes": 500, "seconds": 0.25, "shots": None}
    circuit = Circuit("p", None, None, {"v": {"gradient": "none"}}, 4, 20, 15, None, need)
    theta = encode(np.zeros((5, 2))).document
    entries: list[Record] = [
        HEADER, OPENED, circuit, loop("s/minimize[0]"),
        *[row(4, i, 1.0, seconds=seconds, program="p" if i == 0 else "") for i, seconds in enumerate((1.0, 4.0, 2.0))],
        Evaluation("s/energy[0]", "p", theta, None, None, 1.0, 15.0, "w0", 0, 700),
        Evaluation("s/energy[1]", "p", theta, 10, None, 1.0, 5.0, "w0", 0, 300),
    ]  # fmt: skip
    exact, sampled = folded(*entries).programs
    assert (exact.program, exact.qubits, exact.gates, exact.paulis, exact.gradient) == ("p", 4, 20, 15, False)
    assert (exact.evaluations, exact.rows) == (4, 8)
    assert exact.seconds == statistics.median([1.0, 4.0, 2.0, 3.0])
    assert (exact.predicted_seconds, exact.predicted_bytes, exact.bytes) == (0.25, 500, 700)
    assert (sampled.shots, sampled.seconds, sampled.bytes) == (10, 1.0, 300)
    assert (sampled.predicted_seconds, sampled.predicted_bytes) == (None, None)


def test_changed_tells_each_loop_once() -> None:
    history = History()
    for number, record in enumerate([HEADER, OPENED, loop("s/minimize[0]"), loop("s/minimize[1]")], start=1):
        history.take(number, record)
    assert [found.at for found in history.changed()] == ["s/minimize[0]", "s/minimize[1]"]
    assert history.changed() == ()
    history.take(5, row(4, 0, 3.0))
    history.take(6, row(4, 1, 2.0))
    assert [(found.at, found.rows, found.best) for found in history.changed()] == [("s/minimize[1]", 2, 2.0)]
    history.take(7, End("interrupted", None, None, 1.0, 2.0))
    assert [found.state for found in history.changed()] == ["interrupted"] * 2


def test_what_it_gives_is_data() -> None:
    found = folded(HEADER, OPENED, loop("s/<script>[0]/minimize[0]", problem()), row(3, 0, 1.0), step("s/a[0]"))
    document = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert document["name"] == "<b>run</b>"
    assert document["loops"][0]["best"] == 1.0


@hq.quantum
def energy(theta: Any, p: Any) -> Any:
    return hq.expval(p.ansatz, p.hamiltonian, theta, shots=200)


@hq.workflow
def ring(sites: int) -> float:
    p = hq.lattice("ising", sites, boundary="ring")
    return float(hq.minimize(energy, p.start, args=(p,), method="COBYLA", options={"maxiter": 12}).fun)


@hq.workflow
def rings(sizes: list[int]) -> list[float]:
    return [ring(sites) for sites in sizes]


def test_the_numbers_of_a_run_are_those_of_its_journal(tmp_path: Path) -> None:
    """Against the lines as they are written, read with nothing of hybridq's."""
    report(rings, [4, 6], name="rings", store=tmp_path)
    directory = tmp_path / "rings"
    history = History(partial(load_value, directory))
    for number, record in read_records(directory):
        history.take(number, record)
    found = history.run()
    lines = journal(directory)
    headers = [number for number, line in enumerate(lines, start=1) if line["k"] == "loop"]
    assert [one.line for one in found.loops] == headers
    for one in found.loops:
        rows = [line for line in lines if line["k"] == "row" and line["loop"] == one.line]
        assert [(p.value, p.stderr) for p in one.curve] == [(r["value"], r["stderr"]) for r in rows]
        assert one.best == min(r["value"] for r in rows)
        assert (one.rows, one.shots, one.limit) == (len(rows), sum(r["shots"] for r in rows), 12)
        assert one.reference is not None
        assert one.reference.unit == "J"
        assert one.began == min(r["started"] for r in rows)
    expected = [hq.lattice("ising", sites, boundary="ring").reference for sites in (4, 6)]
    assert [one.reference.value for one in found.loops if one.reference] == expected
    assert (found.status, found.evaluations, found.untimed) == ("finished", sum(one.rows for one in found.loops), 0)
    spans = [(r["where"], r["started"], r["seconds"]) for r in lines if r["k"] == "row"]
    assert sorted((s.where, s.began, s.busy) for s in found.spans) == sorted(spans)
