"""What the tests of the engines share: ways to make programs, and a slow twin that computes the same densely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
