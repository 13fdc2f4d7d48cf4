"""Spin models against tabulated energies, dense matrices and their own ansatz."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from qiskit.quantum_info import Statevector

from hybridq.errors import WorkflowError
from hybridq.problems import Problem, lattice

ISING = {  # exact diagonalisation, J = 1: (sites, boundary, field)
    (4, "chain", 0.5): -3.4270340889080795,
    (4, "chain", 1.0): -4.758770483143628,
    (4, "chain", 2.0): -8.376798636850362,
    (4, "ring", 0.5): -4.271558410139715,
    (4, "ring", 1.0): -5.226251859505504,
    (4, "ring", 2.0): -8.543116820279424,
    (6, "chain", 1.0): -7.296229810558749,
    (6, "ring", 1.0): -7.727406610312549,
    (8, "chain", 0.5): -7.640592553590074,
    (8, "ring", 0.5): -8.509082235140275,
    (12, "chain", 1.0): -14.92597110990865,
    (12, "ring", 1.0): -15.322595151080765,
    (16, "chain", 1.0): -20.016387900485157,
    (16, "ring", 1.0): -20.404594474756685,
}
HEISENBERG = {  # exact diagonalisation, J = 1: (sites, boundary)
    (4, "chain"): -1.6160254037844384,
    (4, "ring"): -2.0,
    (6, "chain"): -2.493577133887925,
    (6, "ring"): -2.802775637731999,
    (12, "chain"): -5.142090632840538,
    (12, "ring"): -5.387390917445211,
    (16, "chain"): -6.911737145575115,
    (16, "ring"): -7.142296360616783,
}


def energy(problem: Problem, angles: np.ndarray) -> float:
    state = Statevector(problem.ansatz.assign_parameters(angles)).data
    return float(np.vdot(state, problem.hamiltonian.to_matrix(sparse=True) @ state).real)


@pytest.mark.parametrize(("case", "expected"), ISING.items(), ids=str)
def test_ising_references(case: tuple[int, str, float], expected: float) -> None:
    sites, boundary, field = case
    problem = lattice("ising", sites, boundary=boundary, field=field)
    assert problem.reference == pytest.approx(expected, abs=1e-10)
    assert {"ring": "Pfeuty", "chain": "Lieb"}[boundary] in problem.source


@pytest.mark.parametrize(("case", "expected"), HEISENBERG.items(), ids=str)
def test_heisenberg_references(case: tuple[int, str], expected: float) -> None:
    sites, boundary = case
    problem = lattice("heisenberg", sites, boundary=boundary)
    assert problem.reference == pytest.approx(expected, abs=1e-10)
    assert problem.unit == "J"


@pytest.mark.parametrize("boundary", ["chain", "ring"])
@pytest.mark.parametrize(("kind", "sites"), [("ising", 3), ("ising", 5), ("ising", 6), ("heisenberg", 6)])
def test_reference_is_the_lowest_eigenvalue_of_the_hamiltonian(kind: str, sites: int, boundary: str) -> None:
    problem = lattice(kind, sites, boundary=boundary, coupling=0.7, field=0.4 if kind == "ising" else None)
    assert problem.reference == pytest.approx(np.linalg.eigvalsh(problem.hamiltonian.to_matrix())[0], abs=1e-12)


def test_terms_of_the_hamiltonians() -> None:
    ising = lattice("ising", 3, coupling=2.0, field=0.5)
    assert ising.hamiltonian.to_list() == [("IZZ", -2), ("ZZI", -2), ("IIX", -0.5), ("IXI", -0.5), ("XII", -0.5)]
    pair = lattice("heisenberg", 2, coupling=4.0)
    assert pair.hamiltonian.to_list() == [("XX", 1), ("YY", 1), ("ZZ", 1)]
    assert lattice("ising", 3, boundary="ring").hamiltonian.paulis.to_labels()[2] == "ZIZ"


def test_more_than_sixteen_heisenberg_sites_have_no_reference() -> None:
    problem = lattice("heisenberg", 18, boundary="ring", layers=1)
    assert problem.reference is None
    assert "none" in problem.source
    assert lattice("ising", 100, boundary="ring", layers=1).reference == pytest.approx(-2 / np.sin(np.pi / 200))


@pytest.mark.parametrize("sites", [4, 6, pytest.param(8, marks=pytest.mark.slow)])
def test_critical_ring_is_solved_exactly_from_the_start(sites: int) -> None:
    problem = lattice("ising", sites, boundary="ring")
    assert len(problem.start) == sites
    result = scipy.optimize.minimize(
        lambda x: energy(problem, x), problem.start, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-7}
    )
    assert abs(result.fun - problem.reference) < 1e-8


def test_one_layer_on_four_sites_reaches_the_published_value() -> None:
    problem = lattice("ising", 4, boundary="ring", layers=1)
    result = scipy.optimize.minimize(lambda x: energy(problem, x), problem.start, method="L-BFGS-B")
    assert result.fun == pytest.approx(-4.82842712, abs=1e-7)


@pytest.mark.parametrize("boundary", ["chain", "ring"])
def test_heisenberg_ansatz_solves_four_sites(boundary: str) -> None:
    problem = lattice("heisenberg", 4, boundary=boundary)
    result = scipy.optimize.minimize(
        lambda x: energy(problem, x), problem.start, method="L-BFGS-B", options={"ftol": 1e-15}
    )
    assert abs(result.fun - problem.reference) < 1e-8


def test_ansatz_without_angles_is_the_starting_product_state() -> None:
    ising = lattice("ising", 4, field=0.3)
    assert energy(ising, np.zeros(4)) == pytest.approx(-4 * 0.3)
    singlets = lattice("heisenberg", 6)
    assert energy(singlets, np.zeros(6)) == pytest.approx(-3 * 0.75)


def test_two_heisenberg_sites_have_one_bond_and_one_parameter_a_layer() -> None:
    problem = lattice("heisenberg", 2, layers=3)
    assert len(problem.start) == 3
    assert energy(problem, problem.start) == pytest.approx(-0.75)


def test_start_ramps_the_full_hamiltonian_up() -> None:
    ising = lattice("ising", 4, coupling=2.0, field=1.0)
    assert ising.start == pytest.approx([-1 / 3, -1 / 3, -2 / 3, -1 / 6])
    assert lattice("heisenberg", 4).start == pytest.approx([1 / 6, 1 / 2, 1 / 3, 1 / 2])


def test_start_is_not_a_stationary_point() -> None:
    for problem in (lattice("ising", 6), lattice("heisenberg", 6)):
        steps = [energy(problem, problem.start + 1e-4 * row) for row in np.eye(len(problem.start))]
        assert max(abs(step - energy(problem, problem.start)) for step in steps) > 1e-6


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("potts", 4), {}, "kind"),
        (("ising", 4), {"boundary": "torus"}, "boundary"),
        (("ising", 1), {}, "at least 2"),
        (("ising", 2), {"boundary": "ring"}, "at least 3"),
        (("ising", 4.0), {}, "whole number"),
        (("ising", True), {}, "whole number"),
        (("ising", (2, 2)), {}, "whole number"),
        (("ising", 4), {"layers": 0}, "layers"),
        (("ising", 4), {"coupling": -1.0}, "coupling"),
        (("ising", 4), {"coupling": float("nan")}, "coupling"),
        (("ising", 4), {"field": 0.0}, "field"),
        (("ising", 4), {"field": float("inf")}, "field"),
        (("ising", 4), {"field": "1"}, "field"),
        (("heisenberg", 4), {"field": 1.0}, "field"),
        (("heisenberg", 5), {}, "even"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[object, ...], keywords: dict[str, object], message: str) -> None:
    with pytest.raises(WorkflowError, match=message):
        lattice(*arguments, **keywords)
