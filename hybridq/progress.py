"""What a run says while it runs: live lines on a terminal, bars in a notebook, log lines elsewhere, all on stderr."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from tqdm import tqdm

from hybridq.pace import remaining

__all__ = ["Display", "Group", "LoopProgress", "Progress"]

_LOG_SECONDS = 30.0
_REFRESH_SECONDS = 0.2


@dataclass(frozen=True)
class Group:
    """How far the loops, or steps, of one place of a workflow are."""

    name: str
    started: int
    ended: int
    evaluations: int = 0
    """Of loops' objectives."""
    rate: float | None = None
    """Evaluations a second; None where that is not known."""
    best: float = math.inf
    error: float | None = None
    """The largest distance of a loop's best value from its reference; None where no loop has one."""
    unit: str = ""
    """Of the reference."""
    at_most: int | None = None
    """Evaluations that the loops' own options allow; None if one of them sets no limit."""
    left: tuple[float, bool] | None = None
    """Seconds to go, and whether that is a bound rather than an estimate; None where neither can be told."""

    def __str__(self) -> str:
        evaluations = f"{self.evaluations}"
        if self.at_most is not None and self.ended < self.started:
            evaluations += f" of at most {self.at_most}"
        words = [f"{self.ended}/{self.started} done"]
        if self.evaluations:
            words.append(f"{evaluations} evaluations" + ("" if self.rate is None else f" ({self.rate:.0f}/s)"))
        if self.best < math.inf:
            words.append(f"best {self.best:.8f}")
        if self.error is not None:
            words.append(f"error {self.error:.1e}{self.unit and f' {self.unit}'}")
        if self.left is not None and self.ended < self.started:
            seconds, bound = self.left
            words.append(f"{'at most' if bound else 'about'} {_duration(seconds)} left")
        return f"{self.name}: {', '.join(words)}"


class LoopProgress:
    """One loop, told of its evaluations by the one thread that runs it; an evaluation costs under a microsecond."""

    __slots__ = ("_group", "_progress", "best", "limit", "live", "reference", "rows")

    def __init__(self, progress: Progress, group: _Group, limit: int | None, reference: float | None) -> None:
        self._progress, self._group = progress, group
        self.limit, self.reference = limit, reference
        self.rows = self.live = 0
        self.best = math.inf

    def evaluated(self, value: float, *, recorded: bool = False) -> None:
        """The objective came to ``value``, now or as it is recorded."""
        self.rows += 1
        if value < self.best:
            self.best = value
        if not recorded:
            self.live += 1
        self._progress.tick()

    def again(self) -> None:
        """The loop starts over: it will tell of all its evaluations so far as recorded."""
        self.rows = 0

    def ended(self) -> None:
        """The loop ended."""
        self._progress.loop_ended(self._group, self)


@dataclass
class _Group:
    """The loops, or steps, of one place: those that run one by one, those that ended in sums."""

    name: str
    first: float
    """When its first one began, by a clock that is never set."""
    since: float
    """When the first of those began that run now, or ran last."""
    worked: float = 0.0
    """Seconds in which any of them ran, before that."""
    unit: str = ""
    started: int = 0
    ended: int = 0
    loops: dict[LoopProgress, None] = field(default_factory=dict)
    """Those that run."""
    loops_ended: int = 0
    rows: int = 0
    live: int = 0
    best: float = math.inf
    error: float | None = None
    limits: int | None = 0
    said: tuple[int, float] = (0, -math.inf)
    """How many had ended when a log was last told that all had, and when that was."""

    def take_end(self, loop: LoopProgress) -> None:
        del self.loops[loop]
        self.loops_ended += 1
        self.rows += loop.rows
        self.live += loop.live
        self.best = min(self.best, loop.best)
        self.error = _largest(self.error, loop)

    def now(self, now: float) -> Group:
        running = list(self.loops)
        rows = self.rows + sum(loop.rows for loop in running)
        worked = self.worked + (now - self.since if self.ended < self.started else 0.0)
        rate = (self.live + sum(loop.live for loop in running)) / max(worked, 1e-9)
        error = self.error
        for loop in running:
            error = _largest(error, loop)
        return Group(
            self.name, self.started, self.ended, rows, rate, min([self.best, *(loop.best for loop in running)]), error,
            self.unit, self.limits if self.started and (self.loops or self.loops_ended) else None,
            remaining(self.loops_ended, self.rows, [(loop.rows, loop.limit) for loop in running], rate),
        )  # fmt: skip


def _largest(error: float | None, loop: LoopProgress) -> float | None:
    if loop.reference is None or loop.best == math.inf:
        return error
    return max(error or 0.0, abs(loop.best - loop.reference))


class Display:
    """Where lines appear: refreshed in place on a terminal, as bars in a notebook, else only when they are said.

    A stream that breaks makes it silent: nothing depends on being read.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.quiet = quiet
        self.notebook = not quiet and stream is None and _in_notebook()
        self.live = not quiet and (self.notebook or self.stream.isatty())
        self._bars: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """Write ``text`` once, above the live lines."""
        if self.quiet:
            return
        try:
            if self.live and not self.notebook:
                tqdm.write(f"hybridq: {text}", file=self.stream)
            else:
                print(f"hybridq: {text}", file=self.stream, flush=True)
        except (OSError, ValueError):  # nobody reads it any more, and a run does not depend on that
            self.quiet = True

    def refresh(self, groups: Mapping[str, Group]) -> None:
        """Bring the live lines up to date, one for each group."""
        if self.quiet or not self.live:
            return
        try:
            for name, group in groups.items():
                if self.notebook:
                    self._in_bar(name, group)
                    continue
                if name not in self._bars:
                    self._bars[name] = tqdm(bar_format="{desc}", file=self.stream, leave=True)
                self._bars[name].set_description_str(_fitting(f"hybridq: {group}", self.stream))
        except (OSError, ValueError):
            self.quiet = True

    def _in_bar(self, name: str, group: Group) -> None:
        """Tqdm's own bar of a notebook: over evaluations where a limit is known, else over loops."""
        from tqdm.auto import tqdm as bar

        done, total = group.ended, group.started
        if group.at_most is not None and group.ended < group.started:
            done, total = group.evaluations, group.at_most
        if name not in self._bars:
            self._bars[name] = bar(total=total)
        shown = self._bars[name]
        if shown.total != total:
            shown.reset(total=total)
        shown.n = done
        shown.set_description_str(str(group), refresh=False)
        shown.refresh()

    def close(self) -> None:
        """Leave the last state of each line."""
        for bar in self._bars.values():
            with contextlib.suppress(OSError, ValueError):
                bar.close()
        self._bars.clear()


class Progress:
    """One line per group of loops and of steps, refreshed in place on a terminal.

    Without a terminal one line at most every 30 seconds, and one when a group ends; of a group that goes on and ends
    again and again, one at most every 30 seconds, and one at the end. Thread-safe; an event costs a few microseconds.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._display = Display(quiet=quiet, stream=stream)
        self._groups: dict[str, _Group] = {}
        self._lock = threading.Lock()
        self._next = 0.0
        self._last_log = time.monotonic()

    def message(self, text: str) -> None:
        """Say ``text`` once, above the live lines."""
        with self._lock:
            self._display.say(text)

    def started(self, group: str) -> None:
        """One more step of ``group`` began."""
        with self._lock:
            self._group(group).started += 1
        self.tick()

    def ended(self, group: str) -> None:
        """A step of ``group`` ended."""
        with self._lock:
            self._end(self._groups[group])

    def loop(self, group: str, *, limit: int | None = None, reference: float | None = None, unit: str = ""
             ) -> LoopProgress:  # fmt: skip
        """One more loop of ``group`` began, which tells of its evaluations itself.

        ``limit`` is what its own options allow it to evaluate, ``reference`` what its value should be, in ``unit``.
        """
        with self._lock:
            found = self._group(group)
            loop = LoopProgress(self, found, limit, reference)
            found.loops[loop] = None
            found.started += 1
            found.unit = unit or found.unit
            found.limits = None if limit is None or found.limits is None else found.limits + limit
        self.tick()
        return loop

    def loop_ended(self, group: _Group, loop: LoopProgress) -> None:
        """A loop that `loop` gave has ended."""
        with self._lock:
            if loop in group.loops:
                group.take_end(loop)
                self._end(group)

    def tick(self) -> None:
        """Something happened: show it, if it is time to."""
        if time.monotonic() >= self._next:
            with self._lock:
                self._show()

    def close(self) -> None:
        """Leave the last state of each line on the terminal."""
        with self._lock:
            self._show(force=True)
            for group in self._groups.values():
                if 0 < group.said[0] < group.ended == group.started:
                    self._log_end(group, time.monotonic(), 0.0)
            self._display.close()

    def _group(self, name: str) -> _Group:
        now = time.monotonic()
        group = self._groups.setdefault(name, _Group(name, now, now))
        if group.ended == group.started:
            group.since = now
        return group

    def _end(self, group: _Group) -> None:
        group.ended += 1
        whole = group.ended == group.started
        now = time.monotonic()
        if whole:
            group.worked += now - group.since
        if whole or now >= self._next:
            self._show(force=whole)
        if whole and now - group.first > 1.0:
            self._log_end(group, now, _LOG_SECONDS)

    def _log_end(self, group: _Group, now: float, pause: float) -> None:
        """Say how ``group`` ended, if that was not said in the last ``pause`` seconds."""
        if self._display.live or now - group.said[1] < pause:
            return
        self._last_log = now
        group.said = (group.ended, now)
        self._display.say(str(group.now(now)))

    def _show(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if self._display.quiet or (now < self._next and not force):
            return
        self._next = now + _REFRESH_SECONDS
        if self._display.live:
            self._display.refresh({name: group.now(now) for name, group in self._groups.items()})
        elif now - self._last_log > _LOG_SECONDS:
            self._last_log = now
            running = [str(group.now(now)) for group in self._groups.values() if group.ended < group.started]
            if running:
                self._display.say("; ".join(running))


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _fitting(text: str, stream: TextIO) -> str:
    """``text`` within the terminal's width: what wraps cannot be refreshed in place."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        width = 0
    return text if width < 20 or len(text) < width else text[: width - 2] + "…"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
