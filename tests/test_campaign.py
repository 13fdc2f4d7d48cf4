"""The fault campaign, each row for a few seeds; ``python -m benchmarks faults --at-length`` is the whole of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from campaign import ROWS, Forks, forks
from campaign_calls import ROWS as CALLS
from campaign_cluster import ROWS as CLUSTER
from campaign_files import ROWS as FILES
from campaign_files import SPRUNG
from distributed import Client

from hybridq import faults
from hybridq.faults import KILL, VARIABLE, faultpoint

TESTS = Path(__file__).parent
REAL = ("kill-random", "signals")
"""Rows that start processes with engines, one after the other."""
MANY = {"kill-point": 6, "kill-resume": 2, "write-fails": 8, "torn-tail": 8, "bit-flip": 15}
"""Cases of the fast tests, where those of a row take longer than a few seconds together."""
BESIDE = CALLS | FILES
"""Rows whose cases go on beside a cluster that is there already, or without one."""
FEW = {"memory": 2, "takes-long": 1, "results": 4, "travel": 9, "archive": 2, "skew": 1, "lasting": 0, "chaos": 0}
"""Of those the cases of the fast tests."""
ELSEWHERE = {"kill-scheduler": 1, "poison": 2}
"""Cases of the cluster's rows that are tests of `tests/test_cluster.py` and `tests/test_dispatch.py`."""


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[Forks]:
    with forks() as found:
        yield found


@pytest.fixture
def beside(undisturbed: Forks, client: Client) -> Forks:
    """With the cluster that tests share."""
    undisturbed.client = client
    return undisturbed


def survives(undisturbed: Forks, row: str, seed: int) -> None:
    case = (ROWS | CLUSTER | BESIDE)[row].case(undisturbed, seed)
    assert not case.problems, f"python -m benchmarks faults --row {row} --seed {seed} --count 1: {case}"
    assert case.lost == 0, case


@pytest.mark.parametrize("row", [row for row in ROWS if row not in REAL])
def test_a_run_survives(undisturbed: Forks, row: str) -> None:
    for seed in range(MANY.get(row, ROWS[row].brief)):
        survives(undisturbed, row, seed)


@pytest.mark.slow
@pytest.mark.parametrize("row", [*MANY, "signals"])
def test_a_run_survives_more_often(undisturbed: Forks, row: str) -> None:
    for seed in range(MANY.get(row, 0), ROWS[row].brief):
        survives(undisturbed, row, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROWS["kill-random"].brief))
def test_a_run_survives_kills_at_random(undisturbed: Forks, seed: int) -> None:
    survives(undisturbed, "kill-random", seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "seed"), [(row, seed) for row in CLUSTER for seed in range(CLUSTER[row].brief - ELSEWHERE.get(row, 0))]
)
def test_a_run_survives_what_happens_to_its_cluster(undisturbed: Forks, row: str, seed: int) -> None:
    survives(undisturbed, row, seed)


@pytest.mark.parametrize(
    ("row", "seed"), [(row, seed) for row in BESIDE for seed in range(FEW.get(row, BESIDE[row].brief))]
)
def test_a_run_survives_its_calls_and_files(beside: Forks, row: str, seed: int) -> None:
    survives(beside, row, seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "seed"),
    # chaos takes minutes: it is for the command alone
    [(row, seed) for row in FEW if row != "chaos" for seed in range(FEW[row], BESIDE[row].brief)],
)
def test_a_run_survives_more_of_its_calls_and_files(beside: Forks, row: str, seed: int) -> None:
    survives(beside, row, seed)


def test_the_trap_of_hostile_files_works() -> None:
    """What is refused would set a variable of the environment, were it loaded."""
    script = (
        f"import io, sys; sys.path.insert(0, {str(TESTS)!r}); import numpy as np; from campaign_files import FILES\n"
        "np.load(io.BytesIO(FILES['a pickled npy'][1]()), allow_pickle=True); import os; os.system('printenv ' + "
        f"{SPRUNG!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr


# -- the hook ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "fails"),
    [
        ("", []),
        ("a:1:EIO", [(0, "EIO")]),
        ("a:2:EIO", [(2, "EIO")]),
        ("b:1:ENOSPC", [(1, "ENOSPC")]),
        ("*:3:EFBIG", [(2, "EFBIG")]),
        ("a:1:EIO,b:1:EDQUOT", [(0, "EIO"), (1, "EDQUOT")]),
        ("a:4:EIO", []),
        ("c:1:EIO", []),
    ],
)
def test_a_point_fails_at_the_passing_that_was_asked(
    asked: str, fails: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "_asked", faults._faults(asked))
    found = []
    for number, name in enumerate(["a", "b", "a", "b", "a"]):
        try:
            faultpoint(name)
        except OSError as error:
            found.append((number, errno.errorcode[error.errno or 0]))
    assert found == fails


@pytest.mark.parametrize("asked", ["a", "a:x:EIO", "a:1:", "a:1:ENOENT", ":1:EIO", "a:1:EIO,"])
def test_what_is_no_fault_is_refused(asked: str) -> None:
    with pytest.raises(ValueError, match=VARIABLE):
        faults._faults(asked)


def test_a_point_kills_the_process() -> None:
    script = "from hybridq.faults import faultpoint\nfor _ in 'ab': faultpoint('here'); print('passed', flush=True)"
    environment = {**os.environ, VARIABLE: f"here:2:{KILL}"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "passed\n")
