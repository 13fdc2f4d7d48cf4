"""What durability costs: resuming, recording, and bytes on disk.

`replay` resumes a loop of 10,000 recorded evaluations (2 qubits, exact) whose end is missing, in the driver by a custom
method and Nelder-Mead with a callback, and beside its evaluations by Nelder-Mead: seconds of all of ``hq.run``, of the
optimizer alone on the same values, and what is added for an evaluation, in microseconds. `steps` resumes 1,000 recorded
classical steps in a new process, its start and imports included. `journal` is the time in the driver's thread spent
writing records, and the processor time of making them durable, over the wall time of a loop of 8 qubits (COBYLA, 300
evaluations). `growth` are bytes of journal an evaluation of 50 parameters, without and with its gradient. Each is the
median of several rounds, beside its limit.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from qiskit.circuit.library import efficient_su2
from scipy.optimize import OptimizeResult, minimize

import hybridq as hq
from benchmarks.adjoint import heisenberg
from hybridq.journal import Journal, LoopEnd, Row, read_records, unpack_array

ROUNDS = 5
EVALUATIONS = 10_000
STEPS = 1_000
ANGLES = ParameterVector("angle", 2)
SMALL = QuantumCircuit(2)
SMALL.ry(ANGLES[0], 0)
SMALL.ry(ANGLES[1], 1)
SMALL.cx(0, 1)
WIDE = efficient_su2(8, reps=2, entanglement="linear")
FIFTY = QuantumCircuit(2)
for _angle in ParameterVector("t", 50):
    FIFTY.ry(_angle, 0)


@hq.quantum
def energy(theta: Any) -> Any:
    return hq.expval(SMALL, {"ZZ": 1.0, "XI": 0.5}, theta)


@hq.quantum
def wide(theta: Any, shots: int | None) -> Any:
    return hq.expval(WIDE, heisenberg(8), theta, shots=shots)


@hq.quantum
def fifty(theta: Any) -> Any:
    return hq.expval(FIFTY, {"ZZ": 1.0, "IX": 0.5}, theta)


def walk(fun: Any, x0: Any, args: Any = (), **_: Any) -> OptimizeResult:
    """A custom method that does nearly nothing itself."""
    x = np.array(x0)
    for k in range(EVALUATIONS):
        x = x + 1e-4 * (fun(x) > 0) + 1e-5 * (k % 7)
    return OptimizeResult(x=x, fun=0.0, nfev=EVALUATIONS, success=True, message="done")


def watch(intermediate_result: Any) -> None:
    """Keeps a loop in the driver."""


LIMIT = {"maxfev": EVALUATIONS, "maxiter": 10**6, "xatol": 0.0, "fatol": 0.0}


@hq.workflow
def by_a_custom_method() -> Any:
    return hq.minimize(energy, [0.3, 0.4], method=walk).nfev


@hq.workflow
def in_the_driver() -> Any:
    return hq.minimize(energy, [0.3, 0.4], method="Nelder-Mead", callback=watch, options=LIMIT).nfev


@hq.workflow
def beside_the_engine() -> Any:
    return hq.minimize(energy, [0.3, 0.4], method="Nelder-Mead", options=LIMIT).nfev


def alone(workflow: Any, rows: list[Row]) -> None:
    """The optimizer's own arithmetic, on recorded values."""
    values = iter([row.value for row in rows])

    def answer(x: Any) -> float:
        return next(values)

    if workflow is by_a_custom_method:
        walk(answer, [0.3, 0.4])
    else:
        callback = watch if workflow is in_the_driver else None
        minimize(answer, [0.3, 0.4], method="Nelder-Mead", callback=callback, options=LIMIT)


def quietly(workflow: Any, *args: Any, **options: Any) -> tuple[Any, float]:
    with contextlib.redirect_stderr(io.StringIO()):
        begun = time.perf_counter()
        value = hq.run(workflow, *args, name="run", workers=1, **options)
        return value, time.perf_counter() - begun


def without_its_end(directory: Path, copy: Path) -> None:
    """A copy of a run whose last loop did not end."""
    shutil.copytree(directory, copy)
    end = next(number for number, record in read_records(directory) if isinstance(record, LoopEnd))
    path = copy / "journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[: end - 1]))


def replay(workflow: Any, scratch: Path) -> tuple[float, float, float]:
    """Seconds of a resume and of the optimizer alone, microseconds an evaluation between them."""
    store = scratch / workflow.__name__
    quietly(workflow, store=store)
    rows = [record for _, record in read_records(store / "run") if isinstance(record, Row)]
    resumed, own = [], []
    for number in range(ROUNDS):
        copy = scratch / f"{workflow.__name__}-{number}"
        without_its_end(store / "run", copy / "run")
        found, seconds = quietly(workflow, store=copy)
        assert found == len(rows), (found, len(rows))
        resumed.append(seconds)
        begun = time.perf_counter()
        alone(workflow, rows)
        own.append(time.perf_counter() - begun)
    total, arithmetic = statistics.median(resumed), statistics.median(own)
    return total, arithmetic, 1e6 * (total - arithmetic) / len(rows)


MANY = """
import sys
import hybridq as hq


@hq.classical
def square(i):
    return i * i


@hq.workflow
def study(n):
    return sum(hq.map(square, range(n)))


if __name__ == "__main__":
    print(hq.run(study, int(sys.argv[2]), name="run", store=sys.argv[1], workers=2))
"""


def steps(scratch: Path) -> float:
    """Seconds of a process that finds all its steps recorded."""
    script, store = scratch / "many.py", scratch / "many"
    script.write_text(MANY)
    command = [sys.executable, str(script), str(store), str(STEPS)]
    found = []
    for _ in range(1 + ROUNDS):
        begun = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(time.perf_counter() - begun)
        assert int(done.stdout) == sum(i * i for i in range(STEPS))
    return statistics.median(found[1:])


@hq.workflow
def loop(shots: int | None) -> float:
    begun = time.perf_counter()
    options = {"maxiter": 300, "tol": 1e-12}
    hq.minimize(wide, np.full(WIDE.num_parameters, 0.1), (shots,), method="COBYLA", options=options)
    return time.perf_counter() - begun


@contextlib.contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds in the writing of records and values, and of the processor in making them durable."""
    spent = {"write": 0.0, "sync": 0.0}
    real = Journal.append_all, Journal.store, Journal.sync

    def wrap(method: Any, key: str, clock: Any) -> Any:
        def call(*args: Any) -> Any:
            begun = clock()
            try:
                return method(*args)
            finally:
                spent[key] += clock() - begun

        return call

    Journal.append_all = wrap(real[0], "write", time.perf_counter)  # type: ignore[method-assign]
    Journal.store = wrap(real[1], "write", time.perf_counter)  # type: ignore[method-assign]
    Journal.sync = wrap(real[2], "sync", time.thread_time)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Journal.append_all, Journal.store, Journal.sync = real  # type: ignore[method-assign]


def journal(shots: int | None, scratch: Path) -> float:
    """The journal's part of a loop's wall time."""
    found = []
    for number in range(1 + ROUNDS):
        with timed() as spent:
            seconds, _ = quietly(loop, shots, store=scratch / f"loop-{shots}-{number}")
        found.append((spent["write"] + spent["sync"]) / seconds)
    return statistics.median(found[1:])  # the first starts the engine


@hq.workflow
def fifty_steps(jac: str | None, evaluations: int) -> int:
    options = {"maxfun": evaluations, "maxiter": 10**6, "ftol": 0.0, "gtol": 0.0} if jac else {"maxfev": evaluations}
    method = "L-BFGS-B" if jac else "Powell"
    found = hq.minimize(fifty, np.linspace(-1, 1, 50), method=method, jac=jac, options=options)
    return int(found.nfev)


def growth(jac: str | None, scratch: Path) -> float:
    """Bytes of all files for a row more, with what stands beside rows left out."""
    store = scratch / f"growth-{jac}"
    quietly(fifty_steps, jac, 60, store=store)
    lines = (store / "run" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    rows = [(len(line), record) for line, (_, record) in zip(lines, read_records(store / "run"), strict=True)
            if isinstance(record, Row)]  # fmt: skip
    assert all(len(unpack_array(row.x)) == 50 and (row.g is None) == (jac is None) for _, row in rows)
    return statistics.mean(size for size, _ in rows)


def run(compare: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def add(what: str, value: float, unit: str, limit: float | None) -> None:
        found.append({"what": what, "value": value, "unit": unit, "limit": limit})
        print(found[-1], file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        scratch = Path(folder)
        for workflow in (by_a_custom_method, in_the_driver, beside_the_engine):
            total, own, added = replay(workflow, scratch)
            name = workflow.__name__.replace("_", " ")
            add(f"replay {name}: {EVALUATIONS:,} evaluations", total, "s", None)
            add(f"replay {name}: the optimizer alone", own, "s", None)
            add(f"replay {name}: added an evaluation", added, "us", 100.0)
        add(f"steps: {STEPS:,} in a new process", steps(scratch), "s", 5.0)
        add("journal: of an exact loop of 8 qubits", 100 * journal(None, scratch), "%", 5.0)
        add("journal: of a sampled loop of 8 qubits", 100 * journal(1000, scratch), "%", 3.0)
        add("growth: an evaluation of 50 parameters", growth(None, scratch), "bytes", 1024.0)
        add("growth: the same with its gradient", growth("adjoint", scratch), "bytes", 1638.0)
    return found
