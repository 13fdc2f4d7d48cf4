"""Optimizer loops that run where their evaluations do: given as data, advanced for a while, continued anywhere.

A loop advances in slices. Between two slices its optimizer waits in a thread; where that thread is not (another
process, a restart), the optimizer's own arithmetic runs again against the points so far, which is cheap and gives the
same bits. So nothing of an optimizer is ever serialised.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridq.errors import HybridqError, NotFinite, Unhashable
from hybridq.location import Location, seed_key
from hybridq.program import Outcome, Program, single
from hybridq.values import Encoded, encode

__all__ = ["Advance", "Loop", "Loops", "Point", "encode_result", "settings_as_data"]

Array = NDArray[Any]

_PART_SECONDS = 5e-3  # between two parts: telling one costs a hundredth of it, and recording it goes on beside the loop
_SUSPENDED = 64  # loops whose optimizers wait in this process, the least recently advanced dropped first


@dataclass(frozen=True, eq=False)
class Loop:
    """A minimization as data: what is evaluated at each point, and scipy's settings."""

    token: str
    """Names it among all loops that a process may ever meet."""
    program: Program
    """The evaluation at the start point, which is its theta, shape (1, P)."""
    objective: str
    """Location of the evaluations, without their number: ``run/minimize[0]/energy``."""
    seed: int
    method: str | None
    settings: Mapping[str, Any]
    """``bounds``, ``tol`` and ``options`` of ``scipy.optimize.minimize``, as JSON data."""


@dataclass(frozen=True, eq=False)
class Point:
    """One evaluation of a loop."""

    x: Array
    """Shape (P,), radians."""
    value: float
    stderr: float
    gradient: Array | None
    seconds: float
    started: float | None = None
    """Seconds since 1970; None if that is not recorded."""


@dataclass(frozen=True, eq=False)
class Advance:
    """What a slice of a loop came to."""

    state: str
    """``more``; ``done``, with the result; ``lost`` if the points so far are needed to go on; ``stopped`` if the
    optimizer or an evaluation raised: whoever asked meets that by running the loop over its points."""
    points: tuple[Point, ...]
    """The new ones."""
    first: int = 0
    """Number of the first of them among all points of the loop."""
    result: Encoded | None = None
    left_out: tuple[str, ...] = ()
    """Members of the result that are not data."""


def encode_result(found: Any) -> tuple[Encoded, tuple[str, ...]]:
    """An ``OptimizeResult`` as data, and the names of members that are not data and were left out."""
    from scipy.optimize import OptimizeResult

    try:
        return encode(OptimizeResult(found)), ()
    except Unhashable:
        pass
    kept, left_out = OptimizeResult(), []
    for key, value in found.items():
        try:
            encode(OptimizeResult({key: value}))
        except Unhashable:
            left_out.append(key)
        else:
            kept[key] = value
    return encode(kept), tuple(left_out)


class Loops:
    """The loops that wait in this process. ``evaluate`` evaluates programs with this process' engines."""

    def __init__(self, evaluate: Callable[[Sequence[Program]], list[Outcome | HybridqError]]) -> None:
        self._evaluate = evaluate
        self._waiting: OrderedDict[str, _Running] = OrderedDict()
        self._idle: list[_Thread] = []

    def advance(self, loop: Loop, known: int, points: Sequence[Point] | None, seconds: float,
                part: Callable[[Advance], None] | None = None) -> Advance:  # fmt: skip
        """Go on with ``loop`` after its first ``known`` points for about ``seconds``, at least one evaluation.

        ``points`` are those, or None where this process is thought to have them. ``part`` is given the new points
        every few milliseconds, those since the last call of it: what is returned has the rest.
        """
        running = self._waiting.pop(loop.token, None)
        if running is not None and running.count != known:
            self._idle.append(running.drop())
            running = None
        if running is None:
            if points is None and known:
                return Advance("lost", ())
            running = _Running(loop, points or (), self._evaluate, self._idle.pop() if self._idle else _Thread())
        found = running.advance(seconds, part)
        if found.state == "more":
            self._waiting[loop.token] = running
            while len(self._waiting) > _SUSPENDED:
                self._idle.append(self._waiting.popitem(last=False)[1].drop())
        else:
            self._idle.append(running.thread)
        return found


class _Thread:
    """A thread that runs one loop after another: to start one takes as long as some evaluations."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._serve, name="hybridq-loop", daemon=True).start()

    def run(self, body: Callable[[], None]) -> None:
        """Call ``body``, which does not raise, in the thread; others that were asked for come first."""
        self._asked.put(body)

    def _serve(self) -> None:
        while True:
            body = self._asked.get()
            body()
            del body  # with all that a loop holds


class _Dropped(BaseException):
    """Unwinds the thread of a loop that nobody will continue here."""


class _Running:
    """An optimizer in a thread, of which either that thread or the caller runs, never both."""

    def __init__(
        self,
        loop: Loop,
        points: Sequence[Point],
        evaluate: Callable[[Sequence[Program]], list[Outcome | HybridqError]],
        thread: _Thread,
    ) -> None:
        self._loop, self._old, self._evaluate = loop, points, evaluate
        self.count = len(points)
        """Points that are known to whoever asked."""
        self._new: list[Point] = []
        self._i = 0
        self._deadline = self._next = 0.0
        self._part: Callable[[Advance], None] | None = None
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._dropped = False
        self._end: Advance | None = None
        self._location = Location(loop.objective)
        self._seeded = bool(loop.program.seeds.any())
        """Whether each evaluation has random numbers of its own."""
        self.thread = thread
        """Free for another loop when this one is at its end, or dropped."""
        thread.run(self._run)

    def advance(self, seconds: float, part: Callable[[Advance], None] | None) -> Advance:
        now = time.perf_counter()
        self._deadline, self._next, self._part = now + seconds, now + _PART_SECONDS, part
        self._go.release()
        self._paused.acquire()
        first, points = self._taken()
        if self._end is None:
            return Advance("more", points, first)
        return replace(self._end, points=points, first=first)

    def _taken(self) -> tuple[int, tuple[Point, ...]]:
        """The new points, which are known to whoever asked from now on, and the number of the first of them."""
        first, points, self._new = self.count, tuple(self._new), []
        self.count += len(points)
        return first, points

    def drop(self) -> _Thread:
        """Give the loop up; its thread, which is free."""
        self._dropped = True
        self._go.release()
        self._paused.acquire()
        return self.thread

    def _run(self) -> None:
        from scipy import optimize

        loop = self._loop
        start: Array = loop.program.theta[0]
        settings = loop.settings
        self._go.acquire()
        try:
            if not self._dropped:
                found = optimize.minimize(
                    self._objective, start.copy(), (), loop.method, loop.program.plan.gradient != "none" or None,
                    bounds=settings.get("bounds"), tol=settings.get("tol"), options=settings.get("options"),
                )  # fmt: skip
                if self._part is not None and self._new:  # they are recorded while the result is encoded
                    first, points = self._taken()
                    self._part(Advance("more", points, first))
                encoded, left_out = encode_result(found)
                self._end = Advance("done", (), 0, encoded, left_out)
        except _Dropped:
            return
        except Exception:  # noqa: BLE001  # met again, and told, by whoever asked
            self._end = Advance("stopped", ())
        finally:
            self._paused.release()

    def _objective(self, x: Any) -> Any:
        i, self._i = self._i, self._i + 1
        point = np.array(x, dtype=np.float64)
        if i < len(self._old):
            known = self._old[i]
            if known.x.tobytes() != point.tobytes():
                raise NotFinite("the optimizer did not repeat its points")
            return known.value if known.gradient is None else (known.value, known.gradient.copy())
        if self._new:
            now = time.perf_counter()
            if now >= self._deadline:
                self._paused.release()
                self._go.acquire()
                if self._dropped:
                    raise _Dropped
            elif self._part is not None and now >= self._next:
                first, points = self._taken()
                self._part(Advance("more", points, first))
                self._next = now + _PART_SECONDS
        if not np.isfinite(point).all():
            raise NotFinite(f"the optimizer asked for evaluation {i} at {point.tolist()}")
        started, begun = time.time(), time.perf_counter()
        program = self._program(i, point)
        (outcome,) = self._evaluate([program])
        if not isinstance(outcome, Outcome):
            raise outcome
        found = single(program, outcome)
        assert found is not None, "a loop's evaluations are of one value"
        value, stderr, gradient = found
        self._new.append(Point(point, value, stderr, gradient, time.perf_counter() - begun, started))
        return value if gradient is None else (value, gradient.copy())

    def _program(self, i: int, point: Array) -> Program:
        first, seeds = self._loop.program, self._loop.program.seeds
        if self._seeded:
            parent = self._location.parent
            at = Location(self._location.name) if parent is None else parent.child(self._location.name, i)
            seeds = np.array([seed_key(self._loop.seed, at, 0)], dtype=np.uint64)
        return Program(
            first.template, point[None], first.shots, seeds, first.plan, first.batch_shape, first.observables_shape
        )  # fmt: skip


def settings_as_data(bounds: Any, tol: Any, options: Any) -> Mapping[str, Any] | None:
    """Settings of scipy as JSON data, or None if they are not."""
    if bounds is not None and not isinstance(bounds, (list, tuple)):
        try:  # scipy.optimize.Bounds, or an array of pairs
            pairs = zip(np.asarray(bounds.lb).tolist(), np.asarray(bounds.ub).tolist(), strict=True)
            bounds = [[b if np.isfinite(b) else None for b in pair] for pair in pairs]
        except (AttributeError, TypeError, ValueError):
            return None
    settings = {"bounds": bounds, "tol": tol, "options": None if options is None else dict(options)}
    try:
        same: Any = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError):
        return None
    return dict(same)
