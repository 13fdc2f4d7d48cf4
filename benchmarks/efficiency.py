"""24 independent exact loops on two one-thread workers against one: parallel efficiency T1 / (2 T2).

Each a COBYLA loop of a fixed number of evaluations, or L-BFGS-B with gradients in one pass, of efficient_su2(n, reps=2)
and the open Heisenberg chain, all in seconds of ``hq.run``; clusters start before. `machine` is the same of bare
processes that do a numpy calculation of a fixed length and nothing else, in the same rounds: what the machine allows.
`cpu_one` and `cpu_two` are seconds on a processor of driver, workers and engines together: what a second worker adds
to the work, whatever else the machine does. `driver` is the driver's part on two workers, for which there is no third
core: `bare` is the efficiency if it shared theirs perfectly, 1 / (1 + driver / cpu_one).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import psutil
from distributed import Client
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


def busy(client: Client) -> float:
    """Seconds on a processor of the workers and their engine processes so far."""
    workers = [psutil.Process(pid) for pid in client.run(os.getpid).values()]
    times = [each.cpu_times() for worker in workers for each in (worker, *worker.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def run(compare: Any) -> list[dict[str, Any]]:
    rows = []
    with site(1) as one, site(2) as two:
        for kind in KINDS:
            times: dict[str, list[float]] = {
                name: [] for name in ("one", "two", "cpu_one", "cpu_two", "driver", "machine")
            }
            for _ in range(ROUNDS):
                times["machine"].append(bare(1) / bare(2))
                found = []
                for name, client in (("one", one), ("two", two)):
                    spent, own = busy(client), time.process_time()
                    value, seconds = play(client, study, *kind)
                    found.append(value)
                    times[name].append(seconds)
                    own = time.process_time() - own
                    times[f"cpu_{name}"].append(busy(client) - spent + own)
                times["driver"].append(own)
                alone, shared = found
                assert [(a["fun"], a["x"].tolist()) for a in alone] == [(b["fun"], b["x"].tolist()) for b in shared]
                print(kind, {name: round(listed[-1], 3) for name, listed in times.items()}, file=sys.stderr)
            efficiency = [a / (2 * b) for a, b in zip(times["one"], times["two"], strict=True)]
            machine = statistics.median(times["machine"])
            middle = statistics.median(efficiency)
            driver, cpu_one, cpu_two = (statistics.median(times[name]) for name in ("driver", "cpu_one", "cpu_two"))
            rows.append({
                "method": kind[0], "qubits": kind[1], "evaluations": sum(a["nfev"] for a in alone),
                "one": statistics.median(times["one"]), "two": statistics.median(times["two"]), "efficiency": middle,
                "least": min(efficiency), "most": max(efficiency), "machine": machine, "of_machine": middle / machine,
                "cpu_one": cpu_one, "cpu_two": cpu_two, "driver": driver, "bare": 1 / (1 + driver / cpu_one),
            })  # fmt: skip
    return rows
