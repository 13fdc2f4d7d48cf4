"""The Aer engine: programs in, outcomes out, the same bits for a row wherever and with whatever it is evaluated.

Each row of parameters is one execution of its own on one thread, so nothing else in a batch can touch its bits. A
circuit is assembled once and only re-bound afterwards, through the inner interface that Aer's own ``run`` uses; where
an installed Aer does not have that interface, ``run`` itself does the work, with the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from qiskit import QuantumCircuit, transpile
from qiskit.circuit import Gate, Parameter
from qiskit.circuit.library import (
    CUGate,
    PhaseGate,
    RGate,
    RXGate,
    RXXGate,
    RYGate,
    RYYGate,
    RZGate,
    RZXGate,
    RZZGate,
    U1Gate,
    U2Gate,
    U3Gate,
    UGate,
)
from qiskit.quantum_info import SparsePauliOp
from qiskit_aer import AerSimulator
from qiskit_aer.library import SaveExpectationValue, SaveStatevector

from hybridq.engines.guard import Numbers, OutOfMemory, Prepared, evaluate_each, mark_peak
from hybridq.engines.lowering import AS_ROTATIONS, ROTATIONS, Basis, Binder, Rewrite, lower, unbound, without_identity
from hybridq.errors import EngineFailed, HybridqError, WorkflowError
from hybridq.program import Outcome, Program, Template

__all__ = ["AerEngine"]

Array = NDArray[Any]

_CACHE_BYTES = 2**26  # of prepared circuits
_BYTES_PER_OPERATION = 2048  # measured 1.6 KiB for a gate with a parameter, Qiskit's and Aer's objects together
_DRAW = 2**17  # shots drawn at a time, which bounds the memory of drawing; part of what fixes the bits
_TRAJECTORIES = 2**16  # shots of one execution where Aer returns each as a string
_BIND = 2**17  # parameter values bound at a time


class AerEngine:
    """Evaluates programs with Qiskit Aer in this process, on one thread. Not for use by several threads at once.

    ``max_bytes`` is the memory that one program may take, in bytes. ``public`` keeps to Aer's documented interface;
    otherwise that is decided once, by comparing both on a small circuit.
    """

    def __init__(self, max_bytes: int, *, public: bool = False) -> None:
        self.max_bytes = max_bytes
        self._backend = AerSimulator(
            method="statevector",
            max_parallel_threads=1,
            max_parallel_experiments=1,
            max_parallel_shots=1,
            max_memory_mb=max(1, max_bytes >> 20),  # 0 would mean all of the machine's
        )
        self.public = public or not _inner_interface_works(self._backend)
        """Whether circuits go through ``AerSimulator.run`` rather than being assembled once."""
        self._prepared: Prepared[_Prepared | _Trajectories] = Prepared(_CACHE_BYTES)
        mark_peak()

    def evaluate(self, programs: Sequence[Program], max_bytes: int | None = None) -> list[Outcome | HybridqError]:
        """Evaluate each program by its plan; a failed one is an error in its place and harms no other.

        ``max_bytes`` lowers the engine's own bound for this call. Errors: `TooLarge` before anything runs, with both
        numbers; `EngineFailed` with Aer's words; `WorkflowError` for fewer shots than groups to be measured.
        """
        allowed = self.max_bytes if max_bytes is None else min(max_bytes, self.max_bytes)
        return evaluate_each("Aer", programs, allowed, self._compute)

    def _compute(self, program: Program) -> Numbers:
        template, plan = program.template, program.plan
        if plan.gradient not in ("none", "parameter-shift"):
            raise WorkflowError(f"Aer has no gradient by {plan.gradient!r}; plan 'none' or 'parameter-shift'.")
        if plan.sampling == "trajectories":
            if plan.gradient != "none":
                raise WorkflowError(
                    "a circuit that measures, resets or branches before its end has no gradient; remove those "
                    "instructions."
                )
            return _executed(self._trajectories(template), program)
        values = _evaluated(self._circuit(template, plan.sampling, _BASIS), program)
        if plan.gradient == "none":
            return values
        return values._replace(gradients=_shifted(self._circuit(template, plan.sampling, _SHIFTED), program))

    def _trajectories(self, template: Template) -> _Trajectories:
        prepared = self._prepared.get((template.digest, "trajectories"), lambda: _Trajectories(template, self._backend))
        assert isinstance(prepared, _Trajectories)
        return prepared

    def _circuit(self, template: Template, sampling: str, basis: Basis) -> _Prepared:
        prepared = self._prepared.get(
            (template.digest, sampling, basis is _SHIFTED),
            lambda: _Prepared(template, sampling, basis, self._backend, self.public),
        )
        assert isinstance(prepared, _Prepared)
        return prepared


def _executed(prepared: _Trajectories, program: Program) -> Numbers:
    """Bits of all rows, each row's shots whole executions."""
    bits = np.empty((program.rows, program.shots or 0, prepared.num_bytes), dtype=np.uint8)
    for theta, seed, row_bits in zip(program.theta, program.seeds, bits, strict=True):
        prepared.sample(theta, seed, row_bits)
    values = np.empty((program.rows, len(program.template.observables)))
    return Numbers(values, np.zeros(values.shape), bits, None)


def _evaluated(prepared: _Prepared, program: Program) -> Numbers:
    """Values and standard errors of all rows, or their bits."""
    shots = program.shots or 0
    values = np.empty((program.rows, len(program.template.observables)))
    stderrs = np.zeros(values.shape)
    if program.plan.sampling == "exact":
        for row, data in enumerate(prepared.execute(program.theta)):
            values[row] = prepared.expectations(data)
        return Numbers(values, stderrs, None, None)
    if program.template.observables:
        layouts = [_split(observable, shots) for observable in prepared.measured_observables]
        for row, data in enumerate(prepared.execute(program.theta)):
            prepared.estimate(data, layouts, program.seeds[row], 0, values[row], stderrs[row])
        return Numbers(values, stderrs, None, None)
    bits = np.zeros((program.rows, shots, prepared.num_bytes), dtype=np.uint8)
    for row, data in enumerate(prepared.execute(program.theta)):
        prepared.sample(data, program.seeds[row], bits[row])
    return Numbers(values, stderrs, bits, None)


def _shifted(prepared: _Prepared, program: Program) -> Array:
    """Gradients, shape (rows, observables, parameters), of a circuit prepared with one slot for each rotation.

    The derivative by the angle of exp(-i angle/2 P) is half the difference of the values at angle +- pi/2 (Mitarai et
    al., Phys. Rev. A 98, 032309 (2018); Schuld et al., Phys. Rev. A 99, 032331 (2019)). All shifts of a row are one
    batch; where values are sampled, each shift draws from a generator of its own.
    """
    count, observables = prepared.binder.width, len(program.template.observables)
    gradients = np.empty((program.rows, observables, program.template.num_parameters))
    layouts = [_split(observable, program.shots or 0) for observable in prepared.measured_observables]
    shifted, ignored = np.empty((2, observables)), np.empty(observables)
    slopes = np.empty((observables, count))
    for row, theta in enumerate(program.theta):
        data = prepared.run(_both_ways(prepared.binder.bind(theta[None])[0]))
        for slot in range(count):
            for side in (0, 1):
                if program.plan.sampling == "exact":
                    shifted[side] = prepared.expectations(next(data))
                else:
                    number = 1 + 2 * slot + side  # 0 is the row itself
                    prepared.estimate(next(data), layouts, program.seeds[row], number, shifted[side], ignored)
            slopes[:, slot] = (shifted[0] - shifted[1]) / 2
        gradients[row] = prepared.binder.chain(theta, slopes)
    return gradients


def _both_ways(angles: Array) -> Iterator[Array]:
    """``angles`` with the first shifted up by a quarter turn, then down; then the second, and so on."""
    for slot in range(len(angles)):
        for shift in (np.pi / 2, -np.pi / 2):
            shifted = angles.copy()
            shifted[slot] += shift
            yield shifted


# -- circuits that Aer can run and re-bind -----------------------------------------------------------------------

# What Aer applies as it stands.
_NATIVE = frozenset((
    "ccx", "ccz", "cp", "crx", "cry", "crz", "cswap", "csx", "cu", "cu1", "cu3", "cx", "cy", "cz", "diagonal",
    "ecr", "h", "id", "mcphase", "mcx", "p", "pauli", "r", "rx", "rxx", "ry", "ryy", "rz", "rzx", "rzz",
    "s", "sdg", "swap", "sx", "sxdg", "t", "tdg", "u", "u1", "u2", "u3", "unitary", "x", "y", "z",
))  # fmt: skip
# Of these, the ones whose parameters Aer sets correctly in an assembled circuit. In Aer 0.18 cp, crx, cry, crz, cu1,
# cu3 and mcphase silently keep the value they were assembled with, and with open controls the wrong gate is set.
_BINDABLE: dict[str, tuple[type[Gate], int]] = {
    "cu": (CUGate, 4), "p": (PhaseGate, 1), "r": (RGate, 2), "rx": (RXGate, 1), "rxx": (RXXGate, 1),
    "ry": (RYGate, 1), "ryy": (RYYGate, 1), "rz": (RZGate, 1), "rzx": (RZXGate, 1), "rzz": (RZZGate, 1),
    "u": (UGate, 3), "u1": (U1Gate, 1), "u2": (U2Gate, 2), "u3": (U3Gate, 3),
}  # fmt: skip


def _controlled(theta: Any, phi: Any, lam: Any, gamma: Any) -> Any:
    """diag(1, exp(i gamma) U(theta, phi, lam)) as the gate that Aer re-binds."""
    return [(CUGate(theta, phi, lam, gamma), (0, 1))]


_CONTROLLED: dict[str, Rewrite] = {
    "cp": lambda angle: _controlled(0.0, 0.0, angle, 0.0),
    "cu1": lambda angle: _controlled(0.0, 0.0, angle, 0.0),
    "crx": lambda angle: _controlled(angle, -np.pi / 2, np.pi / 2, 0.0),
    "cry": lambda angle: _controlled(angle, 0.0, 0.0, 0.0),
    "crz": lambda angle: _controlled(0.0, 0.0, angle, angle / -2),
    "cu3": lambda theta, phi, lam: _controlled(theta, phi, lam, 0.0),
    "cu": _controlled,
}
_BASIS = Basis("Aer", _NATIVE, {name: gate for name, (gate, _) in _BINDABLE.items()}, _CONTROLLED)
_SHIFTED = Basis("Aer", _NATIVE, ROTATIONS, AS_ROTATIONS)


# -- two routes to one execution ---------------------------------------------------------------------------------


class _Route(Protocol):
    def run(self, values: list[float]) -> dict[str, Any]:
        """What the circuit saves, by label, with these values of its slots."""


class _Inner:
    """An assembled circuit that is re-bound and executed: no more of Aer's Python is in the way."""

    def __init__(self, backend: Any, circuit: QuantumCircuit, slots: Sequence[Parameter]) -> None:
        from qiskit_aer.backends.aer_compiler import assemble_circuits, generate_aer_config

        self._backend = backend
        self._circuits, index_maps = assemble_circuits([circuit])
        self._circuits[0].circ_id = 0
        self._config = generate_aer_config([circuit], backend.options, shots=1)
        numbers = {slot: number for number, slot in enumerate(slots)}
        self._bindings: list[Any] = []
        self._numbers: list[int] = []
        for index, instruction in enumerate(circuit.data):
            for position, parameter in enumerate(instruction.params):
                if unbound(parameter):
                    self._bindings.append([(index_maps[0][index], position), [0.0]])
                    self._numbers.append(numbers[parameter])

    def run(self, values: list[float]) -> dict[str, Any]:
        if self._bindings:
            for binding, number in zip(self._bindings, self._numbers, strict=True):
                binding[1][0] = values[number]
            self._config.parameterizations = [self._bindings]
        output = self._backend._execute_circuits(self._circuits, None, self._config)
        if not output["results"]:
            raise _failure(output["status"])
        result = output["results"][0]
        if not result["success"]:
            raise _failure(result["status"])
        data: dict[str, Any] = result["data"]
        return data


class _Public:
    """The same through Aer's documented interface, which takes a circuit with its values."""

    def __init__(self, backend: Any, circuit: QuantumCircuit, slots: Sequence[Parameter]) -> None:
        self._backend = backend
        self._circuit = circuit
        self._slots = slots

    def run(self, values: list[float]) -> dict[str, Any]:
        bound = self._circuit.assign_parameters(dict(zip(self._slots, values, strict=True)))
        return _public_data(self._backend.run(bound, shots=1).result())


def _public_data(result: Any) -> dict[str, Any]:
    """What the one circuit of a Qiskit ``Result`` saved."""
    if not result.results:
        raise _failure(result.status)
    if not result.results[0].success:
        raise _failure(result.results[0].status)
    data: dict[str, Any] = result.data(0)
    return data


def _failure(status: Any) -> Exception:
    """Aer's words for a failed circuit, as what to raise."""
    short = re.search(r"Insufficient memory.*Required memory: (\d+)M", str(status))
    return OutOfMemory(int(short[1]) << 20) if short else EngineFailed(f"Aer failed on this program: {status}")


def _inner_interface_works(backend: Any) -> bool:
    """Whether Aer's inner interface exists and re-binds every kind of gate to what Aer's public one computes."""
    circuit = QuantumCircuit(2)
    circuit.h([0, 1])
    slots: list[Parameter] = []
    for name, (kind, width) in _BINDABLE.items():
        mine = [Parameter(f"{name}{i}") for i in range(width)]
        gate = kind(*mine)
        circuit.append(gate, range(gate.num_qubits))
        circuit.ry(0.7, 0)
        slots += mine
    circuit.append(SaveExpectationValue(SparsePauliOp(["XY", "ZI", "YZ"], [0.5, 0.3, 0.2]), label="0"), [0, 1])
    values = [0.3 + 0.1 * i for i in range(len(slots))]
    expected = _Public(backend, circuit, slots).run(values)["0"]
    try:
        inner = _Inner(backend, circuit, slots)
        inner.run([0.0] * len(slots))
        found = inner.run(values)["0"]
        return bool(abs(found - expected) < 1e-12)
    except Exception:  # noqa: BLE001 - whatever an undocumented interface does wrong, the documented one is there
        return False


# -- a template, ready to run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Paulis of an observable that one measurement of every qubit gives together."""

    x_rotations: tuple[int, ...]
    """Qubits measured in the basis of X."""
    y_rotations: tuple[int, ...]
    """Qubits measured in the basis of Y."""
    masks: Array
    """For each Pauli, the bits whose parity is its sign: uint64, shape (paulis,)."""
    coefficients: Array
    """Shape (paulis,)."""
    weight: float
    """Sum of the magnitudes of the coefficients."""


@dataclass(frozen=True)
class _Measured:
    """An observable as what is measured: groups, and the part that needs no measurement."""

    constant: float
    groups: tuple[_Group, ...]


class _Prepared:
    """A template compiled for exact values, or for states to draw samples from."""

    def __init__(self, template: Template, sampling: str, basis: Basis, backend: Any, public: bool) -> None:
        lowered = lower(template.circuit, basis, shared=basis is not _SHIFTED)
        self.binder = Binder(lowered.expressions, template.circuit.parameters)
        self._constants: list[float] = []
        self._labels: list[str | None] = []
        self.measured_observables: tuple[_Measured, ...] = ()
        circuit = lowered.circuit
        if sampling == "exact":
            for column, observable in enumerate(template.observables):
                constant, rest = without_identity(observable)
                self._constants.append(constant)
                self._labels.append(None if rest is None else str(column))
                if rest is not None:
                    circuit.append(SaveExpectationValue(rest, label=str(column)), circuit.qubits)
        else:
            self.measured_observables = tuple(map(_grouped, template.observables))
            if template.num_qubits:
                circuit.append(SaveStatevector(template.num_qubits, label="state"), circuit.qubits)
        clbits = template.circuit.num_clbits
        self._measured = lowered.measured if clbits else tuple((i, i) for i in range(template.num_qubits))
        self.num_bytes = -(-(clbits or template.num_qubits) // 8)
        saves = sampling != "exact" or any(label is not None for label in self._labels)
        route: type[_Inner] | type[_Public] = _Public if public else _Inner
        self._route: _Route | None = route(backend, circuit, lowered.slots) if saves and template.num_qubits else None
        matrices = sum(p.nbytes for i in circuit.data for p in i.params if isinstance(p, np.ndarray))
        self.nbytes = (
            _BYTES_PER_OPERATION * (len(circuit.data) + 1)
            + 2 * matrices
            + template.num_paulis * (256 + 4 * template.num_qubits)
        )

    def execute(self, theta: Array) -> Iterator[dict[str, Any]]:
        """What each row of ``theta`` saves, one execution a row."""
        step = max(1, _BIND // max(1, self.binder.width))
        for start in range(0, len(theta), step):
            yield from self.run(self.binder.bind(theta[start : start + step]))

    def run(self, slots: Iterable[Array]) -> Iterator[dict[str, Any]]:
        """What each row of values of the slots saves."""
        if self._route is None:
            yield from ({"state": np.ones(1)} for _ in slots)
            return
        for values in slots:
            yield self._route.run(values.tolist())

    def expectations(self, data: dict[str, Any]) -> list[float]:
        """Exact values of all observables."""
        return [
            constant if label is None else constant + float(data[label])
            for constant, label in zip(self._constants, self._labels, strict=True)
        ]

    def estimate(
        self,
        data: dict[str, Any],
        layouts: list[list[int]],
        seed: Array,
        shift: int,
        values: Array,
        stderrs: Array,
    ) -> None:
        """Draw every observable's groups from the state, and write values and standard errors, shape (observables,).

        ``shift`` tells the draws of a row's shifted copies apart; 0 is the row itself.
        """
        state = np.asarray(data["state"])
        stream = 0
        for column, (observable, layout) in enumerate(zip(self.measured_observables, layouts, strict=True)):
            value, variance = observable.constant, 0.0
            for group, shots in zip(observable.groups, layout, strict=True):
                mean, own_variance = _group_mean(group, shots, _cumulative(_rotated(state, group)), seed, stream, shift)
                value += mean
                variance += own_variance
                stream += 1
            values[column], stderrs[column] = value, np.sqrt(variance)

    def sample(self, data: dict[str, Any], seed: Array, bits: Array) -> None:
        """Draw shots from the state into ``bits``, zeros of shape (shots, num_bytes), in the order of drawing."""
        start = 0
        for drawn in _draws(_cumulative(np.asarray(data["state"])), len(bits), seed, 0):
            rows = bits[start : start + len(drawn)]
            for qubit, clbit in self._measured:
                rows[:, self.num_bytes - 1 - clbit // 8] |= ((drawn >> qubit & 1) << clbit % 8).astype(np.uint8)
            start += len(drawn)


class _Trajectories:
    """A template whose circuit measures, resets or branches on its way: Aer runs every shot."""

    def __init__(self, template: Template, backend: Any) -> None:
        circuit = template.circuit if template.circuit.num_clbits else template.circuit.measure_all(inplace=False)
        self._backend = backend
        self._parameters = list(template.circuit.parameters)
        self._circuit = transpile(circuit, backend, optimization_level=0, seed_transpiler=0)
        self.num_bytes = -(-circuit.num_clbits // 8)
        self.nbytes = _BYTES_PER_OPERATION * (self._circuit.size() + 1)

    def sample(self, theta: Array, seed: Array, bits: Array) -> None:
        """Run all shots of one row into ``bits``, shape (shots, num_bytes), seeded by the row's key alone."""
        left = self._circuit.parameters
        values = {p: value for p, value in zip(self._parameters, theta.tolist(), strict=True) if p in left}
        bound = self._circuit.assign_parameters(values)
        for number, start in enumerate(range(0, len(bits), _TRAJECTORIES)):
            part = bits[start : start + _TRAJECTORIES]
            own_seed = int(_generator(seed, number).integers(2**31))
            job = self._backend.run(bound, shots=len(part), memory=True, seed_simulator=own_seed)
            outcomes = _public_data(job.result())["memory"]
            packed = {text: int(text, 16).to_bytes(self.num_bytes, "big") for text in set(outcomes)}
            part[...] = np.frombuffer(b"".join(packed[text] for text in outcomes), np.uint8).reshape(part.shape)


# -- observables -------------------------------------------------------------------------------------------------


def _grouped(observable: SparsePauliOp) -> _Measured:
    """Groups of Paulis that agree on every qubit they share, the largest coefficients placed first.

    Each Pauli goes to the first group it fits. Done here, because a library's colouring of a graph may change with its
    version and with it which samples are drawn.
    """
    constant, rest = without_identity(observable)
    if rest is None:
        return _Measured(constant, ())
    coefficients = np.asarray(rest.coeffs.real)
    xs, zs = rest.paulis.x, rest.paulis.z
    bases: list[tuple[Array, Array]] = []
    members: list[list[int]] = []
    for pauli in np.argsort(-np.abs(coefficients), kind="stable").tolist():
        x, z = xs[pauli], zs[pauli]
        for (base_x, base_z), own in zip(bases, members, strict=True):
            shared = (x | z) & (base_x | base_z)
            if not (((x ^ base_x) | (z ^ base_z)) & shared).any():
                base_x |= x
                base_z |= z
                own.append(pauli)
                break
        else:
            bases.append((x.copy(), z.copy()))
            members.append([pauli])
    powers = 1 << np.arange(rest.num_qubits, dtype=np.uint64)
    groups = []
    for (base_x, base_z), own in zip(bases, members, strict=True):
        groups.append(
            _Group(
                x_rotations=tuple(np.flatnonzero(base_x & ~base_z).tolist()),
                y_rotations=tuple(np.flatnonzero(base_x & base_z).tolist()),
                masks=((xs[own] | zs[own]) * powers).sum(axis=1, dtype=np.uint64),
                coefficients=coefficients[own],
                weight=float(np.abs(coefficients[own]).sum()),
            )
        )
    return _Measured(constant, tuple(groups))


def _split(observable: _Measured, shots: int) -> list[int]:
    """Shots of each group: in proportion to its weight, but at least 2 (1 where there are too few)."""
    count = len(observable.groups)
    if count == 0:
        return []
    if shots < count:
        raise WorkflowError(
            f"{shots} shots cannot measure this observable: its Paulis need {count} different measurements, each at "
            f"least once; ask for {count} shots or more, or for a smaller precision."
        )
    weights = np.array([group.weight for group in observable.groups])
    quotas = weights * (shots / weights.sum())
    split = np.floor(quotas).astype(np.int64)
    rest = shots - int(split.sum())
    split[np.argsort(split - quotas, kind="stable")[:rest]] += 1
    least = 2 if shots >= 2 * count else 1
    while split.min() < least:
        split[np.argmin(split)] += 1
        split[np.argmax(split)] -= 1
    return [int(n) for n in split]


# -- drawing -----------------------------------------------------------------------------------------------------


def _rotated(state: Array, group: _Group) -> Array:
    """``state`` in the group's basis, times a power of sqrt(2), which drops out when probabilities are normalised.

    Plain additions in place of matrix products: the bits depend on no library's threads.
    """
    if not group.x_rotations and not group.y_rotations:
        return state
    state = state.copy()
    for qubit in sorted(group.x_rotations + group.y_rotations):
        halves = state.reshape(-1, 2, 1 << qubit)
        low, high = halves[:, 0], halves[:, 1]
        if qubit in group.y_rotations:
            high *= -1j
        total = low + high
        np.subtract(low, high, out=high)
        low[...] = total
    return state


def _cumulative(state: Array) -> Array:
    """Running sum of the probabilities of the basis states, not normalised: its last entry is their total."""
    probabilities = np.square(state.real)
    probabilities += np.square(state.imag)
    return np.cumsum(probabilities, out=probabilities)


def _generator(seed: Array, stream: int, shift: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, shift, stream]))


def _draws(cumulative: Array, shots: int, seed: Array, stream: int, shift: int = 0) -> Iterator[Array]:
    """Basis states drawn one shot after the other, int64, in arrays of at most `_DRAW`."""
    generator = _generator(seed, stream, shift)
    total = cumulative[-1]
    last = int(np.searchsorted(cumulative, total))  # the last state that has any probability
    for start in range(0, shots, _DRAW):
        points = generator.random(min(_DRAW, shots - start))
        points *= total
        yield np.minimum(np.searchsorted(cumulative, points, side="right"), last)


def _group_mean(
    group: _Group, shots: int, cumulative: Array, seed: Array, stream: int, shift: int
) -> tuple[float, float]:
    """Mean of the group's part of the observable over ``shots``, and the variance of that mean.

    The variance is that of the samples, so that covariances inside the group count; a single shot has none and gets
    the largest possible deviation.
    """
    mean = squares = 0.0
    done = 0
    for drawn in _draws(cumulative, shots, seed, stream, shift):
        if len(cumulative) <= 4 * len(drawn):
            counts = np.bincount(drawn, minlength=len(cumulative))
            states = np.flatnonzero(counts)
            counts = counts[states]
        else:
            states, counts = np.unique(drawn, return_counts=True)
        states = states.astype(np.uint64)
        parts = np.zeros(len(states))
        for mask, coefficient in zip(group.masks, group.coefficients, strict=True):
            parts += np.where(np.bitwise_count(states & mask) & 1, -coefficient, coefficient)
        size = len(drawn)
        own_mean = float((counts * parts).sum()) / size
        squares += float((counts * np.square(parts - own_mean)).sum())
        step = own_mean - mean
        squares += step * step * done * size / (done + size)
        done += size
        mean += step * size / done
    variance = squares / (shots - 1) if shots > 1 else group.weight**2
    return mean, variance / shots
