"""Runs as HTML tables: every name escaped, every number to the digits that mean something."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from hybridq.monitor.store import Group, Loop, Note, Run

__all__ = ["ACCURACY", "COLOURS", "CSS", "notes_table", "page", "runs_table", "tiles"]

ACCURACY = 1.6e-3
"""Chemical accuracy, 1 kcal/mol, in hartree."""
COLOURS = {
    "quantum": "#0072B2", "classical": "#E69F00", "running": "#0072B2", "finished": "#00795A", "failed": "#B84300",
    "interrupted": "#8A5A00", "silent": "#666666", "refused": "#B84300", "retried": "#8A5A00",
}  # fmt: skip
"""Of Okabe and Ito, which colour-blind readers can tell apart; those of words are darkened to be read on white."""
_EACH = 16
"""A group of so many loops or fewer shows each of them; of a larger one, so many that run."""
_RUNS = 12

CSS = """
.bk-clearfix { width: 100%; }
.hq { font: 14px/1.45 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #1f2933; }
.hq table { border-collapse: collapse; width: 100%; background: #fff; border: 1px solid #dde3ea; border-radius: 6px; }
.hq th { text-align: right; font-weight: 600; font-size: 12px; color: #52606d; padding: 7px 12px;
  border-bottom: 2px solid #dde3ea; white-space: nowrap; }
.hq td { text-align: right; padding: 4px 12px; border-top: 1px solid #eef1f5; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.hq th:first-child, .hq td:first-child, .hq th:nth-child(2), .hq td:nth-child(2), .hq .left { text-align: left; }
.hq td:first-child { max-width: 460px; overflow: hidden; text-overflow: ellipsis; }
.hq tr.run td { background: #f5f7fa; font-weight: 600; border-top: 1px solid #cbd2d9; }
.hq tr.group td:first-child { padding-left: 26px; }
.hq tr.loop td { color: #3e4c59; font-size: 13px; }
.hq tr.loop td:first-child, .hq tr.more td:first-child { padding-left: 46px; }
.hq tr.more td { color: #616e7c; font-size: 13px; font-style: italic; }
.hq .faint { color: #616e7c; font-weight: 400; }
.hq .state { display: inline-block; min-width: 74px; font-weight: 600; }
.hq .state::before { content: ""; display: inline-block; width: 8px; height: 8px; border-radius: 50%;
  background: currentColor; margin-right: 6px; }
.hq td.reason { white-space: normal; text-align: left; max-width: 640px; overflow-wrap: anywhere; }
.hq .tiles { display: flex; flex-wrap: wrap; gap: 10px; }
.hq .tile { background: #fff; border: 1px solid #dde3ea; border-radius: 6px; padding: 8px 16px; min-width: 110px; }
.hq .tile b { display: block; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.hq .tile span { font-size: 12px; color: #52606d; }
.hq .scroll { overflow: auto; max-height: 560px; }
.hq h2 { font-size: 14px; font-weight: 600; margin: 0 0 6px; }
.hq .empty { background: #fff; border: 1px solid #dde3ea; border-radius: 6px; padding: 22px; color: #52606d; }
"""


def tiles(runs: Sequence[Run]) -> str:
    """The numbers of all runs together."""
    live = [run for run in runs if run.state == "running"]
    loops = sum(group.running for run in live for group in run.groups)
    slots, busy = sum(d.slots for run in live for d in run.devices), sum(d.busy for run in live for d in run.devices)
    shown = {
        "runs in progress": _count(len(live)),
        "loops in progress": _count(loops),
        "evaluations": _count(sum(run.totals.evaluations for run in runs)),
        "evaluations/s": _rate(sum(run.rate for run in live)),
        "slots at work": f"{busy} of {slots}" if slots else "–",
        "calls waiting": _count(sum(run.queue.waiting for run in live)),
        "retries": _count(sum(run.totals.retries for run in runs)),
    }
    inner = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in shown.items())
    return f'<div class="hq"><div class="tiles">{inner}</div></div>'


def runs_table(runs: Sequence[Run], names: Mapping[str, str]) -> str:
    """Runs, their groups of loops, and of small groups each loop; ``names`` are shown for devices' addresses."""
    if not runs:
        return (
            '<div class="hq"><div class="empty">No run has been told of yet. A run that uses this cluster shows here '
            "as soon as its first call is placed.</div></div>"
        )
    heads = ("Run, loops", "State", "Iteration", "Best value", "Best − reference", "Std. error", "Evaluations/s", "ETA",
             "Device")  # fmt: skip
    rows = [row for run in runs[:_RUNS] for row in _rows_of(run, names)]
    if len(runs) > _RUNS:
        rows.append(_more(f"{len(runs) - _RUNS} earlier runs are in hybridq.json"))
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        '<div class="hq"><div class="scroll"><table id="hybridq-runs"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def notes_table(runs: Sequence[Run]) -> str:
    """What was refused, retried and failed, the latest first, with the reasons."""
    found = sorted(((note, run) for run in runs for note in run.notes), key=lambda pair: -pair[0].time)
    if not found:
        return '<div class="hq"><div class="empty">Nothing was refused or retried, and nothing failed.</div></div>'

    def row(note: Note, run: Run) -> str:
        when = time.strftime("%H:%M:%S", time.localtime(note.time)) if math.isfinite(note.time) else ""
        return (
            f'<tr><td class="left">{when}</td><td class="left">{_state(note.what)}</td>'
            f'<td class="left">{_escape(run.name)}/{_escape(note.at)}</td><td class="reason">{_escape(note.reason)}'
            "</td></tr>"
        )

    rows = "".join(row(note, run) for note, run in found[:40])
    return (
        '<div class="hq"><div class="scroll"><table><thead><tr><th class="left">Time</th><th class="left">What</th>'
        f'<th class="left">Call</th><th class="left">Reason</th></tr></thead><tbody>{rows}</tbody></table></div></div>'
    )


def page(runs: Sequence[Run], names: Mapping[str, str], why: str) -> str:
    """A page without figures, for where bokeh is not to be had; it loads itself again every two seconds."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>hybridq</title>'
        f'<meta http-equiv="refresh" content="2"><style>{CSS} body {{ margin: 20px; background: #fafafa; }}</style>'
        f'</head><body>{tiles(runs)}<p></p>{runs_table(runs, names)}<p></p>{notes_table(runs)}<p class="hq faint">'
        f"Figures are left out: {_escape(why)}. The same numbers are in hybridq.json.</p></body></html>"
    )


def _rows_of(run: Run, names: Mapping[str, str]) -> Iterable[str]:
    totals = run.totals
    where = f"{len(run.devices)} devices" if len(run.devices) > 1 else "".join(_device(d.name, names)
                                                                               for d in run.devices)  # fmt: skip
    detail = f"{_escape(run.workflow)} · {_escape(run.driver)}" + (f" · {_escape(run.error)}" if run.error else "")
    live = run.state == "running"
    eta = max((group.eta for group in run.groups if group.eta is not None), default=None)
    yield _row("run", (
        f'{_escape(run.name)} <span class="faint">{detail}</span>', _state(run.state), _count(totals.evaluations),
        "", "", "", _rate(run.rate) if live else "", _duration(eta) if live else "", where,
    ))  # fmt: skip
    loops: dict[str, list[Loop]] = {}
    for loop in run.loops:
        loops.setdefault(loop.group, []).append(loop)
    for group in run.groups:
        members = loops.get(group.name, [])
        if group.loops == 1 and members:
            yield _row("group", _loop_cells(members[0], group, names))
            continue
        yield _row("group", _group_cells(group, names))
        shown = members if len(members) <= _EACH else [loop for loop in members if loop.state == "running"][:_EACH]
        for loop in shown:
            yield _row("loop", _loop_cells(loop, None, names))
        if group.loops > len(shown):
            yield _more(f"{_count(group.loops - len(shown))} more loops are in the sums")


def _group_cells(group: Group, names: Mapping[str, str]) -> tuple[str, ...]:
    parts = [(group.running, "running"), (group.finished, "finished"), (group.failed, "failed")]
    counts = ", ".join(f"{_count(count)} {word}" for count, word in parts if count)
    others = group.loops - group.running - group.finished - group.failed
    state = "running" if group.running else "failed" if group.failed else "interrupted" if others else "finished"
    devices = ", ".join(_device(name, names) for name in group.devices[:3])
    more = f" +{len(group.devices) - 3}" if len(group.devices) > 3 else ""
    error = "" if group.error is None else f'<span class="faint">worst</span> {_error(group.error, group.unit)}'
    return (
        f'{_escape(group.name)} <span class="faint">{_count(group.loops)} loops: {counts}</span>', _state(state),
        _count(group.rows), "" if group.error is not None else _value(group.best, group.unit), error, "",
        _rate(group.rate) if group.running else "", _eta(group), devices + more,
    )  # fmt: skip


def _loop_cells(loop: Loop, group: Group | None, names: Mapping[str, str]) -> tuple[str, ...]:
    rate, eta = ("", "") if group is None or not group.running else (_rate(group.rate), _eta(group))
    return (
        f'{_escape(loop.at)} <span class="faint">{_escape(loop.method)}</span>', _state(loop.state), _count(loop.rows),
        _value(loop.best, loop.unit), _error(loop.error, loop.unit), _stderr(loop), rate, eta,
        _device(loop.where, names),
    )  # fmt: skip


def _row(kind: str, cells: Sequence[str]) -> str:
    return f'<tr class="{kind}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _more(text: str) -> str:
    return f'<tr class="more"><td colspan="9">{text}</td></tr>'


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _state(word: str) -> str:
    return f'<span class="state" style="color:{COLOURS[word]}">{word}</span>'


def _device(name: str, names: Mapping[str, str]) -> str:
    return _escape(names.get(name, name))


def _count(number: int) -> str:
    return f"{number:,}"


def _rate(number: float) -> str:
    return "0" if number < 0.05 else f"{number:.1f}" if number < 99.95 else f"{number:,.0f}"


def _or_dash(show: Callable[[float], str], number: float | None) -> str:
    return "–" if number is None or not math.isfinite(number) else show(number).replace("-", "−")


def _value(number: float | None, unit: str) -> str:
    shown = f' <span class="faint">{_escape(unit)}</span>' if unit and number is not None else ""
    return _or_dash(lambda n: f"{n:.8f}", number) + shown


def _error(number: float | None, unit: str) -> str:
    shown = _or_dash(lambda n: f"{n:+.1e}", number)
    if number is None or unit != "hartree" or abs(number) > ACCURACY:
        return shown
    return f'{shown} <span title="within chemical accuracy" style="color:{COLOURS["finished"]}">✓</span>'


def _stderr(loop: Loop) -> str:
    if not loop.rows:
        return "–"
    return '<span class="faint">exact</span>' if loop.stderr == 0.0 else _or_dash(lambda n: f"{n:.1e}", loop.stderr)


def _eta(group: Group) -> str:
    if not group.running:
        return ""
    return f"≤ {_duration(group.latest)}" if group.latest is not None else _duration(group.eta)


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:,.1f} h"
