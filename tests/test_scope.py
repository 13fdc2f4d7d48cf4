"""A scope ends when everything that was submitted in it has ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import Client

import hybridq as hq
from hybridq import journal as records
from hybridq.journal import read_records
from hybridq.location import Location
from hybridq.scope import Scope


@hq.classical
def written(path: str, text: str) -> str:
    import time

    time.sleep(0.5)
    with open(path, "a") as file:
        file.write(text)
    return text


@hq.classical
def broken() -> None:
    raise ValueError("nobody asked")


@hq.workflow
def forgetful(path: str) -> int:
    written.submit(path, "a")
    return inner(path)


@hq.workflow
def inner(path: str) -> int:
    written.submit(path, "b")
    return 5


@hq.workflow
def careless() -> int:
    broken.submit()
    return 5


def test_indices_are_counted_by_name() -> None:
    scope = Scope(None, Location("root"))
    taken = [scope.next("a"), scope.next("b"), scope.next("a")]
    assert [str(at) for at in taken] == ["root/a[0]", "root/b[0]", "root/a[1]"]
    assert scope.reserve("a", 10) == 2
    assert str(scope.next("a")) == "root/a[12]"


def test_calls_that_nobody_waits_for_are_finished_and_recorded(client: Client, store: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(2):
        assert hq.run(forgetful, str(log), name="forgetful", store=store, cluster=client) == 5
        assert sorted(log.read_text()) == ["a", "b"]
    steps = [r.at for _, r in read_records(store / "forgetful") if isinstance(r, records.Step)]
    assert sorted(steps) == ["forgetful/inner[0]/written[0]", "forgetful/written[0]"]


def test_an_error_that_nobody_asked_for_is_raised_at_the_end(client: Client, store: Path) -> None:
    with pytest.raises(ValueError, match="nobody asked"):
        hq.run(careless, name="careless", store=store, cluster=client)
    ends = [r.status for _, r in read_records(store / "careless") if isinstance(r, records.End)]
    assert ends == ["failed"]
