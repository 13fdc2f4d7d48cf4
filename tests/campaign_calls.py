"""The fault campaign of calls: what circuits, steps, objectives and values may do to a run, and what lasts long."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
import os
import random
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest import mock

import numpy as np
import psutil
from campaign import Case, Forks, Row, outline, spread
from campaign_cluster import engines, kill, workers
from processes import SOON, Marked, wait_until
from qiskit import QuantumCircuit
from qiskit.circuit.library import efficient_su2
from runs import executed, recorded, report, traced, write_trace
from scipy.optimize import OptimizeResult

import hybridq as hq
from hybridq import journal as records
from hybridq.dispatch import driver_engine
from hybridq.journal import Journal, read_records
from hybridq.values import MAX_VALUE_BYTES

STUDY = Path(__file__).parent / "studies" / "vqe.py"


@contextlib.contextmanager
def _fresh() -> Iterator[tuple[Path, Path]]:
    """A store that does not exist yet, and a file for what calls note of themselves; nothing is said on stderr."""
    with tempfile.TemporaryDirectory(prefix="hybridq-faults-") as scratch, contextlib.redirect_stderr(io.StringIO()):
        yield Path(scratch) / "store", Path(scratch) / "trace"


def _raised(call: Callable[[], Any]) -> BaseException | None:
    """What ``call()`` raises, whatever it is."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001  # a case looks at it
        return error
    return None


def _pids(client: Any) -> dict[str, int]:
    """Process ids of a cluster's workers."""
    found: dict[str, int] = client.run(os.getpid)
    return found


def _engines(client: Any) -> set[int]:
    """The engine processes of this driver and of the workers."""
    parents = [psutil.Process(pid) for pid in (os.getpid(), *_pids(client).values())]
    return {child.pid for one in parents for child in one.children() if "hybridq.engines" in child.cmdline()}


# -- memory --------------------------------------------------------------------------------------------------------


@hq.quantum
def among(index: int, place: int, qubits: int, backend: Any) -> Any:
    """A small circuit; at ``place`` one of so many qubits, or on a backend of its own."""
    width = qubits if index == place else 1
    circuit = QuantumCircuit(width)
    circuit.ry(0.1 * index, range(width))
    here = backend if index == place else None
    return hq.expval(circuit, "Z" * width, backend=here, shots=10 if isinstance(here, hq.Backend) else None)


@hq.classical
def hoards(index: int, place: int, trace: str) -> int:
    """Takes memory without end if it is the one at ``place``."""
    write_trace(trace, str(index))
    hoard = []
    while index == place:
        hoard.append(b"x" * 2**23)
        time.sleep(0.01)
        if len(hoard) > 500:
            break
    time.sleep(0.02)
    return index


@hq.workflow
def side_by_side(count: int, place: int, qubits: int, backend: Any) -> list[Any]:
    arguments = [place] * count, [qubits] * count, [backend] * count
    found = hq.map(among, range(count), *arguments, return_exceptions=True)
    return [[type(f).__name__, str(f)] if isinstance(f, Exception) else float(f) for f in found]


@hq.workflow
def hoarding(count: int, place: int, trace: str) -> list[Any]:
    found = hq.map(hoards, range(count), [place] * count, [trace] * count, return_exceptions=True)
    return [[type(f).__name__, str(f)] if isinstance(f, Exception) else f for f in found]


def too_much_memory(forks: Forks, seed: int) -> Case:
    """A circuit over the limit, one whose memory grows beyond what was predicted, or a step that takes all there is."""
    rng, what = random.Random(seed), ("limit", "growth", "step")[seed % 3]
    count = rng.randrange(6, 16)
    place = rng.randrange(count)
    with _fresh() as (store, trace):
        begun = time.perf_counter()
        if what == "step":
            case = Case(f"step {place} of {count} takes more memory than its worker has")
            site = hq.Site(workers=2, worker_memory="800 MiB")
            found = hq.run(hoarding, count, place, str(trace), name="a", store=store, site=site)
            expected: list[Any] = list(range(count))
            kind, words = "WorkerLost", r"hoards\[\d+\] was tried 2 times"
            case.repeated = traced(trace).total() - count
            case.check(traced(trace)[str(place)] == 2, "it was not tried twice")
        else:
            method, growth = rng.choice([("statevector", 16 * 2**36), ("density_matrix", 16 * 4**20)]), what == "growth"
            qubits = 1 if growth else (36 if method[0] == "statevector" else 20) + rng.randrange(12)
            backend: Any = hq.Backend("devices:Queued", {"failing": "greedy"}) if growth else method[0]
            said = "grows beyond what was predicted" if growth else f"of {qubits} qubits needs {method[0]}"
            case = Case(f"circuit {place} of {count} {said}")
            before = _pids(forks.client)
            found = hq.run(side_by_side, count, place, qubits, backend, name="a", store=store, cluster=forks.client)
            expected = [math.cos(0.1 * index) for index in range(count)]
            kind, words = "TooLarge", "far more than the predicted" if growth else r"needs .*\(.*\).* has .*\(.*\)"
            case.check(_pids(forks.client) == before, "a worker was lost")
            if not growth and isinstance(found[place], list):
                need, have, *_ = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", found[place][1])]
                case.check(need >= method[1] > have > 0, f"not both numbers: {need}, {have}")
        case.seconds.append(time.perf_counter() - begun)
        refusal = found[place]
        told = isinstance(refusal, list) and refusal[0] == kind and re.search(words, refusal[1])
        case.check(bool(told), f"it was not told: {refusal}")
        others = [abs(found[i] - expected[i]) < 1e-12 for i in range(count) if i != place and found[i] == found[i]]
        case.check(len(others) == count - 1 and all(others), f"bystanders: {found}")
        (failure, *more) = recorded(store / "a", records.Failure)
        case.check(not more and failure.at.endswith(f"[{place}]"), f"recorded: {failure}, {more}")
        done = len(recorded(store / "a", records.Step)) + len(recorded(store / "a", records.Evaluation))
        case.lost = count - 1 - done
    return case


# -- exceptions of the researcher's --------------------------------------------------------------------------------


class Own(Exception):
    """An exception of the researcher's own, with data."""


class Awkward(Exception):
    """One whose constructor takes something else than its arguments."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} and {right}")


class Silent(Exception):
    """One that does not even say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def fail(how: str) -> None:
    """Raise what ``how`` names."""
    match how:
        case "value":
            raise ValueError("no")
        case "exit":
            raise SystemExit(3)
        case "interrupt":
            raise KeyboardInterrupt("by a step")
        case "large":
            raise RuntimeError("x" * 10_000_000)
        case "locked":
            error = RuntimeError("holds a lock")
            error.lock = threading.Lock()  # type: ignore[attr-defined]
            raise error
        case "odd":
            raise Awkward(1, 2)
        case "own":
            raise Own("data", 42, [1.5])
        case "silent":
            raise Silent
        case "file":
            open("/nonexistent/file").close()
        case "chained":
            try:
                raise KeyError("inner")
            except KeyError as inner:
                raise ValueError("outer") from inner
        case "group":
            raise ExceptionGroup("several", [ValueError("one"), TypeError("two")])
        case "stop":
            raise StopIteration(7)
        case "generator":
            raise GeneratorExit("left")
        case "deep":
            fail(how)
        case "surrogate":
            raise LookupError("a file called \udcff")


@hq.classical
def raises(trace: str, how: str) -> None:
    write_trace(trace, how)
    fail(how)


@hq.workflow
def raising(trace: str, how: str) -> None:
    raises(trace, how)


@hq.workflow
def surviving(trace: str, how: str) -> list[Any]:
    try:
        raises(trace, how)
    except BaseException as error:  # noqa: BLE001  # told
        return [type(error).__module__, type(error).__qualname__, list(map(repr, getattr(error, "__notes__", [])))]
    return []


@hq.workflow
def minimizing(trace: str, how: str) -> Any:
    def objective(x: Any) -> float:
        if x[0] > 0.51:
            with open(trace, "a") as file:
                file.write(".")
            fail(how)
        return float(x @ x)

    return hq.minimize(objective, [0.5, -0.4], method="Nelder-Mead")


RAISED: dict[str, tuple[type[BaseException], str]] = {
    "value": (ValueError, "no"),
    "exit": (SystemExit, "3"),
    "interrupt": (KeyboardInterrupt, "by a step"),
    "large": (RuntimeError, "xxxx"),
    "locked": (RuntimeError, "holds a lock"),
    "odd": (Awkward, "1 and 2"),
    "own": (Own, "('data', 42, [1.5])"),
    "silent": (Silent, ""),
    "file": (FileNotFoundError, "[Errno 2] No such file or directory: '/nonexistent/file'"),
    "chained": (ValueError, "outer"),
    "group": (ExceptionGroup, "several (2 sub-exceptions)"),
    "stop": (StopIteration, "7"),
    "generator": (GeneratorExit, "left"),
    "deep": (RecursionError, "maximum recursion depth"),
    "surrogate": (LookupError, "a file called"),
}


def exceptions(forks: Forks, seed: int) -> Case:
    """An exception of a step's or an objective's own: its type, where it was raised, once, and recorded."""
    how, place = spread(list(itertools.product(RAISED, ("raising", "surviving", "minimizing"))), seed)
    kind, text = RAISED[how]
    case = Case(f"{how}: {kind.__name__} in {place}")
    with _fresh() as (store, trace):
        begun = time.perf_counter()
        run = functools.partial(
            hq.run, globals()[place], str(trace), how, name="a", store=store, cluster=forks.client
        )  # fmt: skip
        error, found = None, None
        if place == "surviving":
            found = run()
            case.check(found[:2] == [kind.__module__, kind.__qualname__], f"another type: {found}")
            case.check("surviving/raises[0]" in str(found[2:]), f"no location: {found}")
        else:
            error = _raised(run)
            case.check(type(error) is kind, f"another type: {error!r:.300}")
            said = "" if how == "silent" else str(error)
            case.check(said.startswith(text), f"another message: {said:.200}")
        case.seconds.append(time.perf_counter() - begun)
        if place == "minimizing":
            case.check(trace.read_text() == ".", "it was raised more than once")
            case.check(not recorded(store / "a", records.LoopEnd), "the loop has a result")
        else:
            case.repeated = traced(trace).total() - 1
            (failure, *more) = recorded(store / "a", records.Failure)
            where = failure.at == f"{place}/raises[0]" and failure.type.endswith(kind.__qualname__)
            case.check(where and not more, f"recorded as {failure.type} at {failure.at}, {more}")
            case.check("in raises" in failure.traceback, "no traceback")
            case.check(error is None or "in raises" in str(error.__cause__), "no traceback from the worker")
            if place == "surviving":
                if how == "group":  # no data: its record says what it was, and that it cannot be made again
                    found = ["hybridq.errors", "StepFailed", found[2]]
                case.check(run() == found, "a replay met another exception")
            case.check(traced(trace).total() == 1, "it ran again")
        case.check((store / "a" / "journal.jsonl").stat().st_size < 200_000, "the journal is large")
        ends = [end.status for end in recorded(store / "a", records.End)]
        case.check(set(ends) <= {"finished"} if place == "surviving" else "finished" not in ends, f"ended as {ends}")
    return case


# -- objectives that are no numbers --------------------------------------------------------------------------------


def swallowing(fun: Any, x0: Any, args: Any = (), **_: Any) -> OptimizeResult:
    """Tries points; one whose value cannot be had counts as bad."""
    best, values = np.array(x0), []
    for step in np.random.default_rng(3).normal(size=(12, len(x0))):
        try:
            values.append(fun(best + 0.1 * step))
        except Exception:  # noqa: BLE001  # as robust optimizers do
            values.append(1e9)
    return OptimizeResult(x=best, fun=min(values), success=True, message="done")


def walking(fun: Any, x0: Any, args: Any = (), **_: Any) -> OptimizeResult:
    """Goes wherever it is better."""
    best, value = np.array(x0), fun(x0)
    for step in np.random.default_rng(4).normal(size=(12, len(x0))):
        if (found := fun(best + 0.1 * step)) < value:
            best, value = best + 0.1 * step, found
    return OptimizeResult(x=best, fun=value, success=True, message="done")


METHODS = ("COBYLA", "Nelder-Mead", "L-BFGS-B", "Powell", walking, swallowing)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "nan": (float("nan"), hq.NotFinite, "returned nan at"),
    "inf": (float("inf"), hq.NotFinite, "returned inf at"),
    "-inf": (float("-inf"), hq.NotFinite, "returned -inf at"),
    "none": (None, hq.WorkflowError, "returned None"),
    "complex": (1 + 1e-9j, hq.WorkflowError, "returned the complex number"),
    "array": (np.array([1.0]), hq.WorkflowError, r"returned an array of shape \(1,\)"),
}


def no_number(_: Forks, seed: int) -> Case:
    """An objective that once returns what is no finite number: no result of the loop, whatever the optimizer makes of
    it."""
    wrong, method = spread(list(itertools.product(WRONG, METHODS)), seed)
    value, kind, words = WRONG[wrong]
    at = random.Random(seed).randrange(6)
    case = Case(f"{wrong} at evaluation {at} of {method if isinstance(method, str) else method.__name__}")
    calls = itertools.count()

    def objective(x: Any) -> Any:
        return value if next(calls) == at else float(x @ x)

    @hq.workflow
    def ends() -> Any:
        return hq.minimize(objective, [0.5, -0.4], method=method)

    with _fresh() as (store, _trace):
        begun = time.perf_counter()
        error = _raised(lambda: hq.run(ends, name="ends", store=store))
        case.seconds.append(time.perf_counter() - begun)
        told = isinstance(error, kind) and re.search(rf"ends/minimize\[0\]/objective\[{at}\] {words}", str(error))
        case.check(bool(told), f"it was not told: {error!r}")
        case.lost = max(0, at - len(recorded(store / "ends", records.Row)))
        case.check(not recorded(store / "ends", records.LoopEnd), "the loop has a result")
        case.check([e.status for e in recorded(store / "ends", records.End)] == ["failed"], "the run did not fail")
    return case


# -- what takes too long -------------------------------------------------------------------------------------------

TTL = 10.0
"""Seconds after which the scheduler takes a worker for dead that is not heard of; Dask waits for 5 at least."""


@hq.quantum(timeout=6.0)
def limited(index: int, place: int, qubits: int, reps: int) -> Any:
    width, layers = (qubits, reps) if index == place else (2, 1)
    circuit = efficient_su2(width, reps=layers, entanglement="linear")
    return hq.expval(circuit, "Z" * width, np.full(circuit.num_parameters, 0.1))


@hq.quantum
def unlimited(qubits: int, reps: int) -> Any:
    circuit = efficient_su2(qubits, reps=reps, entanglement="linear")
    return hq.expval(circuit, "Z" * qubits, np.full(circuit.num_parameters, 0.1))


@hq.workflow
def some_limited(count: int, place: int, qubits: int, reps: int) -> list[Any]:
    arguments = [place] * count, [qubits] * count, [reps] * count
    found = hq.map(limited, range(count), *arguments, return_exceptions=True)
    return [[type(f).__name__, str(f)] if isinstance(f, Exception) else float(f) for f in found]


@hq.workflow
def one_limited(qubits: int, reps: int) -> list[Any]:
    found: list[Any] = []
    for index in range(3):
        try:
            found.append(float(limited(index, 1, qubits, reps)))
        except hq.TimedOut as error:
            found.append(["TimedOut", str(error)])
    return found


@hq.workflow
def longs(qubits: int, reps: int, count: int) -> list[float]:
    return [float(value) for value in hq.map(unlimited, [qubits] * count, [reps] * count)]


def takes_long(forks: Forks, seed: int) -> Case:
    """A circuit that takes minutes and has seconds: its engine process alone is ended. One that takes longer than the
    scheduler waits for word of its worker: it runs once."""
    rng, what = random.Random(seed), ("beside others", "by itself", "longer than worker-ttl")[seed % 3]
    case = Case(f"a circuit that takes long, {what}")
    with _fresh() as (store, _):
        begun = time.perf_counter()
        if what == "longer than worker-ttl":
            import dask
            from distributed import Client, LocalCluster

            quiet = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "silence_logs": 50}
            with (
                dask.config.set({"distributed.scheduler.worker-ttl": f"{TTL} s"}),
                LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as cluster,
                Client(cluster) as client,
            ):
                hq.run(longs, 20, 8, 1, name="pace", store=store, cluster=client)
                (pace,) = recorded(store / "pace", records.Evaluation)
                layers = math.ceil(8 * rng.uniform(1.5, 2) * TTL / pace.seconds)
                before = _pids(client)
                hq.run(longs, 20, layers, 2, name="a", store=store, cluster=client)
                case.check(_pids(client) == before, "a worker was taken for dead")
            done = recorded(store / "a", records.Evaluation)
            case.check([r.attempt for r in done] == [0, 0], "it was tried again")
            case.check(min(r.seconds for r in done) > 1.2 * TTL, "the circuits were too short to be longer")
            case.repeated = len(done) - 2
        else:
            before, alone = _pids(forks.client), what == "by itself"
            count, place = (3, 1) if alone else (8, rng.randrange(8))
            asked: tuple[Any, ...] = (one_limited, 24, 60) if alone else (some_limited, count, place, 24, 60)
            hq.run(longs, 2, 1, 2, name="warm", store=store, cluster=forks.client)  # every worker has its engine
            engines = _engines(forks.client)
            found = hq.run(*asked, name="a", store=store, cluster=forks.client)
            late = found[place]
            told = isinstance(late, list) and late[0] == "TimedOut" and "took longer than 6 s and was ended" in late[1]
            case.check(told, f"not told: {late}")
            others = {value for index, value in enumerate(found) if index != place}
            case.check(len(others) == 1 and abs(others.pop()) <= 1, f"bystanders: {found}")
            case.check(_pids(forks.client) == before, "a worker was lost")
            case.lost = count - 1 - len(recorded(store / "a", records.Evaluation))
            (failure,) = recorded(store / "a", records.Failure)
            case.check(failure.at.endswith(f"limited[{place}]") and failure.type.endswith("TimedOut"), f"{failure}")
            ended = len(engines - _engines(forks.client))  # the driver's own may have been started for it
            case.check(ended == 1 or (alone and ended == 0 and driver_engine().pid not in engines), f"{ended} ended")
            case.check(hq.run(*asked, name="a", store=store, cluster=forks.client) == found, "a replay differs")
        case.seconds.append(time.perf_counter() - begun)
    return case


# -- results that come twice, late, or in another order ------------------------------------------------------------


@hq.classical
def squared(trace: str, index: int) -> float:
    write_trace(trace, str(index))
    return index**2 + float(hq.rng().normal())


@hq.quantum
def drawn(angle: float) -> Any:
    circuit = QuantumCircuit(1)
    circuit.ry(angle, 0)
    return hq.expval(circuit, "Z", shots=100)


@hq.workflow
def many_results(trace: str, count: int) -> list[Any]:
    steps = [squared.submit(trace, index) for index in range(count)]
    values = hq.map(drawn, [0.1 * index for index in range(count)])
    order = [round(future.result()) for future in hq.as_completed(steps)]
    return [[step.result() for step in steps], [float(value) for value in values], sorted(order)]


class Unruly:
    """In the place of the queue by which a cluster's results arrive: some come twice, late, or in another order.

    What comes after the first answer of a call is forged, so that it cannot be taken for it unseen.
    """

    def __init__(self, how: str, seed: int) -> None:
        self.injected = 0
        self._how, self._rng = how, random.Random(seed)
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._held: list[Any] = []
        self._lock = threading.Lock()

    def get(self) -> Any:
        return self._queue.get()

    def put(self, arrival: Any) -> None:
        if arrival is None or arrival[2] is not None:
            self._release()
            self._queue.put(arrival)
        elif self._how == "reordered":
            with self._lock:
                self._held.append(arrival)
                alone = len(self._held) == 1
            if alone:
                threading.Timer(1.0, self._release).start()
            else:
                self._release()
        elif self._how == "twice":
            self.injected += 1
            for again in (arrival, *[_forged(arrival)] * self._rng.randrange(1, 4)):
                self._queue.put(again)
        else:
            self._late(arrival)

    def _late(self, arrival: Any) -> None:
        """What was counted as lost, and was asked again, comes nevertheless."""
        prefix, label, attempt = arrival[0]
        if attempt == 0 and self._rng.random() < 0.5:
            self.injected += 1
            self._queue.put(((prefix, label, attempt), None, hq.WorkerLost("the worker was taken for dead")))
            threading.Timer(self._rng.uniform(0, 0.1), self._queue.put, [_forged(arrival)]).start()
        else:
            self._queue.put(arrival)

    def _release(self) -> None:
        with self._lock:
            held, self._held = self._held, []
            self.injected += len(held) > 1
            for arrival in reversed(held):
                self._queue.put(arrival)


def _forged(arrival: Any) -> Any:
    """The answer to a call with other content."""
    key, value, error = arrival
    if isinstance(value, list):  # of steps
        return key, [replace(reply, output=replace(reply.output, document=-1.0)) for reply in value], error
    return key, (b"forged", *value[1:]), error


def unruly_results(forks: Forks, seed: int) -> Case:
    """Results of a cluster that come twice, late or in another order, or are recorded twice: the first one counts."""
    how = ("reordered", "twice", "late", "recorded twice")[seed % 4]
    case, count = Case(f"results: {how}"), 20
    expected = _undisturbed_results(forks)
    made: list[Unruly] = []

    def queue() -> Unruly:
        made.append(Unruly(how, seed))
        return made[-1]

    with _fresh() as (store, trace):
        asked: Any = {"name": "a", "store": store, "seed": 5, "cluster": forks.client}
        begun = time.perf_counter()
        with mock.patch("hybridq.cluster.SimpleQueue", queue) if how != "recorded twice" else contextlib.nullcontext():
            found = hq.run(many_results, str(trace), count, **asked)
        case.check(how == "recorded twice" or sum(one.injected for one in made) > 0, "nothing was injected")
        case.faults = max(1, sum(one.injected for one in made))
        if how == "recorded twice":
            again = [r for _, r in read_records(store / "a") if isinstance(r, records.Step | records.Evaluation)]
            chosen = random.Random(seed).sample(again, 10)
            book = Journal(store / "a")
            book.append_all([replace(r, output=-1.0, attempt=r.attempt + 1) for r in chosen])
            book.close()
            found, case.faults = hq.run(many_results, str(trace), count, **asked), len(chosen)
        case.seconds.append(time.perf_counter() - begun)
        case.check(found == expected, f"another result: {found}")
        at = Counter(r.at for r in recorded(store / "a", records.Step))
        case.lost = count - len(at)
        case.check(how == "recorded twice" or max(at.values()) == 1, "a step was recorded twice")
        case.repeated = traced(trace).total() - count
        case.check(case.repeated == 0 or how == "late", f"{case.repeated} steps ran again")
    return case


def _undisturbed_results(forks: Forks) -> Any:
    if not hasattr(_undisturbed_results, "found"):
        with _fresh() as (store, trace):
            found = hq.run(many_results, str(trace), 20, name="a", store=store, seed=5, cluster=forks.client)
            _undisturbed_results.found = found  # type: ignore[attr-defined]
    return _undisturbed_results.found  # type: ignore[attr-defined]


# -- what cannot travel, and values of every size ------------------------------------------------------------------


@hq.classical
def makes(what: str, size: int) -> Any:
    match what:
        case "lock":
            return threading.Lock()
        case "generator":
            return (index for index in range(3))
        case "module":
            return [os]
        case "bytes":
            return b"x" * size
        case _:
            return np.zeros(size // 8)


@hq.classical
def takes(value: Any) -> int:
    return len(value)


@hq.workflow
def making(what: str, size: int) -> int:
    return len(makes(what, size))


@hq.workflow
def giving(what: str, size: int) -> int:
    values: dict[str, Callable[[], Any]] = {
        "lock": threading.Lock, "generator": lambda: (i for i in range(3)), "function": lambda: len,
        "bytes": lambda: bytes(size), "array": lambda: np.zeros(size // 8),
    }  # fmt: skip
    return takes(values[what]())


LARGE = 2_000_000_000
TRAVELS: list[tuple[str, str, int]] = [
    ("making", "lock", 0), ("giving", "lock", 0), ("making", "bytes", 0), ("making", "bytes", 1),
    ("making", "generator", 0), ("giving", "generator", 0), ("making", "bytes", 4_097), ("giving", "array", 400_000),
    ("making", "module", 0), ("giving", "function", 0), ("making", "array", 40_000_000),
    ("making", "array", 260_000_000), ("making", "array", LARGE), ("giving", "array", LARGE),
    ("making", "bytes", 180_000_000), ("making", "bytes", LARGE),
]  # fmt: skip


def travelling(forks: Forks, seed: int) -> Case:
    """Arguments and values that cannot travel are named at submit; the others come back, or are refused by name."""
    where, what, size = TRAVELS[seed % len(TRAVELS)]
    flow = {"making": making, "giving": giving}[where]
    case = Case(f"{'the value of' if where == 'making' else 'an argument of'} a step: {what}, {size:,} bytes")
    data, fits = what in ("bytes", "array"), size <= MAX_VALUE_BYTES
    with _fresh() as (store, _), _most_memory() as memory:
        begun = time.perf_counter()
        try:
            found = report(flow, what, size, name="a", store=store, cluster=forks.client)
        except hq.Unhashable as error:
            case.check(not (data and fits), f"refused: {error}")
            words = f"{MAX_VALUE_BYTES:,}" if data else {"lock": "lock", "function": "builtin"}.get(what, what)
            name = "returned by making/makes[0]" if where == "making" else "argument of takes()"
            case.check(words in str(error) and name in str(error), f"not named: {error}")
            case.check(not recorded(store / "a", records.Step), "recorded")
        else:
            case.check(data and fits, "it was not refused")
            case.check(found.value == (size if what == "bytes" else size // 8), f"another value: {found.value}")
            again = report(flow, what, size, name="a", store=store, cluster=forks.client)
            case.check(again.value == found.value and executed(again) == (0, 0), "not answered from the record")
        case.seconds.append(time.perf_counter() - begun)
    bound = 8 * min(size, MAX_VALUE_BYTES) + (size if where == "giving" else 0) + 2**28
    case.check(memory[0] < bound, f"the driver took {memory[0]:,} bytes")
    return case


@contextlib.contextmanager
def _most_memory() -> Iterator[list[int]]:
    """The most that this process has resident meanwhile beyond what it had before, in bytes."""
    process, done = psutil.Process(), threading.Event()
    before, most = process.memory_info().rss, [0]

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


# -- what lasts long -----------------------------------------------------------------------------------------------


@hq.classical
def number(i: int) -> int:
    return i * i


@hq.workflow
def many(rounds: int, count: int) -> int:
    return sum(sum(hq.map(number, range(k * count, (k + 1) * count))) for k in range(rounds))


@hq.quantum
def slope(theta: Any) -> Any:
    return hq.expval(efficient_su2(4, reps=1), {"ZZII": 1.0, "IXXI": 0.5, "IIYZ": 0.25}, theta)


@hq.workflow
def long_loop(count: int) -> Any:
    options = {"maxfev": count, "xatol": 0.0, "fatol": 0.0}
    return hq.minimize(slope, np.linspace(-1, 1, 16), method="Nelder-Mead", options=options).fun


@hq.workflow
def lasting(seconds: float) -> list[int]:
    """Steps, evaluations and loops, round after round; recorded clock readings decide when it is enough."""
    begun, found = hq.now(), []
    while hq.now() - begun < seconds:
        hq.minimize(slope, np.linspace(-1, 1, 16) * (1 + len(found)), method="COBYLA", options={"maxiter": 50})
        found.append(sum(hq.map(number, range(20))))
    return found


LASTS = ("10,000 steps", "a loop of 1,000", "an hour")
FLAT = 100 * 2**20
"""Bytes by which a driver may grow while it goes on and on."""


def lasting_long(forks: Forks, seed: int) -> Case:
    """Many steps, a long loop, or a run of ``forks.minutes``: none lost, and memory flat."""
    what = LASTS[seed % 3]
    case, steps, evaluations = Case(what if seed % 3 < 2 else f"{forks.minutes:g} minutes"), 10_000, 1_000
    with _fresh() as (store, _):
        process, memory, done = psutil.Process(), list[int](), threading.Event()

        def watch() -> None:
            while not done.wait(1.0):
                memory.append(process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        begun = time.perf_counter()
        asked: tuple[Any, ...] = ((many, 10, steps // 10), (long_loop, evaluations), (lasting, 60 * forks.minutes))[
            seed % 3
        ]
        live = report(*asked, name="a", store=store, cluster=forks.client)
        done.set()
        watcher.join()
        again_begun = time.perf_counter()
        again = report(*asked, name="a", store=store, cluster=forks.client)
        case.seconds.append(time.perf_counter() - again_begun)
        case.check(again.value == live.value and executed(again) == (0, 0), "not answered from the record")
        case.within(5, case.seconds[-1] if seed % 3 < 2 else 0, "resumed")
        at = [r.at for r in recorded(store / "a", records.Step)]
        case.check(len(at) == len(set(at)), "a step was recorded twice")
        if seed % 3 == 0:
            case.lost = steps - len(at)
            case.check(live.value == sum(i * i for i in range(steps)), "another sum")
        elif seed % 3 == 1:
            case.lost = evaluations - len(recorded(store / "a", records.Row))
            case.check(executed(live)[0] == evaluations, f"{executed(live)[0]} evaluations")
        else:
            case.check(again_begun - begun >= 60 * forks.minutes, "it was over too soon")
            case.check(set(live.value) == {sum(i * i for i in range(20))}, "another sum")
            case.lost = 20 * len(live.value) - len(at)
        third = len(memory) // 3
        if third:
            growth = min(memory[-third:]) - min(memory[third : 2 * third])
            case.check(growth < FLAT, f"the driver grew by {growth:,} bytes")
    return case


# -- chaos ---------------------------------------------------------------------------------------------------------

KILLS = 6
"""In the time that an undisturbed run takes, on average."""


def chaos(forks: Forks, seed: int) -> Case:
    """``kill -9`` of engine processes and workers at random, all along a variational eigensolver, again and again for
    ``forks.minutes``: the same bits each time."""
    rng = random.Random(seed)
    case = Case(f"Poisson kills for {forks.minutes:g} minutes", faults=0)
    with tempfile.TemporaryDirectory(prefix="hybridq-faults-") as scratch:
        clean = Path(scratch) / "clean"
        begun = time.monotonic()
        Marked(STUDY, clean).finish(600)
        every = (time.monotonic() - begun) / KILLS
        expected = outline(clean / "vqe")
        case.check(bool(_result(clean)), "the undisturbed run did not end")
        until = time.monotonic() + 60 * forks.minutes
        for number_ in itertools.count():
            if time.monotonic() > until or case.problems:
                break
            store = Path(scratch) / f"store{number_}"
            _disturb(case, store, rng, every)
            case.check(_result(store) == _result(clean), "another result")
            case.check(_settled(outline(store / "vqe")) == _settled(expected), "another record")
            shutil.rmtree(store)
    case.check(case.faults > 0, "nothing was killed")
    return case


def _disturb(case: Case, store: Path, rng: random.Random, every: float) -> None:
    """Run the study to its end, again where calls were given up whose workers were lost twice."""
    for _ in range(5):
        run = Marked(STUDY, store)
        wait_until(lambda run=run: len(engines(run)) == 2 or run.process.poll() is not None, 120)
        while run.process.poll() is None:
            wait_until(lambda run=run: run.process.poll() is not None, rng.expovariate(1 / every))
            there = [*engines(run), *(workers(run) if rng.random() < 0.3 else [])]
            if there and run.process.poll() is None:
                kill(rng.choice(there))
                case.faults += 1
                begun = time.monotonic()
                if wait_until(lambda run=run: len(engines(run)) >= 2 or run.process.poll() is not None, SOON):
                    case.seconds.append(time.monotonic() - begun)
        _, errors = run.finish(120)
        case.check(wait_until(lambda run=run: not run.alive(), SOON), f"left behind: {run.alive()}")
        if run.process.returncode == 0:
            return
        case.check("WorkerLost" in errors or "EngineFailed" in errors, errors[-2000:])
    case.check(False, "it did not end")


def _result(store: Path) -> Any:
    return [end.output for end in recorded(store / "vqe", records.End) if end.status == "finished"]


def _settled(found: list[Any]) -> list[str]:
    """Records in an order that does not depend on which call was done first, without calls that were given up."""
    return sorted(repr(record) for record in found if record[0] not in ("failure", "loop", "code", "circuit"))


ROWS: dict[str, Row] = {
    "memory": Row(too_much_memory, 12, 30),
    "exceptions": Row(exceptions, 14, 3 * len(RAISED)),
    "no-number": Row(no_number, 24, 36),
    "takes-long": Row(takes_long, 4, 9),
    "results": Row(unruly_results, 20, 100),
    "travel": Row(travelling, 12, len(TRAVELS)),
    "lasting": Row(lasting_long, 1, 3),
    "chaos": Row(chaos, 1, 1),
}
