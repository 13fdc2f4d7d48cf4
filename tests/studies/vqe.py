"""Variational eigensolvers side by side, exact and sampled, with steps between; its processes are killed by tests."""

import sys

import numpy as np
from qiskit.circuit.library import efficient_su2

import hybridq as hq

SITES = 4


@hq.classical
def couplings(field):
    bonds = {"I" * k + "ZZ" + "I" * (SITES - k - 2): -1.0 for k in range(SITES - 1)}
    return bonds | {"I" * k + "X" + "I" * (SITES - k - 1): -field for k in range(SITES)}


@hq.quantum
def energy(theta, observable, shots):
    return hq.expval(efficient_su2(SITES, reps=2), observable, theta, shots=shots)


@hq.workflow
def ground(field, shots):
    observable = couplings(field)
    start = np.random.default_rng(2).uniform(-1, 1, 24)
    options = {"maxiter": 150, "maxfun": 250}
    method = "L-BFGS-B" if shots is None else "COBYLA"
    found = hq.minimize(energy, start, args=(observable, shots), method=method, options=options)
    return [found.fun, *found.x]


@hq.workflow
def vqe():
    fields = np.linspace(0.2, 2.0, 6).tolist()
    exact = hq.map(ground, fields, [None] * len(fields))
    return [exact, hq.map(ground, fields[:3], [100] * 3)]


if __name__ == "__main__":
    hq.run(vqe, name="vqe", store=sys.argv[1], seed=11, workers=2)
