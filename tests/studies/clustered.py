"""Steps, sampled loops and longer circuits on a cluster; its processes are killed and stopped by tests.

A line in the log for each start of a step. With ``poison`` some steps end their worker.
"""

import json
import os
import signal
import sys
import time

import numpy as np
from qiskit.circuit.library import efficient_su2

import hybridq as hq

STEPS, LOOPS, CIRCUITS = 40, 4, 2
POISON = (20, 21, 22)


@hq.classical
def step(log, index, poison):
    with open(log, "a") as file:
        file.write(f"{index}\n")
    time.sleep(0.15)
    if poison and index in POISON:
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
def study(log, poison):
    circuits = [circuit.submit(0.1 * (k + 1)) for k in range(CIRCUITS)]
    steps = [step.submit(log, k, poison) for k in range(STEPS)]
    loops = hq.map(loop, range(LOOPS))
    found = []
    for one in steps:
        try:
            found.append(one.result())
        except hq.WorkerLost:
            found.append("lost")
    return {"steps": found, "loops": loops, "circuits": [float(c.result()) for c in circuits]}


if __name__ == "__main__":
    log, store, cluster, poison = sys.argv[1:]
    site = hq.Site(workers=2) if cluster == "own" else hq.Site(cluster=cluster, patience=120)
    print(json.dumps(hq.run(study, log, poison == "poison", name="study", store=store, seed=3, site=site)))
