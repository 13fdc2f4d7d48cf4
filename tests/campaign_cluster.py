"""The fault campaign of the cluster: engines, workers, nannies and schedulers killed or stopped under a run."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from campaign import Case, Forks, Row
from processes import SOON, Marked, free_port, scheduler_and_workers, wait_until

from hybridq import journal as records
from hybridq.journal import read_records

STUDY = Path(__file__).parent / "studies" / "clustered.py"
IN_FLIGHT = 8
"""Steps at most that are on two workers at once, and those that are tried once more before they are given up."""


def processes(run: Marked, what: str) -> list[psutil.Process]:
    """Those of a run whose command line holds ``what``: engines, or workers."""
    found = []
    for pid in run.alive():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if what in " ".join(process.cmdline()):
                found.append(process)
    return found


def engines(run: Marked) -> list[psutil.Process]:
    """Engine processes of a run's workers; not that of its driver."""
    return [p for p in processes(run, "hybridq.engines") if p.ppid() != run.process.pid]


def workers(run: Marked) -> list[psutil.Process]:
    """Worker processes of a run's own cluster: those that have engines."""
    found = {p.ppid() for p in engines(run)}
    return [psutil.Process(pid) for pid in found]


@functools.cache
def undisturbed() -> Any:
    """What the study comes to if nothing is done to it."""
    with tempfile.TemporaryDirectory() as scratch:
        answer, errors = Marked(STUDY, Path(scratch) / "log", Path(scratch) / "store", "own", "no").finish(600)
        assert answer, errors
        return json.loads(answer)


def _started(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def _moment(log: Path, run: Marked, rng: random.Random) -> bool:
    """Wait until some steps have begun, and a little longer; whether the run still goes on then."""
    count = rng.randrange(1, 30)
    wait_until(lambda: len(_started(log)) >= count or run.process.poll() is not None, 300)
    time.sleep(rng.uniform(0, 0.5))
    return run.process.poll() is None


def _judge(case: Case, run: Marked, log: Path, store: Path, begun: float, expected: Any) -> None:
    """What must be true of a run that has ended."""
    answer, errors = run.finish(600)
    case.check(run.process.returncode == 0, errors[-2000:])
    if run.process.returncode == 0:
        case.check(json.loads(answer) == expected, f"another result: {answer[:2000]}")
    found = [record for _, record in read_records(store / "study")]
    steps = Counter(record.at for record in found if isinstance(record, records.Step))
    case.check(not steps or max(steps.values()) == 1, "a step was recorded twice")
    case.repeated = sum((Counter(_started(log)) - Counter(set(_started(log)))).values())
    case.check(case.repeated <= IN_FLIGHT, f"{case.repeated} steps ran again")
    case.check(wait_until(lambda: not run.alive(), SOON), f"left behind: {run.alive()}")
    case.seconds.append(time.monotonic() - begun)


def _disturbed(seed: int, what: str, fault: Callable[[Marked, random.Random, Case], None], expected: Any = None,
               poison: str = "no") -> Case:  # fmt: skip
    """A run on two workers of its own, with a fault in the middle."""
    rng, case = random.Random(seed), Case(what)
    with tempfile.TemporaryDirectory() as scratch:
        log, store = Path(scratch) / "log", Path(scratch) / "store"
        expected = expected or undisturbed()
        run = Marked(STUDY, log, store, "own", poison)
        if _moment(log, run, rng):
            begun = time.monotonic()
            fault(run, rng, case)
            _judge(case, run, log, store, begun, expected)
        else:
            case.problems.append("the run had ended before anything was done to it")
            run.finish(60)
    return case


def kill(process: psutil.Process) -> None:
    """``kill -9`` of a process that may have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def kill_engine(_: Forks, seed: int) -> Case:
    """``kill -9`` of an engine process: its worker survives, the program is tried again."""

    def fault(run: Marked, rng: random.Random, case: Case) -> None:
        before = {p.pid for p in workers(run)}
        kill(rng.choice(engines(run)))
        time.sleep(0.5)
        case.check(
            all(psutil.pid_exists(pid) for pid in before) or run.process.poll() is not None, "a worker went, too"
        )

    return _disturbed(seed, "kill -9 of an engine process", fault)


def kill_worker(_: Forks, seed: int) -> Case:
    """``kill -9`` of a worker process."""
    return _disturbed(seed, "kill -9 of a worker", lambda run, rng, case: kill(rng.choice(workers(run))))


def kill_workers(_: Forks, seed: int) -> Case:
    """``kill -9`` of all worker processes at once; there are as many again soon."""

    def fault(run: Marked, rng: random.Random, case: Case) -> None:
        gone = workers(run)
        for worker in gone:
            kill(worker)
        pids = {worker.pid for worker in gone}
        back = wait_until(lambda: len({p.pid for p in workers(run)} - pids) == len(pids)
                          or run.process.poll() is not None, 60)  # fmt: skip
        case.check(back, "the workers did not come back")

    return _disturbed(seed, "kill -9 of all workers", fault)


def stop_worker(_: Forks, seed: int) -> Case:
    """A worker process that is stopped for a while, and goes on."""

    def fault(run: Marked, rng: random.Random, case: Case) -> None:
        stopped = rng.choice(workers(run))
        stopped.send_signal(signal.SIGSTOP)
        time.sleep(rng.uniform(2, 12))
        with contextlib.suppress(psutil.NoSuchProcess):
            stopped.send_signal(signal.SIGCONT)

    return _disturbed(seed, "SIGSTOP of a worker, then SIGCONT", fault)


def poison(_: Forks, seed: int) -> Case:
    """Three steps in a row that end their workers, beside others, all of which finish."""
    expected = undisturbed()
    lost = [value if index not in (20, 21, 22) else "lost" for index, value in enumerate(expected["steps"])]
    return _disturbed(seed, "poison", lambda *_: None, {**expected, "steps": lost}, "poison")


def kill_scheduler(_: Forks, seed: int) -> Case:
    """``kill -9`` of a scheduler that runs elsewhere; another one is started in its place."""
    rng, case, port = random.Random(seed), Case("kill -9 of the scheduler"), free_port()
    expected = undisturbed()
    with tempfile.TemporaryDirectory() as scratch:
        log, store = Path(scratch) / "log", Path(scratch) / "store"
        with scheduler_and_workers({}, {}, port=port) as (_, first):
            run = Marked(STUDY, log, store, f"tcp://127.0.0.1:{port}", "no")
            going = _moment(log, run, rng)
            case.check(going, "the run had ended before anything was done to it")
            begun = time.monotonic()
            first[0].kill()
        with scheduler_and_workers({}, {}, port=port):
            _judge(case, run, log, store, begun, expected)
    return case


def kill_nanny(_: Forks, seed: int) -> Case:
    """``kill -9`` of a nanny and its worker, elsewhere: nobody starts them again, the others go on."""
    rng, case = random.Random(seed), Case("kill -9 of a nanny and its worker")
    expected = undisturbed()
    with tempfile.TemporaryDirectory() as scratch, scheduler_and_workers({}, {}) as (address, there):
        log, store = Path(scratch) / "log", Path(scratch) / "store"
        run = Marked(STUDY, log, store, address, "no")
        case.check(_moment(log, run, rng), "the run had ended before anything was done to it")
        begun = time.monotonic()
        victim = psutil.Process(rng.choice(there[1:]).process.pid)
        below = victim.children(recursive=True)
        kill(victim)
        for child in below:
            kill(child)
        _judge(case, run, log, store, begun, expected)
    return case


ROWS: dict[str, Row] = {
    "kill-engine": Row(kill_engine, 2, 100),
    "kill-worker": Row(kill_worker, 2, 60),
    "kill-workers": Row(kill_workers, 1, 20),
    "kill-nanny": Row(kill_nanny, 1, 10),
    "kill-scheduler": Row(kill_scheduler, 2, 20),
    "stop-worker": Row(stop_worker, 1, 30),
    "poison": Row(poison, 1, 20),
}
