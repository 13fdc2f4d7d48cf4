"""What is recorded, what a replay answers, what it refuses, and how a run goes on after a failure."""

from __future__ import annotations

import importlib.util
import itertools
import json
import linecache
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from distributed import Client
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter, ParameterVector
from qiskit.quantum_info import SparsePauliOp
from runs import executed, journal, replayed, report, traced, write_trace
from scipy.optimize import LbfgsInvHessProduct, OptimizeResult

import hybridq as hq
from hybridq.dispatch import Dispatcher
from hybridq.engines import process
from hybridq.language import RunReport
from hybridq.steps import pack_call

ANGLES = ParameterVector("angle", 2)
CIRCUIT = QuantumCircuit(2)
CIRCUIT.ry(ANGLES[0], 0)
CIRCUIT.ry(ANGLES[1], 1)
CIRCUIT.cx(0, 1)
TERMS = {"ZZ": 1.0, "XI": 0.5, "IX": 0.25}


def closed_form(theta: Any) -> float:
    """Of the circuit above, by hand: CX turns ZZ into Z1 and XI into XI, and IX into XX."""
    a, b = theta
    return float(np.cos(b) + 0.5 * np.sin(b) + 0.25 * np.sin(a) * np.sin(b))


@hq.quantum
def energy(theta: Any) -> Any:
    return hq.expval(CIRCUIT, TERMS, theta)


@hq.quantum
def part(theta: Any, label: str) -> Any:
    return hq.expval(CIRCUIT, label, theta)


@hq.quantum
def sampled(theta: Any) -> Any:
    return hq.expval(CIRCUIT, TERMS, theta, shots=300)


def count(directory: str | Path) -> Counter[str]:
    return Counter(e["k"] for e in journal(directory))


def cut(directory: str | Path, kept: int, store: Path) -> Path:
    """A copy of a run in another store with the first ``kept`` lines of its journal: what a kill leaves."""
    copy = store / Path(directory).name
    shutil.copytree(directory, copy)
    lines = (copy / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert 2 <= kept < len(lines)
    (copy / "journal.jsonl").write_bytes(b"".join(lines[:kept]))
    return copy


def exact(value: Any) -> Any:
    """A value in a form that compares to the type and the bit."""
    if isinstance(value, dict):  # trust-constr measures its own time
        return type(value).__name__, [(k, exact(v)) for k, v in value.items() if k != "execution_time"]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [exact(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return type(value).__name__, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return "float", value.hex()
    if isinstance(value, LbfgsInvHessProduct):
        return "LbfgsInvHessProduct", exact([value.sk, value.yk])
    return type(value).__name__, value


# -- circuits and observables that change between two calls ------------------------------------------------------------

RENAMED = Parameter("zz")
BETWEEN: list[Callable[[Any, Any], Any]] = [
    lambda c, o: None,
    lambda c, o: None,
    lambda c, o: c.data.__setitem__(2, c.data[2].replace(qubits=c.data[2].qubits[::-1])),
    lambda c, o: o.coeffs.__setitem__(1, 3.0),
    lambda c, o: o.paulis.x.__setitem__((1, 0), True),
    lambda c, o: None,
    lambda c, o: c.assign_parameters({ANGLES[0]: RENAMED}, inplace=True),  # which comes last from here on
    lambda c, o: setattr(c, "global_phase", 1.0),
    lambda c, o: c.h(0),
    lambda c, o: None,
]


@hq.quantum
def given(circuit: Any, observable: Any, theta: Any) -> Any:
    return hq.expval(circuit, observable, theta)


def edited(fresh: bool) -> list[float]:
    """Values after each edit; of the objects that are edited, or of copies of them that nobody has seen."""
    circuit, observable, values = CIRCUIT.copy(), SparsePauliOp(["ZZ", "XI"], [1.0, 0.5]), []
    for number, edit in enumerate(BETWEEN):
        edit(circuit, observable)
        theta: Any = [0.4, -0.7]
        if number % 2:  # by name, which has to be one of the circuit as it is
            theta = dict(zip([p.name for p in circuit.parameters], theta, strict=True))
        seen = (circuit.copy(), observable.copy()) if fresh else (circuit, observable)
        values.append(given(*seen, theta).value)
    return values


@hq.workflow
def editing() -> list[float]:
    return edited(fresh=False)


def test_an_edit_between_two_calls_is_seen(store: Path) -> None:
    found = report(editing, store=store)
    assert exact(found.value) == exact(edited(fresh=True))
    assert len(set(found.value)) >= 5
    assert executed(found) == (len(BETWEEN), 0)
    entries = journal(found.directory)
    programs = [e["program"] for e in entries if e["k"] == "eval"]
    assert [later == earlier for earlier, later in itertools.pairwise(programs)] == [
        edit.__code__.co_code == BETWEEN[0].__code__.co_code for edit in BETWEEN[1:]
    ]
    assert {e["program"] for e in entries if e["k"] == "circuit"} == set(programs)
    again = report(editing, store=store)
    assert replayed(again) == (len(BETWEEN), 0)
    assert exact(again.value) == exact(found.value)


# -- what the driver's engine begins before it is looked at ------------------------------------------------------------


@hq.quantum
def any_of(theta: Any, circuit: Any, observable: Any, shots: int | None) -> Any:
    if observable is None:
        return hq.sample(circuit, theta, shots=shots)
    return hq.expval(circuit, observable, theta, shots=shots)


@hq.quantum
def wrongly(theta: Any, circuit: Any, observable: Any, shots: int | None) -> Any:
    hq.expval(circuit, observable, theta, shots=shots)  # and nothing is returned


def one_after_the_other(seed: int) -> list[Any]:
    """Values, gradients, samples and failures of a few circuits, some changed in place, in a random order."""
    rng = np.random.default_rng(seed)
    circuits = [CIRCUIT.copy(), CIRCUIT.copy()]
    observables: list[Any] = [SparsePauliOp(["ZZ", "XI"], [1.0, 0.5]), "ZX"]
    found: list[Any] = []
    for _ in range(60):
        circuit = circuits[int(rng.random() < 0.1)]
        observable = observables[int(rng.random() < 0.1)]
        theta = rng.uniform(-1, 1, 2)
        match rng.choice(["value", "list", "gradient", "shots", "bits", "edit", "bad", "rows", "none"],
                         p=[0.4, 0.1, 0.15, 0.1, 0.05, 0.1, 0.04, 0.03, 0.03]):  # fmt: skip
            case "value":
                found.append(any_of(theta, circuit, observable, None))
            case "list":
                found.append(any_of(theta.tolist(), circuit, observable, None))
            case "gradient":
                found.append(hq.gradient(any_of, theta, circuit, observable, None, method="adjoint"))
            case "shots":
                found.append(any_of(theta, circuit, observable, 100))
            case "bits":
                found.append(any_of(theta, circuit, None, 20).array)
            case "edit" if rng.random() < 0.5:
                circuit.global_phase += 0.5
                circuit.ry(0.25, 0)
            case "edit":
                observables[0].coeffs[0] += 0.125
            case "bad":
                theta[1] = np.nan
                with pytest.raises(hq.NotFinite):
                    any_of(theta, circuit, observable, None)
            case "none":
                with pytest.raises(hq.WorkflowError, match="returned None"):
                    wrongly(theta, circuit, observable, None)
            case "rows":
                found.append(any_of(np.stack([theta, 2 * theta]), circuit, observable, None))
    return found


@hq.workflow
def many_kinds(seed: int) -> list[Any]:
    return one_after_the_other(seed)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_begun_before_it_is_looked_at_changes_nothing(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    ahead = Dispatcher.ahead

    def noted(self: Dispatcher, guess: Any) -> None:
        begun.append(guess)
        ahead(self, guess)

    monkeypatch.setattr(Dispatcher, "ahead", noted)
    monkeypatch.setattr("hybridq.runner._BRIEF", 60.0)  # a busy machine may take long
    found = report(many_kinds, seed, name="ahead", store=tmp_path)
    assert len(begun) > 10
    begun.clear()
    again = report(many_kinds, seed, name="ahead", store=tmp_path)
    assert not begun  # what is recorded is not evaluated
    monkeypatch.setattr(Dispatcher, "ahead", lambda self, guess: None)
    plain = report(many_kinds, seed, name="plain", store=tmp_path)
    once, twice, without = (exact([vars(v) if isinstance(v, hq.Estimate) else v for v in one.value])
                            for one in (found, again, plain))  # fmt: skip
    assert once == twice == without
    same = ("at", "program", "theta", "shots", "output")
    ran, expected = ([{k: e[k] for k in same} for e in journal(tmp_path / name) if e["k"] == "eval"]
                     for name in ("ahead", "plain"))  # fmt: skip
    assert ran == expected
    assert executed(found) == executed(plain) == (len(ran), 0)


@hq.workflow
def repeated(kind: str) -> list[float]:
    start = np.array([0.4, -0.7])
    if kind == "loop":
        return list(hq.minimize(energy, start, method="COBYLA", options={"maxiter": 20}, callback=lambda x: None).x)
    if kind == "closed loops":
        return [hq.minimize(energy, start + k, method="COBYLA", options={"maxiter": 10}).fun for k in range(3)]
    if kind == "estimator":
        estimator = hq.Estimator()
        return [float(estimator.run([(CIRCUIT, OBSERVABLE, start + k)]).result()[0].data.evs) for k in range(20)]
    if kind == "by turns":
        return [float(energy(start + k)) + float(hq.gradient(energy, start + k)[0]) for k in range(10)]
    return [float(energy(start + k)) for k in range(20)]


OBSERVABLE = SparsePauliOp.from_list(list(TERMS.items()))


@pytest.mark.parametrize("kind", ["values", "by turns", "loop", "closed loops", "estimator"])
def test_what_is_begun_is_not_asked_for_again(kind: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    send = process._Child._send

    def noted(self: Any, kind: bytes, *rest: Any) -> None:
        sent.append(kind)
        send(self, kind, *rest)

    monkeypatch.setattr(process._Child, "_send", noted)
    monkeypatch.setattr("hybridq.runner._BRIEF", 60.0)  # a busy machine may take long
    found = report(repeated, kind, store=store)
    assert executed(found)[0] >= 15
    # the first of each kind, and what the engine had not known by then, as it may do for loops
    assert (kind != "closed loops") <= len(sent) <= 4


@hq.quantum
def energy_beside(theta: Any, beside: Any) -> Any:
    return hq.expval(CIRCUIT, OBSERVABLE, theta)


@hq.workflow
def loops_that_are_refused() -> list[float]:
    found = [float(energy(START))]
    for k in range(3):
        with pytest.raises(hq.WorkflowError, match="object"):
            hq.minimize(energy_beside, START, (object(),), "L-BFGS-B", jac="adjoint")
        found.append(float(energy(START + k)))
        found.append(hq.minimize(energy_beside, START + k, (k,), "L-BFGS-B", jac="adjoint").fun)
    return found


def test_a_loop_that_is_refused_when_it_was_begun(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    ahead = process.EngineProcess.advance_ahead

    def noted(self: process.EngineProcess, *what: Any) -> None:
        begun.append(what)
        ahead(self, *what)

    monkeypatch.setattr(process.EngineProcess, "advance_ahead", noted)
    found = report(loops_that_are_refused, store=store / "ahead")
    assert len(begun) == 6
    monkeypatch.setattr(Dispatcher, "advance_ahead", lambda *_: None)
    plain = report(loops_that_are_refused, store=store / "plain")
    assert exact(found.value) == exact(plain.value)
    assert executed(found) == executed(plain)
    rows, expected = ([(r["x"], r["value"], r["g"]) for r in journal(at) if r["k"] == "row"]
                      for at in (found.directory, plain.directory))  # fmt: skip
    assert rows == expected


DESCRIBED: list[Any] = []


@hq.quantum
def fails_at_first(theta: Any, times: int) -> Any:
    DESCRIBED.append(theta)
    if len(DESCRIBED) <= times:
        raise ValueError("no file")
    return hq.expval(CIRCUIT, OBSERVABLE, 2 * np.asarray(theta))


@hq.workflow
def loop_that_fails_at_first(times: int) -> float:
    before = float(energy(START))
    DESCRIBED.clear()
    try:
        return float(hq.minimize(fails_at_first, START, (times,), "COBYLA", options={"maxiter": 4}).nfev)
    except ValueError:
        return before


def test_what_a_body_raises_at_the_start_point_is_recorded(store: Path) -> None:
    found = report(loop_that_fails_at_first, 1, name="fails", store=store)
    assert found.value == pytest.approx(closed_form(START))
    assert len(DESCRIBED) == 1
    assert [(e["at"], e["type"]) for e in journal(found.directory) if e["k"] == "failure"] == [
        ("loop_that_fails_at_first/minimize[0]", "builtins:ValueError")
    ]
    assert count(found.directory)["row"] == 0
    again = report(loop_that_fails_at_first, 1, name="fails", store=store)
    assert (again.value, DESCRIBED) == (found.value, [])  # it is raised from the record


def test_a_start_point_is_described_once_more_than_it_is_evaluated(store: Path) -> None:
    found = report(loop_that_fails_at_first, 0, store=store)
    assert len(DESCRIBED) == 1 + found.value


@hq.workflow
def longer_than_thought() -> list[float]:
    return [float(energy([0.1 * k, 0.2])) for k in range(6)]


def test_nothing_is_begun_after_what_took_long(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(Dispatcher, "ahead", lambda self, guess: begun.append(guess))
    monkeypatch.setattr("hybridq.runner._BRIEF", 60.0)
    report(longer_than_thought, store=store / "a")
    assert begun
    monkeypatch.setattr("hybridq.runner._BRIEF", 0.0)
    begun.clear()
    report(longer_than_thought, store=store / "b")
    assert not begun


# -- an optimizer that is cut anywhere goes on as if nothing had been --------------------------------------------------

START = np.array([0.4, -0.7])
BOUNDS = [(-4.0, 4.0), (-4.0, 4.0)]


def spsa(fun: Any, x0: Any, args: tuple[Any, ...] = (), **_: Any) -> OptimizeResult:
    """A minimizer of the researcher's own, with randomness of its own."""
    rng, x, calls = np.random.default_rng(11), np.array(x0), 0
    for k in range(12):
        step = rng.choice([-1.0, 1.0], size=len(x))
        slope = (fun(x + 0.1 * step, *args) - fun(x - 0.1 * step, *args)) / 0.2
        x -= 0.3 / (k + 1) ** 0.6 * slope * step
        calls += 2
    return OptimizeResult(x=x, fun=fun(x, *args), nfev=calls + 1, success=True)


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "COBYLA": ("COBYLA", {"maxiter": 30}),
    "COBYQA": ("COBYQA", {"maxfev": 25}),
    "Nelder-Mead": ("Nelder-Mead", {"maxfev": 40}),
    "Powell": ("Powell", {"maxfev": 50}),
    "L-BFGS-B": ("L-BFGS-B", {"maxiter": 6}),
    "SLSQP": ("SLSQP", {"maxiter": 6}),
    "BFGS": ("BFGS", {"maxiter": 6}),
    "CG": ("CG", {"maxiter": 5}),
    "TNC": ("TNC", {"maxfun": 30}),
    "trust-constr": ("trust-constr", {"maxiter": 8}),
    "custom": (spsa, {}),
}


def shifted(x: Any, shift: float) -> float:
    """Two quantum functions and some arithmetic."""
    return 2.0 * float(part(x, "ZZ")) + float(part(x, "XI")) + shift


@hq.workflow
def loop(kind: str, method: str) -> OptimizeResult:
    solver, options = METHODS[method]
    match kind:
        case "exact":
            return hq.minimize(energy, START, method=solver, options=options)
        case "sampled":
            return hq.minimize(sampled, START, method=solver, options=options)
        case _:
            return hq.minimize(shifted, START, args=(0.5,), method=solver, options=options)


LOOPS = [
    *(("exact", method) for method in METHODS),
    *(("sampled", method) for method in ("COBYLA", "Nelder-Mead", "Powell", "custom", "COBYQA")),
    *(("function", method) for method in ("COBYLA", "L-BFGS-B", "trust-constr", "custom")),
]


@pytest.mark.filterwarnings("ignore:delta_grad == 0.0:UserWarning")  # trust-constr, where the quasi-Newton step is nil
@pytest.mark.parametrize(("kind", "method"), LOOPS, ids=["-".join(case) for case in LOOPS])
def test_a_cut_loop_resumes_to_the_identical_result(kind: str, method: str, tmp_path: Path) -> None:
    options = {"name": "loop", "seed": 5}
    live = report(loop, kind, method, store=tmp_path / "live", **options)
    rows = [i for i, e in enumerate(journal(live.directory)) if e["k"] == "row"]
    evaluations = 2 if kind == "function" else 1  # a row of a function's loop stands for two evaluations
    assert len(rows) == live.value.nfev >= 10
    assert live.evaluations_executed == evaluations * len(rows)
    if kind == "exact":
        assert live.value.fun == pytest.approx(closed_form(live.value.x), abs=1e-12)
    assert live.value.fun < closed_form(START)

    for number, kept in enumerate((1, len(rows) // 2, len(rows))):
        store = tmp_path / str(number)
        cut(live.directory, rows[kept - 1] + 1, store)
        resumed = report(loop, kind, method, store=store, **options)
        assert exact(resumed.value) == exact(live.value)
        assert executed(resumed) == (evaluations * (len(rows) - kept), 0)
        assert replayed(resumed) == (evaluations * kept, 0)
        points = [(e["i"], e["x"], e["value"], e["stderr"]) for e in journal(resumed.directory) if e["k"] == "row"]
        assert points == [(e["i"], e["x"], e["value"], e["stderr"]) for e in journal(live.directory) if e["k"] == "row"]
    again = report(loop, kind, method, store=tmp_path / "live", **options)
    assert exact(again.value) == exact(live.value)
    assert executed(again) == (0, 0)
    assert replayed(again) == executed(live)


def test_a_loop_cut_within_an_objective_repeats_only_what_is_missing(tmp_path: Path) -> None:
    live = report(loop, "function", "COBYLA", store=tmp_path / "live", name="loop")
    entries = journal(live.directory)
    first_of_pair = next(i for i, e in enumerate(entries) if e.get("at", "").endswith("shifted[7]/part[0]"))
    cut(live.directory, first_of_pair + 1, tmp_path / "cut")
    resumed = report(loop, "function", "COBYLA", store=tmp_path / "cut", name="loop")
    assert exact(resumed.value) == exact(live.value)
    assert replayed(resumed) == (15, 0)
    assert executed(resumed) == (live.evaluations_executed - 15, 0)


def gradient(x: Any) -> Any:
    """By the parameter-shift rule, exact for this circuit: one batch of four evaluations."""
    shifts = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]) * np.pi / 2
    values = energy(np.asarray(x) + shifts).value
    return [(values[0] - values[1]) / 2, (values[2] - values[3]) / 2]


def first_angle(x: Any) -> float:
    return float(part(x, "IZ"))  # cos(x[0])


def first_slope(x: Any) -> Any:
    return [-float(part([x[0] - np.pi / 2, x[1]], "IZ")), 0.0]


def room(x: Any) -> float:
    return 0.5 - first_angle(x)


@hq.workflow
def with_callables(method: str) -> dict[str, Any]:
    seen = []

    def watch(x: Any, *_: Any) -> None:
        seen.append(float(energy(x)))

    limits: dict[str, Any] = {
        "SLSQP": {"type": "ineq", "fun": room},
        "COBYLA": [{"type": "ineq", "fun": room}],
        "trust-constr": scipy.optimize.NonlinearConstraint(first_angle, -1.0, 0.5, jac=first_slope),
    }
    found = hq.minimize(
        energy,
        START,
        method=method,
        jac=None if method == "COBYLA" else gradient,
        callback=watch,
        constraints=limits.get(method, ()),
        options={"maxiter": 25},
    )
    return {"x": found.x, "fun": found.fun, "nfev": found.nfev, "bound": first_angle(found.x)}


@pytest.mark.parametrize("method", ["SLSQP", "COBYLA", "trust-constr", "L-BFGS-B", "CG"])
def test_gradients_callbacks_and_constraints_may_evaluate(method: str, tmp_path: Path) -> None:
    live = report(with_callables, method, store=tmp_path / "live", name="callables")
    value = live.value
    assert value["fun"] == pytest.approx(closed_form(value["x"]), abs=1e-10)
    assert value["bound"] == pytest.approx(np.cos(value["x"][0]), abs=1e-10)
    if method in ("SLSQP", "COBYLA", "trust-constr"):
        assert value["bound"] < 0.5 + 1e-3
        expected = scipy.optimize.minimize(
            closed_form, START, method="SLSQP", constraints={"type": "ineq", "fun": lambda x: 0.5 - np.cos(x[0])}
        )
        assert value["fun"] <= expected.fun + 0.05
    entries = journal(live.directory)
    places = [e["at"] for e in entries if "at" in e]
    assert len(places) == len(set(places))
    inner = {p.split("/")[2].partition("[")[0] for p in places if p.count("/") > 2}
    assert "callback" in inner
    assert ("jac" in inner) == (method != "COBYLA")
    if method in ("SLSQP", "COBYLA"):
        assert "constraint_fun" in inner
    assert live.evaluations_executed == sum(e["k"] in ("row", "eval") for e in entries)

    again = report(with_callables, method, store=tmp_path / "live", name="callables")
    assert exact(again.value) == exact(live.value)
    assert executed(again) == (0, 0)
    kept = len(entries) // 2
    cut(live.directory, kept, tmp_path / "cut")
    resumed = report(with_callables, method, store=tmp_path / "cut", name="callables")
    assert exact(resumed.value) == exact(live.value)
    done = sum(e["k"] in ("row", "eval") for e in entries[:kept])
    assert (done, executed(resumed)) == (replayed(resumed)[0], (live.evaluations_executed - done, 0))


def jac(x: Any) -> float:
    """An objective of an unlucky name."""
    return float(part(x, "ZZ"))


@hq.workflow
def unlucky() -> Any:
    return hq.minimize(jac, START, method="CG", jac=lambda x: [0.0 * float(part(x, "ZZ")), -np.sin(x[1])])


def test_an_objective_may_be_named_like_a_gradient(tmp_path: Path) -> None:
    live = report(unlucky, store=tmp_path, name="unlucky")
    assert live.value.fun == pytest.approx(-1, abs=1e-8)
    places = [e["at"] for e in journal(live.directory) if "at" in e]
    assert len(places) == len(set(places)) > 4


@hq.workflow
def cost(x: Any) -> float:
    return float(part(x, "ZZ"))


@hq.workflow
def loop_over_workflow() -> Any:
    return hq.minimize(cost, START, method="COBYLA", options={"maxiter": 10})


def test_a_workflow_as_objective(tmp_path: Path) -> None:
    live = report(loop_over_workflow, store=tmp_path, name="w")
    assert executed(live) == (live.value.nfev, 0)
    places = {e["at"] for e in journal(live.directory) if e["k"] == "eval"}
    assert "loop_over_workflow/minimize[0]/cost[3]/part[0]" in places


# -- a study of everything, cut and moved ------------------------------------------------------------------------------


@hq.classical
def prepare(trace: str, i: int) -> dict[str, Any]:
    write_trace(trace, f"prepare{i}")
    return {"start": np.array([0.1 * i, 0.3]), "noise": float(hq.rng().normal())}


@hq.workflow
def one(trace: str, i: int) -> dict[str, Any]:
    p = prepare(trace, i)
    found = hq.minimize(energy, p["start"], method="COBYLA", options={"maxiter": 8})
    noisy = hq.minimize(sampled, found.x, method="Nelder-Mead", options={"maxfev": 8})
    return {"p": p, "x": found.x, "noisy": noisy.fun, "value": sampled(found.x), "random": hq.rng().normal(size=2)}


@hq.workflow
def mixed(trace: str, n: int) -> Any:
    futures = [one.submit(trace, 10 + i) for i in range(2)]
    mapped = hq.map(one, [trace] * n, range(n))
    return [mapped, hq.map(sampled, [m["x"] for m in mapped]), [f.result() for f in futures]]


def canonical(value: Any) -> Any:
    """`exact`, through estimates too."""
    if isinstance(value, hq.Estimate):
        return "Estimate", value.value, value.stderr, value.shots
    if isinstance(value, dict):
        return {k: canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(v) for v in value]
    return exact(value)


@pytest.mark.slow
def test_one_worker_or_four_or_a_cut_give_the_same_bits(client: Client, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    arguments = (mixed, str(trace), 4)
    live = report(*arguments, name="mixed", seed=2, store=tmp_path / "two", cluster=client)
    steps = Counter({f"prepare{i}": 1 for i in (0, 1, 2, 3, 10, 11)})
    assert traced(trace) == steps
    for workers in (1, 4):
        other = report(*arguments, name="mixed", seed=2, store=tmp_path / str(workers), workers=workers)
        assert canonical(other.value) == canonical(live.value)
        assert executed(other) == executed(live)
    assert traced(trace) == Counter({name: 3 for name in steps})

    entries = journal(live.directory)
    for number, kept in enumerate((len(entries) // 3, 2 * len(entries) // 3)):
        trace.unlink(missing_ok=True)
        cut(live.directory, kept, tmp_path / f"cut{number}")
        resumed = report(*arguments, name="mixed", seed=2, store=tmp_path / f"cut{number}", cluster=client)
        assert canonical(resumed.value) == canonical(live.value)
        done = Counter(e["k"] for e in entries[:kept])
        assert replayed(resumed) == (done["row"] + done["eval"], done["step"])
        assert executed(resumed) == (live.evaluations_executed - done["row"] - done["eval"], 6 - done["step"])
        assert traced(trace).total() == 6 - done["step"]


# -- failures ----------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """An exception of the researcher's own, with data."""


class Awkward(Exception):
    """One whose constructor takes something else than its arguments."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} and {right}")


@hq.classical
def fails(trace: str, how: str) -> str:
    write_trace(trace, how)
    match how:
        case "own":
            raise Refused("no", 42)
        case "awkward":
            raise Awkward(1, 2)
        case "builtin":
            raise ZeroDivisionError("by nothing")
        case "file":
            open("/nonexistent/file").close()
        case "chained":
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise ValueError("outer") from error
        case "unencodable":
            return threading.Lock()  # type: ignore[return-value]
    return how


@hq.workflow
def catches(trace: str, ways: list[str]) -> list[Any]:
    found: list[Any] = []
    for how in ways:
        try:
            found.append(fails(trace, how))
        except Exception as error:  # noqa: BLE001  # to be looked at by the test
            notes = list(getattr(error, "__notes__", []))
            found.append([type(error).__module__, type(error).__name__, str(error), list(map(str, error.args)), notes])
    return [*found, fails(trace, "fine")]


FAILURES = {
    "own": ("Refused", "('no', 42)"),
    "awkward": ("Awkward", "1 and 2"),
    "builtin": ("ZeroDivisionError", "by nothing"),
    "file": ("FileNotFoundError", "[Errno 2] No such file or directory: '/nonexistent/file'"),
    "chained": ("ValueError", "outer"),
    "unencodable": ("Unhashable", "the value returned by catches/fails[5] is a _thread.lock"),
}


def test_failures_that_were_survived_are_repeated_not_run_again(client: Client, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    options = {"name": "catches", "store": tmp_path, "cluster": client}
    live = report(catches, str(trace), list(FAILURES), **options)
    ran = traced(trace)
    assert ran == Counter([*FAILURES, "fine"])
    for position, (kind, message) in enumerate(FAILURES.values()):
        assert live.value[position][1] == kind
        assert message in live.value[position][2]
        assert live.value[position][4] == [f"in catches/fails[{position}]"]
    assert live.value[0][3] == ["no", "42"]
    assert live.value[-1] == "fine"
    assert count(live.directory)["failure"] == count(live.directory)["survived"] == len(FAILURES)

    again = report(catches, str(trace), list(FAILURES), **options)
    assert again.value == live.value
    assert traced(trace) == ran
    assert executed(again) == (0, 0)
    assert replayed(again) == (0, len(FAILURES) + 1)
    assert count(live.directory)["failure"] == len(FAILURES)  # repeating one records nothing


@hq.classical
def needs(trace: str, path: str) -> str:
    write_trace(trace, "needs")
    with open(path) as file:
        return file.read()


@hq.workflow
def depends(trace: str, path: str) -> list[str]:
    return [fails(trace, "before"), wrapped_needs(trace, path)]


@hq.workflow
def wrapped_needs(trace: str, path: str) -> str:
    return needs(trace, path)


def test_a_failure_that_ended_the_run_is_tried_again(client: Client, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "input"
    options = {"name": "depends", "store": tmp_path, "cluster": client}
    for attempt in (1, 2):
        with pytest.raises(FileNotFoundError) as caught:
            report(depends, str(trace), str(path), **options)
        assert caught.value.__notes__ == ["in depends/wrapped_needs[0]/needs[0]"]
        assert "in needs" in str(caught.value.__cause__)  # the traceback on the worker
        assert traced(trace) == {"before": 1, "needs": attempt}
    assert [e["status"] for e in journal(tmp_path / "depends") if e["k"] == "end"] == ["failed", "failed"]
    assert count(tmp_path / "depends")["survived"] == 0
    path.write_text("content")
    live = report(depends, str(trace), str(path), **options)
    assert live.value == ["before", "content"]
    assert (executed(live), replayed(live)) == ((0, 1), (0, 1))
    again = report(depends, str(trace), str(path), **options)
    assert (executed(again), replayed(again)) == ((0, 0), (0, 2))
    assert traced(trace) == {"before": 1, "needs": 3}


@hq.classical(retries=2)
def flaky(trace: str, path: str, needed: int) -> int:
    write_trace(trace, "flaky")
    tries = int(Path(path).read_text()) + 1 if Path(path).exists() else 1
    Path(path).write_text(str(tries))
    if tries < needed:
        raise Refused(f"try {tries} of {needed}")
    return tries


@hq.workflow
def retried(trace: str, path: str, needed: int) -> int:
    return flaky(trace, path, needed)


def test_retries_of_each_session(client: Client, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    options = {"store": tmp_path, "cluster": client}
    third = report(retried, str(trace), str(tmp_path / "a"), 3, name="third", **options)
    assert third.value == 3
    assert traced(trace) == {"flaky": 3}
    assert count(third.directory)["failure"] == 0  # only what a call comes to is recorded
    assert next(e["attempt"] for e in journal(third.directory) if e["k"] == "step") == 2

    arguments = (retried, str(trace), str(tmp_path / "b"), 5)
    with pytest.raises(Refused, match="try 3 of 5"):
        report(*arguments, name="fifth", **options)
    assert traced(trace) == {"flaky": 6}
    fifth = report(*arguments, name="fifth", **options)  # taken up again with all its retries
    assert fifth.value == 5
    assert traced(trace) == {"flaky": 8}


@hq.classical
def odd_fails(trace: str, i: int) -> int:
    write_trace(trace, f"odd{i}")
    if i % 2:
        raise Refused(i)
    return i


@hq.workflow
def odd_child(trace: str, i: int) -> int:
    return odd_fails(trace, i) + 100


@hq.workflow
def gathers(trace: str, how: str) -> Any:
    function = odd_child if how.startswith("workflow") else odd_fails
    if how.endswith("exceptions"):
        found = hq.map(function, [trace] * 6, range(6), return_exceptions=True)
        return [repr(value) for value in found]
    try:
        return hq.map(function, [trace] * 6, range(6))
    except Refused as error:
        return ["raised", repr(error)]


GATHERED = {
    "steps": ["raised", "Refused(1)"],
    "workflows": ["raised", "Refused(1)"],
    "steps exceptions": ["0", "Refused(1)", "2", "Refused(3)", "4", "Refused(5)"],
    "workflows exceptions": ["100", "Refused(1)", "102", "Refused(3)", "104", "Refused(5)"],
}


@pytest.mark.parametrize(("how", "expected"), GATHERED.items())
def test_map_waits_for_all_then_raises_the_lowest(
    how: str, expected: list[str], client: Client, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    options = {"name": "gathers", "store": tmp_path, "cluster": client}
    live = report(gathers, str(trace), how, **options)
    assert live.value == expected
    assert traced(trace) == Counter(f"odd{i}" for i in range(6))
    assert (count(live.directory)["failure"], count(live.directory)["survived"]) == (3, 3)
    again = report(gathers, str(trace), how, **options)
    assert again.value == expected
    assert executed(again) == (0, 0)
    assert traced(trace).total() == 6


@hq.workflow
def bad_argument_among_good(trace: str) -> Any:
    good = np.zeros(1)
    return hq.map(scaled, [trace] * 3, [good, object(), good], return_exceptions=True)


@hq.classical
def scaled(trace: str, value: Any) -> Any:
    write_trace(trace, "scaled")
    return value


def test_map_puts_a_refused_argument_in_its_place(client: Client, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    live = report(bad_argument_among_good, str(trace), name="places", store=tmp_path, cluster=client)
    assert [type(value) for value in live.value] == [np.ndarray, hq.Unhashable, np.ndarray]
    assert traced(trace) == {"scaled": 2}


@hq.workflow
def too_large_for_all(n: int) -> int:
    found = hq.map(wide_circuit, [60] * n, return_exceptions=True)
    assert all(isinstance(error, hq.TooLarge) for error in found)
    return len(found)


@hq.quantum
def wide_circuit(qubits: int) -> Any:
    circuit = QuantumCircuit(qubits)
    circuit.h(range(qubits))
    return hq.expval(circuit, "Z" * qubits)


def test_failures_of_placement_are_recorded_and_repeated(client: Client, tmp_path: Path) -> None:
    options = {"name": "large", "store": tmp_path, "cluster": client}
    live = report(too_large_for_all, 40, **options)
    assert live.value == 40
    assert (count(live.directory)["failure"], count(live.directory)["survived"]) == (40, 40)
    again = report(too_large_for_all, 40, **options)
    assert again.value == 40
    assert count(live.directory)["failure"] == 40


@hq.classical(timeout=1.0)
def slow(trace: str, seconds: float) -> float:
    write_trace(trace, "slow")
    time.sleep(seconds)
    return seconds


@hq.workflow
def outlives(trace: str) -> list[Any]:
    try:
        slow(trace, 600.0)
    except hq.TimedOut as error:
        said = str(error)
    return [said, slow(trace, 0.0), fails(trace, "after")]


@pytest.mark.slow
def test_a_step_that_overruns_its_timeout(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    live = report(outlives, str(trace), name="slow", store=tmp_path, workers=1)
    said, *rest = live.value
    assert "outlives/slow[0]" in said
    assert "timeout of 1 s" in said
    assert rest == [0.0, "after"]
    pids = [line.split() for line in trace.read_text().splitlines()]
    assert [name for name, _ in pids] == ["slow", "slow", "after"]
    assert pids[0][1] != pids[1][1] == pids[2][1]  # the worker was restarted, once
    again = report(outlives, str(trace), name="slow", store=tmp_path, workers=1)
    assert again.value == live.value
    assert (executed(again), replayed(again)) == ((0, 0), (0, 3))
    assert len(trace.read_text().splitlines()) == 3


@hq.workflow
def loop_fails(path: str) -> Any:
    def objective(x: Any) -> float:
        value = float(energy(x))
        if x[0] > 0.5 and not os.path.exists(path):
            raise Refused("too far")
        return value

    return hq.minimize(objective, START, method="Nelder-Mead", options={"maxfev": 30}).fun


@hq.workflow
def survives_loop(path: str) -> Any:
    try:
        return loop_fails(path)
    except Refused as error:
        return [str(error), float(energy(START))]


def test_a_loop_that_raised_is_tried_again_from_its_rows_or_repeated(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    with pytest.raises(Refused, match="too far"):
        report(loop_fails, str(path), name="ended", store=tmp_path)
    rows, evaluations = count(tmp_path / "ended")["row"], count(tmp_path / "ended")["eval"]
    assert evaluations == rows + 1 > 1
    survived = report(survives_loop, str(path), name="survived", store=tmp_path)
    assert survived.value == ["too far", pytest.approx(closed_form(START), abs=1e-12)]
    path.touch()
    live = report(loop_fails, str(path), name="ended", store=tmp_path)
    assert count(live.directory)["row"] == count(live.directory)["eval"] > evaluations
    assert (executed(live), replayed(live)) == ((count(live.directory)["eval"] - evaluations, 0), (evaluations, 0))
    again = report(survives_loop, str(path), name="survived", store=tmp_path)
    assert again.value == survived.value
    assert executed(again) == (0, 0)


# -- divergence --------------------------------------------------------------------------------------------------------

MODULE = '''
import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter
import hybridq as hq

ANGLE = Parameter("a")
OFFSET = 1.0


def circuit():
    c = QuantumCircuit(1)
    c.ry(ANGLE, 0)
    return c


@hq.classical
def prepare(trace, n):
    """Docstrings and comments do not count."""
    with open(trace, "a") as file:
        file.write("prepare\\n")
    return helper(n)  # here


def helper(n):
    return {"start": 0.1 * n, "offset": OFFSET}


@hq.quantum
def energy(theta):
    return hq.expval(circuit(), {"Z": 1.0}, theta)


def cost(x, offset):
    return float(energy(x)) + offset


@hq.workflow
def study(trace, stop):
    p = prepare(trace, 3)
    value = energy([p["start"]])
    found = hq.minimize(energy, [p["start"]], method="COBYLA", options={"maxiter": 12})
    other = hq.minimize(cost, [0.2], args=(p["offset"],), method="Nelder-Mead", options={"maxfev": 8})
    if stop:
        raise RuntimeError("stopped on purpose")
    return [float(value), found.fun, other.fun]
'''

EDITS = {
    "arguments of a step": ("prepare(trace, 3)", "prepare(trace, 4)", "the arguments of prepare", "4"),
    "code of a step": ("return helper(n)", "return helper(n + 0)", "study/prepare[0]: the code of prepare", "n + 0"),
    "code it reaches": ("0.1 * n", "0.3 * n", "the code of prepare", "0.3 * n"),
    "value it reaches": ("OFFSET = 1.0", "OFFSET = 1.5", "the code of prepare", "OFFSET"),
    "circuit": ("c.ry(ANGLE, 0)", "c.rx(ANGLE, 0)", "study/energy[0]: the program", "program"),
    "observable": ('{"Z": 1.0}', '{"Z": 2.0}', "study/energy[0]: the program", "program"),
    "shots": ('{"Z": 1.0}, theta', '{"Z": 1.0}, theta, shots=10', "study/energy[0]: the program", '"shots": 10'),
    "parameters": ('energy([p["start"]])', "energy([0.7])", "study/energy[0]: the parameters", "0.7"),
    "optimizer settings": ('"maxiter": 12', '"maxiter": 11', "study/minimize[0]: the loop's settings", '"maxiter": 11'),
    "method": ('"COBYLA"', '"Powell"', "study/minimize[0]: the loop's settings", '"Powell"'),
    "start point": ('energy, [p["start"]]', "energy, [0.5]", "study/minimize[0]: the loop's settings", "0.5"),
    "objective": ("float(energy(x)) + offset", "float(energy(x)) - offset", "the code of cost", "- off"),
    "objective's arguments": ('args=(p["offset"],)', "args=(7.0,)", "study/minimize[1]: the loop's settings", "7.0"),
    "kind of call": (
        'found = hq.minimize(energy, [p["start"]], method="COBYLA", options={"maxiter": 12})',
        'found = hq.map(minimize, [p["start"]])[0]',
        "study/minimize[0]: the kind of call",
        "Evaluation",
    ),
    "kind of a step": (
        "p = prepare(trace, 3)\n",
        "p = quantum_prepare(3)\n",
        "study/prepare[0]: the kind of call",
        "Evaluation",
    ),
}  # fmt: skip
HARMLESS = {
    "nothing": ("stop", "stop"),
    "comments, layout, docstrings": (
        '"""Docstrings and comments do not count."""',
        '"""Another one."""\n    # and a comment',
    ),
    "prints": ("    value = energy", '    print("hello")\n    value = energy'),
    "code after the loops": ("return [float(value), ", "return [0.0 + float(value), "),
    "names of parameters": ('Parameter("a")', 'Parameter("b")'),
}
OTHER_KINDS = """

@hq.quantum
def minimize(x):
    return hq.expval(circuit(), {"Z": 1.0}, [x])


@hq.quantum
def quantum_prepare(n):
    return hq.expval(circuit(), {"Z": 1.0}, [n])


quantum_prepare.__wrapped__.__name__ = "prepare"
"""


def load(path: Path, text: str) -> ModuleType:
    """The text as the module ``edited``, as if it had just been written and imported."""
    path.write_text(text + OTHER_KINDS)
    linecache.checkcache(str(path))
    sys.modules.pop("edited", None)
    spec = importlib.util.spec_from_file_location("edited", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["edited"] = module
    exec(compile(path.read_text(), str(path), "exec"), vars(module))
    return module


@pytest.fixture(scope="module")
def recorded(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `MODULE` that failed at its very end."""
    place = tmp_path_factory.mktemp("recorded")
    module = load(place / "edited.py", MODULE)
    with pytest.raises(RuntimeError, match="on purpose"):
        report(module.study, str(place / "trace"), True, name="study", store=place / "store", cluster=client)
    assert count(place / "store" / "study")["row"] > 15
    return place


def rerun(place: Path, text: str, directory: Path) -> RunReport:
    """Copy the recorded run and take it up with another text; what is not recorded would need no cluster."""
    if not directory.exists():
        shutil.copytree(place / "store", directory)
    module = load(place / "edited.py", text)
    return report(module.study, str(place / "trace"), True, name="study", store=directory)


@pytest.mark.parametrize(("old", "new", "where", "shown"), EDITS.values(), ids=EDITS.keys())
def test_an_edit_stops_the_run_and_undoing_it_lets_it_go_on(
    old: str, new: str, where: str, shown: str, recorded: Path, tmp_path: Path
) -> None:
    assert MODULE.count(old) == 1
    before = (recorded / "store" / "study" / "journal.jsonl").read_bytes()
    with pytest.raises(hq.Diverged) as caught:
        rerun(recorded, MODULE.replace(old, new), tmp_path / "store")
    message = str(caught.value)
    assert where in message
    assert "recorded" in message.splitlines()[1]
    assert "| called now" in message.splitlines()[1]
    differences = [line.split(" | ") for line in message.splitlines()[3:] if " | " in line]
    assert differences
    assert any(left.strip() != right.strip() for left, right in differences)
    assert any(shown in line for line in message.splitlines())
    assert "another name" in message.splitlines()[-1]
    after = (tmp_path / "store" / "study" / "journal.jsonl").read_bytes()
    assert after.startswith(before)
    added = [json.loads(line)["k"] for line in after[len(before) :].splitlines()]
    assert added == ["opened", "end"]
    assert (recorded / "trace").read_text() == "prepare\n"
    with pytest.raises(RuntimeError, match="on purpose"):
        rerun(recorded, MODULE, tmp_path / "store")
    assert count(tmp_path / "store" / "study")["row"] == count(recorded / "store" / "study")["row"]


@pytest.mark.parametrize(("old", "new"), HARMLESS.values(), ids=HARMLESS.keys())
def test_what_computes_the_same_goes_on(old: str, new: str, recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        rerun(recorded, MODULE.replace(old, new, 1), tmp_path / "store")
    assert (recorded / "trace").read_text() == "prepare\n"
    assert count(tmp_path / "store" / "study")["row"] == count(recorded / "store" / "study")["row"]


def test_a_workflow_that_catches_everything_does_not_go_on_from_a_divergence(recorded: Path, tmp_path: Path) -> None:
    caught = MODULE.replace("prepare(trace, 3)", "hq.map(prepare, [trace], [5], return_exceptions=True)[0]").replace(
        "value = energy(",
        "p = {'start': 0.3, 'offset': 1.0}\n    try:\n        energy([9.0])\n    except Exception:\n        pass\n"
        "    value = energy(",
    )
    with pytest.raises(hq.Diverged, match="the arguments of prepare"):
        rerun(recorded, caught, tmp_path / "store")
    added = journal(tmp_path / "store" / "study")[len(journal(recorded / "store" / "study")) :]
    assert [e["k"] for e in added] == ["opened", "end"]


@hq.workflow
def last_call_diverges(theta: float) -> str:
    try:
        energy([theta_now, 0.0])
    except Exception:  # noqa: BLE001  # what a careless workflow does
        return "went on"
    return "fine"


theta_now = 0.1


def test_a_divergence_in_the_last_call_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report(last_call_diverges, 0.0, name="last", store=tmp_path).value == "fine"
    monkeypatch.setattr(sys.modules[__name__], "theta_now", 0.2)
    with pytest.raises(hq.Diverged, match=r"0\.2"):
        report(last_call_diverges, 0.0, name="last", store=tmp_path)
    monkeypatch.undo()
    assert report(last_call_diverges, 0.0, name="last", store=tmp_path).value == "fine"


def test_differences_far_to_the_right_are_shown(tmp_path: Path) -> None:
    long = np.zeros(60)
    report(only_arguments, long.tolist(), name="long", store=tmp_path)
    long[50] = 0.25
    with pytest.raises(hq.Diverged) as caught:
        report(only_arguments, long.tolist(), name="long", store=tmp_path)
    assert "0.25" in str(caught.value)
    text = "x" * 200
    report(only_arguments, text + "old", name="text", store=tmp_path)
    with pytest.raises(hq.Diverged) as caught:
        report(only_arguments, text + "new", name="text", store=tmp_path)
    assert "old" in str(caught.value)
    assert "new" in str(caught.value)
    report(only_arguments, np.zeros(2000), name="array", store=tmp_path)
    with pytest.raises(hq.Diverged, match="other arguments"):
        report(only_arguments, np.ones(2000), name="array", store=tmp_path)


@hq.workflow
def only_arguments(value: Any) -> int:
    return 1


SCRIPT = """
import sys
import hybridq as hq

@hq.classical
def step(x):
    return x + 1

@hq.workflow
def study(x):
    return step(x)

if __name__ == "__main__":
    print(hq.run(study, 1, cluster=sys.argv[1], name=sys.argv[2] if len(sys.argv) > 2 else None))
"""


def python(path: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    found = subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=path.parent,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == code, found.stderr
    return found


@pytest.mark.slow
def test_an_edited_script(client: Client, tmp_path: Path) -> None:
    """A named run is strict; without a name an edit makes a new run."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    address = client.scheduler_info()["address"]
    first = python(script, address, "strict")
    assert first.stdout == "2\n"
    assert "0 evaluations and 1 steps executed" in first.stderr
    python(script, address)
    assert len(list((tmp_path / "runs").iterdir())) == 2

    script.write_text(SCRIPT.replace("x + 1", "x + 2"))
    stopped = python(script, address, "strict", code=1)
    assert "hybridq.errors.Diverged: study/step[0]: the code of step differ" in stopped.stderr
    assert stopped.stderr.count("x + 1") == stopped.stderr.count("x + 2") == 1
    fresh = python(script, address)
    assert fresh.stdout == "3\n"
    assert "1 steps executed" in fresh.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 3

    script.write_text(SCRIPT)
    undone = python(script, "tcp://127.0.0.1:9", "strict")  # nobody is there, and nobody is needed
    assert undone.stdout == "2\n"
    assert "0 steps executed" in undone.stderr


# -- bad input ---------------------------------------------------------------------------------------------------------

FOREIGN = Parameter("foreign")
TWO = ParameterVector("t", 2)
UNBOUND = QuantumCircuit(1)
UNBOUND.rx(TWO[0] + TWO[1], 0)


@hq.quantum
def described(circuit: Any, observable: Any, theta: Any, shots: Any = None, precision: Any = None) -> Any:
    return hq.expval(circuit, observable, theta, shots=shots, precision=precision)


@hq.classical
def takes(value: Any) -> Any:
    return value


def objective(x: Any, value: Any) -> Any:
    return value


def pair(x: Any) -> Any:
    return 1.0, np.zeros(2)


class Opaque:
    pass


@hq.workflow
def misuse(name: str) -> Any:
    table = vars(sys.modules[__name__])["BAD"]  # not by its name: lambdas of a table have no code that can be hashed
    return table[name][0]()


BAD: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "too few parameters": (lambda: energy([0.1]), hq.WorkflowError, ("2 parameters", "angle[0]", "(1,)")),
    "too many parameters": (lambda: energy([0.1] * 3), hq.WorkflowError, ("2 parameters", "(3,)")),
    "no parameters": (lambda: described(CIRCUIT, "ZZ", None), hq.WorkflowError, ("2 parameters", "(0,)")),
    "missing by name": (lambda: energy({"angle[0]": 1.0}), hq.WorkflowError, ("no value was given for angle[1]",)),
    "foreign parameter": (lambda: energy({FOREIGN: 1.0}), hq.WorkflowError, ("'foreign' is not a parameter",)),
    "parameters of another circuit": (lambda: energy({TWO[0]: 1.0}), hq.WorkflowError, ("t[0]", "angle[0], angle[1]")),
    "strings": (lambda: energy(["a", "b"]), hq.WorkflowError, ("real numbers",)),
    "complex": (lambda: energy([1j, 0]), hq.WorkflowError, ("complex128", "real numbers")),
    "ragged": (lambda: energy([[1.0], [1.0, 2.0]]), hq.WorkflowError, ("do not form an array",)),
    "NaN": (lambda: energy([0.0, np.nan]), hq.NotFinite, ("parameter 1 (angle[1]) is nan",)),
    "infinite": (lambda: energy([np.inf, 0]), hq.NotFinite, ("parameter 0 (angle[0]) is inf",)),
    "wider observable": (lambda: described(CIRCUIT, "ZZZ", [0, 0]), hq.WorkflowError, ("3 qubits", "2")),
    "narrower observable": (lambda: described(CIRCUIT, "Z", [0, 0]), hq.WorkflowError, ("1 qubit", "2")),
    "not an observable": (lambda: described(CIRCUIT, 7, [0, 0]), hq.WorkflowError, ("observable is a int",)),
    "no observables": (lambda: described(CIRCUIT, [], [0, 0]), hq.WorkflowError, ("no observable was given",)),
    "not a circuit": (lambda: described("circuit", "Z", []), hq.WorkflowError, ("circuit is a str",)),
    "no shots": (lambda: described(CIRCUIT, "ZZ", [0, 0], shots=0), hq.WorkflowError, ("shots is 0",)),
    "half a shot": (lambda: described(CIRCUIT, "ZZ", [0, 0], shots=0.5), hq.WorkflowError, ("shots is 0.5",)),
    "no precision": (lambda: described(CIRCUIT, "ZZ", [0, 0], precision=0.0), hq.WorkflowError, ("precision is 0.0",)),
    "both": (lambda: described(CIRCUIT, "ZZ", [0, 0], 5, 0.1), hq.WorkflowError, ("both shots and precision",)),
    "batch shapes": (lambda: described(CIRCUIT, ["ZZ"] * 3, np.zeros((2, 2))), hq.WorkflowError, ("(2,)", "(3,)")),
    "NaN start": (lambda: hq.minimize(energy, [0.0, np.nan]), hq.WorkflowError, ("x0[1] is nan",)),
    "infinite start": (lambda: hq.minimize(energy, [np.inf, 0.0]), hq.WorkflowError, ("x0[0] is inf",)),
    "start of words": (lambda: hq.minimize(energy, ["a", "b"]), hq.WorkflowError, ("x0 is not an array of real",)),
    "start matrix": (lambda: hq.minimize(energy, np.zeros((2, 2))), hq.WorkflowError, ("x0 has shape (2, 2)",)),
    "start too long": (lambda: hq.minimize(energy, np.zeros(3)), hq.WorkflowError, ("2 parameters", "(3,)")),
    "unknown method": (lambda: hq.minimize(energy, START, method="SPSA"), hq.WorkflowError, ("'SPSA'", "L-BFGS-B")),
    "method of no kind": (lambda: hq.minimize(energy, START, method=3), hq.WorkflowError, ("method is 3",)),
    "None": (lambda: hq.minimize(objective, START, (None,)), hq.WorkflowError, ("objective[0] returned None",)),
    "value NaN": (lambda: hq.minimize(objective, START, (np.nan,)), hq.NotFinite, ("objective[0] returned nan",)),
    "value inf": (lambda: hq.minimize(objective, START, (-np.inf,)), hq.NotFinite, ("returned -inf",)),
    "value complex": (lambda: hq.minimize(objective, START, (1j,)), hq.WorkflowError, ("complex number 1j",)),
    "value array": (lambda: hq.minimize(objective, START, (np.ones(2),)), hq.WorkflowError, ("array of shape (2,)",)),
    "value string": (lambda: hq.minimize(objective, START, ("low",)), hq.WorkflowError, ("returned a str",)),
    "value and gradient": (lambda: hq.minimize(pair, START, jac=True), hq.WorkflowError, ("jac=True",)),
    "estimates": (lambda: hq.minimize(described_two, START), hq.WorkflowError, ("array of shape (2,)", "one real")),
    "unhashable argument": (lambda: takes(Opaque()), hq.Unhashable, ("argument of takes()", "Opaque")),
    "unhashable inside": (lambda: takes({"a": [1, Opaque()]}), hq.Unhashable, ("takes()", "['a'][1]", "Opaque")),
    "unpicklable argument": (lambda: takes(threading.Lock()), hq.Unhashable, ("argument of takes()", "lock")),
    "a function as argument": (lambda: takes(objective), hq.Unhashable, ("argument of takes()", "function")),
    "unhashable loop argument": (lambda: hq.minimize(objective, START, (Opaque(),)), hq.Unhashable, ("Opaque",)),
    "wrong arguments": (lambda: takes(1, 2), hq.WorkflowError, ("takes(", "too many positional arguments")),
    "wrong keyword": (lambda: takes(other=2), hq.WorkflowError, ("takes(", "missing a required argument")),
    "60 qubits": (lambda: wide_circuit(60), hq.TooLarge, ("60 qubits", "TiB", "has", "wide")),
    "60 qubits, submitted": (lambda: wide_circuit.submit(60).result(), hq.TooLarge, ("60 qubits",)),
    "60 qubits in a loop": (lambda: hq.minimize(wide_loop, [0.1]), hq.TooLarge, ("60 qubits",)),
    "a step's memory": (lambda: needs_memory.submit().result(), hq.TooLarge, ("needs_memory[0]", "needs 1,000", "has")),
}  # fmt: skip


@hq.quantum
def described_two(theta: Any) -> Any:
    return hq.expval(CIRCUIT, ["ZZ", "XI"], theta)


@hq.quantum
def wide_loop(theta: Any) -> Any:
    circuit = QuantumCircuit(60)
    circuit.rx(FOREIGN, 0)
    return hq.expval(circuit, "Z" * 60, theta)


@hq.classical(memory="1000 TiB")
def needs_memory() -> int:
    return 1


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_spent(
    name: str, store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, kind, words = BAD[name]
    with pytest.raises(kind) as caught:
        hq.run(misuse, name, name="bad", store=store, workers=1)
    for word in words:
        assert word in str(caught.value)
    found = count(store / "bad")
    assert not {"eval", "row", "step", "loop-end"} & set(found)
    assert "cluster ready" not in capfd.readouterr().err
    assert not [t for t in threading.enumerate() if t.name == "hybridq-cluster"]


NAMES = ["", ".", "..", ".hidden", "a/b", "../up", "a b", "-rf", "x" * 65, "a\n", "é", 5, b"bytes", Path("p")]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_bad_run_names(name: Any, store: Path) -> None:
    with pytest.raises(hq.WorkflowError, match=r"cannot name a run|must be a string"):
        hq.run(only_arguments, 1, name=name, store=store)
    assert not store.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"workers": True}, "workers is True"),
        ({"workers": 1.5}, "workers is 1.5"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": "1"}, "seed is '1'"),
        ({"seed": True}, "seed is True"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], words: str, store: Path) -> None:
    with pytest.raises(hq.WorkflowError, match=words):
        hq.run(only_arguments, 1, store=store, **options)
    assert not store.exists()


def test_unhashable_arguments_of_the_run(store: Path) -> None:
    with pytest.raises(hq.Unhashable, match=r"argument of only_arguments\(\)\[0\] is a .*Opaque"):
        hq.run(only_arguments, Opaque(), store=store)
    assert not store.exists()


def test_a_run_of_something_else_is_left_alone(store: Path) -> None:
    hq.run(only_arguments, 1, name="taken", seed=1, store=store)
    before = (store / "taken" / "journal.jsonl").read_bytes()
    others: list[tuple[Any, Any, int, str]] = [
        (only_arguments, 2, 1, "2"),
        (only_arguments, 1.0, 1, "1.0"),
        (only_arguments, 1, 2, '"seed": 2'),
        (misuse, 1, 1, "misuse"),
    ]
    for workflow, argument, seed, shown in others:
        with pytest.raises(hq.Diverged, match="other arguments, another backend, or of another workflow") as caught:
            hq.run(workflow, argument, name="taken", seed=seed, store=store)
        assert shown in str(caught.value)
        assert str(store / "taken") in str(caught.value)
        assert (store / "taken" / "journal.jsonl").read_bytes() == before
    assert hq.run(only_arguments, 1, name="taken", seed=1, store=store) == 1


def test_a_run_in_use(store: Path) -> None:
    @hq.workflow
    def holds() -> str:
        said = []

        def second() -> None:
            with pytest.raises(hq.Locked) as caught:
                hq.run(holds, name="held", store=store)
            said.append(str(caught.value))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return said[0]

    message = hq.run(holds, name="held", store=store)
    assert f"process {os.getpid()}@{socket.gethostname()}" in message
    assert str(store / "held") in message
    assert count(store / "held") == {"run": 1, "opened": 1, "end": 1}


def test_a_cluster_that_does_not_answer(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridq.cluster._CONNECT_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(hq.NoDevice) as caught:
            hq.run(takes_one, name="nobody", store=store, cluster=address)
    assert address in str(caught.value)
    assert "dask scheduler" in str(caught.value)
    assert count(store / "nobody")["step"] == 0
    with pytest.raises(hq.WorkflowError, match="cluster is a int; give a scheduler's address"):
        hq.run(takes_one, name="number", store=store, cluster=8786)


@hq.workflow
def takes_one() -> Any:
    return takes(1)


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        SCRIPT.replace('if __name__ == "__main__":\n    ', "").replace("cluster=sys.argv[1]", "workers=1")
    )
    found = python(script, "x", "run", code=1)
    assert "WorkflowError" in found.stderr
    assert 'if __name__ == "__main__":' in found.stderr
    assert found.stdout == ""
    assert count(tmp_path / "runs" / "run")["step"] == 0


def test_a_function_that_cannot_travel(client: Client, store: Path) -> None:
    lock = threading.Lock()

    @hq.classical(version="1")
    def locked() -> bool:
        return lock.locked()

    @hq.workflow
    def study() -> bool:
        return locked()

    with pytest.raises(hq.WorkflowError, match=r"locked\(\) cannot be sent to a worker: TypeError: cannot pickle"):
        hq.run(study, name="lock", store=store, cluster=client)
    assert count(store / "lock")["step"] == 0


def test_calls_are_packed_in_many_threads_at_once() -> None:
    """Modules are sent by value while a call is packed, and what says so belongs to the whole process."""
    packed: list[bytes] = []

    def pack() -> None:
        for _ in range(500):
            packed.append(pack_call(takes.__wrapped__, (1,), {}, (__name__,), "takes()"))

    threads = [threading.Thread(target=pack) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(packed) == 2000
    assert len(set(packed)) == 1


# -- a pure replay is light --------------------------------------------------------------------------------------------

LIGHT = """
import sys
import hybridq as hq

@hq.classical
def problem(bond):
    return hq.molecule(f"H 0 0 0; H 0 0 {bond}", basis="sto-3g")

@hq.quantum
def energy(theta, p):
    return hq.expval(p.ansatz, p.hamiltonian, theta)

@hq.workflow
def study(bond):
    p = problem(bond)
    found = hq.minimize(energy, p.start, args=(p,), method="COBYLA", options={"maxiter": 8})
    return [found.fun, float(energy(found.x, p)), hq.now(), float(hq.rng().random())]

if __name__ == "__main__":
    print(hq.run(study, 0.74, name="light", cluster=sys.argv[1]))
    print(sorted({name.partition(".")[0] for name in sys.modules} & {"qiskit_aer", "distributed", "pyscf", "qiskit"}))
"""


def test_a_pure_replay_imports_nothing_heavy(client: Client, tmp_path: Path) -> None:
    script = tmp_path / "light.py"
    script.write_text(textwrap.dedent(LIGHT))
    live = python(script, client.scheduler_info()["address"]).stdout.splitlines()
    assert "distributed" in live[1]
    again = python(script, "tcp://127.0.0.1:9").stdout.splitlines()
    assert again[0] == live[0]
    assert again[1] == "['qiskit']"


# -- backends ------------------------------------------------------------------------------------------------------

NOISE = hq.Noise.depolarizing(0.05, 0.1)


@hq.quantum
def own(theta: Any) -> Any:
    return hq.expval(CIRCUIT, TERMS, theta, backend="statevector")


@hq.quantum
def drawn(theta: Any) -> Any:
    return hq.sample(CIRCUIT, theta, shots=64)


@hq.workflow
def everything() -> Any:
    first = float(energy([0.4, 0.9])), float(own([0.4, 0.9])), float(sampled([0.4, 0.9]))
    return *first, drawn([0.4, 0.9]).array.tolist(), float(energy([0.1, 0.2]))


def plans(directory: Path) -> list[dict[str, Any]]:
    return [e["plan"]["v"] for e in journal(directory) if e["k"] == "circuit"]


def test_a_runs_backend_evaluates_what_names_none(store: Path, client: Client) -> None:
    expected = closed_form([0.4, 0.9])
    found = hq.run(everything, name="dense", store=store, cluster=client, backend="density_matrix")
    assert found[:2] == pytest.approx((expected, expected), abs=1e-10)
    assert {plan["method"] for plan in plans(store / "dense")} == {"density_matrix", "statevector"}
    noisy = hq.run(everything, name="noisy", store=store, cluster=client, backend=hq.Aer(noise=NOISE))
    assert noisy[1] == found[1]
    assert abs(noisy[0] - expected) > 0.01
    assert {plan["method"] for plan in plans(store / "noisy")} == {"density_matrix", "statevector"}


@pytest.mark.parametrize("backend", ["density_matrix", hq.Aer(noise=NOISE)], ids=["name", "noise"])
def test_a_run_with_a_backend_resumes_to_the_same_bits(backend: Any, store: Path, client: Client) -> None:
    options: dict[str, Any] = {"name": "whole", "cluster": client, "backend": backend}
    found = hq.run(everything, store=store, **options)
    lines = journal(store / "whole")
    for kept in [i for i, line in enumerate(lines) if line["k"] == "eval"]:
        copy = cut(store / "whole", kept, store / f"cut{kept}")
        assert exact(hq.run(everything, store=copy.parent, **options)) == exact(found)
    again = report(everything, store=store, **options)
    assert exact(again.value) == exact(found)
    assert executed(again) == (0, 0)


def test_the_same_name_with_another_backend_diverges_with_both_shown(store: Path, client: Client) -> None:
    options: dict[str, Any] = {"name": "one", "store": store, "cluster": client}
    hq.run(everything, backend="density_matrix", **options)
    lines = journal(store / "one")
    for other, recorded, called in (
        (None, '"method": "density_matrix"', '"method": "automatic"'),
        ("statevector", '"method": "density_matrix"', '"method": "statevector"'),
        (hq.Aer("density_matrix", NOISE), '"noise": null', '"noise": {'),
        ("adjoint", "backends:Aer", "backends:Adjoint"),
    ):
        with pytest.raises(hq.Diverged, match="another backend") as caught:
            hq.run(everything, backend=other, **options)
        sides = [line.partition("|") for line in str(caught.value).splitlines()]
        assert any(recorded in left and called in right for left, _, right in sides)
    assert journal(store / "one")[: len(lines)] == lines
    hq.run(everything, backend=hq.Aer("density_matrix"), **options)  # the same by another name


def test_another_backend_is_another_run_where_no_name_is_given(store: Path, client: Client) -> None:
    for backend in (None, "aer", "density_matrix", hq.Aer("density_matrix"), hq.Aer(noise=NOISE)):
        hq.run(everything, store=store, cluster=client, backend=backend)
    assert len(list(store.iterdir())) == 3


@hq.quantum
def chosen(theta: Any, backend: Any) -> Any:
    return hq.expval(CIRCUIT, TERMS, theta, backend=backend)


@hq.workflow
def chooses(backend: Any) -> float:
    return float(chosen([0.4, 0.9], backend))


def test_an_evaluation_that_changed_its_backend_diverges(store: Path, client: Client) -> None:
    options: dict[str, Any] = {"name": "one", "store": store, "cluster": client}
    hq.run(chooses, "density_matrix", **options)
    with pytest.raises(hq.Diverged, match="other arguments"):
        hq.run(chooses, "statevector", **options)
    with pytest.raises(hq.WorkflowError, match="'fast' is not a method of Aer"):
        hq.run(everything, name="two", store=store, cluster=client, backend="fast")
    assert not (store / "two").exists()
