"""Spin-1/2 models on a line or a ring, with the Hamiltonian variational ansatz."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Literal

import numpy as np
import scipy.sparse.linalg
from numpy.typing import NDArray
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from qiskit.quantum_info import SparsePauliOp

from hybridq.errors import WorkflowError
from hybridq.problems.problem import Problem

__all__ = ["lattice"]

_MOST_DIAGONALISED = 16  # sites; 12,870 states without magnetisation
_MOST_DENSE = 1000  # states

Bonds = list[tuple[int, int]]


def lattice(
    kind: Literal["ising", "heisenberg"],
    shape: int,
    *,
    boundary: Literal["chain", "ring"] = "chain",
    coupling: float = 1.0,
    field: float | None = None,
    layers: int | None = None,
) -> Problem:
    """Build a spin model with a Hamiltonian variational ansatz (Wecker, Hastings, Troyer, PRA 92, 042303 (2015)).

    "ising": H = -J sum_<ij> Z_i Z_j - h sum_i X_i. From |+...+>, each layer is exp(-i t/2 Z Z) on all bonds, then
    exp(-i t/2 X) on all sites; on a ring of even n at h = J, n / 2 layers hold the ground state exactly (Ho, Hsieh,
    SciPost Phys. 6, 029 (2019)), and L-BFGS-B finds it from `start` (tested for n = 4, 6, 8).

    "heisenberg": H = J sum_<ij> S_i . S_j with S = sigma / 2. From singlets on the bonds (0,1), (2,3), ..., each layer
    is exp(-i t/2 (XX + YY + ZZ)) on the bonds between them, then on theirs.

    There is one parameter a layer and group of gates, in the order in which they act. Both ansatz states are real at
    zero parameters, where the gradient vanishes, so `start` is a ramp away from zero: the angles of a slow switching of
    the start's own Hamiltonian into the full one, J and h scaled to their larger one.

    The reference is the closed form for the Ising ring, the energy of free fermions for the Ising chain, an exact
    diagonalisation for Heisenberg up to 16 sites, and None beyond.

    Args:
        kind: "ising" or "heisenberg".
        shape: number of sites n; at least 2, on a ring at least 3, for "heisenberg" even.
        boundary: "chain" (open) or "ring" (periodic).
        coupling: J > 0.
        field: h > 0 in the units of J, 1.0 by default; "heisenberg" has none.
        layers: layers of the ansatz, at least 1; n // 2 by default.

    Returns:
        A problem on n qubits, site i on qubit i; energies have the unit of J and h, "J".

    Raises:
        WorkflowError: an argument is not as above.
    """
    if kind not in ("ising", "heisenberg"):
        raise WorkflowError(f"lattice kind is {kind!r}; choose 'ising' or 'heisenberg'")
    if boundary not in ("chain", "ring"):
        raise WorkflowError(f"boundary is {boundary!r}; choose 'chain' or 'ring'")
    n = _integer("shape", shape, 3 if boundary == "ring" else 2)
    depth = n // 2 if layers is None else _integer("layers", layers, 1)
    j = _positive("coupling", coupling)
    bonds = [(i, (i + 1) % n) for i in range(n if boundary == "ring" else n - 1)]
    properties: dict[str, float | int | str] = {"sites": n, "boundary": boundary, "layers": depth, "coupling": j}
    reference: float | None
    if kind == "ising":
        h = _positive("field", 1.0 if field is None else field)
        name = f"ising {boundary} n={n} J={j:g} h={h:g}"
        terms = [("ZZ", [*bond], -j) for bond in bonds] + [("X", [i], -h) for i in range(n)]
        ansatz, start = _ising_ansatz(n, bonds, depth, j, h)
        if boundary == "ring":
            reference, source = _ising_ring(n, j, h), "closed form: Pfeuty, Ann. Phys. 57, 79 (1970)"
        else:
            reference, source = _ising_chain(n, j, h), "free fermions: Lieb, Schultz, Mattis, Ann. Phys. 16, 407 (1961)"
        properties["field"] = h
    else:
        if field is not None:
            raise WorkflowError(f"field is {field}; the Heisenberg model here has none: leave it out")
        if n % 2:
            raise WorkflowError(f"shape is {n}; the Heisenberg ansatz pairs the sites: choose an even number")
        name = f"heisenberg {boundary} n={n} J={j:g}"
        terms = [(pauli, [*bond], j / 4) for bond in bonds for pauli in ("XX", "YY", "ZZ")]
        ansatz, start = _heisenberg_ansatz(n, bonds, depth)
        if n <= _MOST_DIAGONALISED:
            reference, source = j * _heisenberg(n, bonds), f"exact diagonalisation, SciPy {scipy.__version__}"
        else:
            reference, source = None, f"none: more than the {_MOST_DIAGONALISED} sites that are diagonalised"
    hamiltonian = SparsePauliOp.from_sparse_list(terms, n)
    return Problem(name, hamiltonian, ansatz, start, reference, source, "J", properties)


def _integer(name: str, value: object, least: int) -> int:
    """Check a whole number."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise WorkflowError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return int(value)


def _positive(name: str, value: float) -> float:
    """Check a positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 < value < math.inf:
        raise WorkflowError(f"{name} is {value!r}; it must be a positive, finite number")
    return float(value)


def _ising_ansatz(n: int, bonds: Bonds, depth: int, j: float, h: float) -> tuple[QuantumCircuit, NDArray[np.float64]]:
    """Layers of ZZ and X rotations from |+...+>, and their start."""
    theta = ParameterVector("theta", 2 * depth)
    circuit = QuantumCircuit(n, name="ising")
    for site in range(n):
        circuit.h(site)
    for layer in range(depth):
        for bond in bonds:
            circuit.rzz(theta[2 * layer], *bond)
        for site in range(n):
            circuit.rx(theta[2 * layer + 1], site)
    ramp = np.arange(1, depth + 1) / (depth + 1)
    scale = max(j, h)
    return circuit, -np.column_stack([ramp * j / scale, (1 - ramp) * h / scale]).ravel()


def _heisenberg_ansatz(n: int, bonds: Bonds, depth: int) -> tuple[QuantumCircuit, NDArray[np.float64]]:
    """Layers of exchange on alternating bonds from a product of singlets, and their start."""
    groups = [group for group in (bonds[1::2], bonds[::2]) if group]
    theta = ParameterVector("theta", len(groups) * depth)
    circuit = QuantumCircuit(n, name="heisenberg")
    for a, b in bonds[::2]:
        circuit.x([a, b])
        circuit.h(a)
        circuit.cx(a, b)
    for step, angle in enumerate(theta):
        for bond in groups[step % len(groups)]:
            circuit.rxx(angle, *bond)
            circuit.ryy(angle, *bond)
            circuit.rzz(angle, *bond)
    ramp = np.arange(1, depth + 1) / (depth + 1)
    columns = [ramp, np.ones(depth)][-len(groups) :]
    return circuit, np.column_stack(columns).ravel() / 2


def _ising_ring(n: int, j: float, h: float) -> float:
    """E0 = -sum_k sqrt(J^2 + h^2 - 2 J h cos k), k = (2m + 1) pi / n, m = 0 ... n - 1.

    These are the free fermions of even parity (Pfeuty, Ann. Phys. 57, 79 (1970)); for J, h > 0 the ground state, having
    no sign changes in the X basis, is among them.
    """
    k = (2 * np.arange(n) + 1) * np.pi / n
    return -math.fsum(np.sqrt(j * j + h * h - 2 * j * h * np.cos(k)))


def _ising_chain(n: int, j: float, h: float) -> float:
    """E0 = - sum of the singular values of the n x n matrix with h on the diagonal and J next to it.

    They are half the excitation energies of the free fermions (Lieb, Schultz, Mattis, Ann. Phys. 16, 407 (1961)).
    """
    matrix = np.diag(np.full(n, h)) + np.diag(np.full(n - 1, j), 1)
    return -math.fsum(np.linalg.svd(matrix, compute_uv=False))


def _heisenberg(n: int, bonds: Bonds) -> float:
    """Lowest eigenvalue of sum S.S among the states without magnetisation, where every multiplet has a member."""
    states = np.array(sorted(sum(1 << i for i in up) for up in combinations(range(n), n // 2)))
    place = np.arange(len(states))
    matrix = scipy.sparse.csr_array((len(states), len(states)))
    for a, b in bonds:
        differ = (states >> a ^ states >> b) & 1 == 1
        flipped = np.searchsorted(states, states[differ] ^ (1 << a | 1 << b))
        # S.S is 1/4 on equal spins; on unequal ones it is -1/4 and swaps them with 1/2.
        matrix += scipy.sparse.csr_array((np.where(differ, -0.25, 0.25), (place, place)), matrix.shape)
        matrix += scipy.sparse.csr_array((np.full(len(flipped), 0.5), (flipped, place[differ])), matrix.shape)
    if len(states) <= _MOST_DENSE:
        return float(np.linalg.eigvalsh(matrix.toarray())[0])
    guess = np.random.default_rng(0).standard_normal(len(states))
    return float(scipy.sparse.linalg.eigsh(matrix, 1, which="SA", v0=guess, tol=1e-12, return_eigenvectors=False)[0])
