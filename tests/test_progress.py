"""What a run says: log lines where nobody watches, lines refreshed in place on a terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, TextIO

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
        loop = progress.loop("minimize")
        loop.evaluated(-1.0)
        loop.ended()
        clock.now += 0.01
    progress.close()
    assert stream.getvalue() == ""


def test_a_log_gets_a_line_at_most_every_thirty_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    loop = progress.loop("minimize")
    progress.loop("minimize")
    for step in range(1000):  # 100 seconds
        clock.now += 0.1
        loop.evaluated(-float(step))
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
    assert stream.getvalue() == "hybridq: problem: 3/3 done\n"


def test_a_group_that_ends_again_and_again_is_seldom_told_of(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    for _ in range(400):  # 40 seconds, one after another
        progress.started("problem")
        clock.now += 0.1
        progress.ended("problem")
    told = [int(done) for done in re.findall(r"problem: (\d+)/\d+ done", stream.getvalue())]
    assert len(told) == 2
    assert told[0] < 15
    assert told[1] - told[0] == pytest.approx(300, abs=5)
    progress.close()
    assert stream.getvalue().splitlines()[-1] == "hybridq: problem: 400/400 done"
    assert len(stream.getvalue().splitlines()) == 3


def test_time_without_loops_is_no_time_of_theirs(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    for _ in range(2):
        loop = progress.loop("minimize")
        for _ in range(100):
            clock.now += 0.1
            loop.evaluated(-1.0)
        loop.ended()
        clock.now += 1000.0
    progress.close()
    assert stream.getvalue().splitlines()[-1].startswith("hybridq: minimize: 2/2 done, 200 evaluations (10/s)")


def test_the_best_value_is_the_lowest_and_nan_is_none(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    loop = progress.loop("g")
    for value in (1.0, float("nan"), -2.5, 7.0):
        loop.evaluated(value)
    clock.now += 2.0
    loop.ended()
    assert stream.getvalue() == "hybridq: g: 1/1 done, 4 evaluations (2/s), best -2.50000000\n"


def test_quiet_is_quiet(clock: Clock, terminal: Terminal) -> None:
    log = io.StringIO()
    for stream in (log, terminal.stream):
        progress = Progress(quiet=True, stream=stream)
        progress.message("hello")
        loop = progress.loop("g")
        clock.now += 100
        loop.evaluated(1.0)
        loop.ended()
        progress.close()
    assert log.getvalue() == terminal.written() == ""


def test_a_terminal_shows_each_group_in_place_and_keeps_its_last_state(clock: Clock, terminal: Terminal) -> None:
    progress = Progress(stream=terminal.stream)
    loop = progress.loop("minimize")
    progress.started("problem")
    for step in range(4):
        clock.now += 1.0
        loop.evaluated(-1.0 - step)
    progress.message("a remark")
    loop.ended()
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
    assert "hybridq: problem: 1/1 done" in written
    assert written.endswith("\n")


def test_a_terminal_is_refreshed_five_times_a_second_at_most(clock: Clock, terminal: Terminal) -> None:
    progress = Progress(stream=terminal.stream)
    loop = progress.loop("g")
    for _ in range(1000):  # two seconds
        clock.now += 0.002
        loop.evaluated(0.0)
    progress.close()
    shown = {int(n) for n in re.findall(r"(\d+) evaluations", terminal.written())}
    assert 5 <= len(shown) <= 12
    assert 1000 in shown


def test_events_from_many_threads_are_all_counted(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    first = progress.loop("g")

    def work() -> None:
        for _ in range(500):
            loop = progress.loop("g")
            loop.evaluated(-1.0)
            loop.ended()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.now += 2.0
    first.ended()
    assert stream.getvalue() == "hybridq: g: 4001/4001 done, 4000 evaluations (2000/s), best -1.00000000\n"


def test_a_log_is_one_line_for_all_that_runs(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    loops = [progress.loop("a"), progress.loop("b")]
    clock.now += 31
    loops[0].evaluated(1.0)
    loops[1].evaluated(2.0)
    (line,) = stream.getvalue().splitlines()
    assert line == "hybridq: a: 0/1 done, 1 evaluations (0/s), best 1.00000000; b: 0/1 done"


def last_line(clock: Clock, loops: list[dict[str, Any]], told: list[tuple[int, float]], ended: int) -> str:
    """The line of loops of one group after 10 seconds, in which each was told its number of equal values."""
    stream = io.StringIO()
    progress = Progress(stream=stream)
    handles = [progress.loop("g", **options) for options in loops]
    for handle, (count, value) in zip(handles, told, strict=True):
        for _ in range(count):
            handle.evaluated(value)
    for handle in handles[:ended]:
        handle.ended()
    clock.now += 31
    progress.tick()
    (line,) = stream.getvalue().splitlines()
    return line.removeprefix("hybridq: g: ")


def test_a_limit_bounds_what_is_left(clock: Clock) -> None:
    line = last_line(clock, [{"limit": 124}], [(62, 1.5)], 0)
    assert line == "0/1 done, 62 of at most 124 evaluations (2/s), best 1.50000000, at most 31 s left"


def test_loops_that_ended_tell_how_long_the_others_take(clock: Clock) -> None:
    line = last_line(clock, [{}, {}, {}], [(100, 1.0), (100, 2.0), (62, 3.0)], 2)
    assert line == "2/3 done, 262 evaluations (8/s), best 1.00000000, about 4 s left"


def test_without_either_nothing_is_told_of_the_time_left(clock: Clock) -> None:
    line = last_line(clock, [{"limit": 500}, {}, {}], [(31, 1.0), (31, 2.0), (31, 3.0)], 0)
    assert line == "0/3 done, 93 evaluations (3/s), best 1.00000000"


def test_the_error_is_the_largest_of_the_loops(clock: Clock) -> None:
    goals = [{"reference": -1.0, "unit": "hartree"}, {"reference": -2.0, "unit": "hartree"}, {}]
    line = last_line(clock, goals, [(1, -0.75), (1, -1.5), (1, 7.0)], 1)
    assert line == "1/3 done, 3 evaluations (0/s), best -1.50000000, error 5.0e-01 hartree, about 0 s left"


def test_recorded_evaluations_are_no_speed(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    loop = progress.loop("g")
    for _ in range(1000):
        loop.evaluated(1.0, recorded=True)
    loop.again()
    for _ in range(1000):
        loop.evaluated(1.0, recorded=True)
    for _ in range(4):
        loop.evaluated(1.0)
    clock.now += 2.0
    loop.ended()
    assert stream.getvalue() == "hybridq: g: 1/1 done, 1004 evaluations (2/s), best 1.00000000\n"


def test_a_line_fits_the_terminal(clock: Clock, terminal: Terminal) -> None:
    fcntl.ioctl(terminal.stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    progress = Progress(stream=terminal.stream)
    progress.loop("g" * 100).evaluated(1.0)
    progress.close()
    shown = [part for part in re.split(r"[\r\n]", terminal.written()) if part.startswith("hybridq")]
    assert shown
    assert all(len(part.rstrip()) <= 39 for part in shown)
    assert shown[-1].rstrip().endswith("…")


class Bar:
    """What tqdm.auto gives in a notebook, as far as it is used."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, total: int) -> None:
        self.total, self.n, self.text, self.closed = total, 0, "", False
        Bar.made.append(self)

    def reset(self, total: int) -> None:
        self.total, self.n = total, 0

    def set_description_str(self, text: str, refresh: bool = True) -> None:
        self.text = text

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_a_notebook_gets_tqdms_own_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=Bar))
    Bar.made.clear()
    progress = Progress()
    loop = progress.loop("g", limit=20)
    for _ in range(5):
        loop.evaluated(1.0)
    clock.now += 1
    progress.tick()
    (bar,) = Bar.made
    assert (bar.n, bar.total) == (5, 20)
    loop.ended()
    progress.close()
    assert (bar.n, bar.total, bar.closed) == (1, 1, True)
    assert bar.text.startswith("g: 1/1 done, 5 evaluations")
