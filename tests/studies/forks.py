"""A study without circuits, run in a fork of this process for each line of JSON on stdin: a start costs milliseconds.

A line says in which store, with which fault, and what is wrong with the machine; the answer is a line of JSON: how the
fork ended, what it answered or raised, the seconds until its first live evaluation, how often it passed each point.
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np

import hybridq as hq
from hybridq import faults, journal

sys.told = {"live": None}  # on a library's module, where it is no part of the digest of the study's code
METHODS = ("COBYLA", "Nelder-Mead")


def note(line):
    """Append to what the study knows to be recorded; one write, so that a kill leaves whole lines."""
    os.write(sys.told["log"], f"{line}\n".encode())


def bowl(x, weights):
    told = sys.told
    place = told["place"] = told["place"] + 1
    note(f"{told['loop']} {place}")  # the rows before this one are acknowledged
    if place >= told["rows"].get(told["loop"], 0):
        note(f"live {told['loop']} {place}")
        told["live"] = told["live"] or time.perf_counter() - told["begun"]
    return float(weights[: len(x)] @ (x - 0.3) ** 2 + np.cos(3 * x).sum())


@hq.workflow
def study(table):
    found = []
    for number, method in enumerate(METHODS):
        sys.told["loop"], sys.told["place"] = number, -1
        try:
            best = hq.minimize(bowl, [0.1, 0.2, -0.4], (table[number],), method, options={"maxiter": 9, "maxfev": 9})
            found.append([best.fun, *best.x])
        except Exception:  # noqa: BLE001  # as a careless study does
            found.append([0.0])
        note(f"now {number}" if hq.now() > 0 else "")
    return {"found": found, "table": table * found[0][0]}


def rows(store):
    """Rows that are recorded, by loop."""
    try:
        found = journal.read_records(Path(store) / "study")
    except hq.JournalError:
        return {}
    order = [number for number, record in found if isinstance(record, journal.Loop)]
    return Counter(order.index(record.loop) for _, record in found if isinstance(record, journal.Row))


def jumping(seed):
    """A clock that is an hour or a day off at each reading, either way."""
    rng, real = np.random.default_rng(seed), time.time
    return lambda: real() + float(rng.choice([-86400.0, -3600.0, 3600.0, 86400.0]))


def failing(at):
    """An ``os.fsync`` that fails once, at its call number ``at``, and counts what is asked of it afterwards."""
    real, calls = os.fsync, [0]

    def fsync(fd):
        calls[0] += 1
        if calls[0] == at:
            sys.told["failed"] = True
            raise OSError(5, "Input/output error")
        if calls[0] > at:
            sys.told["after"] += 1
        real(fd)

    return fsync


def once(asked, answer):
    told = sys.told
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    passed = Counter()
    if asked.get("count"):
        journal.faultpoint = lambda name: passed.update([name])
    faults._asked[:] = faults._faults(asked.get("fault", ""))
    log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    told.update(begun=time.perf_counter(), live=None, rows=rows(asked["store"]), after=0, log=log)
    if "clock" in asked:
        time.time = jumping(asked["clock"])
    if "fsync" in asked:
        os.fsync = failing(asked["fsync"])
    if "limit" in asked:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["limit"], resource.RLIM_INFINITY))
    reply = {"answer": None, "error": None, "kind": None}
    if asked.get("hold"):
        taken = journal.Journal(Path(asked["store"]) / "study")
        os.write(answer, json.dumps({"holds": os.getpid()}).encode())
        signal.pause()
        taken.close()
    try:
        value = hq.run(study, np.linspace(0.5, 1.5, 2 * 400).reshape(2, 400), name="study", store=asked["store"])
        reply["answer"] = [[float(x).hex() for x in row] for row in value["found"]] + [value["table"].sum().hex()]
    except BaseException as error:  # noqa: BLE001  # told
        reply["error"], reply["kind"] = "".join(traceback.format_exception_only(error)), type(error).__name__
    reply |= {
        "live": told["live"],
        "passed": passed,
        "after": told["after"],
        "failed": told.get("failed", False),
        "threads": threading.active_count(),
    }
    os.write(answer, json.dumps(reply).encode())


def fork(asked):
    """Run ``asked`` in a fork; returns its process id and the end of a pipe that its answer comes through."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            once(asked, write)
        finally:
            os._exit(0)
    os.close(write)
    return pid, read


def collect(pid, read):
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    return {"status": os.waitstatus_to_exitcode(status), **(json.loads(text) if text else {})}


def answer_lines():
    held = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "release" in asked:
            pid = asked["release"]
            os.kill(pid, signal.SIGKILL)
            os.close(held.pop(pid))
            os.waitpid(pid, 0)
            reply = {"status": -9}
        elif asked.get("hold"):
            pid, read = fork(asked)
            held[pid] = read
            reply = json.loads(os.read(read, 4096))
        else:
            reply = collect(*fork(asked))
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as warm:  # whatever is imported late is imported here
        sys.told.update(begun=0.0, rows={}, log=os.open(f"{warm}/log", os.O_WRONLY | os.O_CREAT, 0o600))
        with contextlib.redirect_stderr(io.StringIO()):
            hq.run(study, np.ones((2, 400)), name="study", store=warm)
    answer_lines()
