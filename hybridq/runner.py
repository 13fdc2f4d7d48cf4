"""An open run: every call is answered from the journal if it is recorded, and run, then recorded, if not.

There is one code path: a fresh run is a run whose journal is empty.
"""

from __future__ import annotations

import contextvars
import functools
import math
import operator
import os
import platform
import secrets
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from hybridq import journal as records
from hybridq.calibration import processor
from hybridq.differences import two_columns
from hybridq.dispatch import Advanced, Dispatcher, Evaluated, LoopAsk, Places, ProgramAsk, StepAsk
from hybridq.engines.costs import DEFAULT, Calibration
from hybridq.engines.loops import Advance, Loop, Point, encode_result
from hybridq.errors import (
    Diverged,
    EngineFailed,
    HybridqError,
    JournalError,
    NotFinite,
    PlacementError,
    TimedOut,
    Unhashable,
    WorkflowError,
)
from hybridq.journal import Journal, pack_array, unpack_array
from hybridq.location import Location
from hybridq.pace import Pace, pace
from hybridq.planning import (
    Cost,
    Plan,
    Trial,
    Unknown,
    Unplanned,
    completed,
    cost,
    needed,
    origin,
    trials,
    unknown_in,
)
from hybridq.problems.problem import Problem
from hybridq.program import Estimate, NumericPlan, Outcome, Program, Request, derivatives, moved, program, result
from hybridq.progress import LoopProgress, Progress
from hybridq.recorded import Earlier, LoopRecord, circuit_key, differs, index
from hybridq.resources import ROUND_TRIP, Need
from hybridq.scope import Describing, Scope, current
from hybridq.sites import Site
from hybridq.source import Source, source_of
from hybridq.steps import Raised, StepReply, capture, pack_call, rebuild, shortened
from hybridq.values import Encoded, decode, digest, encode, same_value

__all__ = ["Counts", "LoopCall", "Pending", "PlannedRun", "Run", "StepCall", "describe_call", "follows", "scalar"]

_TOLERANCE = 1e-9
_BRIEF = 5e-3
"""An evaluation that takes no longer, in seconds, may be made in vain."""
_ENVIRONMENT = ("hybridq-scheduler", "numpy", "scipy", "qiskit", "qiskit-aer", "pyscf", "dask", "distributed")


@dataclass
class Counts:
    """What a run did: calls that ran now, and calls that were answered from the record."""

    evaluations_executed: int = 0
    evaluations_replayed: int = 0
    steps_executed: int = 0
    steps_replayed: int = 0


@dataclass(frozen=True, eq=False)
class StepCall:
    """A call of a classical step."""

    name: str
    function: Callable[..., Any]
    source: Source
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    need: Need
    retries: int
    timeout: float | None


@dataclass(frozen=True, eq=False)
class First:
    """What a quantum objective asks for at a loop's start point."""

    request: Request
    program: Program


@dataclass(frozen=True, eq=False)
class LoopCall:
    """A call of ``minimize``: the optimizer is given as ``solve(objective) -> OptimizeResult``."""

    name: str
    """The objective's name."""
    source: Source
    arguments: Any
    """Everything the loop depends on, as data."""
    method: str
    describe: Callable[..., Request] | None
    """The body of a quantum objective, or None for any other function."""
    function: Callable[..., Any]
    args: tuple[Any, ...]
    has_bodies: bool
    """Whether code of the researcher's runs in the driver meanwhile: a plain objective, a callback, a constraint."""
    start: np.ndarray[Any, Any]
    """The start point, shape (n,)."""
    closed: Mapping[str, Any] | None
    """Settings of scipy as data, if the loop is a quantum function's with a method by name and no other code of the
    researcher's in it, so that it may run where its evaluations do; None for any other."""
    gradient: Callable[[], tuple[str, First | None]]
    """How gradients come with the objective's values: a numeric plan's ``gradient``; asked once, then recorded. And
    what is asked for first, where it takes that to answer."""
    solve: Callable[[Callable[..., Any], Callable[..., Any], bool], Any]
    """Called with the objective, with a wrapper for the researcher's other callables (jac, constraints), and with
    whether the objective returns (value, gradient)."""
    beside: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """The researcher's gradient and constraints, functions of a point, by the names of their scopes."""
    timeout: float | None = None
    """Seconds that its evaluations may take together."""
    each_timeout: float | None = None
    """Seconds that an evaluation of a quantum objective may take."""


class Pending:
    """A call that was submitted: ``result()`` waits for it."""

    def __init__(self, location: Location, future: Future[Any], failures: list[str]) -> None:
        self.location = location
        self._future = future
        self._failures = failures
        """Locations of recorded failures that its exception carries; filled before the future is resolved."""
        self.taken = False
        """Whether somebody asked for the value."""

    def take(self, scope: Scope) -> Any:
        """Wait for the value; a failure is noted in the scope that it is raised in."""
        self.taken = True
        try:
            return self._future.result()
        except BaseException:  # a step's own SystemExit is a failure like any other
            self.failed(scope)
            raise

    def failed(self, scope: Scope) -> None:
        """Note in ``scope`` that the call's failure is raised in it."""
        scope.failures += [f for f in self._failures if f not in scope.failures]

    @property
    def future(self) -> Future[Any]:
        """The concurrent future underneath."""
        return self._future


class _Answer(Future[Any]):
    """A future that has its exception noted before whoever waits for it wakes up."""

    def __init__(self, note: Callable[[BaseException], None]) -> None:
        super().__init__()
        self._note = note

    def set_exception(self, exception: BaseException | None) -> None:
        """Note the exception, then resolve the future with it."""
        if exception is not None:
            self._note(exception)
        super().set_exception(exception)


@dataclass(frozen=True)
class _Last:
    """An evaluation that was short, and what was asked."""

    request: Request
    program: Program

    def like(self, request: Request) -> bool:
        """Whether ``request`` is of the same objects, but for its parameters."""
        before = self.request
        return (
            request.circuit is before.circuit
            and request.observables is before.observables
            and request.shots is before.shots
            and request.precision is before.precision
            and request.backend is before.backend
            and request.grouping is before.grouping
        )


class Run:
    """A run that this process has open. Made by ``hq.run``; everything else reaches it through the scope."""

    def __init__(self, *, journal: Journal, header: records.RunHeader, site: Site, progress: Progress,
                 guarded: bool = True, calibration: Calibration = DEFAULT, fork: Path | None = None,
                 reuse: Sequence[Path] = ()) -> None:  # fmt: skip
        self.name, self.seed, self.site = header.name, header.seed, site
        self.counts = Counts()
        self.began = time.monotonic()
        self._journal = journal
        self._progress = progress
        self._recorded = index(journal.records)
        opened = _environment()
        self._earlier = Earlier(header, opened, fork, reuse) if fork or reuse else None
        for name in self._earlier.left_out if self._earlier else ():
            progress.message(f"nothing of the run {name} is reused: it has other versions or another processor")
        self._lock = threading.Lock()
        self._texts = threading.Lock()
        """Held while code or a circuit is recorded: what refers to it comes after it in the journal."""
        self.token = secrets.token_hex(6)
        """Tells this opening of the run from all others, on every worker."""
        self._sources: dict[int, tuple[Any, Source]] = {}
        self._circuits: set[tuple[str, NumericPlan]] = set()
        """Programs and plans that are known to be recorded."""
        self._last: dict[tuple[str, str], _Last] = {}
        """The last evaluation by the name of what was called, and by how gradients come with it, where the driver's
        engine may begin with the next one before it is looked at."""
        self._awake = 1
        """Threads of the run that are not waiting for others."""
        self.interrupted: KeyboardInterrupt | None = None
        """A signal that came: libraries may swallow what its handler raised, and the record knows of no interrupts, so
        that nothing may follow one."""
        self._stopped: Diverged | None = None
        """The first difference from the record; no call of the run is answered after it."""
        self.dispatcher = Dispatcher(
            run=header.name, site=site, progress=progress, guarded=guarded, calibration=calibration
        )
        self._check_header(header)
        self._tolerant = any(differs(opened, then) for then in self._recorded.environments)
        self._journal.append(opened)

    @property
    def resumed(self) -> bool:
        """Whether the journal held records of calls when the run was opened."""
        return bool(self._recorded.answers or self._recorded.loops)

    def _check_header(self, header: records.RunHeader) -> None:
        found = self._recorded.header
        if found is None:
            self._journal.append(header)
            return
        if header.forked is not None and (found.forked or {}).get("run") != header.forked["run"]:
            raise WorkflowError(
                f"the run {self.name!r} exists and was not forked from {header.forked['run']!r}; give the fork a name "
                "of its own, or run without fork."
            )
        recorded, called = (
            {"workflow": h.workflow, "arguments": self._journal.load(h.inputs).document, "seed": h.seed,
             "backend": self._journal.load(h.backend).document}
            for h in (found, header)
        )  # fmt: skip
        if any(getattr(found, part) != getattr(header, part) for part in ("arguments", "workflow", "seed", "backend")):
            raise Diverged(
                f"the run {self.name!r} was recorded with other arguments, another backend, or of another workflow:\n"
                f"{two_columns(recorded, called)}\nGive this one another name, or remove {self._journal.directory}."
            )

    def source(self, function: Any, version: str | None = None) -> Source:
        """The code of ``function`` as it was when this run first called it."""
        with self._lock:
            found = self._sources.get(id(function))
        if found is None:
            found = (function, source_of(function, version))
            with self._lock:
                self._sources[id(function)] = found
        return found[1]

    # -- scopes ------------------------------------------------------------------------------------------------------

    def go_on(self, scope: Scope) -> None:
        """Note that the workflow went on after the failures that reached ``scope``, so that a replay repeats them.

        Raises `Diverged` if the run has diverged anywhere, and `JournalError` if something could not be recorded or
        read back: a workflow that catches exceptions does not go on from that.
        """
        self.check()
        for at in scope.failures:
            if at not in self._recorded.survived:
                self._recorded.survived.add(at)
                self._journal.append(records.Survived(at))
        scope.failures.clear()

    def check(self) -> None:
        """Raise what the run has to stop for, if somebody has kept it from coming up: see `go_on` and `interrupted`."""
        stopped = self.interrupted or self._stopped or self._journal.failure
        if stopped is not None:
            raise stopped

    def enter(self, parent: Scope, location: Location, function: Callable[..., Any], args: tuple[Any, ...],
              kwargs: Mapping[str, Any]) -> Any:  # fmt: skip
        """Call a workflow body in a scope of its own, in this thread."""
        scope = Scope(self, location)
        token = current.set(scope)
        try:
            value = self.call(scope, function, args, kwargs)
            self.go_on(scope)
            return value
        except BaseException as error:
            parent.failures += scope.failures
            if isinstance(error, Exception) or scope.failures:
                _note(error, location)
            raise
        finally:
            current.reset(token)

    def call(self, scope: Scope, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a body in ``scope``, which is current, and wait for what it submitted and did not ask for.

        So nothing of a scope runs on, or is lost, when it has ended; an error nobody asked for is raised at its end.
        """
        try:
            value = function(*args, **kwargs)
        except Exception:
            wait([p.future for p in scope.submitted])
            raise
        for pending in scope.submitted:
            if not pending.taken:
                self.wait(scope, pending)
        return value

    def spawn(self, location: Location, function: Callable[..., Any], args: tuple[Any, ...],
              kwargs: Mapping[str, Any], done: Callable[[], None] = lambda: None) -> Pending:  # fmt: skip
        """Call a workflow body in a scope and thread of its own; ``done`` is called in that thread when it ended."""
        future: Future[Any] = Future()
        parent = Scope(self, location)  # only collects the failures that leave the child
        pending = Pending(location, future, parent.failures)

        def body() -> None:
            try:
                value = self.enter(parent, location, function, args, kwargs)
            except BaseException as error:  # noqa: BLE001  # raised where the future is waited for
                self._add_awake(-1)
                future.set_exception(error)
            else:
                self._add_awake(-1)
                future.set_result(value)
            finally:
                done()

        self._add_awake(1)
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(body,), name=f"hybridq-{location}", daemon=True).start()
        return pending

    def wait(self, scope: Scope, pending: Pending) -> Any:
        """The value of ``pending``, waited for in ``scope``."""
        if not pending.future.done():
            self._add_awake(-1)
            try:
                wait([pending.future])
            finally:
                self._add_awake(1)
        return pending.take(scope)

    def first_done(self, scope: Scope, pendings: Sequence[Pending]) -> Iterator[int]:
        """Indices of ``pendings`` in their order of completion, recorded and replayed."""
        remaining = dict(enumerate(pendings))
        while remaining:
            location = scope.next("as_completed")
            self.go_on(scope)

            def live() -> int:
                self._add_awake(-1)
                try:
                    wait([p.future for p in remaining.values()], return_when=FIRST_COMPLETED)
                finally:
                    self._add_awake(1)
                return next(i for i, p in remaining.items() if p.future.done())

            index = self.event(location, live, lambda recorded: recorded in remaining)
            del remaining[index]
            yield index

    def event(self, location: Location, live: Callable[[], Any], fits: Callable[[Any], bool] = lambda _: True) -> Any:
        """Something that cannot be computed again: recorded at its first occurrence, answered ever after.

        What the run that this one was forked from recorded is answered if it ``fits``.
        """
        if self._earlier is not None and self._unknown(location):
            self._answered(self._earlier.event(str(location), fits, self._journal))
        found = self._recorded.answers.get(str(location))
        self._expect(found, records.Event, location)
        if found is not None:
            return decode(self._journal.load(found.output))
        value = live()
        self._journal.append(records.Event(str(location), self._journal.store(encode(value))))
        return value

    def _unknown(self, location: Location) -> bool:
        """Whether the run has no record yet of how the call at ``location`` came out."""
        at, found = str(location), self._recorded
        return at not in found.answers and at not in found.loops and at not in found.failures

    def _answered(self, record: records.Step | records.Evaluation | records.Event | None) -> None:
        """Take a record of another run, copied into this one's, as the answer of its call."""
        if record is not None:
            self._recorded.answers[record.at] = record

    def _add_awake(self, change: int) -> None:
        with self._lock:
            self._awake += change

    def _count(self, counter: str, change: int = 1) -> None:
        with self._lock:
            setattr(self.counts, counter, getattr(self.counts, counter) + change)

    # -- classical steps ---------------------------------------------------------------------------------------------

    def step(self, location: Location, call: StepCall) -> Pending:
        """A classical step: answered from the record, or sent to the cluster."""
        what = f"{call.name}()"
        arguments = [list(call.args), dict(call.kwargs)]
        encoded = encode(arguments, f"argument of {what}")
        hashed = digest(arguments, f"argument of {what}")
        failures: list[str] = []
        future = self._answer(location, failures)
        pending = Pending(location, future, failures)
        if self._earlier is not None and self._unknown(location):
            record_code = functools.partial(self._record_code, call.name, call.source)
            self._answered(self._earlier.step(str(location), call.source.digest, hashed, self._journal, record_code))
        found = self._recorded.answers.get(str(location))
        self._expect(found, records.Step, location)
        if found is not None:
            assert isinstance(found, records.Step)
            self._check_step(location, found, call, hashed, encoded)
            self._count("steps_replayed")
            future.set_result(decode(self._journal.load(found.output)))
            return pending
        if (error := self._repeated(location)) is not None:
            self._count("steps_replayed")
            failures.append(str(location))
            future.set_exception(error)
            return pending
        packed = pack_call(call.function, call.args, dict(call.kwargs), call.source.modules, f"a call of {what}")
        inputs = self._journal.store(encoded)
        self._record_code(call.name, call.source)
        group = location.parent.name + "/" + call.name if location.parent else call.name

        def finish(reply: StepReply, attempt: int) -> Any:
            self._count("steps_executed")
            if reply.raised is not None:
                self._record_failure(location, reply.raised, reply.started, reply.seconds, reply.where, attempt)
                failures.append(str(location))
                raise rebuild(reply.raised, f"{location} on {reply.where}")
            assert reply.output is not None
            self._journal.append(records.Step(
                str(location), call.source.digest, hashed, inputs, self._journal.store(reply.output), reply.started,
                reply.seconds, reply.where, attempt, reply.bytes,
            ))  # fmt: skip
            return decode(reply.output)

        attempt = self._recorded.attempts[str(location)]  # each time the run is taken up, all retries are there again
        ask = StepAsk(
            call=packed, name=call.name, location=location, seed=self.seed, memory=call.need.bytes, finish=finish,
            retries=call.retries, timeout=call.timeout, future=future, attempt=attempt,
        )  # fmt: skip
        self._progress.started(group)
        future.add_done_callback(lambda _: self._progress.ended(group))
        self.dispatcher.submit_step(ask)
        return pending

    def _check_step(self, location: Location, found: records.Step, call: StepCall, hashed: str,
                    encoded: Encoded) -> None:  # fmt: skip
        if found.code != call.source.digest:
            raise self._diverged(location, f"the code of {call.name}", self._code_text(found.code), call.source.text)
        if found.arguments == hashed:
            return
        recorded = self._journal.load(found.inputs).document
        if self._tolerant and same_value(recorded, encoded.document, _TOLERANCE):
            return
        raise self._diverged(location, f"the arguments of {call.name}", recorded, encoded.document)

    # -- quantum evaluations -----------------------------------------------------------------------------------------

    def evaluate(self, scope: Scope, location: Location, name: str, describe: Callable[[], Request],
                 gradient: str = "none", timeout: float | None = None) -> Any:  # fmt: skip
        """A quantum evaluation, waited for: answered from the record, or run wherever it is placed.

        With a ``gradient`` the answer is the derivatives instead of the value. ``timeout`` is in seconds.
        """
        request = describe_call(name, describe)
        pending, ask = self._asked(location, name, self._program(location, request, gradient), gradient, request)
        if ask is None:
            return pending.take(scope)
        ask.timeout = timeout
        try:
            return self.dispatcher.evaluate(ask, alone=self._awake == 1)
        except BaseException:
            pending.failed(scope)
            raise

    def _program(self, location: Location, request: Request, gradient: str = "none", lone: bool = True) -> Program:
        """The program that ``request`` comes to; the driver's engine may have begun with it, if it is ``lone``.

        Where all but the parameters is what it was in the last such call, which that engine answered within moments,
        the program is sent there as it probably is, and looked at while it is evaluated. If it turns out to be another
        one, or to go elsewhere, the answer is forgotten: who asks the engine names all of a program, to the last byte.
        """
        lone = lone and self._awake == 1 and isinstance(request, Request)
        last = self._last.get((location.name, gradient)) if lone else None
        if last is not None and last.like(request) and self._unknown(location):
            guess = moved(last.program, request.theta, seed=self.seed, location=location)
            if guess is not None:
                self.dispatcher.ahead(guess)
        return program(request, seed=self.seed, location=location, gradient=gradient, site=self.site)

    def _repeatable(self, request: Request | None, asked: Program) -> _Last | None:
        """What to remember of an evaluation that is answered at hand within moments, for `_program`.

        Of one value, so that an answer that nobody takes fits into a pipe; and none that costs more than time.
        """
        single = asked.batch_shape == asked.observables_shape == () and asked.template.observables
        here = not asked.device and asked.plan.engine != "backend" and self._earlier is None
        return _Last(request, asked) if request is not None and single and here else None

    def _remember(self, location: Location, gradient: str, last: _Last | None, answer: Evaluated) -> None:
        """Keep what is `_repeatable`, if the answer was had so; else nothing is known of such calls any more."""
        if last is not None and answer.where == "driver" and answer.outcome.seconds < _BRIEF:
            self._last[location.name, gradient] = last
        else:
            self._last.pop((location.name, gradient), None)

    def begin(self, name: str, requests: Sequence[tuple[Location, Request]]) -> list[tuple[Program, Pending]]:
        """Quantum evaluations of one call, begun together; their values are taken later.

        All are checked before one begins. They run at hand, before this returns, if nothing else could run beside them
        that is worth the trip to the cluster; else they are queued.
        """
        asked = []
        for location, request in requests:
            try:
                made = self._program(location, request, lone=len(requests) == 1)
            except HybridqError as error:
                _note(error, location)
                raise
            asked.append((location, made, request))
        begun = [(made, *self._asked(location, name, made, request=request)) for location, made, request in asked]
        asks = [ask for _, _, ask in begun if ask is not None]
        short = len(asks) == 1 or sum(self.dispatcher.need(ask.program).seconds for ask in asks) < ROUND_TRIP
        for ask in asks:
            self.dispatcher.start(ask, alone=short and self._awake == 1)
            if ask.future.done() and not isinstance(ask.future.exception(), Exception | None):
                ask.future.result()  # Ctrl-C leaves now, not when the value is taken
        return [(made, pending) for made, pending, _ in begun]

    def submit_evaluation(self, location: Location, name: str, describe: Callable[[], Request],
                          timeout: float | None = None) -> Pending:  # fmt: skip
        """A quantum evaluation, queued."""
        asked = program(describe_call(name, describe), seed=self.seed, location=location, site=self.site)
        pending, ask = self._asked(location, name, asked)
        if ask is not None:
            ask.timeout = timeout
            self.dispatcher.submit(ask)
        return pending

    def _asked(self, location: Location, name: str, asked: Program, gradient: str = "none",
               request: Request | None = None) -> tuple[Pending, ProgramAsk | None]:  # fmt: skip
        """A program's answer from the record, or what to ask of the dispatcher for it."""
        theta = encode(asked.theta.reshape(*asked.batch_shape, -1))
        failures: list[str] = []
        future = self._answer(location, failures)
        pending = Pending(location, future, failures)
        self._take(location, asked, theta)
        found = self._recorded.answers.get(str(location))
        self._expect(found, records.Evaluation, location)
        if found is not None:
            assert isinstance(found, records.Evaluation)
            self._check_evaluation(location, found, asked, theta)
            self._count("evaluations_replayed")
            future.set_result(decode(self._journal.load(found.output)))
            return pending, None
        if (error := self._repeated(location)) is not None:
            failures.append(str(location))
            future.set_exception(error)
            return pending, None
        self._record_circuit(asked)
        stored = self._journal.store(theta)
        repeatable = self._repeatable(request, asked)

        def finish(answer: Evaluated) -> Any:
            value = (result if gradient == "none" else derivatives)(asked, answer.outcome)
            output = encode(value)
            self._count("evaluations_executed")
            self._journal.append(records.Evaluation(
                str(location), asked.template.digest, stored, asked.shots, self._journal.store(output), answer.started,
                answer.outcome.seconds, answer.where, answer.attempt, answer.outcome.peak_bytes,
            ))  # fmt: skip
            self._keep(asked)
            self._remember(location, gradient, repeatable, answer)
            # a number with its error comes back from the record as it is
            return value if isinstance(value, Estimate) and type(value.value) is float else decode(output)

        attempt = self._recorded.attempts[str(location)]
        return pending, ProgramAsk(
            program=asked, name=name, location=location, finish=finish, future=future, attempt=attempt
        )

    def _take(self, location: Location, asked: Program, theta: Encoded) -> None:
        """Let an equal evaluation of another run answer, if those may."""
        if self._earlier is None or not self._unknown(location):
            return
        stored, plan = self._journal.store(theta), encode(asked.plan).document
        self._answered(self._earlier.evaluation(
            str(location), asked.template.digest, plan, asked.shots, stored, self._journal,
            functools.partial(self._record_circuit, asked),
        ))  # fmt: skip

    def _check_evaluation(self, location: Location, found: records.Evaluation, asked: Program, theta: Encoded) -> None:
        if (found.program, found.shots) == (asked.template.digest, asked.shots):
            recorded = self._journal.load(found.theta)
            if recorded == theta or (self._tolerant and same_value(recorded.document, theta.document, _TOLERANCE)):
                return
            raise self._diverged(location, "the parameters", decode(recorded).tolist(), decode(theta).tolist())
        raise self._diverged(
            location,
            "the program",
            {"program": found.program, "shots": found.shots},
            {"program": asked.template.digest, "shots": asked.shots},
        )

    # -- loops -------------------------------------------------------------------------------------------------------

    def loop(self, scope: Scope, location: Location, call: LoopCall) -> Any:
        """An optimizer loop: a finished one returns its result, an unfinished one runs against its recorded rows.

        A finished one with bodies of the researcher's in it (a plain objective, a callback) runs against its rows too:
        bodies always run again, so that what they keep outside (a history) is there again.
        """
        looked = self._loop_ahead(location, call)
        arguments = encode(call.arguments, f"argument of minimize({call.name})")
        hashed = digest(call.arguments, f"argument of minimize({call.name})")
        group = location.parent.name + "/" + call.name if location.parent else call.name
        entry = self._recorded.loops.get(str(location))
        if entry is None:
            self._expect(self._recorded.answers.get(str(location)), records.Loop, location)
            self._record_code(call.name, call.source)
            header = records.Loop(
                str(location), call.name, call.source.digest, hashed, self._journal.store(arguments), call.method,
                call.gradient()[0] if looked is None else looked.gradient,
            )  # fmt: skip
            if self._earlier is not None and not call.has_bodies and call.describe is not None:
                with self._texts:
                    entry = self._earlier.loop(header, self._recorded.known, self._journal)
            if entry is not None and entry.end is not None:
                self._count_replayed(location, call, len(entry.rows))
                return decode(self._journal.load(entry.end.output))
            entry = entry or LoopRecord(self._journal.append(header), header)
        else:
            self._check_loop(location, entry.header, call, hashed, arguments)
            if entry.end is not None and not call.has_bodies:
                self._count_replayed(location, call, len(entry.rows))
                return decode(self._journal.load(entry.end.output))
        if (error := self._repeated(location)) is not None:
            scope.failures.append(str(location))
            _note(error, location)
            raise error
        begun = time.perf_counter()
        value, unit = _goal(call.args)
        bound = _pace_of(call, entry.header.gradient).bound
        shown = self._progress.loop(group, limit=bound, reference=value, unit=unit)
        try:
            shipment = self._shipment_of(location, call, entry, looked)
            output = None if shipment is None else _Shipped(self, location, call, entry, shown).run(shipment)
            if output is not None:
                return self._end_loop(entry, output, begun)
            counter = Scope(self, location)
            shown.again()
            objective = _Objective(self, counter, call, entry, shown)
            found = call.solve(objective, _Inner(self, scope, counter), entry.header.gradient != "none")
            if objective.refused is not None:  # a method of the researcher's may have caught it
                raise objective.refused
        except (WorkflowError, JournalError):
            raise  # a replay meets it again by itself
        except Exception as raised:
            self._record_failure(location, capture(raised), time.time(), time.perf_counter() - begun, "driver", 0)
            scope.failures.append(str(location))
            _note(raised, location)
            raise
        finally:
            shown.ended()
        if entry.end is not None:
            return decode(self._journal.load(entry.end.output))
        return self._end_loop(entry, _encode_result(found, location), begun)

    def _loop_ahead(self, location: Location, call: LoopCall) -> _Looked | None:
        """What a new closed loop comes to; None for any other, and where more than this goes on.

        The driver's engine may have begun with it, as with a program in `_program`, while the loop is recorded.
        """
        if call.closed is None or self._awake != 1 or self._earlier is not None or not self._unknown(location):
            return None
        gradient, first = call.gradient()
        try:
            shipment = self._shipment(location, call, first or self._first(location, call, gradient))
        except Exception as error:  # noqa: BLE001  # raised, and recorded, when the loop begins
            self.check()
            return _Looked(gradient, None, error)
        if shipment is not None:
            self.dispatcher.advance_ahead(shipment.loop, _FIRST_SLICE)
        return _Looked(gradient, shipment)

    def _shipment_of(self, location: Location, call: LoopCall, entry: LoopRecord, looked: _Looked | None
                     ) -> _Shipment | None:  # fmt: skip
        """A loop as it may go elsewhere; None if it is to stay here."""
        if call.closed is None:
            return None
        if looked is None:
            return self._shipment(location, call, self._first(location, call, entry.header.gradient))
        if looked.refused is not None:
            raise looked.refused
        return looked.shipment

    def _first(self, location: Location, call: LoopCall, gradient: str) -> First:
        assert call.describe is not None
        request = describe_call(call.name, functools.partial(call.describe, call.start.copy(), *call.args))
        at = location.child(call.name, 0)
        return First(request, program(request, seed=self.seed, location=at, gradient=gradient, site=self.site))

    def _shipment(self, location: Location, call: LoopCall, first: First) -> _Shipment | None:
        """A closed loop as it may go elsewhere; None if it is to stay here."""
        assert call.closed is not None
        asked = first.program
        if not follows(asked, call.start) or self.dispatcher.need(asked).seconds > _LONGEST_SHIPPED:
            return None
        method = None if call.method == "default" else call.method
        loop = Loop(f"{self.token}/{location}", asked, f"{location}/{call.name}", self.seed, method, call.closed)
        return _Shipment(first.request, loop)

    def _end_loop(self, entry: LoopRecord, output: Encoded, begun: float) -> Any:
        self._journal.append(records.LoopEnd(entry.line, self._journal.store(output), time.perf_counter() - begun))
        return decode(output)

    def _check_loop(self, location: Location, found: records.Loop, call: LoopCall, hashed: str,
                    arguments: Encoded) -> None:  # fmt: skip
        if found.code != call.source.digest:
            raise self._diverged(location, f"the code of {call.name}", self._code_text(found.code), call.source.text)
        if (found.arguments, found.method) == (hashed, call.method):
            return
        recorded = self._journal.load(found.inputs).document
        if self._tolerant and found.method == call.method and same_value(recorded, arguments.document, _TOLERANCE):
            return
        raise self._diverged(location, "the loop's settings", recorded, arguments.document)

    def _count_replayed(self, location: Location, call: LoopCall, rows: int) -> None:
        if call.describe is not None:
            self._count("evaluations_replayed", rows)
        self._count("evaluations_replayed", self._recorded.within[str(location), "eval"])
        self._count("steps_replayed", self._recorded.within[str(location), "step"])

    # -- records -----------------------------------------------------------------------------------------------------

    def end(self, status: str, value: Any = None, error: BaseException | None = None) -> None:
        """Write how this driver left the run."""
        output = None
        if status == "finished":
            try:
                output = self._journal.store(encode(value, "the workflow's return value"))
            except Unhashable as refused:
                self._progress.message(f"the return value is not kept in the record: {refused}")
        text = None if error is None else shortened("".join(traceback.format_exception_only(error)).strip())
        self._journal.append(records.End(status, output, text, time.monotonic() - self.began, time.time()))

    def _record_code(self, name: str, source: Source) -> None:
        with self._texts:
            if source.digest not in self._recorded.known:
                self._journal.append(records.Code(name, source.digest, self._journal.store(Encoded(source.text))))
                self._recorded.known.add(source.digest)

    def _code_text(self, code: str) -> str:
        for _, record in self._journal.records:
            if isinstance(record, records.Code) and record.code == code:
                return str(self._journal.load(record.text).document)
        return f"(code {code})"

    def _record_circuit(self, asked: Program) -> None:
        template = asked.template
        if (template.digest, asked.plan) in self._circuits:
            return
        plan = encode(asked.plan).document
        key = circuit_key(template.digest, plan)
        with self._texts:
            if key not in self._recorded.known:
                circuit = self._journal.store(encode(template.circuit))
                observables = self._journal.store(encode(list(template.observables)))
                self._journal.append(records.Circuit(
                    template.digest, circuit, observables, plan, template.num_qubits, template.num_gates,
                    template.num_paulis, self._journal.store(encode(template.backend)),
                    _predicted(asked, self.dispatcher.need),
                ))  # fmt: skip
                self._recorded.known.add(key)
            self._circuits.add((template.digest, asked.plan))

    def _keep(self, asked: Program) -> None:
        """Wait until what was recorded survives a power loss, if a device that cannot repeat it gave it."""
        if asked.plan.sampling == "backend":
            self._journal.sync()

    def _record_failure(self, location: Location, raised: Raised, started: float, seconds: float, where: str,
                        attempt: int) -> None:  # fmt: skip
        arguments = None if raised.arguments is None else self._journal.store(Encoded(raised.arguments))
        self._journal.append(records.Failure(
            str(location), raised.type, raised.message, arguments, raised.traceback, started, seconds, where, attempt,
        ))  # fmt: skip

    def _answer(self, location: Location, failures: list[str]) -> Future[Any]:
        """A future for a call's value; an error of the infrastructure is recorded before anyone learns of it.

        A step's own exceptions are in ``failures`` by then: they are recorded with their reply.
        """
        started, clock = time.time(), time.perf_counter()

        def note(error: BaseException) -> None:
            if isinstance(error, HybridqError) and not isinstance(error, JournalError) and not failures:
                failures.append(str(location))
                attempt = self._recorded.attempts[str(location)]
                self._record_failure(location, capture(error), started, time.perf_counter() - clock, "", attempt)
            if isinstance(error, Exception) or failures:
                _note(error, location)

        return _Answer(note)

    def _repeated(self, location: Location) -> BaseException | None:
        """The recorded failure of a call after which the workflow went on."""
        failure = self._recorded.failures.get(str(location))
        if failure is None or failure.at not in self._recorded.survived:
            return None
        arguments = self._journal.load(failure.arguments).document
        raised = Raised(failure.type, failure.message, arguments, failure.traceback)
        return rebuild(raised, f"{location} on {failure.where}" if failure.where else str(location))

    def _expect(self, found: Any, kind: type[Any], location: Location) -> None:
        if str(location) in self._recorded.loops and kind is not records.Loop:
            found = self._recorded.loops[str(location)].header
        if found is not None and not isinstance(found, kind):
            raise self._diverged(location, "the kind of call", type(found).__name__, kind.__name__)

    def _diverged(self, location: Location, what: str, recorded: Any, called: Any) -> Diverged:
        error = Diverged(
            f"{location}: {what} differ from the record.\n{two_columns(recorded, called)}\nThe run was stopped before "
            f"anything was mixed; its record is untouched. Undo the change to go on with the run {self.name!r}, or "
            f"give the changed workflow another name: with fork={self.name!r} (--fork {self.name}) that one keeps "
            "what did not change."
        )
        self._stopped = self._stopped or error
        return error


class PlannedRun(Run):
    """A run that is planned: what is recorded is answered, steps run, and what is quantum is priced, not evaluated.

    What a priced call gives is an `Unknown`; a body that needs its value ends there, and its own value is unknown. That
    evaluations succeed is taken for granted. Nothing is recorded but steps, and what they may depend on.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.plan = Plan()
        self._known_places: Places | None = None

    def report(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        return {
            "name": self.name, "directory": str(self._journal.directory), "answered": {
                "evaluations": self.counts.evaluations_replayed, "steps": self.counts.steps_replayed,
            }, **self.plan.document(self._where),
        }  # fmt: skip

    # -- scopes ------------------------------------------------------------------------------------------------------

    def enter(self, parent: Scope, location: Location, function: Callable[..., Any], args: tuple[Any, ...],
              kwargs: Mapping[str, Any]) -> Any:  # fmt: skip
        """As of any run; the value of a body that needs what is not known is not known either."""
        try:
            return super().enter(parent, location, function, args, kwargs)
        except Unplanned as stop:
            self.plan.gap(_shown(location), stop.at, f"what follows {stop.what} depends on the value of")
            return Unknown(_shown(location))

    def call(self, scope: Scope, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """As of any run, also where the body ends for want of a value."""
        try:
            return super().call(scope, function, args, kwargs)
        except Unplanned:
            wait([p.future for p in scope.submitted])
            raise

    def spawn(self, location: Location, function: Callable[..., Any], args: tuple[Any, ...],
              kwargs: Mapping[str, Any], done: Callable[[], None] = lambda: None) -> Pending:  # fmt: skip
        """As of any run."""
        self.plan.spawned(_shown(location))
        return super().spawn(location, function, args, kwargs, done)

    def first_done(self, scope: Scope, pendings: Sequence[Pending]) -> Iterator[int]:
        """As of any run; which of several comes first is not known if a value of theirs is not."""
        if trials.get() is not None:
            yield from range(len(pendings))
            return
        recorded = super().first_done(scope, pendings)
        for _ in pendings:
            following = scope.location.child("as_completed", scope.counts.get("as_completed", 0))
            if str(following) not in self._recorded.answers:
                wait([p.future for p in pendings])
                for pending in pendings:
                    value = None if pending.future.exception() is not None else pending.future.result()
                    if (missing := unknown_in(value)) is not None:
                        raise Unplanned(origin(missing), "hq.as_completed")
            yield next(recorded)

    def event(self, location: Location, live: Callable[[], Any], fits: Callable[[Any], bool] = lambda _: True) -> Any:
        """As of any run, but nothing of a trial is recorded."""
        return live() if trials.get() is not None else super().event(location, live, fits)

    # -- calls -------------------------------------------------------------------------------------------------------

    def step(self, location: Location, call: StepCall) -> Pending:
        """A classical step runs, and is recorded, unless an argument is not known."""
        trial, missing = _in_trial(), unknown_in((call.args, call.kwargs))
        if trial is not None:
            self.plan.step(_shown(location), "in a loop", trial.loop)
        elif missing is not None:
            self.plan.step(str(location), "waits", needed((call.args, call.kwargs)))
        if trial is not None or missing is not None:
            return _settled(location, Unknown(_shown(location)))
        known = str(location) in self._recorded.answers or self._repeated(location) is not None
        self.plan.step(str(location), "answered" if known else "ran")
        pending = super().step(location, call)

        def note(future: Future[Any]) -> None:
            if isinstance(error := future.exception(), PlacementError):
                self.plan.refused(str(location), error, call.need.bytes, self._places().largest)

        pending.future.add_done_callback(note)
        return pending

    def evaluate(self, scope: Scope, location: Location, name: str, describe: Callable[[], Request],
                 gradient: str = "none", timeout: float | None = None) -> Any:  # fmt: skip
        """Answered from the record, or priced."""
        return self._described(location, name, describe, gradient).take(scope)

    def submit_evaluation(self, location: Location, name: str, describe: Callable[[], Request],
                          timeout: float | None = None) -> Pending:  # fmt: skip
        """Answered from the record, or priced."""
        return self._described(location, name, describe, submitted=True)

    def begin(self, name: str, requests: Sequence[tuple[Location, Request]]) -> list[tuple[Program, Pending]]:
        """Answered from the record, or priced."""
        made = [(at, program(request, seed=self.seed, location=at, site=self.site)) for at, request in requests]
        return [(asked, self._answered_or_priced(at, name, asked)) for at, asked in made]

    def _described(self, location: Location, name: str, describe: Callable[[], Request], gradient: str = "none",
                   submitted: bool = False) -> Pending:  # fmt: skip
        try:
            request, missing = completed(describe_call(name, describe))
        except Unplanned as stop:
            request, missing = None, stop.at
        if request is None:
            self.plan.gap(_shown(location), str(missing), "not priced: what it evaluates depends on the value of")
            return _settled(location, Unknown(_shown(location)))
        asked = program(request, seed=self.seed, location=location, gradient=gradient, site=self.site)
        return self._answered_or_priced(location, name, asked, gradient, submitted, known=missing is None)

    def _answered_or_priced(self, location: Location, name: str, asked: Program, gradient: str = "none",
                            submitted: bool = False, known: bool = True) -> Pending:  # fmt: skip
        trial, at = _in_trial(), str(location)
        if trial is None and known:
            self._expect(self._recorded.answers.get(at), records.Evaluation, location)
            if self._earlier is not None:
                self._take(location, asked, encode(asked.theta.reshape(*asked.batch_shape, -1)))
            if at in self._recorded.answers or self._repeated(location) is not None:
                return self._asked(location, name, asked, gradient)[0]
        try:
            self._price(location, asked, None if trial is None else trial.loop, submitted)
        except HybridqError as error:  # as the run would raise it, but not recorded
            _note(error, location)
            return _settled(location, None, error)
        return _settled(location, Unknown(_shown(location)) if trial is None else _zeros(asked, gradient))

    def _price(self, location: Location, asked: Program, loop: str | None, submitted: bool = False,
               shown: str | None = None) -> None:  # fmt: skip
        """Put a program into the plan. Raises what a run would raise, before it evaluates anything."""
        try:
            found = cost(asked, self.dispatcher.need(asked))
            self._where(found, not submitted, str(location))
        except PlacementError as error:
            self.plan.refused(_shown(location), error, found.bytes, self._places().largest)
            raise
        except HybridqError as error:
            self.plan.refused(_shown(location), error)
            raise
        self.plan.call(shown or _shown(location), found, loop=loop, submitted=submitted)

    def _places(self) -> Places:
        """What there is to run on; a cluster of one's own is not started for it."""
        if self._known_places is None:
            self._known_places = self.dispatcher.places()
        return self._known_places

    def _where(self, priced: Cost, alone: bool, what: str = "the program") -> str:
        return self._places().placed(
            priced.need, alone=alone, what=what, device=priced.device, backend=priced.backend,
            divisible=priced.divisible,
        )  # fmt: skip

    # -- loops -------------------------------------------------------------------------------------------------------

    def loop(self, scope: Scope, location: Location, call: LoopCall) -> Any:
        """A finished loop returns its result; of any other, one evaluation is priced, and its limit noted."""
        trial = _in_trial()
        entry = self._recorded.loops.get(str(location)) if trial is None else None
        if entry is not None:
            if entry.end is not None or self._repeated(location) is not None:
                return super().loop(scope, location, call)
            what = f"argument of minimize({call.name})"
            self._check_loop(location, entry.header, call, digest(call.arguments, what), encode(call.arguments, what))
        elif trial is None:
            self._expect(self._recorded.answers.get(str(location)), records.Loop, location)
        at = _shown(location)
        try:
            gradient = call.gradient()[0] if entry is None else entry.header.gradient
        except Unplanned:  # its objective evaluates something else than the point
            gradient = "none"
        known = [key for key in ("callback", "hess", "hessp") if isinstance(call.arguments.get(key), dict)]
        self.plan.loop(
            at, _pace_of(call, gradient), done=len(entry.rows) if entry else 0,
            within=None if trial is None else trial.loop, not_priced=known,
        )  # fmt: skip
        if call.describe is None:
            self._try(scope, location, call.name, call.function, (call.start.copy(), *call.args))
        else:
            self._price_objective(location, call, gradient)
        for name, function in call.beside.items():
            self._try(scope, location, name, function, (call.start.copy(),))
        return Unknown(at) if trial is None else _result_at(call.start)

    def _price_objective(self, location: Location, call: LoopCall, gradient: str) -> None:
        assert call.describe is not None
        at = f"{_shown(location)}/{call.name}"
        describe = functools.partial(call.describe, call.start.copy(), *call.args)
        try:
            request, missing = completed(describe_call(call.name, describe))
        except Unplanned as stop:
            request, missing = None, stop.at
        if request is None:
            self.plan.gap(at, str(missing), "not priced: what it evaluates depends on the value of")
            return
        first = location.child(call.name, 0)
        asked = program(request, seed=self.seed, location=first, gradient=gradient, site=self.site)
        self._price(first, asked, _shown(location), shown=at)

    def _try(self, scope: Scope, location: Location, name: str, function: Callable[..., Any], args: tuple[Any, ...]
             ) -> None:  # fmt: skip
        """Price one call of a loop's body: it runs with zeros in place of values, and nothing is recorded of it."""
        first, loop = location.child(name, 0), _shown(location)
        token = trials.set(Trial(loop, str(first), f"{loop}/{name}"))
        try:
            self.enter(scope, first, function, args, {})
        except (WorkflowError, PlacementError):
            raise
        except Exception as error:  # noqa: BLE001  # of zeros, perhaps: what was called before counts
            kind = type(error).__name__
            self.plan.gap(_shown(first), loop, f"its body raised {kind} ({error}) with zeros in place of values, in")
        finally:
            trials.reset(token)


_LONGEST_TRIAL = 10_000
"""Calls of a trial at most: with zeros in place of values a loop of the researcher's may never end."""


def _in_trial() -> Trial | None:
    """The trial that the caller is part of, which counts its call."""
    trial = trials.get()
    if trial is not None:
        trial.calls += 1
        if trial.calls > _LONGEST_TRIAL:
            raise Unplanned(trial.loop, f"a body that makes more than {_LONGEST_TRIAL:,} calls")
    return trial


def _shown(location: Location) -> str:
    """A location as the plan shows it: what is in a loop's evaluations has no number of theirs."""
    trial, at = trials.get(), str(location)
    if trial is None or not at.startswith(trial.inside):
        return at
    return trial.shown + at[len(trial.inside) :]


def _settled(location: Location, value: Any, error: Exception | None = None) -> Pending:
    future: Future[Any] = Future()
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
    return Pending(location, future, [])


def _zeros(asked: Program, gradient: str) -> Any:
    """What stands in for a program's value in a trial, of its type and shape."""
    shape = (asked.rows, len(asked.template.observables))
    bits = None
    if not asked.template.observables:
        width = asked.template.circuit.num_clbits or asked.template.num_qubits
        bits = np.zeros((asked.rows, asked.shots or 0, -(-width // 8)), dtype=np.uint8)
    slopes = np.zeros((*shape, asked.template.num_parameters))
    outcome = Outcome(np.zeros(shape), np.zeros(shape), bits, 0.0, 0, slopes)
    return (result if gradient == "none" else derivatives)(asked, outcome)


def _result_at(start: np.ndarray[Any, Any]) -> Any:
    """What stands in for an optimizer's result in a trial."""
    from scipy.optimize import OptimizeResult

    return OptimizeResult(x=start.copy(), fun=0.0, nfev=0, nit=0, success=True, status=0, message="priced")


def _goal(args: Sequence[Any]) -> tuple[float | None, str]:
    """What a loop's value should be, in which unit, if one problem is among its arguments."""
    problems = [arg for arg in args if isinstance(arg, Problem)]
    return (problems[0].reference, problems[0].unit) if len(problems) == 1 else (None, "")


def _pace_of(call: LoopCall, gradient: str) -> Pace:
    settings = call.arguments
    options, jac, method = settings.get("options"), settings.get("jac"), settings.get("method")
    by_name = method is None or isinstance(method, str)
    return pace(
        call.method if by_name else f"{call.method}()", len(call.start),
        gradient=gradient != "none" or isinstance(jac, Mapping),
        options=options if isinstance(options, Mapping) else None, jac=jac,
        constrained=settings.get("constraints") not in ((), [], None), bounded=settings.get("bounds") is not None,
    )  # fmt: skip


class _Objective:
    """What the optimizer calls: answers recorded rows, then evaluates and records."""

    def __init__(self, run: Run, counter: Scope, call: LoopCall, entry: LoopRecord, shown: LoopProgress) -> None:
        self._run, self._counter, self._call, self._shown = run, counter, call, shown
        self._line, self._rows, self._counted = entry.line, entry.rows, entry.counted
        self._gradient = entry.header.gradient
        self._program = ""
        self._i = 0
        self._outer = current.get()
        self._spent = sum(row.seconds for row in self._rows)
        self.refused: NotFinite | TimedOut | WorkflowError | None = None
        """The first value or point that was no finite real number, or the end of the loop's time: no result of the loop
        counts after it."""

    def __call__(self, x: Any, *_: Any) -> Any:
        try:
            return self._answer(x)
        except (NotFinite, TimedOut, WorkflowError) as error:
            self.refused = self.refused or error
            raise

    def _answer(self, x: Any) -> Any:
        i, self._i = self._i, self._i + 1
        point = np.array(x, dtype=np.float64)
        if not np.isfinite(point).all():
            raise NotFinite(f"{self._counter.location}: the optimizer asked for evaluation {i} at {point.tolist()}.")
        self._run.check()
        at = self._counter.next(self._call.name)
        recorded = i < len(self._rows)
        row = self._recorded(i, point, at) if recorded else self._live(i, point, at)
        self._shown.evaluated(row.value, recorded=recorded)
        return row.value if row.g is None else (row.value, unpack_array(row.g))

    def _recorded(self, i: int, point: np.ndarray[Any, Any], at: Location) -> records.Row:
        run, row = self._run, self._rows[i]
        x = unpack_array(row.x)
        same = x.tobytes() == point.tobytes()
        if not same and not (run._tolerant and x.shape == point.shape and np.allclose(x, point, 0, _TOLERANCE)):
            raise run._diverged(at, "the optimizer's points", x.tolist(), point.tolist())
        if self._call.describe is not None:
            if i >= self._counted:
                run._count("evaluations_replayed")
            return row
        again = scalar(self._body(point, at), at, point)
        if again != row.value and not (run._tolerant and math.isclose(again, row.value, abs_tol=_TOLERANCE)):
            raise run._diverged(at, "the objective's values", row.value, again)
        return row

    def _body(self, point: np.ndarray[Any, Any], at: Location) -> Any:
        """Call a plain objective in a scope of its own; the optimizer's own arrays are out of its reach."""
        assert isinstance(self._outer, Scope)
        return self._run.enter(self._outer, at, self._call.function, (point.copy(), *self._call.args), {})

    def _live(self, i: int, point: np.ndarray[Any, Any], at: Location) -> records.Row:
        run, call = self._run, self._call
        left = _time_left(call, self._counter.location, self._spent, i)
        started, begun = time.time(), time.perf_counter()
        gradient = asked = None
        if call.describe is None:
            estimate = self._body(point, at)
            where = ""  # its evaluations have records of their own
        else:
            describe = functools.partial(call.describe, point.copy(), *call.args)
            request = describe_call(call.name, describe)
            asked = run._program(at, request, self._gradient)
            if self._gradient != "none" and not follows(asked, point):
                raise WorkflowError(
                    f"{at} evaluates other parameters than the optimizer's point, so its gradient is not by the "
                    "point; give jac=None for finite differences, or pass the point on as it is."
                )
            run._record_circuit(asked)
            answered: list[Evaluated] = []

            def finish(answer: Evaluated) -> Any:
                answered.append(answer)
                run._count("evaluations_executed")
                return result(asked, answer.outcome)

            ask = ProgramAsk(
                program=asked, name=call.name, location=at, finish=finish, timeout=_least(left, call.each_timeout)
            )
            estimate = run.dispatcher.evaluate(ask, alone=run._awake == 1)
            where = answered[0].where
            found = answered[0].outcome.gradients
            gradient = None if found is None else pack_array(found[0, 0])
            run._remember(at, self._gradient, run._repeatable(request, asked), answered[0])
        seconds = time.perf_counter() - begun
        if asked is not None:  # without what it waited for
            started, seconds = answered[0].started, answered[0].outcome.seconds
        value = scalar(estimate, at, point)
        measured = isinstance(estimate, Estimate)
        row = records.Row(
            self._line, i, pack_array(point), value, gradient, float(estimate.stderr) if measured else 0.0,
            estimate.shots if measured else None, seconds, where, self._named(asked), started,
        )  # fmt: skip
        run._journal.append(row)
        self._spent += row.seconds
        if asked is not None:
            run._keep(asked)
        return row

    def _named(self, asked: Program | None) -> str:
        """What a row says that it evaluated: nothing where that is what the row before evaluated."""
        before, self._program = self._program, "" if asked is None else asked.template.digest
        return "" if self._program == before else self._program


@dataclass(frozen=True, eq=False)
class _Shipment:
    """A closed loop as it may go elsewhere."""

    request: Request
    """What its quantum function describes at the start point."""
    loop: Loop


@dataclass(frozen=True, eq=False)
class _Looked:
    """What a closed loop was found to be before it was recorded."""

    gradient: str
    """How gradients come with its values."""
    shipment: _Shipment | None
    """None if it is to stay here."""
    refused: Exception | None = None
    """What was raised by the look itself."""


class _Shipped:
    """A closed loop that runs where its evaluations do, in slices; every point is checked and recorded here.

    The points that the optimizer reaches there are those it would reach here: same programs, same arithmetic.
    """

    def __init__(self, run: Run, location: Location, call: LoopCall, entry: LoopRecord, shown: LoopProgress) -> None:
        self._run, self._call, self._entry, self._shown = run, call, entry, shown
        self._counter = Scope(run, location)
        self._points = [_point(row) for row in entry.rows]
        """All that are recorded."""
        self._refused: BaseException | None = None
        """Why no more of them are, if anything failed here."""
        self._closed = True
        """Whether each point so far was what the quantum function, asked here, describes."""

    def run(self, shipment: _Shipment) -> Encoded | None:
        """The loop's result; None if it is to run here, from its recorded points on."""
        run, call, rows = self._run, self._call, self._entry.rows
        request, loop = shipment.request, shipment.loop
        first = loop.program
        run._record_circuit(first)
        points = self._points
        for row in rows:
            self._shown.evaluated(row.value, recorded=True)
        run._count("evaluations_replayed", len(rows))
        self._entry.counted = len(rows)
        seconds, address = _FIRST_SLICE, None
        spent = sum(point.seconds for point in points)
        while True:
            run.check()
            left = _least(_time_left(call, self._counter.location, spent, len(points)), call.each_timeout)
            known = len(points)
            ask = LoopAsk(
                loop=loop, name=call.name, location=self._counter.location, points=points, seconds=seconds,
                address=address, timeout=None if left is None else seconds + left,
                arrived=functools.partial(self._take, request, first, where="driver"),
            )  # fmt: skip
            run.dispatcher.advance(ask, alone=run._awake == 1)
            advanced: Advanced = ask.future.result()
            advance, address = advanced.advance, advanced.address
            self._take(request, first, advance, where=advanced.where)
            if self._refused is not None:
                raise self._refused
            if not self._closed:
                return None
            spent += sum(point.seconds for point in points[known:])
            if advance.state != "more":
                break
            seconds = _LONGEST_SLICE
        if advance.result is None:
            return None
        for name in advance.left_out:
            _warn_left_out(self._counter.location, name)
        return advance.result

    def _describe(self, x: np.ndarray[Any, Any]) -> Request:
        assert self._call.describe is not None
        return describe_call(self._call.name, functools.partial(self._call.describe, x.copy(), *self._call.args))

    def _program(self, request: Request, i: int) -> Program:
        return program(
            request, seed=self._run.seed, location=self._counter.location.child(self._call.name, i),
            gradient=self._entry.header.gradient, site=self._run.site,
        )  # fmt: skip

    def _take(self, request: Request, first: Program, advance: Advance, where: str) -> None:
        """Record the points of a slice, or of a part of it, that are not recorded yet."""
        known = len(self._points)
        if advance.first > known:
            raise EngineFailed(f"points {known} to {advance.first - 1} of {self._counter.location} never arrived.")
        new = advance.points[known - advance.first :]  # a process that replaced another sends some again
        if self._refused is None and self._closed:
            try:  # what fails here ends the loop after the slice, not the process that is at it
                self._closed = self._record(request, first, new, known, where)
            except Exception as error:  # noqa: BLE001  # raised by `run`
                self._refused = error
        self._points += new

    def _record(self, request: Request, first: Program, points: Sequence[Point], known: int, where: str) -> bool:
        """Record ``points`` that the quantum function, asked here, describes; False from the first other one on."""
        run = self._run
        rows: list[records.Row] = []
        parts = _parts(request)
        for k, point in enumerate(points):
            asked = self._describe(point.x)
            same = all([mine is its for mine, its in zip(_parts(asked), parts, strict=True)])
            # what is the same object may still have been changed in place
            if not same or known + k == 0 or k == len(points) - 1:
                again = self._program(asked, known + k)
                same = (again.template.digest, again.shots, again.plan) == (
                    first.template.digest,
                    first.shots,
                    first.plan,
                ) and follows(again, point.x)
            elif same:
                same = np.asarray(asked.theta).tobytes() == point.x.tobytes()
            if not same:
                break
            rows.append(records.Row(
                self._entry.line, known + k, pack_array(point.x), point.value,
                None if point.gradient is None else pack_array(point.gradient), point.stderr, first.shots,
                point.seconds, where, first.template.digest if len(self._entry.rows) + len(rows) == 0 else "",
                point.started,
            ))  # fmt: skip
        run._journal.append_all(rows)
        run._keep(first)
        self._entry.rows.extend(rows)
        self._entry.counted += len(rows)
        run._count("evaluations_executed", len(rows))
        for row in rows:
            self._shown.evaluated(row.value)
        return len(rows) == len(points)


def _time_left(call: LoopCall, at: Location, spent: float, rows: int) -> float | None:
    """Seconds after which a loop's next evaluation is ended, or None; raises `TimedOut` if its time is over."""
    if call.timeout is not None and spent >= call.timeout:
        raise TimedOut(
            f"{at}: {rows} evaluations took {spent:.3g} s, and the loop's timeout is {call.timeout:g} s. They are "
            "kept: with more time the loop goes on from there."
        )
    return None if call.timeout is None else max(call.timeout - spent, _LEAST_LIMIT)


def _least(*limits: float | None) -> float | None:
    return min((limit for limit in limits if limit is not None), default=None)


_LEAST_LIMIT = 10.0
"""An evaluation is not ended before so many seconds because its loop's time is over: that costs an engine process, and
the first one of a process loads libraries."""
_LONGEST_SHIPPED = ROUND_TRIP
"""A loop whose evaluations take longer, in seconds, stays with the driver, which may spread them over devices."""
_FIRST_SLICE, _LONGEST_SLICE = 0.1, 0.8
"""Seconds of a loop's slices: short at first, so that much is soon known of it; then long beside the trip."""
_parts = operator.attrgetter("circuit", "observables", "shots", "precision", "backend", "grouping")
"""Of a request, all but its parameters."""


def _point(row: records.Row) -> Point:
    gradient = None if row.g is None else unpack_array(row.g)
    return Point(unpack_array(row.x), row.value, row.stderr, gradient, row.seconds, row.started)


class _Inner:
    """Runs the researcher's other callables of a loop (a gradient, a constraint) in scopes of their own."""

    def __init__(self, run: Run, scope: Scope, counter: Scope) -> None:
        self._run, self._scope, self._counter = run, scope, counter

    def __call__(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # scipy reads the signature of callbacks
        def inner(*args: Any, **kwargs: Any) -> Any:
            return self._run.enter(self._scope, self._counter.next(name), function, args, kwargs)

        return inner


def follows(asked: Program, point: np.ndarray[Any, Any]) -> bool:
    """Whether a program's parameters are the optimizer's point itself, of one value, so that gradients are by it."""
    return (
        asked.theta.tobytes() == point.tobytes() and asked.batch_shape == () and asked.observables_shape == ()
    )  # fmt: skip


def _predicted(asked: Program, need: Callable[[Program], Need]) -> dict[str, Any] | None:
    """What one row of a program is taken to need; None where that is refused, which those who place it say."""
    try:
        required = need(asked)
    except HybridqError:
        return None
    return {"bytes": required.bytes, "seconds": required.seconds / max(1, asked.rows), "shots": asked.shots}


def describe_call(name: str, describe: Callable[[], Request]) -> Request:
    """Run the body of a quantum function, in which nothing may be called but its description."""
    token = current.set(Describing(name))
    try:
        return describe()
    finally:
        current.reset(token)


def scalar(value: Any, at: Location, point: np.ndarray[Any, Any]) -> float:
    """An objective's value as a finite float.

    Raises `WorkflowError` for anything that is not a real number, and `NotFinite` for NaN and infinities.
    """
    found = value.value if isinstance(value, Estimate) else value
    if isinstance(found, (np.ndarray, list, tuple)):
        shape = np.shape(found)
        raise WorkflowError(f"{at} returned an array of shape {shape}; an objective returns one real number.")
    if isinstance(found, (complex, np.complexfloating)):
        raise WorkflowError(f"{at} returned the complex number {found}; an objective returns one real number.")
    if found is None or isinstance(found, (bool, np.bool_, str)) or not isinstance(found, (int, float, np.number)):
        raise WorkflowError(
            f"{at} returned {'None' if found is None else f'a {type(found).__qualname__}'}; an objective returns one "
            "real number."
        )
    if not math.isfinite(found):
        raise NotFinite(f"{at} returned {float(found)} at {point.tolist()}; no optimizer can go on from that.")
    return float(found)


def _encode_result(found: Any, location: Location) -> Encoded:
    """An optimizer's result as data; members that are not data are left out by name."""
    from scipy.optimize import OptimizeResult

    if not isinstance(found, OptimizeResult):
        raise WorkflowError(
            f"the method of {location} returned a {type(found).__qualname__}; it must return a "
            "scipy.optimize.OptimizeResult."
        )
    encoded, left_out = encode_result(found)
    for name in left_out:
        _warn_left_out(location, name)
    return encoded


def _warn_left_out(location: Location, name: str) -> None:
    warnings.warn(f"{location}: the result's member {name!r} is not data and was left out.", stacklevel=2)


def _note(error: BaseException, location: Location) -> None:
    """Name the location on an exception, once: where it left the first scope."""
    notes = getattr(error, "__notes__", [])
    if not any(note.startswith("in ") for note in notes):
        error.add_note(f"in {location}")


def _environment() -> records.Opened:
    versions = {}
    for name in _ENVIRONMENT:
        try:
            versions[name] = version(name)
        except ModuleNotFoundError:
            versions[name] = "not installed"
    return records.Opened(
        platform.node(), os.getpid(), time.time(), platform.python_version(), processor(), versions, sys.argv[:]
    )
