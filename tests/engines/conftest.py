"""What the tests of the engines share: ways to make programs, and a slow twin that computes the same densely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hybridq.engines.aer import AerEngine
from hybridq.engines.process import EngineProcess
from hybridq.location import Location
from hybridq.program import Program, Request, program

MAX_BYTES = 2**31


@pytest.fixture(scope="session")
def make() -> Callable[..., Program]:
    def make(
        circuit: Any, observables: Any = None, theta: Any = None, shots: int | None = None, at: str = "run/f[0]"
    ) -> Program:
        return program(Request(circuit, observables, theta, shots), seed=11, location=Location(at))

    return make


@pytest.fixture(scope="session")
def make_with(make: Callable[..., Program]) -> Callable[..., Program]:
    """As `make`, with changes to the plan: ``engine``, ``gradient``."""

    def make_with(*arguments: Any, engine: str = "aer", gradient: str = "none", **options: Any) -> Program:
        program = make(*arguments, **options)
        return replace(program, plan=replace(program.plan, engine=engine, gradient=gradient))

    return make_with


@pytest.fixture(scope="session")
def slopes(twin: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Gradients, shape (rows, observables, parameters), by differences of the dense twin, right to about 1e-10."""
    step, weights = 4e-3, {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}

    def slopes(circuit: Any, observables: Any, theta: Any) -> np.ndarray:
        rows = np.atleast_2d(theta)
        gradients = np.zeros((len(rows), len(observables), rows.shape[1]))
        for j, direction in enumerate(np.eye(rows.shape[1])):
            for k, weight in weights.items():
                up, down = (twin(circuit, observables, rows + sign * k * step * direction) for sign in (1, -1))
                gradients[:, :, j] += weight * (up - down) / step
        return gradients

    return slopes


@pytest.fixture(scope="session")
def engine() -> AerEngine:
    return AerEngine(MAX_BYTES)


@pytest.fixture(scope="session")
def public_engine() -> AerEngine:
    return AerEngine(MAX_BYTES, public=True)


@pytest.fixture(scope="session")
def process() -> Iterator[EngineProcess]:
    process = EngineProcess(MAX_BYTES, name="test")
    yield process
    process.close()


@pytest.fixture(scope="session")
def twin() -> Callable[..., np.ndarray]:
    """Expectation values, shape (rows, observables), by a matrix for every gate and every observable."""

    def apply(state: np.ndarray, matrix: np.ndarray, qubits: list[int]) -> np.ndarray:
        count = len(qubits)
        axes = [state.ndim - 1 - q for q in reversed(qubits)]
        state = np.tensordot(matrix.reshape((2,) * (2 * count)), state, axes=(range(count, 2 * count), axes))
        return np.moveaxis(state, range(count), axes)

    def state_of(circuit: Any, theta: Any) -> np.ndarray:
        state = np.zeros((2,) * circuit.num_qubits, dtype=complex)
        state[(0,) * circuit.num_qubits] = 1
        for instruction in circuit.assign_parameters(theta).data:
            if instruction.name not in ("barrier", "measure", "delay"):
                qubits = [circuit.find_bit(q).index for q in instruction.qubits]
                matrix = np.asarray(instruction.operation.to_matrix())
                state = apply(state, matrix, qubits) if qubits else state * matrix[0, 0]
        return state.reshape(-1)

    def twin(circuit: Any, observables: Any, theta: Any) -> np.ndarray:
        rows = [state_of(circuit, row) for row in np.atleast_2d(theta)]
        matrices = [observable.to_matrix() for observable in observables]
        return np.array([[np.vdot(state, m @ state).real for m in matrices] for state in rows])

    twin.state = state_of  # type: ignore[attr-defined]
    return twin
