"""Electrons on qubits: the Jordan-Wigner mapping and unitary coupled-cluster circuits.

Spin-orbitals are qubits in blocks: spatial orbital p with spin up is qubit p, with spin down qubit n + p (n spatial
orbitals, qubit 0 is the least significant bit, as in Qiskit); an occupied spin-orbital is |1>.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise, product
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterExpression, ParameterVector
from qiskit.quantum_info import PauliList, SparsePauliOp

from hybridq.errors import WorkflowError

__all__ = ["Excitation", "excitations", "generator", "jordan_wigner", "rotate", "symmetry_allowed", "ucc"]

_SMALLEST = 1e-12  # hartree; terms below it are rounding errors of zero
_MOST_ORBITALS = 16  # the x and z masks of one Pauli string share a 64-bit key


def jordan_wigner(constant: float, one_body: ArrayLike, two_body: ArrayLike) -> SparsePauliOp:
    """Map a spin-free electronic Hamiltonian to qubits.

    H = constant + sum_pq h_pq E_pq + 1/2 sum_pqrs (pq|rs) (E_pq E_rs - delta_qr E_ps), where E_pq is the sum over spins
    of a+_p a_q (Helgaker, Jorgensen, Olsen, Molecular Electronic-Structure Theory, 2000, section 2.2) and
    a_p = Z_0 ... Z_{p-1} (X_p + i Y_p) / 2 (Jordan, Wigner, Z. Phys. 47, 631 (1928)).

    Args:
        constant: energy added to all, such as the nuclear repulsion; hartree.
        one_body: h_pq, real symmetric, shape (n, n), n <= 16; hartree.
        two_body: (pq|rs) in chemists' order with the eight-fold symmetry of real orbitals, shape (n, n, n, n); hartree.

    Returns:
        The operator on 2n qubits. Coefficients are exactly real, terms below 1e-12 are left out (the identity is always
        there), and the terms are sorted by their X mask, then by their Z mask, so diagonal terms come first.

    Raises:
        WorkflowError: shapes, symmetry or values are not as above.
    """
    h, g = _integrals(one_body, two_body)
    if not np.isfinite(constant):
        raise WorkflowError(f"the constant term is {constant}; it must be a finite number")
    n = len(h)
    pair, x, z, weight = _symmetrised_hops(n)
    rows, columns = np.triu_indices(n)
    # E_pq E_rs as a product leaves this one-body remainder.
    mean = (h - 0.5 * np.einsum("prrq->pq", g))[rows, columns]
    repulsion = 0.5 * g[rows, columns][:, rows, columns]

    both_x, both_z = x[:, None] ^ x, z[:, None] ^ z
    ys = np.bitwise_count(x & z).astype(np.int64)
    # A Pauli string is i^|x&z| X^x Z^z; in the product of two, the power of i is:
    power = ys[:, None] + ys - np.bitwise_count(both_x & both_z) + 2 * np.bitwise_count(z[:, None] & x).astype(np.int64)
    # Odd powers cancel between the two orders of the pair, so they are left out and the rest is real.
    real = power % 2 == 0
    values = np.where(power % 4 == 2, -1.0, 1.0) * weight[:, None] * weight * repulsion[pair][:, pair]

    shift = np.uint64(2 * n)
    keys = np.concatenate([np.zeros(1, np.uint64), x << shift | z, (both_x << shift | both_z)[real]])
    terms, index = np.unique(keys, return_inverse=True)
    coefficients = np.bincount(index, np.concatenate([[constant], weight * mean[pair], values[real]]))
    kept = (np.abs(coefficients) >= _SMALLEST) | (terms == 0)
    bits = terms[kept, None] >> np.arange(4 * n, dtype=np.uint64) & np.uint64(1) == 1
    return SparsePauliOp(PauliList.from_symplectic(bits[:, : 2 * n], bits[:, 2 * n :]), coefficients[kept])


class Excitation(NamedTuple):
    """The operator T = a+_v1 a+_v2 ... a_o2 a_o1, moving electrons from `occupied` to `virtual` spin-orbitals."""

    occupied: tuple[int, ...]
    virtual: tuple[int, ...]


def excitations(orbitals: int, alpha: int, beta: int) -> list[Excitation]:
    """List the spin-preserving double, then single excitations of the determinant with the lowest orbitals filled.

    Doubles of opposite spin come first, then of two up, then of two down electrons; then singles up, singles down;
    each group in lexical order.

    Args:
        orbitals: number n of spatial orbitals.
        alpha: electrons with spin up, at most n.
        beta: electrons with spin down, at most n.
    """
    up = [Excitation((i,), (a,)) for i, a in product(range(alpha), range(alpha, orbitals))]
    down = [Excitation((orbitals + i,), (orbitals + a,)) for i, a in product(range(beta), range(beta, orbitals))]
    opposite = [Excitation(s.occupied + t.occupied, s.virtual + t.virtual) for s, t in product(up, down)]
    alike = [
        Excitation(pair, target)
        for first, electrons in ((0, alpha), (orbitals, beta))
        for pair in combinations(range(first, first + electrons), 2)
        for target in combinations(range(first + electrons, first + orbitals), 2)
    ]
    return [*opposite, *alike, *up, *down]


def symmetry_allowed(candidates: Iterable[Excitation], one_body: ArrayLike, two_body: ArrayLike) -> list[Excitation]:
    """Keep the excitations that no sign symmetry of the integrals forbids, in their order.

    A sign symmetry flips the sign of some orbitals and leaves all integrals as they are; the Abelian point groups with
    real characters act so on symmetry-adapted orbitals. An excitation survives all of them exactly if its orbitals, as
    a vector over GF(2), are a sum of those of integrals that are not zero (compare Bravyi et al., arXiv:1701.08213).
    Integrals below 1e-8 hartree count as zero. Nothing is rotated and no labels are needed.

    Args:
        candidates: excitations of spin-orbitals.
        one_body: h_pq of shape (n, n); hartree.
        two_body: (pq|rs) of shape (n, n, n, n); hartree.

    Raises:
        WorkflowError: the integrals are not what `jordan_wigner` takes.
    """
    h, g = _integrals(one_body, two_body)
    unit = np.int64(1) << np.arange(len(h))
    pairs = unit[:, None] ^ unit
    fours = pairs[:, :, None, None] ^ pairs
    basis: dict[int, int] = {}  # leading bit -> mask; a triangular basis of the span

    def remainder(mask: int) -> int:
        while mask and mask.bit_length() in basis:
            mask ^= basis[mask.bit_length()]
        return mask

    for mask in np.unique(np.concatenate([pairs[np.abs(h) > 1e-8], fours[np.abs(g) > 1e-8]])).tolist():
        if rest := remainder(mask):
            basis[rest.bit_length()] = rest

    def orbitals(excitation: Excitation) -> int:
        mask = 0
        for p in excitation.occupied + excitation.virtual:
            mask ^= 1 << p % len(h)
        return mask

    return [excitation for excitation in candidates if not remainder(orbitals(excitation))]


def generator(excitation: Excitation, qubits: int) -> SparsePauliOp:
    """Return the Hermitian G with exp(-i theta G) = exp(theta (T - T+)), that is G = i (T - T+).

    Its Pauli strings commute with each other: 2 for a single, 8 for a double excitation, with equal weights.

    Args:
        excitation: T.
        qubits: number of spin-orbitals.
    """

    def annihilate(p: int) -> SparsePauliOp:
        strings = [("Z" * p + pauli, [*range(p), p], factor) for pauli, factor in (("X", 0.5), ("Y", 0.5j))]
        return SparsePauliOp.from_sparse_list(strings, qubits)

    operator = SparsePauliOp("I" * qubits)
    for p in excitation.virtual:
        operator = operator @ annihilate(p).adjoint()
    for p in reversed(excitation.occupied):
        operator = operator @ annihilate(p)
    hermitian = (1j * (operator - operator.adjoint())).simplify().sort()
    return SparsePauliOp(hermitian.paulis, hermitian.coeffs.real)


def rotate(circuit: QuantumCircuit, theta: float | ParameterExpression, excitation: Excitation) -> None:
    """Append exp(theta (T - T+)) to a circuit, exactly, with the gates cx, rz, sx and sxdg.

    T - T+ turns the state "occupied filled, virtual empty" towards its opposite, with the sign of the electrons between
    (Yordanov, Arvidsson-Shukur, Barnes, Phys. Rev. A 102, 062612 (2020)). The last virtual qubit becomes the target:
    CXs from it make the other 2k - 1 qubits the same in both states, and what is left is a Y rotation of the target
    controlled by them. Its 2^(2k-1) commuting Pauli strings are walked in Gray-code order, one CX from each to the next
    (Moettoenen et al., Phys. Rev. Lett. 93, 130502 (2004)). A single takes 2 rz and 4 CX, a double 8 rz and 14 CX,
    plus 2 CX for every qubit of the Jordan-Wigner string.

    Args:
        circuit: changed in place.
        theta: angle in radians, a number or a parameter expression.
        excitation: T, on qubits of the circuit.
    """
    *controls, target = excitation.occupied + excitation.virtual
    strings = 1 << len(controls)
    step = theta * (2 * _sign(excitation) / strings)
    angles = (step, -step)
    # Filled controls enter the projector as (1 - Z) / 2, empty ones as (1 + Z) / 2.
    filled = (1 << len(excitation.occupied)) - 1

    for qubit in controls:
        circuit.cx(target, qubit)
    circuit.sx(target)  # turns the Y rotation into a Z rotation
    ladder = list(pairwise([*_string(excitation), target]))
    for pair in ladder:
        circuit.cx(*pair)
    subset = 0
    for place in range(1, strings + 1):
        circuit.rz(angles[(subset & filled).bit_count() % 2], target)
        flipped = min((place & -place).bit_length(), len(controls)) - 1
        circuit.cx(controls[flipped], target)
        subset ^= 1 << flipped
    for pair in reversed(ladder):
        circuit.cx(*pair)
    circuit.sxdg(target)
    for qubit in reversed(controls):
        circuit.cx(target, qubit)


def ucc(qubits: int, filled: Iterable[int], factors: Sequence[Excitation]) -> QuantumCircuit:
    """Prepare a determinant, then apply exp(theta_k (T_k - T_k+)) for each excitation in turn.

    The product conserves the numbers of electrons of either spin if the excitations do.

    Args:
        qubits: number of spin-orbitals.
        filled: the occupied spin-orbitals of the determinant.
        factors: excitations; the first acts first.

    Returns:
        A circuit of x, cx, rz, sx, sxdg with the parameters theta[0], theta[1], ... in the order of the excitations.
    """
    circuit = QuantumCircuit(qubits, name="ucc")
    for qubit in filled:
        circuit.x(qubit)
    for theta, excitation in zip(ParameterVector("theta", len(factors)), factors, strict=True):
        rotate(circuit, theta, excitation)
    return circuit


def _integrals(one_body: ArrayLike, two_body: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Check integrals and return them as float64 arrays."""
    if np.iscomplexobj(one_body) or np.iscomplexobj(two_body):
        raise WorkflowError("the integrals are complex; only real orbitals are supported")
    h, g = np.asarray(one_body, dtype=np.float64), np.asarray(two_body, dtype=np.float64)
    n = h.shape[0] if h.ndim else 0
    if not n or h.shape != (n, n) or g.shape != (n, n, n, n):
        raise WorkflowError(f"the integrals have shapes {h.shape} and {g.shape}; they must be (n, n) and (n, n, n, n)")
    if n > _MOST_ORBITALS:
        raise WorkflowError(f"{n} orbitals; at most {_MOST_ORBITALS} are supported: choose a smaller active space")
    if not np.isfinite(h).all() or not np.isfinite(g).all():
        raise WorkflowError("the integrals hold values that are not finite")
    swapped = (g.transpose(1, 0, 2, 3), g.transpose(0, 1, 3, 2), g.transpose(2, 3, 0, 1))
    if not np.allclose(h, h.T, atol=1e-6) or not all(np.allclose(g, other, atol=1e-6) for other in swapped):
        raise WorkflowError(
            "the integrals lack the symmetry of real orbitals, h_pq = h_qp and (pq|rs) = (qp|rs) = (pq|sr) = (rs|pq); "
            "physicists' order <pr|qs> must be transposed first: g.transpose(0, 2, 1, 3)"
        )
    return h, g


def _symmetrised_hops(
    n: int,
) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.float64]]:
    """Pauli strings of E_pp, and of E_pq + E_qp for p < q, of both spins.

    a+_p a_p = (1 - Z_p) / 2 and a+_p a_q + a+_q a_p = (X_p Z... X_q + Y_p Z... Y_q) / 2.

    Returns:
        Number of the pair (p, q) in `np.triu_indices(n)`, X mask, Z mask, coefficient; one entry a string.
    """
    entries = []
    for pair, (p, q) in enumerate(zip(*np.triu_indices(n), strict=True)):
        for spin in (0, n):
            low, high = 1 << int(p) + spin, 1 << int(q) + spin
            if p == q:
                entries += [(pair, 0, 0, 0.5), (pair, 0, low, -0.5)]
            else:
                between = (high - 1) ^ (2 * low - 1)
                entries += [(pair, low | high, between, 0.5), (pair, low | high, between | low | high, 0.5)]
    pairs, xs, zs, weights = zip(*entries, strict=True)
    return np.array(pairs), np.array(xs, np.uint64), np.array(zs, np.uint64), np.array(weights)


def _sign(excitation: Excitation) -> int:
    """Sign of T on the determinant in which only its own occupied spin-orbitals are filled."""
    filled = list(excitation.occupied)
    swaps = 0
    for p in excitation.occupied:
        swaps += sum(q < p for q in filled)
        filled.remove(p)
    for p in reversed(excitation.virtual):
        swaps += sum(q < p for q in filled)
        filled.append(p)
    return -1 if swaps % 2 else 1


def _string(excitation: Excitation) -> list[int]:
    """Qubits whose electrons change the sign of T: those with an odd number of its operators above them."""
    ends = sorted(excitation.occupied + excitation.virtual)
    return [q for low, high in zip(ends[::2], ends[1::2], strict=True) for q in range(low + 1, high)]
