"""Memory under a limit: circuits of 4 to 26 qubits, values and samples, on four workers of 1 GB each.

Several hundred programs of one `hq.map`, shuffled, of efficient_su2(n, reps=1). `peak` is the largest of the workers'
resident memory with that of its engine process, both at their highest (VmHWM of /proc, so the sum is an upper bound),
`limit` what the worker has, in megabytes (10^6 bytes); `grown` is `peak` less what was resident when idle, `projected`
the largest program's, and `allowance` what programs may take. `refused` raised `TooLarge` with both numbers, `right`
says that those and no others need more than the allowance; `slowest` is the longest from the asking to the refusal, in
seconds. `lost` counts workers and engine processes that were there before and are not after, or the other way round.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from distributed import Client
from qiskit.circuit.library import efficient_su2

import hybridq as hq
from benchmarks._site import play, site
from benchmarks.adjoint import heisenberg
from hybridq.engines.costs import need
from hybridq.location import Location
from hybridq.program import Request, program
from hybridq.resources import worker_allowance

WORKERS, LIMIT, MEGABYTE = 4, 10**9, 1e6
# how many programs have so many qubits; 26 qubits are a state of 1 GiB
COUNTS = {**dict.fromkeys(range(4, 19), 16), 19: 8, 20: 8, 21: 6, 22: 6, 23: 6, 24: 6, 25: 6, 26: 6}


def request(qubits: int, sampled: bool, start: float) -> Request:
    circuit = efficient_su2(qubits, reps=1, entanglement="linear")
    theta = np.linspace(start, start + 1, circuit.num_parameters)
    return Request(circuit, None, theta, 1000) if sampled else Request(circuit, heisenberg(qubits)[:9], theta)


@hq.quantum
def evaluate(qubits: int, sampled: bool, start: float) -> Any:
    asked = request(qubits, sampled, start)
    if sampled:
        return hq.sample(asked.circuit, asked.theta, shots=1000)
    return hq.expval(asked.circuit, asked.observables, asked.theta)


@hq.workflow
def study(cases: list[Any], doubtful: list[bool]) -> list[Any]:
    """What became of each, in words; the seconds until those in doubt were answered, asked among others."""
    futures, waited = [], []
    for case, doubt in zip(cases, doubtful, strict=True):
        begun = time.perf_counter()
        futures.append(evaluate.submit(*case))
        if doubt:
            with contextlib.suppress(hq.HybridqError):
                futures[-1].result()
            waited.append(time.perf_counter() - begun)
    shown = []
    for future in futures:
        try:
            future.result()
            shown.append("done")
        except hq.HybridqError as error:
            shown.append(f"{type(error).__name__}: {error}")
    return [shown, waited]


def processes(client: Client) -> dict[int, list[int]]:
    """Of each worker's process, those of its engines."""
    workers = client.run(os.getpid).values()
    return {pid: [child.pid for child in psutil.Process(pid).children(recursive=True)] for pid in workers}


def highest(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def run(compare: Any) -> list[dict[str, Any]]:
    cases = [(n, sampled, 0.1 * k) for n, count in COUNTS.items() for k in range(count) for sampled in [k % 2 == 1]]
    random.Random(4).shuffle(cases)
    allowance = worker_allowance(LIMIT, 1)
    asked = [program(request(*case), seed=0, location=Location("benchmark/f[0]")) for case in cases]
    needs = [need(one).bytes for one in asked]
    too_large = [bytes_ > allowance for bytes_ in needs]
    with site(WORKERS, f"{LIMIT}B") as client:
        before = processes(client)
        idle = {pid: sum(psutil.Process(each).memory_info().rss for each in (pid, *before[pid])) for pid in before}
        begun = {each: psutil.Process(each).create_time() for each in _flat(before)}
        (shown, waited), seconds = play(client, study, cases, too_large)
        after = processes(client)
        lost = len(begun.keys() ^ set(_flat(after)))
        lost += sum(psutil.Process(each).create_time() != begun[each] for each in _flat(after) if each in begun)
        resident = {pid: highest(pid) + sum(map(highest, engines)) for pid, engines in after.items()}
    grown = {pid: resident[pid] - idle.get(pid, 0) for pid in resident}
    refused = [text.startswith("TooLarge") for text in shown]
    numbers = [len(re.findall(r"\(([0-9,]+) bytes\)", text)) == 2 for text in shown if text.startswith("TooLarge")]
    other = [text for text in shown if text != "done" and not text.startswith("TooLarge")]
    print(next((text for case, text in zip(cases, shown, strict=True) if case[0] == 26), ""), file=sys.stderr)
    print(f"each worker at its highest: {sorted(round(b / MEGABYTE) for b in resident.values())} MB", file=sys.stderr)
    print(f"grown since they were idle: {sorted(round(b / MEGABYTE) for b in grown.values())} MB", file=sys.stderr)
    fits = sorted(n for (n, *_), large in zip(cases, too_large, strict=True) if not large)
    return [{
        "programs": len(cases), "seconds": seconds, "done": shown.count("done"), "refused": sum(refused),
        "right": "yes" if refused == too_large and all(numbers) else "NO", "failed": len(other),
        "largest_done": fits[-1], "slowest": max(waited), "lost": lost, "peak": max(resident.values()) / MEGABYTE,
        "limit": LIMIT / MEGABYTE, "grown": max(grown.values()) / MEGABYTE,
        "projected": max(b for b in needs if b <= allowance) / MEGABYTE, "allowance": allowance / MEGABYTE,
    }]  # fmt: skip


def _flat(found: dict[int, list[int]]) -> list[int]:
    return [each for pid, engines in found.items() for each in (pid, *engines)]
