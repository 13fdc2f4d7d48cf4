"""Gradients with Aer: exact ones agree with everything else, with noise too; sampled ones within their errors."""

from __future__ import annotations

import dataclasses

import dense
import numpy as np
import pytest
from gates import DECOMPOSED, SETTINGS, circuits, heisenberg, observables, with_gate
from hypothesis import given, settings
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter, ParameterVector
from qiskit.circuit.library import CRYGate, efficient_su2
from qiskit.quantum_info import Kraus, SparsePauliOp, SuperOp
from qiskit_aer.noise import NoiseModel, amplitude_damping_error
from qiskit_ibm_runtime.fake_provider import FakeManilaV2

from hybridq.backends import Aer, Noise, Readout
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

    def test_no_gradient_of_samples(self, engine, make_with):
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


def controlled() -> QuantumCircuit:
    """Every kind of gate that is rewritten to be differentiated, between gates that are not."""
    t = ParameterVector("t", 4)
    circuit = QuantumCircuit(3)
    for qubit in range(3):
        circuit.ry(0.4 + qubit, qubit)
    circuit.cp(t[0], 0, 1)
    circuit.crx(2 * t[1], 1, 2)
    circuit.append(CRYGate(t[0] * t[2], ctrl_state=0), [2, 0])
    circuit.crz(-t[3], 0, 2)
    circuit.h(1)
    circuit.cu(t[1], t[2], t[3], 0.3, 0, 1)
    circuit.p(t[2], 0)
    circuit.u(t[3], 0.2, t[0], 2)
    circuit.rzz(t[1] - t[2], 0, 1)
    return circuit


CONTROLLED = controlled()
OBSERVABLES = [SparsePauliOp(["ZZI", "IXY", "YIZ", "III"], [1.0, 0.5, -0.7, 0.2]), SparsePauliOp("XXX")]
TURNS = np.array([[0.3, -0.8, 1.1, 2.0], [-1.3, 0.4, 0.9, -0.2]])


class TestMethods:
    @pytest.mark.parametrize("method", ["automatic", "statevector", "density_matrix", "matrix_product_state"])
    def test_parameter_shift(self, engine, public_engine, make, slopes, method):
        program = make(CONTROLLED, [OBSERVABLES], TURNS[:, None], backend=Aer(method), gradient="parameter-shift")
        (outcome,) = engine.evaluate([program])
        np.testing.assert_allclose(outcome.gradients, slopes(CONTROLLED, OBSERVABLES, TURNS), atol=1e-8)
        assert np.array_equal(public_engine.evaluate([program])[0].gradients, outcome.gradients)

    def test_parameter_shift_with_the_stabilizer(self, engine, make, slopes):
        """Shifts are quarter turns, and so are the angles."""
        a, b = ParameterVector("t", 2)
        circuit = QuantumCircuit(2)
        circuit.h([0, 1])
        circuit.rx(a, 0)
        circuit.rzz(a + b, 0, 1)
        circuit.ry(-b, 1)
        circuit.rz(a - b, 0)
        members = [SparsePauliOp(["XZ", "YY", "ZX", "IY"], [1.0, 0.5, 2.0, -0.3])]
        for turns in ([0, 1], [1, 1], [3, 2], [-1, 0]):
            row = np.array(turns) * np.pi / 2
            (outcome,) = engine.evaluate([
                make(circuit, members, row, backend="stabilizer", gradient="parameter-shift")
            ])  # fmt: skip
            np.testing.assert_allclose(outcome.gradients, slopes(circuit, members, row), atol=1e-8)

    @pytest.mark.parametrize(
        ("noise", "model"),
        [
            (Noise.depolarizing(0.05, 0.1), dense.depolarizing(0.05, 0.1)),
            (Noise.depolarizing(0, 0.2, 0.05), dense.depolarizing(0, 0.2, 0.05)),
            (Noise(readout=(Readout(-1, 0.1, 0.02),)), dense.Model(readout={-1: (0.1, 0.02)})),
        ],
        ids=["gates", "two-qubit gates and readout", "readout"],
    )
    def test_noise_comes_with_the_gate_as_written(self, engine, make, noise, model):
        """However many rotations a gate is rewritten to, its channel follows once."""
        program = make(CONTROLLED, [OBSERVABLES], TURNS[:, None], backend=Aer(noise=noise), gradient="auto")
        (outcome,) = engine.evaluate([program])
        values = dense.noisy_values(CONTROLLED, OBSERVABLES, TURNS, model)
        np.testing.assert_allclose(outcome.values, values, atol=1e-10)
        for row, gradients in zip(TURNS, outcome.gradients, strict=True):
            expected = dense.slopes(lambda r: dense.noisy_values(CONTROLLED, OBSERVABLES, r, model)[0], row)
            np.testing.assert_allclose(gradients, expected, atol=1e-8)

    def test_noise_of_a_device(self, engine, make):
        """Translated to gates whose only angles are about Z."""
        device = FakeManilaV2()
        edges = [list(edge) for edge in device.coupling_map.get_edges()]
        model = dense.of_model(NoiseModel.from_backend(device), edges)
        program = make(CONTROLLED, [OBSERVABLES], TURNS[:1, None], backend=Aer(noise=device), gradient="auto")
        (outcome,) = engine.evaluate([program])
        expected = dense.slopes(lambda r: dense.noisy_values(CONTROLLED, OBSERVABLES, r, model)[0], TURNS[0])
        np.testing.assert_allclose(outcome.gradients[0], expected, atol=1e-6)

    def test_channels_in_the_circuit(self, engine, make):
        a = Parameter("a")
        circuit = QuantumCircuit(2)
        circuit.h(0)
        circuit.crx(a, 0, 1)
        circuit.append(Kraus(SuperOp(amplitude_damping_error(0.3))).to_instruction(), [1])
        circuit.cp(2 * a, 1, 0)
        members = [SparsePauliOp(["ZZ", "XY", "IX"], [1.0, 0.5, 0.7])]
        (outcome,) = engine.evaluate([make(circuit, members, [0.8], gradient="auto")])
        expected = dense.slopes(lambda r: dense.noisy_values(circuit, members, r, dense.NOISELESS)[0], np.array([0.8]))
        np.testing.assert_allclose(outcome.gradients[0], expected, atol=1e-8)

    @pytest.mark.parametrize("method", ["density_matrix", "statevector", "matrix_product_state"])
    def test_sampled_within_the_error(self, engine, make, method):
        noise = None if method == "matrix_product_state" else Noise.depolarizing(0.03, 0.05)
        model = dense.NOISELESS if noise is None else dense.depolarizing(0.03, 0.05)
        circuit, shots, copies = efficient_su2(2, reps=0), 200, 24
        row = np.array([0.3, 1.2, -0.5, 0.8])
        observable = SparsePauliOp(["ZZ", "XI"], [1.0, 0.5])
        program = make(circuit, observable, np.tile(row, (copies, 1)), shots, backend=Aer(method, noise),
                       gradient="parameter-shift")  # fmt: skip
        (outcome,) = engine.evaluate([program])
        expected = dense.slopes(lambda r: dense.noisy_values(circuit, [observable], r, model)[0], row)[0]
        bound = 1.5 / np.sqrt(2 * shots)
        gradients = outcome.gradients[:, 0]
        assert (np.abs(gradients.mean(axis=0) - expected) < 5 * bound / np.sqrt(copies)).all()
        assert (gradients.std(axis=0) > 0.05 * bound).all()


SPSA = {"gradient": "spsa"}


class TestSpsa:
    def test_the_mean_over_seeds_is_the_gradient(self, engine, make, slopes):
        """Each derivative is g + sum of the others with random signs: its spread is the gradient's own length."""
        rows, seeds = TURNS[:1], 60
        programs = [make(CONTROLLED, OBSERVABLES, TURNS[0], seed=seed, **SPSA) for seed in range(seeds)]
        found = np.array([outcome.gradients[0] for outcome in engine.evaluate(programs)])
        expected = slopes(CONTROLLED, OBSERVABLES, rows)[0]
        spread = np.linalg.norm(expected, axis=1, keepdims=True) / np.sqrt(seeds)
        assert (np.abs(found.mean(axis=0) - expected) < 4.5 * spread).all()
        assert (found.std(axis=0) > 0.1 * np.abs(expected).min()).all()
        signs = np.sign(found[:, 0] / found[:, 0, :1])
        assert len(np.unique(signs, axis=0)) == 8  # every direction of four parameters, up to its sign

    def test_each_estimate_is_the_slope_along_a_direction(self, engine, make, slopes):
        (outcome,) = engine.evaluate([make(CONTROLLED, OBSERVABLES, TURNS, **SPSA)])
        for row in range(2):
            direction = np.sign(outcome.gradients[row, 0] / outcome.gradients[row, 0, 0])
            expected = slopes(CONTROLLED, OBSERVABLES, TURNS[row : row + 1])[0] @ direction
            np.testing.assert_allclose(outcome.gradients[row], np.outer(expected, direction), atol=1e-6)

    def test_each_side_draws_for_itself(self, engine, make):
        """Where no parameter has an effect, equal draws on both sides would cancel to zero, and the value's own too."""
        circuit = QuantumCircuit(1)
        circuit.h(0)
        circuit.rx(Parameter("a"), 0)
        (outcome,) = engine.evaluate([make(circuit, SparsePauliOp("Z"), np.zeros((20, 1)), 1000, **SPSA)])
        assert (outcome.gradients != 0).sum() >= 18
        assert outcome.gradients.std() == pytest.approx(1 / np.sqrt(2 * 1000) / 0.2, rel=0.5)

    @pytest.mark.parametrize("shots", [None, 100])
    @pytest.mark.parametrize("noise", [None, Noise.depolarizing(0.05)])
    def test_reproducible_by_seed(self, engine, public_engine, process, make, shots, noise):
        asked = {"backend": Aer(noise=noise), **SPSA}
        program = make(CONTROLLED, OBSERVABLES, TURNS, shots, **asked)
        (first,) = engine.evaluate([program])
        plain = make(CONTROLLED, OBSERVABLES, TURNS, shots, backend=Aer(noise=noise))
        assert np.array_equal(engine.evaluate([plain])[0].values, first.values)
        for runner in (engine, public_engine, process):
            assert np.array_equal(runner.evaluate([program])[0].gradients, first.gradients)
        part = dataclasses.replace(program, theta=program.theta[1:], seeds=program.seeds[1:], batch_shape=(1,))
        assert np.array_equal(engine.evaluate([part])[0].gradients, first.gradients[1:])
        (other,) = engine.evaluate([make(CONTROLLED, OBSERVABLES, TURNS, shots, seed=12, **asked)])
        assert not np.array_equal(other.gradients, first.gradients)


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
