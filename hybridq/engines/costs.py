"""What a program asks of a device, known before it runs: pure functions of the program.

Bytes are upper bounds of what is measured (``python -m benchmarks memory``). Seconds are estimates, a sum of terms with
coefficients that were fitted to measured times (``python -m benchmarks seconds``); they decide where a program goes,
never what it computes.
"""

from __future__ import annotations

import math
import operator
import statistics
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from qiskit.quantum_info import SparsePauliOp

from hybridq.backends import Aer, Noise
from hybridq.engines.lowering import AS_ROTATIONS, ROTATIONS, Basis, lower, unbound, without_identity
from hybridq.engines.measuring import Measured, measured, split
from hybridq.errors import WorkflowError
from hybridq.location import Location
from hybridq.program import CHANNELS, Outcome, Program, Request, Template, physical, program
from hybridq.resources import Need

__all__ = [
    "DEFAULT",
    "LEAST",
    "OPERATOR_ENTRIES",
    "TERMS",
    "Calibration",
    "Census",
    "Corrections",
    "Timed",
    "calibrate",
    "calibration_programs",
    "census",
    "features",
    "fingerprint",
    "fitted",
    "footprint",
    "grouped",
    "need",
    "operator_split",
    "preparation",
]

Array = NDArray[Any]

OPERATOR_ENTRIES = 2**21
"""Entries of the sparse matrices that the adjoint engine makes of all observables of a template, at most."""
LEAST = 2**25
"""Bytes that every program asks for: libraries at their first use, heaps, arrays that do not grow with the program."""
_TRANSPILER = 3 * 2**25  # Qiskit's transpiler, loaded for circuits that measure on their way: 82 MB measured
_DRAWN = 2**17  # shots that are drawn at a time
_STRINGS = 2**16  # shots that Aer returns as strings at a time
_SMALL = 2**13  # states of which nothing has to be known exactly
_ELSEWHERE = 24  # qubits beyond which a Qiskit backend is taken not to be simulated here


# -- what is in a template ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Census:
    """What a physical template is made of, composite gates taken apart into gates and rotations about Pauli words."""

    one: int
    """Gates on one qubit."""
    two: int
    """Gates on two qubits."""
    wide: int
    """Gates on more."""
    channels: int
    """Instructions that are quantum channels."""
    slots: int
    """Rotations by an angle that has a parameter: what parameter shift evaluates twice each."""
    crossings: tuple[int, ...]
    """For each bond of the chain of qubits, in their order, the gates that act across it."""
    bonds: tuple[int, ...]
    """For each bond, the largest dimension that the gates can give it in a matrix product state."""
    flips: bool
    """Whether an observable flips any qubit, so that it is not diagonal."""

    @property
    def gates(self) -> int:
        """Instructions in all."""
        return self.one + self.two + self.wide + self.channels


_NATIVE = frozenset((
    "ccx", "cp", "crx", "cry", "crz", "cswap", "csx", "cu", "cu1", "cu3", "cx", "cy", "cz", "ecr", "h", "id", "p", "r",
    "rx", "rxx", "ry", "ryy", "rz", "rzx", "rzz", "s", "sdg", "swap", "sx", "sxdg", "t", "tdg", "u", "u1", "u2", "u3",
    "unitary", "x", "y", "z",
))  # fmt: skip
_BASIS = Basis("the estimate", _NATIVE, ROTATIONS, AS_ROTATIONS, "superop", shared=False)
_RANK_2 = frozenset(("cx", "cy", "cz", "cp", "crx", "cry", "crz", "ch", "rxx", "ryy", "rzz", "rzx", "ecr", "cu", "csx"))


def census(template: Template) -> Census:
    """What ``template``, a physical one, is made of; counted once and kept with it."""
    found: Census | None = template.cache.get("census")
    if found is None:
        circuit = template.circuit
        if not template.sampled_in_place:
            try:
                circuit = lower(circuit, _BASIS).circuit
            except Exception:  # noqa: BLE001  # definitions are anyone's code; what is wrong is the engine's to say
                circuit = template.circuit
        found = template.cache["census"] = _counted(circuit, template)
    return found


def _counted(circuit: QuantumCircuit, template: Template) -> Census:
    widths = [0, 0, 0]
    channels = slots = 0
    crossings = [0] * max(0, circuit.num_qubits - 1)
    logs = [0] * len(crossings)
    for instruction in circuit.data:
        if instruction.name == "barrier" or not instruction.qubits:
            continue
        slots += any(unbound(value) for value in instruction.params)
        places = sorted(circuit.find_bit(q).index for q in instruction.qubits)
        if instruction.name in CHANNELS:
            channels += 1
        else:
            widths[min(len(places), 3) - 1] += 1
        rank = 1 if instruction.name in _RANK_2 else 2 * (len(places) // 2)
        for bond in range(places[0], places[-1]):
            crossings[bond] += 1
            logs[bond] += rank
    count = circuit.num_qubits
    bonds = tuple(1 << min(log, bond + 1, count - bond - 1) for bond, log in enumerate(logs))
    flips = any(bool(observable.paulis.x.any()) for observable in template.observables)
    return Census(widths[0], widths[1], widths[2], channels, slots, tuple(crossings), bonds, flips)


def grouped(template: Template, grouping: str) -> tuple[Measured, ...]:
    """The observables of ``template``, a physical one, as what is measured; grouped once and kept with it."""
    key = f"grouped {grouping}"
    found: tuple[Measured, ...] | None = template.cache.get(key)
    if found is None:
        found = template.cache[key] = tuple(measured(o, grouping) for o in template.observables)
    return found


def _groups(template: Template, grouping: str) -> tuple[int, int]:
    """Groups of all observables, and gates of their measurements."""
    key = f"groups {grouping}"
    found: tuple[int, int] | None = template.cache.get(key)
    if found is None:
        groups = [group for observable in grouped(template, grouping) for group in observable.groups]
        found = template.cache[key] = (len(groups), sum(len(group.gates) for group in groups))
    return found


# -- the adjoint engine's observables ----------------------------------------------------------------------------


def operator_split(flips: Array, signs: Array, num_qubits: int, limit: int) -> int:
    """How many of the low qubits of Paulis, given by their masks, are in matrices of ``limit`` entries together.

    Paulis that flip the same qubits are one entry a row; the largest number is taken that stays within ``limit``.
    """
    for low in range(num_qubits, 0, -1):
        keys = np.stack([flips >> low, signs >> low, flips & ((1 << low) - 1)])
        if int(np.unique(keys, axis=1).shape[1]) << low <= limit:
            return low
    return 0


def _entries(template: Template) -> tuple[int, float]:
    """Entries that the matrices of all observables keep, and how many products one use of them takes."""
    found: tuple[int, float] | None = template.cache.get("entries")
    if found is None:
        limit = OPERATOR_ENTRIES // max(1, len(template.observables))
        kept = [_kept(o, limit) for o in template.observables]
        found = template.cache["entries"] = (
            sum(entries for entries, _ in kept),
            sum(entries * 2.0 ** min(200, template.num_qubits - low) for entries, low in kept),
        )
    return found


def _kept(observable: SparsePauliOp, limit: int) -> tuple[int, int]:
    """Entries that are kept of an observable's matrices, without those that cancel; and the qubits they are on."""
    _, rest = without_identity(observable)
    if rest is None:
        return 0, 0
    if rest.num_qubits > _MASKED:
        return limit, limit.bit_length()
    powers = 1 << np.arange(rest.num_qubits, dtype=np.int64)
    flips, signs = rest.paulis.x @ powers, rest.paulis.z @ powers
    low = operator_split(flips, signs, rest.num_qubits, limit)
    mask = (1 << low) - 1
    coefficients = rest.coeffs.real * 1j ** (rest.paulis.x & rest.paulis.z).sum(axis=1)
    members: dict[tuple[int, int, int], list[int]] = {}
    for number, (flip, sign) in enumerate(zip(flips.tolist(), signs.tolist(), strict=True)):
        members.setdefault((flip >> low, sign >> low, flip & mask), []).append(number)
    shares = (_share((signs[own] & mask).tolist(), coefficients[own]) for own in members.values())
    return sum(math.ceil(share * 2**low) for share in shares), low


_MASKED = 62  # qubits that fit the masks of Paulis; no machine holds the state of as many
_MOST_SIGNS = 10  # independent ones, up to which all their values are tried


def _share(signs: Sequence[int], coefficients: Array) -> float:
    """Of the rows of Paulis that flip the same qubits, how many do not cancel; at most 1.

    A row's entry depends on the parities of its number with ``signs`` alone, and all values of independent parities
    occur equally often.
    """
    basis: list[int] = []
    members: list[int] = []  # which of the basis each sign is the sum of, as a mask
    for sign in signs:
        combination = 0
        for number, word in enumerate(basis):
            if sign & (word & -word):
                sign ^= word
                combination |= 1 << number
        if sign:
            if len(basis) == _MOST_SIGNS:
                return 1.0
            combination |= 1 << len(basis)
            basis.append(sign)
        members.append(combination)
    parities = np.bitwise_count(np.arange(1 << len(basis))[:, None] & np.array(members)) & 1
    sums = np.abs((1.0 - 2.0 * parities) @ coefficients)
    return float(np.mean(sums > 2.0**-52 * np.abs(coefficients).sum()))


# -- bytes -------------------------------------------------------------------------------------------------------


def need(program: Program, calibration: Calibration | None = None, corrections: Corrections | None = None) -> Need:
    """What ``program`` asks of a device. Raises `WorkflowError` if it does not fit its backend's qubits.

    Bytes are an upper bound of what an engine process takes on top of what it takes when it is idle, reading and
    answering included. With A = 2^n for n qubits, each amplitude of 16 bytes:

    - state vector: exact values 16 A; bits 32 A (probabilities and a square); sampled values 32 A where nothing is
      turned before it is measured, else 56 A (the turned state, a half of it, the distribution before), and 96 A where
      a group has as many shots as there are states (how often each occurs, at once);
    - density matrix: 16 A^2; matrix product state: twice its tensors with the largest bonds that the circuit can give
      it, and 8 matrices of one decomposition. Probabilities come as lists: 48 A for each group, 24 A once;
    - stabilizer: 2 n^2 bytes; trajectories (one execution a shot): 16 A. A simulator's own shots come as strings: 220
      bytes, and 12 for each byte of their bits, for up to 65,536 of them at a time, and their bits twice;
    - adjoint: 48 A for values, 128 A with gradients (16 more for several observables), and 20 bytes for each entry of
      the observables' matrices; or 40 for each entry while they are made, if that is more;
    - parameters and seeds three times (message, payload, arrays), and so what goes back;
    - 4 KiB a gate, for a simulator's shots that again for each group, 32 KiB a channel of noise, 1 KiB a Pauli;
    - 32 MiB for whatever does not grow; 96 MiB more where Qiskit's transpiler is loaded.

    Seconds are those of `Calibration.seconds`, of the built-in calibration unless another is given, times what
    ``corrections`` say.
    """
    template, shots = physical(program.template), program.shots or 0
    calibration = DEFAULT if calibration is None else calibration
    last = template.cache.get("need")
    found: Need
    size = (program.rows, program.shots, program.derived)
    if last and last[0] is program.plan and last[1] is calibration and last[2] == size:
        found = last[3]
    else:
        amount = calibration.seconds(program)
        found = Need(footprint(program), amount, program.plan.threads, template.num_qubits, shots * program.rows)
        template.cache["need"] = (program.plan, calibration, size, found)
    if corrections is None:
        return found
    seconds = found.seconds * corrections.factor(program)
    return Need(found.bytes, seconds, found.threads, found.qubits, found.shots)


def footprint(program: Program) -> int:
    """The bytes of `need` alone: a microsecond for a program like the template's last one, as in a loop."""
    template = physical(program.template)
    last = template.cache.get("footprint")
    if last is not None and last[0] is program.plan and last[1:3] == (program.rows, program.shots):
        return int(last[3])
    found = _footprint(program, template)
    template.cache["footprint"] = (program.plan, program.rows, program.shots, found)
    return found


def _footprint(program: Program, template: Template) -> int:
    plan, counts, observables = program.plan, census(template), len(template.observables)
    columns = 2 + template.num_parameters * (plan.gradient != "none")
    answers = program.rows * (8 * observables * columns + (program.shots or 0) * _bits(template) * (not observables))
    memory = LEAST + 24 * program.theta.size + 48 * program.rows + 3 * answers + 1024 * template.num_paulis
    circuits = 2 if plan.gradient == "parameter-shift" else 1
    if plan.sampling in ("simulator", "backend") and observables:
        circuits *= 1 + _groups(template, plan.grouping)[0]
    memory += 4096 * counts.gates * circuits + 2**15 * counts.channels
    if plan.engine == "adjoint":
        return memory + _adjoint_bytes(template, plan.gradient != "none")
    if template.sampled_in_place or plan.engine == "backend":
        memory += _TRANSPILER
    if plan.engine == "backend":
        return memory + _backend_bytes(template) + _strings(program, template)
    return memory + _aer_bytes(program, template)


def _bits(template: Template) -> int:
    """Bytes of one shot."""
    return -(-(template.circuit.num_clbits or template.num_qubits) // 8)


def _aer_bytes(program: Program, template: Template) -> int:
    plan, shots, amplitudes = program.plan, program.shots or 0, int(2**template.num_qubits)
    if plan.method == "density_matrix":
        state = 16 * amplitudes**2
    elif plan.method == "stabilizer":
        state = 2 * template.num_qubits**2
    elif plan.method == "matrix_product_state":
        bonds = _bounded(template, plan.options)
        tensors = sum(2 * left * right for left, right in zip([1, *bonds], [*bonds, 1], strict=True))
        state = 32 * tensors + 512 * max([1, *bonds]) ** 2
    else:
        state = 16 * amplitudes
    if plan.sampling == "exact":
        return state
    if plan.sampling == "simulator":
        return state + _strings(program, template)
    if plan.method != "statevector":
        groups = _groups(template, plan.grouping)[0] if template.observables else 1
        return state + (24 + 48 * groups) * amplitudes
    if not template.observables:
        return 32 * amplitudes
    drawn = (56 if census(template).flips else 32) * amplitudes
    if 96 * min(shots, amplitudes) <= drawn:
        return drawn
    most = shots
    if amplitudes > _SMALL:
        most = max((max(_layout(o, shots), default=0) for o in grouped(template, plan.grouping)), default=0)
    # by powers of 2, so that a program never asks for less than the same on fewer qubits
    return max(drawn, 96 * min(amplitudes, 1 << most.bit_length() >> 1))


def _layout(observable: Measured, shots: int) -> list[int]:
    try:
        return split(observable, shots)
    except WorkflowError:  # too few for the groups, which the engine says
        return []


def _strings(program: Program, template: Template) -> int:
    """Bytes of a simulator's own shots."""
    shots, bits = program.shots or 0, _bits(template)
    return (220 + 12 * bits) * min(shots, _STRINGS) + 2 * bits * shots


def _bounded(template: Template, options: Sequence[tuple[str, Any]]) -> list[int]:
    """The dimensions of a matrix product state's bonds, at most."""
    most = dict(options).get("bond_dimension")
    return [min(bond, most or bond) for bond in census(template).bonds]


def _backend_bytes(template: Template) -> int:
    """What a backend simulates of the qubits that take part: a density matrix where that is small."""
    used = {q for i in template.circuit.data if i.name != "barrier" for q in i.qubits}
    if len(used) > _ELSEWHERE:
        return 0
    return int(16 * (4 if len(used) <= 12 else 2) ** len(used))


def _adjoint_bytes(template: Template, with_gradient: bool) -> int:
    amplitudes, entries = int(2**template.num_qubits), _entries(template)[0]
    states = (128 if with_gradient else 48) * amplitudes + 16 * amplitudes * (len(template.observables) > 1)
    if with_gradient:  # signs of rotations on the half of the qubits that is the longer one
        states += 8 * census(template).slots << -(-template.num_qubits // 2)
    return max(40 * entries, 20 * entries + states)


# -- seconds -----------------------------------------------------------------------------------------------------

_NEAR = 2**14  # amplitudes of a state that is close to the processor, and from which on Aer fuses gates
_STATE = ("one near", "one far", "two near", "two far")
TERMS: Mapping[str, tuple[str, ...]] = {
    "aer statevector": (
        "program", "values", "samples", "bits", "gates", "slots", *_STATE, "paulis", "paulis near", "paulis far",
        "groups", "turns", "turns near", "turns far", "distributions", "shots", "shot bits", "parities",
    ),
    "aer density_matrix": (
        "program", "values", "samples", "bits", "gates", "slots", *_STATE, "channels near", "channels far", "paulis",
        "paulis near", "groups", "distributions", "shots", "shot bits",
    ),
    "aer matrix_product_state": (
        "program", "values", "samples", "bits", "gates", "slots", "crossings", "decompositions", "paulis", "sites",
        "contractions", "circuits", "groups", "distributions", "shots", "shot bits", "walks",
    ),
    "aer stabilizer": (
        "program", "values", "circuits", "gates", "tableau", "paulis", "sites", "shots", "shot bits", "walks",
    ),
    "aer trajectories": (
        "program", "circuits", "gates", "shots", "shot gates", *_STATE, "channels near", "channels far",
    ),
    "adjoint none": ("program", "values", "slots", "gates", *_STATE, "entries near", "entries far"),
    "adjoint adjoint": ("program", "values", "slots", "gates", *_STATE, "entries near", "entries far"),
    "backend": ("program", "circuits", "shots", "gates"),
}  # fmt: skip
"""What the time of a program is made of, by the kind of program.

One for the program, and one of each for an execution, a gate, a slot, a Pauli, a group and a shot; and these times the
amplitudes they touch, in states of up to 2^14 amplitudes (``near``) and for what is beyond (``far``), so that estimates
grow with the qubits.
"""


def features(program: Program) -> tuple[str, tuple[float, ...]]:
    """The kind of ``program``, a key of `TERMS`, and how much of each of its terms it has."""
    kind, executions, execution = _work(program)
    return kind, (1.0, *(executions * amount for amount in execution))


def _work(program: Program) -> tuple[str, float, tuple[float, ...]]:
    """The kind of ``program``, how many executions it takes, and the terms of each, the program's own left out."""
    template, plan = physical(program.template), program.plan
    kind = f"{plan.engine} {plan.method}" if plan.engine == "aer" else plan.engine
    if plan.engine == "adjoint":
        kind = "adjoint adjoint" if plan.gradient == "adjoint" else "adjoint none"
    elif plan.sampling == "simulator" and plan.method in ("statevector", "density_matrix"):
        kind = "aer trajectories"
    kind = kind if kind in TERMS else "backend"  # a plan that no engine takes is theirs to refuse
    known: dict[Any, tuple[float, ...]] = template.cache.setdefault("terms", {})
    key = (kind, plan.sampling, plan.grouping, plan.options, program.shots)
    execution = known.get(key)
    if execution is None:
        terms = _adjoint_terms(program, template) if plan.engine == "adjoint" else _terms(program, template, kind)
        execution = known[key] = tuple(terms.get(term, 0.0) for term in TERMS[kind][1:])
    executions: float = program.rows
    if plan.gradient == "parameter-shift":
        first, stop = program.derived or (0, template.num_parameters)
        executions *= 1 + 2 * census(template).slots * (stop - first) / max(1, template.num_parameters)
    elif plan.gradient == "spsa":
        executions *= 3
    return kind, executions, execution


def _over(name: str, count: float, size: float) -> dict[str, float]:
    """A pass over a state of ``size`` amplitudes, ``count`` times."""
    return {f"{name} near": count * min(size, _NEAR), f"{name} far": count * max(0.0, size - _NEAR)}


def _size(template: Template, method: str) -> float:
    """Amplitudes of a dense state, as far as numbers go."""
    return 2.0 ** min(200, template.num_qubits * (2 if method == "density_matrix" else 1))


def _terms(program: Program, template: Template, kind: str) -> dict[str, float]:
    """Terms of one execution by Aer, or by a backend."""
    plan, shots, counts = program.plan, program.shots or 0, census(template)
    states, size = 2.0 ** min(200, template.num_qubits), _size(template, plan.method)
    found: dict[str, float] = {"gates": counts.gates, "slots": counts.slots, "shots": shots, "circuits": 1.0}
    groups, turns = _groups(template, plan.grouping) if shots and template.observables else (0, 0)
    if kind == "backend":
        return found | {"circuits": max(1, groups), "gates": counts.gates * max(1, groups)}
    if kind == "aer trajectories":
        found |= _over("one", counts.one * shots, size) | _over("two", (counts.two + 2 * counts.wide) * shots, size)
        found |= _over("channels", counts.channels * shots, size)
        return found | {"circuits": max(1, groups), "gates": counts.gates * max(1, groups),
                        "shot gates": shots * (counts.gates + turns / max(1, groups))}  # fmt: skip
    found["values" if plan.sampling == "exact" else "samples" if template.observables else "bits"] = 1.0
    if plan.sampling == "exact":
        found |= {"paulis": template.num_paulis} | _over("paulis", template.num_paulis, states)
    elif plan.sampling == "simulator":
        found |= {"circuits": max(1, groups), "gates": counts.gates * max(1, groups) + turns}
        found |= {"shot bits": shots * template.num_qubits, "values": 0.0}
    elif template.observables:
        found |= {"groups": groups, "distributions": groups * states, "shots": min(shots, groups * states)}
        if plan.method == "statevector":
            found |= {"turns": turns} | _over("turns", turns, states)
        else:  # there and back, between the circuit's own gates
            found["gates"] += 2 * turns
        if template.num_qubits > 12:
            # a sum for each state that was drawn, or a transform of all of them
            drawn = template.num_paulis * min(shots / max(1, groups), states)
            found["parities"] = min(drawn, groups * template.num_qubits * states)
    else:
        found |= {"distributions": states, "shots": 0.0, "shot bits": shots * template.num_qubits}
    if plan.method == "matrix_product_state":
        circuits = max(1, groups) if plan.sampling == "simulator" else 0
        found |= _chain_terms(template, plan.options, shots if circuits else 0, max(1, circuits), turns)
        found["circuits"] = circuits
    elif plan.method == "stabilizer":
        qubits = template.num_qubits
        found |= {"tableau": found["gates"] * qubits, "sites": found.get("paulis", 0.0) * qubits}
        found |= {"walks": shots * qubits**2}
    else:
        found |= _over("one", counts.one, size) | _over("channels", counts.channels, size)
        found |= _over("two", counts.two + 2 * counts.wide + found["gates"] - counts.gates, size)
    return found


def _chain_terms(
    template: Template, options: Sequence[tuple[str, Any]], shots: int, circuits: int, turns: int
) -> dict[str, float]:
    """Terms of a matrix product state: a decomposition goes with the third power of the bond it makes."""
    counts = census(template)
    bonds = [min(bond, 2**40) for bond in _bounded(template, options)]  # as far as numbers go
    decompositions = 0.0
    for count, bond in zip(counts.crossings, bonds, strict=True):
        steps = min(count, bond.bit_length() - 1)  # in which the bond grows to its full dimension
        decompositions += (8.0 ** (steps + 1) - 8) / 7 + (count - steps) * float(bond) ** 3
    return {
        "crossings": circuits * sum(counts.crossings) + 2.0 * turns, "decompositions": circuits * decompositions,
        "sites": float(template.num_paulis * template.num_qubits),
        "contractions": template.num_paulis * sum(float(bond) ** 3 for bond in bonds),
        "walks": shots * sum(float(bond) ** 2 for bond in bonds),
    }  # fmt: skip


def _adjoint_terms(program: Program, template: Template) -> dict[str, float]:
    counts, size = census(template), _size(template, "statevector")
    passes = len(template.observables) if program.plan.gradient != "none" else 1
    found = {"values": 1.0, "slots": counts.slots, "gates": counts.gates * passes}
    for name, amount in (_over("one", counts.one, size) | _over("two", counts.two + 2 * counts.wide, size)).items():
        found[name] = amount * passes
    return found | _over("entries", 1.0, _entries(template)[1])


@dataclass(frozen=True)
class Calibration:
    """Seconds by kind of program: a coefficient for each of its `TERMS`, and for what is prepared once."""

    coefficients: Mapping[str, tuple[float, ...]]
    first: Mapping[str, tuple[float, ...]]
    """By engine: seconds for a template, a gate and a Pauli of it, before its first execution."""

    def seconds(self, program: Program) -> float:
        """Estimated time of ``program`` inside an engine that knows its template, in seconds, on one thread."""
        kind, executions, execution = _work(program)
        own, *others = self.coefficients[kind]
        return float(own + executions * sum(map(operator.mul, others, execution)))


def preparation(program: Program, calibration: Calibration) -> float:
    """Estimated time that an engine takes to prepare the template of ``program``, once, in seconds."""
    template = physical(program.template)
    return float(sum(map(operator.mul, calibration.first[program.plan.engine], _prepared(program, template))))


def _prepared(program: Program, template: Template) -> tuple[float, float, float]:
    plan, gates = program.plan, float(census(template).gates)
    if plan.sampling in ("simulator", "backend") and template.observables:
        gates *= 1 + _groups(template, plan.grouping)[0]
    return 1.0, gates * (2 if plan.gradient == "parameter-shift" else 1), float(template.num_paulis)


# -- calibration -------------------------------------------------------------------------------------------------

Evaluate = Callable[[Sequence[Program]], Sequence[Any]]
Timed = tuple[Program, float, float]
"""A program, the seconds of its first evaluation, and of a later one."""


def calibrate(evaluate: Evaluate) -> Calibration:
    """Coefficients fitted to the times of a fixed list of programs (some 10 seconds) in an engine.

    ``evaluate`` is that of an engine or its process: an `Outcome` for each program, or an error, which leaves the
    program out. Kinds of which nothing could be evaluated keep the built-in coefficients.
    """
    firsts: list[tuple[Program, float]] = []
    for each in calibration_programs():
        (outcome,) = evaluate([each])
        if isinstance(outcome, Outcome):
            firsts.append((each, outcome.seconds))
    # in rounds, so that a slow moment of the machine meets every kind; each the second time in a row, as in a loop
    times: list[list[float]] = [[] for _ in firsts]
    for _ in range(_ROUNDS):
        for (each, first), own in zip(firsts, times, strict=True):
            outcomes = [evaluate([each])[0] for _ in range(2 if first < _LONG else 1)]
            if isinstance(outcomes[-1], Outcome):
                own.append(outcomes[-1].seconds)
    pairs = zip(firsts, times, strict=True)
    return fitted([(each, first, statistics.median(own)) for (each, first), own in pairs if own])


_ROUNDS = 3
_LONG = 0.02  # seconds from which what was in the processor's caches before does not matter


def fitted(timed: Sequence[Timed]) -> Calibration:
    """The non-negative coefficients whose relative errors have the least sum.

    By kind of program. Relative, because times span six orders of magnitude; the sum of errors rather than of their
    squares, so that programs which something disturbed count little: least squares (C. L. Lawson and R. J. Hanson,
    Solving Least Squares Problems, chapter 23) over and over, weighted by the inverse of the last errors (E. J.
    Schlossmacher, J. Am. Stat. Assoc. 68, 857 (1973)).
    """
    rows: dict[str, list[tuple[tuple[float, ...], float]]] = {}
    starts: dict[str, list[tuple[tuple[float, ...], float]]] = {}
    for each, first, warm in timed:
        kind, amounts = features(each)
        rows.setdefault(kind, []).append((amounts, warm))
        if first - warm > warm / 2:  # else it is lost in the scatter
            start = _prepared(each, physical(each.template))
            starts.setdefault(each.plan.engine, []).append((start, first - warm))
    return Calibration(
        {kind: _fit(rows[kind]) if kind in rows else DEFAULT.coefficients[kind] for kind in TERMS},
        {engine: _fit(starts[engine]) if engine in starts else known for engine, known in DEFAULT.first.items()},
    )


def _fit(rows: Sequence[tuple[tuple[float, ...], float]]) -> tuple[float, ...]:
    from scipy.optimize import nnls

    relative = np.array([np.asarray(amounts) / time for amounts, time in rows])
    scales = np.where(relative.any(axis=0), np.abs(relative).max(axis=0), 1.0)
    weights = np.ones(len(rows))
    for _ in range(_REWEIGHTED):
        found, _ = nnls(relative / scales * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(relative / scales @ found - 1), _SCATTER))
    return tuple((found / scales).tolist())


_REWEIGHTED = 10
_SCATTER = 0.05  # relative error below which one observation is as good as another


def calibration_programs() -> list[Program]:
    """What `calibrate` runs: each kind of program over its sizes, in two kinds of circuit, always the same."""
    programs: list[Program] = []

    def add(circuit: QuantumCircuit, observable: SparsePauliOp | None, rows: int = 1, shots: int | None = None,
            backend: Any = None, grouping: str = "qubit-wise", gradient: str = "none") -> None:  # fmt: skip
        number = len(programs)
        theta = np.random.default_rng(number).uniform(-np.pi, np.pi, (rows, circuit.num_parameters))
        request = Request(circuit, observable, theta, shots, None, backend, grouping)
        at = Location(f"calibration/f[{number}]")
        programs.append(program(request, seed=0, location=at, gradient=gradient))

    for n in (2, 4, 7, 10, 12, 13, 14, 15, 17):
        depth, rows, words = (1, 1, 4) if n > 12 else (4, 1 if n > 6 else 4, 25)
        add(_layers(n, depth), _chain(n), rows)
        add(_ladders(n, depth), _words(n, words))
        add(_layers(n, 1), _words(n, 3))
        add(_layers(n, depth), _chain(n), rows, 100)
        add(_ladders(n, depth), _words(n, words), 1, 10_000, grouping="commuting")
        add(_ladders(n, 1), None, rows, 20_000 if n % 2 else 1000)
    for n in (2, 4, 6, 8, 10, 12, 14, 15, 16, 17):
        depth = 1 if n > 13 else 4
        for gradient in ("none", "adjoint"):
            add(_layers(n, depth), _chain(n), 1 if n > 6 else 4, backend="adjoint", gradient=gradient)
            add(_ladders(n, depth), _words(n, 25 if n < 15 else 2), backend="adjoint", gradient=gradient)
    for n in (3, 5):
        add(_layers(n, 1), _chain(n), gradient="parameter-shift")
    noise = Noise.depolarizing(1e-3, 1e-2, 1e-2)
    exact, noisy, noisy_shots = Aer("density_matrix"), Aer("density_matrix", noise), Aer("statevector", noise)
    for n in (2, 3, 4, 5, 6, 7, 8):
        depth = 1 if n > 6 else 3
        add(_layers(n, depth), _chain(n), 1 if n > 5 else 4, backend=exact)
        add(_ladders(n, 1), _words(n, 8), 1, 3000, exact, "commuting")
        add(_ladders(n, depth), _words(n, 20), backend=noisy)
        add(_layers(n, 1), _chain(n), 1, 300, noisy)
        add(_layers(n, depth), None, 1, 1000, noisy)
    for n in (2, 4, 6, 8, 10):
        shots = 20 if n > 8 else 80
        add(_layers(n, 1, in_place=True), None, 1, shots)
        add(_ladders(n, 1, in_place=True), None, 2, 10)
        add(_layers(n, 1), None, 1, shots, noisy_shots)
        add(_ladders(n, 1), _words(n, 3), 1, shots, noisy_shots)
    for n in (4, 7, 10, 13, 18):
        for depth, bond in ((1, None), (3, 4), (5, 12)):
            chain = Aer("matrix_product_state", bond_dimension=bond)
            add(_layers(n, depth, ring=False), _chain(n), backend=chain)
            add(_layers(n, depth, ring=False), _words(n, 5), 1, 300, chain)
        add(_layers(n, 2, ring=False), None, 1, 1000, "matrix_product_state")
        add(_ladders(n, 1), _words(n, 10), backend="matrix_product_state")
    add(_layers(12, 6, ring=False), _chain(12), backend="matrix_product_state")
    for n, depth in ((3, 3), (6, 5), (12, 2), (24, 4)):
        add(_cliffords(n, depth), _chain(n), backend="stabilizer")
        add(_cliffords(n, depth), _words(n, 6), 1, 500, "stabilizer")
        add(_cliffords(n, depth), None, 2, 500, "stabilizer")
    return programs


def _layers(n: int, depth: int, *, ring: bool = True, in_place: bool = False) -> QuantumCircuit:
    """Rotations of every qubit by parameters of their own, and a ring or chain of two-qubit gates."""
    circuit = QuantumCircuit(n, n if in_place else 0)
    angles = iter(ParameterVector("a", 2 * n * depth))
    for _ in range(depth):
        for qubit in range(n):
            circuit.rx(next(angles), qubit)
            circuit.rz(next(angles), qubit)
        for qubit in range(n if ring else n - 1):
            circuit.cz(qubit, (qubit + 1) % n)
    return _measured_twice(circuit) if in_place else circuit


def _ladders(n: int, depth: int, *, in_place: bool = False) -> QuantumCircuit:
    """Few angles between many gates without any, as in unitary coupled cluster."""
    circuit = QuantumCircuit(n, n if in_place else 0)
    angles = ParameterVector("a", depth)
    for angle in angles:
        for qubit in range(n):
            circuit.sx(qubit)
        for _ in range(2):
            for qubit in range(n - 1):
                circuit.cx(qubit, qubit + 1)
            circuit.rz(angle, n - 1)
            for qubit in reversed(range(n - 1)):
                circuit.cx(qubit, qubit + 1)
    return _measured_twice(circuit) if in_place else circuit


def _measured_twice(circuit: QuantumCircuit) -> QuantumCircuit:
    circuit.measure(0, 0)
    circuit.h(0)
    circuit.measure(circuit.qubits, circuit.clbits)
    return circuit


def _cliffords(n: int, depth: int) -> QuantumCircuit:
    circuit, random = QuantumCircuit(n), np.random.default_rng(n)
    for _ in range(depth):
        for qubit in range(n):
            getattr(circuit, ("h", "s", "x", "sx")[int(random.integers(4))])(qubit)
        for qubit in range(n - 1):
            circuit.cx(qubit, qubit + 1)
    return circuit


def _chain(n: int) -> SparsePauliOp:
    """The transverse-field Ising chain."""
    words = [("ZZ", [i, i + 1], 1.0) for i in range(n - 1)] + [("X", [i], 0.7) for i in range(n)]
    return SparsePauliOp.from_sparse_list(words, n)


def _words(n: int, count: int) -> SparsePauliOp:
    """Random Paulis."""
    random = np.random.default_rng(n)
    words = {"".join(random.choice(list("IXYZ"), n)) for _ in range(count)} - {"I" * n} | {"Z" * n}
    return SparsePauliOp.from_list([(word, 0.5) for word in sorted(words)])


# -- corrections -------------------------------------------------------------------------------------------------

_KEPT = 5  # observations, of which the median counts
_KIND = 15  # the same of a kind of program


def fingerprint(program: Program) -> str:
    """What a program's observed times are kept under: the same circuit, observables and plan, whatever the rows."""
    plan = program.plan
    return f"{program.template.digest} {plan.engine} {plan.method} {plan.sampling} {plan.gradient} {program.shots}"


def _kind(program: Program) -> str:
    """Programs whose times are off by about the same: estimates are those of one thread."""
    return _work(program)[0] + (" on all threads" if program.plan.threads != 1 else "")


class Corrections:
    """Factors on estimates, by `fingerprint`, from times that were observed. Thread-safe.

    A factor is the median of the last five ratios of observed to estimated seconds, so that one interrupted evaluation
    does not count. What was never observed has the median of its kind's last ratios, once there are some: the machine
    may be busier than when it was calibrated. The least recently observed of more than ``capacity`` are forgotten.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._ratios: OrderedDict[str, tuple[float, tuple[float, ...]]] = OrderedDict()
        """The last of each, and before them their median."""
        self._kinds: dict[str, tuple[float, ...]] = {}

    def __len__(self) -> int:
        return len(self._ratios)

    def factor(self, program: Program) -> float:
        """What an estimate is multiplied by; 1 where nothing is known."""
        known = self._ratios.get(fingerprint(program))
        if known is not None:
            return known[0]
        ratios = self._kinds.get(_kind(program), ())
        return 1.0 if len(ratios) < _KIND // 3 else statistics.median(ratios)

    def observe(self, program: Program, observed: float, calibration: Calibration, *, first: bool = False) -> None:
        """Note that ``program`` took ``observed`` seconds inside its engine.

        ``first``: the engine met its template for the first time, so that what it prepared is in them.
        """
        estimate = calibration.seconds(program)
        if first:
            observed = max(observed - preparation(program, calibration), observed / 10)
        if not (estimate > 0 and observed > 0 and math.isfinite(observed)):
            return
        key, kind, ratio = fingerprint(program), _kind(program), observed / estimate
        with self._lock:
            ratios = (*self._ratios.pop(key, (1.0, ()))[1], ratio)[-_KEPT:]
            self._ratios[key] = statistics.median(ratios), ratios
            self._kinds[kind] = (*self._kinds.get(kind, ()), ratio)[-_KIND:]
            if len(self._ratios) > self._capacity:
                self._ratios.popitem(last=False)


_MEASURED: Mapping[str, Mapping[str, float]] = {
    "aer statevector": {
        "program": 1.1e-4, "values": 1.0e-4, "samples": 2.3e-4, "bits": 2.4e-4, "gates": 1.6e-6,
        "slots": 1.2e-6, "one near": 5.8e-9, "one far": 2.6e-9, "two near": 4.4e-9, "two far": 6.2e-9,
        "paulis near": 4.3e-9, "paulis far": 6.1e-9, "groups": 4.9e-5, "turns": 6.0e-6, "turns near": 6.8e-9,
        "turns far": 5.1e-9, "distributions": 2.4e-8, "shots": 4.5e-8, "shot bits": 1.1e-8,
    },
    "aer density_matrix": {
        "program": 1.3e-4, "values": 1.1e-4, "samples": 3.7e-4, "bits": 2.3e-4, "one near": 9.0e-10,
        "one far": 8.7e-9, "two near": 6.6e-9, "two far": 8.6e-9, "channels near": 2.3e-8,
        "channels far": 5.1e-10, "paulis near": 1.0e-6, "groups": 1.8e-5, "shots": 2.2e-6, "shot bits": 6.2e-8,
    },
    "aer matrix_product_state": {
        "samples": 4.6e-4, "bits": 2.9e-4, "slots": 1.2e-5, "paulis": 3.1e-5, "sites": 1.0e-7,
        "contractions": 2.1e-9, "circuits": 6.5e-3, "distributions": 8.5e-7, "shots": 1.8e-6,
        "shot bits": 1.5e-8, "walks": 2.6e-7,
    },
    "aer stabilizer": {
        "circuits": 1.1e-3, "gates": 3.4e-5, "shots": 5.7e-7, "shot bits": 3.9e-7, "walks": 7.8e-9,
    },
    "aer trajectories": {
        "circuits": 5.0e-4, "gates": 3.3e-5, "shots": 1.5e-5, "shot gates": 6.2e-7, "one near": 6.5e-9,
        "two near": 5.2e-9, "channels near": 2.8e-8,
    },
    "adjoint none": {
        "program": 7.3e-5, "values": 1.2e-5, "slots": 1.4e-7, "gates": 3.5e-7, "one near": 4.1e-10,
        "one far": 6.1e-10, "two near": 4.1e-10, "two far": 1.1e-9, "entries near": 3.2e-9,
        "entries far": 3.5e-9,
    },
    "adjoint adjoint": {
        "program": 7.5e-5, "values": 5.0e-5, "slots": 9.5e-7, "gates": 7.8e-7, "one near": 2.2e-9,
        "one far": 3.8e-9, "two near": 1.1e-9, "two far": 1.4e-9, "entries near": 7.7e-9,
        "entries far": 2.4e-9,
    },
    "backend": {
        "circuits": 5.0e-3, "shots": 2.0e-6, "gates": 1.0e-4,
    },
}  # fmt: skip
DEFAULT = Calibration(
    {kind: tuple(_MEASURED[kind].get(term, 0.0) for term in terms) for kind, terms in TERMS.items()},
    {
        "aer": (2.8e-3, 4.8e-5, 1.3e-5),
        "adjoint": (1.1e-4, 6.5e-7, 0.0),
        "backend": (2.0e-2, 1.0e-4, 1.0e-5),
    },
)
"""Measured on one core of a virtual machine with two (2026), rounded to two digits; a Qiskit backend's are a guess."""
