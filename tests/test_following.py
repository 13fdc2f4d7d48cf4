"""A recorded run that is looked at while it grows: nothing is read twice, and nobody is thought to work who is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hybridq as hq
from hybridq.errors import Corrupt, JournalError, WorkflowError
from hybridq.journal import End, Journal, Loop, Opened, Row, RunHeader, Tail, pack_array

HEADER = RunHeader(1, "run", "study", "c", "a", [], 7, None)
OPENED = Opened("host", 12, 100.0, "3.11.7", "cpu", {}, ["study.py"])
LOOP = Loop("study/minimize[0]", "energy", "d", "e", {"args": []}, "COBYLA", "none")


def row(i: int, value: float) -> Row:
    return Row(3, i, pack_array(np.zeros(2)), value, None, 0.0, None, 0.5, "w0", "", 100.0 + i)


@pytest.fixture
def grown(tmp_path: Path) -> Any:
    journal = Journal(tmp_path / "run")
    journal.append_all([HEADER, OPENED, LOOP, row(0, 2.0)])
    yield journal
    journal.close()


def test_a_tail_gives_each_line_once(grown: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    tail = Tail(grown.directory)
    assert [number for number, _ in tail.read()] == [1, 2, 3, 4]
    assert tail.read() == []
    read = []
    hashed = __import__("hybridq.journal").journal.link
    monkeypatch.setattr("hybridq.journal.link", lambda chain, rest: read.append(rest) or hashed(chain, rest))
    grown.append_all([row(1, 1.0), row(2, 3.0)])
    read.clear()
    assert [(number, record.value) for number, record in tail.read() if isinstance(record, Row)] == [(5, 1.0), (6, 3.0)]
    assert len(read) == 2  # the lines before are neither read nor checked again


def test_a_tail_waits_for_the_end_of_a_line(grown: Journal) -> None:
    tail, path = Tail(grown.directory), grown.directory / "journal.jsonl"
    tail.read()
    grown.append(row(1, 1.0))
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert tail.read() == []
    path.write_bytes(whole)
    assert [number for number, _ in tail.read()] == [5]


def test_a_tail_checks_the_chain(grown: Journal) -> None:
    tail, path = Tail(grown.directory), grown.directory / "journal.jsonl"
    tail.read()
    grown.append(row(1, 1.0))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + b"#" + whole[-39:])
    with pytest.raises(Corrupt, match="line 5"):
        tail.read()
    with pytest.raises(JournalError, match="no run"):
        Tail(grown.directory.parent / "other").read()


def test_a_run_is_followed_as_it_grows(grown: Journal) -> None:
    run = hq.load("run", grown.directory.parent)
    assert (run.history.loops[0].rows, run.history.status, run.left) == (1, "running", None)
    assert run.update() is False
    grown.append(row(1, 1.0))
    assert run.update() is True
    assert run.history.loops[0].best == 1.0
    grown.append(End("finished", None, None, 1.0, 2.0))
    assert run.history.status == run.left == "finished"


def test_lines_that_were_taken_back_are_forgotten(grown: Journal) -> None:
    path = grown.directory / "journal.jsonl"
    before = path.read_bytes()
    grown.append_all([row(1, 1.0), row(2, 0.5)])
    run = hq.load("run", grown.directory.parent)
    assert run.history.loops[0].rows == 3
    path.write_bytes(before)
    assert run.history.loops[0].rows == 1
    path.write_bytes(before[:100] + b"#" + before[101:-1])
    with pytest.raises(Corrupt, match="line 1"):
        run.update()


def test_a_driver_that_is_gone_is_told(grown: Journal) -> None:
    run = hq.load("run", grown.directory.parent)
    owner = grown.directory / "owner"
    mine = owner.read_text()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owner.write_text(mine.replace(str(os.getpid()), str(ended.pid)))
    run.update()
    assert str(run.left).startswith(f"its driver is gone (process {ended.pid}@")
    owner.write_text(mine.replace(socket.gethostname(), "elsewhere"))
    run.update()
    assert run.left is None  # of another host nothing is known
    since = mine.index('"since": ') + len('"since": ')
    owner.write_text(mine[:since] + "1000.0}")  # the process of that number began later
    run.update()
    assert str(run.left).startswith("its driver is gone")
    owner.write_text("")
    run.update()
    assert str(run.left).startswith("left by its driver without a word")


def test_figures_of_a_running_run(grown: Journal) -> None:
    from matplotlib.figure import Figure

    run = hq.load("run", grown.directory.parent)
    given = Figure().subplots()
    assert run.plot_convergence(given) is given
    grown.append(row(1, 1.5))
    later = run.plot_convergence(Figure().subplots())
    assert [line.get_ydata().tolist() for line in later.lines] == [[2.0, 1.5]]
    assert run.plot_timeline(Figure().subplots()).get_yticklabels()[0].get_text() == "w0"
    with pytest.raises(WorkflowError, match="reference"):
        run.plot_error(Figure().subplots())
    with pytest.raises(WorkflowError, match="no two loops"):
        run.plot_curve(Figure().subplots())


def test_load_takes_the_name_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no run"):
        hq.load("other", tmp_path)
    with pytest.raises(WorkflowError, match="cannot name"):
        hq.load("../other", tmp_path)
    with pytest.raises(WorkflowError, match="takes the name"):
        hq.load(3, tmp_path)  # type: ignore[arg-type]
