"""What a run adds to a step: L-BFGS-B with exact gradients, and single evaluations, in microseconds a step.

efficient_su2(n, reps=2, linear), open Heisenberg chain, 40 iterations. `bare` is scipy with lightning's C++ core and
nothing else; `loop` is `hq.minimize` in a run, journal on, in the driver's engine process; `bound` is 1.15 bare + 60.
`evaluation` is a value asked for in a plain ``for`` loop of a workflow, `value` the same by the bare engine, `added`
their difference; `trip` is the part of it that two processes of this machine take to hand each other the same number
of bytes through pipes, with nothing done on either side but as long a pause as the evaluation. All take turns within
the workflow, since the speed of a shared machine changes from second to second; medians over turns, of `over`, which
is loop - bound, and `added` too.
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
TURNS, EVALUATIONS = 21, 50
OPTIONS = {"maxiter": 40, "ftol": 1e-15}


@hq.quantum
def energy(theta: Any, circuit: Any, observable: Any) -> Any:
    return hq.expval(circuit, observable, theta)


@hq.workflow
def study(n: int) -> dict[str, float]:
    circuit, observable = efficient_su2(n, reps=2, entanglement="linear"), heisenberg(n)
    start = np.random.default_rng(n).uniform(-1, 1, 6 * n)
    both, engine = lightning(n, True), AerEngine(2**33)
    asked = program(Request(circuit, observable, start), seed=0, location=Location("benchmark/energy[0]"))
    (outcome,) = engine.evaluate([asked])
    energy(start, circuit, observable)
    hq.gradient(energy, start, circuit, observable)
    turns = []
    for _ in range(TURNS):
        found, bare = timed(lambda: minimize(both, start, jac=True, method="L-BFGS-B", options=OPTIONS))
        mine, loop = timed(lambda: hq.minimize(energy, start, (circuit, observable), "L-BFGS-B", jac="adjoint",
                                               options=OPTIONS))  # fmt: skip
        assert abs(mine.fun - found.fun) < 1e-6
        bare, loop = bare / found.nfev, loop / mine.nfev
        _, value = timed(lambda: [engine.evaluate([asked]) for _ in range(EVALUATIONS)])
        _, evaluation = timed(lambda: [energy(start, circuit, observable) for _ in range(EVALUATIONS)])
        turns.append({
            "steps": mine.nfev, "bare": 1e6 * bare, "loop": 1e6 * loop, "bound": 1e6 * 1.15 * bare + 60,
            "over": 1e6 * (loop - 1.15 * bare) - 60, "value": 1e6 * value / EVALUATIONS,
            "evaluation": 1e6 * evaluation / EVALUATIONS, "added": 1e6 * (evaluation - value) / EVALUATIONS,
            "trip": 1e6 * trip(asked, outcome, value / EVALUATIONS),
        })  # fmt: skip
    return {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}


def timed(call: Any) -> tuple[Any, float]:
    begun = time.perf_counter()
    found = call()
    return found, time.perf_counter() - begun


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
        with tempfile.TemporaryDirectory() as store:
            rows.append({"qubits": n, **hq.run(study, n, store=store)})
    return rows
