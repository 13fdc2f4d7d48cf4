"""What a run would take, before any of it is spent: values that are not known yet, prices of calls, and their sums.

In a plan a workflow's bodies run; a quantum call gives an `Unknown` in place of its value and leaves its `Cost` in the
`Plan`. Whatever needs the value itself raises `Unplanned`, which ends the body that it reaches. Nothing is evaluated
here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit.library import get_standard_gate_name_mapping

from hybridq.engines.costs import census, grouped
from hybridq.engines.lowering import AS_ROTATIONS, ROTATIONS, Basis, lower
from hybridq.engines.measuring import split
from hybridq.pace import Pace
from hybridq.program import Program, Request, Template, physical
from hybridq.resources import Need, format_bytes

__all__ = [
    "Cost",
    "Plan",
    "Trial",
    "Unknown",
    "Unplanned",
    "completed",
    "cost",
    "needed",
    "origin",
    "table",
    "trials",
    "unknown_in",
]

# -- values that are not known yet ---------------------------------------------------------------------------------


class Unplanned(BaseException):
    """Something needs a value that a plan does not have.

    Not an ``Exception``, so that a workflow's own ``except Exception`` does not take it for a failure of the call.
    """

    def __init__(self, at: str, what: str) -> None:
        super().__init__(f"the value of {at} is not known in a plan, and {what} needs it")
        self.at = at
        """The location whose value is needed."""
        self.what = what
        """What needs it."""


def _another(self: Unknown, *_: Any, **__: Any) -> Unknown:
    return Unknown(origin(self))


class Unknown:
    """The value of a call that was priced and not evaluated, or something made of it.

    Attributes, items, calls and arithmetic give another one, NumPy's universal functions included; formatting shows
    ``?``. What needs the value itself, such as a comparison or an array, raises `Unplanned`.
    """

    __slots__ = ("_hybridq_origin",)
    _hybridq_origin: str

    def __init__(self, at: str) -> None:
        object.__setattr__(self, "_hybridq_origin", at)

    def __getattr__(self, name: str) -> Unknown:
        if name.startswith("__"):  # a protocol that somebody looks for: an Unknown has none but those below
            raise AttributeError(name)
        return Unknown(origin(self))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        _demand(self, f"setting its attribute {name!r}")

    def __str__(self) -> str:
        return "?"

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        width = re.match(r"(?:.?[<>=^])?[-+ ]?#?0?(\d+)", spec)  # so that columns stay columns
        return "?".rjust(int(width[1]) if width else 0)

    def __copy__(self) -> Unknown:
        return self

    def __deepcopy__(self, memo: object) -> Unknown:
        return self

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Unknown:
        if options.get("out") is not None or method == "at":
            _demand(self, f"numpy.{ufunc.__name__} into an array")
        return Unknown(origin(self))

    __getitem__ = __call__ = _another
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _another
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _another
    __neg__ = __pos__ = __abs__ = __round__ = __divmod__ = __rdivmod__ = _another


def _needing(method: str, what: str) -> Callable[..., NoReturn]:
    def needs(self: Unknown, *_: Any, **__: Any) -> NoReturn:
        _demand(self, what)

    needs.__name__ = method
    return needs


_NEEDING = {
    **dict.fromkeys(("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"), "a comparison"),
    **{f"__{name}__": f"{name}()" for name in ("bool", "float", "int", "complex", "len", "hash", "trunc", "floor")},
    **{f"__{name}__": f"{name}()" for name in ("ceil", "bytes", "reversed", "fspath")},
    "__index__": "an index", "__iter__": "an iteration", "__next__": "an iteration", "__contains__": "'in'",
    "__array__": "a NumPy array", "__setitem__": "setting an item", "__delitem__": "deleting an item",
    "__enter__": "'with'", "__reduce_ex__": "pickling",
}  # fmt: skip
for _method, _what in _NEEDING.items():
    setattr(Unknown, _method, _needing(_method, _what))


def _demand(unknown: Unknown, what: str) -> NoReturn:
    raise Unplanned(origin(unknown), what)


def origin(unknown: Unknown) -> str:
    """The location of the call whose value it is, or is made of."""
    return unknown._hybridq_origin


def unknown_in(value: Any) -> Unknown | None:
    """An `Unknown` anywhere inside ``value`` (containers, dataclasses, arrays of objects), or None."""
    return next(_unknowns(value), None)


def needed(value: Any) -> str:
    """Where what is unknown in ``value`` comes from: one pattern, if these places differ in indices alone."""
    places = list(dict.fromkeys(map(origin, _unknowns(value))))
    alike = [at for at in places if _names(at) == _names(places[0])]
    return folded(alike) + (" and others" if len(alike) < len(places) else "")


def _unknowns(value: Any, depth: int = 100) -> Iterator[Unknown]:
    if isinstance(value, Unknown):
        yield value
    if depth == 0 or value is None or isinstance(value, (str, bytes, int, float, complex, Unknown)):
        return
    members: Iterable[Any] = ()
    if isinstance(value, np.ndarray):
        members = value.ravel().tolist() if value.dtype == object else ()
    elif isinstance(value, Mapping):
        members = (member for item in value.items() for member in item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        members = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        members = (getattr(value, f.name, None) for f in dataclasses.fields(value))
    for member in members:
        yield from _unknowns(member, depth - 1)


def completed(request: Request) -> tuple[Request | None, str | None]:
    """``request`` with zeros in place of parameters that are not known, and the location they come from.

    The request is None where not even the parameters' shape is known, or something else than parameters is not.
    """
    if isinstance(request, Unknown):
        return None, origin(request)
    if not isinstance(request, Request):
        return request, None  # refused, with what it is, where a program is made of it
    parts = [getattr(request, f.name) for f in dataclasses.fields(request) if f.name != "theta"]
    if (missing := unknown_in(parts)) is not None:
        return None, origin(missing)
    missing = unknown_in(request.theta)
    if missing is None:
        return request, None
    if not isinstance(request.circuit, QuantumCircuit):
        return None, origin(missing)
    theta = _zeros(request.theta, request.circuit.num_parameters)
    return (None if theta is None else replace(request, theta=theta)), origin(missing)


def _zeros(theta: Any, parameters: int) -> Any:
    """Parameters with zeros where they are not known; None if that leaves their shape open."""
    if isinstance(theta, Unknown):
        return np.zeros(parameters)
    for one in (0.0, np.zeros(parameters)):  # in a list, an Unknown may stand for a number or for a row
        filled = _filled(theta, one)
        if isinstance(filled, dict):
            return filled
        try:
            if np.shape(filled)[-1:] == (parameters,):
                return filled
        except ValueError:
            continue  # ragged
    return None


def _filled(value: Any, zero: Any) -> Any:
    if isinstance(value, Unknown):
        return zero
    if isinstance(value, Mapping):
        return {key: _filled(member, 0.0) for key, member in value.items()}
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [_filled(member, zero) for member in value]
    return value


# -- the price of one call -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What one quantum call takes."""

    qubits: int
    depth: int
    """Of the circuit as its backend has it, composite gates taken apart."""
    two_qubit_gates: int
    """Gates on two qubits or more."""
    paulis: int
    groups: int
    """Measurements that its observables are split into; 0 where nothing is measured, or only bits."""
    circuits: int
    """Circuits that are executed: one for each parameter set, group and shifted point."""
    shots: int
    """In all of them together; 0 for exact values."""
    bytes: int
    """Upper bound of the memory that it takes, in bytes."""
    threads: int
    """0: all of the worker that it runs on."""
    seconds: float
    """Estimated time on one thread, in seconds."""
    engine: str
    method: str
    sampling: str
    grouping: str
    gradient: str
    reason: str
    """Why its numbers come about as they do: the numeric plan's."""
    device: str
    """The device of the site that it asks for, or ""."""
    backend: str
    """Identity of what evaluates it."""
    divisible: tuple[int, int]
    """Into how many parts its rows, and the derivatives of each, can be divided among devices."""

    @property
    def need(self) -> Need:
        """What it asks of a device."""
        return Need(self.bytes, self.seconds, self.threads, self.qubits, self.shots)


def cost(program: Program, required: Need) -> Cost:
    """What ``program`` takes, which is known to need ``required``.

    Raises `WorkflowError` if it does not fit its backend's qubits, or has fewer shots than groups.
    """
    template, plan = physical(program.template), program.plan
    counts = census(template)
    points = program.rows
    if plan.gradient == "parameter-shift":
        points *= 1 + 2 * counts.slots
    elif plan.gradient == "spsa":
        points *= 3
    shots, groups, measurements = program.shots or 0, 0, 1
    if shots and template.observables:
        layouts = [split(observable, shots) for observable in grouped(template, plan.grouping)]
        groups = sum(map(len, layouts))
        shots, measurements = sum(map(sum, layouts)), max(1, groups)
    return Cost(
        template.num_qubits, _depth(template), counts.two + counts.wide, template.num_paulis, groups,
        points * measurements, points * shots, required.bytes, plan.threads, required.seconds, plan.engine, plan.method,
        plan.sampling, plan.grouping, plan.gradient, plan.reason, program.device, program.backend, program.divisible,
    )  # fmt: skip


@functools.cache
def _basis() -> Basis:
    natives = frozenset(get_standard_gate_name_mapping())
    return Basis("the plan", natives, ROTATIONS, AS_ROTATIONS, "superop", shared=False)


def _depth(template: Template) -> int:
    found: int | None = template.cache.get("depth")
    if found is None:
        circuit = template.circuit
        if not template.sampled_in_place:
            try:
                circuit = lower(circuit, _basis()).circuit
            except Exception:  # noqa: BLE001  # definitions are anyone's code; what is wrong is the engine's to say
                circuit = template.circuit
        found = template.cache["depth"] = int(circuit.depth())
    return found


# -- loops -----------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One evaluation of a loop's objective (gradient, constraint) that is priced: zeros stand in for values."""

    loop: str
    """The loop, as the plan shows it."""
    inside: str
    """Location of the body that runs."""
    shown: str
    """The same as the plan shows it: without the evaluation's number."""
    calls: int = 0


trials: ContextVar[Trial | None] = ContextVar("hybridq_trial", default=None)
"""The trial that the running code belongs to."""


# -- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    at: str
    cost: Cost
    loop: str | None
    submitted: bool


@dataclass(frozen=True)
class _Loop:
    at: str
    pace: Pace
    done: int
    within: str | None
    not_priced: tuple[str, ...]


@dataclass(frozen=True)
class _Step:
    at: str
    state: str
    needs: str = ""


@dataclass(frozen=True)
class _Gap:
    """Something of which the plan does not know what it takes, and why."""

    at: str
    needs: str
    why: str


@dataclass(frozen=True)
class _Refusal:
    at: str
    message: str
    needs: int
    has: int


@dataclass
class Plan:
    """What calls were priced to; filled while bodies run. Thread-safe."""

    _calls: list[_Call] = field(default_factory=list)
    _loops: dict[str, _Loop] = field(default_factory=dict)
    _steps: list[_Step] = field(default_factory=list)
    _gaps: list[_Gap] = field(default_factory=list)
    _refusals: list[_Refusal] = field(default_factory=list)
    _beside: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, at: str, priced: Cost, *, loop: str | None = None, submitted: bool = False) -> None:
        """A quantum call at ``at``: by itself, or in each evaluation of ``loop``."""
        with self._lock:
            self._calls.append(_Call(at, priced, loop, submitted))

    def loop(self, at: str, found: Pace, *, done: int, within: str | None, not_priced: Sequence[str] = ()) -> None:
        """A loop, of which ``done`` evaluations are recorded; ``within`` is the loop that it is part of."""
        with self._lock:
            self._loops[at] = _Loop(at, found, done, within, tuple(not_priced))

    def step(self, at: str, state: str, needs: str = "") -> None:
        """A classical step: ``answered``, ``ran``, ``in a loop``, or ``waits`` for the value of ``needs``."""
        with self._lock:
            self._steps.append(_Step(at, state, needs))

    def gap(self, at: str, needs: str, why: str) -> None:
        """What is at ``at`` or follows there is not priced: it depends on the value of ``needs``."""
        with self._lock:
            self._gaps.append(_Gap(at, needs, why))

    def refused(self, at: str, error: Exception, needs: int = 0, has: int = 0) -> None:
        """A call that no device takes, which ``needs`` and ``has`` so many bytes."""
        with self._lock:
            self._refusals.append(_Refusal(at, str(error), needs, has))

    def spawned(self, at: str) -> None:
        """A body that runs beside others."""
        with self._lock:
            self._beside.append(at)

    @property
    def refusals(self) -> int:
        """How many calls fit no device."""
        return len(self._refusals)

    def document(self, place: Callable[[Cost, bool], str]) -> dict[str, Any]:
        """The plan as JSON-able data, calls of equal size folded into one row.

        ``place`` says where something would go, and is told whether nothing else could be waiting then.
        """
        with self._lock:
            siblings: dict[str, int] = defaultdict(int)
            for at in self._beside:
                siblings[at.rpartition("/")[0]] += 1
            crowded = {at for at in self._beside if siblings[at.rpartition("/")[0]] > 1}
            groups: dict[Hashable, list[_Call]] = defaultdict(list)
            for call in self._calls:
                alone = not any(above in crowded for above in _above(call.at))
                device = place(call.cost, alone and not call.submitted)
                size = replace(call.cost, bytes=0, seconds=0.0)
                loop = None if call.loop is None else self._loops[call.loop]
                kind = None if loop is None else (loop.pace, loop.not_priced, loop.within is None)
                groups[_names(call.at), size, kind, device].append(call)
            rows = [self._row(calls, key[3]) for key, calls in groups.items()]  # type: ignore[index]
            return {
                "calls": rows,
                "steps": [
                    {"at": folded([s.at for s in steps]), "count": len(steps), "state": state,
                     "needs": folded([s.needs for s in steps]) if steps[0].needs else None}
                    for (_, state, _), steps in _grouped(self._steps, lambda s: (_names(s.at), s.state,
                                                                                 _names(s.needs)))
                ],
                "not_planned": [
                    {"at": folded([g.at for g in gaps]), "count": len(gaps), "needs": folded([g.needs for g in gaps]),
                     "why": gaps[0].why}
                    for _, gaps in _grouped(self._gaps, lambda g: (_names(g.at), _names(g.needs), g.why))
                ],
                "refusals": [asdict(refusal) for refusal in self._refusals],
                "totals": _totals(rows),
            }  # fmt: skip

    def _row(self, calls: Sequence[_Call], device: str) -> dict[str, Any]:
        costs = [call.cost for call in calls]
        sums = {name: sum(getattr(c, name) for c in costs) for name in ("circuits", "shots", "seconds")}
        row = {
            "at": folded([call.at for call in calls]), "count": len(calls), **asdict(costs[0]), **sums,
            "bytes": max(c.bytes for c in costs), "device": device, "loop": None,
        }  # fmt: skip
        del row["backend"], row["divisible"]
        if calls[0].loop is not None:
            row["loop"] = self._loop_row(calls)
        return row

    def _loop_row(self, calls: Sequence[_Call]) -> dict[str, Any]:
        loops = [self._loops[at] for at in dict.fromkeys(call.loop for call in calls if call.loop is not None)]
        turns = {loop.at: self._remaining(loop) for loop in loops}
        limited = all(turn is not None for turn in turns.values())
        at_limit = {"evaluations": 0, "circuits": 0, "shots": 0, "seconds": 0.0}
        for call in calls:
            turn = turns[str(call.loop)] or 0
            at_limit["evaluations"] += turn
            for name in ("circuits", "shots", "seconds"):
                at_limit[name] += turn * getattr(call.cost, name)
        found = loops[0].pace
        return {
            "at": folded([loop.at for loop in loops]), "count": len(loops), "method": found.method,
            "per_iteration": None if found.iteration is None else list(found.iteration), "limit": found.limit,
            "about": found.about, "limited_by": found.by, "done": sum(loop.done for loop in loops),
            "within": loops[0].within, "not_priced": list(loops[0].not_priced),
            "at_limit": at_limit if limited else None,
        }  # fmt: skip

    def _remaining(self, loop: _Loop) -> int | None:
        """Evaluations of a loop that may be still to come; of one in another's objective, in all of its turns."""
        if loop.pace.limit is None:
            return None
        own = max(0, loop.pace.limit - loop.done)
        if loop.within is None:
            return own
        outer = self._remaining(self._loops[loop.within])
        return None if outer is None else own * outer


def _totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over all rows: calls by themselves, one evaluation of each loop, and all loops at their limits."""
    names = ("circuits", "shots", "seconds")
    single = [row for row in rows if row["loop"] is None]
    looped = [row for row in rows if row["loop"] is not None]
    limited = [row["loop"]["at_limit"] for row in looped]
    return {
        "calls": {"count": sum(r["count"] for r in single), **{n: sum(r[n] for r in single) for n in names}},
        "one_evaluation": {"count": sum(r["count"] for r in looped), **{n: sum(r[n] for r in looped) for n in names}},
        "at_limit": None if None in limited else {n: sum(a[n] for a in limited) for n in ("evaluations", *names)},
        "bytes": max((row["bytes"] for row in rows), default=0),
    }


def _above(at: str) -> Iterator[str]:
    while "/" in at:
        yield at
        at = at.rpartition("/")[0]
    yield at


def _names(at: str) -> str:
    """A location without its indices."""
    return re.sub(r"\[(\d+|\*)\]", "", at)


def folded(places: Sequence[str]) -> str:
    """One pattern for locations that differ in indices alone: ``curve/point[*]/minimize[0]``."""
    parts = [place.split("/") for place in places]
    return "/".join(
        same[0] if len(set(same)) == 1 else f"{same[0].partition('[')[0]}[*]" for same in zip(*parts, strict=True)
    )


def _grouped(members: Iterable[Any], key: Callable[[Any], Any]) -> Iterator[tuple[Any, list[Any]]]:
    found: dict[Hashable, list[Any]] = defaultdict(list)
    for member in members:
        found[key(member)].append(member)
    yield from found.items()


# -- for people ------------------------------------------------------------------------------------------------------

_WIDTH = 120
_PLACE = 45
_COLUMNS = (("count", 6), ("qubits", 7), ("depth", 7), ("2q", 6), ("Paulis", 7), ("groups", 7), ("circuits", 9),
            ("shots", 9), ("memory", 9), ("time", 8))  # fmt: skip


def table(plan: Mapping[str, Any]) -> str:
    """A plan's document, as `Plan.document` gives it, as text of at most 120 columns but for longer names."""
    lines: list[str] = []
    for refusal in plan["refusals"]:
        lines += [f"refused  {refusal['at']}", f"  {refusal['message']}"]
    if plan["calls"]:
        lines += ["", f"{'quantum':<{_PLACE}}" + "".join(f"{name:>{width}}" for name, width in _COLUMNS)]
    for row in plan["calls"]:
        lines += _call_lines(row)
    if plan["calls"]:
        lines += ["", *_total_lines(plan["totals"])]
    if plan["steps"]:
        lines += ["", f"{'classical':<{_PLACE}} count"]
    for step in plan["steps"]:
        state = {"waits": f"waits for the value of {step['needs']}",
                 "in a loop": f"in each evaluation of {step['needs']}; not run",
                 "answered": "answered from the record", "ran": "ran now, and is recorded"}[step["state"]]  # fmt: skip
        lines += [*_placed(step["at"], f"{_count(step['count']):>6}  {state}")]
    if plan["not_planned"]:
        lines += ["", "not planned"]
    for gap in plan["not_planned"]:
        times = f" ({gap['count']} times)" if gap["count"] > 1 else ""
        lines += [f"  {gap['at']}{times}:", f"    {gap['why']} {gap['needs']}"]
    return "\n".join(lines).strip("\n") or "nothing is to be evaluated"


def _placed(at: str, rest: str) -> list[str]:
    return [f"{at:<{_PLACE}}{rest}"] if len(at) < _PLACE else [at, f"{'':<{_PLACE}}{rest}"]


def _call_lines(row: Mapping[str, Any]) -> list[str]:
    cells = (
        _count(row["count"]), str(row["qubits"]), _count(row["depth"]), _count(row["two_qubit_gates"]),
        _count(row["paulis"]) if row["paulis"] else "-", _count(row["groups"]) if row["groups"] else "-",
        _count(row["circuits"]), _count(row["shots"]) if row["shots"] else "-", format_bytes(row["bytes"]),
        _time(row["seconds"]),
    )  # fmt: skip
    numbers = "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    lines = _placed(row["at"], numbers)
    gradient = "" if row["gradient"] == "none" else f", with gradient ({row['gradient']})"
    for text in (f"on {row['device']}{gradient}: {row['reason']}", *_loop_lines(row["loop"])):
        lines += _wrapped(text)
    return lines


def _loop_lines(loop: Mapping[str, Any] | None) -> list[str]:
    if loop is None:
        return []
    many = f"one evaluation of each of {loop['count']} loops" if loop["count"] > 1 else "one evaluation of a loop"
    low, high = loop["per_iteration"] or (0, 0)
    each = f", {'about ' if loop['about'] or low != high else ''}{low}" + (f" to {high}" if low != high else "")
    text = f"{many} by {loop['method']}{f'{each} an iteration' if high else ''}"
    if loop["limit"] is None:
        limit = "no limit"
    else:
        limit = f"{'about' if loop['about'] else 'at most'} {loop['limit']:,} each ({loop['limited_by']})"
    lines = [f"{text}; {limit}" + (f"; {loop['done']:,} recorded" if loop["done"] else "")]
    if loop["at_limit"] is not None:
        lines.append(f"to the limit: {_summed(loop['at_limit'])}")
    if loop["not_priced"]:
        lines.append(f"not priced: its {' and '.join(loop['not_priced'])}")
    return lines


def _total_lines(totals: Mapping[str, Any]) -> list[str]:
    calls, one, limit = totals["calls"], totals["one_evaluation"], totals["at_limit"]
    lines = []
    if calls["count"]:
        lines.append(f"calls outside of loops: {_summed({'evaluations': calls['count'], **calls})}")
    if one["count"]:
        lines.append(f"one evaluation of each loop: {_summed({'evaluations': one['count'], **one})}")
        lines.append(f"loops to their limits: {'no limit' if limit is None else _summed(limit)}")
    lines.append(f"largest: {format_bytes(totals['bytes'])}; times are estimates of one thread's")
    return lines


def _summed(sums: Mapping[str, Any]) -> str:
    shots = f"{sums['shots']:,} shots, " if sums["shots"] else ""
    return f"{sums['evaluations']:,} evaluations, {sums['circuits']:,} circuits, {shots}{_time(sums['seconds'])}"


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)


def _count(number: int) -> str:
    """A whole number in at most six characters."""
    if number < 10**6:
        return f"{number:,}" if number < 10**5 else str(number)
    return f"{number:.1e}".replace("e+0", "e").replace("e+", "e")


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 3.6e6 else f"{seconds / size:.1e} {unit}"
    return f"{seconds * 1e6:.3g} µs"
