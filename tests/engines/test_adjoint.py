"""The adjoint engine: right values and gradients, bits that depend on the row alone, clear errors."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from gates import DECOMPOSED, SETTINGS, circuits, heisenberg, observables, with_gate
from hypothesis import given
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import Gate, Parameter, ParameterVector
from qiskit.circuit.library import UnitaryGate, XGate, efficient_su2, get_standard_gate_name_mapping
from qiskit.quantum_info import Operator, Pauli, SparsePauliOp, random_unitary

from hybridq.engines import adjoint
from hybridq.engines.adjoint import AdjointEngine, _Operator
from hybridq.engines.costs import need
from hybridq.engines.process import EngineProcess
from hybridq.errors import EngineFailed, TooLarge, WorkflowError

VALUE = {"engine": "adjoint"}
BOTH = {"engine": "adjoint", "gradient": "adjoint"}


@pytest.fixture(scope="module")
def engine():
    return AdjointEngine(2**31)


def evaluate_wide(program, together=0):
    """By an engine that takes few qubits in the ways that it takes many; its pass back sums so many bytes at once."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_FUSED", "_NARROW", "_KEPT_STATE"):
            patch.setattr(adjoint, name, 0)
        patch.setattr(adjoint, "_TOGETHER", together)
        (outcome,) = AdjointEngine(2**31).evaluate([program])
    return outcome


def random_observable(n, paulis, seed=0):
    rng = np.random.default_rng(seed)
    labels = ["".join(rng.choice(list("IXYZ"), n)) for _ in range(paulis)]
    return SparsePauliOp(labels, rng.normal(size=paulis))


@SETTINGS
@given(st.data())
def test_values_and_gradients(engine, make_with, twin, slopes, data):
    circuit = data.draw(circuits())
    members = data.draw(st.lists(observables(circuit.num_qubits), min_size=1, max_size=3))
    rows = data.draw(st.integers(1, 2))
    theta = np.random.default_rng(rows).uniform(-2, 2, (rows, circuit.num_parameters))
    value, both = engine.evaluate([make_with(circuit, [members], theta[:, None], **o) for o in (VALUE, BOTH)])
    assert not isinstance(both, Exception), both
    np.testing.assert_allclose(both.values, twin(circuit, members, theta), atol=1e-10)
    np.testing.assert_allclose(both.gradients, slopes(circuit, members, theta), atol=1e-7)
    together = data.draw(st.sampled_from([0, 2**9, 2**17]))
    same = evaluate_wide(make_with(circuit, [members], theta[:, None], **BOTH), together)
    np.testing.assert_allclose(same.values, both.values, atol=1e-12)
    np.testing.assert_allclose(same.gradients, both.gradients, atol=1e-11)
    assert np.array_equal(value.values, both.values)
    assert value.gradients is None
    assert not both.stderrs.any()
    assert both.bits is None
    assert both.seconds > 0


@pytest.mark.parametrize("name", [n for n, g in get_standard_gate_name_mapping().items() if g.num_qubits])
def test_every_standard_gate_at_fixed_angles(engine, make_with, twin, name):
    gate = get_standard_gate_name_mapping()[name]
    if name in ("measure", "reset", "delay"):
        return
    gate = gate.base_class(*np.linspace(0.4, 1.9, len(gate.params))) if gate.params else gate
    circuit = with_gate(gate, n=gate.num_qubits + 1, at=list(range(gate.num_qubits, 0, -1)))
    observable = random_observable(circuit.num_qubits, 6)
    (outcome,) = engine.evaluate([make_with(circuit, observable, **VALUE)])
    np.testing.assert_allclose(outcome.values, twin(circuit, [observable], [[]]), atol=1e-10)


@pytest.mark.filterwarnings("ignore::scipy.sparse.SparseEfficiencyWarning")  # in Qiskit's exact evolution
@pytest.mark.parametrize("gate", DECOMPOSED.values(), ids=DECOMPOSED.keys())
def test_gates_that_are_made_of_others(engine, make_with, gate):
    circuit = with_gate(gate)
    observable = random_observable(circuit.num_qubits, 7)
    matrix = observable.to_matrix()
    theta = np.random.default_rng(0).uniform(-2, 2, circuit.num_parameters)

    def energy(row):
        state = Operator(circuit.assign_parameters(row)).data[:, 0]
        return np.vdot(state, matrix @ state).real

    (outcome,) = engine.evaluate([make_with(circuit, observable, theta, **BOTH)])
    assert outcome.values.item() == pytest.approx(energy(theta), abs=1e-10)
    for j, direction in enumerate(np.eye(len(theta))):
        slope = (energy(theta + 1e-5 * direction) - energy(theta - 1e-5 * direction)) / 2e-5
        assert outcome.gradients[0, 0, j] == pytest.approx(slope, abs=1e-7)


def test_against_dense_derivatives(engine, make_with):
    """Each rotation's derivative is -i/2 P inserted after it: no differences, so right to 1e-12."""
    rng = np.random.default_rng(8)
    n, vector = 5, ParameterVector("t", 4)
    circuit = QuantumCircuit(n)
    words = {"rx": "X", "ry": "Y", "rz": "Z", "rxx": "XX", "ryy": "YY", "rzz": "ZZ", "rzx": "XZ"}
    steps = []
    for _ in range(60):
        name = rng.choice(list(words))
        qubits = rng.permutation(n)[: len(words[name])].tolist()
        parameter, factor = int(rng.integers(4)), float(rng.normal())
        getattr(circuit, name)(factor * vector[parameter] + 0.1, *qubits)
        label = ["I"] * n
        for letter, qubit in zip(reversed(words[name]), qubits, strict=True):
            label[n - 1 - qubit] = letter
        steps.append((Pauli("".join(label)).to_matrix(), parameter, factor))
        circuit.cx(*rng.permutation(n)[:2].tolist())
        steps.append((circuit.data[-1], None, None))
    observable = random_observable(n, 9)
    theta = rng.uniform(-3, 3, 4)
    state, slopes = np.zeros(2**n, dtype=complex), np.zeros((4, 2**n), dtype=complex)
    state[0] = 1
    for step, parameter, factor in steps:
        if parameter is None:
            single = QuantumCircuit(n)
            single.append(step.operation, [circuit.find_bit(q).index for q in step.qubits])
            matrix = Operator(single).data
            state, slopes = matrix @ state, slopes @ matrix.T
        else:
            angle = factor * theta[parameter] + 0.1
            matrix = np.cos(angle / 2) * np.eye(2**n) - 1j * np.sin(angle / 2) * step
            state, slopes = matrix @ state, slopes @ matrix.T
            slopes[parameter] += -0.5j * factor * (step @ state)
    image = observable.to_matrix() @ state
    (outcome,) = engine.evaluate([make_with(circuit, observable, theta, **BOTH)])
    assert outcome.values.item() == pytest.approx(np.vdot(state, image).real, abs=1e-11)
    np.testing.assert_allclose(outcome.gradients[0, 0], 2 * (slopes.conj() @ image).real, atol=1e-11)


def test_large_matrices_and_qubit_order(engine, make_with):
    circuit = QuantumCircuit(6)
    circuit.ry(0.3, 0)
    circuit.append(UnitaryGate(random_unitary(16, seed=3)), [4, 1, 5, 0])
    circuit.append(UnitaryGate(random_unitary(4, seed=4)), [3, 2])
    circuit.append(XGate().control(4, ctrl_state=0b0110), [5, 0, 2, 4, 1])
    members = [SparsePauliOp("IIIIIZ"), SparsePauliOp("ZIIIII"), random_observable(6, 10)]
    (outcome,) = engine.evaluate([make_with(circuit, members, **VALUE)])
    state = Operator(circuit).data[:, 0]
    expected = [np.vdot(state, member.to_matrix() @ state).real for member in members]
    np.testing.assert_allclose(outcome.values[0], expected, atol=1e-10)


class TestBits:
    @SETTINGS
    @given(st.data())
    def test_of_a_row_are_its_own(self, engine, process, make_with, data):
        """Alone, first, in the middle or last; among other programs; in another engine and another process."""
        circuit = data.draw(circuits(min_parameters=1))
        observable = data.draw(observables(circuit.num_qubits))
        rows = data.draw(st.integers(1, 6))
        theta = np.random.default_rng(rows).uniform(-3, 3, (rows, circuit.num_parameters))
        alone = [engine.evaluate([make_with(circuit, observable, row, **BOTH)])[0] for row in theta]
        order = data.draw(st.permutations(range(rows)))
        aer = make_with(circuit, observable, theta[:1])
        for runner, other in ((engine, make_with(circuit, observable, theta[:1], **VALUE)), (process, aer)):
            _, outcome, _ = runner.evaluate([other, make_with(circuit, observable, theta[order], **BOTH), other])
            assert [v.tobytes() for v in outcome.values] == [alone[i].values.tobytes() for i in order]
            assert [g.tobytes() for g in outcome.gradients] == [alone[i].gradients.tobytes() for i in order]

    @pytest.mark.parametrize("n", [9, 13, 17])
    def test_of_wide_rows(self, engine, process, make_with, n):
        circuit = efficient_su2(n, reps=1, entanglement="linear")
        theta = np.random.default_rng(n).uniform(-3, 3, (3, circuit.num_parameters))
        (whole,) = engine.evaluate([make_with(circuit, heisenberg(n), theta, **BOTH)])
        for runner in (AdjointEngine(2**31), process):
            for i in (2, 0):
                (alone,) = runner.evaluate([make_with(circuit, heisenberg(n), theta[i], **BOTH)])
                assert np.array_equal(alone.values[0], whole.values[i])
                assert np.array_equal(alone.gradients[0], whole.gradients[i])

    def test_do_not_depend_on_the_number_of_threads(self):
        script = textwrap.dedent("""
            import numpy as np
            from dataclasses import replace
            from qiskit.circuit.library import efficient_su2
            from qiskit.quantum_info import SparsePauliOp
            from hybridq.engines.adjoint import AdjointEngine
            from hybridq.location import Location
            from hybridq.program import Request, program

            n = 15
            chain = SparsePauliOp.from_sparse_list([(p + p, [i, i + 1], 1.0) for i in range(n - 1) for p in "XYZ"], n)
            circuit = efficient_su2(n, reps=1, entanglement="linear")
            theta = np.random.default_rng(0).uniform(-3, 3, circuit.num_parameters)
            one = program(Request(circuit, chain, theta), seed=0, location=Location("run/f[0]"))
            one = replace(one, plan=replace(one.plan, engine="adjoint", gradient="adjoint"))
            (outcome,) = AdjointEngine(2**31).evaluate([one])
            print(outcome.values.tobytes().hex(), outcome.gradients.tobytes().hex())
        """)
        outputs = set()
        for threads in ("1", "2", "4"):
            names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
            environment = {**os.environ, **dict.fromkeys(names, threads)}
            done = subprocess.run(
                [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=120
            )
            outputs.add(done.stdout)
        assert len(outputs) == 1


class TestSchedule:
    """Rotations that need not wait for each other are read off together."""

    def groups(self, circuit):
        lowered = adjoint.lower(circuit, adjoint._BASIS)
        numbers = {slot: number for number, slot in enumerate(lowered.slots)}
        items = [(g, list(g.angle)) for i in lowered.circuit.data for g in adjoint._gates(i, lowered.circuit, numbers)]
        parts = adjoint._Back(circuit.num_qubits, items).parts
        return [count for *_, readings in parts for count in np.bincount(readings.pauses).tolist()]

    def test_layers(self):
        assert self.groups(efficient_su2(5, reps=2, entanglement="linear")) == [5] * 6

    def test_words_that_overlap_commute(self):
        gamma, beta = Parameter("g"), Parameter("b")
        circuit = QuantumCircuit(5)
        circuit.h(range(5))
        for layer in (1, 2):
            for i in range(5):
                circuit.rzz(layer * gamma, i, (i + 1) % 5)
                circuit.rz(gamma, i)
            circuit.rx(layer * beta, range(5))
        assert self.groups(circuit) == [5, 10, 5, 10]

    def test_what_does_not_commute_waits(self):
        vector = ParameterVector("t", 3)
        circuit = QuantumCircuit(2)
        circuit.rz(vector[0], 0)
        circuit.rx(vector[1], 0)
        circuit.rzz(vector[2], 0, 1)
        assert self.groups(circuit) == [1, 1, 1]


class TestOperator:
    @pytest.mark.parametrize("limit", [1, 16, 64, 200, 1000, 10**6])
    @pytest.mark.parametrize("observable", [heisenberg(6), random_observable(6, 40), SparsePauliOp("YIIIIZ")])
    def test_split_anywhere(self, observable, limit):
        operator = _Operator(observable, limit)
        state = np.random.default_rng(0).normal(size=(64, 2)).view(complex)[:, 0]
        np.testing.assert_allclose(operator @ state, observable.to_matrix() @ state, atol=1e-12)
        entries = sum(matrix.nnz for _, _, matrix in operator._parts)
        assert entries <= max(limit, len(observable))

    def test_paulis_that_flip_the_same_qubits_are_one(self):
        operator = _Operator(SparsePauliOp(["XX", "YY", "ZZ", "IZ"], [1.0, 1.0, 0.5, 0.25]), 10**6)
        ((_, _, matrix),) = operator._parts
        assert matrix.nnz == 6  # four on the diagonal; XX + YY leaves two

    def test_a_large_observable_in_parts_through_the_engine(self, make_with, monkeypatch):
        circuit = efficient_su2(5, reps=1)
        theta = np.linspace(-1, 1, circuit.num_parameters)
        members = [random_observable(5, 30, seed) for seed in (1, 2)]
        (whole,) = AdjointEngine(2**30).evaluate([make_with(circuit, members, theta, **BOTH)])
        monkeypatch.setattr(adjoint, "OPERATOR_ENTRIES", 300)
        (parts,) = AdjointEngine(2**30).evaluate([make_with(circuit, members, theta, **BOTH)])
        np.testing.assert_allclose(parts.values, whole.values, atol=1e-12)
        np.testing.assert_allclose(parts.gradients, whole.gradients, atol=1e-12)


class TestUnusual:
    def test_nothing_to_differentiate(self, engine, make_with):
        circuit = QuantumCircuit(2)
        circuit.h(0)
        circuit.rx(0.4, 1)
        (outcome,) = engine.evaluate([make_with(circuit, SparsePauliOp(["XI", "IX"]), **BOTH)])
        assert outcome.gradients.shape == (1, 1, 0)
        assert outcome.values.item() == pytest.approx(1.0)

    def test_fixed_angles_beside_open_ones(self, engine, make_with):
        a = Parameter("a")
        circuit = QuantumCircuit(1)
        circuit.ry(0.2, 0)
        circuit.ry(a, 0)
        circuit.ry(-0.5, 0)
        circuit.ry(3 * a, 0)
        (outcome,) = engine.evaluate([make_with(circuit, "Z", [0.4], **BOTH)])
        assert outcome.gradients.item() == pytest.approx(-4 * np.sin(1.3), abs=1e-12)

    def test_identity_zero_and_no_qubits(self, engine, make_with):
        circuit = efficient_su2(2, reps=1)
        members = [SparsePauliOp("II", [1.5]), SparsePauliOp("ZZ", [0.0]), SparsePauliOp(["II", "ZI"], [1.0, 1.0])]
        (outcome,) = engine.evaluate([make_with(circuit, members, np.zeros(8), **BOTH)])
        assert outcome.values.tolist() == [[1.5, 0.0, 2.0]]
        assert not outcome.gradients.any()
        (outcome,) = engine.evaluate([make_with(QuantumCircuit(0), SparsePauliOp("", [2.0]), **BOTH)])
        assert outcome.values.item() == 2.0

    def test_no_gates_one_qubit_zero_rows(self, engine, make_with):
        assert engine.evaluate([make_with(QuantumCircuit(1), "Z", **BOTH)])[0].values.item() == 1.0
        circuit = efficient_su2(2, reps=1)
        (outcome,) = engine.evaluate([make_with(circuit, "ZZ", np.zeros((0, 8)), **BOTH)])
        assert outcome.gradients.shape == (0, 1, 8)

    def test_a_parameter_that_is_only_a_phase(self, engine, make_with):
        circuit = QuantumCircuit(1, global_phase=Parameter("b"))
        circuit.ry(Parameter("a"), 0)
        (outcome,) = engine.evaluate([make_with(circuit, "Z", [0.3, 0.9], **BOTH)])
        assert outcome.gradients[0, 0].tolist() == [pytest.approx(-np.sin(0.3)), 0.0]


class TestErrors:
    def test_too_large_is_refused_before_it_runs(self, make_with):
        program = make_with(efficient_su2(12, reps=1), heisenberg(12), np.zeros(48), **BOTH)
        required = need(program).bytes
        error, small = AdjointEngine(required - 1).evaluate([program, make_with(QuantumCircuit(2), "ZZ", **VALUE)])
        assert isinstance(error, TooLarge)
        assert str(required) in str(error)
        assert str(required - 1) in str(error)
        assert small.values == 1.0
        assert isinstance(AdjointEngine(2**40).evaluate([program], max_bytes=required - 1)[0], TooLarge)

    def test_states_that_no_machine_holds(self, engine, make_with):
        (error,) = engine.evaluate([make_with(QuantumCircuit(60), "Z" * 60, **BOTH)])
        assert isinstance(error, TooLarge)

    def test_only_exact_values(self, engine, make_with):
        sampled = make_with(QuantumCircuit(1), "Z", shots=10, **VALUE)
        shifted = make_with(QuantumCircuit(1), "Z", engine="adjoint", gradient="parameter-shift")
        assert [type(e) for e in engine.evaluate([sampled, shifted])] == [WorkflowError] * 2

    def test_an_instruction_that_is_not_unitary(self, engine, make_with):
        inside = QuantumCircuit(1)
        inside.reset(0)
        circuit = QuantumCircuit(1)
        circuit.append(inside.to_instruction(), [0])
        good = make_with(QuantumCircuit(1), "Z", **BOTH)  # the border refuses such a circuit already
        template = dataclasses.replace(good.template, circuit=circuit, digest="bad")
        (error,) = engine.evaluate([dataclasses.replace(good, template=template)])
        assert isinstance(error, WorkflowError)
        assert "'reset'" in str(error)

    def test_one_bad_program_harms_no_other(self, engine, make_with):
        bad = QuantumCircuit(1)
        bad.append(Gate("mystery", 1, [0.5]), [0])
        good = make_with(QuantumCircuit(1), "Z", **BOTH)
        first, error, last = engine.evaluate([good, make_with(bad, "Z", **BOTH), good])
        assert first.values == last.values == 1.0
        assert isinstance(error, EngineFailed)
        assert "mystery" in str(error)

    def test_without_the_library(self):
        script = textwrap.dedent("""
            import sys
            sys.modules["pennylane_lightning"] = None
            from hybridq.engines.adjoint import AdjointEngine
            from hybridq.errors import EngineFailed
            try:
                AdjointEngine(2**30)
            except EngineFailed as error:
                print(error)
        """)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
        assert 'pip install "hybridq-scheduler[adjoint]"' in done.stdout

    def test_the_library_alone_is_imported(self):
        script = textwrap.dedent("""
            import sys
            from hybridq.engines.adjoint import AdjointEngine
            AdjointEngine(1)
            print(*{"pennylane", "qiskit_aer"} & set(sys.modules))
        """)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.strip() == ""


class TestProcess:
    def test_engines_by_the_plan(self, process, engine, make_with):
        circuit = efficient_su2(3, reps=1)
        theta = np.linspace(0, 1, 12)
        programs = [
            make_with(circuit, heisenberg(3), theta),
            make_with(circuit, heisenberg(3), theta, **BOTH),
            make_with(circuit, heisenberg(3), theta, engine="abacus"),
            make_with(circuit, heisenberg(3), theta, gradient="parameter-shift"),
            make_with(circuit, None, theta, 10),
            make_with(circuit, heisenberg(3), theta, **VALUE),
        ]
        aer, both, error, shifted, samples, value = process.evaluate(programs)
        assert isinstance(error, WorkflowError)
        assert "'abacus'" in str(error)
        assert np.array_equal(both.gradients, engine.evaluate(programs[1:2])[0].gradients)
        assert np.array_equal(value.values, both.values)
        assert value.gradients is None
        assert aer.gradients is None
        np.testing.assert_allclose(aer.values, both.values, atol=1e-12)
        np.testing.assert_allclose(shifted.gradients, both.gradients, atol=1e-12)
        assert samples.bits.shape == (1, 10, 1)

    @pytest.mark.parametrize("options", [VALUE, BOTH], ids=["value", "gradient"])
    def test_need_is_an_upper_bound(self, make_with, options):
        """Growing programs in one fresh process, so that each one's own memory is a new peak."""
        process = EngineProcess(2**31)
        try:
            process.evaluate([make_with(QuantumCircuit(1), "Z", **options)])
            measured = []
            for n, observable in ((10, random_observable(10, 200)), (16, heisenberg(16)), (19, heisenberg(19))):
                circuit = efficient_su2(n, reps=1, entanglement="linear")
                theta = np.random.default_rng(n).uniform(-3, 3, circuit.num_parameters)
                program = make_with(circuit, observable, theta, **options)
                (outcome,) = process.evaluate([program])
                measured.append(outcome.peak_bytes)
                assert outcome.peak_bytes <= need(program).bytes
            assert sum(measured) >= 3 * 16 * 2**19  # what the states of 19 qubits take was seen
        finally:
            process.close()


class TestPrepared:
    def test_is_bounded_in_bytes(self, make_with, monkeypatch):
        monkeypatch.setattr(adjoint, "_CACHE_BYTES", 40_000)
        small = AdjointEngine(2**30)
        programs = [make_with(efficient_su2(2, reps=reps), "ZZ", np.zeros(4 + 4 * reps), **BOTH) for reps in (1, 2, 3)]
        for _ in range(2):
            assert [o.values.item() for o in small.evaluate(programs)] == [1.0] * 3
        assert 1 <= len(small._prepared) < 3

    def test_is_used_again(self, engine, make_with, monkeypatch):
        program = make_with(efficient_su2(2, reps=1), "XX", np.linspace(0, 1, 8), **BOTH)
        (first,) = engine.evaluate([program])
        monkeypatch.setattr(adjoint, "_Prepared", None)
        (again,) = engine.evaluate([dataclasses.replace(program, theta=program.theta.copy())])
        assert np.array_equal(first.gradients, again.gradients)
