"""Time limits of evaluations, loops and runs: on time, with an error that says so, and nothing recorded is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from qiskit.circuit.library import efficient_su2
from runs import executed, recorded, report

import hybridq as hq
from hybridq import journal as records
from hybridq.dispatch import driver_engine

SMALL, TERMS = efficient_su2(2, reps=1), {"ZZ": 1.0, "XI": 0.5}
# minutes on one thread
LONG = efficient_su2(24, reps=60, entanglement="linear")
START = np.linspace(-1, 1, 8)


@hq.quantum(timeout=5.0)
def limited(theta: Any, long: bool) -> Any:
    circuit = LONG if long else SMALL
    return hq.expval(circuit, "Z" * 24 if long else TERMS, np.resize(theta, circuit.num_parameters))


@hq.quantum
def energy(theta: Any) -> Any:
    return hq.expval(SMALL, TERMS, theta)


@hq.workflow
def one_by_one() -> list[Any]:
    short = float(limited(START, False))
    try:
        limited(START, True)
    except hq.TimedOut as late:
        return [short, str(late)]
    return [short, "no timeout"]


@hq.workflow
def side_by_side() -> list[Any]:
    found = hq.map(limited, [START] * 3, [False, True, False], return_exceptions=True)
    return [str(f) if isinstance(f, Exception) else float(f) for f in found]


@pytest.mark.slow
def test_an_evaluation_that_is_waited_for(store: Path) -> None:
    short, late = hq.run(one_by_one, name="a", store=store)
    assert "took longer than 5 s and was ended" in late
    (failure,) = recorded(store / "a", records.Failure)
    assert failure.type.endswith("TimedOut")
    assert failure.at == "one_by_one/limited[1]"
    assert report(one_by_one, name="a", store=store).value == [short, late]  # a replay meets it again
    assert executed(report(one_by_one, name="a", store=store)) == (0, 0)


def test_an_evaluation_among_others_on_the_cluster(client: Client, store: Path) -> None:
    found = hq.run(side_by_side, name="a", store=store, cluster=client)
    assert found[0] == found[2] == pytest.approx(float(limited(START, False)))
    assert isinstance(found[1], str)
    assert client.submit(lambda: 1).result() == 1  # the engine was ended, not the worker
    assert len(recorded(store / "a", records.Evaluation)) == 2


def test_outside_of_a_run() -> None:
    assert float(limited(START, False)) == pytest.approx(float(energy(START)))
    with pytest.raises(hq.TimedOut):
        limited(START, True)
    assert float(limited(START, False)) == pytest.approx(float(energy(START)))


@hq.workflow
def in_time(seconds: float | None, body: bool) -> Any:
    objective = (lambda theta: float(energy(theta))) if body else energy
    return hq.minimize(objective, START, method="Nelder-Mead", options={"maxfev": 400}, timeout=seconds).fun


@pytest.mark.parametrize("body", [False, True], ids=["quantum function", "any function"])
def test_a_loop_goes_on_with_more_time(store: Path, monkeypatch: pytest.MonkeyPatch, body: bool) -> None:
    monkeypatch.setattr("hybridq.runner._FIRST_SLICE", 1e-9)
    monkeypatch.setattr("hybridq.runner._LONGEST_SLICE", 1e-9)

    @hq.workflow
    def study() -> Any:
        return in_time(limit[0], body)

    limit: list[float | None] = [1e-3]
    with pytest.raises(
        hq.TimedOut, match=r"study/in_time\[0\]/minimize\[0\]: \d+ evaluations took .* timeout is 0.001"
    ):
        hq.run(study, name="a", store=store)
    first = recorded(store / "a", records.Row)
    assert 1 <= len(first) < 100
    with pytest.raises(hq.TimedOut):
        hq.run(study, name="a", store=store)
    assert recorded(store / "a", records.Row) == first  # its time was over
    limit[0] = None
    found = report(study, name="a", store=store)
    assert executed(found)[0] == len(recorded(store / "a", records.Row)) - len(first)
    assert found.value == hq.run(study, name="b", store=store)


@pytest.mark.slow
def test_an_evaluation_that_hangs_ends_with_its_loop(store: Path) -> None:
    @hq.quantum
    def endless(theta: Any) -> Any:
        return hq.expval(LONG, "Z" * 24, np.resize(theta, LONG.num_parameters))

    @hq.workflow
    def study() -> Any:
        return hq.minimize(endless, START, method="COBYLA", timeout=1.5).fun

    with pytest.raises(hq.TimedOut):
        hq.run(study, name="a", store=store, workers=1)
    assert recorded(store / "a", records.Row) == []


@hq.classical
def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@hq.workflow
def long_study(seconds: float) -> list[float]:
    return [nap(0.1), nap(seconds)]


@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_a_run_is_left_in_time_and_goes_on_later(client: Client, store: Path, where: str) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            hq.run(long_study, 5.0, name="a", store=store, cluster=client, timeout=4.0)
        except hq.TimedOut as error:
            errors.append(error)

    if where == "main thread":
        run()
    else:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert "took longer than its timeout of 4 s" in str(errors[0])
    (end,) = recorded(store / "a", records.End)
    assert end.status == "failed"
    assert recorded(store / "a", records.Step)[0].at == "long_study/nap[0]"
    assert hq.run(long_study, 5.0, name="a", store=store, cluster=client) == [0.1, 5.0]
    assert [r.at for r in recorded(store / "a", records.Step)] == ["long_study/nap[0]", "long_study/nap[1]"]


def test_a_run_in_time_is_not_disturbed(store: Path) -> None:
    for number in range(3):
        assert isinstance(hq.run(in_time, None, False, name=f"n{number}", store=store, timeout=1e3), float)
    assert driver_engine().alive


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_what_is_no_time_limit(store: Path, wrong: Any) -> None:
    with pytest.raises(hq.WorkflowError, match="positive number of seconds"):
        hq.quantum(timeout=wrong)
    with pytest.raises(hq.WorkflowError, match="positive number of seconds"):
        hq.minimize(energy, START, timeout=wrong)
    with pytest.raises(hq.WorkflowError, match="positive number of seconds"):
        hq.run(in_time, None, False, name="a", store=store, timeout=wrong)
