"""24 independent exact loops on two one-thread workers against one: parallel efficiency T1 / (2 T2).

Each a COBYLA loop of a fixed number of evaluations, or L-BFGS-B with gradients in one pass, of efficient_su2(n, reps=2)
and the open Heisenberg chain, all in seconds of ``hq.run``; clusters start before. `machine` is the same of bare
processes that do a numpy calculation of a fixed length and nothing else, in the same rounds: what the machine allows.
`driver` is the driver's own processor time in the run on two workers, which has to share their cores, `bare` the
efficiency that is left if it shares them perfectly: 1 / (1 + driver / T1).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
from qiskit.circuit.library import efficient_su2

import hybridq as hq
from benchmarks._site import play, site
from benchmarks.adjoint import heisenberg

LOOPS, ROUNDS = 24, 3
# method, qubits, evaluations of a loop at most: about a second of work a loop
KINDS = (("COBYLA", 10, 150), ("L-BFGS-B", 10, 1000), ("L-BFGS-B", 12, 400))
_WORK = """
import time, numpy
a = numpy.random.default_rng(1).random((256, 256))
begun = time.perf_counter()
for _ in range(2500): (a @ a).sum()
print(time.perf_counter() - begun)
"""


@hq.quantum
def energy(theta: Any, circuit: Any, observable: Any) -> Any:
    return hq.expval(circuit, observable, theta)


@hq.workflow
def loop(number: int, method: str, qubits: int, evaluations: int) -> Any:
    circuit, observable = efficient_su2(qubits, reps=2, entanglement="linear"), heisenberg(qubits)
    start = np.random.default_rng(number).uniform(-np.pi, np.pi, circuit.num_parameters)
    if method == "COBYLA":
        options = {"maxiter": evaluations, "tol": 1e-12}
        found = hq.minimize(energy, start, (circuit, observable), method, options=options)
    else:
        options = {"maxfun": evaluations, "maxiter": 10**6, "ftol": 0.0, "gtol": 0.0}
        found = hq.minimize(energy, start, (circuit, observable), method, jac="adjoint", options=options)
    return {"x": found.x, "fun": found.fun, "nfev": found.nfev}


@hq.workflow
def study(method: str, qubits: int, evaluations: int) -> list[Any]:
    return hq.map(loop, range(LOOPS), [method] * LOOPS, [qubits] * LOOPS, [evaluations] * LOOPS)


def bare(count: int) -> float:
    """Mean seconds of the calculation in each of ``count`` processes at once."""
    started = [subprocess.Popen([sys.executable, "-c", _WORK], stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return statistics.mean(float(process.communicate()[0]) for process in started)


def run(compare: Any) -> list[dict[str, Any]]:
    rows = []
    with site(1) as one, site(2) as two:
        for kind in KINDS:
            times: dict[str, list[float]] = {"one": [], "two": [], "driver": [], "machine": []}
            for _ in range(ROUNDS):
                times["machine"].append(bare(1) / bare(2))
                alone, seconds = play(one, study, *kind)
                times["one"].append(seconds)
                spent = time.process_time()
                shared, seconds = play(two, study, *kind)
                times["two"].append(seconds)
                times["driver"].append(time.process_time() - spent)
                assert [(a["fun"], a["x"].tolist()) for a in alone] == [(b["fun"], b["x"].tolist()) for b in shared]
                print(kind, {name: round(found[-1], 3) for name, found in times.items()}, file=sys.stderr)
            efficiency = [a / (2 * b) for a, b in zip(times["one"], times["two"], strict=True)]
            machine = statistics.median(times["machine"])
            middle = statistics.median(efficiency)
            driver = statistics.median(times["driver"])
            rows.append({
                "method": kind[0], "qubits": kind[1], "evaluations": sum(a["nfev"] for a in alone),
                "one": statistics.median(times["one"]), "two": statistics.median(times["two"]), "efficiency": middle,
                "least": min(efficiency), "most": max(efficiency), "machine": machine, "of_machine": middle / machine,
                "driver": driver, "bare": 1 / (1 + driver / statistics.median(times["one"])),
            })  # fmt: skip
    return rows
