"""On a Dask scheduler: takes in what drivers tell of their runs, and shows it as a page, as JSON and as metrics.

What it needs of Dask to put a page into the dashboard is private there, so each part is tried by itself: where the page
with figures is not to be had, a plain one takes its place; where that is not, the JSON; and the driver is told.
"""

from __future__ import annotations

import asyncio
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

from hybridq.monitor import tables
from hybridq.monitor.store import MEASURED, TOPIC, Run, Store, document

__all__ = ["MOUNTED", "Monitor", "pack", "unpack"]

MOUNTED = "hybridq-mounted"
"""Topic of the event by which the scheduler says what it shows: ``{"page": "figures" | "plain" | "", "why": ...}``."""
_MAX_MESSAGE = 2**24
"""Bytes of a message, unpacked."""
_METRIC_RUNS, _METRIC_GROUPS = 16, 16
"""Metrics have labels for so many runs, and groups of each: a time series is kept for every label ever seen."""

_log = logging.getLogger("distributed.hybridq")
_shown: WeakKeyDictionary[Scheduler, dict[str, str]] = WeakKeyDictionary()
"""What was mounted on a scheduler: routes stay when a plugin goes."""
_plugins: WeakSet[Monitor] = WeakSet()


def pack(message: Mapping[str, Any]) -> bytes:
    """A message as it travels: JSON, compressed, because the scheduler keeps the last thousand."""
    return zlib.compress(json.dumps(message, separators=(",", ":")).encode(), 1)


def unpack(packed: bytes) -> dict[str, Any]:
    """The message that `pack` was given. Raises ValueError for anything else."""
    try:
        stream = zlib.decompressobj()
        text = stream.decompress(packed, _MAX_MESSAGE)
        if not stream.eof:
            raise ValueError(f"a message is cut off, or longer than {_MAX_MESSAGE:,} bytes")
        found = json.loads(text)
    except (zlib.error, TypeError, RecursionError) as error:
        raise ValueError(f"a message cannot be unpacked ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"a message is a {type(found).__name__}, not an object")
    return found


class Monitor(SchedulerPlugin):
    """Keeps what drivers tell of their runs for as long as the scheduler lives; see `Store` for its bounds."""

    name = "hybridq-monitor"
    idempotent = True  # a second driver finds the runs of the first

    def __init__(self) -> None:
        self.scheduler: Scheduler | None = None
        self.store = Store()
        self.unread = 0
        """Messages that could not be read."""

    async def start(self, scheduler: Scheduler) -> None:
        """Mount page, JSON and metrics; what goes wrong there is said, and never keeps a driver from its run."""
        self.scheduler = scheduler
        _plugins.add(self)
        mounted = _shown.get(scheduler)
        if mounted is None:
            mounted = _shown[scheduler] = _mount(scheduler)
        _collect()
        scheduler.log_event(MOUNTED, mounted)

    async def close(self) -> None:
        """Take the metrics of a scheduler that ends out of those of its process."""
        _plugins.discard(self)

    def log_event(self, topic: str, msg: Any) -> None:
        """Take in a message. One that cannot be read is counted and left."""
        if topic != TOPIC:
            return
        try:
            self.store.fold(unpack(msg), monotonic())
        except ValueError as error:
            self.unread += 1
            if self.unread == 1:
                _log.warning("hybridq: %s", error)

    def runs(self) -> tuple[Run, ...]:
        """All runs that are kept, as they are now."""
        return self.store.runs(monotonic())

    @property
    def state(self) -> tuple[int, int]:
        """Differs whenever what is to be shown does."""
        return self.store.version, self.store.silent(monotonic())

    def names(self) -> dict[str, str]:
        """The names of workers by their addresses."""
        workers = self.scheduler.workers if self.scheduler is not None else {}
        return {address: str(worker.name) for address, worker in workers.items()}

    def memory(self) -> dict[str, tuple[int, int]]:
        """Of each worker by address: bytes that it and its engine processes take, as it last said, and its limit."""
        found = {}
        for address, worker in (self.scheduler.workers if self.scheduler is not None else {}).items():
            engines = worker.metrics.get(MEASURED, 0)
            found[address] = (int(worker.metrics.get("memory", 0)) + int(engines), int(worker.memory_limit or 0))
        return found


def plugin_of(scheduler: Scheduler) -> Monitor | None:
    """The plugin that is there now."""
    found = scheduler.plugins.get(Monitor.name)
    return found if isinstance(found, Monitor) else None


def _mount(scheduler: Scheduler) -> dict[str, str]:
    """Mount what can be had; what that is, and why not more."""
    why = ""
    prefix = ""
    figures = plain = False
    try:
        prefix = _mount_figures(scheduler)
        figures = True
    except Exception as error:  # noqa: BLE001  # private names of other versions fail in any way
        why = f"the dashboard takes no page of ours ({type(error).__name__}: {error})"
    try:
        _mount_plain(scheduler, prefix, None if figures else why)
        plain = True
    except Exception as error:  # noqa: BLE001  # as above
        why = f"{why}; its HTTP server takes none either ({type(error).__name__}: {error})".lstrip("; ")
    return {"page": "figures" if figures else "plain" if plain else "", "why": why}


def _mount_figures(scheduler: Scheduler) -> str:
    """Mount the page with figures beside Dask's own, with a link in the navigation bar; the prefix of their paths."""
    from distributed.dashboard.core import BokehApplication
    from distributed.dashboard.scheduler import template_variables
    from tornado.ioloop import IOLoop

    from hybridq.monitor.page import show

    dashboards = [app for app in scheduler.http_application.applications if hasattr(app, "app_paths")]
    if not dashboards:
        raise RuntimeError("the scheduler runs without a dashboard")
    prefix = dashboards[0].prefix.strip("/")
    variables = template_variables(scheduler)
    application = BokehApplication(
        {"/hybridq": partial(show, plugin_of)}, scheduler, prefix=prefix, template_variables=variables
    )
    scheduler.http_application.add_application(application)
    application.initialize(IOLoop.current())
    application.start()
    if "hybridq" not in variables["pages"]:  # the list that the templates of Dask's own pages have
        variables["pages"].insert(0, "hybridq")
    return str(prefix)


def _mount_plain(scheduler: Scheduler, prefix: str, why: str | None) -> None:
    """Mount the JSON and, where there is a reason ``why`` it has no figures, the plain page."""
    from distributed.http.utils import RequestHandler

    class Numbers(RequestHandler):
        async def get(self) -> None:
            plugin = plugin_of(self.server)
            runs = plugin.runs() if plugin is not None else ()
            self.set_header("Content-Type", "application/json")
            memory = plugin.memory() if plugin is not None else {}
            names = plugin.names() if plugin is not None else {}
            workers = [
                {"address": at, "name": names[at], "measured": measured, "limit": limit}
                for at, (measured, limit) in memory.items()
            ]
            unread = plugin.unread if plugin is not None else 0
            self.write('{"runs":')
            for piece in document(runs):
                self.write(piece)
                await asyncio.sleep(0)  # the scheduler's own work comes first
            self.write(f',"workers":{json.dumps(workers)},"unread":{unread}}}')

    class Plain(RequestHandler):
        def get(self) -> None:
            plugin = plugin_of(self.server)
            runs, names = ((), {}) if plugin is None else (plugin.runs(), plugin.names())
            self.write(tables.page(runs, names, why or ""))

    base = f"/{prefix}/" if prefix else "/"
    routes: list[Any] = [(rf"{base}hybridq\.json", Numbers, {"dask_server": scheduler})]
    if why is not None:
        routes.append((rf"{base}hybridq", Plain, {"dask_server": scheduler}))
    scheduler.http_application.add_handlers(r".*", routes)


# -- metrics ---------------------------------------------------------------------------------------------------------


class _Collector:
    """Numbers of all runs for Prometheus; made anew at each reading."""

    def describe(self) -> list[Any]:
        """Nothing: the names depend on no reading, and registering takes none."""
        return []

    def collect(self) -> Iterator[Any]:
        """The metric families as they are now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        runs = [run for plugin in list(_plugins) for run in plugin.runs()][:_METRIC_RUNS]
        of_run, of_group = ["run"], ["run", "group"]
        best = GaugeMetricFamily("hybridq_best_value", "Best value of a group of loops, in its unit", labels=of_group)
        error = GaugeMetricFamily("hybridq_error", "Best value minus reference, of the loop farthest from it",
                                  labels=of_group)  # fmt: skip
        iterations = CounterMetricFamily("hybridq_iterations", "Evaluations of objectives", labels=of_group)
        loops = GaugeMetricFamily("hybridq_loops", "Loops by state", labels=["run", "group", "state"])
        families = [best, error, iterations, loops]
        counters = {
            "evaluations": "Quantum evaluations", "steps": "Classical steps", "shots": "Shots", "retries": "Retries",
            "failures": "Failures",
        }  # fmt: skip
        counted = {
            n: CounterMetricFamily(f"hybridq_{n}", text, labels=of_run) for n, text in counters.items()
        }  # fmt: skip
        seconds = CounterMetricFamily("hybridq_busy_seconds", "Seconds that calls ran", labels=["run", "kind"])
        queue = GaugeMetricFamily("hybridq_queue", "Calls that wait", labels=of_run)
        busy = GaugeMetricFamily("hybridq_busy_slots", "Slots at work", labels=of_run)
        slots = GaugeMetricFamily("hybridq_slots", "Slots of all devices", labels=of_run)
        running = GaugeMetricFamily("hybridq_running", "Whether the run is in progress", labels=of_run)
        for run in runs:
            for group in run.groups[:_METRIC_GROUPS]:
                label = [run.id, group.name]
                if group.best is not None:
                    best.add_metric(label, group.best)
                if group.error is not None:
                    error.add_metric(label, group.error)
                iterations.add_metric(label, group.rows)
                for state in ("running", "finished", "failed"):
                    loops.add_metric([*label, state], getattr(group, state))
            for name, family in counted.items():
                family.add_metric([run.id], getattr(run.totals, name))
            seconds.add_metric([run.id, "quantum"], run.totals.quantum)
            seconds.add_metric([run.id, "classical"], run.totals.classical)
            queue.add_metric([run.id], run.queue.waiting)
            busy.add_metric([run.id], sum(device.busy for device in run.devices))
            slots.add_metric([run.id], sum(device.slots for device in run.devices))
            running.add_metric([run.id], run.state == "running")
        yield from (*families, *counted.values(), seconds, queue, busy, slots, running)


_collector: list[_Collector] = []


def _collect() -> None:
    """Register the metrics once in the process, if prometheus_client is there: Dask's own page then shows them."""
    try:
        from prometheus_client import REGISTRY
    except ImportError:
        return
    if not _collector:
        _collector.append(_Collector())
        REGISTRY.register(_collector[0])
