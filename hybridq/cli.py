"""The command line: ``hybridq run | plan | watch | runs | show | report | graph | verify | rerun | why | devices``."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import click
import numpy as np

from hybridq import journal as records
from hybridq.audit import Verified
from hybridq.audit import verify as verified
from hybridq.comparison import GRADES, Comparison, begin_again, compare, finished
from hybridq.errors import HybridqError, WorkflowError
from hybridq.history import History
from hybridq.journal import load_value, read_records, run_directory, run_names
from hybridq.resources import format_bytes
from hybridq.values import decode
from hybridq.why import why as origin

_INTERRUPTED = 130  # as shells report a process that SIGINT ended

store_option = click.option(
    "--store", default="runs", show_default=True, metavar="DIR", help="Directory that holds the runs."
)


unencrypted_option = click.option("--allow-unencrypted", is_flag=True, help="Use a cluster on other hosts without TLS.")


@click.group()
@click.version_option(package_name="hybridq-scheduler")
def main() -> None:
    """Schedule workflows that mix quantum circuits with classical computing."""


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """What ``run`` and ``plan`` take alike."""
    for option in reversed((
        click.argument("script", type=click.Path(exists=True, dir_okay=False)),
        click.argument("script_args", nargs=-1, type=click.UNPROCESSED),
        click.option("--name", help="Name of the run; default: the workflow's name and a digest of arguments, seed and "
                     "code."),
        click.option("--store", metavar="DIR", help="Directory that holds the runs.  [default: the script's, or runs]"),
        click.option("--seed", type=int, help="Seed of all randomness."),
        click.option("--workers", type=click.IntRange(min=1), help="Worker processes of a cluster on this machine."),
        click.option("--cluster", metavar="ADDRESS", help="A Dask scheduler to use, such as tcp://host:8786."),
        click.option("--backend", metavar="NAME", help="What evaluates circuits: aer, one of its methods "
                     "(density_matrix, stabilizer, matrix_product_state), adjoint, module:function for a Qiskit "
                     "backend, or a device of the site."),
        click.option("--site", metavar="FILE", help="TOML file with the cluster and the devices to use."),
        click.option("--take-over", is_flag=True, help="Take the run from a driver on another host that is known to be "
                     "gone."),
        unencrypted_option,
        click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Leave the run "
                     "after so long."),
        click.option("--monitor/--no-monitor", default=True, help="Whether the run is shown in the Dask dashboard."),
        click.option("--fork", metavar="NAME", help="Branch off the run NAME, which answers what has not "
                     "changed."),
        click.option("--reuse", metavar="NAME", multiple=True, help="A run whose exact evaluations may answer equal "
                     "ones; can be given several times."),
        click.option("--json", "as_json", is_flag=True, help="Put one JSON document on stdout, everything else on "
                     "stderr."),
    )):  # fmt: skip
        command = option(command)
    return command


@main.command(context_settings={"ignore_unknown_options": False})
@_run_options
def run(script: str, script_args: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Run SCRIPT, or finish it: the same command resumes a run that was interrupted.

    Arguments after -- are the script's own.
    """
    from hybridq.language import Overrides, overrides

    asked = Overrides(**options)
    overrides.set(asked)
    with _stdout_for(as_json) as stdout:
        left = _run_script(script, script_args)
        if as_json:
            if not asked.reports:
                raise click.ClickException(f"{script} finished without calling hq.run, so there is nothing to report.")
            documents = [_report(r) for r in asked.reports]
            print(json.dumps(documents[0] if len(documents) == 1 else documents, allow_nan=False), file=stdout)
        if left is not None:
            raise left


@main.command(context_settings={"ignore_unknown_options": False})
@_run_options
def plan(script: str, script_args: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Say what SCRIPT would evaluate: circuits, shots, memory and time, before any of it is spent.

    What is recorded is answered, classical steps run and are recorded, and what is quantum is priced. The script ends
    where it needs a value that is not known yet. Exits with 1 if something fits no device. Arguments after -- are the
    script's own.
    """
    from hybridq.language import Overrides, overrides
    from hybridq.planning import Unplanned, table

    asked = Overrides(plan=True, **options)
    overrides.set(asked)
    with _stdout_for(True) as stdout:  # whatever the script prints is no part of the plan
        left: BaseException | None = None
        try:
            left = _run_script(script, script_args)
        except Unplanned:
            pass  # the plan says what was needed
        except SystemExit as error:
            left = error
        if left is None and not asked.plans:
            raise click.ClickException(f"{script} finished without calling hq.run, so there is nothing to plan.")
        if as_json and asked.plans:
            print(json.dumps(asked.plans[0] if len(asked.plans) == 1 else asked.plans, allow_nan=False), file=stdout)
        for document in () if as_json else asked.plans:
            print(f"plan of {document['name']}, recorded in {document['directory']}\n\n{table(document)}", file=stdout)
        stdout.flush()
        if left is not None:
            raise left
        if any(document["refusals"] for document in asked.plans):
            sys.exit(1)


def _run_script(script: str, script_args: tuple[str, ...]) -> SystemExit | None:
    """Run ``script`` as Python does; the exit that it ended with, if that was without an error."""
    sys.argv[:] = [script, *script_args]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
        return error
    except Exception as error:  # noqa: BLE001  # the script's own; shown from its first line on
        _print_error(error)
        sys.exit(1)
    return None


def _report(report: Any) -> dict[str, Any]:
    fields = asdict(report) | {"value": None}
    return {**fields, "value": _jsonable(report.value)}


@contextmanager
def _stdout_for(as_json: bool) -> Iterator[TextIO]:
    """The real stdout; with ``as_json``, whatever else this process and its children print goes to stderr."""
    if not as_json:
        yield sys.stdout
        return
    with os.fdopen(os.dup(1), "w") as stdout:
        sys.stdout.flush()
        os.dup2(2, 1)
        yield stdout


def _print_error(error: BaseException) -> None:
    """The traceback from the researcher's own first line on."""
    tb: TracebackType | None = error.__traceback__
    package = f"{Path(__file__).parent}{os.sep}"
    while tb is not None and (
        tb.tb_frame.f_code.co_filename.startswith(package) or tb.tb_frame.f_code.co_filename == "<frozen runpy>"
    ):
        tb = tb.tb_next
    traceback.print_exception(type(error), error, tb or error.__traceback__)


def _jsonable(value: Any) -> Any:
    """``value`` as JSON: arrays become lists, dataclasses and results objects; anything else is refused by name.

    JSON has no NaN and no infinities; they become the strings that Python's own `float` reads.
    """
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _jsonable(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return {k: _jsonable(v) for k, v in vars(value).items()}
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise click.ClickException(
        f"the workflow returned a {type(value).__qualname__}, which has no JSON form; return numbers, strings, lists "
        "and dicts, or run without --json. The run itself is finished and recorded."
    )


@main.command()
@store_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def runs(store: str, as_json: bool) -> None:
    """List the runs of a store, oldest first."""
    found = []
    for name in run_names(Path(store)):
        try:
            found.append(_summary(run_directory(Path(store), name)))
        except HybridqError as error:
            found.append({"name": name, "status": "damaged", "error": str(error)})
    if as_json:
        click.echo(json.dumps(found))
        return
    if not found:
        click.echo(f"no runs in {store}")
    for entry in found:
        counts = f"{entry['evaluations']} evaluations, {entry['steps']} steps" if "steps" in entry else entry["error"]
        click.echo(f"{entry['name']:<40} {entry['status']:<12} {counts}")


@main.command()
@click.argument("name")
@store_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show(name: str, store: str, as_json: bool) -> None:
    """Show what the run NAME did: its state, calls, loops, failures and environment."""
    try:
        directory = run_directory(Path(store), name)
        entry = _summary(directory)
    except HybridqError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(entry))
        return
    for key in ("name", "workflow", "status", "seed", "evaluations", "steps", "shots", "sessions", "seconds"):
        click.echo(f"{key:<12} {entry[key]}")
    click.echo(f"{'record':<12} {directory}")
    for group, seconds in entry["seconds_by_kind"].items():
        click.echo(f"{'':<12} {group}: {seconds:.2f} s")
    if entry["loops"]:
        click.echo("\nloop                                       method        evaluations  best")
    for loop in entry["loops"]:
        best = "" if loop["best"] is None else f"{loop['best']:.10f}"
        state = "" if loop["finished"] else "  (unfinished)"
        click.echo(f"{loop['at']:<42} {loop['method']:<13} {loop['evaluations']:>11}  {best}{state}")
    if entry["programs"]:
        click.echo(f"\n{'':<41}{'seconds a row':>20}{'memory':>21}")
        click.echo(f"{'program':<14}qubits   shots  evaluations{'predicted':>10}{'median':>10}"
                   f"{'predicted':>11}{'most':>10}")  # fmt: skip
    for one in entry["programs"]:
        times = ["-" if t is None else f"{t:.2g}" for t in (one["predicted_seconds"], one["seconds"])]
        sizes = ["-" if b is None else format_bytes(b) for b in (one["predicted_bytes"], one["bytes"])]
        shots = "exact" if one["shots"] is None else one["shots"]
        click.echo(f"{one['program'][:12]:<14}{one['qubits']:>6} {shots:>7} {one['evaluations']:>12}"
                   f"{times[0]:>10}{times[1]:>10}{sizes[0]:>11}{sizes[1]:>10}")  # fmt: skip
    for failure in entry["failures"]:
        click.echo(f"\n{failure['at']} raised {failure['type'].partition(':')[2]}: {failure['message']}")
    if entry["value"] is not None:
        click.echo(f"\nvalue        {entry['value']}")


@main.command("watch")
@click.argument("name")
@store_option
@click.option("--once", is_flag=True, help="Print how far the run is, and leave.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document a line, one whenever something changed.")
def follow(name: str, store: str, once: bool, as_json: bool) -> None:
    """Follow the run NAME from its record until it ends, also one of another machine on the same file system.

    Exits with 1 if it ended otherwise than finished: it failed, was interrupted, or its driver is gone.
    """
    from hybridq.watch import watch

    try:
        left = watch(run_directory(Path(store), name), once=once, as_json=as_json)
    except HybridqError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)  # the run itself goes on
    if not once and left not in ("finished", "planned"):
        sys.exit(1)


@main.command("report")
@click.argument("name")
@store_option
@click.option("--out", metavar="DIR", help="Directory for the page and the figures.  [default: NAME-report]")
@click.option(
    "--format",
    "formats",
    type=click.Choice(["svg", "png", "pdf"]),
    multiple=True,
    default=("svg", "png"),
    show_default=True,
    help="Format of the figures beside the page; can be given several times.",
)
@click.option(
    "--label",
    metavar="TEXT",
    help="What tells the loops apart, with its unit, as in 'bond length (Å)'; default: the name of the argument.",
)
def write_report(name: str, store: str, out: str | None, formats: tuple[str, ...], label: str | None) -> None:
    """Write a page with the tables and figures of the run NAME, and the figures beside it.

    The page is one HTML file that needs nothing else. A run that is not finished is reported as it is now.
    """
    from hybridq.following import load
    from hybridq.report import report

    try:
        written = report(load(name, store), Path(out or f"{name}-report"), tuple(dict.fromkeys(formats)), label)
    except HybridqError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{written.page}, and {len(written.figures)} figures beside it")


@main.command("graph")
@click.argument("name")
@store_option
@click.option("--out", metavar="FILE", help="Where to write it; - is stdout.  [default: NAME-graph.svg]")
def write_graph(name: str, store: str, out: str | None) -> None:
    """Draw what the run NAME called, and which values went where, as SVG: loops are one box with their counts."""
    from hybridq.graph import drawn, graph

    try:
        picture = drawn(graph(run_directory(Path(store), name)))
    except HybridqError as error:
        raise click.ClickException(str(error)) from error
    if out == "-":
        click.echo(picture, nl=False)
        return
    path = Path(out or f"{name}-graph.svg")
    try:
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written ({error.strerror}); give another with --out.") from error
    click.echo(f"the graph is in {path}")


@main.command()
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "every", is_flag=True, help="Verify every run of the store.")
@store_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def verify(names: tuple[str, ...], every: bool, store: str, as_json: bool) -> None:
    """Look at everything that is recorded of the runs NAME: each line, reference and value.

    Tells all damage, not only the first, and changes nothing. Exits with 1 if anything is damaged.
    """
    if every == bool(names):
        raise click.UsageError("give the names of runs, or --all for every run of the store.")
    try:
        found = [verified(run_directory(Path(store), name)) for name in (run_names(Path(store)) if every else names)]
    except HybridqError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        documents = [_verified_document(one) for one in found]
        click.echo(json.dumps(documents if every or len(documents) > 1 else documents[0]))
    elif not found:
        click.echo(f"no runs in {store}")
    else:
        click.echo("\n\n".join(map(_verified_text, found)))
    if any(one.damage for one in found):
        sys.exit(1)


def _verified_document(found: Verified) -> dict[str, Any]:
    return {
        "name": found.directory.name, "directory": str(found.directory), "sound": not found.damage,
        "status": found.status, "workflow": found.workflow, "last": found.last, "counts": dict(found.counts),
        "environments": [asdict(one) for one in found.environments],
        "damage": [{"file": f.file, "line": f.line, "text": f.text} for f in found.damage],
        "notes": [{"file": f.file, "line": f.line, "text": f.text} for f in found.notes],
    }  # fmt: skip


def _verified_text(found: Verified) -> str:
    n = found.counts
    state = f"DAMAGED in {len(found.damage)} places" if found.damage else "sound"
    recorded = ("sessions", "steps", "evaluations", "loops", "rows", "events", "failures")
    rows = [
        ("state", found.status),
        ("checked", f"lines {n['lines']}, values {n['values']} of {n['bytes']:,} bytes"),
        ("recorded", ", ".join(f"{what} {n[what]}" for what in recorded)),
        ("last digest", found.last or "none"),
        *(("environment", f"python {one.python}, {one.processor}, "
           + ", ".join(f"{name} {version}" for name, version in one.versions.items())
           + f"; sessions {one.sessions}") for one in found.environments),
        *(("damage", str(one)) for one in found.damage),
        *(("note", str(one)) for one in found.notes),
    ]  # fmt: skip
    return "\n".join([f"{found.directory}: {state}", *(f"  {key:<12} {text}" for key, text in rows)])


@main.command()
@click.argument("name")
@click.option("--check", is_flag=True, help="Compare with what is recorded; required.")
@store_option
@click.option("--script", metavar="PATH", help="The script, if it is not where it was.")
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes of a cluster on this machine.")
@click.option("--cluster", metavar="ADDRESS", help="A Dask scheduler to use, such as tcp://host:8786.")
@click.option("--site", metavar="FILE", help="TOML file with the cluster and the devices to use.")
@unencrypted_option
@click.option("--json", "as_json", is_flag=True, help="Put one JSON document on stdout.")
def rerun(name: str, check: bool, store: str, script: str | None, as_json: bool, **where: Any) -> None:
    """Run the finished run NAME again from its record, and compare every output with what is recorded.

    The recorded command is executed once more, with the recorded name, seed and backend and in a fresh directory that
    is removed afterwards; readings of the clock and orders of completion are answered as they were. The record stays
    as it is. Exits with 1 if anything differs or is missing.
    """
    from hybridq.language import Again, Overrides, overrides

    if not check:
        raise click.UsageError(
            f"hybridq rerun executes {name} once more, in a fresh directory, and compares it with its record, which "
            "stays as it is: give --check. To finish a run, use hybridq run."
        )
    try:
        directory = run_directory(Path(store), name)
        header, opened = finished(directory)
        again = Again(
            header.workflow, header.arguments, name, header.seed, decode(load_value(directory, header.backend))
        )
        path, arguments = _recorded_script(name, opened, script)
        with _stdout_for(True) as stdout, tempfile.TemporaryDirectory(prefix="hybridq-rerun-") as fresh:
            events = begin_again(directory, Path(fresh) / name)
            asked = Overrides(store=fresh, again=again, **where)
            overrides.set(asked)
            _run_again(path, arguments)
            made = [report.name for report in asked.reports]
            if name not in made:
                raise click.ClickException(
                    f"{path} did not make the run {name} again, of {header.workflow} with the recorded arguments; it "
                    f"finished {', '.join(made) or 'no run'}. Give the script and surroundings that it had: --script "
                    f"PATH; recorded was the command {' '.join(opened.command)}."
                )
            found = compare(directory, Path(fresh) / name)
            _print_comparison(name, found, events, as_json, stdout)
    except HybridqError as error:
        raise click.ClickException(str(error)) from error
    if not found.same:
        sys.exit(1)


def _recorded_script(name: str, opened: records.Opened, script: str | None) -> tuple[str, tuple[str, ...]]:
    """The script that made a run, and its arguments."""
    recorded, *arguments = opened.command or [""]
    path = script or recorded
    if not Path(path).is_file():
        what = "given with --script" if script else f"recorded for {name}, from a directory that is not recorded"
        raise click.ClickException(
            f"there is no script {path!r} here, which was {what}; give it with --script PATH. Its recorded arguments "
            f"are {arguments}."
        )
    return path, tuple(arguments)


def _run_again(script: str, arguments: tuple[str, ...]) -> None:
    """Run a script again; how it ends does not count, only which runs it finished."""
    try:
        _run_script(script, arguments)
    except SystemExit as error:
        if error.code == _INTERRUPTED:
            raise


def _print_comparison(name: str, found: Comparison, events: int, as_json: bool, stdout: TextIO) -> None:
    others = [output for output in found.outputs if output.grade != "identical"]
    if as_json:
        document = {"name": name, "same": found.same, "counts": found.counts, "events_answered": events,
                    "outputs": [asdict(output) for output in others], "notes": list(found.notes)}  # fmt: skip
        print(json.dumps(document), file=stdout)
        return
    print(f"{name} again, beside its record\n\n{'':<14}" + "".join(f"{grade:>15}" for grade in GRADES), file=stdout)
    for part, counts in found.counts.items():
        if any(counts.values()):
            print(f"{part:<14}" + "".join(f"{counts[grade]:>15}" for grade in GRADES), file=stdout)
    print(file=stdout)
    told = [output for output in others if output.grade in ("differs", "missing", "new")]
    for output in told[:_MOST_TOLD]:
        place = f"{output.part}: {output.at}{output.where and f' {output.where}'}".rstrip(": ")
        values = f"\n  recorded {output.recorded}\n  now      {output.now}" if output.grade == "differs" else ""
        print(f"{output.grade:<8} {place}{values}", file=stdout)
    if len(told) > _MOST_TOLD:
        print(f"and {len(told) - _MOST_TOLD} more; --json lists them all", file=stdout)
    if events:
        print(f"note     clock readings and orders of completion answered as recorded: {events}", file=stdout)
    for note in found.notes:
        print(f"note     {note}", file=stdout)
    print("nothing differs" if found.same else "DIFFERENT", file=stdout)


_MOST_TOLD = 100


@main.command("why")
@click.argument("name")
@click.argument("location")
@click.option("--against", metavar="NAME", help="Compare with this run; default: the one that NAME was forked from.")
@store_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def explain(name: str, location: str, against: str | None, store: str, as_json: bool) -> None:
    """Say what the value at LOCATION of the run NAME came from, and what decides whether it answers a call.

    With another run to compare with, which parts of that changed.
    """
    try:
        other = None if against is None else run_directory(Path(store), against)
        found = origin(run_directory(Path(store), name), location, other)
    except HybridqError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    value = json.dumps(found.value)
    click.echo(f"{found.at}: {found.kind} of the run {found.run}")
    click.echo(f"{'value':<12} {value if len(value) <= 200 else value[:200] + ' ...'}")
    click.echo(f"{'came from':<12} {found.came}")
    for path, place in found.inputs:
        click.echo(f"{'':<12} {path} of its arguments: the value of {place}")
    for failure in found.failures:
        click.echo(f"{'raised':<12} {failure}")
    for part in found.parts:
        same = "" if part.difference is None else "  (changed)" if part.difference else "  (the same)"
        click.echo(f"{part.name:<12} {part.value}{same}")
        if part.difference:
            click.echo(part.difference)
    click.echo(found.verdict)


@main.command()
@click.option("--site", "site_file", metavar="FILE", help="TOML file with the cluster and the devices.")
@click.option("--cluster", metavar="ADDRESS", help="A Dask scheduler, such as tcp://host:8786.")
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes of a cluster on this machine.")
@unencrypted_option
@click.option("--measure", is_flag=True, help="Measure this machine (about 20 s), so that predictions fit it.")
@store_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def devices(site_file: str | None, cluster: str | None, workers: int | None, allow_unencrypted: bool, measure: bool,
            store: str, as_json: bool) -> None:  # fmt: skip
    """List what circuits and steps can run on, and what each device is doing."""
    from hybridq import calibration
    from hybridq.dispatch import driver_device, driver_engine, places_of
    from hybridq.engines.costs import DEFAULT, calibrate
    from hybridq.sites import Site

    try:
        site = Site.of(site_file, cluster=cluster, workers=workers, allow_unencrypted=allow_unencrypted or None)
        if measure:
            written = calibration.write(Path(store), calibrate(driver_engine().evaluate))
            click.echo(f"measured; kept in {written}", err=True)
        measured = calibration.read(Path(store)) is not DEFAULT
        rows = [_device_row(driver_device(), "short circuits of the driver's own")]
        places = places_of(site)
        rows += [_device_row(device, "starts with a run") for device in places.workers]
        if site.cluster is not None:
            from hybridq.cluster import look

            for seen in look(site):
                doing = ", ".join(seen.doing[:3]) + (f" and {len(seen.doing) - 3} more" if len(seen.doing) > 3 else "")
                rows.append(_device_row(seen.device, doing or "idle") | {"host": seen.host, "used": seen.used})
        rows += [_device_row(device, "starts with a run") for device in places.beside]
    except HybridqError as error:
        raise click.ClickException(str(error)) from error
    document = {"site": site.name, "policy": site.policy, "machine": calibration.machine(), "measured": measured,
                "devices": rows}  # fmt: skip
    if as_json:
        click.echo(json.dumps(document))
        return
    click.echo(f"site {site.name}, policy {site.policy}; {document['machine']}")
    click.echo("predicted times: " + ("measured on this machine" if measured else
               "those of another machine; measure this one with --measure"))  # fmt: skip
    width = max(len(row["name"]) for row in rows)
    click.echo(f"\n{'device':<{width}}  slots  threads      memory  qubits  cost/shot  doing")
    for row in rows:
        cost = f"{row['cost_per_shot']:g}" if row["cost_per_shot"] else "-"
        click.echo(f"{row['name']:<{width}}{row['slots']:>7}{row['threads']:>9}{format_bytes(row['bytes']):>12}"
                   f"{row['qubits']:>8}{cost:>11}  {row['doing']}")  # fmt: skip


def _device_row(device: Any, doing: str) -> dict[str, Any]:
    """A device as data; ``qubits`` are those of the largest state vector where only memory bounds them."""
    state_vector = max(0, (max(0, device.bytes - 2**25) // 16).bit_length() - 1)
    return {
        "name": device.name, "slots": device.slots, "threads": device.threads, "bytes": device.bytes,
        "qubits": state_vector if device.qubits is None else device.qubits,
        "cost_per_shot": device.cost_per_shot, "doing": doing,
    }  # fmt: skip


def _summary(directory: Path) -> dict[str, Any]:
    """What a run's journal says, as JSON-able data."""
    entries = read_records(directory)
    if not entries:
        raise WorkflowError(f"{directory} holds no record yet.")
    header = entries[0][1]
    assert isinstance(header, records.RunHeader)
    loops: dict[int, dict[str, Any]] = {}
    seconds: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    failures, opened, end = [], [], None
    history = History(partial(load_value, directory))
    for number, record in entries:
        history.take(number, record)
        match record:
            case records.Step():
                counts["steps"] += 1
                seconds["classical steps"] += record.seconds
            case records.Evaluation():
                counts["evaluations"] += 1
                counts["shots"] += record.shots or 0
                seconds["quantum evaluations"] += record.seconds
            case records.Loop():
                loops[number] = {
                    "at": record.at, "method": record.method, "evaluations": 0, "best": None, "finished": False,
                }  # fmt: skip
            case records.Row():
                loop = loops[record.loop]
                loop["evaluations"] += 1
                loop["best"] = record.value if loop["best"] is None else min(loop["best"], record.value)
                if record.where != "":
                    counts["evaluations"] += 1
                    counts["shots"] += record.shots or 0
                    seconds["quantum evaluations"] += record.seconds
            case records.LoopEnd():
                loops[record.loop]["finished"] = True
                seconds["loops, waiting included"] += record.seconds
            case records.Failure():
                failures.append({"at": record.at, "type": record.type, "message": record.message})
            case records.Opened():
                opened.append(record)
                end = None
            case records.End():
                end = record
    last = opened[-1] if opened else None  # killed right after the header
    value = None
    if end is not None and end.output is not None:
        try:
            value = _jsonable(decode(load_value(directory, end.output)))
        except (HybridqError, click.ClickException) as error:
            value = f"(not shown: {error})"
    return {
        "name": header.name,
        "workflow": header.workflow,
        "seed": header.seed,
        "status": "unfinished" if end is None else end.status,
        "error": None if end is None else end.error,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(opened[0].time)) if opened else None,
        "seconds": None if end is None else round(end.seconds, 3),
        "sessions": len(opened),
        **{key: counts[key] for key in ("evaluations", "steps", "shots")},
        "seconds_by_kind": dict(seconds),
        "loops": list(loops.values()),
        "failures": failures,
        "programs": [asdict(program) for program in history.run().programs],
        "versions": dict(last.versions) if last else {},
        "python": last.python if last else None,
        "processor": last.processor if last else None,
        "value": value,
    }
