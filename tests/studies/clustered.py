"""Steps, sampled loops and chains of longer circuits on a cluster; its processes are killed and stopped by tests.

A line in the log for each start of a step and each end of a circuit. Three steps in a row, the first
of number ``poison``, end their worker.
"""

import json
import os
import signal
import sys
import threading
import time

import numpy as np
from qiskit.circuit.library import efficient_su2

import hybridq as hq

STEPS, LOOPS, CHAINS, CIRCUITS = 63, 4, 2, 20
PACE = threading.Barrier(CHAINS, timeout=600)
"""Chains go side by side: none runs to its end while another waits for an engine that was killed."""


@hq.classical
def step(log, index, poison):
    with open(log, "a") as file:
        file.write(f"step {index}\n")
    time.sleep(0.15)
    if poison is not None and poison <= index < poison + 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return index**2 + float(hq.rng().normal())


@hq.quantum
def sampled(theta):
    return hq.expval(efficient_su2(3, reps=1), {"ZZI": 1.0, "XIX": 0.5}, theta, shots=200)


@hq.quantum
def circuit(angle):
    long = efficient_su2(17, reps=8, entanglement="linear")
    return hq.expval(long, "Z" * 17, np.full(long.num_parameters, angle))


@hq.workflow
def loop(index):
    return hq.minimize(sampled, np.linspace(-1, 1, 12) * (1 + index), method="COBYLA", options={"maxiter": 60}).fun


@hq.workflow
def chain(index, log):
    found = []
    for k in range(CIRCUITS):
        PACE.wait()
        found.append(float(circuit(0.1 * (k + 1) + 0.01 * index)))
        with open(log, "a") as file:
            file.write(f"chain {index}\n")
    return found


@hq.workflow
def study(log, poison):
    steps = [step.submit(log, k, poison) for k in range(STEPS)]
    chains = [chain.submit(index, log) for index in range(CHAINS)]
    loops = hq.map(loop, range(LOOPS))
    found = []
    for one in steps:
        try:
            found.append(one.result())
        except hq.WorkerLost:
            found.append("lost")
    return {"steps": found, "loops": loops, "circuits": [one.result() for one in chains]}


if __name__ == "__main__":
    log, store, cluster, poison = sys.argv[1:]
    site = hq.Site(workers=2) if cluster == "own" else hq.Site(cluster=cluster, patience=120)
    first = None if poison == "no" else int(poison)
    print(json.dumps(hq.run(study, log, first, name="study", store=store, seed=3, site=site)))
