"""What bodies keep outside of a loop, a history for one, is there again when the loop is replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp

import hybridq as hq
from hybridq import journal as records
from hybridq.journal import read_records

CIRCUIT = efficient_su2(2, reps=0)
ENERGY = SparsePauliOp(["ZZ", "XI"], [1.0, 0.5])


@hq.quantum
def energy(theta: Any) -> Any:
    return hq.expval(CIRCUIT, ENERGY, theta)


@hq.workflow
def objective_with_history(method: str) -> list[float]:
    history: list[float] = []

    def cost(x: Any) -> float:
        history.append(float(energy(x)))
        return history[-1]

    found = hq.minimize(cost, [0.3, 0.1, 0.2, 0.4], method=method, options={"maxiter": 20})
    return [found.fun, *history]


@hq.workflow
def callbacks_with_history(method: str) -> list[float]:
    history: list[float] = []
    for start in (0.3, 0.4):

        def watch(x: Any) -> None:
            history.append(float(x[0]))

        hq.minimize(energy, [start] * 4, method=method, callback=watch, options={"maxiter": 20})
    return history


@pytest.mark.parametrize("flow", [objective_with_history, callbacks_with_history])
@pytest.mark.parametrize("method", ["COBYLA", "Nelder-Mead", "L-BFGS-B"])
def test_a_history_is_the_same_when_the_run_is_replayed(flow: Any, method: str, client: Client, store: Path) -> None:
    live = hq.run(flow, method, name="history", store=store, cluster=client)
    assert len(live) > 2
    before = read_records(store / "history")
    assert hq.run(flow, method, name="history", store=store, cluster=client) == live
    added = {type(r) for _, r in read_records(store / "history")[len(before) :]}
    assert added == {records.Opened, records.End}, "something was evaluated again"
