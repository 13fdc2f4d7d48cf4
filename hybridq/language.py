"""The language: what a researcher decorates, calls and runs."""

from __future__ import annotations

import ast
import concurrent.futures
import functools
import inspect
import itertools
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Generic, ParamSpec, TypeVar, overload

import numpy as np
from threadpoolctl import threadpool_limits

from hybridq import calibration
from hybridq import journal as records
from hybridq.dispatch import driver_engine
from hybridq.engines.loops import settings_as_data
from hybridq.errors import JournalError, NotFinite, TimedOut, WorkflowError
from hybridq.journal import Journal, run_directory
from hybridq.location import Location, seed_key
from hybridq.monitor.feed import Feed
from hybridq.planning import Unknown, Unplanned, completed, needed, origin, unknown_in
from hybridq.program import GRADIENTS, Outcome, Program, Request, derivatives, program, result
from hybridq.progress import Progress
from hybridq.recorded import origin_of
from hybridq.resources import Need, parse_bytes
from hybridq.runner import First, LoopCall, Pending, PlannedRun, Run, StepCall, describe_call, follows, scalar
from hybridq.scope import Describing, Scope, StepScope, current
from hybridq.scope import priority as scope_priority
from hybridq.sites import LOCAL, Site
from hybridq.source import parsing, source_of, unwrap
from hybridq.values import digest, encode

__all__ = [
    "Again",
    "ClassicalFunction",
    "Future",
    "Overrides",
    "QuantumFunction",
    "RunReport",
    "WorkflowFunction",
    "as_completed",
    "classical",
    "expval",
    "gradient",
    "map",
    "minimize",
    "now",
    "overrides",
    "priority",
    "quantum",
    "rng",
    "run",
    "sample",
    "workflow",
]

P = ParamSpec("P")
R = TypeVar("R")
_MAP_WINDOW = 256
"""Children of one ``map`` that are live at once; each map has a window of its own, so nested maps cannot deadlock."""


# -- decorated functions -------------------------------------------------------------------------------------------


class _Decorated(Generic[P, R]):
    """A researcher's function with a name in runs; a plain function outside of one."""

    __wrapped__: Callable[P, R]

    def __init__(self, function: Callable[P, R]) -> None:
        if not inspect.isfunction(function):
            raise WorkflowError(f"{function!r} is not a function; decorate functions defined with def.")
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise WorkflowError(f"{function.__qualname__} is a coroutine or generator; decorate plain functions.")
        self.__wrapped__ = function
        self.__name__, self.__qualname__ = function.__name__, function.__qualname__
        self.__module__, self.__doc__ = function.__module__, function.__doc__

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        raise WorkflowError(
            f"{self.__name__} is decorated inside the class {owner.__qualname__}; decorate functions of a module and "
            "pass them what they need, so that every argument is recorded."
        )


class ClassicalFunction(_Decorated[P, R]):
    """A classical step; made by `classical`."""

    def __init__(self, function: Callable[P, R], memory: int, retries: int, timeout: float | None,
                 version: str | None) -> None:  # fmt: skip
        super().__init__(function)
        self._memory, self._retries, self._timeout, self._version = memory, retries, timeout, version

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the step and return its value: on the cluster in a run, here outside of one or inside another step."""
        scope = _scope(self.__name__)
        if scope is None:
            return self.__wrapped__(*args, **kwargs)
        value: R = scope.run.wait(scope, self._start(scope, scope.next(_name(self)), args, kwargs))
        return value

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Start the step and return a future for its value."""
        scope = _scope(self.__name__)
        if scope is None:
            return Future(None, None, functools.partial(self.__wrapped__, *args, **kwargs))
        return Future(scope.run, self._start(scope, scope.next(_name(self)), args, kwargs))

    def _start(self, scope: Scope, location: Location, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pending:
        run: Run = scope.run
        run.go_on(scope)
        try:
            bound = inspect.signature(self.__wrapped__).bind(*args, **kwargs)
        except TypeError as error:
            raise WorkflowError(f"{self.__name__}{inspect.signature(self.__wrapped__)}: {error}") from error
        return run.step(
            location,
            StepCall(
                self.__name__, self.__wrapped__, run.source(self.__wrapped__, self._version), bound.args, bound.kwargs,
                Need(self._memory, 0.0), self._retries, self._timeout,
            ),
        )  # fmt: skip


class QuantumFunction(_Decorated[P, Request]):
    """A quantum function; made by `quantum`."""

    def __init__(self, function: Callable[P, Request], timeout: float | None = None) -> None:
        super().__init__(function)
        self.timeout = timeout
        """Seconds that an evaluation may take."""
        self._calls = itertools.count()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Evaluate: an `Estimate` for `expval`, a Qiskit ``BitArray`` for `sample`."""
        scope = self._scope()
        describe = functools.partial(self.__wrapped__, *args, **kwargs)
        if scope is None:
            return _evaluate_outside(self.__name__, describe, next(self._calls), self.timeout)
        scope.run.go_on(scope)
        return scope.run.evaluate(scope, scope.next(_name(self)), self.__name__, describe, timeout=self.timeout)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Future[Any]:
        """Queue the evaluation and return a future for its value."""
        scope = self._scope()
        if scope is None:
            return Future(None, None, functools.partial(self, *args, **kwargs))
        return Future(scope.run, self._start(scope, scope.next(_name(self)), args, kwargs))

    def _start(self, scope: Scope, location: Location, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pending:
        run: Run = scope.run
        run.go_on(scope)
        describe = functools.partial(self.__wrapped__, *args, **kwargs)
        return run.submit_evaluation(location, self.__name__, describe, self.timeout)

    def _scope(self) -> Scope | None:
        if isinstance(current.get(), StepScope):
            raise WorkflowError(
                f"the quantum function {self.__name__} was called inside a classical step; a step runs on one worker "
                "and cannot wait for devices. Call it in the workflow and pass its value to the step."
            )
        return _scope(self.__name__)


class WorkflowFunction(_Decorated[P, R]):
    """A workflow; made by `workflow`."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the body: in a scope of its own in a run, as a plain function outside of one."""
        scope = _scope(self.__name__)
        if scope is None:
            return self.__wrapped__(*args, **kwargs)
        scope.run.go_on(scope)
        value: R = scope.run.enter(scope, scope.next(_name(self)), self.__wrapped__, args, kwargs)
        return value

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Start the workflow beside the caller and return a future for its value."""
        scope = _scope(self.__name__)
        if scope is None:
            return Future(None, None, functools.partial(self.__wrapped__, *args, **kwargs))
        scope.run.go_on(scope)
        return Future(scope.run, scope.run.spawn(scope.next(_name(self)), self.__wrapped__, args, kwargs))


@overload
def classical(function: Callable[P, R]) -> ClassicalFunction[P, R]: ...
@overload
def classical(*, memory: str | int = 0, retries: int = 0, timeout: float | None = None, version: str | None = None
              ) -> Callable[[Callable[P, R]], ClassicalFunction[P, R]]: ...  # fmt: skip
def classical(function: Any = None, *, memory: str | int = 0, retries: int = 0, timeout: float | None = None,
              version: str | None = None) -> Any:  # fmt: skip
    """Make a function a classical step: in a run it executes on the Dask cluster, once, and its value is recorded.

    ``memory`` (``"1 GiB"`` or bytes) is set aside on the worker; ``retries`` says how often a step that raised is tried
    again (one whose worker was lost is tried again anyway); ``timeout`` is in seconds. ``version`` replaces the
    function's source in its digest. Arguments and value must be data (`hybridq.values.encode` lists the types).
    Raises `WorkflowError` for options of the wrong kind.
    """
    try:
        amount = parse_bytes(memory)
    except ValueError as error:
        raise WorkflowError(f"memory: {error}") from error
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise WorkflowError(f"retries is {retries!r}; it must be an integer, 0 or more.")
    _check_timeout(timeout)

    def decorate(f: Callable[P, R]) -> ClassicalFunction[P, R]:
        return ClassicalFunction(f, amount, retries, timeout, version)

    return decorate if function is None else decorate(function)


@overload
def quantum(function: Callable[P, Request]) -> QuantumFunction[P]: ...
@overload
def quantum(*, timeout: float | None = None) -> Callable[[Callable[P, Request]], QuantumFunction[P]]: ...
def quantum(function: Any = None, *, timeout: float | None = None) -> Any:
    """Make a function a quantum one: its body returns `expval` or `sample` and does nothing else.

    An evaluation that takes longer than ``timeout`` seconds fails with `TimedOut`; its engine process is ended with it.
    Raises `WorkflowError` for a timeout that is no positive number.
    """
    _check_timeout(timeout)

    def decorate(f: Callable[P, Request]) -> QuantumFunction[P]:
        return QuantumFunction(f, timeout)

    return decorate if function is None else decorate(function)


def _check_timeout(timeout: Any) -> None:
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if timeout is not None and not (number and 0 < timeout < float("inf")):
        raise WorkflowError(f"timeout is {timeout!r}; it must be a positive number of seconds, or None.")


def workflow(function: Callable[P, R]) -> WorkflowFunction[P, R]:
    """Make a function a workflow: plain Python that calls steps, quantum functions, loops and other workflows."""
    return WorkflowFunction(function)


@contextmanager
def priority(value: int) -> Iterator[None]:
    """What is called within leaves before all that waits with a lower priority (0 where none is given).

    ``with hq.priority(1): hq.map(...)``; what is called inside inherits it. Raises `WorkflowError` if ``value`` is no
    integer.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise WorkflowError(f"priority is {value!r}; it must be an integer.")
    token = scope_priority.set(value)
    try:
        yield
    finally:
        scope_priority.reset(token)


def expval(circuit: Any, observables: Any, theta: Any = None, *, shots: int | None = None,
           precision: float | None = None, backend: Any = None, grouping: str | None = None) -> Request:  # fmt: skip
    """Describe expectation values of ``observables`` in the state that ``circuit`` prepares.

    ``circuit`` is a Qiskit ``QuantumCircuit`` without measurements before its end. ``observables`` is a
    ``SparsePauliOp``, Pauli, label, ``{label: coefficient}`` dict, list of (label, coefficient) pairs, or a nested
    sequence of these. ``theta`` has shape (..., P), radians, for the P parameters in the order of
    ``circuit.parameters``, or maps parameters or their names to values; its leading axes broadcast with the
    observables' shape as in a Qiskit PUB. Exact without ``shots`` and ``precision``; ``shots`` are split among groups
    of Paulis that are measured together; ``precision`` asks for the shots that keep the standard error below it in any
    state. ``grouping`` is ``"qubit-wise"`` (default) or ``"commuting"``: fewer groups, wider measurements. ``backend``
    is what evaluates it, in place of the run's: ``hq.Aer(method=..., noise=...)``, ``hq.Adjoint()``,
    ``hq.Backend("module:function")``, a Qiskit ``BackendV2``, a name such as ``"density_matrix"``, or that of a device
    of the run's site.
    """
    if observables is None:
        raise WorkflowError("no observable was given; hq.expval(circuit, observables, theta) needs at least one.")
    return Request(circuit, observables, theta, shots, precision, backend, grouping)


def sample(circuit: Any, theta: Any = None, *, shots: int, backend: Any = None) -> Request:
    """Describe ``shots`` samples of bit strings from ``circuit``, for each row of ``theta`` (shape (..., P), radians).

    A circuit without classical bits has all its qubits measured; otherwise its own measurements count. ``backend`` is
    as in `expval`.
    """
    return Request(circuit, None, theta, shots, None, backend)


class Future(Generic[R]):
    """The value of a call that was submitted."""

    def __init__(self, run: Run | None, pending: Pending | None, plain: Callable[[], R] | None = None) -> None:
        self._run, self._pending = run, pending
        self._value: R | None = None
        self._error: Exception | None = None
        scope = current.get()
        if pending is not None and isinstance(scope, Scope):
            scope.submitted.append(pending)
        if plain is not None:  # outside of a run: done at once
            try:
                self._value = plain()
            except Exception as error:  # noqa: BLE001  # raised by result(), as in a run
                self._error = error

    def result(self) -> R:
        """Wait for the value and return it; raises what the call raised."""
        if self._pending is None or self._run is None:
            if self._error is not None:
                raise self._error
            return self._value  # type: ignore[return-value]
        scope = current.get()
        if not isinstance(scope, Scope) or scope.run is not self._run:
            raise WorkflowError("a future's result was asked for outside of the workflow that submitted it.")
        value: R = self._run.wait(scope, self._pending)
        return value


def as_completed(futures: Iterable[Future[R]]) -> Iterator[Future[R]]:
    """The futures in the order in which they complete; the order is recorded, and a replay repeats it."""
    listed = list(futures)
    scope = _scope("as_completed")
    if scope is None:
        yield from listed
        return
    pendings = [f._pending for f in listed if isinstance(f, Future) and f._pending is not None and f._run is scope.run]
    if len(pendings) < len(listed):
        raise WorkflowError("hq.as_completed takes futures of this run: those that .submit returned.")
    for index in scope.run.first_done(scope, pendings):
        yield listed[index]


def map(function: Callable[..., R], *iterables: Iterable[Any], return_exceptions: bool = False) -> list[Any]:
    """Call ``function`` for the members of ``iterables`` (of equal lengths) side by side; the values in order.

    ``function`` is a decorated function, or any function, which then counts as a workflow. All calls finish; then the
    exception of the lowest index is raised, or exceptions stand in their places with ``return_exceptions``.
    """
    if not iterables:
        raise WorkflowError("hq.map needs at least one iterable: hq.map(function, [1, 2, 3]).")
    try:
        calls = list(zip(*iterables, strict=True))
    except ValueError as error:
        raise WorkflowError(f"the iterables of hq.map have different lengths: {error}") from error
    if not callable(function):
        raise WorkflowError(f"{function!r} cannot be called; hq.map(function, iterable) takes the function first.")
    name = _name(function)
    scope = _scope(f"map({name})")
    takes: list[Callable[[], Any]]
    if scope is None:
        takes = [functools.partial(function, *call) for call in calls]
    else:
        run: Run = scope.run
        run.go_on(scope)
        pendings = _start_all(scope, function, name, calls)
        takes = [functools.partial(run.wait, scope, pending) for pending in pendings]
    values: list[Any] = []
    errors: list[Exception] = []
    for take in takes:
        try:
            values.append(take())
        except Exception as error:  # noqa: BLE001  # all calls finish before one is raised
            values.append(error)
            errors.append(error)
    if errors and not return_exceptions:
        raise errors[0]
    return values


def _start_all(scope: Scope, function: Any, name: str, calls: Sequence[tuple[Any, ...]]) -> list[Pending]:
    run: Run = scope.run
    base = scope.reserve(name, len(calls))
    locations = [scope.location.child(name, base + i) for i in range(len(calls))]
    if isinstance(function, (ClassicalFunction, QuantumFunction)):
        return [_begin(scope, function, at, call) for at, call in zip(locations, calls, strict=True)]
    body = unwrap(function)
    window = threading.Semaphore(_MAP_WINDOW)
    pendings = []
    for at, call in zip(locations, calls, strict=True):
        window.acquire()
        pendings.append(run.spawn(at, body, call, {}, window.release))
    return pendings


def _begin(scope: Scope, function: ClassicalFunction[Any, Any] | QuantumFunction[Any], location: Location,
           call: tuple[Any, ...]) -> Pending:  # fmt: skip
    """Start one call of a map; one that is refused takes its place among the others, which go on."""
    try:
        return function._start(scope, location, call, {})
    except Exception as error:  # noqa: BLE001  # raised when all have finished
        refused: concurrent.futures.Future[Any] = concurrent.futures.Future()
        refused.set_exception(error)
        return Pending(location, refused, [])


def gradient(fun: QuantumFunction[Any], *args: Any, method: str = "auto") -> np.ndarray[Any, Any]:
    """Derivatives of the expectation value that ``fun(*args)`` describes, by all parameters of its circuit.

    Shape (..., P): the broadcast shape of parameters and observables, then the P parameters in the order of
    ``circuit.parameters``; in units of the observable a radian. ``method`` is ``"adjoint"`` (exact values only),
    ``"parameter-shift"`` (Schuld et al., Phys. Rev. A 99, 032331), ``"spsa"`` (a random estimate by two evaluations:
    Spall, IEEE Trans. Autom. Control 37, 332) or ``"auto"``. Recorded in runs like a value.
    """
    if not isinstance(fun, QuantumFunction):
        raise WorkflowError(f"hq.gradient takes a quantum function, not {fun!r}.")
    if method not in GRADIENTS:
        raise WorkflowError(f"method is {method!r}; give one of {', '.join(GRADIENTS)}.")
    scope = fun._scope()
    describe = functools.partial(fun.__wrapped__, *args)
    name = f"{_name(fun)}_gradient"
    if scope is None:
        found: np.ndarray[Any, Any] = derivatives(*_outcome_outside(Location(name), fun.__name__, describe, method))
        return found
    scope.run.go_on(scope)
    found = scope.run.evaluate(scope, scope.next(name), fun.__name__, describe, method)
    return found


def rng() -> np.random.Generator:
    """A random generator that a replay repeats: seeded by the run's seed and the place of this call."""
    scope = current.get()
    if isinstance(scope, Scope):
        at, seed = scope.next("rng"), scope.run.seed
    elif isinstance(scope, StepScope):
        at, seed = scope.location.child("rng", scope.generators), scope.seed
        scope.generators += 1
    else:
        _scope("rng")
        return np.random.default_rng()
    return np.random.Generator(np.random.Philox(key=np.array(seed_key(seed, at), dtype=np.uint64)))


def now() -> float:
    """The time in seconds since the epoch; recorded in workflows, so that a replay reads the same."""
    scope = _scope("now")
    if scope is None:
        return time.time()
    scope.run.go_on(scope)
    at = scope.next("now")
    value: float = scope.run.event(at, time.time)
    return value


# -- loops ---------------------------------------------------------------------------------------------------------


def minimize(fun: Callable[..., Any], x0: Any, args: tuple[Any, ...] = (), method: Any = None, jac: Any = None,
             hess: Any = None, hessp: Any = None, bounds: Any = None, constraints: Any = (), tol: float | None = None,
             callback: Callable[..., Any] | None = None, options: Mapping[str, Any] | None = None, *,
             timeout: float | None = None) -> Any:  # fmt: skip
    """Minimize ``fun(x, *args)`` as ``scipy.optimize.minimize`` does; every evaluation is recorded.

    ``fun`` is a quantum function or any function that returns one real number; ``x0`` has shape (n,) and is finite.
    ``method`` is one of scipy's names or a callable with scipy's signature for custom minimizers. Returns scipy's
    ``OptimizeResult``. A finished loop returns its recorded result; an unfinished one goes on where it stood. Raises
    `WorkflowError` for bad settings before anything is evaluated, `NotFinite` if the objective is NaN or infinite.

    ``jac`` is a function as in scipy, or for a quantum function the way to its gradient, which then comes with each
    value: ``"adjoint"``, ``"parameter-shift"``, ``"spsa"`` (a random estimate, as `gradient` gives it), or ``"auto"``,
    which takes the adjoint for exact values if it is installed and parameter shift otherwise, where ``method`` uses
    gradients and ``fun`` hands ``x`` on unchanged. None leaves gradients to the method (finite differences).
    ``jac=True`` is refused.

    In a run, a loop whose evaluations together take longer than ``timeout`` seconds fails with `TimedOut`; what it
    evaluated is kept, and with more time it goes on from there.
    """
    from scipy import optimize

    _check_timeout(timeout)
    if not callable(fun):
        raise WorkflowError(f"fun is {fun!r}; give a quantum function or any function of (x, *args).")
    if jac is True:
        raise WorkflowError(
            "jac=True says that fun returns value and gradient; hybridq records one real number for each evaluation. "
            "Give the gradient as a function of its own, jac=gradient."
        )
    args = args if isinstance(args, tuple) else (args,)
    start = _start_point(_known_start(fun, x0, args))
    _check_method(method)
    named = isinstance(jac, str) and jac in GRADIENTS
    if named and jac != "auto" and not isinstance(fun, QuantumFunction):
        raise WorkflowError(f"jac={jac!r} is for quantum functions; give the gradient of {_name(fun)} as a function.")

    def solve(
        objective: Callable[..., Any],
        inner: Callable[[str, Callable[..., Any]], Callable[..., Any]],
        with_gradient: bool,
    ) -> Any:
        def wrapped(name: str, value: Any) -> Any:
            return inner(name, value) if callable(value) else value

        return optimize.minimize(
            objective, start.copy(), args, method, with_gradient or (None if named else wrapped("jac", jac)),
            wrapped("hess", hess), wrapped("hessp", hessp), bounds,
            _wrap_constraints(constraints, inner), tol, wrapped("callback", callback),
            None if options is None else dict(options),
        )  # fmt: skip

    scope = _scope("minimize")
    if scope is None:
        return _minimize_outside(fun, start, args, method, jac, solve)
    run: Run = scope.run
    run.go_on(scope)
    location = scope.next("minimize")
    settings = {
        "x0": start, "args": args, "method": method, "jac": jac, "hess": hess, "hessp": hessp, "bounds": bounds,
        "constraints": constraints, "tol": tol, "callback": callback, "options": options,
    }  # fmt: skip
    call = LoopCall(
        name=_name(fun),
        source=run.source(unwrap(fun)),
        arguments={key: _setting(value, run) for key, value in settings.items()},
        method=method if isinstance(method, str) else _name(method) if callable(method) else "default",
        describe=fun.__wrapped__ if isinstance(fun, QuantumFunction) else None,
        function=fun.__wrapped__ if isinstance(fun, WorkflowFunction) else fun,  # a call has one scope
        args=args,
        has_bodies=not isinstance(fun, QuantumFunction)
        or constraints not in ((), [], None)
        or any(callable(value) for value in (method, jac, hess, hessp, callback)),
        start=start,
        closed=_closed(fun, method, jac, (hess, hessp, callback), bounds, constraints, tol, options),
        gradient=functools.partial(_gradient, fun, start, args, method, jac, location, run.seed, run.site),
        solve=solve,
        beside=_of_a_point(jac, constraints),
        timeout=timeout,
        each_timeout=fun.timeout if isinstance(fun, QuantumFunction) else None,
    )
    return run.loop(scope, location, call)


def _closed(fun: Any, method: Any, jac: Any, others: tuple[Any, ...], bounds: Any, constraints: Any, tol: Any,
            options: Any) -> Mapping[str, Any] | None:  # fmt: skip
    """Settings of scipy as data, where a loop has no code of the researcher's but its quantum function."""
    named = jac is None or (isinstance(jac, str) and jac in GRADIENTS)
    by_name = named and (method is None or isinstance(method, str))
    if not isinstance(fun, QuantumFunction) or not by_name or any(other is not None for other in others):
        return None
    return settings_as_data(bounds, tol, options) if constraints is None or constraints in ((), []) else None


_WITH_GRADIENT = {
    "cg", "bfgs", "newton-cg", "l-bfgs-b", "tnc", "slsqp", "dogleg", "trust-ncg", "trust-exact", "trust-krylov",
    "trust-constr",
}  # fmt: skip
"""Methods of scipy that use gradients; None is one of them, whichever scipy takes."""


def _gradient(fun: Any, start: np.ndarray[Any, Any], args: tuple[Any, ...], method: Any, jac: Any, at: Location,
              seed: int = 0, site: Site = LOCAL) -> tuple[str, First | None]:  # fmt: skip
    """How gradients come with the values of ``fun``: "none", or as in a numeric plan. Evaluates nothing.

    And what the loop ``at`` a location evaluates first, where that had to be looked at.
    """
    if not isinstance(fun, QuantumFunction) or jac not in GRADIENTS:
        return "none", None
    if jac == "auto" and not (method is None or (isinstance(method, str) and method.lower() in _WITH_GRADIENT)):
        return "none", None
    request = describe_call(fun.__name__, functools.partial(fun.__wrapped__, start.copy(), *args))
    asked = program(request, seed=seed, location=at.child(_name(fun), 0), gradient=jac, site=site)
    if follows(asked, start):
        return asked.plan.gradient, First(request, asked)
    if jac == "auto":
        return "none", None
    raise WorkflowError(
        f"{fun.__name__} evaluates other parameters than its first argument, so jac={jac!r} would not be the gradient "
        "by it; give jac=None for finite differences, or pass the argument on as it is."
    )


def _known_start(fun: Any, x0: Any, args: tuple[Any, ...]) -> Any:
    """``x0``; in a plan, zeros for one that is not known yet, as many as ``fun`` has parameters."""
    if (missing := unknown_in(x0)) is None:
        return x0
    if isinstance(x0, (list, tuple)):
        return np.zeros(len(x0))
    if isinstance(fun, QuantumFunction):
        request, _ = completed(describe_call(fun.__name__, functools.partial(fun.__wrapped__, x0, *args)))
        if request is not None and np.ndim(request.theta) == 1:
            return request.theta
    raise Unplanned(origin(missing), "the start point of hq.minimize")


def _of_a_point(jac: Any, constraints: Any) -> dict[str, Callable[..., Any]]:
    """The researcher's functions of a point in a loop, by the names of their scopes."""
    found = {"jac": jac} if callable(jac) else {}
    for one in constraints if isinstance(constraints, (list, tuple)) else [constraints]:
        parts = one if isinstance(one, Mapping) else {"fun": getattr(one, "fun", None)}
        if callable(parts.get("fun")):
            found[f"constraint_fun_{len(found)}" if "constraint_fun" in found else "constraint_fun"] = parts["fun"]
    return found


def _start_point(x0: Any) -> np.ndarray[Any, Any]:
    try:
        start = np.atleast_1d(np.asarray(x0, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise WorkflowError(f"x0 is not an array of real numbers: {error}") from error
    if start.ndim != 1:
        raise WorkflowError(f"x0 has shape {start.shape}; it must be one-dimensional.")
    if not np.isfinite(start).all():
        where = int(np.argmin(np.isfinite(start)))
        raise WorkflowError(f"x0[{where}] is {start[where]}; a start point must be finite.")
    return start


def _check_method(method: Any) -> None:
    if method is None or callable(method):
        return
    if not isinstance(method, str):
        raise WorkflowError(f"method is {method!r}; give the name of one of scipy's methods, or a callable.")
    _check_name(method)


@functools.cache
def _check_name(method: str) -> None:
    from scipy import optimize

    try:
        optimize.show_options("minimize", method, disp=False)
    except ValueError as error:
        raise WorkflowError(
            f"{method!r} is not a method of scipy.optimize.minimize; give one of its names (such as 'L-BFGS-B', "
            "'COBYLA', 'SLSQP') or a callable with its signature."
        ) from error


def _setting(value: Any, run: Run) -> Any:
    """A setting of a loop as data: functions by their code, scipy's constraint objects by their members."""
    if isinstance(value, Unknown):  # callable, as its methods may be called
        return value
    if callable(value):
        return {"code": run.source(value).digest}
    if type(value).__module__.startswith("scipy.optimize"):
        return {"type": type(value).__name__, **{k: _setting(v, run) for k, v in sorted(vars(value).items())}}
    if isinstance(value, Mapping):
        return {k: _setting(v, run) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_setting(v, run) for v in value)
    return value


def _wrap_constraints(constraints: Any, inner: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Any:
    """``constraints`` with their functions run in scopes of the loop."""
    if isinstance(constraints, Mapping):
        return {k: inner(f"constraint_{k}", v) if callable(v) else v for k, v in constraints.items()}
    if isinstance(constraints, (list, tuple)):
        return [_wrap_constraints(c, inner) for c in constraints]
    if type(constraints).__name__ == "NonlinearConstraint":
        changed = {k: inner(f"constraint_{k}", v) if callable(v) else v for k, v in vars(constraints).items()}
        return type(constraints)(**{k: v for k, v in changed.items() if not k.startswith("_")})
    return constraints


def _minimize_outside(
    fun: Callable[..., Any],
    start: np.ndarray[Any, Any],
    args: tuple[Any, ...],
    method: Any,
    jac: Any,
    solve: Callable[..., Any],
) -> Any:
    counter = itertools.count()
    gradient, _ = _gradient(fun, start, args, method, jac, Location("minimize"))

    def objective(x: Any, *_: Any) -> Any:
        at = Location(f"minimize/{_name(fun)}[{next(counter)}]")
        point = np.array(x, dtype=np.float64)
        if not np.isfinite(point).all():
            raise NotFinite(f"{at}: the optimizer asked for {point.tolist()}.")
        if gradient == "none":
            return scalar(fun(point.copy(), *args), at, point)
        assert isinstance(fun, QuantumFunction)
        describe = functools.partial(fun.__wrapped__, point.copy(), *args)
        asked, outcome = _outcome_outside(at, fun.__name__, describe, gradient, fun.timeout)
        return scalar(result(asked, outcome), at, point), derivatives(asked, outcome)

    with threadpool_limits(limits=1):
        return solve(objective, lambda _, function: function, gradient != "none")


# -- outside of runs -------------------------------------------------------------------------------------------------

_open_runs: set[Run] = set()


def _scope(what: str) -> Scope | None:
    """The scope to record in, or None where a decorated function is a plain one (outside of runs, inside a step)."""
    scope = current.get()
    if isinstance(scope, Scope):
        return scope
    if isinstance(scope, Describing):
        raise WorkflowError(
            f"{what} was called inside the quantum function {scope.name}, which must only describe one evaluation: "
            "return hq.expval(...) or hq.sample(...). Do the rest in a workflow."
        )
    if scope is None and _open_runs:
        raise WorkflowError(
            f"{what} was called in the thread {threading.current_thread().name!r}, which the run did not start, so its "
            "place in the record is unknown. Use hq.map or .submit for concurrency."
        )
    return None


def _evaluate_outside(name: str, describe: Callable[[], Request], call: int, timeout: float | None) -> Any:
    """Evaluate on this process' own engine; samples are seeded by 0, the function's name and the call's number."""
    return result(*_outcome_outside(Location(f"{name}[{call}]"), name, describe, timeout=timeout))


def _outcome_outside(
    at: Location, name: str, describe: Callable[[], Request], gradient: str = "none", timeout: float | None = None
) -> tuple[Program, Outcome]:
    asked = program(describe_call(name, describe), seed=0, location=at, gradient=gradient)
    outcome = driver_engine().evaluate([asked], timeout)[0]
    if not isinstance(outcome, Outcome):
        raise outcome
    return asked, outcome


def _name(function: Any) -> str:
    """A function's name as a step of a location."""
    return _letters(str(getattr(unwrap(function), "__name__", type(function).__name__)))


@functools.lru_cache(maxsize=256)
def _letters(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "", name) or "call"


# -- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunReport:
    """What one ``run`` did, for the command line."""

    name: str
    directory: str
    value: Any
    seconds: float
    evaluations_executed: int
    evaluations_replayed: int
    steps_executed: int
    steps_replayed: int


@dataclass(frozen=True)
class Again:
    """A recorded run that a script is to make again: the run of this workflow on these arguments gets its settings."""

    workflow: str
    arguments: str
    """Their digest."""
    name: str
    seed: int
    backend: Any


@dataclass
class Overrides:
    """Options that replace the keywords of every ``run`` of a script, and the reports of those runs."""

    name: str | None = None
    store: str | None = None
    seed: int | None = None
    workers: int | None = None
    cluster: str | None = None
    backend: Any = None
    site: str | None = None
    take_over: bool = False
    timeout: float | None = None
    allow_unencrypted: bool = False
    monitor: bool = True
    fork: str | None = None
    reuse: Sequence[str] = ()
    plan: bool = False
    """Whether runs are planned: what is quantum is priced, and nothing of it evaluated (`hybridq.planning`)."""
    again: Again | None = None
    """A run that is made again; others of the script are as the script says."""
    reports: list[RunReport] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)
    """What planned runs would take."""


overrides: ContextVar[Overrides | None] = ContextVar("hybridq_overrides", default=None)
"""Set by the command line while it executes a script."""


def run(workflow: Callable[..., R], *args: Any, name: str | None = None, seed: int | None = None,
        cluster: Any = None, store: str | os.PathLike[str] | None = None, workers: int | None = None,
        take_over: bool = False, backend: Any = None, site: Site | str | os.PathLike[str] | None = None,
        fork: str | None = None, reuse: str | Sequence[str] = (), timeout: float | None = None,
        monitor: bool = True) -> R:  # fmt: skip
    """Run ``workflow(*args)``, or finish it: the same call on a run that was interrupted goes on where it stood.

    The record is kept in ``store/name`` (default ``./runs``). Without a ``name`` the run is named by the workflow and a
    digest of arguments, seed and code, so that an edit makes a new run; a given name is strict. ``seed`` (default 0)
    seeds all randomness. ``cluster`` is None for a Dask cluster of ``workers`` processes (default: one for each core)
    on this machine, a scheduler's address, a ``distributed.Client``, or a cluster object of Dask's; it starts when the
    first call needs it.
    ``take_over`` takes a run from a driver on another host that is known to be gone. ``backend`` evaluates everything
    that names none of its own, as in `expval`; it is part of what is evaluated, so another one is another run. ``site``
    is a `Site`, or the path of a TOML file that describes one; the other keywords replace what it says.

    ``fork`` names a run of the same store, workflow and seed that this one, of another name, branches off: where code
    and arguments of a call are those of that run's call at the same location, its record answers; all else runs.
    ``reuse`` names runs of the same store whose exact evaluations answer equal ones, and whose loops of nothing else
    answer equal loops, wherever they stand, if versions and processor are the same; sampled ones never do. What answers
    is copied into this run's record, which names the run that it came from.

    A run that lasts longer than ``timeout`` seconds is left as Ctrl-C leaves it, with `TimedOut`.

    While it uses a cluster, the run is shown in that cluster's Dask dashboard, at ``/hybridq``; with ``monitor=False``
    it is not, and tells the scheduler nothing of itself.

    Returns the workflow's value. Raises what the workflow raises; `WorkflowError` for a call written wrongly;
    `NoDevice` for the name of a device that the site lacks; `JournalError` if the run is in use or damaged. Ctrl-C
    leaves the run as `KeyboardInterrupt`, SIGTERM and SIGHUP leave it as ``SystemExit(128 + number)`` if this is the
    main thread and the signal has no handler of its own: at once, with everything recorded, and nothing left behind.
    """
    asked = overrides.get() or Overrides()
    _check_run(workflow, name, asked.seed if asked.seed is not None else seed)
    timeout = asked.timeout if asked.timeout is not None else timeout
    _check_timeout(timeout)
    asked = _made_again(asked, workflow, args)
    seed = asked.seed if asked.seed is not None else seed
    given = {"cluster": cluster, "workers": workers, "backend": backend}
    if asked.site is not None:  # the command's file counts before the script's keywords, its other options before both
        site = Site.read(asked.site)
        given = {key: value for key, value in given.items() if getattr(site, key) is None}
    given |= {key: getattr(asked, key) for key in ("cluster", "workers", "backend") if getattr(asked, key) is not None}
    given["allow_unencrypted"] = asked.allow_unencrypted or None
    site = Site.of(site, **given)
    evaluates, _ = site.resolve(None)
    seed = 0 if seed is None else int(seed)
    body = unwrap(workflow)
    title = _name(workflow)
    inputs = encode(list(args), f"argument of {title}()")
    hashed = digest(list(args), f"argument of {title}()")
    code = source_of(body)
    name = asked.name if asked.name is not None else name
    if name is None:
        name = f"{title[:40]}-{digest([hashed, seed, code.digest, evaluates.identity])[:10]}"
    root = Path(asked.store or store or "runs")
    directory = run_directory(root, name)
    fork = asked.fork if asked.fork is not None else fork
    taken = _other_runs(root, name, fork, asked.reuse or reuse)
    measured = calibration.read(root)
    # the lock of a run is its process': one driver thread at a time
    journal = Journal(directory, take_over=take_over or asked.take_over)
    progress = Progress()
    try:
        header = records.RunHeader(
            records.FORMAT, name, title, code.digest, hashed, journal.store(inputs), seed,
            journal.store(encode(evaluates)), None if taken[0] is None else origin_of(taken[0]),
        )  # fmt: skip
        opened = (PlannedRun if asked.plan else Run)(
            journal=journal, header=header, site=site, progress=progress, guarded=_guarded(sys._getframe(1)),
            calibration=measured, fork=taken[0], reuse=taken[1],
        )  # fmt: skip
    except BaseException:
        journal.close()
        raise
    watched = monitor and asked.monitor and not asked.plan
    feed = Feed(name, journal, opened.dispatcher, progress) if watched else None
    with _Signals(opened, timeout) as signals:
        try:
            value: R = _finish(opened, journal, progress, title, body, args, asked, signals, feed)
        finally:
            journal.close()
        if journal.failure is not None:  # found in the background, after the last record
            raise journal.failure
        return value


class _Terminated(KeyboardInterrupt):
    """A signal that ends the run as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Signals:
    """While a run lasts, SIGTERM and SIGHUP end it as Ctrl-C does; once it leaves, no signal disturbs it.

    Of the main thread, the only one that signals reach; a signal that is ignored, or has a handler of the researcher's,
    stays as it is. A run that lasts longer than ``timeout`` seconds is ended likewise, from any thread.
    """

    def __init__(self, opened: Run, timeout: float | None) -> None:
        self.leaving = False
        self.late: TimedOut | None = None
        """What the run is ended with, if it lasted too long."""
        self._opened, self._timeout = opened, timeout
        self._before: dict[int, Any] = {}
        self._timer = threading.Timer(timeout or 0.0, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._arrived)
        if self._timeout is not None:
            self._timer.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, _Terminated):
            raise SystemExit(128 + error.number) from None

    def in_time(self) -> None:
        """The run has ended before its time was over."""
        self._timer.cancel()

    def _expire(self) -> None:
        if self.leaving:
            return
        self.late = TimedOut(
            f"the run {self._opened.name!r} took longer than its timeout of {self._timeout:g} s. Everything recorded "
            "is kept: run again with more time to finish it."
        )
        if signal.SIGINT in self._before:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            self._opened.dispatcher.abort()

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.leaving:
            return
        error = KeyboardInterrupt() if number == signal.SIGINT else _Terminated(number)
        self._opened.interrupted = error
        raise error


def _made_again(asked: Overrides, workflow: Callable[..., Any], args: tuple[Any, ...]) -> Overrides:
    """What is asked of this run: the settings of the recorded one, if it is the one to be made again."""
    again = asked.again
    if again is None or again.workflow != _name(workflow) or again.arguments != digest(list(args), "an argument"):
        return asked
    return replace(asked, name=again.name, seed=again.seed, backend=again.backend)


def _finish(opened: Run, journal: Journal, progress: Progress, title: str, body: Callable[..., R],
            args: tuple[Any, ...], asked: Overrides, signals: _Signals, feed: Feed | None) -> R:  # fmt: skip
    if opened.resumed:
        progress.message(f"resuming {opened.name} from {journal.directory}")
    _open_runs.add(opened)
    root = Scope(opened, Location(title))
    token = current.set(root)
    leave = opened.dispatcher.close
    try:
        import scipy.linalg  # noqa: F401  # its BLAS must be loaded to be limited

        with threadpool_limits(limits=1):
            value: R = opened.call(root, body, args, {})
        opened.go_on(root)
        if asked.plan and unknown_in(value) is not None:
            raise Unplanned(needed(value), "hq.run")
        signals.in_time()
        opened.end("finished", value)
    except Unplanned as stop:
        assert isinstance(opened, PlannedRun)
        opened.plan.gap(title, stop.at, f"what follows {stop.what} depends on the value of")
        opened.end("planned")
        progress.message(
            f"{opened.name} planned: {opened.counts.steps_executed} steps executed and recorded in {journal.directory}"
        )
        raise
    except BaseException as error:
        late, interrupted = signals.late, isinstance(error, KeyboardInterrupt)
        if interrupted or late is not None:
            signals.leaving = True
            leave = opened.dispatcher.abort
        _end(opened, "interrupted" if interrupted and late is None else "failed", late or error)
        if late is not None:
            progress.message(f"timed out; everything recorded is kept. Run again with: {shlex.join(sys.orig_argv)}")
            raise late from None
        progress.message(
            f"interrupted; everything recorded is kept. Resume with: {shlex.join(sys.orig_argv)}"
            if interrupted
            else f"failed; everything recorded is kept. Run again with: {shlex.join(sys.orig_argv)}"
        )
        raise
    finally:
        if isinstance(opened, PlannedRun):
            asked.plans.append(opened.report())
        current.reset(token)
        _open_runs.discard(opened)
        try:
            if feed is not None:
                feed.close()
            leave()
        except KeyboardInterrupt:
            signals.leaving = True
            opened.dispatcher.abort()
            raise
        finally:
            progress.close()
    seconds = time.monotonic() - opened.began
    counts = asdict(opened.counts)
    asked.reports.append(RunReport(opened.name, str(journal.directory), value, seconds, **counts))
    progress.message(
        f"{opened.name} finished in {seconds:.1f} s: {counts['evaluations_executed']} evaluations and "
        f"{counts['steps_executed']} steps executed, {counts['evaluations_replayed']} and {counts['steps_replayed']} "
        f"answered from the record in {journal.directory}"
    )
    return value


def _other_runs(root: Path, name: str, fork: Any, reuse: Any) -> tuple[Path | None, list[Path]]:
    """The directories of the runs whose records may answer calls of this one."""
    names = [reuse] if isinstance(reuse, str) else list(reuse)
    for what, other in (("fork", fork), *(("reuse", one) for one in names)):
        if other is None:
            continue
        if not isinstance(other, str):
            raise WorkflowError(f"{what} is {other!r}; give the name of a run.")
        if other == name:
            raise WorkflowError(f"{what} names the run {name!r} itself; give this run another name.")
        if not (run_directory(root, other) / "journal.jsonl").exists():
            raise WorkflowError(
                f"{what}: there is no run {other!r} in {root}; `hybridq runs --store {root}` lists them."
            )
    return None if fork is None else run_directory(root, fork), [run_directory(root, one) for one in names]


def _end(opened: Run, status: str, error: BaseException) -> None:
    """Record how the run was left; what it was left with counts more than that this could not be recorded."""
    text = None if type(error) is KeyboardInterrupt else error
    try:
        opened.end(status, error=text)
    except JournalError as failed:
        if failed is not error:
            error.add_note(str(failed))


def _check_run(workflow: Any, name: Any, seed: Any) -> None:
    if current.get() is not None:
        raise WorkflowError("hq.run was called inside a run; call the workflow itself, it becomes part of this run.")
    if multiprocessing.parent_process() is not None:
        raise WorkflowError(_UNGUARDED)
    if isinstance(workflow, (ClassicalFunction, QuantumFunction)) or not callable(workflow):
        raise WorkflowError(f"hq.run takes a workflow, not {workflow!r}; decorate a function with @hq.workflow.")
    if name is not None and not isinstance(name, str):
        raise WorkflowError(f"name is {name!r}; it must be a string.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer))):
        raise WorkflowError(f"seed is {seed!r}; it must be an integer.")


_UNGUARDED = (
    "hq.run is called when the script is imported, and each worker process imports it: put the call below "
    '`if __name__ == "__main__":`.'
)


def _guarded(frame: FrameType | None) -> bool:
    """Whether workers can import the main script without running it again: the call stands below a main guard."""
    main = sys.modules["__main__"]
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals is vars(main):
            break
        frame = frame.f_back
    path = getattr(main, "__file__", None)
    if frame is None or path is None or getattr(main, "__spec__", None) is not None:
        return True
    try:
        with parsing:
            tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return True
    for node in tree.body:
        if isinstance(node, ast.If) and node.lineno <= frame.f_lineno <= (node.end_lineno or node.lineno):
            return any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))
    return False
