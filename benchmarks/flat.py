"""Resident memory over 100,000 evaluations in one run: bytes an evaluation, in each process.

100 workflows, five at a time, each a Nelder-Mead loop of 950 evaluations of two qubits and 50 single ones in a plain
``for`` loop, journal on; the scheduler and two one-thread workers are processes of their own. Every 1,000 evaluations
resident memory is read, of a worker with its engine process. `slope` is that of a line through all readings after the
first 10,000 evaluations, by least squares, in bytes an evaluation, with its standard error; `growth` is the last
reading less the first of those, in megabytes (10^6 bytes); `last_half` the slope after the first 50,000.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from distributed import Client
from distributed.deploy.subprocess import SubprocessCluster
from qiskit.circuit.library import efficient_su2

import hybridq as hq
from benchmarks._site import play, warm
from benchmarks.adjoint import heisenberg
from hybridq.scope import Scope, current

WORKFLOWS, AT_ONCE, IN_LOOP, SINGLE, EVERY, SETTLED = 100, 5, 950, 50, 1000, 10_000
CIRCUIT, OBSERVABLE = efficient_su2(2, reps=1), heisenberg(2)
MEGABYTE = 1e6


@hq.quantum
def energy(theta: Any, circuit: Any, observable: Any) -> Any:
    return hq.expval(circuit, observable, theta)


@hq.workflow
def mixed(number: int) -> float:
    start = np.random.default_rng(number).uniform(-np.pi, np.pi, 8)
    options = {"maxfev": IN_LOOP, "maxiter": 10**6, "xatol": 0.0, "fatol": 0.0}
    found = hq.minimize(energy, start, (CIRCUIT, OBSERVABLE), "Nelder-Mead", options=options)
    best = float(found.fun)
    for step in range(SINGLE):
        best = min(best, float(energy(found.x + 0.01 * step, CIRCUIT, OBSERVABLE)))
    return best


_looks: list[Callable[[], int]] = []
"""Given by the run to the thread that reads memory: how many evaluations there were."""


@hq.workflow
def study() -> int:
    scope = current.get()
    assert isinstance(scope, Scope)
    counts = scope.run.counts
    _looks.append(lambda: int(counts.evaluations_executed))
    for first in range(0, WORKFLOWS, AT_ONCE):
        hq.map(mixed, range(first, first + AT_ONCE))
    return int(counts.evaluations_executed)


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(compare: Any) -> list[dict[str, Any]]:
    with (
        SubprocessCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        play(client, warm, 8)
        groups = {"driver": [os.getpid()], "scheduler": [client.run_on_scheduler(os.getpid)]}
        for number, pid in enumerate(sorted(client.run(os.getpid).values())):
            groups[f"worker {number}"] = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        samples: list[list[int]] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.01):
                count = _looks[-1]() if _looks else 0
                if count >= EVERY * (len(samples) + 1):
                    samples.append([count, *(sum(map(resident, pids)) for pids in groups.values())])

        thread = threading.Thread(target=watch)
        thread.start()
        begun = time.perf_counter()
        try:
            evaluations, _ = play(client, study)
        finally:
            ended.set()
            thread.join()
        print(f"{evaluations} evaluations in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    table = np.array(samples, dtype=float)
    assert evaluations >= WORKFLOWS * (IN_LOOP + SINGLE)
    for line in table[:: max(1, len(table) // 20)]:
        print(" ".join(f"{value:9.0f}" for value in [line[0], *(line[1:] / 1e3)]), file=sys.stderr)
    settled, late = table[table[:, 0] >= SETTLED], table[table[:, 0] >= evaluations / 2]
    rows = []
    for column, name in enumerate(groups, 1):
        (slope, _), covariance = np.polyfit(settled[:, 0], settled[:, column], 1, cov=True)
        rows.append({
            "process": name, "evaluations": evaluations, "readings": len(settled),
            "at_first": settled[0, column] / MEGABYTE, "at_last": settled[-1, column] / MEGABYTE,
            "growth": (settled[-1, column] - settled[0, column]) / MEGABYTE,
            "slope": float(slope), "stderr": float(np.sqrt(covariance[0, 0])),
            "last_half": float(np.polyfit(late[:, 0], late[:, column], 1)[0]),
        })  # fmt: skip
    return rows
