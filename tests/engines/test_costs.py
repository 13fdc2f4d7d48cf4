"""What a program asks for: bytes above what an engine process is seen to take, seconds from fitted terms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter
from qiskit.circuit.library import PauliEvolutionGate, efficient_su2
from qiskit.quantum_info import SparsePauliOp

from hybridq.backends import Aer, Noise
from hybridq.engines import costs, guard, wire
from hybridq.engines.adjoint import _Operator
from hybridq.engines.costs import (
    DEFAULT,
    LEAST,
    TERMS,
    Calibration,
    Corrections,
    calibrate,
    census,
    features,
    need,
    preparation,
)
from hybridq.engines.process import EngineProcess
from hybridq.errors import EngineFailed, TooLarge, WorkflowError
from hybridq.ledger import Ledger
from hybridq.location import Location
from hybridq.policies import Device, Job
from hybridq.program import Outcome, Program, Request, physical, program

A = Parameter("a")
MIB = 2**20


def ask(
    circuit: QuantumCircuit, observable: Any = None, rows: int = 1, shots: int | None = None, backend: Any = None,
    gradient: str = "none", grouping: str | None = None,
) -> Program:  # fmt: skip
    theta = np.random.default_rng(circuit.num_qubits).uniform(-3, 3, (rows, circuit.num_parameters))
    request = Request(circuit, observable, theta, shots, None, backend, grouping)
    return program(request, seed=0, location=Location("run/f[0]"), gradient=gradient)


def heisenberg(n: int) -> SparsePauliOp:
    return SparsePauliOp.from_sparse_list([(p + p, [i, i + 1], 1.0) for i in range(n - 1) for p in "XYZ"], n)


def su2(n: int) -> QuantumCircuit:
    return efficient_su2(n, reps=1, entanglement="linear")


def measured_on_the_way(n: int) -> QuantumCircuit:
    circuit = QuantumCircuit(n, n)
    circuit.compose(su2(n), range(n), inplace=True)
    circuit.measure(0, 0)
    circuit.h(0)
    circuit.measure(range(n), range(n))
    return circuit


# -- bytes against a process -------------------------------------------------------------------------------------


CASES: dict[str, tuple[Any, int]] = {  # programs, and bytes that they cannot do without
    "exact": (lambda: ask(su2(19), heisenberg(19)[:6]), 16 << 19),
    "sampled": (lambda: ask(su2(19), heisenberg(19)[:6], shots=1000), 40 << 19),
    "sampled, diagonal": (lambda: ask(su2(19), "Z" * 19, shots=1000), 32 << 19),
    "sampled, as many shots as states": (lambda: ask(su2(17), "X" * 17, shots=2**18), 64 << 17),
    "bits": (lambda: ask(su2(19), shots=1000), 32 << 19),
    "many bits": (lambda: ask(su2(9), rows=20, shots=200_000), 2 * 8 * 10**6),
    "density matrix": (lambda: ask(QuantumCircuit(10), "X" * 10, backend="density_matrix"), 16 << 20),
    "density matrix, sampled": (
        lambda: ask(QuantumCircuit(10), "X" * 10, shots=100, backend="density_matrix"), 16 << 20,
    ),
    "adjoint": (lambda: ask(su2(19), heisenberg(19), backend="adjoint"), 48 << 19),
    "gradient": (lambda: ask(su2(18), heisenberg(18), gradient="adjoint"), 128 << 18),
    "matrices": (lambda: ask(su2(16), heisenberg(16), backend="adjoint"), 20 << 19),
    "trajectories": (lambda: ask(measured_on_the_way(17), shots=8), 16 << 17),
    "parameters": (lambda: ask(su2(2), "ZZ", rows=20_000, gradient="adjoint"), 6 * 8 * 8 * 20_000),
    "stabilizer": (lambda: ask(QuantumCircuit(30), "X" * 30, shots=20_000, backend="stabilizer"), 20_000 * 8),
    "chain": (lambda: ask(su2(24), heisenberg(24), shots=500, backend="matrix_product_state"), 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def idle() -> Iterator[EngineProcess]:
    process = EngineProcess(2**32)
    process.evaluate([ask(QuantumCircuit(1), "Z"), ask(QuantumCircuit(1), "Z", backend="adjoint")])
    yield process
    process.close()


class TestBytes:
    """Growth of a fresh engine process at its peak, seen from outside, so that its pipes count."""

    @pytest.mark.parametrize("case", CASES)
    def test_need_is_above_what_a_process_takes(self, case: str, idle: EngineProcess) -> None:
        make, least = CASES[case]
        asked = make()
        peak = Path(f"/proc/{idle.pid}/clear_refs")
        if not peak.exists():
            pytest.skip("needs Linux's /proc")
        before = resident(idle, "VmRSS")
        peak.write_text("5")
        (outcome,) = wire.unpack_outcomes(idle.run(wire.pack([asked])))
        assert isinstance(outcome, Outcome), outcome
        grown, projected = resident(idle, "VmHWM") - before, need(asked).bytes
        # what earlier programs left free and is used again does not show: 8 MiB may, glibc gives more back
        assert least - 8 * MIB <= grown <= projected
        assert projected <= 1.5 * grown + 50e6 + 96 * MIB * asked.template.sampled_in_place
        assert outcome.peak_bytes <= projected

    def test_a_density_matrix_of_20_qubits_is_refused_with_both_numbers(self, process: EngineProcess) -> None:
        asked = ask(QuantumCircuit(20), "Z" * 20, backend="density_matrix")
        required = need(asked)
        assert 16 * 4**20 <= required.bytes <= 16 * 4**20 + 2 * LEAST
        (error,) = process.evaluate([asked])
        assert isinstance(error, TooLarge)
        assert f"{required.bytes}" in str(error)
        assert f"{process.max_bytes}" in str(error)
        refusal = Ledger(expected=[Device("engine", 1, 2**33, 1)]).submit(Job("wide", required), 0.0)
        assert refusal is not None
        assert f"{required.bytes:,}" in str(refusal.error)
        assert f"{2**33:,}" in str(refusal.error)


def resident(process: EngineProcess, key: str) -> int:
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


class TestPeak:
    def test_small_programs_are_not_looked_at(self, process: EngineProcess) -> None:
        (outcome,) = process.evaluate([ask(QuantumCircuit(2), "ZZ")])
        assert outcome.peak_bytes == 0

    def test_a_large_one_is_charged_with_its_own_growth_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        peaks = iter([70 * MIB, 100 * MIB, 100 * MIB, 100 * MIB])
        monkeypatch.setattr(guard, "_peak_bytes", lambda: next(peaks))
        nothing = guard.Numbers(np.zeros((1, 1)), np.zeros((1, 1)), None, None)
        small, large = ask(QuantumCircuit(2), "ZZ"), ask(QuantumCircuit(21), "Z" * 21)
        assert need(small).bytes < guard._WATCHED <= need(large).bytes
        outcomes = guard.evaluate_each("test", [small, large, small, large], 2**40, lambda _: nothing)
        assert [o.peak_bytes for o in outcomes if isinstance(o, Outcome)] == [0, 30 * MIB, 0, 0]


# -- bytes by themselves -----------------------------------------------------------------------------------------


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int, int | None]:
    return (
        draw(st.integers(1, 30)),
        draw(st.integers(0, 5)),
        draw(st.integers(1, 20)),
        draw(st.none() | st.integers(1, 10**6)),
    )


def needed(qubits: int, layers: int, rows: int, shots: int | None, backend: Any = None, gradient: str = "none") -> Any:
    circuit = QuantumCircuit(qubits)
    circuit.rx(A, 0)
    for _ in range(layers):
        circuit.x(0)
    return need(ask(circuit, "Z" * qubits, rows, shots, backend, gradient))


METHODS = (None, "density_matrix", "matrix_product_state", "stabilizer")


@settings(max_examples=50)
@given(sizes(), sizes(), st.sampled_from(METHODS))
def test_need_grows_with_everything(left: Any, right: Any, backend: Any) -> None:
    lower: Any = tuple(None if None in pair else min(pair) for pair in zip(left, right, strict=True))
    upper: Any = tuple(max((x for x in pair if x is not None), default=None) for pair in zip(left, right, strict=True))
    if (lower[3] is None) != (upper[3] is None):
        lower = (*lower[:3], upper[3])  # exact and sampled values are different work
    small, large = needed(*lower, backend), needed(*upper, backend)
    for name in ("bytes", "seconds", "qubits", "shots"):
        assert getattr(small, name) <= getattr(large, name), name
    assert small == needed(*lower, backend)
    more = needed(upper[0] + 1, *upper[1:], backend)
    assert more.bytes >= large.bytes
    if upper[3] is None and backend != "matrix_product_state":  # one Z more changes no bond
        assert more.bytes > large.bytes


@pytest.mark.parametrize("gradient", ["none", "adjoint"])
def test_the_adjoint_engine_asks_for_its_states(gradient: str) -> None:
    found = [needed(n, 1, 3, None, "adjoint", gradient) for n in (5, 10, 20, 30)]
    assert found[-1].bytes >= (48 if gradient == "none" else 128) * 2**30
    assert sorted(found, key=lambda n: n.bytes) == found
    assert sorted(found, key=lambda n: n.seconds) == found


@pytest.mark.parametrize("shots", [None, 1000])
def test_need_covers_the_state_itself(shots: int | None) -> None:
    for qubits in (1, 10, 25, 40):
        found = needed(qubits, 0, 3, shots)
        assert found.bytes >= (16 if shots is None else 32) * 2**qubits
        assert (found.qubits, found.shots) == (qubits, 3 * (shots or 0))
        assert found.threads == (1 if qubits < 24 else 0)  # all that there are


@pytest.mark.parametrize("backend", [None, "adjoint", "matrix_product_state", "density_matrix", "stabilizer"])
def test_what_no_machine_could_hold_still_has_a_need(backend: Any) -> None:
    circuit = QuantumCircuit(2000)
    for qubit in range(1999):
        circuit.cx(qubit, qubit + 1)
    found = need(ask(circuit, "Z" * 2000, backend=backend))
    assert found.bytes > 2**2000 or backend in ("matrix_product_state", "stabilizer")
    assert math.isfinite(found.seconds)


def test_samples_without_classical_bits_count() -> None:
    few, many = (need(ask(su2(9), rows=10, shots=shots)).bytes for shots in (1000, 100_000))
    assert many - few >= 10 * 99_000 * 2


def test_what_does_not_fit_its_backend_is_said() -> None:
    noise = replace(Noise.depolarizing(0.01), num_qubits=2)
    with pytest.raises(WorkflowError, match="3 qubits"):
        need(ask(QuantumCircuit(3), "ZZZ", backend=Aer(noise=noise)))


# -- the census ---------------------------------------------------------------------------------------------------


class TestCensus:
    def test_counts_what_composite_gates_consist_of(self) -> None:
        circuit = QuantumCircuit(3)
        circuit.append(PauliEvolutionGate(SparsePauliOp(["ZZI", "IXI"]), A), [0, 1, 2])
        circuit.append(su2(2).assign_parameters(np.ones(8)).to_gate(), [1, 2])
        circuit.ccx(0, 1, 2)
        found = census(physical(ask(circuit, "ZZZ").template))
        assert (found.one, found.two, found.wide) == (9, 2, 1)
        assert found.slots == 2
        assert found.crossings == (1, 3) or found.crossings == (1, 2 + 1)
        assert not found.flips

    def test_a_chain_bonds_only_what_gates_cross(self) -> None:
        circuit = QuantumCircuit(6)
        circuit.cx(0, 1)
        circuit.cx(2, 5)
        assert census(physical(ask(circuit, "Z" * 6).template)).bonds == (2, 1, 2, 2, 2)
        circuit.swap(2, 3)
        assert census(physical(ask(circuit, "Z" * 6).template)).bonds == (2, 1, 8, 2, 2)

    def test_instructions_without_a_definition_are_the_engines_to_refuse(self) -> None:
        circuit = QuantumCircuit(2)
        circuit.initialize("01")
        asked = ask(circuit, shots=5)
        assert need(asked).bytes > 0

    @given(st.data())
    def test_entries_of_observables_are_an_upper_bound(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(1, 6))
        labels = data.draw(st.lists(st.text("IXYZ", min_size=n, max_size=n), min_size=1, max_size=12, unique=True))
        coefficients = data.draw(
            st.lists(st.sampled_from([1.0, -1.0, 0.5]), min_size=len(labels), max_size=len(labels))
        )
        observable = SparsePauliOp(labels, coefficients)
        limit = data.draw(st.sampled_from([1, 8, 64, 2**21]))
        entries, low = costs._kept(observable, limit)
        _, rest = costs.without_identity(observable)
        made = [] if rest is None else [matrix.nnz for _, _, matrix in _Operator(rest, limit)._parts]
        assert entries == sum(made)  # exact: few signs are independent here
        assert entries <= limit or low == 0

    def test_nothing_is_counted_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And no engine is touched: a need is a pure function of the program."""
        asked = ask(su2(4), heisenberg(4), shots=100)
        first = need(asked)
        monkeypatch.setattr(costs, "lower", None)
        monkeypatch.setattr(costs, "measured", None)
        assert need(asked) == first


# -- seconds -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrating() -> list[Program]:
    return costs.calibration_programs()


def test_every_kind_of_program_has_terms(calibrating: list[Program]) -> None:
    kinds = {features(each)[0] for each in calibrating}
    assert kinds == TERMS.keys() - {"backend"}
    for kind, terms in TERMS.items():
        assert len(DEFAULT.coefficients[kind]) == len(terms)
        assert any(DEFAULT.coefficients[kind])


@pytest.mark.parametrize(
    ("gradient", "executions"), [("none", 1), ("parameter-shift", 1 + 2 * 8), ("spsa", 3)]
)  # fmt: skip
def test_gradients_by_values_are_so_many_executions(gradient: str, executions: int) -> None:
    one = features(ask(su2(2), "XX", 1, 100))[1]
    found = features(ask(su2(2), "XX", 5, 100, gradient=gradient))[1]
    assert found == pytest.approx((1.0, *(5 * executions * amount for amount in one[1:])))


def test_calibration_finds_the_coefficients_of_an_engine(
    calibrating: list[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that takes exactly as long as its terms say."""
    monkeypatch.setattr(costs, "calibration_programs", lambda: calibrating)
    random = np.random.default_rng(3)
    true = {kind: 10.0 ** random.uniform(-9, -4, len(terms)) for kind, terms in TERMS.items()}
    known: set[str] = set()
    asked: list[Program] = []

    def evaluate(programs: Any) -> list[Any]:
        outcomes: list[Any] = []
        for each in programs:
            kind, amounts = features(each)
            if kind == "aer stabilizer":
                outcomes.append(EngineFailed("not here"))
                continue
            took = float(np.dot(true[kind], amounts))
            key = f"{each.template.digest} {each.plan}"
            if key not in known:
                known.add(key)
                took += took + 0.5 + 0.01 * census(physical(each.template)).gates
            asked.append(each)
            outcomes.append(Outcome(np.zeros((1, 1)), np.zeros((1, 1)), None, took, 0))
        return outcomes

    found = calibrate(evaluate)
    for each in asked:
        kind, amounts = features(each)
        assert found.seconds(each) == pytest.approx(float(np.dot(true[kind], amounts)), rel=1e-6)
    assert found.coefficients["aer stabilizer"] == DEFAULT.coefficients["aer stabilizer"]
    assert need(asked[0], found).seconds == found.seconds(asked[0])
    assert preparation(asked[0], found) > 0.4


class TestCorrections:
    MODEL = Calibration(
        {kind: (1e-3, *[0.0] * (len(terms) - 1)) for kind, terms in TERMS.items()},
        {engine: (0.5, 0.0, 0.0) for engine in DEFAULT.first},
    )

    def test_converge_on_what_is_observed(self) -> None:
        asked, other, corrections = ask(su2(2), "XX"), ask(su2(2), "ZZ"), Corrections()
        assert need(asked, self.MODEL, corrections).seconds == self.MODEL.seconds(asked) == 1e-3
        corrections.observe(asked, 4e-3, self.MODEL)
        assert need(asked, self.MODEL, corrections).seconds == pytest.approx(4e-3)
        assert need(other, self.MODEL, corrections).seconds == 1e-3
        for observed in (4e-3, 90.0, 4e-3, 4e-3):  # one was interrupted
            corrections.observe(asked, observed, self.MODEL)
        assert need(asked, self.MODEL, corrections).seconds == pytest.approx(4e-3)
        for _ in range(3):
            corrections.observe(asked, 2e-3, self.MODEL)
        assert need(asked, self.MODEL, corrections).seconds == pytest.approx(2e-3)
        assert need(asked, self.MODEL, corrections).seconds == pytest.approx(2e-3)

    def test_what_is_prepared_first_does_not_count(self) -> None:
        asked, corrections = ask(su2(2), "XX"), Corrections()
        corrections.observe(asked, 1.5, self.MODEL, first=True)
        assert corrections.factor(asked) == pytest.approx(1000.0)

    def test_a_gradient_is_a_program_of_its_own(self) -> None:
        asked, shifted = ask(su2(2), "XX", shots=9), ask(su2(2), "XX", shots=9, gradient="spsa")
        corrections = Corrections()
        corrections.observe(asked, 5e-3, self.MODEL)
        assert corrections.factor(shifted) == 1.0

    def test_a_busy_machine_shows_in_programs_never_seen(self) -> None:
        corrections = Corrections()
        for label in ("XX", "YY", "XI", "IX", "XY"):
            corrections.observe(ask(su2(2), label), 2e-3, self.MODEL)
        assert corrections.factor(ask(su2(2), "ZZ")) == pytest.approx(2.0)
        assert corrections.factor(ask(su2(2), "ZZ", backend="stabilizer")) == 1.0

    def test_are_bounded(self) -> None:
        corrections = Corrections(capacity=3)
        programs = [ask(su2(2), label) for label in ("XX", "YY", "ZZ", "XY")]
        for each in (*programs[:3], programs[0], programs[3]):
            corrections.observe(each, 7e-3, self.MODEL)
        assert len(corrections) == 3
        assert [each.template.digest in " ".join(corrections._ratios) for each in programs] == [True, False, True, True]

    def test_nonsense_is_not_noted(self) -> None:
        corrections = Corrections()
        for observed in (0.0, -1.0, math.inf, math.nan):
            corrections.observe(ask(su2(2), "XX"), observed, self.MODEL)
        assert len(corrections) == 0


@pytest.mark.slow
def test_a_process_can_be_calibrated(process: EngineProcess) -> None:
    found = calibrate(process.evaluate)
    for kind in TERMS.keys() - {"backend"}:
        assert found.coefficients[kind] != DEFAULT.coefficients[kind]
        assert all(0 <= coefficient < 1 for coefficient in found.coefficients[kind])
