"""The engine process' side of its pipes: read a request, evaluate it, reply."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import select
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridq.engines import frames

if TYPE_CHECKING:
    from hybridq.engines.adjoint import AdjointEngine
    from hybridq.engines.aer import AerEngine
    from hybridq.engines.backend import BackendEngine
    from hybridq.engines.loops import Advance
    from hybridq.errors import HybridqError
    from hybridq.program import Outcome, Program, Template

__all__ = ["serve"]

_READ_BYTES = 2**16  # at first: a request is small as a rule
_TEMPLATE_BYTES = 2**26  # of encoded templates that are kept decoded; the parent sends dropped ones again


def serve(max_bytes: int, spin: float) -> None:
    """Answer requests until the parent closes the pipe; each program may take ``max_bytes`` bytes of memory.

    For ``spin`` seconds after each answer the next request is looked for (`frames.Spin`), before it is waited for.
    """
    pipe = _Pipe(spin)
    faulthandler.enable()
    try:
        import numpy
        import qiskit
        import qiskit_aer

        engines = _Engines(max_bytes)
    except BaseException as error:
        pipe.write(frames.FAILED, f"{type(error).__name__}: {error}".encode())
        raise
    versions = {module.__name__: module.__version__ for module in (numpy, qiskit, qiskit_aer)}
    gc.collect()
    gc.freeze()  # the libraries' objects stay, so no later collection has to walk over them
    pipe.write(frames.READY, json.dumps(versions).encode())
    answers = _Answers(engines, pipe)
    while (request := pipe.read_request()) is not None:
        pipe.write(*answers.reply(*request))


class _Pipe:
    """Standard input and output of this process, taken away from everything else in it."""

    def __init__(self, spin: float) -> None:
        self._input, self._output = os.dup(0), os.dup(1)
        self._spin = frames.Spin(spin)
        self._readable = select.poll()
        self._readable.register(self._input, select.POLLIN)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)  # what a library prints goes to the log, not between two frames

    def read_request(self) -> tuple[bytes, bytes] | None:
        """Kind and message of the next request, or None when the parent has closed the pipe or ended."""
        self._spin(self._readable)
        data = os.read(self._input, _READ_BYTES)
        while data and len(data) < frames.HEAD.size:
            more = os.read(self._input, _READ_BYTES)
            data = data + more if more else b""
        if not data:
            return None
        kind, length = frames.HEAD.unpack_from(data)
        if kind not in (frames.EVALUATE, frames.ADVANCE) or length > frames.MAX_LENGTH:
            raise SystemExit(f"a frame of kind {kind!r} and length {length} is not a request")
        message = data[frames.HEAD.size :]
        if len(message) < length:
            message = self._rest(bytearray(message), length)
        if len(message) > length:  # the parent waits for each answer
            raise SystemExit(f"{len(message) - length} bytes follow a request before it is answered")
        return (kind, message) if len(message) == length else None

    def _rest(self, message: bytearray, length: int) -> bytes:
        """``message`` filled up to ``length`` bytes, fewer only where the input ends."""
        while len(message) < length:
            data = os.read(self._input, min(length - len(message), 2**24))
            if not data:
                break
            message += data
        return bytes(message)

    def write(self, kind: bytes, message: bytes) -> None:
        """Send one frame."""
        view = memoryview(frames.HEAD.pack(kind, len(message)) + message)
        try:
            while view:
                view = view[os.write(self._output, view) :]
        except BrokenPipeError:
            raise SystemExit(0) from None  # the parent has no use for it any more


class _Engines:
    """The engines of this process by the names in plans: Aer from the start, any other with its first program."""

    def __init__(self, max_bytes: int) -> None:
        from hybridq.engines.aer import AerEngine

        self._max_bytes = max_bytes
        self._known: dict[str, AerEngine | AdjointEngine | BackendEngine] = {"aer": AerEngine(max_bytes)}

    def evaluate(self, programs: Sequence[Program], max_bytes: int | None) -> list[Outcome | HybridqError]:
        """An outcome or an error for each program, those of one engine evaluated together."""
        from hybridq.errors import HybridqError

        if len(programs) == 1:
            try:
                engine = self._engine(programs[0].plan.engine)
            except HybridqError as error:
                return [error]
            return engine.evaluate(programs, max_bytes)
        outcomes: dict[int, Outcome | HybridqError] = {}
        for name in dict.fromkeys(program.plan.engine for program in programs):
            own = [i for i, program in enumerate(programs) if program.plan.engine == name]
            try:
                engine = self._engine(name)
            except HybridqError as error:
                outcomes |= dict.fromkeys(own, error)
                continue
            outcomes |= zip(own, engine.evaluate([programs[i] for i in own], max_bytes), strict=True)
        return [outcomes[i] for i in range(len(programs))]

    def _engine(self, name: str) -> AerEngine | AdjointEngine | BackendEngine:
        engine = self._known.get(name)
        return self._made(name) if engine is None else engine

    def _made(self, name: str) -> AerEngine | AdjointEngine | BackendEngine:
        from hybridq.errors import WorkflowError

        if name == "adjoint":
            from hybridq.engines.adjoint import AdjointEngine

            self._known[name] = AdjointEngine(self._max_bytes)
        if name == "backend":
            from hybridq.engines.backend import BackendEngine

            folders = os.environ.get(frames.SEARCH_PATH, "").split(os.pathsep)
            sys.path.extend(folder for folder in folders if folder and folder not in sys.path)
            self._known[name] = BackendEngine(self._max_bytes)
        engine = self._known.get(name)
        if engine is None:
            raise WorkflowError(f"there is no engine {name!r}; plan 'aer', 'adjoint' or 'backend'.")
        return engine


class _Templates:
    """Decoded templates, the least recently used dropped first. One that cannot be decoded is kept as its error."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[Template | HybridqError, int]] = OrderedDict()
        self._bytes = 0

    def add(self, digest: str, data: bytes) -> None:
        from hybridq.engines.wire import decode_template
        from hybridq.errors import EngineFailed, HybridqError

        template: Template | HybridqError
        try:
            template = decode_template(data)
        except HybridqError as error:
            template = error
        except Exception as error:  # noqa: BLE001 - QPY raises many types; a bad circuit fails its own programs only
            template = EngineFailed(f"the circuit could not be read: {type(error).__name__}: {error}")
        self._bytes += len(data) - self._known.pop(digest, (None, 0))[1]
        self._known[digest] = (template, len(data))

    def find(self, digest: str) -> Template | HybridqError | None:
        entry = self._known.get(digest)
        if entry is None:
            return None
        self._known.move_to_end(digest)
        return entry[0]

    def shrink(self) -> None:
        """Drop what is over the bound; between requests, so that one request always has all of its own."""
        while self._bytes > _TEMPLATE_BYTES and len(self._known) > 1:
            self._bytes -= self._known.popitem(last=False)[1][1]


class _Answers:
    """What requests come to."""

    def __init__(self, engines: _Engines, pipe: _Pipe) -> None:
        from hybridq.engines import wire
        from hybridq.engines.loops import Loops

        self._wire = wire  # imported here, since it loads Qiskit; kept, since an import takes a microsecond a request
        self._engines, self._pipe = engines, pipe
        self._templates = _Templates()
        self._loops = Loops(lambda programs: engines.evaluate(programs, None))

    def reply(self, kind: bytes, message: bytes) -> tuple[bytes, bytes]:
        """Kind and message of the answer."""
        wire = self._wire
        sent, payload = wire.split_request(message)
        for digest, data in sent.items():
            self._templates.add(digest, data)
        if kind == frames.ADVANCE:
            return self._advance(payload)
        unpacked = wire.unpack(payload, self._templates.find)
        if unpacked.missing:
            return frames.MISSING, json.dumps(unpacked.missing).encode()
        programs = [program for program in unpacked.programs if isinstance(program, wire.Program)]
        done = iter(self._engines.evaluate(programs, unpacked.max_bytes))
        outcomes = [next(done) if isinstance(program, wire.Program) else program for program in unpacked.programs]
        self._templates.shrink()
        return frames.OUTCOMES, wire.pack_outcomes(outcomes)

    def _advance(self, payload: bytes) -> tuple[bytes, bytes]:
        """`reply` to a slice of a loop, parts of which are sent before it where they are asked for."""
        wire = self._wire

        def send(part: Advance) -> None:
            self._pipe.write(frames.PART, wire.pack_advance(part))

        asked = wire.unpack_loop(payload, self._templates.find)
        if not isinstance(asked, wire.Slice):
            return frames.MISSING, json.dumps(asked).encode()
        loop = asked.loop
        if isinstance(loop, wire.Loop):
            part = send if asked.parts else None
            found = wire.pack_advance(self._loops.advance(loop, asked.known, asked.points, asked.seconds, part))
        else:
            found = wire.pack_advance(loop)
        self._templates.shrink()
        return frames.OUTCOMES, found
