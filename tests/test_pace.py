"""How often methods evaluate, against scipy's documentation and scipy itself."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.optimize

from hybridq.pace import pace, remaining

PACES: dict[str, tuple[tuple[str, int], dict[str, Any], tuple[Any, int | None, bool]]] = {
    "COBYLA": (("COBYLA", 4), {"options": {"maxiter": 60}}, ((1, 1), 60, False)),
    "COBYLA by default": (("cobyla", 4), {}, ((1, 1), 1000, False)),
    "COBYQA": (("COBYQA", 4), {}, ((1, 2), 2000, False)),
    "Nelder-Mead": (("Nelder-Mead", 3), {}, ((1, 2), 600, False)),
    "Nelder-Mead by iterations": (("Nelder-Mead", 3), {"options": {"maxiter": 10}}, ((1, 2), 24, True)),
    "Nelder-Mead by both": (("Nelder-Mead", 3), {"options": {"maxiter": 9, "maxfev": 7}}, ((1, 2), 7, False)),
    "Powell": (("Powell", 3), {"options": {"maxfev": 50}}, (None, 50, False)),
    "Powell by iterations": (("Powell", 3), {"options": {"maxiter": 5}}, (None, None, True)),
    "L-BFGS-B": (("L-BFGS-B", 3), {"gradient": True}, ((1, 1), 15000, True)),
    "L-BFGS-B by differences": (("L-BFGS-B", 3), {"options": {"maxiter": 9}}, ((4, 4), 40, True)),
    "L-BFGS-B by evaluations": (("L-BFGS-B", 3), {"options": {"maxfun": 9}}, ((4, 4), 9, True)),
    "BFGS": (("BFGS", 3), {"gradient": True}, ((1, 1), 601, True)),
    "BFGS of three points": (("BFGS", 3), {"jac": "3-point", "options": {"maxiter": 1}}, ((7, 7), 14, True)),
    "SLSQP": (("SLSQP", 2), {}, ((3, 3), 303, True)),
    "TNC": (("TNC", 2), {"gradient": True}, ((1, 1), 100, True)),
    "default": (("default", 2), {"gradient": True}, ((1, 1), 401, True)),
    "default with bounds": (("default", 2), {"gradient": True, "bounded": True}, ((1, 1), 15000, True)),
    "default with constraints": (("default", 2), {"gradient": True, "constrained": True}, ((1, 1), 101, True)),
    "custom": (("spsa()", 2), {"options": {"maxiter": 5}}, (None, None, True)),
    "a limit that is none": (("COBYLA", 2), {"options": {"maxiter": None}}, ((1, 1), 1000, False)),
}


@pytest.mark.parametrize(("arguments", "options", "expected"), PACES.values(), ids=PACES.keys())
def test_paces_of_methods(arguments: tuple[str, int], options: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = pace(*arguments, **{"gradient": False, **options})
    assert (found.iteration, found.limit, found.about) == expected
    assert bool(found.by) == (found.limit is not None)


@pytest.mark.parametrize("method", ["COBYLA", "COBYQA", "Nelder-Mead", "Powell"])
def test_scipy_keeps_the_limits_that_are_told_as_firm(method: str) -> None:
    for option in ("maxiter",) if method == "COBYLA" else ("maxfev",):
        found = pace(method, 3, gradient=False, options={option: 25})
        done = scipy.optimize.minimize(scipy.optimize.rosen, [-1.2, 1.0, 2.0], method=method, options={option: 25})
        assert not found.about
        assert done.nfev <= found.limit == 25


def test_only_limits_that_were_given_and_are_kept_are_bounds() -> None:
    assert pace("COBYLA", 2, gradient=False, options={"maxiter": 40}).bound == 40
    assert pace("COBYLA", 2, gradient=False).bound is None  # scipy's default
    assert pace("L-BFGS-B", 2, gradient=True, options={"maxiter": 40}).bound is None  # line searches may take more
    assert pace("Powell", 2, gradient=False, options={"maxfev": 50}).bound == 50


def test_remaining_is_told_of_nothing_when_nothing_runs() -> None:
    assert remaining(3, 300, [], 10.0) is None
    assert remaining(1, 100, [(50, None)], 0.0) is None
    assert remaining(1, 100, [(50, None)], 10.0) == (5.0, False)
    assert remaining(1, 100, [(150, None)], 10.0) == (0.0, False)
    assert remaining(0, 0, [(50, 60), (10, 20)], 10.0) == (2.0, True)
