"""A Dask cluster: started or joined, fitted with engine processes, asked to run things; the only user of Dask."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

import dask
import psutil
from dask.base import annotate
from distributed import CancelledError, Client, KilledWorker, LocalCluster, Worker, get_worker
from distributed.comm.addressing import get_address_host_port, parse_address
from distributed.deploy.cluster import Cluster as AnyCluster
from distributed.diagnostics.plugin import WorkerPlugin

from hybridq.engines import frames
from hybridq.engines.process import EngineProcess
from hybridq.engines.wire import Batch
from hybridq.errors import ClusterLost, NoDevice, WorkerLost, WorkflowError
from hybridq.monitor.store import MEASURED
from hybridq.policies import Device
from hybridq.resources import KINDS, ROUND_TRIP, worker_allowance
from hybridq.sites import Site
from hybridq.steps import StepReply, run_step

__all__ = ["SELDOM", "Cluster", "Seen", "look", "run_batch", "run_loop", "run_steps"]

BYTES = "hybridq-bytes"
"""Dask resource that carries the memory ledger of a worker."""
SLOTS = "hybridq-engines"
"""Dask resource that counts a worker's engine processes."""
_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 10
_KILLED_SECONDS = 1.0
"""For so long a cluster is waited for whose workers were killed."""
_RESTART_SECONDS = 2.0
"""A nanny that has had no worker for so long, and has no process that may become one, has given up."""
_START_SECONDS = 60.0
"""A nanny that has had no worker for so long is replaced, whatever its process does."""
_BEGAN = "hybridq-began"
"""Topic of the events by which workers say that a step with a timeout began."""
Key: TypeAlias = tuple[str, str, int]
"""Of a task: (group, "run/location", attempt); what is before the group's dash gives colour and row in the Dask
dashboard."""
SELDOM = {"distributed.admin.tick.interval": "500ms", "distributed.worker.profile.interval": "100ms"}
"""How often Dask processes of our own look at themselves: every 20 and 10 ms takes 5 to 8 % of a core in each, with
nothing to do."""
_COMPARED = ("hybridq-scheduler", "qiskit", "qiskit-aer", "numpy", "scipy", "distributed", "cloudpickle")


class _Pool:
    """Engine processes that are free, and which one has which loop's optimizer waiting."""

    def __init__(self, engines: Sequence[EngineProcess]) -> None:
        self._free = list(engines)
        self._last: dict[EngineProcess, str | None] = dict.fromkeys(engines)
        self._changed = threading.Condition()

    def take(self, token: str | None = None) -> EngineProcess:
        """A free engine, waited for; the one that last had the loop ``token``, if it is free."""
        with self._changed:
            while not self._free:
                self._changed.wait()
            best = next((e for e in self._free if token is not None and self._last[e] == token), self._free[0])
            self._free.remove(best)
            return best

    def give(self, engine: EngineProcess, token: str | None = None) -> None:
        """Put an engine back."""
        with self._changed:
            if token is not None:
                self._last[engine] = token
            self._free.append(engine)
            self._changed.notify()


class EnginePlugin(WorkerPlugin):
    """Gives a worker its engine processes, one for each thread, and its share of the memory ledger."""

    name = "hybridq-engines"
    idempotent = True  # a second driver on the same cluster finds the engines of the first

    def __init__(self, path: tuple[str, ...]) -> None:
        self._path = path

    async def setup(self, worker: Worker) -> None:
        """Start the engine processes (they load while the worker goes on) and announce the resources."""
        sys.path.extend(p for p in self._path if p not in sys.path and Path(p).is_dir())
        slots = worker.state.nthreads
        limit = worker.memory_manager.memory_limit or psutil.virtual_memory().total
        allowance = worker_allowance(limit, slots)
        self._all = [EngineProcess(allowance, name=f"{worker.name}-{i}") for i in range(slots)]
        for engine in self._all:
            engine.start()
        self.engines = _Pool(self._all)
        worker.metrics[MEASURED] = lambda _: sum(engine.resident for engine in self._all)
        await worker.set_resources(**{BYTES: allowance, SLOTS: slots})

    async def teardown(self, worker: Worker) -> None:
        """End the engine processes with the worker."""
        for engine in self._all:
            engine.kill()


def run_batch(batch: Batch, timeout: float | None, expected: int) -> tuple[bytes, str]:
    """On a worker: evaluate a packed batch in one of its engine processes; the packed outcomes and the worker's name.

    ``expected`` are the bytes that it is predicted to take.

    Waiting for the engine releases the GIL, so the worker's heartbeats go on through the longest circuit.
    """
    worker = get_worker()
    plugin = worker.plugins[EnginePlugin.name]
    assert isinstance(plugin, EnginePlugin)
    engines = plugin.engines
    engine = engines.take()
    try:
        return engine.run(batch, timeout, expected=expected), str(worker.name)
    finally:
        engines.give(engine)


def run_loop(batch: Batch, token: str, timeout: float | None, expected: int) -> tuple[bytes, str, str]:
    """On a worker: run a packed slice of a loop; what it came to, packed, and the worker's name and address."""
    worker = get_worker()
    plugin = worker.plugins[EnginePlugin.name]
    assert isinstance(plugin, EnginePlugin)
    engine = plugin.engines.take(token)
    try:
        return engine.run(batch, timeout, frames.ADVANCE, expected=expected), str(worker.name), worker.address
    finally:
        plugin.engines.give(engine, token)


def run_steps(calls: Sequence[tuple[bytes, str]], seed: int, watched: Key | None) -> list[StepReply]:
    """On a worker: run packed steps, (call, location) each, one after the other; each has a reply of its own.

    The driver is told when one whose time is ``watched`` begins.
    """
    worker = get_worker()
    if watched is not None:
        worker.log_event(_BEGAN, list(watched))
    return [run_step(call, location, seed, str(worker.name)) for call, location in calls]


@dataclass
class _Asked:
    """A task in flight."""

    future: Any
    done: Callable[[Any, BaseException | None], None]
    timeout: float | None
    overran: Callable[[], None] | None
    on: str
    timer: threading.Timer | None = None


class Cluster:
    """A running Dask cluster that has hybridq's plugin.

    ``site.cluster`` is None for one of our own on this machine, a scheduler's address, a ``distributed.Client``, or a
    cluster object of Dask's.
    Raises `NoDevice` if nobody answers or a worker cannot run hybridq, and `WorkflowError` for skewed versions.
    """

    def __init__(self, site: Site) -> None:
        address = site.cluster
        self._own: _Workers | None = None
        self._own_client = not isinstance(address, Client)
        self._asked: dict[Key, _Asked] = {}
        self._gone: set[str] = set()
        """Workers that were lost and have not come back."""
        self._missed: dict[Any, float] = {}
        """Since when nannies of our own have had no worker that is known, by name; by the monotonic clock."""
        self._over = False
        """Whether nothing is sent there any more."""
        self._lock = threading.Lock()
        self._arrived: SimpleQueue[tuple[Key, Any, BaseException | None] | None] = SimpleQueue()
        if address is None:
            self._own = _start_local(site)
            self.client = Client(self._own)
        elif isinstance(address, Client):
            if address.status not in ("running", "connecting"):
                raise NoDevice(f"the client that was given as the cluster is {address.status}; give one that is open.")
            self.client = address
        else:
            self.client = _connect(address, allow_unencrypted=site.allow_unencrypted)
        self._scalable = self.client.cluster
        try:
            _check_encrypted(self.address, allowed=site.allow_unencrypted)
            if self._own is None:
                _compare_versions(self.client)
            self.client.register_plugin(EnginePlugin(_user_path()))
        except BaseException:
            self.close()
            raise
        assert self.client.loop is not None
        self._loop = self.client.loop
        self._scheduler = _identity(self.client)["id"]
        self.client.subscribe_topic(_BEGAN, self._began)
        threading.Thread(target=self._collect, name="hybridq-collector", daemon=True).start()

    @property
    def dashboard(self) -> str:
        """Address of the Dask dashboard, or an empty string if it has none."""
        return str(self.client.dashboard_link or "")

    @property
    def connected(self) -> bool:
        """Whether the scheduler was not lost, as far as is known without asking it."""
        return bool(self.client.status == "running")

    @property
    def address(self) -> str:
        """Address of the scheduler."""
        return str(self.client.scheduler_info()["address"])

    def devices(self) -> tuple[Device, ...]:
        """Its workers, read from the scheduler now; each is known by its address.

        One whose plugin has not announced its resources yet is not there: Dask would never look again at a task that
        needs them and came before they did. Raises `ClusterLost` if the scheduler is gone, or another one in its
        place, and `TimeoutError` or `OSError` if it does not answer.
        """
        if not self.connected:
            raise ClusterLost("the connection to the Dask scheduler was lost")
        try:
            seen = _identity(self.client)
        except (OSError, TimeoutError):
            if _listens(self.client):
                raise
            raise ClusterLost("nothing listens where the Dask scheduler was") from None
        if seen["id"] != self._scheduler:
            raise ClusterLost("another Dask scheduler has taken the place of the one that was joined")
        workers = {at: worker for at, worker in seen["workers"].items() if SLOTS in worker["resources"]}
        with self._lock:
            self._gone -= workers.keys()
        return tuple(_device(address, worker) for address, worker in workers.items())

    def submit(self, function: Callable[..., Any], args: tuple[Any, ...], *, key: Key, needs: Mapping[str, int],
               done: Callable[[Any, BaseException | None], None], timeout: float | None = None,
               overran: Callable[[], None] | None = None, on: str) -> None:  # fmt: skip
        """Run ``function(*args)`` on the worker at address ``on``; ``done(value, error)`` is called once, elsewhere.

        ``key`` is unique in the run's life. ``needs`` are amounts of Dask resources. If the task says that it began and
        is not done ``timeout`` seconds later, its worker is restarted (nothing else ends a running step) and
        ``overran()`` is called in place of ``done``. A task goes nowhere else when its worker is gone (Dask would try
        it on one after the other, and beside others): see `lost`. Where the scheduler is gone, ``done`` is called with
        `ClusterLost`, perhaps before this returns.
        """
        try:
            with annotate(hybridq={"group": key[0], "call": key[1], "attempt": key[2]}):
                future = self.client.submit(function, *args, key=key, pure=False, resources=dict(needs), workers=[on])
        except Exception as error:
            if self.connected:
                raise
            done(None, _lost(error))
            return
        with self._lock:
            over = self._over
            if not over:
                self._asked[key] = _Asked(future, done, timeout, overran, on)
            gone = on in self._gone
        if over:
            done(None, _lost("it was given up"))
            return
        if gone:  # it was decided to send this before that was known, and Dask would wait for the worker for ever
            self.lost(on)
        self._loop.add_callback(self._follow, key, future)

    def _began(self, event: tuple[float, Any]) -> None:
        key = tuple(event[1])
        with self._lock:
            asked = self._asked.get(key)
            if asked is not None and asked.timeout is not None and asked.timer is None:
                asked.timer = threading.Timer(asked.timeout, self._overrun, [key])
                asked.timer.daemon = True
                asked.timer.start()

    def _overrun(self, key: Key) -> None:
        running = [worker for worker, keys in self.client.processing().items() if key in keys]
        with self._lock:
            asked = self._asked.pop(key, None)
        if asked is None or asked.overran is None:
            return
        asked.future.cancel()
        try:
            if running:
                self.client.restart_workers(running)
        finally:
            asked.overran()

    def lost(self, address: str) -> None:
        """The worker at ``address`` is gone: its tasks end with `WorkerLost`, whatever comes of them later."""
        with self._lock:
            self._gone.add(address)
            gone = [(key, asked.future) for key, asked in self._asked.items() if asked.on == address]
        for key, future in gone:
            self._arrived.put((key, None, WorkerLost(f"the worker at {address} left the cluster")))
            future.cancel()

    @property
    def own(self) -> bool:
        """Whether it was started for this driver, and ends with it."""
        return self._own is not None

    def tell(self, topic: str, message: bytes) -> None:
        """Put an event into the scheduler's ``topic``; `TimeoutError` or `OSError` if it does not answer."""
        assert self.client.scheduler is not None
        self.client.sync(self.client.scheduler.log_event, topic=topic, msg=message, callback_timeout=_ANSWER_SECONDS)

    def scale(self, workers: int) -> None:
        """Ask for so many workers. Raises `NoDevice` if this is no cluster that can be asked."""
        if self._scalable is None:
            raise NoDevice(
                "most_workers was given, and the cluster cannot be asked for workers: its client was connected to an "
                "address. Give the cluster object itself, or a client made of it."
            )
        self._scalable.scale(workers)

    def replenish(self) -> None:
        """Start workers in place of those whose nanny gave up: it does if one dies right after, or during, its start.

        Only in a cluster of our own; a scheduler started elsewhere has someone to look after it. To be called again and
        again, also while nothing is missing.
        """
        own, now = self._own, time.monotonic()
        if own is None:
            return
        known = {worker["name"] for worker in own.scheduler_info["workers"].values()}
        missing = {name: nanny for name, nanny in dict(own.workers).items() if name not in known}
        self._missed = {name: self._missed.get(name, now) for name in missing}
        gave_up = {
            name
            for name, nanny in missing.items()
            if now - self._missed[name] > (_START_SECONDS if nanny.is_alive() else _RESTART_SECONDS)
        }
        for name in gave_up:
            del self._missed[name]
        if len(known) < len(own.worker_spec):
            assert own.loop is not None
            own.loop.add_callback(own.replace, gave_up)

    def abandon(self) -> None:
        """Give up a cluster whose scheduler is gone: everything in flight ends with `ClusterLost`."""
        with self._lock:
            self._over = True
            asked = list(self._asked.values())
            self._asked.clear()
        for one in asked:
            if one.timer is not None:
                one.timer.cancel()
            one.done(None, _lost("it was given up"))
        # closing asks a scheduler that is gone, and takes as long as a connection is tried
        threading.Thread(target=self.close, args=(60,), name="hybridq-closing", daemon=True).start()

    def close(self, patience: float = 5) -> None:
        """End a cluster of our own, its workers and engines; leave one that was given as it was.

        Workers that have not ended after ``patience`` seconds are killed.
        """
        self._arrived.put(None)
        if not self._own_client:
            return
        with contextlib.suppress(TimeoutError):
            self.client.close(timeout=3)
        if self._own is not None:
            own, failed = self._own, []

            def end() -> None:
                try:
                    own.close()
                except Exception as error:  # noqa: BLE001  # raised below
                    failed.append(error)

            pids = [nanny.pid for nanny in own.workers.values()]
            closing = threading.Thread(target=end, name="hybridq-closing", daemon=True)
            closing.start()
            closing.join(patience)
            if closing.is_alive():  # a worker that is just being started does not answer: it goes without being asked
                for pid in pids:
                    if pid is not None:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                closing.join(_KILLED_SECONDS)
                own.shutdown_on_close = False  # else Dask asks it once more as this process ends, for ten seconds
            elif failed:
                raise failed[0]

    async def _follow(self, key: Key, future: Any) -> None:
        """On the client's event loop, which must not wait for a journal: bring a task's result to the collector."""
        try:
            self._arrived.put((key, await future.result(), None))
        except (Exception, CancelledError) as error:  # noqa: BLE001  # handed to the one who asked
            self._arrived.put((key, None, error))

    def _collect(self) -> None:
        while (arrival := self._arrived.get()) is not None:
            key, value, error = arrival
            with self._lock:
                asked = self._asked.pop(key, None)
            if asked is not None:
                if asked.timer is not None:
                    asked.timer.cancel()
                asked.done(value, None if error is None else _explained(error))


@dataclass(frozen=True)
class Seen:
    """A worker of a cluster, and what it is doing."""

    device: Device
    host: str
    used: int
    """Memory that its own process takes now, in bytes; its engines are not counted."""
    doing: tuple[str, ...]
    """Calls that run there or are sent ahead, as "run/location"; those of others by their Dask key."""


def look(site: Site) -> tuple[Seen, ...]:
    """The workers of a site's cluster, which is not one of our own; nothing is changed there.

    Raises `NoDevice` if nobody answers, and `WorkflowError` for one that is reached without TLS.
    """
    address = site.cluster
    client = address if isinstance(address, Client) else _connect(address, allow_unencrypted=site.allow_unencrypted)
    try:
        processing = client.processing()
        workers = _identity(client)["workers"]
        return tuple(
            Seen(_device(at, worker), str(worker["host"]), int(worker["metrics"]["memory"]),
                 tuple(map(_task, processing.get(at, ()))))
            for at, worker in workers.items()
        )  # fmt: skip
    finally:
        if client is not address:
            client.close()


def _identity(client: Client) -> Mapping[str, Any]:
    """What the scheduler says of itself and its workers now.

    Not ``scheduler_info``: that returns what the client last heard, and every two seconds it asks for no workers.
    Raises `TimeoutError` or `OSError` if it does not answer.
    """
    assert client.scheduler is not None
    found: Mapping[str, Any] = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=_ANSWER_SECONDS)
    return found


def _listens(client: Client) -> bool:
    """Whether anybody takes connections at the scheduler's address; True if that cannot be told."""
    assert client.scheduler is not None
    try:
        host, port = get_address_host_port(str(client.scheduler.address), strict=True)
        with socket.create_connection((host, port), timeout=_ANSWER_SECONDS):
            return True
    except ConnectionRefusedError:
        return False
    except (OSError, ValueError):
        return True


def _task(key: Any) -> str:
    """A task in a person's words: ours without what only tells equal ones apart."""
    if isinstance(key, tuple) and len(key) == 3 and isinstance(key[1], str) and "@" in key[1]:
        run, _, rest = key[1].partition("@")
        return f"{run}/{rest.partition('/')[2]}"
    return str(key)


def _device(address: str, worker: Mapping[str, Any]) -> Device:
    slots = worker["nthreads"]
    allowance = worker_allowance(worker["memory_limit"] or psutil.virtual_memory().total, slots)
    return Device(address, slots, allowance, slots, ROUND_TRIP, kinds=KINDS)


def _explained(error: BaseException) -> BaseException:
    """A task's error as one of ours where Dask's own words would not help."""
    if isinstance(error, (CancelledError, OSError)):  # or the connection broke while the result was fetched
        return _lost(error)
    if isinstance(error, KilledWorker):
        return WorkerLost(f"the worker at {error.last_worker.address} died")
    return error


def _lost(reason: Any) -> ClusterLost:
    return ClusterLost(
        f"the Dask scheduler dropped the task ({reason}); the cluster was shut down or lost. Run again: everything "
        "recorded is kept."
    )


class _Workers(LocalCluster):
    """Workers of our own, whose nannies are replaced when they gave up, and never else.

    Dask itself ends a nanny 15 seconds after its worker was lost, unless another one is known by then: on a busy
    machine one that has just come, with work on it.
    """

    def _update_worker_status(self, op: str, msg: Any) -> None:
        AnyCluster._update_worker_status(self, op, msg)

    def replace(self, names: Collection[Any]) -> None:
        """Start others in place of the nannies of these names, on the event loop."""
        for name in names:
            nanny = self.workers.pop(name, None)
            if nanny is not None:
                self._futures.add(asyncio.ensure_future(nanny.close()))
        LocalCluster.scale(self, len(self.worker_spec))  # starts those that are specified and not there


def _start_local(site: Site) -> _Workers:
    with dask.config.set({
        # two attempts, then it counts as lost; daemonic workers cannot outlive a driver that dies
        "distributed.scheduler.allowed-failures": 1, "distributed.worker.daemon": True, **SELDOM,
    }):  # fmt: skip
        return _Workers(  # type: ignore[no-untyped-call]  # its base has no types
            config=SELDOM,  # of workers that come later, too
            n_workers=site.local_workers,
            threads_per_worker=site.worker_threads,
            memory_limit=site.local_memory(psutil.virtual_memory().total),
            processes=True,
            host="127.0.0.1",
            dashboard_address=f"127.0.0.1:{_free_port(8787)}",
            silence_logs=50,
        )


def _free_port(wanted: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return 0
    return wanted


def _check_encrypted(address: str, *, allowed: bool) -> None:
    """Raise `WorkflowError` for the address of a scheduler on another host without TLS, unless that is ``allowed``."""
    protocol, place = parse_address(address)
    if allowed or protocol in ("tls", "inproc"):
        return
    host = place.rpartition(":")[0].strip("[]") or place
    try:
        near = ip_address(host).is_loopback
    except ValueError:
        near = host == "localhost"
    if not near:
        raise WorkflowError(
            f"the scheduler at {address} is reached over a network without encryption: whoever reaches it, or reads "
            "along, can run code as you. Use TLS (an address tls://..., with Dask's security settings), or allow it: "
            "allow_unencrypted = true in the site's [cluster], hq.Site(allow_unencrypted=True), --allow-unencrypted. "
            "Nothing was sent."
        )


def _connect(address: Any, *, allow_unencrypted: bool) -> Client:
    if isinstance(address, AnyCluster):
        return Client(address)
    if not isinstance(address, str):
        raise WorkflowError(
            f"cluster is a {type(address).__qualname__}; give a scheduler's address such as 'tcp://host:8786', a "
            "distributed.Client, a cluster object of Dask's, or None to start a cluster on this machine."
        )
    _check_encrypted(address, allowed=allow_unencrypted)
    try:
        return Client(address, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise NoDevice(
            f"no Dask scheduler answers at {address} within {_CONNECT_SECONDS} s ({error}); check the address, or "
            "start one with `dask scheduler`. Nothing was run."
        ) from error


# evaluated on workers that may lack hybridq: a builtin and a string need nothing there
_INSTALLED = (
    "{{'python': __import__('platform').python_version(), "
    "'importable': __import__('importlib.util').util.find_spec('hybridq') is not None, "
    "**{{n: (lambda n: next((d.version for d in __import__('importlib.metadata').metadata.distributions(name=n)), "
    "None))(n) for n in {names!r}}}}}"
)


def _compare_versions(client: Client) -> None:
    mine = {name: version(name) for name in _COMPARED}
    mine["python"] = ".".join(map(str, sys.version_info[:3]))
    theirs = client.run(eval, _INSTALLED.format(names=_COMPARED))
    for address, found in theirs.items():
        if found["hybridq-scheduler"] is None or not found["importable"]:
            raise NoDevice(
                f"the worker at {address} has no hybridq; install hybridq-scheduler {mine['hybridq-scheduler']} in the "
                "workers' environment. Nothing was run."
            )
        skewed = [f"{n} {found[n] or 'missing'} (here {mine[n]})" for n in mine if found[n] != mine[n]]
        if skewed:
            raise WorkflowError(
                f"the worker at {address} has other versions than this driver: {', '.join(skewed)}. Results would not "
                "be the same; install equal versions. Nothing was run."
            )


def _user_path() -> tuple[str, ...]:
    """Directories of the researcher's own modules: the script's, and what was put on the path by hand."""
    return tuple(
        os.path.abspath(p) for p in sys.path if p == "" or ("site-packages" not in p and "/lib/python" not in p)
    )
