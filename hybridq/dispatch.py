"""From asked to answered: a queue, the placement policy, and the devices it sends work to.

Thin action around pure decisions: `hybridq.placement` says what goes where; this module starts the cluster when the
first thing is placed on it, keeps a bounded window of tasks in flight, tries again what the infrastructure lost, and
hands every answer to the one who asked.
"""

from __future__ import annotations

import functools
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from hybridq.engines.process import EngineProcess
from hybridq.engines.wire import encode_template, pack, unpack_outcomes
from hybridq.errors import EngineFailed, HybridqError, TimedOut, TooLarge, WorkerLost, WorkflowError
from hybridq.location import Location
from hybridq.placement import Free, Waiting, place
from hybridq.program import Outcome, Program, need
from hybridq.progress import Progress
from hybridq.resources import ROUND_TRIP, Device, format_bytes, worker_allowance
from hybridq.steps import StepReply

if TYPE_CHECKING:
    from hybridq.cluster import Cluster

__all__ = ["Dispatcher", "Evaluated", "Interrupted", "ProgramAsk", "StepAsk", "driver_engine"]

_ATTEMPTS = 3
_DRIVER_LATENCY = 1e-4
_AHEAD = 2
"""Tasks in flight for each slot: one runs, one is on its way."""
_STEPS_AHEAD = 16


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
    """Wall-clock time at which it was sent off, in seconds since the epoch."""
    where: str
    attempt: int


@dataclass(eq=False)
class ProgramAsk:
    """A program to evaluate. ``finish`` turns its answer into the future's value, and may raise."""

    program: Program
    name: str
    location: Location
    finish: Callable[[Evaluated], Any]
    timeout: float | None = None
    future: Future[Any] = field(default_factory=Future)
    attempt: int = 0
    tries: int = 0
    """How often it failed since it was asked; ``attempt`` counts those of earlier sessions too."""


@dataclass(eq=False)
class StepAsk:
    """A classical step to run, packed; ``finish`` turns its reply into the future's value, and may raise."""

    call: bytes
    name: str
    location: Location
    seed: int
    memory: int
    finish: Callable[[StepReply, int], Any]
    retries: int = 0
    timeout: float | None = None
    future: Future[Any] = field(default_factory=Future)
    attempt: int = 0


@functools.cache
def driver_engine() -> EngineProcess:
    """The engine process of this driver: started at the first use, shared by everything in the process."""
    return EngineProcess(_driver_bytes(), name="driver")


def _driver_bytes() -> int:
    return int(psutil.virtual_memory().total * 0.4)


class Dispatcher:
    """Sends programs and steps to where they run; one for each open run. Thread-safe."""

    def __init__(self, *, run: str, address: Any, workers: int, progress: Progress, guarded: bool) -> None:
        # the scheduler takes equal keys for the same task, and others may have runs of this name on the same cluster
        self._run = f"{run}@{secrets.token_hex(4)}"
        self._address, self._workers, self._progress = address, workers, progress
        self._guarded = guarded
        self._near = Device("the driver's engine", 1, _driver_bytes(), _DRIVER_LATENCY)
        self._lock = threading.RLock()
        self._programs: deque[ProgramAsk] = deque()
        self._steps: deque[StepAsk] = deque()
        self._flying: set[ProgramAsk | StepAsk] = set()
        self._batches_flying = 0
        self._steps_flying = 0
        self._cluster: Cluster | None = None
        self._starting = False
        self._ready = threading.Event()
        self._wide: Device | None = None
        self._closed: BaseException | None = None
        self.cluster_seconds = 0.0
        """Time spent starting or joining the cluster, in seconds."""

    def evaluate(self, ask: ProgramAsk, *, alone: bool) -> None:
        """Resolve ``ask.future``: at hand, in this thread, if the placement says so; else as `submit` does."""
        try:
            placements = place([Waiting(need(ask.program), alone)], [Free(self._near, 1), Free(self._wide_device(), 1)])
        except HybridqError as error:
            ask.future.set_exception(error)
            return
        if placements.refusals:
            ask.future.set_exception(placements.refusals[0].error)
        elif placements.batches[0].device == self._near.name:
            _resolve(ask.future, lambda: ask.finish(self._evaluate_here(ask)))
        else:
            self.submit(ask)

    def submit(self, ask: ProgramAsk) -> None:
        """Queue one program for the cluster; its future is resolved when it was recorded, or cannot be had."""
        try:
            encode_template(ask.program.template)
            placements = place([Waiting(need(ask.program), False)], [Free(self._wide_device(), 1)])
        except HybridqError as error:
            ask.future.set_exception(error)
            return
        if placements.refusals:  # before a cluster is started for it
            ask.future.set_exception(placements.refusals[0].error)
            return
        self._enqueue(self._programs, ask)

    def submit_step(self, ask: StepAsk) -> None:
        """Queue one step for the cluster; its future is resolved when it was recorded, or cannot be had."""
        try:
            wide = self._wide_device()
        except HybridqError as error:
            ask.future.set_exception(error)
            return
        if ask.memory > wide.bytes:
            ask.future.set_exception(TooLarge(
                f"{ask.location} asks for {format_bytes(ask.memory)} ({ask.memory:,} bytes), and a worker of "
                f"{wide.name} has {format_bytes(wide.bytes)} ({wide.bytes:,} bytes) for one step. Use fewer workers "
                "with more memory each, or a cluster with larger workers."
            ))  # fmt: skip
            return
        self._enqueue(self._steps, ask)

    def _enqueue(self, queue: deque[Any], ask: ProgramAsk | StepAsk) -> None:
        with self._lock:
            closed = self._closed
            if closed is None:
                queue.append(ask)
        if closed is not None:
            ask.future.set_exception(closed)
        else:
            self._pump()

    def close(self) -> None:
        """End the cluster, if one was started; everything asked must have been answered."""
        self._leave(Interrupted("the run has ended"))

    def abort(self) -> None:
        """Leave at once: every waiting thread unwinds, engines in the middle of a circuit are killed."""
        driver_engine().kill()
        self._leave(Interrupted("the run was interrupted"))

    def _leave(self, reason: BaseException) -> None:
        with self._lock:
            self._closed = reason
            starting = self._starting
            asks: list[ProgramAsk | StepAsk] = [*self._programs, *self._steps, *self._flying]
            self._programs.clear()
            self._steps.clear()
        for ask in asks:
            if not ask.future.done():
                ask.future.set_exception(reason)
        if starting:
            self._ready.wait(15)
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    def _refuse_if_closed(self) -> None:
        if self._closed is not None:
            raise self._closed

    # -- at hand ---------------------------------------------------------------------------------------------------

    def _evaluate_here(self, ask: ProgramAsk) -> Evaluated:
        while True:
            self._refuse_if_closed()
            started = time.time()
            outcome = driver_engine().evaluate([ask.program], ask.timeout)[0]
            if isinstance(outcome, Outcome):
                return Evaluated(outcome, started, "driver", ask.attempt)
            ask.attempt, ask.tries = ask.attempt + 1, ask.tries + 1
            if not _worth_another_try(outcome, ask.tries):
                raise outcome

    # -- on the cluster --------------------------------------------------------------------------------------------

    def _wide_device(self) -> Device:
        """The cluster as a device: as it is once it runs, as it will be before a local one is started."""
        with self._lock:
            if self._wide is None:
                if self._address is None:
                    self._wide = _local_device(self._workers)
                else:
                    self._start_cluster()
        if self._wide is None:
            self._ready.wait()
            with self._lock:
                self._refuse_if_closed()
        assert self._wide is not None
        return self._wide

    def _start_cluster(self) -> None:
        with self._lock:
            if self._starting or self._cluster is not None or self._closed is not None:
                return
            self._starting = True
        threading.Thread(target=self._bring_up, name="hybridq-cluster", daemon=True).start()

    def _bring_up(self) -> None:
        begun = time.monotonic()
        try:
            # distributed takes over a second to import: a run that only replays never gets here
            from hybridq.cluster import Cluster

            if self._address is None and not self._guarded:
                raise WorkflowError(_UNGUARDED)
            cluster = Cluster(self._address, self._workers)
            wide = cluster.device()
        except BaseException as error:  # noqa: BLE001  # handed to every caller that waits for the cluster
            self._leave_without_cluster(error)
            return
        with self._lock:
            self._cluster, self._wide = cluster, wide
            self._starting = False
            self.cluster_seconds = time.monotonic() - begun
        self._progress.message(f"cluster ready in {self.cluster_seconds:.1f} s, dashboard {cluster.dashboard}")
        self._ready.set()
        self._pump()

    def _leave_without_cluster(self, error: BaseException) -> None:
        with self._lock:
            self._starting = False
            if self._closed is None:
                self._closed = error
            asks: list[ProgramAsk | StepAsk] = [*self._programs, *self._steps, *self._flying]
            self._programs.clear()
            self._steps.clear()
        self._ready.set()
        for ask in asks:
            _resolve(ask.future, lambda: _raise(error))

    def _pump(self) -> None:
        """Send what the placement lets go."""
        sends: list[Callable[[], None]] = []
        with self._lock:
            if self._closed is not None or not (self._programs or self._steps):
                return
            if self._cluster is None:
                self._start_cluster()
                return
            assert self._wide is not None
            while self._steps and self._steps_flying < _STEPS_AHEAD * self._wide.slots:
                step = self._steps.popleft()
                self._steps_flying += 1
                self._flying.add(step)
                sends.append(lambda step=step: self._send_step(step))  # type: ignore[misc]
            queue = list(self._programs)
            slots = _AHEAD * self._wide.slots - self._batches_flying
            placements = place([Waiting(need(a.program), False) for a in queue], [Free(self._wide, max(0, slots))])
            for refusal in placements.refusals:
                self._programs.remove(queue[refusal.program])
                sends.append(lambda r=refusal: queue[r.program].future.set_exception(r.error))  # type: ignore[misc]
            for batch in placements.batches:
                asks = [queue[i] for i in batch.programs]
                for ask in asks:
                    self._programs.remove(ask)
                self._flying.update(asks)
                self._batches_flying += 1
                sends.append(lambda asks=asks: self._send_batch(asks))  # type: ignore[misc]
        for send in sends:
            try:
                send()
            except Exception as error:  # noqa: BLE001  # the client takes no work: nothing would ever be answered
                self._leave_without_cluster(error)
                return

    def _send_batch(self, asks: list[ProgramAsk]) -> None:
        from hybridq.cluster import BYTES, SLOTS, run_batch

        cluster = self._cluster
        if cluster is None:
            return
        first = asks[0]
        others = f"+{len(asks) - 1}" if len(asks) > 1 else ""
        key = (f"quantum-{first.name}", f"{self._run}/{first.location}{others}", first.attempt)
        needs = {SLOTS: 1, BYTES: max(need(a.program).bytes for a in asks)}
        timeouts = [a.timeout for a in asks]
        timeout = None if None in timeouts else sum(t for t in timeouts if t is not None)
        started = time.time()

        def done(answer: Any, error: BaseException | None) -> None:
            with self._lock:
                self._batches_flying -= 1
                self._flying.difference_update(asks)
            if error is None:
                packed, where = answer
                outcomes = _outcomes(packed, len(asks), where)
            else:
                where, outcomes = "", [error] * len(asks)
            for ask, outcome in zip(asks, outcomes, strict=True):
                self._answer_program(ask, outcome, started, where)
            self._pump()

        cluster.submit(run_batch, (pack([a.program for a in asks]), timeout), key=key, needs=needs, done=done)

    def _answer_program(self, ask: ProgramAsk, outcome: Outcome | BaseException, started: float, where: str) -> None:
        if isinstance(outcome, Outcome):
            _resolve(ask.future, lambda: ask.finish(Evaluated(outcome, started, where, ask.attempt)))
            return
        ask.attempt, ask.tries = ask.attempt + 1, ask.tries + 1
        if _worth_another_try(outcome, ask.tries):
            with self._lock:
                if self._closed is None:
                    self._programs.appendleft(ask)
                    return
        _resolve(ask.future, lambda: _raise(outcome))

    def _send_step(self, ask: StepAsk) -> None:
        from hybridq.cluster import BYTES, run_step_task

        cluster = self._cluster
        if cluster is None:
            return
        key = (f"classical-{ask.name}", f"{self._run}/{ask.location}", ask.attempt)

        def done(reply: Any, error: BaseException | None) -> None:
            with self._lock:
                self._steps_flying -= 1
                self._flying.discard(ask)
            if error is None and reply.raised is not None and ask.attempt < ask.retries:
                with self._lock:
                    ask.attempt += 1
                    self._steps.append(ask)
            elif error is None:
                _resolve(ask.future, lambda: ask.finish(reply, ask.attempt))
            else:
                _resolve(ask.future, lambda: _raise(error))
            self._pump()

        overran = None
        if ask.timeout is not None:
            error = TimedOut(
                f"{ask.location} ran longer than its timeout of {ask.timeout:g} s; its worker was restarted."
            )
            overran = lambda: done(None, error)  # noqa: E731
        needs = {BYTES: ask.memory} if ask.memory else {}
        watched = None if ask.timeout is None else key
        arguments = (ask.call, str(ask.location), ask.seed, watched)
        cluster.submit(run_step_task, arguments, key=key, needs=needs, done=done, timeout=ask.timeout, overran=overran)


def _local_device(workers: int) -> Device:
    """The device that a local cluster of ``workers`` one-thread workers will be."""
    memory = psutil.virtual_memory().total // workers
    return Device("the local cluster", workers, worker_allowance(memory, 1), ROUND_TRIP)


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


def _worth_another_try(error: BaseException, tries: int) -> bool:
    return isinstance(error, (EngineFailed, WorkerLost)) and tries < _ATTEMPTS


def _raise(error: BaseException) -> Any:
    raise error


def _resolve(future: Future[Any], value: Callable[[], Any]) -> None:
    """Resolve ``future`` with what ``value()`` returns or raises."""
    if future.done():  # the run is being left
        return
    try:
        found = value()
    except BaseException as error:  # noqa: BLE001  # raised where the future is waited for
        future.set_exception(error)
    else:
        future.set_result(found)
