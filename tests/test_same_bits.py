"""Same bits wherever a loop runs: short and long steps, in the driver or beside their evaluations, 1 and 4 workers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector

import hybridq as hq
from hybridq.engines.costs import need
from hybridq.journal import Row, read_records
from hybridq.location import Location
from hybridq.program import Request, program
from hybridq.resources import ROUND_TRIP

QUBITS = {"short": 13, "long": 19}
"""A step takes about 5 and 500 ms on one thread."""
LOOPS = 2


@functools.cache
def described(qubits: int) -> tuple[QuantumCircuit, dict[str, float]]:
    """Of four parameters, so that optimizers need few steps."""
    angles = ParameterVector("a", 4)
    circuit = QuantumCircuit(qubits)
    for layer in range(5):
        for qubit in range(qubits):
            circuit.ry(angles[(layer + qubit) % 4], qubit)
        for qubit in range(qubits - 1):
            circuit.cx(qubit, qubit + 1)
    return circuit, {"Z" * qubits: 0.5, "I" * (qubits - 2) + "XX": 1.0, "ZZ" + "I" * (qubits - 2): 1.0}


@hq.quantum
def energy(theta: Any, qubits: int) -> Any:
    return hq.expval(*described(qubits), theta)


def settings(method: str) -> dict[str, Any]:
    if method == "COBYLA":
        return {"method": method, "options": {"maxiter": 7, "tol": 1e-9}}
    return {"method": method, "jac": "adjoint", "options": {"maxiter": 2, "maxfun": 4}}


@hq.workflow
def beside(number: int, qubits: int, method: str) -> Any:
    """A loop that is data, which may run where its evaluations do."""
    return hq.minimize(energy, start(number), (qubits,), **settings(method))


@hq.workflow
def driver(number: int, qubits: int, method: str) -> Any:
    """The same with code of the researcher's in it, which runs in the driver: the objective, or a callback."""
    if method == "COBYLA":
        return hq.minimize(lambda theta: energy(theta, qubits), start(number), **settings(method))
    seen: list[Any] = []
    return hq.minimize(energy, start(number), (qubits,), callback=seen.append, **settings(method))


@hq.workflow
def study(where: str, qubits: int, method: str) -> list[tuple[bytes, float, int]]:
    body = {"beside": beside, "driver": driver}[where]
    found = hq.map(body, range(LOOPS), [qubits] * LOOPS, [method] * LOOPS)
    return [(one.x.tobytes(), float(one.fun), int(one.nfev)) for one in found]


def start(number: int) -> Any:
    return np.random.default_rng(number).uniform(-1, 1, 4)


@pytest.fixture(scope="module")
def clients() -> Iterator[dict[int, Client]]:
    """Clusters of one and of four one-thread worker processes."""
    options: dict[str, Any] = {"threads_per_worker": 1, "host": "127.0.0.1", "silence_logs": 50}
    with (
        LocalCluster(n_workers=1, dashboard_address="127.0.0.1:0", **options) as one,
        LocalCluster(n_workers=4, dashboard_address="127.0.0.1:0", **options) as four,
        Client(one) as client_of_one,
        Client(four) as client_of_four,
    ):
        yield {1: client_of_one, 4: client_of_four}


@pytest.mark.parametrize("method", ["COBYLA", "L-BFGS-B"])
@pytest.mark.parametrize("length", ["short", pytest.param("long", marks=pytest.mark.slow)])
def test_equal_to_the_bit(length: str, method: str, clients: dict[int, Client], store: Path) -> None:
    qubits = QUBITS[length]
    found, places = {}, {}
    for where in ("beside", "driver"):
        for workers, client in clients.items():
            name = f"{where}-{workers}"
            found[name] = hq.run(study, where, qubits, method, name=name, store=store, cluster=client)
            rows = [r for _, r in read_records(store / name) if isinstance(r, Row)]
            places[name] = {r.where for r in rows}
    assert len({tuple(values) for values in map(lambda f: [*map(tuple, f)], found.values())}) == 1, found
    assert all(nfev >= 3 for values in found.values() for _, _, nfev in values)


def test_the_steps_are_short_and_long() -> None:
    """One is shipped as a loop, the other's evaluations are spread: both paths are in the product above."""
    seconds = {
        length: need(
            program(Request(*described(qubits), start(0)), seed=0, location=Location("same/energy[0]"))
        ).seconds
        for length, qubits in QUBITS.items()
    }
    assert seconds["short"] < ROUND_TRIP < seconds["long"]
