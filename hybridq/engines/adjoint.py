"""The adjoint engine: exact values with gradients, through the C++ core of pennylane-lightning used bare.

Everything that does not depend on the parameters is made once for a template: the list of gates, the state they act
on, and the observable as sparse matrices. A row then costs one pass of the gates, one product with the observable,
which gives the value and the state to start back from, and one pass back for all derivatives (Jones and Gacon,
arXiv:2009.02823).
"""

from __future__ import annotations

import functools
import heapq
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qiskit.quantum_info import SparsePauliOp
from scipy.sparse import csr_array
from threadpoolctl import ThreadpoolController

from hybridq.engines.costs import OPERATOR_ENTRIES, operator_split
from hybridq.engines.guard import Numbers, Prepared, evaluate_each
from hybridq.engines.lowering import AS_ROTATIONS, ROTATIONS, Basis, Binder, lower, unbound, without_identity
from hybridq.errors import EngineFailed, HybridqError, WorkflowError
from hybridq.program import Outcome, Program, Template, physical

__all__ = ["AdjointEngine"]

Array = NDArray[Any]

_CACHE_BYTES = 2**27  # of prepared templates
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_KEPT_STATE = 2**20  # bytes of a state that stays allocated between programs
_BYTES_PER_GATE = 3072  # measured 1.5 to 3.1 KiB for a gate with a parameter
_NARROW = 9  # qubits up to which sums with signs are one product with a matrix
_DENSE = 6  # qubits up to which an observable is a full matrix, 64 KiB: calling a sparse one takes longer than its work
_FUSED = 14  # qubits from which on a pass over the state costs more than making the product of two matrices
_BUILT = 2**16  # entries of a matrix that are made at a time
_TOGETHER = 2**17  # bytes of states of the pass back that are summed at once


class AdjointEngine:
    """Evaluates exact programs in this process on one thread. Not for use by several threads at once.

    ``max_bytes`` is the memory that one program may take, in bytes. Raises `EngineFailed` where pennylane-lightning is
    not installed.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        _core()
        self._prepared: Prepared[_Prepared] = Prepared(_CACHE_BYTES)
        self._threads = ThreadpoolController()
        # an engine process, whose libraries were loaded with one thread each and are left so
        self._single = self._are_single() and all(os.environ.get(name) == "1" for name in _THREADS)

    def evaluate(self, programs: Sequence[Program], max_bytes: int | None = None) -> list[Outcome | HybridqError]:
        """Evaluate each program by its plan; a failed one is an error in its place and harms no other.

        ``max_bytes`` lowers the engine's own bound for this call. Errors: `TooLarge` before anything runs, with both
        numbers; `WorkflowError` for what has no exact value, naming the instruction; `EngineFailed` with the library's
        words.
        """
        allowed = self.max_bytes if max_bytes is None else min(max_bytes, self.max_bytes)
        with self._one_thread():
            return evaluate_each("The adjoint engine", programs, allowed, self._compute)

    def _one_thread(self) -> Any:
        """One thread for all numerical libraries, because more may change bits; cheap where that is so already."""
        return nullcontext() if self._single or self._are_single() else self._threads.limit(limits=1)

    def _are_single(self) -> bool:
        return all(library.get_num_threads() == 1 for library in self._threads.lib_controllers)

    def _compute(self, program: Program) -> Numbers:
        template, plan = physical(program.template), program.plan
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


Item = tuple[_Gate, list[float]]
"""A gate with its angle of now, in a list that is written to; an empty list for none."""


class _Calls:
    """What is called on a state of lightning's, one call after the other.

    ``back`` is for the inverses of gates, ``shift`` what is added to their wires.
    """

    def __init__(self, state: Any, num_qubits: int, *, shift: int = 0, back: bool = False) -> None:
        self._state, self._fused, self._shift, self._back = state, num_qubits >= _FUSED, shift, back
        self._products: list[_Products] = []
        self._calls: list[tuple[Any, tuple[Any, ...]]] = []

    def add(self, items: Sequence[Item]) -> None:
        """Gates; for many qubits, those of them that share one qubit as one."""
        moved = [
            (
                replace(gate, wires=[wire + self._shift for wire in gate.wires], inverse=gate.inverse != self._back),
                angle,
            )
            for gate, angle in items
        ]
        runs = list(_runs(moved)) if self._fused else [[item] for item in moved]
        products = _Products([run for run in runs if len(run) > 1])
        if len(products.matrices):
            self._products.append(products)
        matrices = iter(products.matrices)
        for run in runs:
            one = len(run) == 1
            fused = () if one else (next(matrices), run[0][0].wires, False)
            self._calls.append(_call(self._state, *run[0]) if one else (self._state.applyMatrix, fused))

    def read(self, into: Array) -> None:
        """The state as it is then, copied ``into`` an array, shape (2^n,)."""
        self._calls.append((self._state.getState, (into,)))

    def run(self) -> None:
        """Make the calls, gates with their angles of now."""
        for products in self._products:
            products.update()
        for method, arguments in self._calls:
            method(*arguments)


def _call(state: Any, gate: _Gate, angle: list[float]) -> tuple[Any, tuple[Any, ...]]:
    if gate.matrix is not None:
        return state.applyMatrix, (gate.matrix, gate.wires, gate.inverse)
    return getattr(state, gate.name), (gate.wires, gate.inverse, angle)


def _runs(items: Sequence[Item]) -> Iterator[list[Item]]:
    """The same gates in an order of the same effect, gates on one qubit that follow each other together."""
    pending: dict[int, list[Item]] = {}
    for item in items:
        wires = item[0].wires
        if len(wires) == 1 and item[0].name in _SINGLE:
            pending.setdefault(wires[0], []).append(item)
            continue
        for wire in wires:
            if wire in pending:
                yield pending.pop(wire)
        yield [item]
    yield from pending.values()


# Gates on one qubit as cos(angle/2) times the first matrix plus sin(angle/2) times the second.
_PAULIS = {
    "X": np.array([[0, 1], [1, 0]], dtype=np.complex128),
    "Y": np.array([[0, -1j], [1j, 0]], dtype=np.complex128),
    "Z": np.array([[1, 0], [0, -1]], dtype=np.complex128),
}
_SINGLE: dict[str, tuple[Array, Array]] = {
    "Hadamard": ((_PAULIS["X"] + _PAULIS["Z"]) / np.sqrt(2), 0 * _PAULIS["X"]),
    **{f"R{letter}": (np.eye(2, dtype=np.complex128), -1j * pauli) for letter, pauli in _PAULIS.items()},
}


class _Products:
    """Products of matrices of gates on one qubit, made anew for the angles of each row."""

    def __init__(self, runs: Sequence[Sequence[Item]]) -> None:
        depth = max(map(len, runs), default=0)
        self.matrices = np.zeros((len(runs), 2, 2), dtype=np.complex128)
        self._even = np.zeros((depth, len(runs), 2, 2), dtype=np.complex128)
        self._odd = np.zeros_like(self._even)
        self._even[...] = np.eye(2)
        self._angles = [
            [(run[place][1] or [0.0]) if place < len(run) else [0.0] for run in runs] for place in range(depth)
        ]
        for number, run in enumerate(runs):
            for place, (gate, _) in enumerate(run):
                even, odd = _SINGLE[gate.name]
                self._even[place, number] = even
                self._odd[place, number] = -odd if gate.inverse else odd

    def update(self) -> None:
        halves = np.array([[angle[0] for angle in angles] for angles in self._angles])[..., None, None] / 2
        factors = np.cos(halves) * self._even + np.sin(halves) * self._odd
        product = factors[0]
        for factor in factors[1:]:
            product = np.einsum("nij,njk->nik", factor, product)
        self.matrices[...] = product


class _Forward:
    """A state, and the calls that take it from zero to the end of the circuit."""

    def __init__(self, num_qubits: int, items: Sequence[Item]) -> None:
        self._state = _core().StateVectorC128(num_qubits)
        self._ket = np.empty(2**num_qubits, dtype=np.complex128)
        self._calls = _Calls(self._state, num_qubits)
        self._calls.add(items)
        self._calls.read(self._ket)

    def run(self) -> Array:
        """The amplitudes with the angles of now, in a buffer that is used again."""
        self._state.resetStateVector()
        self._calls.run()
        return self._ket


class _Prepared:
    """A template compiled: gates, and observables as operators."""

    def __init__(self, template: Template) -> None:
        lowered = lower(template.circuit, _BASIS)
        self._qubits = template.num_qubits
        self._binder = Binder(lowered.expressions, template.positions, template.num_parameters)
        numbers = {slot: number for number, slot in enumerate(lowered.slots)}
        gates = [g for i in lowered.circuit.data for g in _gates(i, lowered.circuit, numbers)]
        self._items = [(gate, list(gate.angle)) for gate in gates]
        self._open = [angle for gate, angle in self._items if gate.slot is not None]
        slots = [gate.slot for gate in gates if gate.slot is not None]
        self._slots = None if slots == list(range(len(lowered.slots))) else np.array(slots, dtype=np.intp)
        """Of the gates that have one; None where they are all slots in their order."""
        limit = OPERATOR_ENTRIES // max(1, len(template.observables))
        self._constants: list[float] = []
        self._measured: list[tuple[int, _Operator]] = []
        for column, observable in enumerate(template.observables):
            constant, rest = without_identity(observable)
            self._constants.append(constant)
            if rest is not None:
                self._measured.append((column, _Operator(rest, limit)))
        self.nbytes = (
            _BYTES_PER_GATE * (len(gates) + 1)
            + sum(gate.matrix.nbytes for gate in gates if gate.matrix is not None)
            + sum(operator.nbytes for _, operator in self._measured)
        )
        self._passes: tuple[_Forward, _Back | None] | None = None
        if 16 << self._qubits <= _KEPT_STATE:
            back = self._back()
            self._passes = self._forward(), back
            self.nbytes += (32 << self._qubits) + back.nbytes

    def _forward(self) -> _Forward:
        return _Forward(self._qubits, self._items)

    def _back(self) -> _Back:
        return _Back(self._qubits, self._items)

    def evaluate(self, theta: Array, values: Array, gradients: Array | None) -> None:
        """Write values, shape (rows, observables), and gradients, shape (rows, observables, parameters), if wanted."""
        values[...] = self._constants
        if not self._measured:
            return
        forward, back = self._passes or (self._forward(), None)
        if gradients is not None and back is None:
            back = self._back()
        for row, slots in enumerate(self._binder.bind(theta)):
            angles = slots if self._slots is None else slots[self._slots]
            for angle, value in zip(self._open, angles.tolist(), strict=True):
                angle[0] = value
            ket = forward.run()
            slopes = None if gradients is None else np.zeros((len(self._constants), len(slots)))
            for column, operator in self._measured:
                bra = operator @ ket
                values[row, column] += bra.view(np.float64) @ ket.view(np.float64)
                if slopes is not None and back is not None:
                    own = back.slopes(ket, bra)
                    slopes[column] = own if self._slots is None else np.bincount(self._slots, own, minlength=len(slots))
            if gradients is not None and slopes is not None:
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


# -- the pass back -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Readings:
    """Which angle each reading is of, and the signs that it sums with: all readings of some pauses of the pass back."""

    numbers: Array
    """Of the angles with slots, shape (readings,)."""
    pauses: Array
    """The pause that each reading is made in."""
    low: Array
    """Signs of the different words on the low qubits, shape (states of these, words)."""
    columns: Array
    """Which of these words each reading has."""
    high: Array | None
    """Signs on the other qubits, shape (readings, states of these); None where all qubits are low."""

    def sums(self, weights: Array) -> Array:
        """The sums of ``weights``, shape (pauses, 2^n), with each reading's signs, shape (readings,)."""
        if self.high is None:
            sums: Array = (weights @ self.low)[self.pauses, self.columns]
        else:
            halves = weights.reshape(len(weights), -1, len(self.low)) @ self.low
            sums = (self.high * halves[self.pauses, :, self.columns]).sum(axis=1)
        return sums


class _Back:
    """Ket and bra walked back as one state of a qubit more, rotations about words of Zs read off together.

    The derivative by the angle of exp(-i angle/2 P) is Im <bra|P|ket>. Between changes of basis every P is a word of
    Zs, so all that stand side by side are sums with signs over one vector, Im(bra* ket): where an inner product for
    each angle was, there is one vector for each layer. Of small states those of many layers are kept and summed at
    once, since calling numpy takes longer than its work there.
    """

    def __init__(self, num_qubits: int, items: Sequence[Item]) -> None:
        self._state = _core().StateVectorC128(num_qubits + 1)
        self._count = sum(gate.slot is not None for gate, _ in items)
        numbers = iter(range(self._count - 1, -1, -1))
        steps = [step for item in reversed(items) for step in _steps(item, numbers)]
        pauses = list(_scheduled(steps))
        together = max(1, min(len(pauses), _TOGETHER // (32 << num_qubits)))
        self._stacks = np.empty((together, 2, 2**num_qubits), dtype=np.complex128)
        self._flat = list(self._stacks.reshape(together, -1))
        ket, bra = self._stacks[:, 0], self._stacks[:, 1]
        factors = bra.real, ket.imag, bra.imag, ket.real
        buffers = np.empty((2, together, 2**num_qubits))
        last = len(pauses) % together or together
        views = {count: [array[:count] for array in (*factors, *buffers)] for count in (together, last)}
        self.parts: list[tuple[_Calls, list[Array], _Readings]] = []
        """Pauses that are summed at once: the calls up to the last of them, views of their states, what is read off."""
        known: dict[tuple[int, ...], tuple[Array, Array, Array | None]] = {}
        self.nbytes = (32 << num_qubits) + self._stacks.nbytes + buffers.nbytes
        """Of the states, 80 bytes an amplitude or `_TOGETHER` and half of it, and of the signs."""
        for start in range(0, len(pauses), together):
            part = pauses[start : start + together]
            calls = _Calls(self._state, num_qubits + 1, shift=1, back=True)
            for (before, _), flat in zip(part, self._flat, strict=False):  # the last part may be shorter
                calls.add([step.item for step in before])
                calls.read(flat)
            readings = [(pause, step) for pause, (_, read) in enumerate(part) for step in read]
            words = tuple(sum(1 << num_qubits - 1 - wire for wire in step.wires) for _, step in readings)
            if words not in known:
                known[words] = _signs(words, num_qubits)
                self.nbytes += sum(array.nbytes for array in known[words] if array is not None)
            own, places = np.array([step.number for _, step in readings]), np.array([pause for pause, _ in readings])
            self.parts.append((calls, views[len(part)], _Readings(own, places, *known[words])))

    def slopes(self, ket: Array, bra: Array) -> Array:
        """2 Re <bra| d ket> by each angle that has a slot, in the order of the gates, at the angles of now."""
        slopes = np.empty(self._count)
        self._stacks[0, 0], self._stacks[0, 1] = ket, bra
        self._state.updateData(self._flat[0])
        for calls, (bra_real, ket_imag, bra_imag, ket_real, weights, scratch), readings in self.parts:
            calls.run()
            np.multiply(bra_real, ket_imag, out=weights)
            np.multiply(bra_imag, ket_real, out=scratch)
            weights -= scratch
            slopes[readings.numbers] = readings.sums(weights)
        return slopes


@dataclass(frozen=True)
class _Step:
    """A gate of the pass back, undone there; with the number of its slot, one whose derivative is read off before."""

    item: Item
    number: int | None = None

    @property
    def wires(self) -> list[int]:
        return self.item[0].wires


# The rotation about a word of Zs, and the gate that takes each qubit from its basis to that of Z when it is undone.
_BASES: dict[str, tuple[str, _Gate | None]] = {
    "RX": ("RZ", _Gate("Hadamard", [])), "RY": ("RZ", _Gate("RX", [], True, angle=(np.pi / 2,))), "RZ": ("RZ", None),
    "IsingXX": ("IsingZZ", _Gate("Hadamard", [])), "IsingZZ": ("IsingZZ", None),
    "IsingYY": ("IsingZZ", _Gate("RX", [], True, angle=(np.pi / 2,))),
}  # fmt: skip


def _steps(item: Item, numbers: Iterator[int]) -> list[_Step]:
    """A gate as steps of the pass back, in their order."""
    gate, angle = item
    if gate.slot is None:
        return [_Step(item)]
    name, basis = _BASES[gate.name]
    rotation = _Step((replace(gate, name=name), angle), next(numbers))
    if basis is None:
        return [rotation]
    there = [replace(basis, wires=[wire]) for wire in gate.wires]
    back = [replace(gate, inverse=not gate.inverse) for gate in there]
    return [*(_Step((g, list(g.angle))) for g in there), rotation, *(_Step((g, list(g.angle))) for g in back)]


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
        for wire in step.wires:
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


def _signs(words: Sequence[int], num_qubits: int) -> tuple[Array, Array, Array | None]:
    """``low``, ``columns`` and ``high`` of `_Readings` of ``words``, masks of the qubits that have a Z."""
    low_qubits = num_qubits if num_qubits <= _NARROW else num_qubits // 2
    masks = np.array(words, dtype=np.int64)
    low, columns = np.unique(masks & ((1 << low_qubits) - 1), return_inverse=True)
    high = None
    if low_qubits < num_qubits:
        high = _parity_signs(np.arange(1 << num_qubits - low_qubits) & (masks >> low_qubits)[:, None])
    return _parity_signs(np.arange(1 << low_qubits)[:, None] & low), columns, high


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
        low = operator_split(flips, signs, n, limit)
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
        self._dense = self._parts[0][2].toarray() if n <= _DENSE and low == n else None
        self.nbytes += 0 if self._dense is None else self._dense.nbytes

    def __matmul__(self, state: Array) -> Array:
        """The operator on ``state``, shape (2^n,)."""
        if self._dense is not None:
            product: Array = self._dense @ state
            return product
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
