"""What the tests of the engines share: engines, ways to make programs, and the dense twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import dense
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
        circuit: Any, observables: Any = None, theta: Any = None, shots: int | None = None, at: str = "run/f[0]",
        *, backend: Any = None, grouping: str | None = None, gradient: str = "none", seed: int = 11,
    ) -> Program:  # fmt: skip
        request = Request(circuit, observables, theta, shots, None, backend, grouping)
        return program(request, seed=seed, location=Location(at), gradient=gradient)

    return make


@pytest.fixture(scope="session")
def make_with(make: Callable[..., Program]) -> Callable[..., Program]:
    """As `make`, with changes to the plan: ``engine``, ``gradient``."""

    def make_with(*arguments: Any, engine: str = "aer", gradient: str = "none", **options: Any) -> Program:
        program = make(*arguments, **options)
        return replace(program, plan=replace(program.plan, engine=engine, gradient=gradient))

    return make_with


@pytest.fixture(scope="session")
def slopes() -> Callable[..., np.ndarray]:
    """Gradients, shape (rows, observables, parameters), by differences of the dense twin, right to about 1e-10."""

    def slopes(circuit: Any, observables: Any, theta: Any) -> np.ndarray:
        rows = np.atleast_2d(theta)
        return np.array([dense.slopes(lambda row: dense.values(circuit, observables, row)[0], row) for row in rows])

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
    return dense.values
