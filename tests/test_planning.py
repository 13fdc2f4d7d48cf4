"""What is known before anything is spent: unknown values, prices by hand, and a run that a plan leaves as it was."""

from __future__ import annotations

import contextvars
import copy
import json
import math
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from distributed import Client
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter, ParameterVector
from qiskit.circuit.library import efficient_su2
from runs import report

import hybridq as hq
from hybridq import dispatch
from hybridq.dispatch import Places
from hybridq.engines.costs import need
from hybridq.language import Overrides, overrides
from hybridq.location import Location
from hybridq.planning import (
    Plan,
    Unknown,
    Unplanned,
    completed,
    cost,
    folded,
    needed,
    origin,
    table,
    unknown_in,
)
from hybridq.policies import Device
from hybridq.program import program
from hybridq.resources import Need

# -- values that are not known -----------------------------------------------------------------------------------------

X = Unknown("study/energy[3]")

STAY_UNKNOWN: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda x: x.value,
    "item": lambda x: x["fun"][0],
    "slice": lambda x: x[1:],
    "method": lambda x: x.get_counts().most_common(3),
    "sum": lambda x: 1 + x + 2.5 - x,
    "product": lambda x: -2 * x @ x / 3 // 2 % 5,
    "power": lambda x: 2**x**2,
    "abs and round": lambda x: round(abs(+x), 3),
    "sum()": lambda x: sum([x, x]),
    "numpy scalar": lambda x: np.float64(2.0) * x,
    "numpy array": lambda x: np.arange(3) - x,
    "universal function": lambda x: np.sqrt(np.cos(x)),
    "copy": lambda x: copy.deepcopy(copy.copy(x)),
}


@pytest.mark.parametrize("make", STAY_UNKNOWN.values(), ids=STAY_UNKNOWN.keys())
def test_what_is_made_of_an_unknown_is_unknown(make: Callable[[Any], Any]) -> None:
    made = make(X)
    assert type(made) is Unknown
    assert origin(made) == "study/energy[3]"
    assert f"{made} {made!r} {made:8.3f}|{made:>5}|{made:x}" == "? ?        ?|    ?|?"


def in_place(x: Any) -> None:
    array = np.zeros(3)
    array += x


def set_item(x: Any) -> None:
    x["a"] = 1


NEED_A_VALUE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "float": (float, "float()"),
    "int": (int, "int()"),
    "bool": (bool, "bool()"),
    "not": (lambda x: not x, "bool()"),
    "less": (lambda x: x < 1, "a comparison"),
    "equal": (lambda x: x == 1, "a comparison"),
    "in": (lambda x: x in [1, 2], "a comparison"),
    "contains": (lambda x: 1 in x, "'in'"),
    "max": (lambda x: max(x, 1), "a comparison"),
    "iteration": (list, "an iteration"),
    "unpacking": (lambda x: [*x], "an iteration"),
    "len": (len, "len()"),
    "hash": (lambda x: {x: 1}, "hash()"),
    "index": (lambda x: [1, 2][x], "an index"),
    "range": (range, "an index"),
    "array": (np.asarray, "a NumPy array"),
    "array of several": (lambda x: np.array([x, 1.0]), "a NumPy array"),
    "mean": (lambda x: np.mean([x, 1.0]), "a NumPy array"),
    "in place": (in_place, "numpy.add into an array"),
    "math": (math.sin, "float()"),
    "percent": ("%.3f".__mod__, "float()"),
    "setting an item": (set_item, "setting an item"),
    "setting an attribute": (lambda x: setattr(x, "a", 1), "setting its attribute 'a'"),
    "pickle": (pickle.dumps, "pickling"),
}


@pytest.mark.parametrize(("use", "what"), NEED_A_VALUE.values(), ids=NEED_A_VALUE.keys())
def test_what_needs_the_value_ends_the_body(use: Callable[[Any], Any], what: str) -> None:
    assert not issubclass(Unplanned, Exception)  # a workflow's own handlers do not get it
    with pytest.raises(Unplanned) as caught:
        use(X)
    assert (caught.value.at, caught.value.what) == ("study/energy[3]", what)
    assert str(caught.value) == f"the value of study/energy[3] is not known in a plan, and {what} needs it"


@dataclass
class Pair:
    left: Any
    right: Any


def test_unknowns_are_found_wherever_they_are() -> None:
    objects = np.empty(2, dtype=object)
    objects[1] = X
    for value in (X, [1, (2, X)], {"a": {"b": X}}, Pair(1, [X]), objects, scipy.optimize.OptimizeResult(x=X)):
        assert unknown_in(value) is X
    for value in (None, 1, "?", np.zeros(3), Pair(1, "x"), [Pair(1, {"a": 2})]):
        assert unknown_in(value) is None
    several = [Unknown(f"s/point[{i}]/energy[0]") for i in (3, 1, 1)]
    assert needed(several) == "s/point[*]/energy[0]"
    assert needed([several, {"a": X}]) == "s/point[*]/energy[0] and others"
    assert needed(several[:1]) == "s/point[3]/energy[0]"
    assert folded(["a/b[0]/c[1]", "a/b[1]/c[1]"]) == "a/b[*]/c[1]"


# -- prices ------------------------------------------------------------------------------------------------------------

A = ParameterVector("a", 2)
CIRCUIT = QuantumCircuit(2)
CIRCUIT.ry(A[0], 0)
CIRCUIT.ry(A[1], 1)
CIRCUIT.cx(0, 1)
TERMS = {"ZZ": 1.0, "XI": 0.5, "IX": 0.25}  # qubit-wise: {ZZ}, {XI, IX}; commuting: {ZZ}, {XI, IX} as well
HUGE = QuantumCircuit(60)
HUGE.h(0)
BITS = QuantumCircuit(1)
BITS.ry(Parameter("b"), 0)

COSTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "exact": (
        hq.expval(CIRCUIT, TERMS, [0.1, 0.2]),
        "none",
        {"qubits": 2, "depth": 2, "two_qubit_gates": 1, "paulis": 3, "groups": 0, "circuits": 1, "shots": 0},
    ),
    "rows": (hq.expval(CIRCUIT, TERMS, np.zeros((5, 2))), "none", {"circuits": 5, "shots": 0}),
    "sampled": (
        hq.expval(CIRCUIT, TERMS, [0.1, 0.2], shots=300),
        "none",
        {"groups": 2, "circuits": 2, "shots": 300, "sampling": "probabilities", "grouping": "qubit-wise"},
    ),
    "sampled rows": (
        hq.expval(CIRCUIT, TERMS, np.zeros((5, 2)), shots=300),
        "none",
        {"groups": 2, "circuits": 10, "shots": 1500},
    ),
    "two observables": (
        hq.expval(CIRCUIT, [TERMS, "ZI"], [0.1, 0.2], shots=300),
        "none",
        {"groups": 3, "circuits": 3, "shots": 600},
    ),
    "nothing to measure": (
        hq.expval(CIRCUIT, "II", [0.1, 0.2], shots=300),
        "none",
        {"groups": 0, "circuits": 1, "shots": 0},
    ),
    # each of the two angles shifted up and down, beside the point itself
    "shifted": (
        hq.expval(CIRCUIT, TERMS, [0.1, 0.2], shots=300),
        "parameter-shift",
        {"groups": 2, "circuits": 10, "shots": 1500, "gradient": "parameter-shift"},
    ),
    "spsa": (hq.expval(CIRCUIT, TERMS, np.zeros((2, 2)), shots=10), "spsa", {"circuits": 12, "shots": 60}),
    "adjoint": (hq.expval(CIRCUIT, TERMS, [0.1, 0.2]), "adjoint", {"circuits": 1, "engine": "adjoint"}),
    "bits": (hq.sample(BITS, [[0.1], [0.2]], shots=50), "none", {"groups": 0, "circuits": 2, "shots": 100}),
    # su2 with one layer on three qubits: 12 rotations in four layers, and two CX in a row
    "library": (
        hq.expval(efficient_su2(3, reps=1), "ZZZ", np.zeros(12)),
        "none",
        {"qubits": 3, "depth": 6, "two_qubit_gates": 2, "paulis": 1},
    ),
}


@pytest.mark.parametrize(("request_", "gradient", "expected"), COSTS.values(), ids=COSTS.keys())
def test_costs_by_hand(request_: Any, gradient: str, expected: dict[str, Any]) -> None:
    asked = program(request_, seed=0, location=Location("f"), gradient=gradient)
    found = cost(asked, need(asked))
    assert {key: getattr(found, key) for key in expected} == expected
    assert (found.bytes, found.seconds, found.reason) == (need(asked).bytes, need(asked).seconds, asked.plan.reason)


def test_too_few_shots_are_refused_before_they_are_spent() -> None:
    asked = program(hq.expval(CIRCUIT, TERMS, [0.1, 0.2], shots=1), seed=0, location=Location("f"))
    with pytest.raises(hq.WorkflowError, match="need 2 different measurements"):
        cost(asked, need(asked))


def test_parameters_that_are_not_known_are_zeros_of_their_shape() -> None:
    for theta, expected in (
        (X, [0.0, 0.0]),
        ([X, 0.5], [0.0, 0.5]),
        ([[0.1, X], [X, 0.2]], [[0.1, 0.0], [0.0, 0.2]]),
        ([X, X, X], [[0.0, 0.0]] * 3),
        (np.array([0.1, 0.2]), [0.1, 0.2]),
    ):
        request, _ = completed(hq.expval(CIRCUIT, TERMS, theta))
        assert request is not None
        assert np.asarray(request.theta).tolist() == expected
    by_name, missing = completed(hq.expval(CIRCUIT, TERMS, {A[0]: X, A[1]: 0.5}))
    assert by_name is not None
    assert (dict(by_name.theta), missing) == ({A[0]: 0.0, A[1]: 0.5}, "study/energy[3]")
    for request in (hq.expval(X, TERMS, 0.1), hq.expval(CIRCUIT, {"ZZ": X}, 0.1), hq.sample(CIRCUIT, 0.1, shots=X), X):
        assert completed(request) == (None, "study/energy[3]")


def test_where_a_call_goes() -> None:
    site = Places((Device("w", 2, 2**60, 2),), "the cluster")
    assert site.placed(Need(10, 0.001), alone=True) == "the driver's engine"
    assert site.placed(Need(10, 0.001), alone=False) == "the cluster"
    assert site.placed(Need(2**59, 0.001), alone=True) == "the cluster"
    small = Places((Device("w", 2, 5, 2),), "the cluster")
    assert small.placed(Need(10, 100.0), alone=True) == "the driver's engine"  # it fits nowhere else
    with pytest.raises(hq.TooLarge, match="10 "):
        small.placed(Need(10, 100.0), alone=False)
    with pytest.raises(hq.TooLarge):
        site.placed(Need(2**61, 1.0), alone=True)


def test_where_a_long_call_goes_in_parts() -> None:
    site = Places((Device("w", 2, 100, 2), Device("v", 2, 100, 2)), "the cluster")
    assert site.placed(Need(10, 60.0), alone=True, divisible=(100, 1)) == "the cluster, in 4 parts side by side"
    assert site.placed(Need(60, 60.0), alone=True, divisible=(1, 9)) == "the cluster, in 2 parts side by side"
    assert site.placed(Need(10, 60.0), alone=True, divisible=(3, 1)) == "the cluster, in 3 parts side by side"
    for alone, divisible, seconds in ((True, (1, 1), 60.0), (False, (9, 9), 60.0), (True, (9, 9), 0.13)):
        assert site.placed(Need(10, seconds), alone=alone, divisible=divisible) == "the cluster"


# -- plans of workflows ------------------------------------------------------------------------------------------------


def planned(workflow: Callable[..., Any], *args: Any, **options: Any) -> tuple[dict[str, Any], BaseException | None]:
    """Plan as the command line does, with whatever would evaluate something made to fail; and how it ended."""
    asked, ended = Overrides(plan=True), None

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a plan evaluates nothing")

    def inner() -> None:
        nonlocal ended
        overrides.set(asked)
        try:
            hq.run(workflow, *args, **{"workers": 2, **options})
        except (Unplanned, Exception) as error:  # noqa: BLE001  # whatever it is, it is looked at
            ended = error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "driver_engine", refuse)
        for name in ("evaluate", "submit", "advance"):
            patch.setattr(dispatch.Dispatcher, name, refuse)
        contextvars.copy_context().run(inner)
    assert not isinstance(ended, AssertionError), ended
    (document,) = asked.plans
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert all(len(line) <= 120 for line in table(document).splitlines() if not line.startswith("  the job"))
    return document, ended


def brief(document: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Of each row: where, how many, circuits, shots, and of a loop how many and its evaluations at the limit."""
    return [
        (row["at"], row["count"], row["circuits"], row["shots"])
        + (() if row["loop"] is None else (row["loop"]["count"], (row["loop"]["at_limit"] or {}).get("evaluations")))
        for row in document["calls"]
    ]


def gaps(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(gap["at"], gap["needs"]) for gap in document["not_planned"]]


@hq.quantum
def energy(theta: Any) -> Any:
    return hq.expval(CIRCUIT, TERMS, theta)


@hq.quantum
def part(theta: Any, label: str) -> Any:
    return hq.expval(CIRCUIT, label, theta)


@hq.quantum
def sampled(theta: Any) -> Any:
    return hq.expval(CIRCUIT, TERMS, theta, shots=300)


@hq.quantum
def bits(theta: Any) -> Any:
    return hq.sample(BITS, theta, shots=50)


@hq.quantum
def huge() -> Any:
    return hq.expval(HUGE, "Z" * 60)


@hq.quantum
def rotated(theta: Any) -> Any:
    return hq.expval(CIRCUIT, TERMS, np.asarray(theta) + 0.1)


@hq.quantum
def of(circuit: Any, theta: Any) -> Any:
    return hq.expval(circuit, TERMS, theta)


@hq.workflow
def one_loop(start: Any = (0.1, 0.2), maxiter: int = 30) -> Any:
    return hq.minimize(energy, start, method="COBYLA", options={"maxiter": maxiter}).fun


@hq.workflow
def map_of_loops(count: int) -> Any:
    return hq.map(one_loop, [np.full(2, 0.1 * i) for i in range(count)])


@hq.workflow
def chain() -> Any:
    """Each stage goes on from the one before."""
    rough = hq.minimize(sampled, [0.1, 0.2], method="Nelder-Mead", options={"maxfev": 20})
    fine = hq.minimize(energy, rough.x, method="L-BFGS-B", jac="auto", options={"maxiter": 9})
    return {"energy": fine.fun, "check": sampled(fine.x), "half": energy([fine.x[0], 0.5]).value / 2}


@hq.workflow
def branches() -> Any:
    try:
        if energy([0.1, 0.2]) < 0:
            sampled([0.1, 0.2])
    except Exception:  # noqa: BLE001  # must not get what ends the plan
        sampled([0.3, 0.4])
    return energy([0.5, 0.6])


@hq.workflow
def nested() -> Any:
    """One that ends within, one that does not; the caller goes on with both."""
    stopped = branches()
    futures = [branches.submit(), one_loop.submit()]
    return [stopped, one_loop(), *(f.result() for f in futures)]


@hq.workflow
def everything_quantum() -> Any:
    future = sampled.submit([0.1, 0.2])
    batch = hq.map(energy, [[0.1 * i, 0.2] for i in range(4)])
    counts = bits([0.3]).get_counts()
    return hq.gradient(energy, [0.1, 0.2]), future.result(), batch, counts, energy(np.zeros((3, 2)))


def plain(x: Any, shift: float) -> float:
    return 2.0 * float(part(x, "ZZ")) + max(float(part(x, "XI")), float(sampled(x).stderr)) + shift


@hq.workflow
def plain_loop() -> Any:
    return hq.minimize(plain, [0.1, 0.2], args=(0.5,), method="Nelder-Mead", options={"maxfev": 40})


def slope(x: Any) -> Any:
    values = energy(np.asarray(x) + np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]) * np.pi / 2).value
    return [(values[0] - values[1]) / 2, (values[2] - values[3]) / 2]


def room(x: Any) -> float:
    return 0.5 - float(part(x, "IZ"))


def watch(x: Any) -> None:
    energy(x)


@hq.workflow
def with_callables() -> Any:
    return hq.minimize(
        energy, [0.1, 0.2], method="SLSQP", jac=slope, callback=watch, options={"maxiter": 9},
        constraints=[{"type": "ineq", "fun": room}],
    )  # fmt: skip


def inner_loop(x: Any) -> float:
    found = hq.minimize(energy, x, method="COBYLA", options={"maxiter": 5})
    return float(found.fun) + float(part(found.x, "ZZ"))


@hq.workflow
def loop_in_a_loop() -> Any:
    return hq.minimize(inner_loop, [0.1, 0.2], method="COBYLA", options={"maxiter": 7})


def random_search(fun: Any, x0: Any, args: tuple[Any, ...] = (), **_: Any) -> Any:
    return scipy.optimize.OptimizeResult(x=x0, fun=fun(x0, *args))


@hq.workflow
def custom() -> Any:
    return hq.minimize(sampled, [0.1, 0.2], method=random_search)


@hq.workflow
def unpriced() -> Any:
    first = one_loop()
    start = hq.minimize(energy, [0.1, 0.2], method="COBYLA").x
    return rotated(start), of(first, [0.1, 0.2]), hq.minimize(of, [0.1, 0.2], args=(first,))


@hq.workflow
def primitives() -> Any:
    job = hq.Estimator().run([(CIRCUIT, "ZZ", [0.1, 0.2]), (CIRCUIT, "ZZ", [0.1, 0.2], 0.1)])
    measured = CIRCUIT.copy()
    measured.measure_all()
    hq.Sampler(default_shots=64).run([(measured, [0.1, 0.2])])
    return job.result()[0].data.evs


PLANS: dict[str, tuple[Any, tuple[Any, ...], list[tuple[Any, ...]], list[tuple[str, str]]]] = {
    "one loop": (
        one_loop,
        (),
        [("one_loop/minimize[0]/energy", 1, 1, 0, 1, 30)],
        [("one_loop", "one_loop/minimize[0]")],
    ),
    "map of loops": (
        map_of_loops,
        (5,),
        [("map_of_loops/one_loop[*]/minimize[0]/energy", 5, 5, 0, 5, 150)],
        [("map_of_loops", "map_of_loops/one_loop[*]/minimize[0]")],
    ),
    "chain": (
        chain,
        (),
        [
            ("chain/minimize[0]/sampled", 1, 2, 300, 1, 20),
            ("chain/minimize[1]/energy", 1, 1, 0, 1, 10),  # value and gradient in one; the first and nine iterations
            ("chain/sampled[0]", 1, 2, 300),
            ("chain/energy[0]", 1, 1, 0),
        ],
        [("chain", "chain/minimize[1] and others")],
    ),
    "branches": (branches, (), [("branches/energy[0]", 1, 1, 0)], [("branches", "branches/energy[0]")]),
    "nested": (
        nested,
        (),
        [
            ("nested/branches[0]/energy[0]", 1, 1, 0),  # in the caller's own thread, so at hand
            ("nested/branches[1]/energy[0]", 1, 1, 0),  # beside others, so on the cluster
            ("nested/one_loop[0]/minimize[0]/energy", 1, 1, 0, 1, 30),
            ("nested/one_loop[1]/minimize[0]/energy", 1, 1, 0, 1, 30),
        ],
        [("nested/branches[*]", "nested/branches[*]/energy[0]"), ("nested", "nested/branches[*] and others")],
    ),
    "everything quantum": (
        everything_quantum,
        (),
        [
            ("everything_quantum/sampled[0]", 1, 2, 300),
            ("everything_quantum/energy[*]", 4, 4, 0),
            ("everything_quantum/bits[0]", 1, 1, 50),
            ("everything_quantum/energy_gradient[0]", 1, 1, 0),
            ("everything_quantum/energy[4]", 1, 3, 0),
        ],
        [("everything_quantum", "everything_quantum/energy_gradient[0] and others")],
    ),
    "plain objective": (
        plain_loop,
        (),
        [  # two exact values and one of 300 shots in two groups for each of at most 40 evaluations
            ("plain_loop/minimize[0]/plain/part[*]", 2, 2, 0, 1, 80),
            ("plain_loop/minimize[0]/plain/sampled[0]", 1, 2, 300, 1, 40),
        ],
        [("plain_loop", "plain_loop/minimize[0]")],
    ),
    "callables of a loop": (
        with_callables,
        (),
        [
            ("with_callables/minimize[0]/energy", 1, 1, 0, 1, 10),
            ("with_callables/minimize[0]/jac/energy[0]", 1, 4, 0, 1, 10),
            ("with_callables/minimize[0]/constraint_fun/part[0]", 1, 1, 0, 1, 10),
        ],
        [("with_callables", "with_callables/minimize[0]")],
    ),
    "loop in a loop": (
        loop_in_a_loop,
        (),
        [
            ("loop_in_a_loop/minimize[0]/inner_loop/minimize[0]/energy", 1, 1, 0, 1, 35),
            ("loop_in_a_loop/minimize[0]/inner_loop/part[0]", 1, 1, 0, 1, 7),
        ],
        [("loop_in_a_loop", "loop_in_a_loop/minimize[0]")],
    ),
    "custom method": (
        custom, (), [("custom/minimize[0]/sampled", 1, 2, 300, 1, None)], [("custom", "custom/minimize[0]")],
    ),
    "not priced": (
        unpriced,
        (),
        [
            ("unpriced/one_loop[0]/minimize[0]/energy", 1, 1, 0, 1, 30),
            ("unpriced/minimize[0]/energy", 1, 1, 0, 1, 1000),
        ],
        [
            ("unpriced/rotated[0]", "unpriced/minimize[0]"),
            ("unpriced/of[0]", "unpriced/one_loop[0]/minimize[0]"),
            ("unpriced/minimize[1]/of", "unpriced/one_loop[0]/minimize[0]"),
            ("unpriced", "unpriced/rotated[0] and others"),
        ],
    ),
    "primitives": (
        primitives,
        (),
        [
            ("primitives/estimator[0]/pub[0]", 1, 1, 0),
            ("primitives/estimator[0]/pub[1]", 1, 1, 100),  # 1 / 0.1^2 shots
            ("primitives/sampler[0]/pub[0]", 1, 1, 64),
        ],
        [("primitives", "primitives/estimator[0]/pub[0]")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("workflow", "args", "rows", "missing"), PLANS.values(), ids=PLANS.keys())
def test_plans_by_hand(workflow: Any, args: Any, rows: Any, missing: Any, store: Path) -> None:
    document, ended = planned(workflow, *args, name="p", store=store)
    assert isinstance(ended, Unplanned)
    assert sorted(brief(document)) == sorted(rows)
    assert sorted(gaps(document)) == sorted(missing)
    assert document["answered"] == {"evaluations": 0, "steps": 0}
    assert document["refusals"] == []
    kinds = Counter(json.loads(line)["k"] for line in (store / "p/journal.jsonl").read_text().splitlines())
    assert kinds == Counter(run=1, opened=1, end=1)  # and nothing that was priced
    text = table(document)
    assert all(row["at"] in text and row["reason"][:20] in text for row in document["calls"])


def test_sums_and_places(store: Path) -> None:
    document, _ = planned(chain, name="p", store=store)
    totals = document["totals"]
    assert totals["calls"] == {"count": 2, "circuits": 3, "shots": 300, "seconds": totals["calls"]["seconds"]}
    assert totals["at_limit"]["evaluations"] == 30
    assert (totals["at_limit"]["circuits"], totals["at_limit"]["shots"]) == (50, 6000)
    assert totals["bytes"] == max(row["bytes"] for row in document["calls"])
    assert {row["device"] for row in document["calls"]} == {"the driver's engine"}  # nothing runs beside it
    document, _ = planned(map_of_loops, 5, name="q", store=store)
    assert [row["device"] for row in document["calls"]] == ["the local cluster"]
    loop = document["calls"][0]["loop"]
    assert (loop["method"], loop["per_iteration"], loop["limit"], loop["limited_by"]) == (
        "COBYLA", [1, 1], 30, "maxiter=30",
    )  # fmt: skip
    document, _ = planned(custom, name="r", store=store)
    assert document["totals"]["at_limit"] is None
    assert "no limit" in table(document)
    assert table(Plan().document(lambda *_: "")) == "nothing is to be evaluated"


# -- refusals ----------------------------------------------------------------------------------------------------------


@hq.workflow
def too_large(catch: bool) -> Any:
    found = hq.map(choose, [True, False, True], return_exceptions=True)
    try:
        huge()
    except hq.TooLarge:
        if not catch:
            raise
    return [type(value).__name__ for value in found], energy([0.1, 0.2])


@hq.workflow
def choose(large: bool) -> Any:
    return huge() if large else energy([0.1, 0.2])


@pytest.mark.parametrize("catch", [True, False])
def test_what_fits_nowhere_is_told_with_both_numbers(catch: bool, store: Path) -> None:
    document, ended = planned(too_large, catch, name="p", store=store)
    assert isinstance(ended, Unplanned if catch else hq.TooLarge)
    refusals = document["refusals"]
    assert sorted(r["at"] for r in refusals) == [
        "too_large/choose[0]/huge[0]", "too_large/choose[2]/huge[0]", "too_large/huge[0]",
    ]  # fmt: skip
    assert all(r["needs"] > 2**63 > r["has"] > 0 and f"{r['needs']:,}" in r["message"] for r in refusals)
    rows = [("too_large/choose[1]/energy[0]", 1, 1, 0), ("too_large/energy[0]", 1, 1, 0)]
    assert brief(document) == rows[: 1 + catch]
    assert table(document).startswith("refused  too_large/")
    assert all(json.loads(line)["k"] != "failure" for line in (store / "p/journal.jsonl").read_text().splitlines())


# -- classical steps run, and what a plan leaves behind ----------------------------------------------------------------


@hq.classical
def prepare(i: int) -> Any:
    return {"start": np.array([0.1 * i, 0.3]), "noise": float(hq.rng().normal())}


@hq.classical
def collect(values: Any) -> float:
    return float(sum(values))


def stepped(x: Any) -> float:
    return float(part(x, "ZZ")) + float(collect([1.0]))


@hq.workflow
def point(i: int) -> Any:
    p = prepare(i)
    found = hq.minimize(energy, p["start"], method="COBYLA", options={"maxiter": 12})
    return {"noise": p["noise"], "fun": found.fun, "value": sampled(found.x)}


@hq.workflow
def study(count: int) -> Any:
    points = hq.map(point, range(count))
    inner = hq.minimize(stepped, [0.1, 0.2], method="COBYLA", options={"maxiter": 6})
    order = [f.result()["noise"] for f in hq.as_completed([prepare.submit(10 + i) for i in range(2)])]
    total = collect([p["fun"] for p in points])
    return {"points": points, "inner": inner.fun, "order": sorted(order), "total": total, "last": collect([0.5])}


def exact(value: Any) -> Any:
    if isinstance(value, hq.Estimate):
        return "Estimate", value.value, value.stderr, value.shots
    if isinstance(value, dict):
        return {key: exact(v) for key, v in value.items()}
    return [exact(v) for v in value] if isinstance(value, list) else value


def cut(directory: str | Path, kept: int, store: Path) -> None:
    copied = store / Path(directory).name
    shutil.copytree(directory, copied)
    lines = (copied / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (copied / "journal.jsonl").write_bytes(b"".join(lines[:kept]))


def entries(directory: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(directory) / "journal.jsonl").read_text().splitlines()]


def test_a_planned_run_is_the_run(client: Client, tmp_path: Path) -> None:
    options = {"name": "study", "seed": 3, "cluster": client}
    document, ended = planned(study, 3, store=tmp_path / "planned", **options)
    assert isinstance(ended, Unplanned)
    steps = {(s["at"], s["count"], s["state"], s["needs"]) for s in document["steps"]}
    assert steps == {
        ("study/point[*]/prepare[0]", 3, "ran", None),
        ("study/minimize[0]/stepped/collect[0]", 1, "in a loop", "study/minimize[0]"),
        ("study/prepare[*]", 2, "ran", None),
        ("study/collect[0]", 1, "waits", "study/point[*]/minimize[0]"),
        ("study/collect[1]", 1, "ran", None),
    }
    assert sorted(brief(document)) == [
        ("study/minimize[0]/stepped/part[0]", 1, 1, 0, 1, 6),
        ("study/point[*]/minimize[0]/energy", 3, 3, 0, 3, 36),
        ("study/point[*]/sampled[0]", 3, 6, 900),
    ]
    left = Counter(e["k"] for e in entries(tmp_path / "planned/study"))
    assert left == Counter(run=1, opened=1, code=2, step=6, event=2, end=1)

    live = report(study, 3, store=tmp_path / "live", **options)
    after = report(study, 3, store=tmp_path / "planned", **options)
    assert exact(after.value) == exact(live.value)
    assert after.evaluations_executed == live.evaluations_executed
    in_loop = sum(e["k"] == "step" and "minimize" in e["at"] for e in entries(live.directory))
    assert (after.steps_replayed, after.steps_executed) == (6, in_loop + 1)
    assert live.steps_executed == 6 + in_loop + 1

    finished, ended = planned(study, 3, store=tmp_path / "planned", **options)
    assert ended is None
    assert finished["calls"] == finished["not_planned"] == []
    assert finished["answered"]["steps"] == live.steps_executed
    assert entries(after.directory)[-1]["status"] == "finished"

    # cut in the middle of a loop, and where an objective is half evaluated
    lines = entries(live.directory)
    rows = [i for i, e in enumerate(lines) if e["k"] == "row"]
    half = next(i for i, e in enumerate(lines) if e.get("at", "").endswith("stepped[3]/part[0]"))
    for number, kept in enumerate((rows[8] + 1, half + 1)):
        store = tmp_path / str(number)
        cut(live.directory, kept, store)
        document, ended = planned(study, 3, store=store, **options)
        assert isinstance(ended, Unplanned)
        loops = {row["loop"]["at"]: row["loop"] for row in document["calls"] if row["loop"]}
        assert sum(loop["done"] for loop in loops.values()) == (9 if number == 0 else 3)
        if number == 0:
            assert loops["study/point[*]/minimize[0]"]["at_limit"]["evaluations"] == 36 - 9  # none has ended
        else:
            assert loops["study/minimize[0]"]["at_limit"]["evaluations"] == 3
            assert len(document["calls"]) == 1
        resumed = report(study, 3, store=store, **options)
        assert exact(resumed.value) == exact(live.value)


# -- odds and ends -----------------------------------------------------------------------------------------------------


@hq.workflow
def times() -> Any:
    begun = hq.now()
    first = [f for f in hq.as_completed([energy.submit([0.1, 0.2]), energy.submit([0.3, 0.4])])]
    return begun, first


def never_ends(x: Any) -> float:
    while float(energy(x)) > -1.0:
        pass
    return 0.0


def divides(x: Any) -> float:
    return 1.0 / float(energy(x))


def asks_time(x: Any) -> float:
    futures = [energy.submit(x), energy.submit(x)]
    return hq.now() * sum(float(f.result()) for f in hq.as_completed(futures))


@hq.workflow
def tries(objective: str) -> Any:
    objectives = {"never_ends": never_ends, "divides": divides, "asks_time": asks_time}
    return hq.minimize(objectives[objective], [0.1, 0.2], method="COBYLA", options={"maxiter": 4})


def test_orders_of_completion_are_not_invented(store: Path) -> None:
    document, ended = planned(times, name="p", store=store)
    assert isinstance(ended, Unplanned)
    assert ended.what == "hq.as_completed"
    assert brief(document) == [("times/energy[*]", 2, 2, 0)]
    assert [e["at"] for e in entries(store / "p") if e["k"] == "event"] == ["times/now[0]"]


def test_one_evaluation_is_tried_with_zeros_and_leaves_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridq.runner._LONGEST_TRIAL", 50)
    document, _ = planned(tries, "never_ends", name="a", store=store)
    assert [row["count"] for row in document["calls"]] == [50]
    assert "more than 50 calls" in document["not_planned"][0]["why"]
    document, _ = planned(tries, "divides", name="b", store=store)
    assert brief(document) == [("tries/minimize[0]/divides/energy[0]", 1, 1, 0, 1, 4)]
    assert "ZeroDivisionError" in document["not_planned"][0]["why"]
    document, _ = planned(tries, "asks_time", name="c", store=store)
    assert brief(document) == [("tries/minimize[0]/asks_time/energy[*]", 2, 2, 0, 1, 8)]
    assert all(e["k"] in ("run", "opened", "end") for name in "abc" for e in entries(store / name))


@hq.workflow
def wrong() -> Any:
    return energy([0.1, 0.2, 0.3])


def test_what_is_written_wrongly_is_told_as_in_a_run(store: Path) -> None:
    document, ended = planned(wrong, name="p", store=store)
    assert isinstance(ended, hq.WorkflowError)
    assert "the circuit has 2 parameters" in str(ended)
    assert document["calls"] == []
    assert entries(store / "p")[-1]["status"] == "failed"


def test_a_finished_run_is_answered_whole(store: Path) -> None:
    report(one_loop, (0.1, 0.2), 6, name="p", store=store)
    again, ended = planned(one_loop, (0.1, 0.2), 6, name="p", store=store)
    assert (ended, again["answered"]["evaluations"]) == (None, 6)
