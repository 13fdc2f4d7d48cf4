"""From asked to answered: what travels together, loops beside their evaluations, and what survives a loss."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp
from runs import recorded

import hybridq as hq
from hybridq import dispatch
from hybridq import journal as records
from hybridq.audit import verify
from hybridq.cluster import Cluster
from hybridq.dispatch import Dispatcher, driver_engine
from hybridq.engines.process import EngineProcess
from hybridq.journal import Journal, read_records, unpack_array
from hybridq.program import Outcome
from hybridq.scope import Scope, current

CIRCUIT = efficient_su2(3, reps=1, entanglement="linear")
HAMILTONIAN = SparsePauliOp(["ZZI", "IZZ", "XII", "IXI", "IIX"], [1.0, 1.0, 0.5, 0.5, 0.5])
START = np.random.default_rng(5).uniform(-1, 1, CIRCUIT.num_parameters)


@hq.quantum
def energy(theta: Any) -> Any:
    return hq.expval(CIRCUIT, HAMILTONIAN, theta)


@hq.quantum
def sampled(theta: Any) -> Any:
    return hq.expval(CIRCUIT, HAMILTONIAN, theta, shots=300)


@hq.quantum
def mirrored(theta: Any) -> Any:
    """Hands its argument on near the start alone: no body can be read, so every point is checked."""
    return hq.expval(CIRCUIT, HAMILTONIAN, theta if abs(theta[0] - START[0]) < 1e-3 else -theta)


@hq.classical
def inc(i: int) -> int:
    return i + 1


@hq.classical
def odd_ones_fail(i: int) -> int:
    if i % 2:
        raise ValueError(f"{i} is odd")
    return i


@hq.classical(retries=1)
def fails_once(i: int, folder: str) -> int:
    mark = Path(folder) / str(i)
    if i % 10 == 3 and not mark.exists():
        mark.touch()
        raise RuntimeError("the first time")
    return i


STEPS = {"inc": inc, "odd_ones_fail": odd_ones_fail, "fails_once": fails_once}


@hq.workflow
def many(step: str, count: int, *rest: Any) -> list[Any]:
    found: list[Any] = hq.map(STEPS[step], range(count), *([r] * count for r in rest), return_exceptions=True)
    return [str(f) if isinstance(f, Exception) else f for f in found]


@hq.workflow
def loop(seed: int, method: str, options: dict[str, Any], jac: str | None, noisy: bool) -> dict[str, Any]:
    start = START + 0.01 * seed
    found = hq.minimize(sampled if noisy else energy, start, method=method, options=options, jac=jac)
    return {"x": found.x, "fun": found.fun, "nfev": found.nfev}


@hq.workflow
def loops(count: int, *settings: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = hq.map(loop, range(count), *([s] * count for s in settings))
    return found


@hq.workflow
def one(*settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = loop(0, *settings)
    return found


@hq.workflow
def long_one() -> dict[str, Any]:
    found: dict[str, Any] = loop(0, "Nelder-Mead", {"maxfev": 300, "xatol": 0.0, "fatol": 0.0}, None, False)
    return found


@contextmanager
def tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Tasks sent to the cluster, by the function that they run."""
    seen: Counter[str] = Counter()
    submit = Cluster.submit

    def counted(self: Cluster, function: Any, *args: Any, **options: Any) -> None:
        seen[function.__name__] += 1
        submit(self, function, *args, **options)

    monkeypatch.setattr(Cluster, "submit", counted)
    yield seen


class TestSteps:
    def test_short_ones_travel_together_and_each_has_its_record(
        self, client: Client, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with tasks(monkeypatch) as sent:
            assert hq.run(many, "inc", 300, name="a", store=store, cluster=client) == [i + 1 for i in range(300)]
        assert sent["run_steps"] < 150
        assert sorted(r.at for r in recorded(store / "a", records.Step)) == sorted(f"many/inc[{i}]" for i in range(300))

    def test_each_fails_by_itself(self, client: Client, store: Path) -> None:
        found = hq.run(many, "odd_ones_fail", 120, name="a", store=store, cluster=client)
        assert found == [f"{i} is odd" if i % 2 else i for i in range(120)]
        assert len(recorded(store / "a", records.Failure)) == 60

    def test_each_is_tried_again_by_itself(self, client: Client, store: Path, tmp_path: Path) -> None:
        assert hq.run(many, "fails_once", 120, str(tmp_path), name="a", store=store, cluster=client) == list(range(120))
        attempts = {r.at: r.attempt for r in recorded(store / "a", records.Step)}
        assert {at for at, attempt in attempts.items() if attempt} == {
            f"many/fails_once[{i}]" for i in range(3, 120, 10)
        }


@hq.classical
def noted(name: str, folder: str, seconds: float) -> None:
    Path(folder, f"{time.time_ns()}-{name}").touch()
    time.sleep(seconds)


OUTCOME = Outcome(np.zeros((1, 1)), np.zeros((1, 1)), None, 0.0, 0)


@hq.classical
def deadly(i: int, poison: list[int], seconds: float) -> int:
    time.sleep(seconds)
    if i in poison:
        os.kill(os.getpid(), signal.SIGKILL)
    return i


@hq.workflow
def some_deadly(count: int, poison: list[int], seconds: float) -> list[Any]:
    found: list[Any] = hq.map(deadly, range(count), [poison] * count, [seconds] * count, return_exceptions=True)
    return [str(f) if isinstance(f, Exception) else f for f in found]


@pytest.mark.parametrize(
    ("count", "poison", "seconds"),
    [
        (200, [150], 0.0),
        pytest.param(63, [20, 21, 22], 0.05, marks=pytest.mark.slow),
        pytest.param(60, [*range(20, 40)], 0.05, marks=pytest.mark.slow),
    ],
    ids=["in a pack", "three in a row", "twenty in a row"],
)
def test_steps_that_end_their_workers_are_told_and_all_others_finish(
    store: Path, count: int, poison: list[int], seconds: float
) -> None:
    """Stock Dask fails this: bystanders are blamed, and workers that die right after their start are given up."""
    found = hq.run(some_deadly, count, poison, seconds, name="a", store=store, workers=2)
    assert [i for i in range(count) if found[i] != i] == poison
    assert all(f"deadly[{i}] was tried 2 times" in found[i] for i in poison)
    assert all(found[i].count("the worker at tcp://") == 2 for i in poison)
    assert sorted(r.at for r in recorded(store / "a", records.Step)) == sorted(
        f"some_deadly/deadly[{i}]" for i in range(count) if i not in poison
    )
    assert sorted(r.at for r in recorded(store / "a", records.Failure)) == sorted(
        f"some_deadly/deadly[{i}]" for i in poison
    )


SETTINGS = {
    "adjoint": ("L-BFGS-B", {"maxiter": 10}, "adjoint", False),
    "differences": ("SLSQP", {"maxiter": 4}, None, False),
    "sampled": ("COBYLA", {"maxiter": 40}, None, True),
}


class TestLoops:
    @pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
    def test_the_same_bits_on_workers_and_at_hand(
        self, client: Client, store: Path, monkeypatch: pytest.MonkeyPatch, settings: Any
    ) -> None:
        with tasks(monkeypatch) as sent:
            (first, *_) = hq.run(loops, 3, *settings, name="far", seed=3, store=store, cluster=client)
            assert sent["run_loop"] >= 3
            assert not sent["run_batch"]
            near = hq.run(one, *settings, name="near", seed=3, store=store, cluster=client)
        points = {r.i: r for r in recorded(store / "near", records.Row)}
        assert {r.where for r in points.values()} == {"driver"}
        far = recorded(store / "far", records.Row)
        names = {str(w) for w in client.run(lambda dask_worker: dask_worker.name).values()}
        assert {r.where for r in far} & names
        assert {r.where for r in far} <= names | {"driver"}  # the last loop left is alone, and may end at hand
        if not settings[-1]:  # samples are seeded by their place, which differs
            assert first["x"].tobytes() == near["x"].tobytes()
        assert len(points) == near["nfev"]
        assert all(np.isfinite(unpack_array(r.x)).all() for r in far)

    def test_one_evaluation_at_a_time_gives_the_same_bits(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = SETTINGS["adjoint"]
        whole = hq.run(one, *settings, name="whole", store=store)
        monkeypatch.setattr("hybridq.runner._LONGEST_SHIPPED", 0.0)
        single = hq.run(one, *settings, name="single", store=store)
        assert whole["x"].tobytes() == single["x"].tobytes()
        assert [(r.x, r.value, r.g) for r in recorded(store / "whole", records.Row)] == [
            (r.x, r.value, r.g) for r in recorded(store / "single", records.Row)
        ]

    def test_an_engine_that_dies_between_slices_costs_nothing_but_time(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hybridq.runner._FIRST_SLICE", 1e-9)
        monkeypatch.setattr("hybridq.runner._LONGEST_SLICE", 1e-9)
        expected = hq.run(one, *SETTINGS["differences"], name="a", store=store)
        killed = threading.Event()
        advance = type(driver_engine()).advance

        def deadly(self: Any, loop: Any, points: Any, *rest: Any) -> Any:
            if len(points) == 7 and not killed.is_set():
                killed.set()
                self.kill()
            return advance(self, loop, points, *rest)

        monkeypatch.setattr(type(driver_engine()), "advance", deadly)
        found = hq.run(one, *SETTINGS["differences"], name="b", store=store)
        assert killed.is_set()
        assert found["x"].tobytes() == expected["x"].tobytes()
        assert [r.i for r in recorded(store / "b", records.Row)] == list(range(found["nfev"]))

    def test_points_are_recorded_while_a_slice_goes_on(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And an engine that dies then loses none: the next goes on after them."""
        monkeypatch.setattr("hybridq.runner._FIRST_SLICE", 60.0)
        expected = hq.run(long_one, name="a", store=store)
        slices, there = [], []
        advance = type(driver_engine()).advance

        def deadly(self: Any, loop: Any, points: Any, *rest: Any) -> Any:
            *rest, arrived = rest
            slices.append(len(points))

            def arrive(part: Any) -> None:
                arrived(part)
                there.append(len(recorded(store / "b", records.Row)))
                if len(slices) == 1:
                    os.kill(self._child.popen.pid, signal.SIGKILL)

            return advance(self, loop, points, *rest, arrive)

        monkeypatch.setattr(type(driver_engine()), "advance", deadly)
        found = hq.run(long_one, name="b", store=store)
        assert found["x"].tobytes() == expected["x"].tobytes()
        assert len(slices) == 2  # one that was killed, and one more
        assert 0 < there[0] <= slices[1] < found["nfev"]
        assert [r.i for r in recorded(store / "b", records.Row)] == list(range(found["nfev"]))
        assert not verify(store / "b").damage

    def test_points_that_come_twice_are_recorded_once(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        advance, parts = type(driver_engine()).advance, []

        def doubled(self: Any, loop: Any, points: Any, *rest: Any) -> Any:
            *rest, arrived = rest

            def arrive(part: Any) -> None:
                parts.append(part)
                arrived(part)
                arrived(part)
                arrived(parts[0])

            return advance(self, loop, points, *rest, arrive)

        expected = hq.run(long_one, name="a", store=store)
        monkeypatch.setattr(type(driver_engine()), "advance", doubled)
        found = hq.run(long_one, name="b", store=store)
        assert len(parts) > 1
        assert found["x"].tobytes() == expected["x"].tobytes()
        assert [r.i for r in recorded(store / "b", records.Row)] == list(range(found["nfev"]))

    def test_points_that_never_arrive_are_asked_for_again(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        advance, dropped = type(driver_engine()).advance, []

        def losing(self: Any, loop: Any, points: Any, *rest: Any) -> Any:
            *rest, arrived = rest
            return advance(self, loop, points, *rest, arrived if dropped else dropped.append)

        expected = hq.run(long_one, name="a", store=store)
        monkeypatch.setattr(type(driver_engine()), "advance", losing)
        with pytest.raises(hq.EngineFailed, match="never arrived"):
            hq.run(long_one, name="b", store=store)
        assert dropped
        found = hq.run(long_one, name="b", store=store)
        assert found["x"].tobytes() == expected["x"].tobytes()
        assert [r.i for r in recorded(store / "b", records.Row)] == list(range(found["nfev"]))

    def test_what_cannot_be_recorded_ends_the_loop_and_not_the_engine(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(self: Any, several: Any) -> int:
            if any(isinstance(record, records.Row) and record.i >= 20 for record in several):
                raise hq.JournalError("no space is left")
            return append(self, several)

        hq.run(long_one, name="a", store=store)
        engine = driver_engine()._child
        append = Journal.append_all
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "append_all", failing)
            with pytest.raises(hq.JournalError, match="no space"):
                hq.run(long_one, name="b", store=store)
        assert driver_engine()._child is engine
        assert len(recorded(store / "b", records.Row)) <= 20
        found = hq.run(long_one, name="b", store=store)
        assert [r.i for r in recorded(store / "b", records.Row)] == list(range(found["nfev"]))

    def test_a_body_that_changes_what_it_hands_on_is_found_out(self, store: Path) -> None:
        @hq.workflow
        def shipped() -> Any:
            return hq.minimize(mirrored, START, method="Nelder-Mead", options={"maxiter": 30}).x

        @hq.workflow
        def plain() -> Any:
            return hq.minimize(lambda x: float(mirrored(x)), START, method="Nelder-Mead", options={"maxiter": 30}).x

        found = hq.run(shipped, name="a", store=store)
        assert found.tobytes() == hq.run(plain, name="b", store=store).tobytes()

    def test_a_loop_with_other_code_in_it_stays_here(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []

        @hq.workflow
        def watched() -> Any:
            return hq.minimize(energy, START, method="COBYLA", options={"maxiter": 20}, callback=seen.append).nfev

        monkeypatch.setattr("hybridq.dispatch.Dispatcher.advance", lambda *a, **k: pytest.fail("it was shipped"))
        assert hq.run(watched, name="a", store=store) == 20
        assert seen

    def test_a_wrong_option_raises_what_scipy_raises(self, store: Path) -> None:
        @hq.workflow
        def wrong() -> Any:
            return hq.minimize(energy, START, method="SLSQP", bounds=[[0.0, 1.0]] * 3)

        with pytest.raises(Exception, match=r"bounds|length|shape") as caught:
            hq.run(wrong, name="a", store=store)
        assert type(caught.value).__module__ in ("builtins", "numpy.exceptions")

    def test_loops_take_turns(self, client: Client, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """More loops than slots, in short slices: all of them move on before the first one ends."""
        monkeypatch.setattr("hybridq.runner._FIRST_SLICE", 0.01)
        monkeypatch.setattr("hybridq.runner._LONGEST_SLICE", 0.01)
        hq.run(loops, 8, *SETTINGS["differences"], name="a", store=store, cluster=client)
        found = [r for _, r in read_records(store / "a")]
        first_end = next(i for i, r in enumerate(found) if isinstance(r, records.LoopEnd))
        assert len({r.loop for r in found[:first_end] if isinstance(r, records.Row)}) >= 4

    def test_a_loop_stays_where_its_optimizer_waits(
        self, client: Client, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It goes elsewhere only to a worker that has none, which then has one: about once a loop at most."""
        monkeypatch.setattr("hybridq.runner._FIRST_SLICE", 1e-9)
        monkeypatch.setattr("hybridq.runner._LONGEST_SLICE", 1e-9)
        hq.run(loops, 6, *SETTINGS["sampled"], name="a", store=store, cluster=client)
        of: dict[int, list[str]] = {}
        for row in recorded(store / "a", records.Row):
            of.setdefault(row.loop, []).append(row.where)
        assert sum(map(len, of.values())) == 6 * 40
        assert sum(a != b != "driver" for found in of.values() for a, b in itertools.pairwise(found)) <= 6
        assert len({where for found in of.values() for where in found} - {"driver"}) == 2

    @pytest.mark.slow
    def test_loops_of_a_worker_that_is_lost_go_on_elsewhere(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hybridq.runner._FIRST_SLICE", 1e-9)
        monkeypatch.setattr("hybridq.runner._LONGEST_SLICE", 1e-9)
        lost: list[int] = []

        def kill(self: Any, cluster: Any, batch: Any, ask: Any) -> None:
            if not lost and len(ask.points) == 8 and ask.address is not None:
                lost.append(cluster.client.run(os.getpid, workers=[ask.address])[ask.address])
                os.kill(lost[0], signal.SIGKILL)
            send(self, cluster, batch, ask)

        send = Dispatcher._send_loop
        settings = ("COBYLA", {"maxiter": 16}, None, True)
        expected = hq.run(loops, 4, *settings, name="whole", store=store, workers=2)
        monkeypatch.setattr(Dispatcher, "_send_loop", kill)
        found = hq.run(loops, 4, *settings, name="lost", store=store, workers=2)
        assert lost
        assert [one["x"].tobytes() for one in found] == [one["x"].tobytes() for one in expected]


def test_a_run_that_is_left_leaves_no_thread(store: Path, client: Client) -> None:
    hq.run(loops, 2, *SETTINGS["adjoint"], name="a", store=store, cluster=client)
    deadline = time.monotonic() + 60
    while any(t.name in ("hybridq-watch", "hybridq-collector") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_has_priority_leaves_first(store: Path, tmp_path: Path) -> None:
    @hq.workflow
    def study() -> None:
        first = [noted.submit("low", str(tmp_path), 0.2) for _ in range(12)]
        with hq.priority(5):
            urgent = [noted.submit("high", str(tmp_path), 0.2) for _ in range(4)]
        for future in (*first, *urgent):
            future.result()

    hq.run(study, name="a", store=store, workers=1)
    order = [path.name.split("-")[1] for path in sorted(tmp_path.glob("*-*"))]
    assert len(order) == 16
    # at most those that were on their way already are before the urgent ones
    assert order[:6].count("high") == 4


@pytest.mark.parametrize("value", ["high", 1.5, True])
def test_a_priority_is_an_integer(value: Any) -> None:
    with pytest.raises(hq.WorkflowError, match="it must be an integer"), hq.priority(value):
        pass


def test_times_that_were_observed_correct_what_is_predicted(store: Path) -> None:
    @hq.workflow
    def study() -> tuple[float, float]:
        scope = current.get()
        assert isinstance(scope, Scope)
        need, asked = scope.run.dispatcher.need, []
        learn = scope.run.dispatcher._learn
        scope.run.dispatcher._learn = lambda program, outcome: (asked.append(program), learn(program, outcome))
        energy(START)
        program = asked[0]
        before = need(program).seconds
        for _ in range(20):
            learn(program, replace(OUTCOME, seconds=100 * before))
        return before, need(program).seconds

    before, after = hq.run(study, name="a", store=store)
    assert after == pytest.approx(100 * before, rel=0.5)


LARGER = efficient_su2(10, reps=2, entanglement="linear")
CHAIN = SparsePauliOp.from_sparse_list([("ZZ", [i, i + 1], 1.0) for i in range(9)], 10)


@hq.quantum
def of_many(theta: Any, shots: int | None) -> Any:
    return hq.expval(LARGER, CHAIN, theta, shots=shots)


@hq.quantum
def bits_of_many(theta: Any) -> Any:
    return hq.sample(LARGER, theta, shots=2000)


@hq.workflow
def wide_calls(rows: int) -> list[Any]:
    theta = np.random.default_rng(1).uniform(-1, 1, (rows, LARGER.num_parameters))
    sampled = of_many(theta, 500)
    return [np.asarray(of_many(theta, None).value), np.asarray(sampled.value), np.asarray(sampled.stderr),
            bits_of_many(theta).array, hq.gradient(of_many, theta[:16], None)]  # fmt: skip


@pytest.mark.slow
def test_rows_of_a_long_call_are_spread_over_workers_with_the_same_bits(
    client: Client, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tasks(monkeypatch) as sent:
        spread = hq.run(wide_calls, 1500, name="spread", store=store, cluster=client)
        assert sent["run_batch"] >= 6
    monkeypatch.setattr("hybridq.dispatch.Dispatcher._parts", lambda self, asked, required: ())
    with tasks(monkeypatch) as sent:
        whole = hq.run(wide_calls, 1500, name="whole", store=store, cluster=client)
        assert sent["run_batch"] <= 4
    assert [a.tobytes() for a in spread] == [a.tobytes() for a in whole]
    wheres = [r.where for r in recorded(store / "spread", records.Evaluation)]
    assert sum(", " in where for where in wheres) >= 3
    assert not any(", " in r.where for r in recorded(store / "whole", records.Evaluation))


@hq.workflow
def wide_and_small(count: int) -> list[Any]:
    theta = np.random.default_rng(4).uniform(-1, 1, LARGER.num_parameters)
    asked = [of_many.submit(theta, None), *(energy.submit(START + i) for i in range(count)), of_many.submit(theta, 9)]
    return [one.result().value for one in asked]


def test_a_wide_program_has_a_device_to_itself_with_all_threads(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridq.program._WIDE", 2**10)  # of ten qubits
    site = hq.Site(devices=(hq.Device(name="two", backend="aer", slots=2),), backend="two")
    running: set[int] = set()
    beside: list[tuple[int, int, int]] = []
    evaluate = EngineProcess.evaluate

    def watched(self: EngineProcess, programs: Any, *arguments: Any, **options: Any) -> Any:
        running.add(id(programs))
        beside.append((programs[0].template.num_qubits, programs[0].plan.threads, len(running)))
        try:
            return evaluate(self, programs, *arguments, **options)
        finally:
            running.discard(id(programs))

    monkeypatch.setattr(EngineProcess, "evaluate", watched)
    circuit, observable = LARGER.copy(), CHAIN.copy()  # plans are kept with their templates
    monkeypatch.setitem(globals(), "LARGER", circuit)
    monkeypatch.setitem(globals(), "CHAIN", observable)
    hq.run(wide_and_small, 6, name="wide", store=store, site=site)
    assert [entry for entry in beside if entry[0] == 10] == [(10, 2, 1), (10, 2, 1)]
    assert {threads for qubits, threads, _ in beside if qubits == 3} == {1}
    plans = {r.qubits: r.plan["v"] for r in recorded(store / "wide", records.Circuit)}
    assert plans[10]["threads"] == 0
    assert "not reproducible" in plans[10]["reason"]
    assert plans[3]["threads"] == 1


@hq.workflow
def slopes_of_few(rows: int) -> list[Any]:
    theta = np.random.default_rng(2).uniform(-1, 1, (rows, LARGER.num_parameters))
    return [hq.gradient(of_many, theta, shots, method="parameter-shift") for shots in (None, 500)]


@pytest.mark.parametrize("rows", [1, 2])
def test_derivatives_of_few_rows_are_spread_over_slots_with_the_same_bits(
    rows: int, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device beside the driver, which needs no cluster."""
    site = hq.Site(devices=(hq.Device(name="two", backend="aer", slots=3),), backend="two")
    monkeypatch.setattr(dispatch, "_WORTH_THE_TRIP", 0.001)
    asked: list[Any] = []
    spread = Dispatcher._spread
    monkeypatch.setattr(Dispatcher, "_spread", lambda self, ask, parts: (asked.append(parts), spread(self, ask, parts)))
    found = hq.run(slopes_of_few, rows, name="spread", store=store, site=site)
    assert [len(parts) for parts in asked] == [3, 3]
    assert len(recorded(store / "spread", records.Evaluation)) == 2
    monkeypatch.setattr(Dispatcher, "_parts", lambda self, asked, required: ())
    whole = hq.run(slopes_of_few, rows, name="whole", store=store, site=site)
    assert [a.tobytes() for a in found] == [a.tobytes() for a in whole]
    assert whole[0].shape == (rows, LARGER.num_parameters)


def test_what_fails_in_one_part_fails_the_call(client: Client, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = hq.EngineFailed("broken")

    def failing(packed: bytes, count: int, where: str) -> list[Any]:
        return [broken] * count

    monkeypatch.setattr("hybridq.dispatch._outcomes", failing)
    with pytest.raises(hq.EngineFailed, match="broken"):
        hq.run(wide_calls, 1500, name="a", store=store, cluster=client)


@pytest.mark.slow
def test_parts_that_fail_are_tried_again_each_by_itself(
    client: Client, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hq.run(wide_calls, 1500, name="whole", store=store, cluster=client)
    unpack, failed = dispatch._outcomes, set[bytes]()

    def failing(packed: bytes, count: int, where: str) -> list[Any]:
        found = unpack(packed, count, where)
        if len(failed) < 4 and found[0].values.tobytes() not in failed:  # each part once, whichever is the first
            failed.add(found[0].values.tobytes())
            return [hq.EngineFailed("once")] * count
        return found

    monkeypatch.setattr("hybridq.dispatch._outcomes", failing)
    again = hq.run(wide_calls, 1500, name="again", store=store, cluster=client)
    assert len(failed) == 4
    assert [a.tobytes() for a in again] == [a.tobytes() for a in whole]


def test_a_look_at_the_cluster_that_fails_is_told_and_the_next_one_counts(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without it, what was on a worker that is lost would be waited for, for ever."""
    devices, looks = Cluster.devices, []

    def failing(self: Cluster) -> Any:
        looks.append(len(looks))
        if len(looks) in (2, 3):
            raise OSError("no answer")
        return devices(self)

    monkeypatch.setattr(Cluster, "devices", failing)
    found = hq.run(some_deadly, 30, [7], 0.1, name="a", store=store, workers=2)
    assert [i for i in range(30) if found[i] != i] == [7]
    assert len(looks) > 3
    assert capfd.readouterr().err.count("the cluster cannot be looked after (OSError: no answer)") == 1
