"""What a run says while it runs: live lines on a terminal, log lines elsewhere, all on stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

__all__ = ["Progress"]

_LOG_SECONDS = 30.0
_REFRESH_SECONDS = 0.2


@dataclass
class _Group:
    """The loops of one kind: all that were started at the same place of the program."""

    since: float
    started: int = 0
    ended: int = 0
    evaluations: int = 0
    best: float = float("inf")
    bar: tqdm[None] | None = None

    def line(self, name: str) -> str:
        rate = self.evaluations / max(time.monotonic() - self.since, 1e-9)
        return f"{name}: {self.ended}/{self.started} done, {self.evaluations} evaluations ({rate:.0f}/s)" + (
            f", best {self.best:.8f}" if self.evaluations else ""
        )


class Progress:
    """One line per group of loops and of steps, refreshed in place on a terminal.

    Without a terminal one line at most every 30 seconds, and one when a group ends. Thread-safe; an event costs
    a few microseconds.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self._groups: dict[str, _Group] = {}
        self._lock = threading.Lock()
        self._next = 0.0
        self._last_log = time.monotonic()

    def message(self, text: str) -> None:
        """Say ``text`` once, above the live lines."""
        if self._quiet:
            return
        with self._lock:
            self._say(text)

    def started(self, group: str) -> None:
        """One more loop or step of ``group`` began."""
        with self._lock:
            self._groups.setdefault(group, _Group(time.monotonic())).started += 1
            self._show()

    def evaluated(self, group: str, value: float) -> None:
        """A loop of ``group`` evaluated its objective to ``value``."""
        with self._lock:
            found = self._groups.setdefault(group, _Group(time.monotonic()))
            found.evaluations += 1
            found.best = min(found.best, value)
            self._show()

    def ended(self, group: str) -> None:
        """A loop or step of ``group`` ended."""
        with self._lock:
            found = self._groups[group]
            found.ended += 1
            self._show(force=found.ended == found.started)
            logs = not (self._quiet or self._live)
            if logs and found.ended == found.started and time.monotonic() - found.since > 1.0:
                self._log(group, found)

    def close(self) -> None:
        """Leave the last state of each line on the terminal."""
        with self._lock:
            self._show(force=True)
            for group in self._groups.values():
                if group.bar is not None:
                    with contextlib.suppress(OSError, ValueError):
                        group.bar.close()
                    group.bar = None

    def _show(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if self._quiet or (now < self._next and not force):
            return
        self._next = now + _REFRESH_SECONDS
        if self._live:
            try:
                for name, group in self._groups.items():
                    if group.bar is None:
                        group.bar = tqdm(bar_format="{desc}", file=self._stream, leave=True)
                    group.bar.set_description_str(f"hybridq: {group.line(name)}")
            except (OSError, ValueError):
                self._quiet = True
        elif now - self._last_log > _LOG_SECONDS:
            for name, group in self._groups.items():
                if group.ended < group.started:
                    self._log(name, group)

    def _log(self, name: str, group: _Group) -> None:
        self._last_log = time.monotonic()
        self._say(group.line(name))

    def _say(self, text: str) -> None:
        try:
            if self._live:
                tqdm.write(f"hybridq: {text}", file=self._stream)
            else:
                print(f"hybridq: {text}", file=self._stream, flush=True)
        except (OSError, ValueError):  # nobody reads it any more, and a run does not depend on that
            self._quiet = True
