"""What evaluates circuits, as data: noise is Qiskit's own, names and identities are stable, circuits fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dense
import numpy as np
import pytest
from gates import SETTINGS, circuits
from hypothesis import given, settings
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.circuit import ClassicalRegister, Clbit, Gate, Parameter
from qiskit.circuit.library import QFTGate, UnitaryGate, XGate
from qiskit.providers.fake_provider import GenericBackendV2
from qiskit.quantum_info import Kraus, SuperOp, random_unitary
from qiskit_aer import AerSimulator
from qiskit_aer.noise import (
    NoiseModel,
    QuantumError,
    ReadoutError,
    amplitude_damping_error,
    coherent_unitary_error,
    depolarizing_error,
    kraus_error,
    pauli_error,
    phase_amplitude_damping_error,
    reset_error,
    thermal_relaxation_error,
)
from qiskit_ibm_runtime.fake_provider import FakeManilaV2

from hybridq.backends import (
    AER_METHODS,
    Adjoint,
    Aer,
    AnyBackend,
    Backend,
    Channel,
    Noise,
    Readout,
    loaded,
    named_backend,
    physical_circuit,
)
from hybridq.errors import WorkflowError
from hybridq.values import decode, encode

MANILA = FakeManilaV2()
MANILA_NAME = "qiskit_ibm_runtime.fake_provider.backends.manila.fake_manila:FakeManilaV2"


# -- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chance", [1e-12, 0.1, 0.75, 1.0, 1, np.float64(0.3)])
@pytest.mark.parametrize(("name", "width"), [("one_qubit", 1), ("two_qubit", 2)])
def test_depolarizing_noise_is_qiskits(name: str, width: int, chance: Any) -> None:
    noise = Noise.depolarizing(**{name: chance})
    expected = SuperOp(depolarizing_error(chance, width)).data
    for gate in ("rx", "cx", "anything"):
        found = noise.after([gate], tuple(range(width)))
        assert found is not None
        np.testing.assert_allclose(found, expected, atol=1e-15)
    assert noise.after(["rx"], tuple(range(3 - width))) is None  # gates of the other width have none
    assert noise.readout == ()


def test_no_depolarizing_noise_and_flips() -> None:
    assert Noise.depolarizing().channels == ()
    noise = Noise.depolarizing(readout=0.25)
    assert noise.channels == ()
    assert [noise.readout_of(qubit) for qubit in (0, 7)] == [(0.25, 0.25)] * 2


def _first_alone() -> QuantumError:
    """Of two qubits, with an effect on one."""
    circuit = QuantumCircuit(2)
    circuit.x(0)
    return QuantumError([(circuit, 0.2), (QuantumCircuit(2), 0.8)])


def _swapped() -> QuantumError:
    circuit = QuantumCircuit(2)
    circuit.append(UnitaryGate(random_unitary(4, seed=3)), [1, 0])
    circuit.reset(1)
    circuit.t(1)
    return QuantumError(circuit)


ONE: dict[str, QuantumError] = {
    "depolarizing": depolarizing_error(0.1, 1),
    "Paulis": pauli_error([("X", 0.1), ("Y", 0.2), ("I", 0.7)]),
    "damping": amplitude_damping_error(0.3, 0.2),
    "phase damping": phase_amplitude_damping_error(0.1, 0.2),
    "relaxing": thermal_relaxation_error(50, 70, 10, 0.3),
    "coherent": coherent_unitary_error(random_unitary(2, seed=1)),
    "reset": reset_error(0.1, 0.2),
    "composed": depolarizing_error(0.1, 1).compose(amplitude_damping_error(0.2)),
    "little": amplitude_damping_error(1e-5),
}
TWO: dict[str, QuantumError] = {
    "depolarizing": depolarizing_error(0.1, 2),
    "Paulis": pauli_error([("XI", 0.1), ("IY", 0.2), ("II", 0.7)]),
    "product": amplitude_damping_error(0.3).tensor(pauli_error([("X", 0.1), ("I", 0.9)])),
    "one side": thermal_relaxation_error(50, 70, 10).expand(pauli_error([("I", 1.0)])),
    "coherent": coherent_unitary_error(random_unitary(4, seed=2)),
    "Kraus": kraus_error([np.sqrt(0.3) * random_unitary(4, seed=4).data, np.sqrt(0.7) * np.eye(4)]),
    "first alone": _first_alone(),
    "other order": _swapped(),
}


@pytest.mark.parametrize(("gate", "error"), [*(("sx", e) for e in ONE.values()), *(("cx", e) for e in TWO.values())],
                         ids=[*(f"one, {n}" for n in ONE), *(f"two, {n}" for n in TWO)])  # fmt: skip
def test_errors_of_noise_models_are_qiskits_own(gate: str, error: QuantumError) -> None:
    """Everywhere, and on some qubits in their order, where they take the place of what holds everywhere."""
    other = depolarizing_error(0.5, error.num_qubits)
    model = NoiseModel()
    model.add_all_qubit_quantum_error(error, [gate])
    place = (4, 2)[: error.num_qubits]
    model.add_quantum_error(other, [gate], list(place))
    noise = Noise.of(model)
    here, there = noise.after([gate], place), noise.after([gate], place[::-1] if len(place) > 1 else (0,))
    np.testing.assert_allclose(here, SuperOp(other).data, atol=1e-12)
    np.testing.assert_allclose(there, SuperOp(error).data, atol=1e-12)
    assert noise.after(["rz" if error.num_qubits == 1 else "cz"], place) is None
    assert noise.num_qubits is None
    assert noise.couplings == ()
    assert {"cx", "id", "rz", "sx"} <= set(noise.basis)


def test_noise_of_a_device_is_qiskits_own() -> None:
    model, noise = NoiseModel.from_backend(MANILA), Noise.of(MANILA)
    count = 0
    for gate, table in model._local_quantum_errors.items():
        for qubits, error in table.items():
            np.testing.assert_allclose(noise.after([gate], qubits), SuperOp(error).data, atol=1e-12)
            count += 1
    assert count == len(noise.channels) > 20
    assert not model._default_quantum_errors
    for (qubit,), error in model._local_readout_errors.items():
        assert noise.readout_of(qubit) == (error.probabilities[0, 1], error.probabilities[1, 0])
    assert noise.num_qubits == 5
    assert noise.couplings == ((0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2), (3, 4), (4, 3))
    assert noise.basis == ("cx", "id", "rz", "sx", "x")
    assert Noise.of(noise) is noise


def test_errors_that_are_none_leave_no_channel() -> None:
    model = NoiseModel()
    model.add_all_qubit_quantum_error(pauli_error([("I", 1.0)]), ["sx"])
    assert Noise.of(model).channels == ()


def test_the_order_of_errors_does_not_count() -> None:
    parts = [Channel("x", (q,), SuperOp(depolarizing_error(0.1 + q / 10, 1)).data) for q in range(3)]
    flips = [Readout(q, 0.1, 0.2) for q in range(3)]
    one, other = Noise(tuple(parts), tuple(flips)), Noise(tuple(parts[::-1]), tuple(flips[::-1]))
    assert Aer(noise=one).identity == Aer(noise=other).identity


def test_readout_errors_of_noise_models() -> None:
    model = NoiseModel()
    model.add_all_qubit_readout_error(ReadoutError([[0.9, 0.1], [0.2, 0.8]]))
    model.add_readout_error(ReadoutError([[0.97, 0.03], [0.06, 0.94]]), [3])
    noise = Noise.of(model)
    assert noise.readout_of(0) == (pytest.approx(0.1), pytest.approx(0.2))
    assert noise.readout_of(3) == (pytest.approx(0.03), pytest.approx(0.06))


def test_a_label_goes_before_a_name_and_both_before_every_gate() -> None:
    first, second, third = (SuperOp(depolarizing_error(p, 1)).data for p in (0.1, 0.2, 0.3))
    noise = Noise((Channel("", (), first), Channel("x", (), second), Channel("slow", (), third)))
    for names, expected in ((["y"], first), (["x"], second), (["slow", "x"], third), (["fast", "x"], second)):
        found = noise.after(names, (0,))
        assert found is not None
        np.testing.assert_array_equal(found, expected)


# -- what is refused -----------------------------------------------------------------------------------------------


def _model(error: Any, gate: str, add: str = "add_all_qubit_quantum_error") -> Callable[[], Any]:
    model = NoiseModel()
    getattr(model, add)(error, *([gate] if gate else []))
    return lambda: Noise.of(model)


def _shared_readout() -> Noise:
    model = NoiseModel()
    table = np.full((4, 4), 0.1) + 0.6 * np.eye(4)
    model.add_readout_error(ReadoutError(table), [0, 1])
    return Noise.of(model)


def _channel(matrix: Any, gate: str = "x") -> Callable[[], Any]:
    return lambda: Noise((Channel(gate, (), np.asarray(matrix)),))


TRANSPOSED = np.eye(4)[[0, 2, 1, 3]]  # keeps the trace, and takes entangled states out of all states
NOISE = Noise.depolarizing(0.1)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "negative chance": (lambda: Noise.depolarizing(-0.1), r"one_qubit is -0\.1; it must be a probability, from 0 to 1"),
    "chance above one": (lambda: Noise.depolarizing(0.1, 1.5), r"two_qubit is 1\.5"),
    "chance that is NaN": (lambda: Noise.depolarizing(readout=float("nan")), "readout is nan"),
    "chance as text": (lambda: Noise.depolarizing("high"), "one_qubit is 'high'"),  # type: ignore[arg-type]
    "chance as a boolean": (lambda: Noise.depolarizing(True), "one_qubit is True"),
    "flip above one": (lambda: Noise(readout=(Readout(0, 0.1, 1.1),)), r"readout is 1\.1"),
    "negative flip": (lambda: Noise(readout=(Readout(0, -0.1, 0.1),)), r"readout is -0\.1"),
    "noise of a number": (lambda: Noise.of(0.1), r"noise is a float; give hq\.Noise\.depolarizing"),
    "noise of a circuit": (lambda: Noise.of(QuantumCircuit(1)), "noise is a QuantumCircuit"),
    "three qubits": (_model(depolarizing_error(0.1, 3), "ccx"), "an error of 3 qubits after ccx; only one and two"),
    "labelled gate": (_model(depolarizing_error(0.1, 1), "slow"), "an error at 'slow', which is no gate of Qiskit"),
    "error of measuring": (_model(pauli_error([("X", 0.1), ("I", 0.9)]), "measure"), "an error at 'measure'"),
    "shared readout": (_shared_readout, "errors of readout that 2 qubits share; only errors of single qubits"),
    "three-qubit channel": (_channel(np.eye(64)), r"shape \(64, 64\); a channel acts on one or two qubits"),
    "no power of four": (_channel(np.eye(3)), r"shape \(3, 3\)"),
    "not square": (_channel(np.ones((4, 16))), r"shape \(4, 16\)"),
    "loses the trace": (_channel(0.9 * np.eye(4)), "noise after 'x' does not keep the trace"),
    "NaN in a channel": (_channel(np.full((4, 4), np.nan), ""), "after 'each gate' does not keep the trace"),
    "not positive": (_channel(TRANSPOSED), "noise after 'x' is not completely positive"),
    "unknown method": (
        lambda: Aer("exact"),
        f"'exact' is not a method of Aer here; give one of {', '.join(AER_METHODS)}",
    ),
    "method in capitals": (lambda: Aer("Statevector"), "'Statevector' is not a method"),
    "no method": (lambda: Aer(None), "None is not a method"),  # type: ignore[arg-type]
    "noise as a number": (lambda: Aer(noise=0.1), "noise is a float"),  # type: ignore[arg-type]
    "noisy stabilizer": (lambda: Aer("stabilizer", NOISE), "noise and method 'stabilizer' were asked for together"),
    "noisy MPS": (lambda: Aer("matrix_product_state", NOISE), "noise and method 'matrix_product_state'"),
    "bond of zero": (lambda: Aer("matrix_product_state", bond_dimension=0), "bond_dimension is 0; it must be an int"),
    "bond as a float": (lambda: Aer("matrix_product_state", bond_dimension=2.0), r"bond_dimension is 2\.0"),  # type: ignore[arg-type]
    "bond as a boolean": (lambda: Aer("matrix_product_state", bond_dimension=True), "bond_dimension is True"),
    "bond of a state vector": (lambda: Aer("statevector", bond_dimension=4), "bond_dimension is for method 'matrix_p"),
    "bond of whatever": (lambda: Aer(bond_dimension=4), "bond_dimension is for method 'matrix_product_state'"),
    "no function": (lambda: Backend("module"), "'module' does not name a backend; write 'module:function'"),
    "no module": (lambda: Backend(":function"), "':function' does not name a backend"),
    "empty": (lambda: Backend(""), "'' does not name a backend"),
    "an object": (lambda: Backend(MANILA), "does not name a backend"),  # type: ignore[arg-type]
    "arguments that are no data": (
        lambda: Backend("a:b", {"x": object()}),
        "arguments of the backend a:b are not JSON",
    ),
    "arguments that are NaN": (lambda: Backend("a:b", {"x": float("nan")}), "are not JSON data"),
    "arguments in a list": (lambda: Backend("a:b", [1]), "are not JSON data"),  # type: ignore[arg-type]
    "arguments as an array": (lambda: Backend("a:b", {"x": np.ones(2)}), "are not JSON data"),
    "level of four": (lambda: Backend("a:b", optimization_level=4), "optimization_level is 4; it must be 0, 1, 2 or 3"),
    "level of none": (lambda: Backend("a:b", optimization_level=None), "optimization_level is None"),  # type: ignore[arg-type]
    "name of nothing": (lambda: named_backend("fast"), "'fast' is not a method of Aer here"),
    "a number": (lambda: named_backend(5), r"the backend is a int; give hq\.Aer\(\.\.\.\), hq\.Adjoint\(\)"),
    "a class": (lambda: named_backend(FakeManilaV2), "the backend is a"),
    "Aer's own": (lambda: named_backend(AerSimulator()), r"Aer's own simulator; say what it does with hq\.Aer"),
    "made with arguments": (lambda: named_backend(GenericBackendV2(3)), "cannot be made again in another process"),
    "missing module": (lambda: loaded(Backend("no.such.module:f")), "could not be made: ModuleNotFoundError"),
    "missing function": (lambda: loaded(Backend("math:no")), "could not be made: AttributeError"),
    "wrong arguments": (lambda: loaded(Backend("math:sqrt", {"y": 1})), "could not be made: TypeError"),
    "own failure": (lambda: loaded(Backend("math:sqrt", {})), "math:sqrt could not be made"),
}


@pytest.mark.parametrize(("make", "words"), BAD.values(), ids=BAD.keys())
def test_what_is_written_wrongly_is_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(WorkflowError, match=words):
        make()


def test_a_backend_that_its_class_does_not_make_again_is_refused() -> None:
    changed = FakeManilaV2()
    changed.name = "mine"
    with pytest.raises(WorkflowError, match="is not the backend that was given"):
        named_backend(changed)

    class Local(FakeManilaV2):
        pass

    with pytest.raises(WorkflowError, match="cannot be made again in another process"):
        named_backend(Local())


# -- names, identities, data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, Aer()),
        ("aer", Aer()),
        *((method, Aer(method)) for method in AER_METHODS),
        ("adjoint", Adjoint()),
        (MANILA_NAME, Backend(MANILA_NAME)),
        (MANILA, Backend(MANILA_NAME)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_names(value: Any, expected: AnyBackend) -> None:
    found = named_backend(value)
    assert type(found) is type(expected)
    assert found.identity == expected.identity
    assert named_backend(found) is found


def test_a_backend_is_loaded_once() -> None:
    found = loaded(Backend("qiskit.providers.fake_provider:GenericBackendV2", {"num_qubits": 3, "seed": 1}))
    assert found.num_qubits == 3
    same = Backend("qiskit.providers.fake_provider:GenericBackendV2", {"seed": 1, "num_qubits": 3})
    assert loaded(same) is found
    assert loaded(Backend(same.source, {"seed": 1, "num_qubits": 4})).num_qubits == 4


def every() -> dict[str, AnyBackend]:
    """Backends that all differ, made anew."""
    one, two = (SuperOp(depolarizing_error(p, 1)).data for p in (0.1, 0.2))
    model = NoiseModel()
    model.add_all_qubit_quantum_error(TWO["other order"], ["cx"])
    source = "qiskit.providers.fake_provider:GenericBackendV2"
    return {
        **{method: Aer(method) for method in AER_METHODS},
        "bond": Aer("matrix_product_state", bond_dimension=8),
        "other bond": Aer("matrix_product_state", bond_dimension=9),
        "adjoint": Adjoint(),
        "noise": Aer(noise=Noise.depolarizing(0.1)),
        "noise of a method": Aer("density_matrix", Noise.depolarizing(0.1)),
        "other noise": Aer(noise=Noise.depolarizing(0.1 + 1e-15)),
        "two-qubit noise": Aer(noise=Noise.depolarizing(0, 0.1)),
        "no noise in it": Aer(noise=Noise()),
        "readout": Aer(noise=Noise(readout=(Readout(0, 0.1, 0.2),))),
        "readout elsewhere": Aer(noise=Noise(readout=(Readout(1, 0.1, 0.2),))),
        "readout turned": Aer(noise=Noise(readout=(Readout(0, 0.2, 0.1),))),
        "gate": Aer(noise=Noise((Channel("x", (), one),))),
        "other gate": Aer(noise=Noise((Channel("y", (), one),))),
        "on a qubit": Aer(noise=Noise((Channel("x", (0,), one),))),
        "other channel": Aer(noise=Noise((Channel("x", (), two),))),
        "in a basis": Aer(noise=Noise((Channel("x", (), one),), basis=("cx", "x"))),
        "couplings": Aer(noise=Noise(couplings=((0, 1),))),
        "couplings turned": Aer(noise=Noise(couplings=((1, 0),))),
        "of so many qubits": Aer(noise=Noise(num_qubits=3)),
        "model": Aer(noise=model),  # type: ignore[arg-type]
        "device": Aer(noise=MANILA),  # type: ignore[arg-type]
        "backend": Backend(MANILA_NAME),
        "level": Backend(MANILA_NAME, optimization_level=2),
        "arguments": Backend(source, {"num_qubits": 3, "seed": 1}),
        "other arguments": Backend(source, {"num_qubits": 3, "seed": 2}),
    }


EVERY = every()


def test_identities_tell_backends_apart_and_are_the_same_elsewhere() -> None:
    here = {name: backend.identity for name, backend in EVERY.items()}
    assert len(set(here.values())) == len(here)
    code = "import json, test_backends; print(json.dumps({n: b.identity for n, b in test_backends.every().items()}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here


@pytest.mark.parametrize("backend", EVERY.values(), ids=EVERY.keys())
def test_backends_survive_being_recorded(backend: AnyBackend) -> None:
    encoded = encode(backend)
    json.dumps(encoded.document, allow_nan=False)
    again = decode(encoded)
    assert type(again) is type(backend)
    assert again.identity == backend.identity
    assert encode(again) == encoded


def test_arguments_are_a_copy_and_their_order_does_not_count() -> None:
    arguments: dict[str, Any] = {"a": [1, 2], "b": "x"}
    backend, before = Backend("m:f", arguments), Backend("m:f", {"b": "x", "a": (1, 2)}).identity
    arguments["a"].append(3)
    arguments["c"] = 1
    assert backend.arguments == {"a": [1, 2], "b": "x"}
    assert backend.identity == before


# -- circuits as a backend has them --------------------------------------------------------------------------------

LINE = Noise(basis=("cx", "rz", "sx", "x"), couplings=((0, 1), (1, 2), (2, 3), (3, 4), (4, 5)), num_qubits=6)


def _edges(circuit: QuantumCircuit, qubits: tuple[int, ...]) -> set[tuple[int, ...]]:
    return {tuple(qubits[circuit.find_bit(q).index] for q in i.qubits) for i in circuit.data if len(i.qubits) == 2}


@settings(SETTINGS, max_examples=25)
@given(st.data())
def test_translated_circuits_mean_the_same(data: Any) -> None:
    """On a line of six qubits: each qubit's state is found at its place, and what takes no part is left out."""
    circuit = data.draw(circuits())
    row = np.random.default_rng(circuit.size()).uniform(-3, 3, circuit.num_parameters)
    made = physical_circuit(circuit, Aer(noise=LINE))
    small, places = made.circuit, made.places
    assert {i.name for i in small.data} <= {"cx", "rz", "sx", "x"}
    assert len(made.qubits) == small.num_qubits <= 6
    assert len(set(places)) == len(places) == circuit.num_qubits
    assert _edges(small, made.qubits) <= set(LINE.couplings)
    active = {small.find_bit(q).index for i in small.data for q in i.qubits} | set(places)
    assert active == set(range(small.num_qubits))
    named = dict(zip(circuit.parameters, row, strict=True))
    state = dense.state(small, [named[p] for p in small.parameters]).reshape((2,) * small.num_qubits)
    axes = [small.num_qubits - 1 - place for place in reversed(places)]
    others = [axis for axis in range(small.num_qubits) if axis not in axes]
    found = np.transpose(state, [*axes, *others]).reshape(2**circuit.num_qubits, -1)[:, 0]
    assert abs(np.vdot(found, dense.state(circuit, row))) == pytest.approx(1.0, abs=1e-10)


def test_without_a_basis_circuits_stay_as_written() -> None:
    circuit = QuantumCircuit(2)
    circuit.rx(Parameter("a"), 0)
    circuit.cp(Parameter("b"), 1, 0)
    for backend in (Aer(), Adjoint(), Aer("density_matrix"), Backend("types:SimpleNamespace")):
        assert physical_circuit(circuit, backend).circuit is circuit
    made = physical_circuit(circuit, Aer(noise=Noise.depolarizing(0.1, 0.2)))
    assert [i.name for i in made.circuit.data] == ["rx", "superop", "cp", "superop"]
    assert made.places == made.qubits == (0, 1)
    assert [[made.circuit.find_bit(q).index for q in i.qubits] for i in made.circuit.data] == [[0], [0], [1, 0], [1, 0]]


def test_channels_are_those_of_the_qubits_that_take_part() -> None:
    """A circuit of two qubits on a line whose gates differ from place to place."""
    channels = [
        Channel("cx", (a, b), SuperOp(depolarizing_error(0.1 * (a + 1) + 0.01 * b, 2)).data) for a, b in LINE.couplings
    ]
    noise = Noise(tuple(channels), tuple(Readout(q, 0.01 * q, 0.1) for q in range(6)), LINE.basis, LINE.couplings, 6)
    circuit = QuantumCircuit(3)
    circuit.cx(0, 1)
    circuit.cx(0, 2)
    circuit.cx(1, 2)
    made = physical_circuit(circuit, Aer(noise=noise))
    assert made.circuit.num_qubits < 6
    found = 0
    for before, after in zip(made.circuit.data, made.circuit.data[1:], strict=False):
        if before.name == "cx":
            place = tuple(made.qubits[made.circuit.find_bit(q).index] for q in before.qubits)
            assert after.name == "superop"
            assert after.qubits == before.qubits
            np.testing.assert_array_equal(after.params[0], noise.after(["cx"], place))
            found += 1
    assert found >= 3


@pytest.mark.parametrize(
    ("gate", "names"),
    [
        (XGate().control(1, ctrl_state=0), ["cx_o0", "superop"]),
        (UnitaryGate(random_unitary(4, seed=1)), ["unitary", "superop"]),
        (UnitaryGate(random_unitary(2, seed=1), label="mine"), ["unitary", "superop"]),
        (QFTGate(2), None),
        (XGate().control(2), None),
        (UnitaryGate(random_unitary(8, seed=1)), None),
    ],
)
def test_gates_have_noise_as_written_and_composite_ones_that_of_their_parts(gate: Gate, names: Any) -> None:
    circuit = QuantumCircuit(gate.num_qubits)
    circuit.append(gate, range(gate.num_qubits))
    made = [i.name for i in physical_circuit(circuit, Aer(noise=Noise.depolarizing(0.1, 0.2))).circuit.data]
    if names is not None:
        assert made == names
    else:
        assert made[1::2] == ["superop"] * (len(made) // 2)
        assert len(made) > 2
        assert "superop" not in made[0::2]


def test_a_custom_gate_with_a_known_name_is_its_definition() -> None:
    inside = QuantumCircuit(1, name="h")
    inside.rx(0.3, 0)
    inside.rz(0.2, 0)
    circuit = QuantumCircuit(1)
    circuit.append(inside.to_gate(), [0])
    made = physical_circuit(circuit, Aer(noise=Noise.depolarizing(0.1)))
    assert [i.name for i in made.circuit.data] == ["rx", "superop", "rz", "superop"]


def test_channels_of_the_researcher_resets_and_measurements() -> None:
    circuit = QuantumCircuit(1, 1)
    circuit.append(Kraus(SuperOp(amplitude_damping_error(0.2))).to_instruction(), [0])
    circuit.delay(10, 0)
    circuit.reset(0)
    circuit.barrier()
    circuit.measure(0, 0)
    noise = Noise((Channel("reset", (), SuperOp(depolarizing_error(0.1, 1)).data),))
    made = physical_circuit(circuit, Aer(noise=noise))
    assert [i.name for i in made.circuit.data] == ["kraus", "delay", "reset", "superop", "barrier", "measure"]


def test_composite_instructions_keep_their_classical_bits() -> None:
    inside = QuantumCircuit(2, 2)
    inside.x(0)
    inside.measure([0, 1], [1, 0])
    circuit = QuantumCircuit(3, 4)
    circuit.append(inside.to_instruction(), [2, 0], [3, 1])
    made = physical_circuit(circuit, Aer(noise=Noise.depolarizing(0.1))).circuit
    found = [([made.find_bit(q).index for q in i.qubits], [made.find_bit(c).index for c in i.clbits])
             for i in made.data if i.name == "measure"]  # fmt: skip
    assert found == [([2], [1]), ([0], [3])]


def test_classical_bits_keep_their_order() -> None:
    circuit = QuantumCircuit(2)
    circuit.add_bits([Clbit(), Clbit()])
    circuit.add_register(ClassicalRegister(2, "late"))
    circuit.x(0)
    circuit.measure([0, 1], [0, 3])
    made = physical_circuit(circuit, Aer(noise=LINE)).circuit
    measured = {made.find_bit(i.clbits[0]).index for i in made.data if i.name == "measure"}
    assert made.num_clbits == 4
    assert measured == {0, 3}


def test_a_qubit_that_was_measured_is_not_used_again() -> None:
    """Else a swap on the way from one neighbour to the other would spoil it; Qiskit's translation sees to that."""
    circuit = QuantumCircuit(3, 3)
    circuit.x(0)
    for pair in ((0, 1), (1, 2), (0, 2)):
        circuit.cx(*pair)
    circuit.measure(1, 1)
    for _ in range(3):
        circuit.cx(0, 2)
        circuit.rx(0.3, 0)
    circuit.measure([0, 2], [0, 2])
    made = physical_circuit(circuit, Aer(noise=LINE)).circuit
    done: set[Any] = set()
    for instruction in made.data:
        assert not done & set(instruction.qubits)
        if instruction.name == "measure":
            done |= set(instruction.qubits)
    assert len(done) == 3


def _branching() -> QuantumCircuit:
    circuit = QuantumCircuit(1, 1)
    with circuit.if_test((0, 1)):
        circuit.x(0)
    return circuit


def _mystery(width: int) -> QuantumCircuit:
    circuit = QuantumCircuit(width)
    circuit.append(Gate("mystery", width, [0.5]), range(width))
    return circuit


ON_MANILA = Aer(noise=MANILA)  # type: ignore[arg-type]
REFUSED: Mapping[str, tuple[QuantumCircuit, AnyBackend, str]] = {
    "device too small": (QuantumCircuit(6), ON_MANILA, "has 6 qubits, and the backend whose noise is taken has 5"),
    "backend too small": (QuantumCircuit(6), Backend(MANILA_NAME), f"has 6 qubits, and {MANILA_NAME} has 5; use a"),
    "branch": (_branching(), Aer(noise=NOISE), "the control flow 'if_else', which cannot be simulated with noise"),
    "branch on a device": (_branching(), Aer(noise=LINE), "the control flow 'if_else'"),
    "no definition": (_mystery(1), Aer(noise=NOISE), "'mystery' on 1 qubits has no definition"),
    "wide, no definition": (_mystery(3), Aer(noise=NOISE), "'mystery' on 3 qubits has no definition"),
    "no translation": (_mystery(1), Aer(noise=LINE), "cannot be translated to the gates of its backend"),
    "no translation to a backend": (_mystery(2), Backend(MANILA_NAME), "cannot be translated to the gates of its"),
}


@pytest.mark.parametrize(("circuit", "backend", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_circuits_that_do_not_fit_are_refused(circuit: QuantumCircuit, backend: AnyBackend, words: str) -> None:
    with pytest.raises(WorkflowError, match=words):
        physical_circuit(circuit, backend)


def test_translations_are_the_same_every_time() -> None:
    circuit = QuantumCircuit(5)
    for a, b in ((0, 4), (1, 3), (2, 4), (0, 3), (1, 4)):
        circuit.cx(a, b)
        circuit.ry(0.1 * a + b, a)
    for backend in (Aer(noise=LINE), Backend(MANILA_NAME), Backend(MANILA_NAME, optimization_level=3)):
        first, second = physical_circuit(circuit, backend), physical_circuit(circuit, backend)
        assert first.circuit == second.circuit
        assert (first.places, first.qubits) == (second.places, second.qubits)
