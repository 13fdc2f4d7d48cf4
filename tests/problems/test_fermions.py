"""The mapping and the circuits against OpenFermion and dense matrix exponentials."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import openfermion
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.quantum_info import Operator, SparsePauliOp, Statevector

from hybridq.errors import WorkflowError
from hybridq.problems.fermions import (
    Excitation,
    excitations,
    generator,
    jordan_wigner,
    rotate,
    symmetry_allowed,
    ucc,
)


def random_integrals(n: int, seed: int) -> tuple[float, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    h, g = rng.normal(size=(n, n)), rng.normal(size=(n, n, n, n))
    g = g + g.transpose(1, 0, 2, 3)
    g = g + g.transpose(0, 1, 3, 2)
    return rng.normal(), h + h.T, g + g.transpose(2, 3, 0, 1)


def by_openfermion(constant: float, h: np.ndarray, g: np.ndarray) -> dict[str, complex]:
    """Labels (qubit 0 rightmost) and coefficients, from ladder operators written out one by one."""
    n = len(h)
    operator = openfermion.FermionOperator((), constant)
    for index, value in np.ndenumerate(h):
        p, q = index
        for s in (0, n):
            operator += openfermion.FermionOperator(((p + s, 1), (q + s, 0)), value)
    for index, value in np.ndenumerate(g):
        if value:
            p, q, r, s = index
            for a in (0, n):
                for b in (0, n):
                    ladder = ((p + a, 1), (r + b, 1), (s + b, 0), (q + a, 0))
                    operator += openfermion.FermionOperator(ladder, value / 2)
    labels = {}
    for term, value in openfermion.jordan_wigner(operator).terms.items():
        label = ["I"] * (2 * n)
        for qubit, pauli in term:
            label[2 * n - 1 - qubit] = pauli
        if abs(value) >= 1e-12:
            labels["".join(label)] = value
    return labels


def assert_same_terms(operator: SparsePauliOp, expected: dict[str, complex]) -> None:
    found = dict(zip(operator.paulis.to_labels(), operator.coeffs, strict=True))
    assert len(found) == len(operator)
    for label in found.keys() | expected.keys():
        assert abs(found.get(label, 0) - expected.get(label, 0)) < 1e-10, label


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_mapping_of_random_integrals_is_openfermions(n: int, seed: int) -> None:
    integrals = random_integrals(n, seed)
    operator = jordan_wigner(*integrals)
    assert not np.any(operator.coeffs.imag)
    assert_same_terms(operator, by_openfermion(*integrals))


def molecular_integrals(geometry: str) -> tuple[float, np.ndarray, np.ndarray]:
    import pyscf
    import pyscf.ao2mo

    mol = pyscf.gto.M(atom=geometry, basis="sto-3g", verbose=0)
    field = pyscf.scf.RHF(mol).run(conv_tol=1e-12)
    orbitals = field.mo_coeff
    n = orbitals.shape[1]
    h = orbitals.T @ field.get_hcore() @ orbitals
    return mol.energy_nuc(), h, pyscf.ao2mo.restore(1, pyscf.ao2mo.kernel(mol, orbitals), n)


def test_mapping_of_a_molecule_is_openfermions() -> None:
    integrals = molecular_integrals("H 0 0 0; H 0 0 1; H 0 0 2; H 0 0 3")
    operator = jordan_wigner(*integrals)
    assert len(operator) == 185
    assert_same_terms(operator, by_openfermion(*integrals))


def test_lithium_hydride_has_631_terms_in_canonical_order_and_takes_no_time() -> None:
    integrals = molecular_integrals("Li 0 0 0; H 0 0 1.6")
    began = time.process_time()
    operator = jordan_wigner(*integrals)
    assert time.process_time() - began < 0.5
    assert len(operator) == 631
    keys = [(tuple(p.x[::-1]), tuple(p.z[::-1])) for p in operator.paulis]
    assert keys == sorted(keys)
    assert operator.paulis[0].to_label() == "I" * 12


def test_terms_that_vanish_are_dropped_but_the_constant_stays() -> None:
    operator = jordan_wigner(0.0, np.diag([2.0, 1e-13]), np.zeros((2, 2, 2, 2)))
    assert operator.paulis.to_labels() == ["IIII", "IIIZ", "IZII"]
    assert jordan_wigner(0.0, np.zeros((1, 1)), np.zeros((1, 1, 1, 1))).paulis.to_labels() == ["II"]


@pytest.mark.parametrize(
    ("constant", "h", "g", "message"),
    [
        (0.0, np.zeros((2, 3)), np.zeros((2, 2, 2, 2)), "shapes"),
        (0.0, np.zeros((2, 2)), np.zeros((3, 3, 3, 3)), "shapes"),
        (0.0, 1.0, 1.0, "shapes"),
        (0.0, np.zeros((0, 0)), np.zeros((0, 0, 0, 0)), "shapes"),
        (0.0, [[0.0, 1.0], [0.0, 0.0]], np.zeros((2, 2, 2, 2)), "symmetry"),
        (0.0, np.zeros((2, 2)), random_integrals(2, 1)[2].transpose(0, 2, 1, 3), "physicists"),
        (0.0, np.full((1, 1), np.nan), np.zeros((1, 1, 1, 1)), "not finite"),
        (np.inf, np.zeros((1, 1)), np.zeros((1, 1, 1, 1)), "finite"),
        (0.0, np.zeros((1, 1), complex), np.zeros((1, 1, 1, 1)), "complex"),
        (0.0, np.zeros((17, 17)), np.zeros((17, 17, 17, 17)), "at most 16"),
    ],
)
def test_wrong_integrals_are_refused(constant: float, h: object, g: object, message: str) -> None:
    with pytest.raises(WorkflowError, match=message):
        jordan_wigner(constant, h, g)


def anti_hermitian(excitation: Excitation, qubits: int) -> np.ndarray:
    """T - T+ as a dense matrix, qubit 0 least significant, by OpenFermion."""
    ladder = tuple((p, 1) for p in excitation.virtual) + tuple((p, 0) for p in reversed(excitation.occupied))
    t = openfermion.FermionOperator(ladder)
    sparse = openfermion.get_sparse_operator(t - openfermion.hermitian_conjugated(t), qubits)
    tensor = sparse.toarray().reshape((2,) * (2 * qubits))
    backwards = [*reversed(range(qubits)), *reversed(range(qubits, 2 * qubits))]
    return tensor.transpose(backwards).reshape(2**qubits, 2**qubits)


@st.composite
def any_excitation(draw: st.DrawFn) -> tuple[Excitation, int]:
    qubits = draw(st.integers(2, 6))
    rank = draw(st.integers(1, min(2, qubits // 2)))
    chosen = draw(st.permutations(range(qubits)))[: 2 * rank]
    return Excitation(tuple(chosen[:rank]), tuple(chosen[rank:])), qubits


@settings(max_examples=60, deadline=None)
@given(any_excitation(), st.floats(-4, 4))
def test_each_excitation_is_exponentiated_exactly(case: tuple[Excitation, int], theta: float) -> None:
    excitation, qubits = case
    expected = scipy.linalg.expm(theta * anti_hermitian(excitation, qubits))
    circuit = QuantumCircuit(qubits)
    rotate(circuit, theta, excitation)
    assert np.abs(Operator(circuit).data - expected).max() < 1e-12
    pauli = generator(excitation, qubits)
    assert not np.any(pauli.coeffs.imag)
    assert len(pauli) == {1: 2, 2: 8}[len(excitation.occupied)]
    assert np.abs(-1j * pauli.to_matrix() - anti_hermitian(excitation, qubits)).max() < 1e-12


def test_excitation_costs_what_it_says() -> None:
    single, double = QuantumCircuit(8), QuantumCircuit(8)
    rotate(single, 0.1, Excitation((0,), (3,)))
    rotate(double, 0.1, Excitation((0, 4), (2, 6)))
    assert dict(single.count_ops()) == {"cx": 4 + 2 * 2, "rz": 2, "sx": 1, "sxdg": 1}
    assert dict(double.count_ops()) == {"cx": 14 + 2 * 2, "rz": 8, "sx": 1, "sxdg": 1}


@pytest.mark.parametrize(("n", "alpha", "beta"), [(2, 1, 1), (4, 2, 2), (3, 2, 1), (3, 3, 0), (4, 2, 0), (1, 1, 0)])
def test_excitations_are_all_that_conserve_spin(n: int, alpha: int, beta: int) -> None:
    filled = {*range(alpha), *range(n, n + beta)}
    empty = set(range(2 * n)) - filled
    expected = {
        (source, target)
        for rank in (1, 2)
        for source in combinations(sorted(filled), rank)
        for target in combinations(sorted(empty), rank)
        if sorted(p // n for p in source) == sorted(p // n for p in target)
    }
    found = excitations(n, alpha, beta)
    assert len(found) == len(expected)
    assert {(e.occupied, e.virtual) for e in found} == expected
    ranks = [len(e.occupied) for e in found]
    assert ranks == sorted(ranks, reverse=True)


def test_lithium_hydride_has_92_excitations() -> None:
    assert len(excitations(6, 2, 2)) == 92


def test_symmetry_keeps_all_where_there_is_none() -> None:
    _, h, g = random_integrals(4, 7)
    candidates = excitations(4, 2, 2)
    assert symmetry_allowed(candidates, h, g) == candidates


def test_symmetry_leaves_hydrogen_one_double() -> None:
    _, h, g = molecular_integrals("H 0 0 0; H 0 0 0.74")
    assert symmetry_allowed(excitations(2, 1, 1), h, g) == [Excitation((0, 2), (1, 3))]


def test_forbidden_excitations_have_no_part_in_the_ground_state() -> None:
    integrals = molecular_integrals("H 0 0 0; H 0 0 1; H 0 0 2; H 0 0 3")
    candidates = excitations(4, 2, 2)
    allowed = symmetry_allowed(candidates, *integrals[1:])
    forbidden = [excitation for excitation in candidates if excitation not in allowed]
    assert 0 < len(allowed) < len(candidates)
    ground = np.linalg.eigh(jordan_wigner(*integrals).to_matrix())[1][:, 0]
    determinant = sum(1 << q for q in (0, 1, 4, 5))
    assert abs(ground[determinant]) > 0.9
    for excitation in forbidden:
        reached = determinant ^ sum(1 << q for q in excitation.occupied + excitation.virtual)
        assert abs(ground[reached]) < 1e-9
    allowed_doubles = [
        abs(ground[determinant ^ sum(1 << q for q in excitation.occupied + excitation.virtual)])
        for excitation in allowed
        if len(excitation.occupied) == 2
    ]
    assert min(allowed_doubles) > 1e-6


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_ansatz_conserves_the_electrons_of_each_spin(seed: int) -> None:
    n, alpha, beta = 3, 2, 1
    circuit = ucc(2 * n, [0, 1, n], excitations(n, alpha, beta))
    angles = np.random.default_rng(seed).uniform(-np.pi, np.pi, circuit.num_parameters)
    weights = np.abs(Statevector(circuit.assign_parameters(angles)).data) ** 2
    present = np.flatnonzero(weights > 1e-12)
    assert len(present) > 1
    for state in present.tolist():
        assert (state % 8).bit_count() == alpha
        assert (state // 8).bit_count() == beta


def test_ansatz_is_the_product_of_its_factors_first_one_first() -> None:
    factors = excitations(2, 1, 1)
    circuit = ucc(4, [0, 2], factors)
    angles = [0.3, -0.7, 0.5]
    assert [str(p) for p in circuit.parameters] == ["theta[0]", "theta[1]", "theta[2]"]
    state = np.zeros(16)
    state[0b0101] = 1
    for angle, excitation in zip(angles, factors, strict=True):
        state = scipy.linalg.expm(angle * anti_hermitian(excitation, 4)) @ state
    assert np.abs(Statevector(circuit.assign_parameters(angles)).data - state).max() < 1e-12
