"""What a run adds to a step: L-BFGS-B with exact gradients, and single evaluations, in microseconds a step.

efficient_su2(n, reps=2, linear), open Heisenberg chain, 40 iterations. `bare` is scipy with lightning's C++ core and
nothing else; `loop` is `hq.minimize` in a run, journal on, in the driver's engine process; `bound` is 1.15 bare + 60.
`evaluation` is a value asked for in a plain ``for`` loop of a workflow, `value` the same by the bare engine, `added`
their difference.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import numpy as np
from qiskit.circuit.library import efficient_su2
from scipy.optimize import minimize

import hybridq as hq
from benchmarks.adjoint import heisenberg, lightning
from hybridq.engines.aer import AerEngine
from hybridq.location import Location
from hybridq.program import Request, program

SIZES = (4, 8, 12)
ROUNDS = 7
EVALUATIONS = 100
OPTIONS = {"maxiter": 40, "ftol": 1e-15}


@hq.quantum
def energy(theta: Any, circuit: Any, observable: Any) -> Any:
    return hq.expval(circuit, observable, theta)


@hq.workflow
def study(n: int) -> dict[str, float]:
    circuit, observable = efficient_su2(n, reps=2, entanglement="linear"), heisenberg(n)
    start = np.random.default_rng(n).uniform(-1, 1, 6 * n)
    energy(start, circuit, observable)
    hq.gradient(energy, start, circuit, observable)
    begun = time.perf_counter()
    for _ in range(EVALUATIONS):
        energy(start, circuit, observable)
    evaluation = (time.perf_counter() - begun) / EVALUATIONS
    begun = time.perf_counter()
    found = hq.minimize(energy, start, (circuit, observable), "L-BFGS-B", jac="adjoint", options=OPTIONS)
    return {"loop": (time.perf_counter() - begun) / found.nfev, "steps": found.nfev, "value": found.fun,
            "evaluation": evaluation}  # fmt: skip


def run(compare: Any) -> list[dict[str, Any]]:
    rows = []
    for n in SIZES:
        evaluate = lightning(n, True)
        start = np.random.default_rng(n).uniform(-1, 1, 6 * n)
        engine = AerEngine(2**33)
        circuit = efficient_su2(n, reps=2, entanglement="linear")
        asked = program(Request(circuit, heisenberg(n), start), seed=0, location=Location("benchmark/energy[0]"))
        engine.evaluate([asked])
        bare, value, found = [], [], []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            result = minimize(evaluate, start, jac=True, method="L-BFGS-B", options=OPTIONS)
            bare.append((time.perf_counter() - begun) / result.nfev)
            begun = time.perf_counter()
            for _ in range(EVALUATIONS):
                engine.evaluate([asked])
            value.append((time.perf_counter() - begun) / EVALUATIONS)
            with tempfile.TemporaryDirectory() as store:
                found.append(hq.run(study, n, store=store))
            assert abs(found[-1]["value"] - result.fun) < 1e-6
        loop, evaluation = (1e6 * statistics.median(f[key] for f in found) for key in ("loop", "evaluation"))
        alone, single = 1e6 * statistics.median(bare), 1e6 * statistics.median(value)
        rows.append({
            "qubits": n, "steps": found[0]["steps"], "bare": alone, "loop": loop, "bound": 1.15 * alone + 60,
            "value": single, "evaluation": evaluation, "added": evaluation - single,
        })  # fmt: skip
    return rows
