"""Amounts of memory: read as people write them, and written so that they can be read."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridq.policies import Device
from hybridq.resources import Need, format_bytes, parse_bytes, worker_allowance

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (5, 5),
        ("0", 0),
        ("7", 7),
        ("7 B", 7),
        ("7b", 7),
        ("1 kB", 1000),
        ("1 MB", 10**6),
        ("2 GB", 2 * 10**9),
        ("1 TB", 10**12),
        ("1 KiB", 1024),
        ("1 MiB", 2**20),
        ("1 GiB", 2**30),
        ("3 TiB", 3 * 2**40),
        ("1GiB", 2**30),
        ("1gib", 2**30),
        (" 1  GIB ", 2**30),
        ("1.5 GiB", 3 * 2**29),
        (".5 KiB", 512),
        ("1e3 MB", 10**9),
        ("500 MB", 5 * 10**8),
    ],
)
def test_amounts_that_people_write(text: Any, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GiB",
        "-1",
        "-1 GiB",
        -1,
        "1 XB",
        "1 Gi",
        "1 G",
        "1 iB",
        "1 GiB 2",
        "1 BB",
        "nan",
        "inf",
        "-inf GiB",
        "one",
        "1,5 GiB",
        True,
        None,
        1.5,
        [],
        b"1 GiB",
        2**60,
        "0x10",
    ],
)
def test_what_is_no_amount_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="is not an amount of memory; write it like '1 GiB' or '500 MB'"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "1000 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"),
        (1023693, "1000 KiB"), (2**20 - 1, "1 MiB"), (2**20, "1 MiB"), (10**6, "977 KiB"), (2**30, "1 GiB"),
        (2**40, "1.0 TiB"), (2**50, "1,024.0 TiB"), (2**2000, "2^2000 B"),
    ],
)  # fmt: skip
def test_amounts_are_written_in_the_unit_that_suits(amount: int, expected: str) -> None:
    assert format_bytes(amount) == expected


@given(st.integers(0, 2**60))
def test_what_is_written_is_right_to_half_a_percent(amount: int) -> None:
    number, unit = format_bytes(amount).split()
    assert re.fullmatch(r"[\d,]+(\.\d+)?", number)  # no powers of ten
    written = Fraction(number.replace(",", "")) * UNITS[unit]
    error = max(Fraction(amount, 200), Fraction(UNITS["TiB"], 20) if unit == "TiB" else 0)
    assert abs(written - amount) <= error
    assert amount < 1000 or unit != "B" or amount < 1024


@given(st.integers(0, 2**45), st.integers(1, 64))
def test_the_allowance_leaves_room_for_what_is_idle(limit: int, slots: int) -> None:
    found = worker_allowance(limit, slots)
    assert found >= 0
    if found:
        assert found + (400 + 250 * slots) * 2**20 <= limit * 0.95
        assert worker_allowance(limit, slots + 1) < found
    assert worker_allowance(limit + 2**30, slots) >= found


def test_small_workers_have_no_room() -> None:
    assert worker_allowance(2**29, 1) == 0
    assert worker_allowance(2**33, 2) == int(0.95 * 2**33) - 900 * 2**20


def test_needs_and_devices_are_plain_frozen_data() -> None:
    assert Need(1, 2.0) == Need(1, 2.0, threads=1, qubits=0, shots=0)
    for thing in (Need(1, 2.0), Device("d", 1, 2, 1)):
        with pytest.raises(AttributeError):
            thing.bytes = 5  # type: ignore[misc]
        assert hash(thing) == hash(type(thing)(**{f: getattr(thing, f) for f in thing.__slots__}))
