"""Values at rest: what is stored comes back equal in value and type, equal values have equal digests, no code runs."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import io
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_array_equal
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from qiskit.circuit import (
    AnnotatedOperation,
    Clbit,
    Gate,
    InverseModifier,
    Parameter,
    ParameterVector,
    PowerModifier,
    Qubit,
)
from qiskit.circuit.classical import expr
from qiskit.circuit.library import MCXGate, PauliEvolutionGate, RXGate, RZGate, XGate, efficient_su2
from qiskit.primitives import BitArray
from qiskit.quantum_info import Clifford, Kraus, PauliList, SparsePauliOp
from scipy.optimize import LbfgsInvHessProduct, OptimizeResult, minimize, rosen, rosen_der
from scipy.sparse import eye_array

import hybridq as hq
from hybridq import values
from hybridq.errors import Corrupt, Unhashable
from hybridq.values import Encoded, circuit_digest, decode, digest, encode, same_value

NAN, INF = math.nan, math.inf


class Color(enum.Enum):
    RED = 1
    CRIMSON = 1  # an alias
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.Flag):
    READ = 1
    WRITE = 2


@dataclass
class Point:
    x: float
    tags: list[str]
    weight: int = dataclasses.field(default=0)
    norm: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.norm = abs(self.x)


@dataclass(frozen=True)
class Pair:
    left: Any
    right: Any


class Integer(int):
    pass


class Text(str):
    __slots__ = ()


Named = collections.namedtuple("Named", "a")


def through_json(encoded: Encoded) -> Encoded:
    """What a file keeps of a value: text, and bytes by name."""
    return Encoded(
        json.loads(json.dumps(encoded.document, allow_nan=False)), {k: bytes(v) for k, v in encoded.attachments.items()}
    )


def again(value: Any) -> Any:
    return decode(through_json(encode(value)))


def assert_same(left: Any, right: Any) -> None:
    """Equal in value and type, all the way down; NaN equals NaN, and -0.0 is not 0.0."""
    assert type(left) is type(right), (type(left), type(right))
    if isinstance(left, float):
        assert left.hex() == right.hex()
    elif isinstance(left, complex):
        assert_same([left.real, left.imag], [right.real, right.imag])
    elif isinstance(left, np.generic):
        assert left.dtype.newbyteorder("=") == right.dtype
        assert left.tobytes() == right.tobytes()
    elif isinstance(left, np.ndarray):
        assert left.dtype.newbyteorder("=") == right.dtype
        assert left.shape == right.shape
        assert_array_equal(left, right)
        if left.dtype.kind in "fc":
            assert_array_equal(np.signbit(left.real), np.signbit(right.real))
    elif isinstance(left, dict):
        assert list(map(repr, left)) == list(map(repr, right))
        for a, b in zip(left.items(), right.items(), strict=True):
            assert_same(list(a), list(b))
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, BitArray):
        assert left.num_bits == right.num_bits
        assert_same(left.array, right.array)
    elif isinstance(left, SparsePauliOp):
        assert left == right
        assert left.to_list() == right.to_list()
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name))
    else:
        assert left == right


def ansatz(angle: Any = 0.5, name: str = "a", gate: str = "rx", qubit: int = 0) -> QuantumCircuit:
    circuit = QuantumCircuit(2)
    getattr(circuit, gate)(2 * Parameter(name) + angle, qubit)
    circuit.cx(0, 1)
    return circuit


BIG = np.arange(1000.0)

ROUND_TRIPS: dict[str, Any] = {
    "none": None,
    "booleans": [True, False],
    "integers": [0, -1, 2**63, -(2**70), 10**5000, -(10**5000)],
    "floats": [0.0, -0.0, 0.1, -1e-310, 5e-324, sys.float_info.max, NAN, INF, -INF],
    "complex": [1 + 2j, complex(NAN, -0.0), complex(-0.0, INF)],
    "strings": ["", "naïve", "日本", "\x00", "a\nb", "\ud800 alone", "😀", "\ud83d\ude00", "</script>"],
    "bytes": [b"", b"\x00\xff", bytearray(b"ab"), bytearray()],
    "tuples": ((), (1,), (1, (2, [3]))),
    "sets": [set(), {1, "a", None, (1, 2)}, frozenset({1.5, b"x"}), {frozenset()}],
    "dicts": [{}, {"a": 1, "": 2}, {1: "a", None: "b", (1, 2): {"x": 1.5}, 1.5: [], b"k": 0}],
    "dollar keys": [{"$": 1}, {"$": "tuple", "v": [1]}, {"a": {"$": {"$": None}}}],
    "key that is no text": {"\udc80": 1},
    "order of a dict": {"z": 1, "a": 2, "m": 3},
    "enums": [Color.RED, Color.CRIMSON, Color.BLUE, Level.LOW],
    "flags": [Mode.READ, Mode.READ | Mode.WRITE, Mode(0)],
    "dataclasses": [Point(-1.5, ["a"]), Pair(Pair(1, (2,)), {"k": Point(0.0, [])})],
    "NumPy scalars": [
        np.float64(-0.0), np.float32(1.1), np.float16(0.5), np.float64(NAN), np.int8(-3), np.uint64(2**64 - 1),
        np.bool_(True), np.complex64(1 + 1j), np.complex128(INF), np.str_("é"), np.str_(""), np.bytes_(b"ab"),
    ],
    "0-d arrays": [np.array(1.5), np.array(3, dtype=np.int16), np.array("abc"), np.array(True)],
    "empty arrays": [np.zeros(0), np.zeros((0, 3), dtype=np.int32), np.zeros((2, 0, 1), dtype=complex)],
    "arrays of text": [np.array(["a", "bcd", ""]), np.array([b"a", b"bcd"])],
    "array with every odd float": np.array([NAN, INF, -INF, -0.0, 5e-324]),
    "attachments": [BIG, np.arange(600).reshape(20, 30), np.ones((40, 40), dtype=complex), np.array(["x" * 2000])],
    "same attachment twice": [BIG, BIG.copy()],
    "byte order": [np.array([1.5, 2.5], dtype=">f8"), np.arange(1000, dtype=">i4")],
    "memory order": [np.asfortranarray(np.arange(6.0).reshape(2, 3)), BIG[::-2], np.asfortranarray(np.ones((30, 40)))],
    "observables": [
        SparsePauliOp(["XX", "YZ"], [0.5, 2.0]), SparsePauliOp("I"), SparsePauliOp(["XY"], [1j]),
        SparsePauliOp(PauliList(["-XX", "iYZ"]), [1.0, 2.0]), SparsePauliOp.from_list([], num_qubits=3),
    ],
    "bit arrays": [
        BitArray.from_samples(["01", "11", "00"]),
        BitArray(np.zeros((2, 3, 5, 2), dtype=np.uint8), 11),
        BitArray(np.zeros((2, 0, 1), dtype=np.uint8), 4),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_stored_value_comes_back_equal_in_value_and_type(name: str) -> None:
    value = ROUND_TRIPS[name]
    assert_same(value, again(value))
    assert digest(value) == digest(again(value))


def test_the_comparison_of_these_tests_sees_type_and_sign() -> None:
    for left, right in [(1, 1.0), (0.0, -0.0), ((1,), [1]), (np.float64(1), 1.0), (np.zeros(1), np.zeros((1, 1))),
                        ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (np.zeros(1), -np.zeros(1))]:  # fmt: skip
        with pytest.raises(AssertionError):
            assert_same(left, right)


def test_large_arrays_travel_as_attachments_named_by_their_bytes() -> None:
    encoded = encode([BIG, BIG.copy(), ansatz()])
    assert sorted(name.partition(".")[2] for name in encoded.attachments) == ["npy", "qpy"]
    for name, data in encoded.attachments.items():
        assert name.partition(".")[0] == values.digest_bytes(data)
    assert encoded.nbytes == len(json.dumps(encoded.document, separators=(",", ":"))) + sum(
        map(len, encoded.attachments.values())
    )
    assert not encode(np.arange(128.0)).attachments  # 1,024 bytes
    assert encode(np.arange(129.0)).attachments


@dataclass(frozen=True)
class Reading:
    """A dataclass of numbers."""

    value: Any
    error: Any = 0.0
    count: Any = None


@pytest.mark.parametrize(
    "value",
    [
        np.array([0.5, -0.0, 1e-300]), np.zeros(0), np.arange(128.0), np.arange(129.0), np.ones((2, 2)),
        np.ones(3, ">f8"), np.array([np.nan, np.inf]), Reading(0.1), Reading(-0.0, 1e300, 7), Reading(float("nan")),
        Reading(True), Reading("a"), Reading(np.float64(0.1)), Reading(2**20_000), Reading([1.0]), Reading(-3, None, 5),
    ],
)  # fmt: skip
def test_what_is_written_in_a_hurry_is_the_same(value: Any) -> None:
    document = values._Writer(attach=True).walk(value, "value")
    assert encode(value).document == document
    assert encode(value).text == json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


@pytest.mark.parametrize("value", [np.arange(3.0), Reading(0.5), [1.0, "text"]])
def test_what_is_encoded_travels_between_processes(value: Any) -> None:
    encoded = encode(value)
    assert encoded.text
    packed = pickle.dumps(encoded)
    again = pickle.loads(packed)
    assert again == encoded
    assert (again.text, type(again.document)) == (encoded.text, type(encoded.document))
    assert len(packed) < 2 * len(encoded.text) + 400


def test_a_kept_digest_holds_until_the_circuit_changes() -> None:
    circuit = efficient_su2(2, reps=1)
    other, found = circuit.copy(), circuit_digest(circuit)
    values.keep_digest(circuit, circuit.copy(), "kept")
    assert circuit_digest(circuit) == "kept"
    assert circuit_digest(other) == found
    for edit, undo in (
        (lambda c: c.x(0), lambda c: c.data.pop()),
        (lambda c: setattr(c, "global_phase", 1.0), lambda c: setattr(c, "global_phase", 0.0)),
    ):
        edit(circuit)
        edit(other)
        assert circuit_digest(circuit) == circuit_digest(other) not in ("kept", found)
        undo(circuit)
        undo(other)
        assert circuit_digest(circuit) == "kept"
    circuit.add_register(ClassicalRegister(1))
    assert circuit_digest(circuit) not in ("kept", found)


def test_decoded_arrays_are_writable_and_not_shared() -> None:
    for value in (np.zeros(3), BIG):
        encoded = encode(value)
        first = decode(encoded)
        first[0] = 7.0
        assert_same(value, decode(encoded))


def test_circuits_come_back_equal() -> None:
    for circuit in (ansatz(), efficient_su2(3, reps=1), QuantumCircuit(1, 1, name="näme"), *map(_control, CONDITIONS)):
        back = again(circuit)
        assert back == circuit
        assert back.name == circuit.name
        assert digest(back) == digest(circuit)


def test_a_problem_comes_back_equal() -> None:
    problem = hq.Problem(
        "chain", SparsePauliOp(["ZZ", "XI"], [1.0, 0.3]), ansatz(), np.array([0.25]), -1.5, "by hand", "J", {"L": 2}
    )
    back = again(problem)
    assert type(back) is hq.Problem
    assert back.ansatz == problem.ansatz
    for name in ("name", "hamiltonian", "start", "reference", "source", "unit", "properties"):
        assert_same(getattr(problem, name), getattr(back, name))
    assert digest(back) == digest(problem) != digest(dataclasses.replace(problem, unit="hartree"))


@pytest.mark.parametrize("method", ["L-BFGS-B", "COBYLA", "BFGS", "Nelder-Mead"])
def test_what_scipy_returns_comes_back(method: str) -> None:
    found = minimize(rosen, [0.5, 0.6], method=method, options={"maxiter": 5})
    back = again(found)
    assert type(back) is OptimizeResult
    assert back.keys() == found.keys()
    for key, value in found.items():
        assert type(back[key]) is type(value)
        if key == "hess_inv" and method == "L-BFGS-B":
            assert_same(value.todense(), back[key].todense())
            assert_same(value @ value.sk[0], back[key] @ value.sk[0])
        else:
            assert_same(value, back[key])


def test_the_inverse_hessian_of_many_parameters_takes_little_room() -> None:
    found = minimize(rosen, np.linspace(-1, 1, 2000), method="L-BFGS-B", jac=rosen_der, options={"maxiter": 20})
    encoded = encode(found)
    assert encoded.nbytes < 2e6  # as a matrix 32 MB
    back = decode(encoded).hess_inv
    assert back.shape == (2000, 2000)
    assert (back @ found.x).tobytes() == (found.hess_inv @ found.x).tobytes()


def test_a_result_may_hold_a_sparse_matrix() -> None:
    assert_same(np.eye(3), np.asarray(again(OptimizeResult(jac=eye_array(3))).jac))


def test_an_optimize_result_may_hold_any_key() -> None:
    assert again(OptimizeResult({"$": 1, "x": np.zeros(2)}))["$"] == 1


# -- properties ----------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary(),
    st.sampled_from([Color.RED, Mode.READ | Mode.WRITE, np.float32(1.5), np.int64(3), "$", "\udcff"]),
)  # fmt: skip
KEYS = st.one_of(st.none(), st.integers(), st.text(), st.binary(), st.just("$"), st.tuples(st.integers(), st.text()))
ARRAYS = hnp.arrays(
    dtype=st.one_of(
        hnp.boolean_dtypes(),
        hnp.integer_dtypes(),
        hnp.unsigned_integer_dtypes(),
        hnp.floating_dtypes(sizes=(16, 32, 64)),
        hnp.complex_number_dtypes(sizes=(64, 128)),
        hnp.unicode_string_dtypes(),
        hnp.byte_string_dtypes(),
    ),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
VALUES = st.recursive(
    NUMBERS | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.sets(KEYS, max_size=4)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=12,
)


def canonical(value: Any) -> Any:
    """What a value is, without the code under test: equal for two values exactly if they are the same value."""
    if isinstance(value, float) and not isinstance(value, np.generic):
        return ("float", "nan" if math.isnan(value) else value.hex())
    if isinstance(value, complex) and not isinstance(value, np.generic):
        return ("complex", canonical(value.real), canonical(value.imag))
    if isinstance(value, (np.ndarray, np.generic)):
        native = np.asarray(value).astype(value.dtype.newbyteorder("<"))
        return (type(value).__name__, native.dtype.str, native.shape, native.tobytes())
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, tuple(map(canonical, value)))
    if isinstance(value, dict):
        return ("dict", frozenset((canonical(k), canonical(v)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, frozenset(map(canonical, value)))
    if isinstance(value, bytearray):
        return ("bytearray", bytes(value))
    if isinstance(value, Pair):
        return ("Pair", canonical(value.left), canonical(value.right))
    return (type(value).__name__, value)


@given(VALUES)
def test_round_trip_of_anything(value: Any) -> None:
    assert canonical(again(value)) == canonical(value)


@given(VALUES, VALUES)
def test_digests_are_equal_exactly_for_equal_values(left: Any, right: Any) -> None:
    assert (digest(left) == digest(right)) == (canonical(left) == canonical(right))
    assert digest(left) == digest(again(left))


ATOMS = [None, False, True, 0, 1, 0.0, -0.0, 1.0, NAN, INF, 0j, 1 + 0j, "", "0", "$", b"", bytearray(), Color.RED]


@settings(max_examples=300)
@given(st.data())
def test_digests_tell_small_values_apart(data: st.DataObject) -> None:
    """Few atoms and shallow containers, so that equal pairs and near misses both come up often."""
    shape = st.recursive(
        st.sampled_from(ATOMS),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.lists(inner, max_size=2).map(tuple)
            | st.dictionaries(st.sampled_from(["a", "$", "v", None, 1]), inner, max_size=2)
        ),
        max_leaves=3,
    )
    left = data.draw(shape)
    right = data.draw(shape | st.just(copy.deepcopy(left)))
    assert (digest(left) == digest(right)) == (canonical(left) == canonical(right))


def test_all_atoms_and_their_containers_have_digests_of_their_own() -> None:
    wraps: list[Callable[[Any], Any]] = [
        lambda v: v, lambda v: [v], lambda v: (v,), lambda v: {"a": v}, lambda v: {"$": v}, lambda v: [[v]],
        lambda v: Pair(v, "right"), lambda v: Pair("left", v), lambda v: OptimizeResult(a=v),
    ]  # fmt: skip
    made = [wrap(atom) for wrap in wraps for atom in ATOMS]
    made += [[], (), {}, set(), frozenset(), np.zeros(0), np.float64(0.0), np.float32(0.0), np.array(0.0), np.zeros(1)]
    made += [np.zeros((1, 1)), np.zeros((0, 1)), {0}, {"$": "tuple", "v": []}, {"$": "float", "v": "nan"}]
    assert len({digest(value) for value in made}) == len(made)


def test_the_order_of_members_counts_where_it_means_something() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({1: 1, (2,): 2}) == digest({(2,): 2, 1: 1})
    assert digest({"x", "y", 3}) == digest({3, "y", "x"})
    assert digest(OptimizeResult(a=1, b=2)) == digest(OptimizeResult(b=2, a=1))
    assert digest([1, 2]) != digest([2, 1])
    assert digest(SparsePauliOp(["X", "Z"])) != digest(SparsePauliOp(["Z", "X"]))


def test_memory_layout_and_byte_order_do_not_count() -> None:
    array = np.arange(300.0).reshape(15, 20)
    for part in (array, array[:3, :4]):
        assert digest(part) == digest(np.asfortranarray(part)) == digest(part.astype(">f8"))
        assert digest(part) != digest(part.T)
        assert digest(part) != digest(part.astype(np.float32))


DIGESTS_ELSEWHERE = """
import sys
import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter
from qiskit.quantum_info import SparsePauliOp
from hybridq.values import digest
a, b = Parameter("a"), Parameter("b")
circuit = QuantumCircuit(2)
circuit.rx(a * b + 2 * a - b / 3, 0)
circuit.cx(0, 1)
circuit.unitary(np.array([[0, 1], [1, 0]]), [0])
print(digest([{"x", "y", "z", ("t", 1)}, {"k": 1.5, None: {frozenset("abcdef")}}, np.arange(500.0), circuit,
              SparsePauliOp(["XX", "ZI"], [0.5, 1.0])]))
"""


def test_digests_are_equal_in_processes_of_any_hash_seed() -> None:
    found = set()
    for seed in ("0", "1", "12345"):
        done = subprocess.run(
            [sys.executable, "-c", DIGESTS_ELSEWHERE], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        found.add(done.stdout.strip())
    assert len(found) == 1
    assert re.fullmatch("[0-9a-f]{64}", found.pop())


# -- circuits ------------------------------------------------------------------------------------------------------


def _measured(build: Callable[[QuantumCircuit, ClassicalRegister], None], register: str = "c") -> QuantumCircuit:
    classical = ClassicalRegister(2, register)
    circuit = QuantumCircuit(QuantumRegister(2, register + "q"), classical)
    circuit.measure(0, 0)
    build(circuit, classical)
    return circuit


def _if(condition: Callable[[ClassicalRegister], Any], gate: str = "x", other: str | None = None) -> Any:
    def build(circuit: QuantumCircuit, classical: ClassicalRegister) -> None:
        with circuit.if_test(condition(classical)) as orelse:
            getattr(circuit, gate)(1)
        if other is not None:
            with orelse:
                getattr(circuit, other)(1)

    return build


def _while(condition: Callable[[ClassicalRegister], Any]) -> Any:
    def build(circuit: QuantumCircuit, classical: ClassicalRegister) -> None:
        with circuit.while_loop(condition(classical)):
            circuit.x(0)
            circuit.measure(0, 0)

    return build


def _switch(target: Callable[[ClassicalRegister], Any], *labels: Any, default: bool = True) -> Any:
    def build(circuit: QuantumCircuit, classical: ClassicalRegister) -> None:
        with circuit.switch(target(classical)) as case:
            with case(*labels):
                circuit.x(1)
            if default:
                with case(case.DEFAULT):
                    circuit.z(1)

    return build


def _for(indices: Any, gate: str = "x", scale: float = 0.5) -> Any:
    def build(circuit: QuantumCircuit, classical: ClassicalRegister) -> None:
        with circuit.for_loop(indices, Parameter("i")) as index:
            circuit.rx(index * scale, 0)
            getattr(circuit, gate)(1)

    return build


CONDITIONS: list[Any] = [
    _if(lambda c: (c[0], 1)),
    _if(lambda c: (c[0], 0)),
    _if(lambda c: (c[1], 1)),
    _if(lambda c: (c, 1)),
    _if(lambda c: (c, 2)),
    _if(lambda c: (c[0], 1), "y"),
    _if(lambda c: (c[0], 1), "x", "y"),
    _if(lambda c: expr.bit_and(c[0], c[1])),
    _if(lambda c: expr.bit_or(c[0], c[1])),
    _if(lambda c: expr.logic_not(c[0])),
    _if(lambda c: expr.lift(c[1])),
    _if(lambda c: expr.less(c, 2)),
    _if(lambda c: expr.less(c, 3)),
    _if(lambda c: expr.less(2, c)),
    _if(lambda c: expr.index(c, 1)),
    _if(lambda c: expr.cast(c, expr.lift(True).type)),
    _while(lambda c: (c[0], 1)),
    _while(lambda c: (c[0], 0)),
    _while(lambda c: (c, 3)),
    _while(lambda c: expr.less(c, 2)),
    _switch(lambda c: c, 1),
    _switch(lambda c: c, 2),
    _switch(lambda c: c, 1, 2),
    _switch(lambda c: c, 1, default=False),
    _switch(lambda c: c[0], 1),
    _switch(lambda c: c[1], 1),
    _switch(lambda c: expr.bit_and(c, 1), 1),
    _for(range(3)),
    _for(range(4)),
    _for((0, 2)),
    _for(range(3), "y"),
    _for(range(3), scale=0.25),
]


def _control(build: Any) -> QuantumCircuit:
    return _measured(build)


def test_control_flow_counts_and_register_names_do_not() -> None:
    found = [circuit_digest(_measured(build)) for build in CONDITIONS]
    assert len(set(found)) == len(found)
    assert found == [circuit_digest(_measured(build, "other")) for build in CONDITIONS]


def test_bits_without_a_register_are_known_by_position() -> None:
    def build(which: int) -> QuantumCircuit:
        circuit = QuantumCircuit([Qubit(), Clbit(), Clbit()])
        with circuit.if_test(expr.lift(circuit.clbits[which])):
            circuit.x(0)
        return circuit

    assert circuit_digest(build(0)) == circuit_digest(build(0)) != circuit_digest(build(1))


def _custom(angle: float, name: str = "mine", parameter: Any = None) -> QuantumCircuit:
    inner = QuantumCircuit(1, name=name)
    inner.rx(angle, 0)
    if parameter is not None:
        inner.rz(parameter, 0)
    circuit = QuantumCircuit(1)
    circuit.append(inner.to_gate(), [0])
    return circuit


def _appended(operation: Any, qubits: int = 1) -> QuantumCircuit:
    circuit = QuantumCircuit(qubits)
    circuit.append(operation, range(qubits))
    return circuit


def _unitary(matrix: Any) -> QuantumCircuit:
    circuit = QuantumCircuit(1)
    circuit.unitary(np.asarray(matrix), [0])
    return circuit


def _phase(value: Any) -> QuantumCircuit:
    circuit = QuantumCircuit(1)
    circuit.global_phase = value
    return circuit


def _delay(duration: Any, unit: str) -> QuantumCircuit:
    circuit = QuantumCircuit(1)
    circuit.delay(duration, 0, unit)
    return circuit


def _initialize(vector: list[float]) -> QuantumCircuit:
    circuit = QuantumCircuit(1)
    circuit.initialize(vector, 0)
    return circuit


def _kraus(p: float) -> QuantumCircuit:
    flip = np.array([[0, 1], [1, 0]])
    return _appended(Kraus([math.sqrt(1 - p) * np.eye(2), math.sqrt(p) * flip]).to_instruction())


def _box(gate: str) -> QuantumCircuit:
    circuit = QuantumCircuit(1)
    with circuit.box():
        getattr(circuit, gate)(0)
    return circuit


def _measure(qubit: int, clbit: int) -> QuantumCircuit:
    circuit = QuantumCircuit(2, 2)
    circuit.measure(qubit, clbit)
    return circuit


DIFFERENT_CIRCUITS: list[Callable[[], QuantumCircuit]] = [
    lambda: QuantumCircuit(1), lambda: QuantumCircuit(2), lambda: QuantumCircuit(1, 1),
    ansatz, lambda: ansatz(0.5 + 1e-15), lambda: ansatz(gate="ry"), lambda: ansatz(qubit=1),
    lambda: ansatz(Parameter("b")), lambda: ansatz(2 * Parameter("b")), lambda: ansatz(-Parameter("b")),
    lambda: _appended(RXGate(0.5)), lambda: _appended(RXGate(0.5).inverse()), lambda: _appended(RXGate(Parameter("t"))),
    lambda: _appended(XGate()), lambda: _custom(0.5), lambda: _custom(0.6), lambda: _custom(0.5, "other"),
    lambda: _custom(0.5, "x"), lambda: _custom(0.6, "x"), lambda: _custom(0.5, parameter=Parameter("t")),
    lambda: _custom(0.5, parameter=2 * Parameter("t")),
    lambda: _unitary(np.eye(2)), lambda: _unitary([[0, 1], [1, 0]]), lambda: _unitary([[0, 1j], [1, 0]]),
    lambda: _phase(0.5), lambda: _phase(Parameter("t")), lambda: _phase(2 * Parameter("t")),
    lambda: _delay(10, "dt"), lambda: _delay(10, "ns"), lambda: _delay(11, "ns"),
    lambda: _initialize([1, 0]), lambda: _initialize([0, 1]), lambda: _kraus(0.1), lambda: _kraus(0.2),
    lambda: _box("x"), lambda: _box("y"), lambda: _measure(0, 0), lambda: _measure(0, 1), lambda: _measure(1, 1),
    lambda: _appended(XGate().control(1, ctrl_state=0), 2), lambda: _appended(XGate().control(1, ctrl_state=1), 2),
    lambda: _appended(MCXGate(4), 5), lambda: _appended(MCXGate(4, ctrl_state=3), 5),
    lambda: _appended(PauliEvolutionGate(SparsePauliOp(["XX", "ZZ"]), 0.1), 2),
    lambda: _appended(PauliEvolutionGate(SparsePauliOp(["XX", "ZZ"]), 0.2), 2),
    lambda: _appended(PauliEvolutionGate(SparsePauliOp(["XX", "YY"]), 0.1), 2),
]  # fmt: skip


def test_circuits_rebuilt_are_equal_and_changed_ones_are_not() -> None:
    found = [circuit_digest(build()) for build in DIFFERENT_CIRCUITS]
    assert len(set(found)) == len(found)
    assert found == [circuit_digest(build()) for build in DIFFERENT_CIRCUITS]  # new parameters, same structure


def test_names_of_parameters_do_not_count_but_their_positions_do() -> None:
    def build(first: str, second: str) -> QuantumCircuit:
        circuit = QuantumCircuit(1)
        a, b = Parameter(first), Parameter(second)
        circuit.rx(a + 2 * b * a, 0)
        circuit.ry(b, 0)
        return circuit

    assert circuit_digest(build("a", "b")) == circuit_digest(build("one", "two"))
    assert circuit_digest(build("a", "b")) != circuit_digest(
        build("b", "a")
    )  # `circuit.parameters` is in another order
    vector = ParameterVector("v", 12)
    assert circuit_digest(build("a", "b")) == circuit_digest(
        build("a", "b").assign_parameters(dict(zip(build("a", "b").parameters, vector, strict=False)), strict=False)
    )


def test_names_labels_and_metadata_do_not_count() -> None:
    plain, named = ansatz(), ansatz()
    named.name, named.metadata = "another", {"note": 1}
    assert circuit_digest(plain) == circuit_digest(named)
    assert circuit_digest(_appended(RXGate(1))) == circuit_digest(_appended(RXGate(1.0, label="mine")))


def test_binding_a_parameter_gives_the_circuit_with_the_number() -> None:
    circuit = QuantumCircuit(1)
    circuit.rx(2 * Parameter("a"), 0)
    assert circuit_digest(circuit.assign_parameters([0.25])) == circuit_digest(_appended(RXGate(0.5)))


@pytest.mark.parametrize(
    "operation",
    [
        Gate("opaque", 1, []),
        AnnotatedOperation(RXGate(0.3), InverseModifier()),
        AnnotatedOperation(RZGate(0.3), PowerModifier(2)),
        Clifford(_appended(XGate())),
    ],
    ids=lambda o: str(o.name),
)
def test_instructions_whose_meaning_is_hidden_are_refused(operation: Any) -> None:
    with pytest.raises(Unhashable, match=operation.name):
        digest(_appended(operation))


def test_variables_of_a_circuit_are_refused() -> None:
    circuit = QuantumCircuit(1)
    with circuit.if_test(circuit.add_var("flag", expr.lift(True))):
        circuit.x(0)
    with pytest.raises(Unhashable, match="cannot be hashed"):
        digest(circuit)


# -- refusals ------------------------------------------------------------------------------------------------------


def _cyclic() -> list[Any]:
    inner: list[Any] = []
    inner.append({"again": inner})
    return inner


def _deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def _local() -> Any:
    @dataclass
    class Local:
        x: int

    return Local(1)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lambda": (lambda: {"a": [1, lambda: 0]}, r"^v\['a'\]\[1\] is a builtins\.function"),
    "function": (lambda: (os.getcwd,), r"^v\[0\] is a builtins\.builtin"),
    "class": (lambda: [Point], r"^v\[0\] is a builtins\.type"),
    "module": (lambda: [math], r"^v\[0\] is a builtins\.module"),
    "generator": (lambda: {"g": (i for i in [1])}, r"^v\['g'\] is a builtins\.generator"),
    "iterator": (lambda: [iter([])], r"^v\[0\] is a builtins\.list_iterator"),
    "range": (lambda: range(3), r"^v is a builtins\.range"),
    "object": (lambda: Pair(1, object()), r"^v\.right is a builtins\.object"),
    "in a key": (lambda: {(1, len): 2}, r"^v key .*\[1\] is a builtins\.builtin"),
    "in a set": (lambda: {len}, r"^v\{<built-in function len>\} is a"),
    "object array": (lambda: [np.array([{}, None])], r"^v\[0\] is of dtype object"),
    "record array": (lambda: np.zeros(2, dtype=[("a", "f8")]), "dtype"),
    "dates": (lambda: np.array(["2020-01-01"], dtype="M8[D]"), "dtype datetime64"),
    "a date": (lambda: np.datetime64("2020-01-01"), "datetime64"),
    "matrix": (lambda: np.ma.array([1.0]), "MaskedArray"),
    "local dataclass": (lambda: {"p": _local()}, r"^v\['p'\] is of the local class .*_local.<locals>.Local"),
    "subclass of int": (lambda: Integer(3), r"^v is a .*\.Integer"),
    "subclass of str": (lambda: {"k": Text("x")}, r"^v\['k'\] is a .*\.Text"),
    "subclass of dict": (lambda: collections.OrderedDict(a=1), "OrderedDict"),
    "named tuple": (lambda: Named(1), "Named"),
    "cycle": (_cyclic, r"^v\[0\]\['again'\] contains itself"),
    "too deep": (lambda: _deep(150), "nested more than 100 deep"),
    "unbound observable": (lambda: SparsePauliOp(["X"], np.array([Parameter("a")])), "bind its parameters"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_data_is_refused_with_its_path(name: str) -> None:
    make, message = REFUSED[name]
    for refuse in (encode, digest):
        with pytest.raises(Unhashable, match=message):
            refuse(make(), "v")


def test_an_open_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with open(tmp_path / "x", "w") as file, pytest.raises(Unhashable, match=r"^v\['f'\] is a _io\.TextIOWrapper"):
        encode({"f": file}, "v")


def test_a_value_twice_in_a_tree_is_no_cycle_and_a_hundred_levels_are_fine() -> None:
    inner = [1]
    assert again([inner, inner, {"a": inner}]) == [inner, inner, {"a": inner}]
    assert again(_deep(99)) == _deep(99)


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="no extended precision here")
@pytest.mark.parametrize("kind", [np.longdouble, np.clongdouble])
def test_extended_precision_is_refused(kind: Any) -> None:
    for value in (np.ones(2, dtype=kind), kind(1), np.ones(2, dtype=kind).astype(np.dtype(kind).newbyteorder(">"))):
        with pytest.raises(Unhashable, match="dtype"):
            digest(value)


def test_values_that_are_too_large_are_refused_by_name_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    size = encode(BIG).nbytes
    monkeypatch.setattr(values, "MAX_VALUE_BYTES", size)
    assert_same(again(BIG), BIG)
    monkeypatch.setattr(values, "MAX_VALUE_BYTES", size - 1)
    with pytest.raises(Unhashable, match=rf"^the table takes {size:,} bytes encoded; at most {size - 1:,}"):
        encode(BIG, "the table")


# -- hostile documents ---------------------------------------------------------------------------------------------


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


SPRUNG: list[int] = []


def spring() -> None:
    SPRUNG.append(1)


class Trap:
    """Pickled, it calls a function on loading."""

    def __reduce__(self) -> Any:
        return spring, ()


HOSTILE: dict[str, Encoded] = {
    "unknown tag": Encoded({"$": "pickle", "v": "gAR9lC4="}),
    "tag that is no name": Encoded([{"$": ["tuple"]}]),
    "null tag with content": Encoded({"$": 5}),
    "missing field": Encoded({"$": "tuple"}),
    "missing attachment": Encoded({"$": "npy", "f": "0" * 64 + ".npy"}),
    "missing circuit": Encoded({"$": "qpy", "f": "0" * 64 + ".qpy"}),
    "pickled npy": Encoded({"$": "npy", "f": "x"}, {"x": _npy(np.array([Trap()], dtype=object))}),
    "npy cut short": Encoded({"$": "npy", "f": "x"}, {"x": _npy(np.arange(9.0))[:-1]}),
    "npy that promises 32 TB": Encoded(
        {"$": "npy", "f": "x"}, {"x": _npy(np.arange(400.0)).replace(b"(400,), }" + 10 * b" ", b"(4000000000000,), }")}
    ),
    "no npy": Encoded({"$": "npy", "f": "x"}, {"x": b"text"}),
    "object array": Encoded({"$": "array", "d": "|O", "s": [1], "v": "AAAAAAAAAAA="}),
    "shape that does not fit": Encoded({"$": "array", "d": "<f8", "s": [2], "v": "AAAAAAAAAAA="}),
    "no base64": Encoded({"$": "array", "d": "<f8", "s": [1], "v": "!"}),
    "empty circuit": Encoded({"$": "qpy", "f": "x"}, {"x": b"QISKIT"}),
    "circuit cut short": Encoded(
        encode(ansatz()).document, {n: d[:-9] for n, d in encode(ansatz()).attachments.items()}
    ),
    "class that is not loaded": Encoded({"$": "dataclass", "t": "antigravity:X", "v": {}}),
    "function for a class": Encoded({"$": "dataclass", "t": "os:system", "v": {"command": "false"}}),
    "class that is no dataclass": Encoded({"$": "dataclass", "t": "subprocess:Popen", "v": {"args": "false"}}),
    "function for an enum": Encoded({"$": "enum", "t": "os:system", "v": "false"}),
    "unknown member": Encoded({"$": "enum", "t": f"{__name__}:Color", "v": "GREEN"}),
    "unknown field": Encoded({"$": "dataclass", "t": f"{__name__}:Pair", "v": {"left": 1, "up": 2}}),
    "deep": Encoded(json.loads("[" * 900 + "]" * 900)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_documents_this_module_did_not_write_are_refused(name: str) -> None:
    with pytest.raises(Corrupt):
        decode(HOSTILE[name])
    assert not SPRUNG


def test_the_trap_of_these_tests_works() -> None:
    np.load(io.BytesIO(_npy(np.array([Trap()], dtype=object))), allow_pickle=True)
    assert SPRUNG.pop() == 1


def test_a_module_is_not_imported_because_data_names_it() -> None:
    name = "antigravity"
    assert name not in sys.modules
    with pytest.raises(Corrupt, match="not loaded here"):
        decode(HOSTILE["class that is not loaded"])
    assert name not in sys.modules


@pytest.mark.parametrize("version", [1, 10, 12])
def test_circuits_of_old_files_are_not_loaded(version: int) -> None:
    encoded = encode(ansatz())
    ((name, data),) = encoded.attachments.items()
    assert data[6] >= 13
    old = data[:6] + bytes([version]) + data[7:]
    with pytest.raises(Corrupt, match="version 13 or later"):
        decode(Encoded(encoded.document, {name: old}))


# -- nearly equal documents ----------------------------------------------------------------------------------------

TOLERANCE = 1e-9
NEAR: list[tuple[Any, Any, bool]] = [
    (1.0, 1.0 + 1e-10, True), (1.0, 1.0 + 1e-8, False), (1e6, 1e6 + 1e-4, True), (0.0, 1e-10, True), (0.0, -0.0, True),
    (1, 1, True), (1, 2, False), (1, 1.0, False), (True, 1, False), (None, None, True), (None, 0, False),
    ("a", "a", True), ("a", "b", False), (NAN, NAN, True), (NAN, 1.0, False), (INF, INF, True), (INF, -INF, False),
    ([1.0], [1.0 + 1e-12], True), ([1.0], [1.0, 1.0], False), ((1.0,), [1.0], False), ({"a": 1.0}, {"a": 1.0}, True),
    ({"a": 1.0}, {"b": 1.0}, False), ({"a": 1.0}, {"a": 1.0, "b": 2}, False), (1j, 1j + 1e-10, True), (1j, 2j, False),
    (np.ones(3), np.ones(3) + 1e-11, True), (np.ones(3), np.ones(3) + 1e-5, False),
    (np.ones(3), np.ones((3, 1)), False), (np.ones(3), np.ones(3, dtype=np.float32), False),
    (np.array([NAN, 1]), np.array([NAN, 1 + 1e-12]), True), (np.arange(3), np.arange(3), True),
    (np.arange(3), np.arange(3) + 1, False), (np.float64(1), np.float64(1 + 1e-12), True),
    (SparsePauliOp(["X"], [1.0]), SparsePauliOp(["X"], [1 + 1e-12]), True),
    (SparsePauliOp(["X"], [1.0]), SparsePauliOp(["Z"], [1.0]), False),
    (Pair(1.0, [2.0]), Pair(1.0, [2.0 + 1e-12]), True), (Color.RED, Color.BLUE, False),
]  # fmt: skip


@pytest.mark.parametrize(("left", "right", "expected"), NEAR)
def test_same_value(left: Any, right: Any, expected: bool) -> None:
    a, b = encode(left).document, encode(right).document
    assert same_value(a, b, TOLERANCE) is same_value(b, a, TOLERANCE) is expected


@given(VALUES)
def test_a_document_says_the_same_as_itself(value: Any) -> None:
    encoded = encode(value)
    assert same_value(encoded.document, through_json(encoded).document, 0.0)


def test_kinds_of_tests_cover_all_readers() -> None:
    """Every tag that can be read is written by one of the round trips above."""
    seen = set()

    def walk(document: Any) -> None:
        if isinstance(document, dict):
            if isinstance(document.get("$"), str):
                seen.add(document["$"])
            for member in document.values():
                walk(member)
        elif isinstance(document, list):
            for member in document:
                walk(member)

    scipys = [OptimizeResult(x=1), LbfgsInvHessProduct(np.eye(2), np.eye(2))]
    made = itertools.chain(ROUND_TRIPS.values(), [ansatz(), *scipys])
    walk([encode(value).document for value in made])
    assert seen >= set(values._READERS)
