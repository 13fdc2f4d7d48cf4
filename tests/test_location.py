"""Locations and seeds: one name for one call, and a key of its own for each row."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridq.location import Location, seed_key

NAMES = st.text(st.characters(exclude_characters="/[]", exclude_categories=["Cs"]), min_size=1)


def test_a_path_is_built_child_by_child() -> None:
    energy = Location("curve").child("point", 3).child("minimize", 0).child("energy", 17)
    assert str(energy) == "curve/point[3]/minimize[0]/energy[17]"
    assert energy.name == "energy"
    assert str(energy.parent) == "curve/point[3]/minimize[0]"
    assert Location("curve").parent is None
    assert Location("curve").name == "curve"


@given(st.lists(st.tuples(NAMES, st.integers(0, 10**6)), min_size=1), NAMES)
def test_parents_and_names_undo_children(steps: list[tuple[str, int]], root: str) -> None:
    walked = [Location(root)]
    for name, index in steps:
        walked.append(walked[-1].child(name, index))
        assert walked[-1].name == name
        assert walked[-1].parent == walked[-2]
    assert len(set(walked)) == len(walked)


@given(st.integers(0, 2**63), NAMES, st.integers(0, 2**40))
def test_a_key_is_the_digest_of_seed_location_and_row(seed: int, path: str, row: int) -> None:
    digest = hashlib.sha256(f"{seed}\0{path}\0{row}".encode()).digest()
    assert seed_key(seed, Location(path), row) == struct.unpack("<QQ", digest[:16])


def test_keys_differ_in_seed_location_and_row() -> None:
    keys = {
        seed_key(s, Location(p), r) for s in range(5) for p in ("a", "a/b[0]", "a/b[1]", "a/b[10]") for r in range(50)
    }
    assert len(keys) == 5 * 4 * 50
    assert seed_key(1, Location("a")) == seed_key(1, Location("a"), 0)
    assert all(0 <= part < 2**64 for key in keys for part in key)


def test_bits_of_keys_are_fair() -> None:
    """Of n fair bits the mean is within 5 standard deviations, 5 / (2 sqrt(n)), of one half."""
    keys = [seed_key(7, Location("run/e[0]"), row) for row in range(2000)]
    ones = sum(part.bit_count() for key in keys for part in key)
    n = 2000 * 128
    assert abs(ones / n - 0.5) < 2.5 / n**0.5
    assert ones != n // 2  # it is a sample, not a construction


@pytest.mark.parametrize("seed", ["0", "1"])
def test_keys_are_equal_in_every_process(seed: str) -> None:
    script = "from hybridq.location import *; print(seed_key(3, Location('a/b[0]'), 5))"
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(seed_key(3, Location("a/b[0]"), 5))
