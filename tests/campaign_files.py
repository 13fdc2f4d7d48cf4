"""The fault campaign of files and versions: what others wrote, earlier, later, elsewhere, or to do harm."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from campaign import COMMAND, Case, Forks, Row
from processes import Marked, scheduler_and_workers
from qiskit.circuit.library import efficient_su2
from runs import executed, recorded, report

import hybridq as hq
from hybridq import journal as records
from hybridq.audit import verify
from hybridq.journal import GENESIS, link, read_records
from hybridq.values import MAX_VALUE_BYTES, encode

ARCHIVE = Path(__file__).parent / "archive"
SCRIPT = Path(__file__).parent / "studies" / "archived.py"
RELEASES = sorted(path.name for path in ARCHIVE.iterdir())


@contextlib.contextmanager
def _quiet() -> Iterator[Path]:
    """A directory, and nothing said on stderr."""
    with tempfile.TemporaryDirectory(prefix="hybridq-faults-") as scratch, contextlib.redirect_stderr(io.StringIO()):
        yield Path(scratch)


def rewritten(directory: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the lines of a journal, and bind them to each other again, as someone does who knows how."""
    path = directory / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    write_lines(path, [json.dumps({k: v for k, v in line.items() if k != "chain"})[1:] for line in lines])


def write_lines(path: Path, texts: Sequence[str]) -> None:
    """A journal of these lines, each without its brace and digest."""
    chain, data = GENESIS, b""
    for text in texts:
        chain = link(chain, text.encode())
        data += b'{"chain":"' + chain.encode() + b'",' + text.encode() + b"\n"
    path.write_bytes(data)


@functools.cache
def archived() -> ModuleType:
    """The study whose runs are archived, as a module."""
    spec = importlib.util.spec_from_file_location("archived", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["archived"] = module
    spec.loader.exec_module(module)
    return module


def replay(store: Path, cluster: Any = None) -> Any:
    """Run the archived study in ``store``, as a driver does; what the command line would report."""
    return report(archived().archived, 200, name="archived", store=store, seed=17, cluster=cluster)


def _copy(release: str, scratch: Path) -> tuple[Path, Any]:
    shutil.copytree(ARCHIVE / release / "archived", scratch / "store" / "archived")
    return scratch / "store", json.loads((ARCHIVE / release / "answer.json").read_text())


# -- runs of earlier and later versions ----------------------------------------------------------------------------

OPTIONAL = [(kind.kind, name) for kind, names in records._OPTIONAL.items() for name in sorted(names)]
"""Members that runs of earlier versions do not have."""


def _toggled(kind: str, name: str) -> Callable[[list[dict[str, Any]]], Any]:
    """A member that not all versions write: away where it is there and can be missed, else there and empty."""

    def change(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["k"] == kind and name not in line:
                line[name] = None
            elif line["k"] == kind and (not line[name] or name == "need"):
                del line[name]

    return change


def _first(kind: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    return next(line for line in lines if line["k"] == kind)


EARLIER: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "as it is": lambda lines: None,
    "with spaces": lambda lines: None,
    **{f"{kind} with or without {name}": _toggled(kind, name) for kind, name in OPTIONAL},
    "members in another order": lambda lines: [line.update(at=line.pop("at")) for line in lines if "at" in line],
}
LATER: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "the next format": lambda lines: lines[0].update(format=records.FORMAT + 1),
    "format 99": lambda lines: lines[0].update(format=99),
    "a format that is no number": lambda lines: lines[0].update(format="2.0"),
    "a record of another kind": lambda lines: lines.append({"k": "checkpoint", "at": "a", "of": 3}),
    "a step with one member more": lambda lines: _first("step", lines).update(device="qpu"),
    "a row with one member more": lambda lines: _first("row", lines).update(energy=1.0),
    "a header with one member more": lambda lines: lines[0].update(signed="yes"),
    "a step with one member less": lambda lines: _first("step", lines).pop("where"),
    "a header of another kind": lambda lines: lines.insert(0, {"k": "prologue", "format": 2}),
}
VERSIONS = [*(("earlier", name) for name in EARLIER), *(("later", name) for name in LATER)]


def versions(_: Forks, seed: int) -> Case:
    """A run that an earlier version recorded is answered from its record; one of a later version is left untouched."""
    order = VERSIONS[::2] + VERSIONS[1::2]
    which, name = order[seed % len(order)]
    case = Case(f"a run of {'an earlier' if which == 'earlier' else 'a later'} version: {name}")
    release = RELEASES[seed % len(RELEASES)]
    with _quiet() as scratch:
        store, answer = _copy(release, scratch)
        path = store / "archived" / "journal.jsonl"
        recorded_then = path.read_bytes()
        if name != "as it is":
            rewritten(store / "archived", (EARLIER | LATER)[name])
            same = _members(path.read_bytes()) == _members(recorded_then)
            case.check(not same or name == "with spaces", "nothing was changed")
        before = _contents(store)
        begun = time.perf_counter()
        if which == "earlier":
            found = replay(store)
            case.check(found.value == answer and executed(found) == (0, 0), f"not answered from its record: {found}")
            case.check(not verify(store / "archived").damage, "verify finds damage")
            case.repeated = sum(executed(found))
        else:
            error = _error(lambda: replay(store))
            case.check(isinstance(error, hq.Version), f"not refused as of another version: {error!r}")
            case.check("left untouched" in str(error) and "journal.jsonl" in str(error), f"not named: {error}")
            case.check(_contents(store) == before, "it was touched")
        case.seconds.append(time.perf_counter() - begun)
    return case


def _members(data: bytes) -> list[list[tuple[str, Any]]]:
    """Each line's members in their order, without its digest."""
    return [list(json.loads(line).items())[1:] for line in data.splitlines()]


def _error(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:  # noqa: BLE001  # a case looks at it
        return error
    return None


def _contents(root: Path) -> dict[str, Any]:
    """Everything below ``root`` but who owns runs and since when: bytes, links, kinds and modes."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        if path.name == "owner":
            continue
        status = path.lstat()
        kept: Any = os.readlink(path) if path.is_symlink() else None
        if stat.S_ISREG(status.st_mode):
            kept = hashlib.sha256(path.read_bytes()).hexdigest() if status.st_size < MAX_VALUE_BYTES else status.st_size
        found[str(path.relative_to(root))] = (status.st_mode, kept)
    return found


# -- replay of archived runs ---------------------------------------------------------------------------------------

RECORDED_ONLY = ("now", "order")
"""Of an archived answer, what a run that was cut off before it reads anew."""


def archive(forks: Forks, seed: int) -> Case:
    """An archived run is answered without a difference in a fresh process, or goes on where it was cut off."""
    rng, release = random.Random(seed), RELEASES[seed // 2 % len(RELEASES)]
    with _quiet() as scratch:
        store, answer = _copy(release, scratch)
        begun = time.perf_counter()
        if seed % 2 == 0:
            case = Case(f"a run of {release}, in a process of its own")
            elsewhere = {"PYTHONHASHSEED": str(seed), "TZ": rng.choice(["UTC", "Asia/Kathmandu"]), "LC_ALL": "C"}
            store = store.rename(scratch / f"moved {seed}")
            run = Marked("-c", COMMAND, "run", SCRIPT, "--store", store, "--json", cwd=scratch, env=elsewhere)
            said, errors = run.finish()
            case.check(run.process.returncode == 0, errors[-1000:])
            found = json.loads(said or "{}")
            done = found.get("evaluations_executed"), found.get("steps_executed")
            case.check(done == (0, 0), f"executed: {done}")
            case.check(found.get("value") == answer, "another value")
            case.repeated = 0
        else:
            entries = read_records(store / "archived")
            kept = rng.randrange(5, len(entries) - 1)
            case = Case(f"a run of {release} cut off after line {kept} of {len(entries)}")
            path = store / "archived" / "journal.jsonl"
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
            before = read_records(store / "archived")
            live = replay(store, forks.client)
            case.check(read_records(store / "archived")[:kept] == before, "what was recorded has changed")
            case.check(sum(executed(live)) > 0, "nothing was left to do")
            case.check(_near({k: v for k, v in live.value.items() if k not in RECORDED_ONLY},
                             {k: v for k, v in answer.items() if k not in RECORDED_ONLY}), "another value")  # fmt: skip
        case.seconds.append(time.perf_counter() - begun)
    return case


def _near(a: Any, b: Any) -> bool:
    """Whether two documents say the same, numbers within what other processors and libraries may make of them."""
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-9 * max(1.0, abs(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_near(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_near, a, b))
    return bool(a == b)


# -- other versions on a worker ------------------------------------------------------------------------------------

SKEWED = ("qiskit-aer", "hybridq-scheduler", "qiskit")


@hq.classical
def noted(folder: str) -> None:
    """Leaves a file, so that nobody can say it did not run."""
    Path(folder, "ran").touch()


@hq.workflow
def one_step(folder: str) -> None:
    noted(folder)


def skew(_: Forks, seed: int) -> Case:
    """One of two workers has another version of a library: refused before the first step."""
    package = SKEWED[seed % len(SKEWED)]
    case = Case(f"a worker with {package} 0.0.7")
    with _quiet() as scratch:
        fake = scratch / "fake" / f"{package.replace('-', '_')}-0.0.7.dist-info"
        fake.mkdir(parents=True)
        (fake / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.7\n")
        path = os.pathsep.join(filter(None, (str(fake.parent), os.environ.get("PYTHONPATH"))))
        with scheduler_and_workers({}, {"PYTHONPATH": path}) as (address, _processes):
            begun = time.perf_counter()
            error = _error(lambda: hq.run(one_step, str(scratch), name="a", store=scratch / "store", cluster=address))
            case.seconds.append(time.perf_counter() - begun)
        told = isinstance(error, hq.WorkflowError) and f"{package} 0.0.7 (here" in str(error)
        case.check(told, f"not refused: {error!r}")
        case.check(not (scratch / "ran").exists(), "a step ran")
        case.check(not recorded(scratch / "store" / "a", records.Step), "a step is recorded")
    return case


# -- hostile names, links and documents ----------------------------------------------------------------------------

SPRUNG = "HYBRIDQ_SPRUNG"


class Trap:
    """Pickled, it sets a variable of the environment on loading."""

    def __reduce__(self) -> Any:
        return os.putenv, (SPRUNG, "1")


@hq.classical
def gives(size: int) -> dict[str, Any]:
    """A value with attachments: an array and a circuit."""
    return {"array": np.arange(float(size)), "circuit": efficient_su2(2, reps=1)}


@hq.workflow
def given(size: int) -> float:
    return float(gives(size)["array"].sum())


NAMES = (
    "../up", "/abs", "..", ".", "a/b", "a\\b", "a\0b", "", ".hidden", "-rf", "x" * 65, "a\n", "naïve", "~", "$HOME",
    "..\x2f..\x2fetc", "%2e%2e", "a:b",
)  # fmt: skip
LINKS = ("the run", "journal.jsonl", "values", "owner", "a dangling run")


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _endless() -> bytes:
    """An array of 400 numbers whose header promises 32 TB."""
    return _npy(np.arange(400.0)).replace(b"(400,), }" + 10 * b" ", b"(4000000000000,), }")


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([Trap()], dtype=object))
    return buffer.getvalue()


def _qpy(version: int) -> bytes:
    data = next(d for n, d in encode(efficient_su2(2, reps=1)).attachments.items() if n.endswith(".qpy"))
    return data[:6] + bytes([version]) + data[7:]


def _nested(levels: int) -> str:
    return "[" * levels + "]" * levels


FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a pickled npy": ("npy", lambda: _npy(np.array([Trap()], dtype=object))),
    "a pickled npz": ("npy", _npz),
    "an npy cut short": ("npy", lambda: _npy(np.arange(400.0))[:-8]),
    "an npy with an endless shape": ("npy", _endless),
    "QPY 1": ("qpy", lambda: _qpy(1)),
    "QPY 10": ("qpy", lambda: _qpy(10)),
    "QPY 12": ("qpy", lambda: _qpy(12)),
    "an empty QPY": ("qpy", lambda: b"QISKIT"),
    "a QPY cut short": ("qpy", lambda: _qpy(13)[:-9]),
}
"""Files of values in the place of the ones that a run recorded, named by their digests."""
DOCUMENTS: dict[str, Any] = {
    "deep": json.loads(_nested(900)),
    "a function": {"$": "dataclass", "t": "os:system", "v": {"command": f"touch {SPRUNG}"}},
    "a class that starts processes": {"$": "dataclass", "t": "subprocess:Popen", "v": {"args": ["touch", SPRUNG]}},
    "a module that is not loaded": {"$": "dataclass", "t": "antigravity:X", "v": {}},
    "a function for an enum": {"$": "enum", "t": "os:system", "v": f"touch {SPRUNG}"},
    "an unknown tag": {"$": "pickle", "v": "gASVHgAAAAAAAACMAm9zlIwGc3lzdGVtlJOUjAR0cnVllIWUUpQu"},
    "a value outside": {"$": "file", "f": "../../outside/secret.json"},
    "an absolute value": {"$": "npy", "f": "/etc/passwd"},
    "a value with a NUL": {"$": "npy", "f": "0" * 64 + ".npy\0"},
    "an object array": {"$": "array", "d": "|O", "s": [1], "v": "AAAAAAAAAAA="},
}
"""Documents in the place of the value that a run recorded."""
LINES: dict[str, str] = {
    "a deep line": '"k":"event","at":' + _nested(100_000) + ',"output":1}',
    "a line that is no JSON": "not json}",
}
HOSTILE = [
    *(("name", name) for name in NAMES), *(("link", name) for name in LINKS), *(("file", name) for name in FILES),
    *(("document", name) for name in DOCUMENTS), *(("line", name) for name in LINES),
]  # fmt: skip
HOSTILE = HOSTILE[::3] + HOSTILE[1::3] + HOSTILE[2::3]


def hostile(forks: Forks, seed: int) -> Case:
    """Names, links and documents that lead elsewhere or run code: refused, and nothing outside of the store touched."""
    kind, name = HOSTILE[seed % len(HOSTILE)]
    case = Case(f"hostile {kind}: {name[:40]!r}")
    with _quiet() as scratch:
        store, outside = scratch / "store", scratch / "outside"
        shutil.copytree(_given(forks), store)
        outside.mkdir()
        (outside / "secret.json").write_text("[1.0]")
        (outside / "journal.jsonl").write_text("precious")
        if kind == "name":
            case.faults = 3
            before = _contents(scratch)
            asked: list[dict[str, Any]] = [
                {"name": name},
                {"name": "new", "fork": name},
                {"name": "new", "reuse": [name]},
            ]
            errors: list[type[Exception]] = [hq.WorkflowError]
        else:
            _harm(kind, name, store, outside)
            before = _contents(scratch)
            asked, errors = [{"name": "a"}], [hq.JournalError]
            if name in ("the run", "a dangling run"):
                errors = [hq.WorkflowError]
        begun = time.perf_counter()
        for options in asked:
            error = _error(lambda options=options: hq.run(given, 400, store=store, cluster=forks.client, **options))
            case.check(isinstance(error, tuple(errors)), f"{options}: not refused, or not clearly: {error!r:.500}")
        case.seconds.append(time.perf_counter() - begun)
        after = _contents(scratch)
        if kind in ("file", "document"):  # the run was opened, and says that it failed
            case.check(all(after[p] == before[p] for p in before if p != "store/a/journal.jsonl"), "changed")
            case.check(after.keys() == before.keys(), f"new: {after.keys() - before.keys()}")
        else:
            case.check(after == before, f"touched: {set(after.items()) ^ set(before.items())}")
    # os.putenv is not seen in os.environ: a child is asked
    sprung = subprocess.run(["printenv", SPRUNG], stdout=subprocess.PIPE, check=False).stdout
    case.check(not sprung and not Path(SPRUNG).exists(), "code was run")
    return case


def _given(forks: Forks) -> Path:
    """The store of a run to be harmed."""
    store = forks.scratch / "given"
    if not store.exists():
        hq.run(given, 400, name="a", store=store, cluster=forks.client)
    return store


def _harm(kind: str, name: str, store: Path, outside: Path) -> None:
    """Put what is hostile in its place, with checksums that are right."""
    run, values = store / "a", store / "a" / "values"
    if kind == "link":
        path = run if name in ("the run", "a dangling run") else run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(outside if name in ("the run", "values") else outside / name.removeprefix("a dangling "))
    elif kind == "file":
        suffix, make = FILES[name]
        (old,) = values.glob(f"*.{suffix}")
        data = make()
        new = old.with_name(f"{hashlib.sha256(data).hexdigest()}.{suffix}")
        old.rename(new)
        new.write_bytes(data)
        rewritten(run, lambda lines: _first("step", lines).update(_renamed(_first("step", lines), old.name, new.name)))
    elif kind == "document":
        rewritten(run, lambda lines: _first("step", lines).update(output=DOCUMENTS[name]))
    else:
        texts = [line.partition(",")[2] for line in (run / "journal.jsonl").read_text().splitlines()]
        write_lines(run / "journal.jsonl", [*texts, LINES[name]])


def _renamed(line: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(line).replace(old, new))
    return found


ROWS: dict[str, Row] = {
    "versions": Row(versions, 8, len(VERSIONS)),
    "archive": Row(archive, 10, 20),
    "skew": Row(skew, 2, 3),
    "hostile": Row(hostile, 30, len(HOSTILE)),
}
