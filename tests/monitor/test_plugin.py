"""On real schedulers: page, JSON and metrics, late, twice, under a prefix, and where parts of it cannot be had."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from processes import SOON, wait_until
from told import TOTALS, loop, message

from hybridq.monitor.plugin import MOUNTED, Monitor, pack, unpack
from hybridq.monitor.store import TOPIC


@contextmanager
def scheduler(**options: Any) -> Iterator[tuple[Client, str]]:
    """A client of a scheduler in this process, without workers, that shows runs; and where its dashboard is."""
    with (
        LocalCluster(
            n_workers=0, processes=False, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50,
            protocol="tcp", scheduler_kwargs=options,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        client.register_plugin(Monitor())
        yield client, str(client.dashboard_link).rpartition("/")[0]


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=SOON) as answer:
        text: str = answer.read().decode()
        return text


def numbers(base: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(get(f"{base}/hybridq.json"))
    return found


def texts(base: str) -> str:
    """The tables of a page that is opened now: of the document that a browser would be sent."""
    from bokeh.client import pull_session
    from bokeh.models import Div

    session = pull_session(url=f"{base}/hybridq")
    try:
        return "".join(div.text for div in session.document.select({"type": Div}))
    finally:
        session.close()


@pytest.fixture(scope="module")
def mounted() -> Iterator[tuple[Client, str]]:
    with scheduler() as found:
        yield found


def test_a_message_comes_back_as_it_was() -> None:
    told = message(loops=[loop(values=[0.1, 1 / 3])])
    assert unpack(pack(told)) == told


@pytest.mark.parametrize("junk", [b"", b"junk", pack({})[:-3], b"\x00" * 100, pack([1]), "text", 7, None])  # type: ignore[arg-type]
def test_what_is_no_message_is_one_kind_of_error(junk: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # each has a reason of its own
        unpack(junk)


def test_pages_of_dask_link_to_ours_and_ours_to_them(mounted: tuple[Client, str]) -> None:
    _, base = mounted
    assert 'href="hybridq"' in get(f"{base}/status")
    ours = get(f"{base}/hybridq")
    assert 'href="status"' in ours
    assert 'href="hybridq"' in ours
    assert ours.count('href="hybridq"') == 1


def test_a_page_opened_late_has_the_history_and_changes_with_what_is_told(mounted: tuple[Client, str]) -> None:
    client, base = mounted
    client.log_event(TOPIC, pack(message("late", loops=[loop(values=[-1.0, -1.125])], totals=TOTALS)))
    assert "-1.125".replace("-", "−") in texts(base)
    client.log_event(TOPIC, pack(message("late", at=1.0, loops=[loop(values=[-1.25], first=2)], totals=TOTALS)))
    assert "−1.25000000" in texts(base)
    (run,) = [run for run in numbers(base)["runs"] if run["name"] == "late"]
    assert [point[1] for point in run["loops"][0]["points"]] == [-1.0, -1.125, -1.25]


def test_names_are_shown_and_never_run(mounted: tuple[Client, str]) -> None:
    client, base = mounted
    evil = "<img src=x onerror=alert(1)>\"'&<script>alert(2)</script>"
    told = message(
        evil, driver=evil, workflow=evil, error=evil, loops=[loop(at=evil, group=evil, method=evil, where=evil,
                                                                  unit=evil, source=evil, reference=0.0)],
        devices=[[evil, 1, 1, 0, 0, 1]], notes=[[1e9, "failed", evil, evil]],
        spans=[[evil, 1e9, 1.0, "quantum", evil, 1]],
    )  # fmt: skip
    client.log_event(TOPIC, pack(told))
    shown = texts(base)
    assert "&lt;img src=x onerror" in shown
    assert "<img" not in shown
    assert "<script" not in shown
    assert any(run["name"] == evil for run in numbers(base)["runs"])


def test_two_drivers_are_two_runs(mounted: tuple[Client, str]) -> None:
    client, base = mounted
    client.register_plugin(Monitor())  # as the second driver does
    for driver in ("one:1", "two:2"):
        told = message("shared", id=f"shared@{driver}", driver=driver, totals={**TOTALS, "evaluations": len(driver)})
        client.log_event(TOPIC, pack(told))
    runs = [run for run in numbers(base)["runs"] if run["name"] == "shared"]
    assert sorted(run["driver"] for run in runs) == ["one:1", "two:2"]
    assert len(client.get_events(MOUNTED)) == 1, "it was mounted a second time"


@pytest.mark.parametrize("junk", [b"junk", "text", 3, None, pack({"v": 1}), pack(message(v=99))])
def test_junk_in_our_topic_is_counted_and_harms_nothing(mounted: tuple[Client, str], junk: Any) -> None:
    client, base = mounted
    before = numbers(base)["unread"]
    client.log_event(TOPIC, junk)
    assert numbers(base)["unread"] == before + 1
    client.log_event("other", junk)
    assert numbers(base)["unread"] == before + 1


def test_a_thousand_loops_are_shown_as_their_sums(mounted: tuple[Client, str]) -> None:
    client, base = mounted
    told = [
        loop(f"scan/p[{i}]/minimize[0]", [-1.0, -2.0 + 1e-4], group="p/energy", reference=-2.0, unit="hartree",
             state="finished" if i % 2 else "running")
        for i in range(1000)
    ]  # fmt: skip
    client.log_event(TOPIC, pack(message("many", full=True, loops=told)))
    shown = texts(base)
    assert "1,000 loops: 500 running, 500 finished" in shown
    assert "984 more loops are in the sums" in shown


def test_a_plugin_that_goes_and_comes_again_finds_its_pages() -> None:
    with scheduler() as (client, base):
        client.log_event(TOPIC, pack(message("gone")))
        client.unregister_scheduler_plugin(Monitor.name)
        assert numbers(base)["runs"] == []
        client.register_plugin(Monitor())
        client.log_event(TOPIC, pack(message("here")))
        assert [run["name"] for run in numbers(base)["runs"]] == ["here"]
        assert get(f"{base}/hybridq").count('href="hybridq"') == 1
        client.restart()
        assert [run["name"] for run in numbers(base)["runs"]] == ["here"]


def test_under_a_prefix() -> None:
    with scheduler(http_prefix="/lab") as (client, _):
        root = str(client.dashboard_link).partition("/status")[0].removesuffix("/lab") + "/lab"
        client.log_event(TOPIC, pack(message("far")))
        assert [run["name"] for run in numbers(root)["runs"]] == ["far"]
        assert "far" in texts(root)
        assert 'href="hybridq"' in get(f"{root}/status")


def test_a_worker_told_of_by_address_is_shown_by_name_with_what_it_takes(client: Client) -> None:
    client.register_plugin(Monitor())
    base = str(client.dashboard_link).rpartition("/")[0]
    address, worker = next(iter(client.scheduler_info()["workers"].items()))
    client.log_event(TOPIC, pack(message("named", devices=[[address, 1, 1, 0, 2**30, 2**31]])))
    (found,) = [w for w in numbers(base)["workers"] if w["address"] == address]
    assert found["name"] == str(worker["name"])
    assert wait_until(lambda: all(w["measured"] > 2**20 for w in numbers(base)["workers"]), SOON)
    assert found["limit"] == worker["memory_limit"]


def test_metrics_have_few_labels_however_much_is_told() -> None:
    pytest.importorskip("prometheus_client", reason="the metrics need prometheus-client")
    with scheduler() as (client, base):
        told = message(
            "metered", totals={**TOTALS, "evaluations": 41, "quantum": 2.5}, queue={"waiting": 3, "seconds": 1.0},
            loops=[loop("a", [-1.5], reference=-1.75, unit="hartree")], devices=[["tcp://a", 4, 2, 0, 0, 1]],
        )  # fmt: skip
        client.log_event(TOPIC, pack(told))
        lines = [line for line in get(f"{base}/metrics").splitlines() if line.startswith("hybridq_")]
        found = dict(line.rsplit(" ", 1) for line in lines)
        assert float(found['hybridq_evaluations_total{run="metered@0"}']) == 41
        assert float(found['hybridq_best_value{group="curve/energy",run="metered@0"}']) == -1.5
        assert float(found['hybridq_error{group="curve/energy",run="metered@0"}']) == 0.25
        assert float(found['hybridq_busy_seconds_total{kind="quantum",run="metered@0"}']) == 2.5
        assert float(found['hybridq_queue{run="metered@0"}']) == 3
        assert float(found['hybridq_busy_slots{run="metered@0"}']) == 2
        for number in range(30):
            loops = [loop(f"l{i}", group=f"g{i}") for i in range(40)]
            client.log_event(TOPIC, pack(message(f"r{number}", loops=loops)))
        lines = [line for line in get(f"{base}/metrics").splitlines() if line.startswith("hybridq_")]
        assert len(lines) < 3000


def test_metrics_of_a_scheduler_end_with_it() -> None:
    client = pytest.importorskip("prometheus_client", reason="the metrics need prometheus-client")
    with scheduler() as (connected, base):
        connected.log_event(TOPIC, pack(message("short-lived")))
        assert 'run="short-lived@0"' in get(f"{base}/metrics")
    assert "short-lived" not in client.generate_latest().decode()


TESTS = str(Path(__file__).parents[1])
BLOCKED = """
import json, sys, urllib.request
sys.path.insert(0, {tests!r})
for name in {blocked!r}:
    sys.modules[name] = None
from distributed import Client, LocalCluster
from hybridq.monitor.plugin import MOUNTED, Monitor, pack
from hybridq.monitor.store import TOPIC
from told import message
if __name__ == "__main__":
    with LocalCluster(n_workers=0, processes=False, host="127.0.0.1", dashboard_address="127.0.0.1:0",
                      silence_logs=50, protocol="tcp") as cluster, Client(cluster) as client:
        client.register_plugin(Monitor())
        client.log_event(TOPIC, pack(message("<b>plain</b>")))
        base = client.dashboard_link.rpartition("/")[0]
        get = lambda path: urllib.request.urlopen(base + path, timeout=60).read().decode()
        print(json.dumps({{"shown": client.get_events(MOUNTED)[-1][1], "page": get("/hybridq"),
                           "json": get("/hybridq.json"), "metrics": get("/metrics")}}))
"""


def without(*blocked: str) -> dict[str, Any]:
    """What a scheduler shows in a process in which these libraries cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=blocked, tests=TESTS)], capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_without_bokeh_the_page_is_plain_and_the_reason_is_told() -> None:
    found = without("bokeh")
    assert found["shown"]["page"] == "plain"
    assert "bokeh" in found["shown"]["why"]
    assert "&lt;b&gt;plain&lt;/b&gt;" in found["page"]
    assert "Figures are left out" in found["page"]
    assert json.loads(found["json"])["runs"][0]["name"] == "<b>plain</b>"


def test_without_prometheus_the_rest_is_there() -> None:
    found = without("prometheus_client")
    assert found["shown"] == {"page": "figures", "why": ""}
    assert json.loads(found["json"])["runs"][0]["name"] == "<b>plain</b>"
    assert "hybridq_" not in found["metrics"]


def test_where_private_names_of_dask_have_changed_the_page_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("distributed.dashboard.core.BokehApplication")
    with scheduler() as (client, base):
        client.log_event(TOPIC, pack(message("plain")))
        ((_, shown),) = client.get_events(MOUNTED)
        assert shown["page"] == "plain"
        assert "BokehApplication" in shown["why"]
        assert "plain" in get(f"{base}/hybridq")


def test_where_nothing_can_be_mounted_the_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("distributed.dashboard.core.BokehApplication")
    monkeypatch.delattr("distributed.http.utils.RequestHandler")
    with scheduler() as (client, _):
        ((_, shown),) = client.get_events(MOUNTED)
        assert shown["page"] == ""
        assert "RequestHandler" in shown["why"]
