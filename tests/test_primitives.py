"""Qiskit's primitives over the scheduler: as Qiskit's own outside of runs, recorded evaluations inside."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from qiskit.circuit import Clbit, Parameter, ParameterVector
from qiskit.circuit.library import n_local
from qiskit.primitives import (
    BaseEstimatorV2,
    BasePrimitiveJob,
    BaseSamplerV2,
    BitArray,
    StatevectorEstimator,
    StatevectorSampler,
)
from qiskit.primitives.containers.bindings_array import BindingsArray
from qiskit.primitives.containers.estimator_pub import EstimatorPub
from qiskit.primitives.containers.sampler_pub import SamplerPub
from qiskit.providers import JobStatus
from qiskit.quantum_info import Pauli, SparsePauliOp, Statevector
from runs import journal, report

import hybridq as hq
from hybridq import primitives
from hybridq.dispatch import driver_engine
from hybridq.language import RunReport

ANGLES = ParameterVector("angle", 3)
CIRCUIT = QuantumCircuit(2, metadata={"made": "by hand"})
CIRCUIT.ry(ANGLES[2], 0)
CIRCUIT.rx(ANGLES[0], 1)
CIRCUIT.cx(0, 1)
CIRCUIT.rz(ANGLES[1], 1)
CIRCUIT.h(1)
BELL = QuantumCircuit(2)
BELL.h(0)
BELL.cx(0, 1)
MEASURED = BELL.measure_all(inplace=False)
TERMS = SparsePauliOp(["ZZ", "XI", "YX", "II"], [1.0, 0.5, -0.25, 0.125])
OTHER = SparsePauliOp(["XX", "IZ"], [0.7, -0.3])
RNG = np.random.default_rng(5)
THETA = RNG.uniform(-3, 3, size=3)


def exact(circuit: QuantumCircuit, observable: SparsePauliOp, theta: Any) -> float:
    return float(Statevector(circuit.assign_parameters(np.asarray(theta))).expectation_value(observable).real)


def evaluations(found: RunReport) -> tuple[int, int]:
    """How many were executed, and how many answered from the record."""
    return found.evaluations_executed, found.evaluations_replayed


def cut(directory: str | Path, kept: int, store: Path) -> None:
    """A copy of a run in another store with the first ``kept`` lines of its journal: what a kill leaves."""
    copy = store / Path(directory).name
    shutil.copytree(directory, copy)
    lines = (copy / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "journal.jsonl").write_bytes(b"".join(lines[:kept]))


class Gate:
    """This process' engine behind a gate: it can be shut, and it notes what goes through."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.batches: list[int] = []
        self.killed = 0

    def evaluate(self, programs: list[Any]) -> Any:
        self.reached.set()
        assert self.open.wait(60)
        self.batches.append(len(programs))
        return driver_engine().evaluate(programs)

    def kill(self) -> None:
        self.killed += 1
        self.open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(primitives, "driver_engine", lambda: gate)
    yield gate
    gate.open.set()


# -- the estimator against Qiskit's own --------------------------------------------------------------------------------

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one of each": ((), ()),
    "a row of parameters": ((3,), ()),
    "a table of parameters": ((2, 3), ()),
    "a row of observables": ((), (3,)),
    "a row of both": ((3,), (3,)),
    "an outer product": ((3,), (2, 1)),
    "the other outer product": ((2, 1), (3,)),
    "a table by a column": ((2, 3), (2, 1)),
    "more axes": ((2, 1, 3), (2, 1)),
    "a row of one": ((1,), (1,)),
    "no parameter sets": ((0,), ()),
}


def observables(shape: tuple[int, ...]) -> Any:
    """Different observables of ``shape``, as a nested list."""
    flat = [SparsePauliOp(["ZZ", "XI", "YX"], RNG.normal(size=3)) for _ in range(int(np.prod(shape)))]
    array = np.empty(len(flat), dtype=object)
    array[:] = flat
    return array.reshape(shape).tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_exact_values_broadcast_as_in_qiskit(name: str) -> None:
    batch, shape = SHAPES[name]
    pub = (CIRCUIT, observables(shape), RNG.uniform(-3, 3, size=(*batch, 3)))
    [found] = hq.Estimator().run([pub]).result()
    [expected] = StatevectorEstimator().run([pub]).result()
    assert found.data.shape == expected.data.shape
    for kind in ("evs", "stds"):
        ours, theirs = found.data[kind], expected.data[kind]
        assert type(ours) is type(theirs) is np.ndarray
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "observable", ["XY", Pauli("-ZI"), {"ZZ": 0.5, "IX": -1.0}, TERMS, [["ZZ", Pauli("YY")]], "II"], ids=repr
)
def test_observables_in_all_of_qiskits_forms(observable: Any) -> None:
    pub = (CIRCUIT, observable, THETA)
    [found] = hq.Estimator().run([pub]).result()
    [expected] = StatevectorEstimator().run([pub]).result()
    np.testing.assert_allclose(found.data.evs, expected.data.evs, rtol=0, atol=1e-12)


def test_projectors_are_observables_too() -> None:
    """Letters of Qiskit's observables that its own estimator has not; probabilities by hand."""
    [found] = hq.Estimator().run([(BELL, ["00", "01", "++", {"1I": 2.0, "0I": 2.0}])]).result()
    np.testing.assert_allclose(found.data.evs, [0.5, 0.0, 0.5, 2.0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "values",
    [
        {ANGLES[0]: 0.1, ANGLES[1]: 0.2, ANGLES[2]: 0.3},
        {"angle[2]": [0.3, 0.4], ("angle[0]", "angle[1]"): [[0.1, 0.2], [0.5, 0.6]]},
        BindingsArray({tuple(ANGLES): RNG.normal(size=(2, 2, 3))}),
        RNG.normal(size=(4, 3)).tolist(),
    ],
    ids=["by parameter", "by name, in parts and out of order", "bindings", "a list"],
)
def test_parameter_values_in_all_of_qiskits_forms(values: Any) -> None:
    pub = (CIRCUIT, TERMS, values)
    [found] = hq.Estimator().run([pub]).result()
    [expected] = StatevectorEstimator().run([pub]).result()
    np.testing.assert_allclose(found.data.evs, expected.data.evs, rtol=0, atol=1e-12)


def test_one_parameter_may_come_without_its_axis_as_in_qiskit() -> None:
    circuit = QuantumCircuit(1)
    circuit.rx(Parameter("t"), 0)
    for values in (0.3, [0.3], {"t": [0.1, 0.2, 0.3]}):
        [found] = hq.Estimator().run([(circuit, "Z", values)]).result()
        [expected] = StatevectorEstimator().run([(circuit, "Z", values)]).result()
        assert found.data.evs.shape == expected.data.evs.shape
        np.testing.assert_allclose(found.data.evs, expected.data.evs, rtol=0, atol=1e-12)


def test_what_was_asked_stays_as_it_was_whatever_happens_to_the_circuit(gate: Gate) -> None:
    circuit, observable = CIRCUIT.copy(), SparsePauliOp(["ZZ", "XI"], [1.0, 0.5])
    expected = exact(circuit, observable, THETA)
    gate.open.clear()
    job = hq.Estimator().run([(circuit, observable, THETA)])
    circuit.x(0)
    observable.coeffs[0] = 100.0
    gate.open.set()
    assert job.result()[0].data.evs == pytest.approx(expected, abs=1e-12)
    changed = hq.Estimator().run([(circuit, observable, THETA)]).result()[0].data.evs
    assert changed == pytest.approx(exact(circuit, observable, THETA), abs=1e-10)


@pytest.mark.parametrize("precision", [0.2, 0.02])
def test_sampled_values_lie_within_their_error_bars(precision: float) -> None:
    thetas = RNG.uniform(-3, 3, size=(60, 3))
    [found] = hq.Estimator(seed=3).run([(CIRCUIT, [[TERMS], [OTHER]], thetas)], precision=precision).result()
    expected = np.array([[exact(CIRCUIT, o, theta) for theta in thetas] for o in (TERMS, OTHER)])
    assert found.data.stds.shape == (2, 60)
    assert (found.data.stds > 0).all()
    assert (found.data.stds <= 1.2 * precision).all()  # measured, so not sharper than their own noise
    off = (found.data.evs - expected) / found.data.stds
    assert 0.8 < off.std() < 1.25  # of 120 values; the bars are as wide as the errors, no less and no more
    assert abs(off).max() < 5


def test_precision_of_a_pub_goes_before_that_of_the_call_and_that_before_the_default() -> None:
    estimator = hq.Estimator(default_precision=0.1)
    pubs = [(BELL, "XX", None, 0.05), (BELL, "XX"), (BELL, "XX", None, 0.0)]
    assert [r.metadata["target_precision"] for r in estimator.run(pubs).result()] == [0.05, 0.1, 0.0]
    found = estimator.run(pubs, precision=0.2).result()
    assert [r.metadata["target_precision"] for r in found] == [0.05, 0.2, 0.0]
    assert [r.metadata["shots"] for r in found] == [400, 25, None]
    exactly = estimator.run(pubs, precision=0).result()
    assert [r.metadata["target_precision"] for r in exactly] == [0.05, 0.0, 0.0]
    assert [p.metadata["shots"] for p in hq.Estimator().run([EstimatorPub.coerce((BELL, "XX"), 0.1)]).result()] == [100]


def test_metadata_of_estimates_say_how_the_numbers_came_about() -> None:
    result = hq.Estimator().run([(CIRCUIT, TERMS, THETA), (CIRCUIT, TERMS, THETA, 0.1)]).result()
    assert result.metadata == {"version": 2}
    assert result[0].metadata == {
        "target_precision": 0.0, "circuit_metadata": {"made": "by hand"}, "shots": None, "engine": "aer",
        "method": "statevector", "sampling": "exact", "grouping": "none",
    }  # fmt: skip
    assert result[1].metadata == {
        "target_precision": 0.1, "circuit_metadata": {"made": "by hand"}, "shots": 307, "engine": "aer",
        "method": "statevector", "sampling": "probabilities", "grouping": "qubit-wise",
    }  # fmt: skip


def test_backend_and_grouping_are_handed_on() -> None:
    """Depolarizing of probability p after the gate that entangles: each correlation of the pair is 1 - p."""
    noisy_pair = hq.Aer(method="density_matrix", noise=hq.Noise.depolarizing(two_qubit=0.1))
    [found] = hq.Estimator(backend=noisy_pair).run([(BELL, ["XX", "ZZ", "XI"])]).result()
    np.testing.assert_allclose(found.data.evs, [0.9, 0.9, 0.0], rtol=0, atol=1e-12)
    assert found.metadata["method"] == "density_matrix"
    [found] = hq.Sampler(backend=noisy_pair, seed=1).run([MEASURED], shots=20_000).result()
    odd = sum(n for bits, n in found.data.meas.get_counts().items() if bits in ("01", "10")) / 20_000
    assert abs(odd - 0.05) < 5 * np.sqrt(0.05 * 0.95 / 20_000)
    together = hq.Estimator(grouping="commuting", default_precision=0.1)
    [found] = together.run([(BELL, SparsePauliOp(["XX", "ZZ", "YY"]))]).result()
    assert (float(found.data.evs), float(found.data.stds)) == (1.0, 0.0)  # an eigenstate of all, measured together
    assert found.metadata["grouping"] == "commuting"


# -- the sampler -------------------------------------------------------------------------------------------------------


def test_samples_follow_the_exact_probabilities() -> None:
    circuit = CIRCUIT.measure_all(inplace=False)
    thetas = RNG.uniform(-3, 3, size=(2, 3, 3))
    [found] = hq.Sampler(seed=1).run([(circuit, thetas)], shots=20_000).result()
    assert (found.data.meas.shape, found.data.meas.num_shots, found.data.meas.num_bits) == ((2, 3), 20_000, 2)
    for where in np.ndindex(2, 3):
        expected = Statevector(CIRCUIT.assign_parameters(thetas[where])).probabilities_dict()
        counts = found.data.meas.get_counts(where)
        for outcome in ("00", "01", "10", "11"):
            p = expected.get(outcome, 0.0)
            assert abs(counts.get(outcome, 0) / 20_000 - p) <= 5 * np.sqrt(p * (1 - p) / 20_000) + 1e-12


def registers() -> dict[str, QuantumCircuit]:
    """Circuits of one outcome, so that samples can be compared to the bit."""
    found = {}
    q, a, b = QuantumRegister(12, "q"), ClassicalRegister(9, "a"), ClassicalRegister(3, "b")
    two = QuantumCircuit(q, a, b)
    two.x([0, 3, 8, 10])
    two.measure(range(12), range(12))
    found["two registers, one of more than a byte"] = two
    crossed = QuantumCircuit(q, a, b)
    crossed.x([0, 3, 8, 10])
    crossed.measure(range(11, -1, -1), range(12))
    found["measured across"] = crossed
    part = QuantumCircuit(q, a, b)
    part.x([0, 3])
    part.measure([0, 3], [a[4], b[2]])
    found["bits that are not measured"] = part
    shared = QuantumCircuit(q, a)
    shared.add_register(ClassicalRegister(bits=[a[2], a[0]], name="shared"))
    shared.x([0, 3])
    shared.measure(range(4), range(4))
    found["registers that share bits"] = shared
    loose = QuantumCircuit(q, [Clbit()], b)
    loose.x([0, 3])
    loose.measure([0, 1, 2, 3], range(4))
    found["a bit in no register"] = loose
    empty = QuantumCircuit(q, ClassicalRegister(0, "none"), b)
    empty.x(0)
    empty.measure([0, 1], [b[0], b[1]])
    found["a register of no bits"] = empty
    return found


@pytest.mark.parametrize("name", registers())
def test_registers_are_those_of_qiskits_sampler(name: str) -> None:
    circuit = registers()[name]
    [found] = hq.Sampler().run([circuit], shots=7).result()
    [expected] = StatevectorSampler().run([circuit], shots=7).result()
    assert list(found.data) == list(expected.data)
    for register in expected.data:
        ours, theirs = found.data[register], expected.data[register]
        assert isinstance(ours, BitArray)
        assert (ours.num_bits, ours.num_shots, ours.array.dtype) == (theirs.num_bits, 7, np.uint8)
        np.testing.assert_array_equal(ours.array, theirs.array)


def test_registers_hold_the_same_shots() -> None:
    a, b = ClassicalRegister(1, "a"), ClassicalRegister(1, "b")
    circuit = QuantumCircuit(QuantumRegister(2), a, b)
    circuit.compose(BELL, inplace=True)
    circuit.measure([0, 1], [0, 1])
    [found] = hq.Sampler().run([circuit], shots=500).result()
    assert found.data.a.get_bitstrings() == found.data.b.get_bitstrings()
    assert set(found.data.a.get_counts()) == {"0", "1"}


def test_measurements_within_a_circuit_and_control_flow_are_sampled() -> None:
    circuit = QuantumCircuit(QuantumRegister(2), ClassicalRegister(1, "first"), ClassicalRegister(1, "then"))
    circuit.h(0)
    circuit.measure(0, 0)
    with circuit.if_test((circuit.clbits[0], 1)):
        circuit.x(1)
    circuit.measure(1, 1)
    [found] = hq.Sampler(seed=2).run([circuit], shots=400).result()
    assert found.data.first.get_bitstrings() == found.data.then.get_bitstrings()
    assert found.metadata["sampling"] != "exact"


def test_shots_of_a_pub_go_before_those_of_the_call_and_those_before_the_default() -> None:
    sampler = hq.Sampler(default_shots=30)
    pubs = [(MEASURED, None, 10), MEASURED, (MEASURED,)]
    assert [r.data.meas.num_shots for r in sampler.run(pubs).result()] == [10, 30, 30]
    assert [r.data.meas.num_shots for r in sampler.run(pubs, shots=20).result()] == [10, 20, 20]
    [found] = sampler.run([SamplerPub.coerce(MEASURED, 5)]).result()
    assert found.metadata["shots"] == found.data.meas.num_shots == 5
    assert hq.Sampler().run([MEASURED]).result()[0].data.meas.num_shots == 1024


def test_metadata_of_samples() -> None:
    circuit = CIRCUIT.measure_all(inplace=False)
    result = hq.Sampler().run([(circuit, THETA, 9)]).result()
    assert result.metadata == {"version": 2}
    assert result[0].metadata == {
        "shots": 9, "circuit_metadata": {"made": "by hand"}, "engine": "aer", "method": "statevector",
        "sampling": "probabilities",
    }  # fmt: skip


# -- seeds, options, jobs ----------------------------------------------------------------------------------------------


def noisy(estimator: Any) -> float:
    return float(estimator.run([(CIRCUIT, TERMS, THETA, 0.01)]).result()[0].data.evs)


def drawn(sampler: Any) -> bytes:
    return bytes(sampler.run([(MEASURED, None, 200)]).result()[0].data.meas.array.tobytes())


@pytest.mark.parametrize(("make", "ask"), [(hq.Estimator, noisy), (hq.Sampler, drawn)], ids=["estimator", "sampler"])
def test_calls_differ_and_an_equal_seed_repeats_their_sequence(make: Any, ask: Any) -> None:
    first, again, other = make(seed=7), make(seed=7), make(seed=8)
    sequence = [ask(first) for _ in range(3)]
    assert len(set(sequence)) == 3
    assert [ask(again) for _ in range(3)] == sequence
    assert not {ask(other) for _ in range(3)} & set(sequence)
    assert len({ask(make()) for _ in range(3)}) == 3  # one without a seed does not begin anew


def test_pubs_of_one_call_draw_their_own_samples() -> None:
    found = hq.Sampler().run([(MEASURED, None, 200)] * 3).result()
    assert len({r.data.meas.array.tobytes() for r in found}) == 3


def test_options_are_what_was_given() -> None:
    estimator, sampler = hq.Estimator(default_precision=0.5, seed=3), hq.Sampler(default_shots=7, seed=4)
    assert isinstance(estimator, BaseEstimatorV2)
    assert isinstance(sampler, BaseSamplerV2)
    assert (estimator.default_precision, estimator.seed, estimator.options.default_precision) == (0.5, 3, 0.5)
    assert (sampler.default_shots, sampler.seed, sampler.options.default_shots) == (7, 4, 7)
    assert (hq.Estimator().default_precision, hq.Sampler().default_shots) == (0.0, 1024)


def test_pubs_of_one_call_go_to_the_engine_together(gate: Gate) -> None:
    result = hq.Estimator().run([(CIRCUIT, TERMS, THETA), (BELL, "XX"), (CIRCUIT, OTHER, THETA)]).result()
    assert gate.batches == [3]
    values = [float(r.data.evs) for r in result]
    assert values == pytest.approx([exact(CIRCUIT, TERMS, THETA), 1.0, exact(CIRCUIT, OTHER, THETA)], abs=1e-12)
    assert len(hq.Estimator().run([]).result()) == len(hq.Sampler().run(iter([])).result()) == 0
    assert gate.batches == [3]


def test_the_life_of_a_job(gate: Gate) -> None:
    gate.open.clear()
    job, behind = hq.Estimator().run([(BELL, "XX")]), hq.Sampler().run([MEASURED])
    assert isinstance(job, BasePrimitiveJob)
    assert gate.reached.wait(60)
    assert (job.status(), behind.status()) == (JobStatus.RUNNING, JobStatus.QUEUED)
    assert (job.running(), job.done(), job.in_final_state()) == (True, False, False)
    gate.open.set()
    assert float(job.result()[0].data.evs) == pytest.approx(1.0)
    assert (job.status(), job.done(), job.running(), job.in_final_state()) == (JobStatus.DONE, True, False, True)
    assert not job.cancel()
    assert job.result() is job.result()
    assert behind.result()[0].data.meas.num_shots == 1024
    assert job.job_id() != behind.job_id()


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_between_pubs(gate: Gate) -> None:
    gate.open.clear()
    long = (CIRCUIT, TERMS, np.zeros((3000, 3)))  # estimated at 0.3 s: a batch of its own
    job = hq.Estimator().run([long, long, long])
    behind = hq.Estimator().run([(BELL, "XX")])
    assert gate.reached.wait(60)
    assert behind.cancel()
    assert (behind.status(), behind.cancelled(), behind.in_final_state()) == (JobStatus.CANCELLED, True, True)
    assert job.cancel()
    assert job.running()
    gate.open.set()
    for each in (job, behind):
        with pytest.raises(CancelledError, match=f"{each.job_id()} was cancelled"):
            each.result()
        assert each.cancelled()
        assert each.cancel()
    assert gate.batches == [1]
    assert hq.Estimator().run([(BELL, "XX")]).result()[0].data.evs == pytest.approx(1.0)


def test_ctrl_c_gives_the_job_up_and_ends_the_engine(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.open.clear()
    job = hq.Estimator().run([(BELL, "XX")])
    assert gate.reached.wait(60)

    def interrupt() -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(job._future, "result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            job.result()
    assert gate.killed == 1
    with pytest.raises(CancelledError):
        job.result()


def test_errors_of_the_engine_are_raised_by_result(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def evaluate(self, programs: Any) -> Any:
            raise hq.EngineFailed("the engine is out of order")

    with monkeypatch.context() as patched:
        patched.setattr(primitives, "driver_engine", Broken)
        job = hq.Estimator().run([(BELL, "XX")])
        with pytest.raises(hq.EngineFailed, match="out of order"):
            job.result()
    assert (job.status(), job.done(), job.in_final_state()) == (JobStatus.ERROR, False, True)
    assert not job.cancel()


def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    large = QuantumCircuit(45)
    large.h(0)
    job = hq.Estimator().run([(BELL, "XX"), (large, "Z" * 45)])
    with pytest.raises(hq.TooLarge, match=r"45 qubits needs .* this engine may use"):
        job.result()
    assert job.status() is JobStatus.ERROR


# -- input that is refused before anything is spent --------------------------------------------------------------------


def named(name: str) -> QuantumCircuit:
    circuit = QuantumCircuit(QuantumRegister(1), ClassicalRegister(1, name))
    circuit.measure(0, 0)
    return circuit


def reset() -> QuantumCircuit:
    circuit = QuantumCircuit(1)
    circuit.reset(0)
    return circuit


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # ours
    "precision that is no number": (lambda: hq.Estimator(default_precision="high"), hq.WorkflowError, "'high'"),  # type: ignore[arg-type]
    "negative default": (lambda: hq.Estimator(default_precision=-0.1), hq.WorkflowError, "0 or more"),
    "no finite default": (lambda: hq.Estimator(default_precision=float("nan")), hq.WorkflowError, "nan"),
    "no shots": (lambda: hq.Sampler(default_shots=0), hq.WorkflowError, "1 or more"),
    "half a shot": (lambda: hq.Sampler(default_shots=1.5), hq.WorkflowError, "1.5"),  # type: ignore[arg-type]
    "a generator": (lambda: hq.Estimator(seed=np.random.default_rng()), hq.WorkflowError, "seed is Generator"),  # type: ignore[arg-type]
    "a seed of text": (lambda: hq.Sampler(seed="7"), hq.WorkflowError, "'7'; it must be an integer"),  # type: ignore[arg-type]
    "infinite precision": (lambda: hq.Estimator().run([(BELL, "XX", None, np.inf)]), hq.WorkflowError, "precision is"),
    "too fine": (lambda: hq.Estimator().run([(BELL, "XX")], precision=1e-9), hq.WorkflowError, "shots"),
    "parameters that are NaN": (lambda: hq.Estimator().run([(CIRCUIT, TERMS, [0, np.nan, 0])]), hq.NotFinite, "nan"),
    "a reset": (lambda: hq.Estimator().run([(reset(), "Z")]), hq.WorkflowError, "gates alone"),
    "too many projectors": (
        lambda: hq.Estimator().run([(QuantumCircuit(17), "0" * 17)]), hq.WorkflowError, "17 projectors.*hq.Sampler",
    ),
    "no registers": (lambda: hq.Sampler().run([MEASURED, BELL]), hq.WorkflowError, r"PUB 1 has no.*measure_all\(\)"),
    "only loose bits": (
        lambda: hq.Sampler().run([QuantumCircuit([*BELL.qubits], [Clbit()])]), hq.WorkflowError, "1 classical bits are",
    ),
    "nothing measured": (lambda: hq.Sampler().run([QuantumCircuit(1, 1)]), hq.WorkflowError, "measures into none"),
    "a register named shape": (lambda: hq.Sampler().run([named("shape")]), hq.WorkflowError, "rename the register"),
    "a register named items": (lambda: hq.Sampler().run([named("items")]), hq.WorkflowError, "rename the register"),
    "no backend": (lambda: hq.Estimator(backend="nonsense").run([(BELL, "XX")]), hq.WorkflowError, "'nonsense'"),
    "no grouping": (
        lambda: hq.Estimator(grouping="all").run([(BELL, "XX")], precision=0.1), hq.WorkflowError, "'all' is not",
    ),
    # Qiskit's
    "a PUB alone": (lambda: hq.Estimator().run((BELL, "XX")), ValueError, "wrap it with"),
    "a circuit alone": (lambda: hq.Sampler().run(MEASURED), ValueError, "wrap it with"),
    "other qubits": (lambda: hq.Estimator().run([(BELL, "XXX")]), ValueError, "number of qubits"),
    "too few parameters": (lambda: hq.Estimator().run([(CIRCUIT, TERMS, [0.1, 0.2])]), ValueError, "inconsistent with"),
    "no parameters": (lambda: hq.Sampler().run([CIRCUIT.measure_all(inplace=False)]), ValueError, "number of values"),
    "shapes that do not broadcast": (
        lambda: hq.Estimator().run([(CIRCUIT, ["ZZ", "XX"], np.zeros((3, 3)))]), ValueError, "not broadcastable",
    ),
    "not Hermitian": (lambda: hq.Estimator().run([(BELL, SparsePauliOp("XX", 1j))]), ValueError, "Hermitian"),
    "a negative precision": (lambda: hq.Estimator().run([(BELL, "XX")], precision=-1), ValueError, "non-negative"),
    "shots below one": (lambda: hq.Sampler().run([MEASURED], shots=0), ValueError, "positive"),
    "shots of text": (lambda: hq.Sampler().run([MEASURED], shots="9"), TypeError, "integer"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_anything_is_spent(name: str, gate: Gate) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()
    assert gate.batches == []


def test_one_bad_pub_refuses_the_call_and_is_named(gate: Gate) -> None:
    with pytest.raises(hq.NotFinite) as caught:
        hq.Estimator(seed=1).run([(BELL, "XX"), (CIRCUIT, TERMS, [0, 0, np.inf])])
    assert caught.value.__notes__ == ["in estimator[0]/pub[1]"]
    assert gate.batches == []


# -- in runs -----------------------------------------------------------------------------------------------------------


def as_bytes(result: Any) -> list[Any]:
    """Everything in a primitive result, to the bit."""
    found: list[Any] = []
    for pub in result:
        found.append(dict(pub.metadata))
        for name, value in pub.data.items():
            array = value.array if isinstance(value, BitArray) else value
            found.append([name, str(array.dtype), list(array.shape), array.tobytes().hex()])
    return found


@hq.workflow
def mixed(rounds: int) -> list[Any]:
    """Exact and sampled values and samples, each point depending on the values before it."""
    estimator, sampler = hq.Estimator(default_precision=0.05), hq.Sampler(default_shots=50)
    theta, kept = np.array(THETA), []
    for _ in range(rounds):
        result = estimator.run([(CIRCUIT, TERMS, theta), (CIRCUIT, [TERMS, OTHER], theta, 0.0)]).result()
        samples = sampler.run([(CIRCUIT.measure_all(inplace=False), theta)]).result()
        theta = theta + 0.1 * result[0].data.evs + 0.01 * samples[0].data.meas.bitcount().mean()
        kept += [as_bytes(result), as_bytes(samples)]
    return kept


def test_a_finished_run_is_answered_from_its_record(store: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runner.ROUND_TRIP", "dispatch._WORTH_THE_TRIP"):  # on a machine that stalls nothing stays short
        monkeypatch.setattr(f"hybridq.{name}", 1e3)
    live = report(mixed, 2, store=store, name="mixed", seed=4)
    again = report(mixed, 2, store=store, name="mixed", seed=4)
    assert again.value == live.value
    assert (evaluations(live), evaluations(again)) == ((6, 0), (0, 6))
    records = [e for e in journal(live.directory) if e["k"] == "eval"]
    assert [e["at"] for e in records] == [
        "mixed/estimator[0]/pub[0]", "mixed/estimator[0]/pub[1]", "mixed/sampler[0]/pub[0]",
        "mixed/estimator[1]/pub[0]", "mixed/estimator[1]/pub[1]", "mixed/sampler[1]/pub[0]",
    ]  # fmt: skip
    assert {e["where"] for e in records} == {"driver"}  # short ones, one thread: no cluster was started for them
    assert gate.batches == []  # nothing went past the scheduler
    assert report(mixed, 2, store=store, name="other-seed", seed=5).value != live.value


def test_a_run_killed_anywhere_resumes_to_the_same_bits(store: Path, tmp_path: Path) -> None:
    whole = report(mixed, 2, store=store, name="mixed")
    lines = len(journal(whole.directory))
    done = 0
    for kept in range(2, lines):
        copy = tmp_path / str(kept)
        cut(whole.directory, kept, copy)
        found = report(mixed, 2, store=copy, name="mixed")
        assert found.value == whole.value
        assert sum(evaluations(found)) == 6
        assert evaluations(found)[1] >= done
        done = evaluations(found)[1]
    assert done == 6


def test_a_program_that_failed_halfway_goes_on_where_it_stood(store: Path) -> None:
    broken = True

    @hq.workflow
    def study() -> list[Any]:
        values = mixed(1)
        if broken:
            raise RuntimeError("the power went")
        return values + mixed(1)

    with pytest.raises(RuntimeError, match="the power went"):
        report(study, store=store, name="study")
    broken = False
    resumed = report(study, store=store, name="study")
    assert evaluations(resumed) == (3, 3)
    assert resumed.value == report(study, store=store, name="in-one-go").value


def test_values_in_a_run_are_those_outside(store: Path) -> None:
    @hq.workflow
    def study() -> Any:
        result = hq.Estimator().run([(CIRCUIT, [[TERMS], [OTHER]], np.outer([1, 2, 3], THETA))]).result()
        assert result.metadata == {"version": 2}
        return as_bytes(result)

    outside = hq.Estimator().run([(CIRCUIT, [[TERMS], [OTHER]], np.outer([1, 2, 3], THETA))]).result()
    assert report(study, store=store).value == as_bytes(outside)


def test_randomness_in_a_run_is_the_runs(store: Path) -> None:
    @hq.workflow
    def study(seed: int | None) -> Any:
        return noisy(hq.Estimator(seed=seed)), noisy(hq.Estimator(seed=seed))

    first, second = (report(study, seed, store=store, name=f"with-{seed}", seed=1).value for seed in (None, 9))
    assert first == second
    assert first[0] != first[1]


def test_another_program_than_the_recorded_one_stops_the_run(store: Path) -> None:
    theta = np.array(THETA)

    @hq.workflow
    def study() -> float:
        return noisy(hq.Estimator())

    report(study, store=store, name="study")
    THETA[0] += 0.5
    try:
        with pytest.raises(hq.Diverged, match=r"study/estimator\[0\]/pub\[0\]: the parameters differ"):
            report(study, store=store, name="study")
    finally:
        THETA[:] = theta


def test_pubs_worth_the_trip_run_beside_each_other_on_the_cluster(
    client: Client, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thetas = RNG.uniform(-3, 3, size=(300, 3))  # estimated at 30 ms
    # what a busy machine teaches would make the lone one worth the trip
    monkeypatch.setattr("hybridq.dispatch.Dispatcher._learn", lambda self, asked, outcome, speed=1.0: None)

    @hq.workflow
    def study() -> Any:
        job = hq.Estimator().run([(CIRCUIT, TERMS, thetas), (CIRCUIT, OTHER, thetas)])
        assert job.status() in (JobStatus.RUNNING, JobStatus.DONE)
        values = as_bytes(job.result())
        assert job.done()
        alone = hq.Estimator().run([(CIRCUIT, TERMS, thetas)]).result()
        assert as_bytes(alone) == values[:3]
        return values

    live = report(study, store=store, cluster=client)
    outside = hq.Estimator().run([(CIRCUIT, TERMS, thetas), (CIRCUIT, OTHER, thetas)]).result()
    assert live.value == as_bytes(outside)
    where = {e["at"]: e["where"] for e in journal(live.directory) if e["k"] == "eval"}
    assert where["study/estimator[1]/pub[0]"] == "driver"
    assert all(where[f"study/estimator[0]/pub[{i}]"] != "driver" for i in (0, 1))


def test_threads_of_the_run_each_have_their_own_calls(client: Client, store: Path) -> None:
    estimator = hq.Estimator(default_precision=0.1)

    @hq.workflow
    def point(x: float) -> float:
        return float(estimator.run([(CIRCUIT, TERMS, x * THETA)]).result()[0].data.evs)

    @hq.workflow
    def study() -> list[float]:
        return hq.map(point, [0.1, 0.2, 0.3])

    live = report(study, store=store, cluster=client)
    assert evaluations(live) == (3, 0)
    again = report(study, store=store, cluster=client)
    assert (evaluations(again), again.value) == ((0, 3), live.value)
    assert {e["at"] for e in journal(live.directory) if e["k"] == "eval"} == {
        f"study/point[{i}]/estimator[0]/pub[0]" for i in range(3)
    }


def test_calls_and_results_in_foreign_threads_are_refused(store: Path) -> None:
    @hq.workflow
    def study() -> list[str]:
        job = hq.Estimator().run([(BELL, "XX")])
        said: list[str] = []

        def foreign() -> None:
            for call in (lambda: hq.Estimator().run([(BELL, "XX")]), lambda: hq.Sampler().run([MEASURED]), job.result):
                try:
                    call()
                except hq.WorkflowError as error:
                    said.append(str(error))

        thread = threading.Thread(target=foreign, name="my-thread")
        thread.start()
        thread.join()
        assert job.result()[0].data.evs == pytest.approx(1.0)
        return said

    live = report(study, store=store)
    assert len(live.value) == 3
    assert all("'my-thread', which the run did not start" in text for text in live.value[:2])
    assert "asked for outside of the run" in live.value[2]
    assert evaluations(live) == (1, 0)


@hq.classical
def estimates() -> str:
    try:
        hq.Estimator().run([(BELL, "XX")])
    except hq.WorkflowError as error:
        return str(error)
    return "nothing"


def test_calls_in_steps_and_in_quantum_functions_are_refused(client: Client, store: Path) -> None:
    @hq.quantum
    def energy() -> Any:
        return hq.Estimator().run([(BELL, "XX")])

    @hq.workflow
    def study() -> str:
        with pytest.raises(hq.WorkflowError, match="inside the quantum function energy"):
            energy()
        return estimates()

    assert "called inside a classical step" in report(study, store=store, cluster=client).value


def test_a_job_in_a_run_is_not_cancelled_and_its_result_stays_in_the_run(store: Path) -> None:
    jobs: list[Any] = []

    @hq.workflow
    def study() -> str:
        jobs.extend([hq.Sampler().run([(MEASURED, None, 10)]), hq.Sampler().run([(MEASURED, None, 10)])])
        assert not jobs[0].cancel()
        jobs[0].result()
        return str(jobs[0].job_id())

    live = report(study, store=store)
    assert live.value == "study/sampler[0]"
    assert evaluations(live) == (2, 0)  # what nobody asked for is recorded as well
    assert jobs[0].result()[0].data.meas.num_shots == 10
    with pytest.raises(hq.WorkflowError, match="outside of the run that it belongs to"):
        jobs[1].result()


def test_a_failure_in_a_run_is_raised_by_result_and_can_be_survived(store: Path) -> None:
    large = QuantumCircuit(45)
    large.h(0)

    @hq.workflow
    def study() -> list[Any]:
        job = hq.Estimator().run([(large, "Z" * 45), (BELL, "XX"), (large, "X" * 45)])
        with pytest.raises(hq.TooLarge, match="Use fewer"):
            job.result()
        assert job.status() is JobStatus.ERROR
        return as_bytes(hq.Estimator().run([(BELL, "XX")]).result())

    live = report(study, store=store, name="study")
    again = report(study, store=store, name="study")
    assert (evaluations(live), evaluations(again)) == ((2, 0), (0, 2))
    assert again.value == live.value


def test_a_failure_nobody_asked_for_ends_the_run(store: Path) -> None:
    large = QuantumCircuit(45)
    large.h(0)

    @hq.workflow
    def study() -> None:
        hq.Estimator().run([(large, "Z" * 45)])

    with pytest.raises(hq.TooLarge):
        report(study, store=store)


def test_bad_input_in_a_run_names_its_place_and_spends_nothing(store: Path) -> None:
    @hq.workflow
    def study() -> None:
        hq.Estimator().run([(BELL, "XX"), (CIRCUIT, TERMS, [0, 0, np.inf])])

    with pytest.raises(hq.NotFinite) as caught:
        report(study, store=store, name="study")
    assert caught.value.__notes__ == ["in study/estimator[0]/pub[1]"]
    assert {e["k"] for e in journal(store / "study")} == {"run", "opened", "end"}


def test_ctrl_c_within_an_evaluation_leaves_at_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def evaluate(self, programs: Any, timeout: float | None = None, **_: Any) -> Any:
            raise KeyboardInterrupt

        def kill(self) -> None: ...

    monkeypatch.setattr("hybridq.dispatch.driver_engine", Interrupted)
    reached: list[str] = []

    @hq.workflow
    def study() -> None:
        job = hq.Estimator().run([(BELL, "XX")])
        reached.append("after run()")
        job.result()

    with pytest.raises(KeyboardInterrupt):
        report(study, store=store)
    assert reached == []


# -- programs written for Qiskit, as they are --------------------------------------------------------------------------

H2 = SparsePauliOp(
    ["II", "IZ", "ZI", "ZZ", "XX"],
    [-1.052373245772859, 0.39793742484318045, -0.39793742484318045, -0.01128010425623538, 0.18093119978423156],
)
"""Electronic energy of H2 at 0.735 angstrom in STO-3G, in hartree: the example of Qiskit's own tutorials."""


def vqe(estimator: Any, points: list[list[float]]) -> float:
    """Qiskit's tutorial of VQE, knowing nothing of runs."""
    from qiskit_algorithms import VQE
    from qiskit_algorithms.optimizers import SLSQP

    ansatz = n_local(2, "ry", "cz", reps=1)
    found = VQE(
        estimator, ansatz, SLSQP(maxiter=200, ftol=1e-13), initial_point=np.full(ansatz.num_parameters, 0.1),
        callback=lambda count, point, value, metadata: points.append([count, float(value)]),
    ).compute_minimum_eigenvalue(H2, aux_operators=[SparsePauliOp("ZZ"), SparsePauliOp("II", 2.0)])  # fmt: skip
    assert found.aux_operators_evaluated[1][0] == pytest.approx(2.0)
    return float(found.eigenvalue.real)


def test_vqe_of_qiskit_algorithms_becomes_resumable(store: Path, tmp_path: Path) -> None:
    @hq.workflow
    def study() -> Any:
        points: list[list[float]] = []
        return vqe(hq.Estimator(), points), points

    live = report(study, store=store, name="h2")
    assert live.value[0] == pytest.approx(np.linalg.eigvalsh(H2.to_matrix())[0], abs=1e-6)
    assert live.value[0] == pytest.approx(vqe(StatevectorEstimator(), []), abs=1e-6)
    executed = live.evaluations_executed
    assert executed > 20
    again = report(study, store=store, name="h2")
    assert (evaluations(again), again.value) == ((0, executed), live.value)
    lines = len(journal(live.directory))
    for part in (0.3, 0.7):
        copy = tmp_path / str(part)
        cut(live.directory, int(part * lines), copy)
        resumed = report(study, store=copy, name="h2")
        assert resumed.value == live.value
        assert sum(evaluations(resumed)) == executed
        assert 0 < resumed.evaluations_replayed < executed


BLUEPRINTS = "ignore:The class ``qiskit.circuit.library:DeprecationWarning"
"""Qiskit's warning of its own base classes, which the ansatz classes of other packages still build on."""


@pytest.mark.filterwarnings(BLUEPRINTS)
def test_vqe_of_qiskit_nature_finds_the_energy_of_h2(store: Path) -> None:
    """Driver, mapper, ansatz and solver are Qiskit Nature's; the oracle is PySCF's full configuration interaction."""
    from pyscf import fci, gto, scf
    from qiskit_algorithms import VQE
    from qiskit_algorithms.optimizers import SLSQP
    from qiskit_nature.second_q.algorithms import GroundStateEigensolver
    from qiskit_nature.second_q.circuit.library import UCCSD, HartreeFock
    from qiskit_nature.second_q.drivers import PySCFDriver
    from qiskit_nature.second_q.mappers import JordanWignerMapper

    def ground(estimator: Any) -> float:
        problem = PySCFDriver(atom="H 0 0 0; H 0 0 0.735", basis="sto3g").run()
        mapper = JordanWignerMapper()
        start = HartreeFock(problem.num_spatial_orbitals, problem.num_particles, mapper)
        ansatz = UCCSD(problem.num_spatial_orbitals, problem.num_particles, mapper, initial_state=start)
        solver = VQE(estimator, ansatz, SLSQP(ftol=1e-12), initial_point=np.zeros(ansatz.num_parameters))
        return float(GroundStateEigensolver(mapper, solver).solve(problem).total_energies[0])

    @hq.workflow
    def study() -> float:
        return ground(hq.Estimator())

    live = report(study, store=store, name="nature")
    molecule = scf.RHF(gto.M(atom="H 0 0 0; H 0 0 0.735", basis="sto-3g", verbose=0)).run()
    assert live.value == pytest.approx(fci.FCI(molecule).kernel()[0], abs=1e-7)
    again = report(study, store=store, name="nature")
    assert (again.value, again.evaluations_executed) == (live.value, 0)


def qaoa() -> str:
    """The cut of a chain of three by Qiskit's QAOA, which calls the sampler in a thread of its own."""
    from qiskit_algorithms import QAOA
    from qiskit_algorithms.optimizers import COBYLA

    cost = SparsePauliOp(["IZZ", "ZZI"], [1.0, 1.0])
    found = QAOA(hq.Sampler(seed=1), COBYLA(maxiter=10), initial_point=[0.5, 0.5]).compute_minimum_eigenvalue(cost)
    return str(found.best_measurement["bitstring"])


@pytest.mark.filterwarnings(BLUEPRINTS)
def test_an_algorithm_with_threads_of_its_own_works_outside_of_runs_and_is_refused_inside(store: Path) -> None:
    assert qaoa() in ("010", "101")
    with pytest.raises(hq.WorkflowError, match=r"Sampler\.run was called in the thread 'ThreadPoolExecutor") as caught:
        report(hq.workflow(qaoa), store=store)
    assert "finite differences" in caught.value.__notes__[0]


def test_sample_based_diagonalization_of_qiskit_addon_sqd(store: Path) -> None:
    """From counts of the sampler to the energy of H2: all its configurations are drawn, so it is exact."""
    sqd = pytest.importorskip("qiskit_addon_sqd.fermion")
    from pyscf import ao2mo, fci, gto, scf

    molecule = gto.M(atom="H 0 0 0; H 0 0 0.735", basis="sto-3g", verbose=0)
    field = scf.RHF(molecule).run()
    one = field.mo_coeff.T @ field.get_hcore() @ field.mo_coeff
    two = ao2mo.restore(1, ao2mo.kernel(molecule, field.mo_coeff), 2)
    circuit = QuantumCircuit(4)  # orbitals of spin up, then down; close to the ground state, and noisy
    circuit.ry(0.3, 0)
    circuit.x([0, 2])
    circuit.cx(0, 1)
    circuit.x(1)
    circuit.h(2)
    circuit.cx(2, 3)
    circuit.x(3)
    circuit.measure_all()

    @hq.workflow
    def study() -> float:
        samples = hq.Sampler(default_shots=2000).run([circuit]).result()[0].data.meas
        found = sqd.diagonalize_fermionic_hamiltonian(
            one, two, samples, samples_per_batch=50, norb=2, nelec=(1, 1), num_batches=1, seed=1
        )
        return float(found.energy) + float(molecule.energy_nuc())

    live = report(study, store=store, name="sqd")
    assert live.value == pytest.approx(fci.FCI(field).kernel()[0], abs=1e-8)
    assert report(study, store=store, name="sqd").evaluations_executed == 0
