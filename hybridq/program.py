"""What to evaluate, and the plan by which its numbers come about.

A quantum function returns a `Request`. Checked once, it becomes a `Program`: a `Template` (circuit and observables,
fingerprinted once and sent once to each engine process) plus rows of parameters, shots, one seed a row, and the
`NumericPlan`. Engines turn programs into `Outcome`; `result` turns an outcome into what the researcher sees.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qiskit import ClassicalRegister, QuantumCircuit
from qiskit.circuit import Gate, Instruction, Parameter
from qiskit.quantum_info import Pauli, SparsePauliOp

from hybridq.backends import Adjoint, Aer, AnyBackend, Backend, physical_circuit
from hybridq.errors import NotFinite, WorkflowError
from hybridq.location import Location, seed_key
from hybridq.sites import LOCAL, Site
from hybridq.values import circuit_digest, digest, keep_digest

if TYPE_CHECKING:
    from qiskit.primitives import BitArray

__all__ = [
    "CHANNELS",
    "GRADIENTS",
    "GROUPINGS",
    "Estimate",
    "NumericPlan",
    "Outcome",
    "Program",
    "Request",
    "Template",
    "derivatives",
    "moved",
    "numeric_plan",
    "physical",
    "program",
    "result",
    "single",
]

MAX_SHOTS = 2**31 - 1
GROUPINGS = ("qubit-wise", "commuting")
"""Which Paulis are measured together: those that agree on every qubit they share, or all that commute pairwise."""
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Estimate:
    """An expectation value with its standard error.

    ``value`` and ``stderr`` are floats, or arrays of the broadcast shape of parameters and observables; ``stderr`` is
    0 for an exact evaluation (``shots`` is None then). In units of the observable. A scalar estimate works as a float;
    sums, differences and multiples by exact numbers keep the error bar, errors of two estimates adding in quadrature
    (each call draws its own samples).
    """

    value: float | Array
    stderr: float | Array = 0.0
    shots: int | None = None

    def __float__(self) -> float:
        return float(self.value)

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    __array_priority__ = 1000.0
    """NumPy numbers and arrays leave sums and products to this class, which keeps the error bar."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        array: Array = np.array(self.value, dtype=dtype, copy=True if copy is None else copy)
        return array

    def _linear(self, other: Any, sign: float) -> Estimate:
        if isinstance(other, Estimate):
            shots = None if self.shots is None and other.shots is None else (self.shots or 0) + (other.shots or 0)
            stderr = np.hypot(self.stderr, other.stderr)
            return Estimate(self.value + sign * other.value, _plain(stderr), shots)
        exact = _exact(other)
        if exact is None:
            refusal: Estimate = NotImplemented  # Python's word for it; a TypeError in the end
            return refusal
        return Estimate(_plain(self.value + sign * exact), self.stderr, self.shots)

    def __add__(self, other: Any) -> Estimate:
        return self._linear(other, 1.0)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Estimate:
        return self._linear(other, -1.0)

    def __rsub__(self, other: Any) -> Estimate:
        return (-self)._linear(other, 1.0)

    def __mul__(self, factor: Any) -> Estimate:
        exact = None if isinstance(factor, Estimate) else _exact(factor)
        if exact is None:
            return NotImplemented
        return Estimate(_plain(self.value * exact), _plain(self.stderr * np.abs(exact)), self.shots)

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> Estimate:
        exact = None if isinstance(factor, Estimate) else _exact(factor)
        return NotImplemented if exact is None else self * (1.0 / exact)

    def __neg__(self) -> Estimate:
        return self * -1.0

    def __pos__(self) -> Estimate:
        return self

    def __abs__(self) -> Any:
        return abs(self.value)

    def _compare(self, other: Any, compare: Callable[[Any, Any], Any]) -> Any:
        return compare(self.value, other.value if isinstance(other, Estimate) else other)

    def __lt__(self, other: Any) -> Any:
        return self._compare(other, operator.lt)

    def __le__(self, other: Any) -> Any:
        return self._compare(other, operator.le)

    def __gt__(self, other: Any) -> Any:
        return self._compare(other, operator.gt)

    def __ge__(self, other: Any) -> Any:
        return self._compare(other, operator.ge)

    def __eq__(self, other: object) -> Any:
        return self._compare(other, operator.eq)

    __hash__ = None  # type: ignore[assignment]  # compares by value, and a value may be an array


def _exact(number: Any) -> Array | None:
    """A real number or array of them in double precision; None for anything else."""
    array = np.asarray(number)
    return array.astype(np.float64) if array.dtype.kind in "biuf" else None


def _plain(value: Any) -> Any:
    """A Python float for a scalar, the array otherwise."""
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array


@dataclass(frozen=True)
class NumericPlan:
    """How the numbers of a program come about: everything that may change their bits.

    A pure function of the program and the installed versions (`numeric_plan`); recorded, and reused on resume.
    """

    engine: str
    method: str
    sampling: str
    """``exact`` (no shots), ``probabilities`` (own generator over exact probabilities), ``simulator`` (the simulator's
    own shots, each row and group with its own seed), or ``backend`` (the shots of a Qiskit backend)."""
    grouping: str
    """``none`` for exact values and samples; for sampled expectation values one of `GROUPINGS`."""
    threads: int
    """1; or 0 for a program so wide that it earns all threads of the worker it runs on, alone there. Then its last bits
    are not reproducible: they may differ from run to run, and with how many threads there are."""
    versions: tuple[tuple[str, str], ...]
    reason: str
    gradient: str = "none"
    """``none``, or how derivatives come with the values: ``adjoint``, ``parameter-shift``, ``spsa``."""
    options: tuple[tuple[str, Any], ...] = ()
    """Further settings of the engine, by name: a bond dimension, the function that returns a backend."""


@dataclass(frozen=True, eq=False)
class Template:
    """A circuit with its observables: what is compiled once per engine process.

    ``observables`` is flat; an empty tuple means that bit strings are sampled. Both are snapshots: later changes to the
    researcher's objects make another template.
    """

    circuit: QuantumCircuit
    observables: tuple[SparsePauliOp, ...]
    digest: str
    num_qubits: int
    num_parameters: int
    num_gates: int
    num_paulis: int
    sampled_in_place: bool
    """Whether the circuit measures, resets or branches before its end, so that only whole executions can sample it."""
    has_channels: bool = False
    """Whether it has instructions that are no gates but quantum channels: noise, which needs a density matrix."""
    backend: AnyBackend | None = None
    """What evaluates it; None for a circuit as its backend has it (`physical`)."""
    readout: tuple[tuple[float, float], ...] = ()
    """Of a physical template: for each qubit the probabilities of reading 1 for 0 and 0 for 1; empty without errors."""
    columns: tuple[int, ...] | None = None
    """Of a physical template: the column of parameter values that each parameter of its circuit takes, where its
    backend's translation left some out; None: as they come."""
    cache: dict[str, Any] = field(default_factory=dict, repr=False)
    """What was made of it once, kept with the template (never part of its identity)."""

    @property
    def positions(self) -> dict[Parameter, int]:
        """The column of parameter values that each parameter of the circuit takes."""
        columns = range(self.num_parameters) if self.columns is None else self.columns
        return dict(zip(self.circuit.parameters, columns, strict=True))


@dataclass(frozen=True, eq=False)
class Request:
    """What a quantum function returns: a description of an evaluation, nothing computed."""

    circuit: QuantumCircuit
    observables: Any
    """None for bit strings; else an observable or nested sequence of observables."""
    theta: Any
    shots: int | None = None
    precision: float | None = None
    backend: Any = None
    """What evaluates it: a backend, its name, or that of a device of the site; None for what the site says."""
    grouping: str | None = None
    """One of `GROUPINGS`; None for qubit-wise."""


@dataclass(frozen=True, eq=False)
class Program:
    """What an engine evaluates, batch axis first."""

    template: Template
    theta: Array
    """Parameter values, float64, shape (rows, template.num_parameters)."""
    shots: int | None
    """Shots of each row, split among the observable's groups; None for exact values."""
    seeds: Array
    """Keys of the rows' counter-based generators, uint64, shape (rows, 2)."""
    plan: NumericPlan
    batch_shape: tuple[int, ...]
    """Shape of the parameters' leading axes as the researcher gave them; their product is rows."""
    observables_shape: tuple[int, ...]
    device: str = ""
    """The device of the site that it was asked to run on; "" for any that can."""
    derived: tuple[int, int] | None = None
    """Of the part of a program that `divisible` lets divide its derivatives: the first of the parameters that they are
    by, and the one after the last; None: all."""

    @property
    def divisible(self) -> tuple[int, int]:
        """Into how many parts its rows, and the derivatives of each, can be divided without a change of their bits.

        Each row has seeds of its own, and so has each shifted copy of it, of which Aer's parameter shift takes two for
        a parameter. The shots of a Qiskit backend are not divided: its jobs are few and each may wait in a queue.
        """
        if self.plan.sampling == "backend":
            return 1, 1
        apart = self.plan.engine == "aer" and self.plan.gradient == "parameter-shift"
        return self.rows, max(1, self.template.num_parameters) if apart else 1

    @property
    def backend(self) -> str:
        """Identity of what evaluates it."""
        assert self.template.backend is not None, "only circuits as a backend has them have none"
        return self.template.backend.identity

    @property
    def rows(self) -> int:
        """How many parameter sets are evaluated."""
        return len(self.theta)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an engine returns for one program."""

    values: Array
    """Expectation values, float64, shape (rows, observables); (rows, 0) for samples."""
    stderrs: Array
    """Standard errors, same shape; zeros for exact values."""
    bits: Array | None
    """Samples, uint8, shape (rows, shots, bytes): big-endian packed as in Qiskit's ``BitArray``; None for values."""
    seconds: float
    """Time inside the engine, in seconds."""
    peak_bytes: int
    """Growth of the engine process' peak memory while it ran, in bytes: 0 if it stayed below an earlier peak, and for
    programs of a projected need below 48 MiB, which are too small to be looked at."""
    gradients: Array | None = None
    """Derivatives of the values by the parameters, shape (rows, observables, parameters), in units of the observable a
    radian; None where the plan asks for none."""


# -- from request to program -------------------------------------------------------------------------------------


def program(request: Request, *, seed: int, location: Location, gradient: str = "none", site: Site = LOCAL) -> Program:
    """Check ``request`` once and for all, and make it a program whose rows are seeded by ``seed`` and ``location``.

    ``gradient`` is ``none``, or one of `GRADIENTS` for derivatives by all parameters with the values; ``site`` says
    what evaluates a request that names nothing, and what the name of a device stands for.
    Raises `WorkflowError` for anything written wrongly, before anything is spent, `NoDevice` for a device that is
    missing, and `NotFinite` for parameters that are NaN or infinite.
    """
    if not isinstance(request, Request):
        raise WorkflowError(
            f"a quantum function returned {_describe(request)}; it must return hq.expval(...) or hq.sample(...) and "
            "do nothing else. Put classical arithmetic into a classical step or the workflow."
        )
    backend, device = site.resolve(request.backend)
    template, observables_shape = _templates.get(request.circuit, request.observables, backend)
    theta = _parameters(request.theta, template.circuit)
    shots = _shots(request, template)
    batch_shape = theta.shape[:-1]
    try:
        if batch_shape and observables_shape:
            np.broadcast_shapes(batch_shape, observables_shape)
    except ValueError:
        raise WorkflowError(
            f"parameters of batch shape {batch_shape} and observables of shape {observables_shape} do not broadcast; "
            "give them equal leading shapes, or 1 where one is to be repeated."
        ) from None
    rows = theta.reshape(math.prod(batch_shape), template.num_parameters)
    plan = _plan(template, shots, gradient, request.grouping)
    seeds = _seeds(plan, seed, location, len(rows))
    return Program(template, rows, shots, seeds, plan, batch_shape, observables_shape, device)


def _seeds(plan: NumericPlan, seed: int, location: Location, rows: int) -> Array:
    if plan.sampling == "exact" and plan.gradient != "spsa":
        return np.zeros((rows, 2), dtype=np.uint64)
    return np.array([seed_key(seed, location, row) for row in range(rows)], dtype=np.uint64).reshape(-1, 2)


def moved(before: Program, theta: Any, *, seed: int, location: Location) -> Program | None:
    """What `program` would make of the request of ``before``, of one row, with other parameters, if nothing is changed.

    It is a guess, for who begins with it and looks meanwhile. None where it cannot be made, or might do harm: some
    simulators never come back from an angle that is not finite.
    """
    try:
        row = np.asarray(theta)
    except ValueError:  # no array
        return None
    if row.dtype.kind not in "iufb" or row.shape != before.theta.shape[1:] or not np.isfinite(row).all():
        return None
    rows, seeds = row.astype(np.float64, copy=False).reshape(1, -1), _seeds(before.plan, seed, location, 1)
    return Program(
        before.template, rows, before.shots, seeds, before.plan, before.batch_shape, before.observables_shape,
        before.device,
    )  # fmt: skip


def result(program: Program, outcome: Outcome) -> Estimate | BitArray:
    """What a quantum function's call returns: an `Estimate`, or a Qiskit ``BitArray`` of the batch shape.

    Raises `NotFinite` if a value or standard error is NaN or infinite.
    """
    if outcome.bits is not None:
        from qiskit.primitives import BitArray

        bits = outcome.bits.reshape(*program.batch_shape, *outcome.bits.shape[1:])
        return BitArray(bits, program.template.circuit.num_clbits or program.template.num_qubits)
    found = single(program, outcome)
    if found is not None:
        return Estimate(found[0], found[1], program.shots)
    _check_finite(program, outcome)
    return Estimate(
        _arrange(program, outcome.values),
        _arrange(program, outcome.stderrs) if program.shots is not None else 0.0,
        program.shots,
    )


def derivatives(program: Program, outcome: Outcome) -> Array:
    """Derivatives by the parameters, shape (..., P): the broadcast shape of parameters and observables, then P.

    Raises `NotFinite` as `result` does.
    """
    assert outcome.gradients is not None
    found = single(program, outcome)
    if found is not None and found[2] is not None:
        return found[2]
    _check_finite(program, outcome)
    columns = [_arrange(program, outcome.gradients[:, :, p]) for p in range(program.template.num_parameters)]
    shape = np.broadcast_shapes(program.batch_shape, program.observables_shape)
    return np.stack(columns, axis=-1) if columns else np.zeros((*shape, 0))


def single(program: Program, outcome: Outcome) -> tuple[float, float, Array | None] | None:
    """The value, its standard error and its gradient, if any, of an outcome of one value; None of any other.

    What loops ask for, in a hurry. Raises `NotFinite` as `result` does.
    """
    if outcome.values.shape != (1, 1) or program.batch_shape or program.observables_shape or outcome.bits is not None:
        return None
    value, stderr = outcome.values.item(), outcome.stderrs.item()
    gradient: Array | None = None if outcome.gradients is None else outcome.gradients[0, 0].copy()
    if not (math.isfinite(value) and math.isfinite(stderr) and (gradient is None or np.isfinite(gradient).all())):
        _check_finite(program, outcome)
    return value, stderr if program.shots is not None else 0.0, gradient


def _check_finite(program: Program, outcome: Outcome) -> None:
    if not (np.isfinite(outcome.values).all() and np.isfinite(outcome.stderrs).all()):
        row = int(np.argwhere(~(np.isfinite(outcome.values) & np.isfinite(outcome.stderrs)))[0][0])
        raise NotFinite(
            f"row {row} of the evaluation gave {outcome.values[row].tolist()} for the parameters "
            f"{program.theta[row].tolist()}; nothing was recorded. Check the circuit's gates and the observable."
        )
    if outcome.gradients is not None and not np.isfinite(outcome.gradients).all():
        row = int(np.argwhere(~np.isfinite(outcome.gradients))[0][0])
        raise NotFinite(
            f"row {row} of the evaluation has a gradient that is not finite, at the parameters "
            f"{program.theta[row].tolist()}; nothing was recorded. Check the circuit's parameter expressions."
        )


def _arrange(program: Program, flat: Array) -> float | Array:
    """Values of shape (rows, observables) in the broadcast shape of parameters and observables."""
    if flat.shape == (1, 1) and program.batch_shape == program.observables_shape == ():
        return float(flat[0, 0])
    rows, columns = np.broadcast_arrays(
        np.arange(flat.shape[0]).reshape(program.batch_shape),
        np.arange(flat.shape[1]).reshape(program.observables_shape),
    )
    arranged: float | Array = _plain(flat[rows, columns])
    return arranged


def _describe(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__qualname__}"


def _parameters(theta: Any, circuit: QuantumCircuit) -> Array:
    expected = circuit.num_parameters
    if isinstance(theta, Mapping):
        theta = _bound_by_name(theta, circuit)
    try:
        array = np.asarray(() if theta is None else theta)
    except ValueError as error:
        raise WorkflowError(f"the parameters do not form an array: {error}") from error
    if array.dtype.kind not in "iufb" and array.size:
        raise WorkflowError(f"the parameters are of dtype {array.dtype}; they must be real numbers (radians).")
    array = array.astype(np.float64)
    if array.ndim == 0 and expected == 1:
        array = array.reshape(1)
    if array.ndim == 0 or array.shape[-1] != expected:
        names = ", ".join(p.name for p in list(circuit.parameters)[:4]) + (", ..." if expected > 4 else "")
        raise WorkflowError(
            f"the circuit has {expected} parameters ({names or 'none'}), but values of shape {array.shape} were given; "
            "the last axis must hold one value for each, in the order of circuit.parameters."
        )
    finite = np.isfinite(array)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise NotFinite(
            f"parameter {where[-1]} ({circuit.parameters[where[-1]].name}) is {array[where]}; it must be finite."
        )
    return array


def _bound_by_name(theta: Mapping[Any, Any], circuit: QuantumCircuit) -> Array:
    known = {p.name: p for p in circuit.parameters}
    given: dict[str, Any] = {}
    for key, value in theta.items():
        name = key.name if isinstance(key, Parameter) else key
        if name not in known or (isinstance(key, Parameter) and known[name] != key):
            raise WorkflowError(
                f"{name!r} is not a parameter of the circuit; its parameters are {', '.join(known) or 'none'}."
            )
        given[name] = value
    missing = [name for name in known if name not in given]
    if missing:
        raise WorkflowError(f"no value was given for {', '.join(missing)}; every parameter of the circuit needs one.")
    try:
        return np.stack(np.broadcast_arrays(*(given[name] for name in known)), axis=-1) if known else np.zeros(0)
    except ValueError as error:
        raise WorkflowError(f"the values of the parameters do not broadcast: {error}") from error


def _shots(request: Request, template: Template) -> int | None:
    shots, precision = request.shots, request.precision
    if shots is not None and precision is not None:
        raise WorkflowError("both shots and precision were given; give one of them.")
    if precision is not None:
        if isinstance(precision, bool) or not isinstance(precision, (int, float)) or not 0 < precision < math.inf:
            raise WorkflowError(
                f"precision is {precision!r}; it must be a positive number, in units of the observable. Leave it out "
                "for an exact value."
            )
        if not template.observables:
            raise WorkflowError("precision has no meaning for samples; give shots.")
        weight = max(_weight(o) for o in template.observables)
        ratio = min(weight / precision, 1e100)
        if ratio**2 > MAX_SHOTS:
            raise WorkflowError(
                f"precision {precision!r} would take {ratio**2:.3g} shots; at most {MAX_SHOTS} are allowed."
            )
        return max(1, math.ceil(ratio**2))
    if shots is not None:
        if isinstance(shots, bool) or not isinstance(shots, (int, np.integer)) or not 1 <= shots <= MAX_SHOTS:
            raise WorkflowError(f"shots is {shots!r}; it must be an integer from 1 to {MAX_SHOTS}, or None.")
        return int(shots)
    if not template.observables:
        raise WorkflowError("samples need a number of shots: hq.sample(circuit, theta, shots=1000).")
    return None


def _weight(observable: SparsePauliOp) -> float:
    """Sum of the magnitudes of the non-identity coefficients.

    With shots split in proportion to it, the standard error is at most weight / sqrt(shots).
    """
    identity = ~(observable.paulis.x.any(axis=1) | observable.paulis.z.any(axis=1))
    return float(np.abs(observable.coeffs[~identity]).sum())


# -- templates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Known:
    """A template with what the researcher's own objects were when it was made, to tell whether they are that still."""

    circuit: QuantumCircuit
    observables: Any
    instructions: Any
    """Of a copy of the circuit, so that nothing in them changes with it."""
    width: tuple[int, int]
    """Qubits and classical bits."""
    phase: Any
    marks: Any
    template: Template
    shape: tuple[int, ...]

    def of(self, circuit: Any, observables: Any) -> bool:
        """Whether these are the same objects, of the same size."""
        return (
            self.circuit is circuit
            and self.observables is observables
            and len(circuit._data) == len(self.instructions)
            and circuit.num_parameters == self.template.num_parameters
        )

    def holds(self) -> bool:
        """Whether nothing in the objects has changed."""
        circuit, observables = self.circuit, self.observables
        data = circuit._data
        return (
            (circuit.num_qubits, circuit.num_clbits) == self.width
            and (data[:] if isinstance(self.instructions, list) else data) == self.instructions
            and circuit.global_phase == self.phase
            and bool(_marks(observables) == self.marks)
        )


_LISTED = 256
"""Instructions up to which a circuit's are kept as a list: compared in half the time, in many times the memory."""


class _TemplateCache:
    """Templates by the researcher's own objects, so that a loop fingerprints its circuit once.

    Circuits and observables can be changed in place; each hit is compared with what they were (a microsecond a gate),
    so a changed object makes a new template and never meets an old result.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, int, str], _Known] = OrderedDict()

    def get(self, circuit: Any, observables: Any, backend: AnyBackend) -> tuple[Template, tuple[int, ...]]:
        key = (id(circuit), id(observables), backend.identity)
        with self._lock:
            entry = self._known.get(key)
        if entry is not None and entry.of(circuit, observables) and entry.holds():
            return entry.template, entry.shape
        if not isinstance(circuit, QuantumCircuit):
            raise WorkflowError(f"the circuit is {_describe(circuit)}; give a qiskit.QuantumCircuit.")
        # what is compared later is taken first: what changes from here on is noticed
        copy = _plain_copy(circuit)
        instructions = copy._data[:] if len(copy._data) <= _LISTED else copy._data
        width, marks = (copy.num_qubits, copy.num_clbits), _marks(observables)
        template, shape = _template(circuit, observables, backend)
        found = _Known(circuit, observables, instructions, width, copy.global_phase, marks, template, shape)
        with self._lock:
            self._known[key] = found
            self._known.move_to_end(key)
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)
        return template, shape


_templates = _TemplateCache(capacity=512)


def _marks(observables: Any) -> Any:
    """What observables are, down to the bytes, to be compared."""
    if observables is None or isinstance(observables, str):
        return observables
    if isinstance(observables, SparsePauliOp):
        return _mark(observables)
    flat, shape = _flatten(observables)
    return (shape, [_mark(observable) for observable in flat])


def _mark(observable: SparsePauliOp) -> Any:
    paulis, coefficients = observable.paulis, observable.coeffs
    if coefficients.dtype == object:
        coefficients = coefficients.tolist()
    else:
        coefficients = (coefficients.dtype, coefficients.tobytes())
    return (coefficients, paulis.num_qubits, paulis.x.tobytes(), paulis.z.tobytes(), paulis._phase.tobytes())


def _template(circuit: QuantumCircuit, observables: Any, backend: AnyBackend) -> tuple[Template, tuple[int, ...]]:
    original, circuit = circuit, _plain_copy(circuit)
    in_place = _sampled_in_place(circuit)
    flat, shape = ([], ()) if observables is None else _flatten(observables)
    if observables is not None:
        if not flat:
            raise WorkflowError("no observable was given; hq.expval(circuit, observables, theta) needs at least one.")
        if in_place:
            raise WorkflowError(
                "the circuit measures, resets or branches before its end; an expectation value needs a circuit of "
                "gates alone. Remove those instructions, or use hq.sample."
            )
        if "measure" in circuit.count_ops():
            circuit = circuit.remove_final_measurements(inplace=False)
        for observable in flat:
            _check_observable(observable, circuit.num_qubits)
    elif circuit.num_qubits == 0:
        raise WorkflowError("the circuit has no qubits.")
    elif circuit.num_clbits and not in_place and "measure" not in circuit.count_ops():
        raise WorkflowError(
            f"the circuit has {circuit.num_clbits} classical bits but measures into none of them; add measurements, or "
            "drop the classical bits to have every qubit measured."
        )
    structure = circuit_digest(circuit)
    if type(original) is QuantumCircuit:
        keep_digest(original, circuit, structure)
    identity = digest([
        structure, [o.to_list() for o in flat] if observables is not None else None, backend.identity,
    ])  # fmt: skip
    return (
        Template(
            circuit=circuit,
            observables=tuple(flat),
            digest=identity,
            num_qubits=circuit.num_qubits,
            num_parameters=circuit.num_parameters,
            num_gates=circuit.size(),
            num_paulis=sum(len(o) for o in flat),
            sampled_in_place=in_place,
            has_channels=_has_channels(circuit),
            backend=backend,
        ),
        shape,
    )


def _plain_copy(circuit: QuantumCircuit) -> QuantumCircuit:
    """A copy of ``circuit`` that is a ``QuantumCircuit`` itself: subclasses of libraries (``UCCSD``) are no data."""
    if type(circuit) is QuantumCircuit:
        return circuit.copy()
    plain = QuantumCircuit(
        circuit.qubits, circuit.clbits, *circuit.qregs, *circuit.cregs, name=circuit.name, metadata=circuit.metadata
    )
    return plain.compose(circuit, circuit.qubits, circuit.clbits)


def physical(template: Template) -> Template:
    """``template`` as its backend has it: translated, on the qubits that take part, noise in its place; made once.

    Raises `WorkflowError` if it does not fit the backend.
    """
    if template.backend is None:
        return template
    found: Template | None = template.cache.get("physical")
    if found is None:
        found = template.cache["physical"] = _physical(template, template.backend)
    return found


def _physical(template: Template, backend: AnyBackend) -> Template:
    made = physical_circuit(template.circuit, backend)
    circuit, width = made.circuit, made.circuit.num_qubits
    if made.places != tuple(range(width)) and not template.observables and not circuit.num_clbits:
        circuit = circuit.copy()
        circuit.add_register(ClassicalRegister(template.num_qubits, "meas"))
        circuit.measure(made.places, range(template.num_qubits))
    noise = backend.noise if isinstance(backend, Aer) else None
    readout = tuple(noise.readout_of(qubit) for qubit in made.qubits) if noise is not None else ()
    positions = template.positions
    columns = tuple(positions[parameter] for parameter in circuit.parameters)
    return Template(
        circuit=circuit,
        observables=tuple(o.apply_layout(list(made.places), width) for o in template.observables),
        digest=template.digest,
        num_qubits=width,
        num_parameters=template.num_parameters,
        num_gates=circuit.size(),
        num_paulis=template.num_paulis,
        sampled_in_place=template.sampled_in_place,
        has_channels=template.has_channels or noise is not None,
        readout=readout if any(map(any, readout)) else (),
        columns=None if columns == tuple(range(template.num_parameters)) else columns,
    )


def _sampled_in_place(circuit: QuantumCircuit) -> bool:
    measured: set[Any] = set()
    for instruction in circuit.data:
        operation = instruction.operation
        if operation.name == "barrier":
            continue
        if measured & set(instruction.qubits) or operation.name in ("reset", "initialize"):
            return True
        if operation.name == "measure":
            measured.update(instruction.qubits)
        elif instruction.clbits or getattr(operation, "blocks", None) or _resets_within(operation):
            return True
    return False


def _has_channels(circuit: QuantumCircuit) -> bool:
    for instruction in circuit.data:
        if instruction.name in CHANNELS:
            return True
        if instruction.is_standard_gate() or instruction.name in ("barrier", "delay", "initialize", "measure", "reset"):
            continue
        operation = instruction.operation
        inner = list(getattr(operation, "blocks", ()))
        if isinstance(operation, Instruction) and not isinstance(operation, Gate) and operation.definition is not None:
            inner.append(operation.definition)
        if any(map(_has_channels, inner)):
            return True
    return False


def _resets_within(operation: Any) -> bool:
    """Whether an instruction that is not a gate resets qubits inside."""
    if isinstance(operation, Gate) or not isinstance(operation, Instruction) or operation.definition is None:
        return False
    return _sampled_in_place(operation.definition)


def _flatten(observables: Any) -> tuple[list[SparsePauliOp], tuple[int, ...]]:
    single = _observable(observables)
    if single is not None:
        return [single], ()
    if not isinstance(observables, (Sequence, np.ndarray)):
        raise WorkflowError(
            f"the observable is {_describe(observables)}; give a SparsePauliOp, Pauli, label, a {{label: coefficient}} "
            "dict, a list of (label, coefficient) pairs, or a sequence of these."
        )
    if isinstance(observables, np.ndarray):
        return _flatten(observables.tolist())
    parts = [_flatten(member) for member in observables]
    shapes = {shape for _, shape in parts}
    if len(shapes) > 1:
        raise WorkflowError(f"the observables form a ragged array with rows of shapes {sorted(shapes)}.")
    inner: tuple[int, ...] = shapes.pop() if shapes else ()
    return [o for members, _ in parts for o in members], (len(parts), *inner)


def _observable(value: Any) -> SparsePauliOp | None:
    """``value`` as one observable, or None if it is a sequence of them."""
    try:
        if isinstance(value, SparsePauliOp):
            return SparsePauliOp(value.paulis, value.coeffs)  # a copy, signs of its Paulis moved to the coefficients
        if isinstance(value, Pauli):
            return SparsePauliOp(value)
        if isinstance(value, str):
            return SparsePauliOp(value)
        if isinstance(value, Mapping):
            return SparsePauliOp.from_list(list(value.items()))
        if isinstance(value, Sequence) and value and all(_is_term(term) for term in value):
            return SparsePauliOp.from_list([(label, coefficient) for label, coefficient in value])
    except Exception as error:  # Qiskit raises several types for a malformed label
        raise WorkflowError(f"{value!r:.80} is not an observable: {error}") from error
    return None


def _is_term(term: Any) -> bool:
    return isinstance(term, tuple) and len(term) == 2 and isinstance(term[0], str) and not isinstance(term[1], str)


def _check_observable(observable: SparsePauliOp, num_qubits: int) -> None:
    if observable.num_qubits != num_qubits:
        raise WorkflowError(
            f"the observable acts on {observable.num_qubits} qubits, the circuit has {num_qubits}; pad the observable "
            "with identities or apply the circuit's layout to it."
        )
    coefficients = np.asarray(observable.coeffs)
    if coefficients.dtype.kind not in "fc":
        raise WorkflowError("the observable has unbound parameters among its coefficients; bind them first.")
    if not np.isfinite(coefficients).all():
        raise WorkflowError(f"coefficient {int(np.argmin(np.isfinite(coefficients)))} of the observable is not finite.")
    worst = int(np.argmax(np.abs(coefficients.imag)))
    if abs(coefficients.imag[worst]) > 1e-10 * max(1.0, float(np.abs(coefficients).max())):
        raise WorkflowError(
            f"the observable is not Hermitian: the coefficient of {observable.paulis[worst].to_label()} is "
            f"{coefficients[worst]}; every coefficient must be real."
        )


# -- plan --------------------------------------------------------------------------------------------------------


GRADIENTS = ("auto", "adjoint", "parameter-shift", "spsa")
"""Ways to derivatives: ``adjoint`` (exact values only, needs the extra of that name), ``parameter-shift`` (any value,
by two evaluations for each occurrence of a parameter), ``spsa`` (two evaluations in all, along one random direction),
``auto`` (adjoint where it can be had, else parameter shift)."""
CHANNELS = frozenset(("kraus", "superop"))
"""Names of instructions that are quantum channels."""
_WIDEST_DENSITY_MATRIX = 12
"""Qubits up to which noise is simulated with a density matrix unless a method is asked for: 256 MiB."""

_WIDE = 2**24
"""Amplitudes from which on a state earns all threads of a worker: 256 MiB, of which each gate's pass takes tens of
milliseconds on one thread, a thousand times what it costs threads to meet at its end, and far from any cache."""
_WIDEST_DISTRIBUTION = 16
"""Qubits up to which a matrix product state's distribution is written out to draw from: 512 KiB."""


@functools.cache
def _versions(*libraries: str) -> tuple[tuple[str, str], ...]:
    """What is installed, read without importing it."""
    return tuple((name, version(name)) for name in ("numpy", "qiskit", *libraries))


@functools.cache
def _distribution(module: str) -> tuple[str, ...]:
    """The installed packages that a top-level module belongs to."""
    return tuple(sorted(set(packages_distributions().get(module, ()))))


@functools.cache
def _adjoint_installed() -> bool:
    try:
        version("pennylane-lightning")
    except PackageNotFoundError:
        return False
    return True


def _plan(template: Template, shots: int | None, gradient: str, grouping: str | None) -> NumericPlan:
    """The `numeric_plan` of a program, made once for each template and kind of evaluation."""
    key = f"plan {shots is None} {gradient} {grouping!r}"
    found: NumericPlan | None = template.cache.get(key)
    if found is None:
        found = template.cache[key] = numeric_plan(template, shots, gradient, grouping)
    return found


def numeric_plan(template: Template, shots: int | None, gradient: str = "none", grouping: str | None = None
                 ) -> NumericPlan:  # fmt: skip
    """How a program's numbers come about: a pure function of the program and the installed versions.

    Raises `WorkflowError` for a ``gradient`` or ``grouping`` that the program cannot have.
    """
    if grouping is not None and grouping not in GROUPINGS:
        raise WorkflowError(f"{grouping!r} is not a way to group Paulis; give one of {', '.join(GROUPINGS)}.")
    if gradient == "none":
        return _plan_of_values(template, shots, grouping)
    if gradient not in GRADIENTS:
        raise WorkflowError(f"{gradient!r} is not a way to gradients; give one of {', '.join(GRADIENTS)}.")
    if not template.observables:
        raise WorkflowError("samples have no gradient; describe an expectation value with hq.expval.")
    if gradient == "spsa" and isinstance(template.backend, Aer) and template.backend.method == "stabilizer":
        raise WorkflowError(
            "spsa moves every angle a little, and the stabilizer method takes multiples of pi/2 alone; use "
            "'parameter-shift', or another method."
        )
    refused = _why_not_adjoint(template, shots)
    if gradient == "adjoint" and refused:
        raise WorkflowError(f"the adjoint gradient was asked for, but {refused}; use jac='parameter-shift'.")
    if not refused and gradient in ("auto", "adjoint"):
        reason = "exact value with gradient: both in one adjoint pass"
        return _adjoint_plan(reason, "adjoint")
    plan = _plan_of_values(template, shots, grouping)
    if plan.engine == "adjoint":
        plan = _aer_plan(template, Aer(), shots, grouping)
    why = "asked for by name"
    if gradient != "spsa":  # a loop asks by name for what "auto" came to, and its record says why all the same
        gradient, why = "parameter-shift", refused or why
    return dataclasses.replace(plan, gradient=gradient, reason=f"{plan.reason}; {gradient}: {why}")


def _why_not_adjoint(template: Template, shots: int | None) -> str | None:
    """What keeps a program from the adjoint engine, None if nothing does."""
    backend = template.backend
    if isinstance(backend, Backend):
        return f"the values come from the backend {backend.source}"
    if isinstance(backend, Aer) and backend.noise is not None:
        return "there is noise"
    if isinstance(backend, Aer) and backend.method not in ("automatic", "statevector"):
        return f"the method is {backend.method}"
    if template.has_channels:
        return "the circuit has instructions that are not unitary"
    if shots is not None:
        return "the values are sampled"
    if not _adjoint_installed():
        return "pennylane-lightning is not installed (pip install 'hybridq-scheduler[adjoint]')"
    return None


def _plan_of_values(template: Template, shots: int | None, grouping: str | None) -> NumericPlan:
    backend = template.backend
    if isinstance(backend, Backend):
        return _backend_plan(template, backend, shots, grouping)
    if isinstance(backend, Adjoint):
        refused = _why_not_adjoint(template, shots)
        if refused or not template.observables:
            refused = refused or "samples were asked for"
            raise WorkflowError(f"the adjoint engine was asked for, but {refused}; use backend='aer'.")
        return _adjoint_plan("exact value; the engine was asked for by name", "none")
    assert backend is not None
    return _aer_plan(template, backend, shots, grouping)


def _adjoint_plan(reason: str, gradient: str) -> NumericPlan:
    versions = _versions("pennylane-lightning")
    return NumericPlan("adjoint", "statevector", "exact", "none", 1, versions, reason, gradient)


def _backend_plan(template: Template, backend: Backend, shots: int | None, grouping: str | None) -> NumericPlan:
    if shots is None:
        raise WorkflowError(
            f"the backend {backend.source} samples, so it has no exact values; give shots or a precision."
        )
    options = (
        ("source", backend.source), ("arguments", json.dumps(dict(backend.arguments), sort_keys=True)),
        ("optimization_level", backend.optimization_level),
    )  # fmt: skip
    return NumericPlan(
        "backend", backend.source, "backend", _grouping(template, grouping), 1,
        _versions(*_distribution(backend.source.partition(".")[0].partition(":")[0])),
        "the shots of the Qiskit backend that was asked for", "none", options,
    )  # fmt: skip


def _grouping(template: Template, grouping: str | None) -> str:
    return (grouping or "qubit-wise") if template.observables else "none"


def _aer_plan(template: Template, backend: Aer, shots: int | None, grouping: str | None) -> NumericPlan:
    channels = template.has_channels or backend.noise is not None
    method, asked = backend.method, f"method {backend.method} was asked for"
    if method == "automatic" and channels:
        narrow = template.num_qubits <= _WIDEST_DENSITY_MATRIX or shots is None
        method = "density_matrix" if narrow else "statevector"
        asked = f"noise on {template.num_qubits} qubits" + ("" if narrow else ": one random trajectory a shot")
    elif method == "automatic":
        method, asked = "statevector", "noiseless"
    if channels and shots is None and method != "density_matrix":
        raise WorkflowError(
            f"an exact value with noise needs the density matrix, and method {method!r} was asked for; give shots, or "
            "method='density_matrix'."
        )
    if channels and method not in ("density_matrix", "statevector"):
        raise WorkflowError(f"method {method!r} cannot have noise; use 'density_matrix', or 'statevector' with shots.")
    options = (("bond_dimension", backend.bond_dimension),) if backend.bond_dimension is not None else ()
    versions = _versions("qiskit-aer")
    if template.sampled_in_place:
        reason = f"{asked}; the circuit measures, resets or branches before its end: whole executions, one seed a row"
        return NumericPlan("aer", method, "simulator", "none", 1, versions, reason, "none", options)
    how = _grouping(template, grouping)
    too_wide = method == "matrix_product_state" and template.num_qubits > _WIDEST_DISTRIBUTION
    if shots is not None and (method == "stabilizer" or too_wide or (channels and method == "statevector")):
        reason = f"{asked}: the simulator's own shots, one seed a row and group"
        return NumericPlan("aer", method, "simulator", how, 1, versions, reason, "none", options)
    threads = 1
    if {"statevector": 1, "density_matrix": 2}.get(method, 0) * template.num_qubits >= math.log2(_WIDE):
        threads, asked = 0, f"{asked}; so wide that it gets all threads of a worker, its last bits not reproducible"
    if shots is None:
        reason = f"{asked}; no shots asked for: exact value"
        return NumericPlan("aer", method, "exact", "none", threads, versions, reason, "none", options)
    reason = f"{asked}: samples drawn from exact probabilities, one generator a row"
    return NumericPlan("aer", method, "probabilities", how, threads, versions, reason, "none", options)
