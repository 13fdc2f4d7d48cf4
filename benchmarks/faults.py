"""Faults done to a run: its driver, journal, cluster, calls and files, and what came of it; a line for each row.

``--row NAME`` does one row, ``--seed N --count M`` its cases N to N + M - 1, each of which is known by its seed alone;
``--at-length`` does every row as often as its matrix asks, which takes many hours, otherwise as often as the tests.
`survived` counts cases that ended with the bits of an undisturbed run, the same record, no lock and no process left,
or, where that is asked, a clear refusal first. `faults` are those of all cases together: some do several. `lost` are
acknowledged records that were gone; `repeated` is the most that one case executed again. `recover` are seconds from the
start of the next process (of a fork, where no circuit is evaluated) to its first live evaluation or its end; for
signals, until the driver had left; for what is done to a cluster, until all that was in flight was recorded (for steps
that end their workers, until the run had ended); for calls and files, until the call or run was answered or refused; in
chaos, until there were as many engine processes as before. Exits with 1 if anything was lost, did not survive, or took
longer than it may.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the scenarios are those of the tests

import campaign
import campaign_calls
import campaign_cluster
import campaign_files

ROWS = campaign.ROWS | campaign_cluster.ROWS | campaign_calls.ROWS | campaign_files.ROWS


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--row", action="append", choices=list(ROWS), dest="chosen", help="only this row; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--count", type=int, help="cases of each row")
    parser.add_argument("--at-length", action="store_true", help="as many cases as the matrix asks")
    parser.add_argument(
        "--minutes", type=float, help="of a case that lasts as long as it is given (60 at length, or 1)"
    )


def run(compare: Any, chosen: Sequence[str] | None = None, seed: int = 0, count: int | None = None,
        at_length: bool = False, minutes: float | None = None) -> list[dict[str, Any]]:  # fmt: skip
    found = []
    with campaign.forks() as undisturbed:
        undisturbed.minutes = minutes or (60.0 if at_length else 1.0)
        for name in chosen or ROWS:
            row = ROWS[name]
            cases = count or (row.long if at_length else row.brief)
            survived = lost = faults = 0
            repeated: list[int] = []
            seconds: list[float] = []
            for number in range(seed, seed + cases):
                case = row.case(undisturbed, number)
                survived += not (case.problems or case.late)
                lost += case.lost
                faults += case.faults
                seconds += case.seconds
                repeated += [] if case.repeated is None else [case.repeated]
                if case.problems or case.late or case.lost:
                    print(f"--row {name} --seed {number} --count 1: {case}", file=sys.stderr, flush=True)
            seconds.sort()
            found.append({
                "row": name, "injected": cases, "survived": survived, "faults": faults, "lost": lost,
                "repeated": max(repeated, default=None),
                "recover (median)": statistics.median(seconds) if seconds else None,
                "recover (95 %)": seconds[math.ceil(0.95 * len(seconds)) - 1] if seconds else None,
                "seeds": f"{seed}-{seed + cases - 1}",
            })  # fmt: skip
            print(found[-1], file=sys.stderr, flush=True)
    return found


def failed(rows: Sequence[dict[str, Any]]) -> bool:
    return any(row["survived"] < row["injected"] or row["lost"] for row in rows)
