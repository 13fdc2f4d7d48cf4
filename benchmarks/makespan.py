"""Makespans of policies in virtual time, over the lower bound: studies of chained evaluations on workers.

Tasks are those of `hybridq.simulation.studies` (circuits of 4 to 20 qubits, classical steps of 10 ms to 5 s), their
true times lognormal about the predicted ones (0.3). Of ten workers seven have one slot and 2 GiB, two have four slots
and 16 GiB, one has one slot and 32 GiB; trips take 12 ms. Where speeds are mixed, the second sort is 1.25 times as
fast as the first, the third 1.5 times; then the bound is far from what can be reached, because it lets each chain have
the fastest to itself. `load` is work over slots, over the longest chain: about 1 is the hardest, and at 0.1 only the
choice of device matters. `ratio` is makespan over `lower_bound` (`most`: of any seed), `simple` over the larger of
longest chain and work over slots; medians over seeds. `plain` knows neither times nor speeds nor what memory is in
use; `over` counts its batches that began without memory for them, at no cost to it here.
"""

from __future__ import annotations

import statistics
from typing import Any

from hybridq.ledger import Ledger
from hybridq.policies import Device
from hybridq.simulation import PlainOrder, Trace, lower_bound, ranked, scattered, simulate, studies

# jobs, devices, whether speeds are mixed, seeds
SIZES = (
    (1000, 4, False, 15), (10_000, 10, False, 9), (10_000, 30, False, 9), (10_000, 10, True, 9),
    (10_000, 100, True, 5), (100_000, 100, False, 3), (100_000, 1000, True, 2),
)  # fmt: skip
POLICIES = ("earliest-finish", "fair-share", "first-come", "round-robin", "least-busy", "plain")
WORKERS = ((1, 2, 1.0),) * 7 + ((4, 16, 1.25),) * 2 + ((1, 32, 1.5),)  # slots, GiB, speed where mixed


def site(count: int, mixed: bool) -> tuple[Device, ...]:
    kinds = (WORKERS[number % 10] for number in range(count))
    return tuple(
        Device(f"w{number}", slots, gib * 2**30, slots, 0.012, speed if mixed else 1.0)
        for number, (slots, gib, speed) in enumerate(kinds)
    )


def play(jobs: int, devices: int, mixed: bool, seed: int) -> dict[str, dict[str, float]]:
    """The figures of each policy."""
    trace = ranked(scattered(Trace(studies(jobs, seed), site(devices, mixed)), 0.3, seed))
    work = sum(task.seconds for task in trace.tasks) / sum(d.slots * d.speed for d in trace.devices)
    fastest = max(device.speed for device in trace.devices)
    chain = lower_bound(trace.tasks, [Device("endless", 2**40, 2**40, 2**40, 0.012, fastest)])
    found = {}
    for name in POLICIES:
        result = simulate(trace, PlainOrder() if name == "plain" else Ledger(name))
        found[name] = {
            "jobs": len(result.decisions),
            "load": work / chain,
            "makespan": result.makespan,
            "ratio": result.makespan / result.bound,
            "simple": result.makespan / max(chain, work),
            "used": statistics.mean(result.utilisation.values()),
            "wait": statistics.mean(result.waits),
            "batches": result.batches,
            "over": result.over_committed,
        }
    return found


def run(compare: Any) -> list[dict[str, Any]]:
    rows = []
    for jobs, devices, mixed, seeds in SIZES:
        played = [play(jobs, devices, mixed, seed) for seed in range(seeds)]
        for name in POLICIES:
            of = [one[name] for one in played]
            figures = {figure: statistics.median(one[figure] for one in of) for figure in of[0]}
            most = max(one["ratio"] for one in of)
            rows.append({
                "policy": name, "devices": devices, "speeds": "mixed" if mixed else "equal", "seeds": seeds,
                **figures, "most": most,
            })  # fmt: skip
    return rows
