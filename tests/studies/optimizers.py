"""One loop of an optimizer, exact or sampled, in the driver or in its engine process; killed and resumed by tests.

Appends to a log when an evaluation (in the engine process: a slice of the loop) begins and ends, and how many it was;
of a slice also when a part of it has come.
"""

import os
import sys
import time

import numpy as np
import psutil
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp
from scipy.optimize import OptimizeResult

import hybridq as hq
from hybridq.engines.process import EngineProcess

SHOTS = {"exact": None, "sampled": 200}
OPTIONS = {
    "COBYLA": {"maxiter": 250, "tol": 1e-12},
    "Nelder-Mead": {"maxfev": 250, "xatol": 1e-12, "fatol": 1e-12},
    "L-BFGS-B": {"maxfun": 250, "ftol": 0.0, "gtol": 0.0},
    "Powell": {"maxfev": 250, "xtol": 1e-12, "ftol": 1e-12},
    "spsa": {"maxiter": 120},
    "evolution": {"maxiter": 25},
}


def spsa(fun, x0, args, *, maxiter, **_):
    """Simultaneous perturbation: two values a step."""
    rng, x, calls = np.random.default_rng(5), np.array(x0), 0
    for k in range(maxiter):
        delta, size = rng.choice([-1.0, 1.0], len(x)), 0.1 / (k + 1) ** 0.101
        slope = (fun(x + size * delta) - fun(x - size * delta)) / (2 * size)
        x, calls = x - 0.1 / (k + 10) ** 0.602 * slope * delta, calls + 2
    return OptimizeResult(x=x, fun=fun(x), nfev=calls + 1, nit=maxiter, success=True, message="done")


def evolution(fun, x0, args, *, maxiter, **_):
    """Differential evolution: ten members, each replaced by a better mixture of others."""
    rng = np.random.default_rng(6)
    members = [x0 + rng.uniform(-1, 1, len(x0)) for _ in range(10)]
    values = [fun(member) for member in members]
    for _ in range(maxiter):
        for i in range(len(members)):
            a, b, c = (members[j] for j in rng.choice(len(members), 3, replace=False))
            mixed = np.where(rng.random(len(x0)) < 0.7, a + 0.8 * (b - c), members[i])
            value = fun(mixed)
            if value < values[i]:
                members[i], values[i] = mixed, value
    best = int(np.argmin(values))
    return OptimizeResult(x=members[best], fun=values[best], nfev=10 * (maxiter + 1), success=True, message="done")


@hq.quantum
def energy(theta, shots):
    return hq.expval(efficient_su2(2, reps=1), SparsePauliOp(["ZZ", "XI", "IX"], [1.0, 0.5, 0.3]), theta, shots=shots)


def of_result(intermediate_result):
    """A callback keeps a loop in the driver."""


def of_point(xk):
    """The same for a method that takes no other."""


@hq.workflow
def study(method, kind, where):
    start = np.random.default_rng(1).uniform(-1, 1, 8)
    custom = {"spsa": spsa, "evolution": evolution}.get(method, method)
    callback = None if where == "engine" or callable(custom) else of_point if method == "COBYLA" else of_result
    found = hq.minimize(energy, start, (SHOTS[kind],), custom, callback=callback, options=OPTIONS[method])
    return [found.fun, *found.x]


def logged(log):
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    born, live = psutil.Process().create_time(), []

    def wrap(real, count):
        def call(self, *args, **kwargs):
            if not live:
                live.append(time.time() - born)
                os.write(file, f"live {live[0]:.3f}\n".encode())
            os.write(file, b"begin\n")
            found = real(self, *args, **kwargs)
            os.write(file, f"end {count(found)}\n".encode())
            return found

        return call

    def telling(real):
        def call(self, *args):
            *rest, arrived = args

            def part(advance):
                os.write(file, f"part {len(advance.points)}\n".encode())
                arrived(advance)

            return real(self, *rest, part)

        return call

    EngineProcess.evaluate = wrap(EngineProcess.evaluate, len)
    EngineProcess.advance = wrap(telling(EngineProcess.advance), lambda advance: len(advance.points))


if __name__ == "__main__":
    store, log, method, kind, where = sys.argv[1:]
    logged(log)
    print(hq.run(study, method, kind, where, name="study", store=store, seed=3, workers=1))
