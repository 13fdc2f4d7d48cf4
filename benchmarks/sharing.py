"""16 sampled loops at once on one device: evaluations a second, against one circuit a Dask task.

COBYLA of 60 evaluations each, 1,000 shots in each of three groups of Paulis, efficient_su2(4, reps=2) and the open
Heisenberg chain, on one cluster of one one-thread worker, in turns. `run` is hq.map of a workflow that is
``hq.minimize``. The others are 16 threads, each scipy's loop whose objective submits a plain task and waits for it; the
primitive is made once in the worker. `backend`: Qiskit's ``BackendEstimatorV2`` of an ``AerSimulator``, which measures;
`aer`: qiskit-aer's ``EstimatorV2``, which adds an error to exact values, of the size that those shots have. `energy` is
the mean of exact energies at the loops' last points, `apart` the difference to those of `run` over its standard error;
`ratio` the evaluations a second of `run` over these, the median of rounds, with the `least`.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from distributed import Client
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import Statevector
from scipy.optimize import minimize

import hybridq as hq
from benchmarks._site import play, site
from benchmarks.adjoint import heisenberg

LOOPS, QUBITS, SHOTS, EVALUATIONS, ROUNDS = 16, 4, 1000, 60, 5
CIRCUIT, OBSERVABLE = efficient_su2(QUBITS, reps=2, entanglement="linear"), heisenberg(QUBITS)
STARTS = np.random.default_rng(5).uniform(-np.pi, np.pi, (LOOPS, CIRCUIT.num_parameters))
GROUPS = 3  # XX, YY and ZZ: shots are split between them
# the counter of evaluations ends each loop: with a tolerance of 1e-9 nothing else does
OPTIONS = {"maxiter": EVALUATIONS, "tol": 1e-9}


@hq.quantum
def energy(theta: Any, circuit: Any, observable: Any) -> Any:
    return hq.expval(circuit, observable, theta, shots=GROUPS * SHOTS)


@hq.workflow
def loop(number: int) -> Any:
    found = hq.minimize(energy, STARTS[number], (CIRCUIT, OBSERVABLE), "COBYLA", options=OPTIONS)
    return {"x": found.x, "fun": found.fun, "nfev": found.nfev}


@hq.workflow
def study() -> list[Any]:
    return hq.map(loop, range(LOOPS))


_primitives: dict[str, Any] = {}
"""Of a worker."""


def task(kind: str, circuit: Any, observable: Any, theta: Any, precision: float) -> float:
    """One value on a worker, through the public path."""
    if kind not in _primitives:
        from qiskit.primitives import BackendEstimatorV2
        from qiskit_aer import AerSimulator
        from qiskit_aer.primitives import EstimatorV2

        one = {"max_parallel_threads": 1}
        _primitives[kind] = (
            EstimatorV2(options={"backend_options": one})
            if kind == "aer"
            else BackendEstimatorV2(backend=AerSimulator(**one))
        )
    job = _primitives[kind].run([(circuit, observable, theta)], precision=precision)
    return float(job.result()[0].data.evs)


def threads(client: Client, kind: str, precision: float, count: Any) -> list[Any]:
    """The same loops in 16 threads that submit one circuit at a time."""

    def one(number: int) -> Any:
        def objective(theta: Any) -> float:
            key = f"energy-{next(count)}"
            return float(client.submit(task, kind, CIRCUIT, OBSERVABLE, theta, precision, key=key, pure=False).result())

        found = minimize(objective, STARTS[number], method="COBYLA", options=OPTIONS)
        return {"x": found.x, "fun": found.fun, "nfev": found.nfev}

    with ThreadPoolExecutor(LOOPS) as pool:
        return list(pool.map(one, range(LOOPS)))


def run(compare: Any) -> list[dict[str, Any]]:
    count = itertools.count()
    rates: dict[str, list[float]] = {"run": [], "aer": [], "backend": []}
    ends: dict[str, list[float]] = {name: [] for name in rates}
    usual = statistics.mean(energy(start, CIRCUIT, OBSERVABLE).stderr for start in STARTS)
    with site(1) as client:
        for number in range(1 + ROUNDS):  # the first is not counted: the worker loads its libraries
            for name in rates:
                begun = time.perf_counter()
                if name == "run":
                    found, seconds = play(client, study, seed=number)
                else:
                    found = threads(client, name, usual if name == "aer" else 1 / math.sqrt(SHOTS), count)
                    seconds = time.perf_counter() - begun
                print(f"{name}: {sum(one['nfev'] for one in found)} evaluations, {seconds:.1f} s", file=sys.stderr)
                if number:
                    rates[name].append(sum(one["nfev"] for one in found) / seconds)
                    ends[name] += [
                        float(Statevector(CIRCUIT.assign_parameters(one["x"])).expectation_value(OBSERVABLE).real)
                        for one in found
                    ]
    own = np.array(ends["run"])
    rows = []
    for name, found in rates.items():
        other = np.array(ends[name])
        paired = own - other  # from the same start
        error = paired.std(ddof=1) / math.sqrt(len(paired))
        ratios = [a / b for a, b in zip(rates["run"], found, strict=True)]
        rows.append({
            "what": name, "loops": LOOPS, "rounds": ROUNDS, "a_second": statistics.median(found),
            "energy": float(other.mean()), "stderr": float(other.std(ddof=1) / math.sqrt(len(other))),
            "apart": float(abs(paired.mean()) / error) if error else 0.0,
            "ratio": statistics.median(ratios), "least": min(ratios),
        })  # fmt: skip
        assert name == "run" or rows[-1]["apart"] < 4, rows[-1]
    return rows
