"""Real kills: the driver, an engine, a worker; Ctrl-C in the middle of a circuit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from processes import SOON, Marked, wait_until
from runs import recorded

from hybridq import journal as records
from hybridq.journal import read_records

STUDIES = Path(__file__).parent / "studies"


def keys(directory: Path) -> list[tuple[str, object]]:
    """What each record answers: locations of calls, loop and index of rows."""
    found: list[tuple[str, object]] = []
    for _, record in read_records(directory):
        match record:
            case records.Step() | records.Evaluation() | records.Event() | records.Loop():
                found.append((record.kind, record.at))
            case records.Row():
                found.append(("row", (record.loop, record.i)))
            case records.LoopEnd():
                found.append(("end", record.loop))
    return found


def recorded_steps(directory: Path) -> set[str]:
    """Lines that the recorded steps of ``killable.py`` wrote when they ran."""
    found = set()
    for _, record in read_records(directory):
        if isinstance(record, records.Step):
            index = record.inputs[0][1]
            found.add(f"{record.at.rpartition('/')[2].partition('[')[0]} {index}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 10])
def test_the_driver_killed_at_random_times(kills: int, tmp_path: Path) -> None:
    undisturbed = Marked(STUDIES / "killable.py", tmp_path / "log0", tmp_path / "a")
    expected, _ = undisturbed.finish()
    assert undisturbed.process.returncode == 0
    whole = keys(tmp_path / "a" / "study")

    seed = random.SystemRandom().randrange(2**32)
    print(f"kills drawn with seed {seed}")
    rng = random.Random(seed)
    log, store = tmp_path / "log", tmp_path / "b"
    progress = []
    for _ in range(kills):
        run = Marked(STUDIES / "killable.py", log, store)
        lines = rng.randrange(1, max(2, len(whole) // kills * 2))
        journal, before = store / "study" / "journal.jsonl", size(store)
        moment = rng.uniform(0.0, 0.2)
        reached = wait_until(
            lambda journal=journal, before=before, lines=lines, run=run: (
                run.process.poll() is not None or (journal.exists() and size(store) >= before + 150 * lines)
            ),
            120,
        )
        assert reached, "the run made no progress"
        time.sleep(moment)
        run.kill()
        assert wait_until(lambda run=run: not run.alive(), SOON), f"left behind: {run.alive()}"
        done = recorded_steps(store / "study") if journal.exists() else set()
        executed = Counter(log.read_text().splitlines()) if log.exists() else Counter()
        progress.append((len(keys(store / "study")), done, executed))

    last = Marked(STUDIES / "killable.py", log, store)
    answer, errors = last.finish()
    assert last.process.returncode == 0, errors
    assert not last.alive()

    assert json.loads(answer) == json.loads(expected)
    resumed = keys(store / "study")
    assert Counter(key for key in resumed if key[0] != "row" and key[0] != "end").most_common(1)[0][1] == 1
    assert Counter(resumed).most_common(1)[0][1] == 1, "a call was recorded twice"
    assert len(resumed) == len(whole)
    assert len({count for count, _, _ in progress}) >= min(4, kills - 1), (
        f"the kills all hit the same place: seed {seed}"
    )
    final = Counter(log.read_text().splitlines())
    for _, done, executed in progress:
        for line in done:
            assert final[line] == executed[line], f"{line} was recorded and then executed again"


def size(store: Path) -> int:
    journal = store / "study" / "journal.jsonl"
    return journal.stat().st_size if journal.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("where", ["driver", "cluster"])
def test_ctrl_c_in_the_middle_of_a_circuit(where: str, tmp_path: Path) -> None:
    # the driver's own engine takes short programs only, so many of them; the cluster one that takes a minute
    qubits, reps = ("14", "60") if where == "driver" else ("22", "60")
    run = Marked(STUDIES / "circuits.py", where, tmp_path, qubits, reps)

    assert wait_until(lambda: bool(engines_of(run, 3.0)), 120), "no engine process was busy"
    run.interrupt()
    _, errors = run.finish(timeout=SOON)
    assert run.process.returncode in (-signal.SIGINT, 130)
    assert "Resume with: " in errors
    assert "circuits.py" in errors.partition("Resume with: ")[2]
    assert wait_until(lambda: not run.alive(), SOON)
    ends = recorded(tmp_path / "circuits", records.End)
    assert [end.status for end in ends] == ["interrupted"]


def engines_of(run: Marked, seconds: float = 0.0) -> list[psutil.Process]:
    """Engine processes of a run that have computed for more than ``seconds``."""
    found = []
    for pid in run.alive():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended while it was looked at
            process = psutil.Process(pid)
            if "hybridq.engines" in " ".join(process.cmdline()) and process.cpu_times().user > seconds:
                found.append(process)
    return found


@pytest.mark.slow
def test_an_engine_killed_under_a_circuit(tmp_path: Path) -> None:
    run = Marked(STUDIES / "circuits.py", "cluster", tmp_path, "19", "40")
    assert wait_until(lambda: bool(engines_of(run, 2.5)), 120), "no engine process was busy"
    engine = engines_of(run, 2.5)[0]
    worker = engine.parent()
    assert worker is not None
    assert worker.pid != run.process.pid
    os.kill(engine.pid, signal.SIGKILL)
    assert wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, SOON)
    answer, errors = run.finish(timeout=600)
    assert run.process.returncode == 0, errors
    values = json.loads(answer.splitlines()[-1])
    assert values[0] == values[1]
    evaluations = recorded(tmp_path / "circuits", records.Evaluation)
    assert len(evaluations) == 2
    assert sorted(r.attempt for r in evaluations) == [0, 1], "nothing was tried again, so nothing was killed in use"
    assert worker.is_running() or run.process.poll() is not None
    assert wait_until(lambda: not run.alive(), SOON)


@pytest.mark.slow
def test_ctrl_c_while_the_cluster_starts(tmp_path: Path) -> None:
    run = Marked(STUDIES / "circuits.py", "cluster", tmp_path, "20", "60")
    assert wait_until(lambda: len(run.alive()) > 2, 60), "no worker was started"
    run.interrupt()
    _, errors = run.finish(timeout=SOON)
    assert run.process.returncode in (-signal.SIGINT, 130)
    assert "Resume with: " in errors
    assert wait_until(lambda: not run.alive(), SOON), "left behind"
