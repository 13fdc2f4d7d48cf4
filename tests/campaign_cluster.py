"""The fault campaign of the cluster: engines, workers, nannies and schedulers killed or stopped under a run."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
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
Fault = Callable[[Marked, random.Random, Case], AbstractContextManager[float]]
"""What is done to a run: see `_inject`."""
LINES = {"": 103, "chain": 40}
"""Of the study's log in an undisturbed run: 63 steps begun and 40 circuits done; the circuits alone."""


@dataclass(frozen=True)
class Place:
    """Where a run of the study keeps its log and its record."""

    log: Path
    store: Path

    def lines(self) -> list[str]:
        """What the study has told so far: each start of a step, each end of a circuit."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def records(self) -> list[Any]:
        """What is recorded so far."""
        return [record for _, record in read_records(self.store / "study")]

    def open(self) -> set[str]:
        """What had begun and is not recorded yet: steps, and loops; and for each chain its next circuit."""
        entries = read_records(self.store / "study")
        loops = {number: r.at for number, r in entries if isinstance(r, records.Loop)}
        found = [r for _, r in entries]
        done = {r.at for r in found if isinstance(r, (records.Step, records.Evaluation))}
        done |= {loops[r.loop] for r in found if isinstance(r, records.LoopEnd)}
        lines = Counter(self.lines())
        begun = {f"study/step[{line.split()[1]}]" for line in lines if line.startswith("step")} | set(loops.values())
        begun |= {f"study/chain[{c}]/circuit[{lines[f'chain {c}']}]" for c in range(2) if lines[f"chain {c}"] < 20}
        return begun - done


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
    return [p for p in processes(run, "hybridq.engines") if _parent(p) != run.process.pid]


def _parent(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent: int = process.ppid()
        return parent
    return 0


def workers(run: Marked) -> list[psutil.Process]:
    """Worker processes of a run's own cluster: those that have engines."""
    found = []
    for pid in {_parent(p) for p in engines(run)} & set(run.alive()):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


@functools.cache
def undisturbed() -> Any:
    """What the study comes to if nothing is done to it."""
    with tempfile.TemporaryDirectory() as scratch:
        answer, errors = Marked(STUDY, Path(scratch) / "log", Path(scratch) / "store", "own", "no").finish(600)
        assert answer, errors
        return json.loads(answer)


def _reached(place: Place, run: Marked, count: int, what: str) -> bool:
    """Wait until the log has so many lines that begin with ``what``; whether the run still goes on then."""

    def there() -> bool:
        return sum(line.startswith(what) for line in place.lines()) >= count

    wait_until(lambda: there() or run.process.poll() is not None, 300)
    return run.process.poll() is None


def _moments(rng: random.Random, faults: int, lines: int) -> list[int]:
    """Lines of the log at which each fault is due: at random, one in each stretch of the run."""
    stretch = 0.75 * lines / faults
    return [1 + int((k + rng.uniform(0.0, 0.6)) * stretch) for k in range(faults)]


def _inject(case: Case, run: Marked, place: Place, rng: random.Random, faults: int,
            fault: Callable[[], AbstractContextManager[float]], what: str = "") -> list[Any]:  # fmt: skip
    """Do ``fault`` again and again, each time when all that the one before had hit is recorded.

    In the midst of what is told in lines that begin with ``what``. A fault is done as its context is entered, which
    gives the moment; what must be true afterwards is looked at as it is left. Returns what was recorded when the last
    one was done.
    """
    case.faults, kept = 0, []
    for moment in _moments(rng, faults, LINES[what]):
        if not _reached(place, run, moment, what):
            break
        kept, hit = place.records(), place.open()
        with fault() as done:
            hit |= place.open()  # a step may have begun just before
            case.faults += 1
            recovered = wait_until(lambda hit=hit: not hit & place.open() or run.process.poll() is not None, 120)
            case.seconds.append(time.monotonic() - done)
            case.check(recovered, f"never recorded: {hit & place.open()}")
    case.check(case.faults == faults, f"the run had ended after {case.faults} of {faults} faults")
    return kept


def _judge(case: Case, run: Marked, place: Place, expected: Any, kept: list[Any]) -> None:
    """What must be true of a run that has ended, of which ``kept`` was recorded before."""
    answer, errors = run.finish(600)
    case.check(run.process.returncode == 0, errors[-2000:])
    if run.process.returncode == 0:
        case.check(json.loads(answer) == expected, f"another result: {answer[:2000]}")
    found = place.records()
    case.lost = len(kept) - sum(a == b for a, b in zip(kept, found, strict=False))
    steps = Counter(record.at for record in found if isinstance(record, (records.Step, records.Evaluation)))
    case.check(not steps or max(steps.values()) == 1, "a step or circuit was recorded twice")
    case.repeated = sum(count - 1 for line, count in Counter(place.lines()).items() if line.startswith("step"))
    case.check(case.repeated <= IN_FLIGHT * case.faults, f"{case.repeated} steps ran again")
    case.check(wait_until(lambda: not run.alive(), SOON), f"left behind: {run.alive()}")


def _disturbed(seed: int, what: str, faults: int, fault: Fault, lines: str = "") -> Case:
    """A run on two workers of its own, with faults in the middle; of what the lines of its log begin with ``lines``."""
    rng, case = random.Random(seed), Case(what)
    with tempfile.TemporaryDirectory() as scratch:
        place, expected = Place(Path(scratch) / "log", Path(scratch) / "store"), undisturbed()
        run = Marked(STUDY, place.log, place.store, "own", "no")
        kept = _inject(case, run, place, rng, faults, lambda: fault(run, rng, case), lines)
        _judge(case, run, place, expected, kept)
    return case


def kill(process: psutil.Process) -> None:
    """``kill -9`` of a process that may have ended."""
    _signal(process, signal.SIGKILL)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _busy(run: Marked) -> psutil.Process | None:
    """An engine process of a worker that is in the middle of a circuit; None once the run has ended."""
    while run.process.poll() is None:
        before = {p: _work(p) for p in engines(run)}
        time.sleep(0.05)
        for process, seconds in before.items():
            if _work(process) > seconds + 0.02:
                return process
    return None


def _work(process: psutil.Process) -> float:
    """Processor seconds of an engine process that has loaded its simulator; of any other, for ever as many."""
    with contextlib.suppress(psutil.Error):
        if any("qiskit_aer" in loaded.path for loaded in process.memory_maps()):
            return float(process.cpu_times().user)
    return 0.0


def kill_engine(_: Forks, seed: int) -> Case:
    """``kill -9`` of an engine process in the middle of a circuit: its worker survives, the program is tried again."""

    @contextmanager
    def fault(run: Marked, rng: random.Random, case: Case) -> Iterator[float]:
        before = {p.pid for p in workers(run)}
        busy = _busy(run)
        case.check(busy is not None, "the run had ended before an engine was busy again")
        if busy is not None:
            kill(busy)
        yield time.monotonic()
        case.check(
            all(psutil.pid_exists(pid) for pid in before) or run.process.poll() is not None, "a worker went, too"
        )

    return _disturbed(seed, "kill -9 of an engine process", 5, fault, "chain")


@contextmanager
def _killed(run: Marked, case: Case, gone: list[psutil.Process]) -> Iterator[float]:
    """Kill workers; there are as many again soon."""
    count, begun = len(workers(run)), time.monotonic()
    case.check(bool(gone), "there was no worker")
    for worker in gone:
        kill(worker)
    yield begun
    pids = {worker.pid for worker in gone}
    back = wait_until(lambda: len({p.pid for p in workers(run)} - pids) >= count
                      or run.process.poll() is not None, SOON)  # fmt: skip
    case.check(back, "the workers did not come back")
    case.within(30, time.monotonic() - begun, "the workers were back")


def _any(run: Marked, rng: random.Random) -> list[psutil.Process]:
    """One of a run's workers; none if there is none."""
    there = workers(run)
    return [rng.choice(there)] if there else []


def kill_worker(_: Forks, seed: int) -> Case:
    """``kill -9`` of a worker process; there is another one soon."""
    return _disturbed(seed, "kill -9 of a worker", 4, lambda run, rng, case: _killed(run, case, _any(run, rng)))


def kill_workers(_: Forks, seed: int) -> Case:
    """``kill -9`` of all worker processes at once; there are as many again soon."""
    return _disturbed(seed, "kill -9 of all workers", 2, lambda run, rng, case: _killed(run, case, workers(run)))


def stop_worker(_: Forks, seed: int) -> Case:
    """A worker process that is stopped for 10 to 60 s, and goes on."""

    @contextmanager
    def fault(run: Marked, rng: random.Random, case: Case) -> Iterator[float]:
        stopped = _any(run, rng)
        case.check(bool(stopped), "there was no worker")
        for worker in stopped:
            worker.send_signal(signal.SIGSTOP)
        goes_on = threading.Timer(rng.uniform(10, 60), lambda: [_signal(worker, signal.SIGCONT) for worker in stopped])
        goes_on.start()
        yield time.monotonic()
        goes_on.join()

    return _disturbed(seed, "SIGSTOP of a worker, then SIGCONT", 1, fault)


def poison(_: Forks, seed: int) -> Case:
    """Three steps in a row that end their workers, beside 60 others, all of which finish."""
    bad = range(first := random.Random(seed).randrange(61), first + 3)
    case, expected = Case(f"steps {bad[0]} to {bad[-1]} end their workers", faults=3), undisturbed()
    steps = ["lost" if index in bad else value for index, value in enumerate(expected["steps"])]
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch) / "log", Path(scratch) / "store")
        run = Marked(STUDY, place.log, place.store, "own", str(first))
        wait_until(lambda: f"step {first}" in place.lines() or run.process.poll() is not None, 300)
        kept, begun = place.records(), time.monotonic()
        _judge(case, run, place, {**expected, "steps": steps}, kept)
        case.seconds.append(time.monotonic() - begun)
        ran = Counter(place.lines())
        # one that waited on the worker that another of them ended has begun only once
        case.check(all(1 <= ran[f"step {k}"] <= 2 for k in bad), "a step that ends workers was tried more than twice")
    return case


def kill_scheduler(_: Forks, seed: int) -> Case:
    """``kill -9`` of a scheduler that runs elsewhere; another one is started in its place."""
    rng, case, port = random.Random(seed), Case("kill -9 of the scheduler"), free_port()
    expected = undisturbed()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as there:
        place = Place(Path(scratch) / "log", Path(scratch) / "store")
        first = there.enter_context(scheduler_and_workers({}, {}, port=port))[1]
        run = Marked(STUDY, place.log, place.store, f"tcp://127.0.0.1:{port}", "no")

        @contextmanager
        def fault() -> Iterator[float]:
            begun = time.monotonic()
            first[0].kill()
            there.close()  # the workers are ended, too
            there.enter_context(scheduler_and_workers({}, {}, port=port))
            yield begun

        kept = _inject(case, run, place, rng, 1, fault)
        _judge(case, run, place, expected, kept)
    return case


def kill_nanny(_: Forks, seed: int) -> Case:
    """``kill -9`` of nannies and their workers, elsewhere: nobody starts them again, the others go on."""
    rng, case = random.Random(seed), Case("kill -9 of a nanny and its worker")
    expected = undisturbed()
    with tempfile.TemporaryDirectory() as scratch, scheduler_and_workers({}, {}, {}) as (address, there):
        place, nannies = Place(Path(scratch) / "log", Path(scratch) / "store"), there[1:]
        run = Marked(STUDY, place.log, place.store, address, "no")

        @contextmanager
        def fault() -> Iterator[float]:
            begun = time.monotonic()
            victim = psutil.Process(nannies.pop(rng.randrange(len(nannies))).process.pid)
            below = victim.children(recursive=True)
            kill(victim)
            for child in below:
                kill(child)
            yield begun

        kept = _inject(case, run, place, rng, 2, fault)
        _judge(case, run, place, expected, kept)
    return case


ROWS: dict[str, Row] = {
    "kill-engine": Row(kill_engine, 4, 20),
    "kill-worker": Row(kill_worker, 2, 15),
    "kill-workers": Row(kill_workers, 2, 10),
    "kill-nanny": Row(kill_nanny, 2, 5),
    "kill-scheduler": Row(kill_scheduler, 4, 20),
    "stop-worker": Row(stop_worker, 4, 30),
    "poison": Row(poison, 4, 20),
}
"""A case of the first is five kills, of the second four, of the third and fourth two."""
