"""What crosses the border of an engine process: programs one way, outcomes the other, never a pickle.

A template travels as QPY and Pauli labels, once for each process; everything else of a batch is one JSON header and
raw little-endian arrays, so a small call costs tens of microseconds.
"""

from __future__ import annotations

import functools
import io
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qiskit import qpy
from qiskit.quantum_info import PauliList, SparsePauliOp

from hybridq import errors
from hybridq.engines.loops import Advance, Loop, Point
from hybridq.errors import Corrupt, EngineFailed, HybridqError, WorkflowError
from hybridq.program import NumericPlan, Outcome, Program, Template, physical
from hybridq.values import Encoded, Written

__all__ = [
    "Batch",
    "Slice",
    "Unpacked",
    "decode_template",
    "encode_template",
    "join_request",
    "pack",
    "pack_advance",
    "pack_loop",
    "pack_outcomes",
    "split_request",
    "unpack",
    "unpack_advance",
    "unpack_loop",
    "unpack_outcomes",
]

Array = NDArray[Any]

QPY_FLOOR = 13  # older versions may execute code when they are loaded (CVE-2025-2000)
_CACHE_KEY = "wire"
_FLOAT, _UINT, _COMPLEX, _BYTE = (np.dtype(kind) for kind in ("<f8", "<u8", "<c16", "u1"))
_LENGTH = struct.Struct("<I")
_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True)
class Batch:
    """Programs, encoded: what is sent to an engine process, or by way of a cluster to a worker that has one."""

    templates: Mapping[str, bytes]
    """Every encoded template of the batch by its digest; a process that has one already is not sent it again."""
    payload: bytes
    """Everything else, in the order of the programs."""


# -- frames of a header and arrays -------------------------------------------------------------------------------


def _join(head: bytes, arrays: Sequence[Array]) -> bytes:
    return b"".join([_LENGTH.pack(len(head)), head, *(a.tobytes() for a in arrays)])


def _split(data: bytes) -> tuple[bytes, int]:
    """The header and where the arrays begin."""
    (length,) = _LENGTH.unpack_from(data)
    start = _LENGTH.size + length
    if len(data) < start:
        raise Corrupt(f"an engine message of {len(data)} bytes ends inside its header of {length}.")
    return data[_LENGTH.size : start], start


class _Arrays:
    """Takes arrays off a message one after the other, each a copy, so that callers may write to them."""

    def __init__(self, data: bytes, offset: int) -> None:
        self._data = data
        self._offset = offset

    def take(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        size = math.prod(shape) * dtype.itemsize
        if self._offset + size > len(self._data):
            raise Corrupt(f"an engine message of {len(self._data)} bytes ends inside an array of {size} bytes.")
        array = np.ndarray(shape, dtype, self._data, self._offset).copy()
        self._offset += size
        return array


# -- templates ---------------------------------------------------------------------------------------------------


def encode_template(template: Template) -> bytes:
    """``template`` as its backend has it, as data, encoded once and kept.

    Raises `WorkflowError` for a circuit that Qiskit cannot serialise, or that does not fit its backend.
    """
    template = physical(template)
    encoded: bytes | None = template.cache.get(_CACHE_KEY)
    if encoded is None:
        buffer = io.BytesIO()
        try:
            qpy.dump(template.circuit, buffer)
        except Exception as error:  # a circuit may hold any object, and QPY raises whatever that object does
            raise WorkflowError(
                f"the circuit cannot be sent to an engine process: {error}. Decompose the instructions that Qiskit "
                "cannot serialise (QPY)."
            ) from error
        header = {
            "digest": template.digest,
            "qubits": template.num_qubits,
            "parameters": template.num_parameters,
            "gates": template.num_gates,
            "paulis": template.num_paulis,
            "in_place": template.sampled_in_place,
            "channels": template.has_channels,
            "readout": template.readout,
            "columns": template.columns,
            "labels": [o.paulis.to_labels() for o in template.observables],
        }
        coefficients = [np.asarray(o.coeffs, dtype=_COMPLEX) for o in template.observables]
        encoded = _join(_dumps(header).encode(), [*coefficients, np.frombuffer(buffer.getvalue(), dtype=_BYTE)])
        template.cache[_CACHE_KEY] = encoded
    return encoded


def decode_template(data: bytes) -> Template:
    """The template that `encode_template` was given, but for the identity of its parameter objects.

    Raises `Corrupt` for anything else, in particular for QPY of a version that may execute code.
    """
    head, start = _split(data)
    header = json.loads(head)
    arrays = _Arrays(data, start)
    observables = tuple(
        SparsePauliOp(PauliList(labels), arrays.take(_COMPLEX, (len(labels),))) for labels in header["labels"]
    )
    circuit = data[start + 16 * sum(map(len, header["labels"])) :]
    if circuit[:6] != b"QISKIT" or circuit[6] < QPY_FLOOR:
        raise Corrupt(f"a template's circuit is not QPY of version {QPY_FLOOR} or later; it is not loaded.")
    return Template(
        circuit=qpy.load(io.BytesIO(circuit))[0],
        observables=observables,
        digest=header["digest"],
        num_qubits=header["qubits"],
        num_parameters=header["parameters"],
        num_gates=header["gates"],
        num_paulis=header["paulis"],
        sampled_in_place=header["in_place"],
        has_channels=header["channels"],
        readout=_frozen(header["readout"]),
        columns=_frozen(header["columns"]),
    )


# -- programs ----------------------------------------------------------------------------------------------------


# The headers of a loop's calls are equal, only their arrays differ: both sides keep what the last ones came to.

_Entry = tuple[str, int, int, int | None, NumericPlan, tuple[int, ...], tuple[int, ...], tuple[int, int] | None]


@functools.lru_cache(maxsize=256)
def _program_head(entries: tuple[_Entry, ...], max_bytes: int | None) -> bytes:
    plans = {plan: number for number, plan in enumerate({entry[4]: None for entry in entries})}
    lines = [(*entry[:4], plans[entry[4]], *entry[5:]) for entry in entries]
    return _dumps({"programs": lines, "plans": [astuple(plan) for plan in plans], "max_bytes": max_bytes}).encode()


@functools.lru_cache(maxsize=256)
def _program_entries(head: bytes) -> tuple[tuple[_Entry, ...], int | None]:
    header = json.loads(head)
    plans = [NumericPlan(*map(_frozen, fields)) for fields in header["plans"]]
    entries = tuple(
        (digest, rows, columns, shots, plans[plan], tuple(batch_shape), tuple(observables_shape), _frozen(derived))
        for digest, rows, columns, shots, plan, batch_shape, observables_shape, derived in header["programs"]
    )
    return entries, header["max_bytes"]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def pack(programs: Sequence[Program], max_bytes: int | None = None) -> Batch:
    """Encode ``programs``; ``max_bytes`` bounds the memory of each one, on top of the engine's own bound.

    Raises `WorkflowError` for a circuit that cannot be serialised.
    """
    if len(programs) == 1:
        return _pack_one(programs[0], max_bytes)
    templates: dict[str, bytes] = {}
    entries: list[_Entry] = []
    arrays: list[Array] = []
    for program in programs:
        template, theta = program.template, program.theta
        if template.digest not in templates:
            templates[template.digest] = encode_template(template)
        entries.append(_entry(program))
        arrays += (theta.astype(_FLOAT, copy=False), program.seeds.astype(_UINT, copy=False))
    return Batch(templates, _join(_program_head(tuple(entries), max_bytes), arrays))


def _entry(program: Program) -> _Entry:
    return (
        program.template.digest, *program.theta.shape, program.shots, program.plan, program.batch_shape,
        program.observables_shape, program.derived,
    )  # fmt: skip


def _pack_one(program: Program, max_bytes: int | None) -> Batch:
    """`pack`, for a program that is as a rule like the last one of its template but for its arrays."""
    template, theta, plan = program.template, program.theta, program.plan
    shape = (theta.shape, program.shots, program.batch_shape, program.observables_shape, program.derived, max_bytes)
    last = template.cache.get("packed")
    if last is None or last[0] is not plan or last[1] != shape:
        head = _join(_program_head((_entry(program),), max_bytes), ())
        last = template.cache["packed"] = (plan, shape, head, {template.digest: encode_template(template)})
    payload = last[2] + theta.astype(_FLOAT, copy=False).tobytes() + program.seeds.astype(_UINT, copy=False).tobytes()
    return Batch(last[3], payload)


@dataclass(frozen=True)
class Unpacked:
    """What `unpack` finds in a payload."""

    programs: tuple[Program | HybridqError, ...]
    """In the order given to `pack`; empty if a template is missing."""
    max_bytes: int | None
    missing: tuple[str, ...]
    """Digests of templates that were not found."""


def unpack(payload: bytes, find: Callable[[str], Template | HybridqError | None]) -> Unpacked:
    """Decode what `pack` made, with templates that ``find`` gives by their digests (None if it has none).

    Where it gives an error, that error takes the place of the program.
    """
    head, start = _split(payload)
    entries, max_bytes = _program_entries(head)
    if len(entries) == 1:
        (entry,) = entries
        template = find(entry[0])
        if template is None:
            return Unpacked((), max_bytes, (entry[0],))
        return Unpacked((_program(template, entry, _Arrays(payload, start)),), max_bytes, ())
    found = {digest: find(digest) for digest in {entry[0] for entry in entries}}
    if None in found.values():
        missing = tuple(sorted(digest for digest, template in found.items() if template is None))
        return Unpacked((), max_bytes, missing)
    arrays = _Arrays(payload, start)
    programs: list[Program | HybridqError] = []
    for entry in entries:
        template = found[entry[0]]
        assert template is not None
        programs.append(_program(template, entry, arrays))
    return Unpacked(tuple(programs), max_bytes, ())


def _program(template: Template | HybridqError, entry: _Entry, arrays: _Arrays) -> Program | HybridqError:
    """The next program of a payload, or the error in place of its template."""
    _, rows, columns, shots, plan, batch_shape, observables_shape, derived = entry
    theta, seeds = arrays.take(_FLOAT, (rows, columns)), arrays.take(_UINT, (rows, 2))
    if not isinstance(template, Template):
        return template
    return Program(template, theta, shots, seeds, plan, batch_shape, observables_shape, derived=derived)


# -- outcomes ----------------------------------------------------------------------------------------------------


_Shape = tuple[int, ...]
_Shapes = tuple[str, str] | tuple[_Shape, _Shape | None, _Shape | None]


@functools.lru_cache(maxsize=256)
def _outcome_head(entries: tuple[_Shapes, ...]) -> bytes:
    return _dumps(entries).encode()


@functools.lru_cache(maxsize=256)
def _outcome_entries(head: bytes) -> tuple[Any, ...]:
    return tuple(map(_frozen, json.loads(head)))


_SINGLE = struct.Struct("<4d")
"""Seconds, bytes, value and error of an outcome of one value: the arrays of the general form, read at once."""


def _single(outcome: Outcome) -> bool:
    """Whether it is one value and nothing else, as plain loops have it, in a hurry."""
    return outcome.values.shape == (1, 1) and outcome.bits is None and outcome.gradients is None


@functools.cache
def _single_head() -> bytes:
    return _join(_outcome_head((((1, 1), None, None),)), ())


def pack_outcomes(outcomes: Sequence[Outcome | HybridqError]) -> bytes:
    """Encode outcomes; an error travels as the name of its class and its message."""
    if len(outcomes) == 1 and isinstance(outcomes[0], Outcome) and _single(outcomes[0]):
        one = outcomes[0]
        return _single_head() + _SINGLE.pack(one.seconds, one.peak_bytes, one.values.item(), one.stderrs.item())
    entries: list[_Shapes] = []
    arrays: list[Array] = []
    for outcome in outcomes:
        if isinstance(outcome, HybridqError):
            entries.append((type(outcome).__name__, str(outcome)))
            continue
        bits, gradients = outcome.bits, outcome.gradients
        entries.append(
            (
                outcome.values.shape,
                None if bits is None else bits.shape,
                None if gradients is None else gradients.shape,
            )
        )
        arrays += (
            np.array([outcome.seconds, outcome.peak_bytes], dtype=_FLOAT),
            outcome.values.astype(_FLOAT, copy=False),
            outcome.stderrs.astype(_FLOAT, copy=False),
        )
        if bits is not None:
            arrays.append(bits)
        if gradients is not None:
            arrays.append(gradients.astype(_FLOAT, copy=False))
    return _join(_outcome_head(tuple(entries)), arrays)


def unpack_outcomes(data: bytes) -> list[Outcome | HybridqError]:
    """The outcomes that `pack_outcomes` was given, errors as instances of their classes of `hybridq.errors`."""
    single = _single_head()
    if data.startswith(single) and len(data) == len(single) + _SINGLE.size:
        seconds, peak, value, stderr = _SINGLE.unpack_from(data, len(single))
        return [Outcome(np.array([[value]]), np.array([[stderr]]), None, seconds, int(peak))]
    head, start = _split(data)
    arrays = _Arrays(data, start)
    outcomes: list[Outcome | HybridqError] = []
    for shape, *details in _outcome_entries(head):
        if isinstance(shape, str):
            outcomes.append(_error(shape, *details))
            continue
        bits_shape, gradients_shape = details
        size = math.prod(shape)
        numbers = arrays.take(_FLOAT, (2 + 2 * size,))
        values, stderrs = numbers[2 : 2 + size].reshape(shape), numbers[2 + size :].reshape(shape)
        bits = None if bits_shape is None else arrays.take(_BYTE, bits_shape)
        gradients = None if gradients_shape is None else arrays.take(_FLOAT, gradients_shape)
        outcomes.append(Outcome(values, stderrs, bits, float(numbers[0]), int(numbers[1]), gradients))
    return outcomes


def _error(name: str, message: str) -> HybridqError:
    kind = getattr(errors, name, None) if name in errors.__all__ else None
    return kind(message) if kind is not None else EngineFailed(f"{name}: {message}")


# -- loops -------------------------------------------------------------------------------------------------------


def pack_loop(loop: Loop, known: int, points: Sequence[Point] | None, seconds: float, parts: bool = False) -> Batch:
    """Encode a slice of ``loop``: after its first ``known`` points, which go with it if they are given.

    With ``parts`` what it comes to is told while it goes on.
    """
    batch = pack([loop.program])
    width = loop.program.theta.shape[1]
    head = _dumps({
        "token": loop.token, "objective": loop.objective, "seed": loop.seed, "method": loop.method,
        "settings": loop.settings, "known": known, "points": points is not None, "width": width, "seconds": seconds,
        "program": len(batch.payload), "parts": parts,
    }).encode()  # fmt: skip
    arrays = [np.frombuffer(batch.payload, _BYTE)]
    if points:
        arrays += _point_arrays(points)
    return Batch(batch.templates, _join(head, arrays))


@dataclass(frozen=True, eq=False)
class Slice:
    """What `unpack_loop` finds in a payload."""

    loop: Loop | HybridqError
    known: int
    points: tuple[Point, ...] | None
    seconds: float
    parts: bool


def unpack_loop(payload: bytes, find: Callable[[str], Template | HybridqError | None]) -> Slice | tuple[str, ...]:
    """Decode what `pack_loop` made, or the digests of templates that were not found."""
    head, start = _split(payload)
    header = json.loads(head)
    arrays = _Arrays(payload, start)
    inner = unpack(arrays.take(_BYTE, (header["program"],)).tobytes(), find)
    if inner.missing:
        return inner.missing
    (program,) = inner.programs
    with_gradient = isinstance(program, Program) and program.plan.gradient != "none"
    points = _take_points(arrays, header["known"], header["width"], with_gradient) if header["points"] else None
    if not isinstance(program, Program):
        return Slice(program, header["known"], points, header["seconds"], header["parts"])
    loop = Loop(
        header["token"], program, header["objective"], header["seed"], header["method"], header["settings"]
    )  # fmt: skip
    return Slice(loop, header["known"], points, header["seconds"], header["parts"])


def pack_advance(advance: Advance | HybridqError) -> bytes:
    """Encode what a slice of a loop came to, or the error in its place."""
    if isinstance(advance, HybridqError):
        return _join(_dumps({"error": [type(advance).__name__, str(advance)]}).encode(), [])
    found, points = advance.result, advance.points
    attachments = {} if found is None else dict(found.attachments)
    text = b"" if found is None else found.text
    head = {
        "state": advance.state, "first": advance.first, "count": len(points),
        "width": len(points[0].x) if points else 0,
        "gradients": bool(points) and points[0].gradient is not None, "left_out": advance.left_out,
        "result": len(text), "attachments": [[name, len(data)] for name, data in attachments.items()],
    }  # fmt: skip
    arrays = [*_point_arrays(points), *(np.frombuffer(data, _BYTE) for data in (text, *attachments.values()))]
    return _join(_dumps(head).encode(), arrays)


def unpack_advance(data: bytes) -> Advance | HybridqError:
    """What `pack_advance` was given."""
    head, start = _split(data)
    header = json.loads(head)
    if "error" in header:
        return _error(*header["error"])
    arrays = _Arrays(data, start)
    points = _take_points(arrays, header["count"], header["width"], header["gradients"])
    text = arrays.take(_BYTE, (header["result"],)).tobytes().decode()
    attachments = {name: arrays.take(_BYTE, (size,)).tobytes() for name, size in header["attachments"]}
    found = None if header["state"] != "done" else Encoded(Written(json.loads(text), text), attachments)
    return Advance(header["state"], points, header["first"], found, tuple(header["left_out"]))


def _point_arrays(points: Sequence[Point]) -> list[Array]:
    if not points:
        return []
    numbers = np.array([(p.value, p.stderr, p.seconds, p.started or 0.0) for p in points], dtype=_FLOAT)
    arrays = [numbers, np.array([p.x for p in points], dtype=_FLOAT)]
    if points[0].gradient is not None:
        arrays.append(np.array([p.gradient for p in points], dtype=_FLOAT))
    return arrays


def _take_points(arrays: _Arrays, count: int, width: int, with_gradient: bool) -> tuple[Point, ...]:
    if not count:
        return ()
    numbers = arrays.take(_FLOAT, (count, 4)).tolist()
    xs = arrays.take(_FLOAT, (count, width))
    gradients = arrays.take(_FLOAT, (count, width)) if with_gradient else [None] * count
    return tuple(
        Point(x, value, stderr, gradient, seconds, started or None)
        for x, gradient, (value, stderr, seconds, started) in zip(xs, gradients, numbers, strict=True)
    )


# -- requests to an engine process -------------------------------------------------------------------------------


def join_request(templates: Mapping[str, bytes], payload: bytes) -> bytes:
    """One message of the templates that a process does not have yet, and a payload."""
    if not templates:
        return _NONE_LACKING + payload
    head = _dumps([[digest, len(data)] for digest, data in templates.items()]).encode()
    return b"".join([_LENGTH.pack(len(head)), head, *templates.values(), payload])


_NONE_LACKING = _LENGTH.pack(2) + b"[]"


def split_request(message: bytes) -> tuple[dict[str, bytes], bytes]:
    """The templates and the payload of `join_request`."""
    if message.startswith(_NONE_LACKING):
        return {}, message[len(_NONE_LACKING) :]
    head, start = _split(message)
    templates = {}
    for digest, length in json.loads(head):
        templates[digest] = message[start : start + length]
        start += length
    return templates, message[start:]
