"""What evaluates circuits, as data: Qiskit Aer with a method and noise, the adjoint engine, or any Qiskit backend.

A backend is part of what is evaluated, so it is frozen, recorded, and part of a program's identity. Nothing here
simulates; `physical_circuit` translates a circuit to what the backend's gates and couplings are, once, with fixed
seeds.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from qiskit import QuantumCircuit, transpile
from qiskit.circuit import CircuitError, ControlFlowOp, Instruction
from qiskit.circuit.library import get_standard_gate_name_mapping
from qiskit.exceptions import QiskitError
from qiskit.providers import BackendV2
from qiskit.quantum_info import Pauli, SuperOp

from hybridq.errors import WorkflowError
from hybridq.values import digest

__all__ = [
    "AER_METHODS",
    "Adjoint",
    "Aer",
    "AnyBackend",
    "Backend",
    "Channel",
    "Noise",
    "Physical",
    "Readout",
    "loaded",
    "named_backend",
    "physical_circuit",
    "target_of",
]

Array = NDArray[Any]

AER_METHODS = ("automatic", "statevector", "density_matrix", "stabilizer", "matrix_product_state")
_SEED = 0  # of every transpilation, so that a circuit is translated the same way everywhere
_TOLERANCE = 1e-6  # of sums that must be 1


# -- noise -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Channel:
    """Noise that follows a gate."""

    gate: str
    """Name or label of the gate; empty for every gate of as many qubits as the channel acts on."""
    qubits: tuple[int, ...]
    """Qubits of the gate; empty for any, unless another channel names them."""
    superoperator: Array
    """Complex, shape (4^k, 4^k), on column-stacked density matrices (Qiskit's ``SuperOp``), k = 1 or 2."""


@dataclass(frozen=True)
class Readout:
    """Errors of measuring a qubit."""

    qubit: int
    """The qubit, or -1 for every one that has no errors of its own."""
    flip_0: float
    """Probability of reading 1 where the qubit is 0."""
    flip_1: float
    """Probability of reading 0 where the qubit is 1."""


@dataclass(frozen=True, eq=False)
class Noise:
    """A noise model as data: channels after gates, errors of readout, and the gates that circuits are translated to.

    Made by `depolarizing`, or from a Qiskit Aer ``NoiseModel`` or a Qiskit backend by `of`.
    """

    channels: tuple[Channel, ...] = ()
    readout: tuple[Readout, ...] = ()
    basis: tuple[str, ...] = ()
    """Gates that circuits are translated to first; empty: circuits stay as written, gates of more than two qubits and
    composite instructions taken apart."""
    couplings: tuple[tuple[int, int], ...] = ()
    """Pairs of qubits that have two-qubit gates, control first; empty: all."""
    num_qubits: int | None = None
    """How many qubits it describes, None for any number."""

    def __post_init__(self) -> None:
        for channel in self.channels:
            width = round(math.log(len(channel.superoperator), 4))
            identity = np.eye(2**width).reshape(-1)
            if width not in (1, 2) or channel.superoperator.shape != (4**width, 4**width):
                raise WorkflowError(
                    f"the noise after {channel.gate or 'each gate'!r} has shape {channel.superoperator.shape}; a "
                    "channel acts on one or two qubits, (4, 4) or (16, 16)."
                )
            if not np.allclose(identity @ channel.superoperator, identity, atol=_TOLERANCE):
                raise WorkflowError(f"the noise after {channel.gate or 'each gate'!r} does not keep the trace.")
            if not SuperOp(channel.superoperator).is_cp(atol=_TOLERANCE):
                raise WorkflowError(f"the noise after {channel.gate or 'each gate'!r} is not completely positive.")
        for readout in self.readout:
            _probability("readout", readout.flip_0)
            _probability("readout", readout.flip_1)
        # in one order, so that equal noise has one identity; Qiskit lists a backend's in the order of a set
        channels = sorted(self.channels, key=lambda c: (c.gate, c.qubits, len(c.superoperator)))
        object.__setattr__(self, "channels", tuple(channels))
        object.__setattr__(self, "readout", tuple(sorted(self.readout, key=lambda r: r.qubit)))

    @classmethod
    def depolarizing(cls, one_qubit: float = 0.0, two_qubit: float = 0.0, readout: float = 0.0) -> Noise:
        """Depolarizing noise after each gate as it is written, and flips of what is read, all by probability.

        With probability ``one_qubit`` (``two_qubit``) a gate's one (two) qubits are left in the completely mixed state
        (Nielsen and Chuang, section 8.3.4; as in Qiskit Aer's ``depolarizing_error``); ``readout`` is that of reading
        the wrong bit. Raises `WorkflowError` for what is no probability.
        """
        channels = []
        for name, probability, width in (("one_qubit", one_qubit, 1), ("two_qubit", two_qubit, 2)):
            _probability(name, probability)
            if probability:
                identity = np.eye(2**width).reshape(-1)
                mixing = np.outer(identity, identity) / 2**width
                matrix = (1 - probability) * np.eye(4**width) + probability * mixing
                channels.append(Channel("", (), matrix.astype(np.complex128)))
        _probability("readout", readout)
        errors = (Readout(-1, float(readout), float(readout)),) if readout else ()
        return cls(tuple(channels), errors)

    @classmethod
    def of(cls, source: Any) -> Noise:
        """The noise of a Qiskit Aer ``NoiseModel``, or of a ``BackendV2`` (its gates' and readout's calibration).

        Circuits are translated to the model's basis gates first, and to a backend's couplings; else gates that the
        model does not name would be free of noise without a word. Raises `WorkflowError` for anything else, for noise
        on more than two qubits or of what is no gate of Qiskit's library, and for correlated errors of readout.
        """
        from qiskit_aer.noise import NoiseModel

        if isinstance(source, Noise):
            return source
        couplings: tuple[tuple[int, int], ...] = ()
        num_qubits = None
        if isinstance(source, BackendV2):
            couplings = tuple(sorted(map(tuple, source.coupling_map.get_edges()))) if source.coupling_map else ()
            num_qubits = source.num_qubits
            source = NoiseModel.from_backend(source)
        if not isinstance(source, NoiseModel):
            raise WorkflowError(
                f"noise is a {type(source).__qualname__}; give hq.Noise.depolarizing(...), a qiskit_aer NoiseModel, or "
                "a Qiskit backend."
            )
        channels: list[Channel] = []
        readout: list[Readout] = []
        for error in source.to_dict()["errors"]:
            places = [tuple(map(int, qubits)) for qubits in error.get("gate_qubits", [()])]
            if error["type"] == "roerror":
                readout += [_readout(error["probabilities"], place) for place in places]
                continue
            for name in error["operations"]:
                if name == "measure" or name not in get_standard_gate_name_mapping():
                    raise WorkflowError(
                        f"the noise model has an error at {name!r}, which is no gate of Qiskit's library; errors of "
                        "those, of reset and delay, and of readout are supported."
                    )
            for place in places:
                matrix = _superoperator(error, len(place) or _width(error))
                channels += [Channel(name, place, matrix) for name in error["operations"]]
        basis = tuple(sorted(get_standard_gate_name_mapping().keys() & set(source.basis_gates) - _WITHOUT_GATE))
        return cls(tuple(channels), tuple(readout), basis, couplings, num_qubits)

    @functools.cached_property
    def _by_gate(self) -> dict[tuple[str, int, tuple[int, ...]], Array]:
        return {
            (channel.gate, round(math.log(len(channel.superoperator), 4)), channel.qubits): channel.superoperator
            for channel in self.channels
        }

    def after(self, names: Sequence[str], qubits: tuple[int, ...]) -> Array | None:
        """The superoperator that follows a gate known by ``names`` on ``qubits``, None if there is no noise."""
        for place in (qubits, ()):
            for name in (*names, ""):
                found = self._by_gate.get((name, len(qubits), place))
                if found is not None:
                    return found
        return None

    def readout_of(self, qubit: int) -> tuple[float, float]:
        """Probabilities of reading ``qubit`` wrongly where it is 0 and where it is 1."""
        own = {r.qubit: (r.flip_0, r.flip_1) for r in self.readout}
        return own.get(qubit, own.get(-1, (0.0, 0.0)))


_WITHOUT_GATE = frozenset(("delay", "measure", "reset"))  # of the instructions that have names in Qiskit's library


def _probability(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0 <= value <= 1:
        raise WorkflowError(f"{name} is {value!r}; it must be a probability, from 0 to 1.")


def _readout(probabilities: Any, place: tuple[int, ...]) -> Readout:
    matrix = np.asarray(probabilities, dtype=np.float64)
    if matrix.shape != (2, 2):
        raise WorkflowError(
            f"the noise model has errors of readout that {int(math.log2(len(matrix)))} qubits share; only errors of "
            "single qubits are supported."
        )
    return Readout(place[0] if place else -1, float(matrix[0, 1]), float(matrix[1, 0]))


def _width(error: Mapping[str, Any]) -> int:
    """Qubits of a quantum error that is for every place: it need not change all the qubits of its gate."""
    gates = [get_standard_gate_name_mapping().get(name) for name in error["operations"]]
    touched = [int(q) + 1 for instructions in error["instructions"] for i in instructions for q in i["qubits"]]
    return max([1, *touched, *(int(gate.num_qubits) for gate in gates if gate is not None)])


def _superoperator(error: Mapping[str, Any], width: int) -> Array:
    """Of a quantum error as ``NoiseModel.to_dict`` writes it: circuits with their probabilities."""
    if width > 2:
        raise WorkflowError(
            f"the noise model has an error of {width} qubits after {', '.join(error['operations'])}; only one and two "
            "qubits are supported."
        )
    total = np.zeros((4**width, 4**width), dtype=np.complex128)
    for instructions, probability in zip(error["instructions"], error["probabilities"], strict=True):
        matrix = np.eye(4**width, dtype=np.complex128)
        for instruction in instructions:
            kraus = [_embedded(k, tuple(instruction["qubits"]), width) for k in _kraus(instruction)]
            matrix = sum(np.kron(k.conj(), k) for k in kraus) @ matrix
        total += probability * matrix
    return total


def _kraus(instruction: Mapping[str, Any]) -> list[Array]:
    name, params = instruction["name"], instruction.get("params", [])
    if name == "pauli":
        return [Pauli(params[0]).to_matrix()]
    if name == "kraus":
        return [np.asarray(k) for k in params]
    if name == "unitary":
        return [np.asarray(params[0])]
    if name == "reset":
        return [np.array([[1, 0], [0, 0]]), np.array([[0, 1], [0, 0]])]
    gate = get_standard_gate_name_mapping().get(name)
    if gate is None:
        raise WorkflowError(f"the noise model has the instruction {name!r} in an error, which is not supported.")
    return [np.asarray(gate.base_class(*params).to_matrix())]


def _embedded(matrix: Array, qubits: tuple[int, ...], width: int) -> Array:
    """``matrix`` on ``qubits`` of ``width``, qubit 0 the least significant."""
    if width == 1 or qubits == (0, 1):
        return matrix
    if qubits == (1, 0):
        order = [0, 2, 1, 3]
        return matrix[np.ix_(order, order)]
    return np.kron(np.eye(2), matrix) if qubits == (0,) else np.kron(matrix, np.eye(2))


# -- backends ----------------------------------------------------------------------------------------------------


class _Identified:
    @functools.cached_property
    def identity(self) -> str:
        """Digest of everything that this backend is."""
        return digest(self, "the backend")


@dataclass(frozen=True, eq=False)
class Aer(_Identified):
    """Qiskit Aer with a simulation method, and noise.

    ``method`` is one of `AER_METHODS`; ``automatic`` is the state vector, with noise the density matrix up to 12 qubits
    and for exact values. ``noise`` is a `Noise`, a qiskit_aer ``NoiseModel`` or a Qiskit backend whose noise is taken.
    ``bond_dimension`` bounds a matrix product state; None keeps it exact.
    """

    method: str = "automatic"
    noise: Noise | None = None
    bond_dimension: int | None = None

    def __post_init__(self) -> None:
        if self.method not in AER_METHODS:
            raise WorkflowError(f"{self.method!r} is not a method of Aer here; give one of {', '.join(AER_METHODS)}.")
        if self.noise is not None:
            object.__setattr__(self, "noise", Noise.of(self.noise))
        if self.noise is not None and self.method in ("stabilizer", "matrix_product_state"):
            raise WorkflowError(
                f"noise and method {self.method!r} were asked for together; use 'density_matrix', or 'statevector' "
                "with shots."
            )
        bond = self.bond_dimension
        if bond is not None and (isinstance(bond, bool) or not isinstance(bond, int) or bond < 1):
            raise WorkflowError(f"bond_dimension is {bond!r}; it must be an integer, 1 or more, or None.")
        if bond is not None and self.method != "matrix_product_state":
            raise WorkflowError("bond_dimension is for method 'matrix_product_state'.")


@dataclass(frozen=True, eq=False)
class Adjoint(_Identified):
    """The adjoint engine (pennylane-lightning's C++ core): exact values, with or without gradients."""


@dataclass(frozen=True, eq=False)
class Backend(_Identified):
    """A Qiskit ``BackendV2``, or one of Qiskit's V2 primitives, by the function that returns it.

    ``source`` is ``"module:function"`` (a class counts), called with ``arguments``, data that JSON can hold, in each
    process that needs it. So nothing is pickled, and the record says what ran. Credentials do not belong into
    arguments, which are recorded; a function can read them where it runs. Circuits are translated to the backend once,
    at ``optimization_level`` (0 to 3).
    """

    source: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    optimization_level: int = 1

    def __post_init__(self) -> None:
        module, _, name = self.source.partition(":") if isinstance(self.source, str) else ("", "", "")
        if not module or not name:
            raise WorkflowError(
                f"{self.source!r} does not name a backend; write 'module:function', such as "
                "'qiskit_ibm_runtime.fake_provider:FakeManilaV2'."
            )
        if module == "__main__":
            raise WorkflowError(
                f"{self.source!r} is in the script that is run, which engines never import; put it into a module of "
                "its own, beside the script."
            )
        try:
            arguments = json.loads(
                json.dumps(dict(self.arguments), allow_nan=False)
            )  # a copy, as every process sees it
            object.__setattr__(self, "arguments", arguments)
        except (TypeError, ValueError) as error:
            raise WorkflowError(f"the arguments of the backend {self.source} are not JSON data: {error}") from error
        if self.optimization_level not in (0, 1, 2, 3):
            raise WorkflowError(f"optimization_level is {self.optimization_level!r}; it must be 0, 1, 2 or 3.")


AnyBackend: TypeAlias = Aer | Adjoint | Backend


def named_backend(value: Any) -> AnyBackend:
    """``value`` as a backend: one of this module's, a name, or a Qiskit ``BackendV2``.

    Names are ``"aer"``, one of its methods, ``"adjoint"``, and ``"module:function"`` as in `Backend`. An instance
    of a class that takes no arguments stands for the class. Raises `WorkflowError` for anything else.
    """
    if isinstance(value, (Aer, Adjoint, Backend)):
        return value
    if value is None or value == "aer":
        return _DEFAULT
    if value == "adjoint":
        return Adjoint()
    if isinstance(value, str):
        return _by_name(value)
    if isinstance(value, BackendV2):
        return _backend_of(value)
    raise WorkflowError(
        f"the backend is a {type(value).__qualname__}; give hq.Aer(...), hq.Adjoint(), hq.Backend('module:function') "
        "or a Qiskit BackendV2."
    )


_DEFAULT = Aer()


@functools.lru_cache(maxsize=64)
def _by_name(name: str) -> AnyBackend:
    return Backend(name) if ":" in name else Aer(name)


def _backend_of(value: BackendV2) -> Backend:
    kind = type(value)
    source = f"{kind.__module__}:{kind.__qualname__}"
    if kind.__module__.partition(".")[0] == "qiskit_aer":
        raise WorkflowError("the backend is Aer's own simulator; say what it does with hq.Aer(method=..., noise=...).")
    found = Backend(source)
    try:
        again = loaded(found)
    except WorkflowError as error:
        raise WorkflowError(
            f"{value!r} cannot be made again in another process; write a function that returns it, and give "
            "hq.Backend('module:function', {...})."
        ) from error
    if type(again) is not kind or again.name != value.name or again.num_qubits != value.num_qubits:
        raise WorkflowError(
            f"{source}() is not the backend that was given; write a function that returns it, and give "
            "hq.Backend('module:function', {...})."
        )
    return found


def loaded(backend: Backend) -> Any:
    """The Qiskit object that ``backend`` names, made once in this process.

    Raises `WorkflowError` if it cannot be made.
    """
    return _loaded(backend.source, json.dumps(dict(backend.arguments), sort_keys=True))


@functools.lru_cache(maxsize=16)
def _loaded(source: str, arguments: str) -> Any:
    module, _, name = source.partition(":")
    try:
        made: Any = importlib.import_module(module)
        for part in name.split("."):
            made = getattr(made, part)
        return made(**json.loads(arguments))
    except Exception as error:  # whatever the provider's library raises, the researcher named it
        raise WorkflowError(
            f"the backend {source} could not be made: {type(error).__name__}: {error}. Check the name, its arguments, "
            "and that its package is installed here and on the workers."
        ) from error


# -- circuits as a backend has them --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Physical:
    """A circuit translated for a backend, on the qubits that take part."""

    circuit: QuantumCircuit
    places: tuple[int, ...]
    """Where each qubit of the researcher's circuit is at the end, among the qubits of ``circuit``."""
    qubits: tuple[int, ...]
    """Which of the backend's qubits those of ``circuit`` are."""


def physical_circuit(circuit: QuantumCircuit, backend: AnyBackend) -> Physical:
    """``circuit`` in the gates and on the qubits of ``backend``, channels of noise as instructions in their places.

    Raises `WorkflowError` if it has too many qubits for the backend.
    """
    width = circuit.num_qubits
    if isinstance(backend, Backend):
        target = target_of(loaded(backend))
        if target is None:
            return Physical(circuit, tuple(range(width)), tuple(range(width)))
        _fits(circuit, target.num_qubits, backend.source)
        placed = _translated(circuit, target=target, optimization_level=backend.optimization_level)
        return Physical(placed, _places(placed, width), tuple(range(placed.num_qubits)))
    noise = backend.noise if isinstance(backend, Aer) else None
    if noise is None:
        return Physical(circuit, tuple(range(width)), tuple(range(width)))
    _fits(circuit, noise.num_qubits, "the backend whose noise is taken")
    if not noise.basis:
        return Physical(_with_channels(circuit, noise, range(width)), tuple(range(width)), tuple(range(width)))
    placed = _translated(
        circuit, basis_gates=list(noise.basis),
        coupling_map=[list(pair) for pair in noise.couplings] or None, optimization_level=1,
    )  # fmt: skip
    places = _places(placed, width)
    used = {placed.find_bit(q).index for i in placed.data if i.name != "barrier" for q in i.qubits} | set(places)
    kept = tuple(sorted(used))
    numbers = {qubit: number for number, qubit in enumerate(kept)}
    return Physical(_with_channels(_restricted(placed, numbers), noise, kept), tuple(numbers[p] for p in places), kept)


def target_of(made: Any) -> Any:
    """The Qiskit ``Target`` of a backend, or of the backend behind a primitive; None where there is none."""
    owner = getattr(made, "backend", None)
    owner = owner() if callable(owner) else owner
    found = getattr(made, "target", None)
    return getattr(owner, "target", None) if found is None else found


def _fits(circuit: QuantumCircuit, available: int | None, where: str) -> None:
    if available is not None and circuit.num_qubits > available:
        raise WorkflowError(
            f"the circuit has {circuit.num_qubits} qubits, and {where} has {available}; use a larger backend or a "
            "smaller circuit."
        )


def _translated(circuit: QuantumCircuit, **options: Any) -> QuantumCircuit:
    try:
        translated: QuantumCircuit = transpile(circuit, seed_transpiler=_SEED, **options)
    except QiskitError as error:
        raise WorkflowError(
            f"the circuit cannot be translated to the gates of its backend: {error} Decompose what has no definition."
        ) from error
    return translated


def _places(placed: QuantumCircuit, width: int) -> tuple[int, ...]:
    if placed.layout is None:
        return tuple(range(width))
    return tuple(placed.layout.final_index_layout(filter_ancillas=True)[:width])


def _restricted(circuit: QuantumCircuit, numbers: Mapping[int, int]) -> QuantumCircuit:
    """``circuit`` with only the qubits in ``numbers``, renumbered."""
    small = QuantumCircuit(len(numbers))
    small.add_bits(circuit.clbits)
    for register in circuit.cregs:
        small.add_register(register)
    for instruction in circuit.data:
        if instruction.name == "barrier":
            continue
        qubits = [numbers[circuit.find_bit(q).index] for q in instruction.qubits]
        small.append(instruction.operation, qubits, instruction.clbits, copy=False)
    return small


def _with_channels(circuit: QuantumCircuit, noise: Noise, qubits: Sequence[int]) -> QuantumCircuit:
    """``circuit`` with the noise of each gate after it; ``qubits`` are the backend's that its own are."""
    noisy = circuit.copy_empty_like()
    _add_with_channels(circuit, range(circuit.num_qubits), range(circuit.num_clbits), noise, qubits, noisy)
    return noisy


_NOT_NOISY = frozenset(("barrier", "initialize", "kraus", "measure", "superop"))


def _add_with_channels(circuit: QuantumCircuit, wires: Sequence[int], clbits: Sequence[int], noise: Noise,
                       qubits: Sequence[int], noisy: QuantumCircuit) -> None:  # fmt: skip
    for instruction in circuit.data:
        operation = instruction.operation
        own = [wires[circuit.find_bit(q).index] for q in instruction.qubits]
        bits = [clbits[circuit.find_bit(c).index] for c in instruction.clbits]
        if isinstance(operation, ControlFlowOp):
            raise WorkflowError(
                f"the circuit has the control flow {operation.name!r}, which cannot be simulated with noise here."
            )
        if operation.name in _NOT_NOISY:
            noisy.append(operation, own, bits, copy=False)
        elif len(own) > 2 or not _of_library(operation):
            _add_with_channels(_definition(operation), own, bits, noise, qubits, noisy)
        else:
            noisy.append(operation, own, copy=False)
            names = [name for name in (getattr(operation, "label", None), operation.name) if name]
            channel = noise.after(names, tuple(qubits[q] for q in own))
            if channel is not None:  # as it is: Qiskit's way by Kraus operators drops those below 1e-8
                noisy.append(Instruction("superop", len(own), 0, [channel]), own, copy=False)


def _of_library(operation: Any) -> bool:
    """Whether an instruction is one that has a name in Qiskit's library, open controls included."""
    kind = getattr(operation, "base_class", type(operation))  # names alone do not tell: anyone's gate may have any
    base = operation.name.partition("_o")[0]
    return base in _WITHOUT_GATE or (
        kind.__module__.startswith("qiskit.circuit.library.")
        and (base in get_standard_gate_name_mapping() or base == "unitary")
    )


def _definition(operation: Any) -> QuantumCircuit:
    try:
        definition: QuantumCircuit | None = getattr(operation, "definition", None)
    except CircuitError:
        definition = None
    if definition is None:
        raise WorkflowError(
            f"the instruction {operation.name!r} on {operation.num_qubits} qubits has no definition, so where its "
            "noise belongs is unknown; decompose it into gates of one and two qubits."
        )
    return definition
