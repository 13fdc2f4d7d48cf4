"""Problems: a Hamiltonian, an ansatz, where to start, and a reference energy that says where it comes from."""

from __future__ import annotations

from hybridq.problems.lattices import lattice
from hybridq.problems.molecules import molecule
from hybridq.problems.problem import Problem

__all__ = ["Problem", "lattice", "molecule"]
