"""Runs recorded by earlier versions: each is replayed without a difference, and one of a later version is refused.

``tests/archive/VERSION`` holds what ``hybridq run tests/studies/archived.py`` recorded with that version, and what it
returned. A release adds its own; the first test says how.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hybridq
from hybridq import journal as records
from hybridq.journal import read_records

ARCHIVE = Path(__file__).parent / "archive"
SCRIPT = Path(__file__).parent / "studies" / "archived.py"
RELEASES = sorted(path.name for path in ARCHIVE.iterdir())


def play(store: Path) -> subprocess.CompletedProcess[str]:
    command = "import sys; from hybridq.cli import main; sys.argv[0] = 'hybridq'; main()"
    options = ["run", str(SCRIPT), "--store", str(store), "--json"]
    return subprocess.run([sys.executable, "-c", command, *options], capture_output=True, text=True, check=False)


def test_there_is_a_run_of_this_version() -> None:
    assert hybridq.__version__ in RELEASES, (
        f"record one: hybridq run {SCRIPT} --store {ARCHIVE / hybridq.__version__} --json, and keep its value in "
        "answer.json beside it"
    )


@pytest.mark.parametrize("release", RELEASES)
def test_an_archived_run_is_answered_from_its_record(release: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(ARCHIVE / release / "archived", store / "archived")
    before = read_records(store / "archived")
    done = play(store)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["evaluations_executed"], found["steps_executed"]) == (0, 0)
    assert found["evaluations_replayed"] > 50
    assert found["steps_replayed"] == 5
    assert found["value"] == json.loads((ARCHIVE / release / "answer.json").read_text())
    after = read_records(store / "archived")
    assert after[: len(before)] == before
    assert [record.kind for _, record in after[len(before) :]] == ["opened", "end"]


@pytest.mark.parametrize("release", RELEASES)
def test_an_archived_run_has_every_kind_of_record(release: str) -> None:
    kinds = {type(record) for _, record in read_records(ARCHIVE / release / "archived")}
    assert kinds == set(records._FIELDS)


def test_a_run_of_a_later_format_is_refused_untouched(tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(ARCHIVE / RELEASES[-1] / "archived", store / "archived")
    path = store / "archived" / "journal.jsonl"
    first, _, rest = path.read_bytes().partition(b"\n")
    fields = json.loads(first)
    del fields["chain"]
    fields["format"] += 1
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()[1:]
    changed = b'{"chain":"' + records.link(records.GENESIS, text).encode() + b'",' + text + b"\n" + rest
    path.write_bytes(changed)
    done = play(store)
    assert done.returncode == 1
    assert "has format 2, this hybridq reads format 1; it was left untouched" in done.stderr
    assert path.read_bytes() == changed
