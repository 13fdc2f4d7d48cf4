"""The adjoint engine: exact values with gradients, through the C++ core of pennylane-lightning used bare.

Everything that does not depend on the parameters is made once for a template: the list of gates, the state they act
on, and the observable as sparse matrices. A row then costs one pass of the gates, one product with the observable,
which gives the value and the state to start back from, and one pass back for all derivatives.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from qiskit.quantum_info import SparsePauliOp
from scipy.sparse import csr_array

from hybridq.engines.guard import Numbers, Prepared, evaluate_each, mark_peak
from hybridq.engines.lowering import AS_ROTATIONS, ROTATIONS, Basis, Binder, lower, unbound, without_identity
from hybridq.errors import EngineFailed, HybridqError, WorkflowError
from hybridq.program import OPERATOR_ENTRIES, Outcome, Program, Template

__all__ = ["AdjointEngine"]

Array = NDArray[Any]

_CACHE_BYTES = 2**27  # of prepared templates
_KEPT_STATE = 2**20  # bytes of a state that stays allocated between programs
_BYTES_PER_GATE = 1024
_WIDE = 1  # qubits from which on a pass back over layers is faster than one over angles
_BUILT = 2**16  # entries of a matrix that are made at a time


class AdjointEngine:
    """Evaluates exact programs in this process on one thread. Not for use by several threads at once.

    ``max_bytes`` is the memory that one program may take, in bytes. Raises `EngineFailed` where pennylane-lightning is
    not installed.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        _core()
        self._prepared: Prepared[_Prepared] = Prepared(_CACHE_BYTES)
        mark_peak()

    def evaluate(self, programs: Sequence[Program], max_bytes: int | None = None) -> list[Outcome | HybridqError]:
        """Evaluate each program by its plan; a failed one is an error in its place and harms no other.

        ``max_bytes`` lowers the engine's own bound for this call. Errors: `TooLarge` before anything runs, with both
        numbers; `WorkflowError` for what has no exact value, naming the instruction; `EngineFailed` with the library's
        words.
        """
        allowed = self.max_bytes if max_bytes is None else min(max_bytes, self.max_bytes)
        return evaluate_each("The adjoint engine", programs, allowed, self._compute)

    def _compute(self, program: Program) -> Numbers:
        template, plan = program.template, program.plan
        if plan.sampling != "exact" or not template.observables:
            raise WorkflowError("the adjoint engine gives exact expectation values only; plan 'aer' for samples.")
        if plan.gradient not in ("none", "adjoint"):
            raise WorkflowError(f"the adjoint engine has no gradient by {plan.gradient!r}; plan 'none' or 'adjoint'.")
        prepared = self._prepared.get(template.digest, lambda: _Prepared(template))
        values = np.empty((program.rows, len(template.observables)))
        gradients = None if plan.gradient == "none" else np.zeros((*values.shape, template.num_parameters))
        prepared.evaluate(program.theta, values, gradients)
        return Numbers(values, np.zeros(values.shape), None, gradients)


@functools.cache
def _core() -> Any:
    """The compiled module of pennylane-lightning, which needs neither pennylane nor a device."""
    try:
        from pennylane_lightning import lightning_qubit_ops
    except ImportError as error:
        raise EngineFailed(
            f"the adjoint engine needs pennylane-lightning, which cannot be imported ({error}); install it with: "
            'pip install "hybridq-scheduler[adjoint]"'
        ) from error
    return lightning_qubit_ops


# -- circuits ----------------------------------------------------------------------------------------------------

# By the name in Qiskit: the name in lightning, and whether it is the inverse of that.
_NAMED: dict[str, tuple[str, bool]] = {
    "ccx": ("Toffoli", False), "cp": ("ControlledPhaseShift", False), "crx": ("CRX", False), "cry": ("CRY", False),
    "crz": ("CRZ", False), "cswap": ("CSWAP", False), "cu1": ("ControlledPhaseShift", False), "cx": ("CNOT", False),
    "cy": ("CY", False), "cz": ("CZ", False), "h": ("Hadamard", False), "p": ("PhaseShift", False),
    "rx": ("RX", False), "rxx": ("IsingXX", False), "ry": ("RY", False), "ryy": ("IsingYY", False),
    "rz": ("RZ", False), "rzz": ("IsingZZ", False), "s": ("S", False), "sdg": ("S", True), "swap": ("SWAP", False),
    "sx": ("SX", False), "sxdg": ("SX", True), "t": ("T", False), "tdg": ("T", True), "u1": ("PhaseShift", False),
    "x": ("PauliX", False), "y": ("PauliY", False), "z": ("PauliZ", False),
}  # fmt: skip
# Applied as matrices, as are the others where they have open controls.
_MATRICES = frozenset((
    "ccz", "ch", "cs", "csdg", "csx", "cu", "cu3", "dcx", "ecr", "iswap", "r", "rccx", "u", "u2", "u3", "unitary",
    "xx_minus_yy", "xx_plus_yy",
))  # fmt: skip
_BASIS = Basis("The adjoint engine", frozenset(_NAMED) | _MATRICES, ROTATIONS, AS_ROTATIONS)


@dataclass(frozen=True)
class _Gate:
    """One gate as lightning takes it."""

    name: str
    wires: list[int]
    """Wire 0 is the most significant bit of a basis state: Qiskit's last qubit."""
    inverse: bool = False
    matrix: Array | None = None
    angle: tuple[float, ...] = ()
    """Empty, or one angle, which means nothing where there is a slot."""
    slot: int | None = None


class _Forward:
    """A state, and the calls that take it from zero to the end of the circuit."""

    def __init__(self, num_qubits: int, gates: Sequence[_Gate], angles: Sequence[list[float]]) -> None:
        self.state = _core().StateVectorC128(num_qubits)
        self._calls = [_call(self.state, gate, angle) for gate, angle in zip(gates, angles, strict=True)]
        self.ket = np.empty(2**num_qubits, dtype=np.complex128)

    def run(self) -> Array:
        """The amplitudes with the angles of now, in a buffer that is used again."""
        self.state.resetStateVector()
        for method, arguments in self._calls:
            method(*arguments)
        self.state.getState(self.ket)
        return self.ket


def _call(state: Any, gate: _Gate, angle: list[float], *, shift: int = 0, back: bool = False) -> tuple[Any, Any]:
    """The method of ``state`` that applies a gate, or its inverse, and the arguments, wires shifted by ``shift``."""
    wires, inverse = [wire + shift for wire in gate.wires], gate.inverse != back
    if gate.matrix is not None:
        return state.applyMatrix, (gate.matrix, wires, inverse)
    return getattr(state, gate.name), (wires, inverse, angle)


class _Prepared:
    """A template compiled: gates, and observables as operators."""

    def __init__(self, template: Template) -> None:
        lowered = lower(template.circuit, _BASIS)
        self._qubits = template.num_qubits
        self._binder = Binder(lowered.expressions, template.circuit.parameters)
        numbers = {slot: number for number, slot in enumerate(lowered.slots)}
        self._gates = [g for i in lowered.circuit.data for g in _gates(i, lowered.circuit, numbers)]
        self._angles = [list(gate.angle) for gate in self._gates]
        self._open = [angle for gate, angle in zip(self._gates, self._angles, strict=True) if gate.slot is not None]
        self._slots = np.array([gate.slot for gate in self._gates if gate.slot is not None], dtype=np.intp)
        limit = OPERATOR_ENTRIES // max(1, len(template.observables))
        self._constants: list[float] = []
        self._operators: list[_Operator | None] = []
        for observable in template.observables:
            constant, rest = without_identity(observable)
            self._constants.append(constant)
            self._operators.append(None if rest is None else _Operator(rest, limit))
        self._kept: tuple[_Forward, _Back] | None = None
        kept = 16 << self._qubits <= _KEPT_STATE
        if kept:
            self._kept = self._passes()
        self.nbytes = (
            _BYTES_PER_GATE * (len(self._gates) + 1)
            + sum(2 * gate.matrix.nbytes for gate in self._gates if gate.matrix is not None)
            + sum(operator.nbytes for operator in self._operators if operator is not None)
            + (128 << self._qubits if kept else 0)
        )

    def _passes(self) -> tuple[_Forward, _Back]:
        back = _Signs if self._qubits >= _WIDE else _Products
        return _Forward(self._qubits, self._gates, self._angles), back(self._qubits, self._gates, self._angles)

    def evaluate(self, theta: Array, values: Array, gradients: Array | None) -> None:
        """Write values, shape (rows, observables), and gradients, shape (rows, observables, parameters), if wanted."""
        values[...] = self._constants
        if not any(self._operators):
            return
        forward, back = self._kept or self._passes()
        for row, slots in enumerate(self._binder.bind(theta)):
            for angle, value in zip(self._open, slots[self._slots].tolist(), strict=True):
                angle[0] = value
            ket = forward.run()
            slopes = np.zeros((len(self._operators), len(slots)))
            for column, operator in enumerate(self._operators):
                if operator is None:
                    continue
                bra = operator @ ket
                values[row, column] += _overlap(bra, ket)
                if gradients is not None and self._open:
                    np.add.at(slopes[column], self._slots, back.slopes(forward, bra))
            if gradients is not None:
                gradients[row] = self._binder.chain(theta[row], slopes)


def _gates(instruction: Any, circuit: Any, slots: dict[Any, int]) -> list[_Gate]:
    operation = instruction.operation
    qubits = [circuit.find_bit(qubit).index for qubit in instruction.qubits]
    wires = [circuit.num_qubits - 1 - qubit for qubit in qubits]
    if operation.name == "rzx":
        basis = _Gate("Hadamard", wires[1:])
        return [basis, _rotation("IsingZZ", wires, operation.params[0], slots), basis]
    if operation.name not in _NAMED:
        matrix = np.array(operation.to_matrix(), dtype=np.complex128, order="C")  # writable, as lightning asks
        return [_Gate("QubitUnitary", wires[::-1], matrix=matrix)]  # the first wire is the most significant here too
    name, inverse = _NAMED[operation.name]
    if operation.params:
        return [_rotation(name, wires, operation.params[0], slots)]
    return [_Gate(name, wires, inverse)]


def _rotation(name: str, wires: list[int], angle: Any, slots: dict[Any, int]) -> _Gate:
    if unbound(angle):
        return _Gate(name, wires, angle=(0.0,), slot=slots[angle])
    return _Gate(name, wires, angle=(float(angle),))


def _overlap(bra: Array, ket: Array) -> float:
    """Re <bra|ket>, summed by numpy itself: a linear algebra library may split the sum over threads."""
    return float(np.einsum("i,i->", bra.view(np.float64), ket.view(np.float64)))


# -- the pass back -----------------------------------------------------------------------------------------------


class _Back(Protocol):
    def slopes(self, forward: _Forward, bra: Array) -> Array:
        """2 Re <bra| d ket> by each angle that has a slot, in the order of the gates, at the angles of now."""


class _Products:
    """By lightning's own pass, an inner product for each angle: the least calls, so the fastest for few qubits."""

    def __init__(self, num_qubits: int, gates: Sequence[_Gate], angles: Sequence[list[float]]) -> None:
        nothing = np.zeros((0, 0), dtype=np.complex128)
        matrices = [nothing if gate.matrix is None else gate.matrix for gate in gates]
        names, wires, inverses = (
            zip(*((g.name, g.wires, g.inverse) for g in gates), strict=True) if gates else ((),) * 3
        )
        controls: list[list[int]] = [[]] * len(gates)
        self._arguments = (names, angles, wires, inverses, matrices, controls, controls)
        with_angle = [gate for gate in gates if gate.angle]
        self._trainable = [i for i, gate in enumerate(with_angle) if gate.slot is not None]
        self._algorithms = _core().algorithms

    def slopes(self, forward: _Forward, bra: Array) -> Array:
        operations = self._algorithms.create_ops_listC128(*self._arguments)
        products = self._algorithms.VectorJacobianProductC128()(forward.state, operations, bra, self._trainable)
        slopes: Array = 2 * products.real
        return slopes


@dataclass(frozen=True)
class _Group:
    """Rotations about words of Zs, none of which has to wait for another."""

    numbers: Array
    """Which of the angles with slots, shape (rotations,)."""
    low: Array
    """Signs of the different words on the lower half of the qubits, shape (states of these, words)."""
    columns: Array
    """Which of these words each rotation has."""
    high: Array
    """Signs on the other qubits, shape (rotations, states of these)."""

    def sums(self, weights: Array) -> Array:
        """The sums of ``weights``, shape (2^n,), with each rotation's signs, shape (rotations,)."""
        halves = weights.reshape(-1, len(self.low)) @ self.low
        sums: Array = (self.high * halves[:, self.columns].T).sum(axis=1)
        return sums


class _Signs:
    """Ket and bra walked back as one state of a qubit more, rotations about words of Zs read off together.

    The derivative by the angle of exp(-i angle/2 P) is Im <bra|P|ket>. Between changes of basis every P is a word of
    Zs, so all that stand side by side are sums with signs over one vector, Im(bra* ket): an inner product for each
    angle becomes one vector for each layer.
    """

    def __init__(self, num_qubits: int, gates: Sequence[_Gate], angles: Sequence[list[float]]) -> None:
        self._state = _core().StateVectorC128(num_qubits + 1)
        self._stack = np.empty((2, 2**num_qubits), dtype=np.complex128)
        self._weights, self._scratch = np.empty((2, 2**num_qubits))
        numbers = itertools.count(sum(gate.slot is not None for gate in gates) - 1, -1)
        steps = [
            step
            for gate, angle in zip(reversed(gates), reversed(angles), strict=True)
            for step in _steps(gate, angle, numbers)
        ]
        self._count = sum(gate.slot is not None for gate in gates)
        known: dict[tuple[int, ...], tuple[Array, Array, Array]] = {}
        self._segments: list[tuple[list[tuple[Any, Any]], _Group]] = []
        for before, together in _scheduled(steps):
            calls = [_call(self._state, step.gate, step.angle, shift=1, back=True) for step in before]
            words = tuple(sum(1 << num_qubits - 1 - wire for wire in step.gate.wires) for step in together)
            if words not in known:
                known[words] = _signs(words, num_qubits)
            group = _Group(np.array([step.number for step in together]), *known[words])
            self._segments.append((calls, group))

    def slopes(self, forward: _Forward, bra: Array) -> Array:
        slopes = np.empty(self._count)
        self._stack[0], self._stack[1] = forward.ket, bra
        self._state.updateData(self._stack.reshape(-1))
        ket, bra = self._stack
        for calls, group in self._segments:
            for method, arguments in calls:
                method(*arguments)
            self._state.getState(self._stack.reshape(-1))
            np.multiply(bra.real, ket.imag, out=self._weights)
            np.multiply(bra.imag, ket.real, out=self._scratch)
            self._weights -= self._scratch
            slopes[group.numbers] = group.sums(self._weights)
        return slopes


@dataclass(frozen=True)
class _Step:
    """A gate of the pass back, undone there; with the number of its slot, one whose derivative is read off before."""

    gate: _Gate
    angle: list[float]
    number: int | None = None


# The rotation about a word of Zs, and the gate that takes each qubit from its basis to that of Z when it is undone.
_BASES: dict[str, tuple[str, _Gate | None]] = {
    "RX": ("RZ", _Gate("Hadamard", [])), "RY": ("RZ", _Gate("RX", [], True, angle=(np.pi / 2,))), "RZ": ("RZ", None),
    "IsingXX": ("IsingZZ", _Gate("Hadamard", [])), "IsingZZ": ("IsingZZ", None),
    "IsingYY": ("IsingZZ", _Gate("RX", [], True, angle=(np.pi / 2,))),
}  # fmt: skip


def _steps(gate: _Gate, angle: list[float], numbers: Iterator[int]) -> list[_Step]:
    """A gate as steps of the pass back, in their order."""
    if gate.slot is None:
        return [_Step(gate, angle)]
    name, basis = _BASES[gate.name]
    rotation = _Step(replace(gate, name=name), angle, next(numbers))
    if basis is None:
        return [rotation]
    there = [_Step(replace(basis, wires=[wire]), list(basis.angle)) for wire in gate.wires]
    back = [_Step(replace(basis, wires=[wire], inverse=not basis.inverse), list(basis.angle)) for wire in gate.wires]
    return [*there, rotation, *back]


def _scheduled(steps: Sequence[_Step]) -> Iterator[tuple[list[_Step], list[_Step]]]:
    """Steps to take and then rotations to read off together, over and over; a rotation is undone after its reading.

    A step waits for those before it that share a wire, but rotations, all diagonal, do not wait for each other.
    """
    waiting = [0] * len(steps)
    followers: list[list[int]] = [[] for _ in steps]
    walls: dict[int, int] = {}
    runs: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        before: set[int] = set()
        for wire in step.gate.wires:
            run = runs.setdefault(wire, [])
            if run and step.number is None:
                before.update(run)
            elif wire in walls:
                before.add(walls[wire])
            if step.number is None:
                walls[wire] = index
                runs[wire] = []
            else:
                run.append(index)
        waiting[index] = len(before)
        for earlier in before:
            followers[earlier].append(index)
    ready = [index for index, count in enumerate(waiting) if count == 0]
    heapq.heapify(ready)
    taken: list[_Step] = []
    readable: list[int] = []

    def finish(index: int) -> None:
        for follower in followers[index]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heapq.heappush(ready, follower)

    while ready or readable:
        while ready:
            index = heapq.heappop(ready)
            if steps[index].number is None:
                taken.append(steps[index])
                finish(index)
            else:
                readable.append(index)
        if not readable:
            return  # whatever is left to undo comes before every derivative
        together = [steps[index] for index in readable]
        yield taken, together
        taken = list(together)
        for index in readable:
            finish(index)
        readable = []


def _signs(words: Sequence[int], num_qubits: int) -> tuple[Array, Array, Array]:
    """``low``, ``columns`` and ``high`` of a `_Group` of ``words``, masks of the qubits that have a Z."""
    low_qubits = num_qubits // 2
    masks = np.array(words, dtype=np.int64)
    low, columns = np.unique(masks & ((1 << low_qubits) - 1), return_inverse=True)
    return (
        _parity_signs(np.arange(1 << low_qubits)[:, None] & low),
        columns,
        _parity_signs(np.arange(1 << num_qubits - low_qubits) & (masks >> low_qubits)[:, None]),
    )


def _parity_signs(bits: Array) -> Array:
    """1.0 where an even number of bits is set, -1.0 where an odd one is."""
    signs: Array = 1.0 - 2.0 * (np.bitwise_count(bits) & 1)
    return signs


# -- observables -------------------------------------------------------------------------------------------------


class _Operator:
    """A sum of Paulis as sparse matrices on the low qubits, each under a Pauli word of flips and signs on the high.

    Paulis that flip the same qubits are one entry a row. All qubits are low ones where the entries stay within
    ``limit``; where they do not, the largest number of low qubits is taken that does.
    """

    def __init__(self, observable: SparsePauliOp, limit: int) -> None:
        n = observable.num_qubits
        powers = 1 << np.arange(n, dtype=np.int64)
        flips, signs = observable.paulis.x @ powers, observable.paulis.z @ powers
        coefficients = observable.coeffs.real * 1j ** (observable.paulis.x & observable.paulis.z).sum(axis=1)
        low = next(low for low in range(n, -1, -1) if _entries(flips, signs, low) <= limit or low == 0)
        self._shape = (1 << n - low, 1 << low)
        self._parts: list[tuple[int, Array, Any]] = []
        high = np.arange(1 << n - low, dtype=np.int64)
        keys, members = np.unique(np.stack([flips >> low, signs >> low]), axis=1, return_inverse=True)
        mask = (1 << low) - 1
        for number, (flip, sign) in enumerate(keys.T.tolist()):
            own = members.reshape(-1) == number
            matrix = _matrix(flips[own] & mask, signs[own] & mask, coefficients[own], 1 << low)
            self._parts.append((flip, _parity_signs((high ^ flip) & sign), matrix))
        self.nbytes = sum(20 * matrix.nnz + 4 * matrix.shape[0] + signs.nbytes for _, signs, matrix in self._parts)

    def __matmul__(self, state: Array) -> Array:
        """The operator on ``state``, shape (2^n,)."""
        if self._shape[0] == 1:
            image: Array = self._parts[0][2] @ state
            return image
        blocks = state.reshape(self._shape)
        images = np.zeros_like(blocks)
        for block, image in enumerate(images):
            for flip, signs, matrix in self._parts:
                part = matrix @ blocks[block ^ flip]
                if signs[block] > 0:
                    image += part
                else:
                    image -= part
        return images.reshape(-1)


def _entries(flips: Array, signs: Array, low: int) -> int:
    """Entries of all matrices together, with ``low`` qubits in them."""
    keys = np.stack([flips >> low, signs >> low, flips & ((1 << low) - 1)])
    return int(np.unique(keys, axis=1).shape[1]) << low


def _matrix(flips: Array, signs: Array, coefficients: Array, size: int) -> Any:
    """The sum of Paulis, of coefficients with the factors of their Ys, on the ``size`` states of some qubits.

    A Pauli takes state j to j ^ flip, with the sign of the parity of j & sign.
    """
    masks, members = np.unique(flips, return_inverse=True)
    threshold = 2.0**-52 * np.abs(coefficients).sum()  # sums that cancel leave their rounding errors
    step = max(1, _BUILT // len(masks))
    parts = [
        _rows(np.arange(start, min(start + step, size)), flips, signs, coefficients, masks, members, threshold)
        for start in range(0, size, step)
    ]
    counts, columns, entries = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return csr_array((entries, columns, starts), shape=(size, size))


def _rows(
    rows: Array, flips: Array, signs: Array, coefficients: Array, masks: Array, members: Array, threshold: float
) -> tuple[Array, Array, Array]:
    """Of some rows of `_matrix`: how many entries each has, their columns, and the entries."""
    entries = np.zeros((len(masks), len(rows)), dtype=np.complex128)
    for flip, sign, coefficient, member in zip(flips, signs, coefficients, members, strict=True):
        entries[member] += coefficient * _parity_signs((rows ^ flip) & sign)
    columns = rows[:, None] ^ masks
    order = np.argsort(columns, axis=1)
    columns = np.take_along_axis(columns, order, axis=1)
    sorted_entries = np.take_along_axis(entries.T, order, axis=1)
    kept = np.abs(sorted_entries) > threshold
    return kept.sum(axis=1), columns[kept].astype(np.int32), sorted_entries[kept]
