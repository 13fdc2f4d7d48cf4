"""`need` is an upper bound of what an engine process is seen to take."""

from __future__ import annotations

import numpy as np
import pytest
from qiskit import QuantumCircuit
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp

from hybridq.engines.process import EngineProcess
from hybridq.program import need


@pytest.mark.parametrize(
    ("observable", "shots"),
    [("XYZ", None), ("XYZ", 1_000_000), (None, 100_000)],
    ids=["exact", "estimate", "samples"],
)
def test_need_is_an_upper_bound(make, observable, shots):
    """Growing programs in one fresh process, so that each one's own memory is a new peak."""
    process = EngineProcess(2**31)
    try:
        process.evaluate([make(QuantumCircuit(1), "Z")])
        measured = []
        for n in (10, 14, 17, 20):
            circuit = efficient_su2(n, reps=1, entanglement="linear")
            labels = None if observable is None else ["Z" * n, (observable * n)[:n], "Y" * n]
            theta = np.random.default_rng(n).uniform(-3, 3, (1 if n == 20 else 3, circuit.num_parameters))
            program = make(circuit, labels and SparsePauliOp(labels, [1.0, 2.0, 3.0]), theta, shots)
            (outcome,) = process.evaluate([program])
            measured.append(outcome.peak_bytes)
            assert outcome.peak_bytes <= need(program).bytes
        assert sum(measured) >= 16 * 2**20  # the state of 20 qubits was seen
    finally:
        process.close()
