"""From what a researcher asks to what an engine evaluates: checked once, seeded by name, planned without measuring."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
from typing import Any, cast

import dense
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_array_equal
from qiskit import ClassicalRegister, QuantumCircuit
from qiskit.circuit import Gate, Parameter, ParameterVector
from qiskit.primitives import BitArray
from qiskit.primitives.containers.estimator_pub import EstimatorPub
from qiskit.quantum_info import Kraus, Pauli, SparsePauliOp, SuperOp
from qiskit_aer.noise import amplitude_damping_error
from qiskit_ibm_runtime.fake_provider import FakeManilaV2

from hybridq.backends import Aer, Backend, Noise
from hybridq.engines.wire import pack
from hybridq.errors import NotFinite, WorkflowError
from hybridq.location import Location, seed_key
from hybridq.program import (
    MAX_SHOTS,
    Estimate,
    Outcome,
    Program,
    Request,
    derivatives,
    moved,
    numeric_plan,
    physical,
    program,
    result,
    single,
)
from hybridq.sites import Site

AT = Location("run/energy[0]")
A, B = Parameter("a"), Parameter("b")


def two() -> QuantumCircuit:
    """Two qubits, two parameters, in the order a, b."""
    circuit = QuantumCircuit(2)
    circuit.ry(B, 0)
    circuit.rx(A, 1)
    circuit.cx(0, 1)
    return circuit


def free(qubits: int = 2) -> QuantumCircuit:
    """No parameters."""
    circuit = QuantumCircuit(qubits)
    circuit.h(range(qubits))
    return circuit


def wide(parameters: int) -> QuantumCircuit:
    circuit = QuantumCircuit(1)
    for parameter in ParameterVector("t", parameters):
        circuit.rx(parameter, 0)
    return circuit


def measured(qubits: int = 2) -> QuantumCircuit:
    circuit = free(qubits)
    circuit.measure_all()
    return circuit


def midway() -> QuantumCircuit:
    circuit = QuantumCircuit(1, 2)
    circuit.h(0)
    circuit.measure(0, 0)
    circuit.h(0)
    circuit.measure(0, 1)
    return circuit


def ask(
    circuit: Any, observables: Any = "ZZ", theta: Any = (), *, seed: int = 7, at: Location = AT, **options: Any
) -> Program:
    return program(Request(circuit, observables, theta, **options), seed=seed, location=at)


def outcome(p: Program, values: Any, stderrs: Any = 0.0, bits: Any = None) -> Outcome:
    values = np.asarray(values, dtype=float)
    return Outcome(values, np.broadcast_to(np.asarray(stderrs, dtype=float), values.shape), bits, 0.1, 0)


# -- what is refused -----------------------------------------------------------------------------------------------


def _phased() -> QuantumCircuit:
    circuit = QuantumCircuit(2, 2)
    circuit.h(0)
    return circuit


def _if() -> QuantumCircuit:
    circuit = QuantumCircuit(2, 1)
    with circuit.if_test((0, True)):
        circuit.x(0)
    return circuit


Z = SparsePauliOp("ZZ")
THETA = [0.1, 0.2]
BAD: dict[str, tuple[Request, str]] = {
    "no circuit": (Request("circuit", Z, THETA), "the circuit is a str; give a qiskit.QuantumCircuit"),
    "circuit is None": (Request(None, Z, THETA), "the circuit is None"),
    "too few parameters": (Request(two(), Z, [0.1]), r"has 2 parameters \(a, b\), but values of shape \(1,\)"),
    "too many parameters": (Request(two(), Z, [0.1] * 3), r"values of shape \(3,\)"),
    "no parameters given": (Request(two(), Z, None), r"has 2 parameters \(a, b\), but values of shape \(0,\)"),
    "a number for two": (Request(two(), Z, 0.5), r"values of shape \(\)"),
    "parameters for none": (Request(free(), Z, [0.5]), r"has 0 parameters \(none\)"),
    "many parameters": (Request(wide(6), "Z", [0.5]), r"\(t\[0\], t\[1\], t\[2\], t\[3\], \.\.\.\)"),
    "last axis": (Request(two(), Z, np.zeros((2, 3))), r"the last axis must hold one value for each"),
    "complex parameters": (Request(two(), Z, [1j, 0]), "dtype complex128; they must be real numbers"),
    "text for parameters": (Request(two(), Z, ["a", "b"]), "they must be real numbers"),
    "objects for parameters": (Request(two(), Z, [None, 1]), "dtype object"),
    "ragged parameters": (Request(two(), Z, [[1, 2], [3]]), "do not form an array"),
    "unknown name": (Request(two(), Z, {"c": 1}), "'c' is not a parameter of the circuit; its parameters are a, b"),
    "foreign parameter": (Request(two(), Z, {Parameter("a"): 1, B: 2}), "'a' is not a parameter of the circuit"),
    "missing name": (Request(two(), Z, {"a": 1}), "no value was given for b"),
    "name for none": (Request(free(), Z, {"a": 1}), "its parameters are none"),
    "names that do not broadcast": (Request(two(), Z, {"a": [1, 2], "b": [1, 2, 3]}), "do not broadcast"),
    "text by name": (Request(two(), Z, {"a": "x", "b": 1}), "they must be real numbers"),
    "no observable": (Request(two(), [], THETA), "no observable was given"),
    "nested emptiness": (Request(two(), [[], []], THETA), "no observable was given"),
    "number for an observable": (Request(two(), 5, THETA), "the observable is a int; give a SparsePauliOp"),
    "numbers for observables": (Request(two(), [1.0, 2.0], THETA), "the observable is a float"),
    "array of numbers": (Request(two(), np.eye(4), THETA), "the observable is a float"),
    "single-element array": (Request(two(), np.array(5), THETA), "the observable is a int"),
    "set of labels": (Request(two(), {"ZZ"}, THETA), "the observable is a set"),
    "bad label": (Request(two(), "ZQ", THETA), "'ZQ' is not an observable"),
    "empty dict": (Request(two(), {}, THETA), "is not an observable"),
    "unequal labels": (Request(two(), {"ZZ": 1, "Z": 1}, THETA), "is not an observable"),
    "ragged observables": (
        Request(two(), [["ZZ"], ["ZZ", "XX"]], THETA),
        r"a ragged array with rows of shapes \[\(1,\), \(2,\)\]",
    ),
    "observable beside a row": (Request(two(), ["ZZ", ["XX"]], THETA), "ragged"),
    "too few qubits": (Request(two(), "Z", THETA), "acts on 1 qubits, the circuit has 2"),
    "second observable": (Request(two(), ["ZZ", "ZZZ"], THETA), "acts on 3 qubits"),
    "not Hermitian": (
        Request(two(), SparsePauliOp(["ZZ", "XY"], [1, 2j]), THETA),
        "not Hermitian: the coefficient of XY",
    ),
    "phase of a Pauli": (Request(two(), Pauli("iZZ"), THETA), "not Hermitian"),
    "coefficient that is NaN": (
        Request(two(), {"ZZ": 1.0, "XX": math.nan}, THETA),
        "coefficient 1 of the observable is not finite",
    ),
    "unbound coefficient": (Request(two(), SparsePauliOp("ZZ", np.array([A])), THETA), "unbound parameters"),
    "shapes": (
        Request(two(), ["ZZ"] * 3, np.zeros((2, 2))),
        r"batch shape \(2,\) and observables of shape \(3,\) do not broadcast",
    ),
    "measured midway": (Request(midway(), "Z", ()), "measures, resets or branches before its end"),
    "branch": (Request(_if(), Z, ()), "measures, resets or branches"),
    "shots and precision": (Request(two(), Z, THETA, shots=10, precision=0.1), "both shots and precision"),
    "no shots at all": (Request(two(), Z, THETA, shots=0), rf"shots is 0; it must be an integer from 1 to {MAX_SHOTS}"),
    "negative shots": (Request(two(), Z, THETA, shots=-5), "shots is -5"),
    "half a shot": (Request(two(), Z, THETA, shots=cast(int, 0.5)), "shots is 0.5"),
    "shots as a float": (Request(two(), Z, THETA, shots=cast(int, 100.0)), "shots is 100.0"),
    "shots as a boolean": (Request(two(), Z, THETA, shots=True), "shots is True"),
    "too many shots": (Request(two(), Z, THETA, shots=MAX_SHOTS + 1), f"shots is {MAX_SHOTS + 1}"),
    "precision of nothing": (Request(two(), Z, THETA, precision=0), "precision is 0; it must be a positive number"),
    "precision that is NaN": (Request(two(), Z, THETA, precision=math.nan), "precision is nan"),
    "infinite precision": (Request(two(), Z, THETA, precision=math.inf), "precision is inf"),
    "precision as text": (Request(two(), Z, THETA, precision=cast(float, "high")), "precision is 'high'"),
    "precision as a boolean": (Request(two(), Z, THETA, precision=True), "precision is True"),
    "precision too fine": (Request(two(), Z, THETA, precision=1e-9), r"would take 1e\+18 shots"),
    "precision beyond floats": (Request(two(), Z, THETA, precision=1e-300), "shots; at most"),
    "precision of samples": (Request(measured(), None, (), precision=0.1), "precision has no meaning for samples"),
    "samples without shots": (Request(measured(), None, ()), "samples need a number of shots"),
    "nothing to sample": (Request(QuantumCircuit(), None, (), shots=1), "the circuit has no qubits"),
    "bits never written": (Request(_phased(), None, (), shots=1), "has 2 classical bits but measures into none"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_written_wrongly_is_refused_before_it_costs(name: str) -> None:
    request, words = BAD[name]
    with pytest.raises(WorkflowError, match=words):
        program(request, seed=7, location=AT)


@pytest.mark.parametrize("value", [None, 3.0, "expval", two(), Z])
def test_a_quantum_function_returns_a_description(value: Any) -> None:
    with pytest.raises(WorkflowError, match=r"it must return hq\.expval\(\.\.\.\) or hq\.sample"):
        program(value, seed=7, location=AT)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_parameters_are_finite(bad: float) -> None:
    with pytest.raises(NotFinite, match=rf"parameter 1 \(b\) is {bad}; it must be finite"):
        ask(two(), theta=[[0.0, 1.0], [0.0, bad]])


# -- what is understood --------------------------------------------------------------------------------------------

SAME_OBSERVABLE = [
    SparsePauliOp("ZX"), Pauli("ZX"), "ZX", {"ZX": 1.0}, [("ZX", 1.0)], (("ZX", 1.0),), np.str_("ZX"), np.array("ZX"),
    {"ZX": 1}, [("ZX", np.float64(1.0))],
]  # fmt: skip


@pytest.mark.parametrize("observable", SAME_OBSERVABLE)
def test_one_observable_is_written_in_many_ways(observable: Any) -> None:
    p = ask(two(), observable, THETA)
    assert p.observables_shape == ()
    assert p.template.observables == (SparsePauliOp("ZX"),)
    assert p.template.digest == ask(two(), "ZX", THETA).template.digest


@pytest.mark.parametrize(
    ("observables", "shape"),
    [
        (["ZZ"], (1,)),
        (["ZZ", "XX"], (2,)),
        (("ZZ", Pauli("XX"), SparsePauliOp("YY")), (3,)),
        ([["ZZ"], ["XX"]], (2, 1)),
        (np.array(["ZZ", "XX"]), (2,)),
        (np.array([["ZZ"], ["XX"]], dtype=object), (2, 1)),
        ([{"ZZ": 2.0}, [("XX", 1.0)]], (2,)),
        ([[[("ZZ", 1.0)]]], (1, 1)),
    ],
)
def test_observables_keep_their_shape(observables: Any, shape: tuple[int, ...]) -> None:
    p = ask(two(), observables, THETA)
    assert p.observables_shape == shape
    assert len(p.template.observables) == math.prod(shape)


@pytest.mark.parametrize(
    ("theta", "expected"),
    [
        ([1, 2], [[1.0, 2.0]]), ((True, False), [[1.0, 0.0]]), (np.array([1, 2], dtype=np.float32), [[1.0, 2.0]]),
        ({"a": 1, "b": 2}, [[1.0, 2.0]]), ({B: 2, A: 1}, [[1.0, 2.0]]), ({"b": [2, 3], A: 1}, [[1.0, 2.0], [1.0, 3.0]]),
        ({"a": [[1], [4]], "b": [2, 3]}, [[1, 2], [1, 3], [4, 2], [4, 3]]), (np.zeros((0, 2)), np.zeros((0, 2))),
        (Estimate(np.array([1.0, 2.0])), [[1.0, 2.0]]),
    ],
)  # fmt: skip
def test_parameters_are_written_in_many_ways(theta: Any, expected: Any) -> None:
    p = ask(two(), theta=theta)
    assert_array_equal(p.theta, expected)
    assert p.theta.dtype == np.float64
    assert p.rows == len(expected)


@pytest.mark.parametrize("theta", [0.5, [0.5], np.float64(0.5), {"t[0]": 0.5}])
def test_one_parameter_may_be_a_number(theta: Any) -> None:
    p = ask(wide(1), "Z", theta)
    assert_array_equal(p.theta, [[0.5]])
    assert p.batch_shape == ()


@pytest.mark.parametrize("theta", [(), None, [], {}, np.zeros(0)])
def test_no_parameters(theta: Any) -> None:
    p = ask(free(), theta=theta)
    assert p.theta.shape == (1, 0)
    assert p.batch_shape == ()


def test_a_vectors_elements_keep_their_numbers() -> None:
    p = ask(wide(12), "Z", {f"t[{i}]": float(i) for i in range(12)})
    assert_array_equal(p.theta, [np.arange(12.0)])


def test_parameters_are_copied() -> None:
    theta = np.array([1.0, 2.0])
    p = ask(two(), theta=theta)
    theta[:] = 9
    assert_array_equal(p.theta, [[1.0, 2.0]])


SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)


@given(SHAPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=3))
def test_shapes_broadcast_as_in_qiskit(batch: tuple[int, ...], observables: tuple[int, ...]) -> None:
    circuit, labels = two(), np.full(observables, "ZZ", dtype=object)
    theta = np.zeros((*batch, 2))
    try:
        expected = EstimatorPub.coerce((circuit, labels.tolist(), theta)).shape
    except ValueError:
        event("refused")
        with pytest.raises(WorkflowError, match="do not broadcast"):
            ask(circuit, labels, theta)
        return
    p = ask(circuit, labels, theta)
    event(f"shape of {len(expected)} axes")
    columns = math.prod(observables)
    values = np.arange(p.rows * columns, dtype=float).reshape(p.rows, columns)
    found = np.asarray(result(p, outcome(p, values)))
    assert found.shape == expected
    rows = np.arange(p.rows).reshape(batch)
    which = np.arange(columns).reshape(observables)
    for index in np.ndindex(expected):  # each value stands where its parameters and observable meet
        row = int(np.broadcast_to(rows, expected)[index])
        column = int(np.broadcast_to(which, expected)[index])
        assert found[index] == values[row, column]


def test_final_measurements_do_not_disturb_an_expectation_value() -> None:
    plain, with_end = ask(free(), theta=()), ask(measured(), theta=())
    assert plain.template.digest == with_end.template.digest
    assert with_end.template.circuit.num_clbits == 0


@pytest.mark.parametrize(
    ("circuit", "expected"),
    [(free(), False), (measured(), False), (midway(), True), (_if(), True)],
    ids=["gates", "measured", "midway", "branch"],
)
def test_circuits_that_only_whole_executions_can_sample(circuit: QuantumCircuit, expected: bool) -> None:
    p = ask(circuit, None, (), shots=10)
    assert p.template.sampled_in_place is expected
    assert p.plan.sampling == ("simulator" if expected else "probabilities")


def test_reset_initialize_and_measuring_again_happen_in_place() -> None:
    for build in (
        lambda c: c.reset(0),
        lambda c: c.initialize([1, 0], 0),
        lambda c: (c.measure(0, 0), c.measure(0, 0)),
        lambda c: (c.measure(0, 0), c.barrier(), c.x(0)),
    ):
        circuit = QuantumCircuit(1, 1)
        build(circuit)
        circuit.measure(0, 0)
        assert ask(circuit, None, (), shots=1).template.sampled_in_place
    circuit = QuantumCircuit(2, 2)
    circuit.measure(0, 0)
    circuit.barrier()
    circuit.x(1)
    circuit.measure(1, 1)
    assert not ask(circuit, None, (), shots=1).template.sampled_in_place


# -- shots ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from(["II", "ZZ", "XI", "YY"]), st.floats(-10, 10)), min_size=1, max_size=4),
    st.floats(1e-3, 10),
)
def test_precision_asks_for_the_shots_of_the_worst_state(terms: list[tuple[str, float]], precision: float) -> None:
    p = ask(free(), [[("ZZ", 0.5)], terms], precision=precision)
    weight = max(0.5, sum(abs(c) for label, c in terms if label != "II"))
    assert p.shots is not None
    assert p.shots >= 1
    assert weight / math.sqrt(p.shots) <= precision * (1 + 1e-9)  # enough
    assert p.shots == 1 or weight / math.sqrt(p.shots - 1) > precision * (1 - 1e-9)  # and not one more


@pytest.mark.parametrize(
    ("observable", "precision", "shots"),
    [
        ("ZZ", 0.1, 100),
        ({"ZZ": 3, "XX": -4}, 0.7, 100),
        ({"II": 50, "ZZ": 1}, 0.5, 4),
        ("II", 0.1, 1),
        ("ZZ", np.float64(0.01), 10000),
    ],
)
def test_precision_by_hand(observable: Any, precision: float, shots: int) -> None:
    assert ask(free(), observable, precision=precision).shots == shots


@pytest.mark.parametrize("shots", [1, 1000, MAX_SHOTS, np.int64(5)])
def test_shots_are_kept(shots: Any) -> None:
    found = ask(free(), shots=shots).shots
    assert found == shots
    assert type(found) is int


# -- seeds, plan ---------------------------------------------------------------------------------------------------


def test_seeds_belong_to_seed_location_and_row_alone() -> None:
    rows = np.arange(12.0).reshape(3, 2, 2)
    p = ask(two(), theta=rows, shots=10)
    expected = np.array([seed_key(7, AT, row) for row in range(6)], dtype=np.uint64)
    assert_array_equal(p.seeds, expected)
    assert p.seeds.dtype == np.uint64
    assert_array_equal(ask(two(), "XX", theta=rows[:1], shots=99).seeds, expected[:2])
    assert_array_equal(ask(measured(), None, (), shots=10).seeds, expected[:1])
    assert (ask(two(), theta=rows, shots=10, seed=8).seeds != expected).all()
    assert (ask(two(), theta=rows, shots=10, at=AT.child("x", 0)).seeds != expected).all()
    assert not ask(two(), theta=rows).seeds.any()  # an exact value needs none
    assert ask(midway(), None, (), shots=1).seeds.any()


def test_the_plan_is_a_pure_function_of_the_program() -> None:
    for p in (ask(two(), theta=THETA), ask(two(), theta=THETA, shots=5), ask(midway(), None, (), shots=5)):
        assert p.plan == numeric_plan(p.template, p.shots)
        assert p.plan == numeric_plan(dataclasses.replace(p.template, cache={"x": 1}), p.shots)
        assert p.plan.threads == 1
        assert p.plan.reason
        assert dict(p.plan.versions).keys() >= {"numpy", "qiskit", "qiskit-aer"}
    exact, sampled, counts = (
        ask(two(), theta=THETA),
        ask(two(), theta=THETA, shots=5),
        ask(measured(), None, (), shots=5),
    )
    assert [(p.plan.sampling, p.plan.grouping) for p in (exact, sampled, counts)] == [
        ("exact", "none"), ("probabilities", "qubit-wise"), ("probabilities", "none"),
    ]  # fmt: skip
    other = ask(two(), ["XX", "YY"], theta=np.zeros((5, 1, 2)), shots=500, seed=9, at=Location("elsewhere"))
    assert other.plan == sampled.plan


# -- backends ------------------------------------------------------------------------------------------------------

NOISE = Noise.depolarizing(0.01)


def channelled() -> QuantumCircuit:
    circuit = QuantumCircuit(2)
    circuit.append(Kraus(SuperOp(amplitude_damping_error(0.1))).to_instruction(), [0])
    return circuit


def _on(circuit: QuantumCircuit, backend: Any, shots: int | None = None, **options: Any) -> Program:
    observable = options.pop("observable", "Z" * circuit.num_qubits)
    return ask(circuit, observable, np.zeros(circuit.num_parameters), backend=backend, shots=shots, **options)


@pytest.mark.parametrize(
    ("circuit", "backend", "shots", "observable", "expected"),
    [
        (free(), None, None, "ZZ", ("aer", "statevector", "exact", "none", "noiseless")),
        (free(), "aer", 5, "ZZ", ("aer", "statevector", "probabilities", "qubit-wise", "noiseless")),
        (free(), "statevector", None, "ZZ", ("aer", "statevector", "exact", "none", "method statevector was asked")),
        (free(), "density_matrix", 5, None, ("aer", "density_matrix", "probabilities", "none", "density_matrix was")),
        (free(), Aer(noise=NOISE), None, "ZZ", ("aer", "density_matrix", "exact", "none", "noise on 2 qubits")),
        (free(), Aer(noise=NOISE), 5, "ZZ", ("aer", "density_matrix", "probabilities", "qubit-wise", "noise on 2")),
        (free(13), Aer(noise=NOISE), 5, "Z" * 13,
         ("aer", "statevector", "simulator", "qubit-wise", "noise on 13 qubits: one random trajectory a shot")),
        (free(13), Aer(noise=NOISE), None, "Z" * 13, ("aer", "density_matrix", "exact", "none", "noise on 13")),
        (free(), Aer("statevector", NOISE), 5, "ZZ", ("aer", "statevector", "simulator", "qubit-wise", "own shots")),
        (channelled(), None, None, "ZZ", ("aer", "density_matrix", "exact", "none", "noise on 2 qubits")),
        (free(), "stabilizer", None, "ZZ", ("aer", "stabilizer", "exact", "none", "stabilizer was asked")),
        (free(), "stabilizer", 5, "ZZ", ("aer", "stabilizer", "simulator", "qubit-wise", "one seed a row and group")),
        (free(16), "matrix_product_state", 5, None,
         ("aer", "matrix_product_state", "probabilities", "none", "exact probabilities")),
        (free(17), "matrix_product_state", 5, None, ("aer", "matrix_product_state", "simulator", "none", "own shots")),
        (midway(), "density_matrix", 5, None, ("aer", "density_matrix", "simulator", "none", "whole executions")),
        (free(), "adjoint", None, "ZZ", ("adjoint", "statevector", "exact", "none", "asked for by name")),
    ],
)  # fmt: skip
def test_plans_by_backend(circuit: Any, backend: Any, shots: Any, observable: Any, expected: Any) -> None:
    p = _on(circuit, backend, shots, observable=observable)
    assert (p.plan.engine, p.plan.method, p.plan.sampling, p.plan.grouping) == expected[:4]
    assert expected[4] in p.plan.reason
    if observable is not None and shots is not None:
        wider = _on(circuit, backend, shots, observable=observable, grouping="commuting")
        assert wider.plan == dataclasses.replace(p.plan, grouping="commuting")


@pytest.mark.parametrize(
    ("qubits", "backend", "shots", "threads"),
    [
        (23, None, None, 1), (24, None, None, 0), (24, None, 100, 0), (25, "statevector", None, 0),
        (11, "density_matrix", None, 1), (12, "density_matrix", None, 0), (12, Aer(noise=NOISE), 100, 0),
        (24, Aer(noise=NOISE), 100, 1), (30, "matrix_product_state", None, 1), (30, "stabilizer", None, 1),
        (24, "adjoint", None, 1),
    ],
)  # fmt: skip
def test_wide_programs_take_all_threads(qubits: int, backend: Any, shots: Any, threads: int) -> None:
    plan = _on(free(qubits), backend, shots).plan
    assert plan.threads == threads
    assert ("its last bits not reproducible" in plan.reason) == (threads == 0)


def _derived(p: Request, gradient: str) -> Program:
    return program(p, seed=7, location=AT, gradient=gradient)


FALLS_BACK: dict[str, tuple[Request, str]] = {
    "noise": (Request(two(), "ZZ", THETA, backend=Aer(noise=NOISE)), "there is noise"),
    "channels": (Request(channelled(), "ZZ", ()), "the circuit has instructions that are not unitary"),
    "method": (Request(two(), "ZZ", THETA, backend="matrix_product_state"), "the method is matrix_product_state"),
    "shots": (Request(two(), "ZZ", THETA, shots=10), "the values are sampled"),
    "precision": (Request(two(), "ZZ", THETA, precision=0.1), "the values are sampled"),
}


@pytest.mark.parametrize(("request_", "words"), FALLS_BACK.values(), ids=FALLS_BACK.keys())
def test_gradients_fall_back_with_the_reason_recorded(request_: Request, words: str) -> None:
    plan = _derived(request_, "auto").plan
    assert (plan.engine, plan.gradient) == ("aer", "parameter-shift")
    assert plan.reason.endswith(f"; parameter-shift: {words}")
    plain = program(request_, seed=7, location=AT).plan
    assert dataclasses.replace(plan, gradient="none", reason=plain.reason) == plain
    with pytest.raises(WorkflowError, match=f"the adjoint gradient was asked for, but {words}; use jac='parameter-sh"):
        _derived(request_, "adjoint")
    assert _derived(request_, "parameter-shift").plan == plan  # as a loop asks for what "auto" came to
    assert _derived(request_, "spsa").plan.reason == f"{plain.reason}; spsa: asked for by name"


def test_gradients_of_exact_values_are_the_adjoints() -> None:
    for way in ("auto", "adjoint"):
        for backend in (None, "aer", "statevector", "adjoint"):
            plan = _derived(Request(two(), "ZZ", THETA, backend=backend), way).plan
            assert (plan.engine, plan.gradient, plan.sampling) == ("adjoint", "adjoint", "exact")
    shifted = _derived(Request(two(), "ZZ", THETA), "parameter-shift")
    assert shifted.plan.reason.endswith("; parameter-shift: asked for by name")
    assert not shifted.seeds.any()
    assert _derived(Request(two(), "ZZ", THETA), "spsa").seeds.any()  # for its direction


def resetting(inside: bool = False) -> QuantumCircuit:
    circuit = QuantumCircuit(1)
    circuit.h(0)
    circuit.reset(0)
    outside = QuantumCircuit(1)
    outside.append(circuit.to_instruction(), [0])
    return outside if inside else circuit


BAD_BACKENDS: dict[str, tuple[Request, str, str]] = {
    "exact with noise and a state vector": (
        Request(two(), "ZZ", THETA, backend=Aer("statevector", NOISE)), "none",
        "exact value with noise needs the density matrix, and method 'statevector' was asked for; give shots"),
    "exact channels and a product state": (
        Request(channelled(), "ZZ", (), backend="matrix_product_state"), "none", "needs the density matrix"),
    "channels and a stabilizer": (
        Request(channelled(), "ZZ", (), shots=5, backend="stabilizer"), "none", "'stabilizer' cannot have noise"),
    "adjoint of shots": (Request(two(), "ZZ", THETA, shots=5, backend="adjoint"), "none", "but the values are sampled"),
    "adjoint of samples": (Request(two(), None, THETA, shots=5, backend="adjoint"), "none", "adjoint engine was asked"),
    "adjoint of channels": (Request(channelled(), "ZZ", (), backend="adjoint"), "none", "that are not unitary"),
    "unknown name": (Request(two(), "ZZ", THETA, backend="fast"), "none", "'fast' is not a method of Aer"),
    "unknown grouping": (
        Request(two(), "ZZ", THETA, grouping="all"), "none", "'all' is not a way to group Paulis; give one of qubit-"),
    "unknown gradient": (Request(two(), "ZZ", THETA), "finite", "'finite' is not a way to gradients; give one of auto"),
    "gradient of samples": (Request(two(), None, THETA, shots=5), "auto", "samples have no gradient; describe"),
    "spsa of a stabilizer": (
        Request(two(), "ZZ", [0, 0], backend="stabilizer"), "spsa", "takes multiples of pi/2 alone"),
    "measured midway with noise": (
        Request(midway(), "Z", (), backend=Aer(noise=NOISE)), "none", "measures, resets or branches before its end"),
    "reset with a density matrix": (
        Request(resetting(), "Z", (), backend="density_matrix"), "none", "measures, resets or branches before its end"),
    "reset inside with the adjoint": (
        Request(resetting(inside=True), "Z", (), backend="adjoint"), "none", "measures, resets or branches"),
    "branch with a product state": (
        Request(_if(), "ZZ", (), backend="matrix_product_state"), "none", "measures, resets or branches"),
    "not Hermitian with noise": (
        Request(two(), {"XY": 2j}, THETA, backend=Aer(noise=NOISE)), "none", "not Hermitian: the coefficient of XY"),
    "negative precision": (Request(two(), "ZZ", THETA, precision=-0.1), "none", r"precision is -0\.1; it must"),
}  # fmt: skip


@pytest.mark.parametrize(("request_", "gradient", "words"), BAD_BACKENDS.values(), ids=BAD_BACKENDS.keys())
def test_what_a_backend_cannot_do_is_refused_before_it_costs(request_: Request, gradient: str, words: str) -> None:
    with pytest.raises(WorkflowError, match=words):
        _derived(request_, gradient)


def test_a_backend_is_part_of_what_is_evaluated() -> None:
    backends = [None, "statevector", "density_matrix", "adjoint", Aer(noise=NOISE),
                Aer(noise=Noise.depolarizing(0.02)), Aer(noise=FakeManilaV2())]  # type: ignore[arg-type]  # fmt: skip
    digests = [_on(two(), backend).template.digest for backend in backends]
    assert len(set(digests)) == len(digests)
    assert _on(two(), "aer").template.digest == digests[0]
    # a request's own goes before the run's
    request = Request(two(), "ZZ", THETA, backend="density_matrix")
    site = Site(backend="adjoint")
    assert program(request, seed=7, location=AT, site=site).plan.method == "density_matrix"
    assert program(Request(two(), "ZZ", THETA), seed=7, location=AT, site=site).plan.engine == "adjoint"


def test_physical_templates_know_the_columns_that_are_left() -> None:
    """A parameter that only turns the phase of all is gone after a translation; the others keep their columns."""
    circuit = QuantumCircuit(2, global_phase=Parameter("b"))
    circuit.rx(Parameter("a"), 0)
    circuit.ry(Parameter("c"), 1)
    template = ask(circuit, "ZX", [0.1, 0.2, 0.3], backend=Aer(noise=FakeManilaV2())).template  # type: ignore[arg-type]
    found = physical(template)
    assert physical(template) is found
    assert {parameter.name: column for parameter, column in found.positions.items()} == {"a": 0, "c": 2}
    assert (found.num_parameters, found.columns) == (3, (0, 2))
    assert found.has_channels
    assert len(found.readout) == found.num_qubits
    assert template.columns is None
    plain = ask(circuit, "ZX", [0.1, 0.2, 0.3]).template
    assert physical(plain).circuit is plain.circuit
    assert [column for column in physical(plain).positions.values()] == [0, 1, 2]


def test_a_turn_before_a_measurement_is_gone_with_its_parameter() -> None:
    circuit = QuantumCircuit(1, 1)
    circuit.rx(Parameter("b"), 0)
    circuit.rz(Parameter("a"), 0)
    circuit.measure(0, 0)
    backend = Backend("qiskit_ibm_runtime.fake_provider:FakeManilaV2", optimization_level=2)
    found = physical(ask(circuit, None, [0.1, 0.2], shots=5, backend=backend).template)
    assert {parameter.name: column for parameter, column in found.positions.items()} == {"b": 1}


def test_samples_of_a_translated_circuit_are_those_of_the_researchers_qubits() -> None:
    circuit = QuantumCircuit(3)
    circuit.x(0)
    for pair in ((0, 1), (1, 2), (0, 2)):
        circuit.cx(*pair)
    template = ask(circuit, None, (), shots=5, backend=Aer(noise=FakeManilaV2())).template  # type: ignore[arg-type]
    found = physical(template).circuit
    assert found.num_clbits == 3
    gates = QuantumCircuit(found.num_qubits)
    for instruction in found.data:
        if instruction.name not in ("superop", "measure"):
            gates.append(instruction.operation, [found.find_bit(q).index for q in instruction.qubits])
    state = dense.state(gates, [])
    (only,) = np.flatnonzero(np.abs(state) > 0.5)
    read = {found.find_bit(i.clbits[0]).index: only >> found.find_bit(i.qubits[0]).index & 1
            for i in found.data if i.name == "measure"}  # fmt: skip
    assert read == {0: 1, 1: 1, 2: 0}


# -- templates -----------------------------------------------------------------------------------------------------


def test_a_template_is_made_once_for_the_same_objects() -> None:
    circuit, observable = two(), SparsePauliOp("ZZ")
    first = ask(circuit, observable, THETA).template
    assert ask(circuit, observable, [0.3, 0.4], shots=5).template is first
    again = ask(two(), SparsePauliOp("ZZ"), THETA).template
    assert again is not first
    assert again.digest == first.digest


CHANGES: dict[str, Any] = {
    "gate added": lambda c, o: c.x(0),
    "gate replaced": lambda c, o: operator.setitem(c.data, 2, c.data[2].replace(qubits=c.data[2].qubits[::-1])),
    "gate removed": lambda c, o: c.data.pop(),
    "parameter bound": lambda c, o: c.assign_parameters({A: 0.5}, inplace=True),
    "parameter that now comes last": lambda c, o: c.assign_parameters({A: Parameter("z")}, inplace=True),
    "phase": lambda c, o: setattr(c, "global_phase", 0.5),
    "qubit added": lambda c, o: c.add_bits(QuantumCircuit(1).qubits),
    "coefficient": lambda c, o: operator.setitem(o.coeffs, 0, 2.0),
    "Pauli": lambda c, o: operator.setitem(o.paulis, 0, Pauli("XX")),
    "bit of a Pauli": lambda c, o: operator.setitem(o.paulis.x, (1, 0), True),
    "sign of a Pauli": lambda c, o: setattr(o.paulis, "phase", np.array([2, 0])),
    "all coefficients": lambda c, o: setattr(o, "coeffs", np.array([3.0, 1.0])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place_make_another_template(name: str) -> None:
    circuit, observable = two(), SparsePauliOp(["ZZ", "XI"], [1.0, 0.5])
    template = ask(circuit, observable, THETA).template
    before = copy.deepcopy((template.circuit, template.observables))
    assert ask(circuit, observable, THETA).template is template
    CHANGES[name](circuit, observable)
    if name == "qubit added":
        with pytest.raises(WorkflowError, match="acts on 2 qubits, the circuit has 3"):
            ask(circuit, observable, THETA)
    else:
        found = ask(circuit, observable, [0.1] * circuit.num_parameters).template
        assert found is not template
        assert found.digest != template.digest
    assert (template.circuit, template.observables) == before  # a snapshot


@pytest.mark.parametrize("shots", [None, 100])
@pytest.mark.parametrize("theta", [np.array([0.5, -2.0]), [1, 2], (0.25, np.float64(1e-300)), np.array([True, False])])
def test_moved_parameters_give_the_program_of_them(theta: Any, shots: int | None) -> None:
    circuit, there = two(), Location("run/energy[7]")
    before = program(Request(circuit, "ZZ", THETA, shots), seed=3, location=AT)
    again = program(Request(circuit, "ZZ", theta, shots), seed=3, location=there)
    guess = moved(before, theta, seed=3, location=there)
    assert guess is not None
    assert pack([guess]) == pack([again])
    assert pack([guess]) != pack([before])
    other = moved(before, np.asarray(theta) + 1, seed=3, location=there)
    assert other is not None
    assert pack([other]) != pack([again])
    elsewhere = moved(before, theta, seed=3, location=AT)
    assert elsewhere is not None
    assert (pack([elsewhere]) == pack([again])) == (shots is None)  # samples are seeded by their place


@pytest.mark.parametrize(
    "theta",
    [
        None,
        0.5,
        [0.5],
        [0.5, 1.0, 2.0],
        [[0.5, 1.0]],
        {"a": 0.5, "b": 1.0},
        ["x", "y"],
        [0.5, [1.0]],
        np.array([1j, 0]),
        [0.5, math.nan],
        np.array([-math.inf, 0.5]),
    ],
)
def test_parameters_that_may_be_of_another_program_are_not_guessed_at(theta: Any) -> None:
    assert moved(program(Request(two(), "ZZ", THETA), seed=0, location=AT), theta, seed=0, location=AT) is None


class Own(Gate):
    """A gate that Qiskit knows nothing of; its parameters belong to whoever holds it."""

    def __init__(self, angle: float) -> None:
        super().__init__("own", 1, [angle])

    def _define(self) -> None:
        self.definition = QuantumCircuit(1)
        self.definition.rx(self.params[0], 0)


@pytest.mark.parametrize("count", [1, 300])
def test_a_change_inside_an_instruction_is_noticed(count: int) -> None:
    circuit, gate = free(1), Own(0.5)
    for _ in range(count):
        circuit.append(gate, [0], copy=False)
    first = ask(circuit, "Z").template
    assert ask(circuit, "Z").template is first
    circuit.data[-1].operation.params[0] = 0.25
    again = circuit.data[-1].operation.params[0] == 0.25  # whether Qiskit hands out the gate itself, or a copy
    assert (ask(circuit, "Z").template is first) is not again


def test_classical_bits_that_were_added_are_noticed() -> None:
    circuit = measured()
    first = ask(circuit, None, (), shots=5).template
    circuit.add_register(ClassicalRegister(1, "more"))
    assert ask(circuit, None, (), shots=5).template is not first


def test_a_changed_pauli_or_register_is_noticed() -> None:
    circuit, pauli = free(), Pauli("ZZ")
    first = ask(circuit, pauli).template
    assert ask(circuit, pauli).template.digest == first.digest
    pauli[0] = Pauli("X")
    assert ask(circuit, pauli).template.digest != first.digest
    sampled = ask(circuit, None, (), shots=5).template
    assert ask(circuit, None, (), shots=5).template is sampled
    circuit.measure_all()
    assert ask(circuit, None, (), shots=5).template is not sampled


def test_signs_of_paulis_become_signs_of_coefficients() -> None:
    observable = SparsePauliOp(["ZZ", "XX"], [1.0, 0.5])
    observable.paulis.phase = np.array([2, 0])
    (found,) = ask(free(), observable).template.observables
    assert_array_equal(found.coeffs, [-1.0, 0.5])
    assert not found.paulis.phase.any()


def test_a_list_of_observables_that_changed_is_noticed() -> None:
    circuit, observables = free(), ["ZZ", "XX"]
    first = ask(circuit, observables).template
    observables[1] = "YY"
    assert ask(circuit, observables).template.digest != first.digest


def test_templates_of_different_questions_differ() -> None:
    asked = [
        ask(two(), "ZZ", THETA),
        ask(two(), "XX", THETA),
        ask(two(), ["ZZ", "XX"], THETA),
        ask(two(), {"ZZ": 2.0}, THETA),
        ask(two(), {"ZZ": 1.0, "XX": 1.0}, THETA),
        ask(two(), None, THETA, shots=1),
        ask(free(), "ZZ"),
        ask(free(3), "ZZZ"),
    ]
    assert len({p.template.digest for p in asked}) == len(asked)


# -- estimates -----------------------------------------------------------------------------------------------------

E1, E2 = Estimate(2.0, 0.3, 100), Estimate(-1.0, 0.4, 200)
EXACT = Estimate(4.0)


@pytest.mark.parametrize(
    ("found", "value", "stderr", "shots"),
    [
        (E1 + E2, 1.0, 0.5, 300),
        (E1 - E2, 3.0, 0.5, 300),
        (E1 + EXACT, 6.0, 0.3, 100),
        (EXACT - EXACT, 0.0, 0.0, None),
        (E1 + 1, 3.0, 0.3, 100),
        (1 + E1, 3.0, 0.3, 100),
        (E1 - 0.5, 1.5, 0.3, 100),
        (5 - E1, 3.0, 0.3, 100),
        (E1 * 2, 4.0, 0.6, 100),
        (-3 * E1, -6.0, 0.9, 100),
        (E1 / -2, -1.0, 0.15, 100),
        (-E1, -2.0, 0.3, 100),
        (+E1, 2.0, 0.3, 100),
        (np.float64(2) * E1, 4.0, 0.6, 100),
        (E1 * np.float32(2), 4.0, 0.6, 100),
        (np.float64(5) - E1, 3.0, 0.3, 100),
        (np.int64(1) + E1, 3.0, 0.3, 100),
        (sum([E1, E2]), 1.0, 0.5, 300),
        (E1 * 0, 0.0, 0.0, 100),
    ],
)
def test_arithmetic_keeps_the_error_bar(found: Estimate, value: float, stderr: float, shots: int | None) -> None:
    assert type(found) is Estimate
    assert found.value == pytest.approx(value, abs=1e-15)
    assert found.stderr == pytest.approx(stderr, abs=1e-15)
    assert found.shots == shots
    assert type(found.value) is float
    assert isinstance(found.stderr, float)


def test_errors_add_in_quadrature_as_samples_do() -> None:
    """The spread of a weighted sum of normal numbers, drawn 10^5 times; its own error is 1 / sqrt(2 * 10^5) of it."""
    rng = np.random.default_rng(7)
    left, right = (rng.normal(e.value, e.stderr, 10**5) for e in (E1, E2))
    found = 3 * E1 - E2 / 2 + 1
    drawn = 3 * left - right / 2 + 1
    assert abs(drawn.std() / found.stderr - 1) < 5 / math.sqrt(2 * 10**5)
    assert abs(drawn.mean() - found.value) < 5 * found.stderr / math.sqrt(10**5)


def test_arrays_of_estimates() -> None:
    many = Estimate(np.array([1.0, 2.0]), np.array([0.1, 0.2]), 10)
    for found in (many * np.array([2.0, -3.0]), np.array([2.0, -3.0]) * many):
        assert type(found) is Estimate
        assert_array_equal(found.value, [2.0, -6.0])
        np.testing.assert_allclose(found.stderr, [0.2, 0.6])
    np.testing.assert_allclose((many + many).stderr, np.array([0.1, 0.2]) * math.sqrt(2))
    assert_array_equal((many + np.array([1.0, 1.0])).value, [2.0, 3.0])
    assert_array_equal(np.asarray(many), [1.0, 2.0])
    assert_array_equal(many > 1.5, [False, True])
    assert_array_equal(abs(-many), [1.0, 2.0])


def test_a_product_of_two_estimates_has_no_error_bar_of_this_kind() -> None:
    for combine in (operator.mul, operator.truediv):
        with pytest.raises(TypeError):
            combine(E1, E2)
    with pytest.raises(TypeError):
        1 / E1  # type: ignore[operator]


@pytest.mark.parametrize("other", ["5", None, 1j, [None], object()])
@pytest.mark.parametrize("combine", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_what_is_no_real_number_does_not_combine(other: Any, combine: Any) -> None:
    with pytest.raises(TypeError):
        combine(E1, other)
    with pytest.raises(TypeError):
        combine(other, E1)


def test_single_precision_numbers_are_taken_as_they_are() -> None:
    third = Estimate(1 / 3, 0.1)
    assert (third * np.float32(2)).value == 2 / 3
    assert (third + np.float32(2)).value == 1 / 3 + 2
    assert (third / np.float32(2)).value == 1 / 6


def test_a_scalar_estimate_works_as_a_float() -> None:
    assert float(E1) == 2.0
    assert math.sqrt(E1 * 2) == 2.0
    assert np.exp(E1) == np.exp(2.0)
    assert abs(E2) == 1.0
    assert np.asarray([E1, E2]).tolist() == [2.0, -1.0]
    assert min([E1, E2]) is E2
    values: list[Any] = [E1, E2, 0.0]
    assert sorted(values) == [E2, 0.0, E1]


@pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne])
def test_estimates_compare_by_value(compare: Any) -> None:
    for left in (E1, E2, EXACT, 2.0, np.float64(2.0)):
        for right in (E1, E2, EXACT, 2.0, 3, np.float64(-1.0)):
            assert bool(compare(left, right)) == compare(float(left), float(right))


def test_estimates_are_not_hashable_since_they_compare_by_value() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(E1)


# -- results -------------------------------------------------------------------------------------------------------


def test_an_exact_scalar_is_a_float_without_error() -> None:
    p = ask(two(), theta=THETA)
    found = result(p, outcome(p, [[0.5]]))
    assert isinstance(found, Estimate)
    assert type(found.value) is float
    assert (found.value, found.stderr, found.shots) == (0.5, 0.0, None)


def test_a_sampled_scalar_has_its_error_and_shots() -> None:
    p = ask(two(), theta=THETA, shots=50)
    found = result(p, outcome(p, [[0.5]], 0.1))
    assert isinstance(found, Estimate)
    assert (found.value, found.stderr, found.shots) == (0.5, 0.1, 50)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["value", "error"])
def test_a_value_that_is_no_number_never_travels_on(bad: float, where: str) -> None:
    p = ask(two(), theta=[[0.1, 0.2], [0.3, 0.4]], shots=5)
    good, broken = np.array([[1.0], [2.0]]), np.array([[1.0], [bad]])
    values, errors = (broken, good) if where == "value" else (good, broken)
    with pytest.raises(NotFinite, match=r"row 1 of the evaluation gave \[.*\] for the parameters \[0\.3, 0\.4\]"):
        result(p, outcome(p, values, errors))
    with pytest.raises(NotFinite):  # a sum of the two would be a warning instead
        result(p, outcome(p, [[1.0], [-math.inf]], [[1.0], [math.inf]]))


@pytest.mark.parametrize("shots", [None, 5])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["value", "error", "slope"])
def test_one_value_with_its_error_and_gradient(bad: float, where: str, shots: int | None) -> None:
    p = ask(two(), theta=THETA, shots=shots)
    parts = {"value": [[0.5]], "error": [[0.0 if shots is None else 0.1]], "slope": [[[1.0, -2.0]]]}

    def made() -> Outcome:
        values, errors, slopes = (np.array(part) for part in parts.values())
        return Outcome(values, errors, None, 0.1, 0, slopes)

    found = single(p, made())
    assert found is not None
    assert found[:2] == (0.5, 0.0 if shots is None else 0.1)
    assert found[2] is not None
    assert found[2].tolist() == [1.0, -2.0]
    assert single(ask(two(), theta=[THETA]), made()) is None  # an array of one value is another thing
    parts[where] = np.full_like(np.array(parts[where]), bad).tolist()
    for take in (single, result, derivatives):
        with pytest.raises(NotFinite):
            take(p, made())


def test_samples_are_bits_of_the_batchs_shape() -> None:
    p = ask(two(), None, np.zeros((3, 1, 2)), shots=4)
    bits = np.arange(12, dtype=np.uint8).reshape(3, 4, 1) % 4
    found = result(p, Outcome(np.zeros((3, 0)), np.zeros((3, 0)), bits, 0.1, 0))
    assert isinstance(found, BitArray)
    assert found.shape == (3, 1)
    assert found.num_shots == 4
    assert found.num_bits == 2
    assert_array_equal(found.array[:, 0], bits)


def test_samples_have_the_classical_bits_where_there_are_any() -> None:
    circuit = QuantumCircuit(1, 3)
    circuit.measure(0, 2)
    found = result(
        ask(circuit, None, (), shots=2),
        Outcome(np.zeros((1, 0)), np.zeros((1, 0)), np.zeros((1, 2, 1), np.uint8), 0.1, 0),
    )
    assert isinstance(found, BitArray)
    assert found.num_bits == 3
    assert found.shape == ()


def test_an_estimate_is_formatted_as_its_value() -> None:
    estimate = Estimate(-1.23456, 0.01, 100)
    assert f"{estimate:.2f}|{estimate:10.3e}" == f"{-1.23456:.2f}|{-1.23456:10.3e}"
    assert "stderr=0.01" in f"{estimate}"
