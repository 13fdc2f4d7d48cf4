"""Processes that tests start, found again by a mark in their environment, children included."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "HYBRIDQ_TEST_MARK"
SITE = next(p for p in sys.path if p.endswith("site-packages"))


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


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def scheduler_and_workers(
    *workers: dict[str, str], isolated: bool = False, port: int | None = None, dashboard: int | None = None
) -> Iterator[tuple[str, list[Marked]]]:
    """A scheduler and workers as processes of their own on loopback; the scheduler's address, and it and they."""
    port = free_port() if port is None else port
    address = f"tcp://127.0.0.1:{port}"
    flags = ["-S", "-P"] if isolated else ["-P"]
    scheduler = [*flags, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port)]
    worker = [*flags, "-m", "distributed.cli.dask_worker", address, "--host", "127.0.0.1", "--no-dashboard"]
    site = {"PYTHONPATH": SITE} if isolated else {}
    shown = ["--no-dashboard"] if dashboard is None else ["--dashboard-address", f"127.0.0.1:{dashboard}"]
    processes = [Marked(*scheduler, *shown, env=site)]
    processes += [Marked(*worker, "--nthreads", "1", env={**site, **env}) for env in workers]
    try:
        from distributed import Client

        with Client(address, timeout=30) as client:
            client.wait_for_workers(len(workers), timeout=60)
        yield address, processes
    finally:
        for process in reversed(processes):
            process.process.terminate()
        for process in processes:
            process.finish(30)
        assert wait_until(lambda: not any(p.alive() for p in processes), SOON)
