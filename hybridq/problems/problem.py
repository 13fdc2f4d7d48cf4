"""The noun that molecules and lattices have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from qiskit import QuantumCircuit
from qiskit.quantum_info import SparsePauliOp

from hybridq.errors import WorkflowError

__all__ = ["Problem"]


@dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """A ground-state problem: what to minimise, over which states, from where, and what the answer should be.

    Every field is plain data; passing the fields of one problem to the constructor gives an equal one.

    Attributes:
        name: what a person calls it, "H2 sto-3g".
        hamiltonian: Hermitian operator on `ansatz.num_qubits` qubits, coefficients in `unit`. It includes the constant
            term, so its expectation value is the total energy.
        ansatz: the circuit, from |0...0> and without measurements.
        start: float64 of shape (P,), radians, in the order of `ansatz.parameters`; copied and made read-only.
        reference: the exact ground-state energy in `unit`, or None where none is known.
        source: where the reference comes from, or why there is none.
        unit: "hartree" or "J" (the coupling of a lattice model).
        properties: numbers and words about the problem.

    Raises:
        WorkflowError: the fields do not fit together.
    """

    name: str
    hamiltonian: SparsePauliOp
    ansatz: QuantumCircuit
    start: NDArray[np.float64]
    reference: float | None
    source: str
    unit: str
    properties: Mapping[str, float | int | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the fields fit together, and take copies of those that could change."""
        start = np.array(self.start, dtype=np.float64)
        start.setflags(write=False)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "properties", dict(self.properties))
        if self.hamiltonian.num_qubits != self.ansatz.num_qubits:
            raise WorkflowError(
                f"{self.name}: the Hamiltonian acts on {self.hamiltonian.num_qubits} qubits and the ansatz on "
                f"{self.ansatz.num_qubits}; they must act on the same"
            )
        if start.shape != (self.ansatz.num_parameters,):
            raise WorkflowError(
                f"{self.name}: start has shape {start.shape}; the ansatz has {self.ansatz.num_parameters} parameters, "
                f"so it must be ({self.ansatz.num_parameters},)"
            )
        if not np.isfinite(start).all() or not np.isfinite(self.hamiltonian.coeffs).all():
            raise WorkflowError(f"{self.name}: start and Hamiltonian coefficients must be finite numbers")
        if np.any(np.imag(self.hamiltonian.coeffs)):
            raise WorkflowError(f"{self.name}: the Hamiltonian is not Hermitian; its coefficients must be real")

    def __repr__(self) -> str:
        """One line: name, sizes, reference."""
        reference = "no reference" if self.reference is None else f"reference {self.reference:.10f} {self.unit}"
        return (
            f"Problem({self.name!r}: {self.ansatz.num_qubits} qubits, {len(self.hamiltonian)} Pauli terms, "
            f"{len(self.start)} parameters, {reference} [{self.source}])"
        )
