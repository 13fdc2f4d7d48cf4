"""Values at rest: data-only encodings, their digests, and nothing that executes when it is read.

A value becomes one JSON document plus binary attachments (arrays as ``npy`` without pickle, circuits as ``QPY``), each
attachment named by the SHA-256 of its bytes. The same walk over a value also gives its digest, so whatever can be
stored can be hashed and whatever cannot is refused by name.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import hashlib
import io
import json
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hybridq.errors import Corrupt, Unhashable

__all__ = [
    "MAX_VALUE_BYTES",
    "QPY_FLOOR",
    "Encoded",
    "circuit_digest",
    "decode",
    "digest",
    "digest_bytes",
    "encode",
    "keep_digest",
    "same_value",
    "to_json",
]

MAX_VALUE_BYTES = 256 * 10**6
"""Largest encoded value, in bytes; larger ones are refused by name."""

_INLINE_ARRAY_BYTES = 1024
_MAX_DEPTH = 100  # far below Python's recursion limit, so that what was stored can be read from any depth of calls
_LONG_INT_BITS = 10_000  # Python refuses to write much longer integers in decimal
_EXTENDED = (np.longdouble, np.clongdouble) if np.dtype(np.longdouble).itemsize > 8 else ()
"""Differ between processors, and hold undefined padding."""
_TAG = "$"
QPY_FLOOR = 13
"""Lowest version of QPY that is loaded: older ones may execute code then (CVE-2025-2000)."""


@dataclass(frozen=True)
class Encoded:
    """A value as data: a JSON document and the attachments it names."""

    document: Any
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    """Bytes by file name, ``<sha256>.npy`` or ``<sha256>.qpy``."""

    @functools.cached_property
    def text(self) -> bytes:
        """The document as JSON."""
        document = self.document
        return document.json.encode() if isinstance(document, Written) else _dumps(document)

    def __getstate__(self) -> dict[str, Any]:
        """Without the text, which would travel beside what it is made of."""
        return {"document": self.document, "attachments": self.attachments}

    @property
    def nbytes(self) -> int:
        """Size of document and attachments together, in bytes."""
        return len(self.text) + sum(map(len, self.attachments.values()))


to_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
"""A document as JSON text, without spaces."""


def _dumps(document: Any) -> bytes:
    return to_json(document).encode()


class Written(dict[str, Any]):
    """A document that knows its JSON: what a loop writes many of, or what came as JSON."""

    __slots__ = ("json",)

    def __init__(self, document: Mapping[str, Any], json: str) -> None:
        super().__init__(document)
        self.json = json
        """What `to_json` makes of it."""


def digest_bytes(data: bytes) -> str:
    """SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def encode(value: Any, what: str = "value") -> Encoded:
    """Turn ``value`` into data; ``what`` names it in errors.

    Accepts None, booleans, numbers, strings, bytes, lists, tuples, dicts, sets, NumPy arrays and scalars, enums,
    dataclasses of these, SciPy's ``OptimizeResult`` and ``LbfgsInvHessProduct``, and Qiskit's ``QuantumCircuit``,
    ``SparsePauliOp`` and ``BitArray``. An array's byte order and memory layout are not kept. Raises `Unhashable` for
    anything else, for values nested more than 100 deep, and for values over `MAX_VALUE_BYTES`.
    """
    written = _written(value)
    if written is not None:
        return Encoded(written)
    writer = _Writer(attach=True)
    encoded = Encoded(writer.walk(value, what), writer.attachments)
    if encoded.nbytes > MAX_VALUE_BYTES:
        raise Unhashable(
            f"{what} takes {encoded.nbytes:,} bytes encoded; at most {MAX_VALUE_BYTES:,} are recorded. "
            "Write it to a file of your own and return the file's name and checksum."
        )
    return encoded


def _written(value: Any) -> Written | None:
    """The document of a short vector of floats, or of a dataclass of nothing but numbers; None for anything else."""
    kind: Any = type(value)
    if kind is np.ndarray:
        if value.dtype != _FLOAT or value.nbytes > _INLINE_ARRAY_BYTES or value.ndim != 1:
            return None
        data, size = _base64(value.tobytes()), len(value)
        array = {_TAG: "array", "d": "<f8", "s": [size], "v": data}
        return Written(array, f'{{"{_TAG}":"array","d":"<f8","s":[{size}],"v":"{data}"}}')
    layout = _layout(kind)
    if layout is None:
        return None
    name, members = layout
    numbers = {member: getattr(value, member) for member in members}
    parts = []
    for member, number in numbers.items():
        what = type(number)
        if what is float:
            if not math.isfinite(number):
                return None
        elif what is int:
            if number.bit_length() > _LONG_INT_BITS:
                return None
        elif number is not None:
            return None
        parts.append(f'"{member}":{"null" if number is None else repr(number)}')
    text = f'{{"{_TAG}":"dataclass","t":"{name}","v":{{{",".join(parts)}}}}}'
    return Written({_TAG: "dataclass", "t": name, "v": numbers}, text)


_FLOAT = np.dtype("<f8")


@functools.lru_cache(maxsize=256)
def _layout(kind: Any) -> tuple[str, tuple[str, ...]] | None:
    """Name and members of a dataclass that can be stored and is called by plain ASCII; None for any other class."""
    described: bool = dataclasses.is_dataclass(kind)
    if not described or issubclass(kind, enum.Enum) or "<locals>" in kind.__qualname__:
        return None
    name, members = _type_name(kind, ""), _members(kind)
    plain = all(part.isascii() and part.isprintable() and not set(part) & set('"\\') for part in (name, *members))
    return (name, members) if plain else None


def digest(value: Any, what: str = "value") -> str:
    """SHA-256, in hexadecimal, of what ``value`` is: equal values have equal digests in every process.

    The order of a dict's or set's members does not count; circuits are hashed by structure, so a circuit rebuilt with
    other parameter objects has the same digest. Raises `Unhashable` as `encode` does.
    """
    return digest_bytes(_dumps(_Writer(attach=False).walk(value, what)))


def decode(encoded: Encoded) -> Any:
    """The value that `encode` was given, equal in type.

    Raises `Corrupt` for a document this module did not write, or whose classes have changed since.
    """
    try:
        return _Reader(encoded.attachments).walk(encoded.document)
    except (Corrupt, MemoryError):
        raise
    except Exception as error:
        raise Corrupt(
            f"a stored value cannot be read ({type(error).__name__}: {error}); it was not written by this version of "
            "hybridq, or a class in it has changed since."
        ) from error


class _Writer:
    """One walk over a value. With ``attach`` it stores, without it only hashes (canonical order, no attachments)."""

    def __init__(self, attach: bool) -> None:
        self.attach = attach
        self.attachments: dict[str, bytes] = {}
        self._bytes = 0
        """Of what was copied so far."""
        self._open: set[int] = set()

    def walk(self, value: Any, path: str) -> Any:
        if value is None or type(value) is bool:
            return value
        if type(value) is int:
            return value if value.bit_length() <= _LONG_INT_BITS else {_TAG: "int", "v": hex(value)}
        if type(value) is str:
            return value if _is_text(value) else {_TAG: "str", "v": _base64(value.encode("utf-8", "surrogatepass"))}
        if type(value) is float:
            return value if math.isfinite(value) else {_TAG: "float", "v": repr(value)}
        if id(value) in self._open:
            raise Unhashable(f"{path} contains itself; only trees of data can be recorded.")
        if len(self._open) >= _MAX_DEPTH:
            raise Unhashable(f"{path:.200}... is nested more than {_MAX_DEPTH} deep; flatten it.")
        self._open.add(id(value))
        try:
            return self._tagged(value, path)
        finally:
            self._open.discard(id(value))

    def _tagged(self, value: Any, path: str) -> Any:
        kind: Any = type(value)
        if kind is np.ndarray:
            return self._array(value, path)
        if kind is list:
            return [self.walk(v, f"{path}[{i}]") for i, v in enumerate(value)]
        if kind is tuple:
            return {_TAG: "tuple", "v": [self.walk(v, f"{path}[{i}]") for i, v in enumerate(value)]}
        if kind is dict:
            return self._mapping(value, path)
        if kind is complex:
            return {_TAG: "complex", "v": [self.walk(value.real, path), self.walk(value.imag, path)]}
        if kind in (bytes, bytearray):
            self._count(len(value), path)
            return {_TAG: kind.__name__, "v": _base64(value)}
        if kind in (set, frozenset):
            members = [self.walk(v, f"{path}{{{v!r:.40}}}") for v in value]
            return {_TAG: kind.__name__, "v": sorted(members, key=_dumps)}
        if isinstance(value, np.generic) and value.dtype.kind in "biufcSU":
            return {_TAG: "scalar", "v": self._array(np.asarray(value), path)}
        if isinstance(value, enum.Enum):  # a combination of flags has a number, but no name of its own
            member = int(value.value) if isinstance(value, enum.Flag) else value.name
            return {_TAG: "enum", "t": _type_name(kind, path), "v": member}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {name: self.walk(getattr(value, name), f"{path}.{name}") for name in _members(kind)}
            return {_TAG: "dataclass", "t": _type_name(kind, path), "v": fields}
        return self._library(value, path)

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        if all(type(k) is str and _is_text(k) for k in value) and _TAG not in value:
            keys: Iterable[Any] = value if self.attach else sorted(value)
            return {k: self.walk(value[k], f"{path}[{k!r}]") for k in keys}
        pairs = [[self.walk(k, f"{path} key {k!r:.40}"), self.walk(v, f"{path}[{k!r:.40}]")] for k, v in value.items()]
        return {_TAG: "dict", "v": pairs if self.attach else sorted(pairs, key=_dumps)}

    def _array(self, array: np.ndarray[Any, Any], path: str) -> Any:
        dtype = _stored(array.dtype)
        if dtype is None:
            raise Unhashable(
                f"{path} is of dtype {array.dtype}; numbers of up to 64 bits a component, booleans and strings can be "
                "recorded."
            )
        self._count(array.nbytes, path)
        array = np.ascontiguousarray(array, dtype=dtype).reshape(array.shape)
        head = {_TAG: "array", "d": dtype.str, "s": list(array.shape)}
        if array.nbytes <= _INLINE_ARRAY_BYTES:
            return {**head, "v": _base64(array.tobytes())}
        if not self.attach:
            return {**head, "h": digest_bytes(array.tobytes())}
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, allow_pickle=False)
        return {_TAG: "npy", "f": self._attach(buffer.getvalue(), "npy")}

    def _count(self, size: int, path: str) -> None:
        """Refuse what is too large before it is copied."""
        self._bytes += size
        if self.attach and self._bytes > MAX_VALUE_BYTES:
            raise Unhashable(
                f"{path} takes {size:,} bytes, which makes {self._bytes:,} of the value; at most {MAX_VALUE_BYTES:,} "
                "are recorded. Write it to a file of your own and return the file's name and checksum."
            )

    def _attach(self, data: bytes, suffix: str) -> str:
        name = f"{digest_bytes(data)}.{suffix}"
        self.attachments[name] = data
        return name

    def _library(self, value: Any, path: str) -> Any:
        kind = type(value)
        home = kind.__module__.partition(".")[0]
        if home == "scipy" and kind.__name__ == "OptimizeResult":
            items = {k: v if _is_updates(v) or not hasattr(v, "todense") else v.todense() for k, v in value.items()}
            return {_TAG: "OptimizeResult", "v": self._mapping(items, path)}
        if _is_updates(value):
            return {_TAG: "LbfgsInvHessProduct", "v": self._array(np.stack([value.sk, value.yk]), path)}
        if home == "qiskit" and kind.__name__ == "SparsePauliOp":
            labels, coefficients = value.paulis.to_labels(), np.asarray(value.coeffs)
            if coefficients.dtype != complex:
                raise Unhashable(f"{path} has coefficients of dtype {coefficients.dtype}; bind its parameters first.")
            return {
                _TAG: "SparsePauliOp",
                "n": value.num_qubits,
                "labels": self.walk(labels, path),
                "coeffs": self._array(coefficients, path),
            }
        if home == "qiskit" and kind.__name__ == "BitArray":
            return {_TAG: "BitArray", "n": value.num_bits, "v": self._array(value.array, path)}
        if home == "qiskit" and _is_circuit(value):
            if not self.attach:
                return {_TAG: "circuit", "h": circuit_digest(value)}
            return {_TAG: "qpy", "f": self._attach(_qpy_bytes(value), "qpy")}
        raise Unhashable(
            f"{path} is a {kind.__module__}.{kind.__qualname__}, which can be neither hashed nor stored as data. "
            "Pass numbers, strings, lists, dicts, arrays, circuits, observables or dataclasses of these."
        )


@functools.lru_cache(maxsize=256)
def _members(kind: Any) -> tuple[str, ...]:
    """The fields of a dataclass that make an instance of it."""
    return tuple(f.name for f in dataclasses.fields(kind) if f.init)


@functools.lru_cache(maxsize=256)
def _stored(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """What an array of ``dtype`` is stored as; None if it is not."""
    if dtype.kind not in "biufcSU" or dtype.newbyteorder("=") in _EXTENDED:
        return None
    return dtype.newbyteorder("<")


def _is_updates(value: Any) -> bool:
    """Whether it is the inverse Hessian of L-BFGS-B: ten updates, of which a matrix of n^2 numbers could be made."""
    kind = type(value)
    return kind.__module__.partition(".")[0] == "scipy" and kind.__name__ == "LbfgsInvHessProduct"


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()


def _is_text(text: str) -> bool:
    """Whether JSON can hold ``text``: a file's name, for one, may hold lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Reader:
    def __init__(self, attachments: Mapping[str, bytes]) -> None:
        self.attachments = attachments

    def walk(self, document: Any) -> Any:
        if isinstance(document, list):
            return [self.walk(v) for v in document]
        if not isinstance(document, dict):
            return document
        tag = document.get(_TAG)
        if tag is None:
            return {k: self.walk(v) for k, v in document.items()}
        read = _READERS.get(tag)
        if read is None:
            raise Corrupt(f"a stored value has the unknown tag {tag!r}; it was not written by this version of hybridq.")
        return read(self, document)

    def array(self, document: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        if document[_TAG] == "npy":
            buffer = io.BytesIO(self.attachment(document["f"]))
            try:
                return np.asarray(np.lib.format.read_array(buffer, allow_pickle=False))
            except MemoryError as error:  # room for what its header says is taken before anything is read
                raise Corrupt(f"{document['f']} says that it holds more than memory does ({error}).") from error
        data = np.frombuffer(base64.b64decode(document["v"]), dtype=np.dtype(document["d"]))
        return data.reshape(document["s"]).copy()

    def attachment(self, name: str) -> bytes:
        try:
            return self.attachments[name]
        except KeyError:
            raise Corrupt(f"the stored value {name} is missing from the run directory.") from None

    def circuit(self, document: Mapping[str, Any]) -> Any:
        from qiskit import qpy

        data = self.attachment(document["f"])
        if data[:6] != b"QISKIT" or data[6] < QPY_FLOOR:
            raise Corrupt(f"{document['f']} is not a QPY file of version {QPY_FLOOR} or later; it is not loaded.")
        return qpy.load(io.BytesIO(data))[0]

    def pauli_op(self, document: Mapping[str, Any]) -> Any:
        from qiskit.quantum_info import PauliList, SparsePauliOp

        labels, coefficients = self.walk(document["labels"]), self.array(document["coeffs"])
        if not labels:
            return SparsePauliOp.from_list([], num_qubits=document["n"])
        return SparsePauliOp(PauliList(labels), coefficients)

    def bit_array(self, document: Mapping[str, Any]) -> Any:
        from qiskit.primitives import BitArray

        return BitArray(self.array(document["v"]), document["n"])

    def result(self, document: Mapping[str, Any]) -> Any:
        from scipy.optimize import OptimizeResult

        return OptimizeResult(self.walk(document["v"]))

    def updates(self, document: Mapping[str, Any]) -> Any:
        from scipy.optimize import LbfgsInvHessProduct

        return LbfgsInvHessProduct(*self.array(document["v"]))

    def member(self, document: Mapping[str, Any]) -> Any:
        kind, member = _find_type(document["t"]), document["v"]
        return kind[member] if isinstance(member, str) else kind(member)

    def instance(self, document: Mapping[str, Any]) -> Any:
        kind = _find_type(document["t"])
        return kind(**{name: self.walk(v) for name, v in document["v"].items()})


_READERS: dict[str, Callable[[_Reader, Mapping[str, Any]], Any]] = {
    "int": lambda r, d: int(d["v"], 16),
    "float": lambda r, d: float(d["v"]),
    "str": lambda r, d: base64.b64decode(d["v"]).decode("utf-8", "surrogatepass"),
    "complex": lambda r, d: complex(*map(r.walk, d["v"])),
    "tuple": lambda r, d: tuple(map(r.walk, d["v"])),
    "set": lambda r, d: set(map(r.walk, d["v"])),
    "frozenset": lambda r, d: frozenset(map(r.walk, d["v"])),
    "dict": lambda r, d: {r.walk(k): r.walk(v) for k, v in d["v"]},
    "bytes": lambda r, d: base64.b64decode(d["v"]),
    "bytearray": lambda r, d: bytearray(base64.b64decode(d["v"])),
    "array": _Reader.array,
    "npy": _Reader.array,
    "scalar": lambda r, d: r.array(d["v"])[()],
    "enum": _Reader.member,
    "dataclass": _Reader.instance,
    "OptimizeResult": _Reader.result,
    "LbfgsInvHessProduct": _Reader.updates,
    "SparsePauliOp": _Reader.pauli_op,
    "BitArray": _Reader.bit_array,
    "qpy": _Reader.circuit,
}


def _type_name(kind: type, path: str) -> str:
    if "<locals>" in kind.__qualname__:
        raise Unhashable(f"{path} is of the local class {kind.__qualname__}; define it at the top of its module.")
    return f"{kind.__module__}:{kind.__qualname__}"


def _find_type(name: str) -> Any:
    """The class of a stored instance, from modules that are loaded already (data must not decide what is imported)."""
    module_name, _, qualname = name.partition(":")
    if module_name.partition(".")[0] == "hybridq":
        __import__(module_name)
    module = sys.modules.get(module_name)
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
        raise Corrupt(
            f"a stored value is of the class {qualname} of module {module_name}, which is not loaded here. "
            "Import that module in the script, or run the script that recorded the value."
        )
    return found


def _is_circuit(value: Any) -> bool:
    from qiskit import QuantumCircuit

    return isinstance(value, QuantumCircuit)


def _qpy_bytes(circuit: Any) -> bytes:
    from qiskit import qpy

    buffer = io.BytesIO()
    qpy.dump(circuit, buffer, version=qpy.QPY_VERSION)
    return buffer.getvalue()


def circuit_digest(circuit: Any) -> str:
    """SHA-256, in hexadecimal, of a circuit's structure.

    Counts: the number of qubits and classical bits, each instruction's name, definition, operands and parameters, and
    the global phase. Does not count: names of circuits, registers and parameters, and which parameter objects are
    used; a parameter is known by its position in ``circuit.parameters``. Raises `Unhashable` for an instruction that
    has neither a standard meaning nor a definition.
    """
    known = _digests.get(id(circuit))
    if known is not None and known.circuit() is circuit and known.snapshot == _snapshot(circuit):
        return known.digest
    positions = {p: i for i, p in enumerate(circuit.parameters)}
    return digest_bytes(_dumps(_structure(circuit, positions)))


@dataclass(frozen=True, eq=False)
class _Digest:
    circuit: weakref.ref[Any]
    snapshot: Any
    digest: str


_digests: dict[int, _Digest] = {}
"""Of circuits that were copied and hashed; what they were is kept, so that a changed one is hashed again."""
_MOST_DIGESTS, _MOST_INSTRUCTIONS = 64, 256


def keep_digest(circuit: Any, copy: Any, digest: str) -> None:
    """Note ``digest`` of ``copy``, which nobody changes, as that of ``circuit`` for as long as it is equal to it."""
    if len(copy._data) > _MOST_INSTRUCTIONS:
        return
    if len(_digests) >= _MOST_DIGESTS:
        _digests.clear()
    _digests[id(circuit)] = _Digest(weakref.ref(circuit), _snapshot(copy), digest)


def _snapshot(circuit: Any) -> Any:
    """What the structure of a circuit hangs on, to be compared."""
    return circuit.num_qubits, circuit.num_clbits, circuit.global_phase, circuit._data[:]


def _structure(circuit: Any, positions: Mapping[Any, int]) -> list[Any]:
    from qiskit.circuit import CASE_DEFAULT, CircuitError, Instruction

    qubits = {bit: i for i, bit in enumerate(circuit.qubits)}
    clbits = {bit: i for i, bit in enumerate(circuit.clbits)}
    lines: list[Any] = [circuit.num_qubits, circuit.num_clbits, _number(circuit.global_phase, positions)]
    for instruction in circuit.data:
        operation = instruction.operation
        line: list[Any] = [
            operation.name,
            [qubits[q] for q in instruction.qubits],
            [clbits[c] for c in instruction.clbits],
            [_parameter(p, positions) for p in getattr(operation, "params", ())],
        ]
        standard = _standard_types().get(operation.name)
        if operation.name in ("if_else", "while_loop"):
            line.append(_condition(operation.condition, clbits))
        elif operation.name == "switch_case":
            labels = [["default" if v is CASE_DEFAULT else int(v) for v in vs] for vs, _ in operation.cases_specifier()]
            line += [_condition(operation.target, clbits), labels]
        elif operation.name == "delay":
            line.append(operation.unit)
        if standard is None or getattr(operation, "base_class", None) is not standard:
            try:
                definition = getattr(operation, "definition", None)
            except CircuitError:
                definition = None
            if definition is not None:
                line.append(_structure(definition, positions))
            elif not line[3] or not isinstance(operation, Instruction):  # modifiers of annotated ones hide elsewhere
                raise Unhashable(
                    f"the instruction {operation.name!r} has neither a standard meaning nor a definition, so two "
                    "different ones could not be told apart; give it a definition or decompose it."
                )
        lines.append(line)
    return lines


def _condition(condition: Any, clbits: Mapping[Any, int]) -> Any:
    """What a control-flow operation looks at; registers by their bits, since their names do not count."""
    from qiskit.circuit import ClassicalRegister, Clbit
    from qiskit.circuit.classical import expr

    if isinstance(condition, tuple):
        return [_condition(condition[0], clbits), int(condition[1])]
    if isinstance(condition, Clbit):
        return clbits[condition]
    if isinstance(condition, ClassicalRegister):
        return [clbits[bit] for bit in condition]
    kind, of = type(condition).__name__, str(getattr(condition, "type", ""))
    if isinstance(condition, expr.Var) and isinstance(condition.var, (Clbit, ClassicalRegister)):
        return [kind, of, _condition(condition.var, clbits)]
    if isinstance(condition, expr.Value):
        return [kind, of, repr(condition.value)]
    if isinstance(condition, expr.Cast):
        return [kind, of, _condition(condition.operand, clbits)]
    if isinstance(condition, expr.Unary):
        return [kind, of, condition.op.name, _condition(condition.operand, clbits)]
    if isinstance(condition, expr.Binary):
        return [kind, of, condition.op.name, _condition(condition.left, clbits), _condition(condition.right, clbits)]
    if isinstance(condition, expr.Index):
        return [kind, of, _condition(condition.target, clbits), _condition(condition.index, clbits)]
    raise Unhashable(f"a condition of a circuit is a {kind} of its own, which cannot be hashed; use classical bits.")


def _parameter(value: Any, positions: Mapping[Any, int]) -> Any:
    from qiskit import QuantumCircuit

    if isinstance(value, QuantumCircuit):
        return _structure(value, positions)
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value, dtype=complex)
        return [list(array.shape), digest_bytes(array.tobytes())]
    if isinstance(value, (str, bytes)) or value is None:
        return repr(value)
    if isinstance(value, (list, tuple, range)):
        return [_parameter(v, positions) for v in value]
    return _number(value, positions)


def _number(value: Any, positions: Mapping[Any, int]) -> Any:
    from qiskit.circuit import Parameter, ParameterExpression

    if isinstance(value, Parameter):
        return [positions.get(value, value.name)]  # the variable of a for-loop is not the circuit's own
    if isinstance(value, ParameterExpression) and value.parameters:
        by_position = {p: Parameter(f"p{positions[p]}") for p in value.parameters if p in positions}
        return str(value.subs(by_position))
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    try:
        number = complex(value)
    except (TypeError, ValueError):
        raise Unhashable(f"a gate parameter is a {type(value).__qualname__}, which cannot be hashed.") from None
    return [repr(number.real), repr(number.imag)]


@functools.cache
def _standard_types() -> dict[str, type[Any]]:
    """The types whose name, operands and parameters say everything; others may borrow a name for another meaning."""
    from qiskit import circuit
    from qiskit.circuit.library import Barrier, UnitaryGate, get_standard_gate_name_mapping

    types = {name: gate.base_class for name, gate in get_standard_gate_name_mapping().items()}
    types |= {"barrier": Barrier, "unitary": UnitaryGate, "if_else": circuit.IfElseOp, "for_loop": circuit.ForLoopOp}
    types |= {"while_loop": circuit.WhileLoopOp, "switch_case": circuit.SwitchCaseOp}
    return types | {"break_loop": circuit.BreakLoopOp, "continue_loop": circuit.ContinueLoopOp}


def same_value(left: Any, right: Any, tolerance: float) -> bool:
    """Whether two JSON documents of `encode` say the same, numbers within ``tolerance`` (absolute and relative)."""
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=tolerance, abs_tol=tolerance)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(same_value(a, b, tolerance) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return False
        if left.get(_TAG) == "array" == right.get(_TAG) and left["d"] == right["d"] and left["s"] == right["s"]:
            a, b = (_Reader({}).array(d) for d in (left, right))
            if a.dtype.kind in "fc":
                return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True))
        return all(same_value(left[k], right[k], tolerance) for k in left)
    return type(left) is type(right) and bool(left == right)
