"""What a run adds to a step: L-BFGS-B with exact gradients, and single evaluations, in microseconds a step.

efficient_su2(n, reps=2, linear), open Heisenberg chain, 40 iterations. `bare` is scipy with lightning's C++ core and
nothing else; `loop` is `hq.minimize` in a run, journal on, in the driver's engine process; `bound` is 1.15 bare + 60.
`evaluation` is a value asked for in a plain ``for`` loop of a workflow, `value` the same by the bare engine, `added`
their difference; `trip` is the part of it that two processes of this machine take to hand each other the same number
of bytes through pipes, with nothing done on either side but as long a pause as the evaluation.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from qiskit.circuit.library import efficient_su2
from scipy.optimize import minimize

import hybridq as hq
from benchmarks.adjoint import heisenberg, lightning
from hybridq.engines.aer import AerEngine
from hybridq.engines.wire import pack, pack_outcomes
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


_ECHO = """
import os, sys, time
while os.read(0, 65536):
    end = time.perf_counter() + float(sys.argv[1])
    while time.perf_counter() < end:
        pass
    os.write(1, bytes(int(sys.argv[2])))
"""


def trip(asked: Any, outcome: Any, seconds: float) -> float:
    """Seconds from a request to its answer, beyond the ``seconds`` that the other process is busy with it."""
    request, answer = len(pack([asked]).payload), len(pack_outcomes([outcome]))
    command = [sys.executable, "-S", "-c", _ECHO, str(seconds), str(answer)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as echo:
        assert echo.stdin is not None
        assert echo.stdout is not None
        times = []
        for _ in range(EVALUATIONS):
            begun = time.perf_counter()
            os.write(echo.stdin.fileno(), bytes(request))
            os.read(echo.stdout.fileno(), 65536)
            times.append(time.perf_counter() - begun)
    return statistics.median(times) - seconds


def run(compare: Any) -> list[dict[str, Any]]:
    rows = []
    for n in SIZES:
        evaluate = lightning(n, True)
        start = np.random.default_rng(n).uniform(-1, 1, 6 * n)
        engine = AerEngine(2**33)
        circuit = efficient_su2(n, reps=2, entanglement="linear")
        asked = program(Request(circuit, heisenberg(n), start), seed=0, location=Location("benchmark/energy[0]"))
        engine.evaluate([asked])
        bare, value, found, trips = [], [], [], []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            result = minimize(evaluate, start, jac=True, method="L-BFGS-B", options=OPTIONS)
            bare.append((time.perf_counter() - begun) / result.nfev)
            begun = time.perf_counter()
            for _ in range(EVALUATIONS):
                engine.evaluate([asked])
            value.append((time.perf_counter() - begun) / EVALUATIONS)
            trips.append(trip(asked, engine.evaluate([asked])[0], value[-1]))
            with tempfile.TemporaryDirectory() as store:
                found.append(hq.run(study, n, store=store))
            assert abs(found[-1]["value"] - result.fun) < 1e-6
        loop, evaluation = (1e6 * statistics.median(f[key] for f in found) for key in ("loop", "evaluation"))
        alone, single = 1e6 * statistics.median(bare), 1e6 * statistics.median(value)
        rows.append({
            "qubits": n, "steps": found[0]["steps"], "bare": alone, "loop": loop, "bound": 1.15 * alone + 60,
            "value": single, "evaluation": evaluation, "added": evaluation - single,
            "trip": 1e6 * statistics.median(trips),
        })  # fmt: skip
    return rows
