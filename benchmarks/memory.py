"""Memory in megabytes (10^6 bytes): what is projected for a program before it runs, and what its process then takes.

`measured` is the growth of a fresh engine process' resident memory at its peak (VmHWM of /proc/PID/status, reset after
one program of one qubit), read from outside, so that reading the request and packing the answer count; `inside` is what
the engine itself saw (`Outcome.peak_bytes`: 0 for programs too small to be looked at). The line is `measured` <=
`projected` <= 1.5 `measured` + 50. efficient_su2(n, reps, linear) and the open Heisenberg chain, or its first Paulis;
fewer of both for the largest.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from qiskit import ClassicalRegister, QuantumCircuit
from qiskit.circuit import ParameterVector
from qiskit.circuit.library import efficient_su2

from benchmarks.adjoint import heisenberg
from hybridq.backends import Aer, Noise
from hybridq.engines import wire
from hybridq.engines.costs import need
from hybridq.engines.process import EngineProcess
from hybridq.errors import HybridqError
from hybridq.location import Location
from hybridq.program import Outcome, Program, Request, program

MAX_BYTES = 2**34
MEGABYTE = 1e6


@dataclass(frozen=True)
class Case:
    """A program of the table, made when its turn comes."""

    what: str
    qubits: int
    reps: int = 2
    paulis: int | None = None
    rows: int = 1
    shots: int | None = None
    backend: Any = "aer"
    gradient: str = "none"
    circuit: str = "su2"

    def program(self) -> Program:
        circuit = _circuit(self.circuit, self.qubits, self.reps)
        observable = None if self.paulis == 0 or self.circuit == "measured" else heisenberg(self.qubits)[: self.paulis]
        theta = np.random.default_rng(self.qubits).uniform(-3, 3, (self.rows, circuit.num_parameters))
        request = Request(circuit, observable, theta, self.shots, None, self.backend)
        return program(request, seed=0, location=Location("benchmark/f[0]"), gradient=self.gradient)


def _circuit(kind: str, n: int, reps: int) -> QuantumCircuit:
    if kind == "clifford":
        circuit = QuantumCircuit(n)
        for _ in range(reps):
            circuit.h(range(n))
            for qubit in range(n - 1):
                circuit.cx(qubit, qubit + 1)
        return circuit
    if kind == "few":  # two parameters, for parameter shift
        circuit = QuantumCircuit(n)
        for qubit, angle in enumerate(ParameterVector("a", 2)):
            circuit.ry(angle, qubit)
        for qubit in range(n - 1):
            circuit.cx(qubit, qubit + 1)
        return circuit
    if kind == "many":  # many parameters on few qubits
        circuit = QuantumCircuit(n)
        for number, angle in enumerate(ParameterVector("a", reps)):
            circuit.ry(angle, number % n)
        return circuit
    circuit = efficient_su2(n, reps=reps, entanglement="linear")
    if kind == "measured":
        circuit.add_register(ClassicalRegister(n))
        circuit.measure(0, 0)
        circuit.h(0)
        circuit.measure(range(n), range(n))
    return circuit


def cases() -> Iterator[Case]:
    """The table, smallest first in each family."""
    noise = Noise.depolarizing(1e-3, 1e-2, 2e-2)
    chain, dense, tableau = Aer("matrix_product_state"), Aer("density_matrix"), Aer("stabilizer")
    for n, reps, paulis in ((10, 2, None), (16, 2, None), (18, 2, None), (20, 2, None), (22, 1, 9), (24, 1, 3)):
        yield Case("statevector exact", n, reps, paulis)
        yield Case("statevector sampled", n, reps, None, shots=1000)
        yield Case("statevector samples", n, reps, 0, shots=1000)
        yield Case("adjoint value", n, reps, backend="adjoint")
        yield Case("adjoint gradient", n, reps, gradient="adjoint")
    yield Case("statevector sampled, 2^20 shots a group", 18, 1, 3, shots=3 * 2**20)
    for n in (10, 16, 20, 22, 24):
        yield Case("parameter shift", n, paulis=3, gradient="parameter-shift", circuit="few")
        yield Case("parameter shift sampled", n, paulis=3, shots=1000, gradient="parameter-shift", circuit="few")
    for n, reps in ((10, 2), (11, 1), (12, 1), (13, 0), (14, 0)):
        yield Case("density matrix exact", n, reps, 2, backend=dense)
        yield Case("density matrix sampled", n, reps, 2, shots=1000, backend=dense)
    for n in (10, 11):
        yield Case("density matrix with noise", n, 1, 2, backend=Aer(noise=noise))
        yield Case("density matrix with noise, sampled", n, 1, 2, shots=1000, backend=Aer(noise=noise))
        yield Case("density matrix with noise, samples", n, 1, 0, shots=1000, backend=Aer(noise=noise))
    for n in (10, 16, 20, 24):
        yield Case("matrix product state exact", n, backend=chain)
        yield Case("matrix product state sampled", n, shots=1000, backend=chain)
        yield Case("matrix product state samples", n, 2, 0, shots=1000, backend=chain)
        yield Case("bond dimension 16", n, 6, backend=Aer("matrix_product_state", bond_dimension=16))
        yield Case(
            "bond dimension 16 sampled", n, 6, 9, shots=1000, backend=Aer("matrix_product_state", bond_dimension=16)
        )
    yield Case("matrix product state exact", 16, 9, 6, backend=chain)
    yield Case("bond dimension 256", 20, 9, 6, backend=Aer("matrix_product_state", bond_dimension=256))
    for n in (10, 16, 24, 100):
        yield Case("stabilizer exact", n, backend=tableau, circuit="clifford")
        yield Case("stabilizer sampled", n, shots=1000, backend=tableau, circuit="clifford")
        yield Case("stabilizer samples", n, 2, 0, shots=1000, backend=tableau, circuit="clifford")
    yield Case("stabilizer samples, 10^6 shots", 24, 2, 0, shots=10**6, backend=tableau, circuit="clifford")
    for n, shots in ((10, 200), (16, 50), (18, 100), (20, 20), (22, 4), (24, 2)):
        yield Case("trajectories, measured on the way", n, 1, 0, shots=shots, circuit="measured")
        yield Case("trajectories, noise", n, 1, 0, shots=shots, backend=Aer("statevector", noise))
    yield Case("trajectories, 10^5 shots", 4, 1, 0, shots=10**5, circuit="measured")
    for n in (10, 18):
        yield Case("statevector exact", n, 1, 9, rows=50)
        yield Case("statevector sampled", n, 1, 3, rows=50, shots=1000)
        yield Case("adjoint gradient", n, 1, rows=50, gradient="adjoint")
    yield Case("statevector samples", 10, 1, 0, rows=50, shots=10**5)
    yield Case("density matrix exact", 10, 0, 2, rows=50, backend=dense)
    yield Case("density matrix sampled", 10, 0, 2, rows=50, shots=1000, backend=dense)
    yield Case("matrix product state exact", 20, rows=50, backend=chain)
    yield Case("matrix product state sampled", 16, rows=50, shots=1000, backend=chain)
    yield Case("stabilizer sampled", 24, rows=50, shots=1000, backend=tableau, circuit="clifford")
    yield Case("trajectories, measured on the way", 10, 1, 0, rows=50, shots=20, circuit="measured")
    yield Case("parameter shift", 10, 1, rows=50, gradient="parameter-shift", circuit="few")
    yield Case("60 parameters", 2, 60, rows=30_000, circuit="many")
    yield Case("60 parameters, gradients", 2, 60, rows=30_000, gradient="adjoint", circuit="many")


def measure(program: Program) -> tuple[int, Outcome]:
    """Bytes that a fresh engine process takes for ``program`` on top of what it takes before, and the outcome."""
    process = EngineProcess(MAX_BYTES, name="benchmark")
    try:
        process.evaluate([Case("", 1, 0, 0, shots=1).program()])
        idle = _status(process.pid, "VmRSS")
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak is now what is resident
        batch = wire.pack([program])
        reply = process.run(batch)
        grown = _status(process.pid, "VmHWM") - idle
        (outcome,) = wire.unpack_outcomes(reply)
        if isinstance(outcome, HybridqError):
            raise outcome
        return grown, outcome
    finally:
        process.close()


def _status(pid: int | None, key: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


def run(compare: Any) -> list[dict[str, Any]]:
    rows = []
    for case in cases():
        asked = case.program()
        projected = need(asked).bytes / MEGABYTE
        grown, outcome = measure(asked)
        measured = grown / MEGABYTE
        row = {
            "what": case.what, "qubits": case.qubits, "rows": case.rows, "seconds": outcome.seconds,
            "projected": projected, "measured": measured, "inside": outcome.peak_bytes / MEGABYTE,
            "ratio": projected / measured, "holds": "yes" if measured <= projected <= 1.5 * measured + 50 else "NO",
        }  # fmt: skip
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), file=sys.stderr)
        rows.append(row)
    failed = sum(row["holds"] != "yes" for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} hold", file=sys.stderr)
    return rows
