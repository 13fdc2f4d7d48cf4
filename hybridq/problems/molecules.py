"""Molecules: integrals and reference energies from PySCF, unitary coupled cluster as the ansatz."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hybridq.errors import WorkflowError
from hybridq.problems.fermions import Excitation, excitations, jordan_wigner, symmetry_allowed, ucc
from hybridq.problems.problem import Problem

__all__ = ["molecule"]

_MOST_QUBITS = 30
_CLOSEST = 0.1  # angstrom
_CYCLES = 200
_MOST_DETERMINANTS = 1_000_000
_MOST_DENSE = 1000  # determinants
_ROOTS = 5
_SPIN_PENALTY = 1.0  # hartree for each unit of S^2 too much: far above the distance of spin states


def molecule(
    geometry: str,
    *,
    basis: str = "sto-3g",
    charge: int = 0,
    spin: int = 0,
    active: tuple[int, int] | None = None,
    ansatz: Literal["uccsd"] = "uccsd",
    reference: bool = True,
) -> Problem:
    """Build the ground-state problem of a molecule: Hamiltonian (Jordan-Wigner), UCCSD circuit, start and FCI energy.

    The orbitals are those of RHF (ROHF if `spin` is not 0). Equal arguments give equal bits on one machine: PySCF runs
    on one thread, degenerate orbitals are turned along the coordinate axes and every orbital has a fixed sign.

    The ansatz is the product, in a fixed order, of exp(theta (T - T+)), one parameter for each spin-preserving double,
    then single excitation T that the symmetry of the integrals allows; for each spin alone, the number of electrons is
    conserved. `start` has (1/2) arctan(2 t) for doubles, with t their MP2 amplitudes (the angle that solves a pair of
    levels exactly), and 0 for singles.

    The reference is the lowest FCI energy of total spin S = spin / 2 in the same orbitals, by dense diagonalisation up
    to 1000 determinants and by Davidson iteration with several roots up to a million; beyond, it is None.

    Args:
        geometry: atoms as PySCF takes them, "H 0 0 0; H 0 0 0.74" or a Z-matrix of numbers; angstrom and degrees.
        basis: name of a basis set that PySCF knows.
        charge: total charge, in elementary charges.
        spin: 2S, the number of up minus the number of down electrons.
        active: (electrons, orbitals) of an active space around the Fermi level; the orbitals below it stay filled and
            enter as a constant and a mean field. All by default.
        ansatz: "uccsd".
        reference: False skips the reference.

    Returns:
        A problem in hartree on 2n qubits for n spatial orbitals: spin up on qubits 0 ... n - 1, spin down on
        n ... 2n - 1, in the order of the orbital energies. Its properties are basis, charge, spin, electrons and
        orbitals (the active ones), frozen_orbitals, determinants, hartree_fock and nuclear_repulsion (hartree).

    Raises:
        WorkflowError: an argument makes no sense, the SCF or the FCI does not converge, or PySCF is not installed.
    """
    if ansatz != "uccsd":
        raise WorkflowError(f"ansatz is {ansatz!r}; only 'uccsd' is known")
    if not _whole(charge):
        raise WorkflowError(f"charge is {charge!r}; it must be a whole number")
    if not _whole(spin) or spin < 0:
        raise WorkflowError(
            f"spin is {spin!r}; it must be the number of up minus the number of down electrons, 0 or more"
        )
    if not isinstance(basis, str):
        raise WorkflowError(f"basis is a {type(basis).__name__}; it must be a name like 'sto-3g'")
    if active is not None and not (isinstance(active, (tuple, list)) and len(active) == 2 and all(map(_whole, active))):
        raise WorkflowError(f"active is {active!r}; it must be two whole numbers, (electrons, orbitals)")
    atoms = _atoms(geometry)
    try:
        import pyscf
        import pyscf.mcscf
    except ImportError as error:
        raise WorkflowError('molecules need PySCF: pip install "hybridq-scheduler[chem]"') from error

    with pyscf.lib.with_omp_threads(1):
        mol = _build(atoms, basis, charge, spin)
        frozen, electrons, orbitals = _space(mol, active, int(mol.nao))
        name = f"{_formula(atoms)} {basis}" + (f" ({electrons}e,{orbitals}o)" if active else "")
        mean_field = pyscf.scf.ROHF(mol) if spin else pyscf.scf.RHF(mol)
        # Heavy atoms have rounding errors of 1e-11 in the energy; it is the gradient that makes the orbitals precise.
        mean_field.conv_tol, mean_field.conv_tol_grad, mean_field.max_cycle = 1e-10, 1e-6, _CYCLES
        # PySCF would keep a copy on disk.
        mean_field.chkfile = mean_field._chkfile = None
        mean_field.kernel()
        if not mean_field.converged:
            raise WorkflowError(
                f"{'ROHF' if spin else 'RHF'} for {name} did not converge in {_CYCLES} cycles; "
                "try another geometry, spin or basis"
            )
        # PySCF drops orbitals that others nearly repeat.
        frozen, electrons, orbitals = _space(mol, active, mean_field.mo_coeff.shape[1])
        mean_field.mo_coeff = _fixed_orbitals(mol, mean_field)
        alpha, beta = (electrons + spin) // 2, (electrons - spin) // 2
        window = pyscf.mcscf.CASCI(mean_field, orbitals, (alpha, beta), ncore=frozen)
        one_body, constant = window.get_h1eff()
        two_body = pyscf.ao2mo.restore(1, window.get_h2eff(), orbitals)
        determinants = math.comb(orbitals, alpha) * math.comb(orbitals, beta)
        energy = None
        if not reference:
            source = "none: not asked for"
        elif determinants > _MOST_DETERMINANTS:
            source = f"none: {determinants} determinants are more than the {_MOST_DETERMINANTS} that are diagonalised"
        else:
            energy = constant + _lowest(one_body, two_body, alpha, beta, name)
            source = f"CASCI({electrons}e,{orbitals}o)" if active else "FCI"
            source += f", PySCF {pyscf.__version__}"

    factors = symmetry_allowed(excitations(orbitals, alpha, beta), one_body, two_body)
    levels = np.asarray(mean_field.mo_energy)[frozen : frozen + orbitals]
    filled = [*range(alpha), *range(orbitals, orbitals + beta)]
    return Problem(
        name=name,
        hamiltonian=jordan_wigner(constant, one_body, two_body),
        ansatz=ucc(2 * orbitals, filled, factors),
        start=_start(factors, levels, two_body),
        reference=energy,
        source=source,
        unit="hartree",
        properties={
            "basis": basis,
            "charge": int(charge),
            "spin": int(spin),
            "electrons": electrons,
            "orbitals": orbitals,
            "frozen_orbitals": frozen,
            "determinants": determinants,
            "hartree_fock": float(mean_field.e_tot),
            "nuclear_repulsion": float(mol.energy_nuc()),
        },
    )


def _whole(value: object) -> bool:
    """Whether a value is a whole number, and not a truth value."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _atoms(geometry: str) -> list[list[str]]:
    """Split a geometry into its lines' words, all but the first of which are finite numbers.

    PySCF would evaluate other words as Python, and open a file if the whole is the name of one.
    """
    if not isinstance(geometry, str):
        raise WorkflowError(f"geometry is a {type(geometry).__name__}; it must be text like 'H 0 0 0; H 0 0 0.74'")
    lines = [line.split() for line in re.split("[;\n]", geometry.replace(",", " "))]
    atoms = [line for line in lines if line and not line[0].startswith("#")]
    if not atoms:
        raise WorkflowError("the geometry holds no atoms; it must be like 'H 0 0 0; H 0 0 0.74'")
    for label, *words in atoms:
        for word in words:
            try:
                finite = math.isfinite(float(word))
            except ValueError as error:
                raise WorkflowError(f"geometry: {word!r} of atom {label!r} is not a number") from error
            if not finite:
                raise WorkflowError(f"geometry: {word!r} of atom {label!r} is not a finite number")
    return atoms


def _formula(atoms: list[list[str]]) -> str:
    """Elements in order of appearance, with their counts."""
    symbols = [re.split("[^A-Za-z]", label)[0].capitalize() for label, *_ in atoms]
    counts = {symbol: symbols.count(symbol) for symbol in symbols}
    return "".join(symbol + (str(count) if count > 1 else "") for symbol, count in counts.items())


def _build(atoms: list[list[str]], basis: str, charge: int, spin: int) -> Any:
    """Make PySCF's molecule, refusing what it cannot be made of."""
    import pyscf.data.elements
    from pyscf.lib.exceptions import BasisNotFoundError

    protons = 0
    for label, *_ in atoms:
        try:
            protons += pyscf.data.elements.charge(label)
        except Exception as error:  # PySCF's own choice of exception varies
            raise WorkflowError(f"geometry: {label!r} is not a chemical element; write its symbol, 'Li'") from error
    electrons = protons - charge
    if electrons < 1:
        raise WorkflowError(f"charge {charge} leaves {electrons} of {protons} electrons; at least 1 is needed")
    if spin > electrons or (electrons - spin) % 2:
        raise WorkflowError(
            f"{electrons} electrons cannot have spin (up minus down) {spin}; "
            f"it must be {'odd' if electrons % 2 else 'even'} and at most {electrons}: change spin or charge"
        )
    # The line break at the end keeps PySCF from taking one word for a file.
    text = "\n".join(" ".join(atom) for atom in atoms) + "\n"
    try:
        mol = pyscf.gto.M(
            atom=text, basis=basis, charge=int(charge), spin=int(spin), unit="angstrom", verbose=0, parse_arg=False
        )
    except BasisNotFoundError as error:
        raise WorkflowError(f"PySCF has no basis {basis!r} for all of {_formula(atoms)}; check its name") from error
    except Exception as error:  # PySCF's own choice of exception varies
        raise WorkflowError(f"PySCF cannot build {_formula(atoms)} in {basis!r} from this geometry: {error}") from error
    places = mol.atom_coords(unit="angstrom")
    for i, place in enumerate(places):
        distances = np.linalg.norm(places[:i] - place, axis=1)
        if distances.size and distances.min() < _CLOSEST - 1e-9:
            raise WorkflowError(
                f"atoms {int(distances.argmin())} and {i} are {distances.min():.3g} angstrom apart; "
                f"at least {_CLOSEST} is needed: check the geometry and its unit (angstrom)"
            )
    return mol


def _space(mol: Any, active: tuple[int, int] | None, available: int) -> tuple[int, int, int]:
    """Count the frozen orbitals, the active electrons and the active orbitals, refusing what does not fit."""
    total = int(mol.nelectron)
    electrons, orbitals = (total, available) if active is None else (int(active[0]), int(active[1]))
    frozen, odd = divmod(total - electrons, 2)
    up = (electrons + mol.spin) // 2
    wrong = ""
    if not 1 <= electrons <= total or electrons < mol.spin:
        wrong = f"there are {total} electrons, {mol.spin} of them unpaired"
    elif odd:
        wrong = f"{total - electrons} electrons cannot fill frozen orbitals in pairs"
    elif up > orbitals:
        wrong = f"{up} electrons of one spin do not fit in {orbitals} orbitals"
    elif frozen + orbitals > available:
        wrong = f"with {frozen} frozen orbitals it needs {frozen + orbitals}; there are {available}"
    if wrong:
        raise WorkflowError(f"an active space of {electrons} electrons in {orbitals} orbitals is impossible: {wrong}")
    if 2 * orbitals > _MOST_QUBITS:
        raise WorkflowError(
            f"{orbitals} orbitals need {2 * orbitals} qubits; at most {_MOST_QUBITS} are supported: "
            "choose active=(electrons, orbitals) or a smaller basis"
        )
    return frozen, electrons, orbitals


def _fixed_orbitals(mol: Any, mean_field: Any) -> NDArray[np.float64]:
    """Choose, among equally good orbitals, those that a rule singles out, so that chance has no say in them.

    Degenerate orbitals of equal occupation are turned to diagonalise x^2 + 2 y^2 + 3 z^2, which keeps the reflections
    of a molecule that lies along the axes; then the first of each orbital's largest coefficients is made positive.
    """
    orbitals: NDArray[np.float64] = np.array(mean_field.mo_coeff)
    levels, filling = np.asarray(mean_field.mo_energy), np.asarray(mean_field.mo_occ)
    xx, yy, zz = mol.intor("int1e_rr").reshape(9, mol.nao, mol.nao)[[0, 4, 8]]
    moments = xx + 2 * yy + 3 * zz
    same = (np.diff(levels) < 1e-6) & (np.diff(filling) == 0)
    for shell in np.split(np.arange(len(levels)), np.flatnonzero(~same) + 1):
        if len(shell) > 1:
            part = orbitals[:, shell]
            orbitals[:, shell] = part @ np.linalg.eigh(part.T @ moments @ part)[1]
    size = np.abs(orbitals)
    first = np.argmax(size > (1 - 1e-6) * size.max(axis=0), axis=0)
    orbitals *= np.sign(orbitals[first, np.arange(orbitals.shape[1])])
    return orbitals


def _lowest(one_body: NDArray[np.float64], two_body: NDArray[np.float64], alpha: int, beta: int, name: str) -> float:
    """Return the lowest energy of total spin S = (alpha - beta) / 2, in hartree and without the constant term."""
    from pyscf import fci

    n = len(one_body)
    shape = math.comb(n, alpha), math.comb(n, beta)
    electrons = (alpha, beta)
    spin = (alpha - beta) / 2
    # H + penalty (S^2 - S (S + 1)): there is no smaller S here, and states of a larger one are lifted out of the way.
    solver = fci.addons.fix_spin_(fci.direct_spin1.FCI(), shift=_SPIN_PENALTY, ss=spin * (spin + 1))
    if math.prod(shape) <= _MOST_DENSE:
        operator = solver.absorb_h1e(one_body, two_body, n, electrons, 0.5)
        units = np.eye(math.prod(shape)).reshape(-1, *shape)
        matrix = np.array([solver.contract_2e(operator, unit, n, electrons).ravel() for unit in units])
        energies, columns = np.linalg.eigh(matrix)
        states, converged = columns.T.reshape(-1, *shape), np.ones(len(energies))
    else:
        # A single root may start, and stay, in the wrong symmetry.
        solver.conv_tol, solver.max_cycle, solver.nroots = 1e-12, _CYCLES, _ROOTS
        energies, states = solver.kernel(one_body, two_body, n, electrons)
        converged = np.asarray(solver.converged)
    best = int(np.argmin(energies))
    square = float(fci.spin_op.spin_square(states[best], n, electrons)[0])
    if not converged[best] or abs(square - spin * (spin + 1)) > 1e-4:
        raise WorkflowError(
            f"FCI for {name} found no converged state of spin {spin:g} (<S^2> of its lowest is {square:.4f}); "
            "pass reference=False to go without"
        )
    return float(energies[best])


def _start(
    factors: list[Excitation], levels: NDArray[np.float64], two_body: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Angles (1/2) arctan(2 t) of doubles, t = <ab||ij> / (e_i + e_j - e_a - e_b) (Szabo, Ostlund, 1989, 6.5)."""
    n = len(levels)
    start = np.zeros(len(factors))
    for k, (occupied, virtual) in enumerate(factors):
        if len(occupied) == 2:
            (i, j), (a, b) = (np.array(pair) % n for pair in (occupied, virtual))
            coupling = two_body[a, i, b, j] - (two_body[a, j, b, i] if occupied[1] // n == occupied[0] // n else 0.0)
            gap = levels[a] + levels[b] - levels[i] - levels[j]
            start[k] = -np.arctan2(2 * coupling, gap) / 2
    return start
