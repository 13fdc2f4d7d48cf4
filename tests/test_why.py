"""What a value came from: where it stands in other calls' arguments, and which part of a key changed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from distributed import Client
from qiskit.circuit.library import efficient_su2

import hybridq as hq
from hybridq.cli import main
from hybridq.why import why


@hq.quantum
def energy(theta: Any, weight: float) -> Any:
    return hq.expval(efficient_su2(2, reps=1), {"ZZ": weight}, theta)


@hq.classical
def prepare(index: int) -> dict[str, Any]:
    return {"start": 0.1234567 * index + 0.0101 * np.arange(8), "index": index}


def study_of(weight: float, power: int) -> Any:
    @hq.classical
    def finish(values: list[float]) -> float:
        return float(sum(v**power for v in values))

    @hq.workflow
    def study() -> Any:
        prepared = [prepare(k + 1) for k in range(2)]
        found = [hq.minimize(energy, p["start"], (weight,), method="COBYLA", options={"maxiter": 12}) for p in prepared]
        with contextlib.suppress(ValueError):
            failing(3)
        return finish([f.fun for f in found]), float(energy(found[0].x, weight))

    return study


@hq.classical(retries=0)
def failing(number: int) -> None:
    raise ValueError(f"{number} is odd")


@pytest.fixture(scope="module")
def runs(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("why")
    hq.run(study_of(1.0, 1), name="first", store=store, seed=4, cluster=client)
    hq.run(study_of(1.0, 2), name="second", store=store, seed=4, cluster=client, fork="first")
    hq.run(study_of(1.5, 1), name="third", store=store, seed=4, cluster=client)
    return store


@pytest.mark.parametrize(
    ("at", "kind", "inputs"),
    [
        ("study/prepare[0]", "classical step", {}),
        ("study/minimize[0]", "loop", {"x0": "study/prepare[0], its start"}),
        ("study/finish[0]", "classical step", {"[0][0][0]": "study/minimize[0], its fun",
                                               "[0][0][1]": "study/minimize[1], its fun"}),
        ("study/energy[0]", "quantum evaluation", {"all": "study/minimize[0], its x"}),
        ("study/minimize[1]/energy[3]", "evaluation of a loop", {}),
    ],
)  # fmt: skip
def test_where_a_value_came_from(runs: Path, at: str, kind: str, inputs: dict[str, str]) -> None:
    found = why(runs / "first", at)
    assert (found.kind, found.run, found.at, found.against) == (kind, "first", at, None)
    assert dict(found.inputs) == inputs
    assert "by driver 1 of 1" in found.came
    assert found.value is not None
    assert all(part.difference is None for part in found.parts)


@pytest.mark.parametrize(
    ("run", "against", "at", "changed"),
    [
        ("second", None, "study/prepare[0]", []),  # forked from the first
        ("second", None, "study/finish[0]", ["code"]),
        ("second", "third", "study/minimize[0]", ["settings"]),
        ("third", "first", "study/minimize[0]/energy[0]", ["settings"]),
        ("third", "first", "study/energy[0]", ["program", "parameters"]),
        ("third", "first", "study/prepare[1]", []),
    ],
)
def test_which_part_changed(runs: Path, run: str, against: str | None, at: str, changed: list[str]) -> None:
    found = why(runs / run, at, None if against is None else runs / against)
    assert found.against == (against or "first")
    assert [part.name for part in found.parts if part.difference] == changed
    assert all(part.difference is not None for part in found.parts)
    assert ("answers here: all" in found.verdict) == (not changed)
    for name in changed:
        assert name in found.verdict


def test_the_code_that_changed_is_shown(runs: Path) -> None:
    (code,) = [part for part in why(runs / "second", "study/finish[0]").parts if part.name == "code"]
    assert code.difference
    assert "run first" in code.difference
    assert "run second" in code.difference
    assert "power" in code.difference or "2" in code.difference


def test_what_was_raised_before_is_told(runs: Path) -> None:
    with pytest.raises(hq.WorkflowError, match=r"no record of 'study/failing\[0\]'; it raised ValueError: 3 is odd"):
        why(runs / "first", "study/failing[0]")


@pytest.mark.parametrize(
    ("at", "words"),
    [("study/nothing[0]", "below study it has study/"), ("elsewhere", "it has study/"),
     ("study/minimize[0]/energy[999]", "no record of"), ("study/minimize[0]/other[0]", "no record of")],
)  # fmt: skip
def test_a_location_that_is_not_there(runs: Path, at: str, words: str) -> None:
    with pytest.raises(hq.WorkflowError, match="has no record of") as refused:
        why(runs / "first", at)
    assert words in str(refused.value)


def test_the_command(runs: Path) -> None:
    shown = CliRunner().invoke(main, ["why", "second", "study/finish[0]", "--store", str(runs)])
    assert shown.exit_code == 0
    assert "The run first does not answer here: code changed." in shown.output
    document = json.loads(
        CliRunner().invoke(main, ["why", "second", "study/finish[0]", "--store", str(runs), "--json"]).output
    )
    assert document["kind"] == "classical step"
    assert CliRunner().invoke(main, ["why", "second", "nowhere", "--store", str(runs)]).exit_code == 1
    assert CliRunner().invoke(main, ["why", "absent", "nowhere", "--store", str(runs)]).exit_code == 1
