"""Processes that tests start, found again by a mark in their environment, children included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

MARK = "HYBRIDQ_TEST_MARK"


class Marked:
    """A Python script started in a session of its own, and everything that it starts."""

    def __init__(self, *command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=cwd,
            env={**os.environ, **(env or {}), MARK: self.mark},
        )

    def alive(self) -> list[int]:
        """Processes that carry the mark and still run."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environ = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except (OSError, IndexError):
                continue  # it ended while it was looked at
            if f"{MARK}={self.mark}".encode() in environ.split(b"\0") and state not in "ZX":
                found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """``kill -9`` of the script's own process, not of what it started."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it: to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end; stdout and stderr."""
        return self.process.communicate(timeout=timeout)


SOON = 60.0
"""Seconds within which what takes a few is done on a machine that is busy with other tests."""


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether ``condition()`` came true within ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
