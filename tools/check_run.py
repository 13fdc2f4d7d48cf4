"""Check a run's directory with Python's standard library alone, hybridq neither imported nor installed.

    python -I tools/check_run.py runs/curve [runs/other ...]

Prints each damage with its file and line. Exits with 0 if everything is sound, with 1 if not, and with 2 if called
wrongly. What it knows of the record's format, number 1, stands in this file: journal.jsonl holds a JSON object a line,

    {"chain":"<64 hex>","k":"<kind>",...}

whose 64 digits are the SHA-256 of the line before's 64 digits (of 64 zeros for the first) and of everything after
`{"chain":"<64 hex>",`. Files in values/ are named by the SHA-256 of their bytes.
"""

import base64
import hashlib
import json
import re
import sys
from pathlib import Path

# The members of each kind; those in brackets may be missing.
MEMBERS = {
    "run": "format name workflow code arguments inputs seed backend [forked]",
    "opened": "host pid time python processor versions command",
    "code": "name code text",
    "circuit": "program circuit observables plan qubits gates paulis backend [need]",
    "step": "at code arguments inputs output started seconds where attempt bytes",
    "eval": "at program theta shots output started seconds where attempt bytes",
    "loop": "at function code arguments inputs method gradient",
    "row": "loop i x value g stderr shots seconds where [program] [started]",
    "loop-end": "loop output seconds",
    "failure": "at type message arguments traceback started seconds where attempt",
    "survived": "at",
    "event": "at output",
    "end": "status output error seconds time",
}
# Members that hold values: anything that JSON can, files named in them.
VALUES = {"run": "inputs backend", "code": "text", "circuit": "circuit observables plan backend need"}
VALUES |= {"step": "inputs output", "eval": "theta output", "loop": "inputs"}
VALUES |= {"loop-end": "output", "failure": "arguments", "event": "output", "end": "output"}
WORDS = "at code program arguments name workflow type message traceback where status method gradient function x"
NUMBERS = "loop i seed format qubits gates paulis attempt bytes pid"
PREFIX = len('{"chain":"') + 64 + len('",')


def sha(data):
    return hashlib.sha256(data).hexdigest()


class Run:
    """A run directory while it is read, and what was found wrong with it."""

    def __init__(self, place):
        self.place = Path(place)
        self.wrong, self.lines, self.broken = [], 0, False
        self.references = {}  # a file of values/ -> the line that first names it
        self.begun, self.answered = {}, {}  # loops by line: [rows so far, ended]; locations with their line
        self.failed, self.known = set(), set()

    def say(self, file, line, text):
        self.wrong.append(f"{self.place / file}{f', line {line}' if line else ''}: {text}")

    def journal(self):
        *lines, tail = (self.place / "journal.jsonl").read_bytes().split(b"\n")
        hopes, again = ["0" * 64], []  # what the next line may be chained to
        for number, line in enumerate(lines, 1):
            self.lines, stated, rest = number, line[10 : PREFIX - 2].decode("latin-1"), line[PREFIX:]
            right = [sha(hope.encode() + rest) for hope in hopes]
            form = line.startswith(b'{"chain":"') and line[PREFIX - 2 : PREFIX] == b'",'
            if form and stated in right:
                hopes, again = [stated], []
            else:  # one changed byte is to be told once, whether it is in the digest, behind it, or the line's end
                named = re.findall('"chain":"([0-9a-f]{64})"', line.decode("latin-1"))[-2:]
                own = [right[0], *named, *re.findall("^[0-9a-f]{64}$", stated)]
                hopes, again = own + again, own
                self.say("journal.jsonl", number, "the checksum does not match")
                self.broken = True
            self.record(number, rest, sound=not again)
        if tail[10 : PREFIX - 2].decode("latin-1") in [sha(hope.encode() + tail[PREFIX:-1]) for hope in hopes]:
            self.say("journal.jsonl", len(lines) + 1, "the end of the line was changed")

    def record(self, number, rest, sound):
        try:
            members = json.loads(b"{" + rest)
            kind = members.pop("k")
            told = list(self.shape(kind, members)) or list(self.order(number, kind, members))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            told, kind = [f"no record ({type(error).__name__}: {error})"], None
        if not sound:
            return
        if number == 1 and kind != "run":
            told.append("the header is missing")
        for text in told:
            self.say("journal.jsonl", number, text)
        for member in VALUES.get(kind, "").split():
            try:
                self.names(number, members.get(member))
            except (ValueError, RecursionError) as error:
                self.say("journal.jsonl", number, f"{member} is no value ({type(error).__name__}: {error})")

    def shape(self, kind, members):
        """What is wrong with a record by itself."""
        if kind not in MEMBERS:
            yield f"a record of the unknown kind {kind!r}"
            return
        needed = {m for m in MEMBERS[kind].split() if m[0] != "["}
        if not needed <= members.keys() <= {m.strip("[]") for m in MEMBERS[kind].split()}:
            yield f"a record {kind!r} with the members {sorted(members)}"
            return
        for member, value in members.items():
            if member in VALUES.get(kind, "").split():
                continue
            if (member in WORDS.split() and type(value) is not str) or (
                member in NUMBERS.split() and type(value) is not int
            ):
                yield f"{member} is {value!r:.60}"
        if kind == "run" and members["format"] != 1:
            yield f"format {members['format']}, and this reads format 1"

    def order(self, number, kind, members):
        """What is wrong with a record where it stands; after a broken line, lines before may be gone or have moved."""
        at, told = members.get("at"), []
        if kind == "run" and number > 1:
            told.append("a second header")
        if kind in ("step", "eval", "event", "loop") and self.answered.setdefault(at, number) != number:
            told.append(f"{at} is in line {self.answered[at]} already")
        if kind in ("code", "circuit"):
            self.known.add(members["code" if kind == "code" else "program"])
        elif kind in ("step", "eval", "loop", "row"):
            named = members.get("program" if kind in ("eval", "row") else "code", "")
            if named not in self.known and not (kind == "row" and named == ""):
                told.append(f"{named} is not recorded before")
        if kind == "loop":
            self.begun[number] = [0, False]
        elif kind in ("row", "loop-end") and members["loop"] not in self.begun:
            told.append(f"line {members['loop']} begins no loop")
        elif kind == "row":
            loop = self.begun[members["loop"]]
            if members["i"] != loop[0]:
                told.append(f"row {members['i']} where row {loop[0]} is next")
            loop[0] = members["i"] + 1
            point, slope = (base64.b64decode(members[m] or "", validate=True) for m in "xg")
            if len(point) % 8 or len(slope) not in (0, len(point)):
                told.append("the point or its gradient is no vector")
        elif kind == "loop-end":
            if self.begun[members["loop"]][1]:
                told.append("the loop has ended before")
            self.begun[members["loop"]][1] = True
        if kind == "failure":
            self.failed.add(at)
        elif kind == "survived" and at not in self.failed:
            told.append(f"no failure of {at} is recorded before")
        return [] if self.broken else told

    def names(self, number, document):
        """Note the files that a document names, those of documents in files among them."""
        if isinstance(document, dict) and document.get("$") in ("file", "npy", "qpy"):
            name, suffix = document.get("f"), {"file": "json"}.get(document["$"], document["$"])
            if not isinstance(name, str) or not re.fullmatch(rf"[0-9a-f]{{64}}\.{suffix}", name):
                self.say("journal.jsonl", number, f"{name!r} is no name of a value")
            elif name not in self.references:
                self.references[name] = number
                path = self.place / "values" / name
                if suffix == "json" and path.is_file() and sha(data := path.read_bytes()) == name[:64]:
                    self.names(number, json.loads(data))
            return
        inside = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
        for member in inside:
            self.names(number, member)

    def values(self):
        files = {path.name: path for path in (self.place / "values").glob("*") if path.is_file() or path.is_symlink()}
        for name in sorted(self.references.keys() - files.keys()):
            self.say(f"values/{name}", None, f"missing; line {self.references[name]} names it")
        for name in sorted(filter(re.compile(r"[0-9a-f]{64}\.(json|npy|qpy)").fullmatch, files)):
            if files[name].is_symlink() or sha(files[name].read_bytes()) != name[:64]:
                self.say(f"values/{name}", None, f"not what it was; named in line {self.references.get(name)}")


def check(place):
    """The run in a directory, read and checked."""
    run = Run(place)
    try:
        run.journal()
    except OSError as error:
        run.say("journal.jsonl", None, f"cannot be read ({error.strerror})")
    run.values()
    return run


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    runs = [check(place) for place in sys.argv[1:]]
    for run in runs:
        print(*run.wrong, sep="\n", end="\n" if run.wrong else "")
        print(f"{run.place}: {run.lines} lines, {len(run.references)} values, {len(run.wrong) or 'nothing'} wrong")
    sys.exit(any(run.wrong for run in runs))
