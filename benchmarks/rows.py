"""1,000 rows of parameters in one program, in milliseconds a row, against the execution time that Aer itself reports.

efficient_su2(n, reps=2, linear) and the open Heisenberg chain, one thread, in an engine process. `aer` is the median
over rows of what the results of ``AerSimulator.run(parameter_binds=...)`` say they took, nothing around it; `ratio` is
engine / aer.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from qiskit import transpile
from qiskit.circuit.library import efficient_su2
from qiskit_aer import AerSimulator

from benchmarks.adjoint import heisenberg
from hybridq.engines.process import EngineProcess
from hybridq.location import Location
from hybridq.program import Outcome, Program, Request, program

QUBITS, ROWS = 8, 1000


def run(compare: Any) -> list[dict[str, Any]]:
    theta = np.random.default_rng(1).uniform(-np.pi, np.pi, (ROWS, 6 * QUBITS))
    circuit = efficient_su2(QUBITS, reps=2, entanglement="linear")
    asked = program(Request(circuit, heisenberg(QUBITS), theta), seed=0, location=Location("benchmark/energy[0]"))
    backend = AerSimulator(method="statevector", max_parallel_threads=1)
    saved = circuit.copy()
    saved.save_expectation_value(heisenberg(QUBITS), range(QUBITS))
    compiled = transpile(saved, backend, optimization_level=0)
    binds = [{p: theta[:, i].tolist() for i, p in enumerate(compiled.parameters)}]
    reported: list[float] = []
    values: list[float] = []

    def aer() -> None:
        result = backend.run(compiled, parameter_binds=binds, shots=1).result()
        reported.append(statistics.median(row.time_taken for row in result.results))
        values[:] = [result.data(row)["expectation_value"] for row in range(ROWS)]

    process = EngineProcess(2**33)
    try:

        def engine(asked: Program = asked) -> Any:
            (outcome,) = process.evaluate([asked])
            assert isinstance(outcome, Outcome), outcome
            return outcome

        seconds = compare({"engine": engine, "aer": aer})
        assert abs(engine().values[:, 0] - np.array(values)).max() < 1e-9
    finally:
        process.close()
    row, own = 1e3 * seconds["engine"] / ROWS, 1e3 * statistics.median(reported)
    return [{"qubits": QUBITS, "rows": ROWS, "engine": row, "aer": own, "ratio": row / own}]
