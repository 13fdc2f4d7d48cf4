"""The store of what drivers tell: it keeps what was told, stays small whatever is told, and never breaks."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from told import TOTALS, loop, message

from hybridq.monitor.store import (
    KEPT_SECONDS,
    MAX_CURVE,
    MAX_GROUPS,
    MAX_LOOPS,
    MAX_POINTS,
    MAX_RUNS,
    MAX_SAMPLES,
    MAX_TEXT,
    SILENT_SECONDS,
    Store,
    document,
)


def test_what_was_told_is_what_is_shown() -> None:
    store = Store()
    told = loop(values=[-1.0, -1.5, -1.2], reference=-1.6, source="FCI", unit="hartree", stderr=0.01)
    store.fold(message(loops=[told], totals={**TOTALS, "evaluations": 3, "quantum": 0.5},
                       devices=[["tcp://a", 2, 1, 0, 1000, 4000]], queue={"waiting": 7, "seconds": 1.5},
                       spans=[["0", 1e9, 0.5, "quantum", "curve/energy", 3]],
                       notes=[[1e9, "retried", "curve/energy[0]", "the worker left"]]), 0.0)  # fmt: skip
    (run,) = store.runs(0.0)
    assert (run.name, run.state, run.totals.evaluations, run.totals.quantum) == ("study", "running", 3, 0.5)
    (found,) = run.loops
    assert found.points == ((0, -1.0, 0.0, -1.0), (1, -1.5, 0.0, -1.5), (2, -1.2, 0.0, -1.5))
    assert found.error == pytest.approx(0.1)
    (group,) = run.groups
    assert (group.name, group.loops, group.running, group.rows, group.best) == ("curve/energy", 1, 1, 3, -1.5)
    assert group.error == found.error
    assert (run.devices[0].busy, run.devices[0].projected, run.queue.waiting) == (1, 1000, 7)
    assert (run.samples[0].busy, run.samples[0].slots, run.samples[0].waiting) == (1, 2, 7)
    assert run.spans[0].kind == "quantum"
    assert run.notes[0].reason == "the worker left"


def test_points_are_joined_and_told_twice_counts_once() -> None:
    store = Store()
    store.fold(message(loops=[loop(values=[3.0, 2.0])]), 0.0)
    store.fold(message(loops=[loop(values=[1.0], first=2)]), 0.0)
    store.fold(message(loops=[loop(values=[1.0], first=2)]), 0.0)
    (run,) = store.runs(0.0)
    assert [point[0] for point in run.loops[0].points] == [0, 1, 2]


def test_a_full_message_forgets_what_was_known() -> None:
    store = Store()
    store.fold(message(loops=[loop("a"), loop("b")]), 0.0)
    store.fold(message(full=True, loops=[loop("b", [5.0])]), 1.0)
    (run,) = store.runs(1.0)
    assert [found.at for found in run.loops] == ["b"]
    assert [found.best for found in run.loops] == [5.0]


def test_rates_and_the_time_left_follow_from_what_was_told() -> None:
    store = Store()
    for second in range(6):
        running = loop("b", [0.0] * (10 * second + 1))
        ended = loop("a", [0.0] * 100, state="finished")
        store.fold(message(at=second, totals={**TOTALS, "evaluations": 20 * second}, loops=[running, ended]), second)
    (run,) = store.runs(5.0)
    assert run.rate == pytest.approx(20.0)
    assert run.groups[0].rate == pytest.approx(10.0)
    assert run.groups[0].eta == pytest.approx((100 - 51) / 10.0)
    (later,) = store.runs(5.0 + 20.0)
    assert (later.rate, later.groups[0].eta) == (0.0, None)


def test_where_no_loop_has_ended_limits_bound_the_time_left() -> None:
    store = Store()
    for second in range(3):
        store.fold(message(at=second, loops=[loop(values=[0.0] * (10 * second + 1), limit=121)]), second)
    group = store.runs(2.0)[0].groups[0]
    assert group.eta is None
    assert group.latest == pytest.approx((121 - 21) / 10.0)


def test_a_driver_that_says_nothing_is_silent_and_comes_back() -> None:
    store = Store()
    store.fold(message(), 0.0)
    assert store.runs(SILENT_SECONDS)[0].state == "running"
    assert store.runs(SILENT_SECONDS + 1)[0].state == "silent"
    assert store.silent(SILENT_SECONDS + 1) == 1
    store.fold(message(), 100.0)
    assert store.runs(100.0)[0].state == "running"


def test_runs_that_ended_stay_for_a_while_and_those_that_run_stay_longest() -> None:
    store = Store()
    store.fold(message("first", state="finished"), 0.0)
    store.fold(message("alive"), 0.0)
    store.fold(message("alive"), KEPT_SECONDS - 1)
    assert [run.name for run in store.runs(KEPT_SECONDS - 1)] == ["alive", "first"]
    store.fold(message("alive"), KEPT_SECONDS + 1)
    assert [run.name for run in store.runs(KEPT_SECONDS + 1)] == ["alive"]
    for number in range(2 * MAX_RUNS):
        store.fold(message(f"n{number}", state="finished"), KEPT_SECONDS + 2)
    names = [run.name for run in store.runs(KEPT_SECONDS + 2)]
    assert len(names) == MAX_RUNS
    assert "alive" in names
    assert f"n{2 * MAX_RUNS - 1}" in names


def test_sums_stay_exact_when_there_are_more_loops_than_are_kept() -> None:
    store = Store()
    count = MAX_LOOPS + 500
    for first in range(0, count, 100):
        told = [
            loop(f"p[{i}]", [float(i), i + 1.0], state="finished", reference=float(i) - (2.0 if i == 3 else 0.5))
            for i in range(first, first + 100)
        ]
        store.fold(message(loops=told), 0.0)
    (run,) = store.runs(0.0)
    assert len(run.loops) == MAX_LOOPS
    (group,) = run.groups
    assert (group.loops, group.finished, group.rows) == (count, count, 2 * count)
    assert group.error == 2.0, "the worst of all is among those no longer kept"


def test_groups_and_texts_are_bounded() -> None:
    store = Store()
    store.fold(message(loops=[loop(f"l{i}", group=f"g{i}") for i in range(3 * MAX_GROUPS)], error="x" * 10_000), 0.0)
    (run,) = store.runs(0.0)
    assert len(run.groups) <= MAX_GROUPS + 1
    assert sum(group.loops for group in run.groups) == 3 * MAX_GROUPS
    assert len(run.error) == MAX_TEXT


def size(value: Any) -> int:
    """Bytes of a value and of all that it holds, each object once."""
    seen: set[int] = set()
    total, left = 0, deque([value])
    while left:
        one = left.popleft()
        if id(one) in seen:
            continue
        seen.add(id(one))
        total += sys.getsizeof(one)
        if isinstance(one, Mapping):
            left.extend(one.keys())
            left.extend(one.values())
        elif isinstance(one, (list, tuple, set, deque)):
            left.extend(one)
        elif hasattr(one, "__dict__"):
            left.append(vars(one))
        elif hasattr(one, "__slots__"):
            left.extend(getattr(one, name) for name in one.__slots__)
    return total


def test_a_thousand_loops_of_a_hundred_evaluations_are_small_and_more_time_takes_no_more() -> None:
    store = Store()
    sizes = []
    for hour in range(3):
        for first in range(0, 1000, 100):
            told = [loop(f"p[{i}]", [math.sin(i + k) for k in range(100)], first=100 * hour) for i in
                    range(first, first + 100)]  # fmt: skip
            store.fold(message(at=3600.0 * hour + first, loops=told, devices=[["a", 1, 1, 0, 0, 1]]), 0.0)
        sizes.append(size(store))
    (run,) = store.runs(0.0)
    assert sum(len(found.points) for found in run.loops) <= MAX_POINTS + MAX_CURVE
    assert max(sizes) < 50e6
    assert sizes[2] < 1.5 * sizes[1], "it grows with time"


def test_samples_thin_out_and_span_the_whole_time() -> None:
    store = Store()
    for second in range(5 * MAX_SAMPLES):
        store.fold(message(at=second, devices=[["a", 1, 1, 0, 0, 1]]), second)
    (run,) = store.runs(5.0 * MAX_SAMPLES)
    times = [sample.time - 1e9 for sample in run.samples]
    assert len(times) <= MAX_SAMPLES
    assert times == sorted(times)
    assert times[-1] == 5 * MAX_SAMPLES - 1
    assert times[0] < MAX_SAMPLES


curves = st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=120), min_size=1, max_size=6)


@given(curves)
def test_a_curve_keeps_its_ends_and_its_order_however_it_comes(parts: list[list[float]]) -> None:
    store, first = Store(), 0
    values = [value for part in parts for value in part]
    for part in parts:
        best = [min(values[: first + i + 1]) for i in range(len(part))]
        points = [[first + i, value, 0.0, low] for i, (value, low) in enumerate(zip(part, best, strict=True))]
        store.fold(message(loops=[loop(values=part, first=first, points=points)]), 0.0)
        first += len(part)
    kept = store.runs(0.0)[0].loops[0].points
    rows = [point[0] for point in kept]
    assert len(kept) <= MAX_CURVE + 1
    assert rows == sorted(set(rows))
    assert (rows[0], rows[-1]) == (0, len(values) - 1)
    assert [point[1] for point in kept] == [values[row] for row in rows]
    assert kept[-1][3] == min(values)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = ("v", "id", "state", "time", "clock", "totals", "loops", "spans", "devices", "queue", "notes", "full")


@given(st.dictionaries(st.sampled_from(KEYS), anything, min_size=1, max_size=3), st.booleans())
def test_nonsense_is_refused_by_one_kind_of_error_and_what_is_kept_can_still_be_shown(
    changes: dict[str, Any], in_loop: bool
) -> None:
    store = Store()
    store.fold(message(loops=[loop()]), 0.0)
    wrong = message(loops=[loop(**{f"{key}": value for key, value in changes.items()})]) if in_loop else message()
    wrong |= {} if in_loop else changes
    with contextlib.suppress(ValueError):
        store.fold(wrong, 1.0)
    text = "".join(document(store.runs(1.0)))
    json.loads(text, parse_constant=pytest.fail)


def test_a_document_holds_every_field_in_pieces_and_null_for_what_json_lacks() -> None:
    store = Store()
    for number in range(2):
        told = [loop(f"curve/minimize[{i}]", [float(i), math.nan if i == 50 else -1.0]) for i in range(100)]
        store.fold(message(f"study{number}", loops=told, notes=[[math.inf, "failed", "curve", 'a "reason"']]), 0.0)
    runs = store.runs(0.0)
    pieces = list(document(runs))
    assert max(map(len, pieces)) < sum(map(len, pieces)) / 4
    found = json.loads("".join(pieces), parse_constant=pytest.fail)
    plain = json.loads(json.dumps([asdict(run) for run in runs]), parse_constant=lambda _: None)
    assert found == plain
    assert "NaN" in json.dumps(asdict(runs[0]))


def test_a_document_of_nothing_is_an_empty_list() -> None:
    assert json.loads("".join(document(()))) == []


def test_a_run_told_in_several_messages_at_once_has_no_rate_from_that() -> None:
    store = Store()
    store.fold(message(full=True, loops=[loop("a[0]", [0.0] * 100)]), 0.0)
    store.fold(message(loops=[loop("a[1]", [0.0] * 100)]), 0.0)
    store.fold(message(at=0.5, loops=[loop("a[0]", [0.0] * 10, first=100, rows=110)]), 0.5)
    (run,) = store.runs(0.5)
    assert run.groups[0].rate == pytest.approx(20.0)


def test_a_loop_that_goes_on_after_many_others_ended_counts_once() -> None:
    store = Store()
    store.fold(message(loops=[loop("a[0]", [0.0] * 5, state="interrupted")]), 0.0)
    for i in range(1, MAX_LOOPS + 10):
        store.fold(message(loops=[loop(f"a[{i}]", [0.0] * 5, state="finished")]), 0.0)
    store.fold(message(loops=[loop("a[0]", [0.0], first=5, rows=6)]), 1.0)
    (run,) = store.runs(1.0)
    (group,) = run.groups
    assert (group.loops, group.running, group.finished) == (MAX_LOOPS + 10, 1, MAX_LOOPS + 9)
    assert group.rows == 5 * (MAX_LOOPS + 9) + 6


def test_texts_that_are_none_can_be_shown() -> None:
    store = Store()
    store.fold(message(notes=[[1.0, "failed", "a[0]", "no file \udcff"]]), 0.0)
    (run,) = store.runs(0.0)
    assert run.notes[0].reason.encode() == b"no file \\udcff"


def test_another_version_is_named() -> None:
    with pytest.raises(ValueError, match="version 2"):
        Store().fold(message(v=2), 0.0)
