"""A study with every kind of call. Runs of it are kept in tests/archive, one of every release; it must not change."""

import sys

import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector

import hybridq as hq

ANGLES = ParameterVector("angle", 2)
CIRCUIT = QuantumCircuit(2)
CIRCUIT.ry(ANGLES[0], 0)
CIRCUIT.ry(ANGLES[1], 1)
CIRCUIT.cx(0, 1)
TERMS = {"ZZ": 1.0, "XI": 0.5, "IX": 0.25}


@hq.classical
def table(n):
    return {"grid": np.linspace(0, 1, n), "text": "ü" * n, "tags": {1, 2}, "pair": (n, 1j)}


@hq.classical(retries=0)
def refuses(reason):
    raise LookupError(reason)


@hq.quantum
def exact(theta):
    return hq.expval(CIRCUIT, TERMS, theta)


@hq.quantum
def noisy(theta):
    return hq.expval(CIRCUIT, TERMS, theta, shots=100)


@hq.quantum
def drawn(theta):
    return hq.sample(CIRCUIT, theta, shots=50)


def own(fun, x0, args=(), **_):
    """A custom method: three steps downhill along the axes."""
    x = np.array(x0)
    for k in range(3):
        x[k % len(x)] -= 0.1 * (fun(x) > -1)
    return hq_result(x, fun(x))


def hq_result(x, value):
    from scipy.optimize import OptimizeResult

    return OptimizeResult(x=x, fun=value, nfev=4, success=True, message="done")


@hq.workflow
def loops(k):
    start = [0.1 * k, -0.3]
    found = [hq.minimize(exact, start, method=m, options={"maxiter": 8}).fun for m in ("COBYLA", "Nelder-Mead")]
    found.append(hq.minimize(exact, start, method="L-BFGS-B", jac="parameter-shift", options={"maxiter": 2}).fun)
    found.append(hq.minimize(noisy, start, method="Powell", options={"maxfev": 8}).fun)
    found.append(hq.minimize(exact, start, method=own).fun)
    return found


@hq.workflow
def archived(n):
    tables = hq.map(table, [n, 3])
    futures = [table.submit(k) for k in (4, 5)]
    order = [f.result()["pair"][0] for f in hq.as_completed(futures)]
    try:
        refuses("nothing found")
        said = ""
    except LookupError as error:
        said = str(error)
    curve = exact(np.linspace(0, 1, 2 * n).reshape(n, 2)).value
    counts = drawn([0.4, 0.2]).get_counts()
    slope = hq.gradient(exact, [0.4, 0.2], method="parameter-shift")
    return {
        "sum": float(tables[0]["grid"].sum()), "text": len(tables[0]["text"]), "order": order, "said": said,
        "curve": curve.tolist(), "counts": counts, "slope": slope.tolist(), "loops": hq.map(loops, [1, 2]),
        "draw": float(hq.rng().normal()), "now": hq.now(), "one": float(noisy([0.1, 0.2])),
    }  # fmt: skip


if __name__ == "__main__":
    hq.run(archived, 200, name="archived", store=sys.argv[1] if len(sys.argv) > 1 else None, seed=17, workers=1)
