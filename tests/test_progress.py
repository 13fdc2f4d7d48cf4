"""What a run says: log lines where nobody watches, lines refreshed in place on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TextIO

import pytest

from hybridq import progress as progresses
from hybridq.progress import Progress


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progresses, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Terminal:
    """A pseudo-terminal, whose screen is read from its other end."""

    def __init__(self) -> None:
        self._main, worker = pty.openpty()
        self.stream: TextIO = os.fdopen(worker, "w")
        self._read = bytearray()
        self._reader = threading.Thread(target=self._follow)
        self._reader.start()

    def _follow(self) -> None:
        while True:
            try:
                data = os.read(self._main, 4096)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            self._read += data

    def written(self) -> str:
        """Everything written, after closing the terminal."""
        if not self.stream.closed:
            self.stream.close()
            self._reader.join()
            os.close(self._main)
        return self._read.decode()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    found = Terminal()
    yield found
    found.written()


def test_messages_are_lines_of_a_log(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.message("run h2 in ./runs/h2")
    progress.message("done")
    progress.close()
    assert stream.getvalue() == "hybridq: run h2 in ./runs/h2\nhybridq: done\n"


def test_a_short_run_is_silent_in_a_log(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    for _ in range(50):
        progress.started("minimize")
        progress.evaluated("minimize", -1.0)
        progress.ended("minimize")
        clock.now += 0.01
    progress.close()
    assert stream.getvalue() == ""


def test_a_log_gets_a_line_at_most_every_thirty_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.started("minimize")
    progress.started("minimize")
    for step in range(1000):  # 100 seconds
        clock.now += 0.1
        progress.evaluated("minimize", -float(step))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.fullmatch(r"hybridq: minimize: 0/2 done, \d+ evaluations \(10/s\), best -\d+\.\d{8}", line)
    assert [int(re.findall(r"(\d+) eval", line)[0]) // 100 for line in lines] == [3, 6, 9]


def test_the_end_of_a_group_is_a_line_of_the_log(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    for _ in range(3):
        progress.started("problem")
    for count in range(3):
        assert stream.getvalue() == ""
        clock.now += 2.0
        progress.ended("problem")
        assert (stream.getvalue() != "") == (count == 2)
    assert stream.getvalue() == "hybridq: problem: 3/3 done, 0 evaluations (0/s)\n"


def test_the_best_value_is_the_lowest_and_nan_is_none(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.started("g")
    for value in (1.0, float("nan"), -2.5, 7.0):
        progress.evaluated("g", value)
    clock.now += 2.0
    progress.ended("g")
    assert stream.getvalue() == "hybridq: g: 1/1 done, 4 evaluations (2/s), best -2.50000000\n"


def test_quiet_is_quiet(clock: Clock, terminal: Terminal) -> None:
    log = io.StringIO()
    for stream in (log, terminal.stream):
        progress = Progress(quiet=True, stream=stream)
        progress.message("hello")
        progress.started("g")
        clock.now += 100
        progress.evaluated("g", 1.0)
        progress.ended("g")
        progress.close()
    assert log.getvalue() == terminal.written() == ""


def test_a_terminal_shows_each_group_in_place_and_keeps_its_last_state(clock: Clock, terminal: Terminal) -> None:
    progress = Progress(stream=terminal.stream)
    progress.started("minimize")
    progress.started("problem")
    for step in range(4):
        clock.now += 1.0
        progress.evaluated("minimize", -1.0 - step)
    progress.message("a remark")
    progress.ended("minimize")
    progress.ended("problem")
    progress.close()
    written = terminal.written()
    assert "\r" in written.replace("\r\n", "\n")  # refreshed, not appended
    assert "hybridq: a remark" in written
    for count in range(1, 5):
        assert f"minimize: 0/1 done, {count} evaluations (1/s), best -{count}.00000000" in written
    assert written.rindex("hybridq: minimize: 1/1 done, 4 evaluations (1/s), best -4.0000000") > written.index(
        "a remark"
    )
    assert "hybridq: problem: 1/1 done, 0 evaluations (0/s)" in written
    assert written.endswith("\n")


def test_a_terminal_is_refreshed_five_times_a_second_at_most(clock: Clock, terminal: Terminal) -> None:
    progress = Progress(stream=terminal.stream)
    progress.started("g")
    for _ in range(1000):  # two seconds
        clock.now += 0.002
        progress.evaluated("g", 0.0)
    progress.close()
    shown = {int(n) for n in re.findall(r"(\d+) evaluations", terminal.written())}
    assert 5 <= len(shown) <= 12
    assert 1000 in shown


def test_events_from_many_threads_are_all_counted(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.started("g")

    def work() -> None:
        for _ in range(500):
            progress.started("g")
            progress.evaluated("g", -1.0)
            progress.ended("g")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.now += 2.0
    progress.ended("g")
    assert stream.getvalue() == "hybridq: g: 4001/4001 done, 4000 evaluations (2000/s), best -1.00000000\n"
