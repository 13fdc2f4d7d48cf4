"""Relative errors of predicted seconds, an engine process calibrated first: 200 random programs, none of them in that.

Seconds are those that the process was on a processor (/proc), as the machine is shared. Medians, by kind of program.
`error`: of `Calibration.seconds` for a template that the engine knows, against the median of five evaluations, in five
rounds over all programs, each the second in a row; `least`: against the least of them; `clock`: as `error`, both by the
wall clock; `built-in`: of the built-in calibration; `online`: with `Corrections` that have seen the programs before
this one; `corrected`: that have seen one evaluation of this one; `first`: of the first evaluation, with what is
prepared. `scatter` is how far a program's own times lie from their median, `ratio` predicted to measured.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp

from benchmarks.adjoint import heisenberg
from hybridq.backends import Aer, Noise
from hybridq.engines.costs import DEFAULT, Corrections, Timed, calibrate, features, fitted, need, preparation
from hybridq.engines.process import EngineProcess
from hybridq.location import Location
from hybridq.problems.molecules import molecule
from hybridq.program import Outcome, Program, Request, program

PROGRAMS = 200
ROUNDS = 5


def programs(count: int, seed: int = 0) -> Iterator[Program]:
    """Random programs of a mixed study."""
    random = np.random.default_rng(seed)
    hydrogen = {
        atoms: molecule("; ".join(f"H 0 0 {0.9 * i}" for i in range(atoms)), basis="sto-3g") for atoms in (2, 4)
    }

    def pick(*values: Any) -> Any:
        return values[int(random.integers(len(values)))]

    for number in range(count):
        what = pick("su2", "su2", "su2", "qaoa", "qaoa", "ucc", "ucc", "noise", "chain", "stabilizer", "measured")
        shots, backend, gradient, grouping, rows = None, "aer", "none", "qubit-wise", int(pick(1, 1, 1, 3, 10))
        observable: Any
        if what in ("su2", "qaoa", "ucc"):
            n = int(random.integers(4, 19))
            if what == "su2":
                circuit = efficient_su2(n, reps=int(random.integers(1, 4)), entanglement=pick("linear", "circular"))
                observable = heisenberg(n)
            elif what == "qaoa":
                circuit, observable = _qaoa(n, int(random.integers(1, 4)), random)
            else:
                problem = hydrogen[pick(2, 4)]
                circuit, observable, n = problem.ansatz, problem.hamiltonian, problem.ansatz.num_qubits
            how = pick("exact", "adjoint", "gradient", "sampled", "commuting", "samples", "shift")
            if n > 14:
                rows = 1
            if how == "samples":
                observable = None
            if how in ("sampled", "commuting", "samples"):
                shots, grouping = int(pick(100, 1000, 20_000)), pick("qubit-wise", "commuting")
            if how == "adjoint":
                backend = "adjoint"
            if how == "gradient":
                gradient = "adjoint"
            if how == "shift" and n <= 8:
                gradient, rows = "parameter-shift", 1
        elif what == "noise":
            n = int(random.integers(2, 9))
            circuit, observable = efficient_su2(n, reps=int(random.integers(1, 3))), heisenberg(n)
            backend = Aer(noise=Noise.depolarizing(1e-3, 1e-2, pick(0.0, 1e-2)))
            rows = min(rows, 3)
            shots = pick(None, 500, 5000)
            if pick(0, 1, 2) == 0:
                backend, shots, rows = Aer("statevector", backend.noise), 60, 1
        elif what == "chain":
            n = int(random.integers(4, 26))
            circuit, observable = (
                efficient_su2(n, reps=int(random.integers(1, 6)), entanglement="linear"),
                heisenberg(n),
            )
            backend, shots = Aer("matrix_product_state", bond_dimension=pick(None, 8, 16)), pick(None, None, 300, 2000)
            rows = min(rows, 3)
        elif what == "stabilizer":
            n = int(random.integers(4, 50))
            circuit, observable, backend = _clifford(n, random), heisenberg(n), "stabilizer"
            shots = pick(None, 200, 1000)
        else:
            n = int(random.integers(2, 12))
            circuit, observable, shots, rows = _measured(n, int(random.integers(1, 3))), None, 50, min(rows, 3)
        theta = random.uniform(-np.pi, np.pi, (rows, circuit.num_parameters))
        request = Request(circuit, observable, theta, shots, None, backend, grouping)
        yield program(request, seed=seed, location=Location(f"benchmark/f[{number}]"), gradient=gradient)


def _qaoa(n: int, depth: int, random: np.random.Generator) -> tuple[QuantumCircuit, SparsePauliOp]:
    """For the cut of a random graph of three edges a vertex."""
    edges = sorted({tuple(sorted(map(int, random.choice(n, 2, replace=False)))) for _ in range(3 * n // 2)})
    circuit = QuantumCircuit(n)
    circuit.h(range(n))
    for layer in range(depth):
        gamma, beta = Parameter(f"g{layer}"), Parameter(f"b{layer}")
        for edge in edges:
            circuit.rzz(2 * gamma, *edge)
        for qubit in range(n):
            circuit.rx(2 * beta, qubit)
    return circuit, SparsePauliOp.from_sparse_list([("ZZ", list(edge), 0.5) for edge in edges], n)


def _clifford(n: int, random: np.random.Generator) -> QuantumCircuit:
    circuit = QuantumCircuit(n)
    for _ in range(int(random.integers(n, 6 * n))):
        if random.random() < 0.5:
            getattr(circuit, str(random.choice(["h", "s", "sdg", "x", "sx"])))(int(random.integers(n)))
        else:
            circuit.cx(*map(int, random.choice(n, 2, replace=False)))
    return circuit


def _measured(n: int, reps: int) -> QuantumCircuit:
    circuit = QuantumCircuit(n, n)
    circuit.compose(efficient_su2(n, reps=reps), range(n), inplace=True)
    circuit.measure(0, 0)
    circuit.reset(0)
    circuit.measure(range(n), range(n))
    return circuit


class _Timer:
    """Evaluates one program at a time, and notes what the clock showed beside the time on a processor."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self.clock: list[Timed] = []
        self._firsts: dict[int, float] = {}

    def evaluate(self, asked: Sequence[Program]) -> list[Any]:
        """The outcome of ``asked``, one program, with the time on a processor for its seconds."""
        before = self._busy()
        (outcome,) = self._process.evaluate(asked)
        assert isinstance(outcome, Outcome), outcome
        first = self._firsts.setdefault(id(asked[0]), outcome.seconds)
        self.clock.append((asked[0], first, outcome.seconds))
        after = self._busy()
        if before.keys() <= after.keys():  # else a thread has ended, and its time is lost
            busy = sum(after.values()) - sum(before.values())
            outcome = replace(outcome, seconds=min(busy, outcome.seconds))
        return [outcome]

    def _busy(self) -> dict[str, float]:
        """Seconds on a processor, by thread."""
        files = Path(f"/proc/{self._process.pid}/task").glob("*/schedstat")
        return {str(file): int(file.read_text().split()[0]) / 1e9 for file in files}


def run(compare: Any) -> list[dict[str, Any]]:
    process = EngineProcess(2**33, name="benchmark")
    process.start()
    begun = time.perf_counter()
    timer = _Timer(process)
    calibration = calibrate(timer.evaluate)
    clock = fitted(_medians(timer.clock))
    print(f"calibrated in {time.perf_counter() - begun:.1f} s", file=sys.stderr)
    listed = list(programs(PROGRAMS))
    timer.clock.clear()
    times = [[timer.evaluate([each])[0].seconds for each in listed]]
    for _ in range(1 + ROUNDS):
        times.append([[timer.evaluate([each])[0].seconds for _ in range(2)][-1] for each in listed])
    process.close()
    walls = [wall for _, _, wall in timer.clock[3 * PROGRAMS + 1 :: 2]]  # of the rounds, the second of each pair
    corrections = Corrections()
    errors: dict[str, list[dict[str, float]]] = {}
    for number, (each, first, seen, *later) in enumerate(zip(listed, *times, strict=True)):
        usual, wall = statistics.median(later), statistics.median(walls[number::PROGRAMS])
        online = need(each, calibration, corrections).seconds
        corrections.observe(each, seen, calibration)
        estimate = calibration.seconds(each)
        predicted = {
            "error": estimate / usual, "least": estimate / min(later), "clock": clock.seconds(each) / wall,
            "built-in": DEFAULT.seconds(each) / usual, "online": online / usual,
            "corrected": need(each, calibration, corrections).seconds / usual,
            "first": (estimate + preparation(each, calibration)) / first,
        }  # fmt: skip
        found = {name: abs(ratio - 1) for name, ratio in predicted.items()}
        found["scatter"] = statistics.median(abs(time / usual - 1) for time in later)
        errors.setdefault(features(each)[0], []).append(found | {"ratio": predicted["error"]})
    return [_row(kind, found) for kind, found in sorted(errors.items())] + [
        _row("all", [own for found in errors.values() for own in found])
    ]


def _medians(timed: Sequence[Timed]) -> list[Timed]:
    """The median of all later times of each program."""
    found: dict[int, list[Timed]] = {}
    for each in timed:
        found.setdefault(id(each[0]), []).append(each)
    return [
        (own[0][0], own[0][1], statistics.median(later for *_, later in own[1:])) for own in found.values() if own[1:]
    ]


def _row(kind: str, found: list[dict[str, float]]) -> dict[str, Any]:
    medians = {name: statistics.median(own[name] for own in found) for name in found[0]}
    within = sum(own["error"] <= 0.3 for own in found) / len(found)
    return {"kind": kind, "programs": len(found), **medians, "within 30 %": within}
