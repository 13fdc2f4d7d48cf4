"""The critical transverse-field Ising ring: its Hamiltonian variational ansatz is exact with n/2 layers.

hybridq run workflows/ising_ring.py -- 4 6 8
"""

from __future__ import annotations

import sys
from typing import Any

import hybridq as hq


@hq.classical
def problem(sites: int) -> hq.Problem:
    """The ring at h = J = 1, with the free-fermion energy as reference (units of J)."""
    return hq.lattice("ising", sites, boundary="ring")


@hq.quantum
def energy(theta: Any, p: hq.Problem) -> Any:
    return hq.expval(p.ansatz, p.hamiltonian, theta)


@hq.workflow
def ring(sites: int) -> dict[str, Any]:
    p = problem(sites)
    found = hq.minimize(energy, p.start, args=(p,), method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-8})
    return {"sites": sites, "energy": found.fun, "reference": p.reference, "evaluations": found.nfev}


@hq.workflow
def ising_ring(sizes: list[int]) -> dict[str, Any]:
    return {"points": hq.map(ring, sizes)}


if __name__ == "__main__":
    sizes = [int(a) for a in sys.argv[1:]] or [4, 6, 8]
    print(" sites     energy/J    reference/J   difference  evaluations")
    for p in hq.run(ising_ring, sizes)["points"]:
        print(
            f"{p['sites']:6d} {p['energy']:12.8f} {p['reference']:14.8f} {p['energy'] - p['reference']:12.1e} "
            f"{p['evaluations']:12d}"
        )
