"""Exact energy, and energy with gradient, in milliseconds a call on one thread: the adjoint engine against others.

efficient_su2(n, reps=2, linear), 6n parameters, open Heisenberg chain of 3(n-1) Paulis. `lightning` is the C++ core of
pennylane-lightning with everything made once; `QNode` is what PennyLane's users call; `ratio` is engine / lightning.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp

from hybridq.engines.adjoint import AdjointEngine
from hybridq.location import Location
from hybridq.program import Program, Request, program

SIZES = (4, 8, 12, 16, 20)
Evaluate = Callable[[], tuple[float, Any]]


def run(compare: Any) -> list[dict[str, Any]]:
    rows = []
    for n in SIZES:
        theta = np.random.default_rng(n).uniform(-np.pi, np.pi, 6 * n)
        for with_gradient in (False, True):
            contenders: dict[str, Evaluate] = {
                "engine": _engine(n, theta, with_gradient),
                "lightning": _lightning(n, theta, with_gradient),
            }
            if importlib.util.find_spec("qulacs"):
                contenders["qulacs"] = _qulacs(n, theta, with_gradient)
            if importlib.util.find_spec("pennylane"):
                contenders["QNode"] = _qnode(n, theta, with_gradient)
            _check(contenders, with_gradient)
            seconds = compare(contenders, 9 if n < 16 else 5 if n < 20 else 3)
            shown = {name: 1e3 * seconds[name] if name in seconds else None for name in _NAMES}
            ratio = seconds["engine"] / seconds["lightning"]
            rows.append({"qubits": n, "what": "gradient" if with_gradient else "value", **shown, "ratio": ratio})
    return rows


_NAMES = ("engine", "lightning", "qulacs", "QNode")


def _check(contenders: dict[str, Evaluate], with_gradient: bool) -> None:
    value, gradient = contenders["engine"]()
    for name, evaluate in contenders.items():
        other, other_gradient = evaluate()
        assert abs(other - value) < 1e-9, f"{name}: {other}, engine: {value}"
        assert not with_gradient or np.allclose(other_gradient, gradient, rtol=0, atol=1e-9), name


def heisenberg(n: int) -> SparsePauliOp:
    """The open chain sum of XX + YY + ZZ."""
    return SparsePauliOp.from_sparse_list([(p + p, [i, i + 1], 1.0) for i in range(n - 1) for p in "XYZ"], n)


def _gates(n: int) -> list[tuple[str, tuple[int, ...], int | None]]:
    """The ansatz as (kind, qubits, number of the parameter), qubit 0 the least significant."""
    gates: list[tuple[str, tuple[int, ...], int | None]] = []
    for layer in range(3):
        for half, kind in enumerate(("RY", "RZ")):
            gates += [(kind, (q,), (2 * layer + half) * n + q) for q in range(n)]
        if layer < 2:
            gates += [("CNOT", (q, q + 1), None) for q in range(n - 1)]
    return gates


def _engine(n: int, theta: Any, with_gradient: bool) -> Evaluate:
    engine = AdjointEngine(2**33)
    request = Request(efficient_su2(n, reps=2, entanglement="linear"), heisenberg(n), theta)
    first = program(request, seed=0, location=Location("benchmark/energy[0]"))
    plan = replace(first.plan, engine="adjoint", gradient="adjoint" if with_gradient else "none")

    def evaluate() -> tuple[float, Any]:
        again = Program(first.template, theta[None], None, first.seeds, plan, (), ())
        (outcome,) = engine.evaluate([again])
        return outcome.values[0, 0], outcome.gradients[0, 0] if with_gradient else None

    return evaluate


def _lightning(n: int, theta: Any, with_gradient: bool) -> Evaluate:
    return functools.partial(lightning(n, with_gradient), theta)


def lightning(n: int, with_gradient: bool) -> Callable[[Any], tuple[float, Any]]:
    """Energy, and gradient, of parameters, shape (6n,), by lightning's C++ core with everything made once."""
    from pennylane_lightning.lightning_qubit_ops import MeasurementsC128, StateVectorC128, algorithms, observables

    gates = _gates(n)
    state = StateVectorC128(n)
    wires = [[n - 1 - q for q in qubits] for _, qubits, _ in gates]
    calls = [(getattr(state, kind), own, number) for (kind, _, number), own in zip(gates, wires, strict=True)]
    words = [
        observables.TensorProdObsC128([observables.NamedObsC128(f"Pauli{p}", [i + k]) for k in (0, 1)])
        for i in range(n - 1)
        for p in "XYZ"
    ]
    hamiltonian = observables.HamiltonianC128(np.ones(len(words)), words)
    measurements, jacobian = MeasurementsC128(state), algorithms.AdjointJacobianC128()
    names, numbers = [kind for kind, _, _ in gates], [number for _, _, number in gates]
    inverses, nothing = [False] * len(gates), [np.zeros((0, 0), dtype=np.complex128)] * len(gates)
    controls: list[list[int]] = [[]] * len(gates)
    order = [number for number in numbers if number is not None]
    trainable = list(range(len(order)))

    def evaluate(theta: Any) -> tuple[float, Any]:
        values = theta.tolist()
        state.resetStateVector()
        for method, own, number in calls:
            method(own, False, [] if number is None else [values[number]])
        value = measurements.expval(hamiltonian)
        if not with_gradient:
            return value, None
        angles = [[] if number is None else [values[number]] for number in numbers]
        operations = algorithms.create_ops_listC128(names, angles, wires, inverses, nothing, controls, controls)
        gradient = np.empty(len(theta))
        gradient[order] = jacobian(state, [hamiltonian], operations, trainable)
        return value, gradient

    return evaluate


def _qulacs(n: int, theta: Any, with_gradient: bool) -> Evaluate:
    from qulacs import Observable, ParametricQuantumCircuit, QuantumState

    circuit, order = ParametricQuantumCircuit(n), []
    for kind, qubits, number in _gates(n):
        if number is None:
            circuit.add_CNOT_gate(*qubits)
        else:
            getattr(circuit, f"add_parametric_{kind}_gate")(qubits[0], 0.0)
            order.append(number)
    observable, state = Observable(n), QuantumState(n)
    for i in range(n - 1):
        for p in "XYZ":
            observable.add_operator(1.0, f"{p} {i} {p} {i + 1}")

    def evaluate() -> tuple[float, Any]:
        for index, number in enumerate(order):
            circuit.set_parameter(index, -theta[number])  # its rotations turn the other way
        state.set_zero_state()
        circuit.update_quantum_state(state)
        value = observable.get_expectation_value(state).real
        if not with_gradient:
            return value, None
        gradient = np.empty(len(theta))
        gradient[order] = -np.array(circuit.backprop(observable))
        return value, gradient

    return evaluate


def _qnode(n: int, theta: Any, with_gradient: bool) -> Evaluate:
    import pennylane as qml

    gates = _gates(n)
    words = [getattr(qml, f"Pauli{p}")(i) @ getattr(qml, f"Pauli{p}")(i + 1) for i in range(n - 1) for p in "XYZ"]
    hamiltonian = qml.Hamiltonian(np.ones(len(words)), words)

    @qml.qnode(qml.device("lightning.qubit", wires=n), diff_method="adjoint")
    def energy(values: Any) -> Any:
        for kind, qubits, number in gates:
            getattr(qml, kind)(*([] if number is None else [values[number]]), wires=qubits)
        return qml.expval(hamiltonian)

    values = qml.numpy.array(theta, requires_grad=True)
    gradient = qml.grad(energy)

    def evaluate() -> tuple[float, Any]:
        if not with_gradient:
            return float(energy(values)), None
        slopes = gradient(values)
        return float(gradient.forward), slopes

    return evaluate
