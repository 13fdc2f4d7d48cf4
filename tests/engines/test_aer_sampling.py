"""Samples and sampled estimates: right, calibrated, and with bits that depend on the row alone."""

from __future__ import annotations

import dataclasses
from collections import Counter

import dense
import numpy as np
import pytest
from gates import teleportation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import Gate, Parameter
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp

from hybridq.engines import aer, measuring
from hybridq.engines.aer import AerEngine
from hybridq.errors import EngineFailed, WorkflowError
from hybridq.program import result

MOLECULE = SparsePauliOp(
    ["III", "ZII", "IZI", "ZZI", "XXI", "YYI", "IXX", "ZIZ", "XYZ", "IIY"],
    [-1.2, 0.4, -0.4, 0.3, 0.18, 0.18, -0.25, 0.11, 0.07, 0.05],
)
SETTINGS = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def theta(circuit, rows, seed=0):
    return np.random.default_rng(seed).uniform(-3, 3, (rows, circuit.num_parameters))


class TestEstimates:
    @pytest.mark.parametrize("shots", [20, 100, 5000])
    def test_error_bars_are_calibrated(self, engine, make, twin, shots):
        """(value - exact) / stderr has mean 0 and standard deviation 1 over many repetitions."""
        circuit = efficient_su2(3, reps=1)
        row = theta(circuit, 1, seed=3)
        exact = twin(circuit, [MOLECULE], row)[0, 0]
        repetitions = 1500
        (outcome,) = engine.evaluate([make(circuit, MOLECULE, np.repeat(row, repetitions, axis=0), shots)])
        values, stderrs = outcome.values[:, 0], outcome.stderrs[:, 0]
        pulls = (values - exact) / stderrs
        assert abs(pulls.mean()) < 4 / np.sqrt(repetitions) + (0.15 if shots < 100 else 0.0)  # few shots skew them
        assert abs(pulls.std() - 1) < (0.25 if shots < 100 else 0.08)
        assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(repetitions)  # no bias, whatever the shots
        assert np.sqrt(np.mean(stderrs**2)) == pytest.approx(values.std(), rel=0.1)  # the variance is that of the mean

    @SETTINGS
    @given(st.data())
    def test_random_observables(self, engine, make, twin, data):
        n = data.draw(st.integers(1, 4))
        circuit = efficient_su2(n, reps=1)
        labels = data.draw(st.lists(st.text("IXYZ", min_size=n, max_size=n), min_size=1, max_size=12))
        numbers = np.random.default_rng(len(labels)).normal(size=len(labels))
        members = [SparsePauliOp(labels, numbers), SparsePauliOp(labels[:1], [2.0])]
        row = theta(circuit, 1, seed=n)
        (outcome,) = engine.evaluate([make(circuit, members, row[0], 4000)])
        error = outcome.values[0] - twin(circuit, members, row)[0]
        assert (np.abs(error) <= 5 * outcome.stderrs[0] + 1e-9).all()

    def test_a_certain_outcome_has_no_error(self, engine, make):
        circuit = QuantumCircuit(2)
        circuit.h(0)
        members = [SparsePauliOp(["IX", "ZX", "II"], [1.0, 0.5, 0.25])]
        (outcome,) = engine.evaluate([make(circuit, members, None, 50)])
        assert outcome.values.tolist() == [[1.75]]
        assert outcome.stderrs.tolist() == [[0.0]]

    def test_covariances_inside_a_group_count(self, engine, make):
        """Z0 and -Z1 of a Bell pair cancel in every shot."""
        circuit = QuantumCircuit(2)
        circuit.h(0)
        circuit.cx(0, 1)
        (outcome,) = engine.evaluate([make(circuit, SparsePauliOp(["IZ", "ZI"], [1, -1]), None, 100)])
        assert outcome.values == outcome.stderrs == 0.0

    def test_a_single_shot_gets_the_largest_error(self, engine, make):
        circuit = QuantumCircuit(1)
        circuit.h(0)
        (outcome,) = engine.evaluate([make(circuit, SparsePauliOp(["Z"], [0.7]), None, 1)])
        assert outcome.stderrs == pytest.approx(0.7)
        assert abs(outcome.values.item()) == pytest.approx(0.7)

    def test_fewer_shots_than_groups(self, engine, make):
        program = make(QuantumCircuit(2), SparsePauliOp(["XX", "YY", "ZZ"], [1, 1, 1]), None, 2)
        error, good = engine.evaluate([program, make(QuantumCircuit(1), "Z", None, 5)])
        assert isinstance(error, WorkflowError)
        assert "2 shots" in str(error)
        assert "3 different measurements" in str(error)
        assert good.values == 1.0

    def test_draws_in_pieces(self, engine, make, monkeypatch):
        """Mean and variance of many pieces are those of all shots."""
        circuit = efficient_su2(3, reps=1)
        program = make(circuit, MOLECULE, theta(circuit, 1)[0], 3000)
        whole = engine.evaluate([program])[0]
        monkeypatch.setattr(measuring, "_DRAW", 77)
        pieces = engine.evaluate([program])[0]
        np.testing.assert_allclose(pieces.values, whole.values, rtol=1e-12)
        np.testing.assert_allclose(pieces.stderrs, whole.stderrs, rtol=1e-12)

    def test_states_fewer_and_more_than_shots(self, engine, make, twin):
        circuit = efficient_su2(8, reps=1)
        row = theta(circuit, 1, seed=8)
        observable = SparsePauliOp(["XXXXXXXX", "ZZIIIIZZ", "IIIIYIII"], [1, 2, 3])
        exact = twin(circuit, [observable], row)[0, 0]
        for shots in (30, 20000):
            (outcome,) = engine.evaluate([make(circuit, observable, row[0], shots)])
            assert abs(outcome.values.item() - exact) < 4.5 * outcome.stderrs.item()


class TestSamples:
    def test_every_qubit_without_classical_bits(self, engine, make):
        circuit = efficient_su2(3, reps=1)
        row = theta(circuit, 1, seed=2)[0]
        program = make(circuit, None, row, 40000)
        array = result(program, engine.evaluate([program])[0])
        probabilities = np.abs(dense.state(circuit, row)) ** 2
        counts = Counter(array.get_int_counts())
        for state, probability in enumerate(probabilities):
            assert abs(counts[state] - 40000 * probability) < 5 * np.sqrt(40000 * probability * (1 - probability)) + 1

    def test_bits_lie_as_qiskit_lays_them(self, engine, make):
        circuit = QuantumCircuit(11)
        circuit.x([0, 3, 9])
        program = make(circuit, None, None, 4)
        array = result(program, engine.evaluate([program])[0])
        assert array.num_bits == 11
        assert array.get_bitstrings() == ["01000001001"] * 4

    def test_measurements_map_qubits_to_classical_bits(self, engine, make):
        circuit = QuantumCircuit(3, 70)
        circuit.x([0, 2])
        circuit.measure(0, 69)
        circuit.measure(1, 0)
        circuit.measure(2, 8)
        program = make(circuit, None, None, 3)
        array = result(program, engine.evaluate([program])[0])
        assert array.get_bitstrings() == [f"{2**69 + 2**8:070b}"] * 3

    def test_the_later_measurement_into_a_bit_counts(self, engine, make):
        circuit = QuantumCircuit(2, 1)
        circuit.x(1)
        circuit.measure(0, 0)
        circuit.measure(1, 0)
        program = make(circuit, None, None, 2)
        assert result(program, engine.evaluate([program])[0]).get_counts() == {"1": 2}

    def test_gates_after_another_qubits_measurement(self, engine, make):
        circuit = QuantumCircuit(2, 2)
        circuit.x(0)
        circuit.measure(0, 0)
        circuit.x(1)
        circuit.measure(1, 1)
        program = make(circuit, None, None, 2)
        assert result(program, engine.evaluate([program])[0]).get_counts() == {"11": 2}

    def test_impossible_states_are_never_drawn(self):
        cumulative = np.array([0.0, 0.25, 0.25, 0.5, 0.5])
        drawn = np.concatenate(list(measuring.draws(cumulative, 10000, np.array([1, 2], dtype=np.uint64), 0)))
        assert set(drawn.tolist()) == {1, 3}

    def test_batches(self, engine, make):
        circuit = QuantumCircuit(1)
        circuit.rx(Parameter("a"), 0)
        program = make(circuit, None, np.array([[0.0], [np.pi]]), 5)
        array = result(program, engine.evaluate([program])[0])
        assert array.shape == (2,)
        assert array.get_counts(0) == {"0": 5}
        assert array.get_counts(1) == {"1": 5}


class TestTheSimulatorsOwnShots:
    def test_teleportation(self, engine, make):
        program = make(teleportation(), None, [1.1], 4000)
        assert program.plan.sampling == "simulator"
        array = result(program, engine.evaluate([program])[0])
        ones = sum(n for bits, n in array.get_counts().items() if bits[0] == "1") / 4000
        assert ones == pytest.approx(np.sin(0.55) ** 2, abs=0.04)

    def test_reset_and_gates_aer_does_not_know(self, engine, make):
        circuit = QuantumCircuit(2)
        circuit.h(0)
        circuit.iswap(0, 1)
        circuit.reset(1)
        circuit.x(1)
        program = make(circuit, None, None, 20)
        array = result(program, engine.evaluate([program])[0])
        assert array.get_counts() == {"10": 20}

    def test_initialize(self, engine, make):
        circuit = QuantumCircuit(2)
        circuit.initialize("10")
        circuit.measure_all()
        program = make(circuit, None, None, 7)
        assert result(program, engine.evaluate([program])[0]).get_counts() == {"10": 7}

    def test_loops_and_controlled_rotations(self, engine, make):
        circuit = QuantumCircuit(2, 1)
        circuit.x(0)
        with circuit.for_loop(range(3)):
            circuit.crx(Parameter("a"), 0, 1)
        circuit.measure(1, 0)
        program = make(circuit, None, [np.pi / 3], 30)
        assert result(program, engine.evaluate([program])[0]).get_counts() == {"1": 30}

    def test_one_execution_where_shots_exceed_a_piece(self, engine, make, monkeypatch):
        monkeypatch.setattr(aer, "_SHOTS", 64)
        program = make(teleportation(), None, [1.1], 300)
        bits = engine.evaluate([program])[0].bits[0]
        assert bits.shape == (300, 1)
        assert len({bits[i : i + 64].tobytes() for i in range(0, 256, 64)}) == 4  # each piece has a seed of its own

    def test_failures_are_values(self, engine, make):
        circuit = QuantumCircuit(1, 1)
        circuit.reset(0)
        circuit.append(Gate("mystery", 1, [0.5]), [0])
        circuit.measure(0, 0)
        outcomes = engine.evaluate([make(circuit, None, None, 5), make(teleportation(), None, [0.3], 5)])
        assert isinstance(outcomes[0], EngineFailed)
        assert "mystery" in str(outcomes[0])
        assert outcomes[1].bits.shape == (1, 5, 1)


@pytest.mark.parametrize(
    ("circuit", "observable", "shots"),
    [
        (efficient_su2(4, reps=1), SparsePauliOp(["XXII", "ZIZZ", "IYYI"], [1, 0.5, 2]), 333),
        (efficient_su2(4, reps=1), None, 57),
        (teleportation(), None, 41),
    ],
    ids=["estimate", "samples", "simulator"],
)
class TestBits:
    def test_a_row_depends_on_its_key_and_parameters_alone(
        self, engine, public_engine, make, circuit, observable, shots
    ):
        """Key and parameters of a row, moved to other places of batches of other sizes, through other routes."""
        whole = make(circuit, observable, theta(circuit, 7, seed=1), shots)
        (reference,) = engine.evaluate([whole])
        for runner in (engine, public_engine, AerEngine(2**30)):
            for rows in ([3], [6, 0], [2, 5, 3, 1], [*range(6, -1, -1)]):
                part = dataclasses.replace(
                    whole, theta=whole.theta[rows], seeds=whole.seeds[rows], batch_shape=(len(rows),)
                )
                _, outcome = runner.evaluate([make(QuantumCircuit(2), "XX", None, 10), part])
                assert np.array_equal(outcome.values, reference.values[rows])
                assert np.array_equal(outcome.stderrs, reference.stderrs[rows])
                if reference.bits is not None:
                    assert np.array_equal(outcome.bits, reference.bits[rows])

    def test_rows_and_calls_are_independent(self, engine, make, circuit, observable, shots):
        same = np.repeat(theta(circuit, 1, seed=1), 3, axis=0)
        here = engine.evaluate([make(circuit, observable, same, shots)])[0]
        there = engine.evaluate([make(circuit, observable, same, shots, at="run/f[1]")])[0]
        drawn = [o.values if o.bits is None else o.bits for o in (here, there)]
        assert len({row.tobytes() for array in drawn for row in array}) == 6
