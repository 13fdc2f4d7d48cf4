"""Gradients as the language gives them: in ``minimize`` and by ``hq.gradient``, in runs and outside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from qiskit.quantum_info import SparsePauliOp, Statevector
from runs import recorded
from scipy import optimize

import hybridq as hq
from hybridq import journal as records
from hybridq.journal import read_records

THETA = ParameterVector("t", 4)
CIRCUIT = QuantumCircuit(3)
for qubit in range(3):
    CIRCUIT.ry(THETA[qubit], qubit)
CIRCUIT.cx(0, 1)
CIRCUIT.rzz(2 * THETA[3] + THETA[0], 1, 2)
CIRCUIT.rx(THETA[1] * THETA[2], 0)
CIRCUIT.crx(THETA[3], 2, 0)
ENERGY = SparsePauliOp(["ZZI", "IXX", "YIY", "IIZ"], [1.0, 0.5, -0.7, 0.2])
START = np.array([0.3, -0.4, 0.5, 0.9])
WAYS = ["adjoint", "parameter-shift", "auto"]


@hq.quantum
def energy(theta: Any, shots: int | None = None) -> Any:
    return hq.expval(CIRCUIT, ENERGY, theta, shots=shots)


@hq.quantum
def doubled(theta: Any) -> Any:
    return hq.expval(CIRCUIT, ENERGY, 2 * np.asarray(theta))


def dense(theta: Any) -> float:
    return float(Statevector(CIRCUIT.assign_parameters(np.asarray(theta))).expectation_value(ENERGY).real)


def dense_gradient(theta: Any) -> np.ndarray[Any, Any]:
    """Richardson-extrapolated central differences: error of order h^4."""

    def central(h: float) -> np.ndarray[Any, Any]:
        steps = np.eye(len(theta)) * h
        return np.array([(dense(theta + s) - dense(theta - s)) / (2 * h) for s in steps])

    return (4 * central(1e-3) - central(2e-3)) / 3


def limit(method: str) -> dict[str, int]:
    return {"maxfun": 20} if method == "TNC" else {"maxiter": 8}


@hq.workflow
def loop(method: str, jac: str | None, shots: int | None = None) -> Any:
    return hq.minimize(energy, START, args=(shots,), method=method, jac=jac, options=limit(method))


@hq.workflow
def gradients(way: str) -> Any:
    return hq.gradient(energy, START, method=way), hq.gradient(energy, np.stack([START, 2 * START]), method=way)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_a_dense_twin(way: str, client: Client, store: Path) -> None:
    one, two = hq.run(gradients, way, name="gradients", store=store, cluster=client)
    np.testing.assert_allclose(one, dense_gradient(START), atol=1e-9)
    np.testing.assert_allclose(two[1], dense_gradient(2 * START), atol=1e-9)
    assert two.shape == (2, 4)
    np.testing.assert_array_equal(two[0], one)
    np.testing.assert_array_equal(hq.gradient(energy, START, method=way), one)
    assert np.abs(one).min() > 1e-3
    again = hq.run(gradients, way, name="gradients", store=store, cluster=client)
    np.testing.assert_array_equal(again[0], one)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "SLSQP", "CG", "TNC"])
def test_loops_with_gradients_follow_scipy_with_the_dense_twin(
    method: str, way: str, client: Client, store: Path
) -> None:
    found = hq.run(loop, method, way, name="loop", store=store, cluster=client)
    expected = optimize.minimize(dense, START, method=method, jac=dense_gradient, options=limit(method))
    assert found.fun == pytest.approx(expected.fun, abs=1e-4)
    assert found.fun < dense(START) - 0.1
    rows = recorded(store / "loop", records.Row)
    assert len(rows) == found.nfev
    assert all(r.g is not None for r in rows)
    outside = hq.minimize(energy, START, method=method, jac=way, options=limit(method))
    assert outside.x.tobytes() == found.x.tobytes()


def test_a_loop_with_gradients_resumes_to_the_same_bits(client: Client, store: Path) -> None:
    found = hq.run(loop, "L-BFGS-B", "adjoint", name="whole", store=store, cluster=client)
    lines = (store / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    rows = [i for i, line in enumerate(lines) if json.loads(line)["k"] == "row"]
    shutil.copytree(store / "whole", store / "cut" / "whole")
    (store / "cut" / "whole" / "journal.jsonl").write_bytes(b"".join(lines[: rows[len(rows) // 2]]))
    resumed = hq.run(loop, "L-BFGS-B", "adjoint", name="whole", store=store / "cut", cluster=client)
    assert resumed.x.tobytes() == found.x.tobytes()
    assert resumed.jac.tobytes() == found.jac.tobytes()


def test_auto_takes_parameter_shift_for_shots_and_nothing_where_no_gradient_is_used(
    client: Client, store: Path
) -> None:
    hq.run(loop, "L-BFGS-B", "auto", 500, name="sampled", store=store, cluster=client)
    hq.run(loop, "COBYLA", "auto", name="free", store=store, cluster=client)
    hq.run(loop, "L-BFGS-B", None, name="differences", store=store, cluster=client)
    headers = {
        name: next(r.gradient for _, r in read_records(store / name) if isinstance(r, records.Loop))
        for name in ("sampled", "free", "differences")
    }
    assert headers == {"sampled": "parameter-shift", "free": "none", "differences": "none"}


@hq.workflow
def estimates(shots: int | None) -> Any:
    return hq.gradient(energy, START, shots, method="spsa"), hq.gradient(energy, START, shots, method="spsa")


@pytest.mark.parametrize("shots", [None, 200])
def test_random_estimates_are_the_runs_own(shots: int | None, client: Client, store: Path) -> None:
    """Each call has a direction of its own, the same whenever the run is repeated."""
    first, second = hq.run(estimates, shots, name="one", seed=3, store=store, cluster=client)
    slope = dense_gradient(START)
    for found in (first, second):
        direction = np.sign(found / found[0])
        np.testing.assert_allclose(np.abs(found), np.abs(found[0]), rtol=1e-12)
        if shots is None:
            np.testing.assert_allclose(found, (slope @ direction) * direction, atol=1e-6)
    assert first.tobytes() != second.tobytes()
    for options in ({"name": "one", "seed": 3}, {"name": "again", "seed": 3}):
        again = hq.run(estimates, shots, store=store, cluster=client, **options)  # type: ignore[arg-type]
        assert [g.tobytes() for g in again] == [first.tobytes(), second.tobytes()]
    other = hq.run(estimates, shots, name="other", seed=4, store=store, cluster=client)
    assert other[0].tobytes() != first.tobytes()


@pytest.mark.parametrize("shots", [None, 200])
def test_a_loop_with_random_estimates_resumes_to_the_same_bits(shots: int | None, client: Client, store: Path) -> None:
    found = hq.run(loop, "CG", "spsa", shots, name="whole", store=store, cluster=client)
    rows = recorded(store / "whole", records.Row)
    assert len(rows) == found.nfev
    assert all(r.g is not None for r in rows)
    lines = (store / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    marks = [i for i, line in enumerate(lines) if json.loads(line)["k"] == "row"]
    shutil.copytree(store / "whole", store / "cut" / "whole")
    (store / "cut" / "whole" / "journal.jsonl").write_bytes(b"".join(lines[: marks[len(marks) // 2]]))
    for place in (store, store / "cut"):
        again = hq.run(loop, "CG", "spsa", shots, name="whole", store=place, cluster=client)
        assert (again.x.tobytes(), again.jac.tobytes()) == (found.x.tobytes(), found.jac.tobytes())


@hq.workflow
def on(backend: Any, jac: str) -> Any:
    return hq.minimize(elsewhere, START, args=(backend,), method="L-BFGS-B", jac=jac, options={"maxiter": 2})


@hq.quantum
def elsewhere(theta: Any, backend: Any) -> Any:
    return hq.expval(CIRCUIT, ENERGY, theta, backend=backend)


NOISY = hq.Aer(noise=hq.Noise.depolarizing(0.01, 0.02))


def test_auto_falls_back_to_parameter_shift_and_records_why(client: Client, store: Path) -> None:
    for name, backend, words in (
        ("noisy", NOISY, "there is noise"), ("tensors", "matrix_product_state", "the method is matrix_product_state"),
    ):  # fmt: skip
        hq.run(on, backend, "auto", name=name, store=store, cluster=client)
        (circuit,) = recorded(store / name, records.Circuit)
        (header,) = recorded(store / name, records.Loop)
        assert header.gradient == "parameter-shift"
        assert circuit.plan["v"]["gradient"] == "parameter-shift"
        assert circuit.plan["v"]["reason"].endswith(f"; parameter-shift: {words}")
        with pytest.raises(hq.WorkflowError, match=f"adjoint gradient was asked for, but {words}"):
            hq.run(on, backend, "adjoint", name=f"{name}-adjoint", store=store, cluster=client)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: hq.minimize(energy, START, args=(100,), jac="adjoint"), "but the values are sampled; use jac='p"),
        (lambda: hq.minimize(doubled, START, jac="adjoint"), "would not be the gradient"),
        (lambda: hq.minimize(dense, START, jac="adjoint"), "is for quantum functions"),
        (lambda: hq.gradient(elsewhere, START, NOISY, method="adjoint"), "but there is noise; use jac='p"),
        (lambda: hq.gradient(elsewhere, np.zeros(4), "stabilizer", method="spsa"), "multiples of pi/2 alone"),
        (lambda: hq.gradient(energy, START, method="finite"), "give one of auto, adjoint, parameter-shift"),
        (lambda: hq.gradient(dense, START), "takes a quantum function"),
    ],
)
def test_gradients_that_cannot_be_had_are_refused(call: Any, words: str) -> None:
    with pytest.raises(hq.WorkflowError, match=words):
        call()
