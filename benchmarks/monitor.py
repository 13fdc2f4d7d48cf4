"""What monitoring costs: the loop, the scheduler while a page loads, and its memory at 1,000 loops.

`H2 study`: seconds of all of ``hq.run`` on a cluster of two workers that is there, in turns with monitoring on and off;
medians, and of on over off. `evaluations`: the same of 10,000 evaluations of two qubits in a plain ``for`` loop at
hand, with a cluster there. `event`: microseconds that handing a record to the monitor adds to the journal's append, and
those that folding it takes of the monitor's own thread. `page` and `json`, of a scheduler that was told of 1,000 loops
and 100,000 evaluations: milliseconds for the answer, the longest that the scheduler's event loop was blocked by it, and
megabytes (10^6 bytes) that the scheduler keeps for it. A `browser` takes the page's document and follows it, as a
process of its own: until all figures are there, and while a run goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client, LocalCluster
from qiskit.circuit.library import efficient_su2

import hybridq as hq
from benchmarks._site import site, warm
from hybridq import journal as records
from hybridq.history import History
from hybridq.journal import Journal, pack_array
from hybridq.monitor.plugin import Monitor, pack
from hybridq.monitor.store import TOPIC
from workflows.h2_dissociation import BONDS, h2_dissociation

LOOPS, ROWS, BATCH = 1000, 100, 50
CIRCUIT = efficient_su2(2, reps=1)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--evaluations", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)


@hq.quantum
def energy(angle: float) -> Any:
    return hq.expval(CIRCUIT, "ZZ", [angle] * 8)


@hq.workflow
def many(count: int) -> float:
    warm(2)
    begun = time.perf_counter()
    for number in range(count):
        energy(0.001 * number)
    return time.perf_counter() - begun


def run(compare: Any, evaluations: int, rounds: int) -> list[dict[str, Any]]:
    return [*_study(2 * rounds + 1), *_evaluations(evaluations, rounds), *_event(), *_scheduler()]


def _row(what: str, value: float, unit: str) -> dict[str, Any]:
    return {"what": what, "value": value, "unit": unit}


def _in_turns(what: str, rounds: int, workers: int, seconds: Callable[[Any, bool, int], float]) -> list[dict[str, Any]]:
    """Medians of ``seconds(client, monitored, turn)`` with monitoring on and off, and of their ratios."""
    times: dict[bool, list[float]] = {True: [], False: []}
    with site(workers) as client:
        seconds(client, True, -1)  # libraries are loaded
        for turn in range(rounds):
            for on in (True, False) if turn % 2 else (False, True):
                times[on].append(seconds(client, on, turn))
    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    return [
        _row(f"{what}, monitoring on", statistics.median(times[True]), "s"),
        _row(f"{what}, monitoring off", statistics.median(times[False]), "s"),
        _row(f"{what}, on / off", statistics.median(ratios), "1"),
    ]


def _evaluations(count: int, rounds: int) -> list[dict[str, Any]]:
    def seconds(client: Any, on: bool, turn: int) -> float:
        with tempfile.TemporaryDirectory() as store:
            return hq.run(many, count, name="benchmark", store=store, cluster=client, monitor=on, seed=turn)

    return _in_turns("evaluations", rounds, 1, seconds)


def _study(rounds: int) -> list[dict[str, Any]]:
    def seconds(client: Any, on: bool, turn: int) -> float:
        with tempfile.TemporaryDirectory() as store:
            begun = time.perf_counter()
            hq.run(h2_dissociation, BONDS, name="h2", store=store, cluster=client, monitor=on, seed=turn)
            return time.perf_counter() - begun

    return _in_turns("H2 study", rounds, 2, seconds)


def _event() -> list[dict[str, Any]]:
    """Of an append with and without a follower; and of a row that is folded."""
    count = 5000
    with tempfile.TemporaryDirectory() as store:
        journal = Journal(Path(store) / "run")
        journal.append(records.RunHeader(1, "run", "w", "c", "a", None, 0, None))
        line = journal.append(records.Loop("w/minimize[0]", "energy", "c", "a", None, "COBYLA", "none"))
        x = pack_array(np.zeros(8))
        row = records.Row(line, 0, x, 1.0, None, 0.0, None, 1e-3, "driver")
        followed: deque[Any] = deque()
        spent: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(20):
            on = bool(turn % 2)
            journal.follow(followed if on else None)
            begun = time.perf_counter()
            for _ in range(count // 20):
                journal.append(row)
            spent[on].append((time.perf_counter() - begun) / (count // 20))
        journal.close()
    history = History(points=100, spans=400)
    history.take(2, records.Loop("w/minimize[0]", "energy", "c", "a", None, "COBYLA", "none"))
    rows = [records.Row(2, i, x, 1.0, None, 0.0, None, 1e-3, "driver", started=1e9 + i) for i in range(count)]
    begun = time.thread_time()
    for number, one in enumerate(rows, 3):
        history.take(number, one)
    folded = (time.thread_time() - begun) / count
    added = statistics.median(spent[True]) - statistics.median(spent[False])
    return [_row("event, added to the append", 1e6 * added, "us"), _row("event, folded beside it", 1e6 * folded, "us")]


def _told(first: int) -> dict[str, Any]:
    def loop(i: int) -> dict[str, Any]:
        values = [-1.0 - math.exp(-0.01 * k) * math.cos(k + i) for k in range(ROWS)]
        best = [min(values[: k + 1]) for k in range(ROWS)]
        return {
            "at": f"scan/point[{i}]/minimize[0]", "group": "point/energy", "state": "running" if i % 5 else "finished",
            "method": "COBYLA", "rows": ROWS, "best": best[-1], "last": values[-1], "stderr": 0.01, "seconds": 1.0,
            "limit": 1000, "where": str(i % 8), "reference": -2.0, "source": "FCI", "unit": "hartree",
            "points": [[k, values[k], 0.01, best[k]] for k in range(ROWS)],
        }  # fmt: skip

    now = time.time()
    return {
        "v": 1, "id": "big@0", "run": "big", "workflow": "scan", "driver": "host:1", "full": False, "time": now,
        "clock": time.monotonic(), "began": now, "state": "running", "error": "",
        "totals": {"evaluations": (first + BATCH) * ROWS, "steps": 0, "shots": 0, "retries": 0, "failures": 0,
                   "quantum": 1.0, "classical": 1.0},
        "loops": [loop(i) for i in range(first, first + BATCH)],
        "devices": [[f"tcp://{i}", 1, 1, 0, 2**30, 2**32] for i in range(8)], "queue": {"waiting": 9, "seconds": 1.0},
        "spans": [[str(k % 8), now + 0.1 * k, 0.08, "quantum", "point/energy", 10] for k in range(400)],
    }  # fmt: skip


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_blocked = [0.0]


async def _watch(dask_scheduler: Any) -> None:
    """In the scheduler: note the longest time that its event loop did nothing else."""
    _blocked[0] = 0.0

    async def tick() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.005)
            _blocked[0] = max(_blocked[0], time.perf_counter() - begun - 0.005)

    dask_scheduler._hybridq_watch = asyncio.ensure_future(tick())


def _longest(dask_scheduler: Any) -> float:
    found, _blocked[0] = _blocked[0], 0.0
    return found


_BROWSER = """
import sys, time
from bokeh.client import pull_session
from bokeh.models import Plot
begun = time.perf_counter()
session = pull_session(url=sys.argv[1])
told = []
def changed(_):
    if not told and len(list(session.document.select({"type": Plot}))) == 6:
        told.append(1e3 * (time.perf_counter() - begun))
        print(told[0], flush=True)
session.document.on_change(changed)
session._loop_until_closed()
"""


def _followed(client: Client, base: str) -> list[dict[str, Any]]:
    """Blocking by a page that is opened, and then by one that follows a run."""
    opening, drawn, following = [], [], []
    for turn in range(3):
        client.run_on_scheduler(_longest)
        command = [sys.executable, "-c", _BROWSER, f"{base}/hybridq"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as browser:
            assert browser.stdout is not None
            drawn.append(float(browser.stdout.readline()))
            opening.append(client.run_on_scheduler(_longest))
            for change in range(4):
                told = _told(0) | {"time": time.time(), "clock": time.monotonic() + turn + change}
                client.log_event(TOPIC, pack(told))
                time.sleep(1.0)
                following.append(client.run_on_scheduler(_longest))
            browser.kill()
    return [
        _row("browser, all figures after", statistics.median(drawn), "ms"),
        _row("browser opens, scheduler blocked", 1e3 * statistics.median(opening), "ms"),
        _row("browser follows, scheduler blocked", 1e3 * statistics.median(following), "ms"),
    ]


def _size(dask_scheduler: Any) -> int:
    return _resident()


def _scheduler() -> list[dict[str, Any]]:
    found = []
    with (
        LocalCluster(n_workers=0, processes=False, protocol="tcp", host="127.0.0.1", silence_logs=50,
                     dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        client.register_plugin(Monitor())
        base = str(client.dashboard_link).rpartition("/")[0]
        _answer(f"{base}/hybridq")  # libraries are loaded
        messages = [pack(_told(first)) for first in range(0, LOOPS, BATCH)]
        before = client.run_on_scheduler(_size)
        for message in messages:
            client.log_event(TOPIC, message)
        found.append(_row("memory of the scheduler", (client.run_on_scheduler(_size) - before) / 1e6, "MB"))
        client.run_on_scheduler(_watch)
        time.sleep(20.0)  # until the page above, which no browser follows, is given up
        found += _followed(client, base)
        for path in ("hybridq.json", "hybridq"):
            answers, blocks = [], []
            for _ in range(7):
                client.run_on_scheduler(_longest)
                answers.append(_answer(f"{base}/{path}"))
                blocks.append(client.run_on_scheduler(_longest))
            found.append(_row(f"{path}, answer", 1e3 * statistics.median(answers), "ms"))
            found.append(_row(f"{path}, scheduler blocked", 1e3 * statistics.median(blocks), "ms"))
        blocks = []
        for message in messages[:7]:
            client.run_on_scheduler(_longest)
            client.log_event(TOPIC, message)
            blocks.append(client.run_on_scheduler(_longest))
        found.append(_row("a message, scheduler blocked", 1e3 * statistics.median(blocks), "ms"))
        found.append(_row("a message", max(map(len, messages)) / 1e3, "kB"))
    return found


def _answer(address: str) -> float:
    """Seconds until an address has answered, asked from a thread of its own."""
    seconds: list[float] = []

    def ask() -> None:
        begun = time.perf_counter()
        with urllib.request.urlopen(address, timeout=60) as answer:
            answer.read()
        seconds.append(time.perf_counter() - begun)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return seconds[0]
