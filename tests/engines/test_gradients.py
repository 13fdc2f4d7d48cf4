"""Gradients by parameter shift with Aer: exact ones agree with everything else, sampled ones within their errors."""

from __future__ import annotations

import numpy as np
import pytest
from gates import DECOMPOSED, SETTINGS, circuits, heisenberg, observables, with_gate
from hypothesis import given, settings
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter, ParameterVector
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp

from hybridq.engines import wire
from hybridq.engines.adjoint import AdjointEngine
from hybridq.engines.aer import AerEngine
from hybridq.errors import EngineFailed, WorkflowError
from hybridq.program import Outcome

SHIFT = {"gradient": "parameter-shift"}


@pytest.fixture(scope="module")
def adjoint():
    return AdjointEngine(2**31)


@settings(SETTINGS, max_examples=25)
@given(st.data())
def test_exact_gradients(engine, adjoint, make_with, slopes, data):
    circuit = data.draw(circuits(min_parameters=1))
    members = data.draw(st.lists(observables(circuit.num_qubits), min_size=1, max_size=2))
    theta = np.random.default_rng(5).uniform(-2, 2, (2, circuit.num_parameters))
    arguments = (circuit, [members], theta[:, None])
    plain, shifted = engine.evaluate([make_with(*arguments), make_with(*arguments, **SHIFT)])
    (both,) = adjoint.evaluate([make_with(*arguments, engine="adjoint", gradient="adjoint")])
    assert not isinstance(shifted, Exception), shifted
    assert np.array_equal(shifted.values, plain.values)
    assert plain.gradients is None
    np.testing.assert_allclose(shifted.gradients, both.gradients, atol=1e-9)
    np.testing.assert_allclose(shifted.gradients, slopes(circuit, members, theta), atol=1e-7)


@pytest.mark.parametrize("name", [name for name, gate in DECOMPOSED.items() if with_gate(gate).num_parameters])
def test_gates_that_are_made_of_others(engine, adjoint, make_with, name):
    circuit = with_gate(DECOMPOSED[name])
    n = circuit.num_qubits
    observable = SparsePauliOp(["X" * n, "Y" * n, "Z" * n, "I" * (n - 1) + "Z"], [0.4, 0.3, 0.8, 1.0])
    theta = np.random.default_rng(0).uniform(-2, 2, (2, circuit.num_parameters))
    (shifted,) = engine.evaluate([make_with(circuit, observable, theta, **SHIFT)])
    (both,) = adjoint.evaluate([make_with(circuit, observable, theta, engine="adjoint", gradient="adjoint")])
    np.testing.assert_allclose(shifted.gradients, both.gradients, atol=1e-9)
    assert np.abs(both.gradients).max() > 1e-3


def test_a_known_gradient(engine, make_with):
    a = Parameter("a")
    circuit = QuantumCircuit(1)
    circuit.rx(a, 0)
    circuit.rx(2 * a, 0)
    circuit.rx(a * a, 0)
    (outcome,) = engine.evaluate([make_with(circuit, "Z", [0.4], **SHIFT)])
    assert outcome.gradients.item() == pytest.approx(-np.sin(3 * 0.4 + 0.16) * (3 + 0.8), abs=1e-12)


@pytest.mark.parametrize("shots", [None, 300])
def test_bits_of_a_row_are_its_own(engine, public_engine, process, make_with, shots):
    circuit = efficient_su2(3, reps=1)
    theta = np.random.default_rng(1).uniform(-3, 3, (4, circuit.num_parameters))
    program = make_with(circuit, heisenberg(3), theta, shots=shots, **SHIFT)
    (whole,) = engine.evaluate([program])
    for runner in (public_engine, AerEngine(2**30), process):
        other = make_with(QuantumCircuit(3), "ZZZ")
        _, again = runner.evaluate([other, program])
        assert np.array_equal(again.gradients, whole.gradients)
        assert np.array_equal(again.values, whole.values)
    if shots is None:
        for i in range(4):
            alone = engine.evaluate([make_with(circuit, heisenberg(3), theta[i : i + 1], **SHIFT)])[0]
            assert np.array_equal(alone.gradients[0], whole.gradients[i])
    else:  # the first row has the same seed alone
        alone = engine.evaluate([make_with(circuit, heisenberg(3), theta[:1], shots=shots, **SHIFT)])[0]
        assert np.array_equal(alone.gradients[0], whole.gradients[0])


class TestSampled:
    def test_values_keep_their_bits(self, engine, make_with):
        circuit = efficient_su2(3, reps=1)
        theta = np.random.default_rng(2).uniform(-3, 3, (3, circuit.num_parameters))
        plain, shifted = engine.evaluate(
            [make_with(circuit, heisenberg(3), theta, shots=500, **o) for o in ({}, SHIFT)]
        )
        assert np.array_equal(plain.values, shifted.values)
        assert np.array_equal(plain.stderrs, shifted.stderrs)

    def test_within_the_error(self, engine, make_with):
        circuit = efficient_su2(2, reps=1)
        theta = np.tile(np.random.default_rng(3).uniform(-3, 3, circuit.num_parameters), (60, 1))
        observable, shots = SparsePauliOp(["ZZ", "XI"], [1.0, 0.5]), 400
        (exact,) = engine.evaluate([make_with(circuit, observable, theta[:1], **SHIFT)])
        (sampled,) = engine.evaluate([make_with(circuit, observable, theta, shots=shots, **SHIFT)])
        deviations = sampled.gradients[:, 0] - exact.gradients[0, 0]
        bound = 1.5 / np.sqrt(shots) / np.sqrt(2)  # of one derivative: half the difference of two estimates
        assert np.all(np.abs(deviations.mean(axis=0)) < 5 * bound / np.sqrt(60))
        assert np.all(deviations.std(axis=0) < 1.5 * bound)
        assert np.all(deviations.std(axis=0) > 0.05 * bound)

    def test_each_shift_draws_for_itself(self, engine, make_with):
        """Where a parameter has no effect, equal draws up and down would cancel to zero."""
        vector = ParameterVector("t", 3)
        circuit = QuantumCircuit(1)
        circuit.h(0)
        for parameter in vector:
            circuit.rx(parameter, 0)
        (outcome,) = engine.evaluate([make_with(circuit, "Z", np.zeros(3), shots=1000, **SHIFT)])
        assert np.all(outcome.gradients != 0)
        assert len(set(outcome.gradients.reshape(-1).tolist())) == 3

    def test_too_few_shots(self, engine, make_with):
        (error,) = engine.evaluate([make_with(efficient_su2(2, reps=1), heisenberg(2), np.zeros(8), shots=2, **SHIFT)])
        assert isinstance(error, WorkflowError)


class TestUnusual:
    def test_nothing_to_differentiate(self, engine, make_with):
        circuit = QuantumCircuit(2)
        circuit.h(0)
        (outcome,) = engine.evaluate([make_with(circuit, "XX", **SHIFT)])
        assert outcome.gradients.shape == (1, 1, 0)

    def test_a_parameter_without_effect(self, engine, make_with):
        circuit = QuantumCircuit(1, global_phase=Parameter("b"))
        circuit.ry(Parameter("a"), 0)
        (outcome,) = engine.evaluate([make_with(circuit, "Z", [0.3, 0.9], **SHIFT)])
        assert outcome.gradients[0, 0].tolist() == [pytest.approx(-np.sin(0.3)), 0.0]

    def test_identity_and_zero_rows(self, engine, make_with):
        circuit = efficient_su2(2, reps=1)
        (outcome,) = engine.evaluate([make_with(circuit, SparsePauliOp("II"), np.zeros(8), **SHIFT)])
        assert not outcome.gradients.any()
        (outcome,) = engine.evaluate([make_with(circuit, "ZZ", np.zeros((0, 8)), **SHIFT)])
        assert outcome.gradients.shape == (0, 1, 8)

    def test_no_gradient_of_trajectories(self, engine, make_with):
        circuit = QuantumCircuit(1, 1)
        circuit.reset(0)
        circuit.measure(0, 0)
        (error,) = engine.evaluate([make_with(circuit, shots=5, **SHIFT)])
        assert isinstance(error, WorkflowError)
        assert "gradient" in str(error)

    def test_a_gradient_that_aer_does_not_have(self, engine, make_with):
        (error,) = engine.evaluate([make_with(QuantumCircuit(1), "Z", gradient="adjoint")])
        assert isinstance(error, WorkflowError)
        assert "'adjoint'" in str(error)


def test_gradients_cross_the_border():
    values = np.arange(6.0).reshape(2, 3)
    with_gradient = Outcome(values, values, None, 0.5, 7, np.arange(24.0).reshape(2, 3, 4))
    without = Outcome(values, values, np.ones((2, 3, 1), dtype=np.uint8), 0.5, 7)
    error = EngineFailed("words")
    first, second, third = wire.unpack_outcomes(wire.pack_outcomes([with_gradient, error, without]))
    assert np.array_equal(first.gradients, with_gradient.gradients)
    assert first.bits is None
    assert (type(second), str(second)) == (EngineFailed, "words")
    assert third.gradients is None
    assert np.array_equal(third.bits, without.bits)
