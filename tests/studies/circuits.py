"""Circuits in the driver's code, one by one, or side by side on the cluster."""

import sys

import numpy as np
from qiskit.circuit.library import efficient_su2

import hybridq as hq


@hq.quantum
def long_energy(theta, qubits, reps):
    return hq.expval(efficient_su2(qubits, reps=reps, entanglement="linear"), "Z" * qubits, theta)


@hq.workflow
def evaluate(qubits, reps):
    print("evaluating", flush=True)
    return float(long_energy(np.full(2 * qubits * (reps + 1), 0.1), qubits, reps))


@hq.workflow
def one_by_one(qubits, reps):
    return [evaluate(qubits, reps) for _ in range(2000)]


@hq.workflow
def side_by_side(qubits, reps):
    return hq.map(evaluate, [qubits, qubits], [reps, reps])


if __name__ == "__main__":
    where, store, qubits, reps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    print(
        hq.run(
            side_by_side if where == "cluster" else one_by_one, qubits, reps, name="circuits", store=store, workers=2
        )
    )
