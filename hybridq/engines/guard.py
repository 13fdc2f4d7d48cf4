"""What every engine does around a program: refuse what does not fit, measure, and turn failures into values."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from numpy.typing import NDArray

from hybridq.engines.costs import footprint
from hybridq.errors import EngineFailed, HybridqError, TooLarge
from hybridq.program import Outcome, Program
from hybridq.resources import format_bytes

__all__ = ["Numbers", "OutOfMemory", "Prepared", "evaluate_each"]

Array = NDArray[Any]


class Numbers(NamedTuple):
    """What a program comes to: the arrays of its `Outcome`."""

    values: Array
    stderrs: Array
    bits: Array | None
    gradients: Array | None


class OutOfMemory(Exception):
    """A library's refusal to allocate what it needs, in bytes."""

    def __init__(self, required: int) -> None:
        super().__init__(required)
        self.required = required


def evaluate_each(
    engine: str, programs: Sequence[Program], allowed: int, compute: Callable[[Program], Numbers]
) -> list[Outcome | HybridqError]:
    """An outcome for each program, or its error in its place: `TooLarge` before anything of it runs.

    ``engine`` is the engine's name in messages, ``allowed`` the memory that one program may take, in bytes.
    """
    return [_evaluate(engine, program, allowed, compute) for program in programs]


def _evaluate(
    engine: str, program: Program, allowed: int, compute: Callable[[Program], Numbers]
) -> Outcome | HybridqError:
    start = time.perf_counter()
    try:
        required = footprint(program)
    except HybridqError as error:
        return error
    if required > allowed:
        return _too_large(program, required, allowed)
    watched = required >= _WATCHED
    before = _peak_bytes() if watched else 0
    try:
        values, stderrs, bits, gradients = compute(program)
    except OutOfMemory as error:
        return _too_large(program, error.required, allowed)
    except HybridqError as error:
        return error
    except Exception as error:  # noqa: BLE001 - simulators and Qiskit raise many types; here failures are values
        return EngineFailed(f"{engine} failed on this program: {type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    return Outcome(values, stderrs, bits, seconds, _peak_bytes() - before if watched else 0, gradients)


def _too_large(program: Program, required: int, allowed: int) -> TooLarge:
    return TooLarge(
        f"a program of {program.template.num_qubits} qubits needs {format_bytes(required)} ({required} bytes), but "
        f"this engine may use {format_bytes(allowed)} ({allowed} bytes); allow it more memory or make the program "
        "smaller."
    )


_WATCHED = 3 * 2**24
"""Bytes that a program has to ask for before the peak is read around it: a reading takes as long as a small program."""
_STATUS = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC) if sys.platform == "linux" else -1


def _peak_bytes() -> int:
    """The most memory this process ever had resident, in bytes.

    Linux hands the peak of a parent down to ``getrusage`` of its children, so there the kernel's count for this
    program image is read instead.
    """
    if _STATUS >= 0:
        text = os.pread(_STATUS, 4096, 0)
        at = text.find(b"VmHWM:")
        if at >= 0:
            return int(text[at + 6 : text.index(b"kB", at)]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)


class Prepared(Generic[T]):
    """What was prepared once for a template, the least recently used dropped first; bounded in bytes, but for one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._known: OrderedDict[Hashable, T] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: Hashable, prepare: Callable[[], T]) -> T:
        """What is kept under ``key``, prepared now if nothing is."""
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            return known
        prepared = self._known[key] = prepare()
        self._bytes += prepared.nbytes
        while self._bytes > self._max_bytes and len(self._known) > 1:
            self._bytes -= self._known.popitem(last=False)[1].nbytes
        return prepared
