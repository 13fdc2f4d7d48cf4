"""The language outside of runs, where it is plain functions, and inside, where every call is recorded."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from distributed import Client
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from qiskit.primitives import BitArray
from qiskit.quantum_info import Pauli, SparsePauliOp
from runs import executed, journal, recorded, replayed, report, traced, write_trace

import hybridq as hq
from hybridq.errors import JournalError
from hybridq.journal import End, Event, Journal

# -- an oracle of its own: dense matrices ----------------------------------------------------------------------------

PAULIS = {
    "I": np.eye(2),
    "X": np.array([[0, 1], [1, 0]]),
    "Y": np.array([[0, -1j], [1j, 0]]),
    "Z": np.diag([1, -1]),
}
CX = np.eye(4)[[0, 3, 2, 1]]  # qubit 0 controls qubit 1; qubit 0 is the last factor
HADAMARD = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
ANGLES = ParameterVector("angle", 3)
CIRCUIT = QuantumCircuit(2)
CIRCUIT.ry(ANGLES[0], 0)
CIRCUIT.rx(ANGLES[1], 1)
CIRCUIT.cx(0, 1)
CIRCUIT.rz(ANGLES[2], 1)
CIRCUIT.h(1)
TERMS = {"ZZ": 1.0, "XI": 0.5, "YX": -0.25, "II": 0.125}


def turn(axis: str, angle: float) -> np.ndarray:
    return np.cos(angle / 2) * PAULIS["I"] - 1j * np.sin(angle / 2) * PAULIS[axis]


def state(theta: Any) -> np.ndarray:
    a, b, c = theta
    start = np.kron(turn("X", b)[:, 0], turn("Y", a)[:, 0])
    return np.kron(HADAMARD @ turn("Z", c), np.eye(2)) @ CX @ start


def dense(theta: Any, terms: dict[str, float] = TERMS) -> float:
    operator = sum(value * np.kron(PAULIS[label[0]], PAULIS[label[1]]) for label, value in terms.items())
    return float(np.vdot(state(theta), operator @ state(theta)).real)


# -- what the tests run ------------------------------------------------------------------------------------------------


@hq.quantum
def energy(theta: Any, observable: Any = TERMS) -> Any:
    """The energy of the circuit."""
    return hq.expval(CIRCUIT, observable, theta)


@hq.quantum
def sampled(theta: Any, shots: int = 4000) -> Any:
    return hq.expval(CIRCUIT, TERMS, theta, shots=shots)


@hq.quantum
def bits(theta: Any, shots: int = 1000) -> Any:
    return hq.sample(CIRCUIT, theta, shots=shots)


@hq.classical
def scale(trace: str, values: Any, factor: float = 1.0) -> list[float]:
    write_trace(trace, "scale")
    return [factor * value for value in values]


@hq.classical
def kinds(trace: str) -> dict[str, Any]:
    write_trace(trace, "kinds")
    return {
        "none": None,
        "tuple": (1, 2.5, "three", (True,)),
        "list": [1, [2.0]],
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "complex": 1 - 2j,
        "special": [float("inf"), float("-inf"), -0.0, 1e-320, 2**70],
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "large": np.linspace(0, 1, 1000),
        "empty": np.zeros((0, 3)),
        "scalar": np.float32(0.1),
        "keys": {1: "a", (2, 3): "b"},
        "estimate": hq.Estimate(1.0, 0.5, 10),
        "operator": SparsePauliOp(["XY", "ZI"], [1.0, 0.5]),
    }


@hq.classical
def noisy(trace: str) -> list[float]:
    write_trace(trace, "noisy")
    return [float(hq.rng().normal()) for _ in range(2)]


@hq.classical
def outer(trace: str) -> Any:
    """A step that calls a step, maps one and submits one: all plain calls in its own process."""
    write_trace(trace, "outer")
    future = scale.submit(trace, [3.0])
    return scale(trace, [1.0]), hq.map(scale, [trace], [[2.0]]), [f.result() for f in hq.as_completed([future])]


@hq.classical
def uses_quantum(how: str) -> Any:
    match how:
        case "call":
            return float(energy([0, 0, 0]))
        case "submit":
            return energy.submit([0, 0, 0])
        case "map":
            return hq.map(energy, [[0, 0, 0]])
        case "minimize":
            return hq.minimize(energy, [0, 0, 0], method="Nelder-Mead").fun
        case "run":
            return hq.run(square, 1)
    return None


@hq.workflow
def square(x: float) -> float:
    return x * x


def locations(directory: str | Path) -> list[str]:
    """Where every recorded call stands, the rows of loops included."""
    entries = journal(directory)
    places = [e["at"] for e in entries if e["k"] in ("step", "eval", "loop", "event")]
    for row in (e for e in entries if e["k"] == "row"):
        loop = entries[row["loop"] - 1]
        places.append(f"{loop['at']}/{loop['function']}[{row['i']}]")
    return places


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal to the type and the bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, (np.ndarray, np.generic)):
        return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    if isinstance(left, BitArray):
        return left.num_bits == right.num_bits and same(left.array, right.array)
    if isinstance(left, float):
        return left.hex() == right.hex()
    if is_dataclass(left):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left))
    return bool(left == right)


# -- outside of runs ---------------------------------------------------------------------------------------------------


def test_decorated_functions_keep_their_name() -> None:
    assert energy.__name__ == "energy"
    assert energy.__doc__ == "The energy of the circuit."
    assert outer.__module__ == energy.__module__ == __name__
    assert square.__wrapped__(3) == 9


def test_classical_outside_is_a_plain_call() -> None:
    marker = object()

    @hq.classical(memory="1 GiB", retries=3, timeout=1e-9)
    def identity(value: Any, *, twice: bool = False) -> Any:
        if value is None:
            raise KeyError("nothing")
        return (value, value) if twice else value

    assert identity(marker) is marker  # any object: nothing is encoded
    assert identity(marker, twice=True) == (marker, marker)
    assert identity.submit(marker).result() is marker
    with pytest.raises(KeyError, match="nothing"):
        identity(None)
    failed = identity.submit(None)  # raises where the result is asked for, as in a run
    with pytest.raises(KeyError, match="nothing"):
        failed.result()


LABELS = [
    ({"ZZ": 1.0, "XI": 0.5}, {"ZZ": 1.0, "XI": 0.5}),
    (SparsePauliOp(["YX", "IZ"], [0.3, -2.0]), {"YX": 0.3, "IZ": -2.0}),
    ("XX", {"XX": 1.0}),
    (Pauli("ZY"), {"ZY": 1.0}),
    ([("XY", 2.0), ("II", 0.5)], {"XY": 2.0, "II": 0.5}),
]


@pytest.mark.parametrize(("observable", "terms"), LABELS, ids=["dict", "SparsePauliOp", "label", "Pauli", "pairs"])
@pytest.mark.parametrize("theta", [(0.0, 0.0, 0.0), (0.3, -1.2, 2.1), (np.pi, 7.0, -0.5)])
def test_expval_outside_is_exact(theta: tuple[float, ...], observable: Any, terms: dict[str, float]) -> None:
    found = energy(theta, observable)
    assert isinstance(found, hq.Estimate)
    assert float(found) == pytest.approx(dense(theta, terms), abs=1e-12)
    assert (found.stderr, found.shots) == (0.0, None)
    assert float(energy.submit(theta, observable).result()) == float(found)
    by_name = {f"angle[{i}]": theta[i] for i in range(3)}
    assert float(energy(by_name, observable)) == float(found)


def test_batch_axes_broadcast_with_observables() -> None:
    thetas = np.random.default_rng(5).uniform(-3, 3, size=(4, 1, 3))
    observables = [{"ZZ": 1.0}, {"XI": 0.5, "IY": 2.0}]
    found = energy(thetas, observables)
    assert found.value.shape == (4, 2)
    expected = [[dense(theta[0], terms) for terms in observables] for theta in thetas]
    np.testing.assert_allclose(found.value, expected, atol=1e-12)
    np.testing.assert_allclose(energy(thetas[0, 0], observables).value, expected[0], atol=1e-12)
    np.testing.assert_allclose(energy(thetas[:, 0]).value, [dense(theta[0]) for theta in thetas], atol=1e-12)


def test_sampled_values_are_within_their_error_bars() -> None:
    theta = (0.3, -1.2, 2.1)
    found = [sampled(theta) for _ in range(20)]
    assert len({e.value for e in found}) == 20  # each call draws its own samples
    deviations = [(e.value - dense(theta)) / e.stderr for e in found]
    assert all(abs(d) < 5 for d in deviations)
    assert 0.1 < np.mean(np.square(deviations)) < 4  # the bars are neither far too wide nor far too narrow
    assert all(e.shots == 4000 and 0 < e.stderr < 0.05 for e in found)

    @hq.quantum
    def precise(theta: Any) -> Any:
        return hq.expval(CIRCUIT, TERMS, theta, precision=0.02)

    assert 0 < precise(theta).stderr <= 0.02


def test_samples_follow_the_distribution() -> None:
    theta, shots = (0.3, -1.2, 2.1), 20_000
    found = bits(theta, shots)
    assert isinstance(found, BitArray)
    assert (found.num_shots, found.num_bits, found.shape) == (shots, 2, ())
    frequencies = np.array([found.get_int_counts().get(k, 0) for k in range(4)])
    expected = shots * np.abs(state(theta)) ** 2
    assert expected.min() > 40
    assert ((frequencies - expected) ** 2 / expected).sum() < 25  # chi-squared, 3 degrees of freedom: p = 1.5e-5
    assert bits(np.zeros((2, 5, 3)), 10).shape == (2, 5)


def test_workflow_language_outside_is_plain_python() -> None:
    @hq.workflow
    def study(n: int) -> dict[str, Any]:
        futures = [square.submit(i) for i in range(n)]
        return {
            "map": hq.map(square, range(n)),
            "nested": hq.map(lambda i: hq.map(square, range(i)), range(n)),
            "two": hq.map(lambda a, b: a - b, range(n), range(n, 2 * n)),
            "quantum": [float(e) for e in hq.map(energy, np.eye(3))],
            "submitted": [f.result() for f in hq.as_completed(futures)],
            "random": hq.rng().random() != hq.rng().random(),
        }

    before = time.time()
    found = study(3)
    assert found["map"] == [0, 1, 4] == found["submitted"]
    assert found["nested"] == [[], [0], [0, 1]]
    assert found["two"] == [-3, -3, -3]
    assert found["quantum"] == pytest.approx([dense(row) for row in np.eye(3)], abs=1e-12)
    assert found["random"]
    assert before <= hq.now() <= time.time()
    assert study.submit(1).result()["map"] == [0]


@pytest.mark.parametrize("method", ["L-BFGS-B", "COBYLA", "Nelder-Mead", None])
def test_minimize_outside_is_scipys(method: str | None) -> None:
    """To the bit, over the same values; COBYLA goes another way where one of them differs in its last bit."""
    start, options = [0.1, 0.2, 0.3], {"maxiter": 25}

    def shifted(x: Any, shift: float) -> float:
        return float(energy(x)) + shift

    found = hq.minimize(energy, start, method=method, options=options)
    assert isinstance(found, scipy.optimize.OptimizeResult)
    assert found.fun == pytest.approx(dense(found.x), abs=1e-12)
    assert found.fun < dense(start) - 0.5
    for fun, args, mine in (
        (lambda x: float(energy(x)), (), found),
        (shifted, (3.0,), hq.minimize(shifted, start, (3.0,), method, options=options)),
    ):
        expected = scipy.optimize.minimize(fun, start, args, method, options=options)
        assert (mine.x.tobytes(), mine.fun, mine.nfev) == (expected.x.tobytes(), expected.fun, expected.nfev)


def fail_for(x: int) -> int:
    if x in (1, 3):
        raise KeyError(x)
    return x


def test_map_outside_raises_the_lowest_index_after_all() -> None:
    called = []

    def child(x: int) -> int:
        called.append(x)
        return fail_for(x)

    with pytest.raises(KeyError, match="1"):
        hq.map(child, range(5))
    assert called == [0, 1, 2, 3, 4]
    found = hq.map(child, range(5), return_exceptions=True)
    assert [type(value) for value in found] == [int, KeyError, int, KeyError, int]


async def coroutine() -> None: ...


def generator() -> Any:
    yield 1


class Study:
    @hq.workflow
    def step(self) -> None: ...


def returns(value: Any) -> Any:
    @hq.quantum
    def body() -> Any:
        return value

    return body


MISUSES = {
    "no iterable": (lambda: hq.map(square), "at least one iterable"),
    "lengths": (lambda: hq.map(max, [1, 2], [1]), "different lengths"),
    "not callable": (lambda: hq.map(3, [1]), "3 cannot be called"),
    "fun": (lambda: hq.minimize(3, [0.0]), "fun is 3"),
    "lambda class": (lambda: hq.classical(int), "not a function"),
    "coroutine": (lambda: hq.workflow(coroutine), "coroutine or generator"),
    "generator": (lambda: hq.classical(generator), "coroutine or generator"),
    "memory": (lambda: hq.classical(memory="much"), "memory: 'much' is not an amount"),
    "negative memory": (lambda: hq.classical(memory=-1), "memory: -1"),
    "retries": (lambda: hq.classical(retries=-1), "retries is -1"),
    "float retries": (lambda: hq.classical(retries=1.5), "retries is 1.5"),
    "timeout": (lambda: hq.classical(timeout=0), "timeout is 0"),
    "method": (lambda: Study().step(1), "decorated inside the class Study"),
    "no observable": (lambda: hq.expval(CIRCUIT, None, [0, 0, 0]), "no observable was given"),
    "returns a number": (returns(3), "returned a int"),
    "returns nothing": (returns(None), "returned None"),
    "run of a step": (lambda: hq.run(scale, 1), "takes a workflow"),
    "run of a quantum function": (lambda: hq.run(energy, 1), "takes a workflow"),
    "run of a number": (lambda: hq.run(3), "takes a workflow"),
}


@pytest.mark.parametrize(("misuse", "words"), MISUSES.values(), ids=MISUSES.keys())
def test_misuses_are_refused_with_the_remedy(misuse: Callable[[], Any], words: str) -> None:
    with pytest.raises(hq.WorkflowError) as caught:
        misuse()
    assert words in str(caught.value)
    assert len(str(caught.value)) > len(words) + 10


# -- inside a run ------------------------------------------------------------------------------------------------------


@hq.workflow
def child(trace: str, i: int) -> dict[str, Any]:
    p = scale(trace, [0.1 * i, 0.2, 0.3], factor=2.0)
    return {"energy": energy(p), "again": energy(p, {"ZZ": 1.0}), "random": float(hq.rng().random()), "p": p}


def plain(i: int, j: int) -> float:
    return float(energy([0.1 * i, 0.1 * j, 0.0]))


@hq.workflow
def everything(trace: str) -> dict[str, Any]:
    print("the body runs")
    theta = [0.3, -1.2, 2.1]
    futures = [
        scale.submit(trace, [1.0], factor=5.0), energy.submit(theta), child.submit(trace, 9), bits.submit(theta, 7),
    ]  # fmt: skip
    found: dict[str, Any] = {
        "kwargs": [scale(trace, [1.0, 2.0]), scale(trace, values=(1.0, 2.0), factor=3.0)],
        "kinds": kinds(trace),
        "noisy": [noisy(trace), noisy(trace)],
        "outer": outer(trace),
        "exact": energy(theta),
        "batch": energy(np.arange(12.0).reshape(4, 1, 3), [{"ZZ": 1.0}, {"XI": 0.5}]),
        "sampled": [sampled(theta), sampled(theta), sampled(theta, shots=9)],
        "bits": [bits(theta), bits(np.ones((2, 3)), shots=11)],
        "for": [energy([0.1 * k, 0.2, 0.3]) for k in range(20)],
        "scipy": scipy.optimize.minimize(lambda x: float(energy(x)), theta, method="SLSQP", options={"maxiter": 3}),
        "minimize": hq.minimize(energy, theta, method="COBYLA", options={"maxiter": 15}),
        "wide": hq.minimize(child_cost, [0.1, 0.2], args=(trace,), method="Nelder-Mead", options={"maxfev": 6}),
        "steps": hq.map(scale, [trace] * 3, [[1.0], [2.0], [3.0]]),
        "evaluations": hq.map(energy, np.eye(3)),
        "children": hq.map(child, [trace] * 3, range(3)),
        "plain": hq.map(plain, range(2), range(2)),
        "empty": hq.map(child, [], []),
        "rng": [hq.rng().normal(size=2), hq.rng().integers(10**9)],
        "now": [hq.now(), hq.now()],
        "square": square(7),
    }
    found["submitted"] = [f.result() for f in futures]
    return found


def child_cost(x: Any, trace: str) -> float:
    shifted = scale(trace, x.tolist(), factor=0.5)
    return float(energy([*shifted, 0.3])) + float(sampled([*shifted, 0.3], 200))


def test_everything_inside_a_run_and_again(
    client: Client, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace"
    live = report(everything, str(trace), name="study", seed=3, store=store, cluster=client)
    counts = traced(trace)
    assert counts["kinds"] == counts["outer"] == 1
    assert counts["noisy"] == 2
    assert capfd.readouterr().out == "the body runs\n"
    value, theta = live.value, [0.3, -1.2, 2.1]

    # every value is what plain Python gives
    assert value["kwargs"] == [[1.0, 2.0], [3.0, 6.0]]
    assert same(value["kinds"], kinds.__wrapped__(os.devnull))
    assert value["outer"] == ([1.0], [[2.0]], [[3.0]])
    assert float(value["exact"]) == pytest.approx(dense(theta), abs=1e-12)
    assert value["batch"].value.shape == (4, 2)
    for row, angles in zip(value["batch"].value, np.arange(12.0).reshape(4, 3), strict=True):
        assert row == pytest.approx([dense(angles, {"ZZ": 1.0}), dense(angles, {"XI": 0.5})], abs=1e-12)
    first, second, few = value["sampled"]
    assert first.value != second.value
    assert abs(first.value - dense(theta)) < 5 * first.stderr
    assert few.shots == 9
    assert [b.shape for b in value["bits"]] == [(), (2,)]
    assert [float(e) for e in value["for"]] == pytest.approx([dense([0.1 * k, 0.2, 0.3]) for k in range(20)], abs=1e-12)
    expected = scipy.optimize.minimize(dense, theta, method="SLSQP", options={"maxiter": 3})
    assert value["scipy"].fun == pytest.approx(expected.fun, abs=1e-6)
    assert value["minimize"].nfev == 15
    assert value["wide"].nfev == 6
    assert value["steps"] == [[1.0], [2.0], [3.0]]
    assert [float(e) for e in value["evaluations"]] == pytest.approx([dense(row) for row in np.eye(3)], abs=1e-12)
    for i, entry in enumerate(value["children"]):
        assert entry["p"] == [0.2 * i, 0.4, 0.6]
        assert float(entry["energy"]) == pytest.approx(dense(entry["p"]), abs=1e-12)
        assert float(entry["again"]) == pytest.approx(dense(entry["p"], {"ZZ": 1.0}), abs=1e-12)
    assert value["plain"] == pytest.approx([dense([0.1 * i, 0.1 * i, 0]) for i in range(2)], abs=1e-12)
    assert value["empty"] == []
    draws = [*value["noisy"][0], *value["noisy"][1], *value["rng"][0], *(c["random"] for c in value["children"])]
    assert len(set(draws)) == len(draws) == 9
    assert value["now"][0] <= value["now"][1] <= time.time()
    assert value["square"] == 49
    scaled, submitted, other, seven = value["submitted"]
    assert scaled == [5.0]
    assert same(submitted, value["exact"])
    assert other["p"] == [1.8, 0.4, 0.6]
    assert seven.num_shots == 7

    # every call has a place of its own in the record, and is there once
    places = locations(live.directory)
    assert len(places) == len(set(places))
    for place in (
        "everything/scale[0]", "everything/child[0]/scale[0]", "everything/child[1]/energy[1]",
        "everything/minimize[1]/child_cost[5]/sampled[0]", "everything/minimize[0]/energy[14]",
        "everything/plain[1]/energy[0]", "everything/now[1]", "everything/energy[20]",
    ):  # fmt: skip
        assert place in places, place
    steps = sum(e["k"] == "step" for e in journal(live.directory))
    assert executed(live)[1] == steps == counts.total() - 3  # three of them inside `outer`
    evaluations = sum(e["k"] == "eval" or (e["k"] == "row" and e["where"] != "") for e in journal(live.directory))
    assert executed(live)[0] == evaluations
    assert replayed(live) == (0, 0)

    # again: the same to the bit and the type; nothing is executed but the bodies
    again = report(everything, str(trace), name="study", seed=3, store=store, cluster=client)
    assert same(again.value, live.value)
    assert executed(again) == (0, 0)
    assert replayed(again) == executed(live)
    assert traced(trace) == counts
    assert capfd.readouterr().out == "the body runs\n"
    assert locations(again.directory) == places


@hq.workflow
def draws(trace: str) -> list[Any]:
    theta = [0.3, -1.2, 2.1]
    return [float(hq.rng().random()), noisy(trace), sampled(theta).value, bits(theta, 64).array.tolist()]


def test_randomness_comes_from_seed_and_location_alone(client: Client, store: Path, tmp_path: Path) -> None:
    trace = str(tmp_path / "trace")
    runs = [report(draws, trace, name=name, seed=seed, store=store, cluster=client).value
            for name, seed in [("a", 1), ("b", 1), ("c", 2)]]  # fmt: skip
    assert runs[0] == runs[1]
    assert all(x != y for x, y in zip(runs[0], runs[2], strict=True))
    assert traced(Path(trace))["noisy"] == 3  # three runs, each with steps of its own


@hq.workflow
def one_loop(i: int) -> Any:
    return hq.minimize(energy, [0.01 * i, 0.2, 0.3], method="Nelder-Mead", options={"maxfev": 4})


@hq.workflow
def many_loops(n: int) -> list[Any]:
    return [(found.fun, found.nfev) for found in hq.map(one_loop, range(n))]


def test_two_hundred_loops_in_one_workflow(client: Client, store: Path) -> None:
    live = report(many_loops, 200, name="loops", store=store, cluster=client)
    for i, (fun, nfev) in enumerate(live.value):
        start = [0.01 * i, 0.2, 0.3]
        expected = scipy.optimize.minimize(dense, start, method="Nelder-Mead", options={"maxfev": 4})
        assert (fun, nfev) == (pytest.approx(expected.fun, abs=1e-10), expected.nfev)
    assert executed(live) == (sum(nfev for _, nfev in live.value), 0)
    assert len(locations(live.directory)) == 200 + live.evaluations_executed
    again = report(many_loops, 200, name="loops", store=store, cluster=client)
    assert executed(again) == (0, 0)
    assert again.value == live.value


@hq.workflow
def deep(trace: str, depth: int, width: int) -> float:
    if depth == 0:
        return scale(trace, [1.0])[0] + float(energy([0.0, 0.0, 0.0], {"IZ": 1.0}))
    return float(sum(hq.map(deep, [trace] * width, [depth - 1] * width, [width] * width)))


def test_nested_maps_do_not_deadlock(client: Client, store: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    live = report(deep, str(trace), 4, 3, name="deep", store=store, cluster=client)
    assert live.value == pytest.approx(2 * 3**4)
    assert executed(live) == (81, 81) == (81, traced(trace)["scale"])
    assert locations(live.directory).count("deep/deep[2]/deep[2]/deep[2]/deep[2]/scale[0]") == 1


@hq.workflow
def wide(n: int) -> int:
    return len(hq.map(square, range(n)))


def test_a_map_wider_than_its_window(store: Path) -> None:
    assert report(wide, 1000, store=store, workers=1).value == 1000


@hq.classical
def wait_for(path: str, name: str) -> str:
    """End when ``path`` exists, or at once without one."""
    while path and not os.path.exists(path):
        time.sleep(0.01)
    return name


@hq.workflow
def in_order_of_completion(gate: str) -> list[str]:
    futures = [wait_for.submit(gate, "first asked"), wait_for.submit("", "second asked")]
    order = []
    for future in hq.as_completed(futures):
        order.append(future.result())
        Path(gate).touch()
    return order


def test_as_completed_records_the_order(client: Client, store: Path, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    live = report(in_order_of_completion, gate, name="order", store=store, cluster=client)
    assert live.value == ["second asked", "first asked"]
    again = report(in_order_of_completion, gate, name="order", store=store, cluster=client)
    assert again.value == live.value
    assert executed(again) == (0, 0)
    fresh = report(in_order_of_completion, gate, name="other", store=store, cluster=client)
    assert sorted(fresh.value) == sorted(live.value)  # the gate is open now: either order


@hq.workflow
def orders(names: list[str]) -> Any:
    outside = square_future
    with pytest.raises(hq.WorkflowError, match="futures of this run"):
        list(hq.as_completed([outside]))
    with pytest.raises(hq.WorkflowError, match="futures of this run"):
        list(hq.as_completed([3]))  # type: ignore[list-item]
    assert list(hq.as_completed([])) == []
    return outside.result()


square_future = square.submit(5)


def test_futures_of_elsewhere(store: Path) -> None:
    assert report(orders, [], store=store, workers=1).value == 25
    kept = []

    @hq.workflow
    def leak() -> None:
        kept.append(square.submit(2))
        assert kept[0].result() == 4

    hq.run(leak, store=store, workers=1)
    with pytest.raises(hq.WorkflowError, match="outside of the workflow that submitted it"):
        kept[0].result()


# -- what is refused, where --------------------------------------------------------------------------------------------


@hq.quantum
def does_more(how: str) -> Any:
    match how:
        case "classical":
            scale(os.devnull, [])
        case "submit":
            scale.submit(os.devnull, [])
        case "quantum":
            energy([0, 0, 0])
        case "workflow":
            square(1)
        case "map":
            hq.map(square, [1])
        case "minimize":
            hq.minimize(energy, [0, 0, 0])
        case "rng":
            hq.rng()
        case "now":
            hq.now()
        case "as_completed":
            list(hq.as_completed([]))
        case "run":
            hq.run(square, 1)
    return hq.expval(CIRCUIT, "ZZ", [0, 0, 0])


@hq.workflow
def evaluates(how: str) -> float:
    return float(does_more(how))


@pytest.mark.parametrize(
    "how",
    ["classical", "submit", "quantum", "workflow", "map", "minimize", "rng", "now", "as_completed", "run", "nothing"],
)
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "in a run"])
def test_a_quantum_body_only_describes(how: str, inside: bool, store: Path) -> None:
    def call() -> Any:
        return hq.run(evaluates, how, store=store, workers=1) if inside else evaluates(how)

    if how == "nothing":
        assert call() == pytest.approx(dense([0, 0, 0], {"ZZ": 1.0}), abs=1e-12)
        return
    with pytest.raises(hq.WorkflowError) as caught:
        call()
    expected = "inside the quantum function does_more, which must only describe" if how != "run" else "inside a run"
    assert expected in str(caught.value)
    if inside:
        [directory] = store.iterdir()
        assert {e["k"] for e in journal(directory)} == {"run", "opened", "end"}
    assert float(energy([0, 0, 0])) == pytest.approx(dense([0, 0, 0]))  # the refusal leaves nothing behind


@hq.workflow
def refused_in_steps(ways: list[str]) -> list[tuple[str, str]]:
    found = []
    for way in ways:
        try:
            uses_quantum(way)
        except Exception as error:  # noqa: BLE001  # to be looked at by the test
            found.append((type(error).__name__, str(error)))
    return found


def test_quantum_calls_and_runs_inside_a_step_are_refused(client: Client, store: Path) -> None:
    ways = ["call", "submit", "map", "minimize", "run"]
    live = report(refused_in_steps, ways, name="ways", store=store, cluster=client)
    assert [kind for kind, _ in live.value] == ["WorkflowError"] * 5
    for _, message in live.value[:4]:
        assert "energy was called inside a classical step" in message
        assert "Call it in the workflow" in message
    assert "hq.run was called inside a run" in live.value[4][1]
    assert live.evaluations_executed == 0
    again = report(refused_in_steps, ways, name="ways", store=store, cluster=client)
    assert again.value == live.value
    assert executed(again) == (0, 0)


def test_runs_do_not_nest(store: Path) -> None:
    @hq.workflow
    def study() -> Any:
        with pytest.raises(hq.WorkflowError, match="inside a run; call the workflow itself"):
            hq.run(square, 2, store=store)
        return square(2)

    assert hq.run(study, store=store, workers=1) == 4
    assert len(list(store.iterdir())) == 1


def test_calls_from_foreign_threads_are_refused(store: Path) -> None:
    @hq.workflow
    def study() -> list[str]:
        said: list[str] = []

        def foreign() -> None:
            for call in (lambda: energy([0, 0, 0]), lambda: square(1), hq.rng, hq.now, lambda: hq.map(square, [1])):
                try:
                    call()
                except hq.WorkflowError as error:
                    said.append(str(error))

        thread = threading.Thread(target=foreign, name="my-thread")
        thread.start()
        thread.join()
        return said

    live = report(study, store=store, workers=1)
    assert len(live.value) == 5
    assert all("'my-thread', which the run did not start" in text and "hq.map" in text for text in live.value)
    assert executed(live) == (0, 0)


def test_two_runs_of_one_name_side_by_side(client: Client, tmp_path: Path) -> None:
    """Two drivers on one cluster, runs of the same name, other arguments: neither gets the other's values."""
    found: dict[int, Any] = {}
    trace = str(tmp_path / "trace")

    @hq.workflow
    def study(k: int) -> Any:
        return [scale(trace, [float(k)], factor=2.0) for _ in range(3)]

    def drive(k: int) -> None:
        found[k] = hq.run(study, k, name="study", store=tmp_path / str(k), cluster=client)

    threads = [threading.Thread(target=drive, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: [[2.0 * k]] * 3 for k in range(3)}
    assert traced(Path(trace))["scale"] == 9


def test_batches_and_single_calls_agree_to_the_bit(client: Client, store: Path) -> None:
    """A row's bits depend neither on the batch nor on who computes it: driver, worker, outside of runs."""
    thetas = np.random.default_rng(1).uniform(-3, 3, size=(12, 3))

    @hq.workflow
    def study() -> list[list[float]]:
        return [
            [energy(theta).value for theta in thetas],
            [e.value for e in hq.map(energy, thetas)],
            energy(thetas).value.tolist(),
        ]

    one, mapped, batch = hq.run(study, store=store, cluster=client)
    assert one == mapped == batch == [energy(theta).value for theta in thetas]
    assert all(a != b for a, b in pairwise(one))


# -- signals -------------------------------------------------------------------------------------------------------


@hq.workflow
def told(number: int, path: str) -> float:
    for _ in range(3):
        hq.now()
    if Path(path).exists():
        Path(path).unlink()
        os.kill(os.getpid(), number)
        time.sleep(60)
    return hq.minimize(lambda x: float(x @ x), [0.5], method="COBYLA").fun  # type: ignore[no-any-return]


@pytest.fixture
def unhandled() -> Iterator[None]:
    """Signals as a fresh process has them: what measures coverage has a handler of its own."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize(
    ("number", "error", "code"),
    [(signal.SIGINT, KeyboardInterrupt, ()), (signal.SIGTERM, SystemExit, (143,)), (signal.SIGHUP, SystemExit, (129,))],
)
def test_a_signal_ends_a_run_that_then_goes_on(
    number: int, error: type[BaseException], code: tuple[int, ...], store: Path
) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    asked = store.parent / "asked"
    asked.touch()
    with pytest.raises(error) as caught:
        hq.run(told, int(number), str(asked), name="told", store=store)
    assert caught.value.args == code
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    ends = recorded(store / "told", End)
    assert [end.status for end in ends] == ["interrupted"]
    said = ends[0].error or signal.SIGINT.name
    assert said.endswith(signal.Signals(number).name)
    hq.run(told, int(number), str(asked), name="told", store=store)
    assert [end.status for end in recorded(store / "told", End)] == ["interrupted", "finished"]
    assert len(recorded(store / "told", Event)) == 3


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_whose_exception_is_swallowed_ends_the_run_all_the_same(number: int, store: Path) -> None:
    after: list[str] = []

    @hq.workflow
    def swallows() -> None:
        try:  # as a library does that takes any exception for an answer
            os.kill(os.getpid(), number)
            time.sleep(60)
        except BaseException:  # noqa: BLE001
            after.append("swallowed")
        hq.now()
        after.append("went on")

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        hq.run(swallows, name="swallows", store=store)
    assert after == ["swallowed"]
    assert [end.status for end in recorded(store / "swallows", End)] == ["interrupted"]


def test_a_signal_that_is_handled_or_ignored_stays_so(store: Path) -> None:
    arrived: list[int] = []

    @hq.workflow
    def goes_on() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        return 1

    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        assert hq.run(goes_on, store=store) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, ignored)
    assert arrived == [signal.SIGTERM]


@pytest.mark.usefixtures("unhandled")
def test_a_signal_while_a_run_is_left_does_not_disturb_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @hq.workflow
    def stops() -> None:
        raise KeyboardInterrupt

    real, calls = Journal.close, []

    def close(journal: Journal) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        calls.append(journal)
        real(journal)

    monkeypatch.setattr(Journal, "close", close)
    with pytest.raises(KeyboardInterrupt):
        hq.run(stops, name="stops", store=store)
    assert len(calls) == 1
    assert [end.status for end in recorded(store / "stops", End)] == ["interrupted"]
    assert (store / "stops" / "owner").read_text() == ""


def test_a_run_outside_of_the_main_thread_sets_no_handlers(store: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(hq.run, told, int(signal.SIGTERM), str(store / "none"), store=store).result() < 1e-6


def test_the_workflows_own_error_counts_more_than_a_journal_that_fails(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @hq.workflow
    def fails() -> None:
        def full(*args: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        hq.now()
        monkeypatch.setattr(os, "write", full)
        raise ZeroDivisionError("by nothing")

    with pytest.raises(ZeroDivisionError, match="by nothing") as caught:
        hq.run(fails, name="fails", store=store)
    monkeypatch.undo()
    assert any("writing a record failed (No space left on device)" in note for note in caught.value.__notes__)
    assert recorded(store / "fails", End) == []


def test_a_workflow_that_catches_everything_does_not_go_on_without_a_record(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after: list[str] = []

    @hq.workflow
    def careless() -> int:
        real = os.write

        def once(fd: int, data: bytes) -> int:
            monkeypatch.setattr(os, "write", real)
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        monkeypatch.setattr(os, "write", once)
        try:
            hq.now()
        except Exception:  # noqa: BLE001  # what this is about
            after.append("caught")
        hq.now()
        after.append("went on")
        return 1

    with pytest.raises(JournalError, match="Disk quota exceeded"):
        hq.run(careless, name="careless", store=store)
    assert after == ["caught"]
    assert [end.status for end in recorded(store / "careless", End)] == ["failed"]
