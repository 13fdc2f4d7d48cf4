"""Exact values of the Aer engine: right to 1e-10, and with bits that depend on the row alone."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import qiskit_aer.backends.aer_compiler as inner
from gates import DECOMPOSED, SETTINGS, circuits, heisenberg, observables, with_gate
from hypothesis import given
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import Gate, Parameter, ParameterVector
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import Operator, SparsePauliOp

from hybridq.engines import aer, guard
from hybridq.engines.aer import AerEngine
from hybridq.engines.costs import need
from hybridq.errors import EngineFailed, TooLarge
from hybridq.program import Outcome


@SETTINGS
@given(st.data())
def test_values_agree_with_dense_matrices(engine, make, twin, data):
    circuit = data.draw(circuits())
    members = data.draw(st.lists(observables(circuit.num_qubits), min_size=1, max_size=3))
    rows = data.draw(st.integers(1, 3))
    theta = np.random.default_rng(rows).uniform(-3, 3, (rows, circuit.num_parameters))
    program = make(circuit, [members], theta[:, None])
    (outcome,) = engine.evaluate([program])
    assert isinstance(outcome, Outcome), outcome
    np.testing.assert_allclose(outcome.values, twin(circuit, members, theta), atol=1e-10)
    assert not outcome.stderrs.any()
    assert outcome.bits is None
    assert outcome.seconds > 0
    assert outcome.peak_bytes <= need(program).bytes


@SETTINGS
@given(st.data())
def test_bits_of_a_row_are_its_own(engine, public_engine, make, data):
    """Alone, first, in the middle or last; among other programs; through either of Aer's interfaces."""
    circuit = data.draw(circuits(min_parameters=1))
    observable = data.draw(observables(circuit.num_qubits))
    rows = data.draw(st.integers(1, 12))
    theta = np.random.default_rng(rows).uniform(-3, 3, (rows, circuit.num_parameters))
    alone = [engine.evaluate([make(circuit, observable, row)])[0].values.tobytes() for row in theta]
    order = data.draw(st.permutations(range(rows)))
    other = make(efficient_su2(3, reps=1), heisenberg(3), np.ones((2, 12)))
    for runner in (engine, public_engine, AerEngine(2**30)):
        _, outcome, _ = runner.evaluate([other, make(circuit, observable, theta[order]), other])
        assert [value.tobytes() for value in outcome.values] == [alone[i] for i in order]


@pytest.mark.parametrize("shots", [None, 200])
def test_derivatives_in_parts_are_those_of_the_whole(engine, make, shots):
    """Parameters that share a gate, come several times, or not linearly: each part evaluates what it needs."""
    a, b, c, d = ParameterVector("a", 4)
    circuit = QuantumCircuit(2)
    circuit.ry(a + 2 * b, 0)
    circuit.rx(a * c, 1)
    circuit.cx(0, 1)
    circuit.rz(b, 1)
    circuit.ry(c.sin() + 0.3, 1)
    circuit.crx(d, 0, 1)
    whole = make(circuit, [["ZZ", "XI"]], [[0.3, -0.2, 0.7, 1.1]], shots=shots, gradient="parameter-shift")
    (expected,) = engine.evaluate([whole])
    for bounds in ([0, 1, 2, 3, 4], [0, 3, 4], [0, 2, 4]):
        parts = [dataclasses.replace(whole, derived=each) for each in itertools.pairwise(bounds)]
        found = engine.evaluate(parts)
        joined = np.concatenate([part.gradients for part in found], axis=2)
        assert joined.tobytes() == expected.gradients.tobytes()
        assert {part.values.tobytes() for part in found} == {expected.values.tobytes()}


@pytest.mark.parametrize("shots", [None, 1000])
def test_a_wide_program_runs_on_the_threads_of_its_plan(make, monkeypatch, shots):
    """From 14 qubits on, which is where Aer lets threads share a state."""
    engine, taken = AerEngine(2**30), []
    execute = type(engine._backend("statevector"))._execute_circuits

    def noted(self, *arguments):
        output = execute(self, *arguments)
        taken.append(output["results"][0]["metadata"]["parallel_state_update"])
        return output

    monkeypatch.setattr(type(engine._backend("statevector")), "_execute_circuits", noted)
    circuit = efficient_su2(15, reps=1)
    one = make(circuit, heisenberg(15), np.linspace(0.1, 1, 60), shots=shots)
    two = dataclasses.replace(one, plan=dataclasses.replace(one.plan, threads=2))
    first, second, again = engine.evaluate([one, two, one])
    assert taken == [1, 2, 1]
    np.testing.assert_allclose(second.values, first.values, atol=1e-10 if shots is None else 0.5)
    assert again.values.tobytes() == first.values.tobytes()
    assert second.peak_bytes <= need(two).bytes


@pytest.mark.parametrize("n", [2, 9, 13, 14, 15])
def test_bits_of_wide_rows(engine, public_engine, make, n):
    """Aer fuses gates from 14 qubits on."""
    circuit = efficient_su2(n, reps=1, entanglement="linear")
    theta = np.random.default_rng(n).uniform(-3, 3, (6, circuit.num_parameters))
    whole = engine.evaluate([make(circuit, heisenberg(n), theta)])[0].values
    for batch in (theta[:1], theta[2:5], theta[5:], theta[::-1]):
        values = engine.evaluate([make(circuit, heisenberg(n), batch)])[0].values
        expected = {row.tobytes(): value for row, value in zip(theta, whole, strict=True)}
        assert all(np.array_equal(v, expected[row.tobytes()]) for row, v in zip(batch, values, strict=True))
    assert np.array_equal(public_engine.evaluate([make(circuit, heisenberg(n), theta)])[0].values, whole)


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 130])
def test_bits_in_batches_of_any_size(engine, make, size):
    circuit = efficient_su2(4, reps=1)
    row = np.random.default_rng(1).uniform(-3, 3, circuit.num_parameters)
    theta = np.random.default_rng(2).uniform(-3, 3, (size, circuit.num_parameters))
    theta[size // 2] = row
    alone = engine.evaluate([make(circuit, heisenberg(4), row)])[0].values[0]
    assert np.array_equal(engine.evaluate([make(circuit, heisenberg(4), theta)])[0].values[size // 2], alone)


@pytest.mark.filterwarnings("ignore::scipy.sparse.SparseEfficiencyWarning")  # in Qiskit's exact evolution
@pytest.mark.parametrize("gate", DECOMPOSED.values(), ids=DECOMPOSED.keys())
def test_gates_that_aer_does_not_take_as_they_are(engine, public_engine, make, gate):
    circuit = with_gate(gate)
    n = circuit.num_qubits
    labels = ["".join(np.random.default_rng(i).choice(list("IXYZ"), n)) for i in range(7)]
    observable = SparsePauliOp(labels, np.linspace(0.2, 1, len(labels)))
    theta = np.random.default_rng(0).uniform(-2, 2, (2, circuit.num_parameters))
    (outcome,) = engine.evaluate([make(circuit, observable, theta)])
    for row, value in zip(theta, outcome.values[:, 0], strict=True):
        state = Operator(circuit.assign_parameters(row)).data[:, 0]
        assert value == pytest.approx(np.vdot(state, observable.to_matrix() @ state).real, abs=1e-10)
    assert np.array_equal(public_engine.evaluate([make(circuit, observable, theta)])[0].values, outcome.values)


def test_a_custom_gate_with_a_known_name_is_its_definition(engine, make):
    inside = QuantumCircuit(1)
    inside.ry(0.4, 0)
    gate = inside.to_gate()
    gate.name = "h"
    circuit = QuantumCircuit(1)
    circuit.append(gate, [0])
    assert engine.evaluate([make(circuit, "Z")])[0].values[0, 0] == pytest.approx(math.cos(0.4))


def test_nested_definitions_with_parameters(engine, make, twin):
    a, b = Parameter("a"), Parameter("b")
    inside = QuantumCircuit(2, global_phase=a)
    inside.crx(a, 0, 1)
    inside.rz(b, 0)
    outside = QuantumCircuit(2)
    outside.h([0, 1])
    outside.append(inside.to_gate(), [1, 0])
    circuit = QuantumCircuit(3, global_phase=b)
    circuit.append(outside.to_gate(), [2, 0])
    circuit.append(outside.to_gate().repeat(2), [0, 1])
    observable = SparsePauliOp(["XYZ", "ZZI", "IXX"], [1, 0.5, 0.25])
    theta = np.array([[0.3, 0.8], [1.1, -0.4]])
    state = [Operator(circuit.assign_parameters(row)).data[:, 0] for row in theta]
    expected = [np.vdot(s, observable.to_matrix() @ s).real for s in state]
    np.testing.assert_allclose(
        engine.evaluate([make(circuit, observable, theta)])[0].values[:, 0], expected, atol=1e-10
    )


class TestUnusual:
    def test_no_gates(self, engine, make):
        assert engine.evaluate([make(QuantumCircuit(3), SparsePauliOp(["ZII", "XII"], [2, 1]))])[0].values == 2.0

    def test_zero_rows(self, engine, make):
        circuit = efficient_su2(2, reps=1)
        assert engine.evaluate([make(circuit, "ZZ", np.zeros((0, 8)))])[0].values.shape == (0, 1)
        outcome = engine.evaluate([make(circuit, None, np.zeros((0, 8)), 10)])[0]
        assert outcome.bits.shape == (0, 10, 1)

    @pytest.mark.parametrize("shots", [None, 100])
    def test_identity_and_zero(self, engine, make, shots):
        circuit = QuantumCircuit(2)
        circuit.h(0)
        members = [SparsePauliOp(["II"], [1.5]), SparsePauliOp(["ZZ"], [0.0]), SparsePauliOp(["II", "II"], [1, 2])]
        (outcome,) = engine.evaluate([make(circuit, members, None, shots)])
        assert outcome.values.tolist() == [[1.5, 0.0, 3.0]]
        assert outcome.stderrs.tolist() == [[0.0, 0.0, 0.0]]

    def test_constant_beside_paulis(self, engine, make):
        observable = SparsePauliOp(["II", "ZI", "ZI", "IZ"], [10.0, 1.0, 2.0, 0.5])
        assert engine.evaluate([make(QuantumCircuit(2), observable)])[0].values == pytest.approx(13.5)

    def test_barriers_delays_and_final_measurements(self, engine, make):
        circuit = QuantumCircuit(2, 2)
        circuit.x(0)
        circuit.barrier()
        circuit.delay(100, 1)
        circuit.measure([0, 1], [0, 1])
        assert engine.evaluate([make(circuit, SparsePauliOp(["IZ"], [1.0]))])[0].values == -1.0

    def test_idle_qubits(self, engine, make):
        circuit = QuantumCircuit(5)
        circuit.h(3)
        members = [SparsePauliOp("IXIII"), SparsePauliOp("ZIIIZ")]
        assert engine.evaluate([make(circuit, members)])[0].values.tolist() == [[pytest.approx(1.0), 1.0]]

    def test_parameter_that_cancels(self, engine, make):
        a = Parameter("a")
        circuit = QuantumCircuit(1)
        circuit.rx(a - a + 0.5, 0)
        circuit.rz(a, 0)
        assert engine.evaluate([make(circuit, "Z", [3.0])])[0].values == pytest.approx(math.cos(0.5))

    def test_many_parameters_in_one_angle(self, engine, make):
        vector = ParameterVector("t", 6)
        circuit = QuantumCircuit(1)
        circuit.ry(sum((i + 1) * p for i, p in enumerate(vector)), 0)
        theta = np.random.default_rng(4).uniform(-1, 1, (5, 6))
        values = engine.evaluate([make(circuit, "Z", theta)])[0].values[:, 0]
        np.testing.assert_allclose(values, np.cos(theta @ np.arange(1, 7)), atol=1e-12)

    def test_more_rows_than_are_bound_at_once(self, engine, make, monkeypatch):
        circuit = efficient_su2(2, reps=1)
        theta = np.random.default_rng(5).uniform(-3, 3, (9, 8))
        whole = engine.evaluate([make(circuit, "ZX", theta)])[0].values
        monkeypatch.setattr(aer, "_BIND", 20)
        assert np.array_equal(engine.evaluate([make(circuit, "ZX", theta)])[0].values, whole)


class TestErrors:
    def test_too_large_is_refused_before_it_runs(self, make):
        program = make(efficient_su2(12, reps=1), heisenberg(12), np.zeros(48))
        error, small = AerEngine(2**25 + 2**14).evaluate([program, make(QuantumCircuit(2), "ZZ")])
        assert isinstance(error, TooLarge)
        assert str(need(program).bytes) in str(error)
        assert str(2**25 + 2**14) in str(error)
        assert small.values == 1.0

    def test_a_bound_for_one_call(self, engine, make):
        program = make(QuantumCircuit(2), "ZZ")
        assert isinstance(engine.evaluate([program], max_bytes=1000)[0], TooLarge)
        assert engine.evaluate([program], max_bytes=2**62)[0].values == 1.0

    @pytest.mark.parametrize("public", [False, True])
    def test_memory_that_aer_refuses(self, make, public, monkeypatch):
        """Aer's own limit, reached by pretending that programs need nothing."""
        small = AerEngine(2**20, public=public)
        monkeypatch.setattr(guard, "footprint", lambda program: 0)
        (error,) = small.evaluate([make(QuantumCircuit(20), "Z" * 20)])
        assert isinstance(error, TooLarge)
        assert "16777216 bytes" in str(error)
        assert "1048576 bytes" in str(error)

    def test_one_bad_program_harms_no_other(self, engine, make):
        bad = QuantumCircuit(1)
        bad.append(Gate("mystery", 1, [0.5]), [0])
        good = make(QuantumCircuit(1), "Z")
        first, error, last = engine.evaluate([good, make(bad, "Z"), good])
        assert first.values == last.values == 1.0
        assert isinstance(error, EngineFailed)
        assert "mystery" in str(error)

    def test_a_value_that_is_not_finite_is_reported_not_hidden(self, engine, make):
        a = Parameter("a")
        circuit = QuantumCircuit(1)
        circuit.rx(a * 1e308 * 10, 0)
        (outcome,) = engine.evaluate([make(circuit, "Z", [5.0])])
        assert isinstance(outcome, EngineFailed) or not np.isfinite(outcome.values).all()

    @pytest.mark.parametrize("route", [aer._Inner, aer._Public])
    def test_aers_words(self, engine, route):
        """An instruction that Aer knows, but not for states."""
        circuit = QuantumCircuit(1)
        circuit.save_unitary()
        with pytest.raises(EngineFailed, match="unitary"):
            route(engine._backend("statevector"), circuit, []).run(np.zeros(0))


class TestRoutes:
    def test_the_inner_interface_is_used_where_it_works(self, engine, public_engine):
        assert not engine.public
        assert public_engine.public

    def test_without_the_inner_interface(self, make, monkeypatch, engine):
        monkeypatch.delattr(inner, "assemble_circuits")
        other = AerEngine(2**30)
        assert other.public
        program = make(efficient_su2(3, reps=1), heisenberg(3), np.linspace(0, 1, 12))
        monkeypatch.undo()
        assert np.array_equal(other.evaluate([program])[0].values, engine.evaluate([program])[0].values)

    def test_an_inner_interface_that_binds_wrongly(self, monkeypatch):
        """An index off by one is noticed, and nothing is computed with it."""
        real = inner.assemble_circuits

        def shifted(circuits):
            assembled, maps = real(circuits)
            return assembled, [[max(0, i - 1) for i in m] for m in maps]

        monkeypatch.setattr(inner, "assemble_circuits", shifted)
        assert AerEngine(2**30).public

    def test_prepared_circuits_are_bounded(self, make, monkeypatch):
        monkeypatch.setattr(aer, "_CACHE_BYTES", 10_000)
        small = AerEngine(2**30)
        programs = [make(efficient_su2(2, reps=reps), "ZZ", np.zeros(4 + 4 * reps)) for reps in (1, 2, 3)]
        for _ in range(2):
            assert [o.values.item() for o in small.evaluate(programs)] == [1.0] * 3
        assert len(small._prepared) == 1

    def test_one_thread(self, engine):
        options = engine._backend("statevector").options
        assert options.max_parallel_threads == options.max_parallel_experiments == options.max_parallel_shots == 1
        assert options.max_memory_mb == 2048
