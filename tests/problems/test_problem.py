"""A problem is plain data: checked, copied, stored and rebuilt."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from qiskit import QuantumCircuit, qpy
from qiskit.circuit import Parameter
from qiskit.quantum_info import SparsePauliOp

from hybridq.errors import WorkflowError
from hybridq.problems import Problem, lattice, molecule


def small(**changes: object) -> Problem:
    circuit = QuantumCircuit(1)
    circuit.rx(Parameter("t"), 0)
    fields = {
        "name": "spin",
        "hamiltonian": SparsePauliOp("Z"),
        "ansatz": circuit,
        "start": np.array([0.1]),
        "reference": -1.0,
        "source": "by hand",
        "unit": "J",
        "properties": {"sites": 1},
    }
    return Problem(**(fields | changes))


def infinite() -> SparsePauliOp:
    operator = SparsePauliOp("Z")
    operator.coeffs = np.array([np.inf + 0j])
    return operator


def test_start_is_copied_and_read_only() -> None:
    start = np.array([1])
    problem = small(start=start)
    start[0] = 5
    assert problem.start.tolist() == [1.0]
    assert problem.start.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        problem.start[0] = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.name = "other"


def test_properties_are_copied() -> None:
    properties = {"sites": 1}
    problem = small(properties=properties)
    properties["sites"] = 2
    assert problem.properties == {"sites": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hamiltonian": SparsePauliOp("ZZ")}, "2 qubits"),
        ({"start": np.zeros(2)}, r"shape \(2,\)"),
        ({"start": np.zeros((1, 1))}, r"must be \(1,\)"),
        ({"start": np.array([np.nan])}, "finite"),
        ({"hamiltonian": infinite()}, "finite"),
        ({"hamiltonian": SparsePauliOp("Z", [1j])}, "Hermitian"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(WorkflowError, match=message):
        small(**changes)


def test_repr_is_one_line_with_the_sizes_and_the_reference() -> None:
    text = repr(small())
    assert "\n" not in text
    assert all(part in text for part in ("spin", "1 qubits", "1 Pauli", "1 parameters", "-1.0000000000 J", "by hand"))
    assert "no reference" in repr(small(reference=None))


@pytest.mark.parametrize(
    "make",
    [lambda: lattice("ising", 12, boundary="ring"), lambda: molecule("Li 0 0 0; H 0 0 1.6", active=(2, 5))],
    ids=["lattice", "molecule"],
)
def test_fields_survive_json_npy_and_qpy(make: object) -> None:
    problem = make()
    plain = {name: getattr(problem, name) for name in ("name", "reference", "source", "unit", "properties")}
    circuit_file, array_file = io.BytesIO(), io.BytesIO()
    qpy.dump(problem.ansatz, circuit_file)
    np.save(array_file, problem.start, allow_pickle=False)
    circuit_file.seek(0)
    array_file.seek(0)
    rebuilt = Problem(
        hamiltonian=SparsePauliOp(problem.hamiltonian.paulis.to_labels(), problem.hamiltonian.coeffs),
        ansatz=qpy.load(circuit_file)[0],
        start=np.load(array_file),
        **json.loads(json.dumps(plain)),
    )
    assert {name: getattr(rebuilt, name) for name in plain} == plain
    assert rebuilt.start.tobytes() == problem.start.tobytes()
    assert rebuilt.hamiltonian == problem.hamiltonian
    assert rebuilt.ansatz == problem.ansatz
    assert [str(p) for p in rebuilt.ansatz.parameters] == [f"theta[{i}]" for i in range(len(problem.start))]


def test_importing_problems_does_not_import_pyscf() -> None:
    code = "import sys, hybridq.problems; assert not [m for m in sys.modules if m.startswith('pyscf')]"
    subprocess.run([sys.executable, "-c", code], check=True)
