"""The recorded graph of a run as a picture: what was called, and which values went where.

Calls of one place are one box, with their number; a loop is one box with all that happened in it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

from hybridq import journal as records
from hybridq.journal import read_records
from hybridq.recorded import Recorded, index
from hybridq.why import ARGUMENTS, VALUE, Origin, origins

__all__ = ["Box", "Graph", "Line", "drawn", "graph"]

_MOST_STAGES = 4
"""Calls of one name in one scope that have boxes of their own; of more, all are one box."""
_COLOURS = {"classical": ("#E69F00", "#FDF3DC"), "quantum": ("#0072B2", "#E1EFF8"), "loop": ("#0072B2", "#E1EFF8"),
            "failed": ("#D55E00", "#FBE9DF"), "run": ("#555555", "#F4F4F4")}  # fmt: skip
_CHARACTER, _LINE, _MARGIN, _GAP, _STEP = 7.3, 17, 12, 36, 64
"""Pixels: a character's width at most, a line's height, around text, between boxes, between layers."""


@dataclass(frozen=True)
class Box:
    """The calls of one place."""

    place: str
    """Their location, without the numbers in which they differ; `ARGUMENTS` and `VALUE` are the run's own."""
    kind: str
    """``classical``, ``quantum``, ``loop``, ``failed`` if no call of it came to a value, or ``run``."""
    title: str
    words: tuple[str, ...]
    """Lines below the title."""
    calls: int


@dataclass(frozen=True)
class Line:
    """Values that went from calls of one box to calls of another."""

    source: str
    target: str
    label: str
    pairs: int
    """Pairs of calls."""


@dataclass(frozen=True)
class Graph:
    """Boxes in the order of their first call, and lines between them."""

    name: str
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]


@dataclass
class _Calls:
    kind: str
    name: str
    scopes: set[str] = field(default_factory=set)
    calls: int = 0
    seconds: float = 0.0
    rows: int = 0
    methods: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)
    unfinished: int = 0
    failures: int = 0


def graph(directory: Path) -> Graph:
    """What the run in ``directory`` called, and where the values came from, as far as they tell.

    Raises what `read_records` does, and `WorkflowError` for a run without a record.
    """
    traced = list(origins(directory))
    entries = read_records(directory)
    found = index(entries)
    folded = _Folded(found)
    calls: dict[str, _Calls] = {}
    for _, record in entries:
        if not isinstance(record, records.Step | records.Evaluation | records.Loop):
            continue
        loop = folded.loop_of(record.at)
        if loop is not None:
            folded.calls(calls, loop, "loop").inside[_names(record.at).rpartition("/")[2]] += 1
            continue
        kind = {"step": "classical", "eval": "quantum", "loop": "loop"}[record.kind]
        mine = folded.calls(calls, record.at, kind)
        mine.calls += 1
        if isinstance(record, records.Loop):
            entry = found.loops[record.at]
            mine.rows += len(entry.rows)
            mine.seconds += sum(row.seconds for row in entry.rows)
            mine.methods[record.method] += 1
            mine.unfinished += entry.end is None
        else:
            mine.seconds += record.seconds
    for at in found.failures:
        mine = folded.calls(calls, folded.loop_of(at) or at, "failed")
        mine.calls += mine.kind == "failed"
        mine.failures += 1
    lines = _lines(folded, traced, calls.keys())
    boxes = [_box(place, one) for place, one in calls.items()]
    ends = {line.source for line in lines} | {line.target for line in lines}
    header = found.header
    name = "" if header is None else header.name
    if ARGUMENTS in ends:
        boxes.insert(0, Box(ARGUMENTS, "run", "arguments", (f"of {header.workflow}" if header else "",), 1))
    if VALUE in ends:
        boxes.append(Box(VALUE, "run", "value", (f"of {header.workflow}" if header else "",), 1))
    return Graph(name, tuple(boxes), lines)


class _Folded:
    """Locations without the numbers in which calls of one place differ."""

    def __init__(self, found: Recorded) -> None:
        self._loops = {at: entry.header.function for at, entry in found.loops.items()}
        numbers: defaultdict[str, set[str]] = defaultdict(set)
        for at in (*found.answers, *found.loops, *found.failures):
            outer = self.loop_of(at) or at
            numbers[self._whole(outer)].add(outer.rpartition("[")[2])
        self._stages = {place for place, last in numbers.items() if 1 < len(last) <= _MOST_STAGES}

    def loop_of(self, at: str) -> str | None:
        """The outermost loop that a call was made in."""
        parts = at.split("/")
        above = ("/".join(parts[:n]) for n in range(1, len(parts)))
        return next((one for one in above if one in self._loops), None)

    def _whole(self, at: str) -> str:
        return _names(at) + (f"({self._loops[at]})" if at in self._loops else "")

    def place(self, at: str) -> str:
        place = self._whole(at)
        return f"{place}[{at.rpartition('[')[2]}" if place in self._stages else place

    def calls(self, calls: dict[str, _Calls], at: str, kind: str) -> _Calls:
        place = self.place(at)
        mine = calls.setdefault(place, _Calls(kind, place.rpartition("/")[2]))
        mine.scopes.add(at.rpartition("/")[0])
        return mine


def _names(at: str) -> str:
    return re.sub(r"\[\d+\]", "", at)


def _lines(folded: _Folded, traced: Sequence[Origin], places: Collection[str]) -> tuple[Line, ...]:
    pairs: dict[tuple[str, str], dict[tuple[str, str], set[str]]] = {}
    for origin in traced:
        giver, taker = (folded.loop_of(at) or at for at in (origin.source, origin.at))
        source, target = (at if at in (ARGUMENTS, VALUE) else folded.place(at) for at in (giver, taker))
        known = all(end in places or end in (ARGUMENTS, VALUE) for end in (source, target))
        if known and giver != taker:  # what stays within a loop is in its box
            part = re.sub(r"\[\d+\]", "[]", origin.part)
            pairs.setdefault((source, target), {}).setdefault((giver, taker), set()).add(part)
    found = []
    for (source, target), between in pairs.items():
        # a whole value counts more than parts of it that are found elsewhere, too
        parts = {part for given in between.values() for part in ({""} if "" in given else given)} - {""}
        parts = {part for part in parts if part.strip("[]")}
        label = ", ".join(sorted(parts)[:3]) + (", …" if len(parts) > 3 else "")
        found.append(Line(source, target, label, len(between)))
    return tuple(found)


def _box(place: str, calls: _Calls) -> Box:
    title, words = calls.name, []
    if calls.kind == "loop":
        words.append(", ".join(calls.methods))
        words.append(f"{calls.rows:,} evaluations, {_time(calls.seconds)}")
        if calls.inside:
            words.append("in it " + ", ".join(f"{name} × {count:,}" for name, count in calls.inside.items()))
        if calls.unfinished:
            words.append(f"{calls.unfinished:,} not finished")
    elif calls.kind != "failed":
        words.append(
            f"{'classical step' if calls.kind == 'classical' else 'quantum evaluation'}, {_time(calls.seconds)}"
        )
    if calls.failures:
        words.append(f"{calls.failures:,} failed")
    scope = _names(next(iter(calls.scopes), "")).partition("/")[2]
    if scope:
        words.append(f"in {scope}" + (f" × {len(calls.scopes):,}" if len(calls.scopes) > 1 else ""))
    return Box(place, calls.kind, title + (f" × {calls.calls:,}" if calls.calls > 1 else ""), tuple(words), calls.calls)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.2g} s"
        if seconds < 100
        else f"{seconds / 60:.1f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


# -- the picture -------------------------------------------------------------------------------------------------------


@dataclass
class _Node:
    """A box, or the place where a line passes a layer."""

    key: str
    layer: int
    width: float
    height: float
    x: float = 0.0
    """Of its middle."""
    y: float = 0.0
    """Of its top."""


def drawn(found: Graph) -> str:
    """The graph as SVG: values go downwards, dashed where they go back up to calls of a place above."""
    nodes, chains, back = _layout(found)
    left = min((node.x - node.width / 2 for node in nodes.values()), default=0.0) - 2 * _MARGIN
    right = max((node.x + node.width / 2 for node in nodes.values()), default=300.0) + 2 * _MARGIN
    bottom = max((node.y + node.height for node in nodes.values()), default=0.0)
    parts: list[str] = []
    labels: list[str] = []
    side = right
    for line in found.lines:
        text = " ".join(filter(None, [line.label, f"× {line.pairs:,}" if line.pairs > 1 else ""]))
        if line in back:
            side += 14
            parts.append(_back(nodes[line.source], nodes[line.target], side, text))
            right = max(right, side + _CHARACTER * len(text) + 8)
        else:
            parts.append(_path([nodes[key] for key in chains[line.source, line.target]]))
            labels.append(_text(*_label_at(nodes, chains, line), text))
            right = max(right, _label_at(nodes, chains, line)[0] + _CHARACTER * len(text) + 8)
    parts += [_rectangle(nodes[box.place], box) for box in found.boxes]
    kinds = {"classical": "classical step", "quantum": "quantum evaluation", "loop": "loop of evaluations",
             "failed": "failed"}  # fmt: skip
    shown = [kind for kind in kinds if any(box.kind == kind for box in found.boxes)]
    legend, x, y = [], left + _MARGIN, bottom + 34
    for kind in shown:
        edge, fill = _COLOURS[kind]
        double = (
            f'<rect x="{x + 2:.0f}" y="{y - 8:.0f}" width="12" height="6" fill="none" stroke="{edge}"/>'
            if kind == "loop"
            else ""
        )
        legend.append(f'<rect x="{x:.0f}" y="{y - 10:.0f}" width="16" height="10" fill="{fill}" stroke="{edge}"/>'
                      f'{double}<text x="{x + 22:.0f}" y="{y:.0f}" class="w">{kinds[kind]}</text>')  # fmt: skip
        x += 30 + _CHARACTER * len(kinds[kind]) + 16
    note = "An arrow is a value that was found again; numbers of few digits are not traced."
    legend.append(f'<text x="{left + _MARGIN:.0f}" y="{y + 20:.0f}" class="w">{note}</text>')
    right = max(right, x, left + _MARGIN + _CHARACTER * len(note))
    width, height = right - left, bottom + 34 + 20 + _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{left:.0f} 0 {width:.0f} {height:.0f}" role="img">\n<title>{escape(found.name)}</title>\n'
        '<style>text{font:13px system-ui,"DejaVu Sans","Liberation Sans",sans-serif;fill:#1a1a1a}'
        ".t{font-weight:600}.w{font-size:12px;fill:#444}.l{font-size:11px;fill:#444;paint-order:stroke;stroke:#fff;"
        "stroke-width:4px}path{fill:none;stroke:#555;stroke-width:1.3}</style>\n"
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" style="fill:#555;stroke:none"/></marker></defs>\n'
        f'<rect x="{left:.0f}" y="0" width="{width:.0f}" height="{height:.0f}" fill="#fff"/>\n'
        + "\n".join([*parts, *labels, *legend])
        + "\n</svg>\n"
    )


def _label_at(nodes: dict[str, _Node], chains: dict[tuple[str, str], list[str]], line: Line) -> tuple[float, float]:
    """Where a line's label stands: in its first gap, further down than across, where lines of one box are apart."""
    first, second = (nodes[key] for key in chains[line.source, line.target][:2])
    top = first.y + first.height
    return first.x + 0.8 * (second.x - first.x) + 7, top + 0.66 * (second.y - top)


def _layout(found: Graph) -> tuple[dict[str, _Node], dict[tuple[str, str], list[str]], set[Line]]:
    """Boxes and passages with their places, the way of each line through them, and the lines that go back."""
    order = {box.place: number for number, box in enumerate(found.boxes)}
    back = {line for line in found.lines if order[line.source] >= order[line.target]}
    forward = [line for line in found.lines if line not in back]
    layer = dict.fromkeys(order, 0)
    for line in sorted(forward, key=lambda line: order[line.source]):
        layer[line.target] = max(layer[line.target], layer[line.source] + 1)
    if VALUE in layer:
        layer[VALUE] = max(layer.values())
    nodes: dict[str, _Node] = {}
    for box in found.boxes:
        widest = max(len(box.title) * 1.1, *(len(word) for word in box.words))
        nodes[box.place] = _Node(box.place, layer[box.place], 2 * _MARGIN + _CHARACTER * widest,
                                 1.2 * _MARGIN + _LINE * (1 + len(box.words)))  # fmt: skip
    chains: dict[tuple[str, str], list[str]] = {}
    for line in forward:
        chain = [line.source]
        for passed in range(layer[line.source] + 1, layer[line.target]):
            key = f"{line.source}\x00{line.target}\x00{passed}"
            nodes[key] = _Node(key, passed, 2.0, 0.0)
            chain.append(key)
        chains[line.source, line.target] = [*chain, line.target]
    _place(nodes, chains)
    return nodes, chains, back


def _place(nodes: dict[str, _Node], chains: dict[tuple[str, str], list[str]]) -> None:
    """Put each layer's nodes in the order, and near the place, of what they are connected with."""
    layers: defaultdict[int, list[_Node]] = defaultdict(list)
    for node in nodes.values():
        layers[node.layer].append(node)
    near: defaultdict[str, list[_Node]] = defaultdict(list)
    for chain in chains.values():
        for one, other in pairwise(chain):
            near[one].append(nodes[other])
            near[other].append(nodes[one])
    for row in layers.values():
        _apart(row, [float(i) for i in range(len(row))])
    for sweep in range(12):
        for number in sorted(layers, reverse=sweep % 2 == 1):
            row = layers[number]
            wanted = {
                node.key: sum(n.x for n in near[node.key]) / len(near[node.key]) if near[node.key] else node.x
                for node in row
            }
            row.sort(key=lambda node: wanted[node.key])
            _uncross(row, near)
            _apart(row, [wanted[node.key] for node in row])
    top = 2.0 * _MARGIN
    for number in sorted(layers):
        for node in layers[number]:
            node.y = top
        top += max(node.height for node in layers[number]) + _STEP
    for number, row in layers.items():  # a passage is as high as its layer, so that lines pass straight
        height = max(node.height for node in layers[number])
        for node in row:
            if not node.height:
                node.height = height


def _uncross(row: list[_Node], near: Mapping[str, Sequence[_Node]]) -> None:
    """Swap neighbours whose lines then cross less often."""

    def crossings(one: _Node, other: _Node) -> int:
        return sum(a.layer == b.layer and a.x > b.x for a in near[one.key] for b in near[other.key])

    for _ in row:
        for i, (one, other) in enumerate(pairwise(row)):
            if crossings(other, one) < crossings(one, other):
                row[i], row[i + 1] = other, one


def _apart(row: Sequence[_Node], wanted: Sequence[float]) -> None:
    """Place nodes in their order, none over another, as near to where they are wanted as a shift of all allows."""
    edge = float("-inf")
    for node, x in zip(row, wanted, strict=True):
        node.x = max(x, edge + node.width / 2)
        edge = node.x + node.width / 2 + _GAP
    shift = sum(x - node.x for node, x in zip(row, wanted, strict=True)) / len(row)
    for node in row:
        node.x += shift


def _rectangle(node: _Node, box: Box) -> str:
    edge, fill = _COLOURS[box.kind]
    x, y = node.x - node.width / 2, node.y
    size = f'width="{node.width:.1f}" height="{node.height:.1f}"'
    inner = f'width="{node.width - 6:.1f}" height="{node.height - 6:.1f}"'
    double = (
        f'<rect x="{x + 3:.1f}" y="{y + 3:.1f}" {inner} rx="4" fill="none" stroke="{edge}"/>'
        if box.kind == "loop"
        else ""
    )
    rows = [
        f'<text x="{node.x:.1f}" y="{y + _MARGIN + 8:.1f}" text-anchor="middle" class="t">{escape(box.title)}</text>'
    ]
    rows += [
        f'<text x="{node.x:.1f}" y="{y + _MARGIN + 8 + _LINE * number:.1f}" text-anchor="middle" class="w">'
        f"{escape(word)}</text>"
        for number, word in enumerate(box.words, start=1)
    ]
    return (
        f'<g><title>{escape(box.place)}</title><rect x="{x:.1f}" y="{y:.1f}" {size} rx="6" fill="{fill}" '
        f'stroke="{edge}" stroke-width="1.4"/>{double}{"".join(rows)}</g>'
    )


def _path(chain: Sequence[_Node]) -> str:
    points = [(chain[0].x, chain[0].y + chain[0].height)]
    for node in chain[1:-1]:
        points += [(node.x, node.y), (node.x, node.y + node.height)]
    points.append((chain[-1].x, chain[-1].y))
    path = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for number, ((ax, ay), (bx, by)) in enumerate(pairwise(points)):
        middle = (ay + by) / 2
        straight = number % 2 == 1  # through a layer
        path += (
            f" L{bx:.1f},{by:.1f}" if straight else f" C{ax:.1f},{middle:.1f} {bx:.1f},{middle:.1f} {bx:.1f},{by:.1f}"
        )
    return f'<path d="{path}" marker-end="url(#a)"/>'


def _back(source: _Node, target: _Node, side: float, label: str) -> str:
    ax, ay = source.x + source.width / 2, source.y + source.height * 0.7
    bx, by = target.x + target.width / 2, target.y + target.height * 0.3
    path = f"M{ax:.1f},{ay:.1f} C{side:.1f},{ay:.1f} {side:.1f},{by:.1f} {bx:.1f},{by:.1f}"
    return f'<path d="{path}" stroke-dasharray="5 3" marker-end="url(#a)"/>' + _text(
        (max(ax, bx) + 3 * side) / 4 + 4, (ay + by) / 2 + 4, label
    )


def _text(x: float, y: float, label: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="l">{escape(label)}</text>' if label else ""
