"""The recorded graph: calls folded by place, values where they went, and a picture that is well-formed and readable."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from runs import report

import hybridq as hq
from hybridq.errors import JournalError
from hybridq.graph import Box, Graph, Line, drawn, graph
from hybridq.why import ARGUMENTS, VALUE, Origin, origins

TERMS = {"ZZ": 1.0, "XX": 0.5}


@hq.quantum
def energy(theta: Any, p: Any) -> Any:
    return hq.expval(p.ansatz, p.hamiltonian, theta)


@hq.classical
def improved(x: Any) -> Any:
    return np.asarray(x) * 0.875


@hq.classical
def broken() -> None:
    raise ValueError("no")


def weighted(theta: Any, p: Any) -> float:
    return float(energy(theta, p)) * 1.0625


@hq.workflow
def point(sites: int, scale: float) -> float:
    p = hq.lattice("ising", sites, boundary="ring")
    x = p.start * scale
    for _ in range(6):
        x = improved(hq.minimize(energy, x, args=(p,), method="COBYLA", options={"maxiter": 10}).x)
    last = hq.minimize(weighted, x, args=(p,), method="COBYLA", options={"maxiter": 10})
    return float(energy(last.x, p))


@hq.workflow
def study(sizes: list[int], scale: float) -> list[float]:
    try:
        broken()
    except ValueError:
        return hq.map(lambda sites: point(sites, scale), sizes)
    return []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    report(study, [4, 6], 0.765432109, name="study", store=store)
    return store / "study"


def test_calls_of_one_place_are_one_box(made: Path) -> None:
    found = {box.title: box for box in graph(made).boxes}
    assert {title: (box.kind, box.calls) for title, box in found.items()} == {
        "broken": ("failed", 1), "minimize(energy) × 12": ("loop", 12), "improved × 12": ("classical", 12),
        "minimize(weighted) × 2": ("loop", 2), "energy × 2": ("quantum", 2), "value": ("run", 1),
    }  # fmt: skip
    words = found["minimize(weighted) × 2"].words
    assert "in it energy × 20" in words  # 10 evaluations in each of two loops
    assert any(word.startswith("20 evaluations") for word in words)
    assert found["broken"].words == ("1 failed",)


def test_lines_are_where_values_went(made: Path) -> None:
    found = graph(made)
    titles = {box.place: box.title.partition(" ")[0] for box in found.boxes}
    lines = {(titles[line.source], titles[line.target]): line for line in found.lines}
    # a loop that found nothing better ends where it began, at the value of the call before
    assert sum(line.pairs for (_, target), line in lines.items() if target == "improved") == 12
    assert lines["minimize(energy)", "improved"].label == "x"
    assert lines["improved", "minimize(energy)"].pairs == 10
    assert lines["improved", "minimize(weighted)"].pairs == 2
    assert lines["minimize(weighted)", "value"].pairs == 2  # which evaluated the same point first
    assert ("minimize(weighted)", "minimize(weighted)") not in lines


def test_origins_name_calls_and_parts(made: Path) -> None:
    found = list(origins(made))
    first = "study/lambda[0]/point[0]"
    assert Origin(f"{first}/improved[0]", "[0][0]", f"{first}/minimize[0]", "x") in found
    (value,) = (origin for origin in found if (origin.at, origin.path) == (VALUE, "[1]"))
    assert value.source.startswith("study/lambda[1]/point[0]/minimize[6]/")
    assert value.part == "value"
    assert not any(origin.source == origin.at for origin in found)


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    (ax, ay, aw, ah), (bx, by, bw, bh) = one, other
    return ax < bx + bw and bx < ax + aw and ay < by + bh and by < ay + ah


def boxes_of(svg: str) -> dict[str, tuple[float, ...]]:
    """The outer rectangle of each box, by its tool tip."""
    space = "{http://www.w3.org/2000/svg}"
    found = {}
    for group in ElementTree.fromstring(svg).iter(f"{space}g"):
        title, rectangle = group.find(f"{space}title"), group.find(f"{space}rect")
        assert title is not None
        assert rectangle is not None
        found[str(title.text)] = tuple(float(rectangle.get(name, "nan")) for name in ("x", "y", "width", "height"))
    return found


def test_the_picture_shows_every_box_inside_and_apart(made: Path) -> None:
    found = graph(made)
    svg = drawn(found)
    places = boxes_of(svg)
    assert set(places) == {box.place for box in found.boxes}
    assert not any(overlap(one, other) for one, other in combinations(places.values(), 2))
    left, top, width, height = (float(part) for part in ElementTree.fromstring(svg).get("viewBox", "").split())
    for x, y, w, h in places.values():
        assert left <= x
        assert x + w <= left + width
        assert top <= y
        assert y + h <= top + height


def test_values_go_down_and_dashed_up() -> None:
    kinds = ("classical", "loop", "quantum", "failed")
    boxes = tuple(Box(name, kind, name, ("words",), 1) for name, kind in zip("abcd", kinds, strict=True))
    lines = (Line("a", "b", "", 1), Line("b", "c", "", 1), Line("a", "c", "part", 3), Line("c", "b", "", 1),
             Line("b", "b", "", 2))  # fmt: skip
    svg = drawn(Graph("g", boxes, lines))
    places = boxes_of(svg)
    assert places["a"][1] < places["b"][1] < places["c"][1]
    assert svg.count("stroke-dasharray") == 2
    assert svg.count("marker-end") == 5
    assert ">part × 3</text>" in svg


def test_names_in_the_picture_are_text() -> None:
    name = "<script>alert(1)</script>&\"'"
    svg = drawn(Graph(name, (Box(name, "loop", name, (name,), 1), Box(VALUE, "run", "v", ("",), 1)),
                      (Line(name, VALUE, name, 1),)))  # fmt: skip
    tree = ElementTree.fromstring(svg)
    assert not any(element.tag.endswith("script") for element in tree.iter())
    assert sum((element.text or "") == name for element in tree.iter()) == 5  # titles, box, words, label


@hq.workflow
def nothing(numbers: list[float]) -> list[float]:
    return numbers


def test_a_run_without_calls_has_a_graph_too(tmp_path: Path) -> None:
    report(nothing, [0.123456789, 2.0], name="nothing", store=tmp_path)
    found = graph(tmp_path / "nothing")
    assert [box.place for box in found.boxes] == [ARGUMENTS, VALUE]
    assert [(line.source, line.target) for line in found.lines] == [(ARGUMENTS, VALUE)]
    assert len(boxes_of(drawn(found))) == 2
    assert ElementTree.fromstring(drawn(Graph("empty", (), ()))) is not None
    with pytest.raises(JournalError, match="no run"):
        graph(tmp_path / "other")
