"""The report of a run: one HTML file that needs nothing else, and the figures beside it.

Every number is the journal's; everything that somebody else named is escaped.
"""

from __future__ import annotations

import base64
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from hybridq import figures
from hybridq.errors import WorkflowError
from hybridq.following import RecordedRun
from hybridq.history import LoopHistory, RunHistory, Session
from hybridq.resources import format_bytes

__all__ = ["FORMATS", "Report", "report"]

FORMATS = ("svg", "png", "pdf")
_MOST_ROWS = 1000
"""Rows of a table; a report of more says so."""
_MOST_CURVES = 6
_MOST_SOURCES = 12
_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; color: #1a1a1a;
  background: #fff; margin: 0 auto; max-width: 60rem; padding: 1.5rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.lead { color: #555; margin: 0 0 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: 0; }
dt { color: #555; } dd { margin: 0; min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; width: 100%; }
th { text-align: left; border-bottom: 1.5px solid #1a1a1a; font-weight: 600; vertical-align: bottom; }
th, td { padding: .22rem .9rem .22rem 0; } td { white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th.n, td.n { text-align: right; } td.text { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
figure { margin: 1rem 0; break-inside: avoid; } figure img { width: 100%; max-width: 46rem; height: auto; }
figcaption { color: #555; font-size: .84rem; max-width: 46rem; }
code, pre { font: .84rem ui-monospace, "DejaVu Sans Mono", "Liberation Mono", monospace; }
pre { background: #f5f5f5; padding: .7rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } h2 { break-after: avoid; }
  .wide { overflow: visible; } table { font-size: 7.5pt; } }
"""


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True)
class _Picture:
    name: str
    caption: str
    figure: Figure


def report(run: RecordedRun, out: Path, formats: Sequence[str] = ("svg", "png"), label: str | None = None) -> Report:
    """Write the report of ``run`` as it is recorded by now: ``out/report.html``, and its figures in ``formats``.

    ``out`` is created if it is missing; files of an earlier report are replaced. ``label`` is what people call the
    number that tells the loops apart, with its unit ("bond length (Å)"); default: the argument's name. Raises
    `WorkflowError` for an unknown format or if it cannot be written.
    """
    if unknown := [form for form in formats if form not in FORMATS]:
        raise WorkflowError(f"{unknown[0]!r} is no format of figures; give one of {', '.join(FORMATS)}.")
    history = run.history
    families = figures.families(history, label)
    pictures = list(_pictures(history, families))
    files = {"report.html": _page(history, run, families, pictures).encode("utf-8", "backslashreplace")}
    for picture in pictures:
        for form in formats:
            files[f"{picture.name}.{form}"] = figures.rendered(picture.figure, form)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (out / name).write_bytes(data)
    except OSError as error:
        raise WorkflowError(
            f"{out} cannot be written ({error.strerror}); give another directory with --out."
        ) from error
    return Report(out / "report.html", tuple(out / name for name in files if name != "report.html"))


# -- figures -----------------------------------------------------------------------------------------------------------


def _pictures(history: RunHistory, families: Sequence[figures.Family]) -> Iterator[_Picture]:
    """The figures that this run has something to show in."""

    def one(name: str, caption: str, draw: Callable[[Figure], None], height: float = 3.6) -> _Picture:
        return _Picture(name, caption, figures.drawn(draw, height))

    several = [f for f in families if len(f.loops) > 1 and any(loop.best is not None for loop in f.loops)]
    for number, family in enumerate(several[:_MOST_CURVES]):
        yield one(
            "curve" if number == 0 else f"curve-{number + 1}",
            f"Best values of {family.group}, and their differences to the references.",
            lambda figure, family=family: figures.curve_with_errors(figure, history, family), 4.6,  # type: ignore[misc]
        )  # fmt: skip
    if any(loop.curve for loop in history.loops):
        yield one("convergence", "Convergence: the best value so far of each loop.",
                  lambda figure: figures.convergence(figure.subplots(), history, families))  # fmt: skip
    if any(loop.error is not None for loop in history.loops):
        yield one("error", "Distance of the best value so far from the reference; what is below 1e-16 is drawn there.",
                  lambda figure: figures.error(figure.subplots(), history, families))  # fmt: skip
    if history.spans:
        lanes = len({span.where for span in history.spans})
        untimed = f" {history.untimed} evaluations are recorded without a time." if history.untimed else ""
        yield one("timeline", f"What ran where, and when.{untimed}",
                  lambda figure: figures.timeline(figure.subplots(), history), min(9, 1.3 + 0.42 * lanes))  # fmt: skip
    if any((p.predicted_seconds and p.seconds > 0) or (p.predicted_bytes and p.bytes) for p in history.programs):
        yield one("predictions", "Predicted beside measured, one point for each program.",
                  lambda figure: figures.predictions(figure, history), 3.2)  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------------


def _page(history: RunHistory, run: RecordedRun, families: Sequence[figures.Family], pictures: Sequence[_Picture]
          ) -> str:  # fmt: skip
    shown = {picture.name: _shown(picture) for picture in pictures}
    curves = [html for name, html in shown.items() if name.startswith("curve")]
    sections = [
        ("", _facts(history, run)),
        ("Loops", _loops(history, families)),
        ("Curves", "".join(curves)),
        ("Convergence", shown.get("convergence", "") + shown.get("error", "")),
        ("Time line", shown.get("timeline", "")),
        ("Calls", _calls(history)),
        ("Predicted and measured", _programs(history) + shown.get("predictions", "")),
        ("Faults", _faults(history)),
        ("Versions", _sessions(history)),
        ("Make it again", _again(history, run)),
    ]
    body = "".join(
        f"<section>{f'<h2>{title}</h2>' if title else ''}{content}</section>\n"
        for title, content in sections
        if content
    )
    title = escape(history.name or run.directory.name)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f'<p class="lead">A run of the workflow {escape(history.workflow)}, recorded by hybridq.</p>\n{body}</body>\n'
        "</html>\n"
    )


def _shown(picture: _Picture) -> str:
    data = base64.b64encode(figures.rendered(picture.figure, "svg")).decode()
    caption = escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{data}"><figcaption>{caption}</figcaption>'
        "</figure>"
    )


def _facts(history: RunHistory, run: RecordedRun) -> str:
    began = min((session.began for session in history.sessions), default=None)
    seconds = sum(session.seconds or 0.0 for session in history.sessions)
    known = "at least " if any(session.seconds is None for session in history.sessions) else ""
    done = sum(loop.state == "finished" for loop in history.loops)
    errors = [abs(loop.error) for loop in history.loops if loop.error is not None]
    rows = [
        ("state", run.left or "running"),
        ("error", history.error or ""),
        ("began", "" if began is None else _when(began)),
        ("took", f"{known}{_time(seconds)} in {len(history.sessions)} session{'s'[: len(history.sessions) != 1]}"),
        ("seed", str(history.seed)),
        ("loops", f"{done:,} of {len(history.loops):,} finished" if history.loops else ""),
        ("evaluations", f"{history.evaluations:,}" + (f" with {history.shots:,} shots" if history.shots else "")),
        ("classical steps", f"{history.steps:,}"),
        ("largest distance from a reference", _error_text(max(errors), history.unit) if errors else ""),
        ("answered by other runs", ", ".join(f"{name}: {count:,}" for name, count in history.reused.items())),
        ("record", f"{history.lines:,} lines in {run.directory}"),
    ]
    return f"<dl>{''.join(f'<dt>{key}</dt><dd>{escape(text)}</dd>' for key, text in rows if text)}</dl>"


def _loops(history: RunHistory, families: Sequence[figures.Family]) -> str:
    if not history.loops:
        return ""
    units = {loop.reference.unit for loop in history.loops if loop.reference is not None}
    milli = units == {"hartree"}
    of_value = f" ({escape(history.unit)})" if history.unit else ""
    of_error = " (mhartree)" if milli else of_value
    several = [family for family in families if len(family.loops) > 1]
    told = escape(several[0].label) if len(several) == 1 else "told apart by"
    head = ["loop", f"#{told}", "method", "state", "#evaluations", f"#best{of_value}", f"#standard error{of_value}",
            f"#reference{of_value}", f"#best − reference{of_error}"]  # fmt: skip
    placed = [(family, loop, x) for family in families for loop, x in zip(family.loops, family.numbers, strict=True)]
    rows = []
    for family, loop, x in placed[:_MOST_ROWS]:
        reference, error = loop.reference, loop.error
        number = "" if family not in several else f"{x:g}" if len(several) == 1 else f"{family.label}: {x:g}"
        rows.append([
            loop.at.partition("/")[2] or loop.at, number, _method(loop), loop.state, f"{loop.rows:,}",
            _value(loop.best), _value(loop.best_stderr) if loop.best_stderr else "exact" if loop.rows else "",
            "" if reference is None else _value(reference.value) + ("" if history.unit else f" {reference.unit}"),
            "" if error is None else _small(error * 1e3 if milli else error),
        ])  # fmt: skip
    sources: dict[str, dict[str, None]] = {}
    for _, loop, _ in placed:
        if loop.reference is not None:
            sources.setdefault(loop.reference.source, {})[loop.reference.problem] = None
    listed = "; ".join(f"{source} ({_some(list(names))})" for source, names in list(sources.items())[:_MOST_SOURCES])
    words = f"<p>Source of the references: {escape(listed)}.</p>" if sources else ""
    if any(loop.best_stderr for loop in history.loops):
        words += "<p>The lowest of several sampled values lies below the true value on average.</p>"
    return _table(head, rows) + _left_out(len(placed)) + words


def _calls(history: RunHistory) -> str:
    rows = [[call.group, call.kind, f"{call.done:,}", _time(call.seconds)] for call in history.calls]
    looped: dict[str, list[float]] = {}
    for loop in history.loops:
        counts = looped.setdefault(loop.group, [0, 0.0])
        counts[0] += loop.rows
        counts[1] += loop.seconds
    rows += [[group, "loops", f"{int(count):,}", _time(seconds)] for group, (count, seconds) in looped.items()]
    return (
        _table(["place", "kind", "#calls", "#time, summed"], rows[:_MOST_ROWS]) + _left_out(len(rows)) if rows else ""
    )


def _programs(history: RunHistory) -> str:
    head = ["program", "#qubits", "#gates", "#Paulis", "#shots", "#evaluations",
            "#time of a row predicted (s)", "#time of a row measured (s)",
            "#memory predicted", "#memory measured"]  # fmt: skip
    rows = [
        [p.program[:12] + (" with gradient" if p.gradient else ""), f"{p.qubits}", f"{p.gates:,}", f"{p.paulis:,}",
         "exact" if p.shots is None else f"{p.shots:,}", f"{p.evaluations:,}",
         "" if p.predicted_seconds is None else f"{p.predicted_seconds:.2g}", f"{p.seconds:.2g}",
         "" if p.predicted_bytes is None else format_bytes(p.predicted_bytes),
         "not measured" if p.bytes is None else format_bytes(p.bytes)]
        for p in history.programs[:_MOST_ROWS]
    ]  # fmt: skip
    if not rows:
        return ""
    return (
        _table(head, rows)
        + _left_out(len(history.programs))
        + ("<p>The measured time is the median of a program's rows; the measured memory its largest.</p>")
    )


def _faults(history: RunHistory) -> str:
    if not history.faults and len(history.sessions) < 2 and not history.retries:
        return "<p>None: nothing raised, and one driver did it all.</p>"
    words = []
    if len(history.sessions) > 1:
        words.append(f"{len(history.sessions)} drivers had the run open: it was taken up again "
                     f"{len(history.sessions) - 1} times.")  # fmt: skip
    if history.retries:
        words.append(f"{history.retries:,} attempts were made again.")
    rows = [
        [str(f.line), f.at, f.type.partition(":")[2], f.message, f.where, str(f.attempt + 1),
         "tried again, and it went well" if f.repaired else "the workflow went on without it" if f.survived
         else "not mended"]
        for f in history.faults[:_MOST_ROWS]
    ]  # fmt: skip
    head = ["#line", "call", "raised", "~message", "where", "#attempt", "~what became of it"]
    return f"<p>{' '.join(words)}</p>" + (_table(head, rows) + _left_out(len(history.faults)) if rows else "")


def _sessions(history: RunHistory) -> str:
    head = ["began", "host", "#process", "left", "#time", "~Python, processor, versions"]
    rows = [
        [_when(s.began), s.host, str(s.pid), s.status or "without a word",
         "" if s.seconds is None else _time(s.seconds),
         f"Python {s.python}, {s.processor}; " + ", ".join(f"{name} {v}" for name, v in s.versions.items())]
        for s in history.sessions[-_MOST_ROWS:]
    ]  # fmt: skip
    return _table(head, rows) if rows else ""


def _again(history: RunHistory, run: RecordedRun) -> str:
    last = history.sessions[-1] if history.sessions else None
    store = str(run.directory.parent)
    check = shlex.join(["hybridq", "rerun", history.name, "--check", "--store", store])
    if last is None or not last.command or not last.command[0]:
        return "<p>The run was made without a script, so there is no command that makes it again.</p>"
    return (
        "<p>Where there is no record of it yet, this makes the run:</p>"
        f"<pre>{escape(_command(history, last))}</pre>"
        "<p>This makes it once more, and compares every output with the record:</p>"
        f"<pre>{escape(check)}</pre>"
    )


def _command(history: RunHistory, last: Session) -> str:
    script, *arguments = last.command
    parts = ["hybridq", "run", script, "--name", history.name, "--seed", str(history.seed)]
    return shlex.join(parts + (["--", *arguments] if arguments else []))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns whose head begins with "#" are numbers, with "~" running text; heads are ours, cells are escaped."""
    kinds = [' class="n"' if name[:1] == "#" else ' class="text"' if name[:1] == "~" else "" for name in head]
    heads = "".join(f"<th{kind}>{name.lstrip('#~')}</th>" for name, kind in zip(head, kinds, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def _left_out(count: int) -> str:
    more = count - _MOST_ROWS
    return f"<p>{more:,} more rows are in the record and not shown here.</p>" if more > 0 else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_SOURCES]) + (", and others" if len(names) > _MOST_SOURCES else "")


def _method(loop: LoopHistory) -> str:
    return loop.method if loop.gradient == "none" else f"{loop.method}, {loop.gradient}"


def _value(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.9f}" if 1e-3 <= abs(number) < 1e4 else f"{number:.9g}"


def _small(number: float) -> str:
    return f"{number:.4f}" if 0.01 <= abs(number) < 1e4 else f"{number:.1e}"


def _error_text(error: float, unit: str) -> str:
    return f"{_small(error * 1e3)} mhartree" if unit == "hartree" else f"{_small(error)} {unit}"


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(moment))


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
