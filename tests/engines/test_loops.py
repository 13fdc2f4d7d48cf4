"""Loops inside an engine process: the same points as scipy here, whole or in slices, continued anywhere."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp
from scipy.optimize import Bounds, OptimizeResult, minimize

from hybridq.engines.aer import AerEngine
from hybridq.engines.loops import Loop, Loops, Point, encode_result, settings_as_data
from hybridq.engines.process import EngineProcess
from hybridq.engines.wire import encode_template
from hybridq.errors import Corrupt, EngineFailed, TooLarge
from hybridq.location import Location
from hybridq.program import Request, derivatives, physical, program, result
from hybridq.values import decode

OBJECTIVE = "run/minimize[0]/energy"
START = np.random.default_rng(3).uniform(-1, 1, 12)
CASES = {
    "exact": ("L-BFGS-B", None, "adjoint", {"options": {"maxiter": 8}}),
    "shift": ("BFGS", None, "parameter-shift", {"options": {"maxiter": 3}}),
    "differences": ("SLSQP", None, "none", {"options": {"maxiter": 2}}),
    "sampled": ("COBYLA", 200, "none", {"options": {"maxiter": 30}, "tol": 1e-3}),
    "default": (None, None, "adjoint", {"options": {"maxiter": 4}}),
    "bounds": ("L-BFGS-B", None, "adjoint", {"bounds": [[-1.0, None]] * 12, "options": {"maxiter": 4}}),
    "spsa": ("CG", 500, "spsa", {"options": {"maxiter": 2}}),
}


def loop(name, token="a", **changes):
    method, shots, gradient, settings = CASES[name]
    circuit = efficient_su2(3, reps=1, entanglement="linear")
    observable = SparsePauliOp(["ZZI", "IXX", "YIY", "ZII"], [1.0, 0.5, -0.3, 0.2])
    first = program(
        Request(circuit, observable, START, shots), seed=7, location=Location(f"{OBJECTIVE}[0]"), gradient=gradient
    )
    return replace(Loop(token, first, OBJECTIVE, 7, method, settings), **changes)


@pytest.fixture(scope="module")
def process():
    engine = EngineProcess(2**31)
    yield engine
    engine.close()


def in_slices(advance, asked, seconds, points=()):
    """All points and the result; every slice adds at least one point unless it is the last."""
    points, states = list(points), []
    while not states or states[-1] == "more":
        found = advance(asked, points, seconds)
        assert found.first == len(points)
        states.append(found.state)
        assert found.points or found.state != "more"
        points += found.points
    assert states[-1] == "done"
    return points, decode(found.result), len(states)


def directly(asked):
    """scipy here, over the same programs, one at a time in a process of their own."""
    method, _, gradient, settings = asked.method, None, asked.program.plan.gradient, asked.settings
    request = Request(asked.program.template.circuit, asked.program.template.observables[0], None, asked.program.shots)
    points = []

    def objective(x):
        at = Location(f"{OBJECTIVE}[{len(points)}]")
        made = program(replace(request, theta=x), seed=asked.seed, location=at, gradient=gradient)
        (outcome,) = ENGINE[0].evaluate([made])
        value = float(result(made, outcome))
        slope = None if gradient == "none" else derivatives(made, outcome)
        points.append((x.copy(), value, slope))
        return value if slope is None else (value, slope.copy())

    found = minimize(objective, START, method=method, jac=gradient != "none" or None, **settings)
    return points, found


ENGINE: list[EngineProcess] = []


@pytest.mark.parametrize("name", CASES)
def test_the_points_are_scipys_own_however_it_is_cut(process, name):
    asked = loop(name, f"whole-{name}")
    ENGINE[:] = [process]
    points, found, slices = in_slices(process.advance, asked, 60.0)
    assert slices == 1
    expected, direct = directly(asked)
    assert len(points) == len(expected) == direct.nfev > 3
    for point, (x, value, slope) in zip(points, expected, strict=True):
        assert point.x.tobytes() == x.tobytes()
        assert point.value == value
        assert (point.gradient is None) == (slope is None)
        assert slope is None or point.gradient.tobytes() == slope.tobytes()
    assert (found.fun, found.nfev, found.message) == (direct.fun, direct.nfev, direct.message)
    again, same, slices = in_slices(process.advance, loop(name, f"cut-{name}"), 1e-9)
    assert slices >= len(points)
    assert [(p.x.tobytes(), p.value, p.stderr) for p in again] == [(p.x.tobytes(), p.value, p.stderr) for p in points]
    assert same.fun == found.fun
    assert same.x.tobytes() == found.x.tobytes()


@pytest.mark.parametrize("name", ["shift", "differences", "sampled"])
def test_points_arrive_while_the_process_goes_on(process, name):
    long = {**CASES[name][3], "options": {"maxiter": 150}}
    points, found, _ = in_slices(process.advance, loop(name, f"at-once-{name}", settings=long), 60.0)
    asked, arrived, there = loop(name, f"arriving-{name}", settings=long), [], []

    def arrive(part):
        assert (part.state, part.first, part.result) == ("more", len(there), None)
        arrived.append(len(part.points))
        there.extend(part.points)

    rest = process.advance(asked, (), 60.0, arrived=arrive)
    assert rest.first == len(there)
    assert len(arrived) > 1
    assert min(arrived) > 0
    assert [p.x.tobytes() for p in (*there, *rest.points)] == [p.x.tobytes() for p in points]
    assert decode(rest.result).x.tobytes() == found.x.tobytes()


def test_what_fails_as_points_arrive_ends_the_process_and_the_next_goes_on(process):
    asked = loop("differences", "failing", settings={"options": {"maxiter": 150}})
    points, found, _ = in_slices(process.advance, replace(asked, token="undisturbed"), 60.0)
    there = []

    def arrive(part):
        there.extend(part.points)
        raise OSError("nowhere to put them")

    with pytest.raises(OSError, match="nowhere"):
        process.advance(asked, there, 60.0, arrived=arrive)
    assert 0 < len(there) < len(points)
    again, same, _ = in_slices(process.advance, asked, 60.0, there)
    assert [p.x.tobytes() for p in again] == [p.x.tobytes() for p in points]
    assert same.x.tobytes() == found.x.tobytes()


@pytest.mark.parametrize("known", [1, 5, 9])
def test_a_loop_goes_on_where_nothing_is_known_of_it(process, known):
    points, found, _ = in_slices(process.advance, loop("exact", "first"), 60.0)
    assert len(points) > known
    other = EngineProcess(2**31)
    try:
        rest, same, _ = in_slices(other.advance, loop("exact", "second"), 60.0, points[:known])
    finally:
        other.close()
    assert [p.x.tobytes() for p in rest] == [p.x.tobytes() for p in points]
    assert same.x.tobytes() == found.x.tobytes()


class TestLoops:
    """In this process."""

    def loops(self):
        return Loops(AerEngine(2**31).evaluate)

    def test_points_are_asked_for_only_where_they_are_not_known(self):
        loops, asked = self.loops(), loop("differences")
        first = loops.advance(asked, 0, None, 1e-9)
        assert first.state == "more"
        second = loops.advance(asked, len(first.points), None, 1e-9)
        assert second.state == "more"
        assert loops.advance(asked, 1, None, 1e-9).state == "lost"  # one who knows less: another optimizer is needed
        assert loops.advance(asked, 2, None, 1e-9).state == "lost"  # and the first one was dropped

    def test_parts_and_the_rest_are_all_points(self, monkeypatch):
        monkeypatch.setattr("hybridq.engines.loops._PART_SECONDS", 0.0)
        loops, parts = self.loops(), []
        rest = loops.advance(loop("differences"), 0, None, 60.0, parts.append)
        whole = self.loops().advance(loop("differences"), 0, None, 60.0)
        assert {part.state for part in parts} == {"more"}
        assert [part.first for part in parts] == list(range(len(parts)))  # each point by itself
        assert rest.first == len(parts) == len(whole.points) - len(rest.points) > 20
        found = [point for part in (*parts, rest) for point in part.points]
        assert [p.x.tobytes() for p in found] == [p.x.tobytes() for p in whole.points]

    def test_who_knows_the_parts_goes_on_after_them(self, monkeypatch):
        monkeypatch.setattr("hybridq.engines.loops._PART_SECONDS", 0.0)
        loops, parts = self.loops(), []
        loops.advance(loop("differences", "warm"), 0, None, 1e-9)

        def arrive(part):
            parts.append(part)
            time.sleep(0.3)  # longer than the slice

        found = loops.advance(loop("differences"), 0, None, 0.3, arrive)
        assert found.state == "more"
        assert parts
        known = found.first + len(found.points)
        assert loops.advance(loop("differences"), known, None, 60.0).state == "done"

    def test_who_knows_less_than_the_parts_is_told(self, monkeypatch):
        monkeypatch.setattr("hybridq.engines.loops._PART_SECONDS", 0.0)
        loops, parts = self.loops(), []
        loops.advance(loop("differences"), 0, None, 1e-9)
        found = loops.advance(loop("differences"), 1, None, 0.3, lambda part: [parts.append(part), time.sleep(0.3)])
        assert found.state == "more"
        assert parts
        assert loops.advance(loop("differences"), 1, None, 60.0).state == "lost"

    def test_many_wait_and_the_oldest_is_dropped(self):
        loops = self.loops()
        counts = [len(loops.advance(loop("differences", str(i)), 0, None, 1e-9).points) for i in range(70)]
        assert loops.advance(loop("differences", "69"), counts[69], None, 1e-9).state == "more"
        assert loops.advance(loop("differences", "0"), counts[0], None, 1e-9).state == "lost"

    def test_points_that_are_not_the_optimizers_stop_it(self):
        wrong = Point(START + 1e-12, 0.5, 0.0, None, 0.0)
        assert self.loops().advance(loop("differences"), 1, [wrong], 1.0).state == "stopped"

    def test_a_failing_evaluation_stops_it_and_keeps_the_points(self):
        engine, calls = AerEngine(2**31), []

        def evaluate(programs):
            calls.append(programs)
            return engine.evaluate(programs) if len(calls) < 4 else [EngineFailed("enough")]

        found = Loops(evaluate).advance(loop("differences"), 0, None, 60.0)
        assert found.state == "stopped"
        assert len(found.points) == 3

    def test_a_method_that_raises_stops_it(self):
        assert self.loops().advance(loop("differences", method="nonsense"), 0, None, 1.0).state == "stopped"


def test_a_program_that_does_not_fit_stops_the_loop():
    small = EngineProcess(2**20)
    try:
        assert small.advance(loop("differences"), [], 1.0).state == "stopped"
        (outcome,) = small.evaluate([loop("differences").program])
        assert isinstance(outcome, TooLarge)
    finally:
        small.close()


def test_a_template_that_cannot_be_read_is_an_error():
    asked = loop("differences", "broken")
    template = physical(asked.program.template)
    encoded = encode_template(template)
    version = encoded.index(b"QISKIT") + 6
    broken = replace(template, cache={"wire": encoded[:version] + b"\x01" + encoded[version + 1 :]})
    given = replace(asked.program.template, cache={"physical": broken})
    asked = replace(asked, program=replace(asked.program, template=given))
    other = EngineProcess(2**31)
    try:
        with pytest.raises(Corrupt, match="QPY"):
            other.advance(asked, [], 1.0)
    finally:
        other.close()


class TestSettings:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ((None, None, None), {"bounds": None, "tol": None, "options": None}),
            (([(0, 1), (None, 2.5)], 1e-3, {"maxiter": 5}),
             {"bounds": [[0, 1], [None, 2.5]], "tol": 1e-3, "options": {"maxiter": 5}}),
            ((Bounds([0, -np.inf], [1, np.inf]), None, None),
             {"bounds": [[0.0, 1.0], [None, None]], "tol": None, "options": None}),
        ],
    )  # fmt: skip
    def test_data(self, given, expected):
        assert settings_as_data(*given) == expected

    @pytest.mark.parametrize(
        "given", [(None, None, {"f": print}), ("odd", None, None), (None, float("nan"), None), (None, 1j, None)]
    )
    def test_anything_else_stays_with_the_driver(self, given):
        assert settings_as_data(*given) is None


def test_members_of_a_result_that_are_not_data_are_named():
    found = OptimizeResult(x=np.array([1.0, 2.0]), fun=0.5, trace=object())
    encoded, left_out = encode_result(found)
    assert left_out == ("trace",)
    assert decode(encoded).x.tobytes() == found.x.tobytes()
