"""What was measured of this machine: kept, found again, and never part of a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qiskit.circuit.library import efficient_su2

import hybridq as hq
from hybridq import calibration
from hybridq import journal as records
from hybridq.engines.costs import DEFAULT, Calibration
from hybridq.journal import read_records

CIRCUIT = efficient_su2(3, reps=1)
SLOWER = Calibration({kind: tuple(7 * c for c in own) for kind, own in DEFAULT.coefficients.items()}, DEFAULT.first)


@hq.quantum
def energy(theta: Any) -> Any:
    return hq.expval(CIRCUIT, "ZZZ", theta)


@hq.workflow
def once() -> float:
    return float(energy(np.linspace(0, 1, CIRCUIT.num_parameters)))


def predicted(store: Path, name: str) -> float:
    (circuit,) = (r for _, r in read_records(store / name) if isinstance(r, records.Circuit))
    assert circuit.need is not None
    return float(circuit.need["seconds"])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert calibration.read(tmp_path / "none yet") is DEFAULT
    path = calibration.write(tmp_path / "runs", SLOWER)
    assert calibration.read(tmp_path / "runs") == SLOWER
    calibration.write(tmp_path / "runs", DEFAULT)
    assert calibration.read(tmp_path / "runs") == DEFAULT
    assert [p.name for p in path.parent.iterdir()] == ["calibration.json"]


def test_each_machine_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.write(tmp_path, SLOWER)
    monkeypatch.setattr(calibration, "processor", lambda: "another one")
    assert calibration.read(tmp_path) is DEFAULT
    calibration.write(tmp_path, DEFAULT)
    monkeypatch.undo()
    assert calibration.read(tmp_path) == SLOWER


@pytest.mark.parametrize("text", ["", "{", "[]", '{"MACHINE": {}}', '{"MACHINE": {"coefficients": 3}}'])
def test_a_file_that_is_none_is_refused_with_the_remedy(store: Path, text: str) -> None:
    store.mkdir(exist_ok=True)
    (store / calibration.FILE).write_text(text.replace("MACHINE", calibration.machine()))
    with pytest.raises(hq.WorkflowError, match=r"is no calibration .* hybridq devices --measure"):
        hq.run(once, name="a", store=store)


def test_terms_of_another_version_count_as_not_measured(tmp_path: Path) -> None:
    path = calibration.write(tmp_path, SLOWER)
    entries = json.loads(path.read_text())
    (entry,) = entries.values()
    entry["coefficients"]["backend"] = [1.0]
    path.write_text(json.dumps(entries))
    assert calibration.read(tmp_path) is DEFAULT


def test_it_changes_what_is_predicted_and_no_result(store: Path) -> None:
    before = hq.run(once, name="before", store=store)
    calibration.write(store, SLOWER)
    after = hq.run(once, name="after", store=store)
    assert before == after
    assert predicted(store, "after") == pytest.approx(7 * predicted(store, "before"))
