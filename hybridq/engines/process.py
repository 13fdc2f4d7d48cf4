"""The parent's side of an engine process: start it, talk to it, end it.

Aer holds the interpreter's lock for a whole circuit, so circuits run in a process of their own that can be killed
without harm to anything else. The process is spawned, never forked, and dies with its parent.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import site
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from hybridq.engines import frames, wire
from hybridq.engines.loops import Advance, Loop, Point
from hybridq.engines.wire import Batch
from hybridq.errors import EngineFailed, HybridqError, TimedOut, TooLarge, WorkflowError
from hybridq.program import Outcome, Program
from hybridq.resources import cores, format_bytes

__all__ = ["EngineProcess"]

_START_SECONDS = 120.0
_LOOK_SECONDS = 0.25
"""Between looks at the memory of a process that is at work."""
_SPARE_BYTES = 2**29
"""More than what is expected, twice over, that a process may grow by: caches, libraries that are loaded meanwhile."""
_CLOSE_SECONDS = 5.0
_SPIN_SECONDS = 0.001  # that each side of an eager process looks for a message before it sleeps
_MOMENT = 0.5  # far longer than `EngineProcess.ahead` takes
_FORGET_SECONDS = 1.0
"""For so long an answer that nobody wants is waited for, before its process is replaced."""
_TAIL_BYTES = 4096  # of a dead process' stderr that an error quotes
_READ_BYTES = 2**16  # at a time: a reply is small as a rule, and memory for a large one takes longer than the pipe


class EngineProcess:
    """A process of its own that evaluates programs with Aer; usable from any thread, one batch at a time.

    ``max_bytes`` is the memory that one program may take there, in bytes; ``name`` goes into error messages. The
    process starts with `start` or the first batch, and again with the first batch after it died. ``eager`` is for one
    that works alone on short programs: both sides look for a message without a pause, for a bounded time, before they
    sleep until it comes.
    """

    def __init__(self, max_bytes: int, *, name: str = "engine", eager: bool = False) -> None:
        self.max_bytes = max_bytes
        self.name = name
        self._eager = eager and cores() > 1
        self._lock = threading.Lock()
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """The process' id, or None if it is not running."""
        child = self._child
        return child.popen.pid if child is not None and child.alive else None

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self.pid is not None

    @property
    def resident(self) -> int:
        """Memory that the process takes now, in bytes; 0 while none runs."""
        pid = self.pid
        return 0 if pid is None else _resident(pid)

    @property
    def versions(self) -> Mapping[str, str]:
        """What the process runs: versions by name of library; empty until it is ready."""
        child = self._child
        return {} if child is None else dict(child.versions)

    def start(self) -> None:
        """Start the process, unless there is one, without waiting until it is ready (about a second)."""
        with self._lock:
            self._running()

    def run(self, batch: Batch, timeout: float | None = None, kind: bytes = frames.EVALUATE,
            expected: int | None = None, part: Callable[[bytes], None] | None = None) -> bytes:  # fmt: skip
        """Evaluate ``batch``; the packed outcomes, for `wire.unpack_outcomes`; of a slice of a loop, its advance.

        ``part`` is called with each part of a slice that is sent before the rest, if ``batch`` asks for them; a process
        that takes the place of another may send some of them again.
        ``timeout`` is in seconds, from when the batch is sent. Raises `TimedOut` after it and `EngineFailed` if the
        process dies or cannot start; in these cases, and when the wait is interrupted, the process is killed, and the
        next call starts another. So it is, with `TooLarge`, where the process grows far beyond the ``expected`` bytes;
        but one that had served before, and may hold what others left, is replaced first, once.
        """
        with self._lock:
            while True:
                child = self._running()
                fresh = not child.ready
                try:
                    return child.evaluate(batch, timeout, kind, expected, part)
                except BaseException as error:
                    # the pipe may hold half a message, and the circuit may go on: only a new process is clean
                    self._child = None
                    child.kill()
                    child.close()
                    if fresh or child.unwanted or not isinstance(error, (_Ended, TooLarge)):
                        raise

    def evaluate(self, programs: Sequence[Program], timeout: float | None = None, expected: int | None = None
                 ) -> list[Outcome | HybridqError]:  # fmt: skip
        """Evaluate ``programs``: an outcome or an error for each, in their order; ``expected`` is as in `run`.

        Raises what `run` raises. A program that cannot be sent is a `WorkflowError` in its place.
        """
        outcomes: list[Outcome | HybridqError | None] = [None] * len(programs)
        sendable: list[int] = []
        for i, program in enumerate(programs):
            try:
                wire.encode_template(program.template)
                sendable.append(i)
            except WorkflowError as error:
                outcomes[i] = error
        if sendable:
            packed = wire.pack([programs[i] for i in sendable])
            reply = self.run(packed, timeout, expected=expected)
            for i, outcome in zip(sendable, wire.unpack_outcomes(reply), strict=True):
                outcomes[i] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def ahead(self, program: Program) -> None:
        """Let the process begin with ``program``, if it is there and waits, before it is known whether that is wanted.

        A call of `evaluate` with an equal one alone takes what it comes to; any other call forgets it when it is done.
        So it must be short, and such that it can be evaluated in vain. An interrupt ends the process, as in `run`.
        """
        self._begin(frames.EVALUATE, lambda: wire.pack([program]))

    def advance_ahead(self, loop: Loop, seconds: float) -> None:
        """`ahead` for the first slice of ``loop``: what `advance` takes that is asked for the same with ``arrived``."""
        self._begin(frames.ADVANCE, lambda: wire.pack_loop(loop, 0, None, seconds, parts=True))

    def _begin(self, kind: bytes, pack: Callable[[], Batch]) -> None:
        if self._lock.locked():
            return
        with self._lock:  # which no interrupt leaves held, as it may one that is tried; so this may wait, very rarely
            child = self._child
            if child is None or child.owner != os.getpid() or not child.free:
                return
            try:
                batch = pack()
            except WorkflowError:  # it cannot be sent, as who asks for it is told
                return
            try:
                child.begin(kind, batch)
            except BaseException:
                self._child = None
                child.kill()
                child.close()
                raise

    def advance(self, loop: Loop, points: Sequence[Point], seconds: float, timeout: float | None = None,
                expected: int | None = None, arrived: Callable[[Advance], None] | None = None) -> Advance:  # fmt: skip
        """Go on with ``loop`` after its first points, which are ``points``, for about ``seconds``.

        ``arrived`` is given new points every few milliseconds while the process goes on; it may add them to ``points``,
        and must look at their numbers: some may come twice. What is returned has the rest.

        Raises what `run` raises, and the error of an evaluation that could not be had.
        """

        def part(message: bytes) -> None:
            assert arrived is not None
            arrived(_advance_of(message))

        parts = arrived is not None
        packed = wire.pack_loop(loop, len(points), None, seconds, parts)
        found = _advance_of(self.run(packed, timeout, frames.ADVANCE, expected=expected, part=part))
        if found.state == "lost":
            again = wire.pack_loop(loop, len(points), points, seconds, parts)
            found = _advance_of(self.run(again, timeout, frames.ADVANCE, expected=expected, part=part))
        return found

    def kill(self) -> None:
        """End the process at once, from any thread; a call that waits for it raises `EngineFailed`."""
        child = self._child
        if child is None:
            return
        child.unwanted = True
        child.kill()
        if self._lock.acquire(timeout=_MOMENT):  # else the thread that waits for a reply cleans up after itself
            try:
                if self._child is child:
                    self._child = None
                    child.close()
            finally:
                self._lock.release()

    def close(self) -> None:
        """End the process in order, once a batch in progress is done."""
        with self._lock:
            child, self._child = self._child, None
            if child is not None:
                child.close()

    def _running(self) -> _Child:
        child = self._child
        if child is not None and child.owner != os.getpid():
            child = None  # we are a fork; the process and its pipes are our parent's
        elif child is not None and not child.ready and not child.alive:
            child.close()
            child = None
        if child is None:
            child = self._child = _Child(self.max_bytes, self.name, self._eager)
        return child


def _advance_of(message: bytes) -> Advance:
    """What a slice or a part of one came to; raises the error in its place."""
    found = wire.unpack_advance(message)
    if not isinstance(found, Advance):
        raise found
    return found


class _Ended(EngineFailed):
    """The process had ended before it was asked anything."""


class _Child:
    """One life of an engine process. All but `kill` and `alive` belong to the thread that holds the lock."""

    def __init__(self, max_bytes: int, name: str, eager: bool) -> None:
        self.owner = os.getpid()
        spin = _SPIN_SECONDS if eager else 0.0
        self._spin = frames.Spin(spin)
        self._waits: deque[float] = deque([0.0], maxlen=2)
        """How long the last answers that were looked for took to come, in seconds."""
        self.versions: Mapping[str, str] = {}
        self._name = name
        self.ready = self.unwanted = False
        self._idle = 0
        """Bytes that it has resident when it is ready."""
        self._limit: int | None = None
        """Bytes that it may have resident now."""
        self._known: set[str] = set()
        self._left = b""
        """What was read beyond a frame."""
        self._begun: tuple[bytes, bytes] | None = None
        """Kind and payload of a batch that was sent, and whose answer nobody has waited for yet."""
        command = [sys.executable, "-P", "-m", "hybridq.engines", str(self.owner), str(max_bytes), str(spin)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        try:  # in a group of its own: Ctrl-C in a terminal goes to the parent alone
            self.popen = _spawner.popen(command, **pipes, bufsize=0, env=_environment(), process_group=0)
        except OSError as error:
            raise EngineFailed(f"engine process {name!r} could not be started ({error}).") from error
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self._input, self._output = self.popen.stdin.fileno(), self.popen.stdout.fileno()
        os.set_blocking(self._input, False)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(self._output, select.POLLIN)
        self._writable.register(self._input, select.POLLOUT)
        self._log = _Log(self.popen)
        self._finalizer = weakref.finalize(self, _end, self.popen, self.owner)

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def kill(self) -> None:
        """End the process now."""
        self.popen.kill()
        self.popen.wait()

    def close(self) -> None:
        """Let the process end by itself, and see that it does."""
        self._finalizer()
        self._log.thread.join()

    @property
    def free(self) -> bool:
        """Whether it could begin with something."""
        return self.ready and self._begun is None

    def begin(self, kind: bytes, batch: Batch) -> None:
        """Send ``batch``, if that can be done at once, for an `evaluate` of the same to find it begun."""
        if not self._known.issuperset(batch.templates):
            return
        message = wire.join_request({}, batch.payload)
        if frames.HEAD.size + len(message) > select.PIPE_BUF:  # it might be taken in part
            return
        self._begun = kind, batch.payload
        try:
            os.write(self._input, frames.HEAD.pack(kind, len(message)) + message)
        except (BlockingIOError, BrokenPipeError):  # who asks next learns of it
            self._begun = None

    def evaluate(self, batch: Batch, timeout: float | None, kind: bytes, expected: int | None,
                 part: Callable[[bytes], None] | None) -> bytes:  # fmt: skip
        if not self.ready:
            self._await_ready()
        begun, self._begun = self._begun, None
        if begun is not None and begun != (kind, batch.payload):
            self._forget()
            begun = None
        self._limit = None if expected is None or not self._idle else self._idle + 2 * expected + _SPARE_BYTES
        deadline = None if timeout is None else time.monotonic() + timeout
        lacking = {digest: data for digest, data in batch.templates.items() if digest not in self._known}
        while True:
            if begun is None:
                self._send(kind, wire.join_request(lacking, batch.payload), deadline, timeout)
            begun = None
            answer, message = self._receive(deadline, timeout, look=kind == frames.EVALUATE)
            while answer == frames.PART and part is not None:
                arrived = time.monotonic()
                part(message)
                if deadline is not None:  # what is done with a part is not the process' time
                    deadline += time.monotonic() - arrived
                answer, message = self._receive(deadline, timeout)
            if self._left:
                raise EngineFailed(f"engine process {self._name!r} sent more than one reply.")
            if lacking:
                self._known.update(lacking)
            if answer == frames.OUTCOMES:
                return message
            if answer != frames.MISSING:
                raise EngineFailed(f"engine process {self._name!r} answered with a frame of kind {answer!r}.")
            dropped = json.loads(message)
            self._known.difference_update(dropped)
            if not all(digest in batch.templates for digest in dropped) or lacking.keys() >= set(dropped):
                raise EngineFailed(f"the batch lacks the templates {', '.join(dropped)}; pack its programs again.")
            lacking = {digest: batch.templates[digest] for digest in dropped}

    def _forget(self) -> None:
        """Wait for the answer to what was begun, which nobody asked for; what becomes of it is nobody's failure."""
        self._limit = None
        deadline = time.monotonic() + _FORGET_SECONDS
        try:
            while self._receive(deadline, _FORGET_SECONDS)[0] == frames.PART:
                pass
        except HybridqError as error:
            raise _Ended(str(error)) from None

    def _await_ready(self) -> None:
        kind, message = self._receive(time.monotonic() + _START_SECONDS, _START_SECONDS)
        if kind != frames.READY:
            raise EngineFailed(f"engine process {self._name!r} could not start: {message.decode(errors='replace')}")
        self.versions = json.loads(message)
        self._idle = _resident(self.popen.pid)
        self.ready = True

    def _send(self, kind: bytes, message: bytes, deadline: float | None, timeout: float | None) -> None:
        view = memoryview(frames.HEAD.pack(kind, len(message)) + message)
        try:
            while view:
                try:
                    view = view[os.write(self._input, view) :]
                except BlockingIOError:
                    self._wait(self._writable, deadline, timeout)
        except BrokenPipeError:
            if len(view) == frames.HEAD.size + len(message):
                raise _Ended(str(self._died())) from None
            raise self._died() from None

    def _receive(self, deadline: float | None, timeout: float | None, look: bool = False) -> tuple[bytes, bytes]:
        """Kind and message of the next frame; where latency counts, it is looked for (`frames.Spin`)."""
        data, self._left = self._left, b""
        begun = time.perf_counter()
        if look and not data and self._spin(self._readable, min(self._waits)):
            data = self._take(_READ_BYTES)
        while len(data) < frames.HEAD.size:
            data += self._read(_READ_BYTES, deadline, timeout)
        kind, length = frames.HEAD.unpack_from(data)
        if length > frames.MAX_LENGTH:
            raise EngineFailed(f"engine process {self._name!r} sent a frame of {length} bytes.")
        whole = data[frames.HEAD.size :]
        if len(whole) < length:
            buffer = bytearray(whole)
            while len(buffer) < length:
                buffer += self._read(length - len(buffer), deadline, timeout)
            whole = bytes(buffer)
        elif len(whole) > length:
            whole, self._left = whole[:length], whole[length:]
        if look:
            self._waits.append(time.perf_counter() - begun)
        return kind, whole

    def _read(self, size: int, deadline: float | None, timeout: float | None) -> bytes:
        self._wait(self._readable, deadline, timeout)
        return self._take(size)

    def _take(self, size: int) -> bytes:
        """What is there, which is something."""
        data = os.read(self._output, min(size, _READ_BYTES))
        if not data:
            raise self._died()
        return data

    def _wait(self, poll: select.poll, deadline: float | None, timeout: float | None) -> None:
        """Wait until the pipe can be used, without the interpreter's lock and open to signals."""
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            until = left if self._limit is None else min(_LOOK_SECONDS, math.inf if left is None else left)
            if poll.poll(None if until is None else until * 1000 + 1):
                return
            if self._limit is not None and (size := _resident(self.popen.pid)) > self._limit:
                expected = format_bytes((self._limit - self._idle - _SPARE_BYTES) // 2)
                raise TooLarge(
                    f"engine process {self._name!r} had {format_bytes(size)} in memory, far more than the predicted "
                    f"{expected} on top of {format_bytes(self._idle)}, and was ended. Only what it evaluated is lost."
                )
            if left == 0.0:
                raise TimedOut(
                    f"engine process {self._name!r} took longer than {timeout:g} s and was ended; allow more time or "
                    "make the program smaller."
                )

    def _died(self) -> EngineFailed:
        """Why the process is gone."""
        try:
            code = self.popen.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return EngineFailed(f"engine process {self._name!r} closed its pipe.")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._log.thread.join(_CLOSE_SECONDS)
        words = self._log.tail.decode(errors="replace").strip()
        return EngineFailed(
            f"engine process {self._name!r} (pid {self.popen.pid}) {how} while it was needed; the next call starts "
            "another." + (f" Its last words:\n{words}" if words else "")
        )


def _resident(pid: int) -> int:
    """Bytes that a process has in memory now; 0 where that cannot be told, or the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0


class _Log:
    """Empties a process' stderr, so that it never waits for a reader, and keeps the end of it."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.tail = b""
        self.thread = threading.Thread(target=self._drain, args=(popen.stderr,), name="hybridq-engine-log", daemon=True)
        self.thread.start()

    def _drain(self, pipe: Any) -> None:
        with pipe:
            while data := os.read(pipe.fileno(), 65536):
                self.tail = (self.tail + data)[-_TAIL_BYTES:]


def _end(popen: subprocess.Popen[bytes], owner: int) -> None:
    """End a process in order if it lets us, and close its pipes. Does nothing in a fork of the owner."""
    if os.getpid() != owner:
        return
    assert popen.stdin is not None
    assert popen.stdout is not None
    popen.stdin.close()
    popen.stdout.close()  # what was begun and nobody took may not fit into it: the process does not wait for a reader
    try:
        popen.wait(_CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        popen.kill()
        popen.wait()


def _environment() -> dict[str, str]:
    """The parent's environment, with one thread for every numerical library and a way to find this package."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = "1"
    # large arrays go back to the system when they are freed: glibc else keeps and fragments up to 32 MiB at a time,
    # which comes to twenty states for a circuit that is executed shot by shot
    environment["MALLOC_MMAP_THRESHOLD_"], environment["MALLOC_TRIM_THRESHOLD_"] = str(2**20), str(2**23)
    root = str(Path(__file__).parents[2])
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    if root not in installed:  # a source tree on the parent's path is not on the child's
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), root)))
    # where functions that return backends may be; last on the child's path, so that nothing of its own is shadowed
    environment[frames.SEARCH_PATH] = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    return environment


class _Spawner:
    """Starts processes from one thread that lives as long as this process.

    The kernel ends an engine process when the *thread* that started it ends, not only when the whole parent does.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew, as in a fork of this process, which has none of its threads."""
        self._lock = threading.Lock()
        self._asked: SimpleQueue[tuple[Future[subprocess.Popen[bytes]], list[str], dict[str, Any]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def popen(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="hybridq-engine-spawner", daemon=True)
                self._thread.start()
        future: Future[subprocess.Popen[bytes]] = Future()
        self._asked.put((future, command, options))
        return future.result()

    def _serve(self) -> None:
        while True:
            future, command, options = self._asked.get()
            try:
                future.set_result(subprocess.Popen(command, **options))
            except OSError as error:
                future.set_exception(error)
            del future


_spawner = _Spawner()
os.register_at_fork(after_in_child=_spawner.reset)
