"""In a driver: follows the journal of its run and tells the cluster's scheduler, twice a second, what has changed.

The run's own threads only put each record into a queue; folding and sending are a thread's of its own, which takes at
most one part in fifty of a processor. A run never fails and never waits for it, but for a second at its end. Until the
run has a cluster nothing is followed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import threading
import time
from asyncio import CancelledError
from collections import deque
from typing import TYPE_CHECKING, Any

from hybridq.history import History, LoopHistory, RunHistory
from hybridq.journal import Journal, Record, load_value, read_records
from hybridq.monitor.store import TOPIC, VERSION
from hybridq.resources import idle_bytes

if TYPE_CHECKING:
    from hybridq.cluster import Cluster
    from hybridq.dispatch import Dispatcher
    from hybridq.progress import Progress

__all__ = ["Feed"]

_EVERY = 0.5
_SHARE = 50
"""Between looks it rests so many times as long as the last one took of a processor."""
_SLOWEST = 10.0
"""Seconds between looks at most."""
_BEAT = 5.0
"""Seconds after which it says that it is there though nothing changed."""
_LOOPS = 200
"""Of so many loops a message tells; of further ones the next does."""
_POINTS, _SPANS, _FAULTS = 100, 400, 50
_SPANS_EVERY = 1.0
_END_SECONDS = 1.0
_TEXT = 300


class Feed:
    """Tells of one open run until it is closed."""

    def __init__(self, name: str, journal: Journal, dispatcher: Dispatcher, progress: Progress) -> None:
        self._name, self._journal, self._dispatcher, self._progress = name, journal, dispatcher, progress
        host = socket.gethostname()
        place = hashlib.sha256(f"{host}:{journal.directory.resolve()}".encode()).hexdigest()[:8]
        self._id, self._driver = f"{name}@{place}", f"{host}:{os.getpid()}"
        self._queue: deque[tuple[int, Record]] = deque()
        self._history: History | None = None
        self._told: Cluster | None = None
        """The cluster that knows all that was told so far."""
        self._link = ""
        self._rows: dict[int, int] = {}
        """Of each loop, the last row that was told."""
        self._changed: dict[int, LoopHistory] = {}
        self._spans: Any = None
        self._spans_at = self._beat_at = 0.0
        self._last: Any = None
        self._taken = True
        """Whether the scheduler shows what it is told, as far as is known."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hybridq-monitor", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads: the run may do without this one
            self._ended.set()
            progress.message(f"this run is not monitored ({error})")

    def close(self) -> None:
        """Tell how the run was left, if a cluster that outlives it can be told, within a second."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(_END_SECONDS)
        self._journal.follow(None)

    def _run(self) -> None:
        pause = _EVERY
        try:
            while not self._ended.wait(pause):
                begun = time.thread_time()
                self._look()
                pause = min(_SLOWEST, max(_EVERY, _SHARE * (time.thread_time() - begun)))
            cluster = self._dispatcher.cluster
            if self._taken and cluster is not None and not cluster.own:
                self._look()
        except Exception as error:  # noqa: BLE001  # whatever it is, the run goes on without its monitoring
            self._journal.follow(None)
            self._queue.clear()
            if not self._ended.is_set():
                self._progress.message(f"monitoring has ended ({type(error).__name__}: {error}); the run goes on")

    def _look(self) -> None:
        cluster = self._dispatcher.cluster
        if cluster is None or not cluster.connected:
            if self._history is not None:
                self._take()  # what is queued does not grow while there is no cluster
            return
        history = self._followed()
        try:
            if cluster is not self._told:
                if not self._mount(cluster):
                    return
                self._changed = {loop.line: loop for loop in history.run().loops}
                self._rows.clear()
                self._last = self._spans = None
            self._take()
            self._tell(cluster, history.run(details=False), full=cluster is not self._told)
            self._told = cluster
        except (Exception, CancelledError) as error:  # of a connection that ends, of any kind
            self._told = None  # if the scheduler comes back, it is told all
            here = cluster.connected and self._dispatcher.cluster is cluster
            if here and not isinstance(error, (OSError, TimeoutError, CancelledError)):
                raise

    def _followed(self) -> History:
        """The run's history from its first record on: what is on disk, then what comes."""
        if self._history is None:
            directory = self._journal.directory
            history = History(functools.partial(load_value, directory), points=_POINTS, spans=_SPANS, faults=_FAULTS)
            line = self._journal.follow(self._queue)
            for number, record in read_records(directory):
                if number <= line:
                    history.take(number, record)
            history.changed()
            self._history = history
        return self._history

    def _take(self) -> None:
        assert self._history is not None
        while self._queue:
            self._history.take(*self._queue.popleft())
        self._changed.update((loop.line, loop) for loop in self._history.changed())

    def _mount(self, cluster: Cluster) -> bool:
        """See to it that the scheduler shows what it is told; whether it can."""
        from hybridq.monitor.plugin import MOUNTED, Monitor

        again = self._told is None and self._link != ""
        try:
            cluster.client.register_plugin(Monitor())
            _, shown = cluster.client.get_events(MOUNTED)[-1]
        except (OSError, TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001  # such as a scheduler without hybridq
            if not self._ended.is_set():
                self._progress.message(
                    f"no page for this run in the dashboard: its scheduler takes none ({type(error).__name__}: {error})"
                )
            self._taken = False
            self._ended.set()
            self._journal.follow(None)
            return False
        link = cluster.dashboard.rpartition("/")[0] + "/hybridq"
        if shown["page"]:
            if not (again and link == self._link):
                why = f", without figures: {shown['why']}" if shown["why"] else ""
                self._progress.message(f"the run is shown at {link}{why}")
        else:
            self._progress.message(f"no page for this run in the dashboard: {shown['why']}")
        self._link = link
        return True

    def _tell(self, cluster: Cluster, run: RunHistory, *, full: bool) -> None:
        from hybridq.monitor.plugin import pack

        now, clock = time.time(), time.monotonic()
        loads, waiting, seconds = self._dispatcher.loads()
        devices = [
            [load.device.name, load.device.slots, load.busy, load.ahead,
             load.reserved + (idle_bytes(load.device.slots) if load.worker else 0), load.device.bytes]
            for load in loads
        ]  # fmt: skip
        incidents = list(self._dispatcher.incidents)
        if not full and clock - self._beat_at < _BEAT and not self._changed:
            last = (run.lines, devices, waiting, len(incidents) and incidents[-1])
            if last == self._last:
                return
        self._last = (run.lines, devices, waiting, len(incidents) and incidents[-1])
        self._beat_at = clock
        busy = dict.fromkeys(("quantum", "classical"), 0.0)
        for span in run.spans:
            busy[span.kind] += span.busy
        told = list(self._changed.items()) if full else list(self._changed.items())[:_LOOPS]
        message = {
            "v": VERSION, "id": self._id, "run": self._name, "workflow": run.workflow[:_TEXT], "driver": self._driver,
            "full": full, "time": now, "clock": clock, "began": run.sessions[-1].began if run.sessions else now,
            "state": run.status if run.status != "planned" else "finished", "error": (run.error or "")[:_TEXT],
            "totals": {
                "evaluations": run.evaluations, "steps": run.steps, "shots": run.shots, "retries": run.retries,
                "failures": run.failures, **busy,
            },
            "loops": [self._loop(loop) for _, loop in told[:_LOOPS]],
            "devices": devices, "queue": {"waiting": waiting, "seconds": seconds},
            "notes": [
                *([f.began, "failed", f.at[:_TEXT], f"{f.type}: {f.message}"[:_TEXT]] for f in run.faults),
                *([i.time, i.what, i.at[:_TEXT], i.reason[:_TEXT]] for i in incidents),
            ],
        }  # fmt: skip
        if run.spans != self._spans and (full or clock - self._spans_at > _SPANS_EVERY or run.status != "running"):
            self._spans, self._spans_at = run.spans, clock
            message["spans"] = [
                [s.where[:_TEXT], round(s.began, 4), round(s.seconds, 4), s.kind, s.group[:_TEXT], s.calls]
                for s in run.spans
            ]
        sent = message
        for first in range(0, max(1, len(told)), _LOOPS):
            if first:  # of a run of many loops, told whole
                keys = ("v", "id", "run", "workflow", "driver", "time", "clock", "began", "state", "error")
                sent = {key: message[key] for key in keys}
                sent["loops"] = [self._loop(loop) for _, loop in told[first : first + _LOOPS]]
            cluster.tell(TOPIC, pack(sent))
            for line, loop in told[first : first + _LOOPS]:
                self._changed.pop(line, None)
                self._rows[line] = loop.curve[-1].row if loop.curve else -1

    def _loop(self, loop: LoopHistory) -> dict[str, Any]:
        """A loop as the store takes it, with the points that were not told yet."""
        known, reference = self._rows.get(loop.line, -1), loop.reference
        return {
            "at": loop.at[:_TEXT], "group": loop.group[:_TEXT], "state": loop.state, "method": loop.method[:_TEXT],
            "rows": loop.rows, "best": loop.best, "last": loop.last, "stderr": loop.best_stderr or 0.0,
            "seconds": loop.seconds, "limit": loop.bound,
            "where": loop.where[:_TEXT], "reference": None if reference is None else reference.value,
            "source": "" if reference is None else reference.source[:_TEXT],
            "unit": "" if reference is None else reference.unit[:_TEXT],
            "points": [[p.row, p.value, p.stderr, p.best] for p in loop.curve if p.row > known],
        }  # fmt: skip
