"""What to evaluate, and the plan by which its numbers come about.

A quantum function returns a `Request`. Checked once, it becomes a `Program`: a `Template` (circuit and observables,
fingerprinted once and sent once to each engine process) plus rows of parameters, shots, one seed a row, and the
`NumericPlan`. Engines turn programs into `Outcome`; `result` turns an outcome into what the researcher sees.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qiskit import QuantumCircuit
from qiskit.circuit import Gate, Instruction, Parameter
from qiskit.quantum_info import Pauli, SparsePauliOp

from hybridq.errors import NotFinite, WorkflowError
from hybridq.location import Location, seed_key
from hybridq.resources import Need
from hybridq.values import circuit_digest, digest

if TYPE_CHECKING:
    from qiskit.primitives import BitArray

__all__ = [
    "GRADIENTS",
    "Estimate",
    "NumericPlan",
    "Outcome",
    "Program",
    "Request",
    "Template",
    "derivatives",
    "need",
    "numeric_plan",
    "program",
    "result",
]

MAX_SHOTS = 2**31 - 1
OPERATOR_ENTRIES = 2**21
"""Entries of the sparse matrices that the adjoint engine makes of all observables of a template, at most."""
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
    """``exact`` (no shots), ``probabilities`` (own generator over exact probabilities), or ``trajectories`` (the
    simulator's own shots, one execution a row with its own seed)."""
    grouping: str
    """``none`` for exact values and samples, ``qubit-wise`` for sampled expectation values."""
    threads: int
    versions: tuple[tuple[str, str], ...]
    reason: str
    gradient: str = "none"
    """``none``, or how derivatives come with the values: ``adjoint``, ``parameter-shift``."""


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
    cache: dict[str, Any] = field(default_factory=dict, repr=False)
    """Encodings made by engines' wire format, kept with the template (never part of its identity)."""


@dataclass(frozen=True, eq=False)
class Request:
    """What a quantum function returns: a description of an evaluation, nothing computed."""

    circuit: QuantumCircuit
    observables: Any
    """None for bit strings; else an observable or nested sequence of observables."""
    theta: Any
    shots: int | None = None
    precision: float | None = None


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
    """Growth of the engine process' peak memory while it ran, in bytes (0 if it stayed below an earlier peak)."""
    gradients: Array | None = None
    """Derivatives of the values by the parameters, shape (rows, observables, parameters), in units of the observable a
    radian; None where the plan asks for none."""


# -- from request to program -------------------------------------------------------------------------------------


def program(request: Request, *, seed: int, location: Location, gradient: str = "none") -> Program:
    """Check ``request`` once and for all, and make it a program whose rows are seeded by ``seed`` and ``location``.

    ``gradient`` is ``none``, or one of `GRADIENTS` for derivatives by all parameters with the values.
    Raises `WorkflowError` for anything written wrongly, before anything is spent, and `NotFinite` for parameters that
    are NaN or infinite.
    """
    if not isinstance(request, Request):
        raise WorkflowError(
            f"a quantum function returned {_describe(request)}; it must return hq.expval(...) or hq.sample(...) and "
            "do nothing else. Put classical arithmetic into a classical step or the workflow."
        )
    template, observables_shape = _templates.get(request.circuit, request.observables)
    theta = _parameters(request.theta, template.circuit)
    shots = _shots(request, template)
    batch_shape = theta.shape[:-1]
    try:
        np.broadcast_shapes(batch_shape, observables_shape)
    except ValueError:
        raise WorkflowError(
            f"parameters of batch shape {batch_shape} and observables of shape {observables_shape} do not broadcast; "
            "give them equal leading shapes, or 1 where one is to be repeated."
        ) from None
    rows = theta.reshape(math.prod(batch_shape), template.num_parameters)
    if shots is None and not template.sampled_in_place:
        seeds = np.zeros((len(rows), 2), dtype=np.uint64)
    else:
        seeds = np.array([seed_key(seed, location, row) for row in range(len(rows))], dtype=np.uint64).reshape(-1, 2)
    plan = numeric_plan(template, shots, gradient)
    return Program(template, rows, shots, seeds, plan, batch_shape, observables_shape)


def result(program: Program, outcome: Outcome) -> Estimate | BitArray:
    """What a quantum function's call returns: an `Estimate`, or a Qiskit ``BitArray`` of the batch shape.

    Raises `NotFinite` if a value or standard error is NaN or infinite.
    """
    if outcome.bits is not None:
        from qiskit.primitives import BitArray

        bits = outcome.bits.reshape(*program.batch_shape, *outcome.bits.shape[1:])
        return BitArray(bits, program.template.circuit.num_clbits or program.template.num_qubits)
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
    _check_finite(program, outcome)
    assert outcome.gradients is not None
    columns = [_arrange(program, outcome.gradients[:, :, p]) for p in range(program.template.num_parameters)]
    shape = np.broadcast_shapes(program.batch_shape, program.observables_shape)
    return np.stack(columns, axis=-1) if columns else np.zeros((*shape, 0))


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


class _TemplateCache:
    """Templates by the researcher's own objects, so that a loop fingerprints its circuit once.

    Circuits and observables can be changed in place; each hit is compared with the template's snapshot (tens of
    microseconds), so a changed object makes a new template and never meets an old result.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, int], tuple[Any, Any, Template, tuple[int, ...], Any]] = OrderedDict()

    def get(self, circuit: Any, observables: Any) -> tuple[Template, tuple[int, ...]]:
        key = (id(circuit), id(observables))
        with self._lock:
            entry = self._known.get(key)
        if entry is not None:
            known_circuit, known_observables, template, shape, phase = entry
            if (
                known_circuit is circuit
                and known_observables is observables
                and circuit.num_qubits == template.num_qubits
                and circuit._data == template.circuit._data
                and circuit.global_phase == phase
                and _same_observables(observables, template, shape)
            ):
                return template, shape
        template, shape = _template(circuit, observables)
        with self._lock:
            self._known[key] = (circuit, observables, template, shape, template.circuit.global_phase)
            self._known.move_to_end(key)
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)
        return template, shape


_templates = _TemplateCache(capacity=512)


def _same_observables(observables: Any, template: Template, shape: tuple[int, ...]) -> bool:
    if observables is None:
        return not template.observables
    flat, found = ([observables], ()) if isinstance(observables, SparsePauliOp) else _flatten(observables)
    return (
        found == shape
        and len(flat) == len(template.observables)
        and all(_same_observable(mine, snapshot) for mine, snapshot in zip(flat, template.observables, strict=True))
    )


def _same_observable(mine: SparsePauliOp, snapshot: SparsePauliOp) -> bool:
    return (
        np.array_equal(mine.coeffs, snapshot.coeffs)
        and np.array_equal(mine.paulis.x, snapshot.paulis.x)
        and np.array_equal(mine.paulis.z, snapshot.paulis.z)
        and np.array_equal(mine.paulis.phase, snapshot.paulis.phase)
    )


def _template(circuit: Any, observables: Any) -> tuple[Template, tuple[int, ...]]:
    if not isinstance(circuit, QuantumCircuit):
        raise WorkflowError(f"the circuit is {_describe(circuit)}; give a qiskit.QuantumCircuit.")
    circuit = circuit.copy()
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
    identity = digest([circuit_digest(circuit), [o.to_list() for o in flat] if observables is not None else None])
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
        ),
        shape,
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


# -- plan and need -----------------------------------------------------------------------------------------------


GRADIENTS = ("auto", "adjoint", "parameter-shift")
"""Ways to derivatives: ``adjoint`` (exact values only, needs the extra of that name), ``parameter-shift`` (any value,
by two evaluations for each occurrence of a parameter), ``auto`` (adjoint where it can be had, else parameter shift)."""


@functools.cache
def _versions(engine: str) -> tuple[tuple[str, str], ...]:
    """What is installed, read without importing it."""
    library = "qiskit-aer" if engine == "aer" else "pennylane-lightning"
    return tuple((name, version(name)) for name in ("numpy", "qiskit", library))


@functools.cache
def _adjoint_installed() -> bool:
    try:
        version("pennylane-lightning")
    except PackageNotFoundError:
        return False
    return True


def numeric_plan(template: Template, shots: int | None, gradient: str = "none") -> NumericPlan:
    """How a program's numbers come about: a pure function of the program and the installed versions.

    Raises `WorkflowError` for a ``gradient`` that the program cannot have.
    """
    if gradient == "none":
        return _plan_of_values(template, shots)
    if gradient not in GRADIENTS:
        raise WorkflowError(f"{gradient!r} is not a way to gradients; give one of {', '.join(GRADIENTS)}.")
    if not template.observables:
        raise WorkflowError("samples have no gradient; describe an expectation value with hq.expval.")
    if gradient == "adjoint" and shots is not None:
        raise WorkflowError(
            "the adjoint gradient is of exact values, and shots were asked for; use jac='parameter-shift', or leave "
            "the shots out."
        )
    if gradient == "adjoint" and not _adjoint_installed():
        raise WorkflowError(
            "the adjoint gradient needs pennylane-lightning, which is not installed; run "
            "pip install 'hybridq-scheduler[adjoint]', or use jac='parameter-shift'."
        )
    if shots is None and _adjoint_installed() and gradient != "parameter-shift":
        reason = "exact value with gradient: both in one adjoint pass"
        return NumericPlan("adjoint", "statevector", "exact", "none", 1, _versions("adjoint"), reason, "adjoint")
    plan = _plan_of_values(template, shots)
    why = (
        "asked for by name" if gradient != "auto" else "of sampled values" if shots else "the adjoint engine is missing"
    )
    return dataclasses.replace(plan, gradient="parameter-shift", reason=f"{plan.reason}; parameter shift: {why}")


def _plan_of_values(template: Template, shots: int | None) -> NumericPlan:
    if template.sampled_in_place:
        return NumericPlan(
            "aer", "statevector", "trajectories", "none", 1, _versions("aer"),
            "the circuit measures, resets or branches before its end: whole executions, one seed a row",
        )  # fmt: skip
    if shots is None:
        return NumericPlan(
            "aer", "statevector", "exact", "none", 1, _versions("aer"), "no shots asked for: exact value"
        )
    grouping = "qubit-wise" if template.observables else "none"
    return NumericPlan(
        "aer", "statevector", "probabilities", grouping, 1, _versions("aer"),
        "noiseless: samples drawn from exact probabilities, one generator a row",
    )  # fmt: skip


def need(program: Program) -> Need:
    """What ``program`` asks of a device: a pure function of the program.

    Bytes are an upper bound: the state (16 bytes an amplitude), a second state while an instruction works out of place,
    probabilities and their running sum (8 each) where samples are drawn, the rows in and out, and 32 MiB for what the
    simulator keeps whatever the size. Where whole executions are sampled, the simulator repeats the circuit for each
    shot and fragments its memory: 160 bytes an amplitude, 128 MiB, and 200 bytes a shot of one execution. Seconds are a
    rough estimate for one thread (1 nanosecond an amplitude and pass, 100 microseconds a row).
    """
    if program.plan.engine == "adjoint":
        return _adjoint_need(program)
    template, shots = program.template, program.shots or 0
    amplitudes = 2**template.num_qubits
    executions = program.rows
    if program.plan.sampling == "trajectories":
        memory = 160 * amplitudes + 2**27 + 200 * min(shots, 2**16)
        executions *= shots
    else:
        memory = (56 if shots else 32) * amplitudes + 2**25 + 24 * min(shots, 2**17)
    if shots and not template.observables:
        memory += program.rows * shots * 8 * -(-template.circuit.num_clbits // 64 or 1)
    memory += 64 * program.theta.size
    passes = template.num_gates + template.num_paulis
    gates = 1e-9 * float(min(amplitudes, 2**200)) * passes
    seconds = 1e-4 * program.rows + gates * executions + 5e-8 * shots * program.rows
    return Need(memory, seconds, program.plan.threads, template.num_qubits, shots * program.rows)


def _adjoint_need(program: Program) -> Need:
    """`need` of a program for the adjoint engine.

    Four states (the library's, its amplitudes, the observable on them, a part of that), with a gradient five more (both
    as one state of a qubit more, its amplitudes, weights); 64 bytes an entry of the observable's matrices while they
    are made; 4 KiB a gate; 32 MiB. Seconds: a pass over the state for each gate and Pauli, with a gradient five for
    each gate.
    """
    template = program.template
    amplitudes = 2**template.num_qubits
    with_gradient = program.plan.gradient != "none"
    entries = min(template.num_paulis * amplitudes, OPERATOR_ENTRIES)
    memory = 16 * amplitudes * (9 if with_gradient else 4) + 64 * entries + 4096 * template.num_gates + 2**25
    memory += 64 * program.theta.size * (1 + len(template.observables) * with_gradient)
    passes = template.num_gates * (5 if with_gradient else 1) + template.num_paulis
    seconds = program.rows * (1e-4 + 1e-9 * float(min(amplitudes, 2**200)) * passes)
    return Need(memory, seconds, program.plan.threads, template.num_qubits, 0)
