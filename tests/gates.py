"""Circuits, gates and observables that the tests of several engines share."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter, ParameterVector
from qiskit.circuit.library import (
    CPhaseGate,
    CRXGate,
    CRYGate,
    CRZGate,
    CU1Gate,
    CU3Gate,
    CUGate,
    DiagonalGate,
    MCPhaseGate,
    PauliEvolutionGate,
    PauliGate,
    PermutationGate,
    QFTGate,
    RXGate,
    RYGate,
    StatePreparation,
    UCRYGate,
    UnitaryGate,
    XGate,
    get_standard_gate_name_mapping,
)
from qiskit.quantum_info import SparsePauliOp, random_unitary

GATES = {
    name: gate
    for name, gate in get_standard_gate_name_mapping().items()
    if name not in ("measure", "reset", "delay", "global_phase")
}
SETTINGS = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def heisenberg(n):
    return SparsePauliOp.from_sparse_list([(p + p, [i, i + 1], 1.0) for i in range(n - 1) for p in "XYZ"], n)


def spread(circuit):
    """Rotations that take every amplitude away from zero, so that a wrong gate cannot hide."""
    for qubit in range(circuit.num_qubits):
        circuit.ry(0.3 + qubit, qubit)
        circuit.rz(0.2 - qubit, qubit)


@st.composite
def angles(draw, parameters):
    """A bare parameter, a linear expression, any other expression, or a number."""
    a, b = draw(st.sampled_from(parameters)), draw(st.sampled_from(parameters))
    factor = draw(st.floats(-3, 3).map(lambda x: round(x, 3)))
    return draw(
        st.sampled_from([a, factor * a + 0.5, factor * a - b / 3, -a, a * b, (a + 0.1).sin(), factor, a**2 + b])
    )


@st.composite
def circuits(draw, min_parameters=0):
    n = draw(st.integers(1, 5))
    count = draw(st.integers(max(1, min_parameters), 4))
    parameters = list(ParameterVector("t", count))
    circuit = QuantumCircuit(n)
    spread(circuit)
    names = [name for name, gate in GATES.items() if gate.num_qubits <= n]
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=12)):
        gate = GATES[name]
        gate = gate.base_class(*(draw(angles(parameters)) for _ in gate.params)) if gate.params else gate
        circuit.append(gate, draw(st.permutations(range(n)))[: gate.num_qubits])
    return circuit


@st.composite
def observables(draw, n):
    labels = draw(st.lists(st.text("IXYZ", min_size=n, max_size=n), min_size=1, max_size=6))
    numbers = st.floats(-2, 2).map(lambda x: round(x, 6))
    return SparsePauliOp(labels, draw(st.lists(numbers, min_size=len(labels), max_size=len(labels))))


def with_gate(gate, *, n=None, at=None):
    circuit = QuantumCircuit(n or gate.num_qubits)
    spread(circuit)
    circuit.append(gate, at or range(gate.num_qubits))
    spread(circuit)
    return circuit


T = ParameterVector("t", 4)
DECOMPOSED = {
    "evolution": PauliEvolutionGate(SparsePauliOp(["XX", "YY", "ZZ"], [0.5, 0.2, 0.3]), time=T[0]),
    "fixed evolution": PauliEvolutionGate(SparsePauliOp(["XX", "ZZ"], [0.5, 0.2]), time=0.4),
    "unitary": UnitaryGate(random_unitary(8, seed=1)),
    "controlled unitary": UnitaryGate(random_unitary(2, seed=1)).control(1),
    "diagonal": DiagonalGate([1, 1j, -1, np.exp(0.3j)]),
    "pauli": PauliGate("XYZ"),
    "permutation": PermutationGate([2, 0, 1]),
    "qft": QFTGate(3),
    "uniformly controlled": UCRYGate([0.1, 0.2, 0.3, 0.4]),
    "state preparation": StatePreparation([0.6, 0, 0, 0.8j]),
    "multi-controlled phase": MCPhaseGate(T[0], 2),
    "fixed multi-controlled phase": MCPhaseGate(0.7, 2),
    "multi-controlled rotation": RXGate(T[0]).control(2, annotated=False),
    "annotated with parameter": RYGate(T[0]).control(1, annotated=True),
    "open controls": XGate().control(3, ctrl_state=0b010),
    "cp": CPhaseGate(T[0]),
    "crx": CRXGate(T[0] * T[1]),
    "cry": CRYGate(T[0] + T[1]),
    "crz": CRZGate(2 * T[0]),
    "cu": CUGate(*T),
    "cu1": CU1Gate(T[0]),
    "cu3": CU3Gate(*T[:3]),
    "cp, open": CPhaseGate(T[0], ctrl_state=0),
    "crx, open": CRXGate(T[0], ctrl_state=0),
    "crz, open": CRZGate(T[0], ctrl_state=0),
    "cu, open": CUGate(*T, ctrl_state=0),
}


def teleportation() -> QuantumCircuit:
    """The state RY(a)|0> from qubit 0 to qubit 2, by measurements on the way; read into the third bit."""
    circuit = QuantumCircuit(3, 3)
    circuit.ry(Parameter("a"), 0)
    circuit.h(1)
    circuit.cx(1, 2)
    circuit.cx(0, 1)
    circuit.h(0)
    circuit.measure([0, 1], [0, 1])
    with circuit.if_test((circuit.clbits[1], 1)):
        circuit.x(2)
    with circuit.if_test((circuit.clbits[0], 1)):
        circuit.z(2)
    circuit.measure(2, 2)
    return circuit
