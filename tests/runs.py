"""What tests of runs share: a run as the command line makes it, and what its record says."""

from __future__ import annotations

import contextvars
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hybridq as hq
from hybridq.journal import read_records
from hybridq.language import Overrides, RunReport, overrides

Record = TypeVar("Record")


def report(workflow: Callable[..., Any], *args: Any, **options: Any) -> RunReport:
    """Run as the command line does, and return what it reports."""
    asked = Overrides()

    def inner() -> None:
        overrides.set(asked)
        hq.run(workflow, *args, **{"workers": 1, **options})

    contextvars.copy_context().run(inner)
    return asked.reports[0]


def executed(found: RunReport) -> tuple[int, int]:
    """Evaluations and steps."""
    return found.evaluations_executed, found.steps_executed


def replayed(found: RunReport) -> tuple[int, int]:
    """Evaluations and steps."""
    return found.evaluations_replayed, found.steps_replayed


def journal(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's journal as they are written."""
    return [json.loads(line) for line in (Path(directory) / "journal.jsonl").read_text().splitlines()]


def recorded(directory: str | Path, kind: type[Record]) -> list[Record]:
    """A run's records of one kind, in order."""
    return [record for _, record in read_records(Path(directory)) if isinstance(record, kind)]


def write_trace(trace: str, name: str) -> None:
    """Note that a step runs; so short a line is written whole."""
    with open(trace, "a") as file:
        file.write(f"{name} {os.getpid()}\n")


def traced(trace: Path) -> Counter[str]:
    """How often each step ran; that it ran in another process is checked in passing."""
    if not trace.exists():
        return Counter()
    lines = [line.split() for line in trace.read_text().splitlines()]
    assert all(int(pid) != os.getpid() for _, pid in lines)
    return Counter(name for name, _ in lines)
