"""The studies in `workflows/`, run as a researcher runs them, against energies that are computed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

ROOT = Path(__file__).resolve().parents[1]
HYBRIDQ = Path(sys.executable).with_name("hybridq")


def study(name: str, place: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run a study with ``--json``; its report, and what it said on stderr."""
    script = ROOT / "workflows" / f"{name}.py"
    done = subprocess.run(
        [HYBRIDQ, "run", script, "--json", "--store", place / "runs", *arguments],
        check=False, capture_output=True, text=True, cwd=place, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found, done.stderr


def counts(found: dict[str, Any]) -> dict[str, int]:
    kinds = ("evaluations_executed", "evaluations_replayed", "steps_executed", "steps_replayed")
    return {kind: found[kind] for kind in kinds}


def fci(bond: float) -> float:
    """H2 in STO-3G by PySCF alone, in hartree."""
    from pyscf import fci, gto, scf

    molecule = gto.M(atom=f"H 0 0 0; H 0 0 {bond}", basis="sto-3g", verbose=0)
    field = scf.RHF(molecule)
    field.conv_tol = 1e-12
    field.kernel()
    return float(fci.FCI(field).kernel()[0])


def test_h2_dissociation(client: Client, tmp_path: Path) -> None:
    arguments = ("--cluster", client.scheduler_info()["address"], "--", "curve.png")
    live, said = study("h2_dissociation", tmp_path, *arguments)
    points, fit = live["value"]["points"], live["value"]["fit"]
    assert [p["bond"] for p in points] == [0.5, 0.6, 0.7, 0.74, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0]
    for point in points:
        expected = fci(point["bond"])
        assert point["energy"] == pytest.approx(expected, abs=1e-6)
        assert point["energy"] >= expected - 1e-9  # variational
        assert point["reference"] == pytest.approx(expected, abs=1e-8)
    assert 0.70 < fit["bond_length"] < 0.76  # 0.735 angstrom in this basis
    assert 0.15 < fit["depth"] < 0.25
    assert 3000 < fit["frequency"] < 7000
    assert fit["minimum"] == pytest.approx(min(p["energy"] for p in points), abs=0.01)
    assert counts(live) == {
        "evaluations_executed": sum(p["evaluations"] for p in points),
        "evaluations_replayed": 0,
        "steps_executed": len(points) + 1,
        "steps_replayed": 0,
    }
    assert min(p["evaluations"] for p in points) >= 4
    picture = tmp_path / "curve.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert "bond length" in said  # the study's own table went to stderr

    picture.unlink()
    again, _ = study("h2_dissociation", tmp_path, "--cluster", "tcp://127.0.0.1:9", "--", "curve.png")  # nobody there
    assert again["value"] == live["value"]
    assert counts(again) == {
        "evaluations_executed": 0,
        "evaluations_replayed": live["evaluations_executed"],
        "steps_executed": 0,
        "steps_replayed": live["steps_executed"],
    }
    assert again["name"] == live["name"]
    assert picture.exists()


def test_ising_ring(client: Client, tmp_path: Path) -> None:
    arguments = ("--cluster", client.scheduler_info()["address"], "--name", "ring", "--", "4", "6", "8")
    live, said = study("ising_ring", tmp_path, *arguments)
    points = live["value"]["points"]
    assert [p["sites"] for p in points] == [4, 6, 8]
    for point in points:
        n = point["sites"]
        momenta = np.pi * (2 * np.arange(n) + 1) / n  # free fermions with antiperiodic boundary, at h = J = 1
        expected = -float(np.sum(2 * np.abs(np.sin(momenta / 2))))
        assert expected == pytest.approx(-2 / np.sin(np.pi / (2 * n)), abs=1e-12)
        assert point["energy"] == pytest.approx(expected, abs=1e-8)
        assert point["reference"] == pytest.approx(expected, abs=1e-10)
        assert f"{n:6d}" in said
    assert live["name"] == "ring"
    assert (live["evaluations_executed"], live["steps_executed"]) == (sum(p["evaluations"] for p in points), 3)
    again, _ = study("ising_ring", tmp_path, *arguments)
    assert again["value"] == live["value"]
    assert (again["evaluations_executed"], again["steps_executed"]) == (0, 0)
    assert again["evaluations_replayed"] == live["evaluations_executed"]
