"""From asked to answered: a queue, the placement policy, and the devices it sends work to.

Thin action around pure decisions: `hybridq.ledger` says what goes where; this module starts the cluster when the
first thing is placed on it, keeps a bounded window of tasks in flight, tries again what the infrastructure lost, and
hands every answer to the one who asked.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import psutil

from hybridq import sites
from hybridq.backends import Backend
from hybridq.engines.costs import DEFAULT, Calibration, Corrections, need
from hybridq.engines.loops import Advance, Loop, Point
from hybridq.engines.process import EngineProcess
from hybridq.engines.wire import encode_template, pack, pack_loop, unpack_advance, unpack_outcomes
from hybridq.errors import (
    ClusterLost,
    EngineFailed,
    HybridqError,
    NoDevice,
    TimedOut,
    TooLarge,
    WorkerLost,
    WorkflowError,
)
from hybridq.ledger import Ledger
from hybridq.location import Location
from hybridq.policies import Batch, Device, Job, Part, parted
from hybridq.program import Outcome, Program
from hybridq.progress import Progress
from hybridq.resources import KINDS, ROUND_TRIP, Need, cores, worker_allowance
from hybridq.scope import priority
from hybridq.sites import Site
from hybridq.steps import StepReply

if TYPE_CHECKING:
    from hybridq.cluster import Cluster

__all__ = [
    "Advanced", "Dispatcher", "Evaluated", "Incident", "Interrupted", "Load", "LoopAsk", "Places",
    "ProgramAsk", "StepAsk", "driver_device", "driver_engine", "places_of",
]  # fmt: skip

_ATTEMPTS = 3
"""So often a program or a slice of a loop is tried whose engine process fails, and anything whose cluster is lost."""
_DEATHS = 2
"""With so many workers lost under a call it is not asked again; the last one it had to itself."""
_WORTH_THE_TRIP = 10 * ROUND_TRIP
"""Seconds from which a program is sent to the cluster though nothing else could run meanwhile."""
_UNKNOWN_STEP = 1.0
"""Seconds that a step is taken to need before one of its name has run: so long that it travels alone."""
_PACKED_SECONDS = 0.2
"""Programs or steps that leave together are predicted to take no longer, in seconds, so that none waits long."""
_SLICE = 1.0
"""Seconds that a slice of a loop is taken to need."""
_LEARNED = 8
"""So many evaluations of a template correct what is predicted; after them every eighth."""
_AHEAD_SECONDS = 5.0
"""A cluster that may grow is asked for workers until what waits would take each of them so long, in seconds."""
_IDLE_SECONDS = 20.0
"""It shrinks when so long nothing has been waiting for its workers, in seconds."""
_SILENT_SECONDS = 60.0
"""A scheduler that takes connections and does not answer for so long counts as lost, in seconds."""
_TELL_SECONDS = 30.0
"""Between lines that say that the same is still waited for."""
_INCIDENTS = 100
"""So many of the latest refusals and retries are kept to be looked at."""
_WATCH_SECONDS = 1.0
"""Between looks at which workers there are."""


_UNGUARDED = (
    "the script calls hq.run at its top level, and each worker process imports the script: put the call below "
    '`if __name__ == "__main__":`.'
)


class Interrupted(BaseException):
    """The run is being left; threads of it unwind with this."""


@dataclass(frozen=True)
class Evaluated:
    """A program's outcome and how it came about."""

    outcome: Outcome
    started: float
    """Wall-clock time at which it was sent off, or asked for if it had been begun, in seconds since the epoch."""
    where: str
    attempt: int


@dataclass(eq=False, kw_only=True)
class _Ask:
    """Something asked: what all kinds have in common."""

    name: str
    location: Location
    timeout: float | None = None
    priority: int = field(default_factory=priority.get)
    """Higher leaves first."""
    future: Future[Any] = field(default_factory=Future)
    attempt: int = 0
    """How often it was sent before, in earlier sessions too."""
    tries: int = 0
    """How often it failed since it was asked."""
    deaths: tuple[str, ...] = ()
    """What became of the workers that were lost while they had it."""
    drops: int = 0
    """How often the cluster was lost that had it."""
    kind: ClassVar[str]
    """Of its job in the ledger."""

    @property
    def evaluates(self) -> Program | None:
        """The program, or that of the loop; None for a step."""
        return None

    @property
    def single(self) -> bool:
        """Whether nothing travels with it: a time limit is that of a whole batch."""
        return self.timeout is not None

    @property
    def label(self) -> str:
        """Its name in the queue and on the cluster."""
        return str(self.location)

    @property
    def loop_at(self) -> Location | None:
        """The loop that it is a call of, or is; None for others."""
        at = self.location if self.kind == "loop" else self.location.parent
        return at if at is not None and at.name == "minimize" else None


@dataclass(eq=False, kw_only=True)
class ProgramAsk(_Ask):
    """A program to evaluate. ``finish`` turns its answer into the future's value, and may raise."""

    kind = "quantum"
    program: Program
    finish: Callable[[Evaluated], Any]
    lone: bool = False
    """Whether it travels alone: it was with others whose engine process outgrew its memory."""
    part: Part | None = None
    """Which part of a program that is spread over devices."""

    @property
    def evaluates(self) -> Program:
        """The program."""
        return self.program

    @property
    def single(self) -> bool:
        """Whether nothing travels with it."""
        return self.lone or self.timeout is not None

    @property
    def label(self) -> str:
        """Its name in the queue and on the cluster."""
        if self.part is None:
            return str(self.location)
        (first, stop), (left, right) = self.part
        return f"{self.location}[{first}:{stop}]" + (f"[{left}:{right}]" if self.program.derived else "")


@dataclass(eq=False, kw_only=True)
class StepAsk(_Ask):
    """A classical step to run, packed; ``finish`` turns its reply into the future's value, and may raise."""

    kind = "classical"
    call: bytes
    seed: int
    memory: int
    finish: Callable[[StepReply, int], Any]
    retries: int = 0
    """How often it is tried again after an exception of its own."""


@dataclass(eq=False, kw_only=True)
class LoopAsk(_Ask):
    """A slice of a loop to run; the future's value is an `Advanced`."""

    kind = "loop"
    loop: Loop
    points: Sequence[Point]
    """All that are known, recorded or from earlier slices."""
    seconds: float
    """How long the slice is to last, in seconds."""
    address: str | None = None
    """Of the worker that has the loop's optimizer waiting."""
    with_points: bool = False
    """Whether the points go with it: where it goes they are not known."""
    arrived: Callable[[Advance], None] | None = None
    """Given the points of a slice that runs at hand while it goes on, as `EngineProcess.advance` does."""

    @property
    def single(self) -> bool:
        """Whether nothing travels with it."""
        return True

    @property
    def evaluates(self) -> Program:
        """The program of its first point."""
        return self.loop.program


@dataclass(frozen=True)
class Advanced:
    """What a slice of a loop came to, and where."""

    advance: Advance
    where: str
    address: str | None


@dataclass(frozen=True)
class Places:
    """What programs can run on: the driver's own engine, workers, and the devices beside them."""

    workers: tuple[Device, ...]
    name: str
    """Of the workers together."""
    beside: tuple[Device, ...] = ()
    hosting: frozenset[str] = frozenset()
    """Identities of backends whose programs run beside the workers, named or not: those that are not simulated here."""

    def placed(self, required: Need, *, alone: bool, what: str = "the program", device: str = "", backend: str = "",
               divisible: tuple[int, int] = (1, 1)) -> str:  # fmt: skip
        """Where a program would go, in words; raises `PlacementError` with what it would be refused with.

        ``device`` is the one it asks for, or "", ``backend`` the identity of what evaluates it, ``divisible`` what
        `Program.divisible` says of it.
        """
        hosted = bool(device) or backend in self.hosting
        if alone and not hosted and _near(required, self.workers):
            return "the driver's engine"
        job = Job(what, required, pin=device or None, backend=backend if hosted else "")
        ledger = Ledger(expected=(*self.workers, *self.beside))
        count = len(parted(*divisible, required.seconds, ledger.free(job), _WORTH_THE_TRIP)) if alone else 1
        refusal = ledger.submit(job, 0.0)
        if refusal is not None:
            raise refusal.error
        name = device or ", ".join(d.name for d in self.beside if hosted and d.backend == backend) or self.name
        return f"{name}, in {count} parts side by side" if count > 1 else name

    @property
    def largest(self) -> int:
        """Bytes of the largest worker."""
        return max(worker.bytes for worker in self.workers)


@dataclass(frozen=True)
class Load:
    """What a device has to do: batches at work and sent ahead, and bytes reserved for what is on it at once."""

    device: Device
    busy: int
    ahead: int
    reserved: int
    worker: bool
    """Whether it is a worker of the cluster, or one of the devices beside it."""


@dataclass(frozen=True)
class Incident:
    """A call that was refused or is tried again, and why; ``time`` in seconds since the epoch."""

    time: float
    what: str
    """``refused`` or ``retried``."""
    at: str
    reason: str


def _near(required: Need, workers: Sequence[Device]) -> bool:
    """Whether the driver's engine is the place for a lone program: it is short, or fits nowhere else."""
    if required.bytes > _driver_bytes():
        return False
    return required.seconds < _WORTH_THE_TRIP or required.bytes > max(d.bytes for d in workers)


@functools.cache
def driver_engine() -> EngineProcess:
    """The engine process of this driver: started at the first use, shared by everything in the process."""
    return EngineProcess(_driver_bytes(), name="driver", eager=True)


@functools.cache
def _driver_bytes() -> int:
    return int(psutil.virtual_memory().total * 0.4)


class Dispatcher:
    """Sends programs and steps to where they run; one for each open run. Thread-safe."""

    def __init__(self, *, run: str, site: Site, progress: Progress, guarded: bool,
                 calibration: Calibration = DEFAULT) -> None:  # fmt: skip
        # the scheduler takes equal keys for the same task, and others may have runs of this name on the same cluster
        self._name = run
        self._run = f"{run}@{secrets.token_hex(4)}"
        self._site, self._progress, self._guarded = site, progress, guarded
        self._calibration, self._corrections = calibration, Corrections()
        self._observed: Counter[str] = Counter()
        """Evaluations of each template whose time is known."""
        self._lock = threading.RLock()
        self._ledger: Ledger | None = None
        """What waits and what runs where, once it is known which workers there are or will be."""
        self._beside = {device.name: _Beside(device) for device in site.devices}
        self._hosting = _hosting(site)
        self._asks: dict[Hashable, _Ask] = {}
        """Everything asked and not answered, by its number in the ledger."""
        self._jobs: dict[Hashable, Job] = {}
        self._refused: list[tuple[Hashable, BaseException]] = []
        """Numbers of calls that nothing there or expected can take any more, and what they are to be told."""
        self.incidents: deque[Incident] = deque(maxlen=_INCIDENTS)
        """The latest refusals and retries."""
        self._numbers = itertools.count()
        self._expected: tuple[Device, ...] = ()
        self._homes: dict[str, str] = {}
        """The worker that each loop was last sent to, by the loop's token: its optimizer waits there."""
        self._step_seconds: dict[str, float] = {}
        """What steps of each name took of late, in seconds: the longest counts more than the others."""
        self._asked_for = site.local_workers
        """Workers that a cluster that may grow was last asked for."""
        self._wanted_at: float | None = None
        """When something was last waiting for workers; by the monotonic clock."""
        self._cluster: Cluster | None = None
        self._lost_at: float | None = None
        """When the last cluster was lost that none has taken the place of; by the monotonic clock."""
        self._empty_at: float | None = None
        """Since when no worker is there; by the monotonic clock."""
        self._told_at = 0.0
        """When it was last said what is waited for; by the monotonic clock."""
        self._starting = False
        self._ready = threading.Event()
        self._closed: BaseException | None = None
        self._leaving = threading.Event()
        self.cluster_seconds = 0.0
        """Time spent starting or joining the cluster, in seconds."""

    def need(self, asked: Program) -> Need:
        """What a program asks of a device, by what is known of this machine and of programs like it.

        Raises `WorkflowError` if it does not fit its backend's qubits.
        """
        return need(asked, self._calibration, self._corrections)

    def _learn(self, asked: Program, outcome: Outcome, speed: float = 1.0) -> None:
        """Correct what is predicted for programs like this one; of many, only now and then another one.

        ``speed`` is that of the device: predictions are those of a device of speed 1.
        """
        seen = self._observed[asked.template.digest]
        self._observed[asked.template.digest] = seen + 1
        if seen < _LEARNED or seen % _LEARNED == 0:
            self._corrections.observe(asked, outcome.seconds * speed, self._calibration, first=seen == 0)

    def ahead(self, guess: Program) -> None:
        """Let the driver's engine begin with what is probably asked for next, as `EngineProcess.ahead` does.

        Raises `Interrupted` if the run is being left.
        """
        self._refuse_if_closed()
        driver_engine().ahead(guess)

    def advance_ahead(self, loop: Loop, seconds: float) -> None:
        """`ahead` for the first slice of a loop, if `advance` would run it at hand while nothing else runs."""
        self._refuse_if_closed()
        asked = loop.program
        if asked.plan.engine != "backend" and not self._hosted(asked) and self.need(asked).bytes <= _driver_bytes():
            driver_engine().advance_ahead(loop, seconds)

    def evaluate(self, ask: ProgramAsk, *, alone: bool) -> Any:
        """What ``ask`` comes to: at hand, in this thread, if the placement says so; else by `submit`, and waited for.

        Its future stays as it is where nothing fails at hand: nobody else waits for it.
        """
        try:
            required = self._at_hand(ask, alone)
            if required is not None:
                return ask.finish(self._evaluate_here(ask, required.bytes))
        except BaseException as error:
            ask.future.set_exception(error)
            raise
        self.submit(ask)
        return ask.future.result()

    def start(self, ask: ProgramAsk, *, alone: bool) -> None:
        """Resolve ``ask.future``: at hand, before this returns, if the placement says so; else as `submit` does."""
        try:
            required = self._at_hand(ask, alone)
        except HybridqError as error:
            ask.future.set_exception(error)
            return
        if required is None:
            self.submit(ask)
        else:
            _resolve(ask.future, lambda: ask.finish(self._evaluate_here(ask, required.bytes)))

    def _at_hand(self, ask: ProgramAsk, alone: bool) -> Need | None:
        """What a program needs, if the driver's engine is the place for it; raises what it is refused with."""
        required = self.need(ask.program)
        return required if alone and not self._hosted(ask.program) and self._near(required) else None

    def submit(self, ask: ProgramAsk) -> None:
        """Queue one program for the cluster; its future is resolved when it was recorded, or cannot be had."""
        try:
            encode_template(ask.program.template)
            required = self.need(ask.program)
            # what is asked again goes as it went, under a name of its own
            parts = self._parts(ask.program, required) if not (ask.tries or ask.part) else ()
            if len(parts) > 1:
                self._spread(ask, parts)
            else:
                self._enqueue(ask, required, ask.program.template.digest)
        except BaseException as error:  # noqa: BLE001  # raised where the future is waited for
            _resolve(ask.future, lambda error=error: _raise(error))  # type: ignore[misc]

    def _parts(self, asked: Program, required: Need) -> tuple[Part, ...]:
        """A program as parts for the slots that are free, where that is worth a trip to each.

        The bits of a row, and of a derivative, do not depend on the others, so neither do the result's.
        """
        if asked.divisible == (1, 1) or required.seconds < 2 * _WORTH_THE_TRIP:
            return ()
        self._workers_known()
        with self._lock:
            assert self._ledger is not None
            job = Job("", required, pin=asked.device or None, backend=asked.backend if self._hosted(asked) else "")
            slots = self._ledger.free(job)
        return parted(*asked.divisible, required.seconds, slots, _WORTH_THE_TRIP)

    def _spread(self, ask: ProgramAsk, parts: Sequence[Part]) -> None:
        """Queue a program as several; ``ask`` is answered when the last of them is."""
        asked, left, lock = ask.program, [len(parts)], threading.Lock()
        several = [
            ProgramAsk(
                name=ask.name, location=ask.location, timeout=ask.timeout, priority=ask.priority, attempt=ask.attempt,
                lone=ask.lone, program=_part_of(asked, part), finish=lambda found: found, part=part,
            )
            for part in parts
        ]  # fmt: skip

        def ended(_: Future[Any]) -> None:
            with lock:
                left[0] -= 1
                if left[0]:
                    return
            _resolve(ask.future, lambda: ask.finish(_joined(parts, [one.future.result() for one in several])))

        for one in several:
            one.future.add_done_callback(ended)
        for one in several:
            self.submit(one)

    def advance(self, ask: LoopAsk, *, alone: bool) -> None:
        """Run a slice of a loop: at hand, in this thread, if nothing else could run beside it; else on the cluster."""
        try:
            required = self.need(ask.loop.program)
            if alone and not self._hosted(ask.loop.program) and required.bytes <= _driver_bytes():
                with self._lock:
                    self._homes.pop(ask.loop.token, None)
                _resolve(ask.future, lambda: self._advance_here(ask, required.bytes))
            else:
                self._enqueue(ask, replace(required, seconds=_SLICE), ask.loop.program.template.digest)
        except BaseException as error:  # noqa: BLE001  # raised where the future is waited for
            _resolve(ask.future, lambda error=error: _raise(error))  # type: ignore[misc]

    def submit_step(self, ask: StepAsk) -> None:
        """Queue one step for the cluster; its future is resolved when it was recorded, or cannot be had."""
        known = self._step_seconds.get(ask.name)
        try:
            self._enqueue(ask, Need(ask.memory, _UNKNOWN_STEP if known is None else known), ask.name)
        except BaseException as error:  # noqa: BLE001  # raised where the future is waited for
            _resolve(ask.future, lambda error=error: _raise(error))  # type: ignore[misc]

    def _enqueue(self, ask: _Ask, required: Need, template: str) -> None:
        """Put ``ask`` into the queue; raises what it is refused with."""
        self._workers_known()
        parent = ask.location.parent
        with self._lock:
            self._refuse_if_closed()
            assert self._ledger is not None
            times = next(self._numbers)
            number = ask.label if ask.label not in self._asks else f"{ask.label} ({times})"
            asked = ask.evaluates
            job = Job(
                number, required, self._run, str(parent or ""), ask.priority, template=template, kind=ask.kind,
                pin=(asked.device or self._home(ask)) if asked else None,
                backend=asked.backend if asked and self._hosted(asked) else "", sole=bool(ask.deaths),
                single=ask.single,
            )  # fmt: skip
            refusal = self._ledger.submit(job, time.monotonic())
            if refusal is not None:
                self._note("refused", ask, refusal.error)
                raise refusal.error
            self._asks[number] = ask
            self._jobs[number] = job
        self._pump()

    def _home(self, ask: _Ask) -> str | None:
        """The worker to keep a loop on, or None where it may go to any; the lock is held.

        Where its optimizer does not wait, that runs again over all points so far, which can take as long as the first
        time. So a loop goes elsewhere only from a worker that is full to one that has fewer loops than it could run.
        """
        if not isinstance(ask, LoopAsk) or ask.address is None or ask.with_points or ask.deaths:
            return None
        assert self._ledger is not None
        address = ask.address
        slots = {d.name: d.slots for d in self._ledger.devices if d.name not in self._beside}
        if address not in slots:
            return None
        there = Counter(home for token, home in self._homes.items() if token != ask.loop.token)
        if there[address] >= slots[address] and any(there[name] < free for name, free in slots.items()):
            return None
        return address

    @property
    def cluster(self) -> Cluster | None:
        """The cluster while it is there."""
        return self._cluster

    def loads(self) -> tuple[tuple[Load, ...], int, float]:
        """What each device has to do now, how many calls wait, and their predicted seconds."""
        with self._lock:
            ledger = self._ledger
            if ledger is None:
                return (), 0, 0.0
            found = []
            for device in ledger.devices:
                sent = len(ledger.running(device.name))
                busy = min(sent, device.slots)
                reserved, _ = ledger.reserved(device.name)
                found.append(Load(device, busy, sent - busy, reserved, device.name not in self._beside))
            return tuple(found), ledger.waiting, ledger.work

    def _note(self, what: str, ask: _Ask, reason: object) -> None:
        self.incidents.append(Incident(time.time(), what, ask.label, str(reason) or type(reason).__name__))

    def close(self) -> None:
        """End the cluster, if one was started; everything asked must have been answered."""
        self._leave(Interrupted("the run has ended"))

    def abort(self) -> None:
        """Leave at once: every waiting thread unwinds, engines in the middle of a circuit are killed."""
        reason = Interrupted("the run was interrupted")
        with self._lock:
            self._closed = reason  # before the engines end: nothing is asked again
        driver_engine().kill()
        for beside in self._beside.values():
            beside.kill()
        self._leave(reason, starts=3.0, ends=1.5)

    def _leave(self, reason: BaseException, starts: float = 15.0, ends: float = 5.0) -> None:
        """Answer all that waits with ``reason``, and end the cluster.

        One that starts is waited for ``starts`` seconds; what is left of it then ends with this process: its workers
        are daemons. One that runs is killed if it has not ended after ``ends`` seconds.
        """
        self._leaving.set()
        with self._lock:
            self._closed = reason
            starting = self._starting
            asks = self._emptied()
        for ask in asks:
            _resolve(ask.future, functools.partial(_raise, reason))
        if starting:
            self._ready.wait(starts if self._site.cluster is None else 3.0)
        if self._cluster is not None:
            self._cluster.close(ends)
            self._cluster = None
        for beside in self._beside.values():
            beside.close()

    def _emptied(self) -> list[_Ask]:
        """Everything asked that is not answered; nothing is after it."""
        asks = list(self._asks.values())
        self._asks.clear()
        self._jobs.clear()
        return asks

    def _refuse_if_closed(self) -> None:
        if self._closed is not None:
            raise self._closed

    # -- at hand ---------------------------------------------------------------------------------------------------

    def _evaluate_here(self, ask: ProgramAsk, expected: int) -> Evaluated:
        asked = _with_threads(ask.program, cores())
        while True:
            self._refuse_if_closed()
            started = time.time()
            outcome: Outcome | HybridqError
            try:
                (outcome,) = driver_engine().evaluate([asked], ask.timeout, expected=expected)
            except EngineFailed as error:
                outcome = error
            if isinstance(outcome, Outcome):
                self._learn(ask.program, outcome)
                return Evaluated(outcome, started, "driver", ask.attempt)
            ask.attempt, ask.tries = ask.attempt + 1, ask.tries + 1
            if not _worth_another_try(outcome, ask.tries):
                raise outcome
            self._note("retried", ask, outcome)

    def _advance_here(self, ask: LoopAsk, expected: int) -> Advanced:
        while True:
            self._refuse_if_closed()
            try:
                found = driver_engine().advance(ask.loop, ask.points, ask.seconds, ask.timeout, expected, ask.arrived)
                return Advanced(found, "driver", None)
            except EngineFailed as error:
                ask.tries += 1
                if not _worth_another_try(error, ask.tries):
                    raise
                self._note("retried", ask, error)

    # -- on the cluster --------------------------------------------------------------------------------------------

    def places(self) -> Places:
        """What there is to run on now. A cluster of our own is not started for it, one that was given is joined."""
        name = "the cluster" if self._site.cluster is not None else "the local cluster"
        beside = tuple(beside.device for beside in self._beside.values())
        return Places(tuple(self._workers_known()), name, beside, self._hosting)

    def _hosted(self, asked: Program) -> bool:
        """Whether a program is for devices beside the workers only."""
        return bool(asked.device) or asked.backend in self._hosting

    def _near(self, required: Need) -> bool:
        """Whether the driver's engine is the place for a lone program; short ones are not kept by a look at workers."""
        known = self._ledger is not None
        return _near(required, () if known and required.seconds < _WORTH_THE_TRIP else self._workers_known())

    def _workers_known(self) -> Sequence[Device]:
        """The workers as devices: as they are once the cluster runs, as they will be before a local one is started."""
        with self._lock:
            if self._ledger is None and self._site.cluster is None:
                self._make_ledger(_local_devices(self._site))
            elif self._ledger is None:
                self._start_cluster()
        if self._ledger is None:
            self._ready.wait()
        with self._lock:
            self._refuse_if_closed()
            assert self._ledger is not None
            return [d for d in self._ledger.devices if d.name not in self._beside] or self._expected

    def _make_ledger(self, expected: tuple[Device, ...]) -> None:
        self._expected = expected
        self._ledger = Ledger(self._site.policy, expected=expected, batch_seconds=_PACKED_SECONDS)
        for beside in self._beside.values():
            self._ledger.join(beside.device, time.monotonic())

    def _start_cluster(self) -> None:
        with self._lock:
            if self._starting or self._cluster is not None or self._closed is not None:
                return
            self._starting = True
            self._ready.clear()
        threading.Thread(target=self._bring_up, name="hybridq-cluster", daemon=True).start()

    def _bring_up(self) -> None:
        begun = time.monotonic()
        cluster: Cluster | None = None
        try:
            if self._site.cluster is None and not self._guarded:
                raise WorkflowError(_UNGUARDED)
            cluster, devices = self._join()
            with self._lock:
                self._refuse_if_closed()  # who left meanwhile waits no longer
        except BaseException as error:  # noqa: BLE001  # handed to every caller that waits for the cluster
            self._leave_without_cluster(error)
            if cluster is not None:
                cluster.close()
            return
        refused: list[tuple[_Ask, BaseException]] = []
        with self._lock:
            self._cluster = cluster
            # a worker that is restarted is away for a while: what only it can take waits
            if self._ledger is None:
                self._make_ledger(devices)
            else:
                self._ledger.expect(devices)
                self._expected = devices
            assert self._ledger is not None
            self._starting, self._lost_at, self._empty_at = False, None, None
            self.cluster_seconds = time.monotonic() - begun
            for device in devices:
                self._ledger.join(device, time.monotonic())
            for refusal in self._ledger.stranded():  # the workers are not what was expected of them
                self._ledger.cancel(refusal.job)
                ask = self._asks.pop(refusal.job, None)
                self._jobs.pop(refusal.job, None)
                if ask is not None:
                    self._note("refused", ask, refusal.error)
                    refused.append((ask, refusal.error))
        for ask, reason in refused:
            _resolve(ask.future, functools.partial(_raise, reason))
        threading.Thread(target=self._watch, args=(cluster,), name="hybridq-watch", daemon=True).start()
        self._ready.set()
        self._pump()
        self._progress.message(f"cluster ready in {self.cluster_seconds:.1f} s, dashboard {cluster.dashboard}")

    def _join(self) -> tuple[Cluster, tuple[Device, ...]]:
        """The cluster and its workers; where one was lost, the next one, waited for within the site's patience."""
        # distributed takes over a second to import: a run that only replays never gets here
        from hybridq.cluster import Cluster

        while True:
            cluster: Cluster | None = None
            try:
                cluster = Cluster(self._site)
                if self._site.most_workers is not None:  # never fewer than there are: those may be at work for others
                    self._asked_for = max(self._site.local_workers, len(cluster.devices()))
                    cluster.scale(self._asked_for)
                devices = self._first_devices(cluster)
                if not devices:
                    raise NoDevice(f"the cluster at {cluster.address} has no workers; start some, then run again.")
                return cluster, devices
            except BaseException as error:
                if cluster is not None:
                    cluster.close()
                lost = self._lost_at is not None and isinstance(error, (NoDevice, ClusterLost, OSError, TimeoutError))
                if not lost or self._leaving.wait(_WATCH_SECONDS):
                    raise
                if time.monotonic() - (self._lost_at or 0.0) > self._site.patience:
                    raise ClusterLost(
                        f"the Dask cluster was lost, and none was there in its place within {self._site.patience:g} s "
                        f"({error}). Start one and run again: everything recorded is kept."
                    ) from error
                self._tell(f"waiting for the cluster to be there again ({error})")

    def _tell(self, text: str) -> None:
        """Say what is waited for, now and then."""
        if time.monotonic() - self._told_at > _TELL_SECONDS:
            self._told_at = time.monotonic()
            self._progress.message(text)

    def _first_devices(self, cluster: Cluster) -> tuple[Device, ...]:
        """The workers that are there; if the cluster was asked for some, as soon as one has come."""
        while True:
            devices = cluster.devices()
            if devices or self._site.most_workers is None or self._leaving.wait(_WATCH_SECONDS):
                return devices
            self._tell(f"waiting for the first worker of {cluster.address}")

    def _cluster_lost(self, cluster: Cluster, why: str) -> None:
        """Give a cluster up; what it had is asked again of the one that takes its place."""
        with self._lock:
            if self._cluster is not cluster or self._closed is not None:
                return
            assert self._ledger is not None
            self._cluster, self._lost_at = None, time.monotonic()
            for name in [d.name for d in self._ledger.devices if d.name not in self._beside]:
                self._ledger.leave(name)
                self._release(name)
        self._progress.message(f"{why}; what it had is asked again of the next one")
        cluster.abandon()
        self._pump()

    def _watch(self, cluster: Cluster) -> None:
        """Tell the ledger which workers come and go, and that time passes: a job may wait for a device that is late.

        What was on a worker that went is asked once more.
        """
        silent: float | None = None
        while not self._leaving.wait(_WATCH_SECONDS) and self._cluster is cluster:
            begun = time.monotonic()
            try:
                self._look(cluster)
                silent = None
            except ClusterLost as lost:
                self._cluster_lost(cluster, str(lost))
                return
            except Exception as error:  # noqa: BLE001  # a scheduler that does not answer; the next look may succeed
                if silent is None and not self._leaving.is_set():
                    self._progress.message(f"the cluster cannot be looked after ({type(error).__name__}: {error})")
                silent = begun if silent is None else silent
                if time.monotonic() - silent > _SILENT_SECONDS:
                    self._cluster_lost(cluster, f"the Dask scheduler does not answer for {_SILENT_SECONDS:g} s")
                    return
            self._pump()

    def _look(self, cluster: Cluster) -> None:
        """Bring what is known of the workers up to date."""
        found = {device.name: device for device in cluster.devices()}
        with self._lock:
            assert self._ledger is not None
            known = {device.name for device in self._ledger.devices} - self._beside.keys()
            for name in known - found.keys():
                self._ledger.leave(name)
                self._release(name)
            for name in found.keys() - known:
                self._ledger.join(found[name], time.monotonic())
        if len(known) != len(found):
            self._progress.message(f"{len(found)} workers, {len(known)} before")
        for name in known - found.keys():
            cluster.lost(name)
        if self._site.most_workers is not None:
            self._scale(cluster, len(found))
        cluster.replenish()
        self._no_workers(cluster, not found)

    def _no_workers(self, cluster: Cluster, empty: bool) -> None:
        """Say that calls wait for workers and none is there; end what waits when none comes."""
        with self._lock:
            waiting = sum(not job.backend for job in self._jobs.values())  # others wait for devices beside it
        if not (empty and waiting):
            self._empty_at = None
            return
        now = time.monotonic()
        if self._empty_at is None:
            self._empty_at = now
        elif self._site.most_workers is None and now - self._empty_at > self._site.patience:
            self._leave_without_cluster(NoDevice(
                f"the cluster at {cluster.address} has had no workers for {self._site.patience:g} s, and {waiting} "
                "calls wait for one. Start some and run again: everything recorded is kept."
            ))  # fmt: skip
        elif now - self._empty_at > 2 * _WATCH_SECONDS:  # one that is just restarted is soon there again
            self._tell(f"the cluster at {cluster.address} has no workers; {waiting} calls wait for one")

    def _release(self, name: str) -> None:
        """Loops that wait for the worker ``name``, which is gone, may go to any; the lock is held."""
        assert self._ledger is not None
        self._homes = {token: home for token, home in self._homes.items() if home != name}
        for number, ask in self._asks.items():
            if not isinstance(ask, LoopAsk) or ask.loop.program.device or self._jobs[number].pin != name:
                continue
            self._change(number, replace(self._jobs[number], pin=None))

    def _scale(self, cluster: Cluster, there: int) -> None:
        """Ask for as many workers as have something to do, within the site's bounds; fewer only after a while.

        Dask's own scaling looks at the tasks it was sent, and those are few: the queue is here.
        """
        least, most = self._site.local_workers, self._site.most_workers
        assert most is not None
        with self._lock:
            assert self._ledger is not None
            waiting, seconds = self._ledger.waiting, self._ledger.work
            busy = sum(bool(self._ledger.running(d.name)) for d in self._ledger.devices if d.name not in self._beside)
        now = time.monotonic()
        if waiting or busy or self._wanted_at is None:
            self._wanted_at = now
        wanted = max(least, min(most, busy + min(waiting, math.ceil(seconds / _AHEAD_SECONDS))))
        if wanted > self._asked_for:
            self._asked_for = wanted
            self._progress.message(f"{waiting} calls wait for {there} workers; {wanted} asked for")
            cluster.scale(wanted)
        elif there < self._asked_for and waiting:
            cluster.scale(self._asked_for)  # some went: a cluster starts others only when it is asked again
        elif wanted < self._asked_for and not busy and now - self._wanted_at > _IDLE_SECONDS:
            self._asked_for = wanted
            cluster.scale(wanted)

    def _leave_without_cluster(self, error: BaseException) -> None:
        self._leaving.set()
        with self._lock:
            self._starting = False
            if self._closed is None:
                self._closed = error
            asks = self._emptied()
        self._ready.set()
        for ask in asks:
            _resolve(ask.future, lambda: _raise(error))

    def _pump(self) -> None:
        """Send what the placement lets go."""
        sends: list[Callable[[], None]] = []
        with self._lock:
            for number, error in self._refused:
                self._jobs.pop(number, None)
                ask = self._asks.pop(number, None)
                if ask is not None:
                    self._note("refused", ask, error)
                    sends.append(functools.partial(_resolve, ask.future, functools.partial(_raise, error)))
            self._refused.clear()
            if self._closed is not None or not (self._asks or sends):
                return
            if self._cluster is None and any(not job.backend for job in self._jobs.values()):
                self._start_cluster()
            if self._ledger is None:
                return
            for batch in self._ledger.decide(time.monotonic()):
                sends.append(functools.partial(self._send, batch, [self._asks[number] for number in batch.jobs]))
        for send in sends:
            try:
                send()
            except Exception as error:  # noqa: BLE001  # the client takes no work: nothing would ever be answered
                self._leave_without_cluster(error)
                return

    def _send(self, batch: Batch, asks: list[Any]) -> None:
        if batch.device in self._beside:
            self._send_beside(batch, asks)
        elif (cluster := self._cluster) is None:  # it was lost since this was decided
            self._ended(batch)
            for ask in asks:
                self._failed(ask, ClusterLost("the Dask cluster was lost"))
        elif isinstance(asks[0], LoopAsk):
            self._send_loop(cluster, batch, asks[0])
        elif isinstance(asks[0], ProgramAsk):
            self._send_programs(cluster, batch, asks)
        else:
            self._send_steps(cluster, batch, asks)

    def _ended(self, batch: Batch, outcomes: Sequence[Any] = ()) -> float:
        """A batch is no longer where it was, and its jobs are no longer asked for; the speed of its device.

        What evaluations took, if none failed, is compared with what was predicted of them.
        """
        measured = [outcome.seconds for outcome in outcomes if isinstance(outcome, Outcome)]
        seconds = sum(measured) if len(measured) == len(batch.jobs) else None
        with self._lock:
            assert self._ledger is not None
            speed = self._ledger.speed(batch.device)
            for number in batch.jobs:
                self._asks.pop(number, None)
                self._jobs.pop(number, None)
            with contextlib.suppress(KeyError):  # its worker left before
                self._ledger.done(batch, time.monotonic(), seconds)
        return speed

    def _again(self, ask: _Ask) -> None:
        """Ask once more what was not answered."""
        if isinstance(ask, ProgramAsk):
            self.submit(ask)
        elif isinstance(ask, LoopAsk):
            self.advance(ask, alone=False)
        elif isinstance(ask, StepAsk):
            self.submit_step(ask)

    def _failed(self, ask: _Ask, error: BaseException) -> None:
        """Ask once more what the infrastructure failed, if it is worth it; else answer with the error.

        A worker dies for reasons of its own or of something else that was on it: so what it had is asked again, with a
        worker to itself. If that one dies too, it is this call that ends workers.
        """
        ask.attempt, ask.tries = ask.attempt + 1, ask.tries + 1
        again = False
        if isinstance(error, WorkerLost):
            ask.deaths += (str(error),)
            again = len(ask.deaths) < _DEATHS
            if not again:
                error = WorkerLost(
                    f"{ask.location} was tried {len(ask.deaths)} times, the last time with nothing beside it, and each "
                    f"time its worker was lost: {'; '.join(ask.deaths)}. A step that needs more memory than its worker "
                    "has ends like this: give it memory='... GiB', or use fewer workers with more memory each."
                )
        elif isinstance(error, ClusterLost):
            ask.drops += 1
            again = ask.drops < _ATTEMPTS
            cluster = self._cluster
            if cluster is not None and not cluster.connected:
                self._cluster_lost(cluster, "the connection to the Dask scheduler was lost")
        elif not isinstance(ask, StepAsk):
            again = _worth_another_try(error, ask.tries)
        if again and self._closed is None:
            self._note("retried", ask, error)
            self._again(ask)
        else:
            _resolve(ask.future, functools.partial(_raise, error))

    def _send_beside(self, batch: Batch, asks: list[Any]) -> None:
        """Programs, or a slice of a loop, to a device of the site's."""
        beside, started = self._beside[batch.device], time.time()

        def work(engine: EngineProcess) -> None:
            ask = asks[0]
            outcomes: list[Any]
            try:
                if isinstance(ask, LoopAsk):
                    outcomes = [engine.advance(ask.loop, ask.points, ask.seconds, ask.timeout, batch.bytes)]
                else:
                    limit = _together([a.timeout for a in asks])
                    programs = [_with_threads(a.program, batch.threads) for a in asks]
                    outcomes = list(engine.evaluate(programs, limit, expected=batch.bytes))
            except TooLarge as error:
                self._ended(batch, [error] * len(asks))
                self._outgrew(asks, error)
                return
            except BaseException as error:  # noqa: BLE001  # raised where the futures are waited for
                outcomes = [error] * len(asks)
            speed = self._ended(batch, outcomes)
            for one, outcome in zip(asks, outcomes, strict=True):
                if isinstance(outcome, Advance):
                    _resolve(one.future, functools.partial(Advanced, outcome, batch.device, None))
                else:
                    self._answer_program(one, outcome, started, batch.device, speed)
            self._pump()

        beside.submit(work)

    def _outgrew(self, asks: Sequence[_Ask], error: TooLarge) -> None:
        """The engine process of these was ended for its memory: which of them it was is found by asking one by one."""
        for ask in asks:
            if isinstance(ask, ProgramAsk) and len(asks) > 1:
                ask.attempt, ask.lone = ask.attempt + 1, True
                self._note("retried", ask, error)
                self._again(ask)
            else:
                self._failed(ask, error)
        self._pump()

    def _group(self, asks: Sequence[_Ask]) -> str:
        """The first part of a task's key, as in ``quantum:energy-@curve/h2/point[3]/minimize[0]``.

        Dask's own pages colour and count tasks by what is before the dash, kind and name; those that have all of it in
        common, a loop's, are a group.
        """
        first = asks[0]
        loops = {ask.loop_at for ask in asks}
        (loop,) = loops if len(loops) == 1 else (None,)
        kind = "classical" if isinstance(first, StepAsk) else "quantum"
        return f"{kind}:{first.name}-@{self._name}" + (f"/{loop}" if loop is not None else "")

    def _send_programs(self, cluster: Cluster, batch: Batch, asks: list[ProgramAsk]) -> None:
        from hybridq.cluster import BYTES, SLOTS, run_batch

        first = asks[0]
        others = f"+{len(asks) - 1}" if len(asks) > 1 else ""
        key = (self._group(asks), f"{self._run}/{first.label}{others}", first.attempt)
        needs = {SLOTS: batch.threads, BYTES: batch.bytes}  # a wide one has all of them
        timeout = _together([a.timeout for a in asks])
        started = time.time()

        def done(answer: Any, error: BaseException | None) -> None:
            where = ""
            outcomes: Sequence[Any] = [error] * len(asks)
            if error is None:
                packed, where = answer
                outcomes = _outcomes(packed, len(asks), where)
            speed = self._ended(batch, outcomes)
            if isinstance(error, TooLarge):
                self._outgrew(asks, error)
                return
            for ask, outcome in zip(asks, outcomes, strict=True):
                self._answer_program(ask, outcome, started, where, speed)
            self._pump()

        packed = pack([_with_threads(a.program, batch.threads) for a in asks])
        arguments = (packed, timeout, batch.bytes)
        cluster.submit(run_batch, arguments, key=key, needs=needs, done=done, on=batch.device)

    def _send_loop(self, cluster: Cluster, batch: Batch, ask: LoopAsk) -> None:
        from hybridq.cluster import BYTES, SLOTS, run_loop

        ask.attempt += 1
        key = (self._group([ask]), f"{self._run}/{ask.location}@{len(ask.points)}", ask.attempt)
        needs = {SLOTS: 1, BYTES: batch.bytes}

        def done(answer: Any, error: BaseException | None) -> None:
            self._ended(batch)
            if error is None:
                packed, where, address = answer
                found: Any = _advance_of(packed, where)
                if isinstance(found, Advance) and found.state == "lost" and not ask.with_points:
                    ask.with_points = True
                    self._again(ask)
                    return
                error = found if isinstance(found, BaseException) else None
            if error is not None or found.state != "more":
                with self._lock:
                    self._homes.pop(ask.loop.token, None)
            if error is None:
                _resolve(ask.future, lambda: Advanced(found, where, address))
            else:
                self._failed(ask, error)
            self._pump()

        with self._lock:
            self._homes[ask.loop.token] = batch.device
        with_points = ask.with_points or ask.address != batch.device
        packed = pack_loop(ask.loop, len(ask.points), ask.points if with_points else None, ask.seconds)
        arguments = (packed, ask.loop.token, ask.timeout, batch.bytes)
        cluster.submit(run_loop, arguments, key=key, needs=needs, done=done, on=batch.device)

    def _answer_program(self, ask: ProgramAsk, outcome: Any, started: float, where: str, speed: float) -> None:
        if isinstance(outcome, Outcome):
            self._learn(ask.program, outcome, speed)
            _resolve(ask.future, lambda: ask.finish(Evaluated(outcome, started, where, ask.attempt)))
        else:
            self._failed(ask, outcome)

    def _send_steps(self, cluster: Cluster, batch: Batch, asks: list[StepAsk]) -> None:
        """Steps that travel in one task; each is answered, fails and is tried again by itself."""
        from hybridq.cluster import BYTES, run_steps

        first = asks[0]
        others = f"+{len(asks) - 1}" if len(asks) > 1 else ""
        key = (self._group(asks), f"{self._run}/{first.location}{others}", first.attempt)

        def done(replies: Any, error: BaseException | None) -> None:
            self._ended(batch)
            for number, ask in enumerate(asks):
                if error is not None:
                    self._failed(ask, error)
                else:
                    self._answer_step(ask, replies[number])
            self._pump()

        overran = None
        if first.timeout is not None:
            late = TimedOut(
                f"{first.location} ran longer than its timeout of {first.timeout:g} s; its worker was restarted."
            )
            overran = lambda: done(None, late)  # noqa: E731
        needs = {BYTES: batch.bytes} if batch.bytes else {}
        watched = None if first.timeout is None else key
        arguments = ([(ask.call, str(ask.location)) for ask in asks], first.seed, watched)
        cluster.submit(
            run_steps, arguments, key=key, needs=needs, done=done, timeout=first.timeout, overran=overran,
            on=batch.device,
        )  # fmt: skip

    def _expect(self, name: str, seconds: float) -> None:
        """What waits of the steps called ``name`` is known to be shorter or longer from now on; the lock is held."""
        assert self._ledger is not None
        for number, ask in self._asks.items():
            if isinstance(ask, StepAsk) and ask.name == name and ask.timeout is None:
                job = self._jobs[number]
                self._change(number, replace(job, need=replace(job.need, seconds=seconds)))

    def _change(self, number: Hashable, job: Job) -> None:
        """Put ``job`` in the place of one that waits; what is refused then is answered by `_pump`. The lock is held."""
        assert self._ledger is not None
        if self._ledger.cancel(number):
            self._jobs[number] = job
            refusal = self._ledger.submit(job, time.monotonic())
            if refusal is not None:
                self._refused.append((number, refusal.error))

    def _answer_step(self, ask: StepAsk, reply: StepReply) -> None:
        with self._lock:
            known = self._step_seconds.get(ask.name)
            self._step_seconds[ask.name] = (
                reply.seconds if known is None else max(reply.seconds, 0.8 * known + 0.2 * reply.seconds)
            )
            if known is None:
                self._expect(ask.name, reply.seconds)
        if reply.raised is not None and ask.tries - len(ask.deaths) - ask.drops < ask.retries:
            ask.attempt, ask.tries = ask.attempt + 1, ask.tries + 1
            self._note("retried", ask, f"{reply.raised.type}: {reply.raised.message}")
            self._again(ask)
        else:
            _resolve(ask.future, lambda: ask.finish(reply, ask.attempt))


def places_of(site: Site) -> Places:
    """What a site has to run on, as far as it says itself: workers are known of a cluster of our own only."""
    workers = _local_devices(site) if site.cluster is None else ()
    return Places(workers, "the local cluster", tuple(map(_beside, site.devices)), _hosting(site))


def _hosting(site: Site) -> frozenset[str]:
    """Identities of the backends of a site's devices that are not simulators."""
    return frozenset(d.backend.identity for d in site.devices if isinstance(d.backend, Backend))


def driver_device() -> Device:
    """The driver's own engine as a device."""
    return Device("driver", 1, _driver_bytes(), 1, kinds=("quantum", "loop"), aside=True)


def _beside(asked: sites.Device) -> Device:
    memory = _driver_bytes() if asked.memory is None else int(asked.memory)
    return Device(
        asked.name, asked.slots, memory, asked.slots, asked.latency, qubits=asked.qubits,
        backend=asked.backend.identity, cost_per_shot=asked.cost_per_shot, kinds=("quantum", "loop"),
    )  # fmt: skip


class _Beside:
    """A device of the site's: its engine processes, one for each slot, and threads that talk to them."""

    def __init__(self, asked: sites.Device) -> None:
        self.device = _beside(asked)
        self._all = [EngineProcess(self.device.bytes, name=f"{asked.name}-{i}") for i in range(asked.slots)]
        self._free: SimpleQueue[EngineProcess] = SimpleQueue()
        for engine in self._all:
            self._free.put(engine)
        self._threads = ThreadPoolExecutor(asked.slots, thread_name_prefix=f"hybridq-{asked.name}")

    def submit(self, work: Callable[[EngineProcess], None]) -> None:
        """Call ``work`` with an engine that is free, in a thread of the device's."""

        def on_engine() -> None:
            engine = self._free.get()
            try:
                work(engine)
            finally:
                self._free.put(engine)

        self._threads.submit(on_engine)

    def kill(self) -> None:
        """End its engine processes now, whatever they do."""
        for engine in self._all:
            engine.kill()

    def close(self) -> None:
        """End its engine processes and threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.kill()


def _local_devices(site: Site) -> tuple[Device, ...]:
    """The workers that a cluster of our own will have."""
    workers, threads = site.local_workers, site.worker_threads
    memory = worker_allowance(site.local_memory(psutil.virtual_memory().total), threads)
    return tuple(Device(f"worker {i}", threads, memory, threads, ROUND_TRIP, kinds=KINDS) for i in range(workers))


def _together(timeouts: Sequence[float | None]) -> float | None:
    """The time limit of programs that run one after the other, in seconds; None if one has none."""
    given = [timeout for timeout in timeouts if timeout is not None]
    return sum(given) if len(given) == len(timeouts) else None


def _with_threads(asked: Program, threads: int) -> Program:
    """A program as it is sent to where it gets so many threads, if its plan says that it takes what there are."""
    return asked if asked.plan.threads else replace(asked, plan=replace(asked.plan, threads=threads))


def _part_of(asked: Program, part: Part) -> Program:
    """A part of a program, as a program."""
    rows = slice(*part.rows)
    derived = part.columns if part.columns != (0, asked.divisible[1]) else None
    theta = asked.theta[rows]
    return replace(asked, theta=theta, seeds=asked.seeds[rows], batch_shape=(len(theta),), derived=derived)


def _joined(parts: Sequence[Part], found: Sequence[Evaluated]) -> Evaluated:
    """The outcome of a program, from those of its parts, in order."""
    outcomes = [one.outcome for one in found]
    # parts of one row have its value each, from the same seed
    rows = [o for part, o in zip(parts, outcomes, strict=True) if part.columns[0] == 0]
    slopes: list[list[Any]] = []
    for part, outcome in zip(parts, outcomes, strict=True):
        if outcome.gradients is not None:
            if part.columns[0] == 0:
                slopes.append([])
            slopes[-1].append(outcome.gradients)
    joined = Outcome(
        np.concatenate([o.values for o in rows]), np.concatenate([o.stderrs for o in rows]),
        None if rows[0].bits is None else np.concatenate([o.bits for o in rows if o.bits is not None]),
        sum(o.seconds for o in outcomes), max(o.peak_bytes for o in outcomes),
        np.concatenate([np.concatenate(row, axis=2) for row in slopes]) if slopes else None,
    )  # fmt: skip
    where = ", ".join(dict.fromkeys(one.where for one in found))
    return Evaluated(joined, min(one.started for one in found), where, max(one.attempt for one in found))


def _outcomes(packed: bytes, count: int, where: str) -> list[Outcome | BaseException]:
    """What a batch came to; an answer that cannot be read is a failure of each of its programs."""
    try:
        outcomes: list[Outcome | BaseException] = list(unpack_outcomes(packed))
        if len(outcomes) == count:
            return outcomes
        reason = f"it holds {len(outcomes)} outcomes of {count}"
    except Exception as error:  # noqa: BLE001  # whatever is in it, those who asked are answered
        reason = f"{type(error).__name__}: {error}"
    return [EngineFailed(f"the answer of the worker {where} cannot be read ({reason}).")] * count


def _advance_of(packed: bytes, where: str) -> Any:
    """What a slice of a loop came to; an answer that cannot be read is a failure of it."""
    try:
        return unpack_advance(packed)
    except Exception as error:  # noqa: BLE001  # whatever is in it, who asked is answered
        return EngineFailed(f"the answer of the worker {where} cannot be read ({type(error).__name__}: {error}).")


def _worth_another_try(error: BaseException, tries: int) -> bool:
    return isinstance(error, EngineFailed) and tries < _ATTEMPTS


def _raise(error: BaseException) -> Any:
    raise error


def _resolve(future: Future[Any], value: Callable[[], Any]) -> None:
    """Resolve ``future`` with what ``value()`` returns or raises."""
    if future.done():  # the run is being left
        return
    with contextlib.suppress(InvalidStateError):  # it is left just now
        try:
            found = value()
        except BaseException as error:  # noqa: BLE001  # raised where the future is waited for
            future.set_exception(error)
        else:
            future.set_result(found)
