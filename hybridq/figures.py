"""Figures of a run, drawn from its history: readable in print and for colour-blind readers, axes with units.

Nothing global of matplotlib's is changed.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybridq.errors import WorkflowError
from hybridq.history import LoopHistory, RunHistory

__all__ = [
    "CHEMICAL_ACCURACY",
    "Family",
    "convergence",
    "curve",
    "curve_with_errors",
    "drawn",
    "error",
    "families",
    "on",
    "predictions",
    "rendered",
    "timeline",
]

CHEMICAL_ACCURACY = 1.6e-3
"""Hartree: 1 kcal/mol."""
QUANTUM, CLASSICAL, GREY = "#0072B2", "#E69F00", "#555555"
_DISTINCT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of Okabe and Ito (2008), told apart by readers with any common colour blindness."""
_STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "lines.linewidth": 1.3, "lines.markersize": 4.5, "axes.linewidth": 0.8,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.facecolor": "white",
    "axes.facecolor": "white", "savefig.facecolor": "white", "svg.fonttype": "path", "svg.hashsalt": "hybridq",
    "figure.dpi": 100, "savefig.dpi": 200, "text.usetex": False,
    "axes.formatter.useoffset": False,
}  # fmt: skip
_MOST_LINES = 200
"""Loops whose lines are drawn as such; those of more are drawn as pixels, also in SVG."""
_FLOOR = 1e-16
"""Errors below it are rounding, and drawn there."""

Draw: TypeAlias = Callable[[Axes, RunHistory], None]


@dataclass(frozen=True)
class Family:
    """Loops of one place of a workflow, in the order of the number that tells them apart."""

    group: str
    label: str
    """What the number is."""
    loops: tuple[LoopHistory, ...]
    numbers: tuple[float, ...]
    """One for each loop, rising."""


def families(history: RunHistory, label: str | None = None) -> list[Family]:
    """The loops by place; each place's are told apart by the one argument that differs, or by their index.

    ``label`` is what people call that number of the place with the most loops, with its unit: "bond length (Å)".
    """
    places: dict[str, list[LoopHistory]] = {}
    for loop in history.loops:
        places.setdefault(loop.group, []).append(loop)
    found = []
    for group, loops in places.items():
        name, numbers = _telling(loops)
        if label is not None and len(loops) == max(map(len, places.values())):
            name, label = label, None
        order = sorted(range(len(loops)), key=lambda i: numbers[i])
        found.append(Family(group, name, tuple(loops[i] for i in order), tuple(numbers[i] for i in order)))
    return found


def _telling(loops: Sequence[LoopHistory]) -> tuple[str, list[float]]:
    shared = set.intersection(*(set(loop.numbers) for loop in loops))
    differing = [name for name in loops[0].numbers if name in shared and len({x.numbers[name] for x in loops}) > 1]
    for name in differing:
        numbers = [loop.numbers[name] for loop in loops]
        if len(set(numbers)) == len(loops):
            return name, numbers
    parents = [loop.at.split("/")[-2:] for loop in loops]
    for level, what in ((0, "scope"), (-1, "loop")):
        indices = [re.fullmatch(r"(.*)\[(\d+)\]", parts[level]) for parts in parents]
        whole = [int(match[2]) for match in indices if match is not None]
        if len(set(whole)) == len(loops):
            name = indices[0][1] if indices[0] is not None else what
            return f"index of {name}", [float(index) for index in whole]
    return "loop, in the order in which they began", [float(i) for i in range(len(loops))]


# -- figures -----------------------------------------------------------------------------------------------------------


def convergence(ax: Axes, history: RunHistory, found: Sequence[Family] | None = None) -> None:
    """The best value so far of each loop over its evaluations; errors as bands, references dashed."""
    found = families(history) if found is None else found
    loops = [loop for family in found for loop in family.loops if loop.curve]
    if not loops:
        raise WorkflowError(f"the run {history.name} has no evaluation of a loop yet, so there is no convergence.")
    colours = _colours(ax, found, loops)
    for loop in loops:
        rows = [p.row + 1 for p in loop.curve]
        colour = colours(loop)
        ax.plot(rows, [p.best for p in loop.curve], drawstyle="steps-post", color=colour, label=_named(loop, found),
                rasterized=len(loops) > _MOST_LINES)  # fmt: skip
        if any(p.best_stderr for p in loop.curve):
            low = [p.best - p.best_stderr for p in loop.curve]
            high = [p.best + p.best_stderr for p in loop.curve]
            ax.fill_between(rows, low, high, step="post", color=colour, alpha=0.18, linewidth=0)
        if loop.reference is not None:
            ax.axhline(loop.reference.value, color=colour, linestyle=(0, (4, 3)), linewidth=0.9)
    ax.set(xlabel="evaluations of the objective", ylabel=f"best value so far{_unit(history)}")
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    handles = [_line(GREY, "-", "best so far")]
    if any(p.best_stderr for loop in loops for p in loop.curve):
        handles.append(_patch("± 1 standard error"))
    if any(loop.reference is not None for loop in loops):
        handles.append(_line(GREY, (0, (4, 3)), "reference"))
    _legend(ax, loops, handles)


def error(ax: Axes, history: RunHistory, found: Sequence[Family] | None = None) -> None:
    """How far each loop's best value so far is from its reference, logarithmic; chemical accuracy as a line."""
    found = families(history) if found is None else found
    loops = [loop for family in found for loop in family.loops if loop.curve and loop.reference is not None]
    if not loops:
        raise WorkflowError(
            f"no loop of the run {history.name} has a reference; pass a Problem, such as hq.molecule gives, to the "
            "quantum function that is minimized."
        )
    colours = _colours(ax, found, loops)
    lowest = float("inf")
    for loop in loops:
        assert loop.reference is not None
        rows = [p.row + 1 for p in loop.curve]
        errors = np.array([max(abs(p.best - loop.reference.value), _FLOOR) for p in loop.curve])
        bars = np.array([p.best_stderr for p in loop.curve])
        lowest = min(lowest, float(errors.min()))
        if bars.any():
            ax.fill_between(rows, np.maximum(errors - bars, _FLOOR), errors + bars, step="post", color=colours(loop),
                            alpha=0.18, linewidth=0)  # fmt: skip
        ax.plot(rows, errors, drawstyle="steps-post", color=colours(loop),
                label=_named(loop, found), rasterized=len(loops) > _MOST_LINES)  # fmt: skip
    handles = []
    if any(p.best_stderr for loop in loops for p in loop.curve):
        handles.append(_patch("± 1 standard error"))
    if history.unit == "hartree":
        ax.axhline(CHEMICAL_ACCURACY, color="black", linestyle=":", linewidth=1.2)
        handles.append(_line("black", ":", "chemical accuracy, 1.6 mhartree"))
    ax.set_yscale("log")
    if any(p.best_stderr for loop in loops for p in loop.curve):
        ax.set_ylim(bottom=lowest / 3)  # a band that reaches zero has no end on this scale
    ax.set(xlabel="evaluations of the objective", ylabel=f"|best − reference|{_unit(history)}")
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    _legend(ax, loops, handles)


def curve(ax: Axes, history: RunHistory, family: Family | None = None) -> None:
    """Each loop's best value over the number that tells the loops apart, with error bars, beside the references."""
    family = family or _largest(history)
    told = [(x, loop, loop.best) for x, loop in zip(family.numbers, family.loops, strict=True) if loop.best is not None]
    known = [(x, loop.reference) for x, loop, _ in told if loop.reference is not None]
    if known:
        sources = "; ".join(_short(source, 40) for source in sorted({r.source for _, r in known})[:2])
        ax.plot([x for x, _ in known], [r.value for _, r in known], color=GREY, linestyle=(0, (4, 3)), marker="_",
                markersize=9, zorder=2, label=f"reference: {sources}")  # fmt: skip
    exact = not any(loop.best_stderr for _, loop, _ in told)
    bars = [loop.best_stderr or 0.0 for _, loop, _ in told]
    if exact:
        ax.plot([x for x, _, _ in told], [best for _, _, best in told], "o", color=QUANTUM, label="best value, exact")
    else:
        ax.errorbar([x for x, _, _ in told], [best for _, _, best in told], yerr=bars, fmt="o", color=QUANTUM,
                    capsize=3, elinewidth=1, zorder=3, label="lowest value, ± 1 standard error")  # fmt: skip
    if all(x.is_integer() for x in family.numbers):
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    ax.set(xlabel=_short(family.label, 60), ylabel=f"best value{_unit(history)}")
    ax.legend(loc="best")


def curve_with_errors(figure: Figure, history: RunHistory, family: Family) -> None:
    """As `curve`, and below it the difference to the references, in mhartree where the unit is hartree."""
    known = [(x, loop) for x, loop in zip(family.numbers, family.loops, strict=True) if loop.error is not None]
    if not known:
        curve(figure.subplots(), history, family)
        return
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    curve(above, history, family)
    above.set_xlabel("")
    scale, unit = (1e3, "mhartree") if history.unit == "hartree" else (1.0, history.unit)
    errors = [scale * (loop.error or 0.0) for _, loop in known]
    bars = [scale * (loop.best_stderr or 0.0) for _, loop in known]
    limit = scale * CHEMICAL_ACCURACY
    in_unit = f"\n({unit})" if unit else ""
    if any(bars):
        below.errorbar([x for x, _ in known], errors, yerr=bars, fmt="o", color=QUANTUM, capsize=3, elinewidth=1)
        below.axhline(0.0, color=GREY, linewidth=0.8)
        if history.unit == "hartree":
            below.axhspan(
                -limit, limit, color="black", alpha=0.08, linewidth=0, label="chemical accuracy, ±1.6 mhartree"
            )
            below.legend(loc="best")
        below.set_ylabel(f"best − reference{in_unit}")
    else:
        below.plot([x for x, _ in known], [max(abs(e), scale * _FLOOR) for e in errors], "o", color=QUANTUM)
        below.set_yscale("log")
        if history.unit == "hartree":
            below.axhline(limit, color="black", linestyle=":", linewidth=1.2, label="chemical accuracy, 1.6 mhartree")
            below.legend(loc="best")
        below.set_ylabel(f"|best − reference|{in_unit}")
    below.set_xlabel(_short(family.label, 60))


def timeline(ax: Axes, history: RunHistory) -> None:
    """What ran where and when; the time between two drivers is left out."""
    if not history.spans:
        raise WorkflowError(f"the run {history.name} has no record with the time it began, so there is no time line.")
    lanes = sorted({span.where for span in history.spans}, key=_natural)
    starts = sorted(session.began for session in history.sessions) or [min(s.began for s in history.spans)]
    offsets, shift, breaks = [], 0.0, []
    for number, start in enumerate(starts):
        following = starts[number + 1] if number + 1 < len(starts) else math.inf
        ends = [s.began + s.seconds for s in history.spans if start <= s.began < following]
        if number:
            breaks.append(shift)
        offsets.append(start - shift)
        shift += max(0.0, max(ends, default=start) - start)
    for kind, colour in (("classical", CLASSICAL), ("quantum", QUANTUM)):
        for lane, where in enumerate(lanes):
            bars = [(_placed(s.began, starts, offsets), s.seconds) for s in history.spans
                    if s.where == where and s.kind == kind]  # fmt: skip
            if bars:
                ax.broken_barh(bars, (lane - 0.36, 0.72), facecolor=colour, edgecolor=colour, linewidth=0.5,
                               hatch=None if kind == "quantum" else "////")  # fmt: skip
                ax.collections[-1].set_hatchcolor("white")
    for place in breaks:
        ax.axvline(place, color="black", linestyle=":", linewidth=1)
    ax.set_yticks(range(len(lanes)), [f"worker {lane}" if lane.isdigit() else _short(lane, 28) for lane in lanes])
    ax.set_ylim(len(lanes) - 0.4, -0.6)
    ax.set_xlim(left=0.0)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("time since the run began (s)" + (", time between drivers left out" if breaks else ""))
    handles = [_patch("quantum evaluations", QUANTUM, 1.0), _patch("classical steps", CLASSICAL, 1.0)]
    if breaks:
        handles.append(_line("black", ":", "taken up again"))
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2)


def predictions(figure: Figure, history: RunHistory) -> None:
    """What programs were predicted to take beside what was measured: seconds a row, and bytes where measured."""
    times = [(p.predicted_seconds, p.seconds) for p in history.programs if p.predicted_seconds and p.seconds > 0]
    sizes = [(p.predicted_bytes / 1e6, p.bytes / 1e6) for p in history.programs if p.predicted_bytes and p.bytes]
    panels = [(pairs, what) for pairs, what in ((times, "time of a row (s)"), (sizes, "memory (MB)")) if pairs]
    if not panels:
        raise WorkflowError(f"of the run {history.name} no prediction is recorded beside a measurement.")
    for ax, (pairs, what) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        low = min(min(pair) for pair in pairs) / 2
        high = max(max(pair) for pair in pairs) * 2
        ax.fill_between([low, high], [low / 2, high / 2], [2 * low, 2 * high], color="black", alpha=0.08, linewidth=0,
                        label="within a factor of 2")  # fmt: skip
        ax.plot([low, high], [low, high], color=GREY, linewidth=0.9, label="as predicted")
        ax.plot(*zip(*pairs, strict=True), "o", color=QUANTUM, alpha=0.7, label="programs")
        ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel=f"predicted {what}",
               ylabel=f"measured {what}")  # fmt: skip
        ax.legend(loc="lower right")


# -- drawing -----------------------------------------------------------------------------------------------------------


def on(ax: Axes | None, draw: Draw, history: RunHistory) -> Axes:
    """Draw on ``ax``, or on a new figure of pyplot's, in the style of these figures."""
    with mpl.rc_context(_STYLE):
        if ax is None:
            from matplotlib import pyplot as plt

            _, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        draw(ax, history)
    return ax


def drawn(draw: Callable[[Figure], None], height: float = 3.6) -> Figure:
    """A figure of its own, 6.4 inches wide, that no window or global state knows of."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        draw(figure)
    return figure


def rendered(figure: Figure, form: str) -> bytes:
    """The figure as ``svg``, ``png`` or ``pdf``, the same bytes whenever it is drawn again."""
    data = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
    with mpl.rc_context(_STYLE):
        figure.savefig(data, format=form, metadata=metadata)
    return data.getvalue()


def _largest(history: RunHistory) -> Family:
    found = max(families(history), key=lambda family: len(family.loops), default=None)
    if found is None or len(found.loops) < 2:
        raise WorkflowError(f"the run {history.name} has no two loops at one place, so there is no curve.")
    return found


def _colours(ax: Axes, found: Sequence[Family], loops: Sequence[LoopHistory]) -> Callable[[LoopHistory], Any]:
    """A colour for each loop: distinct for few, by the number that tells them apart, with its scale, for many."""
    if len(loops) <= len(_DISTINCT):
        distinct = {loop.line: colour for loop, colour in zip(loops, _DISTINCT, strict=False)}
        return lambda loop: distinct[loop.line]
    chosen = {loop.line for loop in loops}
    drawn_from = [family for family in found if any(loop.line in chosen for loop in family.loops)]
    family = drawn_from[0] if len(drawn_from) == 1 else None
    numbers = (
        {loop.line: x for loop, x in zip(family.loops, family.numbers, strict=True)} if family is not None
        else {loop.line: float(i) for i, loop in enumerate(loops)}
    )  # fmt: skip
    scale = mpl.colors.Normalize(min(numbers.values()), max(numbers.values()))
    colours = mpl.colors.LinearSegmentedColormap.from_list(
        "dark viridis", mpl.colormaps["viridis"](np.linspace(0, 0.9))
    )
    if isinstance(ax.figure, Figure):
        bar = ax.figure.colorbar(mpl.cm.ScalarMappable(scale, colours), ax=ax, pad=0.02)
        bar.set_label(_short(family.label, 50) if family is not None else "loop, in the order in which they began")
        bar.outline.set_visible(False)
    return lambda loop: colours(scale(numbers[loop.line]))


def _named(loop: LoopHistory, found: Sequence[Family]) -> str:
    if sum(len(family.loops) for family in found) > len(_DISTINCT):
        return ""
    for family in found:
        if len(found) == 1 and len(family.loops) > 1:
            return f"{_short(family.label, 40)} = {family.numbers[family.loops.index(loop)]:g}"
    return _short(loop.at.partition("/")[2] or loop.at, 40)


def _legend(ax: Axes, loops: Sequence[LoopHistory], handles: list[Any]) -> None:
    if len(loops) <= len(_DISTINCT):
        lines, labels = ax.get_legend_handles_labels()
        handles = [
            line for line, label in zip(lines, labels, strict=True) if label and not label.startswith("_")
        ] + handles
    if handles:
        longest = max(len(handle.get_label()) for handle in handles)
        columns = max(1, min(4, 96 // (longest + 8)))
        ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.2)


def _line(colour: str, style: Any, label: str) -> Any:
    return mpl.lines.Line2D([], [], color=colour, linestyle=style, linewidth=1.1, label=label)


def _patch(label: str, colour: str = GREY, alpha: float = 0.3) -> Any:
    return mpl.patches.Patch(color=colour, alpha=alpha, linewidth=0, label=label)


def _unit(history: RunHistory) -> str:
    return f" ({history.unit})" if history.unit else ""


def _short(text: str, width: int) -> str:
    """Someone's words in a figure: not too long, on one line, and never read as formulas."""
    text = " ".join(text.split())
    return (text if len(text) <= width else text[: width - 1] + "…").replace("$", r"\$")


def _natural(text: str) -> tuple[Any, ...]:
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text))


def _placed(began: float, starts: Sequence[float], offsets: Sequence[float]) -> float:
    """A moment on an axis from which the time between drivers is left out."""
    number = max((i for i, start in enumerate(starts) if start <= began), default=0)
    return max(0.0, began - offsets[number])
