"""Following a run from its journal: it ends with the run, or says that its driver is gone."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import SOON, wait_until
from test_history import HEADER, OPENED, failure, loop, problem, row, step

from hybridq import watch as watching
from hybridq.errors import JournalError
from hybridq.following import RecordedRun
from hybridq.journal import End, Journal, LoopEnd, Record
from hybridq.watch import groups, watch

FINISHED = End("finished", None, None, 1.0, 2.0)
RESULT = {"$": "OptimizeResult", "v": {"fun": 1.0}}


@pytest.fixture
def grown(tmp_path: Path) -> Any:
    journal = Journal(tmp_path / "run")
    journal.append_all([
        HEADER, OPENED, step("s/problem[0]"), loop("s/point[0]/minimize[0]", problem(), options={"maxiter": 30}),
        row(4, 0, -1.5, started=10.0), row(4, 1, -1.75, started=11.5), row(4, 2, -1.25, started=13.5),
    ])  # fmt: skip
    yield journal
    journal.close()


def test_the_state_of_each_group(grown: Journal) -> None:
    history = RecordedRun(grown.directory).history
    (group,) = groups(history, {"point/energy": 3.0}).values()
    assert (group.name, group.started, group.ended, group.evaluations) == ("point/energy", 1, 0, 3)
    assert (group.best, group.error, group.unit, group.at_most) == (-1.75, 0.25, "hartree", 30)
    assert group.left == (9.0, True)
    grown.append(LoopEnd(4, RESULT, 1.0))
    grown.append(FINISHED)
    (group,) = groups(RecordedRun(grown.directory).history, {"point/energy": 3.0}).values()
    assert (group.ended, group.left) == (1, None)


def test_once_says_how_far_it_is(grown: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch(grown.directory, once=True) is None
    assert capsys.readouterr().out.splitlines() == [
        "<b>run</b>: running; 3 evaluations, 1 steps, 0 retries, 0 failures",
        "  point/energy: 0/1 done, 3 of at most 30 evaluations (1/s), best -1.75000000, error 2.5e-01 hartree, "
        "at most 36 s left",
    ]  # fmt: skip
    grown.append_all([failure("s/a[0]"), FINISHED])
    assert watch(grown.directory, once=True, as_json=True) == "finished"
    document = json.loads(capsys.readouterr().out)
    assert (document["status"], document["evaluations"], document["failures"]) == ("finished", 3, 1)
    assert document["groups"][0]["best"] == -1.75
    with pytest.raises(JournalError, match="no run"):
        watch(grown.directory.parent / "other", once=True)


def test_it_follows_until_the_run_ends(grown: Journal, capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(watching, "_POLL_SECONDS", 0.01)
    documents: list[dict[str, Any]] = []
    monkeypatch.setattr(watching, "_print", lambda text: documents.append(json.loads(text)))
    left: list[str | None] = []
    thread = threading.Thread(target=lambda: left.append(watch(grown.directory, as_json=True)))
    thread.start()
    more: list[Record] = [row(4, 3, -1.875), row(4, 4, -1.9), LoopEnd(4, RESULT, 1.0), FINISHED]
    for number, record in enumerate(more):
        assert wait_until(lambda number=number: len(documents) == number + 1, SOON)
        grown.append(record)
    thread.join(SOON)
    assert left == ["finished"]
    assert [document["evaluations"] for document in documents] == [3, 4, 5, 5, 5]
    assert [document["groups"][0]["ended"] for document in documents] == [0, 0, 0, 1, 1]
    assert [document["left"] for document in documents] == [None] * 4 + ["finished"]


def test_a_driver_that_is_gone_ends_it(grown: Journal, capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (grown.directory / "owner").write_text("")
    assert str(watch(grown.directory)).startswith("left by its driver")
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("hybridq: point/energy: 0/1 done, 3 of at most 30 evaluations")
    assert told[1].startswith("hybridq: <b>run</b>: left by its driver without a word")


def test_silence_is_told_once_and_a_log_is_short(grown: Journal, capsys: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Nothing comes for 200 seconds, as of a driver that is stuck or on a host that nothing is known of."""
    clock = [1000.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] > 1200:
            grown.append(FINISHED)

    class Time:
        monotonic = staticmethod(lambda: clock[0])

    Time.sleep = staticmethod(sleep)  # type: ignore[attr-defined]
    monkeypatch.setattr(watching, "time", Time)
    assert watch(grown.directory) == "finished"
    told = capsys.readouterr().err.splitlines()
    assert sum("nothing new is recorded for 60 s" in line for line in told) == 1
    assert sum("0/1 done" in line for line in told) == 6 + 1  # every 30 seconds, and at the end


def test_a_thousand_loops_are_folded_in_bounded_memory(grown: Journal) -> None:
    grown.append_all([loop(f"s/p[{i}]/minimize[0]") for i in range(1000)])
    rng = np.random.default_rng(1)
    first = 8
    for i in range(20):
        grown.append_all([row(first + k, i, float(rng.normal())) for k in range(1000)])
    run = RecordedRun(grown.directory, points=3, spans=2)
    found = groups(run.history, {})
    assert found["p/energy"].evaluations == 20_000
    assert all(len(one.curve) <= 3 for one in run.history.loops)
