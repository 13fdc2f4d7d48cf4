"""A mixed trace in real time: makespans on four one-thread workers, over the lower bound, against plain Dask order.

Studies of `hybridq.simulation.studies`: a problem (a step), loops side by side, each a chain of evaluations at once and
an update (a step), and a fit (a step). Steps sleep for their time; circuits have 4 to 20 qubits, and rows that come to
the predicted seconds on an idle core. Of those that are drawn, studies are left out that two cores could not play on
four workers (more seconds of circuits than of sleep, evaluations over 1.5 s), and those of very many tasks of less
than 40 ms on average. `run` is a run of workflows, journal on, which knows of a task when it is
called; `plain` is ``client.submit`` of all tasks in order with their dependencies before the first has ended, default
settings, the same engine processes. `bound` is the larger of work / slots and the longest chain, of the seconds that
each task took in that very run, without trips; `ratio` is makespan over it, `idle` over the same bound of predicted
seconds. Medians of rounds in turns; `most` is the largest ratio.

The last run is then played again from its journal, in virtual time, by each policy and in plain order (`virtual`): on
four workers whose trips take what a round trip does.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client
from qiskit.circuit.library import efficient_su2

import hybridq as hq
from benchmarks._site import play, site
from benchmarks.adjoint import heisenberg
from hybridq.cluster import run_batch
from hybridq.engines.process import EngineProcess
from hybridq.engines.wire import pack, unpack_outcomes
from hybridq.journal import Evaluation, Step, read_records
from hybridq.ledger import Ledger
from hybridq.location import Location
from hybridq.policies import POLICIES, Device
from hybridq.program import Outcome, Program, Request, program
from hybridq.resources import ROUND_TRIP
from hybridq.simulation import PlainOrder, Trace, of_journal, simulate, studies

WORKERS, WORK, ROUNDS, SEED = 4, 60.0, 2, 3
LONGEST, LEAST = 1.5, 0.04
"""Seconds of an evaluation at most, so that the whole lasts a minute; of the mean task of a study at least, as what
shorter ones take is their trip. Studies with more circuits than sleep are left out too: two cores cannot run four."""


@dataclass(frozen=True)
class Study:
    """Seconds of its steps, and its circuits."""

    qubits: int
    rows: int
    problem: float
    updates: tuple[tuple[float, ...], ...]
    """Of each loop's iterations."""
    widths: tuple[int, ...]
    """Evaluations at once, of each loop."""
    fit: float


def drawn() -> list[Study]:
    """Studies of about `WORK` seconds together."""
    found: list[Study] = []
    total = 0.0
    seconds = idle_seconds()
    for number in itertools.count():
        tasks = studies(1, SEED + number)
        of = {task.job.id: task for task in tasks}
        quantum = next(task for task in tasks if task.job.kind == "quantum")
        if quantum.seconds > LONGEST or quantum.job.need.qubits > 20:
            continue
        one = seconds(quantum.job.need.qubits)
        rows = max(1, round(quantum.seconds / one))
        asleep = sum(task.seconds for task in tasks if task.job.kind == "classical")
        busy = rows * one * sum(task.job.kind == "quantum" for task in tasks)
        work = asleep + busy
        if rows * one > LONGEST or work > WORK / 3 or work < LEAST * len(tasks) or busy > asleep:
            continue
        updates: dict[int, list[float]] = {}
        widths: dict[int, int] = {}
        for task in tasks:
            name = str(task.job.id).partition("/")[2]
            if name.startswith("update"):
                loop = int(name[len("update[") :].partition(",")[0])
                updates.setdefault(loop, []).append(task.seconds)
                widths[loop] = len(task.after)
        found.append(Study(
            quantum.job.need.qubits, rows, of["study1/problem"].seconds, tuple(map(tuple, updates.values())),
            tuple(widths.values()), of["study1/fit"].seconds,
        ))  # fmt: skip
        total += work
        if total > WORK:
            return found
    raise AssertionError


def idle_seconds() -> Any:
    """How long one row of a circuit of so many qubits takes here: a function, which remembers."""

    @functools.cache
    def seconds(qubits: int) -> float:
        process = EngineProcess(2**33, name="benchmark")
        try:
            asked = [evaluation(qubits, 1, 0.1 * k) for k in range(6)]
            outcomes = [process.evaluate([one])[0] for one in asked]
        finally:
            process.close()
        return statistics.median(o.seconds for o in outcomes[1:] if isinstance(o, Outcome))

    return seconds


@functools.cache
def problem_of(qubits: int) -> tuple[Any, Any]:
    return efficient_su2(qubits, reps=2, entanglement="linear"), heisenberg(qubits)


def points(qubits: int, rows: int, start: float) -> Any:
    return np.linspace(start, start + 1.0, rows * 6 * qubits).reshape(rows, 6 * qubits)


def evaluation(qubits: int, rows: int, start: float) -> Program:
    circuit, observable = problem_of(qubits)
    return program(
        Request(circuit, observable, points(qubits, rows, start)), seed=0, location=Location("benchmark/energy[0]")
    )


# -- as workflows ------------------------------------------------------------------------------------------------------


@hq.classical
def problem(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@hq.classical
def update(seconds: float, values: list[float]) -> float:
    time.sleep(seconds)
    return float(np.mean(values))


@hq.classical
def fit(seconds: float, values: list[float]) -> float:
    time.sleep(seconds)
    return float(np.mean(values))


@hq.quantum
def energy(qubits: int, rows: int, start: float) -> Any:
    circuit, observable = problem_of(qubits)
    return hq.expval(circuit, observable, points(qubits, rows, start))


@hq.workflow
def loop(qubits: int, rows: int, width: int, updates: list[float]) -> float:
    last = 0.0
    for seconds in updates:
        found = hq.map(energy, [qubits] * width, [rows] * width, [0.1 * point for point in range(width)])
        last = update(seconds, [float(np.mean(one.value)) for one in found])
    return last


@hq.workflow
def study(one: dict[str, Any]) -> float:
    problem(one["problem"])
    count = len(one["widths"])
    ends = hq.map(loop, [one["qubits"]] * count, [one["rows"]] * count, one["widths"], one["updates"])
    return fit(one["fit"], ends)


@hq.workflow
def campaign(listed: list[Any]) -> list[float]:
    return hq.map(study, listed)


Graph = dict[str, tuple[Any, tuple[str, ...]]]
"""Of each task, named by its location, what it is (seconds to sleep, or a program), and what it waits for."""


def graph(listed: list[Study]) -> Graph:
    found: Graph = {}
    for number, one in enumerate(listed):
        at = f"campaign/study[{number}]"
        found[f"{at}/problem[0]"] = (one.problem, ())
        ends = []
        for k, (width, updates) in enumerate(zip(one.widths, one.updates, strict=True)):
            last = f"{at}/problem[0]"
            for i, seconds in enumerate(updates):
                asked = tuple(f"{at}/loop[{k}]/energy[{i * width + point}]" for point in range(width))
                for point, name in enumerate(asked):
                    found[name] = ((one.qubits, one.rows, 0.1 * point), (last,))
                last = f"{at}/loop[{k}]/update[{i}]"
                found[last] = (seconds, asked)
            ends.append(last)
        found[f"{at}/fit[0]"] = (one.fit, tuple(ends))
    return found


def bound(tasks: Graph, seconds: dict[str, float]) -> float:
    ends: dict[str, float] = {}
    for name, (_, after) in tasks.items():
        ends[name] = seconds[name] + max((ends[before] for before in after), default=0.0)
    return max(*ends.values(), sum(seconds.values()) / WORKERS)


# -- as plain tasks ----------------------------------------------------------------------------------------------------


def sleep(seconds: float, *_: Any) -> float:
    begun = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - begun


def circuits(batch: Any, *_: Any) -> bytes:
    return run_batch(batch, None, 2**30)[0]


def plain(client: Client, tasks: Graph, packed: dict[Any, Any], number: int) -> tuple[float, dict[str, float]]:
    begun = time.perf_counter()
    futures: dict[str, Any] = {}
    for name, (what, after) in tasks.items():
        function, argument = (sleep, what) if isinstance(what, float) else (circuits, packed[what])
        waits = [futures[before] for before in after]
        futures[name] = client.submit(function, argument, *waits, key=f"{name}#{number}", pure=False)
    found = client.gather(futures)
    makespan = time.perf_counter() - begun
    return makespan, {
        name: value if isinstance(value, float) else sum(_seconds(value)) for name, value in found.items()
    }


def _seconds(value: bytes) -> Iterator[float]:
    for outcome in unpack_outcomes(value):
        assert isinstance(outcome, Outcome), outcome
        yield outcome.seconds


def run(compare: Any) -> list[dict[str, Any]]:
    listed = drawn()
    tasks = graph(listed)
    idle = idle_seconds()
    predicted = {
        name: what if isinstance(what, float) else what[1] * idle(what[0]) for name, (what, _) in tasks.items()
    }
    packed = {what: pack([evaluation(*what)]) for what, _ in tasks.values() if not isinstance(what, float)}
    quantum = sum(predicted[name] for name, (what, _) in tasks.items() if not isinstance(what, float))
    print(
        f"{len(listed)} studies of {sorted(one.qubits for one in listed)} qubits, {len(tasks)} tasks, "
        f"{sum(predicted.values()):.0f} s of work, {quantum:.0f} quantum, bound {bound(tasks, predicted):.1f}",
        file=sys.stderr,
    )
    documents = [{**vars(one), "updates": [list(u) for u in one.updates], "widths": list(one.widths)} for one in listed]
    found: dict[str, list[tuple[float, float, float]]] = {"run": [], "plain": []}
    seconds: dict[str, float] = {}
    traces: list[Trace] = []
    workers = [Device(f"w{number}", 1, 2**32, 1, ROUND_TRIP) for number in range(WORKERS)]

    def look(directory: Path) -> None:
        entries = read_records(directory)
        traces[:] = [of_journal(entries, workers)]
        for _, record in entries:
            if isinstance(record, (Step, Evaluation)):
                seconds[record.at] = record.seconds

    with site(WORKERS) as client:
        for number in range(1 + ROUNDS):  # the first is not counted: workers load what they import
            for name in ("run", "plain") if number % 2 else ("plain", "run"):
                if name == "run":
                    seconds.clear()
                    _, makespan = play(client, campaign, documents, look=look)
                    took = dict(seconds)
                else:
                    makespan, took = plain(client, tasks, packed, number)
                assert took.keys() == tasks.keys()
                least = bound(tasks, took)
                print(f"{name}: {makespan:.2f} s, bound {least:.2f}, work {sum(took.values()):.1f}", file=sys.stderr)
                if number:
                    found[name].append((makespan, least, sum(took.values())))
    rows = []
    for name, times in found.items():
        ratios = [makespan / least for makespan, least, _ in times]
        rows.append({
            "what": name, "tasks": len(tasks), "rounds": ROUNDS, "makespan": statistics.median(t[0] for t in times),
            "work": statistics.median(t[2] for t in times), "bound": statistics.median(t[1] for t in times),
            "ratio": statistics.median(ratios), "most": max(ratios),
            "idle": statistics.median(t[0] for t in times) / bound(tasks, predicted),
        })  # fmt: skip
    for name in (*POLICIES, "plain"):
        played = simulate(traces[0], PlainOrder() if name == "plain" else Ledger(name, batch_seconds=0.2))
        rows.append({
            "what": f"virtual: {name}", "tasks": len(traces[0].tasks), "rounds": 1, "makespan": played.makespan,
            "work": played.asked, "bound": played.bound, "ratio": played.makespan / played.bound,
            "most": played.makespan / played.bound, "idle": played.makespan / bound(tasks, predicted),
        })  # fmt: skip
    return rows
