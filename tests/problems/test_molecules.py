"""Molecules against tabulated FCI energies, dense diagonalisation and variational minimisation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyscf
import pytest
import scipy.optimize
from qiskit.quantum_info import Statevector

from hybridq.errors import WorkflowError
from hybridq.problems import Problem, molecule

H2 = {  # bond length in angstrom: FCI energy in hartree, STO-3G
    0.5: -1.0551597944706235,
    0.7: -1.136189454065922,
    0.74: -1.1372838344885023,
    1.0: -1.1011503302326187,
    1.5: -0.9981493534714101,
    2.0: -0.9486411121761855,
    2.5: -0.9360549199556059,
    3.0: -0.9336318445584988,
}


def chain(bond: float, atoms: int = 4) -> str:
    return "; ".join(f"H 0 0 {bond * i}" for i in range(atoms))


def energy(problem: Problem, angles: np.ndarray) -> float:
    state = Statevector(problem.ansatz.assign_parameters(angles)).data
    return float(np.vdot(state, problem.hamiltonian.to_matrix(sparse=True) @ state).real)


def sector(problem: Problem) -> np.ndarray:
    """Eigenvalues of the Hamiltonian among states with the problem's electrons, up and down."""
    n = problem.properties["orbitals"]
    electrons, spin = problem.properties["electrons"], problem.properties["spin"]
    states = [
        s
        for s in range(4**n)
        if (s % 2**n).bit_count() == (electrons + spin) // 2 and (s >> n).bit_count() == (electrons - spin) // 2
    ]
    matrix = problem.hamiltonian.to_matrix(sparse=True).tocsr()
    return np.linalg.eigvalsh(matrix[states][:, states].toarray())


@pytest.mark.parametrize(("bond", "expected"), H2.items(), ids=str)
def test_hydrogen_has_one_parameter_and_reaches_fci_everywhere(bond: float, expected: float) -> None:
    problem = molecule(f"H 0 0 0; H 0 0 {bond}")
    assert problem.reference == pytest.approx(expected, abs=1e-10)
    assert problem.start.shape == (1,)
    assert energy(problem, problem.start) < problem.properties["hartree_fock"] - 1e-3
    result = scipy.optimize.minimize(
        lambda x: energy(problem, x), problem.start, method="L-BFGS-B", options={"ftol": 1e-15}
    )
    assert abs(result.fun - expected) < 1e-8


@pytest.mark.parametrize(
    ("geometry", "active", "expected", "fock"),
    [
        ("Li 0 0 0; H 0 0 1.6", (2, 5), -7.882096599920256, -7.861864769808654),
        ("Li 0 0 0; H 0 0 3.0", (2, 5), -7.79850422257336, -7.710829900217227),
        ("Li 0 0 0; H 0 0 1.6", None, -7.8823243788835, -7.861864769808654),
        (chain(0.74), None, -2.1388899128733505, -2.097899612083285),
        (chain(1.0), None, -2.1663874486347607, -2.098545936998005),
        (chain(2.0), None, -1.8977806459898732, -1.575616476701866),
        (chain(3.0), None, -1.8672913724013782, -1.3133117862215051),
        ("N 0 0 0; N 0 0 1.0977", (6, 6), -107.6218488598689, -107.4958933078343),
    ],
    ids=str,
)
def test_reference_energies(geometry: str, active: tuple[int, int] | None, expected: float, fock: float) -> None:
    problem = molecule(geometry, active=active)
    assert problem.reference == pytest.approx(expected, abs=1e-8)
    assert problem.properties["hartree_fock"] == pytest.approx(fock, abs=1e-9)
    assert (
        problem.source
        == f"{'FCI' if active is None else f'CASCI({active[0]}e,{active[1]}o)'}, PySCF {pyscf.__version__}"
    )
    assert problem.unit == "hartree"


@pytest.mark.parametrize(
    ("geometry", "keywords"),
    [
        ("H 0 0 0; H 0 0 0.74", {}),
        ("H 0 0 0; H 0 0 0.74", {"spin": 2}),
        ("Li 0 0 0; H 0 0 1.6", {"active": (2, 5)}),
        ("H 0 0 0; H 0 0 1; H 0 0 2", {"spin": 1}),
        ("H 0 0 0; H 0 0 1; H 0 0 2", {"charge": 1}),
        ("O 0 0 0; O 0 0 1.2", {"spin": 2, "active": (6, 4)}),
        ("H 0 0 0", {"spin": 1}),
        ("He 0 0 0", {}),
    ],
    ids=str,
)
def test_hamiltonian_holds_both_energies(geometry: str, keywords: dict[str, object]) -> None:
    """The determinant of the circuit has the SCF energy; the lowest eigenvalue of its sector is the reference."""
    problem = molecule(geometry, **keywords)
    assert energy(problem, np.zeros_like(problem.start)) == pytest.approx(problem.properties["hartree_fock"], abs=1e-10)
    assert problem.reference == pytest.approx(sector(problem)[0], abs=1e-10)


def test_square_hydrogen_reference_is_the_singlet_ground_state() -> None:
    square = "H 0 0 0; H 1.23 0 0; H 0 1.23 0; H 1.23 1.23 0"
    singlet, triplet = molecule(square), molecule(square, spin=2)
    lowest = sector(singlet)
    assert singlet.reference == pytest.approx(lowest[0], abs=1e-10)
    # The next state up has a member with one spin flipped, so it is the triplet; the one above is the trap.
    assert triplet.reference == pytest.approx(lowest[1], abs=1e-10)
    assert singlet.reference < triplet.reference - 1e-3


def test_singlet_is_found_below_which_a_triplet_lies() -> None:
    """The ground state of O2 is a triplet, with a member in the singlet's sector."""
    oxygen = "O 0 0 0; O 0 0 1.2"
    singlet, triplet = (molecule(oxygen, active=(8, 6), spin=spin) for spin in (0, 2))
    assert sector(singlet)[0] < singlet.reference - 1e-2
    assert triplet.reference < singlet.reference - 1e-2


def test_reference_beyond_dense_diagonalisation() -> None:
    """(8 choose 5)^2 = 3136 determinants go through the Davidson iteration."""
    problem = molecule("N 0 0 0; N 0 0 1.0977", active=(10, 8))
    assert problem.properties["determinants"] == 3136
    assert problem.reference == pytest.approx(-107.65253252514452, abs=1e-8)


def test_reference_can_be_left_out() -> None:
    problem = molecule("H 0 0 0; H 0 0 0.74", reference=False)
    assert problem.reference is None
    assert problem.source.startswith("none")


def test_too_many_determinants_leave_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["hybridq.problems.molecules"], "_MOST_DETERMINANTS", 3)
    problem = molecule("H 0 0 0; H 0 0 0.74")
    assert problem.reference is None
    assert "4 determinants" in problem.source


def test_ansatz_lowers_lithium_hydride_and_conserves_electrons() -> None:
    problem = molecule("Li 0 0 0; H 0 0 1.6", active=(2, 5))
    assert problem.reference < energy(problem, problem.start) < problem.properties["hartree_fock"] - 1e-3
    angles = np.random.default_rng(3).uniform(-3, 3, problem.start.shape)
    weights = np.abs(Statevector(problem.ansatz.assign_parameters(angles)).data) ** 2
    present = np.flatnonzero(weights > 1e-12).tolist()
    assert len(present) > 2
    assert all((s % 32).bit_count() == 1 == (s // 32).bit_count() for s in present)
    assert set(problem.ansatz.count_ops()) <= {"x", "cx", "rz", "sx", "sxdg"}


def test_two_electrons_are_solved_exactly_in_a_larger_basis() -> None:
    problem = molecule("H 0 0 0; H 0 0 0.9", basis="6-31g")
    result = scipy.optimize.minimize(
        lambda x: energy(problem, x), problem.start, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-7}
    )
    assert abs(result.fun - problem.reference) < 1e-8


def test_every_form_of_a_geometry_gives_the_same_molecule() -> None:
    forms = ["H 0 0 0; H 0 0 0.74", "H,0,0,0\n# bond\nH,0,0,0.74\n", "H; H 1 0.74", "h1 0 0 0; h2 0 0 .74"]
    problems = [molecule(form, reference=False) for form in forms]
    for problem in problems:
        assert problem.name == "H2 sto-3g"
        assert np.allclose(problem.hamiltonian.coeffs, problems[0].hamiltonian.coeffs, atol=1e-12)


def test_orientation_and_order_of_the_atoms_do_not_change_the_spectrum() -> None:
    along, askew = "Li 0 0 0; H 0 0 1.6", "H 0.96 0 1.28; Li 0 0 0"
    first, second = (sector(molecule(geometry, active=(2, 4), reference=False)) for geometry in (along, along))
    assert np.array_equal(first, second)
    whole = [molecule(geometry, active=(2, 5)) for geometry in (along, askew)]
    assert np.allclose(sector(whole[0]), sector(whole[1]), atol=1e-9)


def test_properties() -> None:
    problem = molecule("Li 0 0 0; H 0 0 1.6", active=(2, 5), reference=False)
    properties = dict(problem.properties)
    assert properties.pop("hartree_fock") == pytest.approx(-7.861864769808654)
    assert properties.pop("nuclear_repulsion") == pytest.approx(0.992207270475)
    assert properties == {
        "basis": "sto-3g",
        "charge": 0,
        "spin": 0,
        "electrons": 2,
        "orbitals": 5,
        "frozen_orbitals": 1,
        "determinants": 25,
    }
    assert problem.name == "LiH sto-3g (2e,5o)"


def test_nearly_repeated_orbitals_are_counted_out() -> None:
    problem = molecule(chain(0.1), basis="6-31g", reference=False)
    assert problem.properties["orbitals"] == 7
    assert energy(problem, np.zeros_like(problem.start)) == pytest.approx(problem.properties["hartree_fock"], abs=1e-8)


DIGEST = """
import hashlib
from hybridq.problems import molecule
for geometry, active in (("Li 0 0 0; H 0 0 1.6", (2, 5)), ("H 0 0 0; H 0 1 0; H 1 0 0; H 1 1 0", None)):
    p = molecule(geometry, active=active)
    text = repr((p.hamiltonian.paulis.to_labels(), p.reference, p.properties))
    print(hashlib.sha256(p.hamiltonian.coeffs.tobytes() + p.start.tobytes() + text.encode()).hexdigest())
"""


def test_fresh_processes_give_the_same_bits() -> None:
    children = [subprocess.Popen([sys.executable, "-c", DIGEST], stdout=subprocess.PIPE) for _ in range(2)]
    first, second = (child.communicate()[0] for child in children)
    assert first == second
    assert len(set(first.split())) == 2


@pytest.mark.parametrize(
    ("geometry", "active", "shells"), [("N 0 0 0; N 0 0 1.1", (6, 6), 2), ("Li 0 0 0; H 0 0 1.6", (2, 5), 1)], ids=str
)
def test_sign_and_degenerate_orbitals_follow_the_rule(
    geometry: str, active: tuple[int, int], shells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbitals that come out with other signs and turned within their shells give the same Hamiltonian."""
    plain = molecule(geometry, active=active, reference=False)
    kernel = pyscf.scf.hf.RHF.kernel

    def turned(self: object, *args: object, **keywords: object) -> object:
        value = kernel(self, *args, **keywords)
        pairs = np.flatnonzero(np.diff(self.mo_energy) < 1e-6)
        assert len(pairs) == shells
        for place, first in enumerate(pairs):
            c, s = np.cos(0.4 + place), np.sin(0.4 + place)
            self.mo_coeff[:, [first, first + 1]] = self.mo_coeff[:, [first, first + 1]] @ np.array([[c, s], [-s, c]])
        self.mo_coeff[:, ::2] *= -1
        return value

    monkeypatch.setattr(pyscf.scf.hf.RHF, "kernel", turned)
    other = molecule(geometry, active=active, reference=False)
    assert plain.hamiltonian.paulis == other.hamiltonian.paulis
    assert np.allclose(plain.hamiltonian.coeffs, other.hamiltonian.coeffs, atol=1e-9)
    assert np.allclose(plain.start, other.start, atol=1e-8)


@pytest.mark.parametrize(
    ("geometry", "keywords", "message", "cause"),
    [
        ("H 0 0 0; H 0 0 0.74", {"basis": "sto-99g"}, "no basis 'sto-99g'", RuntimeError),
        ("U 0 0 0", {}, "no basis", RuntimeError),
        ("H 0 0 0; H 0 0 0.74", {"basis": 3}, "basis is a int", None),
        ("H 0 0; H 0 0 0.74", {}, "cannot build", Exception),
        ("H 0 0 0; H 0 0", {}, "cannot build", ValueError),
        ("H 0 0 0; H 0 0 0.7x", {}, "'0.7x' of atom 'H' is not a number", ValueError),
        ("H 0 0 0; H 0 0 print(1)", {}, "not a number", ValueError),
        ("H 0 0 0; H 0 0 nan", {}, "not a finite", None),
        ("H 0 0 0; H 0 0 inf", {}, "not a finite", None),
        ("", {}, "no atoms", None),
        (" ; # H 0 0 0", {}, "no atoms", None),
        (None, {}, "geometry is a NoneType", None),
        ("Q 0 0 0; H 0 0 1", {}, "'Q' is not a chemical element", Exception),
        (__file__, {}, "not a chemical element", Exception),
        ("H 0 0 0; H 0 0 0.05", {}, "atoms 0 and 1 are 0.05 angstrom apart", None),
        ("H 0 0 0; H 0 0 0", {}, "angstrom apart", None),
        ("H 0 0 0; H 0 0 0.74", {"spin": 1}, "must be even", None),
        ("H 0 0 0; H 0 0 0.74", {"charge": 1}, "must be odd", None),
        ("H 0 0 0; H 0 0 0.74", {"spin": 4}, "at most 2", None),
        ("H 0 0 0; H 0 0 0.74", {"spin": -2}, "spin is -2", None),
        ("H 0 0 0; H 0 0 0.74", {"spin": 0.0}, "spin is 0.0", None),
        ("H 0 0 0; H 0 0 0.74", {"charge": 2}, "leaves 0 of 2 electrons", None),
        ("H 0 0 0; H 0 0 0.74", {"charge": 0.5}, "charge is 0.5", None),
        ("H 0 0 0", {"charge": -2, "spin": 1}, "do not fit in 1 orbitals", None),
        ("Li 0 0 0; H 0 0 1.6", {"active": (6, 4)}, "there are 4 electrons", None),
        ("Li 0 0 0; H 0 0 1.6", {"active": (0, 4)}, "there are 4 electrons", None),
        ("Li 0 0 0; H 0 0 1.6", {"active": (3, 4)}, "in pairs", None),
        ("Li 0 0 0; H 0 0 1.6", {"active": (4, 1)}, "do not fit", None),
        ("Li 0 0 0; H 0 0 1.6", {"active": (2, 6)}, "needs 7; there are 6", None),
        ("Li 0 0 0; H 0 0 1.6", {"active": 2}, "two whole numbers", None),
        ("Li 0 0 0; H 0 0 1.6", {"active": (2.0, 5)}, "two whole numbers", None),
        ("N 0 0 0; N 0 0 1.1", {"basis": "cc-pvdz"}, "need 56 qubits; at most 30", None),
        ("H 0 0 0; H 0 0 0.74", {"ansatz": "hea"}, "only 'uccsd'", None),
    ],
    ids=lambda value: repr(value)[:40],
)
@pytest.mark.filterwarnings("ignore:Basis may be available")  # PySCF's hint at another package
def test_bad_arguments_are_refused(
    geometry: object, keywords: dict[str, object], message: str, cause: type[Exception] | None
) -> None:
    with pytest.raises(WorkflowError, match=message) as caught:
        molecule(geometry, **keywords)
    assert isinstance(caught.value.__cause__, cause or type(None))


@pytest.mark.parametrize(("spin", "method"), [(0, "RHF"), (2, "ROHF")])
def test_mean_field_that_does_not_converge_is_refused(spin: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["hybridq.problems.molecules"], "_CYCLES", 2)
    with pytest.raises(WorkflowError, match=f"^{method} for LiH sto-3g did not converge in 2 cycles"):
        molecule("Li 0 0 0; H 0 0 1.6", spin=spin)


def test_reference_that_does_not_converge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["hybridq.problems.molecules"], "_MOST_DENSE", 1)
    monkeypatch.setattr(pyscf.fci.direct_spin1.FCI, "eig", never_converged)
    with pytest.raises(WorkflowError, match="no converged state of spin 0"):
        molecule(chain(1.0))


def never_converged(self: object, operator: object, guess: object = None, *_: object, **__: object) -> object:
    if guess is None:
        return np.linalg.eigh(operator)
    vectors = guess() if callable(guess) else guess
    self.converged = [False] * len(vectors)
    return np.zeros(len(vectors)), vectors


def test_missing_pyscf_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyscf", None)
    with pytest.raises(WorkflowError, match=r"hybridq-scheduler\[chem\]") as caught:
        molecule("H 0 0 0; H 0 0 0.74")
    assert isinstance(caught.value.__cause__, ImportError)
