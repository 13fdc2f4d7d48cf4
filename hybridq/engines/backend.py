"""The engine for Qiskit backends and V2 primitives: what a device, real or fake, samples or estimates.

A backend that takes a seed is a simulator: each row has runs of its own, seeded by its key, so its bits do not depend
on what else is evaluated. Any other backend may have a queue: everything of a program is handed over at once.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from qiskit import ClassicalRegister, QuantumCircuit
from qiskit.circuit import Parameter
from qiskit.circuit.library import get_standard_gate_name_mapping
from qiskit.exceptions import QiskitError
from qiskit.primitives import BackendEstimatorV2, BackendSamplerV2, BaseEstimatorV2, BaseSamplerV2
from qiskit.providers import BackendV2, Options
from qiskit.transpiler import Target, generate_preset_pass_manager

from hybridq.backends import Backend, loaded, target_of
from hybridq.engines.derivatives import both_ways, shift_slopes, spsa
from hybridq.engines.guard import Numbers, OutOfMemory, Prepared, evaluate_each
from hybridq.engines.lowering import AS_ROTATIONS, ROTATIONS, Basis, Binder, lower, without_identity
from hybridq.engines.measuring import Group, Measured, generator, mean_of_bits, measured, split
from hybridq.errors import EngineFailed, HybridqError, WorkflowError
from hybridq.program import NumericPlan, Outcome, Program, Template, physical

__all__ = ["BackendEngine"]

Array = NDArray[Any]

_CACHE_BYTES = 2**26  # of prepared circuits
_BYTES_PER_OPERATION = 1024  # a circuit's instruction, with its parameters' expressions
_SHOTS = 2**16  # of one run of a simulator, which returns each shot as a string
_DENSITY_MATRIX = 12  # qubits up to which a simulator may take a density matrix: 256 MiB
_MEBIBYTE = 2**20


class BackendEngine:
    """Evaluates programs on Qiskit backends and V2 primitives. Not for use by several threads at once.

    ``max_bytes`` is the memory that one program may take in this process, in bytes.

    A ``BackendV2`` is sampled through Qiskit's ``BackendSamplerV2``, IBM's real ones through the sampler of
    ``qiskit_ibm_runtime``; a V2 sampler as it is. Expectation values are means over the shots of measured groups of
    Paulis (`measuring`), with our error bars. A V2 estimator gives values and errors of its own making, at a precision
    of 1/sqrt(shots): as Qiskit's and IBM's estimators define it, that many shots for each group of theirs, and a
    standard error of at most weight/sqrt(shots), the weight being the sum of the magnitudes of the coefficients.

    A row's bits depend on its key and parameters alone where the backend's options have ``seed_simulator``; else they
    are the device's, or, for a sampler with a seed of its own, whatever that seed makes of a whole program.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._devices: dict[tuple[str, str], _Device] = {}
        self._prepared: Prepared[_Ready] = Prepared(_CACHE_BYTES)

    def evaluate(self, programs: Sequence[Program], max_bytes: int | None = None) -> list[Outcome | HybridqError]:
        """Evaluate each program by its plan; a failed one is an error in its place and harms no other.

        ``max_bytes`` lowers the engine's own bound for this call. Errors: `TooLarge` before anything runs, with both
        numbers; `EngineFailed` with the backend's words; `WorkflowError` for a backend that cannot be made here, for
        fewer shots than groups to be measured, and for samples of an estimator.
        """
        allowed = self.max_bytes if max_bytes is None else min(max_bytes, self.max_bytes)
        return evaluate_each("the backend", programs, allowed, lambda program: self._compute(program, allowed))

    def _compute(self, program: Program, allowed: int) -> Numbers:
        template, plan, shots = physical(program.template), program.plan, program.shots
        if plan.gradient not in ("none", "parameter-shift", "spsa"):
            raise WorkflowError(
                f"a backend has no gradient by {plan.gradient!r}; plan 'none', 'parameter-shift' or 'spsa'."
            )
        if shots is None:
            raise WorkflowError("a backend samples, so it has no exact values; give shots or a precision.")
        device = self._device(plan)
        key = (template.digest, plan.options, plan.grouping, plan.gradient == "parameter-shift")
        ready = self._prepared.get(key, lambda: _Ready(template, plan, device))
        if ready.simulated_bytes > allowed:
            raise OutOfMemory(ready.simulated_bytes)
        if not template.observables:
            bits = np.empty((program.rows, shots, ready.num_bytes), dtype=np.uint8)
            for rows in _blocks(program.rows, device):
                bits[rows] = ready.sample(ready.binder.bind(program.theta[rows]), program.seeds[rows], shots)
            return Numbers(np.empty((program.rows, 0)), np.empty((program.rows, 0)), bits, None)
        ready.check(shots)
        values = np.empty((program.rows, len(template.observables)))
        stderrs = np.empty(values.shape)
        gradients = None if plan.gradient == "none" else np.empty((*values.shape, template.num_parameters))
        for rows in _blocks(program.rows, device):
            keys = list(zip(program.theta[rows], program.seeds[rows], strict=True))
            points = [ready.points(*key, plan.gradient) for key in keys]
            each = len(points[0])
            found, errors = ready.estimate(
                np.concatenate(points), np.repeat(program.seeds[rows], each, axis=0),
                np.tile(np.arange(each), len(points)), shots,
            )  # fmt: skip
            found, errors = (array.reshape(len(points), each, -1) for array in (found, errors))
            values[rows], stderrs[rows] = found[:, 0], errors[:, 0]
            if gradients is not None:
                ends = zip(keys, found[:, 1:], strict=True)
                gradients[rows] = [ready.gradient(*key, own, plan.gradient) for key, own in ends]
        return Numbers(values, stderrs, None, gradients)

    def _device(self, plan: NumericPlan) -> _Device:
        options = dict(plan.options)
        key = (options["source"], options["arguments"])
        known = self._devices.get(key)
        if known is None:
            known = self._devices[key] = _device(loaded(Backend(key[0], json.loads(key[1]))), key[0])
        return known


def _blocks(rows: int, device: _Device) -> Iterator[slice]:
    """Rows that are evaluated together: each by itself where it is seeded by itself, all where there is a queue."""
    together = 1 if device.seeded else max(1, rows)
    for start in range(0, rows, together):
        yield slice(start, start + together)


# -- circuits, ready to run --------------------------------------------------------------------------------------


class _Circuit:
    """A circuit of the device's instructions, with where its values and bits are.

    ``slots`` are what a column of angles is. Classical bits that no register holds in one piece get one, because
    samplers return registers.
    """

    def __init__(self, circuit: QuantumCircuit, slots: Sequence[Parameter]) -> None:
        numbers = {slot: number for number, slot in enumerate(slots)}
        self.columns = np.array([numbers[parameter] for parameter in circuit.parameters], dtype=np.intp)
        covered: set[int] = set()
        self.registers: list[tuple[str, int, int]] = []
        for register in circuit.cregs:
            places = [circuit.find_bit(bit).index for bit in register]
            if places and places == list(range(places[0], places[0] + len(places))) and not covered & set(places):
                self.registers.append((register.name, places[0], len(places)))
                covered.update(places)
        loose = [place for place in range(circuit.num_clbits) if place not in covered]
        runs = np.split(loose, np.flatnonzero(np.diff(loose) > 1) + 1) if loose else []
        if runs:
            circuit = circuit.copy()
        for run in runs:
            register = ClassicalRegister(bits=[circuit.clbits[place] for place in run], name=f"hybridq_{run[0]}")
            circuit.add_register(register)
            self.registers.append((register.name, int(run[0]), len(run)))
        self.circuit = circuit

    def joined(self, data: Any) -> Array:
        """Bits of all classical bits, uint8, shape (..., shots, bytes), from a sampler's registers."""
        total = self.circuit.num_clbits
        if len(self.registers) == 1 and self.registers[0][2] == total:
            whole: Array = data[self.registers[0][0]].array
            return whole
        arrays = [data[name].array for name, _, _ in self.registers]
        bits = np.zeros((*arrays[0].shape[:-1], 8 * -(-total // 8)), dtype=np.uint8)
        for (_, start, size), array in zip(self.registers, arrays, strict=True):
            stop = bits.shape[-1] - start  # the last bit is bit 0
            bits[..., stop - size : stop] = np.unpackbits(array, axis=-1)[..., -size:]
        return np.packbits(bits, axis=-1)


def _simulated_bytes(qubits: int) -> int:
    """Memory that a simulator is let take for a state, in bytes: a density matrix up to `_DENSITY_MATRIX` qubits."""
    return int(16 * (4 if qubits <= _DENSITY_MATRIX else 2) ** qubits)


def _qubits(circuit: QuantumCircuit) -> frozenset[int]:
    """The qubits that take part."""
    return frozenset(circuit.find_bit(q).index for i in circuit.data if i.name != "barrier" for q in i.qubits)


class _Ready:
    """A template as what is run on a device: circuits with their measurements, and the way from bits to values."""

    def __init__(self, template: Template, plan: NumericPlan, device: _Device) -> None:
        circuit = template.circuit
        self._device = device
        if plan.gradient == "parameter-shift":
            lowered = lower(circuit, _basis(device.target))
            slots, expressions = lowered.slots, lowered.expressions
            circuit = device.translated(lowered.circuit)
        else:
            slots = expressions = tuple(circuit.parameters)
        self.binder = Binder(expressions, template.positions, template.num_parameters)
        self._observables: tuple[Measured, ...] = ()
        self._constants: list[float] = []
        self._rest: list[Any] = []
        self._circuits: list[_Circuit] = []
        if not template.observables:
            if device.estimator is not None:
                raise WorkflowError(
                    f"{device.source} is an estimator, which gives expectation values alone; sample with a backend or "
                    "a sampler."
                )
            self._circuits = [_Circuit(_measuring(circuit), slots)]
        elif device.estimator is not None:
            parts = [without_identity(observable) for observable in template.observables]
            self._constants = [constant for constant, _ in parts]
            self._rest = [rest for _, rest in parts]
            self._circuits = [_Circuit(circuit, slots)]
        else:
            both = [device.measured(circuit, observable, plan.grouping) for observable in template.observables]
            self._observables = tuple(observable for observable, _ in both)
            self._circuits = [_Circuit(own, slots) for _, circuits in both for own in circuits]
        self.num_bytes = -(-(template.circuit.num_clbits or template.num_qubits) // 8)
        """Of a shot of samples."""
        widest = max((len(_qubits(own.circuit)) for own in self._circuits), default=0)
        self.simulated_bytes = _simulated_bytes(widest) if device.seeded else 0
        """Memory that a simulator is let take for a state; 0 where nothing is simulated here."""
        self.nbytes = (
            sum(_BYTES_PER_OPERATION * (len(c.circuit.data) + 1) for c in self._circuits)
            + sum(observable.nbytes for observable in self._observables)
            + template.num_paulis * (256 + 4 * template.num_qubits)
        )

    def check(self, shots: int) -> None:
        """Raises `WorkflowError` for fewer shots than groups."""
        for observable in self._observables:
            split(observable, shots)

    def points(self, theta: Array, seed: Array, gradient: str) -> Array:
        """Angles of a row, shape (points, slots): itself, and the points that its ``gradient`` takes."""
        if gradient == "spsa":
            moved: list[Array] = [theta[None]]

            def noted(points: Array) -> Array:
                moved.append(points)
                return np.zeros((2, 1))

            spsa(theta, seed, noted, sampled=True)
            return self.binder.bind(np.concatenate(moved))
        angles = self.binder.bind(theta[None])
        if gradient == "none":
            return angles
        return np.concatenate([angles, *(point[None] for point in both_ways(angles[0]))])

    def gradient(self, theta: Array, seed: Array, ends: Array, gradient: str) -> Array:
        """Shape (observables, parameters), from the values at the points after the first, (points, observables)."""
        if gradient == "spsa":
            return spsa(theta, seed, lambda _: ends, sampled=True)
        return self.binder.chain(theta, shift_slopes(ends))

    def sample(self, angles: Array, seeds: Array, shots: int) -> Array:
        """Bits of the classical bits at ``angles``, shape (points, slots): uint8, shape (points, shots, bytes)."""
        bits: Array = self._device.bits(self._circuits, angles, [shots], seeds, np.zeros(len(angles), np.intp))[0]
        return bits

    def estimate(self, angles: Array, seeds: Array, shifts: Array, shots: int) -> tuple[Array, Array]:
        """Values and standard errors at ``angles``, both of shape (points, observables).

        ``shifts`` tell the points of one row apart, whose keys are equal.
        """
        if self._device.estimator is not None:
            return self._estimated(angles, seeds, shifts, shots)
        layouts = [split(observable, shots) for observable in self._observables]
        flat = [count for layout in layouts for count in layout]
        bits = iter(self._device.bits(self._circuits, angles, flat, seeds, shifts) if flat else ())
        values, variances = np.zeros((2, len(angles), len(self._observables)))
        for column, observable in enumerate(self._observables):
            values[:, column] = observable.constant
            for group in observable.groups:
                for point, own in enumerate(next(bits)):
                    mean, variance = mean_of_bits(group, own)
                    values[point, column] += mean
                    variances[point, column] += variance
        return values, np.sqrt(variances)

    def _estimated(self, angles: Array, seeds: Array, shifts: Array, shots: int) -> tuple[Array, Array]:
        values = np.tile(np.array(self._constants), (len(angles), 1))
        stderrs = np.zeros(values.shape)
        columns = [column for column, rest in enumerate(self._rest) if rest is not None]
        if columns:
            rest = [self._rest[column] for column in columns]
            found, errors = self._device.means(self._circuits[0], rest, angles, shots, seeds, shifts)
            values[:, columns] += found
            stderrs[:, columns] = errors
        return values, stderrs


def _measuring(circuit: QuantumCircuit) -> QuantumCircuit:
    """``circuit``, with a measurement of every qubit if it has no classical bits."""
    if circuit.num_clbits:
        return circuit
    measuring = circuit.copy()
    measuring.add_register(ClassicalRegister(circuit.num_qubits, "meas"))
    measuring.measure(range(circuit.num_qubits), range(circuit.num_qubits))
    return measuring


_GATES = frozenset(get_standard_gate_name_mapping())


def _basis(target: Target | None) -> Basis:
    """What a circuit is lowered to for its derivatives: the device's gates, and rotations for what has parameters."""
    native = _GATES if target is None else _GATES & set(target.operation_names)
    return Basis("the backend", native, ROTATIONS, AS_ROTATIONS, shared=False)


# -- devices -----------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    group: Group
    circuit: QuantumCircuit


class _Device:
    """A backend or primitive in this process."""

    def __init__(self, source: str, target: Target | None, route: _Route | None, estimator: _Means | None) -> None:
        self.source, self.target, self.estimator = source, target, estimator
        self._route = route
        self._passes: dict[tuple[int, int], Any] = {}
        self.seeded = route.seeded if route is not None else estimator is not None and estimator.seeded

    def bits(self, circuits: Sequence[_Circuit], angles: Array, shots: Sequence[int], seeds: Array, shifts: Array
             ) -> list[Array]:  # fmt: skip
        """Bits of each circuit, uint8, shape (points, its shots, bytes), at ``angles``, shape (points, slots).

        ``seeds`` (points, 2) and ``shifts`` (points,) are what seeds of the device are made of, if it takes any. Raises
        `EngineFailed` with the device's words.
        """
        assert self._route is not None
        return self._route.bits(circuits, angles, shots, seeds, shifts)

    def means(self, circuit: _Circuit, observables: Sequence[Any], angles: Array, shots: int, seeds: Array,
              shifts: Array) -> tuple[Array, Array]:  # fmt: skip
        """Values and standard errors by an estimator, both of shape (points, observables); otherwise as `bits`."""
        assert self.estimator is not None
        return self.estimator.means(circuit, observables, angles, shots, seeds, shifts)

    def translated(self, circuit: QuantumCircuit) -> QuantumCircuit:
        """``circuit``, on the device's qubits already, in its gates; nothing else changes. Raises `EngineFailed`."""
        if self.target is None or all(
            self.target.instruction_supported(i.name, tuple(circuit.find_bit(q).index for q in i.qubits))
            for i in circuit.data
        ):
            return circuit
        translated = self._transpiled(circuit, 0)
        layout = translated.layout
        if layout is not None and layout.final_index_layout() != list(range(circuit.num_qubits)):
            raise EngineFailed(
                f"the circuit's rotations act on qubits that {self.source} does not couple, so its derivatives cannot "
                "be measured there by parameter shift; use jac='spsa'."
            )
        return translated

    def measured(self, circuit: QuantumCircuit, observable: Any, grouping: str
                 ) -> tuple[Measured, list[QuantumCircuit]]:  # fmt: skip
        """``observable`` as groups on the bits that each of their circuits measures, and these circuits."""
        whole = measured(observable, grouping)
        pieces = [self._piece(group) for group in whole.groups]
        circuits = []
        for piece in pieces:
            own = circuit.copy()
            own.add_register(piece.circuit.cregs[0])
            own.compose(piece.circuit, own.qubits, piece.circuit.cregs[0], inplace=True)
            circuits.append(own)
        return Measured(whole.constant, tuple(piece.group for piece in pieces)), circuits

    def _piece(self, group: Group) -> _Piece:
        """Change of basis and measurement of a group, of the qubits that it needs alone, in the device's gates.

        The circuit before stays where it is: this starts on its qubits, and where routing moves them, measurements
        follow.
        """
        words = group.masks.astype("<u8").view(np.uint8).reshape(len(group.masks), -1)
        parities = np.unpackbits(words, axis=1, bitorder="little")
        used = np.flatnonzero(parities.any(axis=0))
        piece = QuantumCircuit(group.num_qubits)
        piece.add_register(ClassicalRegister(len(used), "hybridq_bits"))
        for name, qubits in group.gates:
            getattr(piece, name)(*qubits)
        piece.measure(used.tolist(), range(len(used)))
        packed = np.zeros((len(parities), 64 * -(-len(used) // 64)), dtype=np.uint8)
        packed[:, : len(used)] = parities[:, used]
        masks = np.packbits(packed, axis=1, bitorder="little").view("<u8").astype(np.uint64, copy=False)
        narrow = Group(len(used), (), masks, group.coefficients, group.weight)
        return _Piece(narrow, piece if self.target is None else self._transpiled(piece, 1))

    def _transpiled(self, circuit: QuantumCircuit, level: int) -> QuantumCircuit:
        key = (level, circuit.num_qubits)
        passes = self._passes.get(key)
        if passes is None:
            assert self.target is not None
            # without couplings, a circuit is as wide as it was written, and nothing is laid out
            placed = circuit.num_qubits == self.target.num_qubits
            passes = self._passes[key] = generate_preset_pass_manager(
                optimization_level=level, target=self.target, seed_transpiler=0,
                initial_layout=list(range(circuit.num_qubits)) if placed else None,
            )  # fmt: skip
        try:
            transpiled: QuantumCircuit = passes.run(circuit)
        except QiskitError as error:
            raise EngineFailed(f"what is to be measured cannot be translated to {self.source}: {error}") from error
        return transpiled


def _device(made: Any, source: str) -> _Device:
    """What ``source`` made, as a device. Raises `WorkflowError` if it is neither a backend nor a primitive."""
    target = target_of(made)
    if isinstance(made, BackendEstimatorV2) and _takes_seeds(made.backend):
        return _Device(source, target, None, _SeededMeans(made, source))
    if isinstance(made, BaseEstimatorV2):
        return _Device(source, target, None, _QueuedMeans(made, source))
    if isinstance(made, BackendSamplerV2) and _takes_seeds(made.backend):
        return _Device(source, target, _Seeded(made.backend, source, made.options.run_options or {}), None)
    if isinstance(made, BaseSamplerV2):
        return _Device(source, target, _Queued(made, source), None)
    if not isinstance(made, BackendV2):
        raise WorkflowError(
            f"{source} made a {type(made).__qualname__}; it must be a function that returns a Qiskit BackendV2, or a "
            "V2 sampler or estimator."
        )
    if _takes_seeds(made):
        return _Device(source, target, _Seeded(made, source, {}), None)
    sampler = _own_sampler(made) or BackendSamplerV2(backend=_Checked(made))
    return _Device(source, target, _Queued(sampler, source), None)


def _takes_seeds(backend: BackendV2) -> bool:
    return hasattr(backend.options, "seed_simulator")


def _own_sampler(backend: BackendV2) -> Any:
    """The sampler of ``backend``'s own library, where the backend itself no longer runs circuits; else None."""
    runtime: Any = sys.modules.get("qiskit_ibm_runtime")
    if runtime is None or not isinstance(backend, runtime.IBMBackend):
        return None
    try:
        from qiskit_ibm_runtime.executor_sampler import SamplerV2
    except ImportError:  # before 0.50
        from qiskit_ibm_runtime import SamplerV2
    return SamplerV2(mode=backend)


class _Checked(BackendV2):  # type: ignore[misc]
    """A backend whose failed results are errors: Qiskit's primitives would read them as zeros, or not at all."""

    def __init__(self, backend: BackendV2) -> None:
        super().__init__(name=backend.name)
        self._backend = backend
        self._options = backend.options

    @property
    def target(self) -> Target:
        return self._backend.target

    @property
    def max_circuits(self) -> int | None:
        limit: int | None = self._backend.max_circuits
        return limit

    @classmethod
    def _default_options(cls) -> Options:
        return Options()

    def run(self, run_input: Any, **options: Any) -> Any:
        return _CheckedJob(self._backend.run(run_input, **options))


class _CheckedJob:
    def __init__(self, job: Any) -> None:
        self._job = job

    def result(self) -> Any:
        result = self._job.result()
        failed = [str(own.status) for own in result.results if not own.success]
        if failed or not result.success:
            raise EngineFailed("; ".join(dict.fromkeys(failed)) or str(result.status))
        return result


class _Route(Protocol):
    """A way to bits."""

    seeded: bool

    def bits(self, circuits: Sequence[_Circuit], angles: Array, shots: Sequence[int], seeds: Array, shifts: Array
             ) -> list[Array]: ...  # fmt: skip


class _Means(Protocol):
    """A way to expectation values."""

    seeded: bool

    def means(self, circuit: _Circuit, observables: Sequence[Any], angles: Array, shots: int, seeds: Array,
              shifts: Array) -> tuple[Array, Array]: ...  # fmt: skip


def _done(job: Any, source: str) -> Any:
    """The result of a job. Raises `EngineFailed` with its words."""
    try:
        return job.result()
    except Exception as error:  # whatever the backend's library raises
        raise _failure(source, error) from error


def _failure(source: str, error: Exception) -> HybridqError:
    words = str(error) if isinstance(error, EngineFailed) else f"{type(error).__name__}: {error}"
    return EngineFailed(f"the backend {source} failed on this program: {words}")


# -- backends that take a seed -----------------------------------------------------------------------------------


class _Simulator(_Checked):
    """A simulator whose bits depend on its circuits and seed alone: one thread, and always the same method."""

    def __init__(self, backend: BackendV2) -> None:
        super().__init__(backend)
        if getattr(self.options, "noise_model", self) is None:
            backend.run(QuantumCircuit(1, 1)).result()  # the first run of a fake backend makes its noise
        threads = ("max_parallel_threads", "max_parallel_experiments", "max_parallel_shots")
        self._threads = {name: 1 for name in threads if hasattr(self.options, name)}

    def run(self, run_input: Any, **options: Any) -> Any:
        options = {**self._threads, **options}
        noise = options.get("noise_model", getattr(self.options, "noise_model", None))
        if noise is not None:
            options["noise_model"] = _noise_of(noise, run_input)
        if options.get("method", getattr(self.options, "method", None)) == "automatic":
            # Aer's choice of a method depends on how much memory there is
            allowed = max(_simulated_bytes(len(_qubits(circuit))) for circuit in run_input)
            options.setdefault("max_memory_mb", 1 + min(allowed // _MEBIBYTE, 2**31 - 2))
        return super().run(run_input, **options)


def _noise_of(model: Any, circuits: Sequence[QuantumCircuit]) -> Any:
    """What of the noise ``model`` is on gates of ``circuits``: the same bits.

    Aer takes the whole model apart for each run: 1.8 s for 127 qubits, 0.01 s for what a circuit on two of them needs.
    """
    local = ("_local_quantum_errors", "_local_readout_errors")
    if not all(hasattr(model, name) for name in local) or any(map(_branches, circuits)):
        return model
    used: dict[str | None, set[tuple[int, ...]]] = {}
    for circuit in circuits:
        for instruction in circuit.data:
            place = tuple(circuit.find_bit(q).index for q in instruction.qubits)
            for name in (instruction.name, instruction.label):
                used.setdefault(name, set()).add(place)

    def own_errors(name: str, errors: Mapping[tuple[int, ...], Any]) -> dict[tuple[int, ...], Any]:
        return {place: errors[place] for place in sorted(used.get(name, ())) if place in errors}

    own = copy.copy(model)
    own._local_quantum_errors = {n: own_errors(n, errors) for n, errors in model._local_quantum_errors.items()}
    own._local_readout_errors = own_errors("measure", model._local_readout_errors)
    return own


def _branches(circuit: QuantumCircuit) -> bool:
    return any(getattr(i.operation, "blocks", None) for i in circuit.data if not i.is_standard_gate())


class _Seeded:
    """A sampler over a simulator, one run for each point and circuit.

    In one run, circuits of different numbers of shots would get the same seed, and their samples would be correlated.
    """

    seeded = True

    def __init__(self, backend: BackendV2, source: str, run_options: Mapping[str, Any]) -> None:
        self._source = source
        options = {"run_options": dict(run_options)}
        self._sampler = BackendSamplerV2(backend=_Simulator(backend), options=options)

    def bits(self, circuits: Sequence[_Circuit], angles: Array, shots: Sequence[int], seeds: Array, shifts: Array
             ) -> list[Array]:  # fmt: skip
        found = []
        for stream, (circuit, count) in enumerate(zip(circuits, shots, strict=True)):
            rows = zip(angles[:, circuit.columns], seeds, shifts.tolist(), strict=True)
            found.append(np.stack([self._run(circuit, stream, count, *row) for row in rows]))
        return found

    def _run(self, circuit: _Circuit, stream: int, shots: int, angles: Array, seed: Array, shift: int) -> Array:
        parts = []
        for part, start in enumerate(range(0, shots, _SHOTS)):
            own = generator(seed, stream, (shift << 16) + part)
            self._sampler.options.seed_simulator = int(own.integers(2**31))
            job = self._sampler.run([(circuit.circuit, angles)], shots=min(_SHOTS, shots - start))
            parts.append(circuit.joined(_done(job, self._source)[0].data))
        return np.concatenate(parts)


class _SeededMeans:
    """Qiskit's estimator over a simulator, one run for each point: of equal shots, so Aer tells its circuits apart."""

    seeded = True

    def __init__(self, estimator: BackendEstimatorV2, source: str) -> None:
        options = {"abelian_grouping": estimator.options.abelian_grouping}
        self._estimator = BackendEstimatorV2(backend=_Simulator(estimator.backend), options=options)
        self._source = source

    def means(self, circuit: _Circuit, observables: Sequence[Any], angles: Array, shots: int, seeds: Array,
              shifts: Array) -> tuple[Array, Array]:  # fmt: skip
        found = []
        for own, seed, shift in zip(angles[:, circuit.columns], seeds, shifts.tolist(), strict=True):
            self._estimator.options.seed_simulator = int(generator(seed, 0, shift << 16).integers(2**31))
            job = self._estimator.run([(circuit.circuit, observables, own)], precision=_precision(shots))
            data = _done(job, self._source)[0].data
            found.append((np.asarray(data.evs, dtype=np.float64), np.asarray(data.stds, dtype=np.float64)))
        return np.array([values for values, _ in found]), np.array([errors for _, errors in found])


# -- backends with a queue ---------------------------------------------------------------------------------------


class _Queued:
    """A sampler that is handed everything at once: a job for each number of shots, all before any is waited for.

    One job of PUBs with different numbers of shots is what IBM's samplers refuse from now on.
    """

    seeded = False

    def __init__(self, sampler: BaseSamplerV2, source: str) -> None:
        self._sampler, self._source = sampler, source

    def bits(self, circuits: Sequence[_Circuit], angles: Array, shots: Sequence[int], seeds: Array, shifts: Array
             ) -> list[Array]:  # fmt: skip
        jobs: list[tuple[list[int], Any]] = []
        found: dict[int, Array] = {}
        try:
            for count in dict.fromkeys(shots):
                own = [number for number, other in enumerate(shots) if other == count]
                pubs = [(circuits[n].circuit, angles[:, circuits[n].columns]) for n in own]
                jobs.append((own, self._sampler.run(pubs, shots=count)))
            for own, job in jobs:
                for number, result in zip(own, job.result(), strict=True):
                    found[number] = circuits[number].joined(result.data)
        except Exception as error:
            for _, job in jobs:
                _cancel(job)
            raise _failure(self._source, error) from error
        return [found[number] for number in range(len(circuits))]


def _cancel(job: Any) -> None:
    """Take back a job that nobody waits for, as far as it goes."""
    with contextlib.suppress(Exception):  # it may be done, or not of the kind that can be taken back
        job.cancel()


class _QueuedMeans:
    """An estimator that is handed everything at once, in one job."""

    seeded = False

    def __init__(self, estimator: BaseEstimatorV2, source: str) -> None:
        self._estimator, self._source = estimator, source

    def means(self, circuit: _Circuit, observables: Sequence[Any], angles: Array, shots: int, seeds: Array,
              shifts: Array) -> tuple[Array, Array]:  # fmt: skip
        each = [[observable] for observable in observables]  # against all points: (observables, points)
        try:
            job = self._estimator.run(
                [(circuit.circuit, each, angles[:, circuit.columns])], precision=_precision(shots)
            )
        except Exception as error:
            raise _failure(self._source, error) from error
        data = _done(job, self._source)[0].data
        return np.asarray(data.evs, dtype=np.float64).T, np.asarray(data.stds, dtype=np.float64).T


def _precision(shots: int) -> float:
    """1/sqrt(shots), so that an estimator that takes ceil(1/precision^2) shots takes that many, roundings aside."""
    return float((1 + 1e-12) / np.sqrt(shots))
