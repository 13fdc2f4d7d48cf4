"""A study with steps, exact and sampled loops, nested maps and submitted calls; killed and resumed by tests.

Each step appends a line to the file named by its argument, so that executions can be counted from outside.
"""

import json
import sys
import time

import numpy as np
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp

import hybridq as hq


@hq.classical
def prepare(log, index):
    with open(log, "a") as file:
        file.write(f"prepare {index}\n")
    time.sleep(0.05)
    rng = np.random.default_rng(index)
    return {"coefficients": rng.normal(size=3), "start": rng.uniform(-1, 1, size=8)}


@hq.classical
def combine(log, label, values):
    with open(log, "a") as file:
        file.write(f"combine {label}\n")
    return {"mean": float(np.mean(values)), "noise": float(hq.rng().normal())}


@hq.quantum
def exact(theta, coefficients):
    circuit = efficient_su2(2, reps=1)
    return hq.expval(circuit, SparsePauliOp(["ZZ", "XI", "IX"], coefficients), theta)


@hq.quantum
def sampled(theta, coefficients):
    circuit = efficient_su2(2, reps=1)
    return hq.expval(circuit, SparsePauliOp(["ZZ", "XI", "IX"], coefficients), theta, shots=200)


@hq.workflow
def point(log, index):
    p = prepare(log, index)
    args = (p["coefficients"],)
    a = hq.minimize(exact, p["start"], args=args, method="COBYLA", options={"maxiter": 25})
    b = hq.minimize(sampled, p["start"], args=args, method="Nelder-Mead", options={"maxfev": 20})
    last = [float(exact(a.x + 0.1 * k, p["coefficients"])) for k in range(3)]
    return [a.fun, b.fun, *a.x, *b.x, *last]


@hq.workflow
def killable(log, points):
    futures = [prepare.submit(log, 100 + k) for k in range(3)]
    rows = hq.map(point, [log] * points, range(points))
    totals = hq.map(combine, [log] * points, range(points), rows)
    extra = [float(f.result()["start"].sum()) for f in futures]
    return {"rows": rows, "totals": totals, "extra": extra, "draw": float(hq.rng().normal()), "at": hq.now() > 0}


if __name__ == "__main__":
    value = hq.run(killable, sys.argv[1], 6, name="study", store=sys.argv[2], seed=11, workers=2)
    print(json.dumps(value))
