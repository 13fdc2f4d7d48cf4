"""Figures hold the numbers of the history, with units, references and error bars, and change nothing global."""

from __future__ import annotations

from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from hybridq import figures
from hybridq.errors import WorkflowError
from hybridq.history import LoopHistory, Point, Reference, RunHistory, Session, Span

SESSION = Session("host", 1, 100.0, "3.11", "cpu", {}, ("s.py",), "finished", 9.0)


def a_loop(line: int, values: list[float], number: float | None = None, *, stderr: float = 0.0,
           reference: float | None = -1.0, unit: str = "hartree") -> LoopHistory:  # fmt: skip
    best = np.minimum.accumulate(values).tolist()
    points = tuple(Point(i, v, stderr, b, stderr) for i, (v, b) in enumerate(zip(values, best, strict=True)))
    return LoopHistory(
        line=line, at=f"study/point[{line}]/minimize[0]", group="point/energy", function="energy", method="COBYLA",
        gradient="none", state="finished", rows=len(values), evaluations=len(values), shots=0, limit=None, bound=None,
        best=min(values, default=None), best_row=0, best_stderr=stderr, last=None, last_stderr=None, result=None,
        iterations=None, message=None, began=None, ended=None, seconds=1.0,
        reference=None if reference is None else Reference(reference, "FCI $x$", unit, "H2"),
        numbers={} if number is None else {"bond of problem()": number, "same": 1.0}, curve=points,
    )  # fmt: skip


def a_run(*loops: LoopHistory, spans: tuple[Span, ...] = (), sessions: tuple[Session, ...] = (SESSION,)) -> RunHistory:
    return RunHistory("run", "study", 7, "finished", None, 3, 4, 0, 0, 0, 0, sessions, loops, (), (), spans, 0, (), {})


CURVE = a_run(a_loop(1, [0.0, -0.9], 2.0), a_loop(2, [0.0, -0.5, -0.7], 0.5), a_loop(3, [-0.2], 1.0))


def test_loops_are_told_apart_by_the_argument_that_differs() -> None:
    (family,) = figures.families(CURVE)
    assert (family.label, family.numbers) == ("bond of problem()", (0.5, 1.0, 2.0))
    assert [loop.line for loop in family.loops] == [2, 3, 1]
    (named,) = figures.families(CURVE, "bond length (Å)")
    assert named == replace(family, label="bond length (Å)")


def test_loops_without_such_an_argument_are_told_apart_by_their_index() -> None:
    (family,) = figures.families(a_run(a_loop(4, [0.0]), a_loop(2, [0.0])))
    assert (family.label, family.numbers) == ("index of point", (2.0, 4.0))
    twice = a_run(a_loop(4, [0.0], 1.0), a_loop(2, [0.0], 1.0))
    assert figures.families(twice)[0].label == "index of point"


def test_convergence_is_best_so_far_with_references() -> None:
    ax = Figure().subplots()
    figures.convergence(ax, CURVE)
    lines = {tuple(line.get_ydata()) for line in ax.lines}
    assert (0.0, -0.5, -0.7) in lines
    assert sum(list(line.get_ydata()) == [-1.0, -1.0] for line in ax.lines) == 3  # dashed
    assert ax.get_xlabel() == "evaluations of the objective"
    assert ax.get_ylabel() == "best value so far (hartree)"
    assert not ax.collections
    sampled = Figure().subplots()
    figures.convergence(sampled, a_run(a_loop(1, [0.0, -0.9], stderr=0.1)))
    (band,) = sampled.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((-1.0, 0.1))


def test_error_is_logarithmic_with_the_chemical_accuracy() -> None:
    ax = Figure().subplots()
    figures.error(ax, CURVE)
    assert ax.get_yscale() == "log"
    drawn = [np.asarray(line.get_ydata(), dtype=float).tolist() for line in ax.lines]
    assert any(ys == pytest.approx([1.0, 0.5, 0.3]) for ys in drawn)
    assert [1.6e-3, 1.6e-3] in drawn
    in_j = Figure().subplots()
    figures.error(in_j, a_run(a_loop(1, [0.0, -1.0], unit="J")))
    drawn = [np.asarray(line.get_ydata(), dtype=float).tolist() for line in in_j.lines]
    assert drawn == [[1.0, 1e-16]]  # what is equal has no logarithm; no chemistry in a lattice
    assert in_j.get_ylabel() == "|best − reference| (J)"


def test_the_curve_has_references_and_error_bars() -> None:
    figure = Figure()
    loops = [a_loop(1, [-0.9], 2.0, stderr=0.25), a_loop(2, [-0.7], 0.5, stderr=0.125)]
    history = a_run(*loops)
    figures.curve_with_errors(figure, history, figures.families(history, "bond length (Å)")[0])
    above, below = figure.axes
    assert (above.get_ylabel(), below.get_ylabel()) == ("best value (hartree)", "best − reference\n(mhartree)")
    assert below.get_xlabel() == "bond length (Å)"
    (bars,) = (c for c in above.collections if hasattr(c, "get_segments"))
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[-0.825, -0.575], [-1.15, -0.65]]
    assert any(list(line.get_ydata()) == pytest.approx([300, 100]) for line in below.lines)


def test_the_time_line_leaves_out_the_time_between_drivers() -> None:
    later = replace(SESSION, began=10_000.0)
    spans = (Span("0", "quantum", "g", 101.0, 2.0, 2.0, 1), Span("driver", "classical", "g", 10_001.0, 4.0, 4.0, 1))
    ax = Figure().subplots()
    figures.timeline(ax, a_run(spans=spans, sessions=(SESSION, later)))
    boxes = [path.get_extents().bounds for c in ax.collections for path in c.get_paths()]
    assert sorted((round(x, 9), round(width, 9)) for x, _, width, _ in boxes) == [(1.0, 2.0), (4.0, 4.0)]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["worker 0", "driver"]
    assert "(s)" in ax.get_xlabel()


def test_what_cannot_be_drawn_is_told() -> None:
    ax = Figure().subplots()
    nothing = a_run()
    told = {"no evaluation": figures.convergence, "no loop": figures.error, "no two loops": figures.curve,
            "no record": figures.timeline}  # fmt: skip
    for text, draw in told.items():
        with pytest.raises(WorkflowError, match=text):
            draw(ax, nothing)
    with pytest.raises(WorkflowError, match="no prediction"):
        figures.predictions(Figure(), nothing)


def test_names_are_never_formulas() -> None:
    odd = a_run(*[replace(a_loop(i, [-0.5]), numbers={"$\\frac{x}$": float(i)}) for i in (1, 2)])
    for form in ("svg", "png"):
        assert figures.rendered(
            figures.drawn(lambda f: figures.curve_with_errors(f, odd, figures.families(odd)[0])), form
        )


def test_nothing_global_changes_and_figures_are_the_same_again() -> None:
    before = dict(mpl.rcParams)
    once, again = (
        figures.rendered(figures.drawn(lambda f: figures.convergence(f.subplots(), CURVE)), "svg") for _ in range(2)
    )
    assert dict(mpl.rcParams) == before
    assert once == again
    assert once.startswith(b"<?xml")


def test_many_loops_are_drawn_in_one_scale_of_colours() -> None:
    figure = Figure()
    figures.convergence(figure.subplots(), a_run(*[a_loop(i, [0.0, -0.1 * i], float(i)) for i in range(30)]))
    _, scale = figure.axes
    assert scale.get_ylabel() == "bond of problem()"
