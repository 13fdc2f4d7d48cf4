"""Every method with every noise, against the dense twin: exact values, sampled ones, samples, and the same bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import dense
import numpy as np
import pytest
from gates import GATES, circuits, observables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import Gate, Parameter, ParameterVector
from qiskit.quantum_info import Kraus, SparsePauliOp, SuperOp
from qiskit_aer.noise import (
    NoiseModel,
    QuantumError,
    ReadoutError,
    amplitude_damping_error,
    coherent_unitary_error,
    depolarizing_error,
    thermal_relaxation_error,
)
from qiskit_ibm_runtime.fake_provider import FakeManilaV2
from scipy.stats import chi2

from hybridq.backends import Aer, Noise, Readout
from hybridq.engines.adjoint import AdjointEngine
from hybridq.engines.aer import AerEngine
from hybridq.engines.costs import need
from hybridq.engines.measuring import measured
from hybridq.errors import EngineFailed, TooLarge, WorkflowError
from hybridq.program import Outcome, Program

MANY = settings(
    max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
MAX_BYTES = 2**31  # of the engines
FEW = settings(MANY, max_examples=12)
METHODS = ("statevector", "density_matrix", "matrix_product_state", "stabilizer")
MOLECULE = SparsePauliOp(
    ["III", "ZII", "IZI", "ZZI", "XXI", "YYI", "IXX", "ZIZ", "XYZ", "IIY"],
    [-1.2, 0.4, -0.4, 0.3, 0.18, 0.18, -0.25, 0.11, 0.07, 0.05],
)
PLAIN = SparsePauliOp(["ZZZ", "IIX"], [1.0, 0.5])


def _noise_model() -> NoiseModel:
    model = NoiseModel()
    relaxing = thermal_relaxation_error(50e3, 30e3, 700, excited_state_population=0.1)
    model.add_all_qubit_quantum_error(depolarizing_error(0.02, 1).compose(amplitude_damping_error(0.05)), ["sx"])
    model.add_quantum_error(relaxing, ["sx", "x"], [1])
    model.add_all_qubit_quantum_error(depolarizing_error(0.06, 2), ["cx"])
    turned = QuantumCircuit(2)
    turned.rx(0.2, 0)
    model.add_quantum_error(QuantumError([(turned, 0.7), (QuantumCircuit(2), 0.3)]), ["cx"], [1, 2])
    model.add_quantum_error(coherent_unitary_error(np.diag([1, np.exp(0.3j)])), ["sx"], [2])
    model.add_all_qubit_readout_error(ReadoutError([[0.97, 0.03], [0.08, 0.92]]))
    model.add_readout_error(ReadoutError([[0.9, 0.1], [0.02, 0.98]]), [2])
    return model


MODEL, MANILA = _noise_model(), FakeManilaV2()
NOISES: dict[str, tuple[Any, dense.Model]] = {
    "none": (None, dense.NOISELESS),
    "depolarizing": (Noise.depolarizing(0.03, 0.08, 0.02), dense.depolarizing(0.03, 0.08, 0.02)),
    "readout": (
        Noise(readout=(Readout(1, 0.02, 0.11), Readout(-1, 0.07, 0.01))),
        dense.Model(readout={1: (0.02, 0.11), -1: (0.07, 0.01)}),
    ),
    "model": (Noise.of(MODEL), dense.of_model(MODEL)),
    "device": (
        Noise.of(MANILA),
        dense.of_model(NoiseModel.from_backend(MANILA), [list(edge) for edge in MANILA.coupling_map.get_edges()]),
    ),
}
EXACT = [(method, "none") for method in ("automatic", *METHODS)]
EXACT += [(method, noise) for method in ("automatic", "density_matrix") for noise in NOISES if noise != "none"]
SAMPLED = [(method, "none") for method in METHODS]
SAMPLED += [(method, noise) for method in ("density_matrix", "statevector") for noise in NOISES if noise != "none"]


def circuit() -> QuantumCircuit:
    """Three qubits, all gates of a kind that every method takes at quarter turns, the first and last qubit coupled."""
    t = ParameterVector("t", 6)
    made = QuantumCircuit(3)
    for qubit in range(3):
        made.ry(t[qubit], qubit)
        made.rz(-t[qubit + 3], qubit)
    made.cx(0, 2)
    made.h(1)
    made.rzz(2 * t[1] + t[5], 1, 2)
    made.cz(0, 1)
    made.rx(t[2] + t[3] - np.pi / 2, 0)
    made.sdg(2)
    return made


CIRCUIT = circuit()


def theta(method: str, rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if method == "stabilizer":
        return rng.integers(-4, 5, (rows, CIRCUIT.num_parameters)) * np.pi / 2
    return rng.uniform(-3, 3, (rows, CIRCUIT.num_parameters))


def evaluate(engine: Any, *programs: Program) -> list[Outcome]:
    outcomes: list[Outcome] = engine.evaluate(programs)
    for outcome in outcomes:
        assert isinstance(outcome, Outcome), outcome
    return outcomes


@pytest.fixture(scope="module")
def adjoint() -> AdjointEngine:
    return AdjointEngine(MAX_BYTES)


@pytest.mark.parametrize(("method", "noise"), EXACT)
def test_exact_values(engine, public_engine, make, method, noise):
    given_noise, model = NOISES[noise]
    rows = theta(method, 3)
    program = make(CIRCUIT, [[MOLECULE, PLAIN]], rows[:, None], backend=Aer(method, given_noise))
    (outcome,) = evaluate(engine, program)
    expected = dense.noisy_values(CIRCUIT, [MOLECULE, PLAIN], rows, model)
    np.testing.assert_allclose(outcome.values, expected, atol=1e-10)
    assert not outcome.stderrs.any()
    if noise != "none":  # the noise is seen at all
        assert np.abs(expected - dense.values(CIRCUIT, [MOLECULE, PLAIN], rows)).max() > 1e-3
    assert np.array_equal(evaluate(public_engine, program)[0].values, outcome.values)


@pytest.mark.parametrize("grouping", ["qubit-wise", "commuting"])
@pytest.mark.parametrize(("method", "noise"), SAMPLED)
def test_sampled_values(engine, make, method, noise, grouping):
    """Within five error bars of what these measurements come to, and not much closer than error bars say."""
    given_noise, model = NOISES[noise]
    rows = np.repeat(theta(method, 2, seed=1), 5, axis=0)
    program = make(
        CIRCUIT, [MOLECULE], rows[:, None], 1000, backend=Aer(method, given_noise), grouping=grouping
    )  # fmt: skip
    (outcome,) = evaluate(engine, program)
    placed, places = model.translated(CIRCUIT)
    groups = measured(MOLECULE.apply_layout(places, placed.num_qubits), grouping)
    expected = np.repeat([dense.measured_value(CIRCUIT, groups, row, model) for row in rows[::5]], 5)
    if grouping == "qubit-wise":  # which is also what each Pauli comes to alone
        own = dense.noisy_values(CIRCUIT, [MOLECULE], rows[::5], model)[:, 0]
        np.testing.assert_allclose(expected[::5], own, atol=1e-12)
    elif noise == "none":
        np.testing.assert_allclose(expected[::5], dense.values(CIRCUIT, [MOLECULE], rows[::5])[:, 0], atol=1e-12)
    values, stderrs = outcome.values[:, 0], outcome.stderrs[:, 0]
    assert (np.abs(values - expected) <= 5 * stderrs + 1e-9).all()
    spread = stderrs > 1e-9
    if spread.any():
        pulls = ((values - expected) / np.where(spread, stderrs, 1.0))[spread]
        assert chi2.cdf(pulls @ pulls, len(pulls)) > 1e-4
        assert len(np.unique(values[spread])) > 1
    assert method == "stabilizer" or spread.all()


@pytest.mark.parametrize(("method", "noise"), SAMPLED)
def test_samples(engine, make, method, noise):
    given_noise, model = NOISES[noise]
    (row,) = theta(method, 1, seed=2)
    shots = 4000
    (outcome,) = evaluate(engine, make(CIRCUIT, None, row, shots, backend=Aer(method, given_noise)))
    counts = np.bincount(outcome.bits[0, :, 0], minlength=8)
    expected = shots * dense.distribution(CIRCUIT, row, model)
    assert counts.sum() == shots
    possible = expected > 1e-6
    assert not counts[~possible].any()
    statistic = float((np.square(counts - expected)[possible] / expected[possible]).sum())
    assert statistic < chi2.isf(1e-5, max(1, possible.sum() - 1))


@pytest.mark.parametrize("noise", ["none", "depolarizing", "model", "device"])
def test_a_qubit_may_be_measured_before_others_are_done(engine, make, noise):
    """Classical bits are as they were written, also where a translation routes other qubits past it."""
    given_noise, model = NOISES[noise]
    early, late = QuantumCircuit(3, 4), QuantumCircuit(3)
    for part in (early, late):
        part.ry(0.8, 1)
        part.cx(1, 0)
        part.cx(1, 2)
        if part is early:
            part.measure(1, 3)
        for _ in range(2):
            part.cx(0, 2)
            part.ry(0.6, 0)
    early.measure([2, 0], [0, 1])
    shots = 4000
    (outcome,) = evaluate(engine, make(early, None, (), shots, backend=Aer("density_matrix", given_noise)))
    counts = np.bincount(outcome.bits[0, :, 0], minlength=16)
    expected = np.zeros(16)
    for bits, chance in enumerate(dense.distribution(late, [], model)):
        expected[(bits >> 1 & 1) << 3 | (bits & 1) << 1 | bits >> 2] += shots * chance
    assert not counts[expected < 1e-6].any()
    possible = expected > 1e-6
    statistic = float((np.square(counts - expected)[possible] / expected[possible]).sum())
    assert statistic < chi2.isf(1e-5, possible.sum() - 1)


@pytest.mark.parametrize("method", METHODS)
def test_every_gate_in_whole_executions(engine, make, method):
    """What a method does not take as it stands is taken apart, also where circuits reset."""
    circuit = QuantumCircuit(4, 4)
    circuit.x([0, 3])
    circuit.reset(3)
    for name, gate in GATES.items():
        if method == "stabilizer" and name not in (*CLIFFORD, *TURNING, *HALF_TURNING):
            continue
        gate = gate.base_class(*[2 * np.pi] * len(gate.params)) if gate.params else gate
        circuit.append(gate, range(gate.num_qubits))
        circuit.append(gate.inverse(), range(gate.num_qubits))
    circuit.measure(range(4), range(4))
    (outcome,) = evaluate(engine, make(circuit, None, (), 5, backend=method))
    assert outcome.bits.tolist() == [[[1]] * 5]


def test_a_branch_with_quarter_turns_by_the_stabilizer(engine, make):
    circuit = QuantumCircuit(2, 2)
    circuit.rx(Parameter("a"), 0)
    circuit.measure(0, 0)
    with circuit.if_test((0, 1)):
        circuit.ry(Parameter("b"), 1)
    circuit.measure(1, 1)
    (outcome,) = evaluate(engine, make(circuit, None, [np.pi, -np.pi], 9, backend="stabilizer"))
    assert outcome.bits.tolist() == [[[3]] * 9]


def test_channels_inside_of_instructions_are_seen(engine, make):
    """A composite with noise in it is no unitary circuit, whatever its name."""
    inside = QuantumCircuit(1)
    inside.append(Kraus(SuperOp(amplitude_damping_error(0.3))).to_instruction(), [0])
    circuit = QuantumCircuit(1)
    circuit.x(0)
    circuit.append(inside.to_instruction(), [0])
    program = make(circuit, SparsePauliOp("Z"), ())
    assert program.template.has_channels
    assert program.plan.method == "density_matrix"
    assert evaluate(engine, program)[0].values == pytest.approx(-0.4, abs=1e-12)
    counts = int(evaluate(engine, make(circuit, None, (), 3000, backend="statevector"))[0].bits.sum())
    assert abs(counts - 2100) < 5 * np.sqrt(3000 * 0.21)


@pytest.mark.parametrize("chance", [1e-3, 1e-8, 1e-10])
def test_small_noise_is_not_rounded_away(engine, make, chance):
    circuit = QuantumCircuit(1)
    for _ in range(50):
        circuit.x(0)
    backend = Aer(noise=Noise.depolarizing(chance))
    (outcome,) = evaluate(engine, make(circuit, SparsePauliOp("Z"), (), backend=backend))
    assert 1 - outcome.values.item() == pytest.approx(1 - (1 - chance) ** 50, rel=1e-4)


@pytest.mark.parametrize("bond", [1, None])
def test_a_bounded_bond_dimension_truncates(engine, make, bond):
    circuit = QuantumCircuit(4)
    circuit.ry(1.0, [0, 1])
    circuit.cx(0, 3)
    circuit.cx(1, 2)
    program = make(circuit, SparsePauliOp("ZZZZ"), (), backend=Aer("matrix_product_state", bond_dimension=bond))
    (outcome,) = evaluate(engine, program)
    assert dict(program.plan.options).get("bond_dimension") == bond
    if bond is None:
        assert outcome.values.item() == pytest.approx(1.0, abs=1e-12)
    else:
        backends = ("statevector", Aer("matrix_product_state", bond_dimension=bond))
        exact, bounded = evaluate(engine, *(make(circuit, SparsePauliOp("XXXX"), (), backend=b) for b in backends))
        assert exact.values.item() == pytest.approx(np.sin(1.0) ** 2)
        assert bounded.values.item() < exact.values.item() - 0.1


# -- what a method cannot do ---------------------------------------------------------------------------------------


def _turn(name: str) -> tuple[QuantumCircuit, list[float]]:
    circuit = QuantumCircuit(2, 1)
    if name == "t":
        circuit.t(0)
        return circuit, []
    getattr(circuit, name)(Parameter("a"), *range(GATES[name].num_qubits))
    return circuit, [0.4]


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("rx", "has rx by 0.4 "), ("rzz", "has rzz by 0.4 "), ("p", "has rz by 0.4 "), ("crx", "by 0.2 "),
        ("t", "has rz by 0.785398 "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shots", [None, 10])
def test_the_stabilizer_names_gate_and_angle(engine, public_engine, make, gate, words, shots):
    circuit, row = _turn(gate)
    good = make(QuantumCircuit(1), SparsePauliOp("Z"), (), backend="stabilizer")
    for runner in (engine, public_engine):
        for observable in (SparsePauliOp("ZZ"), None):
            if observable is None and shots is None:
                continue
            asked = circuit if observable is not None else circuit.measure_all(inplace=False)
            error, other = runner.evaluate([make(asked, observable, row, shots, backend="stabilizer"), good])
            assert isinstance(error, WorkflowError)
            assert words in str(error)
            assert "no multiple of pi/2; use another method" in str(error)
            assert other.values == 1.0


def test_a_wide_density_matrix_is_refused_with_both_numbers(engine, make):
    circuit = QuantumCircuit(20)
    circuit.h(range(20))
    for backend in (Aer("density_matrix"), Aer(noise=Noise.depolarizing(0.01))):
        program = make(circuit, SparsePauliOp("Z" * 20), (), backend=backend)
        assert program.plan.method == "density_matrix"
        (error,) = engine.evaluate([program])
        assert isinstance(error, TooLarge)
        assert str(need(program).bytes) in str(error)
        assert need(program).bytes >= 16 * 4**20
        assert str(MAX_BYTES) in str(error)


def test_a_gate_without_definition_is_named(engine, adjoint, make):
    circuit = QuantumCircuit(1)
    circuit.append(Gate("mystery", 1, [0.5]), [0])
    for name in (*METHODS, "adjoint"):
        runner = adjoint if name == "adjoint" else engine
        good = make(QuantumCircuit(1), SparsePauliOp("Z"), (), backend=name)
        error, other = runner.evaluate([make(circuit, SparsePauliOp("Z"), (), backend=name), good])
        assert isinstance(error, EngineFailed)
        assert "cannot run the instruction 'mystery', and it has no definition" in str(error)
        assert other.values == 1.0


# -- random circuits -----------------------------------------------------------------------------------------------


@MANY
@given(st.data())
def test_all_engines_agree_with_the_dense_twin(engine, adjoint, make, data):
    circuit = data.draw(circuits())
    members = data.draw(st.lists(observables(circuit.num_qubits), min_size=1, max_size=2))
    rows = np.random.default_rng(circuit.size()).uniform(-3, 3, (1, circuit.num_parameters))
    expected = dense.values(circuit, members, rows)
    for name in ("statevector", "density_matrix", "matrix_product_state", "adjoint"):
        runner = adjoint if name == "adjoint" else engine
        (outcome,) = evaluate(runner, make(circuit, [members], rows[:, None], backend=name))
        np.testing.assert_allclose(outcome.values, expected, atol=1e-10, err_msg=name)


CLIFFORD = ("cx", "cy", "cz", "dcx", "ecr", "h", "id", "iswap", "s", "sdg", "swap", "sx", "sxdg", "x", "y", "z")
TURNING = {"p": 1, "r": 2, "rx": 1, "rxx": 1, "ry": 1, "ryy": 1, "rz": 1, "rzx": 1, "rzz": 1, "u": 3, "u1": 1, "u2": 2,
           "u3": 3}  # fmt: skip
HALF_TURNING = {"cp": 1, "crx": 1, "cry": 1, "crz": 1, "cu1": 1}  # Clifford gates by half turns alone


@st.composite
def cliffords(draw: Any) -> tuple[QuantumCircuit, np.ndarray]:
    """A circuit with angles that are expressions, and quarter turns for which it is one of Clifford gates."""
    n = draw(st.integers(1, 5))
    a, b = ParameterVector("q", 2)  # quarter turns
    made = QuantumCircuit(n)
    names = [name for name in (*CLIFFORD, *TURNING, *HALF_TURNING) if GATES[name].num_qubits <= n]
    turns = st.sampled_from([a, -a, 2 * b - a, a + b + np.pi / 2, 3 * a, np.pi, -np.pi / 2, 4 * b + a])
    for name in draw(st.lists(st.sampled_from(names), min_size=2, max_size=20)):
        gate, factor = GATES[name], 2 if name in HALF_TURNING else 1
        count = TURNING.get(name, HALF_TURNING.get(name, 0))
        gate = gate.base_class(*(factor * draw(turns) for _ in range(count))) if count else gate
        made.append(gate, draw(st.permutations(range(n)))[: gate.num_qubits])
    return made, np.array(draw(st.lists(st.integers(-5, 5), min_size=2, max_size=2))) * np.pi / 2


@settings(MANY, max_examples=100)
@given(st.data())
def test_stabilizers_agree_with_the_dense_twin(engine, make, data):
    circuit, turns = data.draw(cliffords())
    members = data.draw(st.lists(observables(circuit.num_qubits), min_size=1, max_size=2))
    named = dict(zip(("q[0]", "q[1]"), turns, strict=True))
    rows = np.array([[named[parameter.name] for parameter in circuit.parameters]])
    (outcome,) = evaluate(engine, make(circuit, [members], rows[:, None], backend="stabilizer"))
    np.testing.assert_allclose(outcome.values, dense.values(circuit, members, rows), atol=1e-10)


@settings(MANY, max_examples=40)
@given(st.data())
def test_noise_of_random_circuits(engine, make, data):
    """Channels as written, gates on more qubits taken apart, open controls included."""
    circuit = data.draw(circuits())
    members = [data.draw(observables(circuit.num_qubits))]
    rows = np.random.default_rng(circuit.size()).uniform(-3, 3, (1, circuit.num_parameters))
    apart = QuantumCircuit(circuit.num_qubits)
    for instruction in circuit.data:
        _take_apart(apart, instruction.operation, [circuit.find_bit(q).index for q in instruction.qubits])
    backend = Aer(noise=Noise.depolarizing(0.02, 0.05))
    (outcome,) = evaluate(engine, make(circuit, [members], rows[:, None], backend=backend))
    expected = dense.noisy_values(apart, members, rows, dense.depolarizing(0.02, 0.05))
    np.testing.assert_allclose(outcome.values, expected, atol=1e-10)


def _take_apart(target: QuantumCircuit, operation: Any, qubits: list[int]) -> None:
    if len(qubits) <= 2:
        target.append(operation, qubits)
        return
    definition = operation.definition
    for instruction in definition.data:
        _take_apart(target, instruction.operation, [qubits[definition.find_bit(q).index] for q in instruction.qubits])


# -- bits ----------------------------------------------------------------------------------------------------------


def _reset() -> QuantumCircuit:
    made = QuantumCircuit(3, 2)
    made.compose(CIRCUIT, inplace=True)
    made.measure(0, 0)
    made.reset(0)
    made.cx(1, 0)
    made.measure(0, 1)
    return made


KINDS: dict[str, tuple[QuantumCircuit, Any, int | None]] = {
    "exact": (CIRCUIT, MOLECULE, None),
    "estimate": (CIRCUIT, MOLECULE, 60),
    "samples": (CIRCUIT, None, 37),
    "whole executions": (_reset(), None, 23),
}
BITS = [(method, noise, kind) for method, noise in SAMPLED if noise in ("none", "device") for kind in KINDS
        if (kind, method, noise) != ("exact", "statevector", "device")]  # fmt: skip


def parts(program: Program, rows: list[int]) -> Program:
    """Some rows of a program with their seeds, in another order."""
    return dataclasses.replace(
        program, theta=program.theta[rows], seeds=program.seeds[rows], batch_shape=(len(rows),)
    )  # fmt: skip


def same_bits(found: Outcome, whole: Outcome, rows: list[int]) -> None:
    for name in ("values", "stderrs", "bits", "gradients"):
        left, right = getattr(found, name), getattr(whole, name)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.tobytes() == right[rows].tobytes(), name


@pytest.mark.parametrize(("method", "noise", "kind"), BITS)
def test_bits_of_a_row_are_its_own(engine, public_engine, process, make, method, noise, kind):
    """Alone, first, in the middle and last of a batch; by both of Aer's interfaces; here and in a process."""
    circuit, observable, shots = KINDS[kind]
    backend, rows = Aer(method, NOISES[noise][0]), theta(method, 5, seed=3)
    program = make(circuit, observable, rows, shots, backend=backend)
    (whole,) = evaluate(engine, program)
    other = make(QuantumCircuit(2), "XX", None, 10)
    for runner in (engine, public_engine, process):
        for chosen in ([3], [3, 0, 1], [4, 3, 2], [0, 3]):
            first, found, _ = evaluate(runner, other, parts(program, chosen), other)
            same_bits(found, whole, chosen)
            assert first.values.shape == (1, 1)


@FEW
@given(st.data())
def test_bits_of_random_programs(engine, public_engine, process, make, data):
    circuit = data.draw(circuits(min_parameters=1))
    method = data.draw(st.sampled_from(["statevector", "density_matrix", "matrix_product_state"]))
    observable = data.draw(st.none() | observables(circuit.num_qubits))
    shots = data.draw(st.integers(20, 200) if observable is None else st.none() | st.integers(20, 200))
    noise = None if method == "matrix_product_state" or (shots is None and method == "statevector") else (
        data.draw(st.sampled_from([None, Noise.depolarizing(0.1, 0.2, 0.03)])))  # fmt: skip
    count = data.draw(st.integers(1, 6))
    rows = np.random.default_rng(count).uniform(-3, 3, (count, circuit.num_parameters))
    program = make(circuit, observable, rows, shots, backend=Aer(method, noise))
    (whole,) = evaluate(engine, program)
    order = data.draw(st.permutations(range(count)))
    for runner, chosen in ((engine, order), (public_engine, order), (process, order), (AerEngine(2**30), order[:1])):
        same_bits(evaluate(runner, parts(program, list(chosen)))[0], whole, list(chosen))
