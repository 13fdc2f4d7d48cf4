"""How often the methods of ``scipy.optimize.minimize`` evaluate an objective, and how long that takes yet; pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Pace", "pace", "remaining"]


_DEFAULT = ", scipy's default"


@dataclass(frozen=True)
class Pace:
    """How often a loop evaluates its objective."""

    method: str
    iteration: tuple[int, int] | None
    """Evaluations an iteration, from and to; None if the method does not say."""
    limit: int | None
    """Evaluations at most; None if nothing limits them."""
    about: bool
    """Whether line searches, or the method's own bookkeeping, may make it more or fewer."""
    by: str
    """The option that sets the limit, as it was given or by scipy's default."""

    @property
    def bound(self) -> int | None:
        """The limit, where an option was given that the method keeps to; None for any other."""
        return None if self.about or self.by.endswith(_DEFAULT) else self.limit


_ITERATIONS: Mapping[str, Callable[[int], int]] = {
    **dict.fromkeys(("cg", "bfgs", "newton-cg", "dogleg", "trust-ncg", "trust-exact", "trust-krylov"),
                    lambda n: 200 * n),
    "l-bfgs-b": lambda n: 15000, "slsqp": lambda n: 100, "trust-constr": lambda n: 1000,
}  # fmt: skip
"""Iterations that methods with gradients make at most, by the number of parameters: scipy's defaults.

From https://docs.scipy.org/doc/scipy/reference/optimize.html, the page of each method; where that names none (CG, BFGS,
Newton-CG, trust regions), from the code of scipy 1.17.
"""


def pace(method: str, parameters: int, *, gradient: bool, options: Mapping[str, Any] | None = None, jac: Any = None,
         constrained: bool = False, bounded: bool = False) -> Pace:  # fmt: skip
    """How often ``method`` of ``scipy.optimize.minimize`` evaluates an objective of so many ``parameters``.

    ``gradient``: it gets gradients, with the values or from a function; otherwise methods that need them take finite
    differences, which are evaluations too. ``jac`` is scipy's name of those; ``options`` are scipy's.
    """
    name, n = method.lower(), parameters
    if name == "default":
        name = "slsqp" if constrained else "l-bfgs-b" if bounded else "bfgs"
        method = {"slsqp": "SLSQP", "l-bfgs-b": "L-BFGS-B", "bfgs": "BFGS"}[name]
    given = {key: _limit(value) for key, value in (options or {}).items() if value is not None}
    iterations, evaluations = given.get("maxiter"), given.get("maxfev", given.get("maxfun"))
    if name in _ITERATIONS or name == "tnc":
        each = 1 if gradient else 1 + n * (2 if jac == "3-point" else 1)
        if name == "tnc":  # counts values with their gradients
            most = given.get("maxfun") or max(100, 10 * n)
            return Pace(method, (each, each), most * each, True, _said("maxfun", most, "maxfun" in given))
        turns = _ITERATIONS[name](n) if iterations is None else iterations
        limits = [((turns + 1) * each, _said("maxiter", turns, "maxiter" in given))]  # the first is before them all
        if name == "l-bfgs-b":
            most = given.get("maxfun") or 15000
            limits.append((most, _said("maxfun", most, "maxfun" in given)))
        limit, by = min(limits)
        return Pace(method, (each, each), limit, True, by)
    if name == "cobyla":
        most = 1000 if iterations is None else iterations
        return Pace(method, (1, 1), most, False, _said("maxiter", most, "maxiter" in given))
    if name == "cobyqa":
        most = 500 * n if evaluations is None else evaluations
        return Pace(method, (1, 2), most, False, _said("maxfev", most, "maxfev" in given))
    if name in ("nelder-mead", "powell"):
        if iterations is None and evaluations is None:
            evaluations = (200 if name == "nelder-mead" else 1000) * n
        limits = [] if evaluations is None else [(evaluations, _said("maxfev", evaluations, "maxfev" in given))]
        if iterations is not None and name == "nelder-mead":  # Powell's are line searches of unknown length
            limits.append((n + 1 + 2 * iterations, _said("maxiter", iterations, True)))
        iteration = (1, 2) if name == "nelder-mead" else None
        if not limits:
            return Pace(method, iteration, None, True, "")
        limit, by = min(limits)
        return Pace(method, iteration, limit, by.startswith("maxiter"), by)
    return Pace(method, None, None, True, "")


def _limit(value: Any) -> int | None:
    """An option of scipy's as a number of evaluations; None for anything that is no limit."""
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value):
        return max(0, int(value))
    return None


def _said(option: str, value: int, given: bool) -> str:
    return f"{option}={value:,}" + ("" if given else _DEFAULT)


def remaining(ended: int, ended_rows: int, running: list[tuple[int, int | None]], rate: float
              ) -> tuple[float, bool] | None:  # fmt: skip
    """Seconds that loops still take, and whether that is a bound rather than an estimate.

    ``ended_rows`` are evaluations of the ``ended`` loops together, ``running`` evaluations and limit of each other one,
    ``rate`` evaluations a second. Loops of one place take about as long as each other: if enough have ended, that tells
    about how long the others do; else the limits set a bound, if every loop has one. Otherwise nothing can be told.
    """
    if not running or rate <= 0:
        return None
    if 2 * ended >= len(running):
        mean = ended_rows / ended
        return sum(max(0.0, mean - rows) for rows, _ in running) / rate, False
    limits = [limit for _, limit in running if limit is not None]
    if len(limits) < len(running):
        return None
    return sum(max(0, limit - rows) for (rows, _), limit in zip(running, limits, strict=True)) / rate, True
