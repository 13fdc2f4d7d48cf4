"""The dissociation curve of H2: thirteen VQE loops side by side, beside FCI, and a Morse fit of the well.

hybridq run workflows/h2_dissociation.py
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import hybridq as hq

BONDS = [0.5, 0.6, 0.7, 0.74, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0]  # angstrom


@hq.classical(retries=1)
def problem(bond: float) -> hq.Problem:
    """H2 in STO-3G at ``bond`` angstrom: Hamiltonian, number-conserving ansatz and FCI reference (hartree)."""
    return hq.molecule(f"H 0 0 0; H 0 0 {bond}", basis="sto-3g")


@hq.quantum
def energy(theta: Any, p: hq.Problem) -> Any:
    return hq.expval(p.ansatz, p.hamiltonian, theta)


@hq.workflow
def point(bond: float) -> dict[str, float]:
    p = problem(bond)
    found = hq.minimize(energy, p.start, args=(p,), method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-7})
    return {"bond": bond, "energy": found.fun, "reference": p.reference, "evaluations": found.nfev}


@hq.classical
def fit_morse(bonds: list[float], energies: list[float]) -> dict[str, float]:
    """Fit D (1 - exp(-a (r - r0)))^2 + E0 (Morse 1929) to the well; the frequency is a sqrt(2 D / mu) / (2 pi c)."""
    from scipy.constants import angstrom, c, physical_constants
    from scipy.optimize import curve_fit

    hartree = physical_constants["Hartree energy"][0]
    proton = physical_constants["proton mass"][0]

    def morse(r: Any, depth: float, a: float, r0: float, e0: float) -> Any:
        return depth * (1 - np.exp(-a * (r - r0))) ** 2 + e0

    (depth, a, r0, e0), _ = curve_fit(morse, bonds, energies, p0=(0.2, 1.0, 0.75, min(energies)))
    wavenumber = (a / angstrom) * np.sqrt(2 * depth * hartree / (proton / 2)) / (2 * np.pi * c) / 100
    return {
        "bond_length": float(r0),  # angstrom
        "depth": float(depth),  # hartree
        "frequency": float(wavenumber),  # 1/cm, harmonic
        "minimum": float(e0),  # hartree
    }


@hq.workflow
def h2_dissociation(bonds: list[float]) -> dict[str, Any]:
    points = hq.map(point, bonds)
    return {"points": points, "fit": fit_morse(bonds, [p["energy"] for p in points])}


def show(study: dict[str, Any], picture: str) -> None:
    """Print the table and draw the curve."""
    print(" bond/A   VQE/hartree    FCI/hartree    difference")
    for p in study["points"]:
        print(f"{p['bond']:7.3f} {p['energy']:14.8f} {p['reference']:14.8f} {p['energy'] - p['reference']:12.1e}")
    fit = study["fit"]
    print(
        f"Morse fit: bond length {fit['bond_length']:.4f} A, depth {fit['depth']:.4f} hartree, "
        f"frequency {fit['frequency']:.0f} /cm"
    )
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    bonds = [p["bond"] for p in study["points"]]
    axes.plot(bonds, [p["reference"] for p in study["points"]], color="0.4", label="FCI")
    axes.plot(bonds, [p["energy"] for p in study["points"]], "o", color="#0072B2", label="VQE, hybridq")
    axes.set(xlabel="bond length (Å)", ylabel="energy (hartree)", title="H$_2$, STO-3G")
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)
    print(f"the curve is in {picture}")


if __name__ == "__main__":
    show(hq.run(h2_dissociation, BONDS, seed=7), sys.argv[1] if len(sys.argv) > 1 else "h2_dissociation.png")
