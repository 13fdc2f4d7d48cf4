"""The page of runs in the Dask dashboard: a table, and figures of one group of loops and of what its devices do.

Each browser has a document of its own, which looks twice a second whether anything was told, and changes only then.
It is in the scheduler's process, whose own work must not wait for long: the tables are there at once, the figures are
made one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from bokeh.layouts import column, row
from bokeh.models import (
    BoxAnnotation,
    ColumnDataSource,
    CustomJSTickFormatter,
    Div,
    FactorRange,
    HoverTool,
    InlineStyleSheet,
    Legend,
    Select,
    Span,
)
from bokeh.palettes import viridis
from bokeh.plotting import figure
from bokeh.transform import dodge
from numpy.typing import NDArray

from hybridq.monitor import tables
from hybridq.monitor.store import Loop, Point, Run
from hybridq.resources import format_bytes

if TYPE_CHECKING:
    from bokeh.document import Document
    from distributed import Scheduler

__all__ = ["show"]

_EVERY = 500
"""Milliseconds between looks."""
_AFTER, _BETWEEN = 250, 20
"""Milliseconds until the first figure is made, when the browser has the tables as a rule, and between steps of that."""
_EACH = 24
"""Of so many loops or fewer each has its curve; of more, median and quantiles are drawn."""
_LANES, _CHOICES, _GRID = 24, 64, 80
_FLOOR = 1e-16
"""The smallest error that a logarithmic axis shows."""
_AUTO = "auto"
_INK, _GRAY = "#1f2933", "#9aa5b1"
_BAND, _MEDIAN, _WORST, _LIMIT = "#56B4E9", "#0072B2", "#D55E00", "#009E73"
_PROJECTED, _MEASURED = "#CC79A7", "#009E73"
_FONT = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"


def show(plugin_of: Callable[[Scheduler], Any], scheduler: Scheduler, extra: Mapping[str, Any], doc: Document) -> None:
    """Build the document of one browser, of what ``plugin_of(scheduler)`` keeps (None while it is not there)."""
    doc.title = "Dask: hybridq"
    page = _Page()
    doc.add_root(page.root)
    seen: list[tuple[Any, tuple[int, int], str] | None] = [None]

    def look() -> None:
        plugin = plugin_of(scheduler)
        if plugin is None:
            return
        now = (plugin, plugin.state, page.choice.value)
        if now != seen[0]:
            seen[0] = now
            page.update(plugin.runs(), plugin.names(), plugin.memory())

    def draw() -> None:
        growing = page.grow(doc)

        def step() -> None:
            if next(growing, None) is None:
                doc.remove_periodic_callback(steps)

        steps = doc.add_periodic_callback(step, _BETWEEN)

    page.choice.on_change("value", lambda _attribute, _old, _new: look())
    look()
    doc.add_periodic_callback(look, _EVERY)
    doc.add_timeout_callback(draw, _AFTER)
    try:
        from distributed.dashboard.components.scheduler import BOKEH_THEME, env

        doc.template = env.get_template("simple.html")
        doc.template_variables.update(extra)
        doc.theme = BOKEH_THEME
    except Exception as error:  # noqa: BLE001  # private names of another version: the page stands without the frame
        page.note.visible = True
        page.note.text = f'<div class="hq faint">without Dask\'s frame: {type(error).__name__}</div>'


def _figure(title: str, y: str, *, x: str = "Iteration", height: int = 300, **options: Any) -> Any:
    """A figure in the page's style."""
    made: Any = figure(
        title=title, height=height, sizing_mode="stretch_width", background_fill_color=None,
        outline_line_color=None, border_fill_color=None, toolbar_location="right",
        min_border_right=22, min_border_left=12,
        min_border_bottom=8, min_border_top=10,
        styles={"background": "#fff", "border": "1px solid #dde3ea", "border-radius": "6px"},
        **options,
    )  # fmt: skip
    made.toolbar.logo = None
    made.toolbar.autohide = True
    made.title.text_font, made.title.text_font_size, made.title.text_color = _FONT, "14px", _INK
    made.xaxis.axis_label, made.yaxis.axis_label = x or None, y or None
    for axis in (*made.xaxis, *made.yaxis):
        axis.axis_label_text_font = axis.major_label_text_font = _FONT
        axis.axis_label_text_font_size, axis.major_label_text_font_size = "13px", "12px"
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_color = axis.major_label_text_color = "#3e4c59"
        axis.axis_line_color = axis.major_tick_line_color = _GRAY
        axis.minor_tick_line_color = None
    made.xgrid.grid_line_color = None
    made.ygrid.grid_line_color = "#e4e7eb"
    return made


def _legend(made: Any) -> None:
    """The legend in a line above the figure, where it covers nothing."""
    made.add_layout(made.legend[0] if made.legend else Legend(), "above")
    made.legend.orientation = "horizontal"
    made.legend.border_line_color = made.legend.background_fill_color = None
    made.legend.label_text_font, made.legend.label_text_font_size = _FONT, "12px"
    made.legend.padding = made.legend.margin = 2
    made.legend.spacing = 16
    made.legend.glyph_height, made.legend.glyph_width = 14, 20


@dataclass(frozen=True, eq=False)
class _View:
    """What is drawn: of one run, the loops of one group."""

    run: Run | None
    group: str
    loops: Sequence[Loop]
    unit: str
    tables: Mapping[str, NDArray[np.float64]]
    """Points of each loop by its location, shape (points, 4)."""
    names: Mapping[str, str]
    """Of workers, by address."""
    memory: Mapping[str, tuple[int, int]]
    """Of workers, by address: bytes measured, and the limit."""

    @cached_property
    def best(self) -> tuple[Sequence[Loop], NDArray[np.int64], NDArray[np.float64]]:
        """The loops that have points, rows, and the best value of each loop at each of them, held after its last."""
        loops = [loop for loop in self.loops if loop.points]
        grid = np.unique(np.linspace(0, max((loop.points[-1][0] for loop in loops), default=0), _GRID).astype(int))
        table = np.empty((len(loops), len(grid)))
        for number, loop in enumerate(loops):
            points = self.tables[loop.at]
            at = np.clip(np.searchsorted(points[:, 0], grid, side="right") - 1, 0, None)
            table[number] = points[at, 3]
        return loops, grid, table


class _Section(Protocol):
    """A figure, or several, and how they follow what is known."""

    root: Any

    def update(self, view: _View) -> None: ...


class _Curves:
    """A figure with a curve for each loop, or with quantiles of many."""

    def __init__(self, title: str, y: str, *, log: bool) -> None:
        self.root = _figure(title, y, y_axis_type="log" if log else "linear", tools="pan,wheel_zoom,box_zoom,reset")
        made = self.root
        self._bands = ColumnDataSource({"xs": [], "ys": [], "color": []})
        self._lines = ColumnDataSource({"xs": [], "ys": [], "color": [], "name": [], "last": []})
        self._references = ColumnDataSource({"x0": [], "x1": [], "y": [], "color": []})
        self._many = ColumnDataSource({"x": [], "low": [], "high": [], "median": [], "worst": []})
        made.varea("x", "low", "high", source=self._many, fill_color=_BAND, fill_alpha=0.35,
                   legend_label="10 % to 90 % of loops")  # fmt: skip
        made.line("x", "worst", source=self._many, color=_WORST, line_dash="dotted", line_width=1.5,
                  legend_label="worst loop")  # fmt: skip
        made.line("x", "median", source=self._many, color=_MEDIAN, line_width=2.5, legend_label="median")
        made.patches("xs", "ys", source=self._bands, fill_color="color", fill_alpha=0.2, line_color=None)
        made.segment("x0", "y", "x1", "y", source=self._references, color="color", line_dash="dashed", line_width=1.2,
                     legend_label="reference")  # fmt: skip
        lines = made.multi_line("xs", "ys", source=self._lines, color="color", line_width=2)
        ends = ColumnDataSource({"x": [], "y": [], "color": []})
        self._ends = ends
        made.scatter("x", "y", source=ends, color="color", size=6)
        made.add_tools(HoverTool(renderers=[lines], tooltips=[("loop", "@name"), ("now", "@last")]))
        self.chemical: Span | None = None
        if log:
            self.chemical = Span(
                location=tables.ACCURACY, dimension="width", line_color=_LIMIT, line_dash="dashed", line_width=2,
                visible=False,
            )  # fmt: skip
            made.add_layout(self.chemical)
            below = BoxAnnotation(top=tables.ACCURACY, fill_color=_LIMIT, fill_alpha=0.06, visible=False, level="image")
            made.add_layout(below)
            self.below = below
            made.line([math.nan] * 2, [math.nan] * 2, color=_LIMIT, line_dash="dashed", line_width=2,
                      legend_label="chemical accuracy, 1.6 mhartree")  # fmt: skip
        _legend(made)
        self._log = log
        self._items = {item.label.value: item for item in made.legend[0].items}

    def update(self, view: _View) -> None:
        """Draw the loops: values against rows or, on a logarithmic axis, distances of the best from references."""
        loops = view.loops
        shown = [loop for loop in loops if loop.points and (loop.reference is not None or not self._log)]
        each = len(loops) <= _EACH
        self._label(view)
        self._each(shown if each else [], view)
        self._quantiles([] if each else shown, view)
        hartree = any(loop.unit == "hartree" for loop in shown)
        if self.chemical is not None:
            self.chemical.visible = self.below.visible = hartree
        visible = {
            "reference": each and not self._log and any(loop.reference is not None for loop in shown),
            "chemical accuracy, 1.6 mhartree": hartree, "10 % to 90 % of loops": not each, "median": not each,
            "worst loop": not each and any(loop.reference is not None for loop in shown),
        }  # fmt: skip
        for label, item in self._items.items():
            item.visible = visible.get(label, True)

    def _label(self, view: _View) -> None:
        known = [loop.reference is not None for loop in view.loops]
        if self._log:
            title = "Distance of the best value from its reference"
            if known and not any(known):
                title = "No reference is known for these loops"
            value = "|Best − reference|"
        else:
            run, group = view.run, view.group
            title = f"Convergence: {f'{run.name}, {group}' if run is not None and group else 'no loop yet'}"
            many = len(known) > _EACH
            value = "Value" if not many else "Best − reference" if all(known) else "Best value"
        self.root.title.text = title
        self.root.yaxis.axis_label = f"{value} ({view.unit})" if view.unit else value

    def _each(self, loops: Sequence[Loop], view: _View) -> None:
        colours = list(viridis(len(loops) + max(2, len(loops) // 6)))[: len(loops)]
        lines: dict[str, list[Any]] = {"xs": [], "ys": [], "color": [], "name": [], "last": []}
        bands: dict[str, list[Any]] = {"xs": [], "ys": [], "color": []}
        ends: dict[str, list[Any]] = {"x": [], "y": [], "color": []}
        references: dict[str, list[Any]] = {"x0": [], "x1": [], "y": [], "color": []}
        for loop, colour in zip(loops, colours, strict=True):
            table = view.tables[loop.at]
            xs, values, stderrs = table[:, 0] + 1, table[:, 1], table[:, 2]
            ys = np.maximum(np.abs(table[:, 3] - (loop.reference or 0.0)), _FLOOR) if self._log else values
            now = f"{ys[-1]:.2e}" if self._log else f"{ys[-1]:.8f}"
            _add(lines, xs=xs, ys=ys, color=colour, name=loop.at, last=f"{now} {loop.unit}")
            _add(ends, x=xs[-1], y=ys[-1], color=colour)
            if np.any(stderrs > 0):
                low, high = ys - stderrs, ys + stderrs
                if self._log:
                    low = np.maximum(low, np.maximum(_FLOOR, ys / 100))
                _add(bands, xs=np.concatenate([xs, xs[::-1]]), ys=np.concatenate([low, high[::-1]]), color=colour)
            if loop.reference is not None and not self._log:
                last = max(float(xs[-1]), 2.0)
                _add(references, x0=1.0, x1=last, y=loop.reference, color=colour)
        self._lines.data, self._bands.data = lines, bands
        if not lines["xs"]:  # a figure without a point has no axes
            _add(ends, x=1.0, y=1.0, color="rgba(0,0,0,0)")
        self._ends.data, self._references.data = ends, references

    def _quantiles(self, loops: Sequence[Loop], view: _View) -> None:
        if not loops:
            self._many.data = {"x": [], "low": [], "high": [], "median": [], "worst": []}
            return
        self._ends.data = {key: [] for key in ("x", "y", "color")}
        every, grid, table = view.best
        if len(loops) < len(every):
            table = table[[loop.reference is not None for loop in every]]
        known = all(loop.reference is not None for loop in loops)
        if known:
            table = table - np.array([[loop.reference] for loop in loops])
        if self._log:
            table = np.maximum(np.abs(table), _FLOOR)
        low, median, high = np.quantile(table, [0.1, 0.5, 0.9], axis=0)
        worst = table.max(axis=0) if known else np.full(len(grid), math.nan)
        self._many.data = {"x": grid + 1, "low": low, "high": high, "median": median, "worst": worst}


class _Gantt:
    """What ran on each device, when."""

    def __init__(self) -> None:
        self.root = _figure(
            "Devices over time", "", x="Time of day", y_range=FactorRange(), x_axis_type="datetime",
            tools="xpan,xwheel_zoom,box_zoom,reset",
        )  # fmt: skip
        self.root.ygrid.grid_line_color = None
        _clock(self.root)
        self._spans = {}
        for kind in ("quantum", "classical"):
            source = ColumnDataSource({"lane": [], "left": [], "right": [], "name": [], "count": [], "seconds": []})
            bars = self.root.hbar(
                "lane", left="left", right="right", height=0.62, source=source, color=tables.COLOURS[kind],
                line_color=tables.COLOURS[kind], legend_label=kind,
            )  # fmt: skip
            self.root.add_tools(HoverTool(renderers=[bars], tooltips=[
                ("calls", "@count of @name"), ("seconds", "@seconds{0.000}"), ("on", "@lane"),
            ]))  # fmt: skip
            self._spans[kind] = source
        _legend(self.root)

    def update(self, view: _View) -> None:
        """Draw what ran on each device."""
        names = view.names
        spans = view.run.spans if view.run is not None else ()
        lanes = list(dict.fromkeys(names.get(span.lane, span.lane) for span in sorted(spans, key=lambda s: -s.seconds)))
        lanes = sorted(lanes[:_LANES], key=lambda lane: (lane != "driver", len(lane), lane), reverse=True)
        if list(self.root.y_range.factors) != lanes:
            self.root.y_range.factors = lanes
        keys = ("lane", "left", "right", "name", "count", "seconds")
        drawn: dict[str, dict[str, list[Any]]] = {kind: {key: [] for key in keys} for kind in self._spans}
        there = set(lanes)
        for span in spans:
            lane = names.get(span.lane, span.lane)
            if lane in there:
                _add(drawn[span.kind], lane=lane, left=span.start * 1e3, right=(span.start + span.seconds) * 1e3,
                     name=span.name, count=span.count, seconds=span.seconds)  # fmt: skip
        for kind, source in self._spans.items():
            source.data = drawn[kind]


class _Load:
    """Slots at work, and the queue, over time."""

    def __init__(self) -> None:
        self._load = ColumnDataSource({"time": [], "busy": [], "slots": [], "waiting": []})
        busy = _figure("Slots at work", "Slots", x="", height=150, x_axis_type="datetime", tools="")
        busy.step("time", "slots", source=self._load, mode="after", color=_GRAY, line_width=1.5,
                       line_dash="dashed", legend_label="there")  # fmt: skip
        busy.step("time", "busy", source=self._load, mode="after", color=_MEDIAN, line_width=2,
                       legend_label="at work")  # fmt: skip
        waiting = _figure("Calls waiting", "Calls", x="Time of day", height=150, x_axis_type="datetime", tools="",
                               x_range=busy.x_range)  # fmt: skip
        waiting.step("time", "waiting", source=self._load, mode="after", color=_WORST, line_width=2)
        for made in (busy, waiting):
            made.y_range.start, made.y_range.range_padding = 0, 0.25
            made.yaxis.ticker.min_interval = 1
            made.yaxis.ticker.desired_num_ticks = 3
            made.toolbar_location = None
            _clock(made)
        _legend(busy)
        self.root = column(busy, waiting, spacing=6, sizing_mode="stretch_width")

    def update(self, view: _View) -> None:
        """Draw slots and queue over time."""
        samples = view.run.samples if view.run is not None else ()
        self._load.data = {
            "time": [sample.time * 1e3 for sample in samples],
            **{key: [getattr(sample, key) for sample in samples] for key in ("busy", "slots", "waiting")},
        }


class _Memory:
    """Memory of each worker, projected beside measured."""

    def __init__(self) -> None:
        self.root = _figure("Memory by worker", "", x="Memory (GiB)", y_range=FactorRange(), tools="")
        self.root.toolbar_location = None
        self.root.x_range.start = 0
        self.root.ygrid.grid_line_color = None
        self.root.xgrid.grid_line_color = "#e4e7eb"
        self.root.xaxis.formatter = CustomJSTickFormatter(code="return tick.toLocaleString('en');")
        self._memory = ColumnDataSource({"name": [], "projected": [], "measured": [], "limit": [], "text": []})
        bars = [
            self.root.hbar(dodge("name", shift, range=self.root.y_range), left=0, right=what, height=0.3,
                             source=self._memory, color=colour, legend_label=label)
            for what, shift, colour, label in (
                ("projected", 0.17, _PROJECTED, "projected"), ("measured", -0.17, _MEASURED, "measured"))
        ]  # fmt: skip
        self.root.scatter(
            "limit", "name", source=self._memory, marker="dash", angle=math.pi / 2, size=30, line_color=_INK,
            line_width=2.5, legend_label="limit",
        )  # fmt: skip
        self.root.add_tools(HoverTool(renderers=bars, tooltips=[("worker", "@name"), ("", "@text")]))
        _legend(self.root)

    def update(self, view: _View) -> None:
        """Draw what each worker takes, may take, and is predicted to take."""
        run, names = view.run, view.names
        projected = {device.name: device.projected for device in run.devices} if run is not None else {}
        rows = [
            (names.get(at, at), projected.get(at, 0) / 2**30, measured / 2**30, limit / 2**30,
             f"{format_bytes(projected.get(at, 0))} projected, {format_bytes(measured)} measured, "
             f"{format_bytes(limit)} limit")
            for at, (measured, limit) in view.memory.items()
        ]  # fmt: skip
        rows = sorted(sorted(rows, key=lambda r: -r[2])[:_LANES], key=lambda r: (len(r[0]), r[0]), reverse=True)
        factors = [r[0] for r in rows]
        if list(self.root.y_range.factors) != factors:
            self.root.y_range.factors = factors
        keys = ("name", "projected", "measured", "limit", "text")
        self._memory.data = {key: [r[i] for r in rows] for i, key in enumerate(keys)}


_SECTIONS: Sequence[Callable[[], _Section]] = (
    lambda: _Curves("Convergence", "Value", log=False),
    lambda: _Curves("Distance of the best value from its reference", "|Best − reference|", log=True),
    _Gantt,
    _Load,
    _Memory,
)
"""Two in a line, but for the last one, which is beside what was refused."""


class _Page:
    """The models of one document, and how they follow what is known."""

    def __init__(self) -> None:
        sheet = InlineStyleSheet(css=tables.CSS)
        self.note = Div(text="", visible=False, stylesheets=[sheet])
        self.tiles = Div(text="", sizing_mode="stretch_width", stylesheets=[sheet])
        self.table = Div(text="", sizing_mode="stretch_width", stylesheets=[sheet])
        self.notes = Div(text="", sizing_mode="stretch_width", stylesheets=[sheet])
        self.choice = Select(
            title="Figures of", value=_AUTO, options=[(_AUTO, "what runs, or ran last")], width=420,
            stylesheets=[InlineStyleSheet(css=f":host {{ font: 13px {_FONT}; }} select {{ font: 13px {_FONT}; }}")],
        )  # fmt: skip
        wide: dict[str, Any] = {"sizing_mode": "stretch_width"}
        heading = Div(text='<div class="hq"><h2>Refused, retried, failed</h2></div>', stylesheets=[sheet])
        self._last = row(column(heading, self.notes, **wide), spacing=14, **wide)
        self.root = column(
            self.note, self.tiles, self.table, self.choice, self._last,
            spacing=12, margin=(8, 8, 24, 8), styles={"font-family": _FONT}, **wide,
        )  # fmt: skip
        self._wide = wide
        self._sections: list[_Section] = []
        self._view = _View(None, "", (), "", {}, {}, {})
        self._points: dict[str, tuple[tuple[Point, ...], NDArray[np.float64]]] = {}

    def grow(self, doc: Document) -> Iterator[str]:
        """Make the figures in steps: each is made, then filled and put into ``doc``, then sent to the browser."""
        for number, make in enumerate(_SECTIONS):
            section = make()
            yield "made"
            self._sections.append(section)
            section.update(self._view)
            doc.hold("combine")
            self._place(number, section.root)
            yield "placed"
            doc.unhold()
            yield "sent"

    def _place(self, number: int, made: Any) -> None:
        children = self.root.children
        if number == len(_SECTIONS) - 1:
            self._last.children = [made, *self._last.children]
        elif number % 2 == 0:
            children.insert(len(children) - 1, row(made, spacing=14, **self._wide))
        else:
            children[-2].children.append(made)

    def update(self, runs: Sequence[Run], names: Mapping[str, str], memory: Mapping[str, tuple[int, int]]) -> None:
        """Show these runs; ``names`` and ``memory`` are of workers, by address."""
        _text(self.tiles, tables.tiles(runs))
        _text(self.table, tables.runs_table(runs, names))
        _text(self.notes, tables.notes_table(runs))
        run, group = self._chosen(runs)
        loops = [loop for loop in run.loops if loop.group == group] if run is not None else []
        unit = next((loop.unit for loop in loops if loop.unit), "")
        self._view = _View(run, group, loops, unit, self._tables(loops), names, memory)
        for section in self._sections:
            section.update(self._view)

    def _tables(self, loops: Sequence[Loop]) -> Mapping[str, NDArray[np.float64]]:
        """Points as arrays: most loops of many stand as they stood at the last look."""
        kept, self._points = self._points, {}
        for loop in loops:
            known = kept.get(loop.at)
            if known is None or known[0] is not loop.points:
                known = (loop.points, np.array(loop.points, dtype=float))
            self._points[loop.at] = known
        return {at: table for at, (_, table) in self._points.items()}

    def _chosen(self, runs: Sequence[Run]) -> tuple[Run | None, str]:
        """The run and group that figures are drawn of."""
        choices = [(run, group.name) for run in runs for group in run.groups][:_CHOICES]
        options = [(f"{run.id}\n{name}", f"{run.name} · {name} ({run.state})") for run, name in choices]
        wanted = [(_AUTO, "what runs, or ran last"), *options]
        if self.choice.options != wanted:
            self.choice.options = wanted
        for (run, name), (key, _) in zip(choices, options, strict=True):
            if key == self.choice.value:
                return run, name
        for run in runs[:1]:
            groups = [g.name for g in run.groups if g.running] or [g.name for g in run.groups]
            return run, groups[0] if groups else ""
        return None, ""


def _clock(made: Any) -> None:
    """Axes with the time of day where the browser is, and no date."""
    made.xaxis.formatter = CustomJSTickFormatter(
        code="return new Date(tick).toLocaleTimeString('en-GB', {hour12: false});"
    )
    made.xaxis.ticker.desired_num_ticks = 6


def _add(data: dict[str, list[Any]], **values: Any) -> None:
    for key, value in values.items():
        data[key].append(value)


def _text(div: Any, text: str) -> None:
    if div.text != text:
        div.text = text
