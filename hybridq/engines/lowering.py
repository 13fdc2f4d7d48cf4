"""Circuits as an engine takes them: native gates whose open parameters are slots, and slots from rows of parameters.

Nothing is optimised: an instruction that an engine does not take is replaced by its definition, or by an exact
identity of gates that the engine does take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qiskit import QuantumCircuit, transpile
from qiskit.circuit import ControlFlowOp, Gate, Instruction, Parameter, ParameterExpression
from qiskit.circuit.exceptions import CircuitError
from qiskit.circuit.library import (
    CRYGate,
    CRZGate,
    RXGate,
    RXXGate,
    RYGate,
    RYYGate,
    RZGate,
    RZXGate,
    RZZGate,
    SdgGate,
    SGate,
    XGate,
)
from qiskit.exceptions import QiskitError
from qiskit.quantum_info import Kraus, SparsePauliOp, SuperOp

from hybridq.errors import EngineFailed, WorkflowError
from hybridq.program import CHANNELS

__all__ = [
    "AS_ROTATIONS",
    "ROTATIONS",
    "Basis",
    "Binder",
    "Lowered",
    "Rewrite",
    "as_channel",
    "lower",
    "unbound",
    "without_identity",
]

Array = NDArray[Any]

Rewrite = Callable[..., Sequence[tuple[Gate, tuple[int, ...]]]]
"""From a gate's parameters to gates of the same effect, each with the positions of its qubits among the gate's own; a
phase that does not depend on the state may differ."""

# Without any effect on what is measured.
_DROPPED = frozenset(("barrier", "delay", "global_phase", "id"))
_NOT_UNITARY = frozenset(("initialize", "measure", "reset"))


@dataclass(frozen=True)
class Basis:
    """What an engine takes."""

    engine: str
    """Its name in messages."""
    native: frozenset[str]
    """Gates of Qiskit's library that it applies when all their parameters are numbers."""
    bindable: Mapping[str, type[Gate]]
    """Gates whose parameters may be slots."""
    rewrites: Mapping[str, Rewrite]
    """What becomes of other gates, in place of their definitions."""
    channels: str | None = None
    """How it takes instructions that are quantum channels: ``superop``, ``kraus``, or not at all."""
    shared: bool = True
    """Whether equal expressions are one slot, or each occurrence has its own."""


@dataclass(frozen=True)
class Lowered:
    """A circuit of native gates, each of whose open parameters is a slot: a parameter of its own, one value a row."""

    circuit: QuantumCircuit
    slots: tuple[Parameter, ...]
    expressions: tuple[ParameterExpression, ...]
    """What each slot is, in the parameters of the researcher's circuit."""
    measured: tuple[tuple[int, int], ...]
    """Final measurements, (qubit, classical bit)."""


def lower(circuit: QuantumCircuit, basis: Basis) -> Lowered:
    """``circuit`` in ``basis``.

    Raises `WorkflowError` for an instruction that is not unitary, other than a final measurement, and `EngineFailed`
    for one that has no definition.
    """
    return _Lowering(circuit, basis).run()


class _Lowering:
    """One walk over a circuit."""

    def __init__(self, circuit: QuantumCircuit, basis: Basis) -> None:
        self._source = circuit
        self._basis = basis
        self._target = QuantumCircuit(circuit.num_qubits)
        self._known: dict[ParameterExpression, Parameter] = {}
        self._slots: list[Parameter] = []
        self._expressions: list[ParameterExpression] = []
        self._measured: dict[int, int] = {}

    def run(self) -> Lowered:
        self._walk(self._source, list(range(self._source.num_qubits)))
        measured = tuple((qubit, clbit) for clbit, qubit in self._measured.items())
        return Lowered(self._target, tuple(self._slots), tuple(self._expressions), measured)

    def _walk(self, circuit: QuantumCircuit, wires: list[int]) -> None:
        indices = {qubit: wire for qubit, wire in zip(circuit.qubits, wires, strict=True)}
        for instruction in circuit.data:
            qubits = [indices[q] for q in instruction.qubits]
            if instruction.name == "measure" and circuit is self._source:
                # by classical bit: a later measurement into the same bit is the one that counts
                self._measured[circuit.find_bit(instruction.clbits[0]).index] = qubits[0]
            elif instruction.name not in _DROPPED:
                self._add(instruction.operation, qubits)

    def _add(self, operation: Any, qubits: list[int]) -> None:
        basis = self._basis
        if isinstance(operation, ControlFlowOp) or (operation.name in _NOT_UNITARY and not isinstance(operation, Gate)):
            raise WorkflowError(
                f"the circuit has the instruction {operation.name!r} inside, which is not a gate; an exact value needs "
                "gates alone. Remove it, or use hq.sample on a circuit that has it at the top level."
            )
        if operation.name in CHANNELS:
            self._add_channel(operation, qubits)
            return
        base, _, control_state = operation.name.partition("_o")
        # names alone do not tell: a researcher's own gate may have any name
        known = getattr(operation, "base_class", type(operation)).__module__.startswith("qiskit.circuit.library.")
        parameters = [p for p in getattr(operation, "params", ()) if unbound(p)]
        if known and not parameters and base in basis.native:
            self._target.append(operation, qubits, copy=False)
        elif known and operation.name in basis.bindable:
            gate = basis.bindable[operation.name](*map(self._slot, operation.params))
            self._target.append(gate, qubits, copy=False)
        elif known and base in basis.rewrites and (parameters or base not in basis.native):
            opened = [qubits[0]] if control_state == "0" else []
            self._flip(opened)
            for gate, positions in basis.rewrites[base](*operation.params):
                self._add(gate, [qubits[position] for position in positions])
            self._flip(opened)
        else:
            self._walk(_definition(operation, basis.engine), qubits)

    def _add_channel(self, operation: Any, qubits: list[int]) -> None:
        wanted = self._basis.channels
        if wanted is None:
            raise WorkflowError(
                f"the circuit has the instruction {operation.name!r}, which is not unitary, and {self._basis.engine} "
                "takes gates alone here; use method='density_matrix'."
            )
        self._target.append(as_channel(operation, wanted), qubits, copy=False)

    def _flip(self, qubits: list[int]) -> None:
        for qubit in qubits:
            self._target.append(XGate(), [qubit])

    def _slot(self, value: Any) -> Any:
        if not unbound(value):
            return float(value)
        shared = self._basis.shared and _hashable(value)
        if shared and value in self._known:
            return self._known[value]
        slot = Parameter(f"slot{len(self._slots)}")
        self._slots.append(slot)
        self._expressions.append(value)
        if shared:
            self._known[value] = slot
        return slot


def as_channel(operation: Any, wanted: str) -> Instruction:
    """A quantum channel, ``superop`` or ``kraus``, as the ``wanted`` one of these."""
    if operation.name == wanted:
        return operation
    if wanted == "kraus":
        return Kraus(SuperOp(operation.params[0])).to_instruction()
    return Instruction("superop", operation.num_qubits, 0, [SuperOp(Kraus(list(operation.params))).data])


def unbound(value: Any) -> bool:
    """Whether ``value`` is an expression with parameters that have no number yet."""
    return isinstance(value, ParameterExpression) and bool(value.parameters)


def _hashable(expression: ParameterExpression) -> bool:
    """Whether Qiskit can hash it: 2.6 cannot where the parameters cancel and a negative number is left."""
    try:
        hash(expression)
    except OverflowError:
        return False
    return True


def _definition(operation: Any, engine: str) -> QuantumCircuit:
    try:
        definition = getattr(operation, "definition", None)
    except CircuitError:
        definition = None
    if definition is not None:
        circuit: QuantumCircuit = definition
        return circuit
    # what has no definition (permutations, gates with annotations) is synthesised by Qiskit
    whole = QuantumCircuit(operation.num_qubits)
    try:
        whole.append(operation, whole.qubits)
        synthesised: QuantumCircuit = transpile(whole, basis_gates=["cx", "u"], optimization_level=0)
    except QiskitError as error:
        raise EngineFailed(
            f"{engine} cannot run the instruction {operation.name!r}, and it has no definition; decompose it into "
            f"gates. ({error})"
        ) from error
    return synthesised


# -- gates with open parameters as rotations about Pauli words ----------------------------------------------------

ROTATIONS: Mapping[str, type[Gate]] = {
    "rx": RXGate, "rxx": RXXGate, "ry": RYGate, "ryy": RYYGate, "rz": RZGate, "rzx": RZXGate, "rzz": RZZGate,
}  # fmt: skip
"""Gates exp(-i angle/2 P), P a Pauli word: what can be differentiated by a rule."""


def _phase(angle: Any) -> Any:
    return [(RZGate(angle), (0,))]


def _u(theta: Any, phi: Any, lam: Any) -> Any:
    return [(RZGate(lam), (0,)), (RYGate(theta), (0,)), (RZGate(phi), (0,))]


def _controlled_phase(angle: Any) -> Any:
    return [(RZGate(angle / 2), (0,)), (RZGate(angle / 2), (1,)), (RZZGate(angle / -2), (0, 1))]


def _cry(angle: Any) -> Any:
    word = [(SdgGate(), (1,)), (RZXGate(angle / -2), (0, 1)), (SGate(), (1,))]  # S X S^-1 = Y
    return [(RYGate(angle / 2), (1,)), *word]


def _cu(theta: Any, phi: Any, lam: Any, gamma: Any) -> Any:
    # U(theta, phi, lam) is RZ(phi) RY(theta) RZ(lam) times the phase exp(i (phi + lam)/2), which the control sees
    phase = gamma + (phi + lam) / 2
    return [(RZGate(phase), (0,)), (CRZGate(lam), (0, 1)), (CRYGate(theta), (0, 1)), (CRZGate(phi), (0, 1))]


# A rotation by an angle on one value of a control is half of it on both, and the other half with the control's sign.
AS_ROTATIONS: Mapping[str, Rewrite] = {
    "cp": _controlled_phase,
    "crx": lambda angle: [(RXGate(angle / 2), (1,)), (RZXGate(angle / -2), (0, 1))],
    "cry": _cry,
    "crz": lambda angle: [(RZGate(angle / 2), (1,)), (RZZGate(angle / -2), (0, 1))],
    "cu": _cu,
    "cu1": _controlled_phase,
    "cu3": lambda theta, phi, lam: _cu(theta, phi, lam, 0.0),
    "p": _phase,
    "r": lambda theta, phi: [(RZGate(-phi), (0,)), (RXGate(theta), (0,)), (RZGate(phi), (0,))],
    "u": _u,
    "u1": _phase,
    "u2": lambda phi, lam: _u(np.pi / 2, phi, lam),
    "u3": _u,
}
"""Library gates with open parameters as `ROTATIONS` and gates without parameters, exactly."""


# -- slots from parameters, and back -----------------------------------------------------------------------------


class Binder:
    """Values of slots from rows of parameters, and derivatives by parameters from those by slots.

    Linear expressions all at once, any other by Qiskit row by row.
    """

    def __init__(
        self, expressions: Sequence[ParameterExpression], positions: Mapping[Parameter, int], width: int
    ) -> None:
        """``positions`` are the columns of the parameters among ``width`` values of a row."""
        terms: list[list[tuple[int, float]]] = []
        self.width = len(expressions)
        self._parameters = width
        self._constants = np.zeros((len(expressions), 1))
        self._general: list[tuple[int, ParameterExpression, list[tuple[Parameter, int]]]] = []
        for slot, expression in enumerate(expressions):
            linear = _linear(expression, positions)
            terms.append([] if linear is None else linear[1])
            if linear is None:
                own = sorted(((p, positions[p]) for p in expression.parameters), key=lambda pair: pair[1])
                self._general.append((slot, expression, own))
            else:
                self._constants[slot] = linear[0]
        most = max(map(len, terms), default=0)
        self._columns = np.zeros((most, len(expressions)), dtype=np.intp)
        self._factors = np.zeros((most, len(expressions), 1))
        for slot, pairs in enumerate(terms):
            for term, (column, factor) in enumerate(pairs):
                self._columns[term, slot] = column
                self._factors[term, slot] = factor
        bare = most == 1 and not self._general and not self._constants.any() and bool((self._factors == 1.0).all())
        self._bare = self._columns[0] if bare else None
        self._same = bare and self._columns[0].tolist() == list(range(width))
        """Whether the slots are the parameters."""

    def bind(self, theta: Array) -> Array:
        """Values of shape (rows, slots) of ``theta``, shape (rows, parameters), to be read: it may be ``theta``.

        Elementwise products and sums in a fixed order, no linear algebra: a row's bits are its own.
        """
        if self._same:
            return theta
        if self._bare is not None:
            return theta[:, self._bare]
        transposed = theta.T
        values = np.broadcast_to(self._constants, (len(self._constants), len(theta))).copy()
        for columns, factors in zip(self._columns, self._factors, strict=True):
            values += factors * transposed[columns]
        for slot, expression, own in self._general:
            values[slot] = [float(expression.bind({p: row[column] for p, column in own})) for row in theta.tolist()]
        return values.T

    def slots_of(self, columns: slice) -> Array:
        """Which slots the derivatives by the parameters in ``columns`` are made of, bool, shape (slots,)."""
        slots, found, _ = self._slopes
        wanted = np.zeros(self._parameters, dtype=bool)
        wanted[columns] = True
        used = np.zeros(self.width, dtype=bool)
        used[slots[wanted[found]]] = True
        return used

    def chain(self, row: Array, slopes: Array) -> Array:
        """Derivatives by the parameters, shape (observables, parameters), from ``slopes`` by the slots at ``row``.

        ``slopes`` has shape (observables, slots), ``row`` shape (parameters,). Sums run in the order of the slots. What
        comes back is to be read: it may be ``slopes``.
        """
        if self._same:
            return slopes
        slots, columns, factors = self._slopes
        if self._general:
            values = row.tolist()
            general = [
                float(slope.bind({p: values[i] for p, i in own})) if own else slope
                for slope, own in self._general_slopes
            ]
            factors = np.concatenate([factors, general])
        return np.array(
            [np.bincount(columns, factors * own[slots], minlength=self._parameters) for own in slopes]
        ).reshape(len(slopes), self._parameters)

    @cached_property
    def _slopes(self) -> tuple[Array, Array, Array]:
        """Slot, column and factor of each derivative; the factors of linear expressions only, which come first."""
        term, slot = np.nonzero(self._factors[:, :, 0])
        slots = [*slot.tolist(), *(slot for slot, _, own in self._general for _ in own)]
        columns = [*self._columns[term, slot].tolist(), *(column for _, _, own in self._general for _, column in own)]
        return np.array(slots, dtype=np.intp), np.array(columns, dtype=np.intp), self._factors[term, slot, 0]

    @cached_property
    def _general_slopes(self) -> list[tuple[Any, list[tuple[Parameter, int]]]]:
        """Derivatives of the other expressions: numbers, or expressions with the parameters that are left in them."""
        slopes: list[tuple[Any, list[tuple[Parameter, int]]]] = []
        for _, expression, own in self._general:
            for parameter, _ in own:
                slope = expression.gradient(parameter)
                left = slope.parameters if isinstance(slope, ParameterExpression) else ()
                slopes.append((slope if left else float(slope), [(p, column) for p, column in own if p in left]))
        return slopes


def _linear(
    expression: ParameterExpression, positions: Mapping[Parameter, int]
) -> tuple[float, list[tuple[int, float]]] | None:
    """Constant and (column, factor) pairs of a linear expression with real factors, None for any other."""
    if isinstance(expression, Parameter):
        return 0.0, [(positions[expression], 1.0)]
    pairs: list[tuple[int, float]] = []
    for parameter in sorted(expression.parameters, key=positions.__getitem__):
        factor = expression.gradient(parameter)
        if unbound(factor):
            return None
        factor = complex(factor)
        if factor.imag:
            return None
        pairs.append((positions[parameter], factor.real))
    constant = complex(expression.bind(dict.fromkeys(expression.parameters, 0.0)))
    return None if constant.imag else (constant.real, pairs)


# -- observables -------------------------------------------------------------------------------------------------


def without_identity(observable: SparsePauliOp) -> tuple[float, SparsePauliOp | None]:
    """The identity's coefficient, and the other Paulis with equal ones added up (None if nothing is left)."""
    simple = observable.simplify(atol=0.0, rtol=0.0)
    identity = ~(simple.paulis.x.any(axis=1) | simple.paulis.z.any(axis=1))
    constant = float(simple.coeffs[identity].real.sum())
    rest = ~identity & (simple.coeffs.real != 0.0)
    if not rest.any():
        return constant, None
    return constant, SparsePauliOp(simple.paulis[rest], simple.coeffs[rest].real)
