"""Lowering: circuits keep their meaning, slots are what they should be, derivatives follow the chain rule."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from gates import DECOMPOSED, SETTINGS, T, circuits, with_gate
from hypothesis import given
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import Gate, Parameter
from qiskit.circuit.library import Initialize, get_standard_gate_name_mapping
from qiskit.quantum_info import Operator, SparsePauliOp

from hybridq.engines import aer
from hybridq.engines.adjoint import _BASIS as ADJOINT
from hybridq.engines.lowering import AS_ROTATIONS, ROTATIONS, Basis, Binder, lower, without_identity
from hybridq.errors import EngineFailed, WorkflowError

ROTATED = Basis("this engine", aer._NATIVE, ROTATIONS, AS_ROTATIONS)
BASES = {"adjoint": ADJOINT}
for method in aer._BY_METHOD:
    BASES[f"aer {method}"], BASES[f"shift {method}"] = aer._bases(method)
STANDARD = get_standard_gate_name_mapping()


def binder_of(expressions, parameters):
    return Binder(expressions, {parameter: i for i, parameter in enumerate(parameters)}, len(parameters))


def bound(lowered, circuit, row):
    values = binder_of(lowered.expressions, circuit.parameters).bind(np.array([row]))[0]
    return lowered.circuit.assign_parameters(dict(zip(lowered.slots, values, strict=True)))


@pytest.mark.parametrize(
    ("name", "closed"),
    [(name, True) for name in AS_ROTATIONS] + [(name, False) for name in AS_ROTATIONS if name.startswith("c")],
)
def test_rotations_are_exact(name, closed):
    kind = STANDARD[name].base_class
    count = len(STANDARD[name].params)
    gate = kind(*T[:count]) if closed else kind(*T[:count], ctrl_state=0)
    circuit = QuantumCircuit(gate.num_qubits)
    circuit.append(gate, range(gate.num_qubits))
    row = [0.7, -1.3, 2.1, 0.4][:count]
    lowered = lower(circuit, ROTATED)
    assert Operator(bound(lowered, circuit, row)).equiv(Operator(circuit.assign_parameters(row)), rtol=0, atol=1e-12)
    assert {i.name for i in lowered.circuit.data if i.params} <= ROTATIONS.keys()


@SETTINGS
@given(st.data())
def test_a_lowered_circuit_means_the_same(data):
    circuit = data.draw(circuits(min_parameters=1))
    basis = data.draw(st.sampled_from(sorted(BASES)))
    shared = basis.startswith("aer")
    row = np.random.default_rng(3).uniform(-3, 3, circuit.num_parameters)
    lowered = lower(circuit, dataclasses.replace(BASES[basis], shared=shared))
    same = Operator(bound(lowered, circuit, row)).equiv(Operator(circuit.assign_parameters(row)), rtol=0, atol=1e-10)
    assert same
    for instruction in lowered.circuit.data:
        base = instruction.name.partition("_o")[0]
        opened = any(isinstance(p, Parameter) for p in instruction.params)
        assert instruction.name in BASES[basis].bindable if opened else base in {*BASES[basis].native, *ROTATIONS}
    if not shared:
        seen = [p for instruction in lowered.circuit.data for p in instruction.params if isinstance(p, Parameter)]
        assert len(set(seen)) == len(seen) == len(lowered.slots)


@pytest.mark.filterwarnings("ignore::scipy.sparse.SparseEfficiencyWarning")  # in Qiskit's exact evolution
@pytest.mark.parametrize("basis", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("gate", DECOMPOSED.values(), ids=DECOMPOSED.keys())
def test_definitions(gate, basis):
    circuit = with_gate(gate)
    row = np.random.default_rng(0).uniform(-2, 2, circuit.num_parameters)
    lowered = lower(circuit, basis)
    assert Operator(bound(lowered, circuit, row)).equiv(Operator(circuit.assign_parameters(row)), rtol=0, atol=1e-10)


def test_equal_expressions_share_a_slot_unless_told_not_to():
    circuit = QuantumCircuit(2)
    for qubit in (0, 1):
        circuit.rx(2 * T[0], qubit)
    circuit.ry(2 * T[0], 0)
    assert len(lower(circuit, ROTATED).slots) == 1
    assert len(lower(circuit, dataclasses.replace(ROTATED, shared=False)).slots) == 3


def test_parameters_that_cancel_to_a_negative_number():
    """Qiskit 2.6 cannot hash such an expression."""
    circuit = QuantumCircuit(1)
    circuit.rx(T[0] - T[0] - 0.5, 0)
    circuit.ry(T[0], 0)
    lowered = lower(circuit, ROTATED)
    assert Operator(bound(lowered, circuit, [1.7])).equiv(Operator(circuit.assign_parameters([1.7])))


def test_measurements_at_the_end_are_kept_apart():
    circuit = QuantumCircuit(2, 2)
    circuit.h(0)
    circuit.measure([0, 1], [1, 0])
    lowered = lower(circuit, ROTATED)
    assert lowered.measured == ((0, 1), (1, 0))
    assert [i.name for i in lowered.circuit.data] == ["h"]


def with_inside(name):
    inside = QuantumCircuit(1, 1)
    if name == "initialize":
        inside.append(Initialize([0.6, 0.8]), [0])
    elif name == "if_else":
        with inside.if_test((0, 1)):
            inside.x(0)
    elif name == "measure":
        inside.measure(0, 0)
    else:
        inside.reset(0)
    circuit = QuantumCircuit(1, 1)
    if name == "if_else":
        return inside
    circuit.append(inside.to_instruction(), [0], [0])
    return circuit


@pytest.mark.parametrize("name", ["initialize", "if_else", "measure", "reset"])
def test_what_is_not_unitary_is_named(name):
    with pytest.raises(WorkflowError, match=name):
        lower(with_inside(name), ROTATED)


def test_an_instruction_without_definition_is_named_with_the_engine():
    circuit = QuantumCircuit(1)
    circuit.append(Gate("mystery", 1, [0.5]), [0])
    with pytest.raises(EngineFailed, match=r"this engine cannot run the instruction 'mystery'"):
        lower(circuit, ROTATED)


class TestBinder:
    def parameters(self):
        return list(T[:3])

    def expressions(self):
        a, b, c = self.parameters()
        return [a, 2 * a - b / 3 + 0.5, a * b, (a + 0.1).sin(), c**2 + b, b, (a * c).exp(), 3 * c - c]

    def test_values(self):
        row = [0.3, -1.2, 0.7]
        a, b, c = row
        values = binder_of(self.expressions(), self.parameters()).bind(np.array([row, row]))
        expected = [a, 2 * a - b / 3 + 0.5, a * b, np.sin(a + 0.1), c**2 + b, b, np.exp(a * c), 2 * c]
        np.testing.assert_allclose(values, [expected, expected], atol=1e-14)

    def test_chain(self):
        binder = binder_of(self.expressions(), self.parameters())
        row = np.array([0.3, -1.2, 0.7])
        weights = np.random.default_rng(0).normal(size=(2, 8))
        gradients = binder.chain(row, weights)
        for j, direction in enumerate(np.eye(3)):
            up, down = binder.bind(np.array([row + 1e-5 * direction, row - 1e-5 * direction]))
            np.testing.assert_allclose(gradients[:, j], weights @ (up - down) / 2e-5, atol=1e-8)

    def test_a_slope_that_is_a_number_beside_one_that_is_not(self):
        a, b, _ = self.parameters()
        gradient = binder_of([a * a + 3 * b], [a, b]).chain(np.array([0.5, 7.0]), np.ones((1, 1)))
        assert gradient.tolist() == [[1.0, 3.0]]

    def test_no_slots_no_parameters_no_observables(self):
        assert binder_of([], []).chain(np.zeros(0), np.zeros((2, 0))).shape == (2, 0)
        assert binder_of([], self.parameters()).chain(np.zeros(3), np.zeros((1, 0))).tolist() == [[0.0, 0.0, 0.0]]
        assert binder_of([self.parameters()[1]], self.parameters()).chain(np.zeros(3), np.zeros((0, 1))).shape == (0, 3)

    def test_bits_of_a_row_are_its_own(self):
        binder = binder_of(self.expressions(), self.parameters())
        theta = np.random.default_rng(1).uniform(-3, 3, (9, 3))
        whole = binder.bind(theta)
        assert all(np.array_equal(binder.bind(theta[i : i + 1])[0], whole[i]) for i in range(9))


def test_without_identity():
    constant, rest = without_identity(SparsePauliOp(["II", "ZX", "ZX", "II", "YY"], [1.0, 2.0, 0.5, 0.25, 0.0]))
    assert constant == 1.25
    assert rest.to_list() == [("ZX", 2.5)]
    assert without_identity(SparsePauliOp(["II", "XX", "XX"], [1.0, 2.0, -2.0])) == (1.0, None)
