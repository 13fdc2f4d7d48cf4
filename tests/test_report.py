"""The report's page: its numbers are the journal's, and nothing that somebody named is markup."""

from __future__ import annotations

import contextlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from runs import journal, report

import hybridq as hq
from hybridq.errors import WorkflowError
from hybridq.report import report as write

HOSTILE = "<img src=x onerror=alert(1)> & \"'"


@hq.quantum
def energy(theta: Any, p: Any) -> Any:
    return hq.expval(p.ansatz, p.hamiltonian, theta)


@hq.classical
def problem(sites: int) -> hq.Problem:
    return hq.lattice("ising", sites, boundary="ring")


@hq.classical
def broken(sites: int) -> None:
    raise ValueError(HOSTILE)


@hq.workflow
def ring(sites: int) -> float:
    p = problem(sites)
    return float(hq.minimize(energy, p.start, args=(p,), method="COBYLA", options={"maxiter": 15}).fun)


@hq.workflow
def rings(sizes: list[int]) -> list[float]:
    with contextlib.suppress(ValueError):
        broken(1)
    return hq.map(ring, sizes)


class Page(HTMLParser):
    """A page's tables as text, and its tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._cell = tag in ("td", "th") or (self._cell and tag not in ("table", "tr"))

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> list[dict[str, str]]:
        """The rows of the table whose first head is this, by head."""
        (found,) = (rows for rows in self.tables if rows[0][0] == first)
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three loops with a failure that the workflow went on after, and its report."""
    store = tmp_path_factory.mktemp("store")
    report(rings, [6, 4, 5], name="rings", store=store, seed=11)
    write(hq.load("rings", store), store / "out")
    return store


def test_the_tables_are_the_journal(made: Path) -> None:
    page, lines = Page(made / "out" / "report.html"), journal(made / "rings")
    table = page.table("loop")
    assert [row["sites of problem()"] for row in table] == ["4", "5", "6"]
    for row, sites in zip(table, (4, 5, 6), strict=True):
        (header,) = (
            n for n, line in enumerate(lines, 1) if line["k"] == "loop" and line["at"] == f"rings/{row['loop']}"
        )
        values = [line["value"] for line in lines if line["k"] == "row" and line["loop"] == header]
        reference = hq.lattice("ising", sites, boundary="ring").reference
        assert reference is not None
        assert float(row["best (J)"]) == pytest.approx(min(values), abs=1e-9)
        assert float(row["reference (J)"]) == pytest.approx(reference, abs=1e-9)
        assert float(row["best − reference (J)"]) == pytest.approx(min(values) - reference, rel=0.06, abs=1e-4)
        assert (row["evaluations"], row["method"], row["state"]) == (str(len(values)), "COBYLA", "finished")
        assert row["standard error (J)"] == "exact"
    calls = {row["place"]: row["calls"] for row in page.table("place")}
    assert calls == {"ring/problem": "3", "ring/energy": str(sum(line["k"] == "row" for line in lines))}
    programs = page.table("program")
    assert {row["program"] for row in programs} == {line["program"][:12] for line in lines if line["k"] == "circuit"}
    (fault,) = page.table("line")
    assert (fault["call"], fault["raised"], fault["message"]) == ("rings/broken[0]", "ValueError", HOSTILE)
    assert fault["what became of it"] == "the workflow went on without it"
    assert lines[int(fault["line"]) - 1]["k"] == "failure"


def test_the_page_stands_alone_and_runs_nothing(made: Path) -> None:
    page = Page(made / "out" / "report.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
    assert sum(tag == "img" for tag, _ in page.tags) == 5
    assert not re.search(r"url\(|@import", (made / "out" / "report.html").read_text())


def test_the_page_says_how_to_make_it_again(made: Path) -> None:
    text = (made / "out" / "report.html").read_text()
    assert f"hybridq rerun rings --check --store {made}" in text
    assert "--name rings --seed 11" in text
    assert "closed form" in text  # the source of the references


def test_figures_lie_beside_the_page(made: Path, tmp_path: Path) -> None:
    names = {path.name for path in (made / "out").iterdir()}
    drawn = {"curve", "convergence", "error", "timeline", "predictions"}
    assert names == {"report.html"} | {f"{name}.{form}" for name in drawn for form in ("svg", "png")}
    found = write(hq.load("rings", made), tmp_path, ["pdf"])
    assert all(path.read_bytes().startswith(b"%PDF") for path in found.figures)
    with pytest.raises(WorkflowError, match="gif"):
        write(hq.load("rings", made), tmp_path, ["gif"])
    (tmp_path / "file").touch()
    with pytest.raises(WorkflowError, match="--out"):
        write(hq.load("rings", made), tmp_path / "file")


@hq.workflow
def nothing() -> int:
    return 3


def test_a_run_without_anything_has_a_report_too(tmp_path: Path) -> None:
    report(nothing, name="nothing", store=tmp_path)
    found = write(hq.load("nothing", tmp_path), tmp_path / "out")
    assert found.figures == ()
    assert "<h1>nothing</h1>" in found.page.read_text()
