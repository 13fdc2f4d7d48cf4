"""Other runs whose records answer calls: forks, and exact results that are used again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp
from runs import executed, recorded, replayed, report

import hybridq as hq
from hybridq import journal as records
from hybridq import recorded as module
from hybridq.audit import verify
from hybridq.recorded import index, origin_of
from hybridq.values import digest_bytes

CIRCUIT = efficient_su2(2, reps=1)
TERMS = SparsePauliOp(["ZZ", "XI", "IX"], [1.0, 0.5, 0.5])
START = np.linspace(-1, 1, 8)


@hq.quantum
def energy(theta: Any, weight: float) -> Any:
    return hq.expval(CIRCUIT, TERMS * weight, theta)


@hq.quantum
def sampled(theta: Any, weight: float) -> Any:
    return hq.expval(CIRCUIT, TERMS * weight, theta, shots=300)


@hq.classical
def prepare(index: int) -> dict[str, Any]:
    return {"start": START * (1 + 0.1 * index), "noise": float(hq.rng().normal())}


def finishing(factor: float) -> Callable[..., Any]:
    """A study whose last step is ``factor`` times something: another factor is other code."""

    @hq.classical
    def finish(values: list[float]) -> float:
        return factor * float(np.sum(values))

    @hq.workflow
    def point(number: int) -> list[float]:
        p = prepare(number)
        exact = hq.minimize(energy, p["start"], (1.0,), method="L-BFGS-B", options={"maxiter": 8})
        noisy = hq.minimize(sampled, exact.x, (1.0,), method="COBYLA", options={"maxiter": 12})
        plain = hq.minimize(lambda x: float(energy(x, 2.0)), p["start"], method="Nelder-Mead", options={"maxfev": 12})
        return [exact.fun, noisy.fun, plain.fun, p["noise"], float(energy(exact.x, 0.5)), float(sampled(noisy.x, 1.0))]

    @hq.workflow
    def study(count: int) -> Any:
        waiting = [prepare.submit(10 + k) for k in range(3)]
        order = [waiting.index(one) for one in hq.as_completed(waiting)]
        rows = hq.map(point, range(count))
        slopes = hq.gradient(energy, START, 1.0)
        return {"rows": rows, "total": finish([r[0] for r in rows]), "order": sorted(order), "slopes": slopes.tolist(),
                "draw": float(hq.rng().normal()), "now": hq.now() > 0}  # fmt: skip

    return study


BEFORE, AFTER = finishing(1.0), finishing(2.0)


def test_a_fork_runs_what_changed_and_nothing_else(client: Client, store: Path) -> None:
    hq.run(BEFORE, 2, name="before", store=store, seed=5, cluster=client)
    fresh = hq.run(AFTER, 2, name="fresh", store=store, seed=5, cluster=client)
    found = report(AFTER, 2, name="after", store=store, seed=5, fork="before", cluster=client)
    assert found.value == fresh
    assert executed(found) == (0, 1)
    assert replayed(found)[1] == 5
    old, new = (records_at(store / name) for name in ("before", "after"))
    assert old.keys() == new.keys()
    assert {at for at in old if old[at] != new[at]} == {"study/finish[0]"}
    assert [r.where for r in recorded(store / "after", records.Step)].count("run before") == 5
    assert not verify(store / "after").damage
    shutil.rmtree(store / "before")  # it does not depend on where it came from
    again = report(AFTER, 2, name="after", store=store, seed=5)
    assert again.value == fresh
    assert executed(again) == (0, 0)


def records_at(directory: Path) -> dict[str, Any]:
    """What each call of a run came to, loops by all their rows."""
    found: dict[str, Any] = {}
    lines: dict[int, str] = {}
    for number, record in records.read_records(directory):
        match record:
            case records.Step():
                found[record.at] = record.code, record.output
            case records.Evaluation():
                found[record.at] = record.program, record.theta, record.output
            case records.Loop():
                lines[number] = record.at
                found[record.at] = []
            case records.Row():
                found[lines[record.loop]].append((record.x, record.value, record.g, record.stderr))
            case records.LoopEnd():
                found[lines[record.loop]].append(record.output)
    return found


@pytest.mark.parametrize("count", [1, 3], ids=["fewer points", "more points"])
def test_a_fork_has_the_values_of_a_run_of_its_own(client: Client, store: Path, count: int) -> None:
    options: dict[str, Any] = {"store": store, "seed": 5, "cluster": client}
    hq.run(BEFORE, 2, name="before", **options)
    forked = hq.run(BEFORE, count, name="forked", fork="before", **options)
    assert forked == hq.run(BEFORE, count, name="own", **options)


def test_an_unfinished_loop_is_forked_with_its_rows(client: Client, store: Path) -> None:
    hq.run(BEFORE, 1, name="whole", store=store, seed=5, cluster=client)
    shutil.copytree(store / "whole", store / "cut")
    lines = (store / "cut" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    rows = [n for n, r in records.read_records(store / "cut") if isinstance(r, records.Row) and r.shots is not None]
    (store / "cut" / "journal.jsonl").write_bytes(b"".join(lines[: rows[5]]))  # as a kill leaves it
    found = report(BEFORE, 1, name="forked", store=store, seed=5, fork="cut", cluster=client)
    assert found.value == hq.run(BEFORE, 1, name="whole", store=store, seed=5)
    shots = [r.where for r in recorded(store / "forked", records.Row) if r.shots is not None]
    assert shots[:6] == ["run cut"] * 6
    assert set(shots[6:]) == {"driver"}


def test_the_header_says_where_a_fork_came_from(client: Client, store: Path) -> None:
    hq.run(BEFORE, 1, name="before", store=store, cluster=client)
    hq.run(AFTER, 1, name="after", store=store, fork="before", cluster=client)
    (header,) = recorded(store / "after", records.RunHeader)
    data = (store / "before" / "journal.jsonl").read_bytes()
    assert header.forked == {"run": "before", "bytes": len(data), "sha256": digest_bytes(data)}
    assert header.forked == origin_of(store / "before")
    assert recorded(store / "before", records.RunHeader)[0].forked is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "new", "fork": "nothing"}, "fork: there is no run 'nothing'"),
        ({"name": "new", "reuse": ["before", "nothing"]}, "reuse: there is no run 'nothing'"),
        ({"name": "before", "fork": "before"}, "names the run 'before' itself"),
        ({"name": "new", "fork": 3}, "fork is 3; give the name of a run"),
        ({"name": "new", "fork": "../before"}, "cannot name a run"),
        ({"name": "new", "fork": "before", "seed": 6}, "its seed is 5, that of this run 6"),
        ({"name": "other", "fork": "before"}, "exists and was not forked from 'before'"),
    ],
    ids=["unknown", "reuse unknown", "itself", "no name", "outside", "seed", "later"],
)
def test_what_cannot_be_forked(store: Path, options: dict[str, Any], words: str) -> None:
    for name in ("before", "other"):
        hq.run(some_energy, 0.1, name=name, store=store, seed=5)
    lines = {n: (store / n / "journal.jsonl").read_bytes() for n in ("before", "other")}
    with pytest.raises(hq.WorkflowError, match=re.escape(words)):
        hq.run(some_energy, 0.1, **{"seed": 5, "store": store, **options})
    assert not (store / "new" / "journal.jsonl").exists() or not (store / "new" / "journal.jsonl").read_bytes()
    assert lines["before"] == (store / "before" / "journal.jsonl").read_bytes()


def test_another_workflow_is_not_forked(store: Path) -> None:
    hq.run(some_energy, 0.1, name="before", store=store)
    with pytest.raises(hq.WorkflowError, match="its workflow is some_energy, that of this run other_place"):
        hq.run(other_place, 0.1, name="new", store=store, fork="before")


@hq.workflow
def some_energy(value: float) -> list[float]:
    return [float(energy(START * value, 1.0)), float(sampled(START * value, 1.0))]


@hq.workflow
def other_place(value: float) -> Any:
    loop = hq.minimize(energy, START * value, (1.0,), method="COBYLA", options={"maxiter": 20})
    noisy = hq.minimize(sampled, START * value, (1.0,), method="COBYLA", options={"maxiter": 20})
    return [*some_energy(value), loop.fun, noisy.fun, hq.gradient(energy, START, 1.0).tolist()]


@hq.workflow
def deeper(value: float) -> Any:
    energy(START, 3.0)
    return other_place(value)


def test_exact_results_are_used_again_wherever_they_stand_and_sampled_ones_never(store: Path) -> None:
    first = hq.run(other_place, 0.3, name="first", store=store, seed=1)
    own = hq.run(deeper, 0.3, name="own", store=store, seed=1)
    found = report(deeper, 0.3, name="second", store=store, seed=1, reuse="first")
    assert found.value == own
    assert found.value[0] == first[0]
    assert found.value[1] != first[1]  # other random numbers, since it stands elsewhere
    shots = 1 + len([r for r in recorded(store / "second", records.Row) if r.shots is not None])
    assert executed(found) == (1 + shots, 0)  # one exact value is new
    assert replayed(found)[0] == 2 + len([r for r in recorded(store / "second", records.Row) if r.shots is None])
    assert {r.where for r in recorded(store / "second", records.Row) if r.shots is None} == {"run first"}
    assert not [r for r in recorded(store / "second", records.Row) if r.shots is not None and r.where == "run first"]
    assert not verify(store / "second").damage
    shutil.rmtree(store / "first")
    assert executed(report(deeper, 0.3, name="second", store=store, seed=1)) == (0, 0)


def test_nothing_is_used_again_unless_asked_for(store: Path) -> None:
    hq.run(some_energy, 0.3, name="first", store=store)
    assert executed(report(some_energy, 0.3, name="second", store=store)) == (2, 0)


def test_results_of_other_versions_are_not_used_again(
    store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hq.run(some_energy, 0.3, name="first", store=store)
    monkeypatch.setattr(module, "differs", lambda now, then: True)
    assert executed(report(some_energy, 0.3, name="second", store=store, reuse=["first"])) == (2, 0)
    assert "nothing of the run first is reused" in capfd.readouterr().err


def test_an_index_has_the_first_answer_of_each_location(client: Client, store: Path) -> None:
    hq.run(BEFORE, 1, name="a", store=store, cluster=client)
    found = index(records.read_records(store / "a"))
    steps = [r for r in found.answers.values() if isinstance(r, records.Step)]
    assert len(steps) == len(recorded(store / "a", records.Step)) == 5
    assert sum(len(entry.rows) for entry in found.loops.values()) == len(recorded(store / "a", records.Row))
    assert all(entry.end is not None for entry in found.loops.values())
    assert found.within["study", "step"] == 5
