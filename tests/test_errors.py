"""The exception tree: what its docstring draws is what there is."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

import hybridq as hq
from hybridq import errors


def drawn() -> dict[str, str]:
    """Parent by name, from the docstring's drawing."""
    assert errors.__doc__ is not None
    parents, above = {}, {0: "Exception"}
    for line in errors.__doc__.partition("::")[2].splitlines():
        found = re.match(r"^( {4,8})([A-Z]\w+)(?: {2,}\S|$)", line)
        if found:
            depth = (len(found[1]) - 4) // 2
            above[depth + 1] = found[2]
            parents[found[2]] = above[depth]
    return parents


def test_the_drawing_is_the_tree() -> None:
    there = {
        name: kind.__base__.__name__
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, BaseException) and kind.__base__ is not None
    }
    assert len(there) > 10
    assert drawn() == there
    assert sorted(errors.__all__) == sorted(there)


@pytest.mark.parametrize("name", errors.__all__)
def test_each_is_public_documented_and_travels(name: str) -> None:
    kind = getattr(errors, name)
    assert getattr(hq, name) is kind
    assert kind.__doc__
    error = pickle.loads(pickle.dumps(kind("what happened")))
    assert type(error) is kind
    assert str(error) == "what happened"
    assert issubclass(kind, hq.HybridqError)
    assert not issubclass(kind, (ValueError, OSError, RuntimeError))
