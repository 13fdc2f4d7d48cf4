"""A run followed from its journal: lines as of the run itself, on any machine that sees the file."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybridq.following import RecordedRun
from hybridq.history import LoopHistory, RunHistory
from hybridq.pace import remaining
from hybridq.progress import Display, Group

__all__ = ["groups", "watch"]

_POLL_SECONDS = 0.5
_LOG_SECONDS = 30.0
_SILENCE_SECONDS = 60.0
"""Without a new record for so long, that is told."""


def watch(directory: Path, *, once: bool = False, as_json: bool = False) -> str | None:
    """Follow the run in ``directory`` until it ends; with ``once``, say how far it is.

    Live lines and messages go to stderr; with ``as_json``, or ``once``, the state goes to stdout instead, as a JSON
    document a line or as text. Returns `RecordedRun.left`. Raises `JournalError` if there is no run, `Corrupt` if a
    line is damaged.
    """
    run = RecordedRun(directory, points=3, spans=2, faults=100)
    pace = _Pace()
    if once:
        history = run.history
        found = groups(history, pace.rates(history))
        _print(json.dumps(_document(run, history, found)) if as_json else _text(run, history, found))
        return run.left
    display = Display(quiet=as_json)
    history, logged, changed, told = run.history, time.monotonic(), time.monotonic(), False
    fresh = True
    try:
        while True:
            now = time.monotonic()
            found = groups(history, pace.rates(history))
            if as_json and (fresh or run.left is not None):
                _print(json.dumps(_document(run, history, found)))
            display.refresh(found)
            if not display.live and now - logged > _LOG_SECONDS:
                logged = now
                display.say("; ".join(str(group) for group in found.values() if group.ended < group.started)
                            or f"{history.name}: {history.steps} steps, {history.evaluations} evaluations")  # fmt: skip
            if run.left is not None:
                break
            if now - changed > _SILENCE_SECONDS and not told:
                told = True
                display.say(f"nothing new is recorded for {_SILENCE_SECONDS:.0f} s; last opened {_opened(history)}")
            time.sleep(_POLL_SECONDS)
            fresh = run.update()
            if fresh:
                history, changed, told = run.history, time.monotonic(), False
    finally:
        display.close()
    if not display.live:
        for group in found.values():
            display.say(str(group))
    display.say(f"{history.name}: {run.left}; {history.evaluations} evaluations, {history.steps} steps in "
                f"{len(history.sessions)} sessions")  # fmt: skip
    return run.left


class _Pace:
    """Evaluations a second of each group since the watching began; before anything came, as the record has them."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}

    def rates(self, history: RunHistory) -> dict[str, float]:
        now, found = time.monotonic(), {}
        for group, loops in _by_group(history.loops).items():
            rows = sum(loop.rows for loop in loops)
            since, before = self._first.setdefault(group, (now, rows))
            if rows > before and now > since:
                found[group] = (rows - before) / (now - since)
            elif (taken := _recorded_seconds(loops)) > 0:
                found[group] = rows / taken
        return found


def _recorded_seconds(loops: Sequence[LoopHistory]) -> float:
    began = [loop.began for loop in loops if loop.began is not None]
    ended = [loop.ended for loop in loops if loop.ended is not None]
    return max(ended) - min(began) if began and ended else 0.0


def _by_group(loops: Sequence[LoopHistory]) -> dict[str, list[LoopHistory]]:
    found: dict[str, list[LoopHistory]] = {}
    for loop in loops:
        found.setdefault(loop.group, []).append(loop)
    return found


def groups(history: RunHistory, rates: dict[str, float]) -> dict[str, Group]:
    """How far the loops of each place are; ``rates`` are evaluations a second by group, where they are known."""
    found = {}
    for name, loops in _by_group(history.loops).items():
        ended = [loop for loop in loops if loop.state in ("finished", "failed")]
        running = [loop for loop in loops if loop.state not in ("finished", "failed")]
        bounds = [loop.bound for loop in loops if loop.bound is not None]
        errors = [abs(loop.error) for loop in loops if loop.error is not None]
        units = {loop.reference.unit for loop in loops if loop.reference is not None}
        rate = rates.get(name)
        found[name] = Group(
            name, len(loops), len(ended), sum(loop.rows for loop in loops), rate,
            min((loop.best for loop in loops if loop.best is not None), default=math.inf), max(errors, default=None),
            units.pop() if len(units) == 1 else "", sum(bounds) if len(bounds) == len(loops) else None,
            None if rate is None or history.status != "running" else remaining(
                len(ended), sum(loop.rows for loop in ended), [(loop.rows, loop.bound) for loop in running], rate
            ),
        )  # fmt: skip
    return found


def _document(run: RecordedRun, history: RunHistory, found: dict[str, Group]) -> dict[str, Any]:
    return {
        "name": history.name, "workflow": history.workflow, "status": history.status, "left": run.left,
        "evaluations": history.evaluations, "steps": history.steps, "shots": history.shots,
        "retries": history.retries, "failures": history.failures, "sessions": len(history.sessions),
        "groups": [
            {**asdict(group), "best": None if group.best == math.inf else group.best,
             "left": None if group.left is None else {"seconds": group.left[0], "at_most": group.left[1]}}
            for group in found.values()
        ],
    }  # fmt: skip


def _text(run: RecordedRun, history: RunHistory, found: dict[str, Group]) -> str:
    lines = [f"{history.name}: {run.left or 'running'}; {history.evaluations} evaluations, {history.steps} steps, "
             f"{history.retries} retries, {history.failures} failures"]  # fmt: skip
    return "\n".join([*lines, *(f"  {group}" for group in found.values())])


def _opened(history: RunHistory) -> str:
    last = history.sessions[-1]
    return f"by process {last.pid}@{last.host}"


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
