"""A classical step where it runs: call the researcher's function, bring back data or what it raised."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cloudpickle
from threadpoolctl import threadpool_limits

from hybridq.errors import StepFailed, Unhashable, WorkflowError
from hybridq.location import Location
from hybridq.scope import StepScope, current
from hybridq.values import Encoded, decode, encode

__all__ = ["Raised", "StepReply", "capture", "pack_call", "rebuild", "run_step", "shortened"]

_MAX_TEXT = 20_000
_registry = threading.Lock()
"""Cloudpickle's list of modules to be sent by value belongs to the process."""


@dataclass(frozen=True)
class Raised:
    """An exception as data."""

    type: str
    """``module:qualname``."""
    message: str
    arguments: Any
    """The exception's ``args`` as an encoded document, or None if they are not data."""
    traceback: str
    pickled: bytes | None = None
    """The exception itself, in flight only; never written to disk."""


@dataclass(frozen=True)
class StepReply:
    """What a step brings back: exactly one of ``output`` and ``raised``."""

    output: Encoded | None
    raised: Raised | None
    started: float
    """Wall-clock time at which it began, in seconds since the epoch."""
    seconds: float
    where: str
    bytes: int
    """Growth of the process' peak memory meanwhile, in bytes."""


def pack_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], modules: tuple[str, ...],
              what: str) -> bytes:  # fmt: skip
    """A call as bytes for a worker, with the researcher's own ``modules`` by value: workers may not have them.

    Raises `WorkflowError`, naming ``what``, if something in it cannot travel.
    """
    loaded = [sys.modules[name] for name in modules if name in sys.modules]
    registered = []
    with _registry:
        try:
            for module in loaded:
                if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
                    cloudpickle.register_pickle_by_value(module)
                    registered.append(module)
            return bytes(cloudpickle.dumps((function, args, kwargs)))
        except Exception as error:
            raise WorkflowError(
                f"{what} cannot be sent to a worker: {type(error).__name__}: {error}. Pass data, and open files and "
                "connections inside the step."
            ) from error
        finally:
            for module in registered:
                cloudpickle.unregister_pickle_by_value(module)


def run_step(call: bytes, location: str, seed: int, where: str) -> StepReply:
    """Run a packed call in this process and thread; everything it raises comes back as data."""
    started, clock, peak = time.time(), time.perf_counter(), _peak_bytes()
    output, raised = None, None
    token = current.set(StepScope(Location(location), seed))
    try:
        function, args, kwargs = cloudpickle.loads(call)
        if os.environ.get("OMP_NUM_THREADS") == "1":
            value = function(*args, **kwargs)
        else:
            with threadpool_limits(limits=1):
                value = function(*args, **kwargs)
        output = encode(value, f"the value returned by {location}")
    except BaseException as error:  # noqa: BLE001  # SystemExit and KeyboardInterrupt of a step are the step's own
        raised = capture(error)
    finally:
        current.reset(token)
    return StepReply(output, raised, started, time.perf_counter() - clock, where, max(0, _peak_bytes() - peak))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def capture(error: BaseException) -> Raised:
    """``error`` as data, its traceback as text."""
    try:
        encoded = encode(_constructor_arguments(error))
        arguments = None if encoded.attachments else encoded.document  # a record of a failure has no files of its own
    except Unhashable:
        arguments = None
    message = _message(error)
    pickled: bytes | None = None
    try:
        pickled = bytes(cloudpickle.dumps(error))
        if _message(cloudpickle.loads(pickled)) != message:  # its constructor was given its message once more
            pickled = None
    except Exception:  # noqa: BLE001  # an exception with an odd constructor: its arguments go alone
        pickled = None
    text = "".join(traceback.format_exception(error))
    kind = type(error)
    return Raised(f"{kind.__module__}:{kind.__qualname__}", message, arguments, shortened(text), pickled)


def _message(error: BaseException) -> str:
    try:
        return shortened(str(error))
    except Exception as odd:  # noqa: BLE001  # the exception's own __str__ fails
        return f"(its message cannot be had: {type(odd).__name__})"


def _constructor_arguments(error: BaseException) -> tuple[Any, ...]:
    """What makes the exception again: often ``args``, but an OSError's file name is not among those."""
    try:
        reduced = error.__reduce__()
    except Exception:  # noqa: BLE001  # the exception's own, and odd
        return error.args
    if isinstance(reduced, tuple) and reduced[0] is type(error):
        return tuple(reduced[1])
    return error.args


def shortened(text: str) -> str:
    """``text`` as it is recorded: of a very long one, its beginning and its end."""
    if len(text) <= _MAX_TEXT:
        return text
    half = _MAX_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def rebuild(raised: Raised, location: str) -> BaseException:
    """The exception that was captured, of its own type where that can be had, with ``location`` as a note.

    An exception whose type or arguments do not survive the journey becomes a `StepFailed` that holds its text.
    """
    error = _unpickled(raised) if raised.pickled is not None else _from_arguments(raised)
    if error is None:
        error = StepFailed(f"{location} raised {raised.type.replace(':', '.')}: {raised.message}")
    error.__cause__ = _Remote(f"\n{raised.traceback.rstrip()}\n(in {location})")
    return error


class _Remote(Exception):
    """Stands for the traceback on the worker: Python prints a cause before what it caused."""


def _unpickled(raised: Raised) -> BaseException | None:
    assert raised.pickled is not None
    try:
        error = cloudpickle.loads(raised.pickled)
    except Exception:  # noqa: BLE001  # its module is not importable here
        return None
    return error if isinstance(error, BaseException) else None


def _from_arguments(raised: Raised) -> BaseException | None:
    if raised.arguments is None:
        return None
    module_name, _, qualname = raised.type.partition(":")
    try:
        found: Any = importlib.import_module("__main__" if module_name == "__mp_main__" else module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
        if not issubclass(found, BaseException):
            return None
        args = decode(Encoded(raised.arguments))
        with contextlib.suppress(Exception):
            error: BaseException = found(*args)
            if _message(error) == raised.message:
                return error
        error = found.__new__(found, *args)  # its constructor takes something else than what it passed on
        error.args = args
    except Exception:  # noqa: BLE001  # renamed, moved or odd since it was recorded
        return None
    return error
