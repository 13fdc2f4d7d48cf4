"""What a real run tells its scheduler: the journal's numbers, in time, and never at the run's expense."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from processes import SOON, wait_until
from runs import recorded

import hybridq as hq
from hybridq import journal as records
from hybridq.dispatch import Dispatcher
from hybridq.journal import Journal
from hybridq.monitor.store import TOPIC


@hq.classical
def double(x: float) -> float:
    return 2 * x


@hq.classical(retries=2)
def unlucky(folder: str) -> int:
    tried = len(list(Path(folder).iterdir()))
    Path(folder, str(tried)).touch()
    if tried < 1:
        raise OSError("the disk is elsewhere")
    return tried


@hq.quantum
def energy(theta: list[float]) -> object:
    from qiskit.circuit.library import efficient_su2

    return hq.expval(efficient_su2(2, reps=1), {"XX": 1.0, "ZZ": 1.0}, theta)


@hq.workflow
def loop(index: int) -> float:
    start = double(0.05 * index)
    found: float = hq.minimize(energy, [start] * 8, method="COBYLA", options={"maxiter": 12}).fun
    return found


@hq.workflow
def loops(count: int) -> list[float]:
    return list(hq.map(loop, range(count)))


def shown(client: Client, name: str) -> dict[str, Any]:
    """What the scheduler shows of the run ``name``; empty if it shows nothing."""
    base = str(client.dashboard_link).rpartition("/")[0]
    try:
        with urllib.request.urlopen(f"{base}/hybridq.json", timeout=SOON) as answer:
            runs = json.loads(answer.read())["runs"]
    except urllib.error.HTTPError:
        return {}
    return next((run for run in runs if run["name"] == name), {})


def left(client: Client, name: str) -> dict[str, Any]:
    """The same, when the run's end has been told: where a machine is busy, a run does not wait for that."""
    assert wait_until(lambda: shown(client, name).get("state", "running") != "running", SOON)
    return shown(client, name)


def test_what_is_shown_are_the_journals_numbers(store: Path, client: Client) -> None:
    values = hq.run(loops, 3, name="numbers", store=store, cluster=client)
    run = left(client, "numbers")
    rows = recorded(store / "numbers", records.Row)
    headers = {number: r for number, r in records.read_records(store / "numbers") if isinstance(r, records.Loop)}
    assert run["state"] == "finished"
    assert run["totals"]["evaluations"] == len(rows)
    assert run["totals"]["steps"] == 3
    assert len(run["loops"]) == 3
    for told in run["loops"]:
        (line,) = [number for number, header in headers.items() if header.at == told["at"]]
        of_loop = [row for row in rows if row.loop == line]
        assert [point[1] for point in told["points"]] == [row.value for row in of_loop]
        assert told["rows"] == len(of_loop)
        assert told["best"] == min(row.value for row in of_loop)
        assert told["where"] == of_loop[-1].where
    assert min(told["best"] for told in run["loops"]) <= min(values)
    assert {span["kind"] for span in run["spans"]} == {"quantum", "classical"}
    (group,) = run["groups"]
    assert (group["name"], group["loops"], group["finished"], group["rows"]) == ("loop/energy", 3, 3, len(rows))


def test_a_run_that_is_taken_up_again_shows_all_of_its_record(store: Path, client: Client) -> None:
    hq.run(loops, 2, name="again", store=store, workers=1, monitor=False)
    assert shown(client, "again") == {}
    with pytest.raises(ZeroDivisionError):
        hq.run(broken, store=store, name="more", cluster=client)
    first = left(client, "more")
    assert first["state"] == "failed"
    assert "ZeroDivisionError" in first["error"]
    with pytest.raises(ZeroDivisionError):
        hq.run(broken, store=store, name="more", cluster=client)
    second = left(client, "more")
    assert second["id"] == first["id"]
    assert second["totals"]["evaluations"] == first["totals"]["evaluations"] > 0


@hq.workflow
def broken() -> float:
    loop(1)
    raise ZeroDivisionError("at the end")


def test_nothing_is_told_where_monitoring_is_off(store: Path, client: Client) -> None:
    hq.run(loops, 1, name="off", store=store, cluster=client, monitor=False)
    assert shown(client, "off") == {}


def test_retries_are_shown_with_their_reasons(store: Path, client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "tries"
    folder.mkdir()
    hq.run(retried, str(folder), name="retries", store=store, cluster=client)
    run = left(client, "retries")
    assert run["totals"]["retries"] == 1
    assert [(note["what"], note["at"]) for note in run["notes"]] == [("retried", "retried/unlucky[0]")]
    assert "the disk is elsewhere" in run["notes"][0]["reason"]


@hq.workflow
def retried(folder: str) -> int:
    return unlucky(folder)


def test_refusals_are_shown_with_their_reasons(store: Path, client: Client) -> None:
    hq.run(refused, name="refusals", store=store, cluster=client)
    (note,) = [note for note in left(client, "refusals")["notes"] if note["what"] == "refused"]
    assert note["at"] == "refused/greedy[0]"
    assert "GiB" in note["reason"] or "TiB" in note["reason"]


@hq.classical(memory="4000 GiB")
def greedy() -> int:
    return 1


@hq.workflow
def refused() -> int:
    try:
        return greedy()
    except hq.TooLarge:
        return double(1.0) > 0


@hq.workflow
def unwatched(count: int) -> list[float]:
    """Loops, and no end before the monitoring has ended."""
    values = loops(count)
    assert wait_until(lambda: not any(t.name == "hybridq-monitor" for t in threading.enumerate()), SOON)
    return values


def test_a_run_goes_on_where_its_monitoring_breaks(
    store: Path, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: Dispatcher) -> None:
        raise RuntimeError("no loads today")

    monkeypatch.setattr(Dispatcher, "loads", fails)
    assert len(hq.run(unwatched, 2, name="breaks", store=store, cluster=client)) == 2
    assert shown(client, "breaks") == {}
    assert "no loads today" in capsys.readouterr().err


def test_a_scheduler_that_takes_no_page_costs_one_line(
    store: Path, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'hybridq'")

    monkeypatch.setattr("hybridq.monitor.plugin.Monitor.__reduce__", fails, raising=False)
    assert len(hq.run(unwatched, 2, name="bare", store=store, cluster=client)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "no page for this run" in line]
    assert len(said) == 1


def test_a_journal_is_followed_from_the_line_that_it_says(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run")
    journal.append(records.RunHeader(1, "run", "w", "c", "a", None, 0, None))
    seen: deque[tuple[int, records.Record]] = deque()
    assert journal.follow(seen) == 1
    journal.append_all([records.Survived("a"), records.Survived("b")])
    journal.append(records.Survived("c"))
    journal.follow(None)
    journal.append(records.Survived("d"))
    journal.close()
    assert [(number, getattr(record, "at", "")) for number, record in seen] == [(2, "a"), (3, "b"), (4, "c")]
    assert list(seen) == records.read_records(tmp_path / "run")[1:4]


@pytest.mark.slow
def test_a_scheduler_that_is_lost_and_comes_again_is_told_all(store: Path) -> None:
    """In place of the one that is killed another one is started; the run goes on there, and is shown whole."""
    import threading

    from test_cluster import free_port, scheduler_and_workers

    port = free_port()
    with scheduler_and_workers({}, port=port) as (address, processes):
        ended: list[Any] = []
        site = hq.Site(cluster=address, patience=300.0)
        thread = threading.Thread(
            target=lambda: ended.append(hq.run(slow_loops, 40, name="restarted", store=store, site=site))
        )
        thread.start()
        assert wait_until(lambda: (store / "restarted").exists() and recorded(store / "restarted", records.Step) != [],
                          2 * SOON)  # fmt: skip
        processes[0].kill()
        assert wait_until(lambda: not any(process.alive() for process in processes), 2 * SOON)
        with scheduler_and_workers({}, port=port) as (_, _), Client(address) as client:
            thread.join(300)
            assert ended
            assert ended[0] == [float(i) for i in range(40)]
            steps = len(recorded(store / "restarted", records.Step))
            assert wait_until(lambda: any(topic == TOPIC for topic in client.get_events()) and steps == 40, SOON), (
                "the new scheduler was told nothing"
            )


@hq.classical
def nap(index: int) -> float:
    import time

    time.sleep(0.5)
    return float(index)


@hq.workflow
def slow_loops(count: int) -> list[float]:
    return list(hq.map(nap, range(count)))
