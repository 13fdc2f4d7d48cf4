"""The fault campaign, each row for a few seeds; ``python -m benchmarks faults --at-length`` is the whole of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from campaign import ROWS, Forks, forks

REAL = ("kill-random", "signals")
"""Rows that start processes with engines, one after the other."""
MANY = {"kill-point": 6, "kill-resume": 2, "write-fails": 8, "torn-tail": 8, "bit-flip": 15}
"""Cases of the fast tests, where those of a row take longer than a few seconds together."""


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[Forks]:
    with forks() as found:
        yield found


def survives(undisturbed: Forks, row: str, seed: int) -> None:
    case = ROWS[row].case(undisturbed, seed)
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
