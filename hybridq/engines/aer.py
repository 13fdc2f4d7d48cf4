"""The Aer engine: programs in, outcomes out, the same bits for a row wherever and with whatever it is evaluated.

Each row of parameters is one execution of its own, on one thread unless it is planned to take more, so nothing else in
a batch can touch its bits. A circuit is assembled once and only re-bound afterwards, through the inner interface that
Aer's own ``run`` uses; where an installed Aer does not have that interface, ``run`` itself does the work, with the same
bits.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qiskit import QuantumCircuit, transpile
from qiskit.circuit import ControlFlowOp, Gate, Parameter
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
from qiskit.quantum_info import PauliList, SparsePauliOp
from qiskit_aer import AerSimulator
from qiskit_aer.library import SaveExpectationValue, SaveProbabilities, SaveStatevector
from qiskit_aer.noise import NoiseModel, ReadoutError
from threadpoolctl import ThreadpoolController

from hybridq.engines.costs import grouped
from hybridq.engines.derivatives import both_ways, shift_slopes, spsa
from hybridq.engines.guard import Numbers, OutOfMemory, Prepared, evaluate_each
from hybridq.engines.lowering import (
    AS_ROTATIONS,
    ROTATIONS,
    Basis,
    Binder,
    Rewrite,
    as_channel,
    lower,
    unbound,
    without_identity,
)
from hybridq.engines.measuring import (
    Group,
    Measured,
    cumulative,
    draws,
    generator,
    mean_of_bits,
    mean_of_draws,
    probabilities,
    rotated,
    split,
)
from hybridq.errors import EngineFailed, HybridqError, WorkflowError
from hybridq.program import CHANNELS, NumericPlan, Outcome, Program, Template, physical

__all__ = ["AerEngine"]

Array = NDArray[Any]

_CACHE_BYTES = 2**26  # of prepared circuits
_BYTES_PER_OPERATION = 2048  # measured 1.6 KiB for a gate with a parameter, Qiskit's and Aer's objects together
_BIND = 2**17  # parameter values bound at a time
_SHOTS = 2**16  # of one execution where Aer returns each as a string
_CLIFFORD = 1e-9  # radians by which an angle may miss a multiple of pi/2


class AerEngine:
    """Evaluates programs with Qiskit Aer in this process. Not for use by several threads at once.

    A program runs on as many threads as its plan says; through Aer's documented interface, always on one.

    ``max_bytes`` is the memory that one program may take, in bytes. ``public`` keeps to Aer's documented interface;
    otherwise that is decided once, by comparing both on a small circuit.
    """

    def __init__(self, max_bytes: int, *, public: bool = False) -> None:
        self.max_bytes = max_bytes
        self._backends: dict[tuple[str, int | None], Any] = {}
        self.public = public or not _inner_interface_works(self._backend("statevector"))
        """Whether circuits go through ``AerSimulator.run`` rather than being assembled once."""
        self._prepared: Prepared[_Prepared] = Prepared(_CACHE_BYTES)
        self._openmp: ThreadpoolController | None = None

    def evaluate(self, programs: Sequence[Program], max_bytes: int | None = None) -> list[Outcome | HybridqError]:
        """Evaluate each program by its plan; a failed one is an error in its place and harms no other.

        ``max_bytes`` lowers the engine's own bound for this call. Errors: `TooLarge` before anything runs, with both
        numbers; `EngineFailed` with Aer's words; `WorkflowError` for fewer shots than groups to be measured.
        """
        allowed = self.max_bytes if max_bytes is None else min(max_bytes, self.max_bytes)
        return evaluate_each("Aer", programs, allowed, self._on_threads)

    def _on_threads(self, program: Program) -> Numbers:
        threads = program.plan.threads
        if threads <= 1:
            return self._compute(program)
        if self._openmp is None:
            self._openmp = ThreadpoolController().select(user_api="openmp")
        with self._openmp.limit(limits=threads):  # of this thread; Aer takes no more than it finds here
            return self._compute(program)

    def _backend(self, method: str, bond_dimension: int | None = None) -> Any:
        known = self._backends.get((method, bond_dimension))
        if known is None:
            # Aer over-estimates matrix product states and would refuse them; 0 MB would mean all of the machine's
            memory = -1 if method == "matrix_product_state" else max(1, self.max_bytes >> 20)
            known = self._backends[method, bond_dimension] = AerSimulator(
                method=method,
                max_parallel_threads=1,
                max_parallel_experiments=1,
                max_parallel_shots=1,
                max_memory_mb=memory,
                matrix_product_state_max_bond_dimension=bond_dimension,
                matrix_product_state_truncation_threshold=_TRUNCATION,
            )
        return known

    def _compute(self, program: Program) -> Numbers:
        template, plan = physical(program.template), program.plan
        if plan.gradient not in ("none", "parameter-shift", "spsa"):
            raise WorkflowError(f"Aer has no gradient by {plan.gradient!r}; plan 'none', 'parameter-shift' or 'spsa'.")
        if plan.gradient != "none" and not template.observables:
            raise WorkflowError("samples have no gradient; plan 'none'.")
        shots = program.shots or 0
        basis, shifted_basis = _bases(plan.method)
        prepared = self._circuit(template, plan, basis)
        if not template.observables:
            bits = np.zeros((program.rows, shots, prepared.num_bytes), dtype=np.uint8)
            for row, slots in enumerate(prepared.bound(program.theta)):
                prepared.sample(slots, program.seeds[row], bits[row])
            return Numbers(np.empty((program.rows, 0)), np.empty((program.rows, 0)), bits, None)
        values = np.empty((program.rows, len(template.observables)))
        stderrs = np.zeros(values.shape)
        layouts = prepared.layouts(shots)
        for row, slots in enumerate(prepared.bound(program.theta)):
            values[row], stderrs[row] = prepared.estimate(slots, layouts, program.seeds[row], 0)
        if plan.gradient == "none":
            return Numbers(values, stderrs, None, None)
        columns = slice(*(program.derived or (0, template.num_parameters)))
        gradients = np.empty((*values.shape, columns.stop - columns.start))
        if plan.gradient == "spsa":
            for row, theta in enumerate(program.theta):
                both = functools.partial(prepared.ends, layouts, program.seeds[row])
                gradients[row] = spsa(theta, program.seeds[row], both, sampled=shots > 0)
            return Numbers(values, stderrs, None, gradients)
        shifted = self._circuit(template, plan, shifted_basis)
        used = shifted.binder.slots_of(columns)
        for row, theta in enumerate(program.theta):
            angles = shifted.binder.bind(theta[None])[0]
            ends = np.zeros((2 * len(angles), values.shape[1]))
            for number, slots in enumerate(both_ways(angles)):
                if used[number // 2]:
                    ends[number] = shifted.estimate(slots, layouts, program.seeds[row], 1 + number)[0]
            gradients[row] = shifted.binder.chain(theta, shift_slopes(ends))[:, columns]
        return Numbers(values, stderrs, None, gradients)

    def _circuit(self, template: Template, plan: NumericPlan, basis: Basis) -> _Prepared:
        key = (template.digest, plan.method, plan.sampling, plan.grouping, plan.options, plan.threads, basis.shared)
        bond = dict(plan.options).get("bond_dimension")
        return self._prepared.get(
            key, lambda: _Prepared(template, plan, basis, self._backend(plan.method, bond), self.public)
        )


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
_GATES = {name: gate for name, (gate, _) in _BINDABLE.items()}
_CLIFFORDS = frozenset(("cx", "cy", "cz", "h", "s", "sdg", "swap", "sx", "sxdg", "x", "y", "z"))
_BY_METHOD = {
    "statevector": Basis("Aer", _NATIVE, _GATES, _CONTROLLED, "kraus"),
    "density_matrix": Basis(
        "Aer's density matrix",
        _NATIVE - {"ccz", "crx", "cry", "crz", "cswap", "csx", "cu", "cu3", "mcphase", "mcx"},
        {name: gate for name, gate in _GATES.items() if name != "cu" and name != "cu3"},
        AS_ROTATIONS,
        "superop",
    ),
    "matrix_product_state": Basis(
        "Aer's matrix product state",
        _NATIVE - {"ccz", "crx", "cry", "crz", "cu", "cu1", "cu3", "mcphase", "mcx"},
        {name: gate for name, gate in _GATES.items() if name not in ("cu", "cu1", "cu3")},
        AS_ROTATIONS,
    ),
    "stabilizer": Basis("Aer's stabilizer method", _CLIFFORDS, ROTATIONS, AS_ROTATIONS),
}
_TRUNCATION = 1e-24  # of a matrix product state's squared weight, a bond; Aer's own 1e-16 shows as 1e-9 in values


@functools.cache
def _bases(method: str) -> tuple[Basis, Basis]:
    """What Aer takes with ``method``: for values, and for values at shifted angles."""
    basis = _BY_METHOD.get(method)
    if basis is None:
        raise WorkflowError(f"Aer has no method {method!r} here; plan one of {', '.join(_BY_METHOD)}.")
    return basis, dataclasses.replace(basis, bindable=ROTATIONS, rewrites=AS_ROTATIONS, shared=False)


# -- two routes to one execution ---------------------------------------------------------------------------------


class _Inner:
    """An assembled circuit that is re-bound and executed: no more of Aer's Python is in the way."""

    def __init__(self, backend: Any, circuit: QuantumCircuit, slots: Sequence[Parameter], threads: int = 1) -> None:
        from qiskit_aer.backends.aer_compiler import assemble_circuits, generate_aer_config

        self._backend = backend
        self._circuits, index_maps = assemble_circuits([circuit])
        self._circuits[0].circ_id = 0
        self._config = generate_aer_config([circuit], backend.options, shots=1)
        self._config.max_parallel_threads = max(1, threads)
        numbers = {slot: number for number, slot in enumerate(slots)}
        self._bindings: list[Any] = []
        self._cells: list[list[float]] = []
        order: list[int] = []
        for index, instruction in enumerate(circuit.data):
            for position, parameter in enumerate(instruction.params):
                if unbound(parameter):
                    self._cells.append([0.0])
                    self._bindings.append([(index_maps[0][index], position), self._cells[-1]])
                    order.append(numbers[parameter])
        self._order = np.array(order, dtype=np.intp)

    def run(self, values: Array) -> dict[str, Any]:
        if self._bindings:
            for cell, value in zip(self._cells, values[self._order].tolist(), strict=True):
                cell[0] = value
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
    """The same through Aer's documented interface, which takes a circuit with its values, and shots if asked for.

    ``rebuilt`` makes what is executed of a circuit with its values; ``noise`` are errors of readout.
    """

    def __init__(
        self,
        backend: Any,
        circuit: QuantumCircuit,
        slots: Sequence[Parameter],
        rebuilt: Callable[[QuantumCircuit], QuantumCircuit] | None = None,
        noise: NoiseModel | None = None,
    ) -> None:
        self._backend = backend
        self._circuit = circuit
        self._slots = slots
        self._rebuilt = rebuilt
        self._options = {} if noise is None else {"noise_model": noise}

    def _bound(self, values: Array) -> QuantumCircuit:
        bound = self._circuit.assign_parameters(dict(zip(self._slots, values.tolist(), strict=True)))
        return bound if self._rebuilt is None else self._rebuilt(bound)

    def run(self, values: Array) -> dict[str, Any]:
        return _public_data(self._backend.run(self._bound(values), shots=1).result())

    def sample(self, values: Array, shots: int, seed: int) -> Array:
        """Bits of ``shots`` executions, uint8, shape (shots, bytes), big-endian packed."""
        job = self._backend.run(self._bound(values), shots=shots, memory=True, seed_simulator=seed, **self._options)
        outcomes = _public_data(job.result())["memory"]
        num_bytes = -(-self._circuit.num_clbits // 8)
        packed = {text: int(text, 16).to_bytes(num_bytes, "big") for text in set(outcomes)}
        return np.frombuffer(b"".join(packed[text] for text in outcomes), np.uint8).reshape(shots, num_bytes)


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


def _cliffords(circuit: QuantumCircuit) -> QuantumCircuit:
    """``circuit`` with its rotations, all by multiples of a quarter turn, as gates of the Clifford group."""
    target = circuit.copy_empty_like()
    for instruction in circuit.data:
        name, params = instruction.name, instruction.operation.params
        qubits = [circuit.find_bit(q).index for q in instruction.qubits]
        if name in ROTATIONS:
            _quarter_turns(target, name, _quarters(name, params[0]), qubits)
            continue
        operation = instruction.operation
        if isinstance(operation, ControlFlowOp):
            operation = operation.replace_blocks(map(_cliffords, operation.blocks))
        target.append(operation, instruction.qubits, instruction.clbits, copy=False)
    return target


def _quarters(name: str, angle: Any) -> int:
    quarters = float(angle) / (np.pi / 2)
    if abs(quarters - round(quarters)) * np.pi / 2 > _CLIFFORD:
        raise WorkflowError(
            f"the stabilizer method takes Clifford gates alone, and the circuit has {name} by {float(angle):.6g} "
            "radians, which is no multiple of pi/2; use another method."
        )
    return round(quarters) % 4


_ABOUT_Z = (), ("s",), ("z",), ("sdg",)
_ABOUT = {  # gates by quarter turns, up to a phase
    "rx": ((), ("sx",), ("x",), ("sxdg",)), "ry": ((), ("z", "h"), ("y",), ("h", "z")), "rz": _ABOUT_Z,
}  # fmt: skip
_INTO_Z: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # of two-qubit words, for each qubit
    "rzz": ((), ()), "rxx": (("h",), ("h",)), "ryy": (("sdg", "h"), ("sdg", "h")), "rzx": ((), ("h",)),
}  # fmt: skip
_BACK = {"h": "h", "sdg": "s"}


def _quarter_turns(circuit: QuantumCircuit, name: str, quarters: int, qubits: list[int]) -> None:
    if len(qubits) == 1:
        for gate in _ABOUT[name][quarters]:
            getattr(circuit, gate)(qubits[0])
        return
    for qubit, gates in zip(qubits, _INTO_Z[name], strict=True):
        for gate in gates:
            getattr(circuit, gate)(qubit)
    circuit.cx(qubits[0], qubits[1])
    for gate in _ABOUT_Z[quarters]:
        getattr(circuit, gate)(qubits[1])
    circuit.cx(qubits[0], qubits[1])
    for qubit, gates in zip(qubits, _INTO_Z[name], strict=True):
        for gate in reversed(gates):
            getattr(circuit, _BACK[gate])(qubit)


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
    values = 0.3 + 0.1 * np.arange(len(slots))
    expected = _Public(backend, circuit, slots).run(values)["0"]
    try:
        inner = _Inner(backend, circuit, slots)
        inner.run(np.zeros(len(slots)))
        found = inner.run(values)["0"]
        return bool(abs(found - expected) < 1e-12)
    except Exception:  # noqa: BLE001 - whatever an undocumented interface does wrong, the documented one is there
        return False


# -- a template, ready to run ------------------------------------------------------------------------------------


class _Prepared:
    """A template compiled for exact values, for distributions to draw from, or for the simulator's own shots."""

    def __init__(self, template: Template, plan: NumericPlan, basis: Basis, backend: Any, public: bool) -> None:
        circuit = self._lower(template, plan, basis)
        self._template, self._sampling = template, plan.sampling
        self._dense = plan.method == "statevector"
        self._measured_observables: tuple[Measured, ...] = ()
        self._exact: list[tuple[float, str | None]] = []
        clbits = template.circuit.num_clbits
        self.num_bytes = -(-(clbits or template.num_qubits) // 8)
        if plan.sampling != "exact":
            readout = template.readout if plan.sampling == "probabilities" else ()
            self._readout = readout
            self._measured_observables = grouped(template, plan.grouping)
        if plan.sampling == "simulator":
            self._routes = self._measured_circuits(circuit, backend)
            saved = len(self._routes)
        else:
            saved = self._save(circuit)
            rebuilt = _cliffords if plan.method == "stabilizer" else None
            inner = not (public or rebuilt)
            self._routes = [
                _Inner(backend, circuit, self._slots, plan.threads) if inner
                else _Public(backend, circuit, self._slots, rebuilt)
            ] if saved and template.num_qubits else []  # fmt: skip
        matrices = sum(p.nbytes for i in circuit.data for p in i.params if isinstance(p, np.ndarray))
        self.nbytes = (
            _BYTES_PER_OPERATION * (len(circuit.data) + 1) * max(1, saved if plan.sampling == "simulator" else 1)
            + 2 * matrices
            + template.num_paulis * (256 + 4 * template.num_qubits)
            + sum(observable.nbytes for observable in self._measured_observables)
        )

    def _lower(self, template: Template, plan: NumericPlan, basis: Basis) -> QuantumCircuit:
        """The circuit in ``basis``; one that only whole executions can sample keeps its instructions."""
        if template.sampled_in_place:
            circuit = template.circuit if template.circuit.num_clbits else template.circuit.measure_all(inplace=False)
            self._slots = tuple(circuit.parameters)
            self.binder = Binder(self._slots, template.positions, template.num_parameters)
            self._final: tuple[tuple[int, int], ...] = ()
            return _whole(circuit, plan.method, basis)
        lowered = lower(template.circuit, basis)
        self._slots = lowered.slots
        self.binder = Binder(lowered.expressions, template.positions, template.num_parameters)
        clbits = template.circuit.num_clbits
        self._final = lowered.measured if clbits else tuple((i, i) for i in range(template.num_qubits))
        return lowered.circuit

    def _save(self, circuit: QuantumCircuit) -> int:
        """Append what is saved at the end; how many things that is."""
        template = self._template
        if self._sampling == "exact":
            for column, observable in enumerate(template.observables):
                constant, rest = without_identity(_misread(observable, template.readout))
                self._exact.append((constant, None if rest is None else str(column)))
                if rest is not None:
                    circuit.append(SaveExpectationValue(rest, label=str(column)), circuit.qubits)
            return sum(label is not None for _, label in self._exact)
        if self._dense:
            if template.num_qubits:
                circuit.append(SaveStatevector(template.num_qubits, label="state"), circuit.qubits)
            return 1
        if not template.observables:
            circuit.append(SaveProbabilities(template.num_qubits, label="0"), circuit.qubits)
            return 1
        groups = [group for observable in self._measured_observables for group in observable.groups]
        for number, group in enumerate(groups):
            _turn(circuit, group)
            circuit.append(SaveProbabilities(template.num_qubits, label=str(number)), circuit.qubits)
            _turn(circuit, group, back=True)
        return len(groups)

    def _measured_circuits(self, circuit: QuantumCircuit, backend: Any) -> list[_Inner | _Public]:
        """A circuit for each group, measured at its end; the circuit itself where bits are sampled."""
        template = self._template
        rebuilt = _cliffords if backend.options.method == "stabilizer" else None
        errors = _readout_errors(template.readout)
        if not template.observables:
            if not template.sampled_in_place:
                circuit = _with_measurements(circuit, self._final, template.circuit.num_clbits or template.num_qubits)
            return [_Public(backend, circuit, self._slots, rebuilt, errors)]
        routes: list[_Inner | _Public] = []
        for observable in self._measured_observables:
            for group in observable.groups:
                turned = circuit.copy()
                _turn(turned, group)
                final = tuple((i, i) for i in range(template.num_qubits))
                turned = _with_measurements(turned, final, template.num_qubits)
                routes.append(_Public(backend, turned, self._slots, rebuilt, errors))
        return routes

    def bound(self, theta: Array) -> Iterator[Array]:
        """Values of the slots for each row of ``theta``."""
        step = max(1, _BIND // max(1, self.binder.width))
        for start in range(0, len(theta), step):
            yield from self.binder.bind(theta[start : start + step])

    def layouts(self, shots: int) -> list[list[int]]:
        """Shots of each group of each observable."""
        return [split(observable, shots) for observable in self._measured_observables]

    def estimate(self, slots: Array, layouts: list[list[int]], seed: Array, shift: int) -> tuple[Any, Any]:
        """Values and standard errors of all observables, each of shape (observables,).

        ``shift`` tells the draws of a row's shifted copies apart; 0 is the row itself.
        """
        if self._sampling == "exact":
            data = self._routes[0].run(slots) if self._routes else {}
            return [c if label is None else c + float(data[label]) for c, label in self._exact], 0.0
        data = self._routes[0].run(slots) if self._routes and self._sampling == "probabilities" else {}
        values, stderrs = np.empty((2, len(layouts)))
        stream = 0
        for column, (observable, layout) in enumerate(zip(self._measured_observables, layouts, strict=True)):
            value, variance = observable.constant, 0.0
            for group, shots in zip(observable.groups, layout, strict=True):
                if self._sampling == "simulator":
                    mean, own = mean_of_bits(group, self._shots(stream, slots, shots, seed, shift))
                else:
                    distribution = cumulative(self._probabilities(data, group, stream))
                    mean, own = mean_of_draws(group, shots, distribution, seed, stream, shift)
                value += mean
                variance += own
                stream += 1
            values[column], stderrs[column] = value, np.sqrt(variance)
        return values, stderrs

    def ends(self, layouts: list[list[int]], seed: Array, points: Array) -> Array:
        """Values at ``points`` of parameters, shape (points, observables), each with draws of its own."""
        return np.array([
            self.estimate(slots, layouts, seed, 1 + number)[0] for number, slots in enumerate(self.bound(points))
        ])  # fmt: skip

    def _probabilities(self, data: dict[str, Any], group: Group | None, stream: int) -> Array:
        """Probabilities of the basis states in a group's basis, not normalised."""
        if self._dense:
            state = np.asarray(data["state"]) if data else np.ones(1)
            if group is not None:
                state = rotated(state, group)
            return probabilities(state)
        found = np.array(data[str(stream)])
        for qubit, (flip_0, flip_1) in enumerate(self._readout):
            if flip_0 or flip_1:
                halves = found.reshape(-1, 2, 1 << qubit)
                zero, one = halves[:, 0], halves[:, 1]
                moved = flip_0 * zero - flip_1 * one
                zero -= moved
                one += moved
        return found

    def sample(self, slots: Array, seed: Array, bits: Array) -> None:
        """Draw shots into ``bits``, zeros of shape (shots, num_bytes), in the order of drawing."""
        if self._sampling == "simulator":
            bits[...] = self._shots(0, slots, len(bits), seed, 0)
            return
        data = self._routes[0].run(slots)
        start = 0
        for drawn in draws(cumulative(self._probabilities(data, None, 0)), len(bits), seed, 0):
            rows = bits[start : start + len(drawn)]
            for qubit, clbit in self._final:
                rows[:, self.num_bytes - 1 - clbit // 8] |= ((drawn >> qubit & 1) << clbit % 8).astype(np.uint8)
            start += len(drawn)

    def _shots(self, number: int, slots: Array, shots: int, seed: Array, shift: int) -> Array:
        """Bits of the simulator's own shots of a circuit, uint8, shape (shots, bytes)."""
        route = self._routes[number]
        assert isinstance(route, _Public)
        parts = []
        for part, start in enumerate(range(0, shots, _SHOTS)):
            own_seed = int(generator(seed, number, (shift << 16) + part).integers(2**31))
            parts.append(route.sample(slots, min(_SHOTS, shots - start), own_seed))
        return np.concatenate(parts)


def _whole(circuit: QuantumCircuit, method: str, basis: Basis) -> QuantumCircuit:
    """A circuit with measurements and the like on its way, in gates that Aer takes with ``method``."""
    if CHANNELS & set(circuit.count_ops()):
        if basis.channels is None:
            raise WorkflowError(f"{basis.engine} has no noise; use method='density_matrix'.")
        converted = circuit.copy_empty_like()
        for instruction in circuit.data:
            operation = instruction.operation
            if operation.name in CHANNELS:
                operation = as_channel(operation, basis.channels)
            converted.append(operation, instruction.qubits, instruction.clbits, copy=False)
        circuit = converted
    options = {"optimization_level": 0, "seed_transpiler": 0}
    if method == "stabilizer":  # its rotations by quarter turns are Clifford gates once their angles are known
        rotations = [name for name in ROTATIONS if name in _ABOUT]
        return transpile(circuit, basis_gates=sorted(_CLIFFORDS.union(rotations)), **options)
    return transpile(circuit, AerSimulator(method=method), **options)


def _turn(circuit: QuantumCircuit, group: Group, *, back: bool = False) -> None:
    """Append the gates of ``group``, or take them ``back``."""
    undo = {"s": "sdg", "sdg": "s"}
    for name, qubits in reversed(group.gates) if back else group.gates:
        getattr(circuit, undo.get(name, name) if back else name)(*qubits)


def _with_measurements(circuit: QuantumCircuit, final: Sequence[tuple[int, int]], clbits: int) -> QuantumCircuit:
    whole = QuantumCircuit(circuit.num_qubits, clbits)
    whole.compose(circuit, range(circuit.num_qubits), inplace=True)
    for qubit, clbit in final:
        whole.measure(qubit, clbit)
    return whole


def _misread(observable: SparsePauliOp, readout: Sequence[tuple[float, float]]) -> SparsePauliOp:
    """What is measured in place of ``observable`` where bits are read with errors.

    Reading Z of a qubit gives flip_1 - flip_0 + (1 - flip_0 - flip_1) Z on average, and so for X and Y, whose bases
    are changed without errors.
    """
    for qubit, (flip_0, flip_1) in enumerate(readout):
        if not (flip_0 or flip_1):
            continue
        acts = observable.paulis.x[:, qubit] | observable.paulis.z[:, qubit]
        scaled = SparsePauliOp(observable.paulis, np.where(acts, 1 - flip_0 - flip_1, 1.0) * observable.coeffs)
        if flip_0 != flip_1 and acts.any():
            x, z = observable.paulis.x[acts].copy(), observable.paulis.z[acts].copy()
            x[:, qubit] = z[:, qubit] = False
            left = SparsePauliOp(PauliList.from_symplectic(z, x), (flip_1 - flip_0) * observable.coeffs[acts])
            scaled = (scaled + left).simplify(atol=0.0, rtol=0.0)
        observable = scaled
    return observable


def _readout_errors(readout: Sequence[tuple[float, float]]) -> NoiseModel | None:
    if not readout:
        return None
    model = NoiseModel()
    for qubit, (flip_0, flip_1) in enumerate(readout):
        if flip_0 or flip_1:
            model.add_readout_error(ReadoutError([[1 - flip_0, flip_0], [flip_1, 1 - flip_1]]), [qubit])
    return model
