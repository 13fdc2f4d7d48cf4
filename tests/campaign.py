"""The fault campaign of the driver and its journal: what can go wrong, done to a run, and what must then be true.

Each row of `ROWS` injects one kind of fault. A case is known by its seed alone, so that it can be replayed. The tests
do a few cases of a row; ``python -m benchmarks faults`` does them at length and prints a table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from processes import SOON, Marked, wait_until

from hybridq import journal as records
from hybridq.errors import JournalError
from hybridq.faults import ERRORS, VARIABLE
from hybridq.journal import load_value, read_records

STUDIES = Path(__file__).parent / "studies"


@dataclass
class Case:
    """One case of a row: what was done, and what came of it."""

    what: str
    problems: list[str] = field(default_factory=list)
    """What was not as it must be; empty if the run survived."""
    lost: int = 0
    """Records that the run had acknowledged and that were not there afterwards."""
    faults: int = 1
    """How many were injected; the run survives a case only if it survives them all."""
    repeated: int | None = None
    """Evaluations that were executed more often than they were recorded; None where they are not counted."""
    late: list[str] = field(default_factory=list)
    """What took longer than it may on a machine that does nothing else: the benchmark judges it, the tests do not."""
    seconds: list[float] = field(default_factory=list)
    """Of each recovery, from the start of a process (or of its fork) to its first live evaluation, or its end."""

    def check(self, true: bool, problem: str) -> None:
        """Note ``problem`` unless ``true``."""
        if not true:
            self.problems.append(problem)

    def within(self, limit: float, seconds: float, what: str) -> None:
        """Note that ``what`` took longer than ``limit`` seconds, if it did."""
        if seconds > limit:
            self.late.append(f"{what} after {seconds:.1f} s")


@dataclass(frozen=True)
class Row:
    """A row of the matrix of faults."""

    case: Callable[[Forks, int], Case]
    brief: int
    """Cases in the tests."""
    long: int
    """Cases at length."""


# -- what a run's record says --------------------------------------------------------------------------------------

VOLATILE = {"seconds", "started", "time", "where", "bytes", "attempt", "need", "circuit"}
"""Members of records; a circuit's QPY holds identifiers drawn at random, and its digest stands beside it."""


def outline(directory: Path) -> list[Any]:
    """Everything that a record says except when, where and how long; without who opened and left it."""
    found: list[Any] = []
    loops: dict[int, str] = {}
    programs: dict[int, str] = {}
    for number, record in read_records(directory):
        if isinstance(record, records.Loop):
            loops[number] = record.at
        if not isinstance(record, (records.Opened, records.End)):
            fields = {k: v for k, v in dataclasses.asdict(record).items() if k not in VOLATILE}
            if isinstance(record, (records.Row, records.LoopEnd)):
                fields["loop"] = loops[record.loop]  # not its header's line, which resumes before it move
            if isinstance(record, records.Row):  # a resumed loop names its program once more
                fields["program"] = programs[record.loop] = record.program or programs.get(record.loop, "")
            if isinstance(record, records.Event) and "/now[" in record.at:
                del fields["output"]
            found.append([record.kind, fields])
    return found


def rows(directory: Path) -> list[int]:
    """Recorded rows of each loop, in the order of the loops."""
    found = Counter[int]()
    order = []
    for number, record in read_records(directory):
        if isinstance(record, records.Loop):
            order.append(number)
        elif isinstance(record, records.Row):
            found[record.loop] += 1
    return [found[number] for number in order]


def damaged(directory: Path) -> list[str]:
    """Files of a run that are not what its record says, each as the error that names it."""
    try:
        entries = read_records(directory)
    except JournalError as error:
        return [str(error)]
    found = []
    for _, record in entries:
        for document in dataclasses.asdict(record).values():
            try:
                load_value(directory, document)
            except JournalError as error:
                found.append(str(error))
    return found


# -- runs without circuits, in forks -------------------------------------------------------------------------------


class Forks:
    """The study of ``studies/forks.py``: an undisturbed run of it to compare with, and runs that are disturbed."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        environment.pop(VARIABLE, None)
        self.process = subprocess.Popen(
            [sys.executable, STUDIES / "forks.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        self._numbers = iter(range(10**9))
        self.minutes = 1.0
        """How long a case goes on that lasts as long as it is given."""
        self._started = contextlib.ExitStack()
        clean = self.fresh()
        self.expected = self.run(clean, count=True)
        assert self.expected["status"] == 0, self.expected
        assert self.expected["error"] is None, self.expected
        self.clean = clean / "study"
        self.outline = outline(self.clean)
        self.passed: dict[str, int] = self.expected["passed"]

    def fresh(self) -> Path:
        """A store that does not exist yet."""
        return self.scratch / f"store{next(self._numbers)}"

    def run(self, store: Path, **asked: Any) -> dict[str, Any]:
        """Run the study in a fork, ended or not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        message = {"store": str(store), "log": f"{store}.log", **asked}
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        reply: dict[str, Any] = json.loads(self.process.stdout.readline())
        return reply

    def acknowledged(self, store: Path) -> dict[int, int]:
        """Rows that the study knew to be recorded, by loop; rows of the last evaluation are not among them."""
        found: dict[int, int] = {}
        for line in self._log(store):
            if line[0].isdecimal():
                found[int(line[0])] = max(found.get(int(line[0]), 0), int(line[1]))
        return found

    def lost(self, store: Path) -> int:
        """Acknowledged rows that are not in the record."""
        acknowledged = self.acknowledged(store)
        if not acknowledged:
            return 0
        found = rows(store / "study")
        return sum(max(0, count - (found[loop] if loop < len(found) else 0)) for loop, count in acknowledged.items())

    def executed(self, store: Path) -> int:
        """Evaluations that ran live."""
        return sum(line[0] == "live" for line in self._log(store))

    def _log(self, store: Path) -> list[list[str]]:
        log = Path(f"{store}.log")
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    def finish(self, case: Case, store: Path, **asked: Any) -> None:
        """Run the study to its end, and compare it with the undisturbed one."""
        begun = time.perf_counter()
        reply = self.run(store, **asked)
        case.seconds.append(reply.get("live") or time.perf_counter() - begun)
        case.check(reply["status"] == 0 and reply["error"] is None, f"the resumed run ended with {reply}")
        case.check(reply.get("answer") == self.expected["answer"], "another result")
        if not case.problems:
            self.compare(case, store)

    def compare(self, case: Case, store: Path) -> None:
        """Check that the record is an undisturbed one's, and that nothing else is left."""
        case.lost += self.lost(store)
        found = outline(store / "study")
        case.check(found == self.outline, f"the record has {len(found)} lines, not {len(self.outline)}, or others")
        case.repeated = (case.repeated or 0) + self.executed(store) - sum(rows(store / "study"))
        left = {p.name for p in (store / "study").iterdir()} | {p.name for p in (store / "study/values").glob(".*")}
        case.check(left == {"journal.jsonl", "values", "owner"}, f"left behind: {left}")
        case.check((store / "study/owner").stat().st_size == 0, "the lock names an owner who has left")

    @functools.cached_property
    def client(self) -> Any:
        """Of a Dask cluster of two worker processes, for cases that leave one as it is; started when it is needed."""
        from distributed import Client, LocalCluster

        cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50
        )
        return self._started.enter_context(Client(self._started.enter_context(cluster)))

    def close(self) -> None:
        """End the process, and the cluster if one was started, and remove its stores."""
        self._started.close()
        self.process.communicate(timeout=60)


@contextmanager
def forks() -> Iterator[Forks]:
    """A `Forks` in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="hybridq-faults-") as scratch:
        found = Forks(Path(scratch))
        try:
            yield found
        finally:
            found.close()


def places(forks: Forks) -> list[tuple[str, int]]:
    """Each passing of each point of an undisturbed run, as name and number; what a clock decides, once."""
    found = []
    for name, count in forks.passed.items():
        found += [(name, k) for k in range(1, (1 if name.startswith("sync.") else count) + 1)]
    return found


def spread(choices: Sequence[Any], seed: int) -> Any:
    """One of ``choices``: consecutive seeds meet all of them, the first few far apart."""
    stride = next(s for s in range(int(len(choices) * 0.618) or 1, 10**6) if _coprime(s, len(choices)))
    return choices[seed * stride % len(choices)]


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


def kill_at_a_point(forks: Forks, seed: int) -> Case:
    name, k = spread(places(forks), seed)
    case, store = Case(f"kill -9 at {name}, passing {k}"), forks.fresh()
    reply = forks.run(store, fault=f"{name}:{k}:kill")
    case.check(reply["status"] == -signal.SIGKILL, f"nothing was killed: {reply}")
    case.lost += forks.lost(store)
    forks.finish(case, store)
    case.check((case.repeated or 0) <= 1, f"{case.repeated} evaluations repeated")
    return case


def kill_while_resuming(forks: Forks, seed: int) -> Case:
    rng = random.Random(seed)
    depth = 5
    case, store = Case("kill -9, then in each of 5 resumes"), forks.fresh()
    forks.run(store, fault=f"*:{rng.randrange(1, 60)}:kill")
    for _ in range(depth):
        case.lost += forks.lost(store)
        forks.run(store, fault=f"*:{rng.randrange(1, 25)}:kill")  # a resume passes few points before it is live
    forks.finish(case, store)
    case.check((case.repeated or 0) <= 1 + depth, f"{case.repeated} evaluations repeated")
    return case


def failing_write(forks: Forks, seed: int) -> Case:
    choices = [(name, k) for name, k in places(forks) if not name.startswith(("sync.", "leave."))]
    name, k = spread(choices, seed)
    code = ERRORS[(seed // len(choices) + seed % len(choices)) % len(ERRORS)]  # each place meets them all
    case, store = Case(f"{code} at {name}, passing {k}"), forks.fresh()
    _stopped(forks, case, store, fault=f"{name}:{k}:{code}")
    forks.finish(case, store)
    return case


def _stopped(forks: Forks, case: Case, store: Path, **fault: Any) -> None:
    """Run with a fault that must stop the run clearly."""
    reply = forks.run(store, **fault)
    case.check(reply["status"] == 0, f"ended with {reply['status']}")
    case.check(reply.get("kind") == "JournalError" and reply.get("answer") is None, f"no clear stop: {reply}")
    case.lost += forks.lost(store)


def full_disk(forks: Forks, seed: int) -> Case:
    size = (forks.clean / "journal.jsonl").stat().st_size  # a run's times are a few characters shorter or longer
    limit = random.Random(seed).randrange(1, int(0.95 * size))
    case, store = Case(f"no file may grow beyond {limit} bytes"), forks.fresh()
    _stopped(forks, case, store, limit=limit)
    forks.finish(case, store)
    return case


def failing_fsync(forks: Forks, seed: int) -> Case:
    at = 1 + seed % 7  # two of the directories of a new run, then values and journal
    case, store = Case(f"fsync number {at} fails"), forks.fresh()
    reply = forks.run(store, fsync=at)
    case.check(reply["failed"], "no fsync failed")
    case.check(reply["kind"] == "JournalError" and reply["answer"] is None, f"acknowledged: {reply}")
    case.check(reply["after"] == 0, f"{reply['after']} more calls of fsync after the one that failed")
    case.lost += forks.lost(store)
    forks.finish(case, store)
    return case


def torn_tail(forks: Forks, seed: int) -> Case:
    data = (forks.clean / "journal.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 0x0A]
    size = spread(range(ends[-4], len(data)), seed)
    case, store = Case(f"the journal is cut off at byte {size} of {len(data)}"), forks.fresh()
    shutil.copytree(forks.clean.parent, store)
    (store / "study/journal.jsonl").write_bytes(data[:size])
    kept = sum(end <= size for end in ends)
    case.check(len(read_records(store / "study")) == kept, "a whole record was dropped, or half of one kept")
    forks.finish(case, store)
    case.repeated = None  # what was executed before the cut is not in this store's log
    return case


def flipped_bit(forks: Forks, seed: int) -> Case:
    rng = random.Random(seed)
    files = sorted(p for p in forks.clean.rglob("*") if p.is_file() and p.stat().st_size)
    path = rng.choices(files, [p.stat().st_size for p in files])[0]
    place, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
    store = forks.fresh()
    case = Case(f"bit {bit} of byte {place} of {path.name} is flipped")
    shutil.copytree(forks.clean.parent, store)
    changed = store / "study" / path.relative_to(forks.clean)
    data = bytearray(changed.read_bytes())
    data[place] ^= 1 << bit
    changed.write_bytes(bytes(data))
    told = damaged(store / "study")
    case.check(any(str(changed) in text for text in told), f"not found: {told}")
    reply = forks.run(store)
    refused = reply["kind"] == "Corrupt" and str(changed) in reply["error"]
    case.check(refused or reply["answer"] == forks.expected["answer"], f"neither refused nor the same: {reply}")
    case.check(refused or path.name != "journal.jsonl", "a damaged journal was opened")
    changed.write_bytes(path.read_bytes())
    forks.finish(case, store)
    case.repeated = None
    return case


def two_drivers(forks: Forks, seed: int) -> Case:
    case, store = Case("a second driver while a first has the run open, then kill -9 of the first"), forks.fresh()
    if seed % 2:
        forks.run(store, fault=f"append.after:{1 + seed % 20}:kill")
    first = forks.run(store, hold=True)["holds"]
    begun = time.perf_counter()
    reply = forks.run(store)
    seconds = time.perf_counter() - begun
    case.check(reply["kind"] == "Locked" and f"{first}@{socket.gethostname()}" in reply["error"], f"not named: {reply}")
    case.within(1, seconds, "the second driver left")
    forks.run(store, release=first)
    forks.finish(case, store)
    return case


def jumping_clock(forks: Forks, seed: int) -> Case:
    case, store = Case("clock off by an hour or a day at each reading, either way"), forks.fresh()
    reply = forks.run(store, clock=seed, fault=f"append.after:{random.Random(seed).randrange(3, 27)}:kill")
    case.check(reply["status"] == -signal.SIGKILL, f"nothing was killed: {reply}")
    case.lost += forks.lost(store)
    forks.finish(case, store, clock=seed + 1)
    case.check((case.repeated or 0) <= 1, f"{case.repeated} evaluations repeated")
    return case


# -- runs with circuits, in processes of their own -----------------------------------------------------------------

OPTIMIZERS = ("COBYLA", "Nelder-Mead", "L-BFGS-B", "Powell", "spsa", "evolution")
KINDS = ("exact", "sampled")
PLACES = ("driver", "engine")
KILLS = 5
"""Of one run, one after the other."""


def configuration(seed: int) -> tuple[str, str, str]:
    """Optimizer, exact or sampled, and where the loop runs; custom callables run in the driver only."""
    every = [(o, k, p) for o in OPTIMIZERS for k in KINDS for p in PLACES if p == "driver" or o[0].isupper()]
    found: tuple[str, str, str] = spread(every, seed)
    return found


def killed_at_random(forks: Forks, seed: int, kills: int = KILLS) -> Case:
    """``kill -9`` of a driver ``kills`` times in a row, each at a random time; then it may finish."""
    rng = random.Random(seed)
    asked = configuration(seed)
    case, store = Case(f"kill -9 {kills} times at random: {', '.join(asked)}", repeated=0, faults=kills), forks.fresh()
    reference = forks.scratch / f"reference-{'-'.join(asked)}"
    script = STUDIES / "optimizers.py"
    if not reference.exists():
        Marked(script, reference, f"{reference}.log", *asked).finish()
    expected = reference / "study"
    whole = (expected / "journal.jsonl").stat().st_size
    for _ in range(kills):
        before = _size(store)
        target = before + rng.uniform(0.0, 1.3 / kills) * whole
        run = Marked(script, store, f"{store}.log", *asked)
        moved = wait_until(lambda run=run, target=target: run.process.poll() is not None or _size(store) >= target, 120)
        case.check(moved, "the run made no progress")
        time.sleep(rng.uniform(0.0, 0.05))
        run.kill()
        case.check(wait_until(lambda run=run: not run.alive(), SOON), f"left behind: {run.alive()}")
    last = Marked(script, store, f"{store}.log", *asked)
    _, errors = last.finish()
    case.check(last.process.returncode == 0, f"the last run ended with {last.process.returncode}: {errors[-500:]}")
    case.check(not last.alive(), f"left behind: {last.alive()}")
    if not case.problems:
        case.check(_values(store / "study") == _values(expected), "another result")
        case.check(outline(store / "study") == outline(expected), "the record is not that of an undisturbed run")
        log = [line.split() for line in Path(f"{store}.log").read_text().splitlines()]
        case.seconds += [float(line[1]) for line in log if line[0] == "live"][1:]
        started, ended = (sum(line[0] == word for line in log) for word in ("begin", "end"))
        case.repeated = started - ended
        case.check(started - ended <= kills, f"{started - ended} evaluations or slices in flight at {kills} kills")
        done = sum(int(line[1]) for line in log if line[0] in ("end", "part"))
        case.lost = max(0, sum(rows(expected)) - done)  # recorded without having been evaluated: not possible
    return case


def _size(store: Path) -> int:
    journal = store / "study" / "journal.jsonl"
    return journal.stat().st_size if journal.exists() else 0


def _values(directory: Path) -> list[Any]:
    return [r.output for _, r in read_records(directory) if isinstance(r, records.End) and r.status == "finished"][-1:]


SIGNALS = ((signal.SIGINT,), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM,), (signal.SIGHUP,))
CODES = {signal.SIGINT: (130, -signal.SIGINT), signal.SIGTERM: (143,), signal.SIGHUP: (129,)}


def signalled(forks: Forks, seed: int) -> Case:
    """A signal in the middle of a circuit: leaves within 5 s, with its exit code, everything recorded, no orphan.

    The circuits run in the driver's engine or on a cluster, the script by itself or by the command.
    """
    sent = SIGNALS[seed % len(SIGNALS)]
    where, command = ("driver", "cluster")[seed // 4 % 2], seed // 8 % 2
    rng = random.Random(seed)
    said = f"{', '.join(s.name for s in sent)} in the middle of a circuit on the {where}"
    case, store = Case(said + (", of hybridq run" if command else "")), forks.fresh()
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:  # under nohup or in the background: the run would respect it
            signal.signal(number, handler)
    script = [STUDIES / "circuits.py", where, store, *(("14", "60") if where == "driver" else ("22", "60"))]
    run = Marked(*(["-c", COMMAND, "run", script[0], "--", *script[1:]] if command else script))

    case.check(wait_until(lambda: engine_seconds(run) > 2.5, 120), "no engine was busy")
    time.sleep(rng.uniform(0.0, 1.0))
    begun = time.perf_counter()
    for number in sent:
        run.process.send_signal(number)
        time.sleep(0.02)
    if not wait_until(lambda: run.process.poll() is not None, SOON):
        case.check(False, "still there after a minute")
        run.kill()
        return case
    seconds = time.perf_counter() - begun
    case.seconds.append(seconds)
    _, errors = run.finish(timeout=60)
    case.within(5, seconds, "left")
    case.check(run.process.returncode in CODES[sent[0]], f"exit code {run.process.returncode}: {errors[-500:]}")
    case.check("Resume with: " in errors, f"no word of how to resume: {errors[-500:]}")
    case.check(wait_until(lambda: not run.alive(), SOON), f"left behind: {run.alive()}")
    ends = [r.status for _, r in read_records(store / "circuits") if isinstance(r, records.End)]
    case.check(ends == ["interrupted"], f"recorded as {ends}")
    case.check((store / "circuits/owner").stat().st_size == 0, "the lock names an owner who has left")
    return case


COMMAND = "import sys; from hybridq.cli import main; sys.argv[0] = 'hybridq'; main()"


def engine_seconds(run: Marked) -> float:
    """Processor time that the busiest engine process of a run has used."""
    found = [0.0]
    for pid in run.alive():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
            process = psutil.Process(pid)
            if "hybridq.engines" in " ".join(process.cmdline()):
                found.append(process.cpu_times().user)
    return max(found)


ROWS: dict[str, Row] = {
    "kill-random": Row(killed_at_random, 4, 200 // KILLS),
    "kill-point": Row(kill_at_a_point, 16, 96),
    "kill-resume": Row(kill_while_resuming, 2, 10),
    "write-fails": Row(failing_write, 60, 360),
    "file-limit": Row(full_disk, 6, 60),
    "fsync-fails": Row(failing_fsync, 7, 14),
    "torn-tail": Row(torn_tail, 60, 1800),
    "bit-flip": Row(flipped_bit, 200, 2000),
    "two-drivers": Row(two_drivers, 5, 50),
    "clock": Row(jumping_clock, 4, 10),
    "signals": Row(signalled, 12, 64),
}
