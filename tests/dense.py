"""The twin of every engine: state vectors, density matrices, channels and misread bits by dense matrices, slowly.

Qiskit says what the matrix of a gate and the superoperator of an error are; everything else is worked out here, and
nothing here is shared with what it checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from qiskit import QuantumCircuit, transpile
from qiskit.circuit.library import get_standard_gate_name_mapping
from qiskit.quantum_info import Pauli, SparsePauliOp, SuperOp
from qiskit_aer.noise import NoiseModel

Array = np.ndarray[Any, Any]
Gates = Iterable[tuple[str, tuple[int, ...]]]

_PASSIVE = ("barrier", "measure", "delay")


def _as_it_is(circuit: QuantumCircuit) -> tuple[QuantumCircuit, tuple[int, ...]]:
    return circuit, tuple(range(circuit.num_qubits))


def _no_noise(name: str, qubits: tuple[int, ...]) -> SuperOp | None:
    return None


@dataclass(frozen=True)
class Model:
    """Noise as the twin sees it."""

    after: Callable[[str, tuple[int, ...]], SuperOp | None] = _no_noise
    """What follows a gate of a name on qubits."""
    readout: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """By qubit, or -1 for all others: the chances of reading 1 for 0 and 0 for 1."""
    translated: Callable[[QuantumCircuit], tuple[QuantumCircuit, tuple[int, ...]]] = _as_it_is
    """The circuit that has the noise, and where each qubit of the given one is at its end."""

    def flips(self, qubit: int) -> tuple[float, float]:
        return self.readout.get(qubit, self.readout.get(-1, (0.0, 0.0)))


NOISELESS = Model()


def depolarizing(one_qubit: float, two_qubit: float, readout: float = 0.0) -> Model:
    """The completely mixed state with these chances: all Paulis alike."""
    channels = {}
    for width, chance in ((1, one_qubit), (2, two_qubit)):
        words = [Pauli(label).to_matrix() for label in _labels(width)]
        mixed = sum(np.kron(word.conj(), word) for word in words) / 4**width
        channels[width] = SuperOp((1 - chance) * np.eye(4**width) + chance * mixed)
    return Model(lambda name, qubits: channels.get(len(qubits)), {-1: (readout, readout)})


def _labels(width: int) -> list[str]:
    return [""] if width == 0 else [letter + rest for letter in "IXYZ" for rest in _labels(width - 1)]


def of_model(model: NoiseModel, couplings: Any = None) -> Model:
    """A Qiskit Aer noise model, by Qiskit's own superoperators of its errors."""
    anywhere = {name: SuperOp(error) for name, error in model._default_quantum_errors.items()}
    local = {
        (name, qubits): SuperOp(error)
        for name, table in model._local_quantum_errors.items()
        for qubits, error in table.items()
    }

    def after(name: str, qubits: tuple[int, ...]) -> SuperOp | None:
        return local.get((name, qubits), anywhere.get(name))

    known: dict[int, tuple[QuantumCircuit, QuantumCircuit, tuple[int, ...]]] = {}

    def translated(circuit: QuantumCircuit) -> tuple[QuantumCircuit, tuple[int, ...]]:
        if id(circuit) not in known:
            gates = [
                name for name in model.basis_gates if name in ("cx", "cz", "ecr", "h", "id", "rx", "rz", "sx", "x")
            ]
            placed = transpile(
                circuit, basis_gates=gates, coupling_map=couplings, optimization_level=1, seed_transpiler=0
            )
            places: Any = range(circuit.num_qubits)
            if placed.layout is not None:
                places = placed.layout.final_index_layout(filter_ancillas=True)[: circuit.num_qubits]
            known[id(circuit)] = circuit, placed, tuple(places)
        return known[id(circuit)][1:]

    readout = {place[0]: error.probabilities for place, error in model._local_readout_errors.items()}
    if model._default_readout_error is not None:
        readout[-1] = model._default_readout_error.probabilities
    return Model(after, {qubit: (table[0, 1], table[1, 0]) for qubit, table in readout.items()}, translated)


# -- states --------------------------------------------------------------------------------------------------------


def _apply(state: Array, matrix: Array, qubits: Sequence[int]) -> Array:
    count = len(qubits)
    axes = [state.ndim - 1 - q for q in reversed(qubits)]
    state = np.tensordot(matrix.reshape((2,) * (2 * count)), state, axes=(range(count, 2 * count), axes))
    return np.moveaxis(state, range(count), axes)


def state(circuit: QuantumCircuit, row: Any) -> Array:
    """Amplitudes, shape (2**qubits,)."""
    found = np.zeros((2,) * circuit.num_qubits, dtype=complex)
    found[(0,) * circuit.num_qubits] = 1
    for instruction in circuit.assign_parameters(row).data:
        if instruction.name not in _PASSIVE:
            qubits = [circuit.find_bit(q).index for q in instruction.qubits]
            matrix = np.asarray(instruction.operation.to_matrix())
            found = _apply(found, matrix, qubits) if qubits else found * matrix[0, 0]
    return found.reshape(-1)


def values(circuit: QuantumCircuit, observables: Sequence[SparsePauliOp], theta: Any) -> Array:
    """Exact expectation values without noise, shape (rows, observables)."""
    rows = [state(circuit, row) for row in np.atleast_2d(theta)]
    matrices = [observable.to_matrix() for observable in observables]
    return np.array([[np.vdot(found, m @ found).real for m in matrices] for found in rows])


def density(circuit: QuantumCircuit, row: Any, model: Model = NOISELESS) -> Array:
    """The state of a translated circuit, with the model's channel after each gate as it stands there.

    Columns of the density matrix one below the other, as Qiskit's superoperators take them: shape (2,) * 2 qubits, the
    rows' bits as those of qubits 0 to n - 1 and the columns' as n to 2n - 1.
    """
    n = circuit.num_qubits
    found = np.zeros((2,) * (2 * n), dtype=complex)
    found[(0,) * (2 * n)] = 1
    bound = circuit.assign_parameters(row)
    for instruction in bound.data:
        qubits = tuple(bound.find_bit(q).index for q in instruction.qubits)
        if instruction.name in _PASSIVE or not qubits:
            continue
        operation = instruction.operation
        if operation.name in ("kraus", "superop"):
            found = _mixed(found, SuperOp(operation), qubits)
        else:
            found = _turned(found, np.asarray(operation.to_matrix()), qubits)
        noise = model.after(instruction.name, qubits)
        if noise is not None:
            found = _mixed(found, noise, qubits)
    return found


def _turned(found: Array, matrix: Array, qubits: Sequence[int]) -> Array:
    columns = [q + found.ndim // 2 for q in qubits]
    return _apply(_apply(found, matrix, qubits), matrix.conj(), columns)


def _mixed(found: Array, channel: SuperOp, qubits: Sequence[int]) -> Array:
    return _apply(found, channel.data, [*qubits, *(q + found.ndim // 2 for q in qubits)])


_MATRICES = {
    name: np.asarray(get_standard_gate_name_mapping()[name].to_matrix()) for name in ("h", "s", "sdg", "cx", "cz")
}


def _chances(found: Array, model: Model, gates: Gates = ()) -> Array:
    """Chances of what is read after ``gates`` that have no noise, shape (2,) * qubits, the last qubit first."""
    n = found.ndim // 2
    for name, qubits in gates:
        found = _turned(found, _MATRICES[name], qubits)
    chances = found.reshape(2**n, 2**n).diagonal().real.reshape((2,) * n)
    for qubit in range(n):
        up, down = model.flips(qubit)
        if up or down:
            chances = _apply(chances, np.array([[1 - up, down], [up, 1 - down]]), [qubit])
    return chances


def noisy_values(circuit: QuantumCircuit, observables: Sequence[SparsePauliOp], theta: Any, model: Model) -> Array:
    """Exact values, shape (rows, observables): each Pauli measured on its own, in a basis of each qubit."""
    placed, places = model.translated(circuit)
    members = [o.apply_layout(places, placed.num_qubits) for o in observables]
    rows = [density(placed, _own(placed, circuit, row), model) for row in np.atleast_2d(theta)]
    return np.array([[_value(found, o, model) for o in members] for found in rows])


def _own(placed: QuantumCircuit, circuit: QuantumCircuit, row: Any) -> dict[Any, float]:
    """Values by parameter, of those that the translation left."""
    named = dict(zip(circuit.parameters, row, strict=True))
    return {parameter: named[parameter] for parameter in placed.parameters}


_TURNS = {"X": ("h",), "Y": ("sdg", "h"), "Z": (), "I": ()}


def _value(found: Array, observable: SparsePauliOp, model: Model) -> float:
    total = 0.0
    for label, coefficient in observable.to_list():
        letters = label[::-1]
        chances = _chances(found, model, [(g, (q,)) for q, letter in enumerate(letters) for g in _TURNS[letter]])
        for letter in label:  # axes go from the last qubit to the first, as labels do
            chances = chances.sum(axis=0) if letter == "I" else chances[0] - chances[1]
        total += coefficient.real * float(chances)
    return total


def distribution(circuit: QuantumCircuit, row: Any, model: Model = NOISELESS, gates: Gates = ()) -> Array:
    """Chances of what is read of the circuit's qubits after ``gates`` on the translated one, shape (2**qubits,)."""
    placed, places = model.translated(circuit)
    chances = _chances(density(placed, _own(placed, circuit, row), model), model, list(gates))
    last = placed.num_qubits - 1
    kept = [last - place for place in reversed(places)]
    others = tuple(axis for axis in range(last + 1) if axis not in kept)
    return np.transpose(chances, [*kept, *others]).reshape(2 ** len(places), -1).sum(axis=1)


def measured_value(circuit: QuantumCircuit, groups: Any, row: Any, model: Model = NOISELESS) -> float:
    """What measuring in groups of the translated circuit (gates, masks, coefficients) comes to on average."""
    placed, _ = model.translated(circuit)
    found = density(placed, _own(placed, circuit, row), model)
    total = float(groups.constant)
    for group in groups.groups:
        chances = _chances(found, model, list(group.gates)).reshape(-1)
        for mask, coefficient in zip(group.masks[:, 0], group.coefficients, strict=True):
            odd = np.bitwise_count(np.arange(len(chances), dtype=np.uint64) & mask) % 2
            total += coefficient * float(chances @ (1.0 - 2.0 * odd))
    return total


def slopes(value: Callable[[Array], Array], theta: Array, step: float = 4e-3) -> Array:
    """Derivatives of ``value`` at a row of parameters, by differences of order 8: shape (observables, parameters)."""
    columns = []
    for direction in np.eye(len(theta)):
        ends = {k: value(theta + k * step * direction) - value(theta - k * step * direction) for k in (1, 2, 3, 4)}
        weights = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
        columns.append(sum(weights[k] * ends[k] for k in weights) / step)
    return np.stack(columns, axis=-1) if columns else np.zeros((len(value(theta)), 0))
