"""Decisions of the ledger a second: 8 kinds of devices, all busy, and a queue of mixed jobs that is kept at its length.

The end of a batch is entered, as many jobs are submitted as left, and the next batches are decided; a decision is one
job placed. `us` is the median processor time of one in microseconds, with all that, over rounds, and `a_second` its
inverse. `batch` is the most jobs that may leave together, `jobs` how many did. The exponents say how time grows along
an axis, fitted over all its sizes: 1 would be in proportion.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from hybridq.ledger import MAX_BATCH_JOBS, Ledger
from hybridq.policies import POLICIES, Batch, Device, Job
from hybridq.resources import Need

DEVICES = (10, 30, 100, 300, 1000)
QUEUES = (100, 1000, 10_000, 100_000)
DECISIONS, ROUNDS = 400, 5


def device(number: int) -> Device:
    """Three sorts of workers, with GPUs and without, near and far, and one QPU in 20."""
    if number % 20 == 19:
        return Device(f"qpu{number}", 1, 2**40, 1, 1.0, qubits=127, backend="qpu", kinds=("quantum",))
    slots, gib, speed, latency = (
        (1, 4, 1.0, 0.012), (4, 16, 1.0, 0.012), (8, 64, 1.5, 0.012), (1, 32, 4.0, 0.012),
        (4, 16, 1.0, 0.05), (8, 64, 1.5, 0.05), (1, 32, 4.0, 0.05),
    )[number % 7]  # fmt: skip
    return Device(f"w{number}", slots, gib * 2**30, slots, latency, speed)


def job(number: int, rng: random.Random) -> Job:
    """Circuits of 4 to 26 qubits of some hundred templates, and classical steps."""
    run = f"run{rng.randrange(20)}"
    if rng.random() < 0.2:
        need = Need(rng.choice((50, 200, 800)) * 2**20, 10 ** rng.uniform(-2, 0.7))
        return Job(number, need, run, priority=rng.randrange(2), kind="classical")
    qubits = min(26, 4 + int(rng.expovariate(1 / 5)))
    seconds = 1e-4 + 1e-9 * 2**qubits * qubits * rng.randint(6, 20)
    need = Need(48 * 2**qubits + 2**25, seconds, 1, qubits, 1000)
    backend = "qpu" if rng.random() < 0.02 else ""
    template = f"t{rng.randrange(10)}-{qubits}"
    return Job(
        number, need, run, f"loop{rng.randrange(4)}", rng.randrange(2), None, backend, template, rank=10 * rng.random()
    )


def measure(policy: str, devices: int, queue: int, batch: int, seed: int = 1) -> dict[str, Any]:
    rng = random.Random(seed)
    stream = (job(number, rng) for number in range(10**9))
    ledger = Ledger(policy, batch_jobs=batch)
    for number in range(devices):
        ledger.join(device(number))
    while ledger.waiting < queue:
        ledger.submit(next(stream), 0.0)
    now, sent, batches = 0.0, 0, 0
    flying: deque[Batch] = deque(ledger.decide(now))
    times = []
    for _ in range(ROUNDS):
        spare = [next(stream) for _ in range(DECISIONS * min(batch, 64))]  # drawn outside of the time
        begun, placed, drawing = time.process_time(), 0, 0.0
        for _ in range(DECISIONS):
            flying.rotate(-rng.randrange(min(len(flying), 64)))
            ended = flying.popleft()
            now += ended.seconds / (devices * 4)
            ledger.done(ended, now)
            while ledger.waiting < queue:
                if not spare:
                    paused = time.process_time()
                    spare = [next(stream) for _ in range(DECISIONS)]
                    drawing += time.process_time() - paused
                ledger.submit(spare.pop(), now)
            found = ledger.decide(now)
            flying += found
            batches += len(found)
            placed += sum(len(one.jobs) for one in found)
        times.append((time.process_time() - begun - drawing) / placed)
        sent += placed
    middle = statistics.median(times)
    return {
        "policy": policy, "batch": batch, "devices": devices, "queue": queue, "us": 1e6 * middle,
        "a_second": round(1 / middle), "jobs": sent / batches,
    }  # fmt: skip


def exponent(rows: list[dict[str, Any]], size: str) -> float | None:
    """Of the power law of time in ``size`` through the rows, by least squares of logarithms."""
    if len(rows) < 2:
        return None
    x, y = [math.log(row[size]) for row in rows], [math.log(row["us"]) for row in rows]
    return statistics.linear_regression(x, y).slope


def run(compare: Any) -> list[dict[str, Any]]:
    rows = [measure("earliest-finish", devices, queue, 1) for queue in QUEUES for devices in DEVICES]
    rows += [measure("earliest-finish", 100, queue, MAX_BATCH_JOBS) for queue in QUEUES]
    rows += [measure(policy, 100, 10_000, 1) for policy in sorted(POLICIES) if policy != "earliest-finish"]
    for row in rows:
        alike = [r for r in rows if (r["policy"], r["batch"]) == (row["policy"], row["batch"])]
        row["devices_exponent"] = exponent([r for r in alike if r["queue"] == row["queue"]], "devices")
        row["queue_exponent"] = exponent([r for r in alike if r["devices"] == row["devices"]], "queue")
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, size, other in zip(figure.subplots(1, 2), ("devices", "queue"), ("queue", "devices"), strict=True):
        mine = [row for row in rows if (row["policy"], row["batch"]) == ("earliest-finish", 1)]
        for fixed in sorted({row[other] for row in mine}):
            line = [row for row in mine if row[other] == fixed]
            label = f"{fixed:,} {'waiting' if other == 'queue' else other}, exponent {line[0][f'{size}_exponent']:.2f}"
            axes.loglog([r[size] for r in line], [r["us"] for r in line], "o-", label=label)
        axes.axhline(200, color="grey", linestyle="--", linewidth=1)
        axes.set_xlabel("devices" if size == "devices" else "jobs waiting")
        axes.set_ylabel("µs a decision")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
