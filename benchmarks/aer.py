"""One exact energy in milliseconds a call on one thread: the Aer engine against ``AerSimulator.run``.

efficient_su2(n, reps=2, linear) and the open Heisenberg chain. `run` re-binds with ``parameter_binds`` a circuit that
was transpiled once; `ratio` is engine / run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from qiskit import transpile
from qiskit.circuit.library import efficient_su2
from qiskit_aer import AerSimulator

from benchmarks.adjoint import heisenberg
from hybridq.engines.aer import AerEngine
from hybridq.location import Location
from hybridq.program import Program, Request, program

SIZES = (4, 8, 12)


def run(compare: Any) -> list[dict[str, Any]]:
    rows = []
    engine, backend = AerEngine(2**33), AerSimulator(method="statevector", max_parallel_threads=1)
    for n in SIZES:
        theta = np.random.default_rng(n).uniform(-np.pi, np.pi, 6 * n)
        circuit = efficient_su2(n, reps=2, entanglement="linear")
        first = program(Request(circuit, heisenberg(n), theta), seed=0, location=Location("benchmark/energy[0]"))
        saved = circuit.copy()
        saved.save_expectation_value(heisenberg(n), range(n))
        compiled = transpile(saved, backend, optimization_level=0)
        parameters = list(compiled.parameters)

        def prepared(first: Program = first, theta: Any = theta) -> float:
            (outcome,) = engine.evaluate([Program(first.template, theta[None], None, first.seeds, first.plan, (), ())])
            return float(outcome.values[0, 0])

        def public(compiled: Any = compiled, parameters: Any = parameters, theta: Any = theta) -> float:
            binds = [{p: [value] for p, value in zip(parameters, theta.tolist(), strict=True)}]
            return float(backend.run(compiled, parameter_binds=binds, shots=1).result().data(0)["expectation_value"])

        assert abs(prepared() - public()) < 1e-9
        seconds = compare({"engine": prepared, "run": public})
        rows.append({"qubits": n, **{name: 1e3 * s for name, s in seconds.items()},
                     "ratio": seconds["engine"] / seconds["run"]})  # fmt: skip
    return rows
